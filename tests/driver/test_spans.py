"""One group for each parameter: equal matrices still run as one stack, each with its own lr."""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.problems import gradients, run, same, tensors, weight
from helpers.shapes import SQUARE, TALL, WIDE

from stiefel.optimizers import Muon

STEPS = 5
SHAPES = [SQUARE, TALL, WIDE, SQUARE, TALL, WIDE, SQUARE]
# FRUGAL's blocks draw their turns over all parameters of an optimizer, whatever their groups
ALONE_DIFFERS = {"frugal-block"}


def groups(params, **first):
    """A group for each parameter, with learning rates and decays that differ for all but two."""
    made = [
        {"params": [(f"layers.{i}.weight", p)], "lr": 0.02 * 0.9**i, "weight_decay": 0.01 * i}
        for i, p in enumerate(params)
    ]
    made[3].update(lr=made[0]["lr"], weight_decay=made[0]["weight_decay"])
    return [{**made[0], **first}, *made[1:]]


def problem(dtype=torch.float32):
    params = [weight(shape, i).to(dtype) for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(p.detach()) for p in params]
    grads = [[G.to(dtype) for G in gradients(shape, STEPS, i)] for i, shape in enumerate(SHAPES)]
    return params, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_groups_of_one_run_as_stacks_with_the_bits_of_single_steps(method, dtype):
    params, grads = problem(dtype)
    optimizer = METHODS[method](groups(params))
    joint = run(optimizer, params, grads)
    for i in range(len(SHAPES)) if method not in ALONE_DIFFERS else ():
        params, grads = problem(dtype)
        alone = run(METHODS[method]([groups(params)[i]]), [params[i]], [grads[i]])
        assert same([W[i] for W in joint], [W[0] for W in alone]), i


def test_equal_matrices_of_many_groups_are_one_stack():
    params, grads = problem()
    optimizer = Muon(groups(params))
    run(optimizer, params, grads)
    assert sorted(len(bucket.units) for bucket in optimizer._plan.buckets) == [2, 2, 3]


@pytest.mark.parametrize(
    "other", [{"momentum": 0.5}, {"maximize": True}, {"state_dtype": "bfloat16"}], ids=str
)
def test_groups_that_differ_in_more_than_scalars_stay_apart(other):
    params, grads = problem()
    optimizer = Muon(groups(params, **other))
    joint = run(optimizer, params, grads)
    assert sorted(len(bucket.units) for bucket in optimizer._plan.buckets) == [1, 2, 2, 2]
    params, grads = problem()
    alone = run(Muon([groups(params, **other)[0]]), [params[0]], [grads[0]])
    assert same([W[0] for W in joint], [W[0] for W in alone])


def test_a_group_that_changes_alone_leaves_its_stack_and_comes_back():
    params, grads = problem()
    optimizer = Muon(groups(params))
    reference, again = copy.deepcopy((params, grads)), copy.deepcopy(optimizer)
    alone_params = [p for group in again.param_groups for p in group["params"]]
    for step in range(STEPS):
        momentum = 0.5 if step in (1, 2) else 0.95
        for o, ps in ((optimizer, params), (again, alone_params)):
            o.param_groups[0]["momentum"] = momentum
            for p, G in zip(ps, grads, strict=True):
                p.grad = G[step].clone()
            if o is again:
                o._plan = None  # always sorted anew
            o.step()
    assert same(params, alone_params) and len(reference) == 2
    assert sorted(len(bucket.units) for bucket in optimizer._plan.buckets) == [2, 2, 3]


def test_a_bad_gradient_of_one_group_leaves_the_stack_of_the_others():
    params, grads = problem()
    optimizer = Muon(groups(params))
    for p, G in zip(params, grads, strict=True):
        p.grad = G[0].clone()
    params[3].grad[0, 0] = float("nan")
    before = params[3].detach().clone()
    with pytest.warns(UserWarning, match=r"layers\.3\.weight"):
        optimizer.step()
    assert torch.equal(params[3], before) and optimizer.skipped == {"layers.3.weight": 1}
    values = [x for x in tensors(optimizer).values() if isinstance(x, torch.Tensor)]
    assert values and all(x.isfinite().all() for x in values)
