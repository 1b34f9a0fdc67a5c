"""Trion: its identities, the recorded trajectories, its bounds."""

import math

import pytest
import torch
from helpers.allocations import count_step
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.problems import doubles, gradients, run, same, trajectory, weight
from helpers.recordings import fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SHAPES, SQUARE, TALL, WIDE
from oracles.trion import chosen, cosines, exact, ns5, ratio, trion

from stiefel.kernels import dct_basis, polar_factor
from stiefel.optimizers import Muon, Trion
from stiefel.optimizers import trion as module
from stiefel.optimizers.trion import ADJUST_LR_FNS

CLASSES = sorted(path.stem for path in FIXTURES.glob("trion-class-*.json"))
FUNCTIONS = sorted(path.stem for path in FIXTURES.glob("trion-ma*.json"))
DOUBLE = torch.float64
PUBLISHED = {"kj": "kj", "dion": "dion", "kimi": "kimi", "none": "none"}


def basis_of(data):
    return "dct2" if "dct2" in data["settings"].get("basis", "") else "dct3"


def spied(monkeypatch):
    """Every small factor A (K, r, n) and its polar factor, in the order of the steps."""
    seen = []

    def factor(A, *args, **options):
        O = polar_factor(A, *args, **options)
        if A.numel():
            seen.append((A.clone(), O.clone()))
        return O

    monkeypatch.setattr(module, "polar_factor", factor)
    return seen


def rank_for(shape, rank=3):
    return min(rank, *shape)


# the recorded trajectories


def replayed(data):
    """Weights after each step with the settings and gradients of a recording."""
    group = data["settings"]["group"]
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = Trion(
        [p], lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"],
        rank=group["rank"], adjust_lr_fn=PUBLISHED[group["scaling_type"]], basis=basis_of(data),
    )  # fmt: skip
    return run(optimizer, [p], [list(data["grads"])])


@pytest.mark.parametrize("name", CLASSES)
def test_recorded_weights(name):
    """The published class, its iteration in float32."""
    data = fixture(name)
    out = replayed(data)
    bound = tolerance(data, "float32_polar_vs_float64")
    assert len(out) == len(data["W_float32_polar"]) == 13
    for (W,), R in zip(out, data["W_float32_polar"], strict=True):
        assert float((W - R).abs().max()) <= bound


