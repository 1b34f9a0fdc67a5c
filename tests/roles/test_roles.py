"""Roles of parameters: golden tables, and the cases a table does not show.

`STIEFEL_WRITE_GOLDEN=1` writes the golden tables anew; without it a difference is a failure. Those
of transformers ("hf-*") need it only to be written or to be compared with the real models.
"""

import importlib.util
import itertools
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.paths import EXAMPLES, FIXTURES
from torch import nn
from torch.nn.utils import parametrizations

from stiefel import optimizers
from stiefel.optimizers._core.rule import Dense, Rule
from stiefel.optimizers._core.views import split_view
from stiefel.optimizers._driver.optimizer import StackedOptimizer
from stiefel.optimizers._roles.classify import Assignment, classify, route, route_all

GOLDEN = FIXTURES / "roles"


def byte_model(d=96):
    """The model of the examples, loaded from its file: the examples are no package."""
    folder = str(EXAMPLES)
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
GOLDEN_MODELS |= families.OWN_FAMILIES
TABLES = {path.stem: path for path in sorted(GOLDEN.glob("hf-*.md"))}
HF = ("llama", "qwen3", "qwen2-moe", "qwen3-moe", "gemma2", "gemma3", "olmoe", "mixtral", "gpt-oss")
HF += ("phi3", "gpt2", "vit", "t5", "t5-gated")


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


@pytest.mark.parametrize("name", [f"hf-{name}" for name in HF])
def test_golden_table_of_a_rebuilt_model(name):
    text = TABLES[name].read_text()
    table = classify(families.rebuild(text), strict=True)
    assert table.to_markdown() == families.table_of(text)
    matrices = [row for row in table if row.rule == "matrix"]
    assert all(row.side for row in matrices), "the side of every matrix is known"
    assert all(row.part for row in matrices if row.role != "router")
    named = ("query", "key", "value", "out", "qkv")
    assert all(bool(row.heads) == (row.part in named) for row in table)


@pytest.fixture(scope="module")
def real_models():
    pytest.importorskip("transformers", reason="real models need transformers (extra hf)")
    return families.transformers_models()


@pytest.mark.parametrize("name", [f"hf-{name}" for name in HF])
def test_fixtures_are_the_real_models(real_models, name):
    import transformers

    model = real_models[name]()
    text = families.describe(model, f"tiny, of transformers {transformers.__version__}")
    if os.environ.get("STIEFEL_WRITE_GOLDEN") == "1":
        (GOLDEN / f"{name}.md").write_text(text)
    stored = TABLES[name].read_text()
    assert families.table_of(text) == families.table_of(stored)
    again = classify(families.rebuild(text))
    assert again == classify(model), "the rebuilt tree lacks something that decides"
    expected = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert [(row.name, row.shape) for row in again] == expected


# ------------------------------------- what a row claims, tried: the model must not notice it


def in_place(model, turn):
    """Let `turn` change every matrix of the table, as its view cuts it; return the table."""
    table = classify(model)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for row in table:
            if len(row.shape) > 1 and row.role not in ("bias", "norm", "vector"):
                turn(row, [b.to_matrices(named[row.name]) for b in split_view(row.view, row.shape)])
    return table


def rotate(model, d):
    """Turn the residual stream by one rotation, at every side that is said to be it."""
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1)))[0]
    Q = Q.to(next(model.parameters()).dtype)

    def turn(row, parts):
        for X in parts:
            assert row.side is not None
            X.copy_(X @ Q if row.side == "cols" else Q.mT @ X)

    in_place(model, turn)


def shuffle_neurons(model):
    """Put the hidden neurons of every MLP in another order, gate, up and down alike."""

    def turn(row, parts):
        if row.part in ("gate", "up", "gate_up", "down"):
            dim = -1 if row.part == "down" else -2
            for X in parts:
                order = torch.randperm(X.shape[dim], generator=torch.Generator().manual_seed(2))
                X.copy_(X.index_select(dim, order))

    in_place(model, turn)


def shuffle_heads(model):
    """Reverse the heads of every attention: those of k and v, and of q and out in their groups."""

    def turn(row, parts):
        for X, heads in zip(parts, row.heads, strict=bool(row.heads)):
            dim = -1 if row.part == "out" else -2
            X.copy_(X.unflatten(dim, (heads, -1)).flip(dim - 1).flatten(dim - 1, dim))

    in_place(model, turn)


def shift_rows(model):
    """Add one vector to every row of each weight that is said to allow it."""

    def turn(row, parts):
        if row.centred:
            for X in parts:
                X.add_(torch.linspace(-0.5, 0.5, X.shape[-1], dtype=X.dtype))

    assert any(row.centred for row in in_place(model, turn))


def log_probabilities(model):
    tokens = torch.arange(24).reshape(2, 12) % 90
    model.eval()
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out).log_softmax(-1)


ACTIONS = {
    "rotation": lambda model: rotate(model, 24),
    "neurons": shuffle_neurons,
    "heads": shuffle_heads,
    "shift": shift_rows,
}


