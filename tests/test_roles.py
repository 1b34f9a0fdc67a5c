"""Roles of parameters: golden tables, and the cases a table does not show.

`STIEFEL_WRITE_GOLDEN=1` writes the golden tables anew; without it a difference is a failure.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from stiefel.optimizers.roles import Assignment, Row, classify, route

HERE = Path(__file__).parent
GOLDEN = HERE / "fixtures" / "roles"


def byte_model(d=96):
    """The model of the examples, loaded from its file: the examples are no package."""
    folder = str(HERE.parent / "examples")
    spec = importlib.util.spec_from_file_location(
        "stiefel_example_common", Path(folder) / "common.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
        del sys.modules[spec.name]
    return module.ByteLM(d=d, layers=2, heads=4, seq=64)


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out)."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))


def parts(**modules):
    return nn.ModuleDict(modules)


def gpt2(d=24, vocabulary=50, context=16, layers=2):
    def block():
        return parts(
            ln_1=nn.LayerNorm(d),
            attn=parts(c_attn=Conv1D(3 * d, d), c_proj=Conv1D(d, d)),
            ln_2=nn.LayerNorm(d),
            mlp=parts(c_fc=Conv1D(4 * d, d), c_proj=Conv1D(d, 4 * d)),
        )

    model = parts(
        transformer=parts(
            wte=nn.Embedding(vocabulary, d),
            wpe=nn.Embedding(context, d),
            h=nn.ModuleList(block() for _ in range(layers)),
            ln_f=nn.LayerNorm(d),
        ),
        lm_head=nn.Linear(d, vocabulary, bias=False),
    )
    model["lm_head"].weight = model["transformer"]["wte"].weight
    return model


def torch_transformer():
    return nn.Transformer(32, 4, 2, 2, dim_feedforward=48)


GOLDEN_MODELS = {"byte-model": byte_model, "gpt2": gpt2, "torch-transformer": torch_transformer}


def by_name(model, **options):
    return {row.name: row for row in classify(model, **options)}


def brief(row):
    return row.role, row.rule, row.view


# ------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_table(name):
    path = GOLDEN / f"{name}.md"
    table = classify(GOLDEN_MODELS[name]()).to_markdown()
    if os.environ.get("STIEFEL_WRITE_GOLDEN") == "1":
        path.write_text(table)
    assert table == path.read_text()


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_every_parameter_once_and_in_order(name):
    model = GOLDEN_MODELS[name]()
    table = classify(model, strict=True)
    expected = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert [(row.name, row.shape) for row in table] == expected
    assert len(table) == len(expected) == len(table.rows)
    assert all(row.why and row.rule in ("matrix", "adamw") for row in table)


def test_meta_device():
    with torch.device("meta"):
        model = gpt2()
    assert classify(model) == classify(gpt2())


def test_frozen_parameters_have_rows():
    model = gpt2()
    expected = classify(model)
    model.requires_grad_(False)
    assert classify(model) == expected


# --------------------------------------------------------------------------------------- ties


def test_tie_registered_by_the_head_first():
    model = parts(out=nn.Linear(4, 9, bias=False), tok=nn.Embedding(9, 4))
    model["out"].weight = model["tok"].weight
    (row,) = classify(model)
    assert row == Row(
        "out.weight", (9, 4), "embedding", "adamw", "tied to tok.weight (nn.Embedding)"
    )


def test_tie_registered_by_the_embedding_first():
    assert by_name(gpt2())["transformer.wte.weight"].why == "nn.Embedding; tied to lm_head.weight"


def test_shared_module():
    layer = nn.Linear(4, 4, bias=False)
    (row,) = classify(nn.Sequential(layer, nn.ReLU(), layer, layer))
    assert (row.name, *brief(row)) == ("0.weight", "hidden", "matrix", "auto")
    assert row.why == "nn.Linear; tied to 2.weight and 1 more"


def test_no_second_head_beside_a_tied_one():
    model = parts(
        tok=nn.Embedding(8, 8), head_a=nn.Linear(8, 8, bias=False), mix=nn.Linear(8, 8, bias=False)
    )
    model["head_a"].weight = model["tok"].weight
    assert by_name(model)["mix.weight"].role == "hidden"


# --------------------------------------------------------------------------------------- heads


def test_head_without_a_telling_name():
    model = parts(
        tok=nn.Embedding(20, 8),
        blocks=nn.ModuleList(parts(fc=nn.Linear(8, 20), back=nn.Linear(20, 8)) for _ in range(2)),
        final=nn.Linear(8, 20, bias=False),
    )
    table = by_name(model)
    assert brief(table["final.weight"]) == ("head", "adamw", "auto")
    assert "20 outputs of a vocabulary" in table["final.weight"].why
    assert table["blocks.1.fc.weight"].role == "hidden"


def test_width_equal_to_the_vocabulary_makes_no_head_of_a_block():
    # The head is functional here: x @ tok.weight.T.
    model = parts(
        tok=nn.Embedding(16, 16), h=nn.ModuleList(parts(o=nn.Linear(16, 16)) for _ in range(2))
    )
    assert by_name(model)["h.1.o.weight"].role == "hidden"


def test_positions_are_no_vocabulary():
    model = parts(wpe=nn.Embedding(8, 4), last=nn.Linear(4, 8))
    assert by_name(model)["last.weight"].role == "hidden"


def test_embedding_named_as_a_bias():
    table = by_name(parts(relative_attention_bias=nn.Embedding(8, 4)))
    assert table["relative_attention_bias.weight"].role == "embedding"


def test_lora_factors_of_a_head_are_no_head():
    adapted = parts(
        base_layer=nn.Linear(8, 20, bias=False),
        lora_A=parts(default=nn.Linear(8, 2, bias=False)),
        lora_B=parts(default=nn.Linear(2, 20, bias=False)),
    )
    table = by_name(parts(tok=nn.Embedding(20, 8), final=adapted))
    assert [row.role for row in table.values()] == ["embedding", "head", "hidden", "hidden"]


@pytest.mark.parametrize("name", ["lm_head", "head", "output", "classifier", "unembed", "score"])
def test_head_by_name(name):
    row = by_name(parts(**{name: nn.Linear(4, 3)}))[f"{name}.weight"]
    assert brief(row) == ("head", "adamw", "auto")
    assert row.why == f"name component '{name}'"


@pytest.mark.parametrize("name", ["head", "output", "classifier", "score"])
def test_top_names_mean_nothing_inside_a_block(name):
    model = parts(layers=nn.ModuleList([parts(attn=parts(**{name: nn.Linear(4, 4)}))]))
    assert by_name(model)[f"layers.0.attn.{name}.weight"].role == "hidden"


def test_head_that_the_model_tells():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

        def get_output_embeddings(self):
            return self.a

    table = by_name(Model())
    assert table["a.weight"].role == "head" and table["b.weight"].role == "hidden"


# ----------------------------------------------------------------------------- kinds of modules


@pytest.mark.parametrize(
    ("layer", "role", "view"),
    [
        (nn.Conv1d(4, 6, 3), "conv", "flatten"),
        (nn.Conv2d(4, 6, 3), "conv", "flatten"),
        (nn.Conv3d(4, 6, 3), "conv", "flatten"),
        (nn.ConvTranspose2d(4, 6, 3), "conv", "flatten"),
        (nn.Conv2d(1, 6, 3), "conv", "flatten"),
        (nn.Conv1d(6, 1, 3), "conv", "flatten"),
        (Conv1D(6, 4), "hidden", "transposed"),
        (nn.Linear(4, 1), "hidden", "auto"),
        (nn.Bilinear(3, 4, 5), "hidden", "auto"),
        (nn.Embedding(4, 6), "embedding", "auto"),
        (nn.EmbeddingBag(4, 6), "embedding", "auto"),
        (nn.LayerNorm((3, 4)), "norm", "auto"),
        (nn.RMSNorm(4), "norm", "auto"),
        (nn.BatchNorm2d(4), "norm", "auto"),
        (nn.GroupNorm(2, 4), "norm", "auto"),
        (nn.PReLU(4), "vector", "auto"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_module_types(layer, role, view):
    row = by_name(parts(layer=layer))["layer.weight"]
    rule = "matrix" if role in ("hidden", "conv") else "adamw"
    assert brief(row) == (role, rule, view)
    assert type(layer).__name__ in row.why or row.why == "1-D"


def test_classes_outside_torch():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 3))

    class ScaledWordEmbedding(nn.Embedding):
        pass

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(5, 3))

    table = by_name(parts(a=RMSNorm(), b=ScaledWordEmbedding(4, 2), c=Embedding()))
    assert [(row.role, row.rule, row.why) for row in table.values()] == [
        ("norm", "adamw", "RMSNorm"),
        ("embedding", "adamw", "ScaledWordEmbedding"),
        ("embedding", "adamw", "Embedding"),
    ]


def test_conv_net():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
    )
    assert [brief(row) for row in classify(model, strict=True)] == [
        ("conv", "matrix", "flatten"),
        ("bias", "adamw", "auto"),
        ("norm", "adamw", "auto"),
        ("norm", "adamw", "auto"),
        ("hidden", "matrix", "auto"),
        ("bias", "adamw", "auto"),
    ]


def test_attention_with_its_own_key_size():
    table = by_name(nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True))
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"):
        assert brief(table[name]) == ("hidden", "matrix", "auto")
    assert table["bias_k"].shape == (1, 1, 8)
    assert brief(table["bias_k"]) == ("bias", "adamw", "auto")


def test_recurrent():
    table = by_name(parts(tok=nn.Embedding(12, 5), rnn=nn.LSTM(5, 3)))
    assert brief(table["rnn.weight_hh_l0"]) == ("hidden", "matrix", "auto")
    assert brief(table["rnn.bias_hh_l0"]) == ("bias", "adamw", "auto")


def test_experts_and_router():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 12, 8))
            self.down_proj = nn.Parameter(torch.zeros(4, 8, 6))
            self.down_proj_bias = nn.Parameter(torch.zeros(4, 8))

    model = parts(
        mlp=parts(gate=nn.Linear(8, 4, bias=False), experts=Experts()),
        dense=parts(gate=nn.Linear(8, 6, bias=False)),
    )
    assert {name: brief(row) for name, row in by_name(model, strict=True).items()} == {
        "mlp.gate.weight": ("router", "matrix", "auto"),
        "mlp.experts.gate_up_proj": ("expert", "matrix", "batch"),
        "mlp.experts.down_proj": ("expert", "matrix", "batch"),
        "mlp.experts.down_proj_bias": ("bias", "adamw", "auto"),
        "dense.gate.weight": ("hidden", "matrix", "auto"),
    }


def test_bare_parameters():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.zeros(3, 4, 5))
            self.latents = nn.Parameter(torch.zeros(1, 4, 5))
            self.layer_scale = nn.Parameter(torch.zeros(4, 1, 1))
            self.pos_embed = nn.Parameter(torch.zeros(7, 5))
            self.empty = nn.Parameter(torch.zeros(0, 5))
            self.temperature = nn.Parameter(torch.zeros(()))

    assert {name: brief(row) for name, row in by_name(Bare(), strict=True).items()} == {
        "stack": ("expert", "matrix", "batch"),
        "latents": ("embedding", "adamw", "auto"),
        "layer_scale": ("vector", "adamw", "auto"),
        "pos_embed": ("embedding", "adamw", "auto"),
        "empty": ("vector", "adamw", "auto"),
        "temperature": ("vector", "adamw", "auto"),
    }


def test_parametrized_weights_keep_their_module():
    model = parts(
        tok=parametrizations.spectral_norm(nn.Embedding(9, 4)),
        fc=parametrizations.weight_norm(nn.Linear(4, 6)),
    )
    table = by_name(model)
    assert table["tok.parametrizations.weight.original"].role == "embedding"
    assert brief(table["fc.parametrizations.weight.original0"]) == ("vector", "adamw", "auto")
    assert brief(table["fc.parametrizations.weight.original1"]) == ("hidden", "matrix", "auto")


def test_wrapped_names():
    model = parts(module=parts(lm_head=nn.Linear(4, 3, bias=False), fc=nn.Linear(4, 3, bias=False)))
    assert [row.role for row in classify(model)] == ["head", "hidden"]


# ------------------------------------------------------------------------- overrides and strict


def test_overrides():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4))
    table = by_name(model, overrides={"0.weight": "adamw", "2.*": "hidden", "*.weight": "head"})
    assert brief(table["0.weight"]) == ("hidden", "adamw", "auto")
    assert brief(table["1.weight"]) == ("head", "adamw", "auto")
    assert brief(table["2.weight"]) == ("hidden", "matrix", "auto")
    assert table["2.weight"].why == "override '2.*'"
    assert table["0.bias"].why == "1-D, bias by name"


def test_override_keeps_the_view_or_brings_its_own():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 3, 2))

    table = by_name(
        parts(a=Conv1D(6, 4), b=Kernel()), overrides={"a.weight": "head", "b.w": "conv"}
    )
    assert brief(table["a.weight"]) == ("head", "adamw", "transposed")
    assert brief(table["b.w"]) == ("conv", "matrix", "flatten")


def test_override_by_a_tied_name():
    table = by_name(gpt2(), overrides={"lm_head.weight": "matrix"})
    assert table["transformer.wte.weight"].rule == "matrix"


def test_override_with_a_name_that_reads_as_a_glob():
    model = nn.ParameterDict({"a[0]": nn.Parameter(torch.zeros(2, 2))})
    assert by_name(model, overrides={"a[0]": "adamw"})["a[0]"].rule == "adamw"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nothing.*": "adamw"}, r"match no parameter: 'nothing\.\*'"),
        ({"0.weight": "muon"}, "'muon' is none of matrix, adamw, hidden"),
        ({"0.*": "matrix"}, r"0\.bias of shape \(4,\) is no matrix"),
    ],
)
def test_override_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        classify(nn.Sequential(nn.Linear(4, 4)), overrides=overrides)


def test_strict():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(4, 3))
            self.cube = nn.Parameter(torch.zeros(2, 2, 2, 2))

    model = parts(odd=Odd(), fc=nn.Linear(4, 4))
    table = by_name(model)
    assert brief(table["odd.A_log"]) == ("hidden", "matrix", "auto")
    assert brief(table["odd.cube"]) == ("conv", "matrix", "flatten")
    with pytest.raises(ValueError, match=r"odd\.A_log \(4, 3\), odd\.cube \(2, 2, 2, 2\)$"):
        classify(model, strict=True)
    overrides = {"odd.A_log": "adamw", "odd.cube": "conv"}
    assert len(classify(model, overrides=overrides, strict=True)) == 4


# --------------------------------------------------------------------------------------- route


@pytest.mark.parametrize(
    ("name", "shape", "role", "rule"),
    [
        (None, (), "vector", "adamw"),
        (None, (7,), "vector", "adamw"),
        (None, (0, 5), "vector", "adamw"),
        (None, (1, 5), "hidden", "matrix"),
        (None, (5, 1), "hidden", "matrix"),
        (None, (4, 5), "hidden", "matrix"),
        (None, (3, 4, 5), "hidden", "matrix"),
        (None, (1, 4, 5), "hidden", "matrix"),
        (None, (6, 4, 3, 3), "hidden", "matrix"),
        ("fc.weight", (4, 5), "hidden", "matrix"),
        ("fc.bias", (4,), "bias", "adamw"),
        ("experts.down_proj_bias", (4, 8), "bias", "adamw"),
        ("model.norm.weight", (4,), "norm", "adamw"),
        ("h.0.ln_1.bias", (4,), "norm", "adamw"),
        ("layers.3.input_layernorm.weight", (4,), "norm", "adamw"),
        ("tok.weight", (9, 4), "embedding", "adamw"),
        ("embed.weight", (9, 4), "embedding", "adamw"),
        ("model.embed_tokens.weight", (9, 4), "embedding", "adamw"),
        ("tok_embeddings.weight", (9, 4), "embedding", "adamw"),
        ("transformer.wte.weight", (9, 4), "embedding", "adamw"),
        ("transformer.wpe.weight", (9, 4), "embedding", "adamw"),
        ("bert.embeddings.word_embeddings.weight", (9, 4), "embedding", "adamw"),
        ("bert.embeddings.position_embeddings.weight", (9, 4), "embedding", "adamw"),
        ("bert.embeddings.token_type_embeddings.weight", (2, 4), "embedding", "adamw"),
        ("block.0.SelfAttention.relative_attention_bias.weight", (9, 4), "embedding", "adamw"),
        ("shared.weight", (9, 4), "embedding", "adamw"),
        ("mlp.shared.weight", (9, 4), "hidden", "matrix"),
        ("embed.weight", (9, 3, 4, 4), "hidden", "matrix"),
        ("bias_net.weight", (9, 4), "hidden", "matrix"),
        ("pos_embed", (9, 4), "embedding", "adamw"),
        ("vit.cls_token", (1, 1, 4), "embedding", "adamw"),
        ("_orig_mod.module.embed.weight", (9, 4), "embedding", "adamw"),
        ("embed_proj.weight", (9, 4), "hidden", "matrix"),
        ("embed.proj.weight", (9, 4), "hidden", "matrix"),
        ("patch_embed.weight", (9, 4), "hidden", "matrix"),
        ("token_mixer.weight", (9, 4), "hidden", "matrix"),
        ("lm_head.weight", (9, 4), "head", "adamw"),
        ("base_model.model.lm_head.base_layer.weight", (9, 4), "head", "adamw"),
        ("base_model.model.lm_head.modules_to_save.default.weight", (9, 4), "head", "adamw"),
        ("output.weight", (9, 4), "head", "adamw"),
        ("model.output.weight", (9, 4), "head", "adamw"),
        ("head.weight", (9, 4), "head", "adamw"),
        ("heads.head.weight", (9, 4), "head", "adamw"),
        ("classifier.weight", (9, 4), "head", "adamw"),
        ("unembed.W_U", (4, 9), "head", "adamw"),
        ("layers.0.attention.output.weight", (4, 4), "hidden", "matrix"),
        ("layers.0.attn.head.weight", (4, 4), "hidden", "matrix"),
        ("heads.0.key.weight", (4, 4), "hidden", "matrix"),
        ("lm_head_norm.weight", (4,), "norm", "adamw"),
        ("mlp.router.weight", (3, 4), "router", "matrix"),
        ("mlp.gate.weight", (3, 4), "hidden", "matrix"),
        ("mlp.gate_proj.weight", (3, 4), "hidden", "matrix"),
        ("m.q_proj.lora_A.default.weight", (2, 4), "hidden", "matrix"),
        ("m.q_proj.lora_B.default.weight", (4, 2), "hidden", "matrix"),
        ("m.lm_head.lora_B.default.weight", (9, 2), "hidden", "matrix"),
        ("m.embed_tokens.lora_embedding_A.default", (2, 9), "hidden", "matrix"),
        ("m.q_proj.lora_A.embed.weight", (2, 4), "hidden", "matrix"),
        ("m.q_proj.lora_magnitude_vector.default.weight", (4,), "vector", "adamw"),
        ("mlp.experts.gate_up_proj", (3, 4, 5), "expert", "matrix"),
    ],
)
def test_route(name, shape, role, rule):
    row = route(name, shape)
    assert (row.name, row.shape, row.role, row.rule) == (name, shape, role, rule)
    assert row.view == ("batch" if role == "expert" else "auto")
    assert row.why and "known" not in row.why


def test_route_accepts_torch_size():
    row = route("w", torch.zeros(2, 3).shape)
    assert type(row.shape) is tuple and row.why == "2-D"


@pytest.mark.parametrize("model", [byte_model, gpt2], ids=["byte-model", "gpt2"])
def test_names_alone_agree_with_modules(model):
    for row in classify(model()):
        alone = route(row.name, row.shape)
        assert (alone.role, alone.rule) == (row.role, row.rule)


# ---------------------------------------------------------------------------------- the table


def test_round_trip():
    table = classify(gpt2(), overrides={"transformer.wpe.weight": "matrix"})
    data = json.loads(json.dumps(table.to_dict()))
    assert data == table.to_dict()
    assert Assignment.from_dict(data) == table


def test_printed_table():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.PReLU(1))
    assert str(classify(model)) == (
        "name      shape  role    rule    why\n"
        "0.weight  2 x 3  hidden  matrix  nn.Linear\n"
        "1.weight  1      vector  adamw   1-D\n"
        "matrix: 1 parameters, 6 elements; adamw: 1 parameters, 1 elements"
    )
    assert str(Assignment((route(None, ()),))).splitlines()[1].split() == [
        *("-", "scalar", "vector", "adamw", "0-D")
    ]
    assert "matrix: 0 parameters, 0 elements" in str(Assignment(()))


def test_markdown():
    table = classify(nn.Sequential(nn.Linear(3, 2)), overrides={"*[w|x]eight": "adamw"})
    head, rule, *rows, blank, counts = table.to_markdown().splitlines()
    assert head.count("|") == rule.count("|") == 7
    assert len(rows) == len(table) and not blank and counts.startswith("matrix: 0 parameters")
    assert "override '*[w\\|x]eight'" in rows[0]


def test_diff():
    model = gpt2()
    table, name = classify(model), "transformer.wpe.weight"
    assert table.diff(classify(model)) == []
    changed = classify(model, overrides={name: "matrix"})
    ((where, before, after),) = table.diff(changed)
    assert (where, before.rule, after.rule) == (name, "adamw", "matrix")
    fewer = Assignment(table.rows[1:])
    assert table.diff(fewer) == [(table.rows[0].name, table.rows[0], None)]
    assert fewer.diff(table) == [(table.rows[0].name, None, table.rows[0])]
