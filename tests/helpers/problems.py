"""Shared material of the tests: gradients, runs, fixtures, and rules that only tests need."""

import json
import pathlib
from dataclasses import dataclass

import torch

from stiefel.kernels import product
from stiefel.optimizers import (
    ARO,
    FRUGAL,
    AuON,
    Blocks,
    DCTAdamW,
    Dense,
    Factored,
    Fira,
    GaLore,
    Hybrid,
    Muon,
    RowNorm,
    Rule,
    Scaled,
    Selected,
    Slot,
    Spectral,
    StackedOptimizer,
    SymmetryStack,
    Trion,
    subspaces,
)
from stiefel.optimizers.moments import ema

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
TALL, WIDE, SQUARE, ODD, ROW, COLUMN = (24, 10), (10, 24), (16, 16), (17, 5), (1, 7), (9, 1)
SHAPES = [TALL, WIDE, SQUARE, ODD, ROW, COLUMN]


def gradients(shape, steps, seed=0, dtype=torch.float32):
    """Correlated gradients of decaying spectrum, exact in float32 and bfloat16's range."""
    draw = torch.Generator().manual_seed(1000 + seed)
    k = min(shape[-2:])
    w = 0.6 ** torch.arange(k)
    A = torch.randn(*shape[:-1], k, generator=draw)
    B = torch.randn(*shape[:-2], k, shape[-1], generator=draw)
    out = []
    for _ in range(steps):
        A = 0.8 * A + 0.6 * torch.randn(A.shape, generator=draw)
        noise = 0.05 * torch.randn(shape, generator=draw)
        out.append(((A * w) @ B / k + noise).to(dtype))
    return out


def weight(shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype))


def run(optimizer, params, grads):
    """Step once per entry of grads (a list per parameter); returns the weights after each step."""
    out = []
    for step in range(len(grads[0])):
        for p, series in zip(params, grads, strict=True):
            p.grad = None if series[step] is None else series[step].to(p.dtype)
        optimizer.step()
        out.append([p.detach().clone() for p in params])
    return out


def trajectory(make, shape, steps=7, seed=0, dtype=torch.float32):
    """Weights of one matrix after each step of ``make([p])``."""
    p = weight(shape, seed, dtype)
    return [W[0] for W in run(make([p]), [p], [gradients(shape, steps, seed)])]


def tensors(optimizer):
    """Every state value by position and key, cloned."""
    flat = [p for g in optimizer.param_groups for p in g["params"]]
    return {
        (i, key): value.clone() if isinstance(value, torch.Tensor) else value
        for i, p in enumerate(flat)
        for key, value in optimizer.state.get(p, {}).items()
    }


def same(a, b):
    """Bitwise equal dictionaries or lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def fixture(name):
    """A recorded trajectory, with float32 tensors."""
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    for key in ("W0", "grads", "W", "W_float32_polar"):
        if key in data:
            data[key] = torch.tensor(data[key], dtype=torch.float32)
    return data


def fed(data, monkeypatch):
    """Let the exact SVD hand out the recorded bases: their signs would differ otherwise.

    Returns the iterator, so that a test can see that all were taken.
    """
    stored = iter(data["bases"])

    def find(self, G, *old, draws, turned):
        basis = next(stored)["basis"]
        if data["settings"]["group"]["proj_type"] == "full":
            left, right = (torch.tensor(x, dtype=torch.float32) for x in basis)
            return left[None], right.mT[None]
        B = torch.tensor(basis, dtype=torch.float32)
        return (B.mT[None] if turned else B[None],)

    monkeypatch.setattr(subspaces.Svd, "find", find)
    return stored


def tolerance(data, key):
    """Four times the recorded noise, at least 2e-6."""
    return max(2e-6, 4 * data["noise"][key])


# Rules that only tests need: one for every kind of term and every corner of the contract.


@dataclass(frozen=True)
class PlainRule(Rule):
    """Descent along the gradient."""

    def update(self, w):
        return w.step(Dense(w.grad.clone()))


@dataclass(frozen=True)
class RowsRule(Rule):
    """Rows of unit norm, and signs in panels, and a factored part, all in one direction."""

    def state(self, m, n):
        return {
            "momentum_buffer": Slot("mn"),
            "rotation": Slot("mm", fill="eye"),
            "norm": Slot("11"),
        }

    def transpose(self, m, n):
        return m > n

    def update(self, w):
        B, G = ema(w.state["momentum_buffer"], w.grad, 0.9), w.grad
        ema(w.state["norm"], w.sums.both(G.square().sum((-2, -1), keepdim=True)), 0.5)
        by = 1 / (w.sums.cols(B.square().sum(-1, keepdim=True)).sqrt() + 1e-8)
        u = product(w.state["rotation"], G[..., :1])
        return w.step(
            Scaled(B, by),
            Blocks(lambda k, i, j: torch.sign(G[k, i, j])),
            Factored(u, G[..., :1, :]),
            scale=0.5,
            decay=(G * w.value.to(G.dtype) >= 0),
        )


@dataclass(frozen=True)
class PickRule(Rule):
    """Writes only chosen rows or columns; its index is integer state that a refresh draws."""

    dim: int = -1
    count: int = 3
    gap: int = 2
    order: int = 0

    @property
    def every(self):
        return self.gap

    @property
    def phase(self):
        return self.order

    def state(self, m, n):
        c = min(self.count, n if self.dim == -1 else m)
        return {"index": Slot("c", dtype=torch.int32, c=c), "seen": Slot("c", c=c)}

    def refresh(self, w):
        index = w.state["index"]
        side = w.n if self.dim == -1 else w.m
        for row, key in zip(index, w.indices, strict=True):
            draw = torch.Generator().manual_seed(key * 7919 + w.t)
            row.copy_(torch.randperm(side, generator=draw)[: row.numel()])

    def update(self, w):
        index = w.state["index"].long()
        w.state["seen"].add_(1)
        where = index.unsqueeze(-2 if self.dim == -1 else -1)
        shape = (*w.grad.shape[:-1], index.shape[-1])
        if self.dim == -2:
            shape = (w.grad.shape[0], index.shape[-1], w.grad.shape[-1])
        return w.step(
            Selected(self.dim, w.state["index"], w.grad.gather(self.dim, where.expand(shape)))
        )


@dataclass(frozen=True)
class PairRule(Rule):
    """Two members, Gauss-Seidel: B's step sees the new A; a missing half is left out."""

    members = ("A", "B")

    def state(self, a, b):
        return {"momentum_buffer": Slot("mn")}, {"momentum_buffer": Slot("mn"), "count": Slot("11")}

    def update(self, A, B):
        if A.grad is not None:
            yield A.step(Dense(A.state["momentum_buffer"].lerp_(A.grad, 0.5).clone()), cap=0.1)
        if B.grad is not None:
            B.state["count"].add_(1)
            M = B.state["momentum_buffer"].lerp_(B.grad, 0.5)
            yield B.step(Dense(M / (1 + A.value.to(M.dtype).square().sum((-2, -1), keepdim=True))))


