"""Which side of a weight is the residual stream, for rules whose field ``side`` is "auto"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .._core.rule import Rule
from .._core.views import split_view
from .classify import Row


def sides_of(rows: Sequence[Row], rule: Rule) -> dict[str | None, str | tuple[str, ...]]:
    """The field ``side`` of each matrix's group, by name, where the model tells it.

    Weights that share one rotation have a tuple, with a side for each of them. Runs of weights with
    different tuples go to different groups.
    """
    if len(rule.members) == 1:
        short_sides = {row.name: short_side(row) for row in rows if asks_side(rule)}
        return {name: side for name, side in short_sides.items() if side is not None}
    found: dict[str | None, str | tuple[str, ...]] = {}
    if getattr(rule, "side", None) != "auto":
        return found
    for view in {row.view: None for row in rows}:
        same_view = [row for row in rows if row.view == view]
        size = len(rule.members) or len(same_view)
        for start in range(0, len(same_view), size):
            run = same_view[start : start + size]
            side = _shared_side(run)
            if side is not None and len(run) == size and _accepts_side(rule, side):
                found.update(dict.fromkeys([row.name for row in run], side))
    return found


def _shared_side(run: Sequence[Row]) -> str | tuple[str, ...] | None:
    """The residual side of each weight of a run, one string if all are the same.

    None if no side is known, or if the known ones are not the shortest length that all share. A
    weight of unknown side has the side of that length, the rows if both sides have it.
    """
    views_of_rows = [split_view(row.view, row.shape) for row in run]
    if any(len(views) > 1 for views in views_of_rows):
        return None  # a shared rotation cannot follow weights that are cut
    sizes = [(views[0].m, views[0].n) for views in views_of_rows]
    lengths = {
        m if row.side == "rows" else n for row, (m, n) in zip(run, sizes, strict=True) if row.side
    }
    shared = set(sizes[0]).intersection(*sizes)
    if not shared or lengths != {min(shared)}:
        return None
    sides = tuple(
        row.side or ("rows" if {m} == lengths else "cols")
        for row, (m, _) in zip(run, sizes, strict=True)
    )
    return sides if len(set(sides)) > 1 else sides[0]


def _accepts_side(rule: Rule, side: Any) -> bool:
    """Whether the field ``side`` of a rule can have this value."""
    try:
        replace(rule, **{"side": side})
        return True
    except ValueError:  # sides of another kind
        return False


def asks_side(rule: Rule) -> bool:
    """Whether the rule has a field ``side`` that takes "rows" and "cols" and was left at "auto".

    False for units of several weights: these have a side each, and one row knows only its own.
    """
    if getattr(rule, "side", None) != "auto" or len(rule.members) != 1:
        return False
    return _accepts_side(rule, "rows") and _accepts_side(rule, "cols")


def short_side(row: Row) -> str | None:
    """The residual side of a matrix; None if it is not known, or is the longer one.

    State for a side of length d is d x d: on the longer side it costs more than the weight, and no
    gradient has the rank to determine it.
    """
    views = split_view(row.view, row.shape)
    fits = all((v.m <= v.n) if row.side == "rows" else (v.n <= v.m) for v in views)
    return row.side if fits else None
