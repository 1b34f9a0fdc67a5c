"""The language model of the examples with LoRA adapters: in plain torch, or by peft."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import ByteLM, LanguageModel
from methods import UserError
from torch import Tensor, nn

from stiefel.optimizers import lora_param_groups, switchlora_init_

HIDDEN = ("q", "k", "v", "o", "gate", "up", "down")
HUB_NAMES = {
    "embed": "model.embed_tokens",
    "blocks": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in HIDDEN[:4]},
    **{name: f"mlp.{name}_proj" for name in HIDDEN[4:]},
}


class LoRALinear(nn.Module):
    """x -> W0 x + s B A x. Its attributes have peft's names, so pairs are found as peft's are."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.scaling = linear.weight, scale
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight) + self.scaling * low


def plain_model(model: ByteLM, rank: int, alpha: int) -> LanguageModel:
    """Adapters on every hidden matrix; all else is frozen."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name in HIDDEN:
            setattr(block, name, LoRALinear(getattr(block, name), rank, alpha / rank))
    return model


class HubLM(LanguageModel):
    """A causal language model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def peft_model(model: ByteLM, rank: int, alpha: int) -> HubLM:
    """The same weights as transformers' LLaMA, with peft's adapters on every hidden matrix."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("--hf: transformers or peft is missing; pip install '.[hf]'") from error
    block = model.blocks[0]
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=block.q.in_features,
            intermediate_size=block.up.out_features,
            num_hidden_layers=len(model.blocks),
            num_attention_heads=block.heads,
            num_key_value_heads=block.heads,
            max_position_embeddings=len(model.cos),
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    weights = {
        ".".join(HUB_NAMES.get(part, part) for part in name.split(".")): value
        for name, value in model.state_dict().items()
    }
    llama.load_state_dict(weights)
    targets = [HUB_NAMES[name].split(".")[-1] for name in HIDDEN]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    return HubLM(get_peft_model(llama, config))


@torch.no_grad()
def start_adapters(model: nn.Module, seed: int, switch: bool) -> None:
    """B = 0 and A Gaussian, or what SwitchLoRA starts from; the model's function stays."""
    generator = torch.Generator().manual_seed(seed)
    for group in lora_param_groups(model, base_weight=True):
        tensors = [p for _, p in group["params"]]
        for A, B, W in zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True):
            if switch:
                switchlora_init_(W, A, B, group["scale"], generator)
            else:
                A.normal_(0.0, A.shape[1] ** -0.5, generator=generator)
                B.zero_()
