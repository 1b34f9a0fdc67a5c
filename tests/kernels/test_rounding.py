"""Random bits by a hash, and what is rounded by them or compensated."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.kernels import Rounding, parameter_keys, rounding_keys, update_weight_
from stiefel.kernels.reference import rounding
from stiefel.kernels.reference.rounding import random_bits, round_stochastically_

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]
MASK = 2**64 - 1


# oracles in plain integers ------------------------------------------------------------------------


def hash64(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key_of(seed, index, t, number):
    x = hash64(hash64(index ^ hash64(seed ^ 0x726F756E64)) ^ (t + (number << 48)))
    return (x ^ (x >> 32)) & 0xFFFFFFFF


def bits_of(key, position):
    x = (((position & 0xFFFFFFFF) >> 1) * 0x9E3779B1 + key + (position >> 32) * 0x632BE5AB) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        sign = -(x >> 31) * 2**32  # the shift keeps the sign
        x = (x ^ ((x + sign) >> shift)) * factor % 2**32
    x ^= x >> 16
    return x >> 16 if position & 1 else x & 0xFFFF


def expected_bits(keys, offset, strides, shape):
    """Unsigned bits (K, m, n), entry by entry."""
    found = np.empty(shape, dtype=np.int64)
    for k, i, j in np.ndindex(*shape):
        position = offset + k * strides[0] + i * strides[1] + j * strides[2]
        found[k, i, j] = bits_of(keys[k % len(keys)], position)
    return torch.from_numpy(found)


def unsigned(bits):
    return bits.long() & 0xFFFF


def made_keys(indices=(5, 7, 9), t=3, seed=0, number=0):
    return rounding_keys(parameter_keys(seed, indices, CPU), t, number)


# the bits -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    index=st.integers(0, 2**63 - 1),
    t=st.integers(1, 2**31 - 1),
    number=st.sampled_from([0, 1, 255]),
)
def test_a_key_is_a_hash_of_seed_parameter_update_and_write(seed, index, t, number):
    expected = key_of(seed, index, t, number)
    found = made_keys([index], t, seed, number)
    assert found.dtype == torch.int32 and int(found) % 2**32 == expected
    clocks = torch.tensor([t, t])
    assert made_keys([index, index], clocks, seed, number).tolist() == [int(found)] * 2


OFFSETS = (0, 1, 6, 2**32 - 6, 2**33 + 1)
SHAPES = ((1, 4, 6), (3, 4, 6), (3, 5, 7), (3, 1, 9), (1, 3, 1), (2, 3, 0))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_key", [True, False])
def test_bits_are_the_hash_of_an_entry_s_place(shape, offset, one_key):
    _, m, n = shape
    layouts = [(0, n, 1), (m * n, n, 1), (0, 2 * n, 1), (100, n + 1, 1), (0, 1, m), (4, 16, 1)]
    keys = made_keys()[: 1 if one_key else shape[0]]
    for strides in layouts:
        found = random_bits(keys, offset, strides, shape)
        expected = expected_bits([int(k) % 2**32 for k in keys], offset, strides, shape)
        assert found.shape == shape and found.dtype == torch.int16
        assert torch.equal(unsigned(found), expected), strides


def test_bits_of_long_lines_are_those_of_their_pieces():
    keys, n = made_keys([1]), 2**18
    whole = random_bits(keys, 0, (0, n, 1), (1, 1, n))
    for start, stop in ((0, 7), (7, 100_001), (131_071, n)):
        part = random_bits(keys, start, (0, n, 1), (1, 1, stop - start))
        assert torch.equal(part[0, 0], whole[0, 0, start:stop])


def test_bits_are_uniform_and_independent():
    count = 2**20
    z = []
    series = []
    for t in (1, 2):
        bits = unsigned(random_bits(made_keys([5], t), 0, (0, count, 1), (1, 1, count)))[0, 0]
        for part in (bits, bits[::2], bits[1::2]):
            for shift in (0, 8):
                cells = torch.bincount(part >> shift, minlength=2 ** (16 - shift)).double()
                expected = len(part) / len(cells)
                chi2 = float(((cells - expected) ** 2 / expected).sum())
                z.append((chi2 - len(cells)) / math.sqrt(2 * len(cells)))
        series.append(bits.double() / 2**16 - 0.5)
    f = series[0]
    for lag in (1, 2, 3, 4, 8, 64, 512, 1000, 4096):
        z.append(float((f[:-lag] * f[lag:]).mean()) * 12 * math.sqrt(count))
    z.append(float((series[0] * series[1]).mean()) * 12 * math.sqrt(count))
    assert max(map(abs, z)) < 4.5


# stochastic rounding ------------------------------------------------------------------------------

VALUES = {
    torch.bfloat16: [1.2345, -0.7777, 3e-5, -1e-7, 1e-39, 1.9999, -3e38, 1e-45],
    torch.float16: [1.2345, -0.7777, 3e-5, -1e-6, 1e-7, 2.0**-14 * 0.9999, 2.0**-14 * 1.0003, 6e4],
}


def rounded(x, dtype, count, t=1):
    X = torch.full((1, 1, count), x)
    target = torch.empty(1, 1, count, dtype=dtype)
    bits = random_bits(made_keys([3], t), 0, (0, count, 1), (1, 1, count))
    round_stochastically_(target, X, bits)
    return target[0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_100000_roundings_is_the_value(dtype):
    for x in VALUES[dtype]:
        exact, y = float(torch.tensor(x)), rounded(x, dtype, 100_000).double()
        grid = y.unique().tolist()  # one or two
        assert len(grid) <= 2 and grid[0] <= exact <= grid[-1]
        step = grid[-1] - grid[0]
        if step:
            share = (exact - grid[0]) / step
            sigma = step * math.sqrt(share * (1 - share) / len(y))
            # the last bit of the draw is 2^-16 of a step (2^-13 for float16)
            assert abs(float(y.mean()) - exact) <= 4 * sigma + step * 2**-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid_points_and_what_is_not_finite_stay(dtype):
    patterns = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
    for _ in range(3):
        target = torch.empty(1, 1, 2**16, dtype=dtype)
        bits = random_bits(made_keys([_]), 0, (0, 2**16, 1), (1, 1, 2**16))
        round_stochastically_(target, patterns.float().view(1, 1, -1), bits)
        a, b = patterns.float(), target[0, 0].float()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
        assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_pass_through_whatever_their_bits(dtype):
    patterns = [0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, 0x7F800000 - 2**31, 0x3FFFFFFF]
    X = torch.tensor(patterns, dtype=torch.int32).view(torch.float32).repeat(1000)
    target = torch.empty(1, 1, len(X), dtype=dtype)
    bits = random_bits(made_keys([1]), 0, (0, len(X), 1), (1, 1, len(X)))
    expected = X.clone()
    round_stochastically_(target, X.view(1, 1, -1).clone(), bits)
    y = target[0, 0].float()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    kept = expected.isfinite()
    assert ((y - expected)[kept].abs() < torch.finfo(dtype).eps * expected[kept].abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_never_moves_by_a_whole_step_of_the_grid(dtype):
    X = torch.randn(1, 64, 64) * 10.0 ** torch.randint(-7, 4, (1, 64, 64))
    target = torch.empty(1, 64, 64, dtype=dtype)
    round_stochastically_(target, X.clone(), random_bits(made_keys([1]), 0, (0, 64, 1), X.shape))
    up, down = (torch.nextafter(target, torch.tensor(s, dtype=dtype)) for s in (1e4, -1e4))
    assert ((down.double() < X.double()) & (X.double() < up.double())).all()


# modes of update_weight_ --------------------------------------------------------------------------


def test_float32_and_float64_weights_are_rounded_to_nearest_under_every_mode():
    for dtype in (torch.float32, torch.float64):
        W = torch.randn(2, 3, 4, dtype=dtype)
        expected, seen = W * 1.1, []
        how = Rounding(made_keys([1, 2]), 0, (0, 4, 1))
        update_weight_(W, lambda X: seen.append(X) or X.mul_(1.1), rounding=how)  # noqa: B023
        assert seen[0] is W and torch.equal(W, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_and_transposes_have_the_bits_of_the_whole(dtype):
    W = torch.randn(3, 10, 14).to(dtype)
    how = Rounding(made_keys([1, 2, 3]), 8, (0, 14, 1))
    whole, panels, transposed = W.clone(), W.clone(), W.clone()
    change = lambda X: X.mul_(1.001)  # noqa: E731
    update_weight_(whole, change, rounding=how)
    for ks in (slice(0, 2), slice(2, 3)):
        for rows in (slice(0, 3), slice(3, 10)):
            update_weight_(panels, change, panel=(ks, rows), rounding=how)
    update_weight_(transposed.mT, change, rounding=how.mT)
    assert torch.equal(whole, panels) and torch.equal(whole, transposed)
    assert not torch.equal(whole, (W.float() * 1.001).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_keeps_what_is_cut_off(dtype):
    W = torch.randn(1, 8, 8).to(dtype)
    exact, residual = W.double(), torch.zeros(1, 8, 8, dtype=torch.bfloat16)
    step = torch.randn(1, 8, 8) * 1e-5
    for t in range(1, 201):
        how = Rounding(made_keys([1], t), 0, (0, 8, 1), residual)
        update_weight_(W, lambda X: X.add_(step), rounding=how)
        exact += step.double()
    error = (W.double() + residual.double() - exact).abs()
    assert (error / torch.finfo(dtype).eps / exact.abs().clamp(min=0.01)).max() < 0.05
    W[0, 0, 0] = math.inf
    update_weight_(W, lambda X: X.add_(step), rounding=how)
    assert W[0, 0, 0] == math.inf and residual.isfinite().all()


def test_an_error_is_what_the_write_has_cut_off():
    W, error = torch.randn(2, 5, 6).bfloat16(), torch.empty(2, 5, 6)
    expected = W.float() * 1.003
    how = Rounding(made_keys([1, 2]), 0, (0, 6, 1), error=error)
    update_weight_(W, lambda X: X.mul_(1.003), rounding=how)
    assert torch.equal(W.float() + error, expected) and error.abs().max() > 0


# a constant step, far below the grid --------------------------------------------------------------


def walk(mode, steps=1000, count=2000, ulp=2.0**-7):
    """Moves in ulp of weights near 1.5 by steps of ulp / 50: mean and standard deviation."""
    W = torch.full((1, 1, count), 1.5, dtype=torch.bfloat16)
    residual = torch.zeros(1, 1, count, dtype=torch.bfloat16)
    step, keys = ulp / 50, parameter_keys(0, [1], CPU)
    for t in range(1, steps + 1):
        how = Rounding(rounding_keys(keys, t), 0, (0, count, 1))
        if mode != "stochastic":
            how = None if mode == "nearest" else replace(how, residual=residual)
        update_weight_(W, lambda X: X.sub_(step), rounding=how)
    moved = (1.5 - W.double() - (residual.double() if mode == "kahan" else 0)) / ulp
    return float(moved.mean()) / (steps / 50), float(moved.std())


def test_a_constant_step_of_a_fiftieth_of_a_grid_point():
    assert walk("nearest") == (0.0, 0.0)
    mean, std = walk("stochastic")
    assert abs(mean - 1) < 0.02 and 3.0 < std < 6.0  # sqrt(1000 / 50) = 4.5: a random walk
    mean, std = walk("kahan")
    assert abs(mean - 1) < 0.001 and std < 0.1


def test_the_module_says_how_bits_are_made():
    text = rounding.__doc__
    for constant in ("9E3779B1", "632BE5AB", "7FEB352D", "846CA68B"):
        assert f"0x{constant}" in text
