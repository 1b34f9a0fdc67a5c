"""ARO: recorded steps, the special cases, equivariance, the rotation that is kept."""

import json

import pytest
import torch
from helpers.allocations import count_second_step
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.problems import gradients, run, same, tensors, weight
from helpers.shapes import COLUMN, ODD, ROW, SHAPES, SQUARE, TALL, WIDE
from oracles import aro as oracle

from stiefel.kernels import (
    cholesky_qr,
    eigenbasis,
    equal_rows,
    householder_qr,
    left_basis,
    nearest_rotation,
    polar_factor,
    rotated,
    sinkhorn,
)
from stiefel.optimizers import ARO
from stiefel.optimizers import aro as frames
from stiefel.optimizers._driver import units

DOUBLE = torch.float64
BASES = ("sinkhorn", "row_norm", "sign", "adam")
MAPS = {"sinkhorn": sinkhorn, "row_norm": equal_rows, "sign": torch.sign}


def gaussian(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def doubles(shape, steps, seed=0):
    return [
        G.double() + 1e-3 * gaussian(*shape, seed=i)
        for i, G in enumerate(gradients(shape, steps, seed))
    ]


def orthogonal(m, seed=0):
    return torch.linalg.qr(gaussian(m, m, seed=seed))[0]


def defect(R):
    return float((R.mT @ R - torch.eye(R.shape[-1], dtype=R.dtype)).abs().max())


def conditioned(m, condition, seed=0):
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), m, dtype=DOUBLE)
    return (orthogonal(m, seed) * s) @ orthogonal(m, seed + 1)


def recorded(kind):
    return json.loads((FIXTURES / f"aro_dion_{kind}_reference.json").read_text())


def cases(kind):
    data = recorded(kind)
    return [
        pytest.param(data, case, id=f"{case['input']}-{case['settings']['base_opt']}-{i}")
        for i, case in enumerate(data["cases"])
        if "second_parameter" not in case
    ]


def replay(data, case, dtype):
    settings, given = case["settings"], data["inputs"][case["input"]]
    p = torch.nn.Parameter(torch.tensor(given["W0"], dtype=dtype))
    optimizer = ARO(
        [p],
        lr=settings["lr"],
        momentum=settings["mu"],
        weight_decay=settings["weight_decay"],
        base=settings["base_opt"],
        side="rows",
        rms_target=None,
        adjust_lr_fn="match_rms_adamw" if settings["adjust_lr"] == "rms_norm" else None,
    )
    for G in given["G"]:
        p.grad = torch.tensor(G, dtype=dtype)
        optimizer.step()
        yield p.detach().clone(), optimizer.state[p]["rotation"].clone()


# Recorded steps


@pytest.mark.parametrize("data, case", cases("householder"))
def test_recorded_steps_householder(data, case):
    usable = case["usable_steps"]
    if usable == 0:
        pytest.skip("recorded as arbitrary: rank-deficient from the first step")
    steps = case["promoted"]["steps"][:usable]
    for (W, R), want in zip(replay(data, case, DOUBLE), steps, strict=False):
        torch.testing.assert_close(W, torch.tensor(want["W"], dtype=DOUBLE), rtol=0, atol=1e-9)
        old = torch.tensor(want["R"], dtype=DOUBLE)
        torch.testing.assert_close(R * torch.sign((R * old).sum(0)), old, rtol=0, atol=1e-8)
    shipped = case.get("shipped_float32", {"steps": []})["steps"]
    for (W, _), want in zip(replay(data, case, torch.float32), shipped, strict=False):
        torch.testing.assert_close(W, torch.tensor(want["W"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("data, case", cases("scqr"))
def test_recorded_steps_of_one_shifted_pass(data, case, monkeypatch):
    """With the published factorisation in place of ours, the rest of the method is the same."""
    usable = case["usable_steps"]
    monkeypatch.setattr(frames, "rotated", lambda A, old, **options: cholesky_qr(A, passes=1)[0])
    for (W, R), want in zip(
        replay(data, case, DOUBLE), case["promoted"]["steps"][:usable], strict=False
    ):
        torch.testing.assert_close(W, torch.tensor(want["W"], dtype=DOUBLE), rtol=0, atol=1e-9)
        torch.testing.assert_close(R, torch.tensor(want["R"], dtype=DOUBLE), rtol=0, atol=1e-8)


def test_recorded_steps_of_two_parameters():
    """Reflections do not mix the matrices of a stack; published Cholesky steps share a shift."""
    data = recorded("householder")
    (case,) = (case for case in data["cases"] if "second_parameter" in case)
    given = data["inputs"][case["input"]]
    Gs = torch.tensor(given["G"], dtype=DOUBLE)
    params = [torch.nn.Parameter(torch.tensor(given["W0"], dtype=DOUBLE)) for _ in range(2)]
    optimizer = ARO(
        params, lr=0.01, weight_decay=0.01, base="row_norm", side="rows", rms_target=None
    )
    got = run(optimizer, params, [list(Gs), list(0.01 * Gs.flip(0))])
    for Ws, want in zip(got, case["promoted"]["steps"], strict=False):
        for W, recorded_step in zip(Ws, want, strict=True):
            V = torch.tensor(recorded_step["W"], dtype=DOUBLE)
            torch.testing.assert_close(W, V, rtol=0, atol=1e-9)


# The oracle


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [WIDE, SQUARE, (6, 40)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"nesterov": True}, {"rotation": "polar"}, {"rotation_every": 3}, {"rotation": "none"}],
)
def test_steps_are_the_oracles(base, shape, settings):
    if base == "sign" and settings.get("rotation", "qr") == "qr" and shape == SQUARE:
        pytest.skip("equal sign rows make A singular, where the factor is a choice")
    p, grads = weight(shape, dtype=DOUBLE), [gaussian(*shape, seed=i) for i in range(6)]
    if base != "sign":
        grads = doubles(shape, 6)
    names = {"rotation_every": "every"}
    want = oracle.aro(
        p.detach(),
        grads,
        0.02,
        0.9,
        0.1,
        base,
        **{names.get(key, key): value for key, value in settings.items()},
    )
    optimizer = ARO([p], lr=0.02, momentum=0.9, base=base, side="rows", **settings)
    for W, (V, _) in zip(run(optimizer, [p], [grads]), want, strict=True):
        torch.testing.assert_close(W[0], V, rtol=0, atol=1e-7 if base == "adam" else 1e-9)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN, (1, 1)])
