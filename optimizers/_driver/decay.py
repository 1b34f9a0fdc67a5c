"""Weight decay: the group keys ``cautious``, ``decay_schedule`` and ``decay_lr``.

A weight is multiplied by :meth:`Decay.factor`, everywhere or where the step does not move it away
from zero: in ``write.py`` for rules, in ``adamw.py`` for AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.validation import check
from .write_modes import accumulation_dtype

DECAY_SCHEDULES = ("lr", "lr2", "independent", "corrected")


class Decay(NamedTuple):
    """How weights decay.

    Attributes:
        weight_decay: The decoupled weight decay; a tensor () where a graph replays the step.
        schedule: How it follows the learning rate, a name of ``DECAY_SCHEDULES``.
        lr0: The learning rate to which ``"independent"`` and ``"corrected"`` refer.
        is_cautious: Whether only entries decay which the step does not move away from zero.
    """

    weight_decay: float | Tensor
    schedule: str = "lr"
    lr0: float = 1.0
    is_cautious: bool = False

    @classmethod
    def of(
        cls, group: Mapping[str, Any], weight_decay: float | Tensor, ratio: float | None = None
    ) -> Decay:
        """The decay that a group asks for.

        Args:
            group: The group.
            weight_decay: The weight decay.
            ratio: What multiplies the group's learning rate; None (default): 1.
        """
        lr0 = group.get("decay_lr") or 0.0
        return cls(
            weight_decay,
            group.get("decay_schedule", "lr"),
            lr0 if ratio is None else lr0 * ratio,
            bool(group.get("cautious")),
        )

    @property
    def is_on(self) -> bool:
        """Whether it can be other than 0; the host does not read a tensor."""
        return isinstance(self.weight_decay, Tensor) or self.weight_decay != 0.0

    def scaled_by(self, lr: float | Tensor) -> float | Tensor:
        """What torch would have as weight decay at this learning rate, for the same factor."""
        if self.schedule == "lr" or not self.is_on:
            return self.weight_decay
        if self.schedule == "lr2":
            return lr * self.weight_decay
        if self.lr0 == 0.0:  # the learning rate is 0 then, whatever the schedule
            return 0.0
        power = lr if self.schedule == "corrected" else 1.0
        return power * (self.weight_decay / self.lr0)

    def factor(self, lr: float | Tensor) -> float | Tensor:
        """What a weight is multiplied by where it decays.

        Args:
            lr: The learning rate, a number or a tensor () or (1,).
        """
        if self.schedule == "lr2":
            return 1.0 - lr**2 * self.weight_decay
        return 1.0 - lr * self.scaled_by(lr)


def decays_at(D: Tensor, W: Tensor, sign: float = 1.0) -> Tensor:
    """Where W decays under ``cautious``: D and W do not differ in sign; a zero agrees with both.

    The sign of D is taken first, as a product of two small numbers may be 0.

    Args:
        D: The direction, from which a step subtracts a multiple; not changed.
        W: The weights, of the same shape.
        sign: A number with the sign of that multiple (default: 1).

    Returns:
        A new tensor of 0 and 1, numbers as comparisons in place are many times faster on a CPU.
    """
    agreement = torch.sign(D)
    agreement = agreement.mul_(W) if agreement.dtype == W.dtype else agreement * W
    if sign > 0.0:
        return agreement.ge_(0)
    return agreement.le_(0) if sign < 0.0 else agreement.fill_(1)


def factor_at(mask: Tensor, factor: float | Tensor) -> Tensor:
    """The decay factor where a mask of 0 and 1 is 1, else 1: exactly, and faster than ``where``.

    Args:
        mask: What :func:`decays_at` returned, which is used up.
        factor: A number, or a tensor that broadcasts against it.
    """
    dtype = accumulation_dtype(mask)
    if not isinstance(factor, Tensor):  # filled there: a copy would wait
        factor = torch.full((), factor, dtype=dtype, device=mask.device)
    others = 1 - mask
    return mask.to(dtype).mul_(factor.to(mask.device, dtype)).add_(others)


def masked_factor(W: Tensor, factor: float | Tensor, *masks: Tensor | None) -> float | Tensor:
    """The decay factor, and 1 where a mask is 0.

    Selected by ``where``, not computed, in the accumulation dtype: same bits as a plain number.

    Args:
        W: What is multiplied, for dtype and device.
        factor: A number or a tensor that broadcasts against W.
        *masks: What broadcasts against W; None masks nothing.
    """
    dtype = accumulation_dtype(W)
    for mask in masks:
        if mask is not None:
            if not isinstance(factor, Tensor):  # filled there: a copy would wait
                factor = torch.full((), factor, dtype=dtype, device=W.device)
            factor = factor.to(W.device, dtype)
            factor = torch.where(mask != 0, factor, torch.ones_like(factor))
    return factor


# values -------------------------------------------------------------------------------------------

MAX_INDEPENDENT = 0.01
"""Largest weight decay under ``"independent"``, where a step removes this share of a weight."""
LARGE_INDEPENDENT = 1e-3
"""From this one on there is a warning."""


def store_decay_lr(group: dict[str, Any], full_group: Mapping[str, Any]) -> None:
    """Store the learning rate with which a group is made as its ``decay_lr``, if it gives none.

    Args:
        group: The group, changed in place.
        full_group: The same with all defaults; a tensor in it is read.
    """
    if full_group.get("decay_lr") is None:
        group["decay_lr"] = float(full_group["lr"]) or None  # 0 can be no reference


def check_decay(group: Mapping[str, Any]) -> None:
    """Raise for a weight decay that the schedule of a group makes no sense of.

    Args:
        group: A group whose values were checked.

    Raises:
        ValueError: With the option that is in the way.
    """
    schedule = group.get("decay_schedule")
    if schedule not in ("independent", "corrected"):
        return
    check(
        group.get("decay_lr") is not None,
        f"decay_schedule={schedule!r} divides by decay_lr, but the lr of the group was 0 when it "
        "was made; pass decay_lr",
    )
    for name, decay in _decays_of(group) if schedule == "independent" else ():
        check(
            decay <= MAX_INDEPENDENT,
            f"{name}={decay:g} under decay_schedule='independent' is the share of a weight that "
            f"every step removes, whatever lr is; pass at most {MAX_INDEPENDENT}, such as 1e-4, a "
            "usual lr * weight_decay",
        )


def large_decay(groups: Iterable[Mapping[str, Any]]) -> str | None:
    """The words of a warning about a large decay under ``"independent"``; None for no warning."""
    for group in groups:
        for name, decay in _decays_of(group):
            if group.get("decay_schedule") == "independent" and decay >= LARGE_INDEPENDENT:
                return (
                    f"{name}={decay:g} under decay_schedule='independent' removes this share of a "
                    "weight at every step, whatever lr is; lr * weight_decay is usually about 1e-4"
                )
    return None


def _decays_of(group: Mapping[str, Any]) -> list[tuple[str, float]]:
    decays = [(name, group.get(name)) for name in ("weight_decay", "adamw_weight_decay")]
    return [(name, decay) for name, decay in decays if decay is not None]
