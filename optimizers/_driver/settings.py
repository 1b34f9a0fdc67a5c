"""Settings that change in the middle of a run: those that shape state are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .units import State, Unit
from .write_modes import RESIDUAL


class Entry(NamedTuple):
    """Axes, shape, dtype and layout of a state tensor, which give its numbers their meaning.

    Attributes:
        axes: Axes of the slot.
        shape: Shape of the stored tensor.
        dtype: Dtype of the stored tensor.
        layout: How the rule sees the weight, as shape and strides; None for state shaped like the
            weight, which is stored like the weight whatever the view.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: tuple[Any, ...] | None


Entries = dict[str, Entry | None]
"""Per state key of one parameter its entry; None for a clock."""
HAND_OVER = "hand a parameter with state from AdamW to the rule, or back"
ADAMW_KEYS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


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
            what = HAND_OVER
        else:
            what = _difference(before, after)
        said = changes.get(groups.get(p, -1)) or "; ".join(changes.values()) or "these settings"
        raise _refusal(said, what)


def refuse_unfit_state(units: Sequence[Unit], adamw_params: Iterable[Tensor], state: State) -> None:
    """Raise unless the state at hand is what the settings need: settings of a loaded or copied run.

    Args:
        units: Units by the present settings.
        adamw_params: Parameters that AdamW trains.
        state: The optimizer's state, which is not changed.

    Raises:
        ValueError: If state would be added, dropped, reshaped or converted.
    """
    for p in adamw_params:
        if state.get(p, {}).keys() - ADAMW_KEYS:
            raise _refusal("the settings", HAND_OVER)
    for p, needed in _entries(units).items():
        assert needed is not None
        stored = {k: X for k, X in state.get(p, {}).items() if isinstance(X, Tensor)}
        if "step" in stored:  # AdamW's clock is a tensor, a rule's a number
            raise _refusal("the settings", HAND_OVER)
        if not stored.keys() - {RESIDUAL} & needed.keys():  # not stepped yet, or between windows
            continue
        after = {key: entry for key, entry in needed.items() if entry is not None}
        before = {
            key: after[key]._replace(shape=tuple(X.shape), dtype=X.dtype)
            if key in after
            else Entry("", tuple(X.shape), X.dtype, None)
            for key, X in stored.items()
        }
        if before != after:
            raise _refusal("the settings", _difference(before, after))


def _refusal(said: str, what: str) -> ValueError:
    return ValueError(
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
                layout = None if slot.axes == "mn" else unit.layout(i)
                table[key] = Entry(slot.axes, shape, dtype, layout)
            if i == 0:
                table[unit.step_key] = None
    return tables


def _difference(before: Mapping[str, Entry | None], after: Mapping[str, Entry | None]) -> str:
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
