"""The driver, over every method and over rules that only tests need."""

import copy
import math

import pytest
import torch
from helpers.methods import METHODS, STARTS_LATE
from helpers.problems import gradients, run, same, tensors, trajectory, weight
from helpers.rules import FoldRule, PairRule, PickRule, PlainRule, RowsRule, WindowRule, driver
from helpers.shapes import COLUMN, ODD, ROW, SHAPES, SQUARE, TALL, WIDE
from torch import nn

from stiefel.optimizers import Dense, GaLore, Muon, Rule, Slot, StackedOptimizer
from stiefel.optimizers._core.views import split_view
from stiefel.optimizers._driver import buckets, units
from stiefel.optimizers._driver.units import is_slab_row

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def views(monkeypatch):
    """Everything runs one unit at a time, nothing is stacked."""
    return lambda: monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)


def several(shape, count=4, steps=7, dtype=torch.float32):
    params = [weight(shape, k, dtype) for k in range(count)]
    return params, [gradients(shape, steps, k) for k in range(count)]


def holes(grads):
    """A missing gradient, a zero gradient at a refresh and one that is not finite."""
    grads[1][2] = None
    grads[2][0] = torch.zeros_like(grads[2][0])
    grads[0][3] = torch.zeros_like(grads[0][3])
    grads[3][3] = grads[3][3].clone()
    grads[3][3].view(-1)[-1] = float("nan")
    return grads


# Stacks, views, separate optimizers -------------------------------------------------------------


@pytest.mark.covering(whole=["method"])
@every_method
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_stack_equals_views_bitwise(method, dtype, shape, views):
    params, grads = several(shape, dtype=dtype)
    stacked = METHODS[method](params)
    a = run(stacked, params, holes(grads))
    assert max(len(bucket.units) for bucket in stacked._plan.buckets) > 1
    views()
    params, grads = several(shape, dtype=dtype)
    single = METHODS[method](params)
    b = run(single, params, holes(grads))
    assert same(a, b)
    assert same(tensors(stacked), tensors(single))
    assert stacked.skipped == single.skipped and sum(single.skipped.values()) == 1


@pytest.mark.covering
@every_method
@pytest.mark.parametrize("shape", [(33, 41), (129, 37), (96, 96), (200, 150)])
def test_larger_stacks_equal_views_bitwise(method, shape, views):
    """Sizes at which the matrix library rounds by the alignment of a result, and none at all."""
    results = []
    for force in (lambda: None, views):
        force()
        params, grads = several(shape, 3, steps=4)
        optimizer = METHODS[method](params)
        results.append((run(optimizer, params, grads), tensors(optimizer)))
    assert same(*results)


@pytest.mark.covering(whole=["method"])
@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [ODD, (45, 7), (41, 9)])
def test_joint_equals_separate_optimizers_bitwise(method, shape, dtype):
    """Rows of a slab start anywhere, tensors of their own on a line: the bits must not tell."""
    drawn = ("pick", "muon-low-rank", "muon-kaczmarz", "frugal-columns", "frugal-r", "apollo")
    if method.startswith(drawn):
        pytest.skip("draws by position, which differs by construction")
    params, grads = several(shape, 9, 4, dtype)
    a = run(METHODS[method](params), params, grads)
    for k in range(len(params)):
        q = weight(shape, k, dtype)
        b = run(METHODS[method]([q]), [q], [grads[k]])
        assert same([W[k] for W in a], [W[0] for W in b])


@every_method
def test_turned_weight_equals_transposed_problem(method):
    if method in ("frugal-columns", "frugal-rows", "frugal-randk"):
        pytest.skip("coordinates are not turned: columns become rows")
    asymmetric = ("galore-full", "muown", "muon-normuon", "muon-kaczmarz", "pick", "rows")
    if method.startswith(
        (*asymmetric, "rownorm", "sinkgd", "hybrid", "spectral-published", "symmetry")
    ):
        pytest.skip("the rule itself treats rows and columns differently")
    if method == "galore-reference":
        pytest.skip("LAPACK's signs belong to the matrix as it is stored; the fixtures check them")
    p, q = weight(TALL), None
    q = nn.Parameter(p.detach().mT.contiguous())
    grads = gradients(TALL, 7)
    a = run(
        METHODS[method]([p], adjust_lr_fn="match_rms_adamw")
        if method.startswith("muon")
        else METHODS[method]([p]),
        [p],
        [grads],
    )
    b = run(METHODS[method]([q]), [q], [[G.mT.contiguous() for G in grads]])
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[0], y[0].mT, rtol=0, atol=3e-6)


@every_method
def test_single_row_and_column_and_odd_shapes_stay_finite(method):
    for shape in (ROW, COLUMN, ODD, (1, 1)):
        assert all(W.isfinite().all() for W in trajectory(METHODS[method], shape))


