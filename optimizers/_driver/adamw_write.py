"""AdamW on weights of low precision: torch steps float32 values of them, which are rounded once.

A chunk of parameters becomes float32 values, torch's own functional form steps these with float32
moments, and ``update_weight_`` rounds them into the weights. Small parameters are joined in one
buffer, of which torch gets views, so that a chunk is rounded in one go. Large ones are cut. Neither
changes a bit: random bits follow from the key of the parameter and the place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import Rounding, parameter_keys, rounding_keys, update_weight_
from .param_groups import listed
from .units import parameter_index
from .write_modes import RESIDUAL, carry_coefficient, seed_of

MAX_CHUNK_NUMEL = 2**17
"""Entries of a chunk on CPU: its passes then meet in the cache."""
MAX_CHUNK_NUMEL_ACCELERATOR = 2**20
"""The same on accelerators, where one entry takes at most 64 bytes for a moment."""
MAX_LAYOUTS = 4096
"""Chunks whose keys are remembered."""
_VECTOR = 64
"""Large parameters are cut at multiples of this: torch's fused kernel rounds a rest otherwise."""
Entry = dict[str, Any]


class Values(NamedTuple):
    """What all parameters of one call of torch have in common."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    decay: float
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
    """

    param: Tensor
    grad: Tensor
    entry: Entry
    position: int
    start: int
    flag: Tensor | None
    key: Tensor | None


Stepper = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Entry], "Sequence[Tensor] | None"], object
]
"""Steps float32 values by float32 gradients: (values, gradients, state, flags)."""


