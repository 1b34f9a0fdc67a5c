"""APOLLO: its factors, its draws, the recorded trajectories, and Fira without its lift."""

import math
import warnings

import pytest
import torch
from helpers.checkpoints import check_resume
from helpers.paths import FIXTURES
from helpers.peers import Missing, apollo_adamw
from helpers.problems import check_refusal, doubles, gradients, run, same, tensors, unsolved, weight
from helpers.recordings import fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SQUARE, TALL, WIDE
from oracles.apollo import apollo, is_transposed

from stiefel.optimizers import APOLLO, FRUGAL, Fira, GaLore, memory_report
from stiefel.optimizers._driver import finite
from stiefel.optimizers._toolkit import dense_projectors
from stiefel.optimizers._toolkit.projectors import DOWN_KINDS
from stiefel.optimizers._toolkit.random_keys import StackRNG

RECORDED = sorted(path.stem for path in FIXTURES.glob("apollo-*.json"))
DOUBLE = torch.float64
BASE = {"lr": 0.02, "rank": 3, "update_proj_gap": 4}
MINI = {"rank": 1, "scaling": "tensor", "projection": "gaussian", "scale": 128.0}


def published(data, monkeypatch):
    """Our settings of a recorded run, whose draws are handed out in turn."""
    stored = iter(data["projections"])

    def find(self, G, *old, rng, transposed=False):
        P = torch.tensor(next(stored)["matrix"], dtype=torch.float32)
        return ((P.mT if transposed else P)[None],)

    monkeypatch.setattr(dense_projectors.GaussianProjector, "find", find)
    given = dict(data["settings"]["optimizer"])
    front, limiter = given.pop("scale_front"), not given.pop("disable_nl")
    return {**given, "scale_front": front, "limiter": limiter, "compat": "reference"}, stored


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectory(name, monkeypatch):
    """Weights, stored norms and moments of apollo-torch 1.0.3, its groups as they are."""
    data = fixture(name)
    settings, stored = published(data, monkeypatch)
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = APOLLO([{"params": [p], **data["settings"]["group"]}], **settings)
    norms = data["limiter_norm"] or [None] * len(data["grads"])
    for G, W, norm in zip(data["grads"], data["W"], norms, strict=True):
        run(optimizer, [p], [[G]])
        bound = tolerance(data, "max_abs_diff_to_float64_run")
        assert float((p.detach() - W).abs().max()) <= bound
        if norm is not None:
            assert math.isclose(float(optimizer.state[p]["limiter_norm"]), norm, rel_tol=1e-5)
    assert next(stored, None) is None
    for key, moment in data["final_state"].items():
        X = torch.tensor(moment)
        X = X if X.shape == optimizer.state[p][key].shape else X.mT
        torch.testing.assert_close(optimizer.state[p][key], X, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_equals_the_published_package(proj, scale_type, monkeypatch):
    """The installed package, step by step over two windows, its draws handed on; a vector too."""
    try:
        theirs = apollo_adamw()
    except Missing as why:
        pytest.skip(str(why))
    for shape in (TALL, WIDE, SQUARE):
        p, q, v, u = weight(shape), weight(shape), weight((5,)), weight((5,))
        keys = {"rank": 3, "update_proj_gap": 4, "scale": 16.0, "proj": proj, "proj_type": "std",
                "scale_type": scale_type}  # fmt: skip
        given = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-6}
        other = theirs([{"params": [q], **keys}, {"params": [u]}], **given)
        own = APOLLO([{"params": [p], **keys}, {"params": [v]}], compat="reference", **given)

        def find(self, G, *old, rng, transposed=False, of=q, made_by=other):
            P = made_by.state[of]["projector"].ortho_matrix
            return ((P.mT if transposed else P)[None],)

        monkeypatch.setattr(dense_projectors.GaussianProjector, "find", find)
        for G, g in zip(gradients(shape, 9), gradients((5,), 9), strict=True):
            run(other, [q, u], [[G], [g]])
            run(own, [p, v], [[G], [g]])
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5)
            torch.testing.assert_close(v, u, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "form",
    [
        {}, {"compat": "reference"}, {"limiter": False}, {"moments": "reset"},
        {"projection": "gaussian", "scale": "auto"}, {"projection": "gaussian", "scale": 7.0},
        {"projection": "gaussian", "compat": "reference", "scale": 4.0, "scale_front": True},
        {"projection": "svd", "scale": 4.0, "scale_front": True, "betas": (0.5, 0.9)},
        {"compat": "reference", "correct_bias": False, "betas": (0.0, 0.9)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_equals_the_oracle(form, scaling):
    """Weights and stored norms over three windows, on every shape and side."""
    cases = [(shape, "std") for shape in (TALL, WIDE, SQUARE, ODD, ROW, COLUMN)]
    cases += [(WIDE, side) for side in ("reverse_std", "left", "right")]
    for shape, side in cases:
        p, grads, ours, bases = weight(shape, dtype=DOUBLE), doubles(shape, 9), [], []
        settings = {**BASE, "weight_decay": 0.1, "eps": 1e-6, "scaling": scaling, **form,
                    "proj_type": side}  # fmt: skip
        optimizer = APOLLO([p], **settings)
        for step, G in enumerate(grads):
            p.grad = G
            optimizer.step()
            state = optimizer.state[p]
            ours.append((p.detach().clone(), float(state.get("limiter_norm", 0.0))))
            if step % 4 == 0:
                bases.append(state["basis"].clone())
        theirs = apollo(weight(shape, dtype=DOUBLE).detach(), grads, bases, **settings)
        for (W, norm), entry in zip(ours, theirs, strict=True):
            torch.testing.assert_close(W, entry["W"], rtol=0, atol=1e-8)
            if form.get("limiter", True):
                assert math.isclose(norm, entry["stored"], rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.bfloat16, 7 * 2**-7)])
def test_narrow_dtypes_follow_the_oracle(dtype, atol):
    for shape in (TALL, WIDE, SQUARE, ODD):
        p, bases = weight(shape, dtype=dtype), []
        grads = [G.to(dtype) for G in gradients(shape, 7)]
        optimizer = APOLLO([p], **BASE)
        for step, G in enumerate(grads):
            p.grad = G
            optimizer.step()
            if step % 4 == 0:
                bases.append(optimizer.state[p]["basis"].clone())
        theirs = apollo(weight(shape, dtype=dtype).detach(), grads, bases, **BASE)
        torch.testing.assert_close(p.detach().double(), theirs[-1]["W"], rtol=0, atol=atol)


@pytest.mark.parametrize("form", [{}, {"compat": "reference"}, MINI, {"scaling": "tensor"}])
def test_the_step_is_the_gradient_times_a_factor(form):
    """Of each column, or of the whole matrix: so the rank of the step is that of the gradient."""
    for shape in (TALL, WIDE, SQUARE):
        p = weight(shape, dtype=DOUBLE)
        optimizer = APOLLO([p], **{**BASE, **form})
        for G in doubles(shape, 6):
            before, p.grad = p.detach().clone(), G
            optimizer.step()
            ratio = (before - p.detach()) / G
            ratio = ratio.mT if is_transposed(shape, "std") else ratio
            whole = form.get("scaling") == "tensor"
            same_in = ratio.flatten()[:1] if whole else ratio[:1]
            torch.testing.assert_close(ratio, same_in.expand_as(ratio), rtol=1e-9, atol=0)
            assert bool((ratio > 0).all())


def test_the_first_step_has_adamws_length():
    """phi_j c = sqrt(r) / |R_j| under an orthonormal P: at full rank sqrt(m) / |G_j|."""
    for shape, rank in ((WIDE, 5), (TALL, 5), (SQUARE, 7), (WIDE, 1000), (TALL, 1000)):
        p, (G,) = weight(shape, dtype=DOUBLE), doubles(shape, 1)
        before, p.grad = p.detach().clone(), G
        optimizer = APOLLO([p], lr=1.0, rank=rank, eps=1e-30)
        optimizer.step()
        step = before - p.detach()
        step, G = (step.mT, G.mT) if is_transposed(shape, "std") else (step, G)
        P = optimizer.state[p]["basis"]
        r = P.shape[1]
        torch.testing.assert_close(P.mT @ P, torch.eye(r, dtype=DOUBLE), atol=1e-5, rtol=0)
        R = (P.mT @ G).norm(dim=0)
        top = 3 * math.sqrt(len(G)) / G.norm(dim=0)  # the bound of a column that P nearly misses
        expected = (math.sqrt(r) / R).minimum(top)
        torch.testing.assert_close((step / G)[0], expected, rtol=1e-6, atol=0)
        if r == len(G):
            torch.testing.assert_close(expected, math.sqrt(r) / G.norm(dim=0), rtol=1e-5, atol=0)


def test_gaussian_steps_have_the_length_of_random_ones_after_scale_auto():
    """E|P^T g|^2 = |g|^2, so phi is small by sqrt(r / m), which scale="auto" undoes."""
    sizes = {}
    for projection, scale in (("random", 1.0), ("gaussian", "auto"), ("gaussian", 1.0)):
        p = torch.nn.Parameter(torch.zeros(64, 4096))
        p.grad = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
        APOLLO([p], lr=1.0, rank=8, projection=projection, scale=scale).step()
        sizes[projection, scale] = float(p.detach().square().mean().sqrt())
    assert 0.9 < sizes["random", 1.0] < 1.3
    assert math.isclose(sizes["gaussian", "auto"], sizes["random", 1.0], rel_tol=0.1)
    assert math.isclose(sizes["gaussian", 1.0], sizes["gaussian", "auto"] / 8**0.5, rel_tol=1e-5)


def test_a_first_gradient_of_zero_does_not_freeze():
    """As published it does: the stored norm is 0, and grows by a hundredth per step."""
    for shape in (TALL, WIDE):
        grads = [torch.zeros(shape), *gradients(shape, 4)]
        for form, moves in (({}, True), (MINI, True), ({"compat": "reference"}, False)):
            p = weight(shape)
            before = p.detach().clone()
            run(APOLLO([p], **{**BASE, **form}), [p], [grads])
            assert (float((p.detach() - before).abs().max()) > 1e-3) == moves


def test_draws_are_those_of_the_seed_and_have_the_right_sizes():
    rng, G = StackRNG(3, (5, 6), 1), torch.empty(2, 300, 40)
    for kind in (dense_projectors.GaussianProjector(), dense_projectors.RandomProjector()):
        (P,) = kind.find(G, torch.empty(2, 300, 100), rng=rng)
        (again,) = kind.find(G.double(), torch.empty(2, 300, 100), rng=rng)
        torch.testing.assert_close(P.double(), again, atol=1e-6, rtol=0)
        assert not torch.equal(P[0], P[1]) and P.shape == (2, 300, 100)
        gain = 1.0 if kind.is_orthonormal else 3.0
        g = torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
        share = float((P[0].mT @ g).square().sum() / g.square().sum())
        assert math.isclose(share, gain / 3, rel_tol=0.3)


@pytest.mark.parametrize("projection", ["random", "gaussian"])
def test_resume_in_the_middle_of_a_window(projection):
    """In bits, from a file that weights_only=True reads, at each place of a window."""

    def make():
        p = weight(WIDE)
        return [p], APOLLO([p], **BASE, projection=projection, seed=4)

    for stop in (1, 4, 6):
        check_resume(make, [gradients(WIDE, 9)], stop)


@pytest.mark.parametrize("scaling, of_fira", [("channel", "column"), ("tensor", "matrix")])
def test_equals_fira_without_its_lift(scaling, of_fira):
    for shape in (TALL, WIDE, SQUARE):
        p, q, grads = weight(shape), weight(shape), gradients(shape, 9)
        run(APOLLO([p], **BASE, scaling=scaling), [p], [grads])
        form = {"alpha": 0.0, "projection": "random", "scaling": of_fira}
        run(Fira([q], **BASE, **form), [q], [grads])
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_state_bytes():
    """r (m + 2n) + 1 numbers; 2n + m + 1 of Mini; int8 codes all but a Gaussian basis."""
    p = torch.nn.Parameter(torch.zeros(64, 256))
    for form, count in (({"rank": 16}, 16 * (64 + 512) + 1), (MINI, 2 * 256 + 64 + 1)):
        optimizer = APOLLO([p], **form)
        p.grad = torch.ones_like(p)
        optimizer.step()
        state = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() for x in state) == count
        assert memory_report([p], APOLLO, **form).state == 4 * count
    for projection, dtype in (("random", torch.int8), ("gaussian", torch.float32)):
        q = torch.nn.Parameter(torch.zeros(128, 256))
        optimizer = APOLLO([q], rank=64, projection=projection, state_dtype="int8")
        q.grad = torch.ones_like(q)
        optimizer.step()
        assert optimizer.state[q]["basis"].dtype == dtype
        assert optimizer.state[q]["exp_avg"].dtype == torch.int8


