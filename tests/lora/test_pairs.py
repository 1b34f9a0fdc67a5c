"""What every method of LoRA pairs must do, whatever it computes."""

import copy
import pickle

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.pair_problems import DOUBLE, PAIRS, SHAPES, factors, flat, pair_gradients
from helpers.problems import run, same, tensors

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
    optimizer = make(pairs)
    out = run(optimizer, flat(pairs), grads)
    state = tensors(optimizer)
    for i, alone in enumerate(several(shapes, dtype)):
        mine = make([alone])
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
