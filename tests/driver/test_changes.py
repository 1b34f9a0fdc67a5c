"""Settings of a group that change in the middle of a run.

What shapes no state passes; what would add, drop, convert or reshape state is refused with nothing
changed.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.every_class import problem, set_gradients
from helpers.fuzz_values import PLAIN
from helpers.problems import gradients, refreshes, run, same, tensors, weight

from stiefel import optimizers
from stiefel.optimizers import (
    APOLLO,
    ARO,
    FRUGAL,
    AuON,
    DCTAdamW,
    Fira,
    GaLore,
    Muon,
    Muown,
    RowNorm,
    SinkGD,
    Trion,
)
from stiefel.optimizers._driver import units

SHAPE = (80, 64)
LOW = {"rank": 60, "update_proj_gap": 4, "lr": 0.01}
SPLIT = {"update_gap": 4, "lr": 0.01}

REFUSED = {
    "muon-report": (Muon, {"report_steps": 2}, {"report_steps": 0}, "drop state 'polar_report'"),
    "muon-spike": (Muon, {"spike_ratio": 2.0}, {"spike_ratio": None}, "drop state 'grad_norm'"),
    "muon-normuon": (Muon, {}, {"second_moment": "normuon"}, "add state 'row_second_moment'"),
    "aro-base": (ARO, {"base": "adam"}, {"base": "sinkhorn"}, "drop state 'exp_avg_sq'"),
    "aro-rotation": (ARO, {}, {"rotation": "none"}, "drop state 'rotation'"),
    "galore-rank": (GaLore, LOW, {"rank": 7}, "reshape state 'basis'"),
    "galore-projection": (GaLore, LOW, {"projection": "topk"}, "drop state 'basis'"),
    "galore-inner": (GaLore, LOW, {"inner": "lion"}, "drop state 'exp_avg_sq'"),
    "fira-limiter": (Fira, LOW, {"limiter": False}, "drop state 'limiter_norm'"),
    "apollo-limiter": (APOLLO, LOW, {"limiter": False}, "drop state 'limiter_norm'"),
    "rownorm-momentum": (RowNorm, {}, {"momentum": 0.0}, "drop state 'momentum_buffer'"),
    "rownorm-stateless": (RowNorm, {"momentum": 0.0}, {"momentum": 0.9}, "add state 'momentum_bu"),
    "sinkgd-momentum": (SinkGD, {}, {"momentum": 0.9}, "add state 'momentum_buffer'"),
    "sinkgd-sphere": (SinkGD, {}, {"weight_norm": "sphere"}, "add state 'weight_radius'"),
    "dct-feedback": (DCTAdamW, LOW, {"error_feedback": "int8"}, "add state 'error'"),
    "dct-age": (DCTAdamW, LOW, {"bias_correction": "global"}, "drop state 'age'"),
    "frugal-density": (FRUGAL, SPLIT, {"density": 0.0}, "drop state 'exp_avg'"),
    "frugal-order": (FRUGAL, {**SPLIT, "reset": "none"}, {"reset": "all"}, "another meaning"),
    "int8": (Muon, {}, {"state_dtype": "int8"}, "convert state 'momentum_buffer'"),
    "bfloat16": (GaLore, LOW, {"state_dtype": "bfloat16"}, "convert state 'basis'"),
    "view": (GaLore, LOW, {"view": "rows:40,40"}, "drop state 'basis'"),
    "roles": (Muon, {}, {"roles": ["vector"] * 2}, "from AdamW to the rule, or back"),
    "names": (Muon, {}, {"param_names": ["embed_tokens", "a"]}, "from AdamW to the rule, or back"),
    "adamw": (Muon, {}, {"rule": "adamw"}, "from AdamW to the rule, or back"),
    "another-rule": (Muon, {}, {"rule": "DCTAdamW", "eps": 1e-8}, "add state 'age'"),
}

ACCEPTED = {
    "muon": (Muon, {}, {"momentum": 0.5, "nesterov": False, "polar": "ns5", "lr": 0.1}),
    "muon-heads": (Muon, {}, {"view": "heads:8"}),
    "galore": (GaLore, LOW, {"update_proj_gap": 2, "scale": 0.5, "moments": "rotate"}),
    "galore-svd-to-range": (GaLore, LOW, {"projection": "range", "betas": (0.8, 0.9)}),
    "fira": (Fira, LOW, {"alpha": 0.5, "scaling": "matrix"}),
    "apollo": (APOLLO, LOW, {"scaling": "tensor", "projection": "gaussian", "scale": "auto"}),
    "sinkgd": (SinkGD, {}, {"iterations": 1}),
    "muown": (Muown, {}, {"momentum": 0.5, "adjust_lr_fn": "none"}),
    "dct": (DCTAdamW, LOW, {"update_proj_gap": 2, "norm": "l2"}),
    "trion": (Trion, {}, {"rank": 0.5, "momentum": 0.5}),
    "auon": (AuON, {}, {"gamma": 2.0, "ns_steps": 1}),
    "rownorm": (RowNorm, {}, {"momentum": 0.5, "centred": True}),
    "frugal-gap": (FRUGAL, SPLIT, {"update_gap": 9, "state_free": "sgd"}),
    "frugal-blocks": (
        FRUGAL, {**SPLIT, "split": "block", "density": 0.5}, {"density": 1.0, "update_gap": 3},
    ),
    "decay": (Muon, {}, {"weight_decay": 0.5, "maximize": True, "nonfinite": "raise"}),
}  # fmt: skip


def trained(cls, options, steps, seed=0):
    params = [weight(SHAPE, i) for i in range(2)]
    optimizer = cls(params, **options)
    return optimizer, params, [gradients(SHAPE, steps, seed + i) for i in range(2)]


def reload(cls, options, changes, optimizer, params):
    """The same run from a file, into an optimizer that is built with the new values."""
    saved = through_a_file(optimizer.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = cls(copies, **{**options, **changes})
    fresh.load_state_dict(saved)
    return fresh, copies


def everything(optimizer, params):
    """Weights, state with its clocks, and settings."""
    state = {i: dict(optimizer.state[p]) for i, p in enumerate(params)}
    copies = {
        i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entry.items()}
        for i, entry in state.items()
    }
    return [p.detach().clone() for p in params], copies


def equal(one, two):
    weights = all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    return weights and all(
        one[1][i].keys() == two[1][i].keys()
        and all(
            torch.equal(x, two[1][i][k]) if isinstance(x, torch.Tensor) else x == two[1][i][k]
            for k, x in one[1][i].items()
        )
        for i in one[1]
    )


@pytest.mark.parametrize(("cls", "options", "change", "what"), REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_state_is_refused_and_changes_nothing(cls, options, change, what):
    optimizer, params, grads = trained(cls, options, 6)
    run(optimizer, params, [g[:5] for g in grads])
    group = optimizer.param_groups[0]
    settings, before = dict(group), everything(optimizer, params)
    group.update(change)
    name, value = next(iter(change.items()))
    for attempt in (lambda: run(optimizer, params, [g[5:] for g in grads]), optimizer.state_dict):
        with pytest.raises(ValueError, match=what) as refused:
            attempt()
        assert f"{name}={value!r}" in str(refused.value)
        assert "parameter group 0" in str(refused.value)
        assert equal(before, everything(optimizer, params))
    group.clear()
    group.update(settings)  # set back, the run goes on as if nothing had been
    untouched, others, _ = trained(cls, options, 6)
    run(untouched, others, [g[:5] for g in grads])
    rest = [g[5:] for g in grads]
    assert same(run(optimizer, params, rest), run(untouched, others, rest))


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"another-rule"}))  # it keeps group values
def test_a_weight_without_state_follows_any_setting(name):
    cls, options, change, _ = REFUSED[name]
    optimizer, params, grads = trained(cls, options, 3)
    optimizer.zero_grad()
    optimizer.step()  # no gradient, no state
    optimizer.param_groups[0].update(change)
    others = [weight(SHAPE, i) for i in range(2)]
    built = cls([{"params": others, **change}], **options)
    assert same(run(optimizer, params, grads), run(built, others, grads))


@pytest.mark.parametrize("after", [0, 2], ids=["at-once", "later"])
@pytest.mark.parametrize(("cls", "old", "new"), ACCEPTED.values(), ids=ACCEPTED)
def test_a_changed_value_runs_on_and_its_checkpoint_resumes_bit_identically(cls, old, new, after):
    optimizer, params, grads = trained(cls, old, 14)
    run(optimizer, params, [g[:5] for g in grads])
    keys = [optimizer.state[p].keys() for p in params]
    for group in optimizer.param_groups:
        group.update(new)
    run(optimizer, params, [g[5 : 5 + after] for g in grads])
    common = {k: v for k, v in new.items() if k != "rule"}
    resumed, copies = reload(cls, old, common, optimizer, params)
    rest = [g[5 + after :] for g in grads]
    assert same(run(optimizer, params, rest), run(resumed, copies, rest))
    assert same(tensors(optimizer), tensors(resumed))
    assert all(bool(p.isfinite().all()) for p in params)
    if cls is not FRUGAL:
        assert keys == [optimizer.state[p].keys() for p in params]


def test_a_side_that_is_projected_instead_of_the_other_is_refused():
    p = weight((32, 32))
    grads = gradients((32, 32), 7)
    optimizer = GaLore([p], **{**LOW, "rank": 8, "proj_type": "left"})
    run(optimizer, [p], [grads[:6]])
    optimizer.param_groups[0]["proj_type"] = "right"
    with pytest.raises(ValueError, match="proj_type='right' in parameter group 0 would give"):
        run(optimizer, [p], [grads[6:]])


@pytest.mark.parametrize(
    ("first", "change"),
    [
        ({"density": 0.5}, {"density": 1.0}),
        ({"density": 0.5, "reset": "changed"}, {"density": 1.0}),
        ({"density": 0.5}, {"seed": 5}),
        ({"update_gap": 35}, {"update_gap": 100}),
        ({"update_gap": 100}, {"update_gap": 70}),
    ],
    ids=str,
)
def test_moments_of_a_block_count_from_when_they_began(first, change):
    """Under a constant gradient Adam moves by lr exactly, however old its window is."""
    params = [weight((6, 5), i) for i in range(4)]
    G = [gradients((6, 5), 1, i)[0] + 1.0 for i in range(4)]
    optimizer = FRUGAL(
        params, lr=0.01, split="block", block_order="ascending", state_free="no", eps=1e-12,
        **{"update_gap": 1000, "density": 0.5, **first},
    )  # fmt: skip
    for step in range(120):
        if step == 71:
            optimizer.param_groups[0].update(change)
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, G, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            moved = (p.detach() - old).abs()
            if float(moved.max()) > 0:  # active
                torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=2e-3, atol=0)
    resumed, copies = reload(FRUGAL, {"split": "block"}, {}, optimizer, params)
    series = [gradients((6, 5), 9, 50 + i) for i in range(4)]
    assert same(run(optimizer, params, series), run(resumed, copies, series))


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("make", [
    lambda p: GaLore(p, rank=4, update_proj_gap=6, projection="random", stagger=True),
    lambda p: FRUGAL(p, update_gap=6, stagger=True),
    lambda p: Fira(p, rank=4, update_proj_gap=6, projection="random", stagger=True),
], ids=["galore", "frugal", "fira"])  # fmt: skip
def test_stagger_where_the_host_does_not_wait(make, wait):
    params = [weight((256, 160), i) for i in range(3)]
    optimizer = make(params)
    optimizer._wait = wait
    found = refreshes(optimizer, params, 20)
    assert found == [[1, 7, 13, 19], [1, 5, 11, 17], [1, 3, 9, 15]]


def test_stagger_comes_with_a_gap_that_grows():
    params = [weight((256, 160), i) for i in range(3)]
    optimizer = GaLore(params, rank=4, update_proj_gap=1, projection="random", stagger=True)
    run(optimizer, params, [gradients((256, 160), 2, i) for i in range(3)])
    optimizer.param_groups[0]["update_proj_gap"] = 6
    run(optimizer, params, [gradients((256, 160), 1, i) for i in range(3)])
    assert [unit.shift for unit in optimizer._plan.units] == [0, 2, 4]


@pytest.mark.parametrize("name", ["float16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_state_that_cannot_hold_small_squares_is_refused(name):
    with pytest.raises(ValueError, match="state_dtype must be None, 'int8' or 'bfloat16'"):
        GaLore([weight(SHAPE)], state_dtype=name)


def test_a_group_that_comes_later_changes_nothing_for_the_others(monkeypatch):
    monkeypatch.setitem(units.MAX_STACKED_NUMEL, "cpu", 0)
    one, two = weight(SHAPE, 0), weight(SHAPE, 0)
    grads = gradients(SHAPE, 6)
    a, b = GaLore([one], **LOW), GaLore([two], **LOW)
    run(a, [one], [grads[:3]])
    a.add_param_group({"params": [weight((7, 5), 1)]})
    run(b, [two], [grads[:3]])
    assert same(run(a, [one], [grads[3:]]), run(b, [two], [grads[3:]]))


@pytest.mark.parametrize("nesterov", [True, False])
def test_flags_that_arrive_late_leave_the_bits_of_bfloat16_weights(nesterov):
    """A flag of float32 would widen the term, and the weight be rounded another way."""

    def trained(wait):
        params = [weight((64, 32), i, torch.bfloat16) for i in range(2)]
        optimizer = Muon(params, lr=0.02, compat="torch", nesterov=nesterov)
        optimizer._wait = wait
        return run(optimizer, params, [gradients((64, 32), 5, i) for i in range(2)])

    assert same(trained(True), trained(False))


def test_a_weight_that_is_taken_out_keeps_its_state_for_its_return():
    params = [weight(SHAPE, i) for i in range(2)]
    optimizer = GaLore(params, **LOW)
    run(optimizer, params, [gradients(SHAPE, 3, i) for i in range(2)])
    group, kept = optimizer.param_groups[0], dict(optimizer.state[params[1]])
    group["params"] = params[:1]
    run(optimizer, params[:1], [gradients(SHAPE, 2)])
    assert all(optimizer.state[params[1]][key] is value for key, value in kept.items())
    group["params"] = params
    run(optimizer, params, [gradients(SHAPE, 1, i) for i in range(2)])
    assert [optimizer.state[p]["step"] for p in params] == [6, 4]


def loaded(optimizer):
    """The run from a file, in a new optimizer."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k in optimizer.defaults}
    fresh = type(optimizer)([{**settings, "params": copies}])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh


