"""Scripts that people have, run with every class in place of ``torch.optim.AdamW``.

A situation is a function of ``make``, which builds the optimizer, and of the number of steps that
were already taken (more than 0 where a run is resumed). It returns a :class:`Script`; what is
compared with AdamW stands in :func:`observe`.
"""

import contextlib
import copy
import io
import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.paths import TESTS
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR, AveragedModel

from stiefel import optimizers

CLASSES = {
    "Muon": {},
    "GaLore": {"rank": 2, "update_proj_gap": 2},
    "Fira": {"rank": 2, "update_proj_gap": 2},
    "APOLLO": {"rank": 2, "update_proj_gap": 2},
    "SinkGD": {},
    "Muown": {},
    "FRUGAL": {"density": 0.5, "update_gap": 2},
    "DCTAdamW": {"rank": 2},
    "Trion": {"rank": 2},
    "AuON": {},
    "ARO": {},
    "SOAP": {"precondition_frequency": 2},
    "SOAPMuon": {},
    "RowNorm": {},
    "Spectral": {},
    "Hybrid": {},
    "SymmetryStack": {},
}
"""Every class that takes plain parameters, with options that suit small weights."""
every_class = pytest.mark.parametrize("name", CLASSES)
STEPS, STOP = 4, 2
OURS_ALONE = re.compile(r"`?model=`?|skipped|not finite|non-finite")
"""Warnings that AdamW has no reason to give: a list without names (design 9.3), a skip (9.1)."""


# the scripts --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Tokens to logits: an embedding, two hidden matrices, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, 8)
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        return self.lm_head(x + self.fc2(self.norm(F.gelu(self.fc1(x)))))

    def loss(self, k):
        draw = torch.Generator().manual_seed(k)
        tokens = torch.randint(11, (4, 6), generator=draw)
        return F.cross_entropy(self(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


class ViT(nn.Module):
    """Patches, a class token and positions, as timm names them."""

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)]
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def loss(self, k):
        images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(k))
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(3, -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x[:, 0])), torch.tensor([0, 1, 2]))


class Backbone(nn.Module):
    """What is fine-tuned: a backbone and a new head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def loss(self, k):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(k))
        return self.head(self.backbone(x).relu()).square().mean()


@dataclass
class Script:
    """A training script, as far as an optimizer sees it.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        step: One step of training; None: zero_grad, backward, step.
        after: Run after each step: schedules and the like.
        before: Run before each step.
        saved: What a checkpoint holds beside model and optimizer.
        facts: More of what must be as with AdamW.
    """

    model: nn.Module
    optimizer: Any
    step: Callable[[int], Any] | None = None
    after: Callable[[int], Any] = lambda k: None
    before: Callable[[int], Any] = lambda k: None
    saved: tuple[Any, ...] = ()
    facts: Callable[[], Any] = lambda: None

    def run(self, first, last):
        for k in range(first, last):
            self.before(k)
            if self.step is not None:
                self.step(k)
            else:
                self.optimizer.zero_grad()
                self.model.loss(k).backward()
                self.optimizer.step()
            self.after(k)

    def checkpoint(self):
        parts = (self.model, self.optimizer, *self.saved)
        return through_a_file([part.state_dict() for part in parts])

    def load(self, checkpoint):
        parts = (self.model, self.optimizer, *self.saved)
        for part, saved in zip(parts, checkpoint, strict=True):
            part.load_state_dict(saved)


SITUATIONS: dict[str, Callable[..., Script]] = {}


def situation(function):
    SITUATIONS[function.__name__] = function
    return function


def new(cls):
    torch.manual_seed(0)
    return cls()


def decay_groups(model):
    """nanoGPT's ``configure_optimizers``."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


@situation
def nanogpt(make, done):
    model = new(Net)
    optimizer = make(decay_groups(model), lr=0.01, betas=(0.9, 0.95), fused=False)

    def set_lr(k):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + k)

    return Script(model, optimizer, before=set_lr)


@situation
def vit_with_a_no_decay_helper(make, done):
    """timm's ``param_groups_weight_decay``."""
    model = new(ViT)
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        plain = p.ndim <= 1 or name.endswith(".bias") or name in model.no_weight_decay
        (no_decay if plain else decay).append(p)
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.05}]
    return Script(model, make(groups, lr=0.01))


