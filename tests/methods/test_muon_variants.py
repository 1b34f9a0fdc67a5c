"""Muon's options: shapes, momentum, decay, second moments, low rank, guards, reports."""

import copy
import itertools
import math

import pytest
import torch
from helpers.allocations import count_step
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.problems import check_refusal, gradients, run, same, trajectory, weight
from helpers.recordings import fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SHAPES, SQUARE, TALL, WIDE
from oracles.muon import muon

from stiefel.kernels import polar_factor, polar_report
from stiefel.optimizers import Muon, heavy_tail_schedule
from stiefel.optimizers import muon as toolkit

VARIANTS = {
    "sum": ({"momentum_kind": "sum"}, {"kind": "sum"}),
    "plain sum": ({"momentum_kind": "sum", "nesterov": False}, {"kind": "sum", "nesterov": False}),
    "normuon": ({"second_moment": "normuon"}, {"second_moment": "normuon"}),
    "normuon, beta2": (
        {"second_moment": "normuon", "beta2": 0.5},
        {"second_moment": "normuon", "beta2": 0.5},
    ),
    "adamuon": ({"second_moment": "adamuon"}, {"second_moment": "adamuon"}),
    "cautious": ({"cautious": True}, {"cautious": True}),
    "cautious normuon": (
        {"cautious": True, "second_moment": "normuon"},
        {"cautious": True, "second_moment": "normuon"},
    ),
    "lr2": ({"decay_schedule": "lr2"}, {"decay_power": 2}),
    "clip": ({"clip_grad_rms": 0.1}, {"clip": 0.1}),
    "normalize": ({"normalize_grad": True}, {"normalize": True}),
    "spike": ({"spike_ratio": 1.2}, {"spike": 1.2}),
    "clip and spike": ({"clip_grad_rms": 0.2, "spike_ratio": 1.1}, {"clip": 0.2, "spike": 1.1}),
}


