"""What every file and class of the package keeps to: short functions, signatures, docstrings."""

import ast
import inspect
import math
import re
import textwrap

import pytest
import torch
from helpers.paths import ROOT
from torch import nn

import stiefel.kernels
import stiefel.optimizers
from stiefel.optimizers import StackedOptimizer, SymmetryStack
from stiefel.optimizers._driver.param_groups import COMMON
from stiefel.optimizers._lora.pair_groups import PairOptimizer

MAX_LINES, MAX_KERNEL_LINES = 40, 50
SOURCES = sorted([*ROOT.glob("optimizers/**/*.py"), *ROOT.glob("kernels/**/*.py")])
EXPORTS = [
    getattr(package, name)
    for package in (stiefel.optimizers, stiefel.kernels)
    for name in package.__all__
]
OPTIMIZERS = [
    x for x in EXPORTS
    if isinstance(x, type) and issubclass(x, StackedOptimizer) and x is not StackedOptimizer
]  # fmt: skip
DOCUMENTED = [x for x in EXPORTS if inspect.isfunction(x)] + [StackedOptimizer, *OPTIMIZERS]


def by_name(x):
    return x.__name__


# functions stay short -----------------------------------------------------------------------------


def lines_of_code(text, function):
    """Lines of a body that are neither blank, nor a comment, nor the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def long_functions(text):
    """(name, lines, limit) of every function that is too long; a class's ``__init__`` may be."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "__init__":
            limit = MAX_KERNEL_LINES if is_kernel(node) else MAX_LINES
            lines = lines_of_code(text, node)
            if lines > limit:
                yield node.name, lines, limit


