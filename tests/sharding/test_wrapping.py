"""Optimizers of models under ``fully_shard``: built after and before, and what users do around."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.distributed as dist
from helpers.covering import does_all
from helpers.ranks import pool
from helpers.sharded import difference, lay, meshes, whole
from helpers.wrapped import (
    BY_NAME,
    NAMES,
    OPTIONS,
    Net,
    Twin,
    backward,
    bound_of,
    made,
    net,
    recorded,
    wrap,
)
from torch import nn

from stiefel import optimizers

every = pytest.mark.parametrize("name", NAMES)
typical = pytest.mark.parametrize("name", ["Muon", "GaLore", "ARO", "Hybrid", "AltLoRA"])


def trained(rank, world, name, steps=3, dtype="float32", accumulate=1, wrapping=None, options=None):
    """Training beside a twin: differences of weights and of state, and whether weights moved."""
    model = net(name, getattr(torch, dtype))
    start = copy.deepcopy(model)
    twin = Twin(model, lambda m: made(name, m, **(options or {})))
    wrap(model, world, **policy(wrapping or {}))
    optimizer = made(name, model, **(options or {}))
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            backward(model, accumulate * step + part, rank)
        twin.step(model)
        optimizer.step()
    moved = max(
        difference(whole(p), q) for p, q in zip(model.parameters(), start.parameters(), strict=True)
    )
    return twin.far(model), twin.state_far(model, optimizer), moved


def policy(wrapping):
    """Options of ``fully_shard`` from plain values."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    wrapping = dict(wrapping)
    if "param_dtype" in wrapping:
        dtypes = {k: getattr(torch, wrapping.pop(k)) for k in ("param_dtype", "reduce_dtype")}
        wrapping["mp_policy"] = MixedPrecisionPolicy(**dtypes)
    if wrapping.pop("offload", False):
        wrapping["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    return wrapping


def check_trained(found, bound):
    for far, state_far, moved in found:
        assert far <= bound
        assert state_far <= bound
        assert moved > 1e-3


SLOW = pytest.mark.slow


def worlds():
    """Every class on 2 ranks, and by turns on 3 or 4."""
    yield from ((name, 2) for name in NAMES)
    for i, name in enumerate(NAMES):
        for world in (3, 4) if does_all() else (3 + i % 2,):
            yield pytest.param(name, world, marks=SLOW)


@pytest.mark.parametrize("name, world", list(worlds()))
def test_a_model_that_was_wrapped_before(name, world):
    check_trained(pool(world).run(trained, name), bound_of(name))


WRAPPINGS = {
    "low precision": {"param_dtype": "bfloat16", "reduce_dtype": "float32"},
    "kept unsharded": {"reshard_after_forward": False},
    "offloaded": {"offload": True},
}


@typical
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_options_of_fully_shard(name, wrapping):
    found = pool(2).run(trained, name, 3, "float32", 1, WRAPPINGS[wrapping])
    check_trained(found, bound_of(name))


@typical
def test_micro_batches_accumulate(name):
    check_trained(pool(2).run(trained, name, 3, "float32", 2), bound_of(name))


@every
def test_a_model_of_bfloat16(name):
    # the last bit of a sum turns one rounding of a weight in some hundreds
    check_trained(pool(2).run(trained, name, 3, "bfloat16"), 2e-2 if bound_of(name) else 0.0)


def unsynchronized(rank, world, name):
    """A step before gradients are synchronized does nothing; the one after is that of the twin."""
    model = net(name)
    twin = Twin(model, lambda m: made(name, m))
    wrap(model, world)
    optimizer = made(name, model)
    model.set_requires_gradient_sync(False)
    backward(model, 0, rank)
    before = [whole(p) for p in model.parameters()]
    optimizer.step()
    still = all(torch.equal(x, whole(p)) for x, p in zip(before, model.parameters(), strict=True))
    model.set_requires_gradient_sync(True)
    backward(model, 1, rank)
    twin.step(model)
    optimizer.step()
    return still, twin.far(model)


@typical
def test_a_step_without_synchronized_gradients_does_nothing(name):
    for still, far in pool(2).run(unsynchronized, name):
        assert still
        assert far <= bound_of(name)


# built before -------------------------------------------------------------------------------------


def forms(name, form, model):
    """What a user passes before the model is wrapped, and the keywords."""
    if form == "model":
        return model, {}
    if form == "named":
        return list(model.named_parameters()), {"scale": 2.0} if "LoRA" in name else {}
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}], {"model": model}


