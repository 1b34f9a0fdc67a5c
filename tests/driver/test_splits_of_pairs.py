"""LoRA pairs on shards: A (r x n) is cut along its columns, B (m x r) along its rows.

Simulated ranks run the rules of AltLoRA and AdaPreLoRA with all options, on uneven and empty
shards, against the optimizer on whole factors.
"""

import math
from dataclasses import fields

import pytest
import torch
from helpers.simulated_ranks import Lockstep, MissingRanks, UnequalMatrices, error

from stiefel.optimizers import AdaPreLoRA, AltLoRA, Member, pairs_to_groups
from stiefel.optimizers._core.rule import Reductions
from stiefel.optimizers._driver.batched_calls import DirectionIterator
from stiefel.optimizers._driver.decay import Decay
from stiefel.optimizers._driver.write import write_

K, M, N, R = 2, 11, 13, 3
STEPS, LR, DECAY, SCALE = 5, 0.05, 0.1, 2.0
SHARES = {
    2: ([9, 4], [3, 8]),
    3: ([5, 0, 8], [4, 7, 0]),
    5: ([3, 3, 3, 3, 1], [0, 3, 3, 3, 2]),
}
"""Columns of A and rows of B of every rank."""
OPTIONS = {
    AltLoRA: [
        {},
        {"second_moment": "elementwise"},
        {"second_moment": "elementwise", "eps": 1e-4, "max_rel_step": 1e-3},
        {"schedule": "alternate"},
        {"schedule": "alternate", "switch_every": 2, "first": "A"},
        {"compact_alignment": True, "delta_mode": "relative", "delta": 1e-3},
        {"betas": (0.5, 0.9), "scale_aware": False, "lr_ratio_b": 2.0},
    ],
    AdaPreLoRA: [
        {},
        {"variant": "sgd", "max_rel_step": 1e-3},
        {"variant": "adamw", "lr_ratio_b": 2.0, "betas": (0.5, 0.9)},
        {"stats": "none", "eps": 1e-3},
        {"floor": 0.5, "rescale_visible": False, "scale_aware": False, "eps_rel": 1e-4},
    ],
}
WHOLE_ONLY = {AltLoRA: {"compat": "reference"}, AdaPreLoRA: {"stats": "exact"}}
"""Options with which pairs travel whole."""
RUNS = [
    pytest.param(cls, options, id=f"{cls.__name__}({options})")
    for cls, settings in OPTIONS.items()
    for options in settings
]
CALLS = {AltLoRA: 2, AdaPreLoRA: 3}
"""Calls of an ordinary step with the default options."""


class Shards(Reductions):
    """The reductions of one factor on one rank."""

    def __init__(self, ranks, rank, is_cut):
        self._ranks, self._rank, self.is_cut = ranks, rank, is_cut

    def _one(self, kind, x):
        return self._ranks.ask(self._rank, kind, [(self, x)])[0]

    def rows(self, x):
        return self._one("sum", x)

    cols = both = rows

    def most(self, x):
        return self._one("most", x)

    def sums_together(self, *parts):
        return self._ranks.ask(self._rank, "sum", parts)

    def most_together(self, *parts):
        return self._ranks.ask(self._rank, "most", parts)


