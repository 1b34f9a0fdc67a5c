"""Projectors that choose vectors of a fixed orthonormal system and store only their indices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ... import kernels
from ...kernels import DCT_PATHS, dct_basis, idct, product, sized_dct
from .._core.rule import LOCAL_REDUCTIONS, Factored, Reductions, Selected, Slot, Term
from .._core.validation import check, check_rank
from .dense_projectors import ALL, Projector, State
from .moments import BasisChange, IndexBasisChange, largest_entries
from .random_keys import StackRNG, random_order
from .svd import full_precision_matmul, normalized_panels, work_dtype

DCT_BASES = ("dct2", "dct3")
SPECTRUM_PANEL = 2**18
"""Entries of G that are transformed at a time on a CPU, so that they stay in the cache."""
SPECTRUM_PANEL_ACCELERATOR = 2**26
"""The same on accelerators, where it only bounds the transform's temporary memory."""


def spectrum_slices(X: Tensor) -> list[slice]:
    """Slices of the columns of X (K, m, n), each transformed at a time."""
    size = SPECTRUM_PANEL if X.device.type == "cpu" else SPECTRUM_PANEL_ACCELERATOR
    width = max(64, size // max(1, X.shape[-2]))
    return [slice(j, j + width) for j in range(0, max(1, X.shape[-1]), width)]


def take_rows(X: Tensor, index: Tensor) -> Tensor:
    """Gather rows of X (K, m, n) by index (K, r) into a new tensor (K, r, n)."""
    rows: Tensor = kernels.dct_take(X, index, -2)
    return rows


def clear_rows_(X: Tensor, index: Tensor) -> Tensor:
    """Zero rows of X (K, m, n) by index (K, r), in place."""
    if len(X) == 1:
        X[0].index_fill_(0, index[0].long(), 0.0)
        return X
    rows = index.long().unsqueeze(-1).expand(-1, -1, X.shape[-1])
    return X.scatter_(-2, rows, 0.0)


@dataclass(frozen=True)
class IndexProjector(Projector):
    """Base class: P is r columns of a fixed orthonormal system, stored as ascending indices."""

    state_keys: ClassVar[tuple[str, ...]] = ("index",)
    permutes: ClassVar[bool] = True

    @override
    def slots(self, m: int, r: int) -> dict[str, Slot]:
        return {"index": Slot("r", dtype=torch.int32, r=r)}

    @override
    def find(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool = False
    ) -> tuple[Tensor, ...]:
        r = old[0].shape[-1]
        check_rank(r, G.shape[-2])
        with full_precision_matmul(G.device):
            indices = [self._choose(X, r, rng, k) for k, X in enumerate(G)]
        return (torch.stack(indices).sort(dim=-1).values.to(G.device, torch.int32),)

    def _choose(self, G: Tensor, r: int, rng: StackRNG, k: int) -> Tensor:
        """Choose r different indices for one matrix G (m, n)."""
        scores = self._total_scores(G)
        # a stable sort takes the lowest index among equal scores; topk takes any
        return scores.sort(descending=True, stable=True).indices[:r]

    @override
    def find_on_shards(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool, reductions: Reductions
    ) -> tuple[Tensor, ...]:
        """Scores are summed over ranks, so that all choose alike and no gradient travels."""
        if reductions is LOCAL_REDUCTIONS:
            return self.find(G, *old, rng=rng, transposed=transposed)
        r = old[0].shape[-1]
        check_rank(r, G.shape[-2])
        largest = reductions.most(largest_entries(G)).to(work_dtype(G))
        with full_precision_matmul(G.device):
            scores = torch.stack(list(map(self._total_scores, G, largest.flatten())))
        order = reductions.cols(scores).sort(dim=-1, descending=True, stable=True).indices
        return (order[:, :r].sort(dim=-1).values.to(torch.int32),)

    def _total_scores(self, G: Tensor, largest: Tensor | None = None) -> Tensor:
        """Scores (m,) of every index on one matrix G (m, n) over its largest entry."""
        scores = torch.zeros(G.shape[0], dtype=work_dtype(G), device=G.device)
        for _, X in normalized_panels(G, work_dtype(G), largest):
            scores += self._scores(X)
        return scores

    def _scores(self, X: Tensor) -> Tensor:
        """Score every index on some columns X (m, w) of G / max|G|; scores of panels add up."""
        raise NotImplementedError

    @override
    def overlap(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> BasisChange:
        return IndexBasisChange(old[0], new[0])


@dataclass(frozen=True)
class TopKProjector(IndexProjector):
    """The rows of largest l2 norm: no other choice of r rows captures more of G."""

    def _scores(self, X: Tensor) -> Tensor:
        return X.square().sum(-1)

    @override
    def project(self, state: State, G: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        return take_rows(G, state["index"]).to(work_dtype(G))

    @override
    def lift(self, state: State, N: Tensor, m: int) -> Term:
        return Selected(-2, state["index"], N)

    @override
    def lift_block(
        self, state: State, R: Tensor, m: int, k: slice = ALL, i: slice = ALL, j: slice = ALL
    ) -> Tensor:
        start, stop, _ = i.indices(m)
        height = stop - start
        R = R[k, :, j]
        row = state["index"][k].long() - start
        is_inside = (row >= 0) & (row < height)
        row = torch.where(is_inside, row, height)  # rows outside go to an extra row, cut off below
        out = R.new_zeros(len(R), height + 1, R.shape[-1])
        return out.scatter_(-2, row.unsqueeze(-1).expand_as(R), R)[:, :-1]


@dataclass(frozen=True)
class RandKProjector(TopKProjector):
    """Random rows, each set equally likely: E[P P^T] = (r / m) I."""

    @override
    def find_on_shards(
        self, G: Tensor, *old: Tensor, rng: StackRNG, transposed: bool, reductions: Reductions
    ) -> tuple[Tensor, ...]:
        """Every rank draws the same rows, of which all have all."""
        return self.find(G, *old, rng=rng, transposed=transposed)

    def _choose(self, G: Tensor, r: int, rng: StackRNG, k: int) -> Tensor:
        return random_order(G.shape[0], rng.generator(k))[:r]


@dataclass(frozen=True)
class DctProjector(IndexProjector):
    """P = D[:, I]: the cosines (columns of D) whose coefficients in G are largest.

    Source: arXiv 2505.17967.

    Attributes:
        norm: ``"l2"`` captures most of G among all choices of r cosines, at least the share r / m;
            ``"l1"`` is the published default and usually chooses alike, without that bound.
        basis: ``"dct2"`` is D = C^T, ``"dct3"`` is D = C, with C of :func:`dct_basis`.
        path: Way of the transform, as :func:`dct` takes it.
    """

    norm: str = "l2"
    basis: str = "dct2"
    path: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("norm", ("l1", "l2")), ("basis", DCT_BASES), ("path", DCT_PATHS)):
            value = getattr(self, name)
            check(value in known, f"{name} must be one of {known}, got {value!r}")

    def transform(self, G: Tensor, onto: Tensor | None = None) -> Tensor:
        """S = D^T G, all coefficients (K, m, n): a new tensor, or added to ``onto`` in place."""
        if onto is None:
            return self.spectrum(G)[0]
        for j in spectrum_slices(G):
            onto[..., j].add_(self._transform_panel(G[..., j])[0])
        return onto

    def spectrum(self, G: Tensor) -> tuple[Tensor, Tensor | None]:
        """S = D^T G as a new tensor (K, m, n), and scores (K, m) for :meth:`choose` or None.

        Scores come from a kernel that sums them while it writes S, under the norm "l1" only:
        squares need a scale, which is known when S is complete.
        """
        slices = spectrum_slices(G)
        if len(slices) == 1:
            return self._transform_panel(G)
        S = torch.empty_like(G, dtype=work_dtype(G))
        scores: list[Tensor] = []
        for j in slices:
            X, panel_scores = self._transform_panel(G[..., j])
            S[..., j].copy_(X)
            if panel_scores is not None:
                scores.append(panel_scores)
        return S, torch.stack(scores).sum(0) if scores else None

    def choose(
        self,
        S: Tensor,
        r: int,
        old: Tensor | None = None,
        reductions: Reductions = LOCAL_REDUCTIONS,
        row_scores: Tensor | None = None,
    ) -> Tensor:
        """Choose the r rows of S (K, m, n) with the largest scores; of equal ones the first.

        Args:
            S: (K, m, n), all coefficients.
            r: Count of rows.
            old: Indices (K, r) that a matrix of zeros keeps (default: None). The choice is made by
                ``where``, so that no device is waited for.
            reductions: Sums over the columns of the weight (default: those of one process).
            row_scores: Scores (K, m) that :meth:`spectrum` returned (default: None).

        Returns:
            Indices (K, r), int32, ascending.
        """
        check_rank(r, S.shape[-2])
        if row_scores is None:
            largest = reductions.most(largest_entries(S))
            # S / scale, since squares of S may overflow or vanish
            scale = largest.masked_fill(largest == 0, 1.0)
            row_scores = S.new_zeros(S.shape[:-1])
            for j in spectrum_slices(S):
                row_scores += self._row_scores(S[..., j] / scale)
        scores = reductions.cols(row_scores)
        # a stable sort takes the lowest index among equal scores; topk takes any
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        new = order[:, :r].sort(dim=-1).values.to(torch.int32)
        return new if old is None else torch.where(scores.amax(-1, keepdim=True) > 0, new, old)

    def selected_columns(self, index: Tensor, m: int, dtype: torch.dtype, i: slice = ALL) -> Tensor:
        """Rows i of P = D[:, I], (K, |i|, r)."""
        C = self.columns(m, dtype, index.device).mT
        return C[:, i].index_select(0, index.flatten()).view(*index.shape, -1).mT

    def columns(self, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """D (m, m) itself, not to be changed."""
        C = dct_basis(m, dtype, device)
        return C if self.basis == "dct3" else C.mT

    def project_onto(self, G: Tensor, index: Tensor) -> Tensor:
        """P^T G (K, r, n) of cosines by index, at least float32, without other coefficients."""
        if self.basis == "dct2":
            R: Tensor = kernels.dct_project(G, index, -2)
            return R
        return product(self.selected_columns(index, G.shape[-2], work_dtype(G)).mT, G)

    def _transform_panel(self, X: Tensor) -> tuple[Tensor, Tensor | None]:
        """The transform of some columns, and the scores of its rows where they cost nothing."""
        if self.basis == "dct3":
            return idct(X, -2, self.path), None
        return sized_dct(X, -2, self.path, "l1" if self.norm == "l1" else None)

    def _row_scores(self, S: Tensor) -> Tensor:
        """Score every row on some columns of S / max|S|; scores of panels add up."""
        return S.abs().sum(-1) if self.norm == "l1" else S.square().sum(-1)

    def _scores(self, X: Tensor) -> Tensor:
        return self._row_scores(self._transform_panel(X)[0])

    @override
    def shared(self, m: int) -> Mapping[Hashable, int]:
        """The cosines, in float32."""
        return {("cosines", m): 4 * m * m}

    @override
    def project(self, state: State, G: Tensor, reductions: Reductions = LOCAL_REDUCTIONS) -> Tensor:
        return reductions.rows(self.project_onto(G, state["index"]))

    @override
    def lift(self, state: State, N: Tensor, m: int) -> Term:
        return Factored(self.left_factor(state, m, N.dtype), N)

    @override
    def left_factor(self, state: State, m: int, dtype: torch.dtype) -> Tensor:
        return self.selected_columns(state["index"], m, dtype)

    @override
    def lift_block(
        self, state: State, R: Tensor, m: int, k: slice = ALL, i: slice = ALL, j: slice = ALL
    ) -> Tensor:
        return product(self.selected_columns(state["index"][k], m, R.dtype, i), R[k, :, j])
