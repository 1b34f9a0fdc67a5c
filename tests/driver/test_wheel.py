"""The wheel: every folder of the package is in it, and it steps where the sources are not."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT

import stiefel.optimizers

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="this Python reads no TOML")

try:
    SETUPTOOLS = int(metadata.version("setuptools").split(".")[0])
except metadata.PackageNotFoundError:
    SETUPTOOLS = 0
PACKAGES = {"optimizers": "stiefel.optimizers", "kernels": "stiefel.kernels"}
STEP = """
import sys
import torch
import stiefel.kernels
import stiefel.optimizers
from stiefel.optimizers import GaLore, Muon

for module in (stiefel.optimizers, stiefel.kernels):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
for make in (lambda p: Muon(p, lr=0.02), lambda p: GaLore(p, lr=0.02, rank=2)):
    W = torch.nn.Parameter(torch.ones(6, 4))
    W.grad = torch.arange(24.0).view(6, 4).sin()
    make([W]).step()
    assert bool(W.isfinite().all()) and not bool((W == 1).any())
"""


def folders():
    """{module: folder} of every folder of the sources that has an ``__init__.py``."""
    found = {}
    for top, module in PACKAGES.items():
        for init in sorted((ROOT / top).rglob("__init__.py")):
            parts = init.parent.relative_to(ROOT / top).parts
            found[".".join((module, *parts))] = "/".join((top, *parts))
    return found


def command(*words, **options):
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, built by the setuptools that is installed, if any."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out)]
    if SETUPTOOLS >= 77:  # what pyproject.toml requires
        pip.append("--no-build-isolation")
    command(*pip, str(copy))
    (path,) = out.glob("*.whl")
    return path


def test_every_folder_is_listed():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(table["packages"]) == sorted(folders())
    assert table["package-dir"] == folders()


@pytest.mark.slow
def test_every_source_file_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"{module.replace('.', '/')}/py.typed" for module in PACKAGES.values()}
    for module, folder in folders().items():
        for path in (ROOT / folder).glob("*.py"):
            wanted.add(f"{module.replace('.', '/')}/{path.name}")
    assert wanted <= packed, sorted(wanted - packed)
    assert not [name for name in packed if name.startswith(("tests/", "bench/", "examples/"))]


@pytest.mark.slow
def test_the_source_distribution_has_the_package_and_no_half_of_the_tests(tmp_path):
    """Faults row 32: tests need folders that a distribution has no use for, so it holds none."""
    copy, out = tmp_path / "sources", tmp_path / "out"
    skipped = shutil.ignore_patterns("__pycache__", "fixtures")
    for name in (*PACKAGES, "tests", "bench", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    command(sys.executable, "-c", build, str(out), cwd=copy)
    (path,) = out.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in packed if name.startswith(("tests", "bench", "examples"))]
    for folder in folders().values():
        wanted = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert wanted <= packed, sorted(wanted - packed)
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= packed
    assert {f"{folder}/py.typed" for folder in PACKAGES} <= packed


def test_the_version_of_the_project_is_that_of_the_package():
    """Faults row 31; ``stiefel`` is a namespace package, which can have no version of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "stiefel.optimizers.__version__"
    version = stiefel.optimizers.__version__
    heading = rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    import stiefel as namespace

    assert getattr(namespace, "__file__", None) is None
    with pytest.raises(ImportError):
        exec("from stiefel import Muon")
    readme = (ROOT / "README.md").read_text()
    assert "stiefel.optimizers.__version__" in readme


@pytest.mark.slow
def test_the_installed_wheel_steps_far_from_the_sources(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command(*pip, "--target", str(target), str(wheel))
    # without site no .pth file is read, so an editable install is not visible; torch still is
    paths = [str(target), str(Path(torch.__file__).parents[1])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command(sys.executable, "-S", "-c", STEP, str(target), cwd=elsewhere, env=variables)
