"""Into a subspace: coordinates R = P^T G, G read once.

R is summed over splits of the rows, so that wide and flat matrices fill a device too; the splits
are added in a fixed order. Of a float32 operand beside a half-precision one the tensor cores see
tf32, 11 bits; every digit of the half-precision one counts.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    INTERPRETED,
    Case,
    config,
    guard,
    options,
    precision,
    scratch,
    strides,
)
from ._tables import Config
from .adam import described

RANK = 256
"""Most coordinates that one program sums; above it G is read again for each so many, from L2."""
STEPS = 4
"""Least row tiles of a split: fewer are not worth adding up."""
ROOM = 2**24
"""Entries of splits that are kept at a time, of as many matrices as that is."""


@triton.jit
def project_kernel(
    P, G, out, squares, m, n, r, length, col_tiles, p_k, p_m, p_r, g_k, g_m, g_n, o_s, o_k, o_r,
    o_n, s_s, s_k,
    SQUARES: tl.constexpr, UPCASTS: tl.constexpr, STAGED: tl.constexpr, PRECISION: tl.constexpr,
    RB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """RB coordinates of BN columns from `length` rows; the grid is (splits * tiles, matrices)."""
    pid = tl.program_id(0)
    ranks = tl.cdiv(r, RB)
    b = pid % ranks  # neighbours read the same block of G
    j = (pid // ranks) % col_tiles
    s = (pid // (ranks * col_tiles)).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)  # a stack may have more than 2^31 elements
    rows = s * length + tl.arange(0, BM)
    inner = (b * RB + tl.arange(0, RB)).to(tl.int64)
    cols = (j * BN + tl.arange(0, BN)).to(tl.int64)
    p = P + batch * p_k + rows[:, None] * p_m + inner[None, :] * p_r
    g = G + batch * g_k + rows[:, None] * g_m + cols[None, :] * g_n
    acc = tl.zeros((RB, BN), tl.float32)
    sums = tl.zeros((BN,), tl.float32)
    step = tl.full((), BM, tl.int64)
    first = (s * length).to(tl.int32)
    stop = tl.minimum(m, first + length)
    for start in range(first, stop, BM):
        left = (tl.arange(0, BM) < stop - start)[:, None]
        x = tl.load(p, mask=left & (inner[None, :] < r), other=0.0)
        y = tl.load(g, mask=left & (cols[None, :] < n), other=0.0)
        if SQUARES:
            z = y.to(tl.float32)
            sums += tl.sum(z * z, axis=0)
        if UPCASTS:
            x, y = x.to(tl.float32), y.to(tl.float32)
        elif STAGED:  # through registers, in full lines: a transposing copy moves 4 bytes at a time
            y += 0.0
        acc = tl.dot(tl.trans(x), y, acc, input_precision=PRECISION)
        p += step * p_m
        g += step * g_m
    out += s * o_s + batch * o_k
    mask = (inner[:, None] < r) & (cols[None, :] < n)
    tl.store(out + inner[:, None] * o_r + cols[None, :] * o_n, acc, mask=mask)
    if SQUARES:
        if b == 0:
            tl.store(squares + s * s_s + batch * s_k + cols, sums, mask=cols < n)


@triton.jit
def added_kernel(parts, out, size, splits, BN: tl.constexpr):
    """The sum of the splits (splits, size) in their order."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = at < size
    acc = tl.load(parts + at, mask=mask, other=0.0)
    for s in range(1, splits):
        acc += tl.load(parts + tl.cast(size, tl.int64) * s + at, mask=mask, other=0.0)
    tl.store(out + at, acc, mask=mask)


@functools.cache
def multiprocessors(index: int) -> int:
    """How many a device has; in the interpreter few, so that small matrices are split too."""
    if INTERPRETED:
        return 16
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def ranks(r: int, most: int = RANK) -> int:
    """The coordinates of one tile: a power of two that tl.dot takes."""
    padded: int = triton.next_power_of_2(r)
    return max(16, min(padded, most))


def _table(RB: int, exact: str) -> str:
    """Products in three parts take more registers."""
    return "project" if RB <= 64 else "project_exact" if exact == "tf32x3" else "project_wide"


