"""GaLore: bases, refreshes, moments, resuming, the recorded trajectories, the published package."""

import copy
import math
from functools import partial

import pytest
import torch
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.peers import Missing, galore_torch_adamw
from helpers.problems import (
    check_refusal,
    gradients,
    run,
    same,
    tensors,
    trajectory,
    unsolved,
    weight,
)
from helpers.recordings import fed, fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SQUARE, TALL, WIDE
from oracles.common import adamw
from oracles.galore import galore

from stiefel.optimizers import GaLore
from stiefel.optimizers._driver import units
from stiefel.optimizers._toolkit import base_optimizers, dense_projectors

RECORDED = sorted(path.stem for path in FIXTURES.glob("galore-*.json"))
KINDS = ["std", "reverse_std", "right", "left", "full"]


def optimizer_of(data, params):
    settings = dict(data["settings"]["optimizer"])
    return GaLore([{"params": params, **data["settings"]["group"]}], compat="reference", **settings)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectory(name, monkeypatch):
    """The published code's weights, its bases fed where the signs of an SVD would decide."""
    data = fixture(name)
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = optimizer_of(data, [p])
    stored = fed(data, monkeypatch)
    out = run(optimizer, [p], [list(data["grads"])])
    bound = tolerance(data, "max_abs_diff_to_float64_run")
    worst = max(float((W[0] - R).abs().max()) for W, R in zip(out, data["W"], strict=True))
    assert worst <= bound, (worst, bound)
    assert next(stored, None) is None


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_bases_are_ours_up_to_signs(name):
    data = fixture(name)
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = optimizer_of(data, [p])
    recorded = {entry["step"]: entry["basis"] for entry in data["bases"]}
    for step, G in enumerate(data["grads"]):
        p.grad = G
        optimizer.step()
        if step not in recorded:
            continue
        found = [optimizer.state[p][k] for k in ("basis", "basis_right") if k in optimizer.state[p]]
        wanted = recorded[step] if len(found) == 2 else [recorded[step]]
        for P, B in zip(found, wanted, strict=True):
            B = torch.tensor(B, dtype=torch.float32)
            B = B if B.shape == P.shape else B.mT
            torch.testing.assert_close(P @ P.mT, B @ B.mT, rtol=0, atol=2e-4)


def published():
    """GaLoreAdamW of galore-torch."""
    try:
        return galore_torch_adamw()
    except Missing as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("kind", ["std", "reverse_std", "right", "left", "full"])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_reference_equals_the_published_package(shape, kind):
    """The published package, live: matrices and vectors over 2T + 3 steps."""
    theirs = published()
    p, v = weight(shape, 0), weight((5,), 1)
    q, u = weight(shape, 0), weight((5,), 1)
    group = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": kind}
    ours = GaLore(
        [{"params": [p], **group}, {"params": [v]}], lr=0.01, weight_decay=0.1, compat="reference"
    )
    theirs = theirs(
        [{"params": [q], **group}, {"params": [u]}],
        lr=0.01,
        weight_decay=0.1,
        no_deprecation_warning=True,
    )
    grads = gradients(shape, 13)
    for step, G in enumerate(grads):
        p.grad, q.grad = G.clone(), G.clone()
        v.grad = torch.sin(torch.arange(5.0) + step)
        u.grad = v.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
        torch.testing.assert_close(v, u, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD])
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("reference", [False, True])
def test_equals_the_oracle(shape, kind, moments, reference):
    """Against the naive float64 loop, which takes our bases at later refreshes."""
    p, grads = weight(shape, dtype=torch.float64), gradients(shape, 9, dtype=torch.float64)
    settings = {
        "lr": 0.02,
        "rank": 3,
        "update_proj_gap": 4,
        "scale": 0.7,
        "weight_decay": 0.1,
        "proj_type": kind,
        "moments": moments,
    }
    optimizer = GaLore([p], compat="reference" if reference else None, eps=1e-6, **settings)
    bases, ours = [], []
    for step, G in enumerate(grads):
        p.grad = G
        optimizer.step()
        ours.append(p.detach().clone())
        if step % 4 == 0:
            state = optimizer.state[p]
            bases.append((state["basis"].clone(), state.get("basis_right", state["basis"]).clone()))
    theirs = galore(
        p.detach() * 0 + weight(shape, dtype=torch.float64).detach(),
        grads,
        eps=1e-6,
        reference=reference,
        bases=bases,
        **settings,
    )
    for W, R in zip(ours, theirs, strict=True):
        torch.testing.assert_close(W, R, rtol=0, atol=1e-9)
    if not reference:
        free = galore(weight(shape, dtype=torch.float64).detach(), grads, eps=1e-6, **settings)
        worst = max(float((W - R).abs().max()) for W, R in zip(ours, free, strict=True))
        assert worst < (1e-6 if kind == "full" else 1e-7), worst


