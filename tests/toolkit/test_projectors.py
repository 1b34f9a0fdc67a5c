"""Bases and moments against naive float64: every kind of projector, every policy of moments."""

import contextlib
import io
import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers.allocations import AllocationCounter
from helpers.problems import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import projectors as oracle
from torch.utils._python_dispatch import TorchDispatchMode

from stiefel.optimizers._core.validation import resolve_rank
from stiefel.optimizers._toolkit import moments
from stiefel.optimizers._toolkit import svd as factor
from stiefel.optimizers._toolkit.moments import (
    DenseBasisChange,
    IndexBasisChange,
    adam,
    adam_reference,
    ema,
    momentum_step,
)
from stiefel.optimizers._toolkit.projectors import (
    PROJECTION_KINDS,
    fix_signs,
    make_projector,
    top_bases,
    top_basis,
)
from stiefel.optimizers._toolkit.random_keys import StackRNG, splitmix64

SVDS = factor.SVD_KINDS
SHAPES = {
    "wide": (6, 17, 3),
    "tall": (17, 6, 3),
    "square": (9, 9, 4),
    "odd": (13, 7, 7),
    "row": (1, 11, 1),
    "column": (11, 1, 1),
    "panels": (40, 203, 12),
}
shapes = pytest.mark.parametrize("m, n, r", SHAPES.values(), ids=SHAPES.keys())
kinds = pytest.mark.parametrize("kind", SVDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@pytest.fixture(scope="module", autouse=True)
def small_panels():
    """More than one panel of columns and one block of rows already for 40 x 203.

    One thread: the matrices are small, and a busy machine makes many threads ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor, "_GRAM_PANEL", 2**10)
        patch.setattr(factor, "_GRAM_ROWS", 16)
        yield
    torch.set_num_threads(threads)


class Sizes(TorchDispatchMode):
    """Records the elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.made.append(out.numel())
        return out


def orthonormal(d, r, seed=0):
    return torch.linalg.qr(gaussian(d, r, dtype=torch.float64, seed=seed)).Q


def planted(m, n, sigma, dtype=torch.float32, seed=0):
    """(1, m, n) with the singular values sigma."""
    U, V = orthonormal(m, len(sigma), seed), orthonormal(n, len(sigma), seed + 1)
    return (U * torch.tensor(sigma, dtype=torch.float64) @ V.T).to(dtype)[None]


def span(P):
    return P.double() @ P.double().mT


def largest(X):
    return X.abs().max().item()


def bases(K, d, r, dtype=torch.float32, seed=0):
    return torch.stack([orthonormal(d, r, seed + k) for k in range(K)]).to(dtype)


@st.composite
def problems(draw):
    """A stack (K, m, n), sometimes of low rank, an r that fits, and a kind."""
    K, m, n = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dtype, seed = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(0, 2**20))
    inner = draw(st.integers(1, min(m, n)))
    G = gaussian(K, m, inner, dtype=dtype, seed=seed) @ gaussian(K, inner, n, dtype=dtype, seed=1)
    return G * 10.0 ** draw(st.integers(-12, 12)), draw(st.integers(1, min(m, n)))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(SVDS))
def test_projections_are_orthogonal(problem, kind):
    G, r = problem
    for X, P in zip((G, G.mT), top_bases(G, r, kind), strict=True):
        low = P.mT @ X
        residual = X - P @ low
        scale = X.norm()
        assert largest(P.mT @ P - torch.eye(r, dtype=G.dtype)) <= 1e-5
        x = gaussian(len(G), r, 5, dtype=G.dtype)
        assert largest(P.mT @ (P @ x) - x) <= 1e-5 * (1 + largest(x))
        assert largest(P.mT @ residual) <= 1e-5 * scale
        parts = (low / scale).norm() ** 2 + (residual / scale).norm() ** 2
        assert abs(parts - 1) <= 1e-5


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(SVDS))
def test_stack_has_the_bits_of_its_matrices(problem, kind):
    G, r = problem
    for whole, parts in (
        (top_basis(G, r, kind), [top_basis(X[None].clone(), r, kind) for X in G]),
        (top_bases(G, r, kind)[1], [top_bases(X[None].clone(), r, kind)[1] for X in G]),
    ):
        assert torch.equal(whole, torch.cat(parts))


@shapes
@kinds
@dtypes
def test_shape_dtype_storage_and_oracle(m, n, r, kind, dtype):
    sigma = [1.6**-i for i in range(min(m, n))]
    G = planted(m, n, sigma, dtype)
    P, Q = top_bases(G, r, kind)
    U, V, _ = oracle.top_vectors(G[0].numpy(), r)
    near = 1e-3 if dtype == torch.float32 else 1e-8
    for basis, exact, d in ((P, U, m), (Q, V, n), (top_basis(G, r, kind), U, m)):
        assert basis.shape == (1, d, r) and basis.dtype == dtype and basis.is_contiguous()
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()
        # With a gap between all singular values the columns agree too, not the spans alone.
        assert np.abs(basis[0].double().numpy() - exact).max() <= near


def test_lapack_signs_are_those_of_one_call():
    G = gaussian(2, 7, 5)
    P, Q = top_bases(G, 3, "svd_full", lapack_signs=True)
    for k in range(2):
        U, _, Vh = torch.linalg.svd(G[k], full_matrices=False)
        assert torch.equal(P[k], U[:, :3]) and torch.equal(Q[k], Vh[:3].T)
    assert torch.equal(top_basis(G, 3, "svd_full", lapack_signs=True), P)
    assert torch.equal(top_basis(G, 3, "svd_full"), fix_signs(P))


