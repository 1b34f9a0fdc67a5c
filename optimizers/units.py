"""Units: what is updated together, what state it has, and when that comes and goes.

A unit is a weight, a block of one, or several weights of a rule with several members.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import blockwise_scales
from .rule import Place, Rule, Slot, Slots
from .views import Block, blocks

STACK = {"cpu": 2**15}
"""Largest matrix, in elements, that is stacked: below it calls saved outweigh the copies.

``python bench/toolkit.py --only stack`` shows what a limit costs. A larger one would still help
GaLore, but stacks are copies, and ``kernels/reference/matmul.py`` counts on a limit below 2**16.
"""
STACK_ACCELERATOR = 2**22
CODED = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, "momentum_buffer": torch.int8}
"""State that ``state_dtype="int8"`` keeps in codes, and in which: signed, or roots of squares."""
CODED_LEAST = 4096
"""Smallest number of entries that is kept in codes."""

NOWHERE = Place()
State = MutableMapping[Tensor, dict[str, Any]]


def is_part(X: Tensor) -> bool:
    """Whether X is part of a larger storage, such as a row of a slab."""
    return X.untyped_storage().nbytes() > X.numel() * X.element_size()


@dataclass(eq=False)
class Unit:
    """Parameters that are updated together.

    Attributes:
        group: Index of its parameter group.
        positions: Places of its parameters in the optimizer's flat list.
        params: One parameter per member.
        blocks: How each becomes matrices.
        turned: Whether each is handed to the rule transposed.
        number: Which block of the parameter this is.
        slots: State of each member.
        state_dtype: Dtype of state whose slot names none; None: float32, or float64.
        coded: Whether moments are kept in eight bits.
        place: Which block of the optimizer this is, for rules that drop state by blocks.
        shift: By how many updates its refreshes come early, where they are staggered.
    """

    group: int
    positions: tuple[int, ...]
    params: tuple[Tensor, ...]
    blocks: tuple[Block, ...]
    turned: tuple[bool, ...]
    number: int
    slots: tuple[Slots, ...]
    state_dtype: torch.dtype | None
    coded: bool = False
    place: Place = NOWHERE
    shift: int = 0
    key: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        p, block = self.params[0], self.blocks[0]
        self.tag = block.tag
        self.step_key, self.refreshed_key = "step" + block.tag, "refreshed" + block.tag
        self.held_key = "held" + block.tag
        self.clocks = (self.step_key, self.refreshed_key, self.held_key)
        self.index = self.positions[0] + (self.number << 20)
        self.stackable = (
            len(self.params) == 1
            and block.plain
            and p.numel() <= STACK.get(p.device.type, STACK_ACCELERATOR)
        )
        self.key = (
            self.group,
            self.turned,
            *(
                (p.shape, p.dtype, p.device, b.k, b.m, b.n)
                for p, b in zip(self.params, self.blocks, strict=True)
            ),
        )

    def sides(self, i: int) -> tuple[int, int]:
        """Sides of member i after turning."""
        block = self.blocks[i]
        return (block.n, block.m) if self.turned[i] else (block.m, block.n)

    @property
    def indices(self) -> tuple[int, ...]:
        """One key of random draws per matrix."""
        return tuple(self.index + (j << 40) for j in range(self.blocks[0].k))

    def expected(self, i: int) -> dict[str, tuple[Slot, tuple[int, ...], torch.dtype]]:
        """State keys of member i with slot, shape and dtype."""
        p = self.params[i]
        table = {}
        for name, slot in self.slots[i].items():
            key, shape = self.key_of(i, name), self._shape(i, slot)
            if self.codes(i, name) is None:
                table[key] = (slot, shape, self._dtype(slot, p))
            else:
                scales = Slot("b", b=blockwise_scales(math.prod(shape)))
                table[key] = (slot, shape, CODED[name])
                table[scale_of(key)] = (scales, scales.shape(0, 0), torch.float32)
        return table

    def key_of(self, i: int, name: str) -> str:
        """Under which key a slot of member i is stored."""
        return name if self.slots[i][name].axes == "mn" else name + self.tag

    def _shape(self, i: int, slot: Slot) -> tuple[int, ...]:
        if slot.axes == "mn":
            return tuple(self.params[i].shape)
        shape, k = slot.shape(*self.sides(i)), self.blocks[i].k
        return (k, *shape) if k > 1 else shape

    def codes(self, i: int, name: str) -> torch.dtype | None:
        """In which codes a slot of member i is kept, None if as it is."""
        slot = self.slots[i][name]
        fits = self.coded and slot.dtype is None and math.prod(self._shape(i, slot)) >= CODED_LEAST
        return CODED.get(name) if fits else None

    def _dtype(self, slot: Slot, p: Tensor) -> torch.dtype:
        if slot.dtype == "weight":
            return p.dtype
        if isinstance(slot.dtype, torch.dtype):
            return slot.dtype
        full = torch.float64 if p.dtype == torch.float64 else torch.float32
        return full if slot.dtype == "full" else self.state_dtype or full

    def allocate(self, state: State, rule: Rule) -> int:
        """Make what is missing of clocks and state, by shapes alone; drop what is not held.

        Returns:
            The update since which the unit holds its state, 0 if it has none at its next update.
        """
        first = state[self.params[0]]
        first.setdefault(self.step_key, 0)
        held = self._held(state, rule) if drops(rule) else 1
        if rule.every:
            first.setdefault(self.refreshed_key, 0)
        for i, p in enumerate(self.params):
            table = self.expected(i)
            entry = state[p] if table else {}
            for key, (slot, shape, dtype) in table.items():
                if not held:
                    entry.pop(key, None)
                elif key not in entry:
                    entry[key] = _filled(slot, shape, dtype, p.device)
                elif entry[key].shape != shape:
                    raise ValueError(
                        f"state {key!r} has shape {tuple(entry[key].shape)} but the settings of "
                        f"parameter group {self.group} need {shape}; load with the settings it was "
                        "saved with"
                    )
        return held

    def _held(self, state: State, rule: Rule) -> int:
        """The update since which a unit of a rule that drops state holds its own.

        That is what the rule says, unless state began between windows because settings changed;
        then it is kept beside the clocks, as are all but the first.
        """
        first = state[self.params[0]]
        has = any(
            self.key_of(i, n) in state[p] for i, p in enumerate(self.params) for n in self.slots[i]
        )
        held = self.since(rule, first.get(self.held_key, 1) if has else 0, first[self.step_key] + 1)
        first.pop(self.held_key, None)
        if held > 1 and any(self.slots):
            first[self.held_key] = held
        return held

    def since(self, rule: Rule, held: int, t: int) -> int:
        """What `held`, the update since which there is state (0: none), becomes at update t."""
        begin = rule.holds(self.place, t)
        if not begin or not any(self.slots):
            return begin
        return t if begin == t or not held else held

    def own(self, state: State) -> None:
        """Give a unit that sits out tensors of its own: a row keeps the whole slab alive."""
        for p in self.params:
            entry = state.get(p, {})
            for key, value in entry.items():
                if isinstance(value, Tensor) and is_part(value):
                    entry[key] = value.clone()

    def seen(self, i: int, name: str, tensor: Tensor) -> Tensor:
        """A stored state tensor as the rule sees it: (k, *axes)."""
        block = self.blocks[i]
        if self.slots[i][name].axes == "mn":
            X = block.take(tensor)
            return X.mT if self.turned[i] else X
        return tensor if block.k > 1 else tensor.unsqueeze(0)


def scale_of(key: str) -> str:
    """Under which key the scales of coded state are stored."""
    name, dot, tag = key.partition(".")
    return f"{name}_scale{dot}{tag}"


def _filled(slot: Slot, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if slot.fill == "eye":
        return torch.eye(shape[-2], shape[-1], dtype=dtype, device=device).expand(shape).clone()
    assert not isinstance(slot.fill, str)
    if slot.device is None:
        return torch.full(shape, slot.fill, dtype=dtype, device=device)
    return pinned(torch.full(shape, slot.fill, dtype=dtype, device=slot.device), device)


def pinned(X: Tensor, device: torch.device) -> Tensor:
    """A tensor that stays on the host, in memory that a CUDA device can read by itself."""
    return X.pin_memory() if device.type == "cuda" and not X.is_cuda else X


def views_of(view: str | Sequence[str], rule: Rule, count: int = 0) -> list[str]:
    """One view per member of the rule, of which there are `count` if it does not say."""
    count = len(rule.members) or count
    views = [view] * count if isinstance(view, str) else list(view)
    if len(views) != count:
        raise ValueError(
            f"view must be one string, or one for each of {', '.join(rule.members)}, got {view!r}"
        )
    return views


def units_of(
    group: int, settings: Mapping[str, Any], rule: Rule, routed: Sequence[tuple[int, Tensor]]
) -> list[Unit]:
    """Units of one group: runs of ``len(rule.members)`` parameters, each cut by its view.

    Args:
        group: Index of the group.
        settings: The group.
        rule: Its rule.
        routed: (flat position, parameter) of every parameter that goes to the rule.

    Raises:
        ValueError: If the parameters cannot be cut into runs, or a view does not fit.
    """
    size = len(rule.members) or max(1, len(routed))
    if len(routed) % size:
        raise ValueError(
            f"{rule.method()} takes parameters in runs of {size} "
            f"({', '.join(rule.members)}), got {len(routed)}"
        )
    name, views = settings["state_dtype"], views_of(settings["view"], rule, size)
    coded = name == "int8"
    dtype = None if name is None or coded else getattr(torch, name)
    units = []
    for start in range(0, len(routed), size):
        run = routed[start : start + size]
        cuts = [blocks(v, tuple(p.shape)) for v, (_, p) in zip(views, run, strict=True)]
        if size > 1 and any(len(cut) > 1 for cut in cuts):
            raise ValueError(f"view {views} cuts a parameter, which {size} members cannot follow")
        for number, members in enumerate(zip(*cuts, strict=True)):
            turned = rule.turns([(b.m, b.n) for b in members])
            sides = tuple(
                (b.n, b.m) if turn else (b.m, b.n) for b, turn in zip(members, turned, strict=True)
            )
            units.append(
                Unit(
                    group,
                    tuple(i for i, _ in run),
                    tuple(p for _, p in run),
                    members,
                    turned,
                    number,
                    rule.slots(sides),
                    dtype,
                    coded,
                )
            )
    return units


def place(
    units: Sequence[Unit], rules: Sequence[Rule | None], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Tell the units of rules that drop state by blocks which block they are, over all groups."""
    numbers: dict[str, dict[Hashable, int]] = {}
    labels: list[Hashable] = []
    for group, rule in zip(groups, rules, strict=True):
        labels += labels_of(group, rule)
    kept = [unit for unit in units if drops(rules[unit.group])]
    for unit in kept:
        own, position = numbers.setdefault(_method(rules, unit), {}), unit.positions[0]
        label = labels[position]
        key = ("own", position) if label is None else ("shared", label)
        unit.place = Place(own.setdefault(key, len(own)))
    for unit in kept:
        unit.place = Place(unit.place.number, len(numbers[_method(rules, unit)]))


