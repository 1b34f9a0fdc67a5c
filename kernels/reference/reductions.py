"""Sums of squares and of powers, in plain torch.

The order of every sum is fixed by one matrix, so that a stack has the bits of its matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._stacks import Stack, stacked

SUM_SIDES = (None, "rows", "cols", "all")
# Where sums are taken in panels, of so many rows, or entries of a column-major matrix: they stay in
# the cache. Elsewhere one kernel sums without a temporary.
_PANEL_DEVICES = ("cpu",)
_SUM_PANEL_ROWS = 64
_SUM_PANEL_ENTRIES = 2**17
# From so many entries on torch divides a sum among threads, in an order that goes by the stack.
_SHARED_SUM_ENTRIES = 2**15


def squares(X: Stack, dim: int | None) -> Tensor:
    """Sums of squares, in an order that does not depend on how many matrices there are.

    Args:
        X: (K, m, n), any strides and floating dtype.
        dim: -1 for those of the rows, -2 for those of the columns, None for all entries.

    Returns:
        (K, m, 1), (K, 1, n) or (K, 1, 1), at least float32.

    Raises:
        ValueError: ``dim`` is none of the three.
    """
    return sums_of_squares(stacked(X), side_of(dim))


def power_sums(X: Stack, count: int) -> tuple[Tensor, Tensor]:
    """The norm of X and the sums of even powers of X / norm, which cannot overflow or vanish.

    Args:
        X: (K, m, n), any strides and floating dtype.
        count: How many powers, at least 1.

    Returns:
        norm: (K, 1, 1) float64.
        sums: (K, count) float64, the sum of (x / norm)^(2 j) for j = 1, ..., count: the first is 1,
            or 0 for zeros.
    """
    found = [_powers(x, count) for x in stacked(X)]
    if not found:
        empty = torch.empty(
            0, device=X.device if isinstance(X, Tensor) else "cpu", dtype=torch.float64
        )
        return empty.view(0, 1, 1), empty.view(0, count)
    norm = torch.stack([x[0] for x in found]).view(-1, 1, 1)
    return norm, torch.stack([torch.stack(x[1:]) for x in found])


def side_of(dim: int | None) -> str:
    """The name that ``momentum_step_`` has for the sums of squares along a dimension."""
    if dim not in (-1, -2, None):
        raise ValueError(f"dim must be -1, -2 or None, got {dim!r}")
    return "all" if dim is None else "rows" if dim == -1 else "cols"


def sums_of_squares(X: Tensor, which: str) -> Tensor:
    """Sums of squares of X (K, m, n) by their name: ``"rows"``, ``"cols"`` or ``"all"``."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    if X.numel() == 0:
        return X.sum({"rows": -1, "cols": -2}.get(which, (-2, -1)), keepdim=True)
    if which == "rows":
        return column_squares(X.mT).mT
    return column_squares(X) if which == "cols" else row_total(column_squares(X))


def _powers(X: Tensor, count: int) -> list[Tensor]:
    """The norm of X (m, n), and the sums, all float64 and of no dimension."""
    norm: Tensor = torch.linalg.vector_norm(X, dtype=torch.float64)
    q = (X.double() * norm.reciprocal().clamp(max=torch.finfo(torch.float64).max)).square_()
    power, found = q.clone(), [norm]
    for _ in range(count):
        found.append(power.sum())
        power.mul_(q)
    return found


def column_squares(X: Tensor) -> Tensor:
    """Sum of the squares of every column, without a copy of X: panels along the memory.

    Rows are added elementwise and pairwise, or columns one by one, so that nothing depends on how
    many matrices there are.

    Args:
        X: (K, m, n), any strides.

    Returns:
        (K, 1, n), at least fp32.
    """
    m = X.shape[-2]
    if X.device.type not in _PANEL_DEVICES:
        norms: Tensor = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
        return norms.square()
    if X.stride(-1) != 1 and X.stride(-2) == 1:  # columns along memory
        return _squares_along_memory(X)
    rows = min(m, _SUM_PANEL_ROWS)
    sums = X[:, :rows].square()
    for i in range(rows, m, rows):
        part = X[:, i : i + rows]
        # with a factor of 1 every entry is one multiply-add, wherever it lies
        sums[:, : part.shape[1]].addcmul_(part, part)
    return _pairwise_sum(sums)


def _squares_along_memory(X: Tensor) -> Tensor:
    """Sums of squares of columns (K, m, n) that lie along the memory, as (K, 1, n)."""
    K, m, n = X.shape
    if X.dtype == torch.float32 and n > 1:  # torch has a loop for each column then, of one order
        norms: Tensor = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
        return norms.square_()
    width = max(1, _SUM_PANEL_ENTRIES // max(1, K * m))
    starts = range(0, max(1, n), width)  # one panel of nothing where there are no columns
    return torch.cat([X[..., j : j + width].square().sum(-2, keepdim=True) for j in starts], -1)


def row_total(X: Tensor) -> Tensor:
    """Sum of a row as (K, 1, 1), in an order that does not depend on how many rows there are.

    Args:
        X: (K, 1, n).
    """
    K, _, n = X.shape
    X = X.contiguous()
    at_once = max(1, (_SHARED_SUM_ENTRIES - 1) // max(1, n))
    if X.device.type not in _PANEL_DEVICES or K <= at_once:
        return X.sum(-1, keepdim=True)
    return torch.cat([X[k : k + at_once].sum(-1, keepdim=True) for k in range(0, K, at_once)])


def _pairwise_sum(X: Tensor) -> Tensor:
    """Sum over the rows of X (K, m, n), which is used up: the lower half onto the upper one."""
    while (m := X.shape[-2]) > 1:
        half = (m + 1) // 2
        X[:, : m - half].add_(X[:, half:])
        X = X[:, :half]
    return X.clone() if m else X.sum(-2, keepdim=True)
