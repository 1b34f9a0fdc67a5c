"""Which rows of which weights make the queries and keys of an attention module, head by head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from .classify import Row, classify, sites_of
from .role_table import BY_HEAD, LORA_FACTOR, ParamSite

__all__ = ["Attention", "Attentions", "HeadRows"]

_QUERY_UP = re.compile(r"q_b_proj|wq_b|q_up(_proj)?|linear_q_up_proj|linear_q_proj|w_?uq|W_UQ")
_KEY_VALUE_UP = re.compile(r"kv_b_proj|wkv_b|kv_up(_proj)?|linear_kv_up_proj|w_?ukv|W_UKV")
_HEAD_NORM = re.compile(
    r"(q|k|qk|query|key)_?(layer_?)?(norm|ln)|(layer_?)?(norm|ln)_?(q|k|qk|query|key)"
)
_NO_ORDER = re.compile("CodeGen")
"""Classes whose fused weight lies in an order of its own."""
_PARTS = ("query", "key", "qkv")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LATENT_SIZES = (
    ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
)
"""Names of the sizes of a head in a latent attention: content, position, values."""

Piece = tuple[str, int, int]
"""What rows are (``"query"``, ``"key"``, ``"rotary"`` or ``"rest"``), of how many heads, and how
many of each head."""


@dataclass(frozen=True)
class HeadRows:
    """The rows of a parameter (or its columns, stored (in, out)) in runs of heads.

    Attributes:
        name: Name of the parameter in the model.
        dim: Its dimension along which the rows lie.
        groups: How often the pieces follow each other.
        pieces: What one group is made of, in order.
    """

    name: str
    dim: int
    groups: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Attention:
    """An attention module: its heads and the parameters that make queries and keys.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of key heads, each of which serves as many query heads in a row.
        parameters: The parameters, biases included.
    """

    heads: int
    kv_heads: int
    parameters: tuple[HeadRows, ...]


class Attentions:
    """All attention modules of a model, as far as they hold weights of queries and keys."""

    def __init__(self, model: nn.Module) -> None:
        self.params = dict(model.named_parameters(remove_duplicate=False))
        self.norms = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if _HEAD_NORM.fullmatch(name.rpartition(".")[2])
            and "Identity" not in type(module).__name__
        }
        sites = sites_of(model)
        self.by_place: dict[str, list[tuple[Row, ParamSite]]] = {}
        for row in classify(model).rows:
            for site in sites.get(row.name or "", []):
                if _part(row, site):
                    place = ".".join(_plain(site.name).removesuffix(".weight").split(".")[:-1])
                    self.by_place.setdefault(place, []).append((row, site))

    def find(self, name: str, heads: int) -> Attention:
        """The queries and keys of one attention module.

        Args:
            name: Name of the module in the model.
            heads: Number of its query heads.

        Raises:
            ValueError: If the module is unknown, holds no or several attentions, has other heads,
                or if scaling its weights would not scale its logits.
        """
        place = _plain(name)
        inside = [x for at, rows in self.by_place.items() if _is_in(at, place) for x in rows]
        if not inside:
            known = sorted(self.by_place)
            names = ", ".join(known[:4]) or "none"
            raise ValueError(
                f"max_logits names {name!r}, below which the model has no weights of queries and "
                f"keys; its attention modules are {names}{', ...' if len(known) > 4 else ''}"
            )
        return _attention(_Found(self, name, place, inside), heads)


@dataclass(frozen=True)
class _Found:
    """What there is below the module of a name."""

    model: Attentions
    name: str
    place: str
    rows: list[tuple[Row, ParamSite]]

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return self.model.params

    def refuse(self, text: str) -> NoReturn:
        raise ValueError(f"attention module {self.name!r}: {text}")

    def one(self, part: str) -> tuple[Row, ParamSite] | None:
        """The only weight of a part; several of them make it unclear which is meant."""
        found = [(row, site) for row, site in self.rows if _part(row, site) == part]
        if len(found) > 1:
            names = ", ".join(str(row.name) for row, _ in found)
            self.refuse(
                f"has several weights for {part}: {names}; name the module of one attention"
            )
        return found[0] if found else None

    def size(self, site: ParamSite, name: str) -> int | None:
        """A count by name, in the modules around or in their configurations."""
        near = (vars(owner).get(name) for owner in site.owners[:3])
        found = (x for x in (*near, *site.config_values(name)) if type(x) is int and x > 0)
        return next(found, None)


def _attention(at: _Found, heads: int) -> Attention:
    """The layout of the weights that were found."""
    for row, site in at.rows:
        _refuse_weight(at, row, site)
    latent = at.one("key_value_up")
    parts = {part: at.one(part) for part in ("query", "key", "qkv", "query_up")}
    if latent is not None:
        found = _latent(at, parts["query_up"] or parts["query"], latent, heads)
    elif parts["qkv"] is not None and parts["query"] is None and parts["key"] is None:
        found = _fused(at, *parts["qkv"], heads)
    elif parts["query"] is not None and parts["key"] is not None and parts["qkv"] is None:
        found = _apart(at, parts["query"], parts["key"], heads)
    else:
        names = ", ".join(str(row.name) for row, _ in at.rows)
        at.refuse(f"needs one weight of queries and one of keys, or one of both, and has {names}")
    _refuse_norms(at, latent is not None)
    return found


def _is_in(name: str, place: str) -> bool:
    """Whether a name is that of a place or of what is below it."""
    return not place or f"{name}.".startswith(f"{place}.")


def _plain(name: str) -> str:
    """A name without what wrappers add."""
    return ".".join(x for x in name.split(".") if x not in _WRAPPERS)


def _part(row: Row, site: ParamSite) -> str:
    """The part of a weight, with those of a latent attention; "" for all other weights."""
    if row.role in ("norm", "bias", "vector") or site.name_matches(LORA_FACTOR):
        return ""
    if _KEY_VALUE_UP.fullmatch(site.word):
        return "key_value_up"
    if _QUERY_UP.fullmatch(site.word):
        return "query_up"
    if BY_HEAD.fullmatch(site.word):
        return "qkv"
    return row.part if row.part in _PARTS else ""


# what is refused ----------------------------------------------------------------------------------


def _refuse_weight(at: _Found, row: Row, site: ParamSite) -> None:
    """Raise for a weight whose scaling would not be that of the logits of this module alone."""
    if row.aliases:
        at.refuse(f"{row.name} is also {row.aliases[0]}; weights that are shared cannot be clipped")
    if row.role == "quantised" or not at.params[site.name].is_floating_point():
        at.refuse(f"{row.name} holds codes ({row.why}), which cannot be scaled")
    own = site.name.removesuffix(".weight")
    if "parametrizations." in site.name or re.search(r"weight_(v|g|orig)$", site.name):
        at.refuse(f"{row.name} is parametrized; remove the parametrization before clipping")
    own = own.removesuffix(".base_layer")
    factors = [
        other
        for other in at.params
        if other.startswith(f"{own}.") and re.search(r"(?i)(^|\.)lora_", other)
    ]
    if factors or ".base_layer." in f"{site.name}.":
        at.refuse(f"{row.name} has an adapter ({(factors or ['base_layer'])[0]}); merge it first")


def _refuse_norms(at: _Found, is_latent: bool) -> None:
    """Raise for a norm between projection and logits, after which scaled weights change nothing.

    In a latent attention norms of these names may lie before the projections, on the latent.
    """
    latents = {row.shape[-1] for row, _ in at.rows} if is_latent else set()
    for name, module in at.model.norms.items():
        sizes = {p.numel() for p in module.parameters()} or {_norm_size(module)}
        is_before = bool(latents) and sizes <= latents
        if _is_in(_plain(name).rpartition(".")[0], at.place) and not is_before:
            at.refuse(f"{name} normalizes queries or keys, so that scaled weights change no logit")
    for name in at.params:
        above, _, leaf = _plain(name).rpartition(".")
        if above == at.place and _HEAD_NORM.fullmatch(leaf.removesuffix("_weight")):
            at.refuse(f"{name} normalizes queries or keys, so that scaled weights change no logit")


def _norm_size(module: nn.Module) -> int:
    shape: Any = getattr(module, "normalized_shape", getattr(module, "dim", 0))
    return int(shape[-1] if isinstance(shape, tuple) and shape else shape or 0)


# layouts ------------------------------------------------------------------------------------------


def _check_heads(at: _Found, row: Row, heads: int, size: int) -> int:
    """Rows per head of ``size`` rows; refused where the model has another number of heads."""
    declared = row.heads[0] if row.heads else None
    if declared not in (None, heads) or size % heads:
        has = f"{declared} heads" if declared else f"{size} rows"
        at.refuse(f"max_logits has {heads} values, one per query head, but {row.name} has {has}")
    return size // heads


def _kv_heads(at: _Found, row: Row, heads: int, size: int, rows: int) -> int:
    """Number of key heads of ``rows`` rows in heads of ``size`` rows."""
    kv = rows // size
    if rows % size or not kv or heads % kv:
        at.refuse(f"{row.name} has {rows} rows of keys, which are no heads of {size} for {heads}")
    return kv


def _with_bias(
    at: _Found, row: Row, site: ParamSite, groups: int, pieces: tuple[Piece, ...]
) -> list[HeadRows]:
    """A weight and its biases, which have the rows of the weight."""
    name, p = site.name, at.params[site.name]
    dim = 1 if row.view.startswith("transposed") and p.ndim == 2 else 0
    found = [HeadRows(name, dim, groups, pieces)]
    above, _, leaf = name.rpartition(".")
    beside = f"{above}." if above else ""
    near = {"weight": ["bias"], "in_proj_weight": ["in_proj_bias"]}.get(leaf, [f"{leaf}_bias"])
    near += [leaf.replace("W_", "b_")] if leaf.startswith("W_") else []
    outer = above.rpartition(".")[0] if leaf == "weight" else above
    short = {"query": ("q_bias", "query_bias"), "key": ("k_bias", "key_bias"), "qkv": ("qkv_bias",)}
    others = [f"{outer}.{x}".lstrip(".") for x in short.get(_part(row, site), ())]
    for other in (*(beside + x for x in near), *others):
        if other in at.params and other != name:
            found.append(HeadRows(other, 0, groups, pieces))
    return found


def _rows_of(row: Row, p: Tensor) -> int:
    """Rows of a weight as (out, in)."""
    return p.shape[1] if row.view.startswith("transposed") else p.shape[0]


def _apart(
    at: _Found, query: tuple[Row, ParamSite], key: tuple[Row, ParamSite], heads: int
) -> Attention:
    """Queries and keys in weights of their own: every head attends, groups of them share a key."""
    (row, site), (key_row, key_site) = query, key
    Q, K = at.params[site.name], at.params[key_site.name]
    if Q.ndim == 3 or K.ndim == 3:  # (heads, in, out) or (heads, out, in)
        if Q.ndim != 3 or K.ndim != 3 or Q.shape[0] != heads or heads % K.shape[0]:
            at.refuse(f"{row.name} and {key_row.name} have no matrix for each of {heads} heads")
        size, kv = 1, K.shape[0]
    else:
        size = _check_heads(at, row, heads, _rows_of(row, Q))
        kv = _kv_heads(at, key_row, heads, size, _rows_of(key_row, K))
    found = _with_bias(at, row, site, 1, (("query", heads, size),))
    found += _with_bias(at, key_row, key_site, 1, (("key", kv, size),))
    if site.leaf == "q_proj_weight":  # of nn.MultiheadAttention, whose bias is one
        bias = site.name.removesuffix("q_proj_weight") + "in_proj_bias"
        pieces: tuple[Piece, ...] = (("query", heads, size), ("key", kv, size))
        if bias in at.params:
            rest = at.params[bias].numel() - (heads + kv) * size
            found.append(HeadRows(bias, 0, 1, (*pieces, ("rest", 1, rest))))
    return Attention(heads, kv, (*found, *_appended_keys(at, site, kv, size)))


def _appended_keys(at: _Found, site: ParamSite, kv: int, size: int) -> list[HeadRows]:
    """The key that ``nn.MultiheadAttention(add_bias_kv=True)`` appends."""
    name = f"{site.name.rpartition('.')[0]}.bias_k".lstrip(".")
    p = at.params.get(name)
    return [] if p is None else [HeadRows(name, p.ndim - 1, 1, (("key", kv, size),))]


def _fused(at: _Found, row: Row, site: ParamSite, heads: int) -> Attention:
    """Queries, keys and values in one weight: one after the other, or group by group."""
    p = at.params[site.name]
    if p.ndim != 2:
        at.refuse(f"{row.name} of shape {tuple(p.shape)} is no matrix of rows")
    rows = _rows_of(row, p)
    by_group = _lies_by_group(site)
    owners = site.owners[:3]
    is_known = not by_group and not any(_NO_ORDER.match(type(x).__name__) for x in owners)
    cut = row.view.rpartition("rows:")[2] if "rows:" in row.view and is_known else ""
    if cut:
        sizes = [int(x) for x in cut.split(",")]
        size = _check_heads(at, row, heads, sizes[0])
        kv = _kv_heads(at, row, heads, size, sizes[1])
    else:
        size, kv = _sizes_of_uncut(at, row, site, heads, by_group)
    if by_group:
        pieces: tuple[Piece, ...] = (("query", heads // kv, size), ("key", 1, size))
        found = _with_bias(at, row, site, kv, (*pieces, ("rest", 1, size)))
    else:
        rest = rows - (heads + kv) * size
        pieces = (("query", heads, size), ("key", kv, size), ("rest", 1, rest))
        found = _with_bias(at, row, site, 1, pieces)
        above = site.name.rpartition(".")[0].rpartition(".")[0]
        found += _split_biases(at, above, heads, kv, size)
    return Attention(heads, kv, (*found, *_appended_keys(at, site, kv, size)))


def _lies_by_group(site: ParamSite) -> bool:
    """Whether queries, key and value of a group lie beside each other, by name or by class."""
    named = BY_HEAD.fullmatch(site.word) and not _is_set(site, "multi_query_attention")
    return bool(named) or any(re.match("InternLM2", type(x).__name__) for x in site.owners[:3])


def _is_set(site: ParamSite, flag: str) -> bool:
    """Whether a module around, or a configuration, says True."""
    near = (vars(owner).get(flag) for owner in site.owners[:3])
    return any(x is True for x in (*near, *site.config_values(flag)))


def _sizes_of_uncut(
    at: _Found, row: Row, site: ParamSite, heads: int, by_group: bool
) -> tuple[int, int]:
    """Rows of a head and number of key heads where no view cuts a fused weight."""
    p = at.params[site.name]
    rows = _rows_of(row, p)
    cols = p.numel() // rows
    size = site.count("head_dim") or (cols // heads if cols % heads == 0 else 0)
    kv = (rows - heads * size) // (2 * size) if size else 0
    one_key = kv == 1 and _is_set(site, "multi_query")
    is_told = by_group or one_key or _is_set(site, "multi_query_attention")
    fits = kv > 0 and (heads + 2 * kv) * size == rows and heads % kv == 0
    if not fits or not is_told or site.count("heads") not in (None, heads):
        at.refuse(
            f"which of the {rows} rows of {row.name} are queries and keys of {heads} heads is not "
            "known; give the module num_heads, num_key_value_heads and head_dim, or weights q_proj "
            "and k_proj"
        )
    declared = site.count("kv_heads")
    if declared not in (None, kv) and not one_key:
        at.refuse(f"{row.name} has {kv} key heads by its shape, but {declared} are declared")
    return size, kv


def _split_biases(at: _Found, above: str, heads: int, kv: int, size: int) -> list[HeadRows]:
    """Biases of queries and of keys by themselves, beside a weight of all."""
    pieces: dict[str, Piece] = {"q_bias": ("query", heads, size), "k_bias": ("key", kv, size)}
    names = {x: f"{above}.{x}".lstrip(".") for x in pieces}
    return [HeadRows(name, 0, 1, (pieces[x],)) for x, name in names.items() if name in at.params]


def _latent(
    at: _Found, query: tuple[Row, ParamSite] | None, up: tuple[Row, ParamSite], heads: int
) -> Attention:
    """Multi-head latent attention: content and position in each query head, content in each key.

    The position of the keys is shared by all heads and stays as it is, so that of the queries takes
    the whole factor.
    """
    row, site = up
    known = ([at.size(site, x) for x in names] for names in _LATENT_SIZES)
    sizes = next((found for found in known if all(found)), None)
    if query is None or sizes is None:
        needed = "qk_nope_head_dim, qk_rope_head_dim and v_head_dim in the module or its config"
        lacks = needed if query is not None else "a weight q_b_proj, wq_b or q_proj"
        at.refuse(f"{row.name} is that of a latent attention, which needs {lacks}")
    content, position, value = (int(x or 0) for x in sizes)
    for weight, per_head in ((query[0], content + position), (row, content + value)):
        p = at.params[str(weight.name)]
        if _rows_of(weight, p) != heads * per_head:
            at.refuse(
                f"max_logits has {heads} values, one per query head, but {weight.name} has "
                f"{_rows_of(weight, p)} rows in heads of {per_head}"
            )
    found = _with_bias(at, *query, heads, (("query", 1, content), ("rotary", 1, position)))
    found += _with_bias(at, row, site, heads, (("key", 1, content), ("rest", 1, value)))
    return Attention(heads, heads, tuple(found))
