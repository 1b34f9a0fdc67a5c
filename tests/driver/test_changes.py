"""Settings of a group that change in the middle of a run: what the state does, and resuming."""

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.problems import gradients, refreshes, run, same, tensors, weight

from stiefel.optimizers import ARO, FRUGAL, DCTAdamW, Fira, GaLore, Muon, units

SHAPE = (80, 64)
LOW = {"rank": 60, "update_proj_gap": 4, "lr": 0.01}
SPLIT = {"update_gap": 4, "lr": 0.01}

CHANGES = {
    "muon-report": (Muon, {"report_steps": 2}, {"report_steps": 0}),
    "muon-spike": (Muon, {"spike_ratio": 2.0}, {"spike_ratio": None}),
    "muon-normuon": (Muon, {"second_moment": "normuon"}, {"second_moment": None}),
    "muon-adamuon": (Muon, {"second_moment": "adamuon"}, {"second_moment": "normuon"}),
    "aro-base": (ARO, {"base": "adam"}, {"base": "sinkhorn"}),
    "aro-rotation": (ARO, {"rotation": "qr"}, {"rotation": "none"}),
    "galore-projection": (GaLore, LOW, {"projection": "topk"}),
    "galore-inner": (GaLore, LOW, {"inner": "lion"}),
    "fira-limiter": (Fira, LOW, {"limiter": False}),
    "dct-feedback": (DCTAdamW, LOW, {"error_feedback": "int8"}),
    "dct-age": (DCTAdamW, LOW, {"bias_correction": "global"}),
    "frugal-density": (FRUGAL, SPLIT, {"density": 0.0}),
    "frugal-reset": (FRUGAL, SPLIT, {"reset": "changed"}),
    "frugal-order": (FRUGAL, {**SPLIT, "reset": "none"}, {"reset": "all"}),
    "int8": (Muon, {}, {"state_dtype": "int8"}),
    "bfloat16": (GaLore, LOW, {"state_dtype": "bfloat16"}),
}


def both_ways():
    for name, (cls, old, new) in CHANGES.items():
        signature = {
            **{k: default_of(cls, k) for k in new},
            **{k: v for k, v in old.items() if k in new},
        }
        yield pytest.param(cls, old, new, id=name)
        yield pytest.param(cls, {**old, **new}, signature, id=f"{name}-back")


def default_of(cls, key):
    return cls([weight((4, 4))]).defaults[key]


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


@pytest.mark.parametrize("after", [0, 2], ids=["at-once", "later"])
@pytest.mark.parametrize(("cls", "old", "new"), list(both_ways()))
def test_a_changed_value_runs_on_and_its_checkpoint_resumes_bit_identically(cls, old, new, after):
    optimizer, params, grads = trained(cls, old, 14)
    run(optimizer, params, [g[:5] for g in grads])
    for group in optimizer.param_groups:
        group.update(new)
    run(optimizer, params, [g[5 : 5 + after] for g in grads])
    resumed, copies = reload(cls, old, new, optimizer, params)
    rest = [g[5 + after :] for g in grads]
    assert same(run(optimizer, params, rest), run(resumed, copies, rest))
    assert same(tensors(optimizer), tensors(resumed))
    assert all(bool(p.isfinite().all()) for p in params)
    # nothing is kept that an optimizer built so would not have
    built = cls([weight(SHAPE, i) for i in range(2)], **{**old, **new})
    built.init_state()
    for p, q in zip(params, built.param_groups[0]["params"], strict=True):
        clocks = {"step", "refreshed", "held"}
        assert optimizer.state[p].keys() - clocks == built.state[q].keys() - clocks


def test_numbers_are_converted_between_codes_and_floats():
    optimizer, params, grads = trained(Muon, {}, 6)
    run(optimizer, params, [g[:5] for g in grads])
    B = optimizer.state[params[0]]["momentum_buffer"].clone()
    for name, size in (
        ("int8", 0.02),
        (None, 0.02),
        ("bfloat16", 0.03),
        ("int8", 0.05),
        ("float64", 0.05),
    ):
        optimizer.param_groups[0]["state_dtype"] = name
        optimizer.state_dict()  # brings the state in line
        entry = optimizer.state[params[0]]
        assert ("momentum_buffer_scale" in entry) == (name == "int8")
        if name != "int8":
            assert entry["momentum_buffer"].dtype == (
                getattr(torch, name) if name else torch.float32
            )
            assert float((entry["momentum_buffer"] - B).norm() / B.norm()) < size


def test_a_new_basis_begins_at_once_and_with_new_moments():
    optimizer, params, grads = trained(GaLore, {**LOW, "rank": 8}, 7)
    run(optimizer, params, [g[:6] for g in grads])
    optimizer.param_groups[0]["projection"] = "topk"
    run(optimizer, params, [g[6:] for g in grads])
    entry = optimizer.state[params[0]]
    assert (entry["step"], entry["refreshed"]) == (1, 1)
    assert len(set(entry["index"].tolist())) == 8
    assert "basis" not in entry


def test_a_square_that_is_projected_on_its_other_side_begins_anew():
    p = weight((32, 32))
    grads = gradients((32, 32), 7)
    optimizer = GaLore([p], **{**LOW, "rank": 8, "proj_type": "left"})
    run(optimizer, [p], [grads[:6]])
    optimizer.param_groups[0]["proj_type"] = "right"
    start = p.detach().clone()
    run(optimizer, [p], [grads[6:]])
    fresh = torch.nn.Parameter(start)
    run(GaLore([fresh], **{**LOW, "rank": 8, "proj_type": "right"}), [fresh], [grads[6:]])
    assert same(p.detach(), fresh.detach())


def test_what_would_reshape_state_is_refused_and_changes_nothing():
    optimizer, params, grads = trained(GaLore, LOW, 6)
    run(optimizer, params, [g[:5] for g in grads])
    before, state = [p.detach().clone() for p in params], tensors(optimizer)
    optimizer.param_groups[0]["rank"] = 7
    with pytest.raises(ValueError, match="which a run cannot follow; set them back"):
        run(optimizer, params, [g[5:] for g in grads])
    assert same(before, [p.detach() for p in params])
    assert same(state, tensors(optimizer))
    optimizer.param_groups[0]["rank"] = 60
    run(optimizer, params, [g[5:] for g in grads])


def test_between_a_rule_and_adamw_a_weight_begins_anew():
    optimizer, params, grads = trained(Muon, {}, 9)
    run(optimizer, params, [g[:3] for g in grads])
    group = optimizer.param_groups[0]
    group["rule"] = "adamw"
    run(optimizer, params, [g[3:6] for g in grads])
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert float(optimizer.state[params[0]]["step"]) == 3
    group["rule"] = None
    run(optimizer, params, [g[6:] for g in grads])
    assert optimizer.state[params[0]].keys() == {"step", "momentum_buffer"}
    assert optimizer.state[params[0]]["step"] == 3


@pytest.mark.parametrize("split", ["rows", "columns", "randk"])
def test_numbers_in_another_order_are_drawn_again(split):
    p = weight((256, 192))  # above what is stacked: written in panels
    optimizer = FRUGAL([p], split=split, reset="none", update_gap=50)
    grads = gradients(p.shape, 4)
    run(optimizer, [p], [grads[:2]])
    optimizer.param_groups[0]["reset"] = "all"
    run(optimizer, [p], [grads[2:]])
    index = optimizer.state[p]["index"]
    assert bool((index.diff() > 0).all())
    assert optimizer.state[p]["step"] == 2


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
    monkeypatch.setitem(units.STACK, "cpu", 0)
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
