"""Bases by factorisation: the top singular directions of stacks of matrices.

Rows are always projected (the driver has turned the weight before): a basis P is (K, m, r) with
orthonormal columns, P^T G is the projected gradient (K, r, n) and P (P^T G) the part of G that is
kept. Stateless functions; every matrix of a stack is factorised by itself, so a stack has the bits
of its matrices taken one at a time. G must be finite and not zero.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._core.validation import check_rank

__all__ = [
    "first_valid_bases",
    "fix_signs",
    "full_precision_matmul",
    "normalized_panels",
    "right_basis",
    "svd_fallbacks",
    "top_bases",
    "top_basis",
]

SVD_KINDS = ("svd", "svd_full")

_GRAM_PANEL = 2**20  # elements of G that are scaled and multiplied at a time: no copy of G is made
_GRAM_ROWS = 256  # rows of a Gram matrix that are computed at a time, up to its diagonal
_ORTHONORMALITY_TOLERANCE = 1e-3  # largest entry of P^T P - I that is still taken for a basis

BasisPair = tuple[Tensor, Tensor]
Attempt = Callable[[], Sequence[Tensor]]


def fix_signs(P: Tensor) -> Tensor:
    """Gives each column of P (..., m, r) the sign that makes its largest entry positive.

    Largest in magnitude, the first one on ties. A factorisation leaves the signs open; with this
    rule equal subspaces have equal columns, so moments keep their meaning and ranks agree.
    """
    largest = P.gather(-2, P.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -P, P)


def top_basis(
    G: Tensor,
    r: int,
    kind: str = "svd",
    *,
    lapack_signs: bool = False,
    old: Tensor | None = None,
) -> Tensor:
    """The r leading left singular vectors of every matrix, by falling singular value.

    "svd" takes them from an eigendecomposition of the smaller Gram matrix (of G / max|G|, so that
    squares neither overflow nor vanish): about ten times cheaper, exact for directions whose
    singular value is above 3.5e-4 of the largest in fp32, with nearly the same energy below.
    "svd_full" is the exact thin SVD. If a factorisation fails, fp64 and then a full SVD on the CPU
    are tried; if nothing works the old basis stays, and a warning is given once.
    Source: GaLore, arXiv 2403.03507, section 4.

    Args:
        G: (K, m, n), fp32 or fp64 (narrower dtypes are worked on in fp32), any strides.
        r: number of columns, at most min(m, n).
        kind: "svd" or "svd_full".
        lapack_signs: leave the signs as LAPACK gives them instead of :func:`fix_signs`. They
            belong to the matrix as it is passed: to have those of a published code that factorised
            the transpose, pass ``G.mT`` to :func:`top_bases` and take the second basis.
        old: (K, m, r), the basis to keep where no factorisation works; without it, or where it
            is zero, the first r unit vectors are taken.

    Returns:
        P: (K, m, r) fp32, or fp64 for fp64 G, contiguous, ||P^T P - I||_max <= 1e-5.

    Raises:
        ValueError: unknown kind, or r out of range.
    """
    return _top_singular_bases(G, r, kind, lapack_signs, (old,))[0]


def top_bases(
    G: Tensor,
    r: int,
    kind: str = "svd",
    *,
    lapack_signs: bool = False,
    old: tuple[Tensor, Tensor] | None = None,
) -> BasisPair:
    """Leading left and right singular vectors of every matrix, from one factorisation.

    As :func:`top_basis`, for methods that project both sides (GaLore's ``proj_type="full"``). The
    signs of the two are fixed independently, except under ``lapack_signs``, where "svd_full" gives
    U[:, :r] and V[:, :r] of one call.

    Args:
        G: (K, m, n).
        r: number of columns, at most min(m, n).
        kind: "svd" or "svd_full".
        lapack_signs: leave the signs as they are computed.
        old: the pair (K, m, r), (K, n, r) to keep where no factorisation works.

    Returns:
        P: (K, m, r), and Q: (K, n, r).

    Raises:
        ValueError: unknown kind, or r out of range.
    """
    P, Q = _top_singular_bases(G, r, kind, lapack_signs, old or (None, None))
    return P, Q


def _top_singular_bases(
    G: Tensor, r: int, kind: str, lapack_signs: bool, old: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    if kind not in SVD_KINDS:
        raise ValueError(f"kind must be one of {', '.join(SVD_KINDS)}, got {kind!r}")
    check_rank(r, min(G.shape[-2:]))
    sign_rule = None if lapack_signs else fix_signs
    return first_valid_bases(G, r, old, lambda k, X: svd_fallbacks(X, r, kind, len(old)), sign_rule)


def first_valid_bases(
    G: Tensor,
    r: int,
    old: Sequence[Tensor | None],
    attempts: Callable[[int, Tensor], Sequence[Attempt]],
    sign_rule: Callable[[Tensor], Tensor] | None = fix_signs,
) -> tuple[Tensor, ...]:
    """Runs every matrix through a chain of attempts and keeps the first sound result.

    Args:
        G: (K, m, n), finite.
        r: number of columns.
        old: what to keep where all attempts fail, one entry per side: (K, m, r)[, (K, n, r)], or
            None or zeros for unit vectors.
        attempts: (number of the matrix, matrix (m, n)) -> functions that return one basis per
            side, in the order in which they are tried.
        sign_rule: rule for the signs of the columns.

    Returns:
        One basis (K, d, r) per entry of ``old``, fp32 or fp64 as :func:`top_basis` has it.
    """
    found: list[list[Tensor]] = []
    with full_precision_matmul(G.device):
        for k, X in enumerate(G):
            bases = _first_valid(X, attempts(k, X), len(old))
            if bases is None:
                bases = [
                    _fallback_basis(X.shape[s], r, X, B if B is None else B[k])
                    for s, B in enumerate(old)
                ]
            elif sign_rule is not None:
                bases = [sign_rule(P) for P in bases]
            found.append(bases)
    return tuple(torch.stack(side) for side in zip(*found, strict=True))


def _first_valid(G: Tensor, attempts: Sequence[Attempt], sides: int) -> list[Tensor] | None:
    """The first sound result of the chain for one matrix (m, n); None if there is none."""
    for attempt in attempts:
        try:
            bases = [B.to(G.device, work_dtype(G)) for B in attempt()[:sides]]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if all(_is_orthonormal(P) for P in bases):
            return bases
    return None


def svd_fallbacks(G: Tensor, r: int, kind: str, sides: int) -> tuple[Attempt, ...]:
    """The chain of one matrix (m, n): what was asked for, the Gram matrix in fp64, a full SVD."""
    work, both = work_dtype(G), sides == 2
    return (
        lambda: (
            _thin_svd(G.to(work), r) if kind == "svd_full" else _gram_eigenvectors(G, r, work, both)
        ),
        lambda: _gram_eigenvectors(G, r, torch.float64, both),
        lambda: _thin_svd(G.to("cpu", torch.float64), r),
    )


def _thin_svd(G: Tensor, r: int) -> BasisPair:
    """The exact thin SVD of one matrix (m, n), cut to r columns on both sides."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r], Vh[:r].mT


def _gram_eigenvectors(G: Tensor, r: int, dtype: torch.dtype, both: bool) -> BasisPair:
    """Leading vectors of one matrix (m, n) by its smaller Gram matrix; the second may be empty."""
    m, n = G.shape
    if m > n:
        Q, P = _gram_eigenvectors(G.mT, r, dtype, both=True)
        return P, Q
    K = torch.zeros(m, m, dtype=dtype, device=G.device)
    for _, X in normalized_panels(G, dtype):
        for i in range(0, m, _GRAM_ROWS):  # eigh reads the lower triangle only: leave out the rest
            j = min(i + _GRAM_ROWS, m)
            K[i:j, :j].addmm_(X[i:j], X[:j].mT)
    P = torch.linalg.eigh(K).eigenvectors[:, -r:].flip(-1)  # they come in rising order
    return P, right_basis(G, P) if both else P[:0]


def right_basis(G: Tensor, P: Tensor) -> Tensor:
    """Q = orth(G^T P), the other side of one matrix G (m, n) for a basis P (m, r), in P's dtype.

    Householder QR keeps it orthonormal where G is almost rank deficient, which the textbook
    G^T P / sigma does not.
    """
    Y = torch.empty(G.shape[1], P.shape[1], dtype=P.dtype, device=G.device)
    for columns, X in normalized_panels(G, P.dtype):
        torch.mm(X.mT, P, out=Y[columns])
    Q: Tensor = torch.linalg.qr(Y).Q
    return Q


def normalized_panels(G: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Column panels of G / max|G|, contiguous: the same numbers whatever the strides of G."""
    m, n = G.shape
    width = max(64, _GRAM_PANEL // m)
    low, high = G.aminmax()  # no temporary, and far cheaper than a norm
    scale = torch.maximum(-low, high).to(dtype)
    for start in range(0, n, width):
        columns = slice(start, min(start + width, n))
        X = torch.empty(m, columns.stop - start, dtype=dtype, device=G.device)
        yield columns, X.copy_(G[:, columns]).div_(scale)


def _is_orthonormal(P: Tensor) -> bool:
    """Whether the columns of P (d, r) are orthonormal; a non-finite entry fails it too."""
    E = P.mT @ P
    E.diagonal().sub_(1)
    return bool(E.abs().max() <= _ORTHONORMALITY_TOLERANCE)


def _fallback_basis(d: int, r: int, G: Tensor, old: Tensor | None) -> Tensor:
    """What stands in for a basis that could not be computed: the old one, else unit vectors."""
    _warn_once("no factorisation of a gradient succeeded; its old projection basis is kept")
    if old is not None and bool(old.any()):
        return old.to(G.device, work_dtype(G))
    return torch.eye(d, r, dtype=work_dtype(G), device=G.device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def work_dtype(G: Tensor) -> torch.dtype:
    """LAPACK knows fp32 and fp64 only."""
    return torch.float64 if G.dtype == torch.float64 else torch.float32


@contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """Full fp32 products, also where the program allows TF32 or bf16 for its own."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    backend = backend.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
