"""Every keyword of every class with values of every kind: right, or refused with nothing changed.

The signatures say which keywords there are; a new class or option takes part by itself.
"""

import copy
import inspect
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from helpers.covering import in_turn
from helpers.every_class import CLASSES, EVERY, problem, set_gradients
from helpers.problems import same, tensors
from torch import nn

from stiefel.optimizers import FRUGAL, DCTAdamW, GaLore, Muon, SymmetryStack
from stiefel.optimizers._core.rule import RULE_CLASSES, defaults_of
from stiefel.optimizers._driver.checks import VALUE_CHECKS
from stiefel.optimizers._driver.param_groups import COMMON

BAD = {
    "None": None,
    "True": True,
    "text": "x",
    "no text": "",
    "method": "zolo",
    "list": [],
    "tuple": (),
    "one": (0.9,),
    "two": (0.9, 0.99),
    "three": (0.9, 0.99, 0.999),
    "texts": ["a", "b"],
    "dict": {},
    "object": object(),
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "2**70": 2**70,
    "10**400": 10**400,
    "half": 0.5,
    "two entries": torch.tensor([0.5, 0.5]),
    "nan tensor": torch.tensor(math.nan),
    "complex": 1 + 2j,
    "array": np.array([0.5, 0.5]),
    "array in a list": [np.array([1, 2])],
    "numpy nan": np.float32("nan"),
    "numpy": np.float32(0.5),
    "numpy int": np.int64(3),
    "numpy bool": np.bool_(True),
    "dtype": torch.bfloat16,
    "function": len,
}
"""Values that some keywords take and most refuse."""
NUMBERS = {"lr", "weight_decay", "adamw_lr", "adamw_eps", "adamw_weight_decay"}
RENAMED = {
    "matrix_view": "view",
    "split_sizes": "view",
    "num_heads": "view",
    "block_of": "blocks",
}
NOT_IN_GROUPS = {"params", "groups", "policy", "overrides", "blocks"}


