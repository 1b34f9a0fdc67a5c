"""Buckets of equal units, and the plan of a step.

A bucket holds units of equal shape and equal clocks. Small plain matrices run as one stack, every
other unit is a bucket of its own on views of the live tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import (
    Rounding,
    dequantize_basis,
    dequantize_blocks,
    fuses_passes,
    parameter_keys,
    quantize_basis,
    quantize_blocks,
    rounding_keys,
)
from .._core.rule import LOCAL_REDUCTIONS, Member, Reductions, Rule
from .adamw import EntryCache
from .norms import DRIVER_SLOTS, driver_slots
from .units import State, Unit, hash63, is_slab_row, scale_of, slab_rows
from .windows import block_labels_of, drops_state
from .write_modes import REFRESH_WRITE, RESIDUAL, takes_flags

if TYPE_CHECKING:
    from .shards import Shards

MAX_STACK_BYTES = {"cpu": 64 * 2**20}
"""Largest stack of weights in bytes: a stack is a copy, and must not cost what low rank saves."""
MAX_STACK_BYTES_ACCELERATOR = 512 * 2**20
STACK_SETTINGS = ("maximize", "nonfinite", "capturable")
"""Group keys, beside rule and state, in which units of one stack agree."""


def max_stack_bytes(device: torch.device) -> int:
    """Byte budget of one stack on this device."""
    return MAX_STACK_BYTES.get(device.type, MAX_STACK_BYTES_ACCELERATOR)


def max_abs(X: Tensor) -> Tensor:
    """The largest magnitude, NaN if X has one; in one pass without a temporary of X's size."""
    low, high = torch.aminmax(X)
    return torch.maximum(-low, high)


class LiveWeight:
    """Loads the weights of one member within one step, of a view only once.

    A step is too short for other code to give the parameter other memory; between steps no view is
    kept.
    """

    __slots__ = ("_bucket", "_i", "_is_view", "_view")

    def __init__(self, bucket: Bucket, i: int) -> None:
        self._bucket, self._i = bucket, i
        self._is_view = bucket.unit.views[i].plain and not bucket.stacked
        self._view: Tensor | None = None

    def __call__(self) -> Tensor:
        """What :meth:`Bucket.load` returns."""
        if self._view is not None:
            return self._view
        W = self._bucket.load(self._i)
        if self._is_view:  # a copy would not follow the weight
            self._view = W
        return W


