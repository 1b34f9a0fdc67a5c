"""Optimizer state in 8 bits: one scale for every 256 numbers of a row, or one range for every row.

Source: dynamic block-wise quantization, *8-bit Optimizers via Block-wise Quantization*,
arXiv 2110.02861. Numbers of a block are divided by the largest magnitude in it and rounded to one
of a fixed set of levels, which lie evenly within each decade and twice as densely in each decade as
in the one below, so that what matters most is kept to about 1 % and seven decades are still told
apart. Blocks run within rows, so that no scale belongs to two rows.

Three choices of our own. Levels are symmetric, so zero and the largest entry are exact and to store
a block again changes nothing. A second moment is stored as its root: it divides a first moment,
whose decades it then matches, and an entry that was not zero never becomes zero, because a division
by it would blow up where the first moment survived. And a second moment may be rounded by random
bits: its steps of 0.001 round away to nearest, as levels differ by 0.014 of their square or more. A
value v between the squares a < b of two levels becomes b with the probability (v - a) / (b - a), so
that v itself is kept on average, not its root; single entries walk about it, by 8 % where they are
near the largest of their block. First moments are rounded to nearest: they move by a tenth in a
step, so that nothing is lost (below 0.1 %), and an error of 2.5 % would become 3.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .reference.rounding import Rounding, random_bits

__all__ = [
    "BLOCK",
    "blockwise_levels",
    "blockwise_scales",
    "blockwise_shape",
    "dequantize_blocks",
    "quantize_blocks",
]

BLOCK = 256
"""Numbers that share a scale."""
JOINED_ROW = 16
"""Rows shorter than this are joined with those of the axis before, such as a filter's 3 x 3."""
SHORTEST_ROW = 8
"""Shortest row that is worth a scale: its entries take 1.5 bytes in place of 4."""
_CODE_SCALE = 2.0**15
_SAFE_SCALE_SQUARE = 1e-20
"""Square of a scale from which the lowest level of a root, 1e-8 and more, has a normal square."""
_QUANTIZE_PANEL = 2**17
"""Numbers that are worked on at once, a multiple of BLOCK: bounds the temporaries."""
_OWN_LEVEL = 2.0
"""A probability of the next level, in units of 2^-16, that counts as none.

What was read from a level differs from it by round-off, and must come back to it.
"""


