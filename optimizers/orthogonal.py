"""What methods share that orthogonalise: the polar step, the size of the update, guards of G."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from ..kernels import (
    POLAR_METHODS,
    SKETCHES,
    PolarReport,
    low_rank_size,
    polar_factor,
    polar_report,
)
from .moments import column_squares, spike_factor, square_scale, total
from .rule import Member, Rule, Slot, check
from .sketches import Draws

ADJUST_LR_FNS = ("auto", "original", "match_rms_adamw", "spectral", "none", None)


@dataclass(frozen=True)
class OrthogonalRule(Rule, abstract=True):
    """A polar step, its scale, and guards of the gradient, as Muon's docstring explains them."""

    polar: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None
    eps: float = 1e-7
    adjust_lr_fn: str | None = "auto"
    compat: str | None = None
    polar_norm: str | None = None
    polar_dtype: str | None = None
    rank: int | float = 0.125
    oversample: int = 10
    power: int = 1
    sketch: str = "signs"
    inner: str = "polar_express"
    rank_compensate: bool = False
    seed: int = 0
    report_steps: int = 0
    clip_grad_rms: float | None = None
    normalize_grad: bool = False
    spike_ratio: float | None = None

    def __post_init__(self) -> None:
        check(0.0 <= self.eps, f"Invalid epsilon value: {self.eps}")
        check(
            self.adjust_lr_fn in ADJUST_LR_FNS,
            f"Adjust learning rate function {self.adjust_lr_fn} is not supported",
        )
        check(
            self.compat in (None, "torch"), f"compat must be None or 'torch', got {self.compat!r}"
        )
        known = (*POLAR_METHODS, "low_rank")
        check(
            self.polar in ("auto", *known),
            f"polar must be 'auto' or one of {', '.join(known)}, got {self.polar!r}",
        )
        check(
            self.compat is None or self.polar in ("auto", "ns5"),
            f"compat='torch' iterates with ns5; leave polar unset instead of {self.polar!r}",
        )
        check(
            self.compat is None or self.polar_norm is None,
            "compat='torch' divides by the Frobenius norm; leave polar_norm unset",
        )
        check(
            self.compat is None or self.polar_dtype is None,
            "compat='torch' iterates in bfloat16; leave polar_dtype unset",
        )
        steps = self.ns_steps
        check(
            steps is None or (isinstance(steps, int) and not isinstance(steps, bool)),
            f"ns_steps must be None or an int, got {steps!r}",
        )
        check(
            steps is None or 1 <= steps < 100,
            "Number of steps must be less than 100 for computational efficiency",
        )
        check(
            self.sketch in SKETCHES,
            f"sketch must be one of {', '.join(SKETCHES)}, got {self.sketch!r}",
        )
        for name in ("seed", "report_steps"):
            value = getattr(self, name)
            check(
                isinstance(value, int) and not isinstance(value, bool) and value >= 0,
                f"{name} must be an int of at least 0, got {value!r}",
            )
        clip, ratio = self.clip_grad_rms, self.spike_ratio
        check(clip is None or clip > 0, f"clip_grad_rms must be above 0, got {clip}")
        check(ratio is None or ratio > 1, f"spike_ratio must be above 1, got {ratio}")
        check(
            not self.normalize_grad or (clip is None and ratio is None),
            "normalize_grad fixes the norm; leave clip_grad_rms and spike_ratio unset",
        )
        low_rank_size(1, 1, self.rank, self.oversample)
        self.orthogonalize(torch.empty(1, 0, 1))  # what the kernel refuses is refused here

    @property
    def guarded(self) -> bool:  # type: ignore[override]
        """Where nothing is reported, and no draw looks at G."""
        drawn = self.polar == "low_rank" and self.sketch == "kaczmarz"
        return self.compat is None and not drawn and not self.report_steps

    def more_slots(self) -> dict[str, Slot]:
        """The state of ``calmed`` and ``orthogonal``."""
        slots = {}
        if self.spike_ratio is not None:
            slots["grad_norm"] = Slot("11")
        if self.report_steps:
            slots["polar_report"] = Slot("f", dtype=torch.float32, f=5)
        return slots

    def calmed(self, w: Member) -> Tensor:
        """The gradient (K, m, n), normalised or limited where the rule is told so."""
        assert w.grad is not None
        clip, ratio = self.clip_grad_rms, self.spike_ratio
        if not self.normalize_grad and clip is None and ratio is None:
            return w.grad
        G = w.grad.to(torch.promote_types(w.grad.dtype, torch.float32))
        c = square_scale(G)  # (K, 1, 1), a power of two
        G = G * c
        norm = w.sums.both(total(column_squares(G))).sqrt()  # that of c times the gradient
        if self.normalize_grad:
            return G.div_(norm.clamp(min=torch.finfo(norm.dtype).tiny))
        by = c.reciprocal()
        if clip is not None:
            by = torch.minimum(clip * math.sqrt(w.m * w.n) / norm, by)
        if ratio is not None:
            by = by * spike_factor(norm * by, w.state["grad_norm"], ratio, ok=w.ok)
        return G.mul_(by)

    def orthogonal(self, w: Member, U: Tensor) -> Tensor:
        """The polar factor of U (K, m, n) for a step of w; its quality goes into the state."""
        draws = Draws(self.seed, w.indices, w.t)
        keys = [draws.key(k) for k in range(len(U))] if self.polar == "low_rank" else []

        def whole(X: Tensor) -> Tensor:
            O = self.orthogonalize(X, keys)
            if self.report_steps and w.t % self.report_steps == 0:
                rows = [_measured(M.clone(), P.clone()) for M, P in zip(X, O, strict=True)]
                w.state["polar_report"].copy_(torch.tensor(rows))
            return O

        return w.sums.whole(whole, U)

    def orthogonalize(self, U: Tensor, keys: Sequence[int] = ()) -> Tensor:
        """The polar factor of every matrix of U (K, m, n); ``keys`` for their sketches."""
        factor = partial(
            polar_factor, steps=self.ns_steps, coefficients=self.ns_coefficients, eps=self.eps
        )
        if self.compat == "torch":
            O = factor(U, "ns5", dtype=torch.bfloat16, exact=True)
            # torch adds the factor of a tall matrix as a transposed view; bfloat16 weights round
            # such a sum otherwise
            return O if U.shape[-2] <= U.shape[-1] else O.mT.contiguous().mT
        options: dict[str, Any] = {}
        if self.polar_norm is not None:
            options["norm"] = self.polar_norm
        if self.polar_dtype is not None:
            options["dtype"] = getattr(torch, self.polar_dtype, None) or self.polar_dtype
        if self.polar == "low_rank":
            for name in ("rank", "oversample", "power", "sketch", "inner"):
                options[name] = getattr(self, name)
            options["key"] = keys or 0
        return factor(U, self.polar, **options)

    def ratio(self, m: int, n: int) -> float:
        """What multiplies lr in the update, never in the decay."""
        name = self.adjust_lr_fn
        if name == "auto":
            name = "original" if self.compat else "match_rms_adamw"
        ratio = {
            "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
            "spectral": math.sqrt(m / n),
            "none": 1.0,
        }.get(name or "original", math.sqrt(max(1, m / n)))
        if self.rank_compensate and self.polar == "low_rank":
            ratio *= math.sqrt(min(m, n) / low_rank_size(m, n, self.rank, self.oversample))
        return ratio


