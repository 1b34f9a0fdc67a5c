"""Copies of a stack in the dtype and layout of an iteration, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._stacks import Stack, stacked


def normalized(
    X: Stack, dtype: torch.dtype, margin: float = 1.0, eps: float = 1e-7, pad: int = 16
) -> Tensor:
    """X / max(margin ||X||_F, eps) of each matrix, padded with zeros below and to the right.

    The norm is that of the entries as they are given, also where their squares overflow, and the
    cast comes last.

    Args:
        X: (K, m, n), any strides, or a list of K matrices (m, n).
        dtype: of the result.
        margin: multiplies the norm.
        eps: least value to divide by.
        pad: what the sides of the result are multiples of.

    Returns:
        A new contiguous stack.
    """
    Y = stacked(X)
    norm = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    Y = Y.double() / (margin * norm).clamp(min=eps)
    return padded(Y, dtype, pad)


def padded(X: Stack, dtype: torch.dtype, pad: int = 16) -> Tensor:
    """A copy in another dtype, padded with zeros below and to the right.

    Args:
        X: (K, m, n), any strides, or a list of K matrices (m, n).
        dtype: of the result.
        pad: what the sides of the result are multiples of.

    Returns:
        A new contiguous stack.
    """
    Y = stacked(X)
    m, n = Y.shape[-2:]
    out = Y.new_zeros(len(Y), -(-m // pad) * pad, -(-n // pad) * pad, dtype=dtype)
    out[:, :m, :n] = Y
    return out
