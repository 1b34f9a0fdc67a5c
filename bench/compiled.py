"""What the compilers make of every kernel for GPUs that are not there: registers, spills, widths.

    python bench/compiled.py                      every case of kernels/triton for every target
    python bench/compiled.py --only gram split    cases or modules whose names hold one of these
    python bench/compiled.py --arch sm_90 gfx942  some targets
    python bench/compiled.py --write              stores the rows in kernels/static.json

A case says how a kernel is launched on large matrices whose pointers, sizes and strides are
multiples of 16. Columns: registers of a thread; spilled bytes (NVIDIA) or registers (AMD); bytes of
stack; shared memory of a block in bytes; matrix instructions by kind and operand; global loads of
less than four bytes; bytes of the widest load and store; asynchronous copies; blocks that fit on
a multiprocessor at once. tests/kernels/test_static.py compares with kernels/static.json. Beside it
programs.json has a digest of the program that a row was compiled from, in triton's first form: the
same program becomes the same row, so it is compiled again only where the tests are to do all.

How many blocks fit: on NVIDIA 65536 registers, given to warps by 256, 64 warps, 32 blocks, 164 KiB
of shared memory (sm_80) or 228, of which each block takes one more, and 512 columns of tensor
memory. On AMD four SIMDs of 512 registers a lane, given by 8, at most 8 waves each, and 64 KiB.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tables
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import stiefel.kernels.triton as package
from stiefel.kernels.triton._launch import ARCHITECTURES, SHARED, Case
from stiefel.kernels.triton._tables import Config

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "static.json"
PROGRAMS = "programs.json"
"""File beside the table that says from which program each row was compiled."""
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VERSION: str = triton.__version__


@dataclass(frozen=True)
class Row:
    """What one kernel became on one target; see the top of this file.

    The last three are not printed and stored in a file of their own: accesses to global memory by
    their bytes, and the digest of the program.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    products: Mapping[str, int]
    narrow: int
    load: int
    store: int
    copies: int
    blocks: int
    loads: Mapping[str, int] = field(default_factory=dict)
    stores: Mapping[str, int] = field(default_factory=dict)
    program: str = ""


SHOWN = [name for name in Row.__dataclass_fields__ if name not in ("loads", "stores", "program")]


class KnownProgram(Exception):
    """Compiling has ended early, at the program whose digest the text is."""


class Program(ASTSource):
    """A kernel whose compilation may end with triton's first form of it."""

    choice = ""
    digest = ""

    @staticmethod
    def stop(digest: str) -> bool:
        """Whether it ends there."""
        return False

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        """The first form; its digest has no names of files and lines, but what it is built for."""
        module = super().make_ir(*args, **kwargs)
        text = f"{self.choice}\n{module.str_nodebug()}"
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        if self.stop(self.digest):
            raise KnownProgram(self.digest)
        return module


# what is compiled ---------------------------------------------------------------------------------


@functools.cache
def cases() -> dict[str, Case]:
    """Every case by its name."""
    found: dict[str, Case] = {}
    for case in (case for _, listed in modules().items() for case in listed):
        if case.name in found:
            raise ValueError(f"two cases are called {case.name!r}: give one another name")
        found[case.name] = case
    return found