class Pairs:
    """K pairs over ranks, as the driver steps them.

    Args:
        optimizer: Of the same pairs on one process, for its rule.
        factors: A (K, r, n) and B (K, m, r).
        shares: Columns of A and rows of B of every rank; None for a factor that all have whole.
        broken: None, or (call, part): in every step this part of this call is not completed.
    """

    def __init__(self, optimizer, factors, shares, broken=None):
        (self.rule,) = optimizer._get_plan().rules
        self.broken, self.t, self.calls = broken, 0, []
        self.shares, self.count = shares, len(next(x for x in shares if x is not None))
        self.weights = self.cut(factors)
        sides = tuple(tuple(x.shape[-2:]) for x in factors)
        self.sides, self.states = sides, []
        for Ws in self.weights:
            held = tuple(tuple(W.shape[-2:]) for W in Ws)
            self.states.append([*map(self._state, self.rule.slots(sides), held, Ws)])
        self._lockstep = Lockstep(self.count, self._answer)

    @staticmethod
    def _state(slots, sides, W):
        made = {}
        for name, slot in slots.items():
            shape, dtype = (K, *slot.shape(*sides)), slot.dtype or W.dtype
            made[name] = torch.zeros(shape, dtype=dtype)
            if slot.fill == "eye":
                made[name] += torch.eye(shape[-1], dtype=dtype)
        return made

    def cut(self, pair):
        """Per rank, its part of A and of B."""
        parts = []
        for X, shares, dim in zip(pair, self.shares, (-1, -2), strict=True):
            is_whole = X is None or shares is None
            parts.append([X] * self.count if is_whole else X.split(shares, dim))
        return [[None if X is None else X.clone() for X in Xs] for Xs in zip(*parts, strict=True)]

    def whole(self, i):
        parts = [Ws[i] for Ws in self.weights]
        if self.shares[i] is None:
            return self.equal(parts)
        return torch.cat(parts, -2 if i else -1)

    def whole_state(self, i, name):
        """A slot of one factor; what no letter says to be cut is equal on all ranks."""
        slot = self.rule.slots(self.sides)[i][name]
        parts, letter = [states[i][name] for states in self.states], "m" if i else "n"
        if letter in slot.axes and self.shares[i] is not None:
            return torch.cat(parts, 1 + slot.axes.index(letter))
        return self.equal(parts)

    @staticmethod
    def equal(parts):
        """What all ranks have whole."""
        if not all(torch.equal(parts[0], part) for part in parts):
            raise UnequalMatrices("what is not cut must be equal on all ranks")
        return parts[0]

    def step(self, grads):
        self.t += 1
        parts, self._numbers, self.calls = self.cut(grads), [0] * self.count, []
        self._lockstep.run(
            [lambda rank=rank: self._step_rank(rank, parts[rank]) for rank in range(self.count)]
        )

    def _step_rank(self, rank, grads):
        members = [
            Member(
                G, lambda W=W: W, state, t=self.t, refreshed=0, m=m, n=n, indices=(0, 1), number=i,
                reductions=Shards(self, rank, self.shares[i] is not None),
            )
            for i, (G, W, state, (m, n)) in enumerate(
                zip(grads, self.weights[rank], self.states[rank], self.sides, strict=True)
            )
        ]  # fmt: skip
        steps = DirectionIterator(self.rule.update(*members))
        for step in steps:
            if hasattr(step, "fn"):
                steps.answer = step.fn(*step.args)
            else:
                write_(self.weights[rank][step.member.number], step, LR, Decay(DECAY))

    def ask(self, rank, kind, parts):
        number = self._numbers[rank]
        self._numbers[rank] += 1
        if rank == 0:
            self.calls.append((kind, [x.shape for _, x in parts]))
        found = self._lockstep.exchange(rank, (kind, [x for _, x in parts]))
        is_mine = [not of.is_cut or (number, j) == self.broken for j, (of, _) in enumerate(parts)]
        return tuple(
            x if mine else y for mine, (_, x), y in zip(is_mine, parts, found, strict=True)
        )

    @staticmethod
    def _answer(requests):
        asked = {(kind, tuple((x.shape, x.dtype) for x in xs)) for kind, xs in requests}
        if len(asked) > 1:
            raise MissingRanks(f"ranks ask for different things: {asked}")
        assert len({x.dtype for x in requests[0][1]}) == 1, "one request has one dtype"
        is_sum, parts = requests[0][0] == "sum", zip(*(xs for _, xs in requests), strict=True)
        found = [sum(xs[1:], xs[0]) if is_sum else torch.stack(xs).amax(0) for xs in parts]
        return [[x.clone() for x in found] for _ in requests]