def test_no_function_is_too_long():
    wrong = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines of code, at most {limit} are allowed"
        for path in SOURCES
        for name, lines, limit in long_functions(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_lines_of_code_are_those_of_the_body():
    head = 'def f(\n    a,\n    b,\n):\n    """Doc.\n\n    More.\n    """\n'
    body = "".join(f"    # why\n    a = {i}\n\n" for i in range(41))
    (found,) = long_functions(head + body)
    assert found == ("f", 41, MAX_LINES)
    assert not [*long_functions(head + body.replace("    a = 40\n", ""))]
    assert not [*long_functions("@triton.jit\n" + head + body)]
    assert not [*long_functions((head + body).replace("def f", "def __init__"))]


# every option reaches its field -------------------------------------------------------------------

MATRIX, SCALE = (8, 6), 2.0
VALUES = {
    "adjust_lr_fn": "none",
    "alpha": (0.5, {"adjust_lr_fn": "none"}),
    "axis": "cols",
    "base": "row_norm",
    "basis": "dct3",
    "beta2": 0.9,
    "betas": (0.8, 0.99),
    "bias_correction": "global",
    "block_order": "mirror",
    "blocks": ("layer", {"split": "block"}),
    "centred": True,
    "choice": "random",
    "clip_grad_rms": 0.5,
    "compact_alignment": True,
    "compat": "reference",
    "correct_bias": (False, {"compat": "reference"}),
    "count_frozen_steps": True,
    "delta": 1e-3,
    "delta_mode": "relative",
    "density": 0.5,
    "eps": 1e-4,
    "eps_rel": 1e-3,
    "equilibrate": "rows",
    "error_feedback": "int8",
    "factors": "kl",
    "first": "A",
    "floor": 0.1,
    "freeze_steps": 3,
    "gamma": 1.2,
    "gram_beta": (0.9, {"rotation": "eigh"}),
    "init": "svd",
    "init_norm": ("spectral-bound", {"ns_steps": 1}),
    "inner": "lion",
    "interval0": 20,
    "iterations": 3,
    "layer": (2, {"rotation_sharing": "chain"}),
    "limiter": False,
    "limiter_floor": 1e-6,
    "lr_ratio_b": 4.0,
    "matrix_view": "flatten",
    "max_precond_dim": 4,
    "max_rel_step": 0.1,
    "moments": "reset",
    "momentum": 0.8,
    "momentum_kind": "sum",
    "nesterov": True,
    "norm": "l2",
    "norm_betas": (0.8, 0.99),
    "norm_eps": 1e-4,
    "normalize_grad": True,
    "normalize_update": True,
    "ns_coefficients": (2.0, -1.5, 0.5),
    "ns_steps": 3,
    "num_heads": 2,
    "order": "polar_then_row",
    "oversample": 4,
    "pair": "members",
    "polar": "svd",
    "polar_dtype": "float32",
    "polar_norm": "schatten4",
    "power": 2,
    "precondition_frequency": 3,
    "proj_lr_scale": 0.5,
    "proj_type": "left",
    "projection": "random",
    "rank": 3,
    "rank_compensate": True,
    "ratio": 0.2,
    "renormalize": True,
    "report_steps": 2,
    "rescale_visible": False,
    "reset": "changed",
    "rms_target": 0.1,
    "rotation": "polar",
    "rotation_every": 2,
    "rotation_sharing": "global",
    "rounding": "stochastic",
    "row_eps": 1e-4,
    "row_mode": "unit",
    "save_pools": False,
    "scale": 0.5,
    "scale_aware": False,
    "scale_front": True,
    "scaling": "matrix",
    "schedule": "alternate",
    "second_moment": "normuon",
    "seed": 7,
    "shampoo_beta": 0.8,
    "side": "left",
    "sides": "short",
    "sign_threshold": 0.1,
    "sketch": "gaussian",
    "spike_ratio": 2.0,
    "split": "rows",
    "split_sizes": (2, 6),
    "state_free": "sgd",
    "state_free_lr_scale": 0.5,
    "stats": "none",
    "switch_every": 2,
    "total_steps": 200,
    "transform": "fft",
    "update_gap": 50,
    "update_proj_gap": 50,
    "variant": "paper",
    "APOLLO.eps": 1e-4,
    "APOLLO.projection": "gaussian",
    "ARO.adjust_lr_fn": ("match_rms_adamw", {"rms_target": None}),
    "ARO.side": "rows",
    "AdaPreLoRA.variant": "sgd",
    "AltLoRA.second_moment": "elementwise",
    "AuON.nesterov": False,
    "AuON.variant": "repo2026",
    "Fira.alpha": 0.5,
    "FRUGAL.projection": ("random", {"split": "svd"}),
    "Muon.compat": "torch",
    "Muon.inner": "ns5",
    "Muon.nesterov": False,
    "SOAP.basis": "eigh",
    "SOAP.moments": "rotate",
    "SOAPMuon.basis": "eigh",
    "SOAPMuon.beta2": 0.8,
    "SOAPMuon.moments": "rotate",
    "SOAPMuon.nesterov": False,
    "SwitchLoRA.ratio": (None, {}),
    "Trion.polar": "polar_express",
}
"""Option, or class and option: a valid value that is not the default, with what it needs beside."""
OTHER_KEYS = {
    "blocks": lambda value: {"block_of": value},
    "matrix_view": lambda value: {"view": value},
    "split_sizes": lambda value: {"view": "rows:" + ",".join(map(str, value))},
    "num_heads": lambda value: {"view": f"heads:{value}"},
    "sides": lambda value: {"precondition_sides": value},
}
"""Options that stand in a group under another key, as their docstrings say."""
SHARED = {"lr", "weight_decay", *COMMON}
ROLES = {
    "policy": ("adamw", "rule", ["adamw"] * 3),
    "overrides": ({"1.weight": "adamw"}, "rule", ["RowNorm", "adamw", "RowNorm"]),
    "adjust_lr_fn": ("paper:qwen3", "adjust_lr_fn", ["none", "original", "none"]),
}
"""SymmetryStack's options: a value, a key of groups and its values for embedding, hidden, head."""


def parameters(cls):
    """Of the constructor, but self."""
    return [*inspect.signature(cls).parameters.values()]


def options_of(cls):
    return [p for p in parameters(cls)[1:] if p.kind is not p.VAR_KEYWORD and p.name not in SHARED]


CASES = [
    pytest.param(cls, p.name, p.default, id=f"{cls.__name__}-{p.name}")
    for cls in OPTIMIZERS
    if cls is not SymmetryStack  # whose groups are those of other methods
    for p in options_of(cls)
]


def problem(cls):
    """Params for a class, and what it cannot be built without."""
    m, n = MATRIX
    A, B, W, X = (nn.Parameter(torch.ones(shape)) for shape in ((2, n), (m, 2), (m, n), (m, n)))
    needed = {"total_steps": 100} if "total_steps" in inspect.signature(cls).parameters else {}
    if not issubclass(cls, PairOptimizer):
        return [W, X], needed
    pair = [A, B, W.requires_grad_(False)] if needed else [A, B]
    return [{"params": pair}], needed | {"scale": SCALE}


@pytest.mark.parametrize("cls, name, default", CASES)
def test_every_option_reaches_its_field(cls, name, default):
    entry = VALUES.get(f"{cls.__name__}.{name}", VALUES.get(name))
    assert entry is not None, f"give {cls.__name__}'s option {name} a value in VALUES"
    with_others = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], dict)
    value, others = entry if with_others else (entry, {})
    assert value != default, f"{value!r} is the default of {cls.__name__}'s {name}"
    params, needed = problem(cls)
    if value == "layer":  # it is read from names
        params = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    group = cls(params, **{**needed, **others, name: value}).param_groups[0]
    for key, expected in OTHER_KEYS.get(name, lambda value: {name: value})(value).items():
        assert group[key] == expected, f"group[{key!r}] is {group[key]!r}"


