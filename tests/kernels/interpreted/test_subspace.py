"""Into a subspace and out of it in the interpreter, against float64 and the plain references."""

import importlib
import math

import pytest
import torch
from helpers.operands import (
    DTYPES,
    LAYOUTS,
    close,
    gaussian,
    laid,
    nothing_beside,
    unchanged,
)

from stiefel.kernels import reference
from stiefel.kernels import triton as kernels
from stiefel.kernels.triton import adam_lift as module

subspace = importlib.import_module("stiefel.kernels.triton.project")


BETAS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
# (K, m, n), r: ragged, single rows, columns and coordinates, r above m, split sums, several tiles
SIZES = [
    ((1, 1, 1), 1),
    ((1, 1, 33), 1),
    ((1, 45, 1), 7),
    ((3, 33, 45), 16),
    ((1, 7, 20), 12),
    ((1, 300, 20), 5),
    ((2, 70, 33), 33),
]


def problem(shape=(2, 70, 33), r=20, dtype=torch.float32, shared=False):
    """W, P, G, R, M, V of a step; P has orthonormal columns where it can."""
    K, m, n = shape
    P = gaussian(1 if shared else K, m, r, seed=1)
    P = torch.linalg.qr(P).Q.contiguous() if r <= m else P / math.sqrt(m)
    G = gaussian(K, m, n, seed=2)
    R = reference.project(P, G)[0]
    M, V = gaussian(K, r, n, seed=3) / 4, gaussian(K, r, n, seed=4).square()
    return gaussian(K, m, n, seed=5, dtype=dtype), P, G.to(dtype), R, M, V


def doubled(xs):
    """Float64 of all tensors among keywords."""
    return {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in xs.items()}


# project


@pytest.mark.parametrize("shape, r", SIZES, ids=str)
@pytest.mark.parametrize("squares", [False, True])
def test_project(shape, r, squares, monkeypatch):
    _, P, G, *_ = problem(shape, r)
    R, G2 = kernels.project(P, G, squares)
    expected, sums = reference.project(P.double(), G.double(), squares)
    close(R, expected, torch.float32)
    if squares:
        close(G2, sums, torch.float32)
    else:
        assert G2 is None
    assert subspace._plan(P, G)[1] > 1 or shape[1] != 300
    monkeypatch.setattr(subspace, "ROOM", 1)  # a matrix at a time
    one_by_one = kernels.project(P, G, squares)
    assert torch.equal(one_by_one[0], R) and (G2 is None or torch.equal(one_by_one[1], G2))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("narrow", DTYPES[1:], ids=str)
