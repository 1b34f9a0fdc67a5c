"""``cautious``, ``decay_schedule`` and ``decay_lr``: decay of every class and form, by formula."""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat
from helpers.problems import gradients, run, same, tensors, weight
from helpers.recordings import fixture, tolerance
from helpers.rounding import every_form
from helpers.rules import PlainRule, driver

from stiefel.optimizers import SwitchLoRA, pairs_to_groups
from stiefel.optimizers._driver import write

DOUBLE = torch.float64
LR, DECAY = 1e-3, 2.0


def by_switchlora(triples, **options):
    """Vectors are exchanged at every second step, and rest for one."""
    return SwitchLoRA(
        pairs_to_groups(triples, scale=0.5),
        **{"ratio": None, "interval0": 4, "freeze_steps": 1, **options},
    )


def forked(optimizer, params, grads, **keys):
    """Weights after one more step of a copy, with other keys in its groups."""
    optimizer, params = copy.deepcopy((optimizer, params))
    for group in optimizer.param_groups:
        group.update(keys)
    return run(optimizer, params, [[G] for G in grads])[0]


def check_masks(optimizer, params, steps, *, bound=1e-11, moves_before=False, sign=1.0):
    """At every step, an entry decays as without ``cautious`` or not at all, as the step tells.

    Args:
        optimizer: Without decay.
        params: Its parameters that have gradients.
        steps: A list of gradients for each step.
        bound: Largest difference, in shares of the largest decay.
        moves_before: Whether a refresh moves weights before they are stepped.
        sign: -1 shows that the test fails where the mask is the opposite.
    """
    numbers = list[tuple[int, int]]()
    for grads in steps:
        none = forked(optimizer, params, grads)
        plain = forked(optimizer, params, grads, weight_decay=DECAY)
        cautious = forked(optimizer, params, grads, weight_decay=DECAY, cautious=True)
        for p, n, d, c in zip(params, none, plain, cautious, strict=True):
            decay = d - n
            W = -decay / (LR * DECAY) if moves_before else p.detach()
            opposes = sign * (W - n) * W < 0
            numbers.append((int(opposes.sum()), W.numel()))
            expected = torch.where(opposes, 0.0, decay)
            torch.testing.assert_close(
                c - n, expected, rtol=0, atol=bound * float(decay.abs().max())
            )
        run(optimizer, params, [[G] for G in grads])
    opposed, all_entries = map(sum, zip(*numbers, strict=True))
    assert 0.1 * all_entries < opposed < 0.9 * all_entries


def series_of(params, steps=3):
    """Gradients for each step."""
    series = [gradients(p.shape, steps, i, DOUBLE) for i, p in enumerate(params)]
    return [list(step) for step in zip(*series, strict=True)]


@pytest.mark.parametrize("name", METHODS)
def test_entries_that_the_step_opposes_do_not_decay(name, monkeypatch):
    monkeypatch.setattr(write, "WRITE_PANEL", 30)
    groups = every_form(DOUBLE)
    optimizer = METHODS[name](groups, lr=LR, weight_decay=0.0)
    params = [p for group in groups for p in group["params"]]
    check_masks(optimizer, params, series_of(params, 1), bound=1e-8)


@pytest.mark.parametrize("name", ["galore", "frugal-columns", "auon", "muon"])
def test_the_mask_follows_an_ascent(name):
    params = [weight((12, 8), 0, DOUBLE), weight((6,), 1, DOUBLE)]
    groups = [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]
    optimizer = METHODS[name](groups, lr=LR, weight_decay=0.0, maximize=True)
    check_masks(optimizer, params, series_of(params))


@pytest.mark.parametrize("compat", [None, "reference"])
def test_the_mask_of_the_published_order_is_that_of_the_weight_before(compat):
    for name in ("galore", "fira", "frugal-svd"):
        params = [weight((12, 8), 0, DOUBLE), weight((9,), 1, DOUBLE)]
        groups = [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]
        own = {"reset": "all"} if name == "frugal-svd" and compat else {}
        optimizer = METHODS[name](groups, lr=LR, weight_decay=0.0, compat=compat, **own)
        check_masks(optimizer, params, series_of(params))


