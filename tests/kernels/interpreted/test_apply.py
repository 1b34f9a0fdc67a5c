"""The last product of a polynomial step in the interpreter against float64."""

import importlib

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
from stiefel.kernels.triton._launch import strides

apply = importlib.import_module("stiefel.kernels.triton.scale_and_apply")


def run(X, P, out, a, alpha=1.0, *, trace=None, only=None):
    """The bare kernel with a result of ours."""
    K, m, n = X.shape
    apply.apply_kernel[(-(-m // 16) * -(-n // 32), K)](
        P, X, out, trace, only, m, n, *strides(P), *strides(X), *strides(out), a, alpha,
        TRACE=trace is not None, ONLY=only is not None, UPCAST=True, PRECISION="ieee", BM=16,
        BN=32, BK=16,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 45)], ids=str)
def test_scale_and_apply(shape, dtype):
    X, P = gaussian(*shape, dtype=dtype), gaussian(*shape[:-1], shape[-2], dtype=dtype)
    kept = unchanged(X, P)
    Y = apply.scale_and_apply(X, P, 3.4, -0.7)
    close(Y, reference.scale_and_apply(X.double(), P.double(), 3.4, -0.7), dtype)
    assert Y.dtype == dtype and torch.equal(X, kept[0]) and torch.equal(P, kept[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_nothing_beside(layout):
    X, P = gaussian(2, 20, 45), gaussian(2, 20, 20)
    expected = apply.scale_and_apply(X, P, 3.4)
    x, p, out = laid(X, layout), laid(P, layout), holes(X.shape, X.dtype, layout)
    with nothing_beside(x, p, out):
        run(x[0], p[0], out[0], 3.4)
    assert torch.equal(out[0], expected) and torch.equal(x[0], X) and torch.equal(p[0], P)
    assert torch.equal(apply.scale_and_apply(x[0], p[0], 3.4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_division_by_the_root_of_the_trace(dtype, size):
    X, P = gaussian(3, 20, 33).mul_(size).to(dtype), gaussian(3, 20, 20, dtype=dtype)
    trace = X.double().square().sum((-2, -1))
    expected = reference.scale_and_apply(X.double(), P.double(), 3.4, trace=trace)
    close(apply.scale_and_apply(X, P, 3.4, trace=trace.float()), expected, dtype)


def test_the_bits_depend_on_the_matrix_alone():
    X, P = gaussian(3, 20, 45), gaussian(3, 20, 20)
    Y = apply.scale_and_apply(X, P, 3.4)
    assert torch.equal(Y, apply.scale_and_apply(X, P, 3.4))
    assert all(torch.equal(apply.scale_and_apply(X[k], P[k], 3.4), Y[k]) for k in range(3))
    wide, square = (
        torch.nn.functional.pad(A, (0, by, 0, 12)) for A, by in ((X, 19), (P, 12))
    )  # fmt: skip
    padded = apply.scale_and_apply(wide, square, 3.4)
    assert torch.equal(padded[:, :20, :45], Y) and not padded[:, 20:].any()


def test_the_order_of_tiles_leaves_none_out():
    """More bands of tiles than one, the last one lower."""
    X, P = gaussian(1, 150, 40), gaussian(1, 150, 150) / 16
    out = holes((1, 150, 40))[0]
    run(X, P, out, 3.4)
    close(out, 3.4 * X.double() + P.double() @ X.double(), torch.float32, 2)


def test_only_some_are_computed():
    X, P = gaussian(3, 20, 33), gaussian(3, 20, 20)
    out = holes((3, 20, 33))[0]
    run(X, P, out, 3.4, only=torch.tensor([0.0, 1.0, 0.0]))
    Y = apply.scale_and_apply(X, P, 3.4)
    assert out[::2].isnan().all() and torch.equal(out[1], Y[1])
    subset = apply.scale_and_apply(X, P, 3.4, only=torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(subset[1], Y[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_column(bad):
    X, P = gaussian(3, 20, 33), gaussian(3, 20, 20)
    X[1, 3, 5] = bad
    good = apply.scale_and_apply(X, P, 0.0).isfinite()
    assert good[::2].all() and not good[1, :, 5].any() and good[1].sum() == 20 * 32


def test_empty_stacks_and_unlike_factors():
    assert apply.scale_and_apply(torch.empty(0, 5, 7), torch.empty(0, 5, 5), 1.0).shape == (0, 5, 7)
    assert apply.scale_and_apply(torch.empty(2, 5, 0), torch.empty(2, 5, 5), 1.0).numel() == 0
    with pytest.raises(ValueError, match=r"factors of torch.float32 and torch.bfloat16"):
        apply.scale_and_apply(torch.ones(4, 7), torch.ones(4, 4).bfloat16(), 1.0)


def test_offsets_beyond_int32():
    """Steps of 2^30 elements, in a buffer of which only these pages exist."""
    step = 2**30
    try:
        buffer = torch.empty(2 * step + 2**16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system does not promise memory that is not used")
    P = gaussian(3, 5, 5, dtype=torch.float16)
    for shape, steps in (((3, 5, 9), (step, 9, 1)), ((1, 3, 9), (0, step, 1))):
        X = buffer.as_strided(shape, steps)
        X.copy_(gaussian(*shape))
        p = P[: shape[0], : shape[1], : shape[1]]
        expected = apply.scale_and_apply(X.contiguous(), p, 2.0)
        assert torch.equal(apply.scale_and_apply(X, p, 2.0), expected)
        out = buffer.as_strided(shape, steps, 64)
        run(X, p, out, 2.0)
        assert torch.equal(out, expected)


def test_the_operation_is_a_node():
    args = (gaussian(2, 5, 9), gaussian(2, 5, 5), torch.ones(2), torch.ones(2), 1.0, 0.5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(apply._apply, args, test_utils=tests)