def _plan(P: Tensor, G: Tensor) -> tuple[Config, int, int]:
    """Tiles, how many splits of the rows fill the device about twice, and rows in each.

    They depend on one matrix only, so that a stack has the bits of its matrices.
    """
    (_, m, n), r = G.shape, P.shape[-1]
    chosen = config(_table(ranks(r), precision(P, G)), G, m, n)
    BM, BN = chosen.tile_sizes["BM"], chosen.tile_sizes["BN"]
    tiles = triton.cdiv(n, BN) * triton.cdiv(r, ranks(r))
    once = multiprocessors(G.device.index or 0) // max(tiles, 1)
    wanted = max(once, min(2 * once, m // (2 * r)))  # parts of r rows are written and read again
    splits = max(1, min(wanted, triton.cdiv(m, STEPS * BM), 32))
    length = triton.cdiv(triton.cdiv(m, BM), splits) * BM
    return chosen, max(1, triton.cdiv(m, length)), length


def needs_upcast(*Xs: Tensor) -> bool:
    """Whether operands of a dot must be widened: they differ, or bfloat16 is interpreted."""
    return INTERPRETED or len({X.dtype for X in Xs}) > 1


def _staged(P: Tensor, G: Tensor) -> bool:
    """Whether float32 goes to the tensor cores as it is loaded."""
    return precision(P, G) == "tf32" and P.dtype == G.dtype == torch.float32


def _project(P: Tensor, G: Tensor, out: Tensor, squares: Tensor | None) -> None:
    """The splits' sums into out (splits, K, r, n) and squares (splits, K, n)."""
    (K, _, n), r = G.shape, P.shape[-1]
    chosen, splits, length = _plan(P, G)
    col_tiles = triton.cdiv(n, chosen.tile_sizes["BN"])
    with guard(G):
        project_kernel[(splits * col_tiles * triton.cdiv(r, ranks(r)), K)](
            P, G, out, squares, G.shape[1], n, r, length, col_tiles, *strides(P), *strides(G),
            *out.stride(), *((0, 0) if squares is None else squares.stride()[:2]),
            SQUARES=squares is not None, UPCASTS=needs_upcast(P, G), STAGED=_staged(P, G),
            PRECISION=precision(P, G), RB=ranks(r), **options(chosen),
        )  # fmt: skip


def _added(parts: Tensor, out: Tensor) -> None:
    """The splits (splits, ...) in one."""
    chosen = config("added", parts, 1)
    with guard(parts):
        added_kernel[(triton.cdiv(out.numel(), chosen.tile_sizes["BN"]),)](
            parts, out, out.numel(), len(parts), **options(chosen)
        )


@torch.library.custom_op("stiefel::project", mutates_args=())
def _project_op(P: Tensor, G: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    (K, m, n), r = G.shape, P.shape[-1]
    columns = K if squares else 0
    if min(K, n, m) == 0 or r == 0:
        zeros = functools.partial(G.new_zeros, dtype=torch.float32)
        return zeros(K, r, n), zeros(columns, 1, n)
    splits = _plan(P, G)[1]
    R, G2 = scratch(G, K, r, n), scratch(G, columns, 1, n)
    if splits == 1:
        _project(P, G, R[None], G2[None] if squares else None)
        return R, G2
    most = max(1, ROOM // (splits * r * n))
    for start in range(0, K, most):
        ks = slice(start, start + most)
        g = G[ks]
        parts = scratch(G, splits, len(g), r, n)
        sums = scratch(G, splits, len(g), 1, n) if squares else None
        _project(P[ks] if len(P) > 1 else P, g, parts, sums)
        _added(parts, R[ks])
        if sums is not None:
            _added(sums, G2[ks])
    return R, G2


@_project_op.register_fake
def _(P: Tensor, G: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    new = functools.partial(G.new_empty, dtype=torch.float32)
    K, _, n = G.shape
    return new(K, P.shape[-1], n), new(K if squares else 0, 1, n)


def project(
    P: Tensor, G: Tensor, squares: bool = False, like: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Kernel of :func:`stiefel.kernels.reference.project`; R lies row by row."""
    R, G2 = _project_op(P, G, squares)
    return R, G2 if squares else None


def _case(name: str, P: str, G: str, dot: str, RB: int, exact: str = "tf32", **on: bool) -> Case:
    pointers = {"P": P, "G": G, "out": "fp32"} | ({"squares": "fp32"} if on else {})
    units = ("p_r", "o_n", "g_m" if "column-major" in name else "g_n")
    constants = {"UPCASTS": P != G, "PRECISION": exact, "RB": RB, **on}
    constants["STAGED"] = exact == "tf32" and P == G == "fp32"
    table = _table(RB, exact)
    return described(name, table, project_kernel, pointers, units, dot, **constants)


CASES = [
    _case("project bf16", "bf16", "bf16", "bf16", 256),
    _case("project bf16 narrow", "bf16", "bf16", "bf16", 64),
    _case("project fp16", "fp16", "fp16", "fp16", 256),
    _case("project tf32", "fp32", "fp32", "tf32", 256),
    _case("project tf32x3 squares", "fp32", "fp32", "tf32", 256, "tf32x3", SQUARES=True),
    _case("project tf32x3 narrow", "fp32", "fp32", "tf32", 64, "tf32x3", SQUARES=True),
    _case("project bf16 by fp32", "fp32", "bf16", "tf32", 256),
    _case("project bf16 by fp32 column-major", "fp32", "bf16", "tf32", 128),
    described("added", "added", added_kernel, {"parts": "fp32", "out": "fp32"}),
]
