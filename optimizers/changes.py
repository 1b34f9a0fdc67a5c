"""What becomes of the state when a group's settings change in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import dequantize_blocks, quantize_blocks
from .rule import Rule
from .units import State, Unit, scale_of


class Cell(NamedTuple):
    """What a state key of a parameter stands for."""

    axes: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    turned: bool

    def alike(self, other: Cell | None) -> bool:
        """Whether numbers mean the same; what lies like the weight does not turn with it."""
        if other is None or self.axes != other.axes:
            return False
        return self.axes == "mn" or self.turned == other.turned


Table = dict[str, Cell]


def follow(
    old: Sequence[Unit],
    aside: Iterable[Tensor],
    new: Sequence[Unit],
    rules: Sequence[Rule | None],
    flat: Iterable[Tensor],
    state: State,
) -> None:
    """Bring the state of units that were, to what units that are need, in place.

    Keys that no slot has any more go, floats and codes are converted, and what is missing is made
    by the next allocation. Where a rule refreshes and its basis, index or other state is missing or
    means something else, that unit begins anew, clocks included: moments without their basis are
    worth nothing. What changes between a rule and AdamW begins anew too.

    Args:
        old: Units before the change.
        aside: Parameters that AdamW trained before it.
        new: Units after it.
        rules: Per group, its rule after it.
        flat: All parameters after it. One that was taken out keeps its state, for its return.
        state: The optimizer's state.

    Raises:
        ValueError: If a slot would need another shape; nothing has changed then.
    """
    was, now = _tables(old), _tables(new)
    present = {id(p) for p in flat}
    old_clocks, new_clocks = _clocks(old), _clocks(new)
    for unit in new:
        for p in unit.params:
            for key in sorted(was.get(p, {}).keys() & now[p].keys() & state.get(p, {}).keys()):
                if was[p][key].shape != now[p][key].shape:
                    raise ValueError(
                        f"state {key!r} has shape {was[p][key].shape} but the settings of "
                        f"parameter group {unit.group} now need {now[p][key].shape}, which a run "
                        "cannot follow; set them back, or build a new optimizer"
                    )
    for p in aside:
        if p in now:
            state.get(p, {}).clear()
    for p, before in was.items():
        entry, after = state.get(p, {}), now.get(p)
        if after is None:
            if id(p) in present:  # AdamW trains it from now on
                entry.clear()
            continue
        for key in before.keys() & after.keys() & entry.keys():
            _convert(entry, key, before, after)
        gone = before.keys() | old_clocks.get(p, set())
        for key in gone - after.keys() - new_clocks.get(p, set()):
            entry.pop(key, None)
    for unit in new:
        rule = rules[unit.group]
        if rule is None or not rule.every or not any(p in was for p in unit.params):
            continue
        if not all(
            now[p][key].alike(was.get(p, {}).get(key))
            for i, p in enumerate(unit.params)
            for key in unit.expected(i)
        ):
            for i, p in enumerate(unit.params):
                for key in (*unit.expected(i), *unit.clocks):
                    state.get(p, {}).pop(key, None)


def _tables(units: Iterable[Unit]) -> dict[Tensor, Table]:
    tables: dict[Tensor, Table] = {}
    for unit in units:
        for i, p in enumerate(unit.params):
            table = tables.setdefault(p, {})
            for key, (slot, shape, dtype) in unit.expected(i).items():
                table[key] = Cell(slot.axes, shape, dtype, unit.turned[i])
    return tables


def _clocks(units: Iterable[Unit]) -> dict[Tensor, set[str]]:
    """Keys of the clocks that lie with each parameter."""
    keys: dict[Tensor, set[str]] = {}
    for unit in units:
        keys.setdefault(unit.params[0], set()).update(unit.clocks)
    return keys


def _convert(entry: dict[str, Any], key: str, before: Table, after: Table) -> None:
    """One state tensor in its new dtype; codes of another kind are dropped."""
    X, scale, dtype = entry[key], scale_of(key), after[key].dtype
    if before[key].dtype == dtype:
        return
    if scale in before and scale not in after and dtype.is_floating_point:
        entry[key] = dequantize_blocks(X[None], entry[scale][None], dtype)[0]
    elif scale in after and scale not in before and X.is_floating_point():
        codes = torch.zeros(after[key].shape, dtype=dtype, device=X.device)
        scales = torch.zeros(after[scale].shape, device=X.device)
        quantize_blocks(X.contiguous()[None], codes[None], scales[None])
        entry[key], entry[scale] = codes, scales
    elif X.is_floating_point() and dtype.is_floating_point:
        entry[key] = X.to(dtype)
    else:
        del entry[key]
