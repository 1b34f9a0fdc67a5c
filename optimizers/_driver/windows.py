"""Windows: blocks of units that keep state in turns, and refreshes spread over a window.

Only rules that override ``state_since_at`` or ``refresh_interval`` need this file.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._core.rule import BlockPosition, Rule

if TYPE_CHECKING:
    from .units import Unit


def assign_block_positions(
    units: Sequence[Unit],
    rules: Sequence[Rule],
    group_rules: Sequence[Rule | None],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Set ``block_position`` of the units of rules that drop state, numbered over all groups.

    Args:
        units: All units; their ``order`` is that of the numbers.
        rules: Rules of the units, by ``Unit.rule``.
        group_rules: Per group its own rule, None for AdamW.
        groups: All groups.
    """
    numbers: dict[str, dict[Hashable, int]] = {}
    labels: list[Hashable] = []
    for group, rule in zip(groups, group_rules, strict=True):
        labels += block_labels_of(group, rule)
    windowed = sorted((u for u in units if drops_state(rules[u.rule])), key=_order)
    for unit in windowed:
        method_numbers = numbers.setdefault(rules[unit.rule].method(), {})
        label = labels[unit.positions[0]]
        key = ("own", unit.order) if label is None else ("shared", label)
        unit.block_position = BlockPosition(method_numbers.setdefault(key, len(method_numbers)))
    for unit in windowed:
        count = len(numbers[rules[unit.rule].method()])
        unit.block_position = BlockPosition(unit.block_position.number, count)


def _order(unit: Unit) -> int:
    return unit.order


def block_labels_of(group: Mapping[str, Any], rule: Rule | None) -> list[Hashable]:
    """The label of every parameter of a group."""
    count = len(group["params"])
    names = [*(group.get("param_names") or ())][:count]
    names += [None] * (count - len(names))  # appended to the group's list later
    return [None] * count if rule is None else list(rule.block_labels(names))


def drops_state(rule: Rule | None) -> bool:
    """Whether a rule keeps state in some windows only."""
    return rule is not None and type(rule).state_since_at is not Rule.state_since_at


def stagger_refreshes(
    units: Sequence[Unit], rules: Sequence[Rule], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Set ``shift`` of the units of groups with ``stagger``, evenly over the window.

    Units of a group that may run as one stack keep one shift: stacking small matrices saves more
    time than their refreshes cost.

    Args:
        units: All units; their ``order`` is that of the shifts.
        rules: Rules of the units, by ``Unit.rule``.
        groups: All groups.
    """
    shifts: dict[Hashable, list[Unit]] = {}
    for unit in sorted(units, key=_order):
        if rules[unit.rule].refresh_interval and groups[unit.group]["stagger"]:
            own = (unit.rule, unit.key) if unit.stackable else id(unit)
            shifts.setdefault(own, []).append(unit)
    for i, same_shift in enumerate(shifts.values()):
        for unit in same_shift:
            unit.shift = i * rules[unit.rule].refresh_interval // len(shifts)
