"""Sharded weights in a step: what runs where its parts are, and what travels to an owner.

Rules, buckets and kernels see plain tensors. Units whose rule runs on parts are stepped on the
memory that the DTensors hold, with ``HeldState`` between the buckets and the optimizer's state.
Units that travel are stepped by their owner, on whole tensors, by today's driver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .agreement import (
    LEARNS,
    MAKES,
    Agreement,
    Unmeasured,
    held_gradient,
    layouts_of,
    teams_of,
    tell,
)
from .bucket_runs import MAX_WAVE_BYTES, bucket_waves, refreshes_now, run_bucket, share_out
from .buckets import Bucket, StepPlan
from .exchange import Exchange, Piece, RankError, Team
from .finite import Findings, roll_back, snapshot
from .layout import Box, Layout, is_sharded, memory
from .norm_write import held_squares, refuse_zero_weights
from .norms import RADIUS, is_to_measure
from .rendezvous import WHOLE, Rendezvous, Run, ShardReductions
from .replicas import Replicas
from .shard_plan import work_of
from .traffic import Sent, traffic_of
from .units import HeldMember, State, Unit

if TYPE_CHECKING:
    from .optimizer import StackedOptimizer

Stage = Callable[["Exception | None"], None]
"""Part of a step; takes an exception of this process that others do not know of yet."""


# state ----------------------------------------------------------------------------------------


Owners = Mapping[Tensor, tuple[Tensor, list[tuple[Unit, int]]]]
"""By what this process holds of a parameter, the parameter, and its units with its place there."""


class HeldEntry(MutableMapping[str, Any]):
    """The state of one parameter, with what this process holds in the place of DTensors.

    Args:
        entry: The optimizer's state of the parameter.
        layout_of: Layout of a state tensor by its key.
    """

    def __init__(self, entry: dict[str, Any], layout_of: Callable[[str], Layout | None]) -> None:
        self.entry, self._layout_of = entry, layout_of
        self._known: dict[str, tuple[Any, Tensor]] = {}

    def __getitem__(self, key: str) -> Any:
        value = self.entry[key]
        if not is_sharded(value):
            return value
        known = self._known.get(key)
        if known is None or known[0] is not value:
            known = self._known[key] = value, memory(value)
        return known[1]

    def __setitem__(self, key: str, value: Any) -> None:
        layout = self._layout_of(key) if isinstance(value, Tensor) else None
        if layout is None:
            self.entry[key] = value
            return
        self.entry[key] = layout.wrap(value)
        self._known[key] = self.entry[key], value

    def __delitem__(self, key: str) -> None:
        del self.entry[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entry)

    def __len__(self) -> int:
        return len(self.entry)


class HeldState(MutableMapping[Tensor, Any]):
    """The optimizer's state of sharded parameters, by what this process holds of each."""

    def __init__(self, state: State, owners: Owners) -> None:
        self._state, self._owners = state, owners
        self._entries: dict[Tensor, HeldEntry] = {}

    def __getitem__(self, held: Tensor) -> HeldEntry:
        p, units = self._owners[held]
        entry, known = self._state[p], self._entries.get(held)
        if known is None or known.entry is not entry:
            known = self._entries[held] = HeldEntry(entry, partial(_layout_of_key, units))
        return known

    def __setitem__(self, held: Tensor, value: Any) -> None:
        raise TypeError("state of a sharded parameter is made by its unit")

    def __delitem__(self, held: Tensor) -> None:
        raise TypeError("state of a sharded parameter is dropped by its unit")

    def __iter__(self) -> Iterator[Tensor]:
        return (held for held, (p, _) in self._owners.items() if p in self._state)

    def __len__(self) -> int:
        return sum(p in self._state for p, _ in self._owners.values())


def _layout_of_key(units: Sequence[tuple[Unit, int]], key: str) -> Layout | None:
    for unit, i in units:
        if key in unit.expected_state(i):
            return unit.state_layout(i, key)
    return None


# loads ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Load:
    """Units that travel together, since they are parts of the same parameters.

    Attributes:
        units: The units, of one run of parameters.
        owner: The rank that steps them; None: every rank does.
    """

    units: list[Unit]
    owner: int | None = None

    @property
    def positions(self) -> tuple[int, ...]:
        """Flat positions of the parameters."""
        return self.units[0].positions

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Layouts of the parameters."""
        placed = self.units[0].placed
        assert placed is not None
        return placed.layouts

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the mesh along which the load travels."""
        placed = self.units[0].placed
        assert placed is not None
        return placed.axes

    def keys(self, i: int, entry: Mapping[str, Any]) -> list[str]:
        """Keys of the state of parameter i that travels, in one order on all ranks."""
        found = dict.fromkeys(key for unit in self.units for key in unit.expected_state(i))
        return [key for key in found if is_sharded(entry.get(key))]