@dataclass(eq=False)
class Bucket:
    """Units of equal shape and clocks, run as one stack, or one unit run on views.

    Attributes:
        units: K > 1 units of a stack, or one unit.
        group: Index of the first unit's group.
        spans: Whether units have groups, and so learning rates or decays, of their own.
        present: Per member, whether it has a gradient.
        state_since: The update since which the units keep their state, 0 if they keep none.
        states: Per member, slot name -> (K, *axes).
        quantized: Per member, slot name -> codes (K, *axes) and scales, for state in eight bits.
        owners: (parameter, its state dict), to notice a dict that other code has replaced.
        bindings: (state dict, key, tensor) of every live state tensor, to notice a tensor that
            other code has replaced.
        addresses: Per binding of a stack its address on the CPU, to notice rows that another
            process was sent and that left their slab by that.
        clock_dicts: Per unit, the state dict that holds its clocks.
        reductions: Per member, what completes sums over a weight of which this process holds a
            part; None where it holds all.
        nonzero_positions: Positions of parameters whose gradient is somewhere not 0, where this
            process sees parts of gradients; None where it sees all.
        has_radius: Whether all radii that are kept are known to be measured, or measurable.
    """

    units: list[Unit]
    present: tuple[bool, ...]
    state_since: int = 1
    states: list[dict[str, Tensor]] = field(default_factory=list)
    quantized: list[dict[str, tuple[Tensor, Tensor]]] = field(default_factory=list)
    owners: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    bindings: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    clock_dicts: list[dict[str, Any]] = field(default_factory=list)
    reductions: Sequence[Reductions] | None = None
    nonzero_positions: Set[int] | None = None
    has_radius: bool = False

    def __post_init__(self) -> None:
        unit = self.units[0]
        self.unit, self.group, self.stacked = unit, unit.group, len(self.units) > 1
        self.spans = len({(u.group, u.decay) for u in self.units}) > 1
        self.indices = tuple(index for unit in self.units for index in unit.indices)
        double = unit.params[0].dtype == torch.float64
        self.dtype = torch.float64 if double else torch.float32
        members = range(len(unit.params))
        self.params_by_member = [[u.params[i] for u in self.units] for i in members]
        self.positions = [[u.positions[i] for u in self.units] for i in members]
        self.groups = {u.group for u in self.units}

    def bind_state(self, state: State) -> None:
        """Bind the live state: slabs for a stack, views otherwise."""
        self.clock_dicts = [state[u.params[0]] for u in self.units]
        for i, slots in enumerate(self.unit.slots):
            member_state: dict[str, Tensor] = {}
            quantized: dict[str, tuple[Tensor, Tensor]] = {}
            entries = [state[p] for p in self.params_by_member[i]] if slots else []
            for name in slots if self.state_since else slots.keys() & DRIVER_SLOTS:
                key = self.unit.key_of(i, name)
                lies_as_weight = self.unit.lies_as_weight(i, name)
                stored = self._bind_slot(key, entries, lies_as_weight)
                if self.unit.scales_shape(i, name) is None:
                    member_state[name] = self._rule_view(i, name, stored)
                else:
                    quantized[name] = stored, self._bind_slot(scale_of(key), entries)
            self.states.append(member_state)
            self.quantized.append(quantized)
            if slots or i == 0:
                self.owners += [(p, state[p]) for p in self.params_by_member[i]]

    def _bind_slot(
        self, key: str, entries: list[dict[str, Any]], lies_as_weight: bool = False
    ) -> Tensor:
        """The stored tensors as one (K, ...): a slab for a stack."""
        if not self.stacked:
            tensor: Tensor = entries[0][key]
            if is_slab_row(tensor):
                entries[0][key] = tensor = tensor.clone()
            if lies_as_weight and not tensor.mT.is_contiguous():
                entries[0][key] = tensor = tensor.mT.contiguous().mT
            self.bindings.append((entries[0], key, tensor))
            return tensor.unsqueeze(0)
        slab = torch.stack([entry[key] for entry in entries])
        for entry, row in zip(entries, slab_rows(slab), strict=True):
            entry[key] = row
            self.bindings.append((entry, key, row))
            self.addresses.append(row.data_ptr() if is_slab_row(row) else 0)
        return slab

    def _rule_view(self, i: int, name: str, stored: Tensor) -> Tensor:
        """Stored tensors (K, ...) transposed and cut as the rule sees them."""
        if len(self.units) == 1:
            return self.unit.rule_view(i, name, stored[0])
        like = self.unit.slots[i][name].axes == "mn"
        return stored.mT if like and self.unit.transposed[i] else stored

    def dequantized(self) -> list[dict[str, Tensor]]:
        """Per member, the quantized state as (K, ...) floats."""
        bases = self.unit.bases
        return [
            {
                name: (dequantize_basis if name in bases else dequantize_blocks)(*pair, self.dtype)
                for name, pair in quantized.items()
            }
            for quantized in self.quantized
        ]

    def quantize(self, dequantized: Sequence[Mapping[str, Tensor]], t: int) -> None:
        """Quantize and store what update t has made of ``dequantized()``, but for bases."""
        for i, (quantized, plain) in enumerate(zip(self.quantized, dequantized, strict=True)):
            for name in plain.keys() - self.unit.bases:
                codes, scales = quantized[name]
                rounding = None
                if self.unit.rounds_squares(name):
                    slot = hash63(self.unit.key_of(i, name))  # a parameter's slots differ
                    keys = rounding_keys(self._parameter_keys[i] ^ slot, t)
                    rounding = Rounding(keys, *self.unit.places_of_codes(i, name))
                quantize_blocks(plain[name], codes, scales, rounding)

    def quantize_bases(self, dequantized: Sequence[Mapping[str, Tensor]]) -> None:
        """Store the bases that a refresh made, which become what is left of them in 8 bits."""
        for quantized, plain in zip(self.quantized, dequantized, strict=True):
            for name in plain.keys() & self.unit.bases:
                quantize_basis(plain[name], *quantized[name])
                plain[name].copy_(dequantize_basis(*quantized[name], self.dtype))

    def clocks(self) -> tuple[int, int]:
        """Number of the next update, and of the last refresh (0: none)."""
        entry = self.clock_dicts[0]
        return entry[self.unit.step_key] + 1, entry.get(self.unit.refreshed_key, 0)

    def set_step(self, t: int) -> None:
        """Record that all units have made update t."""
        key = self.unit.step_key  # that of every unit: a stack is made of whole parameters
        for entry in self.clock_dicts:
            entry[key] = t

    def set_refreshed(self, t: int) -> None:
        """Record that all units were refreshed at update t."""
        for unit, entry in zip(self.units, self.clock_dicts, strict=True):
            entry[unit.refreshed_key] = t

    def rounding(self, i: int, t: int | Tensor, number: int) -> Rounding | None:
        """How member i is rounded; None: to nearest.

        Args:
            i: The member.
            t: Number of the update; a tensor with one element on the device serves too.
            number: Number of the write within the update.
        """
        mode = self.unit.writes[i]
        if mode == "nearest":
            return None
        offset, strides = self.unit.positions_in_parameter[i]
        strides = (0, *strides[1:]) if self.stacked else strides
        if isinstance(t, Tensor):
            t = t.reshape(1).to(torch.int64)
        keys = rounding_keys(self._parameter_keys[i], t, number)
        residual = self.states[i][RESIDUAL] if mode == "kahan" else None
        error = None
        if mode == "eco":
            shape = (len(self.indices), *self.unit.held_sides(i))
            error = torch.zeros(shape, dtype=torch.float32, device=keys.device)
        return Rounding(keys, offset, strides, residual, error)

    @cached_property
    def _parameter_keys(self) -> list[Tensor]:
        """Per member, the keys of random bits that last: one for each parameter."""
        return [
            parameter_keys(self.unit.seed, [u.write_indices[i] for u in self.units], p.device)
            for i, p in enumerate(self.unit.params)
        ]

    def nonzero(self, Gs: Sequence[Tensor | None], j: int) -> bool:
        """Whether some gradient of unit j is not all zero, and all are finite."""
        if self.nonzero_positions is not None:  # and what is not finite was found before
            return not self.nonzero_positions.isdisjoint(self.units[j].positions)
        parts = [max_abs(G[j] if self.stacked else G) for G in Gs if G is not None]
        return any(map(bool, parts)) and all(bool(part.isfinite()) for part in parts)

    def prepare_grads(
        self,
        Gs: Sequence[Tensor | None],
        maximize: bool,
        finite: Tensor | None,
        unmasked: bool = False,
    ) -> list[Tensor | None]:
        """Gradients as the rule takes them: precise enough, transposed, zero where not finite.

        Args:
            Gs: Per member (K, m, n) as they were given, or None.
            maximize: Whether to negate them.
            finite: None, or flags (K,) on the device.
            unmasked: Whether the rule takes the flags itself. Gradients then keep their dtype and
                values, unless state is as narrow as the gradient itself.
        """
        return [
            None if G is None else self._prepare_grad(i, G, maximize, finite, unmasked)
            for i, G in enumerate(Gs)
        ]

    def _prepare_grad(
        self, i: int, G: Tensor, maximize: bool, finite: Tensor | None, unmasked: bool
    ) -> Tensor:
        """The gradient of member i as ``prepare_grads`` returns it."""
        G = G if unmasked and self._state_is_full_precision else G.to(self.dtype)
        if maximize:
            G = -G
        if finite is not None and not unmasked:
            G = torch.where(
                finite.view(-1, 1, 1), G, torch.zeros((), dtype=G.dtype, device=G.device)
            )
        return G.mT if self.unit.transposed[i] else G

    def runs_on_kernels(self, Gs: Sequence[Tensor | None]) -> bool:
        """Whether kernels pass over these gradients, and all state is theirs to keep."""
        grads_on_kernels = all(G is None or fuses_passes(G) for G in Gs)
        return grads_on_kernels and not any(self.quantized) and takes_flags(self.unit.writes)

    @cached_property
    def _state_is_full_precision(self) -> bool:
        """Whether no state has a dtype narrower than float32."""
        tensors = [X for X in self._state_tensors() if X.is_floating_point()]
        tensors = [X for X in tensors if all(X is not s.get(RESIDUAL) for s in self.states)]
        return all(X.dtype.itemsize >= 4 for X in tensors)

    def clone_state(self) -> list[Tensor]:
        """Copies of all state, for units whose flags arrive after the update."""
        return [X.clone() for X in self._state_tensors()]

    def _state_tensors(self) -> list[Tensor]:
        plain = [X for member_state in self.states for X in member_state.values()]
        return plain + [
            X for quantized in self.quantized for pair in quantized.values() for X in pair
        ]

    def restore(self, saved: list[Tensor], finite: Tensor) -> None:
        """Put back the state of units whose flag is False, from ``clone_state``."""
        for X, old in zip(self._state_tensors(), saved, strict=True):
            X.copy_(torch.where(finite.to(X.device).view(-1, *[1] * (X.dim() - 1)), X, old))

    def is_current(self, state: State) -> bool:
        """Whether the optimizer's state still holds the dicts and tensors of this bucket."""
        for p, owned in self.owners:
            if state.get(p) is not owned:
                return False
        return self.holds_its_tensors()

    def holds_its_tensors(self) -> bool:
        """Whether the dicts of this bucket still hold its tensors, and clocks that agree."""
        for entry, key, tensor in self.bindings:
            if entry.get(key) is not tensor:
                return False
        for (_, _, tensor), address in zip(self.bindings, self.addresses, strict=False):
            if address and tensor.data_ptr() != address:
                return False
        # clocks that other code has set: the units are sorted anew, or refused
        first, count = self.clock_dicts[0], len(self.clock_dicts)
        for key in (self.unit.step_key, self.unit.refreshed_key):
            if key not in first:
                continue
            t = first[key]
            if type(t) is not int or not 0 <= t <= first[self.unit.step_key]:
                return False
            try:
                if [entry[key] for entry in self.clock_dicts] != [t] * count:
                    return False
            except KeyError:
                return False
        return self.unit.step_key in first

    def grads_of(self, i: int, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Gradients of member i, one per unit."""
        present_grads = [G for k in self.positions[i] if (G := grads[k]) is not None]
        expected_shape, shape = self.unit.key[3 + i][0], present_grads[0].shape
        if shape != expected_shape:
            raise RuntimeError(
                f"parameter of shape {tuple(expected_shape)} changed its shape to {tuple(shape)}; "
                "build the optimizer after the model is wrapped"
            )
        return present_grads

    def gradient(self, i: int, grads: Sequence[Tensor | None]) -> Tensor:
        """Gradients of member i as (K, m, n), not yet transposed, in their own dtype."""
        present_grads = self.grads_of(i, grads)
        return (
            torch.stack(present_grads)
            if self.stacked
            else self.unit.views[i].to_matrices(present_grads[0])
        )

    def load(self, i: int) -> Tensor:
        """Weights of member i (K, m, n) as the rule sees them: a copy for a stack, else a view."""
        W = (
            torch.stack(self.params_by_member[i])
            if self.stacked
            else self.unit.views[i].to_matrices(self.unit.params[i].detach())
        )
        return W.mT if self.unit.transposed[i] else W

    def weight_list(self, i: int) -> list[Tensor]:
        """The live weights of member i as K matrices (m, n), for kernels that write to a list.

        Empty where ``load`` serves as well: for a single unit, and where no kernels run.
        """
        if not self.stacked or not fuses_passes(self.params_by_member[i]):
            return []
        Ws = [p.detach() for p in self.params_by_member[i]]
        return [W.mT for W in Ws] if self.unit.transposed[i] else Ws

    def store(self, i: int, W: Tensor) -> None:
        """Copy the weights of member i back where ``load`` made a copy, and no view."""
        if not self.stacked and self.unit.views[i].plain:
            return
        W = W.mT if self.unit.transposed[i] else W
        if self.stacked:
            params = self.params_by_member[i]
            if W.device.type == "cpu":  # a list of views would cost as much as the copies
                sizes = [W.shape[1]] * len(params)
                torch.split_with_sizes_copy(W.flatten(0, 1), sizes, out=params)
            else:
                torch._foreach_copy_(params, list(W.unbind(0)))
            return
        p = self.unit.params[i]
        if W.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
            p.copy_(self.unit.views[i].from_matrices(W, p.shape))

    def single(self, j: int) -> Bucket:
        """Unit j of a stack as a bucket of its own, on rows of the live slabs."""
        bucket = Bucket([self.units[j]], self.present, self.state_since)
        bucket.clock_dicts = [self.clock_dicts[j]]
        bucket.reductions, bucket.nonzero_positions = self.reductions, self.nonzero_positions
        bucket.states = [
            {name: X[j : j + 1] for name, X in member_state.items()} for member_state in self.states
        ]
        bucket.quantized = [
            {
                name: (codes[j : j + 1], scales[j : j + 1])
                for name, (codes, scales) in quantized.items()
            }
            for quantized in self.quantized
        ]
        return bucket

    def members(
        self,
        grads: Sequence[Tensor | None],
        dequantized: Sequence[Mapping[str, Tensor]],
        t: int,
        refreshed: int,
        finite: Tensor | None = None,
        writes: bool = False,
        clocks: tuple[Tensor, Tensor] | None = None,
    ) -> list[Member]:
        """The arguments of ``refresh`` and ``update``.

        Args:
            grads: What ``prepare_grads`` returned.
            dequantized: What ``dequantized()`` returned.
            t: Number of this update.
            refreshed: Number of the last refresh, 0 if there was none.
            finite: None, or flags of the units for a rule that takes them itself.
            writes: Whether ``refresh`` writes weights.
            clocks: None, or the clocks of :meth:`Member.count`.
        """
        members, reductions = [], self.reductions
        for i, G in enumerate(grads):
            m, n = self.unit.sides(i)
            load = LiveWeight(self, i)
            K = len(self.indices)  # all matrices of one parameter share its flag
            state = {name: X for name, X in self.states[i].items() if name not in DRIVER_SLOTS}
            state.update((name, self._rule_view(i, name, X)) for name, X in dequantized[i].items())
            members.append(
                Member(
                    G,
                    load,
                    state,
                    t=t,
                    refreshed=refreshed,
                    m=m,
                    n=n,
                    indices=self.indices,
                    state_since=self.state_since,
                    number=i,
                    transposed=self.unit.transposed[i],
                    reductions=LOCAL_REDUCTIONS if reductions is None else reductions[i],
                    store=partial(self.store, i),
                    finite=finite if finite is None else finite.expand(K),
                    rounding=self.rounding(i, t, REFRESH_WRITE) if writes else None,
                    carries_errors=self.unit.writes[i] == "eco",
                    clocks=clocks,
                )
            )
        return members


def buckets_of(
    units: Iterable[Unit],
    mask: Sequence[bool] | Mapping[int, bool],
    state: State,
    rules: Sequence[Rule],
    stack_keys: Sequence[Hashable],
    old: Sequence[Bucket] = (),
) -> list[Bucket]:
    """Allocate the state of every present unit and sort the units into buckets.

    Args:
        units: All units.
        mask: By position, whether a parameter of these units has a gradient.
        state: The optimizer's state.
        rules: Rules, by ``Unit.rule``.
        stack_keys: Per rule, what units of one stack must have in common.
        old: Buckets of the plan so far; one with the same units keeps its slabs.
    """
    sorted_units: dict[tuple[Any, ...], list[Unit]] = {}
    for unit in units:
        present = tuple(mask[i] for i in unit.positions)
        if not any(present):
            unit.detach_from_slab(state)
            continue
        rule = rules[unit.rule]
        state_since = unit.allocate(state, rule)
        first = state[unit.params[0]]
        clocks = (first[unit.step_key], first.get(unit.refreshed_key, 0))
        stacks = unit.stackable and not rule.writes_in_refresh
        if rule.needs_own_strides and not unit.params[0].is_contiguous():
            stacks = False
        own_bucket = () if stacks else (id(unit),)
        key = (present, state_since, *clocks, stack_keys[unit.rule], unit.shift, *unit.key)
        sorted_units.setdefault((*key, *own_bucket), []).append(unit)
    buckets = []
    for key, members in sorted_units.items():
        p = members[0].params[0]
        bytes_of_one = max(1, members[0].numel * p.element_size())
        size = max(1, max_stack_bytes(p.device) // bytes_of_one)
        buckets += [
            Bucket(members[i : i + size], key[0], key[1]) for i in range(0, len(members), size)
        ]
    old_stacks = {tuple(map(id, bucket.units)): bucket for bucket in old if bucket.stacked}
    for j, bucket in enumerate(buckets):
        previous = old_stacks.get(tuple(map(id, bucket.units)))
        same_kind = previous and (previous.present, previous.state_since) == (
            bucket.present,
            bucket.state_since,
        )
        if previous is not None and same_kind and previous.is_current(state):
            buckets[j] = previous
        else:
            bucket.bind_state(state)
    return buckets


def _hashable(rule: Rule) -> Hashable:
    """The rule itself, or its text where a field is a list."""
    try:
        hash(rule)
    except TypeError:
        return repr(rule)
    return rule


@dataclass(eq=False)
class StepPlan:
    """Rules, units and buckets of a step, for one set of present gradients and of clocks.

    Attributes:
        flat_params: All parameters, group after group.
        settings: Per group, what its rules and units were made from.
        group_rules: Per group, its own rule; None for an AdamW group.
        adamw_orders: Per group, the order of AdamW's steps, see :meth:`Rule.adamw_order`.
        rules: Rule of every part of a group, by ``Unit.rule``.
        groups_of_rules: Per rule, the index of its group.
        units: All units.
        adamw_positions: Per group, flat positions of its AdamW parameters.
        lazy_params: Parameters that have no shape yet and take part once they have one.
        stack_keys: Per rule, what units of one stack must have in common: rule and flags.
        mask: Per parameter, whether it had a gradient when ``buckets`` was made; None forces the
            next step to make buckets anew.
        buckets: Units with a gradient, sorted.
        entries: State of all parameters when ``buckets`` was made, to notice a replaced dict.
        signature: Dtypes, shapes and devices of weights and gradients that the last step has
            checked, see :func:`check_ready`.
        adamw_parts: What ``finite.py`` knows of the AdamW parameters, made at the first step.
        adamw_entries: State of AdamW parameters, as long as nobody replaces it.
        shards: What is sharded; None where all parameters are plain.
    """

    flat_params: list[Tensor]
    settings: list[dict[str, Any]]
    group_rules: list[Rule | None]
    adamw_orders: list[tuple[bool, float] | None]
    rules: list[Rule] = field(default_factory=list)
    groups_of_rules: list[int] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    adamw_positions: list[list[int]] = field(default_factory=list)
    lazy_params: list[Tensor] = field(default_factory=list)
    stack_keys: list[Hashable] = field(default_factory=list)
    mask: list[bool] | None = None
    buckets: list[Bucket] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    signature: Any = None
    adamw_parts: list[dict[Any, list[int]]] | None = None
    adamw_entries: EntryCache = field(default_factory=EntryCache)
    shards: Shards | None = None

    def rule(self, of: Unit | Bucket) -> Rule:
        """The rule of a unit, or of all units of a bucket."""
        return self.rules[of.unit.rule if isinstance(of, Bucket) else of.rule]

    def is_stale(self, mask: list[bool], state: State) -> bool:
        """Whether the buckets no longer fit the present gradients or the optimizer's state."""
        return (
            self.mask != mask
            or len(state) != len(self.entries)
            or not all(map(is_, state.values(), self.entries))
            or not all(bucket.holds_its_tensors() for bucket in self.buckets)
            or not (self.shards is None or self.shards.holds_its_tensors())
            or any(self.state_window_changed(bucket) for bucket in self.buckets)
        )

    def state_window_changed(self, bucket: Bucket) -> bool:
        """Whether a window began in which some unit gains or loses its state."""
        rule = self.rule(bucket)
        if not drops_state(rule):
            return False
        t = bucket.clock_dicts[0][bucket.unit.step_key] + 1
        return any(
            unit.state_since_at(rule, bucket.state_since, t) != bucket.state_since
            for unit in bucket.units
        )

    def rebuild(self, mask: list[bool], state: State) -> None:
        """Sort the present units into buckets, allocating what they need."""
        units = self.units
        if self.shards is not None:
            units = [unit for unit in units if unit.placed is None]
        self.buckets = buckets_of(units, mask, state, self.rules, self.stack_keys, self.buckets)
        self.mask, self.entries = mask, [*state.values()]

    def set_stack_keys(self) -> None:
        """Number equal rules alike, so that units of several groups can run as one stack."""
        numbers: dict[Hashable, int] = {}
        keys: list[Hashable] = []
        for rule, group in zip(self.rules, self.groups_of_rules, strict=True):
            flags = tuple(self.settings[group][name] for name in STACK_SETTINGS)
            keys.append(numbers.setdefault((*flags, _hashable(rule)), len(numbers)))
        if keys != self.stack_keys:
            self.stack_keys, self.mask = keys, None

    def update_rules(self, group: int, rule: Rule, settings: Mapping[str, Any]) -> bool:
        """Give a group's rules other values; False, and nothing done, if units would change.

        Args:
            group: Index of the group.
            rule: The group's rule with the new values.
            settings: The group.
        """
        indices = [i for i, owner in enumerate(self.groups_of_rules) if owner == group]
        new_rules = dict.fromkeys(indices, rule)
        if settings.get("sides"):  # a part keeps the side that the model gave it
            new_rules = {i: replace(rule, **{"side": self.rules[i].side}) for i in indices}  # type: ignore[attr-defined]
        if not all(self._fits(i, new_rules[i], settings) for i in indices):
            return False
        for i in indices:
            self.rules[i] = new_rules[i]
        return True

    def _fits(self, index: int, rule: Rule, settings: Mapping[str, Any]) -> bool:
        """Whether the units of a rule stay as they are under its new values."""
        previous = self.rules[index]
        if previous.members != rule.members:
            return False
        if drops_state(rule) and block_labels_of(settings, rule) != block_labels_of(
            settings, previous
        ):
            return False
        if previous.refresh_interval != rule.refresh_interval and settings["stagger"]:
            return False
        for unit in self.units:
            if unit.rule != index:
                continue
            sides = tuple(unit.sides(i) for i in range(len(unit.params)))
            transposed = rule.transposed_members([(v.m, v.n) for v in unit.views])
            slots = driver_slots(rule.slots(sides), unit.writes, unit.control, transposed)
            if transposed != unit.transposed or slots != unit.slots:
                return False
        return True
