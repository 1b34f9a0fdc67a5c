"""Does a learning rate found on a small model fit a wider one? With width rules, nearly.

python examples/width.py --out runs/width

1. Coordinates. One network at the widths 64 to 512, all with the learning rates of the narrowest.
   How far does its output move in a few steps? Without a rule more and more, as a weight that is
   w times as wide adds up w times as many equal changes; with ``width_groups`` no farther.
2. Rates. The best learning rate of a narrow and of a wide network, on a grid of powers of two. With
   the rule it is the same or a neighbour, so that a sweep on the narrow one does for both.

Both for AdamW, Muon, GaLore and SymmetryStack; one picture, and a line for each.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stiefel.optimizers import GaLore, Muon, SymmetryStack, width_groups

INPUTS, OUTPUTS, BATCH = 16, 4, 64
WIDTHS, FEW_STEPS = (64, 128, 256, 512), 4
SWEPT, RUN_STEPS = (32, 512), 40

Groups = list[dict[str, Any]]
Make = Callable[[nn.Module, Groups], torch.optim.Optimizer]


class Contender(NamedTuple):
    """An optimizer, the kind of its steps, and the middle of its grid of rates.

    Attributes:
        make: Builds it from a model and its groups.
        step: As ``width_groups`` takes it.
        rate: A rate that is good at the smallest width.
    """

    make: Make
    step: str
    rate: float


CONTENDERS = {
    "AdamW": Contender(lambda model, groups: torch.optim.AdamW(groups), "adam", 2**-8),
    "Muon": Contender(
        lambda model, groups: Muon(groups, model=model, polar="ns5", momentum=0.8), "rms", 2**-6
    ),
    "GaLore": Contender(
        lambda model, groups: GaLore(groups, model=model, rank=0.25, update_proj_gap=10),
        "rms",
        2**-4,
    ),
    "SymmetryStack": Contender(
        lambda model, groups: SymmetryStack(groups, model=model), "rms", 2**-6
    ),
}


def network(width: int, seed: int = 0) -> nn.Sequential:
    """Three layers; the last one starts small, as the rule wants it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(INPUTS, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, OUTPUTS, bias=False),
    )
    for layer, gain in ((0, 1.0), (2, 2.0), (4, 1.0 / width)):
        weight = model[layer].weight
        nn.init.normal_(weight, std=math.sqrt(gain / weight.shape[1]))
    return model


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs, and what a network of its own makes of them."""
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(INPUTS, 24, generator=draw) / INPUTS**0.5
    B = torch.randn(24, OUTPUTS, generator=draw) / 24**0.5
    X = torch.randn(count, BATCH, INPUTS, generator=draw)
    return [(x, (x @ A).sin() @ B) for x in X]


def groups_of(model: nn.Module, who: Contender, rate: float, base: int | None) -> Groups:
    """Groups of the rule, or one for all where there is no base width."""
    if base is None:
        return [{"params": [*model.named_parameters()], "lr": rate, "weight_decay": 0.0}]
    return width_groups(model, base_width=base, lr=rate, weight_decay=0.0, step=who.step)


def train(
    who: Contender, width: int, rate: float, base: int | None, data: Sequence[tuple[Tensor, Tensor]]
) -> tuple[nn.Module, list[float]]:
    """A trained network and its losses."""
    model = network(width)
    optimizer = who.make(model, groups_of(model, who, rate, base))
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def movement(who: Contender, width: int, base: int | None, steps: int = FEW_STEPS) -> float:
    """Root mean square of the change of the output after a few steps at the same rates."""
    ((x, _),) = batches(1, seed=2)
    model, _ = train(who, width, who.rate / 4, base, batches(steps))
    with torch.no_grad():
        return float((model(x) - network(width)(x)).square().mean().sqrt())


def best_rate(
    who: Contender, width: int, base: int | None, rates: Sequence[float], steps: int = RUN_STEPS
) -> tuple[float, list[float]]:
    """The rate with the lowest loss at the end, and the losses of all."""
    data, ends = batches(steps), []
    for rate in rates:
        _, losses = train(who, width, rate, base, data)
        end = sum(losses[-8:]) / 8
        ends.append(end if math.isfinite(end) else math.inf)
    return rates[ends.index(min(ends))], ends


def grid(who: Contender, below: int, above: int) -> list[float]:
    """Powers of two around the rate of a contender."""
    return [who.rate * 2.0**k for k in range(-below, above + 1)]


def report(plt: Any, out: Path) -> None:
    """Run both parts, print them, and draw them."""
    figure, axes = plt.subplots(2, len(CONTENDERS), figsize=(13, 6))
    for (name, who), column in zip(CONTENDERS.items(), axes.T, strict=True):
        for rule, color in ((False, "tab:red"), (True, "tab:blue")):
            label = "width_groups" if rule else "one rate"
            moved = [movement(who, d, WIDTHS[0] if rule else None) for d in WIDTHS]
            column[0].plot(WIDTHS, moved, "o-", color=color, label=label)
            print(f"  {name:14} {label:13} output moves x {moved[-1] / moved[0]:5.2f}", flush=True)
        column[0].set(title=name, yscale="log", xlabel="width")
        column[0].set_xscale("log", base=2)
        column[0].set_xticks(WIDTHS, map(str, WIDTHS))
        small, wide = SWEPT
        rates = grid(who, 5, 3)
        start, ends = best_rate(who, small, None, rates)
        column[1].plot(rates, ends, "o-", color="0.6", label=f"width {small}")
        for rule, color in ((False, "tab:red"), (True, "tab:blue")):
            label = "width_groups" if rule else "one rate"
            best, ends = best_rate(who, wide, small if rule else None, rates)
            column[1].plot(rates, ends, "o-", color=color, label=f"width {wide}, {label}")
            shift = math.log2(best / start)
            print(
                f"  {name:14} {label:13} best lr {start:.2g} at {small}, {best:.2g} at {wide}: "
                f"{shift:+.0f} steps of the grid",
                flush=True,
            )
        column[1].set(yscale="log", xlabel="learning rate")
        column[1].set_xscale("log", base=2)
    axes[0, 0].set(ylabel="change of the output")
    axes[1, 0].set(ylabel="loss at the end")
    for row in axes:
        row[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "width.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/width"))
    out = parser.parse_args().out
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("this example draws: pip install '.[examples]'") from None
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    report(plt, out)
    print(f"Picture: {out}/width.png")


if __name__ == "__main__":
    main()
