"""What every launcher needs: tile sizes, precision, guards, scratch memory, and cases to compile.

A kernel is described by its function, a table of tile sizes (``_tables.py``) and static cases: what
it is compiled with where no GPU is at hand, so that a loss of code quality shows in the tests.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ._tables import TABLES, Config

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run on CPU tensors in Triton's interpreter, for tests."""
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one block may have; of sm_80 what 8.6, 8.9 and 12.x have too."""
LARGE = 1024
"""Shorter side from which a matrix is of the size class "large"."""


@functools.cache
def architecture(index: int = 0) -> str:
    """The table that is used on a device: the nearest architecture that is not newer."""
    if INTERPRETED:
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def config(name: str, X: Tensor, *sides: int) -> Config:
    """Tile sizes, warps and stages of a kernel for a tensor whose relevant sides are these."""
    if INTERPRETED:  # tiles that make ragged edges of small matrices
        return TABLES[name]["interpreted"]["small"]
    table = TABLES[name][architecture(X.device.index or 0)]
    return table["large" if min(sides) >= LARGE else "small"]


def precision(*Xs: Tensor) -> str:
    """How tl.dot multiplies: narrow operands ignore it; float32 as torch is allowed to."""
    if torch.version.hip is not None or INTERPRETED:
        return "ieee"  # fast on AMD, and the only choice there
    if any(X.dtype != torch.float32 for X in Xs):
        return "tf32"
    # allow_tf32 raises where it was said by fp32_precision, which knows what either said
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def guard(X: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of X, whatever the current one is."""
    return torch.cuda.device(X.device) if X.is_cuda else contextlib.nullcontext()


def options(chosen: Config) -> dict[str, Any]:
    """The keyword arguments of a launch that a Config stands for."""
    return {**chosen.tile_sizes, "num_warps": chosen.warps, "num_stages": chosen.stages}


def strides(X: Tensor) -> tuple[int, int, int]:
    """Strides of (K, m, n); a batch of one never moves."""
    return (0 if X.shape[0] == 1 else X.stride(0), X.stride(1), X.stride(2))


def stacked(X: Tensor) -> Tensor:
    """(K, m, n) of (m, n) or (K, m, n)."""
    return X if X.ndim == 3 else X[None]


def refuse_overlap(out: Tensor, *inputs: Tensor) -> None:
    """Raise ValueError if a result lies in the memory of an operand that other programs read."""
    start, stop = _span(out)
    for X in inputs:
        first, last = _span(X)
        if X.device == out.device and start < last and first < stop:
            raise ValueError("the result overlaps an operand: pass a tensor of its own memory")


def _span(X: Tensor) -> tuple[int, int]:
    if X.numel() == 0:
        return 0, 0
    length = 1 + sum((n - 1) * s for n, s in zip(X.shape, X.stride(), strict=True))
    return X.data_ptr(), X.data_ptr() + length * X.element_size()


def scratch(X: Tensor, *shape: int) -> Tensor:
    """Float32 memory on X's device for a while, with whatever is in it.

    It is torch's: freed in the order of the stream, and of the graph's own pool, at one address at
    every replay, where a CUDA graph is captured. Nothing is kept between calls.
    """
    return X.new_empty(shape, dtype=torch.float32)


# autotuning, on request only ----------------------------------------------------------------------

_TUNED: dict[tuple[Any, ...], Config] = {}


def bucket(side: int) -> int:
    """The next power of two, 16384 at most: shapes of one bucket share a choice."""
    return min(triton.next_power_of_2(max(side, 1)), 16384)


def tuned(
    name: str,
    X: Tensor,
    sides: Sequence[int],
    launch: Callable[[Config], None],
    *,
    batch: bool = False,
    partial: bool = False,
) -> Config:
    """The shipped Config, or under STIEFEL_AUTOTUNE=1 the fastest of the table's on this device.

    Only for kernels that change nothing they read. Never while a CUDA graph is captured.

    Args:
        name: Of the kernel in ``TABLES``.
        X: A tensor of the launch.
        sides: What the choice depends on.
        launch: Runs the kernel with a Config.
        batch: Whether there are several matrices (False).
        partial: Whether only some of them are worked on (False): that would time launches which do
            nothing.
    """
    shipped = config(name, X, *sides)
    if INTERPRETED or partial or not X.is_cuda or os.environ.get("STIEFEL_AUTOTUNE", "0") != "1":
        return shipped
    kind = (X.dtype, X.stride(-1) == 1, batch, X.device.index)
    key = (name, tuple(map(bucket, sides)), kind)
    if key not in _TUNED:
        if torch.cuda.is_current_stream_capturing():
            return shipped
        candidates = candidates_of(name, architecture(X.device.index or 0))
        times = {c: _milliseconds(functools.partial(launch, c)) for c in candidates}
        _TUNED[key] = min(times, key=lambda c: times[c])
    return _TUNED[key]


def _milliseconds(launch: Callable[[], None]) -> float:
    """The median time, infinite for what does not fit a smaller device of an architecture."""
    try:
        time: float = triton.testing.do_bench(launch, return_mode="median")
    except OutOfResources:
        return math.inf
    return time


def candidates_of(name: str, target: str) -> list[Config]:
    """All Configs that the tables have for a kernel and that fit an architecture."""
    tables = (table for arch, table in TABLES[name].items() if arch != "interpreted")
    found = [chosen for table in tables for chosen in table.values()]
    stages = 2 if target == "gfx942" else 8
    return list(dict.fromkeys(c for c in found if c.stages <= stages))


# what is compiled without a GPU -------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched on large aligned matrices.

    Attributes:
        name: Of the row in ``static.json``.
        table: Name of the kernel in ``TABLES``.
        kernel: The function under ``triton.jit``.
        types: Type of every argument that is no constant: ``"*bf16"``, ``"i32"``, ``"fp32"``.
        constants: The others but for tiles. Unit strides are the constant 1, absent pointers None.
        dot: Dtype of the matrix instruction that must be there: ``"bf16"``, ``"fp16"``, ``"tf32"``;
            ``""`` for kernels without products.
        loose: Integers that are no multiples of 16.
        blocks: How many blocks a multiprocessor must be able to hold at once.
        size: Size class of the Config.
        load: Bytes that the widest load must have; less than 16 where memory is gathered, or holds
            little.
    """

    name: str
    table: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    dot: str = ""
    loose: tuple[str, ...] = ()
    blocks: int = 1
    size: str = "large"
    load: int = 16

    def config(self, target: str) -> Config:
        """Its Config on an architecture."""
        return TABLES[self.table][target][self.size]
