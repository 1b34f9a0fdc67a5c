"""Pools of vectors for LoRA factors: which are in use, which come next, and how they are saved.

A pool holds a factor's vectors as rows, those in use and those that wait. Pools and all counters
stay on the host, where they decide; only the vectors that are exchanged travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from .._core.rule import Member, Slot
from .._driver.param_groups import parameters_of, warn_user
from .._toolkit.random_keys import StackRNG, random_order, splitmix64
from .pair_groups import PairOptimizer
from .switching import (
    check_triples,
    init_stds,
    merge_weights,
    refuse_other_base_weights,
    store_base_sums,
)

if TYPE_CHECKING:
    from .._driver.buckets import StepPlan

DRAW_PANEL = 2**14
"""Entries of a pool that are drawn at a time: a pool may be as large as the base weight."""

__all__ = [
    "TripleOptimizer",
    "VectorPool",
    "fill_pools_",
    "max_exchanges",
    "pool_slots",
    "rng_for",
    "start_pools_",
]

POOL_STREAM, ROUNDING_STREAM, CHOICE_STREAM = range(3)
"""Streams of random numbers, one for each purpose."""
COUNTER_DTYPE = torch.int32


def rng_for(seed: int, indices: tuple[int, ...], t: int, purpose: int) -> StackRNG:
    """Random numbers of update t for one purpose."""
    return StackRNG(splitmix64(seed) ^ purpose, indices, t)


def pool_slots(m: int, n: int, r: int) -> tuple[dict[str, Slot], ...]:
    """State of A (r, n) and B (m, r): a clock per vector, the entry in each slot, all vectors."""
    size = max(r, min(m, n))
    return tuple(
        {
            "count": Slot(axes, COUNTER_DTYPE, device="cpu"),
            "frozen": Slot(axes, COUNTER_DTYPE, device="cpu"),
            "slots": Slot("r", COUNTER_DTYPE, -1, "cpu", r=r),
            "cursor": Slot("", COUNTER_DTYPE, device="cpu"),
            "pool": Slot(rows, "weight", device="cpu", p=size),
        }
        for axes, rows in (("m1", "pn"), ("1n", "pm"))
    )


def _contiguous_runs(entries: Sequence[int]) -> Iterator[slice]:
    """Stretches of consecutive entries: each is copied in one go, from pinned memory directly."""
    start = 0
    for i in range(1, len(entries) + 1):
        if i == len(entries) or entries[i] != entries[i - 1] + 1:
            yield slice(entries[start], entries[i - 1] + 1)
            start = i


class VectorPool:
    """The vectors of one factor of one matrix: which are in use, and in which slot.

    Args:
        w: The factor.
        j: Number of the matrix.
    """

    def __init__(self, w: Member, j: int) -> None:
        keys = ("pool", "slots", "cursor")
        self.vectors, self._slots, self._cursor = (w.state[key][j] for key in keys)
        self.slots: list[int] = self._slots.tolist()
        self.cursor = int(self._cursor)
        self.frozen = int((w.state["frozen"][j] > 0).sum())

    @property
    def is_filled(self) -> bool:
        """Whether vectors have been drawn."""
        return self.slots[0] >= 0

    @property
    def waiting_count(self) -> int:
        """Number of vectors that are not in use."""
        return len(self.vectors) - len(self.slots)

    def start(self, shift: int) -> None:
        """The last r entries are in use; with the cursor at ``shift`` entry 0 enters first."""
        r, first = len(self.slots), self.waiting_count
        self.slots = [first + (i - shift) % r for i in range(r)]
        self.cursor = shift
        self._store()

    def next_entries(self, k: int, generator: torch.Generator | None) -> list[int]:
        """The k entries after the one that entered last: first out, first in; or any k that wait.

        Args:
            k: At most ``waiting_count``.
            generator: Decides which; None for the order.
        """
        if generator is None:
            last = self.slots[self.cursor - 1]
            return [(last + 1 + i) % len(self.vectors) for i in range(k)]
        used = set(self.slots)
        waiting = [entry for entry in range(len(self.vectors)) if entry not in used]
        return [waiting[i] for i in random_order(len(waiting), generator)[:k].tolist()]

    def exchange(
        self, k: int, X: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store the vectors of the next k slots in the pool, and return those that replace them.

        Args:
            k: How many, at least 1.
            X: The factor's vectors, as rows; not changed.
            generator: See ``next_entries``.

        Returns:
            The slots (k,), and their new vectors (k, length) on X's device, a tensor of its own.
        """
        slots = [(self.cursor + i) % len(self.slots) for i in range(k)]
        at = torch.tensor(slots, dtype=torch.int64, device="cpu")
        entries = self.next_entries(k, generator)
        leaving, start = X[at], 0
        new = torch.cat(
            [self.vectors[run].to(X.device, non_blocking=True) for run in _contiguous_runs(entries)]
        )
        for run in _contiguous_runs([self.slots[i] for i in slots]):
            stop = start + run.stop - run.start
            self.vectors[run].copy_(leaving[start:stop])  # waits: the host may read it any time
            start = stop
        for i, entry in zip(slots, entries, strict=True):
            self.slots[i] = entry
        self.cursor = (self.cursor + k) % len(self.slots)
        self._store()
        return at, new

    def _store(self) -> None:
        self._slots.copy_(self._slots.new_tensor(self.slots))
        self._cursor.fill_(self.cursor)


