"""Runs the table of cases: competitors interleaved in one process, medians of paired ratios.

    python bench/run.py                      all cases, one thread
    python bench/run.py --only muon-step     one of them
    python bench/run.py --quick              tiny shapes, no target judged: does it run at all

Prints a table and writes results.json, and bench.png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, Contest, Figure, Ratio

PEERS = ("torch", "galore-torch", "pytorch-optimizer", "optimuon")
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
    """Step all competitors in turn; who begins changes from round to round.

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
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
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


def verdict(value: float, target: float | None, quick: bool) -> bool | None:
    """Whether a target is met; None where there is none, or nothing is judged."""
    return None if target is None or quick else value <= target


def report(ratio: Ratio, rounds: Rounds, quick: bool) -> dict[str, Any]:
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
        "met": verdict(figure, ratio.target, quick),
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
    pooled: list[Rounds] = []
    for build in range(builds):
        records = []
        for i, contest in enumerate(case.contests(args.quick)):
            rounds = timed(contest, limits, build)
            if build == 0:
                pooled.append(rounds)
            else:
                for name, times in rounds.items():
                    pooled[i][name] += times
            records.append(contest_record(contest, pooled[i], args.quick))
    figures = [figure_record(figure, args.quick) for figure in case.figures(args.quick)]
    title = case.title + (" (quick: tiny shapes instead)" if args.quick else "")
    return {"title": title, "builds": builds, "contests": records, "figures": figures}


def contest_record(contest: Contest, rounds: Rounds, quick: bool) -> dict[str, Any]:
    """Medians and ratios of one set of competitors."""
    return {
        "medians_ms": {
            name: 1e3 * statistics.median(wall for wall, _ in times)
            for name, times in rounds.items()
        },
        "ratios": [report(ratio, rounds, quick) for ratio in contest.ratios],
        "skipped": contest.skipped,
    }


def figure_record(figure: Figure, quick: bool) -> dict[str, Any]:
    """A number that is not a time."""
    return {
        "name": figure.name,
        "figure": figure.value,
        "unit": figure.unit,
        "target": figure.target,
        "met": verdict(figure.value, figure.target, quick),
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
        yield "  " + "   ".join(f"{who} {ms:.3g} ms" for who, ms in medians)
        for why in contest["skipped"]:
            yield f"  skipped: {why}"
        for ratio in contest["ratios"]:
            spread = f"{ratio['min']:.3f} to {ratio['max']:.3f}"
            yield (
                f"    {ratio['name']:<50}{ratio['figure']:>8.3f}  {goal(ratio):<24}"
                f"{spread:<18}cpu {ratio['cpu']:.3f}  {ratio['pairs']} pairs"
            )
    for figure in case["figures"]:
        value = f"{figure['figure']:.4g} {figure['unit']}".strip()
        yield f"    {figure['name']:<50}{value:>22}  {goal(figure)}".rstrip()


def goal(record: Mapping[str, Any]) -> str:
    """Target and verdict in words."""
    if record["target"] is None:
        return ""
    words = {True: "met", False: "NOT MET", None: "not judged"}[record["met"]]
    return f"target {record['target']:g}: {words}"


def summary(cases: Mapping[str, Any]) -> str:
    """How many targets were met, and which were not."""
    records = [
        record
        for case in cases.values()
        for record in [*case["figures"], *(r for c in case["contests"] for r in c["ratios"])]
    ]
    judged = [record for record in records if record["met"] is not None]
    missed = [record["name"] for record in judged if not record["met"]]
    text = f"\n{len(judged) - len(missed)} of {len(judged)} targets met"
    return text + "".join(f"\n  not met: {name}" for name in missed)


def draw(cases: Mapping[str, Any], path: Path) -> None:
    """Every ratio as a bar, its target as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios = [
        (f"{name}: {ratio['name']}", ratio)
        for name, case in cases.items()
        for contest in case["contests"]
        for ratio in contest["ratios"]
    ]
    fig, ax = plt.subplots(figsize=(9, 0.35 * len(ratios) + 1.2), layout="constrained")
    for y, (_, ratio) in enumerate(ratios):
        color = {True: "#3b7a57", False: "#b5402f", None: "#8a8f98"}[ratio["met"]]
        ax.barh(y, ratio["figure"], color=color, height=0.6)
        if ratio["target"] is not None:
            ax.plot([ratio["target"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    ax.set_yticks(range(len(ratios)), [name for name, _ in ratios], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1.0, color="black", linewidth=0.5)
    ax.set_xlabel("time ratio, median of pairs; thick mark: target")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing judged")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results")
    parser.add_argument("--repeats", type=int, help="this many rounds, neither more nor fewer")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"environment": environment(args.threads), "cases": {}}
    print(json.dumps(results["environment"]))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        torch.manual_seed(0)
        results["cases"][name] = run_case(CASES[name], args)
        print("\n".join(lines(name, results["cases"][name])), flush=True)
        # after every case, so that a run that is cut short leaves what it has
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results["cases"]))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results["cases"], args.out / "bench.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