# bfloat16: seven roundings of weights below 4, half a unit of 2^-6 each
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.bfloat16, 7 * 2**-7)])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN])
def test_narrow_dtypes_follow_the_oracle(shape, dtype, atol):
    settings = {"lr": 0.02, "rank": 3, "update_proj_gap": 4, "scale": 0.5}
    ours = trajectory(lambda ps: GaLore(ps, **settings), shape, 7, dtype=dtype)
    grads = [G.to(dtype) for G in gradients(shape, 7)]
    theirs = galore(weight(shape, dtype=dtype).detach(), grads, **settings)
    torch.testing.assert_close(ours[-1].double(), theirs[-1], rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_full_rank_is_adam_in_rotated_coordinates(shape):
    grads = gradients(shape, 12)
    side = min(shape)
    p = weight(shape)
    out = run(GaLore([p], lr=0.02, rank=side, update_proj_gap=10**6, scale=1.0), [p], [grads])
    left, _, right = torch.linalg.svd(grads[0].double(), full_matrices=False)
    wide = shape[0] < shape[1]
    W0 = weight(shape).detach().double()
    Z0 = left.T @ W0 if wide else W0 @ right.T
    projected = [(left.T @ G.double()) if wide else (G.double() @ right.T) for G in grads]
    Z = adamw(Z0, projected, 0.02)[-1]
    torch.testing.assert_close(
        out[-1][0].double(), left @ Z if wide else Z @ right, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}])
