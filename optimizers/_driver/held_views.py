"""How the part of a parameter that one process holds becomes matrices.

A view of the whole parameter says which matrices there are; the box says which of their rows and
columns this process has. Where a box cuts matrices in a way that no view can follow (heads in half,
interleaved rows), there is none, and the whole parameter must travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from .._core.views import CUTTING_VIEWS, MatrixView, split_view
from .layout import Box


@dataclass(frozen=True)
class HeldView:
    """What a process holds of the matrices of a view.

    Attributes:
        view: How its part of the parameter becomes matrices (k, m, n), of which any may be 0.
        first: Number of its first matrix in the whole view.
        start: First row and column of its part of each matrix.
        cut: Sides of the matrices that are cut: ``"rows"``, ``"cols"``.
    """

    view: MatrixView
    first: int = 0
    start: tuple[int, int] = (0, 0)
    cut: frozenset[str] = frozenset()

    def box(self, transposed: bool) -> Box:
        """Its rows and columns of each matrix, as a rule sees them that may transpose it."""
        rows = (self.start[0], self.start[0] + self.view.m)
        cols = (self.start[1], self.start[1] + self.view.n)
        return (cols, rows) if transposed else (rows, cols)


def held_views(
    view: str, shape: tuple[int, ...], boxes: Sequence[Box], rank: int
) -> list[HeldView] | None:
    """What one rank holds of every MatrixView of a parameter; None where no view can follow.

    Args:
        view: The view of the whole parameter.
        shape: Shape of the whole parameter.
        boxes: What every rank holds: an answer must be one for all of them.
        rank: The rank.
    """
    dims = [d for d, size in enumerate(shape) if any(box[d] != (0, size) for box in boxes)]
    if not dims:
        return [HeldView(v) for v in split_view(view, shape)]
    kind, _, text = view.partition(":")
    if kind == "auto":
        kind = "batch" if len(shape) <= 3 else "flatten"
    if kind == "transposed" and text:
        return _transposed(text, shape, boxes, rank)
    held = tuple(b - a for a, b in boxes[rank])
    if kind == "flatten":
        if any(d > 0 for d in dims) and len(shape) > 2:
            return None
        start = (boxes[rank][0][0], boxes[rank][1][0] if len(shape) == 2 else 0)
        cut = _cut_sides(dims, 2)  # also of a kernel, whose only cut dimension is the first
        return [HeldView(split_view(view, held)[0], 0, start, cut)]
    if kind in ("batch", "transposed"):
        return _of_batch(view, shape, boxes[rank], dims, kind == "transposed")
    if kind == "rows":
        return _of_rows(view, shape, boxes[rank], dims)
    if kind == "interleaved":
        if len(shape) - 2 in dims:
            return None
        first = boxes[rank][0][0] if len(shape) == 3 else 0
        start, cut = (0, boxes[rank][-1][0]), _cut_sides(dims, len(shape))
        return [HeldView(v, first, start, cut) for v in split_view(view, held)]
    return _of_heads(kind, int(text), shape, boxes, rank, dims)


def _cut_sides(dims: Sequence[int], ndim: int, transposed: bool = False) -> frozenset[str]:
    """Names of the matrix sides among dimensions of a parameter."""
    rows, cols = ("cols", "rows") if transposed else ("rows", "cols")
    names = {ndim - 2: rows, ndim - 1: cols}
    return frozenset(names[d] for d in dims if d in names)


def _swapped(X: Sequence[tuple[int, int]]) -> Box:
    return (*X[:-2], X[-1], X[-2])


def _transposed(
    view: str, shape: tuple[int, ...], boxes: Sequence[Box], rank: int
) -> list[HeldView] | None:
    """The view ``transposed:V``: V of the transposes."""
    m, n = shape[-2:]
    if view.partition(":")[0] not in CUTTING_VIEWS:
        return None
    found = held_views(view, (*shape[:-2], n, m), [_swapped(box) for box in boxes], rank)
    if found is None:
        return None

    def after_transpose(to_matrices: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: to_matrices(x.mT)

    return [
        replace(
            h, view=replace(h.view, to_matrices=after_transpose(h.view.to_matrices), plain=False)
        )
        for h in found
    ]


def _of_batch(
    view: str, shape: tuple[int, ...], box: Box, dims: Sequence[int], transposed: bool
) -> list[HeldView] | None:
    """All leading dimensions number matrices; those after the first must be whole."""
    if any(0 < d < len(shape) - 2 for d in dims):
        return None
    first = box[0][0] if len(shape) > 2 else 0
    for size in shape[1:-2]:
        first *= size
    held = split_view(view, tuple(b - a for a, b in box))[0]
    (a, _), (b, _) = _swapped(box)[-2:] if transposed else box[-2:]
    return [HeldView(held, first, (a, b), _cut_sides(dims, len(shape), transposed))]


def _rows_of(start: int, stop: int, x: Tensor) -> Tensor:
    rows = x[..., start:stop, :]
    return rows if x.ndim == 3 else rows.unsqueeze(0)


def _of_rows(
    view: str, shape: tuple[int, ...], box: Box, dims: Sequence[int]
) -> list[HeldView] | None:
    """Each block of rows, as far as it lies in the box."""
    whole = split_view(view, shape)
    (low, high), (left, right) = box[-2:]
    k, first = (box[0][1] - box[0][0], box[0][0]) if len(shape) == 3 else (1, 0)
    found, start = [], 0
    for block in whole:
        a, b = max(start, low), min(start + block.m, high)
        b = max(a, b)
        to_matrices = partial(_rows_of, a - low, b - low)
        held = MatrixView(k, b - a, right - left, to_matrices, tag=block.tag)
        found.append(HeldView(held, first, (a - start, left), _cut_sides(dims, len(shape))))
        start += block.m
    return found


def _of_heads(
    kind: str, heads: int, shape: tuple[int, ...], boxes: Sequence[Box], rank: int, dims: list[int]
) -> list[HeldView] | None:
    """Heads along one side, whole on every rank; the other side may be cut."""
    dim = 0 if kind == "heads" else 1
    size = shape[dim] // heads
    if any(x % size for box in boxes for x in box[dim]):
        return None
    box = boxes[rank]
    (a, b), (c, d) = box[dim], box[1 - dim]
    count = (b - a) // size
    cut = _cut_sides([x for x in dims if x != dim], 2)
    if count:
        held = split_view(f"{kind}:{count}", (b - a, d - c) if dim == 0 else (d - c, b - a))[0]
    else:
        m, n = (size, d - c) if dim == 0 else (d - c, size)
        held = MatrixView(0, m, n, lambda x: x.new_empty(0, m, n))
    return [HeldView(held, a // size, (0, c) if dim == 0 else (c, 0), cut)]
