"""The table of docs/sharding.md, row by row, on 4 ranks: plan, calls, bytes, state, refusals.

Each row is one weight of m x n = 8 x 24 in an optimizer of its own, cut along its rows (0) or its
columns (1); r is 2. An ordinary step, between two refreshes, is recorded.
"""

from collections import Counter

import pytest
import torch
from helpers.every_class import CLASSES
from helpers.ranks import pool
from helpers.table_rows import M, N, Row, run_table
from torch import nn

from stiefel import optimizers
from stiefel.optimizers import memory_report

RANKS, R = 4, 2
LOW = {"rank": R, "update_proj_gap": 5}
HALF = {"density": 0.5, "update_gap": 5}
MN = M * N
SHARE = MN // RANKS
MEET, FACTOR, RIDE = ("meet", MN), ("meet", R * N), ("ride", 0)
ONE = ("SUM", 1)
GUARDED = (("MAX", 1), ONE, MEET)
BASIS, MOMENTS = M * R, 2 * R * N // RANKS
LARGE = M * M // 2  # a basis of half of the rows
FOUND, LARGER = (("there", MN), ("back", BASIS)), (("there", MN), ("back", LARGE))
DRAWN = (("back", BASIS),)
MINI = {"rank": 1, "scaling": "tensor", "projection": "gaussian", "update_proj_gap": 5}
SCORES = (("MAX", 1), ("SUM", M))
ADAFACTOR = {**LOW, "inner": "adafactor"}
SHORT, GRAM = {"sides": "short", "precondition_frequency": 5}, ("SUM", M * M)
FIRST_BASIS = (("MAX", 1), GRAM, ("back", M * M))
TWO_BASES = (2 * M * M + 2 * N * N) // RANKS
FEEDBACK = {**LOW, "error_feedback": "full"}
TABLE = [
    *(Row("Muon", {"rule": "adamw"}, dim, "local", (), 2 * SHARE) for dim in (0, 1)),
    *(
        Row("Muon", {"polar": x}, dim, "owner", (MEET,), SHARE)
        for dim, x in ((0, "ns5"), (1, "zolo"))
    ),
    Row("Muon", {"second_moment": "normuon"}, 0, "owner", (MEET, ONE, ONE), SHARE + M // RANKS),
    Row("Muon", {"second_moment": "normuon"}, 1, "owner", (MEET, ("SUM", M)), SHARE + M),
    *(
        Row("Muon", {"second_moment": "adamuon"}, dim, "owner", (MEET, ONE), 2 * SHARE)
        for dim in (0, 1)
    ),
    *(Row("Muon", {"clip_grad_rms": 0.1}, dim, "owner", GUARDED, SHARE) for dim in (0, 1)),
    *(Row("Muon", {"normalize_grad": True}, dim, "owner", GUARDED, SHARE) for dim in (0, 1)),
    *(Row("Muon", {"spike_ratio": 1.5}, dim, "owner", GUARDED, SHARE + 1) for dim in (0, 1)),
    Row(
        "Muon", {"polar": "low_rank", "rank": R, "report_steps": 2}, 0, "owner", (RIDE,), SHARE + 5
    ),
    Row("Spectral", {}, 0, "owner", (MEET, ("SUM", 2)), SHARE),
    Row("Spectral", {}, 1, "owner", (MEET, ("SUM", M)), SHARE),
    Row(
        "Spectral", {"centred": True}, 0, "owner", (("SUM", N), MEET, ("SUM", N), ("SUM", 2)), SHARE
    ),
    Row("Spectral", {"centred": True}, 1, "owner", (MEET, ("SUM", M)), SHARE),
    Row("Hybrid", {}, 0, "owner", (("MAX", 1), MEET, ("SUM", 2)), SHARE),
    Row("Hybrid", {}, 1, "owner", (("MAX", 1), ("SUM", M), MEET, ("SUM", M)), SHARE),
    Row("Hybrid", {"centred": True}, 1, "owner", (("MAX", 1), ("SUM", M), MEET, ("SUM", M)), SHARE),
    *(Row("AuON", {}, dim, "reduce", (ONE, ONE), SHARE) for dim in (0, 1)),
    *(Row("AuON", {"ns_steps": 1}, dim, "owner", (ONE, MEET, ONE), SHARE) for dim in (0, 1)),
    Row("RowNorm", {}, 0, "reduce", (), SHARE),
    Row("RowNorm", {}, 1, "reduce", (("SUM", M),), SHARE),
    Row("RowNorm", {"axis": "cols"}, 0, "reduce", (("SUM", N),), SHARE),
    Row("RowNorm", {"axis": "cols"}, 1, "reduce", (), SHARE),
    Row("RowNorm", {"row_mode": "relative"}, 0, "reduce", (ONE,), SHARE),
    Row("RowNorm", {"row_mode": "relative"}, 1, "reduce", (("SUM", M),), SHARE),
    Row("RowNorm", {"centred": True}, 0, "reduce", (("SUM", N), ("SUM", N), ("SUM", 2)), SHARE),
    Row("RowNorm", {"centred": True}, 1, "reduce", (("SUM", M), ("SUM", M)), SHARE),
    Row("GaLore", LOW, 0, "owner", (RIDE,), MOMENTS + BASIS // RANKS),
    Row("GaLore", LOW, 1, "reduce", (), MOMENTS + BASIS, FOUND),
    Row("GaLore", {**LOW, "projection": "dct"}, 1, "reduce", (), MOMENTS + R, SCORES),
    Row("GaLore", {**LOW, "projection": "topk"}, 1, "reduce", (), MOMENTS + R, SCORES),
    Row("GaLore", {**LOW, "projection": "randk"}, 1, "reduce", (), MOMENTS + R),
    Row(
        "GaLore",
        ADAFACTOR,
        1,
        "reduce",
        (("SUM", R), ("MAX", 1), ONE),
        36,
        FOUND,
    ),
    *(Row("GaLore", {**LOW, "proj_type": "full"}, dim, "owner", (RIDE,), 24) for dim in (0, 1)),
    Row("Fira", LOW, 0, "owner", (RIDE,), MOMENTS + BASIS // RANKS + 1),
    Row("Fira", LOW, 1, "reduce", (ONE,) * 5, MOMENTS + BASIS + 1, FOUND),
    Row("Fira", {**LOW, "projection": "dct"}, 1, "reduce", (ONE,) * 5, MOMENTS + R + 1, SCORES),
    Row("Fira", {**LOW, "compat": "reference"}, 1, "owner", (RIDE,), MOMENTS + BASIS // RANKS + 1),
    Row("APOLLO", LOW, 0, "owner", (RIDE,), MOMENTS + BASIS // RANKS + 1),
    Row("APOLLO", LOW, 1, "reduce", (("SUM", 3), ONE), MOMENTS + BASIS + 1, DRAWN),
    Row("APOLLO", MINI, 1, "reduce", (("SUM", 3),), 2 * N // RANKS + M + 1),
    *(Row("Muown", {}, dim, "owner", (RIDE,), (MN + 4 * M) // RANKS) for dim in (0, 1)),
    *(Row("SinkGD", {}, dim, "owner", (MEET,), 0) for dim in (0, 1)),
    Row("FRUGAL", HALF, 0, "reduce", (), MN // RANKS + N // 2),
    Row("FRUGAL", HALF, 1, "owner", (RIDE,), MN // RANKS + N // 2 // RANKS),
    Row("FRUGAL", {**HALF, "split": "rows"}, 0, "owner", (RIDE,), MN // RANKS + M // 2),
    Row("FRUGAL", {**HALF, "split": "rows"}, 1, "reduce", (), MN // RANKS + M // 2),
    *(
        Row("FRUGAL", {"split": "block", "density": 1.0}, dim, "reduce", (), 2 * SHARE)
        for dim in (0, 1)
    ),
    *(
        Row("FRUGAL", {**HALF, "split": "randk"}, dim, "owner", (RIDE,), 3 * SHARE // 2)
        for dim in (0, 1)
    ),
    Row("FRUGAL", {**HALF, "split": "svd"}, 0, "owner", (RIDE,), (MN + M * M // 2) // RANKS),
    Row("FRUGAL", {**HALF, "split": "svd"}, 1, "reduce", (ONE,), SHARE + LARGE, LARGER),
    Row(
        "FRUGAL",
        {**HALF, "split": "random", "state_free": "sgd"},
        1,
        "reduce",
        (),
        SHARE + LARGE,
        (("back", LARGE),),
    ),
    Row("DCTAdamW", LOW, 0, "owner", (RIDE,), MOMENTS + 2 * R),
    Row("DCTAdamW", LOW, 1, "reduce", (), MOMENTS + 2 * R, SCORES),
    Row("DCTAdamW", FEEDBACK, 1, "reduce", (), MOMENTS + 2 * R + SHARE, SCORES),
    Row("DCTAdamW", {**LOW, "error_feedback": "int8"}, 1, "owner", (RIDE,), 80),
    Row("Trion", {"rank": R}, 0, "owner", (RIDE,), SHARE),
    Row("Trion", {"rank": R}, 1, "owner", (("MAX", 1), ("SUM", M), FACTOR), SHARE),
    *(Row("ARO", {}, dim, "owner", (RIDE,), (MN + M * M) // RANKS) for dim in (0, 1)),
    *(
        Row(name, {"precondition_frequency": 5}, dim, "owner", (RIDE,), 2 * SHARE + TWO_BASES)
        for name in ("SOAP", "SOAPMuon")
        for dim in (0, 1)
    ),
    Row("SOAP", SHORT, 0, "owner", (RIDE,), 2 * SHARE + 2 * M * M // RANKS),
    Row("SOAP", SHORT, 1, "reduce", (GRAM,), 2 * SHARE + 2 * M * M, FIRST_BASIS),
    Row("SOAPMuon", SHORT, 1, "owner", (MEET, GRAM), 2 * SHARE + 2 * M * M),
]
"""Pairs and experts have other tests, SymmetryStack has these rules, and SwitchLoRA is refused."""
IDS = [f"{row.name}-{'-'.join(map(str, row.options.values()))}-{row.dim}" for row in TABLE]


@pytest.fixture(scope="module")
def found():
    """Per row, what each rank has measured."""
    return list(zip(*pool(RANKS).run(run_table, TABLE, timeout=120), strict=True))


def sent_by_ride(state):
    """Bytes that all ranks send together: gradient, weight and state there, the last two back."""
    cut, whole = state["cut bytes"], state["whole bytes"]
    return (3 * 4 * MN + 2 * cut) * (RANKS - 1) // RANKS + whole * (RANKS - 1)


@pytest.mark.parametrize("i", range(len(TABLE)), ids=IDS)
def test_a_row_of_the_table(found, i):
    row, ranks = TABLE[i], [measured for measured, _ in found[i]]
    for rank in ranks:
        assert rank["plan"] == row.plan
        assert rank["far"] <= 5e-6  # from one process
        kinds = Counter(kind for kind, _ in rank["seen"])
        # no collective but these; one vector of flags, one exchange there and one back
        assert len(rank["calls"]) == len(rank["seen"])
        travels = any(kind in ("meet", "ride") for kind, _ in row.calls)
        assert (kinds["flags"], kinds["exchange"]) == (1, 2 * travels)
        # a packed sum begins with a status
        sums = [(kind, n - 1) for kind, n, _ in rank["sums"]]
        assert sums == [call for call in row.calls if call[0] in ("SUM", "MAX")]
        exchanged = sum(size for kind, size in rank["seen"] if kind == "exchange")
        reduced = sum(2 * (n - 1) * size * (RANKS - 1) // RANKS for _, n, size in rank["sums"])
        assert rank["bytes"] == exchanged + reduced
        first = [(kind, n - 1) for kind, n in rank["first"] if kind in ("SUM", "MAX")]
        if row.plan == "reduce":
            of_refresh = [call for call in row.refresh if call[0] in ("SUM", "MAX")]
            assert first == of_refresh + sums
    total = sum(size for rank in ranks for kind, size in rank["seen"] if kind == "exchange")
    met = sum(n for kind, n in row.calls if kind == "meet")
    rides = sum(sent_by_ride(ranks[0]) for kind, _ in row.calls if kind == "ride")
    assert total == 2 * 4 * met * (RANKS - 1) // RANKS + rides
    if row.plan == "reduce":
        at_refresh = sum(n for rank in ranks for kind, n in rank["first"] if kind == "exchange")
        share = {"there": (RANKS - 1) / RANKS, "back": RANKS - 1, "SUM": 0, "MAX": 0}
        assert at_refresh == 4 * sum(n * share[kind] for kind, n in row.refresh)
    assert max(rank["state"] for rank in ranks) == row.state
    assert max(rank["state bytes"] for rank in ranks) == reported(row)


def reported(row):
    """Bytes of state by ``memory_report``."""
    options = dict(row.options)
    rule = {"rule": options.pop("rule")} if "rule" in options else {}
    weight = nn.Parameter(torch.empty(M, N, device="meta"))
    report = memory_report(
        [{"params": [("layer.weight", weight)], **rule}],
        getattr(optimizers, row.name),
        world=RANKS,
        shard=("rows", "longest")[row.dim],
        **options,
    )
    return report.state - report.shared


@pytest.mark.parametrize("i", range(len(TABLE)), ids=IDS)
def test_other_plans_without_an_owner_are_refused(found, i):
    """By one sentence that names the plans that are exact, before anything moves."""
    row = TABLE[i]
    for _, refusals in found[i]:
        for plan, (text, far, state) in refusals.items():
            assert (far, state) == (0.0, 0)
            assert text.startswith(f"plan={plan!r} is not exact for parameter 'layer.weight'"), text
            named = ["'owner'", "'gather'", *(["'reduce'"] if row.plan == "reduce" else [])]
            assert all(name in text.partition("; choose ")[2] for name in named)
            assert "\n" not in text


def test_the_table_has_every_class():
    others = {"AltLoRA", "AdaPreLoRA", "SwitchLoRA", "SymmetryStack"}
    assert {row.name for row in TABLE} | others == {cls.__name__ for cls in CLASSES}
