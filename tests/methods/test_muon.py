"""Muon: torch's bits under compat="torch", the oracle without, the recorded trajectories, options.

What holds for the polar factor itself is in tests/kernels/test_polar.py.
"""

import ast
import copy
import inspect
import math
import textwrap

import pytest
import torch
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.problems import check_refusal, gradients, run, same, trajectory, weight
from helpers.recordings import fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SHAPES, SQUARE, TALL, WIDE
from oracles.common import newton_schulz
from oracles.muon import muon

from stiefel.kernels import POLAR_METHODS
from stiefel.optimizers import Muon
from stiefel.optimizers.muon import ADJUST_LR_FNS

RECORDED = sorted(path.stem for path in FIXTURES.glob("muon-torch-*.json"))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("ratio", ["original", "match_rms_adamw", None, "unset"])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (17, 5), (48, 48), (1, 7)])
def test_compat_torch_has_the_bits_of_torch(shape, ratio, nesterov):
    """The installed torch, float32 weights."""
    p, q, flags = weight(shape), weight(shape), {} if ratio == "unset" else {"adjust_lr_fn": ratio}
    ours = Muon([p], lr=0.02, nesterov=nesterov, compat="torch", **flags)
    theirs = torch.optim.Muon([q], lr=0.02, nesterov=nesterov, **flags)
    for G in gradients(shape, 4):
        p.grad, q.grad = G.clone(), G.clone()
        ours.step()
        theirs.step()
        assert torch.equal(p, q)
    assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (17, 5)])