@functools.cache
def modules() -> dict[str, list[Case]]:
    """The cases of every module of kernels/triton."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    loaded = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    return {name: list(getattr(module, "CASES", ())) for name, module in loaded.items()}


def chosen(only: Sequence[str] = ()) -> list[str]:
    """Names of the cases that a word of ``only`` is in, or in the name of their module."""
    return [
        case.name
        for module, listed in modules().items()
        for case in listed
        if not only or any(word in case.name or word in module for word in only)
    ]


def constants(case: Case, arch: str, config: Config) -> dict[str, Any]:
    """The arguments that are part of the program: those of the case, and tiles."""
    fixed = {**case.constants, **config.tile_sizes}
    if arch != "gfx942":
        return fixed
    exact = {name for name, value in fixed.items() if str(value).startswith("tf32")}
    return {**fixed, **dict.fromkeys(exact, "ieee")}  # what launch.precision says there


def build(
    case: Case,
    arch: str,
    config: Config | None = None,
    stop: Callable[[str], bool] = Program.stop,
) -> tuple[Any, str, str]:
    """The compiled kernel, what ptxas said, and the program's digest. Never from a cache.

    Raises:
        KnownProgram: If ``stop`` says so of the digest.
    """
    config = config or case.config(arch)
    fixed = constants(case, arch, config)
    names = case.kernel.arg_names
    unknown = [name for name in names if name not in fixed and name not in case.types]
    if unknown:
        raise ValueError(f"case {case.name!r} says nothing of {unknown}: add types or constants")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in fixed and name not in case.loose and case.types[name][0] in "*iu"
    }
    signature = {name: "constexpr" if name in fixed else case.types[name] for name in names}
    fixed = {name: fixed[name] for name in names if name in fixed}
    source = Program(fn=case.kernel, signature=signature, constexprs=fixed, attrs=aligned)
    choice = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    source.choice, source.stop = f"{arch} {choice}", stop  # type: ignore[method-assign]
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            kernel = triton.compile(source, target=TARGETS[arch], options=choice)
    return kernel, log.getvalue(), source.digest


# what is read from it -----------------------------------------------------------------------------


def measure(case: Case, arch: str, config: Config | None = None, known: Row | None = None) -> Row:
    """Compile a case, with the Config of its table or another one, and read the result.

    Args:
        case: What is compiled.
        arch: The target.
        config: Tiles, warps and stages.
        known: A row that is taken without compiling where it is of this very program.
    """
    config = config or case.config(arch)
    try:
        kernel, log, program = build(
            case, arch, config, lambda x: known is not None and x == known.program
        )
    except KnownProgram:
        assert known is not None
        return known
    read = _amd(kernel.asm["amdgcn"]) if arch == "gfx942" else _nvidia(kernel.asm["ptx"], log)
    shared = kernel.metadata.shared
    tensor = getattr(kernel.metadata, "tmem_size", 0) or 0
    blocks = fitting(arch, read["registers"], config.warps, shared, tensor)
    return Row(**read, shared=shared, blocks=blocks, program=program)


def _nvidia(ptx: str, log: str) -> dict[str, Any]:
    used = re.findall(r"Used (\d+) registers", log)
    if not used:
        raise RuntimeError("ptxas gave no register count: look at its log for what it refused")
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    kinds = [
        *(f"mma.sync {x}" for x in re.findall(r"mma\.sync\.aligned\.\S*?\.f32\.(\w+)", ptx)),
        *(f"wgmma {x}" for x in re.findall(r"wgmma\.mma_async\.\S*?\.f32\.(\w+)", ptx)),
        *(f"tcgen05 {x}" for x in re.findall(r"tcgen05\.mma\S*?kind::(\w+)", ptx)),
    ]
    loads = _widths(ptx, r"(?:@\S+ )?ld\.global((?:\.\w+(?:::\w+)*)*)")
    stores = _widths(ptx, r"(?:@\S+ )?st\.global((?:\.\w+(?:::\w+)*)*)")
    bulk = len(re.findall(r"cp\.async\.bulk\.tensor", ptx))
    copied = [
        int(x, 0) for x in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)", ptx)
    ]
    return {
        "registers": max(map(int, used)),
        "spills": max(map(int, spilled), default=0),
        "stack": max(map(int, re.findall(r"(\d+) bytes stack frame", log)), default=0),
        "products": _count(kinds),
        "narrow": sum(width < 4 for width in loads),
        "load": max([*loads, *copied, 16 if bulk else 0]),
        "store": max(stores, default=0),
        "copies": len(copied) + bulk,
        "loads": _count(map(str, loads)),
        "stores": _count(map(str, stores)),
    }


def _widths(ptx: str, pattern: str) -> list[int]:
    """Bytes of every access that has these modifiers: ``.v4.b32`` are 16."""
    found = []
    for text in re.findall(pattern, ptx):
        bits = [int(x) for x in re.findall(r"\.[bfsu](\d+)\b", text)]
        many = [int(x) for x in re.findall(r"\.v(\d+)\b", text)]
        found += [bits[-1] // 8 * (many[0] if many else 1)] if bits else []
    return found


def _amd_widths(text: str, kind: str) -> list[int]:
    bytes_of = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    names = re.findall(rf"(?:global|buffer|flat)_{kind}_[us]?(byte|short|dword(?:x\d)?)", text)
    return [bytes_of[name] for name in names]


def _amd(text: str) -> dict[str, Any]:
    def said(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

    loads, stores = _amd_widths(text, "load"), _amd_widths(text, "store")
    products = re.findall(r"v_mfma_f32_\d+x\d+x\d+_?\w*?_?(bf16|f16|xf32|f32|f64)", text)
    return {
        "registers": said("vgpr_count"),
        "spills": said("vgpr_spill_count") + said("sgpr_spill_count"),
        "stack": said("private_segment_fixed_size"),
        "products": _count(f"v_mfma {operand}" for operand in products),
        "narrow": sum(width < 4 for width in loads),
        "load": max(loads, default=0),
        "store": max(stores, default=0),
        "copies": len(re.findall(r"(?:global|buffer)_load_(?:lds_|\w+ .*\blds\b)", text)),
        "loads": _count(map(str, loads)),
        "stores": _count(map(str, stores)),
    }


def _count(kinds: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))


def fitting(arch: str, registers: int, warps: int, shared: int, tensor: int = 0) -> int:
    """Blocks that a multiprocessor holds at once; the model is at the top of this file."""
    if arch == "gfx942":
        waves = min(8, 512 // _up(max(registers, 1), 8))
        limits = [4 * waves // warps, 16]
        return min([*limits, 65536 // shared] if shared else limits)
    limits = [65536 // (_up(32 * registers, 256) * warps), 64 // warps, 32]
    limits += [(164 if arch == "sm_80" else 228) * 1024 // (shared + 1024)]
    return min([*limits, 512 // tensor] if tensor else limits)


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


# what is asked of it ------------------------------------------------------------------------------

PRODUCTS = {
    "sm_80": {"bf16": "mma.sync bf16", "fp16": "mma.sync f16", "tf32": "mma.sync tf32"},
    "sm_90": {"bf16": "wgmma bf16", "fp16": "wgmma f16", "tf32": "wgmma tf32"},
    "sm_100": {"bf16": "tcgen05 f16", "fp16": "tcgen05 f16", "tf32": "tcgen05 tf32"},
    "gfx942": {"bf16": "v_mfma bf16", "fp16": "v_mfma f16", "tf32": "v_mfma f32"},
}
"""The matrix instruction that a case's ``dot`` asks for."""
SLACK = 0.1
"""Share by which registers may differ from the stored ones."""


