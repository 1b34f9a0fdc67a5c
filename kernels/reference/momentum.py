"""Momentum, and sums over the step that is made of it, in plain torch.

Wherever a stack (K, m, n) is taken, a list of K matrices (m, n) of equal strides is too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._stacks import Stack, stacked
from .reductions import SUM_SIDES, power_sums, sums_of_squares

MOMENTUM_KINDS = ("ema", "sum")


def momentum_step_(
    M: Stack, G: Stack, momentum: float, *, nesterov: bool = False, kind: str = "ema",
    squares: str | None = None, finite: Tensor | None = None,
) -> tuple[Stack, Tensor | None]:  # fmt: skip
    """Update a momentum buffer by a gradient, in place, and return the step U made of both.

    "ema": M <- M + (1 - momentum) (G - M) and U = G + momentum (M - G) if nesterov, else M.
    "sum": M <- momentum M + G and U = G + momentum M if nesterov, else M.

    Args:
        M: The buffer (K, m, n), or a list of K matrices, changed in place. A buffer narrower than G
            is updated in G's precision and rounded only when it is stored.
        G: The gradient, as M, not changed. A gradient narrower than M is widened.
        momentum: Decay of M.
        nesterov: Whether U looks ahead by one gradient (False).
        kind: ``"ema"`` (default) or ``"sum"``.
        squares: Which sums of squares of U are wanted: None (default), of its ``"rows"`` (K, m, 1),
            of its ``"cols"`` (K, 1, n), or of ``"all"`` entries (K, 1, 1).
        finite: None (default), or flags (K,), or (1,) for all matrices. Where a flag is 0, M of
            that matrix does not change.

    Returns:
        U: M itself if nesterov is False and no dtype is wider than M's; else a new (K, m, n) in the
            wider dtype of the two. Undefined where the flag is 0.
        sums: At least float32; None if not wanted.

    Raises:
        ValueError: ``kind`` or ``squares`` is unknown.
    """
    check_momentum_names(kind, squares)
    X, g = stacked(M), stacked(G)
    work = torch.promote_types(X.dtype, g.dtype)
    old = X.clone() if finite is not None else None
    moved, g = X.to(work), g.to(work)
    if kind == "ema":
        moved.lerp_(g, 1 - momentum)
        U = g.lerp(moved, momentum) if nesterov else moved
    else:
        moved = (moved if momentum == 1.0 else moved.mul_(momentum)).add_(g)
        U = g.add(moved, alpha=momentum) if nesterov else moved
    sums = None if squares is None else sums_of_squares(U, squares)
    if moved is not M or finite is not None:
        _put_back(M, moved, old, finite)
    return M if U is X else U, sums


def momentum_power_sums_(
    M: Stack, G: Stack, momentum: float, count: int, *, nesterov: bool = False, kind: str = "ema",
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`momentum_step_`, and :func:`power_sums` of the step U, which is not returned.

    Args:
        M: As for :func:`momentum_step_`.
        G: As for :func:`momentum_step_`.
        momentum: As for :func:`momentum_step_`.
        count: As for :func:`power_sums`.
        nesterov: As for :func:`momentum_step_` (False).
        kind: As for :func:`momentum_step_` ("ema").
        finite: As for :func:`momentum_step_` (None).

    Returns:
        What :func:`power_sums` returns for U.
    """
    U, _ = momentum_step_(M, G, momentum, nesterov=nesterov, kind=kind, finite=finite)
    return power_sums(U, count)


def check_momentum_names(kind: str, sides: str | None) -> None:
    """Raise ValueError unless ``momentum_step_`` knows both names."""
    if kind not in MOMENTUM_KINDS:
        raise ValueError(f"kind must be 'ema' or 'sum', got {kind!r}")
    if sides not in SUM_SIDES:
        raise ValueError(f"squares must be None, 'rows', 'cols' or 'all', got {sides!r}")


def _put_back(to: Stack, new: Tensor, old: Tensor | None, finite: Tensor | None) -> None:
    """Store the new buffer, and the old one of matrices whose flag is 0."""
    if finite is not None and old is not None:
        new = torch.where(finite.reshape(-1, 1, 1) != 0, new.to(old.dtype), old)
    for i, place in enumerate([to] if isinstance(to, Tensor) else to):
        place.copy_(new if isinstance(to, Tensor) else new[i])
