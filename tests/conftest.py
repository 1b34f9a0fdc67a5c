"""One thread for all tests: small matrices lose time on more, and bits may depend on the number."""

import sys

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    """How much the fuzzer of ``tests/driver/test_fuzz.py`` does."""
    parser.addoption("--cases", type=int, default=2000, help="number of random cases of the fuzzer")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the fuzzer's cases")


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
