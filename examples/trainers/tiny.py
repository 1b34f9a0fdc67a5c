"""What the recipes share: a tiny LLaMA, text that ships with Python, and what is checked.

``Llama`` is plain torch with the names of transformers' model, ``hub_llama`` is transformers' own.
Both begin with random weights and read single bytes.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, FFN, LAYERS, NUM_HEADS, SEQ = 32, 96, 2, 2, 32
STEPS, HALF, BATCH = 8, 4, 8
MISSING = 77
"""Exit code of a recipe whose packages are not there."""

torch.set_num_threads(1)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


# data -----------------------------------------------------------------------------------------


def text() -> str:
    """About a hundred thousand letters: the source of argparse."""
    return inspect.getsource(argparse)


def batches(count: int = STEPS, rows: int = BATCH, seed: int = 0) -> list[Tensor]:
    """Batches (rows, SEQ) of bytes of the text, the same for the same seed."""
    data = torch.frombuffer(bytearray(text().encode()), dtype=torch.uint8).long()
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - SEQ, (count, rows), generator=draw).tolist()
    return [torch.stack([data[i : i + SEQ] for i in line]) for line in starts]


def rows(count: int = STEPS * BATCH) -> list[dict[str, Tensor]]:
    """The same as a data set of transformers."""
    (batch,) = batches(1, count)
    return [{"input_ids": row, "labels": row} for row in batch]


# models ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, FFN, bias=False)
        self.up_proj = nn.Linear(WIDTH, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm = nn.RMSNorm(WIDTH)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Bytes (rows, SEQ) to the mean loss of the next byte."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(SEQ, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def hub_llama(seed: int = 0) -> Any:
    """LlamaForCausalLM of the same size."""
    (transformers,) = needs("transformers")
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=SEQ,
            use_cache=False,
        )
    )


def needs(*names: str) -> list[Any]:
    """The packages of these names; a recipe that lacks one says so and ends with MISSING."""
    found = []
    for name in names:
        try:
            found.append(__import__(name))
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            print(f"needs {name}: {str(error).splitlines()[0]}")
            sys.exit(MISSING)
    return found


def train_share(model: Any, optimizer: Any, batches: list[Tensor]) -> None:
    """Train on this process's rows of each batch."""
    for batch in batches:
        share = batch.chunk(int(os.environ["WORLD_SIZE"]))[rank()]
        optimizer.zero_grad()
        model(share).backward()
        optimizer.step()


# checks ---------------------------------------------------------------------------------------


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def say(*words: Any) -> None:
    """Print on the first process only."""
    if rank() == 0:
        print(*words, flush=True)


@torch.no_grad()
def loss(model: Any) -> float:
    """The loss on one batch that no recipe trains on."""
    (held_out,) = batches(1, 32, seed=1)
    was_training = model.training
    model.eval()
    hub = hasattr(model, "config")  # transformers' models, and peft's around them
    found = model(input_ids=held_out, labels=held_out).loss if hub else model(held_out)
    model.train(was_training)
    return float(found)


def show(optimizer: Any) -> None:
    """Print which parameter gets which rule; an embedding or a head on a matrix rule ends it."""
    table = optimizer.assignment()
    say(table)
    wrong = [
        row.name or str(row.shape)  # names are missing under ZeRO
        for row in table
        if row.rule != "adamw" and (row.role in ("embedding", "head") or 256 in row.shape)
    ]
    if wrong:
        sys.exit(f"on a matrix rule, and should not be: {', '.join(wrong)}")


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all weights, whole where they are sharded."""
    if isinstance(model, nn.Module):
        model = model.state_dict()
    whole: Callable[[Tensor], Tensor] = lambda x: getattr(x, "full_tensor", lambda: x)()  # noqa: E731
    return {name: whole(x.detach()).clone() for name, x in model.items()}


def verdict(before: float, after: float, whole: Any, resumed: Any, what: str = "") -> None:
    """Print the losses; end with an error if the loss did not fall or if weights differ.

    Args:
        before: Loss before training.
        after: Loss after it.
        whole: The model after all steps, or its weights.
        resumed: The same of a run that was stopped, saved, loaded into new objects, continued.
        what: What was trained (default: "").
    """
    one, two = weights(whole), weights(resumed)
    differ = [k for k in one.keys() | two.keys() if not equal(one.get(k), two.get(k))]
    end = "differs" if differ else "has the same bits"
    say(f"{what or 'loss'}: before {before:.4f}, after {after:.4f}; the resumed run {end}")
    if not after < before:
        sys.exit("the loss did not fall")
    if differ:
        sys.exit(f"the resumed run differs in {len(differ)} of {len(one)} weights: {differ[0]}")


def equal(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and torch.equal(x, y)


warnings.filterwarnings("ignore", message=".*pin_memory.*")
