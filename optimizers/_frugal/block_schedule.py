"""Schedule of blocks of parameters: in a window some have state, the others move without."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any

from torch import Tensor
from typing_extensions import override

from .._core.rule import Dense, Member, Rule, Slot, Term
from .._core.validation import check, is_number, shown
from .._driver.param_groups import describe, parameters_of, roles_of
from .._toolkit.base_optimizers import BaseOptimizer
from .._toolkit.random_keys import StackRNG, random_order
from .gradient_split import GradientSplit, StateFreeUpdate, resolve_count, warn_rounds_to_zero

BLOCK_ORDERS = ("random", "ascending", "descending", "mirror")


@dataclass(frozen=True)
class BlockSchedule(GradientSplit):
    """Which blocks are active in which window of ``gap`` updates; windows are numbered from 0.

    Attributes:
        order: ``"random"``: a new set in each window; ``"ascending"``, ``"descending"``: the next
            ones, then from the start again; ``"mirror"``: as many from the front as from the back.
        share: Count of active blocks, or their part; halves are rounded to even.
        gap: Updates in a window.
        seed: Decides the random sets.
        keeps_state: Whether a block that stays active keeps its state.
    """

    order: str
    share: float
    gap: int
    seed: int
    keeps_state: bool

    @property
    @override
    def splits(self) -> frozenset[str]:
        return frozenset(("rows", "cols"))

    @override
    def slots(self, m: int, n: int, base_optimizer: BaseOptimizer) -> dict[str, Slot]:
        """State of an active block; the driver drops it where ``state_since`` is 0."""
        return base_optimizer.slots("mn")

    @override
    def terms(
        self, w: Member, base_optimizer: BaseOptimizer, t: int | Tensor, state_free: StateFreeUpdate
    ) -> tuple[Term, ...]:
        """One term for all of an active block; moments and clock begin in its first step."""
        assert w.grad is not None
        if w.t == w.state_since:
            for X in w.state.values():
                X.zero_()
        own_step = w.t - w.state_since + 1
        return (Dense(base_optimizer.direction(w.state, w.grad, own_step)),)

    def active_blocks(self, window: int, count: int) -> frozenset[int]:
        """Numbers of the active blocks among ``count``."""
        return _active_blocks(self, window, count)

    def state_since(self, number: int, count: int, t: int) -> int:
        """The update since which block ``number`` has its state of update t; 0 without state."""
        window = (t - 1) // self.gap
        active = self.active_blocks(window, count)
        if number not in active:
            return 0
        if self.keeps_state and len(active) == count:  # then every window is like this one
            return 1
        while self.keeps_state and window > 0 and number in self.active_blocks(window - 1, count):
            window -= 1
        return window * self.gap + 1


@lru_cache(maxsize=65536)
def _active_blocks(schedule: BlockSchedule, window: int, count: int) -> frozenset[int]:
    """Compute ``active_blocks``, cached since every block asks for the same window."""
    active = resolve_count(schedule.share, count)
    if active == 0 and schedule.share > 0:
        warn_rounds_to_zero(schedule.share, f"{count} blocks")
    if schedule.order == "random":
        generator = StackRNG(schedule.seed, (0,), window).generator(0)
        return frozenset(random_order(count, generator)[:active].tolist())
    if schedule.order == "mirror":
        check(
            active % 2 == 0,
            f"block_order='mirror' takes blocks in pairs, but density {schedule.share} of {count} "
            f"blocks is {active}: choose a density that gives an even number, or another order",
        )
        front = {(window * (active // 2) + i) % (count // 2) for i in range(active // 2)}
        return frozenset(front | {count - 1 - i for i in front})
    forward = {(window * active + i) % count for i in range(active)}
    return frozenset(forward if schedule.order == "ascending" else {count - 1 - i for i in forward})


def check_blocks(blocks: Any) -> None:
    """Refuse what says no block of any parameter; :func:`block_labels` reads the rest."""
    numbered = isinstance(blocks, (tuple, list)) and all(is_number(x, Integral) for x in blocks)
    check(
        numbered or (isinstance(blocks, str) and blocks in ("tensor", "layer")),
        f"blocks (group key block_of) must be one of ('tensor', 'layer'), lists of tensors or, in "
        f"a group, an int for each parameter, got {shown(blocks)}",
    )


def numbered_blocks(blocks: Any) -> dict[Tensor, int]:
    """The block of every tensor in lists of tensors.

    Raises:
        ValueError: If these are no lists of tensors.
    """
    lists: list[list[Any]] = []
    if _is_list(blocks):
        lists = [[*block] if _is_list(block) else [None] for block in blocks]
    valid = _is_list(blocks) and all(isinstance(p, Tensor) for block in lists for p in block)
    check(valid, f"blocks must be 'tensor', 'layer' or lists of tensors, got {shown(blocks)}")
    return {p: i for i, block in enumerate(lists) for p in block}


def _is_list(x: Any) -> bool:
    return isinstance(x, Iterable) and not isinstance(x, (str, Mapping, Tensor))


def block_labels(blocks: str | Sequence[int], names: Sequence[str | None]) -> list[Hashable]:
    """The block of each parameter; None is a block of its own.

    Args:
        blocks: ``"tensor"``, ``"layer"`` (the first whole number in a name), or a number for each
            parameter, -1 for none.
        names: Names of the parameters.

    Raises:
        ValueError: If there are not as many numbers as parameters, or ``"layer"`` lacks names.
    """
    if not isinstance(blocks, str):
        length = len(blocks)
        check(length == len(names), f"block_of has {length} numbers for {len(names)} parameters")
        return [None if number < 0 else number for number in blocks]
    if blocks == "tensor":
        return [None] * len(names)
    check(
        None not in names,
        "blocks='layer' reads layers from names: pass the model or its named_parameters()",
    )
    numbers = [re.search(r"\d+", str(name)) for name in names]
    return [int(number[0]) if number else None for number in numbers]


def assign_block_numbers(
    group: dict[str, Any], defaults: Mapping[str, Any], listed: Mapping[Tensor, int]
) -> None:
    """Give a group the number of each parameter's block, -1 for what AdamW trains.

    Args:
        group: A group as users give it, changed in place.
        defaults: Values of keys that the group lacks.
        listed: Block of every tensor in the user's lists.

    Raises:
        ValueError: For a matrix that is in no list.
    """
    full = {**defaults, **group}
    is_other_method = full["rule"] not in (None, "FRUGAL")
    if is_other_method or "block_of" in group or isinstance(group["params"], set):
        return
    params, names = parameters_of(group)
    # any rule with one member will do: only whether a parameter goes to the rule is asked
    rows = roles_of({**full, "params": params, "param_names": names}, Rule())
    group["block_of"] = tuple(listed.get(p, -1) for p in params)
    for i, (row, number) in enumerate(zip(rows, group["block_of"], strict=True)):
        check(
            row.rule != "matrix" or number >= 0,
            f"{describe(names[i], params[i], i)} is in none of the lists of blocks; add it to "
            "one, or give it a group with rule='adamw'",
        )
