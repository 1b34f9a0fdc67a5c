"""The way back of a cosine transform: what stands around torch.fft.irfft."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dct_forward import along, case, grid, load_twiddles, reorder_kernel, sizes, tile, twiddles
from ._launch import config, guard, options, stacked, strides


@triton.jit
def untwiddle_kernel(
    S, V, twiddle, lines, n, s_k, s_l, s_t, v_k, v_l, BL: tl.constexpr, BP: tl.constexpr
):
    """V_k = (n / 2 or n) conj(twiddle) (S_k - i S_{n-k}), with nothing for S_n."""
    half = n // 2 + 1
    tiles = tl.cdiv(half, BP)
    batch = tl.program_id(1).to(tl.int64)
    line, place = tile(tiles, lines, half, BL, BP)
    k = place[None, :]
    start = (tl.program_id(0) % tiles) * BP
    at = S + batch * s_k + line * s_l
    mask = (line < lines) & (k < n)  # a few more than are kept, so that vectors are whole
    a = tl.load(at + k * s_t, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + (n - k) * s_t, mask=mask & (k >= 1), other=0.0).to(tl.float32)
    c, s = load_twiddles(twiddle, start, half, BP)
    gain = tl.where(k >= 1, 0.5 * n, 1.0 * n)
    re, im = gain * (a * c - b * s), -gain * (a * s + b * c)
    q = (2 * start + tl.arange(0, 2 * BP)).to(tl.int64)[None, :]
    far = tl.multiple_of(batch * v_k + line * v_l, (1, 2))
    pairs = tl.reshape(tl.join(re, im), (BL, 2 * BP))
    tl.store(V + far + q, pairs, mask=(line < lines) & (q < 2 * half))


@torch.library.custom_op("stiefel::dct_untwiddle", mutates_args=())
def _untwiddle(S: Tensor, dim: int) -> Tensor:
    K, lines, n = sizes(S, dim)
    V = torch.empty(K, lines, n // 2 + 1, dtype=torch.complex64, device=S.device)
    if S.numel():
        with guard(S):
            chosen, pairs = config("dct", S, lines, n), torch.view_as_real(V).flatten(2, 3)
            untwiddle_kernel[grid(chosen.tile_sizes, K, lines, n // 2 + 1)](
                S, pairs, twiddles(n, S), lines, n, *along(S, dim), *strides(pairs)[:2],
                **options(chosen),
            )  # fmt: skip
    return V


@torch.library.custom_op("stiefel::dct_restore", mutates_args=())
def _restore(v: Tensor, dim: int) -> Tensor:
    K, lines, n = v.shape
    X = v.new_empty((K, lines, n) if dim == -1 else (K, n, lines))
    if v.numel():
        with guard(v):
            chosen = config("dct", v, lines, n)
            x = along(X, dim)
            reorder_kernel[grid(chosen.tile_sizes, K, lines, (n + 1) // 2)](
                X, v, lines, n, *x, *strides(v), BACK=True, RUNS=x[2] == 1,
                **options(chosen),
            )  # fmt: skip
    return X


@_untwiddle.register_fake
def _(S: Tensor, dim: int) -> Tensor:
    K, lines, n = sizes(S, dim)
    return S.new_empty((K, lines, n // 2 + 1), dtype=torch.complex64)


@_restore.register_fake
def _(v: Tensor, dim: int) -> Tensor:
    return torch.empty_like(v if dim == -1 else v.mT, memory_format=torch.contiguous_format)


def dct_untwiddle(S: Tensor, dim: int) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.dct_untwiddle`."""
    V: Tensor = _untwiddle(stacked(S), dim)
    return V if S.ndim == 3 else V[0]


def dct_restore(v: Tensor, dim: int) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.dct_restore`."""
    X: Tensor = _restore(stacked(v), dim)
    return X if v.ndim == 3 else X[0]


CASES = [
    case("dct_untwiddle", untwiddle_kernel, -1),
    case("dct_untwiddle down", untwiddle_kernel, -2),
    case("dct_restore", reorder_kernel, -1, BACK=True, RUNS=True),
    case("dct_restore down", reorder_kernel, -2, BACK=True, RUNS=False),
]
