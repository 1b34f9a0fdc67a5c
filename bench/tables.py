"""Tables in markdown, aligned for those who read them as text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Of lines the first of which is the head; one with fewer cells says something else."""
    count = len(lines[0])
    widths = [max(len(line[i]) for line in lines if len(line) == count) for i in range(count)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)) + " |"
        for line in lines
    )