@pytest.mark.parametrize("action", ACTIONS)
def test_symmetries_that_the_table_claims(action):
    torch.manual_seed(0)
    model = byte_model(d=24).double()
    before = log_probabilities(model)
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    ACTIONS[action](model)
    assert any(not torch.equal(p, stored[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(log_probabilities(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "qwen2-moe", "qwen3-moe", "olmoe", "mixtral", "gpt-oss", "phi3"]
)
def test_symmetries_of_the_real_models(real_models, name, action):
    torch.manual_seed(0)
    model = real_models[f"hf-{name}"](device="cpu").double()
    model.config._experts_implementation = "eager"  # the grouped product knows no float64
    for p in model.parameters():
        if p.ndim > 1:  # large enough to matter, and no expert far ahead of the others
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():  # what writes to the stream beside a matrix would have to turn with it
        for n, p in model.named_parameters():
            if n.endswith(("bias", "sinks")):
                p.zero_()
    before = log_probabilities(model)
    ACTIONS[action](model)
    if name == "qwen2-moe" and action == "rotation":  # its shared gate reads the stream as well
        Q = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "shared_expert_gate" in n:
                    p.copy_(p @ Q.to(p.dtype))
    torch.testing.assert_close(log_probabilities(model), before, rtol=0, atol=1e-5)


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
    assert (row.name, row.shape, *brief(row)) == (
        *("out.weight", (9, 4)),
        *("embedding", "adamw", "auto"),
    )
    assert row.why == "tied to tok.weight (nn.Embedding)"
    assert (row.part, row.side, row.aliases) == ("tied", "cols", ("tok.weight",))


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


def roles_of(model):
    return {row.name.removesuffix(".weight"): row.role for row in classify(model) if row.shape[1:]}


def test_classifiers_of_image_models():
    def layers(*sides):
        pairs = itertools.pairwise(sides)
        return nn.Sequential(*(x for m, n in pairs for x in (nn.Linear(m, n), nn.ReLU())))

    resnet = parts(conv1=nn.Conv2d(3, 8, 3), layer1=parts(fc=nn.Linear(8, 8)), fc=nn.Linear(8, 10))
    assert roles_of(resnet) == {"conv1": "conv", "layer1.fc": "hidden", "fc": "head"}
    vgg = parts(features=nn.Sequential(nn.Conv2d(3, 8, 3)), classifier=layers(8, 16, 16, 10))
    expected = {"features.0": "conv", "classifier.0": "hidden", "classifier.2": "hidden"}
    assert roles_of(vgg) == {**expected, "classifier.4": "head"}
    timm = parts(stem=nn.Conv2d(3, 8, 3), head=parts(norm=nn.LayerNorm(8), fc=nn.Linear(8, 10)))
    assert roles_of(timm) == {"stem": "conv", "head.fc": "head"}
    row = by_name(timm)["head.fc.weight"]
    assert (row.part, row.why) == ("classes", "name component 'head.fc'")
    # a layer of that name which feeds another one
    assert roles_of(parts(fc=nn.Linear(8, 16), out=nn.Linear(16, 2)))["fc"] == "hidden"
    # shapes alone cannot tell: no head has a name here
    assert set(roles_of(layers(8, 16, 10)).values()) == {"hidden"}


def test_fc_is_a_head_with_an_adapter_too():
    fc = parts(
        base_layer=nn.Linear(8, 10, bias=False),
        lora_A=parts(default=nn.Linear(8, 2, bias=False)),
        lora_B=parts(default=nn.Linear(2, 10, bias=False)),
    )
    roles = roles_of(parts(conv1=nn.Conv2d(3, 8, 3), fc=fc))
    assert list(roles.values()) == ["conv", "head", "hidden", "hidden"]


def test_heads_of_values_and_answers_beside_that_of_words():
    model = parts(
        tok=nn.Embedding(300, 8),
        lm_head=nn.Linear(8, 300),
        v_head=parts(summary=nn.Linear(8, 1)),
        value=nn.Linear(8, 1),
        q_head=nn.Linear(8, 300),
        qa_outputs=nn.Linear(8, 2),
    )
    rows = [row for row in classify(model) if row.role == "head"]
    assert [(row.name, row.part, row.centred) for row in rows] == [
        ("lm_head.weight", "vocabulary", True),
        ("v_head.summary.weight", "classes", False),
        ("value.weight", "classes", False),
        ("q_head.weight", "classes", False),  # values of actions: the loss feels their mean
        ("qa_outputs.weight", "classes", False),
    ]


def test_every_head_of_words_is_one():
    several = parts(tok=nn.Embedding(50, 8), heads=nn.ModuleList(nn.Linear(8, 50) for _ in "ab"))
    assert roles_of(several) == {"tok": "embedding", "heads.0": "head", "heads.1": "head"}
    unnamed = parts(tok=nn.Embedding(50, 8), a=nn.Linear(8, 50), b=nn.Linear(8, 50))
    assert roles_of(unnamed) == {"tok": "embedding", "a": "head", "b": "head"}
    rows = by_name(parts(emb=nn.Embedding(50, 8), to_logits=nn.Sequential(nn.Linear(8, 50))))
    row = rows["to_logits.0.weight"]
    assert (row.role, row.part, row.centred) == ("head", "vocabulary", True)


@pytest.mark.parametrize(
    ("rows", "cols", "role"),
    [(50304, 16, "head"), (50257, 16, "head"), (40000, 16, "hidden"), (50257, 60000, "hidden")],
)
def test_padded_vocabularies(rows, cols, role):
    with torch.device("meta"):
        model = parts(
            wte=nn.Embedding(50304, 16), decode=nn.Linear(cols, rows), critic=nn.Linear(16, 1)
        )
    assert roles_of(model)["decode"] == role


def test_a_hidden_width_equal_to_a_table_is_no_head():
    """Of users, items or positions: what feeds another layer, and few rows before other layers."""
    tables = {"user": nn.Embedding(64, 32), "item": nn.Embedding(48, 32)}
    model = parts(**tables, a=nn.Linear(64, 64), b=nn.Linear(64, 1))
    assert (roles_of(model)["a"], roles_of(model)["b"]) == ("hidden", "hidden")
    model = parts(**tables, a=nn.Linear(32, 64), b=nn.Linear(32, 7))
    assert roles_of(model)["a"] == "hidden"
    large = parts(user=nn.Embedding(4096, 32), a=nn.Linear(32, 4096), b=nn.Linear(4096, 1))
    assert roles_of(large)["a"] == "hidden"
    lecture = parts(
        token_embedding_table=nn.Embedding(65, 32),
        position_embedding_table=nn.Embedding(128, 32),
        mix=nn.Linear(32, 128),
        final=nn.Linear(32, 65),
        last=nn.Linear(32, 9),
    )
    assert roles_of(lecture)["mix"] == "hidden" and roles_of(lecture)["final"] == "head"
    assert by_name(lecture)["position_embedding_table.weight"].part == "position"


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


def test_bare_parameters_that_are_no_matrices():
    class Bare(nn.Module):
        def __init__(self, **shapes):
            super().__init__()
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.zeros(shape)))

    table = by_name(
        parts(
            mamba=Bare(A_log=(64, 16), D=(64,)),
            swin=Bare(relative_position_bias_table=(169, 4)),
            sam=Bare(rel_pos_h=(27, 8), rel_pos_w=(27, 8)),
            gains=Bare(scale=(1, 32), gamma=(1, 32), other=(32, 1)),
            detr=Bare(query=(10, 32)),
            vit=Bare(class_token=(1, 1, 32)),
            attention=Bare(query=(32, 32), key=(32, 32), value=(32, 32)),
        ),
    )
    roles = {name: (row.role, row.rule, row.part) for name, row in table.items()}
    vector, query = ("vector", "adamw", ""), ("embedding", "adamw", "")
    position = ("embedding", "adamw", "position")
    assert roles == {
        **dict.fromkeys(("mamba.A_log", "mamba.D"), vector),
        **dict.fromkeys(("gains.scale", "gains.gamma", "gains.other"), vector),
        **dict.fromkeys(("sam.rel_pos_h", "sam.rel_pos_w"), position),
        "swin.relative_position_bias_table": position,
        "detr.query": query,
        "vit.class_token": query,
        **{f"attention.{x}": ("hidden", "matrix", x) for x in ("query", "key", "value")},
    }


class Own(nn.Module):
    """A module with parameters of its own, by name and shape."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize("outputs", [1, 3], ids=["plain", "multiplied"])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_depthwise_convolutions_go_to_adamw(transposed, d, outputs):
    conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{d}d")
    row = by_name(parts(layer=conv(8, 8 * outputs, 3, groups=8)))["layer.weight"]
    assert brief(row) == ("depthwise", "adamw", "flatten")
    assert row.why == f"nn.{conv.__name__}, a kernel for each channel alone"
    grouped = by_name(parts(layer=conv(8, 8 * outputs, 3, groups=4)))["layer.weight"]
    assert brief(grouped) == ("conv", "matrix", "flatten")
    if not transposed or outputs == 1:  # else the kernel looks like that of a grouped one
        alone = route("layer.weight", row.shape)
        assert brief(alone) == ("depthwise", "adamw", "flatten")
        assert alone.why == f"{d + 2}-D, second side 1: rows of a kernel"


def test_a_convolution_of_one_channel_is_a_matrix_where_the_module_tells():
    """By its shape it could be a depthwise one: AdamW is right for both."""
    row = by_name(parts(layer=nn.Conv2d(1, 6, 3)))["layer.weight"]
    assert brief(row) == ("conv", "matrix", "flatten")
    assert brief(route("layer.weight", (6, 1, 3, 3))) == ("depthwise", "adamw", "flatten")
    assert classify(parts(a=nn.Conv2d(1, 1, 3, bias=False))).rows[0].role == "depthwise"


def test_a_depthwise_convolution_by_its_class_or_by_choice():
    class DepthwiseConv(Own):
        pass

    table = by_name(parts(a=DepthwiseConv(weight=(8, 1, 3)), b=DepthwiseConv(weight=(8, 2, 3))))
    assert [row.role for row in table.values()] == ["depthwise", "conv"]
    model = parts(a=nn.Conv1d(8, 8, 3, groups=8))
    row = by_name(model, overrides={"a.weight": "matrix"})["a.weight"]
    assert brief(row) == ("depthwise", "matrix", "flatten")
    assert brief(by_name(model, overrides={"a.weight": "conv"})["a.weight"])[1] == "matrix"
    optimizer = optimizers.SymmetryStack(model, policy={"depthwise": "Muon"})
    assert optimizer.assignment().rows[0].rule == "Muon"


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 8, 1, 1), (8, 1, 1, 1), (1, 1, 1, 8), (1, 1, 8)])
@pytest.mark.parametrize("name", ["w", "mix", "layer_scale", "alpha", "weight"])
def test_one_side_only_is_a_vector(shape, name):
    class ConvBlock(Own):
        pass

    for row in (
        *classify(Own(**{name: shape})),
        *classify(ConvBlock(**{name: shape})),
        route(name, shape),
        route(None, shape),
    ):
        assert (row.role, row.rule) == ("vector", "adamw"), row
        assert "one side only" in row.why
    conv = by_name(parts(layer=nn.Conv2d(1, 8, 1)))["layer.weight"]
    assert (conv.role, conv.why) == ("vector", "4-D, one side only")


@pytest.mark.parametrize("shape", [(1, 8), (8, 1)])
def test_two_sides_mean_a_matrix(shape):
    layer = by_name(parts(layer=nn.Linear(*reversed(shape))))["layer.weight"]
    for row in (layer, route("layer.weight", shape), route(None, shape)):
        assert (row.role, row.rule) == ("hidden", "matrix")
    for row in (*classify(Own(gamma=shape)), route("block.gamma", shape)):
        assert (row.role, row.rule) == ("vector", "adamw")


POSITIONS = {
    "pos_embed": [(9, 8), (1, 9, 8), (1, 8, 3, 3), (1, 3, 3, 8), (1, 2, 3, 3, 8)],
    "decoder_pos_embed": [(9, 8), (1, 9, 8)],
    "absolute_pos_embed": [(1, 8, 3, 3)],
    "pos_embed_spatial": [(1, 9, 8)],
    "positional_embedding": [(9, 8), (9, 1, 8)],
    "position_embeddings": [(1, 9, 8)],
    "temporal_embed": [(1, 4, 8)],
    "row_embed": [(9, 8)],
    "query_pos": [(9, 8), (9, 1, 8)],
    "pos_emb": [(8, 3, 3)],
    "pos_embed2": [(1, 9, 8)],
    "pos_embeds.0": [(9, 8), (1, 9, 8)],
    "relative_bias_table": [(49, 4)],
    "pe": [(9, 8), (9, 1, 8)],
    "rel_pos_h": [(27, 8)],
    "rel_height": [(27, 8)],
    "emb_rel_k": [(1, 9, 8)],
    "relative_position_bias_table": [(49, 4)],
    "relative_position_bias": [(4, 9, 9)],
    "relative_attention_bias": [(32, 4)],
    "attention_biases": [(4, 16)],
    "attn_bias": [(1, 4, 9, 9)],
    "rpb": [(4, 13, 13)],
}
TOKENS = {
    "cls_token": [(1, 8), (1, 1, 8), (1, 8, 1, 1)],
    "class_token": [(1, 1, 8)],
    "mask_token": [(1, 1, 8), (1, 8, 1, 1)],
    "reg_token": [(1, 4, 8), (4, 8)],
    "register_tokens": [(1, 4, 8), (4, 8)],
    "storage_tokens": [(4, 8)],
    "det_token": [(1, 100, 8)],
    "tokens": [(4, 8), (2, 4, 8)],
    "queries": [(4, 8), (1, 4, 8), (4, 1, 8)],
    "object_queries": [(4, 8)],
    "latents": [(4, 8)],
    "prompts": [(2, 4, 8), (4, 8)],
    "level_embed": [(4, 8)],
    "null_text_embed": [(1, 8), (4, 8)],
    "codebook": [(16, 8), (2, 16, 8)],
    "latent_array": [(16, 8)],
    "pool_query": [(1, 8), (4, 8)],
    "prompts.3": [(4, 8), (1, 4, 8)],
    "cls_tokens.0": [(1, 8)],
    "reference_points": [(9, 4)],
}


@pytest.mark.parametrize(
    ("name", "part"), [(n, "position") for n in POSITIONS] + [(n, "") for n in TOKENS]
)
def test_positions_and_tokens_are_embeddings_of_any_number_of_sides(name, part):
    class ConvStem(Own):
        """Whose name says convolution."""

    for shape in {**POSITIONS, **TOKENS}[name]:
        names = ["encoder." + name, "module.decoder." + name]
        for row in (
            *classify(parts(encoder=own_parameter(Own, name, shape))),
            *classify(parts(encoder=own_parameter(ConvStem, name, shape))),
            *route_all(names, [shape, shape]),
        ):
            assert (row.role, row.rule, row.part) == ("embedding", "adamw", part), row
            assert row.why == f"name component '{name.partition('.')[0]}'"
        alone = route(names[0], shape)
        assert (alone.role, alone.rule) == ("embedding", "adamw")


def own_parameter(kind, name, shape):
    """A module of this class with one parameter, in a list where the name has a number."""
    word, _, number = name.partition(".")
    module = kind(**({} if number else {word: shape}))
    if number:
        module.add_module(word, nn.ParameterDict({number: nn.Parameter(torch.zeros(shape))}))
    return module


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("pos_embed", nn.Conv2d(8, 8, 3)),
        ("pos_conv", nn.Conv1d(8, 8, 3)),
        ("pos_proj", nn.Linear(8, 8)),
        ("linear_pos", nn.Linear(8, 8)),
        ("pos_embed_proj", nn.Linear(8, 8)),
        ("rel_pos_mlp", nn.Linear(8, 8)),
        ("to_tokens", nn.Linear(8, 8)),
        ("patch_embed", nn.Conv2d(3, 8, 4)),
        ("time_embed", nn.Linear(8, 8)),
        ("query", nn.Linear(8, 8)),
        ("memory", nn.Linear(8, 8)),
        ("proj", nn.Linear(8, 8)),
    ],
)
def test_layers_that_are_named_after_positions_stay_matrices(name, layer):
    (row, *_) = classify(parts(block=parts(**{name: layer})))
    assert row.rule == "matrix"
    assert route(row.name, row.shape).rule == "matrix"
    assert route_all([row.name], [row.shape])[0].rule == "matrix"


def test_tables_in_lists():
    def tables():
        return nn.ModuleList(nn.Embedding(9, 8) for _ in range(2))

    model = parts(embed_tokens=tables(), embeddings=tables(), embed=nn.Sequential(nn.Linear(8, 7)))
    roles = ["embedding"] * 4 + ["hidden"]
    assert [row.role for row in classify(model) if row.shape[1:]] == roles
    assert [row.role for row in by_names_alone(model).values() if row.shape[1:]] == roles


def test_weights_under_the_older_norms_of_weights():
    model = parts(tok=nn.Embedding(9, 8), q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 8))
    torch.nn.utils.spectral_norm(model["tok"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model["q_proj"])
    for table in (by_name(model), by_names_alone(model)):
        assert (table["tok.weight_orig"].role, table["tok.weight_orig"].part) == (
            "embedding",
            "token",
        )
        assert brief(table["q_proj.weight_v"]) == ("hidden", "matrix", "auto")
        assert table["q_proj.weight_v"].part == "query"
        assert table["q_proj.weight_g"].role == "vector"


def test_biases_of_relative_attention_are_biases():
    for row in (*classify(Own(pos_bias_u=(4, 8), r_w_bias=(4, 8))), route("pos_bias_v", (4, 8))):
        assert (row.role, row.rule) == ("bias", "adamw")


def test_tables_of_positions_by_their_class():
    class LearnedPositionalEmbedding(nn.Embedding):
        pass

    model = parts(a=LearnedPositionalEmbedding(9, 8), b=nn.Embedding(9, 8), mix=nn.Linear(8, 9))
    assert [row.part for row in classify(model) if row.role == "embedding"] == ["position", "token"]


def test_tables_inside_modules_that_are_named_after_positions():
    names = {"pos_emb.emb": (9, 8), "pos_embed.table": (1, 9, 8), "position.proj": (8, 8)}
    rows = route_all([f"{name}.weight" for name in names], [*names.values()])
    assert [row.part for row in rows[:2]] == ["position", "position"]
    assert [row.rule for row in rows] == ["adamw", "adamw", "matrix"]


def test_tables_of_positions_that_are_layers():
    tables = ("relative_attention_bias", "pos_embed", "row_embed", "distance_embedding", "wpe")
    model = parts(**{name: nn.Embedding(9, 8) for name in tables}, tok=nn.Embedding(9, 8))
    found = [(row.role, row.part) for row in classify(model)]
    assert found == [("embedding", "position")] * len(tables) + [("embedding", "token")]
    assert [(row.role, row.part) for row in by_names_alone(model).values()] == found


def test_a_learned_query_beside_projections():
    pool = nn.Module()
    pool.query = nn.Parameter(torch.zeros(4, 8))
    pool.key, pool.value = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    roles = {"pool.query": "embedding", "pool.key": "hidden", "pool.value": "hidden"}
    assert roles_of(parts(pool=pool)) == roles


def test_parametrized_weights_keep_their_module():
    model = parts(
        tok=parametrizations.spectral_norm(nn.Embedding(9, 4)),
        up=parametrizations.weight_norm(nn.Linear(4, 6)),
    )
    table = by_name(model)
    assert table["tok.parametrizations.weight.original"].role == "embedding"
    assert brief(table["up.parametrizations.weight.original0"]) == ("vector", "adamw", "auto")
    assert brief(table["up.parametrizations.weight.original1"]) == ("hidden", "matrix", "auto")


def test_wrapped_names():
    model = parts(module=parts(lm_head=nn.Linear(4, 3, bias=False), up=nn.Linear(4, 3, bias=False)))
    assert [row.role for row in classify(model)] == ["head", "hidden"]


# ---------------------------------------------------------- places in a layer that names leave open


class Experts(nn.Module):
    def __init__(self, up, down, **attributes):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(up))
        self.down_proj = nn.Parameter(torch.zeros(down))
        vars(self).update(attributes)


class GptOssExperts(Experts):
    pass


class MixtralExperts(Experts):
    pass


def with_experts(kind, up, down, width=None, **attributes):
    """Views of both stacks in a model whose embedding has this width."""
    model = parts(experts=kind(up, down, **attributes))
    if width:
        model["tok"] = nn.Embedding(9, width)
    table = by_name(model)
    return [(row.view, row.side) for row in map(table.get, (GATE_UP, DOWN))]


GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


@pytest.mark.parametrize(
    ("kind", "up", "down", "options", "views"),
    [
        # the attributes of transformers' experts say it
        (Experts, (2, 8, 8), (2, 4, 8), {"is_transposed": True}, ("transposed", "transposed")),
        (Experts, (2, 8, 8), (2, 8, 4), {"is_transposed": False}, ("batch", "batch")),
        (Experts, (2, 8, 4), (2, 4, 4), {"is_concatenated": True}, ("rows:4,4", "batch")),
        (Experts, (2, 8, 4), (2, 4, 4), {"is_concatenated": False}, ("interleaved", "batch")),
        # the class does
        (GptOssExperts, (2, 4, 8), (2, 4, 4), {}, ("transposed:interleaved", "transposed")),
        (MixtralExperts, (2, 12, 8), (2, 8, 6), {}, ("rows:6,6", "batch")),
        # the width of the stream does: only one side of each stack is as wide
        (Experts, (2, 6, 4), (2, 4, 3), {"width": 4}, ("batch", "batch")),
        (Experts, (2, 4, 6), (2, 3, 4), {"width": 4}, ("transposed", "transposed")),
        (MixtralExperts, (2, 4, 6), (2, 3, 4), {"width": 4}, ("transposed:rows:3,3", "transposed")),
        # the other stack does
        (Experts, (2, 12, 8), (2, 8, 6), {}, ("batch", "batch")),
        (Experts, (2, 8, 12), (2, 6, 8), {}, ("transposed", "transposed")),
        (Experts, (2, 16, 8), (2, 8, 8), {}, ("batch", "batch")),
    ],
)
def test_layouts_of_experts(kind, up, down, options, views):
    assert with_experts(kind, up, down, **options) == [(views[0], "cols"), (views[1], "rows")]


def test_experts_that_could_be_stored_either_way():
    model = parts(experts=nn.Module())
    model["experts"].w1 = nn.Parameter(torch.zeros(3, 4, 4))
    model["experts"].w2 = nn.Parameter(torch.zeros(3, 4, 4))
    row = by_name(model)["experts.w1"]
    assert (brief(row), row.side) == (("expert", "matrix", "batch"), None)
    assert "(in, out) or (out, in) is not known" in row.why
    with pytest.raises(ValueError, match=r"experts\.w1 \(3, 4, 4\), experts\.w2"):
        classify(model, strict=True)
    overrides = {"experts.*": {"view": "transposed", "side": "cols"}}
    assert {row.view for row in classify(model, overrides, strict=True)} == {"transposed"}


@pytest.mark.parametrize(
    ("shape", "settings", "view", "heads"),
    [
        ((48, 24), {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 6}, "rows:24,12,12", 4),
        ((80, 24), {"num_heads": 6, "num_key_value_heads": 2, "head_dim": 8}, "rows:48,16,16", 6),
        ((72, 24), {"n_head": 4}, "rows:24,24,24", 4),
        ((72, 24), {}, "rows:24,24,24", None),
        ((60, 24), {"n_head": 4}, "auto", None),  # no way to tell where q ends
    ],
)
@pytest.mark.parametrize("word", ["qkv_proj", "c_attn", "qkv", "query_key_value"])
def test_fused_query_key_value(word, shape, settings, view, heads):
    attention = parts(**{word: nn.Linear(*reversed(shape))})
    vars(attention).update(settings)
    row = by_name(parts(attention=attention))[f"attention.{word}.weight"]
    assert row.part == "qkv"
    if word == "query_key_value":  # q, k, v of the first head, then of the second, ...
        view, heads = "auto", None
    assert (row.view, row.heads[:1]) == (view, (heads,) if heads else ())


def test_shared_gates_and_gates_of_another_size_are_no_routers():
    moe = parts(
        experts=nn.ModuleList([parts(w1=nn.Linear(4, 4))]),
        gate=nn.Linear(4, 6),
        shared_expert_gate=nn.Linear(4, 1, bias=False),
    )
    assert by_name(moe)["gate.weight"].role == "router"
    row = by_name(moe)["shared_expert_gate.weight"]
    assert (*brief(row), row.why) == ("vector", "adamw", "auto", "gate of a shared expert")
    vars(moe)["num_experts"] = 5
    assert by_name(parts(mlp=moe))["mlp.gate.weight"].role == "hidden"


def test_parts_that_only_two_components_tell():
    layer = parts(
        attention=parts(
            self=parts(**{x: nn.Linear(8, 8) for x in ("query", "key", "value")}),
            output=parts(dense=nn.Linear(8, 8)),
        ),
        intermediate=parts(dense=nn.Linear(8, 8)),
        output=parts(dense=nn.Linear(8, 8)),
    )
    table = classify(parts(word_embeddings=nn.Embedding(9, 8), layer=nn.ModuleList([layer])))
    found = [(row.part, row.side) for row in table if row.role == "hidden"]
    assert found == [
        *(("query", "cols"), ("key", "cols"), ("value", "cols")),
        *(("out", "rows"), ("up", "cols"), ("down", "rows")),
    ]


def test_heads_that_contradict_the_configuration_are_not_told():
    def heads(**settings):
        attention = parts(q_proj=nn.Linear(8, 12), v_proj=nn.Linear(8, 8), o_proj=nn.Linear(16, 8))
        vars(attention).update(settings)
        return [row.heads for row in classify(attention) if row.role == "hidden"]

    latent = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    assert heads(**latent) == [(4,), (), ()]  # values are of another size
    assert heads(**latent, v_head_dim=4) == [(4,), (2,), (4,)]
    assert heads(num_heads=5, head_dim=4) == [(), (2,), ()]
    assert heads() == [(), (), ()]


def test_a_small_net_has_no_residual_stream():
    net = classify(
        nn.Sequential(nn.Conv2d(3, 8, 3), parts(fc1=nn.Linear(8, 9), fc2=nn.Linear(9, 4)))
    )
    assert {row.side for row in net} == {None}


def test_partners_under_wrapped_names():
    class LoRALinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(4, 6, bias=False)
            self.lora_A = parts(default=nn.Linear(4, 2, bias=False))

    table = by_name(
        parts(
            gate_proj=parametrizations.weight_norm(nn.Linear(4, 6, bias=False)),
            up_proj=LoRALinear(),
            down_proj=nn.Linear(6, 4, bias=False),
        )
    )
    gate, up = "gate_proj.parametrizations.weight.original1", "up_proj.base_layer.weight"
    assert (table[gate].part, table[gate].pair) == ("gate", up)
    assert (table[up].part, table[up].pair) == ("up", gate)
    assert table["down_proj.weight"].pair is None


@pytest.mark.parametrize(
    ("fixture", "name", "settings", "centred"),
    [
        ("hf-llama", "lm_head.weight", {}, True),
        ("hf-llama", "lm_head.weight", {"final_logit_softcapping": None}, True),
        ("hf-llama", "lm_head.weight", {"final_logit_softcapping": 30.0}, False),
        ("hf-llama", "lm_head.weight", {"z_loss": 1e-4}, False),
        ("hf-gpt2", "transformer.wte.weight", {}, False),  # tied
        ("hf-vit", "classifier.weight", {}, False),  # may be trained on another loss
        ("hf-olmoe", "model.layers.0.mlp.gate.weight", {}, True),
        ("hf-olmoe", "model.layers.0.mlp.gate.weight", {"router_z_loss_coef": 0.0}, True),
        ("hf-olmoe", "model.layers.0.mlp.gate.weight", {"router_z_loss_coef": 1e-3}, False),
        ("hf-olmoe", "model.layers.0.mlp.gate.weight", {"scoring_func": "sigmoid"}, False),
        ("hf-gpt-oss", "model.layers.0.mlp.router.weight", {}, True),
        ("hf-olmoe", "lm_head.weight", {"router_z_loss_coef": 1e-3}, True),
    ],
)
def test_where_centring_is_right(fixture, name, settings, centred):
    model = families.rebuild(TABLES[fixture].read_text())
    vars(model.config).update(settings)
    assert by_name(model)[name].centred == centred


@pytest.mark.parametrize(
    ("function", "centred"), [("softmax", True), ("sigmoid", False), (None, False)]
)
def test_the_function_of_a_router_decides(function, centred):
    model = families.torchtitan(experts=3)
    model["layers"]["0"]["moe"]["router"].score_func = function
    assert by_name(model)["layers.0.moe.router.gate.weight"].centred == centred


class FullyShardedDataParallel(nn.Module):
    """Named as torch names it, which keeps the wrapped module under this name."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def test_wrapped_layers_keep_role_part_and_pair():
    wrap = FullyShardedDataParallel

    def block(wrap=lambda module: module):
        swiglu = {"gate": (8, 20), "up": (8, 20), "down": (20, 8)}
        layers = {x: wrap(nn.Linear(*sides, bias=False)) for x, sides in swiglu.items()}
        expert = parts(w1=nn.Linear(8, 6), w2=nn.Linear(6, 8), w3=nn.Linear(8, 6))
        moe = parts(gate=wrap(nn.Linear(8, 2)), experts=nn.ModuleList([expert, expert]))
        return wrap(parts(mlp=parts(**layers), moe=moe))

    def table(model):
        def plain(name):
            return (name or "").replace("_fsdp_wrapped_module.", "")

        return [(plain(row.name), row.role, row.part, plain(row.pair)) for row in classify(model)]

    assert table(wrap(parts(blocks=nn.ModuleList([block(wrap)])))) == table(
        parts(blocks=nn.ModuleList([block()]))
    )
    flat = route("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._flat_param", (96,))
    assert (flat.role, flat.rule) == ("vector", "adamw")


def lazy_model():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.parameter.UninitializedParameter()
            self.w_bias = nn.parameter.UninitializedParameter()

    layers = {"gate": nn.LazyLinear(6), "up": nn.LazyLinear(6), "down": nn.Linear(6, 4)}
    layers |= {"conv": nn.LazyConv2d(8, 3), "back": nn.LazyConvTranspose1d(8, 3)}
    layers |= {"batch": nn.LazyBatchNorm2d(), "head": nn.LazyLinear(9), "own": Own()}
    return parts(tok=nn.Embedding(9, 4), **layers)


def test_lazy_parameters_have_the_role_of_their_module():
    model = lazy_model()
    table = by_name(model)
    assert list(table) == [name for name, _ in model.named_parameters()]
    assert {name: brief(row) for name, row in table.items() if not name.endswith("bias")} == {
        "tok.weight": ("embedding", "adamw", "auto"),
        "gate.weight": ("hidden", "matrix", "auto"),
        "up.weight": ("hidden", "matrix", "auto"),
        "down.weight": ("hidden", "matrix", "auto"),
        "conv.weight": ("conv", "matrix", "flatten"),
        "back.weight": ("conv", "matrix", "flatten"),
        "batch.weight": ("norm", "adamw", "auto"),
        "head.weight": ("head", "adamw", "auto"),
        "own.w": ("vector", "adamw", "auto"),
    }
    lazy = [row for row in table.values() if row.name.split(".")[0] not in ("tok", "down")]
    assert {row.shape for row in lazy} == {()}
    assert all(row.why.endswith("; not initialised yet") for row in lazy)
    assert {row.role for row in lazy if row.name.endswith("bias")} == {"bias", "norm"}
    assert (table["gate.weight"].part, table["up.weight"].part) == ("gate", "up")
    assert table["gate.weight"].pair is None, "nothing says yet that the shapes are equal"
    assert str(classify(model)).splitlines()[-1].startswith("matrix: 5 parameters, 24 elements")


def test_lazy_parameters_under_overrides_and_strict():
    model = lazy_model()
    with pytest.raises(ValueError, match=r"give one in overrides: own\.w \(\)$"):
        classify(model, strict=True)
    table = by_name(
        model, overrides={"own.w": "adamw", model["head"].weight: "matrix"}, strict=True
    )
    assert brief(table["head.weight"]) == ("head", "matrix", "auto")
    assert table["head.weight"].why == "override 'head.weight'; not initialised yet"
    with pytest.raises(ValueError, match=r"batch\.weight of shape \(\) is no matrix"):
        classify(model, {"batch.weight": "matrix"})
    with pytest.raises(ValueError, match="match no parameter: a tensor of shape"):
        classify(model, {nn.parameter.UninitializedParameter(): "adamw"})


def test_lazy_parameters_have_the_row_of_plain_ones_once_they_are_initialised():
    model = nn.Sequential(nn.LazyConv2d(8, 3, groups=1), nn.Flatten(), nn.LazyLinear(6))
    expected = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 6))
    early = classify(model)
    model(torch.zeros(1, 2, 4, 4))
    assert classify(model) == classify(expected)
    assert [brief(row) for row in early] == [brief(row) for row in classify(model)]