def max_exchanges(a: VectorPool, b: VectorPool) -> int:
    """Largest number of vectors of each factor to exchange without touching a frozen one.

    Exchanged slots of one factor freeze the same slots of the other: frozen rows of A are those
    just behind B's cursor, and the other way round.
    """
    r = len(a.slots)
    gaps = (b.cursor - a.frozen - a.cursor) % r, (a.cursor - b.frozen - b.cursor) % r
    return min(*gaps, a.waiting_count)


def fill_pools_(A: Tensor, B: Tensor, r: int, s: float, generator: torch.Generator) -> None:
    """Fill pools (p, n) of A and (p, m) of B with uniform vectors, in float32 and rounded."""
    for X, std in zip((A, B), init_stds(B.shape[1], A.shape[1], r, s), strict=True):
        bound = math.sqrt(3) * std
        height = max(1, DRAW_PANEL // X.shape[1])
        for i in range(0, len(X), height):  # panels have the bits of one draw
            rows = X[i : i + height]
            draw = torch.rand(rows.shape, generator=generator, dtype=torch.float32, device="cpu")
            rows.copy_(draw.mul_(2 * bound).sub_(bound))


def start_pools_(a: VectorPool, b: VectorPool, s: float, generator: torch.Generator) -> None:
    """Draw both pools; cursors start r // 2 apart, so neither meets slots the other has frozen."""
    r = len(a.slots)
    fill_pools_(a.vectors, b.vectors, r, s, generator)
    a.start(0)
    b.start(r // 2)


def _without_pools(saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without the pools of groups with ``save_pools=False``."""
    state = dict(saved["state"])
    for group in saved["param_groups"]:
        for i in group["params"] if group.get("save_pools") is False else ():
            if i in state:
                state[i] = {key: value for key, value in state[i].items() if key != "pool"}
    return {**saved, "state": state}


def _redraw_(
    missing: Set[tuple[Tensor, str]],
    plan: StepPlan,
    state: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Fill pools that a checkpoint lacked; vectors in use stay, and are stored as they leave.

    Args:
        missing: (parameter, state key) of what the checkpoint lacked.
        plan: The optimizer's plan.
        state: Its state, where these pools are zeros.
    """
    for unit in plan.units:
        A, B, _ = unit.params
        if (A, "pool") not in missing and (B, "pool") not in missing:
            continue
        rule, k = plan.rule(unit), unit.views[0].k
        rng = rng_for(rule.seed, unit.indices, state[A]["step"], POOL_STREAM)  # type: ignore[attr-defined]
        pools = [
            state[p]["pool"] if (p, "pool") in missing else torch.empty_like(state[p]["pool"])
            for p in (A, B)
        ]
        for j in range(k):
            a, b = (X[j] if k > 1 else X for X in pools)
            fill_pools_(a, b, unit.sides(0)[0], rule.s, rng.generator(j))  # type: ignore[attr-defined]


class TripleOptimizer(PairOptimizer):
    """Base class for triples A, B, W0 with pools; arguments as :class:`PairOptimizer`."""

    _compares_base = False
    """Whether the next step compares the base weights with those of a loaded checkpoint."""

    @override
    def _prepare_group(self, param_group: dict[str, Any]) -> dict[str, Any]:
        group = super()._prepare_group(param_group)
        full = {**self.defaults, **group} if isinstance(group, dict) else {"rule": "adamw"}
        if self._holds_pairs(full):
            check_triples(full)
            group["base_sums"] = [None] * len(parameters_of(group)[0])
        return group

    @override
    def state_dict(self) -> dict[str, Any]:
        """State and groups as torch gives them; without pools under ``save_pools=False``.

        The groups get the sums of the base weights, by which a later run knows them again.
        """
        self._refuse_written()
        if not self._compares_base:  # else they are those of the file
            store_base_sums(self.param_groups)
        return _without_pools(super().state_dict())

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; pools that it lacks are drawn anew, with a warning.

        The next step compares the base weights with those that were saved.
        """
        super().load_state_dict(state_dict)
        self._compares_base = True

    @override
    def _fill_missing(self, missing: Set[tuple[Tensor, str]]) -> None:
        if missing:
            _redraw_(missing, self._get_plan(), self.state)
            warn_user("the checkpoint has no pools, so candidates are drawn anew")

    @override
    def _update(self) -> None:
        self._compare_base()
        super()._update()

    @override
    def _before_backward(self) -> None:
        self._compare_base()

    def _compare_base(self) -> None:
        """Raise if the base weights at hand are not those of the checkpoint that was loaded."""
        if self._compares_base:
            self._refuse_written()
            refuse_other_base_weights(self.param_groups)
            self._compares_base = False

    def merged(self) -> dict[str | int, Tensor]:
        """W0 + s B A of every triple, for export: by W0's name or, without one, its position."""
        self._compare_base()
        return merge_weights(self._get_plan(), [row.name for row in self.assignment().rows])
