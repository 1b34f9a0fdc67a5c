"""Which learning rate: the best one for every optimizer, at three widths of a small model.

    python bench/which_lr.py                                   half an hour on one core
    python bench/which_lr.py --methods muon,galore --widths 32,64

The byte model of examples/ with two layers, 100 steps, one seed. The rate of the hidden matrices is
swept from the default of examples/methods.py, up and down by factors of about 3 until the loss
rises on either side; embedding, head and norms have the same AdamW in every run. Prints a table in
Markdown: the best rate at each width and its loss.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from common import build_model, draw_batch, load_corpus, validation_batches
from methods import available_methods, build_optimizer, default_lr, method_options, schedule

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
LAYERS, NUM_HEADS, SEQ, ROWS = 2, 2, 64, 8


def loss_of(name: str, lr: float, width: int, steps: int, corpus, batches) -> float:
    """Validation loss after a short training; infinite where it has no value."""
    model = build_model(width, LAYERS, NUM_HEADS, SEQ, seed=0)
    optimizer = build_optimizer(name, model, lr, method_options(name, width, {}))
    rates = [group["lr"] for group in optimizer.param_groups]
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, steps)
        optimizer.zero_grad()
        model.loss(draw_batch(corpus.train, ROWS, SEQ, draw)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        loss = float(torch.stack([model.loss(batch) for batch in batches]).mean())
    return loss if loss == loss else float("inf")


def sweep(run, start: float) -> tuple[float, float]:
    """The best rate of the grid and its loss: both neighbours that it has are worse."""
    losses: dict[int, float] = {}

    def at(i: int) -> float:
        if not 0 <= i < len(RATES):
            return float("inf")
        if i not in losses:
            losses[i] = run(RATES[i])
        return losses[i]

    i = min(range(len(RATES)), key=lambda k: abs(math.log(RATES[k] / start)))
    while True:
        best = min((i, i + 1, i - 1), key=at)
        if best == i:
            return RATES[i], losses[i]
        i = best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(available_methods()))
    parser.add_argument("--widths", default="32,64,128")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus("code", SEQ)
    batches = validation_batches(corpus, SEQ)[:8]
    widths = [int(width) for width in args.widths.split(",")]
    print("| optimizer | " + " | ".join(f"width {width}" for width in widths) + " | seconds |")
    print("|---|" + "---|" * (len(widths) + 1), flush=True)
    for name in args.methods.split(","):
        start, cells = time.perf_counter(), []
        for width in widths:
            setting = {"width": width, "steps": args.steps, "corpus": corpus, "batches": batches}
            lr, loss = sweep(partial(loss_of, name, **setting), default_lr(name))
            cells.append(f"{lr:g}: {loss:.3f}")
        seconds = time.perf_counter() - start
        print(f"| `{name}` | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
