"""Adam inside a subspace and out of it in one kernel: N = adam(R) never leaves the chip.

W <- keep W + alpha (P N [+ free * sign(X - P R)]). A program owns some columns: it moves their
moments, then goes down the rows of W. Where that does not pay, ``adam`` and ``lift_`` do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import adam_lift as plain
from ..reference.rounding import Rounding
from ._launch import INTERPRETED, Case, config, guard, options, refuse_overlap, strides
from ._tables import Config
from ._write import Bits, drawn, is_plain, store_weight
from .adam import adam, adam_moved, bias, clocks, distance, spread
from .lift import case, controls, floors, lift_, products, residual, signs, three
from .project import RANK, multiprocessors, ranks

ON_CHIP = 128
"""Most coordinates, padded, whose Adam and lift are one kernel; above they are two.

Half as many where products are split in three (tf32x3), and half again with signs: more spill, or
leave so few columns to a program that P is read from L2 oftener than by the other two kernels.
"""
FULL = 0.8
"""Least share of the device that column tiles keep busy, over all their waves."""


@triton.jit
def adam_lift_kernel(
    W, P, R, M, V, clock, X, floor, control, m, n, r, w_k, w_m, w_n, p_k, p_m, p_r,
    r_k, r_r, r_n, m_k, m_r, m_n, v_k, v_r, v_n, t_k, t_r, t_n, x_k, x_m, x_n, f_k, c_k, c_c,
    keys, keys_k, h_0, h_k, h_m, h_n, keep, alpha, free, beta1, rest1, beta2, rest2, one, two, eps,
    CLOCK: tl.constexpr, SIGN: tl.constexpr, FLOOR: tl.constexpr, CONTROL: tl.constexpr,
    PRECISION: tl.constexpr, RESIDUAL: tl.constexpr, ROUNDING: tl.constexpr,
    RB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All of W in BN columns, with R and N of these on chip; grid (column tiles, matrices)."""
    k = tl.program_id(1).to(tl.int64)
    cols = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    inner = tl.arange(0, RB).to(tl.int64)
    down = inner[:, None]
    inside = (down < r) & (cols < n)
    width = n
    if CONTROL:
        control += k * c_k
        width = tl.where(tl.load(control) != 0.0, n, 0)  # else nothing is written
        keep = tl.load(control + c_c)
        alpha = tl.load(control + 2 * c_c)
    written = cols < width
    stored = (down < r) & written
    R += k * r_k + down * r_r + cols * r_n
    x = tl.load(R, mask=inside, other=0.0).to(tl.float32)
    M += k * m_k + down * m_r + cols * m_n
    V += k * v_k + down * v_r + cols * v_n
    a = tl.load(M, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(V, mask=inside, other=0.0).to(tl.float32)
    if CLOCK:
        t = tl.load(clock + k * t_k + down * t_r + cols * t_n, mask=inside, other=1)
        one, two = distance(t.to(tl.float32) * one), tl.sqrt_rn(distance(t.to(tl.float32) * two))
    a, b, d = adam_moved(x, a, b, beta1, rest1, beta2, rest2, one, two, eps)
    d = tl.where(inside, d, 0.0)  # without eps it is 0 / 0 mask
    tl.store(M, a.to(M.dtype.element_ty), mask=stored)
    tl.store(V, b.to(V.dtype.element_ty), mask=stored)
    least = 0.0
    if FLOOR:
        least = tl.load(floor + k * f_k).to(tl.float32)
    step = tl.full((), BM, tl.int64)
    rows = tl.arange(0, BM).to(tl.int64)[:, None]
    p = P + k * p_k + rows * p_m + inner[None, :] * p_r
    w = W + k * w_k + rows * w_m + cols * w_n
    for start in range(0, m, BM):
        left = tl.arange(0, BM)[:, None] < m - start
        # asked for before the product, so that they come while it runs
        old = tl.load(w, mask=left & written, other=0.0).to(tl.float32)
        if SIGN:
            g = X + k * x_k + (rows + start) * x_m + cols * x_n
            g = tl.load(g, mask=left & written, other=0.0).to(tl.float32)
        y = tl.load(p, mask=left & (inner[None, :] < r), other=0.0).to(tl.float32)
        acc = tl.dot(y, d, input_precision=PRECISION)
        if SIGN:
            acc += free * signs(g - tl.dot(y, x, input_precision=RESIDUAL), least)
        new, at = keep * old + alpha * acc, rows + start
        store_weight(
            w, new, left & written, keys, keys_k, h_0, h_k, h_m, h_n, k, at, cols, ROUNDING
        )
        p += step * p_m
        w += step * w_m


@torch.library.custom_op("stiefel::adam_lift_", mutates_args=("W", "M", "V"))
def _adam_lift_op(
    W: Tensor, P: Tensor, R: Tensor, M: Tensor, V: Tensor, t: float, clock: Tensor | None,
    keep: float, alpha: float, beta1: float, beta2: float, eps: float, X: Tensor | None,
    free: float, floor: Tensor | None, control: Tensor | None, keys: Tensor | None,
    positions: Sequence[int],
) -> None:  # fmt: skip
    if W.numel() == 0:
        return
    refuse_overlap(W, P, R, *(() if X is None else (X,)))
    (K, m, n), r = W.shape, M.shape[-2]
    if not on_chip(W, P, r, X is not None):
        finite = None if control is None else control[:, 0]
        clocked = t if clock is None else clock
        N = adam(R, M, V, clocked, beta1=beta1, beta2=beta2, eps=eps, finite=finite)
        beside = None if X is None else R
        lift_(
            W, P, N, keep, alpha, X=X, R=beside, free=free, floor=floor, control=control,
            rounding=Bits(keys, positions).rounding,
        )  # fmt: skip
        return
    chosen = _tiles(W, X is not None)
    random, way = Bits(keys, positions).launched((K, m, n))
    with guard(W):
        adam_lift_kernel[(triton.cdiv(n, chosen.tile_sizes["BN"]), K)](
            W, P, R, M, V, clock, X, floor, control, m, n, r, *strides(W), *strides(P),
            *strides(R), *strides(M), *strides(V), *spread(clock, M), *three(X), floors(floor),
            *controls(control), *random, keep, alpha, free,
            *bias(t, clock is not None, beta1, beta2), eps, CLOCK=clock is not None,
            SIGN=X is not None, FLOOR=floor is not None, CONTROL=control is not None,
            PRECISION=products(W, P), RESIDUAL=residual(), ROUNDING=way, RB=ranks(r),
            **options(chosen),
        )  # fmt: skip


def _tiles(W: Tensor, sign: bool) -> Config:
    """Of the kernel that keeps N on chip."""
    return config("adam_lift_sign" if sign else "adam_lift", W, *W.shape[1:])


def on_chip(W: Tensor, P: Tensor, r: int, sign: bool) -> bool:
    """Whether one kernel does Adam and the lift: N fits, and its column tiles fill the device.

    It depends on one matrix only, so that a stack has the bits of its matrices.
    """
    if ranks(r, 2 * RANK) * (1 + sign) * (1 + (products(W, P) == "tf32x3")) > ON_CHIP:
        return False
    tiles = triton.cdiv(W.shape[-1], _tiles(W, sign).tile_sizes["BN"])
    at_once = multiprocessors(W.device.index or 0)  # a tile takes all of one
    return INTERPRETED or tiles >= FULL * at_once * triton.cdiv(tiles, at_once)


def adam_lift_(
    W: Tensor, P: Tensor, R: Tensor, M: Tensor, V: Tensor, t: float | Tensor, keep: float,
    alpha: float, *, beta1: float, beta2: float, eps: float, X: Tensor | None = None,
    free: float = 0.0, floor: Tensor | None = None, control: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.adam_lift_`."""
    if is_plain(rounding):
        plain.adam_lift_(
            W, P, R, M, V, t, keep, alpha, beta1=beta1, beta2=beta2, eps=eps, X=X, free=free,
            floor=floor, control=control, rounding=rounding,
        )  # fmt: skip
        return
    K, m, n = W.shape
    X, (number, clock) = None if free == 0.0 else X, clocks(t)
    _adam_lift_op(
        W, P, R, M, V, number, clock, keep, alpha, beta1, beta2, eps, X, free, floor, control,
        *drawn(rounding, W.dtype, (K, m, n)),
    )  # fmt: skip


def _case(name: str, W: str, RB: int, sign: bool = False, **constants: Any) -> Case:
    beside = ("P", "R", "M", "V", *(("X", "floor", "control") if sign else ()))
    switches = {"SIGN": sign, "FLOOR": sign, "CONTROL": sign, "RB": RB, **constants}
    table, pointers = "adam_lift_sign" if sign else "adam_lift", dict.fromkeys(beside, "fp32")
    return case(name, table, adam_lift_kernel, {"W": W, **pointers}, **switches)


CASES = [
    _case("adam_lift bf16", "bf16", 128),
    _case("adam_lift bf16 column-major", "bf16", 128),
    _case("adam_lift tf32x3", "fp32", 64, PRECISION="tf32x3"),
    _case("adam_lift bf16 with signs", "bf16", 64, True),
    _case("adam_lift tf32x3 with signs column-major", "fp32", 32, True, PRECISION="tf32x3"),
    _case("adam_lift bf16 stochastic", "bf16", 128),
    _case("adam_lift fp16 stochastic", "fp16", 128),
    _case("adam_lift bf16 stochastic column-major", "bf16", 128),
    _case("adam_lift bf16 with signs stochastic", "bf16", 64, True),
]
