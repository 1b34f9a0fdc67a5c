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
Asked = tuple[int, str, tuple[torch.Size, ...], torch.dtype]
"""Of a request the number of the member, the kind, shapes and dtype."""
SUM, MAX, WHOLE, FROM = "SUM", "MAX", "WHOLE", "FROM"


@dataclass
class Request:
    """What a bucket asks of other ranks.

    Attributes:
        bucket: The bucket.
        number: Number of the member whose weight it is about.
        kind: ``SUM``, ``MAX``, ``WHOLE`` or ``FROM``.
        x: The partial sum or maximum, or matrices (K, m, n) of which ranks hold parts.
        fn: What is applied to whole matrices; None for a stand-in after an exception.
        per_matrix: Arguments of ``fn`` with an entry per matrix.
        small: Arguments of ``fn`` that all ranks have whole.
        gathers: Whether ``fn`` takes the whole of ``x`` before them.
        more: Further partial sums or maxima, of the dtype of ``x``.
    """

    bucket: Bucket
    number: int
    kind: str
    x: Tensor
    fn: Callable[..., Any] | None = None
    per_matrix: tuple[Sequence[Any] | Tensor, ...] = ()
    small: tuple[Tensor, ...] = ()
    gathers: bool = False
    more: tuple[Tensor, ...] = ()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All partial sums or maxima."""
        return self.x, *self.more


class ShardReductions(Reductions):
    """Sums over a weight that is cut along some sides.

    Args:
        rendezvous: Where the bucket asks.
        bucket: The bucket.
        number: Number of the member.
        cut: Letters of the sides that are cut, as the rule sees them.
        shares: Whether replicas share the work for whole matrices.
        is_counted: Whether sums count what this process holds, as they do of one replica.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        bucket: Bucket,
        number: int,
        cut: frozenset[str] = frozenset(),
        shares: bool = False,
        is_counted: bool = True,
    ) -> None:
        self._rendezvous, self._bucket, self._number = rendezvous, bucket, number
        self._cut, self._shares, self._is_counted = cut & {"m", "n"}, shares, is_counted
        self.has_whole_rows, self.is_whole = "n" not in cut, not self._cut

    def _ask(self, kind: str, x: Tensor, *args: Any) -> Any:
        answer = self._rendezvous.ask(Request(self._bucket, self._number, kind, x, *args))
        return answer[0] if kind in (SUM, MAX) else answer

    def _complete(self, kind: str, x: Tensor, needed: bool) -> Tensor:
        completed: Tensor = self._ask(kind, self._share(kind, x)) if needed else x
        return completed

    def _share(self, kind: str, x: Tensor) -> Tensor:
        """What this process adds to a sum."""
        return x if self._is_counted or kind == MAX else torch.zeros_like(x)

    def rows(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the rows of the weight."""
        return self._complete(SUM, x, "m" in self._cut)

    def cols(self, x: Tensor) -> Tensor:
        """Complete a partial sum over the columns of the weight."""
        return self._complete(SUM, x, "n" in self._cut)

    def both(self, x: Tensor) -> Tensor:
        """Complete a partial sum over all entries of the weight."""
        return self._complete(SUM, x, bool(self._cut))

    def most(self, x: Tensor) -> Tensor:
        """Complete a maximum over all entries of the weight."""
        return self._complete(MAX, x, bool(self._cut))

    def sums_together(self, *parts: tuple[Reductions, Tensor]) -> tuple[Tensor, ...]:
        """Complete partial sums of one or several members of a unit, by one call."""
        return self._complete_together(SUM, parts)

    def most_together(self, *parts: tuple[Reductions, Tensor]) -> tuple[Tensor, ...]:
        """The same for maxima."""
        return self._complete_together(MAX, parts)

    def _complete_together(
        self, kind: str, parts: Sequence[tuple[Reductions, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Ask for all that belongs to a member that is cut; a whole member has the rest itself."""
        own = [of if isinstance(of, ShardReductions) and of._cut else None for of, _ in parts]
        shares = [
            of._share(kind, x) for of, (_, x) in zip(own, parts, strict=True) if of is not None
        ]
        if not shares:
            return tuple(x for _, x in parts)
        request = Request(self._bucket, self._number, kind, shares[0], more=tuple(shares[1:]))
        completed = iter(self._rendezvous.ask(request))
        return tuple(
            x if of is None else next(completed) for of, (_, x) in zip(own, parts, strict=True)
        )

    def on_one_rank(self, fn: Callable[..., Any], *args: Tensor) -> Any:
        """Apply fn to small matrices that all ranks have whole, on one; all get the result."""
        return self._ask(FROM, args[0], fn, (), args)

    def on_full_matrix(
        self, fn: Callable[..., Tensor], X: Tensor, *per_matrix: Sequence[Any] | Tensor
    ) -> Tensor:
        """Apply fn to whole matrices, each on its owner, and return the local parts."""
        is_asked = self._cut or self._shares
        whole: Tensor = self._ask(WHOLE, X, fn, per_matrix) if is_asked else fn(X, *per_matrix)
        return whole

    def from_full_matrix(self, fn: Callable[..., Any], X: Tensor, *small: Tensor) -> Any:
        """Apply fn to the whole stack on the owner of its first matrix; all get the result."""
        if not self._cut:
            return self.on_one_rank(fn, X, *small)
        return self._ask(FROM, X, fn, (), small, True)


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

    def ask(self, request: Request) -> Any:
        """Called in the thread: wait for the answer of a request."""
        self._outbox.put(("asks", request))
        answer = self._inbox.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

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


class Rendezvous:
    """Where buckets of one team ask other ranks.

    Attributes:
        team: The ranks.
        failure: The first exception of this process in this step.
        is_known: Whether other ranks know of it.
    """

    def __init__(
        self,
        team: Team,
        pieces_of: Callable[[Bucket, int, torch.Size, torch.dtype], list[Piece]],
    ) -> None:
        self.team = team
        self.failure: BaseException | None = None
        self.is_known = False
        self._pieces_of = pieces_of
        self._running: _Runner | None = None
        self._exchanges: dict[Hashable, Exchange] = {}
        self._asked: dict[Hashable, Asked] = {}
        self._phases: dict[Bucket, Hashable] = {}

    def ask(self, request: Request) -> Any:
        """Wait for the answer of a request; called by a rule."""
        assert self._running is not None
        return self._running.ask(request)

    def run(
        self,
        runs: Sequence[tuple[Bucket, Hashable, Run]],
        failure: BaseException | None = None,
        learns: bool = False,
    ) -> None:
        """Run buckets to the end, which ask other ranks together.

        Args:
            runs: Buckets, what their requests depend on beside their rule, and how to run them.
            failure: An exception of this process that the others are to learn of; nothing runs.
            learns: Whether ranks say before all that is sent whether they have failed, since one
                that has could not tell what the others are about to send; equal on all ranks.

        Raises:
            RankError: If another rank has failed.
            Exception: The first that a rule has raised here, after the others know of it.
        """
        self.failure, self.is_known = failure, False
        self._phases = {bucket: phase for bucket, phase, _ in runs}
        if failure is not None and learns:
            return self._meet()
        if failure is not None:
            stand_ins = [self._stand_in(bucket, 0, []) for bucket, *_ in runs]
            requests_made = [request for request in stand_ins if request is not None]
            if requests_made:
                self._answer(requests_made)
            return
        runners = [_Runner(b, run, b.unit.params[0].device) for b, _, run in runs]
        answers: list[Any] = [None] * len(runners)
        waiting, number = runners, 0
        try:
            while waiting:
                requests = self._resume(waiting, answers, number)
                if learns:
                    self._meet()
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

    def _meet(self) -> None:
        """Let all ranks know whether one has failed; raises what failed here, or RankError."""
        failed = torch.tensor(
            [self.failure is not None], dtype=torch.int32, device=self.team.device
        )
        self.is_known = self.failure is not None
        self.team.reduce(failed, "MAX")
        if self.failure is not None:
            raise self.failure
        if bool(failed):
            raise RankError(FAILED_ELSEWHERE)

    def _resume(
        self, runners: Sequence[_Runner], answers: Sequence[Any], number: int
    ) -> list[tuple[_Runner | None, Request]]:
        """Let each run until it asks; a stand-in asks for one that has raised."""
        found: list[tuple[_Runner, Request | None]] = []
        for runner, answer in zip(runners, answers, strict=True):
            self._running = runner
            kind, result = runner.resume(answer)
            if kind == "asks":
                shapes = tuple(x.shape for x in result.parts)
                asked = result.number, result.kind, shapes, result.x.dtype
                self._asked[runner.bucket, self._phases[runner.bucket], number] = asked
                found.append((runner, result))
            elif kind == "raises":
                self.failure, self.is_known = self.failure or result, False
                found.append((runner, None))
        live = [request for _, request in found if request is not None]
        requests: list[tuple[_Runner | None, Request]] = []
        for runner, request in found:
            stand_in = None if request else self._stand_in(runner.bucket, number, live)
            if request is not None:
                requests.append((runner, request))
            elif stand_in is not None:
                requests.append((None, stand_in))
        return requests

    def _stand_in(self, bucket: Bucket, number: int, live: Sequence[Request]) -> Request | None:
        """What a bucket that has raised would have asked, for the other ranks not to wait.

        What it asked in its last step, if buckets of its rule ask for that kind now; else what
        those ask, since buckets of one rule ask alike, or whole matrices, if its rule needs them.
        """
        K, unit = len(bucket.indices), bucket.unit
        asked = self._asked.get((bucket, self._phases[bucket], number))
        alike = [like for like in live if like.bucket.unit.rule == unit.rule]
        known = {(like.kind, like.x.dtype) for like in alike}
        if alike and (asked is None or (asked[1], asked[3]) not in known):
            like = alike[0]
            shapes = [unit.held_sides(0)] if like.kind not in (SUM, MAX) else [
                _shape_like(x.shape[1:], like.bucket, bucket) for x in like.parts
            ]  # fmt: skip
            sizes = tuple(torch.Size((K, *shape)) for shape in shapes)
            asked = like.number, like.kind, sizes, like.x.dtype
        placed = unit.placed
        if asked is None and number == 0 and placed is not None and placed.plan == "owner":
            asked = 0, WHOLE, (torch.Size((K, *unit.held_sides(0))),), bucket.dtype
        if asked is None:
            return None
        member, kind, sizes, dtype = asked
        device = unit.params[0].device
        x, *more = (torch.zeros(size, dtype=dtype, device=device) for size in sizes)
        return Request(bucket, member, kind, x, gathers=kind == FROM, more=tuple(more))

    def _answer(self, requests: Sequence[Request]) -> list[Any]:
        """The answer to each request, by as few calls as there are kinds and dtypes."""
        answers: list[Any] = [r.x for r in requests]
        self.is_known = self.failure is not None
        by_call: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            kind = request.kind
            call = (kind, request.x.dtype) if kind in (SUM, MAX) else kind
            by_call.setdefault(call, []).append(i)
        order = [key for kind in (SUM, MAX) for key in by_call if key[0] == kind]
        for call in (*order, WHOLE, FROM):
            indices = by_call.get(call, [])
            batch = [requests[i] for i in indices]
            if call in order:
                completed = iter(self._reduce(call[0], [x for r in batch for x in r.parts]))
                results: Sequence[Any] = [[next(completed) for _ in r.parts] for r in batch]
            elif not batch:
                continue
            else:
                results = self._on_owners(batch) if call == WHOLE else self._from_owners(batch)
            for i, x in zip(indices, results, strict=True):
                answers[i] = x
        return answers

    def _reduce(self, kind: str, xs: Sequence[Tensor]) -> list[Tensor]:
        """Sums or maxima of all, with a number that says whether a rank has failed."""
        failed = xs[0].new_full((1,), float(self.failure is not None))
        packed = torch.cat([failed, *(x.reshape(-1) for x in xs)])
        self.team.reduce(packed, kind)
        if self.failure is not None:
            raise self.failure  # the others have read so and ask for nothing more
        if bool(packed[0] > 0):
            raise RankError(FAILED_ELSEWHERE)
        parts = torch.split(packed[1:], [x.numel() for x in xs])
        return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]

    def _on_owners(self, requests: Sequence[Request]) -> list[Tensor]:
        """Send matrices to their owners, apply each request's function, and send results back."""
        exchange = self._exchange(requests)
        held = [M for r in requests for M in r.x.unbind(0)]
        whole = exchange.to_owners(held, self.failure is not None)
        if self.failure is not None and not exchange.is_one_way:
            raise self.failure  # the others have read so and do not come to the way back
        results = dict[int, Tensor]()
        try:
            if self.failure is None:
                results = _apply(requests, whole)
        except Exception as error:
            self.failure = error
        whole.clear()  # results take their place
        answers = [torch.empty_like(r.x, memory_format=torch.contiguous_format) for r in requests]
        parts = [M for Y in answers for M in Y.unbind(0)]
        self.is_known = True
        exchange.from_owners(results, parts, self.failure is not None)
        if self.failure is not None:
            raise self.failure
        return answers

    def _exchange(self, requests: Sequence[Request]) -> Exchange:
        """The exchange of all matrices of the requests."""
        asked = ((r.kind, r.number, r.x.shape, r.x.dtype, id(r.bucket)) for r in requests)
        key = tuple(asked)
        exchange = self._exchanges.get(key)
        if exchange is None:
            pieces = list[Piece]()
            for r in requests:
                own = self._pieces_of(r.bucket, r.number, r.x.shape[-2:], r.x.dtype)
                if r.kind == FROM:  # a stack that something is found from is not divided
                    own = [piece._replace(owner=own[0].owner, dtype=r.x.dtype) for piece in own]
                pieces += own
            exchange = self._exchanges[key] = Exchange(self.team, pieces, requests[0].x.device)
        return exchange

    def _from_owners(self, requests: Sequence[Request]) -> list[Any]:
        """Apply each request's function on one rank, and give the results to all."""
        gathered = [r for r in requests if r.gathers]
        whole, owners = dict[int, Tensor](), list[int]()
        if gathered:
            exchange = self._exchange(gathered)
            held = [M for r in gathered for M in r.x.unbind(0)]
            whole = exchange.to_owners(held, self.failure is not None)
            if self.failure is not None:
                raise self.failure
        results, first = dict[int, Any](), 0
        for i, r in enumerate(requests):
            owner = self._pieces_of(r.bucket, r.number, r.x.shape[-2:], r.x.dtype)[0].owner or 0
            owners.append(owner)
            if owner == self.team.rank and self.failure is None and r.fn is not None:
                matrices = [whole[first + k] for k in range(len(r.x))] if r.gathers else []
                X = (torch.stack(matrices),) if matrices else ()
                try:
                    results[i] = r.fn(*X, *r.small)
                except Exception as error:
                    self.failure = error
            first += len(r.x) if r.gathers else 0
        return self._give_to_all(requests, owners, results)

    def _give_to_all(
        self, requests: Sequence[Request], owners: Sequence[int], results: dict[int, Any]
    ) -> list[Any]:
        """Results of one rank each, on all ranks, which learn their shapes first."""
        device = requests[0].x.device
        rows = [_shapes_of(results.get(i)) for i in range(len(requests))]
        flat = [int(self.failure is not None), *(x for row in rows for x in row)]
        header = torch.tensor(flat, dtype=torch.int64, device=device)
        self.is_known = True
        failed, *shapes = self.team.reduce(header, "SUM").tolist()
        if self.failure is not None:
            raise self.failure
        if failed:
            raise RankError(FAILED_ELSEWHERE)
        pieces, held, own = list[Piece](), list[Tensor](), dict[int, Tensor]()
        answers = list[Any]()
        for i, owner in enumerate(owners):
            found, is_one = _tensors_of(shapes[i * HEADER : (i + 1) * HEADER], device)
            for k, X in enumerate(found):
                if i in results:
                    own[len(pieces)] = results[i] if is_one else results[i][k]
                box = tuple((0, side) for side in X.shape)
                pieces.append(Piece(owner, (box,) * len(self.team), tuple(X.shape), X.dtype))
                held.append(X)
            answers.append(found[0] if is_one else tuple(found))
        Exchange(self.team, pieces, device).from_owners(own, held)
        return answers


