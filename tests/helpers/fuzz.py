"""Random uses of every optimizer: what a case is, how it is drawn, run, judged and made smaller.

A case is plain data (:class:`Case`): values are Python source, so a finding prints as it is. It is
right, or refused by one sentence that names the parameter or keyword with nothing changed; all else
is a finding.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stiefel.optimizers as optimizers
from helpers.fuzz_values import (
    BAD_GRADS,
    BITWISE_EVENTS,
    CHECKPOINT_MUTATIONS,
    CLASSES,
    DRIVER_KEYS,
    DTYPES,
    EVENTS,
    FOREIGN_KEYS,
    KINDS,
    LORA,
    MATRICES,
    MISSPELLED,
    NAMES,
    NAMESPACE,
    NEEDED,
    ODD_GRADS,
    ODD_KINDS,
    ODD_VALUES,
    PLAIN,
    PLAIN_GRADS,
    PLAIN_KINDS,
    SHAPES,
    VALID,
    VALID_COMMON,
)
from stiefel.optimizers import StackedOptimizer, pairs_to_groups
from stiefel.optimizers._driver.param_groups import COMMON


class Alias(nn.Parameter):
    """A subclass of parameters, as quantizing and annotating libraries make."""


@dataclass(frozen=True)
class Param:
    """A parameter of a case."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: str = "plain"

    def __str__(self) -> str:
        kind = "" if self.kind == "plain" else f" {self.kind!r}"
        return f"{self.shape} {self.dtype}{kind}"


@dataclass(frozen=True)
class Case:
    """One use of an optimizer; every field but the first four may be emptied by the reducer."""

    seed: int
    cls: str
    form: str
    params: tuple[Param, ...]
    options: tuple[tuple[str, str], ...] = ()
    group_keys: tuple[tuple[int, str, str], ...] = ()
    late: tuple[tuple[str, str], ...] | None = None
    grads: tuple[tuple[str, ...], ...] = (("normal",),)
    writes: tuple[tuple[int, str, str], ...] = ()
    load: tuple[str, ...] = ()
    event: str = ""
    save_at: int = 0
    into_running: bool = False
    site: str = "plain"

    def __str__(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.options)
        lines = [f"{self.cls}({self.form}{options})"]
        lines += [f"  parameter {i}: {p}" for i, p in enumerate(self.params)]
        lines += [f"  group {i}: {key!r}: {value}" for i, key, value in self.group_keys]
        if self.late is not None:
            lines.append(f"  late group of the last parameter: {dict(self.late)}")
        for k, row in enumerate(self.grads):
            lines += [f"  param_groups[-1][{key!r}] = {v}" for at, key, v in self.writes if at == k]
            if k == len(self.grads) - 1 and self.event:
                lines.append(f"  {self.event}")
            lines.append(f"  step with gradients {', '.join(map(str, row))}")
        if self.load:
            where = "the same" if self.into_running else "a new"
            lines.append(f"  after {self.save_at} steps into {where} optimizer: {self.load}")
        return "\n".join([*lines, f"  (case {self.seed})"])


@dataclass
class Outcome:
    """What became of a case: right, refused (and about what), or a finding."""

    verdict: str
    stepped: bool = False
    finding: tuple[str, ...] = ()
    text: str = ""


class Found(Exception):
    """A finding; its arguments are equal for findings of one kind."""


# drawing ------------------------------------------------------------------------------------------


def options_of(name: str) -> list[str]:
    """All keywords of a class."""
    signature = inspect.signature(getattr(optimizers, name).__init__).parameters
    own = [key for key, p in signature.items() if p.kind is not p.VAR_KEYWORD]
    return [key for key in own if key not in ("self", "params", "groups")] + list(COMMON)


OPTIONS = {name: options_of(name) for name in CLASSES}


