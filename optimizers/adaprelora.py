"""AdaPreLoRA: both LoRA factors solve one least squares problem in Adafactor's metric."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import add_product_, product
from ._core.rule import BatchedCall, Dense, Member, Slot, Steps
from ._core.validation import (
    check_adam,
    check_choices,
    check_flags,
    check_numbers,
)
from ._lora.base_weight_hooks import WatchingOptimizer
from ._lora.pair_algebra import damped_inverse, debias_factor, gram, is_on_host, right_matmul
from ._lora.pair_groups import LoRARule, Scale, accepts_groups
from ._lora.tangent_stats import tangent_cores, tangent_grams, tangent_squares
from ._toolkit.moments import adam, ema, safe_square_scale, total

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class AdaPreLoRARule(LoRARule):
    """dX = (U / y - 1/2 X K X^T U) / s^2 for X = A^T with weights y = q; B alike, with y = p.

    U is the gradient times the other factor's damped (X^T diag(y) X)^-1, K is that inverse of X.
    """

    yields_batched_calls = True
    betas: tuple[float, float] = (0.9, 0.99)
    eps_rel: float = 1e-6
    eps: float = 0.0
    variant: str = "momentum"
    stats: str = "tangent"
    floor: float = 1e-3
    rescale_visible: bool = True
    scale_aware: bool = True
    max_rel_step: float | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam(self)
        check_choices(
            self, variant=("momentum", "sgd", "adamw"), stats=("tangent", "exact", "none")
        )
        check_numbers(self, eps_rel="[0, inf)", max_rel_step="(0, inf) or None", floor="(0, 1]")
        check_flags(self, "rescale_visible", "scale_aware")

    @override
    def update(self, A: Member, B: Member) -> Steps:
        """Compute both steps from the old factors, as one joint solution."""
        ws = (A, B)
        grads, dtype = self.gradients_in_range(ws)
        G = [None if g is None else as_tall(g, w).to(dtype) for w, g in zip(ws, grads, strict=True)]
        X = [as_tall(w.value, w).to(dtype) for w in ws]
        Y = [None, None]
        if self.stats != "none":
            E = yield from self.energies(ws, X, G)
            Y = yield BatchedCall(self.weights, (*E,))
        M, clocks = zip(*map(self.averaged_grad, ws, grads), strict=True)
        S = map(gram, X, Y)
        *own_inverses, K_a, K_b = yield BatchedCall(self.inverses, (*S, *clocks))
        is_joint = all(g is not None for g in G)
        steps = []
        for w, m, K, x, y, k in zip(ws, M, (K_a, K_b), X, Y, own_inverses, strict=True):
            if m is not None:
                D = self.least_imbalance(w, m, K, x, y, k, is_joint)
                D = self.storable(w, D)
                D = self.adamw_direction(w, D) if self.variant == "adamw" else D
                lr_factor = self.lr_factor_b if w.number else 1.0
                steps.append(w.step(Dense(D), lr_factor=lr_factor, max_rel_norm=self.max_rel_step))
        yield from steps

    def gradients_in_range(self, ws: Sequence[Member]) -> tuple[list[Tensor | None], torch.dtype]:
        """Gradients of a pair, and the dtype of its step.

        The gradients are 2^-96 times as large where one has entries above 2^48, because squares of
        squares are formed of them and the step hardly depends on scale; as they are under
        ``stats="none"``. The dtype is float64 where factors or gradients leave float32's range.
        """
        grads = [w.grad for w in ws if w.grad is not None]
        floats = [X.dtype for w in ws for X in w.state.values() if X.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, [g.dtype for g in grads] + floats)
        is_far = has_left_range(ws)
        dtype = torch.float64 if is_far else dtype
        if self.stats == "none" or (is_on_host(grads[0]) and not is_far):
            return [w.grad for w in ws], dtype
        c = functools.reduce(torch.minimum, (safe_square_scale(g) for g in grads)).clamp_(max=1.0)
        return [None if w.grad is None else w.grad * c for w in ws], dtype

    def storable(self, w: Member, D: Tensor) -> Tensor:
        """The step D, limited where it may be larger than the weight can hold."""
        ordinary = torch.promote_types(w.value.dtype, torch.float32)
        if w.value.dtype == torch.float16 or D.dtype != ordinary or self.stats == "none":
            limit = min(torch.finfo(dtype).max for dtype in (w.value.dtype, D.dtype)) / 8
            D = D.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit).clamp_(-limit, limit)
        return D.to(ordinary)

    def energies(
        self, ws: Sequence[Member], X: Sequence[Tensor], G: Sequence[Tensor | None]
    ) -> Generator[BatchedCall, Any, list[Tensor]]:
        """R (K, n, 1) and L (K, m, 1); L is not debiased, as only ratios of its entries matter."""
        beta2 = self.betas[1]
        sides = [x.new_full((len(x), 1, 1), x.shape[-2]) for x in X]
        if self.stats == "tangent":
            cores = yield BatchedCall(self.cores, (*tangent_grams(X, G), *sides))
            means = [*map(tangent_squares, G, cores[::2], X, cores[1::2])]
        else:
            means = [as_tall(w.state["seen"], w) / k for w, k in zip(ws, sides[::-1], strict=True)]
        results = []
        for w, x in zip(ws, means, strict=True):
            energy = w.state["energy"]  # may be narrower, and sums of hooks may have overflowed
            limit = min(torch.finfo(dtype).max for dtype in (x.dtype, energy.dtype)) / 4
            E = as_tall(ema(energy, as_tall(x.clamp(max=limit), w).to(X[0].dtype), beta2), w)
            results.append(E if w.number else E / (1 - beta2**w.t))
        return results

    def cores(self, *grams_and_sides: Tensor) -> tuple[Tensor, ...]:
        """The r x r matrices from which means of squares of columns and rows are formed."""
        *results, share = tangent_cores(*grams_and_sides)
        n, m = grams_and_sides[-2:]
        core_scale = self.s**-2 / (share if self.rescale_visible else 1.0)
        return tuple(K * (core_scale / k) for K, k in zip(results, (m, m, n, n), strict=True))

    def weights(self, R: Tensor, L: Tensor) -> tuple[Tensor, ...]:
        """The factors of sqrt(V) = p q^T, V = L R / mean(L): q (K, n, 1) and p (K, m, 1)."""
        results = []
        for E in (R, L / (total(L.mT) / L.shape[-2])):
            y = E.sqrt()  # floor**2 would vanish beside a tiny E
            largest = y.amax(-2, keepdim=True)
            y = torch.maximum(y, largest * self.floor)
            # no gradient so far, or none whose squares tell: nothing to weigh
            results.append(torch.where(largest >= torch.finfo(E.dtype).tiny ** 0.5, y, 1.0))
        return tuple(results)

    def averaged_grad(self, w: Member, grad: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The average M of one factor's gradient, and the clock of the bias correction of M."""
        if grad is None or self.variant != "momentum":
            M, clock = grad, torch.ones_like(w.value[:, :1, :1], dtype=torch.int32)
        else:
            M, clock = ema(w.state["exp_avg"], grad, self.betas[0]), w.state["count"].add_(1)
        return None if M is None else as_tall(M, w), clock

    def inverses(self, S_a: Tensor, S_b: Tensor, *clocks: Tensor) -> tuple[Tensor, ...]:
        """K_Q and K_P, zero for a zero factor; then the matrices that multiply M_A and M_B."""
        K_Q, K_P = damped_inverse(torch.cat([S_a, S_b]), self.eps, self.eps_rel).chunk(2)
        beta1 = self.betas[0] if self.variant == "momentum" else 0.0
        c_a, c_b = (debias_factor(clock, beta1, S_a.dtype) for clock in clocks)
        s2 = self.s**2 if self.scale_aware else 1.0
        return K_Q, K_P, K_P * (c_a / s2), K_Q * (c_b / s2)

    def least_imbalance(
        self,
        w: Member,
        M: Tensor,
        K: Tensor,
        X: Tensor,
        y: Tensor | None,
        own_inverse: Tensor,
        is_joint: bool,
    ) -> Tensor:
        """The step of one factor, in that factor's own layout.

        Args:
            w: A or B.
            M: The averaged gradient of the factor, tall, (K, n, r) or (K, m, r).
            K: The other factor's inverse with bias correction and 1 / s^2, (K, r, r).
            X: The factor itself, tall.
            y: The weights q of A or p of B; None: 1.
            own_inverse: K_Q for A, K_P for B, zero for a zero factor, (K, r, r).
            is_joint: Whether the other factor has a gradient too.
        """
        U = right_matmul(M, K)
        C = product(own_inverse, product(X.mT, U))
        D = as_tall(U if y is None else U.div_(y), w)
        if is_joint:  # halve the part that either factor could make: least imbalance
            add_product_(D, *((X, C) if w.number else (C.mT, X.mT)), alpha=-0.5)
        return D

    def adamw_direction(self, w: Member, D: Tensor) -> Tensor:
        """AdamW's direction for the gradient D."""
        beta1, beta2 = self.betas
        M, V, count = w.state["exp_avg"], w.state["exp_avg_sq"], w.state["count"].add_(1)
        return adam(D, M, V, count, beta1=beta1, beta2=beta2, eps=1e-8)

    @override
    def state(self, *sides: tuple[int, int]) -> tuple[dict[str, Slot], ...]:
        slots: dict[str, Slot] = {}
        if self.variant != "sgd":
            slots = {"exp_avg": Slot("mn"), "count": Slot("11", dtype=torch.int32)}
        if self.variant == "adamw":
            slots["exp_avg_sq"] = Slot("mn")
        along = {"tangent": ("energy",), "exact": ("energy", "seen"), "none": ()}[self.stats]
        return tuple({**slots, **{k: Slot(axes) for k in along}} for axes in ("1n", "m1"))