def test_mixed_shapes_dtypes_and_clocks_share_one_optimizer():
    params = [
        weight(TALL, 0),
        weight(TALL, 1),
        weight(WIDE, 2),
        weight((6,), 3),
        weight(TALL, 4, torch.float64),
    ]
    grads = [gradients(p.shape if p.ndim > 1 else (6, 1), 6, k) for k, p in enumerate(params)]
    grads[3] = [G.view(-1) for G in grads[3]]
    grads[1][0] = grads[1][1] = None  # a late unit
    optimizer = METHODS["galore"](params)
    out = run(optimizer, params, grads)
    assert optimizer.state[params[0]]["step"] == 6 and optimizer.state[params[1]]["step"] == 4
    late = weight(TALL, 1)
    alone = run(METHODS["galore"]([late]), [late], [grads[1][2:]])
    assert same([W[1] for W in out[2:]], [W[0] for W in alone])
    assert optimizer.state[params[4]]["exp_avg"].dtype == torch.float64


def test_units_that_fell_apart_join_again():
    params, grads = several(SQUARE, steps=6)
    grads[1][1] = None
    optimizer = METHODS["muon"](params)
    run(optimizer, params, grads)
    optimizer.state[params[1]]["step"] = 6
    optimizer._plan.mask = None
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [len(bucket.units) for bucket in optimizer._plan.buckets] == [4]


def test_chunks_bound_a_stack_and_keep_the_bits(monkeypatch):
    params, grads = several(SQUARE, 5)
    a = run(METHODS["galore"](params), params, grads)
    monkeypatch.setitem(buckets.MAX_STACK_BYTES, "cpu", 2 * 16 * 16 * 4)
    params, grads = several(SQUARE, 5)
    optimizer = METHODS["galore"](params)
    b = run(optimizer, params, grads)
    assert [len(bucket.units) for bucket in optimizer._plan.buckets] == [2, 2, 1]
    assert same(a, b)


def test_rows_of_a_slab_become_tensors_of_their_own():
    params, grads = several(SQUARE, steps=2)
    optimizer = METHODS["muon"](params)
    run(optimizer, params, grads)
    assert all(is_slab_row(optimizer.state[p]["momentum_buffer"]) for p in params)
    params[0].grad = None
    optimizer.step()  # the unit that sits out must not keep the old slab alive
    assert not is_slab_row(optimizer.state[params[0]]["momentum_buffer"])
    assert all(is_slab_row(optimizer.state[p]["momentum_buffer"]) for p in params[1:])


def test_a_bucket_that_stays_as_it_is_keeps_its_slabs():
    squares, grads = several(SQUARE, steps=3)
    p, late = weight(TALL, 7), gradients(TALL, 3)
    optimizer = METHODS["muon"]([*squares, p])
    late[1] = None
    run(optimizer, [*squares, p], [[s[0]] for s in [*grads, late]])
    row = optimizer.state[squares[0]]["momentum_buffer"]
    run(optimizer, [*squares, p], [s[1:] for s in [*grads, late]])
    assert optimizer.state[squares[0]]["momentum_buffer"] is row


def test_state_replaced_from_outside_is_noticed():
    params, grads = several(SQUARE, steps=4)
    optimizer = METHODS["muon"](params)
    twin_params, _ = several(SQUARE, steps=4)
    twin = METHODS["muon"](twin_params)
    for step in range(4):
        for p, q, series in zip(params, twin_params, grads, strict=True):
            p.grad, q.grad = series[step], series[step]
        optimizer.step()
        twin.step()
        for entry in optimizer.state.values():  # the idiom of offloading tools
            for key, value in entry.items():
                if isinstance(value, torch.Tensor):
                    entry[key] = value.clone()
    assert same([p.detach() for p in params], [p.detach() for p in twin_params])


# Learning rate, decay, maximize, closures, hooks --------------------------------------------------


@every_method
def test_maximize_is_descent_on_the_negative_bitwise(method):
    p, q = weight(ODD), weight(ODD)
    grads = gradients(ODD, 7)
    a = run(METHODS[method]([p], maximize=True), [p], [grads])
    b = run(METHODS[method]([q]), [q], [[-G for G in grads]])
    assert same(a, b)
    assert torch.equal(p.grad, grads[-1])


@every_method
def test_tensor_lr_and_schedulers_equal_float_lr(method):
    p, q, grads = weight(WIDE), weight(WIDE), gradients(WIDE, 6)
    a = METHODS[method]([p], lr=float(torch.tensor(0.02)))
    b = METHODS[method]([q], lr=torch.tensor(0.02))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.5**k) for o in (a, b)]
    for G in grads:
        p.grad = q.grad = G
        for o, schedule in zip((a, b), schedules, strict=True):
            o.step()
            schedule.step()
    assert isinstance(b.param_groups[0]["lr"], torch.Tensor)
    torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


def test_cycled_betas_are_followed_without_new_units():
    p, grads = weight(WIDE), gradients(WIDE, 6)
    optimizer = METHODS["galore"]([p])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    seen, plans = set(), set()
    for G in grads:
        p.grad = G
        optimizer.step()
        schedule.step()
        seen.add(optimizer.param_groups[0]["betas"][0])
        plans.add(id(optimizer._plan.units[0]))
    assert len(seen) > 3 and len(plans) == 1
    assert optimizer._plan.rules[0].betas != optimizer.defaults["betas"]


