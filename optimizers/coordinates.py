"""Projectors that choose vectors of a fixed orthonormal system and store their numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import dct, dct_basis, product
from .bases import check_rank, exact_products, panels, work_dtype
from .moments import Change, Match
from .rule import LOCAL, Factored, Selected, Slot, Sums, Term, check
from .sketches import Draws
from .subspaces import ALL, Projector, State


@dataclass(frozen=True)
class IndexProjector(Projector):
    """P is r columns of a fixed orthonormal system; stored are their numbers, ascending."""

    names: ClassVar[tuple[str, ...]] = ("index",)
    moves: ClassVar[bool] = True

    def slots(self, m: int, r: int) -> dict[str, Slot]:
        """See :class:`Projector`."""
        return {"index": Slot("r", dtype=torch.int32, r=r)}

    def find(
        self, G: Tensor, *old: Tensor, draws: Draws, turned: bool = False
    ) -> tuple[Tensor, ...]:
        """See :class:`Projector`."""
        r = old[0].shape[-1]
        check_rank(r, G.shape[-2])
        with exact_products(G.device):
            chosen = [self._choose(X, r, draws, k) for k, X in enumerate(G)]
        return (torch.stack(chosen).sort(dim=-1).values.to(G.device, torch.int32),)

    def _choose(self, G: Tensor, r: int, draws: Draws, k: int) -> Tensor:
        """Numbers of r different rows of one matrix G (m, n)."""
        scores = torch.zeros(G.shape[0], dtype=work_dtype(G), device=G.device)
        for _, X in panels(G, work_dtype(G)):
            scores += self._scores(X)
        # a stable sort takes the lowest number among equal scores; topk takes any
        return scores.sort(descending=True, stable=True).indices[:r]

    def _scores(self, X: Tensor) -> Tensor:
        """One number per row for some columns X (m, w) of G / max|G|; panels add up."""
        raise NotImplementedError

    def overlap(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Change:
        """See :class:`Projector`."""
        return Match(old[0], new[0])


@dataclass(frozen=True)
class TopK(IndexProjector):
    """The rows of largest l2 norm: no other choice of r rows captures more of G."""

    def _scores(self, X: Tensor) -> Tensor:
        return X.square().sum(-1)

    def down(self, state: State, G: Tensor, sums: Sums = LOCAL) -> Tensor:
        """See :class:`Projector`; a gather."""
        index = state["index"].long()
        if len(G) == 1:
            return G[0].index_select(0, index[0]).unsqueeze(0)
        return G.take_along_dim(index.unsqueeze(-1), -2)

    def lift(self, state: State, N: Tensor, m: int) -> Term:
        """See :class:`Projector`."""
        return Selected(-2, state["index"], N)

    def back(
        self, state: State, R: Tensor, m: int, k: slice = ALL, i: slice = ALL, j: slice = ALL
    ) -> Tensor:
        """See :class:`Projector`; a scatter into zeros."""
        start, stop, _ = i.indices(m)
        R, place = R[k, :, j], state["index"][k].long() - start
        inside = (place >= 0) & (place < stop - start)
        place = torch.where(inside, place, stop - start)  # the others meet in one row too many
        out = R.new_zeros(len(R), stop - start + 1, R.shape[-1])
        return out.scatter_(-2, place.unsqueeze(-1).expand_as(R), R)[:, :-1]


@dataclass(frozen=True)
class RandK(TopK):
    """Random rows, each set equally likely: E[P P^T] = (r / m) I."""

    def _choose(self, G: Tensor, r: int, draws: Draws, k: int) -> Tensor:
        return torch.randperm(G.shape[0], generator=draws.generator(k))[:r]


@dataclass(frozen=True)
class Dct(IndexProjector):
    """P = D[:, I]: the cosines (columns of D = C^T) whose coefficients in G are largest.

    ``norm`` "l2" captures most of G among all choices of r cosines, at least the share r / m; "l1"
    is the published default and usually chooses alike, without that bound.
    Source: arXiv 2505.17967.
    """

    norm: str = "l2"

    def __post_init__(self) -> None:
        check(self.norm in ("l1", "l2"), f"norm must be 'l1' or 'l2', got {self.norm!r}")

    def _scores(self, X: Tensor) -> Tensor:
        S = dct(X, dim=-2)
        return S.abs().sum(-1) if self.norm == "l1" else S.square().sum(-1)

    def _basis(self, index: Tensor, m: int, dtype: torch.dtype, i: slice = ALL) -> Tensor:
        """Rows i of P, (K, |i|, r)."""
        C = dct_basis(m, dtype, index.device)[:, i]
        return C.index_select(0, index.flatten()).view(*index.shape, -1).mT

    def down(self, state: State, G: Tensor, sums: Sums = LOCAL) -> Tensor:
        """See :class:`Projector`."""
        return sums.rows(product(self._basis(state["index"], G.shape[-2], G.dtype).mT, G))

    def lift(self, state: State, N: Tensor, m: int) -> Term:
        """See :class:`Projector`."""
        return Factored(self._basis(state["index"], m, N.dtype), N)

    def back(
        self, state: State, R: Tensor, m: int, k: slice = ALL, i: slice = ALL, j: slice = ALL
    ) -> Tensor:
        """See :class:`Projector`."""
        return product(self._basis(state["index"][k], m, R.dtype, i), R[k, :, j])
