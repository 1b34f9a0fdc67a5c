"""Boxes: what each rank holds of a sharded tensor, against torch and against cutting by hand."""

import contextlib
import itertools
import math
import random
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from helpers.ranks import pool
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from stiefel.optimizers._driver.exchange import Team
from stiefel.optimizers._driver.layout import (
    Layout,
    box_of,
    intersection,
    is_sharded,
    layout_of,
    local,
    longest_dim,
    memory,
    numel,
    part,
    resting_layout,
    shard_dim,
)


@dataclass
class Mesh:
    """What a layout asks of a DeviceMesh, at any coordinate and without processes."""

    shape: tuple
    at: tuple | None = None
    mesh: torch.Tensor = field(default=None, compare=False)

    def __post_init__(self):
        if self.mesh is None:
            self.mesh = torch.arange(math.prod(self.shape)).view(self.shape)

    ndim = property(lambda self: len(self.shape))

    def get_coordinate(self):
        return None if self.at is None else list(self.at)

    # what torch's own function asks, by version
    def _sym_get_coordinate(self, axis):
        return self.at[axis]

    def _is_current_rank_part_of_mesh(self):
        return self.at is not None


class Bare(Layout):
    """A layout whose tensors stay what the process holds: a DTensor needs processes."""

    def wrap(self, held):
        return held


def coordinates(shape):
    return itertools.product(*map(range, shape))


def random_shape(draw, ndim=None):
    sizes = (0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 40)
    return tuple(draw.choice(sizes) for _ in range(ndim or draw.choice((1, 2, 2, 2, 3, 4))))


def random_plain(draw):
    """(shape, mesh shape, placements) of plain shards and replicas."""
    shape = random_shape(draw)
    mesh = tuple(draw.choice((1, 2, 3, 4, 5, 7)) for _ in range(draw.choice((1, 1, 2, 2, 3))))
    placements = tuple(
        Replicate() if draw.random() < 0.3 else Shard(draw.randrange(len(shape))) for _ in mesh
    )
    return shape, mesh, placements


def strided(placements, mesh):
    """Placements as fully_shard makes them: its axis comes first and cuts what others left."""
    first, *rest = placements
    factor = math.prod(
        size for x, size in zip(rest, mesh[1:], strict=True) if shard_dim(x) == shard_dim(first)
    )
    return (_StridedShard(first.dim, split_factor=factor) if factor > 1 else first, *rest)


def random_strided(draw):
    """(shape, mesh shape, placements) of FSDP2 over one or two axes of tensor parallelism."""
    shape = random_shape(draw)
    mesh = tuple(draw.choice((1, 2, 3, 4)) for _ in range(draw.choice((2, 2, 3))))
    dims = [draw.randrange(len(shape)) for _ in mesh]
    return shape, mesh, strided([Shard(d) for d in dims], mesh)


def by_torch(shape, mesh, placements, at):
    sizes, starts = compute_local_shape_and_global_offset(shape, Mesh(mesh, at), placements)
    return tuple((a, a + size) for a, size in zip(starts, sizes, strict=True))


def pieces(X, dim, count):
    """What torch.chunk gives, with empty tensors for what is missing."""
    found = list(torch.chunk(X, count, dim)) if X.shape[dim] else [X]
    return found + [X.narrow(dim, 0, 0)] * (count - len(found))


def by_hand(X, mesh, placements, at):
    """Cut a tensor as DTensor and then fully_shard do, axis by axis."""
    plain = [i for i, x in enumerate(placements) if type(x) is Shard]
    later = [i for i, x in enumerate(placements) if isinstance(x, _StridedShard)]
    for axis in plain + later[::-1]:
        X = pieces(X, placements[axis].dim, mesh[axis])[at[axis]]
    return X


def indices(shape):
    return torch.arange(math.prod(shape)).view(shape)


# the formula --------------------------------------------------------------------------------------


