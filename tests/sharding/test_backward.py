"""step_in_backward on shards: the bits of the joint step where nothing is sent, else a refusal."""

import pytest
from helpers.ranks import pool
from helpers.sharded import difference, meshes, whole
from helpers.wrapped import backward, made, net, wrap

from stiefel.optimizers import Muon

ALONE = ["RowNorm", "AdamW", "FRUGAL"]
"""Rules that send nothing where rows are cut: by rows, entry by entry, columns by a seed."""


def build(name, model):
    if name == "AdamW":
        return Muon([{"params": list(model.named_parameters()), "rule": "adamw"}], lr=0.02)
    return made(name, model)


def beside(rank, world, name, kind):
    """Joint steps, and steps in backward of an equal model: differences, counts and norms."""
    runs = []
    for in_backward in (False, True):
        model = net(name)
        mesh = meshes(world)["square"] if kind == "replicas" else meshes(world)["all"]
        wrap(model, world, mesh=mesh, shard_placement_fn=None)
        optimizer = build(name, model)
        handle = optimizer.step_in_backward() if in_backward else None
        norms, freed = [], True
        for step in range(4):
            backward(model, step, rank)
            if handle is None:
                squares = [whole(p.grad).square().sum() for p in model.parameters()]
                norms.append(float(sum(squares).sqrt()))
                optimizer.step()
                optimizer.zero_grad()
            else:
                norms.append(float(handle.grad_norm))
                freed &= all(p.grad is None for p in model.parameters())
        if handle is not None:
            handle.remove()
        state = [
            {k: whole(x) for k, x in optimizer.state.get(p, {}).items()} for p in model.parameters()
        ]
        runs.append(([whole(p) for p in model.parameters()], state, norms, freed))
    (weights, state, norms, _), (others, other_state, other_norms, freed) = runs
    far = max(difference(a, b) for a, b in zip(others, weights, strict=True))
    assert [list(x) for x in state] == [list(x) for x in other_state]
    state_far = max(
        difference(b[k], a[k]) for a, b in zip(state, other_state, strict=True) for k in a
    )
    gap = max(abs(a - b) / a for a, b in zip(norms, other_norms, strict=True))
    return far, state_far, gap, freed


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("world, kind", [(2, "shards"), (4, "replicas")])
def test_steps_in_backward_have_the_bits_of_joint_ones(name, world, kind):
    for far, state_far, gap, freed in pool(world).run(beside, name, kind):
        assert far == state_far == 0.0
        assert gap < 1e-5
        assert freed
