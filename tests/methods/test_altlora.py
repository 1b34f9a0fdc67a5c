"""AltLoRA: its projections, changes of basis, alignment, the recorded trajectories, its bounds."""

import itertools
import json

import pytest
import torch
from helpers.pair_problems import (
    DOUBLE,
    SHAPES,
    LeastSquares,
    close,
    factors,
    follow,
    invertible,
    pair_gradients,
)
from helpers.paths import FIXTURES
from helpers.problems import run, same, weight
from oracles.altlora import altlora

from stiefel.optimizers import AltLoRA, memory_report, pairs_to_groups

PLUS = {"second_moment": "elementwise"}


def made(A, B, s=2.0, **settings):
    return AltLoRA(pairs_to_groups([(A, B)], scale=s), **settings)


def recorded(*names):
    """(label, run, class settings) of the recorded runs."""
    for name in names:
        data = json.loads((FIXTURES / f"altlora_{name}_reference.json").read_text())
        for i, case in enumerate(data["runs"]):
            plus = name == "plus" or case.get("class") == "altlora_plus"
            yield pytest.param(case, PLUS if plus else {}, id=f"{name}-{i}")


def start(case):
    return [
        torch.nn.Parameter(torch.tensor(case[key], dtype=DOUBLE)) for key in ("A_init", "B_init")
    ]


def settings_of(case):
    given = case["settings"]
    return {"lr": given["lr"], "betas": tuple(given["betas"]), "delta": given["reg"],
            "weight_decay": given["weight_decay"], "s": given["s"]}  # fmt: skip


# the published code


@pytest.mark.parametrize(("case", "plus"), [*recorded("alt", "plus")])
@pytest.mark.parametrize("fed", [True, False], ids=["fed", "recomputed"])
def test_recorded_trajectory(case, plus, fed):
    A, B = start(case)
    problem = LeastSquares.recorded(case)
    eps = {"eps": case["settings"]["eps"]} if plus else {}
    optimizer = made(A, B, compat="reference", **settings_of(case), **plus, **eps)
    bound = (1e-9 if plus else 1e-10) * (1 if fed else 100)  # a loop amplifies what B = 0 does
    for t, row in enumerate(case["trajectory"]):
        want = {k: torch.tensor(v, dtype=DOUBLE) for k, v in row.items() if isinstance(v, list)}
        A.grad, B.grad = (want["G_A"], want["G_B"]) if fed else problem.grads(A.data, B.data)
        optimizer.step()
        close(A.detach(), want["A"], bound)
        close(B.detach(), want["B"], bound)
        names = {"momentum": "exp_avg", "second_moment": "exp_avg_sq"}
        for p, letter in ((A, "A"), (B, "B")):
            for theirs, ours in names.items():
                if f"{theirs}_{letter}" in want:
                    close(optimizer.state[p][ours], want[f"{theirs}_{letter}"], bound)
        assert optimizer.state[A]["step"] == t + 1


