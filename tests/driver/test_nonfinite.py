"""Bad gradients of matrices and of AdamW parameters, under every mode and for every class."""

import copy
import warnings

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat, pair_gradients
from helpers.problems import gradients, run, same, tensors, weight
from torch import nn

from stiefel.optimizers import GaLore, Muon
from stiefel.optimizers._driver import adamw, finite

NAN, INF = float("nan"), float("inf")
KINDS = {
    "embedding": "embed.weight",
    "head": "head.weight",
    "norm": "norm.weight",
    "bias": "norm.bias",
    "bias of a matrix": "hidden.bias",
    "matrix": "hidden.weight",
}
FLAGS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}

every_method = pytest.mark.parametrize("method", METHODS)
every_pair = pytest.mark.parametrize("pairs", PAIRS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_flag = pytest.mark.parametrize("flags", FLAGS)
every_wait = pytest.mark.parametrize("wait", [True, False], ids=["read", "late"])
pytestmark = pytest.mark.filterwarnings("ignore:non-finite gradient")


class Net(nn.Module):
    """A language model in small: embedding, head, norm, biases, and two matrices of equal shape."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embed, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 12, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))


def give(model, step, bad=None, value=NAN, missing=None):
    """Gradients of a step; one entry of parameter ``bad`` is bad, ``missing`` has none."""
    for i, (name, p) in enumerate(model.named_parameters()):
        p.grad = gradients((*p.shape, 1), 1, 100 * step + i)[0].reshape(p.shape).to(p.dtype)
        if name == bad:
            p.grad.view(-1)[-1] = value
        if name == missing:
            p.grad = None


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state_of(optimizer, model):
    """State by name, without parameters that have none or have taken no step."""
    flat = {
        name: {k: copy.deepcopy(v) for k, v in optimizer.state.get(p, {}).items()}
        for name, p in model.named_parameters()
    }
    return {name: entry for name, entry in flat.items() if entry.get("step")}


def trained(make, steps, bad=(), value=NAN, missing=(), wait=None, **options):
    """(weights after each step, state after each step, optimizer)."""
    model = Net()
    optimizer = make(model, **options)
    optimizer._wait = wait
    seen = []
    for step in range(steps):
        give(model, step, dict(bad).get(step), value, dict(missing).get(step))
        optimizer.step()
        optimizer.skipped  # noqa: B018 - waits for late flags, so that the clocks are right
        seen.append((weights(model), state_of(optimizer, model)))
    return seen, optimizer


@pytest.mark.covering
@every_method
@every_kind
@pytest.mark.parametrize("at", [0, 2])
def test_a_bad_gradient_leaves_weight_state_and_clock_alone_and_nothing_else(method, kind, at):
    name, value = KINDS[kind], (NAN, INF, -INF)[(list(KINDS).index(kind) + at) % 3]
    seen, optimizer = trained(METHODS[method], 4, [(at, name)], value)
    twin, _ = trained(METHODS[method], 4, missing=[(at, name)])
    assert same(seen, twin) and optimizer.skipped == {name: 1}


@pytest.mark.covering
@every_method
@every_kind
def test_flags_that_arrive_late_do_the_same(method, kind):
    name = KINDS[kind]
    late, optimizer = trained(METHODS[method], 4, [(2, name)], wait=False)
    read, _ = trained(METHODS[method], 4, [(2, name)], wait=True)
    assert optimizer.skipped == {name: 1}
    assert same(late[2][0][name], late[1][0][name]) and same(late[2][1][name], late[1][1][name])
    for (a, state), (b, states) in zip(late, read, strict=True):
        for p in a:
            torch.testing.assert_close(a[p], b[p], rtol=0, atol=1e-5)
            clocks = [k for k in state[p] if k.startswith("step")]
            assert clocks and all(state[p][k] == states[p][k] for k in clocks)


@every_flag
@every_kind
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
@pytest.mark.parametrize("chunk", [2**22, 24, 5])
def test_late_flags_of_adamw_parameters_give_equal_bits(flags, kind, lr, chunk, monkeypatch):
    monkeypatch.setattr(adamw, "MAX_COPIED_NUMEL", chunk)
    monkeypatch.setattr(adamw, "MAX_JOINED_NUMEL", 16)
    if isinstance(lr, torch.Tensor) and flags == "foreach":
        pytest.skip("torch refuses a tensor there")

    def make(model, **options):
        group = {"params": list(model.named_parameters()), "rule": "adamw"}
        return Muon([group], lr=lr, weight_decay=0.1, **FLAGS[flags], **options)

    name = KINDS[kind]
    late, optimizer = trained(make, 4, [(0, name), (2, name)], wait=False)
    twin, _ = trained(make, 4, [(0, name), (2, name)], wait=True)
    assert optimizer.skipped == {name: 2}
    assert same([w for w, _ in late], [w for w, _ in twin]) and same(late[1:], twin[1:])


@pytest.mark.parametrize("method", ["galore-reference", "muon"])
@every_flag
def test_late_flags_under_the_order_of_a_published_package(method, flags):
    options = {"weight_decay": 0.1, **FLAGS[flags]}
    late, optimizer = trained(METHODS[method], 5, [(2, "norm.bias")], wait=False, **options)
    read, _ = trained(METHODS[method], 5, [(2, "norm.bias")], wait=True, **options)
    for (a, _), (b, _) in zip(late, read, strict=True):
        for name in ("norm.bias", "norm.weight", "embed.weight", "head.weight", "hidden.bias"):
            assert torch.equal(a[name], b[name])
    assert optimizer.skipped == {"norm.bias": 1}


@pytest.mark.covering
@every_method
@every_kind
@every_wait
def test_skip_step_moves_nothing_and_counts_the_bad_one(method, kind, wait):
    name = KINDS[kind]
    options = {"nonfinite": "skip_step", "wait": wait}
    seen, optimizer = trained(METHODS[method], 3, [(0, name), (2, name)], **options)
    assert seen[0][1] == {} and same(seen[0][0], weights(Net()))
    assert same(seen[2], seen[1]) and optimizer.skipped == {name: 2}
    model = Net()
    twin = METHODS[method](model)
    give(model, 1)
    twin.step()
    assert same(seen[1][0], weights(model)) or not wait
    assert same(seen[1][1], state_of(twin, model)) or not wait


def test_one_group_with_skip_step_stops_the_step_of_all_groups():
    p, q, v = weight((6, 4)), weight((6, 4), 1), weight((5,), 2)
    groups = [{"params": [p, v]}, {"params": [q], "nonfinite": "skip_step"}]
    for bad, stops in ((p, False), (v, False), (q, True)):
        optimizer = Muon(copy.copy(groups), lr=0.1)
        before = [x.detach().clone() for x in (p, q, v)]
        for x in (p, q, v):
            x.grad = torch.ones_like(x)
        bad.grad[0] = NAN
        optimizer.step()
        still = [torch.equal(x, y) for x, y in zip((p, q, v), before, strict=True)]
        assert still == [stops or x is bad for x in (p, q, v)]
        assert sum(optimizer.skipped.values()) == 1


@pytest.mark.covering
@every_method
@every_kind
@every_wait
def test_raise_names_every_bad_parameter_and_changes_nothing(method, kind, wait):
    model, name = Net(), KINDS[kind]
    optimizer = METHODS[method](model, nonfinite="raise")
    optimizer._wait = wait
    for step in range(2):
        give(model, step)
        before, state = weights(model), state_of(optimizer, model)
        p = dict(model.named_parameters())[name]
        p.grad.view(-1)[0] = INF
        with pytest.raises(RuntimeError, match=f"non-finite gradient of parameter .*'{name}'"):
            optimizer.step()
        assert same(before, weights(model)) and same(state, state_of(optimizer, model))
        assert optimizer.skipped == {}
        p.grad.view(-1)[0] = 1.0
        optimizer.step()
        assert not same(before, weights(model))


def test_raise_names_all_of_several():
    model = Net()
    optimizer = Muon(model, nonfinite="raise")
    give(model, 0, "norm.bias")
    model.hidden.weight.grad[:] = INF
    with pytest.raises(RuntimeError, match=r"parameter .*, .*; nonfinite='skip'") as caught:
        optimizer.step()
    assert "'norm.bias'" in str(caught.value) and "'hidden.weight'" in str(caught.value)


@every_flag
def test_ignore_is_torch_for_adamw_parameters(flags):
    ours, theirs = Net(), Net()
    group = {"params": list(ours.parameters()), "rule": "adamw"}
    options = {"lr": 0.1, "weight_decay": 0.1, **FLAGS[flags]}
    optimizer = Muon([group], nonfinite="ignore", **options)
    twin = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), **options)
    for step in range(3):
        for model in (ours, theirs):
            give(model, step, "norm.weight" if step == 1 else None)
        optimizer.step()
        twin.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
    assert optimizer.skipped == {} and ours.norm.weight.isnan().any()


@pytest.mark.covering
@every_method
@every_wait
def test_ignore_looks_at_no_gradient_and_other_modes_agree_where_all_are_finite(
    method, wait, monkeypatch
):
    asked, _ = trained(METHODS[method], 4, wait=wait)
    raised, _ = trained(METHODS[method], 4, wait=True, nonfinite="raise")
    ignored, optimizer = trained(METHODS[method], 4, wait=wait, nonfinite="ignore")
    assert same(raised, ignored) and optimizer.skipped == {}
    if wait:
        assert same(asked, ignored)

    def refused(*_):
        raise AssertionError("a gradient was looked at")

    for name in ("_total", "largest", "_stack_and_flag", "_flags_of"):
        monkeypatch.setattr(finite, name, refused)
    trained(METHODS[method], 2, wait=wait, nonfinite="ignore")


@pytest.mark.covering
@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@every_wait
def test_a_finite_gradient_whose_sum_overflows_is_not_bad(method, dtype, wait):
    model = Net().to(dtype)
    optimizer = METHODS[method](model)
    optimizer._wait = wait
    huge = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4, torch.float64: 1e308}
    for p in model.parameters():
        p.grad = torch.full_like(p, huge[dtype])
    optimizer.step()
    assert optimizer.skipped == {}
    assert all(entry["step"] == 1 for entry in state_of(optimizer, model).values())


@every_wait
@pytest.mark.parametrize("flags", ["default", "foreach"])
def test_complex_empty_and_strided_gradients(wait, flags):
    params = [
        nn.Parameter(torch.randn(3, 4, dtype=torch.complex64)),
        nn.Parameter(torch.randn(5, dtype=torch.complex128)),
        nn.Parameter(torch.randn(0, 4)),
        nn.Parameter(torch.randn(4, 6)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(200, 300)),
    ]
    twins = copy.deepcopy(params)
    options = {"lr": 0.1, "weight_decay": 0.1, **FLAGS[flags]}
    optimizer = Muon([{"params": params, "rule": "adamw"}], **options)
    optimizer._wait = wait
    twin = torch.optim.AdamW(twins, betas=(0.9, 0.95), **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            q.grad = torch.randn_like(p)
            if p.dim() == 2:
                q.grad = torch.randn_like(p.mT.contiguous()).mT
            p.grad = q.grad.clone()
            if i == 0:
                p.grad, q.grad = q.grad.conj(), q.grad.conj().resolve_conj()
            if i == 1 and step == 0:
                p.grad[:] = complex(1e308, 1e308)
                q.grad = p.grad.clone()
            if i == step - 1 and p.numel():
                bad = torch.tensor(complex(1, INF) if p.is_complex() else NAN, dtype=p.dtype)
                p.grad = torch.where(torch.ones_like(p, dtype=torch.bool), bad, p.grad)
                q.grad = None
        optimizer.step()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
    assert optimizer.skipped == {0: 1, 1: 1}


@every_method
def test_a_norm_clip_that_makes_all_gradients_nan_skips_all(method):
    model = Net()
    optimizer = METHODS[method](model)
    give(model, 0)
    optimizer.step()
    before, state = weights(model), state_of(optimizer, model)
    give(model, 1, "norm.weight")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(p.grad.isnan().any() for p in model.parameters())
    with pytest.warns(UserWarning, match=r"non-finite gradient .* and \d more") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert same(before, weights(model)) and same(state, state_of(optimizer, model))
    assert optimizer.skipped == dict.fromkeys(before, 1)


@pytest.mark.filterwarnings("error")
@every_wait
@pytest.mark.parametrize("mode", ["skip", "skip_step"])
def test_the_first_skip_warns_once_at_the_users_line(wait, mode):
    model = Net()
    optimizer = Muon(model, nonfinite=mode)
    optimizer._wait = wait
    give(model, 0, "head.weight")
    with pytest.warns(UserWarning, match=r"non-finite gradient of parameter 'head\.weight'") as got:
        optimizer.step()
        assert optimizer.skipped == {"head.weight": 1}
    assert len(got) == 1 and got[0].filename == __file__
    give(model, 1, "norm.bias")
    optimizer.step()
    assert optimizer.skipped == {"head.weight": 1, "norm.bias": 1}


def test_copies_for_late_flags_are_bounded(monkeypatch):
    monkeypatch.setattr(adamw, "MAX_COPIED_NUMEL", 20)
    params = [torch.zeros(shape) for shape in [(6,), (3, 3), (4, 4), (5,), (7, 8), (9,), (9,)]]
    entries = [{"step": torch.tensor(1.0), "exp_avg": p, "exp_avg_sq": p} for p in params]
    flags = [torch.tensor(True) for _ in params]
    chunks = list(adamw._chunks(params, params, entries, flags))
    sizes = [sum(piece[0].numel() for piece in chunk) for chunk in chunks]
    assert max(sizes) <= 20 and sum(sizes) == sum(p.numel() for p in params)


def test_without_names_positions_are_counted():
    p, v, w = weight((6, 4)), weight((5,), 1), weight((5,), 2)
    optimizer = Muon([{"params": [p, v]}, {"params": [w]}], lr=0.1)
    for x in (p, v, w):
        x.grad = torch.full_like(x, INF)
    v.grad = torch.ones(5)
    with pytest.warns(UserWarning, match="non-finite gradient of parameter 0, 2;"):
        optimizer.step()
    optimizer.step()
    assert optimizer.skipped == {0: 2, 2: 2} and copy.deepcopy(optimizer).skipped == {}


@every_pair
@every_wait
@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)])
def test_a_pair_counts_for_those_whose_gradient_is_bad(pairs, wait, bad):
    factor_pairs = [factors(10, 7, 3), factors(10, 7, 3, seed=1)]
    params, v = flat(factor_pairs), weight((4,), 9)
    optimizer = PAIRS[pairs](factor_pairs)
    optimizer.add_param_group({"params": [v], "rule": "adamw"})
    optimizer._wait = wait
    grads = [
        *pair_gradients(10, 7, 3, 4),
        *pair_gradients(10, 7, 3, 4, seed=1),
        [torch.ones(4)] * 4,
    ]
    run(optimizer, [*params, v], [G[:2] for G in grads])
    before, state = [p.detach().clone() for p in params], tensors(optimizer)
    third = [G[2].clone() for G in grads]
    for i in bad:
        third[i][0, 0] = NAN
    run(optimizer, [*params, v], [[G] for G in third])
    assert optimizer.skipped == dict.fromkeys(bad, 1)
    now = tensors(optimizer)
    assert same(before[:2], [p.detach() for p in params[:2]])
    assert all(same(now[key], x) for key, x in state.items() if key[0] < 2)
    assert all(now[i, "step"] == 3 for i in (2, 4))
    third = [G[2].clone() for G in grads]
    third[4][1] = NAN
    kept = v.detach().clone()
    run(optimizer, [*params, v], [[G] for G in third])
    assert optimizer.skipped == {**dict.fromkeys(bad, 1), 4: 1} and torch.equal(kept, v)


@every_pair
def test_a_pair_under_the_other_modes(pairs):
    for mode in ("raise", "skip_step", "ignore"):
        factor_pairs = [factors(10, 7, 3), factors(10, 7, 3, seed=1)]
        params = flat(factor_pairs)
        optimizer = PAIRS[pairs](factor_pairs, nonfinite=mode)
        grads = [*pair_gradients(10, 7, 3, 2), *pair_gradients(10, 7, 3, 2, seed=1)]
        run(optimizer, params, [G[:1] for G in grads])
        if mode == "ignore":
            continue
        before, state = [p.detach().clone() for p in params], tensors(optimizer)
        params[3].grad[0, 0] = NAN
        if mode == "raise":
            with pytest.raises(RuntimeError, match="non-finite gradient of parameter 3"):
                optimizer.step()
        else:
            optimizer.step()
        assert same(before, [p.detach() for p in params]) and same(state, tensors(optimizer))
        assert optimizer.skipped == ({} if mode == "raise" else {3: 1})


@every_method
def test_a_grad_scaler_that_finds_an_overflow_leaves_everything_alone(method):
    model = Net()
    optimizer = METHODS[method](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        before, state = weights(model), state_of(optimizer, model)
        x = model.embed(torch.tensor([1, 2, 3]))
        y = model.head(model.out(model.hidden(model.norm(x))))
        optimizer.zero_grad()
        scaler.scale((y * (INF if step == 1 else 1.0)).square().mean()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaler.step(optimizer)
        scaler.update()
        same_now = same(before, weights(model)) and same(state, state_of(optimizer, model))
        assert same_now == (step == 1)
    assert optimizer.skipped == {}


@every_wait
def test_many_small_gradients_are_summed_at_once(wait, monkeypatch):
    params = [weight((5 + i % 3,), i) for i in range(200)] + [weight((4, 3), 1000)]
    optimizer = Muon([{"params": [p], "rule": "adamw"} for p in params], lr=0.1)
    optimizer._wait = wait
    calls = []
    for name in ("_total", "_flags_of"):
        original = getattr(finite, name)
        monkeypatch.setattr(
            finite, name, lambda *args, f=original, name=name: (calls.append(name), f(*args))[1]
        )
    run(optimizer, params, [[torch.ones_like(p)] * 2 for p in params])
    assert calls == ["_total"] * 4 if wait else ["_flags_of"] * 2


def test_a_large_gradient_that_a_view_cuts_is_read_once(monkeypatch):
    p = weight((240, 90))
    for wait, name in ((True, "_total"), (False, "largest")):
        optimizer = Muon([p], view="rows:80,80,80")
        optimizer._wait = wait
        calls, original = [], getattr(finite, name)
        monkeypatch.setattr(
            finite, name, lambda G, f=original, seen=calls: (seen.append(1), f(G))[1]
        )
        p.grad = torch.full_like(p, INF)
        optimizer.step()
        assert optimizer.skipped == {0: 1} and len(calls) == 1


# AdamW: factors, ratios, checks -------------------------------------------------------------------


@every_flag
@pytest.mark.parametrize("absolute", [None, 0.3])
@every_wait
def test_decays_multiply_the_groups_decay(flags, absolute, wait):
    factors_ = [1.0, 0.0, 0.5, 0.0]
    ours, theirs = ([weight((5, 3), i) for i in range(4)] for _ in range(2))
    options = {"lr": 0.1, **FLAGS[flags]}
    decay = 0.2 if absolute is None else absolute
    group = {"params": ours, "rule": "adamw"}
    optimizer = Muon([group], weight_decay=0.2, adamw_weight_decay=absolute, **options)
    optimizer.param_groups[0]["decays"] = factors_
    optimizer._wait = wait
    twin = torch.optim.AdamW(
        [
            {"params": [q], "weight_decay": decay * factor}
            for q, factor in zip(theirs, factors_, strict=True)
        ],
        betas=(0.9, 0.95),
        **options,
    )
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = gradients((5, 3), 1, 10 * step + i)[0]
        if step == 1:
            ours[2].grad = torch.full((5, 3), NAN)
            theirs[2].grad = None
        optimizer.step()
        twin.step()
        assert same([p.detach() for p in ours], [q.detach() for q in theirs])


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_the_ratio_multiplies_the_groups_rate(lr):
    group = {"lr": lr}
    assert adamw.lr_of(group) is lr and adamw.lr_of({**group, "adamw_lr_ratio": None}) is lr
    made = adamw.lr_of({**group, "adamw_lr_ratio": 0.5})
    assert type(made) is type(lr) and float(made) == pytest.approx(0.05)


def test_weights_converted_in_mid_run_are_refused_before_anything_moves():
    for mode in ("skip", "ignore"):
        model = Net()
        optimizer = Muon(model, nonfinite=mode, write="nearest")
        give(model, 0)
        optimizer.step()
        model.bfloat16()
        give(model, 1)
        before, state = weights(model), state_of(optimizer, model)
        text = r"parameter .\w+\.\w+. changed its shape, dtype or device"
        with pytest.raises(RuntimeError, match=text):
            optimizer.step()
        assert same(before, weights(model)) and same(state, state_of(optimizer, model))


def test_weights_converted_in_mid_run_go_on_where_their_moments_stay_float32():
    model = Net()
    optimizer = Muon(model)
    give(model, 0)
    optimizer.step()
    model.bfloat16()
    give(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    assert all(
        optimizer.state[p]["exp_avg"].dtype == torch.float32
        for p in model.parameters()
        if "exp_avg" in optimizer.state[p]
    )


def test_a_refused_first_step_leaves_no_state_behind():
    p, v = weight((6, 4)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = Muon([p, v], lr=0.1, fused=True)
    p.grad, v.grad = torch.ones(6, 4), torch.ones_like(v)
    with pytest.raises(RuntimeError, match="fused"):
        optimizer.step()
    assert not optimizer.state and torch.equal(p, weight((6, 4)))
    for bad in ("skip_step", "raise"):
        params = [weight((6, 4), i) for i in range(3)] + [weight((3,), 3)]
        optimizer = Muon(params, lr=0.1, nonfinite=bad)
        for q in params:
            q.grad = torch.ones_like(q)
        params[3].grad[0] = INF
        if bad == "raise":
            with pytest.raises(RuntimeError):
                optimizer.step()
        else:
            optimizer.step()
        assert not optimizer.state
        params[3].grad[0] = 1.0
        optimizer.step()
        assert len(optimizer.state) == 4


def test_a_refused_step_gives_state_of_windows_back():
    make = METHODS["galore"]
    params, twins = ([weight((8, 6), i) for i in range(3)] for _ in range(2))
    grads = [gradients((8, 6), 5, i) for i in range(3)]
    optimizer, twin = make(params, nonfinite="raise"), make(twins)
    for step in range(5):
        if step in (0, 2):
            for p in params:
                p.grad = torch.full_like(p, NAN)
            with pytest.raises(RuntimeError):
                optimizer.step()
        run(optimizer, params, [[G[step]] for G in grads])
        run(twin, twins, [[G[step]] for G in grads])
    assert same([p.detach() for p in params], [q.detach() for q in twins])
    assert same(tensors(optimizer), tensors(twin))


@every_wait
def test_state_that_other_code_replaces_is_found_again(wait):
    params, twins = ([weight((5,), i) for i in range(3)] for _ in range(2))
    optimizer, twin = Muon(params, lr=0.1), Muon(twins, lr=0.1)
    optimizer._wait = wait
    for step in range(4):
        for p, q in zip(params, twins, strict=True):
            p.grad = q.grad = gradients((5, 1), 1, step)[0].reshape(5)
        optimizer.step()
        twin.step()
        if step == 1:
            optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[1]])
    assert same([p.detach() for p in params], [q.detach() for q in twins])
    assert same(tensors(optimizer), tensors(twin))


@every_wait
def test_late_flags_survive_state_that_is_cleared(wait):
    model = Net()
    optimizer = Muon(model)
    optimizer._wait = wait
    give(model, 0, "norm.weight")
    optimizer.step()
    optimizer.state.clear()
    assert optimizer.skipped == {"norm.weight": 1}


def test_galore_keeps_its_order_with_decays():
    v, w = weight((5,), 0), weight((5,), 1)
    optimizer = GaLore([{"params": [v, w], "rule": "adamw"}], lr=0.1, weight_decay=0.5,
                       compat="reference")  # fmt: skip
    optimizer.param_groups[0]["decays"] = [0.0, 1.0]
    alone = GaLore([{"params": [twin := weight((5,), 0)], "rule": "adamw"}], lr=0.1,
                   compat="reference")  # fmt: skip
    for step in range(3):
        for p in (v, w, twin):
            p.grad = gradients((5, 1), 1, step)[0].reshape(5)
        optimizer.step()
        alone.step()
    assert torch.equal(v, twin)


@every_wait
def test_shards_agree_about_a_bad_entry(wait):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = [
            nn.Parameter(distribute_tensor(weight((4, 4), i).detach(), mesh, [Shard(0)]))
            for i in range(2)
        ]
        optimizer = Muon([{"params": params, "rule": "adamw"}], lr=0.1)
        optimizer._wait = wait
        before = params[0].full_tensor().clone()
        for p in params:
            p.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        params[0].grad.to_local()[1, 1] = NAN
        optimizer.step()
        assert optimizer.skipped == {0: 1} and torch.equal(before, params[0].full_tensor())
        assert not torch.equal(params[1].full_tensor(), weight((4, 4), 1))
    finally:
        dist.destroy_process_group()
