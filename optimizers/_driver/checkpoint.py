"""Loading: refuse what does not fit before anything changes, and keep every dtype.

``torch.optim.Optimizer.load_state_dict`` casts all state to the parameter's dtype, integers
included. The driver lets torch load and then puts back the tensors that were cast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.rule import RULE_CLASSES, Rule
from . import adamw
from .param_groups import describe, parts_of, rule_of
from .units import Unit, pinned, units_of

ExpectedState = dict[str, tuple[tuple[int, ...], torch.dtype, str | torch.device]]


def _pairs(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[Any]:
    """(parameter, id in the checkpoint) in order; empty if the groups differ in length."""
    same_lengths = len(groups) == len(saved) and all(
        len(g["params"]) == len(s["params"]) for g, s in zip(groups, saved, strict=True)
    )
    if not same_lengths:
        return []
    return [
        pair
        for g, s in zip(groups, saved, strict=True)
        for pair in zip(g["params"], s["params"], strict=True)
    ]


def prepare(
    default_rule: type[Rule], groups: Sequence[Mapping[str, Any]], state_dict: Any
) -> dict[str, Any]:
    """Check a checkpoint against the optimizer and fill in group keys that it lacks.

    Args:
        default_rule: The optimizer's rule class.
        groups: The optimizer's groups.
        state_dict: What is to be loaded; it is not changed.

    Returns:
        The checkpoint with complete groups.

    Raises:
        ValueError: With the first thing that does not fit.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "state_dict needs the keys 'state' and 'param_groups'; pass what state_dict() returned"
        )
    saved = [dict(group) for group in state_dict["param_groups"]]
    pairs = _pairs(groups, saved)
    if not pairs:
        return dict(state_dict)  # torch says which length differs
    for group, new in zip(groups, saved, strict=True):
        RULE_CLASSES.get(str(new.get("rule")), default_rule).complete_saved(new)
        new.setdefault("draws", "position")  # as all did before there was a choice
        for key, value in group.items():
            if key != "params":  # names too: torch keeps the optimizer's where none were saved
                new.setdefault(key, value)
    state, position = state_dict["state"], 0
    for i, (group, new) in enumerate(zip(groups, saved, strict=True)):
        if new["method"] != default_rule.method():
            raise ValueError(
                f"checkpoint was saved by {new['method']}; load it into {new['method']}, not into "
                f"{default_rule.method()}"
            )
        tables = _tables(_units(default_rule, i, {**new, "params": group["params"]}, position))
        names = group.get("param_names") or [None] * len(group["params"])
        for j, (p, name) in enumerate(zip(group["params"], names, strict=True)):
            entry = state.get(new["params"][j], {})
            shapes = {key: row[0] for key, row in tables[p].items()} if p in tables else None
            _check_entry(entry, shapes, p, describe(name, p, j), default_rule.method())
        position += len(group["params"])
    return {**state_dict, "param_groups": saved}


def _units(
    default_rule: type[Rule], index: int, group: Mapping[str, Any], position: int
) -> list[Unit]:
    """Units of a group; ``position`` is the flat position of its first parameter."""
    parts = parts_of(group, rule_of(group, default_rule), position)[0]
    return [unit for part in parts for unit in units_of(index, group, part)]


def _tables(units: Sequence[Unit]) -> dict[Tensor, ExpectedState]:
    """Per parameter of the units, its state keys with shape, dtype and device."""
    tables: dict[Tensor, ExpectedState] = {}
    for unit in units:
        for i, p in enumerate(unit.params):
            table = tables.setdefault(p, {})
            for key, (slot, shape, dtype) in unit.expected_state(i).items():
                table[key] = (shape, dtype, slot.device or p.device)
    return tables


def _is_clock(key: str) -> bool:
    return key.partition(".")[0] in ("step", "refreshed", "held")


def _check_entry(
    entry: Any, shapes: dict[str, tuple[int, ...]] | None, p: Tensor, text: str, method: str
) -> None:
    """Refuse the saved state of a parameter unless it is empty or complete.

    Args:
        entry: The saved state.
        shapes: Expected shape per state key; None for a parameter of AdamW.
        p: The parameter.
        text: How a message names the parameter.
        method: Name of the optimizer's method.

    Raises:
        ValueError: With the first key that is missing, unknown or of another shape.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"checkpoint state of {text} must be a dict, got {type(entry).__name__}")
    found = {key: value for key, value in entry.items() if not _is_clock(key)}
    if not found:
        return
    if shapes is None:
        method, shapes = "AdamW", dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(p.shape))
    names = set(shapes)
    for key in sorted(set(found) - names):
        raise ValueError(
            f"checkpoint holds {key!r} for {text}, which {method} does not know; load a checkpoint "
            "of the same optimizer with the same groups"
        )
    for key in sorted(names - set(found)):
        raise ValueError(
            f"checkpoint lacks {key!r} for {text}, which {method} needs; load a checkpoint of the "
            "same optimizer with the same groups"
        )
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"checkpoint {key!r} of {text} must be a tensor, got {type(value)}")
        if tuple(value.shape) != shapes[key]:
            raise ValueError(
                f"checkpoint {key!r} of {text} has shape {tuple(value.shape)} but its settings "
                f"need {shapes[key]}; build the optimizer for the model that was saved"
            )


def restore(
    default_rule: type[Rule],
    groups: Sequence[Mapping[str, Any]],
    state: Any,
    saved: Mapping[str, Any],
) -> None:
    """Put back the saved tensors that torch has cast, in the dtype their slot declares.

    Integers come back exactly as saved, floats in their slot's dtype (for a checkpoint of the same
    settings: as saved). AdamW's state stays as torch loads it.

    Args:
        default_rule: The optimizer's rule class.
        groups: The optimizer's groups, as torch has loaded them.
        state: The optimizer's state, as torch has loaded it; changed in place.
        saved: What :func:`prepare` returned.
    """
    ids, position = dict(_pairs(groups, saved["param_groups"])), 0
    for i, group in enumerate(groups):
        units = _units(default_rule, i, group, position)
        tables = _tables(units)
        position += len(group["params"])
        for p in group["params"]:
            table = tables.get(p)
            for key, value in saved["state"].get(ids[p], {}).items():
                if table is None:
                    if key == "step" and not isinstance(value, Tensor):
                        state[p][key] = adamw.step_tensor(p, group, value)
                elif _is_clock(key):
                    state[p][key] = int(value)
                else:
                    dtype = table[key][1]
                    keep_saved_dtype = not (value.is_floating_point() and dtype.is_floating_point)
                    device = table[key][2]  # torch moved pools off the host too
                    value = value.to(
                        device=device, dtype=value.dtype if keep_saved_dtype else dtype
                    )
                    state[p][key] = pinned(value, p.device)
        for unit in units:
            if unit.params[0] in state:  # torch.optim.Muon keeps no clock
                state[unit.params[0]].setdefault(unit.step_key, 0)
