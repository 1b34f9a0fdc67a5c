"""The randomized low-rank polar factor: rank, alignment, keys, and what power steps gain."""

import importlib
import json
import math
from functools import partial

import pytest
import torch
from helpers import problems
from helpers.paths import FIXTURES
from helpers.recordings import tolerance

from stiefel.kernels import low_rank_size, polar_factor, polar_report
from stiefel.kernels.random import random_signs, splitmix
from stiefel.optimizers._toolkit.random_keys import StackRNG, splitmix64

kernel = importlib.import_module("stiefel.kernels.polar.low_rank")  # the name is the function's too
SHAPES = [(120, 80), (80, 120), (60, 60)]
SKETCHES = ["signs", "gaussian", "kaczmarz"]
RECORDED = sorted(path.stem for path in FIXTURES.glob("lowrank-polar-*.json"))
SOLVERS = sorted(path.stem for path in FIXTURES.glob("polar-solvers-*.json"))


def load(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


gaussian = partial(problems.gaussian, dtype=torch.float64)


def decaying(m, n, low=-2.0, seed=0):
    """Singular values 1 .. 10^low, geometric."""
    k = min(m, n)
    U = torch.linalg.qr(gaussian(m, k, seed=seed)).Q
    V = torch.linalg.qr(gaussian(n, k, seed=seed + 1)).Q
    return U * torch.logspace(0, low, k, dtype=torch.float64) @ V.mT


def oracle(M, Omega, power, transposed):
    """One matrix in float64 with exact factors: Q polar(Q^T M)."""
    X = M.double().mT if transposed else M.double()
    Y = X @ Omega.double()
    for _ in range(power):
        Y = X @ (X.mT @ torch.linalg.qr(Y).Q)
    Q = torch.linalg.qr(Y).Q
    U, _, Vh = torch.linalg.svd(Q.mT @ X, full_matrices=False)
    O = Q @ U @ Vh
    return O.mT if transposed else O


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_equals_the_full_factor(shape, sketch):
    M = gaussian(*shape)
    for options in ({"rank": min(shape)}, {"rank": 1.0}, {"rank": min(shape) - 3, "oversample": 9}):
        O = polar_factor(M, "low_rank", sketch=sketch, inner="svd", **options)
        assert torch.equal(O, polar_factor(M, "svd"))


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("power", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_alignment_is_the_nuclear_norm_inside_the_sketch(shape, power, sketch):
    M = decaying(*shape)
    O = polar_factor(
        M, "low_rank", rank=8, oversample=4, power=power, sketch=sketch, inner="svd", key=7
    )
    # the projector onto the sketch is O O^T on the longer side, O^T O on the shorter one
    X, P = (M, O @ O.mT) if shape[0] > shape[1] else (M.mT, O.mT @ O)
    nuclear = torch.linalg.svdvals(P @ X).sum()
    assert math.isclose(float((M * O).sum()), float(nuclear), rel_tol=1e-10)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("inner", ["svd", "polar_express", "zolo"])
@pytest.mark.parametrize("shape", [*SHAPES, (33, 17), (17, 33)])
def test_rank_is_at_most_r_and_nothing_lies_beside_the_sketch(shape, inner, sketch):
    O = polar_factor(decaying(*shape), "low_rank", rank=5, oversample=2, sketch=sketch, inner=inner)
    s = torch.linalg.svdvals(O)
    drawn = 7 if sketch != "kaczmarz" else 3  # with replacement: some columns come twice
    assert (s > 1e-3).sum() <= 7 and (s > 0.3).sum() >= drawn
    assert float(s[7:].max()) < 1e-12 and float(s[0]) < 1.2


@pytest.mark.parametrize("sketch", SKETCHES)
def test_same_key_same_result_and_another_key_another(sketch):
    M, options = decaying(90, 50), {"rank": 6, "sketch": sketch}
    O = polar_factor(M, "low_rank", key=3, **options)
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(O, polar_factor(M, "low_rank", key=3, **options))
    assert not torch.equal(O, polar_factor(M, "low_rank", key=4, **options))


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 70), (70, 33), (24, 24), (5, 40)])
def test_a_stack_equals_its_matrices_and_its_transposes(shape, dtype, sketch):
    M = gaussian(3, *shape, dtype=dtype)
    options = {"rank": 3, "oversample": 1, "sketch": sketch}
    O = polar_factor(M, "low_rank", key=[5, 6, 7], **options)
    assert O.is_contiguous() and O.dtype == dtype and O.shape == M.shape
    for k in range(3):
        assert torch.equal(O[k], polar_factor(M[k].clone(), "low_rank", key=5 + k, **options))
    if shape[0] != shape[1]:
        transposed = polar_factor(M.mT, "low_rank", key=[5, 6, 7], **options)
        atol = 1e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(transposed.mT, O, rtol=0, atol=atol)


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle_in_float64(shape, power):
    M, Omega = decaying(*shape), gaussian(min(shape), 11, seed=9)
    O = polar_factor(M, "low_rank", rank=9, oversample=2, power=power, sketch=Omega, inner="svd")
    want = oracle(M, Omega, power, transposed=shape[0] <= shape[1])
    torch.testing.assert_close(O, want, rtol=0, atol=1e-9)


