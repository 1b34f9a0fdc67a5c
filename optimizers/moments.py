"""Moments on stacks of matrices: Adam, an average of gradients, and what a new basis does to them.

Pure tensor functions on (K, m, n). They change the moments in place and nothing else, and a stack
gives the bits of its matrices taken one at a time.
"""

import math

import torch
from torch import Tensor

__all__ = ["CARRY_POLICIES", "adam", "adam_reference", "carry", "ema", "nesterov"]

CARRY_POLICIES = ("keep", "reset", "rotate")

# Kernels of these devices do one matrix of Adam in a single pass over memory.
_FUSED_DEVICES = ("cpu", "cuda")
# The CPU kernel rounds the last few entries of a tensor differently from the others (fused
# multiply-adds in the vector part only). A matrix of whole 64-byte lines has no such entries.
_LINE = 16


def adam(
    R: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Moves both moments and returns the normalised direction, as ``torch.optim.Adam`` does.

    N = Mhat / (sqrt(Vhat) + eps) with M, V the running averages of R and R*R, and the hats their
    bias-corrected values. Source: Adam, arXiv 1412.6980, Algorithm 1.

    Args:
        R: (K, m, n), fp32 or fp64, any strides; not changed.
        exp_avg: (K, m, n) first moment M, changed in place. A narrower dtype than R's is worked
            on in R's and rounded when it is stored.
        exp_avg_sq: (K, m, n) second moment V, likewise.
        t: number of this update, from 1.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.

    Returns:
        N: (K, m, n) in R's dtype, its own storage.
    """
    if not exp_avg.is_contiguous() and exp_avg.mT.is_contiguous():  # moments of a turned weight
        turned = adam(R.mT, exp_avg.mT, exp_avg_sq.mT, t, beta1=beta1, beta2=beta2, eps=eps)
        return turned.mT
    same = exp_avg.dtype == exp_avg_sq.dtype == R.dtype
    dense = exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()
    if same and dense and R.device.type in _FUSED_DEVICES:
        return _adam_fused(R, exp_avg, exp_avg_sq, t, beta1, beta2, eps)
    M, V = _average(R, exp_avg, exp_avg_sq, beta1, beta2)
    root = V.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)
    return M.div(1 - beta1**t).div_(root)


def adam_reference(
    R: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, float]:
    """Moves both moments as the published GaLore code does: eps on the uncorrected root.

    Source: the AdamW that accompanies GaLore, arXiv 2403.03507. Arguments as in :func:`adam`.

    Returns:
        N: (K, m, n), M / (sqrt(V) + eps).
        factor: sqrt(1 - beta2^t) / (1 - beta1^t), by which the learning rate is multiplied
            where the bias is corrected.
    """
    M, V = _average(R, exp_avg, exp_avg_sq, beta1, beta2)
    return M / V.sqrt().add_(eps), math.sqrt(1 - beta2**t) / (1 - beta1**t)


def _adam_fused(
    R: Tensor, M: Tensor, V: Tensor, t: int, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Torch's AdamW kernel on a parameter of zeros with lr -1: the direction is what is left."""
    R = R.contiguous()
    N = torch.zeros_like(R)
    # A fill, not a copy from the host: on a GPU nothing waits.
    clock = torch.full((), float(t), device=R.device)
    flat = R.shape[0] == 1 or R.device.type != "cpu" or R[0].numel() % _LINE == 0
    params, grads, Ms, Vs = ([x] if flat else list(x.unbind(0)) for x in (N, R, M, V))
    torch._fused_adamw_(
        params,
        grads,
        Ms,
        Vs,
        [],
        [clock] * len(params),
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return N


def _average(
    R: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Moves both averages in place; returns them in R's dtype, before the store rounded them."""
    M = exp_avg.to(R.dtype).mul_(beta1).add_(R, alpha=1 - beta1)
    V = exp_avg_sq.to(R.dtype).mul_(beta2).addcmul_(R, R, value=1 - beta2)
    for stored, moved in ((exp_avg, M), (exp_avg_sq, V)):
        if stored is not moved:
            stored.copy_(moved)
    return M, V


def carry(
    policy: str,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    P_old: Tensor,
    P_new: Tensor,
    Q_old: Tensor | None = None,
    Q_new: Tensor | None = None,
) -> None:
    """Takes the moments from an old basis to a new one, in place.

    "keep" leaves them (GaLore, arXiv 2403.03507), "reset" zeroes them, "rotate" turns them by the
    change of basis C = P_new^T P_old: M <- C M and V <- (C*C) V. The second is the second moment
    of the turned coordinates if the old ones are uncorrelated, and is never negative. With a basis
    on both sides, D = Q_new^T Q_old: M <- C M D^T and V <- (C*C) V (D*D)^T.

    Args:
        policy: "keep", "reset" or "rotate".
        exp_avg: (K, r, n), or (K, r, q) with two bases.
        exp_avg_sq: as exp_avg.
        P_old: (K, m, r), the basis the moments are written in; orthonormal columns.
        P_new: (K, m, r), the basis that they shall be written in.
        Q_old: (K, n, q), the old basis of the other side, if there is one.
        Q_new: (K, n, q), the new basis of the other side.

    Raises:
        ValueError: unknown policy, or only one of Q_old and Q_new.
    """
    if policy not in CARRY_POLICIES:
        raise ValueError(f"moments must be one of {', '.join(CARRY_POLICIES)}, got {policy!r}")
    if (Q_old is None) != (Q_new is None):
        raise ValueError("carry needs both Q_old and Q_new, or neither")
    if policy == "reset":
        exp_avg.zero_()
        exp_avg_sq.zero_()
    elif policy == "rotate":
        for k in range(len(P_old)):  # one by one: a batched product has other bits
            C = P_new[k].mT @ P_old[k].to(P_new.dtype)
            D = None if Q_old is None or Q_new is None else Q_new[k].mT @ Q_old[k].to(Q_new.dtype)
            exp_avg[k].copy_(_turn(C, exp_avg[k], D))
            exp_avg_sq[k].copy_(_turn(C * C, exp_avg_sq[k], None if D is None else D * D))


def _turn(C: Tensor, X: Tensor, D: Tensor | None) -> Tensor:
    """C X, or C X D^T, in C's dtype; a new tensor, for a product must not overwrite its input."""
    turned = C @ X.to(C.dtype)
    return turned if D is None else turned @ D.mT


def ema(buffer: Tensor, grad: Tensor, momentum: float) -> Tensor:
    """B <- B + (1 - momentum) (G - B), in place; returns B in the precision of G.

    A buffer of a narrower dtype is worked on in G's and rounded when it is stored.
    """
    moved = buffer.to(grad.dtype).lerp_(grad, 1 - momentum)
    if moved is not buffer:
        buffer.copy_(moved)
    return moved


def nesterov(grad: Tensor, buffer: Tensor, momentum: float) -> Tensor:
    """G + momentum (B - G), a new tensor; buffer B has taken in the gradient G already."""
    return grad.lerp(buffer, momentum)
