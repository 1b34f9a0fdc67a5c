"""Small problems whose exact answer is known, for any optimizer by name.

One 64 x 64 matrix that starts at 0, no other parameters, learning rate on a cosine to 0. Whatever
projects does so at rank 16 with scale 1. A seed decides the problem; its batches come from
``1000 + seed``, so every method sees the same ones. Lower values are better.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from methods import BETAS, METHODS, UserError, available_methods

N, RANK = 64, 16
NEVER = 10**9
"""Steps between two subspaces where the first one is kept to the end."""


# --- The problems ---


class Instance(Protocol):
    """What a seed makes of a problem."""

    def __init__(self, seed: int) -> None: ...

    def loss(self, W: Tensor, draw: torch.Generator) -> Tensor:
        """What is descended; a problem with noise draws its batch here."""

    def value(self, W: Tensor) -> float:
        """What is reported, free of noise."""


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def orthogonal(draw: torch.Generator) -> Tensor:
    """A random rotation (N, N); the signs make its distribution uniform."""
    Q, R = torch.linalg.qr(normal(draw, N, N))
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation


def rotated(draw: torch.Generator, decades: float) -> Tensor:
    """A symmetric matrix with eigenvalues 1 .. 10^-decades in random directions."""
    Q = orthogonal(draw)
    return (Q * torch.logspace(0, -decades, N, dtype=torch.float64)) @ Q.mT


class Quadratic:
    """A: 1/2 tr((W - T) C (W - T)^T), C rotated with eigenvalues 1 .. 1e-4, T Gaussian.

    Truth: the minimum is 0, at T, and the gradient (W - T) C is exact. No coordinate of W belongs
    to one eigenvalue, so rescaling entries does not help.
    """

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.C, self.T = rotated(draw, 4), normal(draw, N, N)

    def loss(self, W: Tensor, draw: torch.Generator | None = None) -> Tensor:
        error = W - self.T.to(W.dtype)
        return ((error @ self.C.to(W.dtype)) * error).sum() / 2

    def value(self, W: Tensor) -> float:
        """The loss in parts of the start's."""
        W = W.double()
        return float(self.loss(W) / self.loss(torch.zeros_like(W)))


class Floor:
    """B: 1/2 |W - T|_F^2 with T orthogonal.

    Truth: steps inside one subspace of r rows or columns remove r / n of the error and no more,
    since all singular values of T are 1. The floor is 1 - r/n, here 0.75; who leaves the subspace
    goes to 0.
    """

    def __init__(self, seed: int) -> None:
        self.T = orthogonal(torch.Generator().manual_seed(seed))

    def loss(self, W: Tensor, draw: torch.Generator) -> Tensor:
        return (W - self.T.to(W.dtype)).square().sum() / 2

    def value(self, W: Tensor) -> float:
        """The squared error in parts of the start's, which is N."""
        return float((W.double() - self.T).square().sum() / N)


