"""Loading: refuse what does not fit before anything changes, and keep every dtype.

``torch.optim.Optimizer.load_state_dict`` matches parameters by position and casts all state to the
parameter's dtype, integers included. The driver hands torch a checkpoint in the optimizer's own
order (``matching.py``) whose every value was checked (``saved_state.py``), and then puts back the
tensors that were cast.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._core.rule import RULE_CLASSES, Rule, defaults_of
from .._core.validation import function_name, is_number, shown
from . import adamw
from .checks import check_lists, check_values
from .decay import check_decay, store_decay_lr
from .layout import is_sharded, local
from .matching import Place, grouped_as, match, realigned, regroup
from .norms import DRIVER_SLOTS, NOT_MEASURED, RADIUS, check_weight_norm
from .old_codes import recoded
from .param_groups import (
    COMMON,
    LISTS,
    describe,
    exact_ratio,
    listed,
    parts_of,
    rule_of,
    warn_user,
)
from .saved_state import (
    Entry,
    Expected,
    adamw_entry,
    check_clocks,
    check_tensor,
    check_values_of,
    clock_value,
    entries_of,
    is_clock,
    missing_key,
)
from .units import Unit, base_of, pinned, units_of
from .windows import assign_block_positions, drops_state
from .write_modes import RESIDUAL, check_eco, mode_of

_FUNCTION = "function "
MEANT_BEFORE = {"draws": "position"}
"""Values of keys that older files lack, where today's default is another."""


def prepare(
    default_rule: type[Rule], groups: Sequence[Mapping[str, Any]], state_dict: Any
) -> dict[str, Any]:
    """Check a checkpoint against the optimizer, whole, and put it in the optimizer's order.

    Args:
        default_rule: The optimizer's rule class.
        groups: The optimizer's groups.
        state_dict: What is to be loaded; it is not changed.

    Returns:
        The checkpoint with complete groups, as many and in the order of the optimizer's.

    Raises:
        ValueError: With the first thing that does not fit.
    """
    saved = _saved_groups(state_dict)
    _refuse_other_methods(default_rule, saved)
    found = match(groups, saved, lambda group: _matrix_flags(default_rule, group))
    if found is None:
        return dict(state_dict)  # torch says which length differs
    _check_forms(saved)
    _check_ids(groups, found.places, state_dict["state"])
    is_old = any("method" in group and "draws" not in group for group in saved)
    for group in saved:
        RULE_CLASSES.get(str(group.get("rule")), default_rule).complete_saved(group)
        for key, value in MEANT_BEFORE.items():
            group.setdefault(key, value)
    _fill_in(groups, saved, found.places)
    try:
        new_groups = regroup(groups, saved, found.places)
    except (TypeError, ValueError, KeyError) as error:
        raise _bad_settings("the checkpoint", error) from error
    for own, new in zip(groups, new_groups, strict=True):
        _store_old_adamw_lr(new)
        for key, value in own.items():
            if key not in ("params", "positions"):  # positions are those of the file
                new.setdefault(key, value)
    _check_settings(default_rule, new_groups)
    for own, new in zip(groups, new_groups, strict=True) if is_old else ():
        target = {**new, "params": own["params"]}
        keep_old_rules(
            default_rule, target, [state_dict["state"].get(k, {}) for k in new["params"]]
        )
        if "rules" in target:
            new["rules"] = target["rules"]
    state = _check_state(default_rule, groups, new_groups, state_dict["state"])
    if found.warning is not None:
        warn_user(found.warning)
    return {**state_dict, "state": state, "param_groups": new_groups}


def name_functions(default_rule: type[Rule], saved: Sequence[dict[str, Any]]) -> None:
    """Put names in place of functions among the settings of rules, in place.

    A file holds plain values; ``torch.load(weights_only=True)`` would refuse a function.
    """
    for group in saved:
        for key in defaults_of(RULE_CLASSES.get(str(group.get("rule")), default_rule)):
            if callable(group.get(key)):
                group[key] = f"{_FUNCTION}{function_name(group[key])}"


