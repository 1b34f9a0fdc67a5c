"""Lists with a value per parameter: refused by name where they are none, read alike everywhere."""

import copy

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.every_class import EVERY, problem, set_gradients
from helpers.problems import same, tensors
from torch import nn

from stiefel.optimizers import FRUGAL, GaLore, Muon, SwitchLoRA, SymmetryStack
from stiefel.optimizers._driver.param_groups import LISTS

KEYS = ("param_names", *LISTS)
ODD = {
    "text": "int8",
    "number": 3,
    "numbers": [3.5] * 2,
    "objects": [object()] * 2,
    "pairs": [(1, 2)] * 2,
    "too long": [None] * 40,
}


def is_allowed(key, odd):
    """Half a factor more of the decay is a factor, and so on."""
    return key == "decays" and odd == "numbers"


@pytest.mark.parametrize("odd", ODD)
@EVERY
def test_a_list_of_odd_type_is_refused_at_the_next_step_and_in_a_checkpoint(cls, odd):
    groups, rest, params = problem(cls)
    optimizer = cls(groups, lr=0.1, **rest)
    set_gradients(params)
    optimizer.step()
    for key in KEYS:
        if is_allowed(key, odd):
            continue
        group = optimizer.param_groups[0]
        saved = through_a_file(optimizer.state_dict()) if odd != "objects" else None
        missing = key not in group
        old, group[key] = group.get(key), ODD[odd]
        before = [p.detach().clone() for p in params], tensors(optimizer)
        calls = [optimizer.step, optimizer.state_dict]
        if (cls, key) == (SwitchLoRA, "base_sums"):
            calls.pop()  # which makes this list anew
        for call in calls:
            with pytest.raises(ValueError, match=key):
                call()
        assert same(before[0], [p.detach() for p in params])
        assert same(before[1], tensors(optimizer))
        if missing:
            del group[key]
        else:
            group[key] = old
        if saved is not None:
            saved["param_groups"][0][key] = ODD[odd]
            with pytest.raises(ValueError, match=key):
                optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize("key", [*LISTS, "param_names"])
def test_a_longer_list_is_refused_at_construction(key):
    values = {"decays": 1.0, "positions": 0, "rules": "adamw", "views": "auto", "roles": "hidden"}
    group = {"params": [nn.Parameter(torch.ones(3, 3))], key: [values.get(key)] * 2}
    with pytest.raises(ValueError, match=key):
        Muon([group], lr=0.1)


def test_a_shorter_list_says_nothing_of_the_rest():
    """As after a parameter was appended to the group; a checkpoint reads it as a step does."""

    def make():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(*shape)) for shape in ((4, 3), (4, 3), (5,), (5,))]
        lists = {"decays": [0.5], "rules": ["adamw"], "views": [], "reasons": ["mine"]}
        return params, Muon([{"params": params, **lists}], lr=0.1, weight_decay=0.1)

    params, optimizer = make()
    twins, twin = make()
    assert [row.rule for row in optimizer.assignment()] == ["adamw", "Muon", "adamw", "adamw"]
    for k in range(4):
        for ps in (params, twins):
            for i, p in enumerate(ps):
                p.grad = torch.full_like(p, 0.1 * (i - k))
        optimizer.step()
        twin.step()
        twin.load_state_dict(through_a_file(twin.state_dict()))
        assert same([p.detach() for p in params], [p.detach() for p in twins])


def test_two_parameters_of_one_number_are_refused_at_the_step():
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = GaLore([{"params": [p]} for p in params], lr=0.1)
    optimizer.param_groups[1]["positions"] = [0]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="positions"):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params) and not optimizer.state


def test_groups_stay_as_they_were_where_a_later_one_is_refused():
    """No group has its values made plain, or its ratio set, if the step is refused."""
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = GaLore([{"params": [p]} for p in params], lr=0.1, rank=2)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    first, second = optimizer.param_groups
    first["adamw_lr"], second["adamw_lr"], second["lr"] = 0.2, 0.2, 0.0
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in (first, second)])
    with pytest.raises(ValueError, match="adamw_lr needs lr above 0"):
        optimizer.step()
    after = [{k: v for k, v in g.items() if k != "params"} for g in (first, second)]
    assert before == after
    second["lr"], second["rank"] = 0.1, 1
    before = dict(first), dict(second)
    with pytest.raises(ValueError, match="rank"):
        optimizer.step()
    assert (dict(first), dict(second)) == before


def test_a_part_of_a_weight_that_was_never_refreshed_loads():
    """As queries and keys of a layer whose attention sees one token."""
    W = nn.Parameter(torch.randn(12, 6))
    optimizer = FRUGAL([W], lr=0.1, split="randk", view="rows:4,4,4", update_gap=2)
    for _ in range(2):
        W.grad = torch.randn(12, 6)
        W.grad[:4] = 0
        optimizer.step()
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer.step()


def test_adamws_ratio_stays_where_groups_of_roles_become_one():
    """SymmetryStack with names has a group for each rule, without names one."""
    W, b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))
    named = SymmetryStack([("weight", W), ("bias", b)], lr=0.01, adamw_lr=0.02)
    plain = SymmetryStack([W, b], lr=0.01, adamw_lr=0.03)
    plain.load_state_dict(named.state_dict())
    assert [row.lr for row in plain.assignment()] == [0.01, 0.02]


@pytest.mark.parametrize("key", KEYS)
@EVERY
def test_a_list_that_is_none_says_nothing_and_loads(cls, key):
    def made(seed):
        params, needed, weights = problem(cls, seed)
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        return cls([{**group, key: None} for group in groups], lr=0.1, **needed), weights

    (optimizer, weights), (other, others) = made(0), made(0)
    set_gradients(weights)
    optimizer.step()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(tensors(optimizer), tensors(other))
    with torch.no_grad():
        for p, q in zip(others, weights, strict=True):
            p.copy_(q)
    for one, params in ((optimizer, weights), (other, others)):
        set_gradients(params)
        one.step()
    assert same(weights, others)


def test_a_list_that_is_none_leaves_that_of_the_model():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8), nn.LayerNorm(8))
    params = [*model.parameters()]
    plain = Muon([{"params": params}], model=model)
    for key in LISTS:
        group = Muon([{"params": params, key: None}], model=model).param_groups[0]
        assert group.get(key) == plain.param_groups[0].get(key)


@pytest.mark.parametrize("change", [{"rules": ["matrix", "matrix"]}, {"view": "rows:8,1"}])
def test_a_view_that_does_not_fit_names_the_parameter(change):
    W, v = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(6))
    text = "parameter 1 of shape" if "rules" in change else "parameter 0 of shape .* view"
    with pytest.raises(ValueError, match=text):
        Muon([{"params": [W, v], **change}])
    optimizer = Muon([W, v])
    set_gradients([W, v])
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert not optimizer.state
