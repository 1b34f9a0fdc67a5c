"""How good is each optimizer at its own best learning rate, seeds paired with AdamW's?

    python bench/quality.py                                     adamw, muon, galore on everything
    python bench/quality.py --methods adamw,muon:polar=ns5 --problems lm --steps 200 --seeds 3
    python bench/quality.py --quick                             tiny: does it run at all

lm is the language model of examples/; A, B, B50, C, D are those of synthetic.py. The learning
rate is swept on seed 0, the best one repeated on the other seeds. Prints a table and writes
results.json, and quality.png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import synthetic  # also makes examples/ importable
import torch
from common import SIZES, Corpus, Run, Settings, load_corpus, write_atomically
from methods import (
    AUX_LR,
    BETAS,
    EPS,
    UserError,
    available_methods,
    default_lr,
    method_options,
    schedule,
    split_parameters,
)
from pretrain import positive
from report import (
    BASELINE,
    COLOURS,
    MARKERS,
    WORDS,
    align,
    clean,
    clock,
    number,
    verdict,
    write_text,
)
from torch.optim import Optimizer

DECADE = 0.075
"""Nats that count as much as a factor of ten. The demo's limits become a fifth of a decade (1.58
times) for a tie, as much as a grid of half decades can hide, and 1.33 decades (21.5 times) for a
single seed."""
FLOOR = 1e-8
"""Of the synthetic values; what is smaller has solved the problem as far as float32 can tell."""
TINY = {"d": 32, "layers": 1, "heads": 2, "seq": 32, "batch": 4}
LM_CENTERS = {"sgd": 0.1, "sign": 1e-3, "torch-muon": 1e-2}


# --- Who takes part, and in what ---


@dataclass(frozen=True)
class Contender:
    """An optimizer and its options, as ``name`` or ``name:key=value:key=value``."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def low_rank(self) -> bool:
        keys = synthetic.accepted(self.name)
        # Muon's rank belongs to one of its polar methods
        optional = "rank_compensate" in keys and self.options.get("polar") != "low_rank"
        return "rank" in keys and not optional


def contenders(text: str) -> list[Contender]:
    """From the command line."""
    found = []
    for label in (part.strip() for part in text.split(",")):
        name, *pairs = label.split(":")
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, word = pair.partition("=")
            if not equals:
                raise UserError(f"--methods {label}: write name:key=value.")
            try:
                options[key] = ast.literal_eval(word)
            except (ValueError, SyntaxError):
                options[key] = word  # a plain word needs no quotes
        synthetic.accepted(name.lower())  # an unknown name is said before anything runs
        found.append(Contender(label, name.lower(), options))
    if len({who.label for who in found}) < len(found):
        raise UserError(f"--methods {text}: each can be named once only.")
    return found


@dataclass
class Outcome:
    """What one run gave; no value: it diverged."""

    value: float | None
    details: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A problem as the protocol sees it.

    ``unit`` says how two values differ: by nats or by decades. ``width`` is the number of learning
    rates on each side of the first one, ``extend`` how many more may follow on either side.
    ``judged`` are the steps that the verdict counts; under 100 nothing is ranked.
    """

    title: str
    unit: str
    steps: int
    judged: int
    width: int
    extend: int

    def lr(self, who: Contender, offset: int) -> float: ...

    def run(self, who: Contender, lr: float, seed: int) -> Outcome: ...

    def seconds(self, who: Contender) -> float:
        """Estimate for one run."""


def half_decades(center: float, offset: int) -> float:
    """... 0.01, 0.03, 0.1, 0.3 ..., counted from the one nearest to the center."""
    return float(f"{10 ** ((round(2 * math.log10(center)) + offset) / 2):.0e}")


class Synthetic:
    """A problem of synthetic.py: five learning rates half a decade apart."""

    unit, width = "decades", 2

    def __init__(self, name: str, quick: bool) -> None:
        self.problem = synthetic.PROBLEMS[name]
        self.title = self.problem.title
        self.steps = self.problem.steps // (5 if quick else 1)
        # Each problem's length was chosen for it, so the limit of 100 holds for shortened ones.
        self.judged = 0 if quick else 100
        self.extend = min(1, self.problem.extend) if quick else self.problem.extend

    def lr(self, who: Contender, offset: int) -> float:
        return half_decades(synthetic.CENTERS.get(who.name, synthetic.CENTER), offset)

    def run(self, who: Contender, lr: float, seed: int) -> Outcome:
        return Outcome(synthetic.solve(self.problem, who.name, lr, seed, who.options, self.steps))

    def seconds(self, who: Contender) -> float:
        few = min(10, self.steps)
        trial = partial(
            synthetic.solve, self.problem, who.name, self.lr(who, 0), 0, who.options, few
        )
        trial()  # what is done once only
        begin = time.perf_counter()
        trial()
        return (time.perf_counter() - begin) * self.steps / few


class Beside(Optimizer):
    """Any optimizer on the hidden matrices and the protocol's AdamW on everything else."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        # The groups are shared with the parts, so that a scheduler reaches them.
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for part in self.parts:
            part.step()
            self.state.update(part.state)
        return None


