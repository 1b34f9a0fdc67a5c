"""Polar factors on kernels, in the interpreter, against float64 on the reference."""

import math

import pytest
import torch
from helpers.operands import gaussian, laid, unchanged

from stiefel.kernels import dispatch, polar_factor, reference
from stiefel.kernels.polar import batching as stacking
from stiefel.kernels.polar import coefficients as lists
from stiefel.kernels.polar import gram_newton_schulz as gram_space
from stiefel.kernels.polar.gram_newton_schulz import gram_iteration, gram_restarts
from stiefel.kernels.polar.methods import POLAR_METHODS
from stiefel.kernels.polar.newton_schulz import polynomial
from stiefel.optimizers import Muon

POLYNOMIALS = [name for name in POLAR_METHODS if POLAR_METHODS[name].schedule]
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.06}
"""Of the error relative to float64, for spectra without small values."""


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("STIEFEL_KERNELS", "triton")


def relative(A, B):
    return float((A.double() - B.double()).norm() / B.double().norm())


def with_spectrum(s, m, n):
    k = len(s)
    left = torch.linalg.qr(gaussian(m, m, dtype=torch.float64)).Q[:, :k]
    right = torch.linalg.qr(gaussian(n, n, seed=1, dtype=torch.float64)).Q[:, :k]
    return (left * s.double()) @ right.mT


def even(*shape):
    """Matrices with singular values from 0.3 to 1."""
    X = torch.stack(
        [
            with_spectrum(torch.linspace(1, 0.3, min(shape[-2:])), *shape[-2:])
            for _ in range(math.prod(shape[:-2]))
        ]
    )
    return X.view(shape).float()


@pytest.mark.parametrize("method", POLYNOMIALS)
def test_every_polynomial_method(method):
    X = even(20, 33)
    kept = unchanged(X)
    exact = polar_factor(X.double(), method)  # float64 is never on kernels
    for dtype in {torch.float32, POLAR_METHODS[method].fast}:
        O = polar_factor(X, method, dtype=dtype)
        assert relative(O, exact) < BOUNDS[dtype]
        assert O.dtype == X.dtype and O.is_contiguous() and torch.equal(X, kept[0])


@pytest.mark.parametrize("shape", [(33, 20), (16, 16), (2, 17, 40), (1, 7), (45, 1)], ids=str)
@pytest.mark.parametrize("method", ["ns5", "gram"])
def test_every_shape(method, shape):
    X = even(*shape)
    dtype = POLAR_METHODS[method].fast
    O = polar_factor(X, method, dtype=dtype)
    assert O.shape == X.shape and O.is_contiguous()
    bound = 4e-2 if method == "gram" else BOUNDS[dtype]  # twice the largest error below
    assert relative(O, polar_factor(X.double(), method)) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_input_and_other_layouts(dtype):
    X = even(32, 16).to(dtype)
    O = polar_factor(X, "ns5", dtype=dtype)
    assert O.dtype == dtype and relative(O, polar_factor(X.double())) < BOUNDS[dtype]
    for layout in ("columns", "strided", "padded"):
        same = polar_factor(laid(X, layout)[0], "ns5", dtype=dtype)
        assert relative(same, O) < BOUNDS[dtype] / 4


def test_stack_equals_its_matrices():
    X = even(2, 16, 30) * torch.tensor([1.0, 1e3]).view(2, 1, 1)
    for method, dtype in (("ns5", torch.bfloat16), ("gram", torch.float16)):
        O = polar_factor(X, method, dtype=dtype)
        assert torch.equal(O, polar_factor(X, method, dtype=dtype))
        alone = [polar_factor(x, method, dtype=dtype) for x in X]
        assert torch.equal(O, torch.stack(alone))


def test_padding_is_not_seen():
    X = even(2, 17, 20)
    O = polar_factor(torch.nn.functional.pad(X, (0, 12, 0, 15)), "ns5", dtype=torch.bfloat16)
    assert torch.equal(O[:, :17, :20], polar_factor(X, "ns5", dtype=torch.bfloat16))


@pytest.mark.parametrize("method", ["ns5", "gram", "cubic", "turbo"])
def test_what_is_not_finite_and_zero(method):
    X = even(4, 16, 32)
    steps = {"steps": 3} if method == "cubic" else {}
    expected = polar_factor(X, method, **steps)
    X[0], X[1, 2, 3], X[2, 3, 4] = 0, float("nan"), float("inf")
    for dtype in (torch.float32, POLAR_METHODS[method].fast):
        O = polar_factor(X, method, dtype=dtype, **steps)
        assert not O[0].any() and O[1:3].isnan().all()
        assert relative(O[3], expected[3]) < BOUNDS[dtype]


# the free norm ------------------------------------------------------------------------------------


def free_and_normalised(X, dtype, schedule, margin=1.0, eps=1e-7):
    ops = dispatch.backend_for(X)
    free = polynomial(ops.padded(X, dtype), schedule, margin=margin, eps=eps)
    return free, polynomial(ops.normalized(X, dtype, margin, eps), schedule)


def test_the_free_norm_rounds_as_the_normalised_form():
    X, schedule = 7 * gaussian(1, 32, 48), lists.POLAR_EXPRESS[:5]
    free, plain = free_and_normalised(X, torch.float32, schedule, 1.01)
    assert relative(free, plain) < 1e-4
    exact = polynomial(X.double() / (1.01 * X.double().norm()), schedule)
    free, plain = free_and_normalised(X, torch.bfloat16, schedule, 1.01)
    assert relative(free, exact) < 2 * relative(plain, exact) < 0.1


