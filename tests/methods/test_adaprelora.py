"""AdaPreLoRA: its least squares problem, an oracle, changes of basis, hooks on base weights."""

import copy

import pytest
import torch
from helpers.allocations import AllocationCounter
from helpers.checkpoints import through_a_file
from helpers.pair_problems import (
    DOUBLE,
    SHAPES,
    LeastSquares,
    factors,
    follow,
    invertible,
    pair_gradients,
)
from helpers.problems import run, same, tensors, weight
from oracles.adaprelora import Metric, adaprelora, dense_visible, inv, solution, visible

from stiefel.optimizers import AdaPreLoRA, memory_report, pairs_to_groups
from stiefel.optimizers._lora.tangent_stats import tangent_cores, tangent_grams, tangent_squares

BRUTE = [(7, 6, 2, 1.7), (12, 9, 3, 0.5), (5, 20, 4, 2.0)]
"""(m, n, r, s) of the dense check."""
FREE = {"eps_rel": 0.0, "eps": 0.0}


def made(A, B, s=2.0, **settings):
    return AdaPreLoRA(pairs_to_groups([(A, B)], scale=s), **settings)


def draws(m, n, r, seed=0):
    """A, B, G and positive p, q."""
    draw = torch.Generator().manual_seed(seed)
    A, B, G = (torch.randn(size, generator=draw, dtype=DOUBLE) for size in ((r, n), (m, r), (m, n)))
    p, q = (torch.randn(k, generator=draw, dtype=DOUBLE).exp() for k in (m, n))
    return A, B, G, p, q


def close(x, y, bound):
    torch.testing.assert_close(x, y, rtol=0, atol=bound * max(1.0, float(y.abs().max())))


def planted(A, B, s, G, p=None, q=None, missing=None, **settings):
    """(dA, dB) of one step of ours whose metric is p, q: energies are put so, and kept.

    With beta2 = 0 the energies would be this step's; with nearly 1 they are what was put there.
    """
    pair = [torch.nn.Parameter(x.clone()) for x in (A, B)]
    stats = "none" if p is None else "exact"
    options = {"variant": "sgd", "lr": 1.0, "betas": (0.0, 0.0), "floor": 1e-9, **FREE, **settings}
    optimizer = made(*pair, s, stats=stats, **options)
    W0 = torch.nn.Parameter(torch.zeros_like(G), requires_grad=False)
    if p is not None:
        optimizer.watch(pairs_to_groups([(*pair, W0)], scale=s))
        # V = L R / mean(L): mean squares that make these p and q, once L has its mean
        (W0 * 0).sum().backward()
        rows, columns = p.square() * G.shape[1], q.square() * G.shape[0]
        optimizer.state[pair[1]]["seen"].copy_(rows[:, None])
        optimizer.state[pair[0]]["seen"].copy_(columns[None])
    for i, g in enumerate((s * B.mT @ G, s * G @ A.mT)):
        pair[i].grad = None if i == missing else g.clone()
    optimizer.step()
    return [old - new.detach() for old, new in zip((A, B), pair, strict=True)]


def visible_squares(*given):
    """Of a, b, Ga, Gb: sums over columns and rows, times s^2, and the visible share."""
    X, G = given[:2], given[2:]
    sides = [torch.full((len(x), 1, 1), x.shape[-2], dtype=x.dtype) for x in X]
    *cores, share = tangent_cores(*tangent_grams(X, G), *sides)
    return *map(tangent_squares, G, cores[::2], X, cores[1::2]), share


def normalized(p):
    """What p is once its squares have mean 1, as the class keeps it."""
    return p / p.square().mean().sqrt()


def weighted(Y, p, q):
    return float((p[:, None] * q * Y.square()).sum())


# the oracle


