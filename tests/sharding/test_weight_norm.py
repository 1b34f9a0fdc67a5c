"""`weight_norm=` on shards: three sums per matrix, and the weights of one process."""

import pytest
import torch
from helpers.methods import METHODS
from helpers.problems import gradients, weight
from helpers.ranks import mesh_of, pool
from helpers.sharded import Case, Piece, check, lay, whole
from torch import nn

from stiefel.optimizers import GaLore, Muon, RowNorm
from stiefel.optimizers._driver.layout import local

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


def zeros(rank, world, cls, shape, dim, zero, words, view):
    """What is raised for a zero weight, matrix or row, and whether anything has moved."""
    mesh = mesh_of(world)
    draws = [weight((12, 8)).detach(), weight(shape).detach()]
    draws[1][zero] = 0.0
    params = [nn.Parameter(lay(X, mesh, d)) for X, d in zip(draws, (0, dim), strict=True)]
    groups = [{"params": params[:1]}, {"params": params[1:], "view": view}]
    optimizer = cls(groups, lr=0.1, weight_norm=words)
    shapes = (12, 8), shape
    for p, own, d in zip(params, shapes, (0, dim), strict=True):
        p.grad = lay(gradients(own, 1)[0], mesh, d)
    try:
        optimizer.step()
    except RuntimeError as error:
        same = [torch.equal(whole(p), X) for p, X in zip(params, draws, strict=True)]
        same.append(not any(optimizer.state.values()))
        text = f"{type(error).__name__} {error}"
        for group in optimizer.param_groups:
            group["weight_radius"] = 0.1
        optimizer.step()
        rms = [float(whole(p).square().mean().sqrt()) for p in params]
        same.append(all(abs(x / 0.1 - 1) < 1e-5 for x in rms))
        return text, same
    return "", []


ALL = slice(None)


@pytest.mark.parametrize(
    ("cls", "shape", "dim", "zero", "words", "view"),
    [
        *((cls, (9, 6), dim, ALL, "hyperball", "auto") for cls, dim in ((Muon, 1), (RowNorm, 0))),
        (GaLore, (4, 6, 5), 0, ALL, "hyperball", "auto"),
        *((cls, (4, 6, 5), dim, 3, "sphere", "auto")
          for cls in (Muon, RowNorm, GaLore) for dim in (0, 1, 2)),
        *((cls, (7, 6), dim, 3, "sphere:rows", "auto")
          for cls in (Muon, RowNorm) for dim in (0, 1)),
        (Muon, (3, 5, 6), 0, ALL, "sphere:whole", "auto"),
        (RowNorm, (12, 5), 0, slice(4, 8), "sphere", "heads:3"),
        (Muon, (10, 5), 1, slice(6, 10), "sphere", "rows:6,4"),
        (GaLore, (10, 5), 0, slice(6, 10), "sphere:rows", "rows:6,4"),
    ],
)  # fmt: skip
def test_a_zero_norm_is_refused_on_all_ranks_before_anything_moves(
    cls, shape, dim, zero, words, view
):
    for text, same in pool(2).run(zeros, cls, shape, dim, zero, words, view):
        assert "parameter 1 of shape" in text and "give weight_radius" in text
        assert "RuntimeError" in text and same == [True] * 4


def rescaled(rank, world, name, shape, dim, words):
    """Norms of a weight after steps between which it was scaled, and its radius changed."""
    mesh, found = mesh_of(world), []
    for sharded in (True, False):
        p = nn.Parameter(lay(weight(shape).detach(), mesh, dim) if sharded else weight(shape))
        optimizer = METHODS[name]([p], weight_norm=words, weight_radius=0.1)
        for step, G in enumerate(gradients(shape, 5)):
            if step == 2:  # as qk_clip_ does
                with torch.no_grad():
                    p.mul_(0.5)
                local(optimizer.state[p]["weight_radius"]).fill_(-2.0)
            if step == 4:
                optimizer.param_groups[0]["weight_radius"] = 0.3
            p.grad = lay(G, mesh, dim) if sharded else G
            optimizer.step()
            found.append(whole(p) if sharded else p.detach().clone())
    return found[:5], found[5:]


@pytest.mark.parametrize("name", ["muon", "rownorm", "galore", "soap", "apollo"])
def test_a_scaled_shard_keeps_its_norm_until_the_radius_changes(name):
    for words, shape, dim in (("sphere", (4, 6, 5), 0), ("sphere:rows", (9, 6), 1)):
        for ours, one in pool(2).run(rescaled, name, shape, dim, words):
            # the first update of SOAP moves nothing
            rms = [float(x.square().mean().sqrt()) for x in ours[1:]]
            assert rms == pytest.approx([0.1, 0.05, 0.05, 0.3], rel=1e-4)
            for a, b in zip(ours, one, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
