"""Every method on shards against one process: whole weights and whole state after each step.

Bits are equal where the rule runs on whole matrices; where sums run over ranks they differ by
rounding.
"""

import copy
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
    optimizer_of,
    parameters,
    set_gradients,
    train,
    whole,
)
from torch import nn

from stiefel import optimizers
from stiefel.kernels import POLAR_METHODS

MAIN = [
    *("muon", "muon-normuon", "muon-adamuon", "galore", "fira", "apollo", "auon", "trion"),
    *("dctadamw", "frugal-columns", "frugal-randk", "frugal-block", "aro", "rownorm", "sinkgd"),
    *("spectral", "hybrid"),
]
"""One entry of every class, and of its forms that are sharded in another way."""

VARIED = ["muon", "muon-normuon", "galore", "aro", "hybrid", "frugal-randk"]
"""One of each way to run on shards: bits and sums by meeting, and what rides."""

ODD = [(5, 3), (1, 40), (40, 1), (37, 23), (7, 16)]
EQUAL = [(12, 12)] * 3


def pieces():
    """Odd weights split along rows and columns, equal ones, experts, a kernel and vectors."""
    return (
        *(Piece(shape, dim) for dim in (0, 1) for shape in ODD),
        *(Piece(shape, 0) for shape in EQUAL),
        *(Piece(shape, 1) for shape in EQUAL[:2]),
        Piece((64, 48), 0),
        *(Piece((3, 6, 8), dim) for dim in (0, 1, 2)),
        *(Piece((8, 3, 3, 3), dim) for dim in (0, 1)),
        Piece((10,), 0),
        Piece((6,), None),
    )


def on_worlds(values, main=()):
    """The main ones on 2 and 4 ranks; the others take turns with 2 and 3."""
    for i, value in enumerate(values):
        for world in (2, 4) if value in main else (2 + i % 2,):
            marks = pytest.mark.slow if world == 4 else ()
            yield pytest.param(value, world, marks=marks, id=f"{value}-{world}")


@pytest.mark.parametrize("method, world", list(on_worlds(METHODS, MAIN)))
def test_shards_train_as_one_process(method, world):
    check(Case(method, pieces()), world)


PAIR_SHAPES = [(3, 9), (10, 3), (2, 12), (5, 2), (1, 7), (8, 1)]
"""A (r, n) and B (m, r) by turns."""


@pytest.mark.parametrize("method, world", list(on_worlds(PAIRS, ("altlora", "adaprelora"))))
def test_pairs_train_as_one_process(method, world):
    """Split along the first dimension as FSDP2 does by default, in bits, and along the longest."""
    default = [Piece(shape, 0) for shape in PAIR_SHAPES]
    longest = [Piece(shape, 1 - i % 2) for i, shape in enumerate(PAIR_SHAPES)]
    check(Case(method, tuple(default)), world, bound=0.0)
    found = check(Case(method, (*default, *longest), seed=3), world)
    plans = [plan for _, plan, _ in found[0]["rows"]]
    assert plans == ["owner"] * 6 + ["reduce" if method in SUMMED else "owner"] * 6


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


@pytest.mark.parametrize("method, world", list(on_worlds(VARIED, ("muon", "galore", "aro"))))
def test_views_of_shards_train_as_one_process(method, world):
    made = tuple(piece for cut in VIEWS.values() for piece in cut)
    check(Case(method, made, steps=4), world)


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


def half_of(methods):
    """Every other setting for each method, by turns; blocks come and go together."""
    for i, method in enumerate(methods):
        for j, setting in enumerate(SETTINGS):
            if (i + j) % 2 and (method, setting) != ("frugal-block", "stagger"):
                yield method, setting


@pytest.mark.parametrize("method, setting", list(half_of([*VARIED, "frugal-block", "rownorm"])))
def test_settings_mean_the_same_on_shards(method, setting):
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


ROUNDINGS = [(x, "stochastic") for x in MAIN]
ROUNDINGS += [(x, ("nearest", "kahan")[i % 2]) for i, x in enumerate(MAIN)]


@pytest.mark.parametrize("method, write", ROUNDINGS)
def test_weights_of_bfloat16_round_as_on_one_process(method, write):
    shapes = [(13, 6), (6, 13), (1, 9), (9, 1), (20, 20)]
    made = (
        *(Piece(shape, dim, dtype="bfloat16") for dim in (0, 1) for shape in shapes),
        Piece((11,), 0, dtype="bfloat16"),
        Piece((5,), None, dtype="bfloat16"),
    )
    # one rounding in 256 of a sum's last bit is seen in a weight
    check(Case(method, made, steps=4, options={"write": write}), 2, 1e-2 if method in SUMMED else 0)


