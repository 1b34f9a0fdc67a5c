"""Keys of random draws: every draw depends on the seed, the matrix and the update, nothing else.

Numbers are drawn on the CPU from generators that live for one draw, so they are equal on every
device, in every process and after a resume, and the global generator is never touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import mix64_of_int
from .svd import work_dtype


def splitmix64(x: int) -> int:
    """Hash a 64-bit integer: one output of the splitmix64 generator in state x."""
    return mix64_of_int(x)


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
