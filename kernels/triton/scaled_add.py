"""The write of a term that exists already: one read of it, one read and write of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import scaled_add as plain
from ..reference._stacks import Stack
from ..reference.rounding import Rounding
from ._launch import Case, guard, options
from ._pointer_lists import (
    Operand,
    as_list,
    is_column_major,
    is_unsupported,
    matrix_pointer,
    operand_case,
    pass_tiles,
)
from ._write import (
    COLUMN_PAIRS,
    FAR,
    NEAREST,
    SINGLE,
    Bits,
    drawn,
    is_plain,
    store_weight,
    with_rounding,
)


@triton.jit
def times(x, by, k, rows, cols, m, n, b_k, b_m, b_n, FORM: tl.constexpr):
    """The tile x times its part of a factor; only what the factor has is read."""
    if FORM == "":
        return x
    else:
        by += k.to(tl.int64) * b_k
        if FORM == "one":
            return x * tl.load(by).to(tl.float32)
        elif FORM == "rows":
            return x * tl.load(by + rows * b_m, mask=rows < m, other=0.0).to(tl.float32)
        elif FORM == "cols":
            return x * tl.load(by + cols * b_n, mask=cols < n, other=0.0).to(tl.float32)
        else:
            mask = (rows < m) & (cols < n)
            return x * tl.load(by + rows * b_m + cols * b_n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scaled_add_kernel(
    W, X, Y, by, by_Y, control, m, n, w_k, w_m, w_n, x_k, x_m, x_n, y_k, y_m, y_n,
    b_k, b_m, b_n, c_k, c_m, c_n, control_k, control_n, keys, keys_k, h_0, h_k, h_m, h_n,
    across, keep, alpha,
    W_TYPE: tl.constexpr, W_ALIGNED: tl.constexpr, X_TYPE: tl.constexpr, X_ALIGNED: tl.constexpr,
    Y_TYPE: tl.constexpr, Y_ALIGNED: tl.constexpr, FORM: tl.constexpr, FORM_Y: tl.constexpr,
    TWO: tl.constexpr, CONTROL: tl.constexpr, ROUNDING: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One tile of keep W + alpha (by X + by_Y Y); grid (tiles, matrices)."""
    tile, k = tl.program_id(0), tl.program_id(1)
    rows = (tile // across * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (tile % across * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    mask = (rows < m) & (cols < n)
    place = matrix_pointer(W, k, w_k, W_TYPE, W_ALIGNED) + rows * w_m + cols * w_n
    x = matrix_pointer(X, k, x_k, X_TYPE, X_ALIGNED) + rows * x_m + cols * x_n
    w = tl.load(place, mask=mask, other=0.0)
    added = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    added = times(added, by, k, rows, cols, m, n, b_k, b_m, b_n, FORM)
    if TWO:
        y = matrix_pointer(Y, k, y_k, Y_TYPE, Y_ALIGNED) + rows * y_m + cols * y_n
        y = tl.load(y, mask=mask, other=0.0).to(tl.float32)
        added += times(y, by_Y, k, rows, cols, m, n, c_k, c_m, c_n, FORM_Y)
    finite = 1.0
    if CONTROL:
        control += k.to(tl.int64) * control_k
        finite = tl.load(control)
        keep = tl.load(control + control_n)
        alpha = tl.load(control + 2 * control_n)
    if finite != 0.0:
        new = keep * w.to(tl.float32) + alpha * added
        store_weight(place, new, mask, keys, keys_k, h_0, h_k, h_m, h_n, k, rows, cols, ROUNDING)


def _factor(by: Tensor | None, transposed: bool, w: Operand) -> tuple[Tensor | None, Any, str]:
    """A factor, its strides (0 along what it has not), and its form."""
    if by is None:
        return None, (0, 0, 0), ""
    by = by.reshape((1,) * (3 - by.ndim) + by.shape) if by.ndim < 3 else by
    by = by.mT if transposed else by
    shape = tuple(by.shape)
    if any(s not in (1, t) for s, t in zip(shape, w.shape, strict=True)):
        raise ValueError(f"by must broadcast against {w.shape}, got {shape}")
    steps = tuple(0 if s == 1 else d for s, d in zip(shape, by.stride(), strict=True))
    form = {(False, False): "one", (True, False): "rows", (False, True): "cols"}
    return by, steps, form.get((shape[1] > 1, shape[2] > 1), "full")


@torch.library.custom_op("stiefel::scaled_add", mutates_args=("Ws",))
def _scaled_add(
    Ws: Sequence[Tensor], Xs: Sequence[Tensor], by: Tensor | None, Ys: Sequence[Tensor],
    by_Y: Tensor | None, keep: float, alpha: float, control: Tensor | None, keys: Tensor | None,
    positions: Sequence[int],
) -> None:  # fmt: skip
    transposed, two = is_column_major(Ws), len(Ys) > 0
    W, X = Operand(Ws, "W", transposed), Operand(Xs, "X", transposed)
    Y = Operand(Ys, "Y", transposed) if two else X
    W.expect(X, "X")
    W.expect(Y, "Y")
    K, m, n = W.shape
    if K * m * n == 0:
        return
    b, b_steps, form = _factor(by, transposed, W)
    c, c_steps, form_y = _factor(by_Y if two else None, transposed, W)
    rows = (0, 0) if control is None else (control.stride(0), control.stride(1))
    bits = Bits(keys, positions)
    random, way = (bits.mT if transposed else bits).launched(W.shape)
    with guard(W.first):
        chosen = pass_tiles("pass", W.first, m, n)
        across = triton.cdiv(n, chosen.tile_sizes["BN"])
        scaled_add_kernel[(triton.cdiv(m, chosen.tile_sizes["BM"]) * across, K)](
            W.pointer, X.pointer, Y.pointer if two else None, b, c, control, m, n, *W.strides,
            *X.strides, *(Y.strides if two else (0, 0, 0)), *b_steps, *c_steps, *rows, *random,
            across, keep, alpha, W_TYPE=W.type, W_ALIGNED=W.aligned, X_TYPE=X.type,
            X_ALIGNED=X.aligned, Y_TYPE=Y.type if two else None, Y_ALIGNED=two and Y.aligned,
            FORM=form, FORM_Y=form_y, TWO=two, CONTROL=control is not None, ROUNDING=way,
            **options(chosen),
        )  # fmt: skip


def scaled_add_(
    W: Stack, X: Stack, by: Tensor | None, keep: float, alpha: float,
    control: Tensor | None = None, *, Y: Stack | None = None, by_Y: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.scaled_add_`."""
    if is_unsupported(W, X, Y) or len(W) == 0 or is_plain(rounding):
        plain.scaled_add_(W, X, by, keep, alpha, control, Y=Y, by_Y=by_Y, rounding=rounding)
        return
    Ys = [] if Y is None else as_list(Y)
    m, n = W[0].shape
    bits = drawn(rounding, W[0].dtype, (len(W), m, n))
    _scaled_add(as_list(W), as_list(X), by, Ys, by_Y, keep, alpha, control, *bits)


def _add_case(
    name: str, weight: str, term: str, form: str, two: bool = False, listed: bool = False,
    rounding: int = NEAREST,
) -> Case:  # fmt: skip
    types = {
        **dict.fromkeys(("m", "n", "across", "b_m", "c_m"), "i32"), "keep": "fp32",
        "alpha": "fp32", "by": "*fp32", "by_Y": "*fp32", "control": "*fp32", "control_k": "i32",
        **dict.fromkeys(("b_k", "c_k"), "i32"),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "control_n": 1, "b_n": 1, "c_n": 1, "FORM": form, "FORM_Y": form if two else "",
        "TWO": two, "CONTROL": True,
    }  # fmt: skip
    for operand, element in (("W", weight), ("X", term), ("Y", term)):
        more, fixed = operand_case(operand, element, listed)
        types |= more
        constants |= fixed
    gone = ([] if form else ["by"]) + ([] if two else ["Y", "by_Y"])
    for absent in gone:
        constants[absent] = types.pop(absent) and None
    loose = ("across", "control_k", "b_k", "c_k", "b_m", "c_m")
    case = Case(name, "pass", scaled_add_kernel, types, constants, loose=loose, blocks=2)
    return with_rounding(case, rounding)


CASES = [
    _add_case("scaled_add fp32", "fp32", "fp32", "one"),
    _add_case("scaled_add bf16", "bf16", "fp32", "rows"),
    _add_case("scaled_add cols", "bf16", "bf16", "cols"),
    _add_case("scaled_add whole", "fp32", "fp32", "full"),
    _add_case("scaled_add two", "fp32", "fp32", "one", two=True),
    _add_case("scaled_add of lists", "bf16", "fp32", "one", listed=True),
    _add_case("scaled_add bf16 stochastic", "bf16", "fp32", "rows", rounding=COLUMN_PAIRS),
    _add_case("scaled_add fp16 stochastic", "fp16", "fp32", "rows", rounding=COLUMN_PAIRS),
    _add_case("scaled_add bf16 stochastic one by one", "bf16", "fp32", "rows", rounding=SINGLE),
    _add_case("scaled_add bf16 stochastic above 2^32", "bf16", "fp32", "rows", rounding=FAR),
    _add_case(
        "scaled_add of lists stochastic", "bf16", "fp32", "one", listed=True, rounding=COLUMN_PAIRS
    ),
]
