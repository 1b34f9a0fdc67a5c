"""Fira: its residual, its growth limit, the recorded trajectories, its bounds."""

import itertools
import math
import sys

import pytest
import torch
from helpers.allocations import count_second_step
from helpers.checkpoints import check_resume
from helpers.paths import BENCH, FIXTURES
from helpers.peers import Missing, fira_adamw
from helpers.problems import (
    check_refusal,
    doubles,
    gradients,
    run,
    same,
    tensors,
    trajectory,
    unsolved,
    weight,
)
from helpers.recordings import fed, fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SQUARE, TALL, WIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.fira import fira, side

from stiefel.kernels.reference import reductions as sums
from stiefel.optimizers import Fira, GaLore
from stiefel.optimizers import fira as module
from stiefel.optimizers._driver import units
from stiefel.optimizers._driver.write import WRITE_PANEL
from stiefel.optimizers._toolkit.moments import column_squares, total
from stiefel.optimizers._toolkit.projectors import PROJECTION_KINDS
from stiefel.optimizers.fira import matrix_factor, norm_growth_limiter

sys.path.append(str(BENCH))

from first_steps import INPUTS, LR, step_sizes

RECORDED = sorted(path.stem for path in FIXTURES.glob("fira-*.json"))
SIDES = ["std", "reverse_std", "right", "left", "full"]
VARIANTS = ["reference", "paper"]
DOUBLE = torch.float64
BASE = {"lr": 0.02, "rank": 3, "update_proj_gap": 4}

variants = pytest.mark.parametrize("variant", VARIANTS)


def steps_of(shape, steps=9, grads=None, **settings):
    """Runs in float64 with lr 1 and yields per step what the weights and the state tell of S.

    Entries: S, the residual before the limiter, P, R, N, phi, L; turned so that rows are projected.
    """
    p = weight(shape, dtype=DOUBLE)
    settings = {"lr": 1.0, "rank": 3, "update_proj_gap": 4, "eps": 1e-8, **settings}
    optimizer = Fira([p], **settings)
    right = side(shape, settings.get("proj_type", "std"))
    group, out = optimizer.param_groups[0], []
    alpha, paper = group["alpha"], group["variant"] == "paper"
    for t, G in enumerate(doubles(shape, steps) if grads is None else grads, 1):
        before, p.grad = p.detach().clone(), G
        optimizer.step()
        step, state = before - p.detach(), optimizer.state[p]
        step, G = (step.mT, G.mT) if right else (step, G)
        c1, c2 = (1 - beta**t for beta in group["betas"])
        c = math.sqrt(c2) / c1
        N = (state["exp_avg"] / c1) / ((state["exp_avg_sq"] / c2).sqrt() + group["eps"])
        P = state["basis"].clone()
        R = P.mT @ G
        if paper:
            a, S = 1.0, step / alpha - P @ N
        else:
            N = N / c
            a, S = alpha, step / c - alpha * P @ N
        phi = N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        raw = phi * (G - a * P @ R)
        stored = state["limiter_norm"].item() if group["limiter"] else None
        out.append({"W": p.detach().clone(), "S": S, "raw": raw, "P": P, "R": R, "N": N,
                    "phi": phi, "L": float(raw.norm() / S.norm()), "stored": stored})  # fmt: skip
    return out


