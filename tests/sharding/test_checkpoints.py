"""State of sharded weights: saved on one number of ranks, loaded and continued on another."""

import copy
import time

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import same
from helpers.ranks import mesh_of, pool
from helpers.sharded_checkpoints import (
    WAYS,
    Case,
    build,
    forms_of,
    load,
    on,
    plain_run,
    resume,
    run_straight,
    save_loaded,
    save_trained,
    state_of,
    train,
    weights_of,
)
from torch import nn

from stiefel.kernels import blockwise_scales, dequantize_blocks, quantize_blocks
from stiefel.optimizers import GaLore, Muon

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EVERY = [*METHODS, *PAIRS]
WORLDS = [0, 1, 2, 3, 4]
FAMILIES = [
    *("muon", "muon-normuon", "muon-low-rank", "galore-rotate", "galore-full", "fira"),
    *("frugal-columns", "frugal-randk", "frugal-block", "dctadamw-int8", "trion-l2", "auon-hybrid"),
    *("aro-adam", "rownorm-centred", "spectral", "hybrid", "symmetrystack"),
    *("altlora-plus", "adaprelora", "adamw"),
]
"""One or two methods of every class."""
BITS_OF_ONE_PROCESS = {"muon", "muon-ns5", "muon-plain"}
"""Methods that run on shards and add nothing over ranks; what travels whole has these bits too."""


def skip_what_torch_cannot(method, way):
    """Loading whole state, torch raises KeyError for a number that a fresh optimizer lacks."""
    if way == "full" and method == "frugal-block":
        pytest.skip("the clock of a later block; broadcast_from_rank0 and dcp.load go on")


def check_carried(case, way, worlds, folder, source=2):
    """A checkpoint of one process, loaded on 2 ranks and saved there, is the same everywhere."""
    weights, state, saved = plain_run(case, case.stop)
    found = on(source, save_loaded, case, way, str(folder), weights, saved)
    assert same(found["state"], state)
    for world in worlds:
        assert same(on(world, load, case, way, str(folder))["state"], state), world


