"""State in eight bits over ranks: where it is kept as codes, where as floats, and what files do."""

import copy

import pytest
import torch
from helpers.ranks import pool
from helpers.sharded import (
    Case,
    Piece,
    compare,
    difference,
    optimizer_of,
    parameters,
    set_gradients,
    train,
    whole,
)

from stiefel.kernels import dequantize_blocks, quantize_blocks
from stiefel.kernels.reference.rounding import Rounding
from stiefel.optimizers import memory_report
from stiefel.optimizers._driver.held_codes import place_of, scales_layout
from stiefel.optimizers._driver.layout import Layout

INT8 = {"state_dtype": "int8"}

# where scales lie ---------------------------------------------------------------------------------


class Mesh:
    """What a layout asks of a DeviceMesh."""

    def __init__(self, shape, at):
        self.shape, self.at, self.ndim = shape, at, len(shape)
        self.mesh = torch.arange(torch.Size(shape).numel()).view(shape)

    def get_coordinate(self):
        return list(self.at)


def layouts(shape, sizes, *dims):
    """The layout of every rank."""
    from torch.distributed.tensor import Replicate, Shard

    placements = tuple(Replicate() if d is None else Shard(d) for d in dims)
    mesh = torch.ones(sizes).nonzero().tolist()
    return [Layout(Mesh(sizes, at), placements, shape) for at in mesh]


@pytest.mark.parametrize(
    "shape, scales, sizes, dims, fits",
    [
        ((24, 300), (24, 2), (2,), (0,), True),
        ((24, 512), (24, 2), (2,), (1,), True),
        ((24, 600), (24, 3), (2,), (1,), False),
        ((24, 500), (24, 2), (2,), (1,), False),
        ((24, 1024), (24, 4), (3,), (1,), False),
        ((24, 1024), (24, 4), (4,), (1,), True),
        ((24, 768), (24, 3), (3,), (1,), True),
        ((24, 700), (24, 3), (3,), (1,), False),
        ((24, 1000), (24, 4), (4,), (1,), False),
        ((3, 300), (3, 2), (4,), (0,), True),
        ((8, 1024), (8, 4), (2, 2), (0, 1), True),
        ((8, 1024), (8, 4), (2, 2), (1, 1), True),
        ((8, 512), (8, 2), (2, 2), (1, 1), False),
        ((8, 512), (8, 2), (2, 2), (None, 1), True),
        ((6, 5, 512), (6, 5, 2), (2,), (1,), True),
        ((64, 32, 3, 3), (64, 2), (2,), (0,), True),
        ((64, 32, 3, 3), (64, 2), (2,), (1,), False),
    ],
)
def test_scales_are_cut_like_their_codes_or_not_at_all(shape, scales, sizes, dims, fits):
    every = layouts(shape, sizes, *dims)
    found = [scales_layout(layout, scales) for layout in every]
    assert [x is not None for x in found] == [fits] * len(every)
    if not fits:
        return
    X = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    codes = torch.zeros(X.shape, dtype=torch.uint8)
    tops, keys = torch.zeros(1, *scales), torch.tensor([12345], dtype=torch.int32)
    quantize_blocks(X.square(), codes, tops, Rounding(keys))
    for layout, of_scales in zip(every, found, strict=True):
        place = place_of(layout, scales)
        if place is None:
            assert dims == (1,) and len(scales) == 3
            continue
        part = tuple(slice(a, b) for a, b in layout.box)
        part_of_scales = tuple(slice(a, b) for a, b in of_scales.box)
        own, own_tops = torch.zeros_like(codes[0][part]), torch.zeros_like(tops[0][part_of_scales])
        rounding = Rounding(keys, place[0], (0, place[1], 1))
        squares = X[0][part].square().contiguous()
        quantize_blocks(squares[None], own[None], own_tops[None], rounding)
        assert torch.equal(own, codes[0][part]) and torch.equal(own_tops, tops[0][part_of_scales])


# training -----------------------------------------------------------------------------------------


