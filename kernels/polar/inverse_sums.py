"""I + sum_j a_j (S + c_j I)^(-1) on a CPU, by products for all but small blocks.

LAPACK takes the matrices of a stack one after the other, whatever threads there are, and needs ten
times as long for a matrix of side 64 as its multiplications would in a batched product. So only
blocks on the diagonal are factorized by LAPACK. With S + c I = L L^T every inverse is M^T M for
M = L^(-1), which is as accurate as a triangular solve: an elimination with inverses of whole blocks
was a hundred times less so at a condition number of 3e4. In a stack M is found row by row of
blocks. Rows of M and of the triangle L^T stand side by side in one matrix [M | L^T], so that one
product updates both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import Rational

_BLOCK = 16
"""Side of the blocks of small matrices in a stack: a multiple of cache lines, see ``batching``."""
_WIDE_BLOCK = 32
"""The same for matrices of side ``_WIDE_FROM``, where fewer and larger products are faster."""
_WIDE_FROM = 112
_PANEL = 64
"""Side of the blocks of one large matrix."""
_PANELS_FROM = 384
"""Side from which one matrix is faster in blocks than by LAPACK as a whole (512: 0.85)."""


def uses_blocks(S: Tensor) -> bool:
    """Whether S (m, m) or (K, m, m) is inverted here; it depends on device and shape alone.

    Args:
        S: A Gram matrix, or a stack of those.
    """
    return S.device.type == "cpu" and (S.ndim == 3 or S.shape[-1] >= _PANELS_FROM)


def sum_of_inverses(S: Tensor, step: Rational, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix k (I + sum_j a_j (S / norm + c_j I)^(-1)) with k = scale / sqrt(norm).

    Args:
        S: (m, m) or (K, m, m), positive semidefinite, all of it valid. It is overwritten.
        step: Its shifts c, weights a and scale.
        norm: (1, 1) or (K, 1, 1), at least the largest eigenvalue.

    Returns:
        A tensor of S's shape, and flags (...): every factorization worked, so S was finite.
    """
    if S.ndim == 3:
        return _sum_in_stack(S, step, norm)
    return _sum_in_panels(S.div_(norm), step, step.scale * norm.rsqrt())


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


def _sum_in_stack(S: Tensor, step: Rational, norm: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_of_inverses`` of a stack, all terms at once: one product of stacked factors."""
    K, m, _ = S.shape
    count = len(step.shifts)
    a, c = S.new_tensor([step.weights, step.shifts]).view(2, count, 1, 1)
    root = norm.sqrt()  # (K, 1, 1)
    # k a_j (S / norm + c_j)^(-1) is the inverse of u_j (S + norm c_j), u_j = 1 / (k a_j norm)
    u = (step.scale * root).unsqueeze(1) * a  # (K, count, 1, 1)
    B = S.unsqueeze(1) / u
    B.diagonal(dim1=-2, dim2=-1).add_((norm.unsqueeze(1) * c / u).squeeze(-1))
    M, worked = inverse_factors(B.view(K * count, m, m))
    M = M.view(K, count * m, m)
    T = torch.bmm(M.mT, M)
    T.diagonal(dim1=-2, dim2=-1).add_((step.scale / root).squeeze(-1))
    return T, worked.view(K, count).all(-1)


def _sum_in_panels(S: Tensor, step: Rational, k: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_of_inverses`` of one large matrix of norm one, in panels of rows; S is overwritten."""
    m, diagonal = len(S), S.diagonal()
    entries, T = diagonal.clone(), torch.zeros_like(S)
    M, infos = S, []
    for j, (shift, weight) in enumerate(zip(step.shifts, step.weights, strict=True)):
        torch.add(entries, shift, out=diagonal)
        if j == len(step.shifts) - 1:
            M = S
        else:
            M = S.clone() if M is S else M.copy_(S)
        infos += _inverse_factor_(M)
        for p in range(0, m, _PANEL):  # the lower half of M^T M, where M is triangular
            q = min(p + _PANEL, m)
            T[p:q, :q].addmm_(M[p:, p:q].mT, M[p:, :q], alpha=weight)
    for p in range(_PANEL, m, _PANEL):
        T[:p, p : p + _PANEL] = T[p : p + _PANEL, :p].mT
    T.diagonal().add_(1)
    return T.mul_(k), (torch.stack(infos) == 0).all()


def _inverse_factor_(S: Tensor) -> list[Tensor]:
    """M with M^T M = S^(-1) for one S (m, m), in its lower half, and the flags of LAPACK.

    Read are the blocks of side ``_PANEL`` on the diagonal and all above them. For S = [A B; B^T C]
    with A = K K^T and X = K^(-1): D = (X B)^T, Y the factor of C - D D^T, M = [X 0; -Y D X Y]. The
    blocks of S take all of them, and sums leave out the blocks of zeros above X and Y.
    """
    m = len(S)
    if m <= _PANEL:
        L, info = torch.linalg.cholesky_ex(S)
        S.zero_().diagonal().fill_(1)
        torch.linalg.solve_triangular(L, S, upper=False, left=False, out=S)
        return [info]
    h = (m // 2 + _PANEL - 1) // _PANEL * _PANEL
    X, B, D, Y = S[:h, :h], S[:h, h:], S[h:, :h], S[h:, h:]
    infos = _inverse_factor_(X)
    side = h // 2 if h % (2 * _PANEL) == 0 else _PANEL
    rows, columns = _panels(m - h, side), _panels(h, side)
    for p, q in columns:
        torch.mm(B[:q].mT, X[p:q, :q].mT, out=D[:, p:q])
    for p, q in rows:
        Y[p:q, p:].addmm_(D[p:q], D[p:].mT, alpha=-1)
    infos += _inverse_factor_(Y)
    for p, q in columns:
        torch.mm(X[p:, p:q].mT, D[:, p:].mT, out=B[p:q])  # (D X)^T
    for p, q in rows:
        D[p:q].addmm_(Y[p:q, :q], B[:, :q].mT, beta=0, alpha=-1)
    B.zero_()
    return infos


def _panels(m: int, side: int) -> list[tuple[int, int]]:
    """First and last row, exclusive, of panels of so many rows."""
    return [(p, min(p + side, m)) for p in range(0, m, side)]