def bursts(shape, steps=7, dtype=torch.float32):
    """Gradients of which some are far larger than the rest."""
    sizes = itertools.cycle((1.0, 3.0, 0.2, 40.0, 1.0))
    return [size * G for size, G in zip(sizes, gradients(shape, steps, dtype=dtype), strict=False)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_oracle(variant, shape):
    ours, theirs = VARIANTS[variant]
    p, grads = weight(shape, dtype=torch.float64), bursts(shape, dtype=torch.float64)
    start = p.detach().clone()
    out = run(Muon([p], lr=0.02, weight_decay=2.0, polar="svd", **ours), [p], [grads])
    for W, R in zip(out, muon(start, grads, weight_decay=2.0, **theirs), strict=True):
        torch.testing.assert_close(W[0], R, rtol=0, atol=1e-7 if "adamuon" in variant else 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_and_bfloat16_stay_near_float64(variant):
    ours, _ = VARIANTS[variant]
    exact = trajectory(lambda ps: Muon(ps, polar="svd", **ours), TALL, dtype=torch.float64)[-1]
    for dtype, atol in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        W = trajectory(lambda ps: Muon(ps, polar="svd", **ours), TALL, dtype=dtype)[-1]
        assert W.dtype == dtype
        # the sign of an entry near zero is anyone's, and so are its seven steps of 0.2 lr
        differs = (W.double() - exact).abs() > atol
        assert float(differs.double().mean()) <= (0.02 if "adamuon" in variant else 0.0)


# --- Recorded trajectories ---


def recorded(pattern):
    return sorted(path.stem for path in FIXTURES.glob(f"{pattern}-*.json"))


@pytest.mark.parametrize("name", recorded("normuon"))
def test_recorded_normuon(name):
    data = fixture(name)
    settings, p = data["settings"]["optimizer"], torch.nn.Parameter(data["W0"].clone())
    optimizer = Muon([p], polar="ns5", second_moment="normuon", adjust_lr_fn="original", **settings)
    out = run(optimizer, [p], [list(data["grads"])])
    bound = tolerance(data, "float32_polar_vs_float64")
    assert max(float((W[0] - R).abs().max()) for W, R in zip(out, data["W"], strict=True)) <= bound
    V = torch.tensor(data["second_momentum"][-1])
    torch.testing.assert_close(optimizer.state[p]["row_second_moment"], V, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ema", "sum"])
@pytest.mark.parametrize("name", recorded("adamuon"))
def test_recorded_adamuon(name, kind):
    data = fixture(name)
    settings = dict(data["settings"]["optimizer"])
    assert settings.pop("eps") == 1e-8
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = Muon([p], polar="ns5", second_moment="adamuon", momentum_kind=kind, **settings)
    out = run(optimizer, [p], [list(data["grads"])])
    bound = tolerance(data, "float32_polar_vs_float64")
    want = data["W_float32_polar"]
    assert max(float((W[0] - R).abs().max()) for W, R in zip(out, want, strict=True)) <= bound


def fed(data, monkeypatch, **options):
    """Let every polar step take the recorded sketch; returns the iterator."""
    stored = iter(data["Omega"] if "Omega" in data else data.get("indices", ()))

    def factor(X, method, **given):
        if X.numel() and method == "low_rank":
            given = {**given, **options, "sketch": torch.tensor(next(stored))}
        return polar_factor(X, method, **given)

    monkeypatch.setattr(toolkit, "polar_factor", factor)
    return stored


SOLVERS = {
    "cubic_ns_theoretical": {"inner": "ns5", "ns_coefficients": (1.5, -0.5, 0.0)},
    "quintic_ns_theoretical": {"inner": "ns5", "ns_coefficients": (2.0, -1.5, 0.5)},
    "quintic_ns_empirical": {"inner": "ns5"},
    "polar_express": {"inner": "polar_express"},
}


@pytest.mark.parametrize("name", recorded("muon-image"))
def test_recorded_image_optimizer(name, monkeypatch):
    """The published optimizer rescales the weight before each step, which we leave to the user."""
    data = fixture(name)
    settings, p = data["settings"]["optimizer"], torch.nn.Parameter(data["W0"].clone())
    solver = dict(SOLVERS[settings["orth_method"]])
    method = "low_rank" if settings["randomized"] else solver.pop("inner")
    stored = fed(data, monkeypatch, basis="rows")
    optimizer = Muon(
        [p], lr=settings["lr"], momentum=settings["momentum"], nesterov=settings["nesterov"],
        weight_decay=0.0, momentum_kind="sum", adjust_lr_fn="none", polar=method,
        ns_steps=settings["orth_steps"], rank=settings["rank"],
        oversample=settings["oversampling"], power=settings["power_iters"], **solver,
    )  # fmt: skip
    bound = tolerance(data, "float32_vs_float64_same_sketch")
    for G, R in zip(data["grads"], data["W_float32_polar"], strict=True):
        with torch.no_grad():
            p.mul_(len(p) ** 0.5 / p.norm())
        p.grad = G.clone()
        optimizer.step()
        assert float((p.detach() - R).abs().max()) <= bound
    assert next(stored, None) is None
    buffer = torch.tensor(data["momentum_buffer"])
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", recorded("muon-lm"))
def test_recorded_language_model_direction(name, monkeypatch):
    data = fixture(name)
    settings, p = data["settings"], torch.nn.Parameter(torch.zeros(data["settings"]["shape"]))
    stored = fed(data, monkeypatch)
    optimizer = Muon(
        [p], lr=1.0, weight_decay=0.0, momentum=settings["momentum"],
        nesterov="nesterov" in name, momentum_kind="sum", adjust_lr_fn="none", polar="low_rank",
        rank=settings["rank"], oversample=settings["oversample"], power=settings["power"],
        ns_coefficients=(2.0, -1.5, 0.5), ns_steps=settings["solver_steps"],
        inner="polar_express_safe",
    )  # fmt: skip
    bound = tolerance(data, "float32_vs_float64_same_sketch")
    for G, O in zip(data["grads"], data["O_float32"], strict=True):
        torch.nn.init.zeros_(p)
        p.grad = G.clone()
        optimizer.step()
        assert float((p.detach() + torch.tensor(O)).abs().max()) <= bound
    assert next(stored, None) is None
    buffer = torch.tensor(data["momentum_buffer"])
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], buffer, rtol=1e-5, atol=1e-6)


# --- shapes ---


@pytest.mark.parametrize("sizes", [(8, 4, 4), (6, 10), (16,)])
@pytest.mark.parametrize("second_moment", [None, "normuon", "adamuon"])
def test_split_sizes_equal_separate_parameters(second_moment, sizes):
    options = {"lr": 0.02, "second_moment": second_moment}
    whole, grads = weight((16, 12)), gradients((16, 12), 5)
    parts = [torch.nn.Parameter(x.clone()) for x in whole.detach().split(sizes)]
    run(Muon([whole], split_sizes=sizes, **options), [whole], [grads])
    series = [[G.split(sizes)[i] for G in grads] for i in range(len(sizes))]
    run(Muon(parts, **options), parts, series)
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), atol=1e-6,
                               rtol=0)  # fmt: skip


