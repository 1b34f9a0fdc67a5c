"""Checks: values in range, parameters and gradients that a step can use; nothing is changed.

Groups are checked whole before torch adds them. A step checks again what was written into a group
since the last one, and what has happened to weights and gradients, before anything moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _device_dtype_check_for_fused

from .._core.rule import Rule, rule_class
from .._core.validation import (
    check,
    choice,
    dtype_name,
    flag,
    is_number,
    naming,
    number,
    shown,
    two_decays,
    whole_number,
)
from .._core.views import VIEW_KINDS, split_view
from .adamw import betas_of
from .buckets import StepPlan
from .capture import refuse_capturable
from .decay import DECAY_SCHEDULES, check_decay
from .norms import check_weight_norm, weight_norm_value
from .param_groups import (
    LISTS,
    describe,
    listed,
    names_of,
    parameters_of,
    roles_of,
    rule_of,
    store_adamw_lr,
    view_of,
    warn_user,
)
from .saved_state import moment_dtype
from .units import State, Unit, refuse_parts, refuse_vector, views_of
from .write_modes import WRITE_MODES, check_eco, mode_of

NONFINITE_POLICIES = ("skip", "skip_step", "raise", "ignore")
PLANS = ("auto", "local", "owner", "reduce", "gather")
"""Ways to step a sharded weight; on plain tensors every one means local."""
COMM_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Dtypes of what is sent; float8 keeps too few digits and has no reductions."""
TRAINABLE_DTYPES = frozenset(
    (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex32,
        torch.complex64,
        torch.complex128,
    )
)
SHARDED_NAMES = frozenset(("_fsdp_wrapped_module", "_flat_param"))
"""Components of names that FSDP1 gives to what it has flattened."""
SHARDED_MARKS = ("ds_id", "ds_shape", "_is_flat_param", "_fsdp_flattened")
"""Attributes by which DeepSpeed ZeRO and FSDP1 mark parameters that they partition."""


# values -------------------------------------------------------------------------------------------


def _learning_rate(name: str, x: Any) -> Any:
    """A learning rate as a plain number; a 1-element tensor stays what it is."""
    if not isinstance(x, Tensor):
        return number(name, x, "[0, inf)", "Invalid learning rate")
    allowed = f"{name} must be a real number or a tensor of one"
    is_real = x.layout is torch.strided and not (x.is_nested or x.is_complex() or x.is_meta)
    check(is_real and x.dtype != torch.bool, f"{allowed}, got {shown(x)}")
    check(x.numel() == 1, f"Tensor lr must be 1-element; {name} has {x.numel()} elements")
    _check_tensor_lr(name, x)
    return x


def _check_tensor_lr(name: str, x: Tensor) -> None:
    """Check the number in a tensor, which waits for its device."""
    number(name, x.item(), "[0, inf)", "Invalid learning rate")


def _decay(name: str, x: Any) -> Any:
    return number(name, x, "[0, inf)", f"Invalid {name} value")


def _decay_lr(name: str, x: Any) -> Any:
    """The learning rate to which decay refers, as a plain number; a tensor is read."""
    if isinstance(x, Tensor):
        x = float(_learning_rate(name, x))
    return number(name, x, "(0, inf)")


def _view(name: str, x: Any) -> Any:
    views = [x] if isinstance(x, str) else x
    is_view = isinstance(views, (tuple, list)) and all(isinstance(v, str) for v in views)
    check(
        is_view and len(views) > 0,
        f"{name} must be a string such as 'auto' or 'heads:8', or one for each member of a pair, "
        f"got {shown(x)}",
    )
    for view in views:
        check(
            view.partition(":")[0] in VIEW_KINDS,
            f"{name} {shown(view)} is unknown; choose one of {', '.join(VIEW_KINDS)}",
        )
    return x


def _state_dtype(name: str, x: Any) -> Any:
    """The name of a dtype of state, for the dtype or its name."""
    text = dtype_name(x)
    dtype: Any = getattr(torch, text, None) if isinstance(text, str) else None
    # what cannot hold small squares makes a second moment zero, and a step of it without bound
    is_supported = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    is_supported = is_supported and torch.finfo(dtype).tiny < 1e-30
    check(
        text is None or (isinstance(text, str) and text == "int8") or is_supported,
        f"{name} must be None, 'int8' or 'bfloat16', 'float32' or 'float64', got {shown(x)}",
    )
    return text