def _put_back(key: str, own: Any, saved: Any) -> Any:
    """The optimizer's own function where a file has the name of one, else what the file has.

    Raises:
        ValueError: If the optimizer has none, or one of another name.
    """
    if not isinstance(saved, str) or not saved.startswith(_FUNCTION) or saved == own:
        return saved
    name = saved.removeprefix(_FUNCTION)
    if not callable(own) or function_name(own) != name:
        has = f"the function {function_name(own)}" if callable(own) else shown(own)
        raise ValueError(
            f"checkpoint was made with the function {name} as {key}, which a file cannot hold, and "
            f"this optimizer has {has}; build it with {key}={name.rpartition('.')[2]}"
        )
    return own


def grouped_as_saved(
    groups: Sequence[Mapping[str, Any]], state_dict: Any
) -> list[dict[str, Any]] | None:
    """The optimizer's parameters in groups like those of a checkpoint; None if the names differ."""
    return grouped_as(groups, _saved_groups(state_dict))


def _saved_groups(state_dict: Any) -> list[dict[str, Any]]:
    """Copies of the groups of a checkpoint, which has the form of one."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "state_dict needs the keys 'state' and 'param_groups'; pass what state_dict() returned"
        )
    state, saved = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"checkpoint 'state' must be a dict, got {type(state).__name__}")
    if not isinstance(saved, list | tuple):
        raise ValueError(f"checkpoint 'param_groups' must be a list, got {type(saved).__name__}")
    for i, group in enumerate(saved):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"group {i} of the checkpoint must be a dict with a list 'params'")
        if not all(isinstance(key, Hashable) and key is not None for key in group["params"]):
            raise ValueError(f"'params' of group {i} of the checkpoint must be a list of ids")
    firsts = accumulate((len(group["params"]) for group in saved), initial=0)
    return [realigned(group, first) for group, first in zip(saved, firsts, strict=False)]


def _check_forms(saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise for lists and rules whose form alone is wrong, before anything reads them."""
    check_lists(saved, " of the checkpoint")
    for i, group in enumerate(saved):
        try:
            check_values({key: group[key] for key in ("param_names", *LISTS) if key in group})
        except ValueError as error:
            raise _bad_settings(f"group {i} of the checkpoint", error) from error
        rule = group.get("rule")
        if rule is not None and not isinstance(rule, str):
            raise ValueError(
                f"rule of parameter group {i} of the checkpoint must be a name or None, got "
                f"{shown(rule)}"
            )


def _refuse_other_methods(default_rule: type[Rule], saved: Sequence[Mapping[str, Any]]) -> None:
    for group in saved:
        method = group.get("method", default_rule.method())
        if method != default_rule.method():
            raise ValueError(
                f"checkpoint was saved by {method}; load it into {method}, not into "
                f"{default_rule.method()}"
            )


def _matrix_flags(default_rule: type[Rule], group: Mapping[str, Any]) -> list[bool]:
    """Per parameter of a group of the optimizer, whether the group's rule trains it."""
    parts, _ = parts_of(group, rule_of(group, default_rule), 0)
    matrices = {weight.place for part in parts for weight in part.weights}
    return [i in matrices for i in range(len(group["params"]))]


def _check_ids(
    groups: Sequence[Mapping[str, Any]],
    places: Sequence[Sequence[Place | None]],
    state: Mapping[Any, Any],
) -> None:
    """Raise if an id of the checkpoint stands for two parameters, or state for none."""
    owners: dict[Any, Tensor] = {}
    for group, row in zip(groups, places, strict=True):
        for p, place in zip(group["params"], row, strict=True):
            if place is not None and owners.setdefault(place.id, p) is not p:
                raise ValueError(
                    f"checkpoint lists the id {place.id!r} twice in 'params', for two parameters"
                )
    for key in state:
        if key not in owners:
            raise ValueError(
                f"checkpoint holds state under {key!r}, which is in 'params' of none of its groups"
            )


def _fill_in(
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[dict[str, Any]],
    places: Sequence[Sequence[Place | None]],
) -> None:
    """Give saved groups the optimizer's values of settings that they lack, in place."""
    for group, row in zip(groups, places, strict=True):
        for i in {place.group for place in row if place is not None}:
            for key, value in group.items():
                if key not in ("params", "param_names", "adamw_lr_ratio", *LISTS):
                    saved[i][key] = _put_back(key, value, saved[i].get(key, value))