def test_num_heads_equal_separate_parameters():
    whole, grads = weight((12, 10)), gradients((12, 10), 5)
    parts = [torch.nn.Parameter(x.clone()) for x in whole.detach().split(4)]
    run(Muon([{"params": [whole], "num_heads": 3}], lr=0.02), [whole], [grads])
    run(Muon(parts, lr=0.02), parts, [[G[4 * i : 4 * i + 4] for G in grads] for i in range(3)])
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), atol=1e-6,
                               rtol=0)  # fmt: skip


def test_convolutions_are_flattened_for_the_step_and_for_the_scale():
    shape, flat = (6, 4, 3, 3), (6, 36)
    p, q = weight(shape), torch.nn.Parameter(weight(shape).detach().view(flat).clone())
    grads = gradients(shape, 4)
    ours = Muon([p], lr=0.02, adjust_lr_fn="spectral")
    run(ours, [p], [grads])
    run(Muon([q], lr=0.02, adjust_lr_fn="spectral"), [q], [[G.view(flat) for G in grads]])
    torch.testing.assert_close(p.detach().view(flat), q.detach(), rtol=0, atol=1e-6)
    assert ours.state[p]["momentum_buffer"].shape == shape


@pytest.mark.parametrize("matrix_view", [None, "auto", "batch", "flatten"])
def test_matrix_view_of_three_dimensions(matrix_view):
    shape = (5, 4, 3)
    p, grads = weight(shape), gradients(shape, 3)
    if matrix_view == "flatten":
        parts = [torch.nn.Parameter(p.detach().view(5, 12).clone())]
        series = [[G.view(5, 12) for G in grads]]
    else:
        parts = [torch.nn.Parameter(x.clone()) for x in p.detach()]
        series = [[G[i] for G in grads] for i in range(5)]
    run(Muon([p], lr=0.02, matrix_view=matrix_view), [p], [grads])
    run(Muon(parts, lr=0.02), parts, series)
    want = torch.stack([x.detach() for x in parts]).view(shape)
    torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-6)


def test_words_for_shapes_become_the_view():
    groups = [
        {"params": [weight((8, 4))], "split_sizes": [4, 2, 2]},
        {"params": [weight((8, 4))], "num_heads": 2},
        {"params": [weight((8, 4, 2))], "matrix_view": "flatten"},
        {"params": [weight((8, 4))]},
    ]
    optimizer = Muon(groups, matrix_view="batch")
    views = [group["view"] for group in optimizer.param_groups]
    assert views == ["rows:4,2,2", "heads:2", "flatten", "batch"]
    assert not {"split_sizes", "num_heads", "matrix_view"} & optimizer.param_groups[0].keys()
    twin = Muon(groups)
    twin.load_state_dict(optimizer.state_dict())
    assert [group["view"] for group in twin.param_groups] == views


# --- Momentum and decay ---


def test_ema_and_sum_agree():
    for nesterov, shape in itertools.product((True, False), (TALL, WIDE, SQUARE)):
        a, b = (
            trajectory(lambda ps, k=kind, n=nesterov: Muon(ps, lr=0.02, polar="ns5",
                                                           momentum_kind=k, nesterov=n), shape)
            for kind in ("ema", "sum")
        )  # fmt: skip
        torch.testing.assert_close(a[-1], b[-1], rtol=0, atol=1e-5)


