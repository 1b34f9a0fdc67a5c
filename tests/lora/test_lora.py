"""Which factors are pairs, with which scale, in which groups; the algebra that pairs share."""

import importlib.util
import json

import pytest
import torch
from helpers.checkpoints import through_a_file
from helpers.every_class import problem, set_gradients
from helpers.pair_problems import DOUBLE, LeastSquares, factors, pair_gradients
from helpers.paths import FIXTURES
from helpers.problems import gradients, run, same, tensors, weight
from torch import nn

from stiefel.kernels import product
from stiefel.optimizers import (
    AdaPreLoRA,
    AltLoRA,
    Muon,
    SwitchLoRA,
    lora_param_groups,
    pairs_to_groups,
)
from stiefel.optimizers._core.rule import Dense
from stiefel.optimizers._lora.pair_algebra import (
    cross_gram,
    damped,
    damped_inverse,
    debias_factor,
    gram,
    inverse_from,
    is_nonzero,
    transport,
)
from stiefel.optimizers._lora.pair_groups import LoRARule, PairOptimizer

NO_PEFT = not importlib.util.find_spec("peft")
needs_peft = pytest.mark.skipif(NO_PEFT, reason="peft is not installed (pip install stiefel[hf])")


class Wrapped(nn.Module):
    """A linear layer as peft wraps it: factors in dicts by adapter, scales on the module."""

    def __init__(self, n, m, adapters=("default",), r=2, alpha=4.0, bias=True, dora=False):
        super().__init__()
        self.base_layer = nn.Linear(n, m, bias=bias)
        self.base_layer.weight.requires_grad_(False)
        linear = {a: nn.Linear(n, r, bias=False) for a in adapters}
        self.lora_A = nn.ModuleDict(linear)
        self.lora_B = nn.ModuleDict({a: nn.Linear(r, m, bias=False) for a in adapters})
        if dora:
            self.lora_magnitude_vector = nn.ParameterDict(
                {a: nn.Parameter(torch.ones(m)) for a in adapters}
            )
        self.scaling = {a: alpha / r for a in adapters}

    def forward(self, x):
        out = self.base_layer(x)
        for a, s in self.scaling.items():
            out = out + s * self.lora_B[a](self.lora_A[a](x))
        return out


class Plain(nn.Linear):
    """A linear layer in the style of loralib: factors are parameters of the layer."""

    def __init__(self, n, m, r=2, scaling=None):
        super().__init__(n, m, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, n))
        self.lora_B = nn.Parameter(torch.zeros(m, r))
        if scaling is not None:
            self.scaling = scaling


def model(**options):
    return nn.Sequential(Wrapped(6, 5, **options), nn.LayerNorm(5), Wrapped(5, 3, **options))


def names(group):
    return [name for name, _ in group["params"]]


def named(**tensors_by_name):
    return [(name.replace("__", "."), p) for name, p in tensors_by_name.items()]


# names, order, the rest, scales


def test_pairs_in_order_scales_and_every_parameter_once():
    net = model()
    pairs, rest = lora_param_groups(net)
    assert names(pairs) == [
        f"{i}.lora_{x}.default.weight" for i in (0, 2) for x in ("A", "B")
    ]  # fmt: skip
    assert pairs["scale"] == 2.0 and pairs["view"] == "auto" and "rule" not in pairs
    assert rest["rule"] == "adamw"
    assert names(rest) == ["0.base_layer.bias", "1.weight", "1.bias", "2.base_layer.bias"]
    trainable = sorted(name for name, p in net.named_parameters() if p.requires_grad)
    assert sorted(names(pairs) + names(rest)) == trainable
    by_class = AltLoRA(net, lr=0.1)
    assert [g["param_names"] for g in by_class.param_groups] == [names(pairs), names(rest)]
    assert [row.why for row in by_class.assignment()][:2] == ["member A", "member B"]


@pytest.mark.parametrize("adapter", ["lora_A", "lora_B", "default", "my"])
def test_whatever_the_adapter_is_called(adapter):
    pairs, _ = lora_param_groups(model(adapters=(adapter,)))
    assert names(pairs)[:2] == [f"0.lora_{x}.{adapter}.weight" for x in ("A", "B")]


def test_order_of_parameters_does_not_matter():
    given = [(n, p) for n, p in model(dora=True).named_parameters() if p.requires_grad]
    want, _ = lora_param_groups(given, scale=2.0)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(0)).tolist()
    pairs, _ = lora_param_groups([given[i] for i in order], scale=2.0)
    cut = [
        {tuple(names(g)[i : i + 2]) for i in range(0, len(g["params"]), 2)} for g in (want, pairs)
    ]
    assert cut[0] == cut[1]


def test_the_rest_follows_torch_bit_for_bit():
    net = model(dora=True)
    *_, rest = lora_param_groups(net, fallback={"lr": 0.01, "weight_decay": 0.1})
    assert any("magnitude" in name for name in names(rest))
    twins = [nn.Parameter(p.detach().clone()) for _, p in rest["params"]]
    ours = AltLoRA(lora_param_groups(net, fallback={"lr": 0.01, "weight_decay": 0.1}), lr=1.0)
    theirs = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.1)
    for step in range(3):
        for (_, p), q in zip(rest["params"], twins, strict=True):
            p.grad = q.grad = gradients((1, *p.shape), 1, step)[0][0]
        ours.step()
        theirs.step()
    assert same([p.detach() for _, p in rest["params"]], [q.detach() for q in twins])