def keywords(cls):
    """Every keyword of a class but its parameters."""
    own = [
        p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    return [name for name in [*own, *COMMON] if name not in ("params", "groups")]


def group_keys(cls):
    keys = [name for name in keywords(cls) if name not in NOT_IN_GROUPS]
    return keys + (["block_of"] if cls is FRUGAL else [])


def values_for(cls, name):
    """(key, value) that a keyword is tried with: where all classes share it they take turns."""
    by_class = [CLASSES.index(cls), [*COMMON].index(name)] if name in COMMON else None
    return [item for i, item in enumerate(BAD.items()) if by_class is None or in_turn(i, *by_class)]


def snapshot(optimizer, params):
    weights = [p.detach().clone() for p in params]
    groups = [
        {**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    return weights, tensors(optimizer), groups


def is_equal(before, after):
    (W0, s0, g0), (W1, s1, g1) = before, after
    if len(g0) != len(g1) or any(a.keys() != b.keys() for a, b in zip(g0, g1, strict=True)):
        return False
    return same(W0, W1) and same(s0, s1) and [a["params"] for a in g0] == [b["params"] for b in g1]


def check_sentence(error, name):
    text = str(error)
    names = {name, RENAMED.get(name, name)}
    assert any(n in text for n in names), f"{name} is not named: {text}"
    assert "\n" not in text and "not supported between" not in text, text
    assert not re.search(r"[.!] [A-Z]", text), f"more than one sentence: {text}"


class Findings:
    """Failures of a loop over many cases, told together."""

    def __init__(self):
        self.cases, self.texts = 0, []

    def __call__(self, name, key, check):
        self.cases += 1
        try:
            check()
        except Exception as error:
            self.texts.append(f"{name}={key}: {type(error).__name__}: {str(error)[:300]}")

    def done(self):
        assert not self.texts, f"{len(self.texts)} of {self.cases}\n" + "\n".join(self.texts)


def takes_a_step(optimizer, params, name, value=None):
    """One step; returns an error that it raised, after which nothing may have changed."""
    set_gradients(params)
    before = snapshot(optimizer, params)
    try:
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        check_sentence(error, name)
        assert is_equal(before, snapshot(optimizer, params)), f"{error} came after a change"
        return error
    is_extreme = name == "ns_coefficients" or (type(value) is int and value == 2**70)
    assert is_extreme or all(bool(p.isfinite().all()) for p in params)
    return None


@pytest.fixture(autouse=True)
def _silent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@EVERY
def test_a_keyword_of_any_type_is_right_or_refused_by_one_sentence(cls):
    accepted, find = [], Findings()

    def construct(name, value):
        params, needed, weights = problem(cls)
        try:
            optimizer = cls(params, **{**needed, name: value})
        except (ValueError, TypeError) as error:
            return check_sentence(error, name)
        if takes_a_step(optimizer, weights, name, value) is None:
            accepted.append(name)

    for name in keywords(cls):
        for key, value in values_for(cls, name):
            find(name, key, lambda: construct(name, value))  # noqa: B023
    find.done()
    assert len(accepted) * len(BAD) > find.cases  # not all values are bad for all keywords


@EVERY
def test_a_group_key_of_any_type_is_right_or_refused_and_the_groups_stay(cls):
    find = Findings()

    def add(name, value):
        params, needed, weights = problem(cls)
        optimizer = cls(params, **needed)
        late, _, late_weights = problem(cls, 1)
        group = late[0] if isinstance(late[0], dict) else {"params": late[:1]}
        before = snapshot(optimizer, weights)
        try:
            optimizer.add_param_group({**group, name: value})
        except (ValueError, TypeError) as error:
            check_sentence(error, name)
            assert is_equal(before, snapshot(optimizer, weights))
            return
        takes_a_step(optimizer, [*weights, *late_weights[:1]], name, value)

    for name in group_keys(cls):
        for key, value in values_for(cls, name):
            find(name, key, lambda: add(name, value))  # noqa: B023
    find.done()


@EVERY
def test_a_value_written_later_is_right_or_refused_before_anything_moves(cls):
    find = Findings()

    def stepped():
        params, needed, weights = problem(cls)
        optimizer = cls(params, **needed)
        set_gradients(weights)
        optimizer.step()
        return optimizer, weights

    optimizer, weights = stepped()

    def write(i, name, value):
        nonlocal optimizer, weights
        group = optimizer.param_groups[i]
        good, group[name] = group[name], value
        try:
            refused = takes_a_step(optimizer, weights, name, value) is not None
        except BaseException:
            refused = False
            raise
        finally:
            group[name] = good
            if not refused:
                optimizer, weights = stepped()

    def goes_on():
        assert takes_a_step(optimizer, weights, "") is None

    for i, group in enumerate(optimizer.param_groups):
        for name in sorted(group.keys() & {*group_keys(cls)}):
            for key, value in values_for(cls, name):
                find(name, key, lambda: write(i, name, value))  # noqa: B023
            # what was refused has left nothing behind
            find(name, "as before", goes_on)
    find.done()


WRITTEN = (
    np.array([0.5, 0.5]), [np.array([1, 2])], torch.tensor([0.1, 0.2]),
    torch.zeros((), device="meta"), {1},
)  # fmt: skip
"""Values that no comparison takes for one answer, or that have no order."""
CALLS = {
    "step": lambda optimizer: optimizer.step(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "assignment": lambda optimizer: str(optimizer.assignment()),
    "init_state": lambda optimizer: optimizer.init_state(),
    "deepcopy": copy.deepcopy,
    "step_in_backward": lambda optimizer: optimizer.step_in_backward().remove(),
    "add_param_group": lambda optimizer: optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(3))], "rule": "adamw"}
    ),
    "watch": lambda optimizer: getattr(optimizer, "watch", len)([]),
    "merged": lambda optimizer: getattr(optimizer, "merged", list)(),
}


@EVERY
@pytest.mark.parametrize("reopen", [False, True])
def test_a_value_written_into_a_group_is_right_or_refused_by_name_at_every_call(cls, reopen):
    find = Findings()

    def stepped():
        params, needed, weights = problem(cls)
        optimizer = cls(params, **needed)
        set_gradients(weights)
        optimizer.step()
        if reopen:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return optimizer, weights

    optimizer, weights = stepped()

    def write(i, name, value, call):
        nonlocal optimizer, weights
        group = optimizer.param_groups[i]
        old = {name: group[name]} if name in group else {}
        group[name] = value
        before = snapshot(optimizer, weights)
        try:
            call(optimizer)
        except (ValueError, RuntimeError) as error:
            if "parameter '" not in str(error) and "pair" not in str(error):
                check_sentence(error, name.removesuffix("s"))
            assert is_equal(before, snapshot(optimizer, weights)), f"{error} came after a change"
            del group[name]
            group.update(old)
        except BaseException:
            optimizer, weights = stepped()
            raise
        else:
            optimizer, weights = stepped()

    keys = dict.fromkeys([*group_keys(cls), "rule", *LISTS, "base_sums"])
    for i in range(len(optimizer.param_groups)):
        for at in itertools.product(*(enumerate(axis) for axis in (keys, WRITTEN, CALLS.items()))):
            (a, name), (b, value), (c, (what, call)) = at
            if in_turn(a, b, c, reopen, of=5):
                find(f"group {i} {name}", what, lambda: write(i, name, value, call))  # noqa: B023
    find.done()