@situation
def layerwise_lr(make, done):
    """BEiT's and timm's layer decay: a group per tensor with keys of the helper."""
    model = new(Net)
    groups = [
        {
            "params": [p],
            "name": name,
            "layer_id": k,
            "lr_scale": 0.9**k,
            "param_group_name": f"layer_{k}",
            "weight_decay": 0.1 if p.ndim > 1 else 0.0,
            "lr": 0.01 * 0.9**k,
        }
        for k, (name, p) in enumerate(model.named_parameters())
    ]
    optimizer = make(groups, lr=0.01, weight_decay=0.1)

    def set_lr(k):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + k) * group["lr_scale"]

    return Script(model, optimizer, before=set_lr)


@situation
def trainer(make, done):
    """transformers' Trainer: groups by name, values as keywords, a tensor of warm-up factors."""
    model = new(Net)
    named = dict(model.named_parameters())
    decay = [name for name in named if "bias" not in name and "norm" not in name]
    groups = [
        {"params": [named[name] for name in decay], "weight_decay": 0.01},
        {"params": [p for name, p in named.items() if name not in decay], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=5e-3, betas=(0.9, 0.999), eps=1e-8)
    schedule = schedules.LambdaLR(optimizer, lambda k: (k + 1) / 4)
    return Script(model, optimizer, after=lambda k: schedule.step(), saved=(schedule,))


@situation
def trainer_that_knows_the_model(make, done):
    model = new(Net)
    return Script(model, make(decay_groups(model), lr=0.01, betas=(0.9, 0.99), model=model))


@situation
def model_in_place_of_parameters(make, done):
    model = new(Net)
    return Script(model, make(model, lr=0.01, weight_decay=0.1))


@situation
def freeze_and_unfreeze(make, done):
    """A backbone that is frozen at construction and unfrozen later, all in one optimizer."""
    model = new(Backbone)
    model.backbone.requires_grad_(done > 1)
    optimizer = make(model, lr=0.01, weight_decay=0.0)
    return Script(model, optimizer, before=lambda k: model.backbone.requires_grad_(k > 1))


@situation
def gradual_unfreezing(make, done):
    """ULMFiT: groups of all layers from the start, the last ones are trained first."""
    model = new(Backbone)
    layers = [*model.backbone, model.head]
    groups = [
        {"params": list(layer.parameters()), "lr": 0.01 / 2**i} for i, layer in enumerate(layers)
    ]

    def unfreeze(k):
        for i, layer in enumerate(layers):
            layer.requires_grad_(i >= 3 - k)

    unfreeze(done)
    optimizer = make(groups, lr=0.01, weight_decay=0.0)
    return Script(model, optimizer, before=unfreeze)


@situation
def backbone_finetuning(make, done):
    """Lightning's callback: the head first, the backbone as a late group without names."""
    model = new(Backbone)
    model.backbone.requires_grad_(done > 1)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [(name, p) for name, p in trained if name.startswith("head")]
    optimizer = make(head if make.keeps_names else [p for _, p in head], lr=0.01, weight_decay=0.0)

    def unfreeze(k):
        if k == 1:
            model.backbone.requires_grad_(True)
            late = list(model.backbone.parameters())
            optimizer.add_param_group({"params": late, "lr": 0.001, "name": "backbone"})

    if done > 1:
        unfreeze(1)
    return Script(model, optimizer, before=lambda k: k >= done and unfreeze(k))


def scheduled(make, schedule_of, **options):
    """Two groups of their own lr, and a schedule with values for each."""
    model = new(Net)
    first, second = decay_groups(model)
    optimizer = make([{**first, "lr": 0.02}, {**second, "lr": 0.01}], lr=0.01, **options)
    schedule = schedule_of(optimizer)
    return Script(model, optimizer, after=lambda k: schedule.step(), saved=(schedule,))


def each(optimizer, factor):
    """A value for each group, as a script writes it that knows its two groups."""
    return [factor * float(group["lr"]) for group in optimizer.param_groups]


SCHEDULES = {
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=each(o, 2), total_steps=8),
    "CyclicLR": lambda o: schedules.CyclicLR(
        o, each(o, 0.5), each(o, 2), step_size_up=2, cycle_momentum=False
    ),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: schedules.LambdaLR(
        o, [lambda k, i=i: 0.5**k + i for i in range(len(o.param_groups))]
    ),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o,
        [schedules.LinearLR(o, 0.1, total_iters=2), schedules.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
    "SWALR": lambda o: SWALR(o, each(o, 0.5), anneal_epochs=2),
}
for kind, schedule_of in SCHEDULES.items():
    SITUATIONS[f"schedule {kind}"] = lambda make, done, schedule_of=schedule_of: scheduled(
        make, schedule_of, weight_decay=0.0
    )


@situation
def reduce_on_plateau(make, done):
    script = scheduled(
        make, lambda o: schedules.ReduceLROnPlateau(o, patience=0, min_lr=each(o, 0.1))
    )
    (schedule,) = script.saved
    script.after = lambda k: schedule.step(1.0)
    return script


@situation
def loop_over_lr_and_weight_decay(make, done):
    """DINO: both from a table, by a key of the group or its number."""
    model = new(Net)
    groups = decay_groups(model)
    groups[1]["is_regularized"] = False
    optimizer = make(groups, lr=0.0, weight_decay=0.1)

    def set_values(k):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (k + 1)
            if group.get("is_regularized", True):
                group["weight_decay"] = 0.04 * (k + 1)
            group["i"] = i

    return Script(model, optimizer, before=set_values)


@situation
def tensor_lr(make, done):
    model = new(Net)
    optimizer = make(decay_groups(model), lr=torch.tensor(0.01), foreach=False)

    def decrease(k):
        for group in optimizer.param_groups:
            group["lr"].mul_(0.5)

    return Script(model, optimizer, after=decrease)


@situation
def schedule_of_a_tensor_lr(make, done):
    script = with_step(make, plain_step, lr=torch.tensor(0.01), weight_decay=0.0)
    schedule = schedules.CosineAnnealingLR(script.optimizer, 8)
    script.after, script.saved = lambda k: schedule.step(), (schedule,)
    script.facts = lambda: [type(group["lr"]) for group in script.optimizer.param_groups][:1]
    return script


@situation
def averaged_model(make, done):
    """EMA of the weights, then SWA's learning rate."""
    model = new(Net)
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    average = AveragedModel(model, avg_fn=lambda old, W, n: 0.9 * old + 0.1 * W)
    schedule = SWALR(optimizer, swa_lr=0.005, anneal_epochs=2)

    def update(k):
        average.update_parameters(model)
        schedule.step()

    return Script(model, optimizer, after=update, saved=(average, schedule))


def with_step(make, step, form=decay_groups, **options):
    """A script whose step is ``step(model, optimizer, k)``."""
    model = new(Net)
    optimizer = make(form(model), **{"lr": 0.01, "weight_decay": 0.1, **options})
    return Script(model, optimizer, step=partial(step, model, optimizer))


def plain_step(model, optimizer, k):
    optimizer.zero_grad()
    model.loss(k).backward()
    optimizer.step()


@situation
def clipping(make, done):
    def step(model, optimizer, k):
        optimizer.zero_grad(set_to_none=True)
        model.loss(k).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        nn.utils.clip_grad_value_(model.parameters(), 1e-4)
        optimizer.step()

    return with_step(make, step)


@situation
def gradient_scaler(make, done):
    """The second of four steps overflows, so it is left out for all parameters."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(model, optimizer, k):
        optimizer.zero_grad()
        scaler.scale(model.loss(k)).backward()
        if k == 1:
            model.fc1.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    script = with_step(make, step)
    script.saved, script.facts = (scaler,), scaler.get_scale
    return script


@situation
def accumulation(make, done):
    def step(model, optimizer, k):
        optimizer.zero_grad()
        for i in range(3):
            (model.loss(10 * k + i) / 3).backward()
        optimizer.step()

    return with_step(make, step, foreach=True)


class SAM(torch.optim.Optimizer):
    """The wrapper of davda54/sam: groups are shared with the base optimizer, and hold ``rho``."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def with_gradients(self):
        return [
            (group, p) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for _, p in self.with_gradients()]).norm()
        for group, p in self.with_gradients():
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad * (group["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for _, p in self.with_gradients():
            p.copy_(self.state[p].pop("old_p"))
        self.base_optimizer.step()

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, saved):
        self.base_optimizer.load_state_dict(saved)
        self.param_groups = self.base_optimizer.param_groups


@situation
def sharpness_aware(make, done):
    model = new(Net)
    sam = SAM(decay_groups(model), make, rho=0.1, lr=0.01)

    def step(k):
        model.loss(k).backward()
        sam.first_step()
        model.loss(k).backward()
        sam.second_step()
        sam.zero_grad()

    return Script(model, sam, step=step, facts=lambda: {g["rho"] for g in sam.param_groups})


@situation
def keeps_gradients_as_zeros(make, done):
    def step(model, optimizer, k):
        optimizer.zero_grad(set_to_none=False)
        model.loss(k).backward()
        optimizer.step()

    return with_step(make, step)


@situation
def closure(make, done):
    losses = []

    def step(model, optimizer, k):
        def evaluate():
            optimizer.zero_grad()
            loss = model.loss(k)
            loss.backward()
            return loss

        losses.append(optimizer.step(evaluate))

    script = with_step(make, step, maximize=True)
    script.facts = lambda: [type(loss) for loss in losses]
    return script


@situation
def missing_gradients(make, done):
    """One layer takes part in every second step only, another never."""

    def step(model, optimizer, k):
        optimizer.zero_grad()
        model.loss(k).backward()
        model.norm.weight.grad = model.fc1.weight.grad = None
        if k % 2:
            model.fc2.weight.grad = model.fc2.bias.grad = None
        optimizer.step()

    return with_step(make, step, weight_decay=0.0)


@situation
def tied_weights(make, done):
    model = new(Net)
    model.lm_head.weight = model.tok_embeddings.weight
    return Script(model, make(model.parameters(), lr=0.01, weight_decay=0.1))


@situation
def hooks(make, done):
    seen = []
    script = with_step(make, plain_step)
    script.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    script.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    script.facts = lambda: seen
    return script


@situation
def empty_groups(make, done):
    """Helpers leave a group without parameters where a model has none of a kind."""
    return with_step(
        make,
        plain_step,
        lambda model: [{"params": [], "weight_decay": 0.5}, *decay_groups(model), {"params": []}],
    )


@contextlib.contextmanager
def other_defaults():
    """Another default dtype, and another default device, than those of the model."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@situation
def foreign_default_device_and_dtype(make, done):
    """Faults row 21, from the construction on."""

    def step(model, optimizer, k):
        optimizer.zero_grad()
        model.loss(k).backward()
        with other_defaults():
            optimizer.step()

    model = new(Net)
    groups = decay_groups(model)
    with other_defaults():
        optimizer = make(groups, lr=0.01, weight_decay=0.1)
    return Script(model, optimizer, step=partial(step, model, optimizer))


@situation
def deep_copy_in_the_middle(make, done):
    """A deep copy of model and optimizer goes on with the same bits, as Lightning and EMA do."""
    model = new(Net)
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    pair = [model, optimizer]

    def step(k):
        pair[:] = copy.deepcopy(pair) if k == 1 else pair
        pair[1].zero_grad()
        pair[0].loss(k).backward()
        pair[1].step()
        if k >= 1:
            with torch.no_grad():
                for p, q in zip(model.parameters(), pair[0].parameters(), strict=True):
                    p.copy_(q)

    script = Script(model, optimizer, step=step)
    script.checkpoint = lambda: through_a_file([part.state_dict() for part in pair])
    return script


# the comparison -----------------------------------------------------------------------------------


@dataclass
class Make:
    """Builds ``cls`` as a script builds AdamW.

    Attributes:
        cls: The class.
        options: Its own options.
        keeps_names: Whether a late group without names may join a named optimizer.
    """

    cls: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def keeps_names(self):
        return self.cls is not AdamW

    def __call__(self, params, **keywords):
        if self.cls is AdamW:
            keywords.pop("model", None)
            if isinstance(params, nn.Module):
                params = params.named_parameters()
        return self.cls(params, **{**self.options, **keywords})


def observe(run, make):
    """What must be as with AdamW, and the weights at the end of a run that was resumed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script = run(make, 0)
        initial = {name: p.detach().clone() for name, p in script.model.named_parameters()}
        script.run(0, STOP)
        checkpoint = script.checkpoint()
        script.run(STOP, STEPS)
        resumed = run(make, STOP)
        resumed.load(checkpoint)
        resumed.run(STOP, STEPS)
    weights = dict(script.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, weights[name]), f"{name} differs after a resume"
    assert all(bool(p.isfinite().all()) for p in weights.values())
    texts = {str(w.message) for w in caught}
    return {
        "groups": [group_facts(group, weights) for group in script.optimizer.param_groups],
        "moved": {name for name, p in weights.items() if not torch.equal(p, initial[name])},
        "warnings": {text for text in texts if not OURS_ALONE.search(text)},
        "own warnings": {text for text in texts if OURS_ALONE.search(text)},
        "facts": script.facts(),
    }


KEPT = (
    "lr", "weight_decay", "name", "layer_id", "lr_scale", "param_group_name", "rho", "adaptive",
    "i", "is_regularized", "initial_lr", "max_lr", "min_lr", "swa_lr", "fused", "foreach",
    "maximize",
)  # fmt: skip


def group_facts(group, weights):
    """The parameters of a group by name, and what a script or a schedule wrote into it."""
    names = {id(p): name for name, p in weights.items()}
    facts = {key: group[key] for key in KEPT if key in group}
    for key in ("lr", "initial_lr"):
        if key in facts:
            facts[key] = pytest.approx(float(facts[key]), rel=1e-6)
    return {"params": [names[id(p)] for p in group["params"]], **facts}


def by_parameter(groups, left_out=()):
    """Facts of groups per parameter: SymmetryStack has a group for each role."""
    return {
        name: {k: value for k, value in facts.items() if k not in ("params", "i", *left_out)}
        for facts in groups
        for name in facts["params"]
    }


@cache
def as_with_adamw(run, **options):
    """What AdamW does; the same for every class."""
    return observe(run, Make(AdamW, options))


def check_equal(ours, theirs, name):
    """Groups, moved parameters, warnings and further facts; options that AdamW lacks aside."""
    (mine, yours) = (seen["groups"] for seen in (ours, theirs))
    if name == "SymmetryStack":  # the exception of design 9.2: groups by role
        # and its policy names the decay where the script has no groups
        policy_keys = ("weight_decay",) if len(yours) == 1 else ()
        mine, yours = by_parameter(mine, policy_keys), by_parameter(yours, policy_keys)
    else:
        keys = {key for group in yours for key in group}
        mine = [{key: group[key] for key in group if key in keys} for group in mine]
    assert mine == yours
    if name == "SOAP":  # a weight's first gradient moves nothing, and some had one alone
        assert ours["moved"] <= theirs["moved"]
    else:
        assert ours["moved"] == theirs["moved"]
    assert ours["warnings"] <= theirs["warnings"]
    assert ours["facts"] == theirs["facts"]


@every_class
@pytest.mark.parametrize("script", SITUATIONS)
def test_a_script_runs_as_with_adamw(script, name):
    run = SITUATIONS[script]
    ours = observe(run, Make(getattr(optimizers, name), CLASSES[name]))
    check_equal(ours, as_with_adamw(run), name)


FORMS = {
    "plain parameters": lambda model, make: make(model.parameters(), lr=0.01),
    "a tuple": lambda model, make: make(tuple(model.parameters()), lr=0.01),
    "named parameters": lambda model, make: make(model.named_parameters(), lr=0.01),
    "decay groups": lambda model, make: make(decay_groups(model), lr=0.01),
    "named groups": lambda model, make: make(
        [{"params": model.named_parameters(), "lr": 0.02, "name": "all"}], lr=0.01
    ),
    "module": lambda model, make: make(model, lr=0.01),
    "model=": lambda model, make: make(model.parameters(), lr=0.01, model=model),
    "model= with groups": lambda model, make: make(decay_groups(model), lr=0.01, model=model),
    "model= with names": lambda model, make: make(
        list(model.named_parameters()), lr=0.01, model=model
    ),
}


FORMS_THAT_SAY_ROLES = tuple(key for key in FORMS if "name" in key or "mod" in key)
"""All others get one warning that matrices are told by their shape alone (design 9.3)."""


@cache
def script_of(form, model):
    """The plain script with parameters in this form."""

    def run(make, done):
        made = new(model)
        return Script(made, FORMS[form](made, make))

    return run


@pytest.mark.covering
@every_class
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [Net, ViT, Backbone], ids=lambda cls: cls.__name__)
def test_every_form_of_parameters_has_the_groups_of_adamw(form, model, name):
    run, options = script_of(form, model), {"weight_decay": 0.1, **CLASSES[name]}
    ours = observe(run, Make(getattr(optimizers, name), options))
    check_equal(ours, as_with_adamw(run, weight_decay=0.1), name)
    is_told = form in FORMS_THAT_SAY_ROLES
    if name == "SymmetryStack" and model is Backbone and form.startswith("named"):
        is_told = False  # by names without the words of a layer (faults row 15)
    assert len(ours["own warnings"]) == (not is_told), ours["own warnings"]


