"""QK-clip: a learning rate at which attention logits explode, without it and with it.

python examples/qk_clip.py --out runs/qk-clip

A small byte-level language model is trained by Muon at twenty times the learning rate that suits
it, without weight decay. Every step moves all directions of a query and key weight by one amount,
so their products, the logits, grow without end; the softmax becomes a choice of one key and its
gradient vanishes. `qk_clip_` scales queries and keys of heads above the threshold after each step.
It is told the largest logit of every head, which the attention below records as it goes. The plot
has the loss and the largest logit of both runs. Fused kernels do not return the largest logit but
for FlexAttention: `record.flex_attention(self, q, k, v, block_mask=mask)` on an accelerator.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    Block,
    ByteLM,
    Corpus,
    LanguageModel,
    UserError,
    draw_batch,
    load_corpus,
    rotate,
    started,
    validation_batches,
)
from torch import Tensor

from stiefel.optimizers import MaxLogits, Muon, qk_clip_

SHAPE = {"d": 64, "layers": 2, "heads": 4, "seq": 64}
LR, ADAMW_LR, BATCH, MICRO = 0.2, 3e-3, 16, 2
WAYS = {False: "without QK-clip", True: "with QK-clip"}


class EagerBlock(Block):
    """A block whose attention makes its logits one by one, and says what the largest was."""

    record: MaxLogits

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        logits = q @ k.mT / math.sqrt(q.shape[-1])  # (batch, heads, queries, keys)
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        logits = self.record(self, logits.masked_fill(later, -math.inf))
        mixed = logits.softmax(-1) @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class EagerLM(ByteLM):
    """The byte model of the other examples with such blocks."""

    def __init__(self, d: int, layers: int, heads: int, seq: int) -> None:
        super().__init__(d, layers, heads, seq)
        self.blocks = torch.nn.ModuleList(EagerBlock(d, heads) for _ in range(layers))


def train(clip: bool, corpus: Corpus, steps: int, lr: float, threshold: float) -> dict[str, Any]:
    """Losses and largest logits of a run, step by step, and its validation loss."""
    model = EagerLM(**SHAPE)
    started(model, SHAPE["layers"], seed=0)
    record = MaxLogits(model)  # modules are called by their names in it
    for block in model.blocks:
        block.record = record
    optimizer = Muon(model, lr=lr, adamw_lr=ADAMW_LR, weight_decay=0.0)
    generator, losses, largest = torch.Generator().manual_seed(1), [], []
    for _ in range(steps):
        batch = draw_batch(corpus.train, BATCH, SHAPE["seq"], generator)
        loss = 0.0
        for part in batch.chunk(MICRO):  # the largest logit is that of all micro batches
            part_loss = model.loss(part) / MICRO
            part_loss.backward()
            loss += part_loss.item()
        optimizer.step()
        optimizer.zero_grad()
        logits = record.take()
        if clip:
            qk_clip_(model, logits, threshold=threshold, optimizer=optimizer)
        losses.append(loss)
        largest.append(max(S.max().item() for S in logits.values()))
    return {
        "clip": clip, "loss": losses, "largest": largest,
        "validation": validate(model, corpus),
    }  # fmt: skip


@torch.no_grad()
def validate(model: LanguageModel, corpus: Corpus) -> float:
    """Mean loss of the validation batches."""
    batches = validation_batches(corpus, SHAPE["seq"])
    return sum(model.loss(batch).item() for batch in batches) / len(batches)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each run."""
    lines = [f"{'run':<18}{'largest logit':>14}{'loss, last tenth':>18}{'validation':>12}"]
    for run in runs:
        last = run["loss"][-max(1, len(run["loss"]) // 10) :]
        lines.append(
            f"{WAYS[run['clip']]:<18}{max(run['largest']):>14.0f}{sum(last) / len(last):>18.3f}"
            f"{run['validation']:>12.3f}"
        )
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], threshold: float, path: Path) -> None:
    """Loss and largest logit of both runs over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run, color in zip(runs, ("tab:red", "tab:blue"), strict=True):
        spans = (run["loss"][max(0, i - 9) : i + 1] for i in range(len(run["loss"])))
        smooth = [sum(span) / len(span) for span in spans]
        steps = range(1, len(smooth) + 1)
        left.plot(steps, run["loss"], color=color, alpha=0.25, linewidth=0.8)
        left.plot(steps, smooth, color=color, label=WAYS[run["clip"]])
        right.plot(steps, run["largest"], color=color, label=WAYS[run["clip"]])
    right.axhline(threshold, color="gray", linestyle="--", label=f"threshold {threshold:g}")
    right.set(yscale="log", xlabel="step", ylabel="largest logit of all heads")
    low = min(min(run["loss"]) for run in runs)
    left.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(low - 0.05, low + 1.5))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--threshold", type=float, default=100.0)
    parser.add_argument("--corpus", default="code", help="code, prose or a file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/qk-clip"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        corpus = load_corpus(args.corpus, SHAPE["seq"])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    begin = time.monotonic()
    runs = [train(clip, corpus, args.steps, args.lr, args.threshold) for clip in WAYS]
    print(table(runs))
    draw(runs, args.threshold, args.out / "qk_clip.png")
    (args.out / "results.json").write_text(json.dumps(runs))
    print(f"{time.monotonic() - begin:.0f} s; {args.out / 'qk_clip.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
