"""Units: parameters that are updated together, and the allocation of their state.

A unit is a weight, one part of a weight that a view cuts, or several weights of a rule with several
members, such as a LoRA pair.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...kernels import basis_scales, blockwise_shape, fuses_passes
from .._core.rule import BlockPosition, Rule, Slot, Slots
from .._core.validation import check, naming, shown
from .._core.views import MatrixView, split_view
from .held_codes import NO_SCALE, place_of, scales_layout
from .layout import Layout, is_sharded, longest_dim, numel, part, resting_layout
from .norms import DRIVER_SLOTS, NormControl, control_of, driver_slots
from .param_groups import Part, Weight, describe, listed, plain_name
from .shard_plan import Placed, place, travelling
from .windows import drops_state
from .write_modes import mode_of, seed_of

MAX_STACKED_NUMEL = {"cpu": 2**15}
"""Largest matrix, in elements, that is stacked: for smaller ones fewer calls outweigh the copies.

``python bench/toolkit.py --only stack`` measures a limit. A larger limit would still help GaLore,
but stacks are copies, and ``kernels/reference/matmul.py`` needs a limit below 2**16.
"""
MAX_STACKED_NUMEL_ACCELERATOR = 2**22
MIN_TRANSPOSED_NUMEL = 2**16
"""Smallest state tensor, in entries, whose memory follows a transposed weight."""
QUANTIZED_DTYPES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, "momentum_buffer": torch.int8}
"""Moments that ``state_dtype="int8"`` quantizes, with their codes: signed, or roots of squares."""
MIN_QUANTIZED_NUMEL = 4096
"""Smallest state tensor, in entries, that is quantized.

