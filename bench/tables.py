"""Tables in markdown, aligned for those who read them as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Of lines the first of which is the head; one with fewer cells says something else."""
    count = len(lines[0])
    widths = [max(len(line[i]) for line in lines if len(line) == count) for i in range(count)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)) + " |"
        for line in lines
    )


def with_column(page: str, head: str, cells: Mapping[str, str]) -> str:
    """A page whose tables have other cells below one head, in the rows that begin with `name`.

    Raises:
        ValueError: If no table has such a column, or it has rows that no cell is for.
    """
    column, found, lines = 0, False, page.split("\n")
    for i, line in enumerate(lines):
        parts = line.split(" | ")
        if not line.startswith("|"):
            column = 0
        elif head in parts:
            column, found = parts.index(head), True
        elif column and (row := re.match(r"\| `(\w+)`$", parts[0])):
            if row[1] not in cells:
                raise ValueError(f"no figure for {row[1]}")
            parts[column] = cells[row[1]]
            lines[i] = " | ".join(parts)
    if not found:
        raise ValueError(f"no table with a column {head!r}")
    return "\n".join(lines)


def short(value: float) -> str:
    """Two digits: 0.97, 4.2, 17, 380."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:.2f}" if rounded < 1 else f"{rounded:.1f}" if rounded < 10 else f"{rounded:g}"
