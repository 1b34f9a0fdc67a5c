"""State is stored back: whatever an update makes of it is there at the next one and in the file.

A lost write shows in three ways, and each is a test over every class and every dtype of the state:
a tensor that never moves, one that is far from the same run's state in full precision, and a run
that goes on differently from its own checkpoint.
"""

from itertools import pairwise

import pytest
import torch
from helpers.checkpoints import check_resume
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat, pair_gradients
from helpers.problems import gradients, run, same, tensors, weight

from stiefel.optimizers import SwitchLoRA, pairs_to_groups
from stiefel.optimizers._driver import units

STEPS, SHAPES = 6, [(24, 10), (10, 24), (24, 10)]
STATE_DTYPES = ["float32", "bfloat16", "int8"]
BASES = ("basis", "basis_right", "basis_scale", "basis_right_scale")
RARE = ("index", "age", "projector", "rotation", "polar_report", *BASES)
"""State that only a refresh, or every few steps, writes."""
IN_TURN = {"altlora-alternate"}
"""Methods whose factors move in turn, and with them their state."""
AT_REST = {("altlora-compact", "carry")}
"""What is the identity after each step for one member: the other one moves first and uses it up."""
APART = {"index", "age", "projector", "projector_right", "error", "rotation", "norm"}
"""State that a rounded momentum may turn or choose anew, and codes, which are compared by runs."""
TOLERANCE = {"bfloat16": 0.08, "int8": 0.15}


def pairs_of(name):
    shapes = [(10, 7, 3), (6, 9, 4)]
    params = flat(factors(*shape, i) for i, shape in enumerate(shapes))
    grads = flat(pair_gradients(*shape, STEPS, i) for i, shape in enumerate(shapes))

    def make(params, **kw):
        return PAIRS[name](list(zip(params[::2], params[1::2], strict=True)), **kw)

    return params, make, grads


def problem(name):
    """(parameters, maker of an optimizer of them, gradients)."""
    if name in PAIRS:
        return pairs_of(name)
    grads = [gradients(shape, STEPS, i) for i, shape in enumerate(SHAPES)]
    return [weight(shape, i) for i, shape in enumerate(SHAPES)], METHODS[name], grads


@pytest.fixture(autouse=True)
def small_state_is_quantized(monkeypatch):
    monkeypatch.setattr(units, "MIN_QUANTIZED_NUMEL", 4)


every_method = pytest.mark.parametrize("name", [*METHODS, *PAIRS])
every_dtype = pytest.mark.parametrize("state_dtype", STATE_DTYPES)


@pytest.mark.covering
@every_dtype
@every_method
def test_every_tensor_of_the_state_moves_and_stays_finite(name, state_dtype):
    params, make, grads = problem(name)
    optimizer = make(params, state_dtype=state_dtype)
    seen = []
    for step in range(STEPS):
        run(optimizer, params, [series[step : step + 1] for series in grads])
        seen.append(tensors(optimizer))
    for key, last in seen[-1].items():
        if not isinstance(last, torch.Tensor):
            continue
        assert bool(last.isfinite().all()), key
        if key[1].partition(".")[0] not in RARE and last.numel() > 1:
            assert bool(last.any()), f"{key} is zero"
            held = [step[key] for step in seen if key in step]
            moves = [not torch.equal(x, y) for x, y in pairwise(held)]
            enough = any if name in IN_TURN else all
            assert enough(moves) or (name, key[1]) in AT_REST, f"{key} stood still"