def _comm_dtype(name: str, x: Any) -> Any:
    """The name of a dtype on the wire, for the dtype or its name."""
    text = dtype_name(x)
    *names, last = map(repr, COMM_DTYPES)
    check(
        text is None or (isinstance(text, str) and text in COMM_DTYPES),
        f"{name} must be None, {', '.join(names)} or {last}, got {shown(x)}",
    )
    return text


def _or_none(check_value: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, x: None if x is None else check_value(name, x)


def _listed(check_value: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The check of a list with one value per parameter; the list stays the user's."""

    def check_list(name: str, values: Any) -> Any:
        is_list = values is None or isinstance(values, (tuple, list))
        check(is_list, f"{name} must be a list with a value per parameter, got {shown(values)}")
        for x in values or ():
            check_value(name, x)
        return values

    return check_list


def _side(name: str, x: Any) -> Any:
    for side in x if isinstance(x, tuple) else (x,):  # weights that share have several
        _name(name, side)
    return x


def _name(name: str, x: Any) -> Any:
    check(isinstance(x, str), f"{name} must hold a word or None per parameter, got {shown(x)}")
    return x


def _sums(name: str, x: Any) -> Any:
    is_triple = isinstance(x, (tuple, list)) and len(x) == 3 and all(map(is_number, x))
    check(is_triple, f"{name} must hold three numbers or None per parameter, got {shown(x)}")
    return x


def _adamw_betas(name: str, x: Any) -> tuple[float, float]:
    return two_decays(name, x, f"Invalid {name} parameter")


def _nonfinite(name: str, x: Any) -> Any:
    *names, last = map(repr, NONFINITE_POLICIES)
    is_known = isinstance(x, str) and x in NONFINITE_POLICIES
    check(is_known, f"{name} must be {', '.join(names)} or {last}, got {shown(x)}")
    return x


def _differentiable(name: str, x: Any) -> bool | None:
    value = flag(name, x)
    check(not value, "differentiable=True is not supported; differentiate the loss instead")
    return value


VALUE_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _learning_rate,
    "weight_decay": _decay,
    "adamw_lr": _or_none(_learning_rate),
    "adamw_betas": _or_none(_adamw_betas),
    "adamw_eps": _decay,
    "adamw_weight_decay": _or_none(_decay),
    "cautious": flag,
    "decay_schedule": partial(choice, known=DECAY_SCHEDULES),
    "decay_lr": _or_none(_decay_lr),
    "maximize": flag,
    "foreach": partial(flag, may_be_none=True),
    "fused": partial(flag, may_be_none=True),
    "capturable": flag,
    "differentiable": _differentiable,
    "nonfinite": _nonfinite,
    "view": _view,
    "state_dtype": _state_dtype,
    "write": partial(choice, known=WRITE_MODES),
    "weight_norm": weight_norm_value,
    "weight_radius": _or_none(partial(number, allowed="(0, inf)")),
    "stagger": flag,
    "plan": partial(choice, known=PLANS),
    "comm_dtype": _comm_dtype,
    "spread_replicas": flag,
    "adamw_lr_ratio": _or_none(_decay),
    "draws": partial(choice, known=("name", "position")),
    "rules": _listed(partial(choice, known=(None, "matrix", "adamw"))),
    "views": _listed(_or_none(_view)),
    "sides": _listed(_or_none(_side)),
    "roles": _listed(_or_none(_name)),
    "reasons": _listed(_or_none(_name)),
    "decays": _listed(_or_none(_decay)),
    "positions": _listed(partial(whole_number, allowed="[0, inf)")),
    "base_sums": _listed(_or_none(_sums)),
    "param_names": _listed(_or_none(_name)),
}
"""Group key -> what checks its value and makes it plain; a rule checks its own fields."""


def check_values(group: MutableMapping[str, Any], keys: Iterable[str] = VALUE_CHECKS) -> None:
    """Check values but the rule's fields, in torch's words where it has them, and make them plain.

    Args:
        group: A group, or what is to become one; a scalar of numpy or a dtype in it becomes a plain
            value, and nothing does if a value is refused.
        keys: Which to check, all by default; values that exclude each other always are.

    Raises:
        ValueError: If a value has a wrong type or is out of range.
    """
    plain = {key: VALUE_CHECKS[key](key, group[key]) for key in keys if key in group}
    get = {**group, **plain}.get
    if any(isinstance(get(key), Tensor) for key in ("lr", "adamw_lr")) and get("foreach"):
        check(
            bool(get("capturable")),
            "lr as a Tensor is not supported for capturable=False and foreach=True",
        )
    if get("fused") and get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    group.update(plain)


def check_lists(groups: Sequence[Mapping[str, Any]], where: str = "") -> None:
    """Raise for a list beside ``params`` that has values for more parameters than there are.

    A shorter one passes, since a parameter may have been appended to ``params``.

    Args:
        groups: All groups, whose lists have passed :func:`check_values`.
        where: What holds the groups, to follow the number of one (default: nothing).

    Raises:
        ValueError: With the first such list, or if two parameters have one number in ``positions``.
    """
    for i, group in enumerate(groups):
        count = len(group["params"])
        for key in ("param_names", *LISTS):
            values = group.get(key)
            is_list = values is None or isinstance(values, (tuple, list))
            check(
                is_list and len(values or ()) <= count,
                f"{key} of parameter group {i}{where} must be a list with a value for each of its "
                f"{count} parameters, got {shown(values)}",
            )
    if any(group.get("positions") for group in groups):
        places = [(group, i) for group in groups for i in range(len(group["params"]))]
        given = [listed(group, "positions", i) for group, i in places]
        flat = [i if number is None else number for i, number in enumerate(given)]
        check(len({*flat}) == len(flat), f"positions{where} give two parameters one number")


def _check_rule(group: MutableMapping[str, Any], default_rule: type[Rule]) -> Rule | None:
    """Build a group's rule, which checks its fields, and make these plain; None for AdamW."""
    name = group.get("rule")
    is_adamw = isinstance(name, str) and name == "adamw"
    rule = rule_of({**group, "rule": None} if is_adamw else group, default_rule)
    assert rule is not None
    group.update((f.name, getattr(rule, f.name)) for f in fields(rule) if f.name in group)
    return None if is_adamw else rule


def check_written_values(
    groups: Sequence[dict[str, Any]],
    default_rule: type[Rule],
    seen: Sequence[dict[str, Any]],
) -> Sequence[dict[str, Any]]:
    """Check what was written into groups since the last step; values are compared by identity.

    Args:
        groups: The groups.
        default_rule: The optimizer's rule class.
        seen: What this function returned at the last step, at first nothing.

    Returns:
        Copies of the groups with plain values, also for the next step; ``seen`` itself if nothing
        was written.

    Raises:
        ValueError: If a value has a wrong type or is out of range.
    """
    for group, old in zip(groups, seen, strict=False):
        lr, decay = group.get("lr"), group.get("weight_decay")
        if type(lr) is float and 0.0 <= lr < math.inf:  # as a scheduler writes it
            old["lr"] = lr
        elif isinstance(lr, Tensor) and lr.device.type == "cpu" and lr.numel() == 1:
            _check_tensor_lr("lr", lr)  # written in place; a device is not waited for
        schedule = group.get("decay_schedule")  # "independent" takes small decays only
        is_free = isinstance(schedule, str) and schedule != "independent"
        if is_free and type(decay) is float and 0.0 <= decay < math.inf:
            old["weight_decay"] = decay
    written = [
        i for i, group in enumerate(groups) if i >= len(seen) or not _is_unchanged(group, seen[i])
    ]
    if not written and len(groups) == len(seen):
        return seen
    plain = {i: _plain(groups[i], default_rule, seen[i] if i < len(seen) else {}) for i in written}
    check_lists([{**group, **plain.get(i, {})} for i, group in enumerate(groups)])
    return [plain[i] if i in plain else seen[i] for i in range(len(groups))]


def _is_unchanged(group: Mapping[str, Any], seen: Mapping[str, Any]) -> bool:
    return len(group) == len(seen) and all(map(is_, group.values(), seen.values()))


def _plain(
    group: Mapping[str, Any], default_rule: type[Rule], seen: Mapping[str, Any]
) -> dict[str, Any]:
    """A checked copy of a group with plain values; what was seen before is not checked again."""
    copy = dict(group)
    written = [key for key, x in group.items() if key not in seen or seen[key] is not x]
    check_values(copy, [key for key in written if key in VALUE_CHECKS])
    if any(key not in VALUE_CHECKS for key in written):
        name = copy.get("rule")
        is_default = name is None or (isinstance(name, str) and name == "adamw")
        cls = default_rule if is_default else rule_class(str(name))
        if {"rule", *(f.name for f in fields(cls))} & {*written}:
            _check_rule(copy, default_rule)
    store_adamw_lr(dict(copy))  # refuses it where lr is 0
    if copy.get("write") == "eco":
        check_eco(copy, rule_of(copy, default_rule), betas_of(copy))
    if copy.get("weight_norm") is not None or copy.get("weight_radius") is not None:
        check_weight_norm(copy, rule_of(copy, default_rule))
    check_decay(copy)
    return copy


def is_mark(key: str, value: Any) -> bool | None:
    """Whether a published package's key says that its group holds matrices; None: it says nothing.

    Raises:
        ValueError: If the key asks for True or False and has another value.
    """
    if key.startswith("use_"):
        return flag(key, value, may_be_none=True)
    return True if is_number(value) and value else None


# parameters ---------------------------------------------------------------------------------------


def _refuse_sharded(p: Tensor, name: str | None, text: str, method: str) -> None:
    """Raise for a parameter that DeepSpeed or FSDP1 has flattened or partitioned."""
    is_marked = any(getattr(p, mark, None) not in (None, False) for mark in SHARDED_MARKS)
    if is_marked or (isinstance(name, str) and SHARDED_NAMES & {*name.split(".")}):
        raise ValueError(
            f"{text} is flattened or partitioned (DeepSpeed ZeRO or FSDP1), which hides its matrix "
            f"from {method}; use DDP with ZeroRedundancyOptimizer, or a group with rule='adamw'"
        )


def refuse_sharded_module(params: Any, method: str) -> None:
    """Raise for a module that FSDP1 has wrapped, in whole or in part; other values pass."""
    if not isinstance(params, nn.Module):
        return
    for name, module in params.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise ValueError(
                f"module {name or type(module).__name__!r} is wrapped by FSDP1, which flattens its "
                f"weights and so hides their matrices from {method}; use DDP with "
                "ZeroRedundancyOptimizer, or torch.optim.AdamW"
            )


def refuse_sharded_parameters(
    params: Sequence[Any], names: Sequence[str | None], method: str
) -> None:
    """Raise for parameters whose mark or name says that DeepSpeed or FSDP1 holds parts of them."""
    for i, (p, name) in enumerate(zip(params, names, strict=True)):
        if isinstance(p, Tensor):
            _refuse_sharded(p, name, describe(name, p, i), method)


def _obstacle(p: Tensor) -> str | None:
    """Why no optimizer can write a parameter, to follow its name in a sentence; None if it can."""
    if p.is_nested:
        return "is a nested tensor, whose parts must be parameters of their own"
    if p.layout is not torch.strided:
        return f"is stored as {p.layout}; pass a dense parameter"
    if p.dtype not in TRAINABLE_DTYPES:
        return f"has dtype {p.dtype}, which cannot be trained; keep a copy in bfloat16 or float32"
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        return "is expanded, so several of its entries share memory; make it of p.contiguous()"
    return None


def check_trainable(params: Sequence[Tensor], names: Sequence[str | None]) -> None:
    """Raise for a parameter that no optimizer can write; what is frozen may be quantized, say."""
    for i, (p, name) in enumerate(zip(params, names, strict=True)):
        obstacle = _obstacle(p) if p.requires_grad and not is_lazy(p) else None
        check(obstacle is None, f"{describe(name, p, i)} {obstacle}")


def check_matrix(p: Tensor, text: str, method: str) -> None:
    """Raise for a parameter that no matrix rule can train, naming the way around."""
    _refuse_sharded(p, None, text, method)
    if p.is_complex():
        raise RuntimeError(f"{method} does not support complex parameters; {text} is complex")


def check_group(
    group: MutableMapping[str, Any], default_rule: type[Rule], *, is_marked: bool = False
) -> None:
    """Run every check of a group before torch adds it, and make its values plain.

    Args:
        group: A group with all defaults filled in.
        default_rule: The optimizer's rule class.
        is_marked: Whether the group is in the format of the method's published package. Vectors
            in it go to AdamW with one warning; elsewhere they are refused.

    Raises:
        ValueError: If a value is out of range or a parameter cannot be trained.
    """
    check_values(group)
    rule = _check_rule(group, default_rule)
    check_eco(group, rule, betas_of(group))
    check_weight_norm(group, rule)
    check_decay(group)
    params, names = parameters_of(group)
    check_lists([{**group, "params": params}])
    if any(not isinstance(p, Tensor) for p in params):
        return  # torch refuses what is no tensor, with its own text
    check_trainable(params, names)
    if rule is not None:
        _check_rule_parameters(group, rule, params, names, is_marked)


def _check_rule_parameters(
    group: Mapping[str, Any],
    rule: Rule,
    params: Sequence[Tensor],
    names: Sequence[str | None],
    is_marked: bool,
) -> None:
    """The checks of :func:`check_group` for the parameters of a group that has a rule."""
    method = rule.method()
    refuse_stagger(group, rule)
    refuse_sharded_parameters(params, names, method)
    rule.block_labels(names)  # refuses what a first step would
    rows = roles_of({**group, "params": params, "param_names": names}, rule)
    moved_to_adamw = []
    for i, (p, name, row) in enumerate(zip(params, names, rows, strict=True)):
        if is_lazy(p):  # it tells its shape at the first step
            continue
        text = describe(name, p, i)
        if row.rule == "matrix":
            check_matrix(p, text, method)
            _check_shape(p, text, view_of(group, i, row), rule, group)
        elif is_marked:
            moved_to_adamw.append(text)
        elif group.get("rule") is not None and listed(group, "rules", i) is None:
            refuse_vector(p, text, method)
    if any(row.rule == "matrix" for row in rows):
        refuse_capturable(group, rule)
    if moved_to_adamw:
        warn_user(f"{', '.join(moved_to_adamw)}: no matrix, so AdamW trains it instead of {method}")


def refuse_stagger(group: Mapping[str, Any], rule: Rule | None) -> None:
    """Raise if refreshes are to be spread that must come at once."""
    check(
        rule is None or not (group["stagger"] and rule.refresh_in_lockstep),
        f"stagger=True does not go with {'' if rule is None else rule.method()} as set here, whose "
        "windows begin for all weights at once; leave stagger out",
    )


def _check_shape(p: Tensor, text: str, view: Any, rule: Rule, group: Mapping[str, Any]) -> None:
    """Raise if the view does not fit."""
    if p.ndim < 2 or p.numel() == 0:
        refuse_vector(p, text, rule.method())
    if len(rule.members) == 1:
        with naming(text):
            count = len(split_view(views_of(view, rule)[0], tuple(p.shape)))
        refuse_parts(group, [count], [text])


def warn_without_matrix(groups: Sequence[Mapping[str, Any]], default_rule: type[Rule]) -> None:
    """Warn of an optimizer that has no matrix, as of shards that nothing marks.

    One parameter alone is a hook's own optimizer, and names or a rule show that the user knows. A
    group with ``roles`` has its rule from a policy.
    """
    params = [p for group in groups for p in group["params"]]
    if len(params) < 2 or any(is_lazy(p) for p in params):
        return
    has_rule = any(group.get("rule") is not None and "roles" not in group for group in groups)
    if has_rule or any(group.get("param_names") for group in groups):
        return
    rows = [row for group in groups for row in roles_of(group, rule_of(group, default_rule))]
    if not any(row.rule == "matrix" for row in rows):
        warn_user(
            f"no matrix among {len(params)} parameters, so AdamW trains them all; if a wrapper "
            f"such as FSDP1 has flattened them, use DDP with ZeroRedundancyOptimizer"
        )


# tensors at a step --------------------------------------------------------------------------------


def signature_of(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], ...]:
    """What other code may change about tensors between steps, cheap to make and to compare."""
    return (
        [(group.get("capturable"), group.get("fused")) for group in groups],
        [p.dtype for p in params],
        [p.shape for p in params],
        [p.device for p in params],
        [None if grad is None else grad.dtype for grad in grads],
        [None if grad is None else grad.layout for grad in grads],
    )