def draw(dtype, **scales):
    """A, B, and gradients of all steps.

    Args:
        dtype: Their dtype.
        **scales: For some of ``A, B, GA, GB`` scales of their first shards and of the last one.
    """
    generator = torch.Generator().manual_seed(5)

    def pair(*names):
        A = torch.randn(K, R, N, generator=generator, dtype=torch.float64)
        B = torch.randn(K, M, R, generator=generator, dtype=torch.float64)
        for X, name in zip((A.mT, B), names, strict=True):
            first, last = scales.get(name, (1.0, 1.0))
            X[:, :4].mul_(first)
            X[:, 4:9].mul_(last if name[-1] == "B" else first)
            X[:, 9:].mul_(last)
        return [A.to(dtype), B.to(dtype)]

    return pair("A", "B"), [pair("GA", "GB") for _ in range(STEPS)]


def made(cls, pair, options):
    params = [torch.nn.Parameter(X.clone()) for X in pair]
    groups = pairs_to_groups([params], scale=SCALE)
    return cls(groups, lr=LR, weight_decay=DECAY, **options), params


def follow(cls, options, pair, grads, shares, broken=None, missing=()):
    """Largest difference to one process, of weights and of state; and the ranks."""
    optimizer, params = made(cls, pair, options)
    ranks, far = Pairs(optimizer, pair, shares, broken), 0.0
    for k, Gs in enumerate(grads):
        Gs = [None if (k, i) in missing else G for i, G in enumerate(Gs)]
        for p, G in zip(params, Gs, strict=True):
            p.grad = None if G is None else G.clone()
        optimizer.step()
        ranks.step(Gs)
        for i, p in enumerate(params):
            far = max(far, error(ranks.whole(i), p.detach()))
    for i, p in enumerate(params):
        for name in ranks.states[0][i]:
            found = ranks.whole_state(i, name)
            far = max(far, error(found, optimizer.state[p][name].view_as(found)))
    return far if math.isfinite(far) else math.inf, ranks


@pytest.mark.parametrize("count", SHARES)
@pytest.mark.parametrize("cls, options", RUNS)
def test_ranks_take_the_steps_of_one_process(cls, options, count):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        assert follow(cls, options, *draw(dtype), SHARES[count])[0] <= bound


FACTORS, GRADS = ("A", "B"), ("GA", "GB")
FAR = {
    "small gradients on a rank": dict.fromkeys(GRADS, (1.0, 1e-16)),
    "small factors on a rank": dict.fromkeys(FACTORS, (1.0, 1e-16)),
    "small everywhere": dict.fromkeys(FACTORS + GRADS, (1e-9, 1e-9)),
    "large gradients on a rank": dict.fromkeys(GRADS, (1.0, 1e17)),
    "large gradients": dict.fromkeys(GRADS, (1e20, 1e20)),
    "tiny gradients": dict.fromkeys(GRADS, (1e-20, 1e-20)),
    "large factors on a rank": dict.fromkeys(FACTORS, (1.0, 1e15)),
    "factors beyond the squares of float32": dict.fromkeys(FACTORS, (1e19, 1e20)),
}
"""Scales with which shards differ, or leave the range of float32."""


@pytest.mark.parametrize("scales", FAR)
@pytest.mark.parametrize("cls", OPTIONS)
def test_shards_of_other_sizes_take_the_steps_of_one_process(cls, scales):
    for options in OPTIONS[cls][:2]:
        far, _ = follow(cls, options, *draw(torch.float32, **FAR[scales]), SHARES[3])
        assert far <= 1e-5, options


@pytest.mark.parametrize("cls, options", RUNS)
def test_a_whole_factor_beside_one_that_is_cut(cls, options):
    """The whole one is stepped alike on all ranks, and no part of it is added up twice."""
    for A, B in ((SHARES[3][0], None), (None, SHARES[3][1])):
        assert follow(cls, options, *draw(torch.float64), (A, B))[0] <= 1e-12


@pytest.mark.parametrize("cls, options", RUNS)
def test_gradients_that_are_missing(cls, options):
    missing = {(1, 0), (2, 1), (3, 0)}
    assert follow(cls, options, *draw(torch.float64), SHARES[3], missing=missing)[0] <= 1e-12