def test_sum_is_the_average_over_one_minus_momentum():
    p, q, grads = weight(TALL), weight(TALL), gradients(TALL, 4)
    ours, theirs = Muon([p], momentum=0.9), Muon([q], momentum=0.9, momentum_kind="sum")
    run(ours, [p], [grads])
    run(theirs, [q], [grads])
    scaled = ours.state[p]["momentum_buffer"] / 0.1
    torch.testing.assert_close(theirs.state[q]["momentum_buffer"], scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cautious_decay_touches_where_step_and_weight_agree(dtype):
    p, q = (weight(TALL, dtype=dtype) for _ in range(2))
    before = p.detach().clone().float()
    p.grad = q.grad = gradients(TALL, 1, dtype=dtype)[0]
    Muon([p], lr=0.1, weight_decay=5.0, cautious=True).step()
    Muon([q], lr=0.1, weight_decay=0.0).step()
    step = before - q.detach().float()
    decayed = (p.detach() != q.detach()).logical_and(before != 0)
    agree = step * before > 0
    assert 0.2 < float(agree.float().mean()) < 0.8
    # an entry that the step hardly moved rounds to either side in bfloat16
    clear = step.abs() > 1e-2
    assert torch.equal(decayed[clear], agree[clear])


def test_a_zero_step_decays_under_cautious():
    """The product is zero, which counts as agreement."""
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.zeros(4, 3)
    Muon([p], lr=0.1, weight_decay=1.0, cautious=True).step()
    assert torch.equal(p.detach(), torch.full((4, 3), 1 - 0.1))


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_decay_with_the_square_of_a_scheduled_lr(tensor_lr):
    lrs, grads = [0.3, 0.1, 0.02], bursts(TALL, 3, torch.float64)
    p = weight(TALL, dtype=torch.float64)
    start = p.detach().clone()
    first = torch.tensor(lrs[0], dtype=torch.float64) if tensor_lr else lrs[0]
    optimizer = Muon([p], lr=first, weight_decay=1.2, polar="svd", decay_schedule="lr2")
    for lr, G in zip(lrs, grads, strict=True):
        if tensor_lr:
            optimizer.param_groups[0]["lr"].fill_(lr)
        else:
            optimizer.param_groups[0]["lr"] = lr
        p.grad = G
        optimizer.step()
    want = muon(start, grads, lr=lrs, weight_decay=1.2, decay_power=2)[-1]
    torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-9)


