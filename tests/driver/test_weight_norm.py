"""`weight_norm=` and `weight_radius=`: what steers the norms of weights, for every class."""

import copy
import io
import math

import pytest
import torch
from helpers.every_class import CLASSES, problem
from helpers.methods import METHODS
from helpers.norms import oracle_step
from helpers.problems import gaussian, gradients, run, same, tensors, weight
from helpers.recordings import fixture, tolerance
from helpers.rules import FoldRule, PairRule, PlainRule, RowsRule, WindowRule
from torch import nn

from stiefel.optimizers import GaLore, Muon, Muown, RowNorm, StackedOptimizer, memory_report
from stiefel.optimizers._driver import buckets, norm_write, write
from stiefel.optimizers._driver.memory import MemoryReport
from stiefel.optimizers._driver.norms import NormControl, parse
from stiefel.optimizers._lora.pair_groups import PairOptimizer

FIRST = {name.partition("-")[0]: name for name in reversed(METHODS) if name != "muown"}
"""Of every class its first entry; Muown keeps norms itself, and refuses other words."""
STEERED = pytest.mark.parametrize(
    "cls",
    [cls for cls in CLASSES if not issubclass(cls, PairOptimizer) and cls is not Muown],
    ids=lambda cls: cls.__name__,
)
FEW = ("muon", "galore", "rows", "rownorm")
EACH = pytest.mark.parametrize("name", FIRST.values())
WORDS = [
    *("relative", "relative:rows", "floor", "floor:3", "rowfloor:2", "sphere", "sphere:rows"),
    *("brake", "brake:0.2,0.7:rows", "pin", "pin:0.3,0.8", "hyperball", "hyperball:rows"),
    *("floor:2+brake", "rowfloor:2+pin", "rowfloor+sphere", "relative:rows+sphere"),
    *("relative+brake:0,0", "relative:rows+pin", "floor:1.5+sphere:rows", "sphere+relative"),
]


def plain(params, words, lr=0.05, decay=0.0, **options):
    """Descent along the gradient, steered."""
    return StackedOptimizer(params, PlainRule(), lr, decay, weight_norm=words, **options)


def gap(a, b):
    return float((a - b).abs().max())


# recorded trajectories ----------------------------------------------------------------------------

RECORDED = {
    **{f"hyperball-{x}": "hyperball" for x in ("square", "tall", "wide")},
    **{f"hyperball-measured-{x}": "hyperball" for x in ("square", "wide")},
    **{f"relative-{x}": "relative" for x in ("square", "tall", "wide")},
    **{f"brake-{x}": "brake" for x in ("square", "tall", "wide")},
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectories(name):
    data = fixture(name)
    lr, decay = (data["settings"].get(key, 0.0) for key in ("lr", "weight_decay"))
    if name.startswith("hyperball"):  # decay before a sphere only makes lr larger
        lr, decay = lr / (1 - lr * decay), 0.0
    p = nn.Parameter(data["W0"].clone())
    found = run(plain([p], RECORDED[name], lr, decay), [p], [data["grads"]])
    limit = tolerance(data, "max_abs_diff_to_float64_run")
    assert gap(torch.stack([W for (W,) in found]), data["W"]) <= limit


@pytest.mark.parametrize(
    "name", ["floor-pin-square", *(f"rowfloor-pin-{x}" for x in ("square", "tall", "wide"))]
)
def test_recorded_trajectories_of_the_record(name):
    data = fixture(name)
    lr, decay = (data["settings"][key] for key in ("lr", "cautious_weight_decay"))
    p = nn.Parameter(data["W0"].clone())
    words = f"{name.split('-')[0]}:0.3825+pin"
    found = run(plain([p], words, lr, decay, cautious=True), [p], [data["grads"]])
    limit = tolerance(data, "max_abs_diff_to_float64_run")
    assert gap(torch.stack([W for (W,) in found]), data["W"]) <= limit


# the closed form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize(
    ("dtype", "cautious"),
    [(torch.float32, False), (torch.float64, False), (torch.float64, True)],
    ids=str,
)
def test_every_word_is_what_it_says(words, dtype, cautious):
    """Against the steps written out one after the other, matrix by matrix, for every form."""
    forms = {"auto": (9, 7), "transposed": (6, 11), "heads:3": (12, 5), "batch": (3, 4, 7)}
    decay = 0.0 if not cautious and ("sphere" in words or "hyperball" in words) else 0.3
    for seed, (view, shape) in enumerate(forms.items()):
        p = nn.Parameter(gaussian(*shape, seed=seed, dtype=dtype))
        group = {"params": [p], "view": view, "cautious": cautious}
        optimizer = plain([group], words, 0.1, decay)
        (unit,) = optimizer._get_plan().units
        W = unit.views[0].to_matrices(p.detach().clone()).double()
        radii = None
        for t in range(4):
            p.grad = gaussian(*shape, seed=100 * seed + t, dtype=dtype) * 3 ** (t - 1)
            U = unit.views[0].to_matrices(p.grad).double()
            W, radii = oracle_step(words, W, U, 0.1, decay, radii, cautious)
            optimizer.step()
            found = unit.views[0].to_matrices(p.detach()).double()
            assert gap(found, W) < (3e-6 if dtype == torch.float32 else 1e-12), (view, t)


