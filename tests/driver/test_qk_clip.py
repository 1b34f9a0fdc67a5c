"""QK-clip: every layout of queries and keys, recorded weights, shards, refusals; MaxLogits."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers.attentions import KINDS, WIDTH, Apart, Block, ByGroup, Fused, inputs, maxima, model_of
from helpers.paths import FIXTURES
from helpers.ranks import mesh_of, pool
from torch import nn

from stiefel.optimizers import MaxLogits, Muon, Muown, classify, qk_clip_
from stiefel.optimizers._driver import qk_clip as module

SHARED_KEYS = ("gqa", "mqa", "fused gqa", "conv1d gqa", "by group", "megatron", "per head",
               "one key by group")  # fmt: skip


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def float_of(name):
    with open(FIXTURES / f"{name}.json") as file:
        return json.load(file)


# effect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_exceeds_the_threshold_and_values_stay(kind):
    """Heads that share no key end at it exactly; what is no query or key keeps its bits."""
    x, model = inputs(), model_of(kind)
    start, S = copied(model), maxima(model, x)
    tau = sorted(torch.cat(list(S.values())).tolist())[3]  # some heads stay below
    for alpha in (0.5, 0.0, 1.0, 0.3):
        clipped = copy.deepcopy(model)
        gamma = qk_clip_(clipped, S, threshold=tau, alpha=alpha)
        after = maxima(clipped, x)
        for name, largest in after.items():
            assert gamma[name].dtype == torch.float32
            want = (tau / S[name].clamp(min=tau)).float()
            torch.testing.assert_close(gamma[name], want)
            assert float(largest.max()) <= tau * (1 + 1e-5)
            if kind not in SHARED_KEYS:
                torch.testing.assert_close(largest, S[name].clamp(max=tau), rtol=1e-5, atol=1e-6)
        assert set(gamma) == set(S) and any((g < 1).any() for g in gamma.values())
        moved = {n for n, p in clipped.named_parameters() if not torch.equal(p, start[n])}
        assert moved and all("attn" in n for n in moved)
        assert not any(
            w in n for n in moved for w in ("v_proj", "out", "W_V", "W_O", "_a_", "norm")
        )
    everything = maxima(model, x)
    qk_clip_(model, {k: s.clamp(max=tau) for k, s in everything.items()}, threshold=tau)
    assert unchanged(model, start)


def test_rows_of_fused_weights_move_only_where_they_should():
    h, kv, d = 4, 2, 6
    for kind in ("fused gqa", "conv1d gqa", "by group", "megatron"):
        model = model_of(kind)
        attn = model["blocks"][0].attn
        names = {"by group": "query_key_value", "megatron": "linear_qkv"}
        layer = getattr(attn, names.get(kind, "c_attn"))
        W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
        S = torch.tensor([50.0, 50.0, 400.0, 50.0])  # of the second group
        qk_clip_(model, {"blocks.0.attn": S}, alpha=0.25)
        ratio = (layer.weight / W).mT if kind == "conv1d gqa" else layer.weight / W
        assert torch.allclose(ratio[:, :1].expand_as(ratio), ratio)
        torch.testing.assert_close(layer.bias / b, ratio[:, 0])
        q, k = 0.25**0.25, 0.25**0.75
        if kind in names:
            want = torch.tensor([1.0] * (4 * d) + [q] * (2 * d) + [k] * d + [1.0] * d)
        else:
            want = torch.tensor([1.0] * (2 * d) + [q] * (2 * d) + [1.0] * d + [k] * d)
            want = torch.cat([want, torch.ones(kv * d)])
        assert len(want) == (h + 2 * kv) * d
        torch.testing.assert_close(ratio[:, 0].float(), want, rtol=1e-6, atol=0)


def test_recorded_weights_of_megatron():
    data = float_of("qkclip-gqa")
    attn = ByGroup(4, 2, 3, name="linear_qkv")
    attn.linear_qkv = nn.Linear(5, 24, bias=False)
    model = nn.ModuleDict({"self_attention": attn})
    with torch.no_grad():
        attn.linear_qkv.weight.copy_(torch.tensor(data["W0"]))
    qk_clip_(model, {"self_attention": torch.tensor(data["max_logits"])})
    want = torch.tensor(data["W"][0])
    torch.testing.assert_close(attn.linear_qkv.weight.detach(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("names", ["megatron", "hf", "titan"])
def test_recorded_weights_of_latent_attention(names):
    data = float_of("qkclip-mla")
    query, up = {
        "megatron": ("linear_q_up_proj", "linear_kv_up_proj"),
        "hf": ("q_b_proj", "kv_b_proj"),
        "titan": ("wq", "wkv_b"),
    }[names]
    attn = nn.Module()
    setattr(attn, query, nn.Linear(4, 18, bias=False))
    setattr(attn, up, nn.Linear(5, 21, bias=False))
    sizes = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
    if names == "megatron":
        sizes = {"qk_head_dim": 4, "qk_pos_emb_head_dim": 2, "v_head_dim": 3}
    if names == "titan":
        for key, x in sizes.items():
            setattr(attn, key, x)
    else:
        attn.config = SimpleNamespace(**sizes)
    layers = getattr(attn, query), getattr(attn, up)
    with torch.no_grad():
        for layer, W in zip(layers, data["W0"], strict=True):
            layer.weight.copy_(torch.tensor(W))
    qk_clip_(nn.ModuleDict({"attn": attn}), {"attn": torch.tensor(data["max_logits"])})
    for layer, W in zip(layers, data["W"][0], strict=True):
        torch.testing.assert_close(layer.weight.detach(), torch.tensor(W), rtol=0, atol=2e-6)


@pytest.mark.parametrize("S", [[-5.0, -1e30, 0.0, 100.0], [99.9, 1.0, -3.0, 50.0]])
def test_heads_below_the_threshold_keep_their_bits(S):
    for kind in ("gqa", "conv1d", "by group"):
        model = model_of(kind, dtype=torch.bfloat16)
        before = copied(model)
        gamma = qk_clip_(model, {"blocks.1.attn": torch.tensor(S)})
        assert unchanged(model, before) and torch.equal(gamma["blocks.1.attn"], torch.ones(4))


def test_a_negative_maximum_beside_a_head_that_overflows():
    model = model_of("mha")
    before = copied(model)
    gamma = qk_clip_(model, {"blocks.0.attn": torch.tensor([-7.0, 1e4, 0.0, -math.pi])})
    assert gamma["blocks.0.attn"].tolist() == [1.0, pytest.approx(0.01), 1.0, 1.0]
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        if name == "blocks.0.attn.q_proj.weight":
            ratio = p.detach() / before[name]
            assert torch.equal(ratio[:6], torch.ones_like(ratio[:6]))
            torch.testing.assert_close(ratio[6:12].mean(), torch.tensor(0.1, dtype=p.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_rounded_once(dtype):
    model = model_of("mha", dtype=dtype)
    W = model["blocks"][0].attn.q_proj.weight
    by = torch.tensor(100 / 173.0, dtype=torch.float32).sqrt()
    want = (W.detach().float() * by).to(dtype)
    qk_clip_(model, {"blocks.0.attn": torch.full((4,), 173.0, dtype=dtype)})
    assert torch.equal(W, want)


# names --------------------------------------------------------------------------------------------


def test_wrapped_models_and_names_in_them():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    S = {"blocks.0.attn": torch.full((4,), 400.0)}
    plain, wrapped = model_of("gqa"), Wrapper(model_of("gqa"))
    inner, compiled = wrapped.module["blocks"][1], nn.Module()
    compiled._orig_mod = inner.attn  # as torch.compile names it
    inner._modules["attn"] = compiled
    qk_clip_(plain, {**S, "blocks.1.attn": S["blocks.0.attn"]})
    qk_clip_(wrapped, {"module.blocks.0.attn": S["blocks.0.attn"]})
    qk_clip_(wrapped, {"blocks.1.attn": S["blocks.0.attn"]})
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p, q)
    single = copy.deepcopy(Apart())  # the model is the attention itself
    gamma = qk_clip_(single, {"": torch.full((4,), 200.0)})
    assert gamma[""].tolist() == [0.5] * 4
    assert qk_clip_(plain, {}) == {}
    assert qk_clip_(single, {"": torch.tensor([400] * 4)})[""].tolist() == [0.25] * 4


def unknown_name(model):
    return {"blocks.0.atn": torch.ones(4)}


def two_attentions(model):
    return {"blocks": torch.ones(4)}


def both_names(model):
    return {"blocks.0": torch.full((4,), 300.0), "blocks.0.attn": torch.full((4,), 300.0)}


def wrong_heads(model):
    return {"blocks.0.attn": torch.full((2,), 300.0)}


def no_vector(model):
    return {"blocks.0.attn": torch.full((1, 4), 300.0)}


def no_numbers(model):
    return {"blocks.0.attn": torch.ones(4, dtype=torch.bool)}


def query_norm(model):
    model["blocks"][0].attn.q_norm = nn.LayerNorm(6)
    return LARGE


def key_layernorm(model):
    model["blocks"][1].attn.k_layernorm = nn.RMSNorm(6)
    return LARGE


def adapter(model):
    model["blocks"][1].attn.q_proj.lora_A = nn.Linear(WIDTH, 2, bias=False)
    return LARGE


def peft_layer(model):
    attn = model["blocks"][0].attn
    inner = nn.Module()
    inner.base_layer = attn.k_proj
    inner.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)})
    attn.k_proj = inner
    return LARGE


def tied(model):
    attn = model["blocks"][0].attn
    attn.k_proj.weight = attn.q_proj.weight
    return LARGE


def shared_over_blocks(model):
    model["blocks"][1].attn.q_proj = model["blocks"][0].attn.q_proj
    return LARGE


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model["blocks"][0].attn.q_proj)
    return LARGE


def no_keys(model):
    del model["blocks"][0].attn.k_proj
    return LARGE


def not_a_number(model):
    return {**LARGE, "blocks.1.attn": torch.tensor([1.0, math.nan, 2.0, 3.0])}


def infinite(model):
    return {**LARGE, "blocks.1.attn": torch.tensor([1.0, 2.0, 3.0, math.inf])}


LARGE = {f"blocks.{i}.attn": torch.full((4,), 300.0) for i in range(2)}
REFUSALS = [
    (unknown_name, r"'blocks\.0\.atn'.*its attention modules are blocks\.0\.attn, blocks\.1"),
    (two_attentions, "several weights for query: blocks.0.attn.q_proj.weight, blocks.1"),
    (both_names, "belongs to two of the modules"),
    (wrong_heads, r"2 values, one per query head, but blocks\.0\.attn\.q_proj\.weight has 4 heads"),
    (no_vector, r"must be a tensor of real numbers \(heads,\), got \(1, 4\)"),
    (no_numbers, "must be a tensor of real numbers"),
    (query_norm, r"blocks\.0\.attn\.q_norm normalizes queries or keys"),
    (key_layernorm, r"blocks\.1\.attn\.k_layernorm normalizes"),
    (adapter, r"q_proj\.weight has an adapter \(blocks\.1\.attn\.q_proj\.lora_A\.weight\)"),
    (peft_layer, "has an adapter"),
    (tied, r"is also blocks\.0\.attn\.k_proj\.weight"),
    (shared_over_blocks, "weights that are shared cannot be clipped"),
    (parametrized, "is parametrized"),
    (no_keys, "needs one weight of queries and one of keys"),
    (not_a_number, r"max_logits\['blocks\.1\.attn'\] is not finite for the heads \[1\]"),
    (infinite, r"not finite for the heads \[3\]"),
]


@pytest.mark.parametrize("change, text", REFUSALS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_scaled_is_refused_with_nothing_changed(change, text):
    model = model_of("mha")
    S = change(model)
    before = copied(model)
    with pytest.raises(ValueError, match=text) as caught:
        qk_clip_(model, S)
    assert "\n" not in str(caught.value) and unchanged(model, before)


def test_a_fused_weight_of_unknown_order_is_refused():
    model = model_of("fused gqa")
    for block in model["blocks"]:
        del block.attn.num_key_value_heads
    with pytest.raises(ValueError, match="is not known; give the module num_heads"):
        qk_clip_(model, LARGE)
    latent = model_of("latent")
    del latent["blocks"][0].attn.v_head_dim
    with pytest.raises(ValueError, match="needs qk_nope_head_dim, qk_rope_head_dim and v_head_dim"):
        qk_clip_(latent, {"blocks.0.attn": torch.full((3,), 300.0)})
    normed = model_of("latent")
    normed["blocks"][0].attn.k_norm = nn.LayerNorm(6)
    with pytest.raises(ValueError, match="k_norm normalizes"):
        qk_clip_(normed, {"blocks.0.attn": torch.full((3,), 300.0)})
    identity = model_of("mha")
    identity["blocks"][0].attn.q_norm = nn.Identity()
    qk_clip_(identity, LARGE)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"threshold": math.nan}, "threshold must be"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"alpha": None}, "alpha must be"),
        ({"optimizer": 3}, "optimizer must be that of the model"),
        ({"group": "data"}, "group must be a ProcessGroup of this process or a 1-D DeviceMesh"),
        ({"max_logits": {2: torch.ones(4)}}, "max_logits must map names of modules, got 2"),
    ],
)
def test_numbers_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        qk_clip_(model_of("mha"), **{"max_logits": LARGE, **options})


def test_where_the_host_does_not_wait_a_bad_value_leaves_its_head_alone(monkeypatch):
    monkeypatch.setattr(module, "waits_for", lambda device: False)
    model = model_of("mha", dtype=torch.float32)
    before = copied(model)
    S = {"blocks.0.attn": torch.tensor([math.nan, 400.0, math.inf, -math.inf])}
    gamma = qk_clip_(model, S)["blocks.0.attn"]
    assert gamma.tolist() == [1.0, 0.25, 1.0, 1.0]
    W, old = model["blocks"][0].attn.q_proj.weight, before["blocks.0.attn.q_proj.weight"]
    assert torch.equal(W[6:12], 0.5 * old[6:12])
    assert torch.equal(W[:6], old[:6]) and torch.equal(W[12:], old[12:])
    before = copied(model)
    qk_clip_(model, {name: S / 3 for name, S in LARGE.items()})
    assert unchanged(model, before)


# optimizers ---------------------------------------------------------------------------------------


def test_a_stored_norm_of_a_scaled_weight_is_measured_anew():
    model = model_of("mha", dtype=torch.float32)
    optimizer = Muon(model, lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    qk_clip_(model, LARGE, optimizer=optimizer)  # keeps no norm: nothing to do
    for p in model.parameters():
        optimizer.state[p]["weight_radius"] = torch.full((1, 1), 3.0)
        optimizer.state[p]["weight_radius.1"] = torch.full((2, 1, 1), 3.0)
    calm = {name: S / 3 for name, S in LARGE.items()}
    qk_clip_(model, calm, optimizer=optimizer)
    assert all(float(s["weight_radius"]) == 3.0 for s in optimizer.state.values())
    qk_clip_(model, {"blocks.0.attn": LARGE["blocks.0.attn"]}, optimizer=optimizer)
    for name, p in model.named_parameters():
        is_scaled = name.startswith(("blocks.0.attn.q_proj", "blocks.0.attn.k_proj"))
        for key in ("weight_radius", "weight_radius.1"):
            assert (optimizer.state[p][key] == (-2.0 if is_scaled else 3.0)).all(), name


@pytest.mark.parametrize("words", ["hyperball", "sphere:rows"])
@pytest.mark.parametrize("kind", ["mha", "fused gqa", "torch"])
def test_a_sphere_takes_the_norm_of_the_scaled_weight(words, kind):
    """Informed, the next step keeps the clipped norm; uninformed, it undoes the clipping."""
    sizes = {}
    for informed in (True, False):
        model = model_of(kind, dtype=torch.float32)
        optimizer = Muon(model, lr=1e-4, weight_norm=words)
        for t in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            optimizer.step()
            if t == 0:
                before = copied(model)
                S = {"blocks.0.attn": torch.full((4,), 400.0)}
                qk_clip_(model, S, optimizer=optimizer if informed else None)
        sizes[informed] = {
            n: float(p.detach().norm() / before[n].norm()) for n, p in model.named_parameters()
        }
    name = {"mha": "q_proj.weight", "fused gqa": "c_attn.weight", "torch": "in_proj_weight"}[kind]
    informed, uninformed = (sizes[x][f"blocks.0.attn.{name}"] for x in (True, False))
    assert informed < 0.9 and uninformed == pytest.approx(1.0, abs=1e-3)
    for n, ratio in sizes[True].items():
        if "blocks.1" in n and n.endswith("weight"):
            assert ratio == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_clipping_stays_where_a_rule_keeps_norms_itself(dtype):
    """By less than the drift that rounding may cause, which Muown overlooks otherwise."""
    model = model_of("mha", dtype=torch.float32).to(dtype)
    optimizer = Muown(model, lr=1e-5)
    params = [p for p in model.parameters() if p.ndim == 2]
    sizes = []
    for _ in range(8):
        step_along_noise(optimizer, params)
        sizes.append(rms(model["blocks"][0].attn.q_proj.weight.float()))
        qk_clip_(model, {"blocks.0.attn": torch.full((4,), 101.0)}, optimizer=optimizer)
    rel = 2e-3 if dtype == torch.float32 else 1e-2  # of the rounding to nearest
    assert sizes[-1] / sizes[0] == pytest.approx(1.01**-3.5, rel=rel)


def test_what_kahan_has_cut_off_is_scaled_with_the_weight():
    model = model_of("mha", dtype=torch.bfloat16)
    optimizer = Muon(model, lr=1e-3, write="kahan")
    step_along_noise(optimizer, [p for p in model.parameters() if p.ndim == 2])
    name = "blocks.0.attn.q_proj.weight"
    p = dict(model.named_parameters())[name]
    state = optimizer.state[p]
    before, old = p.detach().float() + state["residual"].float(), p.detach().clone()
    S = {"blocks.0.attn": torch.tensor([50.0, 400.0, 50.0, 300.0])}
    qk_clip_(model, S, optimizer=optimizer)
    by = torch.tensor([1.0, 0.5, 1.0, 3**-0.5]).repeat_interleave(6).view(-1, 1)
    after = p.detach().float() + state["residual"].float()
    assert float((after - by * before).abs().max()) < 2.0**-16
    assert torch.equal(p.detach()[:6], old[:6]) and not torch.equal(p.detach()[6:12], old[6:12])


REOPENED = {
    "itself": lambda optimizer: optimizer,
    "copy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("words", ["hyperball", "sphere:rows", "sphere:whole"])
@pytest.mark.parametrize("reopen", REOPENED.values(), ids=REOPENED)
def test_a_given_norm_yields_to_the_clipping_and_comes_back_when_it_changes(words, reopen):
    model = model_of("mha", dtype=torch.float32)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    optimizer = Muon(matrices.items(), lr=1e-4, weight_norm=words, weight_radius=0.1)
    step_along_noise(optimizer)
    assert all(rms(p) == pytest.approx(0.1, rel=1e-5) for p in matrices.values())
    qk_clip_(model, {"blocks.0.attn": torch.full((4,), 400.0)}, optimizer=optimizer)
    clipped = {n for n in matrices if n.startswith(("blocks.0.attn.q_", "blocks.0.attn.k_"))}
    optimizer = reopen(optimizer)
    matrices = dict(zip(matrices, optimizer.param_groups[0]["params"], strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        step_along_noise(optimizer)
        for n, p in matrices.items():
            assert rms(p) == pytest.approx(0.05 if n in clipped else 0.1, rel=1e-3), n
    optimizer.param_groups[0]["weight_radius"] = 0.2  # to all, with a gradient or without
    optimizer = reopen(optimizer)
    left, *others = optimizer.param_groups[0]["params"]
    step_along_noise(optimizer, others)
    assert all(rms(p) == pytest.approx(0.2, rel=1e-5) for p in others)
    step_along_noise(optimizer, [left])
    assert rms(left) == pytest.approx(0.2, rel=1e-5)


def step_along_noise(optimizer, params=None):
    """A step along gradients of all parameters, or of some."""
    optimizer.zero_grad()
    for p in optimizer.param_groups[0]["params"] if params is None else params:
        draw = torch.Generator().manual_seed(p.numel())
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
    optimizer.step()


def rms(p):
    return float(p.detach().square().mean().sqrt())


# ranks --------------------------------------------------------------------------------------------


def sharded_clip(rank, world, kind, dim):
    """The difference to one process where shards cut heads in the middle."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, model = mesh_of(world), model_of(kind, dtype=torch.float32)
    whole = model_of(kind, dtype=torch.float32)
    for layer in model.modules():
        for name, p in list(layer._parameters.items()):
            if p is not None:
                cut = min(dim, p.ndim - 1)
                placed = distribute_tensor(p.detach(), mesh, [Shard(cut)])
                layer._parameters[name] = nn.Parameter(placed)
    S = {name: s.float() for name, s in maxima(whole, inputs(dtype=torch.float32)).items()}
    own = {name: s.clone() for name, s in S.items()}
    for i, s in enumerate(own.values()):  # each rank has seen one head's largest logit
        s[torch.arange(len(s)) % world != (rank + i) % world] = -1.0
    tau = float(torch.cat(list(S.values())).median())
    ours = qk_clip_(model, own, threshold=tau, group=mesh.get_group())
    theirs = qk_clip_(whole, S, threshold=tau)
    bits = all(
        torch.equal(p.full_tensor(), q)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True)
    )
    return bits and all(torch.equal(ours[name], theirs[name]) for name in S)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_that_cut_heads_have_the_bits_of_one_process(world):
    for kind in ("gqa", "conv1d gqa", "by group", "torch", "latent", "per head"):
        for dim in (0, 1):
            assert all(pool(world).run(sharded_clip, kind, dim)), (kind, dim)