def test_without_rank_it_is_torch_adamw_exactly(flags):
    p, q, r = weight(TALL), weight(TALL), weight(WIDE)
    ours = GaLore(
        [{"params": [p]}, {"params": [r], "rank": 2}],
        lr=0.01,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        **flags,
    )
    theirs = torch.optim.AdamW([q], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, **flags)
    for G in gradients(TALL, 6):
        p.grad, q.grad = G, G.clone()
        ours.step()
        theirs.step()
    assert torch.equal(p, q)
    assert [row.rule for row in ours.assignment()] == ["adamw", "GaLore"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_basis_is_orthonormal_and_the_update_lies_in_it(shape, kind):
    p, grads = weight(shape), gradients(shape, 6)
    optimizer = GaLore([p], lr=0.1, rank=3, update_proj_gap=4, proj_type=kind)
    m, n = shape
    right = {"std": m >= n, "reverse_std": m < n, "right": True}.get(kind, False)
    for G in grads:
        before, p.grad = p.detach().clone(), G
        optimizer.step()
        step, state = before - p.detach(), optimizer.state[p]
        for key in ("basis", "basis_right"):
            if key in state:
                P = state[key]
                torch.testing.assert_close(P.mT @ P, torch.eye(3), rtol=0, atol=1e-5)
        assert int((torch.linalg.svdvals(step.double()) > 1e-5).sum()) <= 3
        P = state["basis"]
        inside = step @ P @ P.mT if right else P @ (P.mT @ step)
        torch.testing.assert_close(inside, step, rtol=0, atol=2e-6)
        if kind == "full":
            Q = state["basis_right"]
            torch.testing.assert_close(step @ Q @ Q.mT, step, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_first_step_is_a_lifted_sign(shape):
    p, G = weight(shape, dtype=torch.float64), gradients(shape, 1, dtype=torch.float64)[0]
    optimizer = GaLore([p], lr=0.3, rank=4, scale=0.5, eps=1e-300)
    before, p.grad = p.detach().clone(), G
    optimizer.step()
    P = optimizer.state[p]["basis"]
    lift = P @ torch.sign(P.mT @ G) if shape[0] < shape[1] else torch.sign(G @ P) @ P.mT
    torch.testing.assert_close(before - p.detach(), 0.3 * 0.5 * lift, rtol=0, atol=1e-12)
    size = 0.3 * 0.5 * math.sqrt(4 * max(shape))
    assert math.isclose(float((before - p.detach()).norm()), size, rel_tol=1e-12)


@pytest.mark.parametrize("projection", ["svd", "svd_full"])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD])
def test_a_refresh_keeps_the_top_energy(shape, projection):
    p, grads = weight(shape), gradients(shape, 5)
    optimizer = GaLore([p], rank=3, update_proj_gap=2, projection=projection)
    for step, G in enumerate(grads):
        p.grad = G
        optimizer.step()
        if step % 2 == 0:
            P, s = optimizer.state[p]["basis"], torch.linalg.svdvals(G)
            R = P.mT @ (G.mT if shape[0] >= shape[1] else G)
            top = s[:3].square().sum()
            torch.testing.assert_close(R.square().sum(), top, rtol=1e-5, atol=0)


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_transpose_symmetry(moments):
    p = weight(TALL)
    q = torch.nn.Parameter(p.detach().mT.contiguous())
    grads = gradients(TALL, 9)
    settings = {"lr": 0.02, "rank": 3, "update_proj_gap": 4, "moments": moments}
    a = run(GaLore([p], **settings), [p], [grads])
    b = run(GaLore([q], **settings), [q], [[G.mT.contiguous() for G in grads]])
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[0], y[0].mT, rtol=0, atol=2e-6)


def test_update_is_linear_in_scale_and_free_of_the_gradients_size():
    def moved(scale=0.25, c=1.0):
        p = weight(WIDE, dtype=torch.float64)
        start = p.detach().clone()
        grads = [c * G for G in gradients(WIDE, 7, dtype=torch.float64)]
        optimizer = GaLore([p], lr=0.02, rank=3, update_proj_gap=3, scale=scale, eps=1e-300)
        return run(optimizer, [p], [grads])[-1][0] - start

    torch.testing.assert_close(moved(0.75), 3 * moved(0.25), rtol=0, atol=1e-12)
    torch.testing.assert_close(moved(c=1e3), moved(), rtol=0, atol=1e-9)
    torch.testing.assert_close(moved(c=1e-3), moved(), rtol=0, atol=1e-9)


def test_refreshes_come_at_multiples_and_keep_touches_no_moment(monkeypatch):
    p, grads, gap = weight(WIDE), gradients(WIDE, 11), 4
    optimizer = GaLore([p], rank=3, update_proj_gap=gap)
    carried, original = [], base_optimizers.carry_moments

    def spy(policy, M, V, change, **clock):
        before = M.clone(), V.clone()
        original(policy, M, V, change, **clock)
        carried.append(torch.equal(M, before[0]) and torch.equal(V, before[1]))

    monkeypatch.setattr(base_optimizers, "carry_moments", spy)
    last, changes = None, []
    for step, G in enumerate(grads):
        p.grad = G
        optimizer.step()
        basis = optimizer.state[p]["basis"].clone()
        if last is None or not torch.equal(last, basis):
            changes.append(step)
        last = basis
    assert changes == [0, gap, 2 * gap] and carried == [True, True]


