"""What all plans that share work over ranks have in common: owners, waves, the step of a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from .batched_calls import run_batched
from .buckets import Bucket, StepPlan

if TYPE_CHECKING:
    from .optimizer import StackedOptimizer

Item = TypeVar("Item")
MAX_WAVE_BYTES = 64 * 2**20
"""Bytes of whole tensors that one rank owns at a time, unless one unit alone has more."""


def share_out(jobs: Iterable[tuple[int, int, Item]], count: int) -> Iterator[tuple[int, Item]]:
    """Give jobs to ranks, the longest first and always to the rank that has least.

    Args:
        jobs: (work, place in the order of equal work, what is to be done).
        count: Number of ranks.

    Yields:
        A rank and its job.
    """
    work = [0] * count
    for size, _, item in sorted(jobs, key=lambda job: (-job[0], job[1])):
        rank = work.index(min(work))
        work[rank] += size
        yield rank, item


def refreshes_now(plan: StepPlan, bucket: Bucket) -> bool:
    """Whether the next update of a bucket is due for a refresh."""
    t, refreshed = bucket.clocks()
    return bool(plan.rule(bucket).refresh_due(t, refreshed, bucket.unit.shift))


def run_bucket(
    optimizer: StackedOptimizer,
    plan: StepPlan,
    bucket: Bucket,
    grads_by_position: Mapping[int, Tensor | None],
    bad: set[int],
) -> None:
    """Step one bucket."""
    grads = [grads_by_position.get(i) for i in range(len(plan.flat_params))]
    Gs = [
        bucket.gradient(i, grads) if has_grad else None for i, has_grad in enumerate(bucket.present)
    ]
    finite = [bad.isdisjoint(unit.positions) for unit in bucket.units]
    run_batched([optimizer._step_bucket(plan, bucket, Gs, finite)])


def bucket_waves(buckets: Sequence[Bucket]) -> Iterator[list[Bucket]]:
    """Buckets whose parts together have at most as many bytes as one rank may own."""
    wave, used = list[Bucket](), 0
    for bucket in buckets:
        unit = bucket.unit
        numels = [x.layout.largest for x in unit.held] or [p.numel() for p in unit.params]
        size = 4 * sum(numels) * len(bucket.units)
        if wave and used + size > MAX_WAVE_BYTES:
            yield wave
            wave, used = [], 0
        wave.append(bucket)
        used += size
    if wave:
        yield wave
