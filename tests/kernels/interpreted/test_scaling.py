"""Rows and columns at equal norms, in the interpreter."""

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
)

from stiefel.kernels import reference as plain

scaling = importlib.import_module("stiefel.kernels.triton.sinkhorn")


LONG = (9, 200)
"""Lines that no program of the interpreter's tiles holds, and so are read in parts."""
OPS = torch.ops.stiefel
NAN = float("nan")


def ours(X, iterations):
    return scaling.sinkhorn(X, iterations) if iterations else scaling.equal_rows(X)


def theirs(X, iterations, dtype=torch.float64):
    X = X.to(dtype)
    return plain.sinkhorn(X, iterations) if iterations else plain.equal_rows(X)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_equal_norms(iterations, dtype):
    few = [(33, 45), LONG, LONG[::-1]]
    for m, n in [*SHAPES, *few[1:]] if dtype == torch.float32 else few:
        X = gaussian(1, m, n, dtype=dtype)
        for Y in (X, X.mT.contiguous().mT):
            U = ours(Y, iterations)
            assert U.dtype == dtype and U.stride() == torch.empty_like(Y).stride()
            close(U, theirs(X, iterations), dtype, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("iterations", [0, 2])
def test_any_strides(iterations, layout):
    for shape in ((3, 20, 17), (1, 5, 150)):
        dense = gaussian(*shape)
        X, buffer = laid(dense, layout)
        out, around = holes(shape, layout=layout)
        with nothing_beside((X, buffer), (out, around)):
            U = ours(X, iterations)
            scaling._scaled(X, out, iterations)
        close(U, theirs(dense, iterations), torch.float32, 4)
        assert torch.equal(X, dense) and torch.equal(out, U)
        assert torch.equal(U, ours(X, iterations))  # as in the first run
        if layout != "columns":
            assert torch.equal(U, ours(dense, iterations))


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38, 1e-36])
def test_neither_overflows_nor_vanishes(scale):
    X = gaussian(2, 9, 20).div_(5).clamp_(-1, 1)
    for Y in (X, X.mT.contiguous().mT):
        for iterations in (0, 2):
            U = ours(Y * scale, iterations)
            close(U, theirs(X, iterations), torch.float32, 4)
            torch.testing.assert_close(
                U, theirs(Y * scale, iterations, torch.float32), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("transposed", [False, True])
def test_zeros_and_tiny_rows_and_columns(transposed):
    X = gaussian(3, 9, 20)
    X[0, 2], X[0, :, 3], X[1] = 0.0, 0.0, 0.0
    X[2, 4], X[2, :, 5] = X[2, 4] * 1e-12, X[2, :, 5] * 1e-13
    X = X.mT.contiguous().mT if transposed else X
    for iterations in (0, 1, 3):
        U = ours(X, iterations)
        assert not U[1].any() and not U[0, 2].any() and not U[0, :, 3].any()
        torch.testing.assert_close(U, theirs(X, iterations, torch.float32), rtol=2e-5, atol=1e-6)
    assert not ours(X * 1e-44, 2).any()  # all subnormal counts as zero
    assert torch.equal(U[2], ours(X[2:], 3)[0])


def test_rows_and_columns_in_turn():
    X = torch.diag(torch.tensor([4.0, 1.0, 0.25]))[None]
    torch.testing.assert_close(scaling.sinkhorn(X), 3**0.5 * torch.eye(3)[None])
    U = scaling.sinkhorn(gaussian(2, 20, 33))
    torch.testing.assert_close(U.square().sum(-2), torch.full((2, 33), 20.0))


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_shows(bad):
    X = gaussian(2, 9, 20)
    X[1, 4, 5] = bad
    for Y in (X, X.mT.contiguous().mT):
        for iterations in (0, 2):
            U = ours(Y, iterations)
            assert U[1, 4, 5].isnan() and torch.equal(U[0], ours(Y[:1], iterations)[0])


def test_a_stack_has_the_bits_of_its_matrices():
    for X in (gaussian(3, 33, 45), gaussian(2, 150, 9), gaussian(2, 9, 150)):
        for Y in (X, X.mT.contiguous().mT):
            U = scaling.sinkhorn(Y, 2)
            assert all(torch.equal(U[k], scaling.sinkhorn(Y[k], 2)) for k in range(len(Y)))


def test_nothing_to_do():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        for iterations in (0, 5):
            assert ours(torch.empty(shape), iterations).shape == shape
            assert theirs(torch.empty(shape), iterations).shape == shape


def test_offsets_beyond_int32():
    X = gaussian(1, 9, 20)
    assert torch.equal(ours(X.expand(4, 9, 20), 2), ours(X, 2).expand(4, 9, 20))
    wide = torch.empty(3 * 2**30, dtype=torch.bfloat16)  # untouched pages take no memory
    for shape, stride in (((3, 4, 20), (2**30, 64, 1)), ((1, 4, 20), (0, 3 * 2**28, 1))):
        for transposed in (False, True):
            Y = wide.as_strided(shape, stride)
            Y.copy_(gaussian(*shape))
            Y = Y.mT if transposed else Y
            for iterations in (0, 1):
                U = ours(Y, iterations)
                close(U, theirs(Y, iterations), torch.bfloat16)


def test_operations_are_what_torch_expects():
    check = {"test_utils": ("test_schema", "test_faketensor")}
    for X in (gaussian(2, 5, 9), gaussian(2, 9, 5).mT, gaussian(1, 5, 9, dtype=torch.bfloat16)):
        torch.library.opcheck(OPS.sinkhorn.default, (X, 2), **check)


def test_each_operation_is_one_node():
    found = []

    def recorded(graph, _):
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    X = gaussian(2, 5, 9)
    both = torch.compile(
        lambda X: scaling.equal_rows(scaling.sinkhorn(X, 2)), fullgraph=True, backend=recorded
    )(X)
    assert torch.equal(both, scaling.equal_rows(scaling.sinkhorn(X, 2)))
    assert len(found) == 2 and all("sinkhorn" in str(target) for target in found)