@pytest.mark.covering
@pytest.mark.parametrize("state_dtype", STATE_DTYPES[1:])
@every_method
def test_rounded_state_is_near_the_state_in_full_precision(name, state_dtype):
    states = []
    for dtype in (None, state_dtype):
        params, make, grads = problem(name)
        optimizer = make(params, state_dtype=dtype, lr=1e-6)  # the same gradients meet both
        run(optimizer, params, [series[:3] for series in grads])
        states.append(decoded(optimizer))
    full, rounded = states
    assert full.keys() == rounded.keys()
    for key, X in full.items():
        if key[1].partition(".")[0] in APART or not X.is_floating_point():
            continue
        size = X.double().norm().clamp(min=1e-12)
        error = (rounded[key].double() - X.double()).norm() / size
        assert error <= TOLERANCE[state_dtype], f"{key}: {float(error):.3f}"


def decoded(optimizer):
    """Every state tensor by position and key, codes as the numbers that they stand for."""
    found = {}
    for bucket in optimizer._plan.buckets:
        for i, (plain, codes) in enumerate(zip(bucket.states, bucket.dequantized(), strict=True)):
            views = {name: bucket._rule_view(i, name, X) for name, X in codes.items()}
            for name, X in {**plain, **views}.items():
                found[(bucket.units[0].positions[i], name)] = X.clone()
    return found


@pytest.mark.covering
@every_dtype
@every_method
def test_a_loaded_state_goes_on_as_the_run_does(name, state_dtype):
    def make():
        params, build, _ = problem(name)
        return params, build(params, state_dtype=state_dtype)

    check_resume(make, problem(name)[2], 3)


@every_dtype
def test_switching_stores_its_state_too(state_dtype):
    def make():
        A, B = factors(10, 7, 3)
        W0 = weight((10, 7), 90).requires_grad_(False)
        optimizer = SwitchLoRA(
            pairs_to_groups([(A, B, W0)], scale=0.5), lr=0.02, state_dtype=state_dtype,
            interval0=4, freeze_steps=1, ratio=None,
        )  # fmt: skip
        return [A, B, W0], optimizer

    grads = [*pair_gradients(10, 7, 3, STEPS), [None] * STEPS]
    check_resume(make, grads, 3)
    params, optimizer = make()
    seen = []
    for step in range(3):
        run(optimizer, params, [series[step : step + 1] for series in grads])
        seen.append(tensors(optimizer))
    for key in seen[-1]:
        if key[1].startswith("exp_avg") and "scale" not in key[1]:
            assert not same(seen[-1][key], seen[-2][key]), key


@every_method
def test_late_flags_store_what_early_ones_store(name):
    """Without a wait the driver masks or restores state itself; a bad gradient changes nothing."""
    results = []
    for wait in (None, False):
        params, make, grads = problem(name)
        for series in (grads[0], grads[-1]):
            series[2] = torch.full_like(series[2], torch.nan)
        optimizer = make(params)
        step = optimizer.step
        weights = []
        for t in range(STEPS):
            # where the host waits at a refresh anyway, all flags are early
            optimizer._wait = wait
            for p, series in zip(params, grads, strict=True):
                p.grad = series[t].clone()
            step()
            weights.append([p.detach().clone() for p in params])
        skipped = optimizer.skipped
        results.append((weights, tensors(optimizer), skipped))
    assert same(*results)


@every_method
def test_one_bad_gradient_leaves_its_own_weight_and_state_alone(name):
    for wait in (None, False):
        params, make, grads = problem(name)
        optimizer = make(params)
        optimizer._wait = wait
        run(optimizer, params, [series[:2] for series in grads])
        optimizer.state_dict()  # late flags are read
        before, state = [p.detach().clone() for p in params], tensors(optimizer)
        for p, series in zip(params, grads, strict=True):
            p.grad = series[2].clone()
        params[0].grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.state_dict()
        size = 2 if name in PAIRS else 1
        after = tensors(optimizer)
        for i in range(size):
            assert torch.equal(params[i], before[i])
            for key in state:
                if key[0] == i:
                    assert same(after[key], state[key]), (wait, key)
        moving = range(size, len(params)) if name not in IN_TURN else [size]
        for i in moving:
            assert not torch.equal(params[i], before[i]), (wait, i)
