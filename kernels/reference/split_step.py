"""A step in which only chosen columns, rows or entries have moments, in plain torch."""

import torch
from torch import Tensor

from . import write
from .adam import adam
from .rounding import Rounding


def split_step_(
    W: Tensor, G: Tensor, index: Tensor, dim: int | None, M: Tensor, V: Tensor,
    t: float | Tensor, keep: float, alpha: float, *, beta1: float, beta2: float, eps: float,
    free: str = "sign_sgd", free_scale: float = 1.0, floor: Tensor | None = None,
    control: Tensor | None = None, rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """W <- keep W + alpha U, in place: U is Adam's direction where chosen, else one without state.

    Args:
        W: (K, m, n), any strides.
        G: (K, m, n), any strides.
        index: (K, c) int32, different numbers of columns, rows, or entries row by row.
        dim: -1 for columns, -2 for rows, None for entries.
        M: first moments, (K, m, c), (K, c, n) or (K, 1, c) for the three values of dim, changed in
            place.
        V: second moments, shaped as M and changed in place.
        t: number of this update, or (K, c): a clock for each chosen column, row or entry.
        keep: multiplies W.
        alpha: multiplies U.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        free: direction of the others, which need no state: ``"sign_sgd"`` (default, the sign of
            G), ``"sgd"`` (G itself) or ``"no"``.
        free_scale: multiplies that direction (1.0).
        floor: None (default, 0), or (K, 1, 1): entries of G up to this magnitude have the sign 0.
        control: None (default), or (K, 3) float32 with a row [flag, keep, alpha] for each matrix,
            which replaces the arguments keep and alpha. Where the flag is 0, W, M and V of that
            matrix do not change.
        rounding: How a weight of low precision is rounded; None (default): to nearest.
    """
    dtype = torch.promote_types(torch.promote_types(W.dtype, G.dtype), torch.float32)
    X = G.to(dtype)
    if free == "sign_sgd":
        U = X.sign()
        U = U if floor is None else U.mul_(X.abs() > floor)
    else:
        U = X if free == "sgd" else torch.zeros_like(X)
    U = (U * free_scale).contiguous()
    along, out = (-1, U.view(len(U), 1, -1)) if dim is None else (dim, U)
    X = X.reshape(out.shape)
    place = index.long().unsqueeze(-1 if along == -2 else -2).expand(M.shape)
    clock = t.unsqueeze(-1 if along == -2 else -2) if isinstance(t, Tensor) else t
    finite = None if control is None else control[:, 0]
    N = adam(X.gather(along, place), M, V, clock, beta1=beta1, beta2=beta2, eps=eps, finite=finite)
    out.scatter_(along, place, N)

    def change(Y: Tensor) -> None:
        if control is None:
            Y.copy_(torch.add(Y * keep, U, alpha=alpha))
            return
        finite, keeps, alphas = control.to(dtype).view(len(Y), 3, 1, 1).unbind(1)
        Y.copy_(torch.where(finite != 0, (Y * keeps).addcmul_(U, alphas), Y))

    write.update_flagged_weight_(W, change, dtype, control, rounding)
