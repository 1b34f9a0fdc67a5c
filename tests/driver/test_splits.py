"""Rules that may be cut, on shards as they come: uneven, of one row, and empty.

Every option is tried along both sides of the weight against the optimizer on whole weights. A rank
that holds nothing runs the rule like the others and takes part in every reduction.
"""

from dataclasses import fields

import pytest
import torch
from helpers.simulated_ranks import SimulatedRanks, error, steps_of_one_process

from stiefel.kernels import POLAR_METHODS, SKETCHES
from stiefel.optimizers._core.rule import LOCAL_REDUCTIONS, RULE_CLASSES, Reductions, Rule
from stiefel.optimizers._toolkit.moments import (
    column_squares,
    largest_entries,
    safe_square_scale,
    total,
)
from stiefel.optimizers._toolkit.row_rules import center, rms_factor, row_squares, unit_range
from stiefel.optimizers.auon import AuONRule
from stiefel.optimizers.dctadamw import DCTAdamWRule
from stiefel.optimizers.hybrid import HybridRule
from stiefel.optimizers.muon import ADJUST_LR_FNS, MuonRule
from stiefel.optimizers.rownorm import RowNormRule
from stiefel.optimizers.sinkgd import SinkGDRule
from stiefel.optimizers.spectral import SpectralRule
from stiefel.optimizers.trion import TrionRule

BOTH, NONE = frozenset({"rows", "cols"}), frozenset()
LOW_RANK = {"polar": "low_rank", "rank": 2, "oversample": 1}
COMMON = [
    {},
    {"momentum": 0.5},
    {"adjust_lr_fn": "none"},
]
POLAR = [
    {"centred": True},
    {"axis": "cols"},
    {"axis": "cols", "centred": True, "rms_target": 0.3},
    {"adjust_lr_fn": "none", "alpha": 1.0},
    {"adjust_lr_fn": "none", "alpha": -0.5, "centred": True, "polar": "svd"},
    {"polar": "ns5", "ns_steps": 3, "eps": 1e-3},
    {"polar": "inverse_root"},
    *({"polar": "inverse_root", "eps": 1e-3, "side": side} for side in ("left", "right")),
    *({"polar": name} for name in POLAR_METHODS if name != "turbo"),
]
SETTINGS = {
    MuonRule: [
        *COMMON,
        {"nesterov": False},
        {"momentum_kind": "sum"},
        {"momentum": 1.0},
        *({"polar": name} for name in POLAR_METHODS),
        {"ns_steps": 3, "ns_coefficients": (3.0, -4.0, 2.0), "eps": 1e-3},
        *({"polar": "ns5", "polar_norm": x} for x in ("frobenius", "schatten4", "aol", "power:2")),
        {"polar": "ns5", "polar_dtype": "bfloat16"},
        *({**LOW_RANK, "sketch": sketch, "seed": 3} for sketch in SKETCHES),
        {**LOW_RANK, "rank": 0.3, "power": 2, "inner": "ns5", "rank_compensate": True},
        *({"second_moment": name} for name in ("normuon", "adamuon")),
        *({"second_moment": name, "beta2": 0.5, **LOW_RANK} for name in ("normuon", "adamuon")),
        *({"adjust_lr_fn": name} for name in ADJUST_LR_FNS),
        {"equilibrate": "rows"},
        {"equilibrate": "both", "renormalize": True},
        {"clip_grad_rms": 0.1},
        {"normalize_grad": True},
        {"spike_ratio": 1.01},
        {"spike_ratio": 1.01, "clip_grad_rms": 0.1, "second_moment": "adamuon"},
    ],
    SpectralRule: [*COMMON, *POLAR],
    HybridRule: [
        *COMMON,
        *POLAR,
        {"order": "polar_then_row"},
        {"order": "polar_then_row", "adjust_lr_fn": "none", "alpha": 1.0, "row_eps": 1e-2},
        *({"row_mode": mode} for mode in ("inverse", "unit", "relative")),
        {"row_mode": "relative", "centred": True, "order": "polar_then_row"},
        {"row_eps": 1e-2},
    ],
    RowNormRule: [
        *COMMON,
        {"centred": True},
        {"axis": "cols"},
        {"axis": "cols", "centred": True, "rms_target": 0.3, "row_mode": "relative"},
        {"centred": True, "adjust_lr_fn": "none", "eps": 1e-2},
        *({"row_mode": mode} for mode in ("inverse", "unit", "relative")),
        {"row_mode": "relative", "momentum": 0.5, "axis": "cols"},
        {"eps": 1e-2, "row_mode": "unit"},
        {"momentum": 0.0},
        {"momentum": 0.0, "row_mode": "relative", "centred": True},
    ],
    SinkGDRule: [{}, {"momentum": 0.5, "iterations": 2}],
    AuONRule: [
        *COMMON,
        {"nesterov": False},
        {"variant": "repo2026", "eps": 1e-9},
        {"gamma": 2.0, "adjust_lr_fn": "aspect"},
        {"ns_steps": 1, "init_norm": "spectral-bound"},
    ],
}
"""Options of the rules that may be cut along both sides."""
WHOLE_ONLY = {
    MuonRule: {"compat": "torch", "report_steps": 2},
    SpectralRule: {"pair": "halves"},
    HybridRule: {"pair": "halves"},
    RowNormRule: {"pair": "halves"},
    SinkGDRule: {},
    AuONRule: {},
}
"""Options with which they may not."""
RUNS = [
    pytest.param(cls(**options), id=f"{cls.method()}({options})")
    for cls, settings in SETTINGS.items()
    for options in settings
]
SHARES = {7: [0, 5, 0, 2], 11: [3, 3, 3, 2], 1: [1, 0, 0]}
"""Parts of a side of this length."""
STEPS, K = 3, 3


