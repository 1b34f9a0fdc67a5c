"""The only place that picks a back end: plain torch, or Triton kernels.

``STIEFEL_KERNELS`` says ``auto`` (the default: kernels for CUDA and HIP tensors above a size),
``reference`` (never), or ``triton`` (always; on the CPU that needs ``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from . import reference

PRODUCT_FROM = 256
"""Shorter side up to which torch's own (batched) products are faster than tuned kernels."""
PASS_FROM = 2**14
"""Entries below which a pass over memory is all launch, whichever kernel does it."""
WIDE = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def available() -> bool:
    """Whether triton can be imported. Nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def kernels() -> ModuleType:
    """The back end of Triton kernels; triton is imported here and not before."""
    return importlib.import_module(".triton", __package__)


def pick(X: Tensor, work: str = "product") -> ModuleType:
    """The module whose functions act on ``X``.

    Both have the functions of ``stiefel.kernels.reference``. float64 always goes to the reference.

    Args:
        X: (m, n) or (K, m, n), the largest tensor that is to be worked on.
        work: ``"product"`` for products of matrices, ``"pass"`` for passes over memory.

    Returns:
        ``stiefel.kernels.reference`` or ``stiefel.kernels.triton``.

    Raises:
        RuntimeError: if ``STIEFEL_KERNELS=triton`` and there is no triton, or X is on the CPU and
            triton does not interpret.
        ValueError: if ``STIEFEL_KERNELS`` is none of the three names.
    """
    wish = os.environ.get("STIEFEL_KERNELS", "auto")
    if wish == "auto":
        return kernels() if X.is_cuda and _pays(X, work) and available() else reference
    if wish == "triton":
        return _wanted(X)
    if wish != "reference":
        raise ValueError(
            f"STIEFEL_KERNELS={wish!r} is unknown: set it to auto, reference or triton"
        )
    return reference


def _pays(X: Tensor, work: str) -> bool:
    if X.dtype not in WIDE:
        return False
    return X.numel() >= PASS_FROM if work == "pass" else min(X.shape[-2:]) > PRODUCT_FROM


def _wanted(X: Tensor) -> ModuleType:
    """The kernels, or why there are none."""
    if not available():
        raise RuntimeError(
            "STIEFEL_KERNELS=triton needs the package triton: install it, or set auto or reference"
        )
    if X.dtype not in WIDE:
        return reference
    if not X.is_cuda and not kernels().INTERPRETED:
        raise RuntimeError(
            f"STIEFEL_KERNELS=triton cannot run on {X.device.type} tensors: set it to auto or "
            "reference, or TRITON_INTERPRET=1 to interpret kernels on the CPU"
        )
    return kernels()