def test_groups_of_the_published_package_work_as_they_are():
    p, v = weight(WIDE), weight((5,))
    group = {"rank": 1, "update_proj_gap": 5, "scale": 128, "proj_type": "std", "proj": "random",
             "scale_type": "tensor"}  # fmt: skip
    optimizer = APOLLO([{"params": [p], **group}, {"params": [v]}], lr=0.01, weight_decay=0.1)
    run(optimizer, [p, v], [gradients(WIDE, 3), [torch.ones(5)] * 3])
    assert [row.rule for row in optimizer.assignment()] == ["APOLLO", "adamw"]
    found = optimizer.param_groups[0]
    assert {key: found[key] for key in MINI} == MINI
    assert not {"proj", "scale_type"} & found.keys() and "proj" in group
    q, w = weight(WIDE), weight((5,))
    own = APOLLO([{"params": [q], **MINI, "update_proj_gap": 5}, {"params": [w]}], lr=0.01,
                 weight_decay=0.1)  # fmt: skip
    run(own, [q, w], [gradients(WIDE, 3), [torch.ones(5)] * 3])
    assert torch.equal(p, q) and torch.equal(v, w)


def test_only_apollo_draws_what_cannot_lift():
    for make in (GaLore, Fira):
        check_refusal(make, {"projection": "gaussian"}, "nothing can be lifted")
    check_refusal(FRUGAL, {"split": "gaussian"}, "split must be one of")


