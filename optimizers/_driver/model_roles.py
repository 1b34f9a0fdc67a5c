"""What a module says about the parameters of a group, as lists beside ``params``."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from .._core.rule import Rule
from .._roles.classify import Row, classify, route
from .._roles.residual_sides import sides_of
from .._roles.role_table import decay_factor
from .layout import is_sharded
from .param_groups import plain_name


class ModelRoles:
    """Roles of a module's parameters by identity; the module itself is held weakly.

    Attributes:
        is_params: Whether the optimizer was given the module as ``params``, so that the decay of
            its vectors is ours to choose.
    """

    def __init__(self, model: nn.Module, is_params: bool) -> None:
        self._model, self.is_params = weakref.ref(model), is_params
        # weak, since a wrapper replaces the parameters to free their memory
        self._rows: MutableMapping[Tensor, Row] = WeakIdKeyDictionary()

    def rows(self) -> Mapping[Tensor, Row]:
        """Row by parameter, read anew where the module has changed; empty once it is gone."""
        model = self._model()
        if model is None:
            return {}
        named = dict(model.named_parameters())
        if any(p not in self._rows for p in named.values()):
            self._rows = WeakIdKeyDictionary()
            self._rows.update((named[row.name], row) for row in classify(model) if row.name)
        return self._rows


def refuse_replaced(
    model: nn.Module, params: Sequence[Tensor], names: Sequence[str | None]
) -> None:
    """Raise if a module holds DTensors now where the optimizer has plain parameters.

    Args:
        model: The module that gave the parameters.
        params: Parameters of the optimizer.
        names: Their names.

    Raises:
        RuntimeError: A step would train what the module does not use any more.
    """
    named = {plain_name(name): p for name, p in model.named_parameters()}
    for p, name in zip(params, names, strict=True):
        now = named.get(plain_name(name or ""))
        if now is not None and now is not p and is_sharded(now) and not is_sharded(p):
            raise RuntimeError(
                f"parameter {name!r} of the optimizer is not that of the module any more, which "
                "was sharded since; build the optimizer after fully_shard, or put the module's "
                "parameters into group['params']"
            )


def lists_of(
    rows: Sequence[Row | None],
    params: Sequence[Tensor],
    rule: Rule | None,
    *,
    has_rule: bool,
    decays: bool,
    own_view: bool,
) -> dict[str, list[Any]]:
    """Rules, views, sides, roles, reasons and decays of a group's parameters, by group key.

    Args:
        rows: Per parameter its row, None for one without a shape of which nothing is known.
        params: The parameters.
        rule: The group's rule, None for an AdamW group.
        has_rule: Whether the group names its rule, which then takes every matrix.
        decays: Whether vectors get no weight decay.
        own_view: Whether the group has a view of its own, which counts for all of it.
    """
    # decays are there in every form with a model: a flat distributed checkpoint reads only the
    # keys that the group to be loaded has
    lists: dict[str, list[Any]] = {
        "roles": [row.role if row else None for row in rows],
        "reasons": [row.why if row else None for row in rows],
        "decays": [decay_factor(row.role) if decays and row else 1.0 for row in rows],
    }
    if rule is None or (len(rule.members) > 1 and not hasattr(rule, "side")):
        return lists  # AdamW, and LoRA pairs, whose order tells the members
    targets = [_target(p, row, has_rule) for p, row in zip(params, rows, strict=True)]
    lists["rules"] = targets
    if own_view:
        return lists
    matrices = [
        row
        for row, target in zip(rows, targets, strict=True)
        if row and target == "matrix" and not row.is_lazy
    ]
    views = {row.name: row.view for row in matrices}
    lists["views"] = [views.get(row.name, "auto") if row else "auto" for row in rows]
    sides = sides_of(matrices, rule)
    if sides:
        lists["sides"] = [sides.get(row.name) if row else None for row in rows]
    return lists


def _target(p: Tensor, row: Row | None, has_rule: bool) -> str | None:
    """``"matrix"`` or ``"adamw"``; None for a parameter that has no shape yet."""
    if row is None:
        return None
    is_forced = has_rule and not is_lazy(p) and p.ndim >= 2 and p.numel()
    return "matrix" if is_forced else row.rule


def rows_for(
    params: Sequence[Tensor], names: Sequence[str | None], known: Mapping[Tensor, Row]
) -> list[Row | None]:
    """A row per parameter: the model's where it knows the parameter, else by name and shape."""
    return [
        known.get(p) or (None if is_lazy(p) else route(name, tuple(p.shape)))
        for p, name in zip(params, names, strict=True)
    ]


def decays_of(named: Sequence[tuple[str, Tensor]]) -> list[float]:
    """Factors on the weight decay by name and shape: 0 for vectors, 1 for all else."""
    names, params = [name for name, _ in named], [p for _, p in named]
    return [decay_factor(row.role if row else None) for row in rows_for(params, names, {})]


def complete_names(
    names: Sequence[str | None], params: Sequence[Tensor], known: Mapping[Tensor, Row], first: int
) -> list[str]:
    """The names given, else the model's, else one made up from the flat position.

    Args:
        names: Names that the user gave.
        params: The parameters.
        known: The model's rows.
        first: Flat position of the first parameter.
    """
    completed = []
    for i, (name, p) in enumerate(zip(names, params, strict=True), first):
        row = known.get(p)
        completed.append(name or (row.name if row else None) or f"parameter_{i}")
    return completed
