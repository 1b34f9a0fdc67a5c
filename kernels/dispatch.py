"""The only place that picks a back end. Today there is one: ``reference``."""

import os
from types import ModuleType

from torch import Tensor

from . import reference


def pick(X: Tensor) -> ModuleType:
    """The module whose functions act on ``X``.

    The environment variable ``STIEFEL_KERNELS`` says ``auto`` (the default) or ``reference``.
    ``triton`` is the name of a back end that this version does not have.

    Args:
        X: the tensor that is to be worked on.

    Returns:
        A module with the functions of ``stiefel.kernels.reference``.

    Raises:
        RuntimeError: if ``STIEFEL_KERNELS=triton``.
        ValueError: if ``STIEFEL_KERNELS`` is none of the three names.
    """
    wish = os.environ.get("STIEFEL_KERNELS", "auto")
    if wish == "triton":
        raise RuntimeError(
            "STIEFEL_KERNELS=triton asks for Triton kernels, which this version does not have: "
            "set it to auto or reference"
        )
    if wish not in ("auto", "reference"):
        raise ValueError(
            f"STIEFEL_KERNELS={wish!r} is unknown: set it to auto, reference or triton"
        )
    return reference
