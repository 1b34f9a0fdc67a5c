"""The first minutes on a GPU: are all kernels and optimizers right there, and are they fast enough?

    python3 bench/gpu.py --out runs/gpu            everything, within eight minutes
    python3 bench/gpu.py --only numerics layers    some stages
    TRITON_INTERPRET=1 python3 bench/gpu.py --dry  every stage on the CPU, on matrices of at most 64

It needs torch, triton and numpy, for the last stage pytest, hypothesis and scipy, and no package of
ours installed: it lays ``stiefel`` out of this checkout by links. The folder gets
``results.jsonl`` (a line for each figure, written as it is known), ``report.md``, ``tests.txt``
and ``errors.txt``. A short verdict comes last.

Stages come in the order of their worth. Each has its own time limit and runs in processes of its
own, so that one which hangs or crashes costs itself only; what is not checked is part of the
verdict. Checks share the GPU, timings have it alone. Times are medians by CUDA events, of pairs
that take turns where two things are compared.

The exit status is 0 if nothing is wrong, slow or left out, 1 if something is, 2 without a GPU. In a
dry run kernels are interpreted and time is counted, not measured: it says whether this program
works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

from gpu_work import ROOT, Crew, Row, Stage

TOTAL = 470
"""Seconds for everything: the command is to end within eight minutes."""
PATIENCE = 10
"""How many times as long everything may take in a dry run."""
STAGES = (
    *("numerics", "optimizers", "waits", "graphs", "products", "polar", "steps", "layers"),
    *("cosines", "tests"),
)
SHOWN = 12
"""How many wrong or slow figures the verdict lists; all are in the files."""


@functools.cache
def lay_package() -> None:
    """Make this checkout importable as ``stiefel``, here and in processes that start later."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "stiefel"
    package.mkdir()
    for name in ("optimizers", "kernels"):
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT / "tests")])
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # before triton is imported


