"""How new values become a weight of low precision: to nearest, by random bits, or compensated.

A weight of bfloat16 or float16 is the grid on which training moves. Rounded to nearest it does not
move at all by steps below half of the distance of its grid points. Two ways keep such steps:

- random bits: a value between two grid points takes the upper one with the probability of its
  distance to the lower one, so that steps are kept on average;
- a residual: what rounding to nearest cuts off is stored in bfloat16 and added before the next
  rounding.

The random bits of an entry are a function h(key, position) of the parameter, the update and the
entry's place in the whole parameter, row by row. So they are the same whether the weight is
stacked, viewed, transposed or cut into shards, on every back end, and after a resume. All of it is
wrapping arithmetic in int32, where >> keeps the sign and >>> does not::

    x = (position mod 2^32 >>> 1) * 0x9E3779B1 + key + (position div 2^32) * 0x632BE5AB
    x = (x ^ x >> 16) * 0x7FEB352D
    x = (x ^ x >> 15) * 0x846CA68B
    x = x ^ x >>> 16
    h = lower 16 bits of x at even positions, upper 16 bits at odd ones

One hash serves two neighbours. As bfloat16 is the upper half of float32, h is added to the bit
pattern of a float32 value, and the lower half is cleared.

Source: stochastic rounding of bfloat16 weights, arXiv 2010.06192; the mixing of bits is a 32-bit
integer hash with low bias, found by search (C. Wellons, hash-prospector).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .hashing import mix64, mix64_of_int

LOW_PRECISION_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of weights that are not always rounded to nearest."""
STEP, HIGH_STEP = 0x9E3779B1 - 2**32, 0x632BE5AB
"""Multiply a pair's number, and the upper word of a position."""
FACTOR_1, FACTOR_2 = 0x7FEB352D, 0x846CA68B - 2**32
_CACHED_PAIRS = 2**16
_SMALLEST_HALF = 2.0**-14
"""Smallest normal number of float16; below it all distances of grid points are 2^-24."""
_PURPOSE = 0x726F756E64  # other draws of the same seed and parameter have other bits


def _signed(x: int, bits: int = 32) -> int:
    """An integer modulo 2^bits as two's complement."""
    half = 1 << bits - 1
    return (x + half) % (1 << bits) - half


def parameter_keys(seed: int, indices: Sequence[int], device: torch.device) -> Tensor:
    """The part of the keys that lasts from step to step.

    Args:
        seed: The seed of the optimizer.
        indices: 63 bits for every parameter, a hash of its name or its position.
        device: Where the weights are.

    Returns:
        (K,) int64.
    """
    mixed = _signed(mix64_of_int(seed ^ _PURPOSE), 64)
    return mix64(torch.tensor(list(indices), dtype=torch.int64, device="cpu") ^ mixed).to(device)


def rounding_keys(keys: Tensor, t: int | Tensor, number: int = 0) -> Tensor:
    """The keys of one write.

    Args:
        keys: (K,) int64, from :func:`parameter_keys`.
        t: Number of the update, or (K,) integers on the device.
        number: Number of the write within the update (0).

    Returns:
        (K,) int32.
    """
    if len(keys) == 1 and keys.device.type == "cpu" and isinstance(t, int):
        key = mix64_of_int(int(keys) ^ (t + (number << 48)))  # a tenth of the time
        return torch.tensor([_signed(key ^ key >> 32)], dtype=torch.int32, device="cpu")
    x = mix64(keys ^ (t + (number << 48)))
    x = (x ^ x >> 32) & 0xFFFFFFFF
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


