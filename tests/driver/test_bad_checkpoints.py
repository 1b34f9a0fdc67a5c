"""A checkpoint that is damaged anywhere is refused by one sentence, and nothing has changed."""

import copy
import math

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.methods import METHODS
from helpers.problems import gradients, run, same, tensors, weight
from torch import nn

from stiefel.optimizers import (
    AdaPreLoRA,
    AltLoRA,
    Fira,
    GaLore,
    SwitchLoRA,
    pairs_to_groups,
)

SHAPES = [(6, 10), (10, 6), (6, 6), (5,)]
"""Three matrices, and a vector for AdamW."""
PAIR_SHAPES = [(2, 8), (6, 2), (2, 6), (8, 2)]
PAIRS = {
    "altlora": lambda ps: AltLoRA(pairs_to_groups([ps[:2], ps[2:4]], scale=2.0)),
    "altlora-plus": lambda ps: AltLoRA(
        pairs_to_groups([ps[:2], ps[2:4]], scale=2.0), second_moment="elementwise"
    ),
    "adaprelora": lambda ps: AdaPreLoRA(pairs_to_groups([ps[:2], ps[2:4]], scale=2.0)),
    "adaprelora-adamw": lambda ps: AdaPreLoRA(
        pairs_to_groups([ps[:2], ps[2:4]], scale=2.0), variant="adamw"
    ),
    "switchlora": lambda ps: SwitchLoRA(
        pairs_to_groups([[*ps[:2], base(6, 8)], [*ps[2:4], base(8, 6)]], scale=0.5),
        total_steps=20, interval0=2, freeze_steps=1,
    ),
}  # fmt: skip
EXTRA = {
    "galore-topk": lambda ps: GaLore(ps, rank=3, projection="topk", update_proj_gap=3),
    "galore-dct": lambda ps: GaLore(ps, rank=3, projection="dct", update_proj_gap=3),
    "fira-randk": lambda ps: Fira(ps, rank=3, projection="randk", update_proj_gap=3),
}
ADAFACTOR = {"galore-adafactor": lambda ps: GaLore(ps, rank=3, inner="adafactor")}
METHODS = {**METHODS, **EXTRA, **ADAFACTOR}
BIG = "galore-int8"
EVERY = [*METHODS, *PAIRS, BIG]


def base(m, n):
    return weight((m, n), m, torch.float32).requires_grad_(False)


def build(name, steps=4):
    shapes = PAIR_SHAPES if name in PAIRS else [(70, 90), (90, 70), (5,)] if name == BIG else SHAPES
    params = [weight(shape, k) for k, shape in enumerate(shapes)]
    if name == BIG:
        optimizer = GaLore(params, rank=60, state_dtype="int8", update_proj_gap=3)
    else:
        optimizer = (PAIRS | METHODS)[name](params)
    grads = [gradients(s if len(s) > 1 else (*s, 1), steps + 3, k) for k, s in enumerate(shapes)]
    grads = [[G.view(p.shape) for G in series] for p, series in zip(params, grads, strict=True)]
    run(optimizer, params, [series[:steps] for series in grads])
    return params, optimizer, [series[steps:] for series in grads]


@pytest.fixture(scope="module")
def built():
    """One trained optimizer per name: a refused load changes nothing, so all tests share it."""
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = build(name)
        return cache[name]

    return get


def snapshot(optimizer):
    weights = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return weights, tensors(optimizer), copy.deepcopy(groups)


def check_refused(optimizer, bad, key, *, named=True):
    before = snapshot(optimizer)
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(bad)
    text = str(caught.value)
    assert "\n" not in text and repr(key) in text and ("parameter " in text or not named), text
    assert same(before, snapshot(optimizer))


BAD_CLOCKS = {
    "None": None,
    "NaN": math.nan,
    "inf": math.inf,
    "negative": -1,
    "not whole": 2.5,
    "text": "3",
    "flag": True,
    "two elements": torch.tensor([3.0, 4.0]),
    "tensor NaN": torch.tensor(math.nan),
    "no element": torch.tensor([]),
    "complex": 3j,
    "huge": 10**30,
    "huge float": 1e300,
    "list": [3],
    "sparse": torch.tensor([3.0]).to_sparse(),
    "meta": torch.tensor(3.0, device="meta"),
}


def clocks_of(saved):
    return [
        (i, key)
        for i, entry in saved["state"].items()
        for key in entry
        if key.split(".")[0] in ("step", "refreshed", "held")
    ]