@shapes
@kinds
def test_strides_do_not_matter(m, n, r, kind):
    G = gaussian(1, m, n)
    transposed = G.mT.contiguous().mT
    sparse = torch.zeros(1, 2 * m, 3 * n)[:, ::2, ::3].copy_(G)
    expected = top_basis(G, r, kind)
    assert torch.equal(top_basis(transposed, r, kind), expected)
    assert torch.equal(top_basis(sparse, r, kind), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m", [1, 5, 256, 257, 600])
def test_eigenvectors_in_place_have_the_bits_of_those_elsewhere(m, dtype):
    A = gaussian(m, 2 * m, dtype=dtype)
    lower = (A @ A.mT).tril()
    expected = torch.linalg.eigh(lower).eigenvectors
    K = lower.clone()
    found = factor._eigenvectors_in_place(K)
    assert torch.equal(found, expected) and found.data_ptr() == K.data_ptr()


@pytest.mark.parametrize("both", [False, True])
def test_gram_makes_no_copy_of_the_gradient(both):
    G = gaussian(1, 40, 4000)
    with Sizes() as sizes:
        top_bases(G, 5) if both else top_basis(G, 5)
    assert max(sizes.made) <= (4000 * 5 if both else 64 * 40)


@pytest.mark.parametrize("m, n", [(300, 4099), (4099, 300)])
def test_sizes_of_real_layers(monkeypatch, m, n):
    monkeypatch.setattr(factor, "_GRAM_PANEL", 2**20)
    monkeypatch.setattr(factor, "_GRAM_ROWS", 256)
    G = gaussian(1, m, n)
    P, Q = top_bases(G, 20)
    best = torch.linalg.svdvals(G)[0, :20].norm()
    for basis, low in ((P, P.mT @ G), (Q, G @ Q)):
        assert largest(basis.mT @ basis - torch.eye(20)) <= 1e-5
        assert low.norm() == pytest.approx(best.item(), rel=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_input_is_worked_on_in_fp32(kind, dtype):
    G = gaussian(2, 6, 17, dtype=dtype)
    P = top_basis(G, 3, kind)
    assert P.dtype == torch.float32
    assert torch.equal(P, top_basis(G.float(), 3, kind))


@shapes
@kinds
def test_gradient_is_not_modified(m, n, r, kind):
    G = gaussian(1, m, n)
    before = G.clone()
    top_bases(G, r, kind)
    assert torch.equal(G, before)


@pytest.mark.parametrize(
    "rank, d, r",
    [(1, 8, 1), (1.0, 8, 8), (0.25, 8, 2), (128, 8, 8), (0.001, 8, 1), (0.5, 7, 4), (5, 1, 1)],
)
def test_rank_is_clamped(rank, d, r):
    assert resolve_rank(rank, d) == r
    assert resolve_rank(np.int64(3), 8) == 3


@pytest.mark.parametrize("rank", [0, -1, 0.0, -0.5, 1.5, True, float("nan"), "8", None])
def test_a_rank_that_means_nothing_is_refused(rank):
    with pytest.raises(ValueError, match="rank"):
        resolve_rank(rank, 8)


@kinds
@dtypes
def test_full_rank_leaves_no_residual(kind, dtype):
    G = gaussian(2, 7, 12, dtype=dtype)
    P = top_basis(G, 7, kind)
    assert (G - P @ (P.mT @ G)).norm() <= 1e-5 * G.norm()


@pytest.mark.parametrize("r", [0, 6, -1])
def test_rank_out_of_range(r):
    with pytest.raises(ValueError, match="rank"):
        top_basis(gaussian(1, 5, 9), r)


def test_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match="svd, svd_full"):
        top_basis(gaussian(1, 5, 9), 2, "qr")


@shapes
@pytest.mark.parametrize("power", [-60, 7, 60])
def test_power_of_two_changes_no_bit(m, n, r, power):
    G = gaussian(1, m, n)
    for P, scaled in zip(top_bases(G, r), top_bases(G * 2.0**power, r), strict=True):
        assert torch.equal(P, scaled)


@pytest.mark.parametrize("power", [-140, 120], ids=["subnormal", "huge"])
def test_bases_of_extreme_scales_are_found(power):
    G = planted(6, 17, [1.5**-i for i in range(6)])
    extreme = (G.double() * 2.0**power).float()  # squares are far out of range
    assert largest(span(top_basis(extreme, 3)) - span(top_basis(G, 3))) <= 1e-2


@shapes
@dtypes
def test_captured_energy_and_agreement(m, n, r, dtype):
    sigma = [1.3**-i for i in range(min(m, n, 40))]
    G = planted(m, n, sigma, dtype)
    r = min(r, 8)
    P, Q = top_bases(G, r)
    best = sum(s * s for s in sigma[:r])
    assert (P.mT @ G).norm() ** 2 == pytest.approx(best, rel=1e-5)
    assert (G @ Q).norm() ** 2 == pytest.approx(best, rel=1e-5)
    near = 1e-3 if dtype == torch.float32 else 1e-8
    exact = top_bases(G, r, "svd_full")
    assert largest(span(P) - span(exact[0])) <= near
    assert largest(span(Q) - span(exact[1])) <= near


@kinds
@dtypes
@pytest.mark.parametrize("m, n", [(12, 31), (31, 12), (20, 20)])
def test_exact_rank_is_captured(m, n, kind, dtype):
    for sigma, near in (([1.0, 0.7, 0.3, 0.05], 1e-5), ([1.0, 0.1, 1e-4, 1e-5], 1e-3)):
        G = planted(m, n, sigma, dtype)
        for X, P in zip((G, G.mT), top_bases(G, 4, kind), strict=True):
            assert (X - P @ (P.mT @ X)).norm() <= near * X.norm()


@kinds
@dtypes
@pytest.mark.parametrize("m, n", [(8, 19), (19, 8), (9, 9)])
def test_basis_turns_with_the_gradient(m, n, kind, dtype):
    G = planted(m, n, [1.5**-i for i in range(min(m, n))], torch.float64)
    Q1, Q2 = orthonormal(m, m, seed=5), orthonormal(n, n, seed=6)
    P = top_basis(G.to(dtype), 4, kind)
    rotated = top_basis((Q1 @ G @ Q2).to(dtype), 4, kind)
    near = 1e-3 if dtype == torch.float32 else 1e-8
    assert largest(span(rotated) - span(Q1 @ P.double())) <= near


@kinds
@pytest.mark.parametrize("m, n", [(8, 19), (19, 8), (9, 9)])
def test_signs_are_reproducible(m, n, kind):
    G = planted(m, n, [1.5**-i for i in range(min(m, n))])
    P = top_basis(G, 4, kind)
    assert torch.equal(top_basis(G.clone(), 4, kind), P)
    shuffled = G[..., torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    assert largest(top_basis(shuffled, 4, kind) - P) <= 1e-3
    assert largest(top_basis(-G, 4, kind) - P) <= 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**20))
def test_the_largest_entry_of_a_direction_is_positive(m, r, seed):
    P = gaussian(2, m, r, seed=seed).round()  # many ties, zeros too
    fixed = fix_signs(P)
    for k in range(2):
        assert np.array_equal(fixed[k].numpy(), oracle.signed(P[k].numpy()))
    assert torch.equal(fix_signs(fixed), fixed)
    assert torch.equal(fix_signs(P[0]), fixed[0])


# The fall-back chain: Gram in fp32, Gram in fp64, full SVD in fp64, the old basis.


def raiser(*args, **kwargs):
    raise torch.linalg.LinAlgError("planted")


@pytest.fixture
def real_eigh():
    factor._warn_once.cache_clear()
    yield torch.linalg.eigh
    factor._warn_once.cache_clear()


def spoiled(real, how):
    """eigh that goes wrong in fp32 only."""

    def eigh(K, **out):
        if K.dtype == torch.float64:
            return real(K, **out)
        if how == "raises":
            raiser()
        w, V = real(K, **out)
        spoil = {"nan": V * math.nan, "skewed": V + 0.01}[how]
        return torch.return_types.linalg_eigh((w, spoil))

    return eigh


@pytest.mark.parametrize("how", ["raises", "nan", "skewed"])
def test_fallback_to_the_fp64_gram(monkeypatch, real_eigh, how):
    G = planted(6, 17, [1.5**-i for i in range(6)])
    expected = top_bases(G, 3)
    monkeypatch.setattr(torch.linalg, "eigh", spoiled(real_eigh, how))
    monkeypatch.setattr(torch.linalg, "svd", raiser)
    for P, want in zip(top_bases(G, 3), expected, strict=True):
        assert P.dtype == torch.float32
        assert largest(P - want) <= 1e-5


