"""Tables that find role, part and residual side of a parameter by its place in a model.

Three tables, asked in this order: :data:`ROLE_TABLE` for the role, :data:`PART_TABLE` for the part,
and the counts that configurations and attention modules hold, under the names of :data:`COUNTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class ParamSite:
    """One place where a parameter is registered, with everything that the tables look at."""

    name: str
    shape: tuple[int, ...]
    owners: tuple[nn.Module, ...] = ()  # its module, the module around that, ..., the model;
    # of a NameTree where only names are known
    head: str = ""  # why the structure of the model makes this its output head
    stored: str = ""  # what the parameter holds if it is no plain floating tensor
    width: int | None = None  # of the residual stream as the embeddings tell it
    vocabularies: frozenset[int] = frozenset()  # numbers of rows of the embeddings
    is_lazy: bool = False  # not initialised yet: the shape is not known, and ()

    @property
    def module(self) -> nn.Module | None:
        """The module that the parameter belongs to; None where only names are known."""
        known = self.owners and not isinstance(self.owners[0], NameTree)
        return self.owners[0] if known else None

    @property
    def parent(self) -> nn.Module | None:
        """The module around the parameter's module."""
        return self.owners[1] if len(self.owners) > 1 else None

    @property
    def ndim(self) -> int:
        """Number of dimensions; of a lazy parameter that which its module gives it, else 0."""
        return lazy_ndim(self) if self.is_lazy else len(self.shape)

    @property
    def leaf(self) -> str:
        """The last component of the name."""
        return self.name.rpartition(".")[2]

    @cached_property
    def plain_name(self) -> str:
        """The name without what wrappers and parametrizations add."""
        return _WRAPPERS.sub("", _PARAMETRIZED.sub(r"\1\2", self.name))

    @cached_property
    def is_bare(self) -> bool:
        """Whether the parameter has a name of its own: it is nobody's "weight"."""
        return self.plain_name.rpartition(".")[2] != "weight"

    @cached_property
    def parts(self) -> list[str]:
        """The components of the plain name without a last "weight"."""
        return self.plain_name.removesuffix(".weight").split(".")

    @property
    def word(self) -> str:
        """The last component that names the parameter."""
        return self.parts[-1]

    @cached_property
    def head_name(self) -> str:
        """The components of the name that mark an output head, "" if there are none."""
        return _head_name(self)

    @property
    def kind(self) -> str:
        """The module's class, torch's own ones by their public name."""
        cls = type(self.module)
        if cls.__module__.startswith("torch."):
            cls = next((c for c in cls.__mro__ if getattr(nn, c.__name__, None) is c), cls)
        public = getattr(nn, cls.__name__, None) is cls
        return f"nn.{cls.__name__}" if public else cls.__name__

    @property
    def list_parts(self) -> list[str]:
        """The components without the number that a parameter, or a table, has in a list of them."""
        *above, word = self.parts
        numbered = above and word.isdigit() and (self.is_bare or _LISTS.fullmatch(above[-1]))
        return above if numbered else self.parts

    @property
    def list_word(self) -> str:
        """The last component that is no number in a list."""
        return self.list_parts[-1]

    @cached_property
    def siblings(self) -> dict[str, nn.Module | nn.Parameter | None]:
        """Modules and parameters registered beside the word, by name, the word's own included."""
        for owner in self.owners:
            if self.word in owner._modules or self.word in owner._parameters:
                return {**owner._modules, **owner._parameters}
        return {}

    def name_matches(self, pattern: re.Pattern[str], last: int = 0) -> bool:
        """Whether one of the last components of the name, or any (0), is the pattern."""
        return any(map(pattern.fullmatch, self.parts[-last:]))

    def is_instance(self, pattern: str, *classes: type[nn.Module]) -> bool:
        """Whether the module is of these classes, or its class is named like the pattern."""
        named = re.search(pattern, type(self.module).__name__)
        return isinstance(self.module, classes) or named is not None

    def has_sibling(self, pattern: str) -> bool:
        """Whether a module or parameter beside the word has a name of this pattern."""
        return any(re.fullmatch(pattern, name) for name in self.siblings if name != self.word)

    def config_values(self, *names: str) -> Iterator[Any]:
        """Values of these names in the configurations around, nearest first."""
        for owner in self.owners:
            for config in (getattr(owner, "config", None), getattr(owner, "args", None)):
                yield from (getattr(config, name) for name in names if hasattr(config, name))

    def count(self, what: str) -> int | None:
        """Look up one of :data:`COUNTS` in the modules around (but the width), then in configs."""
        names = COUNTS[what]
        near = (
            []
            if what == "width"
            else [vars(owner).get(n) for owner in self.owners[:3] for n in names]
        )
        found = (x for x in (*near, *self.config_values(*names)) if type(x) is int and x > 0)
        return next(found, self.width if what == "width" else None)


