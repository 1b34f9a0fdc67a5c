"""Rules on shards: buckets that run until each needs other ranks, then one call for all of them.

A rule asks for sums, maxima and whole matrices in the middle of its formulas. Each bucket runs in a
thread of its own, exactly one at a time. When all wait or are done, what they ask for is packed:
one reduction for all sums of a dtype, one for all maxima, one exchange there and one back for all
whole matrices. On one process no rule comes here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core.rule import Reductions
from .buckets import Bucket
from .exchange import FAILED_ELSEWHERE, Exchange, Piece, RankError, Team

Run = Callable[[], None]
SUM, MAX, WHOLE, GATHER = "SUM", "MAX", "WHOLE", "GATHER"


@dataclass
class Request:
    """What a bucket asks of other ranks.

    Attributes:
        bucket: The bucket.
        kind: ``SUM``, ``MAX``, ``WHOLE`` or ``GATHER``.
        x: The partial sum or maximum, or matrices (K, m, n) of which ranks hold parts.
        fn: What is applied to whole matrices; None for a stand-in after an exception.
        per_matrix: Arguments of ``fn`` with an entry per matrix.
    """

    bucket: Bucket
    kind: str
    x: Tensor
    fn: Callable[..., Tensor] | None = None
    per_matrix: tuple[Sequence[Any] | Tensor, ...] = ()


class ShardReductions(Reductions):
    """Sums over a weight that is cut along some sides.

    Args:
        meeting: Where the bucket asks.
        bucket: The bucket.
        cut: Letters of the sides that are cut, as the rule sees them.
    """

    def __init__(self, meeting: Meeting, bucket: Bucket, cut: frozenset[str]) -> None:
        self._meeting, self._bucket, self._cut = meeting, bucket, cut

    def _ask(self, kind: str, x: Tensor, needed: bool) -> Tensor:
        return self._meeting.ask(Request(self._bucket, kind, x)) if needed else x

    def rows(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the rows of the weight."""
        return self._ask(SUM, x, "m" in self._cut)

    def cols(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the columns of the weight."""
        return self._ask(SUM, x, "n" in self._cut)

    def both(self, x: Tensor) -> Tensor:
        """Complete a partial sum over all entries of the weight."""
        return self._ask(SUM, x, bool(self._cut))

    def most(self, x: Tensor) -> Tensor:
        """Complete a maximum over all entries of the weight."""
        return self._ask(MAX, x, bool(self._cut))

    def on_one_rank(self, fn: Callable[..., Any], *args: Tensor) -> Any:
        """The results of the first rank: computed everywhere, since their shapes are not known."""
        return self._of_first_rank(fn(*args))

    def _of_first_rank(self, results: Any) -> Any:
        if isinstance(results, Tensor):
            is_first = self._meeting.team.rank == 0
            return self._ask(SUM, results if is_first else torch.zeros_like(results), True)
        return tuple(self._of_first_rank(x) for x in results)

    def on_full_matrix(
        self, fn: Callable[..., Tensor], X: Tensor, *per_matrix: Sequence[Any] | Tensor
    ) -> Tensor:
        """Apply fn to whole matrices, each on its owner, and return the local parts."""
        return self._meeting.ask(Request(self._bucket, WHOLE, X, fn, per_matrix))

    def from_full_matrix(self, fn: Callable[..., Any], X: Tensor, *small: Tensor) -> Any:
        """Apply fn to the whole stack: every rank gets the matrices, and the first one's result."""
        whole = self._meeting.ask(Request(self._bucket, GATHER, X))
        return self._of_first_rank(fn(whole, *small))


class _Aborted(BaseException):
    """Ends the thread of a bucket whose step another one has stopped."""


class _Runner:
    """A bucket in a thread of its own, which runs only while it is resumed."""

    def __init__(self, bucket: Bucket, run: Run, device: torch.device) -> None:
        self.bucket = bucket
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._main, args=(run,), daemon=True)
        self._threads = torch.get_num_threads()
        self._has_started = False

    def resume(self, answer: Any = None) -> tuple[str, Any]:
        """Run until the bucket asks, ends or raises; which of them, with request or exception."""
        if not self._has_started:
            self._has_started = True
            self._thread.start()
        else:
            self._inbox.put(answer)
        return self._outbox.get()

    def abort(self) -> None:
        """End the thread where it waits."""
        if self._thread.is_alive():
            self._inbox.put(_Aborted())
            self._thread.join()

    def ask(self, request: Request) -> Tensor:
        """Called in the thread: wait for the answer of a request."""
        self._outbox.put(("asks", request))
        answer = self._inbox.get()
        if isinstance(answer, BaseException):
            raise answer
        result: Tensor = answer
        return result

    def _main(self, run: Run) -> None:
        on_stream: AbstractContextManager[Any] = (
            nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        torch.set_num_threads(self._threads)
        try:
            # all of these belong to a thread, not to the process
            with torch.no_grad(), torch._C._DisableAutocast(), on_stream:
                run()
        except _Aborted:
            return
        except BaseException as error:
            self._outbox.put(("raises", error))
        else:
            self._outbox.put(("done", None))


class Meeting:
    """Where buckets of one team ask other ranks.

    Attributes:
        team: The ranks.
        failure: The first exception of this process in this step.
    """

    def __init__(self, team: Team, pieces_of: Callable[[Bucket, torch.dtype], list[Piece]]) -> None:
        self.team = team
        self.failure: BaseException | None = None
        self._pieces_of = pieces_of
        self._running: _Runner | None = None
        self._exchanges: dict[Hashable, Exchange] = {}
        self._asked: dict[tuple[Bucket, int], tuple[str, torch.Size, torch.dtype]] = {}

    def ask(self, request: Request) -> Tensor:
        """Wait for the answer of a request; called by a rule."""
        assert self._running is not None
        return self._running.ask(request)

    def run(self, runs: Sequence[tuple[Bucket, Run]]) -> None:
        """Run buckets to the end, which ask other ranks together.

        Raises:
            RankError: If another rank has failed.
            Exception: The first that a rule has raised here, after the others know of it.
        """
        self.failure = None
        runners = [_Runner(b, run, b.unit.params[0].device) for b, run in runs]
        answers: list[Any] = [None] * len(runners)
        waiting, number = runners, 0
        try:
            while waiting:
                requests = self._resume(waiting, answers, number)
                if not requests:
                    break
                answers = self._answer([request for _, request in requests])
                waiting, number = (
                    [runner for runner, _ in requests if runner is not None],
                    number + 1,
                )
                answers = [a for (r, _), a in zip(requests, answers, strict=True) if r is not None]
        finally:
            self._running = None
            for runner in runners:
                runner.abort()
        if self.failure is not None:
            raise self.failure

    def _resume(
        self, runners: Sequence[_Runner], answers: Sequence[Any], number: int
    ) -> list[tuple[_Runner | None, Request]]:
        """Let each run until it asks; a stand-in asks for one that has raised."""
        requests: list[tuple[_Runner | None, Request]] = []
        for runner, answer in zip(runners, answers, strict=True):
            self._running = runner
            kind, result = runner.resume(answer)
            key = runner.bucket, number
            if kind == "asks":
                self._asked[key] = result.kind, result.x.shape, result.x.dtype
                requests.append((runner, result))
            elif kind == "raises":
                self.failure = self.failure or result
                if key in self._asked or number == 0:
                    requests.append((None, self._stand_in(runner.bucket, number)))
        return requests

    def _stand_in(self, bucket: Bucket, number: int) -> Request:
        """What a bucket would have asked, for the others not to wait: as in its last step."""
        sides = len(bucket.indices), *bucket.unit.held_sides(0)
        asked = self._asked.get((bucket, number), (WHOLE, torch.Size(sides), bucket.dtype))
        kind, shape, dtype = asked
        device = bucket.unit.params[0].device
        return Request(bucket, kind, torch.zeros(shape, dtype=dtype, device=device))

    def _answer(self, requests: Sequence[Request]) -> list[Tensor]:
        """The answer to each request, by as few calls as there are kinds and dtypes."""
        answers: list[Tensor] = [r.x for r in requests]
        for kind in (SUM, MAX):
            by_dtype: dict[torch.dtype, list[int]] = {}
            for i, request in enumerate(requests):
                if request.kind == kind:
                    by_dtype.setdefault(request.x.dtype, []).append(i)
            for indices in by_dtype.values():
                reduced = self._reduce(kind, [requests[i].x for i in indices])
                for i, x in zip(indices, reduced, strict=True):
                    answers[i] = x
        for kind, answer in ((WHOLE, self._on_owners), (GATHER, self._everywhere)):
            whole: dict[torch.dtype, list[int]] = {}
            for i, request in enumerate(requests):
                if request.kind == kind:
                    whole.setdefault(request.x.dtype, []).append(i)
            for indices in whole.values():
                results = answer([requests[i] for i in indices])
                for i, x in zip(indices, results, strict=True):
                    answers[i] = x
        return answers

    def _reduce(self, kind: str, xs: Sequence[Tensor]) -> list[Tensor]:
        """Sums or maxima of all, with a number that says whether a rank has failed."""
        failed = xs[0].new_full((1,), float(self.failure is not None))
        packed = torch.cat([failed, *(x.reshape(-1) for x in xs)])
        self.team.reduce(packed, kind)
        if self.failure is None and bool(packed[0] > 0):
            raise RankError(FAILED_ELSEWHERE)
        parts = torch.split(packed[1:], [x.numel() for x in xs])
        return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]

    def _on_owners(self, requests: Sequence[Request]) -> list[Tensor]:
        """Send matrices to their owners, apply each request's function, and send results back."""
        exchange = self._exchange(requests)
        held = [M for r in requests for M in r.x.unbind(0)]
        whole = exchange.to_owners(held, self.failure is not None)
        results = dict[int, Tensor]()
        try:
            if self.failure is None:
                results = _apply(requests, whole)
        except Exception as error:
            self.failure = error
        answers = [torch.empty_like(r.x, memory_format=torch.contiguous_format) for r in requests]
        parts = [M for Y in answers for M in Y.unbind(0)]
        exchange.from_owners(results, parts, self.failure is not None)
        if self.failure is not None:
            raise self.failure
        return answers

    def _exchange(self, requests: Sequence[Request]) -> Exchange:
        """The exchange of all matrices of the requests; those of one kind differ by nothing."""
        dtype, kind = requests[0].x.dtype, requests[0].kind
        key = kind, dtype, *map(id, (r.bucket for r in requests))
        exchange = self._exchanges.get(key)
        if exchange is None:
            pieces = [piece for r in requests for piece in self._pieces_of(r.bucket, dtype)]
            if kind == GATHER:
                pieces = [piece._replace(owner=None, dtype=dtype) for piece in pieces]
            exchange = self._exchanges[key] = Exchange(self.team, pieces, requests[0].x.device)
        return exchange

    def _everywhere(self, requests: Sequence[Request]) -> list[Tensor]:
        """Whole stacks of matrices, for every rank."""
        held = [M for r in requests for M in r.x.unbind(0)]
        whole = self._exchange(requests).to_owners(held, self.failure is not None)
        answers, first = [], 0
        for request in requests:
            count = len(request.x)
            answers.append(torch.stack([whole[first + k] for k in range(count)]))
            first += count
        return answers


def _apply(requests: Sequence[Request], whole: dict[int, Tensor]) -> dict[int, Tensor]:
    """The function of each request on those of its matrices that are here, as one stack."""
    results, first = dict[int, Tensor](), 0
    for request in requests:
        count = len(request.x)
        ks = [k for k in range(count) if first + k in whole]
        if ks and request.fn is not None:
            matrices = [whole[first + k].to(request.x.dtype) for k in ks]
            X = torch.stack(matrices) if len(ks) > 1 else matrices[0].unsqueeze(0)
            Y = request.fn(X, *(_entries(x, ks) for x in request.per_matrix))
            results.update((first + k, M) for k, M in zip(ks, Y.unbind(0), strict=True))
        first += count
    return results


def _entries(x: Sequence[Any] | Tensor, ks: Sequence[int]) -> Sequence[Any] | Tensor:
    """Those of some matrices."""
    return x[list(ks)] if isinstance(x, Tensor) else [x[k] for k in ks]
