"""AuON: momentum of unit norm, if wanted after a Newton-Schulz step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..kernels import polar_factor
from ._core.rule import Direction, Member, Rule, Scaled, Slot
from ._core.validation import check, check_choices
from ._driver.optimizer import StackedOptimizer
from ._toolkit.moments import momentum_step
from ._toolkit.power_sums import momentum_norms, norms_of, series_length, to_float64

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

ADJUST_LR_FNS = ("match_rms_adamw", "aspect", "none")
NORM_EPS, RMS_EPS = 1e-7, 1e-8  # added to norms, and to r, where they divide
QUINTIC_BOUND = 1.21  # of the singular values of Y: the quintic is below it on [0, QUINTIC_BOUND]


@dataclass(frozen=True)
class AuONRule(Rule):
    """M <- mu M + (1-mu) G; V = (1-mu) G + mu M; step along V / |V| / rms(cosh(V / |V|))."""

    handles_nonfinite: ClassVar[bool] = True

    momentum: float = 0.95
    nesterov: bool = True
    variant: str = "paper"
    gamma: float | None = None
    ns_steps: int = 0
    adjust_lr_fn: str = "match_rms_adamw"
    init_norm: str = "fro"

    def __post_init__(self) -> None:
        check(0.0 <= self.momentum < 1.0, f"momentum must be in [0, 1), got {self.momentum}")
        check(
            self.gamma is None or 0.0 < self.gamma <= 8.0,
            f"gamma must be None or in (0, 8], got {self.gamma}",
        )
        check(
            isinstance(self.ns_steps, int) and 0 <= self.ns_steps < 100,
            f"ns_steps must be an int from 0 to 99, got {self.ns_steps!r}",
        )
        check_choices(
            self,
            variant=("paper", "repo2026"),
            adjust_lr_fn=ADJUST_LR_FNS,
            init_norm=("fro", "spectral-bound"),
        )
        check(
            self.init_norm == "fro" or self.ns_steps > 0,
            "init_norm is what Newton-Schulz starts from; it needs ns_steps=1 or more",
        )

    @property
    def cosh_scale(self) -> float:
        """What multiplies the argument of cosh."""
        return self.gamma or (1.0 if self.variant == "paper" else 1.5)

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """The buffer."""
        return {"momentum_buffer": Slot("mn")}

    def update(self, w: Member) -> Direction:
        """One step for a stack; nothing is asked of the device, a zero V gives a zero step."""
        assert w.grad is not None
        if self.ns_steps:
            return self.hybrid(w)
        mu, B, G = self.momentum, w.state["momentum_buffer"], w.grad
        work = torch.promote_types(torch.promote_types(B.dtype, G.dtype), torch.float32)
        M = B.to(work)  # (K, m, n), the buffer itself where it is as wide
        terms = series_length(w.m * w.n, self.cosh_scale)
        V = momentum_norms(
            M, G, mu, self.nesterov, terms, w.finite
        )  # its sums; it need not be whole
        if M is not B:
            B.copy_(M)
        size = V.norm(w.reductions) + NORM_EPS
        step_scale = 1.0 / (
            self.rms_cosh(V.sinh_squares(self.cosh_scale / size, w.reductions), w) + RMS_EPS
        )
        if self.variant == "paper":  # the other variant divides V itself by rms(cosh)
            step_scale = step_scale * self.lr_factor(w.m, w.n) / size
        if not self.nesterov:
            return w.step(Scaled(M, step_scale.to(M.dtype)))
        shares = (step_scale * (1 - mu)).to(M.dtype), (step_scale * mu).to(M.dtype)
        return w.step(Scaled(G, shares[0]), Scaled(M, shares[1]))

    def hybrid(self, w: Member) -> Direction:
        """The same with Newton-Schulz steps on V / |V|, which need V whole."""
        assert w.grad is not None
        B = w.state["momentum_buffer"]
        V = momentum_step(B, w.grad, self.momentum, self.nesterov, finite=w.finite)  # (K, m, n)
        inverse_sqrt_norm = (norms_of(V, 1).norm(w.reductions) + NORM_EPS).rsqrt().to(V.dtype)
        X = (
            V.mul_(inverse_sqrt_norm) if self.nesterov else V * inverse_sqrt_norm
        )  # then again, since 1 / |V| may vanish
        del V
        Y = w.reductions.on_full_matrix(self.whiten, X.mul_(inverse_sqrt_norm))
        del X
        paper, max_square_sum = self.variant == "paper", min(w.m, w.n)
        if paper and self.adjust_lr_fn == "match_rms_adamw":  # rms(cosh) would cancel
            step_scale = self.lr_factor(w.m, w.n) / (norms_of(Y, 1).norm(w.reductions) + NORM_EPS)
        elif paper:
            power_sums = norms_of(
                Y, series_length(w.m * w.n, QUINTIC_BOUND * self.cosh_scale, max_square_sum)
            )
            c = torch.full_like(to_float64(Y[:, :1, :1]), self.cosh_scale)
            step_scale = self.lr_factor(w.m, w.n) / (
                self.rms_cosh(power_sums.sinh_squares(c, w.reductions), w) + RMS_EPS
            )
        else:
            power_sums = norms_of(Y, series_length(w.m * w.n, self.cosh_scale))
            c = self.cosh_scale / (power_sums.norm(w.reductions) + NORM_EPS)
            step_scale = 1.0 / (
                self.rms_cosh(power_sums.sinh_squares(c, w.reductions), w) + RMS_EPS
            )
        return w.step(Scaled(Y, step_scale.to(Y.dtype)))

    def whiten(self, X: Tensor) -> Tensor:
        """Newton-Schulz on X (K, m, n) of norm 1 at most, which eps=1 leaves as it is."""
        norm = "frobenius" if self.init_norm == "fro" else "rowsum"
        return polar_factor(X, "ns5", steps=self.ns_steps, eps=1.0, norm=norm)

    def rms_cosh(self, sinh_squares: Tensor, w: Member) -> Tensor:
        """The root mean square of cosh, from cosh^2 = 1 + sinh^2 so that no digit is lost."""
        return (1.0 + sinh_squares / (w.m * w.n)).sqrt()

    def lr_factor(self, m: int, n: int) -> float:
        """What multiplies lr in the update, never in the decay."""
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(m * n)
        return math.sqrt(max(1.0, m / n)) if self.adjust_lr_fn == "aspect" else 1.0


class AuON(StackedOptimizer):
    """AuON: Nesterov momentum divided by its own norm; its hybrid whitens it a little first.

    For each matrix W (m x n) with gradient G, N = m n::

        M <- momentum M + (1 - momentum) G
        V  = (1 - momentum) G + momentum M  if nesterov else  M;   X = V / (|V|_F + 1e-7)
        r  = sqrt(mean(cosh(gamma X)^2))                       U = X / (r + 1e-8)
        W <- (1 - lr * weight_decay) W - lr * s * U            s = 0.2 sqrt(N), so RMS 0.2 / r
        hybrid: Y = ns_steps Newton-Schulz steps on X, r of Y, U = Y / r;  s = 0.2 sqrt(N) / |U|_F

    Source: *AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates*, arXiv 2509.24320.

    Args:
        params: A module, (named) parameters or groups; see :class:`StackedOptimizer`.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        momentum: Decay of the momentum average (default: 0.95).
        nesterov: Look ahead by one gradient (default: True).
        weight_decay: Decoupled weight decay (default: 0).
        variant: ``"paper"`` (default) as above; ``"repo2026"``, the later published code:
            U = V / r, without a norm and without s, and in the hybrid r of Y / |Y|_F.
        gamma: Inside cosh; None (default): 1, for ``"repo2026"`` 1.5.
        ns_steps: 0 (default), or the steps of the hybrid; the paper's has 1.
        adjust_lr_fn: s: ``"match_rms_adamw"`` (default), ``"aspect"`` sqrt(max(1, m / n)) as
            published, ``"none"`` 1. ``"repo2026"`` has none.
        init_norm: What the hybrid divides V by before the steps: ``"fro"`` (default) its norm, as
            published, or ``"spectral-bound"`` the smaller ||V V^T||_inf^(1/2), still no singular
            value, so that one step acts where it bends.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State: ``momentum_buffer`` (like W, float32) and ``step``. Peak temporary memory: panels, for
    small matrices four of their stack; of the hybrid five matrices.

    What it is not: a reconditioning. r is between 1 and 1 + gamma^2 / N or so, exactly 1 in float32
    for a large layer, so plain AuON is momentum SGD with one step length per matrix: the direction,
    singular vectors and condition number of V. In its author's tables it loses to AdamW on
    language. ``"repo2026"`` is not even normalised: its step grows with the loss. The hybrid's
    step is nearly linear too where |V|_F is far above the largest singular value.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import AuON
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = AuON(model, lr=1e-3, ns_steps=1)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        variant: str = "paper",
        gamma: float | None = None,
        ns_steps: int = 0,
        adjust_lr_fn: str = "match_rms_adamw",
        init_norm: str = "fro",
        **options: Unpack[Common],
    ) -> None:
        rule = AuONRule(momentum, nesterov, variant, gamma, ns_steps, adjust_lr_fn, init_norm)
        super().__init__(params, rule, lr, weight_decay, **options)
