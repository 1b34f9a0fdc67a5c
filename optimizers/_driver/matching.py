"""Which saved parameter is which, and what a checkpoint says of each group of the optimizer.

Parameters match by name where both sides have the same names, whatever the order and the groups;
else by position, as in torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import adamw
from .param_groups import LISTS, exact_ratio, listed, plain_name

HELD_BY_LISTS = {"view": "views", "side": "sides"}
"""Settings that a group can hold for each parameter, with the list that does so."""
ADAMW_ONLY = ("foreach", "fused", "capturable")
SHARED_WITH_ADAMW = ("maximize", "nonfinite", "method")
Group = Mapping[str, Any]


class Place(NamedTuple):
    """Where a checkpoint holds a parameter: its group, its number there, id and flat position."""

    group: int
    number: int
    id: Hashable
    position: int


class Match(NamedTuple):
    """Per group of the optimizer, the place of each parameter; None for one without a place.

    Attributes:
        places: The places.
        warning: What to say to the user once the checkpoint has passed all checks, or None.
    """

    places: list[list[Place | None]]
    warning: str | None = None


def places_of(saved: Sequence[Group]) -> list[list[Place]]:
    """The places of a checkpoint, group by group."""
    places: list[list[Place]] = []
    position = 0
    for i, group in enumerate(saved):
        places.append([Place(i, j, key, position + j) for j, key in enumerate(group["params"])])
        position += len(group["params"])
    return places


def match(
    groups: Sequence[Group],
    saved: Sequence[Group],
    matrix_flags: Callable[[Group], Sequence[bool]],
) -> Match | None:
    """Find the place of every parameter.

    Args:
        groups: The optimizer's groups.
        saved: The groups of the checkpoint.
        matrix_flags: Tells for a group of the optimizer which parameters go to its rule.

    Returns:
        The match, or None where the lengths differ and nothing else tells parameters apart.

    Raises:
        ValueError: If the names differ and the lengths too.
    """
    places = places_of(saved)
    own, theirs = _names(groups), _saved_names(saved)
    if own is None or theirs is None:
        found = _by_position(groups, saved, places, matrix_flags)
        return None if found is None else Match(found)
    flat = [place for row in places for place in row]
    by_name = dict(zip(_numbered(theirs), flat, strict=True))
    wanted = _numbered(own)
    params = [p for group in groups for p in group["params"]]
    # frozen parameters belong to the optimizer, but not to files of version 0.1
    missing = [i for i, key in enumerate(wanted) if key not in by_name]
    only_frozen = all(not params[i].requires_grad for i in missing)
    if len(wanted) - len(missing) == len(by_name) and only_frozen:
        keys = iter(wanted)
        return Match([[by_name.get(next(keys)) for _ in group["params"]] for group in groups])
    difference = _first_difference(own, theirs)
    found = _by_position(groups, saved, places, matrix_flags)
    if found is None:
        raise ValueError(
            f"the checkpoint holds other parameters than the optimizer: {difference}; build the "
            "optimizer for the model that was saved"
        )
    return Match(
        found,
        f"the checkpoint names other parameters than the optimizer: {difference}; it was loaded by "
        "position",
    )


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with how often it came before: two models may share names."""
    seen = Counter[str]()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def grouped_as(groups: Sequence[Group], saved: Sequence[Group]) -> list[dict[str, Any]] | None:
    """The optimizer's parameters in groups like those of a checkpoint; None if the names differ.

    Args:
        groups: The optimizer's groups.
        saved: The groups of the checkpoint.
    """
    own, theirs = _names(groups), _saved_names(saved)
    if own is None or theirs is None or sorted(own) != sorted(theirs):
        return None
    places = iter([(group, j) for group in groups for j in range(len(group["params"]))])
    place_of = dict(zip(_numbered(own), places, strict=True))
    keys = iter(_numbered(theirs))
    result = []
    for part in saved:
        members = [place_of[next(keys)] for _ in part["params"]]
        if not members:
            return None
        new = {key: value for key, value in members[0][0].items() if key not in LISTS}
        for key in ("params", "param_names", *LISTS):
            values = [listed(group, key, j) for group, j in members]
            if any(value is not None for value in values):
                new[key] = values
        result.append(new)
    return result


def _first_difference(own: Sequence[str], theirs: Sequence[str]) -> str:
    for i, (a, b) in enumerate(zip(own, theirs, strict=False)):
        if a != b:
            return f"it has {b!r} where the optimizer has {a!r} (parameter {i})"
    if len(own) > len(theirs):
        return f"it lacks {own[len(theirs)]!r}"
    return f"only the checkpoint has {theirs[len(own)]!r}"


