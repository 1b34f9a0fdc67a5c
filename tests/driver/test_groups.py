"""Every form that parameters come in, every refusal, and where each parameter goes."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.every_class import PLAIN
from helpers.problems import gradients, run, same, tensors, weight
from helpers.rules import PairRule, driver
from helpers.shapes import SQUARE, TALL, WIDE
from torch import nn

from stiefel.optimizers import GaLore, Muon, StackedOptimizer

BOTH = pytest.mark.parametrize("cls", [Muon, GaLore])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 11))


def rules(optimizer):
    return [row.rule for row in optimizer.assignment()]


# The table of torch.optim.Optimizer ---------------------------------------------------------------


def refusals():
    p = weight(SQUARE)
    return [
        ("empty", [], ValueError, "optimizer got an empty parameter list"),
        ("bare tensor", weight(SQUARE), TypeError, "iterable of Tensors or dicts, but got"),
        ("set", [{"params": {p}}], TypeError, "optimizer parameters need to be organized"),
        ("no tensor", [p, 3], TypeError, "optimizer can only optimize Tensors"),
        ("non-leaf", [p * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ("twice", [{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
        ("half named", [("a", p), weight(TALL)], ValueError, "with/without names"),
        ("two lrs", [{"params": [p], "lr": torch.ones(2)}], ValueError, "must be 1-element"),
        ("negative lr", [{"params": [p], "lr": -1.0}], ValueError, "Invalid learning rate: -1.0"),
        ("nan lr", [{"params": [p], "lr": float("nan")}], ValueError, "Invalid learning rate"),
        ("typo", [{"params": [p], "weigth_decay": 1}], ValueError, "did you mean 'weight_decay'"),
        ("no params", [{"lr": 0.1}], ValueError, "needs the key 'params'"),
        ("vector", [{"params": [weight((3,))], "rule": "Muon"}], ValueError, "needs matrices"),
        ("scalar", [{"params": [weight(())], "rule": "GaLore"}], ValueError, "needs matrices"),
        ("nothing", [{"params": [weight((0, 3))], "rule": "Muon"}], ValueError, "needs matrices"),
        ("rule", [{"params": [p], "rule": "SGD"}], ValueError, "group key 'rule' must be"),
        ("decay", [{"params": [p], "weight_decay": -0.1}], ValueError, "Invalid weight_decay"),
        ("nonfinite", [{"params": [p], "nonfinite": "drop"}], ValueError, "nonfinite must be"),
        ("dtype", [{"params": [p], "state_dtype": "int32"}], ValueError, "state_dtype must be"),
        ("capturable", [{"params": [p], "capturable": True, "nonfinite": "raise"}], ValueError,
         "capturable=True"),
        ("through", [{"params": [p], "differentiable": True}], ValueError, "differentiable"),
        ("both", [{"params": [p], "fused": True, "foreach": True}], RuntimeError, "cannot be"),
        ("tensor foreach", [{"params": [p], "lr": torch.tensor(0.1), "foreach": True}], ValueError,
         "lr as a Tensor is not supported"),
        ("adamw_betas", [{"params": [p], "adamw_betas": (0.9, 1.0)}], ValueError, "adamw_betas"),
        ("view", [{"params": [p], "view": "rows:3,4"}], ValueError, "add up"),
        ("views", [{"params": [p], "view": ("auto", "auto")}], ValueError, "must be one string"),
        ("names", [{"params": [p], "param_names": ["a", "b"]}], ValueError, "2 names for 1 param"),
        ("complex", [nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))], RuntimeError,
         "does not support complex"),
    ]  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", [case[0] for case in refusals()])
def test_refusal_at_construction(cls, case):
    _, params, error, text = next(c for c in refusals() if c[0] == case)
    with pytest.raises(error, match=text):
        cls(params)


@BOTH
@pytest.mark.parametrize("case", [c[0] for c in refusals() if c[0] not in ("empty", "bare tensor")])
def test_refusal_in_add_param_group_changes_nothing(cls, case):
    _, params, error, text = next(c for c in refusals() if c[0] == case)
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    first = weight(TALL, 3)
    named = case in ("half named", "names")
    optimizer = cls([("first", first)] if named else [first])
    run(optimizer, [first], [gradients(TALL, 1)])
    before, keys = tensors(optimizer), [dict(g) for g in optimizer.param_groups]
    W = first.detach().clone()
    with pytest.raises(error, match=text):
        for group in groups:
            optimizer.add_param_group(group)
            keys = [dict(g) for g in optimizer.param_groups]
    assert len(optimizer.param_groups) == len(keys)
    assert all(g.keys() == k.keys() for g, k in zip(optimizer.param_groups, keys, strict=True))
    assert torch.equal(first, W) and all(k in tensors(optimizer) for k in before)
    first.grad = gradients(TALL, 1)[0]
    optimizer.step()
    assert first.isfinite().all()


@BOTH
def test_constructor_refuses_unknown_keywords_and_bad_values_before_the_parameters(cls):
    with pytest.raises(TypeError, match="'weight_deacy' is unknown; did you mean 'weight_decay'"):
        cls([weight(SQUARE)], weight_deacy=0.1)
    for bad in ({"lr": torch.ones(2)}, {"lr": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError):
            cls(None, **bad)


@BOTH
def test_a_parameter_twice_in_one_group_warns_and_steps_once(cls):
    p, q = weight(SQUARE), weight(SQUARE)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = cls([p, p])
    run(twice, [p], [gradients(SQUARE, 3)])
    run(cls([q]), [q], [gradients(SQUARE, 3)])
    assert torch.equal(p, q) and twice.state[p]["step"] == 3
    assert [len(bucket.units) for bucket in twice._plan.buckets] == [1]


@BOTH
def test_generators_tuples_and_one_element_lrs_are_fine(cls):
    ps = [weight(SQUARE, k) for k in range(2)]
    assert len(cls(p for p in ps).param_groups[0]["params"]) == 2
    assert len(cls(tuple(ps)).param_groups[0]["params"]) == 2
    optimizer = cls([{"params": (p for p in ps), "lr": torch.tensor([0.1])}])
    run(optimizer, ps, [gradients(SQUARE, 1), gradients(SQUARE, 1)])
    user = {"params": [weight(TALL)]}
    optimizer.add_param_group(user)
    assert set(user) == {"params"}


# What wrappers hide -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("attribute", ["ds_id", "ds_shape", "_is_flat_param"])
def test_partitioned_and_flattened_weights_are_refused(cls, attribute):
    p = nn.Parameter(torch.zeros(0) if attribute != "_is_flat_param" else torch.zeros(12))
    setattr(p, attribute, (4, 3) if attribute == "ds_shape" else True)
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO or FSDP1.*rule='adamw'"):
        cls([p])
    assert rules(cls([{"params": [p], "rule": "adamw"}])) == ["adamw"]


@BOTH
def test_a_dtensor_that_is_not_cut_trains_as_a_plain_tensor_does(cls):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = weight((4, 4))
        p, late_p = (
            nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Replicate()]))
            for _ in range(2)
        )
        late = cls([weight((4, 4))])
        late.param_groups[0]["params"] = [late_p]  # as the Trainer swaps them after construction
        for w, optimizer in ((plain, cls([plain])), (p, cls([p])), (late_p, late)):
            (w * w).sum().backward()
            optimizer.step()
        for w in (p, late_p):
            assert torch.equal(w.to_local(), plain)
        assert rules(cls([{"params": [p], "rule": "adamw"}])) == ["adamw"]
    finally:
        dist.destroy_process_group()


# Forms --------------------------------------------------------------------------------------------


@BOTH
def test_a_module_is_one_group_routed_by_module_with_its_frozen_parameters(cls):
    net = model()
    net[1].bias.requires_grad_(False)
    optimizer = cls(net)
    table = {row.name: row.rule for row in optimizer.assignment()}
    assert table == {
        "0.weight": "adamw",
        "1.weight": cls.__name__,
        "1.bias": "adamw",
        "2.weight": "adamw",
        "2.bias": "adamw",
        "3.weight": "adamw",
        "3.bias": "adamw",
    }
    (group,) = optimizer.param_groups
    assert group["rule"] is None and group["params"] == [*net.parameters()]
    assert group["decays"] == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert "nn.Embedding" in str(optimizer.assignment())
    net(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimizer.step()
    assert net[1].bias not in optimizer.state
    net[1].bias.requires_grad_(True)
    before = net[1].bias.detach().clone()
    net(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net[1].bias, before)


def test_module_form_uses_the_views_of_the_model():
    attention = nn.MultiheadAttention(8, 2)
    optimizer = Muon(attention)
    assert set(optimizer.param_groups[0]["views"]) == {"rows:8,8,8", "auto"}
    attention(*[torch.randn(3, 1, 8)] * 3)[0].square().mean().backward()
    optimizer.step()
    assert {"step.0", "step.1", "step.2"} <= set(optimizer.state[attention.in_proj_weight])


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 4},
        {"split_sizes": (8, 8)},
        {"view": "heads:4"},
        {"view": "transposed"},
        {"matrix_view": "flatten"},
    ],
    ids=str,
)
def test_a_view_for_a_whole_model_must_not_contradict_it(options):
    net = nn.Module()
    net.q, net.experts = nn.Linear(8, 16), nn.Parameter(torch.zeros(3, 8, 6))
    text = r"is not that of '(q\.weight|experts)' in the model, .*num_heads.*each with its view"
    with pytest.raises(ValueError, match=text):
        Muon(net, **options)
    with pytest.raises(ValueError, match=text):
        Muon(net.parameters(), model=net, **options)
    group = {"params": [net.q.weight], "view": "heads:4"}
    assert Muon([group]).param_groups[0]["view"] == "heads:4"


def test_a_view_that_says_what_the_model_does_is_fine():
    linear = nn.Sequential(nn.Linear(8, 16))
    for view in ("auto", "batch", "flatten"):
        assert Muon(linear, matrix_view=view).param_groups[0]["views"] == ["auto", "auto"]
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 16))
    views = Muon(convolution, view="flatten").param_groups[0]["views"]
    assert views == ["flatten", "auto", "auto", "auto"]
    with pytest.raises(ValueError, match=r"view 'batch' is not that of '0\.weight'"):
        Muon(convolution, view="batch")


@BOTH
def test_names_route_as_far_as_they_go(cls):
    named = [
        ("tok_embeddings.weight", weight((40, 8))),
        ("layers.0.wq.weight", weight((8, 8))),
        ("norm.weight", weight((8,))),
        ("lm_head.weight", weight((40, 8))),
    ]
    optimizer = cls(named)
    assert rules(optimizer) == ["adamw", cls.__name__, "adamw", "adamw"]
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named]
    assert rules(cls([p for _, p in named])) == [cls.__name__, cls.__name__, "adamw", cls.__name__]


def test_names_that_are_numbers_warn_as_no_names_do():
    net = model()
    with pytest.warns(UserWarning, match="3 matrices .* numbers for names.*model=model") as seen:
        Muon(net.named_parameters())
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match="by their shape alone"):
        Muon([(f"module.{name}", p) for name, p in net.named_parameters()])
    told = nn.ModuleDict({"layers": net})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon(net)
        Muon(net.named_parameters(), model=net)
        Muon(told.named_parameters())
        Muon([(name, p) for name, p in net.named_parameters() if p.ndim == 2])
        Muon(nn.Linear(4, 4).named_parameters())  # "weight", "bias"


@BOTH
def test_matrices_routed_by_shape_beside_unmarked_vectors_give_one_warning(cls):
    W, b, other = weight((8, 4), 0), weight((8,), 1), weight((4, 8), 2)
    with pytest.warns(
        UserWarning, match=r"2 matrices without names.*model=model.*rule='adamw'"
    ) as seen:
        optimizer = cls([{"params": [W, other]}, {"params": [b], "weight_decay": 0.0}])
        optimizer.add_param_group({"params": [weight((5, 5))]})
    assert len(seen) == 1 and seen[0].filename == __file__
    net = nn.Sequential(nn.Linear(4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([W, other])
        cls([("layer.weight", W), ("layer.bias", b)])
        cls([{"params": [W], "rule": cls.__name__}, {"params": [b], "rule": "adamw"}])
        cls([{"params": [W], "use_muon": True}, {"params": [b], "use_muon": False}])
        cls([{"params": [W, b], "compat": "reference" if cls is GaLore else "torch"}])
        cls(net)
        cls(net.parameters(), model=net)
        cls([b])


@BOTH
def test_zero_elements_and_scalars_are_no_ops_and_adamw(cls):
    params = [nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.zeros(())), weight((1, 6))]
    optimizer = cls(params)
    assert rules(optimizer) == ["adamw", "adamw", cls.__name__]
    run(optimizer, params, [[torch.zeros(0, 5)], [torch.ones(())], gradients((1, 6), 1)])


@BOTH
def test_group_overrides_of_any_field(cls):
    field, value = ("momentum", 0.5) if cls is Muon else ("rank", 2)
    p, q = weight(SQUARE, 0), weight(SQUARE, 1)
    mixed = cls([{"params": [p]}, {"params": [q], field: value, "lr": 0.05}], lr=0.02)
    out = run(mixed, [p, q], [gradients(SQUARE, 4, 0), gradients(SQUARE, 4, 1)])
    q2 = weight(SQUARE, 1)
    alone = run(cls([q2], lr=0.05, **{field: value}), [q2], [gradients(SQUARE, 4, 1)])
    if cls is GaLore:  # its format: where one group names rank, the others are AdamW
        assert rules(mixed) == ["adamw", "GaLore"]
    assert same([W[1] for W in out], [W[0] for W in alone])


def test_galore_torchs_format():
    p, v, bias = weight(WIDE, 0), weight((4,), 1), weight((4,), 2)
    group = {"rank": 4, "update_proj_gap": 7, "scale": 0.5, "proj_type": "reverse_std"}
    optimizer = GaLore([{"params": [v, weight(TALL)]}, {"params": [p], **group}])
    assert rules(optimizer) == ["adamw", "adamw", "GaLore"]
    with pytest.warns(UserWarning, match="AdamW trains it instead of GaLore") as seen:
        GaLore([{"params": [("w", p), ("b", bias)], **group}])
    assert len(seen) == 1 and "'b'" in str(seen[0].message)
    late = GaLore([p])
    with pytest.warns(UserWarning, match="AdamW trains it"):
        late.add_param_group({"params": [bias], **group})
    assert rules(late) == ["GaLore", "adamw"]


def test_keys_of_trainers_pass():
    keys = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
    optimizer = Muon([{"params": [weight(SQUARE)], **dict.fromkeys(keys, 0.1)}])
    assert optimizer.param_groups[0]["swa_lr"] == 0.1
    with pytest.raises(ValueError, match="did you mean 'momentum'"):
        Muon([{"params": [weight(SQUARE)], "momentun": 0.9}])


@BOTH
def test_foreign_keys_are_kept_saved_and_listed(cls):
    foreign = {"name": "backbone", "lr_scale": 0.5, "rho": 0.05, "kind": "decay", "depth": [1]}
    optimizer = cls([{"params": [("w", weight(SQUARE))], **foreign}])
    assert foreign.items() <= optimizer.param_groups[0].items()
    assert foreign.items() <= optimizer.state_dict()["param_groups"][0].items()
    other = cls([{"params": [("w", weight(SQUARE))]}])
    other.load_state_dict(optimizer.state_dict())
    assert foreign.items() <= other.param_groups[0].items()
    assert set(optimizer.assignment().kept_keys) == set(foreign)
    assert "kept group keys: name, lr_scale, rho, kind, depth" in str(optimizer.assignment())


@BOTH
def test_use_muon_marks_groups_of_every_class(cls):
    groups = [{"params": [weight(SQUARE)], "use_muon": True},
              {"params": [weight(TALL)], "use_muon": False}]  # fmt: skip
    assert rules(cls(groups)) == [cls.__name__, "adamw"]


@BOTH
def test_adamw_lr_is_a_ratio_but_for_groups_with_an_lr_of_their_own(cls):
    optimizer = cls([{"params": [weight(SQUARE)], "rule": "adamw"}], lr=0.1, adamw_lr=0.01)
    (row,) = optimizer.assignment()
    assert row.lr == 0.01 and optimizer.param_groups[0]["lr"] == 0.1
    own = cls([{"params": [weight(SQUARE)], "rule": "adamw", "lr": 0.5}], lr=0.1, adamw_lr=0.01)
    assert own.assignment().rows[0].lr == 0.5
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    assert optimizer.assignment().rows[0].lr == 0.005
    optimizer.param_groups[0]["adamw_lr"] = 0.02
    assert optimizer.param_groups[0]["adamw_lr"] == 0.02
    optimizer.step()
    assert optimizer.param_groups[0]["adamw_lr_ratio"] == pytest.approx(0.4)
    with pytest.raises(ValueError, match="adamw_lr needs lr above 0"):
        cls([weight(SQUARE)], lr=0.0, adamw_lr=0.01)


@BOTH
@pytest.mark.parametrize("warm_up", [0.1, 0.0])
def test_an_adamw_lr_written_before_a_scheduler_refers_to_the_lr_before_warm_up(cls, warm_up):
    def rates(optimizer):
        return {(row.rule == "adamw", round(row.lr, 9)) for row in optimizer.assignment()}

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, warm_up + t))

    optimizer = cls(model(), lr=0.1)
    optimizer.param_groups[0]["adamw_lr"] = 0.01
    assert rates(optimizer) == {(False, 0.1), (True, 0.01)}
    schedule = scheduler(optimizer)
    assert rates(optimizer) == {(False, round(0.1 * warm_up, 9)), (True, 0.01 * warm_up)}
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    assert rates(optimizer) == {(False, 0.1), (True, 0.01)}
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.param_groups[0]["adamw_lr"] = 0.01  # after the scheduler: of the lr at this moment
    assert rates(optimizer) == {(False, 0.05), (True, 0.01)}
    optimizer.step()
    assert optimizer.param_groups[0]["adamw_lr_ratio"] == pytest.approx(0.2)


@BOTH
def test_adamw_lr_keeps_the_groups_of_the_user(cls):
    optimizer = cls(model(), lr=0.02, adamw_lr=0.003)
    named = cls(model().named_parameters(), lr=0.02, adamw_lr=0.003)
    layers = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(model().parameters())]
    layerwise = cls(layers, lr=0.02, adamw_lr=0.003)
    assert [len(o.param_groups) for o in (optimizer, named, layerwise)] == [1, 1, 7]
    lrs = [row.lr for row in layerwise.assignment() if row.rule == "adamw"]
    assert lrs == pytest.approx([0.0015 * k for k in (3, 4, 5, 7)])


@BOTH
def test_a_late_group_without_names_joins_a_named_optimizer(cls):
    net = model()
    net[3].requires_grad_(False)
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    optimizer = cls(trained, model=net)
    optimizer.add_param_group({"params": [*net[3].parameters()]})
    assert optimizer.param_groups[1]["param_names"] == ["3.weight", "3.bias"]
    assert rules(optimizer)[-2:] == ["adamw", "adamw"]  # the head of the model
    lone = cls(trained)
    lone.add_param_group({"params": [weight((5, 3))]})
    assert lone.param_groups[1]["param_names"] == ["parameter_5"]
    assert lone.param_groups[1]["draws"] == "name"


@BOTH
def test_model_tells_roles_beside_any_form_of_params(cls):
    net = model()
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    whole = {row.name: row.rule for row in cls(net).assignment()}
    for params in (groups, net.named_parameters(), net.parameters(), decay):
        table = {row.name: row.rule for row in cls(params, model=net).assignment()}
        assert table.items() <= whole.items() and len(table) >= 3
    assert set(cls(groups, model=net).param_groups[0]["decays"]) == {1.0}


@BOTH
def test_assignment_prints_one_row_per_parameter(cls):
    table = cls(model()).assignment()
    text = str(table)
    assert all(row.name in text for row in table) and cls.__name__ in text.splitlines()[-1]
    assert table[0] == table.rows[0] and table[-1] == table.rows[-1]
    assert table[1:3] == table.rows[1:3]
    unnamed = cls([weight(SQUARE), weight((3,))]).assignment()
    assert [row.name for row in unnamed] == [None, None] and str(unnamed)


@BOTH
def test_plan_and_bytes_are_columns_where_a_row_is_not_local(cls):
    table = cls(model()).assignment()
    plain = str(table), table.to_markdown()
    assert not any(word in text for text in plain for word in ("plan", "bytes"))
    first, second, *rest = table.rows
    sent = replace(table, rows=(replace(first, plan="owner", bytes_per_step=4096), second, *rest))
    head, line, other = str(sent).splitlines()[:3]
    assert head.index("plan") < head.index("bytes") < head.index("why")
    assert line[head.index("plan") :].split()[:2] == ["owner", "4096"]
    assert not other[head.index("plan") : head.index("why")].strip()
    assert "| owner | 4096 |" in sent.to_markdown()
    as_dict = json.loads(json.dumps(sent.to_dict()))
    assert type(sent).from_dict(as_dict) == sent
    for row in as_dict["rows"]:  # as an older version wrote it
        del row["plan"], row["bytes_per_step"]
    assert type(sent).from_dict(as_dict) == table


@BOTH
def test_optimizer_prints_its_groups(cls):
    text = repr(cls(model()))
    assert text.startswith(cls.__name__) and "weight_decay" in text


@BOTH
def test_late_group_trains_beside_the_old_ones(cls):
    p, q = weight(SQUARE, 0), weight(WIDE, 1)
    optimizer = cls([p], lr=0.02)
    grads = [gradients(SQUARE, 6, 0), gradients(WIDE, 6, 1)]
    run(optimizer, [p], [grads[0][:3]])
    optimizer.add_param_group({"params": [q]})
    out = run(optimizer, [p, q], [grads[0][3:], grads[1][3:]])
    p2, q2 = weight(SQUARE, 0), weight(WIDE, 1)
    a = run(cls([p2], lr=0.02), [p2], [grads[0]])
    b = run(cls([q2], lr=0.02), [q2], [grads[1][3:]])
    assert same([W[0] for W in out], [W[0] for W in a[3:]])
    assert same([W[1] for W in out], [W[0] for W in b])


def test_capturable_is_fine_for_adamw_groups():
    group = {"params": [weight((3,))], "rule": "adamw", "capturable": True}
    assert Muon([group]).param_groups[0]["capturable"]
    assert Muon([weight(SQUARE)], fused=False, foreach=None).defaults["fused"] is False


def test_several_members_take_flat_pairs():
    pairs = [weight((3, 8), 0), weight((6, 3), 1), weight((3, 8), 2), weight((6, 3), 3)]
    optimizer = driver(PairRule())(pairs)
    assert isinstance(optimizer, StackedOptimizer)
    assert [row.why for row in optimizer.assignment()] == ["member A", "member B"] * 2


def test_names_given_as_a_group_key_route_like_pairs():
    named = {
        "h.weight": weight(SQUARE, 0),
        "h.bias": weight((4,), 1),
        "lm_head.weight": weight(TALL),
    }
    group = {"params": list(named.values()), "param_names": list(named)}
    for options in ({}, {"adamw_lr": 1e-4}):
        optimizer = Muon([group], lr=0.02, **options)
        table = {row.name: row.rule for row in optimizer.assignment()}
        assert table == {"h.weight": "Muon", "h.bias": "adamw", "lm_head.weight": "adamw"}
        for g in optimizer.param_groups:
            assert [named[name] is p for name, p in zip(g["param_names"], g["params"], strict=True)]


def test_reference_keys_mean_what_they_say():
    late = Muon([{"params": [weight(SQUARE)], "use_muon": True}])
    late.add_param_group({"params": [weight(TALL)], "use_muon": False})
    assert rules(late) == ["Muon", "adamw"]
    with pytest.raises(ValueError, match="rank"):
        GaLore([{"params": [weight(SQUARE)], "rank": 0}, {"params": [weight(TALL)], "rank": 2}])


def test_torchs_names_mean_adamws_values_in_an_adamw_group():
    """The group of Keller Jordan's README, and eps."""
    v, w = weight((4,), 0), weight((4,), 0)
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 0.1}
    ours = Muon([{"params": [weight(SQUARE)], "use_muon": True},
                 {"params": [v], "use_muon": False, **settings}])  # fmt: skip
    galore = GaLore([{"params": [w], "rule": "adamw", **settings}])
    for optimizer, p in ((ours, v), (galore, w)):
        q = weight((4,), 0)
        theirs = torch.optim.AdamW([q], **settings)
        for step in range(3):
            p.grad = q.grad = torch.tensor([1.0, -2.0, 0.5, 3.0]) * (step + 1)
            optimizer.step()
            theirs.step()
        assert torch.equal(p, q)


