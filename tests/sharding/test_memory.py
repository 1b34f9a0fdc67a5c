"""memory_report over ranks: equal to what the fullest rank of real processes holds."""

import pytest
import torch
from helpers.every_class import CLASSES
from helpers.llama import SIZES, Llama
from helpers.ranks import mesh_of, pool
from torch import nn

from stiefel.optimizers import (
    APOLLO,
    ARO,
    FRUGAL,
    SOAP,
    AdaPreLoRA,
    AltLoRA,
    AuON,
    DCTAdamW,
    Fira,
    GaLore,
    Hybrid,
    MemoryReport,
    Muon,
    Muown,
    RowNorm,
    SinkGD,
    SOAPMuon,
    Spectral,
    SwitchLoRA,
    SymmetryStack,
    Trion,
    longest_dim_placement,
    memory_report,
)
from stiefel.optimizers._driver.layout import local
from stiefel.optimizers._lora.pair_groups import PairOptimizer

LOW = {"rank": 3}
SETTINGS = {
    "muon": (Muon, {}),
    "muon-normuon": (Muon, {"second_moment": "normuon"}),
    "muon-adamuon": (Muon, {"second_moment": "adamuon"}),
    "muon-spike": (Muon, {"spike_ratio": 1.5, "momentum_kind": "sum"}),
    "muon-int8": (Muon, {"state_dtype": "int8"}),
    "muon-views": (Muon, {"second_moment": "normuon"}),
    "galore-views": (GaLore, LOW),
    "aro-views": (ARO, {}),
    "galore": (GaLore, LOW),
    "galore-full": (GaLore, {"rank": 0.5, "proj_type": "full"}),
    "galore-dct": (GaLore, {**LOW, "projection": "dct"}),
    "galore-int8": (GaLore, {"rank": 32, "state_dtype": "int8"}),
    "galore-adafactor": (GaLore, {**LOW, "inner": "adafactor"}),
    "galore-bfloat16": (GaLore, {**LOW, "state_dtype": "bfloat16"}),
    "fira": (Fira, LOW),
    "apollo": (APOLLO, LOW),
    "soap": (SOAP, {}),
    "soap-short": (SOAP, {"sides": "short"}),
    "soapmuon": (SOAPMuon, {}),
    "sinkgd": (SinkGD, {}),
    "muown": (Muown, {}),
    "frugal-columns": (FRUGAL, {"density": 0.5}),
    "frugal-rows": (FRUGAL, {"density": 0.5, "split": "rows"}),
    "frugal-randk": (FRUGAL, {"density": 0.5, "split": "randk"}),
    "frugal-svd": (FRUGAL, {"density": 0.5, "split": "svd"}),
    "frugal-block": (FRUGAL, {"density": 0.5, "split": "block"}),
    "dctadamw": (DCTAdamW, LOW),
    "dctadamw-full": (DCTAdamW, {**LOW, "error_feedback": "full"}),
    "dctadamw-int8": (DCTAdamW, {**LOW, "error_feedback": "int8"}),
    "trion": (Trion, LOW),
    "auon": (AuON, {}),
    "auon-hybrid": (AuON, {"ns_steps": 1}),
    "aro": (ARO, {}),
    "aro-adam": (ARO, {"base": "adam"}),
    "aro-eigh": (ARO, {"rotation": "eigh", "gram_beta": 0.9}),
    "rownorm": (RowNorm, {}),
    "rownorm-cols": (RowNorm, {"axis": "cols"}),
    "spectral": (Spectral, {}),
    "hybrid": (Hybrid, {}),
    "stack": (SymmetryStack, {}),
    "altlora": (AltLoRA, {}),
    "altlora-elementwise": (AltLoRA, {"second_moment": "elementwise"}),
    "adaprelora": (AdaPreLoRA, {}),
    "all-adamw": (Muon, {}),
    "kahan": (Muon, {"write": "kahan"}),
    "galore-kahan": (GaLore, {**LOW, "write": "kahan"}),
    "owner": (RowNorm, {"plan": "owner"}),
    "gather": (GaLore, {**LOW, "plan": "gather"}),
}
PLACES = [(2, "rows"), (3, "longest")]
MORE_PLACES = [(3, "rows"), (4, "rows"), (2, "longest"), (4, "longest")]
MOST_KINDS = ("muon-normuon", "muon-views", "galore", "frugal-rows", "aro-adam", "adaprelora")


