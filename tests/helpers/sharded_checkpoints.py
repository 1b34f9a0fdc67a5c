"""Runs that are saved in the middle of a window and go on with another number of ranks.

Functions that take ``rank, world`` run on the pools of ``helpers/ranks.py``. World 0 is one process
with plain tensors. Weights are carried by hand; what the tests are about is the optimizer.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import gradients, weight
from helpers.ranks import mesh_of, pool
from stiefel.optimizers import Muon

ROWS = {"tall": (13, 6), "wide": (5, 12), "square": (8, 8), "flat": (3, 9), "vector": (7,)}
COLUMNS = {"tall": (13, 12), "wide": (5, 24), "square": (12, 12), "vector": (7,)}
"""Shapes to be cut along rows and along columns, which FSDP2 only cuts evenly."""
LARGE = {"tall": (70, 84), "wide": (16, 300), "vector": (7,)}
"""Large enough for state in eight bits."""
PAIR_SHAPES = {"A0": (4, 9), "B0": (7, 4), "A1": (2, 5), "B1": (6, 2)}
PAIR_COLUMNS = {"A0": (4, 24), "B0": (13, 4)}
"""A is cut along its columns there and B along its rows, so that they run on shards."""
WAYS = {
    "dcp": ({}, {}),
    "flat": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "offloaded": ({"cpu_offload": True}, {}),
    "full": ({"full_state_dict": True}, {"full_state_dict": True}),
    "full-broadcast": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
    "full-flat": (
        {"full_state_dict": True, "flatten_optimizer_state_dict": True},
        {"flatten_optimizer_state_dict": True},
    ),
    "torch": (None, None),
}
"""Options of torch's distributed checkpoints on saving and loading; None: ``state_dict()``."""


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        method: Key of METHODS or PAIRS, or "adamw" for matrices in a group of AdamW.
        dim: Dimension whose shapes are taken, and that matrices are cut along; of pairs A.
        cut: Another dimension that matrices are cut along.
        dtype: Dtype of the weights.
        options: Settings of the optimizer.
        large: Whether matrices are large enough for state in eight bits.
        steps: Length of the whole run.
        stop: Steps before it is saved.
    """

    method: str
    dim: int = 0
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 7
    stop: int = 4
    large: bool = False
    cut: int | None = None

    @property
    def shapes(self):
        if self.method in PAIRS:
            return PAIR_COLUMNS if self.dim else PAIR_SHAPES
        if self.large:
            return LARGE
        return COLUMNS if self.dim else ROWS

    def grads(self, t):
        """Whole gradients of step t, by name."""
        found = {}
        for k, (name, shape) in enumerate(self.shapes.items()):
            matrix = shape if len(shape) > 1 else (*shape, 1)
            found[name] = gradients(matrix, t + 1, k)[t].view(shape).to(self.dtype)
        return found


def build(case, world, seed=0, mesh=None):
    """Model and optimizer of one process or rank; the seed is that of its first weights."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = nn.Module()
    for k, (name, shape) in enumerate(case.shapes.items()):
        model.register_parameter(name, weight(shape, seed + k, case.dtype))
    dim = case.dim if case.cut is None else case.cut
    if world:
        rows = {p for name, p in model.named_parameters() if name[0] == "B" or p.ndim == 1}
        fully_shard(
            model,
            mesh=mesh_of(world) if mesh is None else mesh,
            shard_placement_fn=lambda p: Shard(0 if p in rows else dim),
        )
    if case.method in PAIRS:
        params = list(model.parameters())
        pairs = list(zip(params[::2], params[1::2], strict=True))
        return model, PAIRS[case.method](pairs, **case.options)
    named = list(model.named_parameters())
    if case.method == "adamw":
        group = {"params": named, "rule": "adamw"}
        return model, Muon([group], **{"lr": 0.02, "weight_decay": 0.1, **case.options})
    return model, METHODS[case.method](named, **case.options)


def laid_like(p, X):
    """A whole tensor as it lies over the ranks of a parameter."""
    if not hasattr(p, "device_mesh"):
        return X.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(X.clone(), p.device_mesh, p.placements, src_data_rank=None)


def whole(X):
    """The whole tensor of a DTensor; other values as they are."""
    X = X.full_tensor() if hasattr(X, "device_mesh") else X
    return X.detach().clone() if isinstance(X, torch.Tensor) else X


