"""Parameter groups: the forms in which users pass them, and each parameter's rule."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .._core.rule import Rule, rule_class
from .._roles.classify import Row, classify, route
from .._roles.residual_sides import sides_of


class Common(TypedDict, total=False):
    """Keywords of every optimizer; :class:`StackedOptimizer` says what they do."""

    adamw_lr: float | Tensor | None
    adamw_betas: tuple[float, float] | None
    adamw_eps: float
    adamw_weight_decay: float | None
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    nonfinite: str
    view: str | Sequence[str]
    state_dtype: str | None
    stagger: bool


COMMON: dict[str, Any] = {
    "adamw_lr": None,
    "adamw_betas": None,
    "adamw_eps": 1e-8,
    "adamw_weight_decay": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "nonfinite": "skip",
    "view": "auto",
    "state_dtype": None,
    "stagger": False,
}
"""Keywords of every optimizer, with their defaults; each is a group key too."""
SCHEDULER_KEYS = frozenset(
    ("param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
)
"""Group keys that schedulers and trainers add."""
GROUP_KEYS = frozenset(("params", "lr", "weight_decay", "rule", "method", "roles", "reasons"))


def rule_of(group: Mapping[str, Any], default_rule: type[Rule]) -> Rule | None:
    """Build the rule that a group's values describe; None for an AdamW group."""
    name = group.get("rule")
    if name == "adamw":
        return None
    cls = default_rule if name is None else rule_class(name)
    return cls(**{f.name: group[f.name] for f in fields(cls) if f.name in group})


def to_param_groups(
    params: Any, rule: Rule, reference_key: str | None, view: str | Sequence[str] = "auto"
) -> Any:
    """Turn what a user passes as ``params`` into what ``torch.optim.Optimizer`` takes.

    Args:
        params: A module, named parameters, parameters, or groups.
        rule: The optimizer's rule as its arguments set it.
        reference_key: Group key by which the reference package marks its matrix groups.
        view: The optimizer's view as its arguments set it.

    Returns:
        Groups, or the input itself where torch has an error text of its own for it.

    Raises:
        ValueError: If a module's weights have other views than the one given.
    """
    if isinstance(params, nn.Module):
        return _from_module(params, rule, view)
    if isinstance(params, Tensor):
        return params
    items = list(params)
    if not items or not isinstance(items[0], Mapping):
        return [{"params": items}] if items else items
    has_reference_key = reference_key is not None and any(reference_key in group for group in items)
    groups = []
    for group in items:
        group = dict(group)
        if has_reference_key and "rule" not in group and group.get(reference_key) is None:
            group["rule"] = "adamw"
        groups.append(group)
    return groups


def _from_module(
    model: nn.Module, default_rule: Rule, view: str | Sequence[str] = "auto"
) -> list[dict[str, Any]]:
    """Groups of a classified model: one per rule, view and side, frozen parameters left out."""
    named = dict(model.named_parameters())
    rows = [row for row in classify(model) if row.name and named[row.name].requires_grad]
    matrices = [row for row in rows if row.rule == "matrix"]
    _refuse_view(view, matrices)
    sides = sides_of(matrices, default_rule)
    groups_by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        assert row.name is not None
        matrix = row.rule == "matrix"
        rule, group_view = (default_rule.method(), row.view) if matrix else ("adamw", "auto")
        side = sides.get(row.name)
        side_key = {} if side is None else {"side": side}
        group: dict[str, Any] = groups_by_key.setdefault(
            (rule, group_view, side),
            {
                "params": [],
                "rule": rule,
                "view": group_view,
                "roles": [],
                "reasons": [],
                **side_key,
            },
        )
        group["params"].append((row.name, named[row.name]))
        group["roles"].append(row.role)
        group["reasons"].append(row.why)
    return sorted(groups_by_key.values(), key=lambda group: group["rule"] == "adamw")


def _refuse_view(view: str | Sequence[str], rows: Iterable[Row]) -> None:
    """Raise if the one view that a user gave contradicts the view that the model needs."""
    for row in rows if view != "auto" else ():
        if _plain_view(view, row) != _plain_view(row.view, row):
            raise ValueError(
                f"view {view!r} is not that of {row.name!r} in the model, {row.view!r}; leave out "
                "view (matrix_view, split_sizes, num_heads), or pass groups, each with its view"
            )


def _plain_view(view: str | Sequence[str], row: Row) -> str | Sequence[str]:
    """One name for all views that mean the same for a weight of this shape."""
    if view == "auto" or (view == "flatten" and len(row.shape) == 2):
        return "batch" if len(row.shape) <= 3 else "flatten"
    return view


def roles_of(group: Mapping[str, Any], rule: Rule | None) -> list[Row]:
    """A row per parameter of a group: its rule, ``matrix`` or ``adamw``, and why.

    A pure function of the group's values, so the answer is the same after a load or a copy.

    Args:
        group: The group.
        rule: Its rule, None for an AdamW group.
    """
    names = group.get("param_names") or ()
    roles, reasons = group.get("roles"), group.get("reasons")
    rows = []
    # a parameter appended to the group's list later has no name
    for i, (p, name) in enumerate(zip_longest(group["params"], names[: len(group["params"])])):
        row = route(name, tuple(p.shape))
        if roles and reasons and i < len(roles):
            row = replace(row, role=roles[i], why=reasons[i])
        if rule is None:
            row = replace(row, rule="adamw", why=row.why if roles else "group rule 'adamw'")
        elif len(rule.members) > 1:
            row = replace(row, rule="matrix", why=f"member {rule.members[i % len(rule.members)]}")
        elif group.get("rule") is not None and p.ndim >= 2 and p.numel():
            why = row.why if roles else f"group rule {group['rule']!r}"
            row = replace(row, rule="matrix", why=why)
        rows.append(row)
    return rows


def routed(
    group: Mapping[str, Any], rule: Rule | None, position: int
) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]]:
    """Matrices and AdamW parameters of a group, each with its flat position.

    Args:
        group: The group.
        rule: Its rule, None for an AdamW group.
        position: Flat position of the group's first parameter.
    """
    matrices: list[tuple[int, Tensor]] = []
    adamw_params: list[tuple[int, Tensor]] = []
    for j, (row, p) in enumerate(zip(roles_of(group, rule), group["params"], strict=True)):
        (matrices if row.rule == "matrix" else adamw_params).append((position + j, p))
    return matrices, adamw_params


def parameters_of(group: Mapping[str, Any]) -> tuple[list[Any], list[str | None]]:
    """Parameters and names of a group that torch has not read yet."""
    params = group["params"]
    items = [params] if isinstance(params, Tensor) else list(params)
    given_names = group.get("param_names") or [None] * len(items)
    if len(given_names) != len(items):
        raise ValueError(f"param_names has {len(given_names)} names for {len(items)} parameters")
    pairs = [
        item if isinstance(item, tuple) else (name, item)
        for name, item in zip(given_names, items, strict=True)
    ]
    return [p for _, p in pairs], [name for name, _ in pairs]


def describe(name: str | None, p: Tensor, position: int) -> str:
    """Words that name a parameter in a message."""
    return f"parameter {name!r}" if name else f"parameter {position} of shape {tuple(p.shape)}"


def warn_user(text: str) -> None:
    """Warn with the location of the user's call, the first frame outside this package and torch."""
    level, frame = 2, sys._getframe(1)
    package = os.path.dirname(os.path.dirname(__file__))  # the folder above _driver
    ours = (package, os.path.dirname(torch.__file__))
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
