"""AltLoRA: each LoRA factor follows the full gradient as far as the other factor lets it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import add_product_, product
from ._core.rule import BatchedCall, Dense, Member, Scaled, Slot, Steps
from ._core.validation import (
    check,
    check_adam,
    check_choices,
    check_flags,
    check_ints,
    check_numbers,
)
from ._lora.pair_algebra import (
    LONG_SIDES,
    completed,
    damped_inverse,
    debias_factor,
    gram,
    grams_with_old,
    holds_everywhere,
    is_in_range,
    is_nonzero,
    is_on_host,
    left_matmul,
    saturate,
    transport,
)
from ._lora.pair_groups import LoRARule, PairOptimizer, Scale, accepts_groups

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class AltLoRARule(LoRARule):
    """M <- b1 T M + (1 - b1) K G_A / s^2, K = (B^T B + delta I)^-1; B is treated alike."""

    yields_batched_calls = True
    betas: tuple[float, float] = (0.9, 0.999)
    delta: float = 1e-5
    schedule: str = "both"
    second_moment: str | None = None
    eps: float | None = None
    delta_mode: str = "absolute"
    switch_every: int = 1
    first: str = "B"
    scale_aware: bool = True
    max_rel_step: float | None = None
    compact_alignment: bool = False
    compat: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam(self, eps_may_be_none=True)
        check_choices(
            self,
            delta_mode=("absolute", "relative"),
            schedule=("both", "alternate"),
            first=("A", "B"),
            second_moment=(None, "elementwise"),
            compat=(None, "reference"),
        )
        check_numbers(self, delta="[0, inf)", max_rel_step="(0, inf) or None")
        check_ints(self, switch_every="[1, inf)")
        check_flags(self, "scale_aware", "compact_alignment")
        check(
            not (self.published and self.compact_alignment),
            "compat='reference' keeps the old factors; leave compact_alignment out",
        )

    @override
    def update(self, A: Member, B: Member) -> Steps:
        """Step A, then B: B sees the new A, but its gradient was taken at the old A."""
        for w, other in ((A, B), (B, A)):
            if w.grad is None or not self.is_active(w):
                continue
            old = as_A(w.value, other).clone() if self.compact_alignment else None
            yield from self.factor_step(w, other)
            if old is not None:  # the other momentum has to follow this factor
                X = as_A(w.value, other).to(w.grad.dtype)
                self.carry_on(w, X, old, other.state["carry"])

    def factor_step(self, w: Member, other: Member) -> Steps:
        """The step of one factor, in A's letters: w is A (r, n), X is B (m, r)."""
        assert w.grad is not None
        state = w.state
        M = as_A(state["exp_avg"], w)  # (K, r, n)
        dtype = widest(w.grad.dtype, M.dtype, other.value.dtype)  # one factor alone may be float64
        *found, in_range = yield self.solve(w, other, dtype)
        if has_left_range(in_range):
            *found, _ = yield self.solve(w, other, torch.float64)
        T, K, count, nonzero, debias = found
        if self.compact_alignment:
            C = state["carry"]
            C.copy_(torch.eye(C.shape[-1], dtype=C.dtype, device=C.device))
        else:
            other.state["ref"].copy_(other.value)
        state["count"].copy_(count)
        G = as_A(w.grad, w).to(T.dtype)
        if self.second_moment is None:
            N = left_matmul(T, M)
            add_product_(N, K, G)
            saturate(N, M, self.limit(w, M) * (1 - self.betas[0]))
            U, scale = M, debias
        else:
            U, scale = self.adam_direction(w, M, left_matmul(K, G), T, count), nonzero
        U, lr_factor = as_A(U, w), self.lr_factor_b if w.number else 1.0
        term = Scaled(U, scale) if self.max_rel_step is None else Dense(U * scale)
        yield w.step(
            term, lr_factor=lr_factor, decay_last=self.published, max_rel_norm=self.max_rel_step
        )

    def solve(self, w: Member, other: Member, dtype: torch.dtype) -> BatchedCall:
        """The request for the r x r matrices of one factor's step, computed in a dtype."""
        X = as_A(other.value, w).to(dtype)  # (K, m, r)
        if self.compact_alignment:
            (S,), C = completed(other, gram(X)), w.state["carry"].to(dtype)
        else:
            S, C = grams_with_old(other, X, as_A(other.state["ref"], w))
        return BatchedCall(self.small_solves, (S, C, w.state["count"]))

    def small_solves(self, S: Tensor, C: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        """Compute everything of size r x r, for many pairs at once.

        Args:
            S: X^T X, (K, r, r).
            C: X^T X_old; under ``compact_alignment`` the carried T itself.
            count: Steps of this factor so far, (K, 1, 1).

        Returns:
            b1 T, (K, r, r); (1 - b1) K / s^2, or K / s^2 in AltLoRA+, (K, r, r); and (K, 1, 1) each
            the new count, 1 where X is not zero (else 0), the bias correction of M, and whether
            the dtype can hold T and K, which are 0 where it cannot.
        """
        b1 = self.betas[0]
        inverse, nonzero = self.inverse(S), is_nonzero(S)
        T = C if self.compact_alignment else self.transported(S, inverse, C)
        count = count + (1 if self.published else nonzero.to(count.dtype))
        nonzero = nonzero.to(S.dtype)  # a bool times 0.9 is a float32
        s2 = self.s**2 if self.scale_aware and not self.published else 1.0
        share = 1.0 if self.second_moment else 1 - b1
        debias = debias_factor(count, b1, S.dtype)
        T, K = T * (nonzero * b1), inverse * (share / s2)
        sums = (T.abs() + K.abs()).sum((-2, -1), keepdim=True)
        in_range = is_in_range(S, *self.damping) & sums.isfinite()
        T, K = (torch.where(in_range, x, 0.0) for x in (T, K))
        return T, K, count, nonzero, debias, in_range

    def transported(self, S: Tensor, inverse: Tensor, C: Tensor) -> Tensor:
        """T (K, r, r) of the momentum, as published or exact where X has not moved."""
        return product(inverse, C) if self.published else transport(S, inverse, C)

    def carry_on(self, w: Member, X: Tensor, old: Tensor, carry: Tensor) -> None:
        """Let the T of ``compact_alignment`` follow a factor w that moved from ``old`` to X."""
        for dtype in (X.dtype, torch.float64):
            S, C = grams_with_old(w, X.to(dtype), old.to(dtype))
            T = product(transport(S, self.inverse(S), C), carry)
            in_range = is_in_range(S, *self.damping) & holds_everywhere(T.isfinite())
            if not has_left_range(in_range):
                break
        T = torch.where(in_range, T, 0.0)
        saturate(T, carry, torch.finfo(carry.dtype).max / 8)

    def limit(self, w: Member, M: Tensor) -> float:
        """The largest entry of a direction: the weight and its momentum can hold several steps."""
        return _limit_of(w.value.dtype, M.dtype)

    def adam_direction(self, w: Member, M: Tensor, Z: Tensor, T: Tensor, count: Tensor) -> Tensor:
        """AltLoRA+: Adam's direction of Z, the first moment carried along, the second not."""
        (b1, b2), V, limit = self.betas, as_A(w.state["exp_avg_sq"], w), self.limit(w, M)
        Z.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)
        N = left_matmul(T, M).add_(Z, alpha=1 - b1)
        if self.published:  # it carries M for the step only, and does not correct V
            M.mul_(b1).add_(Z, alpha=1 - b1)
            moved = N.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)
        else:
            moved = saturate(N, M, limit)
        V.mul_(b2).addcmul_(Z, Z, value=1 - b2)
        c1, c2 = debias_factor(count, b1, Z.dtype), debias_factor(count, b2, Z.dtype)
        eps = self.eps if self.eps is not None else 1e-4 if self.published else 1e-8
        N = torch.mul(moved, c1, out=N)
        return N.div_((V if self.published else V * c2).sqrt().add_(eps))

    def inverse(self, S: Tensor) -> Tensor:
        """(S + delta I)^-1, zero for S = 0: no step of one factor moves W while the other is 0."""
        return damped_inverse(S, *self.damping)

    @property
    def damping(self) -> tuple[float, float]:
        """Absolute damping, and that relative to the mean eigenvalue."""
        return (0.0, self.delta) if self.delta_mode == "relative" else (self.delta, 0.0)

    def is_active(self, w: Member) -> bool:
        """Whether the schedule lets this factor move in this step."""
        if self.schedule == "both":
            return True
        second_moves = (w.t - 1) // self.switch_every % 2 == 1
        return second_moves != (self.first == self.members[w.number])

    @property
    def published(self) -> bool:
        """Whether the published code is followed to the letter."""
        return self.compat == "reference"

    @override
    def splits_of(self, number: int) -> frozenset[str]:
        # the published code is followed to the bit, and sums over ranks have bits of their own
        return self.splits if self.published else LONG_SIDES[number]

    @override
    def state(self, *sides: tuple[int, int]) -> tuple[dict[str, Slot], ...]:
        r = sides[0][0]
        slots = {"exp_avg": Slot("mn"), "count": Slot("11", dtype=torch.int32)}
        if self.compact_alignment:
            slots["carry"] = Slot("rr", fill="eye", r=r)
        else:
            slots["ref"] = Slot("mn")  # this factor as the other half last saw it
        if self.second_moment:
            slots["exp_avg_sq"] = Slot("mn")
        return slots, dict(slots)