class LanguageModel:
    """The model, loop and corpus of examples/, three learning rates a factor 2 or 3 apart."""

    unit, width, extend = "nats", 1, 1

    def __init__(self, corpus: Corpus, shape: dict[str, int], steps: int, threads: int) -> None:
        self.corpus, self.shape, self.threads = corpus, shape, threads
        self.steps = self.judged = steps
        self.title = f"lm: validation loss in nats per byte, {steps} steps on {corpus.name}"

    def lr(self, who: Contender, offset: int) -> float:
        known = who.name in available_methods()
        center = default_lr(who.name) if known else LM_CENTERS.get(who.name, 1e-3)
        return center * 2.0**offset if who.low_rank else half_decades(center, offset)

    def make(self, who: Contender, lr: float, seed: int) -> Run:
        """A run of the examples; what they do not know steps beside their AdamW."""
        known = who.name in available_methods()
        name, extra = (who.name, who.options) if known else (BASELINE, {})
        settings = Settings(
            method=name, lr=lr, seed=seed, steps=self.steps, threads=self.threads, val_every=100,
            options=method_options(name, self.shape["d"], extra), corpus=self.corpus.name,
            corpus_hash=self.corpus.digest, **self.shape,
        )  # fmt: skip
        run = Run(settings, self.corpus)
        if not known:
            matrices, aux = ([p for _, p in named] for named in split_parameters(run.model))
            options = synthetic.options_of(who.name, who.options, {})
            run.optimizer = Beside(
                synthetic.build(who.name, matrices, lr, options),
                torch.optim.AdamW(aux, lr=AUX_LR, betas=BETAS, eps=EPS, weight_decay=0.0),
            )
            run.scheduler = torch.optim.lr_scheduler.LambdaLR(
                run.optimizer, lambda step: schedule(step, self.steps)
            )
        return run

    def run(self, who: Contender, lr: float, seed: int) -> Outcome:
        run = self.make(who, lr, seed)
        with tempfile.TemporaryDirectory() as folder:
            run.train(Path(folder) / "run.pt", self.steps + 1, lambda record: None)
        record = run.record
        details = {
            "val": record.val,
            "diverged_at": record.diverged_at,
            "state_bytes": record.state_bytes,
            "optimizer_share": record.optimizer_seconds / max(1e-9, record.step_seconds),
        }
        return Outcome(None if record.diverged_at else record.final, details)

    def seconds(self, who: Contender) -> float:
        trial = self.make(who, self.lr(who, 0), 0)
        trial.train_step()  # allocates state, fills caches, builds a basis
        begin = time.perf_counter()
        trial.train_step()
        trial.train_step()
        step = (time.perf_counter() - begin) / 2
        begin = time.perf_counter()
        trial.validate()
        check = time.perf_counter() - begin
        return self.steps * step + math.ceil(self.steps / 100) * check


# --- The protocol ---


@dataclass
class Sweep:
    """Every learning rate that was tried on seed 0, in order, and the best of them."""

    tried: dict[float, Outcome]
    best: float
    edge: bool


def sweep(
    run: Callable[[float], Outcome], lr_at: Callable[[int], float], width: int, extend: int
) -> Sweep:
    """Try 2 width + 1 learning rates, then go on while the best is the last on its side.

    A diverged run counts as the worst of all and stays in the record. Where all diverge the
    smallest learning rate is the best, so that the search goes down.
    """
    tried = {k: run(lr_at(k)) for k in range(-width, width + 1)}
    grown = {-1: 0, 1: 0}
    while True:
        offsets = sorted(tried)
        best = min(offsets, key=lambda k: order(tried[k].value))
        side = {offsets[0]: -1, offsets[-1]: 1}.get(best, 0)
        if not side or grown[side] == extend:
            return Sweep({lr_at(k): tried[k] for k in offsets}, lr_at(best), bool(side))
        grown[side] += 1
        tried[best + side] = run(lr_at(best + side))


def order(value: float | None) -> float:
    """Diverged runs come last."""
    return math.inf if value is None else value