@pytest.mark.parametrize(
    "reopen", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), loaded],
    ids=["copy", "pickle", "file"],
)  # fmt: skip
@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"frugal-order"}))  # equal tensors in both
def test_a_copy_refuses_what_the_optimizer_itself_refuses(name, reopen):
    cls, options, change, _ = REFUSED[name]
    optimizer, params, grads = trained(cls, options, 4)
    run(optimizer, params, grads)
    fresh = reopen(optimizer)
    fresh.param_groups[0].update(change)
    copies = fresh.param_groups[0]["params"]
    before = everything(fresh, copies)
    for p in copies:
        p.grad = torch.ones_like(p)
    text = "parameter group 0.* in the middle of a run, which is not supported"
    with pytest.raises(ValueError, match=text):
        fresh.step()
    assert equal(before, everything(fresh, copies))


@pytest.mark.parametrize(
    "make", [GaLore, Fira, APOLLO, FRUGAL, DCTAdamW, ARO, partial(Muon, second_moment="normuon")]
)
def test_a_view_that_gives_state_to_the_other_side_is_refused(make):
    p = weight((24, 24))
    optimizer = make([p])
    run(optimizer, [p], [gradients((24, 24), 3)])
    before = everything(optimizer, [p])
    optimizer.param_groups[0]["view"] = "transposed"
    with pytest.raises(ValueError, match="view='transposed' in parameter group 0 would give"):
        run(optimizer, [p], [gradients((24, 24), 1)])
    assert equal(before, everything(optimizer, [p]))