def test_the_scale_is_read_from_the_adapter():
    net = nn.Sequential(Wrapped(6, 5, r=4, alpha=16.0), Plain(5, 4, scaling=3.0))
    net[0].scaling["default"] = 8 / 4**0.5  # as rsLoRA has it
    first, second, _ = lora_param_groups(net)
    assert (first["scale"], second["scale"]) == (4.0, 3.0)
    assert names(second) == ["1.lora_A", "1.lora_B"]
    for scale in ({"0": 1.5, "": 2.5}, lambda name: {"0": 1.5, "1": 2.5}[name]):
        assert [g.get("scale") for g in lora_param_groups(net, scale=scale)] == [1.5, 2.5, None]
    assert lora_param_groups(net, scale=1.0)[0]["scale"] == 1.0


@pytest.mark.parametrize("scale", [0, float("nan"), -1.0, float("inf")])
def test_a_scale_must_be_positive_and_finite(scale):
    A, B = factors(5, 6, 2)
    text = "scale must be a positive finite number from 1e-12 to 1e12, got"
    for make in (
        lambda: lora_param_groups(model(), scale=scale),
        lambda: pairs_to_groups([(A, B)], scale=scale),
        lambda: pairs_to_groups([(A, B, scale)]),
        lambda: AltLoRA([{"params": [A, B], "scale": scale}]),
        lambda: LoRARule(scale),
    ):
        with pytest.raises(ValueError, match=text):
            make()


def test_a_scale_must_be_there():
    A, B = factors(5, 6, 2)
    for make in (
        lambda: lora_param_groups(Plain(6, 5)),
        lambda: lora_param_groups([("lora_A", A), ("lora_B", B)]),
        lambda: pairs_to_groups([(A, B)]),
        lambda: AltLoRA([{"params": [A, B]}]),
    ):
        with pytest.raises(
            ValueError, match="scale must be a positive finite number from 1e-12 to 1e12, got None"
        ):
            make()
    assert AltLoRA([{"params": [A, B]}], scale=2.0).param_groups[0]["scale"] == 2.0


# errors


def test_a_model_without_a_pair_is_refused():
    text = "no trainable lora_A/lora_B pair found; pass"
    for make in (lambda: lora_param_groups(nn.Linear(3, 3)), lambda: pairs_to_groups([])):
        with pytest.raises(ValueError, match=text):
            make()
    net = Wrapped(4, 4)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match=text):
        lora_param_groups(net)


def test_a_factor_alone_is_refused():
    A, B = factors(5, 6, 2)
    given = [("x.lora_A", A), ("x.lora_B", B), ("y.lora_A", weight((2, 6)))]
    with pytest.raises(ValueError, match=r"'y.lora_A' has no matching lora_B; rename it, freeze"):
        lora_param_groups(given, scale=1.0)
    _, rest = lora_param_groups(given, scale=1.0, unpaired="fallback")
    assert names(rest) == ["y.lora_A"]
    given[2][1].requires_grad_(False)
    assert len(lora_param_groups(given, scale=1.0)) == 1


def test_ranks_that_differ_are_refused():
    A, B = weight((2, 6)), weight((5, 3))
    with pytest.raises(ValueError, match=r"rank mismatch: x.lora_A has r=2 but x.lora_B has r=3$"):
        lora_param_groups([("x.lora_A", A), ("x.lora_B", B)], scale=1.0)
    A, B = factors(5, 6, 2)
    with pytest.raises(ValueError, match=r"rank mismatch: .* has r=5 .* has r=6; swapped order"):
        pairs_to_groups([(B, A)], scale=1.0)
    with pytest.raises(ValueError, match="rank mismatch"):
        AltLoRA([{"params": [A, weight((5, 3))], "scale": 1.0}])


def test_a_rank_above_both_sides_is_pointed_out():
    with pytest.warns(UserWarning, match="r=4 > min.* Gram matrices are singular, damping is used"):
        pairs_to_groups([factors(3, 6, 4)], scale=1.0)


@pytest.mark.parametrize("shapes", [((6,), (5, 2)), ((2, 6, 1, 1), (5, 2)), ((3, 2, 6), (4, 5, 2))])
def test_shapes_that_are_no_factors_are_refused(shapes):
    with pytest.raises(ValueError, match=r"expected 2-D .or conv 4-D, expert 3-D. factors, got"):
        pairs_to_groups([tuple(map(weight, shapes))], scale=1.0)


ODD_FACTORS = {
    "text": ("weight", TypeError, "must be a tensor, got str"),
    "number": (3, TypeError, "must be a tensor, got int"),
    "lazy": (nn.parameter.UninitializedParameter(), ValueError, "has no shape yet"),
    "nested": (
        nn.Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])),
        ValueError,
        "is a nested tensor",
    ),
}


@pytest.mark.parametrize("odd", ODD_FACTORS)
@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA, SwitchLoRA], ids=lambda cls: cls.__name__)
def test_a_factor_that_is_no_tensor_with_a_shape_is_refused_by_name(cls, odd):
    factor, error, text = ODD_FACTORS[odd]
    base = [weight((5, 6))] if cls is SwitchLoRA else []
    rest = {"total_steps": 9} if cls is SwitchLoRA else {}
    for i, pair in enumerate(((factor, weight((5, 2))), (weight((2, 6)), factor))):
        says = f"{'AB'[i]} of pair 0 .*{text}|pair 0 must be .* got 2 entries"
        with pytest.raises((error, ValueError), match=says):
            pairs_to_groups([(*pair, *base)], scale=1.0)
        named = [("x.lora_A", pair[0]), ("x.lora_B", pair[1]), ("x.weight", weight((5, 6)))]
        group = {"params": [*pair, *base], "scale": 1.0}
        for params, words in ((named, f"lora_{'AB'[i]}.*{text}"), ([group], "")):
            if params is named and (base or error is TypeError):
                continue  # a list of names has no base weight; torch refuses what is no tensor
            with pytest.raises((TypeError, ValueError), match=words):
                cls(params, lr=0.1, scale=1.0, **rest)