@dataclass
class Measured:
    """One contender in one task: its sweep, then every seed at the best learning rate."""

    who: Contender
    found: Sweep
    outcomes: list[Outcome]

    @property
    def values(self) -> list[float | None]:
        return [outcome.value for outcome in self.outcomes]


def measure(task: Task, who: Contender, seeds: int, say: Callable[[str], None]) -> Measured:
    """The protocol for one contender."""

    def run(lr: float, seed: int = 0) -> Outcome:
        begin = time.perf_counter()
        outcome = task.run(who, lr, seed)
        seconds = time.perf_counter() - begin
        outcome.details["seconds"] = round(seconds, 3)
        value = number(outcome.value, ".4g", "diverged")
        say(f"{task.title.partition(':')[0]:<4} {who.label:<18} lr {lr:<8g} seed {seed}  {value}")
        return outcome

    found = sweep(run, partial(task.lr, who), task.width, task.extend)
    first = found.tried[found.best]
    return Measured(who, found, [first, *(run(found.best, seed) for seed in range(1, seeds))])


def estimate(tasks: dict[str, Task], whos: Sequence[Contender], seeds: int) -> float:
    """Seconds for all runs, before any grid grows."""
    return sum(
        task.seconds(who) * (2 * task.width + seeds) for task in tasks.values() for who in whos
    )


# --- What may be said ---


@dataclass
class Row:
    """One contender in one task. Means exist only where no seed diverged."""

    label: str
    lr: float
    edge: bool
    values: list[float | None]  # by seed, None: diverged
    gaps: list[float | None]  # to AdamW on the same seed
    mean: float | None
    low: float | None
    high: float | None
    gap: float | None
    verdict: str


def difference(a: float | None, b: float | None, unit: str) -> float | None:
    if a is None or b is None:
        return None
    return a - b if unit == "nats" else math.log10(max(a, FLOOR) / max(b, FLOOR))


def judge(gaps: Sequence[float], task: Task, own_edge: bool, baseline_edge: bool) -> str:
    """The demo's words, and ``edge`` where a grid that ended too early could change them."""
    scale = 1.0 if task.unit == "nats" else DECADE
    word = verdict([scale * gap for gap in gaps], task.judged)
    # Who is at an edge can only improve: that never weakens its own lead.
    harmless = {"better": not baseline_edge, "worse": not own_edge}
    ended = own_edge or baseline_edge
    return "edge" if ended and not harmless.get(word, False) else word


def make_row(task: Task, one: Measured, baseline: Measured | None) -> Row:
    reference = baseline.values if baseline else [None] * len(one.values)
    pairs = zip(one.values, reference, strict=True)
    gaps = [difference(a, b, task.unit) for a, b in pairs]
    finite = [value for value in one.values if value is not None]
    known = [gap for gap in gaps if gap is not None]
    whole, paired = len(finite) == len(one.values), len(known) == len(gaps)
    if not whole:
        word = "diverged"
    elif one is baseline:
        word = "baseline"
    else:
        edges = one.found.edge, bool(baseline and baseline.found.edge)
        word = judge(known, task, *edges) if paired else "-"
    return Row(
        label=one.who.label,
        lr=one.found.best,
        edge=one.found.edge,
        values=one.values,
        gaps=gaps,
        mean=fmean(finite) if whole else None,
        low=min(finite) if whole else None,
        high=max(finite) if whole else None,
        gap=fmean(known) if paired else None,
        verdict=word,
    )


def rows_of(task: Task, measured: Sequence[Measured]) -> list[Row]:
    """The lowest mean first, diverged last."""
    plain = [one for one in measured if one.who.label == BASELINE]
    baseline = plain[0] if plain else None
    rows = [make_row(task, one, baseline) for one in measured]
    return sorted(rows, key=lambda row: order(row.mean))


# --- Table ---

LEGEND = {
    "nats": "- AdamW: mean of the paired differences, and their range",
    "decades": "/ AdamW: mean factor of the paired values, and its range; "
    f"under {FLOOR:g} counts as {FLOOR:g}",
}
MORE_WORDS = {
    "nats": WORDS,
    "decades": (
        ("tie", "tie: within a factor of 1.58, or on either side of 1 between seeds"),
        ("seed", "1 seed, 2 seeds: a factor under 21.5 needs 3 seeds on one side of 1"),
        ("short", "short: the run was cut, no ranking"),
        ("diverged", "diverged: not finite, or ended above the start; no mean is given"),
    ),
}
EDGE = ("edge", "edge: a best lr is the last of its grid, a longer grid could change the ranking")


def gap_text(gap: float | None, unit: str) -> str:
    if gap is None:
        return "-"
    return f"{gap:+.3f}" if unit == "nats" else f"x{10**gap:.3g}"


