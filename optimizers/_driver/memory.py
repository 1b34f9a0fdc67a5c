"""``memory_report``: the bytes of a method's state, counted before any are allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from .._core.validation import choice, whole_number
from . import adamw
from .buckets import StepPlan
from .layout import box_of, layout_of
from .norms import DRIVER_SLOTS
from .optimizer import StackedOptimizer
from .placement import dim_to_shard
from .units import Unit, base_of

__all__ = ["MemoryReport", "MemoryRow", "memory_report"]


class MemoryRow(NamedTuple):
    """One parameter; all sizes in bytes.

    Attributes:
        name: Name of the parameter, "parameter" and its position if it has none.
        shape: Shape of the parameter.
        rule: Name of the rule, or "adamw".
        weight: Size of the parameter; of a sharded one as of all that follows, what the fullest
            rank holds.
        gradient: Size of the gradient, 0 if the parameter is frozen.
        state: Size of the optimizer's state.
        adamw: Size of the state of ``torch.optim.AdamW``.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    weight: int
    gradient: int
    state: int
    adamw: int


@dataclass(frozen=True)
class MemoryReport:
    """The result of :func:`memory_report`, which prints as a table.

    Attributes:
        method: Name of the optimizer.
        rows: One per parameter.
        shared: Bytes that all weights of a device share and no checkpoint holds, such as a basis
            of cosines.
        ranks: Ranks that share a weight, at most; sizes are those of the fullest of them.
    """

    method: str
    rows: tuple[MemoryRow, ...]
    shared: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, optimizer: StackedOptimizer) -> MemoryReport:
        """Count the state that an optimizer has after a step, without changing the optimizer."""
        plan = optimizer._get_plan()
        held = [_on_fullest_rank(p) for p in plan.flat_params]
        state = _state_bytes(plan, optimizer)
        rows = [
            MemoryRow(
                row.name or f"parameter {i}",
                tuple(p.shape),
                row.rule,
                _bytes(X),
                _bytes(X) if p.requires_grad else 0,
                state.get(i, 0) if p.requires_grad else 0,
                _adamw_bytes(X, {"write": "nearest"}) if p.requires_grad else 0,
            )
            for i, (p, X, row) in enumerate(
                zip(plan.flat_params, held, optimizer.assignment().rows, strict=True)
            )
        ]
        shared: dict[Hashable, int] = {}
        for unit in plan.units:
            rule = plan.rule(unit)
            for i in range(len(unit.params)):
                shared.update(rule.shared(*unit.sides(i)))
        ranks = max((_ranks_of(p) for p in plan.flat_params), default=1)
        return cls(type(optimizer).__name__, tuple(rows), sum(shared.values()), ranks)

    @cached_property
    def weight(self) -> int:
        """Bytes of all weights."""
        return sum(row.weight for row in self.rows)

    @cached_property
    def gradient(self) -> int:
        """Bytes of all gradients."""
        return sum(row.gradient for row in self.rows)

    @cached_property
    def state(self) -> int:
        """Bytes of all state, with what weights share."""
        return sum(row.state for row in self.rows) + self.shared

    @cached_property
    def adamw(self) -> int:
        """Bytes of AdamW's state for the same parameters."""
        return sum(row.adamw for row in self.rows)

    def layers(self) -> list[tuple[str, int, MemoryRow]]:
        """Sums over parameters whose names differ in numbers only: (name, count, sum).

        Layers with different state, as FRUGAL's blocks, stay apart.
        """
        same_layers: dict[Hashable, list[MemoryRow]] = {}
        for row in self.rows:
            name = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
            same_layers.setdefault((name, row.shape, row.rule, row.state), []).append(row)
        merged = []
        for (name, *_), rows in same_layers.items():  # type: ignore[misc]
            first = rows[0] if len(rows) == 1 else rows[0]._replace(name=name)
            summed = {key: sum(getattr(row, key) for row in rows) for key in MemoryRow._fields[3:]}
            merged.append((first.name, len(rows), first._replace(**summed)))
        return merged

    def __str__(self) -> str:
        """A table with a line per kind of layer, then the totals."""
        head = ["parameter", "shape", "rule", "weights", "gradients", self.method, "AdamW"]
        lines = [head]
        for name, count, row in self.layers():
            shape = "x".join(map(str, row.shape)) + (f" ({count})" if count > 1 else "")
            sizes = (row.weight, row.gradient, row.state, row.adamw)
            lines.append([name, shape, row.rule, *map(_size, sizes)])
        if self.shared:
            lines.append(["shared on each device", "", "", "", "", _size(self.shared), ""])
        sizes = (self.weight, self.gradient, self.state, self.adamw)
        place = f" on the fullest of {self.ranks} ranks" if self.ranks > 1 else ""
        lines.append([f"total{place}", "", "", *map(_size, sizes)])
        totals = [sum(sizes[:3]), self.weight + self.gradient + self.adamw]
        lines.append(["weights + gradients + state", "", "", "", "", *map(_size, totals)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                text.ljust(width) if i < 3 else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def _size(count: int) -> str:
    """Bytes in powers of 1024, as text."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def memory_report(
    params: Any,
    optimizer_class: type[StackedOptimizer],
    *,
    world: int = 1,
    shard: str = "rows",
    **options: Any,
) -> MemoryReport:
    """Count the bytes of a method's state for a model, from shapes alone.

    Nothing is allocated, so a model on the meta device will do:
    ``with torch.device("meta"): model = ...``.

    Args:
        params: A module, or whatever else the optimizer takes as ``params``.
        optimizer_class: A class of this package.
        world: Ranks over which ``fully_shard`` cuts every parameter (default: 1). Sizes are those
            of the fullest rank; no process is needed.
        shard: ``"rows"`` (default): along the first dimension, as ``fully_shard`` does by itself.
            ``"longest"``: as :func:`longest_dim_placement` says.
        **options: Its keywords.

    Returns:
        Bytes of weights, gradients (in the dtype of the weights) and state per parameter and in
        all, beside AdamW's. Frozen weights count as weights, without gradient and state.
        State that comes and goes (FRUGAL's blocks) is that of the first window. Temporary memory
        is not in it; see each class. DTensors count as they lie, on the fullest rank, unless
        ``world`` says otherwise.

    Raises:
        TypeError: If ``optimizer_class`` is none of this package.
        ValueError: If ``world`` is no positive int, or ``shard`` another word.
        NotImplementedError: With ``world`` above 1 for a class that trains no sharded weights.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import GaLore, memory_report
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.Linear(4096, 10))
        >>> report = memory_report(model, GaLore, rank=0.25)
        >>> report.state / report.adamw < 0.3
        True
        >>> share = memory_report(model, GaLore, rank=0.25, world=8, shard="longest")
        >>> share.weight / report.weight < 0.126
        True
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, StackedOptimizer)):
        raise TypeError(
            f"optimizer_class must be an optimizer of this package, got {optimizer_class!r}; "
            "AdamW's state stands beside every report"
        )
    ranks = whole_number("world", world, "[1, inf)") or 1
    choice("shard", shard, ("rows", "longest"))
    optimizer = optimizer_class(params, **options)
    if ranks > 1:
        _cut_parameters(optimizer, ranks, shard)
    return MemoryReport.of(optimizer)