@dataclass(frozen=True)
class Rounding:
    """How the values of K matrices (K, m, n) are rounded into a weight of low precision.

    Attributes:
        keys: (K,) or (1,) int32, the keys of random bits.
        offset: Position of the first entry in its parameter (0).
        strides: By how much positions grow along matrices, rows and columns; None (default) for
            tensors of any shape whose entries are neighbours row by row.
        residual: None (default), or (K, m, n) bfloat16: what earlier writes have cut off. The
            weight is rounded to nearest then, and the residual by random bits: to nearest it would
            miss 1 to 2 % of a constant step.
        error: None (default), or (K, m, n) float32, which takes what this write cuts off.
        pairs: None (default), or (K,) int64 for one row of K whole parameters, each from an even
            place: how many pairs of neighbours each has.
    """

    keys: Tensor
    offset: int = 0
    strides: tuple[int, int, int] | None = None
    residual: Tensor | None = None
    error: Tensor | None = None
    pairs: Tensor | None = None

    @property
    def mT(self) -> Rounding:
        """The same for the transposed weight."""
        residual, error = (None if X is None else X.mT for X in (self.residual, self.error))
        transposed = replace(self, residual=residual, error=error)
        if self.strides is None:
            return transposed
        step_k, step_m, step_n = self.strides
        return replace(transposed, strides=(step_k, step_n, step_m))

    def part(self, panel: Sequence[slice]) -> Rounding:
        """The same for a panel: slices of matrices and, if given, of rows and columns."""
        panel = tuple(panel)
        if not panel:
            return self
        assert self.strides is not None
        keys = self.keys[panel[0]] if len(self.keys) > 1 else self.keys
        starts = [s.start or 0 for s in panel]
        offset = self.offset + sum(
            start * step for start, step in zip(starts, self.strides, strict=False)
        )
        residual, error = (None if X is None else X[panel] for X in (self.residual, self.error))
        return Rounding(keys, offset, self.strides, residual, error)

    def round_into_(self, target: Tensor, X: Tensor) -> None:
        """Write X into target, of low precision, and keep what is cut off where that is wanted.

        Args:
            target: (K, m, n), any strides, or any shape where ``strides`` is None.
            X: float32 of target's shape, may be overwritten; the residual was added before.
        """
        if self.residual is not None:
            target.copy_(X)
            X.sub_(target).nan_to_num_(0.0, 0.0, 0.0)  # what is not finite leaves nothing to add
            round_stochastically_(self.residual, X, self.bits(tuple(X.shape)))
            return
        exact = None if self.error is None else X.clone()
        round_stochastically_(target, X, self.bits(tuple(X.shape)))
        if self.error is not None and exact is not None:
            torch.sub(exact, target, out=exact)
            self.error.copy_(exact.nan_to_num_(0.0, 0.0, 0.0))

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        """16 random bits for every entry, as int16 of this shape."""
        if self.pairs is not None:
            return joined_bits(self.keys, self.pairs, math.prod(shape))
        if self.strides is None:
            row = (1, 1, math.prod(shape))
            return random_bits(self.keys, self.offset, (0, 0, 1), row).view(shape)
        return random_bits(self.keys, self.offset, self.strides, shape)


