"""Ways to divide a gradient in two: by coordinates, both in one pass, by subspaces, or in turns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from .inner import AdamW, Inner
from .moments import Match
from .projectors import KINDS, Projector, projector, turns_right
from .rule import (
    AdamFactored,
    Blocks,
    Dense,
    Factors,
    Member,
    Residual,
    Scaled,
    Slot,
    Term,
    check,
)
from .sketches import Draws
from .turns import Turns
from .ways import ALL, Free, Way, free_of, rounded, some

COORDINATES = ("columns", "rows", "randk")
NOISE = 64.0
"""Units of round-off, relative to G's root mean square, up to which a residual has no sign."""
PANEL = 2**19
"""Entries of a panel on CPU: more than ``write.PANEL``, as each needs a dozen calls."""

Step = Callable[[Tensor, slice, slice], Tensor]
"""Direction of the coordinates R of the matrices `ks`, of which `part` is asked for."""


@dataclass(frozen=True)
class Coordinates(Way):
    """A random choice of columns, rows or single entries (``"randk"``), stored as int32 numbers.

    Entries are numbered row by row. They are kept as the columns of a 1 x mn matrix, so their
    state is (1, c). An index of 4 bytes beside 8 bytes of moments is cheaper than a seed: drawing
    a quarter of 1024 x 4096 entries again takes more than ten times as long as a whole step.

    Attributes:
        kind: One of ``COORDINATES``.
        share: How many of them are chosen, or their part, rounded down.
        ordered: Whether numbers ascend; else they stay as drawn.
        ages: Whether each counts the updates of its own.
    """

    guarded: ClassVar[tuple[str, ...]] = ("adamw",)

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

    def slots(self, m: int, n: int, inner: Inner) -> dict[str, Slot]:
        """See :class:`Way`."""
        length = self.length(m, n)
        c = min(self.share, length) if isinstance(self.share, int) else int(self.share * length)
        # another letter, so that a run does not take numbers in one order for those in the other
        axis = "c" if self.ordered else "u"
        index = Slot(axis, dtype=torch.int32, **{axis: c})  # type: ignore[arg-type]
        told = {"index": index, "age": index} if self.ages else {"index": index}
        return some(c, self.share, m, n, {**told, **inner.slots(self.axes, c=c)})

    def draw(self, draws: Draws, length: int, c: int) -> Tensor:
        """Numbers (K, c), every set equally likely."""
        return torch.stack(
            [
                torch.randperm(length, generator=draws.generator(k))[:c]
                for k in range(len(draws.indices))
            ]
        )

    def find(self, draws: Draws, m: int, n: int, old: Tensor) -> Tensor:
        """What `draw` drew, in the order in which it is kept, like `old`."""
        length = self.length(m, n)
        index = self.draw(draws, length, old.shape[-1])
        if self.ordered:  # faster than a sort of many
            chosen = torch.zeros(len(index), length, dtype=torch.bool)
            chosen.scatter_(1, index, True)
            index = chosen.nonzero()[:, 1].view(len(index), -1)
        return index.to(old.device, old.dtype)

    def renew(self, w: Member, draws: Draws, inner: Inner, policy: str) -> None:
        """See :class:`Way`."""
        state, index = w.state, w.state["index"]
        new = self.find(draws, w.m, w.n, index)
        change = Match(index.clone(), new)
        if not w.fresh:
            moments = {k: X for k, X in state.items() if k not in ("index", "age")}
            if self.kind != "rows":  # a change moves rows
                moments = {k: X.mT for k, X in moments.items()}
            inner.carry(policy, moments, change, w.t - 1)
        if "age" in state:
            age = state["age"]
            age.zero_() if w.fresh else age.copy_(change.turn(age.unsqueeze(-1)).squeeze(-1))
        index.copy_(new)

    def terms(self, w: Member, inner: Inner, t: int, free: Free) -> tuple[Term, ...]:
        """See :class:`Way`; one term for both."""
        assert w.grad is not None
        clock: int | Tensor = t
        if "age" in w.state:
            moved = 1 if w.ok is None else w.ok.to(torch.int32).view(-1, 1)
            clock = w.state["age"].add_(moved).unsqueeze(-1 if self.kind == "rows" else -2)
        moments = {k: X for k, X in w.state.items() if k not in ("index", "age")}

        def step(R: Tensor, ks: slice, part: slice) -> Tensor:
            state = {k: self.cut(X, ks, part) for k, X in moments.items()}
            own = clock if isinstance(clock, int) else self.cut(clock, ks, part)
            return inner.direction(state, R, own, ok=None if w.ok is None else w.ok[ks])

        return (Split(self, w.grad, w.state["index"], free, step, inner, moments, clock),)

    def cut(self, X: Tensor, ks: slice, part: slice) -> Tensor:
        """State or clocks of what a panel asks for."""
        if self.kind == "rows":
            return X[ks, part]
        if self.kind == "randk":
            return X[ks, :, part]
        return X[ks] if X.shape[1] == 1 else X[ks, part]


