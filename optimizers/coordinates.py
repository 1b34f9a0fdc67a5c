"""Projectors that choose vectors of a fixed orthonormal system and store their numbers only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import DCT_PATHS, dct, dct_basis, idct, product
from .bases import check_rank, exact_products, panels, work_dtype
from .moments import Change, Match
from .rule import LOCAL, Factored, Selected, Slot, Sums, Term, check
from .sketches import Draws
from .subspaces import ALL, Projector, State

BASES = ("dct2", "dct3")
SPECTRUM_PANEL = 2**18
"""Entries of G that are transformed at a time: they stay in the cache."""


def take_rows(X: Tensor, index: Tensor) -> Tensor:
    """Rows of X (K, m, n) by their numbers (K, r), a new tensor (K, r, n)."""
    if X.stride(-1) != 1 and X.stride(-2) == 1:  # turned: read along the memory, then turn the few
        where = index.long().unsqueeze(-2).expand(-1, X.shape[-1], -1)
        return X.mT.gather(-1, where).mT.contiguous()
    if len(X) == 1:
        one, chosen = X[0], index[0]
        if one.stride(-1) != 1 and one.stride(-2) == 1:  # turned: along the memory, then turned
            return one.mT.index_select(1, chosen).mT.contiguous().unsqueeze(0)
        return one.index_select(0, chosen).unsqueeze(0)  # rows are copied whole
    return X.take_along_dim(index.long().unsqueeze(-1), -2)


def clear_rows_(X: Tensor, index: Tensor) -> Tensor:
    """Rows of X (K, m, n) by their numbers (K, r) become zero, in place."""
    if len(X) == 1:
        X[0].index_fill_(0, index[0].long(), 0.0)
        return X
    where = index.long().unsqueeze(-1).expand(-1, -1, X.shape[-1])
    return X.scatter_(-2, where, 0.0)


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
        return take_rows(G, state["index"])

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
    """P = D[:, I]: the cosines (columns of D) whose coefficients in G are largest.

    ``norm`` "l2" captures most of G among all choices of r cosines, at least the share r / m; "l1"
    is the published default and usually chooses alike, without that bound. ``basis`` "dct2" is
    D = C^T, "dct3" is D = C, with C of :func:`dct_basis`; ``path`` is that of :func:`dct`.
    Source: arXiv 2505.17967.
    """

    norm: str = "l2"
    basis: str = "dct2"
    path: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("norm", ("l1", "l2")), ("basis", BASES), ("path", DCT_PATHS)):
            value = getattr(self, name)
            check(value in known, f"{name} must be one of {known}, got {value!r}")

    def transform(self, G: Tensor, onto: Tensor | None = None) -> Tensor:
        """S = D^T G, all coefficients (K, m, n).

        Made a panel of columns at a time; added onto a tensor in place if there is one, else new.
        """
        m, n = G.shape[-2:]
        width = max(64, SPECTRUM_PANEL // m)
        if onto is None and n <= width:
            return self._turned(G)
        S = torch.empty_like(G) if onto is None else onto
        for start in range(0, n, width):
            j = slice(start, start + width)
            X = self._turned(G[..., j])
            if onto is None:
                S[..., j].copy_(X)
            else:
                S[..., j].add_(X)
        return S

    def choose(self, S: Tensor, r: int, old: Tensor | None = None, sums: Sums = LOCAL) -> Tensor:
        """Numbers (K, r) int32, ascending, of the rows of S (K, m, n) with the largest scores.

        Of equal scores the lowest number is taken. A matrix of zeros keeps its ``old`` numbers, if
        there are any: nothing waits for a device to know it.
        """
        m, n = S.shape[-2:]
        check_rank(r, m)
        top = sums.cols(torch.maximum(S.amax((-2, -1)), -S.amin((-2, -1)))).view(-1, 1, 1)
        scale = top.masked_fill(top == 0, 1.0)  # squares then neither overflow nor vanish
        width, scores = max(64, SPECTRUM_PANEL // m), S.new_zeros(S.shape[:-1])
        for start in range(0, n, width):
            scores += self._sizes(S[..., start : start + width] / scale)
        # a stable sort takes the lowest number among equal scores; topk takes any
        order = sums.cols(scores).sort(dim=-1, descending=True, stable=True).indices
        new = order[:, :r].sort(dim=-1).values.to(torch.int32)
        return new if old is None else torch.where(top[:, 0] > 0, new, old)

    def columns(self, index: Tensor, m: int, dtype: torch.dtype, i: slice = ALL) -> Tensor:
        """Rows i of P = D[:, I], (K, |i|, r)."""
        C = dct_basis(m, dtype, index.device)
        C = C.mT if self.basis == "dct3" else C
        return C[:, i].index_select(0, index.flatten()).view(*index.shape, -1).mT

    def _turned(self, X: Tensor) -> Tensor:
        return (idct if self.basis == "dct3" else dct)(X, -2, self.path)

    def _sizes(self, S: Tensor) -> Tensor:
        """One number per row for some columns of S / max|S|; panels add up."""
        return S.abs().sum(-1) if self.norm == "l1" else S.square().sum(-1)

    def _scores(self, X: Tensor) -> Tensor:
        return self._sizes(self._turned(X))

    def shared(self, m: int) -> Mapping[Hashable, int]:
        """See :class:`Projector`; the cosines, in float32."""
        return {("cosines", m): 4 * m * m}

    def down(self, state: State, G: Tensor, sums: Sums = LOCAL) -> Tensor:
        """See :class:`Projector`."""
        return sums.rows(product(self.columns(state["index"], G.shape[-2], G.dtype).mT, G))

    def lift(self, state: State, N: Tensor, m: int) -> Term:
        """See :class:`Projector`."""
        return Factored(self.columns(state["index"], m, N.dtype), N)

    def back(
        self, state: State, R: Tensor, m: int, k: slice = ALL, i: slice = ALL, j: slice = ALL
    ) -> Tensor:
        """See :class:`Projector`."""
        return product(self.columns(state["index"][k], m, R.dtype, i), R[k, :, j])
