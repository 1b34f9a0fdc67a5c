"""Rows at one length, in plain torch: the references of the kernels of these names."""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import product
from .reductions import column_squares, row_total

ROW_MODES = ("inverse_eps", "inverse", "unit", "relative")
RELATIVE_FLOOR = 1e-2
"""Under "relative": what is added to the size of a row, in units of the root mean square size."""


def row_factors(squares: Tensor, mode: str, eps: float, rms: Tensor | None = None) -> Tensor:
    """What brings rows of these squared norms to norm 1; a zero row gets 0 where eps is 0.

    Args:
        squares: (K, m, 1).
        mode: ``"inverse_eps"`` 1 / (s + eps); ``"inverse"`` or ``"unit"`` 1 / max(s, eps);
            ``"relative"`` 1 / (s + 0.01 rms).
        eps: See mode.
        rms: (K, 1, 1), root mean square of all s, for ``"relative"``.

    Returns:
        (K, m, 1).
    """
    check_mode(mode)
    s = squares.sqrt()
    if mode == "relative":
        assert rms is not None
        return torch.where(rms > 0, (s + RELATIVE_FLOOR * rms).reciprocal_(), 0.0)
    s = s.add_(eps) if mode == "inverse_eps" else s.clamp_(min=eps)
    if eps == 0.0:
        return s.reciprocal_().masked_fill_(squares == 0, 0.0)
    return s.reciprocal_()


def row_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Every row of X divided by its norm; zero rows stay zero.

    Permuted rows give permuted results, bit for bit unless centred. Squares are summed in float32
    (float64 for float64): a row with entries above 1e19 becomes zero, and one of norm below 1e-19
    counts as zero beside eps.

    Args:
        X: (m, n) or (K, m, n), any strides and floating dtype; not changed.
        eps: What keeps small rows small, see mode (1e-8).
        mode: How rows of norm s are divided: ``"inverse_eps"`` (default) by s + eps;
            ``"inverse"`` or ``"unit"`` by max(s, eps); ``"relative"`` by s + 0.01 times the root
            mean square of all s of the matrix, without eps.
        centred: Whether the mean of the rows is subtracted before and after (False).

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    check_mode(mode)
    if X.ndim == 2:
        return row_norm(X[None], eps, mode, centred)[0]
    if X.numel() == 0:
        return torch.empty_like(X)
    m = X.shape[-2]
    Y = X.to(torch.promote_types(X.dtype, torch.float32))
    Y = Y - _mean(Y) if centred else Y
    squares = column_squares(Y.mT).mT
    rms = row_total(squares.mT).div_(m).sqrt_() if mode == "relative" else None
    by = row_factors(squares, mode, eps, rms)
    if not centred:
        return (Y * by).to(X.dtype)
    U = Y.mul_(by)  # Y is a tensor of its own
    U.sub_(_mean(U))
    return U.to(X.dtype)


def column_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Every column of X divided by its norm: :func:`row_norm` of the transpose.

    Args:
        X: (m, n) or (K, m, n), any strides and floating dtype; not changed.
        eps: As for :func:`row_norm`.
        mode: As for :func:`row_norm`.
        centred: Whether the mean of the columns is subtracted before and after (False).

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    return row_norm(X.mT, eps, mode, centred).mT


def check_mode(mode: str) -> None:
    """Raise ValueError unless this is one of ROW_MODES."""
    if mode not in ROW_MODES:
        raise ValueError(f"mode must be one of {', '.join(ROW_MODES)}, got {mode!r}")


def _mean(X: Tensor) -> Tensor:
    """The mean of the rows of X (K, m, n), as (K, 1, n)."""
    return product(X.new_ones(len(X), 1, X.shape[-2]), X).div_(X.shape[-2])