@every_class
@pytest.mark.parametrize("form", FORMS_THAT_SAY_ROLES)
def test_embeddings_heads_and_tokens_are_no_matrices_where_the_form_says_so(form, name):
    for model in (new(Net), new(ViT)):
        optimizer = FORMS[form](model, Make(getattr(optimizers, name), CLASSES[name]))
        rules = {row.name: row.rule for row in optimizer.assignment()}
        assert len(rules) == len(list(model.parameters()))
        if name != "SymmetryStack":
            for key in ("tok_embeddings.weight", "lm_head.weight", "cls_token", "pos_embed"):
                assert rules.get(key, "adamw") == "adamw", key
        hidden = [key for key in rules if key in ("fc1.weight", "blocks.0.linear1.weight")]
        assert hidden and all(rules[key] != "adamw" for key in hidden)


# what needs a test of its own ---------------------------------------------------------------------


def made(name, params, **keywords):
    return Make(getattr(optimizers, name), CLASSES[name])(params, **{"lr": 0.01, **keywords})


@every_class
@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_a_cycled_momentum_is_that_of_the_class(schedule, name):
    """``momentum`` where the class has one, else beta1; AdamW's own betas stay."""
    model = new(Net)
    optimizer = made(name, model.named_parameters())
    if schedule == "OneCycleLR":
        cycle = schedules.OneCycleLR(optimizer, max_lr=0.02, total_steps=8)
    else:
        cycle = schedules.CyclicLR(optimizer, 0.01, 0.02, step_size_up=3)
    key = "momentum" if "momentum" in optimizer.defaults else "betas"
    seen, adamw_betas = set(), set()
    for k in range(4):
        optimizer.zero_grad()
        model.loss(k).backward()
        optimizer.step()
        cycle.step()
        group = optimizer.param_groups[0]
        seen.add(group[key] if key == "momentum" else group[key][0])
        adamw_betas.add(group["adamw_betas"])
    assert len(seen) > 1 and len(adamw_betas) == 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@every_class
