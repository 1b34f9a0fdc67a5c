"""Checks of groups before torch adds them: values in range, parameters that a rule can train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._core.rule import Rule
from .._core.views import split_view
from .param_groups import (
    describe,
    listed,
    parameters_of,
    roles_of,
    rule_of,
    view_of,
    warn_user,
)
from .units import views_of


def check_values(group: Mapping[str, Any]) -> None:
    """Check the ranges of all values but the rule's fields, in torch's words where it has them."""
    for key in ("lr", "adamw_lr"):
        lr = group.get(key)
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
        if is_lazy(p):
            continue
        text = describe(name, p, i)
        if row.rule == "matrix":
            check_matrix(p, text, method)
            _check_shape(p, text, view_of(group, i, row), rule, method)
            continue
        _check_unsharded(p, text, method)
        if is_marked:
            moved_to_adamw.append(text)
        elif group.get("rule") is not None and listed(group, "rules", i) is None:
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


def _check_shape(p: Tensor, text: str, view: Any, rule: Rule, method: str) -> None:
    """Raise if the view does not fit."""
    if p.ndim < 2 or p.numel() == 0:
        _refuse_vector(p, text, method)
    if len(rule.members) == 1:
        split_view(views_of(view, rule)[0], tuple(p.shape))
