"""Settings that change in the middle of a run: those that shape state are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .units import State, Unit


class Entry(NamedTuple):
    """What the numbers of one state tensor stand for.

    Attributes:
        axes: Axes of the slot.
        shape: Shape of the stored tensor.
        dtype: Dtype of the stored tensor.
        transposed: Whether the rule sees the weight transposed; False for state shaped like the
            weight, which is stored untransposed in either case.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool


Entries = dict[str, Entry | None]
"""Per state key of one parameter its entry; None for a clock."""


def refuse_state_changes(
    old: Sequence[Unit],
    old_adamw: Iterable[Tensor],
    new: Sequence[Unit],
    new_adamw: Iterable[Tensor],
    state: State,
    changes: Mapping[int, str],
) -> None:
    """Raise unless every parameter that has state needs the same state under the new settings.

    A parameter without state may get any, and a parameter that has left the groups keeps its state.

    Args:
        old: Units before the change.
        old_adamw: Parameters that AdamW trained before it.
        new: Units after it.
        new_adamw: Parameters that AdamW trains after it.
        state: The optimizer's state, which is not changed.
        changes: Per index of a changed group, the settings that changed, in words.

    Raises:
        ValueError: If state would be added, dropped, reshaped or given another meaning.
    """
    was = _entries(old) | {p: None for p in old_adamw}
    now = _entries(new) | {p: None for p in new_adamw}
    groups = {p: unit.group for unit in new for p in unit.params}
    for p, after in now.items():
        if p not in was or not state.get(p):
            continue
        before = was[p]
        if before == after:
            continue
        if before is None or after is None:
            what = "hand a parameter with state from AdamW to the rule, or back"
        else:
            what = _difference(before, after)
        said = changes.get(groups.get(p, -1)) or "; ".join(changes.values()) or "these settings"
        raise ValueError(
            f"{said} would {what} in the middle of a run, which is not supported: set it back, or "
            "build a new optimizer"
        )


def _entries(units: Iterable[Unit]) -> dict[Tensor, Entries | None]:
    """Per parameter, the entries of all its units."""
    tables: dict[Tensor, Entries | None] = {}
    for unit in units:
        for i, p in enumerate(unit.params):
            table = tables.setdefault(p, {})
            assert table is not None
            for key, (slot, shape, dtype) in unit.expected_state(i).items():
                transposed = unit.transposed[i] and slot.axes != "mn"
                table[key] = Entry(slot.axes, shape, dtype, transposed)
            if i == 0:
                table[unit.step_key] = None
    return tables


def _difference(before: Entries, after: Entries) -> str:
    """A phrase for the first difference of two tables, to follow the word "would"."""
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        if was == now and key in before and key in after:
            continue
        if key not in before:
            return f"add state {key!r}"
        if key not in after:
            return f"drop state {key!r}"
        assert was is not None and now is not None
        if was.shape != now.shape:
            return f"reshape state {key!r} from {was.shape} to {now.shape}"
        if was.dtype != now.dtype:
            return f"convert state {key!r} from {was.dtype} to {now.dtype}"
        return f"give state {key!r} another meaning"
    raise AssertionError("equal entries differ nowhere")
