"""Which file may import which: read from the sources, so that nothing has to be imported."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOOLKIT = {
    "frames",
    "rule",
    "base",
    "moments",
    "projectors",
    "groups",
    "lowrank",
    "feedback",
    "orthogonal",
    "inner",
    "splits",
    "turns",
    "ways",
    "powers",
    "rows",
    "lora",
    "pairs",
    "base_weights",
    "tangent",
    "pools",
    "switching",
}
FLOORS = {
    "views": set(),
    "role_table": set(),
    "roles": {"role_table"},
    "moments": {"kernels", "rule"},
    "terms": {"kernels"},
    "rule": {"terms"},
    "bases": set(),
    "sketches": {"bases"},
    "subspaces": {"bases", "kernels", "moments", "rule", "sketches"},
    "coordinates": {"bases", "kernels", "moments", "rule", "sketches", "subspaces"},
    "projectors": {"bases", "coordinates", "rule", "sketches", "subspaces"},
    "policies": {"groups", "role_table", "roles", "rule"},
    "symmetry": {
        "base",
        "groups",
        "hybrid",
        "muon",
        "policies",
        "roles",
        "rownorm",
        "rule",
        "spectral",
    },
    "powers": {"kernels", "moments", "rule"},
    "rows": {"kernels", "lowrank", "moments", "rule"},
    "adamw": set(),
    "write": {"kernels", "rule"},
    "units": {"kernels", "rule", "views"},
    "plan": {"kernels", "rule", "units"},
    "inner": {"moments", "rule"},
    "memory": {"adamw", "base", "plan", "units"},
    "groups": {"roles", "rule", "units", "views"},
    "checkpoint": {"adamw", "groups", "rule", "units"},
    "orthogonal": {"kernels", "moments", "rule", "sketches"},
    "ways": {"inner", "moments", "rule", "sketches"},
    "turns": {"groups", "inner", "rule", "sketches", "ways"},
    "splits": {"inner", "kernels", "moments", "projectors", "rule", "sketches", "turns", "ways"},
    "frames": {"groups", "kernels", "lowrank", "moments", "rule", "units"},
    "lowrank": {"inner", "moments", "projectors", "rule"},
    "changes": {"kernels", "rule", "units"},
    "base": {
        "changes",
        "adamw",
        "checkpoint",
        "flags",
        "groups",
        "plan",
        "units",
        "roles",
        "rule",
        "together",
        "write",
    },
    "together": {"rule"},
    "flags": {"kernels", "plan", "rule", "units", "write"},
    "feedback": {"kernels", "rule"},
    "tangent": {"kernels", "pairs"},
    "base_weights": {"groups", "lora", "moments", "rule", "views"},
    "pairs": {"kernels"},
    "lora": {"base", "groups", "rule"},
    "switching": {"groups", "plan", "rule", "views", "write"},
    "pools": {"groups", "lora", "plan", "rule", "sketches", "switching", "units"},
}
METHODS = {
    "adaprelora",
    "altlora",
    "aro",
    "auon",
    "dctadamw",
    "fira",
    "frugal",
    "galore",
    "hybrid",
    "muon",
    "rownorm",
    "spectral",
    "switchlora",
    "trion",
}
KERNELS = {
    "dispatch": {"reference"},
    "ops": {"dispatch", "reference"},
    "dct": {"dispatch", "reference"},
    "quantize": set(),
    "random": set(),
}
"""What files of kernels/ import; polar/ is above all of them, reference/ below."""


def imports(path):
    """Names of the house's modules that a file imports, and outside packages, at module level."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (node.module or "").split(".")[0]
            inside |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


@pytest.mark.parametrize("path", sorted(ROOT.glob("optimizers/*.py")), ids=lambda p: p.stem)
def test_optimizers_import_only_lower_floors(path):
    if path.stem == "__init__":
        return
    inside, _ = imports(path)
    allowed = TOOLKIT | {"kernels"} if path.stem in METHODS else FLOORS[path.stem]
    assert inside <= allowed, f"{path.name} imports {sorted(inside - allowed)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.stem)
def test_kernels_import_only_lower_floors(path):
    if path.stem == "__init__":
        return
    inside, _ = imports(path)
    assert inside <= KERNELS[path.stem], (
        f"{path.name} imports {sorted(inside - KERNELS[path.stem])}"
    )


def test_only_triton_files_import_triton_and_nothing_heavy_is_imported():
    for path in [*ROOT.glob("optimizers/*.py"), *ROOT.glob("kernels/*.py")]:
        _, outside = imports(path)
        assert "triton" not in outside or path.stem.startswith("triton_")
        assert not outside & {"scipy", "matplotlib", "transformers", "stiefel"}, path.name


@pytest.mark.parametrize("folder", ["polar", "reference", "triton"])
def test_back_ends_know_neither_who_calls_them_nor_how_they_were_chosen(folder):
    """`..` is kernels/: polar methods choose a back end, kernels know their references."""
    above = {"polar": {"dispatch", "random", "reference"}, "reference": set(),
             "triton": {"reference"}}[folder]  # fmt: skip
    own = {path.stem for path in ROOT.glob(f"kernels/{folder}/*.py")}
    for path in ROOT.glob(f"kernels/{folder}/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = {alias.name for alias in node.names}
                found = {(node.module or "").split(".")[0]} if node.module else names
                allowed = own if node.level == 1 else above
                assert found <= allowed, f"{folder}/{path.name} imports {sorted(found - allowed)}"
        _, outside = imports(path)
        known = {"torch", "numpy"} if folder == "polar" else {"torch"}
        known |= {"triton"} if folder == "triton" else set()
        assert outside <= known | set(sys.stdlib_module_names), path.name


def test_no_rule_asks_which_back_end_runs():
    for name in METHODS:
        inside = (ROOT / "optimizers" / f"{name}.py").read_text()
        assert "dispatch" not in inside and "reference." not in inside, name


def test_no_package_file_above_both_packages():
    assert not (ROOT / "__init__.py").exists() and not (ROOT / "stiefel").exists()


def test_method_files_stay_short():
    for name in METHODS:
        most = 230  # a docstring with every option takes half of that
        assert len((ROOT / "optimizers" / f"{name}.py").read_text().splitlines()) <= most
