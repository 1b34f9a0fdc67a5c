"""The page on how the optimizers are built: its rule runs, and what it names exists."""

import re

import torch
from helpers.paths import ROOT

from stiefel.optimizers._core.rule import RULE_CLASSES

FOLDER = ROOT / "optimizers"
PAGE = (FOLDER / "README.md").read_text()
MOST_LINES = 200


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def files_of_the_tree():
    """Paths below ``optimizers/`` that the tree lists."""
    folder, paths = "", []
    for line in re.search(r"```\n(.*?)```", section("Where is what"), re.DOTALL)[1].splitlines():
        if re.match(r"\w+/", line):
            folder = line.split("/")[0] + "/"
            continue
        prefix = folder if line.startswith("  ") else ""
        names = re.match(r"\s*((?:\w+\.py\s*)+)", line)[1].split()
        paths += [prefix + name for name in names]
    return paths


def test_the_tree_lists_every_file_once():
    listed = files_of_the_tree()
    found = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == {path for path in found if not path.endswith("__init__.py")}


def test_every_file_and_function_of_the_page_exists():
    source = "".join(path.read_text() for path in FOLDER.rglob("*.py"))
    source += "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    page = PAGE.partition("\n## Choices in the tree")[0]  # which names files that do not exist
    names = {path.name for path in [*FOLDER.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]}
    for path, text in re.findall(r"`([\w/]+\.py)(?:: ([^`]+))?`", page):
        if path.endswith("NAME.py"):
            continue  # that of the reader's method
        assert path in names or (ROOT / path).exists() or (FOLDER / path).exists(), path
        for name in re.findall(r"\w+", text or ""):
            assert re.search(rf"(def|class) {name}\b", source), f"{path}: {name}"
    life = section("The life of a gradient")
    for name in re.findall(r"`(_[a-z_]+)`", life):
        assert f"def {name}(" in source, name


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= MOST_LINES


def test_the_rule_on_the_page_runs():
    code = re.search(r"```python\n(.*?)```", section("The contract"), re.DOTALL)[1]
    names = {"__name__": "contract_page"}
    try:
        exec(compile(code, "optimizers/README.md", "exec"), names)
        params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
        optimizer = names["Sign"](params, lr=0.1, weight_decay=0.5)
        W, M = [torch.ones(3, 4) for _ in params], [torch.zeros(3, 4) for _ in params]
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for k, p in enumerate(params):
                p.grad = torch.randn(3, 4, generator=generator)
                M[k] = torch.lerp(M[k], p.grad, 1 - 0.9)
                W[k] = (1 - 0.1 * 0.5) * W[k] - 0.1 * M[k].sign()
            optimizer.step()
        for p, expected in zip(params, W, strict=True):
            torch.testing.assert_close(p.detach(), expected)
        assert [row.rule for row in optimizer.assignment()] == ["Sign", "Sign"]
        assert set(optimizer.state[params[0]]) == {"momentum_buffer", "step"}
    finally:
        RULE_CLASSES.pop("Sign", None)
