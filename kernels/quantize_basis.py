"""Bases in 8 bits: orthonormal vectors, with a scale for every 256 entries of one vector.

A basis P (m, r) is coded along its columns, however it lies in memory. An entry is
sign(q) (q / 127)^2 times the scale of its block, with q from -127 to 127, the nearest; then the
scales of a vector are multiplied by what keeps its norm. So P^T P differs from I off the diagonal
alone, where max |P^T P - I| measured, over ranks 4 to 256 and sides 64 to 4096:

| levels | random | sparse, spiked, of rank 1, cosines | flat but for one entry, at worst |
|---|---|---|---|
| those of ``quantize_blocks`` | 0.009 | 0.012 | 0.083 |
| the same, norms kept | 0.006 | 0.010 | 0.031 |
| 127 even ones, norms kept | 0.004 | 0.059 | 0.059 |
| squares, norms kept | 0.004 | 0.006 | 0.015 |

Even levels lose small entries beside a large one. Levels that are even within decades are 7 % apart
just above each tenth, where a vector of equal entries has all its errors alike. The steps between
squares grow with the root of the entry, so neither happens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .quantize import BLOCK, blockwise_scales

__all__ = ["basis_scales", "dequantize_basis", "quantize_basis"]

_LAST = 127
_PANEL = 2**17
"""Numbers that are worked on at once, if 256 rows are no more: bounds the temporaries."""


def basis_scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of bases (..., m, r): (..., ceil(m / 256), r).

    Args:
        shape: Shape of the bases.
    """
    *axes, m, r = shape
    return (*axes, blockwise_scales(m), r)


def quantize_basis(P: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Store bases in codes and scales, in place; the norms of their vectors stay.

    Args:
        P: (..., m, r) floats, whose columns are the vectors.
        codes: (..., m, r) int8, contiguous.
        scales: (..., ceil(m / 256), r) float32, contiguous.
    """
    for basis, q, tops in _matrices(P, codes, scales):
        norms = torch.zeros(2, basis.shape[-1], dtype=torch.float32, device=P.device)
        for i, j, rows in _panels(basis):
            X = rows.float().contiguous()  # sums must not depend on the layout
            top = X.abs().amax(-2)
            tops[j] = top
            # zeros stay zeros: a block without any other number has the scale 0 and no quotient
            ratio = X / top.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-2)
            # the middle of q^2 and (q + 1)^2 is (q + 1/2)^2 + 1/4
            root = ratio.abs().mul_(_LAST**2).sub_(0.25).clamp_(min=0.0).sqrt_()
            code = root.add_(0.5).floor_().copysign_(ratio)
            q[i] = code.flatten(0, 1).to(torch.int8)
            decoded = code.mul_(code.abs()).mul_((top / _LAST**2).unsqueeze(-2))
            norms += torch.stack([Y.square().sum((0, 1)) for Y in (X, decoded)])
        tops.mul_((norms[0] / norms[1]).sqrt_().where(norms[1] > 0, 1.0))


def dequantize_basis(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The bases that codes and scales stand for, a new contiguous tensor shaped like codes.

    Args:
        codes: Of :func:`quantize_basis`.
        scales: Of :func:`quantize_basis`.
        dtype: Of the result, float32 unless given.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for basis, q, tops in _matrices(out, codes, scales):
        for i, j, rows in _panels(basis):
            code = q[i].view(rows.shape).to(torch.float32)
            torch.mul(code.mul_(code.abs()), (tops[j] / _LAST**2).unsqueeze(-2), out=code)
            basis[i] = code.flatten(0, 1)
    return out


def _matrices(P: Tensor, codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each basis (m, r) with its codes and scales."""
    if P.numel():
        flat = [
            X.reshape(-1, *X.shape[-2:]) if X is P else X.view(-1, *X.shape[-2:])
            for X in (P, codes, scales)
        ]
        yield from zip(*flat, strict=True)


def _panels(P: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Panels of P (m, r): rows, blocks, and the entries (b, 256, r), at last (1, m mod 256, r)."""
    m, r = P.shape
    count = max(1, _PANEL // (BLOCK * r))
    whole = m // BLOCK
    for j in range(0, whole, count):
        stop = min(j + count, whole)
        i = slice(j * BLOCK, stop * BLOCK)
        yield i, slice(j, stop), P[i].view(stop - j, BLOCK, r)
    if m % BLOCK:
        yield slice(whole * BLOCK, m), slice(whole, whole + 1), P[whole * BLOCK :].unsqueeze(0)
