"""Orthogonal factors of square matrices, completed from an older one where A leaves them open.

Factors have one choice of signs whichever way they are computed, and on a CPU every matrix of a
stack is factorized by itself, so that a stack has the bits of its matrices one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.matmul import product
from .methods import polar_factor

_SHIFT = 1e-7
"""What the first Cholesky factorization adds to the Gram matrix, relative to its trace."""
_DAMPING = 8
"""Share of the old factor in units of the dtype's eps: 1e-6 in float32, just above rounding."""
_LINE_BYTES = 64
"""Rows of so many bytes, or a multiple, start every matrix of a stack alike for LAPACK."""
_BATCH = 2**17
"""Entries that are factorized in one call, so that temporaries stay in the cache."""
_CROWDED, _CROWDED_FROM = 256, 512
"""Columns of so many entries, or a multiple, share lines of the cache; where that is felt."""
_ROWS_OF_ZEROS = 4
"""Rows below such a matrix, which part its columns."""
_NULL = 32
"""Largest eigenvalue that is taken for 0, in units of eps times the largest one."""
_SLACK = 1e-3
"""Largest entry of Q^T Q - I that is still taken for a rotation."""


def householder_qr(A: Tensor) -> Tensor:
    """Q of A = Q T with the diagonal of T positive, by Householder reflections.

    Args:
        A: (K, m, m), fp32 or fp64, any strides.

    Returns:
        (K, m, m), orthogonal whatever the rank of A.
    """
    return _each(_reflections, A)


def _reflections(A: Tensor) -> Tensor:
    return _product_of_reflections_(*_geqrf(A), torch.empty_like(A))


def _geqrf(A: Tensor) -> tuple[Tensor, Tensor]:
    """LAPACK's reflections of A (..., m, n), by columns, perhaps with rows of zeros below them.

    Columns 2^k bytes apart share lines of the cache: with 4 rows more reflections of 1024x1024 take
    0.7 of the time, and are the same.
    """
    *batch, m, n = A.shape
    crowded = A.device.type == "cpu" and m >= _CROWDED_FROM and m % _CROWDED == 0
    H = A.new_empty(*batch, n, m + _ROWS_OF_ZEROS * crowded).mT
    H[..., :m, :] = A
    H[..., m:, :] = 0
    tau = A.new_empty(*batch, min(m, n))
    torch.geqrf(H, out=(H, tau))  # one tensor object as input and result: there is nothing to copy
    return H, tau


def _product_of_reflections_(H: Tensor, tau: Tensor, out: Tensor) -> Tensor:
    """Q of such reflections, with the diagonal of Q^T A positive, in ``out`` (..., m, m).

    The reflections are overwritten.
    """
    signs = 1 - 2 * (H.diagonal(dim1=-2, dim2=-1) < 0).to(H.dtype)
    torch.linalg.householder_product(H, tau, out=H)
    return torch.mul(H[..., : H.shape[-1], :], signs.unsqueeze(-2), out=out)