def _bytes(p: Tensor) -> int:
    return p.numel() * p.element_size()


@dataclass(frozen=True)
class _Ranks:
    """The mesh of so many ranks, of which this process plays the first, without a process group."""

    count: int

    ndim = 1
    device_type = "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count,)

    @property
    def mesh(self) -> Tensor:
        return torch.arange(self.count, dtype=torch.int64, device="cpu")

    def get_coordinate(self) -> list[int]:
        return [0]


class _CutParameter(Tensor):
    """The shape of a parameter, with what is asked of a DTensor on its first rank."""

    device_mesh: _Ranks
    placements: tuple[Any, ...]
    _local_tensor: Tensor

    @staticmethod
    def of(p: Tensor, ranks: _Ranks, dim: int) -> _CutParameter:
        """A parameter that is cut along a dimension."""
        from torch.distributed.tensor import Shard

        whole = torch.empty(p.shape, dtype=p.dtype, device="meta")
        cut = whole.as_subclass(_CutParameter).requires_grad_(p.requires_grad)
        assert isinstance(cut, _CutParameter)
        cut.device_mesh, cut.placements = ranks, (Shard(dim),)
        cut._local_tensor = cut.to_local()
        return cut

    @override
    def detach(self) -> Tensor:  # which would forget the mesh
        return self

    def to_local(self) -> Tensor:
        """What the first rank holds, which is the fullest."""
        return _first_part(tuple(self.shape), self.device_mesh, self.placements, self.dtype)


