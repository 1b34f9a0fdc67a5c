"""memory_report: bytes from shapes alone, equal to what is allocated."""

import time

import pytest
import torch
from helpers.llama import SIZES, Llama
from helpers.methods import METHODS

from stiefel.optimizers import FRUGAL, Fira, GaLore, MemoryReport, Muon, memory_report

GIB = 2**30


def llama(size):
    with torch.device("meta"):
        return Llama(*SIZES[size])


def allocated(optimizer):
    optimizer.init_state()
    tensors = [
        value
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(value.numel() * value.element_size() for value in tensors)


def small():
    """A model with every way a parameter can go: plain, expert stack, convolution, vectors."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(40, 24), torch.nn.Linear(24, 64), torch.nn.Conv1d(64, 8, 3)
    )
    model.experts = torch.nn.Parameter(torch.zeros(3, 16, 24))
    model.large = torch.nn.Linear(96, 128, dtype=torch.bfloat16)
    model.frozen = torch.nn.Parameter(torch.zeros(5, 5), requires_grad=False)
    return model


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"adamw_lr": 1e-3}], ids=str)
def test_report_equals_what_is_allocated(method, options):
    optimizer = METHODS[method](small(), **options)
    report = MemoryReport.of(optimizer)
    assert not optimizer.state
    assert report.state - report.shared == allocated(optimizer)
    sizes = {p.requires_grad: 0 for p in small().parameters()}
    for p in small().parameters():
        sizes[p.requires_grad] += p.numel() * p.element_size()
    assert report.weight == sizes[True] + sizes[False]
    assert report.gradient == sizes[True]


def test_frozen_parameters_have_a_weight_and_nothing_else():
    model = small()
    report = memory_report(model.parameters(), Muon)
    frozen = [row for row in report.rows if row.shape == (5, 5)]
    assert [row[3:] for row in frozen] == [(100, 0, 0, 0)]


def test_report_of_a_meta_model_allocates_nothing_and_takes_less_than_two_seconds():
    start = time.perf_counter()
    model = llama("7B")
    report = memory_report(model, GaLore, rank=1024)
    text = str(report)
    seconds = time.perf_counter() - start
    assert seconds < 2.0
    assert all(p.is_meta for p in model.parameters())
    assert f"{report.state / GIB:.1f}" == "17.5"
    assert f"{report.adamw / GIB:.1f}" == "50.2"
    assert "model.layers.*.self_attn.q_proj.weight" in text
    assert "4096x4096 (32)" in text
    assert len(text.splitlines()) < 20


@pytest.mark.parametrize(
    ("size", "rank", "galore", "adamw"),
    [
        ("60M", 128, 0.30, 0.43),
        ("130M", 256, 0.64, 1.00),
        ("350M", 256, 1.22, 2.74),
        ("1B", 512, 3.88, 9.98),
    ],
)
@pytest.mark.parametrize("cls", [GaLore, Fira])
def test_llama_totals_of_the_papers(cls, size, rank, galore, adamw):
    report = memory_report(llama(size), cls, rank=rank)
    assert round(report.state / GIB, 2) == galore
    assert round(report.adamw / GIB, 2) == adamw


@pytest.mark.parametrize(
    ("size", "columns", "none", "svd"),
    [
        ("60M", 0.29, 0.24, 0.30),
        ("130M", 0.52, 0.37, 0.57),
        ("350M", 1.05, 0.49, 1.22),
        ("1B", 3.23, 0.98, 3.88),
    ],
)
def test_llama_totals_of_frugal(size, columns, none, svd):
    """Density a quarter, zero, and a stored basis of a quarter, in GiB."""
    made = {
        columns: memory_report(llama(size), FRUGAL, density=0.25),
        none: memory_report(llama(size), FRUGAL, density=0.0),
        svd: memory_report(llama(size), FRUGAL, density=0.25, split="svd"),
    }
    for gib, report in made.items():
        # chosen columns are counted in the report and left out in the formula: 4 bytes each
        index = sum(4 * (row.shape[1] // 4) for row in report.rows if row.rule == "FRUGAL")
        index = index if gib == columns else 0
        assert round((report.state - index) / GIB, 2) == gib


def test_blocks_that_take_turns_are_those_of_the_first_window():
    report = memory_report(llama("60M"), FRUGAL, split="block", density=0.25, seed=3)
    matrices = [row for row in report.rows if row.rule == "FRUGAL"]
    active = [row for row in matrices if row.state]
    assert len(active) == round(0.25 * len(matrices))
    assert all(row.state == 2 * row.weight for row in active)


def test_rows_name_every_parameter_once_and_add_up():
    model = llama("60M")
    report = memory_report(model, Muon)
    assert [row.name for row in sorted(report.rows)] == sorted(dict(model.named_parameters()))
    assert report.state == sum(row.state for row in report.rows)
    rows = {row.name: row for row in report.rows}
    q = rows["model.layers.3.self_attn.q_proj.weight"]
    assert (q.rule, q.state, q.adamw) == ("Muon", 4 * 512 * 512, 8 * 512 * 512 + 4)
    assert rows["model.embed_tokens.weight"].rule == "adamw"
    count = sum(count for _, count, _ in report.layers())
    assert count == len(report.rows)


def test_eight_bit_state_is_about_a_quarter():
    plain = memory_report(llama("60M"), Muon)
    coded = memory_report(llama("60M"), Muon, state_dtype="int8")
    matrices = [sum(row.state for row in r.rows if row.rule == "Muon") for r in (plain, coded)]
    assert matrices[1] / matrices[0] == pytest.approx((1 + 4 / 256) / 4, rel=1e-3)


def test_shared_memory_is_counted_once():
    one = memory_report(torch.nn.Linear(64, 96), GaLore, rank=8, projection="dct")
    two = memory_report(
        torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)),
        GaLore,
        rank=8,
        projection="dct",
    )
    assert one.shared == two.shared == 4 * 64 * 64
    assert "shared on each device" in str(one)


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="optimizer_class must be an optimizer of this package"):
        memory_report(torch.nn.Linear(2, 2), torch.optim.AdamW)


@pytest.mark.parametrize("options", [{"split": "dct"}, {"split": "svd", "projection": "dct"}])
def test_frugal_counts_shared_cosines_too(options):
    report = memory_report(torch.nn.Linear(64, 96), FRUGAL, **options)
    assert report.shared == 4 * 64 * 64
