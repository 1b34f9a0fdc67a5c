"""Rules on shards: two or three simulated ranks take the steps of one process.

One process is the optimizer itself on the whole weights. The shards are uneven, and the gradient of
one of them is ordinary or 1e-16 of the others': a sum in which each shard has a scale of its own,
or a count of local entries, is far off there.
"""

import math

import pytest
import torch
from helpers.simulated_ranks import (
    MissingRanks,
    ShardReductions,
    SimulatedRanks,
    UnequalMatrices,
    error,
    steps_of_one_process,
)

from stiefel.optimizers import Dense, Rule, Slot
from stiefel.optimizers._core.rule import RULE_CLASSES, Reductions
from stiefel.optimizers._toolkit.moments import safe_square_scale
from stiefel.optimizers.apollo import APOLLORule
from stiefel.optimizers.aro import ARORule
from stiefel.optimizers.auon import AuONRule
from stiefel.optimizers.dctadamw import DCTAdamWRule
from stiefel.optimizers.fira import FiraRule
from stiefel.optimizers.frugal import FRUGALRule
from stiefel.optimizers.galore import GaLoreRule
from stiefel.optimizers.hybrid import HybridRule
from stiefel.optimizers.muon import MuonRule
from stiefel.optimizers.rownorm import RowNormRule
from stiefel.optimizers.sinkgd import SinkGDRule
from stiefel.optimizers.soap import SOAPMuonRule, SOAPRule
from stiefel.optimizers.spectral import SpectralRule
from stiefel.optimizers.trion import TrionRule

FULL, ONE, FROM = "on_full_matrix", "on_one_rank", "from_full_matrix"
GUARDS = {"rows": {"most", "both", FULL}, "cols": {"most", "both", FULL}}
LOW_RANK = {"rank": 2, "update_proj_gap": 2}

