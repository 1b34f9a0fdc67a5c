"""Which folder may import which, read from the sources, so that nothing has to be imported."""

import ast
import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT

FLOORS = {
    "optimizers/_core": {"kernels"},
    "optimizers/_toolkit": {"kernels", "_core"},
    "optimizers/_roles": {"_core"},
    "optimizers/_driver": {"kernels", "_core", "_roles"},
    "optimizers/_frugal": {"kernels", "_core", "_toolkit", "_driver"},
    "optimizers/_lora": {"kernels", "_core", "_toolkit", "_driver"},
    "optimizers": {"kernels", "_core", "_toolkit", "_roles", "_driver", "_frugal", "_lora"},
    "kernels/reference": set(),
    "kernels/triton": {"reference"},
    "kernels/polar": {"dispatch", "ops", "random", "reference"},
    "kernels": {"polar", "reference"},
}
"""Per folder, the other folders (or files beside it) that its files may import."""
THIRD_PARTY = {"numpy", "torch", "triton", "typing_extensions"}
METHODS = {path.stem for path in ROOT.glob("optimizers/*.py")} - {"__init__"}
SOURCES = sorted([*ROOT.glob("optimizers/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """What a file imports: modules of ours as path parts below ROOT, and outside packages."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].relative_to(ROOT).parts
            parts = (*folder, *(node.module or "").split(".")) if node.module else folder
            inside |= {parts} if node.module else {(*parts, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_folder_imports_only_what_lies_below_it(path):
    own = path.parent.relative_to(ROOT).parts
    allowed = FLOORS["/".join(own)]
    for parts in imports(path)[0]:
        if parts[: len(own)] == own and len(parts) <= len(own) + 1:
            continue  # the same folder; that methods keep apart is the next test
        names = set(parts) & {*allowed, parts[0] if parts[0] != own[0] else ""}
        assert names & allowed, f"{name_of(path)} imports {'.'.join(parts)}"


def test_no_method_imports_another_method():
    for name in METHODS - {"symmetry"}:
        inside, _ = imports(ROOT / "optimizers" / f"{name}.py")
        found = {parts[1] for parts in inside if parts[0] == "optimizers"} & METHODS
        assert not found, f"{name}.py imports {sorted(found)}"


def test_only_triton_files_import_triton_and_nothing_heavy_is_imported():
    for path in SOURCES:
        _, outside = imports(path)
        assert "triton" not in outside or path.parent.name == "triton", path
        assert outside <= {*THIRD_PARTY, *sys.stdlib_module_names}, path


def test_an_import_after_torch_brings_nothing_but_the_package():
    """No compiled kernel, part of torch or package that torch has not imported itself.

    Times depend on the machine, so names stand for them; bench/NOTES.md has what an import takes.
    """
    code = (
        "import json, sys, torch; before = set(sys.modules); import stiefel.optimizers; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    new = json.loads(done.stdout)
    assert "stiefel.optimizers.muon" in new and "stiefel.kernels.ops" in new
    others = {name for name in new if name.split(".")[0] != "stiefel"}
    assert not {name for name in others if name.split(".")[0] not in sys.stdlib_module_names}
    assert not others & {"multiprocessing", "unittest", "asyncio", "http", "xml", "sqlite3"}
    assert not [name for name in new if name.startswith("stiefel.kernels.triton")]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_import_leaves_the_collector_as_it_was(is_frozen):
    """Torch's objects are frozen while the package is imported, a user's own stay frozen."""
    code = (
        f"import gc, torch; {'gc.freeze(); ' * is_frozen}before = gc.get_freeze_count(); "
        "import stiefel.optimizers; print(before, gc.get_freeze_count(), gc.isenabled())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    before, after, enabled = done.stdout.split()
    assert (int(before) > 0) == is_frozen == (int(after) > 0) and enabled == "True"


def test_no_optimizer_chooses_or_names_a_back_end():
    back_end = {"dispatch", "reference", "triton", "backend_for"}
    for path in ROOT.glob("optimizers/**/*.py"):
        for parts in imports(path)[0]:
            assert not set(parts) & back_end, f"{name_of(path)} imports {'.'.join(parts)}"
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not names & back_end, f"{name_of(path)} names {sorted(names & back_end)}"


def test_no_package_file_above_both_packages():
    assert not (ROOT / "__init__.py").exists() and not (ROOT / "stiefel").exists()
