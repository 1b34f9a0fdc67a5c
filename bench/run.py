"""Runs the table of cases: competitors interleaved in one process, medians of paired ratios.

    python bench/run.py                              all cases, one thread
    python bench/run.py --threads 1,2                one run after the other, each in its process
    python bench/run.py --only optimizers,overhead   some of them
    python bench/run.py --shapes 768x3072,96x96x16+256x96x8
    python bench/run.py --only amortised --readme    write the column of the README's table
    python bench/run.py --quick                      tiny shapes, no target judged: does it run

A shape is mxn, or mxnxk for k weights; + joins shapes into one model, a comma begins another one.
Targets were set for the cases' own shapes and are not judged on others.
Prints tables and writes results.json, and bench.png where matplotlib is installed; of several
thread counts each has a folder threads-N.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import CASES, MEAN
from contests import Case, Contest, Figure, Model, Ratio, Setting, parse_model
from tables import short, with_column

PEERS = ("torch", "galore-torch", "pytorch-optimizer", "optimuon")
README = Path(__file__).resolve().parent.parent / "README.md"
SETTLED = 0.01
"""Rounds end once the median of every judged ratio is known to about this share of itself."""
WALL, CPU = 0, 1

Rounds = dict[str, list[tuple[float, float]]]
"""Per competitor, (wall seconds, processor seconds) of each round."""


@dataclass(frozen=True)
class Limits:
    """How many rounds are run.

    Attributes:
        floor: Never fewer.
        ceiling: Never more.
        seconds: No further round begins after so long.
    """

    floor: int
    ceiling: int
    seconds: float


def timed(contest: Contest, limits: Limits, build: int) -> Rounds:
    """Step all competitors in turn, in an order drawn anew each round.

    So nobody always comes after the one that empties the caches, or frees much memory.
    Who is made first changes from build to build, for it decides where tensors lie.
    """
    names = list(contest.competitors)
    first = build % len(names)
    made = {name: contest.competitors[name]() for name in names[first:] + names[:first]}
    rounds: Rounds = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(limits.ceiling):
        if i >= limits.floor:
            late = time.perf_counter() - start > limits.seconds
            if late or all(settled(ratio, rounds) for ratio in contest.ratios):
                break
        for name in random.Random(1000 * build + i).sample(names, len(names)):
            competitor = made[name]
            competitor.prepare(i)
            wall, cpu = time.perf_counter(), time.process_time()
            competitor.run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            rounds[name].append((wall, cpu))
    return rounds


def paired(ratio: Ratio, rounds: Rounds, clock: int) -> list[float]:
    """The ratio in every round."""

    def total(weights: Mapping[str, float], i: int) -> float:
        return sum(weight * rounds[name][i][clock] for name, weight in weights.items())

    count = len(next(iter(rounds.values())))
    return [total(ratio.top, i) / total(ratio.bottom, i) for i in range(count)]


def settled(ratio: Ratio, rounds: Rounds) -> bool:
    """Whether the standard error of the median, from the quartiles, is small enough."""
    values = paired(ratio, rounds, WALL)
    if len(values) < 4:
        return False
    low, middle, high = statistics.quantiles(values, n=4)
    # 0.93 (q3 - q1) / sqrt(N): for normal noise, the standard error of a median.
    return bool(0.93 * (high - low) / len(values) ** 0.5 <= SETTLED * middle)


def verdict(value: float, target: float | None, judged: bool) -> bool | None:
    """Whether a target is met; None where there is none, or nothing is judged."""
    return value <= target if judged and target is not None else None


def report(ratio: Ratio, rounds: Rounds, judged: bool) -> dict[str, Any]:
    """The record of one ratio."""
    walls, cpus = paired(ratio, rounds, WALL), paired(ratio, rounds, CPU)
    figure = statistics.median(walls)
    return {
        "name": ratio.name,
        "figure": figure,
        "min": min(walls),
        "max": max(walls),
        "cpu": statistics.median(cpus),
        "pairs": len(walls),
        "target": ratio.target,
        "met": verdict(figure, ratio.target, judged),
        "cell": ratio.cell,
    }


def limits_of(case: Case, args: argparse.Namespace) -> tuple[Limits, int]:
    """Rounds per build, and the number of builds."""
    if args.repeats or args.quick:
        repeats = args.repeats or 3
        return Limits(repeats, repeats, 0.0), 1
    return Limits(case.floor, 1000, case.seconds), case.builds


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Times and figures of one case, as they go into results.json."""
    limits, builds = limits_of(case, args)
    setting = Setting(args.quick, args.shapes if case.shaped else ())
    pooled: list[Rounds] = []
    for build in range(builds):
        records = []
        for i, contest in enumerate(case.contests(setting)):
            rounds = timed(contest, limits, build)
            if build == 0:
                pooled.append(rounds)
            else:
                for name, times in rounds.items():
                    pooled[i][name] += times
            records.append(contest_record(contest, pooled[i], setting.judged))
    figures = [figure_record(figure, setting.judged) for figure in case.figures(setting)]
    note = "shapes given" if setting.given else "quick: tiny shapes" if args.quick else ""
    title = case.title + f" ({note})" * bool(note)
    return {"title": title, "builds": builds, "contests": records, "figures": figures}


