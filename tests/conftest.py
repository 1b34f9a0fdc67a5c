"""One thread for all tests: small matrices lose time on more, and bits may depend on the number."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """A run of an example sets the number of threads; the next test begins with one again."""
    yield
    torch.set_num_threads(1)