@EVERY
def test_a_rule_of_no_name_is_refused_in_a_group(cls):
    params, needed, weights = problem(cls)
    optimizer = cls(params, **needed)
    late, _, _ = problem(cls, 1)
    group = late[0] if isinstance(late[0], dict) else {"params": late[:1]}
    before = snapshot(optimizer, weights)
    for value in (True, "", "x", [], {}, object(), math.nan, torch.ones(2)):
        with pytest.raises(ValueError, match="'rule' must be 'adamw' or one of"):
            optimizer.add_param_group({**group, "rule": value})
    assert is_equal(before, snapshot(optimizer, weights))


LISTS = {
    "rules": ("Muon", [3]),
    "views": ([3], ["sideways"], [()]),
    "sides": ([3],),
    "roles": ([3],),
    "reasons": ([3],),
    "decays": ([-1.0], ["x"], [math.nan]),
    "positions": (["x"], [-1], [0.5]),
    "draws": (3, "x", None),
    "adamw_lr_ratio": ("x", -1.0, math.nan, [1.0]),
    "param_names": (True, "x", 3, [np.array([1, 2])], torch.ones(2), np.array(["a", "b"])),
    "use_muon": ("x", 3, torch.ones(2)),
}
"""Keys that the optimizer writes itself or that mark groups, with values that they cannot have."""


@EVERY
@pytest.mark.parametrize("name", LISTS)
def test_keys_that_are_no_keywords_are_checked_too(cls, name):
    params, needed, weights = problem(cls)
    optimizer = cls(params, **needed)
    late, _, _ = problem(cls, 1)
    group = late[0] if isinstance(late[0], dict) else {"params": late[:1]}
    before = snapshot(optimizer, weights)
    for value in (*LISTS[name], object() if name != "use_muon" else 2.5):
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            optimizer.add_param_group({**group, name: value})
        check_sentence(caught.value, name)
    assert is_equal(before, snapshot(optimizer, weights))


# what is accepted ---------------------------------------------------------------------------------


@EVERY
def test_scalars_of_numpy_are_numbers_and_end_as_plain_values(cls):
    params, needed, weights = problem(cls)
    plain = cls(params, **needed, lr=0.5, weight_decay=0.25, maximize=True)
    scalars = {"lr": np.float32(0.5), "weight_decay": np.float64(0.25), "maximize": np.bool_(True)}
    params, needed, others = problem(cls)
    optimizer = cls(params, **needed, **scalars)
    for optimizer_, ps in ((plain, weights), (optimizer, others)):
        set_gradients(ps)
        optimizer_.step()
    assert same(weights, others)
    for group in [optimizer.defaults, *optimizer.param_groups]:
        for name in scalars:
            assert type(group[name]) in (float, int, bool)
    torch.save(optimizer.state_dict(), "/dev/null")


OURS = sorted(k for k, cls in RULE_CLASSES.items() if cls.__module__.startswith("stiefel."))
"""Rules of the package, not those of tests."""


@pytest.mark.parametrize("rule", OURS)
def test_numbers_of_numpy_in_fields_are_plain_values(rule):
    cls = RULE_CLASSES[rule]
    kinds = {float: np.float64, int: np.int64, bool: np.bool_}
    values = {name: kinds[type(x)](x) for name, x in defaults_of(cls).items() if type(x) in kinds}
    try:
        made = cls(**values)
    except ValueError:  # some defaults go only with a value that has none
        made = cls(**values, **({"total_steps": 10} if rule == "SwitchLoRA" else {}))
    assert all(type(getattr(made, name)) in (float, int, bool) for name in values)


