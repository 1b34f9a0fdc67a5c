"""Policies: which rule each role of a model gets, in whatever form it is named.

A policy maps parts and roles of a :class:`Row` to group keys. What the place of a weight in its
layer tells (view, axis, pair, centring, side) is filled in for rules that have such a field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._core.rule import RULE_CLASSES, Rule, rule_class, settings_of
from .._core.validation import check, describe_unknown
from .classify import Row
from .residual_sides import asks_side, short_side
from .role_table import PART_TABLE, RULE_OF_ROLE, decay_factor

Settings = dict[str, Any]
PER_HEAD_MUON = {"rule": "Muon", "view": "heads"}
NO_DECAY: Settings = {"weight_decay": 0.0}
ROLE_POLICIES: dict[str, dict[str, Settings]] = {
    "symmetry": {
        **{part: PER_HEAD_MUON for part in ("query", "key", "value", "qkv", "out")},
        **{part: {"rule": "Hybrid"} for part in ("gate", "up", "gate_up", "down")},
        **{role: {"rule": "Muon"} for role in ("hidden", "conv", "expert")},
        "embedding": {"rule": "RowNorm", **NO_DECAY},
        "head": {"rule": "RowNorm", **NO_DECAY},
        "router": {"rule": "RowNorm", "rms_target": 0.06, **NO_DECAY},
        "position": {"rule": "adamw"},
    },
    "muon+adamw": {role: {"rule": "Muon"} for role in ("hidden", "conv", "expert", "router")},
    "adamw": {},
}
"""Part or role of a weight -> group keys, the part first; a weight without entry is AdamW's."""
PAPER_LRS = {
    "qwen3": {"adamw": 5e-2, "hidden": 2e-2, "embedding": 5e-1, "head": 5e-3},
    "gemma3": {"adamw": 5e-2, "hidden": 2e-2, "embedding": 5e-3, "head": 5e-3},
    "olmoe": {"adamw": 1e-2, "hidden": 5e-3, "embedding": 5e-1, "head": 5e-3, "router": 7.5e-4},
    "gpt_oss": {"adamw": 5e-3, "hidden": 1e-3, "embedding": 1e-1, "head": 1e-3, "router": 7.5e-4},
}
"""Published learning rates by model: row norm for the embedding, centred row norm for the head."""
PAPER_SETTINGS: dict[str, Settings] = {
    "RowNorm": {"adjust_lr_fn": "none", "eps": 1e-8},
    "Hybrid": {
        "adjust_lr_fn": "none",
        "alpha": 1.0,
        "polar": "inverse_root",
        "ns_steps": 5,
        "eps": 1e-8,
    },
    "Muon": {"adjust_lr_fn": "original", "momentum_kind": "sum", "polar": "polar_express_safe"},
}
"""Settings of the published code for the rules of these policies."""


def to_group_keys(choice: Any) -> Settings:
    """Group keys of whatever names a rule: text, keys, rule, class, or a class with arguments."""
    if isinstance(choice, partial):
        return {**to_group_keys(choice.func), **choice.keywords}
    if isinstance(choice, Mapping) and isinstance(choice.get("rule"), str):
        return {**choice, **to_group_keys(choice["rule"])}
    if isinstance(choice, Rule):
        plain = {f.name: f.default for f in fields(choice)}
        own = {k: v for k, v in settings_of(choice).items() if v != plain[k]}
        return {"rule": choice.method(), **own}
    if isinstance(choice, type) and issubclass(choice, torch.optim.Optimizer):
        choice = "adamw" if choice is torch.optim.AdamW else choice.__name__
    elif isinstance(choice, type) and issubclass(choice, Rule):
        choice = choice.method()
    check(
        isinstance(choice, str),
        f"a rule is named by an optimizer class, functools.partial of one, a method's name, "
        f"'adamw' or a dict of group keys with 'rule', got {choice!r}",
    )
    return {"rule": choice if choice == "adamw" else rule_class(choice).method()}


POLICY_KEYS = {*RULE_OF_ROLE, *(part for part, _, _ in PART_TABLE)}
POLICY_KEYS |= {"token", "position", "tied", "vocabulary", "classes", "patch"}
"""Keys that a policy may have: roles and parts."""


