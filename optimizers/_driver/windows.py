"""Windows: which block a unit belongs to, when its state comes and goes, when it is refreshed.

Only rules that refresh, and rules that keep state for some windows, need what is here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._core.rule import BlockPosition, Rule

if TYPE_CHECKING:
    from .units import Unit


def assign_block_positions(
    units: Sequence[Unit], rules: Sequence[Rule | None], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Tell the units of rules that drop state by blocks which block they are, over all groups."""
    numbers: dict[str, dict[Hashable, int]] = {}
    labels: list[Hashable] = []
    for group, rule in zip(groups, rules, strict=True):
        labels += block_labels_of(group, rule)
    windowed = [unit for unit in units if drops_state(rules[unit.group])]
    for unit in windowed:
        method_numbers, position = numbers.setdefault(_method(rules, unit), {}), unit.positions[0]
        label = labels[position]
        key = ("own", position) if label is None else ("shared", label)
        unit.block_position = BlockPosition(method_numbers.setdefault(key, len(method_numbers)))
    for unit in windowed:
        unit.block_position = BlockPosition(
            unit.block_position.number, len(numbers[_method(rules, unit)])
        )


def block_labels_of(group: Mapping[str, Any], rule: Rule | None) -> list[Hashable]:
    """The label of every parameter of a group."""
    count = len(group["params"])
    names = [*group.get("param_names", ())][:count]
    names += [None] * (count - len(names))  # appended to the group's list later
    return [None] * count if rule is None else list(rule.block_labels(names))


def drops_state(rule: Rule | None) -> bool:
    """Whether a rule keeps state for some windows only."""
    return rule is not None and type(rule).state_since_at is not Rule.state_since_at


def stagger_refreshes(
    units: Sequence[Unit], rules: Sequence[Rule | None], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Spread refreshes evenly over the window where a group asks for it.

    What may run as one stack stays together: small matrices, which stall nothing.
    """
    shifts: dict[Hashable, list[Unit]] = {}
    for unit in units:
        rule = rules[unit.group]
        if rule is not None and rule.refresh_interval and groups[unit.group]["stagger"]:
            shifts.setdefault(unit.key if unit.stackable else id(unit), []).append(unit)
    for i, same_shift in enumerate(shifts.values()):
        for unit in same_shift:
            rule = rules[unit.group]
            assert rule is not None
            unit.shift = i * rule.refresh_interval // len(shifts)


def _method(rules: Sequence[Rule | None], unit: Unit) -> str:
    rule = rules[unit.group]
    assert rule is not None
    return rule.method()
