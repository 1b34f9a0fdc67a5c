"""What a way to divide a gradient in two is, and what moves the part that needs no state."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from .._core.rule import Member, Slot, Term
from .._toolkit.base_optimizers import BaseOptimizer
from .._toolkit.moments import column_squares, total
from .._toolkit.random_keys import StackRNG

STATE_FREE_KINDS = ("sign_sgd", "sgd", "no")
ALL = slice(None)


@dataclass(frozen=True)
class StateFreeUpdate:
    """A direction that needs no state: the sign of X, X itself, or zero; times `scale`.

    Attributes:
        kind: ``"sign_sgd"``, ``"sgd"`` or ``"no"``.
        scale: Multiplies it.
        floor: None, or (K, 1, 1): an entry up to it in magnitude has the sign 0.
    """

    kind: str
    scale: float = 1.0
    floor: Tensor | None = None

    def __call__(self, X: Tensor, ks: slice = ALL, out: Tensor | None = None) -> Tensor:
        """Of X (K, m, n), rows of the matrices `ks`: a new tensor, or `out`."""
        if self.kind == "no":
            return torch.zeros_like(X) if out is None else out.zero_()
        if self.kind == "sgd":
            return torch.mul(X, self.scale, out=out)
        U = torch.sign(X, out=out)
        if self.floor is not None:
            U.mul_(X.abs() > self.floor[ks])
        return U if self.scale == 1.0 else U.mul_(self.scale)


def make_state_free(w: Member, kind: str, scale: float, threshold: float) -> StateFreeUpdate:
    """A state-free rule; signs up to `threshold` times G's root mean square are 0."""
    if threshold == 0.0 or kind != "sign_sgd":
        return StateFreeUpdate(kind, scale)
    assert w.grad is not None
    squares = w.reductions.both(total(column_squares(w.grad)))
    return StateFreeUpdate(kind, scale, squares.div_(w.m * w.n).sqrt_().mul_(threshold))


@dataclass(frozen=True)
class GradientSplit:
    """How a gradient is divided: what every kind can do, for stacks (K, m, n)."""

    handles_nonfinite: ClassVar[tuple[str, ...]] = ()
    """With which inner optimizers all that moves takes flags; see :class:`Rule`."""

    def transpose(self, m: int, n: int) -> bool:
        """Whether an m x n weight is turned first."""
        return False

    def slots(self, m: int, n: int, base_optimizer: BaseOptimizer) -> dict[str, Slot]:
        """What tells the chosen part, and inner's state of it; empty if none is chosen."""
        raise NotImplementedError

    def shared(self, m: int) -> Mapping[Hashable, int]:
        """Bytes of what all weights with as many rows share, by what it is."""
        return {}

    def reselect(
        self, w: Member, rng: StackRNG, base_optimizer: BaseOptimizer, policy: str
    ) -> None:
        """Choose anew, and take inner's state along: zeroed, left in place or moved."""

    def terms(
        self, w: Member, base_optimizer: BaseOptimizer, t: int, state_free: StateFreeUpdate
    ) -> tuple[Term, ...]:
        """Inner's direction of the chosen part at its update t, and what is free of the rest."""
        raise NotImplementedError


def slots_if_any(c: int, share: float, m: int, n: int, slots: dict[str, Slot]) -> dict[str, Slot]:
    """The slots, or none where nothing is chosen."""
    if c == 0 and share > 0:
        warn_rounds_to_zero(share, f"a {m} x {n} weight")
    return slots if c else {}


def resolve_count(share: float, length: int) -> int:
    """A count as it is, a part to the nearest number, halves to even."""
    return min(share, length) if isinstance(share, int) else round(share * length)


@lru_cache(maxsize=1024)
def warn_rounds_to_zero(share: float, what: str) -> None:
    """Point out, once, that a share which is not 0 is rounded to nothing."""
    warnings.warn(
        f"density {share} of {what} rounds to nothing, so all of it moves by the state-free rule; "
        "raise density to change that",
        stacklevel=2,
    )
