"""Replicas that share the work: those of sharded weights (HSDP), and plain ones over a group."""

from dataclasses import replace

import pytest
from helpers.methods import METHODS
from helpers.sharded import Case, Piece, check

ODD = [(5, 3), (1, 40), (37, 23), (12, 12), (12, 12)]
LAYS = [(None, 0), (None, 1), (0, None), (None, None), (0, 1)]


def pieces():
    """Weights whose rows or columns are cut along one axis of a mesh, with replicas on the other."""
    return (
        *(Piece(shape, dims, mesh="square") for dims in LAYS for shape in ODD),
        Piece((3, 6, 8), (None, 0), mesh="square"),
        Piece((10,), (None, 0), mesh="square"),
        Piece((6,), None),
    )


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("method", [x for x in METHODS if "kaczmarz" not in x])
def test_replicas_do_what_one_process_does_alone_or_together(method, spread):
    check(Case(method, pieces(), steps=4, options={"spread_replicas": spread}), 4)