def draw_case(seed: int) -> Case:
    """The case of a seed: mostly one odd thing in a use that is otherwise documented."""
    rng = random.Random(seed)
    cls = rng.choice(PLAIN if rng.random() < 0.85 else LORA)
    lora = cls in LORA
    site = rng.choice(("plain", *KINDS, "gradient", "group key"))
    params = _draw_params(rng, lora, site)
    form = rng.choice(
        ("pairs", "named pairs", "module")
        if lora
        else ("list", "generator", "named", "groups", "named groups", "module", "model=")
    )
    options = dict(NEEDED.get(cls, {}))
    valid = {**VALID_COMMON, **VALID[cls]}
    for key in rng.sample(sorted(valid), rng.choice((0, 0, 1, 1, 2, 3))):
        options[key] = rng.choice(valid[key])
    if lora and form == "module":
        options.setdefault("scale", "2.0")
    if site == "keyword":
        if rng.random() < 0.1:
            options[rng.choice(MISSPELLED)] = "0.1"
        else:
            options[rng.choice(OPTIONS[cls])] = rng.choice(ODD_VALUES)
    steps = rng.choice((1, 2, 3))
    count = len(params) * (1 if not lora else 3 if cls == "SwitchLoRA" else 2)
    grads = [[rng.choice(PLAIN_GRADS) for _ in range(count)] for _ in range(steps)]
    if site == "gradient":
        for _ in range(rng.choice((1, 1, 2))):
            grads[rng.randrange(steps)][rng.randrange(count)] = rng.choice(ODD_GRADS)
    group_keys = []
    if site == "group key" or rng.random() < 0.1:
        group_keys = [_draw_group_key(rng, cls, form, odd=site == "group key")]
    writes = []
    if site == "write":
        key = rng.choice([*OPTIONS[cls], *DRIVER_KEYS])
        writes = [(rng.randrange(steps), key, rng.choice(ODD_VALUES + valid.get(key, ()) * 20))]
    event = ""
    if site == "parameter" and all(spec.kind not in ODD_KINDS for spec in params):
        event = rng.choice(EVENTS)
    elif site == "plain" and rng.random() < 0.3:
        event = rng.choice(EVENTS)
    late = None
    if not lora and len(params) > 1 and form not in ("module", "model=") and rng.random() < 0.15:
        late = (("lr", "0.1"),) if rng.random() < 0.5 else ()
    return Case(
        seed=seed,
        cls=cls,
        form=form,
        params=params,
        options=tuple(options.items()),
        group_keys=tuple(group_keys),
        late=late,
        grads=tuple(map(tuple, grads)),
        writes=tuple(writes),
        load=tuple(
            rng.sample(CHECKPOINT_MUTATIONS, rng.choice((1, 1, 2))) if site == "checkpoint" else ()
        ),
        event=event,
        save_at=rng.randrange(steps) if site != "checkpoint" else rng.choice((steps, steps - 1)),
        into_running=rng.random() < 0.5,
        site=site,
    )


def _draw_params(rng: random.Random, lora: bool, site: str) -> tuple[Param, ...]:
    params = []
    dtype = rng.choice(DTYPES)
    for i in range(rng.choice((1, 2, 3, 4))):
        if lora:
            m, n, r = rng.choice((4, 6)), rng.choice((3, 5, 8)), rng.choice((1, 2, 3))
            params.append(Param((m, n, r), dtype))
            continue
        if rng.random() < 0.2:
            dtype = rng.choice(DTYPES)
        shape = rng.choice(MATRICES if i == 0 or rng.random() < 0.4 else SHAPES)
        params.append(Param(shape, dtype, rng.choice(PLAIN_KINDS)))
    if site == "parameter":
        i = rng.randrange(len(params))
        if lora and rng.random() < 0.5:
            params[i] = replace(params[i], kind=rng.choice(("odd rank", "swapped", "same")))
        else:
            params[i] = replace(params[i], kind=rng.choice(ODD_KINDS))
    return tuple(params)


def _draw_group_key(rng: random.Random, cls: str, form: str, odd: bool) -> tuple[int, str, str]:
    i = rng.randrange(3)
    if not odd or rng.random() < 0.2:
        return (i, rng.choice(FOREIGN_KEYS), rng.choice(("'x'", "0.5", "None", "[1, 2]")))
    if rng.random() < 0.1:
        return (i, rng.choice(MISSPELLED), "0.1")
    key = rng.choice([*OPTIONS[cls], "use_muon", *DRIVER_KEYS])
    return (i, key, rng.choice(ODD_VALUES))


_CODE: dict[str, Any] = {}


