"""One place rounds weights: without it no weight moves, of whatever class, form and precision.

The kernels' place, ``store_weight``, has the same test among the interpreted kernels.
"""

import inspect

import pytest
import torch
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS, factors, flat
from helpers.problems import gradients, weight
from helpers.rounding import drop_writes, every_form, moved
from helpers.rules import FoldRule, PairRule, PlainRule, WindowRule, driver
from torch import nn

from stiefel import optimizers
from stiefel.optimizers import StackedOptimizer, SwitchLoRA, pairs_to_groups
from stiefel.optimizers._driver import buckets, write
from stiefel.optimizers._frugal import coordinates

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RULES = {"plain": driver(PlainRule()), "fold": driver(FoldRule()), "window": driver(WindowRule())}
MATRICES = {**METHODS, **RULES}
FIRST = {name.partition("-")[0]: name for name in reversed(MATRICES)}
"""Of every class its first entry."""
OPTIONS = {
    "cautious decay": ("muon", {"cautious": True, "weight_decay": 0.1}),
    "cautious, factored": ("galore", {"cautious": True, "weight_decay": 0.1}),
    "cautious, panels": ("frugal-svd", {"cautious": True, "weight_decay": 0.1}),
    "as torch": ("muon", {"compat": "torch"}),
    "tensor lr": ("muon", {"lr": torch.tensor(0.02)}),
    "decay last": ("galore", {"compat": "reference"}),
    "fira as published": ("fira", {"compat": "reference"}),
    "frugal as published": ("frugal-svd", {"compat": "reference", "reset": "all"}),
    "narrow state": ("aro", {"state_dtype": "bfloat16"}),
    "codes": ("muon", {"state_dtype": "int8"}),
}
"""Options that change how a weight is written: the method and its options."""


def by_switchlora(triples, **options):
    """Vectors are exchanged at every second step."""
    return SwitchLoRA(
        pairs_to_groups(triples, scale=0.5),
        **{"lr": 0.02, "weight_decay": 0.1, "ratio": None, "interval0": 4, "freeze_steps": 1},
        **options,
    )


def check(make_run, monkeypatch):
    """A run moves all weights, and without the place that rounds only what torch rounds.

    Args:
        make_run: Runs anew, on equal weights: which of them moved, and which torch's AdamW writes.
        monkeypatch: Pytest's.
    """
    flags, by_torch = make_run()
    assert all(flags), "the test shows nothing: a weight would not have moved anyway"
    drop_writes(monkeypatch)
    assert make_run() == (by_torch, by_torch)


def written_by_torch(optimizer):
    """Per parameter, whether torch's AdamW rounds it: to nearest, as it is not written else."""
    rows = optimizer.assignment().rows
    return [row.rule == "adamw" and row.write == "nearest" for row in rows]


def on_groups(make, dtype, **options):
    """Every form of a parameter; only the last one is AdamW's."""
    groups = every_form(dtype)
    params = [p for group in groups for p in group["params"]]
    optimizer = make(groups, **options)
    by_torch = written_by_torch(optimizer)
    assert by_torch[-1] is (optimizer.assignment().rows[-1].write == "nearest")
    assert not any(by_torch[:-1])
    return moved(optimizer, params), by_torch


def on_tuples(make, tuples, **options):
    """Pairs or triples of factors; a base weight has no gradient."""
    params = flat(tuples)
    series = [
        gradients(p.shape, 4, i) if p.requires_grad else [None] * 4 for i, p in enumerate(params)
    ]
    return moved(make(tuples, **options), params, series=series), [False] * len(params)