def _cut_parameters(optimizer: StackedOptimizer, world: int, shard: str) -> None:
    """Put parameters that are cut over ranks in the place of those in an optimizer's groups."""
    ranks, known = _Ranks(world), dict[Tensor, Tensor]()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.ndim and not is_lazy(p):
                dim = dim_to_shard(tuple(p.shape), world) if shard == "longest" else 0
                known[p] = _CutParameter.of(p, ranks, dim)
        group["params"] = [known.get(p, p) for p in group["params"]]


def _first_part(
    shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], dtype: torch.dtype
) -> Tensor:
    """What the first rank of a mesh holds of a tensor, on the meta device."""
    box = box_of(shape, mesh.shape, placements, [0] * mesh.ndim)
    return torch.empty([b - a for a, b in box], dtype=dtype, device="meta")


def _on_fullest_rank(p: Tensor) -> Tensor:
    """What the fullest rank holds of a parameter; the first holds the most of every dimension."""
    layout = layout_of(p, "a parameter")
    if layout is None:
        return p
    return _first_part(layout.shape, layout.mesh, layout.placements, p.dtype)


def _ranks_of(p: Tensor) -> int:
    """Ranks among which a parameter is divided."""
    layout = layout_of(p, "a parameter")
    return math.prod(layout.mesh.shape[axis] for axis in layout.axes) if layout is not None else 1


def _adamw_bytes(p: Tensor, group: dict[str, Any]) -> int:
    """Bytes of AdamW's state in a group, which is allocated on the meta device for this."""
    entry: dict[str, Any] = {}
    adamw.allocate(p.detach().to("meta"), {**group, "fused": None, "capturable": False}, entry)
    return sum(_bytes(value) for value in entry.values())


def _state_bytes(plan: StepPlan, optimizer: StackedOptimizer) -> dict[int, int]:
    """Bytes of state by flat position of the parameter."""
    sizes: dict[tuple[int, str], int] = {}
    for unit in plan.units:
        for i, position in enumerate(unit.positions):
            for key, size in _slot_bytes(plan, unit, i).items():
                # the units of one parameter share state that is shaped like the parameter
                sizes[position, key] = size
    for group, positions in zip(optimizer.param_groups, plan.adamw_positions, strict=True):
        for position in positions:
            X = _on_fullest_rank(plan.flat_params[position])
            sizes[position, "adamw"] = _adamw_bytes(X, group)
    total: dict[int, int] = {}
    for (position, _), size in sizes.items():
        total[position] = total.get(position, 0) + size
    return total


def _slot_bytes(plan: StepPlan, unit: Unit, i: int) -> dict[str, int]:
    has_state = plan.rule(unit).state_since_at(unit.block_position, 1)
    sizes = {}
    for key, (_, shape, dtype) in unit.expected_state(i).items():
        if has_state or base_of(key) in DRIVER_SLOTS:
            layout = unit.state_layout(i, key)
            count = torch.Size(shape).numel() if layout is None else layout.largest
            sizes[key] = count * dtype.itemsize
    return sizes
