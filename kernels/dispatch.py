"""The only place that picks a back end: plain torch, or Triton kernels.

``STIEFEL_KERNELS`` says ``auto`` (the default: kernels for CUDA and HIP tensors above a size),
``reference`` (never), or ``triton`` (always; on the CPU that needs ``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import reference

PRODUCT_FROM = 256
"""Shorter side up to which torch's own (batched) products are faster than tuned kernels."""
PASS_FROM = 2**12
"""Entries of a matrix below which a pass over memory is all launch, whichever kernel does it."""
MATRICES = 65535
"""How many matrices one launch can have: they are the second axis of its grid."""
WIDE = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def available() -> bool:
    """Whether triton can be imported. Nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def kernels() -> ModuleType:
    """The back end of Triton kernels; triton is imported here and not before."""
    return importlib.import_module(".triton", __package__)


@functools.cache
def modern(index: int) -> bool:
    """Whether a device has the instructions that kernels are tuned for: HIP's, or sm_80 and up."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index)[0] >= 8


def pick(X: Tensor | Sequence[Tensor], work: str = "product") -> ModuleType:
    """The module whose functions act on ``X``.

    Both have the functions of ``stiefel.kernels.reference``. float64 always goes to the reference.
    How many matrices there are does not matter, so that a stack has the bits of each; but above
    65535 it is the reference.

    Args:
        X: (m, n) or (K, m, n), the largest tensor that is to be worked on; or a list of equal
            matrices, of which the first is looked at.
        work: ``"product"`` for products of matrices, ``"pass"`` for passes over memory.

    Returns:
        ``stiefel.kernels.reference`` or ``stiefel.kernels.triton``.

    Raises:
        RuntimeError: if ``STIEFEL_KERNELS=triton`` and there is no triton, or X is on the CPU and
            triton does not interpret.
        ValueError: if ``STIEFEL_KERNELS`` is none of the three names.
    """
    X = X if isinstance(X, Tensor) else X[0]
    wish = os.environ.get("STIEFEL_KERNELS", "auto")
    if wish == "auto":
        pays = X.is_cuda and _pays(X, work) and available() and modern(X.device.index or 0)
        return kernels() if pays else reference
    if wish == "triton":
        return _wanted(X)
    if wish != "reference":
        raise ValueError(
            f"STIEFEL_KERNELS={wish!r} is unknown: set it to auto, reference or triton"
        )
    return reference


def _pays(X: Tensor, work: str) -> bool:
    if not _fits(X):
        return False
    sides = X.shape[-2:]
    return sides.numel() >= PASS_FROM if work == "pass" else min(sides) > PRODUCT_FROM


def _fits(X: Tensor) -> bool:
    """Whether there are kernels for the dtype, and one launch for the batch."""
    return X.dtype in WIDE and X.shape[:-2].numel() <= MATRICES


def _wanted(X: Tensor) -> ModuleType:
    """The kernels, or why there are none."""
    if not available():
        raise RuntimeError(
            "STIEFEL_KERNELS=triton needs the package triton: install it, or set auto or reference"
        )
    if not _fits(X):
        return reference
    if not X.is_cuda and not kernels().INTERPRETED:
        raise RuntimeError(
            f"STIEFEL_KERNELS=triton cannot run on {X.device.type} tensors: set it to auto or "
            "reference, or TRITON_INTERPRET=1 to interpret kernels on the CPU"
        )
    return kernels()