@pytest.mark.parametrize("words", WORDS)
def test_rows_are_those_of_the_weight_though_a_rule_turns_it(words):
    """A rule that turns tall weights, and has terms of all kinds, against its own dense step."""
    for shape in ((12, 5), (5, 12)):
        found = []
        for steered in (False, True):
            p = weight(shape)
            options = {"weight_norm": words} if steered else {}
            optimizer = StackedOptimizer([p], RowsRule(), 0.1, 0.0, **options)
            W0 = p.detach().clone()
            p.grad = gradients(shape, 1)[0]
            optimizer.step()
            found.append((p.detach() - W0, p.detach().clone()))
        U = -found[0][0].double()[None] / 0.1
        expected, _ = oracle_step(words, W0.double()[None], U, 0.1, 0.0, None)
        assert gap(found[1][1], expected[0]) < 1e-5


@EACH
def test_every_class_is_steered_along_its_own_first_step(name):
    """The first step of a class, steered, from its plain first step."""
    words_of = {(12, 8): ("relative", "rowfloor:2+pin"), (6, 10): ("hyperball", "brake:rows")}
    for shape, words in ((shape, x) for shape, several in words_of.items() for x in several):
        W0, grads = weight(shape).detach(), gradients(shape, 1)
        ends = []
        for options in ({}, {"weight_norm": words}):
            p = nn.Parameter(W0.clone())
            optimizer = METHODS[name]([p], weight_decay=0.0, **options)
            lr = optimizer.param_groups[0]["lr"]
            ends.append(run(optimizer, [p], [grads])[-1][0])
        U = (W0 - ends[0]).double()[None] / lr
        expected, _ = oracle_step(words, W0.double()[None], U, lr, 0.0, None)
        assert gap(ends[1], expected[0]) < 2e-5


# properties ---------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sphere_keeps_the_norm(name, dtype):
    shape, steps = ((8, 6), 500 if name in FEW else 30)
    if dtype == torch.bfloat16:
        shape, steps = (192, 256), 4
    p = nn.Parameter((weight(shape).detach() * 0.1).to(dtype))
    optimizer = METHODS[name]([p], weight_norm="hyperball", weight_decay=0.3)
    norm = float(p.detach().double().norm())
    for G in gradients(shape, min(steps, 10)) * max(1, steps // 10):
        p.grad = G.to(dtype)
        optimizer.step()
    found = float(p.detach().double().norm())
    assert abs(found / norm - 1) < (1e-6 if dtype == torch.float32 else 1e-4)
    assert abs(float(optimizer.state[p]["weight_radius"]) / norm - 1) < 1e-6


@pytest.mark.parametrize("write", ["nearest", "stochastic", "kahan", "eco"])
def test_a_stored_radius_holds_in_every_write_mode(write):
    p = nn.Parameter((weight((64, 96)).detach() * 0.1).bfloat16())
    optimizer = Muon([p], lr=0.02, weight_norm="hyperball", write=write)
    norm = float(p.detach().double().norm())
    for G in gradients((64, 96), 10) * 3:
        p.grad = G.bfloat16()
        optimizer.step()
    assert abs(float(p.detach().double().norm()) / norm - 1) < 1e-4


def directions(make, W0, grads):
    p = nn.Parameter(W0.clone())
    found = torch.stack([W for (W,) in run(make([p]), [p], [grads])])
    return found / found.flatten(1).norm(dim=1).view(-1, 1, 1)


def test_hyperball_cancels_all_scales():
    W0, grads = weight((9, 6)).detach(), gradients((9, 6), 8)
    expected = directions(lambda ps: plain(ps, "hyperball"), W0, grads)
    other = directions(lambda ps: plain(ps, "hyperball"), W0, [7 * G for G in grads])
    assert gap(expected, other) < 1e-6
    other = directions(lambda ps: plain(ps, "hyperball"), 7 * W0, grads)
    assert gap(expected, other) < 1e-6
    rho = 7 * float(W0.norm()) / math.sqrt(54)
    other = directions(lambda ps: plain(ps, "hyperball", weight_radius=rho), 7 * W0, grads)
    assert gap(expected, other) < 1e-6
    found = [
        directions(lambda ps: Muon(ps, 0.02, weight_norm="hyperball", adjust_lr_fn=fn), W0, grads)  # noqa: B023
        for fn in ("original", "match_rms_adamw", "spectral", "none")
    ]
    assert all(gap(found[0], other) < 2e-6 for other in found[1:])


@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.5, 0.999])
def test_the_learning_rate_bounds_the_angle(lr):
    for seed in range(4):
        W0, G = gaussian(7, 5, seed=seed), gaussian(7, 5, seed=seed + 10)
        for part in (1.0, 0.1, 1e-3):  # the gradient, and one that lies nearly along W
            p = nn.Parameter(W0.double().clone())
            p.grad = (part * G + (1 - part) * W0).double()
            plain([p], "hyperball", lr).step()
            a, b = p.detach() / p.detach().norm(), W0.double() / W0.double().norm()
            angle = 2 * math.asin(min(1.0, float((a - b).norm()) / 2))
            assert angle <= math.asin(lr) * (1 + 1e-6) + 1e-9
        G = G - W0 * (G * W0).sum() / W0.square().sum()
        p = nn.Parameter(W0.double().clone())
        p.grad = G.double()
        plain([p], "hyperball", lr).step()
        cosine = float((p.detach() * W0.double()).sum() / p.detach().norm() / W0.double().norm())
        assert abs(math.acos(cosine) - math.atan(lr)) < 1e-6


