"""Every method on shards against one process: whole weights and whole state after each step.

Bits are equal where the rule runs on whole matrices; where sums run over ranks they differ by
rounding.
"""

from dataclasses import replace

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.ranks import pool
from helpers.sharded import (
    ROUNDING,
    SUMMED,
    Case,
    Piece,
    check,
    difference,
    lay,
    meshes,
    names,
    set_gradients,
    train,
    whole,
    whole_state,
)

from stiefel import optimizers
from stiefel.kernels import POLAR_METHODS

MAIN = [
    *("muon", "muon-normuon", "muon-adamuon", "galore", "fira", "auon", "trion", "dctadamw"),
    *("frugal-columns", "frugal-randk", "frugal-block", "aro", "rownorm", "spectral", "hybrid"),
]
"""One entry of every class, and of its forms that are sharded in another way."""

ODD = [(5, 3), (1, 40), (40, 1), (37, 23), (7, 16)]
EQUAL = [(12, 12)] * 3
SIDES = {"rows": 0, "columns": 1}


def pieces(side, *, large=False):
    """Odd weights, equal ones, experts, a kernel and vectors, split along one side."""
    dim = SIDES[side]
    shapes = [*ODD, *EQUAL, *([(64, 48)] if large else [])]
    return (
        *(Piece(shape, dim) for shape in shapes),
        Piece((3, 6, 8), 1 + dim),
        Piece((3, 6, 8), 0),
        Piece((8, 3, 3, 3), dim),
        Piece((10,), 0),
        Piece((6,), None),
    )


def grid():
    """Every method on every world and side; those that others vary are slow."""
    for i, method in enumerate(METHODS):
        for j, (world, side) in enumerate((w, s) for s in SIDES for w in (2, 3, 4)):
            is_quick = j in ((i % 3), 3 + (i + 1) % 3)
            marks = () if is_quick else (pytest.mark.slow,)
            yield pytest.param(method, world, side, marks=marks, id=f"{method}-{world}-{side}")


@pytest.mark.parametrize("method, world, side", list(grid()))
def test_shards_train_as_one_process(method, world, side):
    check(Case(method, pieces(side, large=world == 2)), world)


PAIR_SHAPES = [(3, 9), (10, 3), (2, 12), (5, 2), (1, 7), (8, 1)]
"""A (r, n) and B (m, r) by turns."""


@pytest.mark.parametrize("dims", [(0, 0), (1, 0)], ids=["default", "longest"])
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("method", PAIRS)
def test_pairs_train_as_one_process(method, world, dims):
    made = tuple(Piece(shape, dims[i % 2]) for i, shape in enumerate(PAIR_SHAPES))
    check(Case(method, made), world)


@pytest.mark.parametrize("polar", ["auto", "low_rank", *POLAR_METHODS])
def test_muon_has_the_bits_of_one_process_with_every_polar(polar):
    more = {"rank": 2, "oversample": 1} if polar == "low_rank" else {}
    made = (*(Piece(shape, i % 2) for i, shape in enumerate(ODD)), *map(Piece, EQUAL))
    check(Case("muon", made, steps=3, options={"polar": polar, **more}), 3, bound=0.0)


