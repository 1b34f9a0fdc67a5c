"""A case of the fuzzer: plain data that says how an optimizer is used, and how it is drawn."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass, replace
from typing import Any

import stiefel.optimizers as optimizers
from helpers.fuzz_values import (
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
from stiefel.optimizers._driver.param_groups import COMMON


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
    site = rng.choice(("plain", "plain", "plain", *KINDS, "gradient", "group key"))
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
