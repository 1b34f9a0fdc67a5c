"""Base optimizers: Adam with clocks per row, Lion, momentum SGD, Adafactor; and GaLore on them."""

import math

import pytest
import torch
from helpers.peers import Missing, galore_torch
from helpers.problems import gradients, run, same, weight
from helpers.shapes import ODD, SHAPES, TALL, WIDE

from stiefel.optimizers import GaLore
from stiefel.optimizers._toolkit.base_optimizers import BASE_OPTIMIZERS, make_base_optimizer
from stiefel.optimizers._toolkit.moments import DenseBasisChange, IndexBasisChange, adam

B = (0.9, 0.99)


def fresh(base, shape, K=2, dtype=torch.float32):
    m, n = shape
    slots = base.slots("rn", r=m)
    return {name: torch.zeros(K, *slot.shape(m, n), dtype=dtype) for name, slot in slots.items()}


def adam_by_entry(Rs, ages, eps):
    """Adam in float64, every entry with the number of its own updates."""
    M = V = torch.zeros_like(Rs[0], dtype=torch.float64)
    out = []
    for R, t in zip(Rs, ages, strict=True):
        M, V = B[0] * M + (1 - B[0]) * R.double(), B[1] * V + (1 - B[1]) * R.double() ** 2
        t = t.double()
        out.append(M / (1 - B[0] ** t) / ((V / (1 - B[1] ** t)).sqrt() + eps))
    return out


@pytest.mark.parametrize("shape", [(5, 200), (5, 7), (200, 5), (1, 65), (65, 1)])
@pytest.mark.parametrize("axis", ["row", "column", "entry"])
def test_adam_takes_clocks_per_row_column_and_entry(shape, axis):
    m, n = shape
    size = {"row": (2, m, 1), "column": (2, 1, n), "entry": (2, m, n)}[axis]
    start = torch.randint(0, 300, size, generator=torch.Generator().manual_seed(1))
    ages = [(start + step + 1).int() for step in range(4)]
    Rs = [
        torch.stack([a, b])
        for a, b in zip(gradients(shape, 4), gradients(shape, 4, 1), strict=True)
    ]
    M, V = torch.zeros(2, *shape), torch.zeros(2, *shape)
    for R, t, want in zip(Rs, ages, adam_by_entry(Rs, ages, 1e-8), strict=True):
        N = adam(R, M, V, t, beta1=B[0], beta2=B[1], eps=1e-8)
        torch.testing.assert_close(N.double(), want, rtol=2e-5, atol=2e-6)
        m1, v1 = M[:1].clone(), V[:1].clone()
    # the last step again for one matrix alone, from the same moments: the same bits
    both = adam(Rs[0], M, V, ages[0], beta1=B[0], beta2=B[1], eps=1e-8)
    one = adam(Rs[0][:1], m1, v1, ages[0][:1], beta1=B[0], beta2=B[1], eps=1e-8)
    assert same(one, both[:1])
    assert same(m1, M[:1])


def test_adam_with_one_clock_for_all_equals_a_number():
    R = torch.stack(gradients((6, 128), 2))
    for t in (torch.full((2, 6, 1), 7), torch.full((2, 1, 128), 7), torch.full((2, 6, 128), 7)):
        states = [[torch.full_like(R, 0.1), torch.full_like(R, 0.2)] for _ in range(2)]
        a = adam(R, *states[0], 7, beta1=B[0], beta2=B[1], eps=1e-8)
        b = adam(R, *states[1], t, beta1=B[0], beta2=B[1], eps=1e-8)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(states[0], states[1], rtol=1e-6, atol=0)


