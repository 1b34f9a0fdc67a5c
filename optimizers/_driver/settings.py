"""Settings that change in the middle of a run: those that shape state are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._core.rule import Rule
from .norms import DRIVER_SLOTS
from .saved_state import adamw_entry
from .units import State, Unit, base_of
from .windows import drops_state
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
ADAMW_KEYS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", RESIDUAL}
AdamWModes = Mapping[Tensor, tuple[int, str]]
"""Per parameter of AdamW, the index of its group and how it is written."""


def refuse_state_changes(
    old: Sequence[Unit],
    old_adamw: AdamWModes,
    new: Sequence[Unit],
    new_adamw: AdamWModes,
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
    was = _entries(old) | {p: _adamw_entries(p, mode) for p, (_, mode) in old_adamw.items()}
    now = _entries(new) | {p: _adamw_entries(p, mode) for p, (_, mode) in new_adamw.items()}
    groups = {p: unit.group for unit in new for p in unit.params}
    groups |= {p: i for p, (i, _) in new_adamw.items()}
    for p, after in now.items():
        if p not in was or not state.get(p):
            continue
        if (p in old_adamw) != (p in new_adamw):
            what = HAND_OVER
        elif was[p] == after:
            continue
        else:
            what = _difference(was[p], after)
        said = changes.get(groups.get(p, -1)) or "; ".join(changes.values()) or "these settings"
        raise _refusal(said, what)


def refuse_unfit_state(
    units: Sequence[Unit],
    rules: Sequence[Rule],
    adamw_modes: AdamWModes,
    state: State,
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Raise unless the state at hand is what the settings need: settings of a loaded or copied run.

    Args:
        units: Units by the present settings.
        rules: Their rules, by ``Unit.rule``.
        adamw_modes: Parameters that AdamW trains.
        state: The optimizer's state, which is not changed.
        groups: The groups, or their settings.

    Raises:
        ValueError: If state would be added, dropped, reshaped or converted.
    """
    for p, (i, mode) in adamw_modes.items():
        found = state.get(p, {})
        if found.keys() - ADAMW_KEYS:
            raise _refusal(f"the settings of parameter group {i}", HAND_OVER)
        _refuse_unfit_moments(p, found, mode, f"write={groups[i].get('write')!r}", i)
    stepped = {
        p
        for unit in units
        if not drops_state(rules[unit.rule]) and _is_started(unit, state)
        for p in unit.params
    }
    index_of = {p: unit.group for unit in units for p in unit.params}
    for p, needed in _entries(units).items():
        said = f"the settings of parameter group {index_of[p]}"
        stored = {k: X for k, X in state.get(p, {}).items() if isinstance(X, Tensor)}
        if "step" in stored:  # AdamW's clock is a tensor, a rule's a number
            raise _refusal(said, HAND_OVER)
        # not stepped yet, or between windows, where only what rounding has cut off is kept
        kept = {key for key in needed if base_of(key) in DRIVER_SLOTS}
        if p not in stepped and not stored.keys() - kept:
            continue
        after = {key: entry for key, entry in needed.items() if entry is not None}
        before = {
            key: after[key]._replace(shape=tuple(X.shape), dtype=X.dtype)
            if key in after
            else Entry("", tuple(X.shape), X.dtype, None)
            for key, X in stored.items()
        }
        if before != after:
            raise _refusal(said, _difference(before, after))


def _is_started(unit: Unit, state: State) -> bool:
    """Whether a unit was updated, as its clock tells: it may need no other state."""
    clock = state.get(unit.params[0], {}).get(unit.step_key, 0)
    return isinstance(clock, int) and clock > 0


def _refuse_unfit_moments(
    p: Tensor, found: Mapping[str, Any], mode: str, said: str, group: int
) -> None:
    """Raise unless moments and residual of a parameter of AdamW are those of its write mode."""
    stored = {key: X for key, X in found.items() if key != "step" and isinstance(X, Tensor)}
    if "exp_avg" not in stored or is_lazy(p):
        return
    after = {key: entry for key, entry in _adamw_entries(p, mode).items() if entry is not None}
    keys = stored.keys() & after.keys() | stored.keys() & {RESIDUAL}
    before = {key: Entry("mn", tuple(p.shape), stored[key].dtype, None) for key in keys}
    kinds = {X.dtype.is_floating_point and X.shape == p.shape for X in stored.values()}
    if before != after and kinds == {True}:  # other faults have messages of their own
        raise _refusal(f"{said} in parameter group {group}", _difference(before, after))


def _adamw_entries(p: Tensor, mode: str) -> Entries:
    """The entries of a parameter of AdamW."""
    if is_lazy(p):
        return {}
    tensors = adamw_entry(p, mode).tensors
    return {key: Entry("mn", x.shape, x.dtype, None) for key, x in tensors.items()}


def _refusal(said: str, what: str) -> ValueError:
    return ValueError(
        f"{said} would {what} in the middle of a run, which is not supported: set it back, or "
        "build a new optimizer"
    )


def _entries(units: Iterable[Unit]) -> dict[Tensor, Entries]:
    """Per parameter, the entries of all its units."""
    tables: dict[Tensor, Entries] = {}
    for unit in units:
        for i, p in enumerate(unit.params):
            table = tables.setdefault(p, {})
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