def kept(rank, world, case):
    """Per parameter (dtypes by key, plan, words of the assignment), beside the comparison."""
    found = compare(rank, world, case)
    optimizer, params, _ = train(case, world)
    rows = optimizer.assignment()
    found["kept"] = [
        (
            {k: str(x.dtype)[6:] for k, x in optimizer.state[p].items() if torch.is_tensor(x)},
            r.state,
        )
        for p, r in zip(params, rows, strict=True)
    ]
    found["text"] = str(rows)
    held = sum(
        x.to_local().nbytes
        for p in params
        for x in optimizer.state[p].values()
        if torch.is_tensor(x)
    )
    found["bytes"] = held, memory_report_of(optimizer)
    return found


def memory_report_of(optimizer):
    from stiefel.optimizers import MemoryReport

    return MemoryReport.of(optimizer).state


SHAPES = ((Piece((24, 300), 0), True), (Piece((24, 512), 1), True), (Piece((24, 600), 1), False))


def test_codes_stay_where_no_block_is_cut_and_the_assignment_says_where_not():
    case = Case("muon", tuple(x for x, _ in SHAPES), steps=3, options=INT8)
    found = pool(2).run(kept, case)
    for rank in found:
        assert [r[1] for r in rank["rows"]] == ["owner"] * 3
        for (_, as_codes), (dtypes, words) in zip(SHAPES, rank["kept"], strict=True):
            assert dtypes["momentum_buffer"] == ("int8" if as_codes else "float32")
            assert words == ("" if as_codes else "float32")
        assert "state" in rank["text"].splitlines()[0] and "float32" in rank["text"]
    assert max(x["bytes"][0] for x in found) == found[0]["bytes"][1]
    far = list(found[0]["weights"].values())
    assert far[:2] == [0.0, 0.0], "codes have the bits of one process"
    assert 0.0 < far[2] < 2e-3, "floats are nearer to the truth"


@pytest.mark.parametrize(
    "method", ["rownorm", "frugal-columns", "frugal-block", "galore", "dctadamw", "trion", "fira"]
)
def test_codes_of_rules_that_run_on_shards(method):
    """A sum in another order turns a code now and then; squares have the random bits of one."""
    case = Case(
        method,
        (Piece((24, 512), 1), Piece((70, 90), 0), Piece((300, 24), 0), Piece((4, 40, 64), 0)),
        steps=4,
        options={**INT8, **({"rank": 8} if method in ("galore", "fira", "dctadamw") else {})},
    )
    found = pool(2).run(compare, case)
    plans = [plan for _, plan, _ in found[0]["rows"]]
    assert {"reduce", "owner"} & set(plans) and plans[3] == "local"
    assert all(far <= 3e-3 for far in found[0]["weights"].values()), found[0]["weights"]


def test_memory_report_from_shapes_says_what_ranks_hold():
    shapes = [(24, 300), (24, 512), (600, 24), (24, 600)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    case = Case("muon", tuple(Piece(s, 0) for s in shapes), steps=1, options=INT8)
    found = pool(3).run(kept, case)
    from stiefel.optimizers import Muon

    report = memory_report(params, Muon, world=3, **INT8)
    assert max(x["bytes"][0] for x in found) == report.state


# files --------------------------------------------------------------------------------------------


def case_of(method="muon"):
    pieces = (Piece((16, 300), 0), Piece((16, 512), 1), Piece((16, 600), 1), Piece((9,), 0))
    return Case(method, pieces, steps=4, options=INT8)


def run_on(case, world, steps, saved=None, optimizer=None, params=None):
    """Steps of a case, after a checkpoint, if any."""
    params = params or parameters(case, world)
    optimizer = optimizer or optimizer_of(case, params)
    if saved is not None:
        weights, state = saved
        for p, W in zip(params, weights, strict=True):
            p.data.copy_(laid(p, W))
        optimizer.load_state_dict(copy.deepcopy(state))
    for step in steps:
        set_gradients(case, params, step, world)
        optimizer.step()
    return optimizer, params


def laid(p, W):
    """A whole tensor as the parameter lies."""
    if not hasattr(p, "placements"):
        return W
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(W, p.device_mesh, p.placements, src_data_rank=None)


def whole_state_dict(optimizer):
    found = optimizer.state_dict()
    found["state"] = {
        i: {k: whole(x) for k, x in entry.items()} for i, entry in found["state"].items()
    }
    return found


def carried(rank, world, case):
    """Whole state of ranks in one process and back: codes become floats where blocks are cut."""
    optimizer, params = run_on(case, world, (0, 1))
    whole_weights = [whole(p) for p in params]
    saved = whole_state_dict(optimizer)
    meant = momenta(optimizer)
    one, _ = run_on(case, 0, (), (whole_weights, saved))
    forms = {str(x["momentum_buffer"].dtype) for x in entries_of(one)}
    back, _ = run_on(case, world, (), (whole_weights, whole_state_dict(one)))
    kept_as = [str(x["momentum_buffer"].dtype) for x in entries_of(back)]
    far = [
        [difference(a, b) for a, b in zip(meant, momenta(other), strict=True)]
        for other in (one, back)
    ]
    return forms, kept_as, far


def entries_of(optimizer):
    """State of the three matrices."""
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]][:3]


