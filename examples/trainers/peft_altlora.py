"""peft with AltLoRA, by hand: adapters are saved by peft, the optimizer by its state dict.

python examples/trainers/peft_altlora.py
"""

import tempfile

import tiny

tiny.needs("peft", "transformers")

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from stiefel.optimizers import AltLoRA, lora_param_groups  # noqa: E402


def optimizer_of(model):
    """Pairs of A and B by name, their scales from the modules; what else trains goes to AdamW."""
    return AltLoRA(lora_param_groups(model), lr=0.03, second_moment="elementwise")


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


torch.manual_seed(0)
config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(tiny.hub_llama(), config)
optimizer = optimizer_of(model)
tiny.show(optimizer)
batches, before = tiny.batches(), tiny.loss(model)
with tempfile.TemporaryDirectory() as folder:
    train(model, optimizer, batches[: tiny.HALF])
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
    train(model, optimizer, batches[tiny.HALF :])

    resumed = PeftModel.from_pretrained(tiny.hub_llama(), folder, is_trainable=True)
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt", weights_only=True))
    train(resumed, optimizer, batches[tiny.HALF :])
tiny.verdict(before, tiny.loss(model), model, resumed)