class Layout(NamedTuple):
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
        rows = [X.reshape(-1) for X in tensors]
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

    def __init__(self, group: Mapping[str, Any], mode: str, start: int) -> None:
        self.mode, self.signature, self._start = mode, signature_of(group, mode), start
        self.names = ["exp_avg", "exp_avg_sq", *([RESIDUAL] if mode == "kahan" else [])]
        self._layouts: dict[tuple[Any, ...], Layout] = {}

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
            params: Parameters of low precision.
            grads: Their gradients.
            entries: Their state.
            positions: Their flat positions.
            flags: None, or a flag () for each.
        """
        open_chunks: dict[tuple[torch.device, torch.dtype], tuple[list[Piece], int]] = {}
        finite = flags or [None] * len(params)
        for p, *rest in zip(params, grads, entries, positions, finite, strict=True):
            limit = max_chunk_numel(p.device)
            if p.numel() > limit:
                for piece in self._cut(group, p, *rest):
                    yield Chunk(self, group, [piece])
                continue
            kind = p.device, p.dtype
            pieces, used = open_chunks.get(kind, ([], 0))
            if pieces and used + p.numel() > limit:
                yield Chunk(self, group, pieces)
                pieces, used = [], 0
            pieces.append(Piece(p, *rest[:3], 0, rest[3], None))
            open_chunks[kind] = pieces, used + p.numel()
        for pieces, _ in open_chunks.values():
            yield Chunk(self, group, pieces)

    def _cut(
        self,
        group: Mapping[str, Any],
        p: Tensor,
        grad: Tensor,
        entry: Entry,
        position: int,
        flag: Tensor | None,
    ) -> Iterator[Piece]:
        """Pieces of a large parameter, with clocks of their own, of which the last is kept."""
        limit, key = max_chunk_numel(p.device), self.keys(group, [p], [entry], [position])
        clock = entry["step"].clone()  # before the last piece moves it
        tensors = {"": p, "grad": grad, **{name: entry[name] for name in self.names}}
        if all(X.is_contiguous() for X in tensors.values()):
            tensors = {name: X.reshape(-1) for name, X in tensors.items()}
        while len(tensors[""]) == 1:
            tensors = {name: X[0] for name, X in tensors.items()}
        side = len(tensors[""])
        row = p.numel() // side
        count = max(1, limit // row)
        count -= count % _VECTOR if count > _VECTOR else 0
        for start in range(0, side, count):
            is_last = start + count >= side
            part = {name: X[start : start + count] for name, X in tensors.items()}
            piece, piece_grad = part.pop(""), part.pop("grad")
            part["step"] = entry["step"] if is_last else clock.clone()
            yield Piece(piece, piece_grad, part, position, start * row, flag, key)

    def layout(
        self, group: Mapping[str, Any], params: Sequence[Tensor], positions: Sequence[int]
    ) -> Layout:
        """The layout of these parameters; their keys are made once."""
        device = params[0].device
        sizes = [p.numel() for p in params]
        known = (*positions, *sizes, device)
        if known not in self._layouts:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            names = [listed(group, "param_names", i - self._start) for i in positions]
            indices = [
                parameter_index(group, i - self._start, i, name)
                for i, name in zip(positions, names, strict=True)
            ]
            at = device if has_device_clock(group) else torch.device("cpu")
            self._layouts[known] = Layout(
                parameter_keys(seed_of(group), indices, at),
                torch.tensor([-(-size // 2) for size in sizes]).to(device),
                [x for size in sizes for x in ((size, 1) if size % 2 else (size,))],
                [size % 2 == 1 for size in sizes],
            )
        return self._layouts[known]

    def keys(
        self,
        group: Mapping[str, Any],
        params: Sequence[Tensor],
        entries: Sequence[Entry],
        positions: Sequence[int],
    ) -> Tensor:
        """Keys (K,) of the bits of the next update, made where the clocks are."""
        t = next_updates(group, entries)
        keys = rounding_keys(self.layout(group, params, positions).keys, t)
        return keys.to(params[0].device, non_blocking=True)


def signature_of(group: Mapping[str, Any], mode: str) -> tuple[Any, ...]:
    """What the writing of a group depends on but for its parameters."""
    return mode, seed_of(group), group.get("draws"), has_device_clock(group)


def max_chunk_numel(device: torch.device) -> int:
    """Most entries of a chunk."""
    return MAX_CHUNK_NUMEL if device.type == "cpu" else MAX_CHUNK_NUMEL_ACCELERATOR


def has_device_clock(group: Mapping[str, Any]) -> bool:
    """Whether clocks are where the parameters are, so that the host must not read them."""
    return bool(group["fused"] or group["capturable"])


def next_updates(group: Mapping[str, Any], entries: Sequence[Entry]) -> Tensor:
    """Numbers (K,) int64 of the next updates."""
    clocks = [entry["step"] for entry in entries]
    if has_device_clock(group):
        return torch.stack([clock.reshape(()) for clock in clocks]).long() + 1
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
        pieces, writer = self._pieces, self._writer
        live = [
            {"": piece.param, **{name: piece.entry[name] for name in writer.names}}
            for piece in pieces
        ]
        rows = [_row_by_row(tensors) for tensors in live]
        params, grads = [row[""] for row in rows], [piece.grad for piece in pieces]
        entries = [
            {**row, "step": piece.entry["step"]} for row, piece in zip(rows, pieces, strict=True)
        ]
        flags = [piece.flag for piece in pieces if piece.flag is not None] or None
        t = next_updates(self._group, entries) if writer.mode == "eco" else None
        if len(pieces) == 1:
            errors = self._step_alone(params[0], grads[0], entries[0], flags, stepper)
        else:
            errors = self._step_joined(params, grads, entries, flags, stepper)
        if t is not None:
            carry_errors_(entries, errors, t, values)
        for tensors, row in zip(live, rows, strict=True):
            for name, X in tensors.items():
                if X is not row[name]:
                    X.copy_(row[name])

    def _step_alone(
        self,
        p: Tensor,
        grad: Tensor,
        entry: Entry,
        flags: Sequence[Tensor] | None,
        stepper: Stepper,
    ) -> list[Tensor]:
        """Step one piece; the errors of its rounding, if they are wanted."""
        piece = self._pieces[0]
        key = piece.key
        if key is None:
            key = self._writer.keys(self._group, [p], [entry], [piece.position])
        error = torch.empty_like(p, dtype=torch.float32) if self._writer.mode == "eco" else None
        rounding = Rounding(key, piece.start, residual=entry.get(RESIDUAL), error=error)
        grad = grad.to(torch.float32, memory_format=torch.contiguous_format)

        def change(X: Tensor) -> None:
            stepper([X], [grad], [entry], flags)

        update_weight_(p, change, rounding=rounding)
        return [] if error is None else [error]

    def _step_joined(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        entries: Sequence[Entry],
        flags: Sequence[Tensor] | None,
        stepper: Stepper,
    ) -> list[Tensor]:
        """Step several parameters as one row; the errors of its rounding, if they are wanted."""
        positions = [piece.position for piece in self._pieces]
        layout = self._writer.layout(self._group, params, positions)
        key = self._writer.keys(self._group, params, entries, positions)
        row = layout.join(params)
        residuals = [entry[RESIDUAL] for entry in entries if self._writer.mode == "kahan"]
        residual = layout.join(residuals) if residuals else None
        error = torch.empty_like(row, dtype=torch.float32) if self._writer.mode == "eco" else None
        rounding = Rounding(key, residual=residual, error=error, pairs=layout.pairs)
        grad_row = layout.join(grads).float()

        def change(X: Tensor) -> None:
            split = partial(layout.split, like=params)
            stepper(split(X), split(grad_row), entries, flags)

        update_weight_(row, change, rounding=rounding)
        torch._foreach_copy_(list(params), layout.split(row, params))
        if residual is not None:
            torch._foreach_copy_(residuals, layout.split(residual, params))
        return [] if error is None else layout.split(error, params)


def _row_by_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are where all lie row by row, else copies that do."""
    if all(X.is_contiguous() for X in tensors.values()):
        return tensors
    return {name: X.contiguous() for name, X in tensors.items()}


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
    decay_factor = 1.0 if is_published else 1 - lr * values.decay
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
