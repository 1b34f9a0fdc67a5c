"""The driver: groups, plan, state, flags, clocks and the write, once for all methods."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from operator import is_
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .._core.rule import (
    RULE_CLASSES,
    BatchedCall,
    Direction,
    Member,
    Rule,
    defaults_of,
    rule_class,
    settings_of,
)
from .._core.validation import check, describe_unknown, misspelt_option, shown
from .._roles.assignment import OptimizerAssignment
from . import adamw, checkpoint, sharded_update
from .backward import BackwardHandle, checked_every
from .batched_calls import CallBatcher, DirectionIterator, UpdateGenerator
from .buckets import STACK_SETTINGS, Bucket, StepPlan
from .capture import (
    Captured,
    Numbers,
    check_capture,
    held_settings,
    is_capturable,
)
from .checks import (
    check_group,
    check_lists,
    check_matrix,
    check_ready,
    check_values,
    check_written_values,
    is_mark,
    refuse_sharded_module,
    refuse_stagger,
    warn_without_matrix,
)
from .decay import Decay, large_decay, store_decay_lr
from .finite import (
    Findings,
    LateFlags,
    inspect_grads,
    is_capturing,
    names_or_positions,
    refuse,
    roll_back,
    skip_warning,
    snapshot,
    stops_step,
)
from .layout import is_sharded
from .model_roles import ModelRoles, complete_names, lists_of, refuse_replaced, rows_for
from .norm_write import BY_ROWS, Steering, refuse_zero_weights, write_steered_
from .norms import RADIUS, follow_radii, radii_of
from .param_groups import (
    COMMON,
    FOREIGN_KEYS,
    GROUP_KEYS,
    LISTS,
    Part,
    assigned_rows,
    copy_list,
    count_routed_by_shape,
    describe,
    names_of,
    parameters_of,
    parts_of,
    refuse_view,
    rule_of,
    store_adamw_lr,
    to_param_groups,
    warn_user,
    with_adamw_names,
)
from .replicas import checked_group
from .saved_state import refuse_unsound_state
from .settings import refuse_state_changes, refuse_unfit_state
from .shards import Shards
from .units import Unit, units_of
from .windows import assign_block_positions, stagger_refreshes
from .write import Run, write_, write_list_, write_runs_

UNIT_SETTINGS = (
    *("rule", "view", "state_dtype", "stagger", "draws"),
    *("rules", "views", "sides", "roles", "param_names", "decays", "positions"),
    *("write", "compat", "seed"),
    *("weight_norm", "cautious", "plan", "comm_dtype", "spread_replicas"),
)
"""Group keys beside the rule's fields that decide how parameters become units."""


@cache
def _setting_defaults(cls: type[Rule]) -> dict[str, Any]:
    """Group keys that decide the rule and the units of a group, with their defaults."""
    return {**dict.fromkeys((*UNIT_SETTINGS, *STACK_SETTINGS)), **defaults_of(cls)}