@every_method
def test_group_lr_and_decay_act_only_on_their_group(method):
    def final(lr, decay):
        p, q = weight(ODD, 0), weight(ODD, 1)
        groups = [{"params": [p]}, {"params": [q], "lr": lr, "weight_decay": decay}]
        run(METHODS[method](groups), [p, q], [gradients(ODD, 4, 0), gradients(ODD, 4, 1)])
        return p.detach(), q.detach()

    (p0, q0), (p1, q1), (p2, q2) = final(0.02, 0.1), final(0.04, 0.1), final(0.02, 0.7)
    assert torch.equal(p0, p1) and torch.equal(p0, p2)
    assert not torch.equal(q0, q1) and not torch.equal(q0, q2)


@every_method
def test_decay_is_decoupled_and_uses_the_bare_lr(method):
    """With a zero gradient and zero state only the decay is left."""
    p = weight(ODD)
    before = p.detach().clone()
    optimizer = METHODS[method]([p], weight_decay=0.25)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before * (1 - 0.02 * 0.25), rtol=0, atol=1e-6)


def test_closure_runs_once_under_grad_and_before_everything():
    p = weight(SQUARE)
    optimizer, calls = METHODS["muon"]([p]), []

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    q = weight(SQUARE)
    twin = METHODS["muon"]([q])
    for _ in range(3):
        loss = optimizer.step(closure)
        q.grad = 2 * q.detach()
        twin.step()
    assert calls == [True] * 3 and loss.requires_grad
    assert torch.equal(p, q)


def test_hooks_fire_once_after_parent_and_child_were_made():
    class Child(Muon):
        pass

    p = weight(SQUARE)
    Muon([p])
    child, seen = Child([p]), []
    child.register_step_pre_hook(lambda *_: seen.append("pre"))
    child.register_step_post_hook(lambda *_: seen.append("post"))
    p.grad = torch.ones_like(p)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        child.step()
    assert seen == ["pre", "post"]
    scopes = [event.key for event in profile.key_averages() if "Optimizer.step#" in event.key]
    assert scopes == ["Optimizer.step#Child.step"]


# Gradients that are missing, zero, bad, sparse ----------------------------------------------------


@every_method
def test_missing_gradient_leaves_all_of_a_unit_alone(method):
    p, q = weight(SQUARE, 0), weight(SQUARE, 1)
    optimizer = METHODS[method]([p, q])
    before = q.detach().clone()
    run(optimizer, [p, q], [gradients(SQUARE, 3), [None] * 3])
    assert torch.equal(q, before) and q not in optimizer.state


@every_method
def test_gradients_are_not_modified_or_dropped(method):
    params, grads = several(TALL, 2)
    optimizer = METHODS[method](params)
    for step in range(7):
        kept = [series[step].clone() for series in grads]
        for p, G in zip(params, kept, strict=True):
            p.grad = G
        optimizer.step()
        for p, series in zip(params, grads, strict=True):
            assert torch.equal(p.grad, series[step])


@pytest.mark.covering
@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 3, 4])
def test_bad_gradient_skips_the_unit_and_nothing_else(method, bad, at):
    params, grads = several(SQUARE, 3, steps=6)
    poisoned = [[G.clone() for G in series] for series in grads]
    poisoned[1][at][3, 5] = bad
    optimizer = METHODS[method](params)
    a = run(optimizer, params, poisoned)
    assert sum(optimizer.skipped.values()) == 1
    others, _ = several(SQUARE, 3, steps=6)
    b = run(
        METHODS[method](others),
        others,
        [grads[0], [*grads[1][:at], None, *grads[1][at + 1 :]], grads[2]],
    )
    assert same(a, b)


def test_large_finite_gradient_is_not_taken_for_infinite():
    p = weight((8, 8))
    optimizer = METHODS["muon"]([p])
    before = p.detach().clone()
    p.grad = torch.full((8, 8), 3e37)  # 64 of them overflow a float32 sum
    assert not p.grad.sum().isfinite()
    optimizer.step()
    assert optimizer.skipped == {} and not torch.equal(p, before) and p.isfinite().all()


@every_method
def test_nonfinite_raise_names_the_parameter_and_changes_nothing(method):
    p, v = weight(SQUARE), weight((4,), 1)
    optimizer = METHODS[method]([("layer.weight", p), ("layer.bias", v)], nonfinite="raise")
    run(optimizer, [p, v], [gradients(SQUARE, 2), [torch.ones(4)] * 2])
    before, weights = tensors(optimizer), [p.detach().clone(), v.detach().clone()]
    p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(RuntimeError, match=r"non-finite gradient of parameter 'layer\.weight'"):
        optimizer.step()
    assert same(before, tensors(optimizer)) and same(weights, [p.detach(), v.detach()])


@pytest.mark.covering
@every_method
@pytest.mark.parametrize("shape", [TALL, SQUARE])
def test_device_path_equals_host_path(method, shape):
    """Flags that arrive one step later, forced on the CPU."""
    results = []
    for wait in (True, False):
        params, grads = several(shape, 4, steps=8)
        grads[1][2] = None
        for step in (1, 4, 6):
            grads[3][step] = grads[3][step].clone()
            grads[3][step][0, 0] = float("inf")
        grads[0][4] = torch.full(shape, float("nan"))
        optimizer = METHODS[method](params)
        optimizer._wait = wait
        results.append((run(optimizer, params, grads), optimizer.skipped, tensors(optimizer)))
    (a, skipped, state), (b, late, late_state) = results
    assert skipped == late and sum(late.values()) == 4
    for x, y in zip(a, b, strict=True):
        for W, V in zip(x, y, strict=True):
            torch.testing.assert_close(W, V, rtol=0, atol=1e-6)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(late_state[key], value, rtol=1e-5, atol=1e-6)
        else:
            assert late_state[key] == value