# --- Second moments ---


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD])
def test_normuon_keeps_the_norm_and_evens_the_rows(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([p], lr=1.0, weight_decay=0.0, polar="svd", adjust_lr_fn="none",
                     second_moment="normuon")  # fmt: skip
    p.grad = gradients(shape, 1)[0]
    optimizer.step()
    assert math.isclose(float(p.detach().norm()), math.sqrt(min(shape)), rel_tol=1e-5)
    rows = p.detach().norm(dim=1)
    assert float(rows.max() / rows.min()) < 1 + 1e-4  # after one step all sizes are known
    assert optimizer.state[p]["row_second_moment"].shape == (shape[0], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_adamuon_has_an_exact_rms(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([p], lr=1.0, weight_decay=0.0, second_moment="adamuon")
    p.grad = gradients(shape, 1)[0]
    optimizer.step()
    assert math.isclose(float(p.detach().square().mean().sqrt()), 0.2, rel_tol=1e-4)
    assert optimizer.state[p]["second_moment"].shape == shape


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_zero_gradients_and_zero_rows_stay_finite(variant):
    p, q = weight(TALL), weight(TALL)
    before = p.detach().clone()
    G = gradients(TALL, 1)[0]
    G[3] = 0.0
    p.grad, q.grad = torch.zeros_like(G), G
    Muon([p], lr=0.1, weight_decay=0.0, second_moment=variant).step()
    Muon([q], lr=0.1, weight_decay=0.0, second_moment=variant).step()
    assert torch.equal(p.detach(), before)
    assert q.isfinite().all() and torch.equal(q.detach()[3], before[3])


# --- Low rank ---

LOW = {"polar": "low_rank", "rank": 2, "oversample": 1}


@pytest.mark.parametrize("sketch", ["signs", "gaussian", "kaczmarz"])
@pytest.mark.parametrize("shape", [TALL, WIDE, ODD, ROW, COLUMN])
def test_low_rank_steps_have_low_rank_and_their_own_draws(shape, sketch):
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    optimizer = Muon(params, lr=1.0, weight_decay=0.0, sketch=sketch, **LOW)
    state = torch.get_rng_state()
    for p in params:
        p.grad = gradients(shape, 1)[0]
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.linalg.matrix_rank(p.detach()) <= 3 for p in params)
    if min(shape) > 3:  # the same gradient, another sketch
        assert not torch.equal(*params)
    first = params[0].detach().clone()
    optimizer.step()
    if min(shape) > 3:  # the same gradient, another step
        assert not torch.allclose(params[0].detach() - first, first)


def test_low_rank_depends_on_the_seed_and_on_nothing_else():
    def weights(**options):
        return trajectory(lambda ps: Muon(ps, lr=0.02, **LOW, **options), TALL)[-1]

    assert torch.equal(weights(), weights(seed=0))
    assert not torch.equal(weights(), weights(seed=1))


def test_low_rank_keeps_the_buffer_whole():
    p, q, grads = weight(TALL), weight(TALL), gradients(TALL, 4)
    low, full = Muon([p], **LOW), Muon([q])
    run(low, [p], [grads])
    run(full, [q], [grads])
    assert torch.equal(low.state[p]["momentum_buffer"], full.state[q]["momentum_buffer"])


def test_rank_compensate_keeps_the_rms():
    for shape in (TALL, WIDE):
        sizes = []
        for compensate in (False, True):
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = gradients(shape, 1)[0]
            Muon([p], lr=1.0, weight_decay=0.0, inner="svd", rank_compensate=compensate,
                 **LOW).step()  # fmt: skip
            sizes.append(float(p.detach().square().mean().sqrt()))
        assert math.isclose(sizes[0], 0.2 * math.sqrt(3 / 10), rel_tol=1e-5)
        assert math.isclose(sizes[1], 0.2, rel_tol=1e-5)


def test_low_rank_of_full_rank_is_the_inner_method():
    a = trajectory(lambda ps: Muon(ps, polar="low_rank", rank=1.0, inner="ns5"), WIDE)
    assert same(a, trajectory(lambda ps: Muon(ps, polar="ns5"), WIDE))


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize(
    "options", [LOW, {"second_moment": "normuon", "spike_ratio": 2.0}, {"second_moment": "adamuon"}]
)
def test_round_trip_of_the_variants(options, stop):
    def make():
        params = [weight(TALL, 0), weight(WIDE, 1)]
        return params, Muon(params, lr=0.02, report_steps=2, **options)

    check_resume(make, [gradients(TALL, 6, 0), gradients(WIDE, 6, 1)], stop, through=copy.deepcopy)


# --- heavy tails ---


def test_a_spike_spoils_the_buffer_less():
    grads, draw = gradients(TALL, 6), torch.Generator().manual_seed(3)
    spoiled = [*grads[:4], 1e4 * torch.randn(TALL, generator=draw), grads[5]]
    usual, buffers = float(grads[4].square().mean().sqrt()), {}
    for name, options in (
        ("none", {}), ("clip", {"clip_grad_rms": usual}), ("spike", {"spike_ratio": 2.0}),
        ("normalize", {"normalize_grad": True}),
    ):  # fmt: skip
        found = []
        for series in (grads, spoiled):
            p = weight(TALL)
            optimizer = Muon([p], **options)
            run(optimizer, [p], [series])
            B = optimizer.state[p]["momentum_buffer"]
            found.append(B / B.norm())
        buffers[name] = float((found[0] - found[1]).norm())
    assert buffers["none"] > 1.0
    assert max(buffers.pop(name) for name in ("clip", "spike", "normalize")) < 0.6


def test_guards_that_need_not_act_change_nothing():
    a = trajectory(lambda ps: Muon(ps), TALL)
    assert same(a, trajectory(lambda ps: Muon(ps, clip_grad_rms=1e3, spike_ratio=1e3), TALL))


def test_spike_ratio_follows_a_lasting_change():
    p = weight(TALL)
    optimizer = Muon([p], spike_ratio=2.0)
    G = gradients(TALL, 1)[0]
    run(optimizer, [p], [[G, *[100 * G] * 120]])
    norm = float(optimizer.state[p]["grad_norm"])
    assert math.isclose(norm, 100 * float(G.norm()), rel_tol=1e-2)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_norm_too_large_for_its_state_is_not_stored(state_dtype):
    """float64 gradients of norm 5e38, then of ordinary size: the average is theirs."""
    p, G = weight((40, 40), dtype=torch.float64), gradients((40, 40), 1)[0].double()
    optimizer = Muon([p], spike_ratio=2.0, state_dtype=state_dtype)
    for size in (2e38, 2e38, 1.0, 1.0):
        p.grad = size * G
        optimizer.step()
        assert p.isfinite().all() and optimizer.state[p]["grad_norm"].isfinite().all()
    want = float(G.norm())
    assert math.isclose(float(optimizer.state[p]["grad_norm"]), want, rel_tol=1e-2)


@pytest.mark.parametrize("size", [0.0, 1e-30, 3e32])
def test_guards_of_gradients_at_the_end_of_the_range(size):
    for options in ({"clip_grad_rms": 1.0}, {"spike_ratio": 2.0}, {"normalize_grad": True}):
        p = weight(TALL)
        optimizer = Muon([p], **options)
        run(optimizer, [p], [[gradients(TALL, 1)[0], torch.full(TALL, size)]])
        assert p.isfinite().all() and optimizer.state[p]["momentum_buffer"].isfinite().all()
        assert optimizer.skipped == {}


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-25, 1e-19, 1e19, 1e25, 1e30, 1e37])
def test_a_normalised_gradient_has_norm_one(size):
    G = size * gradients((64, 32), 1)[0]
    p = weight((64, 32))
    optimizer = Muon([p], normalize_grad=True, momentum=0.0, nesterov=False)
    run(optimizer, [p], [[G]])
    B = optimizer.state[p]["momentum_buffer"].double()
    assert math.isclose(float(B.norm()), 1.0, rel_tol=1e-5)
    D = G.double() / G.double().norm()
    torch.testing.assert_close(B, D, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e18, 1e20, 3e32, 1e37])
