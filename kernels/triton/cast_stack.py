"""One stack of a list of matrices, in another precision; flags of what is finite on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._stacks import Stack
from ..reference.cast_stack import cast_stack as plain
from ._pointer_lists import as_list, is_unsupported
from .reductions import read, read_case


def cast_stack(
    Xs: Stack, dtype: torch.dtype, with_flags: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Kernel of :func:`stiefel.kernels.reference.cast_stack`."""
    if is_unsupported(Xs) or len(Xs) == 0:
        return plain(Xs, dtype, with_flags)
    out, flags, _ = read(as_list(Xs), dtype, "finite" if with_flags else "", 0)
    return out, flags.flatten() if with_flags else None


CASES = [read_case("cast_stack", "bf16", "finite", "fp32", listed=True)]
