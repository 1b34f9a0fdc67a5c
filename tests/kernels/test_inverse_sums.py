"""Sums of shifted inverses in blocks, and what else stacks of small matrices share on a CPU."""

import pytest
import torch

from stiefel.kernels import polar_factor, rotated, sinkhorn
from stiefel.kernels.polar import inverse_sums
from stiefel.kernels.polar.coefficients import ZOLO, ZOLO_LARGE
from stiefel.kernels.polar.inverse_sums import inverse_factors, sum_of_inverses, uses_blocks

DTYPES = (torch.float32, torch.float64)


def orthogonal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q


def grams(K, m, condition, seed=0):
    """Symmetric matrices (K, m, m) of norm about one and this condition number, in float64."""
    U = orthogonal(K, m, m, seed=seed)
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), m, dtype=torch.float64)
    return (U * values) @ U.mT


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_blocks_are_as_accurate_as_cholesky(dtype):
    """Up to the condition number that the smallest shift of two poles allows."""
    for m in (16, 32, 48, 64, 96, 112, 128):
        for condition in (1.0, 1e2, 3e4):
            S = grams(3, m, condition)
            exact = torch.linalg.inv(S)
            M, worked = inverse_factors(S.to(dtype, copy=True))
            L = torch.linalg.cholesky(S.to(dtype))
            error = (M.mT.double() @ M.double() - exact).norm() / exact.norm()
            known = (torch.cholesky_inverse(L).double() - exact).norm() / exact.norm()
            assert worked.all()
            assert torch.equal(M, M.tril())
            assert error <= 8 * known + 4 * torch.finfo(dtype).eps, (m, condition)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16), (2, 64), (2, 112), (2, 128), (384,), (413,), (640,)])
def test_a_sum_is_that_of_the_inverses(shape, dtype):
    """Of a stack, and of one large matrix whose side is no multiple of the panels."""
    m, step = shape[-1], ZOLO if shape[-1] <= 256 else ZOLO_LARGE
    S = 0.7 * grams(shape[0] if len(shape) == 2 else 1, m, 1e7)
    S = S if len(shape) == 2 else S[0]
    norm = torch.linalg.matrix_norm(S, keepdim=True)
    I = torch.eye(m, dtype=torch.float64)
    parts = (
        a * torch.linalg.inv(S / norm + c * I)
        for a, c in zip(step.weights, step.shifts, strict=True)
    )
    exact = step.scale * norm.rsqrt() * sum(parts, I)
    X = S.to(dtype, copy=True)
    assert uses_blocks(X)
    T, worked = sum_of_inverses(X, step, norm.to(dtype))
    assert worked.shape == S.shape[:-2] and worked.all()
    bound = 4e-3 if dtype == torch.float32 else 1e-11
    assert (T.double() - exact).norm() <= bound * exact.norm()
    # what counts is the product with the matrix, where the large inverses meet small numbers
    assert ((T.double() - exact) @ S).norm() <= bound / 4 * (exact @ S).norm()


def test_what_cannot_be_factorized_is_seen():
    """One matrix alone, whatever block the entry lies in."""
    for i, j in ((0, 0), (5, 40), (63, 63)):
        S = grams(3, 64, 10.0).float()
        S[1, i, j] = S[1, j, i] = torch.nan
        _, worked = sum_of_inverses(S, ZOLO, torch.ones(3, 1, 1))
        assert worked.tolist() == [True, False, True]
    S = grams(1, 400, 10.0)[0].float()
    S[390, 2] = S[2, 390] = torch.nan
    assert not sum_of_inverses(S, ZOLO_LARGE, torch.ones(1, 1))[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_has_the_bits_of_its_matrices(dtype):
    """Across several batches, with sides that fill cache lines and sides that do not."""
    generator = torch.Generator().manual_seed(0)
    for K, m, n in (
        (70, 64, 64),
        (9, 96, 256),
        (9, 256, 96),
        (3, 128, 128),
        (5, 33, 65),
        (3, 5, 7),
    ):
        X = torch.randn(K, m, n, generator=generator, dtype=dtype)
        for fn in (lambda Y: polar_factor(Y, "zolo"), lambda Y: polar_factor(Y, "ns5"), sinkhorn):
            S = fn(X)
            for k in (0, 1, K // 2, K - 1):
                assert torch.equal(S[k : k + 1], fn(X[k : k + 1].clone())), (m, n, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_of_a_stack_have_the_bits_of_each(dtype):
    """With columns that are open, nearly open, and zero matrices among them."""
    for K, m in ((40, 64), (7, 16), (5, 24), (4, 7)):
        A = orthogonal(K, m, m, seed=1).to(dtype) + 0.1
        A[0, :, 1] = A[0, :, 0]
        A[1, :, m // 2] = 0
        A[2, :, 2] = A[2, :, 1] * (1 + 4 * torch.finfo(dtype).eps)
        A[-1] = 0
        old = orthogonal(K, m, m, seed=2).to(dtype)
        Q = rotated(A, old)
        for k in range(K):
            assert torch.equal(Q[k : k + 1], rotated(A[k : k + 1], old[k : k + 1])), (m, k)


def test_the_gate_depends_on_shape_alone():
    least = inverse_sums._PANELS_FROM
    for K in (1, 100):
        assert uses_blocks(torch.empty(K, 16, 16))
    assert uses_blocks(torch.empty(least, least))
    assert not uses_blocks(torch.empty(least - 1, least - 1))
    assert not uses_blocks(torch.empty(1, 64, 64, device="meta"))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(4, 33, 65), (3, 65, 33), (1, 400, 900), (2, 900, 400), (2, 200, 300), (1, 512, 512)]
)
def test_a_factor_may_take_the_place_of_its_matrix(shape, dtype):
    """With the same bits; X stays as it is unless that is allowed, or is not contiguous."""
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = X.to(dtype)
    X[0] *= 1e-15  # the squares of one matrix leave float32
    for method in ("zolo", "ns5", "eigh"):
        Y, Z = X.clone(), X.mT.contiguous().mT
        O = polar_factor(X, method)
        assert torch.equal(polar_factor(Y, method, overwrite=True), O)
        assert torch.equal(X, Z)
        if method == "zolo":  # the others need X to the end
            polar_factor(Z, method, overwrite=True)
            assert torch.equal(Z, X)
            assert torch.equal(Y, O)


def test_a_matrix_that_is_not_finite_is_nan_in_its_place():
    for shape in ((3, 40, 70), (2, 400, 500)):
        X = torch.randn(shape)
        X[1, 3, 5] = torch.inf
        O = polar_factor(X, "zolo")
        assert O[1].isnan().all() and O[0].isfinite().all()
        assert torch.equal(polar_factor(X, "zolo", overwrite=True)[0], O[0])
