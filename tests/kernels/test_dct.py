"""The cosine transform, and the projector that chooses among its basis vectors."""

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
from helpers.problems import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import projectors as oracle

from stiefel.kernels import dct, dct_basis, dct_path, dct_project, idct
from stiefel.kernels.dct import FFT_FROM
from stiefel.kernels.reference.dct import quarter_waves
from stiefel.optimizers._toolkit.index_projectors import DctProjector
from stiefel.optimizers._toolkit.moments import DenseBasisChange, IndexBasisChange, carry_moments
from stiefel.optimizers._toolkit.projectors import make_projector
from stiefel.optimizers._toolkit.random_keys import StackRNG

LENGTHS = [1, 2, 3, 4, 5, 8, 13, 17, 64, 97, 100, 255, 256, 257, 1000, 1024]
lengths = pytest.mark.parametrize("n", LENGTHS)
paths = pytest.mark.parametrize("path", ["fft", "matmul"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
norms = pytest.mark.parametrize("norm", ["l1", "l2"])


def largest(X):
    return X.abs().max().item() if X.numel() else 0.0


def chosen(G, r, norm="l2"):
    """The projector and its state for a stack G."""
    find = make_projector(f"dct:{norm}")
    old = torch.zeros(len(G), r, dtype=torch.int32)
    (index,) = find.find(G, old, rng=StackRNG(0, tuple(range(len(G))), 1))
    assert index.dtype == torch.int32 and index.shape == (len(G), r)
    return find, {"index": index}


def share(G, r, norm="l2"):
    """Captured part of ||G||^2."""
    find, state = chosen(G, r, norm)
    return (find.project(state, G).double().norm() ** 2 / G.double().norm() ** 2).item()


# The basis and the transform.


@pytest.mark.parametrize("n", [*LENGTHS, 4096])
@dtypes
def test_the_cosine_basis_is_orthonormal(n, dtype):
    C = dct_basis(n, dtype)
    rows = (C if n <= 1024 else C[:: n // 128]).double()  # a float32 product has errors of its own
    E = rows @ rows.mT - torch.eye(len(rows), dtype=torch.float64)
    assert largest(E) <= (2e-7 if dtype == torch.float32 else 2e-14)
    assert C.dtype == dtype and C.shape == (n, n)
    assert largest(C[0] - math.sqrt(1 / n)) <= 1e-7


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chosen_coefficients_are_those_of_the_transform_in_the_dtype_of_the_work(dtype, dim):
    X, index = gaussian(12, 20).expand(2, -1, -1).to(dtype), torch.tensor([[0, 3, 7]])
    R = dct_project(X, index.to(torch.int32), dim)
    want = dct(X.double(), dim).index_select(dim, index[0])
    assert R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert largest(R - want) <= (1e-13 if dtype == torch.float64 else 1e-5)


def test_phases_are_exact_for_long_sides():
    """Rows one by one from a table of 4 n cosines: the matrix would be a gigabyte."""
    n, j = 16384, torch.arange(16384)
    wave = torch.cos(torch.arange(4 * n).double() * math.pi / (2 * n))
    rows = torch.arange(0, n, 512)
    C = wave[rows[:, None] * (2 * j + 1) % (4 * n)] * math.sqrt(2 / n)
    C[0] = math.sqrt(1 / n)
    S = dct(torch.eye(n, dtype=torch.float32)[:, ::1024].mT.contiguous())  # columns 0, 1024, ...
    assert largest(S[:, rows] - C[:, ::1024].mT) <= 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17])
def test_basis_is_the_written_formula(n):
    assert np.abs(dct_basis(n, torch.float64).numpy() - oracle.cosine_matrix(n)).max() <= 1e-14


@lengths
@paths
@dtypes
def test_the_transform_equals_scipys(n, path, dtype):
    X = gaussian(3, n, dtype=dtype)
    want = scipy.fft.dct(X.double().numpy(), 2, norm="ortho", axis=1)
    back = scipy.fft.idct(X.double().numpy(), 2, norm="ortho", axis=1)
    near = 1e-6 * max(1.0, math.sqrt(n) / 4) if dtype == torch.float32 else 1e-12
    for dim, turn in ((-1, lambda x: x), (-2, lambda x: x.mT)):
        S, x = dct(turn(X), dim, path), idct(turn(X), dim, path)
        assert S.dtype == x.dtype == dtype
        assert np.abs(turn(S).double().numpy() - want).max() <= near
        assert np.abs(turn(x).double().numpy() - back).max() <= near
        assert largest(idct(S, dim, path) - turn(X)) <= 10 * near


@pytest.mark.parametrize("n", [*LENGTHS, 4096])
def test_paths_agree_and_the_order_is_a_bijection(n):
    X = gaussian(5, n)
    assert largest(dct(X, path="fft") - dct(X, path="matmul")) <= 5e-6
    order, place, _ = quarter_waves(n, torch.float32, "cpu")
    assert order.sort().values.tolist() == list(range(n))
    assert torch.equal(order[place], torch.arange(n))


@lengths
@paths
def test_the_transform_keeps_the_norm(n, path):
    X = gaussian(7, n)
    for dim in (-1, -2):
        assert abs(dct(X, dim, path).norm() - X.norm()) <= 1e-6 * X.norm() * 2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 4), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["fft", "matmul"]),
    st.sampled_from([-1, -2]), st.booleans(),
)  # fmt: skip
def test_stack_has_the_bits_of_its_matrices(K, m, n, path, dim, double):
    if path == "matmul":  # whole 16 bytes per matrix, as for every product of a stack
        m, n = 4 * m, 4 * n
    X = gaussian(K, m, n, dtype=torch.float64 if double else torch.float32)
    for function in (dct, idct):
        parts = [function(x.clone(), dim, path) for x in X]
        assert torch.equal(function(X, dim, path), torch.stack(parts))