@pytest.mark.parametrize("projection", DOWN_KINDS)
def test_training_with_every_projection(projection):
    """A quadratic is solved in a quarter of its rank."""
    target = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    settings = {"lr": 0.1, "rank": 4, "update_proj_gap": 20, "scale": "auto"}
    make = lambda params: APOLLO(params, projection=projection, **settings)  # noqa: E731
    assert unsolved(make, target, 300) < 0.01


def test_every_matrix_of_a_batch_is_by_itself():
    for form in ({}, MINI, {"scaling": "tensor"}):
        p, grads = weight((3, 6, 9)), gradients((3, 6, 9), 5)
        optimizer = APOLLO([p], **{**BASE, "projection": "svd", **form})
        run(optimizer, [p], [grads])
        assert optimizer.state[p]["limiter_norm"].shape == (3, 1, 1)
        if "projection" in form:
            continue  # draws are those of each matrix
        for k in range(3):
            q = torch.nn.Parameter(weight((3, 6, 9)).detach()[k].clone())
            run(APOLLO([q], **{**BASE, "projection": "svd", **form}), [q], [[G[k] for G in grads]])
            torch.testing.assert_close(q.detach(), p.detach()[k], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", [{}, {"compat": "reference"}, MINI, {"projection": "dct"}])
def test_no_shape_rank_or_zero_gradient_crashes(form):
    for shape in (TALL, SQUARE, ROW, COLUMN, (1, 1), (3, 6, 5), (4, 3, 2, 2)):
        for side in ("std", "reverse_std", "left", "right"):
            p, v = weight(shape), weight((4,))
            optimizer = APOLLO([p, v], **{"lr": 0.02, "rank": 50, "update_proj_gap": 2,
                                          "proj_type": side, **form})  # fmt: skip
            grads = [torch.zeros(shape), *gradients(shape, 3), torch.zeros(shape)]
            run(optimizer, [p, v], [grads, [torch.ones(4)] * 5])
            assert p.isfinite().all() and v.isfinite().all()


def test_runs_are_equal_with_the_same_seed_only():
    def once(seed):
        params = [weight(WIDE, k) for k in range(2)]
        optimizer = APOLLO(params, **BASE, seed=seed)
        run(optimizer, params, [gradients(WIDE, 5, k) for k in range(2)])
        return [p.detach() for p in params], tensors(optimizer)

    assert same(once(1), once(1)) and not same(once(1), once(2))


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"rank": 0}, "rank"),
        ({"update_proj_gap": 0}, "update_proj_gap must be an int of at least 1"),
        ({"seed": -1}, "seed must be an int"),
        ({"proj_type": "full"}, "proj_type must be one of"),
        ({"proj_type": "full", "compat": "reference"}, "proj_type must be one of"),
        ({"scaling": "row"}, "scaling must be one of"),
        ({"compat": "torch"}, "compat must be one of"),
        ({"gamma": 0.999}, "gamma must be at least 1"),
        ({"limiter_floor": -1e-9}, "limiter_floor must be at least 0"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"scale": "full"}, "scale must be 'auto' or a number from 0"),
        ({"scale_front": 1}, "scale_front must be"),
        ({"projection": "normal"}, "gaussian, got 'normal'"),
        ({"projection": "gaussian", "moments": "rotate"}, "use moments='keep' or 'reset'"),
        ({"projection": "gaussian", "moments": "match"}, "moments='match'"),
        ({"compat": "reference", "moments": "rotate"}, "use moments='keep' or 'reset'"),
        ({"compat": "reference", "projection": "topk"}, "a Gaussian projection or an exact SVD"),
        ({"correct_bias": False}, "correct_bias=False exists only under"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"eps": -1.0}, "Invalid epsilon value"),
    ],
)
def test_bad_settings_are_one_sentence_for_constructor_and_group(bad, text):
    check_refusal(APOLLO, bad, text)


