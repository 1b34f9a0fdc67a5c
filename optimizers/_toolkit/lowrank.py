"""Base rule of GaLore, Fira and APOLLO: Adam inside a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from .._core.rule import AdamFactored, Member, Rule, Slot, Term
from .._core.validation import (
    check,
    check_adam,
    check_choices,
    check_count_or_share,
    check_flags,
    check_ints,
    resolve_rank,
    shown,
)
from .base_optimizers import Adam, BaseOptimizer
from .moments import MOMENT_POLICIES, adam_reference, bias_correction, check_moment_policy
from .projectors import Projector, make_projector, projects_columns
from .random_keys import StackRNG

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")


@dataclass(frozen=True)
class LowRankRule(Rule, abstract=True):
    """P <- a basis of G every T steps; N = Adam's direction of R = P^T G, which the method uses.

    The fields are arguments of :class:`GaLore`, whose docstring explains them.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    rank: int | float = 128
    update_proj_gap: int = 200
    proj_type: str = "std"
    projection: str = "svd"
    moments: str = "keep"
    correct_bias: bool = True
    compat: str | None = None
    seed: int = 0

    lifts: ClassVar[bool] = True
    """Whether the method lifts coordinates; set to False where it only measures them."""
    published_projections: ClassVar[tuple[tuple[str, ...], str]] = (
        ("svd", "svd_full"),
        "an exact SVD",
    )
    """Values of ``projection`` that the published code has, and the words for them."""

    def __post_init__(self) -> None:
        check_adam(self, eps_may_be_none=True)
        check_count_or_share(self, "rank")
        check_choices(
            self, proj_type=PROJ_TYPES, compat=(None, "reference"), moments=MOMENT_POLICIES
        )
        check_ints(self, update_proj_gap="[1, inf)", seed="[0, inf)")
        check_flags(self, "correct_bias")
        check(
            isinstance(self.projection, str),
            f"projection must be the name of a subspace, got {shown(self.projection)}",
        )
        kinds, words = self.published_projections
        check(
            not self.published or self.projection in kinds,
            f"compat='reference' has {words}, not projection={self.projection!r}",
        )
        check_moment_policy(self.moments, self.projector.permutes)
        check(
            self.projector.is_orthonormal or self.moments in ("keep", "reset"),
            f"moments={self.moments!r} needs orthonormal bases, which projection="
            f"{self.projection!r} has not; use moments='keep' or 'reset'",
        )
        check(
            self.correct_bias or self.published,
            "correct_bias=False exists only under compat='reference'",
        )

    @property
    def splits(self) -> frozenset[str]:  # type: ignore[override]
        """The columns, which a basis of one side leaves whole; none in the published order."""
        is_one_sided = self.proj_type != "full" and not self.published
        return frozenset(("cols",) if is_one_sided else ())

    @override
    def refresh(self, w: Member) -> None:
        """P <- a basis of this gradient; the moments follow by their policy."""
        assert w.grad is not None
        P = self.projector
        old = P.state_tensors(w.state)
        rng = StackRNG(self.seed, w.indices, w.t)
        new = P.find_on_shards(
            w.grad, *old, rng=rng, transposed=w.transposed, reductions=w.reductions
        )
        if not w.is_first_refresh:
            change = P.overlap(old, new)
            self.base_optimizer.carry_state(self.moments, w.state, change, w.t - 1)
        P.install(w.state, new)

    def lifted_term(self, w: Member, R: Tensor) -> tuple[Term, float]:
        """The term P N (or P N Q^T) with N = direction(R), and a factor still to be applied."""
        P = self.projector.left_factor(w.state, w.m, R.dtype)
        base_optimizer = self.base_optimizer
        if P is not None and isinstance(base_optimizer, Adam) and not self.published:
            M = w.state["exp_avg"]
            V = w.state["exp_avg_sq"]
            t = self.adam_step(w)
            betas = base_optimizer.betas
            # N is made during the write, so that no r x n buffer stays
            eps = base_optimizer.eps
            return AdamFactored(P, R, M, V, t, betas, eps, w.finite, overwrites=True), 1.0
        N, factor = self.direction(w, R)
        return self.projector.lift(w.state, N, w.m), factor

    def direction(self, w: Member, R: Tensor) -> tuple[Tensor, float]:
        """The direction N of R (K, r, n), and a factor still to be applied.

        The factor is 1, or in the published order Adam's bias correction.
        """
        t = self.adam_step(w)
        if not self.published:
            n = None if self.proj_type == "full" else w.n
            base_optimizer = self.base_optimizer
            return base_optimizer.direction(w.state, R, t, w.reductions, w.finite, n), 1.0
        M = w.state["exp_avg"]
        V = w.state["exp_avg_sq"]
        beta1, beta2 = self.betas
        assert not isinstance(t, Tensor)  # refused under capturable
        N, factor = adam_reference(R, M, V, t, beta1=beta1, beta2=beta2, eps=self.adam_eps())
        return N, factor if self.correct_bias else 1.0

    @property
    def base_optimizer(self) -> BaseOptimizer:
        """The optimizer that runs on R."""
        return Adam(self.betas, self.adam_eps())

    @property
    def projector(self) -> Projector:
        """The projector that finds, stores and applies P."""
        both = self.proj_type == "full"
        kind = self.projector_kind
        lapack_signs = self.published and kind == "svd_full"
        return make_projector(kind, both=both, lapack_signs=lapack_signs, lifts=self.lifts)

    @property
    def projector_kind(self) -> str:
        """Name of the projector; the published code has the thin SVD."""
        return "svd_full" if self.published else self.projection

    def adam_step(self, w: Member) -> int | Tensor:
        """Adam's t: moments that were reset count from their refresh."""
        return w.count(since_refresh=self.moments == "reset")

    def bias_factor(self, w: Member) -> float | Tensor:
        """sqrt(1 - beta2^t) / (1 - beta1^t), or 1 without bias correction."""
        return bias_correction(self.adam_step(w), *self.betas) if self.correct_bias else 1.0

    @override
    def capture_obstacle(self) -> str | None:
        if self.published:
            return "compat='reference', whose step has the bias correction of the host's clock"
        if getattr(self, "inner", "adamw") == "adafactor":
            return "inner='adafactor', whose decay depends on the number of the update"
        return None

    def adam_eps(self) -> float:
        """Adam's eps; None is torch's 1e-8, or the published code's 1e-6."""
        if self.eps is not None:
            return self.eps
        return 1e-6 if self.published else 1e-8

    @property
    def published(self) -> bool:
        """Whether the order of the published code is asked for."""
        return self.compat == "reference"

    @property
    @override
    def bases(self) -> frozenset[str]:  # type: ignore[override]
        """P, and Q of two sides; none in the published code, which keeps them in full precision."""
        has_codes = self.projector.is_orthonormal and not self.published
        return frozenset(("basis", "basis_right") if has_codes else ())

    @property
    @override
    def refresh_interval(self) -> int:
        return self.update_proj_gap

    @property
    @override
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """False in the published order, whose moments take no flags."""
        return not self.published

    @override
    def transpose(self, m: int, n: int) -> bool:
        """The right side is projected as the rows of the transposed weight."""
        return projects_columns(self.proj_type, m, n)

    @override
    def state(self, m: int, n: int) -> dict[str, Slot]:
        """Slots of the basis and of the base optimizer."""
        both = self.proj_type == "full"
        r = min(resolve_rank(self.rank, min(m, n) if both else m), m, n)
        axes = "rr" if both else "rn"
        P, slots = self.projector, self.base_optimizer.slots(axes, r=r)
        return {**P.slots(m, r), **P.beside_coordinates(slots)}

    @override
    def index_counts(self, sides: tuple[tuple[int, int], ...]) -> Mapping[str, int]:
        return {"index": sides[0][0]}

    @override
    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        return self.projector.shared(m)

    @override
    def adamw_order(self) -> tuple[bool, float] | None:
        """The published code treats unprojected parameters in its own order too."""
        return (self.correct_bias, self.adam_eps()) if self.published else None
