"""Train one small model in two ways and count what each keeps in memory, at its peak.

python examples/memory.py               both ways, 200 steps, and what a LLaMA needs
python examples/memory.py --quick       a smaller model and 20 steps, for a first look

The first way is float32 weights with torch.optim.AdamW. The second is bfloat16 weights, written by
stochastic rounding, with GaLore in 8 bits and step_in_backward, which frees each gradient as soon
as its weight has moved. Both see the same start and the same batches.

CPUs without instructions for bfloat16 emulate its matrix products. So linear layers compute them in
float32 there, from bfloat16 weights and activations; what they keep for the backward pass is
bfloat16.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from common import (
    ByteLM,
    Corpus,
    build_model,
    draw_batch,
    load_corpus,
    validation_batches,
    write_atomically,
)
from methods import BETAS, UserError, schedule, state_bytes
from pretrain import make_folder, positive, run_or_explain
from report import COLOURS, align, clean, write_text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stiefel.optimizers import GaLore, MemoryReport, memory_report

KINDS = ("weights", "gradients", "state", "temporaries", "activations")
SHAPE = {"d": 192, "layers": 6, "heads": 4, "seq": 64, "batch": 2}
QUICK = {"d": 64, "layers": 3, "heads": 2, "seq": 32, "batch": 2}
GALORE: dict[str, Any] = {"rank": 0.25, "state_dtype": "int8", "write": "stochastic"}
RATES = {"float32": 1e-3, "bfloat16": 1e-2}
"""Of AdamW, and of GaLore, which multiplies it by ``scale``; its AdamW takes the first one."""
CARDS = (24, 48, 80)
LLAMA = {"7B": (4096, 11008, 32), "13B": (5120, 13824, 40)}
"""Width, width of the feed-forward part, layers; the vocabulary has 32000 entries."""


# ----------------------------------------------------------------------------------- the meter


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """The storages below the tensors, by identity: views count once."""
    return {x.untyped_storage()._cdata for x in tensors}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, as a context, live bytes of weights, gradients, state and all that is new.

    Storages that begin inside the context and are neither weight, gradient nor state are
    temporaries of the optimizer while ``in_step`` is set, and activations otherwise (what forward
    and backward pass keep; a gradient on its way to ``.grad`` is one of them). Buffers that a
    kernel makes and frees inside itself are not seen.

    Attributes:
        in_step: Whether the optimizer works now; the training loop sets it.
        live: Bytes of all that is alive: weights, and what has begun inside.
        highest: The largest value that ``live`` had.
        peak: Bytes of each kind at the moment of ``highest``, of which they are the parts.
        most: The largest value of each kind by itself, over all moments.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.optimizer, self.params = optimizer, list(model.parameters())
        self.in_step = False
        self.live = self.highest = self.working = 0
        self.peak, self.most = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        self.sizes: dict[int, int] = {}
        self.from_step: set[int] = set()
        for p in self.params:
            self.add(p)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; a storage that comes out and did not go in is new."""
        kwargs = kwargs or {}
        old = storages(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in old:
                self.add(x)
        # Sorting by kind takes longer than an operator, so it is done where a record falls.
        if self.live > self.highest or self.working > self.most["temporaries"]:
            self.look()
        return out

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.live += size
            if self.in_step:
                self.from_step.add(key)
                self.working += size
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        size = self.sizes.pop(key)
        self.live -= size
        self.leave_step([key], {key: size})

    def leave_step(self, keys: Iterable[int], sizes: dict[int, int]) -> None:
        """These are no temporaries: they are freed, or have become state."""
        for key in self.from_step.intersection(keys):
            self.from_step.discard(key)
            self.working -= sizes[key]

    def restart(self) -> None:
        """Forget the first step, where state begins as what cannot be told from temporaries."""
        self.highest, self.most = 0, dict.fromkeys(KINDS, 0)
        self.look()

    def look(self) -> None:
        """Sort what is alive by its kind."""
        values = [x for entry in self.optimizer.state.values() for x in entry.values()]
        for x in values:
            if isinstance(x, Tensor):  # torch.tensor(0.0) is no operator, so nobody has seen it
                self.add(x)
        named = {
            "weights": storages(self.params),
            "gradients": storages(p.grad for p in self.params if p.grad is not None),
            "state": storages(x for x in values if isinstance(x, Tensor)),
        }
        self.leave_step(named["state"], self.sizes)
        now = {kind: sum(self.sizes.get(key, 0) for key in keys) for kind, keys in named.items()}
        now["temporaries"] = self.working
        now["activations"] = self.live - sum(now.values())
        self.most = {kind: max(self.most[kind], now[kind]) for kind in KINDS}
        if self.live > self.highest:
            self.highest, self.peak = self.live, now


# ------------------------------------------------------------------------------------ the runs


class Product(torch.autograd.Function):
    """X W^T in float32 from operands of lower precision, which are all that it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x.float() @ weight.float().mT).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2).float()
        of_x = (grad.float() @ weight.float()).to(x.dtype)
        return of_x, (rows.mT @ x.flatten(0, -2).float()).to(weight.dtype)


def to_bfloat16(model: ByteLM) -> ByteLM:
    """The model in bfloat16; on CPUs its linear layers compute in float32."""
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_cuda:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
    return model


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = Product.apply(x, module.weight)  # type: ignore[no-untyped-call]
    return out


@dataclass
class Outcome:
    """What one run logged and what the meter saw.

    ``state_bytes`` is counted from the state at the end, ``reported_state`` by ``memory_report``,
    and ``largest_two`` are the bytes of the two largest weights, and so of their gradients.
    """

    way: str
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    state_bytes: int = 0
    reported_state: int = 0
    largest_two: int = 0
    seconds: float = 0.0


class Trainer:
    """One of the two ways: model, optimizer and what happens in a step."""

    def __init__(self, way: str, shape: dict[str, int], steps: int, seed: int, gap: int) -> None:
        sizes = {key: value for key, value in shape.items() if key != "batch"}
        self.model = build_model(**sizes, seed=seed)
        self.way, self.optimizer = way, self.make_optimizer(way, gap)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, steps)
        )
        self.meter = Meter(self.model, self.optimizer)
        self.handle: Any = nullcontext()
        if way == "bfloat16":
            self.mark_step(True)  # hooks are called in the order of their registration
            self.handle = self.optimizer.step_in_backward()
            self.mark_step(False)

    def make_optimizer(self, way: str, gap: int) -> Any:
        if way == "float32":
            return torch.optim.AdamW(
                self.model.parameters(), RATES[way], betas=BETAS, weight_decay=0.0
            )
        to_bfloat16(self.model)
        fixed: dict[str, Any] = {"adamw_lr": RATES["float32"], "adamw_betas": BETAS}
        return GaLore(self.model, RATES[way], betas=BETAS, update_proj_gap=gap, **(fixed | GALORE))

    def mark_step(self, begins: bool) -> None:
        """Tell the meter when a gradient has come and when its weight has moved."""

        def hook(_: Tensor) -> None:
            if begins:
                self.meter.look()
            self.meter.in_step = begins

        for p in self.model.parameters():
            p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def step(self, batch: Tensor) -> float:
        loss = self.model.loss(batch)
        torch.autograd.backward(loss)
        if self.way == "float32":  # the other way has stepped already
            self.meter.look()
            self.meter.in_step = True
            self.optimizer.step()
            self.meter.in_step = False
            self.optimizer.zero_grad()
        self.scheduler.step()
        return loss.item()

    def outcome(self) -> Outcome:
        sizes = sorted(p.nbytes for p in self.model.parameters())
        report: Any = None
        if self.way == "bfloat16":
            report = MemoryReport.of(self.optimizer)
        else:  # AdamW's state stands beside the report of every class
            report = memory_report(self.model, GaLore)
        return Outcome(
            self.way,
            peak=self.meter.peak,
            most=self.meter.most,
            state_bytes=state_bytes(self.optimizer),
            reported_state=report.state if self.way == "bfloat16" else report.adamw,
            largest_two=sum(sizes[-2:]),
        )


def train(
    way: str, corpus: Corpus, shape: dict[str, int], steps: int, seed: int, say: Callable[..., None]
) -> Outcome:
    """A whole run; the meter counts from the second step to one after the next choice of a basis.

    Later steps repeat these. Counting doubles their time.
    """
    gap = max(2, steps // 8)
    trainer, begin = Trainer(way, shape, steps, seed, gap), time.monotonic()
    generator = torch.Generator().manual_seed(1000 + seed)
    held_out = validation_batches(corpus, shape["seq"])[:4]
    losses: list[float] = []
    validation = [validate(trainer.model, held_out)]
    with trainer.handle:
        for step in range(steps):
            with trainer.meter if step <= gap + 1 else nullcontext():
                batch = draw_batch(corpus.train, shape["batch"], shape["seq"], generator)
                losses.append(trainer.step(batch))
                del batch
                if step == 0:
                    trainer.meter.restart()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                say(f"{way:<9} {step + 1:>5}/{steps}  loss {mean(losses[-20:]):.3f}")
    validation.append(validate(trainer.model, held_out))
    outcome = trainer.outcome()
    outcome.losses, outcome.validation = losses, validation
    outcome.seconds = time.monotonic() - begin
    return outcome


def validate(model: ByteLM, batches: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return mean([model.loss(batch).item() for batch in batches])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------- LLaMA, on paper


class Need(NamedTuple):
    """Bytes of a model in one of the two ways, without activations."""

    model: str
    way: str
    weights: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state


def llama(d: int, ffn: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """Names and shapes of a LLaMA on the meta device: no forward, no memory."""
    make = partial(nn.Linear, bias=False, device="meta", dtype=dtype)
    square = ("q_proj", "k_proj", "v_proj", "o_proj")
    blocks = [
        nn.ModuleDict(
            {
                **{name: make(d, d) for name in square},
                **{name: make(d, ffn) for name in ("gate_proj", "up_proj")},
                "down_proj": make(ffn, d),
                **{f"norm{i}": nn.RMSNorm(d, device="meta", dtype=dtype) for i in (1, 2)},
            }
        )
        for _ in range(layers)
    ]
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(32000, d, device="meta", dtype=dtype),
            "layers": nn.ModuleList(blocks),
            "norm": nn.RMSNorm(d, device="meta", dtype=dtype),
            "lm_head": make(d, 32000),
        }
    )


def needs(model: str) -> tuple[Need, Need]:
    """Both ways: all gradients at a time, and no more than those of the two largest layers."""
    full = memory_report(llama(*LLAMA[model], torch.float32), GaLore)
    lean = memory_report(llama(*LLAMA[model], torch.bfloat16), GaLore, **GALORE)
    largest = sorted(row.gradient for row in lean.rows)[-2:]
    return (
        Need(model, "float32", full.weight, full.gradient, full.adamw),
        Need(model, "bfloat16", lean.weight, sum(largest), lean.state),
    )


# -------------------------------------------------------------------------------------- report

WAYS = {
    "float32": "float32, AdamW",
    "bfloat16": "bfloat16, GaLore in 8 bits, step_in_backward",
}


def measured_table(outcomes: Sequence[Outcome]) -> str:
    """MB at the peak; in brackets the most of each kind by itself, which comes at other moments."""
    cells = [["MB at the peak (most of its kind)", *KINDS, "sum"]]
    for o in outcomes:
        sizes = [f"{o.peak[kind] / 1e6:.2f} ({o.most[kind] / 1e6:.2f})" for kind in KINDS]
        cells.append([WAYS[o.way], *sizes, f"{sum(o.peak.values()) / 1e6:.2f}"])
    return align(cells)


def loss_table(outcomes: Sequence[Outcome]) -> str:
    cells = [["nats per byte", "before", "after", "last 20 steps of training", "seconds"]]
    for o in outcomes:
        numbers = [f"{x:.3f}" for x in (*o.validation, mean(o.losses[-20:]))]
        cells.append([WAYS[o.way], *numbers, f"{o.seconds:.0f}"])
    return align(cells)


def llama_table(found: Sequence[Need]) -> str:
    head = ["GB (10^9 bytes)", "weights", "gradients", "state", "sum"]
    cells = [[*head, *(f"left of {card} GB" for card in CARDS)]]
    for need in found:
        sizes = (need.weights, need.gradients, need.state, need.total)
        left = [card - need.total / 1e9 for card in CARDS]
        cells.append(
            [
                f"LLaMA {need.model}, {WAYS[need.way]}",
                *(f"{size / 1e9:.1f}" for size in sizes),
                *(f"{room:.1f}" if room > 0 else "does not fit" for room in left),
            ]
        )
    return align(cells)


def plot(path: Path, outcomes: Sequence[Outcome], found: Sequence[Need]) -> bool:
    """Stacked bars: measured on the left, computed for LLaMA on the right; False: no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    names = {"float32": "float32\nAdamW", "bfloat16": "bfloat16\nGaLore int8\nstep_in_backward"}
    stack(left, [names[o.way] for o in outcomes], [o.peak for o in outcomes], 1e6)
    left.set_ylabel("MB")
    left.set_title("Small model: measured at the peak")
    bars = [dict(zip(KINDS, (n.weights, n.gradients, n.state), strict=False)) for n in found]
    stack(right, [f"LLaMA {n.model}\n{names[n.way]}" for n in found], bars, 1e9)
    for card in CARDS:
        right.axhline(card, ls=":", color="black", lw=1)
        # to the right of the last bar, so that no bar hides it
        right.text(len(found) - 0.42, card, f" {card} GB", va="center", clip_on=False)
    right.set_ylabel("GB (10^9 bytes)")
    right.set_title("LLaMA: computed from shapes, without activations")
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
    return True


def stack(axes: Any, names: Sequence[str], bars: Sequence[dict[str, int]], unit: float) -> None:
    """One bar a name, its kinds on each other, the sum above."""
    base = [0.0] * len(bars)
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        heights = [bar.get(kind, 0) / unit for bar in bars]
        axes.bar(range(len(bars)), heights, 0.6, base, color=colour, label=kind)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    # white behind the number, so that no line strikes it through
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for i, top in enumerate(base):
        place: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{top:.1f}", (i, top), fontweight="bold", bbox=box, **place)
    axes.set_xticks(range(len(bars)), names)
    axes.set_xlim(-0.5, len(bars) - 0.45)
    axes.set_ylim(0, 1.08 * max(base))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def print_report(
    outcomes: Sequence[Outcome], found: Sequence[Need], folder: Path, out: TextIO
) -> None:
    totals = [sum(o.peak.values()) for o in outcomes]
    print(f"\n{measured_table(outcomes)}\n", file=out)
    print(f"The peak of the second way is {totals[1] / totals[0]:.0%} of the first.", file=out)
    print(f"\n{loss_table(outcomes)}\n", file=out)
    print(f"{llama_table(found)}\n", file=out)
    print(
        "Computed from shapes by memory_report, without activations and temporaries: what is left\n"
        "of a card is for them. The first way holds all gradients at a time; the second, by\n"
        "step_in_backward, at most those of the two largest layers (embedding and head).",
        file=out,
    )
    content = {
        "runs": [asdict(o) for o in outcomes],
        "llama": [{**need._asdict(), "total": need.total} for need in found],
    }
    write_text(folder / "results.json", json.dumps(clean(content), indent=1, allow_nan=False))
    files = "results.json"
    if plot(folder / "memory.png", outcomes, found):
        files += ", memory.png"
    else:
        print("Note: no picture without matplotlib (pip install matplotlib).", file=out)
    print(f"\nWritten to {folder}: {files}", file=out)


# ---------------------------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="default: 200")
    length.add_argument("--quick", action="store_true", help="a small model, 20 steps")
    add("--seed", type=int, default=0, help="start and batches; default: 0")
    add("--corpus", default="code", help="code (default), prose, or a file")
    for name, value in SHAPE.items():
        add(f"--{name}", type=positive, metavar="N", help=f"default: {value}")
    add("--threads", type=positive, default=1, metavar="N", help="default: 1")
    add("--out", type=Path, default=Path("runs/memory"), metavar="DIR")
    add("--json", action="store_true", help="print results.json, and all else to stderr")
    add("--no-progress", action="store_true", help="no lines while training")
    return parser


def work(args: argparse.Namespace, out: TextIO) -> int:
    torch.set_num_threads(args.threads)
    preset = QUICK if args.quick else SHAPE
    shape = {key: getattr(args, key) or value for key, value in preset.items()}
    if shape["d"] % (2 * shape["heads"]):
        raise UserError(f"--d {shape['d']} must be a multiple of twice --heads {shape['heads']}.")
    steps = 20 if args.quick else args.steps or 200
    corpus = load_corpus(args.corpus, shape["seq"])
    make_folder(args.out)
    say = partial(print, file=out, flush=True) if not args.no_progress else lambda *_: None
    outcomes = [train(way, corpus, shape, steps, args.seed, say) for way in WAYS]
    found = [need for model in LLAMA for need in needs(model)]
    print_report(outcomes, found, args.out, out)
    if args.json:
        print((args.out / "results.json").read_text())
    return int(not all(math.isfinite(o.validation[-1]) for o in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_explain("memory.py", work, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
