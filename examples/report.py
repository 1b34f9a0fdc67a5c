"""Progress, final table, ``results.json`` and ``loss.png`` of the examples."""

from __future__ import annotations

import io
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TextIO

import torch
from common import CLIP, Corpus, Record, Settings, write_atomically
from methods import AUX_LR, BETAS, EPS

TIE, CLEAR = 0.015, 0.1  # gaps in nats per byte; smaller than the first is within the lr grid
BASELINE = "adamw"
Result = tuple[Settings, Record]

# ------------------------------------------------------------------------------------ progress


class Display(Protocol):
    def start(self, settings: Settings, step: int) -> None: ...

    def update(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Pace:
    """Bytes per second and time left, counted from where this process took over."""

    def __init__(self, settings: Settings, step: int) -> None:
        self.settings, self.first, self.begin = settings, step, time.monotonic()

    def fields(self, record: Record) -> dict[str, str]:
        s, seconds = self.settings, max(1e-9, time.monotonic() - self.begin)
        rate = (record.step - self.first) / seconds
        left = 0.0 if record.finished(s.steps) else (s.steps - record.step) / max(rate, 1e-9)
        return {
            "loss": f"loss {record.ema[-1]:.3f}",
            "lr": f"lr {record.lr[-1]:.1e}",
            "rate": f"{rate * s.batch * s.seq:,.0f} bytes/s",
            "left": f"{clock(left)} left" if record.diverged_at is None else "diverged",
        }


class Silent:
    def start(self, settings: Settings, step: int) -> None: ...

    def update(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Lines:
    """One line per 50 steps, for logs."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def start(self, settings: Settings, step: int) -> None:
        self.settings, self.pace = settings, Pace(settings, step)

    def update(self, record: Record) -> None:
        steps = self.settings.steps
        if record.step % 50 == 0 or record.finished(steps):
            text = "  ".join(self.pace.fields(record).values())
            line = f"{self.settings.label:<16} {record.step:>5}/{steps}  {text}"
            print(line, file=self.out, flush=True)

    def close(self) -> None: ...


class Bars:
    """One bar per run. A thread redraws them, so a long step does not stop the display."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            "{task.completed:.0f}/{task.total:.0f}",
            "{task.fields[loss]}",
            "{task.fields[lr]}",
            "{task.fields[rate]}",
            "{task.fields[left]}",
        )
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            *(TextColumn(text, justify="right") for text in columns),
            console=Console(file=out),
            refresh_per_second=4,
        )
        self.progress.start()

    def start(self, settings: Settings, step: int) -> None:
        self.pace = Pace(settings, step)
        empty: dict[str, Any] = dict.fromkeys(("loss", "lr", "rate", "left"), "")
        name = settings.label.replace("-seed", " ")
        self.task = self.progress.add_task(name, total=settings.steps, completed=step, **empty)

    def update(self, record: Record) -> None:
        fields: dict[str, Any] = {**self.pace.fields(record)}
        self.progress.update(self.task, completed=record.step, **fields)

    def close(self) -> None:
        self.progress.stop()


def make_display(out: TextIO, wanted: bool) -> Display:
    if not wanted:
        return Silent()
    if out.isatty():
        try:
            return Bars(out)
        except ImportError:
            print("Note: no progress bars without rich (pip install rich).", file=out)
    return Lines(out)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )


# ------------------------------------------------------------------------------------- summary


@dataclass
class Row:
    """One method over all its seeds. Means exist only where no seed diverged."""

    method: str
    lr: float
    losses: list[float | None]  # by seed, None: diverged
    gaps: list[float | None]  # to AdamW on the same seed
    loss: float | None
    gap: float | None
    verdict: str
    baseline_steps: str
    optimizer_share: float
    state_bytes: int


def verdict(gaps: Sequence[float], steps: int) -> str:
    """What may be said about paired gaps; never more than the number of runs allows."""
    mean, n = fmean(gaps), len(gaps)
    if abs(mean) < TIE or min(gaps) < 0 < max(gaps):
        return "tie"
    if abs(mean) < CLEAR and n < 3:
        return "1 seed" if n == 1 else f"{n} seeds"
    if steps < 100:
        return "short"
    return "better" if mean < 0 else "worse"


