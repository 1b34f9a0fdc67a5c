"""A tour: what the optimizers do, on two problems small enough to draw.

python examples/tour.py --out runs/tour

1. Two numbers. A narrow valley: plain gradient descent bounces between its walls, Adam scales each
   coordinate. Rotate valley and start, and the path of gradient descent only rotates with them,
   but Adam's becomes another one: a scale per coordinate depends on the coordinates.
2. One matrix. W is to become an orthogonal target, from inputs of which direction i has size 1 / i,
   as activations have a few loud directions. SGD learns loud ones first and quiet ones hardly;
   Muon moves all of them at one speed; GaLore sees a few at a time. Each has the best learning
   rate of four.

Each part prints what to look at and draws one picture.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.optimizers import FRUGAL, Fira, GaLore, Muon

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


# 1. two numbers -------------------------------------------------------------------------------

STEPS_2D = 60
START = (-1.6, 0.9)
VALLEY: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.035),
    "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


def valley(angle: float) -> Callable[[Tensor], Tensor]:
    """(x^2 + 50 y^2) / 2 in axes that are rotated by an angle."""
    c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()

    def value(p: Tensor) -> Tensor:
        x, y = p[..., 0], p[..., 1]
        return ((c * x + s * y) ** 2 + 50 * (c * y - s * x) ** 2) / 2

    return value


def walk(make: Make, value: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The points (STEPS_2D + 1, 2) that an optimizer visits."""
    p = nn.Parameter(start.clone())
    optimizer = make([p])
    points = [p.detach().clone()]
    for _ in range(STEPS_2D):
        optimizer.zero_grad()
        value(p).backward()
        optimizer.step()
        points.append(p.detach().clone())
    return torch.stack(points)


def draw_valleys(plt: Any, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharex=True, sharey=True)
    grid = torch.stack(
        torch.meshgrid(
            torch.linspace(-2.2, 0.9, 200), torch.linspace(-1.3, 1.2, 200), indexing="xy"
        ),
        -1,
    )
    levels = [0.02 * 4**k for k in range(8)]
    for axis, angle in zip(axes, (0.0, 0.6), strict=True):
        value, c, s = valley(angle), math.cos(angle), math.sin(angle)
        start = torch.tensor((c * START[0] - s * START[1], s * START[0] + c * START[1]))
        title = "along the axes" if angle == 0 else "rotated"
        axis.contour(grid[..., 0], grid[..., 1], value(grid), levels, colors="0.8")
        for name, make in VALLEY.items():
            points = walk(make, value, start)
            axis.plot(*points.T, ".-", markersize=3, linewidth=1, label=name)
            end = float(value(points[-1]))
            print(f"  valley {title:15} {name:18} loss after {STEPS_2D} steps {end:.2e}")
        axis.plot(0, 0, "k*")
        axis.set(title=f"a valley {title}")
    axes[0].legend(frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# 2. one matrix --------------------------------------------------------------------------------

STEPS_MATRIX, SHAPE = 200, (48, 64)
RATES = (1, 3, 10, 30)
"""Learning rates that are tried, in units of the number beside each method."""
MATRIX: dict[str, tuple[float, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]]] = {
    "SGD, momentum 0.9": (0.01, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)),
    "AdamW": (1e-3, lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)),
    "Muon": (3e-3, lambda p, lr: Muon(p, lr=lr, weight_decay=0.0)),
    "GaLore, rank 8": (1e-2, lambda p, lr: GaLore(p, lr=lr, rank=8, update_proj_gap=20)),
    "Fira, rank 8": (1e-3, lambda p, lr: Fira(p, lr=lr, rank=8, update_proj_gap=20)),
    "FRUGAL, a quarter": (1e-3, lambda p, lr: FRUGAL(p, lr=lr, density=0.25, update_gap=20)),
}


def problem() -> tuple[Tensor, Tensor]:
    """Singular vectors U (48, 48) of the target U V^T, V (64, 48) of its inputs too."""
    draw = torch.Generator().manual_seed(0)
    m, n = SHAPE
    U = torch.linalg.qr(torch.randn(m, m, generator=draw))[0]
    V = torch.linalg.qr(torch.randn(n, m, generator=draw))[0]
    return U, V


def train(make: Make) -> tuple[list[float], Tensor]:
    """Losses, and how much of four directions of the target W has learned, (steps, 4)."""
    U, V = problem()
    m = SHAPE[0]
    loudness = 1 / torch.arange(1, m + 1).view(-1, 1)
    W = nn.Parameter(torch.zeros(SHAPE))
    optimizer = make([W])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS_MATRIX)
    inputs = torch.Generator().manual_seed(1)
    losses, learned = [], []
    for _ in range(STEPS_MATRIX):
        x = V @ (loudness * torch.randn(m, 256, generator=inputs))
        optimizer.zero_grad()
        loss = ((W - U @ V.mT) @ x).square().sum(0).mean() / 2
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        learned.append((U.mT @ W.detach() @ V).diagonal()[[0, 3, 11, 31]])
    return losses, torch.stack(learned)


def draw_matrix(plt: Any, path: Path) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6))
    losses = axes[0, 0]
    for (name, (unit, make)), axis in zip(MATRIX.items(), axes.flat[1:7], strict=True):
        rates = [unit * k for k in RATES]
        runs = [(lr, *train(partial(make, lr=lr))) for lr in rates]
        lr, loss, learned = min(runs, key=lambda run: run[1][-1])
        losses.plot(loss, label=name, linewidth=1.2)
        for column, number in zip(learned.T, (1, 4, 12, 32), strict=True):
            axis.plot(column, label=f"direction {number}")
        axis.axhline(1, color="0.7", linewidth=0.8)
        axis.set(title=f"{name}, lr {lr:g}", ylim=(-0.1, 1.4))
        print(f"  matrix {name:18} lr {lr:<6g} loss {loss[0]:.3f} -> {loss[-1]:.1e}")
    losses.set(title="loss", yscale="log", xlabel="step")
    axes[0, 1].legend(frameon=False, fontsize=7, loc="lower right")
    axes[1, 3].axis("off")
    handles, labels = losses.get_legend_handles_labels()
    axes[1, 3].legend(handles, labels, frameon=False, loc="center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tour"))
    out = parser.parse_args().out
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the tour draws: pip install '.[examples]'") from None
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print("1. Two numbers: where the valley is rotated, a scale per coordinate helps less.")
    draw_valleys(plt, out / "valley.png")
    print("2. One matrix: Muon learns all directions at one speed, SGD the loud ones first.")
    draw_matrix(plt, out / "matrix.png")
    print(f"Pictures: {out}/valley.png, {out}/matrix.png")


if __name__ == "__main__":
    main()
