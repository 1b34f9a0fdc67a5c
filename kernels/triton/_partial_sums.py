"""Sums over matrices that a pass takes by the way: of squares, of powers, of what is not finite.

A tile leaves its partial sums in scratch memory, and a second kernel adds those in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Case, config, options, scratch
from ._pointer_lists import Operand


@triton.jit
def put_sums(
    u, parts, k, i, j, down, across, m, n, count, WANTED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Partial sums of tile (i, j) of down x across into parts; u is 0 beside the matrix."""
    batch = k.to(tl.int64)
    tile = (batch * down + i) * across + j
    if WANTED == "rows":
        rows = i * BM + tl.arange(0, BM)
        place = parts + (batch * across + j) * m + rows
        tl.store(place, tl.sum(u * u, axis=1), mask=rows < m)
    if WANTED == "cols":
        cols = j * BN + tl.arange(0, BN)
        place = parts + (batch * down + i) * n + cols
        tl.store(place, tl.sum(u * u, axis=0), mask=cols < n)
    if WANTED == "all":
        tl.store(parts + tile, tl.sum(tl.sum(u * u, axis=1), axis=0))
    if WANTED == "finite":
        bad = tl.where(tl.abs(u) < float("inf"), 0.0, 1.0)
        tl.store(parts + tile, tl.sum(tl.sum(bad, axis=1), axis=0))
    if WANTED == "powers":
        # a power of two brings the largest entry into [1, 4): no power overflows, no digit is lost
        top = tl.max(tl.max(tl.abs(u), axis=1), axis=0)
        exponent = tl.minimum(top.to(tl.int32, bitcast=True) >> 23, 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        tiles = down * across
        place = parts + batch * (count + 1) * tiles + i * across + j
        tl.store(place, scale)
        q = u * scale
        q = q * q
        power = q
        for _ in range(count):
            place += tiles
            tl.store(place, tl.sum(tl.sum(power, axis=1), axis=0))
            power = power * q


@triton.jit
def fold_block(parts, k, cols, count, length, BT: tl.constexpr, BL: tl.constexpr):
    """Sums of columns of parts (K, count, length): BT at a time, so that loads wait together."""
    rows = tl.arange(0, BT)
    acc = tl.zeros((BT, BL), tl.float32)
    for start in range(0, count, BT):
        at = (start + rows).to(tl.int64)[:, None]
        place = parts + (k * count + at) * length + cols[None, :]
        acc += tl.load(place, mask=(at < count) & (cols[None, :] < length), other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def fold_kernel(
    parts, out, count, length, scale, FLAG: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """The same, times scale; grid (tiles of length, matrices)."""
    k = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BL + tl.arange(0, BL)
    found = fold_block(parts, k, cols, count, length, BT, BL) * scale
    if FLAG:  # of the entries that are not finite
        found = tl.where(found == 0.0, 1.0, 0.0)
    tl.store(out + k * length + cols, found, mask=cols < length)


@triton.jit
def fold_powers_kernel(parts, norm, out, tiles, count, BT: tl.constexpr):
    """From sums of tiles of scales of their own to those of a matrix; grid (count, matrices)."""
    c, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts += k * (count + 1) * tiles
    rows = tl.arange(0, BT)
    acc = tl.zeros((BT,), tl.float64)
    for start in range(0, tiles, BT):
        mask = start + rows < tiles
        scale = tl.load(parts + start + rows, mask=mask, other=1.0).to(tl.float64)
        size = tl.load(parts + tiles + start + rows, mask=mask, other=0.0).to(tl.float64)
        acc += size / (scale * scale)
    squares = tl.sum(acc, axis=0)
    acc = tl.zeros((BT,), tl.float64)
    for start in range(0, tiles, BT):
        mask = start + rows < tiles
        scale = tl.load(parts + start + rows, mask=mask, other=1.0).to(tl.float64)
        share = 1.0 / tl.where(squares == 0.0, 1.0, squares * (scale * scale))
        share = tl.where(mask, share, 0.0)
        power = share
        for _ in range(c):
            power = power * share
        size = tl.load(parts + (1 + c) * tiles + start + rows, mask=mask, other=0.0)
        acc += size.to(tl.float64) * power
    tl.store(out + k * count + c, tl.sum(acc, axis=0))
    if c == 0:
        tl.store(norm + k, tl.sqrt(squares))


class PartialSums:
    """Where a pass puts partial sums, and what becomes of them.

    Args:
        X: The operand, seen as it lies in memory.
        wanted: ``"rows"``, ``"cols"``, ``"all"``, ``"finite"``, ``"powers"``, or ``""``.
        tile_sizes: Of the pass.
        count: How many powers.
    """

    def __init__(self, X: Operand, wanted: str, tile_sizes: dict[str, int], count: int = 0) -> None:
        K, m, n = X.shape
        self.down, self.across = triton.cdiv(m, tile_sizes["BM"]), triton.cdiv(n, tile_sizes["BN"])
        self.X, self.wanted, self.count = X.first, wanted, count
        self.parts: Tensor | None = None
        if not wanted:
            return
        if wanted == "powers":
            shape = (K, count + 1, self.down * self.across)
        elif wanted in ("rows", "cols"):
            shape = (K, self.across, m) if wanted == "rows" else (K, self.down, n)
        else:
            shape = (K, self.down * self.across, 1)
        # sums of one tile are what is wanted
        alone = shape[1] == 1 and wanted != "finite"
        if alone:
            self.parts = self.X.new_empty(shape, dtype=torch.float32)
        else:
            self.parts = scratch(self.X, *shape)
        self.alone = alone

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The sums (K, length), and the norm (K, 1, 1) of "powers"."""
        X, parts = self.X, self.parts
        if parts is None:
            return X.new_empty(0, dtype=torch.float32), X.new_empty(0, dtype=torch.float64)
        K, tiles, length = parts.shape
        if self.wanted == "powers":
            tiles = length
            norm = X.new_empty(K, 1, 1, dtype=torch.float64)
            sums = X.new_empty(K, self.count, dtype=torch.float64)
            chosen = config("fold_powers", X, 1)
            fold_powers_kernel[(self.count, K)](
                parts, norm, sums, tiles, self.count, **options(chosen)
            )
            return sums, norm
        none = X.new_empty(0, dtype=torch.float64)
        if self.alone:
            return parts.view(K, length), none
        return fold(parts, flag=self.wanted == "finite"), none


def fold(parts: Tensor, scale: float = 1.0, flag: bool = False) -> Tensor:
    """Sums (K, length) of partial ones (K, count, length), always in the same order, times scale.

    With `flag` 1 where the sum is 0, else 0. To be called where the device of parts is current.
    """
    K, count, length = parts.shape
    out = parts.new_empty(K, length)
    chosen = options(config("fold", parts, 1))
    if length == 1:
        chosen["BT"], chosen["BL"] = chosen["BT"] * chosen["BL"], 1
    grid = (triton.cdiv(length, chosen["BL"]), K)
    fold_kernel[grid](parts, out, count, length, scale, FLAG=flag, **chosen)
    return out


def shaped(sums: Tensor, which: str) -> Tensor:
    """Sums (K, length) as ``momentum_step_`` and ``squares`` give them."""
    return sums.unsqueeze(-1) if which == "rows" else sums.unsqueeze(-2)


def transposed_sums(wanted: str, transposed: bool) -> str:
    """What is wanted of the transposed matrices."""
    return {"rows": "cols", "cols": "rows"}.get(wanted, wanted) if transposed else wanted


def length_of(X: Tensor, wanted: str) -> int:
    """How many sums a matrix has."""
    return {"rows": X.shape[-2], "cols": X.shape[-1]}.get(wanted, 1)


def empty_results(X: Tensor, K: int, wanted: str, count: int) -> tuple[Tensor, Tensor]:
    """Empty results: sums, and the norm where powers are wanted. For fakes."""
    if wanted == "powers":
        sizes, double = ((K, count), (K, 1, 1)), torch.float64
        return X.new_empty(sizes[0], dtype=double), X.new_empty(sizes[1], dtype=double)
    sums = (K, length_of(X, wanted)) if wanted else (0,)
    return X.new_empty(sums, dtype=torch.float32), X.new_empty(0, dtype=torch.float64)


def zero_results(X: Tensor, K: int, wanted: str, count: int) -> tuple[Tensor, Tensor]:
    """What is wanted of matrices without entries."""
    sums, norm = empty_results(X, K, wanted, count)
    return sums.fill_(1.0 if wanted == "finite" else 0.0), norm.zero_()


CASES = [
    Case(
        "fold", "fold", fold_kernel, {"parts": "*fp32", "out": "*fp32", "count": "i32",
        "length": "i32", "scale": "fp32"}, {"FLAG": False}, loose=("count",), blocks=2,
    ),
    Case(
        "fold_powers", "fold_powers", fold_powers_kernel, {"parts": "*fp32", "norm": "*fp64",
        "out": "*fp64", "tiles": "i32", "count": "i32"}, loose=("count",), blocks=2,
    ),
]  # fmt: skip