def test_signs_before_the_first_refresh_do_not_matter(monkeypatch):
    original = dense_projectors.top_basis
    a = trajectory(lambda ps: GaLore(ps, lr=0.02, rank=4, update_proj_gap=6), WIDE, 6)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0])
    monkeypatch.setattr(dense_projectors, "top_basis", lambda *x, **k: original(*x, **k) * flips)
    b = trajectory(lambda ps: GaLore(ps, lr=0.02, rank=4, update_proj_gap=6), WIDE, 6)
    torch.testing.assert_close(a[-1], b[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["same", "signs", "order"])
def test_rotate_follows_the_basis(monkeypatch, change):
    """With the same span written in other coordinates, rotate gives the same weights."""
    first, original, calls = [], dense_projectors.top_basis, []
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0])
    order = torch.tensor([2, 0, 3, 1])

    def fixed(*args, **kwargs):
        if not first:
            first.append(original(*args, **kwargs))
        calls.append(1)
        P = first[0]
        if change == "same" or len(calls) % 2:
            return P.clone()
        return P * flips if change == "signs" else P[..., order].contiguous()

    monkeypatch.setattr(dense_projectors, "top_basis", fixed)
    make = lambda ps: GaLore(ps, lr=0.02, rank=4, update_proj_gap=2, moments="rotate")  # noqa: E731
    a = trajectory(make, WIDE, 8)
    monkeypatch.setattr(dense_projectors, "top_basis", lambda *x, **k: first[0].clone())
    b = trajectory(lambda ps: GaLore(ps, lr=0.02, rank=4, update_proj_gap=10**6), WIDE, 8)
    assert len(calls) == 4
    torch.testing.assert_close(a[-1], b[-1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_state_elements_equal_the_table(shape, kind):
    r, small, large = 3, min(shape), max(shape)
    p, v = weight(shape), weight((5,))
    optimizer = GaLore([p, v], rank=r, proj_type=kind)
    run(optimizer, [p, v], [gradients(shape, 2), [torch.ones(5)] * 2])
    held = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    want = {
        "std": r * (small + 2 * large),
        "reverse_std": r * (large + 2 * small),
        "full": r * sum(shape) + 2 * r * r,
        "right": r * (shape[1] + 2 * shape[0]),
        "left": r * (shape[0] + 2 * shape[1]),
    }[kind]
    assert sum(x.numel() for x in held) == want
    assert sum(x.untyped_storage().nbytes() for x in held) == 4 * want
    assert {k for k, x in optimizer.state[p].items() if isinstance(x, int)} == {"step", "refreshed"}


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical_mid_window_too(stop, dtype):
    def make():
        params = [weight(TALL, 0, dtype), weight(WIDE, 1, dtype), weight((4,), 2, dtype)]
        return params, GaLore(params, lr=0.02, rank=3, update_proj_gap=4)

    grads = [gradients(TALL, 9, 0), gradients(WIDE, 9, 1), [torch.ones(4)] * 9]
    check_resume(make, grads, stop)


def test_runs_repeat_bit_for_bit_and_leave_gradients_alone():
    make = lambda ps: GaLore(ps, lr=0.02, rank=3, update_proj_gap=3)  # noqa: E731
    assert same(trajectory(make, WIDE, 8), trajectory(make, WIDE, 8))
    p, G = weight(WIDE), gradients(WIDE, 1)[0]
    p.grad = G.clone()
    optimizer = make([p])
    optimizer.step()
    assert torch.equal(p.grad, G)
    before, weights = tensors(optimizer), p.detach().clone()
    p.grad = None
    optimizer.step()
    assert same(before, tensors(optimizer)) and torch.equal(p, weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN, (1, 1), (3, 6, 5), (4, 3, 2, 2)]
)
@pytest.mark.parametrize("projection", ["svd", "svd_full"])
def test_no_shape_rank_or_zero_gradient_crashes(shape, kind, projection):
    p, v = weight(shape), weight((4,))
    optimizer = GaLore(
        [p, v], lr=0.02, rank=50, update_proj_gap=2, proj_type=kind, projection=projection
    )
    grads = [torch.zeros(shape), *gradients(shape, 3), torch.zeros(shape)]
    run(optimizer, [p, v], [grads, [torch.ones(4)] * 5])
    assert p.isfinite().all() and v.isfinite().all()


def test_rank_and_refreshes_decide_how_far_a_quadratic_is_solved():
    """A rank-4 target: r >= 4 reaches Adam's loss, r < 4 in a fixed subspace stalls above it."""
    draw = torch.Generator().manual_seed(3)
    target = torch.randn(16, 4, generator=draw) @ torch.randn(4, 24, generator=draw)

    def loss(make):
        return min(unsolved(partial(make, lr), target) for lr in (0.1, 0.3))

    def galore(rank, gap):
        return loss(lambda lr, ps: GaLore(ps, lr=lr, scale=1.0, rank=rank, update_proj_gap=gap))

    adam = loss(lambda lr, ps: torch.optim.AdamW(ps, lr=lr, weight_decay=0))
    enough, fixed, moving = galore(4, 10**6), galore(2, 10**6), galore(2, 20)
    assert enough <= max(2 * adam, 1e-6)
    assert fixed > 0.05
    assert moving < 0.02 * fixed


def test_reset_restarts_the_bias_correction():
    a = trajectory(
        lambda ps: GaLore(ps, lr=0.02, rank=3, update_proj_gap=3, moments="reset"), WIDE, 6
    )
    p = torch.nn.Parameter(a[2].clone())
    fresh = GaLore([p], lr=0.02, rank=3, update_proj_gap=3)
    b = run(fresh, [p], [gradients(WIDE, 6)[3:]])
    assert same(a[3:], [W[0] for W in b])


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"update_proj_gap": 0}, "update_proj_gap"),
        ({"proj_type": "middle"}, "proj_type"),
        ({"projection": "qr"}, "projection"),
        ({"moments": "drop"}, "moments"),
        ({"compat": "torch"}, "compat"),
        ({"correct_bias": False}, "correct_bias"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"eps": -1.0}, "Invalid epsilon value"),
    ],
)
def test_bad_settings_are_one_sentence_for_constructor_and_group(bad, text):
    check_refusal(GaLore, bad, text)


