"""Weights that lie over ranks, and what compares their training with that of one process.

A :class:`Case` is plain data, which ranks get through a pipe; :func:`compare` runs it on a rank
twice, on whole tensors and on shards, and :func:`check` looks at what all ranks found.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import gradients, weight
from helpers.ranks import mesh_of, pool

ROUNDING = 5e-6
"""Largest difference to one process, by the largest entry, where sums run over ranks."""
BOUNDS = {"soap-short": 2e-4}
"""The same for methods whose state has all eigenvectors, also those of eigenvalues near a tie."""
EXACT = frozenset(
    (
        *("muon", "muon-ns5", "muon-plain", "muon-low-rank", "muon-kaczmarz", "rows", "pick"),
        *("galore-full", "frugal-randk", "aro", "aro-adam", "aro-eigh", "aro-polar", "AdamW"),
        *("soap", "soap-kl", "soap-reference", "soapmuon"),
    )
)
"""Methods whose formulas see whole matrices, on one process as on ranks."""
SUMMED = frozenset({**METHODS, **PAIRS}) - EXACT - {x for x in PAIRS if x.endswith("reference")}
"""Methods that may run on shards, with sums or products of other shapes than on one process."""


@dataclass(frozen=True)
class Piece:
    """One parameter.

    Attributes:
        shape: Its whole shape.
        dim: The dimension that is split; None: it is a plain tensor on every rank. For a mesh of
            several axes one for each, None where the axis has replicas.
        view: The view of its group; None: it shares the first group.
        dtype: Name of its dtype.
        mesh: The mesh it lies on, a key of :func:`meshes`.
    """

    shape: tuple[int, ...]
    dim: int | tuple[int | None, ...] | None = 0
    view: str | None = None
    dtype: str = "float32"
    mesh: str = "all"


@dataclass(frozen=True)
class Case:
    """A run of an optimizer.

    Attributes:
        method: A key of ``METHODS`` or ``PAIRS``, or a class of ``torch.optim``.
        pieces: The parameters; for pairs A, B, A, B and so on.
        steps: Number of steps.
        options: Further keywords.
        missing: (step, number of the parameter) without a gradient on any rank.
        seed: Of weights and gradients.
    """

    method: str
    pieces: tuple[Piece, ...]
    steps: int = 5
    options: dict[str, Any] = field(default_factory=dict)
    missing: tuple[tuple[int, int], ...] = ()
    seed: int = 0


@cache
def meshes(world: int) -> dict[str, Any]:
    """Meshes by name: of all ranks, and on 4 ranks those of two that a square is made of."""
    found = {"all": mesh_of(world)}
    if world == 4:
        from torch.distributed.device_mesh import init_device_mesh

        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found |= {"a": square["a"], "b": square["b"], "square": square}
    return found


def lay(X: Tensor, mesh: Any, *dims: int | None) -> Any:
    """A whole tensor as a DTensor, cut along one dimension per axis of the mesh."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    return distribute_tensor(X, mesh, placements, src_data_rank=None)


def whole(X: Any) -> Any:
    """A copy of a tensor with what all ranks hold; other values as they are. Communicates."""
    if not isinstance(X, Tensor):
        return X
    held = X.detach()
    return (held.full_tensor() if hasattr(held, "full_tensor") else held).clone()


def sharded(piece: Piece, X: Tensor, world: int) -> Tensor:
    """A whole tensor as its piece says; world 0: one process has all."""
    X = X.to(getattr(torch, piece.dtype))
    if piece.dim is None or world == 0:
        return X
    dims = piece.dim if isinstance(piece.dim, tuple) else (piece.dim,)
    return lay(X, meshes(world)[piece.mesh], *dims)


def parameters(case: Case, world: int) -> list[nn.Parameter]:
    """The parameters of a case."""
    return [
        nn.Parameter(sharded(piece, weight(piece.shape, case.seed + i).detach(), world))
        for i, piece in enumerate(case.pieces)
    ]


def optimizer_of(case: Case, params: list[nn.Parameter]) -> Any:
    """The optimizer of a case: pairs, or one group for every view."""
    if case.method in PAIRS:
        return PAIRS[case.method](list(zip(params[::2], params[1::2], strict=True)), **case.options)
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    if case.method not in METHODS:
        return getattr(torch.optim, case.method)(named, lr=0.02, **case.options)
    groups: dict[str | None, dict[str, Any]] = {}
    for piece, item in zip(case.pieces, named, strict=True):
        view = {} if piece.view is None else {"view": piece.view}
        groups.setdefault(piece.view, {"params": [], **view})["params"].append(item)
    return METHODS[case.method](list(groups.values()), **case.options)


def set_gradients(case: Case, params: list[nn.Parameter], step: int, world: int) -> None:
    """Gradients of one step, the same whole ones whatever the number of ranks."""
    for i, (piece, p) in enumerate(zip(case.pieces, params, strict=True)):
        p.grad = None
        if (step, i) not in case.missing:
            G = _series(piece.shape, case.steps, case.seed + i)[step].clone()
            p.grad = sharded(piece, G, world)


@cache
def _series(shape: tuple[int, ...], steps: int, seed: int) -> list[Tensor]:
    return gradients(shape, steps, seed)