def gradients(m, n, dtype, scale):
    """Gradients (K, m, n) of all steps; the last matrix is zero at first."""
    generator = torch.Generator().manual_seed(11)
    grads = [torch.randn(K, m, n, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    grads[0][-1] = 0.0
    return [(scale * G).to(dtype) for G in grads]


def compare(rule, grads, split, shares, tolerance):
    """Fail unless ranks have the weights and state of one process after every step."""
    m, n = grads[0].shape[-2:]
    expected, optimizer = steps_of_one_process(rule, grads)
    ranks = SimulatedRanks(rule, torch.zeros_like(grads[0]), split, shares, 0.1, 0.1)
    for G, W in zip(grads, expected, strict=True):
        ranks.step(G)
        assert error(ranks.whole_weights(), W) <= tolerance, (m, n, shares)
        if set(ranks.calls) == {"on_full_matrix"}:
            assert torch.equal(ranks.whole_weights(), W)
    for key, X in ranks.whole_state().items():
        stored = torch.stack([state[key] for state in optimizer.state.values()])
        is_transposed = ranks.slots[key].axes == "mn" and ranks.transposed
        assert error(X.mT if is_transposed else X, stored) <= tolerance, key
    return ranks


def side(rule, m, n, split):
    """Length of the side that is cut, as the rule sees it."""
    m, n = (n, m) if rule.transpose(m, n) else (m, n)
    return m if split == "rows" else n


@pytest.mark.parametrize("split", ["rows", "cols"])
@pytest.mark.parametrize("rule", RUNS)
def test_shards_of_every_kind_take_the_steps_of_one_process(rule, split):
    assert rule.splits == BOTH
    for m, n in ((7, 11), (11, 7), (1, 11), (7, 1)):
        grads = gradients(m, n, torch.float64, 1.0)
        compare(rule, grads, split, SHARES[side(rule, m, n, split)], 1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("split", ["rows", "cols"])
@pytest.mark.parametrize("rule", RUNS)
def test_the_size_of_gradients_does_not_matter_on_shards(rule, split, scale):
    """As much as on one process: squares that leave float32 there and not here would show."""
    grads = gradients(7, 11, torch.float32, scale)
    compare(rule, grads, split, SHARES[side(rule, 7, 11, split)], 2e-4)


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.method())
def test_no_option_is_forgotten(cls):
    """An option that is not tried on shards must make ``splits`` smaller."""
    tried = {name for options in SETTINGS[cls] for name in options}
    assert {f.name for f in fields(cls)} - tried == set(WHOLE_ONLY[cls])
    for name, value in WHOLE_ONLY[cls].items():
        assert cls(**{name: value}).splits == NONE


@pytest.mark.parametrize("pair", ["members", "halves", "interleaved"])
@pytest.mark.parametrize("cls", [SpectralRule, HybridRule, RowNormRule])
def test_pairs_are_not_cut(cls, pair):
    """Gate and up are joined to a matrix that is laid out unlike the weights."""
    assert cls(pair=pair).splits == NONE


def test_only_these_rules_may_be_cut():
    assert Rule.splits == NONE
    ours = {name: cls for name, cls in RULE_CLASSES.items() if "stiefel" in cls.__module__}
    declared = {name for name, cls in ours.items() if cls.splits != NONE}
    # of the others one side may be cut, and tests/driver/test_reductions.py runs them
    one_side = {"APOLLO", "DCTAdamW", "FRUGAL", "Fira", "GaLore", "SOAP", "SOAPMuon", "Trion"}
    assert declared - one_side == {cls.method() for cls in SETTINGS}


def test_compat_has_its_bits_on_whole_tensors_only():
    """Entries that fill no vector are rounded in another way, and shards end elsewhere."""
    W = torch.randn(1, 37, 23, generator=torch.Generator().manual_seed(0)).bfloat16()
    grads = [(W * (i + 1)).bfloat16() for i in range(2)]
    whole, shards = (
        SimulatedRanks(MuonRule(compat="torch"), W, "rows", shares, 0.1, 0.1)
        for shares in ([37], [20, 17])
    )
    for G in grads:
        whole.step(G.float())
        shards.step(G.float())
    assert not torch.equal(whole.whole_weights(), shards.whole_weights())


@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (0, 0)])
def test_sums_and_maxima_of_no_entries_are_zeros_of_the_usual_shape(m, n):
    X, one = torch.empty(2, m, n), Reductions()
    zeros = torch.zeros(2, 1, 1)
    assert torch.equal(total(column_squares(X)), zeros)
    assert torch.equal(total(column_squares(X.mT)), zeros)
    assert torch.equal(largest_entries(X), zeros)
    assert torch.equal(row_squares(X, one), torch.zeros(2, m, 1))
    assert torch.equal(safe_square_scale(X), torch.full((2, 1, 1), 2.0**96))  # as of zeros
    for reductions in (LOCAL_REDUCTIONS, one):
        assert unit_range([X], reductions)[0].shape == X.shape
    assert center(X, one, 5).shape == X.shape
    assert torch.equal(rms_factor(X, 0.2, one, 5), zeros)