@dtypes
@pytest.mark.parametrize("m, n", [(12, 31), (31, 12)])
def test_near_deficiency_needs_no_fallback(monkeypatch, real_eigh, m, n, dtype):
    """G^T P / sigma is not orthonormal here; its QR is, at the first attempt."""
    calls = []
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda K, **out: calls.append(1) or real_eigh(K, **out)
    )
    for sigma in ([1.0, 1e-2, 1e-3, 1e-4, 1e-5], [1.0, 0.5]):
        calls.clear()
        for P in top_bases(planted(m, n, sigma, dtype), 5):
            assert largest(P.mT @ P - torch.eye(5, dtype=dtype)) <= 1e-5
        assert len(calls) == 1


def test_fallback_to_the_full_svd(monkeypatch, real_eigh):
    G = planted(6, 17, [1.5**-i for i in range(6)])
    expected = top_bases(G, 3, "svd_full")
    monkeypatch.setattr(torch.linalg, "eigh", raiser)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for P, want in zip(top_bases(G, 3), expected, strict=True):
            assert P.dtype == torch.float32 and largest(P - want) <= 1e-5


def test_full_svd_falls_back_to_the_gram(monkeypatch, real_eigh):
    G = planted(6, 17, [1.5**-i for i in range(6)])
    expected = top_basis(G, 3)
    monkeypatch.setattr(torch.linalg, "svd", raiser)
    assert largest(top_basis(G, 3, "svd_full") - expected) <= 1e-5


def test_nothing_works_keeps_the_old_basis(monkeypatch, real_eigh):
    G, old = gaussian(2, 6, 17), bases(2, 6, 3)
    before = old.clone()
    monkeypatch.setattr(torch.linalg, "eigh", raiser)
    monkeypatch.setattr(torch.linalg, "svd", raiser)
    with pytest.warns(RuntimeWarning, match="basis") as record:
        kept = top_basis(G, 3, old=old)
        assert torch.equal(kept, before) and torch.equal(old, before)
        assert kept.data_ptr() != old.data_ptr()
        P, Q = top_bases(G, 3, old=(old, bases(2, 17, 3)))
        assert torch.equal(P, before) and torch.equal(Q, bases(2, 17, 3))
        # No basis yet: none given, or the zeros of a fresh state.
        assert torch.equal(top_basis(G, 3), torch.eye(6, 3).expand(2, 6, 3))
        assert torch.equal(top_basis(G, 3, old=old * 0), torch.eye(6, 3).expand(2, 6, 3))
    assert len(record) == 1


def test_one_failure_leaves_the_others(monkeypatch, real_eigh):
    G, old = gaussian(3, 6, 17), bases(3, 6, 3)
    expected = top_basis(G, 3)
    calls = []

    def eigh(K, **out):
        calls.append(K.dtype)
        if len(calls) in (2, 3):  # both Gram attempts at the second matrix
            raiser()
        return real_eigh(K, **out)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "svd", raiser)
    with pytest.warns(RuntimeWarning):
        P = top_basis(G, 3, old=old)
    assert torch.equal(P[1], old[1])
    assert torch.equal(P[::2], expected[::2])


def test_products_are_exact_and_the_setting_comes_back(monkeypatch):
    backend = torch.backends.mkldnn.matmul
    seen = []
    monkeypatch.setattr(
        factor, "_is_orthonormal", lambda P: seen.append(backend.fp32_precision) or True
    )
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        top_basis(gaussian(1, 5, 9), 2)
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert seen == ["ieee"]


# Moments: Adam.

ODD = [(3, 5, 7), (4, 3, 3), (7, 1, 5), (2, 8, 16), (5, 13, 17), (1, 1, 1)]
BETAS = {"beta1": 0.9, "beta2": 0.999}


@pytest.mark.parametrize("shape", ODD)
@dtypes
@pytest.mark.parametrize("reference", [False, True], ids=["torch", "reference"])
def test_adam_against_a_plain_loop(shape, dtype, reference):
    grads = [gaussian(*shape, dtype=dtype, seed=t) for t in range(6)]
    M, V = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    got = []
    for t, R in enumerate(grads, start=1):
        if reference:
            N, factor = adam_reference(R, M, V, t, **BETAS, eps=1e-3)
            N = N * factor
        else:
            N = adam(R, M, V, t, **BETAS, eps=1e-3)
        assert N.dtype == dtype and N.shape == R.shape
        got.append(N)
    want, want_M, want_V = oracle.adam([R.numpy() for R in grads], 0.9, 0.999, 1e-3, reference)
    near = 2e-6 if dtype == torch.float32 else 1e-14
    for N, expected in zip(got, want, strict=True):
        assert np.abs(N.numpy() - expected).max() <= near
    assert np.abs(M.numpy() - want_M).max() <= near
    assert np.abs(V.numpy() - want_V).max() <= near


@dtypes
def test_adam_is_the_step_of_torch_adam(dtype):
    weight = torch.nn.Parameter(torch.zeros(7, 9, dtype=dtype))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    M, V = torch.zeros(1, 7, 9, dtype=dtype), torch.zeros(1, 7, 9, dtype=dtype)
    for t in range(1, 9):
        weight.grad = gaussian(7, 9, dtype=dtype, seed=t)
        before = weight.detach().clone()
        optimizer.step()
        N = adam(weight.grad[None], M, V, t, beta1=0.8, beta2=0.95, eps=1e-6)
        near = 4e-6 if dtype == torch.float32 else 1e-14
        assert largest(before - weight.detach() - N[0]) <= near
    assert largest(optimizer.state[weight]["exp_avg_sq"] - V[0]) <= near


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([adam, lambda *a, **k: adam_reference(*a, **k)[0]]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["same", "bf16", "turned"]),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40)),
    st.integers(1, 10**7),
)
def test_adam_stack_has_the_bits_of_its_matrices(function, dtype, store, shape, t):
    R, M = gaussian(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=1)
    V = gaussian(*shape, dtype=dtype, seed=2).square()
    if store == "bf16":
        M, V = M.bfloat16(), V.bfloat16()
    if store == "turned":
        M, V = M.mT.contiguous().mT, V.mT.contiguous().mT
    parts = [[x[k : k + 1].clone() for x in (R, M, V)] for k in range(len(R))]
    singles = [function(*part, t, **BETAS, eps=1e-8) for part in parts]
    N = function(R, M, V, t, **BETAS, eps=1e-8)
    assert torch.equal(N, torch.cat(singles))
    assert torch.equal(M, torch.cat([part[1] for part in parts]))
    assert torch.equal(V, torch.cat([part[2] for part in parts]))