def _measured(M: Tensor, O: Tensor) -> list[float]:
    """The five figures of a report; zeros for a zero matrix, which has none."""
    try:
        found = polar_report(M, O)
    except ValueError:
        return [0.0] * 5
    return [getattr(found, name) for name in PolarReport.__dataclass_fields__]


def reports(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[str, list[PolarReport | None]]:
    """The last recorded report of every matrix, by the parameter's name or else its position."""
    found: dict[str, list[PolarReport | None]] = {}
    params = [
        (p, name)
        for group in groups
        for p, name in zip(
            group["params"],
            chain(group.get("param_names") or (), repeat(None)),  # some were appended later
            strict=False,
        )
    ]
    for i, (p, name) in enumerate(params):
        for key, rows in state.get(p, {}).items():
            if key.partition(".")[0] == "polar_report":
                for row in rows.view(-1, 5).tolist():
                    made = PolarReport(*row) if any(row) else None
                    found.setdefault(name or str(i), []).append(made)
    return found


def with_view(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with Muon's words for shapes put into ``view``'s: see ``views.py``.

    ``matrix_view="flatten" | "batch" | "auto"`` is taken as it is, ``split_sizes=(a, b, c)`` is
    ``rows:a,b,c`` and ``num_heads=h`` is ``heads:h``.
    """
    settings = dict(settings)
    given = {
        name: value
        for name in ("matrix_view", "split_sizes", "num_heads")
        if (value := settings.pop(name, None)) is not None
    }
    if not given:
        return settings
    named = [*given, *(["view"] if "view" in settings else [])]
    check(len(named) == 1, f"{' and '.join(named)} exclude each other: pass one of them")
    ((name, value),) = given.items()
    if name == "matrix_view":
        check(
            value in ("auto", "flatten", "batch"),
            f"matrix_view must be 'auto', 'flatten' or 'batch', got {value!r}",
        )
        settings["view"] = value
    elif name == "split_sizes":
        fits = isinstance(value, Iterable) and not isinstance(value, str)
        sizes = list(value) if fits else []
        check(
            bool(sizes) and all(map(_is_count, sizes)),
            f"split_sizes must be a list of ints of at least 1, got {value!r}",
        )
        settings["view"] = "rows:" + ",".join(map(str, sizes))
    else:
        check(_is_count(value), f"num_heads must be an int of at least 1, got {value!r}")
        settings["view"] = f"heads:{value}"
    return settings


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
