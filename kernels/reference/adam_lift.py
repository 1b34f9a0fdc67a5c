"""Adam inside a subspace, lifted into the weight, in plain torch."""

from torch import Tensor

from .adam import adam
from .lift import lift_
from .rounding import Rounding


def adam_lift_(
    W: Tensor, P: Tensor, R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, keep: float,
    alpha: float, *, beta1: float, beta2: float, eps: float, X: Tensor | None = None,
    free: float = 0.0, floor: Tensor | None = None, control: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha (P N [+ free * sign(X - P R)]) with N = adam(R), in place.

    :func:`adam` and :func:`lift_` in one operation, which need not store N.

    Args:
        W: (K, m, n), any strides.
        P: (K, m, r), or (1, m, r) for all matrices.
        R: (K, r, n), what ``project`` gave.
        M: (K, r, n) first moment, changed in place.
        V: (K, r, n) second moment, changed in place.
        t: number of this update, or clocks that broadcast against R, as for :func:`adam`.
        keep: multiplies W.
        alpha: multiplies all that is added.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        X: None (default), or (K, m, n), of which the sign of the part outside of the subspace is
            added.
        free: multiplies the sign (0.0).
        floor: None (default, 0), or (K, 1, 1), as for :func:`lift_`.
        control: None (default), or (K, 3), as for :func:`lift_`. Where the flag is 0, M and V do
            not change either.
        rounding: How a weight of low precision is rounded; None (default): to nearest.
    """
    finite = None if control is None else control[:, 0]
    N = adam(R, M, V, t, beta1=beta1, beta2=beta2, eps=eps, finite=finite)
    if X is None or free == 0.0:
        lift_(W, P, N, keep, alpha, control=control, rounding=rounding)
    else:
        lift_(
            W, P, N, keep, alpha, X=X, R=R, free=free, floor=floor, control=control,
            rounding=rounding,
        )  # fmt: skip
