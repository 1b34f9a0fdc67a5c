"""Plain weights that are equal on all ranks of a process group, which share the work for them.

Under DistributedDataParallel every rank has whole weights and equal gradients, and would do equal
work. With ``process_group`` the ranks agree on flags as those of sharded weights do, each computes
its share of what rules ask of whole matrices, and all get the results: the bits are those of every
rank doing everything.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .agreement import LEARNS, Agreement
from .bucket_runs import bucket_waves, refreshes_now, run_bucket, share_out
from .buckets import Bucket, StepPlan
from .exchange import Exchange, Piece, Team
from .finite import Findings
from .layout import is_sharded
from .rendezvous import Rendezvous, Run, ShardReductions
from .shard_plan import work_of
from .traffic import Sent, traffic_of
from .units import Unit

if TYPE_CHECKING:
    from .optimizer import StackedOptimizer


def checked_group(group: Any, name: str = "process_group") -> Any:
    """The process group of a ProcessGroup or a 1-D DeviceMesh; None for None.

    Args:
        group: What was passed.
        name: The name of the argument.

    Raises:
        ValueError: If it is neither, or this process is not in it.
    """
    if group is None:
        return None
    import torch.distributed as dist

    wanted = f"{name} must be a ProcessGroup of this process or a 1-D DeviceMesh"
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{wanted}; call torch.distributed.init_process_group() first")
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(f"{wanted}, got a mesh of {group.ndim} axes; pass mesh[dim] of one")
        if group.get_coordinate() is None:
            raise ValueError(f"{wanted}, got a mesh without it; leave {name} out here")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"{wanted}, got {type(group).__name__}; leave it out for none")
    return group


class Replicas:
    """What of a plan is plain and shared by the ranks of a group.

    Args:
        plan: The plan, with all its units.
        groups: The parameter groups.
        group: The process group.

    Attributes:
        team: Its ranks.
        positions: Flat positions of plain parameters, on whose gradients the ranks agree.
    """

    def __init__(self, plan: StepPlan, groups: Sequence[Mapping[str, Any]], group: Any) -> None:
        params = plan.flat_params
        self.positions = [i for i, p in enumerate(params) if not is_sharded(p)]
        kinds = [params[i].device.type for i in self.positions]
        self.team = Team.of_group(group, kinds[0] if kinds else "cpu")
        self._plan, self._groups = plan, groups
        self._rendezvous = Rendezvous(self.team, self._pieces_of)
        self._buckets, self._learnt = plan.buckets, set[tuple[Bucket, bool]]()
        self._owner_of = dict[Unit, tuple[int, ...]]()
        shared = [unit for unit in plan.units if self._shares(unit)]
        jobs = [
            (work_of(unit), order, unit)
            for order, unit in enumerate(shared)
            for _ in range(unit.views[0].k)
        ]
        for rank, unit in share_out(jobs, len(self.team)):
            self._owner_of[unit] = (*self._owner_of.get(unit, ()), rank)

    def _shares(self, unit: Unit) -> bool:
        """Whether ranks share the work for a unit: something is asked of its whole matrices."""
        rule, choice = self._plan.rule(unit), self._groups[unit.group].get("plan")
        if unit.placed is not None or choice not in ("auto", "owner"):
            return False
        if rule.yields_batched_calls or rule.writes_in_refresh:
            return False
        return rule.needs_full_matrix or bool(rule.refresh_interval)

    @property
    def units(self) -> Iterable[Unit]:
        """Units whose work is shared."""
        return self._owner_of.keys()

    def learns(self) -> bool:
        """Whether some bucket has not run yet, so that nobody knows what it will ask."""
        if self._buckets is not self._plan.buckets:  # sorted anew
            self._buckets, self._learnt = self._plan.buckets, set()
            self._rendezvous = Rendezvous(self.team, self._pieces_of)
        return any((b, refreshes_now(self._plan, b)) not in self._learnt for b in self._shared())

    def _shared(self) -> list[Bucket]:
        return [b for b in self._plan.buckets if b.units[0] in self._owner_of]

    def gradients(self, grads: Sequence[Tensor | None]) -> dict[int, Tensor | None]:
        """Gradients of plain parameters."""
        return {i: grads[i] for i in self.positions}

    def step(
        self,
        optimizer: StackedOptimizer,
        grads: Sequence[Tensor | None],
        found: Findings,
        agreed: Agreement,
        tell: Callable[[], None],
    ) -> None:
        """Step all plain units: those whose work is not shared first.

        Args:
            optimizer: The optimizer.
            grads: Gradients of all parameters.
            found: What is known of them.
            agreed: What all ranks know of them.
            tell: Called when the other ranks know of an exception.
        """
        shared = self._shared()
        failure: Exception | None = None
        try:
            optimizer._step_matrices(self._plan, grads, found, leave_out={*map(id, shared)})
        except Exception as error:
            failure = error
        by_position = dict(enumerate(grads))
        for wave in bucket_waves(shared):
            runs = [self._run_of(optimizer, bucket, by_position, agreed) for bucket in wave]
            try:
                self._rendezvous.run(runs, failure, agreed.step[LEARNS])
            finally:
                if self._rendezvous.is_known:
                    tell()
            if failure is not None:
                break
            self._learnt.update((bucket, bool(phase)) for bucket, phase, _ in runs)
        if failure is not None:
            raise failure

    def _run_of(
        self,
        optimizer: StackedOptimizer,
        bucket: Bucket,
        grads: Mapping[int, Tensor | None],
        agreed: Agreement,
    ) -> tuple[Bucket, Hashable, Run]:
        rule = self._plan.rule(bucket)
        bucket.nonzero_positions = agreed.nonzero
        bucket.reductions = [
            ShardReductions(self._rendezvous, bucket, i, shares=rule.needs_full_matrix)
            for i in range(len(bucket.unit.params))
        ]
        run: Callable[[], None] = partial(
            run_bucket, optimizer, self._plan, bucket, grads, agreed.bad
        )
        return bucket, refreshes_now(self._plan, bucket), run

    def _pieces_of(
        self, bucket: Bucket, number: int, sides: torch.Size, dtype: torch.dtype
    ) -> list[Piece]:
        """Matrices of a bucket, which every rank has whole."""
        shape = tuple(sides)
        boxes = (tuple((0, side) for side in shape),) * len(self.team)
        owners = [rank for unit in bucket.units for rank in self._owner_of[unit]]
        return [Piece(owner, boxes, shape, dtype) for owner in owners]

    def plan_of(self, position: int) -> str:
        """``"owner"`` where whole matrices are sent in ordinary steps, else ``"local"``."""
        for unit in self._owner_of:
            if position in unit.positions and self._plan.rule(unit).needs_full_matrix:
                return "owner"
        return "local"

    def bytes_per_step(self) -> dict[int, int]:
        """Bytes that this rank sends for each plain parameter in an ordinary step."""
        sent: dict[int, int] = {}
        known: dict[Hashable, list[Sent]] = {}  # weights of one shape ask alike
        for unit, owners in self._owner_of.items():
            rule = self._plan.rule(unit)
            if not rule.needs_full_matrix:
                continue
            key = unit.rule, unit.key
            if key not in known:
                none = (frozenset[str](),) * len(unit.params)
                known[key] = traffic_of(unit, none, True, rule)
            for x in known[key]:
                box = tuple((0, side) for side in x.shape)
                pieces = [Piece(o, (box,) * len(self.team), x.shape, x.dtype) for o in owners]
                size = Exchange(self.team, pieces, torch.device("cpu")).bytes_from_owners()
                sent[unit.positions[0]] = sent.get(unit.positions[0], 0) + size
        return sent
