"""Adam on stacks of matrices, in plain torch: the reference of the kernel of that name."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Devices on which torch has a fused Adam: one pass over memory.
_FUSED_DEVICES = ("cpu", "cuda")
# Devices of which the host reads clocks without waiting, to see whether those of a matrix agree.
_READ_DEVICES = ("cpu",)
# The CPU kernel rounds the last few entries of a tensor differently from the others (fused
# multiply-adds in the vector part only). A matrix of whole 64-byte lines has no such entries.
_LINE_ENTRIES = 16
# Rows with clocks of their own go to that kernel one by one where they are at least so long: a call
# for a row takes as long as some two thousand entries do in plain passes.
_MIN_CLOCKED_ROW = 2048


def adam(
    R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, *, beta1: float, beta2: float, eps: float,
    finite: Tensor | None = None, overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """Update both moments and return the normalized direction, as ``torch.optim.Adam`` does.

    N = Mhat / (sqrt(Vhat) + eps) with M, V the running averages of R and R*R, and the hats their
    bias-corrected values. Source: Adam, arXiv 1412.6980, Algorithm 1.

    Args:
        R: (K, m, n), any strides; not changed unless ``overwrite`` is True.
        M: (K, m, n) first moment, changed in place. A narrower dtype than R's is worked on in R's
            and rounded when it is stored.
        V: (K, m, n) second moment, likewise.
        t: number of this update, from 1; or a tensor of such numbers that broadcasts against R,
            where entries have clocks of their own: (K, m, 1), (K, 1, n) or (K, m, n), or where the
            host does not know the number: (1, 1, 1).
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the bias-corrected root.
        finite: None (default), or flags (K,), or (1,) for all matrices. Where a flag is 0, M and V
            of that matrix do not change.
        overwrite: whether R is not needed any more (False), so that N may take its place.

    Returns:
        N: (K, m, n) in R's dtype, a new tensor unless ``overwrite`` is True. Undefined where the
        flag is 0.
    """
    if finite is not None:
        before, is_finite = (M.clone(), V.clone()), finite.reshape(-1, 1, 1) != 0
        N = adam(R, M, V, t, beta1=beta1, beta2=beta2, eps=eps, overwrite=overwrite)
        for moved, old in zip((M, V), before, strict=True):
            moved.copy_(torch.where(is_finite, moved, old))
        return N
    if isinstance(t, Tensor) and R.device.type in _READ_DEVICES and len(t) < t.numel() < R.numel():
        return _adam_clocked(R, M, V, t, beta1, beta2, eps)
    return _adam(R, M, V, t, beta1, beta2, eps, overwrite)


def _adam_clocked(
    R: Tensor, M: Tensor, V: Tensor, t: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """:func:`adam` with clocks of rows or columns, most of which are often those of a matrix.

    Each matrix takes the way that its own clocks allow, whatever the others of the stack do.
    """
    if not M.is_contiguous() and M.mT.is_contiguous():
        return _adam_clocked(R.mT, M.mT, V.mT, t.mT, beta1, beta2, eps).mT
    R, first = R.contiguous(), t.flatten(1)[:, :1]
    is_equal = (t.flatten(1) == first).all(1).expand(len(R))
    if bool(is_equal.all()):
        return _adam(R, M, V, first.unsqueeze(-1), beta1, beta2, eps)
    if not bool(is_equal.any()):
        return _adam(R, M, V, t, beta1, beta2, eps)
    N, t = torch.empty_like(R), t.expand(len(R), -1, -1)
    for chosen, clock in ((is_equal, t[:, :1, :1]), (~is_equal, t)):
        k = chosen.nonzero().flatten()
        m, v = M[k], V[k]
        N[k] = _adam(R[k], m, v, clock[k], beta1, beta2, eps)
        M[k], V[k] = m, v
    return N


def _adam(
    R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, beta1: float, beta2: float, eps: float,
    overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`adam` without flags: torch's fused kernel where it can be had, else plain passes."""
    if not M.is_contiguous() and M.mT.is_contiguous():  # moments of a transposed weight
        clock = t.mT if isinstance(t, Tensor) else t
        return _adam(R.mT, M.mT, V.mT, clock, beta1, beta2, eps, overwrite).mT
    same = M.dtype == V.dtype == R.dtype
    dense = M.is_contiguous() and V.is_contiguous()
    # with a side of 1, one number may also be the clock of a row or a column
    by_row = not isinstance(t, Tensor) or (t.shape[1:].numel() == 1 and min(R.shape[1:]) > 1)
    if isinstance(t, Tensor) and t.shape == (*R.shape[:2], 1):  # a clock for each row, or for one
        by_row = R.shape[2] >= _MIN_CLOCKED_ROW
    if same and dense and by_row and R.device.type in _FUSED_DEVICES:
        return _adam_fused(R, M, V, t, beta1, beta2, eps, overwrite)
    M, V = update_moments_(R, M, V, beta1, beta2)
    if isinstance(t, Tensor):  # powers in float64: near t = 1 their distance from 1 is small
        c1, c2 = ((1 - beta ** t.double()).to(R.dtype) for beta in (beta1, beta2))
        return M.div(c1).div_(V.sqrt().div_(c2.sqrt_()).add_(eps))
    root = V.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)
    return M.div(1 - beta1**t).div_(root)


