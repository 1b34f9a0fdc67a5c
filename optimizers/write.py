"""How a weight is written: the one place that touches parameters.

Rounding is to nearest. Terms of the weight's own dtype are added in that dtype, as torch does;
terms of a higher precision are summed in it with the decayed weight and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import Stack, fuses_passes
from .rule import Dense, Direction, Factors, Term, check

PANEL = 2**17
"""Elements of a row panel on CPU: the passes of one write then meet in the cache."""
PANEL_ACCELERATOR = 2**26
"""The same on accelerators, where it only bounds the float32 copy of a low-precision weight."""
LOW = (torch.bfloat16, torch.float16)


def write_(
    W: Tensor, step: Direction, lr: float | Tensor, weight_decay: float, ok: Tensor | None = None
) -> None:
    """W <- keep * W - lr * scale * sum(terms), in place.

    Args:
        W: Weights (K, m, n), any strides.
        step: What to write.
        lr: A float, or a 1-element tensor on W's device.
        weight_decay: Decoupled decay; keep = 1 - lr * weight_decay where it applies.
        ok: None, or flags (K, 1, 1): a matrix whose flag is 0 stays as it is, decay included.
    """
    terms = list(step.terms)
    if step.cap is not None:
        terms = _capped(W, terms, step.cap, lr, step.scale)
    if _by_kernel(W, step, terms, lr, weight_decay, ok):
        return
    alpha, keep = -step.scale, 1.0 - lr**step.decay_power * weight_decay
    if ok is not None and step.member.ok is not None:
        # what is not finite there is still in the terms, and no factor of 0 would take it away
        new = W.clone()
        write_(new, replace(step, exact=True), lr, weight_decay)
        W.copy_(torch.where(ok != 0, new, W))
        return
    if isinstance(lr, Tensor):
        terms = [term.scaled(lr.to(W.device)) for term in terms]
    else:
        alpha *= lr
    for mask in (step.decay, ok):
        if mask is not None and weight_decay != 0.0:
            # chosen, not computed, and in the accumulator's precision: the bits of a plain number
            if not isinstance(keep, Tensor):  # made there: a copy would wait for the device
                keep = torch.full((), keep, dtype=_precision(W), device=W.device)
            keep = keep.to(W.device, _precision(W))
            keep = torch.where(mask != 0, keep, torch.ones_like(keep))
    if ok is not None:
        terms = [_flagged(term, ok) for term in terms]
    if W.stride(-1) != 1 and W.stride(-2) == 1:
        # panels must run along the memory: write the turned weight turned back
        W, terms = W.mT, [term.mT for term in terms]
        keep = keep.mT if isinstance(keep, Tensor) and keep.dim() > 1 else keep
    terms.sort(key=lambda term: not term.fused)
    _write_panels(W, terms, alpha, keep, step.decay_last)


def write_apart_(
    Ws: Sequence[Tensor],
    step: Direction,
    lr: float | Tensor,
    weight_decay: float,
    ok: Tensor | None = None,
) -> bool:
    """The same for K matrices (m, n) wherever they lie, which need not be copied into a stack.

    Returns:
        Whether it was done: there must be a kernel that writes this step into a list.
    """
    terms, strides = list(step.terms), {W.stride() for W in Ws}
    if step.cap is not None or len(strides) != 1 or not all(term.apart for term in terms):
        return False
    return _by_kernel(Ws, step, terms, lr, weight_decay, ok)


def _by_kernel(
    W: Stack,
    step: Direction,
    terms: list[Term],
    lr: float | Tensor,
    weight_decay: float,
    ok: Tensor | None,
) -> bool:
    """Write all terms at once where the back end has a kernel that does it."""
    if step.exact or step.decay is not None or step.decay_last or not 1 <= len(terms) <= 2:
        return False
    if not fuses_passes(W) or _alike(W[0], terms):
        return False
    alpha, keep = -step.scale * lr, 1.0 - lr**step.decay_power * weight_decay
    control = None
    if ok is not None or isinstance(alpha, Tensor):
        control = W[0].new_ones(len(W), 3, dtype=torch.float32)
        for i, x in enumerate((ok, keep, alpha)):
            if x is not None:
                control[:, i] = x.flatten() if isinstance(x, Tensor) else x
        alpha = keep = 1.0
    assert not isinstance(alpha, Tensor) and not isinstance(keep, Tensor)
    first, *others = sorted(terms, key=lambda term: not term.fused)
    return first.kernel_(W, Factors(keep, alpha, control), *others)


def _flagged(term: Term, ok: Tensor) -> Term:
    """The term times 0 or 1, in its own dtype: a product with float32 would widen it."""
    return Dense(term.U * ok.to(term.U.dtype)) if isinstance(term, Dense) else term.scaled(ok)


def _alike(W: Tensor, terms: list[Term]) -> bool:
    """Whether terms of a low-precision weight are to be added in its own precision."""
    return W.dtype in LOW and all(isinstance(t, Dense) and t.U.dtype == W.dtype for t in terms)


def _precision(W: Tensor) -> torch.dtype:
    return torch.float32 if W.dtype in LOW else W.dtype


def _capped(
    W: Tensor, terms: list[Term], cap: float, lr: float | Tensor, scale: float
) -> list[Term]:
    """Shrink the step to cap * ||W||_F per matrix; a zero weight does not cap."""
    check(all(isinstance(term, Dense) for term in terms), "cap works with Dense terms only")
    U = sum((term.U for term in terms if isinstance(term, Dense)), torch.zeros((), device=W.device))
    size = torch.linalg.vector_norm(U, dim=(-2, -1), keepdim=True) * (lr * abs(scale))
    limit = cap * torch.linalg.vector_norm(W.to(U.dtype), dim=(-2, -1), keepdim=True)
    shrink = torch.where((limit > 0) & (size > limit), limit / size, torch.ones_like(size))
    return [term.scaled(shrink) for term in terms]


def _panels(W: Tensor, whole: bool) -> Iterator[tuple[slice, slice]]:
    """Matrices and rows of each panel: several small matrices at once, or rows of a large one."""
    K, m, n = W.shape
    size = PANEL if W.device.type == "cpu" else PANEL_ACCELERATOR
    matrices, rows = max(1, size // max(1, m * n)), max(1, size // max(1, n))
    if whole or m * n <= size:
        rows = max(1, m)
    for k in range(0, K, matrices):
        for i in range(0, m, rows):
            yield slice(k, k + matrices), slice(i, i + rows)


def _write_panels(
    W: Tensor, terms: list[Term], alpha: float, keep: float | Tensor, decay_last: bool
) -> None:
    low = W.dtype in LOW and not _alike(W, terms)
    keep_first, keep_last = (1.0, keep) if decay_last else (keep, 1.0)
    if not low and terms and terms[0].fused and not isinstance(keep_first, Tensor):
        # in one go over the whole matrix, with the decay inside
        for k in range(W.shape[0]) if W.shape[0] * W[0].numel() > PANEL else [slice(None)]:
            ks = slice(k, k + 1) if isinstance(k, int) else k
            terms[0].write_(W[ks], ks, slice(None), keep_first, alpha)
        keep_first, terms = 1.0, terms[1:]
        if not terms and _is_one(keep_last):
            return
    whole = not all(term.whole_rows for term in terms)
    for ks, rows in _panels(W, whole):
        target = W[ks, rows]
        panel = target.float() if low else target
        _decay_(panel, keep_first, ks, rows)
        for term in terms:
            term.add_(panel, ks, rows, alpha)
        _decay_(panel, keep_last, ks, rows)
        if low:
            target.copy_(panel)


def _is_one(keep: float | Tensor) -> bool:
    return not isinstance(keep, Tensor) and keep == 1.0


def _decay_(panel: Tensor, keep: float | Tensor, ks: slice, rows: slice) -> None:
    if isinstance(keep, Tensor):
        if keep.dim() > 1:
            keep = keep if keep.shape[0] == 1 else keep[ks]
            keep = keep if keep.shape[-2] == 1 else keep[:, rows]
        panel.mul_(keep)
    elif not _is_one(keep):
        panel.mul_(keep)