def test_adam_of_a_turned_weight_takes_turned_clocks():
    R = gradients((6, 90), 1)[0][None]
    t = torch.arange(1, 7).view(1, 6, 1)
    want = adam(R, torch.zeros(1, 6, 90), torch.zeros(1, 6, 90), t, beta1=0.9, beta2=0.99, eps=1e-8)
    transposed = [torch.zeros(1, 90, 6).mT for _ in range(2)]
    got = adam(R, *transposed, t, beta1=0.9, beta2=0.99, eps=1e-8)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_lion_and_momentum_sgd_by_their_formulas():
    Rs = [torch.stack([G, -2 * G]) for G in gradients(WIDE, 5)]
    lion, sgdm = make_base_optimizer("lion", B, 1e-8), make_base_optimizer("sgdm", B, 1e-8)
    a, b = fresh(lion, WIDE), fresh(sgdm, WIDE)
    assert a.keys() == {"exp_avg"}
    assert b.keys() == {"momentum_buffer"}
    M = buffer = torch.zeros(2, *WIDE, dtype=torch.float64)
    for t, R in enumerate(Rs, 1):
        D = R.double()
        want, M = (B[0] * M + (1 - B[0]) * D).sign(), B[1] * M + (1 - B[1]) * D
        assert same(lion.direction(a, R, t).double(), want)
        torch.testing.assert_close(a["exp_avg"].double(), M, rtol=1e-5, atol=1e-7)
        buffer = B[0] * buffer + D
        torch.testing.assert_close(sgdm.direction(b, R, t).double(), buffer, rtol=1e-5, atol=1e-6)
    p, q = weight(WIDE), weight(WIDE)
    ours, theirs = fresh(sgdm, WIDE, 1), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for G in gradients(WIDE, 4):
        q.grad = G
        theirs.step()
        p.data.add_(sgdm.direction(ours, G[None], 1)[0], alpha=-0.1)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def adafactor(Rs, beta1):
    """Adafactor in float64 on one matrix, as its paper writes it."""
    r, n = Rs[0].shape
    v, w, M, out = torch.zeros(r, 1), torch.zeros(1, n), torch.zeros(r, n), []
    v, w, M = v.double(), w.double(), M.double()
    for t, R in enumerate(Rs, 1):
        square, beta2 = R.double() ** 2 + 1e-30, 1 - t**-0.8
        v = beta2 * v + (1 - beta2) * square.mean(1, keepdim=True)
        w = beta2 * w + (1 - beta2) * square.mean(0, keepdim=True)
        N = R.double() / (v @ w / v.mean()).sqrt()
        N = N / max(1.0, math.sqrt(float((N**2).mean())))
        M = beta1 * M + (1 - beta1) * N
        out.append(M if beta1 else N)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_equals_its_oracle(shape, beta1):
    base = make_base_optimizer("adafactor", (beta1, 0.99), 1e-8)
    state = fresh(base, shape)
    assert ("exp_avg" in state) == (beta1 > 0)
    Rs = [
        torch.stack([a, 3 * b])
        for a, b in zip(gradients(shape, 5), gradients(shape, 5, 1), strict=True)
    ]
    want = [adafactor([R[k] for R in Rs], beta1) for k in range(2)]
    for t, R in enumerate(Rs, 1):
        N = base.direction(state, R, t)
        torch.testing.assert_close(
            N.double(), torch.stack([want[0][t - 1], want[1][t - 1]]), rtol=1e-4, atol=1e-5
        )


MIXED = {
    "rows": torch.logspace(-19, 18, 5)[:, None],
    "columns": torch.logspace(-19, 18, 7)[None],
    "both": torch.logspace(-9, 9, 5)[:, None] * torch.logspace(-9, 9, 7)[None],
    "one small row beside a zero one": torch.tensor([1e10, 1e10, 0, 1e10, 1e-14])[:, None],
    "two blocks": torch.block_diag(torch.full((4, 6), 1e9), torch.full((1, 1), 1e-9)),
    "huge and tiny by turns": None,
}  # fmt: skip
"""Sizes of the entries of R (5 x 7) under which v / mean(v) or N*N leaves float32."""


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_equals_its_oracle_where_rows_and_columns_differ_in_size(kind, beta1):
    base = make_base_optimizer("adafactor", (beta1, 0.99), 1e-8)
    state, sizes = fresh(base, (5, 7), 1), MIXED[kind]
    Rs = [
        G * (10.0 ** (18 - 36 * (t % 2)) if sizes is None else sizes)
        for t, G in enumerate(gradients((5, 7), 5))
    ]
    for t, (R, want) in enumerate(zip(Rs, adafactor(Rs, beta1), strict=True), 1):
        N = base.direction(state, R[None], t)
        torch.testing.assert_close(N[0].double(), want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["rotate", "ldadam"])
