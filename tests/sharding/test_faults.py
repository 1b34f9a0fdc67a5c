"""What goes wrong on shards goes wrong alike on all ranks, and what is sent is what is promised."""

import contextlib
import copy
import gc
import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.every_class import CLASSES
from helpers.ranks import Pool, pool
from helpers.sharded import (
    SUMMED,
    Case,
    Piece,
    difference,
    lay,
    meshes,
    optimizer_of,
    parameters,
    set_gradients,
    sharded,
    whole,
    whole_state,
)
from helpers.wrapped import recorded
from torch import nn

from stiefel import optimizers

MAIN = [
    *("muon", "muon-normuon", "galore", "fira", "auon", "trion", "dctadamw", "frugal-columns"),
    *("aro", "rownorm", "spectral", "hybrid", "symmetrystack", "altlora", "adaprelora"),
    *("apollo", "sinkgd", "soap", "soapmuon", "muown"),
]
main = pytest.mark.parametrize("method", MAIN)


def pieces(method):
    """Two matrices that are split in two ways, a vector and a plain matrix; or three pairs.

    Two of the pairs run on shards, and one travels.
    """
    if "lora" in method:
        shapes = [(3, 9), (10, 3), (2, 12), (5, 2), (1, 7), (8, 1)]
        return tuple(map(Piece, shapes, (1, 0, 0, 0, 1, 0)))
    return (Piece((9, 6), 0), Piece((6, 9), 1), Piece((7,), 0), Piece((5, 4), None))


def with_values(G, rank_of_value, value):
    """A gradient with one value in the shard of one rank."""
    local = G.to_local() if hasattr(G, "to_local") else G
    if rank_of_value == dist.get_rank() and local.numel():
        local.view(-1)[-1] = value
    return G


def everything(optimizer, params):
    """Whole weights and state, flat."""
    return [
        *(whole(p) for p in params),
        *(x for values in whole_state(optimizer, params) for x in values.values()),
    ]


def far_of(a, b):
    return max([0.0, *(difference(x, y) for x, y in zip(a, b, strict=True))])


def error_of_step(optimizer):
    """Kind, text and cause of what a step raises, or "no error"."""
    try:
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__}"
    return "no error"


# gradients that are not finite --------------------------------------------------------------------


