"""Keys of random draws: every draw depends on the seed, the matrix and the update, nothing else.

Numbers are drawn on the CPU from generators that live for one draw, so they are equal on every
device, in every process and after a resume, and the global generator is never touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .svd import work_dtype

_UINT64_MAX = 2**64 - 1


def splitmix64(x: int) -> int:
    """Hash a 64-bit integer: one output of the splitmix64 generator in state x.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    x = (x + 0x9E3779B97F4A7C15) & _UINT64_MAX
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64_MAX
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _UINT64_MAX
    return x ^ (x >> 31)


@dataclass(frozen=True)
class StackRNG:
    """Random numbers of one refresh of a stack, by seed, matrix and update.

    Attributes:
        seed: The rule's ``seed``.
        indices: One key per matrix (``Member.indices``).
        t: Number of the update that refreshes.
    """

    seed: int
    indices: tuple[int, ...]
    t: int

    def key(self, k: int) -> int:
        """64 random bits for matrix k of the stack."""
        key = self.seed
        for part in (self.indices[k], self.t):
            key = splitmix64(key) ^ part
        return splitmix64(key)

    def generator(self, k: int) -> torch.Generator:
        """A new CPU generator for matrix k of the stack."""
        return torch.Generator("cpu").manual_seed(self.key(k) % 2**63)

    def gaussian(self, k: int, G: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
        """Draw independent normal matrices of these shapes in fp32, in the work dtype of G."""
        generator = self.generator(k)
        draws = [
            torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            for shape in shapes
        ]
        return [draw.to(work_dtype(G)) for draw in draws]


def random_order(count: int, generator: torch.Generator) -> Tensor:
    """The numbers below ``count`` in random order, drawn on the generator's device."""
    return torch.randperm(count, generator=generator, device=generator.device, dtype=torch.int64)