CASES = {
    "rownorm": (RowNormRule(), {"rows": set(), "cols": {"cols"}}),
    "rownorm of columns": (
        RowNormRule(axis="cols"),
        {"rows": set(), "cols": {"cols"}},
    ),
    "rownorm, given eps": (RowNormRule(eps=1e-8), {"rows": set(), "cols": {"cols"}}),
    "rownorm, relative": (
        RowNormRule(row_mode="relative"),
        {"rows": {"rows"}, "cols": {"cols"}},
    ),
    "rownorm, centred": (
        RowNormRule(centred=True),
        {"rows": {"rows"}, "cols": {"cols"}},
    ),
    "rownorm, centred, relative": (
        RowNormRule(centred=True, row_mode="relative"),
        {"rows": {"rows"}, "cols": {"cols"}},
    ),
    "spectral": (SpectralRule(), {"rows": {"rows", FULL}, "cols": {"cols", FULL}}),
    "spectral, published scale": (
        SpectralRule(adjust_lr_fn="none", alpha=1.0),
        {"rows": {"both", FULL}, "cols": {"both", FULL}},
    ),
    "spectral, centred": (
        SpectralRule(centred=True),
        {"rows": {"rows", FULL}, "cols": {"cols", FULL}},
    ),
    "hybrid": (
        HybridRule(),
        {"rows": {"most", "rows", FULL}, "cols": {"most", "cols", FULL}},
    ),
    "hybrid, centred": (
        HybridRule(centred=True),
        {"rows": {"most", "rows", FULL}, "cols": {"most", "cols", FULL}},
    ),
    "hybrid of columns, polar first, centred": (
        HybridRule(axis="cols", order="polar_then_row", centred=True, row_mode="relative"),
        {"rows": {"most", "rows", FULL}, "cols": {"most", "cols", FULL}},
    ),
    "auon": (AuONRule(), {"rows": {"both"}, "cols": {"both"}}),
    "auon, repo2026": (
        AuONRule(variant="repo2026", nesterov=False),
        {"rows": {"both"}, "cols": {"both"}},
    ),
    "auon, hybrid": (AuONRule(ns_steps=1), {"rows": {"both", FULL}, "cols": {"both", FULL}}),
    "auon, hybrid, no scale": (
        AuONRule(ns_steps=1, adjust_lr_fn="none"),
        {"rows": {"both", FULL}, "cols": {"both", FULL}},
    ),
    "auon, hybrid, repo2026": (
        AuONRule(ns_steps=1, variant="repo2026"),
        {"rows": {"both", FULL}, "cols": {"both", FULL}},
    ),
    "muon": (MuonRule(), {"rows": {FULL}, "cols": {FULL}}),
    "muon, low rank": (
        MuonRule(polar="low_rank", rank=1, oversample=1),
        {"rows": {FULL}, "cols": {FULL}},
    ),
    "normuon": (
        MuonRule(second_moment="normuon"),
        {"rows": {"rows", FULL}, "cols": {"cols", FULL}},
    ),
    "adamuon": (
        MuonRule(second_moment="adamuon"),
        {"rows": {"both", FULL}, "cols": {"both", FULL}},
    ),
    "muon, clip_grad_rms": (MuonRule(clip_grad_rms=0.01), GUARDS),
    "muon, spike_ratio": (MuonRule(spike_ratio=1.05), GUARDS),
    "muon, normalize_grad": (MuonRule(normalize_grad=True), GUARDS),
    "aro": (ARORule(), {"cols": {"most", "cols", "both", FULL, ONE}}),
    "aro, adam": (
        ARORule(base="adam", rotation="polar", rms_target=None),
        {"cols": {"most", "cols", ONE}},
    ),
    "aro, svd": (ARORule(init="svd"), {"cols": {"most", "cols", "both", FULL, ONE, FROM}}),
    "soap, short": (
        SOAPRule(precondition_sides="short", precondition_frequency=2),
        {"cols": {"most", "cols", ONE}},
    ),
    "soap, short, rotate, normalized": (
        SOAPRule(
            precondition_sides="short",
            precondition_frequency=2,
            basis="eigh",
            moments="rotate",
            normalize_update=True,
        ),
        {"cols": {"most", "cols", "both", ONE}},
    ),
    "soapmuon, short": (
        SOAPMuonRule(precondition_sides="short", eps=1e-3),
        {"cols": {"most", "cols", FULL, ONE}},
    ),
    "galore": (GaLoreRule(**LOW_RANK), {"cols": {FROM}}),
    "galore, rotate": (GaLoreRule(**LOW_RANK, moments="rotate"), {"cols": {FROM}}),
    "galore, dct": (GaLoreRule(**LOW_RANK, projection="dct"), {"cols": {"most", "cols"}}),
    "galore, randk": (
        GaLoreRule(**LOW_RANK, projection="randk", moments="match"),
        {"cols": set()},
    ),
    "galore, adafactor": (
        GaLoreRule(**LOW_RANK, inner="adafactor"),
        {"cols": {"cols", "most", FROM}},
    ),
    "galore, lion, topk": (
        GaLoreRule(**LOW_RANK, inner="lion", projection="topk", moments="match"),
        {"cols": {"most", "cols"}},
    ),
    "fira": (FiraRule(**LOW_RANK), {"cols": {"cols", FROM}}),
    "fira, matrix": (
        FiraRule(**LOW_RANK, scaling="matrix", variant="paper"),
        {"cols": {"cols", FROM}},
    ),
    "apollo": (APOLLORule(**LOW_RANK), {"cols": {"cols", ONE}}),
    "apollo, mini": (
        APOLLORule(update_proj_gap=2, rank=1, scaling="tensor", projection="gaussian"),
        {"cols": {"cols"}},
    ),
    "apollo, svd": (APOLLORule(**LOW_RANK, projection="svd"), {"cols": {"cols", FROM}}),
    "sinkgd": (SinkGDRule(), {"rows": {FULL}, "cols": {FULL}}),
    "frugal, columns": (FRUGALRule(density=0.4, update_gap=2), {"rows": set()}),
    "frugal, columns, threshold": (
        FRUGALRule(density=0.4, update_gap=2, sign_threshold=0.5),
        {"rows": {"both"}},
    ),
    "frugal, blocks": (FRUGALRule(density=1.0, split="block"), {"rows": set(), "cols": set()}),
    "frugal, random, sgd": (
        FRUGALRule(density=0.5, update_gap=2, split="random", state_free="sgd", inner="lion"),
        {"cols": {ONE}},
    ),
    "frugal, rows": (FRUGALRule(density=0.4, update_gap=2, split="rows"), {"cols": set()}),
    "frugal, svd": (FRUGALRule(density=0.3, update_gap=2, split="svd"), {"cols": {"both", FROM}}),
    "dctadamw": (DCTAdamWRule(rank=3, update_proj_gap=2), {"cols": {"most", "cols"}}),
    "dctadamw, l2, every step": (DCTAdamWRule(rank=3, norm="l2"), {"cols": {"most", "cols"}}),
    "dctadamw, error feedback": (
        DCTAdamWRule(rank=3, update_proj_gap=2, error_feedback="full"),
        {"cols": {"most", "cols"}},
    ),
    "trion": (TrionRule(rank=3), {"cols": {"most", "cols", FULL}}),
    "trion, l2, dct3": (
        TrionRule(rank=0.5, norm="l2", basis="dct3", polar="auto"),
        {"cols": {"most", "cols", FULL}},
    ),
}
"""Rule, and per side that may be split the reductions that then need other ranks."""