def test_the_ratio_of_adamw_follows_every_schedule(name):
    """``adamw_lr`` is a proportion: it follows loops over lr, and may be set anew."""
    model = new(Net)
    optimizer = made(name, model.named_parameters(), lr=0.02, adamw_lr=0.002)

    def lrs():
        rows = [(row.rule == "adamw", round(float(row.lr), 9)) for row in optimizer.assignment()]
        return {kind: {lr for mine, lr in rows if mine is kind} for kind in (True, False)}

    assert lrs() == {True: {0.002}, False: {0.02}}
    for group in optimizer.param_groups:
        group["lr"] *= 10
    assert lrs() == {True: {0.02}, False: {0.2}}
    for group in optimizer.param_groups:
        group["adamw_lr"] = 0.001
    model.loss(0).backward()
    optimizer.step()
    assert lrs() == {True: {0.001}, False: {0.2}}


@every_class
def test_one_optimizer_per_parameter_in_backward_hooks(name):
    """torchtune's ``optimizer_in_bwd``: every parameter steps when its gradient is there."""
    model = new(Net)
    each_one = {p: made(name, [(key, p)], weight_decay=0.0) for key, p in model.named_parameters()}

    def step(p):
        each_one[p].step()
        each_one[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = [p.detach().clone() for p in model.parameters()]
    for k in range(2):
        model.loss(k).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, W) for p, W in zip(model.parameters(), before, strict=True))
    saved = through_a_file({key: each_one[p].state_dict() for key, p in model.named_parameters()})
    for key, p in model.named_parameters():
        each_one[p].load_state_dict(saved[key])