@pytest.mark.parametrize("world", [2, 3])
def test_momentum_carries_the_same_errors(world):
    """Muon's bounded step under eco, and AdamW's."""
    shapes = [(13, 6), (6, 13), (11,)]
    made = (
        *(Piece(shape, 0, dtype="bfloat16") for shape in shapes),
        Piece((6, 13), 1, dtype="bfloat16"),
    )
    # the carried error of a strip of columns may differ in the last bit
    check(Case("muon", made, steps=4, options={"write": "eco"}), world, bound=1e-6)


@pytest.mark.parametrize("method", MAIN)
def test_state_of_8_bits_is_that_of_one_process(method):
    """Rows of 512 and whole rows on a rank: codes and scales are cut with them."""
    made = (Piece((24, 512), 0), Piece((24, 512), 1), Piece((130, 40), 0), Piece((12, 10), 0))
    bound = 1e-2 if method in SUMMED else 0.0
    check(Case(method, made, options={"state_dtype": "int8"}), 2, bound)


@pytest.mark.parametrize("method", VARIED)
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


@pytest.mark.parametrize("method", MAIN)
def test_gradients_that_no_rank_has_are_skipped(method):
    made = (
        Piece((13, 6), 0),
        Piece((6, 13), 1),
        Piece((13, 6), 0),
        Piece((9,), 0),
        Piece((4,), None),
    )
    missing = ((0, 1), (1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 2))
    check(Case(method, made, steps=6, missing=missing), 2 + MAIN.index(method) % 3)


@pytest.mark.parametrize("method", VARIED)
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


@pytest.mark.parametrize("method", VARIED)
def test_more_ranks_than_rows_leave_some_without_entries(method):
    shapes = [(1, 9), (2, 9), (3, 9), (9, 1), (9, 2), (1, 1), (5, 2)]
    check(Case(method, tuple(Piece(shape, dim) for dim in (0, 1) for shape in shapes)), 4)


def one_rank_of_its_own(rank, world, method):
    """A mesh of one rank, and one that holds everything whole: nothing is sent."""
    from torch.distributed.device_mesh import DeviceMesh

    case = Case(method, (Piece((13, 6)), Piece((6, 13))))
    alone = [DeviceMesh("cpu", [r]) for r in range(world)][rank]
    _, _, expected = train(case, 0)
    found = []
    for mesh, dim in ((alone, 0), (meshes(world)["all"], None)):
        plain = parameters(case, 0)
        params = [nn.Parameter(lay(p.detach().clone(), mesh, dim)) for p in plain]
        optimizer = optimizer_of(case, params)
        for step in range(case.steps):
            set_gradients(case, plain, step, 0)
            for p, q in zip(params, plain, strict=True):
                p.grad = lay(q.grad, mesh, dim)
            optimizer.step()
        rows = {(row.plan, row.bytes_per_step) for row in optimizer.assignment()}
        pairs = zip(params, expected[-1], strict=True)
        found.append((rows, [difference(whole(p), W) for p, W in pairs]))
    return found


@pytest.mark.parametrize("method", ["muon", "muon-normuon", "galore", "spectral"])
def test_meshes_that_split_nothing_are_local(method):
    for outcome in pool(2).run(one_rank_of_its_own, method):
        for rows, far in outcome:
            assert rows == {("local", 0)}
            assert far == [0.0, 0.0]


LONG_PAIRS = tuple(map(Piece, [(4, 24), (12, 4), (3, 8), (40, 3), (1, 4), (4, 1)], (1, 0) * 3))
"""A and B by turns, cut along their long sides in equal parts."""


