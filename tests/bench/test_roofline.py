"""What the roofline promises of kernels: a process of its own counts in the interpreter."""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import BENCH

triton = pytest.importorskip("triton", reason="there is no triton on this platform")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    reason = "the recorder stands in for methods that this triton does not have"
    pytest.skip(reason, allow_module_level=True)
ROOFLINE = BENCH / "roofline.py"
STEPS = ("GaLore r 128", "Fira r 128", "FRUGAL columns 1/4", "FRUGAL svd r 128")
SYMMETRIC = ("gram", "symmetric_poly", "scale_and_apply")
SQUARE = 4096
GIVEN = {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Text and numbers of steps of square weights.

    A size that is not used is counted too, program by program: the polynomial has to foretell it.
    """
    out = tmp_path_factory.mktemp("roofline") / "roofline.json"
    command = [
        sys.executable, str(ROOFLINE), "--only", *STEPS, *SYMMETRIC, "--shapes", "4096x4096",
        "--check", STEPS[0], "--detail", "--json", str(out),
    ]  # fmt: skip
    return run(command, out.parent), json.loads(out.read_text())


def run(command, place):
    """What a command that succeeds prints."""
    done = subprocess.run(
        command, env={**os.environ, **GIVEN}, capture_output=True, text=True, check=False,
        cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_fused_steps_move_at_most_half_the_bytes(counted, name):
    step = counted[1]["steps"][name]
    assert step["ours"]["bytes"] <= 0.5 * step["plain"]["bytes"]
    works = step["shapes"]["4096x4096"]["works"]["ours"]
    kernels = sum(work["read"] + work["written"] for work in works if work["kernel"])
    assert kernels >= 6 * SQUARE**2  # the gradient, and the weight both ways


@pytest.mark.slow
def test_symmetric_newton_schulz_saves_over_a_quarter_of_the_flops(counted):
    rows = counted[1]["operations"]
    ours, plain = (
        sum(rows[name][who]["product_flops"] for name in SYMMETRIC) for who in ("ours", "plain")
    )
    assert plain == 6 * SQUARE**3
    assert ours == 2 * SQUARE**3 + 2 * SQUARE**2 * (SQUARE + 128)  # tiles of 128 on the diagonal
    assert ours <= 0.72 * plain


@pytest.mark.slow
def test_tables_say_what_is_counted_and_what_is_a_bound(counted):
    text, found = counted
    assert "COUNTED" in text and "BOUND" in text and "nothing here was\ntimed" in text
    for name in (*STEPS, *SYMMETRIC):
        assert f"| {name}" in text
    for rows in (found["steps"], found["operations"]):
        for row in rows.values():
            for who in ("ours", "plain"):
                seconds = row[who]["seconds"]
                assert seconds["A100"] > seconds["H100"] > seconds["B200"] > 0
                assert row[who]["issued_bytes"] >= row[who]["bytes"] > 0
