"""The step of an optimizer with sharded weights: agree first, then change anything.

Whatever goes wrong on one rank before the ranks have agreed is part of what they agree on, so that
all of them raise, with nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from .agreement import (
    FAILED,
    LEARNS,
    MAKES,
    MOVES,
    REFUSED,
    SOUND,
    STEP_FLAGS,
    STOPPED,
    Agreement,
    agree,
    teams_of,
)
from .checks import check_ready
from .exchange import RankError, Team
from .finite import Findings, group_indices
from .layout import Layout, is_sharded
from .shards import spread_positions

if TYPE_CHECKING:
    from . import adamw
    from .buckets import StepPlan
    from .optimizer import StackedOptimizer


def update(optimizer: StackedOptimizer, plan: StepPlan) -> None:
    """Step all parameters by their gradients as they are now.

    Args:
        optimizer: The optimizer.
        plan: Its plan, of which something is sharded.
    """
    step = _Step(optimizer, plan)
    try:
        step.prepare()
    except Exception:
        if step.agreed is None:
            tell_of_failure(optimizer)
        raise
    step.run()


def tell_of_failure(optimizer: StackedOptimizer) -> None:
    """Take part in what the ranks agree on, after an exception here; never raises itself."""
    groups, group = optimizer.param_groups, optimizer._process_group
    params = [p for group in groups for p in group["params"]]
    layouts = {
        i: Layout(p.device_mesh, tuple(p.placements), tuple(p.shape))
        for i, p in enumerate(params)
        if is_sharded(p)
    }
    if not layouts and group is None:
        return
    try:
        teams, team_of = teams_of(layouts, spread_positions(groups))
        if group is not None and group.size() > 1:
            plain = [i for i, p in enumerate(params) if not is_sharded(p)]
            teams.insert(0, Team.of_group(group, params[plain[0]].device.type if plain else "cpu"))
            team_of |= dict.fromkeys(plain, teams[0])
        flags = [flag == FAILED for flag in range(STEP_FLAGS)]
        agree(teams, team_of, {}, flags, str, lambda _: "ignore")
    except Exception:  # the exception that is on its way says more
        return


class _Step:
    """One step, in two parts: before and after the ranks have agreed.

    Args:
        optimizer: The optimizer.
        plan: Its plan.

    Attributes:
        agreed: What the ranks have agreed on; None as long as they have not.
    """

    def __init__(self, optimizer: StackedOptimizer, plan: StepPlan) -> None:
        self._optimizer, self._plan = optimizer, plan
        self._grads: list[Tensor | None] = []
        self._held: dict[int, Tensor | None] = {}
        self._found = Findings()
        self._adamw_steps: list[adamw.Work] = []
        self.agreed: Agreement | None = None

    def prepare(self) -> None:
        """Look at everything, and agree with the other ranks."""
        optimizer, plan = self._optimizer, self._plan
        self._grads = [p.grad for p in plan.flat_params]
        name = type(optimizer).__name__
        groups, state = optimizer.param_groups, optimizer.state
        if not check_ready(plan, self._grads, groups, state, name):
            optimizer._plan = None  # weights have another dtype now, and their state fits
            self._plan = plan = optimizer._get_plan()
        assert plan.shards is not None
        plan.shards.follow()
        self._held = plan.shards.gradients(self._grads)
        held = [self._held.get(i, G) for i, G in enumerate(self._grads)]
        self._adamw_steps = optimizer._adamw_steps(plan, held)
        self._found = optimizer._inspect(plan, self._grads, self._adamw_steps, self._agree)

    def _agree(self, found: Findings) -> None:
        """Let all ranks know what each of them has found."""
        optimizer, shards = self._optimizer, self._plan.shards
        assert shards is not None
        groups = optimizer.param_groups
        group_of = group_indices(groups)
        modes = [groups[group_of[i]]["nonfinite"] for i in found.bad]
        flags = [False] * STEP_FLAGS
        flags[FAILED], shards.untold = shards.untold, False
        flags[SOUND] = not flags[FAILED]
        flags[LEARNS], flags[MAKES] = shards.learns(self._held), shards.makes_state(self._held)
        flags[REFUSED], flags[STOPPED] = "raise" in modes, "skip_step" in modes
        flags[MOVES] = not self._lrs_are_zero() or any(
            G is not None and bool(G.any())
            for i, G in enumerate(self._grads)
            if i not in shards.layouts
        )
        self.agreed = Agreement()  # from here on all ranks raise by themselves
        self.agreed = agree(
            shards.teams,
            shards.team_of,
            {**self._held, **shards.plain_gradients(self._grads)},
            flags,
            optimizer._describe,
            lambda i: str(groups[group_of[i]]["nonfinite"]),
            shards.clocks_of,
            shards.unmeasured(self._held),
        )
        if flags[FAILED] and self.agreed.step[SOUND]:  # where all have failed alike, none is ahead
            raise RankError(
                "a rule failed here in the step before, when the other ranks could not be told; "
                "load a checkpoint"
            )
        found.bad |= self.agreed.bad
        found.stopped = self.agreed.step[STOPPED]
        if self.agreed.step[REFUSED] and not any(
            groups[group_of[i]]["nonfinite"] == "raise" for i in found.bad
        ):
            raise RuntimeError(
                "a gradient that another rank holds is not finite; nonfinite='skip' leaves such "
                "parameters alone instead"
            )

    def _lrs_are_zero(self) -> bool:
        lrs = [group["lr"] for group in self._optimizer.param_groups]
        return not any(
            (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0 for lr in lrs
        )

    def run(self) -> None:
        """Change weights and state."""
        optimizer, plan, found = self._optimizer, self._plan, self._found
        assert self.agreed is not None and plan.shards is not None
        if (found.bad or found.stopped) and optimizer._count_skipped(found):
            return
        optimizer._follow_radii()
        if not self.agreed.step[MOVES]:  # a checkpointer's probing step
            optimizer.init_state()
            for work in self._adamw_steps:
                work.allocate(optimizer.state)
            found = Findings()
        else:
            plain: Callable[[], None]
            plain = partial(optimizer._step_matrices, plan, self._grads, found)
            if (replicas := plan.shards.replicas) is not None:
                known = plan.shards.others_know
                plain = partial(replicas.step, optimizer, self._grads, found, self.agreed, known)
            plan.shards.step(optimizer, self._held, self.agreed, plain)
        try:
            for work in self._adamw_steps:
                work.step(found.bad, found.adamw_flags)
        except Exception:
            plan.shards.untold = True
            raise
        if found.joined or any(found.unread):
            optimizer._keep_unread(plan, found)
