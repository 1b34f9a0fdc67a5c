"""Steps inside of the backward pass: a unit moves once its gradients have come and frees them.

Every unit, and every AdamW parameter, is a plan of its own, run by the code of the joint step. So a
weight gets the bits that it has in a stack.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import RemovableHandle

from ...kernels import LOW_PRECISION_DTYPES
from .._core.validation import whole_number
from . import adamw
from .buckets import StepPlan, buckets_of
from .checks import check_gradient, check_ready
from .finite import Findings, Unread, copied_to_host, group_indices, inspect_grads, refuse
from .layout import is_sharded
from .norm_write import refuse_zero_weights
from .param_groups import describe, names_of, warn_user
from .saved_state import refuse_unsound_state
from .sharded_backward import ShardedSteps, refuse_what_sends
from .shards import Shards
from .units import Unit

if TYPE_CHECKING:
    from types import FrameType

    from .optimizer import StackedOptimizer

GUARDS = {
    "clip_grad_rms": "clip_grad_rms=",
    "spike_ratio": "spike_ratio=",
    "max_rel_step": "max_rel_step=",
    "limiter": "limiter=True",
}
"""Options that bound the step of one weight by what is known of this weight alone."""

NO_PASS = -1
"""Number of the backward pass while the engine calls what was queued for its end."""

H = TypeVar("H", bound="BackwardHandle")


@dataclass(eq=False)
class UnitPlan:
    """A plan of what steps together: units of the same parameters, or one AdamW parameter.

    Attributes:
        plan: The plan, with lists of the whole plan but for its units and AdamW parameters.
        positions: Flat positions of the parameters.
        params: The parameters.
        group: Index of the group.
        start: Flat position of the group's first parameter.
        is_adamw: Whether AdamW steps it.
        at_end: Whether it steps at the end of the backward pass, whatever has come.
        waiting: Parameters whose gradients have not come in this backward pass.
        signature: What the last step has checked of weights and gradients.
    """

    plan: StepPlan
    positions: tuple[int, ...]
    params: tuple[Tensor, ...]
    group: int
    start: int
    is_adamw: bool = False
    at_end: bool = False
    waiting: int = 0
    signature: Any = None


class _Hook:
    """What a parameter calls once its gradient has been accumulated; keeps no optimizer alive."""

    def __init__(self, handle: BackwardHandle) -> None:
        self.handle = ref(handle)

    def __call__(self, p: Tensor) -> None:
        handle = self.handle()
        if handle is not None:
            handle._receive(p)


class BackwardHandle:
    """What :meth:`StackedOptimizer.step_in_backward` returns: a context that ends with `remove`.

    Attributes:
        grad_norm: Norm of all gradients of the last step, those that were not finite included, as
            a scalar on their device; None before the first step. Reading it waits for the device.
    """

    def __init__(self, optimizer: StackedOptimizer, every: int) -> None:
        self._optimizer, self._every = optimizer, every
        self.grad_norm: Tensor | None = None
        self._is_removed = False
        self._warned: set[str] = set()
        self._hooks: dict[Tensor, tuple[RemovableHandle, int]] = {}
        """Hooks, and the tensor behind each parameter: a swapped parameter has another one."""
        self._hook = _Hook(self)
        # parameters of several devices have their hooks called by several threads
        self._lock = threading.RLock()
        self._plan: StepPlan | None = None
        self._stack_keys: Sequence[object] = ()
        self._flat_params: Sequence[Tensor] = ()
        self._unit_plans: list[UnitPlan] = []
        self._plan_of: dict[Tensor, tuple[UnitPlan, int]] = {}
        self._grads: list[Tensor | None] = []
        self._task: int | None = None
        """Number of the running backward pass; None between two of them."""
        self._count = 0
        """Backward passes since the last step."""
        self._arrived: set[int] = set()
        """Positions whose gradients have come since the last step and have not been used."""
        self._unseen: list[Tensor] = []
        """Parameters without a hook at the beginning of the pass, whose gradients it leaves."""
        self._known_states = 0
        """Parameters that had state at the beginning of the pass."""
        self._norms: list[Tensor] = []
        self._shards = ShardedSteps(optimizer)
        self._unread: Unread = {}
        self._streams: dict[int, torch.cuda.Stream] = {}
        """By position, the stream on which a gradient of a unit of several weights was made."""
        self._refuse_parameters()
        # a GradScaler then calls step(), which can refuse it
        optimizer._step_supports_amp_scaling = True
        self.attach()

    # what users call --------------------------------------------------------------------------

    def remove(self) -> None:
        """Remove the hooks: from now on ``step()`` steps. Gradients that wait stay in ``.grad``."""
        if self._is_removed:
            return
        self._is_removed = True
        for hook, _ in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._collect_flags()
        self._plan, self._unit_plans, self._plan_of = None, [], {}
        self._optimizer._in_backward = None
        self._optimizer.__dict__.pop("_step_supports_amp_scaling", None)

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # what the optimizer calls -----------------------------------------------------------------

    def attach(self) -> None:
        """Hook all parameters that have no hook yet, frozen ones too."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if not self._is_hooked(p) and p.is_leaf and _can_train(p):
                    if p in self._hooks:
                        self._hooks.pop(p)[0].remove()
                        _revive_hooks(p)
                    self._hooks[p] = _register(p, self._hook), p._cdata

    def ignore_step(self, closure: Any = None) -> None:
        """Do what ``step()`` does as long as this handle lives: nothing, with one warning.

        A checkpointer's probing step, with learning rates and gradients of 0, allocates state.

        Raises:
            RuntimeError: For a closure, or if a GradScaler calls.
        """
        optimizer = self._optimizer
        if closure is not None:
            raise RuntimeError(
                "step(closure) cannot step inside of the backward pass that the closure runs: call "
                "backward() alone, or remove() the handle of step_in_backward()"
            )
        if hasattr(optimizer, "found_inf") or hasattr(optimizer, "grad_scale"):
            for name in ("found_inf", "grad_scale"):
                optimizer.__dict__.pop(name, None)
            raise RuntimeError(
                "a GradScaler cannot unscale gradients that step_in_backward() has used and freed: "
                "train in bfloat16 without a scaler, or remove() the handle"
            )
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if self._owns_no_gradient() and any(grad is not None for grad in grads):
            if optimizer._is_dry_step(grads):
                optimizer._update()
                return
        self._warn("step", "step() does nothing, as backward() has stepped already")

    def ignore_zero_grad(self) -> None:
        """Do what ``zero_grad()`` does as long as this handle lives: nothing, with one warning.

        Only gradients that no step will use are freed: those that other code has put there, or
        that a backward pass has left which failed.
        """
        self._warn(
            "zero_grad", "zero_grad() does nothing, as gradients are freed once they are used"
        )
        if self._owns_no_gradient():
            self._drop()

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn_user(f"{text} while step_in_backward() is on; this warning comes once")

    def _owns_no_gradient(self) -> bool:
        """Whether no gradient is kept for a step: no accumulation has begun, or a pass failed."""
        return self._task is not None or self._count == 0

    # the backward pass ------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _receive(self, p: Tensor) -> None:
        """Take the gradient of a parameter, and step what waits for nothing else."""
        with self._lock, torch.no_grad(), torch._C._DisableAutocast():
            if self._is_removed:
                return
            try:
                task = torch._C._current_graph_task_id()
                if task == NO_PASS and self._task is not None:
                    task = self._task  # fully_shard reduces the last gradients in its own callback
                if task != self._task:
                    self._begin(task, is_sharded(p))
                found = self._plan_of.get(p)
                if found is None:
                    return
                unit_plan, position = found
                self._arrived.add(position)
                if p.is_cuda and len(unit_plan.params) > 1:
                    self._streams[position] = torch.cuda.current_stream(p.device)
                unit_plan.waiting -= 1
                if self._is_last_pass() and unit_plan.waiting == 0 and not unit_plan.at_end:
                    self._step(unit_plan)
            except BaseException:
                self._drop()
                raise

    def _is_last_pass(self) -> bool:
        """Whether the running backward pass is the one that steps."""
        return self._count == self._every - 1

    def _begin(self, task: int, sharded: bool) -> None:
        """Begin a backward pass: read flags of the last one, follow changes of the groups.

        Args:
            task: Number of the pass.
            sharded: Whether ``fully_shard`` calls, inside of a function of its own.
        """
        _refuse_nested_pass(sys._getframe(), sharded)
        optimizer, self._task = self._optimizer, task
        self._collect_flags()
        optimizer._apply_late_flags()
        optimizer._before_backward()
        plan = self._current_plan()
        self._known_states = len(optimizer.state)
        optimizer._follow_radii()
        if plan is not self._plan:
            self._refuse_parameters()
            self._build(plan)
        if plan.stack_keys is not self._stack_keys:  # rules have other values
            self._stack_keys = plan.stack_keys
            for unit_plan in self._unit_plans:
                unit_plan.plan.stack_keys, unit_plan.plan.mask = plan.stack_keys, None
        for unit_plan in self._unit_plans:
            unit_plan.waiting = sum(p.requires_grad for p in unit_plan.params)
        # tensors that were swapped or appended to a group have no hook: their gradients are taken
        # at the end
        self._unseen = [p for p in plan.flat_params if not self._is_hooked(p)]
        if self._unseen:
            self.attach()
        Variable._execution_engine.queue_callback(lambda: self._end(task))

    def _current_plan(self) -> StepPlan:
        """The optimizer's plan, after the checks that a joint step makes before anything moves."""
        optimizer = self._optimizer
        refuse_skip_step(optimizer.param_groups)
        for _ in range(2):
            plan = optimizer._get_plan()
            name, none = type(optimizer).__name__, [None] * len(plan.flat_params)
            if check_ready(plan, none, optimizer.param_groups, optimizer.state, name):
                break
            optimizer._plan = None  # weights have another dtype now, and their state fits
        return plan

    def _end(self, task: int) -> None:
        """End a backward pass: step what still waits if this was the last one."""
        with self._lock, torch.no_grad(), torch._C._DisableAutocast():
            if self._is_removed or self._task != task:
                return
            try:
                for p in self._unseen:
                    if p in self._plan_of and p.grad is not None:
                        self._arrived.add(self._plan_of[p][1])
                if not self._is_last_pass():
                    self._count, self._task = self._count + 1, None
                    return
                self._optimizer._step_at_end(self._step_rest)
            except BaseException:
                self._drop()
                raise
            self._finish()

    def _step_rest(self) -> None:
        """Step all units that have a gradient, in the order of the joint step."""
        for unit_plan in self._unit_plans if self._arrived else ():
            if not self._arrived.isdisjoint(unit_plan.positions):
                self._step(unit_plan)

    def _finish(self) -> None:
        """Close the books of a step."""
        self._task, self._count = None, 0
        self._arrived.clear()
        self._collect_flags()
        self._sort_new_states()
        self._norms += self._shards.norms()
        if self._norms:
            first = self._norms[0]
            norms = torch.stack([norm.to(first.device, first.dtype) for norm in self._norms])
            self.grad_norm = torch.linalg.vector_norm(norms)
        self._norms = []
        self._optimizer._opt_called = True  # schedulers ask for it

    def _sort_new_states(self) -> None:
        """Put state that this pass has allocated in the order of a joint step."""
        state = self._optimizer.state
        if len(state) - self._known_states < 2:
            return
        plans = sorted(self._unit_plans, key=lambda unit_plan: not unit_plan.is_adamw)
        rank = {p: i for i, p in enumerate(p for unit_plan in plans for p in unit_plan.params)}
        for p in sorted(list(state)[self._known_states :], key=lambda p: rank.get(p, len(rank))):
            state[p] = state.pop(p)

    def _collect_flags(self) -> None:
        """Let the optimizer read the unread flags of this pass before the next one."""
        flags, self._unread = copied_to_host(self._unread), {}
        self._optimizer._pending = [*self._optimizer._pending, *flags]

    def _drop(self) -> None:
        """Free all gradients, and begin anew."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        self._task, self._count = None, 0
        self._arrived.clear()
        self._norms = []
        self._collect_flags()

    # one unit -----------------------------------------------------------------------------------

    def _step(self, unit_plan: UnitPlan) -> None:
        """Step what belongs together, and free its gradients."""
        grads, positions = self._grads, unit_plan.positions
        for i, p in zip(positions, unit_plan.params, strict=True):
            if i in self._arrived:
                grads[i] = p.grad
                self._wait_for_stream(i, p)
        try:
            self._update(unit_plan, grads)
        finally:
            for i, p in zip(positions, unit_plan.params, strict=True):
                if i in self._arrived:
                    grads[i] = p.grad = None
            self._arrived.difference_update(positions)

    def _wait_for_stream(self, position: int, p: Tensor) -> None:
        """Order the step after the work that has made a gradient on another stream."""
        stream = self._streams.pop(position, None)
        current = None if stream is None else torch.cuda.current_stream(p.device)
        if stream is not None and current is not None and stream != current:
            current.wait_stream(stream)
            if p.grad is not None:  # freed by the host before this stream has read it
                p.grad.record_stream(current)

    def _update(self, unit_plan: UnitPlan, grads: Sequence[Tensor | None]) -> None:
        """What the joint step does, for one unit."""
        optimizer, plan = self._optimizer, unit_plan.plan
        groups, state = optimizer.param_groups, optimizer.state
        if plan.shards is not None:
            self._update_shards(unit_plan, plan.shards, grads)
            return
        self._check(unit_plan, grads)
        norms = [_norm(G) for i in unit_plan.positions if (G := grads[i]) is not None]
        self._norms += norms
        work = self._adamw_work(unit_plan, grads) if unit_plan.is_adamw else None
        before = {p: dict(state[p]) for p in unit_plan.params if p in state}
        try:
            if work is None:
                self._allocate(unit_plan, grads)
            else:
                work.allocate(state)
            if all(optimizer._waits(norm.device) and isfinite(norm.item()) for norm in norms):
                found = Findings(
                    stacks=[None] * len(plan.buckets), unread=[None] * len(plan.buckets)
                )
            else:  # the norm of finite numbers may overflow
                found = inspect_grads(plan, grads, groups, optimizer._waits)
            if found.bad:
                refuse(found, groups)
            refuse_zero_weights(plan.buckets, groups, found.bad, optimizer._describe)
        except BaseException:
            plan.mask = None
            _restore_entries(unit_plan.params, state, before)
            raise
        if found.bad:
            optimizer._count([plan.flat_params[i] for i in sorted(found.bad)])
        if work is None:
            optimizer._step_matrices(plan, grads, found)
        else:
            work.step(found.bad, found.adamw_flags)
        if found.joined or any(found.unread):
            found.add_unread(self._unread, plan, groups, self._group_of)

    def _update_shards(
        self, unit_plan: UnitPlan, shards: Shards, grads: Sequence[Tensor | None]
    ) -> None:
        """The same of a sharded unit: nothing moves before the ranks have agreed."""
        optimizer, state = self._optimizer, self._optimizer.state
        before = {p: dict(state[p]) for p in unit_plan.params if p in state}
        work, held = None, dict[int, Tensor | None]()
        try:
            self._check(unit_plan, grads)
            shards.follow()
            held = self._shards.held(shards, grads)
            refuse_unsound_state(unit_plan.plan.units, unit_plan.plan.rules, {}, state, self._texts)
            if unit_plan.is_adamw:
                local_grads = [held.get(i) for i in range(len(grads))]
                work = self._adamw_work(unit_plan, local_grads)
                work.allocate(state)
        except BaseException:
            self._shards.tell_of_failure(shards)
            _restore_entries(unit_plan.params, state, before)
            raise
        try:
            agreed = self._shards.agree(shards, held)
            found = Findings(bad=agreed.bad)
            if found.bad:
                refuse(found, optimizer.param_groups)
        except BaseException:
            _restore_entries(unit_plan.params, state, before)
            raise
        self._shards.add_norms(shards, held)
        if found.bad:
            optimizer._count([unit_plan.plan.flat_params[i] for i in sorted(found.bad)])
        if work is None:
            shards.step(optimizer, held, agreed, lambda: None)
        else:
            work.step(found.bad, found.adamw_flags)

    def _check(self, unit_plan: UnitPlan, grads: Sequence[Tensor | None]) -> None:
        """Raise if gradients cannot be used; they are looked at when they change their kind."""
        optimizer = self._optimizer
        group = optimizer.param_groups[unit_plan.group]
        signature = (
            [(p.dtype, p.shape, p.device) for p in unit_plan.params],
            [(G.dtype, G.layout) for i in unit_plan.positions if (G := grads[i]) is not None],
            (group.get("capturable"), group.get("fused")),
        )
        if unit_plan.signature == signature:
            return
        for i, p in zip(unit_plan.positions, unit_plan.params, strict=True):
            G, entry = grads[i], optimizer.state.get(p, {})
            if G is not None:
                adamw_group = group if unit_plan.is_adamw else None
                check_gradient(p, G, entry, adamw_group, self._texts[p], type(optimizer).__name__)
        unit_plan.signature = signature

    def _adamw_work(self, unit_plan: UnitPlan, grads: Sequence[Tensor | None]) -> adamw.Work:
        """AdamW's step of one parameter."""
        optimizer, plan, i = self._optimizer, unit_plan.plan, unit_plan.group
        group, cache = optimizer.param_groups[i], plan.adamw_entries
        work = adamw.Work.of(
            group,
            plan.adamw_orders[i],
            unit_plan.positions,
            unit_plan.start,
            plan.flat_params,
            grads,
        )
        work.find(optimizer.state, cache, i, is_whole=False)
        work.check(optimizer._describe, cache, i)
        return work

    def _allocate(self, unit_plan: UnitPlan, grads: Sequence[Tensor | None]) -> None:
        """Allocate what the units need, and bind them to the live state."""
        plan, state = unit_plan.plan, self._optimizer.state
        mask = [grads[i] is not None for i in unit_plan.positions]
        if (
            plan.mask == mask
            and all(bucket.is_current(state) for bucket in plan.buckets)
            and not any(plan.state_window_changed(bucket) for bucket in plan.buckets)
        ):
            return
        refuse_unsound_state(plan.units, plan.rules, {}, state, self._texts)
        has_grad = dict(zip(unit_plan.positions, mask, strict=True))
        plan.buckets = buckets_of(plan.units, has_grad, state, plan.rules, plan.stack_keys)
        plan.mask = mask

    # plans --------------------------------------------------------------------------------------

    def _build(self, plan: StepPlan) -> None:
        """Cut the optimizer's plan into those of single units; nothing stays in a stack."""
        optimizer = self._optimizer
        arrived = [self._flat_params[i] for i in self._arrived]
        plan.buckets, plan.mask = [], None
        for unit in plan.units:
            unit.detach_from_slab(optimizer.state)
        self._unit_plans = _matrix_plans(optimizer, plan)
        self._unit_plans += _adamw_plans(plan, optimizer.param_groups)
        for unit_plan in self._unit_plans:
            self._shards.follow(unit_plan.plan, unit_plan.positions)
        self._plan_of = {
            p: (unit_plan, i)
            for unit_plan in self._unit_plans
            for i, p in zip(unit_plan.positions, unit_plan.params, strict=True)
        }
        self._plan, self._flat_params = plan, plan.flat_params
        self._stack_keys = plan.stack_keys
        self._grads = [None] * len(plan.flat_params)
        self._arrived = {self._plan_of[p][1] for p in arrived if p in self._plan_of}
        for name in ("_texts", "_group_of"):
            self.__dict__.pop(name, None)
        live = set(plan.flat_params)
        for p in [p for p in self._hooks if p not in live]:
            self._hooks.pop(p)[0].remove()

    @cached_property
    def _texts(self) -> dict[Tensor, str]:
        """How a message names each parameter."""
        named = zip(names_of(self._optimizer.param_groups), self._flat_params, strict=True)
        return {p: describe(name, p, i) for i, (name, p) in enumerate(named)}

    @cached_property
    def _group_of(self) -> list[int]:
        """Per flat position, the index of its group."""
        return group_indices(self._optimizer.param_groups)

    # refusals -----------------------------------------------------------------------------------

    def _is_hooked(self, p: Tensor) -> bool:
        """Whether the parameter has the hook, and would still call it."""
        known = self._hooks.get(p)
        return known is not None and known[1] == p._cdata

    def _refuse_parameters(self) -> None:
        """Raise for parameters whose gradients are not final when autograd has accumulated them."""
        groups = self._optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        replicated = _averaged_later()
        for i, (p, name) in enumerate(zip(params, names_of(groups), strict=True)):
            text, wrong = describe(name, p, i), ""
            if id(p) in replicated:
                wrong = "belongs to DistributedDataParallel, which averages gradients only later"
            elif any(hook.handle() not in (None, self) for hook in _own_hooks(p)):
                wrong = "is stepped in backward by another optimizer already"
            if wrong:
                raise ValueError(f"step_in_backward(): {text} {wrong}; call step() instead")
        if any(map(is_sharded, params)):
            refuse_what_sends(self._optimizer._get_plan(), self._optimizer._describe)


