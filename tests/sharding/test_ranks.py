"""The pools of ranks that the other tests of this folder run on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from helpers import ranks
from helpers.ranks import Nursery, Pool, RanksFailed, mesh_of, pool
from torch import nn

WORLDS = pytest.mark.parametrize("world", [2, 3, 4])


def sums(rank, world, X):
    X = X + rank
    dist.all_reduce(X)
    return {"rank": rank, "sum": X, "threads": torch.get_num_threads(), "pid": os.getpid()}


@WORLDS
def test_every_rank_returns_values_and_tensors(world):
    found = pool(world).run(sums, torch.arange(3.0))
    assert [x["rank"] for x in found] == list(range(world))
    for x in found:
        expected = world * torch.arange(3.0) + world * (world - 1) / 2
        assert torch.equal(x["sum"], expected)
        assert x["threads"] == 1


def test_a_pool_lives_on_and_a_case_is_cheap():
    first = [x["pid"] for x in pool(2).run(sums, torch.zeros(1))]
    start = time.perf_counter()
    for _ in range(20):
        second = [x["pid"] for x in pool(2).run(sums, torch.zeros(1))]
    assert first == second
    assert (time.perf_counter() - start) / 20 < 0.1


def raises(rank, world, bad):
    if rank in bad:
        raise KeyError(f"told so on {rank}")
    return rank


def test_an_exception_comes_with_its_traceback():
    with pytest.raises(RanksFailed, match="KeyError: 'told so on 1'") as caught:
        pool(3).run(raises, [1])
    assert "rank 1 of 3" in str(caught.value)
    assert "in raises" in str(caught.value)
    assert pool(3).run(raises, []) == [0, 1, 2]


def test_outcomes_tell_which_rank_failed_and_how():
    found = pool(2).outcomes(raises, [0])
    assert [x.kind for x in found] == ["KeyError", None]
    assert found[1].value == 1


def hangs(rank, world):
    time.sleep(600 if rank == 1 else 0)


def test_a_hang_ends_and_the_next_case_has_a_fresh_pool():
    old, start = pool(2), time.perf_counter()
    with pytest.raises(RanksFailed, match=r"rank 1 of 2: did not end within 1 s") as caught:
        old.run(hangs, timeout=1)
    assert "in hangs" in str(caught.value)
    assert time.perf_counter() - start < 10
    assert pool(2) is not old
    assert pool(2).run(raises, []) == [0, 1]


def waits(rank, world):
    if rank == 0:
        raise ValueError("before the others")
    dist.barrier()


def test_ranks_that_wait_for_one_that_failed_are_ended():
    found = pool(2).outcomes(waits, timeout=30, grace=1)
    assert [x.kind for x in found] == ["ValueError", "hung"]


def dies(rank, world):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_death_is_told():
    assert pool(2).outcomes(dies, grace=1)[1].kind == "died"
    assert pool(2).run(raises, []) == [0, 1]


def test_several_worlds_live_beside_each_other():
    pools = [pool(4), pool(2), Pool(2)]
    try:
        assert [len(p.run(raises, [])) for p in pools] == [4, 2, 2]
    finally:
        pools[-1].close()


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_closing_leaves_no_process():
    made = Pool(3)
    pids = [x["pid"] for x in made.run(sums, torch.zeros(1))]
    made.close()
    assert all(is_gone(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        made.run(raises, [])


def test_the_session_ends_its_ranks(monkeypatch):
    monkeypatch.setattr(ranks, "_nursery", [Nursery(preloaded=())])
    monkeypatch.setattr(ranks, "_pools", {})
    pids = [x["pid"] for x in pool(2).run(sums, torch.zeros(1))]
    process, folder = ranks.nursery().process, pool(2).folder
    ranks.close()
    assert all(is_gone(pid) for pid in [*pids, process.pid])
    assert not os.path.exists(folder)


def names(rank, world):
    return raises.__module__


def test_functions_are_found_by_their_file_or_name():
    assert "test_ranks" in pool(2).run(names)[0]
    assert pool(2).run("helpers.problems:gaussian")[0].shape == (0, 2)


def lambda_(rank, world):
    return (lambda: rank)()


def test_a_function_of_a_function_is_refused():
    with pytest.raises(ValueError, match="top level"):
        pool(2).run(lambda rank, world: rank)
    assert pool(2).run(lambda_) == [0, 1]


def trains(rank, world, name):
    """A step of one of torch's optimizers on a model under FSDP2; the whole weights."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.ReLU(), nn.Linear(12, 4, bias=False))
    before = [p.detach().clone() for p in model.parameters()]
    fully_shard(model, mesh=mesh_of(world), shard_placement_fn=lambda p: Shard(int(p.shape[0] < 8)))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    model(torch.ones(3, 8)).square().sum().backward()
    optimizer.step()
    after = [p.detach().full_tensor() for p in model.parameters()]
    return [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("world", [2, 4])
def test_models_train_under_fsdp2(world, name):
    assert pool(world).run(trains, name) == [[True, True]] * world