def contest_record(contest: Contest, rounds: Rounds, judged: bool) -> dict[str, Any]:
    """Medians and ratios of one set of competitors."""
    return {
        "medians_ms": {
            name: 1e3 * statistics.median(wall for wall, _ in times)
            for name, times in rounds.items()
        },
        "ratios": [report(ratio, rounds, judged) for ratio in contest.ratios],
        "skipped": contest.skipped,
    }


def figure_record(figure: Figure, judged: bool) -> dict[str, Any]:
    """A number that is not a time."""
    return {
        "name": figure.name,
        "figure": figure.value,
        "unit": figure.unit,
        "target": figure.target,
        "met": verdict(figure.value, figure.target, judged),
        "cell": figure.cell,
    }


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str | None] = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- What is printed and drawn ---


def lines(name: str, case: Mapping[str, Any]) -> Iterator[str]:
    """A case as a table."""
    yield f"\n{name}: {case['title']}"
    for contest in case["contests"]:
        medians = contest["medians_ms"].items()
        text = "   ".join(f"{who} {ms:.3g} ms".replace(" ", "\0") for who, ms in medians)
        wrapped = textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent="  ")
        yield from (line.replace("\0", " ") for line in wrapped)
        for why in contest["skipped"]:
            yield f"  skipped: {why}"
        for ratio in (ratio for ratio in contest["ratios"] if ratio["cell"] is None):
            spread = f"{ratio['min']:.3f} to {ratio['max']:.3f}"
            yield (
                f"    {ratio['name']:<50}{ratio['figure']:>8.3f}  {goal(ratio):<24}"
                f"{spread:<18}cpu {ratio['cpu']:.3f}  {ratio['pairs']} pairs"
            )
    for figure in (figure for figure in case["figures"] if figure["cell"] is None):
        value = f"{figure['figure']:.4g} {figure['unit']}".strip()
        yield f"    {figure['name']:<50}{value:>22}  {goal(figure)}".rstrip()
    for panel, cells in panels(case).items():
        yield from grid(panel, cells)


def panels(case: Mapping[str, Any]) -> dict[str, dict[tuple[str, str], float]]:
    """By panel: the figure of each row and column."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for record in records_of(case):
        if record["cell"] is not None:
            panel, row, column = record["cell"]
            found.setdefault(panel, {})[row, column] = record["figure"]
    return found


def records_of(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All ratios, then all figures."""
    return [*(ratio for c in case["contests"] for ratio in c["ratios"]), *case["figures"]]