@pytest.mark.parametrize("name", EVERY)
def test_a_clock_that_is_no_count_is_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    assert clocks_of(saved)
    for i, key in clocks_of(saved):
        for value in BAD_CLOCKS.values():
            bad = copy.deepcopy(saved)
            bad["state"][i][key] = value
            check_refused(optimizer, bad, key)


@pytest.mark.parametrize("name", EVERY)
def test_a_refresh_after_the_last_step_is_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for i, key in clocks_of(saved):
        if key.startswith("refreshed"):
            bad = copy.deepcopy(saved)
            bad["state"][i][key] = 5
            check_refused(optimizer, bad, key)


@pytest.mark.parametrize("name", ["galore", "fira", "frugal-svd"])
def test_a_refresh_without_a_step_is_refused(name, built):
    _, optimizer, _ = built(name)
    bad = copy.deepcopy(optimizer.state_dict())
    del bad["state"][0]["step"]
    bad["state"][0]["refreshed"] = 1
    check_refused(optimizer, bad, "refreshed")


def test_state_held_since_after_the_next_step_is_refused():
    params = [weight((6, 6), k) for k in range(3)]
    optimizer = METHODS["frugal-block"](params, density=0.4)
    run(optimizer, params, [gradients((6, 6), 5, k) for k in range(3)])
    saved = through_a_file(optimizer.state_dict())
    held = [(i, key) for i, key in clocks_of(saved) if key == "held"]
    assert held
    for i, key in held:
        bad = copy.deepcopy(saved)
        bad["state"][i][key] = 7
        check_refused(optimizer, bad, key)


@pytest.mark.parametrize("name", EVERY)
def test_whole_clocks_of_other_types_are_the_same_clocks(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for make in (float, lambda x: torch.tensor([float(x)]), lambda x: torch.tensor(int(x))):
        other = copy.deepcopy(saved)
        for i, key in clocks_of(saved):
            other["state"][i][key] = make(saved["state"][i][key])
        params, fresh, rest = build(name, 0)
        fresh.load_state_dict(other)
        twin_params, twin, _ = build(name, 0)
        twin.load_state_dict(copy.deepcopy(saved))
        assert same(tensors(fresh), tensors(twin))
        if name == "switchlora":
            for new in (fresh, twin):
                new.param_groups[0].pop("base_sums")  # weights here are others
        assert same(run(fresh, params, rest), run(twin, twin_params, rest))


def bad_tensors(X):
    """Damaged versions of a state tensor, by name."""
    first = (0,) * X.dim()
    changed = {
        "None": None,
        "number": 1.0,
        "list": X.tolist(),
        "shape": X.new_zeros(*X.shape, 2),
        "flat": X.reshape(-1)[:-1] if X.numel() > 1 else X.new_zeros(2),
        "complex": X.to(torch.complex64),
        "meta": X.to("meta"),
    }
    if X.dim():
        changed["sparse"] = X.to_sparse()
    if X.numel() > 1:
        changed["expanded"] = X.new_zeros(()).expand(X.shape)
    if X.is_floating_point():
        for value in (math.nan, math.inf, -math.inf):
            Y = X.clone()
            Y[first] = value
            changed[str(value)] = Y
        changed["whole numbers"] = X.to(torch.int32)
        changed["quantized"] = torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8)
    else:
        changed["floats"] = X.float()
        changed["wide"] = X.to(torch.int64)
        changed["flags"] = X.bool()
    return changed


@pytest.mark.parametrize("name", EVERY)
def test_state_that_is_no_sound_tensor_is_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for i, entry in saved["state"].items():
        for key, X in entry.items():
            if isinstance(X, torch.Tensor) and key != "step":
                for what, value in bad_tensors(X).items():
                    if key == "polar_report" and what in ("nan", "inf", "-inf"):
                        continue  # nothing reads it
                    if what == "inf" and key.partition(".")[0].removesuffix("_scale") in SUMS:
                        continue  # gradients above 1e19 have such squares
                    bad = copy.copy(saved)
                    bad["state"] = {**saved["state"], i: {**entry, key: value}}
                    check_refused(optimizer, bad, key)


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("name", EVERY)
def test_sums_that_may_be_infinite_load_and_the_next_steps_are_finite(name, every, built):
    """An average of weights below 1 leaves infinity by inf - inf, which is no number."""
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    found = [
        (i, key)
        for i, entry in saved["state"].items()
        for key, X in entry.items()
        if isinstance(X, torch.Tensor) and X.is_floating_point() and X.numel()
        if key.partition(".")[0].removesuffix("_scale") in SUMS
    ]
    for i, key in found:
        changed = copy.deepcopy(saved)
        changed["state"][i][key].view(-1)[::every] = math.inf
        params, fresh, rest = build(name, 0)
        fresh.load_state_dict(changed)
        if name == "switchlora":
            fresh.param_groups[0].pop("base_sums")  # weights here are others
        run(fresh, params, rest)
        assert all(bool(p.isfinite().all()) for p in params), (i, key)
        for (_, other), Y in tensors(fresh).items():
            assert not torch.as_tensor(Y).isnan().any(), (key, other)


