"""Width rules: factors by role and shape, plain groups, and the schedule by tokens."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.every_class import PLAIN
from torch import nn

from stiefel import optimizers
from stiefel.optimizers import Muon, PowerLR, RowNorm, width_groups
from stiefel.optimizers.width import STEPS, WD_RULES


def mlp(d, inputs=12, outputs=5):
    return nn.Sequential(
        nn.Linear(inputs, d), nn.ReLU(), nn.Linear(d, d), nn.LayerNorm(d), nn.ReLU(),
        nn.Linear(d, outputs),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q_proj, self.k_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d // 2, bias=False)
        self.v_proj, self.o_proj = nn.Linear(d, d // 2, bias=False), nn.Linear(d, d, bias=False)
        self.up_proj, self.down_proj = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)
        self.router = nn.Linear(d, 4, bias=False)


class Model(nn.Module):
    """Only its tree and shapes are read."""

    def __init__(self, d, vocabulary=40):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(2))
        self.lm_head = nn.Linear(d, vocabulary, bias=False)


def factors(groups, lr=1e-3, weight_decay=0.01):
    """Name -> factors of lr and decay."""
    return {
        name: (group["lr"] / lr, group["weight_decay"] / weight_decay)
        for group in groups
        for name, _ in group["params"]
    }


MATRIX = {
    ("adam", "sqrt"): (1 / 4, 2.0), ("adam", "mup"): (1 / 4, 4.0), ("adam", "none"): (1 / 4, 1.0),
    ("rms", "sqrt"): (1 / 2, 2.0), ("rms", "mup"): (1 / 2, 2.0), ("rms", "none"): (1 / 2, 1.0),
    ("spectral", "sqrt"): (1.0, 1.0), ("spectral", "mup"): (1.0, 1.0),
    ("spectral", "none"): (1.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("wd_rule", WD_RULES)
def test_factors_are_those_of_the_table(step, wd_rule):
    """At four times the width; base_width and base_shapes, a module or its shapes, agree."""
    bare = 0.0 if wd_rule == "sqrt" else 1.0
    for make in (mlp, Model):
        model, small = make(64), make(16)
        shapes = {name: list(p.shape) for name, p in small.named_parameters()}
        found = [
            factors(width_groups(model, **base, wd_rule=wd_rule, step=step))
            for base in ({"base_width": 16}, {"base_shapes": small}, {"base_shapes": shapes})
        ]
        assert found[0] == found[1] == found[2]
        for name, pair in found[0].items():
            if name in ("lm_head.weight", "5.weight") or "router" in name:
                expected = (1 / 4, bare)  # only the fan-in grows
            elif "_proj.weight" in name or name == "2.weight":
                expected = MATRIX[step, wd_rule]
            else:
                expected = (1.0, bare)
            assert pair == pytest.approx(expected), name


def test_width_one_is_the_identity_and_doubling_halves_the_rate():
    for wd_rule in WD_RULES:
        for name, (lr, wd) in factors(
            width_groups(Model(32), base_width=32, wd_rule=wd_rule)
        ).items():
            assert lr == 1.0
            assert wd == 1.0 or (wd_rule == "sqrt" and ("_proj.weight" not in name))
    one, two = (factors(width_groups(Model(d), base_width=16)) for d in (32, 64))
    name = "layers.0.q_proj.weight"
    assert two[name][0] == pytest.approx(one[name][0] / 2)
    assert two[name][1] == pytest.approx(one[name][1] * 2**0.5)


def test_groups_are_plain_and_keep_order_and_names():
    model = Model(32)
    model.layers[1].q_proj.weight.requires_grad_(False)
    groups = width_groups(model, base_width=16, lr=0.02, weight_decay=0.1)
    names = [name for name, _ in model.named_parameters()]
    assert isinstance(groups, list)
    assert all(
        type(group) is dict and {*group} == {"params", "lr", "weight_decay"} for group in groups
    )
    assert all(type(group[key]) is float for group in groups for key in ("lr", "weight_decay"))
    firsts = [names.index(group["params"][0][0]) for group in groups]
    assert firsts == sorted(firsts)
    for group in groups:
        places = [names.index(name) for name, _ in group["params"]]
        assert places == sorted(places)
    params = dict(model.named_parameters())
    pairs = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in pairs) == sorted(names)
    assert all(p is params[name] for name, p in pairs)
    optimizer = torch.optim.AdamW(copy.copy(groups))
    assert sorted(n for g in optimizer.param_groups for n in g["param_names"]) == sorted(names)
    text = str(groups)
    assert "initial weights" in text and "attention logits" in text and "multipliers" in text
    assert "lr x 0.5" in text and "weight_decay x 1.414" in text


@PLAIN
def test_every_class_takes_the_groups(cls):
    torch.manual_seed(0)
    model = mlp(8)
    groups = width_groups(model, base_width=4, step="rms", lr=0.01)
    optimizer = cls(groups, model=model)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # the first one of SOAP finds bases only
        optimizer.zero_grad()
        model(torch.ones(3, 12)).square().mean().backward()
        optimizer.step()
    assert not any(
        torch.equal(a, b) for a, b in zip(before[::2], [*model.parameters()][::2], strict=True)
    )


def test_convolutions_count_their_inputs():
    conv = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32, 5))
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    found = factors(width_groups(conv, base_shapes=small))
    assert found["0.weight"] == (1.0, 0.0) and found["3.weight"] == pytest.approx((1 / 4, 0.0))
    assert found["1.weight"] == pytest.approx((1 / 4, 2.0))


@pytest.mark.parametrize(
    "bad, text",
    [
        ({}, "give either base_width"),
        ({"base_width": 8, "base_shapes": mlp(8)}, "give either base_width"),
        ({"base_width": 0}, "base_width must be positive"),
        ({"base_width": 8, "wd_rule": "linear"}, "wd_rule must be one of"),
        ({"base_width": 8, "step": "muon"}, "step must be one of"),
        ({"base_width": 8, "lr": -1.0}, "lr must be at least 0"),
        ({"base_width": 8, "width": 0}, "width must be an int"),
        ({"base_shapes": mlp(8), "width": 8}, "width belongs to base_width"),
        ({"base_shapes": "small"}, "base_shapes must be the small model, or map names to shapes"),
        (
            {"base_shapes": {n: 8 for n, _ in mlp(8).named_parameters()}},
            "base_shapes must map names to shapes, got 8",
        ),
        ({"base_shapes": {"0.weight": (8, 12)}}, "base_shapes has no parameter '0.bias'"),
        ({"base_shapes": nn.Sequential(*mlp(8), nn.Linear(5, 5))}, "the model has no parameter"),
        (
            {"base_shapes": {n: (8,) for n, _ in mlp(8).named_parameters()}},
            "base_shapes has shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_one_sentence(bad, text):
    with pytest.raises(ValueError, match=text) as caught:
        width_groups(mlp(16), **bad)
    assert "\n" not in str(caught.value)


def test_a_model_of_one_layer_or_of_lazy_ones_asks_for_what_is_missing():
    with pytest.raises(ValueError, match="pass width, or base_shapes"):
        width_groups(nn.Sequential(nn.Linear(4, 6)), base_width=2)
    with pytest.raises(ValueError, match="run the model once"):
        width_groups(nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 6)), base_width=2)
    groups = width_groups(nn.Sequential(nn.Linear(4, 6)), base_width=2, width=4)
    assert factors(groups)["0.weight"] == pytest.approx((1 / 2, 2**0.5))


@pytest.mark.parametrize("lr, decay", [(0.01, 0.5), (0.003, 1.0)])
def test_adamw_on_noise_has_weights_of_the_size_that_the_rule_keeps(lr, decay):
    """rms(W) = sqrt(lr / (2 decay)), so decay that grows as lr falls makes weights smaller."""
    draw = torch.Generator().manual_seed(0)
    size = math.sqrt(lr / (2 * decay))
    p = nn.Parameter(size * torch.randn(64, 64, generator=draw))
    optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=decay, betas=(0.9, 0.99))
    squares = []
    for step in range(900):
        p.grad = torch.randn(64, 64, generator=draw)
        optimizer.step()
        if step >= 500:
            squares.append(float(p.detach().square().mean()))
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(size, rel=0.05)


def moved(d, base, make, step):
    """Root mean square change of the output of two layers by one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, d, bias=False), nn.Linear(d, 5, bias=False))
    X = torch.randn(64, 12)
    before = model(X).detach()
    lr = 1e-4
    groups = (
        [{"params": [*model.named_parameters()], "lr": lr}]
        if base is None
        else width_groups(model, base_width=base, lr=lr, weight_decay=0.0, step=step)
    )
    optimizer = make(groups)
    (model(X) - 1).square().mean().backward()
    optimizer.step()
    return float((model(X).detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("make, step", [(torch.optim.AdamW, "adam"), (Muon, "rms")])
def test_the_output_moves_as_far_at_every_width(make, step):
    plain = [moved(d, None, make, step) for d in (64, 128, 256, 512)]
    ruled = [moved(d, 64, make, step) for d in (64, 128, 256, 512)]
    assert max(ruled) < 2 * min(ruled)
    assert plain[-1] > 4 * plain[0] and plain == sorted(plain)


def moved_by_hidden(d, make):
    """Root mean square change of the output where only the square matrix learns, in four steps."""
    total = 0.0
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        sides, gains = [(d, 16), (d, d), (4, d)], (1.0, 2.0, 1 / d)
        A, W, B = (
            nn.Parameter(torch.randn(*s, generator=draw) * math.sqrt(gain / s[1]))
            for s, gain in zip(sides, gains, strict=True)
        )
        fixed = torch.Generator().manual_seed(7)
        batches, Y = torch.randn(5, 64, 16, generator=fixed), torch.randn(16, 4, generator=fixed)
        call = lambda X: torch.relu(torch.relu(X @ A.mT) @ W.mT) @ B.mT  # noqa: B023, E731
        before, optimizer = call(batches[4]).detach(), make([W])
        for X in batches[:4]:
            optimizer.zero_grad()
            (call(X) - torch.sin(X @ Y / 4)).square().mean().backward()
            optimizer.step()
        total += float((call(batches[4]).detach() - before).square().mean())
    return math.sqrt(total)


HIDDEN = {
    "adam": {
        "AdamW": torch.optim.AdamW,
        "APOLLO": partial(optimizers.APOLLO, rank=0.25),
        "FRUGAL": optimizers.FRUGAL,
        "SinkGD": optimizers.SinkGD,
        "AuON": optimizers.AuON,
        "RowNorm": RowNorm,
    },
    "rms": {
        "Muon": partial(Muon, polar="ns5"),
        "GaLore": partial(optimizers.GaLore, rank=0.25),
        "SOAP": optimizers.SOAP,
        "ARO": optimizers.ARO,
        "Trion": partial(optimizers.Trion, rank=0.25),
    },
}


@pytest.mark.parametrize("step", HIDDEN)
def test_methods_belong_to_the_column_that_says_how_their_steps_grow(step):
    """Growth w^e of the change of the output: e near 1 for "adam", near 1/2 for "rms"."""
    found = {}
    for name, make in HIDDEN[step].items():
        ends = [moved_by_hidden(d, partial(make, lr=1e-4, weight_decay=0.0)) for d in (64, 256)]
        found[name] = math.log2(ends[1] / ends[0]) / 2
    low, high = {"adam": (0.6, 1.1), "rms": (0.15, 0.5)}[step]
    assert all(low < e < high for e in found.values()), found


# the schedule -------------------------------------------------------------------------------------

GIVEN = {"tokens_per_step": 1000.0, "batch_size": 8.0, "lr_max": 0.02}


def schedule(rates=(0.02,), **options):
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "lr": lr} for lr in rates]
    return PowerLR(torch.optim.AdamW(groups), **{**GIVEN, **options})