def test_one_tensor_is_no_pair():
    A = weight((4, 4))
    for make in (
        lambda: pairs_to_groups([(A, A)], scale=1.0),
        lambda: lora_param_groups([("x.lora_A", A), ("x.lora_B", A)], scale=1.0),
    ):
        with pytest.raises(ValueError, match=r"B.* are one tensor"):
            make()
    for pair in (5, (), None):
        with pytest.raises(ValueError, match="pair 0 must be"):
            pairs_to_groups([pair], scale=1.0)


def test_groups_that_are_no_pairs_are_refused():
    A, B = factors(5, 6, 2)
    with pytest.raises(ValueError, match=r"needs \[A1, B1, A2, B2, ...\] .* got 3 parameters"):
        AltLoRA([{"params": [A, B, weight((2, 6))], "scale": 1.0}])
    with pytest.raises(ValueError, match="cannot tell which of these tensors are pairs"):
        AltLoRA([A, B])
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        AltLoRA([{"params": [A, B], "scale": s} for s in (1.0, 2.0)])
    optimizer = AltLoRA(pairs_to_groups([(A, B)], scale=1.0))
    with pytest.raises(ValueError, match="rank mismatch"):
        optimizer.add_param_group({"params": [weight((3, 6)), weight((5, 2))], "scale": 1.0})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"must be .A, B., .* got 1 entries"):
        pairs_to_groups([(A,)], scale=1.0)


def test_complex_and_separated_factors_are_refused():
    A = weight((2, 6), dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="complex parameters are not supported"):
        pairs_to_groups([(A, weight((5, 2)))], scale=1.0)
    A, B = factors(5, 6, 2)
    with pytest.raises(ValueError, match=r"is on cpu but .* on meta"):
        pairs_to_groups([(A, B.to("meta"))], scale=1.0)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="kinds must be among"):
        lora_param_groups(model(), kinds=("linears",))
    with pytest.raises(ValueError, match="unpaired must be"):
        lora_param_groups(model(), unpaired="skip")


def test_sparse_gradients_are_refused():
    A, B = factors(5, 6, 2)
    optimizer = AltLoRA(pairs_to_groups([(A, B)], scale=1.0))
    A.grad = torch.ones_like(A).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


# the base weight


def test_triples_name_the_base_weight_and_how_it_is_stored():
    class Conv1D(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(n, m), requires_grad=False)

    net = nn.Sequential(
        Wrapped(6, 5, bias=False), Plain(5, 4, scaling=2.0), Wrapped(4, 3, bias=False)
    )
    net[2].base_layer = Conv1D(4, 3)
    straight, transposed = lora_param_groups(net, base_weight=True)
    assert names(straight) == [
        "0.lora_A.default.weight", "0.lora_B.default.weight", "0.base_layer.weight",
        "1.lora_A", "1.lora_B", "1.weight",
    ]  # fmt: skip
    assert straight["rule"] == transposed["rule"] == "SwitchLoRA"
    assert transposed["view"] == ["auto", "auto", "transposed"]
    assert transposed["params"][2][1] is net[2].base_layer.weight
    net[0].base_layer.weight = nn.Parameter(
        torch.zeros(5, 6, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(TypeError, match="base weight of '0' is quantized; SwitchLoRA needs"):
        lora_param_groups(net, base_weight=True)
    A, B = factors(5, 6, 2)
    W = weight((5, 6))
    assert pairs_to_groups([(A, B, W, 3.0)])[0]["params"] == [A, B, W]
    assert pairs_to_groups([(A, B, W)], scale=3.0)[0]["scale"] == 3.0


# convolutions and embeddings


class Conv(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.base_layer = nn.Conv2d(4, 6, 3, groups=groups).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(4, 2, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, 6, 1, bias=False)})
        self.scaling = {"default": 2.0}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_their_flattened_pairs(layout):
    net = Conv().to(DOUBLE)
    (group,) = lora_param_groups(net)
    assert group["view"] == "flatten"
    (A, B) = (p for _, p in group["params"])
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in (A, B)]
    for p in (A, B):
        p.data = p.data.to(memory_format=layout)
    ours = AltLoRA(net, lr=0.1)
    plain = AltLoRA(pairs_to_groups([flat], scale=2.0), lr=0.1)
    for GA, GB in zip(*pair_gradients(6, 36, 2, 4, dtype=DOUBLE), strict=True):
        A.grad, B.grad = GA.view(A.shape), GB.view(B.shape)
        flat[0].grad, flat[1].grad = GA, GB
        ours.step()
        plain.step()
    for p, q in zip((A, B), flat, strict=True):
        torch.testing.assert_close(p.detach().flatten(1), q.detach(), rtol=0, atol=1e-12)


def test_convolutions_in_groups_go_to_adamw_with_a_warning():
    net = nn.Sequential(Conv(groups=2), Plain(4, 4, scaling=1.0))
    with pytest.warns(UserWarning, match="belongs to a convolution in groups"):
        pairs, rest = lora_param_groups(net)
    assert names(pairs) == ["1.lora_A", "1.lora_B"] and len(rest["params"]) == 2


