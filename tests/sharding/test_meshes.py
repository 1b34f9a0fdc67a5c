"""Meshes of two axes: tensor parallelism under FSDP2, experts, replicas; nothing is ever gathered.

Each rank holds what it has against its part of one process's weights and state, as torch itself
cannot make every uneven tensor whole.
"""

import math
from functools import cache
from typing import Any

import pytest
import torch
from helpers import wrapped
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import gradients, weight
from helpers.ranks import pool
from helpers.sharded import EXACT, difference, digest
from helpers.wrapped import recorded
from torch import nn

from stiefel.optimizers._driver.layout import Layout, layout_of, memory, part

ROUNDING = 1e-5
"""How far sums over ranks may lead from one process in some steps."""
FAMILIES = [
    *("muon", "muon-normuon", "galore", "fira", "auon", "trion", "dctadamw", "frugal-columns"),
    *("frugal-randk", "frugal-block", "aro", "rownorm", "spectral", "hybrid", "symmetrystack"),
]
"""One of every class, and of its forms that are sharded in another way."""


@cache
def mesh_of_two(rows: int, columns: int) -> Any:
    """A mesh (rows, columns)."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (rows, columns), mesh_dim_names=("outer", "inner"))


def lay(X: torch.Tensor, cuts: tuple[str, ...], sizes: tuple[int, int]) -> torch.Tensor:
    """A whole tensor as a weight lies; each rank cuts its own part.

    Args:
        X: The tensor.
        cuts: Per axis of the mesh the dimension that is cut, ``"s0"`` for one that FSDP2 cuts where
            tensor parallelism has cut before, ``"r"`` for replicas; one letter for a weight on the
            flat mesh of all ranks; none for a plain tensor.
        sizes: Of the axes.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if not cuts:
        return X.clone()
    mesh = mesh_of_two(*sizes) if len(cuts) == 2 else mesh_of_two(math.prod(sizes), 1)
    placements = [
        Replicate()
        if cut == "r"
        else _StridedShard(int(cut[1:]), split_factor=sizes[1])
        if cut[0] == "s"
        else Shard(int(cut))
        for cut in (*cuts, "r")[:2]
    ]
    return Layout(mesh, tuple(placements), tuple(X.shape)).cut(X)


