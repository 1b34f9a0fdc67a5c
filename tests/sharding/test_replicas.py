"""Replicas that share the work: those of sharded weights (HSDP), and plain ones over a group."""

import contextlib
import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import gradients, weight
from helpers.ranks import pool
from helpers.sharded import Case, Piece, check, lay, meshes

ODD = [(5, 3), (1, 40), (37, 23), (12, 12), (12, 12)]
LAYS = [(None, 0), (None, 1), (0, None), (None, None), (0, 1)]


def pieces():
    """Weights that are cut along one axis of a mesh, with replicas along the other."""
    return (
        *(Piece(shape, dims, mesh="square") for dims in LAYS for shape in ODD),
        Piece((3, 6, 8), (None, 0), mesh="square"),
        Piece((10,), (None, 0), mesh="square"),
        Piece((6,), None),
    )


VARIED = [
    *("muon-normuon", "galore", "fira", "trion", "dctadamw", "frugal-block", "aro", "rownorm"),
    *("auon-hybrid", "spectral", "hybrid"),
]


@pytest.mark.parametrize(
    ("method", "spread"), [("muon", False), ("galore", False), *((x, True) for x in VARIED)]
)
def test_replicas_do_what_one_process_does_alone_or_together(method, spread):
    check(Case(method, pieces(), steps=4, options={"spread_replicas": spread}), 4)


def plain_run(rank, world, method, options, shared, steps=5):
    """Weights, state and calls of training on plain weights that are equal on all ranks."""
    optimizer, params = plain_optimizer(method, options, shared)
    calls = []
    with counted(calls):
        for step in range(steps):
            set_plain_gradients(params, step)
            optimizer.step()
    state = [
        {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in optimizer.state[p].items()}
        for p in params
    ]
    rows = [(row.plan, row.bytes_per_step) for row in optimizer.assignment()]
    return [p.detach().clone() for p in params], state, rows, calls


PLAIN = [(5, 3), (1, 40), (37, 23), (12, 12), (12, 12), (12, 12), (3, 6, 8), (10,)]


def plain_optimizer(method, options, shared):
    options = dict(options)
    if shared:
        options["process_group"] = dist.group.WORLD
    if method in PAIRS:
        factors = [weight(shape, i) for i, shape in enumerate([(2, 9), (7, 2)] * 3)]
        pairs = list(zip(factors[::2], factors[1::2], strict=True))
        return PAIRS[method](pairs, **options), factors
    params = [weight(shape, i) for i, shape in enumerate(PLAIN)]
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    return METHODS[method](named, **options), params


def set_plain_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = gradients(tuple(p.shape), 8, i)[step].clone().to(p.dtype)


@contextlib.contextmanager
def counted(calls):
    """Write down the name and the bytes of every collective."""
    own = dist.all_to_all_single, dist.all_reduce

    def exchange(out, x, received=None, sent=None, group=None, **rest):
        me = dist.get_rank(group)
        calls.append(("exchange", sum(n for r, n in enumerate(sent) if r != me)))
        return own[0](out, x, received, sent, group=group, **rest)

    def reduce(x, *args, **rest):
        calls.append(("reduce", x.nbytes))
        return own[1](x, *args, **rest)

    dist.all_to_all_single, dist.all_reduce = exchange, reduce
    try:
        yield
    finally:
        dist.all_to_all_single, dist.all_reduce = own


def together_or_alone(rank, world, method, options):
    shared = plain_run(rank, world, method, options, shared=True)
    alone = plain_run(rank, world, method, options, shared=False)
    same = all(map(torch.equal, shared[0], alone[0]))
    for mine, other in zip(shared[1], alone[1], strict=True):
        same &= mine.keys() == other.keys()
        same &= all(
            torch.equal(x, other[k]) if isinstance(x, torch.Tensor) else x == other[k]
            for k, x in mine.items()
        )
    return same, shared[2], shared[3], alone[2], alone[3]


@pytest.mark.parametrize("method", [*(x for x in METHODS if "kaczmarz" not in x), *PAIRS])
def test_plain_replicas_that_share_the_work_have_the_bits_of_doing_it_all(method):
    found = pool(3).run(together_or_alone, method, {})
    for same, rows, calls, rows_alone, calls_alone in found:
        assert same
        assert not calls_alone
        assert rows_alone == [("local", 0)] * len(rows)
        assert all(plan in ("local", "owner") for plan, _ in rows)
        assert sum(name == "reduce" for name, _ in calls) >= 5  # the flags of each step
    total = sum(size for _, rows, *_ in found for _, size in rows)
    if method == "muon":
        matrices = 4 * sum(math.prod(shape) for shape in PLAIN if len(shape) > 1)
        assert total == 2 * matrices  # every matrix goes from its owner to two others
        for _, rows, calls, *_ in found:
            # in the first step the ranks say before what they send that none has failed
            assert [name for name, _ in calls[-8:]] == ["reduce", "exchange"] * 4
            sent = sum(size for _, size in rows)
            assert {size for name, size in calls if name == "exchange"} == {sent + 2 * 8}