def test_power_steps_raise_the_alignment():
    """120 x 80, singular values 1 .. 1e-2: what each power step gains."""
    M = decaying(120, 80)
    nuclear = torch.linalg.svdvals(M).sum()

    def alignment(rank, oversample, power, sketch):
        found = [
            (M * polar_factor(M, "low_rank", rank=rank, oversample=oversample, power=power,
                              sketch=sketch, inner="svd", key=key)).sum() / nuclear
            for key in range(20)
        ]  # fmt: skip
        return float(sum(found) / len(found))

    best = float(torch.linalg.svdvals(M)[:30].sum() / nuclear)
    assert math.isclose(best, 0.834, abs_tol=5e-4)
    for sketch in ("signs", "gaussian"):
        for power, want in ((0, 0.774), (1, 0.826), (2, 0.831)):
            assert math.isclose(alignment(20, 10, power, sketch), want, abs_tol=0.01)
        assert math.isclose(alignment(40, 10, 1, sketch), 0.952, abs_tol=0.005)


@pytest.mark.parametrize("scale", [1e-15, 1e-10, 1e12, 1e30])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_no_power_of_the_size_overflows_or_vanishes(power, scale):
    M = gaussian(40, 70, dtype=torch.float32)
    options = {"rank": 5, "oversample": 1, "power": power, "eps": 0.0}
    want = polar_factor(M, "low_rank", **options)
    O = polar_factor(M * scale, "low_rank", **options)
    torch.testing.assert_close(O, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_zero_rank_one_single_row_nan_and_the_input(sketch):
    options = {"rank": 2, "oversample": 1, "sketch": sketch}
    assert not polar_factor(torch.zeros(9, 6), "low_rank", **options).any()
    M = torch.outer(torch.arange(1.0, 10), torch.arange(1.0, 7))
    O = polar_factor(M, "low_rank", inner="svd", **options)
    torch.testing.assert_close(O, M / M.norm())
    row = gaussian(1, 7, dtype=torch.float32)
    O = polar_factor(row, "low_rank", inner="svd", **options)
    torch.testing.assert_close(O, row / row.norm())
    assert polar_factor(torch.empty(0, 4), "low_rank", **options).shape == (0, 4)
    X = gaussian(2, 9, 6, dtype=torch.float32)
    before, X[1, 2, 3] = X[0].clone(), math.nan
    O = polar_factor(X, "low_rank", **options)
    assert O[1].isnan().any() and O[0].isfinite().all() and torch.equal(X[0], before)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_factor(name):
    """The published code's, with its sketch: the image code always takes a basis of the rows."""
    data = load(name)
    settings = data["settings"]
    M = torch.tensor(data["grads"][0], dtype=torch.float32)
    lm = settings["orientation"].startswith("sketch of the shorter")
    sketch = torch.tensor(data["Omega"] if "Omega" in data else data["indices"])
    # what the published solver divides by is the norm times 1.02 or 1.01 or 1
    inner = "polar_express_safe" if lm else "ns5"
    if not lm and settings["solver"] == "polar_express":
        inner = "polar_express"
    O = polar_factor(
        M, "low_rank", rank=settings["rank"], oversample=settings["oversample"],
        power=settings["power"], sketch=sketch, inner=inner, basis="longer" if lm else "rows",
        coefficients=settings["coefficients"],
    )  # fmt: skip
    error = float((O - torch.tensor(data["O_float32"])).abs().max())
    assert error <= tolerance(data, "float32_vs_float64_same_sketch"), error


@pytest.mark.parametrize("name", SOLVERS)
def test_recorded_solvers(name):
    """Full factors of the published code, several solvers and step counts."""
    data = load(name)
    M = torch.tensor(data["grads"][0], dtype=torch.float32)
    own = {"cubic_ns_theoretical": (1.5, -0.5, 0.0), "quintic_ns_theoretical": (2, -1.5, 0.5),
           "quintic_ns_empirical": (3.4445, -4.775, 2.0315)}  # fmt: skip
    for key, result in data["results"].items():
        code, solver, steps = key.split("/")
        method, coefficients = "polar_express_safe", result.get("coefficients")
        if code == "image":
            method = "polar_express" if solver == "polar_express" else "ns5"
            coefficients = own.get(solver, data["settings"]["image_polar_express_coefficients"])
        O = polar_factor(M, method, steps=int(steps), coefficients=coefficients)
        error = float((O - torch.tensor(result["O_float32"])).abs().max())
        noise = data["noise"]
        assert error <= max(2e-6, 4 * max(noise.values())), (key, error)


# --- The sketches ---


def test_splitmix_is_the_scalar_one():
    for key in (0, 1, 2**63 + 5, 2**64 - 1):
        words = [word % 2**64 for word in splitmix(5, key).tolist()]
        step = 0x9E3779B97F4A7C15
        assert words == [splitmix64((key + i * step) % 2**64) for i in range(5)]


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 33), (300, 40)])
def test_signs_are_signs_and_balanced(shape):
    S = random_signs(*shape, key=12, like=torch.empty(0))
    assert S.shape == shape and set(S.unique().tolist()) <= {-1.0, 1.0}
    assert abs(float(S.sum())) <= 4.5 * math.sqrt(S.numel())
    assert torch.equal(S.double(), random_signs(*shape, key=12, like=torch.empty(0).double()))
    if S.numel() > 200:
        columns = S.mT @ S / shape[0] - torch.eye(shape[1])
        assert float(columns.abs().max()) < 5.5 / math.sqrt(shape[0])


