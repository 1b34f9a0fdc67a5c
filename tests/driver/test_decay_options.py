"""``cautious``, ``decay_schedule`` and ``decay_lr``: decay of every class and form, by formula."""

import copy
import pickle

import pytest
import torch
from helpers.every_class import EVERY, problem, set_gradients
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat
from helpers.problems import gradients, run, same, tensors, weight
from helpers.recordings import fixture, tolerance
from helpers.rounding import every_form
from helpers.rules import PlainRule, driver

from stiefel.optimizers import Muon, RowNorm, StackedOptimizer, SwitchLoRA, pairs_to_groups
from stiefel.optimizers._driver import adamw_write, buckets, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:weight_decay="),
    pytest.mark.filterwarnings("ignore:.*by their shape alone"),
    pytest.mark.filterwarnings("ignore:.*have the role"),
]
DOUBLE = torch.float64
LR, DECAY = 1e-3, 2.0


def by_switchlora(triples, **options):
    """Vectors are exchanged at every second step, and rest for one."""
    return SwitchLoRA(
        pairs_to_groups(triples, scale=0.5),
        **{"ratio": None, "interval0": 4, "freeze_steps": 1, **options},
    )


def forked(optimizer, params, grads, **keys):
    """Weights after one more step of a copy, with other keys in its groups."""
    optimizer, params = copy.deepcopy((optimizer, params))
    for group in optimizer.param_groups:
        group.update(keys)
    return run(optimizer, params, [[G] for G in grads])[0]


def check_masks(optimizer, params, steps, *, bound=1e-11, moves_before=False, sign=1.0):
    """At every step, an entry decays as without ``cautious`` or not at all, as the step tells.

    Args:
        optimizer: Without decay.
        params: Its parameters that have gradients.
        steps: A list of gradients for each step.
        bound: Largest difference, in shares of the largest decay.
        moves_before: Whether a refresh moves weights before they are stepped.
        sign: -1 shows that the test fails where the mask is the opposite.
    """
    numbers = list[tuple[int, int]]()
    for grads in steps:
        none = forked(optimizer, params, grads)
        plain = forked(optimizer, params, grads, weight_decay=DECAY)
        cautious = forked(optimizer, params, grads, weight_decay=DECAY, cautious=True)
        for p, n, d, c in zip(params, none, plain, cautious, strict=True):
            decay = d - n
            W = -decay / (LR * DECAY) if moves_before else p.detach()
            grows = sign * (W - n) * W < 0
            numbers.append((int(grows.sum()), W.numel()))
            expected = torch.where(grows, 0.0, decay)
            torch.testing.assert_close(
                c - n, expected, rtol=0, atol=bound * float(decay.abs().max())
            )
        run(optimizer, params, [[G] for G in grads])
    grown, all_entries = map(sum, zip(*numbers, strict=True))
    assert 0.1 * all_entries < grown < 0.9 * all_entries


def series_of(params, steps=3):
    """Gradients for each step."""
    series = [gradients(p.shape, steps, i, DOUBLE) for i, p in enumerate(params)]
    return [list(step) for step in zip(*series, strict=True)]


# Muown's decay is that of its rows, see its own tests
@pytest.mark.parametrize("name", [name for name in METHODS if name != "muown"])
def test_entries_that_the_step_makes_larger_do_not_decay(name, monkeypatch):
    monkeypatch.setattr(write, "WRITE_PANEL", 30)
    groups = every_form(DOUBLE)
    optimizer = METHODS[name](groups, lr=LR, weight_decay=0.0)
    params = [p for group in groups for p in group["params"]]
    first, *others = series_of(params, 2)  # SOAP steps from the second update on
    run(optimizer, params, [[G] for G in first])
    check_masks(optimizer, params, others, bound=1e-8)


@pytest.mark.parametrize("name", ["galore", "frugal-columns", "auon", "muon"])
def test_the_mask_follows_an_ascent(name):
    params = [weight((12, 8), 0, DOUBLE), weight((6,), 1, DOUBLE)]
    groups = [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]
    optimizer = METHODS[name](groups, lr=LR, weight_decay=0.0, maximize=True)
    check_masks(optimizer, params, series_of(params))


