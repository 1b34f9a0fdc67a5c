"""What the ranks of a step agree on before anything changes: one maximum over flags per team.

Whether each gradient is finite, is not all zero, and is there at all; whether a rank has failed;
and what stops the whole step. Ranks of several teams pass on what concerns the whole step in a
second, short reduction, since some rank may share no team with the one that knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .exchange import FAILED_ELSEWHERE, RankError, Team
from .finite import largest
from .layout import Layout, is_sharded, layout_of, local
from .norms import has_zero, zero_weight

BAD, NONZERO, PRESENT, ABSENT, MEASURED = range(5)
"""Flags of one parameter: of its gradient, and whether norms of it are about to be measured."""
PARAMETER_FLAGS = 5
FAILED, REFUSED, STOPPED, MOVES, SOUND, LEARNS, MAKES = range(7)
"""Flags of the step: an exception, a bad gradient that raises, one that stops, any that is not
zero, a rank without an exception, one that cannot tell what its buckets are going to ask, and one
that is about to make state."""
STEP_FLAGS = 7
NO_CLOCKS = -(2**31) + 1
"""Stands for the clocks of a rank that has failed."""


def layouts_of(params: Sequence[Tensor], describe: Callable[[int], str]) -> dict[int, Layout]:
    """Layouts of the sharded parameters by flat position.

    Args:
        params: All parameters.
        describe: Makes words for a message of a position.

    Raises:
        ValueError: For a layout that cannot be stepped.
    """
    found = {}
    for i, p in enumerate(params):
        layout = layout_of(p, describe(i)) if is_sharded(p) else None
        if layout is not None:
            found[i] = layout
    return found


def teams_of(
    layouts: Mapping[int, Layout], spreads: Set[int]
) -> tuple[list[Team], dict[int, Team]]:
    """Teams in the order of their first parameter, and the team of each parameter that has one.

    Ranks reduce over several groups in one order, or they would wait for each other in a ring.

    Args:
        layouts: Layouts of sharded parameters by flat position.
        spreads: Positions of those whose replicas share the work.
    """
    teams: dict[tuple[int, ...], Team] = {}
    team_of = {}
    for i, layout in layouts.items():
        axes = layout.all_axes if i in spreads else layout.axes
        if axes:
            ranks = layout.over(axes).ranks
            team_of[i] = teams.setdefault(ranks, Team.of_layout(layout, axes))
    return list(teams.values()), team_of


class Unmeasured(NamedTuple):
    """Weights whose norms are to be kept from this step on.

    Attributes:
        positions: Their flat positions.
        squares: Takes a position, and gives the squares of these norms, as many as the whole weight
            has, of what this process holds.
    """

    positions: Set[int] = frozenset()
    squares: Callable[[int], Tensor] = torch.empty


@dataclass
class Agreement:
    """What is known of the gradients of sharded parameters, equal on all ranks.

    Attributes:
        bad: Positions of parameters whose gradient is not finite somewhere.
        nonzero: Positions of those whose gradient is not zero everywhere.
        step: By number, whether a flag of the step is set on any rank.
    """

    bad: set[int] = field(default_factory=set)
    nonzero: set[int] = field(default_factory=set)
    step: list[bool] = field(default_factory=lambda: [False] * STEP_FLAGS)


def agree(
    teams: Sequence[Team],
    team_of: Mapping[int, Team],
    grads: Mapping[int, Tensor | None],
    step_flags: Sequence[bool],
    describe: Callable[[int], str],
    mode_of: Callable[[int], str],
    clocks_of: Callable[[Team], int] = lambda _: NO_CLOCKS,
    unmeasured: Unmeasured = Unmeasured(),  # noqa: B008
) -> Agreement:
    """Reduce the flags of a step.

    Args:
        teams: All teams of this process.
        team_of: The team of each sharded parameter that is cut.
        grads: By flat position, what this process holds of each gradient; empty where it failed.
        step_flags: Flags of the step on this process.
        describe: Makes words for a message of a position.
        mode_of: The group's ``nonfinite`` of a position.
        clocks_of: A number that differs where the clocks of a team's units do.
        unmeasured: Weights whose norms are to be kept, and must not be zero.

    Raises:
        RankError: If another rank has failed.
        RuntimeError: For a gradient that is there on some ranks only, a zero weight whose norm is
            to be kept, and where an exception or a checkpoint has left the ranks at different
            steps.
    """
    found, flags = Agreement(step=list(step_flags)), _local_flags(grads, unmeasured.positions)
    for position, row in flags.items():
        found.step[MOVES] |= bool(row[NONZERO])
        if position not in team_of:  # whole on this process, and on every other that has it
            _record(found, position, row, mode_of(position))
    missing, parted = list[int](), False
    own = (i for i in unmeasured.positions if i not in team_of and i not in found.bad)
    zeros = [i for i in own if has_zero(unmeasured.squares(i))]
    for team in teams:
        positions = [i for i, other in team_of.items() if other is team]
        rows = [flags.get(i, [0] * PARAMETER_FLAGS) for i in positions]
        numbers = [x for row in rows for x in row] + [int(x) for x in found.step]
        clocks = clocks_of(team)
        reduced = _reduce(team, [clocks, NO_CLOCKS if clocks == NO_CLOCKS else -clocks, *numbers])
        parted |= NO_CLOCKS not in reduced[:2] and reduced[0] != -reduced[1]
        del reduced[:2]
        found.step = [bool(x) for x in reduced[-STEP_FLAGS:]]
        unsure = list[int]()
        for k, i in enumerate(positions):
            row = reduced[PARAMETER_FLAGS * k : PARAMETER_FLAGS * (k + 1)]
            _record(found, i, row, mode_of(i))
            if row[PRESENT] and row[ABSENT]:
                missing.append(i)
            elif row[MEASURED] and i not in found.bad:
                unsure.append(i)
        if unsure and not found.step[FAILED]:
            zeros += _zeros(team, unsure, unmeasured)
    if len(teams) > 1:
        for team in teams:
            wrong = bool(missing or parted or zeros)
            reduced = _reduce(team, [int(x) for x in found.step] + [int(wrong)])
            found.step = [bool(x) for x in reduced[:STEP_FLAGS]]
            found.step[FAILED] |= bool(reduced[STEP_FLAGS]) and not wrong
    failed_elsewhere = found.step[FAILED] and not step_flags[FAILED]
    _raise_first(found, describe, missing, failed_elsewhere, zeros, parted)
    return found


def tell(teams: Sequence[Team], failure: Exception | None) -> Exception | None:
    """Let all ranks know whether one of them has failed, where all ask at the same place.

    Args:
        teams: All teams of this process.
        failure: The exception of this process.

    Returns:
        It, or one that says that another rank has failed; None if none has.
    """
    for _ in range(min(2, len(teams))):  # ranks of several teams pass on what they hear
        for team in teams:
            if _reduce(team, [int(failure is not None)])[0] and failure is None:
                failure = RankError(FAILED_ELSEWHERE)
    return failure


def _zeros(team: Team, positions: Sequence[int], unmeasured: Unmeasured) -> list[int]:
    """Positions of weights of which a norm is zero on all ranks together."""
    parts = [unmeasured.squares(i).to(team.device) for i in positions]
    sums = team.reduce(torch.cat(parts), "SUM")
    split = torch.split(sums, [len(x) for x in parts])
    return [i for i, x in zip(positions, split, strict=True) if has_zero(x)]


def _raise_first(
    found: Agreement,
    describe: Callable[[int], str],
    missing: Sequence[int],
    failed_elsewhere: bool,
    zeros: Sequence[int],
    parted: bool,
) -> None:
    """Raise what ends the step on all ranks, the same everywhere; nothing if they agree."""
    if missing:
        raise RuntimeError(
            f"the gradient of {describe(missing[0])} is there on some ranks only; call "
            "set_reduce_scatter_unused_params(True) on the FSDP module, or use every weight on "
            "every rank"
        )
    if failed_elsewhere:
        raise RankError(FAILED_ELSEWHERE)
    if zeros and not found.step[FAILED]:
        raise RuntimeError(zero_weight(describe(zeros[0])))
    if parted and not found.step[FAILED]:
        raise RuntimeError(
            "the ranks are at different steps, after an exception or a checkpoint that some of "
            "them have not loaded; load one checkpoint on all ranks"
        )


def _record(found: Agreement, position: int, row: Sequence[int], mode: str) -> None:
    if row[BAD] and mode != "ignore":
        found.bad.add(position)
        found.step[REFUSED] |= mode == "raise"
        found.step[STOPPED] |= mode == "skip_step"
    if row[NONZERO]:
        found.nonzero.add(position)


def _local_flags(grads: Mapping[int, Tensor | None], unsure: Set[int]) -> dict[int, list[int]]:
    """Flags of what this process holds of each gradient, with one wait per device."""
    flags = {
        i: [0, 0, int(G is not None), int(G is None), int(i in unsure)] for i, G in grads.items()
    }
    by_kind: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for i, G in grads.items():
        if G is not None and G.numel():
            size = largest(G)
            by_kind.setdefault((size.device, size.dtype), []).append((i, size))
    for pairs in by_kind.values():
        sizes = torch.stack([size for _, size in pairs])
        bad, nonzero = sizes.isfinite().logical_not().tolist(), (sizes != 0).tolist()
        for (i, _), is_bad, is_nonzero in zip(pairs, bad, nonzero, strict=True):
            flags[i][BAD], flags[i][NONZERO] = int(is_bad), int(is_nonzero)
    return flags


def _reduce(team: Team, numbers: Sequence[int]) -> list[int]:
    x = torch.tensor(numbers, dtype=torch.int32, device=team.device)
    return [int(value) for value in team.reduce(x, "MAX").tolist()]


def held_gradient(layout: Layout, grad: Tensor | None) -> Tensor | None:
    """What this process holds of a gradient in the layout of its weight."""
    return None if grad is None else local(layout.redistribute(grad))
