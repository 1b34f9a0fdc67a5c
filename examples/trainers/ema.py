"""An exponential moving average of the weights, by torch's AveragedModel.

python examples/trainers/ema.py
"""

import copy

import tiny
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stiefel.optimizers import Muon


def made(seed=0):
    model = tiny.Llama(seed)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return model, average, Muon(model, lr=1e-2)


def train(model, average, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        average.update_parameters(model)


batches = tiny.batches()
whole = made()
tiny.show(whole[2])
before = tiny.loss(whole[1])
train(*whole, batches[: tiny.HALF])
saved = copy.deepcopy([part.state_dict() for part in whole])
train(*whole, batches[tiny.HALF :])

resumed = made(seed=1)
for part, state in zip(resumed, saved, strict=True):
    part.load_state_dict(state)
train(*resumed, batches[tiny.HALF :])
tiny.verdict(before, tiny.loss(whole[0]), whole[0], resumed[0], "weights")
tiny.verdict(before, tiny.loss(whole[1]), whole[1], resumed[1], "their average")