def bad_shard(rank, world, method, nonfinite, at, value):
    """A bad number in one rank's shard of weight ``at`` at the third of five steps."""
    case = Case(method, pieces(method), options={"nonfinite": nonfinite})
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    found = {"error": None, "warned": 0}
    seen = []
    for step in range(case.steps):
        set_gradients(case, params, step, world)
        before = everything(optimizer, params)
        if step == 2:
            with_values(params[at].grad, 1, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                optimizer.step()
            except RuntimeError as error:
                found["error"] = str(error)
        found["warned"] += sum("finite" in str(w.message) for w in caught)
        if step == 2:
            found["same"] = far_of(everything(optimizer, params), before)
        seen.append([whole(p) for p in params])
    found["skipped"] = dict(optimizer.skipped)
    found["clocks"] = [optimizer.state[p].get("step") for p in params]
    found["clocks"] = [float(c) if c is not None else None for c in found["clocks"]]
    if rank == 0:
        found["far"] = far_from_one(case, at, value, seen, nonfinite)
    return found


def far_from_one(case, at, value, seen, nonfinite):
    """Difference to one process that is given the same number."""
    params = parameters(case, 0)
    optimizer = optimizer_of(case, params)
    far = 0.0
    for step in range(case.steps):
        set_gradients(case, params, step, 0)
        if step == 2:
            params[at].grad.view(-1)[-1] = value
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        far = max(far, far_of(seen[step], [whole(p) for p in params]))
    return far


@main
@pytest.mark.parametrize("at", [0, 1])
def test_a_bad_number_in_one_shard_skips_the_weight_on_all_ranks(method, at):
    value = float("nan") if at else float("-inf")
    found = pool(3).run(bad_shard, method, "skip", at, value)
    for x in found:
        assert x["error"] is None
        assert x["warned"] == 1
        assert x["clocks"] == found[0]["clocks"]
        assert x["skipped"] == found[0]["skipped"]
        assert set(x["skipped"].values()) == {1}
    if "lora" not in method:
        assert list(found[0]["skipped"]) == [f"layer{at}.weight"]
    assert found[0]["far"] <= 5e-6


@pytest.mark.parametrize("method", ["muon", "galore", "hybrid"])
def test_a_bad_number_in_one_shard_of_a_vector(method):
    found = pool(2).run(bad_shard, method, "skip", 2, float("nan"))
    assert [list(x["skipped"].items()) for x in found] == [[("layer2.weight", 1)]] * 2
    assert found[0]["far"] <= 5e-6


@main
def test_skip_step_moves_nothing_on_any_rank(method):
    found = pool(2).run(bad_shard, method, "skip_step", 0, float("nan"))
    for x in found:
        assert x["error"] is None
        assert x["same"] == 0.0
        assert x["warned"] == 1
        assert x["skipped"] == found[0]["skipped"]
    assert found[0]["far"] <= 5e-6


@main
def test_raise_raises_on_all_ranks_and_names_the_parameter(method):
    at = MAIN.index(method) % 2
    found = pool(2).run(bad_shard, method, "raise", at, float("inf"))
    for x in found:
        assert x["error"] is not None
        assert x["error"] == found[0]["error"]
        assert x["same"] == 0.0
        if "lora" not in method:
            assert f"layer{at}.weight" in x["error"]
    assert found[0]["far"] <= 5e-6


@pytest.mark.parametrize("method", ["muon", "galore", "aro", "rownorm"])
def test_ignore_looks_at_nothing_and_hangs_nowhere(method):
    """What a NaN does is the method's own business; ranks end, and agree."""
    found = pool(2).outcomes(bad_shard, method, "ignore", 0, float("nan"))
    assert all(x.kind not in ("hung", "died") for x in found)
    assert found[0].kind == found[1].kind
    if found[0].kind is None:
        assert found[0].value["clocks"] == found[1].value["clocks"]
        assert not found[0].value["skipped"]


def zero_shard(rank, world, method):
    """The gradient is zero on one rank alone, from the first step on, where bases are made."""
    case = Case(method, (Piece((8, 6), 0), Piece((6, 8), 1)))
    outs = []
    for number in (world, 0):
        params = parameters(case, number)
        optimizer = optimizer_of(case, params)
        for step in range(case.steps):
            plain = parameters(case, 0)
            set_gradients(case, plain, step, 0)
            plain[0].grad[: 8 // world] = 0
            plain[1].grad[:, 8 // world :] = 0
            for piece, p, q in zip(case.pieces, params, plain, strict=True):
                p.grad = sharded(piece, q.grad, number)
            optimizer.step()
        outs.append(everything(optimizer, params))
    return far_of(*outs)


@pytest.mark.parametrize("method", [m for m in MAIN if "lora" not in m])
def test_a_shard_of_zeros_is_no_zero_gradient(method):
    for far in pool(2).run(zero_shard, method):
        assert far <= 5e-6


# gradients that are missing -----------------------------------------------------------------------


def missing_on_some(rank, world, method, at):
    """The gradient of one weight is missing on the last rank, then the next step is complete."""
    case = Case(method, pieces(method))
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    set_gradients(case, params, 0, world)
    optimizer.step()
    before = everything(optimizer, params)
    set_gradients(case, params, 1, world)
    if rank == world - 1:
        params[at].grad = None
    try:
        optimizer.step()
        text = "no error"
    except (RuntimeError, ValueError) as error:
        text = str(error)
    same = far_of(everything(optimizer, params), before)
    set_gradients(case, params, 1, world)
    optimizer.step()
    return text, same, far_of([whole(p) for p in params], train_whole(case, 2)), type(text).__name__


def train_whole(case, steps):
    """Weights of one process after some steps."""
    params = parameters(case, 0)
    optimizer = optimizer_of(case, params)
    for step in range(steps):
        set_gradients(case, params, step, 0)
        optimizer.step()
    return [p.detach().clone() for p in params]


@main
def test_a_gradient_on_some_ranks_only_raises_on_all(method):
    at, world = MAIN.index(method) % 3, 2 + MAIN.index(method) % 2
    for text, same, far, _ in pool(world).run(missing_on_some, method, at):
        assert "some ranks" in text
        if "lora" not in method:
            assert f"layer{at}.weight" in text
        assert same == 0.0
        assert far <= 5e-6


# exceptions and deaths ----------------------------------------------------------------------------


def raises_in_update(rank, world, method, bad, when, more=()):
    """An exception inside of the rule on some ranks at one step; the next one is as ever."""
    case = Case(method, (*(x for x in pieces(method) if x.dim is not None), *more))
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    for step in range(2):
        set_gradients(case, params, step, world)
        optimizer.step()
    classes = {type(rule) for rule in rules_of(optimizer)}
    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            patch.setattr(cls, when, failing(getattr(cls, when), rank in bad))
        set_gradients(case, params, 2, world)
        text = error_of_step(optimizer)
    set_gradients(case, params, 3, world)
    try:
        optimizer.step()
    except RuntimeError as error:  # weights that no other rank shared have moved on some
        return text, str(error)
    finite = all(bool(whole(p).isfinite().all()) for p in params)
    return text, "finite" if finite else "not finite"


def check_raised(found, bad):
    """All ranks raise in the step, or at the latest in the next one, before anything moves."""
    nexts = {after for _, after in found}
    told_late = any("no error" in text for text, _ in found)
    for rank, (text, _) in enumerate(found):
        if rank in bad:
            assert "told to fail" in text, found
        elif not told_late:
            assert "told to fail" in text or "another rank" in text, found
    if told_late:
        assert nexts.isdisjoint({"finite", "not finite"}), found
    else:  # what asks nothing may have been stepped on other ranks: their clocks have parted then
        assert nexts == {"finite"} or all("load one checkpoint" in x for x in nexts), found


def rules_of(optimizer):
    """The rules of an optimizer's groups, found by their names."""
    from stiefel.optimizers._core.rule import RULE_CLASSES

    found = []
    for group in optimizer.param_groups:
        cls = RULE_CLASSES.get(group["rule"] or group["method"])
        if cls is not None:
            found.append(cls())
    return found


def failing(original, is_bad):
    def fails(self, *args, **kwargs):
        if is_bad:
            raise ArithmeticError("told to fail")
        return original(self, *args, **kwargs)

    return fails


EARLY = (("refresh", 0), ("update", 0), ("update", 1), ("an answer", 0), ("an answer", 1))
"""Where all weights of one rank fail, and after how many steps: nothing tells what others ask."""


def raises_early(rank, world, method, bad):
    """What a rank says of exceptions in the first steps, and of the steps after them."""
    from stiefel.optimizers._driver.rendezvous import ShardReductions

    found = []
    for when, steps in EARLY:
        case = Case(method, tuple(x for x in pieces(method) if x.dim is not None))
        params = parameters(case, world)
        optimizer = optimizer_of(case, params)
        for step in range(steps):
            set_gradients(case, params, step, world)
            optimizer.step()
        homes = {type(rule) for rule in rules_of(optimizer)}
        with pytest.MonkeyPatch.context() as patch:
            if when == "an answer":
                patch.setattr(ShardReductions, "_ask", failing_later(ShardReductions, rank == bad))
            for home in homes if when != "an answer" else ():
                patch.setattr(home, when, failing(getattr(home, when), rank == bad))
            set_gradients(case, params, steps, world)
            text = error_of_step(optimizer)
        set_gradients(case, params, steps + 1, world)
        try:
            optimizer.step()
        except RuntimeError as error:  # told late
            found.append((text, str(error)))
            continue
        finite = all(bool(whole(p).isfinite().all()) for p in params)
        found.append((text, "finite" if finite else "not finite"))
    return found


def failing_later(home, is_bad):
    """The same method, which fails once it has its answer."""
    original = home._ask

    def fails(self, *args):
        answer = original(self, *args)
        if is_bad:
            raise ArithmeticError("told to fail")
        return answer

    return fails


@pytest.mark.parametrize(
    "method",
    ["galore", "fira", "frugal-columns", "dctadamw", "trion", "muon", "hybrid", "rownorm", "auon"],
)
def test_an_exception_of_all_weights_in_the_first_steps_is_raised_on_all_ranks(method):
    bad = MAIN.index(method) % 2
    outcomes = [*zip(*pool(2).run(raises_early, method, bad), strict=True)]
    assert sum("told to fail" in found[bad][0] for found in outcomes) >= 2
    for (when, steps), found in zip(EARLY, outcomes, strict=True):
        if "told to fail" not in found[bad][0]:
            continue
        assert steps == 1 or "another rank" in found[1 - bad][0], (when, found)
        nexts = {after for _, after in found}
        # where the others were through with the step, no rank goes on
        assert nexts == {"finite"} or all("load" in x or "another rank" in x for x in nexts), found


@main
@pytest.mark.parametrize("bad", [(0,), (0, 1)], ids=str)
def test_an_exception_in_a_rule_is_raised_on_all_ranks(method, bad):
    check_raised(pool(2).run(raises_in_update, method, bad, "update"), bad)


def raises_at_first(rank, world, case, always):
    """An exception of the last rank in its very first update, before it has asked for anything."""
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    set_gradients(case, params, 0, world)
    before = [whole(p) for p in params]
    with pytest.MonkeyPatch.context() as patch:
        for cls in {type(rule) for rule in rules_of(optimizer)}:
            update = cls.update

            def fails(self, *members, update=update):
                is_real = bool((members[0].grad != 1).any())  # else it is asked what it will send
                if rank == world - 1 and (always or is_real):
                    raise ArithmeticError("told to fail")
                return update(self, *members)

            patch.setattr(cls, "update", fails)
        text = error_of_step(optimizer)
    return text, far_of([whole(p) for p in params], before)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("method", ["altlora", "adaprelora", "auon", "rownorm", "muon"])
def test_an_exception_before_anything_was_asked_is_raised_on_all_ranks(method, always):
    """Pairs of several ranks r, and weights of several shapes, that all run on shards."""
    shapes, dims = [(8, 6), (5, 6), (1, 4)], (1, 1, 1)
    if "lora" in method:
        shapes, dims = [(4, 24), (12, 4), (3, 8), (40, 3), (1, 4), (4, 1)], (1, 0) * 3
    case = Case(method, tuple(map(Piece, shapes, dims)))
    found = pool(2).run(raises_at_first, case, always, timeout=20.0)
    texts = [text for text, _ in found]
    assert "another rank" in texts[0] and "told to fail" in texts[1], texts
    assert [far for _, far in found] == [0.0, 0.0]


def lacks_memory(rank, world, method):
    """What is raised where one rank cannot make state, what has changed, and how it goes on."""
    from stiefel.optimizers._driver.units import Unit

    case = Case(method, (Piece((9, 6), 0), Piece((6, 9), 1), Piece((4, 6, 5), 0)))
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    set_gradients(case, params, 0, world)
    before, made = [whole(p) for p in params], []
    with pytest.MonkeyPatch.context() as patch:
        allocate = Unit.allocate

        def fails(self, state, rule):
            made.append(self)
            if rank == 1 and len(made) == 2:
                raise MemoryError("told to fail")
            return allocate(self, state, rule)

        patch.setattr(Unit, "allocate", fails)
        text = error_of_step(optimizer)
    far, has_state = far_of([whole(p) for p in params], before), any(optimizer.state.values())
    optimizer.step()
    return text, far, has_state, far_of([whole(p) for p in params], before) > 0


@pytest.mark.parametrize("method", ["muon", "galore", "rownorm", "frugal-columns"])
def test_a_rank_that_cannot_make_state_is_heard_by_all(method):
    found = pool(2).run(lacks_memory, method, timeout=20.0)
    assert "another rank" in found[0][0] and "told to fail" in found[1][0], found
    assert [x[1:] for x in found] == [(0.0, False, True)] * 2


@pytest.mark.parametrize("method", ["muon", "galore", "hybrid", "aro"])
@pytest.mark.parametrize("more", ["experts", "plain"])
def test_an_exception_where_nothing_is_sent_is_raised_on_all_ranks(method, more):
    """A weight that needs no other rank fails on one, and others are to travel after it."""
    piece = Piece((4, 6, 8), 0) if more == "experts" else Piece((5, 4), None)
    check_raised(pool(2).run(raises_in_update, method, (1,), "update", (piece,)), (1,))


def fails_on_the_owner(rank, world, method):
    """The polar factor fails where the whole matrix is."""
    import stiefel.optimizers.muon as home

    case = Case(method, (Piece((9, 6), 0), Piece((6, 9), 1)))
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    set_gradients(case, params, 0, world)
    optimizer.step()
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "polar_factor", failing(home.polar_factor, rank == 0))
        set_gradients(case, params, 1, world)
        try:
            optimizer.step()
            texts.append("no error")
        except Exception as error:
            texts.append(f"{error} {error.__cause__}")
    set_gradients(case, params, 2, world)
    optimizer.step()
    return texts


def test_an_exception_on_the_owner_is_raised_on_all_ranks():
    (own,), (other,) = pool(2).run(fails_on_the_owner, "muon")
    assert "told to fail" in own
    assert "told to fail" in other or "another rank" in other


def killed_before_a_step(rank, world, method):
    """One rank is gone; the others end within the timeout of their process group."""
    case = Case(method, pieces(method))
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    set_gradients(case, params, 0, world)
    optimizer.step()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    set_gradients(case, params, 1, world)
    optimizer.step()


@pytest.mark.parametrize("method", ["muon", "galore", "hybrid", "altlora"])
def test_a_killed_rank_ends_the_others_in_time(method):
    made, start = Pool(3, patience=3.0), time.monotonic()
    try:
        found = made.outcomes(killed_before_a_step, method, timeout=40, grace=25)
    finally:
        made.close()
    assert [x.kind == "died" for x in found] == [False, True, False]
    assert found[0].kind not in (None, "hung", "died"), found[0]
    assert found[2].kind not in (None, "hung", "died"), found[2]
    assert time.monotonic() - start < 25


def stalled_before_a_step(rank, world, method):
    """One rank never comes to the step."""
    case = Case(method, pieces(method))
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    set_gradients(case, params, 0, world)
    if rank == 1:
        time.sleep(12)
        return
    optimizer.step()


def test_a_stalled_rank_ends_the_others_in_time():
    made, start = Pool(2, patience=2.0), time.monotonic()
    try:
        found = made.outcomes(stalled_before_a_step, "muon", timeout=30, grace=0.5)
    finally:
        made.close()
    assert found[0].kind not in (None, "hung", "died"), found[0]
    assert time.monotonic() - start < 12


def loads_on_some_ranks(rank, world, methods):
    """What ranks say of a file that one of them refuses, and how far the steps after it are off."""
    found = []
    for method in methods:
        case = Case(method, pieces(method))
        params = parameters(case, world)
        optimizer = optimizer_of(case, params)
        files = []
        for step in range(3):
            files.append(
                (copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params])
            )
            set_gradients(case, params, step, world)
            optimizer.step()
        first, weights = files[1]
        given = copy.deepcopy(first)
        if rank == 1:
            key = next(k for k in given["state"] if given["state"][k])
            given["state"][key] = {**given["state"][key], "step": None}
        before = everything(optimizer, params)
        texts = []
        for attempt in range(3):
            try:
                if attempt != 1:
                    optimizer.load_state_dict(given if attempt == 0 else first)
                else:
                    optimizer.step()
                texts.append("")
            except (RuntimeError, ValueError) as error:
                texts.append(str(error))
            if attempt == 0 and rank == 1:  # nobody waits for what this rank sends here
                held = optimizer.state_dict()["state"].values()
                assert all(entry["step"] == 3 for entry in held if "step" in entry)
        with torch.no_grad():
            for p, W in zip(params, weights, strict=True):
                p.copy_(W)
        for step in (1, 2):
            set_gradients(case, params, step, world)
            optimizer.step()
        found.append((texts, far_of(before, everything(optimizer, params))))
    return found


def test_a_load_that_one_rank_refuses_stops_all_ranks_at_the_next_step():
    methods = ("galore", "muon", "rownorm", "frugal-columns")
    for own, other in zip(*pool(2).run(loads_on_some_ranks, methods), strict=True):
        (loaded, stopped, again), far = own
        (refused, stopped_too, again_too), far_too = other
        assert (loaded, again, again_too) == ("", "", "") and "step" in refused
        assert "load one checkpoint on all ranks" in stopped and stopped == stopped_too
        assert far == far_too == 0.0


# refusals -----------------------------------------------------------------------------------------


def refused(rank, world, method, kind):
    """The exception of the first step, whether anything changed, and whether init_state agrees."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = meshes(world)["all"]
    options = {"plan": kind} if kind in ("local", "reduce", "nowhere") else {}
    case = Case(method, (Piece((9, 6), 0), Piece((6, 9), 1)), options=options)
    params = parameters(case, world)
    if kind == "partial":
        part = DTensor.from_local(torch.ones(9, 6), mesh, [Partial()], run_check=False)
        params[0] = nn.Parameter(part)
    try:
        optimizer = optimizer_of(case, params)
    except (ValueError, NotImplementedError) as error:
        return "constructor", type(error).__name__, str(error), 0.0, 0
    hold = [p.detach().to_local().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p) if kind == "partial" else p.detach() * 0.5
    outcome = ("nowhere", "none", "no error")
    try:
        optimizer.step()
    except (ValueError, NotImplementedError) as error:
        outcome = ("step", type(error).__name__, str(error))
    same = far_of([p.detach().to_local() for p in params], hold)
    return (*outcome, same, len(optimizer.state))


@pytest.mark.parametrize("method", [m for m in MAIN if "lora" not in m])
def test_partial_sums_are_refused_by_name(method):
    for _, kind, text, same, state in pool(2).run(refused, method, "partial"):
        assert kind == "ValueError"
        assert "layer0.weight" in text
        assert "artial" in text or "redistribute" in text
        assert (same, state) == (0.0, 0)


@pytest.mark.parametrize("method", ["muon", "galore"])
def test_an_unknown_plan_is_refused_at_once(method):
    for where, kind, text, *_ in pool(2).run(refused, method, "nowhere"):
        assert (where, kind) == ("constructor", "ValueError")
        assert "plan" in text


def one_process_with(plan):
    p = nn.Parameter(torch.linspace(-1, 1, 48).view(8, 6))
    optimizer = optimizers.Muon([("layer.weight", p)], plan=plan)
    p.grad = p.detach().sin()
    optimizer.step()
    return p.detach().clone(), [(row.plan, row.bytes_per_step) for row in optimizer.assignment()]


@pytest.mark.parametrize("plan", ["auto", "local", "owner", "reduce", "gather"])
def test_every_plan_is_local_on_one_process(plan):
    W, rows = one_process_with(plan)
    assert rows == [("local", 0)]
    assert torch.equal(W, one_process_with("auto")[0])


def switched(rank, world):
    """SwitchLoRA on shards."""
    mesh = meshes(world)["all"]
    A, B, W = torch.randn(2, 6), torch.zeros(8, 2), torch.randn(8, 6)
    params = [nn.Parameter(lay(X, mesh, 0)) for X in (A, B, W)]
    params[2].requires_grad_(False)
    texts = []
    try:
        optimizer = optimizers.SwitchLoRA([{"params": params, "scale": 2.0}], total_steps=10)
        for p in params[:2]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    except NotImplementedError as error:
        texts.append(str(error))
    return texts


def test_switchlora_is_refused():
    for texts in pool(2).run(switched):
        assert len(texts) == 1
        assert "SwitchLoRA" in texts[0]
        assert "sharded" in texts[0]


# what is sent -------------------------------------------------------------------------------------


TWELVE = (
    *(Piece(s, 0) for s in [(5, 3), (1, 40), (40, 1), (37, 23), (7, 16), (16, 16)]),
    *(Piece(s, 1) for s in [(16, 16), (16, 6), (12, 12), (6, 20), (9, 4), (12, 12)]),
)


def calls_of_steps(rank, world, case, steps):
    """Collectives of each step, with what the assignment promised before any."""
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    promised = [(r.plan, r.bytes_per_step, r.rule) for r in optimizer.assignment()]
    out = []
    state = torch.get_rng_state()
    for step in range(steps):
        set_gradients(case, params, step, world)
        gc.collect()
        with recorded() as calls:
            optimizer.step()
        out.append(list(calls))
    again = [(r.plan, r.bytes_per_step, r.rule) for r in optimizer.assignment()]
    return out, promised, again == promised, torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("polar", ["zolo", "ns5", "auto"])
def test_muon_exchanges_twelve_matrices_twice(world, polar):
    case = Case("muon", TWELVE, options={"polar": polar}, steps=4)
    for steps, promised, unchanged, _ in pool(world).run(calls_of_steps, case, 4):
        assert unchanged
        assert {plan for plan, *_ in promised} == {"owner"}
        for calls in steps[1:]:  # the first may make groups
            kinds = [name for name, _ in calls]
            assert kinds.count("all_reduce") <= 1
            assert sum("all_to_all" in name for name in kinds) <= 2
            assert len(kinds) <= 3, kinds


@main
def test_what_is_sent_is_what_the_assignment_says(method):
    world = 2 + MAIN.index(method) % 2
    """Between refreshes; a word of status for each pair of ranks and exchange is not counted."""
    case = Case(method, pieces(method), steps=5)
    found = pool(world).run(calls_of_steps, case, 5)
    for steps, promised, unchanged, rng in found:
        assert rng
        assert unchanged
        assert all(plan != "gather" for plan, *_ in promised)
        assert all(sent == 0 for plan, sent, _ in promised if plan == "local")
        total = sum(sent for _, sent, _ in promised)
        ordinary = steps[1]
        sent = sum(size for name, size in ordinary if "all_to_all" in name)
        exchanges = sum("all_to_all" in name for name, _ in ordinary)
        status = 16 * exchanges * (world - 1)
        if method in SUMMED:
            assert sent - status <= total  # sums are in the promise too
        else:
            assert total <= sent <= total + status


def rng_of_steps(rank, world, method):
    """Whether steps with refreshes leave the global generators as they were."""
    import random

    import numpy

    case = Case(method, pieces(method))
    params = parameters(case, world)
    optimizer = optimizer_of(case, params)
    torch.manual_seed(rank)
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    for step in range(case.steps):
        set_gradients(case, params, step, world)
        optimizer.step()
    after = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    return torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("method", ["frugal-randk", "frugal-random", "galore", "muon-low-rank"])
def test_no_step_touches_the_global_generators(method):
    assert pool(2).run(rng_of_steps, method) == [True, True]


def test_main_covers_every_class():
    lower = {cls.__name__.lower() for cls in CLASSES} - {"switchlora"}
    assert lower <= {m.split("-")[0] for m in MAIN}
