"""Finite or not: one number per parameter, looked at before any state changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import cast_stack, fuses_passes
from .plan import Bucket, Plan, chunk_bytes, largest
from .units import Unit
from .write import LOW

Grads = Sequence[Tensor | None]
Waits = Callable[[torch.device], bool]
"""Whether the host reads the flags of this device within the step."""


class LateFlags:
    """Flags on their way to the host: by the next step they have arrived, and nothing waits."""

    def __init__(self, ok: Tensor) -> None:
        self._event = None
        if ok.is_cuda:
            stream = torch.cuda.current_stream(ok.device)  # not that of the current device
            host = torch.empty(ok.shape, dtype=ok.dtype, pin_memory=True)
            ok = host.copy_(ok, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)
        self._ok = ok

    def read(self) -> list[bool]:
        """The flags, one per unit."""
        if self._event is not None:
            self._event.synchronize()
        flags: list[bool] = self._ok.tolist()
        return flags


def look(
    buckets: Sequence[Bucket], grads: Grads, waits: Waits
) -> tuple[list[list[Tensor | None] | None], list[Tensor]]:
    """Per bucket, one number per unit that is finite only if its gradients are.

    Args:
        buckets: What this step runs.
        grads: Gradients of all parameters.
        waits: Whether the host waits for a device.

    Returns:
        The gradients of stacks, kept for the update up to one stack's budget in all (None: stack
        them again), and the numbers, (K,) each.
    """
    stacks: list[list[Tensor | None] | None] = []
    flags, used = [], 0
    for bucket in buckets:
        total, kept = None, list[Tensor | None]()
        for i, there in enumerate(bucket.present):
            G = None
            if there:
                given = bucket.given(i, grads)
                G, part = _stack_and_flag(given, bucket.stacked, waits(given[0].device))
                total = part if total is None else total + part
            kept.append(G)
        assert total is not None
        flags.append(total)
        used += sum(G.nbytes for G in kept if G is not None)
        stacks.append(kept if bucket.stacked and used <= chunk_bytes(total.device) else None)
    return stacks, flags


def _stack_and_flag(
    given: list[Tensor], stacked: bool, waits: bool
) -> tuple[Tensor | None, Tensor]:
    """A stack of gradients if there is to be one, and numbers (K,)."""
    if not stacked:  # a block of a parameter looks at the whole of it: one clock, one flag
        return None, _flag(given[0], stacked, waits)
    if not waits and fuses_passes(given):
        if len({(G.stride(), G.dtype) for G in given}) == 1:
            G, fine = cast_stack(given, given[0].dtype, with_flags=True)  # all in one pass
            return G, fine.reciprocal()
    G = torch.stack(given)
    return G, _flag(G, stacked, waits)


def _flag(G: Tensor, stacked: bool, waits: bool) -> Tensor:
    """(K,) sums where the host waits; elsewhere the largest entries, which cannot overflow."""
    if waits:  # a sum that overflows is looked at again
        dims = tuple(range(1 if stacked else 0, G.dim()))
        flag = G.sum(dims, dtype=torch.float32 if G.dtype in LOW else None)
        return flag if stacked else flag.reshape(1)
    return torch.stack([largest(part) for part in G]) if stacked else largest(G).reshape(1)


def read_flags(
    plan: Plan,
    groups: Sequence[Mapping[str, Any]],
    flags: Sequence[Tensor],
    grads: Grads,
    waits: Waits,
) -> list[list[bool] | None]:
    """Per bucket, which units are fine; None where the host does not wait for the device.

    Raises:
        RuntimeError: For a bad unit of a group with ``nonfinite="raise"``.
    """
    good: list[list[bool] | None] = [None] * len(flags)
    by_device: dict[torch.device, list[int]] = {}
    for j, (bucket, flag) in enumerate(zip(plan.buckets, flags, strict=True)):
        rule = plan.rules[bucket.group]
        assert rule is not None
        needed = rule.writes or rule.due(*bucket.clocks(), bucket.unit.shift)
        if needed or waits(flag.device) or groups[bucket.group]["nonfinite"] == "raise":
            by_device.setdefault(flag.device, []).append(j)
    for chosen in by_device.values():
        finite = torch.cat([flags[j] for j in chosen]).isfinite()
        if bool(finite.all()):
            for j in chosen:
                good[j] = [True] * len(plan.buckets[j].units)
            continue
        host = iter(finite.tolist())
        for j in chosen:
            good[j] = [next(host) or _finite(unit, grads) for unit in plan.buckets[j].units]
    for bucket, fine in zip(plan.buckets, good, strict=True):
        if fine is not None and not all(fine) and groups[bucket.group]["nonfinite"] == "raise":
            _refuse(bucket, fine, groups)
    return good


def _finite(unit: Unit, grads: Grads) -> bool:
    """Look again elementwise: a finite gradient may overflow its sum."""
    present = [grads[i] for i in unit.positions]
    return all(grad is None or bool(grad.isfinite().all()) for grad in present)


def _refuse(bucket: Bucket, fine: list[bool], groups: Sequence[Mapping[str, Any]]) -> None:
    bad = [u.positions[0] for u, ok in zip(bucket.units, fine, strict=True) if not ok]
    names = [name for g in groups for name in g.get("param_names", [None] * len(g["params"]))]
    text = ", ".join(repr(names[i]) if names[i] else str(i) for i in bad)
    raise RuntimeError(
        f"non-finite gradient of parameter {text}; nonfinite='skip' leaves such parameters "
        "alone instead"
    )
