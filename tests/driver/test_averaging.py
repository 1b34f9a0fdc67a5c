"""Averages of weights: what docs/averaging.md says holds for every class."""

import copy

import pytest
import torch
from helpers.every_class import EVERY, problem, set_gradients
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stiefel.optimizers import Muon

TAU, SHARE = 5.0, 0.6
pytestmark = pytest.mark.filterwarnings("ignore:.* matrices ")


def made(cls, seed=0, **more):
    """A module that holds a class's small problem, and its optimizer."""
    groups, options, tensors = problem(cls, seed)
    return nn.ParameterList(tensors), cls(groups, lr=0.05, **options, **more)


def step(params, optimizer, t):
    set_gradients(params)
    for i, p in enumerate(params):
        p.grad = (p.grad + 0.1 * t * (i + 1)).cos()
    optimizer.step()


def average_of(module):
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / TAU))


@EVERY
def test_torchs_average_is_the_formula(cls):
    """E = W at the first update, then E <- E + (W - E) / tau after each step."""
    module, optimizer = made(cls)
    average, E = average_of(module), None
    for t in range(8):
        step(module, optimizer, t)
        if t >= 2:
            average.update_parameters(module)
            W = [p.detach().double() for p in module]
            E = W if E is None else [e + (w - e) / TAU for e, w in zip(E, W, strict=True)]
    for mean, e in zip(average.module, E, strict=True):
        torch.testing.assert_close(mean.detach().double(), e, rtol=0, atol=1e-6)


@EVERY
def test_blend_and_copy_back_leave_the_next_steps_as_they_would_be(cls):
    check_blend(made(cls), made(cls))


def test_a_norm_that_is_kept_is_not_measured_on_the_blend():
    check_blend(*(made(Muon, weight_norm="hyperball") for _ in range(2)))


def check_blend(disturbed, reference):
    (module, optimizer), (other, undisturbed) = disturbed, reference
    average = average_of(module)
    for t in range(6):
        step(module, optimizer, t)
        step(other, undisturbed, t)
        average.update_parameters(module)
        with torch.no_grad():
            kept = [p.clone() for p in module]
            for p, mean in zip(module, average.module, strict=True):
                p.lerp_(mean, SHARE)
            if t > 1:
                assert not all(map(torch.equal, module, kept))
            for p, w in zip(module, kept, strict=True):
                p.copy_(w)
    assert all(map(torch.equal, module, other))
    for p, q in zip(module, other, strict=True):
        for key, x in undisturbed.state[q].items():
            found = optimizer.state[p][key]
            assert torch.equal(found, x) if isinstance(x, torch.Tensor) else found == x


@EVERY
def test_state_belongs_to_the_tensor_and_not_to_its_values(cls):
    module, optimizer = made(cls)
    step(module, optimizer, 0)
    before = {id(p): {k: id(x) for k, x in optimizer.state[p].items()} for p in module}
    values = [torch.randn_like(p) for p in module]
    module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
    assert all(map(torch.equal, module, values))
    assert before == {id(p): {k: id(x) for k, x in optimizer.state[p].items()} for p in module}
    step(module, optimizer, 1)
    assert not any(map(torch.equal, module, values))
    old = list(module)
    values = [torch.randn_like(p) for p in module]
    module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)), assign=True)
    step(module, optimizer, 2)  # moves what is no longer there
    assert all(p is not q for p, q in zip(module, old, strict=True))
    assert all(map(torch.equal, module, values))


def test_an_average_of_bfloat16_weights_in_bfloat16_stands_still():
    """Each step toward 1.0234 is below half of the last digit; a float32 copy gets there."""
    low = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(low.weight)
    blind = AveragedModel(low, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / 150))
    wide = copy.deepcopy(low).float()
    fine = AveragedModel(wide, avg_fn=lambda mean, w, count: mean.lerp(w.to(mean.dtype), 1 / 150))
    refused = AveragedModel(wide, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / 150))
    for average in (blind, fine, refused):
        average.update_parameters(low)
    nn.init.constant_(low.weight, 1.0234)
    for _ in range(600):
        blind.update_parameters(low)
        fine.update_parameters(low)
    assert torch.equal(blind.module.weight, torch.ones(4, 4, dtype=torch.bfloat16))
    torch.testing.assert_close(fine.module.weight, low.weight.float(), rtol=0, atol=1e-3)
    with pytest.raises(RuntimeError, match="dtype"):
        refused.update_parameters(low)


def test_a_resumed_average_goes_on_in_equal_bits():
    runs = []
    for stops in (False, True):
        module, optimizer = made(Muon)
        average = average_of(module)
        for t in range(6):
            if stops and t == 3:
                saved = copy.deepcopy([x.state_dict() for x in (module, optimizer, average)])
                module, optimizer = made(Muon, seed=1)
                average = average_of(module)
                for part, state in zip((module, optimizer, average), saved, strict=True):
                    part.load_state_dict(state)
            step(module, optimizer, t)
            average.update_parameters(module)
        runs.append([*module, *average.module])
    assert all(map(torch.equal, *runs))