def test_path_is_a_pure_rule_and_auto_follows_it():
    assert dct_path(FFT_FROM) == "fft" and dct_path(FFT_FROM - 1) == "matmul"
    # cuFFT and its like are slow where a prime factor is large
    assert [dct_path(n, "cuda") for n in (511, 512, 521, 1000, 1034)] == [
        "matmul", "fft", "matmul", "fft", "matmul"
    ]  # fmt: skip
    for n in (FFT_FROM - 1, FFT_FROM):
        X = gaussian(4, n)
        assert torch.equal(dct(X), dct(X, path=dct_path(n, "cpu", torch.float32)))
        assert torch.equal(idct(X), idct(X, path=dct_path(n)))


def test_constants_are_shared_and_serve_inside_inference_mode():
    assert dct_basis(12) is dct_basis(12) and dct_basis(12).dtype == torch.float32
    assert dct_basis(12) is not dct_basis(12, torch.float64)
    assert dct_basis(12, device=torch.device("cpu")) is dct_basis(12)
    with torch.inference_mode():
        first = dct_basis(23)
    assert not first.is_inference()
    X = gaussian(3, 23).requires_grad_()
    for path in ("fft", "matmul"):
        (grad,) = torch.autograd.grad(dct(X, path=path).square().sum() / 2, X)
        assert largest(grad - X) <= 1e-5


def test_narrow_input_is_worked_on_in_fp32_and_not_changed():
    X = gaussian(3, 300).bfloat16()
    before = X.clone()
    for function in (dct, idct):
        assert function(X).dtype == torch.float32
        assert torch.equal(function(X), function(X.float()))
    assert torch.equal(X, before)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: dct_basis(0), "n >= 1"),
        (lambda: dct(torch.zeros(2, 2), path="dense"), "path must be one of auto"),
        (lambda: idct(torch.zeros(2, 2), dim=0), "dim -1 or -2"),
        (lambda: dct(torch.zeros(4)), "1-D"),
    ],
)
def test_bad_arguments_are_one_sentence(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# The projector. Rows are projected: the basis has m vectors.


@st.composite
def problems(draw):
    K, m, n = draw(st.integers(1, 2)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    inner, seed = draw(st.integers(1, min(m, n))), draw(st.integers(0, 2**20))
    G = gaussian(K, m, inner, seed=seed) @ gaussian(K, inner, n, seed=1)
    return G * 10.0 ** draw(st.integers(-12, 12)), draw(st.integers(1, m))


@settings(max_examples=80, deadline=None)
@given(problems())
def test_l2_captures_its_share(problem):
    G, r = problem
    for X in G:
        assert share(X[None], r) >= r / G.shape[1] - 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**20), st.data())