@pytest.mark.parametrize("words", ["hyperball", "brake", "sphere", "floor+pin"])
def test_a_step_that_nearly_cancels_the_weight_keeps_its_promise(words):
    for along in (0.99, 0.999, 0.9999, 1.0):
        W0 = gaussian(30, 20)
        G = W0 * (along if words != "hyperball" else 1.0) + 1e-4 * gaussian(30, 20, seed=1)
        lr = along if words == "hyperball" else 1.0
        p = nn.Parameter(W0.clone())
        p.grad = G
        plain([p], words, lr).step()
        assert bool(p.isfinite().all())
        expected, _ = oracle_step(words, W0.double()[None], G.double()[None], lr, 0.0, None)
        assert abs(float(p.detach().double().norm() / expected.norm()) - 1) < 1e-3


@pytest.mark.parametrize(
    "words", ["hyperball", "sphere:rows", "relative", "brake", "rowfloor:2+pin"]
)
@pytest.mark.parametrize("is_turned", [False, True])
def test_squares_that_overflow_are_no_obstacle(words, is_turned):
    """A gradient, or a weight, whose square no float32 holds, beside one of usual size."""
    for large, G in ((1e24, 1.0), (1.0, 1e24), (1e24, 1e24)):
        params = [nn.Parameter(gaussian(9, 6, seed=i) * (large if i else 1)) for i in range(2)]
        expected = []
        for i, p in enumerate(params):
            p.grad = gaussian(9, 6, seed=i + 5) * (G if i else 1)
            U = (p.grad.mT if is_turned else p.grad).double()[None]
            W = (p.detach().mT if is_turned else p.detach()).double()[None]
            expected.append(oracle_step(words, W, U, 0.1, 0.0, None)[0][0])
        view = {"view": "transposed"} if is_turned else {}
        plain([{"params": params, **view}], words, 0.1).step()
        for p, W in zip(params, expected, strict=True):
            W = W.mT if is_turned else W
            assert gap(p.detach() / W.abs().max(), W / W.abs().max()) < 3e-6


@pytest.mark.parametrize("words", ["hyperball", "sphere:rows", "rowfloor:2+pin", "sphere:whole"])
def test_where_the_host_does_not_look_squares_that_overflow_leave_a_matrix_as_it_is(
    words, monkeypatch
):
    monkeypatch.setattr(norm_write, "LOOKED_AT", ())
    p = nn.Parameter(gaussian(3, 5, 4))
    p.grad = gaussian(3, 5, 4, seed=1)
    p.grad[1] *= 1e24
    before, optimizer = p.detach().clone(), plain([p], words, 0.1)
    optimizer.step()
    same = (p.detach() == before).flatten(1).all(1).tolist()
    assert same == ([True] * 3 if "whole" in words else [False, True, False])
    p.grad = gaussian(3, 5, 4, seed=2)
    optimizer.step()
    assert bool(p.isfinite().all()) and float(p.detach().abs().max()) < 10
    assert not torch.equal(p.detach()[1], before[1])


@EACH
def test_decay_has_no_effect_on_a_sphere(name):
    found = []
    for decay in (0.0, 0.3):
        p = weight((8, 6))
        optimizer = METHODS[name]([p], weight_norm="sphere", weight_decay=decay)
        found.append(run(optimizer, [p], [gradients((8, 6), 5)])[-1])
        (row,) = optimizer.assignment().rows
        assert row.decay == 0.0
    assert same(*found)


@EACH
def test_words_that_ask_for_nothing_change_nothing(name):
    found = {}
    for words in (None, "brake:1,1", "floor:0", "rowfloor:0", "pin:1,1"):
        p = weight((8, 6))
        optimizer = METHODS[name]([p], weight_norm=words, weight_decay=0.1)
        found[words] = run(optimizer, [p], [gradients((8, 6), 3)])[-1][0]
    # a pin keeps the tangent part of a step from making the norm larger
    assert gap(found[None], found.pop("pin:1,1")) > 1e-6
    assert all(gap(found[None], other) < 2e-6 for other in found.values())


