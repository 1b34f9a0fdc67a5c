"""How a sharded weight is stepped: where its parts are, or whole on an owner.

| plan | what happens |
|---|---|
| ``local`` | no matrix is cut: the rule runs on what each rank holds, and nothing is sent |
| ``reduce`` | matrices are cut: the rule runs on what each rank holds, and sums are sent |
| ``owner`` | whole matrices travel to one rank each; or only what a rule asks for of them |
| ``gather`` | every rank gets whole weights and does all work; never chosen by ``"auto"`` |
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from .._core.rule import Rule, Slot
from .held_codes import place_of, scales_layout
from .held_views import HeldView, held_views
from .layout import Box, Layout, layout_of, longest_dim, numel, resting_layout

if TYPE_CHECKING:
    from .units import Unit

PLANS = ("auto", "local", "owner", "reduce", "gather")


@dataclass(frozen=True)
class Placed:
    """How the weights of a unit lie over ranks, and what is done about it.

    Attributes:
        plan: ``"local"``, ``"reduce"``, ``"owner"`` or ``"gather"``.
        layouts: One per member.
        axes: Axes of the mesh along which ranks share the work: those that cut any member, and
            with ``spread_replicas`` those of replicas.
        held: Per member, what this process holds, for a rule that runs on that; None: the unit
            travels whole.
        cut: Per member, letters of the sides that are cut as the rule sees it, and ``"k"`` for its
            matrices, where ``held`` is given.
        by_rank: Per member, what each rank holds, where any is cut.
        shares: Whether replicas share what a rule asks of whole matrices.
    """

    plan: str
    layouts: tuple[Layout, ...]
    axes: tuple[int, ...]
    held: tuple[HeldView, ...] | None
    cut: tuple[frozenset[str], ...]
    by_rank: tuple[tuple[HeldView, ...], ...] = ()
    shares: bool = False

    @property
    def runs_on_shards(self) -> bool:
        """Whether the rule runs on shards, and asks other ranks for what it needs of the whole.

        Else gradient, weight and state travel, and the rule runs on an owner.
        """
        return self.held is not None and (self.plan in ("reduce", "owner") or self.shares)

    @property
    def key(self) -> Hashable:
        """What units of one stack have in common."""
        return self.plan, self.axes, self.shares

    def resting_layout(self, i: int, axes: str, shape: tuple[int, ...], many: bool) -> Layout:
        """Layout of state of member i that is not shaped like the weight.

        Args:
            i: The member.
            axes: Axes of its slot.
            shape: Its shape.
            many: Whether matrices are numbered by a first dimension.
        """
        layout = self.layouts[i]
        if self.held is None:
            return resting_layout(layout, shape, longest_dim(layout, shape))
        letters = ("k" if many else "") + axes
        dims = [d for d, letter in enumerate(letters) if letter in self.cut[i]]
        return resting_layout(layout, shape, dims[0] if dims else None, follows=True)


def place(
    unit: Unit,
    rule: Rule,
    texts: Sequence[str],
    views: Sequence[str],
    count: int,
    choice: str,
    spread: bool = False,
) -> Placed:
    """Choose the plan of a unit of sharded weights.

    Args:
        unit: The unit.
        rule: Its rule.
        texts: Words that name its parameters.
        views: Views of its parameters.
        count: Units into which the view cuts a parameter.
        choice: The group's ``plan``.
        spread: The group's ``spread_replicas``.

    Raises:
        ValueError: If weights lie in a way that no plan can step, or not by this plan.
        NotImplementedError: For a rule that writes other weights than those with a gradient.
    """
    layouts = _layouts(unit, texts)
    if rule.writes_in_refresh:
        raise NotImplementedError(
            f"{rule.method()} does not train sharded weights, and {texts[0]} is one; use "
            "DistributedDataParallel, under which equal seeds keep the ranks equal"
        )
    cut_axes = tuple(sorted({axis for layout in layouts for axis in layout.axes}))
    if not spread:
        cut_axes = _matrix_axes(unit, layouts, cut_axes)
    held = _held(unit, rule, layouts, views, count, cut_axes)
    axes = layouts[0].all_axes if spread else cut_axes
    if held is None and not spread:  # whole experts of all ranks travel
        axes = tuple(sorted({axis for layout in layouts for axis in layout.axes}))
    pairs = () if held is None else zip(held, layouts, strict=True)
    cut = tuple(_letters(unit, i, h, x) for i, (h, x) in enumerate(pairs))
    is_whole = held is not None and not any(letters & {"m", "n"} for letters in cut)
    if not axes:
        return Placed("local", layouts, axes, held, cut)
    on_parts = () if held is None else ("local",) if is_whole else ("reduce",)
    if rule.needs_full_matrix and not is_whole:
        on_parts = ()
    exact = (*on_parts, "owner", "gather")
    if is_whole and choice == "auto":
        return _whole(Placed("local", layouts, axes, held, cut), unit, rule, views, cut_axes)
    if choice != "auto" and choice not in exact:
        raise ValueError(
            f"plan={choice!r} is not exact for {texts[0]} as it is sharded over "
            f"{[x.placements for x in layouts]}; choose {', '.join(map(repr, exact))} or 'auto'"
        )
    plan = exact[0] if choice == "auto" else choice
    if held is None or plan == "gather" or (plan == "owner" and exact[0] != "owner"):
        return travelling(Placed(plan, layouts, axes, None, ()))
    if plan == "local":
        return Placed(plan, layouts, axes, held, cut)
    return _with_ranks(Placed(plan, layouts, axes, held, cut, shares=axes != cut_axes), unit, views)


def _matrix_axes(
    unit: Unit, layouts: Sequence[Layout], cut_axes: tuple[int, ...]
) -> tuple[int, ...]:
    """Axes that cut matrices, where others divide a stack of them between its matrices."""
    if len(cut_axes) < 2:
        return cut_axes
    found = tuple(
        axis
        for axis in cut_axes
        if not all(_is_stack(unit, i, x) and x.dim_of(axis) == 0 for i, x in enumerate(layouts))
    )
    return found or cut_axes


def _is_stack(unit: Unit, i: int, layout: Layout) -> bool:
    """Whether the first dimension of a parameter numbers matrices, as of experts."""
    return len(layout.shape) == 3 and unit.views[i].k > 1


def _whole(
    placed: Placed, unit: Unit, rule: Rule, views: Sequence[str], cut_axes: tuple[int, ...]
) -> Placed:
    """Matrices that are whole where they are: alone, or with replicas that share the work."""
    is_shared = rule.needs_full_matrix or bool(rule.refresh_interval)
    if placed.axes == cut_axes or not is_shared or any("k" in letters for letters in placed.cut):
        return placed
    plan = "owner" if rule.needs_full_matrix else "local"
    return _with_ranks(replace(placed, plan=plan, shares=True), unit, views)


def _with_ranks(placed: Placed, unit: Unit, views: Sequence[str]) -> Placed:
    """The same with what each rank holds."""
    by_rank = tuple(
        _by_rank(unit, layout, placed.axes, view)
        for layout, view in zip(placed.layouts, views, strict=True)
    )
    return replace(placed, by_rank=by_rank)


def travelling(placed: Placed) -> Placed:
    """The same weights, of which whole units travel."""
    plan = "owner" if placed.plan in ("local", "reduce") and placed.axes else placed.plan
    return replace(placed, plan=plan, held=None, cut=(), by_rank=(), shares=False)


def _by_rank(unit: Unit, layout: Layout, axes: tuple[int, ...], view: str) -> tuple[HeldView, ...]:
    """What each rank holds of a unit."""
    return _views_by_rank(view, layout.shape, layout.over(axes).boxes, unit.number)


@lru_cache(maxsize=1024)
def _views_by_rank(
    view: str, shape: tuple[int, ...], boxes: tuple[Box, ...], number: int
) -> tuple[HeldView, ...]:
    """What each rank holds of one unit of a parameter, for all parameters that lie alike."""
    found = []
    for rank in range(len(boxes)):
        views_there = held_views(view, shape, boxes, rank)
        assert views_there is not None
        found.append(views_there[number])
    return tuple(found)


def _layouts(unit: Unit, texts: Sequence[str]) -> tuple[Layout, ...]:
    """Layouts of all members, which must share a mesh."""
    found = list[Layout]()
    for p, text in zip(unit.params, texts, strict=True):
        layout = layout_of(p, text)
        if layout is None:
            raise ValueError(
                f"{text} is no DTensor, but a weight that is stepped with it is; shard both"
            )
        if found and layout.mesh != found[0].mesh:
            raise ValueError(
                f"{text} lies on another mesh than {texts[0]}, with which it is stepped; shard "
                "both on one mesh"
            )
        found.append(layout)
    return tuple(found)


def _letters(unit: Unit, i: int, held: HeldView, layout: Layout) -> frozenset[str]:
    """Letters of what is cut: sides as the rule sees them, and ``"k"`` for matrices."""
    names = {"rows": "n", "cols": "m"} if unit.transposed[i] else {"rows": "m", "cols": "n"}
    sides = frozenset(names[side] for side in held.cut)
    is_divided = _is_stack(unit, i, layout) and 0 in layout.dims
    return sides | {"k"} if layout.axes and (is_divided or not sides) else sides


def _held(
    unit: Unit,
    rule: Rule,
    layouts: Sequence[Layout],
    views: Sequence[str],
    count: int,
    axes: tuple[int, ...],
) -> tuple[HeldView, ...] | None:
    """What this process holds, if the rule can run on that; None if the unit must travel."""
    if not axes:
        found = [held_views(v, x.shape, [x.box], 0) for v, x in zip(views, layouts, strict=True)]
        return tuple(views_of[unit.number] for views_of in found if views_of is not None)
    # a refresh asks whether a whole gradient is zero, which ranks know of parameters only
    if count > 1 and rule.refresh_interval:
        return None
    held = list[HeldView]()
    for i, (layout, view) in enumerate(zip(layouts, views, strict=True)):
        ranks = layout.over(axes)
        views_here = held_views(view, layout.shape, ranks.boxes, ranks.rank)
        if views_here is None:
            return None
        own = views_here[unit.number]
        cut = _as_rule_sees(own, unit.transposed[i])
        # ranks add to one sum, and none of them what another has added: a replica of this member
        is_one_line = len(layout.dims) == 1 and {*axes} <= {*layout.axes}
        is_one_line = is_one_line or len(axes) == 1
        if cut and not (is_one_line and cut <= rule.splits_of(i)):
            return None
        if cut and unit.writes[i] == "eco":  # a Carry turns errors by the whole of U
            return None
        if not _state_follows(unit, i, layout, view, own):
            return None
        held.append(own)
    pairs = enumerate(zip(held, layouts, strict=True))
    if len({_letters(unit, i, h, x) & {"k"} for i, (h, x) in pairs}) > 1:
        return None  # experts of one factor are cut, and rows of the other
    return tuple(held)


def _as_rule_sees(held: HeldView, transposed: bool) -> frozenset[str]:
    if not transposed:
        return held.cut
    return frozenset({"rows": "cols", "cols": "rows"}[side] for side in held.cut)


def _state_follows(unit: Unit, i: int, layout: Layout, view: str, held: HeldView) -> bool:
    """Whether torch's shards of all state are what each rank's part of the weight needs."""
    transposed = unit.transposed[i]
    letters = _letters(unit, i, held, layout)
    placed = Placed("owner", (layout,), layout.axes, (held,), (letters,))
    many = unit.views[i].k > 1
    for name, slot in unit.slots[i].items():
        if slot.axes == "mn" and not _codes_follow(unit, i, name, layout):
            return False
        if slot.axes == "mn" or not letters & {*slot.axes, *("k" if many else "")}:
            continue
        if slot.device is not None:
            return False
        shape = (*((unit.views[i].k,) if many else ()), *slot.shape(*unit.sides(i)))
        stored = placed.resting_layout(0, slot.axes, shape, many)
        if not _codes_follow(unit, i, name, stored):
            return False
        boxes = stored.over(layout.axes).boxes
        for box, there in zip(boxes, _by_rank(unit, layout, layout.axes, view), strict=True):
            needed = _needed(there, transposed, slot, many)
            if box != needed and (numel(box) or numel(needed)):
                return False
    return True


def _needed(held: HeldView, transposed: bool, slot: Slot, many: bool) -> Box:
    """The box of a state tensor that belongs to what a rank holds of the matrices."""
    rows, cols = held.box(transposed)
    sides = slot.shape(rows[1] - rows[0], cols[1] - cols[0])
    starts = {"m": rows[0], "n": cols[0]}
    box = tuple(
        (starts.get(letter, 0), starts.get(letter, 0) + side)
        for letter, side in zip(slot.axes, sides, strict=True)
    )
    return ((held.first, held.first + held.view.k), *box) if many else box


def _codes_follow(unit: Unit, i: int, name: str, stored: Layout) -> bool:
    """Whether state in eight bits can be made where the weight is.

    Each rank makes all of a basis, or none. Blocks of other state must lie whole on a rank, but
    that of state shaped like the weight, which stays in floats else. Second moments are rounded by
    bits that count entries of the whole, of which a rank must know where its rows lie.
    """
    scales = unit.whole_scales(i, name)
    if scales is None or not stored.axes:
        return True
    if name in unit.bases:
        return not stored.dims
    if scales_layout(stored, scales) is None:
        return unit.slots[i][name].axes == "mn"
    return not unit.rounds_squares(name) or place_of(stored, scales) is not None


def work_of(unit: Unit) -> int:
    """Work of one matrix of each member, by which owners are chosen: m n min(m, n)."""
    sides = [unit.sides(i) for i in range(len(unit.params))]
    return sum(m * n * min(m, n) for m, n in sides)
