"""Write modes of AdamW parameters: what torch computes on float32 values, rounded once."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers.problems import gradients, run, same, tensors, weight
from torch import nn

from stiefel.kernels import Rounding, parameter_keys, rounding_keys
from stiefel.optimizers import GaLore, Muon, memory_report
from stiefel.optimizers._driver import adamw, adamw_write
from stiefel.optimizers._driver.units import hash63

NAN = float("nan")
ULP = 2.0**-7
"""Distance of bfloat16's grid points from 1 to 2."""
SHAPES = [(512,), (7,), (33, 65), (), (5, 3, 4, 6), (96, 40), (1, 9)]
MODES = ["stochastic", "kahan", "eco"]
FORMS = {
    "default": {},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}
every_mode = pytest.mark.parametrize("mode", MODES)
every_form = pytest.mark.parametrize("form", FORMS)
low_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def build(params, mode="auto", *, group=None, **options):
    """AdamW on all of these parameters."""
    options = {"lr": 1e-3, "adamw_betas": (0.9, 0.99), "weight_decay": 0.1, **options}
    return Muon([{"params": params, "rule": "adamw", **(group or {})}], write=mode, **options)


def by_torch(params, **options):
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, **options}
    return torch.optim.AdamW(params, **options)


def problem(shapes=SHAPES, dtype=torch.bfloat16, steps=5):
    params = [weight(shape, i, dtype) for i, shape in enumerate(shapes)]
    draw = torch.Generator().manual_seed(3)
    series = [
        [(0.1 * torch.randn(shape, generator=draw)).to(dtype) for _ in range(steps)]
        for shape in shapes
    ]
    return params, series


def values(params):
    return [p.detach().clone() for p in params]


def neighbours(X, dtype):
    """The grid points below and above float64 values."""
    near = X.to(dtype)
    up = torch.nextafter(near, torch.full_like(near, math.inf))
    down = torch.nextafter(near, torch.full_like(near, -math.inf))
    return torch.where(near.double() > X, down, near), torch.where(near.double() < X, up, near)


class Oracle:
    """AdamW in float64 on one parameter."""

    def __init__(self, shape, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, decay=0.1):
        self.M = self.V = torch.zeros(shape, dtype=torch.float64)
        self.t, self.settings = 0, (lr, betas, eps, decay)

    def step(self, W, G):
        lr, (b1, b2), eps, decay = self.settings
        self.t += 1
        self.M, self.V = b1 * self.M + (1 - b1) * G, b2 * self.V + (1 - b2) * G * G
        M, V = self.M / (1 - b1**self.t), self.V / (1 - b2**self.t)
        return (1 - lr * decay) * W - lr * M / (V.sqrt() + eps)


# what is computed -----------------------------------------------------------------------------


@every_form
@low_dtypes
@pytest.mark.parametrize("options", [{"write": "nearest"}, {"compat": "torch"}])
def test_nearest_is_torch_bit_for_bit(form, dtype, options):
    params, series = problem(dtype=dtype)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    mode = options.get("write", "auto")
    rest = {k: v for k, v in options.items() if k != "write"}
    optimizer = build(params, mode, **FORMS[form], **rest)
    other = by_torch(others, **FORMS[form])
    assert same(run(optimizer, params, series), run(other, others, series))
    assert same(tensors(optimizer), tensors(other))


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_full_precision_is_torch_under_every_mode(form, dtype, mode):
    if form == "fused" and dtype.is_complex:
        pytest.skip("torch's fused kernel takes no complex weights")
    params, series = problem(dtype=torch.float64)
    params = [nn.Parameter(p.detach().to(dtype)) for p in params]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    mine, theirs = build(params, mode, **FORMS[form]), by_torch(others, **FORMS[form])
    assert same(run(mine, params, series), run(theirs, others, series))
    assert same(tensors(mine), tensors(theirs))