@pytest.mark.parametrize("words", ["relative:rows", "sphere:rows", "brake:rows", "hyperball:rows"])
def test_rows_are_matrices_of_their_own(words):
    W0, grads = weight((5, 8)).detach(), gradients((5, 8), 6)
    p = nn.Parameter(W0.clone())
    joint = run(plain([p], words, 0.1), [p], [grads])[-1][0]
    for i in range(5):
        row = nn.Parameter(W0[i : i + 1].clone())
        alone = plain([row], words.replace(":rows", ""), 0.1)
        assert gap(run(alone, [row], [[G[i : i + 1] for G in grads]])[-1][0][0], joint[i]) < 1e-6


@pytest.mark.parametrize("words", ["relative", "hyperball", "brake", "floor:2+pin"])
def test_experts_are_separate_matrices_unless_whole(words):
    shape = (4, 6, 5)
    W0, grads = weight(shape).detach(), gradients(shape, 6)
    p = nn.Parameter(W0.clone())
    joint = run(plain([p], words, 0.1), [p], [grads])[-1][0]
    for i in range(4):
        own = nn.Parameter(W0[i].clone())
        alone = run(plain([own], words, 0.1), [own], [[G[i] for G in grads]])[-1][0]
        assert gap(alone, joint[i]) < 1e-6
    whole = "+".join(f"{word}:whole" for word in words.split("+"))
    p, flat = nn.Parameter(W0.clone()), nn.Parameter(W0.flatten(0, 1).clone())
    joint = run(plain([p], whole, 0.1), [p], [grads])[-1][0]
    one = run(plain([flat], words, 0.1), [flat], [[G.flatten(0, 1) for G in grads]])[-1][0]
    assert gap(joint.flatten(0, 1), one) < 1e-6


def test_a_whole_sphere_keeps_the_joint_norm_only():
    p = weight((4, 6, 5))
    norms = p.detach().flatten(1).norm(dim=1)
    optimizer = plain([p], "hyperball:whole", 0.3)
    run(optimizer, [p], [gradients((4, 6, 5), 6)])
    now = p.detach().flatten(1).norm(dim=1)
    assert abs(float(now.norm() / norms.norm()) - 1) < 1e-6 and gap(now, norms) > 1e-3
    assert optimizer.state[p]["weight_radius"].shape == (4, 1, 1)


def test_heads_are_steered_one_by_one_unless_whole():
    W0, grads = weight((12, 5)).detach(), gradients((12, 5), 5)
    for words, alike in (("hyperball", True), ("hyperball:whole", False)):
        p = nn.Parameter(W0.clone())
        run(plain([{"params": [p], "view": "heads:3"}], words, 0.2), [p], [grads])
        norms = [X.view(3, -1).norm(dim=1) for X in (W0, p.detach())]
        assert (gap(*norms) < 1e-5) is alike
        assert abs(float(p.detach().norm() / W0.norm()) - 1) < 1e-6
    with pytest.raises(ValueError, match=r"3 parts by its view.*':whole'"):
        plain([{"params": [weight((12, 5))], "view": "rows:2,4,6"}], "hyperball:whole")


SHAPES = [(12, 8), (12, 8), (8, 13), (12, 8)]


