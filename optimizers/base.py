"""The driver: groups, plan, state, flags, clocks and the write, once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from operator import is_
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import adamw, checkpoint
from .changes import follow
from .flags import LateFlags, look, read_flags
from .groups import (
    COMMON,
    FOREIGN,
    OWN,
    check_group,
    check_matrix,
    check_values,
    defaults_of,
    parameters_of,
    read,
    refuse_unknown,
    routed,
    rows_of,
    rule_class,
    rule_of,
    settings_of,
)
from .plan import Bucket, Plan
from .roles import Assignment
from .rule import RULES, Rule, Together
from .together import Meeting, Run, Written
from .units import Unit, place, stagger, units_of
from .write import write_, write_apart_


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
        weight_decay: Decoupled weight decay.
        adamw_lr: Learning rate of the AdamW parameters; None: ``lr``. If given they get groups of
            their own, so that schedulers scale both. Wrappers that mirror groups
            (ZeroRedundancyOptimizer) need these groups spelled out, each with its ``lr``.
        adamw_betas: Betas of the AdamW parameters; None: the method's ``betas``, else (0.9, 0.95).
        adamw_eps: Their eps (default: 1e-8).
        adamw_weight_decay: Their weight decay; None: ``weight_decay``.
        maximize: Ascend instead of descend (default: False).
        foreach, fused, capturable: As in ``torch.optim.AdamW``, for the AdamW parameters.
        nonfinite: ``"skip"`` leaves a matrix with a NaN or infinite gradient and its state alone
            and counts it in :attr:`skipped`; ``"raise"`` raises before anything changes.
        view: How a parameter becomes matrices, see ``views.py`` (default: ``"auto"``).
        state_dtype: Name of the floating dtype of the state, such as ``"bfloat16"``; None: float32
            (float64 for float64 weights). ``"int8"``: moments and momentum in 8 bits with a scale
            for every 256 of them, the rest as under None; see ``kernels/quantize.py``. Averages of
            squares follow falling gradients late then: steps of 0.001 round away.
        stagger: Whether refreshes of different weights are spread evenly over the window, so that
            no step but the first stalls (default: False). Where they come depends on the model.

    Raises:
        ValueError: For a value out of range, an unknown group key, or a parameter that the method
            cannot train; the message names the way around.
        TypeError: For an unknown keyword.

    State: the rule's slots per parameter, and the host ints ``step`` and ``refreshed``. A value of
    a group may change in the middle of a run: state that it adds starts anew, state that it drops
    is freed, and where a basis or index is replaced that weight begins anew. What would reshape
    state (``rank``) is refused at the next step.

    Temporary memory that the classes state is for float32 weights and state. A gradient of lower
    precision, ``maximize`` and ``state_dtype`` add a copy of the gradient or the state of one
    weight at a time (of one stack, for small weights).
    """

    _reference_key: ClassVar[str | None] = None
    """Group key by which the method's reference package marks its matrix groups."""
    _plan: Plan | None = None
    _skipped = 0
    _pending: Sequence[tuple[LateFlags, list[Bucket]]] = ()
    _wait: bool | None = None
    """Whether the host waits for the finite flags; None: on CPU."""

    def __init__(
        self,
        params: Any,
        rule: Rule,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        **common: Any,
    ) -> None:
        own = {"lr", "weight_decay", *settings_of(rule)}
        what = f"{type(self).__name__} keyword"
        message = refuse_unknown(common, COMMON.keys() | own, what)
        if message:
            raise TypeError(message)
        defaults = {
            "lr": lr, "weight_decay": weight_decay, **settings_of(rule), **COMMON, **common,
            "rule": None, "method": rule.method(),
        }  # fmt: skip
        check_values(defaults)
        super().__init__(read(params, rule, self._reference_key, defaults["view"]), defaults)

    # groups ---------------------------------------------------------------------------------------

    @property
    def _own(self) -> type[Rule]:
        return RULES[self.defaults["method"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it whole; a refused group changes nothing.

        A late group is routed by itself: that groups without a reference package's key are AdamW
        is known to the constructor only.

        Args:
            param_group: ``params`` and any overrides; see the class docstring.

        Raises:
            ValueError: If a key is unknown, a value out of range or a parameter cannot be trained.
        """
        count = len(self.param_groups)
        try:
            for group in self._prepared(param_group):
                super().add_param_group(group)
        except BaseException:
            del self.param_groups[count:]
            raise

    def _prepared(self, param_group: dict[str, Any]) -> list[dict[str, Any]]:
        """A user's group as the groups that torch shall add."""
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
        reference = key is not None and bool(group.get(key)) and "rule" not in group
        if reference:
            group["rule"] = self._own.method()
        elif key is not None and group.get(key) is False:
            group.setdefault("rule", "adamw")  # use_muon=False, also in a late group
        named = group.get("rule")
        if named == "adamw":  # torch's own names mean AdamW's values in an AdamW group
            if "eps" in group:
                group.setdefault("adamw_eps", group["eps"])
            if "betas" in group and "betas" not in self.defaults:
                group.setdefault("adamw_betas", group.pop("betas"))
        rule = self._own if named in (None, "adamw") else rule_class(named)
        foreign = {} if rule is self._own else defaults_of(rule)
        known = OWN | FOREIGN | COMMON.keys() | defaults_of(self._own).keys() | foreign.keys()
        message = refuse_unknown(group, known | ({key} if key else set()), "parameter group key")
        if message:
            raise ValueError(message)
        # a group of another method starts from that method's defaults, not from this one's
        full = {**self.defaults, **foreign, **group}
        check_group(full, self._own, reference=reference)
        for name in foreign:
            group.setdefault(name, foreign[name])
        return self._split(group, full)

    def _split(self, group: dict[str, Any], full: dict[str, Any]) -> list[dict[str, Any]]:
        """Give AdamW parameters with a learning rate of their own a group of their own."""
        if full["adamw_lr"] is None:
            return [group]
        rule = rule_of(full, self._own)
        if rule is None:
            return [{"lr": full["adamw_lr"], **group}]
        params, names = parameters_of(group)
        if None in names and any(names):
            return [group]  # torch refuses names of some parameters only, with its own text
        rows = rows_of({**full, "params": params, "param_names": names}, rule)
        parts = []
        for kind in ("matrix", "adamw"):
            chosen = [i for i, row in enumerate(rows) if row.rule == kind]
            part = {
                **group,
                "params": [
                    params[i] if names[i] is None else (names[i], params[i]) for i in chosen
                ],
            }
            part.pop("param_names", None)  # torch takes them from the pairs again
            for key in ("roles", "reasons"):
                if key in group:
                    part[key] = [group[key][i] for i in chosen]
            if kind == "adamw":
                part.update(rule="adamw", lr=full["adamw_lr"])
            if chosen:
                parts.append(part)
        return parts

    def assignment(self) -> Assignment:
        """Which parameter gets which rule and why: a table that prints."""
        table = []
        for group in self.param_groups:
            rule = rule_of(group, self._own)
            name = "adamw" if rule is None else rule.method()
            table += [
                replace(row, rule=name if row.rule == "matrix" else "adamw")
                for row in rows_of(group, rule)
            ]
        return Assignment(tuple(table))

    # plan -----------------------------------------------------------------------------------------

    def _values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        cls = self._own if group["rule"] in (None, "adamw") else rule_class(group["rule"])
        return (
            group["rule"],
            group["view"],
            group["state_dtype"],
            group["stagger"],
            *[group[f.name] for f in fields(cls)],
        )

    def _current(self) -> Plan:
        """The plan's lasting part: rules and units, made anew only when groups changed."""
        flat = [p for group in self.param_groups for p in group["params"]]
        values = [self._values(group) for group in self.param_groups]
        old = self._plan
        if old is not None and len(old.flat) == len(flat) and all(map(is_, old.flat, flat)):
            if old.values == values or self._adopt(old, values):
                return old
        rules = [rule_of(group, self._own) for group in self.param_groups]
        orders = [self._order(group) for group in self.param_groups]
        plan = Plan(flat, values, rules, orders, [], [])
        position, first = 0, dict[Tensor, int]()  # torch only warns about a parameter given twice
        for i, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
            matrices, vectors = (
                [(j, p) for j, p in part if first.setdefault(p, j) == j]
                for part in routed(group, rule, position)
            )
            position += len(group["params"])
            plan.vectors.append([j for j, _ in vectors])
            if rule is not None:
                for j, p in matrices:
                    check_matrix(p, f"parameter {j} of shape {tuple(p.shape)}", rule.method())
                plan.units += units_of(i, group, rule, matrices)
        place(plan.units, rules, self.param_groups)
        stagger(plan.units, rules, self.param_groups)
        if old is not None:  # settings changed, or a group came
            aside = [old.flat[i] for positions in old.vectors for i in positions]
            follow(old.units, aside, plan.units, rules, flat, self.state)
        self._plan = plan
        return plan

    def _order(self, group: dict[str, Any]) -> tuple[bool, float] | None:
        """How AdamW parameters of a group are stepped: as the optimizer's method has it."""
        named = group["rule"]
        rule = rule_of({**group, "rule": None if named == "adamw" else named}, self._own)
        return None if rule is None else rule.adamw_order()

    def _adopt(self, plan: Plan, values: list[tuple[Any, ...]]) -> bool:
        """Follow hyper-parameters that a scheduler rewrote without making units anew."""
        for i, (old, new) in enumerate(zip(plan.values, values, strict=False)):
            if old != new:
                group = self.param_groups[i]
                rule = rule_of(group, self._own)
                if old[:4] != new[:4] or (rule is not None and not plan.adopt(i, rule, group)):
                    return False
                plan.values[i], plan.orders[i] = new, self._order(group)
        return len(plan.values) == len(values)

    def init_state(self) -> None:
        """Allocate all state of trainable parameters now; shapes and keys as after a step."""
        plan = self._current()
        for unit in plan.units:
            rule = plan.rules[unit.group]
            if rule is not None and any(p.requires_grad for p in unit.params):
                unit.allocate(self.state, rule)
        for group, positions in zip(self.param_groups, plan.vectors, strict=True):
            for i in positions:
                if plan.flat[i].requires_grad:
                    adamw.allocate(plan.flat[i], group, self.state[plan.flat[i]])

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
            RuntimeError: For a sparse gradient, or a non-finite one under ``nonfinite="raise"``;
                no weight and no value of the state has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch._C._DisableAutocast():  # a caller's autocast is for the model, not for this
            self._update()
        return loss

    def _update(self) -> None:
        """One step from the gradients as they are now."""
        self._settle()
        plan = self._current()
        grads = [p.grad for p in plan.flat]
        for grad in grads:
            if grad is not None and grad.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        vectors = self._vectors(plan, grads)  # may refuse, so before anything moves
        if self._dry(grads):
            self.init_state()
        else:
            mask = [grad is not None for grad in grads]
            if plan.stale(mask, self.state):
                plan.fill(mask, self.state)
            self._step_matrices(plan, grads)
        for group, params, given, entries, order in vectors:
            adamw.step(group, params, given, entries, order=order)

    def _dry(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether this is a checkpoint probe: every lr 0 and every gradient 0."""
        for group in self.param_groups:
            lr = group["lr"]
            if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
                return False
        return not any(grad is not None and bool(grad.any()) for grad in grads)

    def _vectors(self, plan: Plan, grads: Sequence[Tensor | None]) -> list[tuple[Any, ...]]:
        """What AdamW steps: whole AdamW groups, and what is no matrix in other groups."""
        made = []
        for group, order, positions in zip(
            self.param_groups, plan.orders, plan.vectors, strict=True
        ):
            present = [(plan.flat[i], grad) for i in positions if (grad := grads[i]) is not None]
            entries = [self.state[p] for p, _ in present]
            for (p, _), entry in zip(present, entries, strict=True):
                adamw.allocate(p, group, entry)
            if present:
                made.append((group, *map(list, zip(*present, strict=True)), entries, order))
        return made

    def _step_matrices(self, plan: Plan, grads: Sequence[Tensor | None]) -> None:
        """Look at every gradient before any state changes, then run bucket after bucket."""
        stacks, flags = look(plan.buckets, grads, self._waits)
        good = read_flags(plan, self.param_groups, flags, grads, self._waits)
        meeting = Meeting()
        for bucket, stack, flag, fine in zip(plan.buckets, stacks, flags, good, strict=True):
            Gs = stack or [
                bucket.gradient(i, grads) if there else None
                for i, there in enumerate(bucket.present)
            ]
            rule = plan.rules[bucket.group]
            key = (bucket.group, flag.device) if rule is not None and rule.meets else None
            size = sum(G.nbytes for G in Gs if G is not None)
            meeting.add(self._run(plan, bucket, Gs, fine, flag), key, size)
        meeting.close()
        late = [
            (flag, bucket)
            for flag, bucket, fine in zip(flags, plan.buckets, good, strict=True)
            if fine is None
        ]
        for device in {flag.device for flag, _ in late}:
            here = [(flag, bucket) for flag, bucket in late if flag.device == device]
            packed = LateFlags(torch.cat([flag for flag, _ in here]).isfinite())
            self._pending = [*self._pending, (packed, [bucket for _, bucket in here])]

    def _waits(self, device: torch.device) -> bool:
        return device.type == "cpu" if self._wait is None else self._wait

    def _run(
        self,
        plan: Plan,
        bucket: Bucket,
        Gs: Sequence[Tensor | None],
        fine: list[bool] | None,
        flag: Tensor,
    ) -> Run:
        """One bucket: gradients made ready, refresh if due, update, write, clocks."""
        rule = plan.rules[bucket.group]
        assert rule is not None
        group = self.param_groups[bucket.group]
        t, refreshed = bucket.clocks()
        due = fine is not None and rule.due(t, refreshed, bucket.unit.shift)
        live = [not due or bucket.nonzero(Gs, j) for j in range(len(bucket.units))]
        if bucket.stacked and fine is not None and not (all(fine) and all(live)):
            # a stack that is not whole runs as views: same bits, no second code path
            for j in range(len(bucket.units)):
                parts = [None if G is None else G[j : j + 1] for G in Gs]
                yield from self._run(plan, bucket.alone(j), parts, fine[j : j + 1], flag)
            plan.mask = None  # clocks differ now: sort again at the next step
            return
        if fine is not None and not fine[0]:
            self._skip(bucket.unit)
            return
        ok = None if fine is not None else flag.isfinite()
        raw = ok is not None and rule.guarded and bucket.by_kernels(Gs)
        Gs = [
            None if G is None else bucket.ready(i, G, group["maximize"], ok, raw)
            for i, G in enumerate(Gs)
        ]
        saved = [] if ok is None or raw else bucket.copies()
        decoded = bucket.decoded()
        seen = ok.float() if ok is not None and raw else None
        members = bucket.members(Gs, decoded, t, refreshed, seen)
        if due and live[0]:
            for member in members:
                member.refreshed, member.fresh = t, refreshed == 0
            rule.refresh(*members)
            bucket.set_refreshed(t)
        lr = self._lr(group["lr"])
        steps = Written(rule.update(*members))
        for step in steps:
            if isinstance(step, Together):
                steps.answer = yield step
                continue
            i, decay = step.member.number, group["weight_decay"]
            on = None if ok is None else ok.to(bucket.dtype).view(-1, 1, 1)
            if write_apart_(bucket.apart(i), step, lr, decay, on):
                continue
            W = bucket.load(i)
            write_(W, step, lr, decay, on)
            bucket.store(i, W)
        bucket.encode(decoded)
        bucket.set_step(t)
        if ok is not None and not raw:
            bucket.put_back(saved, ok)

    @staticmethod
    def _lr(lr: float | Tensor) -> float | Tensor:
        """A float wherever the host can read it without waiting; never cached."""
        if isinstance(lr, Tensor):
            return float(lr) if lr.device.type == "cpu" else lr.reshape(())
        return lr

    # flags that arrive late -----------------------------------------------------------------------

    def _settle(self) -> None:
        """Read the flags of the last step; units that were skipped get their clocks back."""
        pending, self._pending = self._pending, ()
        for packed, buckets in pending:
            units = [unit for bucket in buckets for unit in bucket.units]
            for unit, fine in zip(units, packed.read(), strict=True):
                if not fine:
                    self.state[unit.params[0]][unit.step_key] -= 1
                    self._skip(unit)
                    if self._plan is not None:
                        self._plan.mask = None

    def _skip(self, unit: Unit) -> None:
        """Count a parameter once, however many blocks it has."""
        self._skipped += unit.number == 0

    @property
    def skipped(self) -> int:
        """Updates left out so far because a gradient was not finite; on a device this waits."""
        self._settle()
        return self._skipped

    # checkpoints ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups as torch gives them: tensors, numbers and plain values only."""
        self._settle()
        before = self._plan
        if before is not None and self._current() is not before:
            self._catch_up()  # settings changed since the last step: a load checks state by them
        return super().state_dict()

    def _catch_up(self) -> None:
        """Make what is missing in the state of parameters that have some."""
        plan = self._current()
        for unit in plan.units:
            rule = plan.rules[unit.group]
            if rule is not None and any(self.state.get(p) for p in unit.params):
                unit.allocate(self.state, rule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, of ``torch.optim.Muon`` or ``AdamW`` where it fits.

        Every tensor keeps its dtype (torch alone casts state to the parameter's); group keys that
        the checkpoint lacks keep their values, clocks that it lacks are 0.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If it does not fit; weights and state are unchanged then.
        """
        seen: dict[str, Any] = {}

        def check(_: Optimizer, given: Any) -> dict[str, Any]:
            seen.update(checkpoint.prepare(self._own, self.param_groups, given))
            return seen

        def put_back(_: Optimizer) -> None:
            checkpoint.restore(self._own, self.param_groups, self.state, seen)

        if not isinstance(state_dict, dict):
            checkpoint.prepare(self._own, self.param_groups, state_dict)
        # last before torch reads, first after it wrote: a user's own hooks see what was meant
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(put_back, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._pending = None, ()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
