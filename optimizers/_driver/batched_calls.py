"""Updates that run side by side, so that small work of many units is done as one stack."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.rule import Direction, Together

Run = Generator[Together, Any, None]
"""A unit's update; it stops at every request and goes on with the answer."""
SIDE_BY_SIDE = {"cpu": 64 * 2**20}
"""Bytes of gradients of the units that meet, which bounds what they hold while they wait."""
SIDE_BY_SIDE_ACCELERATOR = 128 * 2**20


class Written:
    """What an update returns or yields, one by one; `answer` goes in where it asked for one."""

    def __init__(self, steps: Direction | Iterable[Direction | Together]) -> None:
        self._steps = iter((steps,) if isinstance(steps, Direction) else steps)
        self.answer: Any = None

    def __iter__(self) -> Iterator[Direction | Together]:
        return self

    def __next__(self) -> Direction | Together:
        answer, self.answer = self.answer, None
        if answer is None:
            return next(self._steps)
        return self._steps.send(answer)  # type: ignore[attr-defined,no-any-return]


class Meeting:
    """Takes runs in turn; those of one key wait for each other until they are large enough."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._key: Hashable = None
        self._size = 0

    def add(self, run: Run, key: tuple[int, torch.device] | None, size: int) -> None:
        """Run at once if key is None, else together with others of this group and device."""
        if self._runs and key != self._key:
            self.close()
        if key is None:
            side_by_side([run])
            return
        self._runs.append(run)
        self._key, self._size = key, self._size + size
        if self._size >= SIDE_BY_SIDE.get(key[1].type, SIDE_BY_SIDE_ACCELERATOR):
            self.close()

    def close(self) -> None:
        """Run what has waited."""
        runs, self._runs, self._size = self._runs, [], 0
        side_by_side(runs)


def side_by_side(runs: Sequence[Run]) -> None:
    """Run all to the end; requests of equal function and shapes that meet are one call."""
    asked = [(run, request) for run in runs if (request := next(run, None)) is not None]
    while asked:
        answers = _answers([request for _, request in asked])
        waiting = []
        for (run, _), answer in zip(asked, answers, strict=True):
            try:
                waiting.append((run, run.send(answer)))
            except StopIteration:
                pass
        asked = waiting


def _answers(requests: Sequence[Together]) -> list[tuple[Tensor, ...]]:
    """What each request asks for."""
    alike: dict[Hashable, list[int]] = {}
    for i, request in enumerate(requests):
        fn = getattr(request.fn, "__func__", request.fn)
        key = fn, *((x.shape[1:], x.dtype, x.device) for x in request.xs)
        alike.setdefault(key, []).append(i)
    answers: list[tuple[Tensor, ...]] = [()] * len(requests)
    for members in alike.values():
        chosen = [requests[i] for i in members]
        columns = zip(*(request.xs for request in chosen), strict=True)
        if len(chosen) == 1:
            answers[members[0]] = tuple(chosen[0].fn(*chosen[0].xs))
            continue
        sizes = [len(request.xs[0]) for request in chosen]
        stacks = chosen[0].fn(*(torch.cat(column) for column in columns))
        parts = zip(*(torch.split(stack, sizes) for stack in stacks), strict=True)
        for i, part in zip(members, parts, strict=True):
            answers[i] = part
    return answers
