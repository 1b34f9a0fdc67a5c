"""Bases by factorization: the top singular directions of stacks of matrices.

Rows are always projected (the driver transposes the weight where needed): a basis P is (K, m, r)
with orthonormal columns, P^T G is the projected gradient (K, r, n) and P (P^T G) the part of G
inside the subspace. Stateless functions; every matrix of a stack is factorized by itself, so a
stack has the bits of its matrices taken one at a time. G must be finite and not zero.
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

_GRAM_PANEL = 2**20  # entries of G that are scaled and multiplied at a time, to copy no whole G
_GRAM_ROWS = 256  # rows of a Gram matrix that are computed at a time, up to its diagonal
_ORTHONORMALITY_TOLERANCE = 1e-3  # largest entry of P^T P - I for a P that counts as a basis

BasisPair = tuple[Tensor, Tensor]
Attempt = Callable[[], Sequence[Tensor]]
"""Computes one basis per side of one matrix, or raises LinAlgError."""


def fix_signs(P: Tensor) -> Tensor:
    """Give each column of P (..., m, r) the sign that makes its largest entry positive.

    Largest in magnitude, the first one on ties. A factorization leaves the signs open; with this
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
    """Compute the r leading left singular vectors of every matrix, by falling singular value.

    "svd" takes them from an eigendecomposition of the smaller Gram matrix (of G / max|G|, so that
    squares neither overflow nor vanish): about ten times cheaper, exact for directions whose
    singular value is above 3.5e-4 of the largest in fp32, with nearly the same energy below.
    "svd_full" is the exact thin SVD. If a factorization fails, fp64 and then a full SVD on the CPU
    are tried; if nothing works the old basis stays, and a warning is given once.
    Source: GaLore, arXiv 2403.03507, section 4.

    Args:
        G: (K, m, n), fp32 or fp64 (narrower dtypes are worked on in fp32), any strides.
        r: Number of columns, at most min(m, n).
        kind: "svd" (default) or "svd_full".
        lapack_signs: Whether signs stay as LAPACK gives them (default: False, :func:`fix_signs`).
            LAPACK's signs belong to the matrix as it is passed: for those of a published code that
            factorized the transpose, pass ``G.mT`` to :func:`top_bases`, take the second basis.
        old: (K, m, r), the basis that stays where no factorization works (default: None). Without
            an old basis, or where it is zero, the first r unit vectors are taken.

    Returns:
        P: (K, m, r) fp32, or fp64 for fp64 G, contiguous, ||P^T P - I||_max <= 1e-5.

    Raises:
        ValueError: If kind is unknown or r out of range.
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
    """Compute leading left and right singular vectors of every matrix by one factorization.

    As :func:`top_basis`, for methods that project both sides (GaLore's ``proj_type="full"``). Signs
    of P and Q are fixed independently, except under ``lapack_signs``, where "svd_full" gives
    U[:, :r] and V[:, :r] of one call.

    Args:
        G: (K, m, n).
        r: Number of columns, at most min(m, n).
        kind: "svd" (default) or "svd_full".
        lapack_signs: Whether signs stay as they are computed (default: False).
        old: The pair (K, m, r), (K, n, r) that stays where no factorization works (default: None).

    Returns:
        P: (K, m, r), and Q: (K, n, r).

    Raises:
        ValueError: If kind is unknown or r out of range.
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
    """Run every matrix through a chain of attempts and take the first valid result.

    Args:
        G: (K, m, n), finite.
        r: Number of columns.
        old: Bases that stay where all attempts fail, one entry per side: (K, m, r)[, (K, n, r)], or
            None or zeros for unit vectors.
        attempts: (number of the matrix, matrix (m, n)) -> attempts in the order in which they are
            tried.
        sign_rule: Rule for the signs of the columns (default: :func:`fix_signs`), or None.

    Returns:
        One basis (K, d, r) per entry of ``old``, in the dtype that :func:`top_basis` returns.
    """
    bases_of_matrices: list[list[Tensor]] = []
    with full_precision_matmul(G.device):
        for k, X in enumerate(G):
            bases = _first_valid(X, attempts(k, X), len(old))
            if bases is None:
                old_of_matrix = [None if B is None else B[k] for B in old]
                bases = [
                    _fallback_basis(d, r, X, B)
                    for d, B in zip(X.shape, old_of_matrix, strict=False)
                ]
            elif sign_rule is not None:
                bases = [sign_rule(P) for P in bases]
            bases_of_matrices.append(bases)
    return tuple(torch.stack(side) for side in zip(*bases_of_matrices, strict=True))


def _first_valid(G: Tensor, attempts: Sequence[Attempt], sides: int) -> list[Tensor] | None:
    """The first orthonormal result of the attempts on one matrix (m, n), or None."""
    for attempt in attempts:
        try:
            bases = [B.to(G.device, work_dtype(G)) for B in attempt()[:sides]]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if all(_is_orthonormal(P) for P in bases):
            return bases
    return None


def svd_fallbacks(G: Tensor, r: int, kind: str, sides: int) -> tuple[Attempt, ...]:
    """Attempts on one matrix (m, n): the kind asked for, the Gram matrix in fp64, a full SVD."""
    work = work_dtype(G)
    both = sides == 2

    def asked_for() -> BasisPair:
        if kind == "svd_full":
            return _thin_svd(G.to(work), r)
        return _gram_eigenvectors(G, r, work, both)

    return (
        asked_for,
        lambda: _gram_eigenvectors(G, r, torch.float64, both),
        lambda: _thin_svd(G.to("cpu", torch.float64), r),
    )


def _thin_svd(G: Tensor, r: int) -> BasisPair:
    """Singular vectors of one matrix (m, n) by the exact thin SVD, r columns on both sides."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r], Vh[:r].mT


def _gram_eigenvectors(G: Tensor, r: int, dtype: torch.dtype, both: bool) -> BasisPair:
    """Singular vectors of one matrix (m, n) by its smaller Gram matrix; Q is empty unless ``both``.

    A tall matrix has Q anyway, from which P follows.
    """
    m, n = G.shape
    if m > n:
        Q, P = _gram_eigenvectors(G.mT, r, dtype, both=True)
        return P, Q
    K = torch.zeros(m, m, dtype=dtype, device=G.device)
    for _, X in normalized_panels(G, dtype):
        for i in range(0, m, _GRAM_ROWS):  # only the lower triangle, which is all that eigh reads
            j = min(i + _GRAM_ROWS, m)
            K[i:j, :j].addmm_(X[i:j], X[:j].mT)
    P = _eigenvectors_in_place(K)[:, -r:].flip(-1)  # eigh's order is rising
    return P, right_basis(G, P) if both else P[:0]


def _eigenvectors_in_place(K: Tensor) -> Tensor:
    """Eigenvectors of K (m, m), whose lower triangle counts, in the memory of K.

    Column by column, as LAPACK has them; row by row eigh would copy K, which is as large as a
    square gradient. So the lower triangle goes to the upper one, which is the lower one of K^T.
    """
    m = len(K)
    for i in range(0, m, _GRAM_ROWS):
        j = min(i + _GRAM_ROWS, m)
        K[:i, i:j] = K[i:j, :i].mT
        square = K[i:j, i:j].tril()
        K[i:j, i:j] = square + square.tril(-1).mT
    V = K.mT
    vectors: Tensor = torch.linalg.eigh(V, out=(K.new_empty(m), V)).eigenvectors
    return vectors


def right_basis(G: Tensor, P: Tensor) -> Tensor:
    """Q = orth(G^T P), the other side of one matrix G (m, n) for a basis P (m, r), in P's dtype.

    Householder QR keeps Q orthonormal where G is almost rank deficient, which the textbook
    G^T P / sigma does not.
    """
    Y = torch.empty(G.shape[1], P.shape[1], dtype=P.dtype, device=G.device)
    for columns, X in normalized_panels(G, P.dtype):
        torch.mm(X.mT, P, out=Y[columns])
    Q: Tensor = torch.linalg.qr(Y).Q
    return Q


def normalized_panels(
    G: Tensor, dtype: torch.dtype, scale: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield column panels of G / scale, contiguous, so that strides of G change no bits.

    Args:
        G: (m, n).
        dtype: Dtype of the panels.
        scale: One number (default: None, the largest magnitude in G).
    """
    m, n = G.shape
    width = max(64, _GRAM_PANEL // m)
    if scale is None:
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
    """The old basis in place of one that could not be computed, else unit vectors."""
    _warn_once("no factorization of a gradient succeeded; its old projection basis is kept")
    if old is not None and bool(old.any()):
        return old.to(G.device, work_dtype(G))
    return torch.eye(d, r, dtype=work_dtype(G), device=G.device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def work_dtype(G: Tensor) -> torch.dtype:
    """The dtype of factorizations: LAPACK has fp32 and fp64 only."""
    return torch.float64 if G.dtype == torch.float64 else torch.float32


@contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """Compute fp32 products in full, even if the program allows TF32 or bf16 elsewhere."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    backend = backend.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
