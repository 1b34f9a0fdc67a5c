"""How step time grows: with the number of matrices of 64x64, and with the side of one matrix.

    python bench/growth.py                  both axes, one thread: growth.png and results.json
    python bench/growth.py --threads 2
    python bench/growth.py --quick          tiny sizes: does it run

The six classes are those between which "How to choose" in the README leaves a choice: `Muon` for
the loss, `AuON` where its step is too dear, `FRUGAL`, `Fira` and `GaLore` where state must be
small, and `SOAP` where steps are few; beside them `torch.optim.AdamW(fused=True)`. All have the
defaults that they come with, but weight decay 0.1 and rank 0.25.

A figure is the mean step: the median of steps between refreshes, and refreshes, timed by
themselves, at the gap that the class comes with. Every step has fresh gradients; all classes step
in turn in one process. On one thread the clock is the processor's, on several the wall's. The
exponent p of time ~ x^p is fitted where the step takes 8 times its least time, so that the
overhead of a step is an eighth of it or less. A point whose dearest step (a first one, which
finds bases, counts) or memory would be above a limit, by what the point before it took, is left
out, and printed as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import GAPS, Entrant, baselines, entrants
from contests import Contest, Maker, Model, Step, pool_of, state_bytes
from run import CPU, WALL, Limits, environment, timed
from tables import markdown

CLASSES = ("Muon", "AuON", "FRUGAL", "Fira", "GaLore svd", "SOAP")
"""Entrants of the case ``optimizers``."""
CLEAR = 8
"""A step is free of overhead from this many times the least time of its class on."""
SECONDS, GIB = 30.0, 4.0
"""Limits of one step, and of weights, gradients and state together."""


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        points: Its values.
        tiny: Those of a quick run.
        model: The weights at a value.
        power: A step grows at most like this power of the value.
        entries: Weights grow like this power.
    """

    title: str
    points: tuple[int, ...]
    tiny: tuple[int, ...]
    model: Callable[[int], Model]
    power: int
    entries: int


AXES = {
    "number": Axis(
        "number of 64x64 matrices",
        (10, 32, 100, 316, 1000, 3162, 10_000),
        (2, 4, 8),
        lambda count: ((64, 64),) * count,
        1,
        1,
    ),
    "size": Axis(
        "side of one square matrix",
        tuple(2**k for k in range(6, 14)),
        (8, 16, 32),
        lambda side: ((side, side),),
        3,
        2,
    ),
}


class Paced(Step):
    """A step that keeps its bases, or finds new ones at every step."""

    def __init__(self, make: Maker, model: Model, clock: int) -> None:
        now = (time.perf_counter, time.process_time)[clock]  # WALL, CPU
        begin = now()
        super().__init__(make, model, warm=1)
        self.first = now() - begin
        tensors = 2 * sum(p.nbytes for p in self.params)
        self.bytes = tensors + state_bytes(self.optimizer)

    def refresh_every(self, gap: int) -> None:
        """From the next step on."""
        for group in self.optimizer.param_groups:
            for key in group:
                if key.rpartition("_")[2] in GAPS:
                    group[key] = gap


@dataclass
class Curve:
    """What is known of one class along an axis; times in seconds.

    Attributes:
        gap: Steps between refreshes, 0 where there are none.
        left_out: Points that were not run, and why.
        dearest: Longest step at the last point, the first one counted.
        bytes: Weights, gradients and state there.
    """

    make: Maker
    gap: int = 0
    xs: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    refreshes: list[float] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    dearest: float = 0.0
    bytes: float = 0.0

    @property
    def means(self) -> list[float]:
        """Mean steps."""
        if not self.gap:
            return self.steps
        pairs = zip(self.steps, self.refreshes, strict=True)
        return [step + (refresh - step) / self.gap for step, refresh in pairs]

    def is_within(self, x: int, axis: Axis, seconds: float) -> bool:
        """Whether the class runs at x; why it does not is kept."""
        ratio = x / self.xs[-1] if self.xs else 0.0
        needed = self.dearest * ratio**axis.power
        gib = self.bytes * ratio**axis.entries / 2**30
        if needed > seconds:
            self.left_out[x] = f"a step would take about {needed:.0f} s, more than {seconds:g} s"
        elif gib > GIB:
            self.left_out[x] = f"it would take about {gib:.1f} GiB, more than {GIB:g}"
        return x not in self.left_out

    def add(self, x: int, step: Paced, kept: list[float], new: list[float] | None) -> None:
        """What was measured at a point."""
        self.xs.append(x)
        self.steps.append(statistics.median(kept))
        if new:
            self.refreshes.append(statistics.median(new))
        self.dearest, self.bytes = max([step.first, *kept, *(new or [])]), step.bytes