def checked_every(every: int, max_norm: float | None, optimizer: StackedOptimizer) -> int:
    """The number of backward passes of a step, after all checks of settings.

    Raises:
        ValueError: For settings that need all gradients at once, or a count below 1.
        RuntimeError: If the optimizer steps in backward already.
    """
    if max_norm is not None:
        keys = optimizer.param_groups[0].keys() | optimizer.defaults.keys()
        guards = [text for key, text in GUARDS.items() if key in keys]
        own = f"bound each weight's own step ({', '.join(guards)}), or " if guards else ""
        raise ValueError(
            f"max_norm needs all gradients before the first weight moves, but step_in_backward() "
            f"frees each at once; {own}leave out bad gradients with nonfinite='skip', and log "
            "handle.grad_norm"
        )
    count = whole_number("every", every, "[1, inf)")
    assert count is not None
    refuse_skip_step(optimizer.param_groups)
    if optimizer._process_group is not None:
        raise ValueError(
            "step_in_backward() cannot share work over ranks, which it steps in an order of their "
            "own; build the optimizer without process_group"
        )
    if optimizer._in_backward is not None:
        raise RuntimeError(
            "step_in_backward() is on already; call remove() of its handle before another one"
        )
    return count


def refuse_skip_step(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for a group that must see all gradients before any weight moves."""
    if any(group["nonfinite"] == "skip_step" for group in groups):
        raise ValueError(
            "nonfinite='skip_step' needs all gradients before the first weight moves, but "
            "step_in_backward() frees each at once; use nonfinite='skip' or 'raise'"
        )


def _matrix_plans(optimizer: StackedOptimizer, plan: StepPlan) -> list[UnitPlan]:
    """A plan for the units of each set of parameters: those that a view cuts step together."""
    units_by_positions: dict[tuple[int, ...], list[Unit]] = {}
    for unit in plan.units:
        units_by_positions.setdefault(unit.positions, []).append(unit)
    no_adamw: list[list[int]] = [[]] * len(plan.adamw_positions)
    no_parts: list[dict[Any, list[int]]] = [{}] * len(plan.adamw_positions)
    return [
        UnitPlan(
            _part_of(plan, units, no_adamw, no_parts),
            positions,
            units[0].params,
            units[0].group,
            0,
            at_end=any(
                # it may write weights that the backward pass still needs
                plan.rule(unit).writes_in_refresh or optimizer._steps_at_end(unit.params)
                for unit in units
            ),
        )
        for positions, units in units_by_positions.items()
    ]


def _adamw_plans(plan: StepPlan, groups: Sequence[Mapping[str, Any]]) -> list[UnitPlan]:
    """A plan for each AdamW parameter."""
    plans, start = list[UnitPlan](), 0
    for i, (group, positions) in enumerate(zip(groups, plan.adamw_positions, strict=True)):
        for position in positions:
            own = [[position] if j == i else [] for j in range(len(groups))]
            params = (plan.flat_params[position],)
            plans.append(
                UnitPlan(_part_of(plan, [], own), (position,), params, i, start, is_adamw=True)
            )
        start += len(group["params"])
    return plans


def _part_of(
    plan: StepPlan,
    units: list[Unit],
    adamw_positions: list[list[int]],
    adamw_parts: list[dict[Any, list[int]]] | None = None,
) -> StepPlan:
    """A plan of some units, which shares all settings with the whole one."""
    return StepPlan(
        plan.flat_params,
        plan.settings,
        plan.group_rules,
        plan.adamw_orders,
        plan.rules,
        plan.groups_of_rules,
        units,
        adamw_positions,
        stack_keys=plan.stack_keys,
        adamw_parts=adamw_parts,
    )


def _restore_entries(
    params: Iterable[Tensor], state: Any, before: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Leave no state behind that a refused step has allocated."""
    for p in params:
        if p not in before:
            state.pop(p, None)
        else:
            state[p].clear()
            state[p].update(before[p])


def _norm(G: Tensor) -> Tensor:
    """The norm of a gradient, at least in float32."""
    dtype = torch.float32 if G.dtype in LOW_PRECISION_DTYPES else None
    norm: Tensor = torch.linalg.vector_norm(G, dtype=dtype)
    return norm


def _can_train(p: Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


def _revive_hooks(p: Tensor) -> None:
    """Let a swapped parameter call its hooks again: they stayed with the tensor behind it."""
    hooks = p._post_accumulate_grad_hooks
    p._post_accumulate_grad_hooks = OrderedDict(hooks or {})


def _register(p: Tensor, hook: _Hook) -> RemovableHandle:
    """Hook a parameter, also one that is frozen or lazy and may train later."""
    with torch._C.DisableTorchFunctionSubclass():
        is_frozen = not p.requires_grad
        if is_frozen:
            p.requires_grad_(True)
        handle: RemovableHandle = p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        if is_frozen:
            p.requires_grad_(False)
        return handle


def _own_hooks(p: Tensor) -> list[_Hook]:
    """The hooks on a parameter that belong to a handle."""
    with torch._C.DisableTorchFunctionSubclass():
        hooks = p._post_accumulate_grad_hooks or {}
        return [hook for hook in hooks.values() if isinstance(hook, _Hook)]


def _averaged_later() -> set[int]:
    """Ids of the parameters whose gradients DistributedDataParallel averages over processes."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return set()
    if distributed.get_world_size() == 1:
        return set()
    from torch.nn.parallel import DistributedDataParallel

    # by type(): asking a proxy for its class may run other code
    wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    return {id(p) for wrapper in wrappers for p in wrapper.module.parameters()}


def _refuse_nested_pass(frame: FrameType | None, sharded: bool) -> None:
    """Raise inside of a backward pass that another one runs: its end is not that of all gradients.

    Raises:
        RuntimeError: Naming the one common case.
    """
    passes = 0
    while frame is not None:
        passes += frame.f_code is _engine_run_backward.__code__
        is_inside = frame.f_code is BackwardCFunction.apply.__code__ and (passes or not sharded)
        if is_inside or passes > 1:
            raise RuntimeError(
                "step_in_backward() cannot tell the end of a backward pass that runs inside of "
                "another one; pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        frame = frame.f_back