@pytest.mark.parametrize("size", [1e-10, 1e-7, 1e-3, 1e8, 1e15])
def test_the_free_norm_keeps_to_margin_and_eps(size):
    X = size * even(2, 16, 32) / 3
    free, plain = free_and_normalised(X, torch.float32, lists.NS5, 1.02)
    assert relative(free, plain) < 1e-5
    free, plain = free_and_normalised(X, torch.bfloat16, lists.CUBIC[:1] * 2, 1.02)
    assert relative(free, plain) < 0.02


def test_when_the_norm_is_free(monkeypatch):
    taken = []
    ops = dispatch.triton_backend()
    for name in ("normalized", "padded"):
        spied = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _s=spied, _n=name, **k: taken.append(_n) or _s(*a, **k)
        )
    X = even(16, 32)

    def copies(X, method="ns5", **options):
        taken.clear()
        polar_factor(X, method, steps=1, **options)
        return taken

    assert copies(X, dtype=torch.bfloat16) == ["padded"]
    assert copies(X) == []  # float32, dense, even: nothing to do
    assert copies(X.mT) == [] and copies(X.mT.contiguous()) == ["padded"]
    assert copies(X.mT.bfloat16().contiguous(), dtype=torch.bfloat16) == []
    assert copies(X[:, 1:]) == ["padded"] and copies(X[1:]) == ["padded"]
    assert copies(X, dtype=torch.float16) == ["normalized"]
    assert copies(X, norm="schatten4") == copies(X, "gram") == ["normalized"]
    assert copies(X, eps=0.0) == ["normalized"]
    assert copies(X, exact=True) == copies(X, "gram", exact=True) == []


# the form in the space of the Gram matrix ---------------------------------------------------------


def test_gram_in_float16_keeps_to_the_table():
    """Errors for a linear spectrum: 2.0e-2 with a restart, 2e-3 plain."""
    X = with_spectrum(torch.linspace(1, 0.01, 32), 32, 128).float()
    exact = polar_factor(X.double(), "gram")
    assert relative(polar_factor(X, "gram", dtype=torch.float16), exact) < 4e-2
    plain = polar_factor(X, coefficients=lists.GRAM[:5], dtype=torch.float16)
    assert relative(plain, exact) < 6e-3


def test_a_bad_result_of_the_gram_form_is_replaced():
    ops = dispatch.triton_backend()
    X = ops.normalized(even(4, 16, 32), torch.float16)
    O = gaussian(4, 16, 32).half()
    O *= math.sqrt(16) / O.float().norm(dim=(-2, -1), keepdim=True)
    O[1] *= 1.2
    O[2] *= 1.4
    O[3, 5, 7] = float("nan")
    mended = gram_space._replace_failures(O, X, lists.GRAM[:5])
    assert torch.equal(mended[:2], O[:2])
    assert torch.equal(mended[2:], polynomial(X, lists.GRAM[:5])[2:])


def test_an_unstable_gram_form_is_replaced():
    """Without restarts small singular values of a float16 matrix blow up."""
    A = gaussian(1, 16, 16) * torch.logspace(0, -5, 16) @ gaussian(16, 64)
    X = dispatch.triton_backend().normalized(A, torch.float16)
    schedule = lists.GRAM[:5]
    wild = gram_iteration(X.clone(), schedule, (), exact=True)
    assert not wild.float().norm() < 1.3 * 4
    assert torch.equal(gram_iteration(X.clone(), schedule, ()), polynomial(X, schedule))
    good = gram_iteration(X.clone(), schedule, gram_restarts(schedule))
    assert not torch.equal(good, polynomial(X, schedule)) and good.isfinite().all()


# torch's bits, and graphs -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)], ids=str)
def test_muon_with_the_bits_of_torch(shape):
    W = gaussian(*shape)
    p, q = (torch.nn.Parameter(W.clone()) for _ in range(2))
    ours, theirs = Muon([p], lr=0.02, compat="torch"), torch.optim.Muon([q], lr=0.02)
    for seed in range(3):
        p.grad = gaussian(*shape, seed=seed)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(p, q)


def test_exact_takes_torchs_products(monkeypatch):
    X = gaussian(2, 20, 33)
    options = {"dtype": torch.bfloat16, "exact": True}
    O = polar_factor(X, "ns5", **options)
    assert not torch.equal(O, polar_factor(X, "ns5", dtype=torch.bfloat16))
    monkeypatch.setenv("STIEFEL_KERNELS", "reference")
    assert torch.equal(O, polar_factor(X, "ns5", dtype=torch.bfloat16))
    assert stacking.backend_for(X) is reference


def test_an_iteration_is_one_graph():
    ops, graphs = dispatch.triton_backend(), []

    def record(module, inputs):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    def iteration(U):
        X = ops.normalized(U, torch.bfloat16)
        for a, b, c in lists.NS5 * 2:
            X = ops.scale_and_apply(X, ops.symmetric_poly(ops.gram(X), b, c), a)
        return ops.symmetric_apply(ops.gram(X), ops.gram(X), 1.0)

    X = gaussian(2, 16, 20)
    compiled = torch.compile(iteration, fullgraph=True, backend=record)(X)
    assert torch.equal(compiled, iteration(X))
    names = [str(target) for target in graphs[0] if "stiefel" in str(target)]
    step = ["gram", "symmetric", "scale_and_apply"]
    expected = ["normalized", *step * 2, "gram", "gram", "symmetric"]
    assert [name.split(".")[1] for name in names] == expected and len(graphs) == 1
