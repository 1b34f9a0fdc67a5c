"""What a method is written in: rules, members, slots, directions and their terms.

A rule is the algorithm box of a paper on stacks of matrices. Everything else (groups, views, sides,
state, missing and bad gradients, learning rate, decay, the write) belongs to the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...kernels import Rounding
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
from .validation import shown

__all__ = [
    "LOCAL_REDUCTIONS",
    "RULE_CLASSES",
    "AdamFactored",
    "BatchedCall",
    "BlockPosition",
    "Carry",
    "Deferred",
    "Dense",
    "Direction",
    "Factored",
    "Member",
    "PanelTerm",
    "Reductions",
    "Residual",
    "RowNorms",
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
    "functions_of",
    "rule_class",
    "settings_of",
]

Scalar = float | Tensor
"""A Python number, or a tensor that broadcasts against (K, m, n)."""


class Slot:
    """One state tensor of a member: its axes, dtype, start value and device.

    Args:
        axes: One letter per dimension. ``m`` and ``n`` are the sides of the matrix as the rule
            sees it, ``1`` is a broadcast axis, any other letter is sized by keyword. ``"mn"`` is
            stored in the parameter's own shape; other axes are stored as (k, ...) for a view of
            k > 1 matrices and without a leading dimension for one matrix.
        dtype: A dtype, ``"weight"`` for the parameter's own, ``"full"`` for float32 (float64 for
            float64 weights), or None (default): the group's ``state_dtype``, else as ``"full"``.
        fill: Start value, a number or ``"eye"`` (default: 0).
        device: None (default) for the parameter's device, ``"cpu"`` for pools that stay on the
            host.
        **sizes: Sizes of the other letters.

    Attributes:
        lies_as_weight: Whether one large (r, n) of a transposed weight lies in memory column by
            column, as the weight does (default: False).
    """

    __slots__ = ("axes", "device", "dtype", "fill", "lies_as_weight", "sizes")

    def __init__(
        self,
        axes: str,
        dtype: torch.dtype | str | None = None,
        fill: float | str = 0.0,
        device: str | None = None,
        **sizes: int,
    ) -> None:
        self.axes, self.dtype, self.fill, self.device = axes, dtype, fill, device
        self.sizes, self.lies_as_weight = sizes, False

    def shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of the tensor of one m x n matrix."""
        known = {"m": m, "n": n, "1": 1, **self.sizes}
        return tuple(known[axis] for axis in self.axes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and all(
            getattr(self, key) == getattr(other, key) for key in self.__slots__
        )

    def __repr__(self) -> str:
        return f"Slot({self.axes!r}, {self.sizes})"

    def __setstate__(self, state: tuple[None, dict[str, object]]) -> None:
        self.lies_as_weight = False  # a pickle of before does not know of it
        for key, value in state[1].items():
            setattr(self, key, value)


class Reductions:
    """Sums and maxima over the weight's own indices; on one process each is the identity.

    A rule sends every sum over rows or columns of the weight through this class, so that a method
    file stays as it is when weights are sharded. Element counts are not sums: a rule takes them
    from ``Member.m`` and ``Member.n``, never from the sizes of its tensors.

    Attributes:
        has_whole_rows: Whether every row lies whole on one process, so that what is done to rows
            one by one needs no others.
        is_whole: Whether all of the weight lies on one process.
    """

    has_whole_rows: bool = True
    is_whole: bool = True

    def rows(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the rows of the weight."""
        return x

    def cols(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the columns of the weight."""
        return x

    def both(self, x: Tensor) -> Tensor:
        """Complete a partial sum over all entries of the weight."""
        return x

    def most(self, x: Tensor) -> Tensor:
        """Complete a maximum over all entries of the weight.

        Needed before a sum of scaled entries: shards that each scale by a maximum of their own add
        numbers of different units.
        """
        return x

    def sums_together(self, *parts: tuple[Reductions, Tensor]) -> tuple[Tensor, ...]:
        """Complete partial sums of one or several members of a unit, by one call.

        Args:
            *parts: The reductions of a member, and what is a sum over the side along which that
                member may be cut. All have one dtype.
        """
        return tuple(x for _, x in parts)

    def most_together(self, *parts: tuple[Reductions, Tensor]) -> tuple[Tensor, ...]:
        """The same for maxima."""
        return tuple(x for _, x in parts)

    def on_one_rank(self, fn: Callable[..., Any], *args: Tensor) -> Any:
        """Apply fn to small matrices that all ranks have whole, on one; all get the result."""
        return fn(*args)

    def on_full_matrix(
        self, fn: Callable[..., Tensor], X: Tensor, *per_matrix: Sequence[Any] | Tensor
    ) -> Tensor:
        """Apply fn to the whole matrices of X and return the local part of the result.

        A stack may be divided among ranks, so fn must be right for any of its matrices, on any
        rank: it closes over nothing that belongs to one matrix, and over no state.

        Args:
            fn: Maps whole matrices (j, m, n), and the entries of ``per_matrix`` that belong to
                them, to a tensor of the same shape.
            X: (K, m, n), laid out like the weight.
            *per_matrix: Lists or tensors with one entry for each of the K matrices, equal on all
                ranks.
        """
        return fn(X, *per_matrix)

    def from_full_matrix(self, fn: Callable[..., Any], X: Tensor, *small: Tensor) -> Any:
        """Apply fn to the whole stack X on one rank; every rank gets the whole result.

        For what is found from a matrix but not laid out like it, such as a basis. A stack is not
        divided, so fn may close over what belongs to one matrix.

        Args:
            fn: Maps X and ``small``, which it does not change, to a tensor or a tuple of tensors.
            X: (K, m, n), laid out like the weight.
            *small: Tensors that all ranks have whole.
        """
        return fn(X, *small)


LOCAL_REDUCTIONS = Reductions()


class Carry(NamedTuple):
    """A momentum that can carry what rounding cuts off from the weight, for ``write="eco"``.

    Attributes:
        M: (K, m, n), changed in place.
        beta: Its decay.
        inverse: T^-1, given errors (k, m, n) and which matrices they are of: the change of M that
            changes the step by these.
    """

    M: Tensor
    beta: float
    inverse: Callable[[Tensor, slice], Tensor]


class RowNorms(NamedTuple):
    """W = g v / |v|, row by row: the step moves v, and g is moved beside it.

    Attributes:
        g: (K, m, 1), norms of the rows of W, changed in place as the step is written.
        v: (K, m, 1), norms of the rows of v, likewise.
        change: (K, m, 1), what lr times is subtracted from g before decay.
    """

    g: Tensor
    v: Tensor
    change: Tensor


@dataclass(frozen=True)
class Direction:
    """W <- decay_factor * W - lr * lr_factor * sum(terms).

    decay_factor is 1 where ``decay`` is 0, and else what the group says, 1 - lr * weight_decay.

    Attributes:
        member: The member whose weight is written.
        terms: Parts of the direction, in any order.
        lr_factor: A Python number that multiplies lr, so that the update needs no pass for it.
        decay: None, or a 0/1 tensor that broadcasts against (K, m, n): where decay applies.
        decay_last: Whether decay comes after the step, as in some published codes.
        max_rel_norm: Limit of the step's Frobenius norm relative to the weight's; Dense terms only.
        torch_bits: Whether the write must round as torch's own operations, one after the other.
        carry: None, or the momentum that takes rounding errors where ``write`` is ``"eco"``.
        row_norms: None, or norms that W has beside its directions: decay is theirs then.
    """

    member: Member
    terms: tuple[Term, ...]
    lr_factor: float = 1.0
    decay: Tensor | None = None
    decay_last: bool = False
    max_rel_norm: float | None = None
    torch_bits: bool = False
    carry: Carry | None = None
    row_norms: RowNorms | None = None

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
    """The block of the optimizer to which a unit belongs, see :meth:`Rule.block_labels`.

    Attributes:
        number: Number of the block, from 0.
        count: Number of blocks.
    """

    number: int = 0
    count: int = 1


class Member:
    """What a rule sees of one role of a unit, stacked over K equal units.

    Attributes:
        grad: (K, m, n), at least float32, negated for ``maximize``, read-only; None if this member
            has no gradient (only where a unit has several members).
        state: Slot name -> (K, *axes), changed in place only.
        t: Number of this update of the K units, counted from 1.
        refreshed: t of their last refresh, 0 if there was none.
        is_first_refresh: True inside the first refresh.
        m: Rows of the whole matrix as the rule sees it, also where ``grad`` is a shard.
        n: Columns of the whole matrix as the rule sees it.
        indices: One int per matrix, the key of its random draws.
        state_since: The update since which these units keep their state, 0 if they keep none.
        number: Position of the member in its unit.
        transposed: Whether the driver transposed the weight. Formulas never ask; only code that
            must repeat the roundings and signs of a published factorization does.
        reductions: Completes sums over the weight's indices.
        finite: None, or flags (K,) float32 on the device, 0 where a gradient is not finite: only
            rules with ``handles_nonfinite`` see flags. State of such a matrix must stay as it is.
        rounding: How ``refresh`` rounds weights that it writes; None: to nearest.
        carries_errors: Whether ``write`` is ``"eco"``, so that a Direction needs a :class:`Carry`.
        clocks: None, or under ``capturable`` what :meth:`count` returns: t, and age + 1.
        squares: None, or the squared norms (K, 1, n) of the columns of ``grad``, where the driver
            has them.
    """

    __slots__ = (
        "_load",
        "_store",
        "carries_errors",
        "clocks",
        "finite",
        "grad",
        "indices",
        "is_first_refresh",
        "m",
        "n",
        "number",
        "reductions",
        "refreshed",
        "rounding",
        "squares",
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
        rounding: Rounding | None = None,
        carries_errors: bool = False,
        clocks: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.clocks = clocks
        self.squares: Tensor | None = None
        self.finite, self.rounding, self.carries_errors = finite, rounding, carries_errors
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
        """Store the changed W that ``value`` returned; for rules with ``writes_in_refresh``.

        Does nothing where W is a view of the weight, copies where W is a copy.
        """
        if self._store is not None:
            self._store(W)

    def where_finite(self, new: Tensor, old: Tensor | float) -> Tensor:
        """``new`` (K, ...), with ``old`` in the matrices whose flag in ``finite`` is 0."""
        if self.finite is None:
            return new
        return torch.where(self.finite.view(-1, *[1] * (new.dim() - 1)) != 0, new, old)

    @property
    def age(self) -> int:
        """Updates since the last refresh, 0 in the refreshing step."""
        return self.t - self.refreshed

    def count(self, since_refresh: bool = False) -> int | Tensor:
        """Number of this update for formulas: t, or age + 1; (1, 1, 1) float32 on the device.

        It is a tensor under ``capturable``, where a graph replays the step: see
        :meth:`Rule.capture_obstacle`.
        """
        if self.clocks is not None:
            return self.clocks[since_refresh]
        return self.age + 1 if since_refresh else self.t

    def step(
        self,
        *terms: Term,
        lr_factor: float = 1.0,
        decay: Tensor | None = None,
        decay_last: bool = False,
        max_rel_norm: float | None = None,
        torch_bits: bool = False,
        carry: Carry | None = None,
        row_norms: RowNorms | None = None,
    ) -> Direction:
        """Return a :class:`Direction` for this member; the arguments are its attributes."""
        last = (torch_bits, carry, row_norms)
        return Direction(self, terms, lr_factor, decay, decay_last, max_rel_norm, *last)


@dataclass(frozen=True)
class BatchedCall:
    """A request that an update yields: one call of ``fn`` for the small tensors of many units.

    Attributes:
        fn: Maps stacks (K, ...) to stacks (K, ...). The ``yield`` returns this unit's rows of the
            results. All units pass the same function, so it must not depend on a unit.
        args: Arguments of ``fn``, one row for each matrix of this unit.
    """

    fn: Callable[..., Sequence[Tensor]]
    args: tuple[Tensor, ...]


Steps = Generator[Direction | BatchedCall, Any, None]
"""Type of an ``update`` that is a generator of Directions to write and of requests."""
Slots = Mapping[str, Slot]

RULE_CLASSES: dict[str, type[Rule]] = {}
"""Rule classes by method name; the keys are the values of the group key ``rule``."""


@dataclass(frozen=True)
class Rule:
    """A method: frozen fields are its hyper-parameters, ``update`` is the paper's box.

    A rule stores nothing on itself, never modifies a gradient, changes state in place only, and
    draws no global random number. Fields are plain values; ``__post_init__`` checks them.
    """

    members: ClassVar[tuple[str, ...]] = ("W",)
    """Set to the roles of the parameters that are updated together, e.g. ``("A", "B")``.

    The flat list of a group is cut into runs of this length. A property may derive the roles from
    fields; an empty tuple makes all matrices of a group one unit.
    """
    refresh_offset: ClassVar[int] = 0
    """Set to 1 if the published method counts its refreshes from 1.

    With T = ``refresh_interval``, 0 refreshes at updates 1, T+1, 2T+1, ..., 1 at 1, T, 2T, ...
    """
    writes_in_refresh: ClassVar[bool] = False
    """Set True if ``refresh`` changes weights in place. The driver then never stacks the units."""
    needs_own_strides: ClassVar[bool] = False
    """Set True if bits depend on how a weight lies in memory: only contiguous ones are stacked."""
    yields_batched_calls: ClassVar[bool] = False
    """Set True if ``update`` yields :class:`BatchedCall`.

    The driver then runs equal units together: all up to the first request, which is answered in
    one call, then all up to the second.
    """
    handles_nonfinite: ClassVar[bool] = False
    """Set True if every state update passes ``finite`` to its kernel or uses ``where_finite``.

    The driver then need not back up state on devices, and the gradient that ``update`` sees may be
    narrower than float32 and not finite.
    """
    reads_squares: ClassVar[bool] = False
    """Set True if ``update`` reads ``Member.squares``, of a rule with one member.

    On a CPU they are then what tells whether a gradient is finite, so that it is read once.
    """
    optional_state: ClassVar[frozenset[str]] = frozenset()
    """Names of slots that a checkpoint may lack: the optimizer fills them after the load."""
    spare_state: ClassVar[frozenset[str]] = frozenset()
    """Names of state that older files hold though nothing reads it: a load leaves it out."""
    bases: ClassVar[frozenset[str]] = frozenset()
    """Names of slots (m, r) of orthonormal columns that ``refresh`` alone changes.

    They are kept in 8 bits under ``state_dtype="int8"``.
    """
    splits: ClassVar[frozenset[str]] = frozenset()
    """Set to the dimensions, of "rows" and "cols", along which weights may be cut over ranks.

    Shards along these give the update of the whole weight, since every sum goes through
    ``Member.reductions``. The dimensions are those of the matrix as the rule sees it. A property
    where a field needs more than shards can give; weights cut otherwise, and those whose step
    needs a :class:`Carry`, travel to one rank.
    """
    needs_full_matrix: ClassVar[bool] = False
    """Set True if ordinary updates call ``Reductions.on_full_matrix``, so that matrices travel."""
    refresh_in_lockstep: ClassVar[bool] = False
    """Set True if all units must refresh in the same update. ``stagger=True`` is refused then."""

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if abstract:  # a base class that several methods share has no name of its own
            return
        known = RULE_CLASSES.setdefault(cls.method(), cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a rule called {cls.method()!r} exists in {known.__module__}; choose another name"
            )
        RULE_CLASSES[cls.method()] = cls  # the same definition run again, as in a notebook

    @classmethod
    def method(cls) -> str:
        """The method's name, the value of the group key ``rule``: the class name less "Rule"."""
        return cls.__name__.removesuffix("Rule")

    @property
    def refresh_interval(self) -> int:
        """Updates between refreshes, T; 0 (default) if the rule has no ``refresh``."""
        return 0

    def refresh_due(self, t: int, refreshed: int, shift: int = 0) -> bool:
        """Whether update t begins with a refresh.

        Args:
            t: Number of the update, from 1.
            refreshed: t of the unit's last refresh, 0 if there was none.
            shift: Updates by which all refreshes but the first come early (default: 0).
        """
        T = self.refresh_interval
        return bool(T) and (refreshed == 0 or (t - 1 + self.refresh_offset + shift) % T == 0)

    def splits_of(self, number: int) -> frozenset[str]:
        """``splits`` of one member, for rules whose members are cut along different sides."""
        return self.splits

    def transpose(self, m: int, n: int) -> bool:
        """Whether the driver transposes an m x n member before this rule sees it."""
        return False

    def transposed_members(self, sides: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
        """``transpose`` of every member of a unit, for rules whose members must agree on a side."""
        return tuple(self.transpose(m, n) for m, n in sides)

    def check_members(self, sizes: Sequence[tuple[int, int, int]]) -> None:
        """Raise ValueError, without their names, for members that do not belong together.

        Args:
            sizes: Per member the number of its matrices, and their rows and columns.
        """

    def state(self, *sides: Any) -> Any:
        """Slots by name: ``state(m, n)`` for one member, ``state((m, n), ...)`` for several.

        Must depend on shapes and fields only: all ranks and ``init_state`` allocate from the slots.
        """
        return {} if len(self.members) == 1 else tuple({} for _ in self.members)

    def slots(self, sides: tuple[tuple[int, int], ...]) -> tuple[Slots, ...]:
        """Slots of every member, whatever their number."""
        if len(sides) == 1:
            return (self.state(*sides[0]),)
        return tuple(self.state(*sides))

    def index_counts(self, sides: tuple[tuple[int, int], ...]) -> Mapping[str, int]:
        """Slots that number distinct things, such as rows, with how many things there are.

        A checkpoint whose numbers are too large, or name a thing twice, is refused.

        Args:
            sides: Rows and columns of every member as the rule sees it.
        """
        return {}

    def refresh(self, *members: Any, **unused: Any) -> None:
        """Recompute what lasts for a window, such as a basis.

        May factorize and wait for the device. Never called on a zero or non-finite gradient.
        """

    def update(self, *members: Any, **unused: Any) -> Direction | Iterable[Direction] | Steps:
        """Return or yield Directions; each is written before the next is asked for."""
        raise NotImplementedError

    def block_labels(self, names: Sequence[str | None]) -> Sequence[Hashable]:
        """A label for every parameter of a group; ``state_since_at`` works on blocks of labels.

        Parameters of equal label are one block, in other groups too; each None is its own block.
        """
        return [None] * len(names)

    def state_since_at(self, position: BlockPosition, t: int) -> int:
        """The update since which a unit keeps the state that it has at update t, 0 for no state.

        Override it to keep state in some windows only: the driver drops the state where this is 0
        and allocates it afresh afterwards.
        """
        return 1

    def adamw_order(self) -> tuple[bool, float] | None:
        """The order of AdamW's step for other parameters: None for torch's order.

        (correct_bias, eps) asks for the order of GaLore's published code.
        """
        return None

    def eco_obstacle(self) -> str | None:
        """Why no momentum of this rule can carry rounding errors; None if its Direction has one.

        The words follow "does not go with".
        """
        return f"{self.method()}, whose state holds no momentum of the weight itself"

    def capture_obstacle(self) -> str | None:
        """Why no CUDA graph can replay an update without a refresh; None if one can.

        Then ``update`` takes its number from :meth:`Member.count` and nowhere else, and decides
        nothing by it. The words follow "is not supported by".
        """
        return f"{self.method()}, whose update depends on its number"

    def weight_norm_obstacle(self) -> str | None:
        """Why ``weight_norm`` cannot steer the weights of this rule; None if it can.

        The words follow "does not go with".
        """
        if {"A", "B"} <= {*self.members}:
            return f"{self.method()}, whose factors are not the weight"
        if self.writes_in_refresh:
            return f"{self.method()}, which writes weights at a refresh too"
        compat = getattr(self, "compat", None)
        return f"compat={compat!r}, which repeats published arithmetic" if compat else None

    @classmethod
    def complete_saved(cls, group: dict[str, Any]) -> None:
        """Add what a saved group lacks and meant otherwise than today's default, in place."""

    def shared(self, m: int, n: int) -> Mapping[Hashable, int]:
        """Bytes by key of what all weights on a device share, such as a table of cosines."""
        return {}


def rule_class(name: str) -> type[Rule]:
    """The rule class that a group's ``rule`` names."""
    if not isinstance(name, str) or name not in RULE_CLASSES:
        raise ValueError(
            f"group key 'rule' must be 'adamw' or one of {', '.join(sorted(RULE_CLASSES))}, "
            f"got {shown(name)}"
        )
    return RULE_CLASSES[name]


def defaults_of(cls: type[Rule]) -> dict[str, Any]:
    """Group keys of a rule with their defaults."""
    return {f.name: f.default for f in fields(cls)}


def settings_of(rule: Rule) -> dict[str, Any]:
    """A rule's fields as group values."""
    return {f.name: getattr(rule, f.name) for f in fields(rule)}


def functions_of(rule: Rule) -> dict[str, Callable[..., Any]]:
    """A rule's fields that are functions, as a user may pass one in place of a name."""
    return {key: x for key, x in settings_of(rule).items() if callable(x)}
