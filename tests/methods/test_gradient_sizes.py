"""Every method, gradients from 1e-45 to 1e37: weights stay finite and a step within its bound."""

import math

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, by_altlora, factors, pair_gradients

from stiefel.optimizers import GaLore, adaprelora, altlora

SHAPE = (8, 6)
SIZES = [10.0**k for k in range(-45, 38)]
TEST_RULES = ("rows", "pick", "pick-rows")
"""Rules of the tests alone: sums of squares that may overflow, steps that read the weight."""
GROWING = ("auon-repo2026", "frugal-random", "spectral-published", *TEST_RULES)
"""Methods whose step grows with the gradient, as published: finite is all that they promise."""
ADAFACTOR = {
    f"galore-adafactor-{proj_type}-{moments}-{beta1}": (
        lambda params, p=proj_type, m=moments, b=beta1, **kw: GaLore(
            params,
            **{"lr": 0.02, "rank": 1.0, "inner": "adafactor", "update_proj_gap": 2,
               "proj_type": p, "moments": m, "betas": (b, 0.99), **kw},
        )
    )
    for proj_type, moments in [("std", "keep"), ("reverse_std", "keep"), ("reverse_std", "reset"),
                               ("std", "rotate"), ("full", "keep")]
    for beta1 in (0.0, 0.9)
}  # fmt: skip
FORMS = {**METHODS, **ADAFACTOR}
PAIR_FORMS = {
    **PAIRS,
    "altlora-compact-plain": by_altlora(compact_alignment=True),
    "altlora-compact-alternate": by_altlora(compact_alignment=True, schedule="alternate"),
    "altlora-reference-alternate": by_altlora(compat="reference", schedule="alternate"),
    "altlora-plus-compact": by_altlora(second_moment="elementwise", compact_alignment=True),
    "altlora-plus-free": by_altlora(second_moment="elementwise"),
}
GROWING_PAIRS = (
    "adaprelora-none",
    *(name for name in PAIR_FORMS if name.startswith("altlora") and "plus" not in name),
)
"""Natural gradients: the step is as large as the gradient."""
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


@pytest.mark.parametrize("name", FORMS)
def test_a_step_is_finite_and_bounded_for_every_size_of_the_gradient(name):
    bound = 1.5 * largest(steps_of(FORMS[name], draws()))
    for c in SIZES:
        Gs = [c * G for G in draws()]
        if name in TEST_RULES and c > 1e15:
            break
        size = largest(steps_of(FORMS[name], Gs))
        assert math.isfinite(size), c
        assert name in GROWING or size <= bound, c


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in FORMS if name not in GROWING])
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
        bound = 3.0 * largest(steps_of(FORMS[name], draws(), dtype, count))
        for kind, Gs in enumerate(kinds):
            assert largest(steps_of(FORMS[name], Gs, dtype, count)) <= bound, (count, kind)


@pytest.mark.covering
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


# rows of Muown turn, and so do not move along a line
@pytest.mark.parametrize("name", [x for x in METHODS if x not in TEST_RULES and x != "muown"])
def test_the_negative_of_a_gradient_takes_the_negative_of_the_step(name):
    """All entries have one sign here, so that the largest magnitude is the lowest number."""
    for c in (1e-30, 1.0, 1e30):
        up, down = (
            steps_of(METHODS[name], [sign * c * G.abs() for G in draws()]) for sign in (1.0, -1.0)
        )
        for x, y in zip(up, down, strict=True):
            assert float((x + y).norm()) <= 1e-3 * float(x.norm()), c


PAIR_SHAPES = [(10, 7, 3), (4, 8, 1), (3, 8, 3)]


