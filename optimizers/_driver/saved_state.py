"""What the saved or present state of a parameter must be: clocks, layouts, shapes, dtypes, values.

Every check names the parameter and the key, and none changes anything.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.rule import Rule
from .layout import PLAIN, Layout, is_sharded, layout_of, local
from .norms import DRIVER_SLOTS, RADIUS
from .units import Unit, base_of
from .windows import drops_state
from .write_modes import RESIDUAL

CLOCKS = ("step", "refreshed", "held")
MAX_CLOCK = 2**31 - 1
"""Largest clock: counters of the state are int32."""
SUMS = frozenset(("exp_avg_sq", "grad_norm", "seen"))
"""Sums of squares and norms that may be infinite, by their names without the view's tag.

Gradients above 1e19 make them so, here and in ``torch.optim.AdamW``.
"""
BOUNDED_SUMS = frozenset(("exp_avg_sq_row", "exp_avg_sq_col", "second_moment", "row_second_moment"))
"""Averages of squares that no gradient makes infinite: such an average would become NaN."""
NONNEGATIVE = SUMS | BOUNDED_SUMS | {"energy", "age", "count", "frozen", "due"}
"""State that cannot be negative: sums and counts."""
REPORTS = frozenset(("polar_report",))
"""State that no update reads, so that it may hold anything."""


class Expected(NamedTuple):
    """What a state tensor must be.

    Attributes:
        shape: Its shape.
        dtype: Its dtype; a saved float may have another one.
        device: Where it is kept.
        low: Smallest value, or None.
        limit: One more than the largest value, for numbers of distinct things; else None.
        empty: The value of all entries before anything was chosen, or None.
        distinct: Whether the numbers of a matrix differ.
        layout: How it lies over the ranks that share its weight; None for a plain tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str | torch.device
    low: float | None = None
    limit: int | None = None
    empty: float | None = None
    distinct: bool = False
    layout: Layout | None = None


Table = dict[str, Expected]


