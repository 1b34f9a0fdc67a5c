"""SymmetryStack: one optimizer, and the rule that fits its symmetry for every role of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from ._core.rule import Rule, defaults_of, rule_class
from ._core.validation import check, check_numbers, describe_unknown, shown
from ._driver.checkpoint import grouped_as_saved
from ._driver.checks import (
    check_trainable,
    check_values,
    refuse_sharded_module,
    refuse_sharded_parameters,
)
from ._driver.optimizer import StackedOptimizer
from ._driver.param_groups import COMMON, LISTS, parameters_of, warn_user
from ._roles.classify import Row, classify, guessed_shape, route_all
from ._roles.policies import (
    PAPER_LRS,
    Settings,
    check_role_policy,
    policy_groups,
    rule_override,
    to_group_keys,
)
from ._roles.role_table import shape_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._driver.param_groups import Common


@dataclass(frozen=True)
class SymmetryStackRule(Rule):
    """Default rule of a stack, which never runs: every group names the rule of another method.

    The field ``momentum`` is there for schedulers that cycle the momentum of all groups.
    """

    momentum: float = 0.95

    def __post_init__(self) -> None:
        check_numbers(self, momentum="[0, 1]")

    @override
    def state(self, *sides: Any) -> Any:
        raise ValueError(
            "the group key 'rule' must name the method of its matrices in SymmetryStack, such as "
            "'Muon'; without a rule a group is sorted by the policy, as it is added"
        )


class SymmetryStack(StackedOptimizer):
    """SymmetryStack: one optimizer, each role of a model under the rule that its symmetry allows.

    A group of maps that moves weights and leaves the loss alone must move the update likewise. With
    ``policy="symmetry"``, for a model that :func:`classify` has read::

        token embedding           rows change places, width turns     RowNorm
        head, untied              the same; one vector on all rows    RowNorm, centred
        gate and up               neurons change places, width turns  Hybrid, a row for each neuron
        down                      the same for its columns            Hybrid on columns
        router                    as a head                           RowNorm, centred, RMS 0.06
        q, k, v, o                heads change places                 Muon, head by head
        experts                   change places, each as above        the same, for each expert
        other matrices            -                                   Muon
        gains, biases, positions  -                                   AdamW

    Centring is left out where the loss feels the mean of the logits: tied embeddings, heads under a
    soft cap or z-loss, routers under a sigmoid or z-loss, softmax routers that are not known as
    such, and weights of one row, of which centring leaves nothing. A z-loss of the training loop
    is not seen: ``overrides={name: {"centred": False}}``.

    Source: *Symmetry-Compatible Principle for Optimizer Design: Embeddings, LM Heads, SwiGLU MLPs,
    and MoE Routers*, arXiv 2605.18106, and its published code.

    Args:
        params: A module, (named) parameters or groups. Groups without ``rule`` are sorted by name
            and shape, which tell less than a module.
        lr: Learning rate of all roles (default: 1e-3); AdamW's carries over.
        policy: ``"symmetry"`` (default); ``"muon+adamw"``, Muon for hidden matrices; ``"adamw"``;
            or a dict: role (``"hidden"``, ``"embedding"``, ...) or part (``"gate"``, ``"out"``,
            ``"position"``, ..., which counts first) -> a rule: ``RowNorm``,
            ``partial(GaLore, rank=0.25)``, ``"Muon"``, ``"adamw"``, or group keys
            ``{"rule": "Spectral", "polar": "svd", "lr": 1e-2}``. ``view="heads"`` in these means
            head by head. Roles without an entry are as under ``"symmetry"``. ``centred``, ``axis``
            and ``pair`` of a rule follow the weight unless the policy gives them; all else has the
            defaults of the rule's class.
        overrides: What :func:`classify` takes (roles, or dicts of a row's fields), or rules as in
            ``policy``, by name, pattern, parameter, module or function; the first match counts.
            None (default): no override.
        adjust_lr_fn: ``"match_rms_adamw"`` (default), one lr for all; ``"paper"``, or
            ``"paper:qwen3"``, ``"paper:gemma3"``, ``"paper:olmoe"``, ``"paper:gpt_oss"``: rules as
            published, each role at its published rate relative to the hidden matrices', which is
            ``lr`` (theirs: 2e-2, 2e-2, 5e-3, 1e-3; see ``PAPER_LRS``). ``"paper"`` takes
            ``"olmoe"`` for a model with routers, else ``"qwen3"``.
        weight_decay: Decoupled weight decay (default: 0.0); token embeddings, heads and routers
            have none.
        **options: Keywords of every optimizer, see :class:`StackedOptimizer`.

    Raises:
        ValueError: For an unknown policy, role, part or rule, a value out of range, ``overrides``
            without a module, an override that matches nothing, or ``adjust_lr_fn="paper"`` with a
            tensor ``lr``.
        TypeError: For an unknown keyword.

    State: one ``momentum_buffer`` for each matrix, half of AdamW's state; AdamW's for the rest.

    Caveat: symmetry says which updates are consistent, which leaves open which one is best; the
    published comparison tunes every role's rate by itself.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from stiefel.optimizers import GaLore, SymmetryStack
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> optimizer = SymmetryStack(model, lr=1e-3, policy={"hidden": partial(GaLore, rank=2)})
        >>> [(row.name, row.rule) for row in optimizer.assignment()][:2]
        [('0.weight', 'RowNorm'), ('1.weight', 'GaLore')]
    """

    _policy: str | Mapping[str, Any] = "symmetry"
    _scale = "match_rms_adamw"
    _overrides: Any = None
    _initial_lr: float | Tensor = 1e-3
    _named_rows: Mapping[Tensor, Row] = {}
    _unplaced = 0

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        policy: str | Mapping[str, Any] = "symmetry",
        overrides: Any = None,
        adjust_lr_fn: str = "match_rms_adamw",
        weight_decay: float = 0.0,
        **options: Unpack[Common],
    ) -> None:
        refuse_sharded_module(params, "SymmetryStack")
        check_role_policy(policy)
        _check_options(policy)
        scales = ("match_rms_adamw", "paper", *(f"paper:{name}" for name in PAPER_LRS))
        check(
            isinstance(adjust_lr_fn, str) and adjust_lr_fn in scales,
            f"adjust_lr_fn must be one of {', '.join(scales)}, got {shown(adjust_lr_fn)}",
        )
        is_overrides = isinstance(overrides, Mapping) or (
            isinstance(overrides, (tuple, list))
            and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in overrides)
        )
        check(
            overrides is None or is_overrides,
            f"overrides must be None, a dict or a list of pairs, got {shown(overrides)}",
        )
        check(
            overrides is None or isinstance(params, nn.Module),
            "overrides need the module: pass the model instead of its parameters",
        )
        check(
            not (isinstance(lr, Tensor) and adjust_lr_fn != "match_rms_adamw"),
            "adjust_lr_fn='paper' gives groups fixed multiples of lr, which would not follow a "
            "tensor; pass a float",
        )
        check(
            not isinstance(params, nn.Module) or options.get("view", "auto") == "auto",
            "view is read from the model; give it to one weight in overrides, or to a group",
        )
        check(
            str(options.get("write")) != "eco",
            "write='eco' puts rounding errors into the momentum, which does not go with all rules "
            "of SymmetryStack; choose write='stochastic' or 'kahan', or give it to groups with "
            "rule='Muon'",
        )
        self._policy, self._scale = policy, adjust_lr_fn
        self._overrides, self._initial_lr = overrides, lr
        if isinstance(params, Iterable) and not isinstance(params, (nn.Module, Tensor)):
            params = list(params)
            self._named_rows = rows_by_names(params)
        super().__init__(params, SymmetryStackRule(), lr, weight_decay, **options)
        # both may hold what an optimizer must not keep alive
        self._overrides, self._named_rows = None, {}

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one without ``rule`` becomes groups by the policy."""
        groups = [param_group]
        if isinstance(param_group, dict) and param_group.get("rule") is None:
            groups = self._grouped_by_policy(param_group)
        count = len(self.param_groups)
        try:
            for group in groups:
                super().add_param_group(group)
        except BaseException:
            del self.param_groups[count:]
            raise

    @override
    def _params_of_model(self, model: nn.Module) -> Any:
        """Groups of a model by the policy, in which vectors have no weight decay."""
        super()._params_of_model(model)
        pairs = list(
            self._overrides.items()
            if isinstance(self._overrides, Mapping)
            else self._overrides or ()
        )
        rule_overrides = [rule_override(choice) for _, choice in pairs]
        # the number of the override that counts for each parameter, be it a role or a rule
        marks = classify(model, [(key, {"part": f"#{i}"}) for i, (key, _) in enumerate(pairs)])
        role_overrides = [
            pair for pair, keys in zip(pairs, rule_overrides, strict=True) if keys is None
        ]
        named = dict(model.named_parameters())
        rows, own_keys = [], dict[str | None, Settings]()
        for mark, row in zip(marks, classify(model, role_overrides), strict=True):
            is_overridden = mark.part.startswith("#")
            keys = rule_overrides[int(mark.part[1:])] if is_overridden else None
            if keys is not None:
                own_keys[row.name] = keys
                row = replace(row, why=mark.why)
            rows.append(row)
        params = [named[row.name] for row in rows if row.name]
        lr = self._initial_lr
        return policy_groups(rows, params, self._policy, self._scale, lr, own_keys, decays=True)

    def _grouped_by_policy(self, group: dict[str, Any]) -> list[Settings]:
        """Groups with a rule from a group without one; what torch refuses is returned unchanged."""
        if "params" not in group or isinstance(group["params"], set):
            return [group]
        params, names = parameters_of(group)
        mixed = None in names and any(names)
        if not params or mixed or not all(isinstance(p, Tensor) for p in params):
            return [group]
        check_trainable(params, names)
        refuse_sharded_parameters(params, names, "SymmetryStack")
        known = {} if self._model_roles is None else self._model_roles.rows()
        rows = [
            replace(row, name=name or row.name)
            for name, row in zip(names, self._rows(params, names, known), strict=True)
        ]
        own_keys = {k: v for k, v in group.items() if k not in ("params", "param_names", "rule")}
        check_values(own_keys)  # published rates are multiples of the group's
        for key in LISTS:  # one that is None says nothing, also not against the policy
            if own_keys.get(key, 0) is None:
                del own_keys[key]
        lr = own_keys.get("lr", self.defaults["lr"])
        groups = policy_groups(rows, params, self._policy, self._scale, lr, {})
        return [{**g, **own_keys} for g in groups]

    def _rows(
        self, params: list[Any], names: list[str | None], known: Mapping[Tensor, Row]
    ) -> list[Row]:
        """Rows by the model, else by names; counts matrices of which neither tells the part."""
        known = {**self._named_rows, **known}
        unknown = any(
            is_lazy(p) and not n and p not in known for p, n in zip(params, names, strict=True)
        )
        check(
            self._scale == "match_rms_adamw" or not unknown,
            "adjust_lr_fn='paper' needs the role of every parameter, which one without a name and "
            "a shape does not tell; pass model=model, or run the model once before",
        )
        routed = rows_of_named(names, params)
        rows = [known.get(p, row) for p, row in zip(params, routed, strict=True)]
        # without names all matrices share a group, whose view "auto" flattens these too
        rows = [
            replace(row, view="auto") if row.name is None and len(row.shape) > 3 else row
            for row in rows
        ]
        self._unplaced += sum(
            row.role == "hidden" and not row.part and not row.kind
            for p, row in zip(params, rows, strict=True)
        )
        return rows

    @override
    def _warn_of_shapes(self) -> None:
        """Warn once of hidden matrices whose part nothing tells, since the policy needs it."""
        count, self._unplaced = self._unplaced, 0
        by_part = not isinstance(self._policy, str) or self._policy == "symmetry"
        if count and by_part and not self._has_warned_of_shapes:
            self._has_warned_of_shapes = True
            warn_user(
                f"{count} matrices have the role 'hidden', as neither a model nor their names say "
                "which part of a layer they are, so SymmetryStack trains them as plain hidden "
                "matrices; pass model=model"
            )

    @override
    def _prepare_loaded(self, loaded: Any) -> dict[str, Any]:
        """A checkpoint in the order of the groups, else in groups of its own.

        What has no shape yet is placed by its name, so that groups of one model can differ.
        """
        try:
            return super()._prepare_loaded(loaded)
        except ValueError as error:
            own, groups = self.param_groups, grouped_as_saved(self.param_groups, loaded)
            if groups is None:
                raise
            self.param_groups = groups
            try:
                return super()._prepare_loaded(loaded)
            except ValueError:
                self.param_groups = own
                raise error from None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_policy": self._policy, "_scale": self._scale}


def rows_by_names(items: Sequence[Any]) -> dict[Tensor, Row]:
    """Rows of parameters with names, or of all such groups together: neighbours tell parts."""
    groups = [
        x for x in items if isinstance(x, Mapping) and "params" in x and x.get("rule") is None
    ]
    pairs = [x for x in items if isinstance(x, tuple) and len(x) == 2]
    for group in groups:
        params = group["params"]
        if isinstance(params, (list, tuple)):  # a generator can be read only once
            pairs += zip(parameters_of(group)[1], parameters_of(group)[0], strict=True)
    named = {p: name for name, p in pairs if name and isinstance(p, Tensor)}
    return dict(zip(named, rows_of_named([*named.values()], [*named]), strict=True))


def rows_of_named(names: Sequence[str | None], params: Sequence[Tensor]) -> list[Row]:
    """Rows by names and shapes; a weight without a shape yet is what its name says it will be."""
    shapes = [
        guessed_shape(name) if name and is_lazy(p) else shape_of(p)
        for name, p in zip(names, params, strict=True)
    ]
    rows = route_all(names, shapes)
    # a pair needs two equal shapes
    return [
        replace(row, pair=None) if is_lazy(p) else row for row, p in zip(rows, params, strict=True)
    ]


def _check_options(policy: str | Mapping[str, Any]) -> None:
    """Refuse an option in a policy that its rule does not have."""
    for label, choice in policy.items() if isinstance(policy, Mapping) else ():
        keys = to_group_keys(choice)
        own = {} if keys["rule"] == "adamw" else defaults_of(rule_class(keys["rule"]))
        known = {*own, *COMMON, "rule", "lr", "weight_decay", "betas", "eps"}
        message = describe_unknown(keys, known, f"option of policy {label!r}")
        check(message is None, message or "")
