"""Packed exchanges between ranks: whole tensors to their owners and back, sums, maxima, flags.

All that a group of ranks sends at one point of a step is one call. Each packed message begins with
a status, so that an exception on one rank is raised on all of them and none is left waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .layout import Box, intersection, numel, part

if TYPE_CHECKING:
    from .layout import Layout

STATUS_BYTES = 8
"""Bytes of a message that say whether its sender has failed; payload stays aligned behind them."""


class RankError(RuntimeError):
    """Another rank has failed in this step."""


FAILED_ELSEWHERE = (
    "another rank raised an exception in this step, which its own traceback shows; nothing that "
    "waited for it was written here"
)


class Team:
    """Ranks that share weights: one process group, made at the first step.

    Attributes:
        ranks: Their global ranks, ascending.
        rank: Number of this process among them.
        coordinates: Where each is in the mesh.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        rank: int,
        coordinates: tuple[tuple[int, ...], ...],
        device_type: str,
        make_group: Callable[[], Any],
    ) -> None:
        self.ranks, self.rank, self.coordinates = ranks, rank, coordinates
        self._device_type, self._make_group = device_type, make_group

    @classmethod
    def of_layout(cls, layout: Layout, axes: tuple[int, ...]) -> Team:
        """Ranks that differ from this process along some axes of the mesh of a layout."""
        found, mesh = layout.over(axes), layout.mesh
        make_group = partial(_group_along, mesh, axes, found.ranks)
        return cls(found.ranks, found.rank, found.coordinates, mesh.device_type, make_group)

    @classmethod
    def of_group(cls, group: Any, device_type: str) -> Team:
        """The ranks of a process group.

        Args:
            group: The group.
            device_type: Where the tensors lie. What a group cannot send from there, it sends from
                its own device.
        """
        import torch.distributed as dist

        kinds = [device.type for device in getattr(group, "_device_types", ())]
        if kinds and device_type not in kinds:
            device_type = kinds[0]
        ranks = tuple(dist.get_process_group_ranks(group))
        coordinates = tuple((i,) for i in range(len(ranks)))
        return cls(ranks, dist.get_rank(group), coordinates, device_type, lambda: group)

    @property
    def device(self) -> torch.device:
        """Where small numbers are reduced."""
        kind = self._device_type
        return (
            torch.device("cuda", torch.cuda.current_device())
            if kind == "cuda"
            else torch.device(kind)
        )

    def __len__(self) -> int:
        return len(self.ranks)

    def nearest(self, ranks: Sequence[int], target: int) -> int:
        """Of some ranks the one that shares most axes of the mesh with another, so its replica."""
        there = self.coordinates[target]

        def distance(rank: int) -> tuple[int, int]:
            here = self.coordinates[rank]
            return sum(a != b for a, b in zip(here, there, strict=True)), rank

        return min(ranks, key=distance)

    @cached_property
    def group(self) -> Any:
        """The process group; making one of several axes is collective."""
        return self._make_group()

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum or the maximum over the ranks, in place.

        Args:
            x: One vector per rank.
            op: ``"SUM"`` or ``"MAX"``.
        """
        import torch.distributed as dist

        sent = self._to_mesh(x)
        dist.all_reduce(sent, getattr(dist.ReduceOp, op), group=self.group)
        return x if sent is x else x.copy_(sent)

    def send(self, message: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Bytes from all ranks, in order.

        Args:
            message: Bytes for all ranks, in order.
            sent: How many for each.
            received: How many from each.
        """
        import torch.distributed as dist

        packed = self._to_mesh(message)
        answer = packed.new_empty(sum(received))
        dist.all_to_all_single(answer, packed, received, sent, group=self.group)
        return answer.to(message.device)

    def _to_mesh(self, x: Tensor) -> Tensor:
        """X where the process group sends from; offloaded state lies on the host."""
        return x if x.device.type == self._device_type else x.to(self.device)


def _group_along(mesh: Any, axes: tuple[int, ...], ranks: tuple[int, ...]) -> Any:
    """The process group of ranks that differ along some axes of a mesh."""
    import torch.distributed as dist

    if len(axes) == 1:
        return mesh.get_group(axes[0])
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(
            f"a weight is sharded over the axes {axes} of a mesh without names; give the mesh "
            "mesh_dim_names"
        )
    return mesh[tuple(names[axis] for axis in axes)]._flatten().get_group()