def check_role_policy(policy: Any) -> None:
    """Refuse an unknown policy before any weight is looked at."""
    if isinstance(policy, Mapping):
        message = describe_unknown(policy, POLICY_KEYS, "policy key")
        check(message is None, message or "")
        return
    known = ", ".join(ROLE_POLICIES)
    text = f"policy must be one of {known} or a dict of rules by role, got {policy!r}"
    check(isinstance(policy, str) and policy in ROLE_POLICIES, text)


def policy_groups(
    rows: Sequence[Row],
    params: Sequence[Tensor],
    policy: str | Mapping[str, Any],
    scale: str,
    lr: Any,
    own: Mapping[str | None, Settings],
    *,
    decays: bool = False,
) -> list[Settings]:
    """Parameter groups: one for each set of keys, with gate and up of a layer side by side.

    Where one rule serves all matrices there is one group, so that processes that hold different
    parameters without names have equal groups.

    Args:
        rows: One row for each weight.
        params: The weights.
        policy: One of :data:`ROLE_POLICIES`, or rules by part and role.
        scale: ``"match_rms_adamw"``, ``"paper"`` or ``"paper:NAME"``.
        lr: Learning rate of the hidden matrices.
        own: Keys of weights that have an override, by name.
        decays: Whether vectors get no weight decay (default: False).
    """
    table = _paper_lrs(scale, rows)
    keys = [_group_keys(row, policy, own.get(row.name), table, lr) for row in rows]
    shared_keys = _keys_of_one_group(rows, keys, policy, table, lr)
    groups: dict[str, Settings] = {}
    for run, group_keys in _member_runs(rows, keys):
        rule = "adamw" if group_keys["rule"] == "adamw" else "matrix"
        group_keys = shared_keys or group_keys
        group = groups.setdefault(
            repr(sorted(group_keys.items())),
            {"params": [], **group_keys, "rules": [], "roles": [], "reasons": []},
        )
        for j in run:
            row, p = rows[j], params[j]
            # the shape decides about a lazy parameter without a model, at its first step
            is_open = is_lazy(p) and not row.is_lazy
            group["params"].append(p if row.name is None else (row.name, p))
            group["rules"].append(None if is_open else rule)
            group["roles"].append(None if is_open else row.role)
            group["reasons"].append(None if is_open else _reason(row, policy, own))
            if decays:
                group.setdefault("decays", []).append(decay_factor(row.role))
    return sorted(groups.values(), key=lambda group: group["rule"] == "adamw")


def _keys_of_one_group(
    rows: Sequence[Row],
    keys: Sequence[Settings],
    policy: str | Mapping[str, Any],
    table: Mapping[str, float],
    lr: Any,
) -> Settings | None:
    """Keys of the one group in which all weights fit, with a rule for its matrices; else None.

    Without names they are those of hidden matrices, whichever weights there are.
    """
    adamw = {"rule": "adamw"}
    one = next((k for k in keys if k["rule"] != "adamw" and "pair" not in k), None)
    if all(row.name is None for row in rows) and not table:
        one = _group_keys(Row(None, (2, 2), "hidden", "matrix", ""), policy, None, table, lr)
    if one is None or one["rule"] == "adamw" or not all(k in (one, adamw) for k in keys):
        return None
    # values that the AdamW parameters of the group would follow too
    shared = {"lr", "weight_decay", "betas", *(k for k in one if k.startswith("adamw_"))}
    has_betas = any(f.name == "betas" for f in fields(rule_class(one["rule"])))
    return None if has_betas or shared & one.keys() else one


def _reason(row: Row, policy: str | Mapping[str, Any], own: Mapping[str | None, Settings]) -> str:
    """Why a weight has its rule: its part, its role's reason, the policy's line."""
    why = f"{row.part}: {row.why}" if row.part else row.why
    lines: Mapping[str, Any] = {} if row.name in own else _lines(row, policy)
    line = next((label for label in (row.part, row.role) if label in lines), None)
    return why if line is None else f"{why}; policy {line!r}"