@pytest.mark.parametrize("cls", [APOLLO, Fira])
def test_squares_that_tell_of_bad_gradients_are_those_of_the_step(cls, monkeypatch):
    """Steps have the bits of steps that look for themselves; bad gradients are found alike."""
    shapes = [(60, 150), (150, 60), (2, 64, 80)]
    grads = [gradients(shape, 5, seed=7) for shape in shapes]
    grads[0][2][3, 4], grads[1][3][5, 6], grads[2][2][1, 2, 3] = torch.nan, torch.inf, -torch.inf
    grads[1][4] *= 1e25  # its squares overflow, though it is finite

    def outcome():
        params = [weight(shape, dtype=torch.float32) for shape in shapes]
        optimizer = cls(params, rank=8, update_proj_gap=2, weight_decay=0.1, maximize=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(optimizer, params, [[G.float() for G in x] for x in grads]), optimizer

    reads = []
    squares_of = finite._squares_of
    monkeypatch.setattr(
        finite, "_squares_of", lambda *args: reads.append(squares_of(*args)) or reads[-1]
    )
    ours, optimizer = outcome()
    assert sum(x is not None for x in reads) >= 8
    monkeypatch.setattr(finite, "_squares_of", lambda *args: None)
    wanted, other = outcome()
    assert optimizer.skipped == other.skipped == {0: 1, 1: 1, 2: 1}
    for Ws, Vs in zip(ours, wanted, strict=True):
        assert all(torch.equal(W, V) for W, V in zip(Ws, Vs, strict=True))
