"""The README: its length, its links, and its code, run block by block as a reader would."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.paths import BENCH
from helpers.reader import FENCE, namespace_of

import stiefel.optimizers
from stiefel.optimizers import StackedOptimizer

sys.path.insert(0, str(BENCH))

import cases
import tables

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MOST_LINES = 141


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def prose() -> str:
    return FENCE.sub("", readme())


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return namespace_of(monkeypatch)


# Tests -----------------------------------------------------------------------------------------


def test_every_python_block_runs_in_order(
    namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """And does what its section says: weights move, tables print, roles are told apart."""
    text = readme()
    blocks = [match for match in FENCE.finditer(text) if match[1] == "python"]
    del namespace["model"], namespace["inputs"]
    assert len(blocks) >= 4
    optimizers: list[StackedOptimizer] = []
    for i, block in enumerate(blocks):
        line = text.count("\n", 0, block.start(2))
        source = "\n" * line + block[2]  # so that an error names the README's own line
        if i == 0:  # a whole script: it makes a model, then trains it
            source, training = source.split("model(inputs)", 1)
            exec(compile(source, str(ROOT / "README.md"), "exec"), namespace)
            start = [p.detach().clone() for p in namespace["model"].parameters()]
            source = "\n" * source.count("\n") + "model(inputs)" + training
        exec(compile(source, str(ROOT / "README.md"), "exec"), namespace)
        if i == 0:
            moved = zip(start, namespace["model"].parameters(), strict=True)
            assert not any(torch.equal(before, after) for before, after in moved)
        optimizers += [v for v in namespace.values() if isinstance(v, StackedOptimizer)]
    printed = capsys.readouterr().out
    assert re.search(r"^1\.weight .* Muon ", printed, re.MULTILINE)
    assert re.search(r"^0\.weight .* adamw ", printed, re.MULTILINE)
    assert re.search(r"^total .*", printed, re.MULTILINE)
    assert {type(optimizer).__name__ for optimizer in optimizers} >= {"Muon", "AltLoRA"}
    pairs = next(x for x in optimizers if type(x).__name__ == "AltLoRA")
    adapted = [row for row in pairs.assignment() if row.rule == "AltLoRA"]
    assert len(adapted) == 6


def test_readme_is_short() -> None:
    assert len(readme().splitlines()) <= MOST_LINES


def test_every_relative_link_points_to_a_file() -> None:
    links = [link for link in LINK.findall(prose()) if "://" not in link]
    assert links
    files = [link.split("#")[0] for link in links if link[0] != "#"]
    assert not [file for file in files if not (ROOT / file).exists()]


def test_every_link_within_the_page_has_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", prose(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings}
    assert {link[1:] for link in LINK.findall(prose()) if link[0] == "#"} <= anchors


def test_every_optimizer_is_in_the_table_of_methods() -> None:
    public = [getattr(stiefel.optimizers, name) for name in stiefel.optimizers.__all__]
    classes = [c for c in public if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    rows = set(re.findall(r"^\| `(\w+)` \|", readme(), re.MULTILINE))
    assert rows == {c.__name__ for c in classes if c is not StackedOptimizer}


def test_every_class_has_the_cost_of_its_mean_step() -> None:
    """A number of two digits, and the command that measures it."""
    head = next(line for line in readme().splitlines() if cases.MEAN in line.split(" | "))
    column = head.split(" | ").index(cases.MEAN)
    rows = re.findall(r"^\| `\w+` \|.*$", readme(), re.MULTILINE)
    values = [row.split(" | ")[column] for row in rows]
    assert len(values) >= 20 and values == [tables.short(float(value)) for value in values]
    assert "`python bench/run.py --only amortised`" in prose() and "amortised" in cases.CASES


def test_the_bench_writes_that_column_and_nothing_else() -> None:
    names = re.findall(r"^\| `(\w+)` \|", readme(), re.MULTILINE)
    old = {name: row for name in names for row in readme().splitlines() if f"| `{name}` |" in row}
    page = tables.with_column(readme(), cases.MEAN, dict.fromkeys(names, "-"))
    kept = {name: row.split(" | ")[3] for name, row in old.items()}
    assert page != readme() and tables.with_column(page, cases.MEAN, kept) == readme()
    with pytest.raises(ValueError, match="no figure for Muown"):
        tables.with_column(readme(), cases.MEAN, {name: "-" for name in names if name != "Muown"})
    with pytest.raises(ValueError, match="no table with a column 'speed'"):
        tables.with_column(readme(), "speed", {})
    shown = [tables.short(x) for x in (0.966, 0.996, 4.25, 9.96, 17.2, 384.0, 1234.0)]
    assert shown == ["0.97", "1.0", "4.2", "10", "17", "380", "1200"]
