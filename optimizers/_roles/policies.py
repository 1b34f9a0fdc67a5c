"""Policies: which rule each role of a model gets, in whatever form it is named.

A policy maps parts and roles of a :class:`Row` to group keys. What the place of a weight in its
layer tells (view, axis, pair, centring, side) is filled in for rules that have such a field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._core.rule import RULE_CLASSES, Rule, rule_class, settings_of
from .._core.validation import check, describe_unknown
from .classify import Assignment, Row
from .residual_sides import asks_side, short_side
from .role_table import PART_TABLE, RULE_OF_ROLE

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
"""Part or role of a weight -> group keys, the part first; what is not there is AdamW's."""
PAPER_LRS = {
    "qwen3": {"adamw": 5e-2, "hidden": 2e-2, "embedding": 5e-1, "head": 5e-3},
    "gemma3": {"adamw": 5e-2, "hidden": 2e-2, "embedding": 5e-3, "head": 5e-3},
    "olmoe": {"adamw": 1e-2, "hidden": 5e-3, "embedding": 5e-1, "head": 5e-3, "router": 7.5e-4},
    "gpt_oss": {"adamw": 5e-3, "hidden": 1e-3, "embedding": 1e-1, "head": 1e-3, "router": 7.5e-4},
}
"""Published learning rates by model, for row norm on embedding and centred row norm on head."""
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
"""How the published code sets the rules of these policies."""


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
"""What a policy may have as keys: roles and parts."""


def check_role_policy(policy: Any) -> None:
    """Refuse what is no policy, before any weight is looked at."""
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
) -> list[Settings]:
    """Parameter groups: one for each set of keys, with gate and up of a layer side by side.

    Args:
        rows: What is known of each weight.
        params: The weights.
        policy: One of :data:`ROLE_POLICIES`, or rules by part and role.
        scale: ``"match_rms_adamw"``, ``"paper"`` or ``"paper:NAME"``.
        lr: Learning rate of the hidden matrices.
        own: Keys of weights that have an override, by name.
    """
    name = scale.removeprefix("paper").removeprefix(":")
    if scale == "paper":
        name = "olmoe" if any(row.role == "router" for row in rows) else "qwen3"
    table = PAPER_LRS.get(name, {})
    keys = [_group_keys(row, policy, own.get(row.name), table, lr) for row in rows]
    place = {row.name: i for i, row in enumerate(rows) if row.name is not None}
    groups: dict[str, Settings] = {}
    done = set[int]()
    for i, row in enumerate(rows):
        if i in done:
            continue
        members_run, group = [i], keys[i]
        if group.get("pair") == "members":
            other = place.get(row.pair or "")
            if other is None or other in done or keys[other] != group:
                group = {**group, "pair": None}
            else:
                members_run = [i, other] if row.part == "gate" else [other, i]
        done.update(members_run)
        target = groups.setdefault(
            repr(sorted(group.items())), {"params": [], **group, "roles": [], "reasons": []}
        )
        for j in members_run:
            row, p = rows[j], params[j]
            target["params"].append(p if row.name is None else (row.name, p))
            target["roles"].append(row.role)
            target["reasons"].append(f"{row.part}: {row.why}" if row.part else row.why)
    return sorted(groups.values(), key=lambda group: group["rule"] == "adamw")


def _group_keys(
    row: Row,
    policy: str | Mapping[str, Any],
    own: Settings | None,
    table: Mapping[str, float],
    lr: Any,
) -> Settings:
    """Group keys of one weight; rules of ours are as published where rates are."""
    chosen, is_ours = _policy_choice(row, policy) if own is None else (own, False)
    keys = _with_place_keys(
        row, {**chosen, **(PAPER_SETTINGS.get(chosen["rule"], {}) if table and is_ours else {})}
    )
    if table and "lr" not in keys:
        kind = "adamw" if keys["rule"] == "adamw" else row.role
        keys["lr"] = lr * (table.get(kind, table["hidden"]) / table["hidden"])
    return keys


def _policy_choice(row: Row, policy: str | Mapping[str, Any]) -> tuple[Settings, bool]:
    """What the policy says of a weight, and whether that is one of ours."""
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
    """Group keys if an override names a rule; None if it is for :func:`classify`."""
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
    """Fill in what the place of a weight says: view, side, and the axis, pair and centring."""
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
    """The view that takes a weight head by head, its own where heads are not known."""
    count = sum(row.heads)
    if not count:
        return row.view
    transposed = "transposed:" if row.view.startswith("transposed") else ""
    return f"{transposed}{'heads_in' if row.part == 'out' else 'heads'}:{count}"


@dataclass(frozen=True)
class StackRow(Row):
    """A row with what its group says: pair or axis of its rule, learning rate, weight decay."""

    layout: str = ""
    lr: float = 0.0
    decay: float = 0.0

    def _cells(self) -> dict[str, str]:
        return {
            **super()._cells(),
            "layout": self.layout,
            "lr": f"{self.lr:g}",
            "decay": f"{self.decay:g}",
        }


class StackAssignment(Assignment):
    """The table of a stack."""

    _columns = ("name", "shape", "role", "rule", "view", "layout", "centred", "lr", "decay", "why")

    def __str__(self) -> str:
        table = self._table(self._columns, "view", "layout", "centred")
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join([*lines, self._counts()])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StackAssignment:
        """Read back what `to_dict` wrote."""
        swapped: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
            for row in data["rows"]
        ]
        return cls(tuple(StackRow(**row) for row in swapped))
