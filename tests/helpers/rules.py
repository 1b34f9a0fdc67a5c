"""Rules that only tests need: one for every kind of term and every corner of the contract."""

from dataclasses import dataclass

import torch

from stiefel.kernels import product, update_weight_
from stiefel.optimizers import (
    Dense,
    Factored,
    PanelTerm,
    Rule,
    Scaled,
    Selected,
    Slot,
    StackedOptimizer,
)
from stiefel.optimizers._toolkit.moments import ema


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
        ema(w.state["norm"], w.reductions.both(G.square().sum((-2, -1), keepdim=True)), 0.5)
        by = 1 / (w.reductions.cols(B.square().sum(-1, keepdim=True)).sqrt() + 1e-8)
        u = product(w.state["rotation"], G[..., :1])
        return w.step(
            Scaled(B, by),
            PanelTerm(lambda k, i, j: torch.sign(G[k, i, j])),
            Factored(u, G[..., :1, :]),
            lr_factor=0.5,
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
    def refresh_interval(self):
        return self.gap

    @property
    def refresh_offset(self):
        return self.order

    def state(self, m, n):
        c = min(self.count, n if self.dim == -1 else m)
        return {"index": Slot("c", dtype=torch.int32, c=c), "seen": Slot("c", c=c)}

    def refresh(self, w):
        index = w.state["index"]
        side = w.n if self.dim == -1 else w.m
        for row, key in zip(index, w.indices, strict=True):
            draw = torch.Generator("cpu").manual_seed((key * 7919 + w.t) % 2**63)
            row.copy_(torch.randperm(side, generator=draw, device="cpu")[: row.numel()])

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
            yield A.step(
                Dense(A.state["momentum_buffer"].lerp_(A.grad, 0.5).clone()), max_rel_norm=0.1
            )
        if B.grad is not None:
            B.state["count"].add_(1)
            M = B.state["momentum_buffer"].lerp_(B.grad, 0.5)
            yield B.step(Dense(M / (1 + A.value.to(M.dtype).square().sum((-2, -1), keepdim=True))))


@dataclass(frozen=True)
class WindowRule(Rule):
    """Keeps state only in every other window of two steps."""

    def state(self, m, n):
        return {"exp_avg": Slot("mn")}

    def state_since_at(self, position, t):
        return ((t - 1) // 2 + position.number) % 2 == 0

    def update(self, w):
        if "exp_avg" not in w.state:
            return w.step(Dense(w.grad.sign()))
        return w.step(Dense(w.state["exp_avg"].lerp_(w.grad, 0.1).clone()))


@dataclass(frozen=True)
class FoldRule(Rule):
    """Changes its weight in place at a refresh."""

    writes_in_refresh = True
    gap: int = 2

    @property
    def refresh_interval(self):
        return self.gap

    def refresh(self, w):
        update_weight_(w.value, lambda X: X.mul_(0.5))

    def update(self, w):
        return w.step(Dense(w.grad.clone()))


def driver(rule, weight_decay=0.1, **options):
    """An optimizer maker for a rule of this file."""
    return lambda params: StackedOptimizer(params, rule, 0.1, weight_decay, **options)