def test_quantised_weights():
    class Params4bit(nn.Parameter):
        pass

    model = parts(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    model["a"].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model["b"].weight = Params4bit(torch.zeros(4, 4), requires_grad=False)
    model["c"].weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    rows = [row for row in classify(model, strict=True) if row.role != "bias"]
    assert {brief(row) for row in rows} == {("quantised", "adamw", "auto")}
    kinds = ("uint8", "Params4bit", "float8_e4m3fn")
    assert [row.why for row in rows] == [f"{kind}: no weight to train" for kind in kinds]
    with pytest.raises(ValueError, match=r"a\.weight of shape \(8, 1\) is no matrix"):
        classify(model, {"a.weight": "matrix"})


# ------------------------------------------------------------------------------- every optimizer


def dense_classes():
    """Every public optimizer of single weights that trains hidden matrices by one rule."""
    classes = [getattr(optimizers, name) for name in optimizers.__all__]
    classes = [c for c in classes if isinstance(c, type) and issubclass(c, StackedOptimizer)]
    other = ("StackedOptimizer", "SymmetryStack")
    return [c for c in classes if c.__name__ not in other and not c.__name__.endswith("LoRA")]


@pytest.mark.parametrize("cls", dense_classes(), ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "make",
    [gpt2, lambda: families.torchtitan(experts=3), families.convnext, families.swin],
    ids=["gpt2", "moe", "convnext", "swin"],
)
def test_every_optimizer_uses_the_table(cls, make):
    model = make()
    expected = classify(model)
    method = cls(model, lr=1e-3)
    found = {row.name: (row.role, row.rule, row.why) for row in method.assignment()}
    name = method.defaults["method"]
    assert found == {
        row.name: (row.role, name if row.rule == "matrix" else "adamw", row.why) for row in expected
    }
    views = {
        n: g["views"][i] if "views" in g else g["view"]
        for g in method.param_groups
        for i, n in enumerate(g["param_names"])
    }
    assert all(views[row.name] == row.view for row in expected if row.rule == "matrix")
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-2)
    method.step()  # every view fits its weight