def check_ready(
    plan: StepPlan,
    grads: Sequence[Tensor | None],
    groups: Sequence[Mapping[str, Any]],
    state: State,
    method: str,
) -> bool:
    """Check before a step that it can use all weights, gradients and state.

    Args:
        plan: The plan of the step.
        grads: Gradients of all parameters.
        groups: The groups.
        state: The optimizer's state.
        method: Name of the optimizer, for messages.

    Returns:
        Whether the plan is still that of the weights. It is not where they have changed their
        dtype, and their state fits.

    Raises:
        RuntimeError: If something does not fit; nothing has changed then.
    """
    params = [p for p in plan.flat_params if not is_lazy(p)] if plan.lazy_params else None
    signature = signature_of(plan.flat_params if params is None else params, grads, groups)
    if plan.signature == signature:
        return True
    names = names_of(groups)
    adamw = {
        i: group
        for group, positions in zip(groups, plan.adamw_positions, strict=True)
        for i in positions
    }
    for i, (p, grad, name) in enumerate(zip(plan.flat_params, grads, names, strict=True)):
        if grad is not None:
            text = describe(name, p, i)
            check_gradient(p, grad, state.get(p, {}), adamw.get(i), text, method)
    fits = True
    for unit in plan.units:
        refuse_capturable(groups[unit.group], plan.rules[unit.rule])
        for j, (i, p) in enumerate(zip(unit.positions, unit.params, strict=True)):
            if (p.shape, p.dtype, p.device) != unit.key[j - len(unit.params)][:3]:
                _check_state(unit, j, p, state.get(p, {}), describe(names[i], p, i))
                fits = False
    plan.signature = signature
    return fits