def train(case: Case, world: int) -> tuple[Any, list[nn.Parameter], list[list[Tensor]]]:
    """The optimizer, its parameters, and whole weights after the first step and the last.

    What goes wrong between them stays in the weights; to gather them costs as much as a step.
    """
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    seen = []
    for step in range(case.steps):
        set_gradients(case, params, step, world)
        optimizer.step()
        if step in (0, case.steps - 1):
            seen.append([whole(p) for p in params])
    return optimizer, params, seen


def whole_state(optimizer: Any, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """State of every parameter, whole. Communicates."""
    return [{k: whole(x) for k, x in optimizer.state.get(p, {}).items()} for p in params]


def difference(a: Any, b: Any) -> float:
    """Largest difference by the largest entry, 0.0 for equal bits, infinity for other kinds."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if a.dtype != b.dtype or a.shape != b.shape:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    x, y = a.double(), b.double()
    return float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))


def compare(rank: int, world: int, case: Case) -> dict[str, Any]:
    """What differs on shards from whole tensors, and what is wrong with the state of a rank."""
    optimizer, params, seen = train(case, world)
    state = whole_state(optimizer, params)
    found: dict[str, Any] = {
        "keys": [list(values) for values in state],
        "digest": digest([*seen[-1], *replicas(optimizer, params)]),
        "problems": problems(optimizer, params),
        "rows": rows(optimizer),
        "weights": {},
        "state": {},
    }
    if rank == 0:
        reference, others, expected = train(case, 0)
        found["keys_of_one"] = [list(reference.state.get(p, {})) for p in others]
        for i, name in enumerate(names(case)):
            found["weights"][name] = max(
                difference(a[i], b[i]) for a, b in zip(seen, expected, strict=True)
            )
        for name, p, values in zip(names(case), others, state, strict=True):
            for key, value in reference.state.get(p, {}).items():
                found["state"][f"{name} {key}"] = difference(values.get(key), value)
    return found


def names(case: Case) -> list[str]:
    """A name for every parameter that tells how it lies."""
    return [
        f"{i}:{'x'.join(map(str, x.shape))} on {x.dim} {x.view or ''}".strip()
        for i, x in enumerate(case.pieces)
    ]


def rows(optimizer: Any) -> list[tuple[str, str, int]]:
    """(rule, plan, bytes) of every row of the assignment."""
    if not hasattr(optimizer, "assignment"):
        return []
    return [(row.rule, row.plan, row.bytes_per_step) for row in optimizer.assignment()]


def is_replicated(X: Any) -> bool:
    """Whether every rank of a tensor's mesh holds all of it."""
    return hasattr(X, "placements") and all(x.is_replicate() for x in X.placements)


def replicas(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """What this rank holds of all that is to be equal on all ranks of the world."""
    found = []
    for p in params:
        for value in optimizer.state.get(p, {}).values():
            if is_replicated(value):
                found.append(value.to_local())
            elif isinstance(value, Tensor) and not hasattr(value, "placements"):
                found.append(value)
    return found


def digest(tensors: list[Tensor]) -> str:
    """A hash of bits."""
    made = hashlib.sha256()
    for X in tensors:
        made.update(X.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def problems(optimizer: Any, params: list[nn.Parameter]) -> list[str]:
    """What breaks the promises on state: on the weight's mesh, contiguous, split where it can."""
    found = []
    for i, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor):
                continue
            text = f"state {key!r} of parameter {i}, {tuple(value.shape)}"
            if hasattr(p, "placements") and value.ndim:
                if not hasattr(value, "placements"):
                    found.append(f"{text}, is no DTensor")
                    continue
                if value.device_mesh != p.device_mesh:
                    found.append(f"{text}, lies on another mesh")
                as_weight = key in ("momentum_buffer", "residual")
                if as_weight and tuple(value.placements) != tuple(p.placements):
                    found.append(f"{text}, lies as {value.placements}, not as its weight")
                value = value.to_local()
            elif hasattr(value, "placements") and not hasattr(p, "placements"):
                found.append(f"{text}, is a DTensor and its weight is not")
                continue
            if not value.is_contiguous():
                found.append(f"{text}, is not contiguous")
    return found


def check(case: Case, world: int, bound: float | None = None, timeout: float = 60.0) -> list[Any]:
    """Run a case on ranks and hold it to one process; what the ranks found.

    Args:
        case: The case.
        world: Number of ranks.
        bound: Largest difference; None: 0, or :data:`ROUNDING` for :data:`SUMMED`.
        timeout: Seconds after which the ranks are ended.
    """
    if bound is None:
        bound = BOUNDS.get(case.method, ROUNDING) if case.method in SUMMED else 0.0
    found = pool(world).run(compare, case, timeout=timeout)
    first = found[0]
    far = {k: x for kind in ("weights", "state") for k, x in first[kind].items() if not x <= bound}
    assert not far, f"differ from one process by more than {bound:g}: {far}"
    mine, one = first["keys"], first["keys_of_one"]
    assert mine == one, f"keys of state are {mine}, on one process {one}"
    for other in found:
        assert not other["problems"], other["problems"]
        assert other["keys"] == first["keys"], "keys of state differ between ranks"
        assert other["digest"] == first["digest"], "replicas differ between ranks"
        if case.options.get("plan") != "gather":
            assert all(plan != "gather" for _, plan, _ in other["rows"]), other["rows"]
    return found