CLOCKS = (-1, "refreshed")
"""Name of the piece with the clocks of refreshes, where units see parts of a gradient."""


class _Parcel:
    """What travels of one load in one step: pieces there, pieces back, and where they lie here."""

    def __init__(
        self,
        load: Load,
        grads: Mapping[int, Tensor | None],
        params: Sequence[Tensor],
        state: State,
        comm_dtype: torch.dtype | None,
        refreshed: Sequence[int],
    ) -> None:
        self.load, self.names = load, list[tuple[int, str]]()
        self.pieces: list[Piece] = []
        self.held: list[Tensor] = []
        for i, position in enumerate(load.positions):
            p = params[position]
            G = grads[position]
            if G is not None:
                self._add(i, "grad", load.layouts[i], G, comm_dtype)
            self._add(i, "weight", load.layouts[i], memory(p), None)
            entry = state.get(p, {})
            for key in load.keys(i, entry):
                layout = next(
                    u.state_layout(i, key) for u in load.units if key in u.expected_state(i)
                )
                assert layout is not None
                self._add(i, key, layout, memory(entry[key]), None)
        self.clocks: Tensor | None = None
        if refreshed:  # the owner alone knows which part of a gradient is zero
            self.clocks = torch.tensor(refreshed, dtype=torch.int64, device=self.held[0].device)
            box = ((0, len(refreshed)),)
            count = len(self.pieces[0].boxes)
            shape = (len(refreshed),)
            self.names.append(CLOCKS)
            self.pieces.append(Piece(load.owner, (box,) * count, shape, torch.int64))
            self.held.append(self.clocks)

    def _add(
        self, i: int, name: str, layout: Layout, held: Tensor, comm_dtype: torch.dtype | None
    ) -> None:
        self.names.append((i, name))
        boxes = layout.over(self.load.axes).boxes
        self.pieces.append(Piece(self.load.owner, boxes, layout.shape, comm_dtype or held.dtype))
        self.held.append(held)

    @property
    def returns(self) -> list[int]:
        """Numbers of the pieces that come back: all but gradients."""
        return [k for k, (_, name) in enumerate(self.names) if name != "grad"]


# all that is sharded --------------------------------------------------------------------------


