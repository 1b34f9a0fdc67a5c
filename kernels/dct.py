"""The orthonormal discrete cosine transform: one basis for every matrix of a size.

C[k, j] = s_k cos(pi k (2 j + 1) / (2 n)) with s_0 = sqrt(1/n), s_k = sqrt(2/n): row k is the k-th
cosine and C C^T = I. Two paths give the same numbers to rounding, a product with C and an FFT.
What both need is computed in float64, rounded once, and cached per (n, dtype, device).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import backend_for
from .reference.dct import basis
from .reference.matmul import product

DCT_PATHS = ("auto", "matmul", "fft")
FFT_FROM = 256
"""Length from which a CPU takes the FFT. One thread, float32, down 1024 columns: the product costs
0.4 (n = 64), 0.6 (128), 1.0 (256), 1.9 (512), 3.1 (1024) times the FFT, and 1.0 and 1.8 times for
the primes 509 and 1021, which make no exception: ``python bench/toolkit.py --only transforms``.
"""
FFT_FROM_ACCELERATOR = 512
"""The same for accelerators, by a model: a float32 product of 60 Tflop/s against 32 bytes an entry
at 3 TB/s meet at 320, and this is the power of two above. Nobody has measured it."""
SMOOTH = 13
"""Largest prime factor of a length whose FFT is quick on an accelerator."""


def dct_path(n: int, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The path that ``"auto"`` takes: a pure function of its arguments, so that all ranks agree.

    Args:
        n: Length of the transform.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: Working dtype, float32 or float64: one rule for both.

    Returns:
        ``"fft"`` on a CPU for n from ``FFT_FROM`` on; on an accelerator from
        ``FFT_FROM_ACCELERATOR`` on, if n has no prime factor above ``SMOOTH``; else ``"matmul"``.
    """
    on_cpu = device_type == "cpu"
    if n < (FFT_FROM if on_cpu else FFT_FROM_ACCELERATOR):
        return "matmul"
    return "fft" if on_cpu or _is_smooth(n) else "matmul"


def _is_smooth(n: int) -> bool:
    """Whether n >= 1 has no prime factor above ``SMOOTH``."""
    for factor in range(2, SMOOTH + 1):
        while n % factor == 0:
            n //= factor
    return n == 1


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
    return basis(n, dtype, str(device))


def dct(X: Tensor, dim: int = -1, path: str = "auto") -> Tensor:
    """The orthonormal DCT-II along one dimension: X C^T for dim -1, C X for dim -2.

    The FFT path puts even entries before reversed odd ones and multiplies one real FFT of length
    n by quarter waves. Source: J. Makhoul, A Fast Cosine Transform in One and Two Dimensions, IEEE
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
    return sized_dct(X, dim, path)[0]


def sized_dct(
    X: Tensor, dim: int = -1, path: str = "auto", norm: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`dct`, and the size of every coefficient where that costs no pass of its own.

    Args:
        X: As for :func:`dct`.
        dim: As for :func:`dct`.
        path: As for :func:`dct`.
        norm: None, or what is summed over the lines: ``"l1"`` magnitudes or ``"l2"`` squares.

    Returns:
        S: What :func:`dct` returns.
        sizes: (..., n) float32 of a kernel, which writes S anyway; else None.
    """
    if _checked(X, dim, path) == "matmul":
        return _multiplied(X, dim, inverse=False), None
    ops = backend_for(X, "pass")
    V = torch.fft.rfft(ops.dct_reorder(X, dim))
    S, sizes = ops.dct_twiddle(V, X.shape[dim], dim, None if ops is reference else norm)
    return S, sizes


def idct(X: Tensor, dim: int = -1, path: str = "auto") -> Tensor:
    """The inverse of :func:`dct`, the orthonormal DCT-III: X C for dim -1, C^T X for dim -2.

    Args:
        X: As in :func:`dct`.
        dim: As in :func:`dct` (default: -1).
        path: As in :func:`dct` (default: ``"auto"``).

    Returns:
        A new tensor like X.

    Raises:
        ValueError: Where :func:`dct` does.
    """
    if _checked(X, dim, path) == "matmul":
        return _multiplied(X, dim, inverse=True)
    ops = backend_for(X, "pass")
    v = torch.fft.irfft(ops.dct_untwiddle(X, dim), X.shape[dim])
    x: Tensor = ops.dct_restore(v, dim)
    return x


def _checked(X: Tensor, dim: int, path: str) -> str:
    """The path that is taken."""
    if path not in DCT_PATHS:
        raise ValueError(f"path must be one of {', '.join(DCT_PATHS)}, got {path!r}")
    if dim not in (-1, -2) or X.ndim not in (2, 3):
        raise ValueError(f"expected (m, n) or (K, m, n) and dim -1 or -2, got {X.ndim}-D, {dim}")
    wide = torch.promote_types(X.dtype, torch.float32)
    return dct_path(X.shape[dim], X.device.type, wide) if path == "auto" else path


def _multiplied(X: Tensor, dim: int, inverse: bool) -> Tensor:
    X = X if X.dtype == torch.float64 else X.float()
    C = dct_basis(X.shape[dim], X.dtype, X.device)
    stack = X if X.ndim == 3 else X[None]
    C = (C.mT if inverse else C).expand(len(stack), -1, -1)
    S = product(stack, C.mT) if dim == -1 else product(C, stack)
    return S if X.ndim == 3 else S[0]
