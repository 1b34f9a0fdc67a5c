"""Chosen cosines: gathered from all coefficients, or by a product with a basis that is not stored.

`dct_take` reads whole sectors of 32 bytes for each entry where the chosen lie along the memory
(dim -1), and runs of memory where they lie across it.

`dct_project` makes cosines where they are used.

Per tile of G D[:, I] the phases (2 j + 1) k are reduced modulo 4 n in int64 once; along the product
they advance by 2 BK k modulo 4 n, in int32 and exactly. A phase is folded into [0, pi / 4], where
two short polynomials are right to 1e-7.

Against a product with stored columns, for G (m, n) and r cosines, float32:

                    bytes beside 4 m n + 4 m r          operations
    stored basis    4 n^2 kept, 4 n r read (twice       2 m n r on matrix units
                    more where columns are copied out)
    generated       none                                the same, and 28 n r m / BL on the others

so with BL = 128 lines a tile it costs 0.22 m n r scalar operations in place of 4 n^2 bytes. Where r
is small the product waits for G and they are free; a large r is bound by them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dct_forward import along, grid, sizes
from ._launch import Case, config, guard, options, precision


@triton.jit
def cosine_of(phase, n, unit):
    """cos(2 pi phase / (4 n)) for 0 <= phase < 4 n; unit = pi / (2 n)."""
    half = tl.minimum(phase, 4 * n - phase)
    minus = half > n
    half = tl.where(minus, 2 * n - half, half)
    flip = 2 * half > n
    x = tl.where(flip, n - half, half).to(tl.float32) * unit  # up to pi / 4
    z = x * x
    c = 1.0 + z * (-0.5 + z * (4.1666667e-2 + z * (-1.3888889e-3 + z * 2.4801587e-5)))
    s = x + x * z * (-0.16666667 + z * (8.3333333e-3 + z * (-1.9841270e-4 + z * 2.7557319e-6)))
    y = tl.where(flip, s, c)
    return tl.where(minus, -y, y)


@triton.jit
def project_kernel(
    G, index, out, lines, n, r, g_k, g_l, g_t, i_k, i_r, o_k, o_l, o_t, unit, first, other,
    PRECISION: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Lines times chosen cosines; the grid is (tiles, matrices)."""
    tiles = tl.cdiv(r, BR)
    batch = tl.program_id(1).to(tl.int64)
    line = ((tl.program_id(0) // tiles) * BL + tl.arange(0, BL)).to(tl.int64)
    place = ((tl.program_id(0) % tiles) * BR + tl.arange(0, BR)).to(tl.int64)
    k = tl.load(index + batch * i_k + place * i_r, mask=place < r, other=0).to(tl.int64)
    t = tl.arange(0, BK)
    phase = (((2 * t + 1).to(tl.int64)[:, None] * k[None, :]) % (4 * n)).to(tl.int32)
    step = ((2 * BK * k) % (4 * n)).to(tl.int32)[None, :]
    g = G + batch * g_k + line[:, None] * g_l + t.to(tl.int64)[None, :] * g_t
    acc = tl.zeros((BL, BR), tl.float32)
    for start in range(0, n, BK):
        inside = (line[:, None] < lines) & (t[None, :] < n - start)
        x = tl.load(g, mask=inside, other=0.0).to(tl.float32)
        acc = tl.dot(x, cosine_of(phase, n, unit), acc, input_precision=PRECISION)
        phase += step
        phase = tl.where(phase >= 4 * n, phase - 4 * n, phase)
        g += BK * g_t
    acc *= tl.where(k == 0, first, other)[None, :]
    mask = (line[:, None] < lines) & (place[None, :] < r)
    tl.store(out + batch * o_k + line[:, None] * o_l + place[None, :] * o_t, acc, mask=mask)


@triton.jit
def take_kernel(
    S, index, out, lines, r, n, s_k, s_l, s_t, i_k, i_r, o_k, o_l, o_t,
    BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Chosen places of every line, as the first axis: threads follow it where nothing runs."""
    tiles = tl.cdiv(r, BP)
    batch = tl.program_id(1).to(tl.int64)
    line = ((tl.program_id(0) // tiles) * BL + tl.arange(0, BL)).to(tl.int64)[None, :]
    j = ((tl.program_id(0) % tiles) * BP + tl.arange(0, BP)).to(tl.int64)[:, None]
    at = tl.load(index + batch * i_k + j * i_r, mask=j < r, other=0).to(tl.int64)
    mask = (line < lines) & (j < r)
    known = mask & (at >= 0) & (at < n)
    x = tl.load(S + batch * s_k + line * s_l + at * s_t, mask=known, other=0.0)
    tl.store(out + batch * o_k + line * o_l + j * o_t, x, mask=mask)


@torch.library.custom_op("stiefel::dct_take", mutates_args=())
def _take(S: Tensor, index: Tensor, dim: int) -> Tensor:
    (K, lines, n), r = sizes(S, dim), index.shape[-1]
    out = S.new_empty((K, lines, r) if dim == -1 else (K, r, lines))
    if out.numel():
        with guard(S):
            chosen = config("dct_take", S, lines, r)
            take_kernel[grid(chosen.tile_sizes, K, lines, r)](
                S, index, out, lines, r, n, *along(S, dim),
                0 if len(index) == 1 else index.stride(0), index.stride(1), *along(out, dim),
                **options(chosen),
            )  # fmt: skip
    return out


@torch.library.custom_op("stiefel::dct_project", mutates_args=())
def _project(G: Tensor, index: Tensor, dim: int) -> Tensor:
    (K, lines, n), r = sizes(G, dim), index.shape[-1]
    shape = (K, lines, r) if dim == -1 else (K, r, lines)
    out = torch.empty(shape, dtype=torch.float32, device=G.device)
    if out.numel():
        with guard(G):
            chosen = config("dct_project", G, lines, n)
            sides = chosen.tile_sizes
            tiles = triton.cdiv(lines, sides["BL"]) * triton.cdiv(r, sides["BR"])
            project_kernel[(tiles, K)](
                G, index, out, lines, n, r, *along(G, dim),
                0 if len(index) == 1 else index.stride(0), index.stride(1), *along(out, dim),
                math.pi / (2 * n), math.sqrt(1 / n), math.sqrt(2 / n), PRECISION=precision(),
                **options(chosen),
            )  # fmt: skip
    return out


@_take.register_fake
def _(S: Tensor, index: Tensor, dim: int) -> Tensor:
    (K, lines, _), r = sizes(S, dim), index.shape[-1]
    return S.new_empty((K, lines, r) if dim == -1 else (K, r, lines))


@_project.register_fake
def _(G: Tensor, index: Tensor, dim: int) -> Tensor:
    (K, lines, _), r = sizes(G, dim), index.shape[-1]
    return G.new_empty((K, lines, r) if dim == -1 else (K, r, lines), dtype=torch.float32)


def dct_take(S: Tensor, index: Tensor, dim: int) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.dct_take`; zeros for an index out of range."""
    out: Tensor = _take(S, index, dim)
    return out


def dct_project(G: Tensor, index: Tensor, dim: int) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.dct_project`; tf32 if torch may use it."""
    out: Tensor = _project(G, index, dim)
    return out


def _case(name: str, element: str, dim: int, precision: str = "tf32") -> Case:
    types = {"G": f"*{element}", "index": "*i32", "out": "*fp32"}
    sizes = ("lines", "n", "r", "g_k", "g_l", "g_t", "i_k", "o_k", "o_l", "o_t")
    types |= dict.fromkeys(sizes, "i32") | dict.fromkeys(("unit", "first", "other"), "fp32")
    unit = ("g_t", "o_t") if dim == -1 else ("g_l", "o_l")
    for axis in unit:
        del types[axis]
    constants = {**dict.fromkeys((*unit, "i_r"), 1), "PRECISION": precision}
    return Case(name, "dct_project", project_kernel, types, constants, dot="tf32")


def _gather(name: str, element: str, dim: int) -> Case:
    types = {"S": f"*{element}", "out": f"*{element}", "index": "*i32"}
    unit = ("s_t", "o_t") if dim == -1 else ("s_l", "o_l")
    sizes = {"lines", "r", "n", "i_k"} | {f"{x}_{axis}" for x in "so" for axis in "klt"}
    types |= dict.fromkeys(sorted(sizes - set(unit)), "i32")
    fixed = dict.fromkeys((*unit, "i_r"), 1)
    load = 4 if dim == -1 else 16  # places along the memory lie apart
    return Case(name, "dct_take", take_kernel, types, fixed, blocks=2, load=load)


CASES = [
    _case("dct_project fp32", "fp32", -1),
    _case("dct_project bf16", "bf16", -1),
    _case("dct_project fp32 down", "fp32", -2),
    _case("dct_project tf32x3", "fp32", -1, "tf32x3"),
    _case("dct_project tf32x3 down", "fp32", -2, "tf32x3"),
    _gather("dct_take fp32", "fp32", -1),
    _gather("dct_take bf16 down", "bf16", -2),
]
