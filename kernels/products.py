"""Products of stacks that give each matrix the bits it has alone.

On a CPU the matrix library rounds differently when a result does not start on 16 bytes, as most
matrices of a stack of odd ones do. Such stacks are multiplied one by one into buffers of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 400
"""Multiplications below which torch loops itself, in a fixed order."""
_LARGE = 2**16
"""Elements from which a matrix is never stacked on CPU, so that its alignment is its own."""


def _aligned(A: Tensor, B: Tensor) -> bool:
    """Whether every result of a stack rounds as it would alone."""
    m, inner, n = *A.shape[-2:], B.shape[-1]
    size = m * n
    if A.device.type != "cpu" or size >= _LARGE or size * inner < _TINY:
        return True
    # with a side of 1 it is ambiguous which operand is turned, and a batch may take another way
    return size * A.element_size() % 16 == 0 and min(m, inner, n) > 1


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B for every matrix of a stack; a stack has the bits of its matrices one by one.

    Args:
        A: (K, m, k), any strides.
        B: (K, k, n), any strides. The narrower of the two is widened.

    Returns:
        (K, m, n), a new tensor.
    """
    if A.dtype != B.dtype:
        dtype = torch.promote_types(A.dtype, B.dtype)
        A, B = A.to(dtype), B.to(dtype)
    if len(A) == 1 or _aligned(A, B):
        return A @ B
    return torch.cat([A[k : k + 1] @ B[k : k + 1] for k in range(len(A))])


def add_product_(W: Tensor, A: Tensor, B: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """W <- beta W + alpha A B for every matrix of a stack, in place.

    Without a temporary, except for small matrices of an odd number of elements.

    Args:
        W: (K, m, n), any strides.
        A: (K, m, k), of W's dtype.
        B: (K, k, n), of W's dtype.
        beta: Multiplies W.
        alpha: Multiplies the product.
    """
    if _aligned(A, B):
        W.baddbmm_(A, B, beta=beta, alpha=alpha)
    else:
        W.mul_(beta).add_(product(A, B), alpha=alpha)
