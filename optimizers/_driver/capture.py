"""Steps that a CUDA graph replays: what changes from step to step is read from the device.

Under ``capturable=True`` a step reads clocks, learning rates and weight decays of matrices from
``Numbers``, which the host fills before the step, or before a replay of it. State, clocks and
checkpoints stay as they are without it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._core.rule import Rule
from .._core.validation import check
from .adamw import Work, decay_of
from .buckets import Bucket, StepPlan
from .decay import Decay
from .units import State, Unit
from .write import Run

Groups = Sequence[Mapping[str, Any]]
WAITING = ("raise", "skip_step")
"""Values of ``nonfinite`` under which the host reads flags within the step."""
AGAIN = "capture the step again"
_HELD = ("cautious", "decay_schedule", "decay_lr", "weight_radius")
_ADAMW = ("adamw_lr_ratio", "adamw_betas", "adamw_eps", "foreach", "fused")


def refuse_capturable(group: Mapping[str, Any], rule: Rule) -> None:
    """Raise under ``capturable=True`` for matrices whose step no graph can replay.

    Args:
        group: A group whose values were checked.
        rule: The rule of matrices in it.

    Raises:
        ValueError: With the option that is in the way.
    """
    if not group.get("capturable"):
        return
    obstacle = rule.capture_obstacle()
    if group.get("nonfinite") in WAITING:
        obstacle = f"nonfinite={group['nonfinite']!r}, for which the host reads gradients"
    elif group.get("state_dtype") == "int8":
        obstacle = "state_dtype='int8', whose codes are drawn by the host's clock"
    check(
        obstacle is None,
        f"capturable=True is not supported by {obstacle}; leave it out for these matrices",
    )


def is_capturable(groups: Groups) -> bool:
    """Whether a group is to be replayed."""
    return any(group.get("capturable") for group in groups)


class Numbers:
    """What the buckets of a plan read on the device, at addresses that last.

    Attributes:
        buckets: The buckets that read.
    """

    def __init__(self, plan: StepPlan, groups: Groups) -> None:
        self.buckets = [b for b in plan.buckets if groups[b.group].get("capturable")]
        self._numbers = {id(bucket): j for j, bucket in enumerate(self.buckets)}
        self._places: dict[torch.device, dict[Hashable, int]] = {}
        for j, bucket in enumerate(self.buckets):
            device = bucket.unit.params[0].device
            for unit in bucket.units:
                for key in ((j, "t"), (j, "age"), (unit.group, "lr"), _decay_key(unit)):
                    self._add(device, key)
        for i, positions in enumerate(plan.adamw_positions):
            if groups[i].get("capturable"):
                for position in positions:
                    self._add(plan.flat_params[position].device, (i, "lr"))
        self._values = {
            device: torch.zeros(len(places), dtype=torch.float64, device=device)
            for device, places in self._places.items()
        }

    def _add(self, device: torch.device, key: Hashable) -> None:
        places = self._places.setdefault(device, {})
        places.setdefault(key, len(places))

    def serves(self, plan: StepPlan, groups: Groups) -> bool:
        """Whether these are the numbers of a plan as it is now."""
        buckets = [b for b in plan.buckets if groups[b.group].get("capturable")]
        return len(buckets) == len(self.buckets) and all(
            a is b for a, b in zip(buckets, self.buckets, strict=True)
        )

    def fill(self, groups: Groups) -> None:
        """Copy what the next update needs to the devices, without waiting for them."""
        for device, places in self._places.items():
            values = [self._value(key, groups) for key in places]
            pinned = device.type == "cuda" and torch.cuda.is_available()
            host = torch.tensor(values, dtype=torch.float64, device="cpu", pin_memory=pinned)
            self._values[device].copy_(host, non_blocking=True)

    def _value(self, key: Any, groups: Groups) -> float:
        number, kind = key[0], key[1]
        if kind == "t":
            return float(self.buckets[number].clocks()[0])
        if kind == "age":
            t, refreshed = self.buckets[number].clocks()
            return float(t - refreshed + 1)
        if kind == "decay":
            return float(groups[number]["weight_decay"]) * float(key[2])
        lr = groups[number]["lr"]
        # a learning rate on a device is read there, see lr()
        return 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)

    def _read(self, device: torch.device, key: Hashable) -> Tensor:
        return self._values[device][self._places[device][key]]

    def lr(self, index: int, groups: Groups, device: torch.device) -> Tensor:
        """The learning rate () of a group: the user's own tensor if it is on a device."""
        lr = groups[index]["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return lr.reshape(())
        return self._read(device, (index, "lr"))

    def has(self, bucket: Bucket) -> bool:
        """Whether a bucket reads here; the single units of a stack with a bad gradient do not."""
        return id(bucket) in self._numbers

    def clocks(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Number of the update, and that since the refresh from 1, each (1, 1, 1) float32."""
        j, device = self._numbers[id(bucket)], bucket.unit.params[0].device
        t, age = (self._read(device, (j, kind)).float().view(1, 1, 1) for kind in ("t", "age"))
        return t, age

    def runs(self, bucket: Bucket, groups: Groups) -> list[Run]:
        """Learning rate and decay of the units of a bucket; those of a group stand together."""
        device, runs = bucket.unit.params[0].device, list[Run]()
        last: Hashable = None
        for j, unit in enumerate(bucket.units if bucket.spans else bucket.units[:1]):
            stop = j + 1 if bucket.spans else len(bucket.units)
            if runs and _decay_key(unit) == last:
                runs[-1] = runs[-1]._replace(ks=slice(runs[-1].ks.start, stop))
                continue
            last = _decay_key(unit)
            decay = Decay.of(groups[unit.group], self._read(device, last))
            runs.append(Run(slice(j, stop), self.lr(unit.group, groups, device), decay))
        return runs


def _decay_key(unit: Unit) -> Hashable:
    return unit.group, "decay", unit.decay


@dataclass
class Captured:
    """A step inside a graph.

    Attributes:
        numbers: What it reads.
        plan: The plan that it ran.
        mask: Which parameters had a gradient.
        settings: Per group, the values that the graph holds.
    """

    numbers: Numbers
    plan: StepPlan
    mask: list[bool]
    settings: list[dict[str, Any]] = field(default_factory=list)

    def refuse_changes(self, plan: StepPlan, groups: Groups, state: State) -> None:
        """Raise for what has changed since, so that the graph steps by other values or tensors.

        Raises:
            RuntimeError: Naming it.
        """
        for i, (old, new) in enumerate(
            zip(self.settings, held_settings(plan, groups), strict=False)
        ):
            changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
            if changed:
                raise RuntimeError(
                    f"{sorted(changed)[0]} of parameter group {i} has changed since the capture, "
                    f"and the graph holds its old value; {AGAIN}"
                )
        same = plan is self.plan and len(groups) == len(self.settings)
        if same and plan.is_stale(self.mask, state):
            plan.rebuild(self.mask, state)
        units = {tuple(map(id, bucket.units)) for bucket in plan.buckets}
        same = same and all(
            bucket.holds_its_tensors() and tuple(map(id, bucket.units)) in units
            for bucket in self.numbers.buckets
        )
        if not same:
            raise RuntimeError(
                "weights, their state, or which of them step together have changed since the "
                f"capture, and the graph holds the old ones; {AGAIN}"
            )

    def refresh_due(self) -> bool:
        """Whether the next update makes a new basis, or what else lasts for a window."""
        return any(_refresh_due(self.plan, bucket) for bucket in self.numbers.buckets)

    def advance(self, groups: Groups) -> None:
        """Fill in the numbers of the next update, and count it."""
        self.numbers.fill(groups)
        for bucket in self.numbers.buckets:
            bucket.set_step(bucket.clocks()[0])


def _refresh_due(plan: StepPlan, bucket: Bucket) -> bool:
    return plan.rule(bucket).refresh_due(*bucket.clocks(), bucket.unit.shift)


def held_settings(plan: StepPlan, groups: Groups) -> list[dict[str, Any]]:
    """Per group the values that a graph holds: all but lr and the decay of matrices."""
    found = []
    for group, settings, positions in zip(groups, plan.settings, plan.adamw_positions, strict=True):
        held = {**settings, **{key: group.get(key) for key in _HELD}}
        if positions:
            held.update((key, group.get(key)) for key in _ADAMW)
        if positions and any(group.get("decays") or [1.0]):
            held["weight_decay"] = decay_of(group)  # torch's AdamW takes a number
        found.append(held)
    return found


def check_capture(
    plan: StepPlan,
    grads: Sequence[Tensor | None],
    adamw_steps: Sequence[Work],
    groups: Groups,
    state: State,
) -> None:
    """Raise before the capture of a step that cannot be replayed; nothing has changed then.

    Args:
        plan: The plan.
        grads: Gradients of all parameters.
        adamw_steps: What AdamW steps.
        groups: The groups.
        state: The optimizer's state.

    Raises:
        RuntimeError: With what to do.
    """
    text, mask = None, [grad is not None for grad in grads]
    if plan.shards is not None:
        text = "weights whose work ranks share; leave capturable out"
    elif any(work.new for work in adamw_steps) or plan.is_stale(mask, state):
        text = "state that is still to be made; call step() once, with the same gradients, before"
    else:
        for bucket in plan.buckets:
            if not groups[bucket.group].get("capturable"):
                text = "matrices of a group without capturable=True; set it in all groups"
            elif _refresh_due(plan, bucket):
                t = bucket.clocks()[0]
                text = f"update {t}, which makes a new basis; call step() once more before"
    if text is not None:
        raise RuntimeError(f"a CUDA graph cannot hold {text}")