def has_left_range(ws: Sequence[Member]) -> bool:
    """Whether the host finds an entry that is not 0 outside of 2^-48 to 2^48, float64's 2^-384.

    Products of four such numbers leave their dtype. An accelerator would have to wait.
    """
    tensors = [x for w in ws for x in (w.grad, w.value) if x is not None]
    if not is_on_host(tensors[0]):
        return False
    limit = 2.0 ** (384 if tensors[0].dtype == torch.float64 else 48)
    sizes = [max(-float(low), float(high)) for low, high in map(torch.aminmax, tensors)]
    return any(x > limit or 0.0 < x < 1 / limit for x in sizes)


class AdaPreLoRA(WatchingOptimizer):
    """AdaPreLoRA for LoRA pairs, W = W0 + s B A; AdamW for everything else.

    For A (r x n) and B (m x r), with momenta M_A, M_B of their gradients::

        L, R  <- averages of the row and column means of G*G;  H(Y) = diag(p) Y diag(q)
        p, q   = sqrt(L / mean(L)), sqrt(R)               so H^-1 G = G / sqrt(V) of Adafactor
        K_P    = (B^T diag(p) B)^-1,  K_Q = (A diag(q) A^T)^-1                         r x r
        A <- A - lr / s^2 * (K_P M_A diag(1/q) - 1/2 K_P M_A A^T K_Q A)
        B <- B - lr / s^2 * (diag(1/p) M_B K_Q - 1/2 B K_P B^T M_B K_Q)

    both from the old factors. Of the steps that bring s (dB A + B dA) nearest to H^-1 G in the norm
    of H they are the one for which dB A and B dA differ least. With one gradient missing, or one
    factor zero, the halves are left out: that is the solution for the other factor alone.

    Source: *AdaPreLoRA: Adafactor Preconditioned Low-Rank Adaptation*, arXiv 2605.08734. No code
    was published and only its abstract and notes on it were at hand. The paper's: least squares
    in the metric of Adafactor's second moment, the least-imbalance member, the formula for A, the
    names of the variants. Our reconstruction: the statistics (``stats``, their averages, floor and
    rescaling), what the momentum averages, the formula for B, damping, one-sided steps and B = 0.

    Args:
        params: A model, its named parameters, or groups as :func:`lora_param_groups` and
            :func:`pairs_to_groups` make them.
        lr: Learning rate of a step of H^-1 G, as Adafactor's (default: 1e-3).
        betas: Decays of the momenta and of L and R (default: (0.9, 0.99)).
        eps_rel: Damping of both Gram matrices relative to their mean eigenvalue (default: 1e-6).
        eps: Absolute damping (default: 0.0).
        variant: ``"momentum"`` (default): M are averages of the gradients; ``"sgd"``: M are the
            gradients; ``"adamw"``: the steps of ``"sgd"`` are AdamW's gradients, eps 1e-8.
        stats: Source of L and R. ``"tangent"`` (default): what both factor gradients show of G;
            ``"exact"``: G itself, see :meth:`watch`; ``"none"``: p = q = 1.
        weight_decay: Decoupled weight decay (default: 0.0).
        scale: s of pairs whose group or module names none; None (default): all must name theirs.
        floor: Smallest p and q, relative to their largest (default: 1e-3).
        rescale_visible: Whether ``"tangent"`` divides by the share of a G without direction that
            the pair can see, so that lr means the same as under ``"exact"`` (default: True).
        scale_aware: Whether steps have the 1 / s^2 (default: True); without, lr changes with alpha.
        max_rel_step: Largest step of a factor relative to its norm. None (default): no limit. The
            first step of A after B = 0 is as large as A itself however small lr is.
        lr_ratio_b: Multiplies the step of B; decay keeps the plain lr. None (default): 1.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For a value out of range, a list of bare tensors, a pair whose factors do not
            fit, or one without a scale.
        TypeError: For an unknown keyword, or ``params`` given under its old name ``groups`` too.
        RuntimeError: From ``step``, if ``stats="exact"`` has seen no gradient of a base weight.

    State per pair: ``exp_avg``, like the factors; ``energy``, R (1 x n) for A and L (m x 1) for B;
    ``count`` (1 x 1) each; ``exp_avg_sq`` under ``"adamw"``; ``seen``, like ``energy``, under
    ``"exact"``. Peak temporary memory: two matrices of the larger factor, four under ``"adamw"``;
    and float32 copies of what is narrower, of all pairs that run side by side.

    Caveat: under ``eps`` (``eps_rel`` too), decay, and in ``"adamw"``, whose squares belong to
    entries, the step depends on how s B A is split into B and A. ``"tangent"`` sees a part of G.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import AdaPreLoRA, pairs_to_groups
        >>> A, B = torch.randn(2, 8, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> optimizer = AdaPreLoRA(pairs_to_groups([(A, B)], scale=2.0), lr=1e-2)
        >>> (torch.ones(3, 8) @ (2.0 * B @ A).mT - 1).square().mean().backward()
        >>> optimizer.step()
    """

    @accepts_groups
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps_rel: float = 1e-6,
        eps: float = 0.0,
        variant: str = "momentum",
        stats: str = "tangent",
        weight_decay: float = 0.0,
        scale: Scale = None,
        floor: float = 1e-3,
        rescale_visible: bool = True,
        scale_aware: bool = True,
        max_rel_step: float | None = None,
        lr_ratio_b: float | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = AdaPreLoRARule(
            betas=betas,
            eps_rel=eps_rel,
            eps=eps,
            variant=variant,
            stats=stats,
            floor=floor,
            rescale_visible=rescale_visible,
            scale_aware=scale_aware,
            max_rel_step=max_rel_step,
            lr_ratio_b=lr_ratio_b,
        )
        super().__init__(params, rule, lr, weight_decay, scale=scale, **options)


def as_tall(x: Tensor, w: Member) -> Tensor:
    """Transpose A's tensors only: A^T (K, n, r) and B (K, m, r) then have the same formulas."""
    return x if w.number else x.mT