def labels_of(group: Mapping[str, Any], rule: Rule | None) -> list[Hashable]:
    """The label of every parameter of a group."""
    count = len(group["params"])
    names = [*group.get("param_names", ())][:count]
    names += [None] * (count - len(names))  # appended to the group's list later
    return [None] * count if rule is None else list(rule.blocks(names))


def drops(rule: Rule | None) -> bool:
    """Whether a rule keeps state for some windows only."""
    return rule is not None and type(rule).holds is not Rule.holds


def _method(rules: Sequence[Rule | None], unit: Unit) -> str:
    rule = rules[unit.group]
    assert rule is not None
    return rule.method()


def stagger(
    units: Sequence[Unit], rules: Sequence[Rule | None], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Spread refreshes evenly over the window where a group asks for it.

    What may run as one stack stays together: small matrices, which stall nothing.
    """
    shifts: dict[Hashable, list[Unit]] = {}
    for unit in units:
        rule = rules[unit.group]
        if rule is not None and rule.every and groups[unit.group]["stagger"]:
            shifts.setdefault(unit.key if unit.stackable else id(unit), []).append(unit)
    for i, alike in enumerate(shifts.values()):
        for unit in alike:
            rule = rules[unit.group]
            assert rule is not None
            unit.shift = i * rule.every // len(shifts)