Rows of fewer than 8 entries stay as they are too, see ``blockwise_shape``.
"""

ONLY_BLOCK = BlockPosition()
State = MutableMapping[Tensor, dict[str, Any]]


_SLAB_ROWS: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()


def slab_rows(slab: Tensor) -> list[Tensor]:
    """The rows of a slab; on the CPU each with a storage of its own over the slab's memory.

    Whatever saves, copies or pickles a tensor takes its whole storage along. Other devices cannot
    send a storage that begins inside an allocation to another process, so there all rows share one.
    """
    rows = list(slab.unbind(0))
    if slab.device.type == "cpu" and type(slab) is Tensor and slab.numel():
        start, size = slab.storage_offset() * slab.element_size(), rows[0].nbytes
        for k, row in enumerate(rows):
            begin = start + k * size
            row.set_(slab.untyped_storage()[begin : begin + size], 0, row.shape, row.stride())
            _SLAB_ROWS[row] = True
    return rows


def is_slab_row(X: Tensor) -> bool:
    """Whether X keeps more memory alive than its own, such as that of a whole slab."""
    return X in _SLAB_ROWS or X.untyped_storage().nbytes() > X.nbytes


class HeldMember(NamedTuple):
    """Of which whole parameter the tensor of a unit is a part.

    Attributes:
        layout: Layout of the parameter.
        view: View of the whole parameter.
        first: Number of the first matrix in that view.
    """

    layout: Layout
    view: MatrixView
    first: int


@dataclass(eq=False)
class Unit:
    """Parameters that are updated together.

    Attributes:
        group: Index of the parameter group.
        positions: Positions of the parameters in the optimizer's flat list.
        params: One parameter per member.
        views: Per member, how the parameter becomes matrices.
        transposed: Per member, whether the rule sees it transposed.
        number: Number of the MatrixView within the parameter, 0 where there is only one.
        slots: Per member, its slots.
        state_dtype: Dtype of state whose slot names none; None: float32, or float64.
        quantized: Whether moments and bases are kept in eight bits.
        bases: Names of the slots that are bases, see :attr:`Rule.bases`.
        stochastic_squares: Whether averages of squares in eight bits are rounded by random bits.
        block_position: The unit's block, for rules that drop state by blocks.
        shift: Updates by which refreshes come early, where they are staggered.
        name: Name that is the key of random draws; None where the position is.
        order: Position of the first parameter in the run that began with it: the key of draws by
            position, and what blocks and staggered refreshes are counted by.
        decay: Factor on the group's weight decay.
        rule: Index of the unit's rule in the plan.
        writes: Per member, how its weight is written, see ``write_modes.py``.
        write_indices: Per member, the key of its weight's random bits.
        seed: Seed of these bits.
        control: How the norm of the weights is steered; None: it is not.
        is_cautious: Whether they are, and decay cautiously.
        placed: How sharded weights are stepped; None for plain ones.
        held: Per member, what it is a part of, for a unit of what one process holds; else empty.
        float_slots: (member, slot) of state that stays in floats, because ranks cut its blocks.
        key: What units of one stack have in common, beside their rule.
    """

    group: int
    positions: tuple[int, ...]
    params: tuple[Tensor, ...]
    views: tuple[MatrixView, ...]
    transposed: tuple[bool, ...]
    number: int
    slots: tuple[Slots, ...]
    state_dtype: torch.dtype | None
    quantized: bool = False
    block_position: BlockPosition = ONLY_BLOCK
    shift: int = 0
    name: str | None = None
    order: int = 0
    decay: float = 1.0
    rule: int = 0
    writes: tuple[str, ...] = ()
    write_indices: tuple[int, ...] = ()
    seed: int = 0
    bases: frozenset[str] = frozenset()
    stochastic_squares: bool = False
    control: NormControl | None = None
    is_cautious: bool = False
    placed: Placed | None = None
    held: tuple[HeldMember, ...] = ()
    float_slots: frozenset[tuple[int, str]] = frozenset()
    key: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        p, view = self.params[0], self.views[0]
        self.tag = view.tag
        self.step_key, self.refreshed_key = "step" + view.tag, "refreshed" + view.tag
        self.state_since_key = "held" + view.tag
        self.clock_keys = (self.step_key, self.refreshed_key, self.state_since_key)
        # equal on all ranks, so that they make the same stacks
        self.numel = self.held[0].layout.largest if self.held else p.numel()
        self.stackable = (
            len(self.params) == 1
            and view.plain
            and self.numel <= MAX_STACKED_NUMEL.get(p.device.type, MAX_STACKED_NUMEL_ACCELERATOR)
        )
        self.key = (
            self.transposed,
            self.state_dtype,
            (
                *(self.quantized, self.float_slots, self.stochastic_squares),
                *(self.writes, self.seed, self.control, self.is_cautious, self._placing()),
            ),
            *(
                (p.shape, p.dtype, p.device, v.k, v.m, v.n)
                for p, v in zip(self.params, self.views, strict=True)
            ),
        )

    def _placing(self) -> Hashable:
        """What parts of sharded weights have in common to be stacked."""
        if not self.held:
            return None
        return self.placed and self.placed.key, tuple(part.layout for part in self.held)

    def sides(self, i: int) -> tuple[int, int]:
        """Rows and columns of the whole matrices of member i as the rule sees it."""
        view = self.held[i].view if self.held else self.views[i]
        return (view.n, view.m) if self.transposed[i] else (view.m, view.n)

    def held_sides(self, i: int) -> tuple[int, int]:
        """The same, of the part that this process holds."""
        view = self.views[i]
        return (view.n, view.m) if self.transposed[i] else (view.m, view.n)

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """One key of random draws per matrix: 63 bits of a hash of the name, or the position."""
        first = self.held[0].first if self.held else 0
        count = range(first, first + self.views[0].k)
        if self.name is not None:
            return tuple(hash63(f"{self.name}|{self.number}|{j}") for j in count)
        return tuple(self.order + (self.number << 20) + (j << 40) for j in count)

    def expected_state(self, i: int) -> dict[str, tuple[Slot, tuple[int, ...], torch.dtype]]:
        """Per state key of member i, its slot, stored shape and stored dtype."""
        p = self.params[i]
        table = {}
        for name, slot in self.slots[i].items():
            key, shape = self.key_of(i, name), self._shape(i, slot)
            scales = self._held_scales(i, name)
            stays = (i, name) in self.float_slots or scales is None
            codes = self._codes(name) or torch.int8
            table[key] = (slot, shape, self._dtype(slot, p) if stays else codes)
            if scales is not None:
                fill = NO_SCALE if stays else 0.0
                table[scale_of(key)] = (Slot("b", fill=fill, b=scales[-1]), scales, torch.float32)
        return table

    def key_of(self, i: int, name: str) -> str:
        """State key of a slot of member i."""
        return name if self.slots[i][name].axes == "mn" else name + self.tag

    def _shape(self, i: int, slot: Slot) -> tuple[int, ...]:
        """Shape of a state tensor, of which this is all that the unit holds."""
        if slot.axes == "mn":
            return tuple(self.params[i].shape)
        shape = slot.shape(*self.held_sides(i))
        return (self.views[i].k, *shape) if self._whole_view(i).k > 1 else shape

    def _whole_shape(self, i: int, slot: Slot) -> tuple[int, ...]:
        """Shape of a whole state tensor."""
        if not self.held:
            return self._shape(i, slot)
        if slot.axes == "mn":
            return self.held[i].layout.shape
        shape, k = slot.shape(*self.sides(i)), self._whole_view(i).k
        return (k, *shape) if k > 1 else shape

    def _whole_view(self, i: int) -> MatrixView:
        return self.held[i].view if self.held else self.views[i]

    def state_layout(self, i: int, key: str) -> Layout | None:
        """Layout of a state tensor of member i, None where the weight is plain.

        State shaped like the weight lies like it. Other state of a unit whose rule runs on parts
        of the weight is cut where its axes have the side that is cut; that of a unit that travels
        is cut along its longest axis. Scales lie like their codes.
        """
        if self.placed is None:
            return None
        for name in self.slots[i]:
            if self.key_of(i, name) == key:
                return self._layout_of(i, name)
        name = next(x for x in self.slots[i] if scale_of(self.key_of(i, x)) == key)
        return self._layout_of_scales(i, name)

    def _layout_of(self, i: int, name: str) -> Layout | None:
        """Layout of a slot of member i, for a unit of sharded weights."""
        assert self.placed is not None
        slot = self.slots[i][name]
        if slot.axes == "mn":
            return self.placed.layouts[i]
        if slot.device is not None:
            return None
        many = self._whole_view(i).k > 1
        return self.placed.resting_layout(i, slot.axes, self._whole_shape(i, slot), many)

    def _layout_of_scales(self, i: int, name: str) -> Layout:
        """Layout of the scales of a slot of member i, for a unit of sharded weights."""
        assert self.placed is not None
        layout, scales = self.placed.layouts[i], self.whole_scales(i, name)
        assert scales is not None
        if name in self.bases and self.placed.held is not None:  # every rank has all of them
            return resting_layout(layout, scales, None)
        codes = None if name in self.bases else self._layout_of(i, name)
        found = None if codes is None else scales_layout(codes, scales)
        if found is None:
            found = resting_layout(layout, scales, longest_dim(layout, scales))
        if (i, name) in self.float_slots and not all(map(numel, found.over(layout.axes).boxes)):
            return resting_layout(layout, scales, None)  # any rank must see that these are none
        return found

    def whole_scales(self, i: int, name: str) -> tuple[int, ...] | None:
        """Shape of the scales of a whole slot, None where it is too small for eight bits."""
        slot = self.slots[i][name]
        if not self.quantized or slot.dtype is not None or self._codes(name) is None:
            return None
        shape = self._whole_shape(i, slot)
        if math.prod(shape) < MIN_QUANTIZED_NUMEL:
            return None
        return basis_scales(shape) if name in self.bases else blockwise_shape(shape)

    def _held_scales(self, i: int, name: str) -> tuple[int, ...] | None:
        """The same of what the unit holds."""
        scales = self.whole_scales(i, name)
        if scales is None or not self.held:
            return scales
        return tuple(b - a for a, b in self._layout_of_scales(i, name).box)

    def scales_shape(self, i: int, name: str) -> tuple[int, ...] | None:
        """Shape of the scales of a slot of member i, None if it is not quantized."""
        return None if (i, name) in self.float_slots else self._held_scales(i, name)

    def crossed_slots(self) -> frozenset[tuple[int, str]]:
        """(member, slot) of state in eight bits whose blocks are cut by the ranks of its weight.

        State shaped like the weight lies like it, and has one form whatever the plan.
        """
        found = set[tuple[int, str]]()
        for i, slots in enumerate(self.slots):
            for name, slot in slots.items():
                scales = self.whole_scales(i, name)
                if scales is not None and slot.axes == "mn" and self.placed is not None:
                    if scales_layout(self.placed.layouts[i], scales) is None:
                        found.add((i, name))
        return frozenset(found)

    def rounds_squares(self, name: str) -> bool:
        """Whether a slot in eight bits is rounded by random bits."""
        return self.stochastic_squares and self._codes(name) == torch.uint8

    def places_of_codes(self, i: int, name: str) -> tuple[int, tuple[int, int, int] | None]:
        """Where codes lie in the whole tensor: the place of the first, and how places grow.

        The second is None where they are neighbours.
        """
        if not self.held:
            return 0, None
        layout, scales = self._layout_of(i, name), self.whole_scales(i, name)
        assert layout is not None and scales is not None
        place = place_of(layout, scales)
        assert place is not None
        return place[0], (0, place[1], 1)

    def dtype_of(self, i: int, name: str) -> torch.dtype:
        """Dtype of a slot of member i that is not quantized."""
        return self._dtype(self.slots[i][name], self.params[i])

    def _codes(self, name: str) -> torch.dtype | None:
        return torch.int8 if name in self.bases else QUANTIZED_DTYPES.get(name)

    def _dtype(self, slot: Slot, p: Tensor) -> torch.dtype:
        if slot.dtype == "weight":
            return p.dtype
        if isinstance(slot.dtype, torch.dtype):
            return slot.dtype
        full = torch.float64 if p.dtype == torch.float64 else torch.float32
        return full if slot.dtype == "full" else self.state_dtype or full

    def allocate(self, state: State, rule: Rule) -> int:
        """Allocate missing clocks and state from shapes alone; drop state outside its window.

        Returns:
            The update since which the unit keeps its state, 0 if it has none at its next update.

        Raises:
            ValueError: If a state tensor has another shape than the settings need.
        """
        first = state[self.params[0]]
        first.setdefault(self.step_key, 0)
        state_since = self._state_since(state, rule) if drops_state(rule) else 1
        if rule.refresh_interval:
            first.setdefault(self.refreshed_key, 0)
        for i, p in enumerate(self.params):
            table = self.expected_state(i)
            entry = state[p] if table else {}
            for key, (slot, shape, dtype) in table.items():
                if not state_since and base_of(key) not in DRIVER_SLOTS:
                    entry.pop(key, None)
                elif key not in entry:
                    entry[key] = self._initial(i, key, slot, shape, dtype)
                elif entry[key].shape != shape:
                    raise ValueError(
                        f"state {key!r} has shape {tuple(entry[key].shape)} but the settings of "
                        f"parameter group {self.group} need {shape}; load with the settings it was "
                        "saved with"
                    )
        return state_since

    def _initial(
        self, i: int, key: str, slot: Slot, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """State of member i before the first update."""
        layout, device = self.state_layout(i, key), self.params[i].device
        if layout is None:
            return _initial_state(slot, shape, dtype, device)
        fill = 0.0 if isinstance(slot.fill, str) else slot.fill
        return layout.full(fill, dtype, device, eye=slot.fill == "eye")

    def _state_since(self, state: State, rule: Rule) -> int:
        """The update since which a unit of a rule that drops state keeps its state.

        The rule decides it, unless the state began inside a window because settings changed. Any
        but the first update is stored beside the clocks, so that a resumed run knows it.
        """
        first = state[self.params[0]]
        present = first.get(self.state_since_key, 1) if self.has_state(state) else 0
        state_since = self.state_since_at(rule, present, first[self.step_key] + 1)
        first.pop(self.state_since_key, None)
        if state_since > 1 and self._has_slots:
            first[self.state_since_key] = state_since
        return state_since

    def has_state(self, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether there is more of its state than clocks and what rounding has cut off."""
        return any(
            self.key_of(i, name) in state.get(p, {})
            for i, p in enumerate(self.params)
            for name in self.slots[i].keys() - DRIVER_SLOTS
        )

    @cached_property
    def _has_slots(self) -> bool:
        """Whether the rule itself keeps state, beside what rounding cuts off."""
        return any(slots.keys() - DRIVER_SLOTS for slots in self.slots)

    def state_since_at(self, rule: Rule, state_since: int, t: int) -> int:
        """The value at update t of ``state_since`` (0: no state), given the present one."""
        start = rule.state_since_at(self.block_position, t)
        if not start or not self._has_slots:
            return start
        return t if start == t or not state_since else state_since

    @cached_property
    def positions_in_parameter(self) -> tuple[tuple[int, tuple[int, int, int]], ...]:
        """Per member, the place of its first entry in the parameter, and how places grow.

        Places are counted row by row in the parameter's own shape, along the matrices, rows and
        columns that the rule sees.
        """
        found = []
        for i in range(len(self.params)):
            _, strides, offset = self.layout(i)
            found.append((offset, strides))
        return tuple(found)

    def layout(self, i: int) -> tuple[tuple[int, ...], tuple[int, int, int], int]:
        """Shape, strides and offset of member i as the rule sees a contiguous parameter.

        Those of a part are in the whole parameter.
        """
        shape = self.held[i].layout.shape if self.held else self.params[i].shape
        whole = torch.empty(shape, dtype=torch.float32, device="meta")
        X = self.views[i].to_matrices(part(whole, self.held[i].layout.box) if self.held else whole)
        X = X.mT if self.transposed[i] else X
        step_k, step_m, step_n = X.stride()
        return tuple(X.shape), (step_k, step_m, step_n), int(X.storage_offset())

    def detach_from_slab(self, state: State) -> None:
        """Clone state out of slabs for a unit without a gradient: a row keeps its slab alive."""
        for p in self.params:
            entry = state.get(p, {})
            for key, value in entry.items():
                if isinstance(value, Tensor) and is_slab_row(value):
                    entry[key] = value.clone()

    def lies_as_weight(self, i: int, name: str) -> bool:
        """Whether a slot of one large matrix lies column by column, as a transposed weight does."""
        slot, p = self.slots[i][name], self.params[i]
        if not (slot.lies_as_weight and self.transposed[i] and p.is_cpu) or self.placed is not None:
            return False
        is_one = self.views[i].k == 1 and self.scales_shape(i, name) is None
        if not is_one or fuses_passes(p):  # kernels read moments row by row
            return False
        return math.prod(self._shape(i, slot)) >= MIN_TRANSPOSED_NUMEL

    def rule_view(self, i: int, name: str, tensor: Tensor) -> Tensor:
        """A stored state tensor as the rule sees it: (k, *axes)."""
        view = self.views[i]
        if self.slots[i][name].axes == "mn":
            X = view.to_matrices(tensor)
            return X.mT if self.transposed[i] else X
        return tensor if self._whole_view(i).k > 1 else tensor.unsqueeze(0)


