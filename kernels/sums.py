"""Sums of squares that do not depend on how many matrices there are, in plain torch."""

import torch
from torch import Tensor

# Where sums are taken in panels, of so many rows, or entries of a turned matrix: they stay in the
# cache. Elsewhere one kernel sums without a temporary.
_PANELLED = ("cpu",)
_ROWS = 32
_PANEL = 2**17


def column_squares(X: Tensor) -> Tensor:
    """Sum of the squares of every column, without a copy of X: panels along the memory.

    Products are rounded before they are added, and rows are added elementwise and pairwise, so that
    nothing depends on how many matrices there are.

    Args:
        X: (K, m, n), any strides.

    Returns:
        (K, 1, n), at least fp32.
    """
    K, m, n = X.shape
    if X.device.type not in _PANELLED:
        norms: Tensor = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
        return norms.square()
    if X.stride(-1) != 1 and X.stride(-2) == 1:  # turned: one sum along the memory per column
        width = max(1, _PANEL // (K * m))
        starts = range(0, n, width)
        return torch.cat([X[..., j : j + width].square().sum(-2, keepdim=True) for j in starts], -1)
    rows = min(m, _ROWS)
    sums = X[:, :rows].square()
    for i in range(rows, m, rows):
        part = X[:, i : i + rows].square()
        sums[:, : part.shape[1]].add_(part)
    return _folded(sums)


def total(X: Tensor) -> Tensor:
    """Sum of a row (K, 1, n) as (K, 1, 1), pairwise like :func:`column_squares`."""
    return _folded(X.mT.clone()) if X.device.type in _PANELLED else X.sum(-1, keepdim=True)


def _folded(X: Tensor) -> Tensor:
    """Sum over the rows of X (K, m, n), which is used up: the lower half onto the upper one."""
    while (m := X.shape[-2]) > 1:
        half = (m + 1) // 2
        X[:, : m - half].add_(X[:, half:])
        X = X[:, :half]
    return X.clone()
