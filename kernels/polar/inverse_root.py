"""Polar factors through the inverse square root of a Gram matrix, by a coupled iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.matmul import product
from .coefficients import POLAR_EXPRESS_RAW

_SAFETY = 1.05
"""By how much (the input of) every quintic but the last of the list is shrunk."""
_RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-7}
"""Damping in units of the mean eigenvalue, where none is given."""


def inverse_root(S: Tensor, steps: int = 5, eps: float | Tensor | None = None) -> Tensor:
    """(S + eps I)^(-1/2) of symmetric positive semidefinite matrices, nearly.

    With B = S + eps I, Y = B / (1.02 ||B||_F + eps) and Z = I, each step (a, b, c) takes
    R = I - Z Y and T = (a + b + c) I - (b + 2 c) R + c R^2, then Y <- Y T and Z <- T Z: the
    quintic of Polar Express on the spectrum of the first Y, whose inverse root Z tends to. Five
    steps leave errors of some percent where S is ill-conditioned, eight hardly any.
    Source: Polar Express, arXiv 2505.16932; the coupling as in ``timlautk/equivariant_optimizers``.

    Args:
        S: (K, m, m), fp32 or fp64.
        steps: of the iteration, at least 1; after eight the last quintic is repeated.
        eps: Added to the diagonal. None: 1e-8 (float32: 1e-7) of the mean eigenvalue, so that the
            result only scales when S does. An absolute one, for each matrix its own if (K, 1, 1),
            shrinks what is below its root.

    Returns:
        (K, m, m), a new tensor.
    """
    m = S.shape[-1]
    if eps is None:
        mean = S.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
        damping = (mean * _RELATIVE.get(S.dtype, 1e-7)).clamp(min=torch.finfo(S.dtype).tiny)
    else:
        damping = torch.ones_like(S[:, :1, :1]) * eps
    eye = torch.eye(m, dtype=S.dtype, device=S.device)
    Y = S + damping * eye
    size = product(Y.flatten(1).unsqueeze(1), Y.flatten(1).unsqueeze(2)).sqrt_()  # ||Y||_F
    size = size.mul_(1.02).add_(damping)
    Y = Y / size
    Z = eye.expand_as(S)
    last = len(POLAR_EXPRESS_RAW) - 1
    for k in range(steps):
        a, b, c = POLAR_EXPRESS_RAW[min(k, last)]
        if k < last:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        R = eye - product(Z, Y)
        T = product(R, R).mul_(c).sub_(R, alpha=b + 2 * c)
        T.diagonal(dim1=-2, dim2=-1).add_(a + b + c)
        Y, Z = product(Y, T), product(T, Z)
    return Z / size.sqrt()


def gram_polar(X: Tensor, left: bool, steps: int = 5, eps: float | None = None) -> Tensor:
    """(X X^T + eps I)^(-1/2) X if `left`, else X (X^T X + eps I)^(-1/2): nearly the polar factor.

    Args:
        X: (K, m, n), fp32 or fp64; not changed.
        left: On which side the Gram matrix is taken. Without damping both give the same.
        steps: See :func:`inverse_root`.
        eps: See :func:`inverse_root`.

    Returns:
        (K, m, n), a new tensor.
    """
    damping: float | Tensor | None = eps
    if eps is not None:
        # squares of squares are formed of the entries, so that they must not be large
        largest = torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))
        exponent = torch.frexp(largest).exponent.clamp(0, 126).to(X.dtype)
        c = torch.full_like(largest, 0.5) ** exponent  # a power of two leaves all digits
        X, damping = X * c, c * c * eps
    if left:
        return product(inverse_root(product(X, X.mT), steps, damping), X)
    return product(X, inverse_root(product(X.mT, X), steps, damping))