def test_project_of_narrow_operands(narrow, shared):
    _, P, G, *_ = problem((3, 40, 20), 9, shared=shared)
    for A, B in ((P, G.to(narrow)), (P.to(narrow), G), (P.to(narrow), G.to(narrow))):
        R, G2 = kernels.project(A, B, True)
        expected, sums = reference.project(A.double(), B.double(), True)
        assert R.dtype == G2.dtype == torch.float32
        close(R, expected, torch.float32)
        close(G2, sums, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_project_takes_any_strides(layout):
    _, P, G, *_ = problem((2, 70, 33), 9)
    pairs = laid(P, layout), laid(G, layout)
    with nothing_beside(*pairs):
        R, G2 = kernels.project(pairs[0][0], pairs[1][0], True)
    expected, sums = kernels.project(P, G, True)
    assert torch.equal(R, expected) and torch.equal(G2, sums)


def test_project_tiles_more_coordinates_than_a_program_holds():
    _, P, G, *_ = problem((1, 280, 17), 270)
    R = kernels.project(P, G)[0]
    close(R, P.double().mT @ G.double(), torch.float32)


def test_a_ragged_projection_is_the_crop_of_a_padded_one():
    _, P, G, *_ = problem((1, 60, 20), 10)
    wide = torch.nn.functional.pad
    big = kernels.project(wide(P, (0, 6)), wide(G, (0, 12)))[0]
    assert torch.equal(kernels.project(P, G)[0], big[:, :10, :20])


# adam


@pytest.mark.parametrize("kind", ["number", "late", "matrix", "rows", "columns", "entries"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 45)], ids=str)
def test_adam(shape, kind):
    K, m, n = shape
    _, _, _, R, M, V = problem((K, m, n), m)
    ages = torch.arange(1, K * m * n + 1).view(K, m, n)
    t = {
        "number": 1, "late": 100000, "matrix": ages[:, :1, :1] * 1000, "rows": ages[..., :1],
        "columns": ages[:, :1].double(), "entries": ages.int(),
    }[kind]  # fmt: skip
    m1, v1, m2, v2 = M.clone(), V.clone(), M.double(), V.double()
    N = kernels.adam(R, m1, v1, t, **BETAS)
    close(N, reference.adam(R.double(), m2, v2, t, **BETAS), torch.float32)
    close(m1, m2, torch.float32)
    close(v1, v2, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("t", [3, torch.arange(1, 21).view(2, 10, 1)], ids=["number", "clocks"])
def test_adam_takes_any_strides(layout, t):
    _, _, _, R, M, V = problem((2, 40, 33), 10)
    pairs = laid(R, layout), laid(M, layout), laid(V, layout)
    with nothing_beside(*pairs):
        N = kernels.adam(*(view for view, _ in pairs), t, **BETAS)
    assert torch.equal(N, kernels.adam(R, M, V, t, **BETAS))
    assert torch.equal(pairs[1][0], M) and torch.equal(pairs[2][0], V)
    assert torch.equal(pairs[0][0], R)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_adam_of_narrow_moments_works_in_float32(dtype):
    _, _, _, R, M, V = problem((2, 40, 33), 10)
    M, V = M.to(dtype), V.to(dtype)
    m, v = M.float(), V.float()
    N = kernels.adam(R, M, V, 2, **BETAS)
    close(N, reference.adam(R.double(), m.double(), v.double(), 2, **BETAS), torch.float32)
    kernels.adam(R, m, v, 2, **BETAS)
    assert torch.equal(M, m.to(dtype)) and torch.equal(V, v.to(dtype))


def test_adam_leaves_the_moments_of_a_bad_matrix():
    _, _, _, R, M, V = problem((3, 40, 33), 10)
    R[1, 2, 3] = math.nan
    m, v = unchanged(M, V)
    for ok in (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0, 9], [0, 9], [1, 9]])[:, 0]):
        M.copy_(m), V.copy_(v)
        N = kernels.adam(R, M, V, 2, finite=ok, **BETAS)
        assert torch.equal(M[1], m[1]) and torch.equal(V[1], v[1])
        assert not torch.equal(M[0], m[0]) and N[[0, 2]].isfinite().all()
    plain = [X.clone() for X in (m, v)]
    reference.adam(R, *plain, 2, finite=ok, **BETAS)
    assert torch.equal(plain[0][1], m[1]) and torch.equal(plain[1][1], v[1])


def test_adam_without_averages_or_eps():
    _, _, _, R, M, V = problem((1, 40, 33), 10)
    for t in (1, torch.ones(1, 1, 1)):
        N = kernels.adam(R, M.clone(), V.clone(), t, beta1=0.0, beta2=0.0, eps=0.0)
        close(N, R.double().sign(), torch.float32)


# lift_


def rests(K, m, n, X, R):
    """Keywords for all that may stand beside P N."""
    return {
        "nothing": {},
        "X": {"X": X},
        "number": {"X": X, "by": gaussian(1, 1, 1)},
        "matrix": {"X": X, "by": gaussian(K, 1, 1)},
        "rows": {"X": X, "by": gaussian(1, m, 1)},
        "columns": {"X": X, "by": gaussian(K, 1, n)},
        "all": {"X": X, "by": gaussian(K, m, n)},
        "signs": {"X": X, "R": R, "free": 0.3},
        "floor": {"X": X, "R": R, "free": 0.3, "floor": torch.full((K, 1, 1), 0.5)},
    }


