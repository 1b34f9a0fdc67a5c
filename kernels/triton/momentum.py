"""Momentum, and the sums of the step that is made of it, in one pass.

Every entry of buffer and gradient is read once; sums are taken while the step is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import momentum as plain
from ..reference._stacks import Stack
from ..reference.momentum import check_momentum_names
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
    ELEMENTS,
    Operand,
    as_list,
    empty_stack_like,
    is_column_major,
    is_unsupported,
    matrix_pointer,
    operand_case,
    pass_tiles,
)
from .adam import flag_stride


@triton.jit
def lerped(start, end, weight):
    """As torch does: start where the weight is 0, end where it is 1, bit for bit."""
    change = end - start
    low = weight < 0.5
    return tl.where(low, start, end) + tl.where(low, weight, weight - 1.0) * change


@triton.jit
def momentum_kernel(
    M, G, U, parts, finite, m, n, m_k, m_m, m_n, g_k, g_m, g_n, u_k, u_m, u_n, finite_k, across,
    count, momentum, rest,
    M_TYPE: tl.constexpr, M_ALIGNED: tl.constexpr, G_TYPE: tl.constexpr, G_ALIGNED: tl.constexpr,
    WORK: tl.constexpr, SUM: tl.constexpr, NESTEROV: tl.constexpr, WRITE: tl.constexpr,
    FINITE: tl.constexpr, WANTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of M, of U if that is kept, and partial sums of U; grid (tiles, matrices)."""
    tile, k = tl.program_id(0), tl.program_id(1)
    i, j = tile // across, tile % across
    rows = (i * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (j * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    mask = (rows < m) & (cols < n)
    place = matrix_pointer(M, k, m_k, M_TYPE, M_ALIGNED) + rows * m_m + cols * m_n
    g = matrix_pointer(G, k, g_k, G_TYPE, G_ALIGNED) + rows * g_m + cols * g_n
    stored = tl.load(place, mask=mask, other=0.0)
    g = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    x = stored.to(tl.float32)
    x = momentum * x + g if SUM else lerped(x, g, rest)
    x = x.to(WORK).to(tl.float32)  # a step that is narrow is made of what is stored
    flag = tl.load(finite + k.to(tl.int64) * finite_k) if FINITE else 1.0
    if flag != 0.0:  # selected, not multiplied: 0 times NaN is NaN
        tl.store(place, x.to(stored.dtype), mask=mask)
    u = x
    if NESTEROV:
        u = g + momentum * x if SUM else lerped(g, x, momentum)
        u = u.to(WORK).to(tl.float32)
    if WRITE:
        o = U + k.to(tl.int64) * u_k + rows * u_m + cols * u_n
        tl.store(o, u.to(WORK), mask=mask)
    put_sums(u, parts, k, i, j, tl.num_programs(0) // across, across, m, n, count, WANTED, BM, BN)


@torch.library.custom_op("stiefel::momentum_step", mutates_args=("Ms",))
def _momentum_step(
    Ms: Sequence[Tensor], Gs: Sequence[Tensor], momentum: float, nesterov: bool, total: bool,
    write: bool, wanted: str, count: int, finite: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    transposed = is_column_major(Ms)
    M, G = Operand(Ms, "M", transposed), Operand(Gs, "G", transposed)
    M.expect(G, "G")
    K, m, n = M.shape
    work = torch.promote_types(Ms[0].dtype, Gs[0].dtype)
    U = empty_stack_like(Ms, work) if write else M.first.new_empty(0, dtype=work)
    if K * m * n == 0:
        return U, *zero_results(M.first, K, wanted, count)
    u = U.mT if transposed and write else U
    with guard(M.first):
        chosen = pass_tiles("pass", M.first, m, n)
        sums = PartialSums(M, transposed_sums(wanted, transposed), chosen.tile_sizes, count)
        momentum_kernel[(sums.down * sums.across, K)](
            M.pointer, G.pointer, u if write else None, sums.parts, finite, m, n, *M.strides,
            *G.strides, *(strides(u) if write else (0, 0, 0)),
            flag_stride(finite), sums.across, count, momentum, 1 - momentum,
            M_TYPE=M.type, M_ALIGNED=M.aligned, G_TYPE=G.type, G_ALIGNED=G.aligned,
            WORK=ELEMENTS[work], SUM=total, NESTEROV=nesterov, WRITE=write,
            FINITE=finite is not None, WANTED=sums.wanted, **options(chosen),
        )  # fmt: skip
        return U, *sums()


@_momentum_step.register_fake
def _(
    Ms: Sequence[Tensor], Gs: Sequence[Tensor], momentum: float, nesterov: bool, total: bool,
    write: bool, wanted: str, count: int, finite: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    K = len(Ms) if Ms[0].ndim == 2 else len(Ms[0])
    work = torch.promote_types(Ms[0].dtype, Gs[0].dtype)
    U = empty_stack_like(Ms, work) if write else Ms[0].new_empty(0, dtype=work)
    return U, *empty_results(Ms[0], K, wanted, count)


def momentum_step_(
    M: Stack, G: Stack, momentum: float, *, nesterov: bool = False, kind: str = "ema",
    squares: str | None = None, finite: Tensor | None = None,
) -> tuple[Stack, Tensor | None]:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.momentum_step_`."""
    check_momentum_names(kind, squares)
    if is_unsupported(M, G) or len(M) == 0:
        return plain.momentum_step_(
            M, G, momentum, nesterov=nesterov, kind=kind, squares=squares, finite=finite
        )
    Ms, Gs = as_list(M), as_list(G)
    same = Ms[0].dtype == torch.promote_types(Ms[0].dtype, Gs[0].dtype)
    write = nesterov or not same
    U, sums, _ = _momentum_step(
        Ms, Gs, momentum, nesterov, kind == "sum", write, squares or "", 0, finite
    )
    return U if write else M, None if squares is None else shaped(sums, squares)


def momentum_power_sums_(
    M: Stack, G: Stack, momentum: float, count: int, *, nesterov: bool = False, kind: str = "ema",
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.momentum_power_sums_`."""
    check_momentum_names(kind, None)
    if is_unsupported(M, G) or len(M) == 0:
        return plain.momentum_power_sums_(
            M, G, momentum, count, nesterov=nesterov, kind=kind, finite=finite
        )
    Ms, Gs, total = as_list(M), as_list(G), kind == "sum"
    _, sums, norm = _momentum_step(
        Ms, Gs, momentum, nesterov, total, False, "powers", count, finite
    )
    return norm, sums


def _momentum_case(
    name: str, buffer: str, grad: str, wanted: str = "", write: bool = True, listed: bool = False
) -> Case:
    types = {
        **dict.fromkeys(("m", "n", "u_k", "u_m", "across", "count"), "i32"), "momentum": "fp32",
        "rest": "fp32", "U": "*fp32", "parts": "*fp32", "finite": "*fp32", "finite_k": "i32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "u_n": 1, "WORK": tl.float32, "SUM": False, "NESTEROV": True, "WRITE": write,
        "FINITE": True, "WANTED": wanted,
    }  # fmt: skip
    for operand, element in (("M", buffer), ("G", grad)):
        more, fixed = operand_case(operand, element, listed)
        types |= more
        constants |= fixed
    for absent in [x for x, present in (("U", write), ("parts", wanted)) if not present]:
        constants[absent] = types.pop(absent) and None
    loose = ("across", "count", "finite_k")
    return Case(name, "pass", momentum_kernel, types, constants, loose=loose, blocks=2)


CASES = [
    _momentum_case("momentum fp32", "fp32", "fp32"),
    _momentum_case("momentum bf16", "bf16", "bf16"),
    _momentum_case("momentum rows", "fp32", "bf16", "rows"),
    _momentum_case("momentum cols", "fp32", "bf16", "cols"),
    _momentum_case("momentum all", "fp32", "bf16", "all"),
    _momentum_case("momentum powers", "fp32", "bf16", "powers", write=False),
    _momentum_case("momentum of lists", "fp32", "bf16", "all", listed=True),
]
