"""RowNorm and Hybrid: stale rows, equivariance, pairs, and the recorded steps."""

import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from helpers.allocations import count_second_step
from helpers.paths import FIXTURES
from helpers.problems import (
    DOUBLE,
    change,
    doubles,
    gradients,
    permutation,
    replay,
    rotation,
    run,
    same,
    weight,
)
from helpers.recordings import symmetry_cases
from helpers.shapes import ODD, ROW, SHAPES, TALL, WIDE
from oracles import symmetry as oracle

from stiefel.kernels.reference.row_norm import column_norm, row_norm
from stiefel.optimizers import Hybrid, Muon, RowNorm, Spectral

# the recorded steps


@pytest.mark.parametrize("case", range(38))
def test_recorded_rownorm(case):
    settings, W, grads, recorded = symmetry_cases("rownorm")[case]
    expected = torch.tensor(recorded["W"], dtype=DOUBLE)
    torch.testing.assert_close(replay(RowNorm, settings, W, grads), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", range(len(symmetry_cases("hybrid"))))
def test_recorded_hybrid(case):
    """Both orders; where the published alpha sums over experts, ours is beside it."""
    settings, W, grads, recorded = symmetry_cases("hybrid")[case]
    expected = torch.tensor(recorded["W_promoted"], dtype=DOUBLE)
    out = replay(Hybrid, settings, W, grads)
    if W.ndim == 2 or settings["alpha"] == 0.0 or settings["order"] == "polar_then_row":
        # alpha is felt beside eps only where rows are normalised last
        atol = 1e-9 if W.ndim == 2 or settings["alpha"] == 0.0 else 1e-8
        torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    else:
        test_alpha_of_an_expert_is_its_own(settings, W, grads, expected)


def test_alpha_of_an_expert_is_its_own(settings=None, W=None, grads=None, expected=None):
    """Fact 8: the published nu is one for all experts; ours is that of each taken alone."""
    if settings is None:
        settings, W, grads, recorded = next(
            c for c in symmetry_cases("hybrid") if c[1].ndim == 3 and c[0]["alpha"] == 1.0
        )
        expected = torch.tensor(recorded["W_promoted"], dtype=DOUBLE)
    ours = replay(Hybrid, settings, W, grads)
    for e in range(len(W)):
        alone = replay(Hybrid, settings, W[e : e + 1], [G[e : e + 1] for G in grads])
        torch.testing.assert_close(alone[:, 0], ours[:, e], rtol=0, atol=1e-13)
    keep = 1 - settings["lr"] * settings["weight_decay"]
    moved, published = ours[0] - keep * W, expected[0] - keep * W
    ratio = (published / moved).flatten(1)
    assert (ratio.amax(1) - ratio.amin(1)).max() < 1e-6  # one factor for each expert
    assert ratio.amin() > 1.2
    inverse = (1 / ratio[:, 0]).sum()  # nu_e / sum of nu: shares of the whole
    assert inverse == pytest.approx(1.0, abs=1e-6)


SCION = [
    case
    for case in json.loads((FIXTURES / "scion_reference.json").read_text())["trajectories"]
    if case["class"] == "Scion" and case["settings"]["norm"] in ("RowNorm", "ColNorm", "Spectral")
]


@pytest.mark.parametrize("case", SCION, ids=lambda c: f"{c['input']} {c['settings']['norm']}")
def test_recorded_scion(case):
    """Scion's steps are those of RowNorm and Muon with other sizes; its eps sits elsewhere."""
    given = json.loads((FIXTURES / "scion_reference.json").read_text())["inputs"][case["input"]]
    theirs, W = case["settings"], torch.tensor(given["W0"], dtype=DOUBLE)
    n = W.shape[1]
    options = {
        "momentum": 1 - theirs["momentum"],
        "lr": theirs["lr"],
        "weight_decay": 0.0 if theirs["unconstrained"] else 1.0,
    }
    grads = [torch.tensor(G, dtype=DOUBLE) for G in given["G"]]
    if theirs["norm"] == "Spectral":
        options["weight_decay"] /= theirs["scale"]
        options["lr"] *= theirs["scale"]
        options |= {"polar": "ns5", "nesterov": False, "adjust_lr_fn": "spectral"}
        out = replay(Muon, options, W, grads)
    else:  # rows of RMS 1 for a table of tokens, of 1 / n for the oracle of rows
        size = theirs["scale"] / (n if theirs["norm"] == "RowNorm" else 1)
        out = replay(RowNorm, {**options, "rms_target": size}, W, grads)
    expected = torch.tensor(case["W_promoted"], dtype=DOUBLE)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


# against the oracle

KINDS = [
    (RowNorm, "rownorm", {}, {}),
    (RowNorm, "rownorm", {"row_mode": "unit"}, {"mode": "unit"}),
    (RowNorm, "rownorm", {"row_mode": "relative"}, {"mode": "relative"}),
    (RowNorm, "rownorm", {"centred": True}, {"centre": True}),
    (RowNorm, "rownorm", {"centred": True, "row_mode": "relative", "adjust_lr_fn": "none"},
     {"centre": True, "mode": "relative", "match": False}),
    (RowNorm, "rownorm", {"axis": "cols"}, {"axis": "cols"}),
    (Hybrid, "hybrid", {"polar": "svd"}, {}),
    (Hybrid, "hybrid", {"polar": "svd", "centred": True}, {"centre": True}),
    (Hybrid, "hybrid", {"polar": "svd", "order": "polar_then_row", "axis": "cols"},
     {"order": "polar_then_row", "axis": "cols"}),
    (Hybrid, "hybrid", {"polar": "svd", "alpha": 1.0, "adjust_lr_fn": "none"},
     {"alpha": 1.0, "match": False}),
    (Spectral, "spectral", {"polar": "svd"}, {}),
    (Spectral, "spectral", {"polar": "svd", "axis": "cols", "centred": True},
     {"axis": "cols", "centre": True}),
    (Spectral, "spectral", {"polar": "svd", "alpha": 1.0, "adjust_lr_fn": "none"},
     {"alpha": 1.0, "match": False}),
]  # fmt: skip


@pytest.mark.parametrize("eps", [None, 1e-8])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str((kind[1], kind[2])))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(kind, shape, eps):
    cls, name, ours, theirs = kind
    p, grads = weight(shape, dtype=DOUBLE), doubles(shape, 5)
    floor = sys.float_info.min if eps is None else eps
    expected = oracle.run(name, p.detach(), grads, 0.1, wd=0.1, eps=floor, **theirs)
    out = run(cls([p], lr=0.1, weight_decay=0.1, eps=eps, **ours), [p], [grads])
    short = shape[0] if ours.get("axis", "rows") == "rows" else shape[1]
    if ours.get("centred") and short == 1:  # one row is its own mean: what is left is rounding
        expected = [0.99 ** (t + 1) * weight(shape, dtype=DOUBLE).detach() for t in range(5)]
    for (V,), R in zip(out, expected, strict=True):
        torch.testing.assert_close(V, R, rtol=0, atol=1e-10)