SQUARES = (
    *("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "second_moment", "row_second_moment"),
    *("grad_norm", "energy", "seen", "age", "count"),
)
SUMS = {"exp_avg_sq", "grad_norm", "seen"}
"""What gradients above 1e19 make infinite."""


@pytest.mark.parametrize("name", EVERY)
def test_squares_and_counts_below_zero_are_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for i, entry in saved["state"].items():
        for key, X in entry.items():
            is_signed = isinstance(X, torch.Tensor) and X.dtype is not torch.uint8
            if is_signed and (key.split(".")[0] in SQUARES or key.endswith("_scale")):
                bad = copy.deepcopy(saved)
                bad["state"][i][key].view(-1)[0] = -1
                check_refused(optimizer, bad, key)


INDEXED = [name for name in METHODS if name.startswith(("dctadamw", "frugal-r", "frugal-c"))]
INDEXED = [name for name in INDEXED if name != "frugal-random"] + [*EXTRA]


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_out_of_range_or_given_twice_is_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for i in range(3):
        index = saved["state"][i]["index"]
        for change in (lambda x: x.fill_(0), lambda x: x[:1].fill_(10**6), lambda x: x[:1].neg_(),
                       lambda x: x[-1:].fill_(60), lambda x: x[:1].fill_(-7),
                       lambda x: x[:1].copy_(x[1:2])):  # fmt: skip
            bad = copy.deepcopy(saved)
            change(bad["state"][i]["index"])
            if torch.equal(bad["state"][i]["index"], index):
                continue  # 0 with another sign
            check_refused(optimizer, bad, "index")


@pytest.mark.parametrize(("key", "value"), [("slots", 6), ("slots", -2), ("cursor", 2)])
def test_slots_of_a_pool_out_of_range_are_refused(key, value, built):
    _, optimizer, _ = built("switchlora")
    bad = through_a_file(optimizer.state_dict())
    bad["state"][0][key].view(-1)[0] = value + (key == "slots" and value > 0)
    check_refused(optimizer, bad, key)
    bad = through_a_file(optimizer.state_dict())
    bad["state"][0]["slots"].fill_(int(bad["state"][0]["slots"][0]))
    check_refused(optimizer, bad, "slots")


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_or_unknown_key_is_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for i, entry in saved["state"].items():
        for key, X in entry.items():
            is_tensor = isinstance(X, torch.Tensor)
            if not is_tensor or (key == "pool"):
                continue  # a checkpoint may lack clocks (torch.optim.Muon's) and pools
            bad = copy.copy(saved)
            bad["state"] = {**saved["state"], i: {k: v for k, v in entry.items() if k != key}}
            check_refused(optimizer, bad, key)
        for key in ("foo", "step.h3", "max_exp_avg_sq"):
            bad = copy.copy(saved)
            bad["state"] = {**saved["state"], i: {**entry, key: torch.tensor(1.0)}}
            check_refused(optimizer, bad, key)
        bad = copy.copy(saved)
        bad["state"] = {**saved["state"], i: {5: torch.tensor(1.0), **entry}}
        check_refused(optimizer, bad, 5)


@pytest.mark.parametrize("name", EVERY)
def test_clocks_alone_of_a_parameter_that_has_moved_are_refused(name, built):
    if name.startswith("frugal"):
        pytest.skip("a block outside its window has clocks alone")
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for i, entry in saved["state"].items():
        clocks = {k: v for k, v in entry.items() if (i, k) in clocks_of(saved)}
        lies_at_another = not any(str(key).startswith("step") for key in entry) and entry
        if (clocks and len(clocks) < len(entry)) or lies_at_another:
            bad = copy.deepcopy(saved)
            bad["state"][i] = clocks
            with pytest.raises(ValueError, match="checkpoint lacks"):
                optimizer.load_state_dict(bad)


@pytest.mark.parametrize("name", EVERY)
def test_state_of_no_parameter_and_ids_given_twice_are_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for key in (99, "0", None, -1):
        bad = {**saved, "state": {**saved["state"], key: saved["state"][0]}}
        check_refused(optimizer, bad, key, named=False)
    bad = copy.deepcopy(saved)
    bad["param_groups"][0]["params"][1] = bad["param_groups"][0]["params"][0]
    with pytest.raises(ValueError, match="lists the id 0 twice"):
        optimizer.load_state_dict(bad)


FORMS = {
    "state": lambda s: {**s, "state": [1]},
    "groups": lambda s: {**s, "param_groups": {"a": 1}},
    "a group": lambda s: {**s, "param_groups": [1, *s["param_groups"][1:]]},
    "no params": lambda s: {**s, "param_groups": [{"lr": 1.0}, *s["param_groups"][1:]]},
    "a tensor": lambda s: {**s, "param_groups": [
        {**s["param_groups"][0], "params": torch.zeros(3)}, *s["param_groups"][1:]]},
    "unhashable": lambda s: {**s, "param_groups": [
        {**s["param_groups"][0], "params": [[] for _ in s["param_groups"][0]["params"]]},
        *s["param_groups"][1:]]},
    "names": lambda s: {**s, "param_groups": [
        {**s["param_groups"][0], "param_names": ["a"] * 99}, *s["param_groups"][1:]]},
    "list": lambda s: [s],
    "number": lambda s: 3,
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_another_form_is_refused(name, form, built):
    _, optimizer, _ = built(name)
    bad, before = FORMS[form](copy.deepcopy(optimizer.state_dict())), snapshot(optimizer)
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(bad)
    assert "\n" not in str(caught.value)
    assert same(before, snapshot(optimizer))


VALUES = [
    ("lr", math.nan), ("lr", -1.0), ("lr", None), ("lr", "x"), ("lr", [1.0]),
    ("weight_decay", math.nan), ("weight_decay", -1.0), ("weight_decay", None),
    ("adamw_eps", -1.0), ("adamw_betas", (0.9, 1.5)), ("adamw_betas", 3), ("nonfinite", "x"),
    ("state_dtype", "x"), ("view", 3), ("rule", 3), ("rule", "x"), ("method", 3),
    ("decays", lambda n: [math.nan] * n), ("rules", lambda n: ["x"] * n),
    ("positions", lambda n: [-1] * n), ("positions", lambda n: [0.5] * n),
    ("lr", math.inf), ("decays", 3),
    ("adamw_lr_ratio", math.nan), ("adamw_lr_ratio", -1.0), ("adamw_lr_ratio", "x"),
    ("base_sums", lambda n: [[1.0, 2.0]] * n), ("base_sums", lambda n: [["x"] * 3] * n),
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_setting_that_no_optimizer_takes_is_refused(name, built):
    _, optimizer, _ = built(name)
    saved = through_a_file(optimizer.state_dict())
    for key, value in VALUES:
        bad = copy.deepcopy(saved)
        group = bad["param_groups"][0]
        group[key] = value(len(group["params"])) if callable(value) else value
        before = snapshot(optimizer)
        try:
            optimizer.load_state_dict(bad)
        except ValueError as error:
            assert "\n" not in str(error), key
        else:
            pytest.fail(f"{key} = {value!r} was accepted")
        assert same(before, snapshot(optimizer))


@pytest.mark.parametrize("name", EVERY)
def test_what_a_users_hook_makes_of_a_checkpoint_is_checked_too(name):
    _, optimizer, _ = build(name)

    def spoil(_, saved):
        first = next(iter(saved["state"]))
        return {**saved, "state": {**saved["state"], first: {**saved["state"][first], "step": -3}}}

    optimizer.register_load_state_dict_pre_hook(spoil)
    check_refused(optimizer, through_a_file(optimizer.state_dict()), "step")


@pytest.mark.parametrize("name", EVERY)
def test_an_optimizer_goes_on_after_refused_loads(name, built):
    """The last test of the module: all refusals before it have left no trace."""
    params, optimizer, rest = built(name)
    twin_params, twin, _ = build(name)
    assert same(run(optimizer, params, rest), run(twin, twin_params, rest))


def test_a_state_before_the_first_step_loads():
    for name in EVERY:
        _, optimizer, _ = build(name, 0)
        optimizer.init_state()
        _, fresh, _ = build(name, 0)
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert same(tensors(fresh), tensors(optimizer))


def test_a_parameter_given_twice_has_one_id():
    p = nn.Parameter(torch.ones(4, 4))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = METHODS["muon"]([p, p])
    run(optimizer, [p], [gradients((4, 4), 2)])
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


# live state that other code has changed -----------------------------------------------------------


def live_damages(entry, key):
    X = entry[key]
    if isinstance(X, torch.Tensor) and key != "step":
        return [None, 3.0, X.reshape(-1)[:-1], X.to_sparse() if X.dim() else None, X.to("meta")]
    return [None, -1, math.nan, "3", torch.tensor([1.0, 2.0]), 2.5]


HUGE = {
    name: make
    for name, make in METHODS.items()
    if name != "rows"  # a rule of the tests alone
}


@pytest.mark.parametrize("size", [1e20, 1e37])
@pytest.mark.parametrize("name", HUGE)
def test_what_a_step_of_huge_gradients_makes_is_finite_but_for_sums_and_loads(name, size):
    params = [weight(shape, k, torch.float32) for k, shape in enumerate(SHAPES)]
    optimizer = HUGE[name](params)
    for k in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            p.grad *= size if k == 0 else 1.0
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in params)
        for (_, key), X in tensors(optimizer).items():
            name_of = key.partition(".")[0].removesuffix("_scale")
            X = torch.as_tensor(X)
            assert not X.isnan().any(), key
            assert bool(X.isfinite().all()) or name_of in SUMS, key
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def adamw_damages(entry, key):
    X = entry[key]
    if key == "step":
        return [None, 3, "3", torch.tensor([1.0, 2.0]), torch.tensor(1)]
    dtypes = [X.bfloat16(), X.int()]
    return [None, 3.0, X.reshape(-1)[:-1], X[:, None], X.to_sparse(), X.to("meta"), *dtypes]


@pytest.mark.parametrize("flag", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_state_of_adamw_that_other_code_has_replaced_is_refused_at_any_step(name, flag):
    params, optimizer, rest = build(name)
    optimizer.param_groups[-1].update(flag)
    vector = next(p for p in params if p.ndim == 1)
    for p, series in zip(params, rest, strict=True):
        p.grad = series[0].clone()
    optimizer.step()
    entry = optimizer.state[vector]
    for key in list(entry):
        for damage in adamw_damages(entry, key):
            kept, entry[key] = entry[key], damage
            before = [p.detach().clone() for p in params]
            others = {k: v for k, v in tensors(optimizer).items() if k[1] != key}
            with pytest.raises((ValueError, RuntimeError), match="parameter"):
                optimizer.step()
            assert same(before, [p.detach() for p in params]), (key, damage)
            assert same(others, {k: v for k, v in tensors(optimizer).items() if k[1] != key})
            entry[key] = kept
    optimizer.step()


@pytest.mark.parametrize("way", ["live", "deepcopy"])
@pytest.mark.parametrize("name", EVERY)
def test_live_state_that_no_step_can_use_is_refused_before_anything_moves(name, way):
    params, optimizer, rest = build(name)
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    given = {id(p): series for p, series in zip(params, rest, strict=True)}
    moved = [i for i, p in enumerate(flat) if p.ndim > 1 and optimizer.state.get(p)]
    at = moved[0] if name in PAIRS else moved[-1]  # behind others, which could move first
    for key in list(optimizer.state[flat[at]]):
        for damage in live_damages(optimizer.state[flat[at]], key):
            if key == "held" and way == "live":
                continue  # is read at the next window only
            bad = optimizer if way == "live" else copy.deepcopy(optimizer)
            live = [p for group in bad.param_groups for p in group["params"]]
            for p, original in zip(live, flat, strict=True):
                p.grad = given[id(original)][0].clone() if id(original) in given else None
            entry = bad.state[live[at]]
            kept, entry[key] = entry[key], damage
            weights = [p.detach().clone() for p in live]
            others = {k: v for k, v in tensors(bad).items() if k != (at, key)}
            try:
                bad.step()
            except ValueError as error:
                assert "state" in str(error) or "would" in str(error)
            else:
                pytest.fail(f"{key} = {damage!r} was accepted")
            assert same(weights, [p.detach() for p in live]), key
            assert same(others, {k: v for k, v in tensors(bad).items() if k != (at, key)}), key
            entry[key] = kept
    if name != "switchlora":  # whose base weights are others in a second one
        twin_params, twin, _ = build(name)
        assert same(run(optimizer, params, rest), run(twin, twin_params, rest))