def held(X: Any, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank holds of X, and the same part of a whole tensor."""
    layout = layout_of(X, "a tensor")
    return (X, whole) if layout is None else (memory(X), part(whole, layout.box))


def made(name, params, **options):
    """The optimizer of an entry of METHODS or PAIRS."""
    if name in PAIRS:
        return PAIRS[name](list(zip(params[::2], params[1::2], strict=True)))
    return METHODS[name]([(f"layer{i}.weight", p) for i, p in enumerate(params)], **options)


def train(name, weights, sizes, steps, options):
    """Optimizer and parameters after some steps, and the calls of the last; sizes None: whole."""
    series = [
        gradients(shape if len(shape) > 1 else (*shape, 1), steps, i)
        for i, (shape, _) in enumerate(weights)
    ]
    cuts = [w[1] if sizes else () for w in weights]
    params = [
        nn.Parameter(lay(weight(shape, i).detach(), how, sizes))
        for i, ((shape, _), how) in enumerate(zip(weights, cuts, strict=True))
    ]
    optimizer = made(name, params, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = lay(series[i][step].view(weights[i][0]), cuts[i], sizes)
        if sizes is None or step < steps - 1:
            optimizer.step()
    if sizes is None:
        return optimizer, params, []
    with recorded() as calls:
        optimizer.step()
    return optimizer, params, calls


def whole_run(rank, name, weights, steps, options):
    """Weights and state of one process, which rank 0 has trained."""
    found: list[Any] = [None]
    if rank == 0:
        optimizer, params, _ = train(name, weights, None, steps, options)
        found = [[(p.detach(), dict(optimizer.state.get(p, {}))) for p in params]]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def compare(rank, world, names, weights, sizes, steps, **options):
    """By method: differences here, bits by box, names of calls, plans."""
    found = {}
    for name in names:
        many, cut, calls = train(name, weights, sizes, steps, options)
        far, state_far, bits = 0.0, 0.0, {}
        for i, (q, (p, others)) in enumerate(
            zip(cut, whole_run(rank, name, weights, steps, options), strict=True)
        ):
            tensors, mine = {"": (q, p)}, many.state.get(q, {})
            assert list(mine) == list(others), (list(mine), list(others))
            for key, X in mine.items():
                if isinstance(X, torch.Tensor):
                    tensors[key] = (X, others[key])
                else:
                    assert X == others[key], key
            for key, (X, Y) in tensors.items():
                here, there = held(X, Y)
                size = float(Y.detach().double().abs().max()) or 1.0
                gap = (here.double() - there.double()).abs().max().item() if here.numel() else 0.0
                if key:
                    state_far = max(state_far, gap / size)
                else:
                    far = max(far, gap / size)
                layout = layout_of(X, "a tensor")
                box = None if layout is None else layout.box
                bits[i, key, box] = digest([here])
        plans = [row.plan for row in many.assignment()]
        found[name] = far, state_far, bits, {call for call, _ in calls}, plans
    return found


def check(found, bound=ROUNDING, plans=None):
    """All ranks are near one process, and those that hold the same have the same bits."""
    known: dict[Any, str] = {}
    for rank in found:
        for name, (far, state_far, bits, calls, chosen) in rank.items():
            limit = 0.0 if name in EXACT else bound
            assert far <= limit, (name, far)
            assert state_far <= max(limit, 20 * limit), (name, state_far)
            for box, text in bits.items():
                assert known.setdefault((name, *box), text) == text, (name, box)
            assert calls <= {"all_reduce", "all_to_all_single"}, (name, calls)
            assert "gather" not in chosen
            if plans is not None:
                assert chosen == plans, (name, chosen)


# tensor parallelism under FSDP2 -------------------------------------------------------------------


def parallel(rows_first):
    """Six weights of odd sizes: colwise, rowwise, only FSDP2, only TP, and norms of both kinds."""
    return (
        *((shape, ("s0", "0")) for shape in ((13, 5), (7, 16), (3, 9))),
        *((shape, ("0", "1")) for shape in ((9, 8), (5, 13), (1, 7))),
        *(((9, 7), ("0", "r")), ((7, 11), ("r", "0")), ((11,), ("s0", "0"))),
        *(((5,), ("r", "r")), ((6,), ()), ((8, 6), ())),
        *((((6, 9), ("1", "0")),) if rows_first else ()),
    )


@pytest.mark.parametrize("half", [0, 1])
def test_tensor_parallelism_under_fsdp2_on_a_square(half):
    names = FAMILIES[half::2]
    found = pool(4).run(compare, names, parallel(True), (2, 2), 4)
    check(found)
    if "rownorm" in names:  # both axes cut rows, so shards do; or one cuts rows and one columns
        assert found[0]["rownorm"][-1][:6] == ["reduce"] * 3 + ["owner"] * 3


def test_tensor_parallelism_under_fsdp2_on_three_by_two():
    names = ["muon", "muon-normuon", "galore", "aro", "frugal-randk", "hybrid", "trion"]
    check(pool(6).run(compare, names, parallel(False), (3, 2), 3))


def test_pairs_over_two_axes():
    """Both factors of a pair lie on one mesh, cut as FSDP2 over tensor parallelism cuts them."""
    weights = (
        *(((3, 9), ("0", "1")), ((10, 3), ("s0", "0"))),
        *(((2, 7), ("r", "1")), ((5, 2), ("r", "0"))),
    )
    check(pool(4).run(compare, ["altlora", "adaprelora"], weights, (2, 2), 4))


# experts ------------------------------------------------------------------------------------------


EXPERTS = (
    *(((4, 6, 9), ("1", "0")), ((5, 9, 4), ("1", "0")), ((3, 5, 7), ("s0", "0"))),
    *(((6, 4, 4), ("0",)), ((7, 5), ("0",)), ((12, 7), ("0",)), ((9,), ("0",))),
)  # fmt: skip
"""Stacks on EP x EFSDP, cut in either way, beside dense weights on the flat mesh."""


def test_experts_and_dense_weights_share_an_optimizer():
    """Equal draws to one process: each expert is known by its number among all of them."""
    names = ["muon", "galore", "frugal-randk", "frugal-random", "aro", "rownorm", "hybrid", "trion"]
    found = pool(4).run(compare, names, EXPERTS, (2, 2), 4)
    check(found)
    for rank in found:
        for name, (_, _, _, _, plans) in rank.items():
            assert plans[2:4] == ["local", "local"], (name, plans)
            assert plans[0] != "local" or name == "rownorm"


def drawn(rank, world):
    """Per stack, the numbers of the experts whose draws a rule makes here."""
    from stiefel.optimizers import Rule, Slot, StackedOptimizer
    from stiefel.optimizers._core.terms import Dense

    seen = []

    class Looks(Rule):
        def state(self, m, n):
            return {"momentum_buffer": Slot("mn")}

        def update(self, w):
            seen.append(w.indices)
            return w.step(Dense(w.grad * 0.0))

    shape, cuts = EXPERTS[2]
    X, optimizers = weight(shape, 0).detach(), []
    for how in ((), cuts):
        p = nn.Parameter(lay(X, how, (2, 2)))
        p.grad = lay(torch.ones(shape), how, (2, 2))
        optimizers.append(StackedOptimizer([("w", p)], Looks(), 0.1, 0.0))
        optimizers[-1].step()
    layout = layout_of(p, "w")
    return seen, layout.box[0]


def test_a_rule_sees_global_numbers_of_experts():
    for seen, (first, last) in pool(4).run(drawn):
        whole = seen[0]
        assert len(set(whole)) == 3
        assert seen[1:] == ([whole[first:last]] if first < last else [])


CODED = (
    *(((26, 512), ("s0", "0")), ((64, 512), ("0", "1")), ((4, 24, 64), ("1", "0"))),
    *(((6, 40, 64), ("s0", "0")), ((24, 512), ("r", "1")), ((70, 90), ("r", "0"))),
)
"""Large enough for state in eight bits, cut between its blocks."""


def compare_codes(rank, world, names):
    return compare(rank, world, names, CODED, (2, 2), 3, state_dtype="int8")


def test_state_of_8_bits_over_two_axes():
    check(pool(4).run(compare_codes, ["muon", "galore", "frugal-columns", "dctadamw"]))


# replicas -----------------------------------------------------------------------------------------


REPLICAS = (
    *(((5, 3), ("r", "0")), ((3, 7), ("r", "1")), ((6, 5), ("r", "r")), ((4,), ("r", "r"))),
)
"""HSDP with odd rows and columns, and norms that tensor parallelism replicates."""
PAIRS_OF_REPLICAS = (
    *(((3, 9), ("r", "1")), ((10, 3), ("r", "0"))),
    *(((2, 7), ("r", "0")), ((5, 2), ("r", "0"))),
)


def bits_after(rank, world, names, weights, sizes, steps):
    """Bits by method, parameter, key and box after some steps."""
    found, draw = {}, torch.Generator().manual_seed(0)
    series = [
        [lay(torch.randn(shape, generator=draw), cuts, sizes) for shape, cuts in weights]
        for _ in range(7)
    ]
    for name in names:
        cut = [
            nn.Parameter(lay(weight(shape, i).detach(), cuts, sizes))
            for i, (shape, cuts) in enumerate(weights)
        ]
        optimizer = made(name, cut)
        for step in range(steps):
            for p, G in zip(cut, series[step % 7], strict=True):
                p.grad = G
            optimizer.step()
        for i, p in enumerate(cut):
            for key, X in (("", p), *optimizer.state[p].items()):
                if isinstance(X, torch.Tensor):
                    layout = layout_of(X, "a tensor")
                    here = X if layout is None else memory(X)
                    found[name, i, key, None if layout is None else layout.box] = digest([here])
    return found


def check_bits(found, names):
    known: dict[Any, str] = {}
    for rank in found:
        assert {key[0] for key in rank} == set(names)
        for key, text in rank.items():
            assert known.setdefault(key, text) == text, key


def test_replicas_are_equal_in_bits_after_many_steps():
    """Random sketches, random bases and refreshes included."""
    names = [*FAMILIES, "muon-kaczmarz", "frugal-random", "galore-rotate"]
    check_bits(pool(4).run(bits_after, names, REPLICAS, (2, 2), 50), names)
    names = ["altlora", "adaprelora-sgd"]
    check_bits(pool(4).run(bits_after, names, PAIRS_OF_REPLICAS, (2, 2), 50), names)


def test_replicas_do_what_one_process_does():
    check(pool(4).run(compare, ["muon", "muon-kaczmarz", "frugal-random"], REPLICAS, (2, 2), 3))


# limits of torch itself ---------------------------------------------------------------------------


def parallel_model(sizes, shape, style):
    """A module under tensor parallelism and FSDP2, and its weight as a whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, module = mesh_of_two(*sizes), nn.Module()
    whole = weight(shape, 0).detach()
    module.weight = nn.Parameter(distribute_tensor(whole, mesh["inner"], [Shard(style)]))
    fully_shard(module, mesh=mesh["outer"])
    return module, whole


def at_a_limit(rank, world, names, sizes, shape, style, folder):
    """How far training is from one process, what this rank holds, and whether DCP can save it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    far, said = {}, ""
    for name in names:
        module, X = parallel_model(sizes, shape, style)
        one = nn.Parameter(X.clone())
        optimizers = [made(name, [p]) for p in (one, module.weight)]
        layout = layout_of(module.weight, "weight")
        for G in gradients(shape, 4, 0):
            one.grad = G.clone()
            module.weight.grad = layout.cut(G)
            for optimizer in optimizers:
                optimizer.step()
        here, there = held(module.weight, one.detach())
        far[name] = difference(here, there.reshape(here.shape)) if here.numel() else 0.0
    if folder:
        try:
            dcp.save({"weight": module.weight}, checkpoint_id=folder)
        except CheckpointException as error:
            said = str(error)
    return far, tuple(here.shape), said


def check_near(found):
    for far, _, _ in found:
        assert all(x <= (0.0 if name in EXACT else ROUNDING) for name, x in far.items()), far


def test_thirteen_rows_train_where_torch_cannot_save_them(tmp_path):
    """Tensor parallelism of 2 under FSDP2 of 3: DCP finds overlaps in its own metadata."""
    names = ["muon", "galore", "aro", "rownorm"]
    found = pool(6).run(at_a_limit, names, (3, 2), (13, 6), 0, str(tmp_path))
    check_near(found)
    assert found[4][1] == (1, 6)
    assert all("overlapping chunks" in said for _, _, said in found)


def test_a_column_that_tensor_parallelism_cuts():
    """(40, 1): ranks without the column hold (0, 0), of which ``full_tensor`` of torch dies."""
    names = ["muon", "galore", "aro", "rownorm"]
    found = pool(4).run(at_a_limit, names, (2, 2), (40, 1), 1, "")
    check_near(found)
    assert [shape for _, shape, _ in found] == [(20, 1), (0, 0), (20, 1), (0, 0)]


# what users do around a mesh ----------------------------------------------------------------------


def with_policies(rank, world, names):
    """Real training of replicas of shards under each policy, beside a twin on whole tensors."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policies = {
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "low precision": {"mp_policy": low},
        "kept unsharded": {"reshard_after_forward": False},
    }
    found = {}
    for name in names:
        for kind, options in policies.items():
            model = wrapped.net(name)
            twin = wrapped.Twin(model, lambda m: wrapped.made(name, m))  # noqa: B023
            wrapped.wrap(model, world, mesh=mesh_of_two(2, 2), shard_placement_fn=None, **options)
            optimizer = wrapped.made(name, model)
            for step in range(3):
                optimizer.zero_grad()
                wrapped.backward(model, step, rank)
                twin.step(model)
                optimizer.step()
            found[name, kind] = twin.far(model), twin.state_far(model, optimizer)
    return found


