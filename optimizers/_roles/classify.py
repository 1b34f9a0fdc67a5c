"""Which parameter gets the optimizer's matrix rule, which gets AdamW, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, overload

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .role_table import (
    LORA_FACTOR,
    ROLE_TABLE,
    RULE_OF_ROLE,
    UNINITIALISED,
    UNKNOWN_ORIENTATION,
    UNKNOWN_ROLE,
    WRITERS,
    NameTree,
    ParamSite,
    fused_view,
    heads_of,
    is_centred,
    is_embedding,
    is_linear,
    is_stored_transposed,
    is_token_table,
    may_be_linear,
    names_head,
    part_of,
    partner_name,
    residual_side,
    shape_of,
)

__all__ = ["Assignment", "Row", "classify", "guessed_shape", "route", "route_all", "sites_of"]


@dataclass(frozen=True)
class Row:
    """One parameter: role, rule, the reason for both, and what its place in a layer says.

    Attributes:
        name: First name of the parameter, None where names are not known.
        shape: Stored shape, () as long as a lazy parameter is not initialised.
        role: hidden, conv, expert, router, embedding, head, depthwise, norm, bias, vector or
            quantised.
        rule: ``"matrix"`` or ``"adamw"``.
        why: The reason for role and rule.
        view: How the parameter becomes matrices (out, in); see ``views.py``. Fused weights are cut.
        part: query, key, value, qkv, out, gate, up, gate_up, down or patch; token, position or
            tied for embeddings; vocabulary or classes for heads; else "".
        side: Which side of the matrices is the residual stream: ``"rows"`` where the weight writes
            to the stream, ``"cols"`` where the weight reads it, None if that is not known.
        heads: Attention heads in each block of the view; () if not known.
        pair: Name of the up projection of a gate, and the other way round.
        centred: Whether the loss stays as it is when one vector is added to every row.
        aliases: Other names of the parameter.
        kind: Class of the module.
    """

    name: str | None
    shape: tuple[int, ...]
    role: str
    rule: str
    why: str
    view: str = "auto"
    part: str = ""
    side: str | None = None
    heads: tuple[int, ...] = ()
    pair: str | None = None
    centred: bool = False
    aliases: tuple[str, ...] = ()
    kind: str = ""

    @property
    def is_lazy(self) -> bool:
        return not self.shape and UNINITIALISED in self.why

    def _cells(self) -> dict[str, str]:
        """Texts of the columns, empty for unknown values."""
        cells = {column: getattr(self, column) or "" for column in _COLUMNS}
        return {
            **cells,
            "name": self.name or "-",
            "shape": " x ".join(map(str, self.shape)) or ("lazy" if self.is_lazy else "scalar"),
            "heads": " ".join(map(str, self.heads)),
            "centred": "yes" if self.centred else "",
            "aliases": ", ".join(self.aliases),
        }


_COLUMNS = (
    *("name", "shape", "role", "rule", "why", "view"),
    *("part", "side", "heads", "pair", "centred", "aliases"),
)
_PRINTED = ("name", "shape", "role", "rule", "view", "part", "side", "heads", "centred", "why")


@dataclass(frozen=True)
class Assignment:
    """Table that :func:`classify` returns: one row per distinct parameter, in the model's order."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        return self.rows[index]

    def __str__(self) -> str:
        table = self._table(_PRINTED, "view", *_PRINTED[5:-1])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join([*lines, self._counts()])

    def to_markdown(self) -> str:
        """Return the table in Markdown, with the columns that fill it, and a line of counts."""
        head, *table = self._table(_COLUMNS, *_COLUMNS[6:])
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in table:
            cells = (cell.replace("|", "\\|") for cell in row)
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", self._counts(), ""])

    def _table(self, columns: Iterable[str], *optional: str) -> list[list[str]]:
        """Heading and rows as texts, without optional columns that say nothing."""
        rows = [row._cells() for row in self.rows]
        empty = [c for c in optional if all(row[c] in ("", "auto") for row in rows)]
        shown = [c for c in columns if c not in empty]
        return [shown, *([row[c] for c in shown] for row in rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain lists, dicts and strings, fit for JSON."""
        rows = map(asdict, self.rows)
        return {"rows": [{k: _swap(v, tuple, list) for k, v in row.items()} for row in rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Assignment:
        """Read back what ``to_dict`` wrote."""
        rows = ({k: _swap(v, list, tuple) for k, v in row.items()} for row in data["rows"])
        return cls(tuple(Row(**row) for row in rows))

    def diff(self, other: Assignment) -> list[tuple[str, Row | None, Row | None]]:
        """Return (name, before, after) for each row that ``other`` has changed, added or lost.

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
            rule: [0 if row.is_lazy else prod(row.shape) for row in self.rows if row.rule == rule]
            for rule in [*methods, "adamw"]
        }
        return "; ".join(f"{k}: {len(v)} parameters, {sum(v):,} elements" for k, v in sizes.items())


def _swap(value: Any, old: type, new: type) -> Any:
    return new(value) if isinstance(value, old) else value


_NO_PLACE = ("norm", "bias", "vector", "depthwise", "quantised")
"""Roles of parameters that neither read nor write the residual stream as matrices."""


def _assign_role(sites: list[ParamSite]) -> Row:
    """Row by the role table; of several places the one that the earliest line matches decides."""
    own, *others = sites
    role, view, why, site = next(
        (role, view, why, site)
        for role, view, why, test in ROLE_TABLE
        for site in sites
        if test(site)
    )
    why = why.format(s=site) + (f"; {UNINITIALISED}" if site.is_lazy else "")
    if site is not own:
        why = f"tied to {site.name} ({why})"
    elif others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        why = f"{why}; tied to {others[0].name}{more}"
    aliases = tuple(other.name for other in others)
    row = Row(own.name, own.shape, role, RULE_OF_ROLE[role], why, view, aliases=aliases)
    tied = role == "embedding" and any(is_linear(s) or names_head(s) for s in sites)
    if site.module is not None:
        return _with_place(row, site, tied)
    return _with_named_place(row, site) if site.owners else row


def _with_place(row: Row, s: ParamSite, tied: bool) -> Row:
    """Fill in part, view, side, heads, pair and centring by the place of a weight in its layer."""
    part, view, why, side = part_of(s, row.role), row.view, row.why, None
    row = replace(row, part="tied" if tied else part, kind=s.kind)
    if len(row.shape) < 2 or row.role in _NO_PLACE or s.name_matches(LORA_FACTOR):
        return row
    if row.role == "expert" and part:
        transposed = is_stored_transposed(s, part)
        if transposed is None:
            return replace(row, why=f"{why}; {UNKNOWN_ORIENTATION}")
        view = "transposed" if transposed else "batch"
        side = "rows" if part in WRITERS else "cols"
    m, n = row.shape[-2:] if view != "flatten" else (row.shape[0], prod(row.shape[1:]))
    m, n = (n, m) if view == "transposed" else (m, n)
    cut = fused_view(s, part, m, n)
    if cut:
        view = f"transposed:{cut}" if view == "transposed" else cut
        why += {"qkv": ", q k v", "gate_up": ", gate and up"}[part]
    row_runs = [int(x) for x in cut.removeprefix("rows:").split(",")] if "rows:" in cut else [m]
    return replace(
        row,
        view=view,
        why=why,
        side=side or residual_side(s, part, m, n),
        heads=heads_of(s, part, [n] if part == "out" else row_runs) if cut or part != "qkv" else (),
        pair=partner_name(s, part),
        centred=is_centred(s, row.role, part, m),
    )


def _with_named_place(row: Row, s: ParamSite) -> Row:
    """Fill in part, side and pair by the names around; the view stays as the weight is stored."""
    part = part_of(s, row.role)
    row = replace(row, part=part)
    if len(row.shape) < 2 or row.role in _NO_PLACE or s.name_matches(LORA_FACTOR):
        return row
    m, n = row.shape[-2:] if row.view != "flatten" else (row.shape[0], prod(row.shape[1:]))
    side = residual_side(s, part, m, n)
    if row.role == "expert" and m == n and side is not None:
        transposed = is_stored_transposed(s, part)
        side = None if transposed is None else "rows" if transposed == (side == "cols") else "cols"
    return replace(row, side=side, pair=partner_name(s, part))


def route(name: str | None, shape: tuple[int, ...]) -> Row:
    """Return the row of a parameter of which only the shape, and maybe the name, is known.

    Without a telling name, tensors get AdamW if they are empty, have fewer than two sides, or have
    three or more of which one is longer than 1; all others get the rule. Kernels of shape
    (channels, 1, ...) get AdamW as depthwise ones: a convolution of a single channel has the same
    shape, and only its module tells.
    """
    return replace(_assign_role([ParamSite(name or "", tuple(shape))]), name=name)


def guessed_shape(name: str) -> tuple[int, ...]:
    """A shape that stands for one not known yet: of a vector where the name says so."""
    return (2,) if route(name, (2,)).role in ("norm", "bias") else (2, 2)


def route_all(names: Sequence[str | None], shapes: Sequence[tuple[int, ...]]) -> list[Row]:
    """Return the rows of parameters of which only shapes and names are known, seen together.

    What stands beside a name tells more than :func:`route` can know: the part of a weight in its
    layer, gate and up projection of a pair, routers and heads, the width of the residual stream and
    with it the sides of weights. Heads of an attention, cuts of a fused weight and centring are
    never told by names.

    Args:
        names: A name for each parameter, None where it has none; in the model's order.
        shapes: Their shapes.
    """
    tree, sites, stored_names = NameTree(), {}, {}
    for i, (name, shape) in enumerate(zip(names, map(tuple, shapes), strict=True)):
        site = ParamSite(name or "", shape)
        stored_names[site.plain_name] = name
        sites[i] = [replace(site, owners=tree.add(site.plain_name, shape)) if name else site]
    rows = [_assign_role(places) for places in _with_tables(tree, sites).values()]
    rows = [
        replace(row, name=name, pair=stored_names.get(ParamSite(row.pair or "", ()).plain_name))
        for row, name in zip(rows, names, strict=True)
    ]
    wide = [row for row in rows if row.part and row.side and row.shape[0] != row.shape[1]]
    if any((row.side == "rows") != (row.part in WRITERS) for row in wide if row.role == "hidden"):
        # these are stored (in, out), so nothing tells the sides of square ones
        rows = [replace(row, side=None) if _is_square(row) else row for row in rows]
    return rows


def _is_square(row: Row) -> bool:
    return row.role == "hidden" and row.shape[0] == row.shape[1]


_NUMBERED_BLOCK = re.compile(r"(^|\.)[^\d.][^.]*\.\d+\.")
"""Names in numbered blocks: no heads, even if their width happens to equal a vocabulary."""
_TOKEN_NAMES = re.compile(r"(?i)tok|word|wte|vocab")
_SMALL_VOCABULARY = 256
"""Number of rows up to which a table need not be a vocabulary."""


Key = str | Tensor | nn.Module | Callable[[str, nn.Parameter, nn.Module], bool]
Choice = str | Mapping[str, Any]


def classify(
    model: nn.Module,
    overrides: Mapping[Any, Choice] | Iterable[tuple[Key, Choice]] | None = None,
    strict: bool = False,
) -> Assignment:
    """Find the role of every parameter of a model.

    Module types decide first, then names, then shapes. A parameter registered under several names
    has one row, whose reason mentions another name. Frozen parameters have rows as well. A head is
    found by its name, by a tie, or by as many outputs as there are words: the last layer of a plain
    ``nn.Sequential`` looks like any other and counts as hidden.

    Depthwise convolutions, and tensors of three or more dimensions of which one is longer than 1,
    are AdamW's: as matrices they are single rows. A parameter that is not initialised yet has the
    role that its module gives it and the shape ().

    Args:
        model: Any module. Only its tree and its shapes are read, so the meta device will do.
        overrides: Choices by name, glob pattern, parameter, module (all parameters in it) or
            function of (name, parameter, module): a mapping or pairs. A choice is a role, or
            ``"matrix"`` or ``"adamw"``, which keep the role and set the rule, or a dict of
            :class:`Row`'s fields. The first match wins over everything else. None (default): no
            override.
        strict: Whether to raise if nothing but the number of dimensions could decide, or if it is
            not known how experts are stored (default: False).

    Returns:
        The table, in the order of ``model.named_parameters()``.

    Raises:
        ValueError: An override matches no parameter, or is no role, or asks for the matrix rule
            where there is no matrix; or ``strict`` is set and a role is a guess.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> print(classify(model, overrides={"1.bias": "vector"}))
        name      shape   role       rule    part        side  centred  why
        0.weight  10 x 4  embedding  adamw   token       cols           nn.Embedding
        1.weight  4 x 4   hidden     matrix                             nn.Linear
        1.bias    4       vector     adamw                              override '1.bias'
        2.weight  10 x 4  head       adamw   vocabulary  cols  yes      nn.Linear with the 10 \
outputs of a vocabulary
        2.bias    10      bias       adamw                              1-D, bias by name
        matrix: 1 parameters, 16 elements; adamw: 4 parameters, 94 elements
    """
    pairs = list(overrides.items() if isinstance(overrides, Mapping) else overrides or ())
    unused = dict(enumerate(key for key, _ in pairs))
    sites, rows = _param_sites(model), []
    for name, p in model.named_parameters():
        # The name given here is the one that counts: wrappers may shorten it.
        own, *others = sites.get(id(p)) or [ParamSite(name, shape_of(p), (model,))]
        own = replace(own, name=name)
        row = _assign_role([own, *others])
        hits = [i for i, (key, _) in enumerate(pairs) if _matches(key, p, [own, *others])]
        if hits:
            key, choice = pairs[hits[0]]
            row = _override(row, key if isinstance(key, str) else _describe_key(key, row), choice)
            if own.is_lazy:
                row = replace(row, why=f"{row.why}; {UNINITIALISED}")
        rows.append(row)
        for i in hits:
            unused.pop(i, None)
    if unused:
        keys = ", ".join(_describe_key(key) for key in unused.values())
        raise ValueError(f"overrides match no parameter: {keys}")
    unsure = [
        f"{row.name} {row.shape}"
        for row in rows
        if UNKNOWN_ROLE in row.why or UNKNOWN_ORIENTATION in row.why
    ]
    if strict and unsure:
        raise ValueError(f"no role found, give one in overrides: {', '.join(unsure)}")
    return Assignment(tuple(rows))


def _matches(key: Key, p: nn.Parameter, sites: list[ParamSite]) -> bool:
    """Whether an override is meant for this parameter, under any of its names."""
    if isinstance(key, str):  # exact first: a name may hold characters of a glob
        return any(key == s.name or fnmatchcase(s.name, key) for s in sites)
    if isinstance(key, Tensor):
        return key is p
    if isinstance(key, nn.Module):
        return any(key is owner for s in sites for owner in s.owners)
    if not callable(key):
        raise ValueError(
            f"override {key!r} must be a name, a pattern, a parameter, a module or a function"
        )
    return any(key(s.name, p, s.owners[0]) for s in sites)


def _describe_key(key: Any, row: Row | None = None) -> str:
    """Name of an override in a reason (where ``row`` is its row) or in an error."""
    if isinstance(key, str):
        return repr(key)
    what = "parameter" if isinstance(key, Tensor) else type(key).__name__
    if isinstance(key, Tensor):
        return row.name or what if row else f"a tensor of shape {shape_of(key)}"
    return what if isinstance(key, nn.Module) else getattr(key, "__name__", what)


def _override(row: Row, pattern: str, choice: Choice) -> Row:
    """Apply a choice of the caller; the view stays unless the new role has a view of its own."""
    why = f"override {pattern!r}"
    if isinstance(choice, Mapping):
        known = [f.name for f in fields(Row) if f.name not in ("name", "shape", "aliases", "kind")]
        wrong = [key for key in choice if key not in known]
        if wrong:
            raise ValueError(f"{why}: {wrong[0]!r} is none of {', '.join(known)}")
        chosen = dict(choice)
        for key, values in (("role", (*RULE_OF_ROLE,)), ("rule", ("matrix", "adamw"))):
            if key in chosen:
                row = _override(row, pattern, _one_of(why, chosen.pop(key), values))
        return replace(row, **{"why": why, **{k: _swap(v, list, tuple) for k, v in chosen.items()}})
    _one_of(why, choice, ("matrix", "adamw", *RULE_OF_ROLE))
    role, rule = (choice, RULE_OF_ROLE[choice]) if choice in RULE_OF_ROLE else (row.role, choice)
    is_lazy_matrix = UNINITIALISED in row.why and row.role not in _NO_PLACE
    no_matrix = len(row.shape) < 2 or 0 in row.shape or row.role == "quantised"
    no_matrix = no_matrix and not is_lazy_matrix
    if rule == "matrix" and no_matrix:
        raise ValueError(f"{why}: {row.name} of shape {row.shape} is no matrix; give it 'adamw'")
    own_view = {"conv": "flatten", "expert": "batch"} if len(row.shape) > 2 else {}
    new_view = row.view if row.role == role else own_view.get(role, row.view)
    return replace(row, role=role, rule=rule, view=new_view, why=why)


def _one_of(why: str, choice: Any, known: tuple[str, ...]) -> str:
    if choice not in known:
        raise ValueError(f"{why}: {choice!r} is none of {', '.join(known)}")
    return str(choice)


def _stored_as(p: Tensor) -> str:
    """Kind of codes that a parameter holds instead of plain numbers, "" for a plain weight."""
    coded = re.search(r"4bit|8bit|Int8Params|Quantized|Float8|NF4", type(p).__name__)
    if coded:
        return type(p).__name__
    plain = (p.is_floating_point() or p.is_complex()) and p.dtype.itemsize > 1
    return "" if plain else str(p.dtype).removeprefix("torch.")


def _param_sites(model: nn.Module) -> dict[int, list[ParamSite]]:
    """Map the id of each parameter to all places where it is registered, in the model's order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: dict[int, list[ParamSite]] = {}
    for path, module in modules.items():
        # A parametrized weight lives in a list below the module whose weight it is.
        place = re.sub(r"(^|\.)parametrizations\..*", "", path)
        owners = [modules[place]]
        while place:
            place = place.rpartition(".")[0]
            owners.append(modules[place])
        for name, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            site = ParamSite(name, shape_of(p), tuple(owners), stored=_stored_as(p))
            site = replace(site, is_lazy=is_lazy(p))
            sites.setdefault(id(p), []).append(site)
    return _with_tables(model, sites)


def sites_of(model: nn.Module) -> dict[str, list[ParamSite]]:
    """All places of each parameter, by the first of its names."""
    sites = _param_sites(model)
    return {name: sites.get(id(p), []) for name, p in model.named_parameters()}


def _with_tables(model: nn.Module, sites: dict[int, list[ParamSite]]) -> dict[int, list[ParamSite]]:
    """Add what the embeddings of the model tell about its other parameters: heads and widths."""
    heads = _inferred_heads(model, sites)
    lookups = _token_embeddings(sites)
    widths = {s.shape[1] for s in lookups}
    widths = widths or {
        m.embed_dim for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    width = widths.pop() if len(widths) == 1 else None
    sizes = frozenset(s.shape[0] for s in lookups)
    return {
        key: [replace(s, head=heads.get(key, ""), width=width, vocabularies=sizes) for s in places]
        for key, places in sites.items()
    }


def _token_embeddings(sites: dict[int, list[ParamSite]]) -> list[ParamSite]:
    """The embeddings of tokens."""
    places = (s for all_sites in sites.values() for s in all_sites)
    return [s for s in places if is_token_table(s)]


def _inferred_heads(model: nn.Module, sites: dict[int, list[ParamSite]]) -> dict[int, str]:
    """Find an output head without a telling name or a tie: {id of the weight: reason}."""
    with suppress(AttributeError, NotImplementedError):
        weight = model.get_output_embeddings().weight  # type: ignore[operator]
        return {id(weight): "get_output_embeddings()"} if id(weight) in sites else {}
    linears = [
        (key, s)
        for key, all_sites in sites.items()
        for s in all_sites
        if may_be_linear(s) and len(s.shape) == 2 and not s.name_matches(LORA_FACTOR)
    ]
    tables = _token_embeddings(sites)
    sizes = {s.shape[0] for s in tables}
    # Where no name or tie tells a head, few rows are enough, but then it must come last.
    declared = any(
        names_head(s) or any(map(is_embedding, sites[key]))
        for key, s in linears
        if _rows_match_vocabulary(s, sizes)
    )
    words = set() if declared else {s.shape[0] for s in tables if _TOKEN_NAMES.search(s.word)}
    found, after, trailing = {}, 0, not declared
    for key, s in reversed(linears):
        rows, cols = s.shape
        # What the next layer takes as its input is a hidden width.
        hidden = rows == after or _NUMBERED_BLOCK.search(".".join(s.parts))
        named = names_head(s)
        fits = _rows_match_vocabulary(s, sizes) and not hidden
        trailing = trailing and bool(fits or named)
        if (
            fits
            and not named
            and (trailing or rows > _SMALL_VOCABULARY or (rows in words and rows != cols))
        ):
            what = s.kind if s.module is not None else "2-D"
            found[key] = f"{what} with the {rows} outputs of a vocabulary"
        after = cols
    return found


def _rows_match_vocabulary(s: ParamSite, sizes: set[int]) -> bool:
    """Whether the outputs are as many as words: exactly, or padded to or from a round number."""
    m, n = s.shape
    return m in sizes or (
        m > n and any(v > _SMALL_VOCABULARY and 0.95 < m / v < 1 / 0.95 for v in sizes)
    )