@pytest.mark.parametrize("cls", dense_classes(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ["timm-vit", "convnext-v2", "levit", "swin", "clip", "whisper"])
def test_every_optimizer_has_the_rules_of_the_model_from_names_too(cls, name):
    model = families.OF_IMAGES_AND_SOUND[name]()
    by_module, named = cls(model, lr=1e-3), cls(model.named_parameters(), lr=1e-3)
    rules = {row.name: row.rule for row in by_module.assignment()}
    assert {row.name: row.rule for row in named.assignment()} == rules
    assert set(rules.values()) == {"adamw", named.defaults["method"]}


@dataclass(frozen=True)
class SidedRule(Rule):
    """Asks for the side of the residual stream."""

    side: str = "auto"

    def __post_init__(self):
        if self.side not in ("auto", "rows", "cols"):
            raise ValueError("no side")

    def update(self, *members, **unused):
        return members[0].step(Dense(members[0].grad.clone()))


@dataclass(frozen=True)
class OtherSidesRule(SidedRule):
    """Whose sides are called otherwise."""

    def __post_init__(self):
        if self.side not in ("auto", "left", "right"):
            raise ValueError("no side")


@dataclass(frozen=True)
class SharedSideRule(SidedRule):
    """Of all weights of a group at once, or of runs of three, whose sides may differ."""

    members = ()

    def __post_init__(self):
        sides = (self.side,) if isinstance(self.side, str) else self.side
        if not {*sides} <= {"auto", "rows", "cols"}:
            raise ValueError("no side")


@dataclass(frozen=True)
class ThreeSidesRule(SharedSideRule):
    """Of runs of three."""

    members = ("a", "b", "c")


@dataclass(frozen=True)
class OneSideRule(SidedRule):
    """Of all weights of a group at once, which takes one word only."""

    members = ()


def sides_of(rule, model):
    optimizer = StackedOptimizer(model, rule, 1e-3, 0.0)
    (group,) = optimizer.param_groups
    names, sides = group["param_names"], group.get("sides") or [None] * len(group["params"])
    return {
        name: group["side"] if side is None else side
        for name, side, rule in zip(names, sides, group["rules"], strict=True)
        if rule == "matrix"
    }


def test_a_rule_with_a_side_gets_that_of_the_residual_stream():
    model = byte_model(d=24)
    sides = sides_of(SidedRule(), model)
    expected = {row.name: row.side for row in classify(model) if row.rule == "matrix"}
    assert sides == expected and set(sides.values()) == {"rows", "cols"}
    assert set(sides_of(SidedRule("rows"), model).values()) == {"rows"}  # as the caller says
    assert set(sides_of(OtherSidesRule(), model).values()) == {"auto"}
    assert set(sides_of(OneSideRule(), model).values()) == {"auto"}


def test_a_rule_with_a_side_never_gets_the_longer_one():
    model = families.torchtitan(experts=3)  # keys and values are 16 x 24
    sides = sides_of(SidedRule(), model)
    short = ("attention.wk", "attention.wv", "moe.router", "moe.experts")
    for name, side in sides.items():
        assert (side == "auto") == any(word in name for word in short), name
    assert set(sides_of(SidedRule(), nn.Sequential(nn.Linear(3, 4))).values()) == {"auto"}


def test_weights_that_share_get_a_side_each():
    model = byte_model(d=24)
    matrices = [row for row in classify(model) if row.rule == "matrix"]
    assert {row.side for row in matrices} == {"rows", "cols"}
    everyone = tuple(row.side for row in matrices)
    assert set(sides_of(SharedSideRule(), model).values()) == {everyone}
    assert set(sides_of(SharedSideRule("rows"), model).values()) == {"rows"}
    found = sides_of(ThreeSidesRule(), model)  # runs q k v, o gate up, down q k, ...
    *whole, rest = (matrices[i : i + 3] for i in range(0, len(matrices), 3))
    assert len(rest) == 2 and {found[row.name] for row in rest} == {"auto"}  # no run of three
    for run in whole:
        sides = tuple(row.side for row in run)
        assert {found[row.name] for row in run} == {sides if len({*sides}) > 1 else sides[0]}
    assert len({*found.values()}) > 1


def test_a_weight_that_shares_with_no_other_has_its_own_side():
    model = parts(tok=nn.Embedding(9, 8), q_proj=nn.Linear(8, 8))
    assert set(sides_of(SharedSideRule(), model).values()) == {"cols"}


def test_shared_sides_that_are_not_known():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert set(sides_of(SharedSideRule(), plain).values()) == {"auto"}
    model = parts(tok=nn.Embedding(9, 8), q_proj=nn.Linear(8, 8), mix=nn.Linear(8, 8))
    model["wide"] = nn.Linear(8, 12)
    assert set(sides_of(SharedSideRule(), model).values()) == {("cols", "rows", "cols")}
    narrow = parts(tok=nn.Embedding(9, 8), k_proj=nn.Linear(8, 2), v_proj=nn.Linear(8, 2))
    assert set(sides_of(SharedSideRule(), narrow).values()) == {"auto"}  # not the longer one


@pytest.mark.parametrize(
    "sharing", [{"rotation_sharing": "chain", "layer": 7}, {"rotation_sharing": "global"}]
)
def test_one_rotation_of_the_residual_stream(sharing):
    """q reads the stream as k, v, gate and up do: square, its shape cannot tell."""
    model = families.rebuild(TABLES["hf-llama"].read_text()).to_empty(device="cpu")
    sides = {row.name: row.side for row in classify(model) if row.rule == "matrix"}
    optimizer = optimizers.ARO(model, **sharing)
    names = {id(p): name for name, p in model.named_parameters()}
    units = optimizer._get_plan().units
    transposed = {
        names[id(p)]: "cols" if turn else "rows"
        for unit in units
        for p, turn in zip(unit.params, unit.transposed, strict=True)
    }
    assert transposed == sides and set(sides.values()) == {"rows", "cols"}
    for p in model.parameters():
        p.data.fill_(0.1)
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


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


def test_overrides_by_parameter_module_and_function():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    weight = model[0].weight
    table = by_name(model, overrides={weight: "router", model[2]: "adamw"})
    assert (table["0.weight"].role, table["0.weight"].why) == ("router", "override '0.weight'")
    assert [table[f"2.0.{leaf}"].rule for leaf in ("weight", "bias")] == ["adamw", "adamw"]
    assert table["2.0.weight"].why == "override 'Sequential'"

    def wide(name, p, module):
        return isinstance(module, nn.Linear) and p.ndim == 2 and not name.startswith("1")

    table = by_name(model, overrides=[(wide, "head"), ("*.weight", "router")])
    assert [table[f"{i}.weight"].role for i in ("0", "1", "2.0")] == ["head", "router", "head"]
    assert table["0.weight"].why == "override 'wide'"


def test_override_of_single_fields():
    model = nn.Sequential(nn.Linear(4, 12))
    choice = {"part": "qkv", "view": "rows:4,4,4", "heads": [2, 2, 2], "side": "cols"}
    row = by_name(model, overrides={"0.weight": {"role": "head", "rule": "matrix", **choice}})[
        "0.weight"
    ]
    assert brief(row) == ("head", "matrix", "rows:4,4,4")
    assert (row.part, row.heads, row.side) == ("qkv", (2, 2, 2), "cols")


def test_override_keeps_the_view_of_an_expert():
    model = parts(experts=GptOssExperts((2, 4, 8), (2, 4, 4)))
    assert by_name(model, overrides={GATE_UP: "expert"})[GATE_UP].view == "transposed:interleaved"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"0.weight": {"rule": "muon"}}, "'muon' is none of matrix, adamw"),
        ({"0.weight": {"lr": 1.0}}, "'lr' is none of role, rule, why, view, part"),
        ({"0.bias": {"rule": "matrix"}}, r"0\.bias of shape \(4,\) is no matrix"),
        ({torch.zeros(2, 3): "adamw"}, r"match no parameter: a tensor of shape \(2, 3\)"),
        ({nn.Linear(2, 2): "adamw"}, "match no parameter: Linear"),
        ({3: "adamw"}, "override 3 must be a name, a pattern, a parameter, a module or a function"),
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
            self.mix = nn.Parameter(torch.zeros(4, 3))
            self.cube = nn.Parameter(torch.zeros(2, 2, 2, 2))

    model = parts(odd=Odd(), fc=nn.Linear(4, 4))
    table = by_name(model)
    assert brief(table["odd.mix"]) == ("hidden", "matrix", "auto")
    assert brief(table["odd.cube"]) == ("conv", "matrix", "flatten")
    with pytest.raises(ValueError, match=r"odd\.mix \(4, 3\), odd\.cube \(2, 2, 2, 2\)$"):
        classify(model, strict=True)
    overrides = {"odd.mix": "adamw", "odd.cube": "conv"}
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
        (None, (6, 4, 3, 3), "conv", "matrix"),
        ("up.weight", (4, 5), "hidden", "matrix"),
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
        ("embed.weight", (9, 3, 4, 4), "conv", "matrix"),
        ("bias_net.weight", (9, 4), "hidden", "matrix"),
        ("pos_embed", (9, 4), "embedding", "adamw"),
        ("vit.cls_token", (1, 1, 4), "embedding", "adamw"),
        ("_orig_mod.module.embed.weight", (9, 4), "embedding", "adamw"),
        ("token_embedding_table.weight", (9, 4), "embedding", "adamw"),
        ("position_embedding_table.weight", (9, 4), "embedding", "adamw"),
        ("src_embedding.weight", (9, 4), "embedding", "adamw"),
        ("encoder.embedding_layer.weight", (9, 4), "embedding", "adamw"),
        ("tgt_tok_emb.weight", (9, 4), "embedding", "adamw"),
        ("bos_embed", (1, 4), "embedding", "adamw"),
        ("class_token", (1, 1, 4), "embedding", "adamw"),
        ("query_tokens", (1, 9, 4), "embedding", "adamw"),
        ("attn.relative_position_bias_table", (169, 4), "embedding", "adamw"),
        ("attn.rel_pos_h", (27, 8), "embedding", "adamw"),
        ("attn.rel_pos_proj.weight", (4, 4), "hidden", "matrix"),
        ("patch_embedding.weight", (9, 4), "hidden", "matrix"),
        ("time_embedding.weight", (9, 4), "hidden", "matrix"),
        ("layers.0.attn.query", (4, 4), "hidden", "matrix"),
        ("layers.0.mixer.A_log", (64, 16), "vector", "adamw"),
        ("layers.0.scale", (1, 4), "vector", "adamw"),
        ("layers.0.ls1.gamma", (1, 1, 4), "vector", "adamw"),
        ("layers.0.scale", (3, 4), "hidden", "matrix"),
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
        ("fc.weight", (9, 4), "head", "adamw"),
        ("head.fc.weight", (9, 4), "head", "adamw"),
        ("classifier.6.weight", (9, 4), "head", "adamw"),
        ("classifier.out_proj.weight", (9, 4), "head", "adamw"),
        ("classifier.dense.weight", (4, 4), "hidden", "matrix"),
        ("qa_outputs.weight", (2, 4), "head", "adamw"),
        ("value.weight", (1, 4), "head", "adamw"),
        ("value.weight", (4, 4), "hidden", "matrix"),
        ("value_head.weight", (1, 4), "head", "adamw"),
        ("v_head.summary.weight", (1, 4), "head", "adamw"),
        ("lmhead.weight", (9, 4), "head", "adamw"),
        ("to_logits.weight", (9, 4), "head", "adamw"),
        ("generator.proj.weight", (9, 4), "head", "adamw"),
        ("generator.2.weight", (9, 4), "hidden", "matrix"),
        ("cls.predictions.decoder.weight", (9, 4), "head", "adamw"),
        ("heads.1.weight", (9, 4), "head", "adamw"),
        ("blocks.0.fc.weight", (4, 4), "hidden", "matrix"),
        ("blocks.0.heads.1.weight", (4, 4), "hidden", "matrix"),
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
    assert row.view == {"expert": "batch", "conv": "flatten"}.get(role, "auto")
    assert row.why and "known" not in row.why


