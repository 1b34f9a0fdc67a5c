"""Symmetric products in the interpreter against float64."""

import pytest
import torch
from helpers.operands import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    close,
    gaussian,
    holes,
    laid,
    nothing_beside,
    unchanged,
)

from stiefel.kernels import reference
from stiefel.kernels.triton import symmetric
from stiefel.kernels.triton._launch import strides

NAN = float("nan")


def run(A, out, *, S=None, trace=None, only=None, alpha=1.0, beta=0.0, diagonal=0.0, BM=16):
    """The bare kernel with a result of ours, A A^T and the rest."""
    K, m, n = A.shape
    tiles = -(-m // BM)
    symmetric.symmetric_kernel[(tiles * (tiles + 1) // 2, K)](
        A, A, S, out, trace, only, m, n, *strides(A), *strides(A),
        *((0, 0, 0) if S is None else strides(S)), *strides(out), alpha, beta, diagonal,
        SOURCE=S is not None, TRACE=trace is not None, ONLY=only is not None, UPCAST=True,
        PRECISION="ieee", BM=BM, BK=16,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 45), (2, 1, 5)], ids=str)
def test_gram(shape, dtype):
    X = gaussian(*shape, dtype=dtype)
    S = symmetric.gram(X)
    close(S, X.double() @ X.double().mT, dtype)
    assert torch.equal(S, S.mT) and S.dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_takes_any_strides_and_touches_nothing_else(layout):
    for shape in ((33, 45), (3, 20, 17)):
        dense = gaussian(*shape)
        X, buffer = laid(dense, layout)
        with nothing_beside((X, buffer)):
            S = symmetric.gram(X)
        assert torch.equal(S, symmetric.gram(dense)) and torch.equal(X, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 33), (3, 40, 40)], ids=str)
def test_symmetric_poly_and_apply(shape, dtype):
    S = symmetric.gram(gaussian(*shape, dtype=dtype) / 8)
    (kept,) = unchanged(S)
    P = symmetric.symmetric_poly(S, 0.3, -0.2, 0.5)
    eye = torch.eye(shape[-1], dtype=torch.float64)
    close(P, 0.3 * S.double() - 0.2 * S.double() @ S.double() + 0.5 * eye, dtype)
    Q = symmetric.symmetric_apply(P, S, 1.5)
    close(Q, 1.5 * P.double() + P.double() @ S.double(), dtype, 2)
    assert torch.equal(P, P.mT) and torch.equal(Q, Q.mT) and torch.equal(S, kept)