def grid(panel: str, cells: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """A panel as a table."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    first, widths = max(map(len, rows)), [max(len(column), 6) for column in columns]
    yield f"  {panel}"
    heads = (f"{column:>{w}}" for column, w in zip(columns, widths, strict=True))
    yield "    " + "  ".join([" " * first, *heads])
    for row in rows:
        values = [cells.get((row, column)) for column in columns]
        texts = ["" if value is None else f"{value:.3g}" for value in values]
        padded = (f"{text:>{w}}" for text, w in zip(texts, widths, strict=True))
        yield "    " + "  ".join([f"{row:<{first}}", *padded]).rstrip()


def goal(record: Mapping[str, Any]) -> str:
    """Target and verdict in words."""
    if record["target"] is None:
        return ""
    words = {True: "met", False: "NOT MET", None: "not judged"}[record["met"]]
    return f"target {record['target']:g}: {words}"


def summary(cases: Mapping[str, Any]) -> str:
    """How many targets were met, and which were not."""
    records = [record for case in cases.values() for record in records_of(case)]
    judged = [record for record in records if record["met"] is not None]
    missed = [record["name"] for record in judged if not record["met"]]
    text = f"\n{len(judged) - len(missed)} of {len(judged)} targets met"
    return text + "".join(f"\n  not met: {name}" for name in missed)


def write_column(case: Mapping[str, Any], path: Path) -> None:
    """Put the figures of the case ``amortised``, processor time, into the table of methods."""
    cells = ((r["cell"], r["cpu"]) for contest in case["contests"] for r in contest["ratios"])
    means = {row: short(value) for (_, row, column), value in cells if column == MEAN}
    page = path.read_text(encoding="utf-8")
    path.write_text(with_column(page, MEAN, means), encoding="utf-8")


def draw(cases: Mapping[str, Any], path: Path) -> None:
    """Every time ratio as a bar, its target as a mark; a panel's columns side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blocks: list[tuple[float, Callable[[Any], None]]] = []
    for name, case in cases.items():
        ratios = [r for c in case["contests"] for r in c["ratios"]]
        plain = [ratio for ratio in ratios if ratio["cell"] is None]
        if plain:
            blocks.append((0.24 * len(plain) + 1.0, partial(draw_bars, title=name, ratios=plain)))
        # without the figures, which are no times
        for panel, cells in panels({**case, "figures": []}).items():
            height = 0.2 * len({row for row, _ in cells}) + 1.1
            blocks.append((height, partial(draw_grid, title=f"{name}: {panel}", cells=cells)))
    heights = [height for height, _ in blocks]
    fig = plt.figure(figsize=(13, max(2.0, sum(heights))), layout="constrained")
    parts = fig.subfigures(max(1, len(blocks)), 1, height_ratios=heights or None, squeeze=False)
    for part, (_, block) in zip(parts[:, 0], blocks, strict=False):
        block(part)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_bars(part: Any, title: str, ratios: Sequence[Mapping[str, Any]]) -> None:
    """One bar for each ratio."""
    ax = part.subplots()
    for y, ratio in enumerate(ratios):
        color = {True: "#3b7a57", False: "#b5402f", None: "#8a8f98"}[ratio["met"]]
        ax.barh(y, ratio["figure"], color=color, height=0.6)
        ax.annotate(f" {ratio['figure']:.2f}", (ratio["figure"], y), va="center", fontsize=7)
        if ratio["target"] is not None:
            ax.plot([ratio["target"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    ax.set_yticks(range(len(ratios)), [ratio["name"] for ratio in ratios], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1.0, color="black", linewidth=0.5)
    ax.margins(x=0.1)
    ax.set_xlim(left=0)
    ax.set_title(f"{title}: time ratio; thick mark: target", fontsize=9, loc="left")


def draw_grid(part: Any, title: str, cells: Mapping[tuple[str, str], float]) -> None:
    """One small plot for each column, rows on a common axis."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    # at least six, so that a panel of one column is no wider than the others
    axes = part.subplots(1, max(6, len(columns)), sharey=True, squeeze=False)[0]
    for ax in axes[len(columns) :]:
        ax.axis("off")
    part.suptitle(f"{title}", fontsize=9, x=0.01, ha="left")
    for ax, column in zip(axes, columns, strict=False):
        values = [cells.get((row, column)) for row in rows]
        top = max(value for value in values if value is not None)
        for y, value in enumerate(values):
            if value is not None:
                ax.barh(y, value, color="#4a6fa5", height=0.65)
                ax.annotate(f" {value:.3g}", (value, y), va="center", fontsize=6)
        ax.set_xlim(0, 1.3 * top)
        ax.set_title(column, fontsize=7)
        ax.axvline(1.0, color="black", linewidth=0.5)
        ax.tick_params(labelsize=6)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=7)
    axes[0].invert_yaxis()


# --- Command line ---


def names(text: str) -> list[str]:
    """Names of cases, separated by commas."""
    found = [name for name in text.split(",") if name]
    unknown = [name for name in found if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    return found


def counts(text: str) -> list[int]:
    """Thread counts, separated by commas."""
    found = [int(count) for count in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"a thread count is at least 1; got {text!r}")
    return found


def models(text: str) -> list[Model]:
    """Models, separated by commas."""
    try:
        return [parse_model(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--only", type=names, metavar="NAME", help="cases to run", **several)
    parser.add_argument("--threads", type=counts, default=[1], metavar="N[,N]")
    parser.add_argument("--shapes", type=models, metavar="MxN[xK]", **several)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing judged")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results")
    parser.add_argument("--repeats", type=int, help="this many rounds, neither more nor fewer")
    parser.add_argument("--readme", action="store_true", help="case amortised: write its column")
    args = parser.parse_args(argv)
    args.only = [name for part in args.only or [] for name in part] or list(CASES)
    if args.readme and (args.quick or args.threads != [1] or "amortised" not in args.only):
        parser.error("--readme needs the case amortised, one thread, not --quick")
    args.shapes = tuple(model for part in args.shapes or [] for model in part)
    return args


def each_count(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """A process for each thread count, for a process keeps the threads that it once had."""
    worst = 0
    for count in args.threads:
        print(f"\n=== threads: {count} ===", flush=True)
        # of an option given twice the last one holds
        rest = ["--threads", str(count), "--out", str(args.out / f"threads-{count}")]
        done = subprocess.run([sys.executable, __file__, *argv, *rest], check=False)
        worst = max(worst, abs(done.returncode))
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    args = parse(argv)
    if len(args.threads) > 1:
        return each_count(args, sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(args.threads[0])
    results: dict[str, Any] = {"environment": environment(args.threads[0]), "cases": {}}
    print(json.dumps(results["environment"]))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        torch.manual_seed(0)
        results["cases"][name] = run_case(CASES[name], args)
        print("\n".join(lines(name, results["cases"][name])), flush=True)
        # after every case, so that a run that is cut short leaves what it has
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if args.readme:
        write_column(results["cases"]["amortised"], README)
    print(summary(results["cases"]))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results["cases"], args.out / "bench.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
