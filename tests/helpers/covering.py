"""The part of a grid that runs by default: every two values of two axes still meet.

``@pytest.mark.covering`` says of a test that its axes do not depend on each other, so that a fault
shows where two values meet, whatever the others are. Of its cases those run in which every pair of
values appears that appears in the whole grid, and every value. Entries of ``helpers/methods.py``
and ``helpers/pair_problems.py`` that make the same class count as one value in pairs, and take
turns: every class meets every value, every entry runs. ``covering(whole=["method"])`` lets every
entry meet every value, ``covering(strength=3)`` every three values of three axes meet.
``--full-grids`` runs all cases, and so do tests that are named.
"""

import heapq
import itertools
import os
from collections import defaultdict

from helpers.methods import METHODS
from helpers.pair_problems import PAIRS

NAMES = {name.partition("-")[0] for name in (*METHODS, *PAIRS)}


def does_all():
    """Whether grids run whole."""
    return os.environ.get("STIEFEL_FULL_GRIDS") == "1"


def in_turn(*positions, of=3):
    """Whether one in ``of`` cases runs, by its positions along the axes of a loop.

    Two axes meet in all pairs if another one has at least ``of`` values.
    """
    return does_all() or sum(positions) % of == 0


def value_of(given):
    """What tells a value of an axis from another one."""
    return given if isinstance(given, str) else repr(given)


def class_of(value):
    """A value as pairs count it: the class for an entry."""
    return value.partition("-")[0] if value.partition("-")[0] in NAMES else value


def wanted(case, whole=(), strength=2):
    """What a case ({axis: value}) covers: its values, and its pairs of values, or more of them."""
    met = {axis: value if axis in whole else class_of(value) for axis, value in case.items()}
    return {*case.items(), *itertools.combinations(sorted(met.items()), strength)}


def chosen(cases, whole=(), strength=2):
    """Positions of cases that together cover what all of them do: always one that adds most."""
    parts, covered = [wanted(case, whole, strength) for case in cases], set()
    # Of two that add as much, the one whose values were taken less often: entries take turns.
    taken, kept = defaultdict(int), []
    heap = [(-len(part), 0, i) for i, part in enumerate(parts)]
    heapq.heapify(heap)
    while heap:
        _, _, i = heapq.heappop(heap)
        adds = len(parts[i] - covered)
        if not adds:
            continue
        now = (-adds, max(taken[x] for x in cases[i].items()), i)
        if heap and now > heap[0]:
            heapq.heappush(heap, now)
            continue
        kept.append(i)
        covered |= parts[i]
        for x in cases[i].items():
            taken[x] += 1
    return sorted(kept)


def left_out(items):
    """Collected cases that need not run: those of marked tests that add nothing."""
    grids = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("covering")
        if mark is not None:
            grids[item.nodeid.partition("[")[0]].append((item, mark))
    for grid in grids.values():
        cases = [{k: value_of(x) for k, x in item.callspec.params.items()} for item, _ in grid]
        kept = {*chosen(cases, **grid[0][1].kwargs)}
        yield from (item for i, (item, _) in enumerate(grid) if i not in kept)
