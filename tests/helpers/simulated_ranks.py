"""Ranks that share the matrices of a rule, without process groups: threads that take turns.

Every rank runs the rule's own ``refresh`` and ``update`` on its shard. A call of ``Reductions``
stops the rank; when all have stopped, the call is answered from all shards and the ranks go on, so
sums are really sums and a forgotten one leaves a rank with the sum of its own shard.
"""

import threading
from collections import Counter

import torch

from stiefel.optimizers import Member, StackedOptimizer
from stiefel.optimizers._core.rule import Reductions
from stiefel.optimizers._driver.batched_calls import DirectionIterator
from stiefel.optimizers._driver.decay import Decay
from stiefel.optimizers._driver.write import write_

PATIENCE = 60.0
"""Seconds after which a rank that does not stop fails the test instead of blocking it."""
ALWAYS_SHARED = ("both", "most", "on_one_rank", "on_full_matrix", "from_full_matrix")
"""Methods that need other ranks whichever side is split; of ``rows`` and ``cols`` one does."""


class Stopped(BaseException):
    """Raised in the ranks that wait when another rank has failed."""


class UnequalMatrices(AssertionError):
    """Ranks hand different matrices to what takes whole ones, equal on all ranks."""


class MissingRanks(AssertionError):
    """Some ranks ask for an exchange that others do not: real ones would wait for ever."""


class Lockstep:
    """Runs one function per rank, one rank at a time, from one exchange to the next.

    Args:
        count: Number of ranks.
        answer: Of the requests of all ranks, in order of ranks: their answers.
    """

    def __init__(self, count, answer):
        self._answer = answer
        self._resume = [threading.Semaphore(0) for _ in range(count)]
        self._parked = threading.Semaphore(0)
        self._requests, self._answers = [None] * count, [None] * count
        self._error = None

    def exchange(self, rank, request):
        """Called by a rank: wait for the others, and return this rank's answer."""
        self._requests[rank] = request
        self._parked.release()
        self._resume[rank].acquire()
        if self._error is not None:
            raise Stopped
        return self._answers[rank]

    def run(self, fns):
        """Run all to the end; the first exception of a rank or of an exchange is raised here."""
        results, waiting = [None] * len(fns), set(range(len(fns)))

        def rank_main(rank):
            self._resume[rank].acquire()
            try:
                if self._error is None:
                    with torch.no_grad():  # which each thread has for itself
                        results[rank] = fns[rank]()
            except Stopped:
                pass
            except BaseException as error:
                self._error = self._error or error
            waiting.discard(rank)
            self._parked.release()

        threads = [
            threading.Thread(target=rank_main, args=(i,), daemon=True) for i in range(len(fns))
        ]
        for thread in threads:
            thread.start()
        while waiting:
            for rank in sorted(waiting):
                self._resume[rank].release()
                assert self._parked.acquire(timeout=PATIENCE), f"rank {rank} does not come back"
            if waiting and self._error is None:
                self._complete(waiting)
        for thread in threads:
            thread.join(PATIENCE)
        if self._error is not None:
            raise self._error
        return results

    def _complete(self, waiting):
        try:
            if len(waiting) < len(self._requests):
                raise MissingRanks(f"only ranks {sorted(waiting)} ask for an exchange")
            self._answers = self._answer(self._requests)
        except BaseException as error:
            self._error = error


class ShardReductions(Reductions):
    """The reductions that one rank sees.

    Args:
        ranks: The ranks.
        rank: Number of this one.
    """

    def __init__(self, ranks, rank):
        self._ranks, self._rank = ranks, rank
        self.has_whole_rows = ranks.split != "cols"

    def _ask(self, name, *args):
        return self._ranks.ask(self._rank, name, args)

    def rows(self, x):
        return self._ask("rows", x)

    def cols(self, x):
        return self._ask("cols", x)

    def both(self, x):
        return self._ask("both", x)

    def most(self, x):
        return self._ask("most", x)

    def sums_together(self, *parts):
        return tuple(of.both(x) for of, x in parts)

    def most_together(self, *parts):
        return tuple(of.most(x) for of, x in parts)

    def on_one_rank(self, fn, *args):
        return self._ask("on_one_rank", fn, *args)

    def on_full_matrix(self, fn, X, *per_matrix):
        return self._ask("on_full_matrix", fn, X, *per_matrix)

    def from_full_matrix(self, fn, X, *small):
        return self._ask("from_full_matrix", fn, X, *small)