def test_row_averages_at_the_largest_number_stay_finite_when_the_basis_turns(policy):
    base = make_base_optimizer("adafactor", B, 1e-8)
    for dtype in (torch.float32, torch.bfloat16):
        state = fresh(base, (4, 9), 1, dtype)
        state["exp_avg_sq_row"].fill_(torch.finfo(dtype).max)
        P = torch.linalg.qr(torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(0)))[0]
        for new, old in zip(P[1:, None], P[:-1, None], strict=True):
            base.carry_state(policy, state, DenseBasisChange(old, new), 3)
            assert bool(state["exp_avg_sq_row"].isfinite().all())


def test_adafactor_equals_the_class_that_accompanies_galore():
    try:
        theirs = galore_torch().GaLoreAdafactor
    except Missing as why:
        pytest.skip(str(why))
    for shape in (TALL, WIDE, ODD):
        p, q = weight(shape), weight(shape)
        group = {"params": [q], "rank": 4, "update_proj_gap": 100, "scale": 0.5, "proj_type": "std"}
        other = theirs([group], lr=0.02, scale_parameter=False, relative_step=False)
        own = GaLore(
            [p], lr=0.02, rank=4, scale=0.5, update_proj_gap=100, inner="adafactor",
            betas=(0.0, 0.999), projection="svd_full",
        )  # fmt: skip
        grads = gradients(shape, 6)  # one window: signs of the basis do not matter
        a, b = run(own, [p], [grads]), run(other, [q], [grads])
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", BASE_OPTIMIZERS)
def test_a_stack_has_the_bits_of_its_matrices(name):
    base = make_base_optimizer(name, B, 1e-8)
    for shape in SHAPES:
        Rs = [torch.stack([G, 2 * G, G.roll(1)]) for G in gradients(shape, 4)]
        whole, parts = fresh(base, shape, 3), [fresh(base, shape, 1) for _ in range(3)]
        for t, R in enumerate(Rs, 1):
            N = base.direction(whole, R, t)
            for k in range(3):
                assert same(base.direction(parts[k], R[k : k + 1], t), N[k : k + 1])
                assert all(same(parts[k][key], whole[key][k : k + 1]) for key in whole)


@pytest.mark.parametrize("name", BASE_OPTIMIZERS)
def test_the_gradient_is_not_changed_and_the_direction_is_new(name):
    base = make_base_optimizer(name, B, 1e-8)
    state, R = fresh(base, WIDE, 1), gradients(WIDE, 1)[0][None]
    before = R.clone()
    N = base.direction(state, R, 1)
    kept = {key: value.clone() for key, value in state.items()}
    N.mul_(2)
    assert same(R, before)
    assert same(state, kept)


