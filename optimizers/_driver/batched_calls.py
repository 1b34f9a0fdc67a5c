"""Updates that run side by side, so that their small tensors are worked on as one stack."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.rule import BatchedCall, Direction

UpdateGenerator = Generator[BatchedCall, Any, None]
"""The step of a bucket: yields requests, and is sent their answers."""
MAX_WAITING_BYTES = {"cpu": 64 * 2**20}
"""Bytes of gradients of the units that wait for each other: a bound on their temporaries."""
MAX_WAITING_BYTES_ACCELERATOR = 128 * 2**20


class DirectionIterator:
    """Iterates over what ``update`` returned or yields.

    Attributes:
        answer: Set it before the next iteration to answer a :class:`BatchedCall`.
    """

    def __init__(self, steps: Direction | Iterable[Direction | BatchedCall]) -> None:
        self._steps = iter((steps,) if isinstance(steps, Direction) else steps)
        self.answer: Any = None

    def __iter__(self) -> Iterator[Direction | BatchedCall]:
        return self

    def __next__(self) -> Direction | BatchedCall:
        answer, self.answer = self.answer, None
        if answer is None:
            return next(self._steps)
        return self._steps.send(answer)  # type: ignore[attr-defined,no-any-return]


class CallBatcher:
    """Runs updates in order; those of one key wait for each other until they are large enough."""

    def __init__(self) -> None:
        self._runs: list[UpdateGenerator] = []
        self._key: tuple[Hashable, torch.device] | None = None
        self._size = 0

    def add(
        self, run: UpdateGenerator, key: tuple[Hashable, torch.device] | None, size: int
    ) -> None:
        """Run an update, at once or together with later ones.

        Args:
            run: The update.
            key: Rule and device of updates that wait for each other; None: run at once.
            size: Bytes of its gradients.
        """
        if self._runs and key != self._key:
            self.flush()
        if key is None:
            run_batched([run])
            return
        self._runs.append(run)
        self._key, self._size = key, self._size + size
        if self._size >= MAX_WAITING_BYTES.get(key[1].type, MAX_WAITING_BYTES_ACCELERATOR):
            self.flush()

    def flush(self) -> None:
        """Run all updates that wait."""
        runs, self._runs, self._size = self._runs, [], 0
        run_batched(runs)


def run_batched(runs: Sequence[UpdateGenerator]) -> None:
    """Run all to the end; requests of equal function and shapes become one call."""
    waiting = [(run, request) for run in runs if (request := next(run, None)) is not None]
    while waiting:
        answers = _batched_answers([request for _, request in waiting])
        resumed = []
        for (run, _), answer in zip(waiting, answers, strict=True):
            try:
                resumed.append((run, run.send(answer)))
            except StopIteration:
                pass
        waiting = resumed


def _batched_answers(requests: Sequence[BatchedCall]) -> list[tuple[Tensor, ...]]:
    """The answer to each request, in order."""
    same_call: dict[Hashable, list[int]] = {}
    for i, request in enumerate(requests):
        fn = getattr(request.fn, "__func__", request.fn)
        key = fn, *((x.shape[1:], x.dtype, x.device) for x in request.args)
        same_call.setdefault(key, []).append(i)
    answers: list[tuple[Tensor, ...]] = [()] * len(requests)
    for indices in same_call.values():
        batch = [requests[i] for i in indices]
        columns = zip(*(request.args for request in batch), strict=True)
        if len(batch) == 1:
            answers[indices[0]] = tuple(batch[0].fn(*batch[0].args))
            continue
        sizes = [len(request.args[0]) for request in batch]
        stacks = batch[0].fn(*(torch.cat(column) for column in columns))
        parts = zip(*(torch.split(stack, sizes) for stack in stacks), strict=True)
        for i, part in zip(indices, parts, strict=True):
            answers[i] = part
    return answers
