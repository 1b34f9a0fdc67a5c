"""``longest_dim_placement``: how to shard weights so that low-rank methods have nothing to send."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._core.validation import is_number, shown
from .layout import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

__all__ = ["dim_to_shard", "longest_dim_placement", "shard_axis_size"]


def longest_dim_placement(mesh_or_world: DeviceMesh | int) -> Callable[[Tensor], Shard]:
    """Return the function that shards every matrix along its longer side, for ``fully_shard``.

    A wide matrix is cut along its columns, every other parameter along its first dimension. The
    projected side of GaLore and its kin, and the rank of LoRA's factors A (r x n) and B (m x r),
    then lie whole on every rank, so that their steps need the least communication.

    ``fully_shard`` can cut columns only into equal pieces. A wide matrix whose columns do not
    divide by the number of ranks is therefore cut along its rows.

    Args:
        mesh_or_world: The mesh that ``fully_shard`` gets, whose last axis shards (the first of a
            two-dimensional one replicates), or the number of ranks along that axis.

    Returns:
        A function for ``fully_shard(..., shard_placement_fn=)``: ``Shard(1)`` for a 2-D weight with
        more columns than rows whose columns divide by the size of the axis, else ``Shard(0)``.

    Raises:
        ValueError: If ``mesh_or_world`` is neither a mesh nor a positive number of ranks.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import longest_dim_placement
        >>> place = longest_dim_placement(4)
        >>> down, up, bias = torch.empty(512, 2048), torch.empty(2048, 512), torch.empty(2048)
        >>> [place(p).dim for p in (down, up, bias)]
        [1, 0, 0]

        ``fully_shard(model, mesh=mesh, shard_placement_fn=longest_dim_placement(mesh))``
    """
    size = shard_axis_size("mesh_or_world", mesh_or_world)

    def place(p: Tensor) -> Shard:
        from torch.distributed.tensor import Shard

        # tensor parallelism may have cut the columns before, and each piece must divide
        return Shard(dim_to_shard(tuple(p.shape), size, tuple(local(p).shape)))

    return place


def shard_axis_size(name: str, mesh_or_world: Any) -> int:
    """The number of ranks that share a weight: of the last axis of a mesh, or as given.

    Args:
        name: The parameter that a message names.
        mesh_or_world: A mesh or an int.

    Raises:
        ValueError: If it is neither, or no positive number.
    """
    shape = getattr(mesh_or_world, "shape", None)
    if isinstance(shape, tuple) and shape and hasattr(mesh_or_world, "get_coordinate"):
        return int(shape[-1])
    if is_number(mesh_or_world, numbers.Integral) and mesh_or_world >= 1:
        return int(mesh_or_world)
    raise ValueError(
        f"{name} must be a DeviceMesh or a positive number of ranks, got {shown(mesh_or_world)}"
    )


def dim_to_shard(shape: Sequence[int], size: int, held: Sequence[int] | None = None) -> int:
    """The dimension that :func:`longest_dim_placement` cuts.

    Args:
        shape: Shape of the weight.
        size: Number of ranks.
        held: Shape of what is cut, where another axis has cut the weight before; None (default):
            all of it.
    """
    columns = (held if held is not None else shape)[-1] if len(shape) == 2 else 0
    return int(len(shape) == 2 and shape[1] > shape[0] and columns % size == 0)
