"""Queries and keys of attention modules that are named and stored as other libraries do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stiefel.optimizers import qk_clip_

W, H = 32, 4


def linear(rows, cols=W, bias=False):
    return nn.Linear(cols, rows, bias=bias)


def module(**members):
    """A module with these members, modules and counts alike."""
    made = nn.Module()
    for name, x in members.items():
        setattr(made, name, x)
    return made


def config(**counts):
    return SimpleNamespace(hidden_size=W, num_attention_heads=H, **counts)


LATENT = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
# path, attention, configuration of the model, what is scaled with its least factor at gamma = 1 / 4
CASES = {
    "llama": ("model.layers.0.self_attn", lambda: module(
        q_proj=linear(32), k_proj=linear(16), v_proj=linear(16), o_proj=linear(W), head_dim=8,
    ), config(**GQA), {"q_proj.weight": 0.5, "k_proj.weight": 0.5}),
    "bert": ("encoder.layer.0.attention.self", lambda: module(
        query=linear(W, bias=True), key=linear(W, bias=True), value=linear(W, bias=True),
    ), config(), {f"{x}.{y}": 0.5 for x in ("query", "key") for y in ("weight", "bias")}),
    "t5": ("encoder.block.0.layer.0.SelfAttention", lambda: module(
        q=linear(24), k=linear(24), v=linear(24), o=linear(W, 24), n_heads=4, key_value_proj_dim=6,
    ), SimpleNamespace(d_model=W, num_heads=H, d_kv=6), {"q.weight": 0.5, "k.weight": 0.5}),
    "neox": ("gpt_neox.layers.0.attention", lambda: module(
        query_key_value=linear(96, bias=True), dense=linear(W),
    ), config(), {"query_key_value.weight": 0.5, "query_key_value.bias": 0.5}),
    "falcon": ("transformer.h.0.self_attention", lambda: module(
        query_key_value=linear(48), dense=linear(W), num_heads=4, head_dim=8, num_kv_heads=1,
    ), config(num_kv_heads=4, multi_query=True), {"query_key_value.weight": 0.5}),
    "falcon, groups": ("transformer.h.0.self_attention", lambda: module(
        query_key_value=linear(64), dense=linear(W), num_heads=4, head_dim=8, num_kv_heads=2,
    ), config(num_kv_heads=2), {"query_key_value.weight": 0.5}),
    "phi3": ("model.layers.0.self_attn", lambda: module(
        qkv_proj=linear(64), o_proj=linear(W), head_dim=8,
    ), config(num_key_value_heads=2), {"qkv_proj.weight": 0.5}),
    "timm": ("blocks.0.attn", lambda: module(
        qkv=linear(96, bias=True), q_norm=nn.Identity(), k_norm=nn.Identity(), proj=linear(W),
        num_heads=4, head_dim=8,
    ), None, {"qkv.weight": 0.5, "qkv.bias": 0.5}),
    "beit": ("blocks.0.attn", lambda: module(
        qkv=linear(96), proj=linear(W), num_heads=4,
        q_bias=nn.Parameter(torch.ones(W)), v_bias=nn.Parameter(torch.ones(W)),
    ), None, {"qkv.weight": 0.5, "q_bias": 0.5}),
    "starcoder": ("transformer.h.0.attn", lambda: module(
        c_attn=linear(48), c_proj=linear(W), multi_query=True, num_heads=4, head_dim=8,
    ), config(multi_query=True), {"c_attn.weight": 0.5}),
    "nanochat": ("transformer.h.0.attn", lambda: module(
        c_q=linear(32), c_k=linear(16), c_v=linear(16), c_proj=linear(W), n_head=4, n_kv_head=2,
    ), None, {"c_q.weight": 0.5, "c_k.weight": 0.5}),
    "deepseek": ("model.layers.0.self_attn", lambda: module(
        q_a_proj=linear(12), q_a_layernorm=nn.RMSNorm(12), q_b_proj=linear(24, 12),
        kv_a_proj_with_mqa=linear(12), kv_a_layernorm=nn.RMSNorm(10), kv_b_proj=linear(36, 10),
    ), config(num_key_value_heads=4, head_dim=2, qk_head_dim=6, **LATENT),
        {"q_b_proj.weight": 0.25, "kv_b_proj.weight": 0.5}),
    "deepseek lite": ("model.layers.0.self_attn", lambda: module(
        q_proj=linear(24), kv_a_proj_with_mqa=linear(12), kv_b_proj=linear(36, 10),
    ), config(num_key_value_heads=4, head_dim=2, qk_head_dim=6, **LATENT),
        {"q_proj.weight": 0.25, "kv_b_proj.weight": 0.5}),
    "torchtitan latent": ("layers.0.attention", lambda: module(
        wq_a=linear(12), q_norm=nn.RMSNorm(12), wq_b=linear(24, 12), wkv_a=linear(12),
        kv_norm=nn.RMSNorm(10), wkv_b=linear(36, 10), wo=linear(W, 20), n_heads=4, **LATENT,
    ), None, {"wq_b.weight": 0.25, "wkv_b.weight": 0.5}),
    "megatron latent": ("decoder.layers.0.self_attention", lambda: module(
        linear_q_down_proj=linear(12), q_layernorm=nn.RMSNorm(12), linear_q_up_proj=linear(24, 12),
        linear_kv_down_proj=linear(12), kv_layernorm=nn.RMSNorm(10),
        linear_kv_up_proj=linear(36, 10),
        config=config(qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=5),
    ), None, {"linear_q_up_proj.weight": 0.25, "linear_kv_up_proj.weight": 0.5}),
}  # fmt: skip
REFUSED = {
    "qwen3": (lambda: module(
        q_proj=linear(32), k_proj=linear(16), v_proj=linear(16), q_norm=nn.RMSNorm(8),
    ), config(**GQA), "q_norm normalizes queries or keys"),
    "heads of keys": (lambda: module(
        q_proj=linear(48), k_proj=linear(24), v_proj=linear(24), head_dim=8,
    ), SimpleNamespace(hidden_size=W, num_attention_heads=6, num_key_value_heads=3, head_dim=8),
        r"4 values, one per query head, but attn\.q_proj\.weight has 6 heads"),
    "keys and values": (lambda: module(
        to_q=linear(32), to_kv=linear(64), to_out=linear(W), heads=4,
    ), None, "needs one weight of queries and one of keys"),
    "gpt2, cross": (lambda: module(
        c_attn=linear(64), q_attn=linear(32), c_proj=linear(W),
    ), SimpleNamespace(n_embd=W, n_head=H), "which of the 64 rows .* is not known"),
    "latent without sizes": (lambda: module(
        q_b_proj=linear(24, 12), kv_b_proj=linear(36, 10),
    ), config(), "needs qk_nope_head_dim, qk_rope_head_dim and v_head_dim"),
}  # fmt: skip


def model_of(path, attention, counts):
    model = attention
    for name in reversed(path.split(".")):
        model = module(**{name: model})
    if counts is not None:
        model.config = counts
    for p in model.parameters():
        nn.init.ones_(p)
    return model


@pytest.mark.parametrize("name", CASES)
def test_queries_and_keys_are_found_and_nothing_else(name):
    path, make, counts, want = CASES[name]
    model = model_of(path, make(), counts)
    qk_clip_(model, {path: torch.full((H,), 400.0)})
    least = {n.removeprefix(f"{path}."): p.min().item() for n, p in model.named_parameters()}
    assert {n: x for n, x in least.items() if x != 1.0} == want
    rows = next(p for n, p in model.named_parameters() if n.endswith(next(iter(want))))
    assert all(float(row.min()) == float(row.max()) for row in rows.detach().view(len(rows), -1))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name):
    make, counts, text = REFUSED[name]
    model = model_of("attn", make(), counts)
    with pytest.raises(ValueError, match=text):
        qk_clip_(model, {"attn": torch.full((H,), 400.0)})
    assert all(bool((p == 1).all()) for p in model.parameters())