def test_route_accepts_torch_size():
    row = route("w", torch.zeros(2, 3).shape)
    assert type(row.shape) is tuple and row.why == "2-D"


@pytest.mark.parametrize("model", [byte_model, gpt2], ids=["byte-model", "gpt2"])
def test_names_alone_agree_with_modules(model):
    for row in classify(model()):
        alone = route(row.name, row.shape)
        assert (alone.role, alone.rule) == (row.role, row.rule)


# ----------------------------------------------------------------------- names of all parameters


def by_names_alone(model):
    return table_by_names([(n, tuple(p.shape)) for n, p in model.named_parameters()])


def table_by_names(named_shapes):
    return {row.name: row for row in route_all(*zip(*named_shapes, strict=True))}


def zoo():
    """Every model of the golden tables, and the meta models of those of transformers."""
    rebuilt = {
        name: lambda path=path: families.rebuild(path.read_text()) for name, path in TABLES.items()
    }
    return {**GOLDEN_MODELS, **rebuilt}


# What only modules tell: (field, by module, by names) -> why.
UNTOLD_BY_NAMES = {
    ("part", "tied", "token"): "a tie is one object under two names, and names are told once",
    ("role", "quantised", "hidden"): "codes are told by the dtype",
    ("role", "quantised", "head"): "codes are told by the dtype",
    ("role", "norm", "vector"): "a norm by its class, a number in an nn.Sequential by its name",
    ("role", "norm", "bias"): "a norm by its class, a number in an nn.Sequential by its name",
}


