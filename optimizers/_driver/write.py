"""The write of a step: decay a weight and add the terms, by one kernel or in panels.

Every panel goes through ``update_weight_``, which decides how it is rounded. Terms of
the weight's own dtype are added in that dtype, as torch does; terms of a higher precision are
summed in it with the decayed weight and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import (
    LOW_PRECISION_DTYPES,
    Rounding,
    Stack,
    fuses_passes,
    unflagged_stay,
    update_weight_,
)
from .._core.rule import LOCAL_REDUCTIONS, Carry, Dense, Direction, Scaled, Term, WriteScalars
from .._core.terms import ALL, Deferred, slice_rows
from .._core.validation import check
from .decay import Decay, decays_at, factor_at, masked_factor
from .write_modes import accumulation_dtype, carry_error_

WRITE_PANEL = 2**18
"""Elements of a row panel on CPU: the passes of one write then meet in the cache."""
WRITE_PANEL_ACCELERATOR = 2**26
"""The same on accelerators, where it only bounds the float32 copy of a low-precision weight."""
Panel = tuple[slice, ...]
"""Matrices, and which of their rows if not all."""
Change = Callable[[Tensor], object]
"""Changes the values of a panel in place."""


def write_(
    W: Tensor,
    step: Direction,
    lr: float | Tensor,
    decay: Decay,
    finite: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:
    """W <- decay_factor * W - lr * lr_factor * sum(terms), in place.

    Args:
        W: Weights (K, m, n), any strides.
        step: What to write.
        lr: A float, or a 1-element tensor on W's device.
        decay: What decay_factor is, and where it applies.
        finite: None, or flags (K, 1, 1): a matrix whose flag is 0 stays as it is, decay included.
        rounding: How W is rounded where its precision is low; None (default): to nearest.
    """
    if finite is None and rounding is None and _write_plainly_(W, step, lr, decay):
        return
    with unflagged_stay(W, finite, rounding):
        _write_(W, step, lr, decay, finite, rounding)
    if step.carry is not None and rounding is not None and rounding.error is not None:
        run = Run(slice(0, len(W)), lr, decay)
        _carry_errors_(step.carry, rounding.error, [run])


def _write_(
    W: Tensor,
    step: Direction,
    lr: float | Tensor,
    decay: Decay,
    finite: Tensor | None,
    rounding: Rounding | None,
) -> None:
    """Do what ``write_`` does, but for what needs the weight after the write."""
    terms = list(step.terms)
    if step.max_rel_norm is not None:
        terms = _limit_rel_norm(W, terms, step, lr)
    if _try_fused_write_(W, step, terms, lr, decay, finite, rounding):
        return
    # a rule that takes flags itself leaves NaN in the terms of a bad matrix, which no factor of 0
    # removes: the old values of such a matrix are put back
    puts_back = finite is not None and step.member.finite is not None
    flags = None if puts_back else finite
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    alpha, decay_factor = -step.lr_factor, decay.factor(lr)
    if isinstance(lr, Tensor) and not (step.torch_bits and lr.device.type == "cpu"):
        terms = [term.scaled(lr.to(W.device)) for term in terms]
    else:  # torch multiplies a tensor by the scale in the tensor's own dtype
        alpha = float(lr * alpha)
    is_cautious = decay.is_cautious and decay.is_on
    if decay.is_on:
        decay_factor = masked_factor(W, decay_factor, step.decay, flags)
    if flags is not None:
        terms = [_masked(term, flags) for term in terms]
    if W.stride(-1) != 1 and W.stride(-2) == 1:
        # panels must run along the memory: write the transposed weight as it is stored
        W, terms = W.mT, [term.mT for term in terms]
        rounding = None if rounding is None else rounding.mT
        if isinstance(decay_factor, Tensor) and decay_factor.dim() > 1:
            decay_factor = decay_factor.mT
    terms.sort(key=lambda term: not term.fuses_decay)
    is_nearest = rounding is None
    in_weight_dtype = is_nearest and (step.torch_bits or _adds_in_weight_dtype(W, terms))
    dtype = W.dtype if in_weight_dtype else accumulation_dtype(W)
    panels = panels_of(W, not all(term.supports_row_panels for term in terms), step.torch_bits)
    keep = Keep(decay_factor, step.decay_last, is_cautious, step.lr_factor)
    for panel, change in _changes(W, dtype, terms, alpha, keep, panels):
        if puts_back and finite is not None:
            change = where_finite(change, finite if len(finite) == 1 else finite[panel[0]])
        update_weight_(W, change, dtype, panel, rounding)


def _write_plainly_(W: Tensor, step: Direction, lr: float | Tensor, decay: Decay) -> bool:
    """Do what ``_write_`` does, by its short way: for one term that exists, in one panel.

    Returns:
        Whether it was done. What masks, limits, rounds or fuses takes the long way.
    """
    if len(step.terms) != 1 or isinstance(lr, Tensor) or step.torch_bits:
        return False
    if step.decay is not None or step.max_rel_norm is not None or W.dtype in LOW_PRECISION_DTYPES:
        return False
    (term,), keep = step.terms, decay.factor(lr)
    if isinstance(keep, Tensor) or (decay.is_cautious and decay.is_on):
        return False
    exists = isinstance(term, (Scaled, Dense))
    if not exists or not W.is_cpu or W.numel() > WRITE_PANEL or has_kernel(W, None):
        return False
    if W.stride(-1) != 1 and W.stride(-2) == 1:  # along the memory, as on the long way
        W, term = W.mT, term.mT
    before, after = (1.0, keep) if step.decay_last else (keep, 1.0)
    alpha = float(lr * -step.lr_factor)
    update_weight_(W, partial(_write_terms, [term], ALL, ALL, alpha, before, after), W.dtype)
    return True


class Keep(NamedTuple):
    """What multiplies a weight in a write.

    Attributes:
        factor: A number, or what broadcasts against (K, m, n).
        is_last: Whether it comes after the terms.
        is_cautious: Whether it counts only where the terms do not move the weight away from zero.
        sign: A number with the sign of the multiple of this sum that is subtracted.
    """

    factor: float | Tensor
    is_last: bool
    is_cautious: bool
    sign: float


class Run(NamedTuple):
    """Matrices of a stack that have learning rate and weight decay in common.

    Attributes:
        ks: Which matrices, a slice with both ends.
        lr: Their learning rate.
        decay: Their weight decay.
    """

    ks: slice
    lr: float | Tensor
    decay: Decay


def write_runs_(
    W: Tensor,
    step: Direction,
    runs: Sequence[Run],
    finite: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:
    """``write_`` with a learning rate and a decay for each run of matrices.

    Args:
        W: Weights (K, m, n), any strides.
        step: What to write.
        runs: All matrices, run after run.
        finite: None, or flags (K, 1, 1).
        rounding: How W is rounded where its precision is low; None (default): to nearest.
    """
    terms, mask, error = step.terms, step.decay, None if rounding is None else rounding.error
    if W.stride(-1) != 1 and W.stride(-2) == 1:  # as in write_, but once for all runs
        W, terms = W.mT, tuple(term.mT for term in terms)
        rounding = None if rounding is None else rounding.mT
        mask = None if mask is None else mask.mT
    for ks, lr, decay in runs:
        part = replace(
            step,
            terms=tuple(term.matrices(ks) for term in terms),
            decay=mask if mask is None or len(mask) == 1 else mask[ks],
            carry=None,
        )
        own = None if rounding is None else rounding.part((ks,))
        write_(W[ks], part, lr, decay, None if finite is None else finite[ks], own)
    if step.carry is not None and error is not None:
        _carry_errors_(step.carry, error, runs)


def _carry_errors_(carry: Carry, error: Tensor, runs: Sequence[Run]) -> None:
    """Put what rounding has cut off from all matrices into the momentum, run by run."""
    for ks, lr, decay in runs:
        carry_error_(carry, error, lr, decay.factor(lr), ks)


def write_list_(
    Ws: Sequence[Tensor],
    step: Direction,
    lr: float | Tensor,
    decay: Decay,
    finite: Tensor | None = None,
    rounding: Rounding | None = None,
) -> bool:
    """``write_`` for a list of K matrices (m, n), which are not copied into a stack.

    Returns:
        Whether it was done: there must be a kernel that writes this step into a list.
    """
    terms, strides = list(step.terms), {W.stride() for W in Ws}
    if (
        step.max_rel_norm is not None
        or len(strides) != 1
        or not all(term.accepts_list for term in terms)
    ):
        return False
    return _try_fused_write_(Ws, step, terms, lr, decay, finite, rounding)


def has_kernel(W: Stack, rounding: Rounding | None) -> bool:
    """Whether the back end writes W by kernels, which keep nothing of what rounding cuts off."""
    keeps = rounding is not None and (rounding.residual is not None or rounding.error is not None)
    return fuses_passes(W) and not keeps


def _try_fused_write_(
    W: Stack,
    step: Direction,
    terms: list[Term],
    lr: float | Tensor,
    decay: Decay,
    finite: Tensor | None,
    rounding: Rounding | None,
) -> bool:
    """Write all terms at once where the back end has a kernel that does it."""
    if step.torch_bits or step.decay is not None or step.decay_last or not 1 <= len(terms) <= 2:
        return False
    if decay.is_cautious and decay.is_on:  # the mask needs a pass of its own
        return False
    if not has_kernel(W, rounding) or (rounding is None and _adds_in_weight_dtype(W[0], terms)):
        return False
    alpha, decay_factor = -step.lr_factor * lr, decay.factor(lr)
    control = None
    if finite is not None or isinstance(alpha, Tensor):
        control = W[0].new_ones(len(W), 3, dtype=torch.float32)
        for i, x in enumerate((finite, decay_factor, alpha)):
            if x is not None:
                control[:, i] = x.flatten() if isinstance(x, Tensor) else x
        alpha = decay_factor = 1.0
    assert not isinstance(alpha, Tensor) and not isinstance(decay_factor, Tensor)
    first, *others = sorted(terms, key=lambda term: not term.fuses_decay)
    scalars = WriteScalars(decay_factor, alpha, control, rounding)
    return first.fused_write_(W, scalars, *others)


def _masked(term: Term, finite: Tensor) -> Term:
    """The term times 0 or 1, in the term's dtype: a product with float32 would widen the term."""
    return (
        Dense(term.U * finite.to(term.U.dtype)) if isinstance(term, Dense) else term.scaled(finite)
    )


