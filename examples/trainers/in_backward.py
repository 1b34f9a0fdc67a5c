"""Each weight steps inside of backward() and frees its gradient: little memory, the same bits.

python examples/trainers/in_backward.py
"""

import copy

import tiny

from stiefel.optimizers import GaLore


def made(seed=0):
    model = tiny.Llama(seed)
    return model, GaLore(model, lr=2e-2, rank=8, update_proj_gap=3)


def train(model, optimizer, batches):
    with optimizer.step_in_backward():  # no optimizer.step(), no zero_grad()
        for batch in batches:
            model(batch).backward()
    if any(p.grad is not None for p in model.parameters()):
        raise SystemExit("a gradient is left")


batches = tiny.batches()
model, optimizer = made()
tiny.show(optimizer)
before = tiny.loss(model)
train(model, optimizer, batches[: tiny.HALF])
saved = tiny.weights(model), copy.deepcopy(optimizer.state_dict())  # a state dict is live
train(model, optimizer, batches[tiny.HALF :])

resumed, optimizer = made(seed=1)
resumed.load_state_dict(saved[0])
optimizer.load_state_dict(saved[1])
train(resumed, optimizer, batches[tiny.HALF :])
tiny.verdict(before, tiny.loss(model), model, resumed, "step_in_backward")

usual, optimizer = made()
for batch in batches:
    optimizer.zero_grad()
    usual(batch).backward()
    optimizer.step()
tiny.verdict(before, tiny.loss(usual), model, usual, "beside step()")
