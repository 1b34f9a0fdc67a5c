"""Rows and columns of every matrix of a stack at equal norms, in plain torch: the references.

Squares are taken of X / max|X|, so that they neither overflow nor vanish, and all sums are matrix
products: a stack has the bits of its matrices one by one. The vectors of ones or factors are two
equal rows on the left of a matrix. So no side is 1, and a stack can be one call (see ``matmul``);
two columns on the right of it take five times as long on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matmul import product

SINKHORN_FLOOR = 1e-16
"""Smallest mean square to divide by, relative to that of the whole matrix: 1e-8 squared."""


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
    # squared factors, each of them twice as two equal rows; the mean square is 1 now
    columns = mean.reciprocal().repeat(1, 2, n)
    rows = columns
    for _ in range(iterations):
        rows = product(columns, S.mT).div_(n).clamp_(min=SINKHORN_FLOOR).reciprocal_()  # (K, 2, m)
        columns = product(rows, S).div_(m)
        columns = columns.maximum(SINKHORN_FLOOR * mean).reciprocal_()  # (K, 2, n)
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
    ones = S.new_ones(len(S), 2, S.shape[-1])
    rows = product(ones, S.mT)[:, :1].mT.div(S.shape[-1])  # (K, m, 1)
    return (X * rows.maximum(SINKHORN_FLOOR * _mean(S)).rsqrt_().mul_(inverse)).to(dtype)


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
    rows = product(S.new_ones(K, 2, n), S.mT)  # (K, 2, m)
    mean = product(rows, S.new_ones(K, m, 2))[:, :1, :1].div(m * n)
    return torch.where(mean > 0, mean, torch.ones_like(mean))
