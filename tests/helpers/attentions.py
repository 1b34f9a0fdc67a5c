"""Attention modules of every layout of weights, which compute their logits in float64."""

import math
from types import SimpleNamespace

import torch
from torch import nn

WIDTH = 24


class Conv1D(nn.Module):
    """A linear layer stored (in, out), under the name that marks it."""

    def __init__(self, n, m):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(n, m)), nn.Parameter(torch.empty(m))

    def forward(self, x):
        return x @ self.weight + self.bias


def heads_of(x, heads):
    """(batch, length, heads * size) as (batch, heads, length, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def logits_of(q, k):
    """Of queries and keys by head, where groups of queries share a key; scaled by their size."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q @ k.mT / math.sqrt(q.shape[-1])


class Apart(nn.Module):
    """Weights of their own; fewer key heads if asked for."""

    def __init__(self, heads=4, kv=4, bias=True, size=6):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv, size
        self.q_proj = nn.Linear(WIDTH, heads * size, bias)
        self.k_proj = nn.Linear(WIDTH, kv * size, bias)
        self.v_proj = nn.Linear(WIDTH, kv * size, bias)
        self.o_proj = nn.Linear(heads * size, WIDTH)

    def forward(self, x):
        q, k = heads_of(self.q_proj(x), self.num_heads), self.k_proj(x)
        return logits_of(q, heads_of(k, self.num_key_value_heads))


class Fused(nn.Module):
    """All queries, then all keys, then all values, in one weight."""

    def __init__(self, heads=4, kv=2, size=6, conv=False):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv, size
        rows = (heads + 2 * kv) * size
        self.c_attn = Conv1D(WIDTH, rows) if conv else nn.Linear(WIDTH, rows)
        self.c_proj = nn.Linear(heads * size, WIDTH)

    def forward(self, x):
        h, kv, d = self.num_heads, self.num_key_value_heads, self.head_dim
        q, k, _ = self.c_attn(x).split([h * d, kv * d, kv * d], -1)
        return logits_of(heads_of(q, h), heads_of(k, kv))


class ByGroup(nn.Module):
    """The queries of a group, its key and its value beside each other."""

    def __init__(self, heads=4, kv=2, size=6, name="query_key_value"):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.name = heads, kv, size, name
        setattr(self, name, nn.Linear(WIDTH, (heads + 2 * kv) * size))
        self.dense = nn.Linear(heads * size, WIDTH)

    def forward(self, x):
        kv, d = self.num_kv_heads, self.head_dim
        y = getattr(self, self.name)(x).unflatten(-1, (kv, -1, d))
        q = y[..., :-2, :].flatten(2, 3).transpose(1, 2)
        return logits_of(q, y[..., -2, :].transpose(1, 2))


class PerHead(nn.Module):
    """A matrix (in, out) for every head."""

    def __init__(self, heads=4, kv=2, size=6):
        super().__init__()
        self.W_Q, self.W_K, self.W_V = (
            nn.Parameter(torch.empty(h, WIDTH, size)) for h in (heads, kv, kv)
        )
        self.b_Q, self.b_K = (nn.Parameter(torch.empty(h, size)) for h in (heads, kv))
        self.W_O = nn.Parameter(torch.empty(heads, size, WIDTH))

    def forward(self, x):
        q, k = (
            torch.einsum("bln,hnd->bhld", x, W) + b[:, None]
            for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K))
        )
        return logits_of(q, k)


class Torch(nn.MultiheadAttention):
    """torch's own, packed or with keys of another width, whose bias is packed all the same."""

    def __init__(self, heads=4, kdim=None, appended=False):
        super().__init__(WIDTH, heads, kdim=kdim, vdim=kdim, batch_first=True, add_bias_kv=appended)

    def forward(self, x):
        d = self.embed_dim
        weights = (self.q_proj_weight, self.k_proj_weight)
        if self._qkv_same_embed_dim:
            weights = (self.in_proj_weight[:d], self.in_proj_weight[d : 2 * d])
        q = x @ weights[0].mT + self.in_proj_bias[:d]
        k = x[..., : weights[1].shape[1]] @ weights[1].mT + self.in_proj_bias[d : 2 * d]
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, d)], 1)
        return logits_of(heads_of(q, self.num_heads), heads_of(k, self.num_heads))


class Latent(nn.Module):
    """Multi-head latent attention: content by head, one rotary key for all."""

    def __init__(self, heads=3, rank=8, nope=4, rope=2, value=5, low_rank_query=True):
        super().__init__()
        self.num_heads = heads
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = nope, rope, value
        self.q_lora_rank = rank if low_rank_query else None
        if low_rank_query:
            self.q_a_proj, self.q_norm = nn.Linear(WIDTH, rank), nn.LayerNorm(rank)
            self.q_b_proj = nn.Linear(rank, heads * (nope + rope), bias=True)
        else:
            self.q_proj = nn.Linear(WIDTH, heads * (nope + rope))
        self.kv_a_proj_with_mqa = nn.Linear(WIDTH, rank + rope)
        self.kv_a_layernorm = nn.LayerNorm(rank)
        self.kv_b_proj = nn.Linear(rank, heads * (nope + value), bias=False)

    def forward(self, x):
        h, nope = self.num_heads, self.qk_nope_head_dim
        q = self.q_b_proj(self.q_norm(self.q_a_proj(x))) if self.q_lora_rank else self.q_proj(x)
        q = heads_of(q, h)
        latent, rope = self.kv_a_proj_with_mqa(x).split([8, self.qk_rope_head_dim], -1)
        k = heads_of(self.kv_b_proj(self.kv_a_layernorm(latent)), h)[..., :nope]
        return logits_of(q, torch.cat([k, rope.unsqueeze(1).expand(-1, h, -1, -1)], -1))


class Block(nn.Module):
    """A block of a model around an attention, with a config beside it."""

    def __init__(self, attention):
        super().__init__()
        self.attn, self.norm, self.fc = attention, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.config = SimpleNamespace(hidden_size=WIDTH)


KINDS = {
    "mha": lambda: Apart(),
    "mha without bias": lambda: Apart(bias=False),
    "gqa": lambda: Apart(kv=2),
    "mqa": lambda: Apart(kv=1, size=5),
    "fused": lambda: Fused(kv=4),
    "fused gqa": lambda: Fused(),
    "conv1d": lambda: Fused(kv=4, conv=True),
    "conv1d gqa": lambda: Fused(conv=True),
    "by head": lambda: ByGroup(kv=4),
    "by group": lambda: ByGroup(),
    "megatron": lambda: ByGroup(name="linear_qkv"),
    "one key by group": lambda: ByGroup(kv=1),
    "per head": lambda: PerHead(),
    "torch": lambda: Torch(),
    "torch, other keys": lambda: Torch(kdim=10),
    "torch, appended": lambda: Torch(appended=True),
    "latent": lambda: Latent(),
    "latent, whole queries": lambda: Latent(low_rank_query=False),
}
"""A module of every layout."""


def model_of(kind, seed=0, dtype=torch.float64, size=1.0):
    """Two blocks with an attention each, whose logits grow by head."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"blocks": nn.ModuleList(Block(KINDS[kind]()) for _ in range(2))})
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (size if "attn" in name else 1.0))
    return model.to(dtype)


def inputs(seed=1, dtype=torch.float64):
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def maxima(model, x):
    """Largest logit of every head, by the name of its module."""
    return {
        f"blocks.{i}.attn": block.attn(x).amax((0, 2, 3)) for i, block in enumerate(model["blocks"])
    }