MISFITS = {
    "Muon": ("GaLore", "DCTAdamW", "AuON", "RowNorm", "Hybrid", "AltLoRA"),
    "GaLore": ("Muon", "FRUGAL", "ARO"),
    "Fira": ("AuON", "Spectral", "AdaPreLoRA"),
    "APOLLO": ("Fira", "FRUGAL", "DCTAdamW"),
    "SinkGD": ("AltLoRA", "SwitchLoRA"),
    "Muown": ("AltLoRA", "SwitchLoRA"),
    "FRUGAL": ("Muon", "GaLore", "Fira"),
    "DCTAdamW": ("GaLore", "Spectral", "SwitchLoRA"),
    "Trion": ("DCTAdamW", "AuON", "ARO"),
    "AuON": ("Muon", "Fira", "Trion", "Spectral"),
    "ARO": ("Trion", "RowNorm", "Hybrid"),
    "RowNorm": ("FRUGAL", "ARO", "AltLoRA"),
    "Spectral": ("AuON", "ARO"),
    "Hybrid": ("AuON", "DCTAdamW", "SwitchLoRA"),
    "SymmetryStack": ("GaLore", "Trion", "Spectral"),
    "AltLoRA": ("FRUGAL", "AdaPreLoRA", "SwitchLoRA"),
    "AdaPreLoRA": ("Fira", "Trion", "AuON"),
    "SwitchLoRA": ("AltLoRA", "AdaPreLoRA"),
}
"""Rules whose options the keys of a group of a class are not."""


