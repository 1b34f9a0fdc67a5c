"""Rows and columns of every matrix of a stack at equal norms, on the back end that suits it."""

from torch import Tensor

from .dispatch import pick


def sinkhorn(X: Tensor, iterations: int = 5) -> Tensor:
    """Alternately scales each row to norm sqrt(n) and each column to norm sqrt(m).

    Columns come last, so they are exact and the root mean square of the result is 1. A row or
    column below 1e-8 of the root mean square is not scaled up to full length. Scaling by both norms
    of the same X at once does not converge: it swaps diag(4, 1, 1/4) with its inverse for ever.
    Source: Gradient Multi-Normalization, arXiv 2502.06742.

    Args:
        X: (K, m, n), any strides and floating dtype; not changed.
        iterations: how many times, at least 1.

    Returns:
        (K, m, n), a new tensor of X's dtype; zero where X is.
    """
    U: Tensor = pick(X, "pass").sinkhorn(X, iterations)
    return U


def equal_rows(X: Tensor) -> Tensor:
    """Scales each row of every matrix to norm sqrt(n); see :func:`sinkhorn`.

    Args:
        X: (K, m, n), any strides and floating dtype; not changed.

    Returns:
        (K, m, n), a new tensor of X's dtype; zero where X is.
    """
    U: Tensor = pick(X, "pass").equal_rows(X)
    return U
