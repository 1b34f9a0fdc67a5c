"""Error feedback: what a step did not use waits in the state and is added to the next gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import dequantize_rows, quantize_rows
from .rule import Slot

KINDS = (None, "full", "int8", "int4")
_PANEL = 2**18  # entries that are coded at a time, so that no buffer of E's size is made


@dataclass(frozen=True)
class Feedback:
    """A store for one matrix E (m, n) per weight: exact, or codes with a range for every row.

    Attributes:
        kind: ``"full"`` (in the state's dtype), ``"int8"`` or ``"int4"``.
    """

    kind: str

    @property
    def bits(self) -> int:
        """Bits per entry of the quantised kinds."""
        return 8 if self.kind == "int8" else 4

    def slots(self, n: int) -> dict[str, Slot]:
        """State of a matrix with n columns: m n floats, or m n (m n / 2) bytes and 2 m floats."""
        if self.kind == "full":
            return {"error": Slot("mn")}
        row, byte = torch.float32, torch.uint8
        codes = Slot("mn", byte) if self.kind == "int8" else Slot("mh", byte, h=(n + 1) // 2)
        return {"error": codes, "error_low": Slot("m1", row), "error_high": Slot("m1", row)}

    def load(self, state: Mapping[str, Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """E (K, m, n) in this dtype: the state itself where it is kept so, else a new tensor."""
        E = state["error"]
        if self.kind == "full":
            return E.to(dtype)
        low, high = state["error_low"], state["error_high"]
        shape = (*E.shape[:-1], n)  # codes of 8 bits lie in memory as the weight does
        alike = E.shape == shape
        out = torch.empty_like(E, dtype=dtype) if alike else low.new_empty(shape, dtype=dtype)
        for i in _panels(out):
            part = dequantize_rows(E[:, i], low[:, i], high[:, i], self.bits, n)
            out[:, i].copy_(part)
        return out

    def store(self, state: Mapping[str, Tensor], E: Tensor) -> None:
        """Keep E (K, m, n); nothing happens if it is the state itself."""
        kept = state["error"]
        if self.kind == "full":
            if kept is not E:
                kept.copy_(E)
            return
        for i in _panels(E):
            codes, low, high = quantize_rows(E[:, i].float(), self.bits)
            kept[:, i].copy_(codes)
            state["error_low"][:, i].copy_(low)
            state["error_high"][:, i].copy_(high)


def feedback(kind: str | None) -> Feedback | None:
    """The store that a user names in ``error_feedback=``."""
    return None if kind is None else Feedback(kind)


def _panels(X: Tensor) -> list[slice]:
    """Rows of X (K, m, n) in pieces of one size."""
    K, m, n = X.shape
    rows = max(1, _PANEL // (K * n))
    return [slice(i, i + rows) for i in range(0, m, rows)]