def _names(groups: Sequence[Group]) -> list[str] | None:
    """Names of all parameters without wrappers' parts; None unless every parameter has one."""
    names: list[str] = []
    for group in groups:
        group_names = group.get("param_names")
        if not group["params"]:
            continue
        if not is_list(group_names, len(group["params"])):
            return None
        assert group_names is not None
        if not all(isinstance(name, str) for name in group_names):
            return None
        names += map(plain_name, group_names)
    return names


def _saved_names(saved: Sequence[Group]) -> list[str] | None:
    """Names of the saved parameters: torch's distributed checkpoints have them for ids."""
    ids = [key for group in saved for key in group["params"]]
    if ids and all(isinstance(key, str) for key in ids):
        return [plain_name(key) for key in ids]
    return _names(saved)


def _by_position(
    groups: Sequence[Group],
    saved: Sequence[Group],
    places: list[list[Place]],
    matrix_flags: Callable[[Group], Sequence[bool]],
) -> list[list[Place | None]] | None:
    """Places by position; None if the lengths differ.

    Version 0.1 split a group with ``adamw_lr`` in two, matrices first: these are joined again.
    """
    lengths = [len(row) for row in places]
    if lengths == [len(group["params"]) for group in groups]:
        return [list(row) for row in places]
    if len(saved) <= len(groups):
        return None
    found: list[list[Place | None]] = []
    k = 0
    for group in groups:
        flags = list(matrix_flags(group))
        split = [flags.count(True), flags.count(False)]
        if lengths[k : k + 1] == [len(flags)]:
            found.append([*places[k]])
            k += 1
        elif lengths[k : k + 2] == split and [
            saved[j].get("rule") == "adamw" for j in (k, k + 1)
        ] == [False, True]:
            parts = {True: iter(places[k]), False: iter(places[k + 1])}
            found.append([next(parts[flag]) for flag in flags])
            k += 2
        else:
            return None
    return found if k == len(saved) else None


# settings -----------------------------------------------------------------------------------------


def is_list(value: Any, length: int) -> bool:
    """Whether a group value is a list of this length."""
    return isinstance(value, list | tuple) and len(value) == length


def realigned(group: Group, first: int) -> dict[str, Any]:
    """A saved group whose lists follow its ids where these are names.

    torch's distributed checkpoints sort the ids as the optimizer's parameters and leave the lists.

    Args:
        group: The group.
        first: Flat position of its first parameter.
    """
    ids, names = group["params"], group.get("param_names")
    if not ids or not all(isinstance(key, str) for key in ids) or not is_list(names, len(ids)):
        return dict(group)
    assert names is not None
    order = {key: j for j, key in enumerate(_numbered([plain_name(name) for name in names]))}
    wanted = _numbered([plain_name(key) for key in ids])
    if any(key not in order for key in wanted):
        return dict(group)
    lists = {
        key: [listed(group, key, order[name]) for name in wanted]
        for key in ("param_names", *LISTS)
        if group.get(key) is not None
    }
    positions = [first + order[name] for name in wanted]
    return {**group, "positions": positions, **lists}


def regroup(
    groups: Sequence[Group], saved: Sequence[Group], places: Sequence[Sequence[Place | None]]
) -> list[dict[str, Any]]:
    """Settings of the optimizer's groups from the saved groups that hold their parameters.

    Args:
        groups: The optimizer's groups.
        saved: The checkpoint's groups, with what they lack filled in.
        places: Per group of the optimizer, the place of each parameter.

    Returns:
        Groups for torch to load, whose ids stand in the order of the optimizer's parameters.

    Raises:
        ValueError: If saved groups differ in a setting of which a group has only one.
    """
    highest = max([-1, *(x for g in saved for x in g["params"] if isinstance(x, int))])
    fresh = iter(range(highest + 1, highest + 1 + sum(map(len, places))))
    positions = _positions(groups, saved, places)
    result = []
    for i, (group, row) in enumerate(zip(groups, places, strict=True)):
        feeders = sorted({place.group for place in row if place is not None})
        parts = {k: _of_one_rule(group, saved[k]) for k in feeders}
        new = _joined(group, parts, i) if parts else {}
        new |= _lists(group, parts, row)
        new["params"] = [next(fresh) if place is None else place.id for place in row]
        names = group.get("param_names")
        if is_list(names, len(row)):
            new["param_names"] = names
        elif parts and all(
            is_list(part.get("param_names"), len(part["params"])) for part in parts.values()
        ):
            new["param_names"] = [parts[x.group]["param_names"][x.number] for x in row if x]
        else:
            new.pop("param_names", None)
        if positions is not None:
            new["positions"] = positions[i]
        result.append(new)
    return result