class Embedded(nn.Module):
    def __init__(self, V=9, d=5, r=2):
        super().__init__()
        self.base_layer = nn.Embedding(V, d).requires_grad_(False)
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(r, V))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.randn(d, r))})
        self.scaling = {"default": 2.0}


def test_embeddings_start_with_the_other_factor():
    net = nn.Sequential(Embedded(), Plain(5, 4, scaling=2.0))
    _, rest = lora_param_groups(net)
    assert names(rest) == ["0.lora_embedding_A.default", "0.lora_embedding_B.default"]
    table, linear = lora_param_groups(net, kinds=("linear", "embedding"))
    assert names(table) == ["0.lora_embedding_B.default", "0.lora_embedding_A.default"]
    assert table["view"] == "transposed" and linear["view"] == "auto"
    (_, B), (_, A) = table["params"]
    optimizer = AltLoRA([table, linear], lr=0.1)
    G, before = weight((5, 9)).detach(), B.detach().clone()  # of the table, turned
    for step in range(2):
        A.grad, B.grad = 2.0 * B.detach().mT @ G, 2.0 * G @ A.detach().mT
        optimizer.step()
        assert bool(A.detach().any()) and torch.equal(B.detach(), before) == (step == 0)


# what is frozen or has no gradient


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor_stays(frozen):
    A, B = factors(5, 6, 2)
    pair = (A, B)
    pair[frozen].requires_grad_(False)
    (group,) = lora_param_groups([("lora_A", A), ("lora_B", B)], scale=2.0)
    assert len(group["params"]) == 2
    optimizer, before = AltLoRA([group], lr=0.1), [A.detach().clone(), B.detach().clone()]
    grads = list(pair_gradients(5, 6, 2, 3))
    grads[frozen] = [None] * 3
    run(optimizer, [A, B], grads)
    assert torch.equal(pair[frozen].detach(), before[frozen])
    assert not torch.equal(pair[1 - frozen].detach(), before[1 - frozen])


def test_a_pair_without_gradients_has_no_state():
    pairs = [factors(5, 6, 2, seed) for seed in (0, 1)]
    optimizer = AltLoRA(pairs_to_groups(pairs, scale=2.0))
    GA, GB = pair_gradients(5, 6, 2, 2)
    run(optimizer, [*pairs[0], *pairs[1]], [[None, None], [None, None], GA, GB])
    assert not any(optimizer.state.get(p) for p in pairs[0])
    assert optimizer.state[pairs[1][0]]["step"] == 2


# sharing


def test_a_shared_factor_is_refused_and_a_tied_module_is_one_pair():
    A, B = factors(5, 6, 2)
    C = weight((5, 2), 7)
    given = [("x.lora_A", A), ("x.lora_B", B), ("y.lora_A", A), ("y.lora_B", C)]
    with pytest.raises(ValueError, match=r"'y.lora_A' is shared by two pairs"):
        lora_param_groups(given, scale=1.0)
    with pytest.raises(ValueError, match="is shared by two pairs"):
        pairs_to_groups([(A, B), (A, C)], scale=1.0)
    layer = Plain(6, 6, scaling=2.0)
    pairs = lora_param_groups(nn.Sequential(layer, nn.ReLU(), layer))
    assert [names(group) for group in pairs] == [["0.lora_A", "0.lora_B"]]


# checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_groups_and_state_survive_a_checkpoint(dtype):
    net = nn.Sequential(model(dora=True), Conv()).to(dtype)
    optimizer = AltLoRA(net, lr=0.01)
    for step in range(2):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = gradients((1, *p.shape), 1, step + i)[0][0].to(p.dtype)
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    again = AltLoRA(net, lr=0.5)
    again.load_state_dict(saved)
    assert same(tensors(again), tensors(optimizer))
    keys = ("lr", "scale", "view", "param_names", "rule", "betas")
    for a, b in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert [a.get(key) for key in keys] == [b.get(key) for key in keys]
    moments = [v for key, v in tensors(again).items() if key[1] in ("exp_avg", "ref")]
    rules = {g["rule"] for g in again.param_groups}
    assert moments and rules == {None, "adamw"}
    pair = again.param_groups[0]["params"][0]
    assert again.state[pair]["exp_avg"].dtype == torch.float32


# what the scale means


def test_factor_gradients_are_those_of_the_dense_weight():
    layer = Wrapped(6, 5, bias=False).to(DOUBLE)
    x, y = (torch.randn(8, k, dtype=DOUBLE) for k in (6, 5))
    (layer(x) - y).square().sum().backward()
    A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0
    W = (layer.base_layer.weight + s * B @ A).detach().requires_grad_()
    (x @ W.mT - y).square().sum().backward()
    torch.testing.assert_close(A.grad, s * B.detach().mT @ W.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(B.grad, s * W.grad @ A.detach().mT, rtol=0, atol=1e-12)


def test_options_reach_the_groups():
    pairs, rest = lora_param_groups(
        model(), lr=0.3, lr_ratio_b=4.0, fallback={"lr": 0.1}, delta=1e-3, weight_decay=0.2
    )
    assert (pairs["lr"], pairs["lr_ratio_b"], pairs["delta"], rest["lr"]) == (0.3, 4.0, 1e-3, 0.1)
    groups = AltLoRA([pairs, rest], lr=1.0).param_groups
    assert (groups[0]["lr"], groups[0]["delta"], groups[1]["lr"]) == (0.3, 1e-3, 0.1)


def test_wrappers_and_adapters():
    net = model(adapters=("a", "b"))
    both, _ = lora_param_groups(net)
    assert len(both["params"]) == 8
    one, rest = lora_param_groups(net, adapter="b")
    assert names(one)[0] == "0.lora_A.b.weight" and "0.lora_A.a.weight" in names(rest)
    for p in (*net[0].lora_A["a"].parameters(), *net[0].lora_B["a"].parameters()):
        p.requires_grad_(False)
    assert len(lora_param_groups(net)[0]["params"]) == 6
    holder = nn.Module()
    holder._orig_mod = net
    assert names(lora_param_groups(holder)[0])[0].startswith("_orig_mod.0.lora_A")


# real peft


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(3, 6, 3)
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.v(self.q(self.emb(x)).relu()))


