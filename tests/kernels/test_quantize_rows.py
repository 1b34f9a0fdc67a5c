"""Blocks of 8-bit state within rows, and second moments that random bits round."""

import pytest
import torch
from helpers.problems import same

from stiefel.kernels import (
    Rounding,
    blockwise_levels,
    blockwise_scales,
    blockwise_shape,
    dequantize_blocks,
    parameter_keys,
    quantize,
    quantize_blocks,
    rounding_keys,
)

CPU = torch.device("cpu")


def draw(shape, signed, seed=0):
    """Numbers over eight decades, with zeros."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(shape, generator=g) * 10 ** (-8 * torch.rand(shape, generator=g))
    X = torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, X)
    return X if signed else X.square()


def coded(X, signed=True, rounding=None, scales_shape=None):
    """Codes and scales of X (K, ...)."""
    codes = torch.zeros(X.shape, dtype=torch.int8 if signed else torch.uint8)
    scales = torch.full((len(X), *(scales_shape or blockwise_shape(X.shape[1:]))), torch.nan)
    quantize_blocks(X, codes, scales, rounding)
    return codes, scales


def bits(t=1, count=1, seed=0):
    return Rounding(rounding_keys(parameter_keys(seed, range(count), CPU), t))


# layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((40, 300), (40, 2)),
        ((40, 256), (40, 1)),
        ((3, 40, 513), (3, 40, 3)),
        ((4, 32, 48), (4, 32, 1)),
        ((1, 5000), (1, 20)),
        ((5000,), (20,)),
        ((64, 32, 3, 3), (64, 2)),
        ((64, 7, 15), (64, 1)),
        ((64, 8, 16), (64, 8, 1)),
        ((512, 8), (512, 1)),
        ((512, 7), None),
        ((5000, 1), None),
        ((900, 1, 5), None),
        ((0, 300), (0, 2)),
        ((5, 0), None),
    ],
)
def test_scales_of_a_shape(shape, scales):
    assert blockwise_shape(shape) == scales


SHAPES = [(2, 40, 300), (1, 3, 17, 257), (2, 1, 5000), (1, 512, 8), (1, 9, 5, 3, 3), (3, 700)]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_coded_as_it_is_alone(shape, signed, stochastic):
    """And the scales are the largest magnitudes of its blocks."""
    X = draw(shape, signed)
    rounding = bits(count=shape[0]) if stochastic else None
    codes, scales = coded(X, signed, rounding)
    decoded = dequantize_blocks(codes, scales)
    row = X[0].numel() // max(1, scales[0].numel() // scales.shape[-1])
    rows = [Y.reshape(-1, row) for Y in (X, decoded, codes)]
    tops = scales.view(-1, scales.shape[-1])
    per_tensor = X[0].numel() // row
    for i, (x, y, q) in enumerate(zip(*rows, strict=True)):
        k, first = i // per_tensor, i % per_tensor * row
        own = None if rounding is None else Rounding(rounding.keys[k : k + 1], offset=first)
        one, top = coded(x[None].clone(), signed, own)
        assert same(one[0], q) and same(top[0], tops[i])
        assert same(dequantize_blocks(one, top)[0], y)
        want = [float(part.abs().max()) for part in x.split(256)]
        want = torch.tensor(want if signed else [v**0.5 for v in want])
        torch.testing.assert_close(tops[i], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_loud_rows_leave_quiet_ones_alone(signed):
    X = draw((1, 6, 300), signed)
    quiet = coded(X, signed)
    X[:, 2] *= 1e8
    loud = coded(X, signed)
    others = [0, 1, 3, 4, 5]
    assert same([Y[:, others] for Y in quiet], [Y[:, others] for Y in loud])


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 300), (1, 2, 1100), (1, 40, 5)])
def test_panels_do_not_show(shape, signed, stochastic, monkeypatch):
    X = draw(shape, signed)
    rounding = bits(count=shape[0]) if stochastic else None
    layout = (*shape[1:-1], blockwise_scales(shape[-1]))
    whole = coded(X, signed, rounding, layout)
    monkeypatch.setattr(quantize, "_QUANTIZE_PANEL", 512)
    assert same(whole, coded(X, signed, rounding, layout))
    assert same(dequantize_blocks(*whole), dequantize_blocks(*coded(X, signed, rounding, layout)))


@pytest.mark.parametrize("shape", [(0, 4, 300), (2, 0, 300)])
def test_nothing_is_stored_of_nothing(shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    scales = torch.zeros(*shape[:-1], 2)
    quantize_blocks(torch.zeros(shape), codes, scales, bits())
    assert dequantize_blocks(codes, scales).shape == shape


def test_one_row_for_all_is_the_layout_of_older_files():
    X = draw((2, 40, 33), True)
    flat = coded(X.view(2, 1320), True)
    codes, scales = coded(X, True, scales_shape=(6,))
    assert same([codes.view(2, 1320), scales], list(flat))
    assert same(dequantize_blocks(codes, scales), dequantize_blocks(*flat).view(X.shape))


# second moments, by random bits -------------------------------------------------------------------


def neighbors(v, top):
    """In float64: squares of the levels around v, which is at most top^2."""
    squares = torch.cat([torch.zeros(1).double(), blockwise_levels(False).square()]) * top**2
    above = int(torch.searchsorted(squares, v * (1 - 1e-12)))
    return squares[max(above - 1, 0)], squares[above]


def test_a_second_moment_is_kept_on_average():
    """Itself, not its root, against the probabilities in float64."""
    values = [1.0, 0.9, 0.41, 0.123, 0.0101, 3e-3, 8.7e-5, 2.1e-7, 3e-10, 4e-13]
    draws, size = 20000, len(values)
    X = torch.tensor(values).repeat(1, draws, 1).view(1, draws, size)
    found = dequantize_blocks(*coded(X, False, bits(), (draws, 1)))[0].double()
    for i, v in enumerate(X[0, 0].double()):
        low, high = neighbors(v, 1.0)
        chance = (v - low) / (high - low)
        column = found[:, i]
        is_level = torch.isclose(column, low, rtol=1e-5) | torch.isclose(column, high, rtol=1e-5)
        assert bool(is_level.all())
        sigma = float((high - low) * (chance * (1 - chance) / draws) ** 0.5)
        # 16 bits, and the slack that keeps levels where they are
        assert abs(float(column.mean() - v)) <= 4 * sigma + 4e-5 * float(high - low) + 1e-6 * v


def test_levels_stay_where_they_are_under_random_bits():
    codes = torch.arange(256).to(torch.uint8).view(1, 1, 256)
    for t in range(300):
        top = torch.tensor([[[10.0 ** (t / 40 - 4)]]])
        X = dequantize_blocks(codes, top)
        again, scale = coded(X, False, bits(t))
        assert same(again, codes) and same(scale, top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_bits_make_no_second_moment_zero_and_no_zero_anything(dtype):
    X = draw((1, 30, 700), False).to(dtype) * 1e-3
    for t in range(20):
        left = dequantize_blocks(*coded(X, False, bits(t)), dtype)
        assert torch.equal(left > 0, X > 0) and bool(left.isfinite().all())


def test_infinite_second_moments_take_no_notice_of_random_bits():
    X = draw((1, 3, 300), False)
    X[0, 1, 5] = torch.inf
    assert same(coded(X, False)[0][0, 1, :256], coded(X, False, bits())[0][0, 1, :256])


def test_first_moments_are_rounded_to_nearest():
    X = draw((1, 3, 300), True)
    assert same(coded(X, True), coded(X, True, bits()))


def test_bits_differ_by_key_and_agree_in_a_stack():
    X = draw((3, 20, 300), False)
    X[1:] = X[0]
    rounding = bits(count=3)
    stack, _ = coded(X, False, rounding)
    assert not torch.equal(stack[0], stack[1]) and not torch.equal(stack[1], stack[2])
    for k in range(3):
        alone, _ = coded(X[:1].clone(), False, Rounding(rounding.keys[k : k + 1]))
        assert same(alone[0], stack[k])
    later, _ = coded(X, False, bits(t=2, count=3))
    assert not torch.equal(later, stack)
    changed = (stack != coded(X, False)[0]).double().mean()
    assert 0.1 < float(changed) < 0.6


def moving_average(gradient, steps, rounding, b2=0.999, shape=(16, 512)):
    """An average of squares in float32, and the same in 8 bits."""
    exact = torch.zeros(1, *shape)
    codes, scales = coded(exact, False)
    for t in range(1, steps + 1):
        G = gradient(t)
        exact.mul_(b2).addcmul_(G, G, value=1 - b2)
        V = dequantize_blocks(codes, scales).mul_(b2).addcmul_(G, G, value=1 - b2)
        quantize_blocks(V, codes, scales, bits(t) if rounding else None)
    return exact.double(), dequantize_blocks(codes, scales).double()


@pytest.mark.parametrize("part", [False, True], ids=["all", "every-second-column"])
def test_squares_follow_gradients_that_fall_100_fold_in_500_steps(part):
    """To nearest those that fall beside others that do not would stay 1.8 times too large."""
    g = torch.Generator().manual_seed(0)

    def gradient(t):
        G = torch.randn(1, 16, 512, generator=g)
        falls = 10 ** (-2 * max(0, t - 300) / 500)
        G[..., :: 2 if part else 1] *= falls
        return G

    exact, found = moving_average(gradient, 800, True)
    exact, found = exact[..., ::2], found[..., ::2]
    assert abs(float(found.sum() / exact.sum()) - 1) < 0.02
    assert abs(float((found / exact).mean()) - 1) < 0.02
    # every level is a step of 1 to 7 %, so single entries walk about the average
    assert float((found - exact).norm() / exact.norm()) < (0.2 if part else 0.1)
    if part:
        g.manual_seed(0)
        exact, nearest = moving_average(gradient, 800, False)
        assert float(nearest[..., ::2].sum() / exact[..., ::2].sum()) > 1.5
