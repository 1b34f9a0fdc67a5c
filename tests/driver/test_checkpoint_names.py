"""Checkpoints find their parameters by name, whatever the order, the groups and the wrappers."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.problems import run, same, tensors, weight
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from stiefel.optimizers import (
    ARO,
    FRUGAL,
    SOAP,
    AdaPreLoRA,
    AltLoRA,
    AuON,
    DCTAdamW,
    Fira,
    GaLore,
    Hybrid,
    Muon,
    RowNorm,
    SOAPMuon,
    Spectral,
    SwitchLoRA,
    SymmetryStack,
    Trion,
)
from stiefel.optimizers._driver.matching import match
from stiefel.optimizers._driver.param_groups import COMMON

GAP = {"update_proj_gap": 2}
PLAIN = {
    "muon": (Muon, {}),
    "muon-low-rank": (Muon, {"polar": "low_rank", "rank": 3, "oversample": 1}),
    "galore": (GaLore, {"rank": 3, **GAP}),
    "galore-random": (GaLore, {"rank": 3, "projection": "randk", **GAP}),
    "galore-stagger": (GaLore, {"rank": 3, "stagger": True, "update_proj_gap": 4}),
    "fira": (Fira, {"rank": 3, **GAP}),
    "fira-random": (Fira, {"rank": 3, "projection": "random", **GAP}),
    "frugal-columns": (FRUGAL, {"density": 0.5, "update_gap": 2}),
    "frugal-block": (FRUGAL, {"density": 0.5, "update_gap": 2, "split": "block"}),
    "dctadamw": (DCTAdamW, {"rank": 3, **GAP}),
    "trion": (Trion, {"rank": 3}),
    "auon": (AuON, {}),
    "aro": (ARO, {}),
    "soap": (SOAP, {"precondition_frequency": 2}),
    "soapmuon": (SOAPMuon, {}),
    "rownorm": (RowNorm, {}),
    "spectral": (Spectral, {}),
    "hybrid": (Hybrid, {}),
}
"""Classes that take plain parameters, and what makes them draw, stagger or drop state."""
PAIRS = {
    "altlora": (AltLoRA, {}),
    "adaprelora": (AdaPreLoRA, {}),
    "switchlora": (
        SwitchLoRA, {"total_steps": 20, "interval0": 2, "freeze_steps": 1},
    ),
}  # fmt: skip
every_class = pytest.mark.parametrize("name", PLAIN)
LAYERS = ("first", "second", "third")


def network(order=LAYERS, seed=0):
    """Layers of one shape, registered in this order, with weights that follow the names."""
    draw = torch.Generator().manual_seed(seed)
    made = {key: nn.Linear(8, 8) for key in LAYERS}
    for key in LAYERS:
        for p in made[key].parameters():
            p.data = torch.randn(p.shape, generator=draw)
    return nn.ModuleDict({key: made[key] for key in order})


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA pair, under the names of peft."""

    def __init__(self, draw):
        super().__init__()
        self.base_layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.scaling = {"default": 2.0}
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw)