def _adds_in_weight_dtype(W: Tensor, terms: list[Term]) -> bool:
    """Whether terms of a low-precision weight are to be added in its own precision."""
    return W.dtype in LOW_PRECISION_DTYPES and all(
        isinstance(t, Dense) and t.U.dtype == W.dtype for t in terms
    )


def _limit_rel_norm(
    W: Tensor, terms: list[Term], step: Direction, lr: float | Tensor
) -> list[Term]:
    """Shrink the step to max_rel_norm * ||W||_F per matrix; a zero weight sets no limit."""
    check(all(isinstance(term, Dense) for term in terms), "max_rel_norm needs Dense terms")
    zero = torch.zeros((), dtype=torch.float32, device=W.device)
    U = sum((term.U for term in terms if isinstance(term, Dense)), zero)
    norms = [torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) for X in (U, W.to(U.dtype))]
    reductions = step.member.reductions
    if reductions is not LOCAL_REDUCTIONS:  # norms of shards, whose squares might overflow
        squares = ((reductions, norm.double().square()) for norm in norms)
        norms = [x.sqrt().to(U.dtype) for x in reductions.sums_together(*squares)]
    size, limit = norms[0] * (lr * abs(step.lr_factor)), step.max_rel_norm * norms[1]
    shrink = torch.where((limit > 0) & (size > limit), limit / size, torch.ones_like(size))
    return [term.scaled(shrink) for term in terms]


