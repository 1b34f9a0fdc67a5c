"""Every kernel against its reference, in processes of their own that run Triton's interpreter.

What was launched there is compiled here: the interpreter takes programs that no compiler does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no triton on this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
from helpers.launches import compiled, refused, variants
from helpers.paths import ROOT
from triton.backends.compiler import GPUTarget

HERE = Path(__file__).parent / "interpreted"
TARGET = GPUTarget("cuda", 90, 32)
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(HERE.glob("test_*.py")), ids=lambda path: path.stem[5:])
def test_kernels_equal_their_references(path, tmp_path, tmp_path_factory):
    if VERSION < (3, 7):
        pytest.skip("the interpreter of this triton does not take a numpy of today")
    if VERSION < (3, 8) and path.stem == "test_traffic":
        pytest.skip("the recorder stands in for methods that this triton does not have")
    launches = tmp_path / "launches"
    given = {
        "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "STIEFEL_LAUNCHES": str(launches)
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(
        command, env={**os.environ, **given}, capture_output=True, text=True, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    accepted = tmp_path_factory.getbasetemp().parent / "accepted"  # of all files and processes
    accepted.mkdir(exist_ok=True)
    errors = refused(launches, TARGET, accepted)
    assert not errors, "\n".join(errors)
    assert len(variants(launches)) > 1 or path.stem == "test_traffic"


def test_what_no_compiler_takes_is_refused(tmp_path):
    """A pointer that is said to be of integers cannot be added to as a float is."""
    module = "stiefel.kernels.triton.project"
    arguments = {"parts": ["type", "*fp32"], "out": ["type", "fp32"], "size": ["type", "i32"],
                 "splits": ["type", "i32"], "BN": ["value", 32]}  # fmt: skip
    assert "added_kernel" in str(compiled(module, "added_kernel", arguments, {}, TARGET, tmp_path))
    assert not [*tmp_path.iterdir()]
    arguments["out"] = ["type", "*fp32"]
    for _ in range(2):  # made, and then known
        given = (module, "added_kernel", arguments, {"num_warps": 4}, TARGET, tmp_path)
        assert compiled(*given) is None and len([*tmp_path.iterdir()]) == 1


def test_launches_are_told_apart_by_switches_not_by_tiles(tmp_path):
    path, lines = tmp_path / "launches", []
    for mode, tile, pointer in (
        (0, 16, "*fp32"),
        (1, 16, "*fp32"),
        (1, 32, "*fp32"),
        (1, 32, None),
    ):
        given = ["type", pointer] if pointer else ["value", None]
        arguments = {"X": given, "n": ["value", 1], "MODE": ["value", mode], "BM": ["value", tile]}
        lines.append(json.dumps(["module", "kernel", arguments, {}]))
    path.write_text("\n".join(lines))
    assert len(variants(path)) == 3
