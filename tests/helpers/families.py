"""Model families as readable tables: how they are written, and a module tree made from one again.

The rebuilt tree has the classes, attributes, names and shapes of the real model and no forward.
"""

import json
import re
import types

import torch
from torch import nn

from stiefel.optimizers._roles import role_table
from stiefel.optimizers._roles.classify import classify

_COUNTS = {name for names in role_table.COUNTS.values() for name in names}
_SWITCHES = {"is_transposed", "is_concatenated", *role_table.SCORES}
_CONFIG = _COUNTS | {
    "vocab_size",
    *role_table.SHIFTS,
    *role_table.ROUTER_SHIFTS,
    *role_table.SCORES,
}


# --------------------------------------------------------------------------------- real models


def transformers_models():
    """Name -> function that makes the tiny random model; needs transformers."""
    import transformers as hf

    text = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = {**text, "head_dim": 8}
    moe = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    local = {"num_local_experts": 6, "num_experts_per_tok": 2}
    t5 = {"vocab_size": 96, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    t5 |= {"relative_attention_num_buckets": 10}
    gpt2 = {"vocab_size": 96, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 32}
    gpt2 |= {"bos_token_id": 1, "eos_token_id": 2}
    vit = {"image_size": 8, "patch_size": 4, "num_labels": 7, **text}
    for name in ("num_key_value_heads", "vocab_size", "max_position_embeddings"):
        del vit[name]
    made = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", wide),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", wide),
        "qwen2-moe": (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            {**wide, **moe, "shared_expert_intermediate_size": 28},
        ),
        "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**wide, **moe}),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", wide),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", wide),
        "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**text, **moe, "intermediate_size": 20}),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**wide, **local}),
        # r = d: only the class tells in which order the experts are stored
        "gpt-oss": (
            "GptOssForCausalLM",
            "GptOssConfig",
            {**wide, **local, "intermediate_size": 24},
        ),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", text),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt2),
        "vit": ("ViTForImageClassification", "ViTConfig", vit),
        "t5": ("T5ForConditionalGeneration", "T5Config", t5),
        "t5-gated": (
            "T5ForConditionalGeneration",
            "T5Config",
            {**t5, "feed_forward_proj": "gated-gelu"},
        ),
    }

    def make(device, model, config, options):
        with torch.device(device):
            return getattr(hf, model)(getattr(hf, config)(**options))

    return {
        f"hf-{name}": (lambda device="meta", args=args: make(device, *args))
        for name, args in made.items()
    }


# ------------------------------------------------------------------------------------ as a table


def describe(model, source):
    """The text of a fixture: where the model is from, its modules, and its table."""
    lines = [f"{type(model).__name__}: {source}.", ""]
    head = _output_head(model)
    if head:
        lines.append(f"- output head: `{head}`")
    config = getattr(model, "config", None) or getattr(model, "args", None)
    known = {n: getattr(config, n) for n in sorted(_CONFIG) if isinstance(_plain(config, n), _JSON)}
    if known:
        lines.append(f"- configuration: `{json.dumps(known)}`")
    lines += ["", "| module | class | attributes |", "|---|---|---|"]
    lines += [f"| {path} | {cls} | {attributes} |" for path, cls, attributes in _modules(model)]
    return "\n".join([*lines, "", classify(model).to_markdown()])


_JSON = (int, float, str)


def _plain(thing, name):
    value = getattr(thing, name, None)
    return value if isinstance(value, _JSON) else None


def _output_head(model):
    try:
        layer = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is layer), None)


def _class_name(module):
    cls = type(module)
    public = next(c for c in cls.__mro__ if getattr(nn, c.__name__, None) is c)
    if public is cls:
        return f"nn.{cls.__name__}"
    return cls.__name__ if public is nn.Module else f"{cls.__name__}(nn.{public.__name__})"