# ties ---------------------------------------------------------------------------------------------


TIED = [
    pytest.param(TrionRule(rank=1, adjust_lr_fn="none"), id="trion"),
    pytest.param(TrionRule(rank=1, adjust_lr_fn="none", norm="l2", basis="dct3"), id="trion l2"),
    pytest.param(DCTAdamWRule(rank=1, update_proj_gap=2), id="dctadamw"),
    pytest.param(DCTAdamWRule(rank=1, error_feedback="full", norm="l2"), id="dctadamw l2"),
]
"""Rules that choose one cosine by scores that are summed over ranks."""


def tied_gradients(lead):
    """Gradients (2, 2, 8) whose two coefficients are alike in each column, but for one column."""
    for step in range(4):
        G = torch.zeros(2, 2, 8)
        G[:, 0] = torch.linspace(-1, 1, 8).mul(step + 1).sin()
        G[:, 1, 3] += lead
        yield G


@pytest.mark.parametrize("lead", [0.0, 1e-7, -1e-7, 0.5])
@pytest.mark.parametrize("rule", TIED)
def test_all_ranks_choose_alike_and_the_lowest_number_of_a_tie(rule, lead):
    """A near tie may be decided in another way than on one process, but by all ranks alike."""
    grads, found = list(tied_gradients(lead)), []
    for shares in ([8], [5, 3], [3, 2, 0, 3]):
        ranks = SimulatedRanks(rule, torch.zeros(2, 2, 8), "cols", shares, 0.1)
        for G in grads:
            ranks.step(G)
        found.append(ranks.whole_weights())
        state = ranks.whole_state()  # fails where an index differs
        if lead == 0.0 and state.keys() == {"exp_avg", "exp_avg_sq", "index", "age"}:
            assert not state["index"].any()  # with feedback the other cosine has its turn
    if abs(lead) != 1e-7:
        expected, _ = steps_of_one_process(rule, grads, weight_decay=0.0)
        assert all(error(W, expected[-1]) <= 2e-6 for W in found)


# rows of very different sizes ---------------------------------------------------------------------


@pytest.mark.parametrize("split", ["rows", "cols"])
@pytest.mark.parametrize("options", [{}, {"axis": "cols"}, {"row_mode": "unit"}], ids=str)
def test_rows_of_any_size_have_one_length(options, split):
    """Squares of some leave float32 at either end; a row needs no scale of the others."""
    rule = RowNormRule(**options, adjust_lr_fn="none")
    G = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(5))
    G *= torch.tensor([1.0, 1e-30, 1e25, 0.0, 1e-12]).view(-1, 1)
    is_turned = rule.axis == "cols"
    grads = [G.mT.contiguous() if is_turned else G] * 2
    (_, W), _ = steps_of_one_process(rule, grads, weight_decay=0.0)
    lengths = torch.linalg.vector_norm(W.mT if is_turned else W, dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([0.2, 0.2, 0.2, 0.0, 0.2]).expand(2, 5))
    shares = SHARES_OF_ROWS[split]
    ranks = SimulatedRanks(rule, torch.zeros_like(grads[0]), split, shares, 0.1)
    for grad in grads:
        ranks.step(grad)
    assert (ranks.whole_weights() - W).abs().max() <= 2e-7
    assert set(ranks.calls) == ({"cols"} if split == "cols" else set())


SHARES_OF_ROWS = {"rows": [2, 0, 3], "cols": [3, 3, 1]}
"""Parts of the 5 rows, or of the 7 columns, of what the rule sees."""
