"""AdamW for everything that is not a matrix: torch's own functional form, never a second Adam.

Where weights are rounded to nearest, it is the one step that rounds by itself and not through
``update_weight_``; the other modes are in ``adamw_write.py``. Sharded parameters are stepped as
what this process holds of them, in one list with all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import _device_dtype_check_for_fused

from ...kernels import LOW_PRECISION_DTYPES, update_weight_
from .adamw_write import (
    Stepper,
    Values,
    Writer,
    has_device_clock,
    max_chunk_numel,
    signature_of,
)
from .decay import Decay, decays_at, factor_at, masked_factor
from .layout import PLAIN, Layout, layout_of, local
from .param_groups import listed
from .saved_state import adamw_entry, check_layout, check_tensor, moment_dtype
from .units import State
from .write_modes import RESIDUAL, mode_of

MAX_COPIED_NUMEL = 2**22
"""Entries of a chunk whose weights and moments are copied where flags arrive after the step."""
MAX_JOINED_NUMEL = 2**14
"""Largest tensor, in entries, that is copied and put back together with others."""
Entries = Sequence[dict[str, Any]]

T = TypeVar("T")
_LOW_PRECISION = frozenset(LOW_PRECISION_DTYPES)
_NO_STATE: dict[str, Any] = {}
_dtype_of, _is_on_cpu = attrgetter("dtype"), attrgetter("is_cpu")
_tensors_of = itemgetter("step", "exp_avg", "exp_avg_sq")
_SHARDED = ("exp_avg", "exp_avg_sq", RESIDUAL)


def lr_of(group: Mapping[str, Any]) -> float | Tensor:
    """Learning rate of AdamW: ``lr`` times ``adamw_lr_ratio``; a tensor stays on its device."""
    ratio, lr = group.get("adamw_lr_ratio"), group["lr"]
    return lr if ratio is None else lr * ratio  # type: ignore[no-any-return]


def decay_of(group: Mapping[str, Any]) -> float:
    """Weight decay of AdamW before factors of single parameters."""
    decay: float | None = group["adamw_weight_decay"]
    return group["weight_decay"] if decay is None else decay


def betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Betas of AdamW: ``adamw_betas``, else the method's ``betas``, else (0.9, 0.95)."""
    beta1, beta2 = group.get("adamw_betas") or group.get("betas") or (0.9, 0.95)
    return beta1, beta2


def modes_of(
    flat_params: Sequence[Tensor],
    groups: Sequence[Mapping[str, Any]],
    positions: Sequence[Sequence[int]],
) -> dict[Tensor, tuple[int, str]]:
    """Per parameter of AdamW, the index of its group and how it is written.

    Args:
        flat_params: All parameters, group after group.
        groups: The groups, or their settings.
        positions: Per group, flat positions of its AdamW parameters.
    """
    return {
        flat_params[j]: (i, mode_of(group, flat_params[j]))
        for i, (group, part) in enumerate(zip(groups, positions, strict=True))
        for j in part
    }


def step_tensor(p: Tensor, group: Mapping[str, Any], value: float) -> Tensor:
    """A step count as ``torch.optim.AdamW`` stores it, on the device if its kernel reads it there.

    Args:
        p: The parameter.
        group: The group, for ``fused`` and ``capturable``.
        value: The count.
    """
    on_device = has_device_clock(group)
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    return torch.tensor(
        float(value),
        dtype=torch.float64 if double else torch.float32,
        device=p.device if on_device else "cpu",
    )


