"""Non-finite gradients: one flag per parameter, found before any state changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import cast_stack, fuses_passes
from .buckets import Bucket, StepPlan, max_abs, max_stack_bytes
from .units import Unit
from .write import LOW_PRECISION_DTYPES

Grads = Sequence[Tensor | None]
Waits = Callable[[torch.device], bool]
"""Whether the host waits for the flags of a device within the step."""


class LateFlags:
    """Flags that are copied to the host while the step goes on, and read in the next step."""

    def __init__(self, finite: Tensor) -> None:
        self._event = None
        if finite.is_cuda:
            stream = torch.cuda.current_stream(finite.device)  # not that of the current device
            pinned = torch.empty(finite.shape, dtype=finite.dtype, device="cpu", pin_memory=True)
            finite = pinned.copy_(finite, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)
        self._finite = finite

    def read(self) -> list[bool]:
        """The flags, one per unit."""
        if self._event is not None:
            self._event.synchronize()
        flags: list[bool] = self._finite.tolist()
        return flags


def finite_sums(
    buckets: Sequence[Bucket], grads: Grads, waits: Waits
) -> tuple[list[list[Tensor | None] | None], list[Tensor]]:
    """Make a number per unit that is finite exactly if its gradients are, unless a sum overflows.

    Args:
        buckets: What this step runs.
        grads: Gradients of all parameters.
        waits: Whether the host waits for a device.

    Returns:
        Per bucket, the stacked gradients for the update; None where the bucket is no stack, or
        where all stacks so far exceed the byte budget of one. Per bucket, the numbers (K,).
    """
    stacks: list[list[Tensor | None] | None] = []
    flags, used = [], 0
    for bucket in buckets:
        total, member_stacks = None, list[Tensor | None]()
        for i, has_grad in enumerate(bucket.present):
            G = None
            if has_grad:
                unit_grads = bucket.grads_of(i, grads)
                G, part = _stack_and_flag(unit_grads, bucket.stacked, waits(unit_grads[0].device))
                total = part if total is None else total + part
            member_stacks.append(G)
        assert total is not None
        flags.append(total)
        used += sum(G.nbytes for G in member_stacks if G is not None)
        stacks.append(
            member_stacks if bucket.stacked and used <= max_stack_bytes(total.device) else None
        )
    return stacks, flags


def _stack_and_flag(
    unit_grads: list[Tensor], stacked: bool, waits: bool
) -> tuple[Tensor | None, Tensor]:
    """The stack of gradients, None if they are not stacked, and the numbers (K,)."""
    if not stacked:  # all units of one parameter share the flag of the whole gradient
        return None, _flag(unit_grads[0], stacked, waits)
    if not waits and fuses_passes(unit_grads):
        if len({(G.stride(), G.dtype) for G in unit_grads}) == 1:
            # the copy and its flags in one pass
            G, finite = cast_stack(unit_grads, unit_grads[0].dtype, with_flags=True)
            return G, finite.reciprocal()  # a flag of 0 becomes infinite, as bad sums are
    G = torch.stack(unit_grads)
    return G, _flag(G, stacked, waits)


def _flag(G: Tensor, stacked: bool, waits: bool) -> Tensor:
    """(K,) sums where the host waits, else the largest magnitudes, which cannot overflow.

    An overflow can be looked at again only where the host waits.
    """
    if waits:  # a sum that overflows is looked at again
        dims = tuple(range(1 if stacked else 0, G.dim()))
        flag = G.sum(dims, dtype=torch.float32 if G.dtype in LOW_PRECISION_DTYPES else None)
        return flag if stacked else flag.reshape(1)
    return torch.stack([max_abs(part) for part in G]) if stacked else max_abs(G).reshape(1)


def read_flags(
    plan: StepPlan,
    groups: Sequence[Mapping[str, Any]],
    flags: Sequence[Tensor],
    grads: Grads,
    waits: Waits,
) -> list[list[bool] | None]:
    """Read on the host which units have finite gradients; None where the host does not wait.

    Raises:
        RuntimeError: For a non-finite gradient in a group with ``nonfinite="raise"``.
    """
    finite_units: list[list[bool] | None] = [None] * len(flags)
    by_device: dict[torch.device, list[int]] = {}
    for j, (bucket, flag) in enumerate(zip(plan.buckets, flags, strict=True)):
        rule = plan.rules[bucket.group]
        assert rule is not None
        needed = rule.writes_in_refresh or rule.refresh_due(*bucket.clocks(), bucket.unit.shift)
        if needed or waits(flag.device) or groups[bucket.group]["nonfinite"] == "raise":
            by_device.setdefault(flag.device, []).append(j)
    for on_device in by_device.values():
        device_flags = torch.cat([flags[j] for j in on_device]).isfinite()
        if bool(device_flags.all()):
            for j in on_device:
                finite_units[j] = [True] * len(plan.buckets[j].units)
            continue
        host_flags = iter(device_flags.tolist())
        for j in on_device:
            finite_units[j] = [
                next(host_flags) or _is_finite(unit, grads) for unit in plan.buckets[j].units
            ]
    for bucket, finite in zip(plan.buckets, finite_units, strict=True):
        if finite is not None and not all(finite) and groups[bucket.group]["nonfinite"] == "raise":
            _refuse(bucket, finite, groups)
    return finite_units


def _is_finite(unit: Unit, grads: Grads) -> bool:
    """Whether all entries are finite; the sum of a finite gradient may have overflowed."""
    present = [grads[i] for i in unit.positions]
    return all(grad is None or bool(grad.isfinite().all()) for grad in present)


def _refuse(bucket: Bucket, finite: list[bool], groups: Sequence[Mapping[str, Any]]) -> None:
    bad = [u.positions[0] for u, flag in zip(bucket.units, finite, strict=True) if not flag]
    names = [name for g in groups for name in g.get("param_names", [None] * len(g["params"]))]
    text = ", ".join(repr(names[i]) if names[i] else str(i) for i in bad)
    raise RuntimeError(
        f"non-finite gradient of parameter {text}; nonfinite='skip' leaves such parameters "
        "alone instead"
    )