MOST_RESULTS, MOST_SIDES = 4, 4
HEADER = 2 + MOST_RESULTS * (2 + MOST_SIDES)
"""Numbers that tell the shapes of what a function returned."""
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)


def _shape_like(shape: Sequence[int], of: Bucket, bucket: Bucket) -> list[int]:
    """The shape of what a bucket sums, from that of another bucket with the same rule.

    A sum has no side that is cut, and a side of length 1 is one that was summed.
    """
    placed = of.unit.placed
    cut = placed.cut[0] if placed is not None and placed.cut else frozenset()
    sides = zip("mn", of.unit.held_sides(0), bucket.unit.held_sides(0), strict=True)
    letters = {a: b for letter, a, b in sides if letter not in cut and a != 1}
    return [letters.get(side, side) for side in shape]


def _shapes_of(result: Any) -> list[int]:
    """Numbers that tell the shapes of a result; zeros where there is none."""
    tensors = [result] if isinstance(result, Tensor) else list(result or ())
    row = [len(tensors), int(isinstance(result, Tensor))]
    for X in tensors:
        sides = [*X.shape, *[0] * (MOST_SIDES - X.dim())]
        row += [X.dim(), DTYPES.index(X.dtype), *sides]
    return row + [0] * (HEADER - len(row))