def test_device_path_state_dict_has_true_clocks():
    p = weight(SQUARE)
    optimizer = METHODS["muon"]([p])
    optimizer._wait = False
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 0
    assert copy.deepcopy(optimizer).state_dict()["state"][0]["step"] == 0


@every_method
def test_zero_gradient_at_the_first_refresh_is_due_again(method):
    p = weight(SQUARE)
    optimizer = METHODS[method]([p], weight_decay=0)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    if "refreshed" not in optimizer.state[p]:
        pytest.skip("no refresh")
    assert optimizer.state[p]["refreshed"] == 0 and torch.equal(p, before)
    p.grad = gradients(SQUARE, 1)[0]
    optimizer.step()
    assert optimizer.state[p]["refreshed"] == 2
    assert torch.equal(p, before) == (method in STARTS_LATE)


def test_zero_gradient_at_a_later_refresh_keeps_the_basis():
    p, grads = weight(SQUARE), gradients(SQUARE, 8)
    optimizer = METHODS["galore"]([p])
    run(optimizer, [p], [grads[:3]])
    basis = optimizer.state[p]["basis"].clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()  # update 4 would refresh
    assert torch.equal(optimizer.state[p]["basis"], basis)
    assert optimizer.state[p]["refreshed"] == 1 and optimizer.state[p]["step"] == 4


@every_method
def test_dry_step_only_allocates(method):
    """What a checkpoint probe does: lr 0, every gradient 0."""
    params, grads = several(TALL, 3)
    vector = weight((5,), 9)
    optimizer, twin_params = METHODS[method]([*params, vector]), several(TALL, 3)[0]
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in [*params, vector]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(before, [p.detach() for p in params])
    assert all(optimizer.state[p]["step"] == 0 for p in params)
    assert float(optimizer.state[vector]["step"]) == 1.0
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    vector.grad = None
    twin = METHODS[method]([*twin_params, weight((5,), 9)])
    assert same(run(optimizer, params, grads), run(twin, twin_params, grads))
    assert set(tensors(optimizer)) >= set(tensors(twin))


@every_method
def test_init_state_has_the_keys_and_shapes_of_a_step(method):
    params, grads = several(TALL, 2, steps=1)
    vector, frozen = weight((5,), 9), weight(TALL, 8).requires_grad_(False)
    eager = METHODS[method]([*params, vector, frozen])
    eager.init_state()
    first = {
        k: v.shape if isinstance(v, torch.Tensor) else type(v) for k, v in tensors(eager).items()
    }
    vector.grad = torch.ones(5)
    run(eager, params, grads)
    after = {
        k: v.shape if isinstance(v, torch.Tensor) else type(v) for k, v in tensors(eager).items()
    }
    assert first == after and frozen not in eager.state


def test_sparse_gradient_is_refused_before_anything_changes():
    p, table = weight(SQUARE), nn.Embedding(8, 4, sparse=True)
    optimizer = METHODS["muon"]([p, *table.parameters()])
    table(torch.tensor([1, 2])).sum().backward()
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state


# AdamW beside the rule ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}, {"maximize": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_parameters_are_bit_equal_to_torch(flags, dtype):
    def make():
        return [weight((6,), 0, dtype), weight((3, 4), 1, dtype), weight((), 2, dtype)]

    ours, theirs = make(), make()
    settings = {"lr": 3e-3, "weight_decay": 0.1}
    a = Muon(
        [{"params": ours, "rule": "adamw"}],
        **settings,
        adamw_betas=(0.9, 0.98),
        adamw_eps=1e-6,
        write="nearest",
        **flags,
    )
    b = torch.optim.AdamW(theirs, **settings, betas=(0.9, 0.98), eps=1e-6, **flags)
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert same([p.detach() for p in ours], [p.detach() for p in theirs])
    for p, q in zip(ours, theirs, strict=True):
        assert same(dict(a.state[p]), dict(b.state[q]))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("lr", [3e-3, torch.tensor(3e-3)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float64,) * 3, (torch.float16,) * 3, (torch.float32, torch.bfloat16, torch.float32)],
    ids=["double", "half", "mixed"],
)
def test_fused_adamw_is_bit_equal_to_torch_where_gradients_are_missing(dtypes, lr, maximize):
    def make():
        return [weight(shape, i, dtypes[i]) for i, shape in enumerate(((4, 6), (5,), ()))]

    ours, theirs = make(), make()
    settings = {"lr": lr, "weight_decay": 0.1, "fused": True, "maximize": maximize}
    group = {"params": ours, "rule": "adamw", "write": "nearest"}
    a = Muon([group], **settings, adamw_betas=(0.9, 0.98))
    b = torch.optim.AdamW(theirs, **settings, betas=(0.9, 0.98))
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            draw = torch.Generator().manual_seed(10 * step + i)
            grad = torch.randn(p.shape, generator=draw).to(p.dtype)
            p.grad, q.grad = (None, None) if step == i else (grad, grad.clone())
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert same(p.detach(), q.detach()) and same(dict(a.state[p]), dict(b.state[q]))