def test_boxes_of_plain_shards_are_those_of_torch():
    draw, count = random.Random(0), 0
    for _ in range(1500):
        shape, mesh, placements = random_plain(draw)
        for at in coordinates(mesh):
            found, expected = (f(shape, mesh, placements, at) for f in (box_of, by_torch))
            sizes = [[b - a for a, b in box] for box in (found, expected)]
            assert sizes[0] == sizes[1], (shape, mesh, placements, at)
            # where a box is empty, torch may say that it begins at the end of the tensor
            same = [
                pair for pair in zip(found, expected, strict=True) if numel([pair[0]])
            ]  # fmt: skip
            assert all(a == b for a, b in same), (shape, mesh, placements, at)
            count += 1
    assert count > 5000


def test_boxes_of_even_strided_shards_are_those_of_torch():
    draw, count = random.Random(1), 0
    while count < 3000:
        shape, mesh, placements = random_strided(draw)
        shape = tuple(draw.choice((1, 2, 3)) * math.prod(mesh) for _ in shape)
        for at in coordinates(mesh):
            assert box_of(shape, mesh, placements, at) == by_torch(shape, mesh, placements, at)
            count += 1


@pytest.mark.parametrize("make", [random_plain, random_strided])
def test_boxes_hold_what_is_left_after_cutting_axis_by_axis(make):
    draw, count = random.Random(2), 0
    while count < 4000:
        shape, mesh, placements = make(draw)
        X = indices(shape)
        for at in coordinates(mesh):
            box = box_of(shape, mesh, placements, at)
            assert torch.equal(part(X, box), by_hand(X, mesh, placements, at))
            assert numel(box) == part(X, box).numel()
            count += 1


@pytest.mark.parametrize("make", [random_plain, random_strided])
def test_boxes_tile_the_tensor_as_often_as_axes_replicate_it(make):
    draw = random.Random(3)
    for _ in range(400):
        shape, mesh, placements = make(draw)
        times = torch.zeros(shape, dtype=torch.int64)
        for at in coordinates(mesh):
            part(times, box_of(shape, mesh, placements, at)).add_(1)
        replicas = [s for s, x in zip(mesh, placements, strict=True) if shard_dim(x) is None]
        assert bool((times == math.prod(replicas)).all())


@pytest.mark.parametrize("make", [random_plain, random_strided])
def test_the_first_coordinate_holds_the_most_in_every_dimension(make):
    draw = random.Random(4)
    for _ in range(400):
        shape, mesh, placements = make(draw)
        first = box_of(shape, mesh, placements, [0] * len(mesh))
        for at in coordinates(mesh):
            box = box_of(shape, mesh, placements, at)
            assert all(b - a <= d - c for (a, b), (c, d) in zip(box, first, strict=True))
        assert Layout(Mesh(mesh), placements, shape).largest == numel(first)


def test_rows_that_fsdp2_cuts_after_tensor_parallelism_where_torch_is_wrong():
    """Of 13 rows on a mesh (3, 2), coordinate (2, 0) holds row 6 alone; torch says two rows."""
    shape, mesh = (13, 5), (3, 2)
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    rows = {at: box_of(shape, mesh, placements, at)[0] for at in coordinates(mesh)}
    assert rows == {
        (0, 0): (0, 3), (1, 0): (3, 6), (2, 0): (6, 7), (0, 1): (7, 9), (1, 1): (9, 11),
        (2, 1): (11, 13),
    }  # fmt: skip
    assert all(
        box_of(shape, mesh, placements, at)[1] == (0, 5) and numel([rows[at]]) for at in rows
    )