def _positions(
    groups: Sequence[Group], saved: Sequence[Group], places: Sequence[Sequence[Place | None]]
) -> list[list[int]] | None:
    """Flat positions in the file, which key draws; None where they are those of the optimizer."""
    flat = [place for row in places for place in row]
    found = [
        place.position
        if (position := listed(saved[place.group], "positions", place.number)) is None
        else position
        for place in flat
        if place is not None
    ]
    if not found or (None not in flat and found == list(range(len(flat)))):
        return None
    known, fresh = iter(found), iter(range(max(found) + 1, max(found) + 1 + len(flat)))
    positions = [next(fresh) if place is None else next(known) for place in flat]
    if positions == list(range(len(flat))):
        return None
    rest = iter(positions)
    return [[next(rest) for _ in row] for row in places]


def _of_one_rule(group: Group, part: Group) -> dict[str, Any]:
    """A saved group of a module in version 0.1, which made one per rule, view and side.

    It becomes a group with lists; any other stays as it is.
    """
    count, rule = len(part["params"]), part.get("rule")
    is_old_module = is_list(part.get("roles"), count) and part.get("rules") is None
    if not is_old_module or group["rule"] is not None or rule not in ("adamw", part.get("method")):
        return dict(part)
    lists: dict[str, list[Any]] = {"rules": ["adamw" if rule == "adamw" else "matrix"] * count}
    for key, name in HELD_BY_LISTS.items():
        if name in group:
            lists[name] = [part.get(key)] * count
    own = {key: group[key] for key, name in HELD_BY_LISTS.items() if name in lists and key in group}
    new = {**part, **lists, **own}
    if rule != "adamw":
        new["rule"] = None
    return new


def _joined(group: Group, parts: Mapping[int, Group], number: int) -> dict[str, Any]:
    """Settings of one group from one or several saved groups; lists are treated apart.

    AdamW's own groups give the keys ``adamw_*``.
    """
    matrices = {k: part for k, part in parts.items() if part.get("rule") != "adamw"}
    vectors = {k: part for k, part in parts.items() if part.get("rule") == "adamw"}
    first = next(iter((matrices or vectors).values()))
    new = {key: value for key, value in first.items() if key not in ("params", *LISTS)}
    # lists say it of each parameter, but where the user has made an AdamW group of a whole module
    rules = [set(part.get("rules") or ()) for part in vectors.values()]
    if not matrices and any(rules) and set.union(*rules) == {"adamw"} and group["rule"] is None:
        new["rule"] = None
    for part in (matrices, vectors):
        decay_differs = part is matrices and _decays_can_hold(part)
        _refuse_differences(part, number, {"weight_decay"} if decay_differs else set())
    new["weight_decay"] = max(part["weight_decay"] for part in (matrices or vectors).values())
    if matrices and vectors:
        new |= _adamw_settings(new, matrices, vectors, number)
        new.pop("adamw_lr", None)  # the ratio says it
    return new


def _decays_can_hold(parts: Mapping[int, Group]) -> bool:
    """Whether factors of parameters can express that groups have different decays."""
    return all(part.get("adamw_weight_decay") is None for part in parts.values())


def _refuse_differences(parts: Mapping[int, Group], number: int, allowed: set[str]) -> None:
    """Raise if saved groups that one group is to hold differ in a setting."""
    (k, first), *others = parts.items() or [(0, {})]
    skipped = {"params", "param_names", *LISTS, *HELD_BY_LISTS, *allowed}
    for j, other in others:
        for key in sorted((first.keys() | other.keys()) - skipped):
            _refuse_difference(key, (k, first.get(key)), (j, other.get(key)), number)


