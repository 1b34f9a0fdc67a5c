"""Products of stacks that give each matrix the bits it has alone.

On a CPU the matrix library rounds differently when an operand or the result does not start on 16
bytes, as most matrices of a stack of odd ones do. Such stacks are multiplied one by one, from and
into buffers of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOOP_BELOW = 400
"""Multiplications below which torch loops itself, in a fixed order."""
_ALIGNED_FROM = 2**16
"""Elements from which a matrix is never stacked on CPU, so that its alignment is its own."""
_LINE_BYTES = 16
"""Bytes on which a matrix must start."""


def placed(X: Tensor) -> Tensor:
    """X itself, or a copy that starts on 16 bytes."""
    return X if X.data_ptr() % _LINE_BYTES == 0 else X.clone()


def _one_call_is_exact(A: Tensor, B: Tensor) -> bool:
    """Whether one batched call gives each matrix the bits of a call of its own.

    It does where the order of every sum is fixed wherever the matrices start in memory, and where
    all matrices of m x inner, inner x n and m x n start on a line. With a side of 1 it is ambiguous
    which operand is transposed, and a batch may take another path.
    """
    m, inner = A.shape[-2:]
    n = B.shape[-1]
    entries = m * n
    if entries >= _ALIGNED_FROM or entries * inner < _LOOP_BELOW or not A.is_cpu:
        return True
    size = A.element_size()
    if m * inner * size % _LINE_BYTES or inner * n * size % _LINE_BYTES:
        return False
    if entries * size % _LINE_BYTES or min(m, inner, n) == 1:
        return False
    return A.data_ptr() % _LINE_BYTES == 0 and B.data_ptr() % _LINE_BYTES == 0


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
    if _one_call_is_exact(A, B):
        # the same call, without the detours of one that takes any number of dimensions
        return torch.bmm(A, B) if A.shape[0] == B.shape[0] else A @ B
    parts = [placed(A[k : k + 1]) @ placed(B[k : k + 1]) for k in range(len(A))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_product_(W: Tensor, A: Tensor, B: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """W <- beta W + alpha A B for every matrix of a stack, in place.

    Without a temporary, except for small matrices whose elements do not fill lines.

    Args:
        W: (K, m, n), any strides.
        A: (K, m, k), of W's dtype.
        B: (K, k, n), of W's dtype.
        beta: Multiplies W.
        alpha: Multiplies the product.
    """
    if _one_call_is_exact(A, B):
        W.baddbmm_(A, B, beta=beta, alpha=alpha)
    else:
        W.mul_(beta).add_(product(A, B), alpha=alpha)
