"""Parameter groups: the forms in which users pass them, their checks, and each parameter's rule."""

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
from .._core.views import split_view
from .._roles.classify import Row, classify, route
from .._roles.residual_sides import sides_of
from .units import views_of


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
LARGE_SIDE = 16384
"""Side above which a matrix without a name is more likely an embedding, so the user is warned."""


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


def check_values(group: Mapping[str, Any]) -> None:
    """Check the ranges of all values but the rule's fields, in torch's words where it has them."""
    for key in ("lr", "adamw_lr"):
        lr = group[key]
        if isinstance(lr, Tensor):
            if group["foreach"] and not group["capturable"]:
                raise ValueError(
                    "lr as a Tensor is not supported for capturable=False and foreach=True"
                )
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if lr is not None and not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
    for key in ("weight_decay", "adamw_weight_decay"):
        if group[key] is not None and not group[key] >= 0.0:
            raise ValueError(f"Invalid {key} value: {group[key]}")
    if not group["adamw_eps"] >= 0.0:
        raise ValueError(f"Invalid adamw_eps value: {group['adamw_eps']}")
    for i, beta in enumerate(group["adamw_betas"] or ()):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid adamw_betas parameter at index {i}: {beta}")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported; differentiate the loss instead")
    if group["nonfinite"] not in ("skip", "raise"):
        raise ValueError(f"nonfinite must be 'skip' or 'raise', got {group['nonfinite']!r}")
    name = group["state_dtype"]
    dtype: Any = getattr(torch, name, None) if isinstance(name, str) else None
    # what cannot hold small squares makes a second moment zero, and a step of it without bound
    is_supported = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    is_supported = is_supported and torch.finfo(dtype).tiny < 1e-30
    if name not in (None, "int8") and not is_supported:
        raise ValueError(
            f"state_dtype must be None, 'int8' or 'bfloat16', 'float32' or 'float64', got {name!r}"
        )


def _check_unsharded(p: Tensor, text: str, method: str) -> None:
    """Raise for a parameter that DeepSpeed or FSDP1 has flattened or partitioned."""
    if hasattr(p, "ds_id") or hasattr(p, "ds_shape") or getattr(p, "_is_flat_param", False):
        raise ValueError(
            f"{text} is flattened or partitioned (DeepSpeed ZeRO or FSDP1), which hides its matrix "
            f"from {method}; use DDP with ZeroRedundancyOptimizer, or a group with rule='adamw'"
        )


def check_matrix(p: Tensor, text: str, method: str) -> None:
    """Raise for a parameter that no matrix rule can train, naming the way around."""
    if hasattr(p, "device_mesh"):
        raise ValueError(
            f"{text} is a DTensor, which {method} does not shard yet; use DDP with "
            "ZeroRedundancyOptimizer, or put it in a group with rule='adamw'"
        )
    _check_unsharded(p, text, method)
    if p.is_complex():
        raise RuntimeError(f"{method} does not support complex parameters; {text} is complex")


def check_group(
    group: Mapping[str, Any], default_rule: type[Rule], *, is_marked: bool = False
) -> None:
    """Run every check of a group before torch adds it; nothing is changed.

    Args:
        group: A group with all defaults filled in.
        default_rule: The optimizer's rule class.
        is_marked: Whether the group is in the format of the method's published package. Vectors
            in it go to AdamW with one warning; elsewhere they are refused.

    Raises:
        ValueError: If a value is out of range or a parameter cannot be trained.
    """
    check_values(group)
    rule = rule_of(group, default_rule)
    params, names = parameters_of(group)
    if rule is None or any(not isinstance(p, Tensor) for p in params):
        return  # torch refuses what is no tensor, with its own text
    method = rule.method()
    if group["stagger"] and rule.refresh_in_lockstep:
        raise ValueError(
            f"stagger=True does not go with {method} as set here, whose windows begin for all "
            "weights at once; leave stagger out"
        )
    rows = roles_of({**group, "params": params, "param_names": names}, rule)
    moved_to_adamw = []
    for i, (p, name, row) in enumerate(zip(params, names, rows, strict=True)):
        text = describe(name, p, i)
        if row.rule == "matrix":
            check_matrix(p, text, method)
            _check_shape(p, name, text, group, rule, method)
            continue
        _check_unsharded(p, text, method)
        if is_marked:
            moved_to_adamw.append(text)
        elif group.get("rule") is not None:
            _refuse_vector(p, text, method)
    if group["capturable"] and any(row.rule == "matrix" for row in rows):
        raise ValueError(
            f"capturable=True is not supported by {method}; set it on AdamW groups only"
        )
    if moved_to_adamw:
        warn_user(f"{', '.join(moved_to_adamw)}: no matrix, so AdamW trains it instead of {method}")


def _refuse_vector(p: Tensor, text: str, method: str) -> None:
    raise ValueError(
        f"{text} has shape {tuple(p.shape)} but rule {method!r} needs matrices; move it to a group "
        "with rule='adamw' (flattened weights, as DeepSpeed ZeRO and FSDP1 make, are no matrices)"
    )


def _check_shape(
    p: Tensor, name: str | None, text: str, group: Mapping[str, Any], rule: Rule, method: str
) -> None:
    """Raise if the view does not fit; warn of a very large side in a matrix without a name."""
    if p.ndim < 2 or p.numel() == 0:
        _refuse_vector(p, text, method)
    if len(rule.members) == 1:
        split_view(views_of(group["view"], rule)[0], tuple(p.shape))
    if p.ndim == 2 and max(p.shape) > LARGE_SIDE and name is None and group.get("rule") is None:
        warn_user(
            f"{text} has a side above {LARGE_SIDE} and goes to {method}; if it is an embedding or "
            "a head, pass the model or its named_parameters(), or give it rule='adamw'"
        )


def warn_user(text: str) -> None:
    """Warn with the location of the user's call, the first frame outside this package and torch."""
    level, frame = 2, sys._getframe(1)
    package = os.path.dirname(os.path.dirname(__file__))  # the folder above _driver
    ours = (package, os.path.dirname(torch.__file__))
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