class Record:
    """Everything that was found, on disk as soon as it is known.

    Attributes:
        rows: Per stage its rows.
        left_out: Per stage the jobs that have not ended, and how many there were.
    """

    def __init__(self, out: Path | None) -> None:
        self.rows: dict[str, list[Row]] = {}
        self.left_out: dict[str, tuple[list[str], int]] = {}
        self.out = out
        self.lines = self._file("results.jsonl")
        self.errors = self._file("errors.txt")

    def _file(self, name: str) -> IO[str]:
        if self.out is None:
            return open(os.devnull, "w")
        self.out.mkdir(parents=True, exist_ok=True)
        return (self.out / name).open("w")

    def add(self, stage: str, rows: Sequence[Row], error: str) -> None:
        """Add rows of a stage."""
        self.rows.setdefault(stage, []).extend(rows)
        for row in rows:
            print(json.dumps({"stage": stage, **vars(row)}), file=self.lines, flush=True)
        if error:
            print(error, file=self.errors, flush=True)

    def run(self, stage: Stage, deadline: float) -> None:
        """Run a stage within its limit."""
        begun = time.monotonic()
        crew = Crew(stage)
        try:
            for rows, error in crew.rows(min(deadline, begun + stage.seconds)):
                self.add(stage.name, rows, error)
        finally:
            left = crew.stop()
        if left:
            self.left_out[stage.name] = left, len(stage.jobs)
        rows = self.rows.setdefault(stage.name, [])
        bad = sum(bool(row.wrong) for row in rows), sum(bool(row.slow) for row in rows)
        text = f"{stage.name}: {len(rows)} figures, {bad[0]} wrong, {bad[1]} slow"
        text += f", {len(left)} of {len(stage.jobs)} jobs not done" if left else ""
        print(f"{text}, {time.monotonic() - begun:.1f} s", flush=True)

    def report(self) -> str:
        """Everything as tables."""
        from tables import markdown

        parts = []
        for stage, rows in self.rows.items():
            keys = list(dict.fromkeys(key for row in rows for key in row.figures))
            lines = [["", *keys, "missed"]]
            for row in rows:
                cells = [_shown(row.figures.get(key, "")) for key in keys]
                lines.append([row.name, *cells, "; ".join(filter(None, (row.wrong, row.slow)))])
            parts.append(f"## {stage}\n\n{markdown(lines)}")
        return "\n\n".join(parts)

    def verdict(self, head: str) -> tuple[str, int]:
        """What is wrong, slow and left out, in a few lines, and the exit status."""
        lines, missed = [head], 0
        for kind in ("wrong", "slow"):
            found = [
                f"  {stage}, {row.name}: {text}"
                for stage, rows in self.rows.items() for row in rows if (text := getattr(row, kind))
            ]  # fmt: skip
            count = sum(map(len, self.rows.values()))
            lines.append(f"{kind}: {len(found)} of {count} figures")
            lines += found[:SHOWN] + [f"  and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
            missed += len(found)
        texts = [f"{s} {len(left)} of {n}" for s, (left, n) in self.left_out.items()]
        lines.append(f"not done: {', '.join(texts) if texts else 'none'}")
        lines += [str(row.figures["gate"]) for row in self.rows.get("gates", ())]
        return "\n".join(lines), int(bool(missed or texts))


def _shown(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x)


# the command --------------------------------------------------------------------------------------


def stages(dry: bool, plant: str, out: Path | None, until: float) -> list[Stage]:
    """All stages, the most valuable first."""
    import gpu_checks as checks
    import gpu_timings as timings

    place = checks.Place("cpu" if dry else "cuda", dry, plant)
    many = 1 if dry else 8
    found = [
        Stage("numerics", 75, checks.numerics(place), many),
        Stage("optimizers", 90, checks.optimizers(place), many),
        Stage("waits", 45, checks.waits(place), many),
        Stage("graphs", 45, checks.graphs(place), many),
        Stage("products", 45, timings.products(place)),
        Stage("polar", 45, timings.polar(place)),
        Stage("steps", 45, timings.steps(place)),
        Stage("layers", 90, timings.layers(place)),
        Stage("cosines", 20, timings.cosines(place)),
        Stage("tests", checks.TEST_SECONDS, checks.tests(place, out, until)),
    ]
    # a dry run is a test of what is done, on whatever machine, and not of how long it takes
    return [replace(stage, seconds=PATIENCE * stage.seconds) for stage in found] if dry else found


def run_all(chosen: Sequence[Stage], record: Record, begun: float, limit: float) -> str:
    """Run the stages one after the other; the head of the verdict."""
    import gpu_timings as timings

    for stage in chosen:
        record.run(stage, begun + limit)
        if stage.name == "products":
            record.add("gates", timings.gates(record.rows["products"]), "")
        if record.out is not None:
            (record.out / "report.md").write_text(record.report() + "\n")
    names = Counter(str(row.figures["device"]) for row in record.rows.get("device", ()))
    return f"{', '.join(names)}, {time.monotonic() - begun:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, judge."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for all files")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for everything ({TOTAL})")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, interpreted")
    parser.add_argument(
        "--plant", choices=("wrong", "slow"), default="", help="spoil a kernel: is it noticed?"
    )
    args = parser.parse_args(argv)
    unknown = sorted({*args.only} - {*STAGES})
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; --only takes {', '.join(STAGES)}")
    if not args.seconds > 0:
        parser.error(f"--seconds must be positive, got {args.seconds:g}")
    try:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be made: {error}")
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        args.seconds *= PATIENCE
    lay_package()
    import gpu_checks as checks

    record = Record(args.out)
    record.run(Stage("device", 60, checks.device(args.dry)), begun + args.seconds)
    if not record.rows["device"] or record.rows["device"][0].wrong:
        print("No GPU was found: run this where torch.cuda.is_available() is true.")
        return 2
    found = stages(args.dry, args.plant, args.out, begun + args.seconds)
    chosen = [stage for stage in found if not args.only or stage.name in args.only]
    text, status = record.verdict(run_all(chosen, record, begun, args.seconds))
    print(f"\nVERDICT {text}")
    if args.out is not None:
        (args.out / "report.md").write_text(f"{record.report()}\n\n## verdict\n\n{text}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