def adapted(**options):
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(Net(), peft.LoraConfig(r=4, lora_alpha=8, **options))


def check_once(net, groups):
    found = [name for group in groups for name in names(group)]
    assert sorted(found) == sorted(n for n, p in net.named_parameters() if p.requires_grad)
    assert len(set(found)) == len(found)


@needs_peft
@pytest.mark.parametrize(
    ("options", "pairs", "scale", "rest"),
    [
        ({"target_modules": ["q", "v"]}, 2, 2.0, 0),
        ({"target_modules": ["q", "v"], "use_rslora": True}, 2, 4.0, 0),
        ({"target_modules": ["q", "v"], "use_dora": True}, 2, 2.0, 2),
        ({"target_modules": ["q"], "modules_to_save": ["head"]}, 1, 2.0, 2),
        ({"target_modules": ["q", "emb"]}, 1, 2.0, 2),
        ({"target_modules": ["q", "v"], "lora_bias": True}, 2, 2.0, 2),
    ],
    ids=["linear", "rslora", "dora", "modules_to_save", "embedding", "lora_bias"],
)  # fmt: skip
def test_pairs_of_real_peft_models(options, pairs, scale, rest):
    net = adapted(**options)
    groups = lora_param_groups(net)
    check_once(net, groups)
    assert len(groups[0]["params"]) == 2 * pairs and groups[0]["scale"] == scale
    others = [g for g in groups if g.get("rule") == "adamw"]
    assert sum(len(g["params"]) for g in others) == rest
    optimizer, before = AltLoRA(net, lr=0.05), None
    x = torch.arange(11)
    for _ in range(8):
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        before = float(loss) if before is None else before
    assert float(loss) < before


@needs_peft
def test_pairs_of_peft_convolutions_embeddings_and_two_adapters():
    import peft

    net = adapted(target_modules=["conv", "emb", "q"])
    kinds = ("linear", "conv", "embedding")
    groups = lora_param_groups(net, kinds=kinds)
    check_once(net, groups)
    assert sorted(group["view"] for group in groups) == ["auto", "flatten", "transposed"]
    AltLoRA(groups).init_state()
    net.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q"]))
    check_once(net, lora_param_groups(net, kinds=kinds))
    net.base_model.set_adapter(["default", "second"])
    groups = lora_param_groups(net, kinds=kinds)
    check_once(net, groups)
    assert sorted({group["scale"] for group in groups}) == [2.0, 3.0]
    (one, *_) = lora_param_groups(net, adapter="second")
    assert len(one["params"]) == 2 and one["scale"] == 3.0


@needs_peft
def test_peft_base_weights():
    (group,) = lora_param_groups(adapted(target_modules=["q", "v"]), base_weight=True)
    assert [name.split(".")[-2] for name in names(group)] == [
        "default",
        "default",
        "base_layer",
    ] * 2


# the algebra


