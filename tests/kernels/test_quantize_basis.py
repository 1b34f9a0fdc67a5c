"""Bases in 8 bits: how orthonormal they stay."""

import pytest
import torch
from helpers.problems import same

from stiefel.kernels import basis_scales, dequantize_basis, quantize_basis
from stiefel.kernels import quantize_basis as function
from stiefel.optimizers._toolkit.projectors import StackRNG, make_projector

MODULE = __import__(function.__module__, fromlist=["_PANEL"])
LOSS = 0.02


def coded(P):
    codes = torch.zeros(P.shape, dtype=torch.int8)
    scales = torch.zeros(basis_scales(tuple(P.shape)))
    quantize_basis(P, codes, scales)
    return codes, scales


def stored(P, dtype=torch.float32):
    return dequantize_basis(*coded(P), dtype)


def loss(P):
    """max |P^T P - I| in float64."""
    P = P.double()
    return float((P.mT @ P - torch.eye(P.shape[-1], dtype=P.dtype)).abs().max())


def orthonormal(X):
    return torch.linalg.qr(X)[0]


def found_by_svd(G, r):
    projector = make_projector("svd")
    old = torch.zeros(1, G.shape[0], r)
    return projector.find(G[None], old, rng=StackRNG(0, (0,), 1))[0][0]


def from_rank_one(m, r, g):
    u = torch.randn(m, 1, generator=g)
    u[0] = 20.0
    return found_by_svd(u @ torch.randn(1, 2 * r, generator=g), r)


def from_few_rows(m, r, g):
    G = torch.zeros(m, 2 * r)
    G[:: max(1, m // r)] = torch.randn(G[:: max(1, m // r)].shape, generator=g)
    return found_by_svd(G, r)


def cosines(m, r, g):
    i, j = torch.arange(m).double()[:, None], torch.arange(r).double()[None]
    C = torch.cos(torch.pi / m * (i + 0.5) * j) * (2 / m) ** 0.5
    C[:, 0] /= 2**0.5
    return C.float()


def sparse(m, r, g):
    X = torch.randn(m, r, generator=g) * (torch.rand(m, r, generator=g) < 0.05)
    X[torch.arange(r), torch.arange(r)] += 0.1
    return orthonormal(X)


BASES = {
    "random": lambda m, r, g: orthonormal(torch.randn(m, r, generator=g)),
    "identity": lambda m, r, g: torch.eye(m, r),
    "nearly-identity": lambda m, r, g: orthonormal(
        torch.eye(m, r) + torch.randn(m, r, generator=g) / m**0.5
    ),
    "large-rows": lambda m, r, g: orthonormal(
        torch.randn(m, r, generator=g) * 10 ** torch.randn(m, 1, generator=g)
    ),
    "cosines": cosines,
    "sparse": sparse,
    "rank-one": from_rank_one,
    "few-rows": from_few_rows,
}


@pytest.mark.parametrize("m", [64, 255, 256, 257, 1024, 4096])
@pytest.mark.parametrize("kind", BASES)
def test_a_basis_stays_nearly_orthonormal(kind, m):
    """max |P^T P - I| is 0.004 for random bases and below 0.01 for all of these."""
    for r in (4, 32, 256):
        if r <= m:
            P = BASES[kind](m, r, torch.Generator().manual_seed(m + r))
            assert loss(P) < 1e-5
            Q = stored(P)
            assert loss(Q) < LOSS / 2
            assert float((Q.norm(dim=0) - 1).abs().max()) < 1e-5
            assert float((Q - P).norm()) < 0.03 * float(P.norm())


@pytest.mark.parametrize("m", [64, 200, 256, 600])
def test_one_large_entry_beside_equal_ones_is_the_worst_and_stays_below_the_limit(m):
    """Errors of equal entries are alike, so they add up."""
    g = torch.Generator().manual_seed(m)
    for size in torch.logspace(0, 2.3, 40):
        w = torch.ones(m, 1)
        w[0] = size
        d = w / w.norm() - torch.eye(m)[:, :1]
        mirror = torch.eye(m) - 2 * d @ d.mT / (d.norm() ** 2)
        assert loss(stored(mirror[:, :16].contiguous())) < LOSS
        X = torch.randn(m, 16, generator=g).sign()
        X[torch.arange(16), torch.arange(16)] += size
        assert loss(stored(orthonormal(X))) < LOSS


@pytest.mark.parametrize("shape", [(64, 30), (300, 5), (1, 1), (3, 600, 7), (2, 2, 257, 4)])
def test_codes_are_the_nearest_and_their_squares(shape):
    """Against all 255 levels in float64, before norms are put right."""
    P = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    P = P / P.norm(dim=-2, keepdim=True)
    codes, scales = coded(P)
    levels = torch.arange(-127, 128).double()
    levels = levels * levels.abs() / 127**2
    for i in range(0, shape[-2], 256):
        part = P[..., i : i + 256, :].double()
        ratio = part / part.abs().amax(-2, keepdim=True)
        nearest = (ratio.unsqueeze(-1) - levels).abs().argmin(-1) - 127
        assert same(codes[..., i : i + 256, :], nearest.to(torch.int8))
    assert scales.shape == (*shape[:-2], -(-shape[-2] // 256), shape[-1])
    torch.testing.assert_close(stored(P).norm(dim=-2), P.norm(dim=-2), rtol=1e-5, atol=0)


def test_to_store_again_changes_no_code():
    P = BASES["large-rows"](600, 40, torch.Generator().manual_seed(0))
    codes, scales = coded(P)
    again, scales_again = coded(dequantize_basis(codes, scales))
    assert same(again, codes)
    torch.testing.assert_close(scales_again, scales, rtol=1e-5, atol=0)


def test_zeros_stay_zeros_and_norms_are_kept_whatever_they_are():
    P = torch.zeros(300, 3)
    assert same(stored(P), P)
    P[:, 1] = torch.linspace(-3, 5, 300)
    Q = stored(P)
    assert not Q[:, 0].any() and not Q[:, 2].any()
    torch.testing.assert_close(Q[:, 1].norm(), P[:, 1].norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 300, 4), (2, 300, 0)])
def test_nothing_is_stored_of_nothing(shape):
    assert stored(torch.zeros(shape)).shape == shape


def test_layout_and_panels_and_stacks_do_not_show(monkeypatch):
    P = torch.stack([BASES["random"](700, 20, torch.Generator().manual_seed(i)) for i in (0, 1)])
    whole = coded(P)
    assert same(whole, coded(P.mT.contiguous().mT))
    for k in range(2):
        assert same([X[k] for X in whole], list(coded(P[k])))
    decoded = dequantize_basis(*whole)
    monkeypatch.setattr(MODULE, "_PANEL", 256)
    panels = coded(P)
    assert same(panels[0], whole[0])
    torch.testing.assert_close(panels[1], whole[1], rtol=1e-5, atol=0)
    assert same(dequantize_basis(*whole), decoded)


def test_doubles():
    P = BASES["random"](300, 20, torch.Generator().manual_seed(0)).double()
    Q = stored(P, torch.float64)
    assert Q.dtype == torch.float64 and loss(Q) < LOSS
    assert same(Q.float(), stored(P.float()))