def check_gradient(
    p: Tensor,
    grad: Tensor,
    entry: Mapping[str, Any],
    group: Mapping[str, Any] | None,
    text: str,
    method: str,
) -> None:
    """Raise if a parameter cannot be stepped by its gradient, or by the state it has.

    Args:
        p: The parameter.
        grad: Its gradient.
        entry: Its state.
        group: Its group if AdamW steps it, else None.
        text: Words that name it.
        method: Name of the optimizer, for messages.
    """
    if group is not None and group.get("fused"):
        _device_dtype_check_for_fused(p)
    _check_gradient(p, grad, text, method, group is not None)
    if group is not None:
        _check_moments(p, entry, group, text)


def _check_gradient(p: Tensor, grad: Tensor, text: str, method: str, is_adamw: bool) -> None:
    """Raise if a parameter cannot be stepped by its gradient, or not at all."""
    wrong = None
    if grad.layout is not torch.strided:
        raise RuntimeError(f"{method} does not support sparse gradients, as {text} has one")
    if grad.is_nested:
        wrong = "is a nested tensor"
    elif p.is_meta or grad.is_meta:
        wrong = "is on the meta device, where there is nothing to train"
    elif grad.shape != p.shape:
        wrong = (
            f"has shape {tuple(grad.shape)}, but its weight changed its shape to {tuple(p.shape)}"
        )
    elif grad.device != p.device:
        wrong = f"is on {grad.device}, but its weight on {p.device}"
    elif not grad.is_floating_point() and not (grad.is_complex() and p.is_complex()):
        wrong = f"has dtype {grad.dtype}"
    elif is_adamw and grad.dtype != p.dtype:
        wrong = f"has dtype {grad.dtype}, but its weight {p.dtype}, which AdamW cannot step"
    if wrong is not None:
        raise RuntimeError(f"the gradient of {text} {wrong}; run a new backward pass")
    obstacle = _obstacle(p)
    if obstacle is not None:
        raise RuntimeError(f"{text} {obstacle}")


