"""Every method, gradients from 1e-45 to 1e37: weights stay finite and a step within its bound."""

import math

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, pair_gradients

SHAPE = (8, 6)
SIZES = [10.0**k for k in range(-45, 38)]
TEST_RULES = ("rows", "pick", "pick-rows")
"""Rules of the tests alone: sums of squares that may overflow, steps that read the weight."""
GROWING = ("auon-repo2026", "frugal-random", "spectral-published", *TEST_RULES)
"""Methods whose step grows with the gradient, as published: finite is all that they promise."""
GROWING_PAIRS = ("altlora", "altlora-alternate", "altlora-compact", "altlora-reference")
"""Natural gradients: the step is as large as the gradient, and squares of weights overflow."""
SCALE_FREE = (
    *("muon", "muon-ns5", "muon-plain", "muon-normuon", "muon-adamuon", "auon", "auon-hybrid"),
    *("trion", "trion-l2", "aro", "aro-polar", "rownorm", "rownorm-columns", "rownorm-centred"),
    *("spectral", "hybrid", "hybrid-columns", "symmetrystack"),
)
"""Methods whose step does not depend on the size of the gradient."""
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draws(shape=SHAPE, steps=3):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(steps)]


def steps_of(make, Gs, dtype=torch.float32, count=1, shape=SHAPE, **settings):
    """What the first weight moves by in each step; the others of a stack have other gradients."""
    limit = torch.finfo(dtype).max
    params = [torch.nn.Parameter((torch.ones(shape) + k).to(dtype)) for k in range(count)]
    optimizer, moved = make(params, weight_decay=0.0, **settings), []
    for step, G in enumerate(Gs):
        before = params[0].detach().double()
        for k, p in enumerate(params):
            g = G if k == 0 else Gs[step - k]
            p.grad = g.clamp(-limit, limit).to(dtype)
        optimizer.step()
        moved.append(params[0].detach().double() - before)
    assert all(bool(p.isfinite().all()) for p in params)
    return moved


def largest(steps):
    return max(float(x.norm()) for x in steps)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_finite_and_bounded_for_every_size_of_the_gradient(name):
    bound = 1.5 * largest(steps_of(METHODS[name], draws()))
    for c in SIZES:
        Gs = [c * G for G in draws()]
        if name in TEST_RULES and c > 1e15:
            break
        size = largest(steps_of(METHODS[name], Gs))
        assert math.isfinite(size), c
        assert name in GROWING or size <= bound, c


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in GROWING])
def test_gradients_of_mixed_size_take_bounded_steps(name, dtype):
    """In stacks too: rows and columns of very different size, one huge entry, sizes that jump."""
    rows = 10.0 ** torch.linspace(-30, 30, 8, dtype=torch.float64)[:, None]
    entry = torch.zeros(SHAPE, dtype=torch.float64)
    entry[2, 3] = 1.0
    kinds = [
        [rows * G for G in draws()],
        [rows.mT[:, :6] * G for G in draws()],
        [G + 1e37 * entry for G in draws()],
        [1e-30 * G + 1e-3 * entry for G in draws()],
        [1e-40 * entry for _ in range(3)],
        [G[:, :1] @ G[:1] for G in draws()],
        [10.0 ** (36 - 72 * (k % 2)) * G for k, G in enumerate(draws())],
    ]
    for count in (1, 3):
        bound = 3.0 * largest(steps_of(METHODS[name], draws(), dtype, count))
        for kind, Gs in enumerate(kinds):
            assert largest(steps_of(METHODS[name], Gs, dtype, count)) <= bound, (count, kind)


@pytest.mark.parametrize("settings", [{}, {"view": "rows:3,5"}, {"state_dtype": "bfloat16"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_scale_free_methods_take_the_same_step_for_every_size(name, dtype, settings):
    if name == "symmetrystack" and "view" in settings:
        pytest.skip("its policy chooses the views")
    for count in (1, 3):
        want = steps_of(METHODS[name], draws(), dtype, count, **settings)
        for k in (-100, -85, -60, -31, -27, -10, 10, 31, 60, 85, 100):  # exact powers of two
            found = steps_of(METHODS[name], [2.0**k * G for G in draws()], dtype, count, **settings)
            for x, y in zip(found, want, strict=True):
                assert float((x - y).norm()) <= 2e-3 * float(y.norm()), (count, k)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in TEST_RULES])
def test_the_negative_of_a_gradient_takes_the_negative_of_the_step(name):
    """All entries have one sign here, so that the largest magnitude is the lowest number."""
    for c in (1e-30, 1.0, 1e30):
        up, down = (
            steps_of(METHODS[name], [sign * c * G.abs() for G in draws()]) for sign in (1.0, -1.0)
        )
        for x, y in zip(up, down, strict=True):
            assert float((x + y).norm()) <= 1e-3 * float(x.norm()), c


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in GROWING_PAIRS])
def test_pairs_take_finite_and_bounded_steps(name):
    def moved(c):
        A, B = (torch.nn.Parameter(x.detach()) for x in factors(10, 7, 3))
        optimizer, steps = PAIRS[name]([(A, B)], weight_decay=0.0), []
        for g_A, g_B in zip(*pair_gradients(10, 7, 3, 3), strict=True):
            old = [A.detach().clone(), B.detach().clone()]
            A.grad, B.grad = (c * g_A.double()).float(), (c * g_B.double()).float()
            optimizer.step()
            steps += [A.detach() - old[0], B.detach() - old[1]]
        assert bool(A.isfinite().all() and B.isfinite().all())
        return largest(steps)

    bound = 3.0 * moved(1.0)
    for c in SIZES:
        size = moved(c)
        assert math.isfinite(size)
        assert name == "adaprelora-none" or size <= bound, c