def steps_to_reach(curve: Sequence[tuple[int, float]], target: float) -> str:
    """Steps after which a validation curve passes ``target``, by linear interpolation."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return f"<= {step}"
            part = (before[1] - target) / (before[1] - loss)
            return f"~{round(before[0] + part * (step - before[0]))}"
        before = (step, loss)
    return f"> {curve[-1][0]}" if curve else "-"


def mean_curve(records: Sequence[Record]) -> list[tuple[int, float]]:
    return [
        (int(points[0][0]), fmean(loss for _, loss in points))
        for points in zip(*(record.val for record in records), strict=True)
    ]


def make_row(runs: Sequence[Result], baseline: Sequence[Record]) -> Row:
    settings, records = runs[0][0], [record for _, record in runs]
    losses = [None if r.diverged_at else r.final for r in records]
    reference = [None if r.diverged_at else r.final for r in baseline]
    gaps = [
        None if a is None or b is None else a - b
        for a, b in zip(losses, reference, strict=False)  # no baseline: no gaps
    ]
    finite = [loss for loss in losses if loss is not None]
    known = [gap for gap in gaps if gap is not None]
    whole, paired = len(finite) == len(losses), bool(gaps) and len(known) == len(gaps)
    loss = fmean(finite) if whole else None
    if not whole:
        word = "diverged"
    elif settings.method == BASELINE:
        word = "baseline"
    else:
        word = verdict(known, settings.steps) if paired else "-"
    needed = "-"
    if paired and loss is not None and settings.method != BASELINE:
        needed = steps_to_reach(mean_curve(baseline), loss)
    return Row(
        method=settings.method,
        lr=settings.lr,
        losses=losses,
        gaps=gaps,
        loss=loss,
        gap=fmean(known) if paired else None,
        verdict=word,
        baseline_steps=needed,
        optimizer_share=sum(r.optimizer_seconds for r in records)
        / max(1e-9, sum(r.step_seconds for r in records)),
        state_bytes=max(r.state_bytes for r in records),
    )


def summarize(results: Sequence[Result]) -> list[Row]:
    """One row per method, the lowest validation loss first, diverged methods last."""
    methods = dict.fromkeys(settings.method for settings, _ in results)
    baseline = [record for settings, record in results if settings.method == BASELINE]
    rows = [make_row([r for r in results if r[0].method == m], baseline) for m in methods]
    return sorted(rows, key=lambda row: math.inf if row.loss is None else row.loss)


# --------------------------------------------------------------------------------------- table

HEAD = "optimizer|lr|val loss|bits|- AdamW|verdict|AdamW at|time|state"
LEGEND = """
  bits: per byte. - AdamW: paired difference. AdamW at: steps it took to this loss.
  time: the optimizer's share of a step (process time). state: bytes it keeps."""
WORDS = (
    ("tie", "tie: the gap is under 0.015 or its sign differs between seeds"),
    ("seed", "1 seed, 2 seeds: a gap under 0.1 needs 3 seeds of one sign"),
    ("short", "short: under 100 steps no ranking"),
    (
        "diverged",
        "diverged: a loss was not finite, or ended no better than blind guessing; no mean is given",
    ),
)


def number(value: float | None, form: str, absent: str = "-") -> str:
    return absent if value is None else format(value, form)


def table(rows: Sequence[Row]) -> str:
    cells = [HEAD.split("|")]
    for row in rows:
        bits = None if row.loss is None else row.loss / math.log(2)
        cells.append(
            [
                row.method,
                f"{row.lr:g}",
                number(row.loss, ".3f", "diverged"),
                number(bits, ".3f"),
                number(row.gap, "+.3f"),
                row.verdict,
                row.baseline_steps,
                f"{row.optimizer_share:.0%}",
                f"{row.state_bytes / 1e6:.2f} MB",
            ]
        )
    return (
        align(cells)
        + LEGEND
        + "".join(f"\n  {text}" for word, text in WORDS if any(word in row.verdict for row in rows))
    )


