"""Matrices of a part of a parameter: those of the whole, as far as they lie in the part."""

import itertools
import math
import random

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stiefel.optimizers._core.views import split_view
from stiefel.optimizers._driver.held_views import held_views
from stiefel.optimizers._driver.layout import box_of, part

FLAT, STACK, KERNEL = (24, 12), (4, 12, 8), (8, 3, 2, 2)
VIEWS = {
    FLAT: (
        "auto", "flatten", "batch", "transposed", "heads:4", "heads:3", "heads:24", "heads_in:3",
        "heads_in:4", "rows:8,8,8", "rows:7,1,16", "rows:24", "interleaved", "transposed:rows:5,7",
        "transposed:heads:3", "transposed:heads_in:4", "transposed:interleaved",
    ),
    (23, 14): (
        "auto", "heads:23", "heads_in:7", "rows:20,3", "transposed", "transposed:interleaved",
    ),
    (1, 40): ("auto", "flatten", "transposed", "heads_in:8", "rows:1"),
    (40, 1): ("auto", "transposed", "heads:8", "rows:39,1", "interleaved"),
    STACK: (
        "auto", "flatten", "batch", "transposed", "rows:5,7", "interleaved", "transposed:rows:3,5",
        "transposed:interleaved",
    ),
    (3, 2, 6, 5): ("auto", "flatten", "batch", "transposed"),
    KERNEL: ("auto", "flatten", "batch", "transposed"),
}  # fmt: skip


def cuts(shape):
    """(mesh shape, placements) of shards along one or two dimensions."""
    for size, dim in itertools.product((1, 2, 3, 4, 5, 7), range(len(shape))):
        yield (size,), (Shard(dim),)
    for first, second in itertools.product(range(len(shape)), repeat=2):
        if first != second:
            yield (2, 3), (Shard(first), Shard(second))
    yield (2, 2), (_StridedShard(0, split_factor=2), Shard(0))
    yield (3, 2), (Replicate(), Shard(0))


CASES = [(shape, view) for shape, views in VIEWS.items() for view in views]


@pytest.mark.parametrize(("shape", "view"), CASES, ids=str)
def test_matrices_of_a_part_are_the_part_of_the_matrices(shape, view):
    X, count = torch.arange(math.prod(shape)).view(shape), 0
    whole = split_view(view, shape)
    for mesh, placements in cuts(shape):
        where = list(itertools.product(*map(range, mesh)))
        boxes = [box_of(shape, mesh, placements, at) for at in where]
        found = [held_views(view, shape, boxes, rank) for rank in range(len(boxes))]
        assert len({views is None for views in found}) == 1  # one answer for all ranks
        if found[0] is None:
            continue
        count += 1
        for number, block in enumerate(whole):
            M = block.to_matrices(X)
            seen = torch.zeros_like(M)
            for rank, box in enumerate(boxes):
                held = found[rank][number]
                v, (r, c), k = held.view, held.start, held.first
                there = ((k, k + v.k), (r, r + v.m), (c, c + v.n))
                H = v.to_matrices(part(X, box).contiguous())
                assert H.shape == (v.k, v.m, v.n) and v.tag == block.tag
                if H.numel():
                    assert torch.equal(H, part(M, there))
                    part(seen, there).add_(1)
                # what is not said to be cut is whole on every rank that has a matrix
                for side, size, full in (("rows", v.m, block.m), ("cols", v.n, block.n)):
                    assert side in held.cut or size == full or v.k == 0
                assert held.cut == found[0][number].cut
                swapped = held.box(True), held.box(False)
                assert swapped == (there[:0:-1], there[1:])
            replicas = 3 if placements[0].is_replicate() else 1
            assert bool((seen == replicas).all())
    assert count


def test_heads_in_half_and_interleaved_rows_have_no_matrices_on_a_part():
    """Four heads of six rows: two and four ranks hold whole ones, three do not."""

    def views(view, size, dim, shape=FLAT):
        boxes = [box_of(shape, (size,), (Shard(dim),), (rank,)) for rank in range(size)]
        return held_views(view, shape, boxes, 0)

    assert [views("heads:4", size, 0) is None for size in (2, 3, 4)] == [False, True, False]
    assert views("heads:4", 3, 1) is not None
    assert [views("heads_in:4", size, 1) is None for size in (2, 3, 4)] == [False, True, False]
    assert views("interleaved", 2, 0) is None and views("interleaved", 2, 1) is not None
    assert views("flatten", 2, 1, KERNEL) is None and views("flatten", 2, 0, KERNEL) is not None
    assert views("batch", 2, 1, (3, 4, 6, 5)) is None


@pytest.mark.parametrize(("shape", "view"), CASES, ids=str)
def test_a_parameter_that_no_rank_cuts_has_its_own_views(shape, view):
    whole = tuple((0, size) for size in shape)
    found = held_views(view, shape, [whole] * 3, 1)
    assert [(h.view, h.first, h.start, h.cut) for h in found] == [
        (v, 0, (0, 0), frozenset()) for v in split_view(view, shape)
    ]


def test_a_part_of_random_boxes_has_the_matrices_of_the_whole_or_none():
    draw = random.Random(0)
    for _ in range(300):
        shape = tuple(draw.choice((1, 2, 3, 4, 6, 8, 12)) for _ in range(draw.choice((2, 2, 3))))
        mesh = (draw.choice((1, 2, 3, 4)), draw.choice((1, 2)))
        placements = (Shard(draw.randrange(len(shape))), Shard(draw.randrange(len(shape))))
        boxes = [box_of(shape, mesh, placements, at) for at in itertools.product(*map(range, mesh))]
        X = torch.arange(math.prod(shape)).view(shape)
        views = ["auto", "flatten", "transposed", f"rows:{shape[-2]}"]
        views += ["interleaved"] if shape[-2] % 2 == 0 else []
        views += [f"heads:{h}" for h in (1, 2, 3) if len(shape) == 2 and shape[0] % h == 0]
        for view, rank in itertools.product(views, range(len(boxes))):
            found = held_views(view, shape, boxes, rank) or []
            for held, block in zip(found, split_view(view, shape), strict=False):
                v, (r, c), k = held.view, held.start, held.first
                H = v.to_matrices(part(X, boxes[rank]).contiguous())
                there = ((k, k + v.k), (r, r + v.m), (c, c + v.n))
                assert H.numel() == 0 or torch.equal(H, part(block.to_matrices(X), there))