def test_adam_takes_any_strides_and_leaves_the_gradient():
    R = gaussian(2, 9, 5).mT
    before = R.clone()
    M, V = torch.zeros(2, 5, 9), torch.zeros(2, 5, 9)
    N = adam(R, M, V, 1, **BETAS, eps=1e-8)
    assert torch.equal(R, before)
    turned_M, turned_V = torch.zeros(2, 9, 5).mT, torch.zeros(2, 9, 5).mT
    transposed = adam(R, turned_M, turned_V, 1, **BETAS, eps=1e-8)
    assert largest(N - transposed) <= 1e-6 and largest(M - turned_M) <= 1e-7
    upright_M, upright_V = torch.zeros(2, 9, 5), torch.zeros(2, 9, 5)
    upright = adam(R.mT, upright_M, upright_V, 1, **BETAS, eps=1e-8)
    assert torch.equal(transposed, upright.mT) and torch.equal(turned_V, upright_V.mT)
    wide = torch.zeros(2, 5, 18)
    strided = adam(R, wide[..., ::2], torch.zeros(2, 5, 9), 1, **BETAS, eps=1e-8)
    assert largest(N - strided) <= 1e-6
    assert largest(wide[..., ::2] - M) <= 1e-7 and not wide[..., 1::2].any()


@pytest.mark.parametrize("function", [adam, adam_reference])
def test_adam_with_narrow_moments(function):
    R = gaussian(2, 5, 7)
    M, V = torch.zeros(2, 5, 7), torch.zeros(2, 5, 7)
    narrow_M, narrow_V = M.bfloat16(), V.bfloat16()
    N = function(R, M, V, 1, **BETAS, eps=1e-8)
    narrow = function(R, narrow_M, narrow_V, 1, **BETAS, eps=1e-8)
    if function is adam_reference:
        N, narrow = N[0], narrow[0]
    assert narrow.dtype == torch.float32 and narrow_M.dtype == torch.bfloat16
    assert largest(N - narrow) <= 2e-6 * largest(N)  # rounded when stored, not before
    assert torch.equal(narrow_M, M.bfloat16()) and torch.equal(narrow_V, V.bfloat16())


@pytest.mark.parametrize("t", [10**4, 10**6, 2**25 + 1])
def test_adam_long_runs(t):
    R, M, V = gaussian(1, 5, 7), gaussian(1, 5, 7, seed=1), torch.ones(1, 5, 7)
    want_M = 0.9 * M.double() + 0.1 * R.double()
    want_V = 0.999 * V.double() + 0.001 * R.double() ** 2
    N = adam(R, M, V, t, **BETAS, eps=1e-8)
    root = (want_V / (1 - 0.999**t)).sqrt()
    assert largest(N - want_M / (1 - 0.9**t) / (root + 1e-8)) <= 1e-6


def test_adam_allocates_the_direction_only():
    R, M, V = gaussian(1, 64, 64), torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    with Sizes() as sizes:
        adam(R, M, V, 1, **BETAS, eps=1e-8)
    assert sum(sizes.made) <= R.numel() + 1


# Moments: a change of basis, and averages.


def carry(policy, M, V, P_old, P_new, Q_old=None, Q_new=None, **clock):
    """Between dense bases; t = 5 where a test does not care."""
    change = DenseBasisChange(P_old, P_new, Q_old, Q_new)
    moments.carry_moments(policy, M, V, change, **{"t": 5, **clock})


POLICIES = [policy for policy in moments.MOMENT_POLICIES if policy != "match"]


def moments_of(K, r, n, dtype=torch.float32, seed=3):
    M = gaussian(K, r, n, dtype=dtype, seed=seed)
    return M, gaussian(K, r, n, dtype=dtype, seed=seed + 1).square()


@pytest.mark.parametrize("policy", ["keep", "rotate", "ldadam"])
@dtypes
def test_same_basis_changes_nothing(policy, dtype):
    P = bases(2, 9, 4, dtype)
    M, V = moments_of(2, 4, 6, dtype)
    before = M.clone(), V.clone()
    carry(policy, M, V, P, P.clone())
    near = 0 if policy == "keep" else 1e-5 if dtype == torch.float32 else 1e-13
    assert largest(M - before[0]) <= near and largest(V - before[1]) <= near


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_carried_second_moments_are_never_negative_and_first_ones_never_longer(
    policy, K, d, n, seed, both
):
    r, q = (d + 1) // 2, (n + 1) // 2
    M, V = moments_of(K, r, q if both else n, seed=seed)
    sides = [bases(K, d, r, seed=seed), bases(K, d, r, seed=seed + 9)]
    if both:
        sides += [bases(K, n, q, seed=seed), bases(K, n, q, seed=seed + 9)]
    lengths = M.norm(dim=(1, 2))
    carry(policy, M, V, *sides)
    assert (V >= 0).all()
    assert (M.norm(dim=(1, 2)) <= lengths * (1 + 1e-5)).all()


def test_signs_flip_the_first_moment_only():
    P = bases(2, 9, 4)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    M, V = moments_of(2, 4, 6)
    before = M.clone(), V.clone()
    carry("rotate", M, V, P, P * signs)
    assert largest(M - signs[:, None] * before[0]) <= 1e-5
    assert largest(V - before[1]) <= 1e-5


def test_permuted_columns_permute_the_moments():
    P = bases(2, 9, 4)
    order = torch.tensor([2, 0, 3, 1])
    M, V = moments_of(2, 4, 6)
    before = M.clone(), V.clone()
    carry("rotate", M, V, P, P[..., order])
    assert largest(M - before[0][:, order]) <= 1e-5
    assert largest(V - before[1][:, order]) <= 1e-5


@pytest.mark.parametrize("policy", ["rotate", "ldadam"])
def test_orthogonal_spans_forget(policy):
    Q = bases(2, 9, 8)
    M, V = moments_of(2, 4, 6)
    carry(policy, M, V, Q[..., :4], Q[..., 4:])
    assert largest(M) <= 1e-5 and largest(V) <= 1e-5


@pytest.mark.parametrize("policy", ["rotate", "ldadam"])
def test_turned_basis_of_one_span_lifts_to_the_same(policy):
    P = bases(2, 9, 4)
    P_new = P @ bases(2, 4, 4, seed=7)
    M, V = moments_of(2, 4, 6)
    old_lift = P @ M
    carry(policy, M, V, P, P_new)
    assert largest(P_new @ M - old_lift) <= 1e-5


@dtypes
@pytest.mark.parametrize("store", [None, torch.bfloat16], ids=["same", "bf16"])
def test_rotate_against_a_plain_loop(dtype, store):
    old, new = bases(2, 7, 3, dtype), bases(2, 7, 3, dtype, seed=5)
    M, V = (x.to(store or dtype) for x in moments_of(2, 3, 5, dtype))
    want = [oracle.rotated(*(x[k].tolist() for x in (M, V, old, new))) for k in range(2)]
    carry("rotate", M, V, old, new)
    near = 2e-2 if store else 1e-5 if dtype == torch.float32 else 1e-13
    for k in range(2):
        assert np.abs(M[k].double().numpy() - want[k][0]).max() <= near
        assert np.abs(V[k].double().numpy() - want[k][1]).max() <= near


def test_rotate_on_both_sides_is_one_side_after_the_other():
    P, P_new = bases(2, 9, 4, torch.float64), bases(2, 9, 4, torch.float64, seed=5)
    Q, Q_new = bases(2, 7, 3, torch.float64), bases(2, 7, 3, torch.float64, seed=6)
    M, V = moments_of(2, 4, 3, torch.float64)
    want_M, want_V = M.clone(), V.clone()
    carry("rotate", want_M, want_V, P, P_new)
    carry("rotate", want_M.mT, want_V.mT, Q, Q_new)
    carry("rotate", M, V, P, P_new, Q, Q_new)
    assert largest(M - want_M) <= 1e-13 and largest(V - want_V) <= 1e-13


