"""Stacks (K, m, n) and lists of K matrices (m, n): what the references need to take both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Stack = Tensor | Sequence[Tensor]
"""(K, m, n), or a list of K matrices (m, n) of equal shape, strides and dtype."""


def stacked(X: Stack) -> Tensor:
    """(K, m, n) itself, or a new one of a list, laid out as its matrices are."""
    if isinstance(X, Tensor):
        return X
    if X and X[0].stride(-1) != 1 and X[0].stride(-2) == 1:
        return torch.stack([x.mT for x in X]).mT
    return torch.stack(list(X))


def per_matrix(numbers: Tensor, X: Tensor) -> Tensor:
    """One number for each matrix of X, so that it broadcasts against X."""
    return numbers.view(-1, 1, 1) if X.ndim == 3 else numbers.view(())
