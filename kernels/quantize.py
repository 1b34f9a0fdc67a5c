"""Optimizer state in 8 bits: one scale for every 256 numbers, or one range for every row.

Source: dynamic block-wise quantization, *8-bit Optimizers via Block-wise Quantization*,
arXiv 2110.02861. Numbers of a block are divided by the largest magnitude in it and rounded to the
nearest of a fixed set of levels, which lie evenly within each decade and twice as densely in each
decade as in the one below, so that what matters most is kept to about 1 % and seven decades are
still told apart.

Two choices of our own. Levels are symmetric, so zero and the largest entry are exact and to store a
block again changes nothing. A second moment is stored as its root: it divides a first moment, whose
decades it then matches, and an entry that was not zero never becomes zero, because a division by it
would blow up where the first moment survived.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["BLOCK", "blockwise_levels", "blockwise_scales", "dequantize_blocks", "quantize_blocks"]

BLOCK = 256
"""Numbers that share a scale."""
_CODE_SCALE = 2.0**15
_SAFE_SCALE_SQUARE = 1e-20
"""Square of a scale from which the lowest level of a root, 1e-8 and more, has a normal square."""
_QUANTIZE_PANEL = 2**17
"""Numbers that are worked on at once, a multiple of BLOCK: bounds the temporaries."""


def blockwise_scales(numel: int) -> int:
    """Number of scales of a tensor.

    Args:
        numel: Its number of entries.
    """
    return -(-numel // BLOCK)


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


def quantize_blocks(X: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Store X in codes and scales, in place.

    Args:
        X: (K, ...) contiguous floats, K tensors that share no block.
        codes: As X, int8 for numbers of either sign, uint8 for second moments (kept as roots).
        scales: (K, blockwise_scales(numel of one)) float32, the largest magnitude of each block.
    """
    signed, K = codes.dtype == torch.int8, X.shape[0]
    table = _encoder(signed, X.device)
    flat, stored = X.reshape(K, -1), codes.view(torch.uint8).view(K, -1)
    for k, i, part in _quantize_panels(flat):
        Y = part.float() if signed else part.sqrt().float()
        rows = _as_block_rows(Y)
        # zeros stay zeros: a block without any other number has the scale 0 and no quotient
        top = torch.linalg.vector_norm(rows, float("inf"), dim=-1)
        if not signed and part.dtype == torch.float64:  # roots may be less than a float32 holds
            has_any = _as_block_rows(part).amax(-1) > 0
            top = torch.where(has_any, top.clamp(min=torch.finfo(torch.float32).tiny), top)
        scales[k, i // BLOCK : i // BLOCK + len(top)] = top
        scaled = rows / top.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1) * _CODE_SCALE
        bits = scaled.half().view(torch.int16).int().bitwise_and_(0xFFFF).flatten()
        code = table.index_select(0, bits[: part.numel()])
        if not signed:  # what is too small for a float16 keeps the lowest level
            code = torch.maximum(code, (part > 0).to(torch.uint8))
        stored[k, i : i + part.numel()] = code


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes and scales stand for, a new contiguous tensor shaped like codes.

    Args:
        codes: Of :func:`quantize_blocks`: int8 with a sign, uint8 without one.
        scales: Of :func:`quantize_blocks`.
        dtype: Of the result, float32 unless given.
    """
    signed, K = codes.dtype == torch.int8, codes.shape[0]
    values = _decoder(signed, codes.device)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    work = torch.promote_types(dtype, torch.float32)
    flat, stored = out.view(K, -1), codes.view(torch.uint8).view(K, -1)
    for k, i, part in _quantize_panels(stored):
        Y = _as_block_rows(values.index_select(0, part.int()))
        top = scales[k, i // BLOCK : i // BLOCK + len(Y)]
        Y = Y * top.unsqueeze(-1)
        if not signed:
            Y = Y.to(work).square_()
            # an accelerator would have to wait for the answer whether squares may have vanished
            if Y.device.type != "cpu" or float(top.min()) ** 2 < _SAFE_SCALE_SQUARE:
                vanished = (Y == 0) & (_as_block_rows(part) > 0)
                Y.masked_fill_(vanished, torch.finfo(dtype).smallest_normal)
        flat[k, i : i + part.numel()] = Y.flatten()[: part.numel()]
    return out


def _quantize_panels(flat: Tensor) -> list[tuple[int, int, Tensor]]:
    K, numel = flat.shape
    starts = range(0, numel, _QUANTIZE_PANEL)
    return [(k, i, flat[k, i : i + _QUANTIZE_PANEL]) for k in range(K) for i in starts]


def _as_block_rows(x: Tensor) -> Tensor:
    """X (N) as rows of BLOCK numbers, the last one filled up with zeros."""
    rest = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, rest)) if rest else x).view(-1, BLOCK)


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