@pytest.mark.parametrize("name", CLASSES)
def test_recorded_weights_of_the_shipped_bfloat16_iteration(name):
    data = fixture(name)
    out = replayed(data)
    worst = max(float((W[0] - R).abs().max()) for W, R in zip(out, data["W"], strict=True))
    assert worst <= 4 * data["noise"]["bf16_vs_float64"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_recorded_momentum_indices_and_factor(name, monkeypatch):
    """The published step, its momentum, chosen numbers (in any order) and small factor."""
    data, seen = fixture(name), spied(monkeypatch)
    settings = data["settings"]
    p = torch.nn.Parameter(torch.zeros(settings["shape"]))
    rank, basis = settings["rank"], basis_of(data)
    optimizer = Trion([p], momentum=settings["momentum"], rank=rank, basis=basis)
    seen.clear()
    wide = settings["shape"][0] < settings["shape"][1]
    before = torch.zeros_like(p)
    for t, G in enumerate(data["grads"]):
        p.grad = G
        optimizer.step()
        M = torch.tensor(data["momentum"][t])
        bound = max(2e-6, 4 * data["noise"]["momentum_vs_float64"])
        assert float((optimizer.state[p]["momentum_buffer"] - M).abs().max()) <= bound
        taken = data["indices"][t]
        order = sorted(range(rank), key=taken.__getitem__)  # ours are ascending
        S = (before + G).T if wide else before + G
        assert chosen(S.double() @ cosines(S.shape[1], basis), rank) == sorted(taken)
        R = torch.tensor(data["polar_factor_float32"][t])
        R = R[order] if wide else R[:, order].T
        _, O = seen[t]
        assert float((O[0] - R).abs().max()) <= tolerance(data, "float32_polar_vs_float64")
        before = optimizer.state[p]["momentum_buffer"].clone()
    assert len(seen) == len(data["grads"])


def test_published_groups_work_as_they_are():
    hidden, rest = weight(WIDE), weight((5,))
    optimizer = Trion(
        [{"params": [hidden], "use_muon": True, "rank": 2}, {"params": [rest], "use_muon": False}]
    )
    hidden.grad, rest.grad = gradients(WIDE, 1)[0], torch.ones(5)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[hidden] and "exp_avg" in optimizer.state[rest]


# the oracle and the identities


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_equals_the_oracle(shape, norm, basis):
    r, grads = rank_for(shape), doubles(shape, 9)
    p = weight(shape, dtype=DOUBLE)
    theirs = trion(p.detach(), grads, r, 0.02, wd=0.1, norm=norm, basis=basis)
    optimizer = Trion([p], lr=0.02, rank=3, weight_decay=0.1, norm=norm, basis=basis)
    for (W,), entry in zip(run(optimizer, [p], [grads]), theirs, strict=True):
        torch.testing.assert_close(W, entry["W"], rtol=0, atol=1e-10)
    B = optimizer.state[p]["momentum_buffer"]
    torch.testing.assert_close(B, theirs[-1]["M"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [TALL, WIDE, (300, 40), (270, 280)])
def test_equals_the_oracle_in_float32_and_past_the_fft(shape):
    """With the transform of 270 rows an FFT; few steps, so that no choice hangs on rounding."""
    grads, p = gradients(shape, 3), weight(shape)
    theirs = trion(p.detach(), grads, 4, 0.02)
    for (W,), entry in zip(run(Trion([p], lr=0.02, rank=4), [p], [grads]), theirs, strict=True):
        torch.testing.assert_close(W.double(), entry["W"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ADJUST_LR_FNS)
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_the_step_is_scaled_by_the_shape(shape, name):
    """c of R rows and C columns, also where the weight is turned."""
    r, G = 3, doubles(shape, 1)[0]
    p = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
    run(Trion([p], lr=1.0, rank=r, adjust_lr_fn=name, polar="svd"), [p], [[G]])
    size = ratio("rms" if name == "match_rms_adamw" else name, *shape, r) * math.sqrt(r)
    assert math.isclose(float(p.detach().norm()), size, rel_tol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN])
def test_match_rms_adamw_moves_by_a_fifth(shape, rank):
    """U has Frobenius norm sqrt(r), so 0.2 sqrt(m n / r) makes its RMS 0.2."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
    run(Trion([p], lr=1.0, rank=rank, polar="svd"), [p], [doubles(shape, 1)])
    assert math.isclose(float(p.detach().square().mean().sqrt()), 0.2, rel_tol=1e-9)


def test_zero_momentum_steps_nowhere():
    """NS5(0) = 0: the weight decays by exactly 1 - lr wd."""
    for shape in SHAPES:
        for dtype in (torch.float32, DOUBLE):
            p = weight(shape, dtype=dtype)
            q = Trion([p], lr=0.125, weight_decay=0.5)
            before = p.detach().clone()
            run(q, [p], [[torch.zeros(shape, dtype=dtype)]])
            assert torch.equal(p.detach(), before * (1 - 0.125 * 0.5))
            assert not q.state[p]["momentum_buffer"].any()


@pytest.mark.parametrize("polar", ["ns5", "auto"])
def test_a_vanishing_gradient_takes_a_whole_step(polar):
    """In float32, where its squares are zero; a denormal one at most a whole step."""
    for size in (1e-20, 1e-30, 1e-36, 1e-41):
        steps = []
        for scale in (1.0, size):
            p = torch.nn.Parameter(torch.zeros(TALL))
            p.grad = scale * gradients(TALL, 1)[0]
            Trion([p], lr=1.0, polar=polar).step()
            steps.append(p.detach())
        if size > 1e-38:
            torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=2e-2)
        assert 0 < float(steps[1].norm()) < 1.5 * float(steps[0].norm())


def test_eps_is_the_least_norm():
    """None is the smallest normal number; under a larger one the step grows with the gradient."""
    G, steps = 1e-9 * gradients(TALL, 1)[0], []
    for options in ({}, {"eps": torch.finfo(torch.float32).tiny}, {"eps": 1e-7}):
        p = torch.nn.Parameter(torch.zeros(TALL))
        run(Trion([p], lr=1.0, **options), [p], [[G]])
        steps.append(p.detach())
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


def test_lr_is_the_only_positional_option():
    with pytest.raises(TypeError, match="positional"):
        Trion([weight(TALL)], 1e-3, 0.9)


def test_the_small_factor_is_enough():
    """NS5(a) P^T = NS5(a P^T) for P with orthonormal columns."""
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(1, 24, 5, generator=draw, dtype=DOUBLE)
    P = dct_basis(16, DOUBLE)[[0, 2, 3, 9, 15]].mT[None]
    whole = polar_factor(a @ P.mT, "ns5")
    torch.testing.assert_close(polar_factor(a, "ns5") @ P.mT, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_full_rank_is_muon_without_nesterov(shape):
    """M = mu B with B <- mu B + G, and U = NS5(B), in whatever basis."""
    grads, mu = doubles(shape, 8), 0.9
    p, q = weight(shape, dtype=DOUBLE), weight(shape, dtype=DOUBLE)
    ours = Trion([p], lr=0.02, momentum=mu, rank=1.0, adjust_lr_fn="none")
    muon = Muon([q], 0.02, 0.0, mu, nesterov=False, polar="ns5", adjust_lr_fn="none")
    for (W,), (V,) in zip(run(ours, [p], [grads]), run(muon, [q], [grads]), strict=True):
        torch.testing.assert_close(W, V, rtol=0, atol=1e-12)
    B = torch.zeros(shape, dtype=DOUBLE)
    for G in grads:
        B = mu * B + G
    torch.testing.assert_close(ours.state[p]["momentum_buffer"], mu * B, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD])
def test_the_step_has_rank_r_and_unit_singular_values(shape):
    p, r = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE)), 3
    optimizer = Trion([p], lr=1.0, rank=r, polar="svd", adjust_lr_fn="none")
    before = p.detach().clone()
    for (W,) in run(optimizer, [p], [doubles(shape, 5)]):
        s = torch.linalg.svdvals(W - before)
        torch.testing.assert_close(s[:r], torch.ones(r, dtype=DOUBLE), rtol=0, atol=1e-9)
        assert float(s[r:].abs().max()) < 1e-12
        before = W


def test_what_is_never_chosen_grows_as_its_sum_and_is_chosen_in_the_end():
    """A constant gradient G = sum of cosines of sizes 5, 1, 1, 1: the small ones wait, then go."""
    D = cosines(4)
    G = torch.diag(torch.tensor([5.0, 1.0, 1.0, 1.0], dtype=DOUBLE)) @ D.T
    G = torch.cat([G, torch.zeros(2, 4, dtype=DOUBLE)])
    p = torch.nn.Parameter(torch.zeros(6, 4, dtype=DOUBLE))
    optimizer = Trion([p], lr=1.0, rank=1, momentum=0.5, adjust_lr_fn="none", polar="svd")
    taken, waiting = [], torch.zeros(4, dtype=DOUBLE)
    for _ in range(40):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        j = int(((p.detach() - before) @ D).norm(dim=0).argmax())
        taken.append(j)
        waiting += torch.tensor([5.0, 1.0, 1.0, 1.0], dtype=DOUBLE)
        waiting[j] *= 0.5
        coefficients = (optimizer.state[p]["momentum_buffer"] @ D).norm(dim=0)
        torch.testing.assert_close(coefficients, waiting, rtol=0, atol=1e-12)
    assert set(taken) == {0, 1, 2, 3}


def test_a_constant_gradient_of_equal_cosines_goes_round():
    G, p = cosines(4).T.clone(), torch.nn.Parameter(torch.zeros(4, 4, dtype=DOUBLE))
    optimizer = Trion([p], lr=1.0, rank=1, momentum=0.0, adjust_lr_fn="none", polar="svd")
    taken, D = [], cosines(4)
    for _ in range(12):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        taken.append(int(((p.detach() - before) @ D).norm(dim=0).argmax()))
    assert all(sorted(taken[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 12, 4))


# the choice


def test_left_on_g_is_right_on_its_transpose():
    """The shorter side is transformed, so a weight and its transpose step alike."""
    for shape in (TALL, ODD):
        p, q = weight(shape, dtype=DOUBLE), None
        q = torch.nn.Parameter(p.detach().mT.contiguous())
        grads = doubles(shape, 6)
        ours = run(Trion([p], lr=0.02, rank=2), [p], [grads])
        transposed = run(Trion([q], lr=0.02, rank=2), [q], [[G.mT.contiguous() for G in grads]])
        for (W,), (V,) in zip(ours, transposed, strict=True):
            torch.testing.assert_close(W, V.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_ties_take_the_lowest_numbers(norm):
    """Equal scores choose 0..r-1, ascending; so does a matrix of zeros."""
    cosine = module.DctProjector(norm=norm)
    S = torch.eye(4).repeat(1, 3)[None] * torch.tensor([1.0, -1.0, -1.0, 1.0]).view(-1, 1)
    assert cosine.choose(S, 3).tolist() == [[0, 1, 2]]
    assert cosine.choose(torch.zeros_like(S), 2).tolist() == [[0, 1]]
    assert cosine.choose(
        S + torch.diag(torch.tensor([0.0, 1.0, 0, 0])).repeat(1, 3), 2
    ).tolist() == [[0, 2]]  # the second row has cancelled


def test_two_runs_agree_bitwise():
    first, second = (trajectory(lambda p: Trion(p, rank=2), SQUARE) for _ in range(2))
    assert same(first, second)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_scaled_gradient_steps_alike(norm):
    """G -> c G leaves I; for c a power of two M scales and W is the same bit for bit."""
    grads, p, q = gradients(WIDE, 6), weight(WIDE), weight(WIDE)
    one, two = (Trion([x], lr=0.02, rank=3, norm=norm) for x in (p, q))
    run(one, [p], [grads])
    run(two, [q], [[G * 2.0**-9 for G in grads]])
    assert torch.equal(p, q)
    B, C = one.state[p]["momentum_buffer"], two.state[q]["momentum_buffer"]
    assert torch.equal(B * 2.0**-9, C)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_a_gradient_of_one_cosine_selects_that_cosine(shape):
    n, draw = min(shape), torch.Generator().manual_seed(5)
    u = torch.randn(max(shape), generator=draw, dtype=DOUBLE)
    for j in (0, 4, n - 1):
        G = torch.outer(u, cosines(n)[:, j])
        G = G if shape[0] > shape[1] else G.T
        p = torch.nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
        optimizer = Trion([p], lr=1.0, rank=1, momentum=0.25, adjust_lr_fn="none", polar="svd")
        run(optimizer, [p], [[G]])
        torch.testing.assert_close(p.detach(), -G / G.norm(), rtol=0, atol=1e-12)
        # all of M was chosen, so all of it decays
        B = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(B, 0.25 * G, rtol=0, atol=1e-12)


def test_l2_keeps_the_most_energy():
    """Of all choices of r rows; l1 never keeps more."""
    G = doubles((20, 8), 1)[0]
    S = G @ cosines(8)
    kept = {norm: S[:, chosen(S, 3, norm)].norm() for norm in ("l1", "l2")}
    best = max(S[:, [i, j, k]].norm() for i in range(8) for j in range(i) for k in range(j))
    slack = 1 + 1e-12
    assert best / slack <= kept["l2"] <= best * slack and kept["l1"] <= best * slack
    p = torch.nn.Parameter(torch.zeros(20, 8, dtype=DOUBLE))
    optimizer = Trion([p], rank=3, momentum=0.0, norm="l2")
    run(optimizer, [p], [[G]])
    left = optimizer.state[p]["momentum_buffer"].norm()
    assert math.isclose(float(left**2 + best**2), float(G.norm() ** 2), rel_tol=1e-12)


# options, precision, memory


@pytest.mark.parametrize("polar", ["auto", "svd", "polar_express"])
def test_polar_methods(polar):
    """Any method of the kernel; svd is the exact factor."""
    p, grads = weight(WIDE, dtype=DOUBLE), doubles(WIDE, 4)
    factor = exact if polar == "svd" else lambda a: polar_factor(a[None], polar)[0]
    theirs = trion(p.detach(), grads, 3, 0.02, factor=factor)
    out = run(Trion([p], lr=0.02, rank=3, polar=polar), [p], [grads])
    for (W,), entry in zip(out, theirs, strict=True):
        torch.testing.assert_close(W, entry["W"], rtol=0, atol=1e-8)


def test_steps_and_coefficients_pass():
    p, grads = weight(TALL, dtype=DOUBLE), doubles(TALL, 4)
    theirs = trion(p.detach(), grads, 3, 0.02, factor=lambda a: ns5(a, 3))
    out = run(Trion([p], lr=0.02, rank=3, ns_steps=3, ns_coefficients=(3.4445, -4.775, 2.0315)),
              [p], [grads])  # fmt: skip
    for (W,), entry in zip(out, theirs, strict=True):
        torch.testing.assert_close(W, entry["W"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "wrong",
    [{"momentum": 1.5}, {"rank": 0}, {"adjust_lr_fn": "original"}, {"norm": "l3"},
     {"basis": "dct1"}, {"polar": "qr"}, {"eps": -1.0}, {"ns_steps": 100}],
)  # fmt: skip
def test_what_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
        Trion([weight(WIDE)], **wrong)


@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
def test_bfloat16_weights_stay_near_float32(shape):
    """Momentum in float32, one rounding of the weight per step."""
    fine = trajectory(lambda p: Trion(p, lr=0.02, rank=3), shape)
    coarse = trajectory(lambda p: Trion(p, lr=0.02, rank=3), shape, dtype=torch.bfloat16)
    p = weight(shape, dtype=torch.bfloat16)
    optimizer = Trion([p], rank=3)
    run(optimizer, [p], [gradients(shape, 1)])
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert float((coarse[-1].float() - fine[-1]).abs().max()) < 0.1


def test_narrow_state_is_worked_on_in_float32():
    p = weight(WIDE)
    optimizer = Trion([p], lr=0.02, rank=3, state_dtype="bfloat16")
    out = run(optimizer, [p], [gradients(WIDE, 7)])
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16
    fine = trajectory(lambda q: Trion(q, lr=0.02, rank=3), WIDE)
    assert float((out[-1][0] - fine[-1]).abs().max()) < 0.1


def test_gradients_are_not_changed():
    p = weight(TALL)
    p.grad = gradients(TALL, 1)[0]
    before = p.grad.clone()
    Trion([p], rank=2).step()
    assert torch.equal(p.grad, before)


def test_resume_is_bitwise():
    def make():
        params = [weight(TALL), weight(WIDE, 1)]
        return params, Trion(params, lr=0.02, rank=2)

    check_resume(make, [gradients(TALL, 8), gradients(WIDE, 8, 1)], 4)


def test_state_is_the_buffer_alone():
    p = weight(WIDE)
    optimizer = Trion([p], rank=2)
    run(optimizer, [p], [gradients(WIDE, 2)])
    assert set(optimizer.state[p]) == {"momentum_buffer", "step"}


@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024)])
@pytest.mark.parametrize("rank", [16, 128, 512])
def test_temporaries(shape, rank):
    """S, P and A; or, once S is gone, P and six matrices r x n; and panels of the transform."""
    p = weight(shape)
    optimizer = Trion([p], rank=rank)
    p.grad = gradients(shape, 1)[0]
    optimizer.step()
    counter = count_step(optimizer)
    m, n = sorted(shape)
    S, P, A, panel = m * n, m * rank, rank * n, 2**18
    assert counter.peak <= 4 * (max(S + 6 * panel, S + P + 2 * A, P + 6 * A) + 2**17)
    assert counter.peak >= 4 * S
