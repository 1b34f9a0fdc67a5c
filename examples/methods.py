"""The methods by name, and how one optimizer object is built for a whole model.

Embedding, head and norm gains are trained by one and the same AdamW in every run; a method only
decides how the hidden matrices move. So a difference between two runs is a difference of methods.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import stiefel.optimizers

AUX_LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8
NamedParameters = list[tuple[str, nn.Parameter]]


class UserError(Exception):
    """A mistake of the caller; its text is one sentence that names the fix."""


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """The hidden matrices, stacks of experts too, which the methods train, and everything else."""
    matrices: NamedParameters = []
    aux: NamedParameters = []
    for name, p in model.named_parameters():
        hidden = name.startswith("blocks.") and p.ndim > 1
        (matrices if hidden else aux).append((name, p))
    return matrices, aux


class Method(NamedTuple):
    """What the comparison fixes for a method beyond the keywords that all share."""

    lr: float
    settings: dict[str, Any]


# The best lr of a sweep on "micro"/"code" (200 steps, seed 0); others: their constructor's default.
METHODS = {
    "adamw": Method(1e-3, {}),
    "muon": Method(1e-2, {}),
    "muown": Method(1e-2, {}),
    "trion": Method(5e-3, {}),
    "auon": Method(1e-3, {}),
    "aro": Method(1e-2, {}),
    "soap": Method(3e-3, {}),
    "soapmuon": Method(1e-2, {}),
    "galore": Method(2e-2, {"scale": 0.25}),
    # its residual moves by the whole lr, not by lr times alpha (published form)
    "fira": Method(5e-3, {"alpha": 0.25}),
    "apollo": Method(2e-3, {}),  # of 0.0005 to 0.004
    "sinkgd": Method(1e-3, {}),  # of three
    "dctadamw": Method(2e-3, {}),  # 0.002 to 0.01 differ by 0.02
    "frugal": Method(1e-3, {}),
    "rownorm": Method(1e-3, {}),  # the lowest of four; others of this family: of three
    "spectral": Method(1e-2, {}),
    "hybrid": Method(1e-2, {}),
    "symmetrystack": Method(1e-2, {}),
}


def exported_methods(pairs: bool) -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers that the package exports, of LoRA pairs or of matrices, by lower-case name."""
    found: dict[str, type[torch.optim.Optimizer]] = {}
    for name in stiefel.optimizers.__all__:
        value = getattr(stiefel.optimizers, name)
        if not isinstance(value, type) or not issubclass(value, torch.optim.Optimizer):
            continue
        keys = inspect.signature(value).parameters
        # A class that asks for its rule is the driver below the methods, not a method.
        if "rule" not in keys and ("lr_ratio_b" in keys) == pairs:
            found[name.lower()] = value
    return found


def available_methods() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer of matrices by its lower-case name: torch's AdamW and the package's."""
    return {"adamw": torch.optim.AdamW, **exported_methods(pairs=False)}


def constructor(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, inspect.Parameter]]:
    classes = available_methods()
    if name not in classes:
        raise UserError(f"Unknown optimizer {name!r}: choose from {', '.join(sorted(classes))}.")
    return classes[name], dict(inspect.signature(classes[name]).parameters)


def default_lr(name: str) -> float:
    _, accepted = constructor(name)
    if name in METHODS:
        return METHODS[name].lr
    value = accepted["lr"].default if "lr" in accepted else 1e-3
    return float(value) if isinstance(value, (int, float)) else 1e-3


def method_options(name: str, d: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Constructor keywords: the shared ones that the class takes, the method's, the user's."""
    _, accepted = constructor(name)
    shared = {"betas": BETAS, "weight_decay": 0.0, "rank": max(1, d // 4)}
    shared |= {"update_proj_gap": 50, "update_gap": 50}
    own = METHODS[name].settings if name in METHODS else {}
    return {key: value for key, value in shared.items() if key in accepted} | own | extra


def free_options(name: str) -> list[str]:
    """Keywords a run may set: the auxiliary AdamW is fixed, the learning rate has its own way."""
    cls, accepted = constructor(name)
    kinds = {key: parameter.kind for key, parameter in list(accepted.items())[1:]}
    keys = {key for key, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD}
    if len(keys) < len(kinds):
        # Keywords that all optimizers of the package share stand in no signature, but each is
        # a default of the groups (where "rule" and "method" say who trains the group).
        trial = cls([nn.Parameter(torch.zeros(2, 2))], lr=0.0)  # type: ignore[call-arg]
        keys |= trial.defaults.keys() - {"rule", "method"}
    return sorted(key for key in keys if key != "lr" and not key.startswith("adamw_"))


def build_optimizer(
    name: str, model: nn.Module, lr: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """``options`` train the hidden matrices; the auxiliary AdamW is the same for every method."""
    cls, _ = constructor(name)
    free = free_options(name)
    for key in options:
        if key not in free:
            raise UserError(
                f"--set {key}: {cls.__name__} takes no such option here, but {', '.join(free)}."
            )
    matrices, aux = split_parameters(model)
    group: dict[str, Any] = {"params": aux, "lr": AUX_LR, "weight_decay": 0.0}
    if cls is torch.optim.AdamW:
        group |= {"betas": BETAS, "eps": EPS}
        fixed: dict[str, Any] = {}
    else:
        group["rule"] = "adamw"
        fixed = {"adamw_betas": BETAS, "adamw_eps": EPS}
        if cls is stiefel.optimizers.SymmetryStack:  # its rules ask for the place of each weight
            fixed["model"] = model
    try:
        return cls([{"params": matrices}, group], lr=lr, **(fixed | options))  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"{cls.__name__} refuses its options (--set, --lr): {error}") from error


def schedule(step: int, steps: int, floor: float = 0.1) -> float:
    """Factor on the learning rate: warm-up over a tenth of the run, then a cosine to ``floor``."""
    warm = max(1, round(0.1 * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * min(1.0, done)))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps, counted from its state."""
    tensors = (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)