def test_maps_are_the_oracles(shape):
    X = gaussian(3, *shape)
    for k in range(3):
        torch.testing.assert_close(sinkhorn(X)[k], oracle.sinkhorn(X[k]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(equal_rows(X)[k], oracle.row_norm(X[k]), rtol=1e-12, atol=1e-12)
        A = gaussian(3, 5, 5)
        Q = oracle.gram_schmidt(A[k])
        torch.testing.assert_close(householder_qr(A)[k], Q, rtol=0, atol=1e-11)


# Special cases


def test_special_case_rotation_none_is_the_base_map():
    for base in MAPS:
        p, grads = weight(WIDE, dtype=DOUBLE), doubles(WIDE, 5)
        W, M = p.detach().clone(), torch.zeros(WIDE, dtype=DOUBLE)
        optimizer = ARO([p], lr=0.1, base=base, rotation="none", rms_target=None, weight_decay=0.0)
        for G, step in zip(grads, run(optimizer, [p], [grads]), strict=True):
            M = 0.95 * M + 0.05 * G
            W = W - 0.1 * MAPS[base](M[None])[0]
            torch.testing.assert_close(step[0], W, rtol=0, atol=1e-12)
        assert "rotation" not in optimizer.state[p]


def test_special_case_eigenbasis_with_adam_is_one_sided_soap():
    """Without momentum; else V averages the square of the turned momentum, not of the gradient."""
    p, grads = weight(WIDE, dtype=DOUBLE), doubles(WIDE, 8)
    want = oracle.one_sided_soap(p.detach(), grads, 0.01, 0.9, 0.95)
    optimizer = ARO(
        [p],
        lr=0.01,
        momentum=0.0,
        weight_decay=0.0,
        base="adam",
        rotation="eigh",
        gram_beta=0.9,
        rms_target=None,
    )
    for W, V in zip(run(optimizer, [p], [grads]), want, strict=True):
        torch.testing.assert_close(W[0], V, rtol=0, atol=1e-8)


def test_special_case_eigenbasis_with_row_norm_is_muon():
    """Left singular vectors and rows of equal norm give U V^T, times sqrt(n)."""
    p, G = weight(WIDE, dtype=DOUBLE), gaussian(*WIDE)
    start = p.detach().clone()
    settings = {"momentum": 0.0, "weight_decay": 0.0, "rms_target": None}
    run(ARO([p], lr=1.0, base="row_norm", rotation="eigh", **settings), [p], [[G]])
    want = WIDE[1] ** 0.5 * polar_factor(G, "svd")
    torch.testing.assert_close(start - p.detach(), want, rtol=0, atol=1e-9)


# What the rotation and its steps must satisfy


@pytest.mark.parametrize("base", ["sign", "row_norm", "sinkhorn"])
def test_polar_never_lowers_the_objective(base):
    """For sign and row_norm by the proof; sinkhorn is no exact dual map, so only measured."""
    f = MAPS[base]
    ups = downs = 0
    for seed in range(8):
        M, R = gaussian(1, 12, 20, seed=seed), torch.eye(12, dtype=DOUBLE)[None]
        Q = R
        J = K = oracle.objective(M[0], R[0], lambda X: f(X[None])[0])
        for _ in range(40):
            R = nearest_rotation(M @ f(R.mT @ M).mT, R)
            new = oracle.objective(M[0], R[0], lambda X: f(X[None])[0])
            assert new >= J * (1 - 1e-12)
            J = new
            Q = rotated(M @ f(Q.mT @ M).mT, Q)
            new = oracle.objective(M[0], Q[0], lambda X: f(X[None])[0])
            ups, downs, K = ups + (new > K), downs + (new < K * (1 - 1e-9)), new
    assert downs > 0 and ups > 0  # QR is no ascent, and no descent


def test_row_norm_with_qr_becomes_muon_on_a_steady_gradient():
    U, _, Vh = torch.linalg.svd(gaussian(8, 14), full_matrices=False)
    M = (U * 0.6 ** torch.arange(8)) @ Vh
    p = torch.nn.Parameter(torch.zeros(8, 14, dtype=DOUBLE))
    optimizer = ARO([p], lr=1.0, momentum=0.0, weight_decay=0.0, base="row_norm", rms_target=None)
    steps = [torch.zeros(8, 14, dtype=DOUBLE), *(W[0] for W in run(optimizer, [p], [[M] * 200]))]
    first, last = steps[0] - steps[1], steps[-2] - steps[-1]
    want = 14**0.5 * (U @ Vh)
    assert float((first - want).abs().max()) > 0.1
    torch.testing.assert_close(last, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rotation", ["qr", "polar"])
def test_a_turned_problem_takes_turned_steps(base, rotation):
    """If the first R is turned along, or is taken from the first M; from the identity not."""
    Q, grads = orthogonal(10), doubles(WIDE, 5)

    def steps(turn, **settings):
        p = torch.nn.Parameter(torch.zeros(WIDE, dtype=DOUBLE))
        optimizer = ARO([p], lr=0.1, base=base, rotation=rotation, weight_decay=0.0, **settings)
        optimizer.init_state()
        if "init" not in settings:
            optimizer.state[p]["rotation"].copy_(turn if known else torch.eye(10))
        series = [turn @ G for G in grads]
        return [turn.mT @ W[0] for W in run(optimizer, [p], [series])]

    eye = torch.eye(10, dtype=DOUBLE)
    known = True
    for a, b in zip(steps(eye), steps(Q), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    for a, b in zip(steps(eye, init="svd"), steps(Q, init="svd"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    known = False
    assert float((steps(eye)[0] - steps(Q)[0]).norm()) > 0.05 * float(steps(eye)[0].norm())


@pytest.mark.parametrize("base", BASES)
def test_signs_of_the_columns_do_not_matter(base):
    def steps(signs):
        p = torch.nn.Parameter(torch.zeros(WIDE, dtype=DOUBLE))
        optimizer = ARO([p], lr=0.1, base=base, weight_decay=0.0)
        optimizer.init_state()
        optimizer.state[p]["rotation"].copy_(torch.diag(signs))
        return [W[0] for W in run(optimizer, [p], [doubles(WIDE, 5)])]

    signs = torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(5)
    for a, b in zip(steps(signs), steps(signs.abs()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_cholesky_qr_by_condition(condition):
    """One pass is far from orthogonal, two are good to 1e4; what we hand out always is."""
    A = torch.stack([conditioned(32, condition, seed) for seed in (0, 7)]).float()
    old = torch.stack([orthogonal(32, 3), orthogonal(32, 4)]).float()
    one, _ = cholesky_qr(A, passes=1)
    two, fine = cholesky_qr(A)
    assert all(defect(Q) > 1e-4 for Q in one) or condition < 1e2
    if condition <= 1e4:
        assert bool(fine.all()) and max(map(defect, two)) < 1e-5
        torch.testing.assert_close(two, householder_qr(A), rtol=0, atol=2e-7 * condition)
    for Q in (
        *rotated(A, old),
        *rotated(A, old, cholesky=True),
        *rotated(A, old, cholesky=True, wait=False),
    ):
        assert defect(Q) < 1e-3
    for Q in rotated(A, old):
        assert defect(Q) < 1e-5


def test_flags_and_the_shift_are_of_each_matrix():
    A = torch.stack(
        [
            torch.zeros(8, 8),
            1e-12 * conditioned(8, 10.0).float(),
            conditioned(8, 10.0).float(),
            torch.full((8, 8), torch.nan),
        ]
    )
    Q, fine = cholesky_qr(A)
    assert fine.flatten().tolist() == [False, True, True, False]
    torch.testing.assert_close(Q[1], Q[2], rtol=0, atol=1e-5)
    old = torch.stack([orthogonal(8, k) for k in range(3)]).float()
    singular = torch.stack([A[0], torch.ones(8, 8), A[2]])
    for options in ({}, {"cholesky": True}, {"cholesky": True, "wait": False}):
        R = rotated(singular, old, **options)
        assert max(map(defect, R)) < 1e-3 and torch.equal(R[0], old[0])


def test_the_right_side_is_solved():
    """A L^-1 with A^T A = L L^T is not orthogonal; A L^-T is."""
    A = conditioned(32, 10.0)[None]
    L = torch.linalg.cholesky(A.mT @ A)
    wrong = torch.linalg.solve_triangular(L, A, upper=False, left=False)
    assert defect(wrong[0]) > 1.0
    assert defect(cholesky_qr(A)[0][0]) < 1e-12


@pytest.mark.parametrize("rotation", ["qr", "polar", "eigh"])
@pytest.mark.parametrize("base", BASES)
def test_more_rows_than_columns_keep_a_rotation(rotation, base):
    p = weight(TALL)
    optimizer = ARO([p], lr=0.02, base=base, rotation=rotation, side="rows")
    run(optimizer, [p], [gradients(TALL, 5)])
    R = optimizer.state[p]["rotation"]
    assert R.shape == (24, 24) and defect(R) < 1e-5 and p.isfinite().all()


def test_what_a_leaves_open_stays_the_old_direction():
    A, old = gaussian(12, 12)[None], orthogonal(12, 3)[None]
    A[..., 5:] = 0.0
    R = rotated(A, old)
    assert defect(R[0]) < 1e-12
    torch.testing.assert_close(rotated(A, R), R, rtol=0, atol=1e-9)
    noisy = A + (gaussian(12, 5, seed=1) @ gaussian(5, 12, seed=2))[None]  # rank 10, up to rounding
    R = rotated(noisy, old)
    assert defect(R[0]) < 1e-12
    torch.testing.assert_close(rotated(noisy, R)[..., :10], R[..., :10], rtol=0, atol=1e-9)


@pytest.mark.parametrize("rotation", ["qr", "polar", "eigh"])
@pytest.mark.parametrize("base", BASES)
def test_a_zero_gradient_keeps_the_rotation_and_moves_nothing(rotation, base):
    p = weight(WIDE)
    start = p.detach().clone()
    optimizer = ARO([p], base=base, rotation=rotation, weight_decay=0.0)
    run(optimizer, [p], [[torch.zeros(WIDE)] * 2])
    assert torch.equal(p.detach(), start)
    assert torch.equal(optimizer.state[p]["rotation"], torch.eye(10))
    optimizer = ARO([p], base=base, rotation=rotation, momentum=0.0)
    run(optimizer, [p], [[gradients(WIDE, 1)[0]]])
    before = optimizer.state[p]["rotation"].clone()
    run(optimizer, [p], [[torch.zeros(WIDE)]])
    assert defect(before) < 1e-5
    assert torch.equal(optimizer.state[p]["rotation"], before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [COLUMN, ROW, (1, 1)])
def test_vectors_move_by_the_target(base, shape):
    for side in ("auto", "rows", "cols"):
        p = torch.nn.Parameter(torch.zeros(shape))
        run(ARO([p], lr=1.0, base=base, side=side), [p], [gradients(shape, 1)])
        assert abs(float(p.detach().square().mean().sqrt()) - 0.2) < 1e-4


@pytest.mark.parametrize("base", BASES)
def test_bfloat16_weights(base):
    p, q = weight(WIDE, dtype=torch.bfloat16), weight(WIDE, dtype=torch.bfloat16)
    q = torch.nn.Parameter(q.detach().float())
    grads = [G.bfloat16() for G in gradients(WIDE, 4)]
    a = run(ARO([p], lr=0.02, base=base), [p], [grads])
    b = run(ARO([q], lr=0.02, base=base), [q], [grads])
    torch.testing.assert_close(a[-1][0].float(), b[-1][0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base": "adam", "rotation_every": 3},
        {"rotation": "eigh", "gram_beta": 0.9},
        {"rotation_sharing": "chain", "layer": 2},
    ],
)
def test_checkpoints_keep_the_rotation_in_float32(stop, dtype, settings):
    def make():
        params = [weight(TALL, 0, dtype), weight(WIDE, 1, dtype)]
        return params, ARO(params, lr=0.02, **settings)

    def loaded(optimizer, params):
        assert optimizer.state[params[0]]["rotation"].dtype == torch.float32

    check_resume(make, [gradients(TALL, 7, 0), gradients(WIDE, 7, 1)], stop, loaded=loaded)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sinkhorn_has_exact_columns(shape, scale):
    X = scale * gaussian(2, *shape, dtype=torch.float32)
    F = sinkhorn(X)
    torch.testing.assert_close(F.square().sum(-2), torch.full((2, shape[1]), float(shape[0])))
    if shape in (WIDE, SQUARE, TALL):
        rows = sinkhorn(X, 30).square().sum(-1)
        torch.testing.assert_close(
            rows, torch.full((2, shape[0]), float(shape[1])), rtol=0.05, atol=0
        )


def test_sinkhorn_takes_rows_and_columns_in_turn():
    """Both at once would swap a diagonal matrix with its inverse."""
    X = torch.diag(torch.tensor([4.0, 1.0, 0.25]))[None]
    torch.testing.assert_close(sinkhorn(X), 3**0.5 * torch.eye(3)[None])
    X = gaussian(1, 5, 7, dtype=torch.float32)
    X[:, 2], X[..., 3] = 0.0, 0.0
    F = sinkhorn(X)
    assert not F[:, 2].any() and not F[..., 3].any() and F.isfinite().all()
    assert not sinkhorn(torch.zeros(2, 3, 4)).any()


# Sharing, sides, state


def test_a_chain_has_one_rotation_by_the_sum_of_its_alignments():
    shapes = [(8, 8), (20, 8), (8, 20)]
    params = [weight(shape, k, DOUBLE) for k, shape in enumerate(shapes)]
    grads = [doubles(shape, 3, k) for k, shape in enumerate(shapes)]
    Ws, R = [p.detach().clone() for p in params], torch.eye(8, dtype=DOUBLE)
    optimizer = ARO(
        params, lr=0.1, momentum=0.0, weight_decay=0.0, rotation_sharing="chain", layer=3
    )
    for step, got in enumerate(run(optimizer, params, grads)):
        Gs = [series[step] for series in grads]
        Gs[1] = Gs[1].mT
        R = oracle.gram_schmidt(sum(G @ oracle.sinkhorn(R.mT @ G).mT for G in Gs))
        Ds = [0.2 * R @ oracle.sinkhorn(R.mT @ G) for G in Gs]
        Ds[1] = Ds[1].mT
        Ws = [W - 0.1 * D for W, D in zip(Ws, Ds, strict=True)]
        for W, V in zip(got, Ws, strict=True):
            torch.testing.assert_close(W, V, rtol=0, atol=1e-9)
    assert [("rotation" in optimizer.state[p]) for p in params] == [True, False, False]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_member_without_gradient_sits_out(missing):
    params = [weight((8, 12), 0, DOUBLE), weight((8, 20), 1, DOUBLE)]
    other = 1 - missing
    grads = [doubles((8, 12), 4, 0), doubles((8, 20), 4, 1)]
    grads[missing] = [None] * 4
    start = params[missing].detach().clone()
    q = torch.nn.Parameter(params[other].detach().clone())
    run(ARO(params, lr=0.1, rotation_sharing="chain", layer=2), params, grads)
    run(ARO([q], lr=0.1), [q], [grads[other]])
    assert torch.equal(params[missing].detach(), start)
    torch.testing.assert_close(params[other].detach(), q.detach(), rtol=0, atol=1e-12)


def test_chains_and_groups_of_one_are_single_weights_and_global_is_one_chain():
    def end(**settings):
        params = [weight((8, 12), 0), weight((8, 20), 1)]
        optimizer = ARO(params, lr=0.1, **settings)
        run(optimizer, params, [gradients((8, 12), 4, 0), gradients((8, 20), 4, 1)])
        return [p.detach() for p in params]

    assert same(end(), end(rotation_sharing="chain"))
    assert same(end(rotation_sharing="global"), end(rotation_sharing="chain", layer=2))
    assert not same(end(), end(rotation_sharing="global"))


def test_vectors_beside_shared_rotations_go_to_adamw():
    params = [weight((8, 12), 0), weight((5,), 1), weight((8, 20), 2)]
    optimizer = ARO(params, rotation_sharing="global")
    grads = [gradients((8, 12), 2), [torch.ones(5)] * 2, gradients((8, 20), 2)]
    run(optimizer, params, grads)
    assert [row.rule for row in optimizer.assignment()] == ["ARO", "adamw", "ARO"]
    assert optimizer.state[params[0]]["rotation"].shape == (8, 8)
    assert "rotation" not in optimizer.state[params[2]]


@pytest.mark.parametrize("side, m", [("auto", 10), ("rows", 24), ("cols", 10)])
def test_the_side_that_is_rotated(side, m):
    p, q = weight(TALL, dtype=DOUBLE), None
    q = torch.nn.Parameter(p.detach().mT.contiguous())
    grads = doubles(TALL, 4)
    turn = {"auto": "auto", "rows": "cols", "cols": "rows"}[side]
    optimizer = ARO([p], lr=0.1, side=side)
    run(optimizer, [p], [grads])
    run(ARO([{"params": [q], "side": turn}], lr=0.1), [q], [[G.mT for G in grads]])
    assert optimizer.state[p]["rotation"].shape == (m, m)
    # 24 directions from 10 columns: the rest is open, up to rounding
    atol = 5e-3 if m == 24 else 1e-9
    torch.testing.assert_close(p.detach(), q.detach().mT, rtol=0, atol=atol)


def test_sides_of_a_chain_may_be_given_one_by_one():
    params = [weight((8, 8), 0), weight((8, 8), 1)]
    optimizer = ARO(params, rotation_sharing="chain", layer=2, side=["cols", "rows"])
    unit = optimizer._get_plan().units[0]
    assert unit.transposed == (True, False)


@pytest.mark.parametrize(
    "shapes, settings, text",
    [
        (
            [(8, 8)] * 2,
            {"rotation_sharing": "chain", "layer": 2, "side": ["cols"]},
            "side has 1 en",
        ),
        ([(3, 4), (5, 6)], {"rotation_sharing": "global"}, "share no side"),
        ([(3, 4), (5, 6)], {"rotation_sharing": "global", "side": "rows"}, "cannot turn sides"),
        ([(3, 4)], {"rotation_sharing": "chain", "layer": 2}, "in runs of 2"),
        ([(8, 16), (8, 16), (4, 8, 16)], {"rotation_sharing": "global"}, r"stacks of \[1, 1, 4\]"),
    ],
)
def test_weights_that_cannot_share_a_rotation_are_refused_at_once(shapes, settings, text):
    params = [weight(shape, k) for k, shape in enumerate(shapes)]
    with pytest.raises(ValueError, match=text) as caught:
        ARO(params, **settings)
    assert "\n" not in str(caught.value)
    optimizer = ARO([weight(SQUARE)])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": params, **settings})
    assert len(optimizer.param_groups) == 1
    run(optimizer, optimizer.param_groups[0]["params"], [gradients(SQUARE, 1)])


@pytest.mark.parametrize("missing", [None, 0, 1])
def test_a_view_that_makes_stacks_differ_changes_nothing_of_the_unit(missing):
    params = [weight((4, 8, 16), 0), weight((4, 128), 1)]
    optimizer = ARO(params, rotation_sharing="global", view="flatten", side="rows")
    optimizer.param_groups[0]["view"] = "auto"
    optimizer.param_groups[0]["side"] = ["rows", "cols"]
    params[1].data = params[1].data[:, :8].clone()  # both sides are 8 now, in stacks of 4 and 1
    before = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = None if i == missing else torch.ones_like(p)
    with pytest.raises(ValueError, match=r"stacks of \[4, 1\]"):
        optimizer.step()
    assert same(before, [p.detach() for p in params])
    assert not any(optimizer.state[p]["momentum_buffer"].any() for p in params)


def test_a_weight_without_a_rotation_shares_none():
    for settings in (
        {"init": "svd"},
        {"rotation_sharing": "global"},
        {"rotation_sharing": "chain", "layer": 2},
    ):
        with pytest.raises(ValueError, match="rotation='none' has no rotation"):
            ARO([weight(SQUARE), weight(SQUARE)], rotation="none", **settings)
    with pytest.raises(ValueError, match="rotation_every must be an int of at least 1, got True"):
        ARO([weight(SQUARE)], rotation_every=True)


# Gradients at the end of the range


@pytest.mark.parametrize("wait", [None, False])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rotation", ["qr", "polar", "eigh", "none"])
def test_a_huge_finite_gradient_gives_a_step_of_the_usual_size(rotation, base, wait):
    draw = gaussian(16, 16, dtype=torch.float32).clamp(-3, 3)
    huge = [1e20 * draw, 1e21 * draw, 1e30 * draw, 1e38 * draw, torch.full((16, 16), 3e38)]
    for G in [*huge, 1e38 * draw[:, :8], 1e38 * draw[:8]]:
        p = torch.nn.Parameter(torch.zeros(G.shape))
        optimizer = ARO([p], lr=1.0, weight_decay=0.0, base=base, rotation=rotation)
        optimizer._wait = wait
        before = p.detach().clone()
        for grad in [G, *gradients(tuple(G.shape), 5)]:
            run(optimizer, [p], [[grad]])
            step, before = p.detach() - before, p.detach().clone()
            assert abs(float(step.square().mean().sqrt()) - 0.2) < 1e-4
        state = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        assert all(x.isfinite().all() for x in state) and optimizer.skipped == {}
        assert rotation == "none" or defect(optimizer.state[p]["rotation"]) < 1e-4


@pytest.mark.parametrize("size", [2.0**-90, 2.0**60, 2.0**90, 2.0**124])
@pytest.mark.parametrize("base", MAPS)
@pytest.mark.parametrize("rotation", ["qr", "polar", "eigh"])
def test_steps_do_not_know_the_scale_of_the_gradient(rotation, base, size):
    """Bit for bit, since a power of two rounds nothing."""

    def end(scale):
        p = torch.nn.Parameter(torch.zeros(WIDE))
        grads = [scale * G.clamp(-3, 3) for G in gradients(WIDE, 4)]
        return run(ARO([p], base=base, rotation=rotation), [p], [grads])

    assert same(end(1.0), end(size))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_adams_moments_survive_a_huge_gradient_in_every_dtype(dtype):
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = ARO([p], lr=1.0, weight_decay=0.0, base="adam", momentum=0.0, state_dtype=dtype)
    run(optimizer, [p], [[torch.full((64, 64), 1e30)]])
    before = p.detach().clone()
    for G in gradients((64, 64), 3):
        run(optimizer, [p], [[G]])
    assert p.isfinite().all()
    assert float((p.detach() - before).square().mean().sqrt()) > 0.2
    V = optimizer.state[p]["exp_avg_sq"]
    assert not V.is_floating_point() or V.isfinite().all()


def test_an_averaged_gram_matrix_leaves_out_what_overflows():
    p = weight(WIDE)
    optimizer = ARO([p], rotation="eigh", gram_beta=0.9)
    run(optimizer, [p], [gradients(WIDE, 2)])
    gram = optimizer.state[p]["gram"].clone()
    for size in (1e20, 1e38):
        run(optimizer, [p], [[size * gradients(WIDE, 1)[0].clamp(-3, 3)]])
        assert torch.equal(optimizer.state[p]["gram"], gram)
    run(optimizer, [p], [gradients(WIDE, 2)])
    assert p.isfinite().all() and not torch.equal(optimizer.state[p]["gram"], gram)


def test_a_chain_of_huge_and_tiny_gradients_moves_both():
    params = [torch.nn.Parameter(torch.zeros(8, 12)) for _ in range(2)]
    optimizer = ARO(params, lr=1.0, weight_decay=0.0, rotation_sharing="global")
    G = gradients((8, 12), 1)[0]
    run(optimizer, params, [[1e30 * G], [1e-12 * G]])
    for p in params:
        assert abs(float(p.detach().square().mean().sqrt()) - 0.2) < 1e-4


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_matrix_that_is_not_finite_keeps_the_old_factor(bad):
    A = gaussian(3, 6, 6, dtype=torch.float32)
    old = torch.stack([orthogonal(6, k) for k in range(3)]).float()
    A = A + A.mT
    spoiled = A.clone()
    spoiled[1, 2, 3] = bad
    ways = (
        rotated, nearest_rotation, eigenbasis, lambda S, R: rotated(S, R, cholesky=True),
        lambda S, R: rotated(S, R, cholesky=True, wait=False),
    )  # fmt: skip
    for way in ways:
        R, want = way(spoiled, old), way(A, old)
        assert torch.equal(R[1], old[1])
        assert torch.equal(R[0], want[0]) and torch.equal(R[2], want[2])


def test_the_sharing_of_a_group_cannot_change_in_mid_run():
    params = [weight((8, 12), 0), weight((8, 20), 1)]
    optimizer = ARO(params, rotation_sharing="chain", layer=2)
    grads = [gradients((8, 12), 1), gradients((8, 20), 1)]
    run(optimizer, params, grads)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0].update(rotation_sharing="per_param", layer=1)
    with pytest.raises(ValueError, match="rotation_sharing='per_param', layer=1 in parameter gro"):
        run(optimizer, params, grads)
    assert same(before, [p.detach() for p in params])
    optimizer.param_groups[0].update(rotation_sharing="chain", layer=2)
    run(optimizer, params, grads)
    assert not same(before, [p.detach() for p in params])


def test_lr_is_the_only_positional_option():
    with pytest.raises(TypeError, match="positional"):
        ARO([weight(TALL)], 1e-3, 0.9)


@pytest.mark.parametrize(
    "shape, side",
    [(SQUARE, "auto"), (TALL, "auto"), (WIDE, "auto"), (TALL, "rows"), ((3, 6, 10), "auto")],
)
@pytest.mark.parametrize(
    "form", [{}, {"base": "adam"}, {"rotation": "none"}, {"rotation": "eigh", "gram_beta": 0.9}]
)
def test_state_bytes_are_the_formula(shape, side, form):
    p = weight(shape)
    optimizer = ARO([p], side=side, **form)
    run(optimizer, [p], [gradients(shape, 1)])
    held = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    m = shape[-2] if side == "rows" else min(shape[-2:])
    square = p.numel() // (shape[-1] * shape[-2]) * m * m
    want = p.numel() * (2 if "base" in form else 1)
    want += {"none": 0, "eigh": 2 * square}.get(form.get("rotation"), square)
    assert sum(x.untyped_storage().nbytes() for x in held) == 4 * want


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rotation", ["qr", "polar", "eigh", "none"])
def test_the_update_has_the_rms_asked_for(base, rotation):
    for target in (0.2, 1.0):
        p = torch.nn.Parameter(torch.zeros(WIDE))
        run(
            ARO([p], lr=1.0, base=base, rotation=rotation, rms_target=target),
            [p],
            [gradients(WIDE, 1)],
        )
        assert abs(float(p.detach().square().mean().sqrt()) / target - 1) < 1e-4


@pytest.mark.parametrize("shape", [(12, 20), ODD, (5, 17), COLUMN])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"base": "row_norm", "rotation": "polar"},
        {"base": "adam", "rotation": "eigh"},
        {"base": "sign", "rotation_every": 2},
        {"rotation": "none", "nesterov": True},
    ],
)
def test_views_equal_the_stack(shape, dtype, form, monkeypatch):
    def once():
        params = [weight(shape, k, dtype) for k in range(3)]
        optimizer = ARO(params, lr=0.02, **form)
        run(optimizer, params, [gradients(shape, 4, k) for k in range(3)])
        return [p.detach() for p in params], tensors(optimizer)

    stacked = once()
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    assert same(stacked, once())


def test_a_rotation_is_kept_between_its_updates():
    p = weight(WIDE)
    optimizer = ARO([p], rotation_every=3)
    seen = []
    for G in gradients(WIDE, 7):
        run(optimizer, [p], [[G]])
        seen.append(optimizer.state[p]["rotation"].clone())
    moved = [not torch.equal(a, b) for a, b in zip([torch.eye(10), *seen], seen, strict=False)]
    assert moved == [True, False, False] * 2 + [True]


def test_bases_by_svd_and_eigenvectors():
    X = gaussian(2, 6, 4)
    U = left_basis(X)
    assert U.shape == (2, 6, 6) and max(map(defect, U)) < 1e-12
    V = eigenbasis(X @ X.mT, U)
    D = V.mT @ X @ X.mT @ V
    torch.testing.assert_close(
        D, torch.diag_embed(D.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-12
    )
    assert (D.diagonal(dim1=-2, dim2=-1).diff() <= 1e-12).all()


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (512, 512)])
def test_temporaries_of_a_step(shape):
    params = [weight(shape, k) for k in range(2)]
    optimizer = ARO(params)
    counter = count_second_step(optimizer, lambda p, seed: gradients(p.shape, 1, seed)[0])
    assert counter.peak <= 4 * (2 * shape[0] * shape[1] + 3 * min(shape) ** 2 + 8 * min(shape))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rotation", ["qr", "polar", "eigh", "none"])
def test_training_reaches_a_target(base, rotation):
    target = gaussian(16, 24, dtype=torch.float32)
    p = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = ARO([p], lr=0.2, weight_decay=0.0, base=base, rotation=rotation)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 200)
    for _ in range(200):
        p.grad = p.detach() - target
        optimizer.step()
        schedule.step()
    assert float((p.detach() - target).square().mean()) < 0.01


def test_the_rotation_stays_float32_in_narrow_state():
    p = weight(WIDE)
    optimizer = ARO([p], state_dtype="bfloat16")
    run(optimizer, [p], [gradients(WIDE, 2)])
    state = optimizer.state[p]
    assert state["rotation"].dtype == torch.float32
    assert state["momentum_buffer"].dtype == torch.bfloat16


@pytest.mark.parametrize("m", [7, 32, 64])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 1e4, 1e5])
def test_a_rotation_is_as_accurate_as_plain_qr(condition, m):
    """In float32, where the matrix is not singular: the old factor leaves no trace."""
    A = torch.stack([conditioned(m, condition, seed=k) for k in range(3)])
    exact, single = householder_qr(A), A.float()
    plain = float((householder_qr(single).double() - exact).abs().max())
    for old in (torch.eye(m).expand(3, m, m), orthogonal(m).float().expand(3, m, m)):
        Q = rotated(single, old)
        assert float((Q.double() - exact).abs().max()) <= 4 * plain + 1e-6
        for k in range(3):
            assert torch.equal(rotated(single[k : k + 1], old[:1])[0], Q[k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_columns_that_are_left_open_come_from_the_old_rotation(dtype):
    m, r = 9, 5
    A = conditioned(m, 1e3, seed=1).to(dtype)
    A[:, r:] = A[:, :r] @ gaussian(r, m - r).to(dtype)
    old = orthogonal(m, 2).to(dtype)
    Q, exact = rotated(A[None], old[None])[0], householder_qr(A.double()[None])[0]
    bound = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(Q[:, :r].double(), exact[:, :r], rtol=0, atol=bound)
    assert defect(Q) < 1e-5
