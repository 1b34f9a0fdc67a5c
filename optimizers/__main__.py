"""``python -m stiefel.optimizers``: versions, devices, the back end of kernels, all classes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
import textwrap
from typing import TextIO

import torch

from ..kernels import backend_summary

package = importlib.import_module("stiefel.optimizers")
WIDEST = 100
"""Columns of the table in plain text, at most."""


def versions() -> str:
    """Versions of the package and of what it runs on."""
    return (
        f"stiefel {package.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def devices() -> list[str]:
    """Where tensors can live: the CPU, then every GPU."""
    names = [f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"]
    for index in range(torch.cuda.device_count()):
        free, size = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"cuda:{index}, {name}, {free / 2**30:.1f} of {size / 2**30:.1f} GiB free")
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def classes() -> list[tuple[str, str]]:
    """(name, one line) of every optimizer."""
    found = []
    for name in sorted(package.__all__, key=str.lower):
        cls = getattr(package, name)
        is_optimizer = isinstance(cls, type) and issubclass(cls, package.StackedOptimizer)
        if is_optimizer and cls is not package.StackedOptimizer:
            line = (cls.__doc__ or "").splitlines()[0]
            found.append((name, line.removeprefix(f"{name}: ").rstrip(".")))
    return found


def plain_table(rows: list[tuple[str, str]], width: int) -> str:
    """The rows as text, the second column broken to fit."""
    first = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        head, *more = textwrap.wrap(text, max(width - first, 20))
        lines += [name.ljust(first) + head, *(" " * first + line for line in more)]
    return "\n".join(lines)


def main(out: TextIO | None = None) -> None:
    """Print it all, in colour where rich is installed and the output is a terminal.

    Args:
        out: Where to print; None (default): standard output.
    """
    out = sys.stdout if out is None else out
    facts = [("kernels", backend_summary()), *(("device", name) for name in devices())]
    more = "print(optimizer.assignment()) says which parameter of your model gets which rule"
    if importlib.util.find_spec("rich") is None:
        width = min(shutil.get_terminal_size().columns, WIDEST)
        parts = [versions(), plain_table(facts, width), plain_table(classes(), width), more]
        print("\n\n".join(parts), file=out)
        return
    console = importlib.import_module("rich.console").Console(file=out, highlight=False)
    console.print(versions(), style="bold")
    for rows in (facts, classes()):
        table = importlib.import_module("rich.table").Table(show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table, "")
    console.print(more)


if __name__ == "__main__":
    main()