def test_a_stack_is_written_back_to_weights_of_any_strides():
    plain = [weight((4, 6), i) for i in range(3)]
    values = [p.detach().clone() for p in plain]
    transposed, wide = values[1].t().contiguous().t(), torch.zeros(4, 12)[:, ::2].copy_(values[2])
    strided = [nn.Parameter(W) for W in (values[0], transposed, wide)]
    memory = [(p.data_ptr(), p.stride()) for p in strided]
    for params in (plain, strided):
        for i, p in enumerate(params):
            p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        Muon(params, lr=0.1).step()
    assert same([p.detach() for p in plain], [p.detach() for p in strided])
    assert [(p.data_ptr(), p.stride()) for p in strided] == memory


@pytest.mark.parametrize("as_tensor", [False, True])
def test_adamw_lr_follows_the_schedule_of_its_group(as_tensor):
    lrs, adamw_lrs = (0.02, 0.05), (0.001, 0.0025)
    params = [(weight(SQUARE, i), weight((4,), i)) for i in (0, 1)]
    twins = [weight((4,), i) for i in (0, 1)]
    groups = [
        {"params": list(pair), "lr": torch.tensor(lr, dtype=torch.float64) if as_tensor else lr}
        for pair, lr in zip(params, lrs, strict=True)
    ]
    ours = Muon(groups, lr=0.02, adamw_lr=0.001, adamw_betas=(0.9, 0.95), weight_decay=0.1)
    theirs = torch.optim.AdamW(
        [{"params": [p], "lr": lr} for p, lr in zip(twins, adamw_lrs, strict=True)],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[*rates], total_steps=9, cycle_momentum=False
        )
        for optimizer, rates in ((ours, lrs), (theirs, adamw_lrs))
    ]
    for step in range(8):
        for (W, v), twin in zip(params, twins, strict=True):
            W.grad, v.grad = torch.ones_like(W), torch.ones_like(v) * (step - 3)
            twin.grad = v.grad.clone()
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
    assert len(ours.param_groups) == 2
    for (_, v), twin in zip(params, twins, strict=True):
        torch.testing.assert_close(v, twin, rtol=1e-6, atol=1e-7)


