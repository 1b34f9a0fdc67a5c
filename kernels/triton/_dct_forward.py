"""What stands around torch.fft in a cosine transform.

Along the transformed dimension runs the index p or k, across it run lines, so that both dimensions
differ in strides only. Each kernel reads its operand once and writes its result once:

    reorder    v[p] = x[2p],  v[n-1-p] = x[2p+1]; widened to float32 and transposed in the same copy
    twiddle    S[k] and S[n-k] from one read of V[k]; sums over lines for each k in the same pass
    untwiddle  V[k] from S[k] and S[n-k], in ``_dct_back.py``
    restore    the inverse of reorder

A transform of a float32 m x n is then 4 + 4 bytes an entry (reorder), the FFT's own passes, and
4 + 4 (twiddle); of bfloat16 the first is 2 + 4. Plain torch takes 8 more for each cast, transpose,
flip and cat.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.dct import DCT_NORMS, quarter_waves
from ._launch import Case, config, guard, options, scratch, stacked, strides
from ._partial_sums import fold


@triton.jit
def tile(n_tiles, lines, half, BL: tl.constexpr, BP: tl.constexpr):
    """Lines (BL, 1) and places (BP,) along the transformed dimension of a program's tile."""
    line = ((tl.program_id(0) // n_tiles) * BL + tl.arange(0, BL)).to(tl.int64)[:, None]
    place = ((tl.program_id(0) % n_tiles) * BP + tl.arange(0, BP)).to(tl.int64)
    return line, place


@triton.jit
def reorder_kernel(
    X, V, lines, n, x_k, x_l, x_t, v_k, v_l, v_t,
    BACK: tl.constexpr, RUNS: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Makhoul's order of X into V, or BACK from V into X; RUNS: X runs along its places."""
    tiles = tl.cdiv((n + 1) // 2, BP)
    batch = tl.program_id(1).to(tl.int64)
    line, place = tile(tiles, lines, n, BL, BP)
    p = place[None, :]
    low = V + batch * v_k + line * v_l + p * v_t
    high = V + batch * v_k + line * v_l + (n - 1 - p) * v_t
    at = X + batch * x_k + line * x_l + 2 * p * x_t
    mask = line < lines
    even, odd = mask & (p < n - n // 2), mask & (p < n // 2)
    if RUNS:  # pairs of neighbours move as one vector
        t = ((tl.program_id(0) % tiles) * BP * 2 + tl.arange(0, 2 * BP)).to(tl.int64)[None, :]
        run = X + batch * x_k + line * x_l + t * x_t
        inside = mask & (t < n)
    if BACK:
        a, b = tl.load(low, mask=even, other=0.0), tl.load(high, mask=odd, other=0.0)
        if RUNS:
            tl.store(run, tl.reshape(tl.join(a, b), (BL, 2 * BP)), mask=inside)
        else:
            tl.store(at, a, mask=even)
            tl.store(at + x_t, b, mask=odd)
    else:
        if RUNS:
            x = tl.load(run, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (BL, BP, 2)))
        else:
            a = tl.load(at, mask=even, other=0.0).to(tl.float32)
            b = tl.load(at + x_t, mask=odd, other=0.0).to(tl.float32)
        tl.store(low, a, mask=even)
        tl.store(high, b, mask=odd)


@triton.jit
def load_twiddles(twiddle, start, half, BP: tl.constexpr):
    """Cosines and sines (1, BP) of the twiddles from number `start` on."""
    q = 2 * start + tl.arange(0, 2 * BP)
    pairs = tl.load(twiddle + q, mask=q < 2 * half, other=0.0)
    c, s = tl.split(tl.reshape(pairs, (BP, 2)))
    return c[None, :], s[None, :]


@triton.jit
def twiddle_kernel(
    V, S, twiddle, partial, lines, n, v_k, v_l, s_k, s_l, s_t,
    NORM: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """S_k - i S_{n-k} = V_k times its twiddle; NORM 1 or 2: sums over the lines of this tile."""
    half = n // 2 + 1
    tiles = tl.cdiv(half, BP)
    batch = tl.program_id(1).to(tl.int64)
    line, place = tile(tiles, lines, half, BL, BP)
    k = place[None, :]
    start = (tl.program_id(0) % tiles) * BP
    q = (2 * start + tl.arange(0, 2 * BP)).to(tl.int64)[None, :]
    inside = (line < lines) & (q < 2 * half)
    far = tl.multiple_of(batch * v_k + line * v_l, (1, 2))  # both are of whole complex numbers
    pairs = tl.load(V + far + q, mask=inside, other=0.0)
    re, im = tl.split(tl.reshape(pairs, (BL, BP, 2)))
    c, s = load_twiddles(twiddle, start, half, BP)
    low = re * c - im * s
    high = -(re * s + im * c)
    at = S + batch * s_k + line * s_l
    twice = (k >= 1) & (2 * k < n)
    tl.store(at + k * s_t, low, mask=(line < lines) & (k < half))
    tl.store(at + (n - k) * s_t, high, mask=(line < lines) & twice)
    if NORM:
        low = low * low if NORM == 2 else tl.abs(low)
        high = high * high if NORM == 2 else tl.abs(high)
        out = partial + (batch * tl.cdiv(lines, BL) + tl.program_id(0) // tiles) * n
        tl.store(out + place, tl.sum(low, 0), mask=place < half)
        tl.store(out + (n - place), tl.sum(high, 0), mask=(place >= 1) & (2 * place < n))


def along(X: Tensor, dim: int) -> tuple[int, int, int]:
    """Strides of the batch, of lines and along dim."""
    k, m, n = strides(X)
    return (k, m, n) if dim == -1 else (k, n, m)


def sizes(X: Tensor, dim: int) -> tuple[int, int, int]:
    """Matrices, lines, and length along dim."""
    return X.shape[0], X.shape[-3 - dim], X.shape[dim]


def grid(tiles: dict[str, int], K: int, lines: int, places: int) -> tuple[int, int]:
    """(tiles, matrices)."""
    return triton.cdiv(lines, tiles["BL"]) * triton.cdiv(places, tiles["BP"]), K


def twiddles(n: int, X: Tensor) -> Tensor:
    """Cosines and sines (n // 2 + 1, 2) of the quarter waves on X's device."""
    return torch.view_as_real(quarter_waves(n, torch.float32, str(X.device))[2])


@torch.library.custom_op("stiefel::dct_reorder", mutates_args=())
def _reorder(X: Tensor, dim: int) -> Tensor:
    K, lines, n = sizes(X, dim)
    v = torch.empty(K, lines, n, dtype=torch.float32, device=X.device)
    if v.numel():
        with guard(X):
            chosen = config("dct", X, lines, n)
            x = along(X, dim)
            reorder_kernel[grid(chosen.tile_sizes, K, lines, (n + 1) // 2)](
                X, v, lines, n, *x, *strides(v), BACK=False, RUNS=x[2] == 1,
                **options(chosen),
            )  # fmt: skip
    return v


@torch.library.custom_op("stiefel::dct_twiddle", mutates_args=())
def _twiddle(V: Tensor, n: int, dim: int, norm: int) -> tuple[Tensor, Tensor]:
    K, lines, _ = V.shape
    pairs = torch.view_as_real(V if V.stride(-1) == 1 else V.contiguous())
    S = pairs.new_empty((K, lines, n) if dim == -1 else (K, n, lines))
    sums = pairs.new_zeros((K, n) if norm else (0,))
    if V.numel():
        with guard(V):
            chosen = config("dct", V, lines, n)
            line_tiles = triton.cdiv(lines, chosen.tile_sizes["BL"])
            partial = scratch(S, K, line_tiles, n) if norm else None
            twiddle_kernel[grid(chosen.tile_sizes, K, lines, n // 2 + 1)](
                pairs, S, twiddles(n, V), partial, lines, n, *strides(pairs.flatten(2, 3))[:2],
                *along(S, dim), NORM=norm, **options(chosen),
            )  # fmt: skip
            if partial is not None:
                sums = fold(partial)
    return S, sums


@_reorder.register_fake
def _(X: Tensor, dim: int) -> Tensor:
    return X.new_empty((*sizes(X, dim),), dtype=torch.float32)


@_twiddle.register_fake
def _(V: Tensor, n: int, dim: int, norm: int) -> tuple[Tensor, Tensor]:
    K, lines, _ = V.shape
    S = V.new_empty((K, lines, n) if dim == -1 else (K, n, lines), dtype=torch.float32)
    return S, S.new_empty((K, n) if norm else (0,))


def dct_reorder(X: Tensor, dim: int) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.dct_reorder`."""
    v: Tensor = _reorder(stacked(X), dim)
    return v if X.ndim == 3 else v[0]


def dct_twiddle(
    V: Tensor, n: int, dim: int, norm: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Kernel of :func:`stiefel.kernels.reference.dct_twiddle`; S runs along its rows."""
    S, sums = _twiddle(stacked(V), n, dim, DCT_NORMS.index(norm))
    S, sums = (S, sums) if V.ndim == 3 else (S[0], sums[0] if norm else sums)
    return S, sums if norm else None


def case(name: str, kernel: Any, dim: int, narrow: str = "fp32", **constants: Any) -> Case:
    """V runs along its places, S or X too (dim -1) or across them."""
    pointers = {"X": f"*{narrow}", **dict.fromkeys(("S", "V", "twiddle", "partial"), "*fp32")}
    constants |= dict.fromkeys(("x_t", "s_t") if dim == -1 else ("x_l", "s_l"), 1) | {"v_t": 1}
    given = [a for a in kernel.arg_names if a not in constants and a not in ("BL", "BP")]
    types = {a: pointers.get(a, "i32") for a in given}
    fixed = {a: x for a, x in constants.items() if a in kernel.arg_names}
    # rows of n / 2 + 1 complex numbers begin on 8 bytes only
    loose = ("v_k", "v_l") if "twiddle" in name else ()
    load = 8 if loose else 16
    return Case(name, "dct", kernel, types, fixed, loose=loose, blocks=2, load=load)


CASES = [
    case("dct_reorder bf16", reorder_kernel, -1, "bf16", BACK=False, RUNS=True),
    case("dct_reorder fp32", reorder_kernel, -1, BACK=False, RUNS=True),
    case("dct_reorder bf16 down", reorder_kernel, -2, "bf16", BACK=False, RUNS=False),
    case("dct_twiddle l2", twiddle_kernel, -1, NORM=2),
    case("dct_twiddle down", twiddle_kernel, -2, NORM=0, partial=None),
]  # fmt: skip