def curves() -> dict[str, Curve]:
    """AdamW and the classes, at rank 0.25."""
    found: dict[str, Entrant] = entrants(0.25)  # type: ignore[arg-type]
    made = {"AdamW fused": Curve(baselines()["AdamW fused"][0])}
    for name in CLASSES:
        entrant = found[name]
        gap = 0 if entrant.refresh is None else entrant.gap
        made[name.split()[0]] = Curve(entrant.step, gap)
    return made


def measure(axis: Axis, args: argparse.Namespace) -> dict[str, Curve]:
    """Every class at every point of an axis."""
    found, clock = curves(), CPU if args.threads == 1 else WALL
    count = args.repeats or (3 if args.quick else 0)
    plain = Limits(count, count, 0.0) if count else Limits(3, 15, 3.0)
    again = Limits(1, count or 3, 1.0)
    for x in axis.tiny if args.quick else axis.points:
        model = axis.model(x)
        pool_of(model)  # so that no class is charged with making it
        steps = {
            name: Paced(curve.make, model, clock)
            for name, curve in found.items()
            if curve.is_within(x, axis, args.seconds)
        }
        kept = rounds(steps, plain, clock)
        steps_with_bases = {name: step for name, step in steps.items() if found[name].gap}
        for step in steps_with_bases.values():
            step.refresh_every(1)
        new = rounds(steps_with_bases, again, clock)
        for name, step in steps.items():
            found[name].add(x, step, kept[name], new.get(name))
        print(f"  {axis.title}: {x} done", flush=True)
        pool_of.cache_clear()
    return found


def rounds(steps: Mapping[str, Paced], limits: Limits, clock: int) -> dict[str, list[float]]:
    """Times of steps that are there already, in turn."""
    if not steps:
        return {}
    contest = Contest({name: partial(lambda step: step, step) for name, step in steps.items()})
    for name in steps:  # rounds go on until these are known
        contest.ratio(name, name, next(iter(steps)))
    return {name: [t[clock] for t in times] for name, times in timed(contest, limits, 0).items()}


def exponent(xs: Sequence[int], times: Sequence[float]) -> tuple[float | None, list[int]]:
    """The slope of log time over log x, and the points that it was fitted to.

    Those from the first one on that takes CLEAR times the least time; None for fewer than three.
    """
    clear = (i for i, t in enumerate(times) if t >= CLEAR * min(times))
    start = next(clear, len(times))
    used = list(xs[start:])
    if len(used) < 3:
        return None, []
    logs = ([math.log(v) for v in values] for values in (used, times[start:]))
    return statistics.linear_regression(*logs).slope, used


# --- What is printed and drawn ---


def record(curve: Curve) -> dict[str, Any]:
    """A curve as it goes into results.json."""
    p, used = exponent(curve.xs, curve.means)
    ms = {"mean": curve.means, "step": curve.steps, "refresh": curve.refreshes}
    return {
        "x": curve.xs,
        **{f"{name}_ms": [1e3 * t for t in times] for name, times in ms.items()},
        "gap": curve.gap,
        "exponent": p,
        "fitted_to": used,
        "left_out": {str(x): why for x, why in curve.left_out.items()},
    }