@pytest.mark.parametrize("cls, options", RUNS)
def test_factors_that_are_zero_as_adapters_begin(cls, options):
    (A, B), grads = draw(torch.float64)
    assert follow(cls, options, (A, 0 * B), grads, SHARES[3])[0] <= 1e-9
    assert follow(cls, options, (0 * A, B), grads, SHARES[3])[0] <= 1e-9


def error_without(cls, options, call, part, **scales):
    """The error if one part of a call is not completed."""
    try:
        return follow(cls, options, *draw(torch.float32, **scales), SHARES[3], (call, part))[0]
    except (MissingRanks, UnequalMatrices):  # ranks with sums of their own part ways
        return math.inf


def is_flag(shapes, part):
    """Whether a part is a number of a call whose others are matrices, or one of several."""
    return shapes[part][-2:] == (1, 1) and len(shapes) > 8


@pytest.mark.parametrize("cls, options", RUNS)
def test_every_part_of_every_call_is_needed(cls, options):
    _, ranks = follow(cls, options, *draw(torch.float32), SHARES[3])
    for call, (kind, shapes) in enumerate(ranks.calls):
        for part in range(len(shapes)):
            if is_flag(shapes, part):
                continue
            far = error_without(cls, options, call, part)
            assert far > 1e-4, f"the result is the same without part {part} of {kind} {call}"


@pytest.mark.parametrize("options", [{}, {"stats": "none"}], ids=str)
def test_ranks_agree_on_the_range_of_their_entries(options):
    """AdaPreLoRA's flags: of each gradient and factor whether it is large, is there, is ordinary.

    Each alone decides where one tensor leaves the range: on the rank with its last shard, or on
    those with any of it.
    """
    _, ranks = follow(AdaPreLoRA, options, *draw(torch.float32), SHARES[3])
    shapes = ranks.calls[0][1]
    flags = [part for part in range(len(shapes)) if is_flag(shapes, part)]
    assert len(flags) == 12
    scales = ((1.0, 2.0**60), (2.0**-60, 2.0**-60), (1.0, 2.0**-60))
    for number, part in enumerate(flags):
        name = ("GA", "A", "GB", "B")[number // 3]
        only = {name: scales[number % 3]}
        assert follow(AdaPreLoRA, options, *draw(torch.float32, **only), SHARES[3])[0] <= 1e-5
        assert error_without(AdaPreLoRA, options, 0, part, **only) == math.inf, (name, number)


@pytest.mark.parametrize("cls", OPTIONS)
def test_ordinary_steps_make_few_calls(cls):
    """AltLoRA one for each factor, with two sums; AdaPreLoRA two sums and a maximum."""
    _, ranks = follow(cls, {}, *draw(torch.float32), SHARES[2])
    small = [sum(shape[-2:] == (R, R) for shape in shapes) for _, shapes in ranks.calls]
    kinds = [kind for kind, _ in ranks.calls]
    if cls is AltLoRA:
        assert (kinds, small) == (["sum", "sum"], [2, 2])
    else:
        assert (kinds, small) == (["sum", "most", "sum"], [6, 0, 4])
    assert {math.prod(x[-2:]) for _, xs in ranks.calls for x in xs} == {R * R, 1}


@pytest.mark.parametrize("cls", OPTIONS)
def test_no_option_is_forgotten(cls):
    """An option that is not tried on shards must keep pairs whole."""
    pair, _ = draw(torch.float32)

    def rule(options):
        (found,) = made(cls, pair, options)[0]._get_plan().rules
        return found

    tried = {name for options in OPTIONS[cls] for name in options}
    assert {f.name for f in fields(rule({}))} - tried == {*WHOLE_ONLY[cls], "scale"} - tried
    for options in OPTIONS[cls]:
        assert [rule(options).splits_of(i) for i in (0, 1)] == [{"cols"}, {"rows"}]
    for name, value in WHOLE_ONLY[cls].items():
        assert not any(rule({name: value}).splits_of(i) for i in (0, 1))