class NameTree(nn.Module):
    """The modules that names tell: they have children and parameters on the meta device, no class.

    Names that contradict each other are no error, the last one counts.
    """

    def add(self, name: str, shape: tuple[int, ...]) -> tuple[nn.Module, ...]:
        """Register a parameter; return its owners, innermost first."""
        *path, leaf = name.split(".")
        owners: list[nn.Module] = [self]
        for child in path:
            inner = owners[0]._modules.get(child) or NameTree()
            owners[0]._modules[child] = inner
            owners.insert(0, inner)
        weight = torch.empty(shape, device="meta", dtype=torch.float32)
        owners[0]._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
        return tuple(owners)


COUNTS = {
    "width": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim"),
    "head_dim": ("head_dim", "key_value_proj_dim", "attention_head_size", "d_kv"),
    "value_dim": ("v_head_dim",),
    "heads": ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head"),
}
"""Names of attributes of configurations and modules, by what they count."""
SHIFTS = ("final_logit_softcapping", "logit_softcapping", "z_loss", "z_loss_weight")
"""Attributes of configurations that, if set, make the loss depend on the mean of the logits."""
ROUTER_SHIFTS = ("router_z_loss_coef", "z_loss_coef", "z_loss")
SCORES = ("scoring_func", "score_func", "score_function")
"""Attributes that name the function which turns a router's logits into weights."""

# Components of names, whole. Patches and times are embedded by projections, not looked up.
_NOUNS = r"(emb|embeds?|embeddings?)"
_POSITIONS = re.compile(
    rf"(\w+_)?pos(itions?|itional)?_({_NOUNS}|enc|encodings?)\d*(_(?!\w*(proj|mlp|conv|norm)$)\w+)?"
    r"|(\w+_)?rel(ative)?_pos(?!\w*(proj|mlp|conv)$)\w*|rel(ative)?_(height|width|[hwkv])"
    r"|(\w+_)?(attention|attn|pos(ition)?|rel(ative)?)_bias(es)?(_table)?"
    rf"|rel(ative)?_{_NOUNS}(_[hwkv])?|emb_rel_[kv]|(height|width)_rel"
    rf"|(row|col|column|height|width|temporal|spatial|freq)_{_NOUNS}"
    r"|pos|pe|rpb|rpe(_table)?|wpe|W_pos|embed_positions|distance_embedding"
)
# What a parameter of its own, which is no module's "weight", may be called in addition.
_BARE_POSITIONS = re.compile(r"(\w+_)?(pos|positions?|pe)\d*")
# What a table may be called in a module that is named as positions are.
_TABLES = re.compile(rf"{_NOUNS}|table|pe")
_WORDS = rf"((\w+_)?(tok|token|word)_{_NOUNS}|tok|wte|W_E|embed_tokens)(_table|_layer)?"
# Lists of tables: a number follows.
_LISTS = re.compile(rf"{_WORDS}|(\w+_)?(embs|embeds|embeddings|tokens|queries|prompts)")
_EMBEDDINGS = re.compile(
    rf"((\w+_)?(tok|token|word|type|segment|class|value|query|src|tgt|bos)_)?{_NOUNS}"
    r"|(?!(\w+_)?(patch|t|time|timestep|image|img|pixel)_)\w*embeddings?(_table|_layer)?"
    r"|(?!(\w+_)?(to|patch)_)\w+_tokens?|(\w+_)?queries|codebook"
    r"|tok|wte|W_E|embed_tokens|embed_in"
)
_BARE_EMBEDDINGS = re.compile(
    rf"(\w+_)?({_NOUNS}|tokens?|queries|latents?|registers?|prompts?|prototypes?|centroids?|slots?"
    r"|codebooks?|anchors?|reference_points|probe|memory)_?\d*|latent_array|cls|ctx"
    r"|(?!(w|W|proj|to|in)_)\w+_query"
)
# Bare parameters that are no matrices: rates of a recurrence, and gains where they are one row.
_RATES = re.compile(r"A_logs?|time_(decay|first|faaaa)")
_GAINS = re.compile(r"(\w+_)?(scale|gamma|beta|alpha|gain|lambda|ls)s?_?\d*")
_HEADS = re.compile(r"lm_?head|unembed|unembedding|embed_out|W_U")
# These, and T5's "shared", count only at the top: inside a block an "output" is something else.
_TOP_HEADS = re.compile(r"(\w+_)?heads?(_dist)?|output|classifier|score|fc|(to_)?logits|qa_outputs")
# What may follow: "head.fc", "classifier.6", "v_head.summary".
_HEAD_ENDS = re.compile(r"\d+|fc|l|proj|out_proj|linear|summary|decoder")
_CLASSES = re.compile(r"classifier|score|(value|reward|critic|v|q\d?)(_head)?")
_TOP_MODULES = {
    "model",
    "base_model",
    "language_model",
    "transformer",
    "decoder",
    "backbone",
    "heads",
}

