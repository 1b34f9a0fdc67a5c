"""AdamW on weights of low precision: torch steps float32 values of them, which are rounded once.

A chunk of parameters becomes float32 values, torch's own functional form steps these with float32
moments, and ``update_weight_`` rounds them into the weights. Small parameters are joined in one
buffer, of which torch gets views, so that a chunk is rounded in one go. Large ones are cut. Neither
changes a bit: random bits follow from the key of the parameter and the place in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import Rounding, parameter_keys, rounding_keys, update_weight_
from .decay import Decay
from .layout import Box, Layout, numel
from .param_groups import listed
from .units import parameter_index
from .write_modes import RESIDUAL, carry_coefficient, seed_of

MAX_CHUNK_NUMEL = 2**17
"""Entries of a chunk on CPU: its passes then meet in the cache."""
MAX_CHUNK_NUMEL_ACCELERATOR = 2**20
"""The same on accelerators, where one entry takes at most 64 bytes for a moment."""
MAX_ROWS = 4096
"""Chunks whose keys are remembered."""
_VECTOR = 64
"""Large parameters are cut at multiples of this: torch's fused kernel rounds a rest otherwise."""
Entry = dict[str, Any]


class Values(NamedTuple):
    """What all parameters of one call of torch have in common."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    decay: Decay
    order: tuple[bool, float] | None


class Piece(NamedTuple):
    """A parameter, or a part of it whose entries follow each other row by row.

    Attributes:
        param: The part of the weight.
        grad: That of the gradient.
        entry: That of the state, with a clock of its own unless it is the last.
        position: Flat position of the parameter.
        start: Place of the first entry in the parameter.
        flag: None, or a flag () that the host has not read.
        key: None, or the key (1,) of the parameter's random bits.
        strides: None, or for (K, m, n), part of a shard, by how much places grow along its sides.
    """

    param: Tensor
    grad: Tensor
    entry: Entry
    position: int
    start: int = 0
    flag: Tensor | None = None
    key: Tensor | None = None
    strides: tuple[int, int, int] | None = None


Stepper = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Entry], "Sequence[Tensor] | None"], object
]
"""Steps float32 values by float32 gradients: (values, gradients, state, flags)."""


class JoinedRow(NamedTuple):
    """What a chunk of the same parameters has in common at all steps.

    Attributes:
        keys: (K,) int64, the lasting keys of the parameters, where their clocks are.
        pairs: (K,) int64, pairs of entries of each parameter, where the parameters are.
        sizes: Sizes of the parameters in a joined buffer, with fillers that make them even.
        fills: Per parameter, whether a filler follows.
    """

    keys: Tensor
    pairs: Tensor
    sizes: list[int]
    fills: list[bool]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One row of all entries, each tensor from an even place."""
        rows = [X if X.dim() == 1 else X.reshape(-1) for X in tensors]
        if any(self.fills):
            filler = rows[0].new_zeros(1)
            pairs = zip(rows, self.fills, strict=True)
            rows = [x for row, fill in pairs for x in ((row, filler) if fill else (row,))]
        return torch.cat(rows)

    def split(self, row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of a joined row, shaped like the tensors that were joined."""
        parts = iter(row.split_with_sizes(self.sizes))
        views = []
        for X, fill in zip(like, self.fills, strict=True):
            part = next(parts)
            views.append(part if X.dim() == 1 else part.view(X.shape))
            if fill:
                next(parts)
        return views


class Writer:
    """How the parameters of low precision of one group are written, but not to nearest.

    Attributes:
        mode: ``"stochastic"``, ``"kahan"`` or ``"eco"``.
        signature: What the keys depend on.
        names: Keys of the state but for the clock.
    """

    def __init__(
        self, group: Mapping[str, Any], mode: str, start: int, layouts: Mapping[int, Layout]
    ) -> None:
        self.mode, self.signature, self._start = mode, signature_of(group, mode), start
        self._layouts = layouts
        self.names = ["exp_avg", "exp_avg_sq", *([RESIDUAL] if mode == "kahan" else [])]
        self._rows: dict[tuple[int, ...], JoinedRow] = {}
        self._runs: dict[tuple[int, ...], list[list[int]]] = {}
        self._places: dict[int, Places] = {}

    def chunks(
        self,
        group: Mapping[str, Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        entries: Sequence[Entry],
        positions: Sequence[int],
        flags: Sequence[Tensor] | None,
    ) -> Iterator[Chunk]:
        """Runs of pieces of one device and dtype that fit ``MAX_CHUNK_NUMEL``.

        Args:
            group: The group.
            params: Parameters of low precision, or what this process holds of them, row by row.
            grads: Their gradients.
            entries: Their state.
            positions: Their flat positions.
            flags: None, or a flag () for each.
        """
        finite: Sequence[Tensor | None] = flags or [None] * len(params)
        pieces = [
            Piece(p, grad, entry, position, flag=flag)
            for p, grad, entry, position, flag in zip(
                params, grads, entries, positions, finite, strict=True
            )
        ]
        for run in self._runs_of(params, positions):
            parts = [pieces[j] for j in run]
            places = self._places.get(positions[run[0]])
            if places is not None:
                for piece in self._cut_shard(group, parts[0], places):
                    yield Chunk(self, group, [piece])
            elif parts[0].param.numel() > max_chunk_numel(params[run[0]].device):
                for piece in self._cut(group, parts[0]):
                    yield Chunk(self, group, [piece])
            else:
                yield Chunk(self, group, parts)

    def _runs_of(self, params: Sequence[Tensor], positions: Sequence[int]) -> list[list[int]]:
        """Numbers of the parameters of every chunk; a large one and part of one are alone."""
        known = tuple(positions)
        if known not in self._runs:
            if len(self._runs) >= MAX_ROWS:
                self._runs.clear()
            runs: list[list[int]] = []
            last: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
            for j, p in enumerate(params):
                shard = self._layouts.get(positions[j])
                if shard is not None and p.numel() < math.prod(shard.shape):
                    self._places[positions[j]] = places_of(shard.shape, shard.box)
                    runs.append([j])
                    continue
                limit, kind = max_chunk_numel(p.device), (p.device, p.dtype)
                run, used = last.get(kind, ([], limit + 1))
                if used + p.numel() > limit:
                    run, used = [], 0
                    runs.append(run)
                run.append(j)
                last[kind] = run, used + p.numel()
            self._runs[known] = runs
        return self._runs[known]

    def _cut_shard(self, group: Mapping[str, Any], whole: Piece, places: Places) -> Iterator[Piece]:
        """Pieces of a shard whose places three steps tell, with clocks as :meth:`_cut` has them."""
        sizes, steps = [size for size, _ in places.sides], [step for _, step in places.sides]
        if len(sizes) > 3:
            clock, key = whole.entry["step"].clone(), whole.key
            key = self.keys(group, [whole]) if key is None else key
            for number in range(sizes[0]):
                is_last = number + 1 == sizes[0]
                part = self._viewed(whole, sizes, number)
                part.entry["step"] = whole.entry["step"] if is_last else clock.clone()
                inner = Places(places.start + number * steps[0], places.sides[1:])
                yield from self._cut_shard(group, part._replace(key=key), inner)
            return
        piece = whole._replace(start=places.start)
        if steps not in ([], [1]):  # else its entries are neighbours in the whole too
            first, *rest = steps
            middle, last = ([0] * (2 - len(rest)) + rest)[:2]
            piece = self._viewed(piece, [sizes[0], *[1] * (3 - len(sizes)), *sizes[1:]])
            piece = piece._replace(strides=(first, middle, last))
        is_large = piece.param.numel() > max_chunk_numel(piece.param.device)
        yield from self._cut(group, piece) if is_large else (piece,)

    def _viewed(self, piece: Piece, sizes: Sequence[int], number: int | None = None) -> Piece:
        """A piece with other sides, or one matrix of it."""

        def view(X: Tensor) -> Tensor:
            return X.view(*sizes) if number is None else X.view(*sizes)[number]

        entry = {name: view(piece.entry[name]) for name in self.names}
        return piece._replace(
            param=view(piece.param),
            grad=view(piece.grad),
            entry={**entry, "step": piece.entry["step"]},
        )

    def _cut(self, group: Mapping[str, Any], whole: Piece) -> Iterator[Piece]:
        """Pieces of a large parameter, with clocks of their own, of which the last is kept."""
        p, entry = whole.param, whole.entry
        limit, key = max_chunk_numel(p.device), whole.key
        key = self.keys(group, [whole]) if key is None else key
        clock = entry["step"].clone()  # before the last piece moves it
        tensors = {"": p, "grad": whole.grad, **{name: entry[name] for name in self.names}}
        if whole.strides is None and all(X.is_contiguous() for X in tensors.values()):
            tensors = {name: X.reshape(-1) for name, X in tensors.items()}
        while len(tensors[""]) == 1:
            tensors = {name: X[0] for name, X in tensors.items()}
        side = len(tensors[""])
        row = p.numel() // side
        step = row if whole.strides is None else whole.strides[0]
        count = max(1, limit // row)
        count -= count % _VECTOR if count > _VECTOR else 0
        for start in range(0, side, count):
            is_last = start + count >= side
            part = {name: X[start : start + count] for name, X in tensors.items()}
            piece, piece_grad = part.pop(""), part.pop("grad")
            part["step"] = entry["step"] if is_last else clock.clone()
            yield whole._replace(
                param=piece, grad=piece_grad, entry=part, start=whole.start + start * step, key=key
            )

    def row(self, group: Mapping[str, Any], pieces: Sequence[Piece]) -> JoinedRow:
        """The row of whole parameters; their keys are made once."""
        positions = [piece.position for piece in pieces]
        known = tuple(positions)
        if known not in self._rows:
            if len(self._rows) >= MAX_ROWS:
                self._rows.clear()
            device, sizes = pieces[0].param.device, [piece.param.numel() for piece in pieces]
            names = [listed(group, "param_names", i - self._start) for i in positions]
            indices = [
                parameter_index(group, i - self._start, i, name)
                for i, name in zip(positions, names, strict=True)
            ]
            at = device if has_device_clock(group) else torch.device("cpu")
            self._rows[known] = JoinedRow(
                parameter_keys(seed_of(group), indices, at),
                torch.tensor([-(-size // 2) for size in sizes], dtype=torch.int64, device="cpu").to(
                    device
                ),
                [x for size in sizes for x in ((size, 1) if size % 2 else (size,))],
                [size % 2 == 1 for size in sizes],
            )
        return self._rows[known]

    def keys(self, group: Mapping[str, Any], pieces: Sequence[Piece]) -> Tensor:
        """Keys (K,) of the bits of the next update, made where the clocks are."""
        t = next_updates(group, pieces)
        keys = rounding_keys(self.row(group, pieces).keys, t)
        return keys.to(pieces[0].param.device, non_blocking=True)


def signature_of(group: Mapping[str, Any], mode: str) -> tuple[Any, ...]:
    """What the writing of a group depends on but for its parameters."""
    return mode, seed_of(group), group.get("draws"), has_device_clock(group)


def max_chunk_numel(device: torch.device) -> int:
    """Most entries of a chunk."""
    return MAX_CHUNK_NUMEL if device.type == "cpu" else MAX_CHUNK_NUMEL_ACCELERATOR


def has_device_clock(group: Mapping[str, Any]) -> bool:
    """Whether clocks are where the parameters are, so that the host must not read them."""
    return bool(group["fused"] or group["capturable"])


def next_updates(group: Mapping[str, Any], pieces: Sequence[Piece]) -> Tensor:
    """Numbers (K,) int64 of the next updates."""
    clocks = [piece.entry["step"] for piece in pieces]
    if has_device_clock(group):
        clocks = [clock if clock.dim() == 0 else clock.reshape(()) for clock in clocks]
        return torch.stack(clocks).long() + 1
    return torch.tensor([int(clock) + 1 for clock in clocks], dtype=torch.int64, device="cpu")


class Chunk:
    """Pieces that are stepped and rounded together."""

    def __init__(self, writer: Writer, group: Mapping[str, Any], pieces: Sequence[Piece]) -> None:
        self._writer, self._group, self._pieces = writer, group, pieces

    def tensors(self, with_moments: bool) -> list[tuple[Tensor, Tensor]]:
        """What a step changes, each with the flag of its parameter, but for the clocks."""
        names = [n for n in self._writer.names if with_moments or n == RESIDUAL]
        return [
            (X, piece.flag)
            for piece in self._pieces
            if piece.flag is not None and names
            for X in (piece.param, *(piece.entry[name] for name in names))
        ]

    def step(self, stepper: Stepper, values: Values) -> None:
        """Step the pieces and round them.

        Args:
            stepper: Steps float32 values.
            values: Settings of the step.
        """
        writer, pieces = self._writer, [_row_by_row(piece, self._writer) for piece in self._pieces]
        flags = [piece.flag for piece in pieces if piece.flag is not None] or None
        t = next_updates(self._group, pieces) if writer.mode == "eco" else None
        step = self._step_alone if len(pieces) == 1 else self._step_joined
        errors = step(pieces, flags, stepper)
        if t is not None:
            carry_errors_([piece.entry for piece in pieces], errors, t, values)
        for live, piece in zip(self._pieces, pieces, strict=True):
            if piece is not live:
                live.param.copy_(piece.param)
                for name in writer.names:
                    live.entry[name].copy_(piece.entry[name])

    def _step_alone(
        self, pieces: Sequence[Piece], flags: Sequence[Tensor] | None, stepper: Stepper
    ) -> list[Tensor]:
        """Step one piece; the errors of its rounding, if they are wanted."""
        (piece,) = pieces
        key = self._writer.keys(self._group, pieces) if piece.key is None else piece.key
        W, entry = piece.param, piece.entry
        error = torch.empty_like(W, dtype=torch.float32) if self._writer.mode == "eco" else None
        rounding = Rounding(
            key, piece.start, piece.strides, residual=entry.get(RESIDUAL), error=error
        )
        grad = piece.grad.to(torch.float32, memory_format=torch.contiguous_format)

        def change(X: Tensor) -> None:
            stepper([X], [grad], [entry], flags)

        update_weight_(W, change, rounding=rounding)
        return [] if error is None else [error]

    def _step_joined(
        self, pieces: Sequence[Piece], flags: Sequence[Tensor] | None, stepper: Stepper
    ) -> list[Tensor]:
        """Step several parameters as one row; the errors of its rounding, if they are wanted."""
        mode, joined = self._writer.mode, self._writer.row(self._group, pieces)
        key = self._writer.keys(self._group, pieces)
        params, entries = [piece.param for piece in pieces], [piece.entry for piece in pieces]
        row = joined.join(params)
        residuals = [entry[RESIDUAL] for entry in entries if mode == "kahan"]
        residual = joined.join(residuals) if residuals else None
        error = torch.empty_like(row, dtype=torch.float32) if mode == "eco" else None
        rounding = Rounding(key, residual=residual, error=error, pairs=joined.pairs)
        grad_row = joined.join([piece.grad for piece in pieces]).float()

        def change(X: Tensor) -> None:
            stepper(joined.split(X, params), joined.split(grad_row, params), entries, flags)

        update_weight_(row, change, rounding=rounding)
        torch._foreach_copy_(params, joined.split(row, params))
        if residual is not None:
            torch._foreach_copy_(residuals, joined.split(residual, params))
        return [] if error is None else joined.split(error, params)


class Places(NamedTuple):
    """Where the entries of a box lie in its tensor, whose places are counted row by row.

    Attributes:
        start: The place of the first entry.
        sides: Its sides longer than 1: how long, and by how much places grow. Sides whose places
            follow each other are one.
    """

    start: int
    sides: tuple[tuple[int, int], ...]


def places_of(shape: Sequence[int], box: Box) -> Places:
    """Where the entries of a box lie.

    Args:
        shape: Shape of the tensor.
        box: The box.
    """
    sides, start, step = list[tuple[int, int]](), 0, 1
    if not numel(box):
        return Places(0, ((0, 1),))
    for length, (first, end) in zip(shape[::-1], box[::-1], strict=True):
        size = end - first
        start += first * step
        if sides and sides[0][0] * sides[0][1] == step:  # whole rows follow each other
            sides[0] = (sides[0][0] * size, sides[0][1])
        elif size != 1:
            sides.insert(0, (size, step))
        step *= length
    return Places(start, tuple(sides))


def _row_by_row(piece: Piece, writer: Writer) -> Piece:
    """A piece whose weight and state lie row by row: itself, or a copy."""
    tensors = [piece.param, *[piece.entry[name] for name in writer.names]]
    if all([X.is_contiguous() for X in tensors]):
        return piece
    p, *state = [X.contiguous() for X in tensors]
    entry = {"step": piece.entry["step"], **dict(zip(writer.names, state, strict=True))}
    return piece._replace(param=p, entry=entry)


def carry_errors_(
    entries: Sequence[Entry], errors: Sequence[Tensor], t: Tensor, values: Values
) -> None:
    """Put what rounding cut off into the momentum, so that the next step makes up for it.

    M <- M + c T^-1[E], c = ((1 - lr decay) / lr) (1 - 1 / beta1), and T^-1[E] =
    (1 - beta1^t) (sqrt(V / (1 - beta2^t)) + eps) E. In the order of GaLore's published code the
    decay comes last and takes no part in it. Source: arXiv 2601.22101.

    Args:
        entries: State of the parameters, after the step.
        errors: E of each, 0 where it is not finite.
        t: (K,), the number of the step for each.
        values: Settings of the step.
    """
    lr = values.lr.reshape(()) if isinstance(values.lr, Tensor) else values.lr
    is_published = values.order is not None
    decay_factor = 1.0 if is_published else values.decay.factor(lr)
    c = carry_coefficient(lr, decay_factor, values.betas[0])
    if not isinstance(c, Tensor) and c == 0.0:
        return
    device = errors[0].device
    t = t.to(device, torch.float32 if device.type == "mps" else torch.float64)
    c1, root = (1 - values.betas[0] ** t), (1 - values.betas[1] ** t).sqrt()
    eps, factor = values.eps, c1 / root
    if values.order is not None:
        correct_bias, eps = values.order
        factor = c1 / root if correct_bias else torch.ones_like(c1)
    c = c.to(device) if isinstance(c, Tensor) else c
    # (1 - beta1^t) (sqrt(V) / root + eps) = (c1 / root) (sqrt(V) + eps root)
    shifts = (eps * (torch.ones_like(root) if is_published else root)).float().unbind()
    factors = (c * factor).float().unbind()
    changes = torch._foreach_sqrt([entry["exp_avg_sq"] for entry in entries])
    torch._foreach_add_(changes, shifts)
    torch._foreach_mul_(changes, list(errors))
    torch._foreach_mul_(changes, factors)
    torch._foreach_add_([entry["exp_avg"] for entry in entries], changes)