@pytest.mark.parametrize(
    ("shape", "mesh", "placements"),
    [
        ((40, 1), (3, 2), (Shard(0), Shard(1))),  # torch's full_tensor() raises on the empty rank
        ((40, 1), (3, 2), (_StridedShard(1, split_factor=2), Shard(1))),
        ((1, 40), (4,), (Shard(0),)),
        ((3, 40), (4,), (Shard(0),)),
        ((0, 3), (2, 2), (Shard(0), Shard(1))),
        ((5,), (7,), (Shard(0),)),
        ((), (2, 3), (Replicate(), Replicate())),
        ((4, 6, 8), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
        ((4, 6, 8), (2, 4), (Shard(1), Shard(0))),
        ((1, 6, 8), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ],
    ids=str,
)
def test_ranks_without_entries_have_empty_boxes_and_the_rest_tile(shape, mesh, placements):
    X, seen = indices(shape), []
    for at in coordinates(mesh):
        box = box_of(shape, mesh, placements, at)
        assert all(0 <= a <= b <= size for (a, b), size in zip(box, shape, strict=True))
        seen += part(X, box).flatten().tolist()
    replicas = math.prod(s for s, x in zip(mesh, placements, strict=True) if shard_dim(x) is None)
    assert sorted(seen) == sorted([*range(X.numel())] * replicas)


def test_three_strided_axes_cut_from_the_last_to_the_first():
    placements = (_StridedShard(0, split_factor=4), _StridedShard(0, split_factor=2), Shard(0))
    rows = [box_of((8,), (2, 2, 2), placements, at)[0] for at in coordinates((2, 2, 2))]
    assert rows == [(0, 1), (4, 5), (2, 3), (6, 7), (1, 2), (5, 6), (3, 4), (7, 8)]


# boxes --------------------------------------------------------------------------------------------


def test_the_intersection_of_boxes_is_what_both_have():
    draw = random.Random(5)
    for _ in range(2000):
        shape = random_shape(draw)
        cut = [[sorted(draw.choices(range(size + 1), k=2)) for size in shape] for _ in range(2)]
        first, second = (tuple(map(tuple, box)) for box in cut)
        both = intersection(first, second)
        X = indices(shape)
        entries = [{*part(X, box).flatten().tolist()} for box in (first, second, both)]
        assert entries[2] == entries[0] & entries[1]
        assert intersection(second, first) == both or numel(both) == 0
        assert all(a <= b for a, b in both)


def test_a_part_of_a_part_is_a_view_counted_from_where_the_part_begins():
    draw = random.Random(6)
    for _ in range(500):
        shape = random_shape(draw)
        outer = tuple(
            tuple(sorted(draw.choices(range(size + 1), k=2))) for size in shape
        )  # fmt: skip
        inner = tuple(
            tuple(sorted(draw.choices(range(a, b + 1), k=2))) for a, b in outer
        )  # fmt: skip
        X = indices(shape)
        held = part(X, outer)
        assert torch.equal(part(held, inner, outer), part(X, inner))
        assert held.numel() == 0 or held.untyped_storage().data_ptr() == X.data_ptr()
    assert part(torch.tensor(3), ()).item() == 3


# layouts ------------------------------------------------------------------------------------------


def test_axes_and_dims_are_those_that_cut():
    mesh = Mesh((2, 1, 3), (0, 0, 0))
    layout = Layout(mesh, (Replicate(), Shard(0), Shard(1)), (4, 6))
    assert (layout.axes, layout.dims) == ((2,), {1})
    both = Layout(Mesh((2, 3), (1, 2)), (Shard(1), Shard(0)), (4, 6))
    assert (both.axes, both.dims, both.box) == ((0, 1), {0, 1}, ((4, 4), (3, 6)))
    assert Layout(Mesh((1,), (0,)), (Shard(0),), (4, 6)).axes == ()


def test_the_ranks_of_a_layout_stand_as_in_their_group_with_what_each_holds():
    ranks = torch.tensor([[5, 0, 3], [1, 4, 2]])
    placements, shape = (Shard(0), Shard(1)), (5, 7)
    for at in coordinates((2, 3)):
        layout = Layout(Mesh((2, 3), at, ranks), placements, shape)
        for axes in ((), (0,), (1,), (0, 1), (1, 0)):
            found = layout.over(axes)
            assert list(found.ranks) == sorted(found.ranks)
            assert found.ranks[found.rank] == ranks[at]
            assert found.boxes[found.rank] == layout.box
            for rank, box in zip(found.ranks, found.boxes, strict=True):
                (there,) = (ranks == rank).nonzero().tolist()
                assert all(there[axis] == at[axis] for axis in {0, 1} - {*axes})
                assert box == box_of(shape, (2, 3), placements, there)
            assert len(found.ranks) == math.prod((2, 3)[axis] for axis in axes)
        whole = torch.zeros(shape)
        for box in layout.over(layout.axes).boxes:
            part(whole, box).add_(1)
        assert bool((whole == 1).all())


def test_the_ranks_over_the_axes_of_a_layout_hold_the_whole_beside_replicas():
    draw = random.Random(7)
    for make in (random_plain, random_strided):
        for _ in range(200):
            shape, mesh, placements = make(draw)
            order = list(range(math.prod(mesh)))
            draw.shuffle(order)
            at = tuple(draw.randrange(size) for size in mesh)
            layout = Layout(Mesh(mesh, at, torch.tensor(order).view(mesh)), placements, shape)
            times = torch.zeros(shape, dtype=torch.int64)
            for box in layout.over(layout.axes).boxes:
                part(times, box).add_(1)
            assert bool((times == 1).all())


def test_a_process_outside_of_the_mesh_is_told_so():
    layout = Layout(Mesh((2,)), (Shard(0),), (4, 6))
    with pytest.raises(ValueError, match="is not in the mesh"):
        _ = layout.box


@pytest.mark.parametrize("make", [random_plain, random_strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_cut_and_full_hold_what_the_whole_has_in_the_box(make, dtype):
    draw = random.Random(8)
    for _ in range(300):
        shape, mesh, placements = make(draw)
        at = tuple(draw.randrange(size) for size in mesh)
        layout = Bare(Mesh(mesh, at), placements, shape)
        X = indices(shape).to(dtype)
        held = layout.cut(X)
        assert torch.equal(held, part(X, layout.box)) and held.is_contiguous()
        assert held.numel() == 0 or held.untyped_storage().data_ptr() != X.data_ptr()
        full = layout.full(3, dtype, torch.device("cpu"))
        assert torch.equal(full, part(torch.full(shape, 3, dtype=dtype), layout.box))
        if len(shape) < 2:
            continue
        eye = torch.eye(*shape[-2:], dtype=dtype).expand(shape)
        found = layout.full(0, dtype, torch.device("cpu"), eye=True)
        assert torch.equal(found, part(eye, layout.box)) and found.dtype == dtype
        assert found.is_contiguous()


def test_a_column_major_tensor_is_cut_to_a_row_major_one():
    X = torch.arange(42.0).view(6, 7).mT.contiguous().mT
    held = Bare(Mesh((3,), (1,)), (Shard(0),), (6, 7)).cut(X)
    assert held.is_contiguous() and torch.equal(held, X[2:4])


def test_state_rests_on_the_axes_that_cut_its_weight():
    layout = Layout(Mesh((2, 3), (1, 2)), (Replicate(), Shard(1)), (4, 6))
    cut = resting_layout(layout, (9, 5), 0)
    assert (cut.placements, cut.shape, cut.box) == (
        (Replicate(), Shard(0)),
        (9, 5),
        ((6, 9), (0, 5)),
    )
    assert resting_layout(layout, (9, 5), None).box == ((0, 9), (0, 5))
    both = Layout(Mesh((2, 3), (1, 2)), (_StridedShard(0, split_factor=3), Shard(0)), (4, 6))
    rest = resting_layout(both, (12,), 0)
    assert rest.placements == (Shard(0), Shard(0)) and rest.box == ((10, 12),)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((12, 5), 0), ((5, 12), 1), ((11, 11), None), ((12, 12), 0), ((), None), ((0, 3), None),
        ((3, 4, 12), 2), ((11,), None), ((12,), 0),
    ],
)  # fmt: skip
def test_other_state_is_cut_along_its_longest_axis_of_two_entries_for_each_rank(shape, dim):
    layout = Layout(Mesh((2, 3), (0, 0)), (Shard(0), Shard(1)), (40, 60))
    assert longest_dim(layout, shape) == dim
    one_axis = Layout(Mesh((5, 6), (0, 0)), (Replicate(), Shard(1)), (40, 60))
    assert longest_dim(one_axis, shape) == dim


# of tensors ---------------------------------------------------------------------------------------


class Held:
    """What is asked of a DTensor."""

    def __init__(self, mesh, placements, shape, held):
        self.device_mesh, self.placements, self.shape, self.held = mesh, placements, shape, held

    def detach(self):
        return self

    def to_local(self):
        return self.held


def test_a_plain_tensor_has_no_layout_and_is_held_whole():
    X = torch.ones(2, 3)
    assert not is_sharded(X) and layout_of(X, "X") is None and local(X) is X


def test_the_layout_of_a_tensor_is_that_of_its_placements():
    mesh = Mesh((2,), (1,))
    layout = layout_of(Held(mesh, (Shard(0),), torch.Size((5, 3)), torch.ones(2, 3)), "X")
    assert layout == Layout(mesh, (Shard(0),), (5, 3)) and layout.box == ((3, 5), (0, 3))


@pytest.mark.parametrize(
    ("mesh", "placements", "held", "match"),
    [
        ((2,), (Partial(),), (5, 3), "of which only shards and replicas can be trained"),
        ((2, 2), (Shard(0), Partial("max")), (3, 3), "of which only shards and replicas"),
        ((2,), (Shard(0),), (2, 3), "holds 6 entries here, but its placements"),
        ((2,), (Shard(0),), (3, 2), "holds 6 entries here, but its placements"),
        # what a reshaped DTensor may have: rows that do not lie together
        ((2,), (_StridedShard(0, split_factor=2),), (3, 3), "that do not lie together"),
        ((2, 2), (Shard(0), _StridedShard(0, split_factor=2)), (2, 3), "that do not lie together"),
        ((2, 2), (_StridedShard(0, split_factor=2), Shard(1)), (3, 2), "that do not lie together"),
        ((2, 2), (_StridedShard(0, split_factor=3), Shard(0)), (2, 3), "that do not lie together"),
    ],
)
def test_what_no_box_describes_is_refused_by_name(mesh, placements, held, match):
    X = Held(Mesh(mesh, (0,) * len(mesh)), placements, torch.Size((5, 3)), torch.ones(held))
    with pytest.raises(ValueError, match=match) as caught:
        layout_of(X, "parameter 'layers.0.weight'")
    assert str(caught.value).startswith("parameter 'layers.0.weight'")


def test_a_process_outside_of_the_mesh_is_told_which_parameter_it_is():
    X = Held(Mesh((2,)), (Shard(0),), torch.Size((5, 3)), torch.ones(0))
    with pytest.raises(ValueError, match=r"'w'.* is not in the mesh"):
        layout_of(X, "parameter 'w'")


# on processes -------------------------------------------------------------------------------------


def held_entries(rank, world, mesh_shape, shape, parallel):
    """Entries that real ranks hold of a weight that tensor parallelism and then FSDP2 cut."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("fsdp", "tp"))
    numbers = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    module = nn.Module()
    placement = Replicate() if parallel is None else Shard(parallel)
    module.weight = nn.Parameter(distribute_tensor(numbers, mesh["tp"], [placement]))
    fully_shard(module, mesh=mesh["fsdp"])
    layout = layout_of(module.weight, "weight")
    expected = part(numbers, layout.box)
    return bool(torch.equal(local(module.weight), expected)), layout.box, str(layout.placements)


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 10])
@pytest.mark.parametrize("parallel", [0, 1, None])
def test_boxes_are_what_fsdp2_over_tensor_parallelism_holds(rows, parallel):
    found = pool(4).run(held_entries, (2, 2), (rows, 6), parallel)
    assert all(is_equal for is_equal, _, _ in found), found


@pytest.mark.parametrize("rows", [7, 11, 12, 13])
def test_boxes_are_what_fsdp2_holds_of_uneven_strided_rows(rows):
    found = pool(6).run(held_entries, (3, 2), (rows, 4), 0)
    assert all(is_equal for is_equal, _, _ in found), found
    if rows == 13:
        assert found[4][1] == ((6, 7), (0, 4))


def wrapped(rank, world):
    """Whether wrapped, cut and filled tensors come back whole, in other layouts too."""
    from helpers.ranks import mesh_of
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh, wrong = mesh_of(world), []
    other_mesh = init_device_mesh("meta", (world,))
    for shape, dim in itertools.product(((7, 5), (1, 9), (9, 1), (2, 4, 6)), (0, 1)):
        X = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        layout = Layout(mesh, (Shard(dim),), shape)
        eye = torch.eye(*shape[-2:]).expand(shape)
        whole = Layout(mesh, (Replicate(),), shape)
        other = distribute_tensor(X, mesh, [Shard(1 - dim)])
        for found, expected in (
            (layout.cut(X), X),
            (layout.full(2.0, X.dtype, X.device), torch.full(shape, 2.0)),
            (layout.full(0.0, X.dtype, X.device, eye=True), eye),
            (layout.redistribute(X), X),
            (layout.redistribute(other), X),
            (layout.redistribute(whole.cut(X)), X),
            (whole.redistribute(layout.cut(X)), X),
        ):
            is_there = numel(layout_of(found, "X").box) == local(found).numel()
            if not (
                is_there and found.shape == shape and torch.equal(found.full_tensor(), expected)
            ):
                wrong.append((shape, dim))
        held = torch.zeros([b - a for a, b in layout.box])
        layout.wrap(held).to_local().add_(1)  # shares memory
        wrong += [] if bool((held == 1).all()) else [(shape, dim, "copied")]
        # a mesh of other devices stands for one of GPUs, whose state is offloaded to the host
        offloaded = Layout(other_mesh, layout.placements, shape).wrap(held)
        if memory(offloaded) is not held or not isinstance(offloaded, DTensor):
            wrong.append((shape, dim, "moved"))
        if (offloaded.shape, offloaded.stride()) != (X.shape, X.stride()):
            wrong.append((shape, dim, "reshaped"))
    return wrong + sent_elsewhere(Team.of_layout(Layout(other_mesh, (Shard(0),), (7, 5)), (0,)))


def sent_elsewhere(team):
    """What a team hands to the process group of other devices than those of its mesh."""
    found = []

    def record(*args, **kwargs):
        found.extend(x for x in args if isinstance(x, torch.Tensor) and x.device.type != "meta")
        raise EOFError

    calls = (
        lambda: team.reduce(torch.zeros(3), "SUM"),
        lambda: team.send(torch.zeros(8, dtype=torch.uint8), [4, 4], [4, 4]),
    )
    with mock.patch.multiple("torch.distributed", all_reduce=record, all_to_all_single=record):
        for call in calls:
            with contextlib.suppress(EOFError):
                call()
                found.append("nothing was sent")
    return found


def reshaped(rank, world):
    """What layout_of says of tensors whose shards are no boxes, and whether they are none."""
    from helpers.ranks import mesh_of
    from torch.distributed.tensor import Shard, distribute_tensor

    texts = []
    for shape, dim in (((4, 6), 1), ((6, 4), 1), ((2, 4, 6), 1)):
        X = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        flat = distribute_tensor(X, mesh_of(world), [Shard(dim)]).flatten(0, dim)
        try:
            layout = layout_of(flat, "flat")
        except ValueError as error:
            texts.append(str(error))
        else:  # a version of torch that redistributes first
            same = torch.equal(local(flat), part(X.flatten(0, dim), layout.box))
            texts.append("" if same else f"{flat.placements} is taken for {layout.box}")
    return texts


def test_a_reshaped_tensor_is_refused_where_its_shards_are_no_boxes():
    for texts in pool(2).run(reshaped):
        assert all(not text or "do not lie together" in text for text in texts), texts


@pytest.mark.parametrize("world", [2, 3])
def test_wrapped_tensors_are_whole_again_on_real_ranks(world):
    assert pool(world).run(wrapped) == [[]] * world