def seed_table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Every run: validation loss and, in brackets, the paired difference to AdamW."""
    cells = [["by seed", *map(str, seeds), "min - max of the difference"]]
    for row in rows:
        gaps = [*row.gaps, *[None] * (len(seeds) - len(row.gaps))]
        line = [row.method]
        for loss, gap in zip(row.losses, gaps, strict=True):
            line.append(number(loss, ".3f", "diverged") + f" ({number(gap, '+.3f')})")
        known = [gap for gap in gaps if gap is not None]
        whole = len(known) == len(seeds)
        cells.append([*line, f"{min(known):+.3f} to {max(known):+.3f}" if whole else "-"])
    return align(cells)


def align(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        padded = [
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- files


def clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def to_json(
    results: Sequence[Result], corpus: Corpus, sizes: tuple[int, int], **protocol: Any
) -> str:
    runs = []
    for settings, record in results:
        loss = None if record.diverged_at else record.final
        bits = None if loss is None else loss / math.log(2)
        end = {"diverged": record.diverged_at is not None, "val_loss": loss, "bits_per_byte": bits}
        runs.append({"settings": asdict(settings), **end, "record": asdict(record)})
    content = {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
        "protocol": {
            "aux_lr": AUX_LR,
            "aux_betas": BETAS,
            "aux_eps": EPS,
            "clip": CLIP,
            **protocol,
        },
        "corpus": {
            "name": corpus.name,
            "hash": corpus.digest,
            "train_bytes": len(corpus.train),
            "val_bytes": len(corpus.val),
        },
        "model": {"parameters": sizes[0], "matrix_parameters": sizes[1]},
        "runs": runs,
        "summary": [asdict(row) for row in summarize(results)],
    }
    return json.dumps(clean(content), indent=1, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode() + b"\n")


# ------------------------------------------------------------------------------------- picture

# Okabe and Ito's palette: told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def plot(path: Path, results: Sequence[Result], title: str) -> bool:
    """Draw the losses over the steps; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    baseline = {
        settings.seed: record for settings, record in results if settings.method == BASELINE
    }
    paired = len(baseline) < len(results) and bool(baseline)
    figure = Figure(figsize=(9, 7.5 if paired else 5.5), dpi=150, layout="constrained")
    ratios = [3, 1.4] if paired else [1]
    above, *below = figure.subplots(
        len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False
    )[:, 0]
    draw_losses(above, results)
    above.set_title(title)
    if below:
        draw_differences(below[0], results, baseline)
    (below or [above])[0].set_xlabel("step")
    above.set_xlim(0, max(settings.steps for settings, _ in results) * 1.03)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
    return True


def styles(results: Sequence[Result]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Line and marker style of each method; the first is drawn widest, so that it shows below."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for i, method in enumerate(dict.fromkeys(settings.method for settings, _ in results)):
        colour = COLOURS[i % len(COLOURS)]
        marker = {"marker": MARKERS[i % len(MARKERS)], "ms": max(5, 11 - 2.5 * i), "ls": ""}
        line = {"color": colour, "lw": 2.4 if i == 0 else 1.2, "alpha": 0.55 if i == 0 else 0.9}
        found[method] = (line, {**marker, "color": colour, "mfc": "none", "mew": 1.8, "zorder": 3})
    return found


def draw_losses(axes: Any, results: Sequence[Result]) -> None:
    rows = {row.method: row for row in summarize(results)}
    labelled: set[str] = set()
    style = styles(results)
    for settings, record in results:
        line, marker = style[settings.method]
        label = None
        if settings.method not in labelled:
            labelled.add(settings.method)
            loss = number(rows[settings.method].loss, ".3f", "diverged")
            label = f"{settings.method} (lr {settings.lr:g}): {loss}"
        axes.plot(range(1, record.step + 1), record.ema, **line)
        axes.plot(*points(record), label=label, **marker)
        if record.diverged_at:
            axes.axvline(record.diverged_at, ls=":", color=line["color"])
    axes.set_ylabel("loss (nats per byte)")
    axes.set_ylim(*limits([record for _, record in results]))
    axes.grid(alpha=0.25)
    axes.legend(title="lines: training (EMA 0.9), markers: validation", frameon=False)


def draw_differences(axes: Any, results: Sequence[Result], baseline: dict[int, Record]) -> None:
    """Same batches, so the noise of training cancels in the paired difference."""
    style = styles(results)
    late: list[float] = [0.0]
    for settings, record in results:
        line, marker = style[settings.method]
        other = baseline[settings.seed]
        gaps = [a - b for a, b in zip(record.ema, other.ema, strict=False)]
        late += [gap for gap in gaps[19:] if math.isfinite(gap)]
        axes.plot(range(1, len(gaps) + 1), gaps, **line)
        if settings.method != BASELINE:
            pairs = list(zip(record.val, other.val, strict=False))
            axes.plot([a[0] for a, _ in pairs], [a[1] - b[1] for a, b in pairs], **marker)
            late += [a[1] - b[1] for a, b in pairs if math.isfinite(a[1] - b[1])]
    room = 0.08 * max(max(late) - min(late), 0.05)
    axes.set_ylim(min(late) - room, max(late) + room)
    axes.set_ylabel("minus AdamW's loss")
    axes.grid(alpha=0.25)


def points(record: Record) -> tuple[list[float], list[float]]:
    return [step for step, _ in record.val], [loss for _, loss in record.val]


def limits(records: Sequence[Record]) -> tuple[float, float]:
    """From just under the lowest point up to the loss of step 20, so that the end is readable."""
    drawn = [x for r in records for x in (*r.ema, *points(r)[1]) if math.isfinite(x)]
    at_20 = [r.ema[min(19, len(r.ema) - 1)] for r in records if r.ema]
    low = min(drawn, default=0.0)
    high = max((x for x in at_20 if math.isfinite(x)), default=low + 1.0)
    room = 0.04 * max(high - low, 0.1)
    return low - room, high + room