def test_a_clipped_gradient_has_the_rms_asked_for(size):
    for options in ({"clip_grad_rms": 0.5}, {"clip_grad_rms": 0.5, "spike_ratio": 2.0}):
        p = weight((64, 32))
        optimizer = Muon([p], momentum=0.0, nesterov=False, **options)
        run(optimizer, [p], [[torch.full((64, 32), size)]])
        want = torch.full((64, 32), 0.5)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], want)


def test_a_spike_beyond_the_squares_is_limited_too():
    p, G = weight(TALL), gradients(TALL, 1)[0]
    optimizer = Muon([p], momentum=0.0, nesterov=False, spike_ratio=2.0)
    run(optimizer, [p], [[G, 1e30 * G]])
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 2.0 * G)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e3])
def test_a_spike_is_limited_however_small_the_gradients_are(size):
    p, G = weight(TALL), gradients(TALL, 1)[0]
    optimizer = Muon([p], momentum=0.0, nesterov=False, spike_ratio=2.0)
    run(optimizer, [p], [[size * G, 100 * size * G]])
    found = optimizer.state[p]["momentum_buffer"] / size
    torch.testing.assert_close(found, 2.0 * G)


@pytest.mark.parametrize(
    "alpha, lr, one_minus_momentum", [(2.0, -3 / 4, -1 / 2), (None, -3 / 4, -1 / 2),
                                      (1.5, -2 / 2.5, -1.5 / 2.5), (1.2, -1.4 / 1.6, -1.2 / 1.6)]
)  # fmt: skip
def test_heavy_tail_schedule(alpha, lr, one_minus_momentum):
    for T in (1, 100, 12345):
        factor, momentum = heavy_tail_schedule(T, alpha)
        assert math.isclose(factor, T**lr) and math.isclose(1 - momentum, T**one_minus_momentum)
    # it balances drift against noise, and both against the distance that is left
    a, (factor, momentum) = alpha or 2.0, heavy_tail_schedule(10**6, alpha)
    drift, noise = factor / (1 - momentum), (1 - momentum) ** ((a - 1) / a)
    assert math.isclose(drift, noise, rel_tol=1e-6)
    assert math.isclose(noise, 1 / (factor * 10**6), rel_tol=1e-6)