@pytest.mark.parametrize("policy", ["rotate", "ldadam"])
def test_carry_stack_has_the_bits_of_its_matrices(policy):
    old, new = bases(3, 33, 9), bases(3, 33, 9, seed=5)
    M, V = moments_of(3, 9, 41)
    parts = [[x[k : k + 1].clone() for x in (M, V, old, new)] for k in range(3)]
    carry(policy, M, V, old, new)
    for k, part in enumerate(parts):
        carry(policy, *part)
        assert torch.equal(M[k], part[0][0]) and torch.equal(V[k], part[1][0])


@dtypes
@pytest.mark.parametrize("store", [None, torch.bfloat16], ids=["same", "bf16"])
@pytest.mark.parametrize("t", [1, 7])
def test_ldadam_against_a_plain_loop(dtype, store, t):
    old, new = bases(2, 7, 3, dtype), bases(2, 7, 3, dtype, seed=5)
    M, V = (x.to(store or dtype) for x in moments_of(2, 3, 5, dtype))
    start = [[x[k].tolist() for x in (M, V, old, new)] for k in range(2)]
    want = [oracle.ldadam(*part, t, 0.8, 0.95) for part in start]
    carry("ldadam", M, V, old, new, t=t, betas=(0.8, 0.95))
    near = 2e-2 if store else 1e-5 if dtype == torch.float32 else 1e-13
    for k in range(2):
        scale = max(1.0, np.abs(want[k][1]).max())
        assert np.abs(M[k].double().numpy() - want[k][0]).max() <= near
        assert np.abs(V[k].double().numpy() - want[k][1]).max() <= near * scale


def test_ldadam_on_both_sides_turns_mean_and_variance():
    P, P_new = bases(2, 9, 4, torch.float64), bases(2, 9, 4, torch.float64, seed=5)
    Q, Q_new = bases(2, 7, 3, torch.float64), bases(2, 7, 3, torch.float64, seed=6)
    M, V = moments_of(2, 4, 3, torch.float64)
    C, D, c1, c2 = P_new.mT @ P, Q_new.mT @ Q, 1 - 0.9**5, 1 - 0.999**5
    m, v = M / c1, V / c2
    mean = C @ m @ D.mT
    variance = (C * C) @ (v - m * m) @ (D * D).mT
    carry("ldadam", M, V, P, P_new, Q, Q_new)
    assert largest(M - c1 * mean) <= 1e-13
    assert largest(V - c2 * (variance + mean**2).abs()) <= 1e-12


def test_ldadam_with_signs_or_without_a_mean():
    P, signs = bases(2, 9, 4, torch.float64), torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    M, V = moments_of(2, 4, 6, torch.float64)
    before = M.clone(), V.clone()
    carry("ldadam", M, V, P, P * signs)
    assert largest(M - signs[:, None] * before[0]) <= 1e-12
    assert largest(V - before[1]) <= 1e-12
    P_new = bases(2, 9, 4, torch.float64, seed=8)
    M, V = torch.zeros_like(M), before[1].clone()
    carry("ldadam", M, V, P, P_new)
    assert largest(V - (P_new.mT @ P).square() @ before[1]) <= 1e-12


def test_ldadam_before_any_update_leaves_the_moments():
    M, V = moments_of(2, 4, 6)
    before = M.clone(), V.clone()
    carry("ldadam", M, V, bases(2, 9, 4), bases(2, 9, 4, seed=8), t=0)
    assert torch.equal(M, before[0]) and torch.equal(V, before[1])


@st.composite
def choices(draw):
    """Two ascending choices (K, r) of rows 0..m-1, and moments."""
    K, m = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    r = draw(st.integers(1, m))
    choice = st.permutations(range(m)).map(lambda order: sorted(order[:r]))
    rows = [[draw(choice) for _ in range(K)] for _ in range(2)]
    return m, *(torch.tensor(x, dtype=torch.int32) for x in rows), moments_of(K, r, 5)


def one_hot(index, m):
    return torch.nn.functional.one_hot(index.long(), m).float().mT


@settings(max_examples=60, deadline=None)
@given(choices(), st.sampled_from(["match", "rotate", "ldadam"]))
def test_match_is_the_rotation_of_one_hot_bases(problem, policy):
    m, old, new, (M, V) = problem
    want_M, want_V = M.clone(), V.clone()
    carry("rotate", want_M, want_V, one_hot(old, m), one_hot(new, m))
    lengths = M.norm(dim=(1, 2))
    before = M.clone(), V.clone()
    moments.carry_moments(policy, M, V, IndexBasisChange(old, new), t=3)
    assert torch.equal(M, want_M) and torch.equal(V, want_V)
    assert (V >= 0).all() and (M.norm(dim=(1, 2)) <= lengths).all()
    moments.carry_moments(policy, M, V, IndexBasisChange(new, new), t=3)
    assert torch.equal(M, want_M)
    for k in range(len(M)):
        for place, row in enumerate(new[k].tolist()):
            where = (old[k] == row).nonzero()
            expected = before[0][k, where[0, 0]] if len(where) else torch.zeros(5)
            assert torch.equal(M[k, place], expected)


def test_match_moves_integers_too_and_reset_and_keep_stay():
    change = IndexBasisChange(torch.tensor([[1, 4, 6]]).int(), torch.tensor([[0, 4, 6]]).int())
    age = torch.tensor([[[7], [8], [9]]], dtype=torch.int32)
    assert change.apply(age).flatten().tolist() == [0, 8, 9]
    assert change.apply(age).dtype == torch.int32 and age.flatten().tolist() == [7, 8, 9]
    M, V = moments_of(1, 3, 4)
    before = M.clone()
    moments.carry_moments("keep", M, V, change)
    assert torch.equal(M, before)
    moments.carry_moments("reset", M, V, change)
    assert not M.any() and not V.any()


def test_disjoint_choices_forget():
    M, V = moments_of(1, 2, 4)
    moments.carry_moments(
        "match", M, V, IndexBasisChange(torch.tensor([[0, 3]]), torch.tensor([[1, 2]]))
    )
    assert not M.any() and not V.any()


def test_match_needs_indices():
    P = bases(1, 5, 2)
    with pytest.raises(ValueError, match="use moments='rotate'"):
        carry("match", *moments_of(1, 2, 4), P, P)


def test_reset_and_bad_arguments():
    P = bases(1, 5, 2)
    M, V = moments_of(1, 2, 4)
    with pytest.raises(ValueError, match="keep, reset, rotate"):
        carry("forget", M, V, P, P)
    with pytest.raises(ValueError, match="Q_old"):
        carry("rotate", M, V, P, P, Q_old=P)
    carry("reset", M, V, P, P)
    assert not M.any() and not V.any()


def test_averages():
    B, G = gaussian(2, 5, 7), gaussian(2, 5, 7, seed=1)
    want = B + 0.05 * (G - B)
    before = G.clone()
    assert ema(B, G, 0.95) is B
    assert largest(B - want) <= 1e-6
    U = momentum_step(B, G, 0.95, nesterov=True)  # B takes G in once more
    assert largest(U - (G + 0.95 * (B - G))) <= 1e-6
    assert torch.equal(G, before)