def weights_of(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def set_weights(model, weights):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(laid_like(p, weights[name]))


def state_of(model, optimizer):
    """Whole state by name and key, sorted: DTensors communicate."""
    return {
        name: {key: whole(X) for key, X in sorted(optimizer.state.get(p, {}).items())}
        for name, p in model.named_parameters()
    }


def forms_of(model, optimizer):
    """By name and key, what all ranks must have in common of state, but for values."""
    found = {}
    for name, p in model.named_parameters():
        for key, X in optimizer.state.get(p, {}).items():
            is_tensor = isinstance(X, torch.Tensor)
            form = (type(X).__name__, tuple(X.shape), X.dtype) if is_tensor else X
            found[name, key] = (form, str(getattr(X, "placements", None)))
            if is_tensor:
                held = X.to_local() if hasattr(X, "device_mesh") else X
                assert held.is_contiguous(), (name, key)
                assert not X.requires_grad, (name, key)
    return list(found.items())


def train(case, model, optimizer, first, last):
    """Steps first to last - 1 on whole gradients that all ranks know."""
    for t in range(first, last):
        for name, p in model.named_parameters():
            p.grad = laid_like(p, case.grads(t)[name])
        optimizer.step()


def plain_run(case, stop=None):
    """Weights and state of one process after ``stop`` steps, and its checkpoint."""
    model, optimizer = build(case, 0)
    train(case, model, optimizer, 0, case.steps if stop is None else stop)
    saved = copy.deepcopy(optimizer.state_dict())
    return weights_of(model), state_of(model, optimizer), saved


# saving and loading -----------------------------------------------------------------------------


def write(model, optimizer, way, folder, rank):
    """Save the optimizer's state into a folder, in one of the WAYS."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = WAYS[way][0]
    if options is None:
        saved = optimizer.state_dict()
        torch.save(saved, Path(folder, "state.pt"))
        return
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    if not options.get("full_state_dict"):
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
    elif rank == 0:
        torch.save(saved, Path(folder, "state.pt"))


def read(model, optimizer, way, folder, rank):
    """Load what :func:`write` has saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    saving, loading = WAYS[way]
    path = Path(folder, "state.pt")
    if loading is None:
        optimizer.load_state_dict(torch.load(path, weights_only=True))
        return
    is_alone = not torch.distributed.is_initialized()
    if is_alone and loading.get("broadcast_from_rank0"):
        loading = {}
    options = StateDictOptions(**loading)
    if not saving.get("full_state_dict"):
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.load(saved, checkpoint_id=folder)
        saved = saved["optimizer"]
    else:
        is_empty = loading.get("broadcast_from_rank0") and rank > 0
        saved = {} if is_empty else torch.load(path, weights_only=True)
    set_optimizer_state_dict(model, optimizer, saved, options=options)


def save_loaded(rank, world, case, way, folder, weights, saved):
    """Load a plain checkpoint of one process, and save it again."""
    model, optimizer = build(case, world)
    set_weights(model, weights)
    optimizer.load_state_dict(copy.deepcopy(saved))
    write(model, optimizer, way, folder, rank)
    return {
        "state": state_of(model, optimizer) if rank == 0 or world else None,
        "forms": forms_of(model, optimizer),
    }


def save_trained(rank, world, case, way, folder):
    """Train up to the stop, and save."""
    model, optimizer = build(case, world)
    train(case, model, optimizer, 0, case.stop)
    write(model, optimizer, way, folder, rank)
    return ending(model, optimizer)


def load(rank, world, case, way, folder):
    """Load into an optimizer of other weights; its state."""
    model, optimizer = build(case, world, seed=100)
    read(model, optimizer, way, folder, rank)
    return {"state": state_of(model, optimizer), "forms": forms_of(model, optimizer)}


def resume(rank, world, case, way, folder, weights):
    """Load, and train to the end."""
    model, optimizer = build(case, world, seed=100)
    set_weights(model, weights)
    read(model, optimizer, way, folder, rank)
    train(case, model, optimizer, case.stop, case.steps)
    return ending(model, optimizer)


def run_straight(rank, world, case):
    """Train to the end."""
    model, optimizer = build(case, world)
    train(case, model, optimizer, 0, case.steps)
    return ending(model, optimizer)


def ending(model, optimizer):
    """What is left of a run, and whether any of its rules has run on shards."""
    placed = [unit.placed for unit in optimizer._plan.units]
    return {
        "weights": weights_of(model),
        "state": state_of(model, optimizer),
        "forms": forms_of(model, optimizer),
        "adds": any(x is not None and x.runs_on_shards for x in placed),
    }


def on(world, function, *args):
    """What a function returns on all ranks of a world, which must agree; world 0: here."""
    if not world:
        return function(0, 0, *args)
    found = pool(world).run(function, *args)
    for x in found[1:]:
        for key in x.keys() & {"forms"}:
            assert x[key] == found[0][key]
    return found[0]