def rates_of(power, steps):
    """Rates of the first group over some steps, the present one first."""
    found = []
    for _ in range(steps):
        found.append(float(power.optimizer.param_groups[0]["lr"]))
        power.optimizer.step()
        power.step()
    return found


def test_the_curve_is_the_power_of_the_tokens():
    rates = rates_of(schedule(batch_size=1e-3, a=2.0, b=-0.5), 20)
    assert rates == pytest.approx([1e-3 * 2 * (1000 * (k + 1)) ** -0.5 for k in range(20)])
    assert rates_of(schedule(batch_size=1e9), 3) == [0.02] * 3
    assert all(math.isfinite(lr) for lr in rates_of(schedule(b=-5.0), 3))  # step 0 as well


def test_it_is_continuous_at_both_joints():
    power = schedule(batch_size=0.1, warmup=40, decay=50, total=300)
    for joint in (40, 250):
        left, right = (power.factor(joint + x) for x in (-1e-6, 1e-6))
        assert left == pytest.approx(right, rel=1e-5)
        assert power.factor(joint) == pytest.approx(left, rel=1e-5)
    rates = rates_of(power, 310)
    assert all(a < b for a, b in pairwise(rates[:41]))
    assert all(a > b for a, b in pairwise(rates[40:301]))
    assert rates[300:] == [0.0] * 10
    steps = [a - b for a, b in pairwise(rates[250:301])]
    assert max(steps) == pytest.approx(min(steps))