def test_policies_of_fully_shard_on_replicas():
    for found in pool(4).run(with_policies, ["Muon", "GaLore", "ARO", "AltLoRA"]):
        for (name, kind), far in found.items():
            assert max(far) <= wrapped.bound_of(name) + ROUNDING * (name == "AltLoRA"), (name, kind)


def whole_layers(rank, world, names):
    """Every rank owns some layers as plain tensors, as Megatron's layerwise optimizers have it."""
    found = {}
    for name in names:
        shapes = [(9, 4), (5, 7), (6, 6), (7,), (3, 8)]
        ends = []
        for layers in (range(len(shapes)), range(rank, len(shapes), world)):
            params = {i: nn.Parameter(weight(shapes[i], i).detach()) for i in layers}
            optimizer = METHODS[name]([(f"layer{i}.weight", p) for i, p in params.items()])
            with recorded() as calls:
                for step in range(4):
                    for i, p in params.items():
                        draw = torch.Generator().manual_seed(100 * i + step)
                        p.grad = torch.randn(shapes[i], generator=draw)
                    optimizer.step()
            ends.append({i: p.detach() for i, p in params.items()})
        plans = {(row.plan, row.bytes_per_step) for row in optimizer.assignment()}
        same = all(torch.equal(p, ends[0][i]) for i, p in ends[1].items())
        found[name] = same, plans, calls
    return found


def test_ranks_that_own_whole_layers_send_nothing():
    names = ["muon", "galore", "aro", "frugal-randk", "hybrid"]
    for found in pool(3).run(whole_layers, names):
        for name, (same, plans, calls) in found.items():
            assert same, name
            assert plans == {("local", 0)}
            assert calls == []