KINDS = list(rests(1, 2, 2, None, None))


def settled(X, P, R, floor=0.0):
    """X with entries moved away from where the sign of X - P R is a matter of round-off."""
    back = P.double() @ R.double()
    near = ((X.double() - back).abs() - floor).abs() < 1e-3
    return torch.where(near, (back + floor + 0.1).to(X.dtype), X)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, r", SIZES, ids=str)
def test_lift(shape, r, kind):
    W, P, G, R, _, _ = problem(shape, r)
    N = gaussian(*R.shape, seed=9)
    beside = rests(*shape, settled(G, P, R, 0.5 if kind == "floor" else 0.0), R)[kind]
    kept = unchanged(P, N, *(x for x in beside.values() if isinstance(x, torch.Tensor)))
    exact = W.double()
    reference.lift_(exact, P.double(), N.double(), 0.9, -0.1, **doubled(beside))
    plain = W.clone()
    reference.lift_(plain, P, N, 0.9, -0.1, **beside)
    kernels.lift_(W, P, N, 0.9, -0.1, **beside)
    close(W, exact, torch.float32)
    close(plain, exact, torch.float32)
    given = (P, N, *(x for x in beside.values() if isinstance(x, torch.Tensor)))
    assert all(torch.equal(X, old) for X, old in zip(given, kept, strict=True))