def built(name, form, model):
    params, options = forms(name, form, model)
    return made(name, params, **options)


def swapped(rank, world, name, form, between):
    """As accelerate does: placeholders, wrapping, then lists of the new parameters."""
    model = net(name)
    twin = Twin(model, lambda m: built(name, form, m))
    optimizer = built(name, form, model)
    old = [weakref.ref(p) for p in model.parameters() if p.requires_grad]
    names = {id(p): n for n, p in model.named_parameters()}
    places = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
    p = None
    if between == "repr":
        repr(optimizer)
    wrap(model, world)
    new = dict(model.named_parameters())
    for group, listed in zip(optimizer.param_groups, places, strict=True):
        group["params"] = [new[n] for n in listed]
    if between == "reload":
        optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    alive_before = sum(ref() is not None for ref in old)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, rank)
        twin.step(model)
        optimizer.step()
    gc.collect()
    alive = sum(ref() is not None for ref in old)
    return twin.far(model), twin.state_far(model, optimizer), alive_before, alive


@every
@pytest.mark.parametrize("form", ["model", "named", "groups"])
def test_new_lists_are_set_after_the_model_is_wrapped(name, form):
    if form != "model" and name not in ("Muon", "GaLore", "Hybrid", "AltLoRA"):
        pytest.skip("forms are read alike by all classes")
    if "LoRA" in name and form == "groups":
        pytest.skip("a group of pairs is made by lora_param_groups")
    for far, state_far, alive_before, alive in pool(2).run(swapped, name, form, None):
        assert far <= bound_of(name)
        assert state_far <= bound_of(name)
        assert (alive_before, alive) == (0, 0)


@typical
@pytest.mark.parametrize("between", ["repr", "reload"])
def test_wrappers_that_look_at_the_optimizer_in_between(name, between):
    for far, state_far, *_ in pool(2).run(swapped, name, "model", between):
        assert far <= bound_of(name)
        assert state_far <= bound_of(name)


