"""Which parameter gets the optimizer's matrix rule, which gets AdamW, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import nn

__all__ = ["Assignment", "Row", "classify", "route"]


@dataclass(frozen=True)
class Row:
    """One parameter: its role, the rule it gets, the reason, and how it becomes matrices."""

    name: str | None
    shape: tuple[int, ...]
    role: str
    rule: str
    why: str
    view: str = "auto"

    def _cells(self) -> tuple[str, str, str, str, str]:
        shape = " x ".join(map(str, self.shape)) or "scalar"
        return self.name or "-", shape, self.role, self.rule, self.why


@dataclass(frozen=True)
class Assignment:
    """The table that `classify` returns: one `Row` per distinct parameter, in the model's order."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        table = [("name", "shape", "role", "rule", "why"), *(row._cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join([*lines, self._counts()])

    def to_markdown(self) -> str:
        """Return the table in Markdown, views included, and the closing line of counts."""
        lines = ["| name | shape | role | rule | why | view |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            cells = (cell.replace("|", "\\|") for cell in (*row._cells(), row.view))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", self._counts(), ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain lists, dicts and strings, fit for JSON."""
        return {"rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Assignment:
        """Read back what `to_dict` wrote."""
        return cls(tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in data["rows"]))

    def diff(self, other: Assignment) -> list[tuple[str, Row | None, Row | None]]:
        """Return (name, before, after) for each row that `other` has changed, added or lost.

        A row that one of the tables lacks is None there; rows without a name go by position.
        """
        old, new = (
            {row.name or f"#{i}": row for i, row in enumerate(table)} for table in (self, other)
        )
        names = dict.fromkeys([*old, *new])
        return [(k, old.get(k), new.get(k)) for k in names if old.get(k) != new.get(k)]

    def _counts(self) -> str:
        methods = sorted({row.rule for row in self.rows} - {"matrix", "adamw"}) or ["matrix"]
        sizes = {
            rule: [prod(row.shape) for row in self.rows if row.rule == rule]
            for rule in [*methods, "adamw"]
        }
        return "; ".join(f"{k}: {len(v)} parameters, {sum(v):,} elements" for k, v in sizes.items())


@dataclass(frozen=True)
class _Site:
    """One place where a parameter is registered: all that the decision table looks at."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module | None = None
    parent: nn.Module | None = None
    head: str = ""  # why the structure of the model makes this its output head

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def third(self) -> int:
        return self.shape[0] // 3

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parts(self) -> list[str]:
        """The components of the name without what wrappers add and without a last "weight"."""
        plain = _WRAPPERS.sub("", _PARAMETRIZED.sub(r"\1", self.name))
        return plain.removesuffix(".weight").split(".")

    @property
    def word(self) -> str:
        """The component that says what the parameter is."""
        return self.parts[-1]

    @property
    def kind(self) -> str:
        """The module's class, torch's own ones by their public name."""
        cls = type(self.module)
        if cls.__module__.startswith("torch."):
            cls = next((c for c in cls.__mro__ if getattr(nn, c.__name__, None) is c), cls)
        public = getattr(nn, cls.__name__, None) is cls
        return f"nn.{cls.__name__}" if public else cls.__name__

    def says(self, pattern: re.Pattern[str], last: int = 0) -> bool:
        """Whether one of the last components of the name, or any (0), is the pattern."""
        return any(map(pattern.fullmatch, self.parts[-last:]))

    def isa(self, pattern: str, *classes: type[nn.Module]) -> bool:
        """Whether the module is of these classes, or its class is named like the pattern."""
        named = re.search(pattern, type(self.module).__name__)
        return isinstance(self.module, classes) or named is not None


# Whole components of names. "patch_embed" or "time_embed" are not there: they are projections.
_NOUNS = ("emb", "embed", "embeds", "embedding", "embeddings")
_POSITIONS = {a + b for a in ("pos_", "position_", "positional_") for b in _NOUNS}
_POSITIONS |= {"wpe", "W_pos", "embed_positions", "relative_attention_bias"}
_OWNERS = ("", "tok_", "token_", "word_", "token_type_", "segment_", "class_", "value_")
_EMBEDDINGS = _POSITIONS | {a + b for a in _OWNERS for b in _NOUNS}
_EMBEDDINGS |= {"tok", "wte", "W_E", "embed_tokens", "embed_in", "cls_token", "mask_token"}
_HEADS = {"lm_head", "unembed", "unembedding", "embed_out", "W_U"}
# These, and T5's "shared", count only at the top: inside a block an "output" is something else.
_TOP_HEADS = {"head", "output", "classifier", "score"}
_TOPS = {"model", "base_model", "language_model", "transformer", "decoder", "backbone", "heads"}

_NORM = re.compile(r"(?i)\w*norm\d*|(ln|bn|gn)(_\w+|\d+)?")
_BIAS = re.compile(r"bias|\w+_bias|bias_\w+")
_LORA = re.compile(r"(?i)lora_(embedding_)?[ab]")
_EXPERTS = re.compile(r"(\w+_)?experts?")
_PARAMETRIZED = re.compile(r"\bparametrizations\.(\w+)\.original\d*$")
_WRAPPERS = re.compile(
    r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|original_module|modules_to_save\.\w+)\."
)
_UNKNOWN = "nothing else known"


