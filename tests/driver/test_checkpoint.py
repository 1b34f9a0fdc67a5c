"""Saving, loading, copies: dtypes, bits, and the refusal of what does not fit."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.methods import METHODS
from helpers.problems import gradients, run, same, tensors, weight
from helpers.rules import FoldRule, PairRule, PickRule, WindowRule, driver
from helpers.shapes import SQUARE, TALL, WIDE
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from stiefel.optimizers import AuON, Dense, GaLore, Muon, Rule, Slot, StackedOptimizer

every_method = pytest.mark.parametrize("method", METHODS)
SHAPES = [TALL, TALL, WIDE, (4,)]


def build(method, dtype=torch.float32, **options):
    params = [weight(shape, k, dtype) for k, shape in enumerate(SHAPES)]
    return params, METHODS[method](params, **options)


def series(steps=9):
    grads = [
        gradients(shape if len(shape) > 1 else (*shape, 1), steps, k)
        for k, shape in enumerate(SHAPES)
    ]
    return [*grads[:3], [G.view(-1) for G in grads[3]]]


def by_file(optimizer, fresh):
    fresh.load_state_dict(through_a_file(optimizer.state_dict(), map_location="cpu"))
    return fresh


def copied(make):
    def way(optimizer, fresh):
        twin = make(optimizer)
        for group, new in zip(twin.param_groups, fresh.param_groups, strict=True):
            for p, q in zip(group["params"], new["params"], strict=True):
                assert torch.equal(p, q)
        return twin

    return way


WAYS = {
    "file": by_file,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda optimizer: pickle.loads(pickle.dumps(optimizer))),
    "copy": copied(copy.copy),
}


@pytest.mark.covering
@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [2, 4])
def test_resume_is_bit_identical(method, dtype, way, stop):
    """Across refreshes, in mid-window, with a gradient missing on either side."""
    grads = series()
    grads[1][1] = grads[0][6] = None
    params, straight = build(method, dtype)
    run(straight, params, grads)
    first_params, first = build(method, dtype)
    run(first, first_params, [s[:stop] for s in grads])
    fresh_params, fresh = build(method, dtype)
    for p, q in zip(fresh_params, first_params, strict=True):
        p.data.copy_(q.data)
    second = WAYS[way](first, fresh)
    live = [p for group in second.param_groups for p in group["params"]]
    run(second, live, [s[stop:] for s in grads])
    assert same([p.detach() for p in params], [p.detach() for p in live])
    assert same(tensors(straight), tensors(second))


@pytest.mark.parametrize("rule", [PairRule(), WindowRule(), FoldRule(), PickRule(gap=3)])
def test_resume_of_rules_of_every_kind(rule):
    shapes = [(3, 8), (6, 3), (3, 8), (6, 3)]
    grads = [gradients(shape, 7, k) for k, shape in enumerate(shapes)]

    def make():
        params = [weight(shape, k) for k, shape in enumerate(shapes)]
        return params, driver(rule)(params)

    params, straight = make()
    run(straight, params, grads)
    first_params, first = make()
    run(first, first_params, [s[:3] for s in grads])
    second_params, second = make()
    for p, q in zip(second_params, first_params, strict=True):
        p.data.copy_(q.data)
    by_file(first, second)
    run(second, second_params, [s[3:] for s in grads])
    assert same([p.detach() for p in params], [p.detach() for p in second_params])
    assert same(tensors(straight), tensors(second))


@pytest.mark.covering
@pytest.mark.parametrize(
    "state_dtype, method",
    # the integer state of pick has its own test below
    [
        (x, name)
        for x in (None, "bfloat16")
        for name in METHODS
        if (x, name) != ("bfloat16", "pick")
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_survive_loading(method, dtype, state_dtype):
    params, optimizer = build(method, dtype, state_dtype=state_dtype)
    run(optimizer, params, [s[:3] for s in series()])
    _, fresh = build(method, dtype, state_dtype=state_dtype)
    by_file(optimizer, fresh)
    assert same(tensors(optimizer), tensors(fresh))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices_survive_above_what_bfloat16_and_float32_can_count(dtype):
    p = nn.Parameter(torch.zeros(2, 300, dtype=dtype))
    optimizer = driver(PickRule(count=4))([p])
    optimizer.init_state()
    wanted = torch.tensor([257, 299, 2**24 + 1, 2**31 - 1], dtype=torch.int32)
    optimizer.state[p]["index"].copy_(wanted)
    fresh = driver(PickRule(count=4))([nn.Parameter(p.detach().clone())])
    by_file(optimizer, fresh)
    (state,) = fresh.state.values()
    assert torch.equal(state["index"], wanted) and state["index"].dtype == torch.int32


@every_method
def test_state_is_tensors_and_numbers_under_readable_keys(method):
    params, optimizer = build(method)
    run(optimizer, params, series(2))
    for entry in optimizer.state_dict()["state"].values():
        for key, value in entry.items():
            assert isinstance(key, str) and isinstance(value, (torch.Tensor, int))
    for group in optimizer.state_dict()["param_groups"]:
        assert "params" in group and all(isinstance(i, int) for i in group["params"])


@every_method
def test_loading_does_not_change_what_was_given(method):
    params, optimizer = build(method)
    run(optimizer, params, series(3))
    saved = through_a_file(optimizer.state_dict(), map_location="cpu")
    kept = copy.deepcopy(saved)
    _, fresh = build(method)
    fresh.load_state_dict(saved)
    assert same(saved["param_groups"], kept["param_groups"]) and same(saved["state"], kept["state"])


@every_method
def test_every_key_may_be_missing_in_an_older_checkpoint(method):
    params, optimizer = build(method)
    run(optimizer, params, series(3))
    saved, rest = optimizer.state_dict(), series(4)

    def goes_on(state_dict):
        fresh_params, fresh = build(method)
        for p, q in zip(fresh_params, params, strict=True):
            p.data.copy_(q.data)
        fresh.load_state_dict(state_dict)
        return run(fresh, fresh_params, rest)[-1]

    whole = goes_on(copy.deepcopy(saved))
    for key in optimizer.param_groups[0]:
        if key in ("params", "param_names"):
            continue
        if key == "eps" and type(optimizer) is AuON:
            continue  # a file without it means 1e-7, see test_auon.py
        if key == "row_eps":
            continue  # a file without it means 1e-8, see test_rownorm.py
        older = copy.deepcopy(saved)
        for group in older["param_groups"]:
            group.pop(key, None)  # groups of other rules have other keys
        assert same(goes_on(older), whole), key


@every_method
def test_weights_of_another_dtype_keep_the_states_precision(method):
    params, optimizer = build(method, torch.float32)
    run(optimizer, params, series(3))
    narrow_params, narrow = build(method, torch.bfloat16)
    narrow.load_state_dict(through_a_file(optimizer.state_dict(), map_location="cpu"))
    own = [k for k in tensors(narrow) if k[0] < 3]
    assert all(same(tensors(narrow)[k], tensors(optimizer)[k]) for k in own)
    run(narrow, narrow_params, series(2))


# Refusals -----------------------------------------------------------------------------------------


def spoiled():
    def change(key, edit):
        def apply(saved):
            edit(saved["state"][0])
            return saved

        return key, apply

    def drop(entry):
        del entry["basis"]

    return [
        ("no dict", lambda saved: [1, 2], "'state' and 'param_groups'"),
        ("no state", lambda saved: {"param_groups": saved["param_groups"]}, "'state' and"),
        ("fewer groups", lambda saved: {**saved, "param_groups": []}, "different number of param"),
        ("other sizes", lambda saved: {**saved, "param_groups": [
            {**saved["param_groups"][0], "params": [0]}]}, "doesn't match the size"),
        (*change("shape", lambda e: e.update(basis=torch.zeros(5, 5))), "has shape"),
        (*change("object", lambda e: e.update(basis=object())), "must be a tensor"),
        (*change("unknown", lambda e: e.update(projector=torch.zeros(1))), "holds 'projector'"),
        (*change("missing", drop), "lacks 'basis'"),
        ("vector's shape", lambda saved: {**saved, "state": {**saved["state"], 3: {
            "step": torch.tensor(3.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}}},
         "has shape"),
        ("entry", lambda saved: {**saved, "state": {**saved["state"], 0: [1]}}, "must be a dict"),
        ("vector", lambda saved: {**saved, "state": {**saved["state"], 3: {"basis": 1}}},
         "which AdamW does not know"),
        ("setting", lambda saved: {**saved, "param_groups": [
            {**saved["param_groups"][0], "proj_type": "middle"}]}, "proj_type"),
        ("rule", lambda saved: {**saved, "param_groups": [
            {**saved["param_groups"][0], "rule": "Adagrad"}]}, "group key 'rule'"),
        ("rank", lambda saved: {**saved, "param_groups": [
            {**saved["param_groups"][0], "rank": 2}]}, "has shape"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", [case[0] for case in spoiled()])
def test_a_checkpoint_that_does_not_fit_changes_nothing(case):
    _, spoil, text = next(c for c in spoiled() if c[0] == case)
    params, optimizer = build("galore")
    run(optimizer, params, series(3))
    bad = spoil(copy.deepcopy(optimizer.state_dict()))
    before, groups = tensors(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    weights = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(bad)
    assert same(before, tensors(optimizer)) and same(weights, [p.detach() for p in params])
    assert same(groups, optimizer.state_dict()["param_groups"])
    twin_params, twin = build("galore")
    run(twin, twin_params, series(3))
    rest = [s[3:] for s in series(5)]
    assert same(run(optimizer, params, rest), run(twin, twin_params, rest))


def test_another_methods_checkpoint_is_refused_by_name():
    params, galore = build("galore")
    run(galore, params, series(2))
    _, muon = build("muon")
    with pytest.raises(ValueError, match="checkpoint was saved by GaLore"):
        muon.load_state_dict(galore.state_dict())
    adam = torch.optim.AdamW([weight(TALL)])
    run(adam, adam.param_groups[0]["params"], [gradients(TALL, 2)])
    with pytest.raises(ValueError, match="holds 'exp_avg' for parameter 0 of shape"):
        Muon([weight(TALL)]).load_state_dict(adam.state_dict())


def test_adamws_own_checkpoint_loads_into_an_adamw_group():
    p, q = weight(TALL), weight(TALL)
    theirs = torch.optim.AdamW([p], lr=0.01, weight_decay=0.1)
    run(theirs, [p], [gradients(TALL, 3)])
    q.data.copy_(p.data)
    ours = Muon([{"params": [q], "rule": "adamw"}], adamw_betas=(0.9, 0.999))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    rest = [gradients(TALL, 6)[3:]]
    assert same(run(theirs, [p], rest), run(ours, [q], rest))


def test_hooks_of_the_user_see_the_true_state_around_a_load():
    params, optimizer = build("galore", torch.bfloat16)
    run(optimizer, params, series(3))
    _, fresh = build("galore", torch.bfloat16)
    seen = []
    fresh.register_load_state_dict_pre_hook(lambda o, saved: seen.append("pre"))
    fresh.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]["exp_avg"].dtype)
    )
    fresh.register_load_state_dict_pre_hook(lambda o, saved: {**saved, "extra": 1})
    fresh.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", torch.float32]
    assert len(fresh._optimizer_load_state_dict_pre_hooks) == 2
    assert len(fresh._optimizer_load_state_dict_post_hooks) == 1


# Copies -------------------------------------------------------------------------------------------


def test_public_attributes_survive_deepcopy_and_pickle():
    def public(optimizer):
        return {key for key in vars(optimizer) if not key.startswith("_")}

    params, optimizer = build("galore")
    run(optimizer, params, series(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert public(twin) == public(optimizer) and type(twin) is GaLore
        assert str(twin.assignment()) == str(optimizer.assignment())


def test_module_routing_survives_a_copy_and_a_load():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 5))
    optimizer = Muon(net)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert str(twin.assignment()) == str(optimizer.assignment())
    fresh = Muon(copy.deepcopy(net))
    fresh.load_state_dict(optimizer.state_dict())
    assert str(fresh.assignment()) == str(optimizer.assignment())


# Distributed checkpoint, one process --------------------------------------------------------------


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)).to(
        dtype
    )


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(4, 6, generator=draw).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()


OPTIONS = [
    StateDictOptions(),
    StateDictOptions(full_state_dict=True, cpu_offload=True),
    StateDictOptions(flatten_optimizer_state_dict=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "full", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [
    lambda net: Muon(net, lr=0.01),
    lambda net: GaLore(net.named_parameters(), lr=0.01, rank=2, update_proj_gap=3),
    lambda net: GaLore(net.parameters(), lr=0.01, rank=2, update_proj_gap=3),
])  # fmt: skip
def test_distributed_checkpoint_round_trip(make, dtype, options):
    straight, net = network(dtype), network(dtype)
    optimizer = make(straight)
    train(straight, optimizer, 7)
    first = make(net)
    train(net, first, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(net, first, options=options))
    fresh = network(dtype)
    fresh.load_state_dict(net.state_dict())
    second = make(fresh)
    set_optimizer_state_dict(fresh, second, saved, options=options)
    train(fresh, second, 3, start=4)
    assert same(dict(straight.state_dict()), dict(fresh.state_dict()))


@pytest.mark.parametrize("cls", [Muon, GaLore])
def test_asking_for_a_checkpoint_before_the_first_step_changes_no_training(cls):
    # matrices only: in a probe the clock of AdamW's parameters goes on, as torch's does
    a, b = (nn.Sequential(*[m for m in network() if isinstance(m, nn.Linear)]) for _ in range(2))
    for module in (*a, *b):
        module.bias.requires_grad_(False)
    first, second = cls(a, lr=0.01), cls(b, lr=0.01)
    get_optimizer_state_dict(a, first)
    assert same(dict(a.state_dict()), dict(b.state_dict()))
    for net, optimizer in ((a, first), (b, second)):
        train(net, optimizer, 4)
    assert same(dict(a.state_dict()), dict(b.state_dict()))


def test_skipped_survives_nothing_but_counts_again():
    p = weight(SQUARE)
    optimizer = METHODS["muon"]([p])
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.skipped == {0: 1} and copy.deepcopy(optimizer).skipped == {}
    assert isinstance(optimizer, StackedOptimizer)


def test_pools_stay_on_the_host_through_a_load():
    @dataclass(frozen=True)
    class PoolRule(Rule):
        def state(self, m, n):
            return {"pool": Slot("mn", device="cpu"), "near": Slot("mn")}

        def update(self, w):
            return w.step(Dense(w.grad.clone()))

    p = nn.Parameter(torch.zeros(3, 4, device="meta"))
    optimizer = StackedOptimizer([p], PoolRule(), 0.1)
    optimizer.init_state()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["pool"].device.type == "cpu"
    assert optimizer.state[p]["near"].device.type == "meta"