def bad_on_one_rank(rank, world):
    import torch.distributed as dist

    model = model_of("mha")
    before = copied(model)
    S = {name: s.clone() for name, s in LARGE.items()}
    if rank == 1:
        S["blocks.1.attn"][2] = math.nan
    try:
        qk_clip_(model, S, group=dist.group.WORLD)
    except ValueError as error:
        return str(error), unchanged(model, before)
    return "", False


def test_a_bad_value_on_one_rank_is_refused_by_all():
    for text, is_unchanged in pool(2).run(bad_on_one_rank):
        assert "max_logits['blocks.1.attn'] is not finite for the heads [2]" in text
        assert is_unchanged


# what is recorded ---------------------------------------------------------------------------------


def test_maxima_over_micro_batches_are_those_of_one_batch():
    model = model_of("gqa")
    record, x = MaxLogits(model), inputs()
    for part in (x[:1], x[1:]):
        for block in model["blocks"]:
            scores = block.attn(part)
            mask = torch.full(scores.shape[-2:], -math.inf).triu(1)
            assert record(block.attn, scores + mask) is not None
    found = record.take()
    assert record.take() == {}
    for name, S in found.items():
        block = model["blocks"][int(name.split(".")[1])]
        causal = block.attn(x).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
        torch.testing.assert_close(S, causal.amax((0, 2, 3)).detach())
        assert not S.requires_grad
    low = record("a", torch.ones(1, 2, 3, 3, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16 and record.take()["a"].dtype == torch.float32


def test_max_scores_of_flex_attention_are_asked_for(monkeypatch):
    """By a stub: torch has none on a CPU."""
    from torch.nn.attention import flex_attention as module

    if not hasattr(module, "AuxRequest"):
        pytest.skip("this torch has no AuxRequest")
    asked = []

    def flex(q, k, v, *, return_aux, scale):
        asked.append((return_aux.max_scores, scale))
        scores = q @ k.mT * scale
        return scores.softmax(-1) @ v, module.AuxOutput(max_scores=scores.amax(-1))

    record = MaxLogits()
    q, k, v = torch.randn(3, 2, 4, 5, 6).unbind(0)
    out = record.flex_attention("attn", q, k, v, scale=0.5, function=flex)
    torch.testing.assert_close(out, (q @ k.mT * 0.5).softmax(-1) @ v)
    assert asked == [(True, 0.5)]
    assert torch.equal(record.take()["attn"], (q @ k.mT * 0.5).amax((0, 2, 3)))
    monkeypatch.delattr(module, "AuxRequest")
    with pytest.raises(ValueError, match="returns no max_scores"):
        record.flex_attention("attn", q, k, v, function=flex)


def test_what_cannot_be_recorded_is_refused():
    record = MaxLogits()
    with pytest.raises(ValueError, match="scores must be"):
        record("attn", torch.ones(4, 4))
    with pytest.raises(ValueError, match="pass its name, or MaxLogits"):
        record(nn.Linear(2, 2), torch.ones(1, 2, 3, 3))
    record("attn", torch.ones(1, 2, 3, 3))
    with pytest.raises(ValueError, match="'attn' had 2 heads before and has 3 now"):
        record("attn", torch.ones(1, 3, 3, 3))


def test_megatrons_fused_weight_is_classified():
    row = classify(nn.ModuleDict({"self_attention": ByGroup(name="linear_qkv")})).rows[0]
    assert (row.role, row.part, row.view) == ("hidden", "qkv", "auto")
    block = Block(Fused())
    assert classify(block).rows[0].part == "qkv"
