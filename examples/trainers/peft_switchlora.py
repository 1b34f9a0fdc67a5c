"""peft with SwitchLoRA, which also writes the base weights: the whole model has to be saved.

python examples/trainers/peft_switchlora.py
"""

import tempfile

import tiny

tiny.needs("peft", "transformers")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from stiefel.optimizers import SwitchLoRA, lora_param_groups, switchlora_init_  # noqa: E402


def made(seed=0):
    model = get_peft_model(tiny.hub_llama(seed), CONFIG)
    groups = lora_param_groups(model, base_weight=True)
    for group in groups:  # A and B as the paper draws them: B is not zero, the layer stays
        if group.get("rule") != "adamw":
            _, triples = zip(*group["params"], strict=True)
            for A, B, W0 in zip(*[iter(triples)] * 3, strict=True):
                switchlora_init_(W0, A, B, group["scale"])
    # a run this short exchanges often, so that something is exchanged at all
    often = {"total_steps": tiny.STEPS, "interval0": 10, "ratio": 1, "freeze_steps": 2}
    return model, SwitchLoRA(groups, lr=2e-2, **often)


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
model, optimizer = made()
tiny.show(optimizer)
batches, before = tiny.batches(), tiny.loss(model)
base = {name: x for name, x in tiny.weights(model).items() if "base_layer" in name}
with tempfile.TemporaryDirectory() as folder:
    train(model, optimizer, batches[: tiny.HALF])
    # save_pretrained would leave out the base weights, which have moved
    torch.save(model.state_dict(), f"{folder}/model.pt")
    torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
    train(model, optimizer, batches[tiny.HALF :])
    after = tiny.loss(model)

    resumed, again = made(seed=1)
    resumed.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
    again.load_state_dict(torch.load(f"{folder}/optimizer.pt", weights_only=True))
    train(resumed, again, batches[tiny.HALF :])
tiny.verdict(before, after, model, resumed)

now = tiny.weights(model)
moved = [name for name, x in base.items() if not torch.equal(x, now[name])]
print(f"{len(moved)} of {len(base)} base weights have moved")
merged = optimizer.merged()  # W0 + s B A of every layer, for a model without adapters
if not moved or len(merged) != len(base):
    raise SystemExit("base weights should have moved, and all of them be in merged()")