def test_signs_of_fixed_bits():
    """Recorded: a change would change every run that resumes."""
    S = random_signs(2, 20, key=2026, like=torch.empty(0))
    bits = int("".join("1" if s < 0 else "0" for s in S.flatten().tolist()), 2)
    words = [splitmix64((2026 + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(2)]
    want = "".join(str(words[i // 32] >> i % 32 & 1) for i in range(40))
    assert bits == int(want, 2)


def test_gaussian_sketch_is_the_one_of_draws():
    M, rng = gaussian(30, 20), StackRNG(3, (17,), 5)
    (Omega,) = rng.gaussian(0, M, (20, 6))
    options = {"rank": 4, "oversample": 2}
    O = polar_factor(M, "low_rank", sketch="gaussian", key=rng.key(0), **options)
    assert torch.equal(O, polar_factor(M, "low_rank", sketch=Omega, **options))


def test_kaczmarz_draws_in_proportion_to_squares():
    M = gaussian(50, 8)
    M[:, 3] *= 10
    shares = M.square().sum(0) / M.square().sum()
    drawn = torch.cat([
        torch.multinomial(kernel._weights(M), 6, replacement=True,
                          generator=torch.Generator().manual_seed(key))
        for key in range(200)
    ])  # fmt: skip
    frequency = torch.bincount(drawn, minlength=8) / len(drawn)
    torch.testing.assert_close(frequency.double(), shares, rtol=0, atol=0.05)
    index = torch.tensor([3, 3, 0])
    Y = kernel._columns(M, index)
    torch.testing.assert_close(Y, M[:, index] / (3 * shares[index]).sqrt())


# --- Sizes and errors ---


def test_rank_is_a_count_or_a_fraction():
    assert low_rank_size(1024, 4096, 0.125, 10) == 138
    assert low_rank_size(64, 32, 1, 0) == 1 and low_rank_size(64, 32, 1.0, 5) == 32
    assert low_rank_size(3, 9, 0.01, 0) == 1 and low_rank_size(3, 9, 50, 10) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be a positive int or a fraction"),
        ({"rank": 1.5}, "rank must be a positive int or a fraction"),
        ({"rank": True}, "rank must be a positive int or a fraction"),
        ({"oversample": -1}, "oversample=-1 must be an int and not negative"),
        ({"power": -1}, "power=-1 must be an int from 0 to 99"),
        ({"sketch": "hash"}, "sketch='hash' is unknown: pass one of signs, gaussian, kaczmarz"),
        ({"basis": "columns"}, "basis='columns' is unknown: pass longer or rows"),
        ({"inner": "low_rank"}, "inner='low_rank' would sketch a sketch"),
        ({"inner": "qr"}, "method='qr' is unknown"),
        ({"inner": "svd", "steps": 3}, "steps and coefficients mean nothing to method='svd'"),
        ({"colour": 1}, "option 'colour' is unknown to method='polar_express'"),
        ({"key": [1, 2], "rank": 1, "oversample": 0}, "key has 2 entries for 1 matrices"),
    ],
)
def test_errors_name_the_parameter(options, text):
    with pytest.raises(ValueError) as caught:
        polar_factor(torch.ones(3, 4), "low_rank", **options)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_report_of_a_low_rank_factor():
    M = decaying(60, 90)
    report = polar_report(M, polar_factor(M, "low_rank", rank=10, oversample=5, inner="svd"))
    s = torch.linalg.svdvals(M)
    best = float(1 - s[:15].sum() / s.sum())
    assert best <= report.alignment_deficit < best + 0.02
    assert report.operator_norm == pytest.approx(1)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_the_accelerator_path_works_on_a_whole_stack(sketch):
    """There a stack is sketched and compressed at once; here the same functions on the CPU."""
    X, keys = gaussian(3, 20, 12), [4, 5, 6]
    Y = kernel._sketched(X, sketch, keys, 5)
    for k in range(3):
        torch.testing.assert_close(Y[k], kernel._sketched(X[k], sketch, keys[k], 5))
    Q, Z = kernel._compressed(X, Y.clone(), 2, lambda B: polar_factor(B, "svd"))
    options = {"rank": 5, "oversample": 0, "power": 2, "inner": "svd", "key": keys}
    O = polar_factor(X, "low_rank", sketch=sketch, **options)
    if sketch != "kaczmarz":  # whose repeated columns leave a direction to rounding
        torch.testing.assert_close(Q @ Z, O)