@pytest.mark.parametrize("name", ROLES)
def test_every_option_of_symmetry_stack_reaches_its_groups(name):
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12))
    value, key, expected = ROLES[name]
    assert {p.name for p in options_of(SymmetryStack)} == set(ROLES)
    groups = SymmetryStack(model, **{name: value}).param_groups
    found = [
        group.get("rule") if group.get("rule") == "adamw" else group[key]
        for weight in (model[0].weight, model[1].weight, model[2].weight)
        for group in groups
        if any(p is weight for p in group["params"])
    ]
    assert found == expected


# signatures and docstrings agree ------------------------------------------------------------------

STATED = re.compile(r"\(default: ((?:[^()]|\([^()]*\))*)\)")
MARKED = re.compile(r"(``[^`]*``|\S+) \(default\)")
NO_LITERAL = object()


def docstring_entries(text):
    """{name: [text, ...]} of the section Args."""
    lines = inspect.cleandoc(text).splitlines()
    start = lines.index("Args:") + 1 if "Args:" in lines else len(lines)
    entries, name = {}, None
    for line in lines[start:]:
        if line and not line.startswith(" "):
            break
        head = re.match(r" {4}(\S.*?):(?: |$)(.*)", line)
        if head:
            name = head[1]
            entries.setdefault(name, []).append(head[2])
        elif name is not None:
            entries[name][-1] += "\n" + line.strip()
    return entries


def literal(text):
    """The value that a text begins with: up to its end, or to one of its commas or semicolons."""
    text = text.strip()
    quoted = re.match(r"``(.*?)``", text, re.DOTALL)
    ends = [m.start() for m in re.finditer(r"[,;:]\s|\s|$", text)]
    candidates = [quoted[1]] if quoted else [text[:end] for end in reversed(ends)]
    for candidate in candidates:
        if candidate == "math.inf":
            return math.inf
        try:
            return ast.literal_eval(candidate)
        except (ValueError, SyntaxError):
            continue
    return NO_LITERAL


def docstring_faults(x):
    """Where the section Args and the signature of a function or class disagree, in sentences."""
    entries = docstring_entries(x.__doc__)
    given = {"**" * (p.kind is p.VAR_KEYWORD) + p.name: p.default for p in parameters(x)}
    if x is StackedOptimizer:  # which says for all classes what their **options are
        del given["**common"]
        given |= COMMON
    for name in given.keys() - entries.keys():
        yield f"{name} has no entry in Args"
    for name in entries.keys() - given.keys():
        yield f"Args has {name}, which is no parameter"
    for name, texts in entries.items():
        if len(texts) > 1:
            yield f"{name} has {len(texts)} entries"
    for name in given.keys() & entries.keys() - {"**options"}:
        text = entries[name][0]
        stated = [(words, literal(words)) for words in STATED.findall(text)]
        for words, value in stated:
            if value is NO_LITERAL:
                yield f"{name}: (default: {words}) does not begin with a value"
        marked = [(words, literal(words)) for words in MARKED.findall(text)]
        for words, value in [*stated, *marked]:
            if value is not NO_LITERAL and value != given[name]:
                yield f"{name}: the default is said to be {words}, it is {given[name]!r}"


