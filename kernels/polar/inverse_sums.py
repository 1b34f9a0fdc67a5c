"""k (I + sum_j a_j (S + c_j I)^(-1)), the sum of inverses of one rational step, in three ways.

LAPACK takes the matrices of a stack one after the other, whatever threads there are, and needs ten
times as long for a matrix of side 64 as its multiplications would in a batched product. So on a CPU
only blocks on the diagonal are factorized by LAPACK. With S + c I = L L^T every inverse is M^T M
for M = L^(-1), which is as accurate as a triangular solve: an elimination with inverses of whole
blocks was a hundred times less so at a condition number of 3e4. In a stack M is found row by row of
blocks. Rows of M and of the triangle L^T stand side by side in one matrix [M | L^T], so that one
product updates both. The shifted matrices of one large S are halved together, until their blocks
are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..dispatch import backend_for
from ..reference.symmetric import gram_into
from .coefficients import Rational

_BLOCK = 16
"""Side of the blocks of small matrices in a stack: a multiple of cache lines, see ``batching``."""
_WIDE_BLOCK = 32
"""The same for matrices of side ``_WIDE_FROM``, where fewer and larger products are faster."""
_WIDE_FROM = 112
_PANEL = 64
"""Side of the blocks of one large matrix."""
_PANELS_FROM = 384
"""Side from which one matrix is faster in blocks than by LAPACK as a whole."""
_GAP = 8
"""Entries between the rows of its terms: rows 2^k bytes apart would share lines of the cache."""


def uses_blocks(S: Tensor) -> bool:
    """Whether S (m, m) or (K, m, m) is inverted in blocks; it depends on device and shape alone.

    Args:
        S: A Gram matrix X X^T, or a stack of those; or X.
    """
    return S.device.type == "cpu" and (S.ndim == 3 or S.shape[-2] >= _PANELS_FROM)


def sum_of_inverses(S: Tensor, step: Rational, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix k (I + sum_j a_j (S / norm + c_j I)^(-1)) with k = scale / sqrt(norm).

    Args:
        S: (m, m) or (K, m, m), positive semidefinite, all of it valid. It is overwritten.
        step: Its shifts c, weights a and scale.
        norm: (1, 1) or (K, 1, 1), at least the largest eigenvalue.

    Returns:
        A tensor of S's shape, and flags (...): every factorization worked, so S was finite.
    """
    if not uses_blocks(S):
        return _sum_by_lapack(S, step, norm)
    if S.ndim == 3:
        return _sum_in_stack(S, step, norm)
    return _sum_in_panels(S, _space(S, len(S), len(step.shifts)), step, norm)


