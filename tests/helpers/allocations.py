"""Counts what a piece of code allocates: live bytes of new storages, at their peak.

Seen is every tensor that an operator hands back to Python. Buffers that a kernel makes and frees
inside itself (workspaces of LAPACK, a packed operand of a matrix product) are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Counts, as a context, storages that begin inside it.

    Attributes:
        live: Bytes of storages that began inside and are still alive.
        peak: The largest value that ``live`` had.
        largest: Bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; what comes out and did not go in is new."""
        kwargs = kwargs or {}
        old = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _key(x) not in old:
                self._add(x)
        return out

    def _add(self, x: torch.Tensor) -> None:
        storage, key = x.untyped_storage(), _key(x)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _key(x: torch.Tensor) -> int:
    """Identity of the storage: two tensors share it if and only if they are views of one."""
    return x.untyped_storage()._cdata


def count_step(optimizer: Any) -> AllocationCounter:
    """What one step allocates."""
    with AllocationCounter() as counter:
        optimizer.step()
    return counter


def count_second_step(optimizer: Any, gradient: Callable[[Any, int], torch.Tensor]) -> Any:
    """What the second step allocates; ``gradient(p, seed)`` is called anew for both steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(2):
        for k, p in enumerate(params):
            p.grad = gradient(p, step + k)
        if step == 0:
            optimizer.step()
    return count_step(optimizer)
