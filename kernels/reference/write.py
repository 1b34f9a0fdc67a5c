"""The one place of plain torch that rounds a weight. Another rounding mode is a change here.

The kernels' counterpart is ``store_weight`` in ``triton/_write.py``; nothing else rounds weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def update_weight_(
    W: Tensor, change: Callable[[Tensor], object], dtype: torch.dtype | None = None
) -> None:
    """Change the values of a weight in the accumulation dtype, and round them into it once.

    Together with ``store_weight`` of the Triton kernels this function is all that rounds weights:
    another rounding mode (stochastic, say) is a change in these two functions.

    Args:
        W: The weight, changed in place: any shape, strides and floating dtype.
        change: Called once with a tensor X of W's shape and values, which it changes in place. X is
            W itself where W has the accumulation dtype, so that nothing is copied.
        dtype: The accumulation dtype. None (default): float32 for bfloat16 and float16, else W's.
    """
    if dtype is None:
        dtype = torch.float32 if W.dtype in _HALF else W.dtype
    if W.dtype == dtype:
        change(W)
        return
    X = W.to(dtype)
    change(X)
    W.copy_(X)  # to nearest, halves to even
