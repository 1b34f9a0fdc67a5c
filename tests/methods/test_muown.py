"""Muown: recorded steps, its oracle, its state, and rows that other code has written."""

import pytest
import torch
from helpers.problems import gaussian, gradients, run, weight
from helpers.recordings import fixture, tolerance
from torch import nn

from stiefel.optimizers import Muown

SHAPES = [(9, 6), (6, 9), (3, 4, 5)]


@pytest.mark.parametrize("shape", ["square", "tall", "wide"])
def test_recorded_trajectories(shape):
    data = fixture(f"muown-{shape}")
    settings = dict(data["settings"]["optimizer"])
    settings["norm_eps"] = settings.pop("adam_eps")
    settings["norm_betas"] = tuple(settings.pop("betas"))
    p = nn.Parameter(data["W0"].clone())
    optimizer = Muown([p], polar="svd", **settings)
    found = torch.stack([W for (W,) in run(optimizer, [p], [data["grads"]])])
    limit = tolerance(data, "max_abs_diff_to_float64_run")
    assert float((found - data["W"]).abs().max()) <= limit
    final, names = data["final_state"], {"g": "row_norm", "v_norm": "direction_norm"}
    names |= {"momentum_buffer": "momentum_buffer", "m_g": "exp_avg", "v_g": "exp_avg_sq"}
    for theirs, ours in names.items():
        expected = torch.tensor(final[theirs], dtype=torch.float32)
        state = optimizer.state[p][ours]
        assert float((state - expected.view(state.shape)).abs().max()) <= 10 * limit, theirs


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def oracle(W, grads, lr, decay=0.0, cautious=False, mu=0.95, b1=0.9, b2=0.95, eps=1e-8):
    """The box of the class, in float64, of a matrix or a stack."""
    g = v_norm = W.norm(dim=-1, keepdim=True)
    v, B, m, s, out = W.clone(), torch.zeros_like(W), 0.0, 0.0, []
    for t, G in enumerate(grads, 1):
        R = v / v_norm
        along = (G * R).sum(-1, keepdim=True)
        B = mu * B + (1 - mu) * (g / v_norm) * (G - R * along)
        v = v - lr * 0.2 * max(W.shape[-2:]) ** 0.5 * polar(B)
        m, s = b1 * m + (1 - b1) * along, b2 * s + (1 - b2) * along**2
        change = m / (1 - b1**t) / ((s / (1 - b2**t)).sqrt() + eps)
        keep = torch.full_like(g, 1 - lr * decay)
        keep = torch.where(change * g >= 0, keep, 1.0) if cautious else keep
        g = (g - lr * change) * keep
        v_norm = v.norm(dim=-1, keepdim=True)
        out.append(g * v / v_norm)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cautious", [False, True])
def test_steps_are_those_of_the_box(shape, cautious):
    W = gaussian(*shape, dtype=torch.float64)
    grads = [gaussian(*shape, seed=i + 1, dtype=torch.float64) for i in range(5)]
    p = nn.Parameter(W.clone())
    optimizer = Muown([p], 0.05, weight_decay=0.3, polar="svd", cautious=cautious)
    found = run(optimizer, [p], [grads])
    for (a,), b in zip(found, oracle(W, grads, 0.05, 0.3, cautious), strict=True):
        assert float((a - b).abs().max()) < 1e-12


def test_stacks_groups_and_memory_formats():
    """Weights of one stack with learning rates of their own, and one stored by columns."""
    params = [weight((8, 6), i) for i in range(3)]
    params[2].data = params[2].data.mT.contiguous().mT
    alone = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.01, 0.05, 0.02), strict=True)]
    series = [gradients((8, 6), 4, i) for i in range(3)]
    run(Muown(groups, weight_decay=0.1), params, series)
    for p, q, lr, grads in zip(params, alone, (0.01, 0.05, 0.02), series, strict=True):
        run(Muown([q], lr, weight_decay=0.1), [q], [grads])
        assert float((p - q).detach().abs().max()) < 1e-6


def test_rows_that_other_code_has_written_start_from_their_norms():
    p = weight((8, 6))
    optimizer = Muown([p], 0.01)
    grads = gradients((8, 6), 4)
    run(optimizer, [p], [grads[:2]])
    with torch.no_grad():
        p[3] *= 0.25
    norms = p.detach().norm(dim=1, keepdim=True)
    run(optimizer, [p], [grads[2:3]])
    assert float((optimizer.state[p]["row_norm"] - norms).abs().max()) < 0.02


def test_zero_rows_and_bad_gradients():
    p = weight((8, 6))
    p.data[2] = 0.0
    optimizer = Muown([p], 0.01)
    run(optimizer, [p], [gradients((8, 6), 5)])
    assert bool(p.isfinite().all()) and bool(p.detach()[2].any())
    before = p.detach().clone(), {k: x for k, x in optimizer.state[p].items()}
    for wait in (True, False):
        optimizer._wait = wait
        state = {k: x.clone() for k, x in before[1].items() if isinstance(x, torch.Tensor)}
        p.grad = torch.full((8, 6), torch.inf)
        optimizer.step()
        assert sum(optimizer.skipped.values()) >= 1 and torch.equal(p.detach(), before[0])
        assert all(torch.equal(x, optimizer.state[p][k]) for k, x in state.items())


def test_norms_have_no_second_master():
    with pytest.raises(ValueError, match="keeps norms of rows itself; leave weight_norm out"):
        Muown([weight((8, 6))], weight_norm="sphere")