# The kinds: one object each, all with the same operations.

DENSE = ("svd", "svd_full", "range", "power", "random")
INDEX = ("randk", "topk", "dct", "dct:l1")
every_kind = pytest.mark.parametrize("kind", [*DENSE, *INDEX])


def zeros(find, m, n, r, K=1, dtype=torch.float32):
    """State tensors before the first refresh."""
    slots = find.slots(m, r).values()
    return [torch.zeros(K, *slot.shape(m, n), dtype=slot.dtype or dtype) for slot in slots]


def found(kind, G, r, *, old=None, seed=0, t=1, indices=None, both=False):
    """The projector and its state after a refresh on G."""
    find = make_projector(kind, both=both)
    if old is None:
        old = zeros(find, *G.shape[-2:], r, len(G), torch.promote_types(G.dtype, torch.float32))
    rng = StackRNG(seed, indices or tuple(range(len(G))), t)
    return find, dict(zip(find.state_keys, find.find(G, *old, rng=rng), strict=True))


def dense(find, state, m, dtype=torch.float32):
    """P (K, m, r), whatever the kind."""
    first = next(iter(state.values()))
    K, r = len(first), first.shape[-1]
    return find.lift_block(state, torch.eye(r, dtype=dtype).expand(K, r, r).contiguous(), m)


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from([*DENSE, *INDEX]))
def test_every_kind_projects(problem, kind):
    G, r = problem
    m, n = G.shape[-2:]
    find, state = found(kind, G, r)
    P = dense(find, state, m, G.dtype)
    assert P.shape == (len(G), m, r) and P.dtype == G.dtype
    assert largest(P.mT @ P - torch.eye(r, dtype=G.dtype)) <= 1e-5
    x = gaussian(len(G), r, n, dtype=G.dtype)
    assert largest(find.project(state, find.lift_block(state, x, m)) - x) <= 1e-5 * (1 + largest(x))
    R = find.project(state, G)
    residual, scale = G - find.lift_block(state, R, m), G.norm()
    assert R.shape == (len(G), r, n) and largest(R - P.mT @ G) <= 1e-5 * scale
    assert largest(find.project(state, residual)) <= 1e-5 * scale
    assert abs((R / scale).norm() ** 2 + (residual / scale).norm() ** 2 - 1) <= 1e-5


@every_kind
@pytest.mark.parametrize("m, n, r", [(6, 17, 3), (24, 10, 4)])
def test_lift_writes_what_lift_block_says(kind, m, n, r):
    G = gaussian(2, m, n)
    find, state = found(kind, G, r)
    N = gaussian(2, r, n, seed=4)
    want, panel = find.lift_block(state, N, m), torch.zeros(2, m, n)
    term = find.lift(state, N, m)
    term.add_(panel, slice(None), slice(None), 1.0)
    assert largest(panel - want) <= 1e-6
    for k, i, j in (
        (slice(1, 2), slice(2, 5), slice(1, 4)),
        (slice(0, 2), slice(m - 2, m), slice(None)),
    ):
        assert largest(find.lift_block(state, N, m, k, i, j) - want[k, i, j]) <= 1e-6
    transposed = torch.zeros(2, n, m)
    term.mT.add_(transposed, slice(None), slice(None), 1.0)
    assert largest(transposed - want.mT) <= 1e-6


@pytest.mark.parametrize("kind", DENSE)
def test_both_sides(kind):
    G = planted(9, 14, [1.5**-i for i in range(9)])
    find, state = found(kind, G, 4, both=True)
    P, Q = state["basis"], state["basis_right"]
    assert P.shape == (1, 9, 4) and Q.shape == (1, 14, 4)
    for B in (P, Q):
        assert largest(B.mT @ B - torch.eye(4)) <= 1e-5
    R = find.project(state, G)
    assert largest(R - P.mT @ G @ Q) <= 1e-6
    panel = torch.zeros(1, 9, 14)
    find.lift(state, R, 9).add_(panel, slice(None), slice(None), 1.0)
    assert largest(panel - P @ R @ Q.mT) <= 1e-6
    part = find.lift_block(state, R, 9, slice(None), slice(2, 5), slice(3, 9))
    assert largest(part - panel[:, 2:5, 3:9]) <= 1e-6
    if kind != "random":
        best = sum(1.5 ** (-2 * i) for i in range(4))
        assert (R.norm() ** 2).item() >= (0.99 if kind == "range" else 1 - 1e-5) * best


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([*DENSE, *INDEX]), st.booleans(), st.booleans())
def test_stack_has_the_bits_of_its_matrices_for_every_kind(problem, kind, transposed, both):
    G, r = problem
    if transposed:
        G = G.mT.contiguous().mT
    both = both and kind in DENSE
    find, state = found(kind, G, r, both=both)
    again = found(kind, G, r, old=list(state.values()), t=2, both=both)[1]
    for k in range(len(G)):
        X = (G[k].mT.clone().mT if transposed else G[k].clone())[None]
        one = found(kind, X, r, indices=(k,), both=both)[1]
        two = found(kind, X, r, old=list(one.values()), t=2, indices=(k,), both=both)[1]
        for name in state:
            assert torch.equal(state[name][k], one[name][0])
            assert torch.equal(again[name][k], two[name][0])
        if not transposed:
            assert torch.equal(find.project(state, G)[k], find.project(one, X)[0])


@every_kind
@shapes
def test_strides_scales_and_the_gradient(m, n, r, kind):
    """A transposed view, any strides and any power of two give the bits of the plain matrix."""
    G = gaussian(1, m, n)
    before = G.clone()
    find, state = found(kind, G, r)
    sparse = torch.zeros(1, 2 * m, 3 * n)[:, ::2, ::3].copy_(G)
    others = [G.mT.contiguous().mT, sparse]
    if kind != "svd_full":
        others += [G * 2.0**40, G * 2.0**-40]
    for X in others:
        for name, value in found(kind, X, r)[1].items():
            assert torch.equal(value, state[name])
    find.lift_block(state, find.project(state, G), m)
    assert torch.equal(G, before)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_gradients_for_every_kind(kind, dtype):
    G = gaussian(2, 6, 17, dtype=dtype)
    for narrow, wide in zip(
        found(kind, G, 3)[1].values(), found(kind, G.float(), 3)[1].values(), strict=True
    ):
        assert narrow.dtype == wide.dtype and torch.equal(narrow, wide)


@every_kind
def test_full_rank_for_every_kind(kind):
    G = gaussian(2, 7, 12)
    find, state = found(kind, G, 7)
    assert (G - find.lift_block(state, find.project(state, G), 7)).norm() <= 1e-5 * G.norm()
    if kind not in INDEX:
        return
    assert state["index"].tolist() == [list(range(7))] * 2
    with pytest.raises(ValueError, match="rank must be from 1 to 7, got 8"):
        found(kind, G, 8)


