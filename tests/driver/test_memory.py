"""What a step allocates, and what stays: docstrings' bounds, the papers' formulas of state."""

import pytest
import torch
from helpers.allocations import count_step
from helpers.problems import gradients, weight

from stiefel.kernels import POLAR_METHODS
from stiefel.optimizers import Fira, GaLore, Muon, SwitchLoRA, pairs_to_groups
from stiefel.optimizers._driver.write import WRITE_PANEL
from stiefel.optimizers._toolkit.projectors import PROJECTION_KINDS

WIDE, TALL = (256, 1024), (1024, 256)
MATRIX = 256 * 1024 * 4


def peak(optimizer, params, warm=1):
    """Live bytes of new storages at their peak in one step, after `warm` steps."""
    for step in range(warm + 1):
        for k, p in enumerate(params):
            p.grad = gradients(tuple(p.shape), 1, step + k, p.dtype)[0]
        if step == warm:
            break
        optimizer.step()
    counter = count_step(optimizer)
    return counter.peak


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_galore_needs_two_buffers_and_panels(shape, decay):
    """r x n buffers and panels only, both ways, however many weights there are."""
    params = [weight(shape, k) for k in range(3)]
    optimizer = GaLore(params, rank=64, weight_decay=decay)
    buffers = 2 * 64 * 1024 * 4
    assert peak(optimizer, params) <= buffers + WRITE_PANEL * 4


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_galore_refresh_makes_no_copy_of_the_gradient(shape):
    p = weight(shape)
    optimizer = GaLore([p], rank=64, update_proj_gap=1)
    gram = 256 * 256 * 4
    assert peak(optimizer, [p]) <= 6 * gram + 2 * 64 * 1024 * 4 + 2**20 * 4 // 2


PANELS = {"svd": 2, "svd_full": 0, "range": 4, "power": 2, "topk": 2, "dct": 5}
"""Panels of 2^20 elements that a refresh takes at once."""


@pytest.mark.parametrize("cls", [GaLore, Fira])
@pytest.mark.parametrize("kind", PROJECTION_KINDS)
@pytest.mark.parametrize("shape", [(256, 8192), (8192, 256), (1024, 1024)])
def test_a_refresh_takes_what_the_docstring_says(kind, shape, cls):
    r, (m, n) = 16, sorted(shape)
    p = weight(shape)
    optimizer = cls([p], rank=r, projection=kind, update_proj_gap=1)
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    bound = PANELS.get(kind, 0) * 2**20 + m * m * (kind == "svd")
    bound += (m * n + m * m) * (kind == "svd_full")
    assert count_step(optimizer).peak <= 4 * (bound + 8 * r * n + 2 * WRITE_PANEL) * 1.02


@pytest.mark.parametrize("cls", [GaLore, Fira])
def test_eigenvectors_take_the_place_of_the_gram_matrix(cls, monkeypatch):
    """With small panels little else is there: a second square would be seen."""
    monkeypatch.setattr("stiefel.optimizers._toolkit.svd._GRAM_PANEL", 2**14)
    m, r = 512, 8
    p = weight((m, m))
    optimizer = cls([p], rank=r, update_proj_gap=1)
    p.grad = torch.randn(m, m, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    monkeypatch.setattr("stiefel.optimizers._driver.write.WRITE_PANEL", 2**14)
    assert count_step(optimizer).peak <= 1.9 * 4 * m * m


def test_switchlora_draws_its_pools_in_panels():
    """The first step takes four factors beside its state, as any other, not copies of the pools."""
    m, n, r = 512, 1024, 32
    W0 = weight((m, n), 3).requires_grad_(False)
    A, B = weight((r, n)), weight((m, r), 1)
    groups = pairs_to_groups([(A, B, W0)], scale=0.5)
    optimizer = SwitchLoRA(groups, interval0=4, freeze_steps=1, ratio=None)
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    counter = count_step(optimizer)
    assert counter.peak - counter.live <= 4 * r * n * 4


@pytest.mark.parametrize("polar", ["auto", *POLAR_METHODS])
@pytest.mark.parametrize("shape", [WIDE, TALL, (512, 512)])
def test_muon_needs_five_matrices_at_most(shape, polar):
    params = [weight(shape, k) for k in range(3)]
    bound = 5 if polar != "qdwh" else 8  # a QR of two stacked matrices, as its docstring says
    size, vectors = shape[0] * shape[1] * 4, 8 * sum(shape) * 4  # norms, singular values
    assert peak(Muon(params, polar=polar), params) <= bound * size + vectors


# the polar factor of small matrices has 15 of them at most, in batches of 3 * 2**16 entries
@pytest.mark.parametrize(("make", "most"), [(Muon, 15), (lambda ps: GaLore(ps, rank=16), 9)])
def test_stacks_stay_within_their_budget(make, most, monkeypatch):
    from stiefel.optimizers._driver import buckets

    params = [weight((64, 64), k) for k in range(64)]
    one = 64 * 64 * 4
    monkeypatch.setitem(buckets.MAX_STACK_BYTES, "cpu", 8 * one)
    optimizer = make(params)
    assert peak(optimizer, params) <= most * 8 * one
    assert max(len(bucket.units) for bucket in optimizer._plan.buckets) == 8


def test_bfloat16_weights_add_one_float32_gradient():
    p = weight(WIDE, dtype=torch.bfloat16)
    optimizer = GaLore([p], rank=64)
    assert peak(optimizer, [p]) <= MATRIX + 2 * 64 * 1024 * 4 + 3 * WRITE_PANEL * 4


def test_adamw_parameters_allocate_what_torch_does():
    p, q = weight(WIDE), weight(WIDE)
    ours = peak(Muon([{"params": [p], "rule": "adamw"}]), [p])
    assert ours <= peak(torch.optim.AdamW([q]), [q]) + 4096


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_state_bytes_equal_the_formulas(shape):
    p, q = weight(shape), weight(shape)
    muon, galore = Muon([p]), GaLore([q], rank=32)
    for optimizer in (muon, galore):
        optimizer.init_state()

    def held(optimizer, p):
        values = optimizer.state[p].values()
        return sum(x.untyped_storage().nbytes() for x in values if isinstance(x, torch.Tensor))

    assert held(muon, p) == MATRIX
    assert held(galore, q) == 4 * 32 * (256 + 2 * 1024)
