"""SwitchLoRA: what a switch changes and keeps, recorded trajectories, pools, checkpoints."""

import copy
import io
import itertools
import json
import math
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from helpers.allocations import count_step
from helpers.pair_problems import DOUBLE, LeastSquares, close, factors, flat, follow, pair_gradients
from helpers.paths import FIXTURES
from helpers.problems import run, same, tensors, weight
from oracles import switchlora as switchlora_oracle

from stiefel.optimizers import (
    AltLoRA,
    MemoryReport,
    SwitchLoRA,
    lora_param_groups,
    memory_report,
    pairs_to_groups,
    switchlora_init_,
)
from stiefel.optimizers._driver import units
from stiefel.optimizers._driver.write import WRITE_PANEL
from stiefel.optimizers._lora import switching, vector_pools
from stiefel.optimizers._lora.switching import (
    exchange_vectors_,
    fold_into_weight_,
    init_stds,
    switch_rate,
)
from stiefel.optimizers._lora.vector_pools import max_exchanges
from stiefel.optimizers.switchlora import SwitchLoRARule

SHAPE = (10, 7, 3)
OFTEN = {"interval0": 4, "freeze_steps": 2, "ratio": None}
"""Each vector of rank 3 or 4 is exchanged every fourth update."""


def triple(m, n, r, seed=0, dtype=torch.float32):
    """(A, B, W0), W0 frozen."""
    W0 = weight((m, n), 90 + seed, dtype).requires_grad_(False)
    return (*factors(m, n, r, seed, dtype), W0)


def made(triples, s=0.5, **settings):
    triples = triples if isinstance(triples, list) else [triples]
    return SwitchLoRA(pairs_to_groups(triples, scale=s), **{"lr": 0.02, **settings})


def series(shapes, steps, dtype=torch.float32):
    """Gradients per parameter of triples of these shapes."""
    out = []
    for i, shape in enumerate(shapes):
        out += [*pair_gradients(*shape, steps, i, dtype), [None] * steps]
    return out


def W_of(A, B, W0, s=0.5):
    return (W0.double() + s * B.double() @ A.double()).detach()