def sums_of_pairs(rank, world, case, frozen=None):
    """Per step (operation, bytes) of each reduction; what was promised; entries of state here."""
    from stiefel.optimizers._driver.exchange import Team

    params, steps = parameters(case, world), []
    frozen = [] if frozen is None else params[frozen::2]
    for p in frozen:
        p.requires_grad_(False)
    optimizer = optimizer_of(case, params)
    promised = [(row.plan, row.bytes_per_step) for row in optimizer.assignment()]
    reduce = Team.reduce

    def counted(team, x, op):
        steps[-1].append((op, (x.numel() - 1) * x.element_size()))  # one number says who failed
        return reduce(team, x, op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "reduce", counted)
        for step in range(case.steps):
            steps.append([])
            set_gradients(case, params, step, world)
            for p in frozen:
                p.grad = None
            optimizer.step()
    state = [
        {k: x.to_local().numel() for k, x in optimizer.state[p].items() if hasattr(x, "to_local")}
        for p in params
    ]
    return [calls[1:] for calls in steps], promised, state  # the first are flags


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "method, calls", [
        ("altlora", ["SUM"] * 2), ("altlora-plus", ["SUM"] * 4), ("altlora-alternate", ["SUM"]),
        ("altlora-compact", ["SUM"] * 4), ("adaprelora", ["SUM", "MAX", "SUM"]),
        ("adaprelora-sgd", ["SUM", "MAX", "SUM", "SUM", "SUM"]),
        ("adaprelora-none", ["SUM", "SUM"]),
    ],
)  # fmt: skip
def test_pairs_send_small_sums_for_all_of_them_together(method, calls, world):
    """As many calls as for one pair, of the bytes that the assignment says; state is shared."""
    found = pool(world).run(sums_of_pairs, Case(method, LONG_PAIRS, steps=3))
    for steps, promised, state in found:
        assert {plan for plan, _ in promised} == {"reduce"}
        for step in steps[1:]:  # in the first one ranks tell each other before each call
            assert [op for op, _ in step] == calls
            sent = 2 * sum(size for _, size in step) * (world - 1) // world
            assert sent == sum(size for _, size in promised)
        for piece, held in zip(LONG_PAIRS, state, strict=True):
            r, long = sorted(piece.shape)
            sizes = {"exp_avg": r * long, "exp_avg_sq": r * long, "ref": r * long, "energy": long}
            for key in held.keys() & sizes.keys():
                assert held[key] == sizes[key] // world, key
            assert held["count"] == 1 if "count" in held else method == "adaprelora-sgd"


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("method", ["altlora", "adaprelora"])
def test_a_frozen_factor_is_in_the_promise(method, frozen):
    for steps, promised, _ in pool(2).run(sums_of_pairs, Case(method, LONG_PAIRS), frozen):
        sent = {sum(size for _, size in step) for step in steps}
        assert sent == {sum(size for _, size in promised)} and min(sent) > 0


PAIR_VIEWS = [
    (((3, 2, 8), 2), ((3, 6, 2), 1), "reduce"),  # experts
    (((4, 2, 8), 0), ((4, 6, 2), 0), "local"),
    (((4, 2, 8), 0), ((4, 6, 2), 1), "owner"),
    (((2, 3, 3, 3), 0), ((8, 2, 1, 1), 0), "owner"),  # kernels
]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("method", ["altlora", "altlora-compact", "adaprelora"])
def test_pairs_of_experts_and_of_kernels(method, world):
    made = tuple(Piece(*of) for A, B, _ in PAIR_VIEWS for of in (A, B))
    found = check(Case(method, made, steps=4), world)
    plans = [plan for _, plan, _ in found[0]["rows"]]
    assert plans == [plan for *_, plan in PAIR_VIEWS for _ in range(2)]


@pytest.mark.parametrize("method", ["altlora-plus", "adaprelora"])
@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"state_dtype": "bfloat16"}, "float32"), ({"maximize": True, "plan": "owner"}, "float32"),
        ({"write": "stochastic"}, "bfloat16"), ({"write": "kahan"}, "bfloat16"),
        ({"comm_dtype": "bfloat16", "plan": "reduce"}, "float64"), ({}, "float64 float32"),
    ],
)  # fmt: skip
def test_settings_of_pairs_mean_the_same_on_shards(method, options, dtype):
    dtypes = dtype.split() * 6  # A and B may differ
    made = tuple(replace(x, dtype=of) for x, of in zip(LONG_PAIRS, dtypes, strict=False))
    is_low = "bfloat16" in (dtype, options.get("state_dtype"))
    check(Case(method, made, options=options, steps=4), 3, 1e-2 if is_low else None)


def refused(rank, world, method, options, dims):
    """The message for a pair that may not be reduced, and whether anything has changed."""
    made = tuple(map(Piece, [(4, 24), (12, 4)], dims))
    case = Case(method, made, options={"plan": "reduce", **options})
    params = parameters(case, world)
    before = [whole(p) for p in params]
    optimizer = optimizer_of(case, params)
    set_gradients(case, params, 0, world)
    try:
        optimizer.step()
    except ValueError as error:
        same = [difference(whole(p), W) for p, W in zip(params, before, strict=True)]
        return str(error), same, len(optimizer.state)
    return "nothing", [], 0