def test_compat_torch_has_the_bits_of_torch_with_bfloat16_weights(shape):
    """With Nesterov; without it torch spoils its own buffer, which we do not copy."""
    p, q = weight(shape, dtype=torch.bfloat16), weight(shape, dtype=torch.bfloat16)
    ours = Muon([p], lr=0.02, compat="torch")
    theirs = torch.optim.Muon([q], lr=0.02)
    for G in gradients(shape, 4, dtype=torch.bfloat16):
        p.grad, q.grad = G.clone(), G.clone()
        ours.step()
        theirs.step()
        assert torch.equal(p, q)
    assert same(dict(theirs.state[q])["momentum_buffer"], ours.state[p]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_has_torchs_bits_and_steps_coefficients_pass(dtype):
    params, twins = ([weight(ODD, k, dtype) for k in range(4)] for _ in range(2))
    flags = {"ns_steps": 3, "ns_coefficients": (3.0, -4.0, 2.0), "eps": 1e-6, "momentum": 0.8}
    ours, theirs = Muon(params, compat="torch", **flags), torch.optim.Muon(twins, **flags)
    for step in range(4):
        for k, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = gradients(ODD, 4, k, dtype)[step]
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert [len(bucket.units) for bucket in ours._plan.buckets] == [4]
    assert same([p.detach() for p in params], [q.detach() for q in twins])


# the interface of torch


def names_of_scales():
    """What the installed torch.optim.Muon accepts as ``adjust_lr_fn``, read from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(torch.optim.Muon.__init__)))
    return {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and getattr(node.left, "id", "") == "adjust_lr_fn"
        for choices in node.comparators
        if isinstance(choices, (ast.List, ast.Tuple, ast.Set))
        for name in ast.literal_eval(choices)
    }


def test_positional_arguments_are_those_of_torch_in_its_order():
    theirs = [p for p in inspect.signature(torch.optim.Muon).parameters.values()]
    names = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    ours = inspect.signature(Muon).parameters.values()
    found = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [name for name in names if name not in found]
    assert found == names, f"Muon lacks {missing}, or has them in another order: {found}"
    missing = {p.name for p in theirs} - {p.name for p in ours}
    assert not missing, f"Muon lacks torch's {', '.join(sorted(missing))}"


def test_every_scale_of_torch_is_one_of_ours():
    names = names_of_scales()
    assert {"original", "match_rms_adamw"} <= names  # the source was understood
    missing = names - set(ADJUST_LR_FNS)
    assert not missing, f"adjust_lr_fn lacks torch's {', '.join(sorted(missing))}"


def test_torchs_name_of_the_spectral_scale_is_an_alias_also_in_a_checkpoint():
    """``"spectral_unclamped"`` came with torch 2.14."""
    G, params = gradients(WIDE, 2), [weight(WIDE) for _ in range(3)]
    first, second, third = (
        Muon([p], lr=0.1, adjust_lr_fn=name)
        for p, name in zip(params, ("spectral", "spectral_unclamped", None), strict=True)
    )
    for optimizer, p in zip((first, second, third), params, strict=True):
        p.grad = G[0].clone()
        optimizer.step()
    assert torch.equal(params[0], params[1]) and not torch.equal(params[0], params[2])
    with torch.no_grad():
        params[2].copy_(params[1])
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    assert third.param_groups[0]["adjust_lr_fn"] == "spectral_unclamped"
    for optimizer, p in zip((first, second, third), params, strict=True):
        p.grad = G[1].clone()
        optimizer.step()
    assert torch.equal(params[0], params[1]) and torch.equal(params[0], params[2])


def test_a_checkpoint_of_torch_with_its_name_of_the_spectral_scale_loads():
    p, q = weight(TALL), weight(TALL)
    theirs = torch.optim.Muon([q], lr=0.1)
    q.grad = gradients(TALL, 1)[0]
    theirs.step()
    saved = theirs.state_dict()
    saved["param_groups"][0]["adjust_lr_fn"] = "spectral_unclamped"
    ours = Muon([p], compat="torch")
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["adjust_lr_fn"] == "spectral_unclamped"
    p.grad = gradients(TALL, 1)[0]
    ours.step()


def test_defaults_and_positions_of_torch_give_its_bits():
    p, q, G = weight(TALL), weight(TALL), gradients(TALL, 1)[0]
    values = (0.02, 0.3, 0.8, False, (3.0, -4.0, 2.0), 1e-6, 3, "match_rms_adamw")
    p.grad = q.grad = G
    Muon([p], *values, compat="torch").step()
    torch.optim.Muon([q], *values).step()
    assert torch.equal(p, q)


def test_a_method_in_the_place_of_coefficients_is_refused():
    """``polar`` was the sixth argument once."""
    for make in (
        lambda: Muon([weight(TALL)], 1e-3, 0.1, 0.95, True, "svd"),
        lambda: Muon([weight(TALL)]).add_param_group(
            {"params": [weight(WIDE)], "ns_coefficients": "svd"}
        ),
    ):
        with pytest.raises(ValueError, match="by keyword, polar='svd'") as caught:
            make()
        assert "\n" not in str(caught.value)


# the smallest norm to divide by


@pytest.mark.parametrize("polar", [*POLAR_METHODS, "low_rank"])
def test_a_vanishing_gradient_takes_a_whole_step(polar):
    """In float32, where its squares are zero; a denormal one takes a whole step at most."""

    def norm(size):
        p = torch.nn.Parameter(torch.zeros(TALL))
        p.grad = size * gradients(TALL, 1)[0]
        Muon([p], lr=1.0, polar=polar).step()
        return float(p.detach().norm())

    whole = norm(1.0)
    for size in (1e-20, 1e-30, 1e-36):
        assert math.isclose(norm(size), whole, rel_tol=0.05), (size, norm(size), whole)
    assert 0 < norm(1e-41) < 1.5 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_eps_is_the_least_norm(dtype):
    """None is the smallest normal number, torch's 1e-7 under compat; a number is kept."""
    tiny, G = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny, gradients(TALL, 1)[0]
    for compat, value in ((None, tiny), ("torch", 1e-7)):
        steps = []
        for options in ({}, {"eps": value}, {"eps": 1e-3}):
            p = torch.nn.Parameter(torch.zeros(TALL, dtype=dtype))
            p.grad = (1e-9 * G).to(dtype)
            optimizer = Muon([p], lr=1.0, polar="ns5", compat=compat, **options)
            assert optimizer.param_groups[0]["eps"] == options.get("eps")
            optimizer.step()
            steps.append(p.detach())
        assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


def test_eps_of_a_checkpoint_is_kept():
    saved = Muon([weight(TALL)], eps=1e-7).state_dict()
    optimizer = Muon([weight(TALL)])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["eps"] == 1e-7


# recorded trajectories


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectory(name):
    """torch.optim.Muon with its iteration in float32, which is polar="ns5" on a CPU."""
    data = fixture(name)
    settings = dict(data["settings"]["optimizer"])
    p = torch.nn.Parameter(data["W0"].clone())
    out = run(Muon([p], polar="ns5", **settings), [p], [list(data["grads"])])
    bound = tolerance(data, "float32_polar_vs_float64")
    worst = max(
        float((W[0] - R).abs().max()) for W, R in zip(out, data["W_float32_polar"], strict=True)
    )
    assert worst <= bound, (worst, bound)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectory_in_bfloat16(name):
    """The published bfloat16 iteration: its bits depend on the order of products, so loosely."""
    data = fixture(name)
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = Muon([p], compat="torch", **data["settings"]["optimizer"])
    out = run(optimizer, [p], [list(data["grads"])])
    worst = max(float((W[0] - R).abs().max()) for W, R in zip(out, data["W"], strict=True))
    assert worst <= 4 * data["noise"]["bfloat16_vs_float64"], worst
    buffer = torch.tensor(data["final_state"]["momentum_buffer"])
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], buffer, rtol=0, atol=2e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_equals_pytorch_optimizer(shape, nesterov):
    """The installed package, live."""
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    p, q = weight(shape), weight(shape)
    ours = Muon([p], lr=0.02, weight_decay=0.1, nesterov=nesterov, compat="torch")
    theirs = package.Muon(
        [{"params": [q], "use_muon": True}], lr=0.02, weight_decay=0.1, nesterov=nesterov
    )
    for G in gradients(shape, 4):
        p.grad, q.grad = G.clone(), G.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle_with_an_exact_factor(shape, nesterov):
    p, grads = weight(shape, dtype=torch.float64), gradients(shape, 6, dtype=torch.float64)
    out = run(Muon([p], lr=0.02, nesterov=nesterov, polar="svd"), [p], [grads])
    want = muon(weight(shape, dtype=torch.float64).detach(), grads, nesterov=nesterov)
    for W, R in zip(out, want, strict=True):
        torch.testing.assert_close(W[0], R, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", ["rms", "original"])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle_with_newton_schulz(shape, dtype, atol, scale):
    p, grads = weight(shape, dtype=dtype), gradients(shape, 6, dtype=dtype)
    ratio = {"rms": "match_rms_adamw", "original": "original"}[scale]
    out = run(Muon([p], lr=0.02, polar="ns5", adjust_lr_fn=ratio), [p], [grads])
    start = weight(shape, dtype=dtype).detach()
    want = muon(start, grads, factor=newton_schulz, scale=scale)
    torch.testing.assert_close(out[-1][0].double(), want[-1], rtol=0, atol=atol)


@pytest.mark.parametrize("polar", [*POLAR_METHODS, "auto"])
def test_every_polar_method_trains_and_keeps_its_size(polar):
    """RMS of the update is 0.2 times lr within the band of the method."""
    for shape in (TALL, WIDE, SQUARE):
        p = weight(shape, dtype=torch.float32)
        start = p.detach().clone()
        optimizer = Muon([p], lr=1.0, weight_decay=0.0, polar=polar)
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        rms = float((p.detach() - start).square().mean().sqrt())
        assert 0.1 < rms < 0.25, (polar, shape, rms)


@pytest.mark.parametrize(
    "name, ratio",
    [
        ("original", math.sqrt(3)),
        (None, math.sqrt(3)),
        ("match_rms_adamw", 0.2 * math.sqrt(24)),
        ("auto", 0.2 * math.sqrt(24)),
        ("spectral", math.sqrt(3)),
        ("none", 1.0),
    ],
)
def test_scale_rules_multiply_the_update_and_not_the_decay(name, ratio):
    def step(G, **flags):
        p = torch.nn.Parameter(torch.ones(24, 8))
        p.grad = G
        Muon([p], lr=0.1, weight_decay=0.5, **flags).step()
        return p.detach()

    G = gradients((24, 8), 1)[0]
    decayed = torch.full((24, 8), 1 - 0.1 * 0.5)
    unit = step(G, adjust_lr_fn="none") - decayed
    torch.testing.assert_close(step(G, adjust_lr_fn=name), decayed + ratio * unit)


def test_match_rms_of_an_exact_factor_is_a_fifth():
    for shape in (TALL, WIDE, SQUARE):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = gradients(shape, 1)[0]
        Muon([p], lr=1.0, polar="svd", weight_decay=0.0).step()
        assert math.isclose(float(p.detach().square().mean().sqrt()), 0.2, rel_tol=1e-5)


@pytest.mark.parametrize("polar", [*POLAR_METHODS, "auto"])
def test_zero_rank_one_row_and_nan(polar):
    """No NaN from any of them; a NaN gradient leaves all as it is."""
    p = weight((8, 6))
    before, p.grad = p.detach().clone(), torch.zeros(8, 6)
    Muon([p], polar=polar, weight_decay=0.0).step()
    assert torch.equal(p.detach(), before)
    u, v = (x / x.norm() for x in (torch.arange(8.0), torch.arange(6.0)))
    p = torch.nn.Parameter(torch.zeros(8, 6))
    p.grad = 300.0 * torch.outer(u, v)
    Muon([p], lr=1.0, weight_decay=0.0, polar=polar, adjust_lr_fn="none").step()
    along = float(-u @ p.detach() @ v)
    assert 0.6 < along < 1.25
    if polar == "qdwh":  # right on the range, an isometry beside it
        torch.testing.assert_close(-p.detach() @ v, u, rtol=0, atol=1e-4)
    elif polar == "turbo":  # scaled along v first
        torch.testing.assert_close(torch.outer(u, u) @ p.detach(), p.detach(), rtol=0, atol=1e-4)
    else:
        atol = 5e-3 if polar == "deepseekv4" else 2e-4  # its slope at 0 is 79263
        torch.testing.assert_close(-p.detach(), along * torch.outer(u, v), rtol=0, atol=atol)
    for shape in (ROW, COLUMN):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = gradients(shape, 1)[0]
        Muon([p], lr=1.0, polar=polar, adjust_lr_fn="none").step()
        norm = float(p.detach().norm())
        assert 0.6 < norm < 1.25 and torch.dot((-p.detach()).view(-1), p.grad.view(-1)) > 0
    p = weight((8, 6))
    before, p.grad = p.detach().clone(), torch.full((8, 6), float("nan"))
    optimizer = Muon([p], polar=polar)
    optimizer.step()
    assert torch.equal(p, before) and float(optimizer.state[p]["momentum_buffer"].abs().max()) == 0


@pytest.mark.parametrize("compat", [None, "torch"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffer_is_the_average_and_the_gradient_unchanged(dtype, nesterov, compat):
    """Normalizing must work on a copy, whatever the dtypes."""
    p, G = weight(SQUARE, dtype=dtype), gradients(SQUARE, 1)[0].to(dtype)
    p.grad = G.clone()
    optimizer = Muon([p], nesterov=nesterov, compat=compat, momentum=0.9)
    optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    assert buffer.dtype == (dtype if compat else torch.float32)
    torch.testing.assert_close(buffer.float(), 0.1 * G.float(), rtol=1e-2, atol=1e-3)
    assert torch.equal(p.grad, G)


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("compat", [None, "torch"])
def test_state_dict_round_trip_is_bit_equal(stop, compat):
    def make():
        params = [weight(TALL, 0), weight(TALL, 1), weight((4,), 2)]
        return params, Muon(params, lr=0.02, compat=compat)

    grads = [gradients(TALL, 6, 0), gradients(TALL, 6, 1), [torch.ones(4)] * 6]
    check_resume(make, grads, stop, through=lambda saved: saved)


def test_a_checkpoint_of_torch_goes_on_with_its_bits_and_ours_loads_into_torch():
    p, q, grads = weight(TALL), weight(TALL), gradients(TALL, 6)
    theirs = torch.optim.Muon([p], lr=0.02)
    run(theirs, [p], [grads[:3]])
    q.data.copy_(p.data)
    ours = Muon([q], compat="torch")
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch shares what it loads
    assert ours.param_groups[0]["lr"] == 0.02 and ours.state[q]["step"] == 0
    assert same(run(theirs, [p], [grads[3:]]), run(ours, [q], [grads[3:]]))
    back = torch.optim.Muon([weight(TALL)])
    back.load_state_dict(ours.state_dict())
    assert torch.equal(
        next(iter(back.state.values()))["momentum_buffer"], ours.state[q]["momentum_buffer"]
    )


def test_kellerjordans_groups_work_as_they_are():
    hidden, head, bias = weight(SQUARE, 0), weight(TALL, 1), weight((4,), 2)
    optimizer = Muon([
        {"params": [hidden], "use_muon": True, "lr": 0.05, "momentum": 0.9},
        {"params": [head, bias], "use_muon": False, "lr": 3e-4},
    ])  # fmt: skip
    assert [row.rule for row in optimizer.assignment()] == ["Muon", "adamw", "adamw"]
    with pytest.warns(UserWarning, match="AdamW trains it instead of Muon") as seen:
        mixed = Muon([{"params": [("a.weight", hidden), ("a.bias", bias)], "use_muon": True}])
    assert len(seen) == 1 and "'a.bias'" in str(seen[0].message)
    assert [row.rule for row in mixed.assignment()] == ["Muon", "adamw"]


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"momentum": -0.1}, "momentum should be >= 0"),
        ({"polar": "qr"}, "polar must be"),
        ({"ns_steps": 100}, "less than 100"),
        ({"ns_steps": 0}, "less than 100|at least"),
        ({"ns_steps": 5.0}, r"ns_steps must be an int from 1 to 99, or None, got 5\.0"),
        ({"ns_steps": True}, "ns_steps must be an int from 1 to 99, or None, got True"),
        ({"adjust_lr_fn": "rms"}, "Adjust learning rate function rms is not supported"),
        ({"compat": "reference"}, "compat"),
        ({"compat": "torch", "polar": "svd"}, "compat='torch'"),
        ({"eps": -1.0}, "Invalid epsilon value"),
        ({"polar_norm": "aol", "compat": "torch"}, "leave polar_norm unset"),
        ({"polar_norm": "nuclear"}, "norm"),
        ({"polar": "svd", "ns_steps": 3}, "steps"),
        ({"ns_coefficients": (1.0, 2.0)}, "coefficients"),
    ],
)
def test_bad_settings_are_one_sentence(bad, text):
    check_refusal(Muon, bad, text)


