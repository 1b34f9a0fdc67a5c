"""The norm of a matrix and the sum of sinh^2 over its entries, from a few sums of their powers.

AuON's step length needs these two numbers alone, so that its momentum is read once. Entries are
scaled before they are squared, so that no power overflows or vanishes; scales and results are
float64 where the device has it. A small matrix has the same bits in a stack and alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ...kernels import fuses_passes, momentum_power_sums_, power_sums
from .._core.rule import LOCAL_REDUCTIONS, Reductions
from .moments import column_squares, largest_entries, momentum_step, total

POWER_SUM_PANEL = 2**17
"""Entries above which a matrix on a CPU is read in panels of rows, which stay in the cache."""
VECTOR_ENTRIES = 64
"""Of this, the entries that an elementwise function takes at once on a CPU are a divisor."""
SERIES_TOLERANCE = 5e-8
"""Largest error of sqrt(1 + sum sinh^2 / (m n)) where a series stands for sinh^2."""
SINH_SQUARED_SERIES = tuple(2.0 ** (2 * j - 1) / math.factorial(2 * j) for j in range(1, 40))
"""sinh^2 x = sum of SINH_SQUARED_SERIES[j - 1] x^(2 j) = x^2 + x^4 / 3 + 2 x^6 / 45 + ..."""


def uses_panels(X: Tensor) -> bool:
    """Whether the matrices of X (K, m, n) are read in panels."""
    return X.device.type == "cpu" and X.shape[-2] * X.shape[-1] > POWER_SUM_PANEL


def row_panels(m: int, n: int) -> Iterable[slice]:
    """The panels of a matrix (m, n), as rows."""
    rows = max(1, POWER_SUM_PANEL // n)
    return (slice(i, i + rows) for i in range(0, m, rows))


def series_length(entries: int, bound: float, max_square_sum: float = 1.0) -> int:
    """Number of terms after which the series errs by less than SERIES_TOLERANCE.

    Args:
        entries: Number of entries m n.
        bound: Largest magnitude of an entry.
        max_square_sum: Largest sum of squares, in units of bound^2 (default: 1.0).
    """
    remainder = math.sinh(bound) ** 2
    for j, factor in enumerate(SINH_SQUARED_SERIES, 1):
        remainder -= factor * bound ** (2 * j)
        if remainder * max_square_sum <= 2 * SERIES_TOLERANCE * entries:
            return j
    return len(SINH_SQUARED_SERIES)


def norms_of(X: Tensor, terms: int) -> DenseNorms | SeriesNorms:
    """Sums over X (K, m, n).

    Args:
        X: The matrices, not changed.
        terms: Number of terms where a series stands for sinh^2.
    """
    if fuses_passes(X):
        return KernelNorms(*power_sums(X, terms))
    if not uses_panels(X):
        return DenseNorms(X)
    return SeriesNorms(([Y[i] for i in row_panels(*Y.shape)] for Y in along_memory(X)), terms)


def momentum_norms(
    M: Tensor, G: Tensor, momentum: float, nesterov: bool, terms: int, finite: Tensor | None = None
) -> DenseNorms | SeriesNorms:
    """Move the average M by G, M <- M + (1 - momentum) (G - M), and sum over the step.

    Kernels and panels do both in one pass, in which the step is never stored whole.

    Args:
        M: (K, m, n), changed in place.
        G: (K, m, n), the gradient.
        momentum: Decay of M.
        nesterov: Whether the step is G + momentum (M - G) instead of M.
        terms: Number of terms where a series stands for sinh^2.
        finite: None (default), or flags (K,) where kernels run: where one is 0, M stays.
    """
    if fuses_passes(G):
        return KernelNorms(
            *momentum_power_sums_(M, G, momentum, terms, nesterov=nesterov, finite=finite)
        )
    if not uses_panels(G):
        return DenseNorms(momentum_step(M, G, momentum, nesterov))
    pairs = zip(along_memory(M), G if along_memory(M) is M else G.mT, strict=True)
    return SeriesNorms((_momentum_panels(b, g, momentum, nesterov) for b, g in pairs), terms)


def _momentum_panels(M: Tensor, G: Tensor, momentum: float, nesterov: bool) -> Iterator[Tensor]:
    """The step of one matrix (m, n), a panel of rows at a time, all in the same buffer."""
    V = None
    for i in row_panels(*M.shape):
        m, g = M[i].lerp_(G[i], 1 - momentum), G[i]
        if nesterov:
            V = torch.empty_like(m) if V is None else V[: len(m)]
            yield torch.lerp(g, m, momentum, out=V)
        else:
            yield m


def along_memory(X: Tensor) -> Tensor:
    """X (K, m, n), or X^T where the rows of X^T are contiguous."""
    return X.mT if X.stride(-1) != 1 and X.stride(-2) == 1 else X


class DenseNorms:
    """Sums over matrices X (K, m, n) that are stored as one tensor; sinh is exact."""

    def __init__(self, X: Tensor) -> None:
        largest = largest_entries(X)
        self._largest = to_float64(largest)
        self._X = X / largest.clamp(min=torch.finfo(X.dtype).tiny)

    def norm(self, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        """||X||_F, (K, 1, 1)."""
        squares = to_float64(total(column_squares(self._X))) * self._largest.square()
        return reductions.both(squares).sqrt()

    def sinh_squares(self, c: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        """The sum of sinh^2(c x), (K, 1, 1); c (K, 1, 1)."""
        x = self._X * (c * self._largest).to(self._X.dtype)
        # what is left over at the end of a tensor on a CPU, and fills no vector, gets other bits:
        # then a matrix of a stack is a tensor of its own, as it is alone
        alone = x.device.type == "cpu" and x[0].numel() % VECTOR_ENTRIES
        for part in x if alone else (x,):
            part.sinh_()
        return reductions.both(to_float64(total(column_squares(x))))


class SeriesNorms:
    """Sums over matrices that come in panels; a series stands for sinh^2.

    Args:
        matrices: The panels of each matrix, tensors that are read once and may then be reused.
        terms: Number of terms of the series.
    """

    def __init__(self, matrices: Iterable[Iterable[Tensor]], terms: int) -> None:
        panel_sums = [
            list(zip(*(_panel_power_sums(X, terms) for X in panels), strict=True))
            for panels in matrices
        ]
        self._scale = torch.stack([torch.stack(scales) for scales, *_ in panel_sums])  # (K, panels)
        self._powers = [  # (K, panels) each: of x^4, x^6, ... by the panel's own scale
            torch.stack([torch.stack(row) for row in rows]).to(self._scale.dtype)
            for rows in zip(*(remainder for _, *remainder in panel_sums), strict=True)
        ]

    def norm(self, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        """||X||_F, (K, 1, 1)."""
        return reductions.both(self._scale.square().sum(-1).view(-1, 1, 1)).sqrt()

    def sinh_squares(self, c: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        """The sum of sinh^2(c x), (K, 1, 1), up to the error of the series; c (K, 1, 1)."""
        squares = (self._scale * c.view(-1, 1)).square()
        series, power = SINH_SQUARED_SERIES[0] * squares.sum(-1), squares
        for factor, sizes in zip(SINH_SQUARED_SERIES[1:], self._powers, strict=False):
            power = power * squares
            series = series + factor * (power * sizes).sum(-1)
        return reductions.both(series.view(-1, 1, 1))


class KernelNorms(SeriesNorms):
    """Sums over matrices from the norms and power sums that a kernel found.

    Args:
        norm: (K, 1, 1), ||X||_F.
        sums: (K, terms), sums of the even powers of the entries of X / norm.
    """

    def __init__(self, norm: Tensor, sums: Tensor) -> None:
        self._scale = norm.view(-1, 1)
        self._powers = [x.unsqueeze(-1) for x in sums.unbind(-1)[1:]]


def _panel_power_sums(X: Tensor, terms: int) -> list[Tensor]:
    """``terms`` numbers: the panel's norm in float64, and sums of (x / norm)^4, ^6 and so on."""
    norm: Tensor = torch.linalg.vector_norm(X, dtype=torch.float64)
    sums = [norm]
    if terms > 1:
        inverse_norm = norm.reciprocal()
        inverse_norm.clamp_(max=torch.finfo(X.dtype).max)  # a panel of zeros has finite products
        q = (X.reshape(-1) * inverse_norm.to(X.dtype)).square_()
        power = q.clone()
        for _ in range(terms - 1):
            sums.append(torch.dot(q, power))
            power.mul_(q)
    return sums


def to_float64(x: Tensor) -> Tensor:
    """Convert to float64 where the device has it."""
    return x if x.device.type == "mps" else x.double()
