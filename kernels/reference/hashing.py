"""A hash of 64-bit words, in plain torch."""

from torch import Tensor

# splitmix64's step and factors, as signed integers.
STEP_64 = -7046029254386353131
_MASK = 2**64 - 1
_ROUNDS = ((30, -4658895280553007687), (27, -7723592293110705685))


def mix64(x: Tensor) -> Tensor:
    """Hash words: the next output of splitmix64 from each of them as its state.

    Args:
        x: int64 of any shape.

    Returns:
        int64 of the same shape, all 64 bits of it random.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    x = x + STEP_64
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def mix64_of_int(x: int) -> int:
    """The same of one word, in plain Python.

    Args:
        x: An integer of 64 bits, with or without a sign.

    Returns:
        64 random bits, without a sign.
    """
    x = (x + STEP_64) & _MASK
    for shift, factor in _ROUNDS:
        x = (x ^ x >> shift) * factor & _MASK
    return x ^ x >> 31


def _shifted(x: Tensor, shift: int) -> Tensor:
    """X >> shift for 64-bit words without a sign."""
    return x >> shift & (1 << 64 - shift) - 1