def _completed_householder(B: Tensor, old: Tensor) -> Tensor:
    """Q of B (K, m, m) of norm 1; columns that add no direction of their own are the old ones.

    Matrices that fill whole cache lines are factorized in one call, which has their bits one by
    one. Q takes the place of B.
    """
    fills_lines = B.shape[-1] * B.element_size() % _LINE_BYTES == 0
    size = max(1, _BATCH // B[0].numel()) if fills_lines else 1
    for i in range(0, len(B), size):
        H, tau = _geqrf(B[i : i + size])
        least = H.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
        # twice the bound, so that rounding hides none of the columns that are next to nothing
        for k in (least <= 2 * _completion(B)).nonzero().flatten().tolist():
            _complete_(H[k], tau[k], B[i + k], old[i + k])
        _product_of_reflections_(H, tau, B[i : i + size])
    return B


def _completion(B: Tensor) -> float:
    """What a column of B, of norm 1, must add to the span of those before it."""
    return _DAMPING * torch.finfo(B.dtype).eps


def _complete_(H: Tensor, tau: Tensor, B: Tensor, old: Tensor) -> None:
    """Find the reflections of B (m, m) anew, in place, from the first column that is replaced."""
    m, completion = len(B), _completion(B)
    is_nothing = B.square().sum(0) <= completion**2
    if bool(is_nothing.any()):  # seen without reflections
        B = torch.where(is_nothing, old, B)
        for place, found in zip((H, tau), _geqrf(B), strict=True):
            place.copy_(found)
    is_open = H.diagonal().abs() <= completion
    if bool(is_open.any()):
        j = int(is_open.nonzero()[0])
        rest = torch.where(is_open[j:], old[:, j:], B[:, j:])
        if j > 0:
            rest = torch.ormqr(H[:m, :j], tau[:j], rest, left=True, transpose=True)
        H[j:m, j:], tau[j:] = torch.geqrf(rest[j:])


def cholesky_qr(A: Tensor, passes: int = 2) -> tuple[Tensor, Tensor]:
    """The same Q as A C^-1 with A^T A = C^T C, C upper triangular, and whether it is a rotation.

    The first pass shifts A^T A by 1e-7 ||A||_F^2, for each matrix by its own norm. Alone it leaves
    singular values s / sqrt(s^2 + shift), far from 1 for an ill-conditioned A; the second pass is
    exact up to a condition number of about 1e4 in float32, a third up to 1e6.
    Source: shifted CholeskyQR, arXiv 1809.11085.

    Args:
        A: (K, m, m), fp32 or fp64.
        passes: how many times.

    Returns:
        Q: (K, m, m), and flags (K, 1, 1): no entry of Q^T Q - I is above 1e-3. Nothing waits for
            the device.
    """
    size = torch.linalg.matrix_norm(A, keepdim=True)
    Q = A / torch.where(size > 0, size, torch.ones_like(size))
    is_rotation = size.isfinite() & (size > 0)
    for k in range(passes):
        S = product(Q.mT, Q)
        if k == 0:
            S.diagonal(dim1=-2, dim2=-1).add_(_SHIFT)
        L, info = torch.linalg.cholesky_ex(S)
        is_rotation = is_rotation & (info == 0).view(-1, 1, 1)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    S = product(Q.mT, Q)
    S.diagonal(dim1=-2, dim2=-1).sub_(1)
    return Q, is_rotation & (S.abs().amax((-2, -1), keepdim=True) < _SLACK)


def rotated(
    A: Tensor,
    old: Tensor,
    *,
    wait: bool = True,
    cholesky: bool | None = None,
    overwrite: bool = False,
) -> Tensor:
    """The Q factor of A; directions that A leaves open are those of the old factor.

    On a CPU, where Householder reflections tell which columns add less than 8 eps ||A||_F to the
    span of those before, the old factor's take their place, so that any other A keeps the accuracy
    of plain QR. On an accelerator 8 eps ||A||_F times the old factor is added to all, which turns
    the result by 8 eps times the condition number. There two Cholesky passes serve; a matrix that
    these do not make orthogonal is done again by reflections, or, where nothing may wait for it,
    by a third pass, and if that fails it keeps the old factor.

    Args:
        A: (K, m, m), fp32 or fp64.
        old: (K, m, m), orthogonal.
        wait: whether the host may look at the flags of the Cholesky factorizations.
        cholesky: whether to take the way of accelerators (None: by device).
        overwrite: whether A is not needed any more, and may be changed (False).

    Returns:
        (K, m, m), a new tensor; a copy of the old factor where A is zero or not finite.
    """
    if not (A.device.type != "cpu" if cholesky is None else cholesky):
        B, usable = _unit(A.contiguous(), overwrite)
        Q = _completed_householder(B, old)
        return Q if _host_sees_all(usable) else torch.where(usable, Q, old, out=Q)
    B, usable = _completed(A, old)
    if wait:
        Q, is_rotation = cholesky_qr(B)
        bad = (~is_rotation).flatten().nonzero().flatten()
        if len(bad):
            Q[bad] = householder_qr(B[bad])
    else:
        Q, is_rotation = cholesky_qr(B, passes=3)
        usable = usable & is_rotation
    return torch.where(usable, Q, old, out=Q)


def nearest_rotation(A: Tensor, old: Tensor) -> Tensor:
    """The polar factor of A, completed like that of :func:`rotated`; exact, and slow.

    Args:
        A: (K, m, m), fp32 or fp64.
        old: (K, m, m), orthogonal.

    Returns:
        (K, m, m), the orthogonal R of largest <R, A>.
    """
    B, usable = _completed(A, old)
    R = polar_factor(B.double(), "svd").to(A.dtype)  # in float32 it would cut off the completion
    return torch.where(usable, R, old)


def eigenbasis(S: Tensor, old: Tensor) -> Tensor:
    """Eigenvectors of a symmetric S, by falling eigenvalue; the largest entry of each is positive.

    Args:
        S: (K, m, m), fp32 or fp64.
        old: (K, m, m), kept where S is zero or not finite.

    Returns:
        (K, m, m), orthogonal. The host waits for the device.
    """
    scale, usable = _scale(S)
    V = _each(lambda X: torch.linalg.eigh(X)[1], (S / scale).masked_fill_(~usable, 0.0)).flip(-1)
    peak = V.gather(-2, V.abs().argmax(-2, keepdim=True))
    return torch.where(usable, torch.where(peak < 0, -V, V), old)


def completed_eigenbasis(S: Tensor, old: Tensor, rank: int | None = None) -> Tensor:
    """Eigenvectors of a positive S as :func:`eigenbasis` has them, but for those of eigenvalue 0.

    LAPACK chooses in the null space, by rounding. Here what is orthogonal to the other eigenvectors
    is taken from the old basis by the reflections that make those its first columns: a fixed rule.

    Args:
        S: (K, m, m), fp32 or fp64, without negative eigenvalues but for rounding.
        old: (K, m, m), orthogonal.
        rank: the largest number of positive eigenvalues that S can have (default: None, m).

    Returns:
        (K, m, m), orthogonal; a copy of the old basis where S is zero or not finite. The host waits
            for the device.
    """
    m = S.shape[-1]
    rank = m if rank is None else min(rank, m)
    scale, usable = _scale(S)
    bases = []
    for X, Q, is_usable in zip(S / scale, old, usable.flatten().tolist(), strict=True):
        if not is_usable:
            bases.append(Q.clone())
            continue
        values, V = torch.linalg.eigh(X)
        values, V = values.flip(-1), V.flip(-1)
        peak = V.gather(-2, V.abs().argmax(-2, keepdim=True))
        V = torch.where(peak < 0, -V, V)
        tiny = _NULL * torch.finfo(S.dtype).eps * values[0]
        r = min(rank, int((values > tiny).sum()))
        bases.append(V if r == m else _completed_columns(V[:, :r], Q))
    return bases[0].unsqueeze(0) if len(bases) == 1 else torch.stack(bases)


def _completed_columns(V: Tensor, old: Tensor) -> Tensor:
    """V (m, r) of orthonormal columns, and m - r more, reflections of the last of the old basis."""
    m, r = V.shape
    H, tau = torch.geqrf(product(old.mT.unsqueeze(0), V.unsqueeze(0))[0])
    rest = torch.linalg.householder_product(torch.cat([H, H.new_zeros(m, m - r)], -1), tau)[:, r:]
    return torch.cat([V, product(old.unsqueeze(0), rest.unsqueeze(0))[0]], -1)


def left_basis(X: Tensor) -> Tensor:
    """All left singular vectors of X as (K, m, m), also those that X leaves open.

    Args:
        X: (K, m, n).
    """
    return _each(lambda M: torch.linalg.svd(M, full_matrices=M.shape[-2] > M.shape[-1])[0], X)


def _each(fn: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """A factorization of every matrix: one by one on a CPU, where LAPACK's bits depend on place."""
    if A.device.type != "cpu":
        return fn(A)
    parts = [fn(X).contiguous() for X in A]  # LAPACK's are column-major
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _scale(A: Tensor) -> tuple[Tensor, Tensor]:
    """max|A| (K, 1, 1), or 1 where A is zero or not finite, and whether it is neither."""
    largest = torch.maximum(-A.amin((-2, -1), keepdim=True), A.amax((-2, -1), keepdim=True))
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, largest, torch.ones_like(largest)), usable


def _completed(A: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """A / ||A||_F with a trace of the old factor, and whether A is finite and not zero."""
    B, usable = _unit(A)
    return B.add_(old, alpha=_DAMPING * torch.finfo(A.dtype).eps), usable


def _host_sees_all(flags: Tensor) -> bool:
    """Whether all are set, so that a pass is saved; nothing waits for an accelerator."""
    return flags.device.type == "cpu" and bool(flags.all())


def _unit(A: Tensor, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """A / ||A||_F, or 0, and whether A is finite and not zero."""
    scale, usable = _scale(A)
    B = A.div_(scale) if overwrite else A / scale
    if not _host_sees_all(usable):
        B.masked_fill_(~usable, 0.0)
    size = product(B.flatten(1).unsqueeze(1), B.flatten(1).unsqueeze(2)).sqrt_()  # ||B||_F
    size = torch.where(usable, size, torch.ones_like(size))
    return B.div_(size), usable
