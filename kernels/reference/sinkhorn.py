"""Rows and columns of every matrix of a stack at equal norms, in plain torch: the references.

Squares are taken of X / max|X|, so that they neither overflow nor vanish, and all sums are matrix
products: a stack has the bits of its matrices one by one. Beside small matrices the vectors of ones
or factors are two equal rows on the left. So no side is 1, and a stack can be one call (see
``matmul``); two columns on the right of it take five times as long on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matmul import product

SINKHORN_FLOOR = 1e-16
"""Smallest mean square to divide by, relative to that of the whole matrix: 1e-8 squared."""
_LARGE = 2**16
"""Entries from which matrix-vector products are made one matrix at a time on a CPU."""
_LINE_ENTRIES = 16
"""Entries of a cache line, in float32; in float64 two lines."""


def sinkhorn(X: Tensor, iterations: int = 5) -> Tensor:
    """Alternately scales each row to norm sqrt(n) and each column to norm sqrt(m).

    Columns come last, so they are exact and the root mean square of the result is 1. A row or
    column below 1e-8 of the root mean square is not scaled up to full length. Scaling by both norms
    of the same X at once does not converge: it swaps diag(4, 1, 1/4) with its inverse for ever.
    Source: Gradient Multi-Normalization, arXiv 2502.06742.

    Args:
        X: (K, m, n), any strides and floating dtype; not changed.
        iterations: how many times, at least 1 (5).

    Returns:
        (K, m, n), a new tensor of X's dtype; zero where X is.
    """
    # The factors of rows and columns are found first, by two matrix-vector products per iteration
    # on the elementwise square; X itself is read once. Half precision is worked on in float32.
    dtype, X = X.dtype, X.to(torch.promote_types(X.dtype, torch.float32))
    m, n = X.shape[-2:]
    if X.numel() == 0:
        return torch.empty_like(X, dtype=dtype)
    S, inverse = _squares(X)  # (K, m, n), (K, 1, 1)
    mean = _mean(S)
    # squared factors; the mean square is 1 now
    columns = mean.reciprocal().repeat(1, _copies(S), n)
    rows, floor = columns, SINKHORN_FLOOR * mean
    for _ in range(iterations):
        rows = _times(columns, S.mT).div_(n).clamp_(min=SINKHORN_FLOOR).reciprocal_()  # (K, c, m)
        columns = _times(rows, S).div_(m)
        columns = columns.maximum(floor).reciprocal_()  # (K, c, n)
    rows, columns = rows[:, :1].mT.sqrt(), columns[:, :1].sqrt()
    # the squares are spent, so their memory takes the result
    U = torch.mul(X, rows.mul_(inverse), out=S).mul_(columns)
    return U.to(dtype)


def equal_rows(X: Tensor) -> Tensor:
    """Scales each row of every matrix to norm sqrt(n); see :func:`sinkhorn`.

    Args:
        X: (K, m, n), any strides and floating dtype; not changed.

    Returns:
        (K, m, n), a new tensor of X's dtype; zero where X is.
    """
    dtype, X = X.dtype, X.to(torch.promote_types(X.dtype, torch.float32))
    if X.numel() == 0:
        return torch.empty_like(X, dtype=dtype)
    S, inverse = _squares(X)
    ones = S.new_ones(len(S), _copies(S), S.shape[-1])
    rows = _times(ones, S.mT)[:, :1].mT.div(S.shape[-1])  # (K, m, 1)
    return (X * rows.maximum(SINKHORN_FLOOR * _mean(S)).rsqrt_().mul_(inverse)).to(dtype)


def _copies(S: Tensor) -> int:
    """How many equal rows stand for a vector that is multiplied by every matrix of S (K, m, n).

    One product of all matrices takes two, since with a single row it would take them one by one in
    another way. Large matrices are taken one by one, where a matrix-vector product is twice as
    fast, if they fill whole cache lines: it rounds by where its matrix begins.
    """
    entries = S[0].numel()
    return 1 if S.is_cpu and entries >= _LARGE and entries % _LINE_ENTRIES == 0 else 2


def _times(v: Tensor, S: Tensor) -> Tensor:
    """The products of v (K, c, m), equal rows, with every matrix of S (K, m, n), as (K, c, n)."""
    if v.shape[1] != 1:
        return product(v, S)
    found = [torch.mv(X.mT, x[0]) for x, X in zip(v, S, strict=True)]
    return torch.stack(found).unsqueeze(1) if len(found) > 1 else found[0].view(1, 1, -1)


def _squares(X: Tensor) -> tuple[Tensor, Tensor]:
    """The squares of X / max|X|, and 1 / max|X| (K, 1, 1)."""
    low, high = X.amin((-2, -1), keepdim=True), X.amax((-2, -1), keepdim=True)
    largest = torch.maximum(-low, high)
    # the reciprocal of a subnormal overflows, so what is that small counts as zero
    inverse = torch.where(largest > 4 * torch.finfo(X.dtype).tiny, largest, math.inf).reciprocal_()
    return (X * inverse).square_(), inverse


def _mean(S: Tensor) -> Tensor:
    """The mean of every matrix (K, 1, 1), and 1 for a zero one."""
    K, m, n = S.shape
    rows = _times(S.new_ones(K, _copies(S), n), S.mT)  # (K, c, m)
    rows = rows[:, :1].expand(-1, 2, -1)
    mean = product(rows, S.new_ones(K, m, 2))[:, :1, :1].div(m * n)
    return torch.where(mean > 0, mean, torch.ones_like(mean))