class Entry(NamedTuple):
    """All that the state of one parameter may hold.

    Attributes:
        tensors: Expected tensors by key.
        clocks: Keys of clocks.
        may_be_empty: Whether the rule keeps state in some windows only.
        optional: Keys of tensors that a checkpoint may lack.
        bases: Names of bases, see :attr:`Rule.bases`.
        spare: Names of state that a load leaves out, see :attr:`Rule.spare_state`.
    """

    tensors: Table
    clocks: set[str]
    may_be_empty: bool
    optional: set[str]
    bases: frozenset[str] = frozenset()
    spare: frozenset[str] = frozenset()

    def needed(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """State without what is spare, and without a radius where none is kept.

        What is no state at all stays, for others to refuse.
        """
        if not isinstance(found, Mapping):
            return found
        spare = {
            key
            for key in found
            if isinstance(key, str) and base_of(key).removesuffix("_scale") in self.spare
        }
        spare |= {key for key in found if base_of(str(key)) == RADIUS and key not in self.tensors}
        return {key: x for key, x in found.items() if key not in spare} if spare else found


def is_clock(key: str) -> bool:
    """Whether a state key is a clock's."""
    return base_of(key) in CLOCKS


def entries_of(units: Sequence[Unit], rules: Sequence[Rule]) -> dict[Tensor, Entry]:
    """Per parameter of the units, what its state must be.

    Args:
        units: The units.
        rules: Their rules, by ``Unit.rule``.
    """
    entries: dict[Tensor, Entry] = {}
    for unit in units:
        rule = rules[unit.rule]
        sides = tuple(unit.sides(i) for i in range(len(unit.params)))
        counts = rule.index_counts(sides)
        for i, p in enumerate(unit.params):
            fresh = Entry({}, set(), drops_state(rule), set(), rule.bases, rule.spare_state)
            entry = entries.setdefault(p, fresh)
            for key, (slot, shape, dtype) in unit.expected_state(i).items():
                name = base_of(key)
                is_positive = name in NONNEGATIVE or name.endswith("_scale")
                count = counts.get(name)
                fill = None if isinstance(slot.fill, str) else slot.fill
                low = None if count is None and not is_positive else min(0.0, fill or 0.0)
                device = slot.device or p.device
                layout = unit.state_layout(i, key)
                entry.tensors[key] = Expected(
                    shape, dtype, device, low, count, fill, bool(slot.axes), layout
                )
                if name in rule.optional_state or name in DRIVER_SLOTS:
                    entry.optional.add(key)
        entries[unit.params[0]].clocks.update(unit.clock_keys)
    return entries


def moment_dtype(p: Tensor, mode: str) -> torch.dtype:
    """Dtype of AdamW's moments, as ``torch.optim.AdamW`` has it where weights go to nearest.

    Args:
        p: The parameter.
        mode: How it is written, see ``write_modes.py``.
    """
    return p.dtype if mode == "nearest" else torch.float32


def adamw_entry(p: Tensor, mode: str) -> Entry:
    """What the state of a parameter of AdamW must be.

    Args:
        p: The parameter.
        mode: How it is written, see ``write_modes.py``.
    """
    shape, dtype = tuple(p.shape), moment_dtype(p, mode)
    layout = None if type(p) in PLAIN else layout_of(p, f"a parameter of shape {shape}")
    tensors = {
        "exp_avg": Expected(shape, dtype, p.device, layout=layout),
        "exp_avg_sq": Expected(shape, dtype, p.device, 0.0, layout=layout),
    }
    if mode == "kahan":
        tensors[RESIDUAL] = Expected(shape, torch.bfloat16, p.device, layout=layout)
    return Entry(tensors, {"step"}, False, {RESIDUAL})


def clock_value(key: str, value: Any, text: str) -> int:
    """A clock as an int.

    Args:
        key: Its state key.
        value: What is stored: a number, or a tensor with one element.
        text: How a message names the parameter.

    Raises:
        ValueError: If it is no whole number from 0.
    """
    number = value
    if isinstance(value, Tensor):
        is_plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        number = local(value).item() if is_plain and value.numel() == 1 else None
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_number or not 0 <= number <= MAX_CLOCK or number % 1:
        shown = value
        if isinstance(value, Tensor):
            shown = number if number is not None else f"a tensor of shape {tuple(value.shape)}"
        raise ValueError(
            f"state {key!r} of {text} must be a whole number from 0 to {MAX_CLOCK}, got {shown!r}"
        )
    return int(number)


def check_clocks(found: Mapping[str, Any], expected: Entry, text: str) -> bool:
    """Check the clocks of a parameter; whether any of them is above 0.

    Args:
        found: The state of the parameter.
        expected: What it must be.
        text: How a message names the parameter.

    Raises:
        ValueError: For an unknown clock, one that is no whole number from 0, or one that is ahead
            of the step it belongs to.
    """
    clocks = {key: clock_value(key, value, text) for key, value in found.items() if is_clock(key)}
    for key, value in clocks.items():
        if key not in expected.clocks:
            raise ValueError(f"state {key!r} of {text} is not known; {text} has no such clock")
        name, dot, tag = key.partition(".")
        step = clocks.get(f"step{dot}{tag}", 0)
        latest = step + (name == "held")  # state that begins at the next update
        if name != "step" and value > latest:
            raise ValueError(f"state {key!r} of {text} is {value}, which is after its step {step}")
    return any(clocks.values())


def check_tensor(
    key: str, value: Any, expected: Expected, p: Tensor, text: str, *, exact: bool = False
) -> None:
    """Check one state tensor but for its values.

    Args:
        key: Its state key.
        value: What is stored.
        expected: What it must be.
        p: The parameter.
        text: How a message names the parameter.
        exact: Whether floats must have the expected dtype too.

    Raises:
        ValueError: If it is no dense tensor of the expected shape and kind of dtype.
    """
    what = f"state {key!r} of {text}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{what} must be a plain dense tensor, got a {kind} one")
    if value.is_meta and not p.is_meta:
        raise ValueError(f"{what} is on the meta device, so it has no values")
    if is_sharded(value):
        _check_placements(value, what)
    held = local(value)
    if any(step == 0 and size > 1 for step, size in zip(held.stride(), held.shape, strict=True)):
        raise ValueError(f"{what} is expanded, so several of its entries share memory; clone it")
    if tuple(value.shape) != expected.shape:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)} but its settings need {expected.shape}; build "
            "the optimizer for the model that was saved"
        )
    kinds = [(x.is_floating_point, x.is_complex) for x in (value.dtype, expected.dtype)]
    is_float = expected.dtype.is_floating_point
    if kinds[0] != kinds[1] or ((exact or not is_float) and value.dtype != expected.dtype):
        raise ValueError(f"{what} has dtype {value.dtype} but its settings need {expected.dtype}")


def _check_placements(value: Any, what: str) -> None:
    """Raise for a DTensor of partial sums, or one that holds something else than it says."""
    if any(x.is_partial() for x in value.placements):
        raise ValueError(f"{what} is a DTensor of partial sums; redistribute it to shards")
    layout_of(value, what)


