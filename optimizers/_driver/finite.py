"""Non-finite gradients: found before any state changes, for matrices and AdamW parameters alike.

Where the host waits for the flags, sums of gradients are read, and only what overflows or is bad is
looked at entry by entry. Elsewhere flags stay on the device, and are read in the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import LOW_PRECISION_DTYPES, cast_stack, fuses_passes, squares
from .._core.rule import Rule
from .adamw_write import has_device_clock
from .buckets import Bucket, StepPlan, max_abs, max_stack_bytes
from .param_groups import names_of
from .units import State

MAX_JOINED_NUMEL = 2**13
"""Largest gradient, in entries, that is summed together with others: a copy costs less then."""
MAX_JOIN_NUMEL = 2**22
"""Entries that are joined at most, which bounds the copy."""

Grads = Sequence[Tensor | None]
Groups = Sequence[Mapping[str, Any]]
Waits = Callable[[torch.device], bool]
"""Whether the host waits for the flags of a device within the step."""
Kind = tuple[torch.device, torch.dtype, str]
"""Device, dtype and size: "vector" and "small" are summed together, "large" is summed alone."""
Names = list[str | int]
"""Per parameter its name, or its position where it has none."""


class Owner(NamedTuple):
    """Whom an unread flag concerns.

    Attributes:
        param: The parameter, None if another unit of it counts already.
        clock: The parameter and key of the clock to set back, None if the device has done so.
    """

    param: Tensor | None
    clock: tuple[Tensor, str] | None


Unread = dict[torch.device, tuple[list[Tensor], list[Owner]]]
"""Per device, flags that the host has not read, and whom each concerns."""


class LateFlags:
    """Flags that are copied to the host while the step goes on, and read in the next step."""

    def __init__(self, finite: Tensor, owners: Sequence[Owner]) -> None:
        self._event = None
        self._owners = owners
        if finite.is_cuda:
            stream = torch.cuda.current_stream(finite.device)  # not that of the current device
            pinned = torch.empty(finite.shape, dtype=finite.dtype, device="cpu", pin_memory=True)
            finite = pinned.copy_(finite, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)
        self._finite = finite

    def bad_owners(self) -> list[Owner]:
        """Those whose gradient was not finite, every clock once."""
        if self._event is not None:
            self._event.synchronize()
        clocks = set[tuple[Tensor, str]]()
        owners = []
        for owner, finite in zip(self._owners, self._finite.tolist(), strict=True):
            if not finite:
                is_new = owner.clock is not None and owner.clock not in clocks
                owners.append(owner if is_new else owner._replace(clock=None))
                clocks.update((owner.clock,) if owner.clock is not None else ())
        return owners


def is_capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which no flag can reach the host."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@dataclass
class Findings:
    """What is known about the gradients of a step, before anything has changed.

    Attributes:
        bad: Positions of parameters whose gradient the host knows to be not finite.
        stacks: Per bucket, the stacked gradients for the update; None where the bucket is no
            stack, was not looked at, or all stacks so far exceed the byte budget of one.
        unread: Per bucket, per member (K,) numbers that are finite exactly if the gradients are,
            None for a member without gradient; None where the host has read them.
        squares: By bucket, what ``Member.squares`` is.
        adamw_flags: By position, the unread flags () of AdamW parameters.
        joined: Per device, the unread flags of all its AdamW parameters.
        stopped: Whether a gradient that another rank holds stops the whole step.
    """

    bad: set[int] = field(default_factory=set)
    stacks: list[list[Tensor | None] | None] = field(default_factory=list)
    unread: list[list[Tensor | None] | None] = field(default_factory=list)
    squares: dict[int, Tensor] = field(default_factory=dict)
    adamw_flags: dict[int, Tensor] = field(default_factory=dict)
    joined: list[tuple[list[int], Tensor]] = field(default_factory=list)
    stopped: bool = False

    def finite_units(self, j: int, bucket: Bucket) -> list[bool] | None:
        """Per unit of bucket j, whether its gradients are finite; None if not read yet."""
        if self.unread[j] is not None:
            return None
        if not self.bad:
            return [True] * len(bucket.units)
        return [self.bad.isdisjoint(unit.positions) for unit in bucket.units]

    def flag(self, j: int) -> Tensor | None:
        """Unread numbers (K,) of the units of bucket j, finite where all their gradients are."""
        present = [number for number in self.unread[j] or () if number is not None]
        return reduce(torch.maximum, present) if present else None  # a sum might overflow

    def late_flags(self, plan: StepPlan, groups: Groups) -> list[LateFlags]:
        """Start to copy all unread flags to the host, one tensor per device."""
        parts: Unread = {}
        self.add_unread(parts, plan, groups, group_indices(groups) if self.joined else ())
        return copied_to_host(parts)

    def add_unread(
        self, parts: Unread, plan: StepPlan, groups: Groups, group_of: Sequence[int]
    ) -> None:
        """Add all unread flags to those of other findings.

        Args:
            parts: What is added to.
            plan: The plan of these findings.
            groups: The groups.
            group_of: Per flat position, the index of its group.
        """
        for bucket, members in zip(plan.buckets, self.unread, strict=True):
            counts_on = groups[bucket.group].get("capturable")  # else clocks of a stack would part
            for i, number in enumerate(members or ()):
                if number is not None:
                    tensors, owners = parts.setdefault(number.device, ([], []))
                    tensors.append(number.isfinite())
                    owners += [
                        Owner(
                            unit.params[i] if unit.number == 0 else None,
                            None if counts_on else (unit.params[0], unit.step_key),
                        )
                        for unit in bucket.units
                    ]
        for positions, finite in self.joined:
            tensors, owners = parts.setdefault(finite.device, ([], []))
            tensors.append(finite)
            for i in positions:
                p = plan.flat_params[i]
                on_device = has_device_clock(groups[group_of[i]])
                owners.append(Owner(p, None if on_device else (p, "step")))


def copied_to_host(parts: Unread) -> list[LateFlags]:
    """Start to copy unread flags to the host, one tensor per device."""
    if not parts or is_capturing():
        return []
    return [LateFlags(torch.cat(tensors), owners) for tensors, owners in parts.values()]


def inspect_grads(plan: StepPlan, grads: Grads, groups: Groups, waits: Waits) -> Findings:
    """Look at every gradient of a step once, unless its group has ``nonfinite="ignore"``.

    The host reads where ``waits`` says so, where a matrix must not be refreshed with a bad
    gradient, and where the answer decides about the whole step.

    Args:
        plan: What this step runs.
        grads: Gradients of all parameters.
        groups: The parameter groups.
        waits: Whether the host waits for a device.
    """
    found, sums = Findings(), _Sums(grads)
    modes = [group["nonfinite"] for group in groups]
    reads = ["skip_step" in modes or mode == "raise" for mode in modes]
    _inspect_buckets(found, sums, plan, grads, modes, reads, waits)
    unread: dict[torch.device, list[int]] = {}
    small_by_kind: dict[Kind, list[int]] = {}
    for mode, read, parts in zip(modes, reads, _adamw_parts(plan), strict=True):
        for kind, part in parts.items() if mode != "ignore" else ():
            if not (read or waits(kind[0])):
                unread.setdefault(kind[0], []).extend(i for i in part if grads[i] is not None)
            elif kind[2] == "large":
                sums.add_large(part)
            else:
                small_by_kind.setdefault(kind, []).extend(part)
    for kind, joined in small_by_kind.items():
        sums.add_small(joined, kind[2] == "vector")
    for positions in unread.values():
        if positions:
            flags = _flags_of([G for i in positions if (G := grads[i]) is not None])
            found.joined.append((positions, flags))
            found.adamw_flags.update(zip(positions, flags.unbind(), strict=True))
    found.bad = sums.bad()
    return found


def _adamw_parts(plan: StepPlan) -> list[dict[Kind, list[int]]]:
    """Per group, the positions of its AdamW parameters of each device, dtype and size."""
    if plan.adamw_parts is None:
        plan.adamw_parts = []
        for positions in plan.adamw_positions:
            parts: dict[Kind, list[int]] = {}
            for i in positions:
                if plan.shards is not None and i in plan.shards.layouts:
                    continue  # all ranks look at these together
                p = plan.flat_params[i]
                is_large = p.numel() > MAX_JOINED_NUMEL
                size = "large" if is_large else "vector" if p.dim() == 1 else "small"
                parts.setdefault((p.device, p.dtype, size), []).append(i)
            plan.adamw_parts.append(parts)
    return plan.adamw_parts


def _inspect_buckets(
    found: Findings,
    sums: _Sums,
    plan: StepPlan,
    grads: Grads,
    modes: Sequence[str],
    reads: Sequence[bool],
    waits: Waits,
) -> None:
    """Stack what runs as a stack, and sum or flag the gradients of all buckets."""
    used = 0
    cache: dict[int, Tensor] = {}  # units that a view cuts out of one parameter share its flag
    for bucket in plan.buckets:
        members = [bucket.grads_of(i, grads) if has else [] for i, has in enumerate(bucket.present)]
        if modes[bucket.unit.group] == "ignore":
            found.stacks.append(None)
            found.unread.append(None)
            continue
        device = bucket.unit.params[0].device
        rule = plan.rule(bucket)
        read = waits(device) or any(reads[group] for group in bucket.groups)
        read = read or rule.writes_in_refresh
        read = read or rule.refresh_due(*bucket.clocks(), bucket.unit.shift)
        stack: list[Tensor | None] = [None] * len(members)
        numbers: list[Tensor | None] = [None] * len(members)
        for i, unit_grads in enumerate(members):
            positions = bucket.positions[i]
            if not unit_grads:
                continue
            if bucket.stacked:
                stack[i], numbers[i] = _stack_and_flag(unit_grads, waits(device), read)
                if read:
                    sums.add(numbers[i], positions)
            elif read and (sizes := _squares_of(bucket, rule, unit_grads[0])) is not None:
                found.squares[len(found.stacks)] = sizes
                sums.add(sizes.sum(), positions)
            elif read:
                sums.add_one(positions[0])
            else:
                if positions[0] not in cache:
                    cache[positions[0]] = largest(unit_grads[0]).reshape(1)
                numbers[i] = cache[positions[0]]
        used += sum(G.nbytes for G in stack if G is not None)
        fits = bucket.stacked and used <= max_stack_bytes(device)
        found.stacks.append(stack if fits else None)
        found.unread.append(None if read else numbers)


def _squares_of(bucket: Bucket, rule: Rule, G: Tensor) -> Tensor | None:
    """Squares of the columns (K, 1, n) of a gradient as a rule sees it, if that reads them.

    As a sum they are not finite where G is not, and need no further read of a large one.
    """
    if not rule.reads_squares or G.device.type != "cpu" or G.numel() <= MAX_JOINED_NUMEL:
        return None
    X = bucket.unit.views[0].to_matrices(G)
    if G.dtype != bucket.dtype or X.numel() != G.numel():  # other units have the rest
        return None
    found: Tensor = squares(X.mT if bucket.unit.transposed[0] else X, -2)
    return found


def _stack_and_flag(unit_grads: list[Tensor], waits: bool, read: bool) -> tuple[Tensor, Tensor]:
    """The stack of gradients, and one number for all or, where they are not read, K numbers."""
    if not waits and fuses_passes(unit_grads):
        if len({(G.stride(), G.dtype) for G in unit_grads}) == 1:
            # the copy and its flags in one pass
            G, finite = cast_stack(unit_grads, unit_grads[0].dtype, with_flags=True)
            return G, finite.reciprocal()  # a flag of 0 becomes infinite, as bad sums are
    G = torch.stack(unit_grads)
    return G, _total(G) if read else torch.stack([max_abs(part) for part in G])


def _total(G: Tensor) -> Tensor:
    """The sum, which is finite only if all entries are; a finite gradient may overflow it."""
    return G.sum(dtype=torch.float32 if G.dtype in LOW_PRECISION_DTYPES else None)


def largest(G: Tensor) -> Tensor:
    """The largest magnitude, NaN if there is one: cannot overflow, in one pass."""
    G = _as_real(G)
    return max_abs(G) if G.numel() else G.new_zeros(())


def _as_real(G: Tensor) -> Tensor:
    """Complex numbers as pairs, since no magnitude may overflow."""
    return torch.view_as_real(G.resolve_conj()) if G.is_complex() else G


def _flags_of(grads: Sequence[Tensor]) -> Tensor:
    """Per gradient whether it is finite, (N,) on their device, in one pass over all of them."""
    plain = all(G.numel() and G.is_floating_point() for G in grads)
    numbers = torch._foreach_norm(list(grads), math.inf) if plain else map(largest, grads)
    return torch.stack([number.isfinite() for number in numbers])


Sum = tuple[Tensor, Sequence[int]]
"""A number that is not finite if a gradient at the positions is not."""


class _Sums:
    """Sums of gradients that the host reads together, each with the positions it covers."""

    def __init__(self, grads: Grads) -> None:
        self._grads = grads
        self._sums: list[Sum] = []
        self._small: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        self._added = set[int]()

    def add(self, number: Tensor | None, positions: Sequence[int]) -> None:
        """Add a number that is not finite if a gradient at the positions is not."""
        assert number is not None
        self._sums.append((number, positions))

    def add_one(self, position: int) -> None:
        """Add the gradient of one parameter, once however many units it makes."""
        G = self._grads[position]
        if G is None or position in self._added:
            return
        self._added.add(position)
        if G.numel() <= MAX_JOINED_NUMEL:
            self._small.setdefault((G.device, G.dtype), []).append(position)
        else:
            self.add(_total(G), (position,))

    def add_large(self, positions: Iterable[int]) -> None:
        """Add gradients one by one."""
        for i in positions:
            G = self._grads[i]
            if G is not None:
                self.add(_total(G), (i,))

    def add_small(self, positions: Sequence[int], flat: bool = False) -> None:
        """Add gradients of one device and dtype as sums over many of them.

        Args:
            positions: Their positions.
            flat: Whether all are vectors.
        """
        step = MAX_JOIN_NUMEL // MAX_JOINED_NUMEL
        for start in range(0, len(positions), step):
            part = positions[start : start + step]
            joined = [G for i in part if (G := self._grads[i]) is not None]
            if len(joined) == 1:
                self.add(_total(joined[0]), part)
            elif joined:
                if not flat:
                    joined = [G.reshape(-1) for G in joined]
                self.add(_total(torch.cat(joined)), part)

    def bad(self) -> set[int]:
        """Read all sums with one wait per device; positions of gradients that are not finite."""
        for small in self._small.values():
            self.add_small(small)
        by_kind: dict[tuple[torch.device, torch.dtype], list[Sum]] = {}
        for number, positions in self._sums:
            by_kind.setdefault((number.device, number.dtype), []).append((number, positions))
        bad = set[int]()
        for same_kind in by_kind.values():
            # the sum of all first: it costs one number less for each
            numbers = [number for number, _ in same_kind]
            if math.isfinite(abs(_joined_total(numbers).item())):
                continue
            for number, positions in same_kind:
                if not bool(number.isfinite().all()):
                    bad.update(i for i in positions if not self._is_finite(i))
        return bad

    def _is_finite(self, position: int) -> bool:
        """Whether all entries are; the sum of a finite gradient may have overflowed."""
        G = self._grads[position]
        if G is None:
            return True
        return bool(G.isfinite().all())


def _joined_total(numbers: Sequence[Tensor]) -> Tensor:
    if len(numbers) == 1:
        return numbers[0].sum()
    return torch.cat([number.reshape(-1) for number in numbers]).sum()


# what a mode makes of it ----------------------------------------------------------------------


def group_indices(groups: Groups) -> list[int]:
    """Per flat position, the index of its group."""
    return [i for i, group in enumerate(groups) for _ in group["params"]]


def refuse(found: Findings, groups: Groups) -> None:
    """Raise for bad gradients in groups with ``nonfinite="raise"``.

    Raises:
        RuntimeError: Naming all of them.
    """
    group_of = group_indices(groups)
    bad = [i for i in sorted(found.bad) if groups[group_of[i]]["nonfinite"] == "raise"]
    if bad:
        names = names_or_positions(groups)
        text = ", ".join(repr(names[i]) for i in bad)
        raise RuntimeError(
            f"non-finite gradient of parameter {text}; nonfinite='skip' leaves such parameters "
            "alone instead"
        )


def stops_step(found: Findings, groups: Groups) -> bool:
    """Whether a bad gradient in a group with ``nonfinite="skip_step"`` stops the whole step."""
    group_of = group_indices(groups) if found.bad else []
    return found.stopped or any(groups[group_of[i]]["nonfinite"] == "skip_step" for i in found.bad)


def names_or_positions(groups: Groups) -> Names:
    """Per parameter its name, or its position where it has none."""
    return [i if name is None else name for i, name in enumerate(names_of(groups))]


def skip_warning(names: Sequence[str | int], stopped: bool) -> str:
    """The text of the warning about the first skipped parameters.

    Args:
        names: Names or positions of the parameters.
        stopped: Whether the whole step was left out.
    """
    text = ", ".join(repr(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    what = "nothing moves in such a step" if stopped else "such a step leaves it as it is"
    return (
        f"non-finite gradient of parameter {text}{more}; {what}, optimizer.skipped counts them, "
        "and this warning comes once"
    )


# undoing allocation ---------------------------------------------------------------------------

Snapshot = dict[Tensor, dict[str, Any]]


def snapshot(state: State) -> Snapshot:
    """The entries of a state, without copies of tensors, before a step allocates."""
    return {p: dict(entry) for p, entry in state.items()}


def roll_back(state: State, before: Snapshot) -> None:
    """Leave no entry behind that a refused step has allocated."""
    for p in list(state):
        if p not in before:
            del state[p]
            continue
        state[p].clear()
        state[p].update(before[p])