# the published code, and the oracle


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectory(name, monkeypatch):
    """Weights and stored norms of the package fira 1.0.2 over 2T + 3 steps, its bases fed."""
    data = fixture(name)
    p = torch.nn.Parameter(data["W0"].clone())
    settings, group = data["settings"]["optimizer"], data["settings"]["group"]
    optimizer = Fira([{"params": [p], **group}], compat="reference", **settings)
    stored = fed(data, monkeypatch)
    bound = tolerance(data, "max_abs_diff_to_float64_run")
    for G, R, norm in zip(data["grads"], data["W"], data["limiter_norm"], strict=True):
        run(optimizer, [p], [[G]])
        assert float((p.detach() - R).abs().max()) <= bound
        assert math.isclose(float(optimizer.state[p]["limiter_norm"]), norm, rel_tol=1e-5)
    assert next(stored, None) is None


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_bases_are_ours_up_to_signs(name):
    data = fixture(name)
    p = torch.nn.Parameter(data["W0"].clone())
    group = data["settings"]["group"]
    optimizer = Fira(
        [{"params": [p], **group}], compat="reference", **data["settings"]["optimizer"]
    )
    recorded = {entry["step"]: entry["basis"] for entry in data["bases"]}
    for step, G in enumerate(data["grads"]):
        p.grad = G
        optimizer.step()
        if step in recorded:
            P, B = optimizer.state[p]["basis"], torch.tensor(recorded[step])
            B = B if B.shape == P.shape else B.mT
            torch.testing.assert_close(P @ P.mT, B @ B.mT, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_equals_the_published_package(shape, kind):
    """The installed package, step by step over two windows: LAPACK is the same for both."""
    try:
        theirs = fira_adamw()
    except Missing as why:
        pytest.skip(str(why))
    p, q = weight(shape), weight(shape)
    keys = {"rank": 4, "update_proj_gap": 4, "alpha": 0.5, "proj_type": kind}
    own = Fira([{"params": [p], **keys}], lr=0.01, weight_decay=0.1, compat="reference")
    other = theirs(
        [{"params": [q], **keys}], lr=0.01, weight_decay=0.1, no_deprecation_warning=True
    )
    grads = gradients(shape, 9)
    for a, b in zip(run(own, [p], [grads]), run(other, [q], [grads]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.covering(strength=3)
@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
@pytest.mark.parametrize(
    "form", [{}, {"variant": "paper"}, {"compat": "reference"}, {"limiter": False}]
)
def test_equals_the_oracle(shape, kind, scaling, form):
    """And the stored norms: 12, one lift and a norm in closed form against two lifts."""
    p, grads = weight(shape, dtype=DOUBLE), doubles(shape, 9)
    settings = {**BASE, "alpha": 0.7, "weight_decay": 0.1, "proj_type": kind, "eps": 1e-6,
                "scaling": scaling, **form}  # fmt: skip
    optimizer, bases, ours = Fira([p], **settings), [], []
    for step, G in enumerate(grads):
        p.grad = G
        optimizer.step()
        state = optimizer.state[p]
        ours.append((p.detach().clone(), float(state.get("limiter_norm", 0.0))))
        if step % 4 == 0:
            P, right = state["basis"].clone(), side(shape, kind)
            pair = (None, P) if right else (P, None)
            bases.append((P, state["basis_right"].clone()) if right is None else pair)
    theirs = fira(weight(shape, dtype=DOUBLE).detach(), grads, bases=bases, **settings)
    for (W, norm), entry in zip(ours, theirs, strict=True):
        torch.testing.assert_close(W, entry["W"], rtol=0, atol=1e-8)
        if "limiter" not in form:
            assert math.isclose(norm, entry["stored"], rel_tol=1e-6, abs_tol=1e-6)


# bfloat16: seven roundings of weights below 4, half a unit of 2^-6 each
@variants
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.bfloat16, 7 * 2**-7)])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD])
def test_narrow_dtypes_follow_the_oracle(shape, dtype, atol, variant):
    settings = {**BASE, "alpha": 0.5, "variant": variant}
    ours = trajectory(lambda ps: Fira(ps, **settings), shape, 7, dtype=dtype)
    grads = [G.to(dtype) for G in gradients(shape, 7)]
    theirs = fira(weight(shape, dtype=dtype).detach(), grads, **settings)
    torch.testing.assert_close(ours[-1].double(), theirs[-1]["W"], rtol=0, atol=atol)