@pytest.mark.parametrize("compat", [None, "reference"])
def test_the_mask_of_the_published_order_is_that_of_the_weight_before(compat):
    for name in ("galore", "fira", "frugal-svd"):
        params = [weight((12, 8), 0, DOUBLE), weight((9,), 1, DOUBLE)]
        groups = [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]
        own = {"reset": "all"} if name == "frugal-svd" and compat else {}
        optimizer = METHODS[name](groups, lr=LR, weight_decay=0.0, compat=compat, **own)
        check_masks(optimizer, params, series_of(params))


@pytest.mark.parametrize("name", PAIRS)
def test_factors_decay_where_their_step_does_not_make_them_larger(name):
    """The second factor of some sees the first as it has moved, so its step depends on decay."""
    tuples = [factors(*shape, seed=i, dtype=DOUBLE) for i, shape in enumerate([(10, 7, 3)] * 2)]
    optimizer = PAIRS[name](tuples, lr=LR, weight_decay=0.0)
    check_masks(optimizer, flat(tuples), series_of(flat(tuples)), bound=0.05)


def test_vectors_that_rest_do_not_decay_and_others_by_their_step():
    tuples = [factors(*shape, seed=i, dtype=DOUBLE) for i, shape in enumerate([(10, 7, 3)] * 2)]
    W0s = [weight((10, 7), 90 + i, DOUBLE).requires_grad_(False) for i in range(2)]
    triples = [(A, B, W0) for (A, B), W0 in zip(tuples, W0s, strict=True)]
    optimizer, params = by_switchlora(triples, lr=LR), flat(tuples)
    check_masks(optimizer, params, series_of(params, 5), moves_before=True, bound=1e-8)
    assert any("frozen" in key or "rest" in key for key in optimizer.state[params[0]]), list(
        optimizer.state[params[0]]
    )


def test_the_check_of_masks_sees_the_opposite_mask():
    params = [weight((12, 8), 0, DOUBLE)]
    optimizer = METHODS["galore"](params, lr=LR, weight_decay=0.0)
    with pytest.raises(AssertionError):
        check_masks(optimizer, params, series_of(params), sign=-1.0)


def test_recorded_trajectory_of_a_masked_decay():
    """The record has a step of its own: 0.3 G, with decay at lr 0.05."""
    data = fixture("cautious-square")
    settings = data["settings"]
    lr, bound = settings["adjusted_lr"], tolerance(data, "max_abs_diff_to_float64_run")
    decay = settings["weight_decay"] * settings["base_lr"] / lr
    p = torch.nn.Parameter(data["W0"].clone())
    (group,) = (optimizer := driver(PlainRule(), decay)([p])).param_groups
    group.update(lr=lr, cautious=True)
    for G, want in zip(data["grads"], data["W"], strict=True):
        (got,) = run(optimizer, [p], [[G]])[0]
        torch.testing.assert_close(got, want, rtol=0, atol=bound)


# the option off, and what it does not touch -------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_mask_is_not_made_where_nothing_decays(name, monkeypatch):
    """Bits and state are those without the option, and no panel is masked."""

    def final(**options):
        groups = every_form(torch.float32)
        optimizer = METHODS[name](groups, lr=0.02, **options)
        params = [p for group in groups for p in group["params"]]
        out = run(optimizer, params, [gradients(p.shape, 2, i) for i, p in enumerate(params)])
        return out[-1], tensors(optimizer)

    monkeypatch.setattr(write, "_write_cautiously", None)
    plain, masked = (final(weight_decay=0.0, cautious=flag) for flag in (False, True))
    assert same(plain[0], masked[0]) and same(plain[1], masked[1])
    final(weight_decay=0.5, cautious=False)


def test_small_numbers_have_the_mask_of_large_ones():
    """The product of step and weight would be 0, which counts as agreement."""
    for scale in (1.0, 1e-30):
        p = torch.nn.Parameter(scale * torch.tensor([[1.0, -1.0], [1.0, 0.0]]))
        optimizer = driver(PlainRule(), 1.0)([p])
        optimizer.param_groups[0]["cautious"] = True
        p.grad = scale * torch.tensor([[0.5, 0.5], [-0.5, 0.0]])
        optimizer.step()
        expected = scale * torch.tensor([[1 - 0.1 - 0.05, -1 - 0.05], [1 + 0.05, 0.0]])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


