"""Rows at one length, in plain torch: the references of the kernels of these names."""

from __future__ import annotations

import torch
from torch import Tensor

from .passes import blend_, scaled_add_
from .products import product
from .sums import column_squares, total

ROW_MODES = ("inverse_eps", "inverse", "unit", "relative")
RELATIVE = 1e-2
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
        return torch.where(rms > 0, (s + RELATIVE * rms).reciprocal_(), 0.0)
    s = s.add_(eps) if mode == "inverse_eps" else s.clamp_(min=eps)
    if eps == 0.0:
        return s.reciprocal_().masked_fill_(squares == 0, 0.0)
    return s.reciprocal_()


def row_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """See :func:`stiefel.kernels.row_norm`."""
    check_mode(mode)
    if X.ndim == 2:
        return row_norm(X[None], eps, mode, centred)[0]
    if X.numel() == 0:
        return torch.empty_like(X)
    m = X.shape[-2]
    Y = X.to(torch.promote_types(X.dtype, torch.float32))
    Y = Y - _mean(Y) if centred else Y
    squares = column_squares(Y.mT).mT
    rms = total(squares.mT).div_(m).sqrt_() if mode == "relative" else None
    by = row_factors(squares, mode, eps, rms)
    if not centred:
        return (Y * by).to(X.dtype)
    U = Y.mul_(by)  # Y is a tensor of its own
    U.sub_(_mean(U))
    return U.to(X.dtype)


def column_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """See :func:`stiefel.kernels.column_norm`."""
    return row_norm(X.mT, eps, mode, centred).mT


def row_step_(
    W: Tensor, M: Tensor, G: Tensor, momentum: float, eps: float, mode: str, keep: float,
    alpha: float, control: Tensor | None = None, nesterov: bool = False,
) -> None:  # fmt: skip
    """A whole step of RowNorm, in place: momentum, row norms and the write.

    M <- M + (1 - momentum) (G - M); U = G + momentum (M - G) if nesterov, else M;
    W_i <- keep W_i + alpha U_i / |U_i|, with |U_i| as mode and eps say.

    Args:
        W: (K, m, n), any strides.
        M: (K, m, n), the buffer; one that is narrower than G is rounded only when it is stored.
        G: (K, m, n), not changed; one that is narrower than M is widened.
        momentum: Decay of M.
        eps: As for :func:`row_norm`.
        mode: As for :func:`row_norm`, but not ``"relative"``, which needs all rows first.
        keep: Multiplies W.
        alpha: Multiplies the rows of length 1.
        control: None, or (K, 3) float32, for each matrix a flag and what counts instead of keep and
            alpha. Where the flag is 0, W and M of that matrix stay as they are.
        nesterov: Whether U looks ahead by one gradient.

    Raises:
        ValueError: ``mode`` is unknown or ``"relative"``.
    """
    check_step(mode)
    ok = None if control is None else control[:, 0]
    U, squares = blend_(M, G, momentum, nesterov=nesterov, squares="rows", ok=ok)
    assert squares is not None
    scaled_add_(W, U, row_factors(squares, mode, eps), keep, alpha, control)


def check_mode(mode: str) -> None:
    """Raise ValueError unless this is one of ROW_MODES."""
    if mode not in ROW_MODES:
        raise ValueError(f"mode must be one of {', '.join(ROW_MODES)}, got {mode!r}")


def check_step(mode: str) -> None:
    """Raise ValueError unless ``row_step_`` can be done in this mode."""
    check_mode(mode)
    if mode == "relative":
        raise ValueError(
            "mode='relative' needs the norms of all rows first: use row_norm, or another mode"
        )


def _mean(X: Tensor) -> Tensor:
    """The mean of the rows of X (K, m, n), as (K, 1, n)."""
    return product(X.new_ones(len(X), 1, X.shape[-2]), X).div_(X.shape[-2])
