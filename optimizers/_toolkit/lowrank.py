"""What methods share that run Adam inside a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .._core.rule import AdamFactored, Member, Rule, Slot, Term
from .._core.validation import check, check_adam, check_known, rank_of
from .base_optimizers import AdamW, Inner
from .moments import adam_reference, bias_correction, check_policy
from .projectors import Projector, projector, turns_right
from .random_keys import Draws

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
        rank_of(self.rank, 2**62)  # raises for what is neither a count nor a fraction
        check_known(self, proj_type=PROJ_TYPES, compat=(None, "reference"))
        for name, least in (("update_proj_gap", 1), ("seed", 0)):
            value = getattr(self, name)
            check(
                isinstance(value, int) and value >= least,
                f"{name} must be an int of at least {least}, got {value!r}",
            )
        check_policy(self.moments, self.projector.moves)
        check(
            not self.published or self.projection in ("svd", "svd_full"),
            f"compat='reference' has an exact SVD, not projection={self.projection!r}",
        )
        check(
            self.correct_bias or self.published,
            "correct_bias=False exists only under compat='reference'",
        )

    @property
    def guarded(self) -> bool:  # type: ignore[override]
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
        return projector(kind, both=both, lapack_signs=self.published)

    @property
    def every(self) -> int:
        """Updates between two bases."""
        return self.update_proj_gap

    def transpose(self, m: int, n: int) -> bool:
        """The right side is projected by turning the weight: then it is the rows, always."""
        return turns_right(self.proj_type, m, n)

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """What the projector keeps, and the moments inside."""
        full = self.proj_type == "full"
        r = min(rank_of(self.rank, min(m, n) if full else m), m, n)
        return {**self.projector.slots(m, r), **self.inside.slots("rr" if full else "rn", r=r)}

    def refresh(self, w: Member) -> None:
        """A new basis from this gradient, and what becomes of the moments."""
        assert w.grad is not None
        old = self.projector.held(w.state)
        draws = Draws(self.seed, w.indices, w.t)
        find = partial(self.projector.find, draws=draws, turned=w.turned)
        new = w.sums.once(find, w.grad, *old)
        if not w.fresh:
            self.inside.carry(self.moments, w.state, self.projector.overlap(old, new), w.t - 1)
        self.projector.install(w.state, new)

    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        """What the projector keeps for all weights with as many rows."""
        return self.projector.shared(m)

    @property
    def inside(self) -> Inner:
        """The optimizer that runs on R."""
        return AdamW(self.betas, self.epsilon())

    def direction(self, w: Member, R: Tensor) -> tuple[Tensor, float]:
        """The direction N of R (K, r, n), and what still multiplies it.

        That is 1, or in the published order Adam's bias correction.
        """
        t = self.clock(w)
        if not self.published:
            return self.inside.direction(w.state, R, t, w.sums, w.ok), 1.0
        (beta1, beta2), M, V = self.betas, w.state["exp_avg"], w.state["exp_avg_sq"]
        N, factor = adam_reference(R, M, V, t, beta1=beta1, beta2=beta2, eps=self.epsilon())
        return N, factor if self.correct_bias else 1.0

    def lifted(self, w: Member, R: Tensor) -> tuple[Term, float]:
        """The term P N (or P N Q^T) of N = direction(R), and what still multiplies it."""
        P, inside = self.projector.factor(w.state, w.m, R.dtype), self.inside
        if P is not None and isinstance(inside, AdamW) and not self.published:
            M, V = w.state["exp_avg"], w.state["exp_avg_sq"]  # N is made where it is used
            t, betas, eps = self.clock(w), inside.betas, inside.eps
            return AdamFactored(P, R, M, V, t, betas, eps, w.ok), 1.0
        N, factor = self.direction(w, R)
        return self.projector.lift(w.state, N, w.m), factor

    def clock(self, w: Member) -> int:
        """Adam's t: moments that were reset count from their refresh."""
        return w.age + 1 if self.moments == "reset" else w.t

    def correction(self, w: Member) -> float:
        """sqrt(1 - beta2^t) / (1 - beta1^t), or 1 without bias correction."""
        return bias_correction(self.clock(w), *self.betas) if self.correct_bias else 1.0

    def epsilon(self) -> float:
        """Adam's eps; unset it is torch's 1e-8, or the published code's 1e-6."""
        return self.eps if self.eps is not None else 1e-6 if self.published else 1e-8

    def adamw_order(self) -> tuple[bool, float] | None:
        """The published code treats unprojected parameters alike."""
        return (self.correct_bias, self.epsilon()) if self.published else None