def momenta(optimizer):
    """What the momentum of each matrix stands for."""
    found = []
    for entry in entries_of(optimizer):
        X, scales = whole(entry["momentum_buffer"]), whole(entry["momentum_buffer_scale"])
        if X.dtype == torch.int8:
            X = dequantize_blocks(X[None], scales[None])[0]
        else:
            assert bool((scales == -1).all())
        found.append(X)
    return found


def test_whole_state_is_coded_and_decoded_as_the_ranks_that_load_it_need():
    for forms, kept_as, far in pool(2).run(carried, case_of()):
        assert forms == {"torch.int8"}
        assert kept_as == ["torch.int8", "torch.int8", "torch.float32"]
        assert far[0][:2] == [0.0, 0.0] and far[1][:2] == [0.0, 0.0]
        assert far[0][2] <= 1e-2 and far[1][2] == far[0][2]


def dcp_saved(rank, world, case, folder):
    """A distributed checkpoint after two steps, and what its momenta stand for."""
    import torch.distributed.checkpoint as dcp

    optimizer, _ = run_on(case, world, (0, 1))
    dcp.save(plain_keys(optimizer), checkpoint_id=folder)
    return momenta(optimizer)


def plain_keys(optimizer):
    """State as a nest of dicts with keys of text."""
    state = optimizer.state_dict()["state"]
    return {str(i): dict(entry) for i, entry in state.items()}


def dcp_loaded(rank, world, case, folder):
    """The checkpoint on these ranks: an error, or dtypes and what the momenta stand for."""
    import torch.distributed.checkpoint as dcp

    optimizer, _ = run_on(case, world, ())
    optimizer.init_state()
    found = plain_keys(optimizer)
    dcp.load(found, checkpoint_id=folder)
    state = optimizer.state_dict()
    try:
        optimizer.load_state_dict({**state, "state": {int(i): x for i, x in found.items()}})
    except ValueError as error:
        return str(error)
    forms = [str(x["momentum_buffer"].dtype)[6:] for x in entries_of(optimizer)]
    return forms, momenta(optimizer)


def test_distributed_checkpoints_of_codes_go_to_any_number_of_ranks(tmp_path):
    """Rows cut: codes everywhere. Codes become floats where blocks are cut, never the reverse."""
    rows = Case("muon", tuple(Piece(x.shape, 0) for x in case_of().pieces), 4, INT8)
    saved = pool(2).run(dcp_saved, rows, str(tmp_path / "rows"))[0]
    for world in (1, 3, 4):
        for forms, found in pool(world).run(dcp_loaded, rows, str(tmp_path / "rows")):
            assert forms == ["int8"] * 3
            assert all(map(torch.equal, saved, found))
    saved = pool(1).run(dcp_saved, case_of(), str(tmp_path / "one"))[0]
    for world, expected in ((2, ["int8", "int8", "float32"]), (3, ["int8", "float32", "float32"])):
        for forms, found in pool(world).run(dcp_loaded, case_of(), str(tmp_path / "one")):
            assert forms == expected
            assert all(map(torch.equal, saved, found))
    pool(3).run(dcp_saved, case_of(), str(tmp_path / "cut"))
    for said in pool(1).run(dcp_loaded, case_of(), str(tmp_path / "cut")):
        assert "float32" in said and "full_state_dict" in said
