"""The table that ``assignment()`` of an optimizer returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import override

from .classify import Assignment, Row


@dataclass(frozen=True)
class AssignedRow(Row):
    """A row with what its group says.

    Attributes:
        layout: Pair and axis of the rule, and the name of a function that it was given; "" for the
            usual ones.
        lr: Learning rate of the parameter.
        decay: Weight decay of the parameter.
        write: How the parameter is rounded, ``"nearest"`` or another mode.
        norm: Words that steer its norm, ``weight_norm``, where they act; else "".
        plan: How the parameter is stepped over ranks, ``"local"`` if nothing is sent for it.
        bytes_per_step: Bytes that this rank sends for it in a step without a refresh.
        state: ``"float32"`` where ``state_dtype="int8"`` keeps floats, as ranks cut the blocks of
            256 numbers that have one scale; else "".
    """

    layout: str = ""
    lr: float = 0.0
    decay: float = 0.0
    write: str = "nearest"
    norm: str = ""
    plan: str = "local"
    bytes_per_step: int = 0
    state: str = ""

    @override
    def _cells(self) -> dict[str, str]:
        return {
            **super()._cells(),
            "layout": self.layout,
            "lr": f"{self.lr:g}",
            "decay": f"{self.decay:g}",
            "write": "" if self.write == "nearest" else self.write,
            "norm": self.norm,
            "plan": "" if self.plan == "local" else self.plan,
            "bytes": str(self.bytes_per_step or ""),
            "state": self.state,
        }


@dataclass(frozen=True)
class OptimizerAssignment(Assignment):
    """Rule, learning rate and decay of every parameter of an optimizer, and why; it prints.

    Attributes:
        kept_keys: Group keys that belong to other code and are kept.
    """

    kept_keys: tuple[str, ...] = ()

    _columns = (
        "name",
        "shape",
        "role",
        "rule",
        "view",
        "layout",
        "centred",
        "lr",
        "decay",
        "write",
        "norm",
        "plan",
        "bytes",
        "state",
        "why",
    )
    _optional = ("view", "layout", "centred", "write", "norm", "plan", "bytes", "state")

    @override
    def __str__(self) -> str:
        table = self._table(self._columns, *self._optional)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join([*lines, self._counts(), *self._kept()])

    @override
    def to_markdown(self) -> str:
        head, *table = self._table(self._columns, *self._optional)
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in table:
            cells = (cell.replace("|", "\\|") for cell in row)
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", self._counts(), *self._kept(), ""])

    def _kept(self) -> list[str]:
        return [f"kept group keys: {', '.join(self.kept_keys)}"] if self.kept_keys else []

    @override
    def to_dict(self) -> dict[str, Any]:
        rows = [
            {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(row).items()}
            for row in self.rows
        ]
        return {"rows": rows, "kept_keys": list(self.kept_keys)}

    @classmethod
    @override
    def from_dict(cls, data: Mapping[str, Any]) -> OptimizerAssignment:
        rows: list[dict[str, Any]] = [
            {key: tuple(x) if isinstance(x, list) else x for key, x in row.items()}
            for row in data["rows"]
        ]
        kept_keys = tuple(data.get("kept_keys", ()))
        return cls(tuple(AssignedRow(**row) for row in rows), kept_keys)