def _refuse_difference(
    key: str, first: tuple[int, Any], other: tuple[int, Any], number: int
) -> None:
    (k, a), (j, b) = first, other
    if not _equal(a, b):
        raise ValueError(
            f"groups {k} and {j} of the checkpoint have {key} {a!r} and {b!r}, of which parameter "
            f"group {number} can hold only one; pass groups as they were saved"
        )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b or (a is not None and b is not None and float(a) == float(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)


def _adamw_settings(
    new: Group, matrices: Mapping[int, Group], vectors: Mapping[int, Group], number: int
) -> dict[str, Any]:
    """Keys ``adamw_*`` that give the values of AdamW's saved groups beside those of matrices."""
    (k, matrix), (j, vector) = next(iter(matrices.items())), next(iter(vectors.items()))
    for key in SHARED_WITH_ADAMW:
        _refuse_difference(key, (k, matrix.get(key)), (j, vector.get(key)), number)
    keys = {key: vector[key] for key in ADAMW_ONLY if key in vector}
    keys["adamw_eps"] = vector.get("adamw_eps", new.get("adamw_eps"))
    if adamw.betas_of(vector) != adamw.betas_of(new):
        keys["adamw_betas"] = adamw.betas_of(vector)
    decay, own = (_adamw_decay(group) for group in (vector, new))
    if decay != own:
        keys["adamw_weight_decay"] = decay
    keys["adamw_lr_ratio"] = _lr_ratio(matrix, vector, number)
    return keys


def _adamw_decay(group: Group) -> float:
    decay = group.get("adamw_weight_decay")
    return float(group["weight_decay"] if decay is None else decay)


def _lr_ratio(matrix: Group, vector: Group, number: int) -> float | None:
    """AdamW's learning rate relative to that of the matrices; None where they are equal.

    Raises:
        ValueError: If the matrices have lr 0, AdamW has not, and no first value is known.
    """
    own: float | None = vector.get("adamw_lr_ratio")
    for key in ("lr", "initial_lr"):
        x, y = float(matrix.get(key) or 0.0), float(vector.get(key) or 0.0)
        if x == y and x != 0.0:
            return own
        if x != 0.0:
            return exact_ratio(y if own is None else y * own, x)
    if float(vector["lr"]) == 0.0:
        return own
    raise ValueError(
        f"the checkpoint has lr 0 for the matrices of parameter group {number} and "
        f"{float(vector['lr'])!r} for its AdamW parameters, which no ratio can hold; pass groups "
        "as they were saved"
    )


def _lists(
    group: Group, parts: Mapping[int, Group], row: Sequence[Place | None]
) -> dict[str, list[Any]]:
    """Values of each parameter, in the order of the optimizer's parameters."""
    factors = _decay_factors(parts)
    found: dict[str, list[Any]] = {}
    for key in sorted(_wanted_lists(group, parts)):
        found[key] = values = []
        for i, place in enumerate(row):
            part, number = (group, i) if place is None else (parts[place.group], place.number)
            has_list = part.get(key) is not None  # one that is shorter says nothing of the rest
            value = listed(part, key, number) if has_list else _default(key, part)
            if key == "rules" and value is None and part.get("rule") == "adamw":
                value = "adamw"  # also of a parameter that has got a shape since
            if key == "decays" and place is not None:
                value = (1.0 if value is None else value) * factors.get(place.group, 1.0)
            values.append(value)
    return found


def _wanted_lists(group: Group, parts: Mapping[int, Group]) -> set[str]:
    """Lists that a group gets from the saved groups; others of the optimizer stay as they are."""
    wanted = {key for key in LISTS if any(part.get(key) is not None for part in parts.values())}
    wanted -= {"positions"}
    matrices = [part for part in parts.values() if part.get("rule") != "adamw"]
    if 0 < len(matrices) < len(parts):
        wanted.add("rules")
    for key, name in HELD_BY_LISTS.items():
        if len({str(part.get(key)) for part in matrices}) > 1:
            wanted.add(name)
    if group.get("decays") is not None or _decay_factors(parts):  # version 0.1 decayed every vector
        wanted.add("decays")
    return wanted


def _decay_factors(parts: Mapping[int, Group]) -> dict[int, float]:
    """Per saved group of matrices, its decay relative to the largest; empty if they are equal."""
    decays = {
        k: float(part["weight_decay"]) for k, part in parts.items() if part.get("rule") != "adamw"
    }
    if len(set(decays.values())) < 2:
        return {}
    return {k: exact_ratio(decay, max(decays.values())) for k, decay in decays.items()}


def _default(key: str, part: Group) -> Any:
    """What a group without a list says of each of its parameters."""
    if key == "rules":
        return "adamw" if part.get("rule") == "adamw" else "matrix"
    return {"views": part.get("view"), "sides": part.get("side"), "decays": 1.0}.get(key)
