"""Bytes that one rank sends in a step, for the matrices of LLaMA models, from shapes alone.

    python bench/sharding.py                            the table: 7B and 70B on 8, 64, 512 ranks
    python bench/sharding.py --plot docs/sharding.png   and bytes against ranks

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
STYLES = {
    "Muon": ("tab:blue", "o"),
    "Trion": ("tab:green", "^"),
    "ARO": ("tab:red", "s"),
    "GaLore": ("tab:orange", "D"),
    "FRUGAL": ("tab:purple", "v"),
    "RowNorm": ("tab:gray", "P"),
}
"""Colour and marker; the last three, in their own rows of the band for zero, send nothing."""
COUNTS = (8, 16, 32, 64, 128, 256, 512)


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


def plot(path: str, models: Sequence[str], counts: Sequence[int] = COUNTS) -> None:
    """Bytes against ranks on logarithmic axes; what sends nothing lies in a band for zero."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        2,
        len(models),
        figsize=(4.6 * len(models), 4.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(6, 1),
    )
    for i, model in enumerate(models):
        upper, lower = grid[:, i]
        for j, (name, (color, marker)) in enumerate(STYLES.items()):
            sizes = [bytes_per_step(model, name, count) / 1e9 for count in counts]
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.4}
            sent = [(count, size) for count, size in zip(counts, sizes, strict=True) if size]
            upper.plot(*zip(*sent, strict=True) if sent else ([], []), label=name, **style)
            silent = [count for count, size in zip(counts, sizes, strict=True) if not size]
            lower.plot(silent, [2 - j % 3] * len(silent), **style)
        upper.set_title(f"LLaMA {model}")
        upper.set_xscale("log", base=2)
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter("{x:g}")
        upper.grid(color="0.9")
        lower.set_ylim(-0.7, 2.7)
        lower.set_yticks([1], ["0"])
        lower.grid(color="0.9", axis="x")
        lower.set_xticks(counts, [str(count) for count in counts])
        lower.minorticks_off()
        lower.set_xlabel("ranks that share the weights")
    grid[0, 0].set_ylabel("sent per rank and step (GB)")
    grid[0, -1].legend(frameon=False, ncols=2, fontsize=9)
    figure.tight_layout(h_pad=0.4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table; draw the plot if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="7B,70B", help="comma separated")
    parser.add_argument("--ranks", default="8,64,512", help="comma separated")
    parser.add_argument("--plot", default=None, help="path of a PNG")
    args = parser.parse_args()
    print(table(args.models.split(","), [int(count) for count in args.ranks.split(",")]))
    if args.plot:
        plot(args.plot, args.models.split(","))


if __name__ == "__main__":
    main()