def value_of(source: str) -> Any:
    """A new value from its source."""
    code = _CODE.get(source)
    if code is None:
        code = _CODE[source] = compile(source, "<value>", "eval")
    return eval(code, dict(NAMESPACE))


# building -----------------------------------------------------------------------------------------


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
                    if _is_material(p) and _is_material(W) and p.layout is torch.strided:
                        if spec_of(case, self, p).kind != "expanded":
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
            if spec.kind == "lazy" and k == 0 and not _is_material(p):
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
            if _is_dense(G) and not bool((G.float() if G.itemsize == 1 else G).isfinite().all()):
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


def _is_material(p: Any) -> bool:
    return (
        isinstance(p, Tensor)
        and not isinstance(p, nn.parameter.UninitializedTensorMixin)
        and not p.is_nested
        and p.device.type == "cpu"
    )


def _is_dense(G: Any) -> bool:
    return _is_material(G) and G.layout is torch.strided


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
    ndim = p.ndim if _is_material(p) else 0
    owner: nn.Module = {2: nn.Linear, 4: nn.Conv2d}.get(ndim, _Leaf)(
        *{2: (1, 1, False), 4: (1, 1, 1, 1, 0, 1, 1, False)}.get(ndim, ())
    )
    owner._parameters.pop("bias", None)
    owner._parameters.pop("weight", None)
    return owner


# snapshots ----------------------------------------------------------------------------------------


def _bits(x: Any) -> Any:
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
        return {key: _bits(value) for key, value in x.items() if key != "params"}
    if isinstance(x, (list, tuple)):
        return [_bits(value) for value in x]
    return repr(x)


