"""A case of the fuzzer as a script has it: parameters, a model, an optimizer and gradients."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stiefel.optimizers as optimizers
from helpers.fuzz_cases import Case, Param, value_of
from helpers.fuzz_values import (
    BAD_GRADS,
    LORA,
    NAMES,
    ODD_GRADS,
    ODD_KINDS,
)
from stiefel.optimizers import pairs_to_groups


class Alias(nn.Parameter):
    """A subclass of parameters, as quantizing and annotating libraries make."""


class Use:
    """Parameters of a case and its optimizer, as a script has them.

    Args:
        case: The case.
        weights: None, or weights to begin with.
    """

    def __init__(self, case: Case, weights: list[Tensor] | None = None):
        self.case = case
        self.rng = torch.Generator().manual_seed(case.seed % 2**63)
        self.lora = case.cls in LORA
        self.params: list[Any] = []
        self.names: list[str] = []
        self.pairs: list[list[Any]] = []
        for i, spec in enumerate(case.params):
            self._add(i, spec)
        if weights is not None:
            with torch.no_grad():
                for p, W in zip(self.params, weights, strict=True):
                    if is_material(p) and is_material(W) and p.layout is torch.strided:
                        if all(s > 0 or n < 2 for s, n in zip(p.stride(), p.shape, strict=True)):
                            p.copy_(W)
        self.optimizer: Any = None
        self._model: nn.Module | None = None

    def _add(self, i: int, spec: Param) -> None:
        if not self.lora:
            self.params.append(self._tensor(spec))
            self.names.append(NAMES[(self.case.seed + 3 * i) % len(NAMES)].format(i))
            return
        m, n, r = spec.shape
        shapes = [(r, n), (m, r + (spec.kind == "odd rank"))]
        if spec.kind == "swapped":
            shapes.reverse()
        if self.case.cls == "SwitchLoRA":
            shapes.append((m, n))
        odd = spec.kind if spec.kind in ODD_KINDS else "plain"
        members = [
            self._tensor(replace(spec, shape=shape, kind=odd if j == 0 else "plain"))
            for j, shape in enumerate(shapes)
        ]
        if spec.kind == "same":
            members[1] = members[0]
        if len(members) == 3 and isinstance(members[2], Tensor):
            members[2].requires_grad_(False)
        self.pairs.append(members)
        self.params += members
        base = f"layers.{i}.q_proj"
        self.names += [f"{base}.lora_A.weight", f"{base}.lora_B.weight", f"{base}.weight"][
            : len(members)
        ]

    def _tensor(self, spec: Param) -> Any:
        shape, kind = spec.shape, spec.kind
        dtype = getattr(torch, spec.dtype)
        X = torch.randn(shape, generator=self.rng).to(dtype)
        if kind == "strided" and len(shape) > 1:
            return nn.Parameter(X.mT.contiguous().mT)
        if kind in ("frozen", "thawed"):
            return nn.Parameter(X, requires_grad=False)
        if kind in ("subclass",):
            return Alias(X)
        if kind == "alien":  # a plain tensor that needs a gradient
            return X.requires_grad_()
        return _odd_tensor(kind, X, shape) if kind in ODD_KINDS else nn.Parameter(X)

    # the optimizer

    def make(self) -> Any:
        """Build the optimizer; may raise."""
        case = self.case
        options = {key: value_of(source) for key, source in case.options}
        options.setdefault("lr", 0.01)
        params = self._form(options)
        self.optimizer = getattr(optimizers, case.cls)(params, **options)
        if case.late is not None:
            item: Any = self.params[-1]
            if "named" in case.form:
                item = (self.names[-1], item)
            late = {key: value_of(source) for key, source in case.late}
            self.optimizer.add_param_group({"params": [item], **late})
        return self.optimizer

    def _form(self, options: dict[str, Any]) -> Any:
        case, form = self.case, self.case.form
        count = len(self.params) - (case.late is not None)
        items: list[Any] = self.params[:count]
        if form in ("module", "model="):
            self._model = model = _module(self.names, self.params)
            if form == "module" and not case.group_keys:
                return model
            if not self.lora:
                options["model"] = model
        if "named" in form:
            items = list(zip(self.names, items, strict=False))
        if self.lora:
            scale = options.pop("scale", 2.0) if form != "module" else 2.0
            step = len(self.pairs[0])
            pairs = [tuple(items[i : i + step]) for i in range(0, len(items), step)]
            return self._with_keys(pairs_to_groups(pairs, scale=scale))
        for i, spec in enumerate(case.params[:count]):
            if spec.kind == "twice":
                items.append(items[i])
        if form == "generator" and not case.group_keys:
            return (p for p in items)
        tied = any(spec.kind == "tied groups" for spec in case.params[:count])
        if "groups" not in form and not case.group_keys and not tied:
            return items
        cut = (len(items) + 1) // 2
        groups = [
            {"params": part} for part in (items[:cut], items[cut:]) if part or form == "groups"
        ]
        if "groups" not in form:
            groups = [{"params": items}]
        groups += [
            {"params": [items[i]]}
            for i, spec in enumerate(case.params[:count])
            if spec.kind == "tied groups"
        ]
        return self._with_keys(groups)

    def _with_keys(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for i, key, source in self.case.group_keys:
            groups[i % len(groups)][key] = value_of(source)
        return groups

    # gradients

    def set_gradients(self, k: int, *, drop_odd: bool = False) -> list[int]:
        """Set the gradients of step k; positions of those that are not finite."""
        bad = []
        for i, (p, kind) in enumerate(zip(self.params, self.case.grads[k], strict=False)):
            if not isinstance(p, Tensor):
                continue
            spec = spec_of(self.case, self, p)
            if spec.kind == "thawed" and k == 1:
                p.requires_grad_(True)
            if spec.kind == "lazy" and k == 0 and not is_material(p):
                p.materialize(spec.shape)
                with torch.no_grad():
                    p.fill_(0.5)
            draw = torch.Generator().manual_seed((self.case.seed + 7919 * k + i) % 2**63)
            if drop_odd and kind in ODD_GRADS:
                kind = "none"
            if not _can_have_gradient(p) or kind == "none":
                _set_grad(p, None)
                continue
            G = _gradient(kind, tuple(p.shape), p, draw)
            if is_dense(G) and not bool((G.float() if G.itemsize == 1 else G).isfinite().all()):
                bad.append(i)
            _set_grad(p, G)
        return bad


def spec_of(case: Case, use: Use, p: Any) -> Param:
    """What a tensor of a use was to be."""
    i = next(j for j, q in enumerate(use.params) if q is p)
    step = 1 if not use.lora else len(use.pairs[0])
    return case.params[i // step]


def _odd_tensor(kind: str, X: Tensor, shape: tuple[int, ...]) -> Any:
    if kind == "complex":
        return nn.Parameter(torch.complex(X.float(), X.float()))
    if kind in ("int", "bool"):
        return nn.Parameter((X > 0).to(torch.int32 if kind == "int" else torch.bool), False)
    if kind == "float8":
        return nn.Parameter(X.float().to(torch.float8_e4m3fn))
    if kind == "expanded":
        return nn.Parameter(torch.ones((1,) * len(shape)).expand(shape))
    if kind == "sparse":
        return nn.Parameter(X.float().to_sparse())
    if kind == "meta":
        return nn.Parameter(torch.empty(shape, device="meta"))
    if kind.startswith("lazy"):
        return nn.parameter.UninitializedParameter()
    if kind == "nested":
        return nn.Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]))
    if kind == "no grad leaf":
        return X
    if kind == "non-leaf":
        return nn.Parameter(X) * 2
    return {"text": "weight", "None": None}.get(kind, nn.Parameter(X))


def is_material(p: Any) -> bool:
    return (
        isinstance(p, Tensor)
        and not isinstance(p, nn.parameter.UninitializedTensorMixin)
        and not p.is_nested
        and p.device.type == "cpu"
    )


def is_dense(G: Any) -> bool:
    return is_material(G) and G.layout is torch.strided


def _can_have_gradient(p: Any) -> bool:
    return (
        isinstance(p, Tensor)
        and not isinstance(p, nn.parameter.UninitializedTensorMixin)
        and not p.is_nested
        and p.is_leaf
        and p.requires_grad
    )


def _set_grad(p: Tensor, G: Tensor | None) -> None:
    if not p.is_leaf or isinstance(p, nn.parameter.UninitializedTensorMixin):
        return
    if G is not None and G.dtype != p.dtype:
        p.grad_dtype = None
    try:
        p.grad = G
    except RuntimeError:  # torch allows no such gradient there
        p.grad = None


def _gradient(kind: str, shape: tuple[int, ...], p: Tensor, draw: torch.Generator) -> Tensor:
    if p.device.type == "meta" or not p.dtype.is_floating_point or p.dtype.itemsize == 1:
        return torch.ones_like(p)
    if p.layout is not torch.strided:
        return torch.ones(shape)
    G = torch.randn(shape, generator=draw, dtype=torch.float64)
    sizes = {"small": 1e-4, "large": 1e4}
    if kind == "zeros":
        G.zero_()
    elif kind in sizes or re.fullmatch(r"1e-?\d+", kind):
        G *= sizes.get(kind) or float(kind)
    elif kind == "mixed scale" and G.ndim:
        G *= torch.logspace(-20, 10, shape[0], dtype=G.dtype).view(-1, *[1] * (G.ndim - 1))
    elif kind == "one entry" and G.numel():
        G.zero_().view(-1)[0] = 1.0
    elif kind == "rank 1" and G.ndim > 1 and G.numel():
        G = (G[..., :1] * G[..., :1, :]).expand(shape).clone()
    elif kind in BAD_GRADS and G.numel():
        bad = math.nan if "nan" in kind else math.copysign(math.inf, -1 if "-" in kind else 1)
        (G.view(-1)[:1] if "one" in kind else G).fill_(bad)
    G = G.to(p.dtype)
    if kind == "strided" and G.ndim > 1:
        G = G.mT.contiguous().mT
    elif kind == "sparse" and G.ndim:
        G = G.to_sparse()
    elif kind == "other dtype":
        G = G.to(torch.float64 if p.dtype is not torch.float64 else torch.float32)
    elif kind == "expanded" and G.ndim:
        G = G.new_ones((1,) * G.ndim).expand(shape)
    elif kind == "with graph":
        G = G.requires_grad_() * 1
    elif kind == "negative view":
        G = torch._neg_view(G)
    return G


class _Leaf(nn.Module):
    pass


def _module(names: list[str], params: list[Any]) -> nn.Module:
    """A model that holds these parameters under these names."""
    model = nn.Module()
    for name, p in zip(names, params, strict=True):
        *path, last = name.split(".")
        owner = model
        for i, part in enumerate(path):
            if not hasattr(owner, part):
                owner.add_module(part, _owner(p) if i == len(path) - 1 else _Leaf())
            owner = getattr(owner, part)
        if isinstance(p, nn.Parameter):
            owner._parameters[last] = p
        elif isinstance(p, Tensor):
            owner._parameters[last] = p  # as tensor-parallel libraries put theirs in
        else:
            owner._parameters[last] = None
    return model


def _owner(p: Any) -> nn.Module:
    """The module that usually has a weight of this shape."""
    ndim = p.ndim if is_material(p) else 0
    owner: nn.Module = {2: nn.Linear, 4: nn.Conv2d}.get(ndim, _Leaf)(
        *{2: (1, 1, False), 4: (1, 1, 1, 1, 0, 1, 1, False)}.get(ndim, ())
    )
    owner._parameters.pop("bias", None)
    owner._parameters.pop("weight", None)
    return owner


def bits(x: Any) -> Any:
    """What must not change, comparable by ``==``."""
    if isinstance(x, nn.parameter.UninitializedTensorMixin):
        return "uninitialized"
    if isinstance(x, Tensor):
        if x.is_nested or x.device.type == "meta" or x.layout is not torch.strided:
            return (str(x.dtype), str(x.layout), str(x.device))
        x = x.detach()
        raw = x.resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)
        return (str(x.dtype), tuple(x.shape), raw.view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(x, dict):
        return {key: bits(value) for key, value in x.items() if key != "params"}
    if isinstance(x, (list, tuple)):
        return [bits(value) for value in x]
    if isinstance(x, numbers.Real) and not isinstance(x, int):
        return repr(float(x))  # a step makes numbers plain, and they stay the same numbers
    if isinstance(x, (np.generic, torch.dtype)):
        return repr(x.item() if isinstance(x, np.generic) else str(x).removeprefix("torch."))
    return repr(x)


def snapshot(use: Use) -> tuple[Any, Any, Any]:
    """Weights, state and groups."""
    optimizer = use.optimizer
    weights = [bits(p) for p in use.params]
    numbers = {id(p): i for i, p in enumerate(use.params)}
    state = {
        numbers.get(id(p), -1): bits(entry)
        for p, entry in optimizer.state.items()
        if not isinstance(entry, dict) or any(map(_is_late, entry.items()))
    }
    groups = [
        {**bits(group), "params": [id(p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return weights, state, groups


def _is_late(item: tuple[Any, Any]) -> bool:
    """Whether an entry of the state is a clock that has begun; allocation alone is no change."""
    key, value = item
    if str(key).partition(".")[0] != "step":
        return False
    if isinstance(value, Tensor):
        return not is_dense(value) or value.numel() != 1 or bool(value != 0)
    return value != 0


def differences(a: Any, b: Any) -> list[str]:
    """Which of weights, state and groups differ, with the first key."""
    found = []
    for what, x, y in zip(("weights", "state", "groups"), a, b, strict=True):
        if x != y:
            items = enumerate(x) if isinstance(x, list) else x.items()
            keys = set()
            for i, value in items:
                other = y[i] if isinstance(y, list) and i < len(y) else dict_get(y, i)
                if value != other and isinstance(value, dict) and isinstance(other, dict):
                    keys |= {
                        str(key).partition(".")[0]
                        for key in value.keys() | other.keys()
                        if value.get(key) != other.get(key)
                    }
            found.append(f"{what} {sorted(keys)}" if keys else what)
    return found


def dict_get(y: Any, i: Any) -> Any:
    return y.get(i) if isinstance(y, dict) else None