VIEWS = {
    "heads": (Piece((16, 6), 0, "heads:4"), Piece((16, 6), 1, "heads:4")),
    "heads_in": (Piece((6, 16), 1, "heads_in:4"), Piece((6, 16), 0, "heads_in:4")),
    "many heads": (Piece((24, 5), 0, "heads:12"), Piece((6, 4), 0, "heads:2")),
    "rows": (Piece((17, 6), 0, "rows:9,5,3"), Piece((17, 6), 1, "rows:9,5,3")),
    "rows of a short block": (Piece((12, 7), 0, "rows:1,10,1"),),
    "transposed": (Piece((9, 5), 0, "transposed"), Piece((9, 5), 1, "transposed")),
    "transposed rows": (Piece((6, 11), 1, "transposed:rows:6,5"),),
    "transposed heads": (Piece((6, 16), 0, "transposed:heads:4"),),
    "interleaved": (Piece((14, 5), 0, "interleaved"), Piece((14, 5), 1, "interleaved")),
    "batch": (Piece((2, 3, 5, 6), 0, "batch"), Piece((2, 3, 5, 6), 1, "batch")),
    "batch of sides": (Piece((2, 3, 5, 6), 2, "batch"), Piece((2, 3, 5, 6), 3, "batch")),
    "experts of rows": (Piece((4, 7, 5), 0, "rows:3,4"), Piece((4, 7, 5), 1, "rows:3,4")),
    "interleaved experts": (Piece((4, 6, 5), 0, "interleaved"), Piece((4, 6, 5), 2, "interleaved")),
    "kernels": (Piece((6, 4, 3, 3), 0), Piece((6, 4, 3, 3), 1), Piece((6, 4, 3, 3), 2)),
    "flatten": (Piece((6, 4, 5), 0, "flatten"), Piece((6, 4, 5), 2, "flatten")),
}
"""Parameters of a view, cut where matrices lie whole and where they do not."""


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("world", [2, pytest.param(3), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["muon", "muon-normuon", "galore", "aro", "hybrid"])
def test_views_of_shards_train_as_one_process(method, view, world):
    check(Case(method, VIEWS[view], steps=4), world)


@pytest.mark.parametrize("method", MAIN)
def test_experts_that_lie_whole_send_nothing(method):
    made = (Piece((4, 6, 8), 0), Piece((6, 5, 5), 0), Piece((2, 4, 9), 0))
    found = check(Case(method, made, steps=4), 2)
    assert {(plan, sent) for rule, plan, sent in found[0]["rows"] if rule != "adamw"} == {
        ("local", 0)
    }


SETTINGS = {
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "stagger": {"stagger": True},
    "one AdamW": {"foreach": False},
    "plan owner": {"plan": "owner"},
    "plan gather": {"plan": "gather"},
}
"""What a group may say, with plain weights of float32."""


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", MAIN)
def test_settings_mean_the_same_on_shards(method, setting):
    if setting == "stagger" and method == "frugal-block":
        pytest.skip("blocks come and go together")
    made = (
        Piece((13, 6), 0),
        Piece((6, 13), 1),
        Piece((8, 5), 1),
        Piece((9,), 0),
        Piece((4,), None),
    )
    options = SETTINGS[setting]
    case = Case(method, made, options=options, steps=4)
    bound = 0.0 if setting == "plan gather" else None
    if setting == "bfloat16 state" and method in SUMMED:
        bound = 1e-2  # a sum that differs in its last bit may round state the other way
    check(case, 3, bound)


@pytest.mark.parametrize("write", ["auto", "nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", MAIN)
def test_weights_of_bfloat16_round_as_on_one_process(method, side, write):
    if write == "auto" and side == "columns":
        pytest.skip("as stochastic")
    dim = SIDES[side]
    shapes = [(13, 6), (6, 13), (1, 9), (9, 1), (20, 20)]
    made = (
        *(Piece(shape, dim, dtype="bfloat16") for shape in shapes),
        Piece((11,), 0, dtype="bfloat16"),
        Piece((5,), None, dtype="bfloat16"),
    )
    # one rounding in 256 of a sum's last bit is seen in a weight
    check(Case(method, made, steps=4, options={"write": write}), 2, 1e-2 if method in SUMMED else 0)


@pytest.mark.parametrize("write", ["eco"])
def test_eco_carries_the_same_errors(write):
    made = (Piece((13, 6), 0, dtype="bfloat16"), Piece((6, 13), 1, dtype="bfloat16"))
    check(Case("muon", made, steps=4, options={"write": write, "momentum": 0.9}), 3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", MAIN)
def test_state_of_8_bits_is_that_of_one_process(method, side):
    """Rows of 512 and whole rows on a rank: codes and scales are cut with them."""
    made = (Piece((24, 512), SIDES[side]), Piece((130, 40), 0), Piece((12, 10), 0))
    bound = 1e-2 if method in SUMMED else 0.0
    check(Case(method, made, options={"state_dtype": "int8"}), 2, bound)


@pytest.mark.parametrize("method", MAIN)
def test_rows_of_8_bits_that_ranks_would_cut_train_as_one_process(method):
    """A scale belongs to 256 numbers of a row; where a rank would get a part, weights agree."""
    case = Case(method, (Piece((24, 300), 1), Piece((130, 70), 1)), options={"state_dtype": "int8"})
    found = pool(3).run(weights_of_both, case)
    bound = 1e-2 if method in SUMMED else 2e-3
    assert all(far <= bound for far in found[0].values()), found[0]


def weights_of_both(rank, world, case):
    """Differences of the last weights."""
    _, _, seen = train(case, world)
    if rank:
        return {}
    _, _, expected = train(case, 0)
    return {
        name: difference(a, b)
        for name, a, b in zip(names(case), seen[-1], expected[-1], strict=True)
    }


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", MAIN)
def test_gradients_that_no_rank_has_are_skipped(method, world):
    made = (
        Piece((13, 6), 0),
        Piece((6, 13), 1),
        Piece((13, 6), 0),
        Piece((9,), 0),
        Piece((4,), None),
    )
    missing = ((0, 1), (1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 2))
    check(Case(method, made, steps=6, missing=missing), world)


@pytest.mark.parametrize("method", MAIN)
def test_a_weight_that_never_has_a_gradient_has_no_effect(method):
    made = (Piece((13, 6), 0), Piece((6, 13), 0), Piece((7, 8), 1))
    missing = tuple((step, 1) for step in range(5))
    check(Case(method, made, missing=missing), 2)


@pytest.mark.parametrize("method", MAIN)
def test_several_meshes_and_plain_weights_share_an_optimizer(method):
    made = (
        Piece((13, 6), 0),
        Piece((13, 6), 0, mesh="b"),
        Piece((6, 13), 1, mesh="a"),
        Piece((13, 6), None),
        Piece((9, 9), 1, mesh="b"),
        Piece((8,), 0, mesh="a"),
        Piece((8,), None),
        Piece((12, 3), 0),
        Piece((1, 7), 0, mesh="a"),
    )
    check(Case(method, made), 4)


@pytest.mark.parametrize("method", PAIRS)
def test_pairs_of_several_meshes_share_an_optimizer(method):
    made = tuple(
        Piece(shape, i % 2, mesh=mesh)
        for i, (shape, mesh) in enumerate(
            zip(PAIR_SHAPES, ["all", "all", "b", "b", "a", "a"], strict=True)
        )
    )
    check(Case(method, made), 4)


@pytest.mark.parametrize("method", ["muon", "muon-normuon", "galore", "aro", "hybrid"])
def test_more_ranks_than_rows_leave_some_without_entries(method):
    shapes = [(1, 9), (2, 9), (3, 9), (9, 1), (9, 2), (1, 1), (5, 2)]
    check(Case(method, tuple(Piece(shape, 0) for shape in shapes)), 4)
    check(Case(method, tuple(Piece(shape, 1) for shape in shapes)), 4)


def one_rank_of_its_own(rank, world, method):
    """A mesh of one rank, and one that holds everything whole: nothing is sent."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    case = Case(method, (Piece((13, 6)), Piece((6, 13))))
    alone = [DeviceMesh("cpu", [r]) for r in range(world)][rank]
    _, _, expected = train(case, 0)
    found = []
    for mesh, placement in ((alone, Shard(0)), (meshes(world)["all"], Replicate())):
        params = [torch.nn.Parameter(p.detach()) for p in parameters_plain(case)]
        params = [
            torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None))
            for p in params
        ]
        optimizer = METHODS[method]([(f"layer{i}.weight", p) for i, p in enumerate(params)])
        for step in range(case.steps):
            plain = parameters_plain(case)
            set_gradients(case, plain, step, 0)
            for p, q in zip(params, plain, strict=True):
                p.grad = distribute_tensor(q.grad, mesh, [placement], src_data_rank=None)
            optimizer.step()
        rows = {(row.plan, row.bytes_per_step) for row in optimizer.assignment()}
        found.append(
            (
                rows,
                [difference(whole(p), q) for p, q in zip(params, expected[-1], strict=True)],
                [difference(whole(x), whole(x)) for s in whole_state(optimizer, params) for x in s],
            )
        )
    return found


def parameters_plain(case):
    from helpers.sharded import parameters

    return parameters(case, 0)


@pytest.mark.parametrize("method", ["muon", "muon-normuon", "galore", "spectral"])
def test_meshes_that_split_nothing_are_local(method):
    for outcome in pool(2).run(one_rank_of_its_own, method):
        for rows, far, _ in outcome:
            assert rows == {("local", 0)}
            assert far == [0.0, 0.0]


def model_parts(rank, world, by):
    """Two models in one optimizer, as pipeline stages give them."""
    parts = [
        torch.nn.ModuleDict(
            {
                "up": torch.nn.Linear(7, 10, bias=False),
                "norm": torch.nn.LayerNorm(10),
                "down": torch.nn.Linear(10, 3, bias=False),
            }
        )
        for _ in range(2)
    ]
    out = []
    for mesh in (None, meshes(world)["all"]):
        models = [torch.nn.ModuleDict({k: m for k, m in part.items()}) for part in parts]
        import copy

        models = [copy.deepcopy(m) for m in models]
        if mesh is not None:
            for m in models:
                for layer in m.values():
                    for key, p in list(layer.named_parameters()):
                        setattr(layer, key, torch.nn.Parameter(lay(p.detach(), mesh, 0)))
        if by == "groups":
            params = [{"params": list(m.named_parameters())} for m in models]
        else:
            params = [p for m in models for p in m.parameters()]
        optimizer = optimizers.Muon(params, lr=0.02)
        flat = [p for m in models for p in m.parameters()]
        for step in range(3):
            for i, p in enumerate(flat):
                G = torch.linspace(-1, 1, p.numel()).mul(i + step + 1).sin().view(p.shape)
                p.grad = G if mesh is None else lay(G, mesh, 0)
            optimizer.step()
        out.append([whole(p) for p in flat])
    return [difference(a, b) for a, b in zip(*out, strict=True)]


@pytest.mark.parametrize("by", ["groups", "list"])
def test_a_list_of_models_in_one_optimizer(by):
    for far in pool(2).run(model_parts, by):
        assert set(far) == {0.0}


def held(rank, world, case):
    """(entries held here, entries of one process) of all state of matrices."""
    optimizer, params, _ = train(case, world)
    one, plain, _ = train(case, 0)
    here = total = 0
    for p, q in zip(params, plain, strict=True):
        for key, x in one.state[q].items():
            if isinstance(x, torch.Tensor) and x.ndim:
                total += x.numel()
                here += optimizer.state[p][key].to_local().numel()
    return here, total


@pytest.mark.parametrize("method", MAIN)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_state(method, world):
    case = Case(method, (Piece((64, 40), 0), Piece((40, 64), 0), Piece((64, 64), 1)))
    found = pool(world).run(held, case)
    for here, total in found:
        assert here <= 1.2 * total / world, (here, total)


@pytest.mark.parametrize("method", ["muon", "galore", "spectral", "muon-normuon", "fira"])
@pytest.mark.parametrize("world", [2, 3])
def test_other_seeds_agree_too(method, world):
    case = Case(method, pieces("rows"), steps=7, seed=40)
    check(case, world)
    check(replace(case, pieces=pieces("columns"), seed=80), world)


def test_the_bound_would_see_a_blockwise_answer():
    """Newton-Schulz on the halves of a matrix is far from it on the whole."""
    whole_one, halves = Case("muon", (Piece((8, 6)),)), Case("muon", (Piece((4, 6)),))
    _, _, seen = train(whole_one, 0)
    _, _, blockwise = train(halves, 0)
    assert difference(seen[-1][0][:4], blockwise[-1][0]) > 100 * ROUNDING