def snapshot(use: Use) -> tuple[Any, Any, Any]:
    """Weights, state and groups."""
    optimizer = use.optimizer
    weights = [_bits(p) for p in use.params]
    numbers = {id(p): i for i, p in enumerate(use.params)}
    state = {
        numbers.get(id(p), -1): _bits(entry)
        for p, entry in optimizer.state.items()
        if not isinstance(entry, dict) or any(map(_is_late, entry.items()))
    }
    groups = [
        {**_bits(group), "params": [id(p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return weights, state, groups


def _is_late(item: tuple[Any, Any]) -> bool:
    """Whether an entry of the state is a clock that has begun; allocation alone is no change."""
    key, value = item
    if str(key).partition(".")[0] != "step":
        return False
    if isinstance(value, Tensor):
        return not _is_dense(value) or value.numel() != 1 or bool(value != 0)
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


# judging ------------------------------------------------------------------------------------------

TORCH_TEXTS = re.compile(
    "optimizer got an empty parameter list|params argument given to the optimizer should be"
    "|optimizer parameters need to be organized in ordered|optimizer can only optimize Tensors"
    "|can't optimize a non-leaf Tensor|some parameters appear in more than one parameter group"
    "|should be with/without names|does not support sparse gradients"
    "|loaded state dict has a different number of|loaded state dict contains a parameter group"
    "|all optimizer params should be|expected dtype .* for `(end|weight)`"
)
"""Sentences of torch.optim.Optimizer and AdamW, which every torch optimizer says."""
WORDS = {
    "adjust_lr_fn": "Adjust learning rate function", "lr": "learning rate", "eps": "epsilon", "betas": "beta parameter", "adamw_betas": "beta",
    "adamw_lr": "learning rate", "rule": "method", "num_heads": "view", "split_sizes": "view",
    "matrix_view": "view",
}  # fmt: skip
AMOUNTS = ("lr", "weight_decay", "adamw_lr", "adamw_weight_decay", "adamw_lr_ratio")


def says(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", text) is not None


def names_it(error: BaseException, case: Case, use: Use, stage: str) -> bool:
    """Whether a sentence names what it is about."""
    text = str(error)
    if TORCH_TEXTS.search(text):
        return True
    if re.search(r"parameter (group )?(\d+|'|\S+\.)|pair \d+", text):
        return True
    words = [key for key, _ in case.options] + [key for _, key, _ in case.group_keys]
    words += [key for _, key, _ in case.writes] + list(use.names)
    if stage == "load":
        words += ["checkpoint", "state_dict", "param_groups"]
    return any(says(w, text) or (w in WORDS and WORDS[w] in text) for w in words)


def where(error: BaseException) -> str:
    """File and function of the last frames of a traceback, without line numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "fuzz.py" not in f.filename]
    parts = [f"{f.filename.rpartition('/')[2]}:{f.name}" for f in ours[-2:]]
    return " > ".join(parts)


def shape_of_text(text: str) -> str:
    return re.sub(r"'[^']*'|\d[\d.e+-]*", "#", text.splitlines()[0] if text else "")[:80]


def judge(error: BaseException, case: Case, use: Use, stage: str, changed: list[str]) -> str:
    """The kind of a refusal; raises Found where it is none."""
    kind, text = type(error), str(error)
    of_torch = kind is AssertionError and "capturable" in text and "foreach" not in text
    if kind not in (ValueError, TypeError, RuntimeError) and not of_torch:
        raise Found(f"{kind.__name__} in {stage}", where(error), shape_of_text(text))
    if changed:
        raise Found(f"changed by a refused {stage}", ", ".join(changed), where(error))
    if not names_it(error, case, use, stage):
        raise Found(f"{kind.__name__} in {stage} names nothing", where(error), shape_of_text(text))
    if "\n" in text.strip() and len(text) > 600:
        raise Found("a refusal of many lines", where(error))
    if case.site == "plain" and not case.group_keys:
        return "keyword" if len(case.options) else _refused_plainly(error, case)
    return "keyword" if case.site == "plain" else case.site


def _refused_plainly(error: BaseException, case: Case) -> str:
    raise Found("a documented use is refused", where(error), shape_of_text(str(error)))


def is_tame(optimizer: StackedOptimizer) -> bool:
    """Whether all sizes of the groups are such that finite gradients give finite weights."""
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, Tensor):
                fits = value.numel() == 1 and value.device.type == "cpu" and not value.is_complex()
                value = float(value) if fits else 99.0
            if isinstance(value, (list, tuple)) and "betas" not in key:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
                continue
            if key in AMOUNTS and not 0 <= value <= 1:
                return False
            if "eps" in key and value < 1e-12 and value != optimizer.defaults.get(key):
                return False
            if isinstance(value, float) and not abs(value) <= 50:
                return False
    return True


# running ------------------------------------------------------------------------------------------


def run_case(case: Case) -> Outcome:
    """Run and judge a case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _run(case)
        except Found as found:
            return Outcome("finding", finding=found.args, text=getattr(found, "detail", ""))


def _run(case: Case) -> Outcome:
    try:
        use = Use(case)
    except Exception as error:  # the fuzzer's own
        raise AssertionError(f"the case cannot be built: {error}\n{case}") from error
    weights = [_bits(p) for p in use.params]
    try:
        use.make()
    except Exception as error:
        changed = ["weights"] if weights != [_bits(p) for p in use.params] else []
        return Outcome(judge(error, case, use, "construction", changed), text=str(error))
    _check_foreign_keys(use)
    saved: Any = None
    stepped, moved_from = False, weights
    for k in range(len(case.grads)):
        if k == case.save_at and not case.load:
            saved = ([_clone(p) for p in use.params], copy.deepcopy(_state_dict(use)))
        if k == case.save_at and case.load:
            refusal = _load_mutated(use)
            if isinstance(refusal, Outcome):
                return replace(refusal, stepped=stepped)
            use = refusal
        refusal = _step(use, k)
        if refusal is not None:
            return replace(refusal, stepped=stepped)
        stepped = stepped or moved_from != [_bits(p) for p in use.params]
    if case.load and case.save_at == len(case.grads):
        refusal = _load_mutated(use)
        if isinstance(refusal, Outcome):
            return replace(refusal, stepped=stepped)
        use = refusal
        refusal = _step(use, len(case.grads) - 1)
        if refusal is not None:
            return replace(refusal, stepped=stepped)
    if not case.load:
        if not case.event or case.event in BITWISE_EVENTS:
            _check_resume(replace(case, event=""), use, *saved)
        _check_moved(use, moved_from)
    return Outcome("right", stepped=stepped)


def _clone(p: Any) -> Any:
    return p.detach().clone() if _is_dense(p) else p


def _state_dict(use: Use) -> Any:
    try:
        return use.optimizer.state_dict()
    except Exception as error:
        raise Found("state_dict raises", type(error).__name__, where(error)) from error


def _check_foreign_keys(use: Use) -> None:
    for _, key, source in use.case.group_keys:
        kept = any(
            _bits(group.get(key)) == _bits(value_of(source)) for group in use.optimizer.param_groups
        )
        if key in FOREIGN_KEYS and not kept:
            raise Found("a foreign group key is lost", key)


def _step(use: Use, k: int) -> Outcome | None:
    """One step; None, or the outcome of a refusal, after which the optimizer must go on."""
    case, optimizer = use.case, use.optimizer
    undo = []
    for at, key, source in case.writes:
        if at == k:
            group = optimizer.param_groups[-1]
            undo.append((group, key, group.get(key, undo)))
            group[key] = value_of(source)
    if case.event and k == len(case.grads) - 1:
        happen(use, case.event)
        optimizer = use.optimizer
    bad = use.set_gradients(k)
    before = snapshot(use)
    try:
        if case.event == "other device default" and k == len(case.grads) - 1:
            with torch.device("meta"):
                optimizer.step()
        else:
            optimizer.step()
    except Exception as error:
        kind = judge(error, case, use, "step", differences(before, snapshot(use)))
        _go_on(use, k, undo)
        return Outcome(kind, text=str(error))
    choices = {str(group.get("nonfinite")) for group in optimizer.param_groups}
    ignore = "ignore" in choices
    if is_tame(optimizer) and not (bad and ignore):
        _check_finite(use, k)
    if bad and choices == {"raise"}:
        raise Found("nonfinite='raise' does not raise", case.cls)
    return None


def happen(use: Use, event: str) -> None:
    """Let something happen to model and optimizer between two steps."""
    if event in ("copy", "pickle"):
        pair = (use.params, use.optimizer)
        pair = copy.deepcopy(pair) if event == "copy" else pickle.loads(pickle.dumps(pair))
        use.params, use.optimizer = pair
        return
    for p in use.params:
        if not _is_dense(p) or not p.is_floating_point():
            continue
        if event == "cast":
            p.data, p.grad = p.data.bfloat16(), None
        elif event == "other memory" and p.ndim > 1:
            p.data = p.data.mT.contiguous().mT
    group = use.optimizer.param_groups[-1]
    if event == "clear state":
        use.optimizer.state.clear()
    elif event == "append" and use.case.cls not in LORA and "param_names" not in group:
        group["params"].append(nn.Parameter(torch.ones(3, 3)))


def _go_on(use: Use, k: int, undo: list[Any]) -> None:
    """After a refused step, the step without the odd thing is taken."""
    if use.case.site not in ("write", "gradient"):
        return
    for group, key, old in undo:
        if old is undo:
            del group[key]
        else:
            group[key] = old
    use.set_gradients(k, drop_odd=True)
    try:
        use.optimizer.step()
    except Exception as error:
        raise Found("no step after a refused one", type(error).__name__, where(error)) from error


def _check_finite(use: Use, k: int) -> None:
    case, adamw = use.case, _adamw_parameters(use.optimizer)
    for i, p in enumerate(use.params):
        if not _is_dense(p) or not p.dtype.is_floating_point or p.dtype.itemsize == 1:
            continue
        if bool(p.isfinite().all()):
            continue
        if id(p) in adamw and p.dtype is torch.float16:
            continue  # moments in float16, as in torch.optim.AdamW: 0 / 0
        kinds = {row[i] for row in case.grads[: k + 1] if i < len(row)}
        odd = sorted(kinds & set(ODD_GRADS)) or ["plain gradients"]
        owner = "AdamW parameter" if id(p) in adamw else "matrix"
        raise Found(f"{owner} is not finite", case.cls, f"{p.dtype} {odd[0]}")
    huge = {"1e20", "1e30", "1e37"} & {kind for row in case.grads for kind in row}
    for p, entry in use.optimizer.state.items():
        if not isinstance(entry, dict):
            raise Found("an entry of the state is no dict", type(entry).__name__)
        for key, value in entry.items():
            if not _is_dense(value) or not value.is_floating_point():
                continue
            if bool(value.isnan().any()):
                raise Found("NaN in the state", case.cls, key)
            half = id(p) in adamw and value.dtype is torch.float16
            if bool(value.isinf().any()) and not huge and not half:
                raise Found("inf in the state", case.cls, key)


def _adamw_parameters(optimizer: StackedOptimizer) -> set[int]:
    """Ids of the parameters that AdamW trains."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        rows = list(optimizer.assignment())
    except Exception as error:
        raise Found("assignment raises", type(error).__name__, where(error)) from error
    return {id(p) for p, row in zip(params, rows, strict=False) if row.rule == "adamw"}


def _check_moved(use: Use, before: list[Any]) -> None:
    """Every parameter with only normal gradients has moved."""
    case, options = use.case, dict(use.case.options)
    if case.site not in ("plain", "gradient") or case.writes or case.group_keys:
        return
    rests = {"state_free", "split", "schedule", "freeze_steps", "state_dtype", "spike_ratio"}
    if rests & options.keys() or case.cls in LORA or case.cls == "FRUGAL":
        return
    for i, p in enumerate(use.params):
        row = {kinds[i] for kinds in case.grads}
        spec = spec_of(case, use, p)
        if row == {"normal"} and spec.kind in ("plain", "strided") and p.numel():
            if before[i] == _bits(p) and spec.dtype in ("float32", "float64"):
                raise Found("a parameter with a gradient does not move", case.cls, str(spec.shape))


def _check_resume(case: Case, use: Use, weights: list[Any], saved: Any) -> None:
    """A new optimizer that loads the saved state gives the bits of the uninterrupted run."""
    other = Use(case, weights)
    for i, p in enumerate(other.params):  # a model that was unfrozen before stays so
        spec = spec_of(case, other, p) if isinstance(p, Tensor) else None
        if spec is not None and spec.kind == "thawed" and case.save_at > 1:
            p.requires_grad_(True)
        if spec is not None and spec.kind == "lazy" and case.save_at > 0:
            p.materialize(spec.shape)
            with torch.no_grad():
                p.copy_(weights[i])
    other.make()
    try:
        other.optimizer.load_state_dict(saved)
    except Exception as error:
        raise Found(
            "its own checkpoint is refused", type(error).__name__, where(error),
            shape_of_text(str(error)),
        ) from error  # fmt: skip
    for k in range(case.save_at, len(case.grads)):
        if _step(other, k) is not None:
            raise Found("a resumed run refuses a step", case.cls)
    found = differences((*snapshot(use)[:2], ()), (*snapshot(other)[:2], ()))
    if found:
        first = "from the start" if case.save_at == 0 else "resumed"
        raise Found(f"{first}: other bits", case.cls, ", ".join(found))


# checkpoints --------------------------------------------------------------------------------------


def _load_mutated(use: Use) -> Use | Outcome:
    """Load a mutated checkpoint; the use that goes on, or the outcome of a refusal."""
    case = use.case
    saved = copy.deepcopy(_state_dict(use))
    rng = random.Random(case.seed)
    for kind in case.load:
        saved = mutate(saved, kind, rng)
    target = use
    if not case.into_running:
        target = Use(case, [_clone(p) for p in use.params])
        for spec, p in zip(case.params, target.params, strict=False):
            if spec.kind == "thawed" and len(case.grads) > 1:
                p.requires_grad_(True)
        target.make()
    before = snapshot(target)
    try:
        target.optimizer.load_state_dict(saved)
    except Exception as error:
        changed = differences(before, snapshot(target))
        kind = judge(error, case, use, "load", changed)
        try:
            target.set_gradients(len(case.grads) - 1)
            target.optimizer.step()
        except Exception as later:
            raise Found("no step after a refused load", where(later)) from later
        return Outcome(kind, text=str(error))
    return target


def mutate(saved: Any, kind: str, rng: random.Random) -> Any:
    """A state dict with one thing changed; itself where there is nothing to change."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return saved
    if kind in WHOLE:
        return WHOLE[kind](saved)
    state, groups = saved["state"], saved.get("param_groups")
    ids = [i for i, entry in state.items() if isinstance(entry, dict) and entry]
    if isinstance(groups, list) and groups and kind in GROUP_MUTATIONS:
        GROUP_MUTATIONS[kind](saved, groups, rng.choice(groups), rng)
    elif ids and kind in ENTRY_MUTATIONS:
        i = rng.choice(ids)
        ENTRY_MUTATIONS[kind](state, i, state[i], rng)
    elif ids and kind.startswith(("clock", "drop clock")):
        _mutate_clock(state[rng.choice(ids)], kind, rng)
    elif ids and kind in VALUE_MUTATIONS:
        entry = state[rng.choice(ids)]
        keys = [key for key, value in entry.items() if isinstance(value, Tensor) and value.ndim]
        if keys:
            key = rng.choice(sorted(keys))
            entry[key] = VALUE_MUTATIONS[kind](entry[key])
    return saved


def _mutate_clock(entry: dict[str, Any], kind: str, rng: random.Random) -> None:
    clocks = [key for key in entry if str(key).partition(".")[0] in ("step", "refreshed", "held")]
    if not clocks:
        return
    key = rng.choice(sorted(clocks))
    if kind == "drop clock":
        del entry[key]
        return
    tensors = {
        "tensor": torch.tensor(2.0), "pair": torch.tensor([1.0, 2.0]),
        "meta": torch.zeros((), device="meta"),
    }  # fmt: skip
    word = kind.partition(" ")[2]
    entry[key] = tensors[word] if word in tensors else value_of(word)


def _permute(state: dict[Any, Any], i: Any, entry: Any, rng: random.Random) -> None:
    j = rng.choice(list(state))
    state[i], state[j] = state[j], state[i]


def _rename(state: dict[Any, Any], i: Any, entry: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(list(entry))
    entry[f"{key}_"] = entry.pop(key)


def _drop_key(state: dict[Any, Any], i: Any, entry: dict[str, Any], rng: random.Random) -> None:
    del entry[rng.choice(list(entry))]


def _filled(x: float) -> Callable[[Tensor], Tensor]:
    def fill(value: Tensor) -> Tensor:
        value = value.clone()
        if value.is_floating_point() and value.numel():
            value.view(-1)[0] = x
        return value

    return fill


def _big_index(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else torch.full_like(value, 99)


def _odd_group_value(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    group[rng.choice([key for key in group if key != "params"])] = value_of(rng.choice(ODD_VALUES))


def _drop_group_key(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    del group[rng.choice(list(group))]


def _permute_names(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    if "param_names" in group:
        rng.shuffle(group["param_names"])


def _odd_names(saved: Any, groups: Any, group: dict[str, Any], rng: random.Random) -> None:
    if "param_names" in group:
        odd = [["x"], [None] * len(group["params"]), "abc", None, 3, [1] * len(group["params"])]
        group["param_names"] = rng.choice(odd)


WHOLE: dict[str, Callable[[Any], Any]] = {
    "state list": lambda saved: {**saved, "state": list(saved["state"].values())},
    "no state": lambda saved: {"param_groups": saved.get("param_groups")},
    "no groups": lambda saved: {"state": saved["state"]},
    "list": lambda saved: [saved],
    "groups None": lambda saved: {**saved, "param_groups": None},
    "extra id": lambda saved: {**saved, "state": {**saved["state"], 999: {"step": 1}}},
}
GROUP_MUTATIONS: dict[str, Callable[..., Any]] = {
    "drop group": lambda saved, groups, group, rng: groups.remove(group),
    "extra group": lambda saved, groups, group, rng: groups.append({**group, "params": [998]}),
    "fewer params": lambda saved, groups, group, rng: group["params"].pop(),
    "drop names": lambda saved, groups, group, rng: group.pop("param_names", None),
    "permute names": _permute_names,
    "odd names": _odd_names,
    "drop group key": _drop_group_key,
    "odd group value": _odd_group_value,
}
ENTRY_MUTATIONS: dict[str, Callable[..., Any]] = {
    "drop entry": lambda state, i, entry, rng: state.pop(i),
    "drop key": _drop_key,
    "rename key": _rename,
    "extra key": lambda state, i, entry, rng: entry.update(extra=torch.zeros(2)),
    "entry None": lambda state, i, entry, rng: state.update({i: None}),
    "entry list": lambda state, i, entry, rng: state.update({i: [1, 2]}),
    "permute entries": _permute,
}
VALUE_MUTATIONS: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.reshape(-1, 1, 1),
    "longer": lambda x: torch.cat([x, x]),
    "cast int": lambda x: x.to(torch.int32),
    "cast half": lambda x: x.half() if x.is_floating_point() else x,
    "cast complex": lambda x: x.to(torch.complex64),
    "nan": _filled(math.nan),
    "inf": _filled(math.inf),
    "negative": _filled(-1.0),
    "none": lambda x: None,
    "text": lambda x: "x",
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "big index": _big_index,
}

# smaller cases ------------------------------------------------------------------------------------


def smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    if case.late is not None:
        yield replace(case, late=None)
    if case.event:
        yield replace(case, event="")
    for name in ("options", "group_keys", "writes", "load"):
        items = getattr(case, name)
        for i in range(len(items)):
            yield replace(case, **{name: items[:i] + items[i + 1 :]})
    if len(case.grads) > 1:
        for k in range(len(case.grads)):
            yield replace(
                case,
                grads=case.grads[:k] + case.grads[k + 1 :],
                save_at=min(case.save_at, len(case.grads) - 1),
                writes=tuple((min(at, len(case.grads) - 2), *rest) for at, *rest in case.writes),
            )
    step = 1 if case.cls not in LORA else 3 if case.cls == "SwitchLoRA" else 2
    if len(case.params) > 1:
        for i in range(len(case.params)):
            yield replace(
                case,
                params=case.params[:i] + case.params[i + 1 :],
                grads=tuple(row[: step * i] + row[step * (i + 1) :] for row in case.grads),
            )
    for i, spec in enumerate(case.params):
        for plain in (replace(spec, kind="plain"), replace(spec, dtype="float32")):
            if plain != spec:
                yield replace(case, params=(*case.params[:i], plain, *case.params[i + 1 :]))
    for k, row in enumerate(case.grads):
        for i, kind in enumerate(row):
            if kind != "normal":
                new = (*row[:i], "normal", *row[i + 1 :])
                yield replace(case, grads=(*case.grads[:k], new, *case.grads[k + 1 :]))
    plain_form = "pairs" if case.cls in LORA else "list"
    if case.form != plain_form:
        yield replace(case, form=plain_form)


def reduce_case(case: Case, finding: tuple[str, ...], tries: int = 200) -> Case:
    """A smaller case with the same finding."""
    shrunk = True
    while shrunk and tries > 0:
        shrunk = False
        for candidate in smaller(case):
            tries -= 1
            try:
                outcome = run_case(candidate)
            except Exception:
                continue
            if outcome.finding == finding:
                case, shrunk = candidate, True
                break
            if tries <= 0:
                break
    return case


@dataclass
class Report:
    """Counts of outcomes, and the first case of each kind of finding."""

    verdicts: Counter[str] = field(default_factory=Counter)
    stepped: int = 0
    findings: dict[tuple[str, ...], Case] = field(default_factory=dict)
    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def add(self, case: Case, outcome: Outcome) -> None:
        self.verdicts[outcome.verdict] += 1
        self.stepped += outcome.stepped
        if outcome.finding:
            self.findings.setdefault(outcome.finding, case)
            self.counts[outcome.finding] += 1

    @property
    def cases(self) -> int:
        return sum(self.verdicts.values())

    def __str__(self) -> str:
        refused = ", ".join(f"{kind} {self.verdicts[kind]}" for kind in KINDS)
        return (
            f"{self.cases} cases: {self.stepped} took a step; {self.verdicts['right']} right; "
            f"refused: {refused}; findings: {self.verdicts['finding']} of "
            f"{len(self.findings)} kinds"
        )

    def reproducers(self, most: int = 20) -> str:
        """One small case for each kind of finding."""
        parts = []
        for finding, count in self.counts.most_common(most):
            case = reduce_case(self.findings[finding], finding)
            parts.append(f"{count} x {' | '.join(finding)}\n{case}")
        return "\n\n".join(parts)


def save_roundtrip(x: Any) -> Any:
    """Through a file, as ``torch.load`` reads one by default."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
