"""State dicts with one thing changed, as damage, other versions and other models make them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.fuzz_cases import value_of
from helpers.fuzz_values import (
    ODD_VALUES,
)


def mutate(saved: Any, kind: str, rng: random.Random) -> Any:
    """A state dict with one thing changed; itself where there is nothing to change."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return saved
    if kind in WHOLE:
        return WHOLE[kind](saved)
    state, groups = saved["state"], saved.get("param_groups")
    ids = [i for i, entry in state.items() if isinstance(entry, dict) and entry]
    if isinstance(groups, list) and groups and kind in GROUP_MUTATIONS:
        GROUP_MUTATIONS[kind](saved, groups, rng.choice(groups), rng)
    elif ids and kind in ENTRY_MUTATIONS:
        i = rng.choice(ids)
        ENTRY_MUTATIONS[kind](state, i, state[i], rng)
    elif ids and kind.startswith(("clock", "drop clock")):
        _mutate_clock(state[rng.choice(ids)], kind, rng)
    elif ids and kind in VALUE_MUTATIONS:
        entry = state[rng.choice(ids)]
        keys = [key for key, value in entry.items() if _is_plain(value)]
        if keys:
            key = rng.choice(sorted(keys))
            entry[key] = VALUE_MUTATIONS[kind](entry[key])
    return saved


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with dimensions that no mutation has made sparse or meta."""
    is_strided = isinstance(value, Tensor) and value.layout is torch.strided
    return is_strided and value.ndim > 0 and not value.is_meta


def _mutate_clock(entry: dict[str, Any], kind: str, rng: random.Random) -> None:
    clocks = [key for key in entry if str(key).partition(".")[0] in ("step", "refreshed", "held")]
    if not clocks:
        return
    key = rng.choice(sorted(clocks))
    if kind == "drop clock":
        del entry[key]
        return
    tensors = {
        "tensor": torch.tensor(2.0), "pair": torch.tensor([1.0, 2.0]),
        "meta": torch.zeros((), device="meta"),
    }  # fmt: skip
    word = kind.partition(" ")[2]
    entry[key] = tensors[word] if word in tensors else value_of(word)


def _permute(state: dict[Any, Any], i: Any, entry: Any, rng: random.Random) -> None:
    j = rng.choice(list(state))
    state[i], state[j] = state[j], state[i]


def _rename(state: dict[Any, Any], i: Any, entry: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(list(entry))
    entry[f"{key}_"] = entry.pop(key)


def _drop_key(state: dict[Any, Any], i: Any, entry: dict[str, Any], rng: random.Random) -> None:
    del entry[rng.choice(list(entry))]


def _filled(x: float) -> Callable[[Tensor], Tensor]:
    def fill(value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        if value.is_floating_point() and value.numel():
            value.view(-1)[0] = x
        return value

    return fill


def _big_index(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else torch.full_like(value, 99)


def _odd_group_value(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    group[rng.choice([key for key in group if key != "params"])] = value_of(rng.choice(ODD_VALUES))


def _drop_group_key(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    del group[rng.choice(list(group))]


def _permute_names(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    if isinstance(group.get("param_names"), list):  # another mutation may have come before
        rng.shuffle(group["param_names"])


def _odd_names(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    if "param_names" in group:
        odd = [["x"], [None] * len(group["params"]), "abc", None, 3, [1] * len(group["params"])]
        group["param_names"] = rng.choice(odd)


WHOLE: dict[str, Callable[[Any], Any]] = {
    "state list": lambda saved: {**saved, "state": list(saved["state"].values())},
    "no state": lambda saved: {"param_groups": saved.get("param_groups")},
    "no groups": lambda saved: {"state": saved["state"]},
    "list": lambda saved: [saved],
    "groups None": lambda saved: {**saved, "param_groups": None},
    "extra id": lambda saved: {**saved, "state": {**saved["state"], 999: {"step": 1}}},
}
GROUP_MUTATIONS: dict[str, Callable[..., Any]] = {
    "drop group": lambda saved, groups, group, rng: groups.remove(group),
    "extra group": lambda saved, groups, group, rng: groups.append({**group, "params": [998]}),
    "fewer params": lambda saved, groups, group, rng: group["params"] and group["params"].pop(),
    "drop names": lambda saved, groups, group, rng: group.pop("param_names", None),
    "permute names": _permute_names,
    "odd names": _odd_names,
    "drop group key": _drop_group_key,
    "odd group value": _odd_group_value,
}
ENTRY_MUTATIONS: dict[str, Callable[..., Any]] = {
    "drop entry": lambda state, i, entry, rng: state.pop(i),
    "drop key": _drop_key,
    "rename key": _rename,
    "extra key": lambda state, i, entry, rng: entry.update(extra=torch.zeros(2)),
    "entry None": lambda state, i, entry, rng: state.update({i: None}),
    "entry list": lambda state, i, entry, rng: state.update({i: [1, 2]}),
    "permute entries": _permute,
}
VALUE_MUTATIONS: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.reshape(-1, 1, 1),
    "longer": lambda x: torch.cat([x, x]),
    "cast int": lambda x: x.to(torch.int32),
    "cast half": lambda x: x.half() if x.is_floating_point() else x,
    "cast complex": lambda x: x.to(torch.complex64),
    "nan": _filled(math.nan),
    "inf": _filled(math.inf),
    "negative": _filled(-1.0),
    "none": lambda x: None,
    "text": lambda x: "x",
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "big index": _big_index,
}
