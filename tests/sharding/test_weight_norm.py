"""`weight_norm=` on shards: three sums per matrix, and the weights of one process."""

import pytest
import torch
from helpers.problems import gradients, weight
from helpers.ranks import mesh_of, pool
from helpers.sharded import Case, Piece, check, lay, whole
from torch import nn

from stiefel.optimizers import GaLore, Muon, RowNorm

PIECES = (
    *(Piece((12, 8), 0), Piece((7, 9), 1), Piece((6, 11), 0), Piece((10, 6), None)),
    *(Piece((4, 6, 5), 0), Piece((3, 8, 6), 1), Piece((12, 5), 0, "heads:2")),
)
"""Uneven cuts of both sides, experts that are divided or cut, heads, and a plain weight."""


@pytest.mark.parametrize(
    ("name", "words", "world"),
    [
        *(("muon", words, 2) for words in ("hyperball", "rowfloor:2+pin", "sphere:rows")),
        *(("rownorm", "relative:rows+brake", 2), ("rownorm-columns", "hyperball:whole", 2)),
        *(("frugal-columns", "hyperball", 3), ("galore", "rowfloor:2+pin", 3)),
        *(("fira", "sphere:rows", 2), ("hybrid", "floor:2+brake:whole", 2)),
    ],
)
def test_shards_are_steered_as_whole_weights(name, words, world):
    options = {"weight_norm": words, "weight_decay": 0.1}
    check(Case(name, PIECES, 4, options), world, 2e-5)


def zeros(rank, world, cls, shape, dim, row):
    """What is raised for a zero weight, or a zero matrix, and whether anything has moved."""
    mesh = mesh_of(world)
    draws = [weight((12, 8)).detach(), torch.zeros(shape)]
    if row is not None:
        draws[1] = weight(shape).detach()
        draws[1][row] = 0.0
    params = [nn.Parameter(lay(X, mesh, d)) for X, d in zip(draws, (0, dim), strict=True)]
    optimizer = cls(params, lr=0.1, weight_norm="hyperball")
    for p, shape_of in zip(params, ((12, 8), shape), strict=True):
        p.grad = lay(gradients(shape_of, 1)[0], mesh, *(0 if p is params[0] else dim,))
    try:
        optimizer.step()
    except RuntimeError as error:
        same = [torch.equal(whole(p), X) for p, X in zip(params, draws, strict=True)]
        text = f"{type(error).__name__} {error}"
        for group in optimizer.param_groups:
            group["weight_radius"] = 0.1
        if row is None:
            optimizer.step()
            rms = [float(whole(p).square().mean().sqrt()) for p in params]
            same.append(all(abs(x / 0.1 - 1) < 1e-5 for x in rms))
        return text, same
    return "", []


@pytest.mark.parametrize(
    ("cls", "shape", "dim", "row"),
    [(Muon, (9, 6), 1, None), (RowNorm, (9, 6), 0, None), (GaLore, (4, 6, 5), 0, None),
     (Muon, (4, 6, 5), 0, 3), (RowNorm, (4, 6, 5), 1, 2)],
)  # fmt: skip
def test_a_zero_weight_is_refused_on_all_ranks(cls, shape, dim, row):
    for text, same in pool(2).run(zeros, cls, shape, dim, row):
        assert "RuntimeError" in text or "RankError" in text
        if row is None:
            assert "parameter 1 of shape" in text and "give weight_radius" in text
            assert same == [True] * 3
        else:
            assert "norm is zero" in text or "another rank" in text
