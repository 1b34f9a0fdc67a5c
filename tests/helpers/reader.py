"""What a reader of the README or of the site has: a model, its inputs, stand-ins of hubs."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(text: str, path: str, namespace: dict[str, Any]) -> int:
    """Run every block of Python of a page in order, so that an error names the page's line."""
    blocks = [match for match in FENCE.finditer(text) if match[1] == "python"]
    for block in blocks:
        lines = "\n" * text.count("\n", 0, block.start(2))
        exec(compile(lines + block[2], path, "exec"), namespace)
    return len(blocks)


class LoRALinear(nn.Module):
    """A frozen linear layer with one adapter, its attributes named and nested as peft's."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.base_layer = linear.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, linear.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling = {"default": alpha / rank}

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scaling["default"] * low


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 16), nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)
    )


def get_peft_model(model: nn.Module, config: SimpleNamespace) -> nn.Module:
    """Adapters on every linear layer; all else is frozen."""
    model.requires_grad_(False)
    for name, child in [*model.named_children()]:
        if isinstance(child, nn.Linear):
            setattr(model, name, LoRALinear(child, config.r, config.lora_alpha))
    return model


class SmallLlama(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(97, 32)
        self.q_proj, self.o_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.lm_head = nn.Linear(32, 97, bias=False)


def stand_in(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def namespace_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a reader has: a model, its inputs, lists of its parameters."""
    peft = stand_in("peft", LoraConfig=SimpleNamespace, get_peft_model=get_peft_model)
    transformers = stand_in(
        "transformers", LlamaConfig=SimpleNamespace, LlamaForCausalLM=SmallLlama
    )
    monkeypatch.setitem(sys.modules, "peft", peft)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    model = small_model()
    hidden = [p for p in model[1:].parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in hidden)]
    inputs = torch.arange(10).view(2, 5)
    adapted = get_peft_model(small_model(), SimpleNamespace(r=2, lora_alpha=4))
    names = {"model": model, "inputs": inputs, "hidden": hidden, "rest": rest}
    return {**names, "adapted": adapted}