def test_fractional_rank_is_of_the_projected_side():
    p, q = weight((8, 20)), weight((8, 20))
    GaLore([p], rank=0.5).init_state()
    a = GaLore([p], rank=0.25)
    b = GaLore([q], rank=0.25, proj_type="reverse_std")
    a.init_state()
    b.init_state()
    assert a.state[p]["basis"].shape == (8, 2) and b.state[q]["basis"].shape == (20, 5)


def test_deepcopy_goes_on_alone():
    p = weight(WIDE)
    optimizer = GaLore([p], lr=0.02, rank=3, update_proj_gap=3)
    run(optimizer, [p], [gradients(WIDE, 4)])
    twin = copy.deepcopy(optimizer)
    q = twin.param_groups[0]["params"][0]
    rest = gradients(WIDE, 8)[4:]
    assert same(run(optimizer, [p], [rest]), run(twin, [q], [rest]))


# Every projection: orientation, resuming, draws, state and refreshes.

DENSE = ["svd", "svd_full", "range", "power", "random"]
INDEX = ["randk", "topk", "dct", "dct:l1"]
projections = pytest.mark.parametrize("projection", [*DENSE, *INDEX])


def final_loss(gap=10, **settings):
    """Share of a quadratic's loss that is left after 300 steps from zero; full-rank target."""
    draw = torch.Generator().manual_seed(3)
    target = torch.randn(16, 24, generator=draw)
    settings |= {"lr": 0.1, "scale": 1.0, "rank": 8, "update_proj_gap": gap}
    return unsolved(lambda params: GaLore(params, **settings), target, 300)


@projections
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate", "ldadam", "match"])
def test_training_with_every_projection_and_policy(projection, moments):
    """Half the rank solves the whole quadratic, because the subspace moves."""
    if moments == "match" and projection in DENSE:
        with pytest.raises(ValueError, match="use moments='rotate'"):
            GaLore([weight(WIDE)], projection=projection, moments=moments)
        return
    assert final_loss(projection=projection, moments=moments) <= 0.001


