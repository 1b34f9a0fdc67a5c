"""Draw the pictures of the site: python docs/pictures.py --out docs/pictures.

They are drawn anew whenever the site is built, so they show what the code does today.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from stiefel.kernels import polar_factor
from stiefel.optimizers import (
    APOLLO,
    ARO,
    FRUGAL,
    SOAP,
    AuON,
    DCTAdamW,
    Fira,
    GaLore,
    Hybrid,
    Muon,
    Muown,
    RowNorm,
    SinkGD,
    SOAPMuon,
    Spectral,
    Trion,
)
from stiefel.optimizers._toolkit.projectors import StackRNG, make_projector

POLAR = {
    "zolo": {},
    "ns5": {"dtype": torch.float32},
    "polar_express": {"dtype": torch.float32},
    "cubic": {},
    "svd": {},
}
KINDS = ("svd", "range", "dct", "topk", "random", "randk")
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "muon": (Muon, {}),
    "galore": (GaLore, {"rank": 12}),
    "fira": (Fira, {"rank": 12}),
    "apollo": (APOLLO, {"rank": 12}),
    "frugal": (FRUGAL, {"density": 0.25}),
    "dctadamw": (DCTAdamW, {"rank": 12}),
    "trion": (Trion, {"rank": 12}),
    "muown": (Muown, {}),
    "auon": (AuON, {}),
    "aro": (ARO, {}),
    "sinkgd": (SinkGD, {}),
    "soap": (SOAP, {}),
    "soapmuon": (SOAPMuon, {}),
    "rownorm": (RowNorm, {}),
    "spectral": (Spectral, {}),
    "hybrid": (Hybrid, {}),
}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix (m, n) of these singular values in random directions."""
    U = torch.linalg.qr(torch.randn(m, m, generator=draw(seed)))[0]
    V = torch.linalg.qr(torch.randn(n, m, generator=draw(seed + 1)))[0]
    return U * values @ V.mT


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw_polar(out: Path) -> None:
    """What becomes of each singular value of the momentum."""
    m, n = 128, 192
    values = torch.logspace(0, -4.2, m)
    X = with_spectrum(m, n, values)
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    for name, options in POLAR.items():
        O = polar_factor(X[None].clone(), name, **options)[0].double()
        axes.plot(S / S.norm(), (U.mT @ O @ Vh.mT).diagonal(), label=name, linewidth=1.8)
    axes.set(xscale="log", xlabel="singular value of the matrix, divided by its norm")
    axes.set(ylabel="after the method", ylim=(-0.05, 1.35))
    axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.legend(ncols=3, frameon=False, loc="lower right")
    save(figure, out / "polar.png")


def energy(kind: str, G: Tensor, rank: int) -> float:
    """The share of |G|^2 that the subspace of a projector keeps."""
    m, n = G.shape
    P = make_projector(kind)
    slots = {name: (slot.shape(m, n), slot.dtype) for name, slot in P.slots(m, rank).items()}
    state = {k: torch.zeros(1, *at, dtype=dtype or G.dtype) for k, (at, dtype) in slots.items()}
    P.install(state, P.find(G[None], *P.state_tensors(state), rng=StackRNG(0, (0,), 1)))
    return float(P.project(state, G[None]).square().sum() / G.square().sum())


def draw_energy(out: Path) -> None:
    """What each kind of projection keeps, by rank, where rows are alike and where they are not."""
    m, n = 128, 256
    rough = with_spectrum(m, n, torch.arange(1, m + 1) ** -0.5)
    steps = torch.randn(m, n, generator=draw(2)).cumsum(0)  # a row is near the one before it
    ranks = [4, 8, 16, 32, 64, 96, 128]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    titles = "singular values $i^{-1/2}$, random directions", "neighbouring rows alike"
    for axis, G, title in zip(axes, (rough, steps), titles, strict=True):
        for kind in KINDS:
            kept = [energy(kind, G, rank) for rank in ranks]
            axis.plot([r / m for r in ranks], kept, "o-", markersize=3, label=kind)
        axis.set(title=title, xlabel="rank / shorter side", ylim=(0, 1.03))
    axes[0].set(ylabel="share of the energy kept")
    axes[0].legend(frameon=False, ncols=2, loc="lower right")
    save(figure, out / "energy.png")


def example_gradient() -> Tensor:
    """A gradient (48, 64): a few strong directions, rows of unequal length, noise."""
    G = with_spectrum(48, 64, torch.arange(1.0, 49) ** -1.2, seed=3)
    rows = torch.logspace(0, -1.5, 48)[torch.randperm(48, generator=draw(5))]
    return G * rows[:, None] + 1e-3 * torch.randn(48, 64, generator=draw(4))


def step_of(cls: Any, options: dict[str, Any]) -> Tensor:
    """What the fifth step on one gradient takes off the weight, at RMS 1."""
    weight = nn.Parameter(torch.zeros(48, 64))
    optimizer = cls([weight], lr=1.0, weight_decay=0.0, **options)
    for _ in range(5):
        before = weight.detach().clone()
        weight.grad = example_gradient()
        optimizer.step()
    step = before - weight.detach()
    return step / step.square().mean().sqrt()


def draw_step(name: str, cls: Any, options: dict[str, Any], out: Path) -> None:
    """Gradient and step as images, and the singular values of both."""
    G, step = example_gradient(), step_of(cls, options)
    G = G / G.square().mean().sqrt()
    ratios = {"width_ratios": [1, 1, 1.3]}
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.7), gridspec_kw=ratios)
    for axis, X, title in zip(axes, (G, step), ("gradient", cls.__name__), strict=False):
        axis.imshow(X, cmap="RdBu", vmin=-2, vmax=2, aspect="auto", interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    for X, label in ((G, "gradient"), (step, "step")):
        axes[2].plot(range(1, 49), torch.linalg.svdvals(X), "o-", markersize=2.5, label=label)
    axes[2].set(title="singular values, both at RMS 1", yscale="log", xlabel="number")
    axes[2].set_ylim(bottom=0.02)
    axes[2].legend(frameon=False)
    figure.tight_layout()
    save(figure, out / f"step-{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    draw_polar(out)
    draw_energy(out)
    for name, (cls, options) in METHODS.items():
        draw_step(name, cls, options, out)


if __name__ == "__main__":
    main()