def check_layout(
    key: str, value: Tensor, expected: Expected, text: str, *, exact: bool = False
) -> None:
    """Check that live state lies over ranks as its weight does.

    A plain tensor may be whole or a piece, and equal on all ranks or not, so it is never taken for
    state of a sharded weight.

    Args:
        key: Its state key.
        value: A tensor that passed :func:`check_tensor`.
        expected: What it must be.
        text: How a message names the parameter.
        exact: Whether other placements of a DTensor are refused too.

    Raises:
        ValueError: If it does not.
    """
    wanted = expected.layout
    if wanted is None and not is_sharded(value):
        return
    what, advice = f"state {key!r} of {text}", "load it with load_state_dict(), which lays it out"
    if wanted is None:
        raise ValueError(f"{what} is a DTensor but its parameter is not sharded; {advice}")
    if not is_sharded(value):
        raise ValueError(f"{what} is a plain tensor but its parameter is sharded; {advice}")
    if exact and not wanted.fits(value):
        raise ValueError(
            f"{what} is a DTensor of other placements than its parameter needs; {advice}"
        )


def check_values_of(key: str, value: Tensor, expected: Expected, text: str, started: bool) -> None:
    """Check the values of a state tensor, of a DTensor those that this process holds.

    Args:
        key: Its state key.
        value: A tensor that passed :func:`check_tensor`.
        expected: What it must be.
        text: How a message names the parameter.
        started: Whether the parameter was updated, so that indices have been chosen.

    Raises:
        ValueError: For a value that is not finite (sums of squares may be infinite), below the
            smallest, or, of indices, too large or given twice.
    """
    what = f"state {key!r} of {text}"
    value = local(value)  # nothing is sent: each rank checks its own piece
    if value.is_meta or not value.numel() or base_of(key) in REPORTS:
        return
    if not value.dtype.is_floating_point and expected.limit is not None:
        check_index(key, value, expected, text, started)
        return
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    may_be_inf = base_of(key).removesuffix("_scale") in SUMS
    if not bool((~value.isnan() if may_be_inf else value.isfinite()).all()):
        raise ValueError(f"{what} is not finite; load a checkpoint from before that happened")
    if expected.low is not None and bool((value < expected.low).any()):
        raise ValueError(f"{what} has entries below {expected.low:g}, which it cannot have")


def check_index(key: str, value: Tensor, expected: Expected, text: str, started: bool) -> None:
    """Check numbers of distinct things; arguments as :func:`check_values_of`."""
    assert expected.limit is not None and expected.low is not None
    what, count = f"state {key!r} of {text}", expected.limit
    if not value.numel() or value.is_meta:
        return
    low, high = (int(x) for x in value.aminmax())
    if low < expected.low or high >= count:
        raise ValueError(
            f"{what} must lie from {expected.low:g} to {count - 1}, got {low} to {high}"
        )
    by_matrix = value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
    if low < 0 and high >= 0 and bool(((by_matrix < 0).any(-1) & (by_matrix >= 0).any(-1)).any()):
        raise ValueError(f"{what} is chosen in part only")
    is_unset = low == high == expected.empty and (not started or expected.low < 0)
    if expected.distinct and not is_unset:
        rows = value.reshape(-1, value.shape[-1]).sort(-1).values
        if bool(((rows.diff() == 0) & (rows[:, 1:] >= 0)).any()):
            raise ValueError(f"{what} names the same entry twice")


def missing_key(found: Mapping[str, Any], expected: Entry) -> str | None:
    """The first key that the state of an updated parameter lacks, None if it is complete."""
    absent = sorted(expected.tensors.keys() - expected.optional - found.keys())
    return absent[0] if absent else None


def refuse_unsound_state(
    units: Sequence[Unit],
    rules: Sequence[Rule],
    adamw_modes: Mapping[Tensor, str],
    state: Mapping[Tensor, Mapping[str, Any]],
    text_of: Mapping[Tensor, str],
) -> None:
    """Raise if other code has put into the live state what no step can use.

    Only what the host knows is looked at: clocks, shapes, layouts and kinds of dtype.

    Args:
        units: The units.
        rules: Their rules, by ``Unit.rule``.
        adamw_modes: How each parameter that AdamW trains is written.
        state: The optimizer's state.
        text_of: How a message names a parameter.

    Raises:
        ValueError: With the first clock or tensor that is not one.
    """
    entries = entries_of(units, rules) | {
        p: adamw_entry(p, mode) for p, mode in adamw_modes.items()
    }
    for p, expected in entries.items():
        found = state.get(p) or {}
        known = {
            key: value
            for key, value in found.items()
            if key in expected.tensors or (key in expected.clocks and not _is_on_device(value))
        }
        if not known:
            continue
        text = text_of[p]
        check_clocks(known, expected, text)
        for key, x in expected.tensors.items():
            if key in known:
                check_tensor(key, known[key], x, p, text)
                check_layout(key, known[key], x, text, exact=p in adamw_modes)
            elif not expected.clocks - {"step"} and not isinstance(known.get("step"), int):
                raise ValueError(f"state {key!r} of {text} is gone, but its step is there")


def _is_on_device(value: Any) -> bool:
    """Whether the host would have to wait for a value."""
    return isinstance(value, Tensor) and value.device.type not in ("cpu", "meta")
