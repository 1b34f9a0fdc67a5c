"""`write=`: how weights of low precision are rounded, for every class of matrices."""

import copy
import io

import pytest
import torch
from helpers.covering import in_turn
from helpers.every_class import CLASSES, EVERY, problem
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, pair_gradients
from helpers.problems import gradients, run, same, tensors, weight
from helpers.rounding import every_form
from torch import nn

from stiefel.optimizers import (
    FRUGAL,
    GaLore,
    Muon,
    SwitchLoRA,
    SymmetryStack,
    pairs_to_groups,
)
from stiefel.optimizers._core.views import split_view
from stiefel.optimizers._driver.memory import MemoryReport

LOW = [torch.bfloat16, torch.float16]
MODES = ["nearest", "stochastic", "kahan"]
SHAPES = [(12, 8), (12, 8), (8, 13), (12, 8)]
FIRST = {name.partition("-")[0]: name for name in reversed(METHODS)}
"""Of every class its first entry."""
ALL_METHODS = pytest.mark.parametrize("name", METHODS)


def problem_of(shapes=SHAPES, dtype=torch.bfloat16, steps=6):
    params = [nn.Parameter(weight(s, i).detach().mul(0.1).to(dtype)) for i, s in enumerate(shapes)]
    return params, [gradients(s, steps, i) for i, s in enumerate(shapes)]


def named(params):
    return [(f"layer.{i}.weight", p) for i, p in enumerate(params)]


def trained(name, mode, *, dtype=torch.bfloat16, lr=1e-3, shapes=SHAPES, **options):
    params, series = problem_of(shapes, dtype)
    optimizer = METHODS[name](params, lr=lr, write=mode, **options)
    return run(optimizer, params, series)[-1], optimizer


# which mode ---------------------------------------------------------------------------------------


@pytest.mark.covering
@ALL_METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_full_precision_are_written_to_nearest(name, dtype):
    plain, _ = trained(name, "nearest", dtype=dtype)
    for mode in ("auto", "stochastic", "kahan"):
        other, optimizer = trained(name, mode, dtype=dtype)
        assert same(plain, other)
        assert not any("residual" in entry for entry in optimizer.state.values())


@pytest.mark.covering
@ALL_METHODS
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_auto_is_stochastic_for_low_precision_but_under_compat(name, dtype):
    found = {
        mode: trained(name, mode, dtype=dtype)[0] for mode in ("auto", "nearest", "stochastic")
    }
    published = METHODS[name]([weight((4, 6))]).param_groups[0].get("compat")
    assert same(found["auto"], found["nearest" if published else "stochastic"])
    assert not same(found["nearest"], found["stochastic"])


def test_muon_as_torch_is_written_to_nearest():
    a, b = (trained("muon", mode, compat="torch")[0] for mode in ("auto", "nearest"))
    assert same(a, b)


@pytest.mark.parametrize("name", FIRST.values())
def test_the_assignment_says_how_a_weight_is_written_unless_to_nearest(name):
    params, _ = problem_of()
    for mode in MODES:
        table = METHODS[name](params, write=mode).assignment()
        assert {row.write for row in table} == {mode}
        assert (" write " in str(table)) is (mode != "nearest")
    params[0].data = params[0].data.float()
    assert METHODS[name](params).assignment().rows[0].write == "nearest"


def test_groups_have_modes_of_their_own():
    params, series = problem_of()
    groups = [
        {"params": [p], "write": mode} for p, mode in zip(params, (*MODES, "eco"), strict=True)
    ]
    optimizer = Muon(groups, lr=1e-3)
    weights = run(optimizer, params, series)[-1]
    for i, mode in enumerate((*MODES, "eco")):
        fresh, _ = problem_of()
        alone = [{"params": [p], "write": mode} for p in fresh]
        assert torch.equal(run(Muon(alone, lr=1e-3), fresh, series)[-1][i], weights[i])
    assert ["residual" in optimizer.state[p] for p in params] == [False, False, True, False]


# the bits of an entry -----------------------------------------------------------------------------


def test_a_place_is_counted_in_the_parameter_whatever_the_view_and_the_memory():
    optimizer, seen = Muon(every_form(torch.bfloat16)), 0
    for unit in optimizer._get_plan().units:
        for i, p in enumerate(unit.params):
            places = unit.views[i].to_matrices(torch.arange(p.numel()).view(p.shape))
            places = places.mT if unit.transposed[i] else places
            offset, steps = unit.positions_in_parameter[i]
            k, m, n = (torch.arange(s) * d for s, d in zip(places.shape, steps, strict=True))
            assert torch.equal(places, offset + k[:, None, None] + m[:, None] + n)
            seen += 1
    assert seen > 10


