"""The README: its length, its links, and its code, run block by block as a reader would."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stiefel.optimizers
from stiefel.optimizers import StackedOptimizer

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MOST_LINES = 130


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def prose() -> str:
    return FENCE.sub("", readme())


# Stand-ins for what the blocks take from elsewhere --------------------------------------------


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


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
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
    return {"model": model, "inputs": inputs, "hidden": hidden, "rest": rest}


# Tests -----------------------------------------------------------------------------------------


def test_every_python_block_runs_in_order(
    namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """And does what its section says: weights move, tables print, roles are told apart."""
    text, start = readme(), [p.detach().clone() for p in namespace["model"].parameters()]
    blocks = [match for match in FENCE.finditer(text) if match[1] == "python"]
    assert len(blocks) >= 4
    optimizers: list[StackedOptimizer] = []
    for i, block in enumerate(blocks):
        line = text.count("\n", 0, block.start(2))
        source = "\n" * line + block[2]  # so that an error names the README's own line
        exec(compile(source, str(ROOT / "README.md"), "exec"), namespace)
        if i == 0:
            moved = zip(start, namespace["model"].parameters(), strict=True)
            assert not any(torch.equal(before, after) for before, after in moved)
        optimizers += [v for v in namespace.values() if isinstance(v, StackedOptimizer)]
    printed = capsys.readouterr().out
    assert re.search(r"^1\.weight .* Muon ", printed, re.MULTILINE)
    assert re.search(r"^0\.weight .* adamw ", printed, re.MULTILINE)
    assert re.search(r"^total .*", printed, re.MULTILINE)
    assert {type(optimizer).__name__ for optimizer in optimizers} >= {"Muon", "AltLoRA"}
    pairs = next(x for x in optimizers if type(x).__name__ == "AltLoRA")
    adapted = [row for row in pairs.assignment() if row.rule == "AltLoRA"]
    assert len(adapted) == 6


def test_readme_is_short() -> None:
    assert len(readme().splitlines()) <= MOST_LINES


def test_every_relative_link_points_to_a_file() -> None:
    links = [link for link in LINK.findall(prose()) if "://" not in link]
    assert links
    files = [link.split("#")[0] for link in links if link[0] != "#"]
    assert not [file for file in files if not (ROOT / file).exists()]


def test_every_link_within_the_page_has_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", prose(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings}
    assert {link[1:] for link in LINK.findall(prose()) if link[0] == "#"} <= anchors


def test_every_optimizer_is_in_the_table_of_methods() -> None:
    public = [getattr(stiefel.optimizers, name) for name in stiefel.optimizers.__all__]
    classes = [c for c in public if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    rows = set(re.findall(r"^\| `(\w+)` \|", readme(), re.MULTILINE))
    assert rows == {c.__name__ for c in classes if c is not StackedOptimizer}
