"""A uniform quantiser with one bucket per row: 8 bits, or 4 bits of which two share a byte."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (8, 4)


def quantise_rows(X: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes q = floor((x - low) / u + 1/2), where u = (high - low) / (2^bits - 1) for every row.

    What :func:`dequantise_rows` gives back differs by u / 2 at most; a constant row is exact.
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
    _check(bits)
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


def dequantise_rows(codes: Tensor, low: Tensor, high: Tensor, bits: int, n: int) -> Tensor:
    """The numbers low + q u that :func:`quantise_rows` stored.

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
    _check(bits)
    if bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(-2)[..., :n]
    return (
        codes.to(low.dtype).mul_((high * 0.5 - low * 0.5) / (2**bits - 1)).add_(low * 0.5).mul_(2)
    )


def _check(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")