@pytest.mark.parametrize("bad", [(0, None), (10, 1.0), (10, 2.5)])
def test_heavy_tail_schedule_refuses(bad):
    with pytest.raises(ValueError, match=r"T must be|alpha must lie"):
        heavy_tail_schedule(*bad)


# --- reports ---


@pytest.mark.parametrize("options", [{}, {"polar": "low_rank"}, {"second_moment": "adamuon"}])
def test_reports_are_recorded_without_changing_the_step(options):
    def weights(every):
        params = [weight(TALL, 0), weight(WIDE, 1), weight((3, 6, 5), 2)]
        named = list(zip("abc", params, strict=True))
        optimizer = Muon(named, lr=0.02, report_steps=every, **options)
        out = run(optimizer, params, [gradients(p.shape, 5, k) for k, p in enumerate(params)])
        return out, optimizer

    plain, without = weights(0)
    watched, optimizer = weights(2)
    assert same(plain, watched) and without.reports() == {}
    found = optimizer.reports()
    assert list(found) == ["a", "b", "c"] and [len(rows) for rows in found.values()] == [1, 1, 3]
    for report in itertools.chain(*found.values()):
        assert 0 <= report.alignment_deficit < 1 and 0.5 < report.operator_norm < 1.3


def test_a_report_is_that_of_its_step():
    p, grads = weight(TALL), gradients(TALL, 3)
    optimizer = Muon([p], nesterov=False, report_steps=2)
    reports = []
    for G in grads:
        p.grad = G
        optimizer.step()
        reports.append(optimizer.reports()["0"][0])
        if len(reports) == 2:
            B = optimizer.state[p]["momentum_buffer"].clone()
    assert reports[0] is None and reports[1] == reports[2]
    want = polar_report(B, polar_factor(B, "zolo"))
    assert math.isclose(reports[1].alignment_deficit, want.alignment_deficit, rel_tol=1e-4)


def test_parameters_appended_to_a_named_group_are_reported_by_position():
    p, q = weight(TALL), weight(WIDE)
    optimizer = Muon([("a", p)], report_steps=1)
    optimizer.param_groups[0]["params"].append(q)
    run(optimizer, [p, q], [gradients(TALL, 1), gradients(WIDE, 1)])
    assert list(optimizer.reports()) == ["a", "1"]


def test_a_zero_momentum_has_no_report():
    p = weight(TALL)
    optimizer = Muon([p], report_steps=1)
    p.grad = torch.zeros(TALL)
    optimizer.step()
    assert optimizer.reports() == {"0": [None]}


# --- Memory ---


@pytest.mark.parametrize(
    "options, most",
    [
        ({"second_moment": "normuon", "cautious": True}, 5),
        ({"second_moment": "adamuon"}, 6),
        ({"spike_ratio": 2.0, "clip_grad_rms": 1.0}, 6),
        ({"second_moment": "adamuon", "normalize_grad": True, "cautious": True}, 7),
        ({"polar": "low_rank"}, 2.5),
    ],
)
@pytest.mark.parametrize("shape", [(512, 512), (300, 900)])
def test_peak_of_temporaries(shape, options, most):
    p = weight(shape)
    optimizer = Muon([p], **options)
    for _ in range(2):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        counter = count_step(optimizer)
    assert counter.peak <= 1.01 * most * p.nbytes


