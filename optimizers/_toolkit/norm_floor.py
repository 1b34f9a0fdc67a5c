"""The smallest norm that a rule divides by: what its option ``eps`` means."""

from __future__ import annotations

import torch


def norm_floor(eps: float | None, dtype: torch.dtype, published: float | None = None) -> float:
    """The floor of norms that ``eps`` asks for.

    Args:
        eps: A number is taken as it is.
        dtype: Dtype in which the norm is taken. None means its smallest normal number: float64's
            for float64, else float32's, since norms of half precision are taken in float32's range.
        published: What None means instead where the published code is to be reproduced.
    """
    if eps is not None:
        return eps
    if published is not None:
        return published
    return torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
