"""One weight on ranks, a row of a table of methods: its plan, what a step sends, and its state."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from helpers.sharded import difference, is_replicated, lay, meshes
from helpers.wrapped import recorded
from stiefel import optimizers
from stiefel.optimizers._driver.exchange import STATUS_BYTES, Team

M, N = 8, 24


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: Name of a class.
        options: Its keywords.
        dim: The dimension of the weight that is cut.
        plan: The plan of ``"auto"``.
        calls: What an ordinary step asks for, in order: ``("SUM", elements)``,
            ``("MAX", elements)``, ``("meet", elements)`` for a matrix that goes to its owner and
            comes back, or ``("ride", 0)`` where all goes there.
        state: Elements of state on the fullest rank.
        refresh: What a refresh asks for before that; ``("there", elements)`` of a gradient that
            goes to an owner, and ``("back", elements)`` of what it gives to each other rank.
    """

    name: str
    options: dict[str, Any]
    dim: int
    plan: str
    calls: tuple[tuple[str, int], ...]
    state: int
    refresh: tuple[tuple[str, int], ...] = ()


def weight_of(row: Row, world: int) -> tuple[nn.Parameter, torch.Tensor]:
    """A weight and its gradient, cut over all ranks; world 0: whole."""
    W, G = (torch.randn(M, N, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    if not world:
        return nn.Parameter(W), G
    mesh = meshes(world)["all"]
    return nn.Parameter(lay(W, mesh, row.dim)), lay(G, mesh, row.dim)


def build(row: Row, p: nn.Parameter, **more: Any) -> Any:
    """An optimizer of one weight."""
    options = {**row.options, **more}
    rule = {"rule": options.pop("rule")} if "rule" in options else {}
    group = {"params": [("layer.weight", p)], **rule}
    return getattr(optimizers, row.name)([group], lr=0.02, **options)


@contextmanager
def traffic():
    """What passes through all teams: (kind, elements, bytes of one) or (exchange, bytes, 1)."""
    seen, reduce, send = [], Team.reduce, Team.send

    def spied_reduce(self, x, op):
        kind = {torch.int32: "flags", torch.int64: "header"}.get(x.dtype, op)
        seen.append((kind, x.numel(), x.element_size()))
        return reduce(self, x, op)

    def spied_send(self, message, sent, received):
        size = sum(max(0, x - STATUS_BYTES) for i, x in enumerate(sent) if i != self.rank)
        seen.append(("exchange", size, 1))
        return send(self, message, sent, received)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "reduce", spied_reduce)
        patch.setattr(Team, "send", spied_send)
        yield seen


def measured(row: Row, world: int) -> dict[str, Any]:
    """What an ordinary step of a row does on this rank."""
    p, G = weight_of(row, world)
    optimizer = build(row, p)
    (promised,) = optimizer.assignment()
    steps = []
    for _ in range(3):  # after a step that is not like the one before, more flags are told
        p.grad = G.clone()
        with recorded() as calls, traffic() as seen:
            optimizer.step()
        steps.append(seen)
    alone, whole_G = weight_of(row, 0)
    one = build(row, alone)
    for _ in steps:
        alone.grad = whole_G.clone()
        one.step()
    state = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    held = [x.to_local() if hasattr(x, "placements") else x for x in state]
    whole = [x for x in state if not hasattr(x, "placements") or is_replicated(x)]
    size_of_whole = sum(x.numel() * x.element_size() for x in whole)
    return {
        "far": difference(p.detach().full_tensor(), alone.detach()),
        "plan": promised.plan,
        "bytes": promised.bytes_per_step,
        "calls": [name for name, _ in calls],
        "seen": [(kind, count) for kind, count, _ in seen],
        "sums": [call for call in seen if call[0] in ("SUM", "MAX")],
        "first": [(kind, count) for kind, count, _ in steps[0]],
        "state": sum(x.numel() for x in held if x.ndim),  # AdamW's clock has no dimension
        "state bytes": sum(x.numel() * x.element_size() for x in held),
        "whole bytes": size_of_whole,
        "cut bytes": sum(x.numel() * x.element_size() for x in state) - size_of_whole,
    }


def refused(row: Row, world: int, plan: str) -> tuple[str, float, int]:
    """What a plan that is not exact says, how far the weight moved, and how much state there is."""
    p, G = weight_of(row, world)
    before, p.grad = p.detach().to_local().clone(), G
    text, state = "", 0
    try:
        optimizer = build(row, p, plan=plan)
        optimizer.step()
        state = len(optimizer.state)
    except ValueError as error:
        text = str(error)
    return text, difference(p.detach().to_local(), before), state


def run_table(rank: int, world: int, rows: list[Row]) -> list[Any]:
    """Every row on this rank, and its refusals."""
    found = []
    for row in rows:
        plans = {"local": (), "reduce": ("local",), "owner": ("local", "reduce")}[row.plan]
        found.append((measured(row, world), {plan: refused(row, world, plan) for plan in plans}))
    return found
