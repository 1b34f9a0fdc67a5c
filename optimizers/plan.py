"""The plan that runs equal units together.

A bucket holds units of equal shape and equal clocks: small plain matrices run as one stack,
everything else one unit at a time on views of the live tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import dequantize_blocks, fuses_passes, quantize_blocks
from .rule import Member, Rule
from .units import State, Unit, drops, is_part, labels_of, scale_of

CHUNK = {"cpu": 64 * 2**20}
"""Largest stack in bytes, so that stacking never costs what low rank saved."""
CHUNK_ACCELERATOR = 512 * 2**20


def chunk_bytes(device: torch.device) -> int:
    """Byte budget of one stack on this device."""
    return CHUNK.get(device.type, CHUNK_ACCELERATOR)


def largest(X: Tensor) -> Tensor:
    """The largest magnitude, a NaN if there is one: one pass, no temporary of X's size."""
    low, high = torch.aminmax(X)
    return torch.maximum(-low, high)


@dataclass(eq=False)
class Bucket:
    """Units of equal shape and clocks, run together or as one view.

    Attributes:
        units: K > 1 stacked units, or one unit run on views.
        present: Whether each member has a gradient.
        states: Per member, slot name -> (K, *axes).
        coded: Per member, slot name -> codes (K, *axes) and scales, for state kept in eight bits.
        owners: (parameter, its state dict), and
        rows: (state dict, key, tensor) of every live state tensor: to notice foreign changes.
        firsts: State dict that holds each unit's clocks.
    """

    units: list[Unit]
    present: tuple[bool, ...]
    held: int = 1
    states: list[dict[str, Tensor]] = field(default_factory=list)
    coded: list[dict[str, tuple[Tensor, Tensor]]] = field(default_factory=list)
    owners: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    rows: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)
    firsts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unit = self.units[0]
        self.unit, self.group, self.stacked = unit, unit.group, len(self.units) > 1
        self.indices = tuple(index for unit in self.units for index in unit.indices)
        double = unit.params[0].dtype == torch.float64
        self.dtype = torch.float64 if double else torch.float32
        self.columns = [[u.params[i] for u in self.units] for i in range(len(unit.params))]

    def bind(self, state: State) -> None:
        """Point at the live state: slabs for a stack, views otherwise."""
        self.firsts = [state[u.params[0]] for u in self.units]
        for i, slots in enumerate(self.unit.slots):
            seen: dict[str, Tensor] = {}
            coded: dict[str, tuple[Tensor, Tensor]] = {}
            entries = [state[p] for p in self.columns[i]] if slots else []
            for name in slots if self.held else ():
                key = self.unit.key_of(i, name)
                live = self._bind_slot(key, entries)
                if self.unit.codes(i, name) is None:
                    seen[name] = self._seen(i, name, live)
                else:
                    coded[name] = live, self._bind_slot(scale_of(key), entries)
            self.states.append(seen)
            self.coded.append(coded)
            if slots or i == 0:
                self.owners += [(p, state[p]) for p in self.columns[i]]

    def _bind_slot(self, key: str, entries: list[dict[str, Any]]) -> Tensor:
        """The stored tensors as one (K, ...): a slab for a stack."""
        if not self.stacked:
            tensor: Tensor = entries[0][key]
            if is_part(tensor):
                entries[0][key] = tensor = tensor.clone()
            self.rows.append((entries[0], key, tensor))
            return tensor.unsqueeze(0)
        slab = torch.stack([entry[key] for entry in entries])
        for entry, row in zip(entries, slab.unbind(0), strict=True):
            entry[key] = row
            self.rows.append((entry, key, row))
        return slab

    def _seen(self, i: int, name: str, stored: Tensor) -> Tensor:
        """Stored tensors (K, ...) as the rule sees them."""
        if len(self.units) == 1:
            return self.unit.seen(i, name, stored[0])
        like = self.unit.slots[i][name].axes == "mn"
        return stored.mT if like and self.unit.turned[i] else stored

    def decoded(self) -> list[dict[str, Tensor]]:
        """Per member, the state that is kept in codes as (K, ...) floats."""
        return [
            {name: dequantize_blocks(*pair, self.dtype) for name, pair in coded.items()}
            for coded in self.coded
        ]

    def encode(self, decoded: Sequence[Mapping[str, Tensor]]) -> None:
        """Store what an update has made of the decoded state."""
        for coded, plain in zip(self.coded, decoded, strict=True):
            for name, X in plain.items():
                quantize_blocks(X, *coded[name])

    def clocks(self) -> tuple[int, int]:
        """Number of the update that comes next, and of the last refresh."""
        entry = self.firsts[0]
        return entry[self.unit.step_key] + 1, entry.get(self.unit.refreshed_key, 0)

    def set_step(self, t: int) -> None:
        """All units have made update t."""
        for unit, entry in zip(self.units, self.firsts, strict=True):
            entry[unit.step_key] = t

    def set_refreshed(self, t: int) -> None:
        """All units were refreshed at update t."""
        for unit, entry in zip(self.units, self.firsts, strict=True):
            entry[unit.refreshed_key] = t

    def nonzero(self, Gs: Sequence[Tensor | None], j: int) -> bool:
        """Whether some gradient of unit j is not all zero."""
        parts = [G[j] if self.stacked else G for G in Gs if G is not None]
        return any(bool(largest(G) != 0) for G in parts)

    def ready(
        self, i: int, G: Tensor, maximize: bool, ok: Tensor | None, raw: bool = False
    ) -> Tensor:
        """A gradient as the rule takes it: precise enough, turned; zeros where it is not ok.

        A rule that is guarded takes it as it is, unless it would meet state as narrow as itself.
        """
        G = G if raw and self._wide else G.to(self.dtype)
        if maximize:
            G = -G
        if ok is not None and not raw:
            G = torch.where(ok.view(-1, 1, 1), G, torch.zeros((), dtype=G.dtype, device=G.device))
        return G.mT if self.unit.turned[i] else G

    def by_kernels(self, Gs: Sequence[Tensor | None]) -> bool:
        """Whether the state is as the rule sees it, and kernels do all passes over gradients."""
        large = all(G is None or fuses_passes(G) for G in Gs)
        return large and not any(self.coded)

    @cached_property
    def _wide(self) -> bool:
        """Whether no state is of a precision below float32."""
        return all(X.dtype.itemsize >= 4 for X in self._tensors() if X.is_floating_point())

    def copies(self) -> list[Tensor]:
        """Copies of all state, for units whose flags arrive after the update."""
        return [X.clone() for X in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        plain = [X for seen in self.states for X in seen.values()]
        return plain + [X for coded in self.coded for pair in coded.values() for X in pair]

    def put_back(self, saved: list[Tensor], ok: Tensor) -> None:
        """Undo the change of state of units that are not ok."""
        for X, old in zip(self._tensors(), saved, strict=True):
            X.copy_(torch.where(ok.to(X.device).view(-1, *[1] * (X.dim() - 1)), X, old))

    def live(self, state: State) -> bool:
        """Whether the optimizer's state still holds the dicts and tensors this bucket points at."""
        for p, owned in self.owners:
            if state.get(p) is not owned:
                return False
        for entry, key, tensor in self.rows:
            if entry.get(key) is not tensor:
                return False
        return True

    def given(self, i: int, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Gradients of member i, one per unit."""
        given = [G for unit in self.units if (G := grads[unit.positions[i]]) is not None]
        was, now = self.unit.key[2 + i][0], given[0].shape
        if now != was:
            raise RuntimeError(
                f"parameter of shape {tuple(was)} changed its shape to {tuple(now)}; build the "
                "optimizer after the model is wrapped"
            )
        return given

    def gradient(self, i: int, grads: Sequence[Tensor | None]) -> Tensor:
        """Gradients of member i as (K, m, n) before turning, in their own dtype."""
        given = self.given(i, grads)
        return torch.stack(given) if self.stacked else self.unit.blocks[i].take(given[0])

    def load(self, i: int) -> Tensor:
        """Weights of member i (K, m, n) after turning: a stack is a copy, a view is live."""
        W = (
            torch.stack(self.columns[i])
            if self.stacked
            else self.unit.blocks[i].take(self.unit.params[i].detach())
        )
        return W.mT if self.unit.turned[i] else W

    def apart(self, i: int) -> list[Tensor]:
        """The live weights of member i as K matrices (m, n) after turning.

        None of them where `load` serves as well: of a single unit, and where no kernels are.
        """
        if not self.stacked or not fuses_passes(self.columns[i]):
            return []
        Ws = [p.detach() for p in self.columns[i]]
        return [W.mT for W in Ws] if self.unit.turned[i] else Ws

    def store(self, i: int, W: Tensor) -> None:
        """Put the weights of member i back where `load` made a copy."""
        W = W.mT if self.unit.turned[i] else W
        if self.stacked:
            torch._foreach_copy_(self.columns[i], list(W.unbind(0)))
            return
        p = self.unit.params[i]
        if W.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
            p.copy_(self.unit.blocks[i].back(W, p.shape))

    def alone(self, j: int) -> Bucket:
        """Unit j of a stack as a bucket of its own, on rows of the live slabs."""
        bucket = Bucket([self.units[j]], self.present, self.held)
        bucket.firsts = [self.firsts[j]]
        bucket.states = [{name: X[j : j + 1] for name, X in seen.items()} for seen in self.states]
        bucket.coded = [
            {name: (codes[j : j + 1], scales[j : j + 1]) for name, (codes, scales) in coded.items()}
            for coded in self.coded
        ]
        return bucket

    def members(
        self,
        grads: Sequence[Tensor | None],
        decoded: Sequence[Mapping[str, Tensor]],
        t: int,
        refreshed: int,
        ok: Tensor | None = None,
    ) -> list[Member]:
        """What the rule sees; `ok` are flags that it takes itself."""
        made = []
        for i, G in enumerate(grads):
            m, n = self.unit.sides(i)
            load = partial(self.load, i)
            K = len(self.indices)  # a block has the flag of its whole parameter
            state = dict(self.states[i])
            state.update((name, self._seen(i, name, X)) for name, X in decoded[i].items())
            made.append(
                Member(
                    G,
                    load,
                    state,
                    t=t,
                    refreshed=refreshed,
                    m=m,
                    n=n,
                    indices=self.indices,
                    held=self.held,
                    number=i,
                    turned=self.unit.turned[i],
                    store=partial(self.store, i),
                    ok=ok if ok is None else ok.expand(K),
                )
            )
        return made


def buckets_of(
    units: Iterable[Unit],
    mask: Sequence[bool],
    state: State,
    rules: Sequence[Rule | None],
    old: Sequence[Bucket] = (),
) -> list[Bucket]:
    """Allocate the state of every present unit and sort the units into buckets.

    Args:
        units: All units.
        mask: Which parameters have a gradient.
        state: The optimizer's state.
        rules: Per group, its rule.
        old: Buckets of the plan so far; one that stays as it is keeps its slabs.
    """
    sorted_units: dict[tuple[Any, ...], list[Unit]] = {}
    for unit in units:
        present = tuple(mask[i] for i in unit.positions)
        if not any(present):
            unit.own(state)
            continue
        rule = rules[unit.group]
        assert rule is not None
        held = unit.allocate(state, rule)
        first = state[unit.params[0]]
        clocks = (first[unit.step_key], first.get(unit.refreshed_key, 0))
        alone = () if unit.stackable and not rule.writes else (id(unit),)
        sorted_units.setdefault((present, held, *clocks, *unit.key, *alone), []).append(unit)
    made = []
    for key, members in sorted_units.items():
        p = members[0].params[0]
        size = max(1, chunk_bytes(p.device) // max(1, p.numel() * p.element_size()))
        made += [
            Bucket(members[i : i + size], key[0], key[1]) for i in range(0, len(members), size)
        ]
    stacks = {tuple(map(id, bucket.units)): bucket for bucket in old if bucket.stacked}
    for j, bucket in enumerate(made):
        before = stacks.get(tuple(map(id, bucket.units)))
        alike = before and (before.present, before.held) == (bucket.present, bucket.held)
        if before is not None and alike and before.live(state):
            made[j] = before
        else:
            bucket.bind(state)
    return made


@dataclass(eq=False)
class Plan:
    """What one step runs, for one set of present gradients and one set of clocks.

    Attributes:
        flat: All parameters, group after group.
        values: Per group, the values its rule and units were made from.
        rules: Per group, its rule; None for an AdamW group.
        orders: Per group, the order of AdamW's steps beside the method, see ``Rule.adamw_order``.
        units: All units.
        vectors: Per group, flat positions of its AdamW parameters.
        mask: Which parameters had a gradient when `buckets` was made.
        buckets: Present units, sorted.
        entries: Number of parameters with state when `buckets` was made.
    """

    flat: list[Tensor]
    values: list[tuple[Any, ...]]
    rules: list[Rule | None]
    orders: list[tuple[bool, float] | None]
    units: list[Unit]
    vectors: list[list[int]]
    mask: list[bool] | None = None
    buckets: list[Bucket] = field(default_factory=list)
    entries: int = 0

    def stale(self, mask: list[bool], state: State) -> bool:
        """Whether the buckets no longer fit what is present or what the state holds."""
        return (
            self.mask != mask
            or len(state) != self.entries
            or not all(bucket.live(state) for bucket in self.buckets)
            or any(self._moved(bucket) for bucket in self.buckets)
        )

    def _moved(self, bucket: Bucket) -> bool:
        """Whether a window began in which some unit gains or loses its state."""
        rule = self.rules[bucket.group]
        if rule is None or not drops(rule):
            return False
        t = bucket.firsts[0][bucket.unit.step_key] + 1
        return any(unit.since(rule, bucket.held, t) != bucket.held for unit in bucket.units)

    def fill(self, mask: list[bool], state: State) -> None:
        """Sort the present units into buckets, allocating what they need."""
        self.buckets = buckets_of(self.units, mask, state, self.rules, self.buckets)
        self.mask, self.entries = mask, len(state)

    def adopt(self, group: int, rule: Rule, settings: Mapping[str, Any]) -> bool:
        """Take a rule with other values for a group; False if its units would change."""
        before = self.rules[group]
        if before is None or before.members != rule.members:
            return False
        if drops(rule) and labels_of(settings, rule) != labels_of(settings, before):
            return False
        if before.every != rule.every and settings["stagger"]:
            return False
        for unit in self.units:
            if unit.group != group:
                continue
            sides = tuple(unit.sides(i) for i in range(len(unit.params)))
            turned = rule.turns([(b.m, b.n) for b in unit.blocks])
            if turned != unit.turned or rule.slots(sides) != unit.slots:
                return False
        self.rules[group] = rule
        return True