@pytest.mark.parametrize(("case", "plus"), [*recorded("alternate")])
@pytest.mark.parametrize("both_given", [True, False])
def test_recorded_alternation(case, plus, both_given):
    """By the schedule, whatever gradient the idle factor has; and by leaving gradients out."""
    given = case["settings"]
    A, B = start(case)
    alternating = {
        "schedule": "alternate",
        "switch_every": given["switch_every"],
        "first": given["first"],
    }
    eps = {"eps": given["eps"]} if plus else {}
    optimizer = made(
        A,
        B,
        compat="reference",
        **settings_of(case),
        **plus,
        **eps,
        **(alternating if both_given else {}),
    )
    for row in case["trajectory"]:
        want = {k: None if v is None else torch.tensor(v, dtype=DOUBLE)
                for k, v in row.items() if k in ("G_A", "G_B", "A", "B")}  # fmt: skip
        for p, letter in ((A, "A"), (B, "B")):
            idle = torch.ones_like(p) if both_given else None
            p.grad = want[f"G_{letter}"] if letter == row["active"] else idle
        optimizer.step()
        close(A.detach(), want["A"], 1e-10)
        close(B.detach(), want["B"], 1e-10)


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("plus", [{}, PLUS], ids=["altlora", "plus"])
@pytest.mark.parametrize("zero", [True, False], ids=["zero", "random"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"schedule": "alternate"}, {"schedule": "alternate", "switch_every": 3, "first": "A"},
     {"delta_mode": "relative", "delta": 1e-3}, {"max_rel_step": 0.05}],
    ids=["both", "alternate", "alternate-3", "relative", "capped"],
)  # fmt: skip
def test_oracle(compat, plus, zero, extra):
    for shape in SHAPES:
        A, B = factors(*shape, dtype=DOUBLE, zero=zero)
        if zero and ((compat and "relative" in extra.values()) or shape[2] == min(shape[:2])):
            continue  # singular: 0 / 0, or rounding that delta alone holds
        GA, GB = pair_gradients(*shape, 6, dtype=DOUBLE)
        for G in GA[: extra.get("switch_every", 1)] if zero else []:
            G.zero_()  # as the chain rule has it until B moves
        grads = [list(pair) for pair in zip(GA, GB, strict=True)]
        grads[2][0], grads[3][1] = None, None
        settings = {"lr": 0.05, "weight_decay": 0.1, **plus, **extra, "compat": compat}
        want = altlora(A.detach(), B.detach(), grads, s=2.0, **settings)
        out = run(made(A, B, **settings), [A, B], [[g[0] for g in grads], [g[1] for g in grads]])
        for (a, b), (c, d) in zip(out, want, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(b, d, rtol=1e-6, atol=1e-8)


# the projection


def steps_at(A, B, G, s, **settings):
    """What one step with lr 1 takes from (A, B), each half from the old factors."""
    moved = []
    for missing in (1, 0):
        pair = [torch.nn.Parameter(x.clone()) for x in (A, B)]
        grads = [s * B.mT @ G, s * G @ A.mT]
        grads[missing] = None
        for p, g in zip(pair, grads, strict=True):
            p.grad = g
        made(*pair, s, lr=1.0, betas=(0.0, 0.0), **settings).step()
        moved.append((A, B)[1 - missing] - pair[1 - missing].detach())
    return moved


@pytest.mark.parametrize("shape", [(10, 7, 3), (6, 9, 4), (5, 5, 1)], ids=str)
def test_steps_are_projections_of_the_full_gradient(shape):
    A, B = (x.detach() for x in factors(*shape, dtype=DOUBLE))
    G, s = weight(shape[:2], 9, DOUBLE).detach(), 1.7
    dA, dB = steps_at(A, B, G, s, delta=0.0)
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    close(s * B @ dA, P_B @ G, 1e-10)
    close(s * dB @ A, G @ P_A, 1e-10)


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_steps_solve_the_least_squares_problem(delta):
    m, n, r = 6, 5, 2
    A, B = (x.detach() for x in factors(m, n, r, dtype=DOUBLE))
    G, s = weight((m, n), 9, DOUBLE).detach(), 1.7
    dA, dB = steps_at(A, B, G, s, delta=delta)
    eye = torch.eye
    for J, D, N in (
        (s * torch.kron(B, eye(n, dtype=DOUBLE)), dA, r * n),
        (s * torch.kron(eye(m, dtype=DOUBLE), A.mT.contiguous()), dB, m * r),
    ):
        J = torch.cat([J, s * delta**0.5 * eye(N, dtype=DOUBLE)])
        y = torch.cat([G.flatten(), torch.zeros(N, dtype=DOUBLE)])
        want = torch.linalg.lstsq(J, y[:, None], driver="gelsd").solution
        close(D.flatten(), want.flatten(), 1e-9)


# how the product is split into factors


def gap(Q, steps=20, momentum=True, **settings):
    """Largest distance of W between runs from (A, B) and (Q A, B Q^-1)."""
    problem = LeastSquares(12, 9)
    A, B = (x.detach() for x in factors(12, 9, 3, dtype=DOUBLE))
    runs, moments = [], []
    for a, b in ((A, B), (Q @ A, B @ torch.linalg.inv(Q))):
        a, b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())
        optimizer = made(a, b, lr=0.05, **settings)
        runs.append([problem.W(*x) for x in follow(optimizer, a, b, problem, steps)])
        moments.append(optimizer.state[a]["exp_avg"])
    far = max(float((x - y).abs().max()) for x, y in zip(*runs, strict=True))
    return far, float((Q @ moments[0] - moments[1]).abs().max())