def test_damped_inverse_and_grams():
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(3, 9, 4, generator=draw, dtype=DOUBLE)
    w = torch.rand(3, 9, 1, generator=draw, dtype=DOUBLE)
    X[1] = 0
    S = gram(X)
    torch.testing.assert_close(S, X.mT @ X, rtol=0, atol=1e-13)
    torch.testing.assert_close(gram(X, w), X.mT @ (w * X), rtol=0, atol=1e-13)
    assert is_nonzero(S).flatten().tolist() == [True, False, True]
    eye = torch.eye(4, dtype=DOUBLE)
    for delta, relative in ((0.0, 0.0), (0.3, 0.0), (0.1, 0.2)):
        inverse = damped_inverse(S, delta, relative)
        assert not inverse[1].any()
        for k in (0, 2):
            K = S[k] + (delta + relative * S[k].trace() / 4) * eye
            torch.testing.assert_close(damped(S, delta, relative)[k], K, rtol=0, atol=1e-13)
            torch.testing.assert_close(inverse[k] @ K, eye, rtol=0, atol=1e-12)
    for k in range(3):
        assert torch.equal(damped_inverse(S[k : k + 1], 0.3)[0], damped_inverse(S, 0.3)[k])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_both_ways_to_an_inverse_agree(dtype):
    X = torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    S = X.mT @ X
    L = torch.linalg.cholesky(S).to(dtype)
    for at_once in (False, True):  # as on a CPU, and as on an accelerator
        found = inverse_from(L, at_once).double()
        torch.testing.assert_close(found, S.inverse(), rtol=0, atol=1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_damped_inverse_of_singular_grams_is_finite_and_useful(dtype):
    X = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    X[0, :, 3] = X[0, :, 2]
    S = gram(X)
    inverse = damped_inverse(S, 0.0)
    assert bool(inverse.isfinite().all())
    # what lies in the range is solved to the level of the damping
    y = product(X.mT, torch.ones(2, 9, 1, dtype=dtype))
    rest = product(S, product(inverse, y)) - y
    assert float(rest.norm()) <= 0.05 * float(y.norm())


def test_transport_is_the_identity_where_nothing_moved():
    X = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    Y = X.clone()
    Y[1] += 1
    S = gram(X)
    T = transport(S, damped_inverse(S, 0.5), cross_gram(X, Y))
    eye = torch.eye(4, dtype=DOUBLE)
    assert torch.equal(T[0], eye) and not torch.allclose(T[1], eye)
    want = torch.linalg.lstsq(X[1], Y[1]).solution
    exact = transport(S, damped_inverse(S, 0.0), cross_gram(X, Y))[1]
    torch.testing.assert_close(exact, want, rtol=0, atol=1e-12)
    counts = torch.tensor([[[0]], [[3]]], dtype=torch.int32)
    torch.testing.assert_close(
        debias_factor(counts, 0.9, DOUBLE).flatten(),
        torch.tensor([1 / 0.1, 1 / (1 - 0.9**3)], dtype=DOUBLE), rtol=1e-12, atol=0,
    )  # fmt: skip


def test_riemannian_preconditioning_is_a_few_lines_of_this_algebra():
    """Scaled gradients, both from the old factors, against peft's recorded runs."""
    data = json.loads((FIXTURES / "riemannian_peft_reference.json").read_text())
    for case in data["runs"]:
        given = case["settings"]
        if given["base_optimizer"] != "SGD":
            continue
        A, B = (torch.tensor(case[key], dtype=DOUBLE)[None] for key in ("A_init", "B_init"))
        problem = LeastSquares.recorded(case)
        for row in case["trajectory"]:
            GA, GB = problem.grads(A[0], B[0])
            torch.testing.assert_close(GA.tolist(), row["G_A"], rtol=0, atol=1e-11)
            K_B, K_A = damped(gram(B), given["reg"]), damped(gram(A.mT), given["reg"])
            dA, dB = product(inverse_of(K_B), GA[None]), product(GB[None], inverse_of(K_A))
            A, B = A - given["lr"] * dA, B - given["lr"] * dB
            for ours, theirs in ((A, row["A"]), (B, row["B"])):
                want = torch.tensor(theirs, dtype=DOUBLE)
                torch.testing.assert_close(ours[0], want, rtol=0, atol=1e-11)


def inverse_of(K):
    return damped_inverse(K, 0.0)


def test_a_method_on_pairs_is_one_rule():
    """Riemannian descent as a rule of its own, on the shared classes."""

    class ScaledRule(LoRARule):
        def update(self, A, B):
            X, Y = B.value, A.value.mT
            K_B, K_A = damped_inverse(gram(X), 1e-6), damped_inverse(gram(Y), 1e-6)
            dA, dB = product(K_B, A.grad), product(B.grad, K_A)
            return A.step(Dense(dA)), B.step(Dense(dB))

    problem = LeastSquares(12, 9)
    A, B = factors(12, 9, 3, dtype=DOUBLE)
    optimizer = PairOptimizer(pairs_to_groups([(A, B)], scale=2.0), ScaledRule(), lr=0.1)
    before = problem.loss(A.detach(), B.detach())
    for _ in range(60):
        A.grad, B.grad = problem.grads(A.detach(), B.detach())
        optimizer.step()
    assert problem.loss(A.detach(), B.detach()) < 1e-2 * before


# the first argument


@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA, SwitchLoRA])
def test_the_old_name_of_the_first_argument_warns_and_means_the_same(cls):
    members = [weight(shape) for shape in ((2, 6), (5, 2), (5, 6))]
    members[2].requires_grad_(False)
    groups = pairs_to_groups([members if cls is SwitchLoRA else members[:2]], scale=1.0)
    options = {"total_steps": 9} if cls is SwitchLoRA else {}
    with pytest.warns(DeprecationWarning, match=rf"{cls.__name__}\(params=\.\.\.\)") as caught:
        optimizer = cls(groups=groups, **options)
    assert caught[0].filename == __file__
    wanted = cls(params=groups, **options)
    assert optimizer.param_groups == wanted.param_groups
    for both in (lambda: cls(groups, groups=groups), lambda: cls(params=groups, groups=groups)):
        with pytest.raises(TypeError, match="both params and groups"):
            both()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'params'"):
        cls(**options)


def test_positions_after_params_are_those_of_adam_or_lr_only():
    for cls in (AltLoRA, AdaPreLoRA):
        with pytest.raises(TypeError, match="positional"):
            cls([], 1e-3, (0.9, 0.99))
    members = [weight((2, 6)), weight((5, 2)), weight((5, 6)).requires_grad_(False)]
    triples = pairs_to_groups([members], scale=1.0)
    optimizer = SwitchLoRA(triples, 1e-3, (0.8, 0.9), 1e-6, 0.1, total_steps=9)
    wanted = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "total_steps": 9}
    assert wanted.items() <= optimizer.param_groups[0].items()
    with pytest.raises(TypeError, match="total_steps is a keyword"):
        SwitchLoRA(triples, 1e-3, 1000)


# which factors belong together


CLASSES = [AltLoRA, AdaPreLoRA, SwitchLoRA]
classes = pytest.mark.parametrize("cls", CLASSES)


def needed(cls):
    return {"total_steps": 9} if cls is SwitchLoRA else {}


def layer(cls, m, n, r, name=None):
    """A pair, or a triple, and with names if one is given."""
    members = [weight((r, n)), weight((m, r)), weight((m, n)).requires_grad_(False)]
    if name is not None:
        parts = ("lora_A.weight", "lora_B.weight", "weight")
        members = [(f"{name}.{part}", p) for part, p in zip(parts, members, strict=True)]
    return members if cls is SwitchLoRA else members[:2]


