"""The one place of the kernels that rounds a weight: to nearest, or by random bits.

Plain torch's counterpart is ``update_weight_`` in ``reference/write.py``. Nothing else rounds
weights, but torch's own AdamW. The random bits are those of ``reference/rounding.py``, made while
the tile is in registers: a mode of rounding costs no pass over memory. Residuals and errors are
kept by plain torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import rounding as plain
from ..reference.rounding import LOW_PRECISION_DTYPES, Rounding
from ._launch import Case

NEAREST, COLUMN_PAIRS, ROW_PAIRS, SINGLE, FAR = range(5)
"""How random bits are made: not at all; a hash for two neighbours of a row or of a column; a hash
for every entry; the same with positions from 2^32 on, whose high words differ."""
STEP, HIGH_STEP = tl.constexpr(plain.STEP), tl.constexpr(plain.HIGH_STEP)
FACTOR_1, FACTOR_2 = tl.constexpr(plain.FACTOR_1), tl.constexpr(plain.FACTOR_2)
QUIET_NAN = tl.constexpr(0x7FC00000)
SMALLEST_HALF = tl.constexpr(2.0**-14)


@triton.jit
def plus(x, y):
    """The sum of integers, wrapping: also under TRITON_DEBUG, which refuses an overflow of +."""
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def times_wrapped(x, y):
    """The product of integers, wrapping."""
    return tl.mul(x, y, sanitize_overflow=False)


@triton.jit
def hashed(keys, keys_k, first, step_k, step_m, step_n, k, rows, cols, ROUNDING: tl.constexpr):
    """X of the text of ``reference/rounding.py`` for a tile, and which half an entry takes.

    Two neighbours have equal terms here, of which the compiler makes one: a shift by one drops the
    only bit in which two numbers of rows or columns of one thread differ.
    """
    key = tl.load(keys + k * keys_k)
    if ROUNDING == 4:
        wide = rows.to(tl.int64) * step_m + cols.to(tl.int64) * step_n
        wide += k.to(tl.int64) * step_k + first
        key = plus(key, times_wrapped((wide >> 32).to(tl.int32), HIGH_STEP))
        at = wide.to(tl.int32)
        x, odd = plus(times_wrapped((at >> 1) & 0x7FFFFFFF, STEP), key), at & 1
    else:
        k, rows, cols = k.to(tl.int32), rows.to(tl.int32), cols.to(tl.int32)
        start = plus(times_wrapped(k, step_k), first)
        if ROUNDING == 3:
            at = plus(times_wrapped(rows, step_m), times_wrapped(cols, step_n))
            at = plus(at, start)
            x, odd = plus(times_wrapped((at >> 1) & 0x7FFFFFFF, STEP), key), at & 1
        elif ROUNDING == 2:
            column = plus(times_wrapped(cols, step_n), plus(start, key))
            x, odd = plus(times_wrapped(rows >> 1, STEP), column), rows & 1
        else:
            row = plus(times_wrapped(rows, step_m), plus(start, key))
            x, odd = plus(row, times_wrapped(cols >> 1, STEP)), cols & 1
    x = times_wrapped(x ^ (x >> 16), FACTOR_1)
    x = times_wrapped(x ^ (x >> 15), FACTOR_2)
    return x ^ ((x >> 16) & 0xFFFF), odd


@triton.jit
def rounded(value, bits, ROUNDING: tl.constexpr, TYPE: tl.constexpr):
    """A tile of float32 at a grid point of TYPE below or above, by 16 random bits for each entry.

    As ``round_stochastically_`` of plain torch does it. Grid points and infinities lose nothing by
    the carry, NaN stays NaN.
    """
    pattern = value.to(tl.int32, bitcast=True)
    sign = pattern & -0x80000000
    if TYPE == tl.bfloat16:
        # a carry into the sign must not make a number of NaN; both ways give the same bits, and
        # each has the registers that the other one spills
        if ROUNDING == 2:
            pattern = tl.where(value == value, plus(pattern, bits), QUIET_NAN)
        else:
            pattern = plus(tl.minimum(pattern & 0x7FFFFFFF, QUIET_NAN), bits) | sign
        return (pattern >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        shift = tl.where(tl.abs(value) < SMALLEST_HALF, SMALLEST_HALF, 0.0)
        shift = (shift.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        pattern = plus((value + shift).to(tl.int32, bitcast=True), bits >> 3) & -0x2000
        cut = pattern.to(tl.float32, bitcast=True) - shift
        pattern = (cut.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | sign
        return tl.where(value == value, pattern.to(tl.float32, bitcast=True), value).to(TYPE)


@triton.jit
def store_weight(
    pointers, value, mask, keys, keys_k, first, step_k, step_m, step_n, k, rows, cols,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """Round a tile of new values, float32, to the weight's dtype, and store it.

    Together with ``update_weight_`` of plain torch this function is all that rounds weights.

    Args:
        pointers: Where the tile is stored.
        value: Its new values.
        mask: Which of them are stored.
        keys: The keys of random bits, int32; None to round to nearest.
        keys_k: From the key of a matrix to that of the next one.
        first: Of the matrices' first entry, see ``launched``; as are the steps along matrices,
            rows and columns.
        step_k: See above.
        step_m: See above.
        step_n: See above.
        k: Number of the matrix.
        rows: Numbers of the tile's rows, so that they broadcast against the columns.
        cols: Numbers of its columns.
        ROUNDING: One of the five ways above.
    """
    if ROUNDING == 0:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)
    else:
        x, odd = hashed(keys, keys_k, first, step_k, step_m, step_n, k, rows, cols, ROUNDING)
        # plain torch takes the bits for a number with a sign and adds 2^15: the highest one flips
        x ^= -0x7FFF8000
        bits = tl.where(odd != 0, x >> 16, x) & 0xFFFF
        value = rounded(value, bits, ROUNDING, pointers.dtype.element_ty)
        tl.store(pointers, value, mask=mask)


# launchers ----------------------------------------------------------------------------------------


class Bits(NamedTuple):
    """What an operation of ``torch.library`` takes of a rounding.

    Attributes:
        keys: (K,) or (1,) int32; None to round to nearest.
        positions: The first one, and how they grow along matrices, rows and columns.
    """

    keys: Tensor | None
    positions: Sequence[int]

    @property
    def rounding(self) -> Rounding | None:
        """What they were taken from."""
        if self.keys is None:
            return None
        first, step_k, step_m, step_n = self.positions
        return Rounding(self.keys, first, (step_k, step_m, step_n))

    @property
    def mT(self) -> Bits:
        """The same for the transposed weight."""
        if self.keys is None:
            return self
        first, step_k, step_m, step_n = self.positions
        return Bits(self.keys, [first, step_k, step_n, step_m])

    def launched(self, shape: Sequence[int]) -> tuple[tuple[Any, ...], int]:
        """The arguments of a kernel for random bits, and how they are made.

        Pairs of neighbours have even strides in all other directions and an even first position.
        Their numbers come multiplied already, so that the tile takes one addition for each.
        """
        if self.keys is None:
            return (None,) * 6, NEAREST
        if len(self.keys) not in (1, shape[0]):
            raise ValueError(f"keys must have 1 or {shape[0]} entries, got {len(self.keys)}")
        first, *steps = self.positions
        keys_k = 0 if len(self.keys) == 1 else self.keys.stride(0)
        last = first + sum((s - 1) * d for s, d in zip(shape, steps, strict=True))
        # a side of length 1 has no neighbours, whatever its stride
        step_k, step_m, step_n = (d if s > 1 else 0 for s, d in zip(shape, steps, strict=True))
        odd = [step % 2 for step in (first, step_k, step_m, step_n)]
        pairs = NEAREST
        if last >> 32 == first >> 32:
            if step_n == 1 and not any(odd[:3]):
                pairs = COLUMN_PAIRS
            elif step_m == 1 and not any((*odd[:2], odd[3])):
                pairs = ROW_PAIRS
        if pairs:
            start = (first % 2**32 >> 1) * plain.STEP + (first >> 32) * plain.HIGH_STEP
            multiplied = (step // 2 * plain.STEP for step in (step_k, step_m, step_n))
            return (self.keys, keys_k, *map(_signed, (start, *multiplied))), pairs
        if last >> 32 == 0:
            return (self.keys, keys_k, *map(_signed, (first, step_k, step_m, step_n))), SINGLE
        return (self.keys, keys_k, first, step_k, step_m, step_n), FAR


def _signed(x: int) -> int:
    """An integer modulo 2^32 as two's complement."""
    return (x + 2**31) % 2**32 - 2**31


