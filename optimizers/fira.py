"""Fira: GaLore's step, and what it throws away of the gradient at Adam's scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._core.rule import LOCAL_REDUCTIONS, Direction, Member, Scaled, Slot
from ._core.validation import check, check_choices
from ._driver.optimizer import StackedOptimizer
from ._toolkit.lowrank import LowRankRule
from ._toolkit.moments import column_squares, total

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

NORM_EPS = 1e-8  # added to norms that divide, as published


@dataclass(frozen=True)
class FiraRule(LowRankRule):
    """S = phi (G - P R), limited in growth, beside GaLore's P N; phi_i = |N_i| / |R_i|."""

    alpha: float = 0.25
    variant: str = "reference"
    scaling: str = "column"
    limiter: bool = True
    gamma: float = 1.01
    limiter_floor: float = NORM_EPS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, variant=("reference", "paper"), scaling=("column", "matrix"))
        for name, least in (("gamma", 1.0), ("limiter_floor", 0.0)):
            value = getattr(self, name)
            check(value >= least, f"{name} must be at least {least}, got {value!r}")
        check(
            self.variant == "reference" or not self.published,
            "compat='reference' is the published code; it has variant='reference'",
        )

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """GaLore's, and the norm of the last residual; below zero it is absent."""
        slots = super().state(m, n)
        return {**slots, "limiter_norm": Slot("11", fill=-1.0)} if self.limiter else slots

    def update(self, w: Member) -> Direction:
        """P N + S in one lift: phi scales columns and so commutes with it."""
        assert w.grad is not None
        P, G, state = self.projector, w.grad, w.state
        R, G2 = P.project_with_squares(
            state, G, w.reductions
        )  # (K, r, n), (K, 1, n); P^T G Q is (K, r, r)
        N, factor = self.direction(w, R)
        N, c = N.mul_(factor) if factor != 1.0 else N, self.bias_factor(w)
        # the published code has alpha inside the residual, not before it, and c after the limiter
        a, lr_factor, c = (
            (1.0, self.alpha, 1.0) if self.variant == "paper" else (self.alpha, 1.0, c)
        )
        phi, norm = self.residual_scale(w, G2, R, N, a)
        if self.limiter:
            floor = None if self.published else self.limiter_floor
            phi = phi / norm_growth_limiter(
                norm / c, state["limiter_norm"], self.gamma, floor, w.finite
            )
        lift = P.lift(state, N.sub_(R.mul_(phi)).mul_(a), w.m)  # a P (N - phi R), then phi G
        return w.step(lift, Scaled(G, phi), lr_factor=lr_factor, decay_last=self.published)

    def residual_scale(
        self, w: Member, G2: Tensor, R: Tensor, N: Tensor, a: float
    ) -> tuple[Tensor, ...]:
        """Phi (K, 1, n) and |phi (G - a P R)| (K, 1, 1) by Pythagoras, without that difference."""
        guard, full = self.compat is None, self.proj_type == "full"
        R2, N2 = column_squares(R), column_squares(N)
        cols = LOCAL_REDUCTIONS.cols if full else w.reductions.cols  # with two sides R is whole
        r2, n2, g2 = cols(total(R2)), cols(total(N2)), w.reductions.cols(total(G2))
        phi = n2.sqrt() / (r2.sqrt() + NORM_EPS)  # where all of R is round-off it tells no scale:
        phi = phi.where(r2 > 1e-12 * g2, 0.0) if guard else phi
        if full or self.scaling == "matrix":
            R2, G2, cols = r2, g2, LOCAL_REDUCTIONS.cols
        else:
            columns = N2.sqrt() / (R2.sqrt() + NORM_EPS)  # R may miss a column that N remembers:
            phi = columns.where(R2 > NORM_EPS**2 * r2, phi) if guard else columns
        S2, norm_now = (cols(total(phi.square() * x)) for x in ((G2 - (2 * a - a * a) * R2), G2))
        noise = 64 * torch.finfo(S2.dtype).eps if guard else 0.0  # what cancelled is no residual
        return phi, S2.masked_fill(S2 < noise * norm_now, 0.0).sqrt()