def complete(
    groups: Sequence[dict[str, Any]],
    defaults: dict[str, Any],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Fill in what groups and defaults of an older pickle lack, in place.

    Args:
        groups: The groups of an optimizer that was unpickled, copied or loaded.
        defaults: Its defaults, which an older pickle brings too.
        state: Its state.
    """
    default_rule = RULE_CLASSES[defaults["method"]]
    old = [group for group in groups if "draws" not in group]
    # a pickle of a time when all weights were rounded to nearest goes on like that
    before = {} if "write" in defaults else {"write": "nearest"}
    for values in (defaults, *groups):
        values.update(before | values)
        rule_name = values.setdefault("rule", None)
        rule = RULE_CLASSES.get(str(rule_name), default_rule)
        if values is not defaults:
            for key, value in MEANT_BEFORE.items():
                values.setdefault(key, value)
        _store_old_adamw_lr(values)
        rule.complete_saved(values)
        own = {} if rule is default_rule else defaults_of(rule)
        common = {key: value for key, value in COMMON.items() if key != "adamw_lr"}
        if values is not defaults and "decay_lr" not in values:
            store_decay_lr(values, values)
        for key, value in (own | defaults | common | defaults_of(default_rule)).items():
            values.setdefault(key, defaults.get(key, value) if key not in own else own[key])
    for group in old:
        keep_old_rules(default_rule, group, [state.get(p, {}) for p in group["params"]])
    if any(str(group["state_dtype"]) == "int8" for group in groups):
        _recode_live(default_rule, groups, state)


def _recode_live(
    default_rule: type[Rule], groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any]
) -> None:
    """Put codes of an older pickle into today's layout, in place."""
    units, rules = _units(default_rule, groups)
    for p, entry in entries_of(units, rules).items():
        if p in state:
            new = recoded(state[p], entry, "a parameter")
            if new is not state[p]:
                state[p].clear()
                state[p].update(new)


def keep_old_rules(
    default_rule: type[Rule], group: dict[str, Any], entries: Sequence[Mapping[str, Any]]
) -> None:
    """Give a group of an older run the rules that its parameters had, as their state tells.

    Later versions route some shapes and names otherwise; a run goes on as it began.

    Args:
        default_rule: The optimizer's rule class.
        group: The group, with its parameters; it gets ``rules`` if they differ from today's.
        entries: State of each parameter.
    """
    rule = rule_of(group, default_rule)
    is_told = group.get("rules") is not None or group["rule"] is not None
    if rule is None or is_told or len(rule.members) != 1:
        return
    today = ["matrix" if flag else "adamw" for flag in _matrix_flags(default_rule, group)]
    found = list(today)
    for i, entry in enumerate(entries):
        if isinstance(entry, Mapping) and "step" in entry:  # a tensor in AdamW, else a number
            is_adamw = isinstance(entry["step"], Tensor) and "exp_avg" in entry
            found[i] = "adamw" if is_adamw else "matrix"
    if found != today:
        group["rules"] = found


def _store_old_adamw_lr(group: dict[str, Any]) -> None:
    """Replace ``adamw_lr`` of version 0.1 by its ratio to the learning rate, in place.

    Its AdamW parameters had groups of their own, whose ``lr`` it was.
    """
    if "adamw_lr_ratio" in group:
        return
    adamw_lr = group.pop("adamw_lr", None)
    for key, x in (("adamw_lr", adamw_lr), ("initial_lr", group.get("initial_lr"))):
        if x is not None and not (is_number(x) or (isinstance(x, Tensor) and x.numel() == 1)):
            raise ValueError(f"{key} in a group of the checkpoint must be a number, got {x!r}")
    lr = float(group.get("initial_lr") or group.get("lr") or 0.0)
    is_ratio = adamw_lr is not None and group.get("rule") != "adamw" and lr > 0.0
    group["adamw_lr_ratio"] = exact_ratio(float(adamw_lr), lr) if is_ratio else None


def _bad_settings(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where} has settings that cannot be: {error}")


def _check_settings(default_rule: type[Rule], new_groups: Sequence[dict[str, Any]]) -> None:
    """Raise for a value of a group that no optimizer accepts."""
    for i, new in enumerate(new_groups):
        try:
            check_values(new)
            rule = rule_of(new, default_rule)
            check_eco(new, rule, adamw.betas_of(new))
            check_weight_norm(new, rule)
            check_decay(new)
            _check_numbers(new)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _bad_settings(f"group {i} of the checkpoint", error) from error
    check_lists(new_groups, " of the checkpoint")


def _check_numbers(group: Mapping[str, Any]) -> None:
    """Raise for a learning rate or decay that is not there; their values were checked."""
    for key in ("lr", "weight_decay"):
        if group[key] is None:
            raise ValueError(f"{key} must be a number from 0, got None")


def _units(
    default_rule: type[Rule], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[Unit], list[Rule]]:
    """Units of all groups, and their rules by ``Unit.rule``."""
    units: list[Unit] = []
    rules: list[Rule] = []
    position = 0
    for i, group in enumerate(groups):
        for part in parts_of(group, rule_of(group, default_rule), position)[0]:
            for unit in units_of(i, group, part):
                unit.rule = len(rules)
                units.append(unit)
            rules.append(part.rule)
        position += len(group["params"])
    return units, rules


def _check_state(
    default_rule: type[Rule],
    groups: Sequence[Mapping[str, Any]],
    new_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
) -> dict[Any, Any]:
    """Raise unless the saved state of every parameter is empty or complete, and sound.

    Returns:
        The state, with codes of older versions in today's layout, and of whole tensors for sharded
        parameters what this process holds, so that torch moves and casts no more than that.
    """
    targets = [
        {**new, "params": group["params"]} for group, new in zip(groups, new_groups, strict=True)
    ]
    try:
        units, rules = _units(default_rule, targets)
    except TypeError as error:
        raise _bad_settings("the checkpoint", error) from error
    entries = entries_of(units, rules)
    modes = _modes(targets)
    texts = {
        p: describe(listed(group, "param_names", j), p, j)
        for group in groups
        for j, p in enumerate(group["params"])
    }
    keys = {
        p: key
        for group, new in zip(groups, new_groups, strict=True)
        for p, key in zip(group["params"], new["params"], strict=True)
    }
    by_param = {p: state.get(key, {}) for p, key in keys.items()}
    for p, entry in entries.items():
        by_param[p] = recoded(entry.needed(by_param[p]), entry, texts[p])
    started: dict[Tensor, set[str]] = {}
    for unit in units:
        first = unit.params[0]
        if _is_started(unit, by_param[first], texts[first]):
            for p in unit.params:
                started.setdefault(p, set()).add(unit.tag)
    for p, text in texts.items():
        if is_lazy(p):
            _refuse_state_of_lazy(by_param[p], text)
            continue
        method = default_rule.method() if p in entries else "AdamW"
        entry = entries[p] if p in entries else adamw_entry(p, modes[p])
        _check_entry(by_param[p], entry, p, text, method, started.get(p, set()))
        by_param[p] = _cut(by_param[p], entry)
    return {**state, **{key: by_param[p] for p, key in keys.items() if key in state}}


def _cut(found: Mapping[str, Any], entry: Entry) -> Mapping[str, Any]:
    """State that was checked, with whole tensors cut where the weight is sharded."""
    pieces = {
        key: x.layout.cut(found[key])
        for key, x in entry.tensors.items()
        if x.layout is not None and key in found and not is_sharded(found[key])
    }
    return {**found, **pieces} if pieces else found


def _modes(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """How each parameter is written."""
    return {p: mode_of(group, p) for group in groups for p in group["params"]}


def _refuse_state_of_lazy(found: Any, text: str) -> None:
    if found:
        raise ValueError(
            f"checkpoint holds state for {text}, which has no shape yet; run the model once before "
            "loading"
        )


def _is_started(unit: Unit, found: Any, text: str) -> bool:
    """Whether a saved unit was updated and refreshed, as far as its clocks tell."""
    if not isinstance(found, Mapping):
        return False
    key = unit.refreshed_key if unit.refreshed_key in found else unit.step_key
    value = found.get(key, 0)
    return isinstance(value, int | float | Tensor) and clock_value(key, value, text) > 0


def _check_entry(
    found: Any, expected: Entry, p: Tensor, text: str, method: str, started: Set[str]
) -> None:
    """Refuse the saved state of a parameter unless it is empty, or complete and sound.

    Args:
        found: The saved state.
        expected: What it may hold.
        p: The parameter.
        text: How a message names the parameter.
        method: Name of what trains it.
        started: Tags of the views whose state was in use.

    Raises:
        ValueError: With the first key that is missing, unknown or wrong.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"checkpoint state of {text} must be a dict, got {type(found).__name__}")
    tensors = {key: value for key, value in found.items() if not is_clock(str(key))}
    if method == "AdamW" and RESIDUAL not in expected.tensors:  # another write mode leaves it out
        tensors.pop(RESIDUAL, None)
    advice = "load a checkpoint of the same optimizer with the same groups"
    for key in sorted(tensors.keys() - expected.tensors.keys(), key=str):
        raise ValueError(
            f"checkpoint holds {key!r} for {text}, which {method} does not know; {advice}"
        )
    moved = check_clocks(found, expected, text) or bool(started)  # clocks lie at a first member
    lacks = missing_key(found, expected)
    # between windows a rule keeps nothing, but what rounding has cut off
    own = {key for key in tensors if base_of(key) in DRIVER_SLOTS}
    is_empty = not tensors.keys() - (own if expected.may_be_empty else set())
    if lacks is not None and not (is_empty and (expected.may_be_empty or not moved)):
        raise ValueError(f"checkpoint lacks {lacks!r} for {text}, which {method} needs; {advice}")
    if method == "AdamW" and tensors and "step" not in found:
        raise ValueError(f"checkpoint lacks 'step' for {text}, which AdamW needs; {advice}")
    for key, value in tensors.items():
        check_tensor(key, value, expected.tensors[key], p, text)
        in_use = key.removeprefix(base_of(key)) in started
        check_values_of(key, value, expected.tensors[key], text, in_use)


def restore(
    default_rule: type[Rule],
    groups: Sequence[Mapping[str, Any]],
    state: Any,
    saved: Mapping[str, Any],
) -> set[tuple[Tensor, str]]:
    """Put back the saved tensors that torch has cast, in the dtype their slot declares.

    Integers come back exactly as saved, floats in their slot's dtype (for a checkpoint of the same
    settings: as saved). AdamW's state stays as torch loads it where weights are rounded to nearest;
    else moments are float32, and a residual that the file lacks is 0. State of a sharded weight
    comes back as DTensors: a whole tensor is cut, a DTensor of other placements or of another mesh
    is redistributed, which is all that is sent. State of a plain weight comes back whole.

    Args:
        default_rule: The optimizer's rule class.
        groups: The optimizer's groups, as torch has loaded them.
        state: The optimizer's state, as torch has loaded it; changed in place.
        saved: What :func:`prepare` returned.

    Returns:
        (parameter, key) of state that the checkpoint lacked and that has start values now.
    """
    units, rules = _units(default_rule, groups)
    entries = entries_of(units, rules)
    for group, new in zip(groups, saved["param_groups"], strict=True):
        for p, key in zip(group["params"], new["params"], strict=True):
            # all ranks in the same order, as DTensors of other placements are sent
            for name, value in sorted(saved["state"].get(key, {}).items()):
                if p not in entries:
                    _restore_adamw(p, group, state[p], name, value)
                elif is_clock(name):
                    state[p][name] = int(value)
                else:
                    state[p][name] = _as_saved(value, p, entries[p], name)
        _fill_residuals([p for p in group["params"] if p not in entries], group, state)
    for unit in units:
        if unit.params[0] in state:  # torch.optim.Muon keeps no clock
            state[unit.params[0]].setdefault(unit.step_key, 0)
    if all(isinstance(key, str) for key in saved["state"]):
        _fill_beginnings(default_rule, groups, state, units, rules)
    missing = {
        (p, key)
        for p, entry in entries.items()
        for key in entry.optional
        if _is_in_use(state.get(p, {}), entry) and key not in state[p]
    }
    for p, key in missing:
        x = entries[p].tensors[key]
        fill = NOT_MEASURED if base_of(key) == RADIUS else 0.0
        if x.layout is not None:
            state[p][key] = x.layout.full(fill, x.dtype, p.device)
            continue
        value = torch.full(x.shape, fill, dtype=x.dtype, device=x.device)
        state[p][key] = pinned(value, p.device)
    return missing


def _is_in_use(found: Mapping[str, Any], entry: Entry) -> bool:
    """Whether a parameter has state, or was updated by a rule that needs none."""
    moved = not entry.may_be_empty and any(found.get(key) for key in entry.clocks)
    return moved or bool(found.keys() & entry.tensors.keys())


def _fill_beginnings(
    default_rule: type[Rule],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    units: Sequence[Unit],
    rules: Sequence[Rule],
) -> None:
    """Store where state that comes and goes began, if a distributed checkpoint has lost it.

    torch loads into the keys that a fresh optimizer has, whose state begins with the first update.
    The rule's own beginning is right unless settings were changed inside of a window.
    """
    if not any(map(drops_state, rules)):
        return
    assign_block_positions(units, rules, [rule_of(x, default_rule) for x in groups], groups)
    for unit in units:
        first, rule = state.get(unit.params[0], {}), rules[unit.rule]
        if not drops_state(rule) or unit.state_since_key in first:
            continue
        start = rule.state_since_at(unit.block_position, max(1, first.get(unit.step_key, 0)))
        if start > 1 and unit.has_state(state):
            first[unit.state_since_key] = start


def _restore_adamw(
    p: Tensor, group: Mapping[str, Any], entry: dict[str, Any], name: str, value: Any
) -> None:
    """Give saved state of a parameter of AdamW the form that its group needs, in its entry."""
    expected = None if is_lazy(p) else adamw_entry(p, mode_of(group, p))
    if name == "step":
        if not _is_step_tensor(value):
            value = local(value) if isinstance(value, Tensor) else value
            entry[name] = adamw.step_tensor(p, group, float(value))
    elif expected is None:
        return
    elif name not in expected.tensors:
        del entry[name]
    elif (
        entry[name].dtype != expected.tensors[name].dtype  # torch has cast it to the weight's
        or is_sharded(value)
        or is_sharded(p)
    ):
        entry[name] = _as_saved(value, p, expected, name)


def _fill_residuals(
    params: Sequence[Tensor], group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Give parameters of AdamW whose file knows no residual one that is 0."""
    for p in params:
        entry = state.get(p) or {}
        if "exp_avg" in entry and mode_of(group, p) == "kahan" and RESIDUAL not in entry:
            entry[RESIDUAL] = torch.zeros_like(p, dtype=torch.bfloat16)


def _is_step_tensor(value: Any) -> bool:
    is_plain = isinstance(value, Tensor) and not is_sharded(value)
    return is_plain and value.dim() == 0 and value.is_floating_point()


def _laid_out(value: Tensor, expected: Expected) -> Tensor:
    """A saved tensor as it is to lie over ranks, row by row where it is a DTensor."""
    layout = expected.layout
    if not is_sharded(value):
        return value
    value = value.to(device=expected.device)  # where its process group sends from
    if layout is None:
        return value.full_tensor()  # type: ignore[attr-defined,no-any-return]
    X = layout.redistribute(value)
    held = local(X)
    return X if held.is_contiguous() else layout.wrap(held.contiguous())


def _as_saved(value: Tensor, p: Tensor, entry: Entry, key: str) -> Tensor:
    """A saved tensor in its slot's dtype, where and as the slot is kept."""
    expected = entry.tensors[key]
    value = _laid_out(value, expected)
    is_float = value.is_floating_point() and expected.dtype.is_floating_point
    dtype = expected.dtype if is_float else value.dtype
    # torch moved pools off the host too
    return pinned(value.to(device=torch.device(expected.device), dtype=dtype), p.device)
