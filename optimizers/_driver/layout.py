"""What each process holds of a sharded tensor: a box of its index range, by a formula.

``DTensor`` says by its placements how it is cut. A rank holds one box whatever they are, strided
shards of tensor parallelism under FSDP2 included, so any two ways to hold a matrix can be turned
into each other by sending boxes. Nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, int], ...]
"""Per dimension the first index and the one after the last."""
PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types of tensors that are no DTensors, as one can see without a call for each."""


def is_sharded(X: object) -> bool:
    """Whether X is a DTensor; torch.distributed need not have been imported."""
    return hasattr(X, "device_mesh") and hasattr(X, "placements")


def local(X: Tensor) -> Tensor:
    """What this process holds of X: X itself, or the memory of a DTensor, without a copy."""
    if not is_sharded(X):
        return X
    X = X.detach() if torch.is_grad_enabled() else X  # dispatched, which takes 8 us
    held: Tensor = X.to_local()  # type: ignore[attr-defined]
    return held


def memory(X: Any) -> Tensor:
    """The tensor that a DTensor holds here, the same object as long as nobody replaces it.

    ``to_local`` makes a new view of a parameter's at every call.
    """
    held: Tensor = X._local_tensor
    return held


def box_of(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Any],
    coordinate: Sequence[int],
) -> Box:
    """The box that a coordinate of a mesh holds of a tensor.

    Plain shards cut first, in the order of the mesh, then strided ones in reverse order: FSDP2
    shards what tensor parallelism left, though its axis comes first in the mesh. Each cuts the
    present interval [a, b) in pieces of ceil((b - a) / size). torch's own function differs for
    uneven strided shards, and is wrong there.

    Args:
        shape: Shape of the whole tensor.
        mesh_shape: Sizes of the axes of the mesh.
        placements: One per axis of the mesh.
        coordinate: One index per axis of the mesh.
    """
    box = [(0, size) for size in shape]
    axes = [axis for axis, x in enumerate(placements) if shard_dim(x) is not None]
    strided = [axis for axis in axes if _is_strided(placements[axis])]
    for axis in [axis for axis in axes if axis not in strided] + strided[::-1]:
        dim = shard_dim(placements[axis])
        assert dim is not None
        a, b = box[dim]
        piece = -(-(b - a) // mesh_shape[axis])
        first = min(a + coordinate[axis] * piece, b)
        box[dim] = (first, min(first + piece, b))
    return tuple(box)


@lru_cache(maxsize=1024)
def _boxes_of(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Any, ...],
    coordinates: tuple[tuple[int, ...], ...],
) -> tuple[Box, ...]:
    """The boxes of many coordinates, one object for all tensors that lie alike."""
    return tuple(box_of(shape, mesh_shape, placements, c) for c in coordinates)


def _entry(grid: Any, coordinate: Sequence[int]) -> Any:
    """An entry of nested lists."""
    for i in coordinate:
        grid = grid[i]
    return grid


def shard_dim(placement: Any) -> int | None:
    """The dimension that a placement cuts, None for a replicated one."""
    dim: int | None = getattr(placement, "dim", None)
    return dim


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"


def _are_boxes(placements: Sequence[Any], mesh_shape: Sequence[int]) -> bool:
    """Whether every strided shard cuts what all later axes have left, as FSDP2 makes them.

    A reshaped DTensor may have others, of which a rank holds every so many rows.
    """
    return all(
        x.split_factor
        == math.prod(
            size
            for later, size in zip(placements[axis + 1 :], mesh_shape[axis + 1 :], strict=True)
            if shard_dim(later) == x.dim
        )
        for axis, x in enumerate(placements)
        if _is_strided(x) and mesh_shape[axis] > 1
    )


def numel(box: Box) -> int:
    """Entries of a box."""
    return math.prod(b - a for a, b in box)


def intersection(first: Box, second: Box) -> Box:
    """The box that two boxes have in common, without entries where they are disjoint."""
    common = []
    for (a, b), (c, d) in zip(first, second, strict=True):
        start = max(a, c)
        common.append((start, max(start, min(b, d))))
    return tuple(common)


def part(X: Tensor, box: Box, origin: Box | None = None) -> Tensor:
    """The entries of a box, as a view.

    Args:
        X: The whole tensor, or what its holder has of it.
        box: What to take.
        origin: The box that X is; None (default): the whole tensor.
    """
    starts = [a for a, _ in origin] if origin is not None else [0] * len(box)
    return X[tuple(slice(a - start, b - start) for (a, b), start in zip(box, starts, strict=True))]


