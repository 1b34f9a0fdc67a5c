"""AdaPreLoRA: both LoRA factors solve one least squares problem in Adafactor's metric."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import add_product_, product
from ._core.rule import BatchedCall, Dense, Member, Slot, Steps
from ._core.validation import check, check_adam, check_choices
from ._lora.base_weight_hooks import WatchingOptimizer
from ._lora.pair_algebra import damped_inverse, debias_factor, gram, right_matmul
from ._lora.pair_groups import LoRARule, Scale
from ._lora.tangent_stats import tangent_cores, tangent_grams, tangent_squares
from ._toolkit.moments import adam, ema, total

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


def as_tall(x: Tensor, w: Member) -> Tensor:
    """A^T and B have the same formulas: (K, n, r) and (K, m, r), energies (K, n, 1), (K, m, 1)."""
    return x if w.number else x.mT


@dataclass(frozen=True)
class AdaPreLoRARule(LoRARule):
    """dX = (U / y - 1/2 X K X^T U) / s^2 for X = A^T with weights y = q; B alike, with y = p.

    U is the gradient times the other factor's damped (X^T diag(y) X)^-1, K is its own one.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam(self.betas, self.eps)
        check_choices(
            self, variant=("momentum", "sgd", "adamw"), stats=("tangent", "exact", "none")
        )
        check(self.eps_rel >= 0.0, f"eps_rel must not be negative, got {self.eps_rel!r}")
        check(0.0 < self.floor <= 1.0, f"floor must lie in (0, 1], got {self.floor!r}")
        cap = self.max_rel_step
        check(cap is None or cap > 0.0, f"max_rel_step must be positive, got {cap!r}")

    def state(self, *sides: tuple[int, int]) -> tuple[dict[str, Slot], ...]:
        """Momentum and its clock, and the energies of G along the side that W has too."""
        slots: dict[str, Slot] = {}
        if self.variant != "sgd":
            slots = {"exp_avg": Slot("mn"), "count": Slot("11", dtype=torch.int32)}
        if self.variant == "adamw":
            slots["exp_avg_sq"] = Slot("mn")
        along = {"tangent": ("energy",), "exact": ("energy", "seen"), "none": ()}[self.stats]
        return tuple({**slots, **{k: Slot(axes) for k in along}} for axes in ("1n", "m1"))

    def update(self, A: Member, B: Member) -> Steps:
        """Both steps from the old factors: they are one solution."""
        ws, steps = (A, B), []
        G = [None if w.grad is None else as_tall(w.grad, w) for w in ws]
        dtype = next(g.dtype for g in G if g is not None)
        X = [as_tall(w.value, w).to(dtype) for w in ws]
        Y = [None, None]
        if self.stats != "none":
            E = yield from self.energies(ws, X, G)
            Y = yield BatchedCall(self.weights, (*E,))
        M, clocks = zip(*map(self.averaged_grad, ws), strict=True)
        S = map(gram, X, Y)
        *own_inverses, K_a, K_b = yield BatchedCall(self.inverses, (*S, *clocks))
        for w, m, K, x, y, k in zip(ws, M, (K_a, K_b), X, Y, own_inverses, strict=True):
            if m is None:
                continue
            U = right_matmul(m, K)
            C = product(k, product(x.mT, U))
            D = as_tall(U if y is None else U.div_(y), w)
            if all(g is not None for g in G):  # what both can do is halved: least imbalance
                add_product_(D, *((x, C) if w.number else (C.mT, x.mT)), alpha=-0.5)
            if self.variant == "adamw":
                v, t, (b1, b2) = w.state["exp_avg_sq"], w.state["count"].add_(1), self.betas
                D = adam(D, w.state["exp_avg"], v, t, beta1=b1, beta2=b2, eps=1e-8)
            lr_factor = self.lr_factor_b if w.number else 1.0
            steps.append(w.step(Dense(D), lr_factor=lr_factor, max_rel_norm=self.max_rel_step))
        yield from steps

    def averaged_grad(self, w: Member) -> tuple[Tensor | None, Tensor]:
        """What is preconditioned, and the clock by which its bias is corrected."""
        if w.grad is None or self.variant != "momentum":
            M, clock = w.grad, torch.ones_like(w.value[:, :1, :1], dtype=torch.int32)
        else:
            M, clock = ema(w.state["exp_avg"], w.grad, self.betas[0]), w.state["count"].add_(1)
        return None if M is None else as_tall(M, w), clock

    def inverses(self, S_a: Tensor, S_b: Tensor, *clocks: Tensor) -> tuple[Tensor, ...]:
        """K_Q, K_P, zero for a zero factor; and what M_A, M_B are multiplied by."""
        K_Q, K_P = damped_inverse(torch.cat([S_a, S_b]), self.eps, self.eps_rel).chunk(2)
        beta1 = self.betas[0] if self.variant == "momentum" else 0.0
        c_a, c_b = (debias_factor(clock, beta1, S_a.dtype) for clock in clocks)
        s2 = self.s**2 if self.scale_aware else 1.0
        return K_Q, K_P, K_P * (c_a / s2), K_Q * (c_b / s2)

    def energies(
        self, ws: Sequence[Member], X: Sequence[Tensor], G: Sequence[Tensor | None]
    ) -> Generator[BatchedCall, Any, list[Tensor]]:
        """R (K, n, 1) and L (K, m, 1); the bias of L is left, as only its shape matters."""
        sides, results, beta2 = (
            [x.new_full((len(x), 1, 1), x.shape[-2]) for x in X],
            [],
            self.betas[1],
        )
        if self.stats == "tangent":
            c = yield BatchedCall(self.cores, (*tangent_grams(X, G), *sides))
            means = [*map(tangent_squares, G, c[::2], X, c[1::2])]
        else:
            means = [as_tall(w.state["seen"], w) / k for w, k in zip(ws, sides[::-1], strict=True)]
        for w, x in zip(ws, means, strict=True):
            E = as_tall(ema(w.state["energy"], as_tall(x, w).to(X[0].dtype), beta2), w)
            results.append(E if w.number else E / (1 - beta2**w.t))
        return results

    def cores(self, *grams_and_sides: Tensor) -> tuple[Tensor, ...]:
        """Those of the means of squares of columns and rows."""
        *results, share = tangent_cores(*grams_and_sides)
        core_scale, (n, m) = (
            self.s**-2 / (share if self.rescale_visible else 1.0),
            grams_and_sides[-2:],
        )
        return tuple(K * (core_scale / k) for K, k in zip(results, (m, m, n, n), strict=True))

    def weights(self, R: Tensor, L: Tensor) -> tuple[Tensor, ...]:
        """Of sqrt(V) = p q^T, V = L R / mean(L): q (K, n, 1) and p (K, m, 1)."""
        results = []
        for E in (R, L / (total(L.mT) / L.shape[-2])):
            largest = E.amax(-2, keepdim=True)
            y = torch.maximum(E, largest * self.floor**2).sqrt_()
            results.append(torch.where(largest > 0, y, 1.0))  # no gradient so far: nothing to weigh
        return tuple(results)


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
        groups: A model, its named parameters, or groups as :func:`lora_param_groups` and
            :func:`pairs_to_groups` make them.
        lr: Learning rate of a step of H^-1 G, as Adafactor's (default: 1e-3).
        betas: Decays of the momenta and of L and R (default: (0.9, 0.99)).
        eps_rel: Damping of both Gram matrices relative to their mean eigenvalue (default: 1e-6).
        eps: Absolute damping (default: 0).
        variant: ``"momentum"`` (default): M are averages of the gradients; ``"sgd"``: M are the
            gradients; ``"adamw"``: the steps of ``"sgd"`` are AdamW's gradients, eps 1e-8.
        stats: Whence L and R. ``"tangent"`` (default): from what both factor gradients show of G;
            ``"exact"``: from G itself, see :meth:`watch`; ``"none"``: p = q = 1.
        weight_decay: Decoupled weight decay (default: 0).
        scale: s of pairs whose group or module names none.
        floor: Smallest p and q, relative to their largest (default: 1e-3).
        rescale_visible: Whether ``"tangent"`` divides by the share of a G without direction that
            the pair can see, so that lr means the same as under ``"exact"`` (default: True).
        scale_aware: Whether steps have the 1 / s^2 (default: True); without, lr changes with alpha.
        max_rel_step: Largest step of a factor relative to its norm; None: any. The first step of
            A after B = 0 is as large as A itself however small lr is.
        lr_ratio_b: Multiplies the learning rate of B; None: 1.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State per pair: ``exp_avg``, like the factors; ``energy``, R (1 x n) for A and L (m x 1) for B;
    ``count`` (1 x 1) each; ``exp_avg_sq`` under ``"adamw"``; ``seen``, like ``energy``, under
    ``"exact"``. Peak temporary memory: two matrices of the larger factor, four under ``"adamw"``;
    and float32 copies of what is narrower, of all pairs that run side by side.

    What it is not: blind to how s B A is split into B and A under ``eps`` (``eps_rel`` too), decay
    apart, or in ``"adamw"``, whose squares belong to entries. ``"tangent"`` sees a part of G only.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import AdaPreLoRA, pairs_to_groups
        >>> A, B = torch.randn(2, 8, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> optimizer = AdaPreLoRA(pairs_to_groups([(A, B)], scale=2.0), lr=1e-2)
        >>> (torch.ones(3, 8) @ (2.0 * B @ A).mT - 1).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        groups: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps_rel: float = 1e-6,
        eps: float = 0.0,
        variant: str = "momentum",
        stats: str = "tangent",
        weight_decay: float = 0.0,
        *,
        scale: Scale = None,
        floor: float = 1e-3,
        rescale_visible: bool = True,
        scale_aware: bool = True,
        max_rel_step: float | None = None,
        lr_ratio_b: float | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = AdaPreLoRARule(
            None,
            lr_ratio_b,
            betas,
            eps_rel,
            eps,
            variant,
            stats,
            floor,
            rescale_visible,
            scale_aware,
            max_rel_step,
        )
        super().__init__(groups, rule, lr, weight_decay, scale=scale, **options)