@every_class
def test_named_optimizers_per_parameter_draw_as_one_optimizer_does(name):
    """Faults row 14: with names a draw does not depend on what else an optimizer holds."""
    models, runs = [new(Net), new(Net)], []
    options = {"projection": "random"} if name in ("GaLore", "Fira") else {}
    # the roles of a stack come from all names of a model, or from the model
    known = [{"model": model} if name == "SymmetryStack" else {} for model in models]
    joint = made(name, models[0].named_parameters(), **options, **known[0])
    single = [made(name, [pair], **options, **known[1]) for pair in models[1].named_parameters()]
    for model, stepped in zip(models, ([joint], single), strict=True):
        for k in range(3):
            model.zero_grad()
            model.loss(k).backward()
            for optimizer in stepped:
                optimizer.step()
        runs.append(list(model.parameters()))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def trained(name, form="named parameters", steps=2):
    model = new(Net)
    optimizer = FORMS[form](model, Make(getattr(optimizers, name), CLASSES[name]))
    Script(model, optimizer).run(0, steps)
    return model, optimizer


@every_class
@pytest.mark.parametrize("form", FORMS)
def test_copies_and_pickles_go_on_with_the_same_bits(form, name):
    model, optimizer = trained(name, form)
    file = io.BytesIO()
    torch.save([model, optimizer], file)
    file.seek(0)
    copies = [
        copy.deepcopy([model, optimizer]),
        pickle.loads(pickle.dumps([model, optimizer])),
        torch.load(file, weights_only=False),
    ]
    Script(model, optimizer).run(2, 4)
    for other, other_optimizer in copies:
        Script(other, other_optimizer).run(2, 4)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        assert len(other_optimizer.param_groups) == len(optimizer.param_groups)
        assert str(other_optimizer.assignment()) == str(optimizer.assignment())


