"""What a method is written in: rules, members, slots, directions and their terms.

A rule is the algorithm box of a paper on stacks of matrices. All else (groups, views, sides,
state, missing and bad gradients, learning rate, decay, the write) belongs to the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .terms import (
    AdamFactored,
    Deferred,
    Dense,
    Factored,
    PanelTerm,
    Residual,
    Scaled,
    Selected,
    Term,
    WriteScalars,
)

__all__ = [
    "LOCAL_REDUCTIONS",
    "RULE_CLASSES",
    "AdamFactored",
    "BatchedCall",
    "BlockPosition",
    "Deferred",
    "Dense",
    "Direction",
    "Factored",
    "Member",
    "PanelTerm",
    "Reductions",
    "Residual",
    "Rule",
    "Scalar",
    "Scaled",
    "Selected",
    "Slot",
    "Slots",
    "Steps",
    "Term",
    "WriteScalars",
    "defaults_of",
    "rule_class",
    "settings_of",
]

Scalar = float | Tensor
"""A Python number, or a tensor that broadcasts against (K, m, n)."""


class Slot:
    """One state tensor of a member: its axes, dtype, start value and place.

    Args:
        axes: One letter per dimension. ``m`` and ``n`` are the member's own sides after turning,
            ``1`` is a broadcast axis, any other letter is sized by keyword. Exactly ``"mn"`` is
            stored like the parameter itself; anything else as (k, ...) for a view of k > 1
            matrices and without a leading dimension for one.
        dtype: A dtype, ``"weight"`` for the parameter's own, ``"full"`` for float32 (float64 for
            float64 weights), or None: the group's ``state_dtype``, else as ``"full"``.
        fill: Start value, a number or ``"eye"``.
        device: None for the parameter's device, ``"cpu"`` for pools that stay on the host.
        **sizes: Sizes of the other letters.
    """

    __slots__ = ("axes", "device", "dtype", "fill", "sizes")

    def __init__(
        self,
        axes: str,
        dtype: torch.dtype | str | None = None,
        fill: float | str = 0.0,
        device: str | None = None,
        **sizes: int,
    ) -> None:
        self.axes, self.dtype, self.fill, self.device = axes, dtype, fill, device
        self.sizes = sizes

    def shape(self, m: int, n: int) -> tuple[int, ...]:
        """Sizes of one matrix's tensor for sides m and n."""
        known = {"m": m, "n": n, "1": 1, **self.sizes}
        return tuple(known[axis] for axis in self.axes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and all(
            getattr(self, key) == getattr(other, key) for key in self.__slots__
        )

    def __repr__(self) -> str:
        return f"Slot({self.axes!r}, {self.sizes})"


class Reductions:
    """Sums over the weight's own indices; all of them the identity on one process.

    A rule sends every sum over rows or columns of the weight through here, so that sharded weights
    need no change in a method file.
    """

    def rows(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the rows of the weight."""
        return x

    def cols(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the columns of the weight."""
        return x

    def both(self, x: Tensor) -> Tensor:
        """Complete a partial sum over all entries of the weight."""
        return x

    def on_one_rank(self, fn: Callable[..., Any], *args: Tensor) -> Any:
        """Apply fn to whole small matrices on one rank; every rank gets the result."""
        return fn(*args)

    def on_full_matrix(self, fn: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """Apply fn to the whole weight-shaped matrix and return the local part."""
        return fn(X)


LOCAL_REDUCTIONS = Reductions()


@dataclass(frozen=True)
class Direction:
    """W <- decay_factor * W - lr * lr_factor * sum(terms).

    decay_factor is 1 - lr ** decay_power * weight_decay where ``decay`` is 1, else 1.

    Attributes:
        member: Which member's weight is written.
        terms: Their sum is the step's direction; their order is free.
        lr_factor: A Python number that joins lr in the multiplier.
        decay: None, or a 0/1 tensor that broadcasts against (K, m, n): where decay applies.
        decay_last: Decay after the step, as some published codes do.
        decay_power: The power of lr in decay_factor; 2 lets decay vanish with the schedule.
        torch_bits: Write by torch's own operations, one after the other, whose bits are wanted.
        max_rel_norm: Limit of the step's Frobenius norm relative to the weight's; Dense terms only.
    """

    member: Member
    terms: tuple[Term, ...]
    lr_factor: float = 1.0
    decay: Tensor | None = None
    decay_last: bool = False
    max_rel_norm: float | None = None
    decay_power: int = 1
    torch_bits: bool = False

    @property
    def mT(self) -> Direction:
        """The same step for the transposed weight."""
        return replace(
            self,
            terms=tuple(term.mT for term in self.terms),
            decay=None if self.decay is None else self.decay.mT,
        )


@dataclass(frozen=True)
class BlockPosition:
    """Which block of the optimizer a unit belongs to, see :meth:`Rule.block_labels`.

    Attributes:
        number: Number of the block, from 0.
        count: How many blocks there are.
    """

    number: int = 0
    count: int = 1


class Member:
    """What a rule sees of one role of a unit, stacked over K equal units.

    Attributes:
        grad: (K, m, n), at least float32, sign turned for ``maximize``, read-only; None if this
            member has no gradient (only where a unit has several members).
        state: Slot name -> (K, *axes), changed in place only.
        t: 1-based number of this update of these units.
        refreshed: t of their last refresh, 0 if none.
        is_first_refresh: True inside the first refresh.
        m: Rows of the whole matrix after turning.
        n: Columns of the whole matrix after turning.
        indices: One int per matrix, the key of its random draws.
        state_since: The update since which these units keep their state, 0 if they keep none.
        number: Which member of the unit this is.
        transposed: Whether the driver transposed the weight. Formulas never ask; only code that
            must repeat the roundings and signs of a published factorisation does.
        reductions: Sums over the weight's indices.
        finite: None, or flags (K,) float32 on the device, 0 where a gradient is not finite: only
            rules with ``handles_nonfinite`` see flags. State of such a matrix must stay as it is.
    """

    __slots__ = (
        "_load",
        "_store",
        "finite",
        "grad",
        "indices",
        "is_first_refresh",
        "m",
        "n",
        "number",
        "reductions",
        "refreshed",
        "state",
        "state_since",
        "t",
        "transposed",
    )

    def __init__(
        self,
        grad: Tensor | None,
        load: Callable[[], Tensor],
        state: Mapping[str, Tensor],
        *,
        t: int,
        refreshed: int,
        m: int,
        n: int,
        indices: tuple[int, ...],
        state_since: int = 1,
        number: int = 0,
        transposed: bool = False,
        reductions: Reductions = LOCAL_REDUCTIONS,
        store: Callable[[Tensor], None] | None = None,
        finite: Tensor | None = None,
    ) -> None:
        self.finite = finite
        self.grad, self._load, self._store, self.state = grad, load, store, state
        self.t, self.refreshed, self.is_first_refresh = t, refreshed, False
        self.m, self.n, self.indices, self.reductions = m, n, indices, reductions
        self.state_since, self.number, self.transposed = state_since, number, transposed

    @property
    def value(self) -> Tensor:
        """The weights (K, m, n) in their own dtype, as they are now.

        A copy for a stack of several units, the weight itself for a single one.
        """
        return self._load()

    def write_back(self, W: Tensor) -> None:
        """Make W, which ``value`` gave, the weights: for rules with ``writes_in_refresh``.

        A view is the weight already; what had to be copied is put back.
        """
        if self._store is not None:
            self._store(W)

    def where_finite(self, new: Tensor, old: Tensor | float) -> Tensor:
        """New state (K, ...), but the old one of matrices whose flag in ``finite`` is 0."""
        if self.finite is None:
            return new
        return torch.where(self.finite.view(-1, *[1] * (new.dim() - 1)) != 0, new, old)

    @property
    def age(self) -> int:
        """Updates since the last refresh, 0 in the refreshing step."""
        return self.t - self.refreshed

    def step(
        self,
        *terms: Term,
        lr_factor: float = 1.0,
        decay: Tensor | None = None,
        decay_last: bool = False,
        max_rel_norm: float | None = None,
        decay_power: int = 1,
        torch_bits: bool = False,
    ) -> Direction:
        """Make a Direction for this member."""
        return Direction(
            self, terms, lr_factor, decay, decay_last, max_rel_norm, decay_power, torch_bits
        )


@dataclass(frozen=True)
class BatchedCall:
    """What an update yields to have small tensors worked on for many equal units in one call.

    Attributes:
        fn: Of stacks (K, ...); returns tensors (K, ...), which are what the ``yield`` returns.
            It knows no unit: the same function of the rule for all.
        args: Its arguments, one row for each matrix of this unit.
    """

    fn: Callable[..., Sequence[Tensor]]
    args: tuple[Tensor, ...]


Steps = Generator[Direction | BatchedCall, Any, None]
"""What ``update`` is as a generator: Directions to be written, and requests."""
Slots = Mapping[str, Slot]

RULE_CLASSES: dict[str, type[Rule]] = {}
"""Every rule by its method's name: what the group key ``rule`` may say."""


@dataclass(frozen=True)
class Rule:
    """A method: frozen fields are its hyper-parameters, ``update`` is the paper's box.

    A rule stores nothing on itself, never modifies a gradient, changes state in place only, and
    draws no global random number. Fields are plain values; ``__post_init__`` checks them.
    """

    members: ClassVar[tuple[str, ...]] = ("W",)
    """Roles of a unit's parameters; a group's flat list is cut into runs of this length.

    A property may make them depend on fields. Empty: all matrices of a group are one unit.
    """
    refresh_offset: ClassVar[int] = 0
    """0 refreshes at updates 1, T+1, 2T+1, ...; 1 at updates 1, T, 2T, ..."""
    writes_in_refresh: ClassVar[bool] = False
    """Whether ``refresh`` changes weights in place; such units are never stacked."""
    yields_batched_calls: ClassVar[bool] = False
    """Whether ``update`` yields :class:`BatchedCall`: equal units should run side by side."""
    handles_nonfinite: ClassVar[bool] = False
    """Whether ``update`` may see gradients that are narrow or not finite.

    It may if all that it does to state goes through operations that are told ``finite``, or
    through ``Member.where_finite``. Where the host does not wait for the flags the driver copies
    nothing then.
    """
    refresh_in_lockstep: ClassVar[bool] = False
    """Whether refreshes of all units belong to the same update, so that none can be shifted."""

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if abstract:  # what several methods share is no method
            return
        known = RULE_CLASSES.setdefault(cls.method(), cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a rule called {cls.method()!r} exists in {known.__module__}; choose another name"
            )
        RULE_CLASSES[cls.method()] = cls  # the same definition run again, as in a notebook

    @classmethod
    def method(cls) -> str:
        """The method's name: the class name without a closing "Rule"."""
        return cls.__name__.removesuffix("Rule")

    @property
    def refresh_interval(self) -> int:
        """Updates between refreshes; 0 for a rule that has none."""
        return 0

    def refresh_due(self, t: int, refreshed: int, shift: int = 0) -> bool:
        """Whether update t begins with a refresh; all but the first come `shift` updates early."""
        T = self.refresh_interval
        return bool(T) and (refreshed == 0 or (t - 1 + self.refresh_offset + shift) % T == 0)

    def transpose(self, m: int, n: int) -> bool:
        """Whether the driver turns an m x n member over before this rule sees it."""
        return False

    def transposed_members(self, sides: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
        """``transpose`` of every member of a unit, for rules whose members must agree on a side."""
        return tuple(self.transpose(m, n) for m, n in sides)

    def state(self, *sides: Any) -> Any:
        """Slots of each member: ``state(m, n)`` for one, ``state((m, n), ...)`` for several."""
        return {} if len(self.members) == 1 else tuple({} for _ in self.members)

    def slots(self, sides: tuple[tuple[int, int], ...]) -> tuple[Slots, ...]:
        """``state`` in one form for any number of members."""
        if len(sides) == 1:
            return (self.state(*sides[0]),)
        return tuple(self.state(*sides))

    def refresh(self, *members: Any, **unused: Any) -> None:
        """Rare and eager: may factorise and wait for the device. Never sees a bad or zero G."""

    def update(self, *members: Any, **unused: Any) -> Direction | Iterable[Direction] | Steps:
        """Return or yield Directions; each is written before the next is asked for."""
        raise NotImplementedError

    def block_labels(self, names: Sequence[str | None]) -> Sequence[Hashable]:
        """A label for every parameter of a group, by which `state_since_at` tells blocks apart.

        Parameters of equal label are one block, also in several groups; None is a block of its own.
        """
        return [None] * len(names)

    def state_since_at(self, position: BlockPosition, t: int) -> int:
        """The update since which the unit keeps the state that it has at update t; 0: it has none.

        State is dropped where this is 0, and starts anew after it.
        """
        return 1

    def adamw_order(self) -> tuple[bool, float] | None:
        """None for torch's AdamW beside this rule; else (correct_bias, eps) of GaLore's order."""
        return None

    @classmethod
    def complete_saved(cls, group: dict[str, Any]) -> None:
        """Add what a saved group lacks and meant otherwise than today's default, in place."""

    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        """Bytes beside the state that all weights of a device share, by what they are."""
        return {}

    def splits(self, m: int, n: int) -> frozenset[str]:
        """Dimensions along which shards are exact because every sum goes through ``reductions``."""
        return frozenset()


def rule_class(name: str) -> type[Rule]:
    """The rule class that a group's ``rule`` names."""
    if name not in RULE_CLASSES:
        raise ValueError(
            f"group key 'rule' must be 'adamw' or one of {', '.join(sorted(RULE_CLASSES))}, "
            f"got {name!r}"
        )
    return RULE_CLASSES[name]


def defaults_of(cls: type[Rule]) -> dict[str, Any]:
    """Group keys of a rule with their defaults."""
    return {f.name: f.default for f in fields(cls)}


def settings_of(rule: Rule) -> dict[str, Any]:
    """A rule's fields as group values."""
    return {f.name: getattr(rule, f.name) for f in fields(rule)}
