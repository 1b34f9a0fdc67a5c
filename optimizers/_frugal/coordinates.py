"""FRUGAL on coordinates: columns, rows or entries, both parts in one pass over the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ... import kernels
from .._core.rule import Dense, Member, Slot, Term, WriteScalars
from .._toolkit.base_optimizers import Adam, BaseOptimizer
from .._toolkit.moments import IndexBasisChange
from .._toolkit.random_keys import StackRNG, random_order
from .gradient_split import ALL, GradientSplit, StateFreeUpdate, slots_if_any

COORDINATE_KINDS = ("columns", "rows", "randk")
SPLIT_PANEL = 2**19
"""Entries of a panel on CPU: more than ``write.WRITE_PANEL``, as a panel needs a dozen calls."""

DirectionFn = Callable[[Tensor, slice, slice], Tensor]
"""(R, ks, part) -> direction of R, which is ``part`` of the coordinates of the matrices ``ks``."""


@dataclass(frozen=True)
class CoordinateSplit(GradientSplit):
    """A random choice of columns, rows or single entries (``"randk"``), stored as int32 numbers.

    Entries are numbered row by row and treated as the columns of a 1 x mn matrix, so their state
    is (1, c). An index of 4 bytes beside 8 bytes of moments is cheaper than a seed: drawing a
    quarter of 1024 x 4096 entries again takes more than ten times as long as a whole step.

    Attributes:
        kind: One of ``COORDINATE_KINDS``.
        share: Count of chosen coordinates, or their part, rounded down.
        ordered: Whether the numbers ascend; else they stay as drawn.
        ages: Whether every coordinate counts its own updates.
    """

    handles_nonfinite: ClassVar[tuple[str, ...]] = ("adamw",)

    kind: str
    share: float
    ordered: bool = True
    ages: bool = False

    @property
    @override
    def splits(self) -> frozenset[str]:
        sides = {"columns": ("rows",), "rows": ("cols",), "randk": ()}
        return frozenset(sides[self.kind])

    @property
    def dim(self) -> int:
        """Dimension along which coordinates are taken."""
        return -2 if self.kind == "rows" else -1

    @property
    def axes(self) -> str:
        """Slot axes of the chosen part."""
        return {"columns": "mc", "rows": "cn", "randk": "1c"}[self.kind]

    def length(self, m: int, n: int) -> int:
        """Count of all coordinates of an m x n matrix."""
        return {"columns": n, "rows": m, "randk": m * n}[self.kind]

    @override
    def slots(self, m: int, n: int, base_optimizer: BaseOptimizer) -> dict[str, Slot]:
        length = self.length(m, n)
        c = min(self.share, length) if isinstance(self.share, int) else int(self.share * length)
        # two letters, so that a change of `ordered` is a change of the slots and not overlooked
        axis = "c" if self.ordered else "u"
        index = Slot(axis, dtype=torch.int32, **{axis: c})  # type: ignore[arg-type]
        index_slots = {"index": index, "age": index} if self.ages else {"index": index}
        slots = {**index_slots, **base_optimizer.slots(self.axes, c=c)}
        return slots_if_any(c, self.share, m, n, slots)

    def draw(self, rng: StackRNG, length: int, c: int) -> Tensor:
        """Draw numbers (K, c), every set equally likely."""
        generators = [rng.generator(k) for k in range(len(rng.indices))]
        return torch.stack([random_order(length, g)[:c] for g in generators])

    def find(self, rng: StackRNG, m: int, n: int, old: Tensor) -> Tensor:
        """Draw numbers and put them in the order, dtype and device in which ``old`` is stored."""
        length = self.length(m, n)
        index = self.draw(rng, length, old.shape[-1])
        if self.ordered:  # by a mask, which is faster than a sort
            chosen = torch.zeros(len(index), length, dtype=torch.bool, device=index.device)
            chosen.scatter_(1, index, True)
            index = chosen.nonzero()[:, 1].view(len(index), -1)
        return index.to(old.device, old.dtype)

    @override
    def reselect(
        self, w: Member, rng: StackRNG, base_optimizer: BaseOptimizer, policy: str
    ) -> None:
        state, index = w.state, w.state["index"]
        new = self.find(rng, w.m, w.n, index)
        change = IndexBasisChange(index.clone(), new)
        if not w.is_first_refresh:
            moments = self.moments_of(state)
            if self.kind != "rows":  # a basis change moves rows
                moments = {k: X.mT for k, X in moments.items()}
            base_optimizer.carry_state(policy, moments, change, w.t - 1)
        if "age" in state:
            age = state["age"]
            if w.is_first_refresh:
                age.zero_()
            else:
                age.copy_(change.apply(age.unsqueeze(-1)).squeeze(-1))
        index.copy_(new)

    @override
    def terms(
        self, w: Member, base_optimizer: BaseOptimizer, t: int | Tensor, state_free: StateFreeUpdate
    ) -> tuple[Term, ...]:
        """One term that writes both parts."""
        assert w.grad is not None
        adam_step: int | Tensor = t
        if isinstance(t, Tensor):  # as ages lie, one for each chosen coordinate
            index = w.state["index"]
            adam_step = t.view(1, 1).expand_as(index).unsqueeze(-1 if self.kind == "rows" else -2)
        if "age" in w.state:
            counted = 1 if w.finite is None else w.finite.to(torch.int32).view(-1, 1)
            adam_step = w.state["age"].add_(counted).unsqueeze(-1 if self.kind == "rows" else -2)
        moments = self.moments_of(w.state)

        def step(R: Tensor, ks: slice, part: slice) -> Tensor:
            state = {k: self.panel_of(X, ks, part) for k, X in moments.items()}
            own_step = adam_step
            if isinstance(adam_step, Tensor):
                own_step = self.panel_of(adam_step, ks, part)
            finite = None if w.finite is None else w.finite[ks]
            return base_optimizer.direction(state, R, own_step, finite=finite)

        term = SplitTerm(
            coordinates=self,
            G=w.grad,
            index=w.state["index"],
            state_free=state_free,
            step=step,
            base_optimizer=base_optimizer,
            moments=moments,
            adam_step=adam_step,
        )
        return (term,)

    def moments_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base optimizer's tensors among the state."""
        return {k: X for k, X in state.items() if k not in ("index", "age")}

    def panel_of(self, X: Tensor, ks: slice, part: slice) -> Tensor:
        """The part of a moment or of the ages X that belongs to a panel; see ``DirectionFn``."""
        if self.kind == "rows":
            return X[ks, part]
        if self.kind == "randk":
            return X[ks, :, part]
        return X[ks] if X.shape[1] == 1 else X[ks, part]