def _lines(row: Row, policy: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The policy that decides about a weight: the user's where it has a line for the weight."""
    if isinstance(policy, str):
        return ROLE_POLICIES[policy]
    return policy if {row.part, row.role} & policy.keys() else ROLE_POLICIES["symmetry"]


def _paper_lrs(scale: str, rows: Sequence[Row]) -> Mapping[str, float]:
    """The published learning rates that ``adjust_lr_fn`` names; empty under match_rms_adamw."""
    name = scale.removeprefix("paper").removeprefix(":")
    if scale == "paper":
        name = "olmoe" if any(row.role == "router" for row in rows) else "qwen3"
    return PAPER_LRS.get(name, {})


def _member_runs(
    rows: Sequence[Row], keys: Sequence[Settings]
) -> Iterator[tuple[list[int], Settings]]:
    """Positions of weights that are stepped together, gate before up, with their group keys."""
    position = {row.name: i for i, row in enumerate(rows) if row.name is not None}
    done = set[int]()
    for i, row in enumerate(rows):
        if i in done:
            continue
        run, group_keys = [i], keys[i]
        if group_keys.get("pair") == "members":
            other = position.get(row.pair or "")
            if other is None or other in done or keys[other] != group_keys:
                group_keys = {**group_keys, "pair": None}
            else:
                run = [i, other] if row.part == "gate" else [other, i]
        done.update(run)
        yield run, group_keys


def _group_keys(
    row: Row,
    policy: str | Mapping[str, Any],
    own: Settings | None,
    table: Mapping[str, float],
    lr: Any,
) -> Settings:
    """Group keys of one weight.

    Under published learning rates the rules of this file's policies have published settings too.
    """
    chosen, is_own_policy = _policy_choice(row, policy) if own is None else (own, False)
    published = PAPER_SETTINGS.get(chosen["rule"], {}) if table and is_own_policy else {}
    keys = _with_place_keys(row, {**chosen, **published})
    if table and "lr" not in keys:
        kind = "adamw" if keys["rule"] == "adamw" else row.role
        keys["lr"] = lr * (table.get(kind, table["hidden"]) / table["hidden"])
    return keys


def _policy_choice(row: Row, policy: str | Mapping[str, Any]) -> tuple[Settings, bool]:
    """Group keys that the policy has for a weight, and whether a policy of this file gave them."""
    if isinstance(policy, Mapping):
        for label in (row.part, row.role):
            if label in policy:
                return to_group_keys(policy[label]), False
        policy = "symmetry"
    table = ROLE_POLICIES[policy]
    is_table = row.role in ("embedding", "head") and len(row.shape) == 2
    if not is_table and row.rule == "adamw":  # classify leaves tables to AdamW, a policy may not
        return {"rule": "adamw"}, True
    found = (table[label] for label in (row.part, row.role) if label in table)
    return next(found, {"rule": "adamw"}), True


def rule_override(choice: Any) -> Settings | None:
    """Group keys if an override names a rule; None for a role, which is :func:`classify`'s."""
    if isinstance(choice, str):
        return to_group_keys(choice) if choice == "adamw" or choice in RULE_CLASSES else None
    if isinstance(choice, Mapping):
        rule, more = choice.get("rule"), choice.keys() - {"rule"}
        is_rule = rule in RULE_CLASSES or (
            rule == "adamw" and not more & {f.name for f in fields(Row)}
        )
        return to_group_keys(choice) if is_rule else None
    return to_group_keys(choice)


def _with_place_keys(row: Row, keys: Settings) -> Settings:
    """Fill in keys by the place of a weight in its layer: view, side, axis, pair, centred."""
    keys = dict(keys)
    if keys["rule"] == "adamw":
        return keys
    cls = rule_class(keys["rule"])
    known = {f.name for f in fields(cls)}
    view = keys.get("view", row.view)
    if view == "heads":
        view = _head_view(row)
    if "axis" in known and row.part == "down":
        keys.setdefault("axis", "cols")
    if "centred" in known:
        keys.setdefault("centred", row.centred)
    if "pair" in known and "pair" not in keys and keys.get("axis", "rows") == "rows":
        fused = view.removeprefix("transposed:").partition(":")[0]
        if row.part == "gate_up" and fused in ("rows", "interleaved"):  # not cut, but folded
            keys["pair"] = "halves" if fused == "rows" else fused
            view = "transposed" if view.startswith("transposed:") else "auto"
        elif row.pair is not None:
            keys["pair"] = "members"
    keys.pop("view", None)
    if view != "auto":
        keys["view"] = view
    if "side" in known and "side" not in keys:
        own = {k: v for k, v in keys.items() if k in known}
        side = short_side(row) if asks_side(cls(**own)) else None
        keys.update({} if side is None else {"side": side})
    return keys


def _head_view(row: Row) -> str:
    """The view that takes a weight head by head; the row's view where heads are not known."""
    count = sum(row.heads)
    if not count:
        return row.view
    transposed = "transposed:" if row.view.startswith("transposed") else ""
    return f"{transposed}{'heads_in' if row.part == 'out' else 'heads'}:{count}"
