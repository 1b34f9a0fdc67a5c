"""Learning rates and decays for models of another width, and a schedule by tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from ._core.validation import check, choice, number, shown, whole_number
from ._roles.classify import Row, classify

WD_RULES = ("sqrt", "mup", "none")
STEPS = ("adam", "rms", "spectral")
MATRICES = ("hidden", "conv", "expert")
OUTPUTS = ("head", "router")
CANNOT = (
    "Not changed, and part of the rule: initial weights (variance 1 / fan-in; the head smaller), "
    "attention logits (1 / d_head), output multipliers (1 / w where the head is tied)."
)


class WidthGroups(list[dict[str, Any]]):
    """Parameter groups; ``print`` shows their factors, and what no group can change."""

    def __init__(self, groups: Iterable[dict[str, Any]], lines: Sequence[str]) -> None:
        super().__init__(groups)
        self.lines = [*lines]

    def __str__(self) -> str:
        return "\n".join([*self.lines, CANNOT])


def width_groups(
    model: nn.Module,
    *,
    base_width: float | None = None,
    base_shapes: nn.Module | Mapping[str, Sequence[int]] | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    wd_rule: str = "sqrt",
    step: str = "adam",
    width: int | None = None,
) -> WidthGroups:
    """Make parameter groups that carry a small model's learning rate and decay to a wider one.

    With w = fan-in / fan-in of the small model, the groups have these factors::

        weight                               lr                       weight_decay
                                   adam     rms        spectral    sqrt       mup       none
        both sides grow            1 / w    w^(-1/2)   1           see below            1
        only fan-in (head, router) 1 / w    1 / w      1 / w       0          1         1
        only fan-out, no side      1        1          1           0          1         1
        (embedding, first layer, gain, bias)

    Under ``"sqrt"`` singular values of the weights keep their size, for which decay grows by
    w^(1/2) where steps are ``"adam"`` or ``"rms"``; under ``"mup"`` lr times decay stays, so decay
    grows as lr falls. Roles come from :func:`classify`. Groups are plain: any optimizer of torch or
    of this package takes them, ours best with ``model=model`` beside. Print them.

    Sources: weight decay, arXiv 2510.15262 (its abstract); ``"mup"``, ``MuAdamW`` of microsoft/mup;
    the column ``"rms"`` is derived: such a step has the spectral norm lr sqrt(d). Which methods
    belong to it was measured: how far hidden matrices move the output from width 64 to 512.

    Args:
        model: The wide model; the meta device will do.
        base_width: Width of the small model (default: None). Then w is one number for all weights:
            ``width`` over this. The first weight is a first layer if no other writes what it reads,
            the last one a head if no other reads what it writes.
        base_shapes: In place of it, the small model itself, or the shapes of its parameters by
            name, which says of every side whether it grows (default: None).
        lr: Learning rate of the small model (default: 1e-3).
        weight_decay: Its decay (default: 0.01).
        wd_rule: ``"sqrt"``, ``"mup"`` or ``"none"`` (default: ``"sqrt"``).
        step: Size of a step of hidden matrices (default: ``"adam"``). ``"adam"``: entries of size
            lr, in the coordinates of the weight (AdamW, APOLLO, FRUGAL, SinkGD, DCTAdamW, AuON,
            RowNorm, GaLore with ``projection="random"``, ``"topk"``, ``"dct"``; Fira is near it);
            ``"rms"``: spectral norm lr d^(1/2), where steps are orthogonal at a fixed root mean
            square (Muon, ARO, Trion, SymmetryStack by default), or entries of size lr in singular
            directions (GaLore by default, SOAP), each of which moves alone; ``"spectral"``:
            orthogonal, with ``adjust_lr_fn="spectral"`` or ``"spectral_unclamped"``.
        width: Width of the model, for ``base_width`` (default: None, that of the embedding, else
            the size that most weights read).

    Returns:
        Groups with ``params`` as (name, parameter), ``lr`` and ``weight_decay``, in the order of
        the model. Frozen parameters are in them.

    Raises:
        ValueError: Unless one of ``base_width`` and ``base_shapes`` is given, for a value out of
            range, or for shapes that do not fit the model.
    """
    choice("wd_rule", wd_rule, WD_RULES)
    choice("step", step, STEPS)
    lr = _number("lr", lr, "[0, inf)")
    weight_decay = _number("weight_decay", weight_decay, "[0, inf)")
    check(
        (base_width is None) != (base_shapes is None),
        "give either base_width, the width of the small model, or base_shapes, its shapes by name",
    )
    rows = [row for row in classify(model) if row.name is not None]
    _refuse_lazy(rows)
    if base_shapes is not None:
        check(width is None, "width belongs to base_width; leave it out beside base_shapes")
        growth = _growth_by_shapes(rows, base_shapes)
    else:
        w = _width_of(rows, width) / _number("base_width", base_width, "(0, inf)")
        growth = [_growth_by_role(row, rows, w) for row in rows]
    params = dict(model.named_parameters())
    groups: dict[tuple[float, float], list[tuple[Row, Tensor]]] = {}
    for row, (w_in, w_out) in zip(rows, growth, strict=True):
        key = _factors(w_in, w_out, _is_matrix(row), wd_rule, step)
        groups.setdefault(key, []).append((row, params[row.name or ""]))
    return WidthGroups(
        (
            {
                "params": [(row.name, p) for row, p in members],
                "lr": lr * lr_factor,
                "weight_decay": weight_decay * wd_factor,
            }
            for (lr_factor, wd_factor), members in groups.items()
        ),
        [_line(key, [row for row, _ in members]) for key, members in groups.items()],
    )


def _number(name: str, value: Any, allowed: str) -> float:
    found = number(name, value, allowed)
    assert found is not None
    return found


def _count(name: str, value: Any, allowed: str) -> int:
    found = whole_number(name, value, allowed)
    assert found is not None
    return found


def _is_matrix(row: Row) -> bool:
    return len(row.shape) > 1 and row.role not in ("depthwise", "norm", "bias", "vector")


def _factors(
    w_in: float, w_out: float | None, is_matrix: bool, wd_rule: str, step: str
) -> tuple[float, float]:
    """Factors of lr and decay.

    Args:
        w_in: Growth of the fan-in; 1 for vectors and embeddings.
        w_out: Growth of the fan-out, None where the weight is hidden whether it grows or not.
        is_matrix: Whether the parameter has two sides.
        wd_rule: See :func:`width_groups`.
        step: See :func:`width_groups`.
    """
    both = is_matrix and (w_out is None or (w_in != 1.0 and w_out != 1.0))
    if both:
        lr = w_in ** {"adam": -1.0, "rms": -0.5, "spectral": 0.0}[step]
        root = 1.0 if step == "spectral" else w_in**0.5
        return lr, {"sqrt": root, "mup": 1 / lr, "none": 1.0}[wd_rule]
    return (1 / w_in if is_matrix else 1.0), 0.0 if wd_rule == "sqrt" else 1.0


def _sides(row: Row, shape: Sequence[int]) -> tuple[int, int]:
    """Fan-out and fan-in of a matrix of this place and shape."""
    if row.view.startswith("flatten") or row.role == "conv":
        return shape[0], math.prod(shape[1:])
    m, n = shape[-2:]
    if row.role == "embedding" or row.view.startswith("transposed"):
        return n, m
    return m, n


def _growth_by_shapes(
    rows: Sequence[Row], base: nn.Module | Mapping[str, Sequence[int]]
) -> list[tuple[float, float | None]]:
    """Growth of fan-in and fan-out of every parameter against the small model's."""
    check(
        isinstance(base, (nn.Module, Mapping)),
        f"base_shapes must be the small model, or map names to shapes, got {shown(base)}",
    )
    if isinstance(base, nn.Module):
        base = {name: tuple(p.shape) for name, p in base.named_parameters()}
    names = {row.name for row in rows}
    for name in sorted(names ^ base.keys(), key=str):
        where = "the model" if name in base else "base_shapes"
        raise ValueError(f"{where} has no parameter {name!r}; base_shapes must name the same ones")
    growth: list[tuple[float, float | None]] = []
    for row in rows:
        shape, small = row.shape, base[row.name or ""]
        check(
            isinstance(small, Sequence) and all(isinstance(s, int) for s in small),
            f"base_shapes must map names to shapes, got {shown(small)} for {row.name!r}",
        )
        small = tuple(small)
        check(
            len(shape) == len(small) and all(s > 0 for s in small),
            f"base_shapes has shape {small} for parameter {row.name!r} of shape {shape}; give it "
            "as many positive sizes",
        )
        if not _is_matrix(row):
            growth.append((1.0, 1.0))
            continue
        sides = zip(_sides(row, shape), _sides(row, small), strict=True)
        w_out, w_in = (a / b for a, b in sides)
        same = w_in == w_out == 1.0 and row.role in MATRICES
        growth.append((w_in, None if same else w_out))
    return growth


