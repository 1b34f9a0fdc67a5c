"""Ways to divide a gradient in two: by coordinates, both in one pass, by subspaces, or in turns."""

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
from .._toolkit.random_keys import StackRNG
from .gradient_split import ALL, GradientSplit, StateFreeUpdate, slots_if_any

COORDINATE_KINDS = ("columns", "rows", "randk")
SPLIT_PANEL = 2**19
"""Entries of a panel on CPU: more than ``write.WRITE_PANEL``, as each needs a dozen calls."""

DirectionFn = Callable[[Tensor, slice, slice], Tensor]
"""Direction of the coordinates R of the matrices `ks`, of which `part` is asked for."""


@dataclass(frozen=True)
class CoordinateSplit(GradientSplit):
    """A random choice of columns, rows or single entries (``"randk"``), stored as int32 numbers.

    Entries are numbered row by row. They are kept as the columns of a 1 x mn matrix, so their
    state is (1, c). An index of 4 bytes beside 8 bytes of moments is cheaper than a seed: drawing
    a quarter of 1024 x 4096 entries again takes more than ten times as long as a whole step.

    Attributes:
        kind: One of ``COORDINATE_KINDS``.
        share: How many of them are chosen, or their part, rounded down.
        ordered: Whether numbers ascend; else they stay as drawn.
        ages: Whether each counts the updates of its own.
    """

    handles_nonfinite: ClassVar[tuple[str, ...]] = ("adamw",)

    kind: str
    share: float
    ordered: bool = True
    ages: bool = False

    @property
    def dim(self) -> int:
        """Dimension along which coordinates are taken."""
        return -2 if self.kind == "rows" else -1

    @property
    def axes(self) -> str:
        """Axes of the chosen part, for slots."""
        return {"columns": "mc", "rows": "cn", "randk": "1c"}[self.kind]

    def length(self, m: int, n: int) -> int:
        """How many there are."""
        return {"columns": n, "rows": m, "randk": m * n}[self.kind]

    @override
    def slots(self, m: int, n: int, base_optimizer: BaseOptimizer) -> dict[str, Slot]:
        length = self.length(m, n)
        c = min(self.share, length) if isinstance(self.share, int) else int(self.share * length)
        # another letter, so that a run does not take numbers in one order for those in the other
        axis = "c" if self.ordered else "u"
        index = Slot(axis, dtype=torch.int32, **{axis: c})  # type: ignore[arg-type]
        index_slots = {"index": index, "age": index} if self.ages else {"index": index}
        return slots_if_any(
            c, self.share, m, n, {**index_slots, **base_optimizer.slots(self.axes, c=c)}
        )

    def draw(self, rng: StackRNG, length: int, c: int) -> Tensor:
        """Numbers (K, c), every set equally likely."""
        return torch.stack(
            [
                torch.randperm(length, generator=rng.generator(k))[:c]
                for k in range(len(rng.indices))
            ]
        )

    def find(self, rng: StackRNG, m: int, n: int, old: Tensor) -> Tensor:
        """What `draw` drew, in the order in which it is kept, like `old`."""
        length = self.length(m, n)
        index = self.draw(rng, length, old.shape[-1])
        if self.ordered:  # faster than a sort of many
            chosen = torch.zeros(len(index), length, dtype=torch.bool)
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
            moments = {k: X for k, X in state.items() if k not in ("index", "age")}
            if self.kind != "rows":  # a change moves rows
                moments = {k: X.mT for k, X in moments.items()}
            base_optimizer.carry_state(policy, moments, change, w.t - 1)
        if "age" in state:
            age = state["age"]
            age.zero_() if w.is_first_refresh else age.copy_(
                change.apply(age.unsqueeze(-1)).squeeze(-1)
            )
        index.copy_(new)

    @override
    def terms(
        self, w: Member, base_optimizer: BaseOptimizer, t: int, state_free: StateFreeUpdate
    ) -> tuple[Term, ...]:
        """One term for both."""
        assert w.grad is not None
        adam_step: int | Tensor = t
        if "age" in w.state:
            counted = 1 if w.finite is None else w.finite.to(torch.int32).view(-1, 1)
            adam_step = w.state["age"].add_(counted).unsqueeze(-1 if self.kind == "rows" else -2)
        moments = {k: X for k, X in w.state.items() if k not in ("index", "age")}

        def step(R: Tensor, ks: slice, part: slice) -> Tensor:
            state = {k: self.panel_of(X, ks, part) for k, X in moments.items()}
            own_step = (
                adam_step if isinstance(adam_step, int) else self.panel_of(adam_step, ks, part)
            )
            return base_optimizer.direction(
                state, R, own_step, finite=None if w.finite is None else w.finite[ks]
            )

        return (
            SplitTerm(
                self, w.grad, w.state["index"], state_free, step, base_optimizer, moments, adam_step
            ),
        )

    def panel_of(self, X: Tensor, ks: slice, part: slice) -> Tensor:
        """State or clocks of what a panel asks for."""
        if self.kind == "rows":
            return X[ks, part]
        if self.kind == "randk":
            return X[ks, :, part]
        return X[ks] if X.shape[1] == 1 else X[ks, part]