@EVERY
@pytest.mark.parametrize("late", [False, True])
def test_a_dtype_of_state_passes_as_such_and_by_name(cls, late):
    def weights_of(value):
        params, needed, weights = problem(cls)
        optimizer = cls(params, **needed, **({} if late else {"state_dtype": value}))
        if late:
            for group in optimizer.param_groups:
                group["state_dtype"] = value
        for _ in range(2):
            set_gradients(weights)
            optimizer.step()
        assert {group["state_dtype"] for group in optimizer.param_groups} == {"bfloat16"}
        assert late or optimizer.defaults["state_dtype"] == "bfloat16"
        return weights, tensors(optimizer)

    by_name, by_dtype = weights_of("bfloat16"), weights_of(torch.bfloat16)
    assert same(by_name[0], by_dtype[0]) and same(by_name[1], by_dtype[1])
    assert same(by_name[0], weights_of("torch.bfloat16")[0])


def test_a_dtype_passes_in_a_group_and_for_the_polar_factor():
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = Muon([{"params": [p], "state_dtype": torch.bfloat16, "polar_dtype": torch.float64}])
    group = optimizer.param_groups[0]
    assert (group["state_dtype"], group["polar_dtype"]) == ("bfloat16", "float64")
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(3, 4))], "state_dtype": torch.int8}
    )
    assert optimizer.param_groups[1]["state_dtype"] == "int8"


@EVERY
@pytest.mark.parametrize("late", [False, True])
def test_a_dtype_on_the_wire_passes_as_such_and_by_name(cls, late):
    for name in ("float16", "bfloat16", "float32", "float64"):
        for value in (name, getattr(torch, name), f"torch.{name}"):
            params, needed, weights = problem(cls)
            optimizer = cls(params, **needed, **({} if late else {"comm_dtype": value}))
            for group in optimizer.param_groups if late else ():
                group["comm_dtype"] = value
            set_gradients(weights)
            optimizer.step()
            assert {group["comm_dtype"] for group in optimizer.param_groups} == {name}
            assert late or optimizer.defaults["comm_dtype"] == name


PLAN_VALUES = ("auto", "local", "owner", "reduce", "gather")
REFUSED_ON_THE_WIRE = (
    *("int8", "int64", "bool", "complex64", "half", "", "x", 3, 16.0, True, ["float32"]),
    *("float8_e4m3fn", "float8_e5m2", "torch.float8_e4m3fn", torch.float8_e5m2, torch.int32),
)


@EVERY
def test_every_plan_and_dtype_on_the_wire_leaves_plain_tensors_as_they_are(cls):
    def run(**values):
        params, needed, weights = problem(cls)
        optimizer = cls(params, **needed, **values)
        for _ in range(2):
            set_gradients(weights)
            optimizer.step()
        assert all(group["plan"] == values.get("plan", "auto") for group in optimizer.param_groups)
        assert {(row.plan, row.bytes_per_step) for row in optimizer.assignment()} == {("local", 0)}
        return weights, tensors(optimizer)

    expected = run()
    for plan in PLAN_VALUES:
        found = run(plan=plan, comm_dtype="bfloat16")
        assert same(expected[0], found[0]) and same(expected[1], found[1])


@EVERY
def test_a_plan_or_dtype_on_the_wire_that_is_none_is_refused(cls):
    bad = [("comm_dtype", x) for x in REFUSED_ON_THE_WIRE]
    bad += [("plan", x) for x in (None, "", "Auto", "ride", "meet", "zero", 1, True, ["auto"])]
    for key, value in bad:
        params, needed, _ = problem(cls)
        with pytest.raises(ValueError) as caught:
            cls(params, **needed, **{key: value})
        check_sentence(caught.value, key)
        optimizer = cls(params, **needed)
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        check_sentence(caught.value, key)


@EVERY
def test_a_plan_may_change_between_steps_and_goes_into_a_checkpoint(cls):
    params, needed, weights = problem(cls)
    optimizer = cls(params, **needed)
    for plan in PLAN_VALUES:
        optimizer.param_groups[0]["plan"] = plan
        set_gradients(weights)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["plan"] == "gather"
    fresh = cls(problem(cls)[0], **needed)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["plan"] == "gather"
    for group in saved["param_groups"]:  # as an older file
        del group["plan"], group["comm_dtype"]
    fresh = cls(problem(cls)[0], **needed, plan="owner", comm_dtype="float32")
    fresh.load_state_dict(saved)
    assert {(g["plan"], g["comm_dtype"]) for g in fresh.param_groups} == {("owner", "float32")}


@EVERY
def test_a_misspelt_dtype_on_the_wire_is_refused_with_the_right_word(cls):
    params, needed, _ = problem(cls)
    with pytest.raises(TypeError, match="did you mean 'comm_dtype'"):
        cls(params, **needed, com_dtype="bfloat16")
    params = [{**group, "comm_dtpe": "bfloat16"} for group in cls(params, **needed).param_groups]
    with pytest.raises(ValueError, match="did you mean 'comm_dtype'"):
        cls(params, **needed)