def _growth_by_role(row: Row, rows: Sequence[Row], w: float) -> tuple[float, float | None]:
    """Growth of fan-in and fan-out where only the ratio of the widths is known."""
    if not _is_matrix(row):
        return 1.0, 1.0
    if row.role == "embedding":
        return 1.0, w
    matrices = [r for r in rows if _is_matrix(r)]
    others = [r for r in matrices if r is not row]
    if row.role in OUTPUTS:
        return w, 1.0
    m, n = _sides(row, row.shape)
    is_first = row is matrices[0] or row.part == "patch"
    if is_first and others and all(_sides(r, r.shape)[0] != n for r in others):
        return 1.0, w  # its fan-in is the size of the data
    is_last = row is matrices[-1] and row.part == ""
    if is_last and others and all(_sides(r, r.shape)[1] != m for r in others):
        return w, 1.0
    return w, None


def _width_of(rows: Sequence[Row], width: int | None) -> int:
    """The width of the model."""
    if width is not None:
        return _count("width", width, "[1, inf)")
    matrices = [row for row in rows if _is_matrix(row)]
    tables = [_sides(row, row.shape)[0] for row in matrices if row.role == "embedding"]
    if tables:
        return tables[0]
    written = {_sides(row, row.shape)[0] for row in matrices}
    read = Counter(_sides(row, row.shape)[1] for row in matrices)
    found = [(count, size) for size, count in read.items() if size in written]
    check(bool(found), "the width of this model is not known; pass width, or base_shapes")
    return max(found)[1]