@dataclass(frozen=True, eq=False)
class SplitTerm(Term):
    """``step`` on chosen coordinates of G, ``state_free`` on the rest, in one pass over the weight.

    Moments move while the weight is written: ``step`` is called exactly once for every coordinate,
    a panel of rows at a time, so that gradient, moments and weight of a panel share the cache.
    Where a weight cannot be written so, or a flag on a device multiplies the term, both parts are
    first made as one tensor.

    Attributes:
        coordinates: Kind of the coordinates.
        G: (K, m, n).
        index: (K, c), numbers of the chosen coordinates.
        state_free: Direction of the other coordinates.
        step: Direction of the chosen coordinates (K, ., .); ``part`` counts rows where the
            coordinates are columns, else coordinates.
        base_optimizer: The optimizer behind ``step``, for a kernel that does both parts, or None.
        moments: State of the base optimizer.
        adam_step: The base optimizer's t, or ages that broadcast against the coordinates.
    """

    coordinates: CoordinateSplit
    G: Tensor
    index: Tensor
    state_free: StateFreeUpdate
    step: DirectionFn
    base_optimizer: BaseOptimizer | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    adam_step: int | Tensor = 0
    fuses_decay: ClassVar[bool] = True
    _buffers: dict[torch.Size, Tensor] = field(default_factory=dict)

    @property
    def supports_row_panels(self) -> bool:  # type: ignore[override]
        """True for columns, and where the host can look up which coordinates a panel contains."""
        can_look_up = self.coordinates.ordered and self.G.device.type == "cpu"
        return self.coordinates.kind == "columns" or can_look_up

    @cached_property
    def positions(self) -> Tensor:
        """The numbers as int64, which gather and scatter need."""
        return self.index.long()

    @property
    @override
    def mT(self) -> Term:
        """Columns become rows, whose direction is computed beforehand."""
        if self.coordinates.kind == "randk":
            return Dense(self.whole().mT)
        N = self.step(_gather(self.G, self.coordinates.dim, self.positions), ALL, ALL).mT
        other = "rows" if self.coordinates.kind == "columns" else "columns"
        coordinates = CoordinateSplit(other, self.coordinates.share, self.coordinates.ordered)
        return SplitTerm(
            coordinates, self.G.mT, self.index, self.state_free, lambda _, ks, part: N[ks, part]
        )

    @override
    def scaled(self, c: Tensor) -> Term:
        return Dense(self.whole().mul_(c))

    @override
    def scaled_matrices(self, ks: slice, c: Tensor) -> Term:
        U = torch.empty_like(self.G[ks], memory_format=torch.contiguous_format)
        self._fill_rows(U, ks, ALL)
        return Dense(U.mul_(c))

    def whole(self) -> Tensor:
        """Both parts as one tensor (K, m, n)."""
        U = torch.empty_like(self.G, memory_format=torch.contiguous_format)
        self._fill_rows(U, ALL, ALL)
        return U

    @override
    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        self.write_(panel, ks, rows, 1.0, alpha)

    def write_(
        self, panel: Tensor, ks: slice, rows: slice, decay_factor: float, alpha: float
    ) -> None:
        """Panel <- decay_factor * panel + alpha * term, in panels of its own."""
        start, stop, _ = rows.indices(self.G.shape[-2])
        height = (
            max(1, SPLIT_PANEL // max(1, panel.shape[-1]))
            if len(panel) == 1 and self.supports_row_panels
            else max(1, stop)
        )
        for i in range(start, stop, height):
            j = min(i + height, stop)
            W = panel[:, i - start : j - start]
            U = self._buffers.get(W.shape)
            if U is None:
                U = self._buffers[W.shape] = self.G.new_empty(W.shape)
            self._fill_rows(U, ks, slice(i, j))
            _decay_and_add_(W, U, decay_factor, alpha)

    @override
    def fused_write_(self, W: Tensor, by: WriteScalars, other: Term | None = None) -> bool:
        """Write by one kernel, for Adam and without another term."""
        if other is not None or not isinstance(self.base_optimizer, Adam):
            return False
        t, dim = self.adam_step, None if self.coordinates.kind == "randk" else self.coordinates.dim
        t = t.flatten(1) if isinstance(t, Tensor) else t
        (beta1, beta2), eps = self.base_optimizer.betas, self.base_optimizer.eps
        kernels.split_step_(
            W,
            self.G,
            self.index,
            dim,
            self.moments["exp_avg"],
            self.moments["exp_avg_sq"],
            t,
            by.decay_factor,
            by.alpha,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            free=self.state_free.kind,
            free_scale=self.state_free.scale,
            floor=self.state_free.floor,
            control=by.control,
            rounding=by.rounding,
        )
        return True

    def _fill_rows(self, U: Tensor, ks: slice, rows: slice) -> None:
        """Write the rows ``rows`` of both parts into U."""
        X = self.G[ks, rows]
        self.state_free(X, ks, U)
        if self.coordinates.kind == "randk":
            X, U = X.flatten(1).unsqueeze(1), U.flatten(1).unsqueeze(1)
        part, positions = self._part_in_rows(ks, rows)
        if positions.numel():
            N = self.step(_gather(X, self.coordinates.dim, positions), ks, part)
            _scatter_(U, self.coordinates.dim, positions, N.to(U.dtype))  # of the state

    def _part_in_rows(self, ks: slice, rows: slice) -> tuple[slice, Tensor]:
        """The ``part`` for ``step`` in these rows, and its positions within the panel."""
        start, stop, _ = rows.indices(self.G.shape[-2])
        if self.coordinates.kind == "columns":
            return rows, self.positions[ks]
        if (start, stop) == (0, self.G.shape[-2]):
            return ALL, self.positions[ks]
        width = 1 if self.coordinates.kind == "rows" else self.G.shape[-1]
        numbers = self.positions[ks]  # of one matrix: only single ones are cut into rows
        edges = numbers.new_tensor([[start * width, stop * width]])
        low, high = torch.searchsorted(numbers, edges)[0].tolist()
        return slice(low, high), numbers[:, low:high] - start * width


def _gather(X: Tensor, dim: int, positions: Tensor) -> Tensor:
    """Rows or columns of X (K, m, n) as a new tensor; one matrix has a faster operation."""
    if len(X) == 1:
        return X[0].index_select(dim, positions[0]).unsqueeze(0)
    return X.take_along_dim(positions.unsqueeze(-1 if dim == -2 else -2), dim)


def _scatter_(U: Tensor, dim: int, positions: Tensor, N: Tensor) -> None:
    """Write N into rows or columns of U (K, m, n)."""
    if len(U) == 1 and dim == -2:
        U[0].index_copy_(0, positions[0], N[0])
    else:
        U.scatter_(dim, positions.unsqueeze(-1 if dim == -2 else -2).expand_as(N), N)


def _decay_and_add_(W: Tensor, U: Tensor, decay_factor: float, alpha: float) -> None:
    """W <- decay_factor W + alpha U, in place; large ones in one pass, by torch's kernel of SGD.

    That kernel rounds the last entries of a tensor differently, so nothing that may be part of a
    stack goes there. It reads memory from end to end, so W must be contiguous.
    """
    large = len(W) == 1 and W.numel() >= SPLIT_PANEL and W.is_contiguous() and W.dtype == U.dtype
    if decay_factor == 1.0 or alpha >= 0.0 or not large:
        (W if decay_factor == 1.0 else W.mul_(decay_factor)).add_(U, alpha=alpha)
        return
    torch._fused_sgd_(
        [W],
        [U],
        [],
        lr=-alpha,
        weight_decay=(decay_factor - 1.0) / alpha,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    )
