"""A whole step of RowNorm, in plain torch."""

from __future__ import annotations

from torch import Tensor

from .momentum import momentum_step_
from .rounding import Rounding
from .row_norm import check_mode, row_factors
from .scaled_add import scaled_add_


def row_step_(
    W: Tensor, M: Tensor, G: Tensor, momentum: float, eps: float, mode: str, keep: float,
    alpha: float, control: Tensor | None = None, nesterov: bool = False, *,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """A whole step of RowNorm, in place: momentum, row norms and the write.

    M <- M + (1 - momentum) (G - M); U = G + momentum (M - G) if nesterov, else M;
    W_i <- keep W_i + alpha U_i / |U_i|, where mode and eps define |U_i|.

    Args:
        W: (K, m, n), any strides.
        M: (K, m, n), the buffer. A buffer narrower than G is rounded only when it is stored.
        G: (K, m, n), not changed. A gradient narrower than M is widened.
        momentum: Decay of M.
        eps: As for :func:`row_norm`.
        mode: As for :func:`row_norm`, but not ``"relative"``, which needs all rows first.
        keep: Multiplies W.
        alpha: Multiplies the rows of length 1.
        control: None (default), or (K, 3) float32 with a row [flag, keep, alpha] for each matrix,
            which replaces the arguments keep and alpha. Where the flag is 0, W and M of that matrix
            do not change.
        nesterov: Whether U looks ahead by one gradient (False).
        rounding: How a weight of low precision is rounded; None (default): to nearest.

    Raises:
        ValueError: ``mode`` is unknown or ``"relative"``.
    """
    check_step(mode)
    finite = None if control is None else control[:, 0]
    U, squares = momentum_step_(M, G, momentum, nesterov=nesterov, squares="rows", finite=finite)
    assert squares is not None
    by = row_factors(squares, mode, eps)
    scaled_add_(W, U, by, keep, alpha, control, rounding=rounding)


def check_step(mode: str) -> None:
    """Raise ValueError unless ``row_step_`` can be done in this mode."""
    check_mode(mode)
    if mode == "relative":
        raise ValueError(
            "mode='relative' needs the norms of all rows first: use row_norm, or another mode"
        )