def faults(case: Case, arch: str, row: Row) -> list[str]:
    """What is wrong with a row by itself, one phrase each."""
    wanted = PRODUCTS[arch].get(case.dot)
    found = {
        f"spills {row.spills}": row.spills > 0,
        f"{row.shared} bytes of shared memory, {SHARED[arch]} fit": row.shared > SHARED[arch],
        f"no {wanted} but {dict(row.products)}": wanted is not None and wanted not in row.products,
        f"{row.narrow} loads of less than 4 bytes": row.narrow > 0,
        f"no load of {case.load} bytes, the widest is {row.load}": row.load < case.load,
        f"{row.blocks} blocks on a multiprocessor, not {case.blocks}": row.blocks < case.blocks,
    }
    return [text for text, wrong in found.items() if wrong]


def moved(row: Row, old: Row | None) -> list[str]:
    """Where a row has left the stored one, old and new."""
    if old is None:
        return ["there is no stored row"]
    found = {
        "registers": abs(row.registers - old.registers) > SLACK * old.registers,
        "spills": row.spills > old.spills,
        "narrow": row.narrow > old.narrow,
        "load": row.load < old.load,
        "store": row.store < old.store,
        "blocks": row.blocks < old.blocks,
        "products": set(row.products) != set(old.products),
    }
    return [
        f"{name} was {getattr(old, name)}, is {getattr(row, name)}"
        for name, wrong in found.items()
        if wrong
    ]