@pytest.mark.parametrize("after", [0, 1], ids=["at-once", "later"])
@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, rules in MISFITS.items() for rule in rules]
)
def test_a_rule_that_the_other_keys_do_not_fit_is_refused_by_its_name(name, rule, after):
    params, needed, weights = problem(getattr(optimizers, name))
    optimizer = getattr(optimizers, name)(params, **needed)
    group = optimizer.param_groups[0]
    for _ in range(after):
        set_gradients(weights)
        optimizer.step()
    set_gradients(weights)
    settings, before = dict(group), everything(optimizer, weights)
    group["rule"] = rule
    with pytest.raises(ValueError, match="rule") as refused:
        optimizer.step()
    assert "\n" not in str(refused.value) and group == {**settings, "rule": rule}
    assert equal(before, everything(optimizer, weights))
    group["rule"] = settings["rule"]
    optimizer.step()
    assert not equal(before, everything(optimizer, weights))


@pytest.mark.parametrize("after", [0, 1], ids=["at-once", "later"])
def test_a_group_of_a_stack_cannot_lose_its_rule(after):
    W = weight((8, 6))
    optimizer = optimizers.SymmetryStack([("layers.0.mlp.up_proj.weight", W)])
    run(optimizer, [W], [gradients((8, 6), after)])
    before = everything(optimizer, [W])
    optimizer.param_groups[0]["rule"] = None
    for attempt in (lambda: run(optimizer, [W], [gradients((8, 6), 1)]), optimizer.init_state):
        with pytest.raises(ValueError, match="'rule' must name the method"):
            attempt()
        assert equal(before, everything(optimizer, [W]))