# the residual of both variants


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("form", [{"variant": "paper"}, {"alpha": 1.0}])
@pytest.mark.parametrize("limiter", [False, True])
def test_the_residual_is_orthogonal_to_the_subspace(shape, form, limiter):
    for e in steps_of(shape, limiter=limiter, **form):
        assert float((e["P"].mT @ e["S"]).norm()) <= 1e-5 * float(e["S"].norm())


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_as_published_it_keeps_a_share_of_the_projected_gradient(shape):
    for e in steps_of(shape, alpha=0.25):
        kept = 0.75 * e["phi"] * e["R"] / e["L"]
        torch.testing.assert_close(e["P"].mT @ e["S"], kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_variants_agree_at_alpha_1_without_limiter(shape):
    def moved(variant, limiter):
        return [e["W"] for e in steps_of(shape, alpha=1.0, variant=variant, limiter=limiter)]

    for a, b in zip(moved("paper", False), moved("reference", False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    a, b = moved("paper", True), moved("reference", True)
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-5)
    assert float((a[-1] - b[-1]).abs().max()) > 1e-3


# the limiter


@variants
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_the_residual_grows_by_one_percent_at_most(shape, variant):
    entries = steps_of(shape, 20, variant=variant)
    assert any(e["L"] > 1.001 for e in entries)
    for last, e in itertools.pairwise(entries):
        assert float(e["S"].norm()) <= 1.01 * (last["stored"] + 1e-8) * (1 + 1e-9)
        assert e["L"] >= 1 - 1e-9
        assert math.isclose(float(e["S"].norm()), e["stored"], rel_tol=1e-9)


def test_falling_norms_pass_and_a_jump_is_spread_over_seventy_steps():
    stored = torch.full((1, 1, 1), -1.0, dtype=DOUBLE)

    def limited(norm):
        return float(norm_growth_limiter(torch.full((1, 1, 1), norm, dtype=DOUBLE), stored))

    assert [limited(x) for x in (5.0, 4.0, 4.0, 1.0)] == [1.0] * 4
    grown = []
    while limited(2.0) > 1.0:
        grown.append(float(stored))
    assert len(grown) == 69  # 1.01^69 < 2 <= 1.01^70
    for a, b in zip([1.0, *grown], grown, strict=False):
        assert math.isclose(b, 1.01 * (a + 1e-8), rel_tol=1e-12)
    assert float(stored) == 2.0


@variants
def test_the_limiter_keeps_the_direction(variant):
    for e in steps_of(WIDE, 12, variant=variant):
        torch.testing.assert_close(e["S"], e["raw"] / e["L"], rtol=0, atol=1e-9)


@variants
def test_the_first_step_is_free_and_no_limiter_is_an_infinite_gamma(variant):
    assert math.isclose(steps_of(WIDE, 1, variant=variant)[0]["L"], 1.0, rel_tol=1e-9)
    a = steps_of(WIDE, variant=variant, limiter=False)
    b = steps_of(WIDE, variant=variant, gamma=math.inf)
    assert all(torch.equal(x["W"], y["W"]) for x, y in zip(a, b, strict=True))


# the size of a step

FORMS = [
    {"variant": variant, "scaling": scaling, "limiter": limiter}
    for variant in VARIANTS
    for scaling in ("column", "matrix")
    for limiter in (True, False)
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


@pytest.mark.covering
@forms
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("name", INPUTS)
def test_no_step_of_the_first_ten_is_beyond_100_lr(name, proj_type, form):
    make, rank = INPUTS[name]
    assert max(step_sizes(Fira, *make(), rank=rank, proj_type=proj_type, **form)) < 100


@pytest.mark.covering
@variants
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("projection", [*PROJECTION_KINDS, "dct:l1"])
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_no_projection_takes_a_step_beyond_100_lr(name, projection, variant, moments):
    make, rank = INPUTS[name]
    sizes = step_sizes(
        Fira, *make(), rank=rank, projection=projection, variant=variant, moments=moments,
        update_proj_gap=3,
    )  # fmt: skip
    assert max(sizes) < 100


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, DOUBLE])
@pytest.mark.parametrize("name", INPUTS)
def test_no_dtype_takes_a_step_beyond_100_lr(name, dtype, form):
    (W, gradient), rank = INPUTS[name][0](), INPUTS[name][1]
    assert max(step_sizes(Fira, W.to(dtype), gradient, rank=rank, **form)) < 100


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 40), st.integers(1, 12),
    st.sampled_from([0.0, 3.0, 9.0, 16.0]), st.sampled_from(["entries", "rows", "columns"]),
    st.sampled_from(FORMS), st.sampled_from(SIDES),
)  # fmt: skip
def test_gradients_of_mixed_scale_take_no_large_step(seed, m, n, r, decades, what, form, proj_type):
    """The scales change at random from step to step, so moments and basis are of another time."""
    draw = torch.Generator().manual_seed(seed)
    shape = {"entries": (m, n), "rows": (m, 1), "columns": (1, n)}[what]

    def gradient(W):
        scales = 10 ** (-decades * torch.rand(shape, generator=draw))
        return scales * torch.randn(m, n, generator=draw)

    sizes = [*step_sizes(Fira, torch.zeros(m, n), gradient, rank=r, proj_type=proj_type, **form)]
    assert max(sizes) < 100, sizes