# all of them --------------------------------------------------------------------------------------


def key(name: str, arch: str) -> str:
    """Of a row in the stored table."""
    return f"{name} / {arch}"


def _one(pair: tuple[str, str]) -> tuple[str, Row | str]:
    name, arch = pair
    try:
        return key(name, arch), measure(cases()[name], arch)
    except Exception as error:  # one kernel that does not compile must not hide the others
        lines = str(error).strip().splitlines() or [""]
        return key(name, arch), f"{type(error).__name__}: {lines[0]}"


def measured(
    names: Sequence[str], archs: Sequence[str] = ARCHITECTURES, workers: int = 2
) -> dict[str, Row | str]:
    """A row, or why there is none, of every case on every target."""
    pairs = [(name, arch) for name in names for arch in archs]
    if workers < 2:
        return dict(map(_one, pairs))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return dict(pool.map(_one, pairs))


def stored(path: Path = TABLE) -> dict[str, Row] | None:
    """The rows of this version of triton with their programs, None where there are none."""
    table, more = (_tables(x).get(VERSION) for x in (path, path.with_name(PROGRAMS)))
    if table is None:
        return None
    return {name: Row(**row, **(more or {}).get(name, {})) for name, row in table.items()}


def write(rows: Mapping[str, Row], path: Path = TABLE) -> None:
    """Store rows; rows of cases that are gone go too, other versions of triton stay."""
    known = {key(name, arch) for name in cases() for arch in ARCHITECTURES}
    for file, is_shown in ((path, True), (path.with_name(PROGRAMS), False)):
        versions = _tables(file)
        table = {name: row for name, row in versions.get(VERSION, {}).items() if name in known}
        table.update(
            {
                name: {k: x for k, x in asdict(row).items() if (k in SHOWN) is is_shown}
                for name, row in rows.items()
            }
        )
        versions[VERSION] = dict(sorted(table.items()))
        _save(versions, file)


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    """Version of triton -> name of a row -> what is stored of it."""
    return json.loads(path.read_text()) if path.exists() else {}


def _save(versions: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One row a line."""
    lines = [
        json.dumps(version) + ": {\n" + ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()
        ) + "\n }"
        for version, rows in sorted(versions.items())
    ]  # fmt: skip
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


def markdown(rows: Mapping[str, Row | str]) -> str:
    """The table."""
    names = ["case / target", *SHOWN]
    lines = [names]
    for name, row in rows.items():
        if isinstance(row, str):
            lines.append([name, row])
            continue
        products = ", ".join(f"{n} {kind}" for kind, n in row.products.items())
        cells = {**asdict(row), "products": products}
        lines.append([name, *(str(cells[field]) for field in names[1:])])
    return tables.markdown(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--write", action="store_true", help=f"update {TABLE.name} and {PROGRAMS}")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    if package.INTERPRETED:
        parser.error("nothing can be compiled under TRITON_INTERPRET=1: unset it")
    names = chosen(args.only)
    if not names:
        parser.error(f"no case has {args.only} in its name: {', '.join(cases())}")
    rows = measured(names, args.arch, args.workers)
    print(markdown(rows))
    good = {name: row for name, row in rows.items() if isinstance(row, Row)}
    bad = [f"{name}: {row}" for name, row in rows.items() if isinstance(row, str)]
    for name, row in good.items():
        wrong = faults(cases()[name.rpartition(" / ")[0]], name.rpartition(" / ")[2], row)
        bad += [f"{name}: {', '.join(wrong)}"] if wrong else []
    print("\n".join(["", *bad] if bad else ["", f"All {len(rows)} rows pass."]))
    if args.write:
        write(good)
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.exit(main())