@pytest.mark.parametrize("reopen", [lambda o: o, copy.deepcopy])
def test_a_bad_value_in_a_group_names_the_rule_only_where_that_was_written(reopen):
    optimizer = Muon([{"params": [weight(SHAPE)], "rule": "RowNorm"}, {"params": [weight(SHAPE)]}])
    optimizer = reopen(optimizer)
    optimizer.param_groups[0]["momentum"] = 2
    with pytest.raises(ValueError, match=r"^momentum must be"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.param_groups[1].update(rule="RowNorm", adjust_lr_fn="original")
    with pytest.raises(ValueError, match=r"^parameter group 1 with rule='RowNorm': adjust_lr_fn"):
        optimizer.step()


@pytest.mark.parametrize("after", [0, 1], ids=["at-once", "later"])
def test_what_a_method_does_not_support_is_refused_when_it_is_written_too(after):
    W = weight((8, 6))
    for cls in (getattr(optimizers, name) for name in PLAIN):
        optimizer = cls([W])
        run(optimizer, [W], [gradients((8, 6), after)])
        optimizer.param_groups[0].update(capturable=True, nonfinite="skip_step")
        with pytest.raises(ValueError, match="capturable=True is not supported"):
            run(optimizer, [W], [gradients((8, 6), 1)])
    optimizer = FRUGAL([W], split="block", density=0.5)
    run(optimizer, [W], [gradients((8, 6), after)])
    optimizer.param_groups[0]["stagger"] = True
    with pytest.raises(ValueError, match="stagger=True does not go with FRUGAL"):
        run(optimizer, [W], [gradients((8, 6), 1)])
