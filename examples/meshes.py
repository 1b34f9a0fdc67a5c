"""The meshes of fsdp.py on which its model can lie, and a model with experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from common import Block, ByteLM, started
from methods import UserError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from stiefel.optimizers import longest_dim_placement

KINDS = {
    "fsdp": "FSDP2 over all processes",
    "hsdp": "pairs of processes share all weights, with replicas of each pair",
    "tp": "tensor parallelism of 2 under FSDP2",
    "ep": "experts over 2 processes and their columns over the others, dense weights over all",
}
EXPERTS = 4
"""Experts of a block; a process of each pair has half of them."""
INNER = 2
"""Size of the inner axis of a mesh of two."""


def make_mesh(kind: str, size: int, device: str) -> DeviceMesh:
    """The processes along one axis, or along two.

    Args:
        kind: Key of ``KINDS``.
        size: Number of processes.
        device: Type of device.
    """
    if kind == "fsdp":
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    if size < 2 * INNER or size % INNER:
        raise UserError(f"--mesh {kind} needs 4 processes, or 6, 8, ...; here are {size}.")
    outer, inner = {
        "hsdp": ("replicate", "shard"),
        "tp": ("shard", "tp"),
        "ep": ("efsdp", "ep"),
    }[kind]
    return init_device_mesh(device, (size // INNER, INNER), mesh_dim_names=(outer, inner))


def parts_of(kind: str, size: int) -> int:
    """Into how many parts a batch goes: processes that share a layer see the same rows."""
    return size // INNER if kind in ("tp", "ep") else size


# -------------------------------------------------------------------------------------- experts


class _Forward(torch.autograd.Function):
    """The sum over a group forwards, nothing backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Backward(torch.autograd.Function):
    """Nothing forwards, the sum over a group backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Experts(nn.Module):
    """Stacked feed-forward layers, of which a process may have some.

    Attributes:
        group: The processes that have the others; None: all are here.
        first: Number of the first expert that is here.
    """

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, hidden, d))
        self.down = nn.Parameter(torch.empty(EXPERTS, d, hidden))
        self.group: Any = None
        self.first = 0

    def forward(self, h: Tensor, weights: Tensor) -> Tensor:
        """The sum of all experts' answers to h (..., d) by weights (..., experts)."""
        up, down = (x.to_local() if isinstance(x, DTensor) else x for x in (self.up, self.down))
        if self.group is not None:
            h, weights = (_Backward.apply(x, self.group) for x in (h, weights))
        here = weights[..., self.first : self.first + len(up)]
        middle = F.silu(torch.einsum("bsd,ehd->bseh", h, up))
        y = torch.einsum("bseh,edh,bse->bsd", middle, down, here)
        return y if self.group is None else _Forward.apply(y, self.group)


class ExpertBlock(Block):
    """A block whose feed-forward layer is a sum of experts that a router weighs."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__(d, heads)
        hidden = self.gate.out_features // 2 // 16 * 16 or 16
        del self.gate, self.up, self.down
        self.router = nn.Linear(d, EXPERTS, bias=False)
        self.experts = Experts(d, hidden)

    def feed_forward(self, h: Tensor) -> Tensor:
        mixed: Tensor = self.experts(h, self.router(h).softmax(-1))
        return mixed


class ExpertLM(ByteLM):
    """The byte model with experts."""

    def __init__(self, d: int, layers: int, heads: int, seq: int) -> None:
        super().__init__(d, layers, heads, seq)
        self.blocks = nn.ModuleList(ExpertBlock(d, heads) for _ in range(layers))


def build_model(kind: str, d: int, layers: int, heads: int, seq: int, seed: int) -> ByteLM:
    """The model that a mesh is for, with the weights that this seed draws."""
    cls = ExpertLM if kind == "ep" else ByteLM
    return started(cls(d, layers, heads, seq), layers, seed)


# ------------------------------------------------------------------------------------- sharding


def shard(model: ByteLM, kind: str, mesh: DeviceMesh, longest: bool) -> None:
    """Let a model lie on a mesh: FSDP2 on each block, then on the rest.

    Args:
        model: Changed in place; its parameters become DTensors.
        kind: Key of ``KINDS``.
        mesh: The processes.
        longest: Whether a matrix is cut along its longer side, instead of always along its rows.
    """
    if kind == "tp":
        for block in model.blocks:
            _cut_heads(block, mesh["tp"])
        mesh = mesh["shard"]
    if kind == "ep":
        for block in model.blocks:
            _cut_experts(block.experts, mesh)
        mesh = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("all",))
    place = longest_dim_placement(mesh) if longest else None
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def _cut_heads(block: Any, mesh: DeviceMesh) -> None:
    """Divide the heads and the hidden neurons of a block."""
    if block.heads % mesh.size():
        raise UserError(f"--mesh tp needs heads that divide by {mesh.size()}, not {block.heads}.")
    block.heads //= mesh.size()
    plan = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    parallelize_module(block, mesh, {**plan, "o": RowwiseParallel(), "down": RowwiseParallel()})


def _cut_experts(experts: Any, mesh: DeviceMesh) -> None:
    """Divide the experts of a block, then the rows of each."""
    inner = mesh["ep"]
    for name, p in list(experts.named_parameters()):
        if p.shape[1] % mesh["efsdp"].size():
            raise UserError(f"--mesh ep: {p.shape[1]} rows do not divide by {mesh['efsdp'].size()}")
        setattr(experts, name, nn.Parameter(distribute_tensor(p.detach(), inner, [Shard(0)])))
    experts.group, experts.first = inner.get_group(), inner.get_local_rank() * EXPERTS // INNER
    fully_shard(experts, mesh=mesh["efsdp"], shard_placement_fn=lambda _: Shard(1))


# ---------------------------------------------------------------------------------------- calls


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of collectives inside, by name."""
    names = ("all_reduce", "all_to_all_single", "all_gather", "all_gather_into_tensor", "broadcast")
    found: dict[str, int] = {}
    before = {name: getattr(dist, name) for name in names}

    def spied(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            found[name] = found.get(name, 0) + 1
            return before[name](*args, **options)

        return call

    for name in names:
        setattr(dist, name, spied(name))
    try:
        yield found
    finally:
        for name, original in before.items():
            setattr(dist, name, original)
