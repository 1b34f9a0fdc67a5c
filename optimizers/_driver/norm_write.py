"""The write of a step under ``weight_norm``: sums over W and U, then W <- A W - B U in panels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import Rounding, unflagged_stay, update_weight_
from .._core.rule import Dense, Direction, RowNorms, Term, WriteScalars
from .._core.terms import slice_rows
from .._core.validation import check
from .decay import decays_at, factor_at
from .finite import is_capturing
from .layout import part
from .norms import (
    MATRIX,
    NOT_MEASURED,
    RADIUS,
    ROWS,
    SMALLEST_SQUARE,
    WHOLE,
    Multipliers,
    NormControl,
    Number,
    RowSums,
    has_zero,
    is_to_measure,
    multipliers,
    reparametrized,
    zero_weight,
)
from .write import Run, has_kernel, panels_of, where_finite
from .write_modes import accumulation_dtype

if TYPE_CHECKING:
    from .._core.views import MatrixView
    from .buckets import Bucket
    from .layout import Layout
    from .units import Unit

Panels = list[tuple[slice, slice]]
BY_ROWS = NormControl(size_scope=ROWS)
"""What has sums taken by rows, for norms that a rule keeps itself."""
LOOKED_AT = ("cpu",)
"""Devices whose sums the host looks at, to take those anew in float64 that are too coarse."""


@dataclass(frozen=True)
class Steering:
    """How the norms of K matrices are steered.

    Attributes:
        control: The words.
        radius: None, or the stored radii, (K, 1, 1) or those of the rows, changed in place.
        given: The group's ``weight_radius`` of each matrix, or one for all.
        is_stack: Whether each matrix is a parameter of its own.
    """

    control: NormControl
    radius: Tensor | None
    given: Sequence[float | None]
    is_stack: bool = False


def write_steered_(
    W: Tensor,
    step: Direction,
    runs: Sequence[Run],
    steering: Steering,
    finite: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:
    """``write_runs_`` with norms that are steered.

    Args:
        W: Weights (K, m, n) as the rule sees them, any strides.
        step: What to write.
        runs: Learning rate and decay of all matrices, run after run.
        steering: How.
        finite: None, or flags (K, 1, 1).
        rounding: How W is rounded where its precision is low; None (default): to nearest.
    """
    check(
        not step.decay_last and step.max_rel_norm is None and not step.torch_bits,
        "weight_norm steers plain steps, without decay_last, max_rel_norm and torch_bits",
    )
    with unflagged_stay(W, finite, rounding):
        write = _Write(W, step, runs, steering, finite, rounding)
        found = write.multipliers()
        write.write_(found)
    if step.carry is not None and rounding is not None and rounding.error is not None:
        write.carry_(found)


class _Write:
    """One write; arguments as :func:`write_steered_`.

    Attributes:
        W: The weights, rows along their memory.
        U: The whole step, laid out alike, without ``scale``.
        rows_dim: The dimension of W that numbers rows of the parameter's own matrices.
        overflows: Where the square of a norm has overflown.
        new_radius: Where radii are stored, as the rule sees them, and what is to be stored there.
    """

    def __init__(
        self,
        W: Tensor,
        step: Direction,
        runs: Sequence[Run],
        steering: Steering,
        finite: Tensor | None,
        rounding: Rounding | None,
    ) -> None:
        terms, decay = list(step.terms), step.decay
        self.rows_dim = -1 if step.member.transposed else -2
        self.is_turned = W.stride(-1) != 1 and W.stride(-2) == 1
        if self.is_turned:  # panels run along the memory
            W, terms, self.rows_dim = W.mT, [term.mT for term in terms], -3 - self.rows_dim
            rounding = None if rounding is None else rounding.mT
            decay = None if decay is None else decay.mT
        self.W, self.step, self.steering, self.finite = W, step, steering, finite
        self.rounding, self.decay = rounding, decay
        # a stack whose norms are steered agrees on it, one that keeps norms of rows need not
        self.is_cautious = runs[0].decay.is_cautious and step.row_norms is None
        self.dtype, self.scale = accumulation_dtype(W), step.lr_factor
        self.lr = self._per_matrix(runs, lambda run: run.lr)
        self.keep = self._per_matrix(runs, lambda run: run.decay.factor(run.lr))
        self.cautious_rows = self._per_matrix(runs, lambda run: float(run.decay.is_cautious))
        control = steering.control
        # a mask of decay says which entries decay before the step, unless the radius is steered:
        # then they decay after it, or the radius would undo them
        self.masks_after = self.is_cautious and control.radius is not None
        self.masks_before = not self.masks_after and (decay is not None or self.is_cautious)
        self.masks_before &= not control.keeps_radius
        if isinstance(self.keep, float) and self.keep == 1.0:
            self.masks_before = self.masks_after = False
        is_whole = not all(term.supports_row_panels for term in terms)
        self.panels: Panels = list(panels_of(W, is_whole, False))
        self.overflows = torch.zeros(1, 1, 1, dtype=torch.bool, device=W.device)
        self.new_radius: tuple[Tensor, Tensor] | None = None
        self.U = self._dense(terms)

    def _per_matrix(self, runs: Sequence[Run], value: Callable[[Run], Number]) -> Number:
        """A number of all matrices, or (K, 1, 1), of the precision of the weight in both forms."""
        values = [value(run) for run in runs]
        if len(runs) == 1:
            x = values[0]
            if isinstance(x, Tensor):
                return x.reshape(1, 1, 1).to(self.W.device, self.dtype)
            # rounded without a tensor, which the host would read and a capture could not hold
            return x if self.dtype == torch.float64 else ctypes.c_float(x).value
        found = self.W.new_empty(len(self.W), 1, 1, dtype=self.dtype)
        for run, x in zip(runs, values, strict=True):
            found[run.ks] = x.reshape(()).to(self.W.device) if isinstance(x, Tensor) else x
        return found

    def _dense(self, terms: Sequence[Term]) -> Tensor:
        """The sum of all terms."""
        first = terms[0] if terms else None
        if len(terms) == 1 and isinstance(first, Dense):
            return first.U
        U = torch.zeros(self.W.shape, dtype=self.dtype, device=self.W.device)
        for ks, rows in self.panels:
            for term in terms:
                term.add_(U[ks, rows], ks, rows, 1.0)
        return U

    # sums -----------------------------------------------------------------------------------------

    def multipliers(self) -> Multipliers:
        """A, B and h, and the radius that is stored."""
        if self.step.row_norms is not None:
            return self._laid_out(self._of_rows(self.step.row_norms))
        control = self.steering.control
        keep = 1.0 if self.masks_before or self.masks_after or control.keeps_radius else self.keep
        found = self._multipliers(keep, self.dtype)
        is_here = self.W.device.type in LOOKED_AT and self.step.member.reductions.is_whole
        found = self._refined(found, keep) if is_here else self._left_out(found)
        if self.new_radius is not None:
            slot, radius = self.new_radius
            slot.copy_(radius)
        return self._laid_out(found)

    def _refined(self, found: Multipliers, keep: Number) -> Multipliers:
        """Multipliers of sums in float64, where others are too coarse, or squares overflow."""
        suspect = self.overflows
        if found.cancels is not None:
            suspect = suspect | found.cancels
        if self.dtype == torch.float64 or not bool(suspect.any()):
            return found
        rough, exact = self.new_radius, self._multipliers(keep, torch.float64)
        suspect = self._by_matrix(suspect)
        if rough is not None and self.new_radius is not None:
            self.new_radius = rough[0], torch.where(suspect, self.new_radius[1], rough[1])
        A, B = (torch.where(suspect, x, y) for x, y in zip(exact[:2], found[:2], strict=True))
        h = torch.where(suspect, exact.h, found.h) if isinstance(exact.h, Tensor) else exact.h
        return Multipliers(A, B, h)

    def _left_out(self, found: Multipliers) -> Multipliers:
        """Multipliers that leave matrices as they are of which the square of a norm overflows."""
        at = self._by_matrix(self.overflows)
        if self.new_radius is not None:
            slot, radius = self.new_radius
            self.new_radius = slot, torch.where(at, slot.to(radius.dtype), radius)
        A, B = torch.where(at, 1.0, found.A), torch.where(at, 0.0, found.B)
        return Multipliers(A, B, found.h)

    def _by_matrix(self, flags: Tensor) -> Tensor:
        """Flags of rows or matrices, for all that have a norm in common: (K, 1, 1) or (1, 1, 1)."""
        flags = flags.any(-2, keepdim=True)
        is_joint = self.steering.control.is_whole and not self.steering.is_stack
        return flags.any(0, keepdim=True) if is_joint else flags

    def _multipliers(self, keep: Number, dtype: torch.dtype) -> Multipliers:
        """The closed form from sums taken in a dtype, (K, rows, 1)."""
        sums, lr = self._sums(dtype), self.lr
        self.overflows = ~(sums.WW + sums.UU).isfinite()
        if isinstance(lr, Tensor):
            lr = lr.to(sums.WW.dtype)
        if isinstance(keep, Tensor):
            keep = keep.to(sums.WW.dtype)
        return multipliers(self.steering.control, sums, lr, keep, self._radius(sums))

    def _of_rows(self, norms: RowNorms) -> Multipliers:
        """A and B of rows whose norms lie beside their directions, and these norms, stored."""
        sums = self._sums(self.dtype)
        lr, keep = (
            x.to(sums.WW.dtype) if isinstance(x, Tensor) else x for x in (self.lr, self.keep)
        )
        found = reparametrized(sums, norms, lr, keep, self.cautious_rows)
        norms.g.copy_(found.g)
        norms.v.copy_(found.v)
        return Multipliers(found.A, found.B, 0.0)

    def _sums(self, dtype: torch.dtype) -> RowSums:
        """Row sums, or those of matrices where that is enough; complete over shards."""
        X, reductions = self._local_sums(dtype), self.step.member.reductions
        along = self.step.member.transposed
        if not self.steering.control.has_rows:
            X = reductions.both(X)
        else:
            X = reductions.rows(X) if along else reductions.cols(X)
        WW, UW, UU = (X[..., j : j + 1] for j in range(3))
        return RowSums(WW, UW * self.scale, UU * (self.scale * self.scale), self._over)

    def _local_sums(self, dtype: torch.dtype) -> Tensor:
        """Row sums of W^2, U W and U^2 (K, rows or 1, 3), in an order that one matrix fixes."""
        (K, m, n), has_rows = self.W.shape, self.steering.control.has_rows
        shape = (K, m, 1) if self.rows_dim == -2 else (K, 1, n)
        # sums of one matrix are added up on the host where that costs nothing
        wide = torch.float64 if self.W.device.type == "cpu" else dtype
        found = torch.zeros(
            3, *(shape if has_rows else (K, 1, 1)), dtype=wide, device=self.W.device
        )
        for ks, rows in self.panels:
            X, Y = self._values(ks, rows).to(dtype), self.U[ks, rows].to(dtype)
            product = torch.empty(X.shape, dtype=dtype, device=X.device)
            for j, (a, b) in enumerate(((X, X), (Y, X), (Y, Y))):
                torch.mul(a, b, out=product)
                if has_rows and self.rows_dim == -1:
                    found[j, ks] += product.sum(-2, keepdim=True)
                elif has_rows:
                    found[j, ks, rows] = product.sum(-1, keepdim=True).to(wide)
                else:
                    found[j, ks] += product.sum(-1, keepdim=True).to(wide).sum(-2, keepdim=True)
        found = found.mT if self.rows_dim == -1 else found
        return found.squeeze(-1).movedim(0, -1)

    def _values(self, ks: slice, rows: slice) -> Tensor:
        """Values of a panel of the weight from which the step starts."""
        X = self.W[ks, rows].to(self.dtype)
        if self.rounding is not None and self.rounding.residual is not None:
            X = X + self.rounding.residual[ks, rows]
        if self.masks_before:
            X = X * self._masked_keep(X, 0.0, ks, rows)
        return X

    def _over(self, scope: str, *sums: Tensor) -> tuple[Tensor, ...]:
        """Add up sums of rows, or of matrices, to what a scope needs."""
        control, member = self.steering.control, self.step.member
        if scope == ROWS:
            return sums
        if control.has_rows:
            local = torch.cat(sums, -1).sum(-2, keepdim=True)
            reductions = member.reductions
            total = reductions.cols(local) if member.transposed else reductions.rows(local)
            sums = tuple(total[..., j : j + 1] for j in range(len(sums)))
        if scope == WHOLE and not self.steering.is_stack:
            sums = tuple(x.sum(0, keepdim=True) for x in sums)
        return sums

    def _radius(self, sums: RowSums) -> Tensor | None:
        """The radii of this step (K, rows or 1, 1), which are to be stored."""
        slot, control = self.steering.radius, self.steering.control
        if slot is None or not control.keeps_radius:
            return None
        slot = slot.mT if self.step.member.transposed else slot
        stored = slot.to(sums.WW.dtype)
        norms = sums.over(control.radius_scope, sums.WW)[0].sqrt()
        radius = torch.where(stored < 0, norms, stored)
        given = self.steering.given
        for j, rho in enumerate(given):
            if rho is not None:  # filled there: a copy from the host would wait
                at = j if len(given) > 1 else ...
                radius[at] = radius[at].masked_fill(
                    stored[at] == NOT_MEASURED, rho * self._root_of_count()
                )
        keeps = radius * radius > SMALLEST_SQUARE
        if not self.step.member.reductions.is_whole and not bool(keeps.all()):
            raise RuntimeError(zero_weight("a matrix of a sharded parameter"))
        if self.finite is not None:
            keeps = keeps & (self.finite != 0)
        self.new_radius = slot, torch.where(keeps, radius, stored)
        return radius

    def _root_of_count(self) -> float:
        """The root of the number of entries that have one radius."""
        member, scope = self.step.member, self.steering.control.radius_scope
        count = member.m * member.n
        if scope == ROWS:
            count = member.m if member.transposed else member.n
        elif scope == WHOLE and not self.steering.is_stack:
            count *= len(self.W)
        return math.sqrt(count)

    # the write ------------------------------------------------------------------------------------

    def _laid_out(self, found: Multipliers) -> Multipliers:
        """Multipliers as W lies, 1 and 0 where the flag is 0."""
        A, B = (
            x.to(self.dtype).mT if self.rows_dim == -1 else x.to(self.dtype)
            for x in (found.A, found.B * self.scale)
        )
        h = found.h
        if isinstance(h, Tensor):
            h = h.to(self.dtype).mT if self.rows_dim == -1 else h.to(self.dtype)
        if self.finite is not None:
            A, B = torch.where(self.finite != 0, A, 1.0), torch.where(self.finite != 0, B, 0.0)
        return Multipliers(A, B, h)

    def write_(self, found: Multipliers) -> None:
        """W <- A W - B U."""
        if self._try_fused_(found):
            return
        puts_back = self.finite is not None and self.step.member.finite is not None
        for ks, rows in self.panels:
            change: Callable[[Tensor], object] = partial(self._change_, found, ks, rows)
            if puts_back and self.finite is not None:
                change = where_finite(change, slice_rows(self.finite, ks, slice(None)))
            update_weight_(self.W, change, self.dtype, (ks, rows), self.rounding)

    def _change_(self, found: Multipliers, ks: slice, rows: slice, X: Tensor) -> None:
        """The same of a panel, in place."""
        A, B, h = found.A, found.B, found.h
        after = None
        if self.masks_before:
            X.mul_(self._masked_keep(X, 0.0, ks, rows))
        elif self.masks_after:
            after = self._masked_keep(X, h, ks, rows)
        X.mul_(slice_rows(A, ks, rows))
        X.addcmul_(self.U[ks, rows].to(X.dtype), slice_rows(B, ks, rows), value=-1.0)
        if after is not None:
            X.mul_(after)

    def _masked_keep(self, X: Tensor, h: Number, ks: slice, rows: slice) -> Tensor:
        """What decay leaves of a panel with the values X: 1 where a mask is 0, or the flag is."""
        if isinstance(self.keep, Tensor):
            keep = slice_rows(self.keep.to(X.dtype), ks, rows)
        else:
            keep = torch.full((), self.keep, dtype=X.dtype, device=X.device)
        one = torch.ones((), dtype=X.dtype, device=X.device)
        if self.decay is not None:
            keep = torch.where(slice_rows(self.decay, ks, rows) != 0, keep, one)
        if self.is_cautious:
            D = self.U[ks, rows].to(X.dtype) * self.scale
            if isinstance(h, Tensor):
                D = D - slice_rows(h, ks, rows) * X
            keep = factor_at(decays_at(D, X), keep)
        if self.finite is not None:
            keep = torch.where(slice_rows(self.finite, ks, rows) != 0, keep, one)
        return keep

    def _try_fused_(self, found: Multipliers) -> bool:
        """Write by one kernel where the back end has one, for numbers of whole matrices."""
        rounding, A, B = self.rounding, found.A, found.B
        if self.masks_before or self.masks_after or self.steering.control.has_rows:
            return False
        if not has_kernel(self.W, rounding):
            return False
        control = self.W.new_ones(len(self.W), 3, dtype=torch.float32)
        for i, x in enumerate((self.finite, A, -B)):
            if x is not None:
                control[:, i] = x.flatten()
        return Dense(self.U).fused_write_(self.W, WriteScalars(1.0, 1.0, control, rounding))

    def carry_(self, found: Multipliers) -> None:
        """Put what rounding has cut off into the momentum, so that the next step undoes it."""
        carry, rounding = self.step.carry, self.rounding
        assert carry is not None and rounding is not None and rounding.error is not None
        lr = found.B / self.scale if self.scale else found.B
        c = torch.where(lr == 0, 0.0, found.A / lr) * (1 - 1 / carry.beta)
        E = rounding.error * c
        E = E.mT if self.is_turned else E
        everything = slice(0, len(E))
        carry.M.add_(carry.inverse(E, everything).to(carry.M.dtype))


# zero weights -------------------------------------------------------------------------------------


def refuse_zero_weights(
    buckets: Iterable[Bucket],
    groups: Sequence[Mapping[str, Any]],
    bad: set[int],
    describe: Callable[[int], str],
) -> None:
    """Raise for a weight whose norm is to be kept, and is zero; the host waits for it once.

    Args:
        buckets: What is about to be stepped.
        groups: The groups.
        bad: Flat positions of parameters that stay as they are.
        describe: Makes words for a message of a position.

    Raises:
        RuntimeError: With the first such weight; nothing has changed.
    """
    for bucket in () if is_capturing() else buckets:
        control = bucket.unit.control
        if bucket.has_radius or control is None or not control.keeps_radius:
            continue
        has_radius = True
        for i, has_grad in enumerate(bucket.present):
            if not has_grad:
                continue
            stored = bucket.states[i][RADIUS]
            for j, unit in enumerate(bucket.units):
                position, given = unit.positions[i], groups[unit.group].get(RADIUS)
                own = stored[j] if bucket.stacked else stored
                if not bool(is_to_measure(own, given).any()):
                    continue
                if position in bad:
                    has_radius = False
                elif is_zero(unit, i, control.radius_scope):
                    raise RuntimeError(zero_weight(describe(position)))
        bucket.has_radius = has_radius


def is_zero(unit: Unit, i: int, scope: str) -> bool:
    """Whether a norm that ``sphere`` would keep is zero, of a weight that is whole here."""
    return has_zero(_in_scope(_row_squares(unit.views[i].to_matrices(unit.params[i])), scope))


def held_squares(unit: Unit, i: int, held: Tensor, scope: str) -> Tensor:
    """Squares of all norms that ``sphere`` would keep, of what this process holds of a weight.

    Args:
        unit: A unit of sharded weights.
        i: The member.
        held: What this process holds of its parameter.
        scope: Of what norms are taken.

    Returns:
        One number for each norm of the whole weight, float32 (float64), in one order on all ranks.
    """
    placed, view = unit.placed, unit.views[i]
    assert placed is not None
    if placed.held is None:  # cut as no view can follow
        return _in_scope(_row_squares_of_box(held, view, placed.layouts[i]), scope)
    part_of = placed.held[i]
    squares = _row_squares(part_of.view.to_matrices(held))
    found = squares.new_zeros(view.k, view.m)
    ks = slice(part_of.first, part_of.first + len(squares))
    found[ks, part_of.start[0] : part_of.start[0] + squares.shape[1]] = squares
    return _in_scope(found, scope)


def _row_squares(X: Tensor) -> Tensor:
    """Sums of squares (k, m) of the rows of matrices (k, m, n)."""
    return X.detach().to(torch.promote_types(X.dtype, torch.float32)).square().sum(-1)


def _row_squares_of_box(held: Tensor, view: MatrixView, layout: Layout) -> Tensor:
    """The same of the whole matrices of a view, from a box of their parameter; zero elsewhere."""
    number_of = torch.zeros(layout.shape, dtype=torch.int32, device=held.device)
    numbers = torch.arange(1, view.k * view.m + 1, dtype=torch.int32, device=held.device)
    view.to_matrices(number_of).copy_(numbers.view(view.k, view.m, 1))  # 0: of another view
    squares = held.detach().to(torch.promote_types(held.dtype, torch.float32)).square()
    found = squares.new_zeros(view.k * view.m + 1)
    found.index_add_(0, part(number_of, layout.box).flatten(), squares.flatten())
    return found[1:].view(view.k, view.m)


def _in_scope(squares: Tensor, scope: str) -> Tensor:
    """Sums of squares of rows (k, m), added up to what a scope takes norms of, as a vector."""
    if scope == ROWS:
        return squares.flatten()
    return squares.sum(1) if scope == MATRIX else squares.sum().view(1)