@pytest.mark.parametrize("kind", ["power", "range"])
@pytest.mark.parametrize("power", [-140, 120], ids=["subnormal", "huge"])
def test_extreme_scales_of_sketches(kind, power):
    G = planted(6, 17, [1.5**-i for i in range(6)])
    extreme = (G.double() * 2.0**power).float()
    old = [top_basis(G, 3)]
    P = found(kind, extreme, 3, old=old)[1]["basis"]
    assert largest(span(P) - span(old[0])) <= 1e-2


@pytest.mark.parametrize("kind", [*DENSE, *INDEX])
def test_no_kind_but_the_full_svd_copies_the_gradient(kind):
    G = gaussian(1, 40, 4000)
    find, state = found(kind, G, 5)
    with AllocationCounter() as made:
        found(kind, G, 5, old=list(state.values()), t=2)
        find.lift(state, find.project(state, G), 40)
    limit = (5 + 8) * 4000 if kind == "range" else 5 * 4000  # the Gaussian matrix; R
    assert kind == "svd_full" or made.largest <= 4 * limit


def test_no_kind_touches_the_global_generator():
    before = torch.random.get_rng_state()
    for kind in PROJECTION_KINDS:
        state = found(kind, gaussian(1, 8, 11), 3)[1]
        found(kind, gaussian(1, 8, 11), 3, old=list(state.values()), t=2)
    assert torch.equal(before, torch.random.get_rng_state())


# range


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_range_meets_its_bound(exponent):
    """r + p columns without power iterations; cutting to r columns costs no more here."""
    sigma = [float(i + 1) ** -exponent for i in range(30)]
    G, r, p = planted(30, 40, sigma, torch.float64), 6, 4
    tail = math.sqrt(sum(s * s for s in sigma[r:]))
    bound = math.sqrt(1 + r / (p - 1)) * tail
    for kind, columns in (("range:0,0", r + p), (f"range:{p},0", r)):
        errors = []
        for seed in range(20):
            find, state = found(kind, G, columns, seed=seed)
            errors.append((G - find.lift_block(state, find.project(state, G), 30)).norm().item())
        assert sum(errors) / 20 <= bound


@dtypes
def test_power_iterations_help_on_average(dtype):
    G = planted(30, 40, [(i + 1) ** -0.5 for i in range(30)], dtype)
    means = []
    for q in range(4):
        energies = []
        for seed in range(20):
            find, state = found(f"range:4,{q}", G, 6, seed=seed)
            energies.append(find.project(state, G).norm().item() ** 2)
        means.append(sum(energies) / 20)
    best = sum(1 / (i + 1) for i in range(6))
    assert means == sorted(means)
    assert means[1] >= 0.9 * best and means[3] >= 0.99 * best


def test_range_of_low_rank_is_exact():
    for m, n in ((12, 31), (31, 12), (5, 5)):
        G = planted(m, n, [1.0, 0.7, 0.3])
        find, state = found("range", G, 5)
        assert (G - find.lift_block(state, find.project(state, G), m)).norm() <= 1e-5 * G.norm()


# power, and a lost direction


@dtypes
@pytest.mark.parametrize("probes", [0, 1, 8])
def test_power_gains_on_a_fixed_gradient(dtype, probes):
    G, kind = planted(30, 40, [(i + 1) ** -1.0 for i in range(30)], dtype), f"power:{probes}"
    best = sum((i + 1) ** -2.0 for i in range(6))
    state, energies = {"basis": bases(1, 30, 6, dtype)}, []
    for t in range(2, 14):
        find, state = found(kind, G, 6, old=list(state.values()), t=t)
        energies.append((find.project(state, G).norm() ** 2).item())
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    assert all(b >= a * (1 - slack) for a, b in itertools.pairwise(energies))
    assert energies[-1] >= 0.999 * best


@dtypes
@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
def test_a_top_singular_space_stays(dtype, m, n):
    G = planted(m, n, [1.5**-i for i in range(12)], dtype)
    P = top_basis(G, 4)
    rotated = P @ bases(1, 4, 4, dtype, seed=3)
    for start in (P, rotated):
        new = found("power", G, 4, old=[start], t=2)[1]["basis"]
        near = 1e-5 if dtype == torch.float32 else 1e-12
        assert largest(span(new) - span(P)) <= near
        assert largest(new - P) <= 100 * near  # columns too: ordered, signs fixed


def test_power_starts_from_a_truncated_svd_and_steps_from_the_old_basis():
    G = planted(9, 14, [1.3**-i for i in range(9)], torch.float64)
    assert torch.equal(found("power", G, 3)[1]["basis"], top_basis(G, 3))
    old = bases(1, 9, 3, torch.float64, seed=2)
    new = found("power:0", G, 3, old=[old])[1]["basis"]
    step = torch.tensor(oracle.power_step(G[0].numpy(), old[0].numpy()))
    assert largest(span(new[0]) - span(step)) <= 1e-8
    low = new[0].mT @ G[0]
    assert low.norm(dim=1).tolist() == sorted(low.norm(dim=1).tolist(), reverse=True)


@pytest.mark.parametrize("strength", [3.0, 30.0])
def test_power_finds_a_lost_direction_again(strength):
    """The old basis is orthogonal to the strongest direction: without probes it stays lost."""
    U, V = orthonormal(40, 40, seed=1), orthonormal(60, 40, seed=2)
    sigma = torch.tensor([strength] + [1.0] * 4 + [0.5] * 35, dtype=torch.float64)
    G, lost = ((U * sigma) @ V.T).float()[None], U[:, 0].float()
    steps = {}
    for kind in ("power:0", "power"):
        state = {"basis": U[:, 1:5].float().clone()[None]}
        for t in range(2, 6):
            state = found(kind, G, 4, old=list(state.values()), t=t)[1]
            if (state["basis"][0].mT @ lost).norm() > 0.99:
                steps.setdefault(kind, t - 1)
    assert steps.get("power", 9) <= 2
    assert "power:0" not in steps or strength > 3  # rounding alone may bring it back


def test_power_survives_deficient_gradients():
    for rank in (1, 3):
        G = planted(12, 20, [1.0, 0.5, 0.2][:rank])
        old = [bases(1, 12, 5)]
        for t in range(2, 6):
            find, state = found("power", G, 5, old=old, t=t)
            old = list(state.values())
        assert largest(old[0].mT @ old[0] - torch.eye(5)) <= 1e-5
        assert (G - find.lift_block(state, find.project(state, G), 12)).norm() <= 1e-3 * G.norm()


@pytest.mark.parametrize("kind", ["range", "power"])
def test_sketches_fall_back(monkeypatch, real_eigh, kind):
    G = planted(6, 17, [1.5**-i for i in range(6)])
    old = [bases(1, 6, 3)]
    expected = found(kind, G, 3, old=old)[1]["basis"]
    monkeypatch.setattr(torch.linalg, "eigh", spoiled(real_eigh, "raises"))
    P = found(kind, G, 3, old=old)[1]["basis"]
    assert P.dtype == torch.float32 and largest(P - expected) <= 1e-4
    monkeypatch.setattr(torch.linalg, "eigh", raiser)
    assert largest(span(found(kind, G, 3, old=old)[1]["basis"]) - span(top_basis(G, 3))) <= 1e-4
    monkeypatch.setattr(torch.linalg, "svd", raiser)
    with pytest.warns(RuntimeWarning, match="basis"):
        kept = found(kind, G, 3, old=old)[1]["basis"]
    assert torch.equal(kept, old[0])


