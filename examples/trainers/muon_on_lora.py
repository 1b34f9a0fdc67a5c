"""Muon on the factors of LoRA: each of A and B is a matrix of its own.

Muon orthogonalizes B and A one by one, without regard to their product; AltLoRA and AdaPreLoRA
see the pair. The rule has to be asked for, since roles say "adapter" of these factors.

python examples/trainers/muon_on_lora.py
"""

import copy

import tiny

tiny.needs("peft", "transformers")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from stiefel.optimizers import Muon  # noqa: E402


def made():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny.hub_llama(), config)
    factors = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return model, Muon([{"params": factors, "rule": "Muon"}], lr=2e-2, weight_decay=0.0)


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


model, optimizer = made()
tiny.show(optimizer)
batches, before = tiny.batches(), tiny.loss(model)
train(model, optimizer, batches[: tiny.HALF])
saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
train(model, optimizer, batches[tiny.HALF :])

resumed, optimizer = made()
resumed.load_state_dict(saved[0])
optimizer.load_state_dict(saved[1])
train(resumed, optimizer, batches[tiny.HALF :])
tiny.verdict(before, tiny.loss(model), model, resumed)