@pytest.mark.parametrize("name", zoo())
def test_names_of_all_parameters_agree_with_modules(name):
    model = zoo()[name]()
    expected, found = classify(model), by_names_alone(model)
    assert [row.name for row in expected] == list(found)
    for row in expected:
        alone = found[row.name]
        assert alone.shape == row.shape and alone.heads == () and not alone.centred
        assert alone.view in ("auto", "batch", "flatten")
        if ("role", row.role, alone.role) in UNTOLD_BY_NAMES:
            assert row.role == "quantised" or alone.rule == row.rule
            continue
        if ("part", row.part, alone.part) not in UNTOLD_BY_NAMES:
            assert (alone.name, alone.part) == (row.name, row.part)
        assert (alone.name, alone.role, alone.rule) == (row.name, row.role, row.rule)
        assert (alone.name, alone.pair) == (row.name, row.pair)
        if alone.side is not None and not row.view.startswith("transposed"):
            assert (alone.name, alone.side) == (row.name, row.side)


def test_what_stands_beside_a_name_decides():
    layer = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8)}
    layer |= {"gate": (20, 8), "up": (20, 8), "down": (8, 20)}
    names = {f"blocks.0.{word}.weight": shape for word, shape in layer.items()}
    found = table_by_names([("tok.weight", (50, 8)), *names.items()])
    assert found["tok.weight"].part == "token"
    rows = [found[name] for name in names]
    parts = ["query", "key", "value", "out", "gate", "up", "down"]
    assert [row.part for row in rows] == parts
    assert [row.side for row in rows] == ["cols"] * 3 + ["rows"] + ["cols"] * 2 + ["rows"]
    assert found["blocks.0.gate.weight"].pair == "blocks.0.up.weight"
    assert found["blocks.0.up.weight"].pair == "blocks.0.gate.weight"
    alone = [route(name, shape) for name, shape in names.items()]
    assert {row.part for row in alone} == {""}, "one name sees nothing beside itself"


