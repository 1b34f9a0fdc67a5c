"""Bytes that one rank sends in a step, for the matrices of LLaMA models, from shapes alone.

    python bench/sharding.py                       the table: 7B and 70B on 8, 64 and 512 ranks
    python bench/sharding.py --plot sharding.png   and bytes against ranks, for 7B

Weights are bfloat16 stand-ins on the meta device, cut over ranks that do not exist; the numbers are
those of ``assignment()`` on the first of them. Nothing is sent, and nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from tables import markdown
from torch import nn

from stiefel import optimizers
from stiefel.optimizers._driver.memory import _cut_parameters

MODELS = {"7B": (4096, 4096, 11008, 32), "70B": (8192, 1024, 28672, 80)}
"""Hidden size, rows of keys and values, inner size of the MLP, layers."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Muon": ("rows", {}),
    "Trion": ("longest", {"rank": 0.25}),
    "GaLore": ("longest", {"rank": 0.25}),
    "FRUGAL": ("rows", {}),
    "RowNorm": ("rows", {}),
    "ARO": ("rows", {}),
}
"""How weights are cut, and the keywords."""


def matrices(model: str) -> list[nn.Parameter]:
    """The matrices of all layers, on the meta device."""
    hidden, kv, inner, layers = MODELS[model]
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return [
        nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        for _ in range(layers)
        for shape in shapes
    ]


def bytes_per_step(model: str, name: str, ranks: int) -> int:
    """Bytes that the first rank sends in an ordinary step."""
    shard, options = METHODS[name]
    optimizer = getattr(optimizers, name)(matrices(model), **options)
    _cut_parameters(optimizer, ranks, shard)
    return sum(row.bytes_per_step for row in optimizer.assignment())


def table(models: Sequence[str], counts: Sequence[int]) -> str:
    """Gigabytes per step, a line per method."""
    lines = [["method", *(f"{model}, {count} ranks" for model in models for count in counts)]]
    for name in METHODS:
        sizes = [bytes_per_step(model, name, count) for model in models for count in counts]
        lines.append([name, *(f"{size / 1e9:.3f}" for size in sizes)])
    return markdown(lines)


def plot(path: str, model: str = "7B", counts: Sequence[int] = (2, 4, 8, 16, 32, 64, 128)) -> None:
    """Bytes against ranks, on logarithmic axes; methods that send nothing lie on the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    markers = dict(zip(METHODS, "os^vDP", strict=True))
    for name, marker in markers.items():
        sizes = [max(bytes_per_step(model, name, count) / 1e9, 1e-3) for count in counts]
        axes.plot(counts, sizes, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("ranks that share the weights")
    axes.set_ylabel("GB sent per rank and step (0.001: nothing)")
    axes.set_title(f"LLaMA {model}, matrices in bfloat16")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table; draw the plot if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="7B,70B", help="comma separated")
    parser.add_argument("--ranks", default="8,64,512", help="comma separated")
    parser.add_argument("--plot", default=None, help="path of a PNG")
    args = parser.parse_args()
    print(table(args.models.split(","), [int(count) for count in args.ranks.split(",")]))
    if args.plot:
        plot(args.plot)


if __name__ == "__main__":
    main()