class Shards:
    """What of a plan is sharded.

    Args:
        plan: The plan, with all its units.
        state: The optimizer's state.
        groups: The parameter groups.
        describe: Makes words for a message of a position.
        process_group: The group whose ranks share the work for plain weights; None: they do not.

    Attributes:
        layouts: Layouts of all sharded parameters, those of AdamW too, by flat position.
        replicas: What plain weights share, None without a group of several ranks.
        teams: Teams of this process, in one order on all ranks.
        untold: Whether a step has failed here of which other ranks do not know.
    """

    def __init__(
        self,
        plan: StepPlan,
        state: State,
        groups: Sequence[Mapping[str, Any]],
        describe: Callable[[int], str],
        process_group: Any = None,
    ) -> None:
        self.layouts = plan.adamw_entries.layouts = layouts_of(plan.flat_params, describe)
        self.teams, self.team_of = teams_of(self.layouts, spread_positions(groups))
        self.replicas: Replicas | None = None
        if process_group is not None and process_group.size() > 1:
            self.replicas = Replicas(plan, groups, process_group)
            self.teams.insert(0, self.replicas.team)
            self.team_of |= dict.fromkeys(self.replicas.positions, self.replicas.team)
        self._plan, self._state = plan, state
        self._groups = groups
        units = [unit for unit in plan.units if unit.placed is not None]
        self._unit_teams = self._teams_of_units(units)
        owners = self._owners(units)
        self.loads: list[tuple[Team, list[Load]]] = self._loads(units, owners)
        self._units = units
        self._running = [u for u in units if u.placed is not None and u.placed.held is not None]
        self._owner_of = owners
        self._requests = dict[Hashable, list[Sent]]()
        self._measured = set[tuple[Unit, int]]()
        self.held_tensors: dict[int, Tensor] = {}
        self.untold = self._is_known = False
        self._exchanges: dict[tuple[int, torch.device, int, int], list[Exchange]] = {}
        self._bind()

    # layout of the work -------------------------------------------------------------------------

    def _team(self, unit: Unit) -> Team | None:
        """The ranks among which a unit is divided."""
        return None if unit.placed is None else self._unit_teams.get(_ranks_of(unit))

    def _teams_of_units(self, units: Sequence[Unit]) -> dict[tuple[int, ...], Team]:
        """By ranks, the teams that share units, in one order on all ranks.

        They are those of single parameters, and where the members of a unit are cut along other
        axes of a mesh than each other, those of all of these axes.
        """
        teams = {team.ranks: team for i, team in self.team_of.items() if i in self.layouts}
        for unit in units:
            if unit.placed is not None and unit.placed.axes:
                team = Team.of_layout(unit.placed.layouts[0], unit.placed.axes)
                teams.setdefault(team.ranks, team)
        return teams

    def _owners(self, units: Sequence[Unit]) -> dict[Unit, tuple[int, ...]]:
        """Per unit, the owner of each of its matrices: the longest work first, to who has least.

        Units that travel whole have one owner for all of their parameters.
        """
        owners: dict[Unit, tuple[int, ...]] = {}
        for team in self._unit_teams.values():
            jobs: list[tuple[int, int, list[Unit]]] = []
            runs: dict[tuple[int, ...], list[Unit]] = {}
            for unit in units:
                if self._team(unit) is team and unit.placed is not None:
                    if unit.placed.plan in ("reduce", "owner") or unit.placed.shares:
                        runs.setdefault(unit.positions, []).append(unit)
            for order, run in enumerate(runs.values()):
                if run[0].placed is not None and run[0].placed.runs_on_shards:
                    for unit in run:
                        jobs += [(work_of(unit), order, [unit])] * _count(unit)
                else:
                    total = sum(work_of(unit) * unit.views[0].k for unit in run)
                    jobs.append((total, order, run))
            for rank, run in share_out(jobs, len(team)):
                for unit in run:
                    owners[unit] = (*owners.get(unit, ()), rank)
        return owners

    def _loads(
        self, units: Sequence[Unit], owners: Mapping[Unit, tuple[int, ...]]
    ) -> list[tuple[Team, list[Load]]]:
        """Per team, what travels."""
        found = []
        for team in self._unit_teams.values():
            loads: dict[tuple[int, ...], Load] = {}
            for unit in units:
                if unit.placed is not None and unit.placed.held is None:
                    if self._team(unit) is team:
                        owner = owners[unit][0] if unit.placed.plan == "owner" else None
                        loads.setdefault(unit.positions, Load([], owner)).units.append(unit)
            found.append((team, list(loads.values())))
        return found

    def _bind(self) -> None:
        """Make units of what this process holds, on the live memory of the weights."""
        params = self._plan.flat_params
        with torch.no_grad():
            self.held_tensors = {i: memory(params[i]) for i in self.layouts}
        held_units, owners = list[Unit](), dict[Tensor, tuple[Tensor, list[tuple[Unit, int]]]]()
        self._whole_unit: dict[Unit, Unit] = {}
        for unit in self._running:
            placed = unit.placed
            assert placed is not None and placed.held is not None
            own = replace(
                unit,
                params=tuple(self.held_tensors[i] for i in unit.positions),
                views=tuple(held.view for held in placed.held),
                held=tuple(
                    HeldMember(layout, view, held.first)
                    for layout, view, held in zip(
                        placed.layouts, unit.views, placed.held, strict=True
                    )
                ),
            )
            held_units.append(own)
            self._whole_unit[own] = unit
            for i, (held, p) in enumerate(zip(own.params, unit.params, strict=True)):
                owners.setdefault(held, (p, []))[1].append((unit, i))
        plan = self._plan
        self.held_plan = StepPlan(
            [self.held_tensors.get(i, p) for i, p in enumerate(params)],
            plan.settings,
            plan.group_rules,
            plan.adamw_orders,
            plan.rules,
            plan.groups_of_rules,
            held_units,
        )
        self.held_state = HeldState(self._state, owners)
        self._rendezvous_of = dict[int, Rendezvous]()
        self._learnt = set[tuple[Bucket, bool]]()
        self._bound = list[tuple[dict[str, Any], str, Tensor]]()

    def follow(self) -> None:
        """Take up memory that other code has moved, as offloading and ``model.to`` do."""
        params = self._plan.flat_params
        if not all(map(is_, self.held_tensors.values(), (memory(params[i]) for i in self.layouts))):
            self._bind()

    # gradients ------------------------------------------------------------------------------------

    def gradients(self, grads: Sequence[Tensor | None]) -> dict[int, Tensor | None]:
        """What this process holds of the gradients of sharded parameters."""
        return {i: held_gradient(layout, grads[i]) for i, layout in self.layouts.items()}

    def plain_gradients(self, grads: Sequence[Tensor | None]) -> dict[int, Tensor | None]:
        """Gradients of plain parameters on which ranks agree."""
        return {} if self.replicas is None else self.replicas.gradients(grads)

    def unmeasured(self, grads: Mapping[int, Tensor | None]) -> Unmeasured:
        """Weights with a gradient whose norms are kept and not known yet: at first, or anew.

        Args:
            grads: What ``gradients`` returned.
        """
        found = set[int]()
        for unit in self._units:
            if unit.control is None or not unit.control.keeps_radius:
                continue
            given = self._groups[unit.group].get(RADIUS)
            for i, position in enumerate(unit.positions):
                if (unit, i) in self._measured or grads.get(position) is None:
                    continue
                stored = self._state.get(unit.params[i], {}).get(unit.key_of(i, RADIUS))
                if stored is None:
                    is_known = given is not None
                else:
                    is_known = not bool(is_to_measure(memory(stored), given).any())
                    if is_known:
                        self._measured.add((unit, i))
                if not is_known:
                    found.add(position)
        return Unmeasured(found, self._squares)

    def _squares(self, position: int) -> Tensor:
        """Squares of all norms of a weight that are kept, of what this process holds."""
        held, found = self.held_tensors[position], list[Tensor]()
        for unit in self._units:
            for i, other in enumerate(unit.positions):
                if other == position and unit.control is not None and unit.control.keeps_radius:
                    found.append(held_squares(unit, i, held, unit.control.radius_scope))
        return torch.cat(found)

    # the step -------------------------------------------------------------------------------------

    def learns(self, grads: Mapping[int, Tensor | None]) -> bool:
        """Whether some bucket of this step has not run yet, so that nobody knows what it will ask.

        Args:
            grads: What ``gradients`` returned.
        """
        plan = self.held_plan
        if self.replicas is not None and self.replicas.learns():
            return True
        if not any(
            unit.placed is not None and unit.placed.runs_on_shards for unit in self._running
        ):
            return False
        mask = [grads.get(i) is not None for i in range(len(self._plan.flat_params))]
        if plan.stack_keys != self._plan.stack_keys or plan.is_stale(mask, self.held_state):
            return True
        return any(
            bucket.unit.placed is not None
            and bucket.unit.placed.runs_on_shards
            and (bucket, refreshes_now(self.held_plan, bucket)) not in self._learnt
            for bucket in plan.buckets
        )

    def makes_state(self, grads: Mapping[int, Tensor | None]) -> bool:
        """Whether a weight has a gradient and no state yet.

        Args:
            grads: What ``gradients`` returned.
        """
        return any(
            not self._state.get(unit.params[0]) and any(grads.get(i) is not None for i in places)
            for unit in self._units
            for places in (unit.positions,)
        )

    def clocks_of(self, team: Team) -> int:
        """A number that differs where the clocks of units that ask other ranks of a team do."""
        asking = (
            unit for unit in self._running if unit.placed is not None and unit.placed.runs_on_shards
        )
        entries = (
            (self._state.get(unit.params[0], {}), unit)
            for unit in (*asking, *(self.replicas.units if self.replicas else ()))
            if (self._team(unit) or self.team_of.get(unit.positions[0])) is team
        )
        keys = [(entry.get(u.step_key, 0), entry.get(u.refreshed_key, 0)) for entry, u in entries]
        return hash(tuple(keys)) & 0x7FFFFFFE

    def step(
        self,
        optimizer: StackedOptimizer,
        grads: Mapping[int, Tensor | None],
        agreed: Agreement,
        plain: Callable[[], None],
    ) -> None:
        """Step plain units, then all others with a finite gradient, team after team.

        Args:
            optimizer: The optimizer.
            grads: What ``gradients`` returned.
            agreed: What all ranks know of them.
            plain: Steps the plain units.

        Raises:
            RankError: If another rank has failed.
            Exception: What a rule has raised here, after the others know of it.
        """
        mask = [grads.get(i) is not None for i in range(len(self._plan.flat_params))]
        self._prepare_together(mask, grads, agreed)
        failure: Exception | None = None
        informed = set[Team | None]()
        for team, stage in self._stages(optimizer, grads, agreed, mask, plain):
            if failure is not None and team in informed:  # all of its ranks have stopped
                continue
            self._is_known = False
            try:
                stage(failure)
            except Exception as error:
                failure = failure or error
                self._is_known |= isinstance(error, RankError)
            if failure is not None and self._is_known:
                informed.add(team)
        if failure is not None:  # what no other team was sent since, it learns of next time
            self.untold = not informed.issuperset(self._unit_teams.values())
            raise failure

    def others_know(self) -> None:
        """Note that the team of the present part of the step knows of an exception."""
        self._is_known = True

    def _stages(
        self,
        optimizer: StackedOptimizer,
        grads: Mapping[int, Tensor | None],
        agreed: Agreement,
        mask: list[bool],
        plain: Callable[[], None],
    ) -> Iterator[tuple[Team | None, Stage]]:
        """Parts of a step, in one order on all ranks, each with the team that sends in it.

        Each takes an exception of this process of which its team does not know yet, and tells it if
        it sends anything.
        """
        yield None if self.replicas is None else self.replicas.team, lambda _: plain()
        for bucket in self.held_plan.buckets:
            placed = bucket.unit.placed
            if placed is not None and not placed.runs_on_shards:
                yield None, partial(self._run_alone, optimizer, bucket, grads, agreed)
        for team, loads in self.loads:
            buckets = [b for b in self.held_plan.buckets if self._team(b.unit) is team]
            on_shards = [b for b in buckets if b.unit.placed and b.unit.placed.runs_on_shards]
            for wave in bucket_waves(on_shards):
                yield team, partial(self._run_together, optimizer, team, wave, grads, agreed)
            present = [
                load
                for load in loads
                if any(mask[i] for i in load.positions) and agreed.bad.isdisjoint(load.positions)
            ]
            for loads_of_wave in _waves(present, self._state, self._plan.flat_params):
                args = team, loads_of_wave, grads, agreed, mask
                yield team, partial(self._travel, optimizer, *args)

    def _prepare_together(
        self, mask: list[bool], grads: Mapping[int, Tensor | None], agreed: Agreement
    ) -> None:
        """Prepare; where a rank makes state, and may lack the memory, all hear how it went."""
        if not agreed.step[MAKES]:
            self._prepare(mask, grads)
            return
        before, failure = snapshot(self._state), None
        try:
            self._prepare(mask, grads)
        except Exception as error:
            failure = error
        found = tell(self.teams, failure)
        if found is not None:
            self.held_plan.mask = None
            roll_back(self._state, before)
            raise found

    def _prepare(self, mask: list[bool], grads: Mapping[int, Tensor | None]) -> None:
        """Allocate state as DTensors, put strange layouts right, and sort what runs on parts."""
        plan = self._plan
        self.held_plan.stack_keys, before = plan.stack_keys, self.held_plan.stack_keys
        if before != plan.stack_keys or self.held_plan.is_stale(mask, self.held_state):
            self.held_plan.mask = None
            for unit in self._running:
                self._allocate(unit, mask)
            self.held_plan.rebuild(mask, self.held_state)
            self._rendezvous_of.clear()
            self._learnt.clear()
        for _, loads in self.loads:
            for load in loads:
                for unit in load.units:
                    self._allocate(unit, mask)
        self._bound = [
            (entry, key, X)
            for unit in self._units
            for p in unit.params
            for entry in (self._state.get(p, {}),)
            for key, X in entry.items()
            if isinstance(X, Tensor)
        ]

    def holds_its_tensors(self) -> bool:
        """Whether the state of sharded weights has the tensors that the last step left there."""
        return all(entry.get(key) is X for entry, key, X in self._bound)

    def _allocate(self, unit: Unit, mask: Sequence[bool]) -> None:
        if any(mask[i] for i in unit.positions):
            unit.allocate(self._state, self._plan.rule(unit))
            settle(unit, self._state)

    def _run_alone(
        self,
        optimizer: StackedOptimizer,
        bucket: Bucket,
        grads: Mapping[int, Tensor | None],
        agreed: Agreement,
        failure: Exception | None,
    ) -> None:
        """Step a bucket whose matrices are whole where they are."""
        if failure is not None:
            return
        bucket.nonzero_positions = agreed.nonzero
        refuse_zero_weights([bucket], self._groups, agreed.bad, optimizer._describe)
        if bucket.indices:
            run_bucket(optimizer, self.held_plan, bucket, grads, agreed.bad)
        else:
            self._pass_over(bucket, agreed)

    def _run_together(
        self,
        optimizer: StackedOptimizer,
        team: Team,
        wave: Sequence[Bucket],
        grads: Mapping[int, Tensor | None],
        agreed: Agreement,
        failure: Exception | None,
    ) -> None:
        """Step buckets that run on shards, and ask other ranks together."""
        rendezvous, runs = self._rendezvous(team), list[tuple[Bucket, Hashable, Run]]()
        for bucket in wave:
            placed, rule = bucket.unit.placed, self._plan.rule(bucket)
            assert placed is not None
            bucket.nonzero_positions = agreed.nonzero
            if not bucket.indices:  # no rank of the team has any of its experts
                if failure is None:
                    self._pass_over(bucket, agreed)
                continue
            bucket.reductions = [
                ShardReductions(
                    *(rendezvous, bucket, i, cut, placed.shares and rule.needs_full_matrix),
                    is_counted=layout.is_first_replica or not placed.shares,
                )
                for i, (cut, layout) in enumerate(zip(placed.cut, placed.layouts, strict=True))
            ]
            run = partial(run_bucket, optimizer, self.held_plan, bucket, grads, agreed.bad)
            runs.append((bucket, refreshes_now(self.held_plan, bucket), run))
        try:
            rendezvous.run(runs, failure, agreed.step[LEARNS])
        finally:
            self._is_known = rendezvous.is_known
        self._learnt.update((bucket, bool(phase)) for bucket, phase, _ in runs)

    def _pass_over(self, bucket: Bucket, agreed: Agreement) -> None:
        """Advance the clocks of units of which this process holds no matrix."""
        t, refreshed = bucket.clocks()
        if any(not agreed.bad.isdisjoint(unit.positions) for unit in bucket.units):
            return
        rule = self._plan.rule(bucket)
        if rule.refresh_due(t, refreshed, bucket.unit.shift) and bucket.nonzero([None], 0):
            bucket.set_refreshed(t)
        bucket.set_step(t)

    def _rendezvous(self, team: Team) -> Rendezvous:
        return self._rendezvous_of.setdefault(id(team), Rendezvous(team, self._pieces_of))

    def _pieces_of(
        self, bucket: Bucket, number: int, sides: torch.Size, dtype: torch.dtype
    ) -> list[Piece]:
        """Matrices of a member of a bucket, as its rule sees them.

        Args:
            bucket: The bucket.
            number: Number of the member.
            sides: Rows and columns that this process holds; a side that is not cut may have any
                length, as that of a factor has.
            dtype: Dtype of the matrices.
        """
        units = [self._whole_unit[own] for own in bucket.units]
        return [x for unit in units for x in self._pieces_of_unit(unit, number, sides, dtype)]

    def _pieces_of_unit(
        self, unit: Unit, number: int, sides: torch.Size, dtype: torch.dtype
    ) -> list[Piece]:
        """The same of one unit."""
        placed = unit.placed
        assert placed is not None
        boxes, shape = _matrix_boxes(unit, number), unit.sides(number)
        for d, letter in enumerate("mn"):
            if letter not in placed.cut[number] and sides[d] != shape[d]:
                shape = (sides[0], shape[1]) if d == 0 else (shape[0], sides[1])
                whole = (0, sides[d])
                boxes = tuple((whole, box[1]) if d == 0 else (box[0], whole) for box in boxes)
        on_wire = self._comm_dtype(unit) or dtype
        return [Piece(owner, boxes, shape, on_wire) for owner in self._owner_of[unit]]

    def _comm_dtype(self, unit: Unit) -> torch.dtype | None:
        name = self._groups[unit.group].get("comm_dtype")
        return None if name is None else getattr(torch, name)

    # travelling -----------------------------------------------------------------------------------

    def _travel(
        self,
        optimizer: StackedOptimizer,
        team: Team,
        loads: Sequence[Load],
        grads: Mapping[int, Tensor | None],
        agreed: Agreement,
        mask: list[bool],
        failure: Exception | None,
    ) -> None:
        """Send loads to their owners, step them there, and send weights and state back."""
        params, state = self._plan.flat_params, self._state
        parcels = [
            _Parcel(
                load, grads, params, state, self._comm_dtype(load.units[0]), self._refreshed(load)
            )
            for load in loads
        ]
        pieces = [x for parcel in parcels for x in parcel.pieces]
        there = self._exchange(team, pieces, parcels[0].held[0].device)
        self._is_known = True  # whatever happens from here on travels with what is sent
        whole = there.to_owners([x for parcel in parcels for x in parcel.held], failure is not None)
        if failure is not None:
            return
        try:
            first = 0
            here: list[tuple[_Parcel, dict[int, Tensor]]] = []
            for parcel in parcels:
                count = len(parcel.pieces)
                if parcel.load.owner in (None, team.rank):
                    here.append((parcel, {k: whole[first + k] for k in range(count)}))
                first += count
            if here:
                self._step_whole(optimizer, here, grads, mask)
        except Exception as error:
            failure = error
        self._return(team, parcels, there, whole, failure)
        self._set_clocks(parcels, agreed)

    def _exchange(self, team: Team, pieces: list[Piece], device: torch.device) -> Exchange:
        """The exchange of these pieces: that of an earlier step if they are the same."""
        size = sum(piece.dtype.itemsize for piece in pieces)
        known = self._exchanges.setdefault((id(team), device, len(pieces), size), [])
        for exchange in known:
            if exchange.pieces == pieces:
                return exchange
        del known[:-3]
        known.append(Exchange(team, pieces, device))
        return known[-1]

    def _refreshed(self, load: Load) -> list[int]:
        """Clocks of refreshes that only the owner can tell, of a load with several units."""
        if len(load.units) == 1 or not self._plan.rule(load.units[0]).refresh_interval:
            return []
        return [self._state[u.params[0]].get(u.refreshed_key, 0) for u in load.units]

    def _step_whole(
        self,
        optimizer: StackedOptimizer,
        here: Sequence[tuple[_Parcel, dict[int, Tensor]]],
        grads: Mapping[int, Tensor | None],
        mask: list[bool],
    ) -> None:
        """Step whole weights that are here, as on one process."""
        plan, units = self._plan, list[Unit]()
        flat: list[Tensor | None] = [None] * len(mask)
        state: dict[Tensor, dict[str, Any]] = {}
        units_by_load: dict[Load, list[Unit]] = {}
        for parcel, whole in here:
            load, named = parcel.load, dict(zip(parcel.names, whole.values(), strict=True))
            Ws = tuple(named[i, "weight"] for i in range(len(load.positions)))
            for i, (position, W) in enumerate(zip(load.positions, Ws, strict=True)):
                entry = self._state[plan.flat_params[position]]
                state[W] = {key: x for key, x in entry.items() if not isinstance(x, Tensor)}
                G = grads[position]
                if G is not None:
                    flat[position] = named[i, "grad"].to(G.dtype)
                state[W].update(
                    (key, X)
                    for (j, key), X in named.items()
                    if j == i and key not in ("grad", "weight")
                )
            units_by_load[load] = [replace(unit, params=Ws, placed=None) for unit in load.units]
            units += units_by_load[load]
        own = StepPlan([], plan.settings, [], [], plan.rules, plan.groups_of_rules, units)
        own.stack_keys = plan.stack_keys
        own.rebuild(mask, state)
        refuse_zero_weights(own.buckets, self._groups, set(), optimizer._describe)
        count = len(own.buckets)
        optimizer._step_matrices(own, flat, Findings(stacks=[None] * count, unread=[None] * count))
        for parcel, whole in here:  # a slab has replaced the tensors of small state
            load = parcel.load
            for k, (i, name) in enumerate(parcel.names):
                if (i, name) == CLOCKS:
                    for j, unit in enumerate(units_by_load[load]):
                        whole[k][j] = state[unit.params[0]].get(unit.refreshed_key, 0)
                elif name not in ("grad", "weight"):
                    whole[k].copy_(state[units_by_load[load][0].params[i]][name])

    def _return(
        self,
        team: Team,
        parcels: Sequence[_Parcel],
        there: Exchange,
        whole: dict[int, Tensor],
        failure: Exception | None,
    ) -> None:
        """Send weights and state back, and write them; nothing is written if a rank has failed."""
        numbers, first = list[int](), 0
        for parcel in parcels:
            numbers += [first + k for k in parcel.returns]
            first += len(parcel.pieces)
        held = [x for parcel in parcels for x in parcel.held]
        back = self._exchange(team, [there.pieces[k] for k in numbers], there.device)
        results = {j: whole[k] for j, k in enumerate(numbers) if k in whole}
        back.from_owners(results, [held[k] for k in numbers], failure is not None)
        if failure is not None:
            raise failure

    def _set_clocks(self, parcels: Sequence[_Parcel], agreed: Agreement) -> None:
        """Advance the clocks of units that were stepped, on all ranks."""
        for parcel in parcels:
            known = None if parcel.clocks is None else parcel.clocks.tolist()
            for j, unit in enumerate(parcel.load.units):
                entry = self._state[unit.params[0]]
                rule = self._plan.rule(unit)
                t, refreshed = entry[unit.step_key] + 1, entry.get(unit.refreshed_key, 0)
                if known is not None:
                    entry[unit.refreshed_key] = known[j]
                elif rule.refresh_due(t, refreshed, unit.shift):
                    if not agreed.nonzero.isdisjoint(unit.positions):
                        entry[unit.refreshed_key] = t
                entry[unit.step_key] = t

    # figures --------------------------------------------------------------------------------------

    def plan_of(self, position: int) -> str:
        """The plan of a parameter."""
        if self.replicas is not None and position not in self.layouts:
            return self.replicas.plan_of(position)
        for unit in self._plan.units:
            if position in unit.positions and unit.placed is not None:
                return unit.placed.plan
        return "local"

    def bytes_per_step(self) -> dict[int, int]:
        """Bytes that this rank sends for each parameter in an ordinary step."""
        sent = {} if self.replicas is None else self.replicas.bytes_per_step()
        for unit in self._owner_of:
            placed, team = unit.placed, self._team(unit)
            if placed is not None and placed.runs_on_shards and team is not None:
                requests = self._requests_of(unit)
                for i, position in enumerate(unit.positions):
                    own = [x for x in requests if x.number == i]
                    size = self._bytes_on_shards(team, unit, own)
                    sent[position] = sent.get(position, 0) + size
        for team, loads in self.loads:
            for load in loads:
                for i, position in enumerate(load.positions):
                    sent[position] = self._bytes_of_load(team, load, i)
        return sent

    def _requests_of(self, unit: Unit) -> list[Sent]:
        """What a unit whose rule runs on shards asks for in an ordinary step."""
        placed, rule = unit.placed, self._plan.rule(unit)
        assert placed is not None
        shares = placed.shares and rule.needs_full_matrix
        sides = tuple(unit.sides(i) for i in range(len(unit.params)))
        kinds = tuple((p.dtype, p.requires_grad) for p in unit.params)
        # weights of one shape ask alike; the rule may get other values in mid-run
        key = repr(rule), unit.key[:3], sides, placed.cut, kinds, shares
        if key not in self._requests:
            self._requests[key] = traffic_of(unit, placed.cut, shares, rule)
        return self._requests[key]

    def _bytes_on_shards(self, team: Team, unit: Unit, requests: Sequence[Sent]) -> int:
        """Bytes that this rank sends for a unit whose rule runs on shards."""
        total, count = 0, _count(unit)
        for number, kind, shape, dtype in requests:
            if kind != WHOLE:  # each rank sends a part to all others, twice
                size = count * math.prod(shape) * dtype.itemsize
                total += 2 * size * (len(team) - 1) // len(team)
                continue
            pieces = self._pieces_of_unit(unit, number, torch.Size(shape), dtype)
            exchange = Exchange(team, pieces, torch.device("cpu"))
            total += exchange.bytes_to_owners() + exchange.bytes_from_owners()
        return total

    def _bytes_of_load(self, team: Team, load: Load, i: int) -> int:
        p, layout = self._plan.flat_params[load.positions[i]], load.layouts[i]
        parts = (
            [(layout, self._comm_dtype(load.units[0]) or p.dtype, False)] if p.requires_grad else []
        )
        parts.append((layout, p.dtype, True))
        known = dict[str, tuple[Layout, torch.dtype, bool]]()
        for unit in load.units:
            t = int(self._state.get(unit.params[0], {}).get(unit.step_key, 0)) + 1
            if not self._plan.rule(unit).state_since_at(unit.block_position, t):
                continue
            for key, (_, _, dtype) in unit.expected_state(i).items():
                of_state = unit.state_layout(i, key)
                if of_state is not None:
                    known[key] = of_state, dtype, True
        total = 0
        for of_piece, dtype, returns in [*parts, *known.values()]:
            boxes = of_piece.over(load.axes).boxes
            exchange = Exchange(
                team, [Piece(load.owner, boxes, of_piece.shape, dtype)], torch.device("cpu")
            )
            total += exchange.bytes_to_owners()
            total += exchange.bytes_from_owners() if returns else 0
        return total