@pytest.mark.covering
@forms
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("c", [2.0**-10, 2.0**20])
def test_a_bounded_step_is_scale_free(name, proj_type, form, c):
    """G and c G give the same step, for gradients that the published 1e-8 and eps do not reach."""
    (W, gradient), rank = INPUTS[name][0](), INPUTS[name][1]

    def moved(c):
        p = torch.nn.Parameter(W.double())
        optimizer = Fira([p], lr=LR, rank=rank, proj_type=proj_type, eps=1e-60, **form)
        for G in fixed:
            p.grad = c * G
            optimizer.step()
        return p.detach()

    fixed = [2.0**30 * gradient(W).double() for _ in range(5)]
    torch.testing.assert_close(moved(c), moved(1.0), rtol=1e-5, atol=1e-6 * LR)


@variants
def test_a_column_moves_three_times_as_far_as_its_part_inside_at_most(variant):
    """By root mean square: at the bound is what the basis sees a millionth of, and nothing else."""
    W, gradient = INPUTS["noisy diagonal"][0]()
    G = gradient(W).double()
    p = torch.nn.Parameter(W.double())
    optimizer = Fira([p], lr=1.0, rank=2, alpha=1.0, variant=variant)
    run(optimizer, [p], [[G]])
    P = optimizer.state[p]["basis"]  # of a square weight the rows are what has a factor each
    R = G @ P
    N = R / (R.abs() + 1e-8)
    S = -p.detach() - N @ P.mT
    growth = S.square().mean(1).sqrt() / N.square().mean(1).sqrt()
    torch.testing.assert_close(growth[2:], torch.full((4,), 3.0, dtype=DOUBLE), rtol=1e-4, atol=0)
    residual = (G - R @ P.mT).norm(dim=1)
    published = residual * N.norm(dim=1) / R.norm(dim=1)
    torch.testing.assert_close(S.norm(dim=1)[:2], published[:2], rtol=0, atol=1e-8)


@forms
@pytest.mark.parametrize("kind", SIDES)
def test_a_bounded_step_equals_the_oracle(kind, form):
    """Columns of which the basis sees little, and a few that outweigh the rest."""
    draw = torch.Generator().manual_seed(1)
    scales = 10 ** (-7 * torch.rand(20, 26, generator=draw, dtype=DOUBLE))
    grads = [scales * torch.randn(20, 26, generator=draw, dtype=DOUBLE) for _ in range(6)]
    own = {"lr": 0.02, "rank": 3, "proj_type": kind, "eps": 1e-8, **form}
    p = weight((20, 26), dtype=DOUBLE)
    ours = [W[0] for W in run(Fira([p], **own), [p], [grads])]
    theirs = fira(weight((20, 26), dtype=DOUBLE).detach(), grads, **own)
    for W, entry in zip(ours, theirs, strict=True):
        torch.testing.assert_close(W, entry["W"], rtol=0, atol=1e-7)


@forms
@pytest.mark.parametrize("late", [False, True])
def test_a_bounded_step_of_a_stack_has_the_bits_of_a_single_one(form, late, monkeypatch):
    """Also where the host does not wait for flags, one of which is bad."""
    make, rank = INPUTS["noisy diagonal"]
    _, gradient = make()
    grads = [[gradient(None) for _ in range(5)] for _ in range(3)]
    grads[1][2] = grads[1][2] * math.nan

    def once():
        params = [torch.nn.Parameter(torch.zeros(6, 6)) for _ in grads]
        optimizer = Fira(params, rank=rank, **form)
        optimizer._wait = False if late else None
        run(optimizer, params, grads)
        return [p.detach() for p in params], tensors(optimizer)

    stacked = once()
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    assert same(stacked, once())
    assert all(W.isfinite().all() for W in stacked[0])


@forms
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30, 1e37])
def test_gradients_of_any_size_take_finite_steps(size, form):
    """Among them columns that fall from 1 to it, so that phi is as large as it gets."""
    draw = torch.Generator().manual_seed(0)

    def gradient(W):
        G = torch.randn(6, 9, generator=draw)
        return torch.where(torch.rand(1, 9, generator=draw) < 0.5, G, G.clamp(-3, 3) * size)

    for source in (gradient, lambda W: torch.randn(6, 9, generator=draw).clamp(-3, 3) * size):
        sizes = [*step_sizes(Fira, torch.zeros(6, 9), source, rank=2, **form)]
        assert all(map(math.isfinite, sizes)) and max(sizes) < 100, sizes


# special cases and symmetries