@every_class
def test_a_named_checkpoint_loads_in_another_order(name):
    """Faults row 7: layers of one shape that were registered in another order keep their state."""
    model, optimizer = trained(name)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    other = new(Net)
    other.load_state_dict(saved[0])
    reordered = made(name, list(other.named_parameters())[::-1])
    reordered.load_state_dict(saved[1])
    Script(model, optimizer).run(2, 4)
    Script(other, reordered).run(2, 4)
    for key, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(key)), key
    if name != "SymmetryStack":  # which has groups by role
        names = [key for key, _ in other.named_parameters()]
        assert [row.name for row in reordered.assignment()] == names[::-1]


@every_class
def test_a_parameter_given_twice_warns_as_with_adamw(name):
    W = nn.Parameter(torch.ones(3, 3))
    with pytest.warns(UserWarning) as theirs:
        AdamW([W, W])
    with pytest.warns(UserWarning) as ours:
        made(name, [W, W])
    assert str(theirs[0].message) in {str(w.message) for w in ours}


@every_class
def test_a_bad_gradient_stops_no_other_parameter_and_warns_once(name):
    model, optimizer = trained(name, "decay groups", 1)
    model.loss(1).backward()
    model.norm.weight.grad[0] = torch.nan
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="not finite|non-finite|skip"):
        optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == set(before) - {"norm.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert sum(optimizer.skipped.values()) == 2


TWO_RANKS = TESTS / "helpers" / "two_ranks.py"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes saw with every class, and with AdamW."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.json" for rank in range(2)]
    names = ["AdamW", *CLASSES]
    processes = [
        subprocess.Popen(
            [sys.executable, str(TWO_RANKS), str(rank), str(folder / "store"), str(out), *names],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)[-4000:]
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.slow
@every_class
def test_two_ranks_with_zero_redundancy_are_as_with_adamw(two_ranks, name):
    """Equal groups and weights on both ranks, or a refusal at construction on both."""
    first, second = (seen[name] for seen in two_ranks)
    if "refused" in first:
        assert name == "SymmetryStack" and first == second
        assert "ZeroRedundancyOptimizer" in first["refused"] or "groups" in first["refused"]
        return
    assert "error" not in first and "error" not in second, (first, second)
    theirs = two_ranks[0]["AdamW"]
    assert first["weights"] == second["weights"]
    assert first["groups"] == second["groups"] == theirs["groups"]
    assert first["moved"] == second["moved"] == theirs["moved"]
    assert first["finite"] and first["saved"] == theirs["saved"]
