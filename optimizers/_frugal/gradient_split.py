"""Base class of FRUGAL's gradient splits, and the state-free update (sign, SGD or none)."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels import fuses_passes
from .._core.rule import Member, Slot, Term
from .._toolkit.base_optimizers import BaseOptimizer
from .._toolkit.moments import column_squares, safe_square_scale, total
from .._toolkit.random_keys import StackRNG
from .._toolkit.row_rules import in_range

STATE_FREE_KINDS = ("sign_sgd", "sgd", "no")
ALL = slice(None)


@dataclass(frozen=True)
class StateFreeUpdate:
    """A direction that needs no state: the sign of X, X itself, or zero; times ``scale``.

    Attributes:
        kind: ``"sign_sgd"``, ``"sgd"`` or ``"no"``.
        scale: Multiplies the direction.
        floor: None, or (K, 1, 1): entries of at most this magnitude have the sign 0.
    """

    kind: str
    scale: float = 1.0
    floor: Tensor | None = None

    def __call__(self, X: Tensor, ks: slice = ALL, out: Tensor | None = None) -> Tensor:
        """The direction of X (K, m, n), rows of the matrices ``ks``: a new tensor, or ``out``."""
        if self.kind == "no":
            return torch.zeros_like(X) if out is None else out.zero_()
        if self.kind == "sgd":
            return torch.mul(X, self.scale, out=out)
        U = torch.sign(X, out=out)
        if self.floor is not None:
            U.mul_(X.abs() > self.floor[ks])
        return U if self.scale == 1.0 else U.mul_(self.scale)


SAFE_SQUARES = (1e-22, 1e30)
"""Between them a sum of squares has neither overflowed nor lost bits. Beyond them an accelerator,
which would have to wait for the answer, takes all signs as they are, or none."""


def make_state_free(w: Member, kind: str, scale: float, threshold: float) -> StateFreeUpdate:
    """Make a state-free update; up to ``threshold`` times G's root mean square signs are 0."""
    if threshold == 0.0 or kind != "sign_sgd":
        return StateFreeUpdate(kind, scale)
    assert w.grad is not None
    squares, c = w.reductions.both(total(column_squares(w.grad))), None
    reads_sizes = w.grad.device.type == "cpu" and not fuses_passes(w.grad)
    if reads_sizes and not in_range(squares, *SAFE_SQUARES):
        c = safe_square_scale(w.grad, w.reductions)
        squares = w.reductions.both(total(column_squares(w.grad * c)))
    floor = squares.div_(w.m * w.n).sqrt_().mul_(threshold)
    floor = floor if c is None else floor.div_(c)
    return StateFreeUpdate(kind, scale, floor)


@dataclass(frozen=True)
class GradientSplit:
    """Base class: which part of a gradient (K, m, n) is state-full, and the terms of both parts."""

    handles_nonfinite: ClassVar[tuple[str, ...]] = ()
    """Base optimizers with which every state update takes ``finite``; see :class:`Rule`."""

    @property
    def splits(self) -> frozenset[str]:
        """Sides of the weight that may be cut, see :attr:`Rule.splits`."""
        return frozenset()

    def transpose(self, m: int, n: int) -> bool:
        """Whether an m x n weight is transposed first."""
        return False

    def slots(self, m: int, n: int, base_optimizer: BaseOptimizer) -> dict[str, Slot]:
        """Slots of the choice and of the base optimizer's state; empty if nothing is chosen."""
        raise NotImplementedError

    def shared(self, m: int) -> Mapping[Hashable, int]:
        """Bytes of what all weights with m rows share, by name of the shared thing."""
        return {}

    def reselect(
        self, w: Member, rng: StackRNG, base_optimizer: BaseOptimizer, policy: str
    ) -> None:
        """Choose another part, and carry the base optimizer's state by ``policy``."""

    def terms(
        self, w: Member, base_optimizer: BaseOptimizer, t: int | Tensor, state_free: StateFreeUpdate
    ) -> tuple[Term, ...]:
        """The base optimizer's direction of the chosen part at its update t, and the rest's."""
        raise NotImplementedError


def slots_if_any(c: int, share: float, m: int, n: int, slots: dict[str, Slot]) -> dict[str, Slot]:
    """The slots, or none where the count c is 0; warns if ``share`` asked for some."""
    if c == 0 and share > 0:
        warn_rounds_to_zero(share, f"a {m} x {n} weight")
    return slots if c else {}


def resolve_count(share: float, length: int) -> int:
    """Turn a share of ``length`` into a count: an int stays, a part is rounded, halves to even."""
    return min(share, length) if isinstance(share, int) else round(share * length)


@lru_cache(maxsize=1024)
def warn_rounds_to_zero(share: float, what: str) -> None:
    """Warn once that a share which is not 0 rounds to nothing."""
    warnings.warn(
        f"density {share} of {what} rounds to nothing, so all of it moves by the state-free rule; "
        "raise density to change that",
        stacklevel=2,
    )