# AdamW --------------------------------------------------------------------------------------------

FORMS = {
    "plain": {},
    "lists": {"foreach": True},
    "one by one": {"foreach": False},
    "fused": {"fused": True},
    "ascent": {"maximize": True},
    "fused ascent": {"fused": True, "maximize": True},
    "tensor lr": {"lr": torch.tensor(0.02)},
}
BETAS, EPS, LRS = (0.8, 0.9), 1e-6, (0.02, 0.03, 0.005, 0.0, 0.01)
FACTORS = {
    "lr": lambda lr, decay: 1 - lr * decay,
    "lr2": lambda lr, decay: 1 - lr * lr * decay,
    "independent": lambda lr, decay: 1 - lr / LRS[0] * decay,
    "corrected": lambda lr, decay: 1 - lr * lr / LRS[0] * decay,
}
"""What a weight is multiplied by, for groups that are made with the first learning rate."""


def real(X):
    return torch.view_as_real(X) if X.is_complex() else X


def adamw(W, grads, decay, schedule, cautious, maximize=False, published=False, ratio=1.0):
    """AdamW in float64 on pairs of real numbers; published: decay comes last."""
    W = real(W.detach()).double().clone()
    M, V, out = torch.zeros_like(W), torch.zeros_like(W), []
    for t, (G, lr) in enumerate(zip(grads, LRS, strict=True), 1):
        G = real(G).double() * (-1 if maximize else 1)
        M, V = BETAS[0] * M + (1 - BETAS[0]) * G, BETAS[1] * V + (1 - BETAS[1]) * G * G
        c1, c2 = 1 - BETAS[0] ** t, (1 - BETAS[1] ** t) ** 0.5
        U = M / c1 / (V.sqrt() / (1.0 if published else c2) + EPS) * (c2 if published else 1.0)
        # for the ratio of learning rates, eta / eta0 is that of the group's
        keep = torch.full_like(
            W, 1 - (1 - FACTORS[schedule](lr, decay)) * KEEP_RATIO[schedule](ratio)
        )
        if cautious:
            keep[U * W < 0] = 1.0
        W = keep * (W - ratio * lr * U) if published else keep * W - ratio * lr * U
        out.append(W)
    return out


KEEP_RATIO = {
    "lr": lambda x: x,
    "lr2": lambda x: x * x,
    "independent": lambda x: 1.0,
    "corrected": lambda x: x,
}
"""By what the share that decays grows where AdamW has another learning rate than the group."""


def adamw_weights(dtype=torch.float32):
    strided = torch.nn.Parameter(weight((4, 6), 7, dtype).detach().T)
    shapes = [(5,), (1, 7), (4, 6), (3, 2, 4), (0, 3)]
    return [*(weight(shape, i, dtype) for i, shape in enumerate(shapes)), strided]


def follow(optimizer, params, grads):
    """Weights after each step of the schedule."""
    out = []
    for lr, step in zip(LRS, grads, strict=True):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        out.append(run(optimizer, params, [[G] for G in step])[0])
    return out


def adamw_gradients(params):
    draw = torch.Generator().manual_seed(3)

    def drawn(p):
        dtype = p.dtype if p.is_complex() else torch.float32
        G = torch.randn(p.shape, dtype=dtype, generator=draw).to(p.dtype)
        return torch.empty_like(p.detach()).copy_(G)  # torch's fused kernel wants equal strides

    return [[drawn(p) for p in params] for _ in LRS]


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("form", FORMS)
def test_adamw_decays_by_formula(form, schedule, monkeypatch):
    monkeypatch.setattr(adamw_write, "MAX_CHUNK_NUMEL", 8)
    decay = 0.01 if schedule == "independent" else 3.0
    for cautious in (False, True):
        params = adamw_weights()
        if "fused" not in form:
            params.append(weight((3, 2), 9, torch.complex64))
        starts, grads = [p.detach().clone() for p in params], adamw_gradients(params)
        options = {"lr": LRS[0], **copy.deepcopy(FORMS[form])}
        optimizer = RowNorm(
            [{"params": params, "rule": "adamw"}], betas=BETAS, adamw_eps=EPS, weight_decay=decay,
            decay_schedule=schedule, cautious=cautious, **options,
        )  # fmt: skip
        got = follow(optimizer, params, grads)
        for i, start in enumerate(starts):
            wants = adamw(
                start, [step[i] for step in grads], decay, schedule, cautious, "ascent" in form
            )
            for step, want in enumerate(wants):
                W = real(got[step][i]).double()
                torch.testing.assert_close(W, want, rtol=0, atol=2e-6)
        last, before = got[3], got[2]  # where lr is 0 nothing decays
        assert same(last, before)


