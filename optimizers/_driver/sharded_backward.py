"""Steps of sharded weights inside of the backward pass: each alone, where its plan sends nothing.

``fully_shard`` calls hooks of a parameter once its shard of the gradient is reduced, in one order
on all ranks. What they agree on before a weight moves goes over process groups of the handle's
own, so that nothing waits behind what the backward pass itself sends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .agreement import FAILED, MOVES, SOUND, STEP_FLAGS, Agreement, agree, held_gradient
from .exchange import Team
from .layout import is_sharded
from .shards import Shards
from .traffic import refresh_is_local

if TYPE_CHECKING:
    from .buckets import StepPlan
    from .optimizer import StackedOptimizer
    from .units import Unit


def refuse_what_sends(plan: StepPlan, describe: Callable[[int], str]) -> None:
    """Raise for a sharded weight whose step or refresh needs other ranks.

    Args:
        plan: The optimizer's plan.
        describe: Makes words for a message of a position.

    Raises:
        ValueError: Naming the first one.
    """
    sent = plan.shards.bytes_per_step() if plan.shards is not None else {}
    for unit in plan.units:
        if unit.placed is not None and not _is_alone(unit, plan, sent):
            raise ValueError(
                f"step_in_backward(): {describe(unit.positions[0])} is sharded, and its plan "
                f"{unit.placed.plan!r} sends what is complete only after the backward pass; call "
                "step() instead"
            )


def _is_alone(unit: Unit, plan: StepPlan, sent: Mapping[int, int]) -> bool:
    """Whether each rank steps a unit by itself."""
    placed = unit.placed
    assert placed is not None
    if placed.plan == "local":
        return not placed.shares
    if placed.plan != "reduce" or placed.shares or any(sent.get(i) for i in unit.positions):
        return False
    return refresh_is_local(unit, placed.cut, plan.rule(unit))


class ShardedSteps:
    """The sharded units of a handle, by the flat positions of their parameters.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: StackedOptimizer) -> None:
        self._optimizer = optimizer
        self._teams: dict[tuple[int, ...], Team] = {}
        self._squares: dict[tuple[int, ...], list[Tensor]] = {}

    def follow(self, plan: StepPlan, positions: Sequence[int]) -> None:
        """Give the plan of one unit or parameter what it needs, if that is sharded."""
        if not any(is_sharded(plan.flat_params[i]) for i in positions):
            return
        optimizer = self._optimizer
        shards = Shards(plan, optimizer.state, optimizer.param_groups, optimizer._describe)
        shards.layouts = {i: shards.layouts[i] for i in positions}
        shards.team_of = {i: self._own(t) for i, t in shards.team_of.items() if i in positions}
        shards.teams = list({id(team): team for team in shards.team_of.values()}.values())
        plan.shards = shards

    def _own(self, team: Team) -> Team:
        """The same ranks with a group of the handle's own, made by them alone."""
        import torch.distributed as dist

        known = self._teams.get(team.ranks)
        if known is None:
            make = partial(dist.new_group, list(team.ranks), use_local_synchronization=True)
            parts = team.ranks, team.rank, team.coordinates, team.device.type
            known = self._teams[team.ranks] = Team(*parts, make)
        return known

    def held(self, shards: Shards, grads: Sequence[Tensor | None]) -> dict[int, Tensor | None]:
        """What this process holds of the gradients of a unit."""
        return {i: held_gradient(layout, grads[i]) for i, layout in shards.layouts.items()}

    def agree(
        self, shards: Shards, grads: Mapping[int, Tensor | None], failed: bool = False
    ) -> Agreement:
        """Let all ranks know what is wrong with the gradients of a unit, or with this process.

        Raises:
            RankError: If another rank has failed.
        """
        flags = [False] * STEP_FLAGS
        flags[FAILED], flags[SOUND], flags[MOVES] = failed, not failed, True
        groups = self._optimizer.param_groups
        modes = [str(group["nonfinite"]) for group in groups for _ in group["params"]]
        args = grads, flags, self._optimizer._describe, modes.__getitem__
        unmeasured = shards.unmeasured(grads)
        return agree(shards.teams, shards.team_of, *args, unmeasured=unmeasured)

    def tell_of_failure(self, shards: Shards) -> None:
        """Let other ranks know of an exception that is on its way here."""
        with contextlib.suppress(Exception):
            self.agree(shards, {}, failed=True)

    def add_norms(self, shards: Shards, held: Mapping[int, Tensor | None]) -> None:
        """Take what this process holds of gradients into the norm of all."""
        for i, G in held.items():
            if G is not None:
                team = shards.team_of.get(i)
                ranks = () if team is None else team.ranks
                wide = torch.promote_types(G.dtype, torch.float32)
                square = torch.linalg.vector_norm(G, dtype=wide).square()
                self._squares.setdefault(ranks, []).append(square)

    def norms(self) -> list[Tensor]:
        """Norms of the whole gradients, one for each group of ranks; communicates."""
        found = []
        for ranks, squares in self._squares.items():
            total = torch.stack(squares).sum().view(1)
            if ranks:
                total = self._teams[ranks].reduce(total, "SUM")
            found.append(total[0].sqrt())
        self._squares = {}
        return found