def test_a_warning_names_the_users_line():
    wide = nn.Parameter(torch.zeros(16385, 2))
    optimizer = Muon([weight(SQUARE)])
    for warn in (
        lambda: Muon([wide, weight((3,))]),
        lambda: optimizer.add_param_group({"params": [wide, weight((3,))]}),
        lambda: Muon([{"params": [weight((3,))], "use_muon": True}]),
    ):
        with pytest.warns(UserWarning) as seen:
            warn()
        assert [warning.filename for warning in seen] == [__file__]


def test_a_parameter_appended_to_a_named_group_is_trained_without_a_name():
    p, late = weight(SQUARE, 0), weight(SQUARE, 1)
    optimizer = Muon([("layer.weight", p)])
    optimizer.param_groups[0]["params"].append(late)
    run(optimizer, [p, late], [gradients(SQUARE, 1, 0), gradients(SQUARE, 1, 1)])
    assert optimizer.state[late]["step"] == 1


@PLAIN
@pytest.mark.parametrize("kind", ["state_dict", "forward", "name", "class", "list", "number"])
def test_a_model_that_is_no_module_is_refused_by_name(cls, kind):
    net = nn.Linear(6, 8)
    model = {
        "state_dict": net.state_dict(),
        "forward": net.forward,
        "name": "net",
        "class": nn.Linear,
        "list": [net],
        "number": 5,
    }[kind]
    with pytest.raises(ValueError, match="model must be the module of the parameters, got "):
        cls(net.parameters(), model=model)