def pairs(dtype, base_weight=False):
    """Equal pairs, which are solved together, and a wide one; or triples with W0."""
    shapes = [(10, 7, 3), (10, 7, 3), (6, 9, 4)]
    made = [factors(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    if not base_weight:
        return made
    W0s = [weight((m, n), 90, dtype).requires_grad_(False) for m, n, _ in shapes]
    return [(A, B, W0) for (A, B), W0 in zip(made, W0s, strict=True)]


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(12, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8),
        nn.Conv2d(3, 4, 2),
    )  # fmt: skip


def on_model(make, form):
    """A module or its named parameters: what is no matrix, and an embedding, is AdamW's."""
    net = model()
    optimizer = make(net if form == "module" else list(net.named_parameters()))
    adamw = [row.rule == "adamw" for row in optimizer.assignment().rows]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert any(adamw) and not all(adamw)
    return moved(optimizer, params), adamw


def small_panels(monkeypatch):
    """Every weight is cut, and FRUGAL's panels are large enough for torch's kernel of SGD."""
    monkeypatch.setattr(write, "WRITE_PANEL", 30)
    monkeypatch.setattr(coordinates, "SPLIT_PANEL", 16)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_no_weight_moves_without_the_place_that_rounds(name, dtype, monkeypatch):
    check(lambda: on_groups(MATRICES[name], dtype), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FIRST.values())
def test_that_holds_in_other_precisions_and_in_panels(name, dtype, monkeypatch):
    small_panels(monkeypatch)
    check(lambda: on_groups(MATRICES[name], dtype), monkeypatch)


@pytest.mark.covering
@pytest.mark.parametrize("form", ["module", "named"])
@pytest.mark.parametrize("name", METHODS)
def test_that_holds_for_a_model(name, form, monkeypatch):
    check(lambda: on_model(METHODS[name], form), monkeypatch)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_that_holds_for_every_way_to_write(case, dtype, monkeypatch):
    small_panels(monkeypatch)
    name, options = OPTIONS[case]
    check(lambda: on_groups(METHODS[name], dtype, **options), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_that_holds_for_pairs(name, dtype, monkeypatch):
    check(lambda: on_tuples(PAIRS[name], pairs(dtype)), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_that_holds_for_the_exchange_of_vectors_and_the_base_weight(dtype, monkeypatch):
    check(lambda: on_tuples(by_switchlora, pairs(dtype, base_weight=True)), monkeypatch)


def test_that_holds_for_pairs_with_a_cap(monkeypatch):
    def make(tuples):
        return StackedOptimizer([{"params": flat(tuples)}], PairRule(), 0.1, 0.1)

    check(lambda: on_tuples(make, pairs(torch.bfloat16)), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["muon", "galore", "fira", "frugal-columns", "rownorm", "aro"])
def test_that_holds_for_decay_alone(name, dtype, monkeypatch):
    """After one step gradients are zero for good; a decay of 1 / lr would take all away."""

    def make_run():
        p = weight((12, 8), dtype=dtype)
        optimizer = MATRICES[name]([p], lr=0.1, weight_decay=5.0)
        optimizer.init_state()
        zeros = [[torch.zeros(12, 8)] * 2]
        return moved(optimizer, [p], series=zeros), [False]

    check(make_run, monkeypatch)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_that_holds_where_flags_arrive_late(name, dtype, monkeypatch):
    """The second of three gradients is not finite, which the host learns one step later."""

    def make_run():
        params = [weight((12, 8), i, dtype) for i in range(2)] + [weight((8, 10), 2, dtype)]
        optimizer = METHODS[name](params)
        optimizer._wait = False
        series = [gradients(p.shape, 4, i) for i, p in enumerate(params)]
        series[0][2] = torch.full((12, 8), float("nan"))
        flags = moved(optimizer, params, series=series)
        assert sum(optimizer.skipped.values()) == 1
        assert all(bool(p.isfinite().all()) for p in params)
        return flags, [False] * len(params)

    check(make_run, monkeypatch)


def test_a_matrix_is_put_back_where_its_rule_took_the_flag(monkeypatch):
    """As kernels do it: the gradient is unmasked, its NaN in the terms, and no kernel writes."""
    monkeypatch.setattr(buckets, "fuses_passes", lambda X: True)
    monkeypatch.setattr(buckets.Bucket, "weight_list", lambda self, i: [])
    for dtype in DTYPES:
        with monkeypatch.context() as patch:
            p, q = weight((12, 8), 0, dtype), weight((12, 8), 1, dtype)
            before = p.detach().clone()
            optimizer = METHODS["rownorm"]([p, q])
            optimizer._wait = False
            bad = torch.full((12, 8), float("nan"))

            def make_run(optimizer=optimizer, q=q, p=p, bad=bad):
                return moved(optimizer, [p, q], series=[[bad], gradients((12, 8), 1)])

            assert make_run() == [False, True] and torch.equal(p.detach(), before)
            drop_writes(patch)
            assert make_run() == [False, False]


def test_the_published_decay_of_other_parameters_is_written_there_too(monkeypatch):
    """GaLore's published AdamW decays afterwards: without the place that rounds, not at all."""

    def final(weight_decay):
        p = weight((8,))
        options = {"compat": "reference", "weight_decay": weight_decay}
        moved(METHODS["galore"]([{"params": [p], "rule": "adamw"}], **options), [p])
        return p.detach()

    plain, decayed = final(0.0), final(0.1)
    assert not torch.equal(plain, decayed)
    drop_writes(monkeypatch)
    assert torch.equal(final(0.1), plain)


def test_every_optimizer_is_in_a_table():
    """A new class joins these tests by its entry in the tables of helpers."""
    made = {type(make([weight((6, 8))])) for make in METHODS.values()}
    made |= {type(make(pairs(torch.float32))) for make in PAIRS.values()}
    public = {
        cls for name in optimizers.__all__
        if inspect.isclass(cls := getattr(optimizers, name)) and issubclass(cls, StackedOptimizer)
    }  # fmt: skip
    assert public - made == {SwitchLoRA}
