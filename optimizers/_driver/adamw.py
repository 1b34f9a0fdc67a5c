"""AdamW for everything that is not a matrix: torch's own functional form, never a second Adam.

It is the one step that rounds weights by itself and not through ``update_weight_``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import _device_dtype_check_for_fused

from ...kernels import update_weight_


def betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Betas of AdamW: ``adamw_betas``, else the method's ``betas``, else (0.9, 0.95)."""
    beta1, beta2 = group.get("adamw_betas") or group.get("betas") or (0.9, 0.95)
    return beta1, beta2


def step_tensor(p: Tensor, group: Mapping[str, Any], value: float) -> Tensor:
    """A step count as ``torch.optim.AdamW`` stores it, on the device if its kernel reads it there.

    Args:
        p: The parameter.
        group: The group, for ``fused`` and ``capturable``.
        value: The count.
    """
    on_device = group["fused"] or group["capturable"]
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    return torch.tensor(
        float(value),
        dtype=torch.float64 if double else torch.float32,
        device=p.device if on_device else "cpu",
    )


def allocate(p: Tensor, group: Mapping[str, Any], entry: dict[str, Any]) -> None:
    """Allocate the state of one parameter as ``torch.optim.AdamW`` does, if it has none."""
    if "exp_avg" not in entry:
        if group["fused"]:
            _device_dtype_check_for_fused(p)
        entry["step"] = step_tensor(p, group, 0)
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = torch.zeros_like(p, memory_format=torch.preserve_format)


def step(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Sequence[dict[str, Any]],
    *,
    order: tuple[bool, float] | None = None,
) -> None:
    """Step lists of parameters, bit-equal to ``torch.optim.AdamW``.

    Args:
        group: Settings: lr, weight_decay, adamw_*, foreach, fused, capturable, maximize.
        params: Parameters of any shapes.
        grads: Their gradients.
        entries: Their state.
        order: None for torch's order, or (correct_bias, eps) for that of GaLore's published code:
            eps on the uncorrected root, decay last.
    """
    decay = group["adamw_weight_decay"]
    decay = group["weight_decay"] if decay is None else decay
    betas, lr = betas_of(group), group["lr"]
    if order is None:
        _torch(group, params, grads, entries, lr, betas, group["adamw_eps"], decay)
        return
    # M / (sqrt(V) + eps) * sqrt(c2) / c1 is torch's step with eps / sqrt(c2), c = 1 - beta^t
    correct_bias, eps = order
    clocks = [int(entry["step"]) + 1 for entry in entries]  # read before any step changes them
    for t in sorted(set(clocks)):
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        step_size = lr if correct_bias else lr * c1 / math.sqrt(c2)
        indices = [i for i, count in enumerate(clocks) if count == t]
        params_at_t = [params[i] for i in indices]
        _torch(
            group,
            params_at_t,
            [grads[i] for i in indices],
            [entries[i] for i in indices],
            step_size,
            betas,
            eps / math.sqrt(c2),
            0.0,
        )
        if decay:
            factor = 1.0 - float(lr) * decay
            for p in params_at_t:
                update_weight_(p, partial(_decay_, factor=factor), p.dtype)


def _decay_(p: Tensor, factor: float) -> None:
    """Multiply by torch's operation on lists, which rounds the factor as published."""
    torch._foreach_mul_([p], factor)


def _torch(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Sequence[dict[str, Any]],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    adamw(
        list(params),
        list(grads),
        [entry["exp_avg"] for entry in entries],
        [entry["exp_avg_sq"] for entry in entries],
        [],
        [entry["step"] for entry in entries],
        foreach=group["foreach"],
        capturable=group["capturable"],
        fused=group["fused"],
        has_complex=any(p.is_complex() for p in params),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=group["maximize"],
    )