class StackedOptimizer(Optimizer):
    """Runs a rule over parameter groups; every public optimizer is a thin class on top of it.

    Matrices go to the rule, everything else to torch's own AdamW, as :meth:`assignment` lists.

    Args:
        params: A module (roles are found by :func:`classify`; its vectors have no weight decay,
            its frozen parameters train once they are unfrozen), named parameters (names route
            embeddings and heads to AdamW, unless they are numbers), parameters (shape alone
            decides), or groups: dicts with ``params``, any field of the rule, any keyword below,
            and ``rule``: ``"adamw"``, or the name of a method. Groups stay as many as they are, a
            module is one. Keys of other code are kept; a key that is an option with one wrong
            letter is refused.
        rule: The method and its hyper-parameters.
        lr: Learning rate, a float or a 1-element tensor.
        weight_decay: Decoupled weight decay, of AdamW parameters too (default: 0).
        model: The module whose parameters ``params`` are, in any form, so that roles come from it;
            it is held weakly. None (default): names and shapes decide.
        process_group: A ``ProcessGroup``, or a ``DeviceMesh`` of one axis, over which the plain
            weights and their gradients are equal, as under DistributedDataParallel: its ranks share
            the work for whole matrices and for refreshes, with the bits of doing it all on each.
            It is no group key, and copies, pickles and checkpoints do not have it. None (default):
            nothing is sent for plain weights.
        adamw_lr: Learning rate of the AdamW parameters; None (default): ``lr``. Kept as the group
            key ``adamw_lr_ratio``, so that schedulers scale both; ``group["adamw_lr"] = x`` sets it
            anew, as a ratio to the current ``lr``, or to the ``initial_lr`` of a scheduler that is
            made before the next step. An AdamW group with ``lr`` of its own has that.
        adamw_betas: Betas of the AdamW parameters; None (default): the method's ``betas``, else
            (0.9, 0.95). Where the method has no ``betas``, as Muon, that name means these.
        adamw_eps: Eps of the AdamW parameters (default: 1e-8).
        adamw_weight_decay: Weight decay of the AdamW parameters; None (default): ``weight_decay``.
        cautious: Whether only entries decay that the step does not move away from zero: W <-
            W - lr * weight_decay * W [U * W >= 0] - lr * U, entry by entry, with W before the step
            and U all that the step subtracts; for AdamW parameters the sign of U is that of the new
            first moment (default: False). With it a write takes one more pass and no fused kernel.
            Nothing refuses it: under ``compat`` the order is the published one, with this mask.
        decay_schedule: What a weight is multiplied by. ``"lr"`` (default): 1 - lr * weight_decay.
            ``"lr2"``: 1 - lr^2 * weight_decay. ``"independent"``: 1 - (lr / decay_lr) *
            weight_decay, which follows schedules of ``lr`` but not its size; a step then removes
            this share, so pass about 1e-4; above 0.01 is refused, from 1e-3 on it warns.
            ``"corrected"``: 1 - (lr^2 / decay_lr) * weight_decay, as AdamC does.
        decay_lr: The learning rate to which the last two refer, kept as a group key. None
            (default): the ``lr`` with which the group is made, before any scheduler changes it.
            AdamW parameters with ``adamw_lr`` refer to the same multiple of it.
        maximize: Ascend instead of descend (default: False).
        foreach: As in ``torch.optim.AdamW``, for the AdamW parameters (default: None).
        fused: As in ``torch.optim.AdamW``, for the AdamW parameters (default: None).
        capturable: Whether a CUDA graph may replay the step, see :meth:`prepare_replay` (default:
            False). Clocks, learning rates and weight decays of matrices are then read from the
            device; for AdamW parameters it is the flag of ``torch.optim.AdamW``. ``ARO``, ``SOAP``,
            ``SOAPMuon`` and classes for LoRA factors refuse it, and so do options that draw random
            numbers or wait at each step. A skipped update then counts: weight and state stay, the
            clock goes on.
        differentiable: Must be False (default); the key is there because torch reads it.
        nonfinite: What a NaN or infinite gradient does, of a matrix or of an AdamW parameter.
            ``"skip"`` (default): weight, state and clock of that parameter (of its whole pair, for
            LoRA factors) stay, all others move as in a step without it. ``"skip_step"``: nothing
            moves if a gradient of this group is bad, whatever the other groups say.
            ``"raise"``: RuntimeError before anything changes, which names the parameters.
            ``"ignore"``: gradients are not looked at, as in torch. What is skipped counts in
            :attr:`skipped`, and the first time warns. ``"skip_step"`` and ``"raise"`` wait for the
            device at every step.
        view: How a parameter becomes matrices, see ``_core/views.py`` (default: ``"auto"``).
        state_dtype: Name of the floating dtype of the state, such as ``"bfloat16"``; None
            (default): float32 (float64 for float64 weights). ``"int8"``: moments and momentum in 8
            bits with a scale for every 256 of a row, and the bases of GaLore and Fira; state of
            fewer than 4096 entries, state in rows of fewer than 8 and all the rest as under None;
            see ``kernels/quantize.py``. Averages of squares are rounded by random bits, which keeps
            steps of 0.001 on average; under ``compat`` to nearest, which loses them.
        write: How weights of bfloat16 and float16 are rounded; others always to nearest. ``"auto"``
            (default): as ``"stochastic"``, under ``compat`` as ``"nearest"``. ``"nearest"``: as
            torch does, which loses steps below half of a weight's last digit. ``"stochastic"``: up
            or down with the probability that keeps the mean, by bits that are a function of the
            seed, the name, the update and the entry. ``"kahan"``: to nearest, with what is cut off
            kept in bfloat16 for the next step. ``"eco"``: as ``"stochastic"``, with what is cut
            off put into the momentum (AdamW parameters and Muon only; Muon's bounded step follows
            only while it is no smaller than a weight's last digit). AdamW parameters have float32
            moments under all but ``"nearest"``.
        weight_norm: How the norms of matrices are steered, in words joined by ``+``; see
            ``docs/weight-control.md``. Of the step: ``"relative"``: as large as the weight, so that
            lr is a ratio; ``"floor:k"`` or ``"rowfloor:k"``: at least k (0.35, 0.3825) times as
            large as the weight, or row by row. Of the weight: ``"sphere"``: its norm stays,
            and plain decay has no effect; ``"brake:out,in"``: its norm changes by these shares
            (0.5, 1) of what the step would have it; ``"pin:out,in"``: only the radial part of the
            step, damped by them, changes it. ``"hyperball"`` is ``"relative+sphere"``.
            ``":rows"`` takes each row, ``":whole"`` the parameter instead of each matrix. AdamW
            parameters, published arithmetic (``compat``) and LoRA factors have none. None
            (default): norms go where steps lead.
        weight_radius: Root mean square of the entries that a ``"sphere"`` keeps, at any shape; None
            (default): that of the weight at its first update. State ``weight_radius`` has the norm.
            A value is taken at the next update after it was set, and again only if it changes:
            weights that :func:`qk_clip_` has scaled since keep what it has left.
        stagger: Whether refreshes of different weights are spread evenly over the window, so that
            no step but the first stalls (default: False). Where they come depends on the model.
        plan: How a sharded weight (a DTensor) is stepped, see ``docs/sharding.md``. ``"auto"``
            (default): the cheapest of the others that gives the result of one process, never
            ``"gather"``. ``"local"``: every rank steps what it holds and sends nothing.
            ``"reduce"``: every rank steps what it holds, and sums are sent. ``"owner"``: whole
            matrices travel, each to one rank. ``"gather"``: every rank does the work for the whole
            weight. A plan that is not exact for a weight is refused at the first step; ``"owner"``
            and ``"gather"`` always are. On plain tensors every name means local.
        comm_dtype: Name of the floating dtype in which gradients and updates of sharded weights
            are sent, such as ``"bfloat16"``; None (default): what keeps the bits of one process.
        spread_replicas: Whether replicas of a sharded weight (HSDP) share the work for whole
            matrices, instead of each doing all of it (default: False). It sends results between
            replicas, and changes none.

    Raises:
        ValueError: For a value out of range, an unknown group key, or a parameter that the method
            cannot train; the message names the way around.
        TypeError: For an unknown keyword.

    State: the rule's slots per parameter, and the host ints ``step`` and ``refreshed``. A value of
    a group that shapes no state (``lr``, ``momentum``, ``update_proj_gap``) may change at any step.
    One that would add, drop or reshape state (``rank``, ``state_dtype``) raises ValueError at the
    next step, with nothing changed.

    Temporary memory that the classes state is for float32 weights and state. A gradient of lower
    precision, ``maximize`` and ``state_dtype`` add a copy of the gradient or the state of one
    weight at a time (of one stack, for small weights).
    """

    _reference_key: ClassVar[str | None] = None
    """Group key by which the published package of the method marks its matrix groups."""
    _plan: StepPlan | None = None
    _model_roles: ModelRoles | None = None
    _module: weakref.ref[nn.Module] | None = None
    _process_group: Any = None
    """Ranks that share the work for plain weights; no copy and no pickle has it."""
    _is_built = False
    _has_warned_of_shapes = False
    _has_warned_of_decay = False
    _skipped: dict[Tensor, int] | None = None
    _seen: Sequence[dict[str, Any]] = ()
    """Groups as the last step has checked them; of a new one only the rule."""
    _radii: Sequence[float | None] = ()
    """What each group gave as ``weight_radius`` at the last step."""
    _pending: Sequence[LateFlags] = ()
    _numbers: Numbers | None = None
    """What buckets of groups with ``capturable`` read on the device."""
    _captured: Captured | None = None
    """The step that :meth:`prepare_replay` prepares."""
    _is_in_capture = False
    _in_backward: BackwardHandle | None = None
    """What steps inside of the backward pass, if it does."""
    _step_supports_amp_scaling: bool
    """There (and True) only as long as a GradScaler is to be refused."""
    _opt_called: bool
    _wait: bool | None = None
    """Whether the host waits for the finite flags; None: on CPU only. Tests set it."""

    def __init__(
        self,
        params: Any,
        rule: Rule,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        process_group: Any = None,
        **common: Any,
    ) -> None:
        common = with_adamw_names(common, settings_of(rule))
        method_keys = {"lr", "weight_decay", *settings_of(rule)}
        what = f"{type(self).__name__} keyword"
        message = describe_unknown(common, COMMON.keys() | method_keys, what)
        if message:
            raise TypeError(message)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            **settings_of(rule),
            **COMMON,
            **common,
            "rule": None,
            "method": rule.method(),
        }
        check_values(defaults)
        self._process_group = checked_group(process_group)
        for module in (params, model):
            refuse_sharded_module(module, rule.method())
            self._watch(module)
        store_adamw_lr(defaults)
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be the module of the parameters, got {shown(model)}")
        if isinstance(params, nn.Module):
            check(model in (None, params), "model= and params name two modules; pass one of them")
            params = self._params_of_model(params)
        elif model is not None:
            self._model_roles = ModelRoles(model, is_params=False)
        super().__init__(to_param_groups(params, self._marking_keys()), defaults)
        self._set_draws()
        self._is_built, self._radii = True, radii_of(self.param_groups)
        self._warn_of_shapes()
        self._warn_of_decay()
        warn_without_matrix(self.param_groups, type(rule))

    # groups ---------------------------------------------------------------------------------------

    @property
    def _default_rule(self) -> type[Rule]:
        return RULE_CLASSES[self.defaults["method"]]

    def _params_of_model(self, model: nn.Module) -> Any:
        """The one group of a module, whose parameters get their roles as they are added."""
        self._model_roles = ModelRoles(model, is_params=True)
        return [{"params": list(model.named_parameters())}]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it whole; a refused group changes nothing.

        A late group is routed without regard to the others. Only the constructor, which sees all
        groups, gives those without a reference package's key to AdamW. A late group without names
        gets those of the model, or made-up ones, where the other groups have names.

        Args:
            param_group: ``params`` and any overrides; see the class docstring.

        Raises:
            ValueError: If a key is a misspelling, a value out of range or a parameter cannot be
                trained.
        """
        name = param_group.get("rule") if isinstance(param_group, dict) else None
        if name is not None and not isinstance(name, str):
            rule_class(name)  # refuses it before anything compares it, as it may be an array
        if self._is_built:
            self._refuse_written()
        super().add_param_group(self._prepare_group(param_group))
        self._seen = [*self._seen, {"rule": self.param_groups[-1]["rule"]}]
        if self._is_built:
            self.param_groups[-1].setdefault("draws", self.param_groups[0]["draws"])
            self._warn_of_shapes()
            self._warn_of_decay()
        if self._in_backward is not None:
            self._in_backward.attach()

    def _prepare_group(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """Complete a user's group after all checks, in a copy."""
        if not isinstance(param_group, dict):
            return param_group
        group = dict(param_group)
        if "params" not in group:
            raise ValueError("a parameter group needs the key 'params'")
        if isinstance(group["params"], set):
            return group
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        is_marked = self._read_reference_key(group)
        rule_name = group.get("rule")
        rule = self._default_rule if rule_name in (None, "adamw") else rule_class(rule_name)
        if rule_name == "adamw" and "eps" in group:  # in an AdamW group it is AdamW's
            group.setdefault("adamw_eps", group["eps"])
        if rule_name == "adamw" and "lr" in group and "adamw_lr" not in group:
            group.setdefault("adamw_lr_ratio", None)  # a learning rate of its own
        group = with_adamw_names(group, defaults_of(rule))
        other_defaults = {} if rule is self._default_rule else defaults_of(rule)
        self._refuse_misspelt_keys(group, other_defaults)
        # a group of another method starts from that method's defaults, not from this one's
        full_group = {**self.defaults, **other_defaults, **group}
        check_values(full_group)
        store_adamw_lr(group, full_group["lr"])
        store_decay_lr(group, full_group)
        self._add_roles(group, full_group)
        full_group.update(group)
        check_group(full_group, self._default_rule, is_marked=is_marked)
        group = {key: full_group[key] for key in group}  # with plain values
        for name in other_defaults:
            group.setdefault(name, other_defaults[name])
        return group

    def _read_reference_key(self, group: dict[str, Any]) -> bool:
        """Set the rule of a group in the format of the published package; whether it is marked."""
        marks = [is_mark(key, group.get(key)) for key in self._marking_keys()]
        is_marked = any(marks) and "rule" not in group
        if is_marked:
            group["rule"] = self._default_rule.method()
        elif any(mark is False for mark in marks):
            group.setdefault("rule", "adamw")  # use_muon=False, also in a late group
        return is_marked

    def _marking_keys(self) -> tuple[str, ...]:
        """Group keys of published packages by which users mark the matrices."""
        own = self._reference_key
        return ("use_muon",) if own in (None, "use_muon") else ("use_muon", own)

    def _refuse_misspelt_keys(
        self, group: Mapping[str, Any], other_defaults: Mapping[str, Any]
    ) -> None:
        """Raise for a key that is an option with one wrong letter; other keys are kept."""
        check(
            "process_group" not in group,
            "process_group is no key of a parameter group; pass it to the constructor",
        )
        options = COMMON.keys() | self.defaults.keys() | other_defaults.keys()
        for name in group.keys() - self._known_keys() - other_defaults.keys() - FOREIGN_KEYS:
            option = misspelt_option(name, options)
            if option is not None:
                raise ValueError(
                    f"parameter group key {name!r} is unknown; did you mean {option!r}?"
                )

    def _known_keys(self) -> set[str]:
        """Group keys of this class."""
        return {*COMMON, *GROUP_KEYS, *LISTS, *self.defaults, *self._marking_keys()}

    def _add_roles(self, group: dict[str, Any], full_group: Mapping[str, Any]) -> None:
        """Complete the names of a group, and add what the model says about its parameters."""
        params, names = parameters_of(group)
        if any(not isinstance(p, Tensor) for p in params) or isinstance(group["params"], Tensor):
            return  # torch refuses what is no tensor, with its own text
        known = self._model_roles.rows() if self._model_roles is not None else {}
        is_named = (
            bool(self.param_groups[0].get("param_names")) if self.param_groups else bool(known)
        )
        if self._model_roles is None and (not self._is_built or not is_named or any(names)):
            return
        position = sum(len(other["params"]) for other in self.param_groups)
        if is_named and (known or self._is_built):
            names = [*complete_names(names, params, known, position)]
            group["params"] = list(zip(names, params, strict=True))
            group.pop("param_names", None)
        if not known or group.get("rules") is not None:
            return
        rows = rows_for(params, names, known)
        refuse_view(self.defaults["view"], [row for row in rows if row is not None])
        assert self._model_roles is not None
        lists = lists_of(
            rows,
            params,
            rule_of(full_group, self._default_rule),
            has_rule=full_group.get("rule") is not None,
            decays=self._model_roles.is_params and not self._is_built,
            own_view="view" in group,
        )
        group.update((key, x) for key, x in lists.items() if full_group.get(key) is None)

    def _set_draws(self) -> None:
        """Random draws go by names where all parameters have one; the groups say which."""
        named = all(group.get("param_names") for group in self.param_groups)
        for group in self.param_groups:
            group.setdefault("draws", "name" if named else "position")

    def _warn_of_shapes(self) -> None:
        """Warn once if matrices go to the rule by shape alone beside vectors that nobody marked."""
        if self._has_warned_of_shapes:
            return
        count = count_routed_by_shape(self.param_groups, self._default_rule)
        if count:
            self._has_warned_of_shapes = True
            method = self._default_rule.method()
            warn_user(
                f"{count} matrices without names, or with numbers for names, go to {method} by "
                "their shape alone, embeddings and heads among them; pass model=model, or give "
                f"groups rule={method!r} and rule='adamw'"
            )

    def _warn_of_decay(self) -> None:
        """Warn once of a decay that removes much of a weight at every step."""
        text = None if self._has_warned_of_decay else large_decay(self.param_groups)
        if text is not None:
            self._has_warned_of_decay = True
            warn_user(text)

    def assignment(self) -> OptimizerAssignment:
        """Return a table of every parameter's rule, learning rate and decay, and why; it prints."""
        self._refuse_written()
        rows = [
            row for group in self.param_groups for row in assigned_rows(group, self._default_rule)
        ]
        flat_params = [p for group in self.param_groups for p in group["params"]]
        if self._process_group is not None or any(map(is_sharded, flat_params)):
            plan = self._build_plan(flat_params, [self._settings(g) for g in self.param_groups])
            assert plan.shards is not None
            sent, plan_of = plan.shards.bytes_per_step(), plan.shards.plan_of
            floats = {unit.positions[i] for unit in plan.units for i, _ in unit.float_slots}
            rows = [
                replace(
                    row,
                    plan=plan_of(i),
                    bytes_per_step=sent.get(i, 0),
                    state="float32" if i in floats else "",
                )
                for i, row in enumerate(rows)
            ]
        kept = [key for group in self.param_groups for key in group if self._is_foreign(group, key)]
        return OptimizerAssignment(tuple(rows), tuple(dict.fromkeys(kept)))

    def _refuse_written(self) -> None:
        """Raise ValueError for a value, written into a group, that the next step would refuse."""
        check_written_values(self.param_groups, self._default_rule, self._seen)

    def _is_foreign(self, group: Mapping[str, Any], key: str) -> bool:
        """Whether a group key belongs to other code."""
        name = group.get("rule")
        own = {} if name in (None, "adamw") else defaults_of(rule_class(name))
        return key not in self._known_keys() and key not in own

    # plan -----------------------------------------------------------------------------------------

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """Values that decide a group's rule and units, with defaults for missing keys."""
        cls = self._default_rule if group["rule"] in (None, "adamw") else rule_class(group["rule"])
        defaults = _setting_defaults(cls)  # type: ignore[arg-type]  # mypy: no hash of a class
        return {name: group.get(name, default) for name, default in defaults.items()}

    def _get_plan(self) -> StepPlan:
        """The plan, with rules and units made anew only if groups changed.

        Raises:
            ValueError: If settings changed that shape the state of a parameter. Plan, state and
                groups are as before.
        """
        try:
            return self._plan_of_written()
        except (ValueError, TypeError, RuntimeError) as error:
            rules, text = self._written_rules(), str(error)
            if not rules or "rule=" in text or "'rule'" in text:
                raise
            # what does not fit may be a key that nobody wrote, so say whose rule asks for it
            raise type(error)(f"{rules}: {text}") from None

    def _plan_of_written(self) -> StepPlan:
        """The plan of the groups as they are; if one is refused, all are as they were written."""
        groups, seen = self.param_groups, self._seen
        written = check_written_values(groups, self._default_rule, seen)
        if written is seen:
            return self._current_plan()
        before = [dict(group) for group in groups]
        try:
            for group, values in zip(groups, written, strict=True):
                group.update(values)
            self._seen = written
            plan = self._current_plan()
        except Exception:
            self._seen = seen
            for group, values in zip(groups, before, strict=True):
                group.clear()
                group.update(values)
            raise
        self._warn_of_decay()
        return plan

    def _written_rules(self) -> str:
        """Words for the groups whose rule was written since the last step; "" for none."""
        return ", ".join(
            f"parameter group {i} with rule={shown(group.get('rule'))}"
            for i, (group, seen) in enumerate(zip(self.param_groups, self._seen, strict=False))
            if shown(group.get("rule")) != shown(seen.get("rule"))  # of any type
        )

    def _current_plan(self) -> StepPlan:
        """The plan of groups whose values were checked."""
        flat_params = [p for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            if "adamw_lr" in group:
                store_adamw_lr(group)
        settings = [self._settings(group) for group in self.param_groups]
        old = self._plan
        if (
            old is not None
            and len(old.flat_params) == len(flat_params)
            and all(map(is_, old.flat_params, flat_params))
            and all(map(is_lazy, old.lazy_params))
        ):
            if old.settings == settings or self._update_rules(old, settings):
                return old
        self._refuse_replaced(flat_params)
        plan = self._build_plan(flat_params, settings)
        adamw_modes = adamw.modes_of(flat_params, settings, plan.adamw_positions)
        if old is None:  # a new optimizer, or one that was loaded or copied
            refuse_unfit_state(plan.units, plan.rules, adamw_modes, self.state, settings)
            self._refuse_unsound_state(plan)
        else:  # settings changed, or a group came
            refuse_state_changes(
                old.units,
                adamw.modes_of(old.flat_params, old.settings, old.adamw_positions),
                plan.units,
                adamw_modes,
                self.state,
                self._changes(old.settings, settings),
            )
        self._plan = plan
        return plan

    def _refuse_replaced(self, flat_params: Sequence[Tensor]) -> None:
        """Raise if the module that gave the parameters has sharded ones in their place."""
        model = None if self._module is None else self._module()
        if model is not None:
            refuse_replaced(model, flat_params, names_of(self.param_groups))

    def _watch(self, module: Any) -> None:
        """Hold a module that gave the parameters weakly."""
        if isinstance(module, nn.Module):
            self._module = weakref.ref(module)

    def _refuse_unsound_state(self, plan: StepPlan) -> None:
        """Raise if other code has put into the state what a step cannot use."""
        modes = adamw.modes_of(plan.flat_params, plan.settings, plan.adamw_positions)
        named = zip(names_of(self.param_groups), plan.flat_params, strict=True)
        texts = {p: describe(name, p, i) for i, (name, p) in enumerate(named)}
        adamw_modes = {p: mode for p, (_, mode) in modes.items()}
        refuse_unsound_state(plan.units, plan.rules, adamw_modes, self.state, texts)

    def _build_plan(self, flat_params: list[Tensor], settings: list[dict[str, Any]]) -> StepPlan:
        """Make rules and units for the groups as they are now; buckets come with the first step."""
        check_lists(self.param_groups)
        group_rules = [rule_of(group, self._default_rule) for group in self.param_groups]
        for group, rule in zip(self.param_groups, group_rules, strict=True):
            refuse_stagger(group, rule)
        adamw_orders = [self._adamw_order(group) for group in self.param_groups]
        copies = [{k: copy_list(x) for k, x in values.items()} for values in settings]
        plan = StepPlan(flat_params, copies, group_rules, adamw_orders)
        plan.lazy_params = [p for p in flat_params if is_lazy(p)]
        position = 0
        first_position = dict[Tensor, int]()  # torch only warns about a parameter given twice
        for i, (group, rule) in enumerate(zip(self.param_groups, group_rules, strict=True)):
            parts, adamw_params = parts_of(group, rule, position)
            position += len(group["params"])
            plan.adamw_positions.append(
                [j for j, p in adamw_params if first_position.setdefault(p, j) == j]
            )
            for part in parts:
                weights = [
                    w
                    for w in part.weights
                    if first_position.setdefault(w.param, w.position) == w.position
                ]
                for w in weights:
                    text = describe(w.name, w.param, w.position)
                    check_matrix(w.param, text, part.rule.method())
                units = self._units_of_part(i, group, part._replace(weights=weights))
                for unit in units:
                    unit.rule = len(plan.rules)
                plan.units += units
                plan.rules.append(part.rule)
                plan.groups_of_rules.append(i)
        plan.set_stack_keys()
        assign_block_positions(plan.units, plan.rules, group_rules, self.param_groups)
        stagger_refreshes(plan.units, plan.rules, self.param_groups)
        if any(map(is_sharded, flat_params)):
            self._refuse_lost_state(flat_params)
        if self._process_group is not None or any(map(is_sharded, flat_params)):
            args = plan, self.state, self.param_groups, self._describe, self._process_group
            plan.shards = Shards(*args)
        return plan

    def _refuse_lost_state(self, flat_params: Sequence[Tensor]) -> None:
        """Raise if sharded weights have come in the place of parameters that had state."""
        known = {*flat_params}
        if any(is_sharded(p) and not self.state.get(p) for p in flat_params):
            check(
                all(p in known for p in self.state),
                "state belongs to parameters that are in no group any more; load or init_state() "
                "after the model is wrapped",
            )

    @staticmethod
    def _units_of_part(index: int, group: Mapping[str, Any], part: Part) -> list[Unit]:
        """Units of a part; where they cannot be made, a message names the first weight."""
        try:
            return units_of(index, group, part)
        except ValueError as error:
            w = part.weights[0]
            text = describe(w.name, w.param, w.position)
            if text in str(error):
                raise
            raise ValueError(f"{text}: {error}") from error

    @staticmethod
    def _changes(
        old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
    ) -> dict[int, str]:
        """Changed settings by index of the group, worded for an error message."""
        texts = {}
        for i, (before, after) in enumerate(zip(old, new, strict=False)):
            if before == after:
                continue
            # another rule has other fields, so its name says it all
            names = ["rule"] if before["rule"] != after["rule"] else list(after)
            changed = [f"{name}={after[name]!r}" for name in names if before[name] != after[name]]
            texts[i] = f"{', '.join(changed)} in parameter group {i}"
        return texts

    def _adamw_order(self, group: dict[str, Any]) -> tuple[bool, float] | None:
        """The order of AdamW's step in a group, see :meth:`Rule.adamw_order`."""
        rule_name = group["rule"]
        rule = rule_of(
            {**group, "rule": None if rule_name == "adamw" else rule_name}, self._default_rule
        )
        return None if rule is None else rule.adamw_order()

    def _update_rules(self, plan: StepPlan, settings: list[dict[str, Any]]) -> bool:
        """Give the plan rules with the new values; False if its units do not fit them."""
        for i, (old, new) in enumerate(zip(plan.settings, settings, strict=False)):
            if old != new:
                group = self.param_groups[i]
                rule = rule_of(group, self._default_rule)
                if any(old[name] != new[name] for name in UNIT_SETTINGS):
                    return False
                if rule is not None and not plan.update_rules(i, rule, group):
                    return False
                plan.settings[i] = {k: copy_list(x) for k, x in new.items()}
                plan.group_rules[i], plan.adamw_orders[i] = rule, self._adamw_order(group)
        plan.set_stack_keys()
        return len(plan.settings) == len(settings)

    def init_state(self) -> None:
        """Allocate the state of all trainable parameters, with the keys and shapes of a step."""
        plan = self._get_plan()
        for unit in plan.units:
            if any(p.requires_grad for p in unit.params):
                unit.allocate(self.state, plan.rule(unit))
        for group, positions in zip(self.param_groups, plan.adamw_positions, strict=True):
            for i in positions:
                if plan.flat_params[i].requires_grad:
                    adamw.allocate(plan.flat_params[i], group, self.state[plan.flat_params[i]])

    # the step -------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Reevaluates the model and returns the loss; called once, under enable_grad.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: For a sparse gradient or one of another shape than its weight, for weights
                whose state does not fit after ``model.bfloat16()``, or for a non-finite gradient
                under ``nonfinite="raise"``; nothing has changed then.
            ValueError: For a value that was written into a group and is out of range; likewise.
        """
        if self._in_backward is not None:
            self._in_backward.ignore_step(closure)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch._C._DisableAutocast():  # the caller's autocast is for the model only
            self._update()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; see :meth:`step_in_backward` for its part there."""
        if self._in_backward is not None:
            self._in_backward.ignore_zero_grad()
        else:
            super().zero_grad(set_to_none)

    def step_in_backward(self, every: int = 1, max_norm: float | None = None) -> BackwardHandle:
        """Let ``backward()`` itself step each weight once its gradient is there, and free that.

        At most the gradients of the largest layers are alive at a time. What steps together (a LoRA
        pair, weights that share a rotation) waits for its members; a member whose gradient does not
        come, and rules that write frozen weights or read their gradients, step when the backward
        pass ends. A weight that is used several times steps once, after all uses. Weights, state
        and checkpoints are those of ``step()`` after the same backward pass, bit for bit.

        Until :meth:`BackwardHandle.remove`, ``step()`` and ``zero_grad()`` do nothing, with one
        warning each. Schedulers go on as before, and may follow ``backward()`` directly: each
        weight reads the learning rate as it steps. Hooks of ``register_step_pre_hook`` and
        ``register_step_post_hook`` belong to ``step()`` and run around it, after the weights have
        moved. Copies and pickles of the optimizer have no hooks: they step by ``step()``.

        ``clip_grad_norm_`` and whatever else works on ``.grad`` after the backward pass finds none.
        Every backward pass counts, so two losses with a pass each are two steps, unless ``every``
        is 2. A gradient that cannot be used (not finite under ``nonfinite="raise"``, sparse) raises
        out of ``backward()``: its unit and those after it stay as they are, those before it have
        moved, and all gradients are freed. After a backward pass that failed otherwise,
        ``zero_grad()`` frees what it has left.

        Args:
            every: Backward passes whose gradients add up to one step, which comes in the last of
                them (default: 1).
            max_norm: Must be None (default): a norm over all gradients is known too late. Log
                ``grad_norm`` of the handle instead.

        Returns:
            A handle with ``remove()``, which is a context manager too.

        Raises:
            ValueError: For ``max_norm``, an ``every`` below 1, ``nonfinite="skip_step"``, and for
                parameters whose gradients are final only later: sharded ones for which a step
                sends anything, and those of DistributedDataParallel over several processes.
            RuntimeError: If the optimizer steps in backward already. ``step(closure)``, the step
                of a GradScaler and checkpointing with ``use_reentrant=True`` raise it later.

        Example:
            >>> import torch
            >>> from stiefel.optimizers import GaLore
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
            >>> optimizer = GaLore(model, lr=1e-3, rank=2)
            >>> with optimizer.step_in_backward():
            ...     for _ in range(3):
            ...         model(torch.ones(2, 8)).square().mean().backward()
            >>> all(p.grad is None for p in model.parameters())
            True
        """
        self._refuse_written()
        count = checked_every(every, max_norm, self)
        check(
            not any(self.param_groups[u.group].get("capturable") for u in self._get_plan().units),
            "step_in_backward() steps each weight by the host's clock, which no graph replays; "
            "leave capturable out",
        )
        self._in_backward = BackwardHandle(self, count)
        return self._in_backward

    def _before_backward(self) -> None:
        """What must be looked at before a backward pass steps."""

    def _steps_at_end(self, params: Sequence[Tensor]) -> bool:
        """Whether a unit of these parameters needs more than their gradients."""
        return False

    def _step_at_end(self, step: Callable[[], None]) -> None:
        """Run the last steps of a backward pass."""
        step()

    def _update(self) -> None:
        """Step all parameters by their gradients as they are now."""
        self._apply_late_flags()
        try:
            plan = self._get_plan()
        except Exception:
            sharded_update.tell_of_failure(self)
            raise
        self._is_in_capture = is_capturable(self.param_groups) and is_capturing()
        if plan.shards is not None:
            if self._is_in_capture:
                check_capture(plan, (), (), self.param_groups, self.state)
            self._numbers = None
            sharded_update.update(self, plan)
            return
        grads = [p.grad for p in plan.flat_params]
        name = type(self).__name__
        if not check_ready(plan, grads, self.param_groups, self.state, name):
            self._plan = None  # weights have another dtype now, and their state fits
            plan = self._get_plan()
        adamw_steps = self._adamw_steps(plan, grads)  # may raise, so before any change
        if self._is_in_capture:
            check_capture(plan, grads, adamw_steps, self.param_groups, self.state)
        if not self._is_in_capture and self._is_dry_step(grads):
            self.init_state()
            for work in adamw_steps:
                work.allocate(self.state)
            found = Findings()
        else:
            found = self._inspect(plan, grads, adamw_steps)
            if found.bad and self._count_skipped(found):
                return
            self._follow_radii()
            self._prepare_numbers(plan, grads, adamw_steps)
            self._step_matrices(plan, grads, found)
        for work in adamw_steps:
            work.step(found.bad, found.adamw_flags)
        if found.joined or any(found.unread):
            self._keep_unread(plan, found)
        if not (plan.buckets or adamw_steps):
            self._refuse_replaced(plan.flat_params)

    def _follow_radii(self) -> None:
        """Take up radii that were written into groups; a graph would hold that, and repeat it."""
        if not self._is_in_capture:
            self._radii = follow_radii(self.param_groups, self._radii, self.state)

    def _prepare_numbers(
        self,
        plan: StepPlan,
        grads: Sequence[Tensor | None],
        adamw_steps: Sequence[adamw.Work],
    ) -> None:
        """What groups with ``capturable`` read on the device: filled in, or left to a replay."""
        groups = self.param_groups
        if not is_capturable(groups):
            self._numbers = None
            return
        if self._numbers is None or not self._numbers.serves(plan, groups):
            self._numbers = Numbers(plan, groups)
        numbers = self._numbers
        if self._is_in_capture:
            mask = [grad is not None for grad in grads]
            self._captured = Captured(numbers, plan, mask, held_settings(plan, groups))
        else:
            numbers.fill(groups)
        for work in adamw_steps:
            if work.group.get("capturable"):
                index = next(i for i, group in enumerate(groups) if group is work.group)
                lr = numbers.lr(index, groups, work.params[0].device)
                work.group = {**work.group, "lr": lr.float()}

    def _numbers_of(self, bucket: Bucket) -> Numbers | None:
        """What a bucket reads on the device; None where the host's numbers serve."""
        numbers = self._numbers
        return numbers if numbers is not None and numbers.has(bucket) else None

    def _device_clocks(self, bucket: Bucket) -> tuple[Tensor, Tensor] | None:
        """The clocks of :meth:`Member.count`; None where the host's serve."""
        numbers = self._numbers_of(bucket)
        return None if numbers is None else numbers.clocks(bucket)

    def prepare_replay(self) -> bool:
        """Prepare the next replay of a CUDA graph that holds ``step()``, and count its update.

        The host writes clocks, and learning rate and weight decay of each group as they are now,
        to where the graph reads them, so schedulers work as without a graph. Nothing waits. Other
        settings, and the weight decay of AdamW parameters, are those of the capture. ``skipped``
        knows nothing of replays.

        Returns:
            True: replay the graph, once. False: this update makes a new basis, which no graph
            holds, and nothing was counted: compute the gradients into the same tensors and call
            ``step()``.

        Raises:
            RuntimeError: If no step with ``capturable=True`` was captured, or something has changed
                since that the graph holds; nothing has changed then.

        Example::

            optimizer = GaLore(model, lr=1e-3, capturable=True)
            for _ in range(3):  # makes state and bases, compiles kernels
                train(batch)  # forward, backward into the same gradients, step
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train(batch)
            for data in batches:
                batch.copy_(data)
                graph.replay() if optimizer.prepare_replay() else train(batch)
        """
        if self._captured is None:
            raise RuntimeError(
                "no step was captured with capturable=True; call step() inside torch.cuda.graph()"
            )
        self._apply_late_flags()
        self._captured.refuse_changes(self._get_plan(), self.param_groups, self.state)
        if self._captured.refresh_due():
            return False
        self._follow_radii()
        self._captured.advance(self.param_groups)
        return True

    def _keep_unread(self, plan: StepPlan, found: Findings) -> None:
        """Keep flags that the host has not read for the next step."""
        self._pending = [*self._pending, *found.late_flags(plan, self.param_groups)]

    def _inspect(
        self,
        plan: StepPlan,
        grads: Sequence[Tensor | None],
        adamw_steps: Sequence[adamw.Work],
        agree: Callable[[Findings], None] | None = None,
    ) -> Findings:
        """Allocate and sort what has a gradient, and find bad ones; undone if nothing is to move.

        Args:
            plan: The plan.
            grads: Gradients of all parameters.
            adamw_steps: What AdamW steps.
            agree: Adds what other ranks have found, where weights are sharded.

        Raises:
            RuntimeError: For a bad gradient under ``nonfinite="raise"``.
        """
        mask, before = [grad is not None for grad in grads], None
        stops = True
        try:
            if any(work.new for work in adamw_steps) or plan.is_stale(mask, self.state):
                before = snapshot(self.state)
                self._refuse_unsound_state(plan)
                for work in adamw_steps:
                    work.allocate(self.state)
                plan.rebuild(mask, self.state)
            found = inspect_grads(plan, grads, self.param_groups, self._waits)
            if agree is not None:
                agree(found)
            if found.bad:
                refuse(found, self.param_groups)
            refuse_zero_weights(plan.buckets, self.param_groups, found.bad, self._describe)
            stops = stops_step(found, self.param_groups)
        finally:
            if stops and before is not None:
                plan.mask = None
                roll_back(self.state, before)
        return found

    def _is_dry_step(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether every lr and every gradient is 0, as in a checkpointer's probing step."""
        for group in self.param_groups:
            lr = group["lr"]
            if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
                return False
        return not any(grad is not None and bool(grad.any()) for grad in grads)

    def _adamw_steps(self, plan: StepPlan, grads: Sequence[Tensor | None]) -> list[adamw.Work]:
        """What AdamW steps in each group that has a gradient for it.

        Raises:
            RuntimeError: For a parameter that AdamW cannot step.
        """
        works, start, cache = list[adamw.Work](), 0, plan.adamw_entries
        if not any(plan.adamw_positions):
            return works
        cache.follow(self.state)
        for i, (group, order, positions) in enumerate(
            zip(self.param_groups, plan.adamw_orders, plan.adamw_positions, strict=True)
        ):
            if positions:
                work = adamw.Work.of(group, order, positions, start, plan.flat_params, grads)
                if work.positions:
                    work.find(self.state, cache, i, work.positions is positions)
                    work.check(self._describe, cache, i)
                    works.append(work)
            start += len(group["params"])
        return works

    def _describe(self, position: int) -> str:
        """Words that name the parameter at a flat position."""
        p = [p for group in self.param_groups for p in group["params"]][position]
        return describe(names_of(self.param_groups)[position], p, position)

    def _step_matrices(
        self,
        plan: StepPlan,
        grads: Sequence[Tensor | None],
        found: Findings,
        leave_out: Container[int] = (),
    ) -> None:
        """Step bucket after bucket, without the units whose gradient is known to be bad.

        Args:
            plan: The plan.
            grads: Gradients of all parameters.
            found: What is known of them.
            leave_out: Ids of buckets that are stepped otherwise.
        """
        batcher = CallBatcher()
        for j, (bucket, stack) in enumerate(zip(plan.buckets, found.stacks, strict=True)):
            if id(bucket) in leave_out:
                continue
            Gs = stack or [
                bucket.gradient(i, grads) if has_grad else None
                for i, has_grad in enumerate(bucket.present)
            ]
            rule = plan.rule(bucket)
            own_stack = plan.stack_keys[bucket.unit.rule]
            device = bucket.unit.params[0].device
            key = (own_stack, device) if rule.yields_batched_calls else None
            size = sum(G.nbytes for G in Gs if G is not None)
            finite = found.finite_units(j, bucket)
            known = finite, found.flag(j), found.squares.get(j)
            batcher.add(self._step_bucket(plan, bucket, Gs, *known), key, size)
        batcher.flush()

    def _waits(self, device: torch.device) -> bool:
        if self._process_group is not None:  # the ranks agree before anything changes
            return True
        return device.type == "cpu" if self._wait is None else self._wait

    def _step_bucket(
        self,
        plan: StepPlan,
        bucket: Bucket,
        Gs: Sequence[Tensor | None],
        finite: list[bool] | None,
        flag: Tensor | None = None,
        squares: Tensor | None = None,
    ) -> UpdateGenerator:
        """Step one bucket, as a generator that stops where the rule asks for a batched call.

        Args:
            plan: The plan.
            bucket: The bucket.
            Gs: Per member its gradients (K, m, n) as they were given, None if it has none.
            finite: Per unit, whether its gradients are finite; None if the host does not know yet.
            flag: If the host does not know, (K,) on the device, finite where the gradients are.
            squares: None, or those of the first member's columns.
        """
        rule = plan.rule(bucket)
        t, refreshed = bucket.clocks()
        refresh_due = finite is not None and rule.refresh_due(t, refreshed, bucket.unit.shift)
        count = len(bucket.units)
        nonzero = [bucket.nonzero(Gs, j) for j in range(count)] if refresh_due else [True] * count
        if bucket.stacked and finite is not None and not (all(finite) and all(nonzero)):
            yield from self._step_units(plan, bucket, Gs, finite)
            return
        if finite is not None and not finite[0]:
            if self.param_groups[bucket.group].get("capturable"):  # clocks of a stack do not part
                bucket.set_step(t)
            return
        device_finite = None if flag is None else flag.isfinite()
        # the rule itself keeps bad gradients out of its state: no mask, no backup
        unmasked = (
            device_finite is not None and rule.handles_nonfinite and bucket.runs_on_kernels(Gs)
        )
        maximize = self.param_groups[bucket.group]["maximize"]
        Gs = bucket.prepare_grads(Gs, maximize, device_finite, unmasked)
        state_backup = [] if device_finite is None or unmasked else bucket.clone_state()
        dequantized = bucket.dequantized()
        member_finite = device_finite.float() if device_finite is not None and unmasked else None
        writes = rule.writes_in_refresh and refresh_due
        # a refresh is eager, and begins a count that the numbers do not know
        clocks = None if refresh_due else self._device_clocks(bucket)
        members = bucket.members(Gs, dequantized, t, refreshed, member_finite, writes, clocks)
        members[0].squares = squares
        if refresh_due and nonzero[0]:
            for member in members:
                member.refreshed, member.is_first_refresh = t, refreshed == 0
            rule.refresh(*members)
            bucket.quantize_bases(dequantized)
        yield from self._write_directions(bucket, members, rule.update(*members), device_finite)
        bucket.quantize(dequantized, t)
        if not self._is_in_capture:  # nothing runs in a capture, and replays count themselves
            bucket.set_step(t)
        if refresh_due and nonzero[0]:  # with the other clock, lest an exception part them
            bucket.set_refreshed(t)
        if device_finite is not None and not unmasked:
            bucket.restore(state_backup, device_finite)

    def _step_units(
        self, plan: StepPlan, bucket: Bucket, Gs: Sequence[Tensor | None], finite: list[bool]
    ) -> UpdateGenerator:
        """Step a stack with a unit to leave out unit by unit: same bits, no second code path."""
        for j in range(len(bucket.units)):
            parts = [None if G is None else G[j : j + 1] for G in Gs]
            yield from self._step_bucket(plan, bucket.single(j), parts, finite[j : j + 1])
        plan.mask = None  # clocks differ now: sort again at the next step

    def _write_directions(
        self,
        bucket: Bucket,
        members: Sequence[Member],
        update: Direction | Iterable[Direction | BatchedCall],
        device_finite: Tensor | None,
    ) -> UpdateGenerator:
        """Write each Direction before the rule makes the next; yield the rule's batched calls.

        Args:
            bucket: Whose weights are written.
            members: What the rule sees of them.
            update: What the rule's ``update`` returned.
            device_finite: None, or flags (K,): weights whose flag is False stay as they are.
        """
        runs = self._runs(bucket)
        t = (self._device_clocks(bucket) or bucket.clocks())[0]
        _, lr, decay = runs[0]
        written = [0] * len(bucket.present)
        write_mask = None
        if device_finite is not None:
            write_mask = device_finite.to(bucket.dtype).view(-1, 1, 1)
        steps = DirectionIterator(update)
        for step in steps:
            if isinstance(step, BatchedCall):
                steps.answer = yield step
                continue
            i = step.member.number
            if step.torch_bits:
                runs = self._runs(bucket, as_given=True)
                _, lr, decay = runs[0]
            rounding = bucket.rounding(i, t, written[i])
            written[i] += 1
            is_steered = bucket.unit.control is not None or step.row_norms is not None
            fuses = len(runs) == 1 and not is_steered
            Ws = bucket.weight_list(i) if fuses else []
            if fuses and write_list_(Ws, step, lr, decay, write_mask, rounding):
                continue
            W = members[i].value
            if is_steered:
                write_steered_(W, step, runs, self._steering(bucket, i), write_mask, rounding)
            elif len(runs) == 1:
                write_(W, step, lr, decay, write_mask, rounding)
            else:
                write_runs_(W, step, runs, write_mask, rounding)
            bucket.store(i, W)

    def _steering(self, bucket: Bucket, i: int) -> Steering:
        """How the norms of member i are steered."""
        control, groups = bucket.unit.control or BY_ROWS, self.param_groups
        given = [groups[unit.group].get(RADIUS) for unit in bucket.units]
        return Steering(control, bucket.states[i].get(RADIUS), given, bucket.stacked)

    def _runs(self, bucket: Bucket, as_given: bool = False) -> list[Run]:
        """Learning rate and decay of the units of a bucket, equal neighbours together.

        ``as_given`` leaves tensors in their own dtype, which torch's bits depend on.
        """
        numbers = self._numbers_of(bucket)
        if numbers is not None:
            return numbers.runs(bucket, self.param_groups)
        runs: list[Run] = []
        for j, unit in enumerate(bucket.units if bucket.spans else bucket.units[:1]):
            group = self.param_groups[unit.group]
            lr = group["lr"] if as_given else self._lr_value(group["lr"])
            weight_decay = group["weight_decay"]
            weight_decay = weight_decay if unit.decay == 1.0 else weight_decay * unit.decay
            decay = Decay.of(group, weight_decay)
            previous = runs[-1] if runs else None
            if previous is not None and _same(previous.lr, lr) and previous.decay == decay:
                runs[-1] = previous._replace(ks=slice(previous.ks.start, j + 1))
            else:
                stop = j + 1 if bucket.spans else len(bucket.units)
                runs.append(Run(slice(j, stop), lr, decay))
        return runs

    @staticmethod
    def _lr_value(lr: float | Tensor) -> float | Tensor:
        """The learning rate as a float where the host need not wait for it; never cached."""
        if isinstance(lr, Tensor):
            return float(lr) if lr.device.type == "cpu" else lr.reshape(())
        return lr

    # flags that arrive late -----------------------------------------------------------------------

    def _apply_late_flags(self) -> None:
        """Read the flags of the last step and set back the clocks of units that were skipped."""
        if not self._pending or is_capturing():
            return
        pending, self._pending = self._pending, ()
        owners = [owner for late_flags in pending for owner in late_flags.bad_owners()]
        for owner in owners:
            if owner.clock is not None and owner.clock[1] in self.state.get(owner.clock[0], {}):
                self.state[owner.clock[0]][owner.clock[1]] -= 1
        if owners:
            if self._plan is not None:
                self._plan.mask = None
            self._count([owner.param for owner in owners if owner.param is not None])

    def _count_skipped(self, found: Findings) -> bool:
        """Count bad gradients that the host has found; True if they stop the whole step."""
        flat_params = [p for group in self.param_groups for p in group["params"]]
        stopped = stops_step(found, self.param_groups)
        self._count([flat_params[i] for i in sorted(found.bad)], stopped)
        return stopped

    def _count(self, params: Sequence[Tensor], stopped: bool = False) -> None:
        """Count skipped parameters, once each however many units a view makes; warn once."""
        is_first, self._skipped = not self._skipped, self._skipped or {}
        for p in params:
            self._skipped[p] = self._skipped.get(p, 0) + 1
        if is_first and params:
            warn_user(skip_warning(list(self.skipped), stopped))

    @property
    def skipped(self) -> dict[str | int, int]:
        """Updates left out because a gradient was not finite, by name, else by position.

        Reading it waits for the device. A step replayed from a CUDA graph does not count.
        """
        self._apply_late_flags()
        counts = self._skipped or {}
        flat_params = [p for group in self.param_groups for p in group["params"]]
        names = names_or_positions(self.param_groups)
        return {name: counts[p] for name, p in zip(names, flat_params, strict=True) if p in counts}

    # checkpoints ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups as torch gives them: tensors, numbers and plain values only."""
        self._apply_late_flags()
        if self._plan is not None:
            self._get_plan()  # refuses settings that do not fit the state, as a step does
        else:
            self._refuse_written()
        check_lists(self.param_groups)
        self._follow_radii()
        saved = super().state_dict()
        checkpoint.name_functions(self._default_rule, saved["param_groups"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, of ``torch.optim.Muon`` or ``AdamW`` where it fits.

        Parameters match by name, whatever their order and groups, where both sides have the same
        names (less what DDP, compile, FSDP and checkpointing add); else by position, with one
        warning if all have names. Every tensor keeps its dtype (torch alone casts state to the
        parameter's); group keys that the checkpoint lacks keep their values, clocks that it lacks
        are 0. Files of version 0.1 load, with settings of their AdamW groups as ``adamw_*``.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If anything in it does not fit or cannot be; weights, state and groups are
                unchanged then.
        """
        prepared: dict[str, Any] = {}

        def prepare(_: Optimizer, loaded: Any) -> dict[str, Any]:
            prepared.update(self._prepare_loaded(loaded))
            return prepared

        def restore(_: Optimizer) -> None:
            args = self._default_rule, self.param_groups, self.state, prepared
            self._fill_missing(checkpoint.restore(*args))

        if not isinstance(state_dict, dict):
            checkpoint.prepare(self._default_rule, self.param_groups, state_dict)
        # ours run last before torch loads and first after: a user's own hooks see the checkpoint as
        # it was passed, and the state as it was restored
        before = self.register_load_state_dict_pre_hook(prepare)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _prepare_loaded(self, loaded: Any) -> dict[str, Any]:
        """A checkpoint in the order of the groups, once all of it has been checked."""
        return checkpoint.prepare(self._default_rule, self.param_groups, loaded)

    def _fill_missing(self, missing: Set[tuple[Tensor, str]]) -> None:
        """Fill state that a checkpoint lacked, for rules with ``optional_state``."""

    def __getstate__(self) -> dict[str, Any]:
        self._apply_late_flags()
        self._follow_radii()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._pending, self._is_built = None, (), True
        self._numbers = self._captured = None
        checkpoint.complete(self.param_groups, self.defaults, self.state)
        self._radii = radii_of(self.param_groups)
        self._seen = [{"rule": group.get("rule")} for group in self.param_groups]


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two learning rates are known to be equal without waiting for a device."""
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)