def by_turns(names, worlds):
    """Each name with a side that is cut and numbers of ranks; all pairs of these come by turns."""
    for i, name in enumerate(names):
        yield pytest.param(name, i % 2, worlds[i // 2 % len(worlds)], id=name)


@pytest.mark.parametrize("method, dim, worlds", list(by_turns(EVERY, [[0], [3]])))
def test_state_of_every_method_is_carried(method, dim, worlds, tmp_path):
    check_carried(Case(method, dim), "dcp", worlds, tmp_path)


@pytest.mark.parametrize("method", ["galore-rotate", "altlora-plus"])
@pytest.mark.parametrize("way", WAYS)
def test_state_is_carried_every_way(method, way, tmp_path):
    source, worlds = (0, [2, 4]) if way == "torch" else (2, WORLDS)
    check_carried(Case(method), way, worlds, tmp_path, source)


def ways_by_turns(names, ways, count):
    """Each name with some of the ways, so that each of these has as many names."""
    for i, name in enumerate(names):
        for j in range(count):
            way = ways[(i * count + j) % len(ways)]
            worlds = [[0, 3], [1, 4], [0, 4], [1, 3]][(i // 2 + j) % 4]
            yield pytest.param(name, way, (i + j) % 2, worlds, id=f"{name}-{way}")


@pytest.mark.slow
@pytest.mark.parametrize("method, way, dim, worlds", list(ways_by_turns(FAMILIES, [*WAYS], 2)))
def test_state_of_every_class_is_carried_every_way(method, way, dim, worlds, tmp_path):
    skip_what_torch_cannot(method, way)
    source, worlds = (0, [2, 4]) if way == "torch" else (2, worlds)
    check_carried(Case(method, dim), way, worlds, tmp_path, source)


@pytest.mark.parametrize(
    "case",
    [
        Case("muon", 1, torch.bfloat16, {"write": "kahan"}),
        Case("adamw", 0, torch.bfloat16, {"write": "kahan"}),
        Case("adamw", 1, torch.bfloat16),
        Case("adamw", 0, torch.float64),
        Case("galore", 0, torch.bfloat16, {"state_dtype": "bfloat16"}),
        Case("muon", 0, options={"state_dtype": "int8"}, large=True),
        Case("galore", 1, options={"state_dtype": "int8", "rank": 64}, large=True),
        Case("fira", 0, options={"view": "auto", "stagger": True}),
        Case("altlora", 0, torch.bfloat16, {"write": "kahan"}),
    ],
    ids=lambda case: f"{case.method}-{case.dim}-{'-'.join(map(str, case.options.values()))}",
)
@pytest.mark.parametrize("way", ["dcp", "full-broadcast"])
def test_dtypes_codes_and_residuals_are_carried(case, way, tmp_path):
    check_carried(case, way, [0, 2, 3], tmp_path)


# runs that go on --------------------------------------------------------------------------------


def check_close(X, Y):
    """Equal but for sums in another order; low precision, for the last digit of some entries."""
    bound = 3e-5 if X.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(X, Y, rtol=0, atol=bound)


def check_resumed(case, way, worlds, folder):
    """A run that is saved on 2 ranks in the middle of a window ends as one that nobody stopped.

    Returns whether its rules ran on shards.
    """
    weights, state, _ = plain_run(case)
    begun = on(2, save_trained, case, way, str(folder))
    for world in worlds:
        found = on(world, resume, case, way, str(folder), begun["weights"])
        if case.method in BITS_OF_ONE_PROCESS or not (begun["adds"] or found["adds"]):
            assert same([found["weights"], found["state"]], [weights, state]), world
        for name, W in weights.items():
            check_close(found["weights"][name], W)
        if world == 2:
            straight = on(2, run_straight, case)
            assert same(found["weights"], straight["weights"])
            assert same(found["state"], straight["state"])
            assert found["forms"] == straight["forms"]
    return begun["adds"]


@pytest.mark.parametrize("method", ["muon", "galore-rotate", "spectral", "altlora", "adamw"])
def test_a_run_goes_on_with_any_number_of_ranks(method, tmp_path):
    check_resumed(Case(method), "dcp", WORLDS, tmp_path)


@pytest.mark.parametrize("method", ["altlora-plus", "altlora-compact", "adaprelora"])
def test_a_run_of_pairs_on_shards_goes_on_with_any_number_of_ranks(method, tmp_path):
    """A cut along its columns and B along its rows: sums travel, and state lies like factors."""
    assert check_resumed(Case(method, 1), "dcp", [0, 2, 3], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, dim, worlds",
    list(by_turns([*EVERY, "adamw"], [[2], [0], [3], [1], [2], [4]])),
)
def test_every_method_goes_on_with_other_numbers_of_ranks(method, dim, worlds, tmp_path):
    check_resumed(Case(method, dim), "dcp", worlds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, plan", [(x, ("owner", "gather")[i % 2]) for i, x in enumerate(FAMILIES)]
)
def test_plans_do_not_matter_to_a_checkpoint(method, plan, tmp_path):
    """Saved under one plan, continued under another."""
    case, auto = Case(method, options={"plan": plan}), Case(method)
    weights, state, _ = plain_run(case)
    halfway = on(2, save_trained, auto, "dcp", str(tmp_path))["weights"]
    found = on(3, resume, case, "dcp", str(tmp_path), halfway)
    for name, W in weights.items():
        check_close(found["weights"][name], W)
    assert {name: list(x) for name, x in found["state"].items()} == {
        name: list(x) for name, x in state.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, way, dim, worlds",
    list(ways_by_turns(FAMILIES[::-1], [way for way in WAYS if way != "torch"], 1)),
)
def test_every_class_goes_on_after_one_of_the_ways(method, way, dim, worlds, tmp_path):
    skip_what_torch_cannot(method, way)
    check_resumed(Case(method, dim), way, worlds[1:], tmp_path)


@pytest.mark.parametrize("method", ["muon", "fira", "adamw"])
def test_low_precision_weights_go_on(method, tmp_path):
    case = Case(method, dtype=torch.bfloat16, options={"write": "kahan"})
    check_resumed(case, "dcp", [0, 3], tmp_path)


@pytest.mark.parametrize("method", ["galore", "altlora", "muon"])
def test_a_checkpoint_of_one_process_goes_on_over_ranks_and_back(method, tmp_path):
    case = Case(method, options={"plan": "owner"})
    weights, state, _ = plain_run(case)
    halfway, _, saved = plain_run(case, case.stop)
    torch.save(saved, tmp_path / "state.pt")
    for world in (2, 3):
        found = on(world, resume, case, "torch", str(tmp_path), halfway)
        assert same(found["weights"], weights) and same(found["state"], state)


@pytest.mark.parametrize("method", ["frugal-randk", "galore-reset", "muon-kaczmarz"])
def test_a_checkpoint_without_draws_goes_on_by_position(method, tmp_path):
    """Files of before know no other keys of random numbers."""
    case = Case(method, options={"seed": 3} if method != "galore-reset" else {})
    model, optimizer = build(case, 0)
    for group in optimizer.param_groups:
        group["draws"] = "position"
    train(case, model, optimizer, 0, case.stop)
    halfway, saved = weights_of(model), copy.deepcopy(optimizer.state_dict())
    train(case, model, optimizer, case.stop, case.steps)
    for group in saved["param_groups"]:
        del group["draws"]
    torch.save(saved, tmp_path / "state.pt")
    found = on(3, resume, case, "torch", str(tmp_path), halfway)
    assert same(found["weights"], weights_of(model))
    assert same(found["state"], state_of(model, optimizer))


def probed(rank, world, case, probes):
    """Matrices after a run, before whose first step a checkpointer may ask for the state.

    As in torch, the clock of AdamW's parameters goes on then.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = build(case, world)
    before = weights_of(model)
    if probes:
        get_optimizer_state_dict(model, optimizer)
        assert same(weights_of(model), before)
        assert all(X == 0 for x in optimizer.state.values() for X in x.values() if type(X) is int)
        assert all(p in optimizer.state for p in model.parameters())
    train(case, model, optimizer, 0, case.steps)
    weights, state = weights_of(model), state_of(model, optimizer)
    for x in (weights, state):
        x.pop("vector", None)
    return {"weights": weights, "state": state, "forms": forms_of(model, optimizer)}


@pytest.mark.parametrize("method", ["muon", "galore", "aro", "altlora", "frugal-block"])
def test_asking_for_state_before_the_first_step_changes_nothing(method):
    case = Case(method)
    asked, not_asked = (on(2, probed, case, probes) for probes in (True, False))
    assert same(asked["weights"], not_asked["weights"]) and same(asked["state"], not_asked["state"])


# nothing is sent --------------------------------------------------------------------------------


def rank_0_alone(rank, world, case, saved):
    """State is saved, and whole and own state loaded, by one rank while the others do nothing."""
    model, optimizer = build(case, world)
    optimizer.init_state()
    start = time.perf_counter()
    if rank == 0:
        optimizer.state_dict()
        optimizer.load_state_dict(copy.deepcopy(saved))
        _, other = build(case, world)
        other.load_state_dict(optimizer.state_dict())
        optimizer.state_dict()
    seconds = time.perf_counter() - start
    torch.distributed.barrier()
    if rank > 0:
        optimizer.load_state_dict(copy.deepcopy(saved))
    return {"seconds": seconds, "state": state_of(model, optimizer)}


@pytest.mark.parametrize("method", ["muon", "galore-rotate", "adaprelora", "adamw"])
def test_one_rank_saves_and_loads_alone(method):
    case = Case(method)
    _, state, saved = plain_run(case, case.stop)
    found = pool(3).run(rank_0_alone, case, saved)
    assert all(same(x["state"], state) and x["seconds"] < 20 for x in found)


# other layouts ----------------------------------------------------------------------------------


def mesh_like(kind, world):
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "line":
        return mesh_of(world)
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))


def relaid(rank, world, old, new, kinds, saved):
    """State of one layout, loaded into another."""
    _, first = build(old, world, mesh=mesh_like(kinds[0], world))
    first.load_state_dict(copy.deepcopy(saved))
    model, second = build(new, world if kinds[1] != "plain" else 0, mesh=None)
    if kinds[1] == "grid":
        model, second = build(new, world, mesh=mesh_like("grid", world))
    second.load_state_dict(first.state_dict())
    return {"state": state_of(model, second), "forms": forms_of(model, second)}


@pytest.mark.parametrize("method", ["galore-rotate", "dctadamw-int8", "adamw", "adaprelora"])
@pytest.mark.parametrize(
    ("dims", "kinds"),
    [
        ((0, 1), ("line", "line")),
        ((1, 0), ("line", "line")),
        ((1, 1), ("grid", "line")),
        ((0, 0), ("line", "grid")),
        ((1, 0), ("grid", "plain")),
    ],
)
def test_state_of_another_layout_is_redistributed(method, dims, kinds):
    """Rows and columns, meshes of one and two axes, sharded and not; all on columns' shapes."""
    old, new = (Case(method, 1, cut=dim) for dim in dims)
    _, state, saved = plain_run(old, old.stop)
    found = on(4 if "grid" in kinds else 3, relaid, old, new, kinds, saved)
    assert same(found["state"], state)


# eight bits -------------------------------------------------------------------------------------


def flat(entry):
    """State in eight bits as it was once stored: one scale for 256 numbers of the flat tensor."""
    found = dict(entry)
    for key, codes in entry.items():
        scales = entry.get(f"{key}_scale")
        if scales is None:
            continue
        X = dequantize_blocks(codes.unsqueeze(0), scales.unsqueeze(0))
        new = torch.zeros(1, codes.numel(), dtype=codes.dtype)
        new_scales = torch.zeros(1, blockwise_scales(codes.numel()))
        quantize_blocks(X.view(1, -1), new, new_scales)
        found[key], found[f"{key}_scale"] = new.view(codes.shape), new_scales[0]
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_codes_of_the_flat_form_are_coded_anew_and_cut(world, tmp_path):
    case = Case("muon", options={"state_dtype": "int8"}, large=True)
    _, state, saved = plain_run(case, case.stop)
    saved["state"] = {i: flat(entry) for i, entry in saved["state"].items()}
    assert saved["state"][0]["momentum_buffer_scale"].shape == (23,)
    model, optimizer = build(case, 0)
    optimizer.load_state_dict(copy.deepcopy(saved))
    torch.save(saved, tmp_path / "state.pt")
    found = on(world, load, case, "torch", str(tmp_path))["state"]
    assert same(found, state_of(model, optimizer))
    assert found["tall"]["momentum_buffer"].shape == state["tall"]["momentum_buffer"].shape


# refusals ---------------------------------------------------------------------------------------


def held(optimizer):
    """What this rank holds of the state, cloned."""
    return {
        (i, key): (X.to_local() if hasattr(X, "device_mesh") else X).clone()
        for i, entry in enumerate(optimizer.state.values())
        for key, X in entry.items()
        if isinstance(X, torch.Tensor)
    }


def spoilt(kind, rank, X):
    """A state tensor that no rank, or not this one, can load."""
    from torch.distributed.tensor import DTensor, Partial

    if kind == "piece":
        return X.to_local()
    if kind == "partial":
        return DTensor.from_local(torch.zeros(X.shape), X.device_mesh, [Partial()])
    if kind == "integers":
        return X.to(torch.int32)
    if kind == "other shape":
        return torch.cat([X.full_tensor(), X.full_tensor()])
    Y = X.clone()
    if rank == 1:
        Y.to_local()[0] = torch.nan if kind == "nan" else Y.to_local()[1]
    return Y


def refused(rank, world, settings, key, kind):
    """What loading says on this rank, and whether anything has changed."""
    W = nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)))
    model = nn.Module()
    model.W = W
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh_of(world))
    cls, options = settings
    plain = cls([nn.Parameter(W.detach().clone())], **options)
    (p,) = plain.param_groups[0]["params"]
    for _ in range(2):
        p.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
        plain.step()
    optimizer = cls(model.parameters(), **options)
    optimizer.load_state_dict(plain.state_dict())
    saved = optimizer.state_dict()
    saved["state"] = {0: {**saved["state"][0], key: spoilt(kind, rank, saved["state"][0][key])}}
    before, message = held(optimizer), None
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        message = str(error)
    return message, message is None or same(held(optimizer), before)


