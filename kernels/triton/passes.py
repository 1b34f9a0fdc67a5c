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

from .. import passes as plain
from ..passes import Stack, check_names
from .launch import Case, guard, options, strides
from .lists import (
    ELEMENTS,
    Operand,
    as_list,
    is_wide,
    lies_turned,
    matrix,
    new,
    operand_case,
    tiles,
)
from .sums import Sums, empty_sums, flipped, none_of, put_sums, shaped


@triton.jit
def lerped(start, end, weight):
    """As torch does: start where the weight is 0, end where it is 1, bit for bit."""
    change = end - start
    low = weight < 0.5
    return tl.where(low, start, end) + tl.where(low, weight, weight - 1.0) * change


@triton.jit
def blend_kernel(
    M, G, U, parts, ok, m, n, m_k, m_m, m_n, g_k, g_m, g_n, u_k, u_m, u_n, ok_k, across, count,
    momentum, rest,
    M_TYPE: tl.constexpr, M_ALIGNED: tl.constexpr, G_TYPE: tl.constexpr, G_ALIGNED: tl.constexpr,
    WORK: tl.constexpr, SUM: tl.constexpr, NESTEROV: tl.constexpr, WRITE: tl.constexpr,
    OK: tl.constexpr, WANTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of M, of U if that is kept, and partial sums of U; grid (tiles, matrices)."""
    tile, k = tl.program_id(0), tl.program_id(1)
    i, j = tile // across, tile % across
    rows = (i * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (j * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    there = (rows < m) & (cols < n)
    place = matrix(M, k, m_k, M_TYPE, M_ALIGNED) + rows * m_m + cols * m_n
    g = matrix(G, k, g_k, G_TYPE, G_ALIGNED) + rows * g_m + cols * g_n
    stored = tl.load(place, mask=there, other=0.0)
    g = tl.load(g, mask=there, other=0.0).to(tl.float32)
    x = stored.to(tl.float32)
    x = momentum * x + g if SUM else lerped(x, g, rest)
    x = x.to(WORK).to(tl.float32)  # a step that is narrow is made of what is stored
    good = tl.load(ok + k.to(tl.int64) * ok_k) if OK else 1.0
    if good != 0.0:  # chosen, not computed: 0 times NaN is NaN
        tl.store(place, x.to(stored.dtype), mask=there)
    u = x
    if NESTEROV:
        u = g + momentum * x if SUM else lerped(g, x, momentum)
        u = u.to(WORK).to(tl.float32)
    if WRITE:
        o = U + k.to(tl.int64) * u_k + rows * u_m + cols * u_n
        tl.store(o, u.to(WORK), mask=there)
    put_sums(u, parts, k, i, j, tl.num_programs(0) // across, across, m, n, count, WANTED, BM, BN)


@torch.library.custom_op("stiefel::blend", mutates_args=("Ms",))
def _blend(
    Ms: Sequence[Tensor], Gs: Sequence[Tensor], momentum: float, nesterov: bool, total: bool,
    write: bool, wanted: str, count: int, ok: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    turned = lies_turned(Ms)
    M, G = Operand(Ms, "M", turned), Operand(Gs, "G", turned)
    M.expect(G, "G")
    K, m, n = M.shape
    work = torch.promote_types(Ms[0].dtype, Gs[0].dtype)
    U = new(Ms, work) if write else M.first.new_empty(0, dtype=work)
    if K * m * n == 0:
        return U, *empty_sums(M.first, K, wanted, count)
    u = U.mT if turned and write else U
    with guard(M.first):
        chosen = tiles("pass", M.first, m, n)
        sums = Sums(M, flipped(wanted, turned), chosen.blocks, count)
        blend_kernel[(sums.down * sums.across, K)](
            M.pointer, G.pointer, u if write else None, sums.parts, ok, m, n, *M.strides,
            *G.strides, *(strides(u) if write else (0, 0, 0)),
            0 if ok is None or len(ok) == 1 else ok.stride(0), sums.across, count, momentum,
            1 - momentum, M_TYPE=M.type, M_ALIGNED=M.aligned, G_TYPE=G.type, G_ALIGNED=G.aligned,
            WORK=ELEMENTS[work], SUM=total, NESTEROV=nesterov, WRITE=write, OK=ok is not None,
            WANTED=sums.wanted, **options(chosen),
        )  # fmt: skip
        return U, *sums()


@_blend.register_fake
def _(
    Ms: Sequence[Tensor], Gs: Sequence[Tensor], momentum: float, nesterov: bool, total: bool,
    write: bool, wanted: str, count: int, ok: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    K = len(Ms) if Ms[0].ndim == 2 else len(Ms[0])
    work = torch.promote_types(Ms[0].dtype, Gs[0].dtype)
    U = new(Ms, work) if write else Ms[0].new_empty(0, dtype=work)
    return U, *none_of(Ms[0], K, wanted, count)


def blend_(
    M: Stack, G: Stack, momentum: float, *, nesterov: bool = False, kind: str = "ema",
    squares: str | None = None, ok: Tensor | None = None,
) -> tuple[Stack, Tensor | None]:  # fmt: skip
    """See :func:`stiefel.kernels.reference.blend_`."""
    check_names(kind, squares)
    if is_wide(M, G) or len(M) == 0:
        return plain.blend_(M, G, momentum, nesterov=nesterov, kind=kind, squares=squares, ok=ok)
    Ms, Gs = as_list(M), as_list(G)
    same = Ms[0].dtype == torch.promote_types(Ms[0].dtype, Gs[0].dtype)
    write = nesterov or not same
    U, sums, _ = _blend(Ms, Gs, momentum, nesterov, kind == "sum", write, squares or "", 0, ok)
    return U if write else M, None if squares is None else shaped(sums, squares)


def blend_power_sums_(
    M: Stack, G: Stack, momentum: float, count: int, *, nesterov: bool = False, kind: str = "ema",
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`stiefel.kernels.reference.blend_power_sums_`."""
    check_names(kind, None)
    if is_wide(M, G) or len(M) == 0:
        return plain.blend_power_sums_(M, G, momentum, count, nesterov=nesterov, kind=kind, ok=ok)
    Ms, Gs, total = as_list(M), as_list(G), kind == "sum"
    _, sums, norm = _blend(Ms, Gs, momentum, nesterov, total, False, "powers", count, ok)
    return norm, sums


def _blend_case(
    name: str, buffer: str, grad: str, wanted: str = "", write: bool = True, listed: bool = False
) -> Case:
    types = {
        **dict.fromkeys(("m", "n", "u_k", "u_m", "across", "count"), "i32"), "momentum": "fp32",
        "rest": "fp32", "U": "*fp32", "parts": "*fp32", "ok": "*fp32", "ok_k": "i32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "u_n": 1, "WORK": tl.float32, "SUM": False, "NESTEROV": True, "WRITE": write, "OK": True,
        "WANTED": wanted,
    }  # fmt: skip
    for operand, element in (("M", buffer), ("G", grad)):
        more, fixed = operand_case(operand, element, listed)
        types |= more
        constants |= fixed
    for absent in [x for x, there in (("U", write), ("parts", wanted)) if not there]:
        constants[absent] = types.pop(absent) and None
    loose = ("across", "count", "ok_k")
    return Case(name, "pass", blend_kernel, types, constants, loose=loose, blocks=2)


CASES = [
    _blend_case("blend fp32", "fp32", "fp32"),
    _blend_case("blend bf16", "bf16", "bf16"),
    _blend_case("blend rows", "fp32", "bf16", "rows"),
    _blend_case("blend cols", "fp32", "bf16", "cols"),
    _blend_case("blend all", "fp32", "bf16", "all"),
    _blend_case("blend powers", "fp32", "bf16", "powers", write=False),
    _blend_case("blend of lists", "fp32", "bf16", "all", listed=True),
]