@pytest.mark.parametrize("form", [{"variant": "paper"}, {"alpha": 1.0}])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_at_full_rank_it_is_galore(shape, form):
    alpha = form.get("alpha", 0.25)
    settings = {"lr": 0.02, "rank": 1.0, "update_proj_gap": 5}
    ours = trajectory(lambda ps: Fira(ps, **settings, **form), shape, 12)
    theirs = trajectory(lambda ps: GaLore(ps, scale=alpha, **settings), shape, 12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@variants
def test_after_a_zero_residual_it_recovers_in_one_step(variant):
    grads = [torch.zeros(WIDE, dtype=DOUBLE), *doubles(WIDE, 50)]
    ours = steps_of(WIDE, grads=grads, variant=variant)
    assert ours[0]["stored"] == 0.0
    assert math.isclose(ours[1]["L"], 1.0, rel_tol=1e-9)


def test_as_published_it_starves():
    grads = [torch.zeros(WIDE), *gradients(WIDE, 50)]
    p, q = weight(WIDE), weight(WIDE)
    exact = Fira([p], rank=3, compat="reference")
    run(exact, [p], [grads])
    starved = float(exact.state[p]["limiter_norm"])
    assert math.isclose(starved, 1.01e-6 * (1.01**50 - 1), rel_tol=1e-4)
    usual = Fira([q], rank=3)
    run(usual, [q], [grads])
    assert float(usual.state[q]["limiter_norm"]) > 1e5 * starved


@variants
def test_one_column_has_one_factor(variant):
    settings = {"proj_type": "left", "variant": variant, **BASE}
    a = trajectory(lambda ps: Fira(ps, scaling="column", **settings), COLUMN, 9)
    b = trajectory(lambda ps: Fira(ps, scaling="matrix", **settings), COLUMN, 9)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@variants
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_the_gradients_size_does_not_matter(variant, scaling):
    def moved(c):
        grads = [c * G for G in doubles(WIDE, 9)]
        return steps_of(WIDE, grads=grads, variant=variant, scaling=scaling, eps=1e-300)[-1]["W"]

    torch.testing.assert_close(moved(1e6), moved(1e4), rtol=0, atol=1e-9)


@variants
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
def test_one_shared_lift_equals_two(variant, dtype, atol, monkeypatch):
    """The direction itself, and the norm in closed form, against phi (G - a P R) made whole."""
    p, seen, original = weight(WIDE, dtype=dtype), [], module.FiraRule.update
    optimizer, paper = Fira([p], variant=variant, **BASE), variant == "paper"

    def spy(self, w):
        seen.append(original(self, w))
        return seen[-1]

    monkeypatch.setattr(module.FiraRule, "update", spy)
    for G in gradients(WIDE, 6, dtype=dtype):
        p.grad = G
        optimizer.step()
        lift, scaled = seen[-1].terms
        state, a = optimizer.state[p], 1.0 if paper else 0.25
        P, t = state["basis"], state["step"]
        S = scaled.by[0] * (G - a * P @ (P.mT @ G))
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t
        N = (state["exp_avg"] / c1) / ((state["exp_avg_sq"] / c2).sqrt() + 1e-8)
        one, two = (lift.P @ lift.N)[0] + scaled.by[0] * G, a * P @ N + S
        torch.testing.assert_close(one, two, rtol=atol, atol=atol)
        norm = float(S.norm()) / (1.0 if paper else math.sqrt(c2) / c1)
        assert math.isclose(float(state["limiter_norm"]), norm, rel_tol=10 * atol)


# state, sides, bad gradients, convergence


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_state_elements_equal_the_table(shape, kind):
    r, small, large = 3, min(shape), max(shape)
    p, q = weight(shape), weight(shape)
    want = {
        "std": r * (small + 2 * large),
        "reverse_std": r * (large + 2 * small),
        "full": r * sum(shape) + 2 * r * r,
        "right": r * (shape[1] + 2 * shape[0]),
        "left": r * (shape[0] + 2 * shape[1]),
    }[kind]
    for limiter, weight_, extra in ((True, p, 1), (False, q, 0)):
        optimizer = Fira([weight_], rank=r, proj_type=kind, limiter=limiter)
        run(optimizer, [weight_], [gradients(shape, 2)])
        held = [x for x in optimizer.state[weight_].values() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() for x in held) == want + extra
        assert sum(x.untyped_storage().nbytes() for x in held) == 4 * (want + extra)


@variants
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical_mid_window_too(stop, dtype, variant):
    def make():
        params = [weight(TALL, 0, dtype), weight(WIDE, 1, dtype), weight((4,), 2, dtype)]
        return params, Fira(params, variant=variant, **BASE)

    def loaded(optimizer, params):
        assert "limiter_norm" in optimizer.state[params[0]]

    grads = [gradients(TALL, 9, 0), gradients(WIDE, 9, 1), [torch.ones(4)] * 9]
    check_resume(make, grads, stop, loaded=loaded)


@variants
@pytest.mark.parametrize("scaling", ["column", "matrix"])
@pytest.mark.parametrize("kinds", [("std", "std"), ("reverse_std",) * 2, ("left", "right")])
def test_sides_are_symmetric(variant, scaling, kinds):
    p = weight(TALL)
    q = torch.nn.Parameter(p.detach().mT.contiguous())
    settings = {"variant": variant, "scaling": scaling, **BASE}
    grads = gradients(TALL, 9)
    a = run(Fira([p], proj_type=kinds[0], **settings), [p], [grads])
    transposed = [G.mT.contiguous() for G in grads]
    b = run(Fira([q], proj_type=kinds[1], **settings), [q], [transposed])
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[0], y[0].mT, rtol=0, atol=5e-6)