VIEWS = ["auto", "flatten", "batch", "transposed", "heads:2", "heads_in:2", "rows:2,6",
         "interleaved", "transposed:rows:4,6", "transposed:heads:5"]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_view_rounds_with_the_bits_of_the_plain_weight(view, dtype, monkeypatch):
    """A step of exactly the same float32 values is rounded alike, however the weight is cut."""
    shape = (8, 10)
    assert split_view(view, shape)
    found = []
    for v in ("auto", view):
        p = nn.Parameter(torch.linspace(-1, 1, 80).view(shape).to(dtype))
        optimizer = Muon([{"params": [p], "view": v}], lr=1e-4, weight_decay=1.0, momentum=0.0,
                         nesterov=False)  # fmt: skip
        p.grad = torch.zeros(shape, dtype=dtype)  # the polar factor of zero is zero: decay alone
        for _ in range(5):
            optimizer.step()
        found.append(p.detach().clone())
    assert torch.equal(*found)
    decayed = torch.linspace(-1, 1, 80).view(shape).to(dtype)
    assert not torch.equal(found[0], decayed)


@pytest.mark.covering
@ALL_METHODS
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_a_stack_has_the_bits_of_its_weights_alone(name, mode):
    """Names are the keys, so each weight alone draws what it draws among others."""
    params, series = problem_of()
    optimizer = METHODS[name](named(params), lr=1e-3, write=mode)
    joint = run(optimizer, params, series)[-1]
    for i in range(len(params)):
        fresh, _ = problem_of()
        alone = METHODS[name](named(fresh)[i : i + 1], lr=1e-3, write=mode)
        assert torch.equal(run(alone, [fresh[i]], [series[i]])[-1][0], joint[i])


@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_bits_do_not_depend_on_the_memory_format(mode):
    found = []
    for sideways in (False, True):
        W = torch.linspace(-1, 1, 120).view(12, 10).bfloat16()
        p = nn.Parameter(W.mT.contiguous().mT if sideways else W)
        optimizer = Muon([p], lr=1e-4, weight_decay=1.0, momentum=0.0, nesterov=False, write=mode)
        for _ in range(5):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        found.append(p.detach().clone())
    assert torch.equal(*found)


def test_seed_name_and_update_change_the_bits():
    found = []
    for seed, name in ((0, "a"), (1, "a"), (0, "b")):
        params, series = problem_of([(12, 8)])
        optimizer = GaLore([(name, params[0])], lr=1e-3, rank=8, seed=seed)
        found.append(run(optimizer, params, series)[-1][0])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# checkpoints --------------------------------------------------------------------------------------


def reloaded(optimizer, make, params):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = make(params)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


WITH_ECO = ("muon", "muon-ns5", "muon-plain", "muon-spike")
"""Methods that do not refuse eco."""


@pytest.mark.covering
@pytest.mark.parametrize(
    "mode, name",
    [(x, name) for x in (*MODES, "eco") for name in (METHODS if x != "eco" else WITH_ECO)],
)
def test_a_run_resumes_in_equal_bits(name, mode):
    params, series = problem_of()
    make = lambda ps: METHODS[name](ps, lr=1e-3, write=mode)  # noqa: E731
    optimizer = make(params)
    whole = run(optimizer, params, series)
    for cut in (2, 3):
        fresh, _ = problem_of()
        first = make(fresh)
        run(first, fresh, [s[:cut] for s in series])
        second = reloaded(first, make, fresh)
        assert same(run(second, fresh, [s[cut:] for s in series])[-1], whole[-1])
        assert same(tensors(second), tensors(optimizer))


@pytest.mark.parametrize("name", FIRST.values())
def test_a_copy_goes_on_in_equal_bits(name):
    params, series = problem_of()
    optimizer = METHODS[name](params, lr=1e-3, write="kahan")
    run(optimizer, params, [s[:3] for s in series])
    others, twin = copy.deepcopy((params, optimizer))
    rest = [s[3:] for s in series]
    assert same(run(optimizer, params, rest), run(twin, others, rest))


@pytest.mark.parametrize("name", FIRST.values())
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_the_report_counts_the_residual(name, state_dtype):
    for mode in MODES:
        params, series = problem_of([(64, 80), (64, 80)])
        options = {"write": mode, "state_dtype": state_dtype}
        optimizer = METHODS[name](params, **options)
        run(optimizer, params, series)
        found = MemoryReport.of(METHODS[name](params, **options))
        stored = [
            sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
            for p in params
        ]
        assert [row.state for row in found.rows] == stored
        assert all(("residual" in optimizer.state[p]) is (mode == "kahan") for p in params)


