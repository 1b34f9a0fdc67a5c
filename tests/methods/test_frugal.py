"""FRUGAL: its two parts, windows and draws, the recorded trajectories, its bounds."""

import copy
import math
import warnings

import pytest
import torch
from helpers.allocations import count_step
from helpers.checkpoints import check_resume, through_a_file
from helpers.paths import FIXTURES
from helpers.problems import (
    check_refusal,
    doubles,
    gradients,
    run,
    same,
    tensors,
    trajectory,
    weight,
)
from helpers.recordings import fed, fixture, tolerance
from helpers.shapes import COLUMN, ODD, ROW, SQUARE, TALL, WIDE
from oracles.frugal import COORDINATES, down, frugal, leading, up

from stiefel.optimizers import FRUGAL, GaLore
from stiefel.optimizers._driver import units
from stiefel.optimizers._frugal import block_schedule, coordinates, gradient_split
from stiefel.optimizers._frugal.block_schedule import BlockSchedule
from stiefel.optimizers._toolkit import dense_projectors

RECORDED = sorted(path.stem for path in FIXTURES.glob("frugal-*.json"))
SPLITS = [*COORDINATES, "svd", "random", "block"]
SIDES = ["std", "reverse_std", "right", "left", "full"]
DOUBLE = torch.float64
BASE = {"lr": 0.02, "update_gap": 4, "density": 0.4}
NEAR = 4e-6  # eight roundings of weights below 4

pytestmark = pytest.mark.filterwarnings("ignore:density .* rounds to nothing")


def choice_of(optimizer, p):
    """What is chosen now, as the oracle takes it."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    split = group["split"]
    if split == "block":
        return bool(state.keys() - {"step", "refreshed"})
    if split in COORDINATES:
        return state["index"].tolist() if "index" in state else []
    P = state["basis"].clone()
    if "basis_right" in state:
        return P, state["basis_right"].clone()
    m, n = p.shape
    right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}
    return (None, P) if right[group["proj_type"]] else (P, None)


def followed(optimizer, p, grads):
    """Weights after each step, and what was chosen in each window."""
    out, choices, gap = [], [], optimizer.param_groups[0]["update_gap"]
    for step, G in enumerate(grads):
        p.grad = G.to(p.dtype)
        optimizer.step()
        out.append(p.detach().clone())
        if step % gap == 0:
            choices.append(choice_of(optimizer, p))
    return out, choices


def density_of(optimizer, p):
    """How many coordinates or dimensions are state-full."""
    state = optimizer.state[p]
    return state["index"].numel() if "index" in state else state["basis"].shape[-1]


# the published code: every recorded trajectory


def settings_of(data):
    """Our keywords for the published ones."""
    given = dict(data["settings"]["optimizer"])
    names = {
        "inactive_update_rule": "state_free",
        "inactive_lr_scale": "state_free_lr_scale",
        "proj_params_lr_scale": "proj_lr_scale",
        "proj_side": "proj_type",
    }
    kind = given.pop("coord_choice", None)
    kind = given.pop("proj_type", None) if kind is None else kind
    keep = given.pop("reset_statistics", True)
    ours = {names.get(key, key): value for key, value in given.items()}
    # the published block class begins anew in every window, whatever is asked for
    kind = "block" if "block_order" in given else "random" if kind == "randperm" else kind
    ours["reset"] = "all" if keep or kind == "block" else "none"
    return {**ours, "split": kind}


def feed_splits(drawn, monkeypatch):
    """Let the recorded numbers be drawn."""
    stored = iter(drawn)

    def draw(self, rng, length, c):
        index = next(stored)
        assert len(index) == c
        return torch.tensor([index], dtype=torch.int64)

    monkeypatch.setattr(coordinates.CoordinateSplit, "draw", draw)
    return stored


SINGLE = [n for n in RECORDED if "block" not in n and "groups" not in n]


@pytest.mark.parametrize("name", SINGLE)
def test_recorded_trajectory(name, monkeypatch):
    """Weights, last moments and clock of the published code, its draws or bases fed."""
    data = fixture(name)
    settings = settings_of(data)
    p = torch.nn.Parameter(data["W0"].clone())
    if "bases" in data:
        data["settings"]["group"]["proj_type"] = settings["proj_type"]
        stored = fed(data, monkeypatch)
        monkeypatch.setattr(
            dense_projectors.RandomProjector, "find", dense_projectors.SvdProjector.find
        )
    else:
        drawn = [entry["indices"] for entry in data["splits"] if entry["indices"]]
        stored = feed_splits(drawn, monkeypatch)
    optimizer = FRUGAL([p], compat="reference", **settings)
    bound = tolerance(data, "max_abs_diff_to_float64_run")
    for G, R in zip(data["grads"], data["W"], strict=True):
        run(optimizer, [p], [[G]])
        assert float((p.detach() - R).abs().max()) <= bound
    assert next(stored, None) is None
    last, state = data["final_state"], optimizer.state[p]
    reset = settings["reset"] == "all"
    begun = state.get("refreshed", 11) - 1 if reset else 0  # without any state there is no clock
    assert last["step"] == state["step"] - begun
    order = None
    if "splits" in data and reset:  # ours are kept in ascending order then
        order = torch.tensor(data["splits"][-1]["indices"], dtype=torch.int64).argsort()
    for key in ("exp_avg", "exp_avg_sq"):
        R = torch.tensor(last[key], dtype=torch.float32)
        if not R.numel():
            assert key not in state
            continue
        if order is not None:
            R = R.index_select(R.dim() - 1 if settings["split"] == "columns" else 0, order)
        ours = state[key] if settings["split"] != "randk" else state[key].flatten()
        ours = ours if ours.shape == R.shape or R.dim() != 2 else ours.mT
        if "bases" in data and "right" in data["bases"][0]["side"]:
            ours = state[key].mT
        assert float((ours - R).abs().max()) <= max(1e-6, 4 * bound)


@pytest.mark.parametrize("name", [n for n in RECORDED if "block" in n])
def test_recorded_blocks(name, monkeypatch):
    """Five tensors that take turns; the vector among them is a matrix of one row here."""
    data = {**fixture_lists(name)}
    params = [torch.nn.Parameter(W.clone()) for W in data["W0"]]
    active = {entry["step"] // 5: frozenset(entry["active"]) for entry in data["splits"]}
    if "random" in name:
        monkeypatch.setattr(
            block_schedule, "_active_blocks", lambda _, window, count: active[window]
        )
    optimizer = FRUGAL(params, compat="reference", **settings_of(data))
    bound = tolerance(data, "max_abs_diff_to_float64_run")
    for step, (grads, Ws) in enumerate(zip(data["grads"], data["W"], strict=True)):
        run(optimizer, params, [[G] for G in grads])
        for i, (p, R) in enumerate(zip(params, Ws, strict=True)):
            assert float((p.detach() - R).abs().max()) <= bound
            assert ("exp_avg" in optimizer.state[p]) == (i in active[step // 5])


def fixture_lists(name):
    """A recorded trajectory of several tensors, vectors as matrices of one row."""
    import json

    def tensor(x):
        X = torch.tensor(x, dtype=torch.float32)
        return X.view(1, -1) if X.dim() == 1 else X

    data = json.loads((FIXTURES / f"{name}.json").read_text())
    data["W0"] = [tensor(x) for x in data["W0"]]
    for key in ("grads", "W"):
        data[key] = [[tensor(x) for x in step] for step in data[key]]
    return data


def test_recorded_groups(monkeypatch):
    """Two projected matrices, drawn in order, and a vector that torch's AdamW steps."""
    data = fixture_lists("frugal-columns-groups")
    params = [torch.nn.Parameter(W.clone()) for W in data["W0"]]
    params[2] = torch.nn.Parameter(data["W0"][2].flatten().clone())
    stored = feed_splits(
        [index for entry in data["splits"] for index in entry["indices"]], monkeypatch
    )
    groups = [{"params": [params[2]], "rule": "adamw"}, {"params": params[:2]}]
    optimizer = FRUGAL(groups, compat="reference", **settings_of(data))
    bound = tolerance(data, "max_abs_diff_to_float64_run")
    for grads, Ws in zip(data["grads"], data["W"], strict=True):
        run(optimizer, params, [[G.view(p.shape)] for G, p in zip(grads, params, strict=True)])
        for p, R in zip(params, Ws, strict=True):
            assert float((p.detach() - R.view(p.shape)).abs().max()) <= bound
    assert next(stored, None) is None


