"""Random draws go by the names of parameters where all have one, else by their positions."""

import copy

import pytest
import torch
from helpers.problems import gradients, run, same, weight
from torch import nn

from stiefel.optimizers import FRUGAL, GaLore, Muon, SwitchLoRA, pairs_to_groups

SHAPE, STEPS = (12, 8), 4
DRAWING = {
    "FRUGAL": lambda params: FRUGAL(params, lr=0.01, density=0.5, update_gap=2),
    "FRUGAL rows": lambda params: FRUGAL(params, lr=0.01, split="rows", update_gap=2),
    "FRUGAL entries": lambda params: FRUGAL(params, lr=0.01, split="randk", update_gap=2),
    "FRUGAL random": lambda params: FRUGAL(params, lr=0.01, split="random", update_gap=2),
    "GaLore random": lambda params: GaLore(
        params, lr=0.01, rank=2, update_proj_gap=2, projection="random"
    ),
    "GaLore randk": lambda params: GaLore(
        params, lr=0.01, rank=2, update_proj_gap=2, projection="randk"
    ),
    "GaLore range": lambda params: GaLore(
        params, lr=0.01, rank=2, update_proj_gap=2, projection="range"
    ),
    "Muon low rank": lambda params: Muon(
        params, lr=0.01, polar="low_rank", rank=2, oversample=0, power=0
    ),
}
ALL = pytest.mark.parametrize("make", DRAWING.values(), ids=DRAWING)
NAMES = ["layers.0.weight", "layers.1.weight", "layers.2.weight"]


def layers():
    """Equal weights and gradients, so that only the draws can tell them apart."""
    params = [weight(SHAPE, 0) for _ in NAMES]
    return params, [gradients(SHAPE, STEPS, 0) for _ in NAMES]


def named(params, prefix=""):
    return [(prefix + name, p) for name, p in zip(NAMES, params, strict=True)]


@ALL
def test_one_optimizer_per_named_parameter_draws_as_one_for_all(make):
    params, grads = layers()
    joint = run(make(named(params)), params, grads)[-1]
    assert not same(joint[0], joint[1])
    for i, name in enumerate(NAMES):
        params, grads = layers()
        alone = run(make([(name, params[i])]), [params[i]], [grads[i]])[-1]
        assert same(alone[0], joint[i])


@ALL
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]], ids=str)
def test_order_and_wrappers_do_not_move_named_draws(make, order):
    params, grads = layers()
    plain = run(make(named(params)), params, grads)[-1]
    params, grads = layers()
    pairs = named(params, "_orig_mod.module._checkpoint_wrapped_module.")
    moved = run(make([pairs[i] for i in order]), params, grads)[-1]
    assert same(plain, moved)


@ALL
def test_draws_without_names_go_by_position(make):
    params, grads = layers()
    optimizer = make(params)
    assert optimizer.param_groups[0]["draws"] == "position"
    joint = run(optimizer, params, grads)[-1]
    assert not same(joint[0], joint[1])
    params, grads = layers()
    alone = run(make([params[0]]), [params[0]], [grads[0]])[-1]
    assert same(alone[0], joint[0])


@ALL
def test_a_checkpoint_without_the_key_means_positions(make):
    params, grads = layers()
    old = make(named(params))
    for group in old.param_groups:
        group["draws"] = "position"
    before = [G[:2] for G in grads], [G[2:] for G in grads]
    run(old, params, before[0])
    saved = copy.deepcopy(old.state_dict())
    del saved["param_groups"][0]["draws"]
    weights = [p.detach().clone() for p in params]
    expected = run(old, params, before[1])[-1]
    resumed = [nn.Parameter(W) for W in weights]
    optimizer = make(named(resumed))
    assert optimizer.param_groups[0]["draws"] == "name"
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["draws"] == "position"
    assert same(run(optimizer, resumed, before[1])[-1], expected)


def test_switchlora_draws_by_name():
    def triple(name):
        torch.manual_seed(0)
        A, B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        return (f"{name}.A", A), (f"{name}.B", B), (f"{name}.W", torch.zeros(6, 8))

    found = {}
    for names in (["a"], ["b"], ["b", "a"]):
        triples = [triple(name) for name in names]
        groups = pairs_to_groups(triples, scale=1.0)
        optimizer = SwitchLoRA(groups, lr=0.01, ratio=None, interval0=2, freeze_steps=1)
        for _ in range(6):
            for (_, A), (_, B), _ in triples:
                A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
            optimizer.step()
        for name, ((_, A), _, (_, W)) in zip(names, triples, strict=True):
            assert W.any()
            found.setdefault(name, []).append(optimizer.state[A]["pool"])
    assert same(*found["a"]) and same(*found["b"]) and not same(found["a"][0], found["b"][0])