def test_a_file_without_residual_starts_from_zero_and_one_without_write_keeps_the_mode():
    params, series = problem_of()
    optimizer = Muon(params, lr=1e-3, write="kahan")
    run(optimizer, params, series)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["write"]
    for entry in saved["state"].values():
        del entry["residual"]
    other = Muon(params, lr=1e-3, write="kahan")
    other.load_state_dict(saved)
    assert other.param_groups[0]["write"] == "kahan"
    residuals = [other.state[p]["residual"] for p in params]
    assert all(X.dtype == torch.bfloat16 and not X.any() for X in residuals)
    run(other, params, series)
    assert all(bool(other.state[p]["residual"].any()) for p in params)


@pytest.mark.parametrize("name", FIRST.values())
def test_a_residual_is_neither_added_nor_dropped_in_the_middle_of_a_run(name):
    for before, after in (("kahan", "stochastic"), ("stochastic", "kahan")):
        params, series = problem_of()
        optimizer = METHODS[name](params, lr=1e-3, write=before)
        run(optimizer, params, series)
        weights, state = [p.detach().clone() for p in params], tensors(optimizer)
        optimizer.param_groups[0]["write"] = after
        with pytest.raises(ValueError, match=r"write='.*state 'residual'"):
            optimizer.step()
        assert same(weights, [p.detach() for p in params]) and same(state, tensors(optimizer))
        optimizer.param_groups[0]["write"] = before
        run(optimizer, params, series)


@pytest.mark.parametrize("name", FIRST.values())
def test_the_other_modes_may_change_at_any_step(name):
    params, series = problem_of()
    optimizer = METHODS[name](params, lr=1e-3, write="nearest")
    run(optimizer, params, series)
    optimizer.param_groups[0]["write"] = "stochastic"
    run(optimizer, params, series)


@EVERY
def test_an_unknown_mode_is_refused(cls):
    params, options, _ = problem(cls)
    with pytest.raises(ValueError, match="write must be one of"):
        cls(params, **options, write="kahn")
    optimizer = cls(problem(cls)[0], **options)
    optimizer.param_groups[0]["write"] = 3
    with pytest.raises(ValueError, match="write must be one of"):
        optimizer.step()


# bad gradients ------------------------------------------------------------------------------------


@pytest.mark.covering
@ALL_METHODS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wait", [True, False])
def test_a_bad_gradient_leaves_weight_and_residual(name, mode, wait):
    params, series = problem_of()
    optimizer = METHODS[name](params, lr=1e-3, write=mode)
    optimizer._wait = wait
    run(optimizer, params, [s[:2] for s in series])
    bad, before = [0, 2], [p.detach().clone() for p in params]
    state = tensors(optimizer)
    grads = [[s[2].clone()] for s in series]
    for i in bad:
        grads[i][0][1, 1] = float("nan")
    run(optimizer, params, grads)
    assert sum(optimizer.skipped.values()) == 2
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, old) is (i in bad)
        if mode == "kahan":
            after = optimizer.state[p]["residual"]
            assert torch.equal(after, state[i, "residual"]) is (i in bad)


# eco ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not Muon], ids=lambda c: c.__name__)
def test_eco_is_refused_by_classes_without_a_momentum_that_can_carry_errors(cls):
    params, options, _ = problem(cls)
    with pytest.raises(ValueError, match=r"write='eco' .* does not go with .*; choose") as caught:
        cls(params, **options, write="eco")
    assert "\n" not in str(caught.value)
    if cls is SymmetryStack:  # of its groups, those with Muon may
        return
    optimizer = cls(problem(cls)[0], **options)
    before = tensors(optimizer)
    optimizer.param_groups[0]["write"] = "eco"
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p) if p.requires_grad else None
    with pytest.raises(ValueError, match="write='eco'"):
        optimizer.step()
    assert same(before, tensors(optimizer))


OBSTACLES = {
    "momentum=0": {"momentum": 0.0},
    "momentum=1": {"momentum": 1.0},
    "second_moment='normuon'": {"second_moment": "normuon"},
    "second_moment='adamuon'": {"second_moment": "adamuon"},
    "compat='torch'": {"compat": "torch"},
    "polar='low_rank'": {"polar": "low_rank"},
    "state_dtype='int8'": {"state_dtype": "int8"},
    "state_dtype='bfloat16'": {"state_dtype": "bfloat16"},
    r"betas \(0.0, 0.9\)": {"adamw_betas": (0.0, 0.9)},
}