RUNS = [
    pytest.param(name, split, id=f"{name}-{split}") for name, (_, calls) in CASES.items()
    for split in calls
]  # fmt: skip
AT_EXTREMES = {"frugal, columns, threshold": {"most"}, "frugal, svd": {"most"}}
"""What a rule calls only where reduced squares leave the range of their dtype."""
SAME_ANYWAY = {rule: {ONE} for rule in (ARORule, APOLLORule, FRUGALRule, SOAPRule, SOAPMuonRule)}
"""Equal small matrices have equal results on all ranks of one machine, if not of several."""
GUARDS_ONLY = {
    ("fira", "cols", "cols"): {0, 1, 2, 4},
    ("fira, matrix", "cols", "cols"): {2, 4},
    ("apollo", "cols", "cols"): {0},
    ("apollo, svd", "cols", "cols"): {0},
    ("galore, adafactor", "cols", "most"): {0},
    ("hybrid", "rows", "most"): {0},
    ("hybrid, centred", "rows", "most"): {0},
    ("hybrid of columns, polar first, centred", "rows", "most"): {0},
}
"""Calls that decide only for columns that the basis misses, for residuals of round-off, for steps
whose squares leave their range, for the scale of whole rows, which each are normalized, and for
that of a centred polar factor, which is near 1."""
K, M, N, STEPS = 2, 7, 11, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
"""Relative to the largest number of a shard; polar factors of centred matrices are the worst."""


PARTS = {
    2: {7: [5, 2], 11: [9, 2]},
    3: {7: [2, 2, 3], 11: [6, 2, 3]},
    4: {7: [3, 1, 3, 0], 11: [4, 3, 4, 0]},
    5: {7: [2, 1, 2, 0, 2], 11: [3, 2, 3, 0, 3]},
    7: {7: [1] * 7, 11: [2, 2, 2, 2, 2, 1, 0]},
}
"""Parts of a side of this length over so many ranks, of which some have nothing."""
RANKS = [
    pytest.param(2, torch.float64, 1.0),
    pytest.param(3, torch.float32, 1e-16),
    pytest.param(4, torch.float64, 1e-16),
    pytest.param(5, torch.float32, 0.0),
    pytest.param(7, torch.float32, 1e16),
]
"""How many, the dtype, and what the gradient of the second of them is multiplied by."""


def shares_of(rule, split, ranks):
    """Uneven parts of the side that is split, as the rule sees it."""
    m, n = (N, M) if rule.transpose(M, N) else (M, N)
    return PARTS[ranks][m if split == "rows" else n]


