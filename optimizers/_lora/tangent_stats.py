"""Row and column sums of squares of the full gradient, as far as a LoRA pair's gradients show it.

With a = A^T (n x r), b = B (m x r) and P orthogonal projectors on what their columns span, the
gradients Ga = s G^T b and Gb = s G a show the projection of G on the moves that the pair can make,

    G_T = P_b G + G P_a - P_b G P_a.

G_T is never formed: each sum is a quadratic form of a row of the gradient and of the factor. A
gradient that is missing, or belongs to a zero factor, shows nothing; the others' share stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import add_product_, product
from .pair_algebra import cross_gram, damped_inverse, gram, is_nonzero, right_matmul

__all__ = ["tangent_cores", "tangent_grams", "tangent_squares"]


def tangent_grams(X: Sequence[Tensor], G: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The r x r matrices that all sums over whole factors need.

    Args:
        X: a (K, n, r) and b (K, m, r).
        G: Their gradients, of which one may be None.

    Returns:
        Gram matrices (K, r, r) of a and b; of Ga and Gb; and of a with Ga, b with Gb. Zero for
        what is missing, and for a factor whose other one has no gradient.
    """
    K, _, r = X[0].shape
    zeros = X[0].new_zeros(K, r, r) if any(g is None for g in G) else X[0]
    factor_grams = [zeros if h is None else gram(x) for x, h in zip(X, G[::-1], strict=True)]
    grad_grams = [zeros if g is None else gram(g) for g in G]
    cross = [zeros if g is None else cross_gram(x, g) for x, g in zip(X, G, strict=True)]
    return *factor_grams, *grad_grams, *cross


def tangent_cores(
    Sa: Tensor, Sb: Tensor, Na: Tensor, Nb: Tensor, Ca: Tensor, Cb: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The r x r cores of the quadratic forms, for many pairs.

    Args:
        Sa: Gram matrix of a, (K, r, r), as :func:`tangent_grams` returns it.
        Sb: Gram matrix of b.
        Na: Gram matrix of Ga.
        Nb: Gram matrix of Gb.
        Ca: Cross Gram matrix a^T Ga.
        Cb: Cross Gram matrix b^T Gb.
        n: Rows of a, (K, 1, 1).
        m: Rows of b, (K, 1, 1).

    Returns:
        For squares of columns the cores of Ga and of a, for those of rows the cores of Gb and b;
        and the share of ||G||^2 that is visible where G has no direction, (K, 1, 1), or 1 for 0.
    """
    S, r = torch.cat([Sa, Sb]), Sa.shape[-1]
    Ja, Jb = damped_inverse(S, 0.0).chunk(2)
    visible = is_nonzero(S).to(S.dtype) * (r / torch.cat([n, m])).clamp_(max=1.0)
    fa, fb = visible.chunk(2)
    share = fa + fb - fa * fb
    Na = Na - product(Ca.mT, product(Ja, Ca))
    Nb = Nb - product(Cb.mT, product(Jb, Cb))
    Ka, Kb = product(product(Ja, Nb), Ja), product(product(Jb, Na), Jb)
    return Jb, Ka, Ja, Kb, torch.where(share > 0, share, 1.0)


def tangent_squares(g: Tensor | None, J: Tensor, x: Tensor, N: Tensor) -> Tensor:
    """Rows of g (K, m, r) in the form J plus those of x in the form N: (K, m, 1), at least 0."""
    if g is None:
        return right_matmul(x, N).mul_(x).sum(-1, keepdim=True).clamp_(min=0.0)
    work = right_matmul(g, J)
    row_sums = work.mul_(g).sum(-1, keepdim=True)
    if work.stride(-1) == 1:  # x N in the same memory
        add_product_(work, x, N, beta=0.0)
    else:
        add_product_(work.mT, N.mT, x.mT, beta=0.0)
    return row_sums.add_(work.mul_(x).sum(-1, keepdim=True)).clamp_(min=0.0)