def power(found: Mapping[str, Any]) -> str:
    """An exponent in words."""
    if found["exponent"] is None:
        return f"no exponent: fewer than 3 points at {CLEAR} times the least time"
    return f"{found['exponent']:.2f} ({found['fitted_to'][0]} to {found['fitted_to'][-1]})"


def table(axis: Axis, records: Mapping[str, Any]) -> str:
    """Mean steps, refreshes and exponents as tables, and what is left out in words."""
    xs = sorted({x for found in records.values() for x in found["x"]})
    head = ["ms", *map(str, xs), "exponent (fitted from, to)"]

    def row(name: str, found: Mapping[str, Any], kind: str, last: str) -> list[str]:
        times = dict(zip(found["x"], found[f"{kind}_ms"], strict=True))
        return [name, *(f"{times[x]:.3g}" if x in times else "" for x in xs), last]

    rows = [row(name, found, "mean", power(found)) for name, found in records.items()]
    rows += [
        row(f"{name}: a refresh", found, "refresh", f"every {found['gap']} steps")
        for name, found in records.items()
        if found["gap"]
    ]
    return "\n".join([f"\nMean step by {axis.title}", markdown([head, *rows]), *missing(records)])


def missing(records: Mapping[str, Any]) -> list[str]:
    """A line for each point that was left out."""
    return [
        f"left out: {name} at {x}: {why}"
        for name, found in records.items()
        for x, why in found["left_out"].items()
    ]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Both axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(AXES), figsize=(13, 6.2), layout="constrained")
    for ax, (name, axis) in zip(axes, AXES.items(), strict=True):
        draw_axis(ax, axis, results["axes"][name])
    threads = results["environment"]["threads"]
    clock = "processor time" if threads == 1 else "wall time"
    fig.suptitle(
        f"Mean step, refreshes included: {clock}, float32, threads: {threads}"
        f" ({results['environment']['processor']})",
        fontsize=11,
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_axis(ax: Any, axis: Axis, records: Mapping[str, Any]) -> None:
    """One line for each class; filled marks are those that the exponent was fitted to."""
    for i, (name, found) in enumerate(records.items()):
        color = "black" if i == 0 else f"C{i - 1}"
        p = found["exponent"]
        label = f"{name}: " + ("no exponent" if p is None else f"$x^{{{p:.2f}}}$")
        ax.plot(found["x"], found["mean_ms"], "-", color=color, linewidth=1.6, label=label)
        times = dict(zip(found["x"], found["mean_ms"], strict=True))
        for xs, fill in ((found["fitted_to"], color), (found["x"], "white")):
            dots = [x for x in xs if fill == color or x not in found["fitted_to"]]
            style = {"markersize": 5, "markerfacecolor": fill, "color": color}
            ax.plot(dots, [times[x] for x in dots], "o", **style)
    ax.set(xscale="log", yscale="log", xlabel=axis.title, ylabel="ms")
    xs = sorted({x for found in records.values() for x in found["x"]})
    ax.set_xticks(xs, [str(x) for x in xs], fontsize=8)
    ax.minorticks_off()
    ax.grid(True, color="0.9", linewidth=0.7)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    note = "filled: the points that an exponent was fitted to"
    gone = "; ".join(line.removeprefix("left out: ") for line in missing(records))
    text = textwrap.fill(note + ("; left out: " + gone if gone else ""), 98)
    ax.text(0, -0.12, text, transform=ax.transAxes, fontsize=7.5, va="top")


# --- Command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="this many steps, neither more nor fewer")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one step")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="for results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both axes."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    for curve in curves().values():  # what is imported by a first step is no part of it
        Step(curve.make, ((8, 8),), warm=1)
    results: dict[str, Any] = {"environment": environment(args.threads), "axes": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, axis in AXES.items():
        records = {who: record(curve) for who, curve in measure(axis, args).items()}
        results["axes"][name] = records
        print(table(axis, records), flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results, args.out / "growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