class Piece(NamedTuple):
    """A tensor of which ranks hold boxes, and that one rank or every rank is to have whole.

    Attributes:
        owner: The rank that gets it; None: all do.
        boxes: Per rank what it holds.
        shape: Shape of the whole.
        dtype: Dtype on the wire.
    """

    owner: int | None
    boxes: tuple[Box, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Exchange:
    """Pieces that travel together, to their owners and back.

    Attributes:
        team: The ranks.
        pieces: What travels, in the same order on all ranks.
        device: Where.
    """

    team: Team
    pieces: Sequence[Piece]
    device: torch.device

    @cached_property
    def _plans(self) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]]]:
        """Pieces sent to and received from each rank, on the way to owners and on the way back."""
        me, ranks = self.team.rank, range(len(self.team))
        there: list[list[int]] = [[] for _ in ranks]
        here, back, returned = ([list[int]() for _ in ranks] for _ in range(3))
        known: dict[tuple[int, int], list[int]] = {}
        for k, piece in enumerate(self.pieces):
            boxes = piece.boxes
            for owner in ranks if piece.owner is None else (piece.owner,):
                key = (id(boxes), owner)
                if key not in known:
                    known[key] = self._senders(boxes, owner)
                if owner == me:
                    for rank in known[key]:
                        here[rank].append(k)
                elif me in known[key]:
                    there[owner].append(k)
            if piece.owner == me:
                for rank in ranks:
                    if rank != me and numel(boxes[rank]):
                        back[rank].append(k)
            elif piece.owner is not None and numel(boxes[me]):
                returned[piece.owner].append(k)
        return there, here, back, returned

    def _senders(self, boxes: Sequence[Box], owner: int) -> list[int]:
        """Ranks from which an owner gets what it lacks: of equal boxes that of the nearest."""
        holders: dict[Box, list[int]] = {}
        for rank, box in enumerate(boxes):
            if numel(box) and not _covers(boxes[owner], box):
                holders.setdefault(box, []).append(rank)
        return [self._sender(same, owner) for same in holders.values()]

    def _sender(self, same: Sequence[int], owner: int) -> int:
        """Of the ranks that hold one box, the one that sends it to an owner."""
        return same[0] if len(same) == 1 else self.team.nearest(same, owner)

    @cached_property
    def is_one_way(self) -> bool:
        """Whether every rank has the whole of every piece, equal on all ranks."""
        return all(
            box == tuple((0, side) for side in piece.shape)
            for piece in self.pieces
            for box in dict.fromkeys(piece.boxes)
        )

    def bytes_to_owners(self) -> int:
        """Bytes that this rank sends to owners, without the status."""
        me, total = self.team.rank, 0
        for k, piece in enumerate(self.pieces):
            boxes = piece.boxes
            same = [rank for rank, box in enumerate(boxes) if box == boxes[me]]
            for owner in range(len(boxes)) if piece.owner is None else (piece.owner,):
                if not _covers(boxes[owner], boxes[me]) and self._sender(same, owner) == me:
                    total += self._size(k, me)
        return total

    def bytes_from_owners(self) -> int:
        """Bytes that this rank sends back as an owner, without the status."""
        me, ranks = self.team.rank, range(len(self.team))
        return sum(
            self._size(k, rank)
            for k, piece in enumerate(self.pieces)
            if piece.owner == me
            for rank in ranks
            if rank != me
        )

    def _size(self, k: int, holder: int) -> int:
        piece = self.pieces[k]
        return numel(piece.boxes[holder]) * piece.dtype.itemsize

    def to_owners(self, held: Sequence[Tensor], failed: bool = False) -> dict[int, Tensor]:
        """The whole tensors that this rank owns, by the number of their piece.

        Nothing is sent where all have the whole, so that nobody learns of a failure.

        Args:
            held: Per piece what this rank holds; not changed.
            failed: Whether this rank has raised an exception.

        Raises:
            RankError: If another rank has failed.
        """
        me = self.team.rank
        if self.is_one_way:
            return {k: held[k] for k, piece in enumerate(self.pieces) if piece.owner in (None, me)}
        there, here, _, _ = self._plans
        rows = [[held[k].to(self.pieces[k].dtype) for k in row] for row in there]
        received = self._send(rows, here, failed, by_source=True)
        whole = {}
        for k, piece in enumerate(self.pieces):
            if piece.owner not in (None, me):
                continue
            X = torch.empty(piece.shape, dtype=piece.dtype, device=self.device)
            part(X, piece.boxes[me]).copy_(held[k])
            whole[k] = X
        for source, row in enumerate(received):
            for k, x in zip(here[source], row, strict=True):
                part(whole[k], self.pieces[k].boxes[source]).copy_(x)
        return whole

    def from_owners(
        self, whole: dict[int, Tensor], held: Sequence[Tensor], failed: bool = False
    ) -> None:
        """Write the boxes of whole tensors into what each rank holds; nothing if a rank failed.

        Args:
            whole: The tensors that this rank owns, by the number of their piece.
            held: Per piece what this rank holds; changed in place.
            failed: Whether this rank has raised an exception.

        Raises:
            RankError: If another rank has failed.
        """
        me = self.team.rank
        _, _, there, here = self._plans
        rows = [
            [
                part(whole[k], self.pieces[k].boxes[rank]).to(self.pieces[k].dtype)
                if k in whole
                else torch.zeros(  # this rank has failed before it had the tensor
                    self._sides(k, rank), dtype=self.pieces[k].dtype, device=self.device
                )
                for k in row
            ]
            for rank, row in enumerate(there)
        ]
        received = self._send(rows, here, failed, by_source=False)
        if failed:
            return
        for k, X in whole.items():
            held[k].copy_(part(X, self.pieces[k].boxes[me]))
        for row, numbers in zip(received, here, strict=True):
            for k, x in zip(numbers, row, strict=True):
                held[k].copy_(x)

    def _sides(self, k: int, holder: int) -> list[int]:
        return [b - a for a, b in self.pieces[k].boxes[holder]]

    def _send(
        self,
        rows: Sequence[Sequence[Tensor]],
        numbers: Sequence[Sequence[int]],
        failed: bool,
        by_source: bool,
    ) -> list[list[Tensor]]:
        """Send tensors to every rank; those received from each, in the order of ``numbers``."""
        me, ranks = self.team.rank, range(len(self.team))
        parts, sent = [], []
        status = torch.full((STATUS_BYTES,), int(failed), dtype=torch.uint8, device=self.device)
        for rank in ranks:
            message = [] if rank == me else [status, *map(_as_bytes, rows[rank])]
            parts += message
            sent.append(sum(x.numel() for x in message))
        boxes = [
            [self._sides(k, rank if by_source else me) for k in numbers[rank]] for rank in ranks
        ]
        sizes = [
            [math.prod(b) * self.pieces[k].dtype.itemsize for k, b in zip(*pair, strict=True)]
            for pair in zip(numbers, boxes, strict=True)
        ]
        wanted = [0 if rank == me else STATUS_BYTES + sum(sizes[rank]) for rank in ranks]
        packed = torch.cat(parts) if parts else status[:0]
        answer = self.team.send(packed, sent, wanted)
        starts = [sum(wanted[:rank]) for rank in ranks]
        others = [rank for rank in ranks if rank != me]
        if not failed and others:
            statuses = torch.stack([answer[starts[rank]] for rank in others])
            if bool(statuses.any()):
                raise RankError(FAILED_ELSEWHERE)
        received: list[list[Tensor]] = []
        for rank in ranks:
            row, offset = [], starts[rank] + STATUS_BYTES
            for k, sides, size in zip(numbers[rank], boxes[rank], sizes[rank], strict=True):
                row.append(_from_bytes(answer, offset, size, self.pieces[k].dtype).view(sides))
                offset += size
            received.append(row)
        return received


def _covers(outer: Box, inner: Box) -> bool:
    """Whether a box lies in another one."""
    return intersection(outer, inner) == inner


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(message: Tensor, offset: int, size: int, dtype: torch.dtype) -> Tensor:
    """Entries of a dtype in a message, as a view where they are aligned."""
    x = message[offset : offset + size]
    if (message.storage_offset() + offset) % dtype.itemsize:
        x = x.clone()
    return x.view(dtype)
