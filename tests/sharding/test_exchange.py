"""Packed exchanges of boxes, on ranks that are threads: whole tensors to their owners and back."""

import random
import threading

import pytest
import torch
from helpers.ranks import mesh_of, pool

from stiefel.optimizers._driver import bucket_runs
from stiefel.optimizers._driver import shards as shards_module
from stiefel.optimizers._driver.exchange import STATUS_BYTES, Exchange, Piece, RankError
from stiefel.optimizers._driver.layout import box_of, part

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8)


class Threads:
    """P ranks that are threads; ``send`` and ``reduce`` do what a process group does."""

    def __init__(self, world):
        self.world, self._barrier = world, threading.Barrier(world, timeout=20)
        self._slots, self.bytes_sent = [None] * world, [0] * world

    def gather(self, rank, value):
        self._slots[rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def run(self, function):
        """What function(team) returns, or the exception that it raises, per rank."""
        results = [None] * self.world

        def call(rank):
            try:
                results[rank] = function(ThreadTeam(self, rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


class ThreadTeam:
    """One rank of :class:`Threads`, in the place of a ``Team``."""

    def __init__(self, threads, rank):
        self._threads, self.rank = threads, rank

    def __len__(self):
        return self._threads.world

    def send(self, message, sent, received):
        parts = list(message.split(sent))
        self._threads.bytes_sent[self.rank] += message.numel()
        rows = self._threads.gather(self.rank, parts)
        answer = torch.cat([row[self.rank] for row in rows])
        assert answer.numel() == sum(received)
        assert [row[self.rank].numel() for row in rows] == received
        return answer


class Replicate:
    """As torch's: no dimension is cut."""


class Shard:
    """As torch's: one dimension is cut."""

    def __init__(self, dim):
        self.dim = dim


def random_pieces(world, generator, owned=True):
    """Pieces and whole tensors of random shapes, dtypes, owners and ways to be cut."""
    pieces, wholes = [], []
    for _ in range(generator.randint(1, 6)):
        shape = tuple(generator.randint(1, 9) for _ in range(generator.randint(1, 3)))
        how = generator.choice([Replicate(), *(Shard(d) for d in range(len(shape)))])
        boxes = tuple(box_of(shape, (world,), (how,), (rank,)) for rank in range(world))
        dtype = generator.choice(DTYPES)
        X = torch.tensor(
            [generator.randint(-100, 100) for _ in range(torch.Size(shape).numel())]
        ).view(shape)
        owner = generator.randrange(world) if owned else None
        pieces.append(Piece(owner, boxes, shape, dtype))
        wholes.append(X.to(dtype))
    return pieces, wholes


@pytest.mark.parametrize("world", range(1, 8))
@pytest.mark.parametrize("seed", range(12))
def test_boxes_reach_their_owners_and_come_back(world, seed):
    pieces, wholes = random_pieces(world, random.Random(100 * world + seed))

    def travel(team):
        held = [
            part(X, piece.boxes[team.rank]).clone() for X, piece in zip(wholes, pieces, strict=True)
        ]
        exchange = Exchange(team, pieces, torch.device("cpu"))
        found = exchange.to_owners(held)
        assert found.keys() == {k for k, p in enumerate(pieces) if p.owner == team.rank}
        for k, X in found.items():
            assert torch.equal(X, wholes[k])
        exchange.from_owners({k: X + 1 for k, X in found.items()}, held)
        for x, X, piece in zip(held, wholes, pieces, strict=True):
            assert torch.equal(x, part(X, piece.boxes[team.rank]) + 1)
        messages = 1 if exchange.is_one_way else 2  # what all have whole, nobody sends there
        status = messages * (world - 1) * STATUS_BYTES
        return exchange.bytes_to_owners() + exchange.bytes_from_owners() + status

    threads = Threads(world)
    assert threads.run(travel) == threads.bytes_sent


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_pieces_without_an_owner_reach_everyone(world):
    pieces, wholes = random_pieces(world, random.Random(world), owned=False)

    def gather(team):
        held = [
            part(X, piece.boxes[team.rank]).clone() for X, piece in zip(wholes, pieces, strict=True)
        ]
        found = Exchange(team, pieces, torch.device("cpu")).to_owners(held)
        return all(torch.equal(found[k], X) for k, X in enumerate(wholes))

    assert Threads(world).run(gather) == [True] * world


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_failure_of_one_rank_is_raised_on_the_others_and_nothing_is_written(way):
    pieces, wholes = random_pieces(3, random.Random(7))

    def travel(team):
        held = [part(X, p.boxes[team.rank]).clone() for X, p in zip(wholes, pieces, strict=True)]
        exchange = Exchange(team, pieces, torch.device("cpu"))
        has_failed = team.rank == 1
        try:
            found = exchange.to_owners(held, has_failed and way == "there")
            if way == "back":
                results = {} if has_failed else {k: X + 1 for k, X in found.items()}
                exchange.from_owners(results, held, has_failed)
        finally:
            for x, X, piece in zip(held, wholes, pieces, strict=True):
                assert torch.equal(x, part(X, piece.boxes[team.rank]))
        return "own"

    results = Threads(3).run(travel)
    assert results[1] == "own"
    assert isinstance(results[0], RankError) and isinstance(results[2], RankError)


SHAPES = [(24, 16), (16, 24), (40, 8), (8, 40), (32, 32), (12, 12), (20, 4), (4, 20), (64, 16)]


def trained(rank, world, name, wave_bytes):
    """Whole weights after three steps with waves of at most so many bytes, and the owners."""
    from torch.distributed.tensor import Shard as TorchShard
    from torch.distributed.tensor import distribute_tensor

    from stiefel import optimizers

    mesh, placements = mesh_of(world), [TorchShard(0)]
    generator = torch.Generator().manual_seed(0)

    def drawn(shape):
        return distribute_tensor(torch.randn(shape, generator=generator), mesh, placements)

    before = shards_module.MAX_WAVE_BYTES
    shards_module.MAX_WAVE_BYTES = bucket_runs.MAX_WAVE_BYTES = wave_bytes
    try:
        params = [torch.nn.Parameter(drawn(shape)) for shape in SHAPES]
        optimizer = getattr(optimizers, name)(params, lr=0.1)
        for _ in range(3):
            for p in params:
                p.grad = drawn(tuple(p.shape))
            optimizer.step()
    finally:
        shards_module.MAX_WAVE_BYTES = bucket_runs.MAX_WAVE_BYTES = before
    owners = optimizer._plan.shards._owner_of
    work = [0] * world
    for unit, ranks in owners.items():
        m, n = unit.sides(0)
        for owner in ranks:
            work[owner] += m * n * min(m, n)
    whole = [p.detach().full_tensor() for p in params]
    return whole, [list(ranks) for ranks in owners.values()], work


@pytest.mark.parametrize("name", ["Muon", "ARO"])
def test_waves_of_any_size_have_equal_bits(name):
    runs = [pool(3).run(trained, name, size) for size in (1, 6000, 2**26)]
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run[0][0], runs[0][0][0], strict=True))


@pytest.mark.parametrize("name", ["Muon", "ARO"])
def test_owners_are_the_same_on_all_ranks_and_share_the_work(name):
    found = pool(3).run(trained, name, 2**26)
    assert all(owners == found[0][1] for _, owners, _ in found)
    work = found[0][2]
    largest = max(m * n * min(m, n) for m, n in SHAPES)
    assert max(work) <= 4 / 3 * max(sum(work) / 3, largest)
