"""Operands of passes over memory: a stack (K, m, n), or a list of K matrices wherever they lie.

The matrices of a list are found by a table of their addresses on the device, so that many small
ones cost one launch and no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference._stacks import Stack
from ._launch import config
from ._tables import Config

ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
MAX_TABLES = 4096
"""How many tables are kept; the oldest goes first."""
_TABLES: dict[Any, dict[int, tuple[Tensor, Tensor]]] = {}
"""By addresses and device: the table of every stream, and the host tensor it was copied from."""
_CAPTURED: list[tuple[Tensor, Tensor]] = []
"""Tables that a CUDA graph reads again at every replay: they are never dropped."""


@triton.jit
def matrix_pointer(P, k, stride, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where matrix k begins, of a stack or, where TYPE is given, by a table of addresses."""
    if TYPE is None:
        return P + k.to(tl.int64) * stride  # a stack may have more than 2^31 elements
    else:
        p = tl.load(P + k).to(tl.pointer_type(TYPE))
        if ALIGNED:  # unknown of an address that is loaded, and vector loads need it
            p = tl.multiple_of(p, 16)
        return p


def as_list(X: Stack) -> list[Tensor]:
    """How an operation of ``torch.library`` takes it: a stack is a list of one 3-D tensor."""
    return [X] if isinstance(X, Tensor) else list(X)


def is_unsupported(*Xs: Stack | None) -> bool:
    """Whether any operand is of a dtype that kernels do not have."""
    firsts = [X if isinstance(X, Tensor) else X[0] for X in Xs if X is not None and len(X)]
    return any(X.dtype not in ELEMENTS for X in firsts)


class Operand:
    """What a launch needs to know of a stack or list.

    Attributes:
        first: A tensor of it.
        shape: K, m, n.
        strides: In elements, of K (0 for a list), m and n.
        pointer: The stack, or the table.
        type: None, or the element type of the addresses in the table.
        aligned: Whether all addresses are multiples of 16.
    """

    def __init__(self, Xs: Sequence[Tensor], name: str, transposed: bool = False) -> None:
        self.first = X = Xs[0]
        self.transposed = transposed
        listed = X.ndim == 2
        K = len(Xs) if listed else len(X)
        sides, steps = tuple(X.shape[-2:]), X.stride()[-2:]
        if listed and any(x.shape != X.shape or x.stride() != X.stride() for x in Xs):
            raise ValueError(f"the matrices of {name} must agree in shape and strides: group them")
        if listed and any(x.dtype != X.dtype or x.device != X.device for x in Xs):
            raise ValueError(f"the matrices of {name} must agree in dtype and device: group them")
        if transposed:
            sides, steps = sides[::-1], steps[::-1]
        self.shape = (K, *sides)
        self.strides = (0 if listed or K == 1 else X.stride(0), *steps)
        self.type = ELEMENTS[X.dtype] if listed else None
        self.aligned = False
        self.pointer = X
        if listed:
            addresses = tuple(x.data_ptr() for x in Xs)
            self.aligned = all(a % 16 == 0 for a in addresses)
            self.pointer = _table(addresses, X.device)

    def expect(self, other: Operand, name: str) -> None:
        """Raise ValueError unless another operand has the same shape."""
        if other.shape != self.shape:
            raise ValueError(f"{name} must have the shape {self.shape}, got {other.shape}")


def is_column_major(Xs: Sequence[Tensor]) -> bool:
    """Whether columns lie along the memory, so that a pass has to see the transposed matrices."""
    X = Xs[0]
    return X.stride(-2) == 1 and (X.stride(-1) != 1 or X.shape[-1] == 1)


def empty_stack_like(Xs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """An empty stack for a result, with the memory order of the operand."""
    X = Xs[0]
    K = len(Xs) if X.ndim == 2 else len(X)
    m, n = X.shape[-2:]
    if is_column_major(Xs):
        return X.new_empty(K, n, m, dtype=dtype).mT
    return X.new_empty(K, m, n, dtype=dtype)


def pass_tiles(name: str, X: Tensor, m: int, n: int) -> Config:
    """The Config of a pass, its tile of the same size but no longer than the rows are.

    It depends on the matrix only, so that a stack has the bits of its matrices.
    """
    shipped = config(name, X, m, n)
    most, area = shipped.tile_sizes["BN"], shipped.tile_sizes["BN"] * shipped.tile_sizes["BM"]
    BN = min(most, triton.next_power_of_2(n))
    BM = min(area // BN, triton.next_power_of_2(m))
    return Config((("BM", BM), ("BN", BN)), shipped.warps, shipped.stages)


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device, kept: the same matrices come at every step."""
    stream, captured = 0, False
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            captured = torch.cuda.is_current_stream_capturing()
    of_streams = _TABLES.get((addresses, device), {})
    if captured:  # a graph reads a table made before, on whatever stream: that copy has ended
        if not of_streams:
            raise RuntimeError(
                "a CUDA graph is captured that reads a list of matrices for the first time: call "
                "the operation once with the same tensors before the capture"
            )
        found = next(iter(of_streams.values()))
        _CAPTURED.append(found)
        return found[0]
    if stream not in of_streams:
        with torch.inference_mode(False):
            host = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            host = host.pin_memory() if device.type == "cuda" else host
            of_streams[stream] = host.to(device, non_blocking=True), host
        if len(_TABLES) >= MAX_TABLES:
            _TABLES.pop(next(iter(_TABLES)), None)
        _TABLES[addresses, device] = of_streams
    return of_streams[stream][0]


def operand_case(name: str, element: str, listed: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of a Case: of a stack, or of a list by its table."""
    types = {name: "*i64" if listed else f"*{element}", f"{name.lower()}_m": "i32"}
    kind = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[element]
    constants = {
        f"{name}_TYPE": kind if listed else None, f"{name}_ALIGNED": listed, f"{name.lower()}_n": 1
    }  # fmt: skip
    if listed:
        constants[f"{name.lower()}_k"] = 0
    else:
        types[f"{name.lower()}_k"] = "i32"
    return types, constants