def inverse_sum_of(X: Tensor, step: Rational, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``sum_of_inverses`` over ``size``, of S = X X^T / size^2 and norm = ||S||_F.

    Args:
        X: (m, n) or (K, m, n), of Frobenius norm at most ``size``.
        step: Shifts, weights and scale.
        size: A scalar or (K, 1, 1), whose square is in range. None: 1.

    Returns:
        (m, m) or (K, m, m), and flags (...) as there.
    """
    ops, M = backend_for(X, "symmetric"), None
    if ops is reference and X.ndim == 2 and uses_blocks(X):
        M = _space(X, len(X), len(step.shifts))
        S = gram_into(M[0], X)
    else:
        S = ops.gram(X)
    if size is not None:
        S.div_(size * size)
    norm = torch.linalg.matrix_norm(S, keepdim=True)
    # X of norm one has norm >= m^(-1/2), so this acts only where eps did.
    norm = norm.clamp(min=0.5 * X.shape[-2] ** -0.5)
    T, worked = sum_of_inverses(S, step, norm) if M is None else _sum_in_panels(S, M, step, norm)
    return (T if size is None else T.div_(size)), worked


# By LAPACK, one matrix after the other ------------------------------------------------------------


def _sum_by_lapack(S: Tensor, step: Rational, norm: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_of_inverses`` one term after the other."""
    S.div_(norm)
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    entries = diagonal.clone()
    worked = torch.ones(S.shape[:-2], dtype=torch.bool, device=S.device)
    T: Tensor | None = None
    for j, (shift, weight) in enumerate(zip(step.shifts, step.weights, strict=True)):
        torch.add(entries, shift, out=diagonal)
        inverse, factorized = inverse_(S if j == len(step.shifts) - 1 else S.clone())
        worked &= factorized
        T = inverse.mul_(weight) if T is None else T.add_(inverse, alpha=weight)
    assert T is not None
    T.diagonal(dim1=-2, dim2=-1).add_(1)
    return T.mul_(step.scale * norm.rsqrt()), worked


def inverse_(S: Tensor) -> tuple[Tensor, Tensor]:
    """Invert a symmetric positive definite S in place; also whether its factorization succeeded.

    Where it failed the result is the identity: torch refuses a factor with a zero on its diagonal.
    """
    # LAPACK wants columns, and a symmetric matrix is its own transpose. One tensor object as input
    # and result tells torch that there is nothing to copy.
    L = S.mT
    info = torch.empty(S.shape[:-2], dtype=torch.int32, device=S.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    factorized = info == 0
    if not bool(factorized.all()):
        L.masked_fill_(~factorized[..., None, None], 0.0)
        L.diagonal(dim1=-2, dim2=-1).masked_fill_(~factorized[..., None], 1.0)
    torch.cholesky_inverse(L, out=L)
    return L, factorized


# Stacks of small matrices -------------------------------------------------------------------------


def _sum_in_stack(S: Tensor, step: Rational, norm: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_of_inverses`` of a stack, all terms at once: one product of stacked factors."""
    K, m, _ = S.shape
    count = len(step.shifts)
    norm = norm.unsqueeze(1)  # (K, 1, 1, 1)
    u, c = _divisors(step, norm)
    B = S.unsqueeze(1) / u
    B.diagonal(dim1=-2, dim2=-1).add_((norm * c / u).squeeze(-1))
    M, worked = inverse_factors(B.view(K * count, m, m))
    M = M.view(K, count * m, m)
    T = torch.bmm(M.mT, M)
    T.diagonal(dim1=-2, dim2=-1).add_((step.scale * norm.rsqrt()).view(K, 1))
    return T, worked.view(K, count).all(-1)


def _divisors(step: Rational, norm: Tensor) -> tuple[Tensor, Tensor]:
    """u_j and c_j: k a_j (S / norm + c_j I)^(-1) is the inverse of (S + norm c_j I) / u_j.

    Args:
        step: The rational step.
        norm: (..., 1, 1, 1).

    Returns:
        u = k a norm, (..., count, 1, 1), and c, (count, 1, 1).
    """
    a, c = norm.new_tensor([step.weights, step.shifts]).view(2, len(step.shifts), 1, 1)
    return (step.scale * norm.sqrt()) * a, c


def inverse_factors(B: Tensor) -> tuple[Tensor, Tensor]:
    """M with M^T M = B^(-1), lower triangular, for every matrix of a stack.

    Args:
        B: (K, m, m), symmetric and positive definite. It is overwritten.

    Returns:
        M: (K, m, m), and flags (K,): whether the factorization worked.
    """
    m = B.shape[-1]
    side = _WIDE_BLOCK if m >= _WIDE_FROM else _BLOCK
    M = torch.zeros_like(B)
    infos = []
    for i in range(0, m, side):  # B is (K, m - i, m): columns of M before i, what is left after it
        j = min(i + side, m)
        L, info = torch.linalg.cholesky_ex(B[:, : j - i, i:j])
        infos.append(info)
        I = torch.eye(j - i, dtype=B.dtype, device=B.device).expand_as(L)
        # solving from the right is twice as fast here
        X = torch.linalg.solve_triangular(L, I, upper=False, left=False)
        R = torch.bmm(X, B[:, : j - i])  # (K, j - i, m), a row of [M | L^T]
        R[:, :, i:j] = X
        M[:, i:j, :j] = R[:, :, :j]
        if j < m:
            B[:, j - i :, i:j] = 0
            B = torch.baddbmm(B[:, j - i :], R[:, :, j:].mT, R, alpha=-1)
    return M, (torch.stack(infos) == 0).all(0)


# One large matrix ---------------------------------------------------------------------------------


def _sum_in_panels(S: Tensor, M: Tensor, step: Rational, norm: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_of_inverses`` of one large matrix, all terms at once, in panels of rows.

    Args:
        S: (m, m); it may lie in the first matrix of M.
        M: (count, m, m), memory for the terms, and for the sum.
        step: The rational step.
        norm: (1, 1).
    """
    m = len(S)
    u, c = _divisors(step, norm.unsqueeze(0))
    for j in reversed(range(len(M))):
        torch.div(S, u[j], out=M[j])
    M.diagonal(dim1=-2, dim2=-1).add_((norm * c / u).squeeze(-1))
    infos = _inverse_factors_(M)
    T = M[0]  # rows of M above a panel are not read again
    for p in range(0, m, _PANEL):  # the lower half of M^T M, where M is triangular
        q = min(p + _PANEL, m)
        panel = torch.mm(M[0, p:, p:q].mT, M[0, p:, :q])
        for N in M[1:]:
            panel.addmm_(N[p:, p:q].mT, N[p:, :q])
        T[p:q, :q] = panel
    for p in range(_PANEL, m, _PANEL):
        T[:p, p : p + _PANEL] = T[p : p + _PANEL, :p].mT
    T.diagonal().add_((step.scale * norm.rsqrt()).view(1))
    return T, (torch.cat(infos) == 0).all()


def _space(like: Tensor, m: int, count: int) -> Tensor:
    """Memory for the terms of a sum, (count, m, m), row by row of all of them."""
    rows = like.new_empty(m, count * m + _GAP)[:, : count * m]
    return rows.view(m, count, m).transpose(0, 1)


def _inverse_factors_(S: Tensor) -> list[Tensor]:
    """M with M^T M = S^(-1) for every S (K, m, m), in its lower half, and the flags of LAPACK.

    Read are the blocks of side ``_PANEL`` on the diagonal and all above them. For S = [A B; B^T C]
    with A = K K^T and X = K^(-1): D = (X B)^T, Y the factor of C - D D^T, M = [X 0; -Y D X Y]. The
    blocks of S take all of them, and sums leave out the blocks of zeros above X and Y.
    """
    m = S.shape[-1]
    if m <= _PANEL:
        L, info = torch.linalg.cholesky_ex(S)
        I = torch.eye(m, dtype=S.dtype, device=S.device).expand_as(L)
        S.copy_(torch.linalg.solve_triangular(L, I, upper=False, left=False))
        return [info]
    h = (m // 2 + _PANEL - 1) // _PANEL * _PANEL
    X, B, D, Y = S[:, :h, :h], S[:, :h, h:], S[:, h:, :h], S[:, h:, h:]
    infos = _inverse_factors_(X)
    side = max(1, h // 4 // _PANEL) * _PANEL
    rows, columns = _panels(m - h, side), _panels(h, side)
    for p, q in columns:
        torch.bmm(B[:, :q].mT, X[:, p:q, :q].mT, out=D[:, :, p:q])
    for p, q in rows:
        Y[:, p:q, p:].baddbmm_(D[:, p:q], D[:, p:].mT, alpha=-1)
    infos += _inverse_factors_(Y)
    for p, q in columns:
        torch.bmm(X[:, p:, p:q].mT, D[:, :, p:].mT, out=B[:, p:q])  # (D X)^T
    for p, q in rows:
        D[:, p:q].baddbmm_(Y[:, p:q, :q], B[:, :, :q].mT, beta=0, alpha=-1)
    B.zero_()
    return infos


def _panels(m: int, side: int) -> list[tuple[int, int]]:
    """First and last row, exclusive, of panels of so many rows."""
    return [(p, min(p + side, m)) for p in range(0, m, side)]