@low_dtypes
@every_form
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_every_step_is_that_of_float64_rounded_once(mode, form, dtype):
    params, series = problem(dtype=dtype, steps=6)
    oracles = [Oracle(p.shape) for p in params]
    optimizer = build(params, mode, **FORMS[form])
    for t in range(6):
        exact = []
        for p, oracle, grads in zip(params, oracles, series, strict=True):
            residual = optimizer.state.get(p, {}).get("residual", torch.zeros(()))
            exact.append(oracle.step(p.detach().double() + residual.double(), grads[t].double()))
        run(optimizer, params, [grads[t : t + 1] for grads in series])
        for p, X, oracle in zip(params, exact, oracles, strict=True):
            low, high = (edge.double() for edge in neighbours(X, dtype))
            W, slack = p.detach().double(), 4e-7 * X.abs() + 1e-9
            assert bool(((W >= low - slack) & (W <= high + slack)).all())
            if mode == "kahan":
                assert bool(((W - X).abs() <= (high - low) / 2 + slack).all())
            assert optimizer.state[p]["exp_avg"].dtype == torch.float32
            torch.testing.assert_close(
                optimizer.state[p]["exp_avg_sq"].double(), oracle.V, rtol=1e-5, atol=1e-12
            )


@low_dtypes
@pytest.mark.parametrize("is_named", [False, True])
def test_bits_are_those_of_seed_name_place_and_update(dtype, is_named):
    params, series = problem(dtype=dtype)
    names = [f"layer.{i}" for i in range(len(params))]
    group = {"seed": 11}
    optimizer = build(list(zip(names, params, strict=True)) if is_named else params, group=group)
    values_32 = [nn.Parameter(p.detach().float()) for p in params]
    other = by_torch(values_32)
    for t in range(1, 6):
        for x, p in zip(values_32, params, strict=True):
            x.data.copy_(p.detach().float())
        run(other, values_32, [[grads[t - 1].float()] for grads in series])
        run(optimizer, params, [grads[t - 1 : t] for grads in series])
        for i, (x, p) in enumerate(zip(values_32, params, strict=True)):
            index = hash63(names[i]) if is_named else i
            key = rounding_keys(parameter_keys(11, [index], p.device), t)
            expected = torch.empty_like(p)
            Rounding(key).round_into_(expected, x.detach().clone())
            assert torch.equal(expected, p.detach()), (t, i)


@low_dtypes
def test_stochastic_is_right_on_average_over_seeds(dtype):
    p, G = weight((400,), 0, dtype), gradients((20, 20), 1)[0].reshape(400)
    exact = Oracle((400,)).step(p.detach().double(), G.to(dtype).double())
    runs = []
    for seed in range(64):
        twin = nn.Parameter(p.detach().clone())
        optimizer = build([twin], "stochastic", group={"seed": seed})
        run(optimizer, [twin], [[G]])
        runs.append(twin.detach().double())
    low, high = (edge.double() for edge in neighbours(exact, dtype))
    share = (exact - low) / (high - low).clamp(min=1e-30)
    sigma = (high - low) * (share * (1 - share) / 64).sqrt()
    difference = torch.stack(runs).mean(0) - exact
    assert float(difference.sum().abs()) < 4 * float(sigma.square().sum().sqrt())
    # of 400 means some lie beyond 3 sigma, none beyond 5, where there is a chance to speak of
    often = (share > 0.02) & (share < 0.98)
    assert float((difference / sigma)[often].abs().max()) < 5


# lists, chunks, memory formats ----------------------------------------------------------------


def small_chunks(monkeypatch, count):
    monkeypatch.setattr(adamw_write, "MAX_CHUNK_NUMEL", count)


@every_mode
@every_form
def test_many_are_one_by_one(mode, form):
    shapes = SHAPES + [(k,) for k in (1, 2, 3, 5, 64, 65)]
    params, series = problem(shapes)
    optimizer = build(params, mode, **FORMS[form])
    run(optimizer, params, series)
    for i, shape in enumerate(shapes):
        p = problem(shapes)[0][i]
        alone = build(
            [("x", p)], mode, group={"positions": [i], "draws": "position"}, **FORMS[form]
        )
        run(alone, [p], [series[i]])
        assert torch.equal(p, params[i]), shape
        assert all(
            torch.equal(x, optimizer.state[params[i]][key]) for key, x in alone.state[p].items()
        )