def test_adamw_settings_default_to_the_group_and_the_method():
    v, w = weight((4,)), weight((4,))
    galore = GaLore([v], lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    torch_like = torch.optim.AdamW([w], lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    for _ in range(3):
        v.grad = w.grad = torch.tensor([1.0, -2.0, 0.5, 3.0])
        galore.step()
        torch_like.step()
    assert torch.equal(v, w)


# Rules of every kind ------------------------------------------------------------------------------


def test_every_kind_of_term_writes_what_it_says():
    p, G = weight(WIDE), gradients(WIDE, 1)[0]
    before = p.detach().double()
    driver(RowsRule())([p]), None
    optimizer = driver(RowsRule())([p])
    p.grad = G
    optimizer.step()
    G = G.double()
    B = 0.1 * G
    step = B / (B.norm(dim=1, keepdim=True) + 1e-8) + G.sign() + G[:, :1] @ G[:1]
    keep = 1 - 0.1 * 0.1 * (G * before >= 0)
    torch.testing.assert_close(p.double(), keep * before - 0.1 * 0.5 * step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_touches_only_its_rows_or_columns(dim, dtype):
    p = weight((7, 9), dtype=dtype)
    before, G = p.detach().clone(), gradients((7, 9), 1)[0]
    optimizer = driver(PickRule(dim=dim), weight_decay=0.0)([p])
    p.grad = G.to(dtype)
    optimizer.step()
    index = optimizer.state[p]["index"].long()
    expected = before.float()
    chosen = expected.index_select(dim, index) - 0.1 * G.to(dtype).float().index_select(dim, index)
    expected.index_copy_(dim, index, chosen)
    torch.testing.assert_close(p.detach(), expected.to(dtype))
    untouched = [i for i in range(p.shape[dim]) if i not in index.tolist()]
    assert torch.equal(
        p.detach().index_select(dim, torch.tensor(untouched)),
        before.index_select(dim, torch.tensor(untouched)),
    )


def test_pair_steps_one_after_the_other_and_leaves_a_missing_half_out():
    def make():
        return [weight((3, 8), 0), weight((6, 3), 1)]

    A, B = make()
    GA, GB = gradients((3, 8), 3, 0), gradients((6, 3), 3, 1)
    optimizer = driver(PairRule())([A, B])
    before = B.detach().clone()
    run(optimizer, [A, B], [GA, [None, GB[1], GB[2]]])
    assert "count" in optimizer.state[B] and float(optimizer.state[B]["count"]) == 2
    assert not torch.equal(B, before)
    assert optimizer.state[A]["step"] == 3 and "step" not in optimizer.state[B]
    C, D = make()
    first = driver(PairRule())([C, D])
    C.grad, D.grad = GA[0], GB[0]
    start = C.detach().double(), D.detach().double()
    first.step()
    step = 0.1 * 0.5 * GA[0].double()
    step *= min(1.0, float(0.1 * start[0].norm() / step.norm()))
    new = 0.99 * start[0] - step
    torch.testing.assert_close(C.double(), new, rtol=0, atol=1e-6)
    want = 0.99 * start[1] - 0.1 * 0.5 * GB[0].double() / (1 + C.double().square().sum())
    torch.testing.assert_close(D.double(), want, rtol=0, atol=1e-6)


def test_pair_with_one_bad_gradient_is_skipped_whole():
    A, B = weight((3, 8), 0), weight((6, 3), 1)
    optimizer = driver(PairRule())([A, B])
    before = [A.detach().clone(), B.detach().clone()]
    A.grad, B.grad = torch.ones_like(A), torch.full_like(B, float("nan"))
    optimizer.step()
    assert same(before, [A.detach(), B.detach()]) and sum(optimizer.skipped.values()) == 1
    assert optimizer.state[A]["step"] == 0


def test_pairs_need_an_even_number():
    with pytest.raises(ValueError, match="runs of 2"):
        optimizer = driver(PairRule())([weight((3, 8))])
        optimizer.init_state()


def test_state_lives_only_in_its_window():
    params = [weight(SQUARE, k) for k in range(2)]
    optimizer = driver(WindowRule())(params)
    held = []
    for step in range(6):
        for k, p in enumerate(params):
            p.grad = gradients(SQUARE, 1, step + k)[0]
        optimizer.step()
        held.append(["exp_avg" in optimizer.state[p] for p in params])
    assert held == [[True, False]] * 2 + [[False, True]] * 2 + [[True, False]] * 2


def test_a_rule_may_change_its_weight_at_a_refresh():
    params = [nn.Parameter(torch.full((4, 4), 8.0)) for _ in range(3)]
    optimizer = driver(FoldRule(), weight_decay=0.0)(params)
    for p in params:
        p.grad = torch.zeros_like(p)
        p.grad[0, 0] = 1e-9
    optimizer.step()
    assert all(len(bucket.units) == 1 for bucket in optimizer._plan.buckets)
    assert all(torch.allclose(p, torch.full((4, 4), 4.0)) for p in params)


def test_phase_decides_when_a_refresh_is_due():
    @torch.no_grad()
    def times(order, gap=3):
        p = weight(SQUARE)
        optimizer = driver(PickRule(gap=gap, order=order))([p])
        seen = []
        for G in gradients(SQUARE, 8):
            p.grad = G
            optimizer.step()
            seen.append(optimizer.state[p]["refreshed"])
        return sorted(set(seen))

    assert times(0) == [1, 4, 7]
    assert times(1) == [1, 3, 6]


def test_two_methods_in_one_optimizer():
    p, q = weight(SQUARE, 0), weight(WIDE, 1)
    groups = [{"params": [p]}, {"params": [q], "rule": "GaLore", "rank": 2, "update_proj_gap": 3}]
    grads = [gradients(SQUARE, 5, 0), gradients(WIDE, 5, 1)]
    both = run(Muon(groups, lr=0.02, weight_decay=0.0), [p, q], grads)
    p2, q2 = weight(SQUARE, 0), weight(WIDE, 1)
    a = run(Muon([p2], lr=0.02, weight_decay=0.0), [p2], grads[:1])
    b = run(GaLore([q2], lr=0.02, rank=2, update_proj_gap=3), [q2], grads[1:])
    assert same([W[0] for W in both], [W[0] for W in a])
    assert same([W[1] for W in both], [W[0] for W in b])


@pytest.mark.parametrize("bad", ["zeros", "nan"])
def test_write_keeps_bfloat16_rounding_single(bad):
    """bf16 weights: the step is summed in float32 and rounded once."""
    p = weight(SQUARE, dtype=torch.bfloat16)
    before, G = p.detach().float(), gradients(SQUARE, 1)[0].to(torch.bfloat16)
    optimizer = driver(PlainRule())([{"params": [p], "write": "nearest"}])
    p.grad = G
    optimizer.step()
    assert torch.equal(p.detach(), (before * (1 - 0.1 * 0.1) - 0.1 * G.float()).to(torch.bfloat16))
    if bad == "nan":
        kept = p.detach().clone()
        p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
        assert torch.equal(p.detach(), kept)


# Views --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["muon", "galore", "galore-full", "rows"])
@pytest.mark.parametrize(
    "view, shape, cut",
    [
        ("batch", (3, 8, 6), lambda x: list(x)),
        ("auto", (3, 8, 6), lambda x: list(x)),
        ("auto", (8, 3, 2, 2), lambda x: [x.flatten(1)]),
        ("flatten", (8, 3, 4), lambda x: [x.flatten(1)]),
        ("transposed", (6, 8), lambda x: [x.mT]),
        ("transposed", (2, 6, 8), lambda x: [y.mT for y in x]),
        ("heads:2", (8, 6), lambda x: [x[:4], x[4:]]),
        ("heads_in:2", (6, 8), lambda x: [x[:, :4], x[:, 4:]]),
        ("rows:4,2,2", (8, 6), lambda x: [x[:4], x[4:6], x[6:]]),
        ("interleaved", (8, 6), lambda x: [x[::2], x[1::2]]),
        ("rows:4,2,2", (2, 8, 6), lambda x: [x[:, :4], x[:, 4:6], x[:, 6:]]),
        ("interleaved", (1, 8, 6), lambda x: [x[:, ::2], x[:, 1::2]]),
        ("transposed:rows:4,4", (6, 8), lambda x: [x[:, :4].mT, x[:, 4:].mT]),
        ("transposed:interleaved", (2, 6, 8), lambda x: [x.mT[:, ::2], x.mT[:, 1::2]]),
        ("transposed:heads:2", (6, 8), lambda x: [x[:, :4].mT, x[:, 4:].mT]),
    ],
)
def test_view_equals_separate_parameters(method, view, shape, cut):
    p, grads = weight(shape), gradients(shape, 7)
    parts = [nn.Parameter(x.detach().clone().contiguous()) for x in cut(p)]
    whole = METHODS[method]([p], view=view)
    separate = METHODS[method](parts)
    a = run(whole, [p], [grads])
    b = run(
        separate,
        parts,
        [list(x) for x in zip(*[map(torch.clone, cut(G)) for G in grads], strict=True)],
    )
    for x, ys in zip(a, b, strict=True):
        for part, y in zip(cut(x[0]), ys, strict=True):
            torch.testing.assert_close(part, y, rtol=0, atol=2e-6)
    assert all(v.shape[-1:] for v in whole.state[p].values() if isinstance(v, torch.Tensor))


def test_channels_last_weight_is_written_back():
    p = nn.Parameter(weight((8, 3, 2, 2)).detach().to(memory_format=torch.channels_last))
    q = nn.Parameter(p.detach().contiguous())
    grads = gradients((8, 3, 2, 2), 4)
    a, b = run(METHODS["muon"]([p]), [p], [grads]), run(METHODS["muon"]([q]), [q], [grads])
    torch.testing.assert_close(a[-1][0], b[-1][0].contiguous(), rtol=0, atol=2e-6)


def test_state_like_the_weight_has_its_shape_whatever_the_view():
    p = weight((8, 6))
    optimizer = METHODS["muon"]([p], view="heads:2")
    run(optimizer, [p], [gradients((8, 6), 1)])
    assert optimizer.state[p]["momentum_buffer"].shape == (8, 6)
    q = weight((8, 6))
    galore = METHODS["galore"]([q], view="rows:4,4", rank=2)
    run(galore, [q], [gradients((8, 6), 1)])
    assert {"basis.0", "basis.1", "step.0", "step.1", "refreshed.0"} <= set(galore.state[q])


@pytest.mark.parametrize(
    "view, shape, text",
    [
        ("sideways", (4, 4), "unknown"),
        ("heads:3", (8, 4), "must divide"),
        ("heads:0", (8, 4), "positive whole numbers"),
        ("rows:1,2", (8, 4), "add up"),
        ("interleaved", (7, 4), "even number"),
        ("heads:2", (2, 8, 4), "2-D"),
        ("interleaved", (2, 2, 8, 4), "2-D"),
        ("transposed:rows:4,4", (8, 6), "add up"),
        ("transposed:flatten", (8, 6), "after the colon choose one of heads"),
    ],
)
def test_bad_view_is_one_sentence(view, shape, text):
    with pytest.raises(ValueError, match=text):
        split_view(view, shape)
    with pytest.raises(ValueError, match=text):
        METHODS["muon"]([weight(shape)], view=view)


def test_expert_stack_with_one_bad_expert_skips_its_tensor():
    p = weight((3, 8, 6))
    optimizer = METHODS["muon"]([p])
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    p.grad[1, 0, 0] = float("inf")
    optimizer.step()
    assert torch.equal(p, before) and optimizer.skipped == {0: 1}


def test_indices_are_one_per_matrix_and_never_meet():
    seen = []

    class IndexRule(Rule):
        def update(self, w):
            seen.extend(w.indices)
            return w.step(Dense(w.grad.clone()))

    params = [weight((3, 4, 4), 0), weight((4, 4), 1), weight((4, 4), 2)]
    groups = [{"params": params[:2]}, {"params": params[2:], "view": "rows:2,2"}]
    optimizer = StackedOptimizer(groups, IndexRule(), 0.1)
    run(optimizer, params, [gradients(p.shape, 1) for p in params])
    assert len(seen) == len(set(seen)) == 6 and {0, 1, 2} <= set(seen)


# Odds and ends ------------------------------------------------------------------------------------


def test_no_global_random_number_is_drawn():
    before = torch.get_rng_state()
    for make in METHODS.values():
        trajectory(make, SQUARE)
    assert torch.equal(before, torch.get_rng_state())


def test_state_dtype_is_kept_and_close():
    a = trajectory(lambda ps: METHODS["muon"](ps), SQUARE)
    p = weight(SQUARE)
    narrow = METHODS["muon"]([p], state_dtype="bfloat16")
    b = run(narrow, [p], [gradients(SQUARE, 7)])
    assert narrow.state[p]["momentum_buffer"].dtype == torch.bfloat16
    torch.testing.assert_close(a[-1], b[-1][0], rtol=0, atol=0.05)
    q = weight(SQUARE)
    galore = METHODS["galore"]([q], state_dtype="bfloat16")
    c = run(galore, [q], [gradients(SQUARE, 7)])
    assert galore.state[q]["exp_avg"].dtype == torch.bfloat16
    assert math.isfinite(float(c[-1][0].sum()))


def test_fp32_gradients_of_bf16_weights_are_accepted():
    p = weight(SQUARE, dtype=torch.bfloat16)
    p.grad_dtype = torch.float32
    optimizer = METHODS["galore"]([p])
    for G in gradients(SQUARE, 4):
        p.grad = G
        optimizer.step()
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_weight_swapped_after_construction_is_followed():
    """FSDP2 and the Trainer replace parameters in the groups."""
    p = weight(SQUARE)
    optimizer = METHODS["muon"]([p])
    run(optimizer, [p], [gradients(SQUARE, 2)])
    q = weight(SQUARE, 5)
    optimizer.param_groups[0]["params"] = [q]
    optimizer.state.clear()
    twin_q = weight(SQUARE, 5)
    twin = METHODS["muon"]([twin_q])
    assert same(
        run(optimizer, [q], [gradients(SQUARE, 2)]), run(twin, [twin_q], [gradients(SQUARE, 2)])
    )


def test_weight_that_changes_its_shape_is_refused():
    params = [weight(SQUARE, k) for k in range(2)]
    optimizer = METHODS["muon"](params)
    run(optimizer, params, [gradients(SQUARE, 1, k) for k in range(2)])
    for p in params:
        p.grad = None
        p.data = torch.zeros(4, 4)
        p.grad = torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match="changed its shape"):
        optimizer.step()
    one = weight((3, 4, 5))
    single = METHODS["muon"]([one])
    run(single, [one], [gradients((3, 4, 5), 1)])
    one.grad = None
    one.data = torch.zeros(3, 5, 4)
    one.grad = torch.zeros(3, 5, 4)
    with pytest.raises(RuntimeError, match="changed its shape"):
        single.step()


def test_custom_state_fill_and_dtype():
    @torch.no_grad()
    def made(slot):
        class OneRule(Rule):
            def state(self, m, n):
                return {"x": slot}

            def update(self, w):
                return w.step(Dense(w.grad.clone()))

        p = weight((3, 5))
        optimizer = StackedOptimizer([p], OneRule(), 0.1)
        optimizer.init_state()
        return optimizer.state[p]["x"]

    assert torch.equal(made(Slot("mm", fill="eye")), torch.eye(3))
    assert torch.equal(
        made(Slot("", dtype=torch.int32, fill=7)), torch.tensor(7, dtype=torch.int32)
    )
    assert made(Slot("r1", r=2, dtype="weight")).shape == (2, 1)


@every_method
def test_autocast_of_the_caller_does_not_reach_the_step(method):
    p, q, grads = weight(SQUARE), weight(SQUARE), gradients(SQUARE, 4)
    inside, outside = METHODS[method]([p]), METHODS[method]([q])
    for G in grads:
        p.grad, q.grad = G, G
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.step()
        outside.step()
    assert torch.equal(p, q)


@every_method
def test_a_replaced_state_dict_is_noticed(method):
    params, grads = several(SQUARE, 2, 4)
    twins, _ = several(SQUARE, 2, 4)
    optimizer, twin = METHODS[method](params), METHODS[method](twins)
    for step in range(4):
        for p, q, series in zip(params, twins, grads, strict=True):
            p.grad = q.grad = series[step]
        optimizer.step()
        twin.step()
        for p in params:
            optimizer.state[p] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v
                for k, v in optimizer.state[p].items()
            }
    assert same([p.detach() for p in params], [q.detach() for q in twins])
    assert same(tensors(optimizer), tensors(twin))


def test_a_bad_parameter_of_several_blocks_counts_once():
    for wait in (True, False):
        p = weight((8, 6))
        optimizer = METHODS["muon"]([p], view="rows:4,2,2")
        optimizer._wait = wait
        p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
        assert sum(optimizer.skipped.values()) == 1
        assert [optimizer.state[p][f"step.{i}"] for i in range(3)] == [0, 0, 0]


def test_late_flags_are_one_tensor():
    params = [weight(SQUARE, 0), weight(SQUARE, 1), weight(TALL, 2), weight((300, 200), 3)]
    optimizer = METHODS["muon"](params)
    optimizer._wait = False
    run(optimizer, params, [gradients(tuple(p.shape), 1) for p in params])
    assert len(optimizer._plan.buckets) == 3 and len(optimizer._pending) == 1


def test_a_rule_cannot_take_anothers_name():
    with pytest.raises(ValueError, match="a rule called 'Muon' exists"):

        class MuonRule(Rule):
            pass

    p = weight(SQUARE)
    before = p.detach().clone()
    run(METHODS["muon"]([p]), [p], [gradients(SQUARE, 1)])
    assert not torch.equal(p, before)
