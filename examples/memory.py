"""Train one small model twice and measure where the memory goes; then count it for LLaMA.

python examples/memory.py                 60 steps each way, a table and runs/memory/memory.png
python examples/memory.py --steps 200 --out runs/memory
python examples/memory.py --quick         tiny: does it run at all

The first way is torch.optim.AdamW on float32 weights. The second is GaLore with 8-bit state on
bfloat16 weights, whose writes are rounded by random bits, and each weight steps inside of the
backward pass and frees its gradient. Every allocation that torch makes is counted, and the peak is
what was alive at the worst moment. Products are made in float32 from the bfloat16 weights, as many
CPUs emulate bfloat16 products slowly; float32 copies of weights live for one product.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ByteLM, build_model, draw_batch, load_corpus, write_atomically
from pretrain import positive
from report import COLOURS, align, write_text
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stiefel.optimizers import GaLore, memory_report

PARTS = ("weights", "gradients", "state", "activations and temporaries")
ADAMW, GALORE = "AdamW, float32", "GaLore int8, bfloat16, steps in backward"
LLAMAS = {"LLaMA 7B": (4096, 11008, 32), "LLaMA 13B": (5120, 13824, 40)}
"""Width, width of the feed-forward part, layers; vocabulary 32000."""
CARDS = (24, 48, 80)
"""GiB."""


# ------------------------------------------------------------------------------------ counting


class Ledger(TorchDispatchMode):
    """Counts as a context what torch allocates, and says what was alive at the peak.

    Buffers that a kernel makes and frees inside itself are not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.params = list(model.parameters())
        self.optimizer: Optimizer | None = None
        self.weights = sum(p.nbytes for p in self.params)
        self.live = self.gradients = 0
        self.peak = dict.fromkeys(PARTS, 0)
        self._born: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and count the storages that come out of it for the first time."""
        out = func(*args, **(kwargs or {}))
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _key(x) not in given | self._born:
                self._count(x)
        return out

    def _count(self, x: Tensor) -> None:
        storage, key, size = x.untyped_storage(), _key(x), x.untyped_storage().nbytes()
        self._born.add(key)
        self.live += size
        weakref.finalize(storage, self._free, key, size)
        if self.weights + self.live > sum(self.peak.values()):
            self.peak = self._parts()

    def _free(self, key: int, size: int) -> None:
        self._born.discard(key)
        self.live -= size

    def _parts(self) -> dict[str, int]:
        """What is alive now."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        grads = [p.grad for p in self.params if p.grad is not None]
        sizes = [_bytes(grads), _bytes(x for entry in state for x in entry.values())]
        return dict(zip(PARTS, (self.weights, *sizes, self.live - sum(sizes)), strict=True))

    def see_gradients(self, _: Tensor) -> None:
        """Hook of a parameter whose gradient has been accumulated."""
        self.gradients = max(
            self.gradients, _bytes(p.grad for p in self.params if p.grad is not None)
        )


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(values: Any) -> int:
    """Bytes of the storages of tensors, each once; other values count nothing."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    return sum({_key(x): x.untyped_storage().nbytes() for x in tensors}.values())


# ------------------------------------------------------------------------------- low precision


class Float32Linear(torch.autograd.Function):
    """X W^T in float32 for a bfloat16 weight, of which no float32 copy is kept for backward."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor) -> Tensor:
        """X (..., n) and W (m, n) to (..., m)."""
        ctx.save_for_backward(X, W)
        return F.linear(X, W.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of X, in float32, and of W, in its dtype."""
        (G,), (X, W) = grads, ctx.saved_tensors
        return G @ W.float(), (G.flatten(0, -2).mT @ X.flatten(0, -2)).to(W.dtype)


def compute_in_float32(model: nn.Module) -> None:
    """Let layers with bfloat16 weights take and give float32."""

    def norm(layer: nn.RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, tuple(layer.normalized_shape), layer.weight.float(), layer.eps)

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = lambda x, W=layer.weight: Float32Linear.apply(x, W)  # type: ignore[misc, no-untyped-call]
        elif isinstance(layer, nn.Embedding):
            layer.forward = lambda ids, W=layer.weight: F.embedding(ids, W).float()  # type: ignore[misc]
        elif isinstance(layer, nn.RMSNorm):
            layer.forward = lambda x, layer=layer: norm(layer, x)  # type: ignore[misc]


# ------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Outcome:
    """What one way of training has taken.

    Attributes:
        name: Its name.
        peak: Bytes by part at the worst moment.
        gradients: The most bytes of gradients at any moment.
        reported: Bytes of state by ``memory_report``, None for torch's optimizer.
        before: Mean loss of the first steps.
        after: Mean loss of the last steps.
    """

    name: str
    peak: dict[str, int]
    gradients: int
    reported: int | None
    before: float
    after: float


def train(name: str, args: argparse.Namespace) -> Outcome:
    """Train one way, with every allocation counted."""
    corpus = load_corpus("code", args.seq)
    model = build_model(args.d, args.layers, 4, args.seq, args.seed)
    options: dict[str, Any] = {"rank": 0.25, "state_dtype": "int8", "update_proj_gap": 50}
    if name == GALORE:
        model.bfloat16()
        for buffer in (model.cos, model.sin):
            buffer.data = buffer.data.float()
        compute_in_float32(model)
    ledger, losses = Ledger(model), list[float]()
    optimizer: Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-3)
        if name == ADAMW
        else GaLore(model, lr=1e-2, adamw_lr=1e-3, **options)
    )
    ledger.optimizer = optimizer
    with ledger, _stepping(optimizer, ledger) as step:
        generator = torch.Generator().manual_seed(1000 + args.seed)
        for _ in range(args.steps):
            losses.append(
                _train_step(model, draw_batch(corpus.train, args.batch, args.seq, generator))
            )
            step()
    few = max(1, min(10, args.steps // 4))
    before, after = sum(losses[:few]) / few, sum(losses[-few:]) / few
    reported = memory_report(model, GaLore, **options).state if name == GALORE else None
    return Outcome(name, ledger.peak, ledger.gradients, reported, before, after)


def _train_step(model: ByteLM, batch: Tensor) -> float:
    loss = model.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


@contextlib.contextmanager
def _stepping(optimizer: Optimizer, ledger: Ledger) -> Iterator[Any]:
    """What is to be called after a backward pass: nothing where that has stepped already."""
    # hooks run in the order in which they were registered, so this one sees what the next one frees
    hooks = [p.register_post_accumulate_grad_hook(ledger.see_gradients) for p in ledger.params]
    try:
        if isinstance(optimizer, GaLore):
            with optimizer.step_in_backward():
                yield lambda: None
        else:

            def step() -> None:
                optimizer.step()
                optimizer.zero_grad()

            yield step
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------------------- LLaMA


def llama(d: int, ffn: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """Names and shapes of a LLaMA model, on the meta device: nothing is allocated."""

    def layer() -> nn.ModuleDict:
        sides = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (d, d))
        sides |= {"gate_proj": (d, ffn), "up_proj": (d, ffn), "down_proj": (ffn, d)}
        parts = {name: nn.Linear(*s, bias=False, dtype=dtype) for name, s in sides.items()}
        norms = {f"{name}_layernorm": nn.RMSNorm(d, dtype=dtype) for name in ("input", "post")}
        return nn.ModuleDict({**parts, **norms})

    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(32000, d, dtype=dtype),
                "layers": nn.ModuleList(layer() for _ in range(layers)),
                "norm": nn.RMSNorm(d, dtype=dtype),
                "lm_head": nn.Linear(d, 32000, bias=False, dtype=dtype),
            }
        )


def llama_rows() -> list[list[str]]:
    """A line for each model and way: GiB of weights, gradients and state, and what cards hold."""
    lines = [["", "", *PARTS[:3], "sum", *(f"left of {card} GiB" for card in CARDS)]]
    for name, sides in LLAMAS.items():
        whole = memory_report(llama(*sides, torch.float32), GaLore, rank=0.25)
        low = llama(*sides, torch.bfloat16)
        lean = memory_report(low, GaLore, rank=0.25, state_dtype="int8")
        two_largest = sum(sorted((p.nbytes for p in low.parameters()), reverse=True)[:2])
        for way, sizes in (
            (ADAMW, (whole.weight, whole.gradient, whole.adamw)),
            (GALORE, (lean.weight, two_largest, lean.state)),
        ):
            total = sum(sizes) / 2**30
            rests = [f"{card - total:.1f}" if total < card else "does not fit" for card in CARDS]
            lines.append([name, way, *(f"{x / 2**30:.1f}" for x in sizes), f"{total:.1f}", *rests])
    return lines


# -------------------------------------------------------------------------------------- output


def measured_rows(ways: Sequence[Outcome]) -> list[list[str]]:
    """A line for each way: MiB at the peak, and the loss."""
    lines = [["", *PARTS, "peak", "loss before", "after"]]
    for way in ways:
        sizes = [f"{way.peak[part] / 2**20:.1f}" for part in PARTS]
        peak = f"{sum(way.peak.values()) / 2**20:.1f}"
        lines.append([way.name, *sizes, peak, f"{way.before:.2f}", f"{way.after:.2f}"])
    return lines


def draw(path: Path, ways: Sequence[Outcome]) -> bool:
    """Draw a stacked bar for each way; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(ways)
    names = [way.name.replace(", ", ",\n", 1) for way in ways]
    top = max(sum(way.peak.values()) for way in ways) / 2**20
    for part, colour in zip(PARTS, COLOURS, strict=False):
        widths = [way.peak[part] / 2**20 for way in ways]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.6)
        for y, (x, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.045 * top:  # narrower ones have no room for a number
                axes.text(x + width / 2, y, f"{width:.0f}", ha="center", va="center", color="white")
        left = [x + width for x, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("MiB alive at the worst moment")
    axes.set_title("Where the memory goes")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("steps", 60), ("d", 256), ("layers", 6), ("seq", 64), ("batch", 2)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument("--quick", action="store_true", help="tiny: does it run at all")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.d, args.layers, args.seq = 12, 64, 2, 32
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train both ways, print the tables, write results.json and memory.png."""
    args = parse(argv)
    ways = [train(name, args) for name in (ADAMW, GALORE)]
    measured, counted = align(measured_rows(ways)), align(llama_rows())
    ratio = sum(ways[1].peak.values()) / sum(ways[0].peak.values())
    text = (
        f"MiB at the worst moment, of {args.layers} layers of width {args.d}:\n{measured}\n"
        f"The second way takes {ratio:.2f} of the first, and its gradients "
        f"{ways[1].gradients / ways[0].gradients:.2f} at most.\n\n"
        f"GiB by memory_report, without activations; gradients of the second way are those of the "
        f"two largest weights:\n{counted}"
    )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "memory.txt", text)
    write_text(args.out / "results.json", json.dumps([asdict(way) for way in ways], indent=1))
    drawn = draw(args.out / "memory.png", ways)
    print(f"\n{args.out / 'memory.png'}" if drawn else "\nNo picture: matplotlib is missing.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