@dataclass(frozen=True)
class WindowRule(Rule):
    """Keeps state only in every other window of two steps."""

    def state(self, m, n):
        return {"exp_avg": Slot("mn")}

    def holds(self, place, t):
        return ((t - 1) // 2 + place.number) % 2 == 0

    def update(self, w):
        if "exp_avg" not in w.state:
            return w.step(Dense(w.grad.sign()))
        return w.step(Dense(w.state["exp_avg"].lerp_(w.grad, 0.1).clone()))


@dataclass(frozen=True)
class FoldRule(Rule):
    """Changes its weight in place at a refresh."""

    writes = True
    gap: int = 2

    @property
    def every(self):
        return self.gap

    def refresh(self, w):
        w.value.mul_(0.5)

    def update(self, w):
        return w.step(Dense(w.grad.clone()))


def driver(rule, weight_decay=0.1, **options):
    """An optimizer maker for a rule of this file."""
    return lambda params: StackedOptimizer(params, rule, 0.1, weight_decay, **options)


METHODS = {
    "muon": lambda params, **kw: Muon(params, **{"lr": 0.02, **kw}),
    "muon-ns5": lambda params, **kw: Muon(params, **{"lr": 0.02, "polar": "ns5", **kw}),
    "muon-plain": lambda params, **kw: Muon(params, **{"lr": 0.02, "nesterov": False, **kw}),
    "muon-normuon": lambda params, **kw: Muon(
        params, **{"lr": 0.02, "second_moment": "normuon", "cautious": True, **kw}
    ),
    "muon-adamuon": lambda params, **kw: Muon(
        params, **{"lr": 0.02, "second_moment": "adamuon", **kw}
    ),
    "muon-spike": lambda params, **kw: Muon(
        params,
        **{"lr": 0.02, "spike_ratio": 1.5, "clip_grad_rms": 0.3, "momentum_kind": "sum", **kw},
    ),
    "muon-low-rank": lambda params, **kw: Muon(
        params,
        **{"lr": 0.02, "polar": "low_rank", "rank": 3, "oversample": 1, "report_steps": 3, **kw},
    ),
    "muon-kaczmarz": lambda params, **kw: Muon(
        params,
        **{"lr": 0.02, "polar": "low_rank", "rank": 2, "oversample": 1, "power": 2,
           "sketch": "kaczmarz", **kw},
    ),
    "galore": lambda params, **kw: GaLore(
        params, **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1, **kw}
    ),
    "galore-full": lambda params, **kw: GaLore(
        params,
        **{"lr": 0.02, "rank": 0.5, "update_proj_gap": 3, "proj_type": "full", **kw},
    ),
    "galore-rotate": lambda params, **kw: GaLore(
        params, **{"lr": 0.02, "rank": 2, "update_proj_gap": 2, "moments": "rotate", **kw}
    ),
    "galore-reset": lambda params, **kw: GaLore(
        params,
        **{"lr": 0.02, "rank": 2, "update_proj_gap": 3, "moments": "reset",
           "proj_type": "reverse_std", **kw},
    ),
    "galore-reference": lambda params, **kw: GaLore(
        params,
        **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "compat": "reference", **kw},
    ),
    "fira": lambda params, **kw: Fira(
        params, **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1, **kw}
    ),
    "fira-paper": lambda params, **kw: Fira(
        params,
        **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "variant": "paper", "scaling": "matrix",
           **kw},
    ),
    "auon": lambda params, **kw: AuON(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "auon-repo2026": lambda params, **kw: AuON(
        params, **{"lr": 0.02, "variant": "repo2026", "nesterov": False, **kw}
    ),
    "auon-hybrid": lambda params, **kw: AuON(params, **{"lr": 0.02, "ns_steps": 1, **kw}),
    "trion": lambda params, **kw: Trion(
        params, **{"lr": 0.02, "rank": 3, "weight_decay": 0.1, **kw}
    ),
    "trion-l2": lambda params, **kw: Trion(
        params,
        **{"lr": 0.02, "rank": 0.5, "norm": "l2", "basis": "dct3", "polar": "auto",
           "adjust_lr_fn": "kimi", **kw},
    ),
    "dctadamw": lambda params, **kw: DCTAdamW(
        params, **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1, **kw}
    ),
    "dctadamw-every": lambda params, **kw: DCTAdamW(
        params, **{"lr": 0.02, "rank": 0.5, "norm": "l2", "moments": "keep_if_same", **kw}
    ),
    "dctadamw-full": lambda params, **kw: DCTAdamW(
        params,
        **{"lr": 0.02, "rank": 3, "error_feedback": "full", "moments": "slot",
           "bias_correction": "global", "basis": "dct3", **kw},
    ),
    "dctadamw-int8": lambda params, **kw: DCTAdamW(
        params,
        **{"lr": 0.02, "rank": 2, "error_feedback": "int8", "update_proj_gap": 2,
           "transform": "fft", **kw},
    ),
    "dctadamw-int4": lambda params, **kw: DCTAdamW(
        params,
        **{"lr": 0.02, "rank": 2, "error_feedback": "int4", "update_proj_gap": 2,
           "moments": "reset", **kw},
    ),
    "frugal-columns": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "weight_decay": 0.1,
           **kw},
    ),
    "frugal-rows": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "rows", "reset": "changed",
           **kw},
    ),
    "frugal-randk": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "randk",
           "state_free_lr_scale": 0.5, **kw},
    ),
    "frugal-svd": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "svd", "reset": "changed",
           **kw},
    ),
    "frugal-random": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "random", "state_free": "sgd",
           "inner": "lion", **kw},
    ),
    # all blocks active: which of several are so depends on how many share an optimizer
    "frugal-block": lambda params, **kw: FRUGAL(
        params, **{"lr": 0.02, "density": 1.0, "update_gap": 3, "split": "block", **kw}
    ),
    "aro": lambda params, **kw: ARO(params, **{"lr": 0.02, **kw}),
    "aro-adam": lambda params, **kw: ARO(
        params, **{"lr": 0.02, "base": "adam", "rotation_every": 3, **kw}
    ),
    "aro-eigh": lambda params, **kw: ARO(
        params,
        **{"lr": 0.02, "base": "row_norm", "rotation": "eigh", "gram_beta": 0.9, **kw},
    ),
    "aro-polar": lambda params, **kw: ARO(
        params, **{"lr": 0.02, "base": "sign", "rotation": "polar", "init": "svd", **kw}
    ),
    "rownorm": lambda params, **kw: RowNorm(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "rownorm-columns": lambda params, **kw: RowNorm(
        params, **{"lr": 0.02, "axis": "cols", "row_mode": "relative", **kw}
    ),
    "rownorm-centred": lambda params, **kw: RowNorm(
        params, **{"lr": 0.02, "weight_decay": 0.1, "centred": True, **kw}
    ),
    "spectral": lambda params, **kw: Spectral(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "spectral-published": lambda params, **kw: Spectral(
        params,
        **{"lr": 0.02, "polar": "inverse_root", "alpha": 1.0, "adjust_lr_fn": "none", "eps": 1e-8,
           "centred": True, "side": "left", **kw},
    ),
    "hybrid": lambda params, **kw: Hybrid(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "hybrid-columns": lambda params, **kw: Hybrid(
        params,
        **{"lr": 0.02, "axis": "cols", "order": "polar_then_row", "polar": "svd", "centred": True,
           **kw},
    ),
    "symmetrystack": lambda params, **kw: SymmetryStack(
        params, **{"lr": 0.02, "weight_decay": 0.1, "policy": {"hidden": "Hybrid"}, **kw}
    ),
    "rows": lambda params, **kw: StackedOptimizer(
        params, RowsRule(), **{"lr": 0.02, "weight_decay": 0.1, **kw}
    ),
    "pick": lambda params, **kw: StackedOptimizer(params, PickRule(), **{"lr": 0.02, **kw}),
    "pick-rows": lambda params, **kw: StackedOptimizer(
        params, PickRule(dim=-2, order=1, gap=3), **{"lr": 0.02, "weight_decay": 0.1, **kw}
    ),
}  # fmt: skip
"""Every optimizer that the general tests run: one entry makes a new method take part in all."""
