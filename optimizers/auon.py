"""AuON: momentum divided by its norm; its hybrid takes Newton-Schulz steps after that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..kernels import polar_factor
from ._core.rule import Direction, Member, Rule, Scaled, Slot
from ._core.validation import (
    check,
    check_choices,
    check_eps,
    check_flags,
    check_ints,
    check_numbers,
)
from ._driver.optimizer import StackedOptimizer
from ._toolkit.adjust_lr import adjust_lr
from ._toolkit.moments import momentum_step
from ._toolkit.norm_floor import norm_floor
from ._toolkit.power_sums import momentum_norms, norms_of, series_length, to_float64

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common

ADJUST_LR_FNS = ("match_rms_adamw", "aspect", "none")
PUBLISHED_EPS = 1e-7  # added to the norms of the published code
RMS_EPS = 1e-8  # added to r, which is 1 or more
QUINTIC_BOUND = 1.21  # of the singular values of Y: the quintic maps [0, 1.21] into itself


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
    eps: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, momentum="[0, 1)", gamma="(0, 8] or None")
        check_ints(self, ns_steps="[0, 99]")
        check_flags(self, "nesterov")
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
        check_eps(self)

    @property
    def cosh_scale(self) -> float:
        """The factor gamma of cosh's argument."""
        return self.gamma or (1.0 if self.variant == "paper" else 1.5)

    def norm_eps(self, dtype: torch.dtype) -> float:
        """The number that is added to norms of tensors of this dtype."""
        return norm_floor(self.eps, dtype, PUBLISHED_EPS if self.variant == "repo2026" else None)

    @classmethod
    @override
    def complete_saved(cls, group: dict[str, Any]) -> None:
        group.setdefault("eps", PUBLISHED_EPS)  # version 0.1 saved none, and added this

    splits = frozenset(("rows", "cols"))

    @property
    def needs_full_matrix(self) -> bool:  # type: ignore[override]
        """Newton-Schulz steps of the hybrid are products of whole matrices."""
        return self.ns_steps > 0

    @override
    def capture_obstacle(self) -> str | None:
        return None

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """The momentum buffer."""
        return {"momentum_buffer": Slot("mn")}

    def update(self, w: Member) -> Direction:
        """One step of K equal weights; the host never waits, and a zero V gives a zero step."""
        assert w.grad is not None
        if self.ns_steps:
            return self.hybrid(w)
        mu, B, G = self.momentum, w.state["momentum_buffer"], w.grad
        work = torch.promote_types(torch.promote_types(B.dtype, G.dtype), torch.float32)
        M = B.to(work)  # (K, m, n), the buffer itself if of that dtype
        terms = series_length(w.m * w.n, self.cosh_scale)
        # only sums over V are needed, so V is never stored
        V = momentum_norms(M, G, mu, self.nesterov, terms, w.finite)
        if M is not B:
            B.copy_(M)
        norm = V.norm(w.reductions) + self.norm_eps(work)  # (K, 1, 1)
        step_scale = 1.0 / (
            self.rms_cosh(V.sinh_squares(self.cosh_scale / norm, w.reductions), w) + RMS_EPS
        )
        if self.variant == "paper":  # the other variant divides V itself by rms(cosh)
            step_scale = step_scale * self.lr_factor(w.m, w.n) / norm
        if not self.nesterov:
            return w.step(Scaled(M, _finite_scale(step_scale, M.dtype)))
        shares = [_finite_scale(step_scale * share, M.dtype) for share in (1 - mu, mu)]
        return w.step(Scaled(G, shares[0]), Scaled(M, shares[1]))

    def hybrid(self, w: Member) -> Direction:
        """One step of the hybrid: Newton-Schulz steps on V / |V|, for which V is stored."""
        assert w.grad is not None
        B = w.state["momentum_buffer"]
        V = momentum_step(B, w.grad, self.momentum, self.nesterov, finite=w.finite)  # (K, m, n)
        eps = self.norm_eps(V.dtype)
        inverse_sqrt_norm = (norms_of(V, 1).norm(w.reductions) + eps).rsqrt().to(V.dtype)
        # multiply by the root twice, since 1 / |V| may underflow
        X = V.mul_(inverse_sqrt_norm) if self.nesterov else V * inverse_sqrt_norm
        del V
        Y = w.reductions.on_full_matrix(self.whiten, X.mul_(inverse_sqrt_norm))
        del X
        return w.step(Scaled(Y, _finite_scale(self.hybrid_scale(w, Y, eps), Y.dtype)))

    def hybrid_scale(self, w: Member, Y: Tensor, eps: float) -> Tensor:
        """The scale (K, 1, 1) of Y (K, m, n) in the hybrid's step."""
        entries, c = w.m * w.n, self.cosh_scale
        if self.variant == "repo2026":  # r of Y / |Y|
            sums = norms_of(Y, series_length(entries, c))
            factor, cosh_scale = 1.0, c / (sums.norm(w.reductions) + eps)
        elif self.adjust_lr_fn == "match_rms_adamw":  # r cancels
            return self.lr_factor(w.m, w.n) / (norms_of(Y, 1).norm(w.reductions) + eps)
        else:  # r of Y, whose squares sum to min(m, n) * QUINTIC_BOUND^2 at most
            sums = norms_of(Y, series_length(entries, QUINTIC_BOUND * c, min(w.m, w.n)))
            factor, cosh_scale = (
                self.lr_factor(w.m, w.n),
                torch.full_like(to_float64(Y[:, :1, :1]), c),
            )
        r = self.rms_cosh(sums.sinh_squares(cosh_scale, w.reductions), w)
        return factor / (r + RMS_EPS)

    def whiten(self, X: Tensor) -> Tensor:
        """Newton-Schulz steps on X (K, m, n) of norm at most 1, which eps=1 leaves unscaled."""
        norm = "frobenius" if self.init_norm == "fro" else "rowsum"
        return polar_factor(X, "ns5", steps=self.ns_steps, eps=1.0, norm=norm)

    def rms_cosh(self, sinh_squares: Tensor, w: Member) -> Tensor:
        """The root mean square of cosh, from cosh^2 = 1 + sinh^2 so that no digit is lost."""
        return (1.0 + sinh_squares / (w.m * w.n)).sqrt()

    def lr_factor(self, m: int, n: int) -> float:
        """Factor of lr in an update of norm 1; weight decay takes the bare lr."""
        return adjust_lr(self.adjust_lr_fn, m, n, rank=1)


