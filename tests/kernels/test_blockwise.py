"""Eight bits per number: levels, rounding, and optimizers whose moments are kept so."""

import copy

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.methods import METHODS
from helpers.problems import gradients, run, same, tensors, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.kernels import blockwise_levels, blockwise_scales, dequantize_blocks, quantize_blocks
from stiefel.optimizers import GaLore, Muon
from stiefel.optimizers._driver import units
from stiefel.optimizers._driver.units import MIN_QUANTIZED_NUMEL

BLOCK = 256


def stored(X, signed):
    """What is left of X (K, ...) after it was stored."""
    codes = torch.zeros(X.shape, dtype=torch.int8 if signed else torch.uint8)
    scales = torch.zeros(len(X), blockwise_scales(X[0].numel()))
    quantize_blocks(X, codes, scales)
    return dequantize_blocks(codes, scales, X.dtype), codes, scales


def draw(shape, signed, seed=0):
    """Numbers over twelve decades, with zeros."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(shape, generator=g) * 10 ** (-12 * torch.rand(shape, generator=g))
    X = torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, X)
    return X if signed else X.square()


def nearest(X, signed):
    """The same by an exhaustive search in float64; a second moment is searched by its root."""
    levels = blockwise_levels(signed)
    levels = torch.cat([-levels.flip(0), torch.zeros(1).double(), levels]) if signed else levels
    out = torch.zeros_like(X, dtype=torch.float64)
    for k, x in enumerate(X.double().flatten(1)):
        y = x if signed else x.sqrt()
        for i in range(0, len(y), BLOCK):
            part = y[i : i + BLOCK]
            top = part.abs().max()
            if top == 0:
                continue
            at = (part[:, None] / top - levels).abs().argmin(1)
            value = levels[at] * top
            value = value if signed else torch.where(part == 0, 0.0, value).square()
            out[k].view(-1)[i : i + BLOCK] = value
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-20, 1e-37, 1e-44, 1e-60, 1e-80, 1e-100, 1e-300])
def test_a_second_moment_that_was_not_zero_never_becomes_zero(size, dtype):
    """However small it is in its dtype, alone or beside what is far larger."""
    for factors in ([1.0, 0.0, 0.3], [1.0, 1e-12, 0.0], [1e12, 1.0, 0.0]):
        X = (torch.tensor(factors, dtype=torch.float64) * size).to(dtype).repeat(1, 200)
        left, *_ = stored(X, signed=False)
        assert torch.equal(left > 0, X > 0)
        assert left.isfinite().all()


@pytest.mark.parametrize("size", [1e-44, 1e-60, 1e-74])
def test_a_small_double_second_moment_keeps_its_size(size):
    X = draw((1, 700), False).double() * size
    left, *_ = stored(X, signed=False)
    large = X > 0.02 * X.max()
    torch.testing.assert_close(left[large], X[large], rtol=0.1, atol=0)


def test_levels_are_as_the_paper_describes_them():
    for signed, decades in ((True, 7), (False, 8)):
        levels = blockwise_levels(signed)
        assert len(levels) == 2**decades - 1
        assert levels[-1] == 1.0
        assert bool((levels.diff() > 0).all())
        counts = [int((levels > 10.0 ** -(i + 1) * 1.0001).sum()) for i in range(decades)]
        assert counts == [sum(2 ** (decades - 1 - j) for j in range(i + 1)) for i in range(decades)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (2, 256), (1, 3, 257), (3, 40, 33)])
def test_rounding_is_to_the_nearest_level_up_to_eleven_digits(signed, shape):
    X = draw(shape, signed)
    got, _, _ = stored(X, signed)
    want = nearest(X, signed)
    if not signed:
        X, got, want = X.sqrt(), got.sqrt(), want.sqrt()
    X, got = X.double(), got.double()
    # a quotient is rounded to eleven digits first, so near the middle of two levels either is right
    assert bool(((got - X).abs() <= (want - X).abs() + 2**-10 * X.abs() + 1e-6 * want.abs()).all())
    assert float(((got - want).abs() > 1e-6 * want.abs()).double().mean()) < 0.08


@pytest.mark.parametrize("signed", [True, False])
def test_zero_and_the_largest_are_exact_and_the_rest_is_close(signed):
    X = draw((2, 1000), signed, seed=3)
    got, codes, scales = stored(X, signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert scales.shape == (2, 4)
    assert bool((got[X == 0] == 0).all())
    blocks = X[:, :768].view(2, 3, BLOCK)
    top = blocks.abs().amax(-1, keepdim=True)
    large = got[:, :768].view(2, 3, BLOCK)[blocks.abs() == top].abs()
    torch.testing.assert_close(large, top.flatten(), rtol=1e-6, atol=0)
    upper = blocks.abs() >= 0.1 * top
    error = (got[:, :768].view(2, 3, BLOCK) - blocks).abs()[upper] / blocks.abs()[upper]
    assert float(error.max()) < 0.08
    if not signed:  # what was not zero stays so, or a division by it would blow up
        assert bool((got[X > 0] > 0).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.booleans(), st.integers(0, 10**6))
def test_storing_again_changes_nothing(numel, signed, seed):
    once, codes, scales = stored(draw((1, numel), signed, seed), signed)
    twice, codes2, scales2 = stored(once, signed)
    torch.testing.assert_close(scales2, scales, rtol=1e-6, atol=0)
    assert same(codes2, codes)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_a_block_knows_nothing_of_its_neighbours_and_a_stack_nothing_of_its_matrices():
    X = draw((3, 700), True)
    whole = stored(X, True)
    for k in range(3):
        assert same(stored(X[k : k + 1], True)[1], whole[1][k : k + 1])
    loud = X.clone()
    loud[:, :BLOCK] *= 1e6
    assert same(stored(loud, True)[1][:, BLOCK:], whole[1][:, BLOCK:])


def test_panels_do_not_show():
    X = draw((1, 2**17 + 300), True)
    got, _, _ = stored(X, True)
    tail, _, _ = stored(X[:, 2**17 :].contiguous(), True)
    assert same(got[:, 2**17 :], tail)


# Optimizers.

BIG = (80, 64)
CODED = [m for m in METHODS if m not in ("rows", "pick", "pick-rows")]


def build(method, shapes=(BIG, BIG, (64, 80), (8, 6)), **options):
    params = [weight(shape, i) for i, shape in enumerate(shapes)]
    return params, METHODS[method](params, state_dtype="int8", **options)


def series(params, steps, seed=0):
    return [gradients(p.shape, steps, seed + i) for i, p in enumerate(params)]


@pytest.mark.parametrize("method", ["muon", "galore", "fira"])
def test_small_state_stays_float32_and_large_moments_and_bases_are_bytes(method):
    params, optimizer = build(method, **({} if method == "muon" else {"rank": 64}))
    run(optimizer, params, series(params, 2))
    for p in params:
        for key, value in optimizer.state[p].items():
            if not isinstance(value, torch.Tensor):
                continue
            name = key.removesuffix("_scale")
            coded = name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "basis")
            if coded and optimizer.state[p][name].numel() >= MIN_QUANTIZED_NUMEL:
                kind = torch.uint8 if name == "exp_avg_sq" else torch.int8
                assert value.dtype == (torch.float32 if key.endswith("_scale") else kind)
            else:
                assert value.dtype in (torch.float32, torch.int32)


@pytest.mark.parametrize("method", ["muon", "galore", "fira"])
def test_a_run_stays_close_to_float32(method):
    options = {} if method == "muon" else {"rank": 60, "eps": 1e-6}
    params, coded = build(method, **options)
    plain_params = [weight(p.shape, i) for i, p in enumerate(params)]
    plain = METHODS[method](plain_params, **options)
    W = run(coded, params, series(params, 12))[-1]
    V = run(plain, plain_params, series(params, 12))[-1]
    for a, b, i in zip(W, V, range(4), strict=True):
        start = weight(a.shape, i).detach()
        assert float((a - b).norm()) < 0.08 * float((b - start).norm())
        assert bool(a.equal(b)) == (a.numel() < MIN_QUANTIZED_NUMEL)


# which blocks are at work depends on how many there are, so one cannot be trained alone
@pytest.mark.parametrize("shape", [BIG, (8, 6)], ids=["alone", "stacked"])
@pytest.mark.parametrize("method", [m for m in CODED if "block" not in m])
def test_stack_equals_separate_optimizers_bitwise(method, shape, monkeypatch):
    monkeypatch.setattr(units, "MIN_QUANTIZED_NUMEL", 4)  # what is stacked is small
    params, stacked = build(method, shapes=(shape,) * 4)
    grads = series(params, 7)
    grads[2][1] = torch.full(shape, float("nan"))  # three of the stack are left
    grads[1][3] = None
    W = run(stacked, params, grads)
    for i in range(4):
        p = weight(shape, i)
        # padding parameters keep the position, which is the key of random draws
        pads = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(i)]
        alone = METHODS[method]([*pads, p], state_dtype="int8")
        none = [[None] * 7 for _ in pads]
        V = run(alone, [*pads, p], [*none, grads[i]])
        for a, b in zip(W, V, strict=True):
            assert same(a[i], b[-1])


@pytest.mark.parametrize("method", CODED)
def test_resume_is_bit_identical(method):
    params, whole = build(method)
    grads = series(params, 9)
    run(whole, params, [g[:5] for g in grads])
    saved = through_a_file(whole.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = METHODS[method](copies, state_dtype="int8")
    resumed.load_state_dict(saved)
    cloned = copy.deepcopy(whole)
    W = run(whole, params, [g[5:] for g in grads])
    assert same(W, run(resumed, copies, [g[5:] for g in grads]))
    assert same(tensors(whole), tensors(resumed))
    others = [p for g in cloned.param_groups for p in g["params"]]
    assert same(W, run(cloned, others, [g[5:] for g in grads]))


def test_a_checkpoint_of_float32_state_is_refused_with_its_reason():
    params, coded = build("muon")
    plain = METHODS["muon"]([weight(p.shape, i) for i, p in enumerate(params)])
    plain.init_state()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="lacks 'momentum_buffer_scale'"):
        coded.load_state_dict(
            {**plain.state_dict(), "param_groups": coded.state_dict()["param_groups"]}
        )
    assert same(before, [p.detach() for p in params])


def test_flags_that_arrive_late_put_codes_back(monkeypatch):
    def trained(wait):
        params = [weight(BIG, i) for i in range(2)]
        optimizer = Muon(params, lr=0.02, state_dtype="int8")
        optimizer._wait = wait
        grads = series(params, 6)
        grads[0][2] = torch.full(BIG, float("inf"))
        W = run(optimizer, params, grads)
        assert sum(optimizer.skipped.values()) == 1
        return W

    assert same(trained(True), trained(False))


@pytest.mark.parametrize("view", ["heads:4", "rows:16,64", "batch"])
def test_views_share_codes_and_train(view):
    shape = (4, 32, 48) if view == "batch" else (80, 64)
    p, q = weight(shape), weight(shape)
    coded = GaLore([p], lr=0.02, rank=16, view=view, state_dtype="int8", update_proj_gap=3)
    plain = GaLore([q], lr=0.02, rank=16, view=view, update_proj_gap=3)
    W = run(coded, [p], [gradients(shape, 6)])[-1][0]
    V = run(plain, [q], [gradients(shape, 6)])[-1][0]
    assert float((W - V).norm()) < 0.1 * float((V - weight(shape).detach()).norm())
    if view != "heads:4":
        m, n = (
            Muon([weight(shape)], view=view, state_dtype="int8"),
            Muon([weight(shape)], view=view),
        )
        for optimizer in (m, n):
            run(optimizer, optimizer.param_groups[0]["params"], [gradients(shape, 6)])
        a, b = (o.param_groups[0]["params"][0].detach() for o in (m, n))
        assert 0 < float((a - b).norm()) < 0.05 * float((b - weight(shape).detach()).norm())


def test_coding_wears_off_no_moment_that_stands_still():
    """Zero gradients: momentum falls by its factor each step, as scales are float32."""
    p = weight(BIG)
    optimizer = Muon([p], lr=0.0, momentum=0.9, state_dtype="int8")
    p.grad = gradients(BIG, 1)[0]
    optimizer.step()
    start = dequantize_blocks(
        optimizer.state[p]["momentum_buffer"][None],
        optimizer.state[p]["momentum_buffer_scale"][None],
    )
    p.grad = torch.zeros(BIG)
    optimizer.param_groups[0]["lr"] = 1e-30  # an lr of 0 and no gradient at all is a probe
    for _ in range(5):
        optimizer.step()
    end = dequantize_blocks(
        optimizer.state[p]["momentum_buffer"][None],
        optimizer.state[p]["momentum_buffer_scale"][None],
    )
    torch.testing.assert_close(end, start * 0.9**5, rtol=1e-5, atol=0)
