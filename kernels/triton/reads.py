"""Passes that read a matrix once: sums of squares and of powers, and the cast into a stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import passes as plain
from ..passes import Stack, side_of
from .launch import Case, guard, options, strides
from .lists import Operand, as_list, is_wide, lies_turned, matrix, new, operand_case, tiles
from .sums import Sums, empty_sums, flipped, none_of, put_sums, shaped


@triton.jit
def read_kernel(
    X, out, parts, m, n, x_k, x_m, x_n, o_k, o_m, o_n, across, count,
    X_TYPE: tl.constexpr, X_ALIGNED: tl.constexpr, WRITE: tl.constexpr, WANTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile: what is wanted of it, and a copy in another precision; grid (tiles, matrices)."""
    tile, k = tl.program_id(0), tl.program_id(1)
    i, j = tile // across, tile % across
    rows = (i * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (j * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    there = (rows < m) & (cols < n)
    x = matrix(X, k, x_k, X_TYPE, X_ALIGNED) + rows * x_m + cols * x_n
    u = tl.load(x, mask=there, other=0.0).to(tl.float32)
    if WRITE:
        o = out + k.to(tl.int64) * o_k + rows * o_m + cols * o_n
        tl.store(o, u.to(out.dtype.element_ty), mask=there)
    put_sums(u, parts, k, i, j, tl.num_programs(0) // across, across, m, n, count, WANTED, BM, BN)


@torch.library.custom_op("stiefel::read", mutates_args=())
def _read(
    Xs: Sequence[Tensor], write: torch.dtype | None, wanted: str, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    turned = lies_turned(Xs)
    X = Operand(Xs, "X", turned)
    K, m, n = X.shape
    out = X.first.new_empty(0) if write is None else new(Xs, write)
    if K * m * n == 0:
        return out, *empty_sums(X.first, K, wanted, count)
    o = out.mT if turned and write is not None else out
    with guard(X.first):
        chosen = tiles("pass", X.first, m, n)
        sums = Sums(X, flipped(wanted, turned), chosen.blocks, count)
        read_kernel[(sums.down * sums.across, K)](
            X.pointer, None if write is None else o, sums.parts, m, n, *X.strides,
            *((0, 0, 0) if write is None else strides(o)), sums.across, count,
            X_TYPE=X.type, X_ALIGNED=X.aligned, WRITE=write is not None, WANTED=sums.wanted,
            **options(chosen),
        )  # fmt: skip
        return out, *sums()


@_read.register_fake
def _(
    Xs: Sequence[Tensor], write: torch.dtype | None, wanted: str, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    K = len(Xs) if Xs[0].ndim == 2 else len(Xs[0])
    out = Xs[0].new_empty(0) if write is None else new(Xs, write)
    return out, *none_of(Xs[0], K, wanted, count)


def squares(X: Stack, dim: int | None) -> Tensor:
    """See :func:`stiefel.kernels.reference.squares`."""
    which = side_of(dim)
    if is_wide(X) or len(X) == 0:
        return plain.squares(X, dim)
    return shaped(_read(as_list(X), None, which, 0)[1], which)


def power_sums(X: Stack, count: int) -> tuple[Tensor, Tensor]:
    """See :func:`stiefel.kernels.reference.power_sums`."""
    if is_wide(X) or len(X) == 0:
        return plain.power_sums(X, count)
    _, sums, norm = _read(as_list(X), None, "powers", count)
    return norm, sums


def cast_stack(Xs: Stack, dtype: torch.dtype, finite: bool = False) -> tuple[Tensor, Tensor | None]:
    """See :func:`stiefel.kernels.reference.cast_stack`."""
    if is_wide(Xs) or len(Xs) == 0:
        return plain.cast_stack(Xs, dtype, finite)
    out, flags, _ = _read(as_list(Xs), dtype, "finite" if finite else "", 0)
    return out, flags.flatten() if finite else None


def _case(name: str, element: str, wanted: str, to: str = "", listed: bool = False) -> Case:
    types, constants = operand_case("X", element, listed)
    types |= dict.fromkeys(("m", "n", "o_k", "o_m", "across", "count"), "i32")
    types |= {"out": f"*{to}", "parts": "*fp32"}
    constants |= {"o_n": 1, "WRITE": bool(to), "WANTED": wanted}
    for absent in [x for x, there in (("out", to), ("parts", wanted)) if not there]:
        constants[absent] = types.pop(absent) and None
    return Case(name, "pass", read_kernel, types, constants, loose=("across", "count"), blocks=2)


CASES = [
    _case("squares rows", "bf16", "rows"),
    _case("squares cols", "fp32", "cols"),
    _case("squares all", "fp32", "all"),
    _case("power_sums", "fp32", "powers"),
    _case("cast_stack", "bf16", "finite", "fp32", listed=True),
]