def faults(rank, world):
    """What becomes of mistakes: an exception in a rule, a missing and a bad gradient, a group."""
    found = {}
    optimizer, params = plain_optimizer("muon", {}, True)
    before = [p.detach().clone() for p in params]
    rule = type(optimizer)._default_rule.fget(optimizer)
    own = rule.orthogonalize

    def broken(*args, **kwargs):
        raise ArithmeticError("no product")

    set_plain_gradients(params, 0)
    if rank == 1:
        rule.orthogonalize = broken
    try:
        optimizer.step()
    except Exception as error:
        found["rule"] = type(error).__name__
    finally:
        rule.orthogonalize = own
    params[2].grad = None if rank == 0 else params[2].grad
    try:
        optimizer.step()
    except Exception as error:
        found["missing"] = str(error)
    optimizer, params = plain_optimizer("galore", {}, True)
    before = [p.detach().clone() for p in params]
    set_plain_gradients(params, 0)
    params[2].grad[0, 0] = math.nan if rank == 2 else params[2].grad[0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    found["moved"] = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    found["skipped"] = dict(optimizer.skipped)
    for name, change in {"copy": copy.deepcopy, "pickle": pickled}.items():
        found[name] = change(optimizer)._process_group is None
    found["keys"] = "process_group" in optimizer.state_dict()["param_groups"][0]
    for name, wrong in {
        "word": "world",
        "square": meshes(4)["square"] if world == 4 else 3,
    }.items():
        try:
            plain_optimizer("muon", {"process_group": wrong}, False)
        except ValueError as error:
            found[name] = str(error)
    mesh, params = meshes(world)["all"], [weight((4, 4))]
    assert METHODS["muon"](params, process_group=mesh)._process_group.size() == world
    try:
        METHODS["muon"](params, process_group=mesh).step_in_backward()
    except ValueError as error:
        found["backward"] = str(error)
    try:
        METHODS["muon"]([{"params": params, "process_group": mesh}])
    except ValueError as error:
        found["group key"] = str(error)
    return found


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def test_faults_of_plain_replicas_are_raised_on_all_ranks_and_the_group_is_kept_nowhere():
    for rank, found in enumerate(pool(4).run(faults)):
        assert found["rule"] == ("ArithmeticError" if rank == 1 else "RankError")
        assert "is there on some ranks only" in found["missing"]
        assert found["moved"] == [i != 2 for i in range(len(PLAIN))]
        assert found["skipped"] == {"layer2.weight": 1}
        assert found["copy"] and found["pickle"] and not found["keys"]
        for name in ("word", "square"):
            assert found[name].startswith("process_group must be a ProcessGroup"), found[name]
        assert "without process_group" in found["backward"]
        assert "process_group is no key of a parameter group" in found["group key"]


EXPERTS = (
    *(Piece((5, 6, 8), (a, b), mesh="square") for a, b in [(1, 0), (2, 0), (0, 1), (0, 0)]),
    Piece((1, 6, 8), (1, 0), mesh="square"),
    Piece((12, 10), 0),
)
"""Stacks that one axis divides between matrices, the other along their rows or columns."""


@pytest.mark.parametrize("method", ["muon", "galore", "hybrid", "aro"])
def test_experts_divided_over_one_axis_are_shared_over_the_other_only(method):
    case = Case(method, EXPERTS, steps=4)
    for found in check(case, 4):
        rows = found["rows"]
        assert rows[3][1:] == ("local", 0)  # whole experts
        if method == "muon":  # at most 3 experts of a rank, of which it owns at most 2
            assert rows[0][1] == "owner"
            assert max(size for _, _, size in rows[:3]) <= 4 * (3 * 6 * 8) // 2 * 2


def failing(rank, world):
    """What every rank says of a rule that fails on rank 0 in the first of its teams."""
    square = meshes(world)["square"]
    weights = [weight((6, 8), i).detach() for i in range(4)]
    dims = [(0, None), (None, 0), (0, 1), (0, None)]
    params = [torch.nn.Parameter(lay(W, square, *d)) for W, d in zip(weights, dims, strict=True)]
    optimizer = METHODS["muon"](params)
    own = type(optimizer)._step_bucket

    def broken(self, plan, bucket, *args):
        if rank == 0 and bucket.unit.positions == (0,):
            raise ArithmeticError("no product")
        return own(self, plan, bucket, *args)

    said = []
    type(optimizer)._step_bucket = broken
    try:
        for _ in range(2):
            for p, W in zip(params, weights, strict=True):
                p.grad = lay(W.clone(), square, *dims[0]).redistribute(square, p.placements)
            try:
                optimizer.step()
            except Exception as error:
                said.append(type(error).__name__)
            else:
                said.append("")
    finally:
        type(optimizer)._step_bucket = own
    return said


def test_a_failure_in_one_team_reaches_all_ranks_of_the_others():
    for rank, said in enumerate(pool(4).run(failing)):
        assert said[0] == ("ArithmeticError" if rank == 0 else "RankError"), (rank, said)
        assert said[1], (rank, said)
