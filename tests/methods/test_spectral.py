"""Spectral and its inverse root: the recorded backends and steps, damping, sides."""

import json

import pytest
import torch
from helpers.paths import FIXTURES
from helpers.problems import change, doubles, gradients, replay, rotation, run, weight
from helpers.recordings import symmetry_cases
from oracles.common import polar

from stiefel.kernels import gram_polar, inverse_root
from stiefel.optimizers import Muon, Spectral

DOUBLE = torch.float64
BACKENDS = json.loads((FIXTURES / "symmetry_polar_backends_reference.json").read_text())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", range(18))
def test_recorded_spectral(side, case):
    """The published iteration in float64; as shipped, in float32, its first step is near."""
    settings, W, grads, recorded = symmetry_cases(f"{side}_spectral")[case]
    out = replay(Spectral, settings, W, grads)
    expected = torch.tensor(recorded["W_promoted"], dtype=DOUBLE)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    shipped = recorded.get("W_shipped_first_step", recorded.get("W_shipped", [None])[0])
    if shipped is not None:
        moved = (out[0] - (1 - 0.05 * 0.1) * W).norm()
        near = 5e-3 if recorded["gram_singular"] else 1e-4
        assert (torch.tensor(shipped, dtype=DOUBLE) - out[0]).norm() < near * moved


def test_there_are_eighteen_cases():
    assert all(len(symmetry_cases(f"{side}_spectral")) == 18 for side in ("left", "right"))


def test_left_right_and_polar_are_one_matrix():
    """For full rank; the smaller Gram matrix is taken whatever the name."""
    for shape in ((9, 6), (6, 10), (8, 8)):
        X = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        U = polar(X)
        for left in (True, False):
            small = left == (shape[0] <= shape[1])  # else the Gram matrix is singular
            O = gram_polar(X[None], left, steps=12, eps=1e-14)[0]
            torch.testing.assert_close(O, U, rtol=0, atol=1e-9 if small else 1e-4)
        W, G = torch.zeros(shape, dtype=DOUBLE), [X]
        for name in ("svd", "inverse_root"):
            left, right = (change(Spectral, W, G, side=s, polar=name) for s in ("left", "right"))
            assert torch.equal(left, right)


