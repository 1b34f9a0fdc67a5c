"""FRUGAL on subspaces: Adam on the part inside a basis, a state-free update of the residual."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .._core.rule import AdamFactored, Member, PanelTerm, Residual, Scaled, Slot, Term
from .._toolkit.base_optimizers import Adam, BaseOptimizer
from .._toolkit.projectors import Projector, make_projector, projects_columns
from .._toolkit.random_keys import StackRNG
from .gradient_split import (
    GradientSplit,
    StateFreeUpdate,
    make_state_free,
    resolve_count,
    slots_if_any,
)

ROUNDOFF_ULPS = 64.0
"""Units of round-off, relative to G's root mean square, up to which a residual has sign 0."""


@dataclass(frozen=True)
class SubspaceSplit(GradientSplit):
    """The part P P^T G (or P P^T G Q Q^T) of G, P a basis by any projector.

    Attributes:
        kind: Name of the projector, as :func:`make_projector` takes it.
        share: Rank, or its part of the projected side, halves rounded to even.
        proj_type: Projected side, as for :class:`LowRankRule`.
        published: Whether to use LAPACK's own SVD, and signs of a residual that is round-off.
    """

    handles_nonfinite: ClassVar[tuple[str, ...]] = ("adamw", "lion", "sgdm")

    kind: str
    share: float
    proj_type: str = "std"
    published: bool = False

    def __post_init__(self) -> None:
        self.projector  # noqa: B018  building it refuses what excludes each other

    @property
    def full(self) -> bool:
        """Whether both sides are projected."""
        return self.proj_type == "full"

    @property
    @override
    def splits(self) -> frozenset[str]:
        return frozenset(() if self.full else ("cols",))

    @property
    def projector(self) -> Projector:
        """The projector that finds, stores and applies P."""
        exact = self.published and self.kind == "svd"
        kind = "svd_full" if exact else self.kind
        return make_projector(kind, both=self.full, lapack_signs=exact)

    @override
    def transpose(self, m: int, n: int) -> bool:
        """The projected side becomes the rows."""
        return projects_columns(self.proj_type, m, n)

    @override
    def slots(self, m: int, n: int, base_optimizer: BaseOptimizer) -> dict[str, Slot]:
        side = min(m, n) if self.full else m
        r = min(resolve_count(self.share, side), m, n)
        axes = "rr" if self.full else "rn"
        P, moments = self.projector, base_optimizer.slots(axes, r=r)
        slots = {**P.slots(m, r), **P.beside_coordinates(moments)}
        return slots_if_any(r, self.share, m, n, slots)

    @override
    def reselect(
        self, w: Member, rng: StackRNG, base_optimizer: BaseOptimizer, policy: str
    ) -> None:
        assert w.grad is not None
        P = self.projector
        old = P.state_tensors(w.state)
        new = P.find_on_shards(
            w.grad, *old, rng=rng, transposed=w.transposed, reductions=w.reductions
        )
        if not w.is_first_refresh:
            base_optimizer.carry_state(policy, w.state, P.overlap(old, new), w.t - 1)
        P.install(w.state, new)

    @override
    def terms(
        self, w: Member, base_optimizer: BaseOptimizer, t: int | Tensor, state_free: StateFreeUpdate
    ) -> tuple[Term, ...]:
        """P N beside the state-free update of the residual G - P R; SGD has one lift for both."""
        assert w.grad is not None
        P = self.projector
        G = w.grad
        state = w.state
        m = w.m
        R = P.project(state, G, w.reductions)  # (K, r, n); with two sides P^T G Q is (K, r, r)
        is_roundoff = self.covers_gradient(w, R.shape[-2]) and not self.published
        no_residual = state_free.kind == "no" or is_roundoff
        if state_free.kind == "sgd" and not no_residual:  # P N + f (G - P R) = P (N - f R) + f G
            N = base_optimizer.direction(state, R, t, w.reductions, w.finite)
            f = R.new_full((1, 1, 1), state_free.scale)
            return P.lift(state, N.sub_(R, alpha=state_free.scale), m), Scaled(G, f)
        basis = P.left_factor(state, m, R.dtype)
        lift = self.lifted_term(w, base_optimizer, R, t, basis)
        if no_residual:
            return (lift,)
        if not self.published and state_free.floor is None:  # so that round-off has the sign 0
            threshold = ROUNDOFF_ULPS * torch.finfo(R.dtype).eps
            state_free = make_state_free(w, state_free.kind, state_free.scale, threshold)

        def residual(k: slice, i: slice, j: slice) -> Tensor:
            return state_free(G[k, i, j] - P.lift_block(state, R, m, k, i, j), k)

        if basis is None:
            return lift, PanelTerm(residual)
        return lift, Residual(residual, basis, R, G, state_free.scale, state_free.floor)

    @override
    def shared(self, m: int) -> Mapping[Hashable, int]:
        return self.projector.shared(m)

    def lifted_term(
        self,
        w: Member,
        base_optimizer: BaseOptimizer,
        R: Tensor,
        t: int | Tensor,
        P: Tensor | None,
    ) -> Term:
        """The term P N (or P N Q^T) of the base optimizer's direction N of R."""
        state = w.state
        if P is not None and isinstance(base_optimizer, Adam):  # N is made during the write
            M, V = state["exp_avg"], state["exp_avg_sq"]
            return AdamFactored(P, R, M, V, t, base_optimizer.betas, base_optimizer.eps, w.finite)
        N = base_optimizer.direction(state, R, t, w.reductions, w.finite)
        return self.projector.lift(state, N, w.m)

    def covers_gradient(self, w: Member, r: int) -> bool:
        """Whether G lies in the subspace, so that a residual is round-off and its signs noise."""
        follows_gradient = self.kind.partition(":")[0] in ("svd", "svd_full", "range", "power")
        just_found = follows_gradient and w.age == 0  # P has singular vectors of this very G
        side = max(w.m, w.n) if self.full else w.m
        return r == (min(w.m, w.n) if just_found else side)