@classes
def test_params_is_a_keyword_in_every_form(cls):
    made = pairs_to_groups([layer(cls, 5, 6, 2)], scale=1.0)
    bare = [{"params": layer(cls, 5, 6, 2), "scale": 1.0}]
    named_groups = [{"params": layer(cls, 5, 6, 2, "x"), "scale": 1.0}]
    # names alone do not tell the base weight
    named = [] if cls is SwitchLoRA else [model().named_parameters()]
    for params in (made, bare, named_groups, model(), *named):
        scale = {} if isinstance(params, (list, nn.Module)) else {"scale": 1.0}
        assert cls(params=params, **scale, **needed(cls)).param_groups


@classes
@pytest.mark.parametrize("sides", ["A", "B", "AB"])
def test_biases_of_factors_go_to_adamw(cls, sides):
    """As of peft's lora_bias=True, which gives the layer of B one; and where both have one."""
    net = model()
    for i in (0, 2):
        for side in sides:
            factor = getattr(net[i], f"lora_{side}")["default"]
            factor.bias = nn.Parameter(torch.zeros(factor.out_features))
    optimizer = cls(net, lr=0.1, **needed(cls))
    pairs, rest = optimizer.param_groups
    assert not any(name.endswith("bias") for name in pairs["param_names"] if "lora" in name)
    biases = [f"{i}.lora_{side}.default.bias" for i in (0, 2) for side in sides]
    assert {*biases} <= {*rest["param_names"]} and rest["rule"] == "adamw"
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.ones(3, 6)).sum().backward()
    for name, p in net.named_parameters():
        if "bias" in name and "lora" in name:
            p.grad = torch.ones_like(p)  # the module of this test does not use them
    optimizer.step()
    assert all(not torch.equal(before[name], net.get_parameter(name)) for name in biases)


def test_an_adapter_of_an_embedding_may_be_called_bias():
    given = named(
        x__lora_embedding_A__bias=weight((2, 9)), x__lora_embedding_B__bias=weight((4, 2))
    )
    assert len(lora_param_groups(given, scale=1.0, kinds=("embedding",))) == 1


@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA])
@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize("count", [2, 4])
def test_factors_in_groups_apart_are_refused(cls, r, count):
    """As helpers of LoRA+ make them; with r = 8 the shapes of q.A and k.A fit as a pair."""
    layers = [layer(cls, 8, 8, r, f"{i}") for i in range(count)]
    separate = [[pair[side] for pair in layers] for side in (0, 1)]
    with pytest.raises(ValueError, match=r"no pair by their names.*lr_ratio_b"):
        cls([{"params": part} for part in separate], scale=1.0)
    bare = [[p for _, p in part] for part in separate]
    with pytest.raises(ValueError, match="lr_ratio_b" if r == 2 else "two factors of one kind"):
        cls([{"params": part} for part in bare], scale=1.0)
    with pytest.raises(ValueError, match="no pair by their names"):  # [A1, A2, B1, B2]
        cls([{"params": separate[0] + separate[1]}], scale=1.0)
    flat = [p for pair in layers for p in pair]
    assert len(cls([{"params": flat}], scale=1.0).param_groups) == 1
    given = [tuple(p for _, p in pair) for pair in layers]
    assert len(cls(pairs_to_groups(given, scale=1.0)).param_groups) == 1


@classes
def test_names_tell_a_pair_of_another_layer_and_a_swapped_one(cls):
    one, two = layer(cls, 8, 8, 8, "q"), layer(cls, 8, 8, 8, "o")
    crossed = [one[0], two[1], *one[2:]]
    with pytest.raises(ValueError, match=r"'q.lora_A.weight' and 'o.lora_B.weight' are no pair"):
        cls([{"params": crossed, "scale": 1.0}], **needed(cls))
    with pytest.raises(ValueError, match="wrong order: A comes first"):
        cls([{"params": [one[1], one[0], *one[2:]], "scale": 1.0}], **needed(cls))
    own = [(f"my.{i}", p) for i, (_, p) in enumerate(layer(cls, 5, 6, 2, "q"))]
    assert cls([{"params": own, "scale": 1.0}], **needed(cls)).param_groups


