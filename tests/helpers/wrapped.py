"""Small models under FSDP2, every class on them, and a plain twin that gets the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.every_class import CLASSES
from helpers.sharded import difference, meshes, whole

NAMES = [cls.__name__ for cls in CLASSES if cls.__name__ != "SwitchLoRA"]
"""Every class that trains sharded weights."""
BY_NAME = {cls.__name__: cls for cls in CLASSES}
OPTIONS: dict[str, dict[str, Any]] = {
    "GaLore": {"rank": 2, "update_proj_gap": 2},
    "APOLLO": {"rank": 2, "update_proj_gap": 2},
    "Fira": {"rank": 2, "update_proj_gap": 2},
    "FRUGAL": {"density": 0.5, "update_gap": 2},
    "DCTAdamW": {"rank": 2, "update_proj_gap": 2},
    "Trion": {"rank": 2},
}
EXACT = ("Muon", "ARO")
"""Classes that have the bits of one process; others may run on shards, with sums over ranks."""


def bound_of(name: str) -> float:
    """Largest difference to one process: batches of few tokens leave matrices near singular."""
    return 0.0 if name in EXACT else 2e-5


class LoRALinear(nn.Module):
    """A frozen layer with a pair beside it, as peft has it."""

    def __init__(self, n: int, m: int, r: int = 4) -> None:
        super().__init__()
        self.base_layer = nn.Linear(n, m, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False)})
        self.scaling = {"default": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scaling["default"] * low


class Block(nn.Module):
    """A residual block of two matrices."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), linear(8, 12), linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Tokens to logits."""

    def __init__(self, lora: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(13, 8)
        self.layers = nn.ModuleList([Block(LoRALinear if lora else nn.Linear) for _ in range(2)])
        self.lm_head = nn.Linear(8, 13, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def net(name: str, dtype: torch.dtype = torch.float32) -> Net:
    """A model for a class: with pairs for classes of pairs. Equal on all ranks."""
    torch.manual_seed(1)
    return Net(lora="LoRA" in name).to(dtype)


def backward(model: nn.Module, k: int, rank: int = 0) -> None:
    """Gradients of a batch of this rank's own."""
    tokens = torch.randint(13, (2, 5), generator=torch.Generator().manual_seed(100 * k + rank))
    F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()


def wrap(model: Net, world: int, **options: Any) -> Net:
    """The model under ``fully_shard``, block by block; columns are split where they divide."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def place(p: nn.Parameter) -> Any:
        splits_columns = p.ndim == 2 and p.shape[1] % world == 0 and p.shape[1] >= p.shape[0]
        return Shard(1 if splits_columns else 0)

    options = {"mesh": meshes(world)["all"], "shard_placement_fn": place, **options}
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def made(name: str, params: Any, **options: Any) -> Any:
    """The optimizer of a class by its name; ``torch.X`` is torch's own."""
    if name.startswith("torch."):
        params = params.parameters() if isinstance(params, nn.Module) else params
        return getattr(torch.optim, name[6:])(params, **{"lr": 0.02, **options})
    return BY_NAME[name](
        params, **{"lr": 0.02, "weight_decay": 0.1, **OPTIONS.get(name, {}), **options}
    )


class Twin:
    """A plain copy of a model with an optimizer of its own, stepped on the whole gradients.

    Args:
        model: The model before it is wrapped.
        build: Makes the optimizer of the copy.
    """

    def __init__(self, model: nn.Module, build: Callable[[nn.Module], Any]) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = build(self.model)

    def step(self, model: nn.Module) -> None:
        """A step on what the wrapped model has as gradients. Communicates."""
        for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else whole(q.grad)
        self.optimizer.step()

    def far(self, model: nn.Module) -> float:
        """Largest difference of whole weights. Communicates."""
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        return max(difference(whole(q), whole(p)) for q, p in pairs)

    def state_far(self, model: nn.Module, optimizer: Any) -> float:
        """Largest difference of whole state. Communicates."""
        far = 0.0
        for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
            mine, theirs = self.optimizer.state.get(p, {}), optimizer.state.get(q, {})
            if list(mine) != list(theirs):
                return float("inf")
            far = max([far, *(difference(whole(theirs[key]), whole(mine[key])) for key in mine)])
        return far


COLLECTIVES = (
    *("all_reduce", "all_to_all", "all_to_all_single", "all_gather", "all_gather_into_tensor"),
    *("all_gather_object", "broadcast", "broadcast_object_list", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "gather", "send", "recv", "isend", "irecv", "barrier"),
    *("batch_isend_irecv", "gather_object", "scatter_object_list", "new_group"),
)


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """Collectives that are called inside, in any thread: (name, bytes sent to others).

    Calls of ``torch.distributed`` are seen, and what dispatches to c10d without them, as DTensor
    does. Bytes are those of ``all_to_all_single``, else 0.
    """
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[str, int]] = []
    depth = [0]

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            is_call = not any(x in str(func) for x in ("wait_tensor", "_wrap_tensor"))
            if func.namespace in ("c10d", "_c10d_functional") and not depth[0] and is_call:
                calls.append((str(func), 0))
            return func(*args, **(kwargs or {}))

    def spied(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:
                calls.append((name, _sent(name, args, kwargs)))
            depth[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    saved = [
        (home, name, getattr(home, name))
        for home in (dist, dist.distributed_c10d)
        for name in COLLECTIVES
        if hasattr(home, name)
    ]
    for home, name, original in saved:
        setattr(home, name, spied(name, original))
    try:
        with Dispatched():
            yield calls
    finally:
        for home, name, original in saved:
            setattr(home, name, original)


def _sent(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that an all_to_all_single sends to others."""
    import torch.distributed as dist

    if name != "all_to_all_single":
        return 0
    places = ("output", "input", "out_sizes", "in_sizes", "group")
    given = {**dict(zip(places, args, strict=False)), **kwargs}
    X, group = given["input"], given.get("group")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = given.get("in_sizes") or given.get("input_split_sizes") or [len(X) // world] * world
    row = X[:1].numel() if len(X) else 0
    return sum(size for j, size in enumerate(sizes) if j != rank) * row * X.element_size()
