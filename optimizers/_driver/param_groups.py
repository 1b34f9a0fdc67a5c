"""Parameter groups: the forms in which users pass them, and each parameter's rule."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._core.rule import Rule, functions_of, rule_class
from .._core.validation import function_name
from .._roles.assignment import AssignedRow
from .._roles.classify import Row, route
from .._roles.role_table import RULE_OF_ROLE
from .norms import decays, norm_text
from .write_modes import mode_of


class Common(TypedDict, total=False):
    """Keywords of every optimizer; :class:`StackedOptimizer` says what they do."""

    model: nn.Module | None
    process_group: Any
    adamw_lr: float | Tensor | None
    adamw_betas: tuple[float, float] | None
    adamw_eps: float
    adamw_weight_decay: float | None
    cautious: bool
    decay_schedule: str
    decay_lr: float | None
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    nonfinite: str
    view: str | Sequence[str]
    state_dtype: str | torch.dtype | None
    write: str
    weight_norm: str | None
    weight_radius: float | None
    stagger: bool
    plan: str
    comm_dtype: str | torch.dtype | None
    spread_replicas: bool


COMMON: dict[str, Any] = {
    "adamw_lr": None,
    "adamw_betas": None,
    "adamw_eps": 1e-8,
    "adamw_weight_decay": None,
    "cautious": False,
    "decay_schedule": "lr",
    "decay_lr": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "nonfinite": "skip",
    "view": "auto",
    "state_dtype": None,
    "write": "auto",
    "weight_norm": None,
    "weight_radius": None,
    "stagger": False,
    "plan": "auto",
    "comm_dtype": None,
    "spread_replicas": False,
}
"""Keywords of every optimizer, with their defaults; each is a group key too."""
GROUP_KEYS = frozenset(
    ("params", "param_names", "lr", "weight_decay", "rule", "method", "draws", "adamw_lr_ratio")
)
"""Group keys of every optimizer that are no keywords."""
LISTS = ("rules", "views", "sides", "roles", "reasons", "decays", "positions", "base_sums")
"""Group keys with one value per parameter, in the order of ``params``, as torch's param_names."""
FOREIGN_KEYS = frozenset(
    (
        *("name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
        *("lr_scale", "lr_mult", "lr_decay", "wd_mult", "decay_mult", "layer_id", "layer_name"),
        *("rho", "kind", "is_last_layer", "group_name", "module_name", "tag", "weights", "models"),
        *("betas", "eps", "momentum", "dampening", "amsgrad", "alpha", "adaptive", "apply_decay"),
    )
)
"""Group keys of trainers, schedulers and wrappers, which are kept however close to an option."""


def rule_of(group: Mapping[str, Any], default_rule: type[Rule]) -> Rule | None:
    """Build the rule that a group's values describe; None for an AdamW group."""
    name = group.get("rule")
    if name == "adamw":
        return None
    cls = default_rule if name is None else rule_class(name)
    return cls(**{f.name: group[f.name] for f in fields(cls) if f.name in group})


class Weight(NamedTuple):
    """A parameter that goes to a rule.

    Attributes:
        position: Position in the optimizer's flat list.
        place: Position in its group.
        param: The parameter.
        name: Its name, None if it has none.
    """

    position: int
    place: int
    param: Tensor
    name: str | None


class Part(NamedTuple):
    """Weights of a group that have a rule and a view in common.

    Attributes:
        rule: The group's rule, with the side of these weights.
        view: How each becomes matrices.
        weights: The weights.
    """

    rule: Rule
    view: str | Sequence[str]
    weights: list[Weight]


def listed(group: Mapping[str, Any], key: str, i: int) -> Any:
    """What one of the group's :data:`LISTS` says about parameter i; None if it says nothing."""
    values = group.get(key)
    # a parameter appended to the group's list later has no entry
    return values[i] if values is not None and i < len(values) else None


def copy_list(x: Any) -> Any:
    """A copy of a list, which other code may change in place; anything else as it is."""
    return list(x) if isinstance(x, list) else x


_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def plain_name(name: str) -> str:
    """A parameter's name without the components that DDP, compile, FSDP and checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def to_param_groups(params: Any, marking_keys: Sequence[str]) -> Any:
    """Turn what a user passes as ``params`` into what ``torch.optim.Optimizer`` takes.

    Args:
        params: Named parameters, parameters, or groups.
        marking_keys: Group keys by which published packages mark their matrix groups.

    Returns:
        Groups, or the input itself where torch has an error text of its own for it.
    """
    if isinstance(params, Tensor):
        return params
    items = list(params)
    if not items or not isinstance(items[0], Mapping):
        return [{"params": items}] if items else items
    marked = any(
        key in group for group in items if isinstance(group, Mapping) for key in marking_keys
    )
    groups = []
    for group in items:
        if not isinstance(group, Mapping):
            return items  # torch refuses it, with its own text
        group = dict(group)
        if marked and "rule" not in group and all(group.get(key) is None for key in marking_keys):
            group["rule"] = "adamw"
        groups.append(group)
    return groups


def with_adamw_names(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which torch's names mean AdamW's values where the method has no such option.

    Args:
        settings: Keywords or a group.
        own: Options of the method.

    Raises:
        ValueError: If a value is given under both names.
    """
    settings = dict(settings)
    for name in ("betas", "eps"):
        if name in settings and name not in own:
            given = settings.pop(name)
            if settings.get(f"adamw_{name}") not in (None, given):
                raise ValueError(f"{name} and adamw_{name} differ but mean the same: pass one")
            settings[f"adamw_{name}"] = given
    return settings


def store_adamw_lr(group: dict[str, Any], lr: float | Tensor | None = None) -> None:
    """Replace ``adamw_lr`` by its ratio to ``lr``, so that both follow one schedule.

    Args:
        group: Settings of a group, changed in place.
        lr: The learning rate of the group; None (default): the one that ``adamw_lr`` was written
            beside, see :func:`_lr_beside`.

    Raises:
        ValueError: If lr is 0, which has no ratio; the group is unchanged.
    """
    if "adamw_lr" not in group:
        return
    adamw_lr, lr = group["adamw_lr"], _lr_beside(group) if lr is None else lr
    if adamw_lr is None:
        group.pop("adamw_lr")
        group.setdefault("adamw_lr_ratio", None)
        return
    if float(lr) == 0.0:
        raise ValueError("adamw_lr needs lr above 0, to which it keeps its ratio; set both later")
    group.pop("adamw_lr")
    group["adamw_lr_ratio"] = exact_ratio(float(adamw_lr), float(lr))


def _lr_beside(group: Mapping[str, Any]) -> float | Tensor:
    """The ``lr`` to which an ``adamw_lr`` that was written into a group has its ratio.

    A scheduler keeps the ``lr`` that it finds as ``initial_lr`` and then scales ``lr``. The order
    of the keys tells whether ``adamw_lr`` was there before the scheduler.
    """
    keys = [*group]
    is_scheduled = "initial_lr" in group and keys.index("initial_lr") > keys.index("adamw_lr")
    lr: float | Tensor = group["initial_lr" if is_scheduled else "lr"]
    return lr


def exact_ratio(x: float, y: float) -> float:
    """X / y, or a neighbour of it whose product with y is exactly x."""
    ratio = x / y
    neighbours = (ratio, math.nextafter(ratio, math.inf), math.nextafter(ratio, 0.0))
    return next((c for c in neighbours if y * c == x), ratio)


def _is_numbered(name: str | None) -> bool:
    """Whether a name says no more than a place, as "0.weight" of an ``nn.Sequential``."""
    *path, _ = plain_name(name or "").split(".")
    return bool(path) and all(part.isdigit() for part in path)


def count_routed_by_shape(groups: Iterable[Mapping[str, Any]], default_rule: type[Rule]) -> int:
    """Number of matrices that only their shape gives to the rule; 0 without unmarked vectors.

    Names, ``rule``, the model and the keys of published packages mark parameters, and so does
    ``compat``; names that are all numbers do not. Matrices without vectors are what
    ``torch.optim.Muon`` takes.
    """
    matrices = vectors = 0
    for group in groups:
        names = group.get("param_names") or ()
        is_named = bool(names) and not all(map(_is_numbered, names))
        is_told = group.get("rule") is not None or is_named or group.get("rules")
        rule = rule_of(group, default_rule)
        if is_told or rule is None or len(rule.members) > 1 or group.get("compat") is not None:
            continue
        params = [p for p in group["params"] if not is_lazy(p)]
        vectors += sum(p.ndim < 2 for p in params)
        matrices += sum(row.rule == "matrix" for row in roles_of({**group, "params": params}, rule))
    return matrices if vectors else 0


def _adamw_lr_ratio(group: Mapping[str, Any]) -> float | None:
    """The ratio of AdamW's learning rate, also of one that was written since the last step."""
    copy = dict(group)
    store_adamw_lr(copy)
    return copy.get("adamw_lr_ratio")


def assigned_rows(group: Mapping[str, Any], default_rule: type[Rule]) -> list[AssignedRow]:
    """The group's part of :meth:`StackedOptimizer.assignment`."""
    rule, lr = rule_of(group, default_rule), float(group["lr"])
    ratio, own_decay = _adamw_lr_ratio(group), group["adamw_weight_decay"]
    rows = []
    for i, row in enumerate(roles_of(group, rule)):
        matrix = rule is not None and row.rule == "matrix"
        layout: list[Any] = [group.get("pair"), group.get("axis")] if matrix else []
        if rule is not None and matrix:
            layout += [f"{key}={function_name(f)}" for key, f in functions_of(rule).items()]
        decay = group["weight_decay"] if matrix or own_decay is None else own_decay
        factor = listed(group, "decays", i)
        if matrix and not decays(group):
            factor = 0.0
        view = view_of(group, i, row)
        values = {f.name: getattr(row, f.name) for f in fields(row)}
        values |= {
            "rule": rule.method() if rule is not None and matrix else "adamw",
            "view": (view if isinstance(view, str) else ", ".join(view)) if matrix else "auto",
            "centred": bool(matrix and group.get("centred")),
            "layout": " ".join(x for x in layout if x not in (None, "rows")),
            "lr": lr if matrix or ratio is None else lr * ratio,
            "decay": decay * (1.0 if factor is None else factor),
            "write": mode_of(group, group["params"][i]),
            "norm": norm_text(group) if matrix else "",
        }
        rows.append(AssignedRow(**values))
    return rows


def refuse_view(view: str | Sequence[str], rows: Iterable[Row]) -> None:
    """Raise if the one view that a user gave contradicts the view that the model needs."""
    for row in rows if view != "auto" else ():
        if row.rule == "matrix" and _plain_view(view, row) != _plain_view(row.view, row):
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
    rows = []
    for i, p in enumerate(group["params"]):
        role, known = listed(group, "roles", i), listed(group, "rules", i)
        name, shape = listed(group, "param_names", i), () if is_lazy(p) else tuple(p.shape)
        if role is None:
            row = route(name, shape)
        else:
            why, view = listed(group, "reasons", i) or "", listed(group, "views", i) or "auto"
            row = Row(name, shape, role, known or RULE_OF_ROLE.get(role, "adamw"), why, view)
        if rule is None:
            row = replace(row, rule="adamw", why=row.why if role else "group rule 'adamw'")
        elif known is not None:
            row = replace(row, rule=known)
        elif len(rule.members) > 1:
            why = row.why if role else f"member {rule.members[i % len(rule.members)]}"
            row = replace(row, rule="matrix", why=why)
        elif group.get("rule") is not None and p.ndim >= 2 and p.numel():
            why = row.why if role else f"group rule {group['rule']!r}"
            row = replace(row, rule="matrix", why=why)
        rows.append(row)
    return rows


def view_of(group: Mapping[str, Any], i: int, row: Row) -> str | Sequence[str]:
    """How parameter i of a group becomes matrices: as the model, the group or its name tells."""
    listed_view: str | None = listed(group, "views", i)
    if listed_view is not None:
        return listed_view
    view: str | Sequence[str] = group["view"]
    # a kernel of three dimensions is one matrix, not a stack of small ones
    return row.view if view == "auto" and row.role == "conv" else view


def parts_of(
    group: Mapping[str, Any], rule: Rule | None, position: int
) -> tuple[list[Part], list[tuple[int, Tensor]]]:
    """Parts of a group, and its AdamW parameters with their flat positions.

    Args:
        group: The group.
        rule: Its rule, None for an AdamW group.
        position: Flat position of the group's first parameter.
    """
    parts: dict[Hashable, Part] = {}
    adamw_params: list[tuple[int, Tensor]] = []
    for i, (row, p) in enumerate(zip(roles_of(group, rule), group["params"], strict=True)):
        if is_lazy(p):
            continue
        if row.rule != "matrix" or rule is None:
            adamw_params.append((position + i, p))
            continue
        view, side = view_of(group, i, row), listed(group, "sides", i)
        key = (view if isinstance(view, str) else tuple(view), side)
        if key not in parts:
            part_rule = rule if side is None else rule_with_side(rule, side)
            parts[key] = Part(part_rule, view, [])
        parts[key].weights.append(Weight(position + i, i, p, row.name))
    return list(parts.values()), adamw_params


def rule_with_side(rule: Rule, side: Any) -> Rule:
    """A rule with another side; raises ValueError where it takes none."""
    if all(field.name != "side" for field in fields(rule)):
        raise ValueError(
            f"sides of a parameter group says {side!r}, but {rule.method()} takes no side: leave "
            "sides out"
        )
    return replace(rule, **{"side": side})


def parameters_of(group: Mapping[str, Any]) -> tuple[list[Any], list[str | None]]:
    """Parameters and names of a group that torch has not read yet."""
    params = group["params"]
    items = [params] if isinstance(params, Tensor) else list(params)
    given_names = group.get("param_names")
    is_list = isinstance(given_names, (tuple, list))
    if given_names is None or (is_list and not given_names):
        given_names = [None] * len(items)
    elif not is_list or not all(name is None or isinstance(name, str) for name in given_names):
        raise ValueError(f"param_names must be a list of names, got {given_names!r}")
    if len(given_names) != len(items):
        raise ValueError(f"param_names has {len(given_names)} names for {len(items)} parameters")
    pairs = [
        item if isinstance(item, tuple) else (name, item)
        for name, item in zip(given_names, items, strict=True)
    ]
    return [p for _, p in pairs], [name for name, _ in pairs]


def names_of(groups: Iterable[Mapping[str, Any]]) -> list[str | None]:
    """The name of every parameter of all groups, None for one without a name."""
    return [
        listed(group, "param_names", i) for group in groups for i in range(len(group["params"]))
    ]


def describe(name: str | None, p: Tensor, position: int) -> str:
    """Words that name a parameter in a message, also one that tells no shape."""
    if name:
        return f"parameter {name!r}"
    has_shape = isinstance(p, Tensor) and not (is_lazy(p) or p.is_nested)
    return f"parameter {position}" + (f" of shape {tuple(p.shape)}" if has_shape else "")


def warn_user(text: str) -> None:
    """Warn with the location of the user's call, the first frame outside this package and torch."""
    level, frame = 2, sys._getframe(1)
    package = os.path.dirname(os.path.dirname(__file__))  # the folder above _driver
    ours = (package, os.path.dirname(torch.__file__))
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
