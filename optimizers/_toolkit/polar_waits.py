"""Polar methods for which the host waits, so that no CUDA graph can hold them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels import POLAR_METHODS


def polar_obstacle(polar: str | Callable[[Tensor], Tensor]) -> str | None:
    """Why a step with a polar method cannot be captured; None if it can.

    Polynomial methods are products alone. Factorizations look at what they have made. A function of
    the user's is for the user to know.

    Args:
        polar: The option ``polar`` of a rule.
    """
    if isinstance(polar, str) and polar in POLAR_METHODS and not POLAR_METHODS[polar].schedule:
        return f"polar={polar!r}, which waits for the device"
    return None
