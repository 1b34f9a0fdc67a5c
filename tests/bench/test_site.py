"""The site: what its pages take from elsewhere is there, and every block of Python runs."""

import importlib.util
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT
from helpers.reader import SmallLlama, namespace_of, run_blocks
from torch import nn
from torch.nn import functional as F

import stiefel.optimizers as package
from stiefel.optimizers import StackedOptimizer

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
CLASSES = {
    name
    for name in package.__all__
    if isinstance(getattr(package, name), type)
    and issubclass(getattr(package, name), StackedOptimizer)
} - {"StackedOptimizer"}


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expanded(hooks, page):
    """A page with all that it takes from elsewhere."""
    at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return hooks.on_page_markdown((DOCS / page).read_text(encoding="utf-8"), page=at)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "sharding.md"])
def test_every_python_block_runs_in_order(page, hooks, monkeypatch, capsys):
    """As a reader would run it; sharding.md needs processes and has a test of its own."""
    torch.manual_seed(0)
    names = namespace_of(monkeypatch)
    names["batches"] = [names["inputs"]] * 2
    names["loss"] = lambda model, batch: F.mse_loss(model(batch), torch.zeros(()))
    text = expanded(hooks, page)
    assert "<!--" not in text
    if page == "methods/symmetrystack.md":  # it names weights of a language model
        names["model"] = SmallLlama(SimpleNamespace())
        names["model"].layer = nn.ModuleDict({"o_proj": nn.Linear(32, 32)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = run_blocks(text, str(DOCS / page), names)
    if page.startswith("methods/"):
        assert count >= 1


def test_every_class_has_a_page_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"methods/(\w+)\.md", contents))
    assert listed == {name.lower() for name in CLASSES}
    for name in CLASSES:
        page = (DOCS / "methods" / f"{name.lower()}.md").read_text()
        assert page.startswith(f"# {name}\n") and f"::: stiefel.optimizers.{name}\n" in page
        assert f"<!-- facts: {name} -->" in page and f"<!-- box: {name} -->" in page


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == set(PAGES)


def test_every_recipe_is_on_the_page_of_trainers():
    page = (DOCS / "trainers.md").read_text()
    scripts = {path.stem for path in (ROOT / "examples" / "trainers").glob("*.py")}
    assert set(re.findall(r"trainers/(\w+)\.py(?: \|.*)? -->", page)) == scripts - {"tiny", "run"}


def test_a_page_that_asks_for_what_is_not_there_is_an_error(hooks):
    for call in (
        lambda: hooks.facts("NoSuchClass", "index.md"),
        lambda: hooks.box("NoSuchClass"),
        lambda: hooks.section("README.md", "No such heading", "index.md"),
        lambda: hooks.script("examples/trainers/ema.py", "def made", "No such line"),
    ):
        with pytest.raises(ValueError, match=r"NoSuch|No such"):
            call()


def test_links_to_files_outside_of_the_site_become_names(hooks):
    text = "[notes](bench/NOTES.md), [a page](docs/sharding.md#plans), [x](https://x.y)"
    found = hooks.relink(text, "README.md", "methods/muon.md")
    assert found == "notes (`bench/NOTES.md`), [a page](../sharding.md#plans), [x](https://x.y)"
    assert (
        hooks.relink("[Results](#results)", "README.md", "lora.md") == "[Results](tested.md#loss)"
    )


def test_pictures_that_pages_show_are_drawn():
    drawn = (DOCS / "pictures.py").read_text()
    shown = {
        name
        for page in PAGES
        for name in re.findall(r"pictures/([\w-]+)\.png", (DOCS / page).read_text())
    }
    methods = set(re.findall(r'^    "(\w+)": \(', drawn, re.MULTILINE))
    tour = {"valley", "matrix"}  # of examples/tour.py
    assert shown - tour == {"polar", "energy", *(f"step-{name}" for name in methods)}
