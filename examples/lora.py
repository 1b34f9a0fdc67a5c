"""Adapt a small language model to another text by LoRA, and compare optimizers of its pairs.

python examples/lora.py                     pretrain on code (once), adapt to prose, 100 steps each
python examples/lora.py --compare adamw,altlora+ --lr altlora+=0.02 --seeds 3
python examples/lora.py --hf                the same model in transformers, its adapters by peft

Every method starts from the same base model, which is trained once and kept in --out, and from the
same adapters; SwitchLoRA draws both factors and takes their product from the weight, as it must.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TextIO

import pretrain
import report
import torch
from adapters import peft_model, plain_model, start_adapters
from common import Corpus, LanguageModel, Run, Settings, build_model, load_corpus
from methods import BETAS, UserError, default_lr, exported_methods, method_options
from torch import Tensor, nn

from stiefel.optimizers import AdaPreLoRA, AltLoRA, SwitchLoRA, lora_param_groups

BASE_SEED, BASE_STEPS, QUICK_BASE_STEPS, STEPS = 7, 400, 60, 100


class Method(NamedTuple):
    """A class, its learning rate, and the keywords that make the method of it."""

    cls: type[torch.optim.Optimizer]
    lr: float
    settings: dict[str, Any]


# The best lr of a sweep on "micro", from "code" to "prose" (rank 8, 100 steps, seed 0). Other
# methods of pairs take part with the defaults of their constructors.
METHODS = {
    "adamw": Method(torch.optim.AdamW, 2e-2, {}),
    "altlora": Method(AltLoRA, 10.0, {}),
    "altlora+": Method(AltLoRA, 3e-2, {"second_moment": "elementwise"}),
    "adaprelora": Method(AdaPreLoRA, 3e-2, {}),
    # 11 exchanges of a vector per factor; its own schedule (ratio 0.1) comes to one in 100 steps
    "switchlora": Method(SwitchLoRA, 1e-2, {"ratio": 1.0}),
}
for _name, _cls in exported_methods(pairs=True).items():
    METHODS.setdefault(_name, Method(_cls, inspect.signature(_cls).parameters["lr"].default, {}))


# ---------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class LoRASettings(Settings):
    """What an adaptation depends on besides."""

    rank: int
    alpha: int
    hf: bool
    base: str


class LoRARun(Run):
    """One method adapts the base model."""

    settings: LoRASettings
    floor = 0.0

    def __init__(self, settings: LoRASettings, corpus: Corpus, base: Mapping[str, Tensor]) -> None:
        self.base = base
        super().__init__(settings, corpus)

    def make_model(self, settings: LoRASettings) -> LanguageModel:  # type: ignore[override]
        s = settings
        model = build_model(s.d, s.layers, s.heads, s.seq, seed=0)
        model.load_state_dict(self.base)
        adapted = (peft_model if s.hf else plain_model)(model, s.rank, s.alpha)
        start_adapters(adapted, s.seed, switch=METHODS[s.method].cls is SwitchLoRA)
        return adapted

    def make_optimizer(self, settings: Settings, model: nn.Module) -> torch.optim.Optimizer:  # type: ignore[override]
        cls = METHODS[settings.method].cls
        groups: Any = [p for p in model.parameters() if p.requires_grad]
        if cls is not torch.optim.AdamW:
            groups = lora_param_groups(model, base_weight=cls is SwitchLoRA)
        try:
            return cls(groups, lr=settings.lr, **settings.options)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise UserError(f"{cls.__name__} refuses its options (--set, --lr): {error}") from error


def free_options(name: str) -> list[str]:
    accepted = inspect.signature(METHODS[name].cls).parameters
    return sorted(accepted.keys() - {"params", "groups", "lr", "options"})


def make_plan(
    args: argparse.Namespace, corpus: Corpus, base: Settings, shape: dict[str, int]
) -> list[LoRASettings]:
    methods = pretrain.named_methods(args, ",".join(METHODS))
    for name in methods:
        if name not in METHODS:
            raise UserError(f"Unknown optimizer {name!r}: choose from {', '.join(METHODS)}.")
    lrs = pretrain.parse_lrs(args.lr, methods, lambda name: METHODS[name].lr)
    extra = pretrain.parse_options(args.options, methods, free_options)
    steps = 40 if args.quick else args.steps or STEPS
    shared = {"betas": BETAS, "weight_decay": 0.0}
    options = {name: shared | METHODS[name].settings | extra[name] for name in methods}
    if "switchlora" in options:
        options["switchlora"].setdefault("total_steps", steps)
    return [
        LoRASettings(
            method=name,
            lr=lrs[name],
            options=options[name],
            seed=seed,
            steps=steps,
            val_every=args.val_every,
            corpus=corpus.name,
            corpus_hash=corpus.digest,
            threads=args.threads,
            rank=args.rank,
            alpha=args.alpha or args.rank,
            hf=args.hf,
            base=key_of(base),
            **shape,
        )
        for seed in (range(args.seeds) if args.seeds else [args.seed])
        for name in methods
    ]


def key_of(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]


def base_settings(args: argparse.Namespace, corpus: Corpus, shape: dict[str, int]) -> Settings:
    """Muon, which is soonest there, at the learning rates of pretrain.py."""
    steps = args.base_steps or (QUICK_BASE_STEPS if args.quick else BASE_STEPS)
    lr, options = default_lr("muon"), method_options("muon", shape["d"], {})
    source = {"corpus": corpus.name, "corpus_hash": corpus.digest}
    fixed = {"seed": BASE_SEED, "steps": steps, "val_every": steps, "threads": args.threads}
    return Settings(method="muon", lr=lr, options=options, **fixed, **source, **shape)


def base_run(settings: Settings, corpus: Corpus, args: argparse.Namespace, out: TextIO) -> Run:
    """The base model: from --out if one of these settings is there, else trained."""
    run, path = Run(settings, corpus), args.out / f"base-{key_of(settings)}.pt"
    if path.exists():
        run.load(path)
    if run.record.finished(settings.steps):
        print(f"base model: from {path}", file=out)
        return run
    print(f"base model: {settings.steps} steps on {corpus.name}, once", file=out, flush=True)
    display = report.make_display(out, not args.no_progress)
    try:
        display.start(settings, run.record.step)
        run.train(path, args.checkpoint_every, display.update)
    finally:
        display.close()
    return run


def make_parser() -> argparse.ArgumentParser:
    parser = pretrain.make_parser(
        __doc__, ",".join(METHODS), STEPS, corpus="prose", val_every=25, out="runs/lora"
    )
    add = parser.add_argument
    add("--rank", type=pretrain.positive, default=8, metavar="R", help="default: 8")
    add("--alpha", type=pretrain.positive, metavar="N", help="scale x rank; default: --rank")
    add("--hf", action="store_true", help="transformers' LLaMA and peft's adapters")
    add("--base-corpus", default="code", help="code, prose, or a file; default: code")
    add("--base-steps", type=pretrain.positive, metavar="N", help=f"default: {BASE_STEPS}")
    return parser


def work(args: argparse.Namespace, out: TextIO) -> int:
    torch.set_num_threads(args.threads)
    shape = pretrain.model_shape(args)
    corpus, source = (load_corpus(name, shape["seq"]) for name in (args.corpus, args.base_corpus))
    settings = base_settings(args, source, shape)
    plan = make_plan(args, corpus, settings, shape)
    pretrain.make_folder(args.out)
    untrained = Run(settings, source).model.state_dict()
    for one in {s.method: s for s in plan}.values():
        LoRARun(one, corpus, untrained)  # mistakes are said before the base is trained
    base = base_run(settings, source, args, out)
    make = partial(LoRARun, base=base.model.state_dict())
    start = make(plan[0], corpus)
    before, parameters = start.validate(), list(start.model.parameters())
    sizes = (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
    size = f"{pretrain.describe(args, shape)}, LoRA rank {args.rank}"
    pretrain.print_header(plan, corpus, sizes, size, out, part="in adapters")
    print(
        f"before: {before:.3f} on {corpus.name}; the base has {base.record.final:.3f} on "
        f"{source.name} ({source.digest})",
        file=out,
    )
    results = pretrain.execute(plan, corpus, args, out, make)
    known = {"base_corpus_hash": source.digest, "base_val_loss": before}
    pretrain.print_report(results, corpus, sizes, args, size, out, **known)
    return int(any(record.diverged_at for _, record in results))


def main(argv: Sequence[str] | None = None) -> int:
    return pretrain.run_or_explain("lora.py", work, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
