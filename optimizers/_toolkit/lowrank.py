"""What methods share that run Adam inside a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .._core.rule import AdamFactored, Member, Rule, Slot, Term
from .._core.validation import check, check_adam, check_choices, resolve_rank
from .base_optimizers import Adam, BaseOptimizer
from .moments import adam_reference, bias_correction, check_moment_policy
from .projectors import Projector, make_projector, projects_columns
from .random_keys import StackRNG

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")


@dataclass(frozen=True)
class LowRankRule(Rule, abstract=True):
    """P <- a basis of G every T steps; N = Adam's direction of R = P^T G; its use is the method's.

    The fields are those that GaLore's docstring explains.
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

    def __post_init__(self) -> None:
        check_adam(self.betas, self.eps)
        resolve_rank(self.rank, 2**62)  # raises for what is neither a count nor a fraction
        check_choices(self, proj_type=PROJ_TYPES, compat=(None, "reference"))
        for name, least in (("update_proj_gap", 1), ("seed", 0)):
            value = getattr(self, name)
            check(
                isinstance(value, int) and value >= least,
                f"{name} must be an int of at least {least}, got {value!r}",
            )
        check_moment_policy(self.moments, self.projector.permutes)
        check(
            not self.published or self.projection in ("svd", "svd_full"),
            f"compat='reference' has an exact SVD, not projection={self.projection!r}",
        )
        check(
            self.correct_bias or self.published,
            "correct_bias=False exists only under compat='reference'",
        )

    @property
    def handles_nonfinite(self) -> bool:  # type: ignore[override]
        """All that moves takes flags, but in the published order."""
        return not self.published

    @property
    def published(self) -> bool:
        """Whether the order of the published code is asked for."""
        return self.compat == "reference"

    @property
    def projector(self) -> Projector:
        """How P is found, stored and used."""
        both, kind = self.proj_type == "full", "svd_full" if self.published else self.projection
        return make_projector(kind, both=both, lapack_signs=self.published)

    @property
    def refresh_interval(self) -> int:
        """Updates between two bases."""
        return self.update_proj_gap

    def transpose(self, m: int, n: int) -> bool:
        """The right side is projected by turning the weight: then it is the rows, always."""
        return projects_columns(self.proj_type, m, n)

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """What the projector keeps, and the moments inside."""
        full = self.proj_type == "full"
        r = min(resolve_rank(self.rank, min(m, n) if full else m), m, n)
        return {
            **self.projector.slots(m, r),
            **self.base_optimizer.slots("rr" if full else "rn", r=r),
        }

    def refresh(self, w: Member) -> None:
        """A new basis from this gradient, and what becomes of the moments."""
        assert w.grad is not None
        old = self.projector.state_tensors(w.state)
        rng = StackRNG(self.seed, w.indices, w.t)
        find = partial(self.projector.find, rng=rng, transposed=w.transposed)
        new = w.reductions.on_one_rank(find, w.grad, *old)
        if not w.is_first_refresh:
            self.base_optimizer.carry_state(
                self.moments, w.state, self.projector.overlap(old, new), w.t - 1
            )
        self.projector.install(w.state, new)

    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        """What the projector keeps for all weights with as many rows."""
        return self.projector.shared(m)

    @property
    def base_optimizer(self) -> BaseOptimizer:
        """The optimizer that runs on R."""
        return Adam(self.betas, self.adam_eps())

    def direction(self, w: Member, R: Tensor) -> tuple[Tensor, float]:
        """The direction N of R (K, r, n), and what still multiplies it.

        That is 1, or in the published order Adam's bias correction.
        """
        t = self.adam_step(w)
        if not self.published:
            return self.base_optimizer.direction(w.state, R, t, w.reductions, w.finite), 1.0
        (beta1, beta2), M, V = self.betas, w.state["exp_avg"], w.state["exp_avg_sq"]
        N, factor = adam_reference(R, M, V, t, beta1=beta1, beta2=beta2, eps=self.adam_eps())
        return N, factor if self.correct_bias else 1.0

    def lifted_term(self, w: Member, R: Tensor) -> tuple[Term, float]:
        """The term P N (or P N Q^T) of N = direction(R), and what still multiplies it."""
        P, base_optimizer = self.projector.left_factor(w.state, w.m, R.dtype), self.base_optimizer
        if P is not None and isinstance(base_optimizer, Adam) and not self.published:
            M, V = w.state["exp_avg"], w.state["exp_avg_sq"]  # N is made where it is used
            t, betas, eps = self.adam_step(w), base_optimizer.betas, base_optimizer.eps
            return AdamFactored(P, R, M, V, t, betas, eps, w.finite), 1.0
        N, factor = self.direction(w, R)
        return self.projector.lift(w.state, N, w.m), factor

    def adam_step(self, w: Member) -> int:
        """Adam's t: moments that were reset count from their refresh."""
        return w.age + 1 if self.moments == "reset" else w.t

    def bias_factor(self, w: Member) -> float:
        """sqrt(1 - beta2^t) / (1 - beta1^t), or 1 without bias correction."""
        return bias_correction(self.adam_step(w), *self.betas) if self.correct_bias else 1.0

    def adam_eps(self) -> float:
        """Adam's eps; unset it is torch's 1e-8, or the published code's 1e-6."""
        return self.eps if self.eps is not None else 1e-6 if self.published else 1e-8

    def adamw_order(self) -> tuple[bool, float] | None:
        """The published code treats unprojected parameters alike."""
        return (self.correct_bias, self.adam_eps()) if self.published else None