def _refuse_lazy(rows: Sequence[Row]) -> None:
    for row in rows:
        check(
            not row.is_lazy, f"parameter {row.name!r} has no shape yet; run the model once before"
        )


def _line(key: tuple[float, float], rows: Sequence[Row]) -> str:
    """One line of the table that is printed."""
    roles = ", ".join(f"{count} {role}" for role, count in Counter(r.role for r in rows).items())
    return f"lr x {key[0]:<8.4g} weight_decay x {key[1]:<8.4g} {roles} ({rows[0].name}, ...)"


class PowerLR(LRScheduler):
    """The Power schedule: the learning rate falls as a power of the tokens seen so far.

    After n tokens, counting those of the step to come, the factor of every group's own rate is ::

        curve(n)  = min(lr_max, batch_size * a * n^b) / lr_max
        warm-up   : linear up to the curve, over the first ``warmup`` steps
        decay     : linear from the curve to 0, over the last ``decay`` steps of ``total``

    So a group with the rate ``lr_max`` follows min(lr_max, batch_size * a * n^b) itself, and the
    proportions of groups, such as those of :func:`width_groups`, stay. At twice the batch and half
    the steps the sum of the rates over a run is the same.

    Sources: *Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler*,
    arXiv 2408.13359; the constants are as others quote them.

    Args:
        optimizer: The optimizer.
        tokens_per_step: Tokens of a step: sequences times their length.
        batch_size: Sequences of a step.
        a: Factor of the power (default: 4.0).
        b: Exponent, at most 0 (default: -0.51).
        lr_max: Upper bound of the curve, the rate for which groups are set (default: 0.02).
        warmup: Steps of warm-up (default: 0).
        decay: Steps of decay (default: 0).
        total: Steps of the run (default: None, its end is not known: there is no decay).
        last_epoch: Step to resume from, as in torch (default: -1).

    Raises:
        ValueError: For a value out of range, or a total shorter than warm-up and decay together.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import Muon, PowerLR
        >>> optimizer = Muon(torch.nn.Linear(4, 4), lr=0.02)
        >>> schedule = PowerLR(optimizer, 4096, 8, warmup=100)
        >>> optimizer.step()
        >>> schedule.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tokens_per_step: float,
        batch_size: float,
        a: float = 4.0,
        b: float = -0.51,
        lr_max: float = 0.02,
        warmup: int = 0,
        decay: int = 0,
        total: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.tokens_per_step = _number("tokens_per_step", tokens_per_step, "(0, inf)")
        self.batch_size = _number("batch_size", batch_size, "(0, inf)")
        self.a, self.b = _number("a", a, "(0, inf)"), _number("b", b, "(-inf, 0]")
        self.lr_max = _number("lr_max", lr_max, "(0, inf)")
        self.warmup = _count("warmup", warmup, "[0, inf)")
        self.decay = _count("decay", decay, "[0, inf)")
        self.total = None if total is None else _count("total", total, "[1, inf)")
        check(
            self.total is None or self.warmup + self.decay <= self.total,
            f"total must be at least warmup + decay = {self.warmup + self.decay}, got {total}",
        )
        last_epoch = _count("last_epoch", last_epoch, "[-1, inf)")
        super().__init__(optimizer, last_epoch)

    def curve(self, step: float) -> float:
        """The factor of step ``step``, from 0, without warm-up and decay."""
        n = (step + 1) * self.tokens_per_step
        power: float = self.batch_size * self.a * n**self.b
        return min(self.lr_max, power) / self.lr_max

    def factor(self, step: float) -> float:
        """The factor of step ``step``, from 0."""
        if step < self.warmup:
            return self.curve(self.warmup) * (step + 1) / (self.warmup + 1)
        if self.total is not None and self.decay and step > self.total - self.decay:
            start = self.total - self.decay
            return self.curve(start) * max(0.0, self.total - step) / self.decay
        return self.curve(step)

    @override
    def get_lr(self) -> list[float | Tensor]:
        """Rates of all groups, from their own rates and the step alone."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]