@pytest.mark.parametrize("name", BASE_OPTIMIZERS)
def test_carrying_between_bases(name):
    base = make_base_optimizer(name, B, 1e-8)
    shape, r = (4, 9), 4
    state = fresh(base, shape, 1)
    for t, G in enumerate(gradients(shape, 3), 1):
        base.direction(state, G[None], t)
    P = torch.linalg.qr(torch.randn(1, 12, r, generator=torch.Generator().manual_seed(0)))[0]
    same_basis, rotated = (
        DenseBasisChange(P, P),
        DenseBasisChange(P, P[..., [2, 0, 3, 1]] * torch.tensor([1.0, -1, 1, 1])),
    )
    for policy in ("keep", "reset", "rotate", "ldadam"):
        copies = {key: value.clone() for key, value in state.items()}
        base.carry_state(policy, copies, same_basis, 3)
        for key, value in copies.items():
            want = torch.zeros_like(value) if policy == "reset" else state[key]
            torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    copies = {key: value.clone() for key, value in state.items()}
    base.carry_state("rotate", copies, rotated, 3)
    for key, value in copies.items():
        if key == "exp_avg_sq_col":
            assert same(value, state[key])
            continue
        want = state[key][:, [2, 0, 3, 1]].clone()
        if key in ("exp_avg", "momentum_buffer"):
            want[:, 1] *= -1
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    old, new = torch.tensor([[0, 2, 5, 7]]), torch.tensor([[2, 3, 5, 9]])
    copies = {key: value.clone() for key, value in state.items()}
    base.carry_state("match", copies, IndexBasisChange(old, new), 3)
    for key, value in copies.items():
        if key != "exp_avg_sq_col":
            assert same(value[:, [0, 2]], state[key][:, [1, 2]])
            assert float(value[:, [1, 3]].abs().max()) <= 2e-30


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_galore_projects_runs_inside_and_lifts(name, proj_type):
    if proj_type == "full" and name == "lion":
        pytest.skip(
            "R of the first step is diagonal, and Lion takes the sign of round-off beside it"
        )
    p, eps = weight(TALL, dtype=torch.float64), 1e-4 if proj_type == "full" else 1e-8
    grads = gradients(TALL, 3, dtype=torch.float64)
    optimizer = GaLore(
        [p], lr=0.1, rank=3, scale=1.0, betas=B, eps=eps, inner=name, proj_type=proj_type,
        update_proj_gap=9,
    )  # fmt: skip
    Ws = [weight(TALL, dtype=torch.float64).detach(), *[W[0] for W in run(optimizer, [p], [grads])]]
    U, _, Vh = torch.linalg.svd(grads[0], full_matrices=False)
    left, right = U[:, :3], Vh[:3].mT
    down = {
        "std": lambda G: (G @ right).mT,  # tall: the right side, turned
        "reverse_std": lambda G: left.mT @ G,
        "full": lambda G: left.mT @ G @ right,
    }[proj_type]
    up = {
        "std": lambda N: N.mT @ right.mT,
        "reverse_std": lambda N: left @ N,
        "full": lambda N: left @ N @ right.mT,
    }[proj_type]
    base = make_base_optimizer(name, B, eps)
    state = fresh(base, tuple(down(grads[0]).shape), 1, torch.float64)
    for t, G in enumerate(grads, 1):
        N = base.direction(state, down(G)[None], t)[0]
        torch.testing.assert_close(Ws[t], Ws[t - 1] - 0.1 * up(N), rtol=0, atol=1e-9)


def test_galore_state_with_each_inner():
    for name, keys in (
        ("adamw", {"basis": 24, "exp_avg": 40, "exp_avg_sq": 40}),
        ("lion", {"basis": 24, "exp_avg": 40}),
        ("adafactor", {"basis": 24, "exp_avg": 40, "exp_avg_sq_row": 4, "exp_avg_sq_col": 10}),
    ):
        p = weight((6, 10))
        optimizer = GaLore([p], rank=4, inner=name)
        optimizer.init_state()
        found = {k: v.numel() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        assert found == keys


def test_refusals():
    p = [weight(WIDE)]
    with pytest.raises(ValueError, match="inner must be one of"):
        GaLore(p, inner="sgdm")
    with pytest.raises(ValueError, match="inner must be one of adamw, adafactor, lion, sgdm"):
        make_base_optimizer("adam", B, 1e-8)
    with pytest.raises(ValueError, match="compat='reference' has inner='adamw'"):
        GaLore(p, inner="lion", compat="reference")
    with pytest.raises(ValueError, match="use moments='keep' or 'reset' with proj_type='full'"):
        GaLore(p, inner="adafactor", proj_type="full", moments="rotate")
