"""One pass over a weight of which some columns, rows or entries have moments and the others none.

W and G are walked in tiles. A map (int32, -1: not chosen) made from the numbers tells every column,
row or entry its slot. Chosen ones take Adam with the moments of that slot, the others the sign of
G, G itself or nothing. W is read and written once, G read once, M and V read and written once.

Neighbouring columns of a row are neighbours in M and V only where both are chosen (and the numbers
ascend), so moments are gathered, four bytes a lane. A share s of columns drawn at random touches
all sectors of 32 bytes of M and V exactly once, as all slots of a row are used and rows of one tile
are read by one block: the gather costs instructions, not traffic. For rows (dim -2) moments run
along the memory like W. Single entries have a map as large as W: 4 bytes an entry written and read,
and M, V in sectors that up to two tiles share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import split_step as plain
from ..reference.rounding import Rounding
from ._launch import Case, config, guard, options, strides
from ._write import COLUMN_PAIRS, NEAREST, Bits, drawn, is_plain, store_weight, with_rounding

COLUMNS, ROWS, ENTRIES = 0, 1, 2
FREE = {"no": 0, "sgd": 1, "sign_sgd": 2}


@triton.jit
def places_kernel(index, places, c, n, i_k, i_c, BLOCK: tl.constexpr):
    """Slot of every number in `index` (K, c), scattered into `places` (K, n)."""
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + batch * i_k + slot.to(tl.int64) * i_c, mask=slot < c, other=-1)
    tl.store(places + batch * n + at, slot, mask=(at >= 0) & (at < n))


@triton.jit
def stateless(g, least, scale, FREE: tl.constexpr):
    """The direction of entries without moments: nothing, G, or the sign of G."""
    if FREE == 2:  # a NaN has no sign, as in torch
        return tl.where(g > least, scale, tl.where(g < -least, -scale, 0.0))
    elif FREE == 1:
        return g * scale
    else:
        return tl.zeros(g.shape, tl.float32)


@triton.jit
def split_kernel(
    W, G, places, M, V, first, second, floor, control, m, n,
    w_k, w_m, w_n, g_k, g_m, g_n, p_k, p_m, p_n, m_k, m_s, m_o, v_k, v_s, v_o, f_k, c_k, c_x,
    keys, keys_k, h_0, h_k, h_m, h_n, keep, alpha, beta1, beta2, gain1, gain2, c1, c2, eps, scale,
    KIND: tl.constexpr, FREE: tl.constexpr, CLOCKS: tl.constexpr, FLOOR: tl.constexpr,
    CONTROL: tl.constexpr, ROUNDING: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of a tile one by one, so that all loads share one layout; grid (tiles, matrices)."""
    across = tl.cdiv(n, BN)
    batch = tl.program_id(1).to(tl.int64)
    start = (tl.program_id(0) // across) * BM
    stop = tl.minimum(start + BM, m)
    cols = ((tl.program_id(0) % across) * BN + tl.arange(0, BN)).to(tl.int64)
    mask = cols < n
    if CONTROL:
        control_row = control + batch * c_k
        keep, alpha = tl.load(control_row + c_x), tl.load(control_row + 2 * c_x)
        stop = tl.where(tl.load(control_row) != 0.0, stop, start)  # else no row is touched
    least = tl.load(floor + batch) if FLOOR else 0.0
    W += batch * w_k
    G += batch * g_k
    M += batch * m_k
    V += batch * v_k
    places += batch * p_k
    if CLOCKS:
        first += batch * f_k
        second += batch * f_k
    slot = tl.load(places + cols * p_n, mask=mask, other=-1)  # of columns: once for all rows
    for i in range(start, stop):
        row = batch * 0 + i  # int64, in the interpreter too
        g = tl.load(G + row * g_m + cols * g_n, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(W + row * w_m + cols * w_n, mask=mask, other=0.0).to(tl.float32)
        if KIND == 1:
            slot = tl.load(places + row * p_m) + tl.zeros((BN,), tl.int32)
        elif KIND == 2:
            slot = tl.load(places + row * p_m + cols * p_n, mask=mask, other=-1)
        beside = row if KIND == 0 else cols if KIND == 1 else 0
        chosen = mask & (slot >= 0)
        far = slot.to(tl.int64)
        at_m = M + far * m_s + beside * m_o
        at_v = V + far * v_s + beside * v_o
        a = tl.load(at_m, mask=chosen, other=0.0).to(tl.float32) * beta1 + g * gain1
        v = tl.load(at_v, mask=chosen, other=0.0).to(tl.float32) * beta2 + g * g * gain2
        if CLOCKS:
            own1 = tl.load(first + slot, mask=chosen, other=1.0)
            own2 = tl.load(second + slot, mask=chosen, other=1.0)
            u = (a * own1) / (tl.sqrt(v) * own2 + eps)
        else:
            u = (a * c1) / (tl.sqrt(v) * c2 + eps)
        w = keep * w + alpha * tl.where(chosen, u, stateless(g, least, scale, FREE))
        place = W + row * w_m + cols * w_n
        store_weight(place, w, mask, keys, keys_k, h_0, h_k, h_m, h_n, batch, row, cols, ROUNDING)
        tl.store(at_m, a.to(M.dtype.element_ty), mask=chosen)
        tl.store(at_v, v.to(V.dtype.element_ty), mask=chosen)


def _places(index: Tensor, n: int) -> Tensor:
    """The map (K, n) of what is in index (K, c), made anew: numbers may change in place."""
    K, c = index.shape
    places = torch.full((K, n), -1, dtype=torch.int32, device=index.device)
    if c:
        chosen = config("split_places", places, c)
        places_kernel[(triton.cdiv(c, chosen.tile_sizes["BLOCK"]), K)](
            index, places, c, n, 0 if K == 1 else index.stride(0), index.stride(1),
            **options(chosen),
        )  # fmt: skip
    return places


@torch.library.custom_op("stiefel::split_step_", mutates_args=("W", "M", "V"))
def _split_step(
    W: Tensor, G: Tensor, index: Tensor, kind: int, M: Tensor, V: Tensor, t: float,
    clocks: Tensor | None, keep: float, alpha: float, beta1: float, beta2: float, eps: float,
    free: int, scale: float, floor: Tensor | None, control: Tensor | None, keys: Tensor | None,
    positions: Sequence[int],
) -> None:  # fmt: skip
    if W.numel() == 0:
        return
    (K, m, n), bits = W.shape, Bits(keys, positions)
    with guard(W):
        length = {COLUMNS: n, ROWS: m, ENTRIES: m * n}[kind]
        places = _places(index, length)
        shape = {COLUMNS: (K, 1, n), ROWS: (K, m, 1), ENTRIES: (K, m, n)}[kind]
        map_ = places.view(shape)
        if W.stride(-1) != 1 and W.stride(-2) == 1:  # tiles run along the memory
            W, G, M, V, map_, bits = W.mT, G.mT, M.mT, V.mT, map_.mT, bits.mT
            m, n, kind = n, m, {COLUMNS: ROWS, ROWS: COLUMNS}.get(kind, kind)
            slots = -2 if kind != COLUMNS else -1
        else:
            slots = -2 if kind == ROWS else -1
        first = second = None
        c1, c2 = 1 / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)
        if clocks is not None:  # in float64: near t = 1 the powers are close to 1
            t64 = clocks.double().contiguous()
            first = (1 - beta1**t64).reciprocal_().float()
            second = (1 - beta2**t64).rsqrt_().float()
        along = [X.stride(d) for X in (M, V) for d in (slots, -3 - slots)]
        flags = (0, 0) if control is None else control.stride()
        chosen, (random, way) = config("split", W, m, n), bits.launched((K, m, n))
        tiles = triton.cdiv(m, chosen.tile_sizes["BM"]) * triton.cdiv(n, chosen.tile_sizes["BN"])
        split_kernel[(tiles, K)](
            W, G, map_, M, V, first, second, None if floor is None else floor.reshape(-1), control,
            m, n, *strides(W), *strides(G), *strides(map_),
            strides(M)[0], *along[:2], strides(V)[0], *along[2:],
            0 if clocks is None else clocks.shape[-1], *flags, *random,
            keep, alpha, beta1, beta2, 1 - beta1, 1 - beta2, c1, c2, eps, scale,
            KIND=kind, FREE=free, CLOCKS=clocks is not None, FLOOR=floor is not None,
            CONTROL=control is not None, ROUNDING=way, **options(chosen),
        )  # fmt: skip


def split_step_(
    W: Tensor, G: Tensor, index: Tensor, dim: int | None, M: Tensor, V: Tensor,
    t: float | Tensor, keep: float, alpha: float, *, beta1: float, beta2: float, eps: float,
    free: str = "sign_sgd", free_scale: float = 1.0, floor: Tensor | None = None,
    control: Tensor | None = None, rounding: Rounding | None = None,
) -> None:  # fmt: skip
    """Kernel of :func:`stiefel.kernels.reference.split_step_`."""
    if is_plain(rounding):
        plain.split_step_(
            W, G, index, dim, M, V, t, keep, alpha, beta1=beta1, beta2=beta2, eps=eps, free=free,
            free_scale=free_scale, floor=floor, control=control, rounding=rounding,
        )  # fmt: skip
        return
    K, m, n = W.shape
    kind = {-1: COLUMNS, -2: ROWS, None: ENTRIES}[dim]
    number, clocks = (1.0, t) if isinstance(t, Tensor) else (float(t), None)
    _split_step(
        W, G, index, kind, M, V, number, clocks, keep, alpha, beta1, beta2, eps, FREE[free],
        free_scale, floor, control, *drawn(rounding, W.dtype, (K, m, n)),
    )  # fmt: skip


_SCALARS = (
    "keep", "alpha", "beta1", "beta2", "gain1", "gain2", "c1", "c2", "eps", "scale",
)  # fmt: skip


def _case(
    name: str, weight: str, grad: str, kind: int, clocks: bool = False, control: bool = False,
    rounding: int = NEAREST,
) -> Case:  # fmt: skip
    types = {"W": f"*{weight}", "G": f"*{grad}", "places": "*i32", "M": "*fp32", "V": "*fp32"}
    types |= dict.fromkeys(("m", "n", *(f"{x}_k" for x in "wgpmv"), "w_m", "g_m"), "i32")
    types |= dict.fromkeys(_SCALARS, "fp32")
    constants = {"w_n": 1, "g_n": 1, "KIND": kind, "FREE": 2, "floor": None, "FLOOR": False}
    constants |= {"CLOCKS": clocks, "CONTROL": control}
    if kind == ROWS:
        constants |= {"p_n": 1, "p_m": 1, "m_o": 1, "v_o": 1}
        types |= dict.fromkeys(("m_s", "v_s"), "i32")
    else:
        constants |= {"p_n": 1, "m_s": 1, "v_s": 1}
        types |= dict.fromkeys(("p_m", "m_o", "v_o"), "i32")
    for names, given in ((("first", "second"), clocks), (("control",), control)):
        types |= dict.fromkeys(names, "*fp32") if given else {}
        constants |= {} if given else dict.fromkeys(names)
    types |= {"f_k": "i32"} if clocks else {}
    types |= {"c_k": "i32"} if control else {}
    constants |= {} if clocks else {"f_k": 0}
    constants |= {"c_x": 1} if control else {"c_k": 0, "c_x": 0}
    case = Case(name, "split", split_kernel, types, constants, loose=("c_k",), blocks=8)
    return with_rounding(case, rounding)


CASES = [
    _case("split columns bf16", "bf16", "bf16", COLUMNS),
    _case("split columns fp32", "fp32", "fp32", COLUMNS, control=True),
    _case("split columns bf16 of fp32", "bf16", "fp32", COLUMNS, clocks=True),
    _case("split rows bf16", "bf16", "bf16", ROWS),
    _case("split entries bf16", "bf16", "bf16", ENTRIES),
    _case("split columns bf16 stochastic", "bf16", "bf16", COLUMNS, rounding=COLUMN_PAIRS),
    _case("split columns fp16 stochastic", "fp16", "fp16", COLUMNS, rounding=COLUMN_PAIRS),
    _case("split rows bf16 stochastic", "bf16", "bf16", ROWS, rounding=COLUMN_PAIRS),
    _case("split entries bf16 stochastic", "bf16", "bf16", ENTRIES, rounding=COLUMN_PAIRS),
    Case(
        "split places", "split_places", places_kernel,
        {"index": "*i32", "places": "*i32", "c": "i32", "n": "i32", "i_k": "i32"}, {"i_c": 1},
    ),
]  # fmt: skip