@pytest.mark.parametrize(
    "method, options, dims",
    [
        ("altlora", {}, (0, 0)),
        ("altlora", {}, (1, 1)),
        ("altlora-reference", {}, (1, 0)),
        ("adaprelora", {}, (0, 0)),
    ],
)
def test_pairs_that_may_not_be_reduced_say_so(method, options, dims):
    for text, same, entries in pool(2).run(refused, method, options, dims):
        assert "plan='reduce' is not exact for" in text and "'owner', 'gather' or 'auto'" in text
        assert same == [0.0, 0.0] and entries == 0


WHOLE = (None, None)
ODD_LAYOUTS = [
    ((WHOLE, (None, 0)), "reduce"), (((None, 1), WHOLE), "reduce"), (((0, None), WHOLE), "owner"),
    (((None, 1), (None, 0)), "reduce"), (((1, None), (None, 0)), "owner"), ((WHOLE, WHOLE), "local")
]  # fmt: skip
"""How A and B lie on a square mesh, and the plan: cut along two axes they travel."""


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("method", ["altlora-plus", "adaprelora", "adaprelora-sgd"])
def test_pairs_of_a_whole_factor_and_of_replicas(method, spread):
    made = tuple(
        Piece(shape, dims, mesh="square")
        for pair, _ in ODD_LAYOUTS
        for shape, dims in zip(PAIR_SHAPES[:2], pair, strict=True)
    )
    experts = [Piece((4, 2, 8), (0, 2), mesh="square"), Piece((4, 6, 2), (0, 1), mesh="square")]
    found = check(Case(method, (*made, *experts), options={"spread_replicas": spread}), 4)
    plans = [plan for _, plan, _ in found[0]["rows"]]
    assert plans[:-2] == [plan for _, plan in ODD_LAYOUTS for _ in range(2)]
    assert plans[-2:] == ["owner"] * 2


def watches(rank, world, what):
    """Statistics of a base weight where something is sharded."""
    A, B = (nn.Parameter(torch.randn(s)) for s in ((2, 8), (6, 2)))
    W = nn.Parameter(torch.zeros(6, 8), requires_grad=False)
    mesh = meshes(world)["all"]
    if what == "factors":
        A, B = nn.Parameter(lay(A.detach(), mesh, 1)), nn.Parameter(lay(B.detach(), mesh, 0))
    else:
        W = nn.Parameter(lay(W.detach(), mesh, 0), requires_grad=False)
    optimizer = optimizers.AdaPreLoRA(
        optimizers.pairs_to_groups([(A, B)], scale=1.0), stats="exact"
    )
    try:
        optimizer.watch(optimizers.pairs_to_groups([(A, B, W)], scale=1.0))
    except ValueError as error:
        return str(error), W.requires_grad
    return "nothing", W.requires_grad


@pytest.mark.parametrize("what", ["factors", "base weight"])
def test_statistics_of_sharded_base_weights_are_refused(what):
    for text, trains in pool(2).run(watches, what):
        assert text.startswith("stats='exact' needs whole weights") and not trains


def part():
    """A stage of a model."""
    layers = {"up": nn.Linear(7, 10), "norm": nn.LayerNorm(10), "down": nn.Linear(10, 3)}
    return nn.ModuleDict(layers)


def model_parts(rank, world, by):
    """Two models in one optimizer, as pipeline stages give them."""
    parts, out = [part(), part()], []
    for mesh in (None, meshes(world)["all"]):
        models = copy.deepcopy(parts)
        for layer in (layer for m in models for layer in m.values()):
            for key, p in list(layer.named_parameters()) if mesh is not None else ():
                setattr(layer, key, nn.Parameter(lay(p.detach(), mesh, 0)))
        flat = [p for m in models for p in m.parameters()]
        groups = [{"params": list(m.named_parameters())} for m in models]
        optimizer = optimizers.Muon(groups if by == "groups" else flat, lr=0.02)
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


@pytest.mark.slow
@pytest.mark.parametrize("method", VARIED)
def test_other_seeds_agree_too(method):
    check(Case(method, pieces(), steps=7, seed=40), 3)


def test_the_bound_would_see_a_blockwise_answer():
    """Newton-Schulz on the halves of a matrix is far from it on the whole."""
    whole_one, halves = Case("muon", (Piece((8, 6)),)), Case("muon", (Piece((4, 6)),))
    _, _, seen = train(whole_one, 0)
    _, _, blockwise = train(halves, 0)
    assert difference(seen[-1][0][:4], blockwise[-1][0]) > 100 * ROUNDING
