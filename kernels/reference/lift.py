"""Out of a subspace and into the weight, in plain torch."""

import torch
from torch import Tensor

from . import write
from .matmul import add_product_, product
from .rounding import Rounding


def lift_(
    W: Tensor, P: Tensor, N: Tensor, keep: float, alpha: float, *, X: Tensor | None = None,
    by: Tensor | None = None, R: Tensor | None = None, free: float = 0.0,
    floor: Tensor | None = None, control: Tensor | None = None, rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (P N + rest), in place, rounded once.

    The rest is by * X. If R is given, it is free * sign(X - P R) instead: the sign of the part of X
    outside of the span of P.

    Args:
        W: (K, m, n), any strides.
        P: (K, m, r), or (1, m, r) for all matrices.
        N: (K, r, n).
        keep: multiplies W.
        alpha: multiplies all that is added.
        X: None (default, no rest), or (K, m, n), any strides.
        by: None (default, 1), or what multiplies X: (K, m, 1), (K, 1, n) or (K, 1, 1), where K
            may be 1.
        R: None (default), or (K, r, n): the rest is then the sign of X - P R.
        free: multiplies the sign (0.0).
        floor: None (default, 0), or (K, 1, 1): entries of X - P R up to this magnitude have the
            sign 0.
        control: None (default), or (K, 3) float32 with a row [flag, keep, alpha] for each matrix,
            which replaces the arguments keep and alpha. Where the flag is 0, W does not change.
        rounding: How a weight of low precision is rounded; None (default): to nearest.
    """
    dtype = torch.promote_types(torch.promote_types(W.dtype, N.dtype), torch.float32)
    dtype = write.accumulation_dtype(W, dtype, rounding)
    P, N = P.expand(len(W), -1, -1).to(dtype), N.to(dtype)

    def change(Y: Tensor) -> None:
        if control is None:
            add_product_(Y, P, N, beta=keep, alpha=alpha)
            _add_rest_(Y, P, alpha, X, by, R, free, floor)
            return
        finite, keeps, alphas = control.to(dtype).view(len(Y), 3, 1, 1).unbind(1)
        U = product(P, N)
        _add_rest_(U, P, 1.0, X, by, R, free, floor)
        U.mul_(alphas).add_(Y * keeps)
        Y.copy_(torch.where(finite != 0, U, Y))

    write.update_flagged_weight_(W, change, dtype, control, rounding)


def _add_rest_(
    out: Tensor, P: Tensor, alpha: float, X: Tensor | None, by: Tensor | None, R: Tensor | None,
    free: float, floor: Tensor | None,
) -> None:  # fmt: skip
    """Add alpha times the rest to out; see :func:`lift_`."""
    if X is None:
        return
    X = X.to(out.dtype)
    if R is None:
        out.add_(X, alpha=alpha) if by is None else out.addcmul_(X, by.to(out.dtype), value=alpha)
        return
    rest = X - product(P, R.to(out.dtype))
    sign = rest.sign()
    if floor is not None:
        sign.mul_(rest.abs_() > floor)
    out.add_(sign, alpha=alpha * free)