@every_mode
@every_form
@pytest.mark.parametrize("count", [64, 100, 1000])
def test_chunks_and_panels_keep_the_bits(mode, form, count, monkeypatch):
    shapes = [*SHAPES, (70, 64), (3, 1000), (1, 1, 400), (1000,)]
    params, series = problem(shapes)
    whole = run(build(params, mode, **FORMS[form]), params, series)
    params, series = problem(shapes)
    small_chunks(monkeypatch, count)
    # torch's fused kernel rounds what fills no vector otherwise: panels end at multiples of 64
    if form != "fused" or count != 100:
        assert same(run(build(params, mode, **FORMS[form]), params, series), whole)


@every_mode
@pytest.mark.parametrize("form", ["loop", "fused"])
@pytest.mark.parametrize("count", [None, 256])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "spread", "narrow"])
def test_memory_formats_keep_the_bits(mode, form, count, layout, monkeypatch):
    shape = (16, 8, 4, 4) if layout == "channels_last" else (64, 24)
    params, series = problem([shape, (64, 24)], steps=4)
    whole = run(build(params, mode, **FORMS[form]), params, series)
    W = problem([shape])[0][0].detach()
    W = (
        {
            "channels_last": lambda: W.to(memory_format=torch.channels_last),
            "transposed": lambda: W.T.contiguous().T,
            "spread": lambda: torch.zeros(64, 48, dtype=W.dtype)[:, ::2].copy_(W),
            "narrow": lambda: torch.zeros(80, 40, dtype=W.dtype)[5:69, 3:27].copy_(W),
        }[layout]()
        if layout != "channels_last" or len(shape) == 4
        else W
    )
    others = [nn.Parameter(W), problem([shape, (64, 24)])[0][1]]
    if count:
        small_chunks(monkeypatch, count)
    optimizer = build(others, mode, **FORMS[form])
    optimizer.init_state()
    assert not others[0].is_contiguous()
    grads = [
        [g.to(memory_format=torch.channels_last) if g.dim() == 4 else g for g in gs]
        for gs in series
    ]
    assert same(run(optimizer, others, grads), whole)
    assert optimizer.state[others[0]]["exp_avg"].stride() == torch.zeros_like(W).stride()


@every_mode
def test_dtypes_mix_in_one_group(mode):
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float64]
    params = [weight((40,), i, dtype) for i, dtype in enumerate(kinds)]
    series = [gradients((8, 5), 4, i) for i in range(5)]
    series = [[g.reshape(40) for g in grads] for grads in series]
    optimizer = build(params, mode)
    run(optimizer, params, series)
    for i, dtype in enumerate(kinds):
        p = weight((40,), i, dtype)
        alone = build([p], mode, group={"positions": [i]})
        run(alone, [p], [series[i]])
        assert torch.equal(p, params[i])
        assert ("residual" in optimizer.state[params[i]]) is (
            mode == "kahan" and dtype.itemsize == 2
        )


@every_mode
def test_decays_maximize_and_an_empty_weight(mode):
    params, series = problem([(64,), (64,), (0,)])
    optimizer = build(params, mode, group={"decays": [1.0, 0.0, 1.0]}, maximize=True)
    run(optimizer, params, series)
    for i, decay in enumerate((0.1, 0.0)):
        p = problem([(64,), (64,)])[0][i]
        negative = [-g for g in series[i]]
        alone = build([p], mode, group={"positions": [i]}, weight_decay=decay)
        run(alone, [p], [negative])
        assert torch.equal(p, params[i])


@every_mode
@pytest.mark.parametrize("correct_bias", [True, False])
def test_the_published_order_of_galore_is_followed(mode, correct_bias):
    params, series = problem([(64,), (31,)], steps=1)
    options = {"lr": 1e-2, "weight_decay": 0.1, "compat": "reference"}

    def train(ps, write):
        optimizer = GaLore([{"params": ps, "rule": "adamw", "write": write}], rank=2, **options)
        if not correct_bias:
            optimizer._adamw_order = lambda group: (False, 1e-6)
        run(optimizer, ps, series)
        return optimizer

    values_32 = [nn.Parameter(p.detach().float()) for p in params]
    train(values_32, "nearest")
    train(params, mode)
    for p, x in zip(params, values_32, strict=True):
        low, high = (edge.float() for edge in neighbours(x.detach().double(), p.dtype))
        assert bool(((p >= low) & (p <= high)).all())


