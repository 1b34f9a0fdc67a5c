"""Random numbers by a hash of their place: the same bits on every device, and nothing to store."""

import torch
from torch import Tensor

from .reference.hashing import STEP_64, mix64

_BITS = 32


def splitmix(count: int, key: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The first outputs of splitmix64 from the state ``key``, made where they are used.

    Args:
        count: how many.
        key: 64 bits, signed or not.
        device: where.

    Returns:
        (count,) int64, all 64 bits of it random.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    key = (key + 2**63) % 2**64 - 2**63
    return mix64(torch.arange(count, dtype=torch.int64, device=device) * STEP_64 + key)


def random_signs(m: int, n: int, key: int, like: Tensor) -> Tensor:
    """An m x n matrix of independent signs +1 and -1, in dtype and on the device of ``like``."""
    words = splitmix(-(-m * n // _BITS), key, like.device)
    shifts = torch.arange(_BITS, dtype=torch.int64, device=like.device)
    bits = words.unsqueeze(1) >> shifts & 1
    return (1 - 2 * bits).to(like.dtype).view(-1)[: m * n].view(m, n)
