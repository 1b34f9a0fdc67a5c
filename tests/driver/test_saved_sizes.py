"""What is saved alone is small: a file holds the tensors that were saved, and nothing else."""

import copy
import io
import pickle

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat, pair_gradients
from helpers.problems import gradients, run, same, tensors, weight

SHAPE, COUNT, STEPS = (8, 8), 200, 2
PER_TENSOR = 400
"""Bytes that torch.save adds for each tensor, and for the dict around it."""


def saved_size(value, dump=torch.save):
    file = io.BytesIO()
    dump(value, file)
    return file.tell()


def content(value):
    """(bytes, number) of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes, 1
    values = value.values() if isinstance(value, dict) else value
    values = values if isinstance(values, (list, tuple, type({}.values()))) else ()
    sizes = [content(x) for x in values if not isinstance(x, str)]
    return sum(size for size, _ in sizes), sum(count for _, count in sizes)


def stepped(name, count=COUNT, steps=STEPS):
    if name in PAIRS:
        pairs = [factors(8, 8, 2, k) for k in range(count // 2)]
        grads = flat(pair_gradients(8, 8, 2, steps, k) for k in range(count // 2))
        optimizer, params = PAIRS[name](pairs), flat(pairs)
    else:
        params = [weight(SHAPE, k) for k in range(count)]
        grads = [gradients(SHAPE, steps, k % 7) for k in range(count)]
        optimizer = METHODS[name](params)
    run(optimizer, params, grads)
    return optimizer, params


@pytest.mark.covering
@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
@pytest.mark.parametrize("name", [*METHODS, *PAIRS])
def test_the_state_of_one_weight_takes_its_own_bytes(name, dump):
    optimizer, params = stepped(name)
    for alone in (optimizer.state[params[3]], optimizer.state_dict()["state"].get(3, {})):
        for value in (alone, *(x for x in alone.values() if isinstance(x, torch.Tensor))):
            size, count = content(value)
            assert saved_size(value, dump) <= size + 1500 + PER_TENSOR * count
            copied = copy.deepcopy(value)
            assert saved_size(copied, dump) <= size + 1500 + PER_TENSOR * count


@pytest.mark.parametrize("name", [*METHODS, *PAIRS])
def test_the_whole_file_takes_its_content(name):
    optimizer, _ = stepped(name)
    saved = optimizer.state_dict()
    size, count = content(saved["state"])
    per_entry = 100 * len(saved["state"])
    assert saved_size(saved) <= size + PER_TENSOR * count + per_entry + 5000


@pytest.mark.parametrize("name", [*METHODS, *PAIRS])
def test_saved_rows_are_the_live_state_and_load_alone(name):
    optimizer, params = stepped(name, 6)
    live = optimizer.state_dict()["state"]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    now = optimizer.state_dict()["state"]
    for i, entry in now.items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.numel():
                assert live[i][key] is value
        assert same(through_a_file(entry), {**entry})


@pytest.mark.parametrize("name", ["muon", "galore", "frugal-rows", "dctadamw", "adaprelora"])
def test_rows_that_leave_their_slab_are_noticed(name):
    """As where state is sent to another process, which moves each storage to shared memory."""
    (a, params), (b, twins) = stepped(name, 6), stepped(name, 6)
    for step in range(3):
        for entry in a.state.values():
            for value in entry.values():
                if isinstance(value, torch.Tensor) and value.numel():
                    value.share_memory_()
        for optimizer, members in ((a, params), (b, twins)):
            for k, p in enumerate(members):
                p.grad = gradients(p.shape, 1, 50 + k + step)[0]
            optimizer.step()
        assert same(tensors(a), tensors(b))
        assert same([p.detach() for p in params], [p.detach() for p in twins])