def compare_shards(rank, store, form):
    """In one of two processes: shards move as the whole weights do, bit for bit."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    adamw_write.MAX_CHUNK_NUMEL = 256
    shapes = [(6, 10), (7, 9), (3, 70, 8), (5,), (64, 64), (4, 2)]
    for mode in MODES:
        for placement in (Shard(0), Shard(1), Replicate()):
            chosen = [shape for shape in shapes if len(shape) > 1 or placement != Shard(1)]
            params, series = problem(chosen, steps=3)
            shards = [
                nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placement]))
                for p in params
            ]
            whole, split = build(params, mode, **FORMS[form]), build(shards, mode, **FORMS[form])
            for t in range(3):
                for p, shard, grads in zip(params, shards, series, strict=True):
                    p.grad = grads[t]
                    shard.grad = distribute_tensor(grads[t], mesh, [placement])
                whole.step()
                split.step()
            for p, shard in zip(params, shards, strict=True):
                assert torch.equal(shard.full_tensor(), p), (mode, placement, p.shape)
    dist.destroy_process_group()


def test_shards_have_the_bits_of_the_whole(tmp_path):
    torch.multiprocessing.start_processes(
        compare_shards, (str(tmp_path / "store"), "loop"), nprocs=2, start_method="fork"
    )


# state, files, settings -----------------------------------------------------------------------


@every_mode
@every_form
@pytest.mark.parametrize("way", ["dict", "file", "copy", "pickle"])
def test_a_run_resumes_in_equal_bits(mode, form, way):
    params, series = problem()
    optimizer = build(params, mode, **FORMS[form])
    whole = run(optimizer, params, series)[-1]
    params, _ = problem()
    first = build(params, mode, **FORMS[form])
    run(first, params, [grads[:2] for grads in series])
    if way == "copy":
        params, second = copy.deepcopy((params, first))
    elif way == "pickle":
        params, second = pickle.loads(pickle.dumps((params, first)))
    else:
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        saved = first.state_dict() if way == "dict" else torch.load(buffer, weights_only=True)
        second = build(params, mode, **FORMS[form])
        second.load_state_dict(copy.deepcopy(saved))
    assert same(run(second, params, [grads[2:] for grads in series])[-1], whole)
    assert same(tensors(second), tensors(optimizer))


@pytest.mark.parametrize("mode", ["auto", *MODES])
@every_form
def test_a_checkpoint_of_torch_loads_into_float32_moments(mode, form):
    params, series = problem()
    other = by_torch(params, **FORMS[form])
    run(other, params, series)
    optimizer = build(params, mode, **FORMS[form])
    saved = copy.deepcopy(other.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["write"] == mode
    for p in params:
        entry = optimizer.state[p]
        assert entry["exp_avg"].dtype == entry["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(entry["exp_avg"], other.state[p]["exp_avg"].float())
        assert float(entry["step"]) == 5
        if mode == "kahan":
            assert entry["residual"].dtype == torch.bfloat16 and not entry["residual"].any()
    run(optimizer, params, series)


def without_write(optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["write"]
    return saved


@pytest.mark.parametrize("before", ["nearest", *MODES])
@pytest.mark.parametrize("after", ["nearest", *MODES])
def test_state_of_any_mode_loads_into_any_other(before, after):
    params, series = problem()
    optimizer = build(params, before)
    run(optimizer, params, series)
    other = build(params, after)
    other.load_state_dict(without_write(optimizer))
    assert other.param_groups[0]["write"] == after
    fresh = build(params, after)
    fresh.init_state()
    for p in params:
        layout = {key: (x.dtype, x.shape) for key, x in fresh.state[p].items()}
        assert {key: (x.dtype, x.shape) for key, x in other.state[p].items()} == layout
        if "nearest" not in (before, after):
            assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
        if before == after == "kahan":
            assert torch.equal(other.state[p]["residual"], optimizer.state[p]["residual"])
    run(other, params, series)


def test_the_mode_of_a_file_comes_with_it():
    params, series = problem()
    optimizer = build(params, "kahan")
    run(optimizer, params, series)
    other = build(params, "nearest")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["write"] == "kahan"
    assert same(tensors(other), tensors(optimizer))
    run(other, params, series)


@pytest.mark.parametrize("key", ["exp_avg", "residual"])
def test_a_file_with_unfit_state_changes_nothing(key):
    params, series = problem([(8,), (9,)])
    optimizer = build(params, "kahan")
    run(optimizer, params, series)
    saved, before = copy.deepcopy(optimizer.state_dict()), tensors(optimizer)
    saved["state"][1][key] = torch.zeros(4)
    with pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(saved)
    assert same(before, tensors(optimizer))


def test_a_pickle_from_before_there_were_modes_goes_on():
    params, series = problem()
    optimizer = build(params, "nearest")
    run(optimizer, params, series)
    for group in (optimizer.defaults, *optimizer.param_groups):
        del group["write"]
    state = optimizer.__getstate__()
    params, state = pickle.loads(pickle.dumps((params, state)))
    other = Muon.__new__(Muon)
    other.__setstate__(state)
    assert other.param_groups[0]["write"] == "nearest"
    run(other, params, series)
    assert all(other.state[p]["exp_avg"].dtype == torch.bfloat16 for p in params)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("nearest", "stochastic", "convert state 'exp_avg'"),
        ("stochastic", "nearest", "convert state 'exp_avg'"),
        ("auto", "kahan", "add state 'residual'"),
        ("kahan", "eco", "drop state 'residual'"),
        ("kahan", "nearest", "state 'exp_avg'"),
    ],
)
def test_a_mode_that_changes_the_state_is_refused(before, after, text, copied):
    params, series = problem()
    free, _ = problem([(4,)])
    optimizer = build(free, before)
    optimizer.add_param_group({"params": params, "rule": "adamw"})
    run(optimizer, params, series)
    if copied:
        params, optimizer = copy.deepcopy((params, optimizer))
    weights, state = values(params), tensors(optimizer)
    optimizer.param_groups[1]["write"] = after
    for act in (optimizer.step, optimizer.step, *([] if copied else [optimizer.state_dict])):
        with pytest.raises(ValueError, match=rf"write='{after}' in parameter group 1.*{text}"):
            act()
    assert same(weights, values(params)) and same(state, tensors(optimizer))
    optimizer.param_groups[1]["write"] = before
    run(optimizer, params, series)


@pytest.mark.parametrize(("before", "after"), [("auto", "eco"), ("eco", "stochastic")])
def test_modes_with_equal_state_may_change_at_any_step(before, after):
    params, series = problem()
    optimizer = build(params, before)
    run(optimizer, params, series)
    optimizer.param_groups[0]["write"] = after
    run(optimizer, params, series)


@pytest.mark.parametrize("mode", ["auto", "nearest", *MODES])
@low_dtypes
def test_the_report_counts_every_byte(mode, dtype):
    params, series = problem(dtype=dtype)
    optimizer = build(params, mode)
    run(optimizer, params, series)
    report = memory_report([{"params": params, "rule": "adamw"}], Muon, write=mode)
    stored = [sum(x.nbytes for x in optimizer.state[p].values()) for p in params]
    assert [row.state for row in report.rows] == stored
    per_entry = {"nearest": 4, "kahan": 10}.get(mode, 8)
    assert stored == [4 + per_entry * p.numel() for p in params]
    assert [row.adamw for row in report.rows] == [4 + 4 * p.numel() for p in params]


@every_mode
def test_state_that_other_code_has_put_in_is_refused(mode):
    params, series = problem([(8,), (9,)])
    optimizer = build(params, mode)
    run(optimizer, params, series)
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(9, dtype=torch.bfloat16)
    weights = values(params)
    with pytest.raises((ValueError, RuntimeError), match="exp_avg"):
        optimizer.step()
    assert same(weights, values(params))
    if mode == "kahan":
        optimizer.state[params[1]]["exp_avg"] = torch.zeros(9)
        del optimizer.state[params[1]]["residual"]
        with pytest.raises(ValueError, match="residual"):
            optimizer.step()
        assert same(weights, values(params))


# bad gradients, probing steps -----------------------------------------------------------------


@every_mode
@every_form
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("count", [None, 64])
def test_a_bad_gradient_leaves_weight_moments_residual_and_clock(
    mode, form, wait, count, monkeypatch
):
    if count:
        small_chunks(monkeypatch, count)
        monkeypatch.setattr(adamw, "MAX_JOINED_NUMEL", 16)
    shapes = [(512,), (7,), (32, 16), ()]
    params, series = problem(shapes)
    optimizer = build(params, mode, **FORMS[form])
    optimizer._wait = wait
    run(optimizer, params, [grads[:3] for grads in series])
    others, twin = copy.deepcopy((params, optimizer))
    before, weights = tensors(optimizer), values(params)
    bad = [grads[3:4] for grads in series]
    for i in (0, 2):
        bad[i] = [bad[i][0].clone()]
        bad[i][0].view(-1)[5] = NAN
    with pytest.warns(UserWarning, match="non-finite"):
        run(optimizer, params, bad)
        assert optimizer.skipped == {0: 1, 2: 1}
    for p, i in ((others[0], 0), (others[2], 2)):
        del p, bad[i][0]
        bad[i] = [None]
    run(twin, others, bad)
    after = tensors(optimizer)
    assert same(values(params), values(others)) and same(after, tensors(twin))
    for i in (0, 2):
        assert torch.equal(params[i], weights[i])
        assert all(torch.equal(x, after[key]) for key, x in before.items() if key[0] == i)
    run(optimizer, params, [grads[4:] for grads in series])
    run(twin, others, [grads[4:] for grads in series])
    assert same(values(params), values(others)) and same(tensors(optimizer), tensors(twin))


@every_mode
def test_a_missing_gradient_changes_no_bits_of_the_others(mode):
    params, series = problem()
    optimizer = build(params, mode)
    series[2] = [None, *series[2][1:]]
    run(optimizer, params, series)
    others, series = problem()
    twin = build(others, mode)
    others[2].requires_grad_(True)
    for t in range(5):
        for i, p in enumerate(others):
            p.grad = None if (i == 2 and t == 0) else series[i][t]
        twin.step()
    assert same(values(params), values(others))
    assert float(optimizer.state[params[2]]["step"]) == 4


@every_mode
def test_a_probing_step_allocates_and_moves_nothing(mode):
    params, _ = problem()
    optimizer = build(params, mode, lr=0.0)
    weights = values(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(weights, values(params))
    fresh = build(params, mode)
    fresh.init_state()
    found, needed = tensors(optimizer), tensors(fresh)
    assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in needed.items()}
    assert not any(x.any() for (_, key), x in found.items() if key != "step")


# what the modes promise -----------------------------------------------------------------------


def test_kahan_follows_float32():
    params, _ = problem([(40, 40), (300,)])
    exact = [nn.Parameter(p.detach().float()) for p in params]
    draw = torch.Generator().manual_seed(0)
    series = [[torch.randn(p.shape, generator=draw).bfloat16() for _ in range(100)] for p in params]
    optimizer = build(params, "kahan", lr=1e-4)
    run(optimizer, params, series)
    run(by_torch(exact, lr=1e-4), exact, [[g.float() for g in grads] for grads in series])
    for p, x in zip(params, exact, strict=True):
        ulp = 2.0 ** (x.detach().abs().log2().floor() - 7)
        total = p.detach().float() + optimizer.state[p]["residual"].float()
        assert float(((total - x.detach()).abs() / ulp).quantile(0.99)) < 0.05


@pytest.mark.parametrize(
    ("mode", "tolerance", "spread"),
    [("stochastic", 0.005, 12.0), ("kahan", 0.005, 0.5), ("eco", 0.005, 1.0)],
)
def test_steps_far_below_the_grid_add_up(mode, tolerance, spread):
    """A constant gradient makes AdamW's step constant: 5000 steps of a fiftieth of the grid."""
    p = nn.Parameter(torch.full((8192,), 1.953125, dtype=torch.bfloat16))
    optimizer = build([p], mode, lr=ULP / 50, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    for _ in range(5000):
        optimizer.step()
    moved = (1.953125 - p.detach().double()) / ULP
    if mode == "kahan":
        moved -= optimizer.state[p]["residual"].double() / ULP
    assert abs(float(moved.mean()) - 100) < 100 * tolerance
    assert float(moved.std()) < spread


@pytest.mark.parametrize("mode", MODES)
@low_dtypes
def test_decay_is_that_of_float32(mode, dtype):
    p = nn.Parameter(1 + torch.rand(4096, generator=torch.Generator().manual_seed(0)).to(dtype))
    start = p.detach().double()
    optimizer = build([p], mode, lr=1e-3, weight_decay=0.1)
    for _ in range(400):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    total = p.detach().double()
    if mode == "kahan":
        total = total + optimizer.state[p]["residual"].double()
    lost = float((start - total).sum() / start.sum()) / (1 - (1 - 1e-4) ** 400)
    assert abs(lost - 1) < 0.01


# errors in the momentum -----------------------------------------------------------------------


@every_form
def test_eco_puts_the_error_into_the_momentum(form):
    params, series = problem([(64,), (33,), (8, 8)], steps=4)
    lr, (b1, b2), eps, decay = 1e-3, (0.9, 0.99), 1e-8, 0.1
    optimizer = build(params, "eco", **FORMS[form])
    moments = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    squares = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    for t in range(1, 5):
        before = [p.detach().double() for p in params]
        run(optimizer, params, [grads[t - 1 : t] for grads in series])
        for i, (p, grads) in enumerate(zip(params, series, strict=True)):
            G = grads[t - 1].double()
            M = b1 * moments[i] + (1 - b1) * G
            squares[i] = b2 * squares[i] + (1 - b2) * G * G
            root = (squares[i] / (1 - b2**t)).sqrt() + eps
            E = (1 - lr * decay) * before[i] - lr * M / (1 - b1**t) / root - p.detach().double()
            c = (1 - lr * decay) / lr * (1 - 1 / b1)
            moments[i] = optimizer.state[p]["exp_avg"].double()
            expected = M + c * (1 - b1**t) * root * E
            torch.testing.assert_close(moments[i], expected, rtol=1e-3, atol=2e-5)
            assert float((M - expected).abs().max()) > 1e-3  # far above the tolerance


def test_eco_is_plain_where_nothing_is_cut_off():
    params, series = problem(dtype=torch.float32)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    mine, theirs = build(params, "eco"), by_torch(others)
    assert same(run(mine, params, series), run(theirs, others, series))
    assert same(tensors(mine), tensors(theirs))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_eco_puts_nothing_in_at_lr_0(as_tensor):
    params, series = problem()
    lr = torch.tensor(0.0) if as_tensor else 0.0
    optimizer = build(params, "eco", lr=lr)
    weights = values(params)
    run(optimizer, params, series)
    assert same(weights, values(params))
    for p, grads in zip(params, series, strict=True):
        M = torch.zeros(p.shape)
        for G in grads:
            M = 0.9 * M + 0.1 * G.float()
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], M)