def _adam_fused(
    R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, beta1: float, beta2: float, eps: float,
    overwrite: bool,
) -> Tensor:  # fmt: skip
    """Torch's AdamW kernel on a parameter of zeros with lr -1: the direction is what is left.

    Where R may be overwritten it is the parameter too: decay -1 multiplies it by zero first.
    """
    R = R.resolve_neg().contiguous()  # the kernel refuses a negative view
    overwrite = overwrite and R.is_cpu
    N = R if overwrite else torch.zeros_like(R)
    tensors: Iterable[Tensor] = (N, R, M, V)
    if isinstance(t, Tensor) and t.numel() > 1 and t.device.type in _READ_DEVICES:
        t = t.flatten()[:1] if bool((t == t.flatten()[0]).all()) else t
    if isinstance(t, Tensor) and t.numel() > 1:  # each row or matrix, a parameter with its clock
        by_matrix = t.shape[1] < R.shape[1]
        clocks = list(t.float().flatten().unbind())
        params, grads, Ms, Vs = (
            list((x if by_matrix else x.flatten(0, 1)).unbind()) for x in tensors
        )
    else:
        if isinstance(t, Tensor):
            clock = t.reshape(()).float()
        else:  # a fill, not a copy from the host: on a GPU nothing waits
            clock = torch.full((), float(t), dtype=torch.float32, device=R.device)
        flat = R.shape[0] == 1 or R.device.type != "cpu" or R[0].numel() % _LINE_ENTRIES == 0
        params, grads, Ms, Vs = ([x] if flat else list(x.unbind(0)) for x in tensors)
        clocks = [clock] * len(params)
    torch._fused_adamw_(
        params,
        grads,
        Ms,
        Vs,
        [],
        clocks,
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=-1.0 if overwrite else 0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return N


def update_moments_(
    R: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Update both averages in place; return them in R's dtype, before the store rounded them.

    Args:
        R: (K, r, n), what Adam takes for a gradient.
        exp_avg: (K, r, n), the average of R, changed in place.
        exp_avg_sq: (K, r, n), the average of R * R, changed in place.
        beta1: Decay of ``exp_avg``.
        beta2: Decay of ``exp_avg_sq``.
    """
    M = exp_avg.to(R.dtype).mul_(beta1).add_(R, alpha=1 - beta1)
    V = exp_avg_sq.to(R.dtype).mul_(beta2).addcmul_(R, R, value=1 - beta2)
    for stored, moved in ((exp_avg, M), (exp_avg_sq, V)):
        if stored is not moved:
            stored.copy_(moved)
    return M, V