def allocate(p: Tensor, group: Mapping[str, Any], entry: dict[str, Any]) -> None:
    """Allocate the state of one parameter, if it has none.

    It is that of ``torch.optim.AdamW`` where the weight is rounded to nearest. Else moments are
    float32, and under ``"kahan"`` there is a residual. State of a sharded weight lies as the weight
    does, row by row: a broadcast of other state by a checkpointer would mix its entries up.

    Args:
        p: The parameter.
        group: Its group.
        entry: Its state.
    """
    if "exp_avg" in entry:
        return
    if group["fused"]:
        _device_dtype_check_for_fused(p)
    mode = mode_of(group, p)
    entry["step"] = step_tensor(p, group, 0)
    dtypes = dict.fromkeys(("exp_avg", "exp_avg_sq"), moment_dtype(p, mode))
    if mode == "kahan":
        dtypes[RESIDUAL] = torch.bfloat16
    layout = layout_of(p, f"a parameter of shape {tuple(p.shape)}")
    for name, dtype in dtypes.items():
        if layout is None:
            entry[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        else:
            entry[name] = layout.full(0.0, dtype, local(p).device)


def _is_sound(p: Tensor, entry: Mapping[str, Any], mode: str) -> bool:
    """Whether the state of a parameter is what AdamW can step."""
    step = entry.get("step")
    is_step = isinstance(step, Tensor) and step.numel() == 1 and step.is_floating_point()
    return is_step and all(
        isinstance(X, Tensor)
        and (X.shape, X.dtype, X.device, X.layout) == (p.shape, x.dtype, p.device, p.layout)
        and getattr(X, "placements", None) == getattr(p, "placements", None)
        and getattr(X, "device_mesh", None) == getattr(p, "device_mesh", None)
        for key, x in adamw_entry(p, mode).tensors.items()
        for X in (entry.get(key),)
    )


def _refuse_unsound(p: Tensor, entry: Mapping[str, Any], mode: str, name: str) -> None:
    """Raise for what makes the state of a parameter unfit, which other code must have done."""
    expected = adamw_entry(p, mode)
    for key, x in expected.tensors.items():
        check_tensor(key, entry.get(key), x, p, name, exact=True)
        if entry[key].device != p.device:
            raise ValueError(f"state {key!r} of {name} is on {entry[key].device}, not {p.device}")
        check_layout(key, entry[key], x, name, exact=True)
    raise ValueError(f"state 'step' of {name} must be a floating tensor with one element")


Identity = tuple[list[int], list[torch.dtype], str | None]
"""What tells whether state is that which was last checked."""


class EntryCache:
    """State dicts of whole groups, found again without a hash of each parameter.

    They are right as long as the state holds the same dicts in the same order, since a dict belongs
    to one parameter. Their tensors are known by ids alone, so that none is kept alive that other
    code has moved elsewhere.

    Attributes:
        by_group: State dicts of whole groups, by number of the group.
        layouts: How sharded parameters lie, by flat position; empty if all are plain. The plan of
            what is sharded puts them in.
    """

    def __init__(self) -> None:
        self.layouts: Mapping[int, Layout] = {}
        self._all: list[dict[str, Any]] = []
        self._sound: dict[int, Identity] = {}
        self.by_group: dict[int, Entries] = {}
        self._writers: dict[int, Writer] = {}

    def is_sound(self, index: int, entries: Entries, writer: Writer | None) -> bool:
        """Whether these tensors of a group are those that were last checked."""
        try:
            return self._sound.get(index) == _identity_of(entries, writer)
        except (KeyError, AttributeError):  # a tensor is gone, or is none any more
            return False

    def set_sound(self, index: int, entries: Entries, writer: Writer | None) -> None:
        """Remember the tensors of a group, which have passed all checks."""
        self._sound[index] = _identity_of(entries, writer)

    def writer(
        self, index: int, group: Mapping[str, Any], start: int, params: Sequence[Tensor]
    ) -> Writer | None:
        """How parameters of low precision are written; None if there are none, or to nearest.

        Args:
            index: Number of the group.
            group: The group.
            start: Position of its first parameter.
            params: Those that are stepped.
        """
        if _LOW_PRECISION.isdisjoint(map(_dtype_of, params)):
            return None
        mode = mode_of(group, next(p for p in params if p.dtype in _LOW_PRECISION))
        if mode == "nearest":
            return None
        writer = self._writers.get(index)
        if writer is None or writer.signature != signature_of(group, mode):
            writer = self._writers[index] = Writer(group, mode, start, self.layouts)
        return writer

    def follow(self, state: State) -> None:
        """Forget everything if other code has replaced, added or dropped a dict."""
        if len(state) != len(self._all) or not all(map(is_, state.values(), self._all)):
            self._all = list(state.values())
            self.by_group.clear()
            self._sound.clear()
            self._writers.clear()


def _identity_of(entries: Entries, writer: Writer | None) -> Identity:
    """Ids of all tensors, and the dtypes of the first moments, which ``.data`` may have changed."""
    tensors = list(chain.from_iterable(map(_tensors_of, entries)))
    ids, dtypes = list(map(id, tensors)), list(map(_dtype_of, tensors[1::3]))
    mode = None if writer is None else writer.mode
    if mode == "kahan":
        ids += [id(entry.get(RESIDUAL)) for entry in entries]
    return ids, dtypes, mode


@dataclass
class Work:
    """What AdamW steps in one group.

    Attributes:
        group: The group.
        order: See :func:`step`.
        positions: Flat positions of the parameters with a gradient.
        params: These parameters.
        grads: Their gradients; of sharded ones, what this process holds.
        decays: See :func:`step`.
        start: Position of the group's first parameter.
        entries: State of the parameters.
        new: Those without state.
        writer: How those of low precision are written, None if to nearest.
        layouts: How each parameter lies over ranks, None if all are plain.
    """

    group: Mapping[str, Any]
    order: tuple[bool, float] | None
    positions: Sequence[int]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    decays: Sequence[float] | None
    start: int = 0
    entries: Entries = ()
    new: Sequence[Tensor] = ()
    writer: Writer | None = None
    layouts: Sequence[Layout | None] | None = None

    @classmethod
    def of(
        cls,
        group: Mapping[str, Any],
        order: tuple[bool, float] | None,
        positions: Sequence[int],
        start: int,
        flat_params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> Work:
        """Choose the parameters with a gradient; ``start`` is the position of the group's first."""
        present_grads = [G for i in positions if (G := grads[i]) is not None]
        if len(present_grads) < len(positions):
            positions = [i for i in positions if grads[i] is not None]
        factors = group.get("decays")
        if factors and (len(factors) < len(group["params"]) or None in factors):
            known = [listed(group, "decays", i) for i in range(len(group["params"]))]
            factors = [1.0 if factor is None else factor for factor in known]
        return cls(
            group,
            order,
            positions,
            [flat_params[i] for i in positions],
            present_grads,
            [factors[i - start] for i in positions] if factors else None,
            start,
        )

    def find(self, state: State, cache: EntryCache, index: int, is_whole: bool) -> None:
        """Find the state, and how weights are written.

        Args:
            state: The optimizer's state.
            cache: What is known of it.
            index: Number of the group.
            is_whole: Whether all parameters of the group have a gradient.
        """
        entries = cache.by_group.get(index) if is_whole else None
        if entries is None:
            entries = [state.get(p, _NO_STATE) for p in self.params]
            if is_whole and all(entries):
                cache.by_group[index] = entries
        self.entries = entries
        self.writer = cache.writer(index, self.group, self.start, self.params)

    def check(self, describe: Callable[[int], str], cache: EntryCache, index: int) -> None:
        """Raise before any change for state that torch would refuse in the middle of the step.

        Weights and gradients have passed :func:`check_ready`.

        Args:
            describe: Makes words for a message of a position.
            cache: What is known of the state.
            index: Number of the group.

        Raises:
            ValueError: If other code has put in state that AdamW cannot step.
        """
        entries = self.entries
        if not cache.is_sound(index, entries, self.writer):
            self.new = [p for p, e in zip(self.params, entries, strict=True) if "exp_avg" not in e]
            for i, p, entry in zip(self.positions, self.params, entries, strict=True):
                mode = mode_of(self.group, p)
                if "exp_avg" in entry and not _is_sound(p, entry, mode):
                    _refuse_unsound(p, entry, mode, describe(i))
            if not self.new:
                cache.set_sound(index, entries, self.writer)
        if cache.layouts:
            layouts = [cache.layouts.get(i) for i in self.positions]
            self.layouts = layouts if any(layouts) else None

    def allocate(self, state: State) -> None:
        """Allocate missing state."""
        for p in self.new:
            allocate(p, self.group, state[p])
        if self.new:
            self.entries = [state[p] for p in self.params]

    def step(self, bad: Set[int], flags: Mapping[int, Tensor]) -> None:
        """Step all parameters but those known to be bad.

        Args:
            bad: Positions of parameters that stay as they are.
            flags: By position, flags that the host has not read.
        """
        indices = range(len(self.positions))
        if bad:
            indices = [j for j in indices if self.positions[j] not in bad]  # type: ignore[assignment]
        whole = len(indices) == len(self.positions)

        def chosen(values: Sequence[T]) -> Sequence[T]:
            return values if whole else [values[j] for j in indices]

        if indices:
            lists = (chosen(self.params), chosen(self.grads), chosen(self.entries))
            copies: Sequence[tuple[Tensor, Tensor]] = ()
            if self.layouts is not None:
                *lists, copies = held_lists(*lists, chosen(self.layouts))  # type: ignore[assignment]
            step(
                self.group,
                *lists,
                decays=None if self.decays is None else chosen(self.decays),
                order=self.order,
                finite=[flags.get(i) for i in chosen(self.positions)] if flags else None,
                writer=self.writer,
                positions=chosen(self.positions),
            )
            for held, copy in copies:
                held.copy_(copy)


def held_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    layouts: Sequence[Layout | None],
) -> tuple[list[Tensor], list[Tensor], Entries, list[tuple[Tensor, Tensor]]]:
    """What this process holds of sharded parameters, in lists of :func:`step` with plain ones.

    Torch's kernels take entries as they lie in memory, so all tensors of a shard lie row by row.

    Args:
        params: Parameters.
        grads: What this process holds of their gradients.
        entries: Their state.
        layouts: How each lies, None for a plain one.

    Returns:
        Parameters, gradients and state, and (tensor, copy) of what did not lie row by row, to be
        written back after the step.
    """
    ps, gs, es, copies = list(params), list(grads), list(entries), list[tuple[Tensor, Tensor]]()
    for i, layout in enumerate(layouts):
        if layout is not None:
            tensors = {"": ps[i], **{name: es[i][name] for name in _SHARDED if name in es[i]}}
            part = {name: _rows_of(X, copies) for name, X in tensors.items()}
            ps[i], es[i] = part.pop(""), {**part, "step": es[i]["step"]}
            gs[i] = _rows_of(gs[i], [])
    return ps, gs, es, copies


def _rows_of(X: Tensor, copies: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What this process holds of X, row by row: itself, or a copy that is added to the list."""
    held = local(X)
    if not held.numel():
        return held.reshape(-1)  # an empty shard may have any shape
    if held.is_contiguous():
        return held
    copies.append((held, held.contiguous()))
    return copies[-1][1]


def step(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    *,
    decays: Sequence[float] | None = None,
    order: tuple[bool, float] | None = None,
    finite: Sequence[Tensor | None] | None = None,
    writer: Writer | None = None,
    positions: Sequence[int] = (),
) -> None:
    """Step lists of parameters, bit-equal to ``torch.optim.AdamW`` but for the rounding.

    Args:
        group: Settings: lr, weight_decay, adamw_*, foreach, fused, capturable, maximize.
        params: Parameters of any shapes.
        grads: Their gradients.
        entries: Their state.
        decays: Factors on the weight decay, one per parameter; None: all are 1.
        order: None for torch's order, or (correct_bias, eps) for that of GaLore's published code:
            eps on the uncorrected root, decay last.
        finite: Per parameter a flag () on its device, None where the host has looked; a parameter
            whose flag is False keeps weight, moments, residual, and a clock that is on the device.
        writer: How parameters of low precision are written; None: to nearest, by torch.
        positions: Flat positions of the parameters, for ``writer``.
    """
    decay, lr, betas = decay_of(group), lr_of(group), betas_of(group)
    for kind, indices in _kinds(params, decays, finite, writer is not None).items():
        lists = (params, grads, entries)
        if indices is not None:  # one call for each distinct decay
            lists = tuple([values[i] for i in indices] for values in lists)  # type: ignore[assignment]
        chosen = range(len(params)) if indices is None else indices
        flags = None
        if not kind.is_known and finite is not None:
            flags = [flag for i in chosen if (flag := finite[i]) is not None]
        own_decay = Decay.of(group, decay * kind.decay, group.get("adamw_lr_ratio"))
        values = Values(lr, betas, group["adamw_eps"], own_decay, order)
        if kind.is_rounded and writer is not None:
            where = [positions[i] for i in chosen]
            _step_rounded(group, *lists, values, flags, writer, where)
        elif flags is None:
            _step(group, *lists, values)
        elif group["fused"] and order is None:
            _step_fused_unread(group, *lists, values, flags)
        else:
            _step_and_restore(group, *lists, values, flags)


class Kind(NamedTuple):
    """What parameters of one call have in common.

    Attributes:
        decay: Factor on the weight decay.
        is_known: Whether the host knows that the gradient is finite.
        is_rounded: Whether it is not torch that rounds.
    """

    decay: float
    is_known: bool
    is_rounded: bool


def _kinds(
    params: Sequence[Tensor],
    decays: Sequence[float] | None,
    finite: Sequence[Tensor | None] | None,
    has_writer: bool,
) -> dict[Kind, list[int] | None]:
    """Numbers of the parameters of every kind; None for all."""
    low = {*map(_dtype_of, params)} if has_writer else set()
    is_mixed = bool(low & _LOW_PRECISION and low - _LOW_PRECISION)
    if decays is None and finite is None and not is_mixed:
        return {Kind(1.0, True, has_writer and low <= _LOW_PRECISION): None}
    kinds: dict[Kind, list[int]] = {}
    for i, p in enumerate(params):
        known = finite is None or finite[i] is None
        is_rounded = has_writer and p.dtype in _LOW_PRECISION
        kind = Kind(1.0 if decays is None else decays[i], known, is_rounded)
        kinds.setdefault(kind, []).append(i)
    return {kind: None if len(kinds) == 1 else indices for kind, indices in kinds.items()}


def _step_rounded(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    values: Values,
    flags: Sequence[Tensor] | None,
    writer: Writer,
    positions: Sequence[int],
) -> None:
    """Step float32 values of low-precision weights, chunk by chunk, and round them as it is wanted.

    Args:
        group: The group.
        params: Parameters of low precision.
        grads: Their gradients.
        entries: Their state.
        values: Settings of the step.
        flags: None, or a flag for each parameter.
        writer: How they are written.
        positions: Their flat positions.
    """
    takes_flags = bool(group["fused"]) and values.order is None
    stepper: Stepper = partial(_step_values, group, values, takes_flags)
    for chunk in writer.chunks(group, params, grads, entries, positions, flags):
        kept = chunk.tensors(with_moments=not takes_flags)
        before = _Copies([X for X, _ in kept], [flag for _, flag in kept])
        chunk.step(stepper, values)
        before.restore()
    if flags is not None and not takes_flags:
        _set_back(group, entries, flags)


def _step_values(
    group: Mapping[str, Any],
    values: Values,
    takes_flags: bool,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    flags: Sequence[Tensor] | None,
) -> None:
    """Step float32 values; flags are for torch's fused kernel alone, which takes them."""
    if flags is not None and takes_flags:
        _step_fused_unread(group, params, grads, entries, values, flags)
    else:
        _step(group, params, grads, entries, values)


def _step_fused_unread(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    values: Values,
    finite: Sequence[Tensor],
) -> None:
    """Torch's fused kernel, which leaves a parameter alone where its own ``found_inf`` is 1."""
    steps, lr = [entry["step"] for entry in entries], values.lr
    decay = _torch_decay(values)
    if decay is None:
        _decay_first(group, params, grads, entries, values, finite)
    bad = [flag.logical_not().float() for flag in finite]
    torch._foreach_add_(steps, 1)
    for p, grad, entry, found_inf in zip(params, grads, entries, bad, strict=True):
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            lr = lr.to(p.device, non_blocking=True)
        state = [[X] for X in _tensors_of(entry)]
        _fused_kernel(
            group, [p], [grad], state, lr, values.betas, values.eps, decay or 0.0, found_inf
        )
    torch._foreach_sub_(steps, bad)


def _step_and_restore(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    values: Values,
    finite: Sequence[Tensor],
) -> None:
    """Step chunk by chunk, and put back weights and moments of those whose flag is False."""
    for chunk in _chunks(params, grads, entries, finite):
        tensors = [
            tensor
            for p, _, entry, _ in chunk
            for tensor in (p, entry["exp_avg"], entry["exp_avg_sq"])
        ]
        before = _Copies(tensors, [flag for *_, flag in chunk for _ in range(3)])
        ps, gs, es, _ = zip(*chunk, strict=True)
        _step(group, ps, gs, es, values)
        before.restore()
    _set_back(group, entries, finite)


def _set_back(group: Mapping[str, Any], entries: Entries, finite: Sequence[Tensor]) -> None:
    """Set back clocks on the device where the flag is False; the host sets back its own."""
    if has_device_clock(group):
        steps = [entry["step"] for entry in entries]
        bad = [flag.logical_not().to(s.dtype) for flag, s in zip(finite, steps, strict=True)]
        torch._foreach_sub_(steps, bad)


Piece = tuple[Tensor, Tensor, dict[str, Any], Tensor]
"""(parameter, gradient, state, flag), or a part of each."""


def _chunks(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    finite: Sequence[Tensor],
) -> Iterator[list[Piece]]:
    """Runs of parameters, large ones cut along their first side, that fit ``MAX_COPIED_NUMEL``."""
    chunk, used = list[Piece](), 0
    for p, grad, entry, flag in zip(params, grads, entries, finite, strict=True):
        for piece in _pieces(p, grad, entry, flag):
            if chunk and used + piece[0].numel() > MAX_COPIED_NUMEL:
                yield chunk
                chunk, used = [], 0
            chunk.append(piece)
            used += piece[0].numel()
    if chunk:
        yield chunk


def _pieces(p: Tensor, grad: Tensor, entry: dict[str, Any], flag: Tensor) -> Iterator[Piece]:
    """One parameter, or rows of it with clocks of their own, of which only the last is kept."""
    if p.numel() <= MAX_COPIED_NUMEL or p.dim() == 0:
        yield p, grad, entry, flag
        return
    rows = max(1, MAX_COPIED_NUMEL * p.shape[0] // p.numel())
    clock = entry["step"].clone()  # before the last piece moves it
    for start in range(0, p.shape[0], rows):
        part = slice(start, start + rows)
        is_last = start + rows >= p.shape[0]
        piece = {
            "step": entry["step"] if is_last else clock.clone(),
            "exp_avg": entry["exp_avg"][part],
            "exp_avg_sq": entry["exp_avg_sq"][part],
        }
        yield p.detach()[part], grad[part], piece, flag


class _Copies:
    """Copies of tensors, of which those whose flag is False are put back."""

    def __init__(self, tensors: Sequence[Tensor], finite: Sequence[Tensor]) -> None:
        self._large: list[tuple[Tensor, Tensor, Tensor]] = []
        small: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for X, flag in zip(tensors, finite, strict=True):
            if X.numel() > MAX_JOINED_NUMEL:
                self._large.append((X, X.detach().clone(), flag))
            else:
                small.setdefault((X.device, X.dtype), []).append((X.detach(), flag))
        self._small = [(pairs, self._join(pairs)) for pairs in small.values()]

    @staticmethod
    def _join(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([X.reshape(-1) for X, _ in pairs])

    def restore(self) -> None:
        """Write the copies whose flag is False."""
        for X, old, flag in self._large:
            X.copy_(torch.where(flag, X, old))
        for pairs, old in self._small:
            flags = torch.cat([flag.expand(X.numel()) for X, flag in pairs])
            live = [X for X, _ in pairs]
            kept = torch.split_with_sizes(
                torch.where(flags, self._join(pairs), old), [X.numel() for X in live]
            )
            torch._foreach_copy_(live, [k.view(X.shape) for k, X in zip(kept, live, strict=True)])


def _step(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    values: Values,
) -> None:
    """Step lists of parameters in torch's order, or in that of GaLore's published code."""
    lr, betas, order = values.lr, values.betas, values.order
    if order is None:
        decay = _torch_decay(values)
        if decay is None:
            _decay_first(group, params, grads, entries, values)
        _torch(group, params, grads, entries, lr, betas, values.eps, decay or 0.0)
        return
    masks = _masks(group, params, grads, entries, values)  # of the weights as they are now
    # M / (sqrt(V) + eps) * sqrt(c2) / c1 is torch's step with eps / sqrt(c2), c = 1 - beta^t
    correct_bias, eps = order
    clocks = [int(entry["step"]) + 1 for entry in entries]  # read before any step changes them
    for t in sorted(set(clocks)):
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        step_size = lr if correct_bias else lr * c1 / math.sqrt(c2)
        indices = [i for i, count in enumerate(clocks) if count == t]
        params_at_t = [params[i] for i in indices]
        _torch(
            group,
            params_at_t,
            [grads[i] for i in indices],
            [entries[i] for i in indices],
            step_size,
            betas,
            eps / math.sqrt(c2),
            0.0,
        )
        if values.decay.weight_decay:
            factor = float(values.decay.factor(float(lr)))
            for i in indices:
                change = partial(_decay_, factor=factor, mask=masks[i])
                update_weight_(params[i], change, params[i].dtype)


def _decay_(p: Tensor, factor: float, mask: Tensor | None) -> None:
    """Multiply by torch's operation on lists, which rounds the factor as published."""
    if mask is None:
        torch._foreach_mul_([p], factor)
    else:
        _real(p).mul_(masked_factor(_real(p), factor, mask))


def _torch_decay(values: Values) -> float | None:
    """The weight decay with which torch's AdamW decays as it is wanted; None if there is none."""
    decay, lr = values.decay, values.lr
    assert not isinstance(decay.weight_decay, Tensor)  # tensors are for rules
    if decay.weight_decay == 0.0 or (decay.schedule == "lr" and not decay.is_cautious):
        return decay.weight_decay
    if decay.is_cautious or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return None
    return float(decay.scaled_by(float(lr)))


def _decay_first(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    values: Values,
    finite: Sequence[Tensor] | None = None,
) -> None:
    """Decay parameters before torch steps them without decay.

    Args:
        group: The group.
        params: Parameters.
        grads: Their gradients.
        entries: Their state.
        values: Settings of the step.
        finite: None, or a flag for each; one whose flag is False stays as it is.
    """
    lr = values.lr.reshape(()) if isinstance(values.lr, Tensor) else values.lr
    factor = values.decay.factor(lr)
    for i, (p, grad, entry) in enumerate(zip(params, grads, entries, strict=True)):
        for W, G, M in _panels(p, grad, entry["exp_avg"]):
            own = masked_factor(W, factor, None if finite is None else finite[i])
            if values.decay.is_cautious:
                own = factor_at(_mask(W, G, M, values.betas[0], group["maximize"]), own)
            update_weight_(W, partial(torch.Tensor.mul_, other=own), W.dtype)


def _masks(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    values: Values,
) -> Sequence[Tensor | None]:
    """Where each parameter decays, by its value before the step; None: everywhere."""
    if not values.decay.is_cautious or not values.decay.weight_decay:
        return [None] * len(params)
    return [
        _mask(
            _real(p), _real(grad), _real(entry["exp_avg"]), values.betas[0], group["maximize"]
        ).bool()
        for p, grad, entry in zip(params, grads, entries, strict=True)
    ]


def _mask(W: Tensor, G: Tensor, M: Tensor, beta1: float, maximize: bool) -> Tensor:
    """Where W decays: the step has the sign of the new first moment."""
    return decays_at(torch.lerp(M, -G if maximize else G, 1 - beta1), W)


def _real(X: Tensor) -> Tensor:
    """X itself, or a complex one as pairs of real numbers, as torch's AdamW takes it."""
    return torch.view_as_real(X.resolve_conj()) if X.is_complex() else X


def _panels(p: Tensor, grad: Tensor, M: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of a parameter, its gradient and first moment that meet in the cache."""
    tensors = [_real(X.detach()) for X in (p, grad, M)]
    if all(X.is_contiguous() for X in tensors):
        tensors = [X.view(-1) for X in tensors]
    rows, count = tensors[0].shape[0] if tensors[0].dim() else 1, tensors[0].numel()
    height = max(1, max_chunk_numel(p.device) * rows // max(1, count))
    if height >= rows:
        yield (*tensors,)
        return
    for start in range(0, rows, height):
        yield tuple(X[start : start + height] for X in tensors)


def _torch(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    dtypes = {*map(_dtype_of, params)}
    has_complex = any(dtype.is_complex for dtype in dtypes)
    if group["fused"] and len(dtypes) == 1 and not has_complex and _are_plain_on_cpu(params):
        _torch_fused_on_cpu(group, params, grads, entries, lr, betas, eps, weight_decay)
        return
    if has_complex:  # torch takes no lazy conjugate
        grads = [grad.resolve_conj() for grad in grads]
    adamw(
        list(params),
        list(grads),
        [entry["exp_avg"] for entry in entries],
        [entry["exp_avg_sq"] for entry in entries],
        [],
        [entry["step"] for entry in entries],
        foreach=group["foreach"],
        capturable=group["capturable"],
        fused=group["fused"],
        has_complex=has_complex,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=group["maximize"],
    )


def _are_plain_on_cpu(params: Sequence[Tensor]) -> bool:
    return {*map(type, params)} <= PLAIN and all(map(_is_on_cpu, params))


def _torch_fused_on_cpu(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Entries,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """What torch's fused form does for tensors of one dtype, without sorting them by dtype.

    It also counts the steps with a tensor: torch makes one of the number 1 for every parameter.
    """
    state = [*map(list, zip(*map(_tensors_of, entries), strict=True))]
    torch._foreach_add_(state[0], torch.ones((), device="cpu", dtype=torch.float32), alpha=1.0)
    _fused_kernel(group, params, grads, state, lr, betas, eps, weight_decay)


def _fused_kernel(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[list[Tensor]],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """Torch's fused kernel on lists of clocks, which have counted this step, and of moments."""
    steps, exp_avgs, exp_avg_sqs = state
    torch._fused_adamw_(
        list(params),
        [G.resolve_neg() if G.is_neg() else G for G in grads],  # a negative view is refused
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        amsgrad=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        maximize=group["maximize"],
        found_inf=found_inf,
    )