@pytest.mark.parametrize("text", OBSTACLES)
def test_muon_refuses_eco_with_what_cannot_carry_errors(text):
    options = OBSTACLES[text]
    with pytest.raises(ValueError, match=f"write='eco' .*{text}"):
        Muon([weight((4, 6))], write="eco", **options)
    late = Muon([weight((4, 6))])
    with pytest.raises(ValueError, match=text):
        late.add_param_group({"params": [weight((4, 6))], "write": "eco", **options})
    written = Muon([weight((4, 6))], write="eco")
    ((key, value),) = options.items()
    written.param_groups[0][key] = value
    with pytest.raises(ValueError, match=text):
        written.step()
    AdamW_only = Muon([{"params": [weight((4, 6))], "rule": "adamw", "write": "eco"}])
    assert AdamW_only.param_groups[0]["write"] == "eco"


@pytest.mark.parametrize("nesterov", [True, False])
def test_eco_puts_the_error_into_the_momentum(nesterov):
    """M + c T^-1[E], in float64 from what the write has cut off."""
    for shape in ((12, 8), (8, 13), (6, 6)):
        params, series = problem_of([shape])
        plain, _ = problem_of([shape])
        options = {"lr": 1e-3, "weight_decay": 0.1, "nesterov": nesterov, "polar": "svd"}
        eco = Muon(params, write="eco", **options)
        base = Muon(plain, write="stochastic", **options)
        run(eco, params, [series[0][:1]])
        run(base, plain, [series[0][:1]])
        assert torch.equal(params[0], plain[0])
        G, B = series[0][0].bfloat16().double(), base.state[plain[0]]["momentum_buffer"].double()
        U = G + 0.95 * (B - G) if nesterov else B
        left, S, right = torch.linalg.svd(U, full_matrices=False)
        s = 0.2 * max(shape) ** 0.5 if shape[0] != shape[1] else 0.2 * shape[0] ** 0.5
        W0 = problem_of([shape])[0][0].detach().double()
        exact = W0 * (1 - 1e-4) - 1e-3 * s * left @ right
        E = exact - params[0].detach().double()
        m, n = shape
        root = left @ torch.diag(S) @ left.mT if m <= n else right.mT @ torch.diag(S) @ right
        inverse = (root @ E if m <= n else E @ root) / (s * (0.95 if nesterov else 1.0))
        expected = B + (1 - 1e-4) / 1e-3 * (1 - 1 / 0.95) * inverse
        found = eco.state[params[0]]["momentum_buffer"].double()
        scale = (expected - B).norm()
        assert (found - expected).norm() < 1e-3 * scale


@pytest.mark.parametrize("as_tensor", [False, True])
def test_eco_injects_nothing_at_lr_0(as_tensor):
    params, series = problem_of()
    lr = torch.tensor(0.0) if as_tensor else 0.0
    optimizer = Muon(params, lr=lr, write="eco")
    plain, _ = problem_of()
    other = Muon(plain, lr=0.0, write="nearest")
    run(optimizer, params, series)
    run(other, plain, series)
    assert same(tensors(optimizer), tensors(other))
    assert same([p.detach() for p in params], [p.detach() for p in plain])


def test_eco_on_a_grid_finer_than_float32_is_the_plain_method():
    a, b = (trained("muon", mode, dtype=torch.float32)[0] for mode in ("eco", "nearest"))
    assert same(a, b)


# how far weights move -----------------------------------------------------------------------------


def moves(make, mode, shapes, lr, steps=150, dtype=torch.bfloat16):
    """Share of the float32 move, over all entries, and the relative error of the move."""
    start, _ = problem_of(shapes, dtype, 1)
    draw = torch.Generator().manual_seed(0)
    fixed = [torch.randn(s, generator=draw) for s in shapes]
    runs = []
    for kind in (mode, None):
        kept = dtype if kind else torch.float32
        params = [nn.Parameter(p.detach().clone().to(kept)) for p in start]
        optimizer = make(params, lr=lr, **({"write": kind} if kind else {}))
        draw = torch.Generator().manual_seed(1)
        for _ in range(steps):
            for p, C in zip(params, fixed, strict=True):
                G = (C + torch.randn(C.shape, generator=draw)).to(dtype)
                p.grad = G.to(p.dtype)
            optimizer.step()
        moved = torch.cat([(p.detach().float() - q.detach().float()).flatten()
                           for p, q in zip(params, start, strict=True)])  # fmt: skip
        if kind == "kahan":
            moved += torch.cat([optimizer.state[p]["residual"].float().flatten() for p in params])
        runs.append(moved)
    got, exact = runs
    return float(got @ exact / (exact @ exact)), float((got - exact).norm() / exact.norm())