@pytest.mark.parametrize("schedule", FACTORS)
def test_other_learning_rates_of_adamw_refer_to_the_same_multiple(schedule):
    decay = 0.01 if schedule == "independent" else 3.0
    p, q = weight((7,), 0), weight((5, 4), 1)
    starts, grads = [q.detach().clone(), p.detach().clone()], adamw_gradients([q, p])
    optimizer = RowNorm(
        [{"params": [q, p], "rules": ["matrix", "adamw"]}], lr=LRS[0], adamw_lr=5 * LRS[0],
        adamw_betas=BETAS, adamw_eps=EPS, weight_decay=decay, decay_schedule=schedule,
    )  # fmt: skip
    got = follow(optimizer, [q, p], grads)
    wants = adamw(starts[1], [step[1] for step in grads], decay, schedule, False, ratio=5.0)
    for (_, W), want in zip(got, wants, strict=True):
        torch.testing.assert_close(W.double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("schedule", FACTORS)
def test_adamw_in_the_published_order_decays_last(schedule):
    decay = 0.01 if schedule == "independent" else 3.0
    for cautious in (False, True):
        params = adamw_weights()
        starts, grads = [p.detach().clone() for p in params], adamw_gradients(params)
        optimizer = METHODS["galore"](
            [{"params": params, "rule": "adamw"}], lr=LRS[0], betas=BETAS, eps=EPS,
            weight_decay=decay, decay_schedule=schedule, cautious=cautious, compat="reference",
        )  # fmt: skip
        got = follow(optimizer, params, grads)
        for i, start in enumerate(starts):
            own = [step[i] for step in grads]
            wants = adamw(start, own, decay, schedule, cautious, published=True)
            for step, want in enumerate(wants):
                torch.testing.assert_close(got[step][i].double(), want, rtol=0, atol=2e-6)


def test_recorded_trajectory_of_an_independent_decay():
    data = fixture("decay-independent-square")
    settings = data["settings"]
    p = torch.nn.Parameter(data["W0"].clone())
    optimizer = Muon(
        [{"params": [p], "rule": "adamw"}], lr=settings["max_lr"], betas=tuple(settings["betas"]),
        eps=settings["eps"], weight_decay=settings["weight_decay"], decay_schedule="independent",
    )  # fmt: skip
    bound = tolerance(data, "max_abs_diff_to_float64_run")
    for lr, G, want in zip(settings["lr"], data["grads"], data["W"], strict=True):
        optimizer.param_groups[0]["lr"] = lr
        (got,) = run(optimizer, [p], [[G]])[0]
        torch.testing.assert_close(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "kahan", "eco"])
def test_weights_of_low_precision_follow_where_the_rounding_allows(mode, schedule):
    """Rounded once: in every mode but to nearest AdamW's weights are within a digit of float32."""
    decay = 0.01 if schedule == "independent" else 3.0
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        params = adamw_weights(dtype)[:4]
        with torch.no_grad():
            for p in params:
                p.copy_(p.bfloat16())
        own = {} if dtype == torch.float32 else {"write": mode}
        optimizer = Muon(
            [{"params": params, "rule": "adamw"}], lr=LRS[0], betas=BETAS, adamw_eps=EPS,
            weight_decay=decay, decay_schedule=schedule, cautious=True, **own,
        )  # fmt: skip
        grads = [[G.bfloat16().to(dtype) for G in step] for step in adamw_gradients(params)]
        runs.append(follow(optimizer, params, grads)[0])
    for W, low in zip(*runs, strict=True):
        bound, floor = (2.0**-8 if mode == "kahan" else 2.0**-7), 1e-6
        if mode == "nearest":  # torch rounds the decay and the moments by themselves
            bound, floor = 2.0**-6, 1e-3
        assert bool(((low.float() - W).abs() <= bound * W.abs() + floor).all())


