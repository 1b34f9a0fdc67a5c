"""What every method of LoRA pairs must do, whatever it computes."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.pair_problems import DOUBLE, PAIRS, SHAPES, factors, flat, pair_gradients
from helpers.problems import run, same, tensors
from torch import nn

from stiefel.optimizers._driver import units

methods = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def series(shapes, steps):
    """Gradients per parameter of pairs of these shapes."""
    return [G for i, shape in enumerate(shapes) for G in pair_gradients(*shape, steps, i)]


def several(shapes, dtype=torch.float32, zero=False):
    return [factors(*shape, i, dtype, zero) for i, shape in enumerate(shapes)]


@methods
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs_together_have_the_bits_of_each_alone(make, dtype, shape):
    """Equal pairs, one of another shape, one without and one with a bad gradient for a while."""
    shapes = [shape] * 4 + [(8, 6, 2)]
    pairs, grads = several(shapes, dtype), series(shapes, 6)
    grads[2] = [None, None, *grads[2][2:]]
    grads[3] = [None, None, *grads[3][2:]]
    grads[5] = [grads[5][0] * float("nan"), *grads[5][1:]]
    nearest = {"write": "nearest"}  # random bits go by position, as nothing has a name
    optimizer = make(pairs, **nearest)
    out = run(optimizer, flat(pairs), grads)
    state = tensors(optimizer)
    for i, alone in enumerate(several(shapes, dtype)):
        mine = make([alone], **nearest)
        W = run(mine, list(alone), grads[2 * i : 2 * i + 2])
        assert same([w[2 * i : 2 * i + 2] for w in out], W)
        own = {(j - 2 * i, key): value for (j, key), value in state.items() if j // 2 == i}
        assert same(own, tensors(mine))


@methods
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resuming_has_the_bits_of_not_stopping(make, dtype, shape):
    shapes = [shape, shape, (8, 6, 2)]
    pairs, grads = several(shapes, dtype, zero=True), series(shapes, 9)
    optimizer = make(pairs)
    run(optimizer, flat(pairs), [G[:5] for G in grads])
    saved, weights = through_a_file([optimizer.state_dict(), [p.detach() for p in flat(pairs)]])
    want = run(optimizer, flat(pairs), [G[5:] for G in grads])
    again = several(shapes, dtype)
    for p, W in zip(flat(again), weights, strict=True):
        p.data.copy_(W)
    resumed = make(again)
    resumed.load_state_dict(saved)
    for p, q in zip(flat(pairs), flat(again), strict=True):
        types = [{k: v.dtype for k, v in o.state[x].items() if isinstance(v, torch.Tensor)}
                 for o, x in ((optimizer, p), (resumed, q))]  # fmt: skip
        assert types[0] == types[1]
    assert same(run(resumed, flat(again), [G[5:] for G in grads]), want)
    assert same(tensors(resumed), tensors(optimizer))


@methods
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_alike(make, how):
    shapes = [(10, 7, 3)] * 2
    pairs, grads = several(shapes), series(shapes, 7)
    optimizer = make(pairs)
    run(optimizer, flat(pairs), [G[:3] for G in grads])
    copied = how(optimizer)
    params = [p for group in copied.param_groups for p in group["params"]]
    out = run(copied, params, [G[3:] for G in grads])
    assert same(out, run(optimizer, flat(pairs), [G[3:] for G in grads]))


@methods
@pytest.mark.parametrize("member", [0, 1])
def test_a_missing_half_stays_as_it_is(make, member):
    pairs, grads = several([(10, 7, 3)]), series([(10, 7, 3)], 7)
    grads[member] = [*grads[member][:2], None, None, None, None, grads[member][6]]
    optimizer = make(pairs)
    out = run(optimizer, flat(pairs), [G[:2] for G in grads])
    moment = {k: v.clone() for k, v in optimizer.state[pairs[0][member]].items()
              if k in ("exp_avg", "exp_avg_sq", "count")}  # fmt: skip
    out += run(optimizer, flat(pairs), [G[2:6] for G in grads])
    assert same(out[5][member], out[1][member])
    assert not same(out[5][1 - member], out[1][1 - member])
    assert same(moment, {k: optimizer.state[pairs[0][member]][k] for k in moment})
    W = run(optimizer, flat(pairs), [G[6:] for G in grads])
    assert torch.isfinite(W[0][member]).all()


@methods
def test_without_gradients_a_pair_has_no_state(make):
    pairs, grads = several([(10, 7, 3)] * 2), series([(10, 7, 3)] * 2, 3)
    optimizer = make(pairs)
    before = [p.detach().clone() for p in pairs[1]]
    run(optimizer, flat(pairs), [grads[0], grads[1], [None] * 3, [None] * 3])
    assert same(before, [p.detach() for p in pairs[1]])
    assert not any(optimizer.state.get(p) for p in pairs[1])
    assert optimizer.state[pairs[0][0]]["step"] == 3


@methods
@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_pair_with_one_bad_gradient_is_skipped_whole(make, member, bad):
    pairs, grads = several([(10, 7, 3)]), series([(10, 7, 3)], 3)
    optimizer = make(pairs)
    run(optimizer, flat(pairs), [G[:2] for G in grads])
    before, state = [p.detach().clone() for p in pairs[0]], tensors(optimizer)
    broken = [G[2].clone() for G in grads]
    broken[member][0, 0] = bad
    run(optimizer, flat(pairs), [[G] for G in broken])
    assert same(before, [p.detach() for p in pairs[0]]) and same(state, tensors(optimizer))
    assert sum(optimizer.skipped.values()) == 1


@pytest.mark.covering
@methods
@pytest.mark.parametrize("wait", [None, False], ids=["waits", "late"])
@pytest.mark.parametrize("bad", [[0], [1], [0, 1], [1, 0]], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_bad_gradient_of_either_factor_leaves_both_alone(make, wait, bad, count):
    """In one or after the other, alone or among pairs that go on."""
    shapes = [(10, 7, 3)] * count
    pairs, grads = several(shapes), series(shapes, 2 + len(bad))
    for step, member in enumerate(bad, 1):
        grads[member][step] = grads[member][step].clone()
        grads[member][step][-1, -1] = float("inf")
    optimizer = make(pairs)
    optimizer._wait = wait
    run(optimizer, flat(pairs), [G[:1] for G in grads])
    first = [p.detach().clone() for p in flat(pairs)]
    held = {key: X for key, X in tensors(optimizer).items() if key[0] < 2}
    run(optimizer, flat(pairs), [G[1:-1] for G in grads])
    assert optimizer.skipped  # takes flags that are late, which set clocks back
    assert same(first[:2], [p.detach() for p in pairs[0]])
    assert same(held, {key: X for key, X in tensors(optimizer).items() if key[0] < 2})
    for i in range(1, count):
        assert not same(first[2 * i : 2 * i + 2], [p.detach() for p in pairs[i]])
    run(optimizer, flat(pairs), [G[-1:] for G in grads])
    others = several(shapes)[:1]
    good = [[G[0], G[-1]] for G in grads[:2]]
    optimizer = make(others)
    want = run(optimizer, list(others[0]), good)[-1]
    assert same(want, [p.detach() for p in pairs[0]])


@methods
@pytest.mark.parametrize("zeros", [[0], [2], [0, 1]], ids=str)
@pytest.mark.parametrize("member", [0, 1])
def test_a_zero_direction_of_one_factor_does_not_freeze_the_other(make, zeros, member):
    """One column of B that is zero (or row of A): the rest of A (or B) goes on."""
    pairs = several([(10, 7, 3)])
    A, B = pairs[0]
    with torch.no_grad():
        (A if member else B.mT)[zeros] = 0.0
    optimizer = make(pairs, weight_decay=0.0)
    before = [p.detach().clone() for p in (A, B)]
    grads = series([(10, 7, 3)], 4)
    with torch.no_grad():  # what the chain rule gives there
        for G in grads[1 if member else 0]:
            (G.mT if member else G)[zeros] = 0.0
    grads[0 if member else 1] = [None] * 4  # so that the zero stays
    run(optimizer, [A, B], grads)
    other, was = (B.detach().mT, before[1].mT) if member else (A.detach(), before[0])
    rest = [i for i in range(3) if i not in zeros]
    assert all(not torch.equal(other[i], was[i]) for i in rest)
    assert float((other - was).abs().max()) > 1e-4


@pytest.mark.covering
@methods
@pytest.mark.parametrize("state_dtype", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE], ids=str)
def test_every_dtype_of_state_takes_the_step(make, state_dtype, dtype):
    shapes = [(10, 7, 3)] * 3 + [(40, 30, 4)]
    grads = series(shapes, 5)
    grads = [[g.to(dtype) for g in G] for G in grads]
    outs = []
    for options in ({}, {"state_dtype": state_dtype}):
        pairs = several(shapes, dtype)
        optimizer = make(pairs, **options)
        outs.append([W.double() for W in run(optimizer, flat(pairs), grads)[-1]])
        assert {p.dtype for p in flat(pairs)} == {dtype}
    held = {
        X.dtype
        for X in tensors(optimizer).values()
        if isinstance(X, torch.Tensor) and X.is_floating_point()
    }
    if state_dtype != "int8":
        assert held == {getattr(torch, state_dtype)}
    starts = [p.double() for p in flat(several(shapes, dtype))]
    for start, a, b in zip(starts, *outs, strict=True):
        moved = float((a - start).abs().max())
        exact = state_dtype in ("float32", "float64")
        least = torch.finfo(dtype).eps * float(a.abs().max())
        assert float((a - b).abs().max()) <= (1e-4 if exact else 0.5) * moved + least


@methods
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_factors_of_two_dtypes_take_the_step(make, state_dtype):
    """As near to the step of float64 factors as the narrower dtype allows, from either gradient."""
    kinds = itertools.permutations((torch.float32, torch.float16, DOUBLE), 2)
    grads = series([(10, 7, 3)], 2)
    for (a, b), frozen in itertools.product(kinds, (None, 0, 1)):
        outs = []
        for pair in ((DOUBLE, DOUBLE), (a, b)):
            A, B = several([(10, 7, 3)], DOUBLE)[0]
            members = [nn.Parameter(X.detach().to(d)) for X, d in zip((A, B), pair, strict=True)]
            given = [
                [None] * 2 if i == frozen else [G.to(d) for G in grads[i]]
                for i, d in enumerate(pair)
            ]
            optimizer = make([tuple(members)], state_dtype=state_dtype)
            before = [p.detach().clone() for p in members]
            after = run(optimizer, members, given)[-1]
            outs.append([(x - y).double() for x, y in zip(after, before, strict=True)])
        for i, (want, found) in enumerate(zip(*outs, strict=True)):
            least = torch.finfo((a, b)[i]).eps * float(after[i].abs().max())
            assert float((found - want).abs().max()) <= 0.5 * float(want.abs().max()) + 2 * least


@methods
def test_the_path_that_does_not_wait_for_flags_agrees(make):
    shapes = [(10, 7, 3)] * 2
    grads = series(shapes, 5)
    grads[1][2] = grads[1][2] * float("nan")
    outs = []
    for wait in (None, False):
        pairs = several(shapes)
        optimizer = make(pairs)
        optimizer._wait = wait
        outs.append(run(optimizer, flat(pairs), grads)[-1])
        assert sum(optimizer.skipped.values()) == 1
        outs.append([optimizer.state[A]["step"] for A, _ in pairs])
    assert same(outs[0], outs[2]) and outs[1] == outs[3] == [4, 5]


@methods
def test_gradients_random_numbers_and_plain_state_are_left_alone(make):
    pairs, grads = several([(10, 7, 3)]), series([(10, 7, 3)], 2)
    optimizer = make(pairs)
    kept, torch_state = [[G.clone() for G in part] for part in grads], torch.get_rng_state()
    run(optimizer, flat(pairs), grads)
    assert same(kept, grads) and torch.equal(torch_state, torch.get_rng_state())

    def plain(x):
        if isinstance(x, dict):
            return all(plain(v) for v in x.values())
        if isinstance(x, (list, tuple)):
            return all(plain(v) for v in x)
        return x is None or isinstance(x, (torch.Tensor, int, float, str, bool))

    assert plain(optimizer.state_dict())


@methods
def test_maximize_and_schedules(make):
    shapes = [(10, 7, 3)]
    pairs, grads = several(shapes), series(shapes, 4)
    want = run(make(pairs), flat(pairs), grads)
    maximized = several(shapes)
    out = run(
        make(maximized, maximize=True), flat(maximized), [[-G for G in part] for part in grads]
    )
    assert same(out, want)
    still = several(shapes)
    optimizer = make(still, lr=0.0)
    before = [p.detach().clone() for p in flat(still)]
    run(optimizer, flat(still), grads)
    assert same(before, [p.detach() for p in flat(still)])
    assert optimizer.state[still[0][0]]["step"] == 4
    tensor = several(shapes)
    out = run(make(tensor, lr=torch.tensor(0.02, dtype=DOUBLE)), flat(tensor), grads)
    assert same(out, want)


@methods
def test_state_is_allocated_by_shapes_alone(make):
    pairs, grads = several([(10, 7, 3)]), series([(10, 7, 3)], 1)
    eager, lazy = make(pairs), make(pairs)
    eager.init_state()
    run(lazy, flat(pairs), grads)
    shapes = [{key: getattr(v, "shape", None) for key, v in tensors(o).items()}
              for o in (eager, lazy)]  # fmt: skip
    assert shapes[0] == shapes[1]


@methods
def test_large_factors_have_the_bits_of_small_ones(make, monkeypatch):
    """Whatever the limit of stacks is."""
    shapes = [(12, 8, 4)] * 3
    outs = []
    for size in (1, 2**15):
        monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", size)
        pairs = several(shapes)
        outs.append(run(make(pairs), flat(pairs), series(shapes, 4)))
    assert same(*outs)
