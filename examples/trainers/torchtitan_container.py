"""torchtitan's container: patterns choose optimizer and options, first match wins.

torchtitan groups parameters by regular expressions on their names and builds one optimizer for
each name of a class, with `fused` or `foreach` among the keywords. The container below does the
same in a few lines; register the class in torchtitan's table of factories to use it there.

python examples/trainers/torchtitan_container.py
"""

import copy
import re
from dataclasses import dataclass, field

import tiny
import torch
from torch.optim.lr_scheduler import LambdaLR

from stiefel.optimizers import Muon

FACTORIES = {"AdamW": torch.optim.AdamW, "Muon": Muon}


@dataclass
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict = field(default_factory=dict)


CONFIGS = [
    ParamGroupConfig(r"embed|positions|lm_head|norm", "AdamW", {"lr": 3e-3}),
    ParamGroupConfig(r"self_attn", "Muon", {"lr": 1e-2, "weight_decay": 0.1}),
    ParamGroupConfig(r".*", "Muon", {"lr": 2e-2, "weight_decay": 0.0}),
]


class OptimizersContainer:
    """One optimizer for each name; groups carry the names of their parameters."""

    def __init__(self, model, configs, **keywords):
        groups = {}
        left = dict(model.named_parameters())
        for config in configs:
            taken = {n: p for n, p in left.items() if re.search(config.pattern, n)}
            left = {n: p for n, p in left.items() if n not in taken}
            group = {"params": list(taken.items()), **config.optimizer_kwargs}
            groups.setdefault(config.optimizer_name, []).append(group)
        self.optimizers = [FACTORIES[name](params, **keywords) for name, params in groups.items()]

    def __iter__(self):
        return iter(self.optimizers)

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def load_state_dict(self, states):
        for optimizer, state in zip(self, states, strict=True):
            optimizer.load_state_dict(state)


def made(seed=0):
    model = tiny.Llama(seed)
    container = OptimizersContainer(model, CONFIGS, fused=False, foreach=True)
    return model, container, [LambdaLR(o, lambda t: 1 / (1 + 0.1 * t)) for o in container]


def train(model, container, schedules, batches):
    for batch in batches:
        container.zero_grad()
        model(batch).backward()
        container.step()
        for schedule in schedules:
            schedule.step()


batches = tiny.batches()
whole = made()
tiny.show(whole[1].optimizers[1])
before = tiny.loss(whole[0])
train(*whole, batches[: tiny.HALF])
saved = copy.deepcopy([whole[0].state_dict(), whole[1].state_dict()])
saved.append([schedule.state_dict() for schedule in whole[2]])
train(*whole, batches[tiny.HALF :])

resumed = made(seed=1)
resumed[0].load_state_dict(saved[0])
resumed[1].load_state_dict(saved[1])
for schedule, state in zip(resumed[2], saved[2], strict=True):
    schedule.load_state_dict(state)
train(*resumed, batches[tiny.HALF :])
tiny.verdict(before, tiny.loss(whole[0]), whole[0], resumed[0])
