"""State of sharded weights: saved on one number of ranks, loaded and continued on another."""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import same
from helpers.sharded_checkpoints import (
    WAYS,
    Case,
    load,
    on,
    plain_run,
    save_loaded,
)

EVERY = [*METHODS, *PAIRS]
WORLDS = [0, 1, 2, 3, 4]


def check_carried(case, way, worlds, folder, source=2):
    """A checkpoint of one process, loaded on 2 ranks, saved there and loaded on others."""
    weights, state, saved = plain_run(case, case.stop)
    found = on(source, save_loaded, case, way, str(folder), weights, saved)
    assert same(found["state"], state)
    for world in worlds:
        assert same(on(world, load, case, way, str(folder))["state"], state), world


@pytest.mark.parametrize("method", EVERY)
def test_state_of_every_method_is_carried(method, tmp_path):
    check_carried(Case(method), "dcp", [0, 3], tmp_path)