def adapted(order=LAYERS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = {key: Adapted(draw) for key in LAYERS}
    return nn.ModuleDict({key: made[key] for key in order})


def train(net, optimizer, first, last):
    """Steps ``first`` to ``last``, with gradients that follow the names."""
    for t in range(first, last + 1):
        for name, p in net.named_parameters():
            draw = torch.Generator().manual_seed(t * 1000 + sum(map(ord, name)))
            p.grad = torch.randn(p.shape, generator=draw) if p.requires_grad else None
        optimizer.step()


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def check_resume(make, build, orders, through=through_a_file, steps=(3, 7)):
    """A run that is resumed in a model of another order ends as the one that was not stopped."""
    stop, last = steps
    straight = build(orders[0])
    optimizer = make(straight)
    train(straight, optimizer, 1, stop)
    saved, halfway = through(optimizer.state_dict()), weights(straight)
    train(straight, optimizer, stop + 1, last)
    resumed = build(orders[1])
    resumed.load_state_dict(halfway, strict=False)
    second = make(resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(saved)
    train(resumed, second, stop + 1, last)
    assert same(weights(straight), weights(resumed))
    return second


def wrapped(net):
    """Parameters under the names that wrappers give them."""
    return [
        (f"_orig_mod.module.{name}".replace("weight", "_checkpoint_wrapped_module.weight"), p)
        for name, p in net.named_parameters()
    ]


FORMS = {
    "module": lambda net: net,
    "names": lambda net: list(net.named_parameters()),
    "groups": lambda net: [{"params": list(net.named_parameters())}],
    "wrapped": wrapped,
}
OTHER = ("third", "first", "second")


@every_class
@pytest.mark.parametrize("form", FORMS)
def test_layers_that_are_registered_in_another_order_keep_their_own_state(name, form):
    cls, options = PLAIN[name]
    check_resume(lambda net: cls(FORMS[form](net), lr=0.02, **options), network, (LAYERS, OTHER))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_are_registered_in_another_order_keep_their_own_state(name):
    cls, options = PAIRS[name]
    check_resume(lambda net: cls(net, lr=0.02, **options), adapted, (LAYERS, OTHER))


def test_a_stack_that_is_registered_in_another_order_keeps_its_own_state():
    policy = {"hidden": "Hybrid"}
    check_resume(lambda net: SymmetryStack(net, lr=0.02, policy=policy), network, (LAYERS, OTHER))


@every_class
def test_an_order_that_changes_twice_is_followed(name):
    cls, options = PLAIN[name]
    nets = [network(order) for order in (LAYERS, OTHER, ("second", "third", "first"))]
    make = [cls(net, lr=0.02, **options) for net in nets]
    straight = network()
    optimizer = cls(straight, lr=0.02, **options)
    train(straight, optimizer, 1, 7)
    for i, (first, last) in enumerate(((1, 2), (3, 5), (6, 7))):
        if i:
            nets[i].load_state_dict(nets[i - 1].state_dict())
            make[i].load_state_dict(through_a_file(make[i - 1].state_dict()))
        train(nets[i], make[i], first, last)
    assert same(weights(straight), weights(nets[2]))


@every_class
def test_a_wrapper_on_one_side_only_is_no_difference(name):
    cls, options = PLAIN[name]
    first, second = network(), network(OTHER)
    one, two = cls(first, lr=0.02, **options), cls(wrapped(second), lr=0.02, **options)
    train(first, one, 1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.load_state_dict(one.state_dict())
    assert [n for g in two.param_groups for n in g["param_names"]] == [
        n for n, _ in wrapped(second)
    ]
    a, b = dict(first.named_parameters()), dict(second.named_parameters())
    assert all(same(dict(one.state[a[n]]), dict(two.state[b[n]])) for n in a)


@every_class
def test_assignment_names_the_parameters_at_hand_after_a_load(name):
    cls, options = PLAIN[name]
    first, second = cls(network(), **options), cls(network(OTHER), **options)
    wanted = str(second.assignment())
    second.load_state_dict(first.state_dict())
    assert str(second.assignment()) == wanted


@every_class
def test_distributed_checkpoints_find_layers_of_another_order(name):
    cls, options = PLAIN[name]
    straight = network()
    optimizer = cls(straight, lr=0.02, **options)
    train(straight, optimizer, 1, 3)
    saved, halfway = copy.deepcopy(get_optimizer_state_dict(straight, optimizer)), weights(straight)
    train(straight, optimizer, 4, 7)
    net = network(OTHER)
    net.load_state_dict(halfway)
    second = cls(net, lr=0.02, **options)
    set_optimizer_state_dict(net, second, saved)
    train(net, second, 4, 7)
    assert same(weights(straight), weights(net))


# other names --------------------------------------------------------------------------------------


def renamed(net, old="second", new="middle"):
    return [(name.replace(old, new), p) for name, p in net.named_parameters()]


@every_class
def test_other_names_load_by_position_with_one_warning_that_names_the_first(name):
    cls, options = PLAIN[name]
    first, second = network(), network()
    one, two = cls(list(first.named_parameters()), **options), cls(renamed(second), **options)
    train(first, one, 1, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two.load_state_dict(one.state_dict())
    (warning,) = caught
    assert issubclass(warning.category, UserWarning)
    assert "'second.weight' where the optimizer has 'middle.weight'" in str(warning.message)
    assert same(tensors(one), tensors(two))
    assert two.param_groups[0]["param_names"][2] == "middle.weight"


def test_other_names_whose_shapes_do_not_fit_are_refused_and_change_nothing():
    net = network()
    optimizer = Muon(list(net.named_parameters()))
    train(net, optimizer, 1, 2)
    before = tensors(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    other = nn.ModuleDict({"x": nn.Linear(8, 8), "y": nn.Linear(9, 8), "z": nn.Linear(8, 8)})
    wrong = Muon(list(other.named_parameters()))
    train(other, wrong, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a refusal does not warn too
        with pytest.raises(ValueError, match=r"'second.weight' has shape \(8, 9\)"):
            optimizer.load_state_dict(wrong.state_dict())
        fewer = Muon(list(other.named_parameters())[:3]).state_dict()
        with pytest.raises(ValueError, match=r"'x.weight' where the optimizer has 'first.weight'"):
            optimizer.load_state_dict(fewer)
    assert same(before[0], tensors(optimizer))
    assert same(before[1], optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("more", [True, False])
def test_a_file_of_a_model_with_more_or_fewer_layers_is_refused_by_the_name_of_one(more):
    small, large = network(LAYERS[:2]), network(LAYERS)
    own, saved = (small, large) if more else (large, small)
    text = "only the checkpoint has" if more else "it lacks"
    with pytest.raises(ValueError, match=f"{text} 'third.weight'"):
        Muon(own).load_state_dict(Muon(saved).state_dict())


def test_without_names_on_a_side_parameters_match_by_position():
    net = network()
    matrices = [(n, p) for n, p in net.named_parameters() if p.ndim > 1]
    bare = Muon([{"params": [p for _, p in matrices], "rule": "Muon"}])
    named = Muon([{"params": matrices, "rule": "Muon"}])
    train(net, named, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare.load_state_dict(named.state_dict())
        assert same(tensors(named), tensors(bare))
        named.load_state_dict(bare.state_dict())


def test_two_models_with_the_same_names_match_in_their_order():
    a, b = network(), network(seed=1)
    make = lambda x, y: Muon([*x.named_parameters(), *y.named_parameters()])  # noqa: E731
    one = make(a, b)
    train(a, one, 1, 2)
    c, d = network(), network(seed=1)
    two = make(c, d)
    two.load_state_dict(one.state_dict())
    assert same(tensors(one), tensors(two))


def test_parameters_that_were_frozen_and_left_out_have_no_state():
    """Version 0.1 left frozen parameters of a module out of the optimizer."""
    first, second = network(), network()
    for net in (first, second):
        net["second"].requires_grad_(False)
    old = Muon([(n, p) for n, p in first.named_parameters() if p.requires_grad])
    train(first, old, 1, 3)
    new = Muon(second)
    second.load_state_dict(first.state_dict())
    new.load_state_dict(through_a_file(old.state_dict()))
    assert not new.state[second["second"].weight]
    train(first, old, 4, 6)
    train(second, new, 4, 6)
    assert same(weights(first), weights(second))
    second["second"].requires_grad_(True)
    train(second, new, 7, 8)  # and train when they are thawed
    assert new.state[second["second"].weight]["step"] == 2


# other groups -------------------------------------------------------------------------------------


def by_decay(net, decay=0.1):
    named = dict(net.named_parameters())
    return [
        {"params": [(n, p) for n, p in named.items() if p.ndim > 1], "weight_decay": decay},
        {"params": [(n, p) for n, p in named.items() if p.ndim < 2], "weight_decay": 0.0},
    ]


# staggered refreshes of small weights depend on the groups, which are others here
@pytest.mark.parametrize("name", sorted(PLAIN.keys() - {"galore-stagger"}))
def test_settings_of_a_group_go_where_its_parameters_are(name):
    """Groups in another order, and one group cut in two."""
    cls, options = PLAIN[name]
    straight = network()
    optimizer = cls(by_decay(straight), lr=0.02, **options)
    optimizer.param_groups[1]["lr"] = 0.05
    train(straight, optimizer, 1, 3)
    saved, halfway = through_a_file(optimizer.state_dict()), weights(straight)
    train(straight, optimizer, 4, 7)
    net = network(OTHER)
    net.load_state_dict(halfway)
    vectors, matrices = reversed(by_decay(net))
    pieces = [{**matrices, "params": matrices["params"][i:j]} for i, j in ((0, 1), (1, 3))]
    second = cls([pieces[0], vectors, pieces[1]], lr=9.0, weight_decay=9.0, **options)
    second.load_state_dict(saved)
    assert [g["lr"] for g in second.param_groups] == [0.02, 0.05, 0.02]
    assert [g["weight_decay"] for g in second.param_groups] == [0.1, 0.0, 0.1]
    train(net, second, 4, 7)
    assert same(weights(straight), weights(net))


def test_groups_that_differ_in_what_one_group_cannot_hold_are_refused():
    net = network()
    optimizer = Muon(by_decay(net), lr=0.02)
    train(net, optimizer, 1, 2)
    saved = optimizer.state_dict()
    one = Muon(list(net.named_parameters()), lr=0.02)
    before = copy.deepcopy(one.state_dict())
    saved["param_groups"][1]["lr"] = 0.05
    with pytest.raises(ValueError, match=r"have lr 0\.02 and 0\.05, of which .* only one"):
        one.load_state_dict(saved)
    assert same(one.state_dict(), before)


@every_class
def test_decays_of_two_groups_become_factors_in_one(name):
    cls, options = PLAIN[name]
    straight = network()
    optimizer = cls(by_decay(straight), lr=0.02, **options)
    train(straight, optimizer, 1, 3)
    saved, halfway = through_a_file(optimizer.state_dict()), weights(straight)
    train(straight, optimizer, 4, 6)
    net = network(OTHER)
    net.load_state_dict(halfway)
    second = cls(net, lr=9.0, **options)
    second.load_state_dict(saved)
    (group,) = second.param_groups
    assert group["weight_decay"] == 0.1 and group["decays"] == [1.0, 0.0] * 3
    train(net, second, 4, 6)
    assert same(weights(straight), weights(net))


# files of version 0.1 -----------------------------------------------------------------------------


def as_first_version(saved, adamw_lr=None, named=True):
    """A state dict of one group as version 0.1 wrote it: matrices, then AdamW's group."""
    (group,) = saved["param_groups"]
    keys = ("decays", "views", "sides", "draws", "adamw_lr_ratio", "rules", "positions")
    rest = {key: value for key, value in group.items() if key not in keys}
    rest["adamw_lr"] = adamw_lr
    is_matrix = [isinstance(saved["state"][i]["step"], int) for i in group["params"]]
    order = [i for i, flag in enumerate(is_matrix) if flag]
    order += [i for i, flag in enumerate(is_matrix) if not flag]
    state = {new: saved["state"][group["params"][old]] for new, old in enumerate(order)}
    groups, count = [], sum(is_matrix)
    for rule, ids in ((group["method"], range(count)), ("adamw", range(count, len(order)))):
        part = {**rest, "rule": rule if named else ("adamw" if rule == "adamw" else None)}
        part["params"] = list(ids)
        for key in ("param_names", "roles", "reasons"):
            part.pop(key, None)
            if named:
                part[key] = [group[key][order[i]] for i in ids]
        if rule == "adamw" and adamw_lr is not None:
            part["lr"] = group["lr"] * group["adamw_lr_ratio"]
        groups.append(part)
    return {"state": state, "param_groups": groups}


def test_a_whole_group_keeps_its_place_beside_one_that_was_split():
    def made(split):
        A, B, v = (weight(shape, k) for k, shape in enumerate([(6, 4), (4, 6), (5,)]))
        parts = [[B], [v]] if split else [[B, v]]
        groups = [{"params": [A]}, *({"params": part} for part in parts)]
        if split:
            groups[2]["rule"] = "adamw"
        return (A, B, v), Muon(groups, lr=0.1)

    (params, old), (fresh, new) = made(True), made(False)
    run(old, params, [[torch.ones(p.shape)] for p in params])
    new.load_state_dict(old.state_dict())
    for p, q in zip(params, fresh, strict=True):
        assert old.state[p] and same(old.state[p], new.state[q])


def test_names_of_a_split_group_come_to_parameters_without_names():
    B, v = weight((4, 6)), weight((5,))
    old = Muon([{"params": [("b", B)]}, {"params": [("v", v)], "rule": "adamw"}], lr=0.1)
    new = Muon([weight((4, 6)), weight((5,))], lr=0.1)
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["param_names"] == ["b", "v"]


@pytest.mark.parametrize("at", [0, 1])
def test_a_key_of_one_group_alone_is_no_key_of_both(at):
    named = [("a", weight((4, 6))), ("b", weight((6, 4)))]
    groups = [{"params": [pair]} for pair in named]
    groups[at]["tag"] = "mine"
    saved = Muon(groups, lr=0.1).state_dict()
    with pytest.raises(ValueError, match="'mine'"):
        Muon(named, lr=0.1).load_state_dict(saved)


@every_class
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("scheduled", [1.0, 0.3, 0.0])
def test_a_split_group_of_the_first_version_becomes_one_again(name, named, scheduled):
    """With learning rates that a scheduler has changed, to 0 too."""
    cls, options = PLAIN[name]
    options = {**options, "adamw_lr": 0.003, "adamw_betas": (0.7, 0.9), "adamw_eps": 1e-6}
    make = (
        (lambda net: cls(net, lr=0.02, weight_decay=0.1, **options))
        if named
        else (lambda net: cls([*net.parameters()], lr=0.02, weight_decay=0.1, **options))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matrices without names
        straight, net = network(), network()
        optimizer, second = make(straight), make(net)
    for group in optimizer.param_groups:
        group["draws"] = "position"
        group["initial_lr"] = group["lr"]
        if "decays" in group:
            group["decays"] = [1.0] * len(group["decays"])
    # version 0.1 had the matrices first, and drew by these positions
    optimizer.param_groups[0]["positions"] = [0, 3, 1, 4, 2, 5]
    train(straight, optimizer, 1, 3)
    optimizer.param_groups[0]["lr"] *= scheduled
    old = as_first_version(optimizer.state_dict(), 0.003, named)
    old["param_groups"][1]["initial_lr"] = 0.003
    net.load_state_dict(straight.state_dict())
    second.load_state_dict(through_a_file(old))
    (group,) = second.param_groups
    assert group["adamw_lr_ratio"] == pytest.approx(0.003 / 0.02) and "adamw_lr" not in group
    assert (group["adamw_betas"], group["adamw_eps"]) == ((0.7, 0.9), 1e-6)
    assert group["rule"] is None and group["positions"] == [0, 3, 1, 4, 2, 5]
    if "decays" in group:
        assert group["decays"] == [1.0] * 6  # version 0.1 decayed every vector
    for group in (optimizer.param_groups[0], second.param_groups[0]):
        group["lr"] = 0.01
    train(straight, optimizer, 4, 7)
    train(net, second, 4, 7)
    assert same(weights(straight), weights(net))


def test_adamw_settings_of_a_file_of_the_first_version_stay_adamws():
    net = network()
    optimizer = GaLore(net, lr=0.02, rank=2, weight_decay=0.1)
    train(net, optimizer, 1, 2)
    old = as_first_version(optimizer.state_dict())
    old["param_groups"][1].update(betas=(0.5, 0.6), weight_decay=0.3, adamw_eps=1e-5, lr=0.01)
    fresh = GaLore(network(), rank=2)
    fresh.load_state_dict(old)
    (group,) = fresh.param_groups
    assert group["betas"] == (0.9, 0.999) and group["adamw_betas"] == (0.5, 0.6)
    assert (group["weight_decay"], group["adamw_weight_decay"]) == (0.1, 0.3)
    assert (group["adamw_eps"], group["adamw_lr_ratio"], group["lr"]) == (1e-5, 0.5, 0.02)
    assert group["rules"] == ["matrix", "adamw"] * 3


@every_class
def test_a_module_whose_group_was_given_to_adamw_loads_as_such(name):
    cls, options = PLAIN[name]
    nets = network(), network()
    first, second = (cls(net, lr=0.02, **options) for net in nets)
    first.param_groups[0]["rule"] = "adamw"
    train(nets[0], first, 1, 2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert {row.rule for row in second.assignment()} == {"adamw"}
    nets[1].load_state_dict(nets[0].state_dict())
    for net, optimizer in zip(nets, (first, second), strict=True):
        train(net, optimizer, 3, 4)
    assert same(weights(nets[0]), weights(nets[1]))


def test_groups_of_a_module_of_the_first_version_that_differ_are_refused():
    net = network()
    optimizer = Muon(net, lr=0.02)
    train(net, optimizer, 1, 2)
    old = as_first_version(optimizer.state_dict())
    first = old["param_groups"][0]
    lists = ("params", "param_names", "roles", "reasons")
    parts = [{**first, **{k: first[k][i:j] for k in lists}} for i, j in ((0, 1), (1, 3))]
    old["param_groups"] = [*parts, old["param_groups"][1]]
    fresh = Muon(network())
    fresh.load_state_dict(old)  # one per view and side, which agree
    parts[1]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"have momentum 0\.95 and 0\.5"):
        fresh.load_state_dict(old)


def test_views_of_groups_of_the_first_version_stay_with_their_weights():
    net = network()
    optimizer = Muon(net, lr=0.02)
    train(net, optimizer, 1, 2)
    old = as_first_version(optimizer.state_dict())
    first = old["param_groups"][0]
    lists = ("params", "param_names", "roles", "reasons")
    parts = [{**first, **{k: first[k][i:j] for k in lists}} for i, j in ((0, 1), (1, 3))]
    parts[1]["view"] = "heads:2"
    for i in (1, 2):  # a clock for each head
        entry = old["state"][i]
        old["state"][i] = {"momentum_buffer": entry["momentum_buffer"], "step": 2}
    old["param_groups"] = [*parts, old["param_groups"][1]]
    fresh = Muon(network())
    fresh.load_state_dict(old)
    (group,) = fresh.param_groups
    assert group["view"] == "auto"
    assert [group["views"][i] for i in (0, 2, 4)] == ["auto", "heads:2", "heads:2"]


# pickles ------------------------------------------------------------------------------------------

LATER_KEYS = [*COMMON, "draws", "adamw_lr_ratio", "rule"]


@pytest.mark.parametrize("name", [*PLAIN, *PAIRS])
def test_a_pickle_without_later_keys_goes_on(name):
    """An older optimizer knew fewer group keys, and its defaults fewer too."""
    cls, options = (PLAIN | PAIRS)[name]
    net = (network if name in PLAIN else adapted)()
    optimizer = cls(net, lr=0.02, **options)
    for group in optimizer.param_groups:
        group["draws"] = "position"  # as all did
    train(net, optimizer, 1, 3)
    state = optimizer.__getstate__()
    older = copy.deepcopy({**state, "net": net})
    for values in (older["defaults"], *older["param_groups"]):
        for key in LATER_KEYS:
            if key != "rule" or values.get("rule") is None:
                values.pop(key, None)
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.__dict__.clear()
    twin.__setstate__({key: value for key, value in older.items() if key != "net"})
    train(net, optimizer, 4, 6)
    train(older["net"], twin, 4, 6)
    assert same(weights(net), weights(older["net"]))
    extra = nn.Parameter(torch.ones(4, 4))
    if name in PLAIN:
        twin.add_param_group({"params": [("extra.weight", extra)]})


# the match itself ---------------------------------------------------------------------------------


def test_a_group_keeps_its_place_where_nothing_else_tells():
    params = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    saved = [{"params": [5]}, {"params": [6, 7]}]
    found = match(groups, saved, lambda group: [True] * len(group["params"]))
    assert [[place.id for place in row] for row in found.places] == [[5], [6, 7]]
    shorter = [{"params": [5, 6]}, {"params": [7]}]
    assert match(groups, shorter, lambda group: [True] * len(group["params"])) is None