@dataclass(frozen=True, eq=False)
class Split(Term):
    """`step` on the chosen coordinates of G and `free` on all others, in one pass over the weight.

    Moments move while the weight is written: every coordinate is asked for exactly once, a panel
    of rows at a time, so that what belongs together meets in the cache. A weight that cannot be
    written so, or a flag on a device that multiplies the term, makes it whole first.

    Attributes:
        where: What the coordinates are.
        G: (K, m, n).
        index: (K, c) their numbers.
        free: Direction of the others.
        step: Direction of the chosen ones (K, ., .): rows `part` if these are columns, else
            coordinates `part`.
        inner: None, or what `step` is, for a kernel that does both parts.
        moments: Its state.
        clock: Its number of this update, or clocks that broadcast against the coordinates.
    """

    where: Coordinates
    G: Tensor
    index: Tensor
    free: Free
    step: Step
    inner: Inner | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    clock: int | Tensor = 0
    fused: ClassVar[bool] = True
    _buffers: dict[torch.Size, Tensor] = field(default_factory=dict)

    @property
    def whole_rows(self) -> bool:  # type: ignore[override]
        """Which rows or entries a panel holds is known to the host, if they are in order."""
        known = self.where.ordered and self.G.device.type == "cpu"
        return self.where.kind == "columns" or known

    @cached_property
    def place(self) -> Tensor:
        """The numbers as gather and scatter want them."""
        return self.index.long()

    @property
    def mT(self) -> Term:
        """See :class:`Term`; columns are rows then, whose direction is made beforehand."""
        if self.where.kind == "randk":
            return Dense(self.whole().mT)
        N = self.step(_take(self.G, self.where.dim, self.place), ALL, ALL).mT
        other = "rows" if self.where.kind == "columns" else "columns"
        where = Coordinates(other, self.where.share, self.where.ordered)
        return Split(where, self.G.mT, self.index, self.free, lambda _, ks, part: N[ks, part])

    def scaled(self, c: Tensor) -> Term:
        """See :class:`Term`."""
        return Dense(self.whole().mul_(c))

    def whole(self) -> Tensor:
        """Both parts as one tensor (K, m, n)."""
        U = torch.empty_like(self.G, memory_format=torch.contiguous_format)
        self._fill(U, ALL, ALL)
        return U

    def add_(self, panel: Tensor, ks: slice, rows: slice, alpha: float) -> None:
        """See :class:`Term`."""
        self.write_(panel, ks, rows, 1.0, alpha)

    def write_(self, panel: Tensor, ks: slice, rows: slice, keep: float, alpha: float) -> None:
        """Panel <- keep * panel + alpha * term, in panels of its own."""
        start, stop, _ = rows.indices(self.G.shape[-2])
        height = max(1, PANEL // panel.shape[-1]) if len(panel) == 1 and self.whole_rows else stop
        for i in range(start, stop, height):
            j = min(i + height, stop)
            W = panel[:, i - start : j - start]
            U = self._buffers.get(W.shape)
            if U is None:
                U = self._buffers[W.shape] = self.G.new_empty(W.shape)
            self._fill(U, ks, slice(i, j))
            _move_(W, U, keep, alpha)

    def kernel_(self, W: Tensor, by: Factors, beside: Term | None = None) -> bool:
        """See :class:`Term`; Adam inside and no other term beside it."""
        if beside is not None or not isinstance(self.inner, AdamW):
            return False
        t, dim = self.clock, None if self.where.kind == "randk" else self.where.dim
        t = t.flatten(1) if isinstance(t, Tensor) else t
        (beta1, beta2), eps = self.inner.betas, self.inner.eps
        kernels.split_step_(
            W, self.G, self.index, dim, self.moments["exp_avg"], self.moments["exp_avg_sq"], t,
            by.keep, by.alpha, beta1=beta1, beta2=beta2, eps=eps, free=self.free.kind,
            free_scale=self.free.scale, floor=self.free.floor, control=by.control,
        )  # fmt: skip
        return True

    def _fill(self, U: Tensor, ks: slice, rows: slice) -> None:
        """Put the rows `rows` of both parts into U."""
        X = self.G[ks, rows]
        self.free(X, ks, U)
        if self.where.kind == "randk":
            X, U = X.flatten(1).unsqueeze(1), U.flatten(1).unsqueeze(1)
        part, place = self._inside(ks, rows)
        if place.numel():
            N = self.step(_take(X, self.where.dim, place), ks, part)
            _put(U, self.where.dim, place, N)

    def _inside(self, ks: slice, rows: slice) -> tuple[slice, Tensor]:
        """What `step` is asked for in these rows, and where it stands in the panel."""
        start, stop, _ = rows.indices(self.G.shape[-2])
        if self.where.kind == "columns":
            return rows, self.place[ks]
        if (start, stop) == (0, self.G.shape[-2]):
            return ALL, self.place[ks]
        unit = 1 if self.where.kind == "rows" else self.G.shape[-1]
        numbers = self.place[ks]  # a single matrix: only large ones are cut
        edges = torch.tensor([[start * unit, stop * unit]])
        low, high = torch.searchsorted(numbers, edges)[0].tolist()
        return slice(low, high), numbers[:, low:high] - start * unit


def _take(X: Tensor, dim: int, place: Tensor) -> Tensor:
    """Rows or columns of X (K, m, n), a new tensor; by the copy that is fastest."""
    if len(X) == 1:
        return X[0].index_select(dim, place[0]).unsqueeze(0)
    return X.take_along_dim(place.unsqueeze(-1 if dim == -2 else -2), dim)


def _put(U: Tensor, dim: int, place: Tensor, N: Tensor) -> None:
    """Rows or columns of U (K, m, n) <- N."""
    if len(U) == 1 and dim == -2:
        U[0].index_copy_(0, place[0], N[0])
    else:
        U.scatter_(dim, place.unsqueeze(-1 if dim == -2 else -2).expand_as(N), N)


def _move_(W: Tensor, U: Tensor, keep: float, alpha: float) -> None:
    """W <- keep W + alpha U, in place; for large ones in one pass, by torch's kernel of SGD.

    That kernel rounds the last entries of a tensor differently, so nothing that may be part of a
    stack goes there, and takes tensors for runs of memory, which cut ones are not.
    """
    large = len(W) == 1 and W.numel() >= PANEL and W.is_contiguous() and W.dtype == U.dtype
    if keep == 1.0 or alpha >= 0.0 or not large:
        (W if keep == 1.0 else W.mul_(keep)).add_(U, alpha=alpha)
        return
    torch._fused_sgd_(
        [W], [U], [], lr=-alpha, weight_decay=(keep - 1.0) / alpha, momentum=0.0, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=True,
    )  # fmt: skip


# subspaces


@dataclass(frozen=True)
class Subspace(Way):
    """The part P P^T G (or P P^T G Q Q^T) of G, P a basis by any projector.

    Attributes:
        kind: Which projector, as :func:`projector` names it.
        share: Rank, or its part of the projected side, halves rounded to even.
        proj_type: Which side that is, as for :class:`LowRankRule`.
        published: LAPACK's own SVD, and signs of a residual that is round-off.
    """

    guarded: ClassVar[tuple[str, ...]] = ("adamw", "lion", "sgdm")

    kind: str
    share: float
    proj_type: str = "std"
    published: bool = False

    def __post_init__(self) -> None:
        self.projector  # noqa: B018  which refuses what does not go together

    @property
    def full(self) -> bool:
        """Whether both sides are projected."""
        return self.proj_type == "full"

    @property
    def projector(self) -> Projector:
        """How P is found, stored and used."""
        exact = self.published and self.kind == "svd"
        return projector("svd_full" if exact else self.kind, both=self.full, lapack_signs=exact)

    def transpose(self, m: int, n: int) -> bool:
        """See :class:`Way`; what is projected are rows."""
        return turns_right(self.proj_type, m, n)

    def slots(self, m: int, n: int, inner: Inner) -> dict[str, Slot]:
        """See :class:`Way`."""
        r = min(rounded(self.share, min(m, n) if self.full else m), m, n)
        slots = {**self.projector.slots(m, r), **inner.slots("rr" if self.full else "rn", r=r)}
        return some(r, self.share, m, n, slots)

    def renew(self, w: Member, draws: Draws, inner: Inner, policy: str) -> None:
        """See :class:`Way`."""
        assert w.grad is not None
        P, old = self.projector, self.projector.held(w.state)
        new = w.sums.once(partial(P.find, draws=draws, turned=w.turned), w.grad, *old)
        if not w.fresh:
            inner.carry(policy, w.state, P.overlap(old, new), w.t - 1)
        P.install(w.state, new)

    def terms(self, w: Member, inner: Inner, t: int, free: Free) -> tuple[Term, ...]:
        """See :class:`Way`: P N beside what is free of G - P R; sgd has one lift for both."""
        assert w.grad is not None
        P, G, state, m = self.projector, w.grad, w.state, w.m
        R = P.down(state, G, w.sums)  # (K, r, n); P^T G Q is (K, r, r)
        alone = free.kind == "no" or (self.holds_all(w, R.shape[-2]) and not self.published)
        if free.kind == "sgd" and not alone:
            by, N = R.new_full((1, 1, 1), free.scale), inner.direction(state, R, t, w.sums, w.ok)
            return P.lift(state, N.sub_(R, alpha=free.scale), m), Scaled(G, by)
        basis = P.factor(state, m, R.dtype)
        lift = self.lifted(w, inner, R, t, basis)
        if alone:
            return (lift,)
        if not self.published:  # what is round-off has no sign
            least = free_of(w, free.kind, free.scale, NOISE * torch.finfo(R.dtype).eps)
            free = least if free.floor is None else free

        def rest(k: slice, i: slice, j: slice) -> Tensor:
            return free(G[k, i, j] - P.back(state, R, m, k, i, j), k)

        if basis is None:
            return lift, Blocks(rest)
        return lift, Residual(rest, basis, R, G, free.scale, free.floor)

    def shared(self, m: int) -> Mapping[Hashable, int]:
        """See :class:`Way`."""
        return self.projector.shared(m)

    def lifted(self, w: Member, inner: Inner, R: Tensor, t: int, P: Tensor | None) -> Term:
        """The term P N (or P N Q^T) of inner's direction N of R."""
        state = w.state
        if P is not None and isinstance(inner, AdamW):  # N is made where it is used
            M, V = state["exp_avg"], state["exp_avg_sq"]
            return AdamFactored(P, R, M, V, t, inner.betas, inner.eps, w.ok)
        return self.projector.lift(state, inner.direction(state, R, t, w.sums, w.ok), w.m)

    def holds_all(self, w: Member, r: int) -> bool:
        """Whether G lies in the subspace, so that a residual is round-off and its signs noise."""
        known = self.kind.partition(":")[0] in ("svd", "svd_full", "range", "power")
        just_found = known and w.age == 0  # from the singular vectors of this very G
        side = max(w.m, w.n) if self.full else w.m
        return r == (min(w.m, w.n) if just_found else side)


def way_of(
    split: str, share: float, reset: str, inner: str, *, proj_type: str, published: bool,
    order: str, gap: int, seed: int,
) -> Way:  # fmt: skip
    """The way that a user names in ``split=``; the others say how it goes.

    Raises:
        ValueError: Unknown name, or settings that do not go together.
    """
    known = ("block", *COORDINATES, *KINDS)
    check(
        split.partition(":")[0] in known,
        f"split must be one of {', '.join(dict.fromkeys(known))}, got {split!r}",
    )
    check(
        split != "block" or reset != "none",
        "split='block' frees state, so reset='none' has nothing to keep: use 'changed'",
    )
    check(
        not published or reset != "changed",
        "compat='reference' has reset='all' or 'none', not 'changed'",
    )
    changed = reset == "changed"
    if split == "block":
        return Turns(order, share, gap, seed, changed)
    if split in COORDINATES:
        return Coordinates(split, share, reset != "none", changed and inner == "adamw")
    return Subspace(split, share, proj_type, published)
