"""What the compilers make of every kernel: nothing spills, loads are wide, tensor cores are used.

Nothing runs here. Each case of kernels/triton is compiled for each target, and measured by
bench/compiled.py. A row that has moved away from kernels/static.json fails; if that is as it should
be, ``python bench/compiled.py --write`` stores it. The first form that triton makes of a case is
made always; if that is the program of the stored row, the rest of the compilers would give that row
again, so only one case of each kernel goes through them. With ``--full-grids`` all do.
"""

import ast
import dataclasses
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
from helpers.paths import BENCH, ROOT

pytest.importorskip("triton", reason="there is no triton on this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

sys.path.append(str(BENCH))

import compiled
import triton
from triton.runtime.errors import OutOfResources

from stiefel.kernels.triton import _launch as launch
from stiefel.kernels.triton._launch import ARCHITECTURES, SHARED, candidates_of
from stiefel.kernels.triton._tables import TABLES, Config

pytestmark = pytest.mark.slow
CASES = compiled.cases()
STORED = compiled.stored()
ONE_OF_EACH = {
    (name, ARCHITECTURES[i % len(ARCHITECTURES)])
    for i, name in enumerate(
        {case.kernel.fn.__name__: case.name for case in CASES.values()}.values()
    )
}
"""A case of every kernel, on targets by turns: compiled whatever is stored."""


@pytest.fixture
def measured(request):
    """The row of a case on a target."""

    def measure(name, arch):
        is_always = request.config.getoption("--full-grids") or (name, arch) in ONE_OF_EACH
        known = None if is_always else (STORED or {}).get(compiled.key(name, arch))
        return compiled.measure(CASES[name], arch, known=known)

    return measure


# every case on every target -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_compiled(name, arch, measured):
    row = measured(name, arch)
    wrong = compiled.faults(CASES[name], arch, row)
    if STORED is not None:
        wrong += compiled.moved(row, STORED.get(compiled.key(name, arch)))
    assert not wrong, f"{compiled.key(name, arch)}: {'; '.join(wrong)}\n{row}"


def test_the_table_has_the_cases():
    if STORED is None:
        pytest.skip(f"no row of triton {compiled.VERSION} is stored: registers are not compared")
    wanted = {compiled.key(name, arch) for name in CASES for arch in ARCHITECTURES}
    gone, new = sorted(set(STORED) - wanted), sorted(wanted - set(STORED))
    assert not gone and not new, f"run bench/compiled.py --write: gone {gone}, new {new}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("stochastic")])
def test_random_bits_load_nothing_but_keys(name, arch, measured):
    """All other accesses to memory are those of the case that is rounded to nearest."""
    plain = name.removesuffix(" stochastic")
    if plain not in CASES:
        pytest.skip("no case of this dtype is rounded to nearest")
    row, old = measured(name, arch), measured(plain, arch)
    assert row.stores == old.stores and row.loads
    loads, old_loads = Counter(row.loads), Counter(old.loads)
    assert 0 <= loads.pop("4", 0) - old_loads.pop("4", 0) <= 2  # two where a loop is cut open
    assert loads == old_loads


def test_a_program_that_is_known_is_not_compiled_again(monkeypatch):
    """Names of files and lines are no part of a program, its options and constants are."""
    case, config = CASES["gram bf16"], CASES["gram bf16"].config("sm_90")
    row = compiled.measure(case, "sm_90")
    assert row.program and compiled.measure(case, "sm_90", known=row) is row
    other = dataclasses.replace(row, registers=1)
    assert compiled.measure(case, "sm_90", known=other) is other
    for changed, arch, tiles in (
        (case, "sm_90", dataclasses.replace(config, warps=2 * config.warps)),
        (case, "sm_90", dataclasses.replace(config, stages=config.stages + 1)),
        (
            case,
            "sm_90",
            dataclasses.replace(config, tiles=CASES["gram tf32"].config("sm_80").tiles),
        ),
        (case, "sm_80", config),
        (CASES["gram fp16"], "sm_90", config),
        (dataclasses.replace(case, loose=tuple(case.types)), "sm_90", config),
    ):
        with pytest.raises(compiled.KnownProgram) as known:
            compiled.build(changed, arch, tiles, stop=lambda digest: True)
        assert str(known.value) != row.program


# the gate shuts -----------------------------------------------------------------------------------


def test_a_spilling_kernel_is_caught():
    config = Config((("BM", 256), ("BK", 64)), warps=4, stages=3)
    row = compiled.measure(CASES["gram bf16"], "sm_90", config)
    wrong = compiled.faults(CASES["gram bf16"], "sm_90", row)
    assert row.spills > 0 and wrong == [f"spills {row.spills}"]


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_lost_alignment_is_caught(arch):
    case = CASES["gram bf16"]
    loose = dataclasses.replace(case, loose=tuple(case.types))
    row = compiled.measure(loose, arch)
    wrong = compiled.faults(case, arch, row)
    assert row.narrow > 0 and row.load < 16
    assert f"{row.narrow} loads of less than 4 bytes" in wrong
    assert f"no load of 16 bytes, the widest is {row.load}" in wrong


def test_lost_tensor_cores_are_caught():
    case = CASES["gram tf32"]
    plain = dataclasses.replace(case, constants={**case.constants, "PRECISION": "ieee"})
    row = compiled.measure(plain, "sm_80", Config((("BM", 32), ("BK", 32)), 4, 2))
    assert row.products == {}
    assert compiled.faults(case, "sm_80", row) == ["no mma.sync tf32 but {}"]


def test_a_moved_row_is_caught():
    row = compiled.Row(110, 0, 0, 65536, {"wgmma bf16": 4}, 0, 16, 16, 32, 2)
    old = dataclasses.replace
    assert compiled.moved(row, row) == [] == compiled.moved(row, old(row, registers=101))
    assert compiled.moved(row, old(row, registers=99)) == ["registers was 99, is 110"]
    assert compiled.moved(row, old(row, registers=130)) == ["registers was 130, is 110"]
    assert compiled.moved(row, old(row, store=32, blocks=3)) == [
        "store was 32, is 16", "blocks was 3, is 2",
    ]  # fmt: skip
    assert compiled.moved(old(row, spills=8), row) == ["spills was 0, is 8"]
    assert compiled.moved(row, None) == ["there is no stored row"]
    case = dataclasses.replace(CASES["gram bf16"], blocks=3)
    crowded = old(row, shared=SHARED["sm_90"] + 1)
    assert compiled.faults(case, "sm_90", crowded) == [
        f"{SHARED['sm_90'] + 1} bytes of shared memory, {SHARED['sm_90']} fit",
        "2 blocks on a multiprocessor, not 3",
    ]


def test_the_table_is_written_and_read(tmp_path):
    path = tmp_path / "static.json"
    assert compiled.stored(path) is None
    row = compiled.Row(110, 0, 0, 65536, {"wgmma bf16": 4}, 0, 16, 16, 32, 2)
    path.write_text('{"0.0": {"gram bf16 / sm_90": {}}}')
    assert compiled.stored(path) is None
    first, second = compiled.key("gram bf16", "sm_80"), compiled.key("gram bf16", "sm_90")
    compiled.write({first: row, "no such case / sm_80": row}, path)
    compiled.write({second: row}, path)
    assert compiled.stored(path) == {first: row, second: row}
    assert '"0.0"' in path.read_text()


def test_how_many_blocks_fit():
    assert compiled.fitting("sm_90", 109, 8, 131072) == 1  # by shared memory
    assert compiled.fitting("sm_90", 109, 8, 65536) == 2
    assert compiled.fitting("sm_90", 129, 8, 0) == 1  # by registers
    assert compiled.fitting("sm_80", 16, 8, 0) == 8  # by warps
    assert compiled.fitting("sm_100", 64, 4, 1024, 256) == 2  # by tensor memory
    assert compiled.fitting("gfx942", 128, 8, 32768) == 2
    assert compiled.fitting("gfx942", 129, 8, 0) == 1
    assert compiled.fitting("gfx942", 32, 1, 65536) == 1


# nothing is left out ------------------------------------------------------------------------------


def jitted(tree):
    """The functions of a module under triton.jit."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def called(node):
    """Names that are called in a tree, and names that are launched: ``kernel[grid](...)``."""
    calls = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    names = {func.id for func in calls if isinstance(func, ast.Name)}
    names |= {func.attr for func in calls if isinstance(func, ast.Attribute)}
    grids = [func.value for func in calls if isinstance(func, ast.Subscript)]
    return names, {grid.id for grid in grids if isinstance(grid, ast.Name)}


def test_every_launched_kernel_has_a_case():
    paths = sorted((ROOT / "kernels" / "triton").glob("*.py"))
    trees = [ast.parse(path.read_text()) for path in paths]
    functions = [function for tree in trees for function in jitted(tree)]
    names = {function.name for function in functions}
    inlined = set().union(*(called(function)[0] for function in functions))
    launched = set().union(*(called(tree)[1] for tree in trees)) & names
    wanted = launched | (names - inlined)
    listed = {case.kernel.fn.__name__ for case in CASES.values()}
    assert len(wanted) > 1 and not wanted - listed, f"no Case for {sorted(wanted - listed)}"


def tables():
    """Names of tables with a case of each, and the most bytes an operand's entry may have."""
    for name in TABLES:
        mine = [case for case in CASES.values() if case.table == name]
        yield name, mine, 4 if any(case.dot == "tf32" for case in mine) else 2


@pytest.mark.parametrize("say", ["old", "new", "all"])
def test_float32_is_multiplied_as_torch_may_do_it(say):
    """However a user said it: the getter of the old interface raises after the new one was used."""
    code = {
        "old": "torch.backends.cuda.matmul.allow_tf32 = True",
        "new": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "all": "torch.backends.fp32_precision = 'tf32'",
    }[say]
    run = (
        "import torch; from stiefel.kernels.triton._launch import precision; "
        "X = torch.ones(2, 2); assert precision(X) == precision() == 'tf32x3'; "
        f"{code}; assert precision(X) == precision() == 'tf32'; "
        "assert precision(X.bfloat16()) == 'tf32'"
    )
    subprocess.run([sys.executable, "-c", run], check=True)


def test_every_table_is_used():
    for name, mine, _ in tables():
        assert mine, f"no Case takes its Config from table {name!r}"
        for target in (*ARCHITECTURES, "interpreted"):
            for config in TABLES[name][target].values():
                for tile, value in config.tiles:
                    assert all(tile in case.kernel.arg_names for case in mine), (name, tile)
                    assert value & (value - 1) == 0, f"{name}: {tile} = {value} is no power of two"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_candidate_fits_shared_memory(arch):
    checked, most = 0, {**SHARED, "sm_80": 163 * 1024}[arch]  # where less fits, less is timed
    for name, _, size in tables():
        for config in candidates_of(name, arch):
            tile = config.tile_sizes
            if "BK" not in tile:  # not a product of two operands that are streamed
                continue
            sides = [value for side, value in tile.items() if side != "BK"]
            streamed = sum(sides) if len(sides) > 1 else 2 * sides[0]
            used = config.stages * streamed * tile["BK"] * size
            assert used <= most, f"{name} {config} takes {used} bytes of {most}"
            checked += 1
    assert checked


def test_what_does_not_fit_a_smaller_device_is_never_chosen(monkeypatch):
    def crowded(run, **_):
        raise OutOfResources(114688, 101376, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", crowded)
    assert launch._milliseconds(lambda: None) == math.inf
