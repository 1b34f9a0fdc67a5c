"""Names that say what they mean: of tests, and of everything that has been renamed."""

import ast
import re
import tokenize

import pytest
from helpers.paths import ROOT, TESTS

FOLDERS = ("optimizers", "kernels", "tests", "bench", "examples")
PAGE_NUMBER = re.compile(r"^test_\d|_\d\d_|_\d+_\d+|_p\d+_")
"""Numbers of pages that are not in the repository; fp32, ns5, sm_80 and 2d are none."""
PAGE = re.compile(r"\bsections? \(?\d|\bsheets?\b|\bpropert(y|ies) \d", re.IGNORECASE)

RETIRED = {
    "turned": "transposed",
    "turns": "BlockSchedule",
    "Turn": "BasisChange",
    "Turns": "BlockSchedule",
    "Blocks": "PanelTerm",
    "guarded": "handles_nonfinite",
    "is_wide": "needs_upcast",
    "together": "refresh_in_lockstep",
    "Together": "BatchedCall",
    "meets": "yields_batched_calls",
    "Meeting": "CallBatcher",
    "Sums": "Reductions",
    "Factors": "WriteScalars",
    "apart": "accepts_list",
    "kernel_": "fused_write_",
    "put_back": "restore",
    "Written": "DirectionIterator",
    "_current": "_get_plan",
    "_settle": "_apply_late_flags",
    "rows_of": "roles_of",
    "blend": "momentum_step",
    "growth_limit": "norm_growth_limiter",
    "row_correction": "normuon_scale",
    "entry_correction": "adamuon_scale",
    "lifted": "lifted_term",
    "calmed": "clipped_grad",
    "Free": "StateFreeUpdate",
    "Way": "GradientSplit",
    "some": "slots_if_any",
    "measured": "norms_of",
    "blended": "momentum_norms",
    "Whole": "DenseNorms",
    "Series": "SeriesNorms",
    "Known": "KernelNorms",
    "folded": "join_pairs",
    "mapped": "base_map",
    "sound_bases": "first_valid_bases",
    "svd_attempts": "svd_fallbacks",
    "Site": "ParamSite",
    "told": "config_values",
    "HEADS": "PER_HEAD_MUON",
    "STILL": "NO_DECAY",
    "modern": "is_supported_gpu",
    "pick": "backend_for",
    "_pays": "is_worthwhile",
    "WIDE": "SUPPORTED_DTYPES",
    "made": "materialize",
    "RULES": "RULE_CLASSES",
}
"""Retired identifiers and file names with their successors; CHANGELOG.md has them under Names.

Keys on disk, names of options and their values are strings, and stay.
"""
PACKAGE_ONLY = {"WIDE", "made", "measured", "rows_of", "RULES"}
"""In the package these words had several meanings; elsewhere each has its ordinary one.

A wide matrix has more columns than rows, and a benchmark has measured times.
"""


def trees():
    """(path, syntax tree) of every file of the tests."""
    for path in sorted(TESTS.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_no_name_of_a_test_has_the_number_of_a_page():
    wrong = [
        f"{path}: {node.name}"
        for path, tree in trees()
        for node in functions(tree)
        if node.name.startswith(("test", "Test")) and PAGE_NUMBER.search(node.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_for_page_numbers_spares_numbers_of_the_thing_tested():
    for name in ("test_7_x", "test_muon_12_07_x", "test_x_3_4", "test_property_01_x", "test_p3_x"):
        assert PAGE_NUMBER.search(name), name
    for name in ("test_fp32_x", "test_ns5", "test_adam8_x", "test_sm_80", "test_complex_2d"):
        assert not PAGE_NUMBER.search(name), name


def test_no_docstring_of_the_tests_points_to_a_page():
    wrong = []
    for path, tree in trees():
        for node in [tree, *functions(tree)]:
            text = ast.get_docstring(node) or ""
            if PAGE.search(text):
                wrong.append(f"{path}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def retired_in(path, words):
    """(line, word) of every retired identifier of a file; strings and comments do not count."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    found = [(t.start[0], t.string) for t in tokens if t.type == tokenize.NAME]
    return [(line, word) for line, word in found if word in words]


@pytest.mark.parametrize("folder", FOLDERS)
def test_retired_names_are_gone(folder):
    package = folder in ("optimizers", "kernels")
    words = {word for word in RETIRED if package or word not in PACKAGE_ONLY}
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT)
        if path.stem in words:
            wrong.append(f"{name}: the file is called {path.stem}; now {RETIRED[path.stem]}")
        for line, word in retired_in(path, words):
            wrong.append(f"{name}:{line}: {word}; now {RETIRED[word]}")
    assert not wrong, f"{len(wrong)} retired names\n" + "\n".join(wrong[:200])


def names_table(text):
    """{old: new} of the rows ``| old | new |`` between "### Names" and the next heading."""
    table = {}
    part = re.split(r"^### Names[ \t]*$", text, maxsplit=1, flags=re.MULTILINE)[1:]
    rows = re.split(r"^#", part[0], maxsplit=1, flags=re.MULTILINE)[0] if part else ""
    for row in rows.splitlines():
        cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
        if row.lstrip().startswith("|") and len(cells) == 2 and not set(cells[0]) <= set("-: "):
            for old in re.split(r",\s*", cells[0].replace("`", "")):
                table[old] = cells[1].replace("`", "")
    return table


def test_the_table_of_names_is_read():
    rows = "| old | new |\n|---|:-:|\n| `a`, `b` | `c` |"
    text = f"### Added\n| x | y |\n### Names\n\n{rows}\n## 1\n| d | e |"
    assert names_table(text) == {"old": "new", "a": "c", "b": "c"}
    assert names_table("## 1\n") == {}


def test_the_changelog_has_the_successor_of_every_retired_name():
    table = names_table((ROOT / "CHANGELOG.md").read_text())
    missing = [
        f"| `{old}` | `{new}` |" for old, new in RETIRED.items() if new not in table.get(old, "")
    ]
    assert not missing, "CHANGELOG.md, ### Names lacks\n" + "\n".join(missing)