FOLLOWING = [name for name in FIRST.values() if name not in ("rows", "pick")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lr, name",  # each class at one rate, and at others in tests/bench/test_low_precision.py
    [
        (lr, name)
        for i, lr in enumerate((1e-4, 1e-5))
        for j, name in enumerate(FOLLOWING)
        if in_turn(i, j, of=2)
    ],
)
def test_bfloat16_weights_make_the_move_of_float32(name, lr):
    shapes = [(96, 64), (64, 80)]
    share, _ = moves(METHODS[name], "nearest", shapes, lr)
    assert lr > 1e-5 or share < 0.6
    share, error = moves(METHODS[name], "stochastic", shapes, lr, steps=300)
    count = sum(m * n for m, n in shapes)
    assert abs(share - 1) < max(0.05, 3.5 * error / count**0.5)  # errors are independent
    share, error = moves(METHODS[name], "kahan", shapes, lr)
    assert abs(share - 1) < 0.01 and error < 0.2


@pytest.mark.parametrize("name", ["muon", "galore", "rownorm", "frugal"])
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_decay_is_that_of_float32(name, mode, dtype):
    p = nn.Parameter(weight((32, 48)).detach().to(dtype))
    start = p.detach().float()
    optimizer = METHODS[FIRST[name]]([p], lr=1e-3, weight_decay=0.1, write=mode)
    for _ in range(300):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    ratio = float((p.detach().float() * start).sum() / start.square().sum())
    assert abs(ratio / (1 - 1e-4) ** 300 - 1) < 0.01
    assert abs(1 - ratio) > 0.02


# blocks, pairs, base weights ----------------------------------------------------------------------


def test_a_residual_outlives_the_window_of_a_block():
    params, series = problem_of(steps=9)
    optimizer = FRUGAL(params, lr=1e-3, density=0.25, update_gap=2, split="block", write="kahan")
    for t in range(9):
        run(optimizer, params, [s[t : t + 1] for s in series])
        assert all("residual" in optimizer.state[p] for p in params)
        assert all(bool(optimizer.state[p]["residual"].any()) for p in params)
    assert sum("exp_avg" in optimizer.state[p] for p in params) < len(params)
    saved = copy.deepcopy(optimizer.state_dict())
    FRUGAL(params, density=0.25, update_gap=2, split="block").load_state_dict(saved)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_factors_of_low_precision_follow_and_resume(name, mode):
    shapes = [(10, 7, 3), (6, 9, 3)]
    series = [G for i, s in enumerate(shapes) for G in pair_gradients(*s, 6, i)]

    def fresh():
        return [p for i, s in enumerate(shapes) for p in factors(*s, i, torch.bfloat16)]

    params = fresh()
    make = lambda ps: PAIRS[name]([ps[:2], ps[2:]], lr=1e-3, write=mode)  # noqa: E731
    whole = run(make(params), params, series)[-1]
    params = fresh()
    first = make(params)
    run(first, params, [s[:3] for s in series])
    second = reloaded(first, make, params)
    assert same(run(second, params, [s[3:] for s in series])[-1], whole)
    nearest = fresh()
    optimizer = PAIRS[name]([nearest[:2], nearest[2:]], lr=1e-3, write="nearest")
    assert not same(run(optimizer, nearest, series)[-1], whole)


@pytest.mark.parametrize("mode", MODES)
def test_a_base_weight_keeps_what_switchlora_folds_into_it(mode):
    """Folds of a tenth of a grid point: lost to nearest, kept on average by bits or a residual."""
    m, n, scale = 192, 256, 0.5
    A, B = (nn.Parameter(p.detach() * 0.1) for p in factors(m, n, 8, 0, torch.bfloat16))
    W0 = nn.Parameter(weight((m, n), 5).detach().mul(128).bfloat16(), requires_grad=False)
    optimizer = SwitchLoRA(
        pairs_to_groups([(A, B, W0)], scale=scale), lr=0.0, ratio=None, interval0=2,
        freeze_steps=0, write=mode,
    )  # fmt: skip
    product = lambda: scale * B.detach().double() @ A.detach().double()  # noqa: E731
    start, before = W0.detach().double(), product()
    for t in range(12):
        A.grad, B.grad = (gradients(p.shape, 1, t)[0].bfloat16() for p in (A, B))
        optimizer.step()
    wanted, change = before - product(), W0.detach().double() - start
    if mode == "kahan":
        change += optimizer.state[W0]["residual"].double()
    share = float((change * wanted).sum() / wanted.square().sum())
    low, high = {"nearest": (-0.1, 0.3), "stochastic": (0.6, 1.4), "kahan": (0.98, 1.02)}[mode]
    assert low < share < high