def _modules(model):
    """Path, class and attributes of the modules that hold something; N is every number."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or not any(True for _ in module.parameters()):
            continue
        names = sorted((_COUNTS | _SWITCHES) & vars(module).keys())
        attributes = " ".join(
            f"{n}={vars(module)[n]}" for n in names if _plain(module, n) is not None
        )
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", path)
        found.setdefault(pattern, []).append((path, _class_name(module), attributes))
    for pattern, entries in found.items():
        alike = len({entry[1:] for entry in entries}) == 1
        yield from [(pattern, *entries[0][1:])] if alike else entries


# ----------------------------------------------------------------------------------- as a model


def table_of(text):
    """The part of a fixture that `to_markdown` wrote."""
    return text[text.index("| name |") :]


def _cells(text, first):
    """The rows of a table of the fixture as dicts; no cell of these tables holds a "|"."""
    head, _, *rows = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    split = [[cell.strip() for cell in row[1:-1].split("|")] for row in (head, *rows)]
    return [dict(zip(split[0], row, strict=True)) for row in split[1:]]


def rebuild(text):
    """A module tree from a fixture: meta parameters under the same names, classes, attributes."""
    kinds = {row["module"]: row for row in _cells(text, "module")}
    head = re.search(r"output head: `(.*)`", text)
    methods = {"get_output_embeddings": lambda self: self.get_submodule(head[1])} if head else {}
    model = _empty(text.partition(":")[0], methods)
    config = re.search(r"configuration: `(.*)`", text)
    if config:
        model.config = types.SimpleNamespace(**json.loads(config[1]))
    for row in _cells(text, "name"):
        shape = [] if row["shape"] == "scalar" else [int(x) for x in row["shape"].split(" x ")]
        p = nn.Parameter(torch.empty(shape, device="meta"))
        for name in [row["name"], *filter(None, row.get("aliases", "").split(", "))]:
            path, _, leaf = name.rpartition(".")
            _module(model, path, kinds).register_parameter(leaf, p)
    return model


def _module(model, path, kinds):
    """The module at a path, made with all that is above it where it is missing."""
    at = model
    for i, child in enumerate(names := path.split(".") if path else []):
        if child not in at._modules:
            here = ".".join(names[: i + 1])
            row = kinds.get(here) or kinds[re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", here)]
            made = _empty(row["class"])
            for name, value in (pair.split("=") for pair in row["attributes"].split()):
                made.__dict__[name] = _read(value)
            at.add_module(child, made)
        at = at._modules[child]
    return at


def _read(value):
    if value in ("True", "False"):
        return value == "True"
    return int(value) if value.isdigit() else value


def _empty(cls, methods=()):
    """A module of a class by name, `nn.X`, `Y` or `Y(nn.X)`, that was never set up."""
    name, _, base = cls.rstrip(")").partition("(")
    base = getattr(nn, (base or name).removeprefix("nn."), nn.Module)
    kind = base if name.startswith("nn.") else type(name, (base,), dict(methods))
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


# ------------------------------------------------------- families that are no part of transformers


def _parts(**modules):
    return nn.ModuleDict(modules)


def _linear(m, n):
    return nn.Linear(n, m, bias=False)


class CausalSelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.c_attn, self.c_proj, self.n_head = nn.Linear(d, 3 * d), nn.Linear(d, d), heads


def nanogpt(d=24, heads=4, vocabulary=50):
    """One projection for q, k, v as a plain linear layer, a tied head, learned positions."""
    block = _parts(
        ln_1=nn.LayerNorm(d),
        attn=CausalSelfAttention(d, heads),
        ln_2=nn.LayerNorm(d),
        mlp=_parts(c_fc=nn.Linear(d, 4 * d), c_proj=nn.Linear(4 * d, d)),
    )
    body = _parts(
        wte=nn.Embedding(vocabulary, d),
        wpe=nn.Embedding(16, d),
        h=nn.ModuleList([block]),
        ln_f=nn.LayerNorm(d),
    )
    model = _parts(transformer=body, lm_head=_linear(vocabulary, d))
    model["lm_head"].weight = body["wte"].weight
    return model


class Attention(nn.Module):
    def __init__(self, d, heads, kv, size):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = heads, kv, size
        self.wq, self.wo = _linear(heads * size, d), _linear(d, heads * size)
        self.wk, self.wv = _linear(kv * size, d), _linear(kv * size, d)


class GroupedExperts(nn.Module):
    def __init__(self, count, d, r):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(count, r, d))
        self.w2 = nn.Parameter(torch.zeros(count, d, r))
        self.w3 = nn.Parameter(torch.zeros(count, r, d))


class TokenChoiceTopKRouter(nn.Module):
    def __init__(self, d, count):
        super().__init__()
        self.gate, self.score_func = _linear(count, d), "sigmoid"


def torchtitan(experts=0, d=24, r=40):
    """tok_embeddings, attention.wq, feed_forward.w1, output; experts in stacks, sigmoid router."""

    def swiglu():
        return _parts(w1=_linear(r, d), w2=_linear(d, r), w3=_linear(r, d))

    block = _parts(
        attention=Attention(d, 4, 2, 8), attention_norm=nn.RMSNorm(d), ffn_norm=nn.RMSNorm(d)
    )
    if experts:
        block["moe"] = _parts(
            experts=GroupedExperts(experts, d, 20),
            router=TokenChoiceTopKRouter(d, experts),
            shared_experts=swiglu(),
        )
    else:
        block["feed_forward"] = swiglu()
    return _parts(
        tok_embeddings=nn.Embedding(96, d),
        layers=_parts(**{"0": block}),
        norm=nn.RMSNorm(d),
        output=_linear(96, d),
    )


class MixtralSparseMoeBlock(nn.Module):
    def __init__(self, count, d, r):
        super().__init__()
        self.gate = _linear(count, d)
        self.experts = nn.ModuleList(
            _parts(w1=_linear(r, d), w2=_linear(d, r), w3=_linear(r, d)) for _ in range(count)
        )


def linear_experts(d=24):
    """Mixtral before transformers 5: a linear layer per expert and matrix."""
    layer = _parts(block_sparse_moe=MixtralSparseMoeBlock(3, d, 40))
    body = _parts(embed_tokens=nn.Embedding(96, d), layers=nn.ModuleList([layer]))
    return _parts(model=body, lm_head=_linear(96, d))


class LoRALinear(nn.Module):
    """The layout of peft: a frozen layer, here in 4-bit codes, and two factors by adapter."""

    def __init__(self, d, out, r=2):
        super().__init__()
        codes = torch.zeros(d * out // 2, 1, dtype=torch.uint8)
        self.base_layer = _linear(out, d)
        self.base_layer.weight = nn.Parameter(codes, requires_grad=False)
        self.lora_A, self.lora_B = _parts(default=_linear(r, d)), _parts(default=_linear(out, r))
        self.lora_magnitude_vector = _parts(default=nn.Module())
        self.lora_magnitude_vector["default"].weight = nn.Parameter(torch.zeros(out))


def qlora(d=24):
    """Adapters beside quantised attention weights, and one beside the head."""
    attention = _parts(**{f"{x}_proj": LoRALinear(d, d) for x in "qkvo"})
    body = _parts(embed_tokens=nn.Embedding(96, d), layers=nn.ModuleList([attention]))
    return _parts(base_model=_parts(model=body, lm_head=LoRALinear(d, 96)))


# ------------------------------------------------------------------------- of images and of sound


class Bare(nn.Module):
    """A module without a type that tells: layers, and parameters of its own by name and shape."""

    def __init__(self, layers=(), **shapes):
        super().__init__()
        for name, layer in dict(layers).items():
            self.add_module(name, layer)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class GRN(Bare):
    """Global response normalisation of ConvNeXt V2."""


class ConvBlock(Bare):
    """A block whose class name says convolution and whose own parameters are none."""


class RelPosBias(Bare):
    """A table of relative positions."""


def vit(d=24):
    """Vision transformer in the style of timm: tokens, positions and layer scale are bare."""
    attn = _parts(
        qkv=nn.Linear(d, 3 * d), q_norm=nn.LayerNorm(6), proj=nn.Linear(d, d), norm=nn.LayerNorm(d)
    )
    layers = {
        "norm1": nn.LayerNorm(d),
        "attn": attn,
        "ls1": Bare(gamma=(d,)),
        "norm2": nn.LayerNorm(d),
        "mlp": _parts(fc1=nn.Linear(d, 40), fc2=nn.Linear(40, d)),
        "ls2": Bare(gamma=(d,)),
    }
    return Bare(
        {
            "patch_embed": _parts(proj=nn.Conv2d(3, d, 4, stride=4)),
            "blocks": nn.ModuleList([_parts(**layers)]),
            "norm": nn.LayerNorm(d),
            "head": nn.Linear(d, 7),
        },
        cls_token=(1, 1, d),
        reg_token=(1, 4, d),
        pos_embed=(1, 9, d),
    )


def convnext(d=24):
    """ConvNeXt V2 as published, and a layer scale in the block itself, as in its first version."""
    block = {
        "dwconv": nn.Conv2d(d, d, 7, padding=3, groups=d),
        "norm": nn.LayerNorm(d),
        "pwconv1": nn.Linear(d, 4 * d),
        "grn": GRN(gamma=(1, 1, 1, 4 * d), beta=(1, 1, 1, 4 * d)),
        "pwconv2": nn.Linear(4 * d, d),
    }
    stem = nn.Sequential(nn.Conv2d(3, d, 4, stride=4), nn.LayerNorm(d))
    down = nn.Sequential(nn.LayerNorm(d), nn.Conv2d(d, 2 * d, 2, stride=2))
    return _parts(
        downsample_layers=nn.ModuleList([stem, down]),
        stages=nn.ModuleList([nn.Sequential(ConvBlock(block, gamma=(d, 1, 1)))]),
        norm=nn.LayerNorm(2 * d),
        head=nn.Linear(2 * d, 7),
    )


def mobilenet(d=16):
    """MobileNet V3 in the style of torchvision: depthwise kernels, squeeze and excitation."""

    def conv(m, n, size, groups=1):
        layer = nn.Conv2d(m, n, size, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(n), nn.Hardswish())

    excite = _parts(fc1=nn.Conv2d(4 * d, d, 1), fc2=nn.Conv2d(d, 4 * d, 1))
    block = nn.Sequential(
        conv(d, 4 * d, 1), conv(4 * d, 4 * d, 3, 4 * d), excite, conv(4 * d, d, 1)
    )
    return _parts(
        features=nn.Sequential(conv(3, d, 3), _parts(block=block), conv(d, 2 * d, 3, groups=4)),
        classifier=nn.Sequential(nn.Linear(2 * d, 40), nn.Hardswish(), nn.Linear(40, 7)),
    )


def levit(d=24, heads=4):
    """LeViT: one bias for each head and offset; a gain for each head beside it."""

    def linear_norm(m, n):
        return _parts(c=nn.Linear(m, n, bias=False), bn=nn.BatchNorm1d(n))

    layers = {
        "qkv": linear_norm(d, 3 * d),
        "proj": nn.Sequential(nn.Hardswish(), linear_norm(d, d)),
    }
    attention = Bare(layers, attention_biases=(heads, 16), head_scale=(heads, 1, 1))
    mlp = _parts(ln1=linear_norm(d, 2 * d), ln2=linear_norm(2 * d, d))
    return _parts(
        stem=_parts(conv1=_parts(c=nn.Conv2d(3, d, 3, bias=False), bn=nn.BatchNorm2d(d))),
        stages=nn.ModuleList([_parts(attn=attention, mlp=mlp)]),
        head=_parts(bn=nn.BatchNorm1d(d), l=nn.Linear(d, 7)),
    )


def swin(d=24, heads=4):
    """Swin and BEiT: tables of relative positions, an absolute one with channels first."""
    attn = Bare(
        {"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)},
        relative_position_bias_table=(49, heads),
        logit_scale=(heads, 1, 1),
    )
    block = _parts(attn=attn, mlp=_parts(fc1=nn.Linear(d, 40), fc2=nn.Linear(40, d)))
    layer = _parts(
        blocks=nn.ModuleList([block]), downsample=_parts(reduction=_linear(2 * d, 4 * d))
    )
    return Bare(
        {
            "patch_embed": _parts(proj=nn.Conv2d(3, d, 4)),
            "layers": nn.ModuleList([layer]),
            "rel_pos_bias": RelPosBias(relative_position_bias_table=(49, heads)),
            "head": nn.Linear(2 * d, 7),
        },
        absolute_pos_embed=(1, d, 5, 5),
        mask_token=(1, d, 1, 1),
    )


def _resblock(d):
    return _parts(
        attn=nn.MultiheadAttention(d, 4),
        ln_1=nn.LayerNorm(d),
        mlp=_parts(c_fc=nn.Linear(d, 4 * d), c_proj=nn.Linear(4 * d, d)),
        ln_2=nn.LayerNorm(d),
    )


def clip(d=24):
    """CLIP as published: two towers, positions and projections that are bare and 2-D."""
    visual = Bare(
        {
            "conv1": nn.Conv2d(3, d, 4, stride=4, bias=False),
            "ln_pre": nn.LayerNorm(d),
            "transformer": _parts(resblocks=nn.ModuleList([_resblock(d)])),
            "ln_post": nn.LayerNorm(d),
        },
        class_embedding=(d,),
        positional_embedding=(10, d),
        proj=(d, 16),
    )
    layers = {
        "visual": visual,
        "transformer": _parts(resblocks=nn.ModuleList([_resblock(d)])),
        "token_embedding": nn.Embedding(96, d),
        "ln_final": nn.LayerNorm(d),
    }
    return Bare(layers, positional_embedding=(12, d), text_projection=(d, 16), logit_scale=())


def whisper(d=24):
    """Whisper as published: two convolutions over time, bare positions, layers by number."""

    def attention():
        layers = {x: nn.Linear(d, d, bias=x != "key") for x in ("query", "key", "value", "out")}
        return _parts(**layers)

    def block(*more):
        mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        layers = {"attn": attention(), "attn_ln": nn.LayerNorm(d), "mlp": mlp}
        layers |= {"mlp_ln": nn.LayerNorm(d), **{name: attention() for name in more}}
        return _parts(**layers)

    encoder = _parts(
        conv1=nn.Conv1d(8, d, 3),
        conv2=nn.Conv1d(d, d, 3),
        blocks=nn.ModuleList([block()]),
        ln_post=nn.LayerNorm(d),
    )
    layers = {
        "token_embedding": nn.Embedding(96, d),
        "blocks": nn.ModuleList([block("cross_attn")]),
        "ln": nn.LayerNorm(d),
    }
    return _parts(encoder=encoder, decoder=Bare(layers, positional_embedding=(12, d)))


OF_IMAGES_AND_SOUND = {
    "timm-vit": vit,
    "convnext-v2": convnext,
    "mobilenet-v3": mobilenet,
    "levit": levit,
    "swin": swin,
    "clip": clip,
    "whisper": whisper,
}
OWN_FAMILIES = {
    **OF_IMAGES_AND_SOUND,
    "nanogpt": nanogpt,
    "qlora": qlora,
    "torchtitan": torchtitan,
    "torchtitan-moe": lambda: torchtitan(experts=5),
    "linear-experts": linear_experts,
}
