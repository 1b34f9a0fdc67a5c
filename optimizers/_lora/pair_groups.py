"""LoRA pairs: which factors of a model belong together, their scales, and the groups they form.

A layer with a pair has the weight W = W0 + s B A: A is (r, n), B is (m, r), s a number that its
module knows. Nothing here needs peft; names and attributes are enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from .._core.rule import Rule
from .._core.validation import check, check_numbers, is_number, naming, plain_number, shown
from .._core.views import split_view
from .._driver.buckets import StepPlan
from .._driver.checks import check_values, refuse_sharded_module, refuse_sharded_parameters
from .._driver.model_roles import decays_of
from .._driver.optimizer import StackedOptimizer
from .._driver.param_groups import describe, parameters_of, warn_user

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    P = ParamSpec("P")

__all__ = ["LoRARule", "PairOptimizer", "accepts_groups", "lora_param_groups", "pairs_to_groups"]

PAIR_KINDS = ("linear", "conv", "embedding", "expert")
COUNTERPART = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
A_NAMES = ("lora_A", "lora_embedding_A")

Scale = float | Mapping[str, float] | Callable[[str], float] | None


@dataclass(frozen=True)
class LoRARule(Rule, abstract=True):
    """A rule on pairs A (r, n), B (m, r), flat in their group, of W = W0 + scale B A."""

    members = ("A", "B")
    scale: float | None = None
    lr_ratio_b: float | None = None

    def __post_init__(self) -> None:
        check(
            self.scale is None or _is_scale(self.scale),
            f"scale must be a positive finite number from 1e-12 to 1e12, got {shown(self.scale)}",
        )
        check_numbers(self, scale="(0, inf) or None", lr_ratio_b="[0, inf) or None")

    @override
    def check_members(self, sizes: Sequence[tuple[int, int, int]]) -> None:
        check_fit(sizes)

    @property
    def s(self) -> float:
        """The scale; 1 only for a rule outside of an optimizer, which asks for a scale."""
        return 1.0 if self.scale is None else self.scale

    @property
    def lr_factor_b(self) -> float:
        """Multiplier of the step of B; its decay keeps the plain learning rate."""
        return 1.0 if self.lr_ratio_b is None else self.lr_ratio_b


class PairOptimizer(StackedOptimizer):
    """Base class of optimizers of LoRA pairs: takes models and groups, and checks each pair.

    Args:
        params: A module, which goes through :func:`lora_param_groups` (vectors of the rest have no
            weight decay); its named parameters, which do so too and need ``scale``; or groups, of
            which those without ``rule="adamw"`` hold ``[A1, B1, A2, B2, ...]`` and a ``scale``.
            Names, given or of ``model=``, tell pairs where there are any; without them shapes must,
            unless :func:`pairs_to_groups` made the group.
        rule: The method; a third member is the base weight.
        lr: Learning rate.
        weight_decay: Decoupled weight decay (default: 0.0).
        scale: The scale of pairs whose group or module names none (default: None).
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        rule: LoRARule,
        lr: Any,
        weight_decay: float = 0.0,
        *,
        scale: Scale = None,
        **options: Any,
    ) -> None:
        check(
            scale is None or _is_scale(scale) or isinstance(scale, Mapping) or callable(scale),
            f"{_scale_message(scale)}, a dict by module, or a function of its name",
        )
        refuse_sharded_module(params, rule.method())
        self._watch(params)
        super().__init__(_to_pair_groups(params, rule, scale), rule, lr, weight_decay, **options)

    @override
    def _prepare_group(self, param_group: dict[str, Any]) -> dict[str, Any]:
        if isinstance(param_group, dict) and isinstance(param_group.get("params"), (list, tuple)):
            full = {**self.defaults, **param_group}
            if self._holds_pairs(full):
                check_values(full)
                size = len(self._default_rule.members)
                _check_group({**full, "param_names": self._names_for(full)}, size)
        return super()._prepare_group(param_group)

    @override
    def _build_plan(self, *args: Any, **kwargs: Any) -> StepPlan:
        for group in self.param_groups:  # someone may have changed what it holds
            if self._holds_pairs(group):
                _check_group(group, len(self._default_rule.members), is_new=False)
        return super()._build_plan(*args, **kwargs)

    @override
    def _update_rules(self, plan: StepPlan, settings: list[dict[str, Any]]) -> bool:
        for group in self.param_groups:  # a rule alone takes None, but a group has a scale
            if self._holds_pairs(group):
                check(_is_scale(group.get("scale")), _scale_message(group.get("scale")))
        return super()._update_rules(plan, settings)

    def _names_for(self, group: Mapping[str, Any]) -> list[str | None]:
        """Names of a group's parameters: its own, else those in the module of ``model=``."""
        params, names = parameters_of(group)
        if self._model_roles is None or not all(isinstance(p, Tensor) for p in params):
            return names
        known = self._model_roles.rows()
        return [
            name or (known[p].name if p in known else None)
            for name, p in zip(names, params, strict=True)
        ]

    def _holds_pairs(self, group: Mapping[str, Any]) -> bool:
        """Whether the method trains a group, so that it must hold pairs."""
        name = group["rule"]  # not checked yet where it was written into the group
        return name is None or (isinstance(name, str) and name == self._default_rule.method())