class SimulatedRanks:
    """K equal weights (M, N) of one rule, cut over ranks, stepped as the driver steps a stack.

    Args:
        rule: The rule; one member per unit.
        weights: (K, M, N), the whole weights as they are stored.
        split: ``"rows"`` or ``"cols"`` of the weights as the rule sees them.
        shares: Rows or columns of each rank, maybe none; they add up to the side.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        broken: None, or (name, number): in every step, the call of this method of ``Reductions``
            with this number, counted from 0, does nothing, as on one process.

    Attributes:
        calls: Most calls in a step of each method that needs several shards.
    """

    def __init__(self, rule, weights, split, shares, lr=0.1, weight_decay=0.0, broken=None):
        self.rule, self.lr, self.weight_decay = rule, lr, weight_decay
        self.split, self.shares, self.broken = split, list(shares), broken
        self.calls, self.t, self.refreshed = {}, 0, 0
        self.transposed = rule.transpose(*weights.shape[-2:])
        self.dim, self.letter = (-2, "m") if split == "rows" else (-1, "n")
        W = self._as_rule_sees(weights)
        self.indices, (self.m, self.n) = tuple(range(len(W))), W.shape[-2:]
        assert sum(self.shares) == W.shape[self.dim] and min(self.shares) >= 0
        self.weights = self._cut(W)
        self.slots = rule.slots(((self.m, self.n),))[0]
        self.states = [self._allocate(W) for W in self.weights]
        self._lockstep = Lockstep(len(self.shares), self._answer)
        self._grads = [None] * len(self.shares)
        self._calls_now = [Counter() for _ in self.shares]

    def step(self, grads):
        """One update from the whole gradients (K, M, N)."""
        self.t += 1
        self._grads = self._cut(self._as_rule_sees(grads))
        self._calls_now = [Counter() for _ in self.shares]
        refresh_due = self.rule.refresh_due(self.t, self.refreshed)
        self._lockstep.run(
            [
                lambda rank=rank: self._step_rank(rank, refresh_due)
                for rank in range(len(self.shares))
            ]
        )
        self.refreshed = self.t if refresh_due else self.refreshed
        for name, count in self._calls_now[0].items():
            self.calls[name] = max(count, self.calls.get(name, 0))

    def whole_weights(self):
        """The weights (K, M, N) as they would be stored."""
        W = torch.cat(self.weights, self.dim)
        return W.mT if self.transposed else W

    def whole_state(self):
        """Slot name -> (K, *axes) as the rule sees it; what is not cut must be equal everywhere."""
        whole = {}
        for name, slot in self.slots.items():
            parts = [state[name] for state in self.states]
            if self.letter in slot.axes:
                whole[name] = torch.cat(parts, 1 + slot.axes.index(self.letter))
                continue
            assert all(torch.equal(parts[0], part) for part in parts), f"{name} differs by rank"
            whole[name] = parts[0]
        return whole

    def ask(self, rank, name, args):
        """What a call of ``Reductions`` on this rank returns."""
        if name not in (self.split, *ALWAYS_SHARED):
            return getattr(Reductions(), name)(*args)
        number = self._calls_now[rank][name]
        self._calls_now[rank][name] += 1
        if (name, number) == self.broken:
            return getattr(Reductions(), name)(*args)
        return self._lockstep.exchange(rank, (name, args))

    def _as_rule_sees(self, X):
        return X.mT if self.transposed else X

    def _cut(self, X):
        return [part.clone() for part in X.split(self.shares, self.dim)]

    def _allocate(self, W):
        """The slots' state for one shard: axes with the letter of the split side are cut."""
        full = torch.promote_types(W.dtype, torch.float32)
        state = {}
        for name, slot in self.slots.items():
            dtype = {None: full, "full": full, "weight": W.dtype}.get(slot.dtype, slot.dtype)
            shape = (len(W), *slot.shape(*W.shape[-2:]))
            if slot.fill == "eye":
                assert self.letter not in slot.axes, f"{name} would be cut on both axes"
                state[name] = torch.eye(*shape[1:], dtype=dtype).expand(shape).clone()
            else:
                state[name] = torch.full(shape, slot.fill, dtype=dtype)
        return state

    def _step_rank(self, rank, refresh_due):
        W = self.weights[rank]
        member = Member(
            self._grads[rank],
            lambda: W,
            self.states[rank],
            t=self.t,
            refreshed=self.refreshed,
            m=self.m,
            n=self.n,
            indices=self.indices,
            transposed=self.transposed,
            reductions=ShardReductions(self, rank),
        )
        if refresh_due:
            member.refreshed, member.is_first_refresh = self.t, self.refreshed == 0
            self.rule.refresh(member)
        for direction in DirectionIterator(self.rule.update(member)):
            write_(W, direction, self.lr, Decay(self.weight_decay))

    def _answer(self, requests):
        """The answers of one exchange, a tensor of its own for every rank."""
        names, calls = {name for name, _ in requests}, [args for _, args in requests]
        assert len(names) == 1, f"ranks ask for different things: {sorted(names)}"
        (name,) = names
        if name == "on_full_matrix":
            return self._on_full_matrix(calls)
        if name in ("on_one_rank", "from_full_matrix"):
            return self._on_one_rank(calls, of_shards=name == "from_full_matrix")
        parts = [x for (x,) in calls]
        assert len({x.shape for x in parts}) == 1, f"{name} of different shapes"
        total = torch.stack(parts).amax(0) if name == "most" else sum(parts[1:], parts[0])
        return [total.clone() for _ in parts]

    def _on_full_matrix(self, calls):
        """Each matrix goes to an owner of its own, who calls what that rank would have called."""
        X = torch.cat([X for _, X, *_ in calls], self.dim)
        self._check_equal([per_matrix for _, _, *per_matrix in calls])
        parts = []
        for k in range(len(X)):
            fn, _, *per_matrix = calls[(k + 1) % len(calls)]
            assert all(len(x) == len(X) for x in per_matrix), "per_matrix has one entry per matrix"
            O = fn(X[k : k + 1].clone(), *(entries[k : k + 1] for entries in per_matrix))
            assert O.shape == X[:1].shape, "on_full_matrix returns what is laid out like the weight"
            parts.append(O)
        return self._cut(torch.cat(parts))

    def _on_one_rank(self, calls, of_shards):
        """The last rank calls its function, on whole tensors."""
        fn, *args = calls[-1]
        if of_shards:
            args[0] = torch.cat([X for _, X, *_ in calls], self.dim)
        self._check_equal([args[1:] if of_shards else args for _, *args in calls])
        result = fn(*args)
        if isinstance(result, torch.Tensor):
            return [result.clone() for _ in calls]
        return [tuple(x.clone() for x in result) for _ in calls]

    @staticmethod
    def _check_equal(of_ranks):
        """Fail unless all ranks have the same arguments."""
        first = of_ranks[0]
        for args in of_ranks[1:]:
            for x, y in zip(first, args, strict=True):
                tensors = isinstance(x, torch.Tensor)
                equal = x.shape == y.shape and torch.equal(x, y) if tensors else x == y
                if not equal:
                    raise UnequalMatrices("what is passed whole must be equal on all ranks")


def steps_of_one_process(rule, grads, lr=0.1, weight_decay=0.1):
    """Weights (K, M, N) that were zero, after the step of each of the gradients; the optimizer."""
    params = [torch.nn.Parameter(torch.zeros_like(G)) for G in grads[0]]
    optimizer = StackedOptimizer(params, rule, lr, weight_decay)
    weights = []
    for grad in grads:
        for p, G in zip(params, grad, strict=True):
            p.grad = G.clone()
        optimizer.step()
        weights.append(torch.stack([p.detach().clone() for p in params]))
    return weights, optimizer


def error(found, expected):
    """The largest difference relative to the largest number, 0 where all are 0."""
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-300))
