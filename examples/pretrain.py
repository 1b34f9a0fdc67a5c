"""Train a small language model on bytes and compare optimizers under one protocol.

python examples/pretrain.py                       AdamW, Muon, GaLore and Fira, 300 steps each
python examples/pretrain.py --optimizer muon --lr 0.01 --steps 300 --seed 0 --out runs/muon
python examples/pretrain.py --compare adamw,muon --lr muon=0.02 --seeds 3
"""

from __future__ import annotations

import argparse
import ast
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import report
import torch
from common import (
    SIZES,
    Corpus,
    Record,
    Run,
    Settings,
    build_model,
    check_settings,
    load_corpus,
    read_checkpoint,
)
from methods import (
    UserError,
    default_lr,
    free_options,
    method_options,
    split_parameters,
)

DEMO = "adamw,muon,galore,fira"
Maker = Callable[[Settings, Corpus], Run]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def make_parser(
    description: str | None = __doc__,
    demo: str = DEMO,
    steps: int = 300,
    corpus: str = "code",
    val_every: int = 100,
    out: str = "runs/pretrain",
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--optimizer", metavar="NAME", help="train with one optimizer")
    what.add_argument("--compare", metavar="A,B,...", help=f"several in turn (default: {demo})")
    add = parser.add_argument
    add(
        "--lr", action="append", default=[], help="for the matrices: 0.01, or muon=0.01,galore=0.02"
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="constructor keyword, for every method that takes it; galore.rank=8: for one only",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help=f"default: {steps}")
    length.add_argument("--quick", action="store_true", help="40 steps, for a first look")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="start and batches; default: 0")
    seeds.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N-1, paired")
    add("--corpus", default=corpus, help=f"code, prose, or a file; default: {corpus}")
    add("--size", choices=tuple(SIZES), default="micro", help="default: micro")
    for name in ("d", "layers", "heads", "seq", "batch"):
        add(f"--{name}", type=positive, metavar="N", help=f"instead of the size's {name}")
    every = f"steps; default: {val_every}"
    add("--val-every", type=positive, default=val_every, metavar="N", help=every)
    add("--threads", type=positive, default=1, metavar="N", help="default: 1")
    add("--out", type=Path, default=Path(out), metavar="DIR")
    add("--checkpoint-every", type=positive, default=50, metavar="N", help="steps; default: 50")
    add("--resume", action="store_true", help="continue from the checkpoints in --out")
    add("--no-progress", action="store_true", help="no bars and no lines while training")
    add("--json", choices=("-",), help="-: print results.json; all else goes to standard error")
    return parser


# ---------------------------------------------------------------------------------- the plan


def parse_lrs(
    texts: Sequence[str], methods: Sequence[str], default: Callable[[str], float] = default_lr
) -> dict[str, float]:
    lrs = {name: default(name) for name in methods}
    for text in (part for item in texts for part in item.split(",")):
        name, _, value = text.rpartition("=")
        name = name.strip().lower()
        if not name and len(methods) > 1:
            raise UserError(f"--lr {text}: with several methods write --lr {methods[0]}={text}.")
        if name and name not in methods:
            raise UserError(f"--lr {text}: {name} is not in this run ({', '.join(methods)}).")
        try:
            lr = float(value)
        except ValueError:
            lr = math.nan
        if not 0 < lr < math.inf:
            raise UserError(f"--lr {text}: {value!r} is not a number above 0.")
        lrs[name or methods[0]] = lr
    return lrs


def parse_options(
    texts: Sequence[str],
    methods: Sequence[str],
    free: Callable[[str], Sequence[str]] = free_options,
) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for text in texts:
        key, equals, word = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set {text}: write --set key=value, for example --set rank=16.")
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError):
            value = word  # a plain word such as svd needs no quotes
        target, dot, key = key.rpartition(".")
        target = target.lower()
        if dot and target not in methods:
            raise UserError(f"--set {text}: {target} is not in this run ({', '.join(methods)}).")
        takers = [target] if dot else [name for name in methods if key in free(name)]
        if not takers:
            raise UserError(f"--set {text}: none of {', '.join(methods)} takes {key!r}.")
        for name in takers:
            options[name][key] = value
    return options


