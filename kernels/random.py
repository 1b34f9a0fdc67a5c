"""Random numbers by a hash of their place: the same bits on every device, and nothing to store."""

import torch
from torch import Tensor

# splitmix64's step and factors, as signed integers.
_STEP = -7046029254386353131
_ROUNDS = ((30, -4658895280553007687), (27, -7723592293110705685))
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
    x = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _STEP + key
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """X >> shift for 64-bit words without a sign."""
    return x >> shift & (1 << 64 - shift) - 1


def random_signs(m: int, n: int, key: int, like: Tensor) -> Tensor:
    """An m x n matrix of independent signs +1 and -1, in dtype and on the device of ``like``."""
    words = splitmix(-(-m * n // _BITS), key, like.device)
    shifts = torch.arange(_BITS, dtype=torch.int64, device=like.device)
    bits = words.unsqueeze(1) >> shifts & 1
    return (1 - 2 * bits).to(like.dtype).view(-1)[: m * n].view(m, n)
