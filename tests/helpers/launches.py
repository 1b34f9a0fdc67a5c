"""What kernels were launched with in the interpreter, and whether a compiler takes that too.

The interpreter runs Python, and so takes programs that no compiler does. Every launch of its tests
is written down as the compiler would see it, once for each choice of pointers and switches, and
compiled afterwards in a process that does not interpret. Many tests launch the same program, which
is compiled once: digests of those that were accepted lie in a folder.
"""

import importlib
import json
import sys
import tempfile

from helpers.paths import BENCH

TYPES = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64",
    "int32": "*i32", "int64": "*i64", "int8": "*i8", "uint8": "*u8", "bool": "*i1",
}  # fmt: skip


def record(path):
    """Write every launch of this process to a file, a line each."""
    from triton.runtime import interpreter

    original, seen = interpreter.GridExecutor.__call__, set()

    def launch(executor, *args, **options):
        line = json.dumps(described(executor, args, options))
        if line not in seen:
            seen.add(line)
            with open(path, "a") as file:
                file.write(line + "\n")
        return original(executor, *args, **options)

    interpreter.GridExecutor.__call__ = launch


def described(executor, args, options):
    """The kernel, what its arguments are (types, or constants), and the options of the launch."""
    given = {**dict(zip(executor.arg_names, args, strict=False)), **options}
    arguments = {
        name: argument(given[name], name in executor.constexprs) for name in executor.arg_names
    }
    choice = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
    return [executor.fn.__module__, executor.fn.__name__, arguments, choice]


def argument(x, constant):
    """["type", name], ["dtype", name] or ["value", x], as the compiler specialises it."""
    x = getattr(x, "value", x) if constant else x
    if hasattr(x, "data_ptr"):
        return ["type", TYPES[str(x.dtype).removeprefix("torch.")]]
    if hasattr(x, "primitive_bitwidth"):
        return ["dtype", str(x)]
    if constant or x is None or (x == 1 and type(x) is int):
        return ["value", x]
    if isinstance(x, bool):
        return ["type", "i1"]
    if isinstance(x, int):
        return ["type", "i32" if -(2**31) <= x < 2**31 else "i64"]
    return ["type", "fp32"]


def variants(path):
    """One launch for every kernel, choice of pointers and switches; tiles and strides aside."""
    from stiefel.kernels.triton._tables import TABLES

    configs = [c for table in TABLES.values() for sizes in table.values() for c in sizes.values()]
    tiles, found = {tile for config in configs for tile in config.tile_sizes}, {}

    def is_switch(name):
        return name.isupper() and name not in tiles

    with open(path) as file:
        for line in file:
            module, kernel, arguments, choice = json.loads(line)
            key = [
                (name, what)
                for name, (_, what) in arguments.items()
                if what is None or str(what).startswith("*") or is_switch(name)
            ]
            found.setdefault(str((module, kernel, key)), (module, kernel, arguments, choice))
    return list(found.values())


def refused(path, target, accepted=None):
    """What a compiler does not take of the launches in a file: descriptions and errors."""
    return [error for launch in variants(path) if (error := compiled(*launch, target, accepted))]


def compiled(module, kernel, arguments, choice, target, accepted=None):
    """None, or why a launch cannot be compiled; the folder has the programs that were accepted."""
    sys.path[:0] = [] if str(BENCH) in sys.path else [str(BENCH)]
    import triton
    from compiled import KnownProgram, Program
    from triton import language

    dtypes = {"fp32": language.float32, "fp16": language.float16, "bf16": language.bfloat16}
    signature = {
        n: what if kind == "type" else "constexpr" for n, (kind, what) in arguments.items()
    }
    constants = {
        name: dtypes[what] if kind == "dtype" else what
        for name, (kind, what) in arguments.items()
        if kind != "type"
    }
    function = getattr(importlib.import_module(module), kernel)
    source = Program(fn=function, signature=signature, constexprs=constants)
    source.choice = f"{triton.__version__} {target} {choice}"
    if accepted is not None:
        source.stop = lambda digest: (accepted / digest).exists()
    try:
        with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
            triton.knobs.cache.dir = cache
            triton.compile(source, target=target, options={**choice, "enable_fp_fusion": True})
        if accepted is not None:
            (accepted / source.digest).touch()
    except KnownProgram:
        return None
    except Exception as error:  # whatever a compiler says
        return f"{module}.{kernel} with {constants}: {error}"
    return None
