"""What a step over ranks needs at most for a while, and what it chooses among equal scores."""

import pytest
import torch
from helpers.allocations import AllocationCounter
from helpers.methods import METHODS
from helpers.ranks import pool
from helpers.sharded import difference, digest, lay, meshes, whole
from torch import nn

from stiefel.optimizers._driver import bucket_runs, shards

COUNT, SIDE = 12, 272
"""Too large for a stack, on either rank."""


def peak(rank, world, method, wave_bytes):
    """Most bytes that a step of many equal weights holds for a while, beside the second's."""
    mesh, before = meshes(world)["all"], shards.MAX_WAVE_BYTES
    shards.MAX_WAVE_BYTES = bucket_runs.MAX_WAVE_BYTES = wave_bytes
    try:
        draw = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(lay(torch.randn(SIDE, SIDE, generator=draw), mesh, 0))
            for _ in range(COUNT)
        ]
        optimizer = METHODS[method]([(f"layer{i}.weight", p) for i, p in enumerate(params)])
        for p in params:
            p.grad = lay(torch.randn(SIDE, SIDE, generator=draw), mesh, 0)
        optimizer.step()
        with AllocationCounter() as counter:
            optimizer.step()
        return counter.peak
    finally:
        shards.MAX_WAVE_BYTES = bucket_runs.MAX_WAVE_BYTES = before


@pytest.mark.parametrize("method", ["muon", "aro"])
def test_temporaries_take_at_most_three_waves(method):
    """A wave may be as large as one rank's share of whole tensors; all of it would be many."""
    wave = 4 * 4 * SIDE * SIDE
    small, all_at_once = (
        max(pool(2).run(peak, method, size)) for size in (wave, 1024 * 1024 * 1024)
    )
    assert small <= 3 * wave + 1024  # words of status
    assert all_at_once > 1.4 * small


# ties ---------------------------------------------------------------------------------------------


def hadamard():
    """(8, 8) of +1 and -1, whose rows and columns have equal norms, exactly."""
    X = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return torch.kron(X, torch.kron(X, X))


def lay_columns(mesh, X):
    return lay(X.clone(), mesh, 1)


def tied(rank, world, methods):
    """By method: how far weights are from one process, and bits of all that replicas hold."""
    found = {}
    for method in methods:
        made = []
        for mesh in (None, meshes(world)["all"]):
            place = (
                torch.clone if mesh is None else lambda X: lay(X.clone(), meshes(world)["all"], 1)
            )
            p = nn.Parameter(place(torch.ones(8, 8)))
            optimizer = METHODS[method]([("layer0.weight", p)])
            for k in range(2):
                p.grad = place(hadamard() * 2.0**k)
                optimizer.step()
            state = {k: whole(x) for k, x in optimizer.state[p].items()}
            made.append((whole(p), state))
        (one, state_of_one), (many, state) = made
        chosen = [
            torch.equal(x, state[k])
            for k, x in state_of_one.items()
            if isinstance(x, torch.Tensor) and not x.is_floating_point()
        ]
        found[method] = difference(many, one), all(chosen), digest([many])
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_choose_alike_among_equal_scores(world):
    """By sums that are exact as one process does, the lowest number; by rounded ones all alike."""
    found = pool(world).run(tied, ["pick", "pick-rows", "frugal-columns", "trion", "dctadamw"])
    assert all(rank == found[0] for rank in found)
    for method in ("pick", "pick-rows", "frugal-columns"):
        far, same, _ = found[0][method]
        assert far <= 1e-6 and same, method
