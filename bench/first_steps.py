"""How large are Fira's first ten steps, in learning rates, where a basis misses whole columns?

    python bench/first_steps.py

Size is the largest change of a weight in a step, over lr. Inputs: two tasks of one layer, of which
the larger one owns the basis; a diagonal gradient with noise; columns of mixed scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stiefel.optimizers import Fira, GaLore

STEPS, LR = 10, 1e-3
Source = Callable[[Tensor], Tensor]
"""The gradient at a weight."""


def two_tasks() -> tuple[Tensor, Source]:
    """Rows 0-31 use features 0-7 for outputs of size 10, rows 32-63 features 8-15 for 0.1."""
    draw = torch.Generator().manual_seed(0)
    X = 1e-5 * torch.randn(64, 16, generator=draw)
    Y = torch.zeros(64, 16)
    for i, size in ((0, 10.0), (1, 0.1)):
        rows, part = slice(32 * i, 32 * i + 32), slice(8 * i, 8 * i + 8)
        X[rows, part] = torch.randn(32, 8, generator=draw)
        Y[rows, part] = size * torch.randn(32, 8, generator=draw)
    return torch.zeros(16, 16), lambda W: 2 * (X @ W.mT - Y).mT @ X / Y.numel()


def noisy_diagonal() -> tuple[Tensor, Source]:
    """diag(3, 2, 1, 0.5, 0.1, 0.01) with fresh noise of 1e-6 in every step."""
    draw = torch.Generator().manual_seed(0)
    D = torch.diag(torch.tensor([3, 2, 1, 0.5, 0.1, 0.01]))
    return torch.zeros(6, 6), lambda W: D + 1e-6 * torch.randn(6, 6, generator=draw)


def mixed_scales() -> tuple[Tensor, Source]:
    """Gaussian gradients whose entries have sizes from 1e-9 to 1, always the same ones."""
    draw = torch.Generator().manual_seed(0)
    scales = 10 ** (-9 * torch.rand(48, 64, generator=draw))
    return torch.zeros(48, 64), lambda W: scales * torch.randn(48, 64, generator=draw)


INPUTS = {"two tasks": (two_tasks, 4), "noisy diagonal": (noisy_diagonal, 2),
          "mixed scales": (mixed_scales, 6)}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "Fira": {},
    "Fira, paper": {"variant": "paper"},
    "Fira, matrix": {"scaling": "matrix"},
    "Fira, compat": {"compat": "reference"},
}


def step_sizes(cls: Any, W: Tensor, gradient: Source, **options: Any) -> Iterator[float]:
    """The largest change of an entry over lr, for each of the first steps."""
    W = torch.nn.Parameter(W.clone())
    optimizer = cls([W], lr=LR, **options)
    for _ in range(STEPS):
        before = W.detach().clone()
        W.grad = gradient(before.float()).to(W.dtype)
        optimizer.step()
        yield float((W.detach() - before).abs().max()) / LR


def main() -> None:
    print("| input, rank | | first step | largest of ten |\n|---|---|---|---|")
    for name, (make, rank) in INPUTS.items():
        for label, options in [*FORMS.items(), ("GaLore", {})]:
            cls = GaLore if label == "GaLore" else Fira
            sizes = [*step_sizes(cls, *make(), rank=rank, **options)]
            print(f"| {name}, {rank} | {label} | {sizes[0]:.3g} | {max(sizes):.3g} |")


if __name__ == "__main__":
    main()