def named_methods(args: argparse.Namespace, demo: str = DEMO) -> list[str]:
    names = args.optimizer or args.compare or demo
    methods = [name.strip().lower() for name in names.split(",")]
    if len(set(methods)) < len(methods):
        raise UserError(f"--compare {names}: each method can be named once only.")
    return methods


def make_plan(args: argparse.Namespace, corpus: Corpus, shape: dict[str, int]) -> list[Settings]:
    methods = named_methods(args)
    lrs, options = parse_lrs(args.lr, methods), parse_options(args.options, methods)
    return [
        Settings(
            method=name,
            lr=lrs[name],
            options=method_options(name, shape["d"], options[name]),
            seed=seed,
            steps=40 if args.quick else args.steps or 300,
            val_every=args.val_every,
            corpus=corpus.name,
            corpus_hash=corpus.digest,
            threads=args.threads,
            **shape,
        )
        for seed in (range(args.seeds) if args.seeds else [args.seed])
        for name in methods
    ]


def model_shape(args: argparse.Namespace) -> dict[str, int]:
    shape = {key: getattr(args, key) or value for key, value in SIZES[args.size].items()}
    if shape["d"] % (2 * shape["heads"]):
        raise UserError(
            f"--d {shape['d']} must be a multiple of twice --heads {shape['heads']}: each head "
            f"turns pairs of coordinates."
        )
    return shape


def describe(args: argparse.Namespace, shape: dict[str, int]) -> str:
    changed = {key: value for key, value in shape.items() if value != SIZES[args.size][key]}
    return ", ".join([args.size, *(f"{key} {value}" for key, value in changed.items())])


# --------------------------------------------------------------------------------- the runs


def estimate(settings: Settings, corpus: Corpus, left: int, make: Maker = Run) -> float:
    """Seconds for ``left`` steps, from three steps and one validation batch of a throw-away run."""
    trial = make(settings, corpus)
    trial.train_step()  # allocates state, fills caches, builds a basis
    begin = time.perf_counter()
    trial.train_step()
    trial.train_step()
    step = (time.perf_counter() - begin) / 2
    begin = time.perf_counter()
    with torch.no_grad():
        trial.model.loss(trial.validation[0])
    check = (time.perf_counter() - begin) * len(trial.validation)
    return left * step + math.ceil(left / settings.val_every) * check


def checkpoint_path(folder: Path, settings: Settings) -> Path:
    return folder / f"{settings.label}.pt"


def remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be removed ({error.strerror}).") from error


def earlier_record(folder: Path, settings: Settings) -> Record:
    """The record to continue from; refuses a checkpoint of other settings."""
    path = checkpoint_path(folder, settings)
    if not path.exists():
        return Record()
    saved = read_checkpoint(path)
    check_settings(path, saved["settings"], asdict(settings))
    return Record(**saved["record"])


def execute(
    plan: Sequence[Settings],
    corpus: Corpus,
    args: argparse.Namespace,
    out: TextIO,
    make: Maker = Run,
) -> list[report.Result]:
    # Everything that can be refused is refused here, before the first step.
    records = [earlier_record(args.out, s) if args.resume else Record() for s in plan]
    seconds: dict[str, float] = {}
    for settings, record in zip(plan, records, strict=True):
        if record.step:
            done = "finished earlier" if record.finished(settings.steps) else "continues"
            print(f"{settings.label}: {done}, step {record.step} of {settings.steps}", file=out)
        if not record.finished(settings.steps):
            left = settings.steps - record.step
            seconds.setdefault(settings.method, 0.0)
            seconds[settings.method] += estimate(settings, corpus, left, make)
    if seconds:
        each = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        print(f"Estimate: {sum(seconds.values()):.0f} s ({each})\n", file=out, flush=True)
    if not args.resume:
        for settings in plan:  # else a killed run could later be resumed from an older one
            remove(checkpoint_path(args.out, settings))
    display = report.make_display(out, not args.no_progress)
    try:
        results = []
        for settings, record in zip(plan, records, strict=True):
            if not record.finished(settings.steps):
                record = train(make(settings, corpus), args, display)
            results.append((settings, record))
        return results
    finally:
        display.close()