def _tensors_of(row: Sequence[int], device: torch.device) -> tuple[list[Tensor], bool]:
    """Empty tensors of the shapes that a row tells, and whether the result was one tensor."""
    count, is_one, *rest = row
    found, step = [], 2 + MOST_SIDES
    for k in range(count):
        dim, dtype, *sides = rest[k * step : (k + 1) * step]
        found.append(torch.empty(sides[:dim], dtype=DTYPES[dtype], device=device))
    return found, bool(is_one)


def _apply(requests: Sequence[Request], whole: dict[int, Tensor]) -> dict[int, Tensor]:
    """The function of each request on those of its matrices that are here, as one stack."""
    results, first = dict[int, Tensor](), 0
    for request in requests:
        count = len(request.x)
        ks = [k for k in range(count) if first + k in whole]
        if ks and request.fn is not None:
            matrices = [whole[first + k].to(request.x.dtype) for k in ks]
            X = _stack(matrices)
            Y = request.fn(X, *(_entries(x, ks) for x in request.per_matrix))
            results.update((first + k, M) for k, M in zip(ks, Y.unbind(0), strict=True))
        first += count
    return results


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices as a stack (k, m, n) that lies in memory as they do, which bits depend on."""
    first = matrices[0]
    if len(matrices) == 1:
        return first.unsqueeze(0)
    if not first.is_contiguous() and first.mT.is_contiguous():
        return torch.stack([M.mT for M in matrices]).mT
    return torch.stack(list(matrices))


def _entries(x: Sequence[Any] | Tensor, ks: Sequence[int]) -> Sequence[Any] | Tensor:
    """Those of some matrices."""
    return x[list(ks)] if isinstance(x, Tensor) else [x[k] for k in ks]