def table(task: Task, rows: Sequence[Row], seeds: int) -> str:
    """One line per contender, then what the words mean."""
    unit, form = task.unit, ".3f" if task.unit == "nats" else ".3g"
    against = LEGEND[unit].partition(":")[0]
    cells = [["optimizer", "lr", "mean", "min - max", against, "range", "verdict"]]
    for row in rows:
        known = [gap for gap in row.gaps if gap is not None]
        ends = [gap_text(end, unit) for end in (min(known, default=None), max(known, default=None))]
        whole = row.mean is not None
        spread = f"{number(row.low, form)} - {number(row.high, form)}"
        cells.append(
            [
                row.label,
                f"{row.lr:g}" + "*" * row.edge,
                number(row.mean, form, "diverged"),
                spread if whole else "-",
                gap_text(row.gap, unit),
                " to ".join(ends) if row.gap is not None else "-",
                row.verdict,
            ]
        )
    said = " ".join(row.verdict for row in rows)
    words = [text for word, text in (*MORE_WORDS[unit], EDGE) if word in said]
    if any(row.edge for row in rows):
        words.append("*: the last lr of its grid")
    seeds_text = "1 seed" if seeds == 1 else f"{seeds} seeds"
    lines = [f"\n{task.title}; {seeds_text}", align(cells), f"  {LEGEND[unit]}"]
    return "\n".join([*lines, *(f"  {text}" for text in words)])


def every_run(task: Task, measured: Sequence[Measured]) -> Iterator[str]:
    """All values: the sweep on seed 0, then the best learning rate on every seed."""
    form = ".3f" if task.unit == "nats" else ".3g"
    for one in measured:
        tried = ", ".join(
            f"{lr:g}: {number(outcome.value, form, 'diverged')}"
            for lr, outcome in one.found.tried.items()
        )
        values = " / ".join(number(value, form, "diverged") for value in one.values)
        best = f"lr {one.found.best:g} by seed: {values}"
        yield f"  {one.who.label:<18} seed 0, by lr: {tried};  {best}"


# --- Files ---


def record(task: Task, measured: Sequence[Measured]) -> dict[str, Any]:
    """All of one task, as it goes into results.json."""

    def entry(outcome: Outcome) -> dict[str, Any]:
        return {"value": outcome.value, "diverged": outcome.value is None, **outcome.details}

    return {
        "title": task.title,
        "unit": task.unit,
        "steps": task.steps,
        "methods": {
            one.who.label: {
                "name": one.who.name,
                "options": one.who.options,
                "sweep": [{"lr": lr, **entry(outcome)} for lr, outcome in one.found.tried.items()],
                "seeds": [{"seed": i, **entry(o)} for i, o in enumerate(one.outcomes)],
            }
            for one in measured
        },
        "summary": [asdict(row) for row in rows_of(task, measured)],
    }


def environment(args: argparse.Namespace, corpus: Corpus | None) -> dict[str, Any]:
    """What the values depend on."""
    text = None
    if corpus:
        sizes = {"train_bytes": len(corpus.train), "val_bytes": len(corpus.val)}
        text = {"name": corpus.name, "hash": corpus.digest, **sizes}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": args.threads,
        "seeds": args.seeds,
        "quick": args.quick,
        "corpus": text,
    }


Drawn = Sequence[tuple[Task, Sequence[Row]]]


