"""Numbers at the edges: what is chosen, carried, stored and bounded there, one test for each."""

import pytest
import torch
from helpers.methods import METHODS
from helpers.problems import gradients, run, weight

from stiefel.kernels import polar_factor
from stiefel.kernels.polar.qdwh import qdwh
from stiefel.kernels.reference.adam import adam
from stiefel.optimizers import (
    AuON,
    DCTAdamW,
    Fira,
    GaLore,
    Hybrid,
    Muon,
    RowNorm,
    Spectral,
    SwitchLoRA,
    Trion,
    pairs_to_groups,
)

SHAPE = (12, 20)
DOUBLE = torch.float64


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("make", [DCTAdamW, Trion])
@pytest.mark.parametrize("c", [1e-35, 1e-25, 1e18, 1e30])
def test_the_rows_that_are_chosen_do_not_depend_on_the_size_of_the_gradient(c, make, norm, count):
    chosen = []
    for scale in (1.0, c):
        params = [weight(SHAPE, k) for k in range(count)]
        optimizer = make(params, rank=4, norm=norm)
        run(optimizer, params, [[scale * gradients(SHAPE, 1, k)[0]] for k in range(count)])
        chosen.append(
            [{k: v for k, v in optimizer.state[p].items() if k == "index"} for p in params]
        )
        moved = [p.detach() for p in params]
        assert all(x.isfinite().all() for x in moved)
        if make is Trion:
            chosen[-1] = moved
    if make is Trion:  # it stores no rows, its step shows them
        for x, y in zip(*chosen, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        return
    for x, y in zip(*chosen, strict=True):
        assert torch.equal(x["index"], y["index"]) and bool((x["index"] >= 0).all())


def decaying(m, n, decay, seed=0):
    """A matrix with singular values decay**i, its singular vectors beside it."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(k, min(m, n), generator=draw, dtype=DOUBLE))[0] for k in (m, n)
    )
    s = decay ** torch.arange(min(m, n), dtype=DOUBLE)
    return (U * s @ V.mT).float(), U, V


@pytest.mark.parametrize("sketch", ["signs", "gaussian", "kaczmarz"])
@pytest.mark.parametrize("shape", [(60, 80), (80, 60)])
def test_many_power_steps_keep_all_directions_of_the_sketch(shape, sketch):
    """Without a QR between them the columns fall onto the first few directions."""
    X, U, V = decaying(*shape, 0.5)
    O = polar_factor(
        X, "low_rank", rank=8, oversample=0, power=5, sketch=sketch, inner="svd", key=3
    ).double()
    captured = (U[:, :8].mT @ O @ V[:, :8]).diagonal()
    assert float(captured.min()) > 0.98


def left_moments(state, t, C, betas):
    """LDAdam's moments in a new basis, entry by entry, after t updates in the old one."""
    M, V = state["exp_avg"].double(), state["exp_avg_sq"].double()
    c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    m, v = M / c1, V / c2
    moved = C @ m
    return c1 * moved, c2 * (C.square() @ (v - m * m) + moved * moved).abs()


@pytest.mark.parametrize("make", [GaLore, Fira])
def test_moments_are_carried_by_the_number_of_updates_they_have_seen(make):
    betas, gap = (0.8, 0.9), 3
    p = weight(SHAPE)
    optimizer = make([p], rank=4, update_proj_gap=gap, moments="ldadam", betas=betas)
    for t, G in enumerate(gradients(SHAPE, 2 * gap), 1):
        old = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        run(optimizer, [p], [[G]])
        new = optimizer.state[p]
        (basis,) = [k for k, v in new.items() if getattr(v, "shape", ()) in ((12, 4), (4, 12))]
        if t > 1 and not torch.equal(old[basis], new[basis]):
            break
    assert t > 1 and not torch.equal(old[basis], new[basis])
    P_old, P_new = (x if len(x) == 12 else x.mT for x in (old[basis].double(), new[basis].double()))
    M, V = left_moments(old, t - 1, P_new.mT @ P_old, betas)
    R = P_new.mT @ G.double()
    want = betas[0] * M + (1 - betas[0]) * R, betas[1] * V + (1 - betas[1]) * R * R
    for name, x in zip(("exp_avg", "exp_avg_sq"), want, strict=True):
        torch.testing.assert_close(new[name].double(), x, rtol=1e-4, atol=1e-6)


def test_adamuon_takes_momentum_as_the_decay_of_its_second_moment():
    found = []
    for settings in ({}, {"beta2": 0.7}, {"beta2": 0.95}):
        p = weight(SHAPE)
        optimizer = Muon([p], lr=0.1, momentum=0.7, second_moment="adamuon", **settings)
        for G in gradients(SHAPE, 3):
            run(optimizer, [p], [[G]])
        found.append(p.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("name", METHODS)
def test_every_state_that_moves_in_float32_moves_in_bfloat16(name, shape):
    """State is stored back: what an update has made of it is there in the next one."""
    found = []
    for dtype in ("float32", "bfloat16"):
        p = weight(shape)
        optimizer = METHODS[name]([p], state_dtype=dtype)
        history = []
        for G in gradients(shape, 4):
            run(optimizer, [p], [[G]])
            history.append(
                {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
            )
        found.append(history)
    for before, after, wide_before, wide in zip(
        found[1], found[1][1:], found[0], found[0][1:], strict=False
    ):
        for key, x in after.items():
            moves = not torch.equal(wide[key], wide_before[key])
            assert not moves or not torch.equal(x, before[key]), key


@pytest.mark.covering
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("alpha", [-2.0, -1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("eps", [None, 1e-8])
@pytest.mark.parametrize("polar", ["auto", "inverse_root"])
@pytest.mark.parametrize("make", [Spectral, Hybrid])
def test_any_power_of_the_nuclear_norm_leaves_weights_finite(make, polar, eps, alpha, size):
    p = weight(SHAPE)
    before = p.detach().clone()
    optimizer = make([p], polar=polar, eps=eps, alpha=alpha, adjust_lr_fn="none", lr=1e-6)
    for G in gradients(SHAPE, 2):
        run(optimizer, [p], [[size * G]])
    assert p.isfinite().all()
    assert size != 0.0 or torch.equal(p.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_qdwh_bounds_a_stack_by_its_worst_matrix(dtype):
    good, _, _ = decaying(6, 9, 0.9)
    bad, *_ = decaying(6, 9, 0.2)
    stack = torch.stack([x / x.norm() for x in (good, bad, good)]).to(dtype)
    O = qdwh(stack)
    eye = torch.eye(6, dtype=dtype).expand(3, 6, 6)
    torch.testing.assert_close(O @ O.mT, eye, rtol=0, atol=2e-3)


@pytest.mark.parametrize("cls", [Spectral, Hybrid, RowNorm, AuON, Muon, Trion])
@pytest.mark.parametrize("eps", [1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("size", [1e-30, 1e-35, 1e-38, 1e-42])
def test_a_given_eps_keeps_steps_of_tiny_gradients_finite(cls, eps, size):
    for shape in ((8, 4), (4, 8), (5, 5), (1, 6)):
        p = weight(shape)
        options = {"rank": 2} if cls is Trion else {}
        optimizer, before = cls([p], lr=1e-3, eps=eps, **options), p.detach().clone()
        for seed in range(3):
            p.grad = gradients(shape, 1, seed)[0] * size
            optimizer.step()
        assert (p.detach() - before).abs().max() < 1.0


def negative_view(G):
    """G as the imaginary part of a conjugate, which some of torch's kernels refuse."""
    view = torch.imag(torch.complex(torch.zeros_like(G), -G).conj())
    assert view.is_neg()
    return view


def switchlora(params):
    W0 = weight((9, 7), 5).requires_grad_(False)
    groups = pairs_to_groups([(*params, W0)], scale=2.0)
    return SwitchLoRA(groups, lr=0.02, total_steps=9, freeze_steps=0)


@pytest.mark.parametrize("name", [*METHODS, "adamw", "adamw fused", "switchlora"])
def test_a_negative_view_is_a_gradient_like_any_other(name):
    shapes = {"switchlora": [(3, 7), (9, 3)]}.get(name, [SHAPE] if name in METHODS else [(7,)] * 3)
    found = []
    for form in (torch.clone, negative_view):
        params = [weight(shape, k) for k, shape in enumerate(shapes)]
        if name in METHODS:
            optimizer = METHODS[name](params)
        elif name == "switchlora":
            optimizer = switchlora(params)
        else:
            optimizer = Muon([{"params": params, "rule": "adamw", "fused": "fused" in name}])
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = form(gradients(p.shape, 1, 10 * step + k)[0])
            optimizer.step()
        found.append([p.detach() for p in params])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_adam_takes_a_negative_view():
    """By itself: rules whose clocks differ by row hand it gradients as they are."""
    G = gradients((1, *SHAPE), 1, 0)[0]
    found = []
    for X in (G, negative_view(G)):
        M, V = torch.zeros(2, *G.shape)
        found.append(adam(X, M, V, 1, beta1=0.9, beta2=0.999, eps=1e-8))
    assert torch.equal(*found)