REBUILD = "build the optimizer after the model is converted, moved or wrapped"


def _check_moments(
    p: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any], text: str
) -> None:
    """Raise if torch's AdamW cannot use the state of a parameter, or its own flags for it."""
    step = entry.get("step")
    if group.get("capturable") and p.device.type == "cpu":
        raise RuntimeError(f"capturable=True needs an accelerator, but {text} is on {p.device}")
    for flag_name in ("capturable", "fused"):
        if group.get(flag_name) and isinstance(step, Tensor) and step.device != p.device:
            raise RuntimeError(
                f"{flag_name}=True keeps the step count of {text} on {p.device}, but it is on "
                f"{step.device}; set {flag_name} at construction"
            )
    for key in ("exp_avg", "exp_avg_sq"):
        X = entry.get(key)
        needed = p.shape, moment_dtype(p, mode_of(group, p)), p.device
        if isinstance(X, Tensor) and (X.shape, X.dtype, X.device) != needed:
            _refuse_state(p, key, X, text)


def _check_state(unit: Unit, j: int, p: Tensor, entry: Mapping[str, Any], text: str) -> None:
    """Raise if the state of member j of a unit is not that of the weight as it is now."""
    shape, _, device = unit.key[j - len(unit.params)][:3]
    for key, (_, _, dtype) in unit.expected_state(j).items():
        X = entry.get(key)
        if isinstance(X, Tensor) and (p.shape != shape or p.device != device or X.dtype != dtype):
            _refuse_state(p, key, X, text)


def _refuse_state(p: Tensor, key: str, X: Tensor, text: str) -> None:
    raise RuntimeError(
        f"{text} changed its shape, dtype or device after its state was made: it is {p.dtype} of "
        f"shape {tuple(p.shape)} on {p.device}, but {key!r} is {X.dtype} of shape {tuple(X.shape)} "
        f"on {X.device}; {REBUILD}"
    )