@pytest.mark.parametrize("kind", ["nothing", "columns", "floor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lift_takes_any_strides(layout, kind):
    W, P, G, R, _, _ = problem((2, 40, 33), 9)
    beside = rests(2, 40, 33, G, R)[kind]
    there = laid(W, layout), laid(P, layout), laid(R, layout)
    others = {k: laid(x, layout)[0] if k == "X" else x for k, x in beside.items()}
    with nothing_beside(*there):
        kernels.lift_(*(view for view, _ in there), 0.9, -0.1, **others)
    kernels.lift_(W, P, R, 0.9, -0.1, **beside)
    assert torch.equal(there[0][0], W)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["nothing", "columns", "signs"])
def test_a_narrow_weight_is_rounded_once(dtype, kind):
    W, P, G, R, _, _ = problem((2, 40, 33), 9)
    W, beside = W.to(dtype), rests(2, 40, 33, settled(G, P, R), R)[kind]
    wide, plain = W.float(), W.clone()
    kernels.lift_(W, P, R, 0.9, -0.1, **beside)
    kernels.lift_(wide, P, R, 0.9, -0.1, **beside)
    reference.lift_(plain, P, R, 0.9, -0.1, **beside)
    assert torch.equal(W, wide.to(dtype))
    assert (plain != W).float().mean() < 0.01  # where float32 sums fall on another side


def test_lift_of_narrow_factors_and_one_basis_for_all():
    W, P, _, R, _, _ = problem((3, 40, 33), 9, shared=True)
    P, R = P.bfloat16(), R.bfloat16()
    exact = W.double()
    reference.lift_(exact, P.double(), R.double(), 0.9, -0.1)
    kernels.lift_(W, P, R, 0.9, -0.1)
    close(W, exact, torch.float32)


@pytest.mark.parametrize("kind", ["nothing", "columns", "floor"])
def test_control_stands_for_the_numbers_and_spares_a_bad_matrix(kind):
    W, P, G, R, _, _ = problem((3, 40, 33), 9)
    beside = rests(3, 40, 33, G, R)[kind]
    N = gaussian(*R.shape, seed=9)
    expected, old = W.clone(), W.clone()
    kernels.lift_(expected, P, N, 0.9, -0.1, **beside)
    plain = W.clone()
    N[1], W[1, 0, 0], plain[1, 0, 0] = math.nan, math.nan, math.nan
    rows = torch.tensor([[1.0, 0.9, -0.1], [0.0, 0.9, -0.1], [1.0, 0.9, -0.1]])
    for control in (rows, torch.stack((rows, rows), -1)[..., 0]):
        new = W.clone()
        kernels.lift_(new, P, N, 5.0, 5.0, **beside, control=control)
        assert torch.equal(new[[0, 2]], expected[[0, 2]])
        assert new[1, 0, 0].isnan() and torch.equal(new[1, 1:], old[1, 1:])
    reference.lift_(plain, P, N, 5.0, 5.0, **beside, control=rows)
    close(plain[[0, 2]], expected[[0, 2]], torch.float32)
    assert plain[1, 0, 0].isnan() and torch.equal(plain[1, 1:], old[1, 1:])


def test_a_ragged_lift_is_the_crop_of_a_padded_one():
    W, P, _, R, _, _ = problem((1, 40, 33), 10)
    pad = torch.nn.functional.pad
    big = pad(W, (0, 15, 0, 8))
    kernels.lift_(big, pad(P, (0, 6, 0, 8)), pad(R, (0, 15, 0, 6)), 0.9, -0.1)
    kernels.lift_(W, P, R, 0.9, -0.1)
    assert torch.equal(W, big[:, :40, :33])


def test_lift_refuses_what_it_would_read_after_writing():
    W, P, _, R, _, _ = problem((1, 40, 33), 9)
    with pytest.raises(ValueError, match="overlaps an operand"):
        kernels.lift_(W, P, R, 0.9, -0.1, X=W)


# adam_lift_


@pytest.mark.parametrize("kind", ["nothing", "signs", "floor"])
@pytest.mark.parametrize("shape, r", SIZES, ids=str)
def test_adam_lift(shape, r, kind):
    W, P, G, R, M, V = problem(shape, r)
    G = settled(G, P, R, 0.5 if kind == "floor" else 0.0)
    beside = {k: x for k, x in rests(*shape, G, R)[kind].items() if k != "R"}
    exact = [X.double() for X in (W, P, R, M, V)]
    reference.adam_lift_(*exact, 3, 0.9, -0.1, **BETAS, **doubled(beside))
    w, m, v = unchanged(W, M, V)
    kernels.adam_lift_(w, P, R, m, v, 3, 0.9, -0.1, **BETAS, **beside)
    close(w, exact[0], torch.float32)
    close(m, exact[3], torch.float32)
    close(v, exact[4], torch.float32)
    plain = unchanged(W, P, R, M, V)
    reference.adam_lift_(*plain, 3, 0.9, -0.1, **BETAS, **beside)
    close(plain[0], exact[0], torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adam_lift_takes_any_strides_and_clocks(layout):
    W, P, G, R, M, V = problem((2, 40, 33), 9)
    t = torch.arange(1, 19).view(2, 9, 1)
    there = [laid(X, layout) for X in (W, P, R, M, V)]
    beside = {"free": 0.3, "floor": torch.tensor([0.2, 0.4]).view(2, 1, 1)}
    with nothing_beside(*there):
        views = [view for view, _ in there]
        kernels.adam_lift_(*views, t, 0.9, -0.1, **BETAS, **beside, X=laid(G, layout)[0])
    kernels.adam_lift_(W, P, R, M, V, t, 0.9, -0.1, **BETAS, **beside, X=G)
    for (view, _), X in zip(there, (W, P, R, M, V), strict=True):
        assert torch.equal(view, X)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_adam_lift_rounds_a_narrow_weight_once(dtype):
    W, P, _, R, M, V = problem((2, 40, 33), 9, dtype)
    wide, copies = W.float(), unchanged(M, V)
    kernels.adam_lift_(W, P, R, M, V, 3, 0.9, -0.1, **BETAS)
    kernels.adam_lift_(wide, P, R, *copies, 3, 0.9, -0.1, **BETAS)
    assert torch.equal(W, wide.to(dtype)) and torch.equal(M, copies[0])


@pytest.mark.parametrize("fused", [True, False])
def test_adam_lift_control(fused, monkeypatch):
    monkeypatch.setattr(module, "ON_CHIP", 128 if fused else 0)
    W, P, G, R, M, V = problem((3, 40, 33), 9)
    beside = {"X": G, "free": 0.3}
    expected = unchanged(W, P, R, M, V)
    kernels.adam_lift_(*expected, 3, 0.9, -0.1, **BETAS, **beside)
    R[1], W[1, 0, 0] = math.nan, math.nan
    control = torch.tensor([[1.0, 0.9, -0.1], [0.0, 0.9, -0.1], [1.0, 0.9, -0.1]])
    new = unchanged(W, P, R, M, V)
    kernels.adam_lift_(*new, 3, 5.0, 5.0, **BETAS, **beside, control=control)
    for at, old in ((0, W), (3, M), (4, V)):
        assert torch.equal(new[at][[0, 2]], expected[at][[0, 2]])
        assert torch.equal(new[at][1].nan_to_num(7.0), old[1].nan_to_num(7.0))


@pytest.mark.parametrize("sign", [False, True])
def test_one_kernel_and_two_agree(sign, monkeypatch):
    W, P, G, R, M, V = problem((2, 40, 33), 20)
    beside = {"X": settled(G, P, R), "free": 0.3} if sign else {}
    found = []
    for most in (128, 0):
        monkeypatch.setattr(module, "ON_CHIP", most)
        new = unchanged(W, P, R, M, V)
        kernels.adam_lift_(*new, 3, 0.9, -0.1, **BETAS, **beside)
        found.append(new)
    close(found[0][0], found[1][0], torch.float32)
    assert torch.equal(found[0][3], found[1][3]) and torch.equal(found[0][4], found[1][4])


def test_many_coordinates_take_two_kernels():
    W, P, _, R, M, V = problem((1, 140, 17), 130)
    assert not module.on_chip(W, P, 130, False) and module.on_chip(W, P, 128, False)
    assert not module.on_chip(W, P, 65, True) and module.on_chip(W, P, 64, True)
    exact = [X.double() for X in (W, P, R, M, V)]
    reference.adam_lift_(*exact, 3, 0.9, -0.1, **BETAS)
    kernels.adam_lift_(W, P, R, M, V, 3, 0.9, -0.1, **BETAS)
    close(W, exact[0], torch.float32)


def test_padding_has_no_direction_without_eps():
    W, P, _, R, M, V = problem((1, 20, 9), 5)
    kernels.adam_lift_(W, P, R, M, V, 1, 0.9, -0.1, beta1=0.9, beta2=0.999, eps=0.0)
    assert W.isfinite().all()


# what all share


def test_nothing_is_launched_for_an_empty_batch():
    W, P, G, R, M, V = (X[:0] for X in problem((1, 20, 9), 5))
    found, sums = kernels.project(P, G, True)
    assert found.shape == (0, 5, 9) and sums.shape == (0, 1, 9)
    assert kernels.adam(R, M, V, 1, **BETAS).shape == (0, 5, 9)
    kernels.lift_(W, P, R, 0.9, 0.1)
    kernels.adam_lift_(W, P, R, M, V, 1, 0.9, 0.1, **BETAS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spreads(bad):
    W, P, G, R, M, V = problem((2, 40, 33), 9)
    G[0, 3, 4] = bad
    R, G2 = kernels.project(P, G, True)
    assert (
        not R[0, :, 4].isfinite().any() and R[0, :, :4].isfinite().all() and R[1].isfinite().all()
    )
    assert not G2[0, 0, 4].isfinite()
    N = kernels.adam(R, M.clone(), V.clone(), 1, **BETAS)
    assert N[0, :, 4].isnan().all()
    w = W.clone()
    kernels.lift_(w, P, N, 0.9, 0.1)
    assert w[0, :, 4].isnan().all() and w[1].isfinite().all()
    kernels.adam_lift_(W, P, R, M, V, 1, 0.9, 0.1, **BETAS, X=G, free=0.1)
    assert W[0, :, 4].isnan().all() and W[1].isfinite().all() and not M[0, :, 4].isfinite().any()


def test_offsets_are_wider_than_int32():
    far = torch.empty(2**31 + 2**20, dtype=torch.float16)  # never touched but for a few entries
    _, P, G, R, M, V = problem((2, 3, 20), 2, torch.float16)

    def spread_out(X, dim):
        strides = list(X.stride())
        strides[dim] = 2**31 // (X.shape[dim] - 1)
        view = far.as_strided(X.shape, strides)
        return view.copy_(X)

    for dim in (0, 1):
        spread = spread_out(G, dim)
        assert torch.equal(kernels.project(P, spread)[0], kernels.project(P, G)[0])
        W = gaussian(2, 3, 20, dtype=torch.float16)
        plain, spread = W.clone(), spread_out(W, dim)
        kernels.lift_(spread, P, R, 0.9, 0.1)
        kernels.lift_(plain, P, R, 0.9, 0.1)
        assert torch.equal(spread, plain)
        spread = spread_out(W, dim)
        kernels.adam_lift_(spread, P, R, M.clone(), V.clone(), 1, 0.9, 0.1, **BETAS)
        kernels.adam_lift_(W, P, R, M.clone(), V.clone(), 1, 0.9, 0.1, **BETAS)
        assert torch.equal(spread, W)
        m, v = (X.half() for X in (M, V))
        spread = spread_out(m, dim)
        n = kernels.adam(R, spread, v.clone(), 1, **BETAS)
        assert torch.equal(n, kernels.adam(R, m, v, 1, **BETAS)) and torch.equal(spread, m)


def test_every_matrix_of_an_expanded_stack_is_the_same():
    _, P, G, *_ = problem((1, 40, 33), 9)
    R = kernels.project(P.expand(3, -1, -1), G.expand(3, -1, -1))[0]
    assert torch.equal(R, kernels.project(P, G)[0].expand(3, -1, -1))


def test_fake_results_and_schemas():
    W, P, G, R, M, V = problem((2, 20, 9), 5)
    control, floor = torch.ones(2, 3), torch.zeros(2, 1, 1)
    which = {"test_utils": ("test_schema", "test_faketensor")}
    check, ops = torch.library.opcheck, torch.ops.stiefel
    for squares in (False, True):
        check(ops.project, (P, G, squares), **which)
    check(ops.adam, (R, M, V, 1.0, None, 0.9, 0.99, 1e-8, control[:, 0]), **which)
    check(ops.adam, (R, M, V, 1.0, floor, 0.9, 0.99, 1e-8, None), **which)
    nearest = (None, [])  # no keys, and so no places
    check(ops.lift_, (W, P, R, 0.9, 0.1, G, None, R, 0.1, floor, control, *nearest), **which)
    head, tail = (W, P, R, M, V, 1.0, None, 0.9, 0.1), (0.9, 0.99, 1e-8, G, 0.1, floor, control)
    check(ops.adam_lift_, head + tail + nearest, **which)


def test_each_operation_is_one_node_of_a_compiled_graph():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(W, P, G, M, V):
        R, squares = kernels.project(P, G, True)
        N = kernels.adam(R, M, V, 2, **BETAS)
        kernels.lift_(W, P, N, 0.9, -0.1, X=G, by=squares)
        kernels.adam_lift_(W, P, R, M, V, 3, 0.9, -0.1, **BETAS)

    W, P, G, _, M, V = problem((2, 20, 9), 5)
    expected = [X.clone() for X in (W, M, V)]
    step(W, P, G, M, V)
    step._torchdynamo_orig_callable(expected[0], P, G, expected[1], expected[2])
    assert all(torch.equal(X, Y) for X, Y in zip((W, M, V), expected, strict=True))
    names = [str(node.target) for node in graphs[0].graph.nodes if "stiefel" in str(node.target)]
    assert sorted(name.split(".")[1] for name in names) == [
        "adam", "adam_lift_", "lift_", "project",
    ]  # fmt: skip


# whole steps


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_galore(dtype, transposed):
    W, P, G, _, M, V = problem((2, 40, 60), 9)
    if transposed:  # as a weight whose right side is projected
        W, G = W.mT.contiguous().mT, G.mT.contiguous().mT
    W, G = W.to(dtype), G.to(dtype)
    exact = W.double()
    m, v = M.double(), V.double()
    R = P.double().mT @ G.double()
    N = reference.adam(R, m, v, 3, **BETAS)
    exact = 0.99 * exact - 0.025 * P.double() @ N
    kernels.adam_lift_(W, P, kernels.project(P, G)[0], M, V, 3, 0.99, -0.025, **BETAS)
    close(W, exact, dtype)
    close(M, m, torch.float32)


def test_a_step_of_fira():
    W, P, G, _, M, V = problem((2, 40, 60), 9)
    w, p, g, m, v = (X.double() for X in (W, P, G, M, V))
    R, G2 = kernels.project(P, G, squares=True)
    N = kernels.adam(R, M, V, 3, **BETAS)
    phi = (N.square().sum(-2, True) / R.square().sum(-2, True)).sqrt()
    kernels.lift_(W, P, N - phi * R, 0.99, -0.01, X=G, by=phi)
    r = p.mT @ g
    n = reference.adam(r, m, v, 3, **BETAS)
    ratio = (n.square().sum(-2, True) / r.square().sum(-2, True)).sqrt()
    close(W, 0.99 * w - 0.01 * (p @ n + ratio * (g - p @ r)), torch.float32)
    close(G2 - R.square().sum(-2, True), (g - p @ r).square().sum(-2, True), torch.float32, 4)


def test_a_step_of_frugal():
    W, P, G, R, M, V = problem((2, 40, 60), 9)
    G = settled(G, P, R)
    w, p, g, m, v = (X.double() for X in (W, P, G, M, V))
    R = kernels.project(P, G)[0]
    kernels.adam_lift_(W, P, R, M, V, 3, 0.99, -0.01, **BETAS, X=G, free=0.5)
    r = p.mT @ g
    n = reference.adam(r, m, v, 3, **BETAS)
    close(W, 0.99 * w - 0.01 * (p @ n + 0.5 * (g - p @ r).sign()), torch.float32)


@pytest.mark.parametrize("shape", [(70, 33), (200, 20)], ids=str)
def test_a_stack_has_the_bits_of_its_matrices(shape):
    (m, n), r = shape, 7
    P, G, W = gaussian(3, m, r), gaussian(3, m, n, seed=1), gaussian(3, m, n, seed=2)
    R, squares = kernels.project(P, G, squares=True)
    M, V = gaussian(3, r, n, seed=3), gaussian(3, r, n, seed=4).square()
    whole = [X.clone() for X in (W, M, V)]
    adam_lift = kernels.adam_lift_
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    adam_lift(whole[0], P, R, whole[1], whole[2], 3, 0.9, -0.1, **settings)
    for k in range(3):
        one = slice(k, k + 1)
        alone, sums = kernels.project(P[one], G[one], squares=True)
        assert torch.equal(alone, R[one]) and torch.equal(sums, squares[one])
        parts = [X[one].clone() for X in (W, M, V)]
        adam_lift(parts[0], P[one], alone, parts[1], parts[2], 3, 0.9, -0.1, **settings)
        assert all(torch.equal(X, Y[one]) for X, Y in zip(parts, whole, strict=True))
