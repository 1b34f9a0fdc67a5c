"""Base optimizers on projected or selected coordinates R: Adam, Lion, momentum SGD, Adafactor.

A low-rank or splitting method leaves its coordinates to one of them. A base optimizer declares its
state, moves it and returns the direction N: the coordinates move by -lr * N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .._core.rule import LOCAL_REDUCTIONS, Reductions, Slot
from .._core.validation import check
from .moments import (
    BasisChange,
    adam,
    carry_moments,
    column_squares,
    ema,
    momentum_step,
    safe_square_scale,
    total,
)

__all__ = ["BASE_OPTIMIZERS", "BaseOptimizer", "make_base_optimizer"]

State = Mapping[str, Tensor]


def _moment_slot(axes: str, sizes: Mapping[str, int]) -> Slot:
    # by position, since a type checker cannot tell that no size is called dtype, fill or device
    return Slot(axes, None, 0.0, None, **sizes)


@dataclass(frozen=True)
class BaseOptimizer:
    """One optimizer on coordinates R (K, r, n).

    Attributes:
        betas: The method's betas, which every optimizer reads as its own paper does.
        eps: The method's eps.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def slots(self, axes: str, **sizes: int) -> dict[str, Slot]:
        """State of one matrix of coordinates with these axes."""
        raise NotImplementedError

    def direction(
        self,
        state: State,
        R: Tensor,
        t: int | Tensor,
        reductions: Reductions = LOCAL_REDUCTIONS,
        finite: Tensor | None = None,
        n: int | None = None,
    ) -> Tensor:
        """Move the state and return N, a new tensor like R.

        Args:
            state: The tensors that ``slots`` declared, changed in place.
            R: (K, r, n), not changed.
            t: Number of this update from 1, for all of R or for each row or column.
            reductions: Sums over the columns of the weight (default: those of one process).
            finite: None, or flags (K,), 0 where the state stays and N means nothing.
            n: Columns of all ranks together (default: None, those of R).
        """
        raise NotImplementedError

    def carry_state(self, policy: str, state: State, change: BasisChange, t: int) -> None:
        """Carry the state from an old basis to a new one, in place.

        Args:
            policy: A policy of :func:`carry_moments`; "ldadam" is "rotate" for an optimizer
                without Adam's second moment.
            state: The tensors that ``slots`` declared.
            change: Change from the old basis to the new one.
            t: Updates that the state has seen.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Adam(BaseOptimizer):
    """Adam, arXiv 1412.6980; the driver applies the weight decay."""

    @override
    def slots(self, axes: str, **sizes: int) -> dict[str, Slot]:
        moment = _moment_slot(axes, sizes)
        return {"exp_avg": moment, "exp_avg_sq": moment}

    @override
    def direction(
        self,
        state: State,
        R: Tensor,
        t: int | Tensor,
        reductions: Reductions = LOCAL_REDUCTIONS,
        finite: Tensor | None = None,
        n: int | None = None,
    ) -> Tensor:
        M, V = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = self.betas
        return adam(R, M, V, t, beta1=beta1, beta2=beta2, eps=self.eps, finite=finite)

    @override
    def carry_state(self, policy: str, state: State, change: BasisChange, t: int) -> None:
        M, V = state["exp_avg"], state["exp_avg_sq"]
        carry_moments(policy, M, V, change, t=t, betas=self.betas)


@dataclass(frozen=True)
class Lion(BaseOptimizer):
    """Lion, arXiv 2302.06675: N = sign(b1 M + (1 - b1) R), then M <- b2 M + (1 - b2) R."""

    @override
    def slots(self, axes: str, **sizes: int) -> dict[str, Slot]:
        return {"exp_avg": _moment_slot(axes, sizes)}

    @override
    def direction(
        self,
        state: State,
        R: Tensor,
        t: int | Tensor,
        reductions: Reductions = LOCAL_REDUCTIONS,
        finite: Tensor | None = None,
        n: int | None = None,
    ) -> Tensor:
        M = state["exp_avg"]
        beta1, beta2 = self.betas
        N = M.to(R.dtype).lerp(R, 1 - beta1).sign_()
        ema(M, R, beta2, finite)
        return N

    @override
    def carry_state(self, policy: str, state: State, change: BasisChange, t: int) -> None:
        _carry_first_moment(policy, state["exp_avg"], change)


@dataclass(frozen=True)
class SGDM(BaseOptimizer):
    """Momentum SGD as ``torch.optim.SGD``: B <- b1 B + R, N = B."""

    @override
    def slots(self, axes: str, **sizes: int) -> dict[str, Slot]:
        return {"momentum_buffer": _moment_slot(axes, sizes)}

    @override
    def direction(
        self,
        state: State,
        R: Tensor,
        t: int | Tensor,
        reductions: Reductions = LOCAL_REDUCTIONS,
        finite: Tensor | None = None,
        n: int | None = None,
    ) -> Tensor:
        B = state["momentum_buffer"]
        N = momentum_step(B, R, self.betas[0], kind="sum", finite=finite)
        return N.clone() if N is B else N

    @override
    def carry_state(self, policy: str, state: State, change: BasisChange, t: int) -> None:
        _carry_first_moment(policy, state["momentum_buffer"], change)


@dataclass(frozen=True)
class Adafactor(BaseOptimizer):
    """Adafactor, arXiv 1804.04235, with a given learning rate: V as an outer product.

    With b = 1 - t^-0.8 and averages over n and over r of R*R + 1e-30::

        v <- b v + (1 - b) mean_n,  w <- b w + (1 - b) mean_r       r x 1,  1 x n
        N  = R / sqrt(v w / mean(v));  N <- N / max(1, RMS(N))
        N  = M <- b1 M + (1 - b1) N                                 if b1 > 0

    b1 is the first beta; 0, as published, keeps no first moment. The second beta is not used.
    """

    decay_rate: ClassVar[float] = -0.8
    floor: ClassVar[float] = 1e-30
    clip_threshold: ClassVar[float] = 1.0

    @override
    def slots(self, axes: str, **sizes: int) -> dict[str, Slot]:
        factors = {
            "exp_avg_sq_row": _moment_slot(axes[0] + "1", sizes),
            "exp_avg_sq_col": _moment_slot("1" + axes[1], sizes),
        }
        if self.betas[0] == 0.0:
            return factors
        return {"exp_avg": _moment_slot(axes, sizes), **factors}

    @override
    def direction(
        self,
        state: State,
        R: Tensor,
        t: int | Tensor,
        reductions: Reductions = LOCAL_REDUCTIONS,
        finite: Tensor | None = None,
        n: int | None = None,
    ) -> Tensor:
        check(isinstance(t, int), "Adafactor has one clock for all coordinates")
        r, n = R.shape[-2], R.shape[-1] if n is None else n
        beta2 = 1 - float(t) ** self.decay_rate
        rows = reductions.cols(column_squares(R.mT).mT) / n + self.floor
        cols = column_squares(R) / r + self.floor
        # an average cannot leave infinity, so squares above the largest number count as that
        row_average, col_average = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        largest = min(torch.finfo(X.dtype).max for X in (rows, row_average))
        v = ema(row_average, rows.clamp_(max=largest), beta2, finite)
        w = ema(col_average, cols.clamp_(max=largest), beta2, finite)
        mean = total(v.mT) / r
        # root by root: v / mean may lie below the smallest number
        ratio = (mean.sqrt() * v.rsqrt()).masked_fill_(mean.isinf(), 0.0)  # as Adam: R / inf
        N = R * ratio * w.rsqrt()
        c = safe_square_scale(N, reductions)  # where v or w is small beside mean N may be huge
        N.mul_(c)
        rms = (reductions.cols(total(column_squares(N))) / (r * n)).sqrt()
        N.div_(torch.maximum(rms / self.clip_threshold, c))
        if self.betas[0] == 0.0:
            return N
        return ema(state["exp_avg"], N, self.betas[0], finite).clone()

    @override
    def carry_state(self, policy: str, state: State, change: BasisChange, t: int) -> None:
        """Carry the first moment and the row averages; column averages belong to no basis."""
        if "exp_avg" in state:
            _carry_first_moment(policy, state["exp_avg"], change)
        rows = state["exp_avg_sq_row"]
        if policy == "reset":
            rows.zero_()
            state["exp_avg_sq_col"].zero_()
        elif policy != "keep":  # a new row starts at the floor: from zero its step would be 1/0
            new = change.apply_squares(rows)
            largest = min(torch.finfo(X.dtype).max for X in (new, rows))
            rows.copy_(new.clamp_(min=self.floor, max=largest))


def _carry_first_moment(policy: str, M: Tensor, change: BasisChange) -> None:
    if policy == "reset":
        M.zero_()
    elif policy != "keep":
        M.copy_(change.apply(M))


BASE_OPTIMIZERS: dict[str, type[BaseOptimizer]] = {
    "adamw": Adam,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgdm": SGDM,
}


def make_base_optimizer(name: str, betas: tuple[float, float], eps: float) -> BaseOptimizer:
    """Make the optimizer that a user names in ``inner=``.

    Args:
        name: adamw, adafactor, lion or sgdm.
        betas: The method's betas.
        eps: The method's eps.

    Raises:
        ValueError: Unknown name.
    """
    if name not in BASE_OPTIMIZERS:
        raise ValueError(f"inner must be one of {', '.join(BASE_OPTIMIZERS)}, got {name!r}")
    return BASE_OPTIMIZERS[name](betas, eps)