def blockwise_scales(numel: int) -> int:
    """Number of scales of a row, or of a tensor that is stored as one row.

    Args:
        numel: Its number of entries.
    """
    return -(-numel // BLOCK)


def blockwise_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of the scales of a tensor (..., m, n): (..., m, ceil(n / 256)).

    Rows of fewer than 16 entries are joined with those of the axis before, but not across the first
    axis: (64, 32, 3, 3) has scales (64, 2).

    Args:
        shape: Shape of the tensor, of one axis or more.

    Returns:
        The shape, None where rows have fewer than 8 entries even so and scales would cost most of
        what codes save.
    """
    axes = list(shape)
    row = axes.pop()
    while row < JOINED_ROW and len(axes) > 1:
        row *= axes.pop()
    return (*axes, blockwise_scales(row)) if row >= SHORTEST_ROW else None


def blockwise_levels(signed: bool) -> Tensor:
    """The positive levels, ascending, the last one 1: 127 if signed, else 255.

    Decade i below 1 holds 2^(6-i) of them if signed, 2^(7-i) else, evenly from 10^-(i+1) (left out)
    to 10^-i (kept).

    Args:
        signed: Whether the codes have a sign.
    """
    decades = 7 if signed else 8
    parts = []
    for i in reversed(range(decades)):
        count = 2 ** (decades - 1 - i)
        steps = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / count
        parts.append((0.1 + 0.9 * steps) * 10.0**-i)
    return torch.cat(parts)


@lru_cache(maxsize=16)
def _decoder(signed: bool, device: torch.device) -> Tensor:
    """(256,) value of every code read as an unsigned byte."""
    levels = blockwise_levels(signed)
    zero = levels.new_zeros(1)
    # as unsigned bytes, the codes -128..-1 of int8 come after 0..127; -128 is not used
    values = torch.cat([zero, levels, -levels[-1:], -levels.flip(0)] if signed else [zero, levels])
    return values.float().to(device)


@lru_cache(maxsize=16)
def _encoder(signed: bool, device: torch.device) -> Tensor:
    """(65536,) code of the nearest level, for every float16 by its bits, 2^15 standing for 1.

    Its eleven digits are far finer than any level, and so scaled it has them down to the lowest
    one; so a look-up takes the place of a search, at a twentieth of its time.
    """
    levels = blockwise_levels(signed)
    bits = torch.arange(65536, dtype=torch.int32, device="cpu")
    values = bits.to(torch.uint16).view(torch.float16).double().nan_to_num(0.0) / _CODE_SCALE
    size = values.abs()
    middles = (levels[1:] + levels[:-1]) / 2
    code = torch.bucketize(size, middles) + 1  # number of the nearest level from 1
    code = torch.where(size <= levels[0] / 2, 0, code)
    if signed:
        code = torch.where(values < 0, -code, code)
    return code.to(torch.int8).view(torch.uint8).to(device) if signed else code.byte().to(device)


@lru_cache(maxsize=16)
def _level_squares(device: torch.device) -> tuple[Tensor, Tensor]:
    """Squares of the unsigned levels by their codes (256,), and steps from them (512,).

    Steps are in units of 2^-16 of them. Those up to the next square come first, then those down,
    which are negative. Infinite ones are never taken: up from the largest level, and down to zero.
    """
    levels = blockwise_levels(signed=False)
    squares = torch.cat([levels.new_zeros(1), levels * _CODE_SCALE]).square()
    up, infinite = squares.diff(), levels.new_full((1,), torch.inf)
    steps = torch.cat([up, infinite, -infinite, -infinite, -up[1:]]) * 2.0**-16
    return squares.float().to(device), steps.float().to(device)


def quantize_blocks(
    X: Tensor, codes: Tensor, scales: Tensor, rounding: Rounding | None = None
) -> None:
    """Store X in codes and scales, in place.

    Args:
        X: (K, ...) contiguous floats, K tensors that share no block.
        codes: As X, contiguous, int8 for numbers of either sign, uint8 for second moments (kept as
            roots).
        scales: (K, ..., b) float32, contiguous, the largest magnitude of each block: the first axes
            of X, then the blocks of the rows that its other axes make. With K and b alone, all of
            one tensor is one row.
        rounding: None (default): to the nearest level. Else its keys, (K,) or (1,), decide whether
            a second moment is rounded up or down, so that it is kept on average; positions count
            the entries of one tensor, or as ``strides`` say by how much they grow along its rows.
    """
    if not X.numel():
        return
    signed = codes.dtype == torch.int8
    stored, tops = codes.view(torch.uint8), scales.view(len(X), -1, scales.shape[-1])
    for k, i, j, part in _quantize_panels(X, scales):
        Y = part.float() if signed else part.sqrt().float()
        top = _block_tops(Y)
        if not signed and part.dtype == torch.float64:  # roots may be less than a float32 holds
            has_any = _block_tops(part) > 0
            top = torch.where(has_any, top.clamp(min=torch.finfo(torch.float32).tiny), top)
        tops[k, i : i + top.shape[0], j // BLOCK : j // BLOCK + top.shape[1]] = top
        # zeros stay zeros: a block without any other number has the scale 0 and no quotient
        top = top.clamp(min=torch.finfo(torch.float32).tiny)
        scaled = torch.empty_like(Y)
        for (rows, quotients), at in _blocks_of(Y, scaled):
            torch.div(rows, top[:, at].unsqueeze(-1), out=quotients)
        code = _nearest_codes(scaled.mul_(_CODE_SCALE), signed)
        if not signed:  # what is too small for a float16 keeps the lowest level
            code = torch.maximum(code, (part > 0).to(torch.uint8))
            if rounding is not None:
                row = _row_length(X, scales)
                _take_neighbors_(code, scaled, _bits_of(rounding, k, i, j, code.shape, row))
        rows_of_codes = stored.view(len(X), tops.shape[1], -1)
        rows_of_codes[k, i : i + part.shape[0], j : j + part.shape[1]] = code


def _nearest_codes(scaled: Tensor, signed: bool) -> Tensor:
    """Codes, as unsigned bytes, of the levels nearest to numbers whose largest is 2^15."""
    bits = scaled.half().view(torch.int16).int().bitwise_and_(0xFFFF).flatten()
    return _encoder(signed, scaled.device).index_select(0, bits).view(scaled.shape)


def _bits_of(
    rounding: Rounding, k: int, i: int, j: int, shape: tuple[int, ...], length: int
) -> Tensor:
    """Bits (h w,) int16 for a panel (h, w) of tensor k whose first entry is that at (i, j).

    Args:
        rounding: Its keys and places.
        k: Number of the tensor.
        i: First row.
        j: First column.
        shape: Rows and columns of the panel.
        length: Entries of a row.
    """
    keys = rounding.keys[k : k + 1] if len(rounding.keys) > 1 else rounding.keys
    step = length if rounding.strides is None else rounding.strides[1]
    first = rounding.offset + i * step + j
    if step == length:  # rows of a panel of several are whole
        return random_bits(keys, first, (0, 0, 1), (1, 1, math.prod(shape))).flatten()
    return random_bits(keys, first, (0, step, 1), (1, *shape)).flatten()


def _take_neighbors_(code: Tensor, scaled: Tensor, bits: Tensor) -> None:
    """Move codes of second moments to the level at the other side of the value, by random bits.

    Args:
        code: (h, w) uint8, the nearest levels; 0 only where the value is 0.
        scaled: As code, the roots, 2^15 the largest; overwritten.
        bits: (h w,) int16.
    """
    squares, steps = _level_squares(code.device)
    index = code.flatten().int()
    excess = scaled.flatten().square_().sub_(squares.index_select(0, index))
    side = excess.view(torch.int32) >> 31  # -1 below the level, else 0
    chance = excess.div_(steps.index_select(0, index.sub_(side, alpha=256)))
    moves = (chance > bits.float().add_(2.0**15 + _OWN_LEVEL)).to(torch.int8)
    # bytes wrap, so 255 is -1; a choice by conditions would cost more than all the rest
    change = side.bitwise_or_(1).to(torch.int8).mul_(moves)
    code.add_(change.view(torch.uint8).view(code.shape))


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes and scales stand for, a new contiguous tensor shaped like codes.

    Args:
        codes: Of :func:`quantize_blocks`: int8 with a sign, uint8 without one.
        scales: Of :func:`quantize_blocks`, (K, ..., b); (K, b) has one row for each tensor.
        dtype: Of the result, float32 unless given.
    """
    signed = codes.dtype == torch.int8
    values = _decoder(signed, codes.device)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not codes.numel():
        return out
    work = torch.promote_types(dtype, torch.float32)
    tops = scales.view(len(codes), -1, scales.shape[-1])
    for k, i, j, part in _quantize_panels(codes.view(torch.uint8), scales):
        Y = values.index_select(0, part.flatten().int()).view(part.shape)
        top = tops[k, i : i + part.shape[0], j // BLOCK : j // BLOCK + blockwise_scales(Y.shape[1])]
        for (rows,), at in _blocks_of(Y):
            rows.mul_(top[:, at].unsqueeze(-1))
        if not signed:
            Y = Y.to(work).square_()
            # an accelerator would have to wait for the answer whether squares may have vanished
            if Y.device.type != "cpu" or float(top.min()) ** 2 < _SAFE_SCALE_SQUARE:
                vanished = (Y == 0) & (part > 0)
                Y.masked_fill_(vanished, torch.finfo(dtype).smallest_normal)
        rows_of_out = out.view(len(codes), tops.shape[1], -1)
        rows_of_out[k, i : i + part.shape[0], j : j + part.shape[1]] = Y
    return out


def _row_length(X: Tensor, scales: Tensor) -> int:
    """Entries of a row of X (K, ...) whose blocks have one line of ``scales``."""
    return math.prod(X.shape[scales.dim() - 1 :])


def _quantize_panels(X: Tensor, scales: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Panels (h, w) of the rows of X (K, ...): tensor, first row, first column, entries.

    A panel has whole rows, or whole blocks of one row.
    """
    row = _row_length(X, scales)
    for k, rows in enumerate(X.reshape(len(X), -1, row)):
        height = max(1, _QUANTIZE_PANEL // row)
        for i in range(0, len(rows), height):
            for j in range(0, row, _QUANTIZE_PANEL):
                yield k, i, j, rows[i : i + height, j : j + _QUANTIZE_PANEL]


def _blocks_of(*tensors: Tensor) -> Iterator[tuple[list[Tensor], slice]]:
    """Tensors (h, w) as whole blocks (h, b, 256), then the last one (h, 1, w mod 256)."""
    width = tensors[0].shape[1]
    whole = width // BLOCK
    if whole:
        parts = [X[:, : whole * BLOCK].view(len(X), whole, BLOCK) for X in tensors]
        yield parts, slice(0, whole)
    if width % BLOCK:
        yield [X[:, whole * BLOCK :].unsqueeze(1) for X in tensors], slice(whole, whole + 1)


def _block_tops(Y: Tensor) -> Tensor:
    """The largest magnitude of each block of rows Y (h, w): (h, ceil(w / 256))."""
    tops = [torch.linalg.vector_norm(Z, float("inf"), dim=-1) for (Z,), _ in _blocks_of(Y)]
    return torch.cat(tops, 1) if len(tops) > 1 else tops[0]


# rows, uniformly ----------------------------------------------------------------------------------

ROW_BITS = (8, 4)


def quantize_rows(X: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes q = floor((x - low) / u + 1/2), where u = (high - low) / (2^bits - 1) for every row.

    What :func:`dequantize_rows` gives back differs by u / 2 at most; a constant row is exact.
    Source: the scheme is that of the code of arXiv 2505.17967.

    Args:
        X: (..., n), finite, any strides; not changed.
        bits: 8 or 4.

    Returns:
        codes: uint8, (..., n); under 4 bits (..., ceil(n / 2)), element 2 i in the high half of
            byte i and 2 i + 1 in the low half.
        low: (..., 1), the least of each row, in X's dtype.
        high: (..., 1), the largest.

    Raises:
        ValueError: Another number of bits.
    """
    _check_bits(bits)
    low, high = X.amin(-1, keepdim=True), X.amax(-1, keepdim=True)
    most = 2**bits - 1
    # halves: the range itself may be more than a float holds
    half = (high * 0.5 - low * 0.5) / most
    half = half.masked_fill(half == 0, 1.0)  # a constant row has code 0, never 0 / 0
    codes = (X * 0.5).sub_(low * 0.5).div_(half).add_(0.5).floor_().clamp_(0, most).to(torch.uint8)
    if bits == 8:
        return codes, low, high
    packed = codes[..., 0::2] << 4  # a new tensor
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2]
    return packed, low, high


def dequantize_rows(codes: Tensor, low: Tensor, high: Tensor, bits: int, n: int) -> Tensor:
    """The numbers low + q u that :func:`quantize_rows` stored.

    Args:
        codes: (..., n), or (..., ceil(n / 2)) under 4 bits, uint8.
        low: (..., 1), and
        high: (..., 1): what it returned.
        bits: 8 or 4.
        n: Length of a row.

    Returns:
        (..., n), a new tensor in the dtype of ``low``.

    Raises:
        ValueError: Another number of bits.
    """
    _check_bits(bits)
    if bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(-2)[..., :n]
    return (
        codes.to(low.dtype).mul_((high * 0.5 - low * 0.5) / (2**bits - 1)).add_(low * 0.5).mul_(2)
    )


def _check_bits(bits: int) -> None:
    if bits not in ROW_BITS:
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")