TOPK = (GaLore, {"rank": 8, "projection": "topk", "update_proj_gap": 2})


@pytest.mark.parametrize(
    ("settings", "key", "kind", "words", "ranks"),
    [
        ((Muon, {}), "momentum_buffer", "piece", "has shape (12, 16)", [0, 1]),
        ((Muon, {}), "momentum_buffer", "partial", "partial sums", [0, 1]),
        ((Muon, {}), "momentum_buffer", "integers", "has dtype torch.int32", [0, 1]),
        ((Muon, {}), "momentum_buffer", "other shape", "has shape (48, 16)", [0, 1]),
        ((Muon, {}), "momentum_buffer", "nan", "is not finite", [1]),
        (TOPK, "index", "twice", "names the same entry twice", [1]),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(settings, key, kind, words, ranks):
    for rank, (message, is_unchanged) in enumerate(pool(2).run(refused, settings, key, kind)):
        assert (words in (message or "")) == (rank in ranks), message
        assert is_unchanged


def replaced(rank, world, case, kind, ranks=(0, 1)):
    """Steps after other code has replaced a state tensor, on some ranks, by another."""
    from torch.distributed.tensor import Replicate

    model, optimizer = build(case, world)
    train(case, model, optimizer, 0, 2)
    p = model.tall
    key = next(k for k, X in optimizer.state[p].items() if isinstance(X, torch.Tensor) and X.ndim)
    X = optimizer.state[p][key]
    whole_X, replicated = X.full_tensor(), X.redistribute(X.device_mesh, [Replicate()])
    others = {"whole": whole_X, "replicated": replicated, "piece": X.to_local(), "bits": X.int()}
    if rank in ranks:
        optimizer.state[p][key] = others[kind]
    before = weights_of(model)
    try:
        train(case, model, optimizer, 2, 4)
    except (ValueError, RuntimeError) as error:
        return {"message": str(error), "same": same(weights_of(model), before)}
    return {"message": None, "weights": weights_of(model), "forms": forms_of(model, optimizer)}


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("whole", "sharded; load it with load_state_dict()"),
        ("piece", "has shape"),
        ("bits", "has dtype torch.int32"),
    ],
)
@pytest.mark.parametrize("method", ["muon", "galore"])
def test_strange_state_in_the_place_of_a_shard_is_refused(method, kind, words, ranks):
    found = pool(2).run(replaced, Case(method, options={"plan": "owner"}), kind, ranks)
    assert all(x["message"] is not None and x["same"] for x in found)
    assert all(words in found[rank]["message"] for rank in ranks)