def _ranks_of(unit: Unit) -> tuple[int, ...]:
    """The ranks among which a unit is divided."""
    placed = unit.placed
    assert placed is not None
    return placed.layouts[0].over(placed.axes).ranks


def _count(unit: Unit) -> int:
    """Matrices that the ranks of a unit's team share: of experts those of which they have parts."""
    placed = unit.placed
    assert placed is not None and placed.held is not None
    return placed.held[0].view.k


def spread_positions(groups: Sequence[Mapping[str, Any]]) -> set[int]:
    """Flat positions of parameters whose replicas share the work."""
    flags = [bool(g.get("spread_replicas")) for g in groups for _ in g["params"]]
    return {i for i, spreads in enumerate(flags) if spreads}


def settle(unit: Unit, state: State) -> None:
    """Lay state as its unit wants it, where another plan or other code has left it otherwise."""
    for i, p in enumerate(unit.params):
        entry = state.get(p, {})
        for key in unit.expected_state(i):
            X, layout = entry.get(key), unit.state_layout(i, key)
            if layout is None or not isinstance(X, Tensor):
                continue
            if not layout.fits(X):
                entry[key] = layout.redistribute(X)


def _matrix_boxes(unit: Unit, i: int) -> tuple[Box, ...]:
    """Per rank, which rows and columns it holds of each matrix of member i, as the rule does."""
    placed = unit.placed
    assert placed is not None
    return tuple(held.box(unit.transposed[i]) for held in placed.by_rank[i])


def _waves(loads: Sequence[Load], state: State, params: Sequence[Tensor]) -> Iterator[list[Load]]:
    """Loads whose owners have memory for them at the same time."""
    wave, used = list[Load](), dict[int | None, int]()
    for load in loads:
        size = sum(
            3 * params[i].numel() * params[i].element_size()
            + sum(
                X.numel() * X.element_size()
                for X in state[params[i]].values()
                if isinstance(X, Tensor)
            )
            for i in load.positions
        )
        if used.get(load.owner) and used[load.owner] + size > MAX_WAVE_BYTES:
            yield wave
            wave, used = [], {}
        wave.append(load)
        used[load.owner] = used.get(load.owner, 0) + size
    if wave:
        yield wave
