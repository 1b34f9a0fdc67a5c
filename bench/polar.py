"""One table of all polar methods: how near they come to the polar factor, and how long they take.

    python bench/polar.py                    512x512 and 512x2048, float32, one thread
    python bench/polar.py --quick            tiny shapes: does it run at all
    python bench/polar.py --out table.md     writes the table as well

Three spectra that fall as gradients' do; a Gaussian would hide failures. Of each: ||O||_2 and the
alignment deficit d_A = 1 - <O, M> / (||O||_2 ||M||_*), see ``stiefel.kernels.polar_report``. The
time is a ratio to ns5: the median over rounds and spectra in which every method runs once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import spectra
from torch import Tensor

from stiefel.kernels import POLAR_METHODS, polar_factor, polar_report

Shape = tuple[int, int]


def seconds(method: str, M: Tensor) -> float:
    """One run."""
    start = time.perf_counter()
    polar_factor(M, method)
    return time.perf_counter() - start


def time_ratios(matrices: Sequence[Tensor], rounds: int) -> dict[str, float]:
    """The time of each method over that of ns5 beside it."""
    names = list(POLAR_METHODS)
    pairs: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for M in matrices:
            order = names[i % len(names) :] + names[: i % len(names)]  # nobody always begins
            times = {name: seconds(name, M) for name in order}
            if i > 0:  # the first round warms up
                for name in names:
                    pairs[name].append(times[name] / times["ns5"])
    return {name: statistics.median(values) for name, values in pairs.items()}


def rows(shape: Shape, rounds: int) -> list[list[str]]:
    """Shape, method, the two measures for each spectrum, time."""
    matrices = [M for _, M in spectra(*shape)]
    ratios = time_ratios(matrices, rounds)
    table = []
    for method in POLAR_METHODS:
        cells = [f"{shape[0]}x{shape[1]}", f"`{method}`"]
        for M in matrices:
            report = polar_report(M, polar_factor(M, method))
            cells += [f"{report.operator_norm:.3f} {max(0.0, report.alignment_deficit):.4f}"]
        table.append([*cells, f"{ratios[method]:.2f}"])
    return table


def markdown(shapes: Sequence[Shape], rounds: int) -> str:
    """The table, one row for each shape and method."""
    head = ["shape", "method"]
    for name, _ in spectra(*shapes[0]):
        head.append(f"{name}: norm, d_A")
    lines = [[*head, "time / ns5"], ["---"] * (len(head) + 1)]
    for shape in shapes:
        lines += rows(shape, rounds)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ).replace("| ---", "|:---")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds for each spectrum")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the table in markdown")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    d = 32 if args.quick else 512
    text = markdown([(d, d), (d, 4 * d)], 1 if args.quick else args.rounds)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