# the oracle


splits_and_resets = pytest.mark.parametrize(
    "split, reset",
    [
        (split, reset)
        for split in SPLITS
        for reset in ("all", "changed", "none")
        if (split, reset) != ("block", "none")
    ],
)


@pytest.mark.covering(strength=3)
@splits_and_resets
@pytest.mark.parametrize("inner", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("state_free", ["sign_sgd", "sgd", "no"])
@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
def test_equals_the_oracle(split, reset, inner, state_free, shape):
    settings = {"lr": 0.02, "update_gap": 3, "state_free": state_free, "reset": reset,
                "inner": inner, "weight_decay": 0.1, "state_free_lr_scale": 0.5,
                "proj_lr_scale": 0.7, "eps": 1e-6}  # fmt: skip
    p, grads = weight(shape, dtype=DOUBLE), doubles(shape, 8)
    # a second block, so that they take turns
    params = [p, weight(SQUARE, dtype=DOUBLE)] if split == "block" else [p]
    for q in params[1:]:
        q.grad = torch.ones_like(q)
    optimizer = FRUGAL(params, split=split, density=0.5, **settings)
    ours, choices = followed(optimizer, p, grads)
    theirs, _ = frugal(weight(shape, dtype=DOUBLE).detach(), grads, choices, split, **settings)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("split", ["svd", "random"])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, ODD, ROW, COLUMN])
def test_every_side_equals_the_oracle(kind, split, shape):
    settings = {"lr": 0.02, "update_gap": 3, "eps": 1e-6}
    p, grads = weight(shape, dtype=DOUBLE), doubles(shape, 8)
    optimizer = FRUGAL([p], split=split, density=0.6, proj_type=kind, **settings)
    ours, choices = followed(optimizer, p, grads)
    if split == "svd":
        rank = density_of(optimizer, p)
        P, Q = leading(grads[3], rank, kind)
        for mine, exact in zip(choices[1], (P, Q), strict=True):
            assert (mine is None) == (exact is None)
            if exact is not None:
                torch.testing.assert_close(mine @ mine.T, exact @ exact.T, rtol=0, atol=1e-6)
    r, sides = density_of(optimizer, p), [len(X) for X in choices[0] if X is not None]

    def whole(step):
        """The subspace is everything, or holds all of the gradient that it was found from."""
        found = split == "svd" and step % 3 == 0 and r == min(shape)
        return found or all(r == side for side in sides)

    W = weight(shape, dtype=DOUBLE).detach()
    theirs, _ = frugal(W, grads, choices, split, whole=whole, **settings)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.bfloat16, 8 * 2**-7)])
def test_narrow_dtypes_follow_the_oracle(split, dtype, atol):
    """bfloat16: eight roundings of weights below 4."""
    p, grads = weight(TALL, dtype=dtype), [G.to(dtype) for G in gradients(TALL, 8)]
    # the size of a residual, not its sign: that of one near zero would be decided by round-off
    settings = {**BASE, "density": 0.5, "state_free": "sgd"}
    optimizer = FRUGAL([p], split=split, **settings)
    ours, choices = followed(optimizer, p, grads)
    settings.pop("density")
    choices = [
        tuple(None if X is None else X.double() for X in c) if isinstance(c, tuple) else c
        for c in choices
    ]
    theirs, _ = frugal(weight(TALL, dtype=dtype).detach(), grads, choices, split, **settings)
    torch.testing.assert_close(ours[-1].double(), theirs[-1], rtol=0, atol=atol)


# the ends of the density


