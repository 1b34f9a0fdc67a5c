"""Bases and moments against naive float64; the numbers are those of the properties they check."""

import math
import warnings

import numpy as np
import projector_oracles as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stiefel.optimizers import moments, projectors
from stiefel.optimizers.moments import adam, adam_reference, carry, ema, nesterov
from stiefel.optimizers.projectors import fix_signs, rank_of, top_bases, top_basis

KINDS = projectors.KINDS
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
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@pytest.fixture(scope="module", autouse=True)
def small_panels():
    """More than one panel of columns and one block of rows already for 40 x 203.

    One thread: the matrices are small, and a busy machine makes many threads ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projectors, "_PANEL", 2**10)
        patch.setattr(projectors, "_BLOCK", 16)
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


def gaussian(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


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
@given(problems(), st.sampled_from(KINDS))
def test_projectors_01_to_04_orthogonal_projection(problem, kind):
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
@given(problems(), st.sampled_from(KINDS))
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
def test_projectors_06_strides_do_not_matter(m, n, r, kind):
    G = gaussian(1, m, n)
    turned = G.mT.contiguous().mT
    sparse = torch.zeros(1, 2 * m, 3 * n)[:, ::2, ::3].copy_(G)
    expected = top_basis(G, r, kind)
    assert torch.equal(top_basis(turned, r, kind), expected)
    assert torch.equal(top_basis(sparse, r, kind), expected)


@pytest.mark.parametrize("both", [False, True])
def test_gram_makes_no_copy_of_the_gradient(both):
    G = gaussian(1, 40, 4000)
    with Sizes() as sizes:
        top_bases(G, 5) if both else top_basis(G, 5)
    assert max(sizes.made) <= (4000 * 5 if both else 64 * 40)


@pytest.mark.parametrize("m, n", [(300, 4099), (4099, 300)])
def test_sizes_of_real_layers(monkeypatch, m, n):
    monkeypatch.setattr(projectors, "_PANEL", 2**20)
    monkeypatch.setattr(projectors, "_BLOCK", 256)
    G = gaussian(1, m, n)
    P, Q = top_bases(G, 20)
    best = torch.linalg.svdvals(G)[0, :20].norm()
    for basis, low in ((P, P.mT @ G), (Q, G @ Q)):
        assert largest(basis.mT @ basis - torch.eye(20)) <= 1e-5
        assert low.norm() == pytest.approx(best.item(), rel=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_projectors_07_narrow_input_is_worked_on_in_fp32(kind, dtype):
    G = gaussian(2, 6, 17, dtype=dtype)
    P = top_basis(G, 3, kind)
    assert P.dtype == torch.float32
    assert torch.equal(P, top_basis(G.float(), 3, kind))


@shapes
@kinds
def test_projectors_10_gradient_is_not_modified(m, n, r, kind):
    G = gaussian(1, m, n)
    before = G.clone()
    top_bases(G, r, kind)
    assert torch.equal(G, before)


@pytest.mark.parametrize(
    "rank, d, r",
    [(1, 8, 1), (1.0, 8, 8), (0.25, 8, 2), (128, 8, 8), (0.001, 8, 1), (0.5, 7, 4), (5, 1, 1)],
)
def test_projectors_11_rank_is_clamped(rank, d, r):
    assert rank_of(rank, d) == r
    assert rank_of(np.int64(3), 8) == 3


@pytest.mark.parametrize("rank", [0, -1, 0.0, -0.5, 1.5, True, float("nan"), "8", None])
def test_projectors_11_rank_that_means_nothing(rank):
    with pytest.raises(ValueError, match="rank"):
        rank_of(rank, 8)


@kinds
@dtypes
def test_projectors_11_full_rank_leaves_no_residual(kind, dtype):
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
def test_projectors_12_power_of_two_changes_no_bit(m, n, r, power):
    G = gaussian(1, m, n)
    for P, scaled in zip(top_bases(G, r), top_bases(G * 2.0**power, r), strict=True):
        assert torch.equal(P, scaled)


@pytest.mark.parametrize("power", [-140, 120], ids=["subnormal", "huge"])
def test_projectors_12_extreme_scales(power):
    G = planted(6, 17, [1.5**-i for i in range(6)])
    extreme = (G.double() * 2.0**power).float()  # squares are far out of range
    assert largest(span(top_basis(extreme, 3)) - span(top_basis(G, 3))) <= 1e-2


@shapes
@dtypes
def test_projectors_13_captured_energy_and_agreement(m, n, r, dtype):
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
def test_projectors_14_exact_rank_is_captured(m, n, kind, dtype):
    for sigma, near in (([1.0, 0.7, 0.3, 0.05], 1e-5), ([1.0, 0.1, 1e-4, 1e-5], 1e-3)):
        G = planted(m, n, sigma, dtype)
        for X, P in zip((G, G.mT), top_bases(G, 4, kind), strict=True):
            assert (X - P @ (P.mT @ X)).norm() <= near * X.norm()


@kinds
@dtypes
@pytest.mark.parametrize("m, n", [(8, 19), (19, 8), (9, 9)])
def test_projectors_15_basis_turns_with_the_gradient(m, n, kind, dtype):
    G = planted(m, n, [1.5**-i for i in range(min(m, n))], torch.float64)
    Q1, Q2 = orthonormal(m, m, seed=5), orthonormal(n, n, seed=6)
    P = top_basis(G.to(dtype), 4, kind)
    turned = top_basis((Q1 @ G @ Q2).to(dtype), 4, kind)
    near = 1e-3 if dtype == torch.float32 else 1e-8
    assert largest(span(turned) - span(Q1 @ P.double())) <= near


@kinds
@pytest.mark.parametrize("m, n", [(8, 19), (19, 8), (9, 9)])
def test_projectors_16_signs_are_reproducible(m, n, kind):
    G = planted(m, n, [1.5**-i for i in range(min(m, n))])
    P = top_basis(G, 4, kind)
    assert torch.equal(top_basis(G.clone(), 4, kind), P)
    shuffled = G[..., torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    assert largest(top_basis(shuffled, 4, kind) - P) <= 1e-3
    assert largest(top_basis(-G, 4, kind) - P) <= 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**20))
def test_projectors_16_sign_rule(m, r, seed):
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
    projectors._warn_once.cache_clear()
    yield torch.linalg.eigh
    projectors._warn_once.cache_clear()


def spoiled(real, how):
    """eigh that goes wrong in fp32 only."""

    def eigh(K):
        if K.dtype == torch.float64:
            return real(K)
        if how == "raises":
            raiser()
        w, V = real(K)
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
    monkeypatch.setattr(torch.linalg, "eigh", lambda K: calls.append(1) or real_eigh(K))
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


def test_projectors_08_nothing_works_keeps_the_old_basis(monkeypatch, real_eigh):
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


def test_projectors_08_one_failure_leaves_the_others(monkeypatch, real_eigh):
    G, old = gaussian(3, 6, 17), bases(3, 6, 3)
    expected = top_basis(G, 3)
    calls = []

    def eigh(K):
        calls.append(K.dtype)
        if len(calls) in (2, 3):  # both Gram attempts at the second matrix
            raiser()
        return real_eigh(K)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "svd", raiser)
    with pytest.warns(RuntimeWarning):
        P = top_basis(G, 3, old=old)
    assert torch.equal(P[1], old[1])
    assert torch.equal(P[::2], expected[::2])


def test_products_are_exact_and_the_setting_comes_back(monkeypatch):
    backend = torch.backends.mkldnn.matmul
    seen = []
    monkeypatch.setattr(projectors, "_sound", lambda P: seen.append(backend.fp32_precision) or True)
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
    turned = adam(R, turned_M, turned_V, 1, **BETAS, eps=1e-8)
    assert largest(N - turned) <= 1e-6 and largest(M - turned_M) <= 1e-7
    upright_M, upright_V = torch.zeros(2, 9, 5), torch.zeros(2, 9, 5)
    upright = adam(R.mT, upright_M, upright_V, 1, **BETAS, eps=1e-8)
    assert torch.equal(turned, upright.mT) and torch.equal(turned_V, upright_V.mT)
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


def moments_of(K, r, n, dtype=torch.float32, seed=3):
    M = gaussian(K, r, n, dtype=dtype, seed=seed)
    return M, gaussian(K, r, n, dtype=dtype, seed=seed + 1).square()


@pytest.mark.parametrize("policy", ["keep", "rotate"])
@dtypes
def test_projectors_26_same_basis_changes_nothing(policy, dtype):
    P = bases(2, 9, 4, dtype)
    M, V = moments_of(2, 4, 6, dtype)
    before = M.clone(), V.clone()
    carry(policy, M, V, P, P.clone())
    near = 0 if policy == "keep" else 1e-5 if dtype == torch.float32 else 1e-13
    assert largest(M - before[0]) <= near and largest(V - before[1]) <= near


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(moments.CARRY_POLICIES),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_projectors_27_28_never_negative_never_longer(policy, K, d, n, seed, both):
    r, q = (d + 1) // 2, (n + 1) // 2
    M, V = moments_of(K, r, q if both else n, seed=seed)
    sides = [bases(K, d, r, seed=seed), bases(K, d, r, seed=seed + 9)]
    if both:
        sides += [bases(K, n, q, seed=seed), bases(K, n, q, seed=seed + 9)]
    lengths = M.norm(dim=(1, 2))
    carry(policy, M, V, *sides)
    assert (V >= 0).all()
    assert (M.norm(dim=(1, 2)) <= lengths * (1 + 1e-5)).all()


def test_projectors_29_signs_flip_the_first_moment_only():
    P = bases(2, 9, 4)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    M, V = moments_of(2, 4, 6)
    before = M.clone(), V.clone()
    carry("rotate", M, V, P, P * signs)
    assert largest(M - signs[:, None] * before[0]) <= 1e-5
    assert largest(V - before[1]) <= 1e-5


def test_projectors_30_permuted_columns_permute_the_moments():
    P = bases(2, 9, 4)
    order = torch.tensor([2, 0, 3, 1])
    M, V = moments_of(2, 4, 6)
    before = M.clone(), V.clone()
    carry("rotate", M, V, P, P[..., order])
    assert largest(M - before[0][:, order]) <= 1e-5
    assert largest(V - before[1][:, order]) <= 1e-5


def test_projectors_31_orthogonal_spans_forget():
    Q = bases(2, 9, 8)
    M, V = moments_of(2, 4, 6)
    carry("rotate", M, V, Q[..., :4], Q[..., 4:])
    assert largest(M) <= 1e-5 and largest(V) <= 1e-5


def test_projectors_33_turned_basis_of_one_span_lifts_to_the_same():
    P = bases(2, 9, 4)
    P_new = P @ bases(2, 4, 4, seed=7)
    M, V = moments_of(2, 4, 6)
    lifted = P @ M
    carry("rotate", M, V, P, P_new)
    assert largest(P_new @ M - lifted) <= 1e-5


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


def test_rotate_stack_has_the_bits_of_its_matrices():
    old, new = bases(3, 33, 9), bases(3, 33, 9, seed=5)
    M, V = moments_of(3, 9, 41)
    parts = [[x[k : k + 1].clone() for x in (M, V, old, new)] for k in range(3)]
    carry("rotate", M, V, old, new)
    for k, part in enumerate(parts):
        carry("rotate", *part)
        assert torch.equal(M[k], part[0][0]) and torch.equal(V[k], part[1][0])


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
    U = nesterov(G, B, 0.95)
    assert largest(U - (G + 0.95 * (B - G))) <= 1e-6
    assert torch.equal(G, before)
