"""The normalized copy in the interpreter against float64."""

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
)

from stiefel.kernels import reference
from stiefel.kernels.triton import normalize as normalise
from stiefel.kernels.triton._launch import strides
from stiefel.kernels.triton.normalize import normalized, padded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 45)], ids=str)
def test_normalised(shape, dtype):
    X = gaussian(*shape, dtype=dtype).view(-1, *shape[-2:])
    for to in DTYPES:
        Y = normalized(X, to, 1.01)
        assert Y.dtype == to and Y.is_contiguous() and all(s % 16 == 0 for s in Y.shape[1:])
        close(Y, reference.normalized(X.double(), torch.float64, 1.01), to)
        inside = torch.zeros(Y.shape, dtype=torch.bool)
        inside[:, : shape[-2], : shape[-1]] = True
        assert not Y[~inside].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_nothing_beside(layout):
    X = gaussian(2, 33, 45)
    expected = normalized(X, torch.bfloat16)
    x = laid(X, layout)
    with nothing_beside(x):
        Y = normalized(x[0], torch.bfloat16)
    close(Y, expected, torch.bfloat16)
    assert torch.equal(x[0], X) and (layout == "columns" or torch.equal(Y, expected))
    assert torch.equal(padded(x[0], torch.float32), reference.padded(X, torch.float32))
    transposed = normalized(x[0].mT, torch.bfloat16)  # dense along its own rows, whatever X is
    assert transposed.is_contiguous() and torch.equal(transposed, Y.mT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_of_the_copy_is_written(layout):
    X, out = gaussian(2, 33, 45), holes((2, 48, 48), torch.float16, layout)
    inverse = torch.tensor([2.0, 0.5])
    with nothing_beside(out):
        normalise.cast_kernel[(3 * 2, 2)](
            X, out[0], inverse, 33, 45, *strides(X), *strides(out[0]), 48, 48, 2, TYPE=None,
            ALIGNED=False, SCALED=True, BM=16, BN=32,
        )  # fmt: skip
    assert torch.equal(out[0][:, :33, :45], (X * inverse.view(2, 1, 1)).half())
    assert not out[0][:, 33:].any() and not out[0][:, :, 45:].any()


def test_the_floor_of_the_norm():
    X = gaussian(3, 20, 33)
    X[0] = 0
    X[1] *= 1e-10
    Y = normalized(X, torch.float32, eps=1e-3)
    assert not Y[0].any()
    close(Y[1, :20, :33], X[1] / 1e-3, torch.float32)
    assert abs(float(Y[2].norm()) - 1) < 1e-6
    assert normalized(X, torch.float32, eps=0.0)[0, :20, :33].isnan().all()  # as 0 / 0 is


@pytest.mark.parametrize("size", [1e18, 1e25, 1e36])
def test_squares_that_overflow(size):
    X = gaussian(2, 20, 33)
    X[0] *= size
    close(normalized(X, torch.bfloat16), reference.normalized(X, torch.float64), torch.bfloat16)


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-30, 1e-37])
def test_squares_that_vanish(size):
    X = gaussian(2, 20, 33)
    X[0] *= size
    tiny = torch.finfo(torch.float32).tiny
    Y = normalized(X, torch.bfloat16, eps=tiny)
    close(Y, reference.normalized(X, torch.float64, eps=tiny), torch.bfloat16)


def test_what_is_not_finite():
    X = gaussian(4, 20, 33)
    X[1, 3, 5], X[2, 3, 5] = float("nan"), float("inf")
    Y = normalized(X, torch.float16)
    assert Y[::3].isfinite().all() and Y[1, :20, :33].isnan().all() and Y[2, 3, 5].isnan()
    assert not Y[:, 20:].any() and not Y[:, :, 33:].any()  # padding stays zero


def test_the_bits_depend_on_the_matrix_alone():
    X = gaussian(3, 33, 45)
    Y = normalized(X, torch.float32)
    assert torch.equal(Y, normalized(X, torch.float32))
    assert all(torch.equal(normalized(X[k : k + 1], torch.float32)[0], Y[k]) for k in range(3))
    wide = torch.nn.functional.pad(X, (0, 3, 0, 15))
    assert torch.equal(normalized(wide, torch.float32), Y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_is_as_its_stack(dtype):
    X = gaussian(3, 20, 48, dtype=dtype)
    lists = ([x.clone() for x in X], [laid(x, "padded")[0] for x in X])
    for given in lists:
        assert torch.equal(normalized(given, torch.bfloat16), normalized(X, torch.bfloat16))
        assert torch.equal(padded(given, torch.float32), padded(X, torch.float32))
    transposed = normalized([x.mT.contiguous().mT for x in X], torch.bfloat16)
    close(transposed, normalized(X, torch.bfloat16), torch.bfloat16)


def test_empty_float64_and_unequal():
    assert normalized(torch.empty(0, 5, 7), torch.float16).shape == (0, 16, 16)
    assert padded(torch.empty(2, 0, 7), torch.float16).shape == (2, 0, 16)
    X = gaussian(2, 5, 7, dtype=torch.float64)
    assert torch.equal(normalized(X, torch.float64), reference.normalized(X, torch.float64))
    with pytest.raises(ValueError, match="the matrices of X must agree in shape"):
        normalized([torch.ones(2, 3), torch.ones(3, 2)], torch.float16)


def test_offsets_beyond_int32():
    """Steps of 2^30 elements, in a buffer of which only these pages exist."""
    step = 2**30
    try:
        buffer = torch.empty(2 * step + 2**16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system does not promise memory that is not used")
    for shape, steps in (((3, 5, 9), (step, 9, 1)), ((1, 3, 9), (0, step, 1))):
        X = buffer.as_strided(shape, steps)
        X.copy_(gaussian(*shape))
        expected = normalized(X.contiguous(), torch.float32)
        assert torch.equal(normalized(X, torch.float32), expected)


def test_the_operation_is_a_node():
    tests = ("test_schema", "test_faketensor")
    for Xs in ([gaussian(2, 5, 9)], [gaussian(5, 9), gaussian(5, 9)]):
        args = (Xs, torch.bfloat16, 1.0, 1e-7, 16, True)
        torch.library.opcheck(normalise._normalized, args, test_utils=tests)