def test_damping_follows_the_size_of_the_gradient():
    """Published: with |Mc| = 1e-3 the second singular value is 0.93, at 1e-5 0.10. Ours: 1."""
    X = torch.randn(3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    X = X - X.mean(0)
    X = X / X.norm()
    old = []
    for size in (1e-3, 1e-4, 1e-5, 1e-12):
        G, W = [size * X / 0.05], torch.zeros(3, 4, dtype=DOUBLE)
        options = {"centred": True, "adjust_lr_fn": "none", "side": "left"}
        for polar_ in (
            {"polar": "svd"},
            {"polar": "eigh"},
            {"polar": "inverse_root", "ns_steps": 12},
        ):
            s = torch.linalg.svdvals(change(Spectral, W, G, **options, **polar_)) / 0.1
            torch.testing.assert_close(s[:2], torch.ones(2, dtype=DOUBLE), rtol=0, atol=1e-4)
            assert s[2] < 1e-5  # the mean that was taken off
        theirs = {"polar": "inverse_root", "ns_steps": 12, "eps": 1e-8}
        old.append(
            float((torch.linalg.svdvals(change(Spectral, W, G, **options, **theirs)) / 0.1)[1])
        )
    exact = [
        float(s / (s * s + 1e-8).sqrt())
        for s in (torch.linalg.svdvals(size * X)[1] for size in (1e-3, 1e-4, 1e-5, 1e-12))
    ]
    torch.testing.assert_close(old, exact, rtol=1e-3, atol=1e-6)
    assert old[0] > 0.9 and old[1] < 0.75 and old[2] < 0.12


def test_five_steps_are_not_converged_and_eight_are():
    """The error of the published five is above a percent, of eight far below."""
    for side, shape in (("left", (3, 4)), ("right", (9, 6))):
        draw = torch.Generator().manual_seed(0)
        X = torch.randn(shape, dtype=DOUBLE, generator=draw)
        X = X - X.mean(0) if side == "left" else X
        errors = [
            float((gram_polar(X[None], side == "left", steps, 1e-8)[0] - polar(X)).norm())
            / float(polar(X).norm())
            for steps in (5, 8)
        ]
        assert errors[0] > 1e-2 and errors[1] < 1e-3, errors


@pytest.mark.parametrize("alpha, size", [(1.0, 30.6), (0.0, None)])
def test_alpha_makes_huge_steps(alpha, size):
    """RMS 30.6 for a 3072 x 1024 Gaussian with alpha 1, against 0.03 for row norm; ours 0.2."""
    from stiefel.optimizers import Hybrid

    scale = 4  # a quarter of either side: the nuclear norm goes with the power 3/2 of it
    m, n = 3072 // scale, 1024 // scale
    G = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    options = {"polar": "eigh", "alpha": alpha, "momentum": 0.0}
    options["adjust_lr_fn"] = "none" if alpha else "match_rms_adamw"
    moved = change(Hybrid, torch.zeros(m, n), [G], **options) / 0.1
    rms = float(moved.square().mean().sqrt())
    if size is None:
        assert rms == pytest.approx(0.2, rel=1e-3)
    else:  # RMS nu / sqrt(m) with nu = 0.9 sqrt(m n) or so: it goes with sqrt(n)
        assert rms == pytest.approx(size / scale**0.5, rel=0.03)


ROOTS = [c for c in BACKENDS["inverse_roots"] if c["backend"] == "polar_express"]


@pytest.mark.parametrize("case", ROOTS, ids=lambda c: f"{c['matrix']} {c['num_steps']}")
def test_inverse_roots_equal_the_recorded_ones(case):
    """The published backend by the same iteration, and in float32 as it was shipped."""
    S = torch.tensor(BACKENDS["matrices"][case["matrix"]], dtype=DOUBLE)
    root = inverse_root(S[None], case["num_steps"], case["eps"])[0]
    expected, shipped = (torch.tensor(case[k], dtype=DOUBLE) for k in ("promoted", "shipped"))
    torch.testing.assert_close(root, expected, rtol=1e-10, atol=1e-11)
    single = inverse_root(S.float()[None], case["num_steps"], case["eps"])[0].double()
    assert (single - shipped).norm() < 2e-5 * shipped.norm()


@pytest.mark.parametrize("steps", [5, 8, 12])
def test_inverse_root_of_a_stack_is_that_of_each(steps):
    S = torch.stack([X @ X.T for X in gradients((7, 9), 4)])
    both = inverse_root(S, steps)
    for k in range(len(S)):
        assert torch.equal(inverse_root(S[k : k + 1], steps)[0], both[k])


def test_inverse_root_of_zero_is_finite():
    assert inverse_root(torch.zeros(2, 3, 3)).isfinite().all()
    assert torch.equal(gram_polar(torch.zeros(1, 3, 4), True), torch.zeros(1, 3, 4))


def test_is_muon_without_nesterov_where_the_rms_is_that_of_the_shape():
    """For exact factors of full rank the measured RMS is 0.2 sqrt(max(m, n)) by another name."""
    for shape in ((12, 7), (7, 12)):
        a, b = weight(shape, dtype=DOUBLE), weight(shape, dtype=DOUBLE)
        grads = doubles(shape)
        run(Spectral([a], lr=0.1, polar="svd"), [a], [grads])
        options = {"polar": "svd", "nesterov": False, "weight_decay": 0.0}
        run(Muon([b], lr=0.1, **options), [b], [grads])
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("polar_", ["auto", "ns5", "zolo", "cheb_cubic", "inverse_root"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equivariance_in_low_precision(polar_, dtype):
    """Rotations of either side to 2e-2 where weights and gradients are rounded, in any backend."""
    L, Q = rotation(12, 1).float(), rotation(7, 2).float()
    G = gradients((12, 7), 1)[0]
    W = torch.zeros(12, 7, dtype=dtype)
    G = torch.linalg.qr(G)[0] @ torch.diag(torch.linspace(1, 0.3, 7))  # no direction in rounding
    a = L @ change(Spectral, W, [G.to(dtype)], polar=polar_).float() @ Q
    b = change(Spectral, W, [(L @ G @ Q).to(dtype)], polar=polar_).float()
    assert (a - b).norm() < 2e-2 * b.norm()
