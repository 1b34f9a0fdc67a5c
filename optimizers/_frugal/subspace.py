"""FRUGAL on subspaces: Adam on the part inside a basis, a state-free update of what is left."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .._core.rule import AdamFactored, Blocks, Member, Residual, Scaled, Slot, Term
from .._toolkit.base_optimizers import AdamW, Inner
from .._toolkit.projectors import Projector, projector, turns_right
from .._toolkit.random_keys import Draws
from .gradient_split import Free, Way, free_of, rounded, some

NOISE = 64.0
"""Units of round-off, relative to G's root mean square, up to which a residual has no sign."""


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
