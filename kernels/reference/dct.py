"""Pieces of the fast cosine transform in plain torch, and the tables that they share.

Source: J. Makhoul, A Fast Cosine Transform in One and Two Dimensions, IEEE Trans. ASSP 28(1), 1980.
Even entries are put before reversed odd ones, one real FFT of length n is taken, and its
coefficients are multiplied by quarter waves. Tables are computed in float64, rounded once, and kept
per size and device.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .matmul import product

DCT_NORMS = (None, "l1", "l2")


@functools.lru_cache(maxsize=64)
def basis(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """The matrix C (n, n) of :func:`stiefel.kernels.dct_basis`."""
    with torch.inference_mode(False), torch.no_grad():
        k = torch.arange(n, dtype=torch.int64, device="cpu")
        wave = torch.arange(4 * n, dtype=torch.float64, device="cpu")
        wave.mul_(math.pi / (2 * n)).cos_()
        C = wave[k[:, None] * (2 * k + 1) % (4 * n)].mul_(math.sqrt(2 / n))
        C[0].fill_(math.sqrt(1 / n))
        return C.to(device, dtype)


@functools.lru_cache(maxsize=256)
def quarter_waves(n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Order of Makhoul's permutation, its inverse, and s_k e^{-i pi k / (2 n)} for k <= n / 2."""
    with torch.inference_mode(False), torch.no_grad():
        k = torch.arange(n, dtype=torch.int64, device="cpu")
        order = torch.cat([k[::2], k[1::2].flip(0)])
        place = torch.empty_like(order)
        place[order] = k
        theta = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu")
        theta.mul_(-math.pi / (2 * n))
        twiddle = torch.polar(torch.full_like(theta, math.sqrt(2 / n)), theta)
        twiddle[0] = math.sqrt(1 / n)
        narrow = torch.complex128 if dtype == torch.float64 else torch.complex64
        return order.to(device), place.to(device), twiddle.to(device, narrow)


def dct_reorder(X: Tensor, dim: int) -> Tensor:
    """What is to be transformed, one run of memory each: even entries, then odd ones reversed.

    Args:
        X: (m, n) or (K, m, n), any strides.
        dim: -1 or -2, the dimension that is transformed.

    Returns:
        v: (..., m, n) for dim -1, (..., n, m) for dim -2, at least float32.
    """
    X = X if X.dtype == torch.float64 else X.float()
    order, _, _ = quarter_waves(X.shape[dim], X.dtype, str(X.device))
    v = X.index_select(dim, order)
    return (v if dim == -1 else v.mT).contiguous()


def dct_twiddle(
    V: Tensor, n: int, dim: int, norm: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Cosine coefficients from those of the FFT: both S_k and S_{n-k} come from V_k.

    Args:
        V: (..., lines, n // 2 + 1) complex, what ``torch.fft.rfft`` made of ``dct_reorder``.
        n: length of the transform.
        dim: as for ``dct_reorder``.
        norm: None, or what to sum over the lines for each cosine: ``"l1"`` magnitudes or ``"l2"``
            squares.

    Returns:
        S: (..., lines, n) for dim -1, (..., n, lines) for dim -2.
        sums: (..., n), None if not wanted.
    """
    real = torch.float64 if V.dtype == torch.complex128 else torch.float32
    twiddle = quarter_waves(n, real, str(V.device))[2]
    T = V * twiddle  # X_k - i X_{n-k}
    upper = T.imag[..., 1 : (n + 1) // 2].flip(-1).neg_()
    S = torch.cat([T.real, upper], dim=-1)
    sums = None if norm is None else (S.abs() if norm == "l1" else S.square()).sum(-2)
    return S if dim == -1 else S.mT, sums


def dct_untwiddle(S: Tensor, dim: int) -> Tensor:
    """Coefficients of the FFT from those of the cosines: the inverse of :func:`dct_twiddle`.

    Args:
        S: (m, n) or (K, m, n), any strides.
        dim: as for ``dct_reorder``.

    Returns:
        V: (..., lines, n // 2 + 1) complex, for ``torch.fft.irfft``.
    """
    S = S if S.dtype == torch.float64 else S.float()
    n = S.shape[dim]
    half = n // 2
    twiddle = quarter_waves(n, S.dtype, str(S.device))[2]
    Z = (S if dim == -1 else S.mT).contiguous()
    # e^{i theta} (z_k - i z_{n-k}) with z_0 = sqrt(n) X_0 = n s_0 X_0, else z_k = n / 2 s_k X_k
    V = torch.zeros(*Z.shape[:-1], half + 1, dtype=twiddle.dtype, device=Z.device)
    V.real.copy_(Z[..., : half + 1])
    V.imag[..., 1:].copy_(Z[..., n - half :].flip(-1)).neg_()
    V.mul_(twiddle.conj()).mul_(n)
    V[..., 1:].mul_(0.5)
    return V


def dct_restore(v: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`dct_reorder`.

    Args:
        v: (..., lines, n).
        dim: as for ``dct_reorder``.

    Returns:
        (..., lines, n) for dim -1, (..., n, lines) for dim -2.
    """
    place = quarter_waves(v.shape[-1], v.dtype, str(v.device))[1]
    x: Tensor = v.index_select(-1, place)
    return x if dim == -1 else x.mT


def dct_take(S: Tensor, index: Tensor, dim: int) -> Tensor:
    """The chosen cosines S[:, I] (dim -1) or S[I] (dim -2).

    Args:
        S: (K, m, n), any strides.
        index: (K, r) int32, or (1, r) for all matrices.
        dim: -1 or -2.

    Returns:
        (K, m, r) or (K, r, n), a new tensor.
    """
    if dim == -1:
        return S.take_along_dim(index.long().expand(len(S), -1).unsqueeze(-2), -1)
    if S.stride(-1) != 1 and S.stride(-2) == 1:  # read along the memory, then transpose the few
        where = index.long().unsqueeze(-2).expand(len(S), S.shape[-1], -1)
        return S.mT.gather(-1, where).mT.contiguous()
    K, m, n = S.shape
    if K > 1 and not S.is_contiguous():
        return S.take_along_dim(index.long().expand(K, -1).unsqueeze(-1), -2)
    # rows are copied whole
    starts = m * torch.arange(K, dtype=torch.int64, device=S.device).unsqueeze(-1)
    rows = (index + starts).flatten()
    return S.reshape(K * m, n).index_select(0, rows).view(K, index.shape[-1], n)


def dct_project(G: Tensor, index: Tensor, dim: int) -> Tensor:
    """The chosen coefficients only: G D[:, I] (dim -1) or D[:, I]^T G (dim -2), D = C^T.

    Args:
        G: (K, m, n), any strides.
        index: (K, r) int32, or (1, r) for all matrices.
        dim: -1 or -2.

    Returns:
        (K, m, r) or (K, r, n), at least float32.
    """
    G = G if G.dtype == torch.float64 else G.float()
    C = basis(G.shape[dim], G.dtype, str(G.device))
    rows = C.index_select(0, index.flatten()).view(*index.shape, -1).expand(len(G), -1, -1)
    return product(G, rows.mT) if dim == -1 else product(rows, G)
