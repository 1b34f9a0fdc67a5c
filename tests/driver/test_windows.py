"""When refreshes come, and which blocks keep state when: staggering, windows, places."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.methods import METHODS
from helpers.problems import gradients, refreshes, run, same, tensors, weight
from helpers.rules import PickRule, driver

from stiefel.optimizers import FRUGAL, BlockPosition, Dense, GaLore, Rule, Slot, StackedOptimizer
from stiefel.optimizers._driver.buckets import StepPlan

LARGE = (256, 160)  # above the limit of stacks


def galore(params, **options):
    return GaLore(params, rank=4, update_proj_gap=6, projection="random", **options)


def test_without_stagger_all_refresh_together():
    params = [weight(LARGE, i) for i in range(3)]
    assert refreshes(galore(params), params, 14) == [[1, 7, 13]] * 3


def test_stagger_spreads_refreshes_evenly_after_the_first():
    params = [weight(LARGE, i) for i in range(3)]
    found = refreshes(galore(params, stagger=True), params, 20)
    assert found == [[1, 7, 13, 19], [1, 5, 11, 17], [1, 3, 9, 15]]
    later = [step for at in found for step in at if step > 1]
    assert len(later) == len(set(later))  # one weight a step: none stalls


def test_stagger_keeps_stacks_of_small_matrices_together():
    params = [weight((12, 10), i) for i in range(4)] + [weight(LARGE, 9)]
    found = refreshes(galore(params, stagger=True), params, 13)
    assert found[:4] == [[1, 7, 13]] * 4
    assert found[4] == [1, 4, 10]


def test_stagger_with_more_weights_than_steps_has_few_a_step():
    params = [weight(LARGE, i) for i in range(13)]
    found = refreshes(galore(params, stagger=True), params, 13)
    counts = [sum(step in at for at in found) for step in range(2, 14)]
    assert max(counts) <= 3
    assert all(step - before <= 6 for at in found for before, step in itertools.pairwise(at))


def test_stagger_of_one_group_only_and_of_rules_that_count_from_one():
    params = [weight(LARGE, i) for i in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:], "stagger": True}]
    found = refreshes(galore(groups), params, 13)
    assert found == [[1, 7, 13]] * 2 + [[1, 7, 13], [1, 4, 10]]
    p = [weight(LARGE, i) for i in range(2)]
    optimizer = driver(PickRule(gap=4, order=1), stagger=True)(p)
    assert refreshes(optimizer, p, 9) == [[1, 4, 8], [1, 2, 6]]


def test_stagger_changes_only_when_a_weight_refreshes():
    """Each weight runs as it would alone with that shift; resume is bit-identical."""
    params = [weight(LARGE, i) for i in range(2)]
    grads = [gradients(LARGE, 9, i) for i in range(2)]
    optimizer = galore(params, stagger=True)
    run(optimizer, params, [g[:5] for g in grads])
    saved = through_a_file(optimizer.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = galore(copies, stagger=True)
    resumed.load_state_dict(saved)
    a = run(optimizer, params, [g[5:] for g in grads])
    assert same(a, run(resumed, copies, [g[5:] for g in grads]))
    assert same(tensors(optimizer), tensors(resumed))
    alone = [weight(LARGE, 0)]
    W = run(galore(alone), alone, [grads[0]])
    assert same(a[-1][0], W[-1][0])  # the first is not shifted


def test_stagger_can_be_switched_in_a_group():
    params = [weight(LARGE, i) for i in range(2)]
    optimizer = galore(params)
    refreshes(optimizer, params, 1)
    optimizer.param_groups[0]["stagger"] = True
    for p in params:
        p.grad = gradients(LARGE, 1)[0]
    for _ in range(3):
        optimizer.step()
    assert [optimizer.state[p]["refreshed"] for p in params] == [1, 4]


@dataclass(frozen=True)
class TogetherRule(PickRule):
    """Windows that begin for all weights at once."""

    refresh_in_lockstep = True


def test_stagger_is_refused_where_windows_belong_together():
    with pytest.raises(ValueError, match="stagger=True does not go with Together as set here"):
        driver(TogetherRule(), stagger=True)([weight(LARGE)])


@dataclass(frozen=True)
class TurnsRule(Rule):
    """Block b of N is at work in windows b, b + N, ...; `labels` names the blocks."""

    labels: tuple[int, ...] | None = None
    window: int = 2

    def block_labels(self, names):
        return self.labels or [None if n is None else n.split(".")[0] for n in names]

    def state(self, m, n):
        return {"exp_avg": Slot("mn")}

    def state_since_at(self, position: BlockPosition, t):
        turn, start = (t - 1) // self.window, (t - 1) // self.window * self.window + 1
        return start if turn % position.count == position.number else 0

    def update(self, w):
        if not w.state_since:
            return w.step(Dense(w.grad.sign()))
        M = w.state["exp_avg"].lerp_(w.grad, 0.5)
        return w.step(Dense(M / (1 - 0.5 ** (w.t - w.state_since + 1))))


def at_work(optimizer, params, steps):
    found = []
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradients(p.shape, 1, seed=step + i)[0]
        optimizer.step()
        found.append(tuple(i for i, p in enumerate(params) if "exp_avg" in optimizer.state[p]))
    return found


@pytest.mark.parametrize("shape", [(6, 5), LARGE])
def test_every_parameter_is_a_block_where_labels_say_nothing(shape):
    params = [weight(shape, i) for i in range(3)]
    optimizer = driver(TurnsRule())(params)
    assert at_work(optimizer, params, 8) == [(0,), (0,), (1,), (1,), (2,), (2,), (0,), (0,)]


def test_equal_labels_are_one_block_over_all_groups_and_vectors_count_for_nothing():
    params = [weight((6, 5), i) for i in range(4)]
    bias = torch.nn.Parameter(torch.zeros(5))
    groups = [
        {"params": [("b", bias), ("one.q", params[0]), ("two.q", params[1])]},
        {"params": [("one.k", params[2]), ("two.k", params[3])], "lr": 0.05},
    ]
    optimizer = StackedOptimizer(groups, TurnsRule(), 0.1)
    assert at_work(optimizer, params, 4) == [(0, 2), (0, 2), (1, 3), (1, 3)]
    fused = weight((6, 5), 5)  # blocks of one parameter stay together
    cut = StackedOptimizer([fused, params[0]], TurnsRule(), 0.1, view="rows:2,4")
    assert [unit.block_position for unit in cut._get_plan().units] == [
        BlockPosition(0, 2), BlockPosition(0, 2), BlockPosition(1, 2), BlockPosition(1, 2)
    ]  # fmt: skip


def test_numbers_may_name_the_blocks_and_state_begins_anew_with_each_turn():
    params = [weight((6, 5), i) for i in range(3)]
    optimizer = StackedOptimizer(params, TurnsRule(labels=(7, 9, 7)), 0.1)
    assert at_work(optimizer, params, 6) == [(0, 2), (0, 2), (1,), (1,), (0, 2), (0, 2)]
    p, fresh = weight((6, 5)), weight((6, 5))
    pair = [p, weight((6, 5), 1)]
    two = StackedOptimizer(pair, TurnsRule(), 0.1)
    grads = [gradients((6, 5), 6, i) for i in range(2)]
    W = run(two, pair, grads)
    for step in range(6):  # in its windows an average that starts at zero, else the sign
        G = grads[0][step]
        if step in (0, 4):
            M = torch.zeros_like(G)
        if step in (0, 1, 4, 5):
            M = M.lerp(G, 0.5)
            fresh.data.add_(M / (1 - 0.5 ** (step % 4 + 1)), alpha=-0.1)
        else:
            fresh.data.add_(G.sign(), alpha=-0.1)
        torch.testing.assert_close(W[step][0], fresh.detach(), rtol=0, atol=1e-6)


def test_windows_are_those_of_the_weights_own_clock():
    params = [weight((6, 5), i) for i in range(2)]
    optimizer = driver(TurnsRule())(params)
    grads = [gradients((6, 5), 5, i) for i in range(2)]
    grads[0][1] = None
    for step in range(4):
        for p, series in zip(params, grads, strict=True):
            p.grad = series[step]
        optimizer.step()
    # the first has made three updates and so begins its second window, the other ends it
    assert [optimizer.state[p]["step"] for p in params] == [3, 4]
    assert ["exp_avg" in optimizer.state[p] for p in params] == [False, True]


def test_values_that_a_scheduler_rewrites_keep_the_plan_and_others_make_it_anew():
    params = [weight((6, 5), i) for i in range(4)]
    optimizer = FRUGAL(params, split="block", density=0.5, update_gap=2, block_order="ascending")
    assert at_work(optimizer, params, 1) == [(0, 1)]
    plan, group = optimizer._plan, optimizer.param_groups[0]
    group["betas"] = (0.8, 0.99)
    assert at_work(optimizer, params, 2) == [(0, 1), (2, 3)]
    assert optimizer._plan is plan
    group["update_gap"] = 3  # the fourth update is now the first of the second window
    assert at_work(optimizer, params, 1) == [(2, 3)]
    assert at_work(optimizer, params, 3) == [(2, 3), (2, 3), (0, 1)]
    group["density"] = 0.25
    assert at_work(optimizer, params, 1) == [(2,)]
    group.update(block_of=(0, 1, 0, 1), density=0.5)
    assert at_work(optimizer, params, 1)[0] in [(0, 2), (1, 3)]
    assert optimizer._plan is not plan


def test_staggered_units_follow_another_gap():
    params = [weight(LARGE, i) for i in range(2)]
    optimizer = galore(params, stagger=True)
    refreshes(optimizer, params, 2)
    plan = optimizer._plan
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    optimizer.step()
    assert optimizer._plan is plan
    optimizer.param_groups[0]["update_proj_gap"] = 4
    optimizer.step()
    assert [unit.shift for unit in optimizer._plan.units] == [0, 2]


@pytest.mark.parametrize("name", METHODS)
def test_units_are_sorted_once_while_nothing_changes(name, monkeypatch):
    shapes, calls, rebuild = [(8, 6), (8, 6), (6, 9)], [], StepPlan.rebuild
    monkeypatch.setattr(StepPlan, "rebuild", lambda *args: calls.append(1) or rebuild(*args))
    params = [weight(shape, i) for i, shape in enumerate(shapes)]
    run(METHODS[name](params), params, [gradients(shape, 5, i) for i, shape in enumerate(shapes)])
    assert len(calls) == (2 if name == "frugal-block" else 1)  # a window begins
