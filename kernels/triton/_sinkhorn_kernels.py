"""Kernels of ``sinkhorn``: the largest entry, squared factors by rows and by columns, the result.

A line is a row of the memory, whether of X or of the transpose of X; factors along belong to lines,
those across to places on a line. All of a matrix is relative to its largest entry.
"""

import triton
import triton.language as tl

from ._partial_sums import fold_block


@triton.jit
def inverse(largest, tiny):
    """1 / largest, and 0 for a zero matrix or an infinite one (whose entries become NaN)."""
    known = (largest > tiny) & (largest < float("inf"))
    one = tl.full(largest.shape, 1.0, tl.float32)
    return tl.where(known, tl.div_rn(one, tl.where(known, largest, 1.0)), 0.0)


@triton.jit
def unscaled(mean, floor):
    """1 / max(mean, floor); NaN stays."""
    return tl.div_rn(
        tl.full(mean.shape, 1.0, tl.float32), tl.where(mean < floor, floor, mean)
    )  # fmt: skip


@triton.jit
def measure_kernel(
    X, largest, sums, m, n, x_k, x_m, x_n, tiny, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Of every tile the largest entry, and the squares relative to it; grid (tiles, matrices)."""
    tiles = tl.cdiv(n, BN)
    batch = tl.program_id(1).to(tl.int64)  # a stack may have more than 2^31 elements
    rows = ((tl.program_id(0) // tiles) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = ((tl.program_id(0) % tiles) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    mask = (rows < m) & (cols < n)
    x = tl.load(X + batch * x_k + rows * x_m + cols * x_n, mask=mask, other=0.0).to(tl.float32)
    top = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    x = x * inverse(top, tiny)  # NaN and Inf * 0 show in the sum
    at = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(largest + at, top)
    tl.store(sums + at, tl.sum(tl.sum(x * x, axis=1), axis=0))


@triton.jit
def measured_kernel(largest, sums, facts, tiles, scale, tiny, BN: tl.constexpr):
    """1 / max|X| and the mean square of X / max|X|, 1 for a zero matrix; grid (1, matrices)."""
    batch = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, BN)
    top = tl.zeros((BN,), tl.float32)
    for start in range(0, tiles, BN):
        at = batch * tiles + start + tile
        top = tl.maximum(top, tl.load(largest + at, mask=tile < tiles - start, other=0.0))
    inv = inverse(tl.max(top, axis=0), tiny)
    acc = tl.zeros((BN,), tl.float32)
    for start in range(0, tiles, BN):
        at, left = batch * tiles + start + tile, tile < tiles - start
        x = tl.load(largest + at, mask=left, other=0.0) * inv
        acc += tl.load(sums + at, mask=left, other=0.0) * (x * x)
    mean = tl.sum(acc, axis=0) * scale
    tl.store(facts + 2 * batch, inv)
    tl.store(facts + 2 * batch + 1, tl.where(mean == 0.0, 1.0, mean))


@triton.jit
def lines_kernel(
    X, out, facts, across, along, parts, m, n, length, x_k, x_m, x_n, o_k, o_m, o_n, scale, floor,
    EVEN: tl.constexpr, MEAN: tl.constexpr, OUT: tl.constexpr, SUMS: tl.constexpr,
    WHOLE: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Factors `along` of `length` lines from those across, and sums across with the new ones.

    EVEN: factors across are all 1 / mean. MEAN: the floor is one of the mean. The grid is (line
    bands, matrices). WHOLE: a tile has all of a line.
    """
    batch = tl.program_id(1).to(tl.int64)
    X += batch * x_k
    if OUT:
        out += batch * o_k
    inv, mean = tl.load(facts + 2 * batch), tl.load(facts + 2 * batch + 1)
    if MEAN:
        floor *= mean
    first = tl.program_id(0) * length
    cols = tl.arange(0, BN).to(tl.int64)[None, :]
    line = tl.arange(0, R)
    acc = tl.zeros((R, BN), tl.float32)
    c = tl.full((1, BN), 1.0, tl.float32)
    if WHOLE and not EVEN:
        c = tl.load(across + batch * n + cols, mask=cols < n, other=0.0)
    for start in range(first, tl.minimum(first + length, m), R):
        row = (start + line).to(tl.int64)
        rows = row[:, None]
        at = X + rows * x_m
        if WHOLE:
            mask = (rows < m) & (cols < n)
            x = tl.load(at + cols * x_n, mask=mask, other=0.0).to(tl.float32) * inv
            s = tl.sum((x * x) * c, axis=1) * scale
        else:
            sums = tl.zeros((R, BN), tl.float32)
            for j in range(0, n, BN):
                mask = (rows < m) & (cols < n - j)
                x = tl.load(at + (cols + j) * x_n, mask=mask, other=0.0).to(tl.float32) * inv
                c = tl.load(across + batch * n + cols + j, mask=cols < n - j, other=0.0)
                sums += (x * x) * (1.0 if EVEN else c)
            s = tl.sum(sums, axis=1) * scale
        f = unscaled(s / mean if EVEN and not MEAN else s, floor)
        tl.store(along + batch * m + row, f, mask=row < m)
        root = tl.sqrt_rn(f)[:, None]
        if WHOLE:
            if SUMS:
                acc += (x * x) * f[:, None]
            if OUT:
                o = x * root * (1.0 if EVEN else tl.sqrt_rn(c))
                tl.store(out + rows * o_m + cols * o_n, o.to(out.dtype.element_ty), mask=mask)
        elif OUT:
            for j in range(0, n, BN):
                mask = (rows < m) & (cols < n - j)
                x = tl.load(at + (cols + j) * x_n, mask=mask, other=0.0).to(tl.float32) * inv
                c = tl.load(across + batch * n + cols + j, mask=cols < n - j, other=0.0)
                o = x * root * (1.0 if EVEN else tl.sqrt_rn(c))
                o = o.to(out.dtype.element_ty)
                tl.store(out + rows * o_m + (cols + j) * o_n, o, mask=mask)
    if SUMS:
        at = (batch * tl.num_programs(0) + tl.program_id(0)) * n + tl.arange(0, BN)
        tl.store(parts + at, tl.sum(acc, axis=0), mask=tl.arange(0, BN) < n)


@triton.jit
def across_kernel(
    X, facts, along, parts, m, n, length, x_k, x_m, x_n,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums across of `length` lines, all of one factor if EVEN; grid (bands * tiles, matrices)."""
    tiles = tl.cdiv(n, BN)
    band = tl.program_id(0) // tiles
    batch = tl.program_id(1).to(tl.int64)
    X += batch * x_k
    inv = tl.load(facts + 2 * batch)
    col = ((tl.program_id(0) % tiles) * BN + tl.arange(0, BN)).to(tl.int64)
    cols = col[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(band * length, tl.minimum((band + 1) * length, m), BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)[:, None]
        mask = (rows < m) & (cols < n)
        x = tl.load(X + rows * x_m + cols * x_n, mask=mask, other=0.0).to(tl.float32) * inv
        if EVEN:
            acc += x * x
        else:
            acc += (x * x) * tl.load(along + batch * m + rows, mask=rows < m, other=0.0)
    bands = tl.num_programs(0) // tiles
    at = (batch * bands + band) * n + col
    tl.store(parts + at, tl.sum(acc, axis=0), mask=col < n)


@triton.jit
def factors_kernel(
    parts, out, facts, n, bands, scale, floor, EVEN: tl.constexpr, MEAN: tl.constexpr,
    BT: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Factors across from partial sums (K, bands, n), in their order; grid (tiles, matrices)."""
    col = tl.program_id(0) * BL + tl.arange(0, BL)
    batch = tl.program_id(1).to(tl.int64)
    mean = tl.load(facts + 2 * batch + 1)
    s = fold_block(parts, batch, col, bands, n, BT, BL) * scale
    if EVEN and not MEAN:
        s /= mean
    tl.store(out + batch * n + col, unscaled(s, floor * mean if MEAN else floor), mask=col < n)


@triton.jit
def written_kernel(
    X, out, facts, along, across, m, n, x_k, x_m, x_n, o_k, o_m, o_n,
    BOTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The result from the factors across, and along if BOTH; the grid is (tiles, matrices)."""
    tiles = tl.cdiv(n, BN)
    batch = tl.program_id(1).to(tl.int64)
    rows = ((tl.program_id(0) // tiles) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = ((tl.program_id(0) % tiles) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    mask = (rows < m) & (cols < n)
    x = tl.load(X + batch * x_k + rows * x_m + cols * x_n, mask=mask, other=0.0).to(tl.float32)
    x *= tl.load(facts + 2 * batch)
    if BOTH:
        x *= tl.sqrt_rn(tl.load(along + batch * m + rows, mask=rows < m, other=0.0))
    x *= tl.sqrt_rn(tl.load(across + batch * n + cols, mask=cols < n, other=0.0))
    o = x.to(out.dtype.element_ty)
    tl.store(out + batch * o_k + rows * o_m + cols * o_n, o, mask=mask)