def drawn(rounding: Rounding | None, dtype: torch.dtype, shape: Sequence[int]) -> Bits:
    """The random bits of a weight; none for one that is rounded to nearest."""
    if rounding is None or dtype not in LOW_PRECISION_DTYPES:
        return Bits(None, [])
    _, m, n = shape
    strides = (m * n, n, 1) if rounding.strides is None else rounding.strides
    return Bits(rounding.keys, [rounding.offset, *strides])


def is_plain(rounding: Rounding | None) -> bool:
    """Whether what rounding cuts off is to be kept, which kernels do not do."""
    return rounding is not None and (rounding.residual is not None or rounding.error is not None)


_NUMBERS = ("h_0", "h_k", "h_m", "h_n")


def with_rounding(case: Case, way: int) -> Case:
    """A static case whose weight is rounded in one of the five ways, with a key for each matrix."""
    types, constants = dict(case.types), dict(case.constants)
    for name in ("keys", "keys_k", *_NUMBERS):
        types.pop(name, None)
    if way == NEAREST:
        constants |= dict.fromkeys(("keys", "keys_k", *_NUMBERS))
    else:
        types |= {"keys": "*i32", **dict.fromkeys(_NUMBERS, "i64" if way == FAR else "i32")}
        constants["keys_k"] = 1
    return replace(
        case, types=types, constants=constants | {"ROUNDING": way}, loose=(*case.loose, *_NUMBERS)
    )