@pytest.mark.filterwarnings("ignore:non-finite")
@pytest.mark.parametrize("own", [{}, {"fused": True}, {"compat": "reference"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flags_that_arrive_late_leave_a_bad_parameter_as_it_is(dtype, own):
    """Its decay too, with the bits of a run in which the host looks first."""
    out = []
    for wait in (True, False):
        params = [*adamw_weights(dtype)[:4], weight((8, 6), 20, dtype), weight((8, 6), 21, dtype)]
        groups = [{"params": params[:4], "rule": "adamw"}, {"params": params[4:]}]
        optimizer = METHODS["galore"](groups, weight_decay=0.5, cautious=True, **own)
        optimizer._wait = wait
        grads = [[G.clone() for G in step] for step in adamw_gradients(params)]
        for bad in (0, 2, 4):
            grads[2][bad].view(-1)[0] = float("inf")
        steps = [run(optimizer, params, [[G] for G in step])[0] for step in grads]
        for bad in (0, 2, 4):
            assert torch.equal(steps[2][bad], steps[1][bad])
        for good in (1, 3, 5):
            assert not torch.equal(steps[2][good], steps[1][good])
        out.append((steps, tensors(optimizer)))
    assert same(out[0][0][-1], out[1][0][-1]) and same(out[0][1], out[1][1])


# schedules of matrices, and the learning rate to which they refer ---------------------------------


def plain_rule(params, weight_decay=0.1, **options):
    """Descent along the gradient, at the first learning rate of the schedule."""
    return StackedOptimizer(params, PlainRule(), LRS[0], weight_decay, **options)


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("cautious", [False, True])
def test_matrices_decay_by_formula_in_every_form(schedule, cautious):
    decay = 0.01 if schedule == "independent" else 3.0
    groups = every_form(torch.float32)[:-1]
    params = [p for group in groups for p in group["params"]]
    starts, grads = [p.detach().double() for p in params], adamw_gradients(params)
    optimizer = plain_rule(groups, decay, decay_schedule=schedule, cautious=cautious)
    for i, W in enumerate(follow(optimizer, params, grads)[-1]):
        want = starts[i]
        for step, lr in zip(grads, LRS, strict=True):
            keep = torch.full_like(want, FACTORS[schedule](lr, decay))
            if cautious:
                keep[step[i] * want < 0] = 1.0
            want = keep * want - lr * step[i]
        torch.testing.assert_close(W.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_masked_decay_is_rounded_once_with_the_step(dtype):
    W, G = weight((64, 48), 0, dtype).detach(), gradients((64, 48), 1)[0].to(dtype)
    p = torch.nn.Parameter(W.clone())
    optimizer = plain_rule([p], 2.0, cautious=True, write="nearest")
    run(optimizer, [p], [[G]])
    keep = torch.where(G.float() * W.float() >= 0, 1 - LRS[0] * 2.0, 1.0)
    assert torch.equal(p.detach(), (keep * W.float() - LRS[0] * G.float()).to(dtype))


def test_the_learning_rate_of_construction_is_kept():
    def stored(optimizer):
        return [group["decay_lr"] for group in optimizer.param_groups]

    p, q, r = weight((4, 3), 0), weight((4, 3), 1), weight((4, 3), 2)
    options = {"weight_decay": 1e-4, "decay_schedule": "independent"}
    groups = [{"params": [p]}, {"params": [q], "lr": 0.5}, {"params": [r], "decay_lr": 7.0}]
    optimizer = Muon(groups, lr=0.25, **options)
    assert stored(optimizer) == [0.25, 0.5, 7.0]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2, 0.3], total_steps=9)
    assert stored(optimizer) == [0.25, 0.5, 7.0]
    optimizer.add_param_group({"params": [weight((4, 3), 3)], "lr": torch.tensor([0.125])})
    assert stored(optimizer) == [0.25, 0.5, 7.0, 0.125]
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert stored(other) == [0.25, 0.5, 7.0, 0.125]
    fresh = Muon([{"params": [weight((4, 3), i)]} for i in range(4)], lr=2.0, **options)
    fresh.load_state_dict(optimizer.state_dict())
    assert stored(fresh) == [0.25, 0.5, 7.0, 0.125]
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["decay_lr"], group["decay_schedule"], group["cautious"]
    fresh = Muon([{"params": [weight((4, 3), i)]} for i in range(4)], lr=2.0, **options)
    fresh.load_state_dict(old)
    assert stored(fresh) == [2.0] * 4
    assert stored(Muon([weight((4, 3))], lr=torch.tensor(0.5))) == [0.5]
    assert stored(Muon([weight((4, 3))], decay_lr=torch.tensor(0.5))) == [0.5]
    older = optimizer.__getstate__()
    for group in older["param_groups"]:
        del group["decay_lr"]
    optimizer.__setstate__(older)
    assert stored(optimizer) == [float(group["lr"]) for group in optimizer.param_groups]


@EVERY
def test_every_class_takes_the_options_as_keywords_and_group_keys(cls):
    params, needed, weights = problem(cls)
    own = {"weight_decay": 1e-4, "decay_schedule": "independent", "cautious": True}
    optimizer = cls(params, **needed, **own)
    set_gradients(weights)
    optimizer.step()
    for group in optimizer.param_groups:
        assert group["decay_lr"] == group["lr"] and group["cautious"] is True
        group.update(decay_schedule="corrected", decay_lr=0.5, cautious=False)
    optimizer.step()
    assert "corrected" in str(optimizer.state_dict()["param_groups"])


# refusals -----------------------------------------------------------------------------------------


def refused_later(optimizer, params, words, **keys):
    """Writing keys into all groups is refused by the next step, with nothing changed."""
    before = [p.detach().clone() for p in params], tensors(optimizer)
    good = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(keys)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert same(before[0], [p.detach() for p in params]) and same(before[1], tensors(optimizer))
    for group, values in zip(optimizer.param_groups, good, strict=True):
        group.update(values)
    optimizer.step()


@pytest.mark.filterwarnings("error")
def test_a_decay_that_would_remove_a_weight_is_refused():
    params = [weight((4, 3))]
    independent = {"decay_schedule": "independent"}
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 under decay_schedule='independent'"):
        Muon(params, **independent)
    with pytest.raises(ValueError, match=r"adamw_weight_decay=0\.1 under"):
        Muon(params, weight_decay=1e-4, adamw_weight_decay=0.1, **independent)
    optimizer = Muon(params, weight_decay=9e-4, **independent)
    refused_later(optimizer, params, "weight_decay=0.02 under", weight_decay=0.02)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["weight_decay"] = 0.02
    with pytest.raises(ValueError, match=r"weight_decay=0\.02 under"):
        optimizer.load_state_dict(saved)
    optimizer = Muon(params, weight_decay=0.1)
    optimizer.init_state()
    refused_later(optimizer, params, "weight_decay=0.1 under", **independent)
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 under"):
        optimizer.add_param_group({"params": [weight((4, 3))], **independent})
    assert len(optimizer.param_groups) == 1


def test_a_large_decay_warns_once():
    params = [weight((4, 3))]
    with pytest.warns(UserWarning, match=r"weight_decay=0\.001 under") as found:
        optimizer = Muon(params, weight_decay=1e-3, decay_schedule="independent")
        optimizer.param_groups[0]["weight_decay"] = 5e-3
        run(optimizer, params, [[torch.ones(4, 3)]])
    assert len(found) == 1
    optimizer = Muon(params, weight_decay=1e-4, decay_schedule="independent")
    optimizer.param_groups[0]["weight_decay"] = 5e-3
    with pytest.warns(UserWarning, match=r"weight_decay=0\.005 under"):
        run(optimizer, params, [[torch.ones(4, 3)]])


@pytest.mark.parametrize("schedule", ["independent", "corrected"])
def test_a_schedule_needs_a_learning_rate_to_refer_to(schedule):
    params = [weight((4, 3))]
    with pytest.raises(ValueError, match="pass decay_lr"):
        Muon(params, lr=0.0, weight_decay=1e-4, decay_schedule=schedule)
    with pytest.raises(ValueError, match="decay_lr must be positive"):
        Muon(params, weight_decay=1e-4, decay_schedule=schedule, decay_lr=0.0)
    optimizer = Muon(params, lr=0.0, weight_decay=1e-4)
    optimizer.init_state()
    refused_later(optimizer, params, "pass decay_lr", decay_schedule=schedule, lr=0.1)
    optimizer = Muon(params, lr=0.0, weight_decay=1e-4, decay_schedule=schedule, decay_lr=0.1)
    assert optimizer.param_groups[0]["decay_lr"] == 0.1
    refused_later(optimizer, params, "decay_schedule must be one of", decay_schedule="linear")


# stacks, ways to step -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["muon", "galore", "frugal-columns", "rownorm", "aro", "pick"])
def test_stacks_have_the_bits_of_single_steps_and_of_steps_in_backward(name, dtype):
    """Groups of one stack differ in the option, in the schedule and in the learning rate."""
    shapes = [(8, 6)] * 4 + [(6, 8), (5,)]
    keys = [
        {"cautious": True}, {"cautious": False, "lr": 0.05}, {"decay_schedule": "lr2"},
        {"cautious": True, "decay_schedule": "corrected"}, {}, {"rule": "adamw"},
    ]  # fmt: skip

    def made(numbers):
        params = [weight(shapes[i], i, dtype) for i in numbers]
        pairs = zip(numbers, params, strict=True)
        groups = [{"params": [(f"w{i}", p)], **keys[i]} for i, p in pairs]
        options = {"lr": 0.1, "weight_decay": 2.0, "cautious": True, "write": "nearest"}
        return METHODS[name](groups, **options), params

    series = [gradients((*shape, 1), 3, i) for i, shape in enumerate(shapes)]
    series = [[G.view(s).to(dtype) for G in own] for own, s in zip(series, shapes, strict=True)]
    optimizer, params = made(range(6))
    stacked = run(optimizer, params, series)[-1]
    backward, params = made(range(6))
    with backward.step_in_backward():
        for grads in zip(*series, strict=True):
            losses = [(p * G).sum() for p, G in zip(params, grads, strict=True)]
            torch.autograd.backward(losses)
    assert same(stacked, [p.detach() for p in params])
    for i in range(6) if name in ("muon", "frugal-columns", "rownorm") else ():
        alone, (p,) = made([i])
        assert torch.equal(run(alone, [p], [series[i]])[-1][0], stacked[i])


@pytest.mark.filterwarnings("ignore:non-finite")
@pytest.mark.parametrize("name", ["rownorm", "muon", "galore", "frugal-columns"])
def test_a_matrix_whose_rule_took_the_flag_stays_as_it_is(name, monkeypatch):
    """As on kernels: the gradient is unmasked, its NaN in the terms, and no kernel writes."""
    monkeypatch.setattr(buckets, "fuses_passes", lambda X: True)
    monkeypatch.setattr(buckets.Bucket, "weight_list", lambda self, i: [])
    p, q = weight((12, 8), 0), weight((12, 8), 1)
    bad = torch.full((12, 8), float("inf"))
    optimizer = METHODS[name]([p, q], lr=0.1, weight_decay=1.0, cautious=True)
    optimizer._wait = False
    before, steps = p.detach().clone(), gradients((12, 8), 2, 1)
    run(optimizer, [p, q], [[bad], steps[:1]])
    assert torch.equal(p.detach(), before)
    alone = weight((12, 8), 1)
    other = METHODS[name]([weight((12, 8), 0), alone], lr=0.1, weight_decay=1.0, cautious=True)
    run(other, other.param_groups[0]["params"], [[None], steps[:1]])
    torch.testing.assert_close(q.detach(), alone.detach(), rtol=0, atol=1e-6)