def give(optimizer, A, B, pool_a, pool_b, slots=None):
    """Candidates of our own, in place of those the first update would draw."""
    optimizer.init_state()
    r, p = A.shape[0], len(pool_a)
    slots = slots or ([p - r + i for i in range(r)], [p - r + (i - r // 2) % r for i in range(r)])
    for w, vectors, at, cursor in ((A, pool_a, slots[0], 0), (B, pool_b, slots[1], r // 2)):
        state = optimizer.state[w]
        state["pool"].copy_(vectors)
        state["slots"].copy_(torch.tensor(at))
        state["cursor"].fill_(cursor)


def feed(monkeypatch, numbers):
    """Ask for these numbers of vectors, one per update."""
    numbers = iter(numbers)
    monkeypatch.setattr(SwitchLoRARule, "exchange_count", lambda self, A, j: next(numbers))


# the published code


@pytest.mark.parametrize("name", ["run1", "run2"])
@pytest.mark.parametrize("fed", [True, False], ids=["fed", "recomputed"])
def test_recorded_trajectory(name, fed, monkeypatch):
    data = json.loads((FIXTURES / f"switchlora_{name}_reference.json").read_text())
    given, init = data["settings"], data["init"]

    def tensor(x):
        return torch.tensor(x, dtype=DOUBLE)

    A, B = (torch.nn.Parameter(tensor(init[key])) for key in "AB")
    W0, s = torch.nn.Parameter(tensor(init["W0"]), requires_grad=False), init["scaling"]
    problem = LeastSquares.recorded({**data, "settings": {"s": s}, "W0": init["W0"]})
    problem.W0 = W0
    feed(monkeypatch, [row["wanted"] for row in data["trajectory"]])
    optimizer = made(
        (A, B, W0), s, lr=given["lr"], betas=tuple(given["betas"]), eps=given["eps"],
        interval0=given["interval0"], freeze_steps=given["freeze_steps"], ratio=None,
        count_frozen_steps=True,
    )  # fmt: skip
    slots = init["slot_of_A_row"], init["slot_of_B_column"]
    give(optimizer, A, B, tensor(init["pool_A"]), tensor(init["pool_B"]), slots)
    switched = 0
    for row in data["trajectory"]:
        grads = problem.grads(A.detach(), B.detach())
        for G, letter in zip(grads, "AB", strict=True):
            close(G, tensor(row[f"G_{letter}"]), 1e-11)
        A.grad, B.grad = (tensor(row["G_A"]), tensor(row["G_B"])) if fed else grads
        optimizer.step()
        for w, letter, slot in ((A, "A", "slot_of_A_row"), (B, "B", "slot_of_B_column")):
            state = optimizer.state[w]
            close(w.detach(), tensor(row[letter]), 1e-12)
            assert state["slots"].tolist() == row[slot]
            assert int(state["cursor"]) == row[f"next_{letter}"]
            assert state["frozen"].flatten().tolist() == row[f"freeze_{letter}"]
            assert state["count"].flatten().tolist() == row[f"step_{letter}"]
            for key in ("exp_avg", "exp_avg_sq") if "adam" in row else ():
                close(state[key], tensor(row["adam"][f"{key}_{letter}"]), 1e-12)
            if "after_switch" in row:
                close(state["pool"], tensor(row["after_switch"][f"pool_{letter}"]), 1e-12)
        if row.get("after_switch"):
            close(W0.detach(), tensor(row["after_switch"]["W0"]), 1e-12)
            switched += len(row["switched"]["A_index_to_slot"])
    assert switched == sum("after_switch" in row for row in data["trajectory"]) > 7
    if fed:
        for w, letter in ((A, "A"), (B, "B")):
            close(w.detach(), tensor(data["shipped_final"][letter]), 1e-5)


def test_recorded_schedule_and_spreads():
    data = json.loads((FIXTURES / "switchlora_functions_reference.json").read_text())
    for row in data["switch_rate_exponential"]:
        rate = switch_rate(row["t"] + 1, row["ratio_times_T"])
        # the recorded ones are powers of a rounded 0.3^(1 / horizon): 6e-13 off after 12000 updates
        assert math.isclose(rate, row["rate"], rel_tol=1e-12)
        assert math.isclose(40 / rate, row["interval_for_interval0_40"], rel_tol=1e-12)
    for row in data["init_bounds"]:
        got = init_stds(row["m"], row["n"], row["r"], 1 / row["r"])
        assert all(
            math.isclose(x, row[f"std_{key}"], rel_tol=1e-14)
            for x, key in zip(got, "AB", strict=True)
        )
        assert math.isclose(got[0] * math.sqrt(3), row["bound_A"], rel_tol=1e-14)
        assert math.isclose(got[1] * math.sqrt(3), row["bound_B"], rel_tol=1e-14)


@pytest.mark.parametrize(
    "shape", [(10, 7, 3), (6, 9, 4), (5, 5, 2), (9, 30, 8), (3, 8, 3)], ids=str
)
@pytest.mark.parametrize(
    "extra",
    [{}, {"freeze_steps": -1}, {"freeze_steps": 0, "interval0": 1}, {"count_frozen_steps": True},
     {"lr_ratio_b": 4.0, "betas": (0.8, 0.9), "eps": 1e-3}, {"ratio": 0.5, "total_steps": 20}],
    ids=str,
)  # fmt: skip
def test_oracle(shape, extra):
    (m, n, r), s = shape, 0.7
    A, B, W0 = triple(*shape, dtype=DOUBLE)
    settings = {"lr": 0.02, "weight_decay": 0.1, **OFTEN, **extra}
    optimizer = made((A, B, W0), s, **settings)
    size = min(m, n)
    pools = weight((size, n), 31, DOUBLE).detach(), weight((size, m), 32, DOUBLE).detach()
    give(optimizer, A, B, *pools)
    names = {"freeze_steps": "N", "count_frozen_steps": "counted"}
    known = ("lr", "weight_decay", "betas", "eps", "lr_ratio_b", *names)
    oracle = switchlora_oracle.SwitchLoRA(
        W0.detach(), A.detach(), B.detach(), s, *pools,
        **{names.get(key, key): value for key, value in settings.items() if key in known},
    )  # fmt: skip
    due = 0.0
    for t, (GA, GB) in enumerate(zip(*pair_gradients(*shape, 40, dtype=DOUBLE), strict=True)):
        k, due = switchlora_oracle.wanted(
            t + 1, r, settings["interval0"], settings["ratio"], settings.get("total_steps"), due
        )
        oracle.step(GA, GB, k)
        A.grad, B.grad = GA, GB
        optimizer.step()
        close(A.detach(), oracle.A, 1e-11)
        close(B.detach(), oracle.B, 1e-11)
        close(W0.detach(), oracle.W0, 1e-11)
    assert (oracle.switches > 2) == (r < size)


# the identity


@pytest.mark.parametrize(("dtype", "bound"), [(DOUBLE, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("I", "J"), [([0, 3], []), ([], [1, 2, 4]), ([0, 2], [1, 4]), ([0, 1, 2], [1, 2, 3])], ids=str
)
def test_exchanges_leave_the_function_alone(dtype, bound, I, J):
    m, n, r, s = 12, 9, 5, 1.7
    A, B, W0 = (p.detach() for p in triple(m, n, r, dtype=dtype))
    x, before = weight((n, 6), 5, dtype).detach(), W_of(A, B, W0, s)
    forward = (W0 + s * B @ A) @ x
    C, D = weight((len(I), n), 6, dtype).detach(), weight((len(J), m), 7, dtype).detach()
    P, N = exchange_vectors_(A, B, torch.tensor(I).long(), C, torch.tensor(J).long(), D)
    assert not I or same(A[I], C)
    assert not J or same(B[:, J], D.mT)
    moved = W0.clone()
    fold_into_weight_(W0, P, N, s)
    assert not torch.equal(moved, W0)
    close(W_of(A, B, W0, s), before, bound)
    close((W0 + s * B @ A) @ x, forward, 5 * bound)


@pytest.mark.parametrize("choice", ["fifo", "random"])
@pytest.mark.parametrize(("dtype", "bound"), [(DOUBLE, 1e-12), (torch.float32, 1e-5)])
def test_the_function_does_not_jump_in_many_updates(choice, dtype, bound):
    """lr 0 and gradients that are not: whatever moves W is a switch."""
    m, n, r = 16, 20, 4
    A, B, W0 = triple(m, n, r, dtype=dtype)
    W0.mul_(0.58 / n**0.5)  # as torch.nn.Linear has it
    switchlora_init_(W0, A.data, B.data, 0.5, torch.Generator().manual_seed(0))
    optimizer = made((A, B, W0), lr=0.0, choice=choice, **OFTEN)
    want, worst, switches, last = W_of(A, B, W0), 0.0, 0, None
    begun, x = W0.detach().clone(), weight((n, 5), 6, dtype).detach()
    forward = (W0 + 0.5 * B @ A).detach() @ x
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    for _ in range(500):
        optimizer.step()
        now = [optimizer.state[p]["slots"].tolist() for p in (A, B)]
        if last is not None:
            gone = [sum(map(int.__ne__, x, y)) for x, y in zip(last, now, strict=True)]
            assert gone[0] == gone[1]
            switches += gone[0]
        last = now
        worst = max(worst, float((W_of(A, B, W0) - want).abs().max()))
    assert 498 <= switches <= 500
    assert worst <= bound
    close((W0 + 0.5 * B @ A).detach() @ x, forward, 5 * bound)
    assert W0.grad is None and float((W0 - begun).abs().max()) > 0.1


def test_a_low_precision_base_rounds_once_per_switch(monkeypatch):
    A, B, W0 = triple(16, 20, 4, dtype=torch.bfloat16)
    optimizer = made((A, B, W0), lr=0.0, write="nearest", **OFTEN)
    before, exact = W0.detach().clone(), W_of(A, B, W0)
    feed(monkeypatch, [2])
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    want = exact - 0.5 * B.double() @ A.double()  # what W0 should be now
    assert not torch.equal(before, W0)
    assert same(W0.detach(), want.float().to(torch.bfloat16))


# what a switch does to the state, and for how long


def test_state_of_the_switched_stays_and_of_its_counterpart_goes(monkeypatch):
    m, n, r = 12, 15, 4
    A, B, W0 = triple(m, n, r)
    GA, GB = pair_gradients(m, n, r, 7)
    twin = triple(m, n, r)
    optimizer, still = made((A, B, W0), **OFTEN), made(twin, interval0=math.inf, ratio=None)
    feed(monkeypatch, [0] * 12 + [1, 0])
    for t in range(6):
        for pair in ((A, B), twin):
            pair[0].grad, pair[1].grad = GA[t].clone(), GB[t].clone()
        optimizer.step()
        still.step()
    assert same(A.detach(), twin[0].detach())
    for pair in ((A, B), twin):
        pair[0].grad, pair[1].grad = GA[6].clone(), GB[6].clone()
    optimizer.step()
    still.step()
    (a, b), (c, d) = (
        [o.state[p] for p in pair[:2]] for o, pair in ((optimizer, (A, B)), (still, twin))
    )
    # row 0 of A and column 2 of B were switched; column 0 of B and row 2 of A are the counterparts
    for key in ("exp_avg", "exp_avg_sq"):
        assert not b[key][:, 0].any() and not a[key][2].any()
        # rows of one clock are stepped by the fused kernel of torch, which rounds otherwise
        torch.testing.assert_close(b[key][:, 1:], d[key][:, 1:], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(a[key][[0, 1, 3]], c[key][[0, 1, 3]], rtol=1e-6, atol=1e-8)
        assert a[key][0].any() and b[key][:, 2].any()
    assert a["count"].flatten().tolist() == [7, 7, 0, 7]
    assert b["count"].flatten().tolist() == [0, 7, 7, 7]


@pytest.mark.parametrize("N", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_counterparts_stay_still_for_exactly_n_updates(N, dtype, monkeypatch):
    m, n, r = 12, 15, 4
    A, B, W0 = triple(m, n, r, dtype=dtype)
    optimizer = made((A, B, W0), lr=0.1, weight_decay=0.5, interval0=10, freeze_steps=N, ratio=None)
    feed(monkeypatch, [0, 0, 1] + [0] * 20)
    grads = [[G.abs() + 1 for G in part] for part in pair_gradients(m, n, r, N + 5)]
    run(optimizer, [A, B], [part[:2] for part in grads])
    b, a = B[:, 0].detach().clone(), A[2].detach().clone()
    for i in range(N):
        others = B[:, 1].detach().clone()
        run(optimizer, [A, B], [part[2 + i : 3 + i] for part in grads])
        assert same(B[:, 0].detach(), b) and same(A[2].detach(), a)
        assert not torch.equal(B[:, 1], others)
        assert int(optimizer.state[B]["frozen"][0, 0]) == N - 1 - i
    run(optimizer, [A, B], [part[N + 2 : N + 3] for part in grads])
    assert (B[:, 0] != b).all() and (A[2] != a).all()


def test_freezing_can_be_left_out(monkeypatch):
    A, B, W0 = triple(12, 15, 4)
    optimizer = made((A, B, W0), lr=0.1, freeze_steps=-1, ratio=None)
    feed(monkeypatch, [0, 0, 1])
    GA, GB = pair_gradients(12, 15, 4, 3)
    run(optimizer, [A, B], [GA[:2], GB[:2]])
    before = B[:, 0].detach().clone()
    run(optimizer, [A, B], [GA[2:], GB[2:]])
    close(B[:, 0].detach(), before - 0.1 * GB[2][:, 0].sign(), 1e-5)  # a first step of Adam
    assert int(optimizer.state[B]["count"][0, 0]) == 1


# the schedule


def test_without_switching_it_is_adamw():
    A, B, W0 = triple(*SHAPE, dtype=DOUBLE)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in (A, B)]
    kept = W0.detach().clone()
    optimizer = made((A, B, W0), weight_decay=0.3, interval0=math.inf, total_steps=100)
    adamw = torch.optim.AdamW(twin, lr=0.02, weight_decay=0.3)
    for GA, GB in zip(*pair_gradients(*SHAPE, 50, dtype=DOUBLE), strict=True):
        for pair in ((A, B), twin):
            pair[0].grad, pair[1].grad = GA.clone(), GB.clone()
        optimizer.step()
        adamw.step()
        close(A.detach(), twin[0].detach(), 1e-12)
        close(B.detach(), twin[1].detach(), 1e-12)
    assert same(W0.detach(), kept)


def test_the_switch_rate_falls_and_short_intervals_are_refused():
    assert switch_rate(int(0.1 * 1000), 0.1 * 1000) == 0.3
    rates = [switch_rate(t, 0.1 * 300) for t in range(1, 600)]
    assert all(x >= y for x, y in itertools.pairwise(rates)) and rates[-1] == 1e-8
    with pytest.raises(ValueError, match=r"at least 2 \* freeze_steps = 10"):
        made(triple(*SHAPE), interval0=9, total_steps=10)
    made(triple(*SHAPE), interval0=10, total_steps=10)


def rounded(rounding, steps, r, **settings):
    """Numbers that the rule asks for, and their exact means."""
    rule = SwitchLoRARule(rounding=rounding, freeze_steps=0, **settings)

    class Seen:
        state, indices, m = {"due": torch.zeros(1, dtype=DOUBLE)}, (7,), r

    got, want = [], []
    for t in range(1, steps + 1):
        Seen.t = t
        rate = 1.0 if rule.ratio is None else switch_rate(t, rule.ratio * rule.total_steps)
        want.append(r * rate / rule.interval0)
        got.append(rule.exchange_count(Seen, 0))
    return got, want


@pytest.mark.parametrize(("r", "interval0"), [(256, 40), (4, 40), (3, 7), (5, 5)])
def test_accumulated_rounding_is_never_off_by_one(r, interval0):
    got, want = rounded("accumulate", 2000, r, interval0=interval0, total_steps=2000)
    off = np.cumsum(got) - np.cumsum(want)
    assert abs(off).max() < 1 and sum(got) > 10


@pytest.mark.parametrize(("r", "interval0"), [(256, 40), (4, 40)])
def test_stochastic_rounding_has_the_mean(r, interval0):
    got, want = rounded("stochastic", 2000, r, interval0=interval0, ratio=None)
    k = want[0]
    assert set(got) == {math.floor(k), math.floor(k) + 1}
    sigma = math.sqrt(k % 1 * (1 - k % 1) / 2000)
    assert abs(np.mean(got) - k) < 3 * sigma
    other, _ = rounded("stochastic", 2000, r, interval0=interval0, ratio=None, seed=1)
    assert (
        got != other and got == rounded("stochastic", 2000, r, interval0=interval0, ratio=None)[0]
    )


# pools and slots


def test_first_out_is_first_in_again_as_it_was_trained(monkeypatch):
    m, n, r = 9, 12, 4
    A, B, W0 = triple(m, n, r)
    optimizer = made((A, B, W0), interval0=4, freeze_steps=0, ratio=None)
    feed(monkeypatch, [1] * 30)
    grads = pair_gradients(m, n, r, 30)
    # entry -> its value when it came, and when it left
    came, left, entered = {m - r + i: A[i].detach().clone() for i in range(r)}, {}, []
    back = 0
    for t in range(25):
        state, slot = optimizer.state[A], t % r
        leaving = int(state["slots"][slot]) if t else m - r
        left[leaving] = A[slot].detach().clone()
        pool = state["pool"].clone() if t else None
        A.grad, B.grad = grads[0][t], grads[1][t]
        optimizer.step()
        entry = int(optimizer.state[A]["slots"][slot])
        entered.append(entry)
        if entry in left:
            assert same(pool[entry], left[entry])
            assert torch.equal(left[entry], came[entry]) == (t == m - r)  # nothing learned yet
            back += 1
        came[entry] = optimizer.state[A]["pool"][entry].clone()
        assert same(optimizer.state[A]["pool"][leaving], left[leaving])
    assert back == 25 - (m - r)
    assert entered[: m - r] == list(range(m - r)) and entered[m - r] == m - r
    assert entered == [t % m for t in range(25)]


def test_slots_stay_injective_and_frozen_vectors_stay():
    draw = random.Random(0)
    total = 0
    for trial in range(8):
        r, N = draw.randint(2, 9), draw.choice([0, 1, 2, 5])
        m, n = r + draw.randint(0, 12), r + draw.randint(0, 12)
        A, B, W0 = triple(m, n, r, trial)
        choice = ["fifo", "random"][trial % 2]
        rounding = ["accumulate", "stochastic"][trial // 2 % 2]
        optimizer = made(
            (A, B, W0), interval0=max(2 * N, draw.randint(1, 6)), freeze_steps=N, ratio=None,
            choice=choice, rounding=rounding, seed=trial,
        )  # fmt: skip
        GA, GB = pair_gradients(m, n, r, 2, trial)
        before = None
        for t in range(500 if trial < 2 else 120):
            A.grad, B.grad = GA[t % 2], GB[t % 2]
            optimizer.step()
            states = [optimizer.state[p] for p in (A, B)]
            now = [(s["slots"].tolist(), s["frozen"].flatten().tolist()) for s in states]
            if now[0][0] == [-1] * r:
                continue  # no pools before the first switch
            moved = []
            for i, (slots, _) in enumerate(now):
                assert len(set(slots)) == r and max(slots) < min(m, n) and min(slots) >= 0
                old, stuck = before[i] if before else ([*slots], [0] * r)
                gone = [j for j in range(r) if old[j] != slots[j]]
                assert not any(stuck[j] for j in gone)
                assert not {slots[j] for j in gone} & {*old}  # nothing in use comes in
                moved.append(gone)
            for i, gone in enumerate(moved):  # counterparts of what left are frozen from now on
                assert all(now[1 - i][1][j] == max(N - 1, 0) for j in gone)
            total += len(moved[0])
            before = now
        assert min(m, n) > r or before[0][0] == [*range(r)]
    assert total > 200


@pytest.mark.parametrize(
    ("cursors", "frozen", "r", "free", "want"),
    [((0, 2), (0, 0), 5, 9, 2), ((1, 3), (1, 1), 5, 9, 1), ((2, 4), (2, 0), 5, 9, 0),
     ((4, 1), (0, 0), 6, 9, 3), ((4, 1), (0, 0), 6, 2, 2), ((0, 3), (0, 0), 5, 9, 2),
     ((0, 0), (0, 0), 5, 9, 0)],
)  # fmt: skip
def test_room_ends_at_frozen_vectors(cursors, frozen, r, free, want):
    class Seen:
        def __init__(self, i):
            self.cursor, self.frozen, self.slots, self.waiting_count = (
                cursors[i],
                frozen[i],
                [0] * r,
                free,
            )

    assert max_exchanges(Seen(0), Seen(1)) == want


def test_never_more_than_the_pool_has(monkeypatch):
    """A pool of r + 1 vectors: one at a time, however many are wanted."""
    A, B, W0 = triple(9, 20, 8)
    optimizer = made((A, B, W0), interval0=4, freeze_steps=0, ratio=None)
    feed(monkeypatch, [4] * 3)
    before = [*range(1, 9)]
    for GA, GB in zip(*pair_gradients(9, 20, 8, 3), strict=True):
        A.grad, B.grad = GA, GB
        optimizer.step()
        now = optimizer.state[A]["slots"].tolist()
        assert sum(x != y for x, y in zip(before, now, strict=True)) == 1
        before = now


@pytest.mark.parametrize("shape", [(3, 8, 3), (8, 3, 3), (4, 4, 4)], ids=str)
def test_full_rank_never_switches(shape):
    A, B, W0 = triple(*shape)
    optimizer, kept = made((A, B, W0), **OFTEN), W0.detach().clone()
    run(optimizer, [A, B], pair_gradients(*shape, 30))
    assert same(W0.detach(), kept)
    assert optimizer.state[A]["slots"].tolist() == [*range(shape[2])]
    assert not optimizer.state[B]["frozen"].any() and int(optimizer.state[A]["count"][0]) == 30


def test_rank_one_and_more_than_full_rank():
    with pytest.raises(ValueError, match="rank 1, but switching needs rank 2"):
        made(triple(5, 6, 1), total_steps=10)
    with pytest.warns(UserWarning, match="r=6 > min"):
        optimizer = made(triple(4, 5, 6), total_steps=10)
    A, B, W0 = (p for group in optimizer.param_groups for p in group["params"])
    kept = W0.detach().clone()
    run(optimizer, [A, B], pair_gradients(4, 5, 6, 12))
    assert same(W0.detach(), kept)


# rank and initialisation


def test_the_rank_of_the_change_grows():
    m, n, r, s = 24, 30, 3, 1 / 3
    changes = []
    for interval0 in (math.inf, 4):
        W = weight((m, n), 3, DOUBLE).detach()
        W0 = torch.nn.Parameter(W.clone(), requires_grad=False)
        A, B = factors(m, n, r, dtype=DOUBLE)
        switchlora_init_(W0, A, B, s, torch.Generator().manual_seed(0))
        begun = (s * B @ A).detach()
        problem = LeastSquares(m, n, s)
        problem.W0 = W0
        problem.target = weight((m, n), 8, DOUBLE).detach()
        optimizer = made((A, B, W0), s, interval0=interval0, freeze_steps=2, ratio=None)
        follow(optimizer, A, B, problem, 60)
        change = W_of(A, B, W0, s) - W
        if interval0 == math.inf:
            change = change + begun  # s B A alone: at most r
        changes.append(int(torch.linalg.matrix_rank(change, atol=1e-9)))
    assert changes[0] == r and changes[1] > 4 * r


@pytest.mark.parametrize("shape", [(300, 250, 200), (256, 1024, 200), (900, 600, 40)], ids=str)
@pytest.mark.parametrize("s", [None, 2.0])
def test_the_initial_product_has_the_spread_of_a_linear_layer(shape, s):
    m, n, r = shape
    s = s or 1 / r
    W0, A, B = weight((m, n), 3).detach(), torch.empty(r, n), torch.empty(m, r)
    W = W0.clone()
    switchlora_init_(W0, A, B, s, torch.Generator().manual_seed(0))
    close(W0 + s * B @ A, W, 2e-5)
    assert abs(float((s * B @ A).std()) / (1 / math.sqrt(3) / math.sqrt(n)) - 1) < 0.05
    G = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    by_a, by_b = s * B @ (s * B.mT @ G), s * (s * G @ A.mT) @ A
    # equal for r far below both sides; in general by how much a Gram of r vectors is not a multiple
    # of the identity: sqrt(n (m + r) / (m (n + r)))
    ratio = float(by_a.norm() / by_b.norm())
    assert abs(ratio / math.sqrt(n * (m + r) / (m * (n + r))) - 1) < 0.03
    assert 0.9 <= ratio <= 1.1 or max(m, n) > 2 * min(m, n)
    # pools are drawn alike
    A, B = torch.nn.Parameter(A), torch.nn.Parameter(B)
    optimizer = made((A, B, W0), s, interval0=10, ratio=None)
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    for p, std in zip((A, B), init_stds(m, n, r, s), strict=True):
        pool = optimizer.state[p]["pool"]
        assert pool.shape == (min(m, n), n if p is A else m)
        assert abs(float(pool.std()) / std - 1) < 0.02 and abs(float(pool.mean())) < 0.02 * std
        assert float(pool.abs().max()) <= math.sqrt(3) * std * (1 + 1e-6)


def test_initialisation_refuses_what_does_not_fit_and_draws_from_the_global_generator():
    with pytest.raises(ValueError, match="W0, A and B must be"):
        switchlora_init_(torch.zeros(4, 5), torch.zeros(2, 4), torch.zeros(5, 2), 1.0)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        A, B = torch.empty(2, 5), torch.empty(4, 2)
        switchlora_init_(torch.zeros(4, 5), A, B, 1.0)
        drawn.append((A, B))
    assert same(*drawn)


# checkpoints


def reload(optimizer, again, **settings):
    """Through a file, into an optimizer of other parameters."""
    buffer = io.BytesIO()
    old = [p for group in optimizer.param_groups for p in group["params"]]
    torch.save([optimizer.state_dict(), [p.detach() for p in old]], buffer)
    buffer.seek(0)
    saved, weights = torch.load(buffer, weights_only=True)
    for p, W in zip(flat(again), weights, strict=True):
        p.data.copy_(W)
    resumed = made(again, **settings)
    resumed.load_state_dict(saved)
    return resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("choice", ["fifo", "random"])
@pytest.mark.parametrize("at", [1, 3, 7, 8])
def test_resuming_has_the_bits_of_not_stopping(dtype, choice, at):
    """Right after a switch with frozen vectors, in between, and before one."""
    shapes = [(10, 12, 3), (8, 6, 4)]
    settings = {**OFTEN, "choice": choice, "rounding": "stochastic", "weight_decay": 0.1}
    triples = [triple(*shape, i, dtype) for i, shape in enumerate(shapes)]
    optimizer, grads = made(triples, **settings), series(shapes, at + 20)
    run(optimizer, flat(triples), [G[:at] for G in grads])
    again = [triple(*shape, i, dtype) for i, shape in enumerate(shapes)]
    resumed = reload(optimizer, again, **settings)
    slots = [optimizer.state[each[0]]["slots"].tolist() for each in triples]
    for p, q in zip(flat(triples), flat(again), strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            got = resumed.state[q][key]
            assert type(got) is type(value)
            assert not isinstance(value, torch.Tensor) or same(got, value)
        if p.requires_grad:
            state = resumed.state[q]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
            assert state["pool"].dtype == dtype and state["pool"].device.type == "cpu"
            assert state["count"].dtype == state["frozen"].dtype == torch.int32
    want = run(optimizer, flat(triples), [G[at:] for G in grads])
    assert same(run(resumed, flat(again), [G[at:] for G in grads]), want)
    assert same(tensors(resumed), tensors(optimizer))
    assert all(optimizer.state[each[0]]["slots"].tolist() != old
               for each, old in zip(triples, slots, strict=True))  # fmt: skip


def test_the_checkpoint_can_have_frozen_vectors_and_a_cursor_in_mid_pool():
    shape = (10, 12, 4)
    one = triple(*shape)
    optimizer, grads = made(one, **OFTEN), series([shape], 25)
    run(optimizer, list(one), [G[:5] for G in grads])
    state = optimizer.state[one[0]]
    assert state["frozen"].any() and int(state["cursor"]) > 0
    again = triple(*shape)
    resumed = reload(optimizer, [again], **OFTEN)
    want = run(optimizer, list(one), [G[5:] for G in grads])
    assert same(run(resumed, list(again), [G[5:] for G in grads]), want)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_alike(how):
    one = triple(*SHAPE)
    optimizer, grads = made(one, **OFTEN), series([SHAPE], 12)
    run(optimizer, list(one), [G[:5] for G in grads])
    copied = how(optimizer)
    params = [p for group in copied.param_groups for p in group["params"]]
    out = run(copied, params, [G[5:] for G in grads])
    assert same(out, run(optimizer, list(one), [G[5:] for G in grads]))


def test_pools_stay_on_the_host_wherever_the_factors_are():
    """Torch moves all state to the parameter's device on loading; here that is the meta device."""
    one = triple(*SHAPE)
    optimizer = made(one, **OFTEN)
    run(optimizer, list(one), series([SHAPE], 3))
    with torch.device("meta"):
        far = [torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in one]
    moved = made(tuple(far), **OFTEN)
    moved.init_state()
    host = {"pool", "slots", "cursor", "frozen", "count", "due"}
    for _ in range(2):
        for p in far[:2]:
            for key, value in moved.state[p].items():
                if isinstance(value, torch.Tensor):
                    assert value.device.type == ("cpu" if key in host else "meta"), key
        moved.load_state_dict(optimizer.state_dict())
    assert same(moved.state[far[0]]["pool"], optimizer.state[one[0]]["pool"])
    assert moved.state[far[0]]["slots"].tolist() == optimizer.state[one[0]]["slots"].tolist()


def test_pools_are_pinned_where_cuda_reads_them(monkeypatch):
    X, asked = torch.zeros(3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append(self) or self)
    assert units.pinned(X, torch.device("cpu")) is X and not asked
    units.pinned(X, torch.device("cuda", 0))
    assert asked == [X]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", ["fifo", "random"])
def test_a_gpu_makes_the_same_switches(choice):
    outs = []
    for device in ("cpu", "cuda"):
        one = tuple(
            torch.nn.Parameter(p.detach().to(device), p.requires_grad) for p in triple(*SHAPE)
        )
        optimizer = made(one, choice=choice, **OFTEN)
        for GA, GB in zip(*pair_gradients(*SHAPE, 12), strict=True):
            one[0].grad, one[1].grad = GA.to(device), GB.to(device)
            optimizer.step()
        assert optimizer.state[one[0]]["pool"].is_pinned() == (device == "cuda")
        outs.append((one, optimizer.state[one[0]]["slots"].tolist()))
    (a, slots), (b, others) = outs
    assert slots == others
    for p, q in zip(a, b, strict=True):
        close(p.detach(), q.detach().cpu(), 1e-4)


def test_checkpoints_without_pools():
    shapes = [(10, 12, 3), (8, 6, 4)]
    settings = {**OFTEN, "save_pools": False}
    triples = [triple(*shape, i) for i, shape in enumerate(shapes)]
    optimizer, grads = made(triples, **settings), series(shapes, 20)
    run(optimizer, flat(triples), [G[:5] for G in grads])
    saved = optimizer.state_dict()
    assert not any("pool" in entry for entry in saved["state"].values())
    assert all("pool" in optimizer.state[A] for A, _, _ in triples)
    resumed = []
    for _ in range(2):
        again = [triple(*shape, i) for i, shape in enumerate(shapes)]
        with pytest.warns(UserWarning, match="no pools, so candidates are drawn anew"):
            resumed.append((reload(optimizer, again, **settings), again))
    (one, again), (other, _) = resumed
    assert same(tensors(one), tensors(other))  # the same draws
    assert same([p.detach() for p in flat(again)], [p.detach() for p in flat(triples)])
    assert (
        one.state[again[0][0]]["slots"].tolist() == optimizer.state[triples[0][0]]["slots"].tolist()
    )
    pool = one.state[again[0][0]]["pool"]
    assert abs(float(pool.std()) / init_stds(10, 12, 3, 0.5)[0] - 1) < 0.15
    before = [W_of(*each) for each in again]
    for group in one.param_groups:
        group["lr"] = 0.0
    run(one, flat(again), [G[5:] for G in grads])
    for each, W in zip(again, before, strict=True):
        close(W_of(*each), W, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = made(triples, **OFTEN)
        full.load_state_dict(made(triples, **OFTEN).state_dict())


def test_a_checkpoint_that_does_not_fit_is_refused():
    optimizer = made(triple(*SHAPE), **OFTEN)
    for broken in (3, {}, {"state": {}, "param_groups": []}):
        with pytest.raises((ValueError, TypeError)):
            optimizer.load_state_dict(broken)
    other = made([triple(*SHAPE), triple(8, 6, 2, 1)], **OFTEN)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="saved by SwitchLoRA"):
        A, B, _ = triple(*SHAPE)
        AltLoRA([{"params": [A, B, *triple(8, 6, 2)[:1]][:2], "scale": 1.0}]).load_state_dict(
            {**made(triple(*SHAPE), **OFTEN).state_dict(),
             "param_groups": [{**made(triple(*SHAPE), **OFTEN).state_dict()["param_groups"][0],
                               "params": [0, 1]}]}
        )  # fmt: skip


# gradients, seeds, the end of a freeze


def test_gradients_are_not_touched_and_the_base_has_none():
    A, B, W0 = triple(*SHAPE)
    optimizer = made((A, B, W0), **OFTEN)
    for GA, GB in zip(*pair_gradients(*SHAPE, 9), strict=True):
        A.grad, B.grad = GA, GB
        kept = GA.clone(), GB.clone()
        optimizer.step()
        assert A.grad is GA and B.grad is GB and same(kept, (GA, GB))
        assert W0.grad is None and not W0.requires_grad
    assert W0 not in optimizer.state
    assert int(optimizer.state[A]["cursor"]) > 0


@pytest.mark.parametrize("choice", ["fifo", "random"])
def test_the_same_seed_makes_the_same_switches(choice):
    outs = []
    for seed in (0, 0, 1):
        one = triple(16, 20, 4)
        torch.manual_seed(len(outs))  # whatever the global generators are
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        optimizer = made(one, choice=choice, rounding="stochastic", seed=seed, **OFTEN)
        run(optimizer, list(one), series([(16, 20, 4)], 15))
        now = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        assert torch.equal(states[0], now[0]) and (states[1] == now[1]).all()
        assert states[2] == now[2]
        outs.append(tensors(optimizer))
    assert same(outs[0], outs[1]) and not same(outs[0], outs[2])


def test_units_draw_their_own_pools_and_are_never_stacked():
    triples = [triple(*SHAPE, seed=i) for i in range(3)]
    optimizer = made(triples, **OFTEN)
    run(optimizer, flat(triples), series([SHAPE] * 3, 6))
    assert [len(bucket.units) for bucket in optimizer._plan.buckets] == [1, 1, 1]
    pools = [optimizer.state[A]["pool"] for A, _, _ in triples]
    assert not (pools[0] == pools[1]).any() and not (pools[1] == pools[2]).any()


@pytest.mark.parametrize(
    ("counted", "length"),
    [(True, (0.1 / (1 - 0.9**6)) / math.sqrt(0.001 / (1 - 0.999**6))), (False, 1.0)],
)
def test_the_first_step_after_the_freeze(counted, length, monkeypatch):
    A, B, W0 = triple(12, 15, 4, dtype=DOUBLE)
    lr = 0.01
    optimizer = made((A, B, W0), lr=lr, eps=0.0, ratio=None, count_frozen_steps=counted)
    feed(monkeypatch, [0, 0, 1] + [0] * 9)
    A.grad, B.grad = torch.full_like(A, 0.3), torch.full_like(B, -0.7)
    for _ in range(7):
        optimizer.step()
    b, a = B[:, 0].detach().clone(), A[2].detach().clone()
    optimizer.step()
    close(B[:, 0].detach() - b, torch.full_like(b, length * lr), 1e-4 * lr)
    close(A[2].detach() - a, torch.full_like(a, -length * lr), 1e-4 * lr)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()


# gradients that are missing, bad or zero


@pytest.mark.parametrize("member", [0, 1])
def test_a_missing_half_stays_and_nothing_is_switched(member):
    one = triple(*SHAPE)
    optimizer, grads = made(one, weight_decay=0.1, **OFTEN), series([SHAPE], 12)
    run(optimizer, list(one), [G[:4] for G in grads])
    kept = [p.detach().clone() for p in one]
    state = {
        k: v.clone()
        for k, v in optimizer.state[one[member]].items()
        if k not in ("step", "refreshed")
    }
    grads[member] = [None] * 12
    run(optimizer, list(one), [G[4:9] for G in grads])
    assert same(one[member].detach(), kept[member]) and same(one[2].detach(), kept[2])
    assert not torch.equal(one[1 - member], kept[1 - member])
    assert same(state, {k: optimizer.state[one[member]][k] for k in state})
    assert optimizer.state[one[0]]["step"] == 9
    grads[member] = series([SHAPE], 12)[member]
    slots = optimizer.state[one[0]]["slots"].tolist()
    run(optimizer, list(one), [G[9:] for G in grads])
    assert optimizer.state[one[0]]["slots"].tolist() != slots


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("wait", [None, False])
def test_a_bad_gradient_leaves_the_whole_triple_alone(member, bad, wait):
    one, other = triple(*SHAPE), triple(*SHAPE, seed=1)
    optimizer, grads = made([one, other], **OFTEN), series([SHAPE] * 2, 12)
    optimizer._wait = wait  # rules that write wait in any case
    run(optimizer, flat([one, other]), [G[:3] for G in grads])
    before, state = [p.detach().clone() for p in one], tensors(optimizer)
    moved = other[0].detach().clone()
    broken = [None if G[3] is None else G[3].clone() for G in grads]
    broken[member][0, 0] = bad
    run(optimizer, flat([one, other]), [[G] for G in broken])
    now = tensors(optimizer)
    assert same(before, [p.detach() for p in one]) and not torch.equal(moved, other[0])
    assert all(same(now[key], value) for key, value in state.items() if key[0] < 3)
    assert sum(optimizer.skipped.values()) == 1 and optimizer.state[other[0]]["step"] == 4
    run(optimizer, flat([one, other]), [G[4:] for G in grads])
    assert all(torch.isfinite(p).all() for p in one)


def test_without_gradients_a_triple_has_no_state_and_a_probe_writes_nothing():
    one, other = triple(*SHAPE), triple(*SHAPE, seed=1)
    optimizer, grads = made([one, other], **OFTEN), series([SHAPE] * 2, 3)
    kept = [p.detach().clone() for p in other]
    run(optimizer, flat([one, other]), [*grads[:3], *[[None] * 3] * 3])
    assert same(kept, [p.detach() for p in other]) and not optimizer.state.get(other[0])
    fresh = triple(*SHAPE)
    probe, kept = made(fresh, lr=0.0, **OFTEN), [p.detach().clone() for p in fresh]
    fresh[0].grad, fresh[1].grad = torch.zeros_like(fresh[0]), torch.zeros_like(fresh[1])
    probe.step()
    assert same(kept, [p.detach() for p in fresh]) and probe.state[fresh[0]]["step"] == 0
    assert probe.state[fresh[0]]["slots"].tolist() == [-1] * 3  # nothing drawn yet


def test_zero_gradients_begin_no_exchange():
    one = triple(*SHAPE)
    optimizer, kept = made(one, **OFTEN), [p.detach().clone() for p in one]
    one[0].grad, one[1].grad = torch.zeros_like(one[0]), torch.zeros_like(one[1])
    for _ in range(4):
        optimizer.step()
    assert same(kept, [p.detach() for p in one]) and optimizer.state[one[0]]["step"] == 4
    run(optimizer, list(one), series([SHAPE], 9))
    assert not torch.equal(kept[2], one[2])


def test_maximize_and_a_tensor_lr():
    outs = []
    for sign, settings in ((1, {}), (-1, {"maximize": True}),
                           (1, {"lr": torch.tensor(0.02, dtype=DOUBLE)})):  # fmt: skip
        one = triple(*SHAPE)
        grads = [[None if G is None else sign * G for G in part] for part in series([SHAPE], 9)]
        outs.append(run(made(one, **{**OFTEN, **settings}), list(one), grads))
    assert same(outs[0], outs[1]) and same(outs[0], outs[2])


# layers of every kind


def test_convolutions_and_turned_weights_are_their_matrices():
    m, n, r = 6, 8, 3
    plain = triple(m, n, r)
    shapes = (r, 2, 2, 2), (m, r, 1, 1), (m, 2, 2, 2)
    conv = [torch.nn.Parameter(p.detach().clone().reshape(shape), p.requires_grad)
            for p, shape in zip(plain, shapes, strict=True)]  # fmt: skip
    last = [torch.nn.Parameter(p.detach().clone(memory_format=torch.channels_last), p.requires_grad)
            for p in conv]  # fmt: skip
    transposed = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in plain]
    transposed[2] = torch.nn.Parameter(plain[2].detach().mT.clone(), requires_grad=False)
    grads = series([(m, n, r)], 9)
    want = run(made(plain, **OFTEN), list(plain), grads)[-1]
    for params in (conv, last):
        shaped = [[None if G is None else G.reshape(p.shape) for G in part]
                  for part, p in zip(grads, params, strict=True)]  # fmt: skip
        optimizer = made(tuple(params), **OFTEN)
        got = run(optimizer, params, shaped)[-1]
        for x, y in zip(got, want, strict=True):
            close(x.reshape(y.shape), y, 1e-6)
        (merged,) = optimizer.merged().values()
        assert merged.shape == params[2].shape
        close(merged.reshape(m, n).double(), W_of(*want), 1e-5)
    optimizer = SwitchLoRA(
        [{"params": transposed, "scale": 0.5, "view": ["auto", "auto", "transposed"]}],
        lr=0.02,
        **OFTEN,
    )
    got = run(optimizer, transposed, grads)[-1]
    close(got[2].mT, want[2], 1e-6)
    close(optimizer.merged()[2].mT.double(), W_of(*want), 1e-5)


def test_experts_are_triples_of_their_own():
    E, m, n, r = 3, 7, 9, 4
    A, B, W0 = (weight((E, *shape), i) for i, shape in enumerate([(r, n), (m, r), (m, n)]))
    W0.requires_grad_(False)
    optimizer = made((A, B, W0), lr=0.0, **OFTEN)
    want, kept = W_of(A, B, W0), W0.detach().clone()
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    for _ in range(9):
        optimizer.step()
    pools = optimizer.state[A]["pool"]
    assert pools.shape == (E, m, n) and not (pools[0] == pools[1]).any()
    assert all(float((kept[e] - W0[e]).abs().max()) > 0.1 for e in range(E))
    close(W_of(A, B, W0), want, 1e-5)
    close(optimizer.merged()[2].double(), want, 1e-5)
    again = made((A, B, W0), lr=0.0, **OFTEN)
    again.load_state_dict(optimizer.state_dict())
    assert same(tensors(again), tensors(optimizer))


class LoRALinear(torch.nn.Linear):
    """A layer with a pair, its own weight frozen."""

    def __init__(self, n, m, r=3, alpha=6.0):
        super().__init__(n, m)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = (
            torch.nn.Parameter(torch.empty(r, n)),
            torch.nn.Parameter(torch.empty(m, r)),
        )
        self.scaling = alpha / r
        switchlora_init_(self.weight.data, self.lora_A.data, self.lora_B.data, self.scaling)

    def forward(self, x):
        return super().forward(x) + self.scaling * (x @ self.lora_A.mT @ self.lora_B.mT)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(LoRALinear(8, 16), torch.nn.LayerNorm(16), LoRALinear(16, 6))


def test_a_model_goes_in_and_a_plain_one_comes_out():
    net, x = model(), torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    optimizer = SwitchLoRA(net, lr=0.02, total_steps=100, interval0=4, freeze_steps=2)
    rules = {row.name: row.rule for row in optimizer.assignment().rows}
    assert rules["0.weight"] == rules["0.lora_A"] == "SwitchLoRA" and rules["0.bias"] == "adamw"
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(x) - x[:, :6]).square().mean()
        loss.backward()
        optimizer.step()
        first = first or float(loss.detach())
    assert float(loss.detach()) < 0.3 * first
    assert int(optimizer.state[net[0].lora_A]["slots"].ne(torch.arange(5, 8)).sum()) > 0
    plain = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 6)
    )
    weights = {name: value for name, value in net.state_dict().items() if "lora" not in name}
    plain.load_state_dict({**weights, **optimizer.merged()})
    close(plain(x), net(x), 1e-5)


def test_state_has_the_bytes_of_the_formulas():
    for m, n, r, dtype in ((40, 30, 4, torch.float32), (32, 64, 8, torch.bfloat16)):
        one = triple(m, n, r, dtype=dtype)
        optimizer = made(one, **OFTEN)
        moments, pools = 2 * r * (m + n) * 4, min(m, n) * (m + n) * dtype.itemsize
        vectors = 2 * 3 * r * 4 + 2 * 4 + 8  # count, frozen, slots; cursors; due
        report = MemoryReport.of(optimizer)
        assert report.state == moments + pools + vectors
        run(optimizer, list(one), series([(m, n, r)], 2))
        kept = [x for x in tensors(optimizer).values() if isinstance(x, torch.Tensor)]
        assert sum(x.nbytes for x in kept) == report.state
        (row,) = (row for row in report.rows if row.shape == (m, n))
        assert row.state == row.gradient == 0
    assert memory_report(model(), SwitchLoRA, total_steps=10).state > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_temporary_memory_is_bounded_by_the_factors(dtype):
    m, n, r = 512, 512, 32
    A, B, W0 = triple(m, n, r, dtype=dtype)
    optimizer, grads = made((A, B, W0), interval0=10, ratio=None), pair_gradients(m, n, r, 4)
    run(optimizer, [A, B], [part[:1] for part in grads])  # pools are drawn here
    factor, low = r * n * 4, dtype != torch.float32
    for G, H in zip(*grads, strict=True):
        A.grad, B.grad = G.to(dtype), H.to(dtype)
        slots = optimizer.state[A]["slots"].tolist()
        counter = count_step(optimizer)
        assert optimizer.state[A]["slots"].tolist() != slots
        # what travels: k = 3 or 4 vectors of both factors, a few times over
        assert (
            counter.peak
            <= (6 if low else 4) * factor + 2 * low * WRITE_PANEL * 4 + 40 * (m + n) * 4
        )


@pytest.mark.parametrize("name", ["int8", "bfloat16"])
def test_state_in_few_bits_is_forgotten_alike(name, monkeypatch):
    m, n, r = 120, 128, 40
    A, B, W0 = triple(m, n, r)
    optimizer = made((A, B, W0), lr=0.01, state_dtype=name, ratio=None)
    feed(monkeypatch, [0, 0, 2, 0, 0])
    grads = pair_gradients(m, n, r, 5)
    run(optimizer, [A, B], [part[:2] for part in grads])
    states = [optimizer.state[p] for p in (A, B)]
    assert all(s["exp_avg"].dtype == getattr(torch, name) for s in states)
    want = W_of(A, B, W0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(optimizer, [A, B], [part[2:] for part in grads])
    close(W_of(A, B, W0), want, 1e-5)
    for state, at in ((states[0].items(), [20, 21]), (states[1].items(), [0, 1])):
        moments = {key: value for key, value in state if key in ("count", "frozen")}
        assert moments["count"].flatten()[at].tolist() == [0, 0]
        assert moments["frozen"].flatten()[at].tolist() == [2, 2]
    if name == "bfloat16":
        assert not states[0]["exp_avg"][20:22].any() and not states[1]["exp_avg"][:, :2].any()
    else:
        assert not states[0]["exp_avg"].view(r, n)[20:22].any()
        assert not states[1]["exp_avg"].view(m, r)[:, :2].any()
        assert states[1]["exp_avg"].view(m, r)[:, 2:].any()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_checkpoints_read_and_write_it():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    outs = []
    settings = {"lr": 0.02, "total_steps": 100, "interval0": 4, "freeze_steps": 2}
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (net(x) - x[:, :6]).square().mean().backward()
            optimizer.step()

    net = model()
    optimizer = SwitchLoRA(net, **settings)
    train(net, optimizer, 5)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    again = copy.deepcopy(net)
    for p in again.parameters():
        p.grad = None
    resumed = SwitchLoRA(again, **settings)
    before = {key: value.clone() for key, value in again.state_dict().items()}
    set_optimizer_state_dict(again, resumed, saved)  # probes with zero gradients first
    assert same(before, dict(again.state_dict()))
    for one, other in ((net, optimizer), (again, resumed)):
        train(one, other, 6)
        outs.append(dict(one.state_dict()))
    assert same(*outs)


# what is refused


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "total_steps must be the number of updates"),
        ({"total_steps": 0}, "total_steps must be"),
        ({"ratio": 0.0, "total_steps": 5}, "ratio must be positive"),
        ({"ratio": None, "interval0": 0, "freeze_steps": 0}, "interval0 must be positive"),
        ({"ratio": None, "freeze_steps": -2}, "freeze_steps must be an int of at least -1"),
        ({"ratio": None, "rounding": "up"}, "rounding"),
        ({"ratio": None, "choice": "best"}, "choice"),
        ({"ratio": None, "betas": (1.0, 0.9)}, "Invalid beta"),
    ],
)
def test_settings_out_of_range_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        made(triple(*SHAPE), **settings)


def test_triples_that_cannot_be_switched_are_refused():
    A, B, W0 = triple(*SHAPE)
    good = {"total_steps": 10}

    def refused(params, text, kind=ValueError, **group):
        with pytest.raises(kind, match=text):
            SwitchLoRA([{"params": params, "scale": 1.0, **group}], **good)

    refused([A, B], "triples with the base weight")
    refused([("a", A), ("b", B), ("w", torch.nn.Parameter(W0.detach()))],
            "'w' is a base weight.*requires_grad_")  # fmt: skip
    refused([A, B, W0.detach().mT.clone()], "must hold 1 matrices of 10 x 7.*'transposed'")
    refused([A.detach(), B, W0], "is frozen, but SwitchLoRA trains both factors")
    refused([A, B, torch.zeros(10, 7, dtype=torch.int8)], "quantized", TypeError)
    C, D, _ = triple(*SHAPE, seed=1)
    refused([A, B, W0, C, D, W0], "base weight of two pairs")
    with pytest.raises(ValueError, match="scale must be"):
        SwitchLoRA([{"params": [A, B, W0]}], **good)
    groups = lora_param_groups(model(), base_weight=True)
    assert groups[0]["rule"] == "SwitchLoRA" and len(groups[0]["params"]) == 6
    with pytest.raises(TypeError, match="intervall0"):
        made((A, B, W0), intervall0=3, **good)


def test_the_modules_list_what_they_have():
    for module in (vector_pools, switching):
        assert all(hasattr(module, name) for name in module.__all__)


# the base weights of a checkpoint


class Adapted(torch.nn.Module):
    """A linear layer with an adapter, under the names of peft, which is not installed here."""

    def __init__(self, seed=0):
        super().__init__()
        A, B, W0 = triple(8, 6, 2, seed)
        self.base_layer = torch.nn.Linear(6, 8, bias=False).requires_grad_(False)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(6, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 8, bias=False)})
        self.scaling = {"default": 0.5}
        layers = (self.base_layer, self.lora_A["default"], self.lora_B["default"])
        for layer, X in zip(layers, (W0, A, B), strict=True):
            layer.weight.data = X.detach().clone()


def adapted_model():
    return torch.nn.ModuleDict({"up": Adapted(0), "down": Adapted(1)})


def adapter_file(model):
    """What peft and a Trainer save: the adapters alone."""
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}


def train_adapters(model, optimizer, first, last):
    for t in range(first, last):
        for k, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.grad = gaussian_like(p, 100 * t + k)
        optimizer.step()


def gaussian_like(p, seed):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def trained_adapters(**settings):
    model = adapted_model()
    optimizer = SwitchLoRA(model, lr=0.02, **{**OFTEN, **settings})
    train_adapters(model, optimizer, 0, 6)
    return model, optimizer


def through_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("form", ["model", "groups"])
def test_a_base_weight_that_was_not_saved_is_noticed_before_anything_moves(form):
    model, optimizer = trained_adapters()
    saved, adapters = through_file(optimizer.state_dict()), adapter_file(model)
    fresh = adapted_model()
    fresh.load_state_dict(adapters, strict=False)
    second = SwitchLoRA(
        {"model": lambda: fresh,
         "groups": lambda: lora_param_groups(fresh, base_weight=True)}[form](),
        lr=0.02, scale=0.5, **OFTEN,
    )  # fmt: skip
    second.load_state_dict(saved)
    before = [p.detach().clone() for p in fresh.parameters()], tensors(second)
    for _ in range(2):  # and again, until the weights are right
        with pytest.raises(ValueError, match=r"base_layer.*save model\.state_dict\(\) whole"):
            train_adapters(fresh, second, 6, 7)
    with pytest.raises(ValueError, match="is not the base weight"):
        second.merged()
    # a checkpoint that is saved now still knows the weights that it belongs to
    third = SwitchLoRA(adapted_model(), lr=0.02, **OFTEN)
    third.load_state_dict(through_file(second.state_dict()))
    with pytest.raises(ValueError, match="is not the base weight"):
        train_adapters(third_model(third), third, 6, 7)
    assert same([p.detach() for p in fresh.parameters()], before[0])
    assert same(tensors(second), before[1])


def third_model(optimizer):
    """The parameters of an optimizer, as a module that lists them."""
    module = torch.nn.Module()
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        module.register_parameter(str(i), p)
    return module


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_the_recipe_for_base_weights_resumes_with_equal_bits(order):
    """The whole state_dict of the model, loaded before the first step."""
    model, optimizer = trained_adapters()
    saved, whole = through_file(optimizer.state_dict()), through_file(model.state_dict())
    train_adapters(model, optimizer, 6, 12)
    fresh = adapted_model()
    second = SwitchLoRA(fresh, lr=0.02, **OFTEN)
    if order == "model first":
        fresh.load_state_dict(whole)
    second.load_state_dict(saved)
    if order == "optimizer first":
        fresh.load_state_dict(whole)
    train_adapters(fresh, second, 6, 12)
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))