def plot(path: Path, drawn: Drawn, labels: Sequence[str]) -> bool:
    """A panel per task, a line per contender, a point per seed; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    columns = min(2, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    size = (6.6 * columns, lines * (1.1 + 0.42 * len(labels)))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (task, rows) in zip(panels, drawn, strict=False):
        draw_panel(axes, task, rows, labels)
    for axes in panels[len(drawn) :]:
        axes.remove()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
    return True


def draw_panel(axes: Any, task: Task, rows: Sequence[Row], labels: Sequence[str]) -> None:
    shown = [drawn_at(value, task.unit) for row in rows for value in row.values]
    finite = [value for value in shown if value is not None]
    note = "every seed"
    if task.unit == "decades":
        axes.set_xscale("log")
        ends = math.log10(min(finite, default=1.0)), math.log10(max(finite, default=1.0))
        # Whole decades: fewer than one would be labelled with numbers that overlap.
        axes.set_xlim(10 ** (math.ceil(ends[0]) - 1.1), 10 ** (math.floor(ends[1]) + 1.1))
        values = [value for row in rows for value in row.values if value is not None]
        note += f", values under {FLOOR:g} drawn there" * (min(values, default=1.0) < FLOOR)
    if len(finite) < len(shown):
        note += ", x at the border: diverged"
    for y, row in enumerate(rows):
        draw_row(axes, y, row, task.unit, labels.index(row.label))
    axes.set_yticks(range(len(rows)), [f"{row.label}\nlr {row.lr:g}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.25)
    axes.set_title(task.title, fontsize=10)
    axes.set_xlabel(f"{note}; right: mean and verdict", fontsize=8)


def drawn_at(value: float | None, unit: str) -> float | None:
    return max(value, FLOOR) if unit == "decades" and value is not None else value


def draw_row(axes: Any, y: int, row: Row, unit: str, i: int) -> None:
    """The points of one contender and, beside the panel, what they amount to."""
    look = {"color": COLOURS[i % len(COLOURS)], "linewidths": 1.5}
    shown = [drawn_at(value, unit) for value in row.values]
    finite = [value for value in shown if value is not None]
    marker = MARKERS[i % len(MARKERS)]
    axes.scatter(finite, [y] * len(finite), s=34, marker=marker, facecolors="none", **look)
    for k in range(len(shown) - len(finite)):
        where = axes.get_yaxis_transform()
        axes.scatter(0.98 - 0.03 * k, y, s=34, marker="x", transform=where, **look)
    words = f"{number(row.mean, '.4g', '')}  {row.verdict}".strip()
    where = ("axes fraction", "data")
    axes.annotate(words, (1.01, y), xycoords=where, va="center", fontsize=8)


# --- The command ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = ", ".join(sorted(synthetic.known_optimizers()))
    add("--methods", default="adamw,muon,galore", metavar="A,B:key=value", help=f"among {known}")
    add("--problems", default="lm,A,B,C,D", metavar="A,B", help="among lm, A, B, B50, C, D")
    add("--steps", type=positive, default=200, help="of lm; default: 200")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N-1; default: 3")
    add("--corpus", default="code", help="of lm: code (default), prose, or a file")
    add("--size", choices=tuple(SIZES), default="micro", help="of lm; default: micro")
    add("--threads", type=positive, default=1, metavar="N", help="default: 1")
    add("--out", type=Path, default=Path("runs/quality"), metavar="DIR")
    add("--quick", action="store_true", help="tiny model, a fifth of the steps, nothing ranked")
    return parser.parse_args(argv)


def make_tasks(args: argparse.Namespace) -> tuple[dict[str, Task], Corpus | None]:
    tasks: dict[str, Task] = {}
    corpus = None
    for name in (part.strip() for part in args.problems.split(",")):
        if name == "lm":
            shape = TINY if args.quick else SIZES[args.size]
            steps = min(20, args.steps) if args.quick else args.steps
            corpus = load_corpus(args.corpus, shape["seq"])
            tasks[name] = LanguageModel(corpus, shape, steps, args.threads)
        elif name in synthetic.PROBLEMS:
            tasks[name] = Synthetic(name, args.quick)
        else:
            known = ", ".join(("lm", *synthetic.PROBLEMS))
            raise UserError(f"--problems {name}: choose from {known}.")
    return tasks, corpus


def work(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    whos = contenders(args.methods)
    tasks, corpus = make_tasks(args)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(args, corpus), "problems": {}}
    print(json.dumps(results["environment"]))
    expected = estimate(tasks, whos, args.seeds)
    print(f"Estimate: {clock(expected)}, more where a grid has to grow", flush=True)
    begin, drawn = time.perf_counter(), []
    say = partial(progress, begin)
    for name, task in tasks.items():
        measured = [measure(task, who, args.seeds, say) for who in whos]
        rows = rows_of(task, measured)
        drawn.append((task, rows))
        print(table(task, rows, args.seeds), *every_run(task, measured), sep="\n", flush=True)
        results["problems"][name] = record(task, measured)
        # After every task, so that a run that is cut short leaves what it has.
        write_text(args.out / "results.json", json.dumps(clean(results), indent=1))
    if not plot(args.out / "quality.png", drawn, [who.label for who in whos]):
        print("Note: no picture without matplotlib (pip install matplotlib).")
    print(f"\nTook {clock(time.perf_counter() - begin)}; written to {args.out}")
    return int(any(row.verdict == "diverged" for _, rows in drawn for row in rows))


def progress(begin: float, text: str) -> None:
    print(f"{clock(time.perf_counter() - begin):>6}  {text}", flush=True)


def run_or_explain(
    name: str, work: Callable[[argparse.Namespace], int], args: argparse.Namespace
) -> int:
    """The exit code; a mistake of the caller is one sentence."""
    try:
        return work(args)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_explain("quality.py", work, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