@pytest.mark.parametrize("method", ["muon", "galore"])
def test_live_state_of_other_placements_is_laid_out_anew(method):
    case = Case(method, steps=4)
    weights, _, _ = plain_run(case)
    found = on(2, replaced, case, "replicated")
    assert found["message"] is None and same(found["weights"], weights)


def test_fresh_state_is_that_of_one_process(tmp_path):
    """``init_state`` on ranks makes what it makes in one process, cut."""
    for method in EVERY:
        model, optimizer = build(Case(method), 0)
        optimizer.init_state()
        found = on(3, initial, Case(method))
        assert same(found["state"], state_of(model, optimizer)), method


def initial(rank, world, case):
    model, optimizer = build(case, world)
    optimizer.init_state()
    return {"state": state_of(model, optimizer), "forms": forms_of(model, optimizer)}


def goes_on_from_torch(rank, world, case):
    """A run of torch's AdamW on shards, and the same one that ours has taken over."""
    runs = []
    for takes_over in (False, True):
        model, ours = build(case, world)
        theirs = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
        train(case, model, theirs, 0, case.stop)
        if takes_over:
            ours.load_state_dict(theirs.state_dict())
        train(case, model, ours if takes_over else theirs, case.stop, case.steps)
        runs.append(weights_of(model))
    return runs


@pytest.mark.parametrize("dim", [0, 1])
def test_ours_goes_on_from_torchs_adamw(dim):
    for theirs, ours in pool(3).run(goes_on_from_torch, Case("adamw", dim)):
        assert same(theirs, ours)
