"""The one place of plain torch that rounds a weight. Another rounding mode is a change here.

The kernels' counterpart is ``store_weight`` in ``triton/_write.py``. Nothing else rounds weights,
but torch's own AdamW, which trains what is no matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
Change = Callable[[Tensor], object]
"""What changes a tensor in place."""


def update_weight_(
    W: Tensor, change: Change, dtype: torch.dtype | None = None, panel: tuple[slice, ...] = ()
) -> None:
    """Change the values of a weight in the accumulation dtype, and round them into it once.

    Together with ``store_weight`` of the Triton kernels this function is all that rounds weights:
    another rounding mode is a change in these two functions. What such a mode needs belongs to the
    weight and not to the step, so that it is one more argument, None for rounding to nearest:

    - the mode's name;
    - for random bits, per matrix k a key (made of the seed, the parameter's name and the update)
      and the position of its first entry, and two strides: entry (i, j) has the position
      ``start[k] + i * stride_m + j * stride_n`` in the whole parameter, row by row, however the
      parameter is stacked, viewed or cut;
    - for compensated sums, the residual, a tensor of W's shape.

    Callers hand over the whole W and name the panel, so both are cut here, as W is. A matrix that
    stays as it is comes out of ``change`` unchanged, and values of W's dtype are fixed points of
    every mode.

    Args:
        W: The weight, changed in place: any shape, strides and floating dtype.
        change: Called once with a tensor X of the panel's shape and values, which it changes in
            place; W itself it does not touch. X is the panel of W where W has the accumulation
            dtype, so that nothing is copied.
        dtype: The accumulation dtype. None (default): float32 for bfloat16 and float16, else W's.
        panel: Which slices of W change; () (default) for all of it.
    """
    if dtype is None:
        dtype = torch.float32 if W.dtype in _HALF else W.dtype
    _round_into_(W[panel] if panel else W, change, dtype)


def _round_into_(target: Tensor, change: Change, dtype: torch.dtype) -> None:
    """Do what ``update_weight_`` does, with a panel of a weight: the only line that writes weights.

    Another mode than to nearest must call ``change`` in float32 whatever ``dtype`` says: in the
    weight's own dtype every sum of ``change`` is rounded to nearest already.
    """
    if target.dtype == dtype:
        change(target)
        return
    X = target.to(dtype)
    change(X)
    target.copy_(X)  # to nearest, halves to even
