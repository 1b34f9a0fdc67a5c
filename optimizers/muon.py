"""Muon: momentum, then the orthogonal factor of the momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import POLAR_METHODS, polar_factor
from .base import StackedOptimizer
from .moments import ema, nesterov
from .rule import Dense, Direction, Member, Rule, Slot, check

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .groups import Common

ADJUST_LR_FNS = ("auto", "original", "match_rms_adamw", "spectral", "none", None)


@dataclass(frozen=True)
class MuonRule(Rule):
    """B <- B + (1 - mu)(G - B); U = G + mu (B - G); step along polar(U), scaled by its shape."""

    momentum: float = 0.95
    nesterov: bool = True
    polar: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None
    eps: float = 1e-7
    adjust_lr_fn: str | None = "auto"
    compat: str | None = None
    polar_norm: str | None = None

    def __post_init__(self) -> None:
        check(0.0 <= self.momentum, f"momentum should be >= 0 but is: {self.momentum}")
        check(0.0 <= self.eps, f"Invalid epsilon value: {self.eps}")
        check(
            self.adjust_lr_fn in ADJUST_LR_FNS,
            f"Adjust learning rate function {self.adjust_lr_fn} is not supported",
        )
        check(
            self.compat in (None, "torch"), f"compat must be None or 'torch', got {self.compat!r}"
        )
        check(
            self.polar == "auto" or self.polar in POLAR_METHODS,
            f"polar must be 'auto' or one of {', '.join(POLAR_METHODS)}, got {self.polar!r}",
        )
        check(
            self.compat is None or self.polar in ("auto", "ns5"),
            f"compat='torch' iterates with ns5; leave polar unset instead of {self.polar!r}",
        )
        check(
            self.compat is None or self.polar_norm is None,
            "compat='torch' divides by the Frobenius norm; leave polar_norm unset",
        )
        check(
            self.ns_steps is None or 1 <= self.ns_steps < 100,
            "Number of steps must be less than 100 for computational efficiency",
        )
        self.orthogonalize(torch.empty(1, 0, 1))  # what the kernel refuses is refused here

    def state(self, m: int, n: int) -> dict[str, Slot]:
        """The buffer; torch keeps it in the gradient's dtype."""
        return {"momentum_buffer": Slot("mn", dtype="weight" if self.compat else None)}

    def update(self, w: Member) -> Direction:
        """One step for a stack."""
        assert w.grad is not None
        B = w.state["momentum_buffer"]
        G = w.grad.to(B.dtype) if self.compat else w.grad
        M = ema(B, G, self.momentum)  # (K, m, n)
        U = nesterov(G, M, self.momentum) if self.nesterov else M
        return w.step(Dense(w.sums.whole(self.orthogonalize, U)), scale=self.ratio(w.m, w.n))

    def orthogonalize(self, U: Tensor) -> Tensor:
        """The polar factor of every matrix of U (K, m, n)."""
        if self.compat is None:
            return self._factor(U, self.polar)
        O = self._factor(U, "ns5", dtype=torch.bfloat16)
        # torch adds the factor of a tall matrix as a transposed view; bfloat16 weights round
        # such a sum otherwise
        return O if U.shape[-2] <= U.shape[-1] else O.mT.contiguous().mT

    def _factor(self, U: Tensor, method: str, **options: Any) -> Tensor:
        steps, coefficients = self.ns_steps, self.ns_coefficients
        if self.polar_norm is not None:
            options["norm"] = self.polar_norm
        return polar_factor(
            U, method, steps=steps, coefficients=coefficients, eps=self.eps, **options
        )

    def ratio(self, m: int, n: int) -> float:
        """What multiplies lr in the update, never in the decay."""
        name = self.adjust_lr_fn
        if name == "auto":
            name = "original" if self.compat else "match_rms_adamw"
        if name == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        if name == "spectral":
            return math.sqrt(m / n)
        return 1.0 if name == "none" else math.sqrt(max(1, m / n))


class Muon(StackedOptimizer):
    """Muon: orthogonalised momentum for matrices, AdamW for everything else.

    For each matrix W (m x n) with gradient G::

        B <- B + (1 - momentum) (G - B)                       momentum
        U  = G + momentum (B - G)   if nesterov else   B
        O  = polar(U)                                         all singular values near 1
        W <- (1 - lr * weight_decay) W                        decay with the bare lr
        W <- W - lr * ratio(m, n) * O                         RMS 0.2 by default, as AdamW's

    Source: Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024;
    *Muon is Scalable for LLM Training*, arXiv 2502.16982.

    Args:
        params: A module, (named) parameters or groups; see :class:`StackedOptimizer`.
            KellerJordan's groups with ``use_muon`` work as they are.
        lr: Learning rate (default: 1e-3); AdamW's carries over.
        weight_decay: Decoupled weight decay (default: 0.1).
        momentum: Decay of the momentum average (default: 0.95).
        nesterov: Look ahead by one gradient (default: True).
        polar: How the polar factor is computed: ``"auto"`` (``"zolo"`` on CPU, ``"ns5"`` in
            bfloat16 on accelerators, and wherever ``ns_steps``, ``ns_coefficients`` or
            ``polar_norm`` is given) or a method of :func:`stiefel.kernels.polar_factor`.
        ns_steps: Iterations of a polynomial method; None: its own number.
        ns_coefficients: One triple (a, b, c), or one for each step; None: the method's own.
        eps: Smallest norm to divide by (default: 1e-7).
        polar_norm: What a polynomial method divides by first: ``"frobenius"``, ``"schatten4"``,
            ``"aol"`` or ``"power:k"``; None: the method's own.
        adjust_lr_fn: ratio(m, n): ``"match_rms_adamw"`` 0.2 sqrt(max(m, n)); ``"original"`` (or
            None, as in torch) sqrt(max(1, m / n)); ``"spectral"`` sqrt(m / n); ``"none"`` 1.
            ``"auto"`` (default): ``"match_rms_adamw"``, under ``compat`` ``"original"``.
        compat: ``"torch"`` has the arithmetic of ``torch.optim.Muon``, bit for bit: ns5 in
            bfloat16 and the buffer in the gradient's dtype. It is slow on a CPU.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    State: ``momentum_buffer`` (like W, float32) and ``step``. Checkpoints of ``torch.optim.Muon``
    load. Peak temporary memory: five matrices of the largest weight.

    What it is not: exactly orthogonal. Singular values of O lie in the band that
    :func:`stiefel.kernels.polar_factor` states, 0.87 to 1.13 for ``"zolo"`` (0.94 to 1.06 above a
    shorter side of 256), and fall to zero for singular values of U below about 1/300 (1/1000) of
    its norm. Embeddings and heads belong to AdamW, where
    a module or parameter names route them.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Muon
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = Muon(model, lr=1e-3)
        >>> loss = model(torch.ones(2, 8)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
    """

    _reference_key = "use_muon"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        polar: str = "auto",
        ns_steps: int | None = None,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None,
        eps: float = 1e-7,
        adjust_lr_fn: str | None = "auto",
        compat: str | None = None,
        polar_norm: str | None = None,
        **options: Unpack[Common],
    ) -> None:
        rule = MuonRule(
            momentum, nesterov, polar, ns_steps, ns_coefficients, eps, adjust_lr_fn, compat,
            polar_norm,
        )  # fmt: skip
        super().__init__(params, rule, lr, weight_decay, **options)