@pytest.mark.parametrize("norm", ["frobenius", "schatten4", "aol", "power:2"])
def test_polar_norms_train(norm):
    p = weight(TALL)
    run(Muon([p], polar="ns5", polar_norm=norm), [p], [gradients(TALL, 3)])
    plain = trajectory(lambda ps: Muon(ps, polar="ns5"), TALL, 3)[-1]
    assert p.isfinite().all()
    if not norm.startswith("power"):  # whose bound may be the Frobenius norm itself
        assert torch.equal(p.detach(), plain) == (norm == "frobenius")


def test_polar_auto_is_zolo_on_a_cpu():
    assert same(
        trajectory(lambda ps: Muon(ps), TALL), trajectory(lambda ps: Muon(ps, polar="zolo"), TALL)
    )


@pytest.mark.parametrize("coefficients", [(0.9, 0.95, 0.99), (3.0, 3.0, 3.0), [(9.0, 9, 9)] * 4])
def test_a_polynomial_that_diverges_is_refused(coefficients):
    with pytest.raises(ValueError, match=r"ns_coefficients .* diverge"):
        Muon([weight(TALL)], ns_coefficients=coefficients)
    for bounded in ((3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0)):
        assert Muon([weight(TALL)], ns_coefficients=bounded).defaults["ns_coefficients"] == bounded