def pair_steps(
    name, c, shape=PAIR_SHAPES[0], dtype=torch.float32, sides="AB", state_dtype=None, **draws_of
):
    """The factors of two pairs after three steps, what the first moved by, and all state."""
    limit = torch.finfo(dtype).max
    pairs = [
        tuple(torch.nn.Parameter(x.detach().to(dtype)) for x in factors(*shape, seed, **draws_of))
        for seed in range(2)
    ]
    optimizer = PAIR_FORMS[name](pairs, weight_decay=0.0, state_dtype=state_dtype)
    steps = []
    for step in range(3):
        old = [p.detach().double() for p in pairs[0]]
        for seed, pair in enumerate(pairs):
            for side, p, Gs in zip("AB", pair, pair_gradients(*shape, 3, seed), strict=True):
                if side in sides:
                    p.grad = (c * Gs[step].double()).clamp(-limit, limit).to(dtype)
        optimizer.step()
        steps += [p.detach().double() - x for p, x in zip(pairs[0], old, strict=True)]
    state = {
        (side, key): x
        for pair in pairs
        for side, p in zip("AB", pair, strict=True)
        for key, x in optimizer.state[p].items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    return [p.detach() for pair in pairs for p in pair], steps, state


@pytest.mark.parametrize("name", [name for name in PAIR_FORMS if name not in GROWING_PAIRS])
def test_pairs_take_finite_and_bounded_steps(name):
    bound = 3.0 * largest(pair_steps(name, 1.0)[1])
    for c in SIZES:
        assert largest(pair_steps(name, c)[1]) <= bound, c


@pytest.mark.covering(whole=["name"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("sides", ["AB", "A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIR_FORMS)
def test_pairs_and_their_state_stay_finite_for_every_size_of_the_gradient(name, dtype, sides, zero):
    sizes = [1e-45, 1e-38, 1e-20, 1e-18, 1.0, 1e15, 1e20, 1e25, 1e30, 1e37]
    sizes = {torch.float16: [1e-7, 1.0, 1e4, 6e4], torch.bfloat16: sizes[:-1]}.get(dtype, sizes)
    for shape in PAIR_SHAPES:
        for c in sizes:
            weights, _, state = pair_steps(name, c, shape, dtype, sides, zero=zero)
            assert all(bool(p.isfinite().all()) for p in weights), (shape, c)
            for (_, key), x in state.items():
                assert not bool(x.isnan().any()), (shape, c, key)
                assert key == "exp_avg_sq" or bool(x.isfinite().all()), (shape, c, key)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", PAIR_FORMS)
def test_state_narrower_than_the_weights_of_a_pair_stays_finite(name, state_dtype):
    """Squares that float64 holds are larger than the largest number of the state."""
    for shape in PAIR_SHAPES[:2]:
        for c in (1e-30, 1e20, 1e30, 1e37):
            weights, _, state = pair_steps(name, c, shape, torch.float64, state_dtype=state_dtype)
            assert all(bool(p.isfinite().all()) for p in weights), (shape, c)
            for (_, key), x in state.items():
                assert not bool(x.isnan().any()), (shape, c, key)
                # the scales of codes, like the sums themselves, may be infinite
                is_sum = key.removesuffix("_scale") == "exp_avg_sq"
                assert is_sum or bool(x.isfinite().all()), (shape, c, key)


@pytest.mark.parametrize("name", GROWING_PAIRS)
def test_a_natural_gradient_in_float32_is_that_of_float64_for_every_size(name):
    """Grams of the moved factors leave float32 from gradients of 1e20 on."""
    for c in (1e-30, 1e-20, 1.0, 1e10, 1e15, 1e20, 1e25, 1e32):
        found, want = (pair_steps(name, c, dtype=x)[0] for x in (torch.float32, torch.float64))
        for x, y in zip(found, want, strict=True):
            assert float((x.double() - y).norm()) <= 1e-3 * float(y.norm()), c


def test_a_pair_whose_grams_leave_float32_takes_a_finite_step_where_no_host_looks(monkeypatch):
    """As on an accelerator: no second look, the factor's own step is left out."""
    for module in (altlora, adaprelora):
        monkeypatch.setattr(module, "is_on_host", lambda _: False)
    for name in PAIR_FORMS:
        for c in (1e-38, 1e-20, 1e-18, 1.0, 1e15, 1e20, 1e30, 1e37):
            for zero in (False, True):
                weights, _, state = pair_steps(name, c, zero=zero)
                assert all(bool(p.isfinite().all()) for p in weights), (name, c)
                assert not any(bool(x.isnan().any()) for x in state.values()), (name, c)