_NORM = re.compile(r"(?i)\w*norm(_\w+|\d+)?|(\w+_)?(ln|bn|gn)(_\w+|\d+)?")
_BIAS = re.compile(r"bias|\w+_bias|bias_\w+|(pos|rel)_bias_[uv]")
LORA_FACTOR = re.compile(r"(?i)lora_(embedding_)?[ab]")
_PROJECTIONS = re.compile(r"(\w+_)?proj(ection)?")
_CONV_NAMES = re.compile(r"(?i)\w*conv\w*")
_EXPERTS = re.compile(r"(\w+_)?experts?")
_SHARED_GATE = re.compile(r"shared_expert_gate|shared_gate")
_PARAMETRIZED = re.compile(r"\bparametrizations\.(\w+)\.original\d*$|\b(weight)_(v|orig)$")
_WRAPPERS = re.compile(
    r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|original_module|modules_to_save\.\w+)\."
)
UNKNOWN_ROLE = "nothing else known"
UNINITIALISED = "not initialised yet"
UNKNOWN_ORIENTATION = "stored (in, out) or (out, in) is not known"


def shape_of(p: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, () for a lazy one that is not initialised and for a nested one."""
    return () if is_lazy(p) or p.is_nested else tuple(p.shape)


def lazy_ndim(s: ParamSite) -> int:
    """Number of sides that the module gives a parameter, 0 if nothing tells."""
    if _BIAS.fullmatch(s.leaf):
        return 1
    if isinstance(s.module, nn.modules.conv._ConvNd):
        return 2 + len(s.module.kernel_size)
    return 2 if s.leaf == "weight" and (is_linear(s) or is_embedding(s)) else 0


def is_linear(s: ParamSite) -> bool:
    """Whether the module is a linear layer, also a quantized one."""
    return s.is_instance("Linear$", nn.Linear)


def is_embedding(s: ParamSite) -> bool:
    """Whether the module is a lookup table."""
    return s.is_instance("Embedding$", nn.Embedding, nn.EmbeddingBag) and not is_linear(s)


def may_be_linear(s: ParamSite) -> bool:
    """Whether the weight is that of a linear layer, or has the name and the sides of one."""
    named = s.module is None and s.ndim == 2 and not s.is_bare and not _names_embedding(s)
    return is_linear(s) or named


def _is_word_table(s: ParamSite) -> bool:
    """Whether an embedding is a table that is looked up by the number of a word or token."""
    table = is_embedding(s) or (s.module is None and not s.is_bare)
    return s.ndim == 2 and (table or re.fullmatch(_WORDS, s.list_word) is not None)


def _is_position(s: ParamSite) -> bool:
    """Whether this is a table of positions, by its name or by the class of the lookup table."""
    return names_position(s) or (is_embedding(s) and s.is_instance("Position|PosEmb|PosEnc"))


def is_token_table(s: ParamSite) -> bool:
    """Whether this is an embedding whose rows are words: by its module, or by its name alone."""
    found = is_embedding(s) or (s.module is None and not s.is_bare and _names_embedding(s))
    return found and len(s.shape) == 2 and not _is_position(s)


def _is_row(s: ParamSite) -> bool:
    """Whether only one side has more than one entry."""
    return prod(s.shape) == max(s.shape, default=0)


def _is_vector(s: ParamSite) -> bool:
    """Whether a tensor of three or more dimensions has one side only: a gain, stored to broadcast.

    Two dimensions say that a matrix is meant, even if it is 1 x n.
    """
    return s.ndim > 2 and _is_row(s) and not s.name_matches(LORA_FACTOR)


def _is_conv(s: ParamSite) -> bool:
    """Whether this is the kernel of a convolution: of torch's, or of a class that is called so.

    A block of that name has parameters of other kinds beside its layers.
    """
    if s.ndim < 3 or isinstance(s.module, nn.modules.conv._ConvNd):
        return s.ndim > 2
    return s.is_instance("Conv") and not (s.is_bare and s.owners[0]._modules)


def _is_depthwise(s: ParamSite) -> bool:
    """Whether a convolution has a kernel for each channel alone: its matrices are 1 x k.

    The module's counts decide. Without them the shape of the kernel does, (channels, 1, ...).
    """
    if not _is_conv(s) or s.name_matches(LORA_FACTOR):
        return False
    groups, channels = (getattr(s.module, name, None) for name in ("groups", "in_channels"))
    if type(groups) is int and type(channels) is int:
        return groups == channels and (groups > 1 or s.shape[:1] == (1,))
    return s.shape[1:2] == (1,)


def _has_rows_only(s: ParamSite) -> bool:
    """Whether the matrices of a stack or of a convolution are single rows, by its shape."""
    return s.ndim > 2 and s.shape[1:2] == (1,) and not s.name_matches(LORA_FACTOR)


def _names_conv(s: ParamSite) -> bool:
    """Whether the name and the number of sides are those of a convolution; without a module."""
    named = s.ndim == 3 and not s.is_bare and s.name_matches(_CONV_NAMES)
    return s.module is None and (s.ndim > 3 or named)


def names_position(s: ParamSite) -> bool:
    """Whether the name is that of a table of positions."""
    *above, word = s.list_parts
    named = _POSITIONS.fullmatch(word) or (s.is_bare and _BARE_POSITIONS.fullmatch(word))
    inside = above and _TABLES.fullmatch(word) and _POSITIONS.fullmatch(above[-1])
    return bool(named or inside)


def _names_embedding(s: ParamSite) -> bool:
    """Whether the name is that of positions, tokens or queries; of many sides if it is bare."""
    *above, word = s.list_parts
    if word == "query" and s.owners:  # a projection has bare keys beside it
        bare = {name for name, thing in s.siblings.items() if isinstance(thing, Tensor)}
        return word in bare and bare.isdisjoint(("key", "value"))
    named = _EMBEDDINGS.fullmatch(word) or (s.is_bare and _BARE_EMBEDDINGS.fullmatch(word))
    shared = word == "shared" and _TOP_MODULES.issuperset(above)
    return bool(named or shared or names_position(s)) and (s.is_bare or s.ndim < 4)


def _is_bare_embedding(s: ParamSite) -> bool:
    return s.ndim > 2 and s.is_bare and _names_embedding(s)


def _names_projection(s: ParamSite) -> bool:
    return s.ndim == 2 and _PROJECTIONS.fullmatch(s.word) is not None


def _has_first_side_1(s: ParamSite) -> bool:
    """Whether this is one row of a batch, as positions and queries are stored."""
    bare = s.module is not None or (s.name != "" and s.is_bare)
    return s.ndim > 2 and s.shape[:1] == (1,) and bare


def _names_bias(s: ParamSite) -> bool:
    """Whether the name is that of a bias; biases of positions are tables."""
    return _BIAS.fullmatch(s.leaf) is not None and (s.ndim < 2 or not names_position(s))


def names_head(s: ParamSite) -> bool:
    """Whether the name is an output head's."""
    return s.head_name != ""


def _head_name(s: ParamSite) -> str:
    """The components of the name that say head, "" if there are none."""
    if s.ndim != 2:
        return ""
    *above, word = s.parts[_wrapper_depth(s) :]
    top = _TOP_MODULES.issuperset(above)
    if _HEADS.fullmatch(word) or (top and word == "value" and s.shape[:1] == (1,)):
        return word
    if top and _TOP_HEADS.fullmatch(word) and (word != "fc" or _is_last(s)):
        return word
    if not above or not _HEAD_ENDS.fullmatch(word):
        return ""
    *above, base = above
    named = _HEADS.fullmatch(base) or (
        _TOP_MODULES.issuperset(above) and _TOP_HEADS.fullmatch(base)
    )
    generates = base == "generator" and not above and not word.isdigit()
    predicts = base == "predictions" and word == "decoder"
    # of several layers in a row only the last is the head
    if (named and _is_last(s)) or generates or predicts:
        return f"{base}.{word}"
    return ""


def _wrapper_depth(s: ParamSite) -> int:
    """Number of modules at the top of the model that hold one module and nothing else.

    What a trainer puts around a network, ``self.net = net``, is no part of its structure.
    """
    depth = 0
    for owner in reversed(s.owners[1:]):
        if isinstance(owner, NameTree) or not _is_wrapper(owner):
            break
        depth += not _WRAPPERS.match(f"{next(_holding(owner))}.")
    return min(depth, len(s.parts) - 1)


def _holding(module: nn.Module) -> Iterator[str]:
    """Names of the children that have parameters."""
    return (
        name
        for name, child in module._modules.items()
        if child is not None and next(child.parameters(), None) is not None
    )


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module has no parameters but those of one child, which has a forward."""
    own = any(p is not None for p in module._parameters.values())
    children = [*_holding(module)]
    lists = nn.ModuleList | nn.ModuleDict | nn.Sequential
    if own or len(children) != 1 or isinstance(module, lists):
        return False
    inner = module._modules[children[0]]
    return inner is not None and not isinstance(inner, lists) and bool(inner._modules)


def _is_last(s: ParamSite) -> bool:
    """Whether no matrix is registered after the word: a head feeds none."""
    around = next((owner for owner in s.owners if s.word in owner._modules), nn.ModuleList())
    if isinstance(around, nn.ModuleList):
        return True
    modules = list(around._modules.items())
    after = modules[[name for name, _ in modules].index(s.word) + 1 :]
    matrices = (
        p for _, m in after if m is not None for p in m.parameters() if len(shape_of(p)) > 1
    )
    if isinstance(around, NameTree) and s.word.isdigit():
        # a list of heads, or layers in a row: names do not tell, so what the next one takes does
        return all(shape_of(p)[1:] != s.shape[:1] for p in list(matrices)[:1])
    return not any(True for _ in matrices)


def _names_router(s: ParamSite) -> bool:
    # A "gate" is a router beside experts, or inside one, only: SwiGLU has a gate as well.
    beside = hasattr(s.parent, "experts") or "experts" in s.siblings
    near = beside or s.parts[-2:-1] == ["router"]
    named = (near and s.word in ("gate", "wg")) or s.word == "router"
    return s.ndim == 2 and named and s.count("experts") in (None, *s.shape[:1])


_OTHER_HIDDEN = (nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
RULE_OF_ROLE = {
    **dict.fromkeys(("hidden", "conv", "expert", "router"), "matrix"),
    **dict.fromkeys(("embedding", "head", "norm", "bias", "vector", "quantised"), "adamw"),
    "depthwise": "adamw",
}
"""The rule of each role."""


def decay_factor(role: str | None) -> float:
    """Factor on the weight decay where a module is given as ``params``: 0 for vectors, else 1."""
    return 0.0 if role in ("norm", "bias", "vector") else 1.0


# The first line whose test holds gives role, view and reason. `route` asks without modules: there
# the lines about modules never hold, and "N-D" is the last line.
ROLE_TABLE: tuple[tuple[str, str, str, Callable[[ParamSite], object]], ...] = (
    ("quantised", "auto", "{s.stored}: no weight to train", lambda s: s.stored),
    ("vector", "auto", "no elements", lambda s: 0 in s.shape),
    ("norm", "auto", "{s.kind}", lambda s: s.is_instance(r"Norm\d*d?$")),
    ("norm", "auto", "{s.ndim}-D, norm by name", lambda s: s.ndim < 2 and s.name_matches(_NORM, 2)),
    ("bias", "auto", "{s.ndim}-D, bias by name", _names_bias),
    ("vector", "auto", UNKNOWN_ROLE, lambda s: s.is_lazy and s.ndim < 1),
    ("vector", "auto", "{s.ndim}-D", lambda s: s.ndim < 2),
    ("vector", "auto", "name component '{s.leaf}'", lambda s: _RATES.fullmatch(s.leaf)),
    ("vector", "auto", "one side only", lambda s: _GAINS.fullmatch(s.leaf) and _is_row(s)),
    ("vector", "auto", "lengths of weight_norm", lambda s: s.leaf in ("weight_g", "original0")),
    ("embedding", "auto", "{s.kind}", is_embedding),
    ("hidden", "auto", "2-D, LoRA factor", lambda s: s.ndim == 2 and s.name_matches(LORA_FACTOR)),
    ("head", "auto", "{s.head}", lambda s: s.head),
    ("head", "auto", "name component '{s.head_name}'", names_head),
    ("vector", "auto", "gate of a shared expert", lambda s: s.name_matches(_SHARED_GATE, 1)),
    ("router", "auto", "name component '{s.word}'", _names_router),
    ("embedding", "auto", "name component '{s.list_word}'", _is_bare_embedding),
    ("vector", "auto", "{s.ndim}-D, one side only", _is_vector),
    ("depthwise", "flatten", "{s.kind}, a kernel for each channel alone", _is_depthwise),
    ("conv", "flatten", "{s.kind}", _is_conv),
    ("hidden", "transposed", "{s.kind}, (in, out)", lambda s: s.is_instance("^Conv1D$")),
    ("hidden", "auto", "{s.kind}", lambda s: is_linear(s) or isinstance(s.module, _OTHER_HIDDEN)),
    ("embedding", "auto", "name component '{s.list_word}'", _names_embedding),
    ("expert", "batch", "3-D, experts by name", lambda s: s.ndim == 3 and s.name_matches(_EXPERTS)),
    ("embedding", "auto", "{s.ndim}-D, first side 1", _has_first_side_1),
    ("depthwise", "flatten", "{s.ndim}-D, second side 1: rows of a kernel", _has_rows_only),
    ("conv", "flatten", "{s.ndim}-D", _names_conv),
    ("hidden", "auto", "{s.ndim}-D", lambda s: s.module is None),
    ("vector", "auto", "one side only", _is_row),
    ("hidden", "auto", "name component '{s.word}'", _names_projection),
    ("expert", "batch", "3-D stack", lambda s: s.ndim == 3),
    ("conv", "flatten", "{s.ndim}-D, " + UNKNOWN_ROLE, lambda s: s.ndim > 3),
    ("hidden", "auto", "{s.ndim}-D, " + UNKNOWN_ROLE, lambda s: True),
)

_QUERIES = r"q|w_?q|q_proj|query|c_attn|w?qkv|W_?qkv|qkv_proj|to_q|k|c_q|query_key_value"
# Part, its words (or the last components), and what must be registered beside it where the word
# alone could mean anything.
PART_TABLE: tuple[tuple[str, str, str], ...] = (
    ("qkv", r"qkv(_proj)?|w_?qkv|Wqkv|to_qkv|c_attn|in_proj_weight", ""),
    ("qkv", r"query_key_value|linear_qkv", ""),
    ("query", r"(q|query)_proj(_weight)?|query|w_?q|W_Q|to_q|q_lin|c_q", ""),
    ("key", r"(k|key)_proj(_weight)?|w_?k|W_K|to_k|k_lin|c_k", ""),
    ("value", r"(v|value)_proj(_weight)?|w_?v|W_V|to_v|v_lin|c_v", ""),
    ("query", "q", "k|v"),
    ("key", "k|key", "q|query"),
    ("value", "v|value", "q|query"),
    ("out", r"o_proj|out_proj|W_O|out_lin", ""),
    ("out", r"o|w_?o|c_proj|proj|dense|to_out|out", _QUERIES),
    ("out", r"attention\.output\.dense", ""),
    ("up", r"intermediate\.dense", ""),
    ("down", r"output\.dense", ""),
    ("gate_up", r"gate_up(_proj)?|gate_and_up_proj", ""),
    ("gate", r"gate_proj|w_gate|wi_0", ""),
    ("gate", "gate", "up"),
    ("gate", "w1", "w3"),
    ("up", r"up_proj|w_up|wi_1|wi|c_fc|fc_in|dense_h_to_4h", ""),
    ("up", r"up|w1|w3|fc1|lin1|linear1", r"down|w2|fc2|lin2|linear2"),
    ("down", r"down_proj|w_down|fc_out|dense_4h_to_h", ""),
    ("down", r"down|w2|fc2|lin2|linear2", r"up|w1|fc1|lin1|linear1"),
    ("down", r"wo|c_proj", r"wi|wi_1|c_fc"),
)
_PARTNERS = {"gate": "up", "up": "gate"}
WRITERS = {"out", "down", "patch"}
"""Parts that write to the residual stream: its width is the rows of (out, in). Others read it."""
# Query, key and value of a head, or of a group, beside each other: no run of rows is all queries.
BY_HEAD = re.compile("query_key_value|linear_qkv")
_INTERLEAVED = re.compile("^GptOss")
_HALVES = re.compile(r"^(Qwen|Mixtral|Olmoe|Deepseek|Glm4|Llama4|Phi|Ernie|Jamba)\w*Experts$")
_TRANSPOSED_EXPERTS = re.compile("^(GptOss|Llama4Text)")
# Routers whose weights are a softmax of the logits: a constant added to all of them is lost.
_SOFTMAX = re.compile(r"^(Mixtral|Qwen2Moe|Qwen3Moe|Olmoe|GptOss)")


def part_of(s: ParamSite, role: str) -> str:
    """Part of the parameter in its layer, "" if that is not known."""
    if role == "embedding":
        return "position" if _is_position(s) else "token" if _is_word_table(s) else ""
    if role == "head":
        known = s.vocabularies.union(x for x in s.config_values("vocab_size") if x is not None)
        base = s.head_name.partition(".")[0]
        if s.head or _HEADS.fullmatch(base):
            return "vocabulary"
        classes = known.isdisjoint(s.shape[:1]) or _CLASSES.fullmatch(base)
        return "classes" if classes else "vocabulary"
    if role == "conv":
        return "patch" if any("patch" in part for part in s.parts) else ""
    if role not in ("hidden", "expert") or s.name_matches(LORA_FACTOR):
        return ""
    ends = {".".join(s.parts[-i:]) for i in (1, 2, 3)}
    for part, words, sibling_words in PART_TABLE:
        if any(re.fullmatch(words, end) for end in ends) and (
            not sibling_words or s.has_sibling(sibling_words)
        ):
            return part
    return ""


def partner_name(s: ParamSite, part: str) -> str | None:
    """The name of the up projection of a gate, or of the gate of an up projection."""
    if part not in _PARTNERS:
        return None
    wanted = [words for other, words, _ in PART_TABLE if other == _PARTNERS[part]]
    before = s.name.rpartition(s.word)[0]
    for word, thing in s.siblings.items():
        if word == s.word or not any(re.fullmatch(words, word) for words in wanted):
            continue
        if isinstance(thing, Tensor):
            return before + word
        for name, p in thing.named_parameters(word) if thing is not None else ():
            if (
                ParamSite(name, ()).parts == [word] and shape_of(p) == s.shape
            ):  # also if it is wrapped
                return before + name
    return None


def is_stored_transposed(s: ParamSite, part: str) -> bool | None:
    """Whether a stack of experts is stored (in, out); None if nothing tells."""
    declared = getattr(s.module, "is_transposed", None)
    if declared is not None or s.is_instance(_TRANSPOSED_EXPERTS.pattern):
        return declared is not False
    rows, cols = s.shape[-2:]
    width = s.count("width")
    if width in (rows, cols) and rows != cols:
        return (rows == width) != (part in WRITERS)
    shapes = {
        part_of(ParamSite(n, tuple(p.shape), s.owners), "expert"): p.shape[-2:]
        for n, p in s.siblings.items()
        if isinstance(p, Tensor) and p.ndim == 3
    }
    up = next((shapes[k] for k in ("gate_up", "up", "gate") if k in shapes), None)
    down, fused = shapes.get("down"), 2 if "gate_up" in shapes else 1
    if up is None or down is None:
        return None
    plain = up[1] == down[0] and up[0] == fused * down[1]
    transposed = up[0] == down[1] and up[1] == fused * down[0]
    return None if plain == transposed else transposed


def fused_view(s: ParamSite, part: str, m: int, n: int) -> str:
    """The view that cuts a fused weight m x n (out, in) into what it is made of, "" if none."""
    if part == "qkv" and not BY_HEAD.fullmatch(s.word):
        heads, size = s.count("heads"), s.count("head_dim")
        size = size or (n // heads if heads else None)
        kv = s.count("kv_heads") or heads
        if heads and size and kv and (heads + 2 * kv) * size == m:
            return f"rows:{heads * size},{kv * size},{kv * size}"
        return f"rows:{m // 3},{m // 3},{m // 3}" if m == 3 * n else ""
    if part == "gate_up" and m % 2 == 0:
        concatenated = getattr(s.module, "is_concatenated", None)
        if concatenated is False or s.is_instance(_INTERLEAVED.pattern):
            return "interleaved"
        if concatenated or s.ndim == 2 or s.is_instance(_HALVES.pattern):
            return f"rows:{m // 2},{m // 2}"
    return ""


def heads_of(s: ParamSite, part: str, sizes: list[int]) -> tuple[int, ...]:
    """Number of heads in each of these runs of rows (of columns for "out"), () if not known."""
    if part not in ("query", "key", "value", "qkv", "out"):
        return ()
    heads, size = s.count("heads"), s.count("head_dim")
    if part in ("value", "out"):
        size = s.count("value_dim") or size
    if size is None and heads:
        width = s.count("width") or (0 if part in ("key", "value") else sizes[0])
        size = width // heads
    if not size or any(x % size for x in sizes):
        return ()
    found = tuple(x // size for x in sizes)
    declared = heads if part in ("query", "out", "qkv") else s.count("kv_heads")
    return found if declared in (None, found[0]) else ()


def residual_side(s: ParamSite, part: str, m: int, n: int) -> str | None:
    """Which side of the weight m x n (out, in) is the residual stream: "rows", "cols", None."""
    width = s.count("width")
    if width not in (m, n):
        return None
    if m != n:
        return "rows" if m == width else "cols"
    return None if not part else "rows" if part in WRITERS else "cols"


def is_centred(s: ParamSite, role: str, part: str, m: int) -> bool:
    """Whether a constant vector added to every one of m rows leaves the loss as it was."""
    if m == 1:  # a loss that a single logit reaches feels it, and a row less its mean is zero
        return False
    if role == "head":
        return part == "vocabulary" and not any(s.config_values(*SHIFTS))
    if role != "router" or any(s.config_values(*ROUTER_SHIFTS)):
        return False
    scores = [getattr(owner, name, None) for owner in s.owners[:3] for name in SCORES]
    named = next((str(x) for x in (*scores, *s.config_values(*SCORES)) if x is not None), None)
    if named is not None:
        return "softmax" in named
    return any(_SOFTMAX.search(type(owner).__name__) for owner in s.owners[:2])
