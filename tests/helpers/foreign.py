"""A default device and a default dtype that are not those of the tensors at hand."""

import contextlib
import functools
import gc

import torch


@contextlib.contextmanager
def foreign(dtype):
    """Another default device and default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def caches():
    """The tables that the package keeps."""
    return [
        found
        for found in gc.get_objects()
        if type(found) is functools._lru_cache_wrapper
        and (found.__module__ or "").startswith("stiefel")
    ]


def forget():
    """Empty the caches that an earlier run has filled."""
    for cached in caches():
        cached.cache_clear()