@EACH
@pytest.mark.parametrize(
    ("words", "dtype"),
    [("rowfloor:2+pin", torch.float32), ("sphere:rows", torch.float32),
     ("hyperball", torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_a_stack_has_the_bits_of_its_weights_alone(name, words, dtype):
    def params():
        weights = [(weight(s, i).detach() * 0.1).to(dtype) for i, s in enumerate(SHAPES)]
        return [(f"layer.{i}.weight", nn.Parameter(W)) for i, W in enumerate(weights)]

    series = [gradients(s, 2, i) for i, s in enumerate(SHAPES)]
    options = {"weight_norm": words, "weight_decay": 0.1}
    named = params()
    optimizer = METHODS[name](named, **options)
    joint = run(optimizer, [p for _, p in named], series)[-1]
    for i, (key, p) in enumerate(params()):
        alone = METHODS[name]([(key, p)], **options)
        assert torch.equal(run(alone, [p], [series[i]])[-1][0], joint[i])


def test_stacks_of_any_size_have_the_bits_of_one():
    for shape in ((128, 256), (1, 4096), (4096, 1), (33, 65)):
        for words in ("hyperball", "rowfloor:2+pin", "sphere:rows"):
            for rule in (PlainRule(), RowsRule()):
                series = [gradients(shape, 2, i) for i in range(3)]
                params = [weight(shape, i) for i in range(3)]
                make = lambda ps: StackedOptimizer(ps, rule, 0.1, weight_norm=words)  # noqa: B023, E731
                joint = run(make(params), params, series)[-1]
                for i in range(3):
                    p = weight(shape, i)
                    assert torch.equal(run(make([p]), [p], [series[i]])[-1][0], joint[i])


def test_groups_in_one_stack_keep_their_learning_rates_decays_and_radii():
    shapes, series = [(6, 5)] * 4, [gradients((6, 5), 4, i) for i in range(4)]
    for words, more in (("brake+relative", {}), ("hyperball", {"weight_radius": 0.3})):
        settings = [{"lr": 0.1}, {"weight_decay": 0.5}, more, {"lr": torch.tensor(0.02)}]
        params = [weight(s, i) for i, s in enumerate(shapes)]
        groups = [{"params": [p], **x} for p, x in zip(params, settings, strict=True)]
        joint = run(plain(groups, words, decay=0.1), params, series)[-1]
        for i, x in enumerate(settings):
            p = weight(shapes[i], i)
            alone = run(plain([{"params": [p], **x}], words, decay=0.1), [p], [series[i]])[-1][0]
            assert torch.equal(alone, joint[i])


# state --------------------------------------------------------------------------------------------


def test_a_given_radius_serves_all_shapes_and_may_change_at_any_step():
    params = [weight((6, 5)), weight((9, 4), 1), weight((3, 4, 5), 2)]
    optimizer = plain(params, "hyperball", weight_radius=0.02)
    series = [gradients(p.shape, 1, i) for i, p in enumerate(params)]
    for rho in (0.02, 0.5):
        optimizer.param_groups[0]["weight_radius"] = rho
        run(optimizer, params, series)
        for p in params:
            matrices = p.detach().view(-1, *p.shape[-2:])
            rms = matrices.square().mean((-2, -1)).sqrt()
            assert gap(rms, torch.full_like(rms, rho)) < 1e-6
    rows = plain([params[0]], "sphere:rows", weight_radius=0.1)
    run(rows, params[:1], series[:1])
    rms = params[0].detach().square().mean(-1).sqrt()
    assert gap(rms, torch.full_like(rms, 0.1)) < 1e-7


@pytest.mark.parametrize(
    ("name", "words"),
    [*((name, "hyperball") for name in FIRST.values()), *((name, "sphere:rows") for name in FEW)],
)
def test_a_run_resumes_in_equal_bits(name, words):
    make = lambda ps: METHODS[name](ps, weight_norm=words)  # noqa: E731
    shapes = [(12, 8), (6, 10), (12, 8)]
    series = [gradients(s, 6, i) for i, s in enumerate(shapes)]
    params = [weight(s, i) for i, s in enumerate(shapes)]
    optimizer = make(params)
    whole = run(optimizer, params, series)[-1]
    fresh = [weight(s, i) for i, s in enumerate(shapes)]
    first = make(fresh)
    run(first, fresh, [s[:3] for s in series])
    others, twin = copy.deepcopy((fresh, first))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make(fresh)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    rest = [s[3:] for s in series]
    assert same(run(second, fresh, rest)[-1], whole)
    assert same(tensors(second), tensors(optimizer))
    assert same(run(twin, others, rest)[-1], whole)


@EACH
def test_a_file_without_radius_measures_it_and_one_with_it_loads_anywhere(name):
    p = weight((8, 6))
    optimizer = METHODS[name]([p], weight_norm="hyperball")
    run(optimizer, [p], [gradients((8, 6), 2)])
    saved = optimizer.state_dict()
    with_radius = copy.deepcopy(saved)
    for group in saved["param_groups"]:
        del group["weight_norm"], group["weight_radius"]
    for entry in saved["state"].values():
        del entry["weight_radius"]
    q = nn.Parameter(3 * p.detach())
    other = METHODS[name]([q], weight_norm="hyperball")
    other.load_state_dict(saved)
    assert float(other.state[q].get("weight_radius", -1)) == -1.0  # some keep no other state
    run(other, [q], [gradients((8, 6), 2)])
    assert abs(float(q.detach().norm() / (3 * p.detach()).norm()) - 1) < 1e-6
    for group in with_radius["param_groups"]:
        group["weight_norm"] = None
    free = METHODS[name]([weight((8, 6))])
    free.load_state_dict(with_radius)
    assert not any("weight_radius" in entry for entry in free.state.values())


@EACH
@pytest.mark.parametrize(
    ("before", "after"), [("hyperball", "brake"), (None, "sphere"), ("sphere", "sphere:rows")]
)
def test_a_sphere_comes_and_goes_with_a_new_optimizer_only(name, before, after):
    params, series = [weight((8, 6))], [gradients((8, 6), 1)]
    optimizer = METHODS[name](params, weight_norm=before)
    run(optimizer, params, series)
    weights, state = [p.detach().clone() for p in params], tensors(optimizer)
    optimizer.param_groups[0]["weight_norm"] = after
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match=r"weight_norm=.*state 'weight_radius'"):
            call()
        assert same(weights, [p.detach() for p in params]) and same(state, tensors(optimizer))
    optimizer.param_groups[0]["weight_norm"] = before
    run(optimizer, params, series)


def test_words_without_state_may_change_at_any_step():
    p = weight((8, 6))
    optimizer = plain([p], None)
    for words in ("brake", "relative", None, "floor:2+pin"):
        optimizer.param_groups[0]["weight_norm"] = words
        W = p.detach().clone()
        (G,) = gradients((8, 6), 1)
        p.grad = G
        optimizer.step()
        expected = oracle_step(words, W.double()[None], G.double()[None], 0.05, 0.0, None)[0][0]
        assert gap(p.detach(), expected) < 1e-6


@EACH
@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_the_report_counts_the_radius(name, state_dtype):
    for words in ("sphere:rows", "brake"):
        options = {"state_dtype": state_dtype, "weight_norm": words}
        p = weight((64, 80))
        optimizer = METHODS[name]([p], **options)
        run(optimizer, [p], [gradients((64, 80), 2)])
        report = MemoryReport.of(METHODS[name]([weight((64, 80))], **options))
        stored = sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
        assert report.rows[0].state == stored
        radius = optimizer.state[p].get("weight_radius")
        assert (radius is None) is (words == "brake")
        assert radius is None or radius.dtype == torch.float32


def test_a_radius_stays_where_a_rule_drops_its_state():
    p = weight((8, 6))
    optimizer = StackedOptimizer([p], WindowRule(), 0.1, weight_norm="sphere")
    norm = float(p.detach().norm())
    for G in gradients((8, 6), 7):
        p.grad = G
        optimizer.step()
        assert abs(float(optimizer.state[p]["weight_radius"]) / norm - 1) < 1e-6
        assert abs(float(p.detach().norm()) / norm - 1) < 1e-6


def test_views_of_one_weight_have_radii_of_their_own():
    p = weight((12, 5))
    optimizer = plain([{"params": [p], "view": "rows:2,4,6"}], "hyperball", 0.2)
    norms = torch.stack([X.norm() for X in p.detach().split((2, 4, 6))])
    run(optimizer, [p], [gradients((12, 5), 4)])
    now = torch.stack([X.norm() for X in p.detach().split((2, 4, 6))])
    assert gap(now, norms) < 1e-5
    keys = {key for key in optimizer.state[p] if key.startswith("weight_radius")}
    assert len(keys) == 3


# edges --------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("joint", [True, False])
def test_a_zero_weight_has_no_radius(name, joint):
    params = [weight((8, 6)), nn.Parameter(torch.zeros(8, 6))]
    optimizer = METHODS[name](params, weight_norm="hyperball")
    before = [p.detach().clone() for p in params]
    loss = sum((p * g).sum() for p, g in zip(params, gradients((8, 6), 2), strict=True))
    with pytest.raises(RuntimeError, match=r"parameter 1 .*norm is zero; give weight_radius"):
        if joint:
            loss.backward()
            optimizer.step()
        else:
            with optimizer.step_in_backward():
                loss.backward()
    if joint:
        assert same(before, [p.detach() for p in params]) and not optimizer.state
    assert not params[1].any()
    params[1].grad = None
    fixed = METHODS[name](params[1:], weight_norm="hyperball", weight_radius=0.1)
    run(fixed, params[1:], [gradients((8, 6), 3)])
    assert abs(float(params[1].detach().square().mean().sqrt()) / 0.1 - 1) < 1e-5


def test_a_zero_weight_moves_plainly_under_relative_and_half_under_brake():
    (G,) = gradients((8, 6), 1)
    for words, factor in (("relative", 1.0), ("floor", 1.0), ("pin", 1.0), ("brake", 0.5)):
        p = nn.Parameter(torch.zeros(8, 6))
        run(plain([p], words), [p], [[G]])
        assert gap(p.detach(), -0.05 * factor * G) < 1e-8


@pytest.mark.parametrize("words", WORDS)
def test_a_zero_step_leaves_the_norm_to_decay_alone(words):
    p = weight((8, 6))
    W = p.detach().clone()
    q = weight((8, 6), 1)
    optimizer = plain([p, q], words, 0.1, 0.2)
    p.grad, q.grad = torch.zeros(8, 6), gradients((8, 6), 1)[0]
    optimizer.step()
    assert gap(p.detach(), W * (1.0 if "sphere" in words or "hyper" in words else 0.98)) < 1e-6


@pytest.mark.parametrize(
    ("name", "words", "wait"),
    [*((name, "hyperball", False) for name in FIRST.values()),
     *((x, "rowfloor:2+pin", False) for x in FEW), *((x, "hyperball", True) for x in FEW)],
)  # fmt: skip
def test_a_bad_gradient_leaves_weight_and_radius(name, words, wait):
    shapes = [(8, 6)] * 3
    series = [gradients(s, 3, i) for i, s in enumerate(shapes)]
    series[1][0] = torch.full((8, 6), torch.nan)
    params = [weight(s, i) for i, s in enumerate(shapes)]
    optimizer = METHODS[name](params, weight_norm=words)
    optimizer._wait = wait
    W = params[1].detach().clone()
    with pytest.warns(UserWarning, match="non-finite"):
        run(optimizer, params, [s[:1] for s in series])
        assert sum(optimizer.skipped.values()) == 1
    assert torch.equal(params[1].detach(), W)
    if words == "hyperball":
        assert float(optimizer.state[params[1]]["weight_radius"]) == -1.0
    found = run(optimizer, params, [s[1:] for s in series])[-1]
    fresh = [weight(s, i) for i, s in enumerate(shapes)]
    clean = METHODS[name](fresh, weight_norm=words)
    fresh[1].grad = None
    run(clean, fresh, [s[:1] if i != 1 else [None] for i, s in enumerate(series)])
    expected = run(clean, fresh, [s[1:] for s in series])[-1]
    assert all(gap(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


@EACH
def test_steps_in_backward_have_the_bits_of_joint_ones(name):
    found = []
    for inside in (False, True):
        params = [weight((8, 6), i) for i in range(3)]
        optimizer = METHODS[name](params, weight_norm="hyperball")
        handle = optimizer.step_in_backward() if inside else None
        for t in range(3):
            grads = [gradients((8, 6), 3, i)[t] for i in range(3)]
            sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
            optimizer.zero_grad() if inside and handle is None else None
            if not inside:
                optimizer.step()
                optimizer.zero_grad()
        found.append(([p.detach() for p in params], tensors(optimizer)))
    assert same(found[0][0], found[1][0]) and same(found[0][1], found[1][1])


def test_a_learning_rate_may_be_a_tensor_and_gradients_may_ascend():
    for words in ("hyperball", "rowfloor:2+pin"):
        W0, grads = weight((8, 6)).detach(), gradients((8, 6), 4)
        found = []
        for lr, sign in ((0.05, 1), (torch.tensor(0.05), 1), (0.05, -1)):
            p = nn.Parameter(W0.clone())
            optimizer = plain([p], words, lr, maximize=sign < 0)
            found.append(run(optimizer, [p], [[sign * G for G in grads]])[-1][0])
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# words and refusals -------------------------------------------------------------------------------


def test_words_become_what_they_say():
    assert parse("hyperball") == parse("sphere+relative") == parse("relative+sphere")
    assert parse("hyperball:rows") == parse("relative:rows+sphere:rows")
    assert parse("floor") == NormControl("floor", 0.35)
    assert parse("rowfloor") == NormControl("floor", 0.3825, "rows")
    assert parse("brake") == parse("brake:0.5,1") and parse("pin:whole").radius_scope == "whole"
    assert parse("brake:0.25,1:rows").outward == 0.25
    assert parse("floor:0.1+pin:0,1").kappa == 0.1
    hash(parse("pin"))


BAD = ["", "ball", "hyperbal", "relative+relative", "relative+floor", "sphere+pin", "hyperball+pin",
       "floor:x", "floor:-1", "floor:inf", "floor:nan", "floor:1,2", "brake:0.5", "brake:2,1",
       "pin:rows", "rowfloor:rows", "relative:0.5", "sphere:rows:whole", "relative:columns",
       "sphere+", "+", " sphere", 3, 0.5, True, ["sphere"], torch.ones(2)]  # fmt: skip


@STEERED
def test_words_that_are_not_built_are_refused(cls):
    params, options, _ = problem(cls)
    for bad in BAD if cls is Muon else BAD[::5]:
        with pytest.raises(ValueError, match="weight_norm") as caught:
            cls(params, **options, weight_norm=bad)
        assert "\n" not in str(caught.value)
    for bad in (0, -1, math.inf, math.nan, "x", True):
        with pytest.raises(ValueError, match="weight_radius must be"):
            cls(params, **options, weight_norm="sphere", weight_radius=bad)
    for words in (None, "relative", "brake"):
        with pytest.raises(ValueError, match="weight_radius is the radius of weight_norm="):
            cls(params, **options, weight_norm=words, weight_radius=0.1)
    optimizer = cls(params, **options)
    for key, bad in (("weight_norm", "ball"), ("weight_norm", 3), ("weight_radius", 0.1)):
        optimizer.param_groups[0][key] = bad
        with pytest.raises(ValueError, match="weight_"):
            optimizer.step()
        optimizer.param_groups[0][key] = None
    with pytest.raises(ValueError, match="relative, floor:k, rowfloor:k, sphere, brake:out,in"):
        cls(params, **options, weight_norm="ball")


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if issubclass(cls, PairOptimizer)], ids=lambda cls: cls.__name__
)
def test_factors_are_refused(cls):
    params, options, _ = problem(cls)
    with pytest.raises(ValueError, match="factors are not the weight; leave weight_norm out"):
        cls(params, **options, weight_norm="relative")


def test_published_arithmetic_and_rules_that_write_are_refused():
    for make in (
        lambda ps, **kw: Muon(ps, compat="torch", **kw),
        lambda ps, **kw: GaLore(ps, compat="reference", rank=2, **kw),
        lambda ps, **kw: StackedOptimizer(ps, FoldRule(), 0.1, **kw),
    ):
        with pytest.raises(ValueError, match=r"does not go with .*; leave weight_norm out"):
            make([weight((8, 6))], weight_norm="sphere")
        optimizer = make([weight((8, 6))])
        optimizer.param_groups[0]["weight_norm"] = "brake"
        with pytest.raises(ValueError, match="does not go with"):
            optimizer.step()
    pair = {"params": [weight((2, 6)), weight((8, 2))]}
    with pytest.raises(ValueError, match="factors"):
        StackedOptimizer([pair], PairRule(), 0.1, weight_norm="sphere")


@STEERED
def test_adamw_parameters_are_not_steered_and_the_table_says_what_is(cls):
    params, options, _ = problem(cls)
    optimizer = cls(params, **options, weight_norm="hyperball")
    matrix, vector = optimizer.assignment().rows
    assert (matrix.norm, vector.norm) == ("hyperball", "")
    assert "hyperball" in str(optimizer.assignment())
    plain_one = cls(problem(cls)[0], **options)
    assert "norm" not in str(plain_one.assignment()).splitlines()[0].split()
    adamw = cls([{"params": params, "rule": "adamw"}], **options, weight_norm="sphere")
    assert {row.norm for row in adamw.assignment().rows} == {""}
    given = cls(params, **options, weight_norm="sphere", weight_radius=0.02)
    assert given.assignment().rows[0].norm == "sphere at 0.02"


def test_both_members_of_a_pair_of_rows_are_steered():
    params = [weight((6, 5)), weight((6, 5), 1)]
    norms = [float(p.detach().norm()) for p in params]
    optimizer = RowNorm(params, lr=0.1, pair="members", weight_norm="hyperball")
    run(optimizer, params, [gradients((6, 5), 4, i) for i in range(2)])
    for p, norm in zip(params, norms, strict=True):
        assert abs(float(p.detach().norm()) / norm - 1) < 1e-6


def test_a_group_has_words_of_its_own():
    params = [weight((6, 5), i) for i in range(3)]
    groups = [{"params": [p], "weight_norm": w} for p, w in
              zip(params, ("sphere", None, "relative"), strict=True)]  # fmt: skip
    optimizer = plain(groups, "brake")
    assert [row.norm for row in optimizer.assignment()] == ["sphere", "", "relative"]
    run(optimizer, params, [gradients((6, 5), 2, i) for i in range(3)])
    assert ["weight_radius" in optimizer.state[p] for p in params] == [True, False, False]
    assert memory_report([weight((6, 5))], Muon, weight_norm="sphere").rows[0].state == 4 * 31


# one kernel where there is one --------------------------------------------------------------------


@pytest.mark.parametrize("words", ["hyperball", "floor:2+pin", "brake:whole", "rowfloor"])
def test_a_kernel_writes_the_same(words, monkeypatch):
    """The kernels' reference runs on the CPU, with flags that the host has not read."""
    for name in FEW:
        for dtype in (torch.float32, torch.bfloat16):
            found = []
            for kernels in (False, True):
                if kernels:
                    for module in (write, buckets):
                        monkeypatch.setattr(module, "fuses_passes", lambda X: True)
                params = [nn.Parameter(weight((8, 6), i).detach().to(dtype)) for i in range(3)]
                optimizer = METHODS[name](params, weight_norm=words, weight_decay=0.1)
                optimizer._wait = False
                series = [[G.to(dtype) for G in gradients((8, 6), 3, i)] for i in range(3)]
                series[1][1] = torch.full((8, 6), torch.nan, dtype=dtype)
                with pytest.warns(UserWarning, match="non-finite"):
                    found.append(run(optimizer, params, series)[-1])
                    assert sum(optimizer.skipped.values()) == 1
                monkeypatch.undo()
            for a, b in zip(*found, strict=True):
                assert bool(b.isfinite().all()) and gap(a.float(), b.float()) < (
                    1e-5 if dtype == torch.float32 else 0.04
                )


def test_errors_that_a_momentum_carries_are_those_of_a_plain_write():
    """Words that change nothing leave eco as it is, with one learning rate and with two."""
    found = []
    for words in (None, "floor:0", "rowfloor:0"):
        params = [nn.Parameter(weight((8, 6), i).detach().bfloat16()) for i in range(2)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (1e-3, 5e-3), strict=True)]
        optimizer = Muon(groups, weight_norm=words, write="eco")
        run(optimizer, params, [gradients((8, 6), 4, i) for i in range(2)])
        found.append([optimizer.state[p]["momentum_buffer"] for p in params])
    for other in found[1:]:
        assert all(
            gap(a, b) < 1e-2 * float(a.abs().max()) for a, b in zip(found[0], other, strict=True)
        )