def not_swapped(rank, world, name, form):
    """The error of the first step, and what it left of the model and the state."""
    model = net(name)
    optimizer = built(name, form, model)
    wrap(model, world)
    backward(model, 0, rank)
    before = [whole(p) for p in model.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        text = str(error)
    else:
        text = "no error"
    same = all(torch.equal(x, whole(p)) for x, p in zip(before, model.parameters(), strict=True))
    return text, same, len(optimizer.state)


@typical
@pytest.mark.parametrize("form", ["model", "groups"])
def test_parameters_of_before_the_wrapping_are_refused(name, form):
    if "LoRA" in name and form == "groups":
        pytest.skip("a group of pairs is made by lora_param_groups")
    for text, same, state in pool(2).run(not_swapped, name, form):
        assert "fully_shard" in text
        assert same
        assert state == 0


def swapped_with_state(rank, world, name):
    """State that was made before wrapping belongs to no parameter afterwards."""
    model = net(name)
    optimizer = made(name, model)
    optimizer.init_state()
    names = [n for n, _ in model.named_parameters()]
    listed = {id(p): n for n, p in zip(names, model.parameters(), strict=True)}
    places = [[listed[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    wrap(model, world)
    new = dict(model.named_parameters())
    for group, place in zip(optimizer.param_groups, places, strict=True):
        group["params"] = [new[n] for n in place]
    backward(model, 0, rank)
    before, count = [whole(p) for p in model.parameters()], len(optimizer.state)
    try:
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        text = str(error)
    else:
        text = "no error"
    same = all(torch.equal(x, whole(p)) for x, p in zip(before, model.parameters(), strict=True))
    return text, same, len(optimizer.state) == count


@every
def test_state_of_before_the_wrapping_is_not_dropped_in_silence(name):
    for text, same, kept in pool(2).run(swapped_with_state, name):
        assert "init_state" in text
        assert same
        assert kept


# groups -------------------------------------------------------------------------------------------


def grouped(rank, world, name, how):
    """Groups as trainers make them, beside a twin with the same ones."""
    model = net(name)
    model.norm = nn.LayerNorm(8)  # stays plain, and has a gradient of its own below
    split = lambda m: groups_of(m, how)  # noqa: E731
    twin = Twin(model, lambda m: made(name, split(m)))
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=meshes(world)["all"])
    for layer in (model.tok_embeddings, model.lm_head):
        fully_shard(layer, mesh=meshes(world)["b" if world == 4 else "all"])
    optimizer = made(name, split(model))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, rank)
        for p in model.norm.parameters():
            p.grad = torch.linspace(-1, 1, 8).mul(step + 1).cos()
        if world == 4:  # the embedding's two halves of the world saw other batches
            for layer in (model.tok_embeddings, model.lm_head):
                average_halves(layer.weight.grad)
        twin.step(model)
        optimizer.step()
    return twin.far(model), twin.state_far(model, optimizer), frozen


def average_halves(G):
    local = G.to_local()
    dist.all_reduce(local, group=meshes(4)["a"].get_group())
    local /= 2


def groups_of(model, how):
    named = list(model.named_parameters())
    inner = lambda n: n.startswith("layers")  # noqa: E731
    if how == "one per mesh":
        return [
            {"params": [(n, p) for n, p in named if inner(n)]},
            {"params": [(n, p) for n, p in named if n.startswith(("tok", "lm"))]},
            {"params": [(n, p) for n, p in named if n.startswith("norm")]},
        ]
    if how == "empty":
        params = [p for _, p in named]
        return [{"params": []}, {"params": params}, {"params": [], "lr": 0.1}]
    return [{"params": named}]


@pytest.mark.parametrize("how", ["one", "one per mesh", "empty"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["Muon", "GaLore", "ARO", "Hybrid"])
def test_groups_of_trainers(name, world, how):
    for far, state_far, _ in pool(world).run(grouped, name, how):
        assert far <= bound_of(name)
        assert state_far <= bound_of(name)


def partly_frozen(rank, world, name):
    """A frozen block; it is thawed in the middle."""
    model = net(name)
    first = list(model.layers[0].parameters())
    was = [p.requires_grad for p in first]
    for p in first:
        p.requires_grad_(False)
    twin = Twin(model, lambda m: made(name, m))
    wrap(model, world)
    optimizer = made(name, model)
    for step in range(4):
        if step == 2:
            for m in (model, twin.model):
                for p, value in zip(m.layers[0].parameters(), was, strict=True):
                    p.requires_grad_(value)
        optimizer.zero_grad()
        backward(model, step, rank)
        twin.step(model)
        optimizer.step()
    return twin.far(model), twin.state_far(model, optimizer)


@every
def test_frozen_weights_stay_until_they_are_thawed(name):
    for far, state_far in pool(2).run(partly_frozen, name):
        assert far <= bound_of(name)
        assert state_far <= bound_of(name)


# what communicates --------------------------------------------------------------------------------


def alone(rank, world, name):
    """Collectives of what rank 0 does alone, before a step and after it."""
    model = wrap(net(name), world)
    found, texts = [], []
    with recorded() as calls:
        optimizer = made(name, model)
        found.append(list(calls))
    for step in range(2):
        if rank == 0:
            with recorded() as calls:
                texts.append(repr(optimizer.assignment()))
                repr(optimizer)
                dict(optimizer.skipped)
                copied = optimizer.state_dict()
                str(optimizers.memory_report(model, BY_NAME[name], **OPTIONS.get(name, {})))
                found.append(list(calls))
            del copied
        optimizer.zero_grad()
        backward(model, step, rank)
        optimizer.step()
    if rank == 0:
        with recorded() as calls:
            saved = optimizer.state_dict()
            texts.append(repr(optimizer.assignment()))
            found.append(list(calls))
        assert saved["state"]
    with recorded() as calls:
        made(name, model).init_state()
        found.append(list(calls))
    return found, texts


@every
def test_looking_communicates_nothing(name):
    found, texts = pool(2).run(alone, name)[0]
    # making state may flatten a mesh, never send
    assert found == [[]] * len(found)
    assert texts[0] == texts[-1]


def spied_upon(rank, world):
    """What the recorder sees of a sum, of a DTensor that is made whole, and of its own bytes."""
    W = lay(torch.ones(4, 4), meshes(world)["all"], 0)
    out = torch.zeros(3)
    sizes = [1, 2] if rank == 0 else [2, 1]
    with recorded() as calls:
        dist.all_reduce(torch.ones(2))
        W.full_tensor()
        dist.all_to_all_single(out, torch.ones(3), [1, 2] if rank == 0 else [2, 1], sizes)
    return calls


def test_the_recorder_sees_every_collective():
    for calls in pool(2).run(spied_upon):
        assert [name.rsplit(".")[0] for name, _ in calls] == [
            "all_reduce",
            "_c10d_functional",
            "all_to_all_single",
        ]
        assert "all_gather" in calls[1][0]
        assert calls[2][1] == 8  # two numbers go to the other rank


def copied(rank, world, name):
    """A deep copy and a pickle of an optimizer on shards go on as the optimizer."""
    from torch.distributed.tensor import DTensor

    draw, mesh = torch.Generator().manual_seed(0), meshes(world)["all"]
    params = [nn.Parameter(lay(torch.randn(6, 4, generator=draw), mesh, 0)) for _ in range(2)]
    optimizer = made(name, [(f"layer{i}.weight", p) for i, p in enumerate(params)])

    def step(opt):
        flat = [p for group in opt.param_groups for p in group["params"]]
        for i, p in enumerate(flat):
            G = torch.linspace(-1, 1, 24).mul(i + 1).sin().view(6, 4)
            p.grad = lay(G, mesh, 0)
        opt.step()
        return [whole(p) for p in flat]

    step(optimizer)
    twin = copy.deepcopy(optimizer)
    a, b = step(optimizer), step(twin)
    assert all(isinstance(p, DTensor) for p in twin.param_groups[0]["params"])
    return [difference(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("name", ["Muon", "GaLore", "Hybrid"])
def test_a_deep_copy_goes_on_alike(name):
    for far in pool(2).run(copied, name):
        assert far == [0.0, 0.0]


def in_a_file(rank, world, name):
    """``torch.save`` of ``state_dict`` on every rank; a fresh optimizer goes on from it."""
    model = wrap(net(name), world)
    optimizer = made(name, model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, rank)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    weights = [whole(p) for p in model.parameters()]
    other = net(name)
    for p, W in zip(other.parameters(), weights, strict=True):
        p.data.copy_(W)
    wrap(other, world)
    second = made(name, other)
    second.load_state_dict(torch.load(file, weights_only=False))
    for m, o in ((model, optimizer), (other, second)):
        o.zero_grad()
        backward(m, 3, rank)
        o.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return [difference(whole(q), whole(p)) for p, q in pairs]


@every
def test_a_rank_saves_its_shards_and_goes_on(name):
    for far in pool(2).run(in_a_file, name):
        assert set(far) == {0.0}


def test_the_net_is_what_the_tests_say():
    model = Net()
    assert {p.ndim for p in model.parameters()} == {1, 2}
