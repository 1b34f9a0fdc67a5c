"""The only place that chooses a back end: plain torch, or Triton kernels.

``STIEFEL_KERNELS`` says ``auto`` (the default: kernels for CUDA and HIP tensors above a size),
``reference`` (never), or ``triton`` (always; on the CPU that needs ``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Gate:
    """From which size of one matrix on kernels take over from torch's own operations.

    Attributes:
        measure: ``"side"``, the shorter one, or ``"entries"``.
        least: The smallest size that kernels take.
        source: The measurement that has set it, or "unmeasured" and what it goes by.
    """

    measure: str
    least: int
    source: str


GATES: Mapping[str, Gate] = {
    "symmetric": Gate(
        "side",
        2048,
        "unmeasured here; others report 0.31 of the speed of torch's product at a side of 512, "
        "0.78 at 1024, and a gain from 2048 on",
    ),
    "product": Gate("side", 257, "unmeasured; published kernels are used above a side of 256"),
    "pass": Gate("entries", 2**12, "unmeasured; below it a pass over memory is all launch"),
}
"""By the kind of work. The rule is never to be slower than torch; ``bench/gpu.py`` measures it."""
MAX_MATRICES = 65535
"""How many matrices one launch can have: they are the second axis of its grid."""
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def is_triton_installed() -> bool:
    """Whether triton can be imported. Nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_backend() -> ModuleType:
    """The back end of Triton kernels; triton is imported here and not before."""
    return importlib.import_module(".triton", __package__)


@functools.cache
def is_supported_gpu(index: int) -> bool:
    """Whether a device has the instructions that kernels are tuned for: HIP's, or sm_80 and up."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index)[0] >= 8


def backend_for(X: Tensor | Sequence[Tensor], work: str = "product") -> ModuleType:
    """The back end that acts on ``X``: a module, ``reference`` or ``triton``, with equal functions.

    float64 always goes to the reference.
    How many matrices there are does not matter, so that a stack has the bits of each; but above
    65535 it is the reference.

    Args:
        X: (m, n) or (K, m, n), the largest tensor that is to be worked on; or a list of equal
            matrices, of which the first is looked at.
        work: Key of :data:`GATES`: ``"product"`` (default) for products of matrices,
            ``"symmetric"`` for those with a symmetric result and iterations made of them,
            ``"pass"`` for passes over memory.

    Returns:
        ``stiefel.kernels.reference`` or ``stiefel.kernels.triton``.

    Raises:
        RuntimeError: if ``STIEFEL_KERNELS=triton`` and there is no triton, or X is on the CPU and
            triton does not interpret.
        ValueError: if ``STIEFEL_KERNELS`` is none of the three names.
    """
    X = X if isinstance(X, Tensor) else X[0]
    setting = os.environ.get("STIEFEL_KERNELS", "auto")
    if setting == "auto":
        # the cheapest questions first: the step of a tiny matrix takes microseconds
        if not (X.is_cuda and is_worthwhile(X, work) and is_triton_installed()):
            return reference
        return triton_backend() if is_supported_gpu(X.device.index or 0) else reference
    if setting == "triton":
        return _forced_backend(X)
    if setting != "reference":
        raise ValueError(
            f"STIEFEL_KERNELS={setting!r} is unknown: set it to auto, reference or triton"
        )
    return reference


def is_worthwhile(X: Tensor, work: str) -> bool:
    """Whether kernels are expected to be faster than torch's own operations on X."""
    if not _is_supported(X):
        return False
    gate, sides = GATES[work], X.shape[-2:]
    return (min(sides) if gate.measure == "side" else sides.numel()) >= gate.least


def _is_supported(X: Tensor) -> bool:
    """Whether there are kernels for the dtype, and one launch for the batch."""
    return X.dtype in SUPPORTED_DTYPES and X.shape[:-2].numel() <= MAX_MATRICES


def _forced_backend(X: Tensor) -> ModuleType:
    """The back end under ``STIEFEL_KERNELS=triton``; raises where kernels cannot run."""
    if not is_triton_installed():
        raise RuntimeError(
            "STIEFEL_KERNELS=triton needs the package triton: install it, or set auto or reference"
        )
    if not _is_supported(X):
        return reference
    if not X.is_cuda and not triton_backend().INTERPRETED:
        raise RuntimeError(
            f"STIEFEL_KERNELS=triton cannot run on {X.device.type} tensors: set it to auto or "
            "reference, or TRITON_INTERPRET=1 to interpret kernels on the CPU"
        )
    return triton_backend()


def backend_summary() -> str:
    """Say in one line which back end acts on this machine, without importing triton.

    Returns:
        The line, such as ``"plain torch: no GPU here that the Triton kernels support"``.
    """
    setting = os.environ.get("STIEFEL_KERNELS", "auto")
    if setting not in ("auto", "reference", "triton"):
        return f"STIEFEL_KERNELS={setting!r} is unknown: set it to auto, reference or triton"
    if setting == "reference":
        return "plain torch everywhere (STIEFEL_KERNELS=reference)"
    if not is_triton_installed():
        text = "plain torch everywhere: triton is not installed"
        return f"{text}, STIEFEL_KERNELS=triton raises" if setting == "triton" else text
    if setting == "triton":
        return "Triton wherever it can run, else an error (STIEFEL_KERNELS=triton)"
    supported = [i for i in range(torch.cuda.device_count()) if is_supported_gpu(i)]
    if not supported:
        return "plain torch: no GPU here that the Triton kernels support"
    return f"Triton on {', '.join(f'cuda:{i}' for i in supported)} for large weights, else torch"