@classes
def test_a_late_group_and_a_changed_one_are_checked_too(cls):
    first, second = layer(cls, 8, 8, 8, "q"), layer(cls, 8, 8, 8, "o")
    optimizer = cls([{"params": first, "scale": 1.0}], **needed(cls))
    with pytest.raises(ValueError, match="no pair by their names"):
        optimizer.add_param_group({"params": [first[0], second[1], *second[2:]], "scale": 1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": second, "scale": 1.0})

    def step():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()

    step()
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    held = tensors(optimizer)
    groups = optimizer.param_groups
    for key in ("params", "param_names"):
        groups[0][key][1], groups[1][key][1] = groups[1][key][1], groups[0][key][1]
    with pytest.raises(ValueError, match="no pair by their names"):
        step()
    for key in ("params", "param_names"):
        groups[0][key][1], groups[1][key][1] = groups[1][key][1], groups[0][key][1]
    assert same(before, [p.detach() for g in groups for p in g["params"]])
    assert same(held, tensors(optimizer))
    step()


@classes
def test_decay_of_b_keeps_the_plain_lr(cls):
    """lr_ratio_b multiplies the step."""
    moved = []
    for ratio in (0.0, 5.0):
        members = layer(cls, 5, 6, 2)
        groups = pairs_to_groups([members], scale=1.0, lr_ratio_b=ratio)
        optimizer = cls(groups, lr=0.1, weight_decay=0.5, **needed(cls))
        before = members[1].detach().clone()
        for p in members[:2]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moved.append(members[1].detach() / before)
    for share in moved:
        torch.testing.assert_close(share, torch.full((5, 2), 0.95))


class PlainLoRA(torch.nn.Linear):
    """A layer whose rank is a side of its weight."""

    def __init__(self, n, m, r=4):
        super().__init__(n, m)
        self.weight.requires_grad_(False)
        self.lora_A = torch.nn.Parameter(torch.randn(r, n))
        self.lora_B = torch.nn.Parameter(torch.zeros(m, r))
        self.scaling = 2.0


def plain_model():
    return torch.nn.Sequential(PlainLoRA(4, 6), torch.nn.LayerNorm(6), PlainLoRA(6, 4))


@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA])
def test_names_that_only_the_model_knows_tell_which_factors_are_pairs(cls):
    model = plain_model()
    first, second = model[0], model[2]
    pairs = [first.lora_A, first.lora_B, second.lora_A, second.lora_B]
    with pytest.raises(ValueError, match="could be A and B"):
        cls([{"params": pairs, "scale": 2.0}])
    optimizer = cls([{"params": pairs, "scale": 2.0}], model=model)
    assert optimizer.param_groups[0]["param_names"][0] == "0.lora_A"
    with pytest.raises(ValueError, match=r"'0.lora_A' and '2.lora_B' are no pair"):
        cls([{"params": [first.lora_A, second.lora_B], "scale": 2.0}], model=model)
    with pytest.raises(ValueError, match="wrong order"):
        cls([{"params": [first.lora_B, first.lora_A], "scale": 2.0}], model=model)


@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA, SwitchLoRA])
def test_vectors_beside_the_pairs_of_a_model_have_no_weight_decay(cls):
    model = plain_model()
    model.append(torch.nn.Linear(4, 3))
    settings = {"total_steps": 10} if cls is SwitchLoRA else {}
    optimizer = cls(model, weight_decay=0.5, lr=0.1, **settings)
    rest = optimizer.param_groups[-1]
    factors = dict(zip(rest["param_names"], rest["decays"], strict=True))
    assert factors.pop("3.weight") == 1.0
    assert set(factors.values()) == {0.0}
    norm = model[1].weight
    norm.grad = torch.zeros_like(norm)
    optimizer.step()
    assert torch.equal(norm, torch.ones(6))
    groups = lora_param_groups(model, base_weight=cls is SwitchLoRA)
    groups = cls(groups, **settings).param_groups
    assert not groups[-1].get("decays")


# values that come late, or from other code


@pytest.mark.parametrize("after", [0, 1], ids=["at-once", "later"])
@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA, SwitchLoRA])
def test_a_scale_that_is_written_later_is_there_or_refused(cls, after):
    params, needed, weights = problem(cls)
    optimizer = cls(params, lr=0.1, **needed)
    for _ in range(after):
        set_gradients(weights)
        optimizer.step()
    set_gradients(weights)
    before = [p.detach().clone() for p in weights]
    group = optimizer.param_groups[0]
    for scale in (None, "2", 0.0):
        group["scale"] = scale
        with pytest.raises(ValueError, match="scale must be a positive finite number"):
            optimizer.step()
        assert all(map(torch.equal, before, weights)) and group["scale"] == scale
    group["scale"] = 2.0
    optimizer.step()
    assert not all(map(torch.equal, before, weights))


@pytest.mark.parametrize("scale", [int, {"0": 1.0}.__getitem__, lambda: 1.0])
def test_a_function_that_tells_no_scale_is_refused_by_its_name(scale):
    net = nn.ModuleDict({"up": Plain(6, 5)})
    for make in (lambda: lora_param_groups(net, scale=scale), lambda: AltLoRA(net, scale=scale)):
        with pytest.raises(ValueError, match=r"^scale=.* fails for module 'up': \w+Error: "):
            make()


@pytest.mark.parametrize("scaling", ["2.0", None, [2.0], torch.tensor(1j), torch.ones(2)])
def test_a_module_that_tells_no_number_as_its_scale_is_refused(scaling):
    net = Plain(6, 5)
    net.scaling = scaling
    with pytest.raises(ValueError, match="scale must be a positive finite number"):
        AltLoRA(net)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("view", ["heads:2", ("auto", "heads:2"), ("auto",)])
@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA, SwitchLoRA])
def test_a_view_that_leaves_no_pair_is_refused(cls, view, late):
    (pair, rest), needed, weights = problem(cls)
    if not isinstance(view, str) and cls is SwitchLoRA and len(view) > 1:
        view = (*view, "auto")
    if not late:
        with pytest.raises(ValueError, match="view"):
            cls([{**pair, "view": view}, rest], lr=0.1, **needed)
        return
    optimizer = cls([pair, rest], lr=0.1, **needed)
    set_gradients(weights)
    optimizer.param_groups[0]["view"] = view
    before = [p.detach().clone() for p in weights]
    with pytest.raises(ValueError, match="view"):
        optimizer.step()
    assert all(map(torch.equal, before, weights)) and not optimizer.state


@pytest.mark.parametrize("rule", ["AltLoRA", "AdaPreLoRA"])
def test_factors_that_are_no_pair_are_refused_in_a_group_of_another_class_too(rule):
    A, B = weight((2, 6)), weight((5, 3))
    optimizer = Muon([{"params": [A, B], "rule": rule, "scale": 2.0}])
    set_gradients([A, B])
    with pytest.raises(ValueError, match=r"parameter 0 .* and parameter 1 .* are no pair"):
        optimizer.step()
    assert not optimizer.state