@variants
def test_a_bad_gradient_poisons_no_norm(variant):
    """A NaN never gets here; squares that overflow do, and are not stored."""
    p, grads = weight(WIDE), gradients(WIDE, 3)
    optimizer = Fira([p], variant=variant, rank=3)
    run(optimizer, [p], [grads[:2]])
    before, kept = optimizer.state[p]["limiter_norm"].clone(), p.detach().clone()
    run(optimizer, [p], [[torch.full(WIDE, float("nan"))]])
    assert optimizer.skipped == {0: 1} and torch.equal(optimizer.state[p]["limiter_norm"], before)
    assert torch.equal(p.detach(), kept)
    run(optimizer, [p], [[1e25 * grads[2]]])
    assert torch.equal(optimizer.state[p]["limiter_norm"], before)
    assert p.isfinite().all()
    stored = torch.ones(3, 1, 1)
    L = norm_growth_limiter(torch.tensor([math.nan, math.inf, 0.5]).view(3, 1, 1), stored)
    assert stored.flatten().tolist() == [1.0, 1.0, 0.5]
    assert L.flatten().tolist() == [math.inf, math.inf, 1.0]


def test_a_matrix_that_is_flagged_stores_no_norm():
    stored, finite = torch.ones(2, 1, 1), torch.tensor([1.0, 0.0])
    norm_growth_limiter(torch.full((2, 1, 1), 0.5), stored, finite=finite)
    assert stored.flatten().tolist() == [0.5, 1.0]


@variants
def test_a_fixed_subspace_does_not_stall(variant):
    """On a quadratic with a full-rank gradient GaLore stops at what its first basis misses."""
    draw = torch.Generator().manual_seed(3)
    target = torch.randn(16, 24, generator=draw)
    settings = {"lr": 0.1, "rank": 4, "update_proj_gap": 10**6}
    galore = unsolved(lambda ps: GaLore(ps, scale=1.0, **settings), target)
    ours = unsolved(lambda ps: Fira(ps, alpha=1.0, variant=variant, **settings), target)
    assert galore > 0.3 and ours < 0.1 * galore


# Beyond the paper


def test_rmsprop_form_is_betas_without_the_first_and_without_correction():
    p, grads = weight(WIDE, dtype=DOUBLE), doubles(WIDE, 4)
    start = p.detach().clone()
    settings = {"betas": (0.0, 0.9), "correct_bias": False, "compat": "reference"}
    optimizer = Fira([p], lr=0.02, rank=3, limiter=False, **settings)
    V, W = 0.0, start
    for G in grads:
        p.grad = G
        optimizer.step()
        P = optimizer.state[p]["basis"]
        R = P.mT @ G
        V = 0.9 * V + 0.1 * R * R
        psi = R / (V.sqrt() + 1e-6)
        phi = psi.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        W = W - 0.02 * (0.25 * P @ psi + phi * (G - 0.25 * P @ R))
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-10)