def test_wrappers_in_names_hide_nothing():
    names = [
        "_orig_mod.module.blocks.0._fsdp_wrapped_module.gate.base_layer.weight",
        "_orig_mod.module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.up.weight",
        "_orig_mod.module.blocks.0._fsdp_wrapped_module.down.parametrizations.weight.original1",
    ]
    gate, up, down = route_all(names, [(20, 8), (20, 8), (8, 20)])
    assert (gate.part, up.part, down.part) == ("gate", "up", "down")
    assert [gate.name, up.name, down.name] == names
    assert (gate.pair, up.pair, down.pair) == (names[1], names[0], None)
    tied = route_all(["module.lm_head.weight", "lm_head_norm.weight"], [(9, 4), (4,)])
    assert [row.role for row in tied] == ["head", "norm"]


# Rows of which one name alone says something else than the model: (role, role of route) -> names.
TOLD_BY_MODULES = {
    "convnext-v2": {("norm", "vector"): 2, ("norm", "bias"): 2},  # norms in an nn.Sequential
    "mobilenet-v3": {
        ("norm", "vector"): 5,
        ("norm", "bias"): 5,
        ("hidden", "head"): ["classifier.0.weight"],  # of two layers in a row
    },
}


@pytest.mark.parametrize("name", families.OF_IMAGES_AND_SOUND)
def test_one_name_alone_says_what_the_model_does_but_for(name):
    left = {
        key: rows if type(rows) is int else [*rows]
        for key, rows in TOLD_BY_MODULES.get(name, {}).items()
    }
    for row in classify(families.OF_IMAGES_AND_SOUND[name]()):
        alone = route(row.name, row.shape)
        if alone.role == row.role:
            assert alone.rule == row.rule
        elif row.role == "norm":
            assert alone.rule == "adamw"
            left[row.role, alone.role] -= 1
        else:
            left[row.role, alone.role].remove(row.name)
    assert not any(left.values())