# --- Defaults and errors ---


def test_options_that_are_off_leave_the_default_bits():
    off = {"momentum_kind": "ema", "second_moment": None, "cautious": False, "seed": 5,
           "decay_schedule": "lr", "clip_grad_rms": None, "normalize_grad": False,
           "spike_ratio": None, "rank": 7, "matrix_view": None, "report_steps": 0}  # fmt: skip
    assert same(trajectory(lambda ps: Muon(ps), ODD), trajectory(lambda ps: Muon(ps, **off), ODD))
    assert set(Muon([weight(ODD)], **off).state_dict()["param_groups"][0]) == set(
        Muon([weight(ODD)]).state_dict()["param_groups"][0]
    )


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
def test_polar_dtype_is_that_of_the_iteration(name):
    p, G = torch.nn.Parameter(torch.zeros(TALL)), gradients(TALL, 1)[0]
    p.grad = G
    Muon([p], lr=1.0, weight_decay=0.0, polar="ns5", polar_dtype=name, adjust_lr_fn="none",
         momentum=0.0, nesterov=False).step()  # fmt: skip
    want = polar_factor(G, "ns5", dtype=getattr(torch, name))
    assert torch.equal(p.detach(), -want)


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"momentum_kind": "classical"}, "momentum_kind must be one of"),
        ({"second_moment": "adam"}, "second_moment must be one of"),
        ({"second_moment": "normuon", "beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"decay_schedule": "cosine"}, "decay_schedule must be one of"),
        ({"clip_grad_rms": 0.0}, "clip_grad_rms must be positive"),
        ({"spike_ratio": 1.0}, "spike_ratio must be above 1"),
        ({"normalize_grad": True, "spike_ratio": 2.0}, "normalize_grad fixes the norm"),
        ({"report_steps": -1}, "report_steps must be an int of at least 0"),
        ({"report_steps": True}, "report_steps must be an int of at least 0"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"polar": "low_rank", "rank": 0}, "rank must be"),
        ({"polar": "low_rank", "inner": "low_rank"}, "inner must be one of"),
        ({"polar": "low_rank", "compat": "torch"}, "compat='torch' iterates with ns5"),
        ({"sketch": "hash"}, "sketch must be one of"),
        ({"power": -1, "polar": "low_rank"}, "power must be an int from 0 to 99"),
        ({"compat": "torch", "momentum_kind": "sum"}, "compat='torch' averages"),
        ({"compat": "torch", "second_moment": "normuon"}, "compat='torch' averages"),
        ({"compat": "torch", "polar_dtype": "float32"}, "leave polar_dtype unset"),
        ({"polar_dtype": "float31"}, "dtype"),
        ({"polar": "svd", "polar_dtype": "bfloat16"}, "cannot be factorized"),
        ({"matrix_view": "rows"}, "matrix_view must be"),
        ({"split_sizes": (5, 5)}, "must add up"),
        ({"split_sizes": 8}, "split_sizes must be a list of ints of at least 1, got 8"),
        ({"split_sizes": "12,12"}, "split_sizes must be a list of ints"),
        ({"split_sizes": (12.0, 12.0)}, "split_sizes must be a list of ints"),
        ({"split_sizes": (30, -6)}, "split_sizes must be a list of ints"),
        ({"split_sizes": ()}, "split_sizes must be a list of ints"),
        ({"num_heads": 7}, "must divide"),
        ({"num_heads": 2.0}, "num_heads must be an int of at least 1, got 2.0"),
        ({"num_heads": 0}, "num_heads must be an int of at least 1, got 0"),
        ({"second_moment": "adamuon", "polar": "low_rank", "rank_compensate": True}, "unset"),
        ({"num_heads": 2, "split_sizes": (5, 5)}, "exclude each other"),
        ({"matrix_view": "flatten", "view": "batch"}, "exclude each other"),
    ],
)
def test_bad_settings_are_one_sentence(bad, text):
    check_refusal(Muon, bad, text, TALL)