@EVERY
def test_every_keyword_of_all_classes_has_a_check(cls):
    assert set(COMMON) <= set(VALUE_CHECKS)


@EVERY
def test_tensor_learning_rates_are_read_where_that_is_free(cls):
    params, needed, weights = problem(cls)
    lr = torch.tensor([0.1])
    optimizer = cls(params, **needed, lr=lr)
    set_gradients(weights)
    optimizer.step()
    before = snapshot(optimizer, weights)
    for bad in (math.nan, math.inf, -1.0):
        lr.fill_(bad)
        with pytest.raises(ValueError, match=r"Invalid learning rate: .*lr must be"):
            optimizer.step()
        assert is_equal(before, snapshot(optimizer, weights))
    lr.fill_(0.2)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is lr


def test_a_learning_rate_on_a_device_is_not_read_in_a_step():
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = Muon([p])
    reads = []

    class Device(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func == torch.Tensor.item:
                reads.append(func)
            if func == torch.Tensor.device.__get__:
                return torch.device("cuda")
            return super().__torch_function__(func, types, args, kwargs or {})

    from stiefel.optimizers._driver.checks import check_written_values

    optimizer.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(Device)
    seen = check_written_values(
        optimizer.param_groups, type(optimizer)._default_rule.fget(optimizer), ()
    )
    assert len(reads) == 1  # a new tensor is read once
    seen = check_written_values(optimizer.param_groups, optimizer._default_rule, seen)
    assert len(reads) == 1


def test_lists_of_betas_become_tuples_so_that_no_entry_is_written_unseen():
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = GaLore([p], betas=[0.9, 0.99], adamw_betas=[0.8, 0.9])
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.99) and group["adamw_betas"] == (0.8, 0.9)
    group["betas"] = [0.9, 1.0]
    p.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 1: 1\.0; betas must be"):
        optimizer.step()


def test_unchanged_groups_are_compared_by_identity_only(monkeypatch):
    from stiefel.optimizers._driver import checks

    p = nn.Parameter(torch.ones(4, 3))
    optimizer = Muon([p])
    p.grad = torch.ones(4, 3)
    optimizer.step()
    made = []
    monkeypatch.setattr(checks, "_plain", lambda *args: made.append(args))
    optimizer.step()
    assert not made


# a refused group ----------------------------------------------------------------------------------


@EVERY
def test_a_refused_group_leaves_the_groups_as_they_were(cls):
    params, needed, weights = problem(cls)
    optimizer = cls(params, **needed, adamw_lr=0.1)
    known = weights[-1]  # a vector that has a group already, so torch refuses the second half
    late, _, late_weights = problem(cls, 1)
    groups = [
        {"params": [*late_weights[:1], known]},
        {"params": [*late_weights[:1], known], "adamw_lr": 0.2},
        {"params": [known, nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(7, 3))]},
        {"params": [nn.Parameter(torch.ones(5, 4)), 3]},
        {"params": [nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(3)) * 2]},
    ]
    if isinstance(late[0], dict):
        pair = [p for p in late[0]["params"]]
        groups += [{"params": [*pair, *params[0]["params"]], "scale": 2.0}]
    before = snapshot(optimizer, weights)
    for group in groups:
        kept = copy.copy(group)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
        assert is_equal(before, snapshot(optimizer, weights))
        assert group.keys() == kept.keys() and all(group[k] is kept[k] for k in kept)
    assert takes_a_step(optimizer, weights, "") is None


def test_a_warning_that_is_an_error_leaves_the_groups_as_they_were():
    optimizer = DCTAdamW([nn.Parameter(torch.ones(4, 3))], update_proj_gap=10)
    group = {"params": [nn.Parameter(torch.ones(5, 4))], "error_feedback": "full"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="error_feedback"):
            optimizer.add_param_group({**group, "update_proj_gap": 1})
    assert len(optimizer.param_groups) == 1


def test_a_stack_refuses_what_its_own_options_cannot_be():
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8))
    for name in ("policy", "overrides", "adjust_lr_fn"):
        for value in BAD.values():
            try:
                optimizer = SymmetryStack(model, **{name: value})
            except (ValueError, TypeError) as error:
                check_sentence(error, name)
                continue
            takes_a_step(optimizer, [*model.parameters()], name)