@pytest.mark.parametrize("split", [*COORDINATES, "block"])
@pytest.mark.parametrize("shape", [TALL, WIDE, ODD, ROW, COLUMN])
def test_density_1_is_torchs_adamw(split, shape):
    p, q = weight(shape), weight(shape)
    ours = FRUGAL([p], density=1.0, split=split, lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    grads = gradients(shape, 17)
    for a, b in zip(run(ours, [p], [grads]), run(theirs, [q], [grads]), strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_density_0_is_sign_descent(split, dtype):
    p = weight(WIDE, dtype=dtype)
    optimizer = FRUGAL([p], density=0.0, split=split, lr=0.01)
    optimizer.init_state()
    for G in gradients(WIDE, 5, dtype=dtype):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        assert torch.equal(p.detach(), before - 0.01 * G.sign())
        assert set(optimizer.state[p]) <= {"step", "refreshed"}


@pytest.mark.parametrize("kind", ["std", "left", "right"])
@pytest.mark.parametrize("split", ["svd", "random", "dct", "topk"])
@pytest.mark.parametrize("state_free", ["sign_sgd", "sgd"])
def test_at_full_rank_nothing_is_left_over(kind, split, state_free):
    """Adam in a rotated basis, without signs of round-off."""
    p, grads = weight(SQUARE), gradients(SQUARE, 6)
    q = weight(SQUARE)
    settings = {"lr": 0.01, "split": split, "density": 1.0, "proj_type": kind, "update_gap": 10}
    run(FRUGAL([p], state_free=state_free, **settings), [p], [grads])
    run(FRUGAL([q], state_free="no", **settings), [q], [grads])
    assert torch.equal(p, q)
    loud = weight(SQUARE)
    exact = {**settings, "compat": "reference"}
    run(FRUGAL([loud], state_free="sign_sgd", **exact), [loud], [grads])
    if split != "topk":  # whose residual is zero to the last bit, while others' is round-off
        assert float((loud - q).detach().abs().max()) > 0.01


# the two parts


@pytest.mark.parametrize("split", COORDINATES)
@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
def test_the_parts_are_disjoint_and_cover_the_weight(split, shape):
    p = weight(shape, dtype=DOUBLE)
    optimizer = FRUGAL([p], split=split, state_free_lr_scale=0.5, proj_lr_scale=0.25, lr=0.1)
    for G in doubles(shape, 4):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        index = optimizer.state[p]["index"].tolist()
        assert len(set(index)) == len(index)
        ones = torch.ones_like(down(G, split, index))
        outside = up(ones, shape, split, index) == 0
        step = (before - p.detach())[outside]
        torch.testing.assert_close(step.abs(), 0.0125 * G[outside].sign().abs(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", SIDES)
def test_the_parts_add_up_to_the_gradient(split, kind):
    """Seen through lr 1, no momentum and the rule sgd: the step is up(down(G)) + res."""
    p = weight(WIDE)
    optimizer = FRUGAL([p], split=split, lr=1.0, inner="sgdm", betas=(0.0, 0.9), proj_type=kind,
                       density=0.5, state_free="sgd")  # fmt: skip
    for G in gradients(WIDE, 3):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        torch.testing.assert_close(before - p.detach(), G, rtol=0, atol=1e-6)
        if split in ("svd", "random"):
            choice = choice_of(optimizer, p)
            rest = G - up(down(G, split, choice), WIDE, split, choice)
            assert float(down(rest, split, choice).abs().max()) <= 1e-5


@pytest.mark.parametrize("split", COORDINATES)
@pytest.mark.parametrize("off", [{"state_free_lr_scale": 0.0}, {"state_free": "no"}])
def test_without_the_state_free_part_only_decay_moves_the_rest(split, off):
    p = weight(TALL)
    optimizer = FRUGAL([p], split=split, weight_decay=0.1, lr=0.1, **off)
    for G in gradients(TALL, 3):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        index = optimizer.state[p]["index"].tolist()
        ones = torch.ones_like(down(G, split, index))
        outside = up(ones, TALL, split, index) == 0
        torch.testing.assert_close(p[outside], (before * 0.99)[outside], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_svd_without_the_rest_is_galore(kind, shape):
    """With scale 1, eps on the corrected root and decay first, as both have it by default."""
    rank = 5
    side = max(shape) if kind == "reverse_std" else min(shape)
    side = {"left": shape[0], "right": shape[1]}.get(kind, side)
    common = {"lr": 0.01, "proj_type": kind, "weight_decay": 0.1}
    ours = trajectory(
        lambda ps: FRUGAL(ps, split="svd", state_free="no", reset="none", update_gap=4,
                          density=rank / side, **common), shape, 11)  # fmt: skip
    theirs = trajectory(
        lambda ps: GaLore(ps, rank=rank, scale=1.0, update_proj_gap=4, **common), shape, 11
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_blocks_without_the_rest_are_badam():
    """One block is trained by AdamW from fresh moments, the others are frozen."""
    shapes = [TALL, WIDE, SQUARE]
    params = [weight(s, k) for k, s in enumerate(shapes)]
    grads = [gradients(s, 9, k) for k, s in enumerate(shapes)]
    optimizer = FRUGAL(params, split="block", state_free="no", density=1 / 3, update_gap=3,
                       block_order="descending", lr=0.01)  # fmt: skip
    ours = run(optimizer, params, grads)
    for window, active in enumerate((2, 1, 0)):
        start = [weight(s, k) for k, s in enumerate(shapes)] if not window else ours[3 * window - 1]
        theirs = torch.nn.Parameter(start[active].detach().clone())
        oracle = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
        for t in range(3 * window, 3 * window + 3):
            run(oracle, [theirs], [[grads[active][t]]])
            torch.testing.assert_close(ours[t][active], theirs.detach(), rtol=0, atol=1e-6)
            for k in {0, 1, 2} - {active}:
                assert torch.equal(ours[t][k], start[k])


@pytest.mark.parametrize("split", [*COORDINATES, "svd"])
def test_sgd_is_linear_and_signs_are_blind_to_size(split):
    def moved(state_free, c):
        p = weight(WIDE, dtype=DOUBLE)
        optimizer = FRUGAL([p], split=split, state_free=state_free, density=0.5, lr=0.1)
        run(optimizer, [p], [[c * doubles(WIDE, 1)[0]]])
        only = weight(WIDE, dtype=DOUBLE)
        bare = FRUGAL([only], split=split, state_free="no", density=0.5, lr=0.1)
        run(bare, [only], [[c * doubles(WIDE, 1)[0]]])
        return only.detach() - p.detach()

    torch.testing.assert_close(moved("sgd", 4.0), 4 * moved("sgd", 1.0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved("sign_sgd", 4.0), moved("sign_sgd", 1.0), rtol=0, atol=1e-12)


# windows


@pytest.mark.parametrize("split", [*COORDINATES, "svd", "block"])
def test_after_a_reset_the_first_step_is_fresh(split):
    p, lr, eps = weight(WIDE, dtype=DOUBLE), 0.1, 1e-3
    optimizer = FRUGAL([p], split=split, state_free="no", density=1.0 if split == "block" else 0.5,
                       update_gap=3, lr=lr, eps=eps)  # fmt: skip
    for step, G in enumerate(doubles(WIDE, 7)):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        if step % 3:
            continue
        choice = choice_of(optimizer, p)
        g = down(G, split, choice)
        u = down(before - p.detach(), split, choice)
        torch.testing.assert_close(u, lr * g.sign() * g.abs() / (g.abs() + eps), rtol=0, atol=1e-12)
        assert float(u.abs().max()) <= lr
        state = optimizer.state[p]
        M, V = state["exp_avg"], state["exp_avg_sq"]
        torch.testing.assert_close(M.view(g.shape), 0.1 * g, rtol=1e-12, atol=0)
        torch.testing.assert_close(V.view(g.shape), 0.001 * g * g, rtol=1e-9, atol=0)


@pytest.mark.parametrize("split", [*COORDINATES, "svd", "random"])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
def test_the_density_says_how_many_are_drawn_and_the_gap_when(split, density, shape):
    p, (m, n) = weight(shape), shape
    optimizer = FRUGAL([p], split=split, density=density, update_gap=3)
    seen = []
    for G in gradients(shape, 7):
        run(optimizer, [p], [[G]])
        seen.append(optimizer.state[p].get("refreshed"))
    if density == 0.0:
        assert "index" not in optimizer.state[p] and "basis" not in optimizer.state[p]
        return
    assert seen == [1, 1, 1, 4, 4, 4, 7]
    length = {"columns": n, "rows": m, "randk": m * n}.get(split)
    want = round(density * min(shape)) if length is None else math.floor(density * length)
    assert density_of(optimizer, p) == want


def test_ranks_and_blocks_round_half_to_even():
    for side, want in ((5, 2), (7, 4), (9, 4)):
        p = weight((side, 12))
        optimizer = FRUGAL([p], split="svd", density=0.5)
        optimizer.init_state()
        assert density_of(optimizer, p) == want
        assert len(BlockSchedule("ascending", 0.5, 1, 0, False).active_blocks(0, side)) == want


def test_a_new_choice_is_another_one():
    p = weight((40, 40))
    optimizer = FRUGAL([p], update_gap=2, density=0.5)
    drawn = []
    for G in gradients((40, 40), 6):
        run(optimizer, [p], [[G]])
        drawn.append(optimizer.state[p]["index"].clone())
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[3], drawn[4])


TRACES = {
    ("ascending", 3): [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 0, 1}, {2, 3, 4}],
    ("descending", 3): [{9, 8, 7}, {6, 5, 4}, {3, 2, 1}, {0, 9, 8}, {7, 6, 5}],
    ("mirror", 4): [{0, 9, 1, 8}, {2, 7, 3, 6}, {4, 5, 0, 9}, {1, 8, 2, 7}],
}


@pytest.mark.parametrize("order, a", list(TRACES))
def test_orders_follow_the_published_traces(order, a):
    schedule = BlockSchedule(order, a / 10, 200, 0, False)
    assert [schedule.active_blocks(w, 10) for w in range(len(TRACES[order, a]))] == TRACES[order, a]


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("count, a", [(10, 3), (7, 2), (5, 5), (6, 1)])
def test_every_block_has_its_turn(order, count, a):
    schedule, windows = BlockSchedule(order, a / count, 1, 0, False), math.ceil(count / a)
    for start in range(5):
        seen = frozenset().union(
            *(schedule.active_blocks(start + w, count) for w in range(windows))
        )
        assert seen == frozenset(range(count))


def test_mirror_needs_pairs_and_random_draws_by_window():
    params = [weight(SQUARE, k) for k in range(6)]
    optimizer = FRUGAL(params, split="block", block_order="mirror", density=0.5)
    with pytest.raises(ValueError, match=r"of 6 blocks is 3: choose a density"):
        optimizer.init_state()
    schedule = BlockSchedule("random", 0.5, 1, 7, False)
    sets = [schedule.active_blocks(w, 12) for w in range(30)]
    assert len(set(sets)) > 20 and all(len(s) == 6 for s in sets)
    assert sets == [
        BlockSchedule("random", 0.5, 1, 7, False).active_blocks(w, 12) for w in range(30)
    ]


def test_blocks_in_the_optimizer_follow_their_order():
    params = [weight((4, 4 + k), k) for k in range(5)]
    optimizer = FRUGAL(params, split="block", block_order="ascending", density=0.4, update_gap=2)
    for t in range(8):
        run(optimizer, params, [[torch.ones_like(p)] for p in params])
        active = {k for k, p in enumerate(params) if "exp_avg" in optimizer.state[p]}
        assert active == {(2 * (t // 2)) % 5, (2 * (t // 2) + 1) % 5}


# determinism, memory, missing gradients


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("reset", ["all", "changed"])
def test_draws_depend_on_the_seed_alone(split, reset):
    def made(disturb, seed=0):
        params = [weight(TALL), weight(WIDE, 1), weight(SQUARE, 2), weight(SQUARE, 3)]
        optimizer = FRUGAL(params, split=split, density=0.5, update_gap=2, reset=reset, seed=seed,
                           lr=0.02)  # fmt: skip
        grads = [gradients(tuple(p.shape), 7, k) for k, p in enumerate(params)]
        for t in range(7):
            if disturb:
                torch.manual_seed(t)
                torch.randn(5)
            run(optimizer, params, [[series[t]] for series in grads])
        return [p.detach() for p in params], tensors(optimizer)

    global_state = torch.get_rng_state()
    first = made(False)
    assert torch.equal(torch.get_rng_state(), global_state)  # and none is drawn from it
    assert same(first, made(True))
    if split != "svd":
        assert not same(first[0], made(False, seed=1)[0])


@pytest.mark.covering(strength=3)
@splits_and_resets
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical(split, reset, stop, dtype):
    shapes = (TALL, WIDE, SQUARE, SQUARE)

    def make():
        params = [weight(s, k, dtype) for k, s in enumerate(shapes)] + [weight((4,), 9, dtype)]
        return params, FRUGAL(params, split=split, density=0.5, update_gap=3, reset=reset, lr=0.02)

    grads = [gradients(shape, 8, k) for k, shape in enumerate(shapes)]
    check_resume(make, [*grads, [torch.ones(4)] * 8], stop)


def held_bytes(optimizer, p):
    values = optimizer.state[p].values()
    return sum(x.untyped_storage().nbytes() for x in values if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("reset", ["all", "changed"])
def test_state_bytes_of_coordinates(shape, density, reset):
    (m, n), ages = shape, 1 if reset == "changed" else 0
    for split in COORDINATES:
        p = weight(shape)
        optimizer = FRUGAL([p], split=split, density=density, reset=reset)
        run(optimizer, [p], [gradients(shape, 2)])
        c = int(density * {"columns": n, "rows": m, "randk": m * n}[split])
        moments = 2 * c * {"columns": m, "rows": n, "randk": 1}[split]
        assert held_bytes(optimizer, p) == 4 * (moments + c + ages * c)


@pytest.mark.parametrize("shape", [TALL, WIDE, ODD])
@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_state_bytes_of_subspaces(shape, kind, density):
    m, n = shape
    side = {"std": min(m, n), "reverse_std": max(m, n), "right": n, "left": m, "full": min(m, n)}
    r = min(round(density * side[kind]), m, n)
    other = m + n - side[kind]
    for split in ("svd", "random"):
        p = weight(shape)
        optimizer = FRUGAL([p], split=split, density=density, proj_type=kind)
        run(optimizer, [p], [gradients(shape, 2)])
        want = r * (m + n) + 2 * r * r if kind == "full" else r * side[kind] + 2 * r * other
        assert held_bytes(optimizer, p) == 4 * want


def test_inactive_blocks_hold_nothing():
    shapes = [TALL, WIDE, SQUARE, ODD]  # none is stacked with another, whose storage it shared
    params = [weight(s, k) for k, s in enumerate(shapes)]
    optimizer = FRUGAL(params, split="block", block_order="ascending", density=0.5, update_gap=2)
    for t in range(6):
        run(optimizer, params, [[torch.ones_like(p)] for p in params])
        for k, p in enumerate(params):
            active = k // 2 == (t // 2) % 2
            assert held_bytes(optimizer, p) == (8 * p.numel() if active else 0)


@pytest.mark.parametrize("split", SPLITS)
def test_missing_and_late_gradients(split):
    """Each weight has its own clock: what one lacks does not matter to another."""
    shapes = [TALL, SQUARE, SQUARE]
    settings = {**BASE, "split": split, "density": 1.0 if split == "block" else 0.5}
    params = [weight(s, k) for k, s in enumerate(shapes)]
    grads = [gradients(s, 9, k) for k, s in enumerate(shapes)]
    late = [[None] * 4 + grads[0][4:], grads[1], [*grads[2][:4], None, *grads[2][5:]]]
    optimizer = FRUGAL(params, **settings)
    ours = run(optimizer, params, late)
    others = [weight(s, k) for k, s in enumerate(shapes)]
    theirs = run(FRUGAL(others, **settings), others, grads)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a[1], b[1])
    assert torch.equal(ours[3][0], weight(TALL, 0)) and torch.equal(ours[4][2], ours[3][2])
    assert [optimizer.state[p]["step"] for p in params] == [5, 9, 8]
    optimizer.add_param_group({"params": [extra := weight(WIDE, 5)]})
    run(optimizer, [*params, extra], [[G[0]] for G in grads] + [gradients(WIDE, 1)])
    assert optimizer.state[extra]["step"] == 1


# zero gradients, resets, convergence


@pytest.mark.parametrize("split", SPLITS)
def test_a_zero_gradient_leaves_decay_and_momentum(split):
    p = weight(WIDE, dtype=DOUBLE)
    density = 1.0 if split == "block" else 0.5
    optimizer = FRUGAL([p], split=split, density=density, lr=0.1, weight_decay=0.1)
    zero = torch.zeros(WIDE, dtype=DOUBLE)
    run(optimizer, [p], [[zero]])
    torch.testing.assert_close(p.detach(), 0.99 * weight(WIDE, dtype=DOUBLE), rtol=1e-12, atol=0)
    run(optimizer, [p], [[doubles(WIDE, 1)[0]]])
    before = p.detach().clone()
    run(optimizer, [p], [[zero]])
    step, choice = 0.99 * before - p.detach(), choice_of(optimizer, p)
    rest = step - up(down(step, split, choice), WIDE, split, choice)
    assert float(rest.abs().max()) <= 1e-12 and float(step.abs().max()) > 1e-3


@pytest.mark.parametrize("split", [*COORDINATES, "block"])
@pytest.mark.parametrize("shape", [TALL, ODD])
def test_reset_changed_at_density_one_is_adamw(split, shape):
    p, q = weight(shape), weight(shape)
    grads = gradients(shape, 17)
    ours = FRUGAL([p], density=1.0, split=split, lr=0.01, update_gap=3, reset="changed",
                  weight_decay=0.1)  # fmt: skip
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    for a, b in zip(run(ours, [p], [grads]), run(theirs, [q], [grads]), strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-6)
    again = weight(shape)
    run(FRUGAL([again], density=1.0, split=split, lr=0.01, update_gap=3, weight_decay=0.1),
        [again], [grads])  # fmt: skip
    assert float((again - q).detach().abs().max()) > 1e-3  # "all" departs from AdamW


def test_ages_count_the_updates_of_each_coordinate():
    p, ages = weight((6, 20)), torch.zeros(20)
    optimizer, last = FRUGAL([p], density=0.5, update_gap=2, reset="changed"), set()
    for t, G in enumerate(gradients((6, 20), 9)):
        run(optimizer, [p], [[G]])
        state = optimizer.state[p]
        index = state["index"].tolist()
        if t % 2 == 0:
            ages[[j for j in range(20) if j not in last or j not in index]] = 0
            last = set(index)
        ages[index] += 1
        assert state["age"].tolist() == ages[index].int().tolist()
    assert len(set(state["age"].tolist())) > 1


def test_blocks_that_stay_active_keep_their_moments():
    params = [weight((4, 4 + k), k) for k in range(3)]
    optimizer = FRUGAL(params, split="block", block_order="ascending", density=0.67, update_gap=2,
                       reset="changed")  # fmt: skip
    grads = [gradients(tuple(p.shape), 6, k) for k, p in enumerate(params)]
    run(optimizer, params, [g[:4] for g in grads])  # {0, 1}, {2, 0}, {1, 2}
    oracle = [weight((4, 4), 0)]
    adam = torch.optim.AdamW(oracle, weight_decay=0.0)
    run(adam, oracle, [grads[0][:4]])
    torch.testing.assert_close(
        optimizer.state[params[0]]["exp_avg"], adam.state[oracle[0]]["exp_avg"]
    )
    torch.testing.assert_close(params[0], oracle[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SIDES)
def test_reset_changed_rotates_the_moments_of_a_basis(kind):
    """At full rank a turned first moment is the moment of the turned gradient."""
    p = weight(SQUARE, dtype=DOUBLE)
    optimizer = FRUGAL([p], split="random", density=1.0, update_gap=2, reset="changed",
                       proj_type=kind)  # fmt: skip
    M = torch.zeros(SQUARE, dtype=DOUBLE)
    for G in doubles(SQUARE, 7):
        M = 0.9 * M + 0.1 * G
        run(optimizer, [p], [[G]])
        state = optimizer.state[p]
        right = kind in ("std", "right")
        ours = state["basis"] @ state["exp_avg"]
        ours = ours @ state["basis_right"].mT if kind == "full" else ours
        torch.testing.assert_close(ours.mT if right else ours, M, rtol=0, atol=1e-9)


def trained(**settings):
    """Mean loss of the last steps of a small network on a fixed regression."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(256, 12, generator=draw)
    Y = torch.tanh(X @ torch.randn(12, 6, generator=draw)) @ torch.randn(6, 3, generator=draw)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24), torch.nn.Tanh(),
            torch.nn.Linear(24, 3),
        )  # fmt: skip
    optimizer = FRUGAL(model, lr=2e-3, update_gap=20, **settings)
    losses = []
    for step in range(200):
        rows = torch.arange(step * 32, step * 32 + 32) % 256
        loss = (model(X[rows]) - Y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("split", SPLITS)
def test_the_state_free_part_lowers_the_loss(split):
    ours = trained(split=split)
    assert ours < trained(split=split, state_free="no")
    assert ours < 1.1 * trained(split=split, density=0.0)


# blocks that users name, and what is refused


def named(*shapes):
    """A module list of matrices under names with layers in them."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList()
    for k, (a, b) in enumerate(shapes):
        layer = torch.nn.Module()
        layer.a = torch.nn.Parameter(weight(a, k).detach())
        layer.b = torch.nn.Parameter(weight(b, k + 10).detach())
        model.layers.append(layer)
    return model


def active_of(optimizer):
    return [
        i
        for i, p in enumerate(optimizer.param_groups[0]["params"])
        if "exp_avg" in optimizer.state[p]
    ]


def step_with_ones(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def test_layers_take_turns_as_a_whole():
    model = named((TALL, WIDE), (SQUARE, ODD), (WIDE, TALL), (ODD, SQUARE))
    optimizer = FRUGAL(model.named_parameters(), split="block", blocks="layer", density=0.25,
                       block_order="descending", update_gap=1)  # fmt: skip
    seen = []
    for _ in range(4):
        step_with_ones(optimizer)
        seen.append(active_of(optimizer))
    assert seen == [[6, 7], [4, 5], [2, 3], [0, 1]]
    with pytest.raises(ValueError, match="reads layers from names"):
        FRUGAL([weight(TALL)], split="block", blocks="layer").init_state()


def test_listed_tensors_become_numbers_and_survive_a_checkpoint():
    model = named((TALL, WIDE), (SQUARE, ODD))
    a, b, c, d = model.parameters()
    lists = [[a, d], [b, c]]

    def make(ps):
        return FRUGAL(ps, split="block", blocks=lists, density=0.5, block_order="ascending",
                      update_gap=1)  # fmt: skip

    optimizer = make(model.named_parameters())
    assert optimizer.param_groups[0]["block_of"] == (0, 1, 1, 0)
    assert optimizer.defaults["block_of"] == "tensor"
    step_with_ones(optimizer)
    assert active_of(optimizer) == [0, 3]
    step_with_ones(optimizer)
    assert active_of(optimizer) == [1, 2]
    saved = through_a_file(optimizer.state_dict())
    again = make(model.named_parameters())
    again.load_state_dict(saved)
    step_with_ones(again)
    assert active_of(again) == [0, 3]
    grown = copy.deepcopy(optimizer)
    assert grown.param_groups[0]["block_of"] == (0, 1, 1, 0)


def test_a_matrix_in_no_list_is_named():
    model = named((TALL, WIDE), (SQUARE, ODD))
    a, b, c, _ = model.parameters()
    with pytest.raises(ValueError, match=r"'layers.1.b' is in none of the lists"):
        FRUGAL(model.named_parameters(), split="block", blocks=[[a, b], [c]])
    with pytest.raises(ValueError, match="parameter 1 of shape"):
        FRUGAL([a, b], split="block", blocks=[[a]])
    vector = torch.nn.Parameter(torch.ones(3))  # AdamW's, in no block
    optimizer = FRUGAL([a, vector], split="block", blocks=[[a]], density=1.0)
    step_with_ones(optimizer)
    assert optimizer.param_groups[0]["block_of"] == (0, -1)
    with pytest.raises(ValueError, match="is in none of the lists"):
        optimizer.add_param_group({"params": [c]})
    with pytest.raises(ValueError, match="has no blocks"):
        FRUGAL([a], blocks="layer")
    with pytest.raises(ValueError, match="need split='block'"):
        FRUGAL([a], blocks=[[a]])


@pytest.mark.parametrize("reset", ["all", "changed"])
def test_blocks_stacked_or_not_have_the_same_bits(reset, monkeypatch):
    def made():
        params = [weight(SQUARE, k) for k in range(6)] + [weight(ODD, k) for k in range(4)]
        optimizer = FRUGAL(params, split="block", density=0.5, update_gap=2, reset=reset, lr=0.02)
        grads = [gradients(tuple(p.shape), 8, k) for k, p in enumerate(params)]
        return run(optimizer, params, grads), tensors(optimizer)

    stacked = made()
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    assert same(stacked, made())


@pytest.mark.parametrize("split", ["columns", "rows", "svd", "block"])
def test_nothing_chosen_although_wanted_is_pointed_out_once(split):
    gradient_split.warn_rounds_to_zero.cache_clear()
    block_schedule._active_blocks.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            p = weight((3, 3))
            run(FRUGAL([p], split=split, density=0.1), [p], [gradients((3, 3), 3)])
    assert [str(w.message)[:11] for w in caught] == ["density 0.1"]


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"density": -0.1}, "density must be a count"),
        ({"update_gap": 0}, "update_gap must be an int of at least 1"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"split": "diagonal"}, "split must be one of block, columns"),
        ({"split": "rows:2,2"}, "split 'rows:2,2': 'rows' takes no options"),
        ({"split": "svd:2"}, "split: projection 'svd:2'"),
        ({"split": "svd", "projection": "svd:2"}, "projection: projection 'svd:2'"),
        ({"split": "range:x"}, "range"),
        ({"split": "topk", "proj_type": "full"}, "no second side"),
        ({"split": "block", "reset": "none"}, "use 'changed'"),
        ({"compat": "reference", "reset": "changed"}, "'all' or 'none'"),
        ({"inner": "adafactor"}, "inner must be one of"),
        ({"state_free": "lion"}, "state_free must be one of"),
        ({"sign_threshold": -1.0}, "sign_threshold must be at least 0"),
    ],
)
def test_bad_settings_are_one_sentence(bad, text):
    check_refusal(FRUGAL, bad, text)
    with pytest.raises(ValueError, match="stagger"):
        FRUGAL([weight(WIDE)], split="block", stagger=True)


# the one-pass term, its fall-backs and what they need


@pytest.mark.parametrize("split", COORDINATES)
@pytest.mark.parametrize("reset", ["all", "changed", "none"])
@pytest.mark.parametrize("inner", ["adamw", "lion"])
def test_panels_do_not_matter(split, reset, inner, monkeypatch):
    """Cut small, whole, turned, or multiplied by a device's flag: one and the same step."""
    shape, settings = (37, 21), {"lr": 0.02, "density": 0.4, "update_gap": 2, "split": split,
                                 "reset": reset, "inner": inner, "weight_decay": 0.1}  # fmt: skip
    grads = gradients(shape, 6)

    def made(**change):
        return trajectory(lambda ps: FRUGAL(ps, **settings, **change), shape, 6)[-1]

    usual = made()
    transposed = torch.nn.Parameter(weight(shape).detach().mT.contiguous())
    run(FRUGAL([transposed], view="transposed", **settings), [transposed], [[G.mT for G in grads]])
    torch.testing.assert_close(transposed.detach().mT, usual, rtol=0, atol=NEAR)
    monkeypatch.setattr(FRUGAL, "_wait", False)  # as on a device: flags multiply the term
    torch.testing.assert_close(made(), usual, rtol=0, atol=NEAR)
    monkeypatch.undo()
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    monkeypatch.setattr(coordinates, "SPLIT_PANEL", 5 * 21)
    torch.testing.assert_close(made(), usual, rtol=0, atol=NEAR)


@pytest.mark.parametrize("split", COORDINATES)
def test_a_batch_of_large_matrices_is_cut_one_by_one(split, monkeypatch):
    monkeypatch.setattr(coordinates, "SPLIT_PANEL", 64)
    shape = (3, 24, 10)
    p, grads = weight(shape), gradients(shape, 5)
    settings = {"lr": 0.02, "density": 0.5, "update_gap": 2, "split": split}
    optimizer = FRUGAL([p], **settings)
    whole, index = [], []
    for step, G in enumerate(grads):
        run(optimizer, [p], [[G]])
        whole.append(p.detach().clone())
        if step % 2 == 0:
            index.append(optimizer.state[p]["index"].clone())
    for k in range(3):
        W = weight(shape).detach()[k]
        choices = [rows[k].tolist() for rows in index]
        theirs, _ = frugal(W, [G[k] for G in grads], choices, split, lr=0.02, update_gap=2)
        for a, b in zip(whole, theirs, strict=True):
            torch.testing.assert_close(a[k].double(), b, rtol=0, atol=1e-5)
    assert not torch.equal(index[0][0], index[0][1])  # each matrix draws its own


@pytest.mark.parametrize("split", COORDINATES)
@pytest.mark.parametrize("view", ["heads_in:2", "heads:2", "rows:8,16", "interleaved"])
def test_panels_of_a_cut_weight_do_not_touch_its_neighbours(split, view, monkeypatch):
    def moved():
        make = lambda ps: FRUGAL(ps, split=split, view=view, weight_decay=0.1, lr=0.02)  # noqa: E731
        return trajectory(make, (24, 20), 4)[-1]

    whole = moved()
    monkeypatch.setattr(coordinates, "SPLIT_PANEL", 40)
    torch.testing.assert_close(moved(), whole, rtol=0, atol=NEAR)


@pytest.mark.parametrize("split", COORDINATES)
@pytest.mark.parametrize("shape", [(1024, 2048), (2048, 1024)])
def test_a_step_needs_panels_only(split, shape):
    p = weight(shape)
    optimizer = FRUGAL([p], split=split)
    p.grad = torch.ones(shape)
    optimizer.step()
    counter = count_step(optimizer)
    numbers = 8 * optimizer.state[p]["index"].numel()  # int64, as scatter wants them
    assert counter.peak <= 3 * 4 * coordinates.SPLIT_PANEL + 2 * numbers


@pytest.mark.parametrize("split", [*COORDINATES, "svd"])
def test_a_threshold_silences_small_signs(split):
    G = doubles(TALL, 1)[0]
    floor = 0.5 * float(G.square().mean().sqrt())
    p, settings = weight(TALL, dtype=DOUBLE), {"split": split, "density": 0.0, "lr": 0.1}
    run(FRUGAL([p], sign_threshold=0.5, **settings), [p], [[G]])
    want = weight(TALL, dtype=DOUBLE).detach() - 0.1 * G.sign() * (G.abs() > floor)
    torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", [*COORDINATES, "svd", "block"])
@pytest.mark.parametrize("name, atol", [("bfloat16", 2e-3), ("int8", 2e-2)])
def test_narrow_state_stays_near(split, name, atol):
    settings = {**BASE, "split": split, "density": 0.5, "lr": 0.01,
                "state_free": "sgd"}  # fmt: skip
    wide = trajectory(lambda ps: FRUGAL(ps, **settings), (24, 32), 9)
    narrow = trajectory(lambda ps: FRUGAL(ps, state_dtype=name, **settings), (24, 32), 9)
    torch.testing.assert_close(wide[-1], narrow[-1], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["svd_full", "range", "power", "topk", "dct", "dct:l1"])
def test_every_projector_is_a_split(kind):
    p = weight(WIDE)
    optimizer = FRUGAL([p], split=kind, density=0.5, update_gap=3, reset="changed")
    for step, G in enumerate(gradients(WIDE, 7)):
        before = p.detach().clone()
        run(optimizer, [p], [[G]])
        assert optimizer.state[p]["refreshed"] == 3 * (step // 3) + 1
        assert 0 < float((p.detach() - before).abs().max()) < 0.02


def test_embeddings_norms_and_heads_stay_state_full():
    model = torch.nn.Sequential()
    model.embed = torch.nn.Embedding(12, 8)
    model.norm = torch.nn.LayerNorm(8)
    model.fc = torch.nn.Linear(8, 8)
    model.lm_head = torch.nn.Linear(8, 12, bias=False)
    optimizer = FRUGAL(model, density=0.0)
    rules = {row.name: row.rule for row in optimizer.assignment().rows}
    assert {name for name, rule in rules.items() if rule == "FRUGAL"} == {"fc.weight"}


def test_an_index_beside_the_moments_is_kept_in_four_bytes():
    p = weight(WIDE)
    optimizer = FRUGAL([p], split="randk", reset="changed")
    run(optimizer, [p], [gradients(WIDE, 2)])
    state = optimizer.state[p]
    assert state["index"].dtype == state["age"].dtype == torch.int32
    assert state["index"].tolist() == sorted(state["index"].tolist())


@pytest.mark.parametrize("kind", ["svd_full", "range", "power:4", "random", "topk", "dct:l1"])
def test_projection_names_the_subspace_of_the_split_svd(kind):
    def trained(**options):
        p = weight(WIDE)
        return run(
            FRUGAL([p], lr=0.02, density=0.3, update_gap=3, **options), [p], [gradients(WIDE, 7)]
        )

    named = trained(split="svd", projection=kind)
    assert same(named, trained(split=kind))
    assert not same(named, trained(split="svd"))
    with pytest.raises(ValueError, match="needs split='svd', got split='columns'"):
        FRUGAL([weight(WIDE)], projection=kind)


@pytest.mark.parametrize("kind", ["svd", "random", "range", "power", "dct", "topk"])
def test_round_off_of_a_low_rank_gradient_has_no_sign(kind):
    """A gradient inside the subspace, and rows without a gradient: nothing else moves."""
    p = weight((64, 96))
    draw = torch.Generator().manual_seed(0)
    G = torch.randn(64, 8, generator=draw) @ torch.randn(8, 96, generator=draw)
    G[5:9] = 0.0
    before = p.detach().clone()
    run(FRUGAL([p], lr=0.01, split=kind, density=16), [p], [[G]])
    moved = (p.detach() - before).abs()
    q = weight((64, 96))
    run(FRUGAL([q], lr=0.01, split=kind, density=16, state_free="no"), [q], [[G]])
    if kind in ("svd", "range", "power"):  # which hold all of G
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)
    if kind in ("random", "dct"):  # which mix rows, so that the rest is not zero there
        return
    # untouched rows differ from what the subspace moves them by, which is round-off, by nothing
    torch.testing.assert_close(p.detach()[5:9], q.detach()[5:9], rtol=0, atol=0)
    assert float(moved.max()) > 0.0


@pytest.mark.parametrize(
    ("split", "shape"),
    [("columns", (40, 7)), ("rows", (7, 30)), ("randk", (1, 7)), ("svd", (7, 40))],
)
def test_a_density_that_is_a_whole_number_counts(split, shape):
    p = weight((40, 30))
    optimizer = FRUGAL([p], split=split, density=7)
    optimizer.init_state()
    assert optimizer.state[p]["exp_avg"].shape == shape
    all_of_it = FRUGAL([q := weight((40, 30))], split=split, density=10**6)
    all_of_it.init_state()
    assert all_of_it.state[q]["exp_avg"].numel() == 1200
    blocks = FRUGAL([weight((4, 4), i) for i in range(5)], split="block", density=2)
    blocks.init_state()
    assert sum("exp_avg" in entry for entry in blocks.state.values()) == 2


def test_groups_of_other_methods_need_be_in_no_list_of_blocks():
    a, b = weight((4, 5)), weight((4, 5), 1)
    groups = [{"params": [a]}, {"params": [b], "rule": "GaLore", "rank": 2}]
    optimizer = FRUGAL(groups, split="block", blocks=[[a]], density=1.0)
    assert optimizer.param_groups[0]["block_of"] == (0,)


@pytest.mark.parametrize("split", ["columns", "rows", "randk", "svd"])
def test_density_zero_is_asked_for_and_warns_nobody(split):
    p = weight(WIDE)
    gradient_split.warn_rounds_to_zero.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = FRUGAL([p], density=0.0, split=split)
        run(optimizer, [p], [gradients(WIDE, 1)])
    assert optimizer.state[p].keys() <= {"step", "refreshed"}