def gradients(rule, split, shares, scale, dtype):
    """Whole gradients (K, M, N) of all steps; those of the second shard are scaled."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        G = torch.randn(K, M, N, generator=generator, dtype=torch.float64)
        shards = (G.mT if rule.transpose(M, N) else G).split(shares, -2 if split == "rows" else -1)
        shards[1].mul_(scale)
        yield G.to(dtype)


def on_ranks(rule, split, shares, grads, dtype, broken=None):
    """The same on ranks, and the ranks."""
    ranks = SimulatedRanks(
        rule,
        torch.zeros(K, M, N, dtype=dtype),
        split,
        shares,
        lr=0.1,
        weight_decay=0.1,
        broken=broken,
    )
    weights = []
    for grad in grads:
        ranks.step(grad)
        weights.append(ranks.whole_weights().clone())
    return weights, ranks


def largest_error(rule, split, shares, found, expected):
    """Over all steps and shards, each relative to itself, or to the whole where it is nothing."""

    def shards(W):
        return (W.mT if rule.transpose(M, N) else W).split(shares, -2 if split == "rows" else -1)

    largest = 0.0
    for W, V in zip(found, expected, strict=True):
        for X, Y in zip(shards(W), shards(V), strict=True):
            if Y.numel() and float(Y.abs().max()) > 1e-12 * float(V.abs().max()):
                largest = max(largest, error(X, Y))
        largest = max(largest, error(W, V))
    return largest


@pytest.mark.parametrize(("count", "dtype", "scale"), RANKS)
@pytest.mark.parametrize(("name", "split"), RUNS)
def test_ranks_take_the_steps_of_one_process(name, split, count, scale, dtype):
    rule, calls = CASES[name]
    shares = shares_of(rule, split, count)
    grads = list(gradients(rule, split, shares, scale, dtype))
    expected, optimizer = steps_of_one_process(rule, grads)
    found, ranks = on_ranks(rule, split, shares, grads, dtype)
    assert largest_error(rule, split, shares, found, expected) <= TOLERANCE[dtype]
    more = set(ranks.calls) - calls[split]
    assert set(ranks.calls) >= calls[split] and more <= AT_EXTREMES.get(name, set())
    state = ranks.whole_state()
    assert state.keys() == ranks.slots.keys()
    for key, X in state.items():
        stored = torch.stack([entry[key] for entry in optimizer.state.values()])
        stored = stored.mT if ranks.slots[key].axes == "mn" and ranks.transposed else stored
        if X.dtype.is_floating_point:
            assert X.dtype == stored.dtype and error(X, stored) <= TOLERANCE[dtype], key
        else:
            assert torch.equal(X, stored), key


def error_without(rule, split, broken):
    """The largest error in float32 if one call of each step does nothing."""
    shares, largest = shares_of(rule, split, 2), 0.0
    for scale in (1.0, 1e-16):
        grads = list(gradients(rule, split, shares, scale, torch.float32))
        expected, _ = steps_of_one_process(rule, grads)
        try:
            found, _ = on_ranks(rule, split, shares, grads, torch.float32, broken)
        except (UnequalMatrices, MissingRanks):  # ranks with sums of their own part ways
            return math.inf
        largest = max(largest, largest_error(rule, split, shares, found, expected))
    return largest


@pytest.mark.parametrize(("name", "split"), RUNS)
def test_a_rule_needs_every_reduction_that_it_calls(name, split):
    rule, calls = CASES[name]
    shares = shares_of(rule, split, 2)
    grads = list(gradients(rule, split, shares, 1.0, torch.float32))
    _, ranks = on_ranks(rule, split, shares, grads, torch.float32)
    for method in sorted(calls[split] - SAME_ANYWAY.get(type(rule), set())):
        guards = GUARDS_ONLY.get((name, split, method), set())
        assert guards <= set(range(ranks.calls[method]))
        for number in sorted(set(range(ranks.calls[method])) - guards):
            found = error_without(rule, split, (method, number))
            assert found > 1e-3, f"the result is the same without call {number} of {method}"


def test_shards_scale_by_the_largest_entry_of_all():
    small, ordinary = torch.full((1, 2, 2), 1e-16), torch.ones(1, 2, 2)
    assert safe_square_scale(small) == 2.0**96

    class Largest(Reductions):
        def most(self, x):
            return torch.maximum(x, ordinary.amax((-2, -1), keepdim=True))

    assert safe_square_scale(small, Largest()) == 1.0


def test_every_reduction_is_the_identity_on_one_process():
    x = torch.tensor([1.0, -2.0])
    one = Reductions()
    assert all(getattr(one, name)(x) is x for name in ("rows", "cols", "both", "most"))
    assert one.on_full_matrix(torch.neg, x).tolist() == [-1.0, 2.0]
    assert one.on_full_matrix(torch.maximum, x, -x).tolist() == [1.0, 2.0]
    assert one.on_one_rank(torch.maximum, x, -x).tolist() == [1.0, 2.0]
    assert one.from_full_matrix(torch.maximum, x, -x).tolist() == [1.0, 2.0]


def test_the_ranks_simulate_every_reduction():
    def public(cls):
        return {name for name, x in vars(cls).items() if callable(x) and not name.startswith("_")}

    assert public(ShardReductions) == public(Reductions)


@pytest.fixture
def lost_rank():
    """A rule in which the rank with the larger shard does what it is told, others do not."""

    class LostRankRule(Rule, abstract=True):
        behave: object = None

        def state(self, m, n):
            return {"momentum_buffer": Slot("mn")}

        def update(self, w):
            LostRankRule.behave(w, w.grad.shape[-2] > 2)
            return w.step(Dense(w.grad))

    assert "LostRank" not in RULE_CLASSES
    return LostRankRule


@pytest.mark.parametrize(
    ("behave", "error_type", "text"),
    [
        (lambda w, large: w.reductions.both(w.grad.sum()) if large else None,
         AssertionError, r"only ranks \[0\] ask"),
        (lambda w, large: getattr(w.reductions, "both" if large else "most")(w.grad.sum()),
         AssertionError, "different things"),
        (lambda w, large: w.reductions.both(w.grad),
         AssertionError, "different shapes"),
        (lambda w, large: w.reductions.both(w.grad.sum() if large else {}["missing"]),
         KeyError, "missing"),
        (lambda w, large: w.reductions.on_one_rank(torch.neg, w.grad),
         UnequalMatrices, "must be equal"),
        (lambda w, large: w.reductions.from_full_matrix(torch.mul, w.grad, w.grad.sum()),
         UnequalMatrices, "must be equal"),
        (lambda w, large: w.reductions.on_full_matrix(torch.mul, w.grad, [large]),
         UnequalMatrices, "must be equal"),
        (lambda w, large: w.reductions.on_full_matrix(torch.mul, w.grad, [2, 2]),
         AssertionError, "one entry per matrix"),
        (lambda w, large: w.reductions.on_full_matrix(lambda X: X[..., :1], w.grad),
         AssertionError, "laid out like the weight"),
    ],
    ids=["one asks", "another method", "another shape", "an error", "a shard as a small matrix",
         "a shard beside the matrix", "other entries", "too many entries", "another result"],
)  # fmt: skip
def test_ranks_that_do_not_agree_fail_instead_of_waiting(lost_rank, behave, error_type, text):
    lost_rank.behave = behave
    ranks = SimulatedRanks(lost_rank(), torch.zeros(1, 7, 3), "rows", [5, 2])
    with pytest.raises(error_type, match=text):
        ranks.step(torch.ones(1, 7, 3))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_safe_scale_begins_where_the_docstring_says(sign):
    """In float32 beyond 2^48 and 2^-48, by 96 powers of two; at the limit nothing is scaled."""
    assert safe_square_scale(torch.full((1, 2, 3), 2.0 ** (49 * sign))) == 2.0 ** (-96 * sign)
    assert safe_square_scale(torch.full((1, 2, 3), 2.0 ** (48 * sign))) == 1.0
