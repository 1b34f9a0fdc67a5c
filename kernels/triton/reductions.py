"""Passes that read a matrix once: sums of squares and of powers.

``cast_stack`` runs the same kernel, which copies what it reads if it is asked to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import reductions as plain
from ..reference._stacks import Stack
from ..reference.reductions import side_of
from ._launch import Case, guard, options, strides
from ._partial_sums import (
    PartialSums,
    empty_results,
    put_sums,
    shaped,
    transposed_sums,
    zero_results,
)
from ._pointer_lists import (
    Operand,
    as_list,
    empty_stack_like,
    is_column_major,
    is_unsupported,
    matrix_pointer,
    operand_case,
    pass_tiles,
)


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
    mask = (rows < m) & (cols < n)
    x = matrix_pointer(X, k, x_k, X_TYPE, X_ALIGNED) + rows * x_m + cols * x_n
    u = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    if WRITE:
        o = out + k.to(tl.int64) * o_k + rows * o_m + cols * o_n
        tl.store(o, u.to(out.dtype.element_ty), mask=mask)
    put_sums(u, parts, k, i, j, tl.num_programs(0) // across, across, m, n, count, WANTED, BM, BN)


@torch.library.custom_op("stiefel::read", mutates_args=())
def read(
    Xs: Sequence[Tensor], write: torch.dtype | None, wanted: str, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A copy in the dtype ``write``, the wanted sums, and the norm; empty where not asked for."""
    transposed = is_column_major(Xs)
    X = Operand(Xs, "X", transposed)
    K, m, n = X.shape
    out = X.first.new_empty(0) if write is None else empty_stack_like(Xs, write)
    if K * m * n == 0:
        return out, *zero_results(X.first, K, wanted, count)
    o = out.mT if transposed and write is not None else out
    with guard(X.first):
        chosen = pass_tiles("pass", X.first, m, n)
        sums = PartialSums(X, transposed_sums(wanted, transposed), chosen.tile_sizes, count)
        read_kernel[(sums.down * sums.across, K)](
            X.pointer, None if write is None else o, sums.parts, m, n, *X.strides,
            *((0, 0, 0) if write is None else strides(o)), sums.across, count,
            X_TYPE=X.type, X_ALIGNED=X.aligned, WRITE=write is not None, WANTED=sums.wanted,
            **options(chosen),
        )  # fmt: skip
        return out, *sums()


@read.register_fake
def _(
    Xs: Sequence[Tensor], write: torch.dtype | None, wanted: str, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    K = len(Xs) if Xs[0].ndim == 2 else len(Xs[0])
    out = Xs[0].new_empty(0) if write is None else empty_stack_like(Xs, write)
    return out, *empty_results(Xs[0], K, wanted, count)


def squares(X: Stack, dim: int | None) -> Tensor:
    """Kernel of :func:`stiefel.kernels.reference.squares`."""
    which = side_of(dim)
    if is_unsupported(X) or len(X) == 0:
        return plain.squares(X, dim)
    return shaped(read(as_list(X), None, which, 0)[1], which)


def power_sums(X: Stack, count: int) -> tuple[Tensor, Tensor]:
    """Kernel of :func:`stiefel.kernels.reference.power_sums`."""
    if is_unsupported(X) or len(X) == 0:
        return plain.power_sums(X, count)
    _, sums, norm = read(as_list(X), None, "powers", count)
    return norm, sums


def read_case(name: str, element: str, wanted: str, to: str = "", listed: bool = False) -> Case:
    """A static case of ``read_kernel``."""
    types, constants = operand_case("X", element, listed)
    types |= dict.fromkeys(("m", "n", "o_k", "o_m", "across", "count"), "i32")
    types |= {"out": f"*{to}", "parts": "*fp32"}
    constants |= {"o_n": 1, "WRITE": bool(to), "WANTED": wanted}
    for absent in [x for x, present in (("out", to), ("parts", wanted)) if not present]:
        constants[absent] = types.pop(absent) and None
    return Case(name, "pass", read_kernel, types, constants, loose=("across", "count"), blocks=2)


CASES = [
    read_case("squares rows", "bf16", "rows"),
    read_case("squares cols", "fp32", "cols"),
    read_case("squares all", "fp32", "all"),
    read_case("power_sums", "fp32", "powers"),
]
