"""Train a dense and a mixture-of-experts model with AdamW, Muon + AdamW and the symmetry stack.

python examples/symmetry.py                            both models, 300 steps, seed 0
python examples/symmetry.py --model mixture --seeds 3  one model, paired seeds
python examples/symmetry.py --lr symmetry=0.01 --steps 200
python examples/symmetry.py --stacks adamw,only-head   one class of weights under its rule

Each stack is one SymmetryStack over the whole model with one learning rate for all roles, so
embedding, head and router are part of the comparison (in pretrain.py they are not).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import report
import torch
from common import SIZES, ByteLM, Corpus, Record, Run, Settings, build_model, load_corpus
from methods import UserError
from mixture import build_mixture
from pretrain import checkpoint_path, earlier_record, positive, print_header, print_report

from stiefel.optimizers import SymmetryStack
from stiefel.optimizers._roles.policies import ROLE_POLICIES

MODELS = {"dense": build_model, "mixture": build_mixture}
# The best of a sweep at 200 steps on seed 0 of the dense model.
STACKS = {"adamw": 3e-3, "muon+adamw": 1e-2, "symmetry": 1e-2}
# One class of weights under its rule of "symmetry", all else AdamW: --stacks adamw,only-head
ONLY = {
    "only-embedding": ("embedding",),
    "only-head": ("head",),
    "only-attention": ("query", "key", "value", "out"),
    "only-swiglu": ("gate", "up", "gate_up", "down"),
    "only-router": ("router",),
}
RATES = {**STACKS, **dict.fromkeys(ONLY, STACKS["adamw"])}


class StackRun(Run):
    """A run of one stack on one of the models."""

    @staticmethod
    def make_model(settings: Settings) -> ByteLM:
        s = settings
        return MODELS[s.options["model"]](s.d, s.layers, s.heads, s.seq, s.seed)

    @staticmethod
    def make_optimizer(settings: Settings, model: ByteLM) -> SymmetryStack:
        policy: Any = settings.method
        if policy in ONLY:
            roles = dict.fromkeys(("embedding", "head", "hidden", "expert", "router"), "adamw")
            policy = {**roles, **{part: ROLE_POLICIES["symmetry"][part] for part in ONLY[policy]}}
        return SymmetryStack(model, settings.lr, policy=policy)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=(*MODELS, "both"), default="both", help="default: both")
    add("--stacks", default=",".join(STACKS), metavar="A,B,...", help="default: all three")
    add("--lr", action="append", default=[], help="for one stack: symmetry=0.01")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="default: 300")
    length.add_argument("--quick", action="store_true", help="40 steps, for a first look")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="start and batches; default: 0")
    seeds.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N-1, paired")
    add("--corpus", default="code", help="code (default), prose, or a file")
    add("--size", choices=tuple(SIZES), default="micro", help="default: micro")
    for name in ("d", "layers", "heads", "seq", "batch"):
        add(f"--{name}", type=positive, metavar="N", help=f"instead of the size's {name}")
    add("--val-every", type=positive, default=100, metavar="N", help="steps; default: 100")
    add("--threads", type=positive, default=1, metavar="N", help="default: 1")
    add("--out", type=Path, default=Path("runs/symmetry"), metavar="DIR")
    add("--checkpoint-every", type=positive, default=50, metavar="N", help="steps; default: 50")
    add("--resume", action="store_true", help="continue from the checkpoints in --out")
    add("--no-progress", action="store_true", help="no bars and no lines while training")
    return parser


def learning_rates(texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The given ones over the defaults."""
    rates = {name: RATES[name] for name in names}
    for text in (part for item in texts for part in item.split(",")):
        name, _, value = text.rpartition("=")
        try:
            lr = float(value)
        except ValueError:
            lr = math.nan
        if name not in rates or not 0 < lr < math.inf:
            raise UserError(f"--lr {text}: write NAME=NUMBER with a name of {', '.join(names)}.")
        rates[name] = lr
    return rates


def make_plan(args: argparse.Namespace, model: str, corpus: Corpus) -> list[Settings]:
    names = [name.strip() for name in args.stacks.split(",")]
    unknown = [name for name in names if name not in RATES]
    if unknown:
        raise UserError(f"--stacks {unknown[0]}: choose from {', '.join(RATES)}.")
    shape = {key: getattr(args, key) or value for key, value in SIZES[args.size].items()}
    if shape["d"] % (2 * shape["heads"]):
        raise UserError(f"--d {shape['d']} must be a multiple of twice --heads {shape['heads']}.")
    rates = learning_rates(args.lr, names)
    return [
        Settings(
            method=name,
            lr=rates[name],
            options={"model": model},
            seed=seed,
            steps=40 if args.quick else args.steps or 300,
            val_every=args.val_every,
            corpus=corpus.name,
            corpus_hash=corpus.digest,
            threads=args.threads,
            **shape,
        )
        for seed in (range(args.seeds) if args.seeds else [args.seed])
        for name in names
    ]


def compare(args: argparse.Namespace, name: str, corpus: Corpus, out: TextIO) -> bool:
    """All stacks on one model; whether some run diverged."""
    args.out.mkdir(parents=True, exist_ok=True)
    plan = make_plan(args, name, corpus)
    model = StackRun.make_model(plan[0])
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    sizes = (sum(p.numel() for p in model.parameters()), matrices)
    print(f"The assignment of the symmetry stack, {name} model:\n", file=out)
    print(f"{SymmetryStack(model, STACKS['symmetry']).assignment()}\n", file=out)
    print_header(plan, corpus, sizes, f"{args.size} {name}", out)
    records = [earlier_record(args.out, s) if args.resume else Record() for s in plan]
    display = report.make_display(out, not args.no_progress)
    results = []
    try:
        for settings, record in zip(plan, records, strict=True):
            path = checkpoint_path(args.out, settings)
            if not record.finished(settings.steps):
                run = StackRun(settings, corpus)
                if args.resume and path.exists():
                    run.load(path)
                display.start(settings, run.record.step)
                run.train(path, args.checkpoint_every, display.update)
                record = run.record
            results.append((settings, record))
    finally:
        display.close()
    print_report(results, corpus, sizes, args, f"{args.size} {name}", out)
    return any(record.diverged_at for _, record in results)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    args.json, folder, bad = None, args.out, False
    try:
        corpus = load_corpus(args.corpus, args.seq or SIZES[args.size]["seq"])
        for name in MODELS if args.model == "both" else [args.model]:
            args.out = folder / name
            bad = compare(args, name, corpus, sys.stdout) or bad
    except UserError as error:
        print(f"symmetry.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; the same command with --resume continues.", file=sys.stderr)
        return 130
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