def panels_of(W: Tensor, all_rows: bool, alone: bool) -> Iterator[tuple[slice, slice]]:
    """Matrices and rows of each panel: several small matrices at once, or rows of a large one.

    ``alone`` makes every matrix one panel, as torch writes it: on a CPU what is left over at the
    end of a tensor, and fills no vector, is rounded in another way.
    """
    K, m, n = W.shape
    size = WRITE_PANEL if W.device.type == "cpu" else WRITE_PANEL_ACCELERATOR
    matrices, rows = 1 if alone else max(1, size // max(1, m * n)), max(1, size // max(1, n))
    if all_rows or alone or m * n <= size:
        rows = max(1, m)
    for k in range(0, K, matrices):
        for i in range(0, m, rows):
            yield slice(k, k + matrices), slice(i, i + rows)


def _changes(
    W: Tensor,
    dtype: torch.dtype,
    terms: list[Term],
    alpha: float,
    keep: Keep,
    panels: Iterable[tuple[slice, slice]],
) -> Iterator[tuple[Panel, Change]]:
    """Each panel of W, and the change of its values, made in the accumulation dtype."""
    if keep.is_cautious:
        for ks, rows in panels:
            yield (ks, rows), partial(_write_cautiously, terms, ks, rows, alpha, keep)
        return
    decay_before, decay_after = (1.0, keep.factor) if keep.is_last else (keep.factor, 1.0)
    in_place = W.dtype == dtype
    if in_place and terms and terms[0].fuses_decay and not isinstance(decay_before, Tensor):
        # in one go over the whole matrix, with the decay inside
        whole, terms = terms[0], terms[1:]
        for ks in _matrices(W):
            yield (ks,), partial(_write_term, whole, ks, decay_before, alpha)
        decay_before = 1.0
        if not terms and _is_one(decay_after):
            return
        if _is_one(decay_after) and _is_one_pass(W, terms):
            panels = ((ks, ALL) for ks in _matrices(W))  # a second one would meet it in the cache
    for ks, rows in panels:
        yield (ks, rows), partial(_write_terms, terms, ks, rows, alpha, decay_before, decay_after)


def _is_one_pass(W: Tensor, terms: Sequence[Term]) -> bool:
    """Whether one term is left, which exists in W's dtype, so that a panel saves nothing."""
    return len(terms) == 1 and isinstance(terms[0], Scaled) and terms[0].X.dtype == W.dtype


def _matrices(W: Tensor) -> list[slice]:
    """Slices of the matrices: as many at once as a panel has entries for, at least one."""
    if W.numel() <= WRITE_PANEL:
        return [ALL]
    count = max(1, WRITE_PANEL * len(W) // W.numel())
    return [slice(k, k + count) for k in range(0, len(W), count)]


def _write_term(term: Term, ks: slice, decay_factor: float, alpha: float, X: Tensor) -> None:
    """X <- decay_factor * X + alpha * term, for whole matrices in one go."""
    term.write_(X, ks, ALL, decay_factor, alpha)


def _write_terms(
    terms: list[Term],
    ks: slice,
    rows: slice,
    alpha: float,
    decay_before: float | Tensor,
    decay_after: float | Tensor,
    X: Tensor,
) -> None:
    """X <- decay_after * (decay_before * X + alpha * sum(terms)), for one panel."""
    _decay_(X, decay_before, ks, rows)
    for term in terms:
        term.add_(X, ks, rows, alpha)
    _decay_(X, decay_after, ks, rows)


def _write_cautiously(
    terms: list[Term], ks: slice, rows: slice, alpha: float, keep: Keep, X: Tensor
) -> None:
    """X <- keep * X + alpha * D for one panel, D = sum(terms); keep counts as D tells."""
    term = terms[0] if len(terms) == 1 else None
    if isinstance(term, Deferred):  # its matrices, in a stack of several groups, are made too
        term = term.materialized
    if isinstance(term, Dense):  # there already, and nothing moves as it is added
        D = term.U[ks, rows]
    elif isinstance(term, Scaled):
        D = term.X[ks, rows] * slice_rows(term.by, ks, rows)
    else:
        D, term = torch.zeros_like(X), None
        for part in terms:
            part.add_(D, ks, rows, 1.0)
    factor = factor_at(decays_at(D, X, keep.sign), _part_of(keep.factor, ks, rows))
    if not keep.is_last:
        X.mul_(factor)
    if term is None:
        X.add_(D, alpha=alpha)
    else:
        term.add_(X, ks, rows, alpha)
    if keep.is_last:
        X.mul_(factor)


def where_finite(change: Change, finite: Tensor) -> Change:
    """The change, of those matrices only whose flag (K, 1, 1) is not 0."""

    def masked(X: Tensor) -> None:
        new = X.clone()
        change(new)
        X.copy_(torch.where(finite != 0, new, X))

    return masked


def _is_one(decay_factor: float | Tensor) -> bool:
    return not isinstance(decay_factor, Tensor) and decay_factor == 1.0


def _part_of(decay_factor: float | Tensor, ks: slice, rows: slice) -> float | Tensor:
    """The decay factor of rows of matrices; one number is that of all."""
    if isinstance(decay_factor, Tensor) and decay_factor.dim() > 1:
        return slice_rows(decay_factor, ks, rows)
    return decay_factor


def _decay_(X: Tensor, decay_factor: float | Tensor, ks: slice, rows: slice) -> None:
    """X <- decay_factor * X, for rows of matrices; nothing is done for the number 1."""
    if not _is_one(decay_factor):
        X.mul_(_part_of(decay_factor, ks, rows))
