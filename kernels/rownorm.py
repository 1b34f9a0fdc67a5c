"""Rows or columns at one length, on the back end that suits the tensor."""

from torch import Tensor

from .dispatch import pick


def row_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Every row of X divided by its norm; zero rows stay zero.

    Permuted rows give permuted results, bit for bit unless centred. Squares are summed in float32
    (float64 for float64): a row with entries above 1e19 becomes zero, and one of norm below 1e-19
    counts as zero beside eps.

    Args:
        X: (m, n) or (K, m, n), any strides and floating dtype; not changed.
        eps: What keeps small rows small, see mode.
        mode: How rows of norm s are divided: ``"inverse_eps"`` by s + eps; ``"inverse"`` or
            ``"unit"`` by max(s, eps); ``"relative"`` by s + 0.01 times the root mean square of all
            s of the matrix, without eps.
        centred: Whether the mean of the rows is taken off before and after.

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    U: Tensor = pick(X, "pass").row_norm(X, eps, mode, centred)
    return U


def column_norm(
    X: Tensor, eps: float = 1e-8, mode: str = "inverse_eps", centred: bool = False
) -> Tensor:
    """Every column of X divided by its norm: :func:`row_norm` of the turned matrix.

    Args:
        X: (m, n) or (K, m, n), any strides and floating dtype; not changed.
        eps: As for :func:`row_norm`.
        mode: As for :func:`row_norm`.
        centred: Whether the mean of the columns is taken off before and after.

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    U: Tensor = pick(X, "pass").column_norm(X, eps, mode, centred)
    return U