@pytest.mark.parametrize("x", DOCUMENTED, ids=by_name)
def test_signature_and_docstring_agree(x):
    wrong = sorted(docstring_faults(x))
    assert not wrong, "\n".join([f"{x.__name__}:", *wrong])


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=by_name)
def test_every_option_states_its_default(cls):
    entries = docstring_entries(cls.__doc__)
    missing = [
        f"{p.name} = {p.default!r}"
        for p in parameters(cls)
        if p.default is not p.empty
        and not re.search(r"\(default(: .*?)?\)", " ".join(entries.get(p.name, [])), re.DOTALL)
    ]
    assert not missing, f"{cls.__name__}: no (default: ...) of {', '.join(missing)}"


def test_disagreements_are_found():
    def function(a, b=1, c="x", d=(1, 2), **options):
        """Line.

        Args:
            a: First.
            b: Second (default: 2); more.
            c: ``"y"`` (default), or
                ``"x"``.
            d: Pair (default: (1, 2),
                as published).
            e: Nothing.

        Returns:
            f: No entry.
        """

    assert sorted(docstring_faults(function)) == [
        "**options has no entry in Args",
        "Args has e, which is no parameter",
        "b: the default is said to be 2, it is 1",
        """c: the default is said to be ``"y"``, it is 'x'""",
    ]


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=by_name)
def test_every_optimizer_documents_its_source_state_errors_and_limits(cls):
    sections = re.findall(r"^(\w+)[^\n]*:", inspect.cleandoc(cls.__doc__), re.MULTILINE)
    wanted = {"Args", "Raises", "State", "Caveat", "Example"}
    missing = wanted - set(sections)
    assert not missing, f"{cls.__name__} has no section {', '.join(sorted(missing))}"
    assert {"Source", "Sources"} & set(sections), f"{cls.__name__} has no Source"


# positions and keywords ---------------------------------------------------------------------------

TORCH_MUON = [
    "params", "lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps",
    "adjust_lr_fn",
]  # fmt: skip
ADAM_LIKE = ["params", "lr", "betas", "eps", "weight_decay"]
POSITIONAL = {
    "Muon": TORCH_MUON,
    **dict.fromkeys(
        ("APOLLO", "GaLore", "Fira", "FRUGAL", "DCTAdamW", "SOAP", "SwitchLoRA"), ADAM_LIKE
    ),
}
"""Class: its positional parameters. All other classes have ``params`` and ``lr``."""


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=by_name)
def test_positional_parameters_are_those_of_torch(cls):
    found = [p.name for p in parameters(cls) if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert found == POSITIONAL.get(cls.__name__, ["params", "lr"])
    rest = [p.kind for p in parameters(cls)][len(found) :]
    allowed = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert set(rest) <= allowed and rest


def test_muon_has_the_arguments_of_the_installed_torch():
    assert [p.name for p in parameters(torch.optim.Muon)] == TORCH_MUON


def positional_rule_calls(tree):
    """(line, name) of every call of a rule that passes a value by position."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            if re.fullmatch(r"[A-Z]\w*Rule", name):
                yield node.lineno, name


def test_rules_are_built_by_keyword():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in ROOT.glob("optimizers/**/*.py")
        for line, name in positional_rule_calls(ast.parse(path.read_text()))
    ]
    assert not wrong, "positional arguments: " + ", ".join(wrong)
    text = textwrap.dedent("""
        rule = rules.MuonRule(0.95, nesterov=True)
        rule = MuonRule(momentum=0.95)
        rule = MuonRule(*values)
    """)
    assert [*positional_rule_calls(ast.parse(text))] == [(2, "MuonRule"), (4, "MuonRule")]
