"""One thread for all tests: small matrices lose time on more, and bits may depend on the number."""

import os
import sys

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    """How much the fuzzer of ``tests/driver/test_fuzz.py`` does, and how much of grids runs."""
    parser.addoption("--cases", type=int, default=2000, help="number of random cases of the fuzzer")
    parser.addoption("--full-grids", action="store_true", help="every case of every grid")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the fuzzer's cases")


BREADTH = ("bench", "sharding", "driver/test_torch_harness.py", "driver/test_values.py")
"""Folders and files below tests that guard breadth, or run commands: no part of the core suite."""
CORE = ("bench/test_docs.py", "bench/test_readme.py", "bench/test_site.py")
"""Files of these that are a part."""


def pytest_configure(config):
    """Processes that tests start know it too."""
    if config.getoption("--full-grids"):
        os.environ["STIEFEL_FULL_GRIDS"] = "1"


def pytest_itemcollected(item):
    """Whole folders are slow."""
    path = item.nodeid.partition("tests/")[2]
    if path.startswith(BREADTH) and not path.startswith(CORE):
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what adds nothing to a grid, unless tests are asked for by name or all of them."""
    is_named = config.option.keyword or any("::" in arg for arg in config.args)
    if is_named or config.getoption("lf", False) or os.environ.get("STIEFEL_FULL_GRIDS"):
        return
    from helpers.covering import left_out

    gone = {*left_out(items)}
    if gone:
        config.hook.pytest_deselected(items=[item for item in items if item in gone])
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def one_thread():
    """A run of an example sets the number of threads; the next test begins with one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_rank_is_left():
    """Processes of ``helpers/ranks.py`` end with the session, whatever became of the tests."""
    yield
    ranks = sys.modules.get("helpers.ranks")
    if ranks is not None:
        ranks.close()