def _finite_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in a narrower dtype; one over the norm of zeros, times lr, stays finite there."""
    return scale.clamp(max=torch.finfo(dtype).max / 1024).to(dtype)


class AuON(StackedOptimizer):
    """AuON: Nesterov momentum divided by its own norm; its hybrid whitens it a little first.

    For each matrix W (m x n) with gradient G, N = m n::

        M <- momentum M + (1 - momentum) G
        V  = (1 - momentum) G + momentum M  if nesterov else  M;   X = V / (|V|_F + eps)
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
        gamma: Factor inside cosh (default: None, which is 1, for ``"repo2026"`` 1.5).
        ns_steps: 0 (default), or the steps of the hybrid; the paper's has 1.
        adjust_lr_fn: s: ``"match_rms_adamw"`` (default), ``"aspect"`` sqrt(max(1, m / n)) as
            published, ``"none"`` 1. ``"repo2026"`` has none.
        init_norm: What the hybrid divides V by before the steps: ``"fro"`` (default) its norm, as
            published, or ``"spectral-bound"`` the smaller ||V V^T||_inf^(1/2), an upper bound of
            the largest singular value, so that one step acts where the quintic bends.
        eps: Added to norms that divide. None (default): the smallest normal number of the dtype,
            where a step is whole for entries of G down to 1e-35 (float32); for ``"repo2026"`` the
            published 1e-7.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: If an argument is out of range, unknown, or excluded by another one; the text
            names it.
        TypeError: If a keyword is unknown.

    State: ``momentum_buffer`` (like W, float32) and ``step``. Peak temporary memory: panels, for
    small matrices four of their stack; of the hybrid five matrices.

    Caveat: r is between 1 and 1 + gamma^2 / N or so, exactly 1 in float32 for a large layer, so
    plain AuON is momentum SGD with one step length per matrix: the direction, singular vectors and
    condition number are those of V. In its author's tables it loses to AdamW on language. Under
    ``"repo2026"`` the step grows with the loss. The hybrid's step is nearly linear too where |V|_F
    is far above the largest singular value.

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
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        variant: str = "paper",
        gamma: float | None = None,
        ns_steps: int = 0,
        adjust_lr_fn: str = "match_rms_adamw",
        init_norm: str = "fro",
        eps: float | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = AuONRule(
            momentum=momentum,
            nesterov=nesterov,
            variant=variant,
            gamma=gamma,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            init_norm=init_norm,
            eps=eps,
        )
        super().__init__(params, rule, lr, weight_decay, **options)