def test_l2_is_the_best_of_all_subsets(m, n, seed, data):
    r, G = data.draw(st.integers(1, m)), gaussian(1, m, n, seed=seed)
    S = oracle.cosine_matrix(m) @ G[0].double().numpy()
    energy = (S**2).sum(1)
    best = max(energy[list(I)].sum() for I in itertools.combinations(range(m), r))
    assert share(G, r) * (G.double().norm() ** 2).item() == pytest.approx(best, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_l1_has_a_weaker_bound(problem):
    G, r = problem
    m, n = G.shape[1:]
    for X in G:
        assert share(X[None], r, "l1") >= r / (r + n * (m - r)) - 1e-5


def test_l1_falls_below_the_share_of_l2():
    """r spread rows of l1 norm 1 against rows with one entry just under 1."""
    n, m, r = 256, 64, 8
    S = torch.zeros(m, n, dtype=torch.float64)
    S[:r] = 1 / n
    S[range(r, m), range(r, m)] = 0.999
    G = idct(S, dim=-2)[None]
    assert share(G, r, "l1") < r / m / 100 and share(G, r, "l1") >= r / (r + n * (m - r))
    assert share(G, r, "l2") >= r / m


@norms
def test_captured_energy_is_never_above_that_of_the_svd(norm):
    for seed in range(10):
        G = gaussian(1, 12, 20, seed=seed)
        best = torch.linalg.svdvals(G)[0, :5].square().sum() / G.square().sum()
        assert share(G, 5, norm) <= best + 1e-6


@norms
def test_the_projector_is_orthogonal(norm):
    G = gaussian(2, 12, 20)
    find, state = chosen(G, 5, norm)
    P = find.lift(state, torch.eye(5).expand(2, 5, 5), 12).P
    S = P @ P.mT
    assert largest(P.mT @ P - torch.eye(5)) <= 1e-6 and largest(S @ S - S) <= 1e-6
    residual = G - find.lift_block(state, find.project(state, G), 12)
    assert find.project(state, residual).norm() <= 1e-5 * G.norm()
    for k, I in enumerate(state["index"].tolist()):
        assert np.abs(P[k].double().numpy() - oracle.cosine_matrix(12)[I].T).max() <= 1e-6


@pytest.mark.parametrize("m", [1, 7, 300])
def test_full_rank_loses_nothing(m):
    G = gaussian(1, m, 9)
    find, state = chosen(G, m)
    R = find.project(state, G)
    assert largest(find.lift_block(state, R, m) - G) <= 1e-5
    assert largest(R - dct(G, dim=-2)) <= 1e-5


@norms
@pytest.mark.parametrize("m, n", [(6, 17), (300, 9), (9, 9)])
def test_a_turned_matrix_is_the_transposed_problem(norm, m, n):
    G = gaussian(1, m, n)
    stored = G.mT.contiguous()
    find, state = chosen(G, 4, norm)
    _, transposed = chosen(stored.mT, 4, norm)
    assert torch.equal(state["index"], transposed["index"])
    assert largest(find.project(state, G) - find.project(transposed, stored.mT)) <= 5e-6


def test_overlap_is_the_match_matrix():
    m, r = 10, 4
    find = make_projector("dct")
    old, new = torch.tensor([[0, 3, 5, 8]]).int(), torch.tensor([[0, 4, 5, 9]]).int()
    eye = torch.eye(r)[None]
    P_old, P_new = (find.lift({"index": I}, eye, m).P.contiguous() for I in (old, new))
    want = (new[0, :, None] == old[0, None, :]).float()
    assert largest(P_new.mT @ P_old - want) <= 1e-6
    M, V = gaussian(1, r, 6), gaussian(1, r, 6, seed=1).square()
    dense_M, dense_V, before = M.clone(), V.clone(), (M.clone(), V.clone())
    carry_moments("match", M, V, find.overlap((old,), (new,)))
    carry_moments("rotate", dense_M, dense_V, DenseBasisChange(P_old, P_new))
    assert largest(M - dense_M) <= 1e-5 and largest(V - dense_V) <= 1e-5
    assert M.norm() <= before[0].norm()
    M, V = before[0].clone(), before[1].clone()
    carry_moments("match", M, V, IndexBasisChange(old, old))
    assert torch.equal(M, before[0]) and torch.equal(V, before[1])


@norms
def test_ties_take_the_lowest_and_the_order_ascends(norm, monkeypatch):
    G = gaussian(2, 40, 9)
    first, second = chosen(G, 7, norm)[1]["index"], chosen(G, 7, norm)[1]["index"]
    assert torch.equal(first, second) and torch.equal(first, first.sort(-1).values)
    monkeypatch.setattr(DctProjector, "_scores", lambda self, X: torch.ones(len(X)))
    assert chosen(G, 7, norm)[1]["index"].tolist() == [list(range(7))] * 2


@norms
@pytest.mark.parametrize("m", [12, 300])
def test_the_choice_depends_on_neither_scale_nor_a_rotation_of_columns(norm, m):
    G = gaussian(1, m, 20)
    find, state = chosen(G, 5, norm)
    R = find.project(state, G)
    for power in (-40, 7, 60):
        _, scaled = chosen(G * 2.0**power, 5, norm)
        assert torch.equal(scaled["index"], state["index"])
        assert torch.equal(find.project(scaled, G * 2.0**power), R * 2.0**power)
    Q = torch.linalg.qr(gaussian(20, 20, dtype=torch.float64)).Q
    G = gaussian(1, m, 20, dtype=torch.float64)
    energies = [dct(X, dim=-2).square().sum(-1) for X in (G, G @ Q)]
    assert largest(energies[0] - energies[1]) <= 1e-10


@norms
@pytest.mark.parametrize("m, j", [(8, 0), (17, 5), (300, 299), (1024, 257)])
def test_a_single_cosine_is_found(norm, m, j):
    G = torch.outer(dct_basis(m)[j], gaussian(11))[None]
    find, state = chosen(G, 1, norm)
    assert state["index"].tolist() == [[j]]
    assert (
        largest(G - find.lift_block(state, find.project(state, G), m))
        <= 1e-6 * max(1.0, largest(G)) * 4
    )


def test_scores_come_from_panels(monkeypatch):
    """No copy of a large gradient: columns are transformed a panel at a time."""
    from stiefel.optimizers._toolkit import svd

    G = gaussian(1, 40, 200)
    whole = chosen(G, 9)[1]["index"]
    monkeypatch.setattr(svd, "_GRAM_PANEL", 2**11)
    assert torch.equal(chosen(G, 9)[1]["index"], whole)
    scores = (oracle.cosine_matrix(40) @ G[0].double().numpy()) ** 2
    assert whole[0].tolist() == oracle.choose(scores.sum(1).tolist(), 9)