def norm_growth_limiter(
    norm: Tensor,
    stored: Tensor,
    gamma: float = 1.01,
    floor: float | None = 1e-8,
    finite: Tensor | None = None,
) -> Tensor:
    """What a quantity is divided by so that its norm grows by gamma per step at most.

    L = max(norm / (stored + 1e-8), gamma) / gamma, and the limited norm / L is stored. A stored
    norm below zero is absent: then L = 1. Source: Fira, arXiv 2410.01623.

    Args:
        norm: (K, 1, 1) norms of this step. One that is not finite gives L = inf and is not stored.
        stored: (K, 1, 1) limited norms of the last step, changed in place.
        gamma: At least 1.
        floor: A stored norm up to it is absent too: L would hold the next ones down for long. None:
            as published.
        finite: None, or flags (K,): where one is 0 nothing is stored.

    Returns:
        (K, 1, 1), at least 1.
    """
    previous = stored.to(norm.dtype)
    absent, finite = previous < 0 if floor is None else previous <= floor, norm.isfinite()
    L = (norm / (previous + 1e-8)).div_(gamma).clamp_(min=1.0).masked_fill_(absent, 1.0)
    updated = finite if finite is None else finite & (finite.view(-1, 1, 1) != 0)
    stored.copy_(torch.where(updated, norm / L, previous))
    return L.masked_fill_(~finite, math.inf)


class Fira(StackedOptimizer):
    """Fira: GaLore, and the residual of its projection at the scale that Adam gives the rest.

    For each matrix W with gradient G (m x n, turned so that m <= n under ``"std"``), as published::

        R = P^T G;  psi = M / (sqrt(V) + eps) with Adam's moments of R, c its bias correction
        phi_i = |psi_i| / |R_i|, a factor per column;  S = phi (G - alpha P R)
        S <- S / L,  L >= 1 so that |S| grows by at most gamma
        W <- (1 - lr * weight_decay) W - lr * c * (alpha P psi + S)

    Source: *Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?* arXiv 2410.01623.

    Args:
        params: As for :class:`StackedOptimizer`; where some group names ``rank``, others are AdamW.
        lr: Learning rate (default: 1e-3).
        betas: Decays of the moments (default: (0.9, 0.999)).
        eps: Added to the bias-corrected root; None: 1e-8, under ``compat`` 1e-6.
        weight_decay: Decoupled weight decay (default: 0).
        rank: Columns of P, a count or a fraction of the projected side (default: 128).
        update_proj_gap: Steps between two bases (default: 200).
        alpha: Size of the projected part (default: 0.25), see ``variant``.
        proj_type: As in :class:`GaLore` (default: ``"std"``); ``"full"`` has ``"matrix"`` scaling.
        variant: ``"reference"`` (default) as above, or ``"paper"``: S = phi (G - P R) with
            N = c psi for psi, and W moves by lr * alpha * (P N + S).
        scaling: ``"column"`` (default), or ``"matrix"`` for one factor |psi| / |R|.
        limiter: Whether the growth of S is limited (default: True).
        gamma: Most growth of |S| in a step (default: 1.01).
        limiter_floor: A norm up to it limits nothing in the next step (default: 1e-8).
        projection: How P is found, as in :class:`GaLore` (default: ``"svd"``).
        moments: What a new basis does to M, V, as in :class:`GaLore` (default: ``"keep"``).
        correct_bias: False (c = 1) only under ``compat``; with betas (0, b) it is the RMSProp form.
        compat: ``"reference"``: all as published (order, eps, decay, LAPACK's signs), unguarded.
        seed: Decides the draws of random projections (default: 0).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State of an m x n weight, m <= n: ``basis`` (m, r), ``exp_avg`` and ``exp_avg_sq`` (r, n),
    ``limiter_norm`` (1, 1). Peak temporary memory: buffers r x n and panels.

    What it is not: one method. Paper and code differ: in the code alpha shrinks what is subtracted
    but not S, so S keeps 1 - alpha of the projected gradient and weighs 1 / alpha times more, and
    |S| is limited before c. They agree at alpha = 1 without limiter. |S| comes from a difference of
    squares: in default mode one below 0.3 % of |phi G| (in float32) counts as zero.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Fira
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Fira(model, lr=1e-2, rank=2, update_proj_gap=50)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _reference_key = "rank"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        rank: int | float = 128,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: str = "std",
        variant: str = "reference",
        scaling: str = "column",
        limiter: bool = True,
        gamma: float = 1.01,
        limiter_floor: float = NORM_EPS,
        projection: str = "svd",
        moments: str = "keep",
        correct_bias: bool = True,
        compat: str | None = None,
        seed: int = 0,
        **options: Unpack[Common],
    ) -> None:
        rule = FiraRule(
            betas,
            eps,
            rank,
            update_proj_gap,
            proj_type,
            projection,
            moments,
            correct_bias,
            compat,
            seed,
            alpha,
            variant,
            scaling,
            limiter,
            gamma,
            limiter_floor,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