def train(run: Run, args: argparse.Namespace, display: report.Display) -> Record:
    path = checkpoint_path(args.out, run.settings)
    if args.resume and path.exists():
        run.load(path)
    display.start(run.settings, run.record.step)
    run.train(path, args.checkpoint_every, display.update)
    return run.record


# --------------------------------------------------------------------------------- the words


def print_header(
    plan: Sequence[Settings],
    corpus: Corpus,
    sizes: tuple[int, int],
    size: str,
    out: TextIO,
    part: str = "in hidden matrices",
) -> None:
    first, last = plan[0], plan[-1]
    seeds = f"seed {first.seed}" if first.seed == last.seed else f"seeds {first.seed}-{last.seed}"
    threads = f"{first.threads} thread" + "s" * (first.threads > 1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {threads}", file=out)
    print(
        f"corpus {corpus.name} {corpus.digest}: {len(corpus.train):,} bytes to train, "
        f"{len(corpus.val):,} to validate" + f" ({corpus.note})" * bool(corpus.note),
        file=out,
    )
    print(
        f"model {size}: {sizes[0]:,} parameters, {sizes[1]:,} of them {part}; "
        f"{first.steps} steps of {first.batch} x {first.seq} bytes, {seeds}",
        file=out,
    )


def print_report(
    results: Sequence[report.Result],
    corpus: Corpus,
    sizes: tuple[int, int],
    args: argparse.Namespace,
    size: str,
    out: TextIO,
    **protocol: Any,
) -> None:
    rows = report.summarize(results)
    seeds = list(dict.fromkeys(settings.seed for settings, _ in results))
    print("\n" + report.table(rows), file=out)
    if len(seeds) > 1:
        print("\n" + report.seed_table(rows, seeds), file=out)
    text = report.to_json(results, corpus, sizes, **protocol)
    report.write_text(args.out / "results.json", text)
    steps = results[0][0].steps
    title = (
        f"Byte-level language model on corpus {corpus.name} ({corpus.digest})\n"
        f"{size}: {sizes[0] / 1e6:.2f} M parameters, {steps} steps"
    )
    files = "results.json"
    if report.plot(args.out / "loss.png", results, title):
        files += ", loss.png"
    else:
        print("Note: no picture without matplotlib (pip install matplotlib).", file=out)
    print(f"\nWritten to {args.out}: {files} and the checkpoints", file=out)
    if args.json:
        print(text)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: no folder can be made there ({error.strerror}).") from error


def work(args: argparse.Namespace, out: TextIO) -> int:
    torch.set_num_threads(args.threads)
    shape = model_shape(args)
    for name in named_methods(args):
        default_lr(name)  # an unknown name is said before the corpus is read
    corpus = load_corpus(args.corpus, shape["seq"])
    plan = make_plan(args, corpus, shape)
    make_folder(args.out)
    model = build_model(shape["d"], shape["layers"], shape["heads"], shape["seq"], seed=0)
    matrices, _ = split_parameters(model)
    sizes = (sum(p.numel() for p in model.parameters()), sum(p.numel() for _, p in matrices))
    size = describe(args, shape)
    print_header(plan, corpus, sizes, size, out)
    results = execute(plan, corpus, args, out)
    print_report(results, corpus, sizes, args, size, out)
    return int(any(record.diverged_at for _, record in results))


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_explain("pretrain.py", work, make_parser().parse_args(argv))


def run_or_explain(
    name: str, work: Callable[[argparse.Namespace, TextIO], int], args: argparse.Namespace
) -> int:
    """The exit code; a mistake of the caller is one sentence."""
    out = sys.stderr if args.json else sys.stdout
    try:
        return work(args, out)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; the same command with --resume continues.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
