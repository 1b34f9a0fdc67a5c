"""longest_dim_placement: which dimension every parameter is cut along, and under fully_shard."""

import math

import pytest
import torch
from helpers.ranks import pool
from torch import nn

from stiefel.optimizers import longest_dim_placement
from stiefel.optimizers._driver.layout import layout_of, local, part


@pytest.mark.parametrize(
    ("shape", "world", "dim"),
    [
        ((4, 12), 2, 1),
        ((4, 12), 3, 1),
        ((4, 12), 5, 0),  # fully_shard cuts columns only into equal pieces
        ((4, 13), 2, 0),
        ((12, 4), 2, 0),
        ((12, 12), 2, 0),
        ((1, 12), 4, 1),
        ((12, 1), 4, 0),
        ((0, 12), 4, 1),
        ((4, 12), 1, 1),
        ((12,), 2, 0),
        ((), 2, 0),
        ((2, 4, 12), 2, 0),  # an expert stack
        ((8, 3, 3, 3), 2, 0),
    ],
)
def test_a_wide_matrix_is_cut_along_its_columns_where_they_divide(shape, world, dim):
    placement = longest_dim_placement(world)(nn.Parameter(torch.zeros(shape)))
    assert type(placement).__name__ == "Shard" and placement.dim == dim
    with torch.device("meta"):
        assert longest_dim_placement(world)(torch.zeros(shape)).dim == dim


def test_the_factors_of_lora_keep_their_rank_whole():
    place = longest_dim_placement(2)
    assert (place(torch.zeros(4, 48)).dim, place(torch.zeros(40, 4)).dim) == (1, 0)


@pytest.mark.parametrize(
    "bad", [0, -1, 2.0, 2.5, True, None, "2", [2], (2,), torch.tensor(2), torch.ones(2, 2), len]
)
def test_what_is_neither_a_mesh_nor_a_number_of_ranks_is_refused(bad):
    with pytest.raises(ValueError, match="mesh_or_world must be a DeviceMesh or a positive number"):
        longest_dim_placement(bad)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4, bias=False)
        self.odd, self.norm = nn.Linear(13, 4), nn.LayerNorm(5)
        self.experts = nn.Parameter(torch.zeros(3, 4, 12))
        self.lora_A = nn.Linear(36, 2, bias=False)
        self.lora_B = nn.Linear(2, 9, bias=False)
        for number, p in enumerate(self.parameters()):
            p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape) + 1000 * number


def shard(rank, world, kind):
    """(name, dim, whether the rank holds that part) under fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    shape = {"1-D": (world,), "HSDP": (world // 2, 2), "TP": (world // 2, 2)}.get(kind, (world,))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("first", "second")[: len(shape)])
    if kind == "TP":  # columns that two ranks of tensor parallelism have left must divide too
        net.down.weight = nn.Parameter(
            distribute_tensor(before["down.weight"], mesh["second"], [Shard(1)])
        )
        net.lora_A.weight = nn.Parameter(
            distribute_tensor(before["lora_A.weight"], mesh["second"], [Shard(1)])
        )
        mesh = mesh["first"]
    place = longest_dim_placement(world if kind == "int" else mesh)
    fully_shard(net, mesh=mesh, shard_placement_fn=place)
    found = {}
    for name, p in net.named_parameters():
        layout = layout_of(p, name)
        same = torch.equal(local(p), part(before[name], layout.box))
        found[name] = (tuple(sorted(layout.dims)), same)
    return found


@pytest.mark.parametrize(
    ("world", "kind"), [(2, "1-D"), (3, "1-D"), (4, "1-D"), (2, "int"), (4, "HSDP"), (4, "TP")]
)
def test_fully_shard_takes_the_placement(world, kind):
    wide = ("down.weight", "lora_A.weight")
    for found in pool(world).run(shard, kind):
        assert all(same for _, same in found.values())
        dims = {name: dims for name, (dims, _) in found.items()}
        for name in wide:
            assert dims.pop(name) == (1,)
        assert {*dims.values()} == {(0,)}


def columns_that_do_not_divide(rank, world):
    from helpers.ranks import mesh_of
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    found = []
    for place in (longest_dim_placement(world), lambda p: Shard(1)):
        net = nn.Linear(13, 4, bias=False)
        try:
            fully_shard(net, mesh=mesh_of(world), shard_placement_fn=place)
        except NotImplementedError:
            found.append(None)
        else:
            found.append(layout_of(net.weight, "weight").dims)
    return found


def test_columns_that_do_not_divide_stay_whole_as_fully_shard_wants():
    """Uneven columns are why the placement asks; a torch that cuts them needs no question."""
    for found in pool(2).run(columns_that_do_not_divide):
        assert found == [{0}, None]


def test_half_of_columns_left_by_tensor_parallelism_need_not_divide():
    """A (4, 6) weight of which tensor parallelism has left (4, 3) is cut along its rows."""
    for dims in pool(4).run(rows_after_columns):
        assert dims == {0, 1}


def rows_after_columns(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    net = nn.Linear(6, 4, bias=False)
    net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh["tp"], [Shard(1)]))
    fully_shard(net, mesh=mesh["fsdp"], shard_placement_fn=longest_dim_placement(mesh["fsdp"]))
    return layout_of(net.weight, "weight").dims


def test_the_largest_share_is_never_larger_than_along_the_rows():
    for m in range(1, 12):
        for n in range(1, 12):
            for world in (1, 2, 3, 4):
                dim = longest_dim_placement(world)(torch.zeros(m, n)).dim
                sizes = [m, n]
                sizes[dim] = -(-sizes[dim] // world)
                assert math.prod(sizes) <= -(-m // world) * n