@variants
def test_a_column_that_the_subspace_misses_has_the_factor_of_the_matrix(variant):
    """Adam remembers it, so the published factor is |psi| / 1e-8."""
    grads = gradients((8, 12), 2)
    grads[0][0] = 0.0  # so the basis knows nothing of row 0
    grads[1][0] = 0.0
    grads[1][:, 4], grads[1][0, 4] = 0.0, 0.5

    def second_step(**settings):
        p = weight((8, 12))
        optimizer = Fira([p], lr=1.0, rank=3, limiter=False, **settings)
        first, second = run(optimizer, [p], [grads])
        return float((second[0] - first[0]).norm())

    assert second_step(variant=variant) < 100 < second_step(compat="reference")


def test_a_gradient_outside_the_subspace_moves_nothing_at_random():
    """R is round-off there: the residual has no scale and is left out."""
    p = weight((6, 8))
    optimizer = Fira([p], lr=1.0, rank=2, projection="topk")
    grads = [torch.zeros(6, 8), torch.zeros(6, 8)]
    grads[0][:2] = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    grads[1][4:] = grads[0][:2]
    W = [W[0] for W in run(optimizer, [p], [grads])]
    assert torch.equal(W[1][2:], W[0][2:])
    assert float((W[1] - W[0]).norm()) < 10


def test_a_refresh_that_leaves_no_residual_does_not_starve_the_next_steps():
    """The norm in closed form is then a difference of equals; it counts as zero."""
    shape, draw = (40, 300), torch.Generator().manual_seed(0)
    p = weight(shape)
    optimizer = Fira([p], rank=2, alpha=1.0, update_proj_gap=4)
    inside = torch.randn(40, 2, generator=draw) @ torch.randn(2, 300, generator=draw)
    run(optimizer, [p], [[inside]])
    assert float(optimizer.state[p]["limiter_norm"]) == 0.0
    run(optimizer, [p], [[torch.randn(shape, generator=draw)]])
    assert float(optimizer.state[p]["limiter_norm"]) > 1.0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (33, 7), (70, 5), (300, 600)])
def test_sums_of_squares_do_not_depend_on_stacking(shape, dtype, transposed, monkeypatch):
    draw = torch.Generator().manual_seed(5)
    X = torch.randn(3, *(shape[::-1] if transposed else shape), generator=draw).to(dtype)
    before, X = X.clone(), X.mT if transposed else X
    out = column_squares(X)
    torch.testing.assert_close(out, X.double().square().sum(-2, keepdim=True).to(dtype))
    torch.testing.assert_close(total(out), out.sum(-1, keepdim=True))
    for k in range(3):
        alone = X[k].mT.clone().mT if transposed else X[k].clone()
        assert torch.equal(column_squares(alone[None])[0], out[k])
        assert torch.equal(total(out[k : k + 1].clone())[0], total(out)[k])
        wide = torch.zeros(before.shape[1] + 5, before.shape[2] + 3, dtype=dtype)
        placed = wide[2:-3, 1:-2].copy_(before[k])  # starts on no line, and its rows lie apart
        assert torch.equal(column_squares((placed.mT if transposed else placed)[None])[0], out[k])
    assert torch.equal(before, X.mT if transposed else X)
    monkeypatch.setattr(sums, "_PANEL_DEVICES", ())  # the way of accelerators
    torch.testing.assert_close(column_squares(X), out)
    torch.testing.assert_close(total(out), out.sum(-1, keepdim=True))


@pytest.mark.covering
@variants
@pytest.mark.parametrize("projection", [*PROJECTION_KINDS, "dct:l1"])
@pytest.mark.parametrize("shape", [(12, 20), ODD, (5, 17), COLUMN])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
def test_views_equal_the_stack_for_every_projection(projection, shape, dtype, variant, monkeypatch):
    def once():
        params = [weight(shape, k, dtype) for k in range(3)]
        optimizer = Fira(
            params, projection=projection, moments="ldadam", variant=variant, lr=0.02, rank=3,
            update_proj_gap=2,
        )  # fmt: skip
        run(optimizer, params, [gradients(shape, 5, k) for k in range(3)])
        return [p.detach() for p in params], tensors(optimizer)

    stacked = once()
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    assert same(stacked, once())


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)])
@pytest.mark.parametrize("form", [{}, {"variant": "paper", "scaling": "matrix"}])
def test_a_step_needs_two_buffers_and_panels(shape, form):
    params = [weight(shape, k) for k in range(3)]
    optimizer = Fira(params, rank=64, **form)
    counter = count_second_step(optimizer, lambda p, seed: gradients(p.shape, 1, seed)[0])
    assert counter.peak <= 2 * 64 * 1024 * 4 + 2 * WRITE_PANEL * 4
    assert counter.largest <= max(64 * 1024, WRITE_PANEL) * 4