# stale rows and centring


def test_a_stale_row_moves_at_full_speed_until_eps_stops_it():
    """225 steps from a momentum row of 1e-3, 135 from 1e-5; ``relative`` lets it fade at once.

    With the published eps, that is: the default stops no row that has a direction.
    """
    for start, steps in ((1e-3, 225), (1e-5, 135)):
        assert math.log(start / 1e-8) / -math.log(0.95) == pytest.approx(steps, abs=1)
        p = torch.nn.Parameter(torch.zeros(3, 4, dtype=DOUBLE))
        G = torch.zeros(3, 4, dtype=DOUBLE)
        G[0] = 0.5 * start / 0.05  # a row of length start in the momentum after one step
        busy = torch.zeros(3, 4, dtype=DOUBLE)
        busy[1] = 1.0
        optimizer = RowNorm([p], lr=1.0, adjust_lr_fn="none", eps=1e-8)
        out = run(optimizer, [p], [[G] + [busy] * (steps + 40)])
        sizes = [float((b[0] - a[0]).norm()) for (a,), (b,) in pairwise(out)]
        assert sizes[steps // 2] > 0.96 and 0.4 < sizes[steps - 2] < 0.6 and sizes[-1] < 0.2
        assert float(p.detach()[2].abs().max()) == 0.0  # never seen
        p.data.zero_()
        out = run(RowNorm([p], lr=1.0, adjust_lr_fn="none", row_mode="relative"), [p],
                  [[G] + [busy] * 60])  # fmt: skip
        first, last = (float((out[t][0][0] - out[t - 1][0][0]).norm()) for t in (1, 60))
        assert last < first / 100 and 0.9 < sizes[1]


def test_centring_commutes_with_permutations_and_right_maps_and_not_with_left_signs():
    from stiefel.optimizers._core.rule import LOCAL_REDUCTIONS
    from stiefel.optimizers._toolkit.row_rules import center

    X = doubles((7, 5), 1)[0]
    C = lambda Y: center(Y[None], LOCAL_REDUCTIONS, len(Y))[0]  # noqa: E731
    P, Q = permutation(7), rotation(5)
    torch.testing.assert_close(C(X[P]), C(X)[P], rtol=0, atol=1e-15)
    torch.testing.assert_close(C(X @ Q), C(X) @ Q, rtol=0, atol=1e-14)
    signs = torch.tensor([1, -1, 1, -1, 1, -1, 1], dtype=DOUBLE)[:, None]
    assert (C(signs * X) - signs * C(X)).norm() > 0.1 * X.norm()


def test_centring_needs_both_projections():
    """After the first alone the mean of the rows is there again; after both it is not."""
    X = oracle.centred(doubles((7, 5), 1)[0])
    assert oracle.row_norm(X).mean(0).norm() > 1e-2
    W = weight((7, 5), dtype=DOUBLE).detach()
    assert change(RowNorm, W, doubles((7, 5), 3), centred=True).mean(0).abs().max() < 1e-16


MAPS = {
    "polar": (Spectral, {"polar": "svd"}),
    "row-norm": (RowNorm, {}),
    "centred row-norm": (RowNorm, {"centred": True}),
    "row_then_polar": (Hybrid, {"polar": "svd"}),
    "polar_then_row": (Hybrid, {"polar": "svd", "order": "polar_then_row"}),
    "column-norm": (RowNorm, {"axis": "cols"}),
    "centred left-spectral": (Spectral, {"polar": "svd", "centred": True, "side": "left"}),
    "zolo": (Spectral, {"polar": "zolo"}),
    "hybrid zolo": (Hybrid, {"polar": "zolo"}),
}
# left O(m), left S_m, right O(n), row scaling, shift: whether the step commutes with the map
TABLE = {
    "polar": (True, True, True, False, False),
    "row-norm": (False, True, True, True, False),
    "centred row-norm": (False, True, True, False, True),
    "row_then_polar": (False, True, True, True, False),
    "polar_then_row": (False, True, True, False, False),
    "column-norm": (True, True, False, False, False),
    "centred left-spectral": (False, True, True, False, True),
    "zolo": (True, True, True, False, False),
    "hybrid zolo": (False, True, True, True, False),
}


@pytest.mark.parametrize("name", MAPS)
def test_equivariance_is_as_the_table_says(name):
    """What commutes does so to 1e-10, and what does not is seen not to."""
    cls, options = MAPS[name]
    options = {"adjust_lr_fn": "none", "momentum": 0.0, **options}
    if cls is not Spectral:
        options["eps"] = 1e-300  # the table is of the map without it
    G = torch.randn(7, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    W = torch.zeros(7, 5, dtype=DOUBLE)
    T = lambda X: change(cls, W, [X], **options)  # noqa: E731
    U = T(G)
    L, P, Q = rotation(7, 1), permutation(7, 2), rotation(5, 3)
    s = torch.linspace(0.5, 2.0, 7, dtype=DOUBLE)[:, None]
    shift = torch.linspace(-1.0, 1.0, 5, dtype=DOUBLE)
    errors = [
        T(L @ G) - L @ U, T(G[P]) - U[P], T(G @ Q) - U @ Q, T(s * G) - U, T(G + shift) - U,
    ]  # fmt: skip
    for error, zero in zip(errors, TABLE[name], strict=True):
        relative = float(error.norm() / U.norm())
        assert relative < 1e-10 if zero else relative > 0.03, (name, relative)


@pytest.mark.parametrize(
    "options", [{}, {"axis": "cols"}, {"row_mode": "relative"}, {"pair": "halves"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(34, 5), (18, 33), (130, 70)])
def test_permutations_commute_bit_for_bit(shape, dtype, options):
    """Rows, or columns, or neurons of a fused gate and up, in another order: the same bits."""
    W, grads = weight(shape, dtype=dtype).detach(), gradients(shape, 3)
    if options.get("row_mode") == "relative":  # a sum over rows is in it, exact if it is one
        grads = [G.sign() for G in grads]
    if options.get("axis"):
        P = permutation(shape[1])
        move = lambda X: X[:, P]  # noqa: E731
    elif options.get("pair"):
        half = permutation(shape[0] // 2)
        P = torch.cat([half, half + shape[0] // 2])
        move = lambda X: X[P]  # noqa: E731
    else:
        P = permutation(shape[0])
        move = lambda X: X[P]  # noqa: E731
    plain = run_one(W, grads, options)
    moved = run_one(move(W), [move(G) for G in grads], options)
    assert same(moved, move(plain))


def run_one(W, grads, options):
    p = torch.nn.Parameter(W.clone())
    # random bits belong to places, which permutations do not keep
    run(RowNorm([p], lr=0.1, weight_decay=0.1, write="nearest", **options), [p], [grads])
    return p.detach().clone()


# the match of the root mean square


@pytest.mark.parametrize("shape", [TALL, WIDE, ODD, ROW])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: RowNorm(p, lr=1.0),
        lambda p: RowNorm(p, lr=1.0, rms_target=0.06),
        lambda p: Spectral(p, lr=1.0),
        lambda p: Hybrid(p, lr=1.0),
        lambda p: Hybrid(p, lr=1.0, order="polar_then_row", axis="cols"),
        lambda p: Muon(p, lr=1.0, weight_decay=0.0, polar="svd"),
    ],
)
def test_one_lr_serves_all_a_step_has_the_rms_of_adamw(make, shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make([p])
    run(optimizer, [p], [gradients(shape, 1)])
    target = optimizer.param_groups[0].get("rms_target", 0.2)
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(target, rel=1e-3)


@pytest.mark.parametrize("cls", [RowNorm, Spectral, Hybrid])
def test_rows_without_a_gradient_stay_and_do_not_count(cls):
    p = torch.nn.Parameter(torch.zeros(12, 5))
    G = gradients((12, 5), 1)[0]
    G[3:] = 0.0
    run(cls([p], lr=1.0), [p], [[G]])
    assert float(p[3:].detach().abs().max()) < 1e-6
    assert float(p[:3].detach().square().mean().sqrt()) == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("cls", [RowNorm, Spectral, Hybrid])
@pytest.mark.parametrize("centred", [False, True])
def test_a_zero_gradient_moves_nothing(cls, centred):
    p = weight((6, 4))
    before = p.detach().clone()
    run(cls([p], lr=1.0, centred=centred), [p], [[torch.zeros(6, 4)]])
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("shape", [(512, 768), (768, 512), (640, 640)])
@pytest.mark.parametrize(
    "cls, options, most",
    [
        (RowNorm, {}, 0.5),
        (RowNorm, {"axis": "cols"}, 0.5),
        (RowNorm, {"centred": True}, 2),
        (RowNorm, {"centred": True, "pair": "halves"}, 3),
        (Spectral, {"centred": True}, 5),
        (Spectral, {"polar": "ns5"}, 5),
        (Spectral, {"polar": "inverse_root"}, 8),
        (Hybrid, {"centred": True}, 6),
        (Hybrid, {"centred": True, "pair": "interleaved"}, 6),
        (Hybrid, {"order": "polar_then_row", "axis": "cols"}, 6),
        (Hybrid, {"polar": "inverse_root", "centred": True}, 10),
    ],
    ids=str,
)
def test_temporaries_are_those_of_the_docstring(cls, options, most, shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = cls([p], **options)
    draw = lambda p, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    counter = count_second_step(optimizer, draw)
    vectors = 8 * sum(shape)
    assert counter.peak <= 4 * (most * p.numel() + vectors)


# pairs


@pytest.mark.parametrize("cls", [RowNorm, Spectral, Hybrid])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("r", [7, 12])
def test_three_layouts_of_gate_and_up_are_one_problem(cls, centred, r):
    """Two parameters, halves of one, and rows in turn of one, each to each."""
    d, options = 5, {"lr": 0.1, "weight_decay": 0.1, "centred": centred}
    if cls is not RowNorm:
        options["polar"] = "svd"
    gates, ups = doubles((r, d), 3), doubles((r, d), 3, seed=1)
    gate, up = weight((r, d), 2, DOUBLE), weight((r, d), 3, DOUBLE)
    both = torch.cat([gate, up]).detach()
    turn = lambda g, u: torch.stack([g, u], 1).reshape(2 * r, d)  # noqa: E731
    rows = torch.nn.Parameter(turn(gate.detach(), up.detach()))
    fused = torch.nn.Parameter(both.clone())
    run(cls([gate, up], pair="members", **options), [gate, up], [gates, ups])
    halves = [torch.cat([g, u]) for g, u in zip(gates, ups, strict=True)]
    run(cls([fused], pair="halves", **options), [fused], [halves])
    mixed = [turn(g, u) for g, u in zip(gates, ups, strict=True)]
    run(cls([rows], pair="interleaved", **options), [rows], [mixed])
    joined = torch.cat([gate, up]).detach()
    torch.testing.assert_close(fused.detach(), joined, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.detach(), turn(gate, up).detach(), rtol=0, atol=1e-12)
    assert (joined - both).abs().max() > 1e-3


def test_a_half_without_a_gradient_sits_out():
    gate, up, alone = weight((6, 4)), weight((6, 4), 1), weight((6, 4))
    grads = gradients((6, 4), 3)
    run(Hybrid([gate, up], pair="members"), [gate, up], [grads, [None] * 3])
    run(Hybrid([alone]), [alone], [grads])
    assert torch.equal(up, weight((6, 4), 1)) and torch.equal(gate, alone)


@pytest.mark.parametrize("layout", ["halves", "interleaved", None])
@pytest.mark.parametrize("r, d", [(1, 1), (3, 5), (7, 2)])
def test_folding_and_unfolding_round_trip(layout, r, d):
    from stiefel.optimizers._toolkit.row_rules import join_pairs, split_pairs

    X = torch.arange(2.0 * 2 * r * d).view(2, 2 * r, d)
    Y = join_pairs(X, layout)
    assert Y.shape == ((2, r, 2 * d) if layout else X.shape)
    assert torch.equal(split_pairs(Y, layout), X)
    if layout:
        first, second = (0, r) if layout == "halves" else (0, 1)
        assert torch.equal(Y[:, 0], torch.cat([X[:, first], X[:, second]], -1))


# refusals


@pytest.mark.parametrize(
    "cls, options, text",
    [
        (RowNorm, {"row_mode": "l1"}, "row_mode"),
        (RowNorm, {"momentum": 1.5}, "momentum"),
        (RowNorm, {"rms_target": 0.0}, "rms_target"),
        (RowNorm, {"pair": "halves", "axis": "cols"}, "paired by rows"),
        (RowNorm, {"adjust_lr_fn": "original"}, "adjust_lr_fn"),
        (RowNorm, {"eps": -1.0}, "epsilon"),
        (Hybrid, {"alpha": 1.0}, "adjust_lr_fn='none'"),
        (Hybrid, {"polar": "turbo"}, "polar must be"),
        (Hybrid, {"order": "both"}, "order"),
        (Spectral, {"ns_steps": 0}, "ns_steps"),
        (Spectral, {"side": "both"}, "side"),
        (Spectral, {"eps": -1.0}, "epsilon"),
    ],
)
def test_bad_values_are_refused(cls, options, text):
    with pytest.raises(ValueError, match=text):
        cls([weight((4, 4))], **options)


def test_pairs_that_do_not_fit_are_refused():
    optimizer = RowNorm([weight((5, 4))], pair="halves")
    with pytest.raises(ValueError, match="even number of rows"):
        optimizer.init_state()
    with pytest.raises(ValueError, match="one shape"):
        RowNorm([weight((5, 4)), weight((4, 4))], pair="members").init_state()


# small numbers

SCALE_FREE = [
    (RowNorm, {}),
    (RowNorm, {"centred": True}),
    (RowNorm, {"pair": "halves"}),
    (RowNorm, {"row_mode": "unit", "axis": "cols"}),
    (RowNorm, {"row_mode": "relative"}),
    (Hybrid, {"polar": "svd"}),
    (Hybrid, {"polar": "inverse_root"}),
    (Hybrid, {"order": "polar_then_row"}),
    (Spectral, {"polar": "ns5"}),
    (Spectral, {"polar": "inverse_root"}),
]


@pytest.mark.parametrize("cls, options", SCALE_FREE, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_size_of_the_gradient_does_not_matter_down_to_denormal_numbers(cls, options, dtype):
    G = gradients((12, 7), 1, dtype=dtype)[0]
    expected = change(cls, torch.zeros(12, 7, dtype=dtype), [G], **options)
    lowest = torch.finfo(dtype).tiny
    for size, atol in ((1e-9, 1e-4), (lowest * 2**10, 1e-4), (lowest / 2**6, 5e-3)):
        moved = change(cls, torch.zeros(12, 7, dtype=dtype), [G * size], **options)
        assert (moved - expected).norm() < atol * expected.norm(), size


@pytest.mark.parametrize("cls, options", SCALE_FREE, ids=lambda x: getattr(x, "__name__", str(x)))
def test_gradients_whose_squares_overflow_take_a_whole_step(cls, options):
    G = gradients((12, 7), 1)[0]
    expected = change(cls, torch.zeros(12, 7), [G], **options)
    moved = change(cls, torch.zeros(12, 7), [G * 1e30], **options)
    assert (moved - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("cls, options", SCALE_FREE, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("size", [1.0, 1e-41])
def test_zero_rows_stay_whatever_the_size_of_the_others(cls, options, size):
    G = gradients((12, 700), 1)[0] * size  # so long that 1 / tiny times a step overflows
    G[3] = 0.0
    if options.get("axis") == "cols":
        G = G.mT
    moved = change(cls, torch.zeros_like(G), [G], **options)
    zero = change(cls, torch.ones_like(G), [torch.zeros_like(G)], **options)
    assert moved.isfinite().all() and torch.equal(zero, torch.zeros_like(G))
    rows = moved.mT if options.get("axis") == "cols" else moved
    if not options.get("centred"):
        assert rows[3].abs().max() < 1e-5 * rows.abs().max()
    assert rows[4].norm() > 0


def test_an_eps_that_is_given_stays():
    for eps, share in ((1e-8, 0.5), (0.0, 1.0)):
        G = torch.zeros(2, 3, dtype=DOUBLE)
        G[0, 0] = 1e-8 / 0.05
        moved = change(RowNorm, torch.zeros(2, 3, dtype=DOUBLE), [G], eps=eps, adjust_lr_fn="none")
        assert float(-moved[0, 0]) == pytest.approx(0.1 * share)


def test_a_hybrid_group_from_before_row_eps_keeps_what_was_added():
    """Then ``eps=None`` meant 1e-8 for rows; a new optimizer adds the smallest normal number."""
    old, G = Hybrid([weight((4, 6))], lr=0.1), [g * 1e-8 for g in gradients((4, 6), 2)]
    saved = old.state_dict()
    del saved["param_groups"][0]["row_eps"]
    old.load_state_dict(saved)
    assert old.param_groups[0]["row_eps"] == 1e-8 and old.param_groups[0]["eps"] is None
    fresh = Hybrid([weight((4, 6))], lr=0.1)
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.param_groups[0]["row_eps"] is None
    W = torch.zeros(4, 6)
    rows = {"row_eps": 1e-8, "order": "polar_then_row", "alpha": 1.0, "adjust_lr_fn": "none"}
    a, b = (change(Hybrid, W, G, **{**rows, **more}) for more in ({}, {"row_eps": None}))
    assert a.norm() < 0.9 * b.norm()


@pytest.mark.parametrize("cls", [RowNorm, Hybrid, Spectral])
def test_only_params_and_lr_are_positional(cls):
    with pytest.raises(TypeError, match="positional"):
        cls([weight((4, 6))], 0.1, 0.1)


@pytest.mark.parametrize("mode", ["inverse_eps", "inverse", "unit", "relative"])
@pytest.mark.parametrize("norm", [row_norm, column_norm])
def test_an_empty_matrix_has_an_empty_result(norm, mode):
    for shape in [(0, 3), (3, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        for centred in (False, True):
            assert norm(torch.zeros(shape), mode=mode, centred=centred).shape == shape