def test_a_trainers_callback_can_keep_base_weights_beside_adapters(tmp_path):
    model, optimizer = trained_adapters()
    base = {k: v for k, v in model.state_dict().items() if k.endswith("base_layer.weight")}
    torch.save(base, tmp_path / "base_weights.pt")
    saved, adapters = through_file(optimizer.state_dict()), adapter_file(model)
    train_adapters(model, optimizer, 6, 12)
    fresh = adapted_model()
    second = SwitchLoRA(fresh, lr=0.02, **OFTEN)
    second.load_state_dict(saved)
    fresh.load_state_dict(adapters, strict=False)
    fresh.load_state_dict(torch.load(tmp_path / "base_weights.pt"), strict=False)
    train_adapters(fresh, second, 6, 12)
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))


def test_files_without_sums_of_base_weights_load_as_before():
    model, optimizer = trained_adapters()
    saved = through_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["base_sums"]
    fresh = adapted_model()
    fresh.load_state_dict(adapter_file(model), strict=False)
    second = SwitchLoRA(fresh, lr=0.02, **OFTEN)
    second.load_state_dict(saved)
    train_adapters(fresh, second, 6, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_base_weights_of_another_dtype_are_known_again(dtype):
    model, optimizer = trained_adapters()
    saved = through_file(optimizer.state_dict())
    fresh = adapted_model().to(dtype)
    fresh.load_state_dict(model.state_dict())
    second = SwitchLoRA(fresh, lr=0.02, **OFTEN)
    second.load_state_dict(saved)
    train_adapters(fresh, second, 6, 8)
    other = adapted_model().to(dtype)
    third = SwitchLoRA(other, lr=0.02, **OFTEN)
    third.load_state_dict(saved)
    other["up"].base_layer.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="is not the base weight"):
        train_adapters(other, third, 6, 8)


def test_one_switch_changes_the_sums_of_a_base_weight():
    W0 = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    before = switching.base_sums(W0)
    P, N = torch.randn(256, 1) * 1e-3, torch.randn(1, 512) * 1e-2
    fold_into_weight_(W0, P, N, 0.5)
    assert not switching._are_equal_sums(before, switching.base_sums(W0), W0.numel())
    shuffled = W0.flatten()[torch.randperm(W0.numel())]  # sums in another order
    assert switching._are_equal_sums(
        switching.base_sums(W0), switching.base_sums(shuffled), W0.numel()
    )


def test_a_base_weight_is_not_read_while_training(monkeypatch):
    """Sums are made where a checkpoint is saved, and compared once after a load."""
    calls = []
    sums = switching.base_sums
    monkeypatch.setattr(switching, "base_sums", lambda W: calls.append(1) or sums(W))
    model, optimizer = trained_adapters()
    assert not calls
    saved = optimizer.state_dict()
    assert len(calls) == 2
    optimizer.load_state_dict(saved)
    train_adapters(model, optimizer, 6, 9)
    assert len(calls) == 4