@pytest.mark.parametrize("name", PAIRS)
def test_factors_decay_where_their_step_does_not_oppose_them(name):
    """The second factor of some sees the first as it has moved, so its step depends on decay."""
    tuples = [factors(*shape, seed=i, dtype=DOUBLE) for i, shape in enumerate([(10, 7, 3)] * 2)]
    optimizer = PAIRS[name](tuples, lr=LR, weight_decay=0.0)
    check_masks(optimizer, flat(tuples), series_of(flat(tuples)), bound=0.05)


def test_vectors_that_rest_do_not_decay_and_others_by_their_step():
    tuples = [factors(*shape, seed=i, dtype=DOUBLE) for i, shape in enumerate([(10, 7, 3)] * 2)]
    W0s = [weight((10, 7), 90 + i, DOUBLE).requires_grad_(False) for i in range(2)]
    triples = [(A, B, W0) for (A, B), W0 in zip(tuples, W0s, strict=True)]
    optimizer, params = by_switchlora(triples, lr=LR), flat(tuples)
    check_masks(optimizer, params, series_of(params, 5), moves_before=True, bound=1e-8)
    assert any("frozen" in key or "rest" in key for key in optimizer.state[params[0]]), list(
        optimizer.state[params[0]]
    )


def test_the_check_of_masks_sees_the_opposite_mask():
    params = [weight((12, 8), 0, DOUBLE)]
    optimizer = METHODS["galore"](params, lr=LR, weight_decay=0.0)
    with pytest.raises(AssertionError):
        check_masks(optimizer, params, series_of(params), sign=-1.0)


def test_recorded_trajectory_of_a_masked_decay():
    """The record has a step of its own: 0.3 G, with decay at lr 0.05."""
    data = fixture("cautious-square")
    settings = data["settings"]
    lr, bound = settings["adjusted_lr"], tolerance(data, "max_abs_diff_to_float64_run")
    decay = settings["weight_decay"] * settings["base_lr"] / lr
    p = torch.nn.Parameter(data["W0"].clone())
    (group,) = (optimizer := driver(PlainRule(), decay)([p])).param_groups
    group.update(lr=lr, cautious=True)
    for G, want in zip(data["grads"], data["W"], strict=True):
        (got,) = run(optimizer, [p], [[G]])[0]
        torch.testing.assert_close(got, want, rtol=0, atol=bound)


# the option off, and what it does not touch -------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_mask_is_not_made_where_nothing_decays(name, monkeypatch):
    """Bits and state are those without the option, and no panel is masked."""

    def final(**options):
        groups = every_form(torch.float32)
        optimizer = METHODS[name](groups, lr=0.02, **options)
        params = [p for group in groups for p in group["params"]]
        out = run(optimizer, params, [gradients(p.shape, 2, i) for i, p in enumerate(params)])
        return out[-1], tensors(optimizer)

    monkeypatch.setattr(write, "_write_cautiously", None)
    plain, masked = (final(weight_decay=0.0, cautious=flag) for flag in (False, True))
    assert same(plain[0], masked[0]) and same(plain[1], masked[1])
    final(weight_decay=0.5, cautious=False)


def test_small_numbers_have_the_mask_of_large_ones():
    """The product of step and weight would be 0, which counts as agreement."""
    for scale in (1.0, 1e-30):
        p = torch.nn.Parameter(scale * torch.tensor([[1.0, -1.0], [1.0, 0.0]]))
        optimizer = driver(PlainRule(), 1.0)([p])
        optimizer.param_groups[0]["cautious"] = True
        p.grad = scale * torch.tensor([[0.5, 0.5], [-0.5, 0.0]])
        optimizer.step()
        expected = scale * torch.tensor([[1 - 0.1 - 0.05, -1 - 0.05], [1 + 0.05, 0.0]])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