@dataclass(frozen=True)
class Layout:
    """How a tensor lies over the ranks of a mesh.

    Attributes:
        mesh: The mesh.
        placements: One per axis of the mesh, shards or replicated.
        shape: Shape of the whole tensor.
    """

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """Axes of the mesh that cut the tensor in more than one piece."""
        sizes = self.mesh.shape
        return tuple(
            axis
            for axis, x in enumerate(self.placements)
            if shard_dim(x) is not None and sizes[axis] > 1
        )

    @cached_property
    def all_axes(self) -> tuple[int, ...]:
        """Axes of the mesh with more than one rank: those that cut, and those of replicas."""
        return tuple(axis for axis, size in enumerate(self.mesh.shape) if size > 1)

    @cached_property
    def is_first_replica(self) -> bool:
        """Whether this process is the first of those that hold the same."""
        return not any(i for axis, i in enumerate(self.coordinate) if axis not in self.axes)

    @cached_property
    def dims(self) -> frozenset[int]:
        """Dimensions of the tensor that are cut."""
        found = (shard_dim(self.placements[axis]) for axis in self.axes)
        return frozenset(dim for dim in found if dim is not None)

    def dim_of(self, axis: int) -> int | None:
        """The dimension that an axis of the mesh cuts, None for one with replicas."""
        return shard_dim(self.placements[axis])

    @cached_property
    def coordinate(self) -> tuple[int, ...]:
        """This process in the mesh."""
        found = self.mesh.get_coordinate()
        if found is None:
            raise ValueError(
                "this process is not in the mesh of the tensor; leave the parameter out of the "
                "optimizer of this process"
            )
        return tuple(found)

    def over(self, axes: Sequence[int]) -> Ranks:
        """The ranks that differ from this process along some axes, with what each holds.

        Args:
            axes: Axes of the mesh, at least those of the layout for pieces to add up to the whole.
        """
        known = self._ranks.get(tuple(axes))
        if known is None:
            known = self._ranks[tuple(axes)] = self._ranks_along(axes)
        return known

    @cached_property
    def _ranks(self) -> dict[tuple[int, ...], Ranks]:
        return {}

    def _ranks_along(self, axes: Sequence[int]) -> Ranks:
        mesh, own = self.mesh, self.coordinate
        coordinates = [own]
        for axis in axes:
            coordinates = [
                (*c[:axis], i, *c[axis + 1 :]) for c in coordinates for i in range(mesh.shape[axis])
            ]
        grid = mesh.mesh.tolist()
        # a process group sorts its ranks, whatever their order in the mesh
        pairs = sorted((int(_entry(grid, c)), c) for c in coordinates)
        found = tuple(c for _, c in pairs)
        boxes = _boxes_of(self.shape, tuple(mesh.shape), self.placements, found)
        return Ranks(tuple(r for r, _ in pairs), found.index(own), boxes, found)

    @cached_property
    def box(self) -> Box:
        """What this process holds."""
        return box_of(self.shape, self.mesh.shape, self.placements, self.coordinate)

    @cached_property
    def largest(self) -> int:
        """Entries that the fullest rank holds, equal on all ranks: the first coordinate's."""
        first = [0] * self.mesh.ndim
        return numel(box_of(self.shape, self.mesh.shape, self.placements, first))

    def wrap(self, held: Tensor) -> DTensor:
        """The DTensor of which this process holds ``held``, which shares its memory."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        shape, stride = torch.Size(self.shape), _row_major(self.shape)
        if held.device.type == self.mesh.device_type:
            return DTensor.from_local(
                *(held, self.mesh, self.placements), run_check=False, shape=shape, stride=stride
            )
        # that would move what is offloaded to the host to the device of the mesh
        spec = DTensorSpec(
            self.mesh, self.placements, tensor_meta=TensorMeta(shape, stride, held.dtype)
        )
        make: Any = DTensor
        wrapped: DTensor = make(held, spec, requires_grad=False)
        return wrapped

    def cut(self, X: Tensor) -> DTensor:
        """The DTensor of a whole tensor that this process has, as a copy of its own piece."""
        return self.wrap(part(X, self.box).clone(memory_format=torch.contiguous_format))

    def full(
        self, fill: float, dtype: torch.dtype, device: torch.device, eye: bool = False
    ) -> DTensor:
        """A DTensor of one value, or of the last two dimensions' identity matrix.

        Args:
            fill: The value.
            dtype: Its dtype.
            device: Its device.
            eye: Whether entries of equal last indices are 1 and others 0.
        """
        shape = [b - a for a, b in self.box]
        held = torch.full(shape, fill, dtype=dtype, device=device)
        if eye:
            (rows, _), (cols, _) = self.box[-2:]
            i = torch.arange(rows, self.box[-2][1], dtype=torch.int64, device=device)
            j = torch.arange(cols, self.box[-1][1], dtype=torch.int64, device=device)
            held.copy_((i[:, None] == j).to(dtype))
        return self.wrap(held)

    def fits(self, X: Any) -> bool:
        """Whether a tensor is a DTensor of this layout."""
        if not is_sharded(X):
            return False
        return bool(X.device_mesh == self.mesh) and tuple(X.placements) == self.placements

    def redistribute(self, X: Tensor) -> DTensor:
        """X, whole on this process or a DTensor, in this layout; DTensors of others communicate."""
        from torch.distributed.tensor import DTensor

        if not isinstance(X, DTensor):
            return self.cut(X)
        if X.device_mesh == self.mesh:
            return X if X.placements == self.placements else X.redistribute(None, self.placements)
        return self.cut(X.full_tensor())


@dataclass(frozen=True)
class Ranks:
    """Ranks that share tensors, in the order of their process group.

    Attributes:
        ranks: Their global ranks, ascending.
        rank: Number of this process among them.
        boxes: What each holds of the tensor that was asked about.
        coordinates: Where each is in the mesh.
    """

    ranks: tuple[int, ...]
    rank: int
    boxes: tuple[Box, ...]
    coordinates: tuple[tuple[int, ...], ...]


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return tuple(strides)


def layout_of(X: Tensor, text: str) -> Layout | None:
    """How a tensor lies over ranks, None if it is no DTensor.

    Args:
        X: The tensor.
        text: Words that name it.

    Raises:
        ValueError: For partial sums, for shards that are no boxes, and where torch holds something
            else than the formula says.
    """
    if not is_sharded(X):
        return None
    placements = tuple(X.placements)  # type: ignore[attr-defined]
    if any(type(x).__name__ not in _KNOWN for x in placements):
        raise ValueError(
            f"{text} has the placements {placements}, of which only shards and replicas can be "
            "trained; redistribute it before the optimizer is built"
        )
    layout = Layout(X.device_mesh, placements, tuple(X.shape))  # type: ignore[attr-defined]
    if not _are_boxes(placements, layout.mesh.shape):
        raise ValueError(
            f"{text} has the placements {placements} on a mesh {tuple(layout.mesh.shape)}, which "
            "give a rank entries that do not lie together; redistribute it before the optimizer is "
            "built"
        )
    try:
        held = numel(layout.box)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error
    if held != local(X).numel():
        raise ValueError(
            f"{text} holds {local(X).numel()} entries here, but its placements {placements} on a "
            f"mesh {tuple(layout.mesh.shape)} say {held}; shard it evenly"
        )
    return layout


_KNOWN = frozenset(("Shard", "_StridedShard", "Replicate"))


def resting_layout(
    layout: Layout, shape: tuple[int, ...], dim: int | None, follows: bool = False
) -> Layout:
    """The layout of state on a weight's mesh.

    Args:
        layout: The weight's layout.
        shape: Shape of the state.
        dim: The dimension that every axis cuts which cuts the weight; None: all is replicated.
        follows: Whether the dimension is the one that is cut of the weight, so that strided shards
            stay strided (default: no).
    """
    from torch.distributed.tensor import Replicate, Shard

    def placement(x: Any) -> Any:
        if dim is None or shard_dim(x) is None:
            return Replicate()
        is_strided = follows and _is_strided(x)
        return type(x)(dim, split_factor=x.split_factor) if is_strided else Shard(dim)

    return Layout(layout.mesh, tuple(map(placement, layout.placements)), shape)


def longest_dim(layout: Layout, shape: tuple[int, ...]) -> int | None:
    """The dimension to cut state along that no rank needs whole; None if all are too short.

    Args:
        layout: The weight's layout.
        shape: Shape of the state.
    """
    ranks = math.prod(layout.mesh.shape[axis] for axis in layout.axes)
    if not shape or max(shape) < 2 * ranks:
        return None
    return shape.index(max(shape))