# random, randk: draws

IN_A_NEW_PROCESS = """
import hashlib, torch
from stiefel.optimizers._toolkit.projectors import StackRNG, make_projector
torch.set_num_threads(1)
G = torch.arange(1.0, 2 * 9 * 14 + 1).reshape(2, 9, 14).sin()
for kind in ("random", "randk", "range", "power"):
    find = make_projector(kind)
    old = [torch.eye(9)[:, :3].expand(2, 9, 3).contiguous()]
    old = [torch.zeros(2, 3, dtype=torch.int32)] if kind == "randk" else old
    (x,) = find.find(G, *old, rng=StackRNG(7, (3, 4 + (2 << 40)), 201))
    print(hashlib.sha256(x.numpy().tobytes()).hexdigest())
"""


def test_draws_are_equal_in_a_new_process():
    own = io.StringIO()
    with contextlib.redirect_stdout(own):
        exec(IN_A_NEW_PROCESS, {})
    other = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, check=True
    )
    assert own.getvalue().split() == other.stdout.split()
    assert len(set(own.getvalue().split())) == 4


@pytest.mark.parametrize("kind", ["random", "randk", "range"])
def test_seed_matrix_and_refresh_decide(kind):
    G = gaussian(1, 40, 50)

    def drawn(**keys):
        return next(iter(found(kind, G, 5, **keys)[1].values()))

    first = drawn(seed=1, indices=(2,), t=3)
    assert torch.equal(first, drawn(seed=1, indices=(2,), t=3))
    for other in ({"seed": 2}, {"indices": (3,)}, {"indices": (2 + (1 << 40),)}, {"t": 4}):
        assert not torch.equal(first, drawn(**{"seed": 1, "indices": (2,), "t": 3, **other}))


def test_splitmix64_is_the_published_generator():
    """First outputs from state 0: each call hashes the state, which moves by a constant."""
    states = [k * 0x9E3779B97F4A7C15 % 2**64 for k in range(3)]
    assert [splitmix64(x) for x in states] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "randk"])
def test_the_mean_projector_is_a_multiple_of_the_identity(kind):
    d, r, draws = 6, 2, 500
    G = gaussian(1, d, 4).expand(draws, d, 4)
    find, state = found(kind, G, r)
    S = dense(find, state, d).double()
    S = S @ S.mT
    error = S.mean(0) - torch.eye(d) * r / d
    spread = S.std(0) / math.sqrt(draws)
    assert (error.abs() <= 5 * spread + 1e-6).all()


def test_fp32_and_fp64_draw_the_same_subspace():
    G = gaussian(2, 9, 12, dtype=torch.float64)
    wide = found("random", G, 4)[1]["basis"]
    narrow = found("random", G.float(), 4)[1]["basis"]
    assert wide.dtype == torch.float64 and largest(wide - narrow) <= 1e-5


# randk, topk: chosen rows


@pytest.mark.parametrize("kind", ["randk", "topk"])
@dtypes
def test_chosen_rows_come_back_bitwise(kind, dtype):
    G = gaussian(3, 9, 14, dtype=dtype)
    for X in (G, G.mT.contiguous().mT, G[:1]):
        find, state = found(kind, X, 4)
        back = find.lift_block(state, find.project(state, X), 9)
        for k, chosen in enumerate(state["index"].tolist()):
            rest = sorted(set(range(9)) - set(chosen))
            assert chosen == sorted(set(chosen)) and len(chosen) == 4
            assert torch.equal(back[k, chosen], X[k, chosen]) and not back[k, rest].any()


def test_randk_visits_every_row():
    G = gaussian(1, 20, 3).expand(60, 20, 3)
    index = found("randk", G, 3)[1]["index"]
    assert set(index.flatten().tolist()) == set(range(20))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_topk_takes_the_longest_rows(problem):
    G, r = problem
    find, state = found("topk", G, r)
    for k, X in enumerate(G.double() / largest(G)):
        share = find.project(state, G)[k].norm() ** 2 / G[k].norm() ** 2
        assert share >= r / G.shape[1] - 1e-5
        best = X.square().sum(1).sort(descending=True).values[:r].sum()
        taken = X[state["index"][k].long()].square().sum()
        assert taken == pytest.approx(best.item(), rel=1e-5)


def test_topk_ties_take_the_lowest_rows():
    G = torch.ones(1, 10, 4)
    assert found("topk", G, 3)[1]["index"].tolist() == [[0, 1, 2]]
    G[0, 7] = 2
    assert found("topk", G, 3)[1]["index"].tolist() == [[0, 1, 7]]
    scores = G[0].square().sum(1).tolist()
    assert oracle.choose(scores, 3) == [0, 1, 7]


# Names, options, state.


@pytest.mark.parametrize(
    "name, options",
    [
        ("range:5", {"oversample": 5, "iterations": 1}),
        ("range:5,2", {"oversample": 5, "iterations": 2}),
        ("power:0", {"probes": 0}),
        ("dct:l1", {"norm": "l1"}),
        ("dct", {"norm": "l2"}),
        ("svd_full", {"exact": True}),
    ],
)
def test_options_follow_a_colon(name, options):
    find = make_projector(name)
    assert {key: getattr(find, key) for key in options} == options
    assert find is make_projector(name) and hash(find) is not None


@pytest.mark.parametrize(
    "name", ["qr", "", "svd:3", "range:x", "range:1,2,3", "range:-1", "power:", "dct:l3", "topk:2"]
)
def test_names_that_mean_nothing(name):
    with pytest.raises(ValueError, match="projection"):
        make_projector(name)


@pytest.mark.parametrize("kind", INDEX)
def test_index_kinds_have_one_side(kind):
    with pytest.raises(ValueError, match="no second side"):
        make_projector(kind, both=True)


@every_kind
def test_state_as_the_table_says(kind):
    m, n, r = 20, 30, 5
    held = zeros(make_projector(kind), m, n, r)
    size = sum(x.numel() * x.element_size() for x in held)
    assert size == (4 * r if kind in INDEX else 4 * m * r)
    find, state = found(kind, gaussian(1, m, n), r)
    live = dict(zip(find.state_keys, held, strict=True))
    find.install(live, find.state_tensors(state))
    for name, value in live.items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name])


@every_kind
def test_overlap_is_the_product_of_the_bases(kind):
    m, n, r = 9, 14, 4
    first, second = gaussian(2, m, n), gaussian(2, m, n, seed=1)
    find, old = found(kind, first, r)
    new = found(kind, second, r, old=list(old.values()), t=2)[1]
    change = find.overlap(find.state_tensors(old), find.state_tensors(new))
    C = dense(find, new, m).mT @ dense(find, old, m)
    X = gaussian(2, r, 6, seed=3)
    assert change.permutes == (kind in INDEX) == find.permutes
    assert largest(change.apply(X) - C @ X) <= 1e-5
    assert largest(change.apply_squares(X) - (C * C) @ X) <= 1e-5