def test_without_an_end_it_never_decays():
    power = schedule(batch_size=0.1, decay=50)
    assert power.factor(10**9) == power.curve(10**9) > 0


def test_twice_the_batch_in_half_the_steps_has_the_same_sum():
    """Where the power counts, up to the coarser steps at the start."""
    small = schedule(batch_size=0.01)
    large = schedule(batch_size=0.02, tokens_per_step=2000.0)
    sums = [sum(map(power.curve, range(start, n)))
            for power, start, n in ((small, 2000, 20_000), (large, 1000, 10_000))]  # fmt: skip
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)
    assert small.curve(2000) < 1


def test_proportions_of_groups_stay():
    power = schedule((0.02, 0.005, 0.0), batch_size=0.01, warmup=3)
    for _ in range(8):
        a, b, zero = (group["lr"] for group in power.optimizer.param_groups)
        assert a == pytest.approx(4 * b) and zero == 0.0
        power.optimizer.step()
        power.step()
    model = Model(32)
    optimizer = Muon(width_groups(model, base_width=16, lr=0.02), model=model, adamw_lr=0.01)
    before = [group["lr"] for group in optimizer.param_groups]
    power = PowerLR(optimizer, 1000, 1e-3)
    after = [group["lr"] for group in optimizer.param_groups]
    assert [a / b for a, b in zip(after, before, strict=True)] == pytest.approx(
        [power.factor(0)] * len(before)
    )


def test_it_resumes_from_its_state_dict():
    options = {"batch_size": 0.05, "warmup": 5, "decay": 10, "total": 40}
    whole = rates_of(schedule(**options), 40)
    first = schedule(**options)
    start = rates_of(first, 17)
    second = schedule(batch_size=3.0)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert [*start, *rates_of(second, 23)] == whole
    tensor = schedule((torch.tensor(0.02),), **options)
    assert rates_of(tensor, 40) == pytest.approx(whole)


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"tokens_per_step": 0}, "tokens_per_step must be positive"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"a": 0}, "a must be positive"),
        ({"b": 0.5}, "b must be"),
        ({"lr_max": math.inf}, "lr_max must be"),
        ({"warmup": -1}, "warmup must be an int"),
        ({"decay": 1.5}, "decay must be an int"),
        ({"total": 0}, "total must be an int"),
        ({"total": 10, "warmup": 6, "decay": 5}, "total must be at least warmup"),
    ],
)
def test_bad_settings_of_the_schedule_are_refused(bad, text):
    with pytest.raises(ValueError, match=text) as caught:
        schedule(**bad)
    assert "\n" not in str(caught.value)


def test_both_are_exported():
    assert {"PowerLR", "width_groups"} <= set(optimizers.__all__)