class Zipf:
    """C: 64 facts with frequencies ~ k^-1.2, cross-entropy of U W E^T on batches of 256.

    Truth: keys E and values U are orthonormal, so W = c U^T E stores every fact, and the loss goes
    to 0 as c grows: there is no best learning rate, only the end of the grid.
    """

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.E, self.U = orthogonal(draw), orthogonal(draw)
        self.frequency = torch.arange(1, N + 1).double() ** -1.2

    def loss(self, W: Tensor, draw: torch.Generator) -> Tensor:
        facts = torch.multinomial(self.frequency, 256, replacement=True, generator=draw)
        return F.cross_entropy(self.logits(W)[facts], facts)

    def logits(self, W: Tensor) -> Tensor:
        """Row k: the scores of all values for key k."""
        scores: Tensor = self.E.to(W.dtype) @ W.mT @ self.U.mT.to(W.dtype)
        return scores

    def value(self, W: Tensor) -> float:
        """Mean cross-entropy of the 32 rarest facts; blind guessing has ln 64 = 4.16."""
        facts = torch.arange(N // 2, N)
        return float(F.cross_entropy(self.logits(W.double())[facts], facts))


class HeavyTail:
    """D: regression on Y = T X + 0.3 t(2 degrees of freedom), batches of 64.

    Inputs have a rotated covariance C with eigenvalues 1 .. 0.1, T has entries of variance 1/N.
    Truth: the risk above the noise is 1/2 tr((W - T) C (W - T)^T) in closed form, 0 at T. The
    noise has no finite variance.
    """

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.C, self.T = rotated(draw, 1), normal(draw, N, N) / N**0.5
        self.root = torch.linalg.cholesky(self.C)

    def loss(self, W: Tensor, draw: torch.Generator) -> Tensor:
        X = normal(draw, 64, N) @ self.root.mT
        # A normal over the root of a mean of two squares: Student's t with two degrees of freedom.
        noise = normal(draw, 64, N) / normal(draw, 2, 64, N).square().mean(0).sqrt()
        Y = X @ self.T.mT + 0.3 * noise
        return (X.to(W.dtype) @ W.mT - Y.to(W.dtype)).square().sum(1).mean() / 2

    def value(self, W: Tensor) -> float:
        """The risk above the noise in parts of the start's."""
        error = W.double() - self.T
        return float(((error @ self.C) * error).sum() / ((self.T @ self.C) * self.T).sum())


@dataclass(frozen=True)
class Problem:
    """A row of the table.

    Attributes:
        title: One line for tables and plots.
        instance: From a seed to the problem itself.
        steps: Length of a run.
        gap: Steps between two subspaces.
        start: The value at W = 0; a run that ends above it diverged.
        extend: How far the grid of learning rates may grow on either side.
    """

    title: str
    instance: type[Instance]
    steps: int
    gap: int
    start: float = 1.0
    extend: int = 6


PROBLEMS = {
    "A": Problem("A: ill-conditioned quadratic, loss left", Quadratic, 150, 20),
    "B": Problem("B: exact floor, subspace kept, error left", Floor, 200, NEVER),
    "B50": Problem("B50: exact floor, subspace every 50 steps, error left", Floor, 200, 50),
    # Its best learning rate is always the largest, so a grid that grows would never end.
    "C": Problem("C: Zipf memory, loss of rare facts", Zipf, 40, 20, math.log(N), extend=0),
    "D": Problem("D: heavy-tailed noise, risk left", HeavyTail, 300, 50),
}


# --- The optimizers ---


class Sign(torch.optim.Optimizer):
    """Descent along the sign of the gradient: no state, the plainest normalized method."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])
        return loss


class TorchMuon(torch.optim.Muon):
    """torch's Muon with a float32 iteration: its bfloat16 is emulated on many CPUs."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        from cases import torch_float32

        with torch_float32():
            return super().step(closure)


LOCAL: dict[str, type[torch.optim.Optimizer]] = {"sign": Sign, "torch-muon": TorchMuon}
OWN: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "torch-muon": {"adjust_lr_fn": "match_rms_adamw"},
}
"""What the comparison fixes for optimizers that the examples do not know."""
NOT_PLAIN = {"Optimizer", "LBFGS", "SparseAdam"}
"""Names in torch.optim that do not step on a dense gradient."""


def known_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """By lower-case name: the package's, then torch's, and the local baselines."""
    found = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        if name not in NOT_PLAIN
    }
    return found | available_methods() | LOCAL


def accepted(name: str) -> set[str]:
    """Keywords of a constructor."""
    known = known_optimizers()
    if name not in known:
        raise UserError(f"Unknown optimizer {name!r}: choose from {', '.join(sorted(known))}.")
    return set(inspect.signature(known[name]).parameters)


def options_of(name: str, extra: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Constructor keywords: the shared ones that the class takes, the method's, the caller's."""
    takes = accepted(name)
    everyone = {"betas": BETAS, "weight_decay": 0.0} | shared
    return {k: v for k, v in everyone.items() if k in takes} | OWN.get(name, {}) | extra


def synthetic_options(name: str, extra: dict[str, Any], gap: int) -> dict[str, Any]:
    """Rank 16, the problem's gap, and scale 1: one matrix has no other weights to balance."""
    fixed = METHODS[name].settings if name in METHODS else {}
    own = {key: 1.0 if key in ("scale", "alpha") else value for key, value in fixed.items()}
    shared = {"rank": RANK, "update_proj_gap": gap, "update_gap": gap}
    return options_of(name, own | extra, shared)


def build(name: str, params: Any, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    accepted(name)  # names an unknown optimizer
    try:
        return known_optimizers()[name](params, lr=lr, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} refuses its options: {error}") from error


CENTERS = {"sgd": 3.0}
CENTER = 0.1
"""Middle of the grid of learning rates: gradients are small here, which SGD has to make up for."""


# --- A run ---


def solve(
    problem: Problem,
    name: str,
    lr: float,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    steps: int | None = None,
) -> float | None:
    """The final value of one run; None where it diverged."""
    steps = steps or problem.steps
    instance, W = problem.instance(seed), torch.nn.Parameter(torch.zeros(N, N))
    optimizer = build(name, [W], lr, synthetic_options(name, options or {}, problem.gap))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    draw = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = instance.loss(W, draw)
        if not math.isfinite(loss.item()):
            return None
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
    value = instance.value(W.detach())
    # A start that did not move is none, whatever its last bit.
    return value if value <= problem.start * (1 + 1e-9) else None