class PairList(list[Any]):
    """Members of pairs that were given as pairs: shapes need not tell what belongs together."""


def accepts_groups(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor take its argument ``params`` under the old name ``groups``, with a warning.

    Raises:
        TypeError: If both are given.
    """

    @wraps(init)
    def with_groups(*args: P.args, **kwargs: P.kwargs) -> None:
        if "groups" in kwargs:
            name = type(args[0]).__name__
            if len(args) > 1 or "params" in kwargs:
                raise TypeError(f"{name} got both params and groups, which is its old name")
            warnings.warn(
                f"{name}(groups=...) is now {name}(params=...)", DeprecationWarning, stacklevel=2
            )
            kwargs["params"] = kwargs.pop("groups")
        init(*args, **kwargs)

    return with_groups


def _to_pair_groups(params: Any, rule: LoRARule, scale: Scale) -> Any:
    """Groups from a module or its named parameters; groups, and what torch refuses, unchanged."""
    base = len(rule.members) == 3
    if isinstance(params, nn.Module):
        groups = lora_param_groups(params, scale=scale, base_weight=base)
        for rest in groups:
            if rest.get("rule") == "adamw":  # vectors have no decay, as in every class
                rest["decays"] = decays_of(rest["params"])
        return groups
    if isinstance(params, Tensor):
        return params
    items = list(params)
    if items and isinstance(items[0], tuple):
        named = [item for item in items if len(item) == 2]
        refuse_sharded_parameters([p for _, p in named], [n for n, _ in named], rule.method())
        return lora_param_groups(items, scale=scale, base_weight=base)
    if items and isinstance(items[0], Tensor):
        raise ValueError(
            f"{rule.method()} cannot tell which of these tensors are pairs; pass the model, "
            "lora_param_groups(model) or pairs_to_groups([(A1, B1), ...], scale=...)"
        )
    if _is_scale(scale):
        items = [
            {"scale": scale, **group}
            if isinstance(group, Mapping)
            and (group.get("rule") is None or str(group["rule"]) == rule.method())
            else group
            for group in items
        ]
    return items


def _check_group(group: Mapping[str, Any], size: int, *, is_new: bool = True) -> None:
    """Check each pair (or triple) of a group.

    Args:
        group: The group with all its keys.
        size: Members of a pair or triple.
        is_new: Whether it is checked for the first time (default: True). Later only what is
            certainly wrong is refused.
    """
    if not is_new:  # a parameter appended to the list has no name
        names = group.get("param_names") or []
        missing = len(group["params"]) - len(names)
        group = {**group, "param_names": [*names, *[None] * missing][: len(group["params"])]}
    params, names = parameters_of(group)
    refuse_sharded_parameters(params, names, "a method of LoRA pairs")
    wanted = "[A1, B1, A2, B2, ...]" if size == 2 else "[A1, B1, W1, A2, B2, W2, ...]"
    check(
        len(params) % size == 0,
        f"a group of LoRA pairs needs {wanted} (triples with the base weight), "
        f"got {len(params)} parameters",
    )
    if not all(isinstance(p, Tensor) for p in params):
        return  # torch refuses what is no tensor, with its own text
    check(_is_scale(group.get("scale")), _scale_message(group.get("scale")))
    texts = [describe(name, p, i) for i, (name, p) in enumerate(zip(names, params, strict=True))]
    views = group["view"]
    transposed = not isinstance(views, str) and [*views[:2]] == ["transposed", "transposed"]
    known = size > 2 or isinstance(group["params"], PairList) or not is_new
    for i in range(0, len(params), size):
        A, B = params[i : i + 2]
        sides = (A.mT, B.mT) if (transposed or views == "transposed") and A.ndim > 1 else (A, B)
        have_names = _check_names(*names[i : i + 2])
        _check_pair(*sides, *texts[i : i + 2], warns=is_new)
        _check_views(params[i : i + size], texts[i : i + size], views)
        if not (known or have_names):
            _refuse_doubt(*sides, *texts[i : i + 2])


def _check_views(params: Sequence[Tensor], texts: Sequence[str], view: Any) -> None:
    """Refuse a view that makes of a pair what is none."""
    views = [view] * len(params) if isinstance(view, str) else view
    check(
        len(views) == len(params),
        f"view must be one string, or one for each of {', '.join(texts)}, got {shown(view)}",
    )
    with naming(f"view {shown(view)} of {' and '.join(texts)}"):
        cuts = [split_view(v, tuple(p.shape))[0] for v, p in zip(views, params, strict=True)]
        check_fit([(cut.k, cut.m, cut.n) for cut in cuts])


def check_fit(sizes: Sequence[tuple[int, int, int]]) -> None:
    """Refuse factors that cannot be multiplied.

    Args:
        sizes: Per member of a pair or triple, how many matrices it holds, and their sides.
    """
    (k, r, n), (k_b, m, r_b), *_ = sizes
    check(
        (k, r) == (k_b, r_b),
        f"{k} of {r} x {n} for A and {k_b} of {m} x {r_b} for B are no pair, which needs as many "
        "columns of B as rows of A",
    )


APART = (
    "; a group holds [A1, B1, A2, B2, ...]: where a helper would put A and B into groups apart, "
    "lr_ratio_b gives B a step of its own"
)


def _check_names(a: str | None, b: str | None) -> bool:
    """Refuse members whose names say that they are no pair; False if names do not tell.

    Args:
        a: Name of the first member, None if it has none.
        b: Name of the second.
    """
    words = {other: word for other, _, word in _counterparts(a or "")}
    if a is None or b is None or not (words or any(_counterparts(b))):
        return False
    word = words.get(b)
    check(word is not None, f"{a!r} and {b!r} are no pair by their names{APART}")
    check(word != "lora_B", f"{a!r} and {b!r} are in the wrong order: A comes first")
    return True


def _refuse_doubt(A: Tensor, B: Tensor, a: str, b: str) -> None:
    """Refuse a pair without names whose rank is a side: two factors A, or two B, look the same."""
    if _is_conv(A, B):
        A, B = A.flatten(1), B.flatten(1)
    r, n, m = A.shape[-2], A.shape[-1], B.shape[-2]
    check(
        r not in (n, m),
        f"{a} and {b} could be A and B, or two factors of one kind, as r is a side of W; "
        "give them names with lora_A and lora_B, or use pairs_to_groups([(A, B), ...])",
    )


# groups of pairs ----------------------------------------------------------------------------------


def lora_param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    scale: Scale = None,
    adapter: str | None = None,
    kinds: Sequence[str] = ("linear", "conv", "expert"),
    fallback: Mapping[str, Any] | None = None,
    base_weight: bool = False,
    unpaired: str = "error",
    lr: float | None = None,
    lr_ratio_b: float | None = None,
    **group_options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups of a model with LoRA factors: pairs by scale, and AdamW for the rest.

    Pairs are found by name: two parameters whose names differ in one component, ``lora_A`` and
    ``lora_B`` (``lora_embedding_A``, ``lora_embedding_B``), in whatever order they come. So models
    of peft, with DoRA, rsLoRA, convolutions, embeddings, several adapters or ``modules_to_save``,
    and plain modules with such attributes are read alike. Biases of factors (``lora_bias=True``) go
    with the rest. Call it after adapters are injected.

    Args:
        model: A module, or its named parameters, of which only names are used.
        scale: s of W = W0 + s B A. None (default) reads ``scaling`` of the module that owns the
            pair, a number or a dict by adapter; a number is taken for all, a dict by the longest
            prefix of the module's name, a callable is asked with the module's name.
        adapter: Name of the only adapter to pair; None (default): all that train. Two adapters of
            a module are two pairs.
        kinds: Which pairs are wanted of ``"linear"``, ``"conv"``, ``"expert"`` (factors stacked in
            three dimensions) and ``"embedding"``; others go with the rest
            (default: ("linear", "conv", "expert")).
        fallback: Keys of the group of the rest, such as its ``lr`` (default: None).
        base_weight: Whether groups hold triples ``[A, B, W0]`` (default: False).
        unpaired: What becomes of a trainable factor without its other: ``"error"`` (default), or
            ``"fallback"`` for AdamW.
        lr: Learning rate of pairs; None (default): the optimizer's.
        lr_ratio_b: Multiplies the step of B; decay keeps the plain lr. None (default): 1.
        **group_options: More keys for every group of pairs.

    Returns:
        Groups for a method of pairs: one for each scale and view, then ``rule="adamw"`` for every
        other trainable parameter. A pair with one frozen factor is a pair; only the other moves.
        Whole frozen pairs and other frozen parameters, such as base weights, are in no group, also
        in ``AltLoRA(model)``: what is unfrozen later joins by ``add_param_group``.

    Raises:
        ValueError: If there is no pair, no scale, or factors that do not fit.
        TypeError: If ``base_weight`` meets a quantized weight.

    Example:
        >>> import torch
        >>> from stiefel.optimizers import lora_param_groups
        >>> class LoRA(torch.nn.Linear):
        ...     def __init__(self, n, m, r=4, alpha=8):
        ...         super().__init__(n, m)
        ...         self.weight.requires_grad_(False)
        ...         self.lora_A = torch.nn.Parameter(torch.randn(r, n))
        ...         self.lora_B = torch.nn.Parameter(torch.zeros(m, r))
        ...         self.scaling = alpha / r
        >>> pairs, rest = lora_param_groups(torch.nn.Sequential(LoRA(6, 5), LoRA(5, 4)))
        >>> [name for name, _ in pairs["params"]], pairs["scale"]
        (['0.lora_A', '0.lora_B', '1.lora_A', '1.lora_B'], 2.0)
        >>> [name for name, _ in rest["params"]], rest["rule"]
        (['0.bias', '1.bias'], 'adamw')
    """
    unknown = set(kinds) - {*PAIR_KINDS}
    check(not unknown, f"kinds must be among {PAIR_KINDS}, got {sorted(unknown)}")
    check(
        unpaired in ("error", "fallback"),
        f"unpaired must be 'error' or 'fallback', got {unpaired!r}",
    )
    named, modules = _names_of(model)
    found, unmatched = _find_pairs(name for name, p in named.items() if not _is_bias(name, p))
    if unpaired == "error":
        _refuse_unmatched(unmatched, named)
    used: dict[int, tuple[int, int]] = {}
    pairs = []
    for names in found:
        if adapter in (None, names.adapter):
            pair = _read_pair(names, named, modules.get(names.module), kinds, used)
            if pair is not None:
                pairs.append(_with_scale_and_base(pair, scale, base_weight))
    if base_weight:
        group_options = {"rule": "SwitchLoRA", **group_options}
    groups = _group_pairs(pairs, lr, lr_ratio_b, group_options)
    rest = _unused_parameters(named, used)
    if rest:
        own = dict(fallback or {})
        if "betas" not in own:
            own.setdefault("adamw_betas", (0.9, 0.999))
        groups.append({"params": rest, "rule": "adamw", **own})
    return groups


def pairs_to_groups(
    pairs: Iterable[Sequence[Any]],
    scale: float | None = None,
    *,
    lr: float | None = None,
    lr_ratio_b: float | None = None,
    **group_options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups of factors that are known as such, one group for each scale and view.

    Args:
        pairs: ``(A, B)`` or ``(A, B, s)``, with the base weight ``(A, B, W0)`` or
            ``(A, B, W0, s)``; a factor may be ``(name, tensor)``. A is (r, n) and B (m, r), both
            stacked in a first dimension, or those of a convolution.
        scale: s of W = W0 + s B A where a pair names none (default: None).
        lr: Learning rate of pairs; None (default): the optimizer's.
        lr_ratio_b: Multiplies the step of B; decay keeps the plain lr. None (default): 1.
        **group_options: More keys for every group.

    Returns:
        Groups of a method of pairs.

    Raises:
        ValueError: If a pair has no scale or its factors do not fit.
    """
    used: set[int] = set()
    read = []
    for i, given in enumerate(pairs):
        is_pair = isinstance(given, Sequence) and len(given) > 0
        check(is_pair, f"pair {i} must be (A, B) or the like, got {shown(given)}")
        *members, last = given
        s = scale
        if isinstance(last, (Tensor, tuple)):
            members.append(last)
        else:
            s = last
        check(
            len(members) in (2, 3),
            f"pair {i} must be (A, B), (A, B, scale), (A, B, W0) or (A, B, W0, scale), "
            f"got {len(given)} entries",
        )
        check(_is_scale(s), _scale_message(s))
        tensors = [p[1] if isinstance(p, tuple) else p for p in members]
        names = [
            f"'{p[0]}'" if isinstance(p, tuple) else f"{letter} of pair {i}"
            for p, letter in zip(members, ("A", "B", "W0"), strict=False)
        ]
        _, views = _pair_kind(*tensors[:2], *names[:2])
        for p, name in zip(tensors, names, strict=True):
            check(id(p) not in used, f"{name} is shared by two pairs; give each its own factors")
            used.add(id(p))
        read.append(Pair(tuple(members), [*views, *views[:1]][: len(members)], float(s)))  # type: ignore[arg-type]
    return _group_pairs(read, lr, lr_ratio_b, group_options)


@dataclass(frozen=True)
class Pair:
    """A pair or triple, ready to join a group.

    Attributes:
        members: Tensors, or (name, tensor): A, B and maybe W0.
        views: How each becomes matrices.
        scale: s of W = W0 + s B A.
    """

    members: tuple[Any, ...]
    views: list[str]
    scale: float


def _group_pairs(
    pairs: Sequence[Pair], lr: float | None, lr_ratio_b: float | None, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One group for each scale and view, in order of their first pairs."""
    if not pairs:
        raise ValueError(
            "no trainable lora_A/lora_B pair found; pass (A, B) tuples or check that the adapter "
            "is active"
        )
    shared = {"lr": lr, "lr_ratio_b": lr_ratio_b}
    given = {key: value for key, value in shared.items() if value is not None}
    groups: dict[Any, dict[str, Any]] = {}
    for pair in pairs:
        view = pair.views[0] if len(set(pair.views)) == 1 else pair.views
        group = groups.setdefault(
            (pair.scale, tuple(pair.views)),
            {"params": PairList(), "scale": pair.scale, "view": view, **given, **options},
        )
        group["params"].extend(pair.members)
    return [*groups.values()]


# the pairs of a model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _PairNames:
    """Two names that differ in one component, lora_A and lora_B."""

    module: str
    adapter: str | None
    embedding: bool
    a: str
    b: str


@dataclass(frozen=True)
class _NamedPair:
    """Two factors of a model that train together, and the module that owns them."""

    names: _PairNames
    A: Tensor
    B: Tensor
    kind: str
    views: list[str]
    owner: Any

    @property
    def base(self) -> Any:
        """The module of the base weight: peft keeps it below the owner."""
        return getattr(self.owner, "base_layer", self.owner)


def _names_of(
    model: nn.Module | Iterable[tuple[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """Parameters and modules by name, under every name that they have."""
    if not isinstance(model, nn.Module):
        return dict(model), {}
    named: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    return named, dict(model.named_modules(remove_duplicate=False))


def _counterparts(name: str) -> Iterator[tuple[str, int, str]]:
    """Possible names of the other factor of this parameter, by the last such component first."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        if parts[i] in COUNTERPART:
            yield ".".join([*parts[:i], COUNTERPART[parts[i]], *parts[i + 1 :]]), i, parts[i]


def _is_bias(name: str, p: Tensor) -> bool:
    """Whether a parameter is the bias of a factor's layer (peft's ``lora_bias=True``)."""
    owner, _, last = name.rpartition(".")
    if owner.endswith(("lora_embedding_A", "lora_embedding_B")):  # last is an adapter
        return False
    return last == "bias" or (p.ndim < 2 and last not in (*COUNTERPART, "weight"))


def _find_pairs(names: Iterable[str]) -> tuple[list[_PairNames], dict[str, str]]:
    """Pairs in the order of A, and {name: missing component} of names without a counterpart."""
    known = dict.fromkeys(names)
    found: list[_PairNames] = []
    taken: set[str] = set()
    unmatched: dict[str, str] = {}
    for name in known:
        options = list(_counterparts(name))
        if not options or name in taken:
            continue
        matches = [(other, i, word) for other, i, word in options if other in known]
        if not matches:
            unmatched[name] = COUNTERPART[options[0][2]]
            continue
        other, i, word = matches[0]
        a, b = (name, other) if word in A_NAMES else (other, name)
        taken |= {a, b}
        parts, embedding = name.split("."), "embedding" in word
        suffix = parts[i + 1 :]
        if suffix[-1:] == ["weight"] and not embedding:
            suffix = suffix[:-1]
        adapter = ".".join(suffix) or None
        found.append(_PairNames(".".join(parts[:i]), adapter, embedding, a, b))
    order = {name: i for i, name in enumerate(known)}
    return sorted(found, key=lambda pair: order[pair.a]), unmatched


def _refuse_unmatched(unmatched: Mapping[str, str], named: Mapping[str, Tensor]) -> None:
    """Refuse factors that train without their other one."""
    for name, other in unmatched.items():
        check(
            not named[name].requires_grad,
            f"'{name}' has no matching {other}; rename it, freeze it or pass unpaired='fallback'",
        )


def _read_pair(
    names: _PairNames,
    named: Mapping[str, Tensor],
    owner: nn.Module | None,
    kinds: Sequence[str],
    used: dict[int, tuple[int, int]],
) -> _NamedPair | None:
    """The pair of these names; None if it is frozen, not wanted, or known by other names.

    Args:
        names: Names of the two factors.
        named: Parameters by name.
        owner: The module that the names belong to, if it is known.
        kinds: Which kinds of pairs are wanted.
        used: The pair of ids by the id of a factor; a new pair is added.
    """
    A, B = named[names.a], named[names.b]
    if not (A.requires_grad or B.requires_grad):
        return None
    kind, views = _pair_kind(A, B, names.a, names.b, names.embedding)
    pair = _NamedPair(names, A, B, kind, views, owner)
    if kind == "conv" and getattr(pair.base, "groups", 1) != 1:
        warn_user(f"'{names.a}' belongs to a convolution in groups, which is no pair: AdamW")
        return None
    pair_ids = (id(A), id(B))
    if kind not in kinds or pair_ids in used.values():  # a tied module has several names
        return None
    for p, name in ((A, names.a), (B, names.b)):
        check(id(p) not in used, f"'{name}' is shared by two pairs; give each its own factors")
    used.update(dict.fromkeys(pair_ids, pair_ids))
    return pair


def _with_scale_and_base(pair: _NamedPair, scale: Scale, base_weight: bool) -> Pair:
    """A pair of a model with its scale, and with its base weight if that is wanted."""
    s = _scale_of(scale, pair.owner, pair.names)
    members: tuple[Any, ...] = ((pair.names.a, pair.A), (pair.names.b, pair.B))
    views = pair.views
    if pair.names.embedding:  # the table is (V, d): its pair is A^T (V, r), which starts at 0, B^T
        members = members[::-1]
    if base_weight:
        members = (*members, _base_weight(pair))
        if _is_stored_transposed(pair.owner, pair.base):
            views = [*views, "transposed"]
        else:
            views = [*views, "flatten" if pair.kind == "conv" else "auto"]
    return Pair(members, views, s)


def _unused_parameters(
    named: dict[str, Tensor], used: Mapping[int, Any]
) -> list[tuple[str, Tensor]]:
    """Trainable parameters outside of pairs, each under its first name at the place of its last."""
    rest = {
        id(p): (name, p)
        for name, p in reversed(named.items())
        if p.requires_grad and id(p) not in used
    }
    return [*rest.values()][::-1]


# checks, and scales and base weights of modules ---------------------------------------------------


def _is_scale(s: Any) -> bool:
    """Whether s can be a scale; rules divide by its square, which no float may lose."""
    return is_number(s) and 1e-12 <= plain_number(s) <= 1e12


def _scale_message(s: Any) -> str:
    return (
        f"scale must be a positive finite number from 1e-12 to 1e12, got {shown(s)}; it is "
        "alpha / r of the adapter"
    )


def _pair_kind(
    A: Tensor, B: Tensor, a: str, b: str, embedding: bool = False
) -> tuple[str, list[str]]:
    """Kind of a pair and the views of its factors; refuses factors that are no pair."""
    _check_pair(A, B, a, b)
    if embedding:
        return "embedding", ["transposed", "transposed"]
    if _is_conv(A, B):
        return "conv", ["flatten", "flatten"]
    return ("linear" if A.ndim == 2 else "expert"), ["auto", "auto"]


def _is_conv(A: Tensor, B: Tensor) -> bool:
    pointwise = all(side == 1 for side in B.shape[2:])
    return A.ndim == B.ndim > 2 and pointwise and A.shape[0] == B.shape[1]


def _check_pair(A: Tensor, B: Tensor, a: str, b: str, *, warns: bool = True) -> None:
    """Refuse factors that do not belong together; the message says what to do."""
    for p, name in ((A, a), (B, b)):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(p).__name__}")
        check(not is_lazy(p), f"{name} has no shape yet; run the model once before")
        check(not p.is_nested, f"{name} is a nested tensor, whose parts must be pairs of their own")
        if p.is_complex():
            raise RuntimeError(f"complex parameters are not supported: {name}")
    check(A is not B, f"{a} and {b} are one tensor; a pair needs two")
    if _is_conv(A, B):
        A, B = A.flatten(1), B.flatten(1)
    stacked = A.ndim == B.ndim == 3 and A.shape[0] == B.shape[0]
    for p, name in ((A, a), (B, b)):
        check(
            p.ndim == 2 or stacked,
            f"expected 2-D (or conv 4-D, expert 3-D) factors, got {tuple(p.shape)} for {name}",
        )
    r, n, m = A.shape[-2], A.shape[-1], B.shape[-2]
    if B.shape[-1] != r:
        hint = "; swapped order?" if n == m else ""
        if m == r or n == B.shape[-1]:
            hint = APART  # two factors of one kind
        raise ValueError(f"rank mismatch: {a} has r={r} but {b} has r={B.shape[-1]}{hint}")
    check(A.device == B.device, f"{a} is on {A.device} but {b} on {B.device}; keep a pair together")
    if warns and r > min(m, n):
        warn_user(
            f"{a} has r={r} > min(m, n)={min(m, n)}: Gram matrices are singular, damping is used"
        )


def _scale_of(scale: Scale, owner: nn.Module | None, names: _PairNames) -> float:
    """The scale of one pair, by the option ``scale`` or from the module."""
    found: Any = scale
    if scale is None:
        found = getattr(owner, "scaling", None)
        if isinstance(found, Mapping):
            found = found.get(names.adapter)
        if isinstance(found, Tensor) and found.numel() == 1 and found.device.type != "meta":
            found = found.item()
    elif isinstance(scale, Mapping):
        matching_prefixes = [
            prefix for prefix in scale if f"{names.module}.".startswith(f"{prefix}.") or not prefix
        ]
        matching_prefixes.sort(key=lambda prefix: len(str(prefix)))
        found = scale[matching_prefixes[-1]] if matching_prefixes else None
    elif callable(scale):
        found = _asked_scale(scale, names.module)
    where = f"module '{names.module}' tells none, so pass scale=alpha/r"
    check(
        _is_scale(found),
        f"scale must be a positive finite number from 1e-12 to 1e12, got {shown(found)} ({where})",
    )
    return float(found)


def _asked_scale(scale: Callable[[str], float], module: str) -> float:
    """What a user's function says of a module; its own errors do not tell that it was a scale."""
    try:
        return scale(module)
    except Exception as error:
        raise ValueError(
            f"scale={shown(scale)} fails for module {module!r}: {type(error).__name__}: {error}"
        ) from error


def _base_weight(pair: _NamedPair) -> tuple[str, Tensor]:
    """The weight under a pair, by name."""
    module = pair.names.module
    W = getattr(pair.base, "weight", None)
    if not isinstance(W, Tensor):
        raise ValueError(f"module '{module}' has no base weight; pass (A, B, W0) tuples")
    refuse_quantized(W, f"'{module}'")
    path = [module, "" if pair.base is pair.owner else "base_layer", "weight"]
    return ".".join(filter(None, path)), W


def refuse_quantized(W: Tensor, owner: str) -> None:
    """Refuse a base weight that the optimizer cannot write.

    Raises:
        TypeError: If W holds no plain floating point numbers.
    """
    if not W.is_floating_point() or hasattr(W, "quant_state"):
        raise TypeError(
            f"base weight of {owner} is quantized; SwitchLoRA needs a floating point weight"
        )


def _is_stored_transposed(owner: nn.Module | None, base: nn.Module | None) -> bool:
    """Whether the base weight is stored (in, out), as GPT-2's Conv1D does."""
    return bool(getattr(owner, "fan_in_fan_out", False)) or type(base).__name__ == "Conv1D"