class Net(nn.Module):
    """Weights that go every way: even and odd, tall and wide, stacks, convolutions, vectors."""

    def __init__(self, dtype):
        super().__init__()
        self.embedding = nn.Embedding(14, 12, dtype=dtype)
        self.square, self.wide = nn.Linear(96, 96, dtype=dtype), nn.Linear(96, 64, dtype=dtype)
        self.odd, self.tall = nn.Linear(23, 37, dtype=dtype), nn.Linear(12, 84, dtype=dtype)
        self.conv, self.norm = nn.Conv1d(12, 9, 3, dtype=dtype), nn.LayerNorm(5, dtype=dtype)
        self.experts = nn.Parameter(torch.zeros(3, 16, 24, dtype=dtype))
        self.row = nn.Parameter(torch.zeros(1, 40, dtype=dtype))
        self.column = nn.Parameter(torch.zeros(40, 1, dtype=dtype))
        self.frozen = nn.Parameter(torch.zeros(5, 7, dtype=dtype), requires_grad=False)


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA pair, under the names of peft."""

    def __init__(self, m, n, r):
        super().__init__()
        self.base_layer = nn.Linear(n, m).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False)})
        self.scaling = {"default": 2.0}


def is_lora(cls):
    return issubclass(cls, PairOptimizer)


def network(name, device="cpu"):
    with torch.device(device):
        if is_lora(SETTINGS[name][0]):
            return nn.Sequential(Adapted(24, 36, 4), Adapted(13, 12, 3), Adapted(96, 84, 8))
        return Net(torch.bfloat16 if "kahan" in name else torch.float32)


def settings_of(name, net):
    """(params, keywords) of a setting."""
    _, options = SETTINGS[name]
    if name == "all-adamw":
        return [{"params": list(net.parameters()), "rule": "adamw"}], options
    if name.endswith("views"):
        views = {
            net.square: "heads:8", net.odd: "rows:20,10,7", net.tall: "heads_in:4",
            net.wide: "transposed", net.embedding: "interleaved:2",
        }  # fmt: skip
        groups = [{"params": [(f"{v}", x.weight)], "view": v} for x, v in views.items()]
        return [*groups, {"params": [("experts", net.experts)]}], options
    return net, options


def size(X):
    return local(X).numel() * X.element_size()


def held(rank, world, name, shard, steps):
    """Bytes of weights and state on this rank, and of the live report."""
    from torch.distributed.fsdp import fully_shard

    net = network(name)
    place = longest_dim_placement(world) if shard == "longest" else None
    fully_shard(net, mesh=mesh_of(world), shard_placement_fn=place)
    params, options = settings_of(name, net)
    optimizer = SETTINGS[name][0](params, **options)
    if not steps:
        optimizer.init_state()
    for _ in range(steps):
        for p in net.parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, 0.01)
        optimizer.step()
    state = sum(
        size(x)
        for entry in optimizer.state.values()
        for x in entry.values()
        if isinstance(x, torch.Tensor)
    )
    live = MemoryReport.of(optimizer)
    return {
        "weight": sum(size(p) for group in optimizer.param_groups for p in group["params"]),
        "state": state,
        "live": (live.weight, live.gradient, live.state - live.shared, live.ranks),
    }


def check(name, world, shard, steps):
    params, options = settings_of(name, network(name, "meta"))
    report = memory_report(params, SETTINGS[name][0], world=world, shard=shard, **options)
    found = pool(world).run(held, name, shard, steps)
    state = report.state - report.shared
    assert max(rank["state"] for rank in found) == state, [rank["state"] for rank in found]
    assert max(rank["weight"] for rank in found) == report.weight
    expected = (report.weight, report.gradient, state, world)
    assert all(rank["live"] == expected for rank in found)


@pytest.mark.parametrize(("world", "shard"), PLACES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_report_over_ranks_is_what_the_fullest_rank_holds(name, world, shard):
    check(name, world, shard, 0)


@pytest.mark.parametrize(("world", "shard"), MORE_PLACES)
@pytest.mark.parametrize("name", MOST_KINDS)
def test_the_report_is_right_for_other_numbers_of_ranks(name, world, shard):
    check(name, world, shard, 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_report_over_ranks_is_what_the_fullest_rank_holds_after_steps(name):
    check(name, 2, "rows", 2)


def test_every_class_takes_part():
    assert {cls for cls, _ in SETTINGS.values()} == {*CLASSES} - {SwitchLoRA}


def test_switchlora_says_that_it_trains_no_sharded_weights():
    net = network("altlora")
    assert memory_report(net, SwitchLoRA, total_steps=10).state
    with pytest.raises(NotImplementedError, match=r"SwitchLoRA .*sharded"):
        memory_report(net, SwitchLoRA, total_steps=10, world=2)


# the report alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["rows", "longest"])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_is_the_report_of_one_process(name, shard):
    params, options = settings_of(name, network(name, "meta"))
    plain = memory_report(params, SETTINGS[name][0], **options)
    assert memory_report(params, SETTINGS[name][0], world=1, shard=shard, **options) == plain
    assert plain.ranks == 1 and "ranks" not in str(plain)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_together_hold_at_least_what_one_process_does_and_none_holds_more(name):
    params, options = settings_of(name, network(name, "meta"))
    plain = memory_report(params, SETTINGS[name][0], **options)
    most = (
        4 if options.get("state_dtype") == "int8" else 1
    )  # floats where ranks cut blocks of codes
    for world in (2, 5, 64):
        for shard in ("rows", "longest"):
            report = memory_report(params, SETTINGS[name][0], world=world, shard=shard, **options)
            for one, rank in zip(plain.rows, report.rows, strict=True):
                assert one[:3] == rank[:3]
                for a, b in zip(one[3:], rank[3:], strict=True):
                    assert b / most <= a <= world * b


def test_params_of_a_model_stay_as_they_are():
    net = network("galore")
    groups = [{"params": list(net.named_parameters()), "tag": 3}]
    before = [(name, id(p), p._version, p.requires_grad) for name, p in net.named_parameters()]
    for params in (net, groups):
        memory_report(params, GaLore, world=4)
    after = [(name, id(p), p._version, p.requires_grad) for name, p in net.named_parameters()]
    assert before == after
    assert [id(p) for _, p in groups[0]["params"]] == [row[1] for row in before]


def test_a_model_without_memory_and_any_form_of_params_will_do():
    net = network("galore", "meta")
    expected = memory_report(net, GaLore, world=3, rank=3)
    forms = [
        list(net.named_parameters()),
        ((name, p) for name, p in net.named_parameters()),
        [{"params": list(net.named_parameters())}],
    ]
    for params in forms:
        found = memory_report(params, GaLore, model=net, world=3, rank=3)
        assert [row[3:] for row in found.rows] == [row[3:] for row in expected.rows]


def test_scalars_and_shared_weights_count_once():
    p, scalar = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(()))
    report = memory_report([p, scalar], Muon, world=4)
    assert [row.weight for row in report.rows] == [48, 4]
    assert [row.state for row in report.rows] == [48, 12]


def test_a_basis_is_whole_where_nothing_is_sent_for_it_and_cut_where_the_weight_rides():
    with torch.device("meta"):
        wide = nn.Linear(4096, 1024, bias=False)
    rows, longest = (
        memory_report(wide, GaLore, rank=256, world=8, shard=shard) for shard in ("rows", "longest")
    )
    moments, basis = 4 * 2 * 256 * 4096, 4 * 1024 * 256
    assert longest.weight == rows.weight == 4 * 4096 * 1024 // 8
    assert rows.state == (moments + basis) // 8
    assert longest.state == moments // 8 + basis


def test_a_large_model_is_counted_in_seconds_and_prints_its_ranks():
    with torch.device("meta"):
        model = Llama(*SIZES["7B"])
    whole = memory_report(model, Muon)
    report = memory_report(model, Muon, world=64)
    assert whole.state / 64 <= report.state < 1.01 * whole.state / 64
    assert whole.weight / 64 <= report.weight < 1.01 * whole.weight / 64
    assert "total on the fullest of 64 ranks" in str(report)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"world": 0}, "world must be an int of at least 1, got 0"),
        ({"world": -1}, "world must be an int of at least 1"),
        ({"world": 2.0}, "world must be an int of at least 1"),
        ({"world": True}, "world must be an int of at least 1"),
        ({"world": None}, "world must be an int of at least 1"),
        ({"world": "2"}, "world must be an int of at least 1"),
        ({"shard": "cols"}, "shard must be one of .*, got 'cols'"),
        ({"shard": None}, "shard must be one of"),
        ({"shard": 1, "world": 2}, "shard must be one of"),
        ({"plan": "local", "world": 2}, "plan='local' is not exact"),
    ],
    ids=str,
)
def test_what_is_no_world_and_no_way_to_shard_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        memory_report([("w", nn.Parameter(torch.zeros(8, 6)))], GaLore, **options)