class AltLoRA(PairOptimizer):
    """AltLoRA and AltLoRA+ for LoRA pairs, W = W0 + s B A; AdamW for everything else.

    For A (r x n), with G_A = s B^T G; B (m x r) is treated alike after it, with A^T for B::

        K   = (B^T B + delta I)^-1                         r x r
        Z   = K G_A / s^2                                  s B Z is G projected on what B spans
        M   <- beta1 K (B^T B_old) M + (1 - beta1) Z       so that s B M stays what s B_old M was
        A   <- (1 - lr * weight_decay) A - lr * M / (1 - beta1^t)
        AltLoRA+ moves by the same M over sqrt(vhat) + eps, v the average of the squares of Z

    While B = 0, as adapters begin, G_A tells nothing: A only decays, and its t does not count.

    Source: *AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with Alternating
    Projections*, arXiv 2505.12455; its published code, and a second one.

    Args:
        params: A model, its named parameters, or groups as :func:`lora_param_groups` and
            :func:`pairs_to_groups` make them.
        lr: Learning rate of a step of the full gradient (default: 1e-3).
        betas: Decays of M and, in AltLoRA+, of v (default: (0.9, 0.999)).
        delta: Damping (default: 1e-5).
        schedule: ``"both"`` (default) in every step, or ``"alternate"``, one factor at a time.
        second_moment: None (default) for AltLoRA, ``"elementwise"`` for AltLoRA+.
        weight_decay: Decoupled weight decay (default: 0.0).
        compat: None (default), or ``"reference"``: as published, without 1 / s^2, with decay after
            the step; AltLoRA+ stores M without carrying it, and has no bias correction of v and
            eps 1e-4.
        scale: s of pairs whose group or module names none; None (default): all must name theirs.
        eps: Added to the root of v in AltLoRA+. None (default): 1e-8, 1e-4 under ``compat``.
        delta_mode: ``"absolute"`` (default), or ``"relative"`` to the mean eigenvalue of B^T B.
        switch_every: Steps of one factor in ``"alternate"`` (default: 1).
        first: The factor that begins there (default: ``"B"``, as A cannot move while B = 0).
        scale_aware: Whether Z has the 1 / s^2 (default: True); without, lr changes with alpha.
        max_rel_step: Largest step of a factor relative to its norm. None (default): no limit. The
            first steps of A after B = 0 are as large as A itself however small lr is.
        compact_alignment: Whether K (B^T B_old), r x r, is kept instead of B_old (default: False).
            Only the optimizer may change the factors then.
        lr_ratio_b: Multiplies the step of B; decay keeps the plain lr. None (default): 1.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range, ``compact_alignment`` with ``compat``, a list of bare
            tensors, a pair whose factors do not fit, or one without a scale.
        TypeError: For an unknown keyword, or ``params`` given under its old name ``groups`` too.

    State per factor: ``exp_avg`` and ``ref``, the factor as the other's half last saw it, both
    like the factor; ``count`` (1 x 1); ``exp_avg_sq`` in AltLoRA+; ``carry`` (r x r) for ``ref``
    under ``compact_alignment``. Peak temporary memory: three matrices of the largest factor.

    Caveat: under damping, and in AltLoRA+, whose squares belong to entries, the step depends on how
    B A is split into factors. ``"both"`` takes the gradient of B at the old A. A step is as large
    as the gradient: entries of M beyond 1/8 of the largest number of the weight's dtype are held
    there. Where B^T B leaves the dtype of the state (entries of B beyond 1e15), a CPU computes the
    step in float64; elsewhere M becomes 0 and A only decays.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import AltLoRA, pairs_to_groups
        >>> A, B = torch.randn(2, 8, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> optimizer = AltLoRA(pairs_to_groups([(A, B)], scale=2.0), lr=1e-2)
        >>> (torch.ones(3, 8) @ (2.0 * B @ A).mT - 1).square().mean().backward()
        >>> optimizer.step()
    """

    @accepts_groups
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        delta: float = 1e-5,
        schedule: str = "both",
        second_moment: str | None = None,
        weight_decay: float = 0.0,
        compat: str | None = None,
        scale: Scale = None,
        eps: float | None = None,
        delta_mode: str = "absolute",
        switch_every: int = 1,
        first: str = "B",
        scale_aware: bool = True,
        max_rel_step: float | None = None,
        compact_alignment: bool = False,
        lr_ratio_b: float | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = AltLoRARule(
            betas=betas,
            delta=delta,
            schedule=schedule,
            second_moment=second_moment,
            compat=compat,
            eps=eps,
            delta_mode=delta_mode,
            switch_every=switch_every,
            first=first,
            scale_aware=scale_aware,
            max_rel_step=max_rel_step,
            compact_alignment=compact_alignment,
            lr_ratio_b=lr_ratio_b,
        )
        super().__init__(params, rule, lr, weight_decay, scale=scale, **options)


def has_left_range(in_range: Tensor) -> bool:
    """Whether the host knows of a Gram matrix out of range; an accelerator would have to wait."""
    return is_on_host(in_range) and not bool(in_range if in_range.numel() == 1 else in_range.all())


@cache
def _limit_of(*dtypes: torch.dtype) -> float:
    """An eighth of the largest number that all of these dtypes have."""
    return min(torch.finfo(dtype).max for dtype in dtypes) / 8


@cache
def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to which all of these are promoted."""
    return reduce(torch.promote_types, dtypes)


def as_A(x: Tensor, w: Member) -> Tensor:
    """Take x as it is for A, transposed for B.

    Formulas are those of A; B's are the same for the transposed W, whose pair is B^T, A^T.
    """
    return x.mT if w.number else x