@pytest.mark.parametrize("projection", DENSE)
@pytest.mark.parametrize("moments", ["reset", "rotate", "ldadam"])
def test_training_with_two_sides(projection, moments):
    """Kept moments, read in new coordinates on both sides, leave 4 to 25 % instead."""
    assert final_loss(gap=4, projection=projection, moments=moments, proj_type="full") <= 0.005


@projections
@pytest.mark.parametrize("kind", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_state_bytes_of_every_projection(projection, kind, shape):
    p, r = weight(shape, dtype=torch.bfloat16), 3
    run(GaLore([p], rank=r, projection=projection, proj_type=kind), [p], [gradients(shape, 1)])
    optimizer = GaLore([p], rank=r, projection=projection, proj_type=kind)
    run(optimizer, [p], [gradients(shape, 2)])
    m, n = sorted(shape) if kind == "std" else sorted(shape, reverse=True)
    held = {k: x for k, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}
    first = {"index": 4 * r} if projection in INDEX else {"basis": 4 * m * r}
    want = {**first, "exp_avg": 4 * r * n, "exp_avg_sq": 4 * r * n}
    assert {k: x.untyped_storage().nbytes() for k, x in held.items()} == want
    assert projection not in INDEX or held["index"].dtype == torch.int32


@projections
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_a_turned_weight_is_the_transposed_problem(projection, shape):
    p = weight(shape)
    q = torch.nn.Parameter(p.detach().mT.contiguous())
    grads = gradients(shape, 9)
    settings = {"lr": 0.02, "rank": 3, "update_proj_gap": 4, "projection": projection}
    a = run(GaLore([p], **settings), [p], [grads])
    b = run(GaLore([q], **settings), [q], [[G.mT.contiguous() for G in grads]])
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[0], y[0].mT, rtol=0, atol=5e-6)


