"""The orthonormal discrete cosine transform: one basis for every matrix of a size.

C[k, j] = s_k cos(pi k (2 j + 1) / (2 n)) with s_0 = sqrt(1/n), s_k = sqrt(2/n): row k is the k-th
cosine and C C^T = I. Two paths give the same numbers to rounding, a product with C and an FFT.
What both need is computed in float64, rounded once, and cached per (n, dtype, device).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .products import product

PATHS = ("auto", "matmul", "fft")
FFT_FROM = 256
"""Length from which the FFT is taken. On a CPU, one thread, float32, down 1024 columns, the product
costs 0.4 (n = 64), 0.6 (128), 1.0 (256), 1.9 (512), 3.1 (1024) times the FFT, and 1.0 and 1.8 times
for the primes 509 and 1021, which make no exception: ``python bench/toolkit.py --only transforms``.
"""


def dct_path(n: int, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The path that ``"auto"`` takes: a pure function of its arguments, so that all ranks agree.

    Args:
        n: Length of the transform.
        device_type: ``"cpu"``, ``"cuda"``, ...: one rule so far, measured on a CPU.
        dtype: Working dtype, float32 or float64: one rule for both.

    Returns:
        ``"fft"`` for n from ``FFT_FROM`` on, else ``"matmul"``.
    """
    return "fft" if n >= FFT_FROM else "matmul"


def dct_basis(
    n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The orthonormal DCT-II matrix C: C @ x is the transform of a column x, C^T @ y its inverse.

    The phase k (2 j + 1) is reduced modulo 4 n in integers before the cosine, so that entries are
    exact to rounding for every n: ||C C^T - I||_max <= 2e-7 in float32, 2e-14 in float64.

    Args:
        n: Size, at least 1.
        dtype: A floating dtype.
        device: Where the matrix shall be.

    Returns:
        C: (n, n), shared by all callers: it must not be changed.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"a cosine transform needs n >= 1, got {n}")
    return _basis(n, dtype, str(device))


def dct(X: Tensor, dim: int = -1, path: str = "auto") -> Tensor:
    """The orthonormal DCT-II along one dimension: X C^T for dim -1, C X for dim -2.

    The FFT path puts even entries before reversed odd ones and turns one real FFT of length n by
    quarter waves. Source: J. Makhoul, A Fast Cosine Transform in One and Two Dimensions, IEEE
    Trans. ASSP 28(1), 1980.

    Args:
        X: (m, n) or (K, m, n), any strides; narrower dtypes are worked on in float32.
        dim: -1 or -2.
        path: ``"matmul"``, ``"fft"``, or ``"auto"`` for :func:`dct_path`.

    Returns:
        A new tensor of X's shape, float32, or float64 for float64 X.

    Raises:
        ValueError: Unknown path, dim or number of dimensions.
    """
    X, path = _checked(X, dim, path)
    if path == "matmul":
        return _multiplied(X, dim, inverse=False)
    n = X.shape[dim]
    order, _, twiddle = _quarter_waves(n, X.dtype, str(X.device))
    v = X.index_select(dim, order)
    T = torch.fft.rfft((v if dim == -1 else v.mT).contiguous()) * twiddle  # X_k - i X_{n-k}
    upper = T.imag[..., 1 : (n + 1) // 2].flip(-1).neg_()
    S = torch.cat([T.real, upper], dim=-1)
    return S if dim == -1 else S.mT


def idct(X: Tensor, dim: int = -1, path: str = "auto") -> Tensor:
    """The inverse of :func:`dct`, the orthonormal DCT-III: X C for dim -1, C^T X for dim -2.

    Arguments, result and errors as there.
    """
    X, path = _checked(X, dim, path)
    if path == "matmul":
        return _multiplied(X, dim, inverse=True)
    n = X.shape[dim]
    half = n // 2
    _, place, twiddle = _quarter_waves(n, X.dtype, str(X.device))
    Z = (X if dim == -1 else X.mT).contiguous()
    # e^{i theta} (z_k - i z_{n-k}) with z_0 = sqrt(n) X_0 = n s_0 X_0, else z_k = n / 2 s_k X_k
    V = torch.zeros(*Z.shape[:-1], half + 1, dtype=twiddle.dtype, device=Z.device)
    V.real.copy_(Z[..., : half + 1])
    V.imag[..., 1:].copy_(Z[..., n - half :].flip(-1)).neg_()
    V.mul_(twiddle.conj()).mul_(n)
    V[..., 1:].mul_(0.5)
    v = torch.fft.irfft(V, n)
    x: Tensor = v.index_select(-1, place)
    return x if dim == -1 else x.mT


def _checked(X: Tensor, dim: int, path: str) -> tuple[Tensor, str]:
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if dim not in (-1, -2) or X.ndim not in (2, 3):
        raise ValueError(f"expected (m, n) or (K, m, n) and dim -1 or -2, got {X.ndim}-D, {dim}")
    X = X if X.dtype == torch.float64 else X.float()
    return X, dct_path(X.shape[dim], X.device.type, X.dtype) if path == "auto" else path


def _multiplied(X: Tensor, dim: int, inverse: bool) -> Tensor:
    C = dct_basis(X.shape[dim], X.dtype, X.device)
    stack = X if X.ndim == 3 else X[None]
    C = (C.mT if inverse else C).expand(len(stack), -1, -1)
    S = product(stack, C.mT) if dim == -1 else product(C, stack)
    return S if X.ndim == 3 else S[0]


@functools.lru_cache(maxsize=64)
def _basis(n: int, dtype: torch.dtype, device: str) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        k = torch.arange(n)
        wave = torch.arange(4 * n, dtype=torch.float64).mul_(math.pi / (2 * n)).cos_()
        C = wave[k[:, None] * (2 * k + 1) % (4 * n)].mul_(math.sqrt(2 / n))
        C[0].fill_(math.sqrt(1 / n))
        return C.to(device, dtype)


@functools.lru_cache(maxsize=256)
def _quarter_waves(n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Order of Makhoul's permutation, its inverse, and s_k e^{-i pi k / (2 n)} for k <= n / 2."""
    with torch.inference_mode(False), torch.no_grad():
        order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
        place = torch.empty_like(order)
        place[order] = torch.arange(n)
        theta = torch.arange(n // 2 + 1, dtype=torch.float64).mul_(-math.pi / (2 * n))
        twiddle = torch.polar(torch.full_like(theta, math.sqrt(2 / n)), theta)
        twiddle[0] = math.sqrt(1 / n)
        narrow = torch.complex128 if dtype == torch.float64 else torch.complex64
        return order.to(device), place.to(device), twiddle.to(device, narrow)