def base_of(key: str) -> str:
    """A state key without the tag of a view."""
    return key.partition(".")[0]


def scale_of(key: str) -> str:
    """State key of the scales of quantized state."""
    name, dot, tag = key.partition(".")
    return f"{name}_scale{dot}{tag}"


def hash63(text: str) -> int:
    """The same 63 bits for a text in every process, unlike ``hash``."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _initial_state(
    slot: Slot, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if slot.fill == "eye":
        return torch.eye(shape[-2], shape[-1], dtype=dtype, device=device).expand(shape).clone()
    assert not isinstance(slot.fill, str)
    if slot.device is None:
        return torch.full(shape, slot.fill, dtype=dtype, device=device)
    return pinned(torch.full(shape, slot.fill, dtype=dtype, device=slot.device), device)


def pinned(X: Tensor, device: torch.device) -> Tensor:
    """X in pinned memory if a CUDA device is to read it from the host, else X itself."""
    return X.pin_memory() if device.type == "cuda" and not X.is_cuda else X


def views_of(view: str | Sequence[str], rule: Rule, count: int = 0) -> list[str]:
    """One view per member of the rule; ``count`` members if the rule does not fix their number."""
    count = len(rule.members) or count
    views = [view] * count if isinstance(view, str) else list(view)
    if len(views) != count:
        raise ValueError(
            f"view must be one string, or one for each of {', '.join(rule.members)}, got {view!r}"
        )
    return views


def refuse_vector(p: Tensor, text: str, method: str) -> None:
    """Raise for a parameter that is no matrix; ``text`` names it."""
    raise ValueError(
        f"{text} has shape {tuple(p.shape)} but rule {method!r} needs matrices; move it to a group "
        "with rule='adamw' (flattened weights, as DeepSpeed ZeRO and FSDP1 make, are no matrices)"
    )


def units_of(group_index: int, group: Mapping[str, Any], part: Part) -> list[Unit]:
    """Units of one part of a group: runs of ``len(rule.members)`` weights, each cut by its view.

    Args:
        group_index: Index of the group.
        group: The group.
        part: Weights of the group that have a rule and a view in common.

    Raises:
        ValueError: If the weights cannot be cut into runs, or a view does not fit.
    """
    rule, weights = part.rule, part.weights
    for w in weights:  # a list of rules, written or loaded, may give a rule what is no matrix
        if w.param.ndim < 2 or w.param.numel() == 0:
            refuse_vector(w.param, describe(w.name, w.param, w.position), rule.method())
    size = len(rule.members) or max(1, len(weights))
    if len(weights) % size:
        raise ValueError(
            f"{rule.method()} takes parameters in runs of {size} "
            f"({', '.join(rule.members)}), got {len(weights)}"
        )
    views = views_of(part.view, rule, size)
    units = []
    for start in range(0, len(weights), size):
        run = weights[start : start + size]
        texts = [describe(w.name, w.param, w.position) for w in run]
        views_of_params = []
        for view, w, text in zip(views, run, texts, strict=True):
            with naming(text):
                views_of_params.append(split_view(view, tuple(w.param.shape)))
        if size > 1 and any(len(cut) > 1 for cut in views_of_params):
            raise ValueError(f"view {views} cuts a parameter, which {size} members cannot follow")
        refuse_parts(group, [len(cut) for cut in views_of_params], texts)
        for number, unit_views in enumerate(zip(*views_of_params, strict=True)):
            if size > 1:
                with naming(f"view {shown(part.view)} of {' and '.join(texts)}"):
                    rule.check_members([(v.k, v.m, v.n) for v in unit_views])
            units.append(_unit(group_index, group, rule, run, unit_views, number))
        if any(is_sharded(w.param) for w in run):
            _place_units(units[-len(views_of_params[0]) :], group, rule, texts, views)
    return units


def _place_units(
    units: Sequence[Unit],
    group: Mapping[str, Any],
    rule: Rule,
    texts: Sequence[str],
    views: Sequence[str],
) -> None:
    """Say where the units of one run, of which some parameter is sharded, are worked on."""
    choice, spread = group.get("plan", "auto"), bool(group.get("spread_replicas"))
    placed = [place(unit, rule, texts, views, len(units), choice, spread) for unit in units]
    control = units[-1].control
    spans = control is not None and control.is_whole
    divided = spans and any("k" in letters for x in placed for letters in x.cut)
    # a parameter travels whole, or not at all
    if divided or any(x.held is None for x in placed):
        placed = [travelling(x) for x in placed]
    for unit, x in zip(units, placed, strict=True):
        unit.placed = x
        unit.float_slots = unit.crossed_slots()


def refuse_parts(group: Mapping[str, Any], counts: Sequence[int], texts: Sequence[str]) -> None:
    """Raise where one norm of a whole parameter is wanted, and a view cuts it into parts."""
    control = control_of(group)
    for count, text in zip(counts, texts, strict=True):
        check(
            count == 1 or control is None or not control.is_whole,
            f"{text} is cut into {count} parts by its view, which are stepped one by one; leave "
            f"':whole' out of weight_norm={shown(group.get('weight_norm'))}",
        )


def _unit(
    group_index: int,
    group: Mapping[str, Any],
    rule: Rule,
    run: Sequence[Weight],
    views: tuple[MatrixView, ...],
    number: int,
) -> Unit:
    """The unit of one matrix view of each weight of a run."""
    transposed = rule.transposed_members([(v.m, v.n) for v in views])
    sides = tuple(
        (v.n, v.m) if is_transposed else (v.m, v.n)
        for v, is_transposed in zip(views, transposed, strict=True)
    )
    control = control_of(group)
    name, quantized = group["state_dtype"], group["state_dtype"] == "int8"
    first, writes = run[0], tuple(mode_of(group, w.param) for w in run)
    order = listed(group, "positions", first.place)
    draws_by_name = group.get("draws") == "name" and first.name is not None
    return Unit(
        group_index,
        tuple(w.position for w in run),
        tuple(w.param for w in run),
        views,
        transposed,
        number,
        driver_slots(rule.slots(sides), writes, control, transposed),
        None if name is None or quantized else getattr(torch, name),
        quantized,
        name=plain_name(first.name or "") if draws_by_name else None,
        order=first.position if order is None else order,
        decay=_decay_factor(group, run),
        writes=writes,
        write_indices=tuple(parameter_index(group, w.place, w.position, w.name) for w in run),
        seed=seed_of(group),
        bases=rule.bases,
        stochastic_squares=not group.get("compat"),
        control=control,
        is_cautious=control is not None and bool(group.get("cautious")),
    )


def parameter_index(group: Mapping[str, Any], place: int, position: int, name: str | None) -> int:
    """63 bits that are the key of a parameter's draws: a hash of its name, or its position.

    Args:
        group: The group.
        place: Number of the parameter in the group.
        position: Flat position of the parameter.
        name: Its name, None if it has none.
    """
    if group.get("draws") == "name" and name is not None:
        return hash63(plain_name(name))
    order: int | None = listed(group, "positions", place)
    return position if order is None else order


def _decay_factor(group: Mapping[str, Any], run: Sequence[Weight]) -> float:
    """The factor on the group's weight decay that the weights of a unit have in common."""
    factors = {1.0 if (x := listed(group, "decays", w.place)) is None else x for w in run}
    if len(factors) > 1:
        raise ValueError(
            f"decays of a parameter group must be equal for weights that are stepped together, "
            f"got {sorted(factors)}"
        )
    return factors.pop()