@pytest.mark.parametrize("variant", ["momentum", "sgd", "adamw"])
@pytest.mark.parametrize("stats", ["tangent", "none"])
@pytest.mark.parametrize("zero", [False, True], ids=["random", "zero"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"max_rel_step": 0.05}, {"rescale_visible": False, "scale_aware": False},
     {"eps_rel": 1e-3, "eps": 1e-2, "floor": 0.5}],
    ids=["plain", "capped", "raw", "damped"],
)  # fmt: skip
def test_oracle(variant, stats, zero, extra):
    """Gradients of no common G, halves that are missing."""
    for m, n, r in SHAPES:
        if zero and (r == min(m, n) or variant == "adamw"):
            continue  # B becomes singular, as entries of Adam's first step are all lr
        A, B = factors(m, n, r, dtype=DOUBLE, zero=zero)
        GA, GB = pair_gradients(m, n, r, 7, dtype=DOUBLE)
        if zero:
            GA[0].zero_()  # as the chain rule has it
        grads = [list(pair) for pair in zip(GA, GB, strict=True)]
        grads[2][0], grads[3][1], grads[5][0] = None, None, None
        settings = {"lr": 0.02, "weight_decay": 0.1, "variant": variant, "stats": stats, **extra}
        want = adaprelora(A.detach(), B.detach(), grads, s=2.0, **settings)
        out = run(made(A, B, **settings), [A, B], [[g[i] for g in grads] for i in (0, 1)])
        for (a, b), (c, d) in zip(out, want, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(b, d, rtol=1e-7, atol=1e-9)


# the least squares problem and its member


@pytest.mark.parametrize(("m", "n", "r", "s"), BRUTE)
def test_steps_equal_the_dense_solution(m, n, r, s):
    """Least squares by lstsq, its null space by an SVD, the least imbalance by a second lstsq."""
    A, B, G, p, q = draws(m, n, r)
    p = normalized(p)
    T = G / (p[:, None] * q)
    eye_m, eye_n = torch.eye(m, dtype=DOUBLE), torch.eye(n, dtype=DOUBLE)
    root = torch.kron(p, q).sqrt()[:, None]
    left, right = torch.kron(eye_m, A.mT.contiguous()), torch.kron(B, eye_n)  # of dB, of dA
    J, N = s * torch.cat([left, right], 1), s * torch.cat([left, -right], 1)
    x0 = torch.linalg.lstsq(root * J, root * T.reshape(-1, 1), driver="gelsd").solution
    _, sizes, Vh = torch.linalg.svd(root * J)
    rank = int((sizes > 1e-10 * sizes[0]).sum())
    null = Vh[rank:].mT
    assert null.shape[1] == r * r
    z = torch.linalg.lstsq(root * N @ null, -root * N @ x0, driver="gelsd").solution
    x = (x0 + null @ z).flatten()
    dA, dB = planted(A, B, s, G, p, q)
    close(dB, x[: m * r].view(m, r), 1e-10)
    close(dA, x[m * r :].view(r, n), 1e-10)
    close(s * (dB @ A + B @ dA), (J @ x0).view(m, n), 1e-10)
    a, b = solution(A, B, s * B.mT @ G, s * G @ A.mT, p, q, s)  # the oracle is right too
    close(dA, a, 1e-10)
    close(dB, b, 1e-10)
    far = float((x - x0.flatten()).norm())
    assert far > 0.1 and float((root * N @ x0).norm()) > float((root.flatten() * (N @ x)).norm())


@pytest.mark.parametrize(("m", "n", "r", "s"), BRUTE)
def test_without_a_metric_steps_are_projections(m, n, r, s):
    A, B, G, *_ = draws(m, n, r)
    dA, dB = planted(A, B, s, G)
    PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    close(s * (dB @ A + B @ dA), PB @ G + G @ PA - PB @ G @ PA, 1e-10)


@pytest.mark.parametrize(("m", "n", "r", "s"), BRUTE)
def test_stationary_along_the_null_space(m, n, r, s):
    A, B, G, p, q = draws(m, n, r)
    p = normalized(p)
    dA, dB = planted(A, B, s, G, p, q)
    T = G / (p[:, None] * q)
    draw = torch.Generator().manual_seed(5)
    for _ in range(3):
        X = torch.randn(r, r, generator=draw, dtype=DOUBLE)

        def at(t, X=X):
            b, a = dB + t * B @ X, dA - t * X @ A
            imbalance = weighted(b @ A - B @ a, p, q)
            return imbalance, weighted(s * (b @ A + B @ a) - T, p, q)

        (zero, left), (up, there), (down, back) = at(0.0), at(0.1), at(-0.1)
        assert up > zero and down > zero and abs(up - down) <= 1e-8 * up
        assert max(abs(there - left), abs(back - left)) <= 1e-10 * left


@pytest.mark.parametrize(("m", "n", "r", "s"), BRUTE)
def test_the_energy_of_a_gradient_splits_in_two(m, n, r, s):
    A, B, G, p, q = draws(m, n, r)
    p = normalized(p)
    dA, dB = planted(A, B, s, G, p, q)
    T, P, Q = G / (p[:, None] * q), torch.diag(p), torch.diag(q)
    PiB = B @ torch.linalg.inv(B.mT @ P @ B) @ B.mT @ P
    Rho = Q @ A.mT @ torch.linalg.inv(A @ Q @ A.mT) @ A
    first, second = weighted(s * dB @ A, p, q), weighted(s * B @ dA, p, q)
    want = weighted(T @ Rho, p, q) - weighted(PiB @ T, p, q)
    assert abs(first - second - want) <= 1e-9 * (first + second) and abs(want) > 1e-3
    draw = torch.Generator().manual_seed(5)
    for _ in range(3):
        X = 0.1 * torch.randn(r, r, generator=draw, dtype=DOUBLE)
        other = weighted(s * (dB + B @ X) @ A, p, q) + weighted(s * B @ (dA - X @ A), p, q)
        assert other > first + second


@pytest.mark.parametrize(("m", "n", "r", "s"), BRUTE)
def test_both_forms_agree(m, n, r, s):
    A, B, G, p, q = draws(m, n, r)
    p = normalized(p)
    dA, dB = planted(A, B, s, G, p, q)
    P, Q, GA, GB = torch.diag(p), torch.diag(q), s * B.mT @ G, s * G @ A.mT
    KP, KQ = torch.linalg.inv(B.mT @ P @ B), torch.linalg.inv(A @ Q @ A.mT)
    eye = torch.eye
    half_a = eye(n, dtype=DOUBLE) - 0.5 * Q @ A.mT @ KQ @ A
    half_b = eye(m, dtype=DOUBLE) - 0.5 * B @ KP @ B.mT @ P
    close(dA, KP @ GA @ torch.linalg.inv(Q) @ half_a / s**2, 1e-10)
    close(dB, half_b @ torch.linalg.inv(P) @ GB @ KQ / s**2, 1e-10)
    close(KP @ (GA @ A.mT) @ KQ, KP @ (B.mT @ GB) @ KQ, 1e-9)


# what the factors show of G


@pytest.mark.parametrize(("m", "n", "r", "s"), [*BRUTE, (9, 11, 3, 1.3), (3, 8, 3, 1.0)])
@pytest.mark.parametrize("case", ["both", "no A", "no B", "B = 0", "A = 0"])
def test_row_and_column_sums_of_the_tangent_gradient(m, n, r, s, case):
    A, B, G, *_ = draws(m, n, r)
    A, B = (
        (torch.zeros_like(A) if case == "A = 0" else A),
        torch.zeros_like(B) if case == "B = 0" else B,
    )
    GA, GB = s * B.mT @ G, s * G @ A.mT
    GA, GB = None if case == "no A" else GA, None if case == "no B" else GB
    PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    want = {"no A": G @ PA, "no B": PB @ G}.get(case, PB @ G + G @ PA - PB @ G @ PA)
    stacked = [None if x is None else x[None] for x in (A.mT, B, None if GA is None else GA.mT, GB)]
    c2, r2, share = visible_squares(*stacked)
    close(r2.flatten() / s**2, want.square().sum(1), 1e-9)
    close(c2.flatten() / s**2, want.square().sum(0), 1e-9)
    assert abs(float(r2.sum() - c2.sum())) <= 1e-9 * float(r2.sum())
    assert float(r2.sum()) / s**2 <= float(G.square().sum()) + 1e-9
    if case in ("no A", "B = 0"):  # rows of G P_A; P_B mixes rows, so that one may grow
        assert bool((r2.flatten() / s**2 <= G.square().sum(1) + 1e-9).all())
    if case in ("no B", "A = 0"):
        assert bool((c2.flatten() / s**2 <= G.square().sum(0) + 1e-9).all())
    for dense in dense_visible(A, B, GA, GB, s):
        close(dense, want, 1e-9)
    oracle = visible(A, B, GA, GB, s)
    close(r2.flatten() / s**2 / float(share), oracle[0], 1e-9)
    close(c2.flatten() / s**2 / float(share), oracle[1], 1e-9)


def test_share_of_a_gradient_without_direction():
    m, n, r = 9, 11, 3
    draw, shares = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        A, B, G = (torch.randn(x, generator=draw, dtype=DOUBLE) for x in ((r, n), (m, r), (m, n)))
        c2, _, share = visible_squares(A.mT[None], B[None], (B.mT @ G).mT[None], (G @ A.mT)[None])
        shares.append(float(c2.sum() / G.square().sum()))
    want = r / m + r / n - r * r / (m * n)
    assert abs(float(share) - want) < 1e-12 and abs(sum(shares) / 2000 - want) < 0.01


def test_squares_that_rounding_makes_negative_are_zero():
    g, x, one = torch.zeros(1, 5, 2), torch.ones(1, 5, 2), torch.eye(2)[None]
    for given in (g, None):
        assert torch.equal(tangent_squares(given, one, x, -1e-7 * one), torch.zeros(1, 5, 1))


def test_a_rank_above_a_side_shows_everything_at_most():
    """Gram matrices are singular then; W moves nonetheless, by what G allows."""
    A, B, G, *_ = draws(3, 8, 5)
    share = visible_squares(A.mT[None], B[None], (B.mT @ G).mT[None], (G @ A.mT)[None])[2]
    assert float(share) == 1.0
    pair = [torch.nn.Parameter(x) for x in (A, B)]
    with pytest.warns(UserWarning, match="Gram matrices are singular"):
        optimizer = made(*pair, lr=1e-3)
    pair[0].grad, pair[1].grad = 2 * B.mT @ G, 2 * G @ A.mT
    before = 2 * (B @ A).clone()
    optimizer.step()
    moved = before - 2 * (pair[1] @ pair[0]).detach()
    assert 0 < float(moved.norm()) < 1e-3 * 2 * (3 * 8) ** 0.5 and float((moved * G).sum()) > 0


# how W is split into factors


class Layer:
    """A frozen weight under a pair; its backward pass has a given gradient of W."""

    def __init__(self, A, B, s=2.0, W0=None, **settings):
        self.s, (self.A, self.B) = s, [torch.nn.Parameter(x.detach().clone()) for x in (A, B)]
        self.W0 = torch.nn.Parameter(
            torch.zeros(B.shape[0], A.shape[1], dtype=A.dtype) if W0 is None else W0.clone(),
            requires_grad=False,
        )
        self.optimizer = made(self.A, self.B, s, stats="exact", **settings)
        self.optimizer.watch(self.groups())

    def groups(self):
        return pairs_to_groups([(self.A, self.B, self.W0)], scale=self.s)

    def backward(self, G):
        ((self.W0 + self.s * self.B @ self.A) * G).sum().backward()

    def step(self, *Gs):
        for G in Gs:
            self.backward(G)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def W(self):
        return (self.W0 + self.s * self.B @ self.A).detach()


def gap(stats, variant, steps=10, **settings):
    """Largest distance of W between runs from (A, B) and (N A, B N^-1)."""
    problem, N = LeastSquares(12, 9), invertible(3)
    A, B = (x.detach() for x in factors(12, 9, 3, dtype=DOUBLE))
    runs = []
    for a, b in ((A, B), (N @ A, B @ torch.linalg.inv(N))):
        if stats == "exact":
            layer, out = Layer(a, b, variant=variant, lr=0.05, **settings), []
            for _ in range(steps):
                layer.step(problem.G(layer.A.detach(), layer.B.detach()))
                out.append(layer.W)
        else:
            a, b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())
            optimizer = made(a, b, lr=0.05, variant=variant, stats=stats, **settings)
            out = [problem.W(*x) for x in follow(optimizer, a, b, problem, steps)]
        runs.append(out)
    return max(float((x - y).abs().max()) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("stats", ["tangent", "exact", "none"])
@pytest.mark.parametrize("variant", ["momentum", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_any_change_of_basis_leaves_w_alone(stats, variant, weight_decay):
    assert gap(stats, variant, weight_decay=weight_decay, **FREE) <= 1e-8


def test_adamw_and_damping_depend_on_it():
    assert gap("tangent", "adamw", **FREE) > 1e-6
    assert gap("tangent", "momentum", eps=1e-3) > 1e-6


# a factor that is zero


@pytest.mark.parametrize("stats", ["tangent", "none"])
@pytest.mark.parametrize("variant", ["momentum", "sgd"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_beside_a_zero_factor_the_other_waits(stats, variant, dtype):
    m, n, r, s = 10, 7, 3, 2.0
    for zero in (0, 1):
        pair = factors(m, n, r, dtype=dtype)
        torch.nn.init.zeros_(pair[zero])
        A, B = (p.detach().double().clone() for p in pair)
        G = draws(m, n, r)[2]
        grads = [s * B.mT @ G, s * G @ A.mT]
        optimizer = made(*pair, s, lr=0.5, stats=stats, variant=variant, **FREE)
        for p, g in zip(pair, grads, strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
        other = 1 - zero
        assert torch.equal(pair[other].detach().double(), (A, B)[other])
        p, q = torch.ones(m, dtype=DOUBLE), torch.ones(n, dtype=DOUBLE)
        if stats == "tangent":
            p, q = Metric(m, n, 0.99, 1e-3).take(*visible(A, B, *grads, s))
        want = solution(A, B, *(None if i == other else g for i, g in enumerate(grads)), p, q, s)
        step = -pair[zero].detach().double() / 0.5
        bound = {DOUBLE: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
        close(step, want[zero], bound * float(want[zero].abs().max()))
        for i in (0, 1):  # a second step moves both
            pair[i].grad = torch.ones_like(pair[i])
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in pair)
        assert not torch.equal(pair[other].detach().double(), (A, B)[other])


# what Adafactor's metric does


@pytest.mark.parametrize("stats", ["tangent", "exact"])
@pytest.mark.parametrize("variant", ["momentum", "sgd"])
def test_the_scale_of_gradients_cancels(stats, variant):
    out = []
    Gs = [draws(10, 7, 3, seed)[2] for seed in range(10)]
    for c in (1.0, 100.0):
        A, B = factors(10, 7, 3, dtype=DOUBLE)
        if stats == "exact":
            layer = Layer(A, B, variant=variant, lr=0.02)
            for G in Gs:
                layer.step(c * G)
            out.append(layer.W)
        else:
            optimizer = made(A, B, variant=variant, lr=0.02)
            for G in Gs:
                A.grad, B.grad = 2 * c * B.detach().mT @ G, 2 * c * G @ A.detach().mT
                optimizer.step()
            out.append((B @ A).detach())
    close(out[0], out[1], 1e-9)


def test_scaled_rows_are_scaled_back():
    """Full rank factors show the whole of T; of a rank one |G| it is the sign of G."""
    m, n, s = 5, 5, 2.0
    A, B, G, p, q = draws(m, n, 5)
    for H, bound in ((p[:, None] * q * G.sign(), 1e-8), (G, None)):
        scaled = H.clone()
        scaled[1:3] *= 10
        moved = []
        for X in (H, scaled):
            layer = Layer(A, B, s, variant="sgd", betas=(0.0, 0.0), lr=1e-6, **FREE)
            before = layer.W
            layer.step(X)
            moved.append((before - layer.W) / 1e-6)
        if bound:
            close(moved[0], G.sign(), 1e-4)  # lr is small, so is what is of second order
            close(moved[1], G.sign(), 1e-4)
        rows = [x[1:3].square().mean().sqrt() for x in moved]
        assert 0.5 < float(rows[1] / rows[0]) < 2.0


# one factor alone


@pytest.mark.parametrize(("m", "n", "r", "s"), BRUTE)
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_sided_steps_are_least_squares(m, n, r, s, frozen):
    A, B, G, p, q = draws(m, n, r)
    p = normalized(p)
    T, root = (G / (p[:, None] * q)).reshape(-1, 1), torch.kron(p, q).sqrt()[:, None]
    eye_m, eye_n = torch.eye(m, dtype=DOUBLE), torch.eye(n, dtype=DOUBLE)
    J = s * (torch.kron(eye_m, A.mT.contiguous()) if frozen == 0 else torch.kron(B, eye_n))
    want = torch.linalg.lstsq(root * J, root * T, driver="gelsd").solution
    moved = planted(A, B, s, G, p, q, missing=frozen)
    close(moved[1 - frozen].flatten(), want.flatten(), 1e-9)
    assert not moved[frozen].any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor_keeps_its_bits(frozen):
    pair = factors(10, 7, 3)
    pair[frozen].requires_grad_(False)
    optimizer = made(*pair, lr=0.05, weight_decay=0.1)
    before = [p.detach().clone() for p in pair]
    for _ in range(3):
        (2.0 * pair[1] @ pair[0]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(pair[frozen].detach(), before[frozen])
    assert not torch.equal(pair[1 - frozen].detach(), before[1 - frozen])


# the scale of the adapter


@pytest.mark.parametrize("stats", ["tangent", "none"])
def test_alpha_does_not_change_the_first_step_of_w(stats):
    problem, moves = LeastSquares(12, 9), {}
    for aware in (True, False):
        for s in (2.0, 4.0):
            problem.s = s
            A, B = factors(12, 9, 3, dtype=DOUBLE, zero=True)
            optimizer = made(A, B, s, lr=0.01, stats=stats, scale_aware=aware, **FREE)
            moves[aware, s] = problem.W(*follow(optimizer, A, B, problem, 1)[0])
    close(moves[True, 4.0], moves[True, 2.0], 1e-12)
    close(moves[False, 4.0], 4 * moves[False, 2.0], 1e-10)


# state


@pytest.mark.parametrize(
    ("settings", "count", "clocks"),
    [({}, "(r+1)(m+n)", 2), ({"variant": "sgd"}, "m+n", 0),
     ({"variant": "adamw"}, "(2r+1)(m+n)", 2), ({"stats": "none"}, "r(m+n)", 2),
     ({"stats": "exact"}, "(r+2)(m+n)", 2)],
    ids=["momentum", "sgd", "adamw", "none", "exact"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_is_as_many_numbers_as_the_docstring_counts(settings, count, clocks, dtype):
    m, n, r = 40, 30, 4
    A, B = factors(m, n, r, dtype=dtype)
    optimizer = made(A, B, **settings)
    optimizer.init_state()
    numbers = {"(r+1)(m+n)": r + 1, "m+n": 1, "(2r+1)(m+n)": 2 * r + 1, "r(m+n)": r,
               "(r+2)(m+n)": r + 2}[count] * (m + n)  # fmt: skip
    values = [v for p in (A, B) for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in values) == 4 * (numbers + clocks)
    report = memory_report(pairs_to_groups([(A, B)], scale=2.0), AdaPreLoRA, **settings)
    assert report.state == 4 * (numbers + clocks)


def test_exact_statistics_resume_bit_for_bit():
    Gs = [draws(10, 7, 3, seed)[2].float() for seed in range(8)]
    layer = Layer(*factors(10, 7, 3), lr=0.02)
    for G in Gs[:4]:
        layer.step(G)
    saved, A, B = through_a_file([layer.optimizer.state_dict(), layer.A.detach(), layer.B.detach()])
    again = Layer(A, B, lr=0.02)  # watches before it loads
    again.optimizer.load_state_dict(saved)
    for G in Gs[4:]:
        layer.step(G)
        again.step(G)
    assert same([layer.A.detach(), layer.B.detach()], [again.A.detach(), again.B.detach()])
    assert same(tensors(layer.optimizer), tensors(again.optimizer))


@pytest.mark.parametrize("settings", [{}, {"stats": "none"}, {"variant": "adamw"}], ids=str)
def test_temporaries_are_what_the_docstring_says(settings):
    A, B = factors(2048, 1024, 16)
    optimizer = made(A, B, **settings)
    for _ in range(2):
        with AllocationCounter() as counter:
            A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
            begun = counter.live
            optimizer.step()
    most = 4 if settings.get("variant") == "adamw" else 2
    assert counter.peak - begun <= most * 4 * B.numel()


# low precision


@pytest.mark.parametrize("variant", ["momentum", "sgd", "adamw"])
def test_bf16_factors_take_the_float32_step(variant):
    low = factors(40, 30, 4, dtype=torch.bfloat16)
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    GA, GB = pair_gradients(40, 30, 4, 1, dtype=torch.bfloat16)
    before = [p.detach().clone() for p in high]
    for pair in (low, high):
        run(made(*pair, lr=1.0, variant=variant), list(pair), [GA, GB])
    for p, q, start in zip(low, high, before, strict=True):
        a, b = p.detach().float() - start, q.detach() - start
        assert bool(a.isfinite().all()) and float((a * b).sum() / (a.norm() * b.norm())) > 0.99


# hooks on base weights


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_the_hook_sees_dense_sums_and_leaves_nothing(dtype):
    G = draws(10, 7, 3)[2].to(dtype)
    W0 = torch.randn(10, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = Layer(*factors(10, 7, 3, dtype=dtype), W0=W0, lr=0.02)
    layer.backward(G)
    assert layer.W0.grad is None
    layer.optimizer.step()
    state, wide = layer.optimizer.state, G.double()
    L, R = (state[p]["energy"].double().flatten() / 0.01 for p in (layer.B, layer.A))
    torch.testing.assert_close(L, wide.square().mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(R, wide.square().mean(0), rtol=1e-6, atol=0)
    assert not state[layer.A]["seen"].any() and not state[layer.B]["seen"].any()
    layer.optimizer.zero_grad()
    layer.step(G)
    assert torch.equal(layer.W0.detach(), W0) and layer.W0.grad is None


@pytest.mark.parametrize("variant", ["momentum", "sgd", "adamw"])
def test_exact_oracle(variant):
    problem = LeastSquares(12, 9)
    A, B = factors(12, 9, 3, dtype=DOUBLE)
    settings = {"lr": 0.05, "weight_decay": 0.1, "variant": variant}
    want = adaprelora(A.detach(), B.detach(), problem.G, s=2.0, stats="exact", steps=8, **settings)
    layer = Layer(A, B, **settings)
    for a, b in want:
        layer.step(problem.G(layer.A.detach(), layer.B.detach()))
        close(layer.A.detach(), a, 1e-9)
        close(layer.B.detach(), b, 1e-9)


def test_squares_are_averaged_over_backward_passes():
    Gs = [draws(10, 7, 3, seed)[2] for seed in range(3)]
    layer = Layer(*factors(10, 7, 3, dtype=DOUBLE))
    layer.step(*Gs)
    mean = sum(G.square() for G in Gs) / 3
    close(layer.optimizer.state[layer.B]["energy"].flatten() / 0.01, mean.mean(1), 1e-12)
    layer.step(Gs[0])
    want = 0.99 * mean.mean(0) + Gs[0].square().mean(0)
    close(layer.optimizer.state[layer.A]["energy"].flatten() / 0.01, want, 1e-12)


def test_a_bad_gradient_leaves_no_trace_in_the_statistics():
    Gs = [draws(10, 7, 3, seed)[2].float() for seed in range(4)]
    for wait in (None, False):
        plain, layer = (Layer(*factors(10, 7, 3), lr=0.02) for _ in range(2))
        layer.optimizer._wait = wait
        for i, G in enumerate(Gs):
            plain.step(G)
            layer.step(G)
            if i == 1:
                layer.step(G * float("nan"))
        assert layer.optimizer.skipped == {0: 1, 1: 1}  # A and B
        assert same([plain.A.detach(), plain.B.detach()], [layer.A.detach(), layer.B.detach()])
        assert same(tensors(plain.optimizer), tensors(layer.optimizer))


def test_processes_average_what_they_saw():
    layer, sizes = Layer(*factors(10, 7, 3, dtype=DOUBLE)), []

    def reduce(x):
        sizes.append(x.numel())
        x.mul_(0.5)  # another process saw nothing

    layer.optimizer.watch(layer.groups(), reduce=reduce)
    G = draws(10, 7, 3)[2]
    layer.step(G)
    assert sizes == [17]
    close(layer.optimizer.state[layer.B]["energy"].flatten() / 0.005, G.square().mean(1), 1e-12)


@pytest.mark.parametrize("passes", [1, 2, 3, 5])
def test_sums_of_hooks_that_leave_float32_stay_finite(passes):
    layer, G = Layer(*factors(10, 7, 3)), draws(10, 7, 3)[2].float()
    for size in (1e20, 1e20, 1.0):
        layer.step(*[(size if k % 2 == 0 else 1.0) * G for k in range(passes)])
        assert bool(layer.W.isfinite().all())
        for x in tensors(layer.optimizer).values():
            assert bool(torch.as_tensor(x).isfinite().all())
    for _ in range(passes):
        layer.backward(1e20 * G)
    for p in (layer.A, layer.B):
        assert bool(layer.optimizer.state[p]["seen"].isfinite().all())


def test_the_hooks_can_be_taken_away_and_are_asked_for():
    layer, G = Layer(*factors(10, 7, 3)), draws(10, 7, 3)[2].float()
    layer.step(G)
    assert layer.W0.requires_grad
    layer.optimizer.unwatch()
    assert not layer.W0.requires_grad
    layer.backward(G)
    assert layer.W0.grad is None
    before, state = layer.W, tensors(layer.optimizer)
    for optimizer in (layer.optimizer, copy.deepcopy(layer.optimizer)):
        for p, q in zip(optimizer.param_groups[0]["params"], (layer.A, layer.B), strict=True):
            p.grad = q.grad.clone()
        with pytest.raises(RuntimeError, match=r"call optimizer.watch\(model\) once"):
            optimizer.step()
    assert torch.equal(before, layer.W) and same(state, tensors(layer.optimizer))
    layer.optimizer.watch(layer.groups())
    layer.optimizer.watch(layer.groups())  # again: hooks are replaced
    layer.optimizer.zero_grad()
    layer.step(G)
    assert not torch.equal(before, layer.W)


class Adapter(torch.nn.Linear):
    """A linear layer with a pair, as plain torch code has it; or stored turned, or in experts."""

    def __init__(self, n, m, r=3, transposed=False):
        super().__init__(n, m)
        self.fan_in_fan_out, self.scaling = transposed, 2.0
        if transposed:
            self.weight = torch.nn.Parameter(self.weight.detach().mT.contiguous())
        self.requires_grad_(False)
        self.lora_A = torch.nn.Parameter(torch.randn(r, n))
        self.lora_B = torch.nn.Parameter(torch.randn(m, r))

    def forward(self, x):
        W = self.weight.mT if self.fan_in_fan_out else self.weight
        return x @ (W + self.scaling * self.lora_B @ self.lora_A).mT


@pytest.mark.parametrize("transposed", [False, True])
def test_a_model_is_watched(transposed):
    torch.manual_seed(0)
    net = torch.nn.Sequential(Adapter(8, 6, transposed=transposed), torch.nn.Tanh(), Adapter(6, 5))
    optimizer = AdaPreLoRA(net, lr=1e-2, stats="exact")
    optimizer.watch(net)
    x, frozen = torch.randn(9, 8), [net[i].weight.detach().clone() for i in (0, 2)]
    losses, dense = [], []
    for _ in range(30):
        loss = (net(x) - 1).square().mean()
        W = [net[i].weight for i in (0, 2)]
        dense = torch.autograd.grad(loss, W, retain_graph=True)
        loss.backward()
        seen = [[optimizer.state[p]["seen"].clone() for p in (net[i].lora_A, net[i].lora_B)]
                for i in (0, 2)]  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for G, (columns, rows), flip in zip(dense, seen, (transposed, False), strict=True):
        G = G.mT if flip else G
        torch.testing.assert_close(columns.flatten(), G.square().sum(0))
        torch.testing.assert_close(rows.flatten(), G.square().sum(1))
    assert losses[-1] < 0.5 * losses[0]
    assert same(frozen, [net[i].weight.detach() for i in (0, 2)])


def test_experts_and_convolutions_are_watched():
    draw = torch.Generator().manual_seed(0)
    E, m, n, r = 3, 5, 4, 2
    A, B = weight((E, r, n), 0, DOUBLE), weight((E, m, r), 1, DOUBLE)
    W = torch.nn.Parameter(torch.zeros(E, m, n, dtype=DOUBLE), requires_grad=False)
    a, b = weight((r, n, 3, 3), 2, DOUBLE), weight((m, r, 1, 1), 3, DOUBLE)
    V = torch.nn.Parameter(torch.zeros(m, n, 3, 3, dtype=DOUBLE), requires_grad=False)
    groups = pairs_to_groups([(A, B), (a, b)], scale=2.0)
    optimizer = AdaPreLoRA(groups, stats="exact")
    optimizer.watch(pairs_to_groups([(A, B, W), (a, b, V)], scale=2.0))
    G, H = (torch.randn(x.shape, generator=draw, dtype=DOUBLE) for x in (W, V))
    conv = (b.flatten(1) @ a.flatten(1)).view_as(V)
    (((W + 2.0 * B @ A) * G).sum() + ((V + 2.0 * conv) * H).sum()).backward()
    optimizer.step()
    mean = G.square()
    close(optimizer.state[A]["energy"] / 0.01, mean.mean(1, keepdim=True), 1e-12)
    close(optimizer.state[B]["energy"] / 0.01, mean.mean(2, keepdim=True), 1e-12)
    close(optimizer.state[a]["energy"].flatten() / 0.01, H.flatten(1).square().mean(0), 1e-12)
    close(optimizer.state[b]["energy"].flatten() / 0.01, H.flatten(1).square().mean(1), 1e-12)


def test_base_weights_that_are_missing_or_train_are_refused():
    A, B = factors(10, 7, 3)
    W = torch.nn.Parameter(torch.zeros(10, 7))
    optimizer = made(A, B, stats="exact")
    with pytest.raises(ValueError, match=r"a base weight of shape .* trains; freeze it"):
        optimizer.watch(pairs_to_groups([(A, B, W)], scale=2.0))
    other = pairs_to_groups([(*factors(10, 7, 3), W.detach())], scale=2.0)
    with pytest.raises(ValueError, match="has no base weight here"):
        optimizer.watch(other)
    with pytest.raises(ValueError, match="triples"):
        optimizer.watch(pairs_to_groups([(A, B)], scale=2.0))


# the rest


@pytest.mark.parametrize("settings", [{}, {"variant": "adamw"}, {"variant": "sgd"}], ids=str)
def test_experts_are_pairs_of_their_own(settings):
    E, m, n, r = 3, 8, 6, 2
    A, B = weight((E, r, n), 0, DOUBLE), weight((E, m, r), 1, DOUBLE)
    B.data[1] = 0  # a zero factor among others
    separate = [[torch.nn.Parameter(x[e].detach().clone()) for x in (A, B)] for e in range(E)]
    draw = torch.Generator().manual_seed(0)
    optimizer = made(A, B, lr=0.05, **settings)
    each = [made(*pair, lr=0.05, **settings) for pair in separate]
    for t in range(4):
        A.grad, B.grad = (torch.randn(x.shape, generator=draw, dtype=DOUBLE) for x in (A, B))
        if t == 0:
            A.grad[1] = 0
        optimizer.step()
        for e, (pair, own) in enumerate(zip(separate, each, strict=True)):
            pair[0].grad, pair[1].grad = A.grad[e], B.grad[e]
            own.step()
            close(A.detach()[e], pair[0].detach(), 1e-11)
            close(B.detach()[e], pair[1].detach(), 1e-11)


@pytest.mark.parametrize("stats", ["tangent", "none"])
@pytest.mark.parametrize("variant", ["momentum", "sgd", "adamw"])
def test_the_loss_falls(stats, variant):
    problem = LeastSquares(30, 40)
    A, B = factors(30, 40, 4, dtype=DOUBLE, zero=True)
    before = problem.loss(A.detach(), B.detach())
    follow(made(A, B, lr=0.1, stats=stats, variant=variant), A, B, problem, 300)
    assert problem.loss(A.detach(), B.detach()) < before / 50


def test_the_step_can_be_held_to_a_share_of_the_factor():
    """Without it the first step of A after B = 0 is as large as A however small lr is."""
    problem, grown = LeastSquares(30, 40), {}
    for lr in (0.003, 0.01, 0.03):
        for cap in (None, 0.1):
            A, B = factors(30, 40, 4, dtype=DOUBLE, zero=True)
            before = A.detach().clone()
            ends = follow(made(A, B, lr=lr, variant="sgd", max_rel_step=cap), A, B, problem, 2)
            grown[lr, cap] = float((ends[1][0] - before).norm() / before.norm())
    assert min(grown[lr, None] for lr in (0.003, 0.01, 0.03)) > 0.5
    assert all(grown[lr, 0.1] <= 0.1 + 1e-12 for lr in (0.003, 0.01, 0.03))


def test_gradients_of_zero_move_nothing():
    A, B = factors(10, 7, 3)
    before = [A.detach().clone(), B.detach().clone()]
    optimizer = made(A, B, lr=0.1)
    for p in (A, B):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(before, [A.detach(), B.detach()]) and optimizer.state[A]["step"] == 1


def test_rows_that_are_not_seen_do_not_run_away():
    """A row of B and of its gradient is 0: its energy is 0, and the floor weighs it."""
    A, B = factors(10, 7, 3)
    B.data[4] = 0
    GA, GB = pair_gradients(10, 7, 3, 3)
    for G in GB[:2]:
        G[4] = 0
    out = run(made(A, B, lr=0.01), [A, B], [GA, GB])
    assert not out[1][1][4].any() and 0 < float(out[2][1][4].norm()) < float(B.detach().norm())


def test_singular_factors_are_damped_not_left_out():
    A, B = factors(10, 7, 3)
    B.data[:, 2] = B.data[:, 1]
    GA, GB = pair_gradients(10, 7, 3, 1)
    GA[0][2] = GA[0][1]  # as the chain rule has it
    before = A.detach().clone()
    run(made(A, B, lr=0.1, eps_rel=0.0), [A, B], [GA, GB])
    step = before - A.detach()
    assert bool(A.isfinite().all()) and 0 < float(step.norm()) < 10 * float(before.norm())


def test_int8_and_bfloat16_state():
    problem, ends = LeastSquares(80, 60, dtype=torch.float32), {}
    problem.target = problem.target / 10
    for state in (None, "bfloat16", "int8"):
        A, B = factors(80, 60, 8)
        optimizer = made(A, B, lr=0.03, state_dtype=state)
        first = problem.loss(A.detach(), B.detach())
        ends[state] = problem.loss(*follow(optimizer, A, B, problem, 30)[-1]) / first
    assert ends[None] < 0.9 and all(abs(x - ends[None]) < 0.05 for x in ends.values())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"eps_rel": -1.0}, "eps_rel must be at least 0"),
        ({"eps": -1.0}, "Invalid epsilon value"),
        ({"variant": "lion"}, "variant must be one of"),
        ({"stats": "chain"}, "stats must be one of"),
        ({"floor": 0.0}, r"floor must be in \(0, 1\]"),
        ({"max_rel_step": 0.0}, "max_rel_step must be positive"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1"),
        ({"lr_ratio_b": -1.0}, "lr_ratio_b must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        made(*factors(10, 7, 3), **wrong)


def test_oracle_inverts_what_is_not_zero():
    S = torch.diag(torch.tensor([2.0, 4.0], dtype=DOUBLE))
    close(inv(S, 1.0), torch.diag(torch.tensor([0.2, 1 / 7], dtype=DOUBLE)), 1e-15)
    assert not inv(torch.zeros(2, 2)).any()