@pytest.mark.parametrize("schedule", ["both", "alternate"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("compact", [False, True])
def test_any_change_of_basis_leaves_w_alone(schedule, weight_decay, compact):
    options = {"schedule": schedule, "weight_decay": weight_decay, "compact_alignment": compact}
    far, moment = gap(invertible(3), delta=0.0, **options)
    assert far <= 1e-8 and moment <= 1e-8


def test_damping_leaves_orthogonal_changes_alone_only():
    assert gap(invertible(3, orthogonal=True), delta=1e-3)[0] <= 1e-8
    assert gap(invertible(3), delta=1e-3)[0] > 1e-6
    assert gap(invertible(3), delta=0.0, **PLUS)[0] > 1e-6
    assert gap(invertible(3, orthogonal=True), delta=0.0, **PLUS)[0] > 1e-6


# the momentum that is carried along


def carried(move, delta=0.0, **settings):
    """M before, B before, M after a step without gradient signal, B after `move`."""
    A, B = factors(10, 7, 3, dtype=DOUBLE)
    GA, GB = pair_gradients(10, 7, 3, 1, dtype=DOUBLE)
    optimizer = made(A, B, lr=1e-30, delta=delta, betas=(0.5, 0.9), **settings)
    run(optimizer, [A, B], [GA, GB])
    M, old = optimizer.state[A]["exp_avg"].clone(), B.detach().clone()
    B.data.copy_(move(B.detach()))
    A.grad, B.grad = torch.zeros_like(A), None
    optimizer.step()
    return M, old, optimizer.state[A]["exp_avg"] / 0.5, B.detach()


def test_alignment_is_least_squares():
    M, old, new, B = carried(lambda B: B + 0.3 * torch.ones_like(B).cumsum(0))
    want = torch.linalg.lstsq(B, old @ M).solution
    close(new, want, 1e-10)


def test_a_change_of_basis_is_followed_exactly():
    N = invertible(3)
    M, _, new, _ = carried(lambda B: B @ torch.linalg.inv(N))
    close(new, N @ M, 1e-10)


def test_a_factor_that_did_not_move_does_not_shrink_the_momentum():
    M, _, new, _ = carried(lambda B: B, delta=1.0)
    close(new, M, 1e-15)
    M, _, new, _ = carried(lambda B: B, delta=1.0, compat="reference")
    assert float(new.norm()) < 0.99 * float(M.norm())


# B = 0


@pytest.mark.parametrize("delta", [0.0, 1e-5])
@pytest.mark.parametrize("plus", [{}, PLUS], ids=["altlora", "plus"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_while_b_is_zero_a_waits(delta, plus, dtype):
    A, B = factors(10, 7, 3, dtype=dtype, zero=True)
    GA, GB = pair_gradients(10, 7, 3, 3)
    optimizer = made(A, B, lr=0.02, delta=delta, **plus)
    before = A.detach().clone()
    run(optimizer, [A, B], [[torch.zeros_like(GA[0])], GB[:1]])
    assert torch.equal(A.detach(), before) and bool(B.detach().any())
    assert int(optimizer.state[A]["count"]) == 0 and int(optimizer.state[B]["count"]) == 1
    run(optimizer, [A, B], [GA[1:], GB[1:]])
    assert bool(A.isfinite().all()) and bool(B.isfinite().all())
    assert int(optimizer.state[A]["count"]) == 2 and not torch.equal(A.detach(), before)


def test_noise_in_a_gradient_does_not_move_a_while_b_is_zero():
    A, B = factors(10, 7, 3, zero=True)
    before = A.detach().clone()
    A.grad = torch.ones_like(A)
    made(A, B, lr=0.1).step()
    assert torch.equal(A.detach(), before)


# the scale


def test_alpha_does_not_change_the_first_step_of_w():
    problem, moves = LeastSquares(12, 9), {}
    for aware in (True, False):
        for s in (2.0, 4.0):
            problem.s = s
            A, B = factors(12, 9, 3, dtype=DOUBLE, zero=True)
            optimizer = made(A, B, s, lr=0.01, delta=0.0, scale_aware=aware)
            moves[aware, s] = problem.W(*follow(optimizer, A, B, problem, 1)[0]) - problem.W0
    close(moves[True, 4.0], moves[True, 2.0], 1e-12)
    close(moves[False, 4.0], 4 * moves[False, 2.0], 1e-10)


# schedulers


def test_lr_zero_moves_the_momentum_only():
    A, B = factors(10, 7, 3)
    optimizer = made(A, B, lr=0.1)
    before, (GA, GB) = [A.detach().clone(), B.detach().clone()], pair_gradients(10, 7, 3, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, [A, B], [GA, GB])
    assert same(before, [A.detach(), B.detach()])
    assert bool(optimizer.state[A]["exp_avg"].any()) and bool(optimizer.state[B]["exp_avg"].any())


def test_lr_ratio_b_multiplies_the_step_of_b():
    moved = []
    for ratio in (None, 4.0):
        A, B = factors(10, 7, 3, dtype=DOUBLE)
        GA, GB = pair_gradients(10, 7, 3, 1, dtype=DOUBLE)
        before = A.detach().clone(), B.detach().clone()
        run(made(A, B, lr=1e-3, lr_ratio_b=ratio), [A, B], [GA, GB])
        moved.append([A.detach() - before[0], B.detach() - before[1]])
    close(moved[1][0], moved[0][0], 0.0)
    close(moved[1][1], 4 * moved[0][1], 1e-14)


# low precision


@pytest.mark.parametrize("plus", [{}, PLUS], ids=["altlora", "plus"])
def test_bf16_factors_take_the_float32_step(plus):
    low = factors(40, 30, 4, dtype=torch.bfloat16)
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    GA, GB = pair_gradients(40, 30, 4, 1, dtype=torch.bfloat16)
    before = [p.detach().clone() for p in high]
    for pair in (low, high):  # steps of the size of the factors, which bfloat16 resolves
        lr = 0.5 if plus else 500.0
        run(made(*pair, lr=lr, write="nearest", **plus), list(pair), [GA, GB])
    assert torch.equal(low[0].detach(), high[0].detach().bfloat16())  # B sees the rounded A
    for p, q, start in zip(low, high, before, strict=True):
        a, b = p.detach().float() - start, q.detach() - start
        assert float((a * b).sum() / (a.norm() * b.norm())) > 0.99


# alternation


@pytest.mark.parametrize("switch_every", [1, 3])
@pytest.mark.parametrize("first", ["A", "B"])
def test_the_idle_factor_and_its_state_stay(switch_every, first):
    A, B = factors(10, 7, 3)
    optimizer = made(A, B, lr=0.05, weight_decay=0.1, schedule="alternate",
                     switch_every=switch_every, first=first)  # fmt: skip
    GA, GB = pair_gradients(10, 7, 3, 8)
    optimizer.init_state()
    for t in range(8):
        idle = (
            (A if first == "B" else B) if t // switch_every % 2 == 0 else (B if first == "B" else A)
        )
        own = ("exp_avg", "count")
        before = idle.detach().clone(), [optimizer.state[idle][key].clone() for key in own]
        moving = (B if idle is A else A).detach().clone()
        run(optimizer, [A, B], [GA[t : t + 1], GB[t : t + 1]])
        after = idle.detach().clone(), [optimizer.state[idle][key] for key in own]
        assert same(before, after)
        assert not torch.equal(moving, (B if idle is A else A).detach())


# compact alignment


@pytest.mark.parametrize("plus", [{}, PLUS], ids=["altlora", "plus"])
@pytest.mark.parametrize("schedule", ["both", "alternate"])
def test_compact_alignment_is_the_same(plus, schedule):
    problem, outs = LeastSquares(12, 9), []
    for compact in (False, True):
        A, B = factors(12, 9, 3, dtype=DOUBLE)
        optimizer = made(A, B, lr=0.05, compact_alignment=compact, schedule=schedule, **plus)
        outs.append(follow(optimizer, A, B, problem, 12))
    for (a, b), (c, d) in zip(*outs, strict=True):
        close(a, c, 1e-10)
        close(b, d, 1e-10)


# memory


@pytest.mark.parametrize(
    ("settings", "extra"),
    [({}, 0), (PLUS, 1), ({"compact_alignment": True}, None)],
    ids=["altlora", "plus", "compact"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_is_as_many_numbers_as_the_docstring_counts(settings, extra, dtype):
    m, n, r = 40, 30, 4
    A, B = factors(m, n, r, dtype=dtype)
    GA, GB = pair_gradients(m, n, r, 1)
    optimizer = made(A, B, **settings)
    run(optimizer, [A, B], [GA, GB])
    values = [v for p in (A, B) for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    count = r * (m + n) + 2 * r * r if extra is None else (2 + extra) * r * (m + n)
    assert sum(v.nbytes for v in values) == 4 * count + 2 * 4  # and two counters
    report = memory_report(pairs_to_groups([(A, B)], scale=2.0), AltLoRA, **settings)
    assert report.state == 4 * count + 2 * 4


# it trains


@pytest.mark.parametrize("schedule", ["both", "alternate"])
def test_the_loss_falls(schedule):
    problem = LeastSquares(30, 40)
    A, B = factors(30, 40, 4, dtype=DOUBLE, zero=True)
    before = problem.loss(A.detach(), B.detach())
    follow(made(A, B, lr=0.2, schedule=schedule), A, B, problem, 300)
    assert problem.loss(A.detach(), B.detach()) < before / 100


def test_the_step_can_be_held_to_a_share_of_the_factor():
    """Without it the first step of A after B = 0 is as large as A however small lr is."""
    problem, largest = LeastSquares(30, 40), {}
    for cap in (None, 0.1):
        A, B = factors(30, 40, 4, dtype=DOUBLE, zero=True)
        before = A.detach().clone()
        a = follow(made(A, B, lr=0.03, max_rel_step=cap), A, B, problem, 6)
        ends = [before, *(x for x, _ in a)]
        largest[cap] = max(float((y - x).norm() / x.norm()) for x, y in itertools.pairwise(ends))
    assert largest[None] > 0.5 and largest[0.1] <= 0.1 + 1e-12


@pytest.mark.parametrize("settings", [{}, PLUS, {"compact_alignment": True}], ids=str)
def test_experts_are_pairs_of_their_own(settings):
    E, m, n, r = 3, 8, 6, 2
    A, B = weight((E, r, n), 0, DOUBLE), weight((E, m, r), 1, DOUBLE)
    separate = [[torch.nn.Parameter(x[e].detach().clone()) for x in (A, B)] for e in range(E)]
    draw = torch.Generator().manual_seed(0)
    optimizer = made(A, B, lr=0.05, **settings)
    each = [made(*pair, lr=0.05, **settings) for pair in separate]
    for _ in range(4):
        A.grad, B.grad = (torch.randn(x.shape, generator=draw, dtype=DOUBLE) for x in (A, B))
        optimizer.step()
        for e, (pair, own) in enumerate(zip(separate, each, strict=True)):
            pair[0].grad, pair[1].grad = A.grad[e], B.grad[e]
            own.step()
            close(A.detach()[e], pair[0].detach(), 1e-12)
            close(B.detach()[e], pair[1].detach(), 1e-12)


def test_singular_factors_are_damped_not_left_out():
    A, B = factors(10, 7, 3, dtype=torch.float32)
    B.data[:, 2] = B.data[:, 1]
    GA, GB = pair_gradients(10, 7, 3, 1)
    before = A.detach().clone()
    GA[0][2] = GA[0][1]  # as the chain rule has it
    run(made(A, B, lr=0.1, delta=0.0), [A, B], [GA, GB])
    step = before - A.detach()
    assert bool(A.isfinite().all()) and 0 < float(step.norm()) < 10 * float(before.norm())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"delta": -1.0}, "delta must be at least 0"),
        ({"schedule": "neither"}, "schedule must be one of"),
        ({"second_moment": "full"}, "second_moment must be one of"),
        ({"switch_every": 0}, "switch_every must be an int of at least 1"),
        ({"first": "W"}, "first must be one of"),
        ({"max_rel_step": 0.0}, "max_rel_step must be positive"),
        ({"compat": "reference", "compact_alignment": True}, "leave compact_alignment out"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"delta_mode": "some"}, "delta_mode must be one of"),
        ({"lr_ratio_b": -1.0}, "lr_ratio_b must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        made(*factors(10, 7, 3), **wrong)
