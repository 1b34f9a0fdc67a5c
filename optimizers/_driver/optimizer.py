"""The driver: groups, plan, state, flags, clocks and the write, once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from operator import is_
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._core.rule import (
    RULE_CLASSES,
    BatchedCall,
    Direction,
    Rule,
    defaults_of,
    rule_class,
    settings_of,
)
from .._core.validation import describe_unknown
from .._roles.classify import Assignment
from . import adamw, checkpoint
from .batched_calls import CallBatcher, DirectionIterator, UpdateGenerator
from .buckets import Bucket, StepPlan
from .checks import check_group, check_matrix, check_values
from .finite import LateFlags, finite_sums, read_flags
from .param_groups import (
    COMMON,
    GROUP_KEYS,
    SCHEDULER_KEYS,
    parameters_of,
    roles_of,
    routed,
    rule_of,
    to_param_groups,
)
from .settings import refuse_state_changes, refuse_unfit_state
from .units import Unit, units_of
from .windows import assign_block_positions, stagger_refreshes
from .write import write_, write_list_

UNIT_SETTINGS = ("rule", "view", "state_dtype", "stagger")
"""Group keys beside the rule's fields that decide how parameters become units."""


class StackedOptimizer(Optimizer):
    """Runs a rule over parameter groups; every public optimizer is a thin class on top of it.

    Matrices go to the rule, everything else to torch's own AdamW, as :meth:`assignment` lists.

    Args:
        params: A module (roles are found by :func:`classify`; frozen parameters are left out),
            named parameters (names route embeddings and heads to AdamW), parameters (shape alone
            decides), or groups: dicts with ``params``, any field of the rule, any keyword below,
            and ``rule``: ``"adamw"``, or the name of a method.
        rule: The method and its hyper-parameters.
        lr: Learning rate, a float or a 1-element tensor.
        weight_decay: Decoupled weight decay (default: 0).
        adamw_lr: Learning rate of the AdamW parameters; None (default): ``lr``. If given, these
            parameters get groups of their own, so that schedulers scale both. Wrappers that mirror
            groups (ZeroRedundancyOptimizer) need the groups spelled out, each with its ``lr``.
        adamw_betas: Betas of the AdamW parameters; None (default): the method's ``betas``, else
            (0.9, 0.95).
        adamw_eps: Eps of the AdamW parameters (default: 1e-8).
        adamw_weight_decay: Weight decay of the AdamW parameters; None (default): ``weight_decay``.
        maximize: Ascend instead of descend (default: False).
        foreach: As in ``torch.optim.AdamW``, for the AdamW parameters (default: None).
        fused: As in ``torch.optim.AdamW``, for the AdamW parameters (default: None).
        capturable: As in ``torch.optim.AdamW``, for groups without matrices (default: False).
        differentiable: Must be False (default); the key is there because torch reads it.
        nonfinite: ``"skip"`` (default) leaves a matrix with a NaN or infinite gradient and its
            state alone and counts it in :attr:`skipped`; ``"raise"`` raises before anything
            changes, and waits for the device at every step. Gradients of AdamW parameters are not
            looked at.
        view: How a parameter becomes matrices, see ``_core/views.py`` (default: ``"auto"``).
        state_dtype: Name of the floating dtype of the state, such as ``"bfloat16"``; None
            (default): float32 (float64 for float64 weights). ``"int8"``: moments and momentum in 8
            bits with a scale for every 256 of them, the rest as under None; see
            ``kernels/quantize.py``. Averages of squares follow falling gradients late then: steps
            of 0.001 round away.
        stagger: Whether refreshes of different weights are spread evenly over the window, so that
            no step but the first stalls (default: False). Where they come depends on the model.

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
    _skipped = 0
    _pending: Sequence[tuple[LateFlags, list[Bucket]]] = ()
    _wait: bool | None = None
    """Whether the host waits for the finite flags; None: on CPU only. Tests set it."""

    def __init__(
        self,
        params: Any,
        rule: Rule,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        **common: Any,
    ) -> None:
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
        super().__init__(
            to_param_groups(params, rule, self._reference_key, defaults["view"]), defaults
        )

    # groups ---------------------------------------------------------------------------------------

    @property
    def _default_rule(self) -> type[Rule]:
        return RULE_CLASSES[self.defaults["method"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it whole; a refused group changes nothing.

        A late group is routed without regard to the others. Only the constructor, which sees all
        groups, gives those without a reference package's key to AdamW.

        Args:
            param_group: ``params`` and any overrides; see the class docstring.

        Raises:
            ValueError: If a key is unknown, a value out of range or a parameter cannot be trained.
        """
        count = len(self.param_groups)
        try:
            for group in self._prepare_groups(param_group):
                super().add_param_group(group)
        except BaseException:
            del self.param_groups[count:]
            raise

    def _prepare_groups(self, param_group: dict[str, Any]) -> list[dict[str, Any]]:
        """Turn a user's group into the groups that torch adds, after all checks."""
        if not isinstance(param_group, dict):
            return [param_group]
        group = dict(param_group)
        if "params" not in group:
            raise ValueError("a parameter group needs the key 'params'")
        if isinstance(group["params"], set):
            return [group]
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        key = self._reference_key
        is_marked = key is not None and bool(group.get(key)) and "rule" not in group
        if is_marked:
            group["rule"] = self._default_rule.method()
        elif key is not None and group.get(key) is False:
            group.setdefault("rule", "adamw")  # use_muon=False, also in a late group
        rule_name = group.get("rule")
        if rule_name == "adamw":  # torch's own names mean AdamW's values in an AdamW group
            if "eps" in group:
                group.setdefault("adamw_eps", group["eps"])
            if "betas" in group and "betas" not in self.defaults:
                group.setdefault("adamw_betas", group.pop("betas"))
        rule = self._default_rule if rule_name in (None, "adamw") else rule_class(rule_name)
        other_defaults = {} if rule is self._default_rule else defaults_of(rule)
        self._refuse_unknown_keys(group, other_defaults)
        # a group of another method starts from that method's defaults, not from this one's
        full_group = {**self.defaults, **other_defaults, **group}
        check_group(full_group, self._default_rule, is_marked=is_marked)
        for name in other_defaults:
            group.setdefault(name, other_defaults[name])
        return self._split_adamw(group, full_group)

    def _refuse_unknown_keys(
        self, group: Mapping[str, Any], other_defaults: Mapping[str, Any]
    ) -> None:
        """Raise for a key that neither the driver nor the group's rule knows."""
        known_keys = GROUP_KEYS | SCHEDULER_KEYS | COMMON.keys() | other_defaults.keys()
        known_keys |= defaults_of(self._default_rule).keys()
        if self._reference_key is not None:
            known_keys |= {self._reference_key}
        message = describe_unknown(group, known_keys, "parameter group key")
        if message:
            raise ValueError(message)

    def _split_adamw(
        self, group: dict[str, Any], full_group: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Move AdamW parameters into a group of their own if ``adamw_lr`` is given."""
        if full_group["adamw_lr"] is None:
            return [group]
        rule = rule_of(full_group, self._default_rule)
        if rule is None:
            return [{"lr": full_group["adamw_lr"], **group}]
        params, names = parameters_of(group)
        if None in names and any(names):
            return [group]  # torch refuses names of some parameters only, with its own text
        rows = roles_of({**full_group, "params": params, "param_names": names}, rule)
        parts = []
        for target in ("matrix", "adamw"):
            indices = [i for i, row in enumerate(rows) if row.rule == target]
            part = {
                **group,
                "params": [
                    params[i] if names[i] is None else (names[i], params[i]) for i in indices
                ],
            }
            part.pop("param_names", None)  # torch takes them from the pairs again
            for key in ("roles", "reasons"):
                if key in group:
                    part[key] = [group[key][i] for i in indices]
            if target == "adamw":
                part.update(rule="adamw", lr=full_group["adamw_lr"])
            if indices:
                parts.append(part)
        return parts

    def assignment(self) -> Assignment:
        """Return a table of every parameter's rule, and why; the table prints."""
        table = []
        for group in self.param_groups:
            rule = rule_of(group, self._default_rule)
            name = "adamw" if rule is None else rule.method()
            table += [
                replace(row, rule=name if row.rule == "matrix" else "adamw")
                for row in roles_of(group, rule)
            ]
        return Assignment(tuple(table))

    # plan -----------------------------------------------------------------------------------------

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """Values that decide a group's rule and units, with defaults for missing keys."""
        cls = self._default_rule if group["rule"] in (None, "adamw") else rule_class(group["rule"])
        return {
            **{name: group[name] for name in UNIT_SETTINGS},
            **{field.name: group.get(field.name, field.default) for field in fields(cls)},
        }

    def _get_plan(self) -> StepPlan:
        """The plan, with rules and units made anew only if groups changed.

        Raises:
            ValueError: If settings changed that shape the state of a parameter. Plan and state are
                as before.
        """
        flat_params = [p for group in self.param_groups for p in group["params"]]
        settings = [self._settings(group) for group in self.param_groups]
        old = self._plan
        if (
            old is not None
            and len(old.flat_params) == len(flat_params)
            and all(map(is_, old.flat_params, flat_params))
        ):
            if old.settings == settings or self._update_rules(old, settings):
                return old
        plan = self._build_plan(flat_params, settings)
        adamw_params = [flat_params[i] for positions in plan.adamw_positions for i in positions]
        if old is None:  # a new optimizer, or one that was loaded or copied
            refuse_unfit_state(plan.units, adamw_params, self.state)
        else:  # settings changed, or a group came
            refuse_state_changes(
                old.units,
                [old.flat_params[i] for positions in old.adamw_positions for i in positions],
                plan.units,
                adamw_params,
                self.state,
                self._changes(old.settings, settings),
            )
        self._plan = plan
        return plan

    def _build_plan(self, flat_params: list[Tensor], settings: list[dict[str, Any]]) -> StepPlan:
        """Make rules and units for the groups as they are now; buckets come with the first step."""
        rules = [rule_of(group, self._default_rule) for group in self.param_groups]
        adamw_orders = [self._adamw_order(group) for group in self.param_groups]
        plan = StepPlan(flat_params, settings, rules, adamw_orders, [], [])
        position = 0
        first_position = dict[Tensor, int]()  # torch only warns about a parameter given twice
        for i, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
            matrices, adamw_params = (
                [(j, p) for j, p in part if first_position.setdefault(p, j) == j]
                for part in routed(group, rule, position)
            )
            position += len(group["params"])
            plan.adamw_positions.append([j for j, _ in adamw_params])
            if rule is not None:
                for j, p in matrices:
                    check_matrix(p, f"parameter {j} of shape {tuple(p.shape)}", rule.method())
                plan.units += units_of(i, group, rule, matrices)
        assign_block_positions(plan.units, rules, self.param_groups)
        stagger_refreshes(plan.units, rules, self.param_groups)
        return plan

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
                if rule is not None and not plan.update_rule(i, rule, group):
                    return False
                plan.settings[i], plan.adamw_orders[i] = new, self._adamw_order(group)
        return len(plan.settings) == len(settings)

    def init_state(self) -> None:
        """Allocate the state of all trainable parameters, with the keys and shapes of a step."""
        plan = self._get_plan()
        for unit in plan.units:
            rule = plan.rules[unit.group]
            if rule is not None and any(p.requires_grad for p in unit.params):
                unit.allocate(self.state, rule)
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
            RuntimeError: For a sparse gradient, or a non-finite one of a matrix under
                ``nonfinite="raise"``; no weight and no value of the state has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch._C._DisableAutocast():  # the caller's autocast is for the model only
            self._update()
        return loss

    def _update(self) -> None:
        """Step all parameters by their gradients as they are now."""
        self._apply_late_flags()
        plan = self._get_plan()
        grads = [p.grad for p in plan.flat_params]
        for grad in grads:
            if grad is not None and grad.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        adamw_steps = self._adamw_steps(plan, grads)  # may raise, so before any change
        if self._is_dry_step(grads):
            self.init_state()
        else:
            mask = [grad is not None for grad in grads]
            if plan.is_stale(mask, self.state):
                plan.rebuild(mask, self.state)
            self._step_matrices(plan, grads)
        for group, params, present_grads, entries, order in adamw_steps:
            adamw.step(group, params, present_grads, entries, order=order)

    def _is_dry_step(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether every lr and every gradient is 0, as in a checkpointer's probing step."""
        for group in self.param_groups:
            lr = group["lr"]
            if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
                return False
        return not any(grad is not None and bool(grad.any()) for grad in grads)

    def _adamw_steps(self, plan: StepPlan, grads: Sequence[Tensor | None]) -> list[tuple[Any, ...]]:
        """Arguments of :func:`adamw.step` per group that has parameters without a matrix rule."""
        adamw_steps = []
        for group, order, positions in zip(
            self.param_groups, plan.adamw_orders, plan.adamw_positions, strict=True
        ):
            present = [
                (plan.flat_params[i], grad) for i in positions if (grad := grads[i]) is not None
            ]
            entries = [self.state[p] for p, _ in present]
            for (p, _), entry in zip(present, entries, strict=True):
                adamw.allocate(p, group, entry)
            if present:
                adamw_steps.append((group, *map(list, zip(*present, strict=True)), entries, order))
        return adamw_steps

    def _step_matrices(self, plan: StepPlan, grads: Sequence[Tensor | None]) -> None:
        """Find non-finite gradients before any state changes, then step bucket after bucket."""
        stacks, flags = finite_sums(plan.buckets, grads, self._waits)
        finite_units = read_flags(plan, self.param_groups, flags, grads, self._waits)
        batcher = CallBatcher()
        for bucket, stack, flag, finite in zip(
            plan.buckets, stacks, flags, finite_units, strict=True
        ):
            Gs = stack or [
                bucket.gradient(i, grads) if has_grad else None
                for i, has_grad in enumerate(bucket.present)
            ]
            rule = plan.rules[bucket.group]
            key = (
                (bucket.group, flag.device)
                if rule is not None and rule.yields_batched_calls
                else None
            )
            size = sum(G.nbytes for G in Gs if G is not None)
            batcher.add(self._step_bucket(plan, bucket, Gs, finite, flag), key, size)
        batcher.flush()
        late = [
            (flag, bucket)
            for flag, bucket, finite in zip(flags, plan.buckets, finite_units, strict=True)
            if finite is None
        ]
        for device in {flag.device for flag, _ in late}:
            on_device = [(flag, bucket) for flag, bucket in late if flag.device == device]
            late_flags = LateFlags(torch.cat([flag for flag, _ in on_device]).isfinite())
            self._pending = [*self._pending, (late_flags, [bucket for _, bucket in on_device])]

    def _waits(self, device: torch.device) -> bool:
        return device.type == "cpu" if self._wait is None else self._wait

    def _step_bucket(
        self,
        plan: StepPlan,
        bucket: Bucket,
        Gs: Sequence[Tensor | None],
        finite: list[bool] | None,
        flag: Tensor,
    ) -> UpdateGenerator:
        """Step one bucket, as a generator that stops where the rule asks for a batched call.

        Args:
            plan: The plan.
            bucket: The bucket.
            Gs: Per member its gradients (K, m, n) as they were given, None if it has none.
            finite: Per unit, whether its gradients are finite; None if the host does not know yet.
            flag: (K,) on the device, finite where the gradients are.
        """
        rule = plan.rules[bucket.group]
        assert rule is not None
        t, refreshed = bucket.clocks()
        refresh_due = finite is not None and rule.refresh_due(t, refreshed, bucket.unit.shift)
        nonzero = [not refresh_due or bucket.nonzero(Gs, j) for j in range(len(bucket.units))]
        if bucket.stacked and finite is not None and not (all(finite) and all(nonzero)):
            # a stack with a unit to leave out runs unit by unit: same bits, no second code path
            for j in range(len(bucket.units)):
                parts = [None if G is None else G[j : j + 1] for G in Gs]
                yield from self._step_bucket(plan, bucket.single(j), parts, finite[j : j + 1], flag)
            plan.mask = None  # clocks differ now: sort again at the next step
            return
        if finite is not None and not finite[0]:
            self._count_skipped(bucket.unit)
            return
        device_finite = None if finite is not None else flag.isfinite()
        # the rule itself keeps bad gradients out of its state: no mask, no backup
        unmasked = (
            device_finite is not None and rule.handles_nonfinite and bucket.runs_on_kernels(Gs)
        )
        maximize = self.param_groups[bucket.group]["maximize"]
        Gs = bucket.prepare_grads(Gs, maximize, device_finite, unmasked)
        state_backup = [] if device_finite is None or unmasked else bucket.clone_state()
        dequantized = bucket.dequantized()
        member_finite = device_finite.float() if device_finite is not None and unmasked else None
        members = bucket.members(Gs, dequantized, t, refreshed, member_finite)
        if refresh_due and nonzero[0]:
            for member in members:
                member.refreshed, member.is_first_refresh = t, refreshed == 0
            rule.refresh(*members)
            bucket.set_refreshed(t)
        yield from self._write_directions(bucket, rule.update(*members), device_finite)
        bucket.quantize(dequantized)
        bucket.set_step(t)
        if device_finite is not None and not unmasked:
            bucket.restore(state_backup, device_finite)

    def _write_directions(
        self,
        bucket: Bucket,
        update: Direction | Iterable[Direction | BatchedCall],
        device_finite: Tensor | None,
    ) -> UpdateGenerator:
        """Write each Direction before the rule makes the next; yield the rule's batched calls.

        Args:
            bucket: Whose weights are written.
            update: What the rule's ``update`` returned.
            device_finite: None, or flags (K,): weights whose flag is False stay as they are.
        """
        group = self.param_groups[bucket.group]
        lr, decay = self._lr_value(group["lr"]), group["weight_decay"]
        write_mask = None
        if device_finite is not None:
            write_mask = device_finite.to(bucket.dtype).view(-1, 1, 1)
        steps = DirectionIterator(update)
        for step in steps:
            if isinstance(step, BatchedCall):
                steps.answer = yield step
                continue
            i = step.member.number
            if write_list_(bucket.weight_list(i), step, lr, decay, write_mask):
                continue
            W = bucket.load(i)
            write_(W, step, group["lr"] if step.torch_bits else lr, decay, write_mask)
            bucket.store(i, W)

    @staticmethod
    def _lr_value(lr: float | Tensor) -> float | Tensor:
        """The learning rate as a float where the host need not wait for it; never cached."""
        if isinstance(lr, Tensor):
            return float(lr) if lr.device.type == "cpu" else lr.reshape(())
        return lr

    # flags that arrive late -----------------------------------------------------------------------

    def _apply_late_flags(self) -> None:
        """Read the flags of the last step and set back the clocks of units that were skipped."""
        pending, self._pending = self._pending, ()
        for late_flags, buckets in pending:
            units = [unit for bucket in buckets for unit in bucket.units]
            for unit, finite in zip(units, late_flags.read(), strict=True):
                if not finite:
                    self.state[unit.params[0]][unit.step_key] -= 1
                    self._count_skipped(unit)
                    if self._plan is not None:
                        self._plan.mask = None

    def _count_skipped(self, unit: Unit) -> None:
        """Count a skipped parameter once, however many units its view makes."""
        self._skipped += unit.number == 0

    @property
    def skipped(self) -> int:
        """Number of updates left out because a gradient was not finite; waits for the device."""
        self._apply_late_flags()
        return self._skipped

    # checkpoints ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups as torch gives them: tensors, numbers and plain values only."""
        self._apply_late_flags()
        if self._plan is not None:
            self._get_plan()  # refuses settings that do not fit the state, as a step does
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, of ``torch.optim.Muon`` or ``AdamW`` where it fits.

        Every tensor keeps its dtype (torch alone casts state to the parameter's); group keys that
        the checkpoint lacks keep their values, clocks that it lacks are 0.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If it does not fit; weights and state are unchanged then.
        """
        prepared: dict[str, Any] = {}

        def prepare(_: Optimizer, loaded: Any) -> dict[str, Any]:
            prepared.update(checkpoint.prepare(self._default_rule, self.param_groups, loaded))
            return prepared

        def restore(_: Optimizer) -> None:
            checkpoint.restore(self._default_rule, self.param_groups, self.state, prepared)

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

    def __getstate__(self) -> dict[str, Any]:
        self._apply_late_flags()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._pending = None, ()
        for group in self.param_groups:
            RULE_CLASSES.get(group["rule"], self._default_rule).complete_saved(group)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
