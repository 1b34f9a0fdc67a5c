"""step_in_backward on shards: the bits of the joint step where nothing is sent, else a refusal."""

import pytest
import torch
from helpers.ranks import pool
from helpers.sharded import difference, lay, meshes, whole
from helpers.wrapped import backward, made, net, wrap
from torch import nn

from stiefel.optimizers import Muon

ALONE = ["RowNorm", "AdamW", "FRUGAL"]
"""Rules that send nothing where rows are cut: by rows, entry by entry, columns by a seed."""


def build(name, model):
    if name == "AdamW":
        return Muon([{"params": list(model.named_parameters()), "rule": "adamw"}], lr=0.02)
    return made(name, model)


def spoil(model, rank, world, at):
    """Let the last rank's shard of one gradient be NaN in backward pass ``at``."""
    seen = [0]

    def write(p):
        seen[0] += 1
        if rank == world - 1 and seen[0] == at + 1:
            p.grad.to_local().fill_(float("nan"))

    model.layers[0].up.weight.register_post_accumulate_grad_hook(write)


def beside(rank, world, name, kind, every=1, bad=None):
    """Joint steps, and steps in backward of an equal model: differences, counts and norms."""
    runs, skipped = [], []
    for in_backward in (False, True):
        model = net(name)
        mesh = meshes(world)["square"] if kind == "replicas" else meshes(world)["all"]
        wrap(model, world, mesh=mesh, shard_placement_fn=None)
        optimizer = build(name, model)
        if bad is not None:
            spoil(model, rank, world, bad)
        handle = optimizer.step_in_backward(every) if in_backward else None
        norms, freed = [], True
        for step in range(4):
            for part in range(every):
                backward(model, every * step + part, rank)
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
        skipped.append(dict(optimizer.skipped))
    assert skipped[0] == skipped[1] and bool(skipped[0]) == (bad is not None)
    (weights, state, norms, _), (others, other_state, other_norms, freed) = runs
    far = max(difference(a, b) for a, b in zip(others, weights, strict=True))
    assert [list(x) for x in state] == [list(x) for x in other_state]
    state_far = max(
        difference(b[k], a[k]) for a, b in zip(state, other_state, strict=True) for k in a
    )
    gap = max(abs(a - b) / a for a, b in zip(norms, other_norms, strict=True) if a == a)
    return far, state_far, gap, freed


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("world, kind", [(2, "shards"), (4, "replicas")])
def test_steps_in_backward_have_the_bits_of_joint_ones(name, world, kind):
    for far, state_far, gap, freed in pool(world).run(beside, name, kind):
        assert far == state_far == 0.0
        assert gap < 1e-5
        assert freed


@pytest.mark.parametrize("name", ["RowNorm", "AdamW"])
def test_gradients_accumulate_and_a_bad_shard_is_skipped_on_all_ranks(name):
    for far, state_far, gap, freed in pool(2).run(beside, name, "shards", 2):
        assert far == state_far == 0.0 and gap < 1e-5 and freed
    for far, state_far, gap, freed in pool(2).run(beside, name, "shards", 1, 1):
        assert far == state_far == 0.0 and gap < 1e-5 and freed


def experts(rank, world):
    """Muon on stacks that are cut between experts, whose gradients come one after the other."""
    mesh, ends = meshes(world)["all"], []
    for in_backward in (False, True):
        draw = torch.Generator().manual_seed(0)
        params = [nn.Parameter(lay(torch.randn(4, 5, 3, generator=draw), mesh, 0)) for _ in "ab"]
        optimizer = Muon([(f"layer{i}.experts", p) for i, p in enumerate(params)], lr=0.1)
        handle = optimizer.step_in_backward() if in_backward else None
        for _ in range(3):
            sum((p * p).sum().full_tensor() * (i + 1) for i, p in enumerate(params)).backward()
            if handle is None:
                optimizer.step()
                optimizer.zero_grad()
        ends.append([whole(p) for p in params])
    same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    return same, [row.plan for row in optimizer.assignment()]


def test_experts_step_one_after_the_other():
    for same, plans in pool(2).run(experts):
        assert same
        assert plans == ["local", "local"]


def refused(rank, world, names):
    """What is said of weights whose plan sends something, and whether anything has changed."""
    found = {}
    for name in names:
        model = wrap(net(name), world, shard_placement_fn=None)
        optimizer = made(name, model)
        before = [whole(p) for p in model.parameters()]
        try:
            optimizer.step_in_backward()
        except ValueError as error:
            said = str(error)
        else:
            said = "no error"
        backward(model, 0, rank)
        optimizer.step()  # as ever
        after = [whole(p) for p in model.parameters()]
        found[name] = said, not all(map(torch.equal, before, after))
    return found


def test_what_sends_is_refused_by_name():
    for found in pool(2).run(refused, ["Muon", "GaLore", "ARO", "AuON", "AltLoRA"]):
        for name, (said, moved) in found.items():
            assert "is sharded" in said and "layers.0" in said, (name, said)
            assert "call step()" in said
            assert moved