def _linear(s: _Site) -> bool:
    return s.isa("Linear$", nn.Linear)


def _embedding(s: _Site) -> bool:
    return s.isa("Embedding$", nn.Embedding, nn.EmbeddingBag) and not _linear(s)


def _conv(s: _Site) -> bool:
    return s.ndim > 2 and s.isa("Conv")


def _names_embedding(s: _Site) -> bool:
    *above, word = s.parts
    return s.ndim < 4 and (word in _EMBEDDINGS or (word == "shared" and _TOPS.issuperset(above)))


def _names_head(s: _Site) -> bool:
    *above, word = s.parts
    return s.ndim == 2 and (word in _HEADS or (word in _TOP_HEADS and _TOPS.issuperset(above)))


def _names_router(s: _Site) -> bool:
    # A "gate" is a router beside experts only: SwiGLU has a gate as well.
    beside = s.word in ("gate", "wg") and hasattr(s.parent, "experts")
    return s.ndim == 2 and (beside or s.word == "router")


def _in_proj(s: _Site) -> bool:
    return isinstance(s.module, nn.MultiheadAttention) and s.word == "in_proj_weight"


_OTHER_HIDDEN = (nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_RULES = {
    **dict.fromkeys(("hidden", "conv", "expert", "router"), "matrix"),
    **dict.fromkeys(("embedding", "head", "norm", "bias", "vector"), "adamw"),
}

# The decision table: the first line whose test holds gives role, view and reason. `route` asks it
# without a module: there the lines about modules never hold, and "N-D" is the last line.
_TABLE: tuple[tuple[str, str, str, Callable[[_Site], object]], ...] = (
    ("vector", "auto", "no elements", lambda s: 0 in s.shape),
    ("norm", "auto", "{s.kind}", lambda s: s.isa(r"Norm\d*d?$")),
    ("norm", "auto", "{s.ndim}-D, norm by name", lambda s: s.ndim < 2 and s.says(_NORM, 2)),
    ("bias", "auto", "{s.ndim}-D, bias by name", lambda s: _BIAS.fullmatch(s.leaf)),
    ("vector", "auto", "{s.ndim}-D", lambda s: s.ndim < 2),
    ("vector", "auto", "lengths of weight_norm", lambda s: s.leaf in ("weight_g", "original0")),
    ("embedding", "auto", "{s.kind}", _embedding),
    ("hidden", "auto", "2-D, LoRA factor", lambda s: s.ndim == 2 and s.says(_LORA)),
    ("head", "auto", "{s.head}", lambda s: s.head),
    ("head", "auto", "name component '{s.word}'", _names_head),
    ("router", "auto", "name component '{s.word}'", _names_router),
    ("conv", "flatten", "{s.kind}", _conv),
    ("hidden", "rows:{s.third},{s.third},{s.third}", "{s.kind}, q k v", _in_proj),
    ("hidden", "transposed", "{s.kind}, (in, out)", lambda s: s.isa("^Conv1D$")),
    ("hidden", "auto", "{s.kind}", lambda s: _linear(s) or isinstance(s.module, _OTHER_HIDDEN)),
    ("embedding", "auto", "name component '{s.word}'", _names_embedding),
    ("expert", "batch", "3-D, experts by name", lambda s: s.ndim == 3 and s.says(_EXPERTS)),
    ("hidden", "auto", "{s.ndim}-D", lambda s: s.module is None),
    ("embedding", "auto", "{s.ndim}-D, first side 1", lambda s: s.ndim > 2 and s.shape[0] == 1),
    ("vector", "auto", "one side only", lambda s: s.ndim > 2 and prod(s.shape) == max(s.shape)),
    ("expert", "batch", "3-D stack", lambda s: s.ndim == 3),
    ("conv", "flatten", "{s.ndim}-D, " + _UNKNOWN, lambda s: s.ndim > 3),
    ("hidden", "auto", "2-D, " + _UNKNOWN, lambda s: True),
)


def _decide(sites: list[_Site]) -> Row:
    """Ask the table; of several places the one that the earliest line holds for decides."""
    own, *others = sites
    role, view, why, site = next(
        (role, view, why, site) for role, view, why, test in _TABLE for site in sites if test(site)
    )
    why = why.format(s=site)
    if site is not own:
        why = f"tied to {site.name} ({why})"
    elif others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        why = f"{why}; tied to {others[0].name}{more}"
    return Row(own.name, own.shape, role, _RULES[role], why, view.format(s=site))


def route(name: str | None, shape: tuple[int, ...]) -> Row:
    """Return the row of a parameter of which only the shape, and maybe the name, is known.

    Without a telling name, 0-D, 1-D and empty tensors get AdamW and all others the rule.
    """
    return replace(_decide([_Site(name or "", tuple(shape))]), name=name)


def classify(
    model: nn.Module, overrides: Mapping[str, str] | None = None, strict: bool = False
) -> Assignment:
    """Find the role of every parameter of a model.

    Module types decide first, then names, then shapes. A parameter registered under several names
    has one row, whose reason mentions another name. Frozen parameters have rows as well.

    Args:
        model: Any module. Only its tree and its shapes are read, so the meta device will do.
        overrides: Names or glob patterns, each with a role, or with "matrix" or "adamw", which
            keep the role and set the rule. The first that matches wins over everything else.
        strict: Raise if nothing but the number of dimensions could decide.

    Returns:
        The table, in the order of `model.named_parameters()`.

    Raises:
        ValueError: An override matches no parameter, or is no role, or asks for the matrix rule
            where there is no matrix; or `strict` is set and a role is a guess.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> print(classify(model, overrides={"1.bias": "vector"}))
        name      shape   role       rule    why
        0.weight  10 x 4  embedding  adamw   nn.Embedding
        1.weight  4 x 4   hidden     matrix  nn.Linear
        1.bias    4       vector     adamw   override '1.bias'
        2.weight  10 x 4  head       adamw   last nn.Linear with the 10 outputs of a vocabulary
        2.bias    10      bias       adamw   1-D, bias by name
        matrix: 1 parameters, 16 elements; adamw: 4 parameters, 94 elements
    """
    overrides = overrides or {}
    unused = dict(overrides)
    sites, rows = _sites(model), []
    for name, p in model.named_parameters():
        # The name given here is the one that counts: wrappers may shorten it.
        own, *others = sites.get(id(p)) or [_Site(name, tuple(p.shape), model)]
        row = _decide([replace(own, name=name), *others])
        names = (name, *(site.name for site in others))
        # Exact first: a name may hold characters that mean something in a glob.
        hits = [k for k in overrides if k in names or any(fnmatchcase(n, k) for n in names)]
        rows.append(_override(row, hits[0], overrides[hits[0]]) if hits else row)
        for pattern in hits:
            unused.pop(pattern, None)
    if unused:
        raise ValueError(f"overrides match no parameter: {', '.join(map(repr, unused))}")
    unsure = [f"{row.name} {row.shape}" for row in rows if _UNKNOWN in row.why]
    if strict and unsure:
        raise ValueError(f"no role found, give one in overrides: {', '.join(unsure)}")
    return Assignment(tuple(rows))


def _override(row: Row, pattern: str, choice: str) -> Row:
    """Apply a role or a rule that the caller chose; the view stays unless the role has its own."""
    if choice not in ("matrix", "adamw", *_RULES):
        known = ", ".join(("matrix", "adamw", *_RULES))
        raise ValueError(f"override {pattern!r}: {choice!r} is none of {known}")
    role, rule = (choice, _RULES[choice]) if choice in _RULES else (row.role, choice)
    if rule == "matrix" and (len(row.shape) < 2 or 0 in row.shape):
        raise ValueError(
            f"override {pattern!r}: {row.name} of shape {row.shape} is no matrix; give it 'adamw'"
        )
    own_view = {"conv": "flatten", "expert": "batch"} if len(row.shape) > 2 else {}
    return replace(
        row, role=role, rule=rule, view=own_view.get(choice, row.view), why=f"override {pattern!r}"
    )


def _sites(model: nn.Module) -> dict[int, list[_Site]]:
    """Map the id of each parameter to all places where it is registered, in the model's order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: dict[int, list[_Site]] = {}
    for path, module in modules.items():
        # A parametrized weight lives in a list below the module whose weight it is.
        path_of_owner = re.sub(r"(^|\.)parametrizations\..*", "", path)
        owner = modules[path_of_owner]
        parent = modules.get(path_of_owner.rpartition(".")[0])
        for name, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            sites.setdefault(id(p), []).append(_Site(name, tuple(p.shape), owner, parent))
    for key, why in _heads(model, sites).items():
        sites[key] = [replace(site, head=why) for site in sites[key]]
    return sites


def _heads(model: nn.Module, sites: dict[int, list[_Site]]) -> dict[int, str]:
    """Find an output head that neither its name nor a tie tells."""
    with suppress(AttributeError, NotImplementedError):
        weight = model.get_output_embeddings().weight  # type: ignore[operator]
        return {id(weight): "get_output_embeddings()"} if id(weight) in sites else {}
    places = [(key, site) for key, all_sites in sites.items() for site in all_sites]
    vocabularies = {s.shape[0] for _, s in places if _embedding(s) and s.word not in _POSITIONS}
    found = []
    for key, s in places:
        # A layer of a numbered block is no head, even if its width happens to equal a vocabulary.
        inside = s.says(_LORA) or re.search(r"(^|\.)[^\d.][^.]*\.\d+\.", ".".join(s.parts))
        if _linear(s) and s.ndim == 2 and s.shape[0] in vocabularies and not inside:
            found.append((key, s))
    tied_or_named = any(_names_head(s) or any(map(_embedding, sites[key])) for key, s in found)
    if not found or tied_or_named:
        return {}
    key, s = found[-1]
    return {key: f"last {s.kind} with the {s.shape[0]} outputs of a vocabulary"}
