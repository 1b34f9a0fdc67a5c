"""Base class of the projectors, and the kinds that store a dense basis."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ... import kernels
from ...kernels import product
from .._core.rule import LOCAL_REDUCTIONS, Factored, Reductions, Slot, Term
from .._core.validation import check
from .moments import BasisChange, DenseBasisChange, column_squares
from .random_keys import StackRNG
from .range_finder import power_bases, random_bases, range_bases
from .svd import top_bases, top_basis

State = Mapping[str, Tensor]
ALL = slice(None)


@dataclass(frozen=True)
class Projector:
    """Base class: a basis P of the rows of each matrix in a stack (K, m, n).

    R = P^T G has shape (K, r, n); with a basis on both sides R = P^T G Q is (K, r, r). ``find`` is
    given finite gradients that are not zero, and changes none. A matrix in a stack has the bits
    that it has alone.
    """

    state_keys: ClassVar[tuple[str, ...]]
    """Names of the state tensors, in the order of ``slots``."""
    permutes: ClassVar[bool] = False
    """Whether a new basis only permutes coordinates (see :class:`BasisChange`)."""
    is_orthonormal: ClassVar[bool] = True
    """Whether P has orthonormal columns, so that P N lifts N and P_new^T P_old is a change."""

    def slots(self, m: int, r: int) -> dict[str, Slot]:
        """State tensors of one matrix with m rows."""
        raise NotImplementedError

    def beside_coordinates(self, slots: dict[str, Slot]) -> dict[str, Slot]:
        """The slots of a base optimizer of R, told how they lie in memory."""
        return slots

    def find(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool = False
    ) -> tuple[Tensor, ...]:
        """Compute new state tensors, in the order of ``state_keys``.

        Args:
            G: (K, m, n), any strides.
            *old: The present state tensors (K, ...), zeros before the first refresh, whose last
                size is r; not changed.
            rng: Seed and keys of random numbers.
            transposed: Whether the driver transposed the weight (default: False); decides LAPACK's
                signs only.
        """
        raise NotImplementedError

    def find_on_shards(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool, reductions: Reductions
    ) -> tuple[Tensor, ...]:
        """:meth:`find` for the whole of G, whose columns may lie on several ranks."""
        find = partial(self.find, rng=rng, transposed=transposed)
        found: tuple[Tensor, ...] = reductions.from_full_matrix(find, G, *old)
        return found

    def project(self, state: State, G: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        """R as a new tensor (K, r, n) or (K, r, r), in G's dtype and at least float32."""
        raise NotImplementedError

    def project_with_squares(
        self,
        state: State,
        G: Tensor,
        reductions: Reductions = LOCAL_REDUCTIONS,
        squares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """R, and the squared norms of the columns of G (K, 1, n), which may be known."""
        squares = column_squares(G) if squares is None else squares
        return self.project(state, G, reductions), reductions.rows(squares)

    def lift(self, state: State, N: Tensor, m: int) -> Term:
        """P N (or P N Q^T) as the cheapest term for a weight with m rows."""
        raise NotImplementedError

    def left_factor(self, state: State, m: int, dtype: torch.dtype) -> Tensor | None:
        """P (K, m, r) if ``lift`` is a product with P alone, for N of this dtype; else None."""
        return None

    def lift_block(
        self, state: State, R: Tensor, m: int, k: slice = ALL, i: slice = ALL, j: slice = ALL
    ) -> Tensor:
        """Rows i and columns j of P R for the matrices k, as :class:`PanelTerm` asks for them.

        So a residual G - P R needs no tensor of the size of G.
        """
        raise NotImplementedError

    def overlap(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> BasisChange:
        """The change of basis C = P_new^T P_old, computed only if a policy needs C."""
        raise NotImplementedError

    def shared(self, m: int) -> Mapping[Hashable, int]:
        """Bytes of what all matrices with m rows on a device share, by name of the shared thing."""
        return {}

    def state_tensors(self, state: State) -> tuple[Tensor, ...]:
        """This projector's tensors among a rule's state, in the order of ``state_keys``."""
        return tuple(state[name] for name in self.state_keys)

    def install(self, state: State, new: tuple[Tensor, ...]) -> None:
        """Copy what ``find`` returned into the state."""
        for name, X in zip(self.state_keys, new, strict=True):
            state[name].copy_(X)


@dataclass(frozen=True)
class DenseProjector(Projector):
    """Base class: P (K, m, r) is stored, orthonormal columns; with ``both`` also Q (K, n, r)."""

    both: bool = False

    @property
    @override
    def state_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("basis", "basis_right") if self.both else ("basis",)

    @override
    def slots(self, m: int, r: int) -> dict[str, Slot]:
        return dict(zip(self.state_keys, (Slot("mr", r=r), Slot("nr", r=r)), strict=False))

    @override
    def beside_coordinates(self, slots: dict[str, Slot]) -> dict[str, Slot]:
        """Moments lie as the weight does, R as they do: R^T = G^T P is faster for a tall one."""
        for name in slots.keys() & {"exp_avg", "exp_avg_sq"}:
            slots[name].lies_as_weight = slots[name].axes == "rn"
        return slots

    @override
    def project(self, state: State, G: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        R = reductions.rows(kernels.project(state["basis"], G, like=state.get("exp_avg"))[0])
        return reductions.cols(product(R, state["basis_right"])) if self.both else R

    @override
    def project_with_squares(
        self,
        state: State,
        G: Tensor,
        reductions: Reductions = LOCAL_REDUCTIONS,
        squares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One read of G gives R and the squares."""
        if self.both or squares is not None:
            return super().project_with_squares(state, G, reductions, squares)
        M = state.get("exp_avg")
        R, squares = kernels.project(state["basis"], G, squares=True, like=M)
        return reductions.rows(R), reductions.rows(squares)

    @override
    def lift(self, state: State, N: Tensor, m: int) -> Term:
        return Factored(state["basis"], self._project_right(state, N))

    @override
    def left_factor(self, state: State, m: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.both else state["basis"]

    @override
    def lift_block(
        self, state: State, R: Tensor, m: int, k: slice = ALL, i: slice = ALL, j: slice = ALL
    ) -> Tensor:
        if self.both:
            Q = state["basis_right"][k, j]
            return product(state["basis"][k, i], product(R[k], Q.mT))
        return product(state["basis"][k, i], R[k, :, j])

    def _project_right(self, state: State, N: Tensor) -> Tensor:
        return product(N, state["basis_right"].mT) if self.both else N

    @override
    def overlap(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> BasisChange:
        return DenseBasisChange(*(P for pair in zip(old, new, strict=True) for P in pair))


@dataclass(frozen=True)
class SvdProjector(DenseProjector):
    """The r leading singular vectors of G, by falling singular value, from :func:`top_basis`."""

    exact: bool = False
    lapack_signs: bool = False

    @override
    def find(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool = False
    ) -> tuple[Tensor, ...]:
        kind = "svd_full" if self.exact else "svd"
        r = old[0].shape[-1]
        if self.both:
            return top_bases(G, r, kind, lapack_signs=self.lapack_signs, old=(old[0], old[1]))
        if self.lapack_signs and transposed:  # LAPACK's signs belong to the matrix as it was stored
            return top_bases(G.mT, r, kind, lapack_signs=True)[1:]
        return (top_basis(G, r, kind, lapack_signs=self.lapack_signs, old=old[0]),)


@dataclass(frozen=True)
class RangeProjector(DenseProjector):
    """Nearly the leading singular vectors, from the randomized :func:`range_bases`."""

    oversample: int = 8
    iterations: int = 1

    def __post_init__(self) -> None:
        check(min(self.oversample, self.iterations) >= 0, "oversample and iterations must be >= 0")

    @override
    def find(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool = False
    ) -> tuple[Tensor, ...]:
        return range_bases(
            G,
            old[0].shape[-1],
            rng,
            old,
            oversample=self.oversample,
            iterations=self.iterations,
        )


@dataclass(frozen=True)
class PowerProjector(DenseProjector):
    """One step of subspace iteration from the old basis, by :func:`power_bases`."""

    probes: int = 8

    def __post_init__(self) -> None:
        check(self.probes >= 0, f"probes must be >= 0, got {self.probes}")

    @override
    def find(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool = False
    ) -> tuple[Tensor, ...]:
        return power_bases(G, old[0].shape[-1], rng, old, probes=self.probes)


@dataclass(frozen=True)
class RandomProjector(DenseProjector):
    """Haar-distributed and independent of G, from :func:`random_bases`."""

    @override
    def find(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool = False
    ) -> tuple[Tensor, ...]:
        return random_bases(G, old[0].shape[-1], rng, old)

    @override
    def find_on_shards(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool, reductions: Reductions
    ) -> tuple[Tensor, ...]:
        """One rank draws for all, as QR may differ in its last bits; no gradient travels."""
        if self.both:  # the right side of G may be cut
            return super().find_on_shards(
                G, *old, rng=rng, transposed=transposed, reductions=reductions
            )
        found: tuple[Tensor, ...] = reductions.on_one_rank(
            partial(self.find, G, rng=rng, transposed=transposed), *old
        )
        return found


@dataclass(frozen=True)
class GaussianProjector(DenseProjector):
    """Entries N(0, 1/r), independent of G: E|P^T g|^2 = |g|^2. It projects down and nothing else.

    Source: APOLLO, arXiv 2412.05270.
    """

    is_orthonormal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(not self.both, "'gaussian' has no second side; use one side of it")

    @override
    def find(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool = False
    ) -> tuple[Tensor, ...]:
        m, r = G.shape[-2], old[0].shape[-1]
        draws = [rng.gaussian(k, X, (m, r))[0] for k, X in enumerate(G)]
        return (torch.stack(draws).div_(math.sqrt(r)).to(G.device),)

    @override
    def find_on_shards(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool, reductions: Reductions
    ) -> tuple[Tensor, ...]:
        """Every rank draws the same numbers."""
        return self.find(G, *old, rng=rng, transposed=transposed)
