"""What an ordinary update of a rule sends, found by running it on a strip of the weight.

A rule that runs on shards works for any number of rows or columns of the cut side, so an update of
two of them asks for all that an update of the real shard asks for, and costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.rule import BatchedCall, Direction, Member, Reductions, Rule
from .batched_calls import DirectionIterator
from .decay import Decay
from .norm_write import Steering, write_steered_
from .norms import DRIVER_SLOTS, RADIUS
from .rendezvous import MAX, SUM, WHOLE
from .units import Unit
from .write import Run, write_

STRIP = 2
"""Rows or columns of the cut side."""


class Sent(NamedTuple):
    """What one member asks other ranks for in an update of one matrix.

    Attributes:
        number: Number of the member.
        kind: ``"SUM"``, ``"MAX"``, or ``"WHOLE"`` for a matrix that travels.
        shape: Shape of what was passed, without the stack.
        dtype: Its dtype.
    """

    number: int
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Recorder(Reductions):
    """Writes down what is asked for, and answers with the argument."""

    def __init__(self, number: int, cut: frozenset[str], shares: bool, sent: list[Sent]) -> None:
        self._number, self._cut, self._shares, self._sent = number, cut, shares, sent
        self.has_whole_rows, self.is_whole = "n" not in cut, not cut

    def _record(self, kind: str, x: Tensor, needed: bool) -> Tensor:
        if needed:
            self._sent.append(Sent(self._number, kind, tuple(x.shape[1:]), x.dtype))
        return x

    def rows(self, x: Tensor) -> Tensor:
        """Record a sum over the rows."""
        return self._record(SUM, x, "m" in self._cut)

    def cols(self, x: Tensor) -> Tensor:
        """Record a sum over the columns."""
        return self._record(SUM, x, "n" in self._cut)

    def both(self, x: Tensor) -> Tensor:
        """Record a sum over all entries."""
        return self._record(SUM, x, bool(self._cut))

    def most(self, x: Tensor) -> Tensor:
        """Record a maximum over all entries."""
        return self._record(MAX, x, bool(self._cut))

    def sums_together(self, *parts: tuple[Reductions, Tensor]) -> tuple[Tensor, ...]:
        """Record sums of several members."""
        return self._record_together(SUM, parts)

    def most_together(self, *parts: tuple[Reductions, Tensor]) -> tuple[Tensor, ...]:
        """Record maxima of several members."""
        return self._record_together(MAX, parts)

    def _record_together(
        self, kind: str, parts: Sequence[tuple[Reductions, Tensor]]
    ) -> tuple[Tensor, ...]:
        for of, x in parts:
            assert isinstance(of, _Recorder)
            of._record(kind, x, bool(of._cut))
        return tuple(x for _, x in parts)

    def on_full_matrix(
        self, fn: Callable[..., Tensor], X: Tensor, *per_matrix: Sequence[Any] | Tensor
    ) -> Tensor:
        """Record a matrix that travels."""
        return self._record(WHOLE, X, bool(self._cut) or self._shares)


@torch.no_grad()
def traffic_of(
    unit: Unit, cut_by_member: Sequence[frozenset[str]], shares: bool, rule: Rule
) -> list[Sent]:
    """What an update between refreshes asks other ranks for, per matrix of the unit.

    Args:
        unit: A unit whose rule runs on shards.
        cut_by_member: Per member, letters of the sides that are cut.
        shares: Whether replicas share what is asked of whole matrices.
        rule: Its rule.
    """
    sent: list[Sent] = []
    members = _members(unit, cut_by_member, shares, rule, sent)
    if all(w.grad is None for w in members):
        return []
    steps = DirectionIterator(rule.update(*members))
    for step in steps:
        if isinstance(step, BatchedCall):
            steps.answer = step.fn(*step.args)
        elif unit.control is not None:
            _write_steered(unit, step)
        elif step.max_rel_norm is not None:  # such a write asks for norms
            write_(step.member.value, step, 0.0, Decay(0.0))
    return sent


def _write_steered(unit: Unit, step: Direction) -> None:
    """A write that asks for sums, since it steers norms."""
    assert unit.control is not None
    W, slot = step.member.value, unit.slots[step.member.number].get(RADIUS)
    radius = None if slot is None else W.new_ones(1, *slot.shape(*W.shape[1:]))
    run = Run(slice(0, 1), 0.0, Decay(0.0))
    write_steered_(W, step, [run], Steering(unit.control, radius, [None], is_stack=True))


@torch.no_grad()
def refresh_is_local(unit: Unit, cut_by_member: Sequence[frozenset[str]], rule: Rule) -> bool:
    """Whether a refresh on parts of a weight asks other ranks for nothing.

    Args:
        unit: A unit whose rule runs on shards.
        cut_by_member: Per member, letters of the sides that are cut.
        rule: Its rule.
    """
    if not rule.refresh_interval:
        return True
    sent: list[Sent] = []
    try:
        rule.refresh(*_members(unit, cut_by_member, False, rule, sent, _RefreshRecorder))
    except _Asks:
        return False
    return not sent


class _Asks(Exception):
    """A refresh has asked for more than a sum."""


class _RefreshRecorder(_Recorder):
    """Stops a refresh that needs one rank for all, whose function may need the real sides."""

    def on_one_rank(self, fn: Callable[..., Any], *args: Tensor) -> Any:
        """Tell that one rank is asked."""
        raise _Asks

    def on_full_matrix(
        self, fn: Callable[..., Tensor], X: Tensor, *per_matrix: Sequence[Any] | Tensor
    ) -> Tensor:
        """Tell that a matrix travels."""
        raise _Asks

    def from_full_matrix(self, fn: Callable[..., Any], X: Tensor, *small: Tensor) -> Any:
        """Tell that a matrix travels."""
        raise _Asks


def _members(
    unit: Unit,
    cut_by_member: Sequence[frozenset[str]],
    shares: bool,
    rule: Rule,
    sent: list[Sent],
    recorder: type[_Recorder] = _Recorder,
) -> list[Member]:
    """What a rule sees of a strip of each weight of a unit."""
    members = []
    for i, p in enumerate(unit.params):
        m, n = unit.sides(i)
        cut = cut_by_member[i] & {"m", "n"}
        sides = (STRIP if "m" in cut else m, STRIP if "n" in cut else n)
        # of ordinary size: a rule may take more sums where squares vanish
        G = torch.ones(1, *sides, dtype=torch.float32, device="cpu")
        state = {
            name: torch.zeros(1, *slot.shape(*sides), dtype=unit.dtype_of(i, name), device="cpu")
            for name, slot in unit.slots[i].items()
            if name not in DRIVER_SLOTS
        }
        # a rule may ask more of a weight that is zero, or whose squares leave its dtype
        W = torch.ones(1, *sides, dtype=p.dtype, device="cpu")
        has_grad = p.requires_grad or len(unit.params) == 1
        members.append(
            Member(
                G.to(torch.promote_types(p.dtype, torch.float32)) if has_grad else None,
                W.clone,
                state,
                t=2,
                refreshed=1 if rule.refresh_interval else 0,
                m=m,
                n=n,
                indices=(0,),
                number=i,
                transposed=unit.transposed[i],
                reductions=recorder(i, cut, shares, sent),
            )
        )
    return members