def random_bits(
    keys: Tensor, offset: int, strides: tuple[int, int, int], shape: tuple[int, ...]
) -> Tensor:
    """H of the module's text for the entries of K matrices.

    Args:
        keys: (K,) or (1,) int32.
        offset: Position of the first entry in its parameter.
        strides: By how much positions grow along matrices, rows and columns.
        shape: (K, m, n).

    Returns:
        (K, m, n) int16: the bits with the highest one as the sign.
    """
    last = offset + sum(max(0, s - 1) * d for s, d in zip(shape, strides, strict=True))
    lines = _lines(strides, shape, len(keys))
    if lines is None or last >> 32 != offset >> 32:
        return _bits_of_single_entries(keys, offset, strides, shape)
    matrices, rows, count = lines
    # pairs of entries: the first may begin with an odd position
    odd, pairs = offset & 1, (count + (offset & 1) + 1) // 2
    first = _signed((offset % 2**32 >> 1) * STEP + (offset >> 32) * HIGH_STEP)
    starts = keys.view(-1, 1) + first
    for side, step, shape_of in ((matrices, strides[0], (-1, 1)), (rows, strides[1], (1, -1))):
        if side > 1 and step:
            along = torch.arange(side, dtype=torch.int32, device=keys.device)
            starts = starts + along.mul_(_signed(step // 2 * STEP)).view(shape_of)
    starts = starts.expand(matrices, rows).reshape(-1, 1)
    x = _mixed(starts + _steps(pairs, keys.device)).view(torch.int16)
    return x[:, odd : odd + count].reshape(shape)


def joined_bits(keys: Tensor, pairs: Tensor, count: int) -> Tensor:
    """``random_bits`` of a row of whole parameters, each from an even place.

    Args:
        keys: (K,) int32.
        pairs: (K,) int64, how many pairs of neighbours each parameter has.
        count: Entries of the row, 2 for each pair.

    Returns:
        (count,) int16.
    """
    # pairs are counted along the row, so each key takes back the count at which its own begin
    starts = (pairs.cumsum(0) - pairs).to(torch.int32) * STEP
    x = torch.repeat_interleave(keys - starts, pairs, output_size=count // 2)
    return _mixed(x.add_(_steps(count // 2, keys.device))).view(torch.int16)


def _lines(
    strides: tuple[int, int, int], shape: tuple[int, ...], keys: int
) -> tuple[int, int, int] | None:
    """Lines of neighbours whose first positions are all even or all odd; None if there are none.

    Returns:
        How many matrices, rows of each, and neighbours in a line; what has neighbours across rows
        or matrices counts as one row or matrix.
    """
    (K, m, n), (step_k, step_m, step_n) = shape, strides
    if n > 1 and step_n != 1:
        return None
    if m == 1 or step_m == n:
        m, n = 1, m * n
        if K > 1 and step_k == n and keys == 1:
            return 1, 1, K * n
    elif step_m % 2:
        return None
    return None if K > 1 and step_k % 2 else (K, m, n)


def _steps(pairs: int, device: torch.device) -> Tensor:
    """(pairs,) int32, multiples of STEP."""
    if device.type == "cpu" and pairs <= _CACHED_PAIRS:
        return _cached_steps(device)[:pairs]
    return torch.arange(pairs, dtype=torch.int32, device=device).mul_(STEP)


@lru_cache(maxsize=1)
def _cached_steps(device: torch.device) -> Tensor:
    return torch.arange(_CACHED_PAIRS, dtype=torch.int32, device=device).mul_(STEP)


def _mixed(x: Tensor) -> Tensor:
    """The last three lines of x in the module's text, in place; int32."""
    shifted = x >> 16
    x.bitwise_xor_(shifted).mul_(FACTOR_1)
    torch.bitwise_right_shift(x, 15, out=shifted)
    x.bitwise_xor_(shifted).mul_(FACTOR_2)
    torch.bitwise_right_shift(x, 16, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(0xFFFF))


def _bits_of_single_entries(
    keys: Tensor, offset: int, strides: tuple[int, int, int], shape: tuple[int, ...]
) -> Tensor:
    """``random_bits`` with a hash for every entry, for positions that come in no pairs."""
    position = torch.full((), offset, dtype=torch.int64, device=keys.device)
    for dim, (side, step) in enumerate(zip(shape, strides, strict=True)):
        along = torch.arange(side, dtype=torch.int64, device=keys.device) * step
        position = position + along.view(*(-1 if d == dim else 1 for d in range(3)))
    pair = (position & 0xFFFFFFFF) >> 1
    key = keys.view(-1, 1, 1) + (position >> 32).to(torch.int32) * HIGH_STEP
    x = _mixed(pair.to(torch.int32) * STEP + key)
    return (x >> (position & 1).mul(16).to(torch.int32)).to(torch.int16)


def round_stochastically_(target: Tensor, X: Tensor, bits: Tensor) -> None:
    """Round float32 values to a grid point below or above, and write them.

    The mean over all bits is the value itself, but where the upper one is infinite. Grid points,
    infinities and NaN stay as they are.

    Args:
        target: bfloat16 or float16.
        X: float32 of the same shape; it is overwritten.
        bits: int16 of the same shape.
    """
    # one sum is cheaper than a comparison of every entry, and makes no mistake that matters: a sum
    # that overflows only costs time
    some_bad = X.device.type != "cpu" or not math.isfinite(float(X.sum()))
    bad = ~X.isfinite() if some_bad else None
    old = X.to(target.dtype) if some_bad else None
    pattern = X.view(torch.int32)
    if target.dtype == torch.bfloat16:
        pattern.add_(bits).add_(0x8000).bitwise_and_(-0x10000)
    else:
        _truncate_to_half_(X, pattern, (bits.to(torch.int32) + 0x8000) >> 3)
    if bad is None:
        target.copy_(X)
    else:
        assert old is not None
        target.copy_(torch.where(bad, old, X.to(target.dtype)))


def _truncate_to_half_(X: Tensor, pattern: Tensor, bits: Tensor) -> None:
    """Add 13 random bits and clear them, as float16 has them: below its normal numbers in units."""
    tiny = X.abs() < _SMALLEST_HALF
    # so shifted, small values have the bits of the numbers just above the smallest normal one
    shift = torch.where(tiny, _SMALLEST_HALF, 0.0).copysign(X)
    X.add_(shift)
    pattern.add_(bits).bitwise_and_(-0x2000)
    sign = X.clone()
    X.sub_(shift).copysign_(sign)