@low_dtypes
def test_eco_leaves_out_what_is_infinite(dtype):
    largest = torch.finfo(dtype).max
    p = nn.Parameter(torch.tensor([largest, -largest, 1.0, math.inf, NAN], dtype=dtype))
    optimizer = build([p], "eco", lr=largest / 1e3 if dtype == torch.float16 else 1e36)
    for _ in range(3):
        p.grad = torch.tensor([-1.0, 1.0, 1e-3, 1.0, 1.0], dtype=dtype)
        optimizer.step()
    assert bool(optimizer.state[p]["exp_avg"].isfinite().all())
    assert bool(p.detach()[3:].isnan().any())


@pytest.mark.parametrize("where", ["keyword", "group", "written"])
def test_eco_without_a_momentum_is_refused(where):
    params, series = problem()
    if where == "keyword":
        with pytest.raises(ValueError, match=r"write='eco'.*betas"):
            build(params, "eco", adamw_betas=(0.0, 0.9))
    elif where == "group":
        with pytest.raises(ValueError, match=r"write='eco'.*betas"):
            build(params, group={"write": "eco", "adamw_betas": (0.0, 0.9)})
    else:
        optimizer = build(params, "eco")
        run(optimizer, params, series)
        weights, state = values(params), tensors(optimizer)
        optimizer.param_groups[0]["adamw_betas"] = (0.0, 0.9)
        with pytest.raises(ValueError, match=r"write='eco'.*betas"):
            optimizer.step()
        assert same(weights, values(params)) and same(state, tensors(optimizer))
