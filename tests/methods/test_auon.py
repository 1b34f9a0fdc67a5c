"""AuON and its hybrid: invariances and bounds, recorded trajectories, the sums they rest on."""

import json
import math

import pytest
import torch
from helpers.allocations import count_step
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.problems import doubles, gradients, run, trajectory, weight
from helpers.shapes import COLUMN, ODD, ROW, SHAPES, SQUARE, TALL, WIDE
from oracles.auon import QUINTIC, auon, crms, direction

from stiefel.optimizers import AuON
from stiefel.optimizers._toolkit import power_sums
from stiefel.optimizers._toolkit.power_sums import (
    DenseNorms,
    SeriesNorms,
    row_panels,
    series_length,
)

DOUBLE = torch.float64
KINDS = [
    {},
    {"adjust_lr_fn": "aspect"},
    {"adjust_lr_fn": "none", "gamma": 2.0},
    {"nesterov": False},
    {"variant": "repo2026"},
    {"ns_steps": 1},
    {"ns_steps": 1, "nesterov": False, "adjust_lr_fn": "aspect"},
    {"ns_steps": 3, "variant": "repo2026"},
    {"ns_steps": 1, "init_norm": "spectral-bound"},
    {"ns_steps": 2, "init_norm": "spectral-bound", "adjust_lr_fn": "none"},
    {"eps": 1e-2},
    {"ns_steps": 1, "eps": 1e-2},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def oracle_of(kind):
    """The same settings under the oracle's names."""
    names = {"adjust_lr_fn": "adjust", "init_norm": "init"}
    return {names.get(key, key): value for key, value in kind.items()}


def recorded(name):
    """Cases of a file that are matrices here, with their inputs in float64.

    A vector is a row: without Newton-Schulz it is the same problem. A three-dimensional tensor is
    one tensor there, so here its rows are one matrix.
    """
    data = json.loads((FIXTURES / f"auon_{name}_reference.json").read_text())
    found = []
    for case in data["cases"]:
        given = data["inputs"][case["input"]]
        W, G = (torch.tensor(given[key], dtype=DOUBLE) for key in ("W0", "G"))
        if W.ndim != 2 and name == "hybrid_repo2026":
            continue
        found.append((case, W, list(G)))
    return found


def flat(X):
    return X.reshape(-1, X.shape[-1])


# the recorded trajectories


@pytest.mark.parametrize("case", range(14))
def test_recorded_repo2026(case):
    """The published class of January 2026 in float64, zero gradients and a burst among them."""
    case, W, grads = recorded("repo2026")[case]
    p = torch.nn.Parameter(flat(W).clone())
    settings = case["settings"]
    optimizer = AuON([p], variant="repo2026", **settings)
    out = run(optimizer, [p], [[flat(G) for G in grads]])
    expected = torch.tensor(case["W"], dtype=DOUBLE)
    assert len(out) == len(expected)
    for (V,), R in zip(out, expected, strict=True):
        torch.testing.assert_close(V, flat(R), rtol=0, atol=1e-12)
    M = torch.tensor(case["final_momentum"], dtype=DOUBLE)
    B = optimizer.state[p]["momentum_buffer"]
    torch.testing.assert_close(B, flat(M), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", range(len(recorded("hybrid_repo2026"))))
def test_recorded_hybrid_repo2026(case):
    """The published hybrid in float64, one and five Newton-Schulz steps."""
    case, W, grads = recorded("hybrid_repo2026")[case]
    p = torch.nn.Parameter(W.clone())
    out = run(AuON([p], variant="repo2026", **case["settings"]), [p], [grads])
    for (V,), R in zip(out, torch.tensor(case["W"], dtype=DOUBLE), strict=True):
        torch.testing.assert_close(V, R, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", range(12))
def test_recorded_script2025(case):
    """The class of October 2025: our default variant with the published aspect factor and eps."""
    case, W, grads = recorded("script2025")[case]
    settings = dict(case["settings"])
    lr, adjust = settings.pop("lr"), "aspect"
    if W.ndim == 3:
        lr, adjust = lr * math.sqrt(max(1, W.shape[-2] / W.shape[-1])), "none"
    p = torch.nn.Parameter(flat(W).clone())
    optimizer = AuON([p], lr=lr, adjust_lr_fn=adjust, gamma=1.0, eps=1e-7, **settings)
    out = run(optimizer, [p], [[flat(G) for G in grads]])
    promoted, shipped = (
        torch.tensor(case[f"W_{k}"], dtype=DOUBLE) for k in ("promoted", "shipped")
    )
    for (V,), R, S in zip(out, promoted, shipped, strict=True):
        torch.testing.assert_close(V, flat(R), rtol=0, atol=1e-12)
        torch.testing.assert_close(V, flat(S), rtol=0, atol=2e-2 * lr)


# invariances and bounds


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(shape, kind):
    p, grads = weight(shape, dtype=DOUBLE), doubles(shape, 6)
    theirs = auon(p.detach(), grads, 0.02, wd=0.1, **oracle_of(kind))
    out = run(AuON([p], lr=0.02, weight_decay=0.1, **kind), [p], [grads])
    for (W,), R in zip(out, theirs, strict=True):
        torch.testing.assert_close(W, R, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", [{}, {"ns_steps": 1}, {"ns_steps": 1, "adjust_lr_fn": "none"}])
def test_scale_invariance_of_the_paper(kind):
    """step(c G) = step(G) from a fresh state."""
    G = doubles(WIDE, 1)[0]
    G, steps = 1e3 * G / G.norm(), []
    for c in (1.0, 1e4, 1e-2, 1e-30):
        p = torch.nn.Parameter(torch.zeros(WIDE, dtype=DOUBLE))
        run(AuON([p], lr=1.0, **kind), [p], [[c * G]])
        steps.append(p.detach())
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=0, atol=1e-12 * float(step.norm()))


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-32])
@pytest.mark.parametrize("shape", [TALL, (400, 400)])
@pytest.mark.parametrize("kind", [{}, {"nesterov": False}, {"ns_steps": 1}])
def test_a_vanishing_gradient_takes_a_whole_step(kind, shape, size):
    """In float32, where its squares are zero."""
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = size * gradients(shape, 1)[0]
    AuON([p], lr=1.0, **kind).step()
    assert math.isclose(float(p.detach().double().square().mean().sqrt()), 0.2, rel_tol=1e-2)


@pytest.mark.parametrize("shape", [TALL, (400, 400)])
@pytest.mark.parametrize("kind", [{}, {"nesterov": False}, {"ns_steps": 1}])
def test_denormal_gradients_are_finite(kind, shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = 1e-41 * gradients(shape, 1)[0]
    AuON([p], lr=1.0, **kind).step()
    assert p.isfinite().all() and float(p.detach().double().square().mean().sqrt()) <= 0.2001


def test_eps_is_added_to_the_norm():
    """None is the smallest normal number, and the published 1e-7 for the published code."""
    tiny, G = torch.finfo(torch.float32).tiny, gradients(TALL, 1)[0]
    for kind, same_eps, other_eps in (
        ({}, tiny, 1e-2),
        ({"ns_steps": 1}, tiny, 1e-2),
        ({"variant": "repo2026"}, 1e-7, 1e-2),
        ({"variant": "repo2026", "ns_steps": 1}, 1e-7, 1e-2),
    ):
        steps = []
        for options in ({}, {"eps": same_eps}, {"eps": other_eps}):
            p = torch.nn.Parameter(torch.zeros(TALL))
            run(AuON([p], lr=1.0, **kind, **options), [p], [[0.01 * G]])
            steps.append(p.detach())
        assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


def test_groups_of_a_file_without_eps_get_the_value_of_their_time():
    saved = AuON([weight(TALL)]).state_dict()
    assert saved["param_groups"][0]["eps"] is None
    optimizer = AuON([weight(TALL)])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["eps"] is None
    del saved["param_groups"][0]["eps"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["eps"] == 1e-7


def test_lr_is_the_only_positional_option():
    with pytest.raises(TypeError, match="positional"):
        AuON([weight(TALL)], 1e-3, 0.9)


def test_repo2026_is_proportional():
    G, steps = doubles(WIDE, 1)[0], []
    for c in (1.0, 1e3):
        p = torch.nn.Parameter(torch.zeros(WIDE, dtype=DOUBLE))
        run(AuON([p], lr=1.0, variant="repo2026"), [p], [[c * G]])
        steps.append(p.detach())
    torch.testing.assert_close(steps[1], 1e3 * steps[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_direction_is_that_of_the_momentum(shape, nesterov):
    """U is a positive multiple of V, so nothing is reconditioned."""
    p, M, mu = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE)), 0.0, 0.9
    optimizer = AuON([p], lr=1.0, momentum=mu, nesterov=nesterov)
    for G in doubles(shape, 5):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        M = mu * M + (1 - mu) * G
        V, U = ((1 - mu) * G + mu * M if nesterov else M), before - p.detach()
        assert abs(float((U * V).sum() / U.norm() / V.norm()) - 1) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_is_inside_the_unit_ball(shape):
    """||U||_F < 1, since r > 1."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
    run(AuON([p], lr=1.0, adjust_lr_fn="none"), [p], [[G] for G in [doubles(shape, 1)[0]]])
    N = p.numel()
    assert 1 / math.sqrt(1 + math.sinh(1) ** 2 / N) - 1e-6 <= float(p.detach().norm()) < 1


@pytest.mark.parametrize("shape", [(2, 2), ODD, TALL, (64, 64)])
def test_r_stays_inside_its_bounds(shape):
    """The flat matrix has cosh(1 / sqrt(N)), one spike sqrt(1 + sinh(1)^2 / N)."""
    N = shape[0] * shape[1]
    spike = torch.zeros(shape, dtype=DOUBLE)
    spike[-1, 0] = -1e9
    flat = torch.full(shape, 1e9, dtype=DOUBLE)
    low, high = math.cosh(1 / math.sqrt(N)), math.sqrt(1 + math.sinh(1) ** 2 / N)
    found = []
    for G in (flat, spike, 1e9 * doubles(shape, 1)[0]):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
        run(AuON([p], lr=1.0, adjust_lr_fn="none"), [p], [[G]])
        found.append(1 / float(p.detach().norm()) - 1e-8)  # ||U|| = 1 / (r + 1e-8)
    assert math.isclose(found[0], low, rel_tol=1e-12)
    assert math.isclose(found[1], high, rel_tol=1e-12)
    assert low < found[2] < high
    assert math.isclose(crms(spike / 1e9), high, rel_tol=1e-12)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD])
def test_the_hybrid_keeps_singular_vectors_and_maps_the_values(shape):
    a, b, c = QUINTIC
    G = doubles(shape, 1)[0]
    p = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
    run(AuON([p], lr=1.0, ns_steps=1, adjust_lr_fn="none"), [p], [[G]])
    V = G * (1 - 0.95**2)  # from rest: (1 - mu) + mu (1 - mu)
    L, s, Rh = torch.linalg.svd(V, full_matrices=False)
    x = s / V.norm()
    y = a * x + b * x**3 + c * x**5
    r = crms(L @ torch.diag(y) @ Rh)
    U = -p.detach()
    inside = L.T @ U @ Rh.T
    torch.testing.assert_close(inside, torch.diag(y / (r + 1e-8)), rtol=0, atol=1e-10)
    assert math.isclose(float(U.norm()), float(inside.norm()), rel_tol=1e-10)


@pytest.mark.parametrize(
    "kind", [{"adjust_lr_fn": "none", **kind} for kind in KINDS if "adjust_lr_fn" not in kind]
)
def test_a_transposed_gradient_gives_the_transposed_step(kind):
    for shape in (TALL, ODD, COLUMN):
        p = weight(shape, dtype=DOUBLE)
        q = torch.nn.Parameter(p.detach().mT.clone(memory_format=torch.contiguous_format))
        grads = doubles(shape, 5)
        one = run(AuON([p], lr=0.02, **kind), [p], [grads])
        two = run(AuON([q], lr=0.02, **kind), [q], [[G.mT.contiguous() for G in grads]])
        for (W,), (V,) in zip(one, two, strict=True):
            torch.testing.assert_close(W, V.mT, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("shape", [*SHAPES, (400, 400)])
def test_a_zero_gradient_only_decays(shape, dtype, kind):
    p = weight(shape, dtype=dtype)
    before = p.detach().clone()
    optimizer = AuON([p], lr=0.1, weight_decay=0.5, **kind)
    run(optimizer, [p], [[torch.zeros(shape, dtype=dtype)]])
    assert torch.equal(p.detach(), before * (1 - 0.1 * 0.5))
    assert not optimizer.state[p]["momentum_buffer"].any()


@kinds
def test_gradients_are_not_changed(kind):
    for shape in (TALL, (400, 400)):
        p = weight(shape)
        p.grad = gradients(shape, 1)[0]
        before = p.grad.clone()
        AuON([p], **kind).step()
        assert torch.equal(p.grad, before)


@kinds
def test_bfloat16_weights_sum_in_float32(kind):
    """The step of bfloat16 weights is that of the same numbers in float32, rounded once."""
    p, q = weight(TALL, dtype=torch.bfloat16), None
    q = torch.nn.Parameter(p.detach().float())
    G = gradients(TALL, 1, dtype=torch.bfloat16)[0]
    coarse, fine = (AuON([X], lr=0.02, write="nearest", **kind) for X in (p, q))
    p.grad, q.grad = G, G.float()
    coarse.step()
    fine.step()
    assert coarse.state[p]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(p.detach(), q.detach().bfloat16())


@kinds
def test_resume_is_bitwise(kind):
    def make():
        params = [weight(TALL), weight(WIDE, 1)]
        return params, AuON(params, lr=0.02, **kind)

    check_resume(make, [gradients(TALL, 8), gradients(WIDE, 8, 1)], 4)


# the size of the step


@pytest.mark.parametrize("shape", [*SHAPES, (400, 400)])
def test_match_rms_adamw(shape):
    """RMS 0.2 / r for AuON, 0.2 for the hybrid whatever Newton-Schulz made of the norm."""
    for steps in (0, 1, 5):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
        G = 1e4 * doubles(shape, 1)[0]
        run(AuON([p], lr=1.0, ns_steps=steps), [p], [[G]])
        rms = float(p.detach().square().mean().sqrt())
        r = 1.0 if steps else crms(G / G.norm())
        assert math.isclose(rms * r, 0.2, rel_tol=1e-7)


def test_spectral_bound_whitens_more():
    """One step from the norm hardly moves 64 equal singular values; from the bound it does."""
    draw = torch.Generator().manual_seed(3)
    G = torch.linalg.qr(torch.randn(64, 64, generator=draw, dtype=DOUBLE)).Q
    G = torch.diag(torch.linspace(0.2, 1.0, 64, dtype=DOUBLE)) @ G
    spread = {}
    for init in ("fro", "spectral-bound"):
        p = torch.nn.Parameter(torch.zeros(64, 64, dtype=DOUBLE))
        run(AuON([p], lr=1.0, ns_steps=1, init_norm=init), [p], [[G]])
        s = torch.linalg.svdvals(p.detach())
        spread[init] = float(s.max() / s.min())
    assert spread["fro"] > 4.0 and spread["spectral-bound"] < 2.0


# panels and the series


BIG, HUGE = (300, 500), (700, 1500)


def matrices():
    """Flat, with one spike, with a few, Gaussian: what lies between the bounds of r."""
    draw = torch.Generator().manual_seed(2)
    yield "flat", torch.ones(BIG, dtype=DOUBLE)
    X = torch.zeros(BIG, dtype=DOUBLE)
    X[17, 3] = 1.0
    yield "spike", X.clone()
    X[200, 400], X[299, 0] = -0.5, 2.0
    yield "three", X + 1e-3
    yield "gauss", torch.randn(BIG, generator=draw, dtype=DOUBLE)
    yield "heavy", torch.randn(BIG, generator=draw, dtype=DOUBLE) ** 7


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("gamma", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("name", [name for name, _ in matrices()])
def test_r_in_panels_is_exact_to_float32(name, gamma, dtype):
    """Against sinh of every entry in float64; the bound holds at twice the least size too."""
    X = dict(matrices())[name]
    for size in (1.0, 1e-15, 1e15):
        Y = (X * size).to(dtype)
        V = power_sums.norms_of(Y[None], series_length(Y.numel(), gamma))
        assert isinstance(V, SeriesNorms)
        norm = V.norm()
        assert math.isclose(float(norm), float(Y.double().norm()), rel_tol=1e-6)
        r = (1 + V.sinh_squares(gamma / norm) / Y.numel()).sqrt()
        exact = (gamma * Y.double() / Y.double().norm()).sinh().square().mean()
        assert abs(float(r) - math.sqrt(1 + float(exact))) < 1e-7


@pytest.mark.parametrize("spikes", [0, 1, 3])
def test_r_of_a_large_layer_is_exact_to_float32(spikes):
    """1024 x 4096, where the norm alone is summed: r - 1 is below what float32 tells from 1."""
    X = torch.full((1024, 4096), 1e-6)
    for k in range(spikes):
        X[100 * k, 3] = 1.0
    assert series_length(X.numel(), 1.0) == 1
    V = power_sums.norms_of(X[None], 1)
    r = float((1 + V.sinh_squares(1 / V.norm()) / X.numel()).sqrt())
    exact = math.sqrt(1 + float((X.double() / X.double().norm()).sinh().square().mean()))
    assert abs(r - exact) < 1e-7 and r - 1 < 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_sums_at_hand_and_in_panels_agree(dtype):
    for _, X in matrices():
        X = X.to(dtype)[None]
        whole, series = DenseNorms(X), SeriesNorms([[X[0][i] for i in row_panels(*BIG)]], 8)
        assert math.isclose(float(whole.norm()), float(series.norm()), rel_tol=1e-6)
        c = 1 / whole.norm()
        one, two = float(whole.sinh_squares(c)), float(series.sinh_squares(c))
        assert math.isclose(one, two, rel_tol=1e-5)


def test_terms_follow_the_bound():
    """Fewer where there are more entries; the rest is below the promise, and above it without."""
    assert [series_length(N, 1.0) for N in (2**17, 2**20, 2**22)] == [3, 2, 1]
    for N, bound in ((2**17, 1.0), (2**17, 1.5), (2**22, 3.0)):
        count = series_length(N, bound)
        rests = [
            (math.sinh(bound) ** 2 - sum(f * bound ** (2 * j + 2) for j, f in enumerate(terms))) / N
            for terms in (
                power_sums.SINH_SQUARED_SERIES[:count],
                power_sums.SINH_SQUARED_SERIES[: count - 1],
            )
        ]
        assert rests[0] / 2 <= power_sums.SERIES_TOLERANCE < rests[1] / 2


@kinds
@pytest.mark.parametrize("shape", [BIG, (500, 300), (9, 15_000)])
def test_large_matrices_equal_the_oracle(shape, kind):
    """Weights that are walked through in panels; r is as good as 1e-7."""
    p, grads = weight(shape, dtype=DOUBLE), doubles(shape, 3)
    W, M, mu, nesterov = p.detach().clone(), 0.0, 0.95, kind.get("nesterov", True)
    settings = {key: value for key, value in oracle_of(kind).items() if key != "nesterov"}
    out = run(AuON([p], lr=0.02, weight_decay=0.1, **kind), [p], [grads])
    for (V,), G in zip(out, grads, strict=True):
        M = mu * M + (1 - mu) * G
        U = direction((1 - mu) * G + mu * M if nesterov else M, **settings)
        before = W
        W = W * (1 - 0.02 * 0.1) - 0.02 * U
        bound = 3e-7 * float((W - before).abs().max())
        assert float((V - W).abs().max()) <= bound


@kinds
@pytest.mark.parametrize("size", [3e36, 1e-20])
@pytest.mark.parametrize("shape", [(8, 8), BIG])
def test_huge_and_tiny_gradients(shape, size, kind):
    """Squares that overflow in float32 do not: the step of 3e36 G is that of G."""
    if kind.get("variant") == "repo2026" and not kind.get("ns_steps"):
        kind = {**kind, "variant": "paper"}  # the other one is proportional to G
    G = doubles(shape, 1)[0]
    G = G / G.abs().max()
    p, q = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    run(AuON([p], lr=1.0, **kind), [p], [[(size * G).float()]])
    run(AuON([q], lr=1.0, **kind), [q], [[(1e3 * G).float()]])
    assert bool(p.detach().isfinite().all())
    if size > 1 and "eps" not in kind:
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6 * float(q.detach().abs().max()))


@kinds
def test_an_expert_stack_has_the_bits_of_its_matrices(kind):
    for sides in ((12, 10), BIG):
        grads = [torch.stack([gradients(sides, 3, k)[t] for k in range(3)]) for t in range(3)]
        stack = torch.nn.Parameter(torch.stack([weight(sides, k).detach() for k in range(3)]))
        single = [torch.nn.Parameter(W.clone()) for W in stack.detach()]
        run(AuON([{"params": [stack], "view": "batch"}], lr=0.02, **kind), [stack], [grads])
        run(AuON(single, lr=0.02, **kind), single, [[G[k] for G in grads] for k in range(3)])
        assert torch.equal(stack.detach(), torch.stack([p.detach() for p in single]))


def test_a_transposed_weight_is_walked_through_along_its_memory():
    p = weight(BIG)
    q = torch.nn.Parameter(p.detach().mT.contiguous().mT)
    grads = gradients(BIG, 3)
    one = run(AuON([p], lr=0.02), [p], [grads])
    two = run(AuON([q], lr=0.02), [q], [[G.mT.contiguous().mT for G in grads]])
    for (W,), (V,) in zip(one, two, strict=True):
        torch.testing.assert_close(W, V, rtol=0, atol=2e-6)


@kinds
def test_narrow_state_is_worked_on_in_float32(kind):
    for shape in (WIDE, BIG):
        p = weight(shape)
        optimizer = AuON([p], lr=0.02, state_dtype="bfloat16", **kind)
        out = run(optimizer, [p], [gradients(shape, 4)])
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16
        fine = trajectory(lambda q: AuON(q, lr=0.02, **kind), shape, 4)
        assert float((out[-1][0] - fine[-1]).abs().max()) < 0.05


@pytest.mark.parametrize("shape", [HUGE, (1500, 700)])
def test_temporaries(shape):
    """Panels for AuON, five matrices for the hybrid."""
    grads = gradients(shape, 1)
    for kind in KINDS:
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = AuON([p], **kind)
        p.grad = grads[0]
        optimizer.step()
        counter = count_step(optimizer)
        panels = 4 * power_sums.POWER_SUM_PANEL * 4.2
        matrix = 4 * shape[0] * shape[1]
        assert counter.peak <= (5 * matrix if kind.get("ns_steps") else panels), kind


def test_state_is_the_buffer_alone():
    p = weight(ROW)
    optimizer = AuON([p])
    run(optimizer, [p], [gradients(ROW, 2)])
    assert set(optimizer.state[p]) == {"momentum_buffer", "step"}


@pytest.mark.parametrize(
    "wrong",
    [{"momentum": 1.0}, {"gamma": 0.0}, {"gamma": 9.0}, {"ns_steps": -1}, {"ns_steps": 1.5},
     {"variant": "repo"}, {"adjust_lr_fn": "original"}, {"init_norm": "two", "ns_steps": 1},
     {"init_norm": "spectral-bound"}, {"eps": -1.0}],
)  # fmt: skip
def test_what_is_refused(wrong):
    with pytest.raises(ValueError, match="epsilon" if "eps" in wrong else next(iter(wrong))):
        AuON([weight(WIDE)], **wrong)


def test_small_matrices_need_four_of_their_stack():
    params = [weight((64, 64), i) for i in range(16)]
    optimizer = AuON(params)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = gradients((64, 64), 1, 16 * step + i)[0]
        counter = count_step(optimizer)
    assert counter.peak <= 4.1 * 16 * 64 * 64 * 4


@pytest.mark.parametrize("shape", [(8, 6), (5, 7), (3, 11), (16, 8), (1, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_a_stack_have_the_bits_of_single_matrices(shape, dtype):
    """A CPU computes sinh of what fills no vector in another way than of the rest."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        X = torch.randn(5, *shape, generator=draw, dtype=dtype)
        c = torch.rand(5, 1, 1, generator=draw, dtype=torch.float64)
        stack = DenseNorms(X).sinh_squares(c)
        each = [DenseNorms(X[k : k + 1]).sinh_squares(c[k : k + 1]) for k in range(5)]
        assert torch.equal(stack, torch.cat(each))
