"""Kernels on CPU tensors, in Triton's interpreter: only in a process that was started for it.

With STIEFEL_DEVICE=cuda the same tests run the compiled kernels on a GPU.
"""

import importlib
import os
import pkgutil

import pytest
import torch
from helpers.operands import DEVICE

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS and DEVICE != "cpu":
    raise RuntimeError("the interpreter takes CPU tensors: set TRITON_INTERPRET or STIEFEL_DEVICE")

torch.set_num_threads(1)
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]

if INTERPRETS:
    from helpers.interpreter_bfloat16 import round_like_a_device

    round_like_a_device()
    if "STIEFEL_LAUNCHES" in os.environ:
        from helpers.launches import record

        record(os.environ["STIEFEL_LAUNCHES"])
elif DEVICE != "cpu":
    collect_ignore_glob = ["test_traffic.py"]  # which is about the interpreter
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=INTERPRETS or DEVICE != "cpu")
def scratch_is_bad(monkeypatch):
    """Scratch memory has NaN in it before it is written."""
    from stiefel.kernels import triton

    def bad(X, *shape):
        return X.new_full(shape, float("nan"), dtype=torch.float32)

    for info in pkgutil.iter_modules(triton.__path__):
        module = importlib.import_module(f"{triton.__name__}.{info.name}")
        if hasattr(module, "scratch"):
            monkeypatch.setattr(module, "scratch", bad)