@variants
@pytest.mark.parametrize("projection", PROJECTION_KINDS)
def test_training_with_every_projection(projection, variant):
    """A quadratic is solved in a quarter of its rank."""
    draw = torch.Generator().manual_seed(3)
    target = torch.randn(16, 24, generator=draw)
    settings = {"lr": 0.1, "alpha": 1.0, "rank": 4, "update_proj_gap": 20, "variant": variant}
    make = lambda params: Fira(params, projection=projection, **settings)  # noqa: E731
    assert unsolved(make, target, 300) < 0.01


def test_every_matrix_of_a_batch_has_a_limiter_of_its_own():
    p = weight((3, 6, 9))
    grads = gradients((3, 6, 9), 5)
    optimizer = Fira([p], **BASE)
    run(optimizer, [p], [grads])
    assert optimizer.state[p]["limiter_norm"].shape == (3, 1, 1)
    for k in range(3):
        q = torch.nn.Parameter(weight((3, 6, 9)).detach()[k].clone())
        run(Fira([q], **BASE), [q], [[G[k] for G in grads]])
        torch.testing.assert_close(q.detach(), p.detach()[k], rtol=0, atol=1e-6)


@pytest.mark.covering
@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("form", [{}, {"variant": "paper"}, {"compat": "reference"}])
@pytest.mark.parametrize("shape", [TALL, SQUARE, ROW, COLUMN, (1, 1), (3, 6, 5), (4, 3, 2, 2)])
def test_no_shape_rank_or_zero_gradient_crashes(shape, kind, form):
    """Among them what crashes as published: a full side, and reverse_std with r >= n."""
    p, v = weight(shape), weight((4,))
    optimizer = Fira([p, v], lr=0.02, rank=50, update_proj_gap=2, proj_type=kind, **form)
    grads = [torch.zeros(shape), *gradients(shape, 3), torch.zeros(shape)]
    run(optimizer, [p, v], [grads, [torch.ones(4)] * 5])
    assert p.isfinite().all() and v.isfinite().all()


def test_groups_of_the_published_package_work_as_they_are():
    p, v = weight(WIDE), weight((5,))
    group = {"rank": 3, "update_proj_gap": 5, "alpha": 1.0, "proj_type": "std"}
    optimizer = Fira([{"params": [p], **group}, {"params": [v]}], lr=0.01, weight_decay=0.1)
    run(optimizer, [p, v], [gradients(WIDE, 3), [torch.ones(5)] * 3])
    assert [row.rule for row in optimizer.assignment()] == ["Fira", "adamw"]
    assert optimizer.param_groups[0]["alpha"] == 1.0


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"rank": 0}, "rank"),
        ({"update_proj_gap": 0}, "update_proj_gap must be an int of at least 1"),
        ({"update_proj_gap": 2.5}, "update_proj_gap must be an int"),
        ({"seed": -1}, "seed must be an int"),
        ({"proj_type": "middle"}, "proj_type must be one of"),
        ({"variant": "code"}, "variant must be one of"),
        ({"scaling": "row"}, "scaling must be one of"),
        ({"compat": "torch"}, "compat must be one of"),
        ({"gamma": 0.999}, "gamma must be at least 1"),
        ({"limiter_floor": -1e-9}, "limiter_floor must be at least 0"),
        ({"projection": "dct", "proj_type": "full"}, "no second side"),
        ({"moments": "match"}, "use moments='rotate'"),
        ({"compat": "reference", "variant": "paper"}, "variant='reference'"),
        ({"compat": "reference", "projection": "topk"}, "exact SVD"),
        ({"correct_bias": False}, "correct_bias=False exists only under"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"eps": -1.0}, "Invalid epsilon value"),
    ],
)
def test_bad_settings_are_one_sentence_for_constructor_and_group(bad, text):
    check_refusal(Fira, bad, text)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("share", "has_scale"), [(1e-4, True), (1e-8, True), (1e-14, False)])
def test_a_small_projection_has_a_scale_and_round_off_has_none(share, has_scale, size):
    """``share`` is the part of the gradient's square that the basis holds."""
    G = torch.full((1, 1, 1), size, dtype=torch.float64)
    found = matrix_factor(G, share * G, G, G, 12, 120)
    assert bool(found.isfinite().all()) and bool(found > 0) == has_scale