@dataclass(frozen=True, eq=False)
class SplitTerm(Term):
    """`step` on the chosen coordinates of G, `state_free` on the rest, in one pass over the weight.

    Moments move while the weight is written: every coordinate is asked for exactly once, a panel
    of rows at a time, so that what belongs together meets in the cache. A weight that cannot be
    written so, or a flag on a device that multiplies the term, makes it whole first.

    Attributes:
        coordinates: What the coordinates are.
        G: (K, m, n).
        index: (K, c) their numbers.
        state_free: Direction of the others.
        step: Direction of the chosen ones (K, ., .): rows `part` if these are columns, else
            coordinates `part`.
        base_optimizer: None, or what `step` is, for a kernel that does both parts.
        moments: Its state.
        adam_step: Its number of this update, or clocks that broadcast against the coordinates.
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
        """Which rows or entries a panel holds is known to the host, if they are in order."""
        known = self.coordinates.ordered and self.G.device.type == "cpu"
        return self.coordinates.kind == "columns" or known

    @cached_property
    def positions(self) -> Tensor:
        """The numbers as gather and scatter want them."""
        return self.index.long()

    @property
    @override
    def mT(self) -> Term:
        """Columns are rows then, whose direction is made beforehand."""
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
            max(1, SPLIT_PANEL // panel.shape[-1])
            if len(panel) == 1 and self.supports_row_panels
            else stop
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
        """Adam inside and no other term beside it."""
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
        )
        return True

    def _fill_rows(self, U: Tensor, ks: slice, rows: slice) -> None:
        """Put the rows `rows` of both parts into U."""
        X = self.G[ks, rows]
        self.state_free(X, ks, U)
        if self.coordinates.kind == "randk":
            X, U = X.flatten(1).unsqueeze(1), U.flatten(1).unsqueeze(1)
        part, positions = self._part_in_rows(ks, rows)
        if positions.numel():
            N = self.step(_gather(X, self.coordinates.dim, positions), ks, part)
            _scatter_(U, self.coordinates.dim, positions, N)

    def _part_in_rows(self, ks: slice, rows: slice) -> tuple[slice, Tensor]:
        """What `step` is asked for in these rows, and where it stands in the panel."""
        start, stop, _ = rows.indices(self.G.shape[-2])
        if self.coordinates.kind == "columns":
            return rows, self.positions[ks]
        if (start, stop) == (0, self.G.shape[-2]):
            return ALL, self.positions[ks]
        unit = 1 if self.coordinates.kind == "rows" else self.G.shape[-1]
        numbers = self.positions[ks]  # a single matrix: only large ones are cut
        edges = torch.tensor([[start * unit, stop * unit]])
        low, high = torch.searchsorted(numbers, edges)[0].tolist()
        return slice(low, high), numbers[:, low:high] - start * unit


def _gather(X: Tensor, dim: int, positions: Tensor) -> Tensor:
    """Rows or columns of X (K, m, n), a new tensor; by the copy that is fastest."""
    if len(X) == 1:
        return X[0].index_select(dim, positions[0]).unsqueeze(0)
    return X.take_along_dim(positions.unsqueeze(-1 if dim == -2 else -2), dim)


def _scatter_(U: Tensor, dim: int, positions: Tensor, N: Tensor) -> None:
    """Rows or columns of U (K, m, n) <- N."""
    if len(U) == 1 and dim == -2:
        U[0].index_copy_(0, positions[0], N[0])
    else:
        U.scatter_(dim, positions.unsqueeze(-1 if dim == -2 else -2).expand_as(N), N)


def _decay_and_add_(W: Tensor, U: Tensor, decay_factor: float, alpha: float) -> None:
    """W <- decay_factor W + alpha U, in place; large ones in one pass, by torch's kernel of SGD.

    That kernel rounds the last entries of a tensor differently, so nothing that may be part of a
    stack goes there, and takes tensors for runs of memory, which cut ones are not.
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
