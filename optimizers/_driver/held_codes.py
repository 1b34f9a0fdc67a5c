"""8-bit state over ranks: which parts of it are codes, and where their scales lie.

A scale belongs to 256 numbers of a row. Where every rank holds whole blocks, codes and scales are
cut alike. Where a cut falls inside of a block, the state stays in floats; scales of -1 stand beside
it then, so that a distributed checkpoint has the same keys for any number of ranks, and tells codes
from floats.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ...kernels.quantize import BLOCK
from .layout import Box, Layout, numel, shard_dim

NO_SCALE = -1.0
"""The scale of state that stays in floats."""


@lru_cache(maxsize=4096)
def scales_layout(layout: Layout, scales: tuple[int, ...]) -> Layout | None:
    """The layout of scales that are cut as their codes; None if a cut falls inside of a block.

    Args:
        layout: Layout of the codes.
        scales: Shape of the scales, ``blockwise_shape`` of the codes' shape.
    """
    from torch.distributed.tensor import Replicate

    last = len(scales) - 1
    if any(dim > last or (dim == last and len(layout.shape) > last + 1) for dim in layout.dims):
        return None  # a row of several dimensions, such as a filter's, is cut inside
    placements = tuple(
        x if axis in layout.axes or shard_dim(x) is None else Replicate()
        for axis, x in enumerate(layout.placements)
    )
    found = Layout(layout.mesh, placements, scales)
    pairs = zip(layout.over(layout.axes).boxes, found.over(layout.axes).boxes, strict=True)
    return found if all(_belong(codes, box, last) for codes, box in pairs) else None


def _belong(codes: Box, scales: Box, last: int) -> bool:
    """Whether a rank with these codes holds all of their scales and no other."""
    if not numel(codes) or not numel(scales):
        return numel(codes) == numel(scales)
    start = codes[last][0] if len(codes) == last + 1 else 0
    stop = codes[last][1] if len(codes) == last + 1 else math.prod(b for _, b in codes[last:])
    blocks = (start // BLOCK, -(-stop // BLOCK))
    return not start % BLOCK and scales == (*codes[:last], blocks)


def place_of(layout: Layout, scales: tuple[int, ...]) -> tuple[int, int] | None:
    """Where the codes that this process holds lie in the whole tensor, row by row.

    Args:
        layout: Layout of the codes, whose blocks no rank cuts.
        scales: Shape of the scales.

    Returns:
        The place of the first, and by how much places grow from row to row; None where that
        differs from row to row.
    """
    last, shape = len(scales) - 1, layout.shape
    if any(0 < dim < last for dim in layout.dims):
        return None
    length = math.prod(shape[last:])
    first = layout.box[0][0] * math.prod(shape[1:last]) if last else 0
    column = layout.box[last][0] if len(shape) == last + 1 else 0
    return first * length + column, length
