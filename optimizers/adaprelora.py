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
from ._core.rule import LOCAL_REDUCTIONS, BatchedCall, Dense, Member, Slot, Steps
from ._core.validation import (
    check_adam,
    check_choices,
    check_flags,
    check_numbers,
)
from ._lora.base_weight_hooks import WatchingOptimizer
from ._lora.pair_algebra import (
    LONG_SIDES,
    completed_together,
    cross_gram,
    damped_inverse,
    debias_factor,
    gram,
    is_on_host,
    right_matmul,
)
from ._lora.pair_groups import LoRARule, Scale, accepts_groups
from ._lora.tangent_stats import tangent_cores, tangent_grams, tangent_squares
from ._toolkit.moments import adam, ema, largest_entries, safe_square_scale, total

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
        grads, X, G, grams = self.in_range(ws)
        Y: Sequence[Tensor | None] = (None, None)
        if self.stats == "none":
            units = [x.new_ones(len(x), 1, 1) for x in X]
        else:
            *Y, unit, squares = yield from self.weights(ws, X, G, grams)
        M, clocks = zip(*map(self.averaged_grad, ws, grads), strict=True)
        is_joint = all(m is not None for m in M)
        sums = [[gram(x, y)] for x, y in zip(X, Y, strict=True)]
        for of_one, x, m in zip(sums, X, M, strict=True):
            of_one += [cross_gram(x, m)] if is_joint else []
        sums[1] += [] if self.stats == "none" else [squares]
        (S_a, *F_a), (S_b, *F_b) = completed_together(ws, *sums)
        if self.stats != "none":
            units = [unit, F_b.pop().reciprocal().mul_(B.m).sqrt_()]
        small = yield BatchedCall(self.small_matrices, (S_a, S_b, *units, *clocks, *F_a, *F_b))
        K, C = small[:2], small[2:] if is_joint else (None, None)
        steps = []
        for w, m, k, x, y, c in zip(ws, M, K, X, Y, C, strict=True):
            if m is not None:
                D = self.storable(w, self.least_imbalance(w, m, k, x, y, c))
                D = self.adamw_direction(w, D) if self.variant == "adamw" else D
                lr_factor = self.lr_factor_b if w.number else 1.0
                steps.append(w.step(Dense(D), lr_factor=lr_factor, max_rel_norm=self.max_rel_step))
        yield from steps

    def in_range(
        self, ws: Sequence[Member]
    ) -> tuple[list[Tensor | None], list[Tensor], list[Tensor | None], tuple[Tensor, ...]]:
        """What the step is made of, in a dtype that holds its products.

        Shards look at their entries while they add up what is needed anyway, and do it again in
        the rare case that some leave the range.

        Returns:
            Gradients as they are averaged; factors and gradients, tall; and their Gram matrices.
        """
        on_shards = ws[0].reductions is not LOCAL_REDUCTIONS
        is_far = not on_shards and has_left_range(ws)
        while True:
            grads, dtype = self.gradients_in_range(ws, is_far, on_shards)
            X = [as_tall(w.value, w).to(dtype) for w in ws]
            G = [
                g if g is None else as_tall(g, w).to(dtype) for w, g in zip(ws, grads, strict=True)
            ]
            grams = tangent_grams(X, G) if self.stats == "tangent" else ()
            if not on_shards:
                return grads, X, G, grams
            sizes = [size_flags(w, range_limit(ws), dtype) for w in ws]
            parts = ((*grams[i::2], *sizes[i]) for i in (0, 1))
            found = completed_together(ws, *parts)
            count = len(grams) // 2
            flags = [flag for of_one in found for flag in of_one[count:]]
            if is_far or not flags_left_range(flags):
                by_kind = zip(*(of_one[:count] for of_one in found), strict=True)
                return grads, X, G, tuple(x for pair in by_kind for x in pair)
            is_far = True

    def gradients_in_range(
        self, ws: Sequence[Member], is_far: bool, is_known: bool
    ) -> tuple[list[Tensor | None], torch.dtype]:
        """Gradients of a pair, and the dtype of its step.

        The gradients are 2^-96 times as large where one has entries above 2^48, because squares of
        squares are formed of them and the step hardly depends on scale; as they are under
        ``stats="none"``. The dtype is float64 where factors or gradients leave float32's range.

        Args:
            ws: A and B.
            is_far: Whether they are known to leave it.
            is_known: Whether they are known not to leave it if not.
        """
        grads = [w.grad for w in ws if w.grad is not None]
        floats = [X.dtype for w in ws for X in w.state.values() if X.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, [g.dtype for g in grads] + floats)
        dtype = torch.float64 if is_far else dtype
        is_known = is_known or is_on_host(grads[0])
        if self.stats == "none" or (is_known and not is_far):
            return [w.grad for w in ws], dtype
        scales = [safe_square_scale(w.grad, w.reductions) for w in ws if w.grad is not None]
        c = functools.reduce(torch.minimum, scales).clamp_(max=1.0)
        return [None if w.grad is None else w.grad * c for w in ws], dtype

    def storable(self, w: Member, D: Tensor) -> Tensor:
        """The step D, limited where it may be larger than the weight can hold."""
        ordinary = torch.promote_types(w.value.dtype, torch.float32)
        if w.value.dtype == torch.float16 or D.dtype != ordinary or self.stats == "none":
            limit = min(torch.finfo(dtype).max for dtype in (w.value.dtype, D.dtype)) / 8
            D = D.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit).clamp_(-limit, limit)
        return D.to(ordinary)

    def weights(
        self,
        ws: Sequence[Member],
        X: Sequence[Tensor],
        G: Sequence[Tensor | None],
        grams: tuple[Tensor, ...],
    ) -> Generator[BatchedCall, Any, tuple[Tensor, ...]]:
        """The factors of sqrt(V) = p q^T, V = L R / mean(L), each in units of its own.

        Returns:
            q (K, n, 1) and p (K, m, 1), relative to their largest entries; the largest of q,
            (K, 1, 1); and the sum of squares of p, which is to be their number.
        """
        E = yield from self.energies(ws, X, G, grams)
        *roots, of_R, of_L = yield BatchedCall(self.roots, (*E,))
        parts = zip((w.reductions for w in ws), (of_R, of_L), strict=True)
        largest = ws[0].reductions.most_together(*parts)
        found: tuple[Tensor, ...] = yield BatchedCall(self.relative, (*roots, *largest))
        return found

    def roots(self, *energies: Tensor) -> tuple[Tensor, ...]:
        """Roots of R and L, and the largest of each; floor**2 would vanish beside a tiny R."""
        roots = [E.sqrt() for E in energies]
        return *roots, *map(largest_entries, roots)

    def relative(self, of_R: Tensor, of_L: Tensor, *largest: Tensor) -> tuple[Tensor, ...]:
        """What ``weights`` returns, of roots and of the largest of all of them."""
        # no gradient so far, or none whose squares tell: nothing to weigh
        tell = [largest[0] >= torch.finfo(of_R.dtype).tiny ** 0.5, largest[1] > 0]
        q, p = (
            torch.where(has, y / x, 1.0)
            for has, y, x in zip(tell, (of_R, of_L), largest, strict=True)
        )
        unit = torch.where(tell[0], largest[0], 1.0)
        return q.clamp(min=self.floor), p.clamp(min=self.floor), unit, total(p.square().mT)

    def energies(
        self,
        ws: Sequence[Member],
        X: Sequence[Tensor],
        G: Sequence[Tensor | None],
        grams: tuple[Tensor, ...],
    ) -> Generator[BatchedCall, Any, list[Tensor]]:
        """R (K, n, 1) and L (K, m, 1); L is not debiased, as only ratios of its entries matter."""
        beta2 = self.betas[1]
        sides = [X[0].new_full((len(X[0]), 1, 1), side) for side in (ws[0].n, ws[1].m)]
        if self.stats == "tangent":
            cores = yield BatchedCall(self.cores, (*grams, *sides))
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

    def averaged_grad(self, w: Member, grad: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The average M of one factor's gradient, and the clock of the bias correction of M."""
        if grad is None or self.variant != "momentum":
            M, clock = grad, w.value.new_ones(len(w.value), 1, 1, dtype=torch.int32)
        else:
            M, clock = ema(w.state["exp_avg"], grad, self.betas[0]), w.state["count"].add_(1)
        return None if M is None else as_tall(M, w), clock

    def small_matrices(
        self,
        S_a: Tensor,
        S_b: Tensor,
        unit_a: Tensor,
        unit_b: Tensor,
        clock_a: Tensor,
        clock_b: Tensor,
        *F: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute everything of size r x r of a step, for many pairs at once.

        Args:
            S_a: X^T diag(y) X for X = A^T, with y = q in its unit, (K, r, r).
            S_b: The same for X = B with p.
            unit_a: By which q is to be multiplied, (K, 1, 1).
            unit_b: The same for p.
            clock_a: Updates of the average of A's gradient so far, (K, 1, 1).
            clock_b: The same for B.
            *F: X^T M of A and of B, (K, r, r) each; none where one gradient is missing.

        Returns:
            What multiplies M_A and M_B, in the units of the weights: K_P and K_Q with bias
            correction and 1 / s^2; then X^T U by K, to be halved, of A and of B.
        """
        S = torch.cat([S_a * unit_a, S_b * unit_b])
        K_Q, K_P = damped_inverse(S, self.eps, self.eps_rel).chunk(2)  # zero for a zero factor
        beta1 = self.betas[0] if self.variant == "momentum" else 0.0
        c_a, c_b = (debias_factor(clock, beta1, S.dtype) for clock in (clock_a, clock_b))
        s2 = self.s**2 if self.scale_aware else 1.0
        K_a, K_b = K_P * (c_a / s2), K_Q * (c_b / s2)
        both = zip((K_Q, K_P), F, (K_a, K_b), strict=False)
        C = (product(own, product(f, K)) for own, f, K in both)
        return K_a / unit_a, K_b / unit_b, *C

    def least_imbalance(
        self,
        w: Member,
        M: Tensor,
        K: Tensor,
        X: Tensor,
        y: Tensor | None,
        C: Tensor | None,
    ) -> Tensor:
        """The step of one factor, in that factor's own layout.

        Args:
            w: A or B.
            M: The averaged gradient of the factor, tall, (K, n, r) or (K, m, r).
            K: What multiplies it, (K, r, r).
            X: The factor itself, tall.
            y: The weights q of A or p of B, in the unit that K has; None: 1.
            C: The part that either factor could make; None if the other has no gradient.
        """
        U = right_matmul(M, K)
        D = as_tall(U if y is None else U.div_(y), w)
        if C is not None:  # halve it: least imbalance
            add_product_(D, *((X, C) if w.number else (C.mT, X.mT)), alpha=-0.5)
        return D

    def adamw_direction(self, w: Member, D: Tensor) -> Tensor:
        """AdamW's direction for the gradient D."""
        beta1, beta2 = self.betas
        M, V, count = w.state["exp_avg"], w.state["exp_avg_sq"], w.state["count"].add_(1)
        return adam(D, M, V, count, beta1=beta1, beta2=beta2, eps=1e-8)

    @override
    def splits_of(self, number: int) -> frozenset[str]:
        # hooks on base weights know whole sums only
        return self.splits if self.stats == "exact" else LONG_SIDES[number]

    @override
    def state(self, *sides: tuple[int, int]) -> tuple[dict[str, Slot], ...]:
        slots: dict[str, Slot] = {}
        if self.variant != "sgd":
            slots = {"exp_avg": Slot("mn"), "count": Slot("11", dtype=torch.int32)}
        if self.variant == "adamw":
            slots["exp_avg_sq"] = Slot("mn")
        along = {"tangent": ("energy",), "exact": ("energy", "seen"), "none": ()}[self.stats]
        return tuple({**slots, **{k: Slot(axes) for k in along}} for axes in ("1n", "m1"))


def range_limit(ws: Sequence[Member]) -> float:
    """The largest entry, and the inverse of the least, of which products of four are numbers."""
    first = next(x for w in ws for x in (w.grad, w.value) if x is not None)
    return 2.0 ** (384 if first.dtype == torch.float64 else 48)


def has_left_range(ws: Sequence[Member]) -> bool:
    """Whether the host finds an entry that is not 0 outside of 2^-48 to 2^48, float64's 2^-384.

    Products of four such numbers leave their dtype. An accelerator would have to wait.
    """
    tensors = [x for w in ws for x in (w.grad, w.value) if x is not None]
    if not is_on_host(tensors[0]):
        return False
    limit = range_limit(ws)
    sizes = [max(-float(low), float(high)) for low, high in map(torch.aminmax, tensors)]
    return any(x > limit or 0.0 < x < 1 / limit for x in sizes)


def size_flags(w: Member, limit: float, dtype: torch.dtype) -> list[Tensor]:
    """Numbers (K, 1, 1) of which sums over shards tell what ``has_left_range`` does.

    For gradient and factor: whether the largest entry here is above the limit; is not 0; and is
    above the inverse of the limit.
    """
    sizes = [largest_entries(x) for x in (w.grad, w.value) if x is not None]
    return [flag.to(dtype) for x in sizes for flag in (x > limit, x > 0, x >= 1 / limit)]


def flags_left_range(flags: Sequence[Tensor]) -> bool:
    """Whether sums of ``size_flags`` tell of an entry outside of the range."""
    counts = torch.cat(list(flags), -1).sum((0, 1)).view(-1, 3).tolist()
    return any(large > 0 or (present > 0 and ordinary == 0) for large, present, ordinary in counts)


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