def test_the_columns_of_a_tall_matrix():
    X = gaussian(45, 20)
    S = symmetric.gram(X.mT)  # strides 1 and 20
    close(S, X.double().mT @ X.double(), torch.float32)
    assert torch.equal(S, symmetric.gram(X.mT.contiguous()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_of_the_result_is_written_and_nothing_beside_it(layout, dtype):
    S = symmetric.gram(gaussian(2, 33, 20, dtype=dtype) / 8)
    out = holes((2, 33, 33), dtype, layout)
    with nothing_beside(out):
        run(S, out[0], S=S, alpha=-0.2, beta=0.3, diagonal=0.5)
    assert torch.equal(out[0], symmetric.symmetric_poly(S, 0.3, -0.2, 0.5))
    close(out[0], reference.symmetric_poly(S.double(), 0.3, -0.2, 0.5), dtype)


def test_the_bits_depend_on_the_matrix_alone():
    X = gaussian(3, 33, 45)
    S = symmetric.gram(X)
    assert torch.equal(S, symmetric.gram(X))
    assert all(torch.equal(symmetric.gram(X[k]), S[k]) for k in range(3))
    padded = symmetric.gram(torch.nn.functional.pad(X, (0, 19, 0, 15)))
    assert torch.equal(padded[:, :33, :33], S) and not padded[:, 33:].any()
    P = symmetric.symmetric_poly(padded, 0.3, -0.2)
    assert torch.equal(P[:, :33, :33], symmetric.symmetric_poly(S, 0.3, -0.2))


def test_empty_stacks_and_empty_sides():
    assert symmetric.gram(torch.empty(0, 5, 7)).shape == (0, 5, 5)
    assert symmetric.gram(torch.empty(2, 0, 7)).shape == (2, 0, 0)
    assert not symmetric.gram(torch.empty(2, 3, 0)).any()  # an empty sum
    assert symmetric.symmetric_poly(torch.empty(0, 5, 5), 1.0, 1.0).shape == (0, 5, 5)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_stays_in_its_matrix(bad):
    X = gaussian(3, 20, 33)
    X[1, 3, 5] = bad
    S = symmetric.gram(X)
    assert S[::2].isfinite().all() and not S[1, 3].isfinite().any() and not S[1, 3, 3].isfinite()
    P = symmetric.symmetric_poly(S, 1.0, 1.0, trace=torch.stack([x.trace() for x in S]))
    assert P[::2].isfinite().all() and P[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_division_by_the_trace_neither_overflows_nor_rounds(dtype, size):
    """The entries of S S reach 1e48, which float32 does not have."""
    X = gaussian(3, 20, 33)
    X = X / torch.linalg.matrix_norm(X, keepdim=True) * size
    S = (X @ X.mT).to(dtype)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)
    P = symmetric.symmetric_poly(S, 0.3, -0.2, trace=trace)
    close(P, reference.symmetric_poly(S.double(), 0.3, -0.2, trace=trace.double()), dtype)
    assert torch.equal(P, P.mT)
    power = 2.0**-30  # rounds nothing, so it must not be seen
    same = symmetric.symmetric_poly(S * power, 0.3, -0.2, trace=trace * power)
    assert size == 1e-12 or torch.equal(P, same)


def test_near_inverse_at_the_ends_of_float32():
    P = symmetric.symmetric_poly(torch.zeros(3, 4, 4), 1.0, 1.0, trace=torch.full((3,), 1e-30))
    assert not P.any()
    S = torch.full((1, 1, 1), 1e38)
    close(symmetric.symmetric_poly(S, 0.3, -0.2, trace=S.view(1)), 0.1 + 0 * S, torch.float32)


def test_only_some_are_computed():
    S = symmetric.gram(gaussian(3, 20, 33) / 8)
    out, only = holes((3, 20, 20)), torch.tensor([0.0, 1.0, 0.0])
    run(S, out[0], S=S, only=only, alpha=-0.2, beta=0.3)
    assert out[0][::2].isnan().all()
    P = symmetric.symmetric_poly(S, 0.3, -0.2, only=only.view(3, 1, 1))
    assert torch.equal(P[1], out[0][1]) and torch.equal(
        P[1], symmetric.symmetric_poly(S[1], 0.3, -0.2)
    )
    assert torch.equal(symmetric.gram(S, only=only)[1], symmetric.gram(S[1]))


def test_offsets_beyond_int32():
    """Steps of 2^30 elements, in a buffer of which only these pages exist."""
    step = 2**30
    try:
        buffer = torch.empty(2 * step + 2**16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system does not promise memory that is not used")
    X = buffer.as_strided((3, 5, 9), (step, 9, 1))
    X.copy_(gaussian(3, 5, 9))
    assert torch.equal(symmetric.gram(X), symmetric.gram(X.contiguous()))
    X = buffer.as_strided((1, 3, 9), (0, step, 1))
    X.copy_(gaussian(1, 3, 9))
    assert torch.equal(symmetric.gram(X), symmetric.gram(X.contiguous()))
    assert torch.equal(symmetric.gram(X.mT), symmetric.gram(X.mT.contiguous()))
    out = buffer.as_strided((1, 3, 3), (0, step, 1), 64)
    run(X, out)
    assert torch.equal(out, symmetric.gram(X))


def test_factors_must_be_of_one_dtype():
    with pytest.raises(ValueError, match=r"factors of torch.float32 and torch.float16"):
        symmetric.symmetric_apply(torch.ones(4, 4), torch.ones(4, 4).half(), 1.0)


def test_operations_are_nodes():
    S, tests = torch.eye(5).expand(2, 5, 5), ("test_schema", "test_faketensor")
    torch.library.opcheck(symmetric._gram, (gaussian(2, 5, 9), None), test_utils=tests)
    args = (S, S, S, torch.ones(2), torch.ones(2), 1.0, 0.5, 0.0)
    torch.library.opcheck(symmetric._symmetric, args, test_utils=tests)