def test_names_may_be_missing_or_contradict_each_other():
    rows = route_all([None, "a", "a.b", "a.b.weight", "a..c", None], [(3, 4)] * 6)
    assert [row.name for row in rows] == [None, "a", "a.b", "a.b.weight", "a..c", None]
    assert {(row.role, row.rule) for row in rows} == {("hidden", "matrix")}
    assert route_all([], []) == []


def test_heads_by_the_names_of_all_parameters():
    tok, block = ("tok.weight", (50, 8)), ("h.0.up.weight", (50, 8))
    found = table_by_names([tok, block, ("final.weight", (50, 8))])
    assert (found["final.weight"].role, found["final.weight"].part) == ("head", "vocabulary")
    assert found["final.weight"].why == "2-D with the 50 outputs of a vocabulary"
    assert found["h.0.up.weight"].role == "hidden"
    layers = [(f"classifier.{i}.weight", s) for i, s in ((0, (16, 8)), (3, (16, 16)), (6, (9, 16)))]
    assert [row.role for row in table_by_names(layers).values()] == ["hidden", "hidden", "head"]
    heads = [(f"heads.{i}.weight", (50, 8)) for i in range(2)]
    assert {row.role for row in table_by_names([tok, *heads]).values()} == {"embedding", "head"}
    fc = table_by_names([("fc.weight", (16, 8)), ("out.weight", (2, 16))])
    assert fc["fc.weight"].role == "hidden"
    moe = [("mlp.gate.weight", (4, 8)), ("mlp.experts.0.up.weight", (6, 8))]
    assert table_by_names(moe)["mlp.gate.weight"].role == "router"


def test_sides_of_weights_that_are_stored_transposed_are_not_made_up():
    """Conv1D of GPT-2: names do not tell, but a reader whose rows are the stream does."""
    found = by_names_alone(gpt2())
    assert found["transformer.h.0.attn.c_attn.weight"].side == "rows"
    assert found["transformer.h.0.attn.c_proj.weight"].side is None


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


def test_columns_that_say_nothing_are_left_out():
    table = classify(byte_model(d=24))
    head = table.to_markdown().splitlines()[0]
    assert head == (
        "| name | shape | role | rule | why | view | part | side | heads | pair | centred |"
    )
    printed = str(table).splitlines()
    assert printed[0].split() == [
        *("name", "shape", "role", "rule", "part", "side", "heads", "centred", "why")
    ]
    query = next(line for line in printed if line.startswith("blocks.0.q."))
    assert query.split()[1:] == "24 x 24 hidden matrix query cols 4 nn.Linear".split()


def test_diff_names_what_a_place_says():
    model = byte_model(d=24)
    changed = classify(model, {"blocks.0.q.weight": {"heads": (2,)}})
    ((name, before, after),) = classify(model).diff(changed)
    assert (name, before.heads, after.heads) == ("blocks.0.q.weight", (4,), (2,))


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


class Around(nn.Module):
    """What a trainer puts around a network."""

    def __init__(self, name, net, **beside):
        super().__init__()
        for key, module in {name: net, **beside}.items():
            self.add_module(key, module)


@pytest.mark.parametrize("name", ["net", "vit", "network", "_model", "student", "encoder"])
def test_a_module_around_the_model_changes_no_role(name):
    model = Around("embeddings", nn.Linear(12, 8), blocks=nn.Linear(8, 8), head=nn.Linear(8, 5))
    alone = {row.name: (row.role, row.rule, row.part) for row in classify(model)}
    assert alone["head.weight"][0] == "head"
    once = Around(name, model, loss=nn.CrossEntropyLoss())
    twice = Around("module", Around("trained", once))
    for around, prefix in ((once, f"{name}."), (twice, f"module.trained.{name}.")):
        rows = {
            row.name.removeprefix(prefix): (row.role, row.rule, row.part)
            for row in classify(around)
        }
        assert rows == alone