@projections
@pytest.mark.parametrize("moments", ["keep", "ldadam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_of_every_projection(projection, moments, dtype):
    """In the middle of a window, in the step of a refresh, and right after one."""
    settings = {"lr": 0.02, "rank": 3, "update_proj_gap": 4, "seed": 5, "moments": moments}
    shape = (40, 300)  # indices above 256 do not survive bfloat16

    def make():
        params = [weight(shape, 0, dtype), weight(WIDE, 1, dtype)]
        kind = "reverse_std" if projection in INDEX else "std"
        return params, GaLore(params, projection=projection, proj_type=kind, **settings)

    def loaded(optimizer, params):
        index = optimizer.state[params[0]].get("index")
        assert index.dtype == torch.int32 if projection in INDEX else index is None

    for stop in (2, 4, 5):
        check_resume(make, [gradients(shape, 9, 0), gradients(WIDE, 9, 1)], stop, loaded=loaded)


@projections
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_stack_equals_separate_optimizers_for_every_projection(projection, dtype, state_dtype):
    shape, settings = (12, 20), {"lr": 0.02, "rank": 4, "update_proj_gap": 2, "write": "nearest"}
    make = partial(GaLore, projection=projection, moments="ldadam", **settings)
    options = {} if state_dtype is None else {"state_dtype": state_dtype}
    params = [weight(shape, k, dtype) for k in range(3)]
    grads = [gradients(shape, 5, k) for k in range(3)]
    run(make(params, **options), params, grads)
    blind = projection in ("random", "randk", "range", "power")
    for k in range(1 if blind else 3):  # draws go by position: only the first is alone the same
        p = weight(shape, k, dtype)
        run(make([p], **options), [p], [grads[k]])
        assert torch.equal(p, params[k])


@projections
def test_views_equal_the_stack_for_every_projection(projection, monkeypatch):
    """Draws included: the same optimizer with stacking switched off."""
    shape = (12, 20)

    def once():
        params = [weight(shape, k) for k in range(3)]
        settings = {"lr": 0.02, "rank": 4, "update_proj_gap": 2, "moments": "rotate"}
        optimizer = GaLore(params, projection=projection, **settings)
        run(optimizer, params, [gradients(shape, 5, k) for k in range(3)])
        return [p.detach() for p in params], tensors(optimizer)

    stacked = once()
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    assert same(stacked, once())


@pytest.mark.parametrize("projection", ["random", "randk", "range"])
def test_seed_and_position_decide_the_draws(projection):
    def bases(seed):
        params = [weight(WIDE, 0), weight(WIDE, 0)]
        optimizer = GaLore(params, rank=3, projection=projection, update_proj_gap=1, seed=seed)
        out = []
        for _ in range(2):
            run(optimizer, params, [gradients(WIDE, 1)] * 2)
            out += [next(iter(optimizer.state[p].values())) for p in params]
            key = "index" if projection == "randk" else "basis"
            out[-2:] = [optimizer.state[p][key].clone() for p in params]
        return out

    first, again, other = bases(0), bases(0), bases(1)
    assert same(first, again)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("moments", ["rotate", "match", "ldadam"])
def test_policies_agree_where_indices_move(moments):
    settings = {"lr": 0.02, "rank": 4, "update_proj_gap": 2, "projection": "topk"}
    make = lambda policy: lambda ps: GaLore(ps, moments=policy, **settings)  # noqa: E731
    assert same(trajectory(make(moments), WIDE, 9), trajectory(make("match"), WIDE, 9))
    assert not same(trajectory(make("keep"), WIDE, 9), trajectory(make("match"), WIDE, 9))


@pytest.mark.parametrize("projection", ["randk", "topk"])
def test_rows_not_chosen_stay_bitwise(projection):
    p, G = weight(WIDE), gradients(WIDE, 1)[0]
    before, p.grad = p.detach().clone(), G
    optimizer = GaLore([p], lr=0.1, rank=3, projection=projection)
    optimizer.step()
    moved = (p.detach() != before).any(1).nonzero().flatten()
    assert moved.tolist() == optimizer.state[p]["index"].tolist()


@projections
@pytest.mark.parametrize(
    "shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN, (1, 1), (3, 6, 5), (4, 3, 2, 2)]
)
def test_no_shape_rank_or_zero_gradient_crashes_any_projection(projection, shape):
    p, v = weight(shape), weight((4,))
    optimizer = GaLore(
        [p, v], lr=0.02, rank=50, update_proj_gap=2, projection=projection, moments="ldadam"
    )
    grads = [torch.zeros(shape), *gradients(shape, 3), torch.zeros(shape)]
    run(optimizer, [p, v], [grads, [torch.ones(4)] * 5])
    assert p.isfinite().all() and v.isfinite().all()


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"projection": "dct", "proj_type": "full"}, "no second side"),
        ({"projection": "range:a"}, "projection 'range:a'"),
        ({"projection": "svd", "moments": "match"}, "use moments='rotate'"),
        ({"projection": "randk", "compat": "reference"}, "exact SVD"),
        ({"seed": -1}, "seed must be an int"),
        ({"seed": 0.5}, "seed must be an int"),
    ],
)
def test_settings_that_do_not_fit_together(bad, text):
    with pytest.raises(ValueError, match=text):
        GaLore([weight(WIDE)], **bad)


def test_reference_vectors_step_once_when_their_clocks_differ():
    """A vector that missed a gradient, beside one that did not."""
    W, a, b = (
        weight(SQUARE, 0),
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(3)),
    )
    optimizer = GaLore([W, a, b], lr=0.1, compat="reference", rank=2)
    a.grad = torch.ones(3)
    optimizer.step()
    b.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.state[b]["step"]) == 1 and float(optimizer.state[a]["step"]) == 2
    torch.testing.assert_close(b.detach(), torch.full((3,), 0.9), rtol=0, atol=1e-5)
