"""The group key ``write``: how weights of low precision are rounded, and what that needs.

Formulas are in ``kernels/reference/rounding.py``. Weights of float32 and float64, and complex ones,
are written to nearest under every mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ...kernels import LOW_PRECISION_DTYPES
from .._core.rule import Carry, Rule, Slot, Slots
from .._core.validation import check

WRITE_MODES = ("auto", "nearest", "stochastic", "kahan", "eco")
RESIDUAL = "residual"
"""State key of what rounding has cut off, under ``"kahan"``."""
RESIDUAL_SLOT = Slot("mn", dtype=torch.bfloat16)
REFRESH_WRITE = 255
"""Number of the write that a refresh makes, after which those of the update are counted from 0."""


def accumulation_dtype(X: Tensor) -> torch.dtype:
    """The dtype in which a weight is changed before it is rounded: at least float32."""
    return torch.float32 if X.dtype in LOW_PRECISION_DTYPES else X.dtype


def mode_of(group: Mapping[str, Any], p: Tensor) -> str:
    """How a parameter is written: ``"nearest"``, ``"stochastic"``, ``"kahan"`` or ``"eco"``."""
    mode: str = group.get("write") or "auto"
    if is_lazy(p) or p.dtype not in LOW_PRECISION_DTYPES:
        return "nearest"
    if mode != "auto":
        return mode
    return "nearest" if group.get("compat") else "stochastic"


def seed_of(group: Mapping[str, Any]) -> int:
    """The seed of a group's random bits: that of the method, else 0."""
    seed = group.get("seed")
    return seed if type(seed) is int else 0


def with_residuals(slots: Sequence[Slots], writes: Sequence[str]) -> tuple[Slots, ...]:
    """Slots of every member, with a residual where its weight is written by ``"kahan"``."""
    return tuple(
        {**own, RESIDUAL: RESIDUAL_SLOT} if mode == "kahan" else own
        for own, mode in zip(slots, writes, strict=True)
    )


def check_eco(
    group: Mapping[str, Any], rule: Rule | None, adamw_betas: tuple[float, float]
) -> None:
    """Raise under ``write="eco"`` for a momentum that cannot carry what rounding cuts off.

    Args:
        group: A group whose values were checked.
        rule: Its rule; None for an AdamW group.
        adamw_betas: Betas of its AdamW parameters.

    Raises:
        ValueError: With the option that is in the way.
    """
    if group.get("write") != "eco":
        return
    obstacle = None if rule is None else rule.eco_obstacle()
    state_dtype = group.get("state_dtype")
    if obstacle is None and rule is not None and state_dtype in ("int8", "bfloat16"):
        obstacle = f"state_dtype={state_dtype!r}, whose momentum is too coarse for them"
    if obstacle is None and adamw_betas[0] == 0.0:
        obstacle = f"betas {tuple(adamw_betas)} of AdamW, which keep no momentum"
    check(
        obstacle is None,
        f"write='eco' puts rounding errors into the momentum, which does not go with {obstacle}; "
        "choose write='stochastic' or 'kahan'",
    )


def carry_coefficient(
    lr: float | Tensor, decay_factor: float | Tensor, beta: float
) -> float | Tensor:
    """What multiplies T^-1[E] as it goes into the momentum: 0 where the learning rate is 0.

    c = (decay_factor / lr) (1 - 1 / beta) makes the next step undo the error E of this one, at the
    learning rate of this one. Source: arXiv 2601.22101.
    """
    if isinstance(lr, Tensor):
        inverse = torch.where(lr == 0, 0.0, 1.0 / torch.where(lr == 0, 1.0, lr))
        return decay_factor * inverse * (1 - 1 / beta)
    return 0.0 if lr == 0.0 else decay_factor / lr * (1 - 1 / beta)


def carry_error_(
    carry: Carry, error: Tensor, lr: float | Tensor, decay_factor: float | Tensor, ks: slice
) -> None:
    """M <- M + c T^-1[E] for the matrices ``ks``, in place.

    Args:
        carry: The momentum and the inverse of its step.
        error: E (K, m, n) float32, what rounding cut off from all matrices; 0 where it is not
            finite.
        lr: Learning rate of these matrices.
        decay_factor: What multiplied their weights.
        ks: Which matrices.
    """
    c = carry_coefficient(lr, decay_factor, carry.beta)
    if isinstance(c, Tensor):
        c = c.to(error.device, error.dtype)
    elif c == 0.0:
        return
    carry.M[ks].add_(carry.inverse(error[ks], ks).to(carry.M.dtype) * c)


def takes_flags(writes: Sequence[str]) -> bool:
    """Whether flags that arrive late may go into kernels: state of the write is put back else."""
    return not {"kahan", "eco"} & {*writes}
