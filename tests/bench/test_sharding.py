"""The figures of large models in docs/sharding.md are those of bench/sharding.py."""

import re
import sys

import pytest
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import sharding

PAGE = (ROOT / "docs" / "sharding.md").read_text()
LINES = dict(re.findall(r"^\| (`\w+`.*?) \| ([\d. |]+) \|$", PAGE, re.MULTILINE))
"""Gigabytes on 8, 64 and 512 ranks, of 7B and then 70B, by the methods of a line."""


def test_the_page_has_every_method_and_the_plot():
    assert all(any(f"`{name}`" in line for line in LINES) for name in sharding.METHODS)
    assert sharding.STYLES.keys() == sharding.METHODS.keys()
    assert "](sharding.png)" in PAGE and (ROOT / "docs" / "sharding.png").stat().st_size > 10_000


@pytest.mark.parametrize(("name", "ranks"), [("Muon", 8), ("ARO", 64), ("GaLore", 512)])
def test_a_figure_of_the_page(name, ranks):
    line = next(text for names, text in LINES.items() if f"`{name}`" in names)
    printed = float(line.split(" | ")[[8, 64, 512].index(ranks)])
    assert sharding.bytes_per_step("7B", name, ranks) / 1e9 == pytest.approx(
        printed, rel=0.01, abs=5e-3
    )
