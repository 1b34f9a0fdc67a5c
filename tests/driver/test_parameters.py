"""Weights, gradients and state of every kind: a step works as torch's would, or moves nothing."""

import warnings

import pytest
import torch
from helpers.every_class import EVERY, PLAIN, problem, set_gradients
from helpers.problems import same, tensors
from torch import nn

from stiefel.optimizers import SOAP, GaLore, Muon, SymmetryStack
from stiefel.optimizers._lora.pair_groups import PairOptimizer

FLOAT8 = torch.float8_e4m3fn


def weights_of(optimizer):
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]


def refused_step(optimizer, text, error=RuntimeError):
    """A step that is refused by one sentence, with nothing changed."""
    before = weights_of(optimizer), tensors(optimizer)
    with pytest.raises(error, match=text) as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    after = weights_of(optimizer), tensors(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert same(before[1], after[1])


# parameters ---------------------------------------------------------------------------------------


def untrainable():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    return {
        "expanded rows": (torch.ones(1, 4).expand(3, 4), "is expanded"),
        "expanded columns": (torch.ones(3, 1).expand(3, 4), "is expanded"),
        "expanded vector": (torch.ones(1).expand(3), "is expanded"),
        "float8": (torch.ones(3, 4).to(FLOAT8), "dtype torch.float8_e4m3fn"),
        "float8 vector": (torch.ones(4).to(FLOAT8), "dtype torch.float8_e4m3fn"),
        "sparse": (torch.eye(4).to_sparse(), "stored as torch.sparse_coo"),
        "csr": (torch.eye(4).to_sparse_csr(), "stored as torch.sparse_csr"),
        "nested": (nested, "nested tensor"),
        "jagged": (jagged, "nested tensor"),
    }


@EVERY
@pytest.mark.parametrize("kind", untrainable())
@pytest.mark.parametrize("name", [None, "layer.weight"])
@pytest.mark.parametrize("rule", [None, "adamw"])
def test_parameters_that_nothing_can_train_are_refused_by_name(cls, kind, name, rule):
    data, text = untrainable()[kind]
    p = nn.Parameter(data)
    params, needed, _ = problem(cls)
    entry = p if name is None else (name, p)
    group = {"params": [entry], **({} if rule is None else {"rule": rule})}
    if issubclass(cls, PairOptimizer):
        group["rule"] = "adamw"
    match = rf"parameter {name!r} .*{text}" if name else rf"parameter 0.* {text}"
    with pytest.raises(ValueError, match=match) as caught:
        cls([group], **needed)
    assert "\n" not in str(caught.value)
    optimizer = cls(params, **needed)
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({**group, "params": [p]})
    assert len(optimizer.param_groups) == count


@PLAIN
def test_frozen_parameters_of_any_kind_pass_and_stay(cls):
    kinds = [
        torch.ones(3, 4, dtype=torch.int8),
        torch.ones(3, 4).to(FLOAT8),
        torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8),
        torch.ones(3, 4, dtype=torch.bool),
        torch.ones(1, 4).expand(3, 4),
    ]
    frozen = [nn.Parameter(x, requires_grad=False) for x in kinds]
    params, _, weights = problem(cls)
    optimizer = cls([*params, *frozen])
    set_gradients(weights)
    optimizer.step()
    assert not any(optimizer.state.get(p) for p in frozen)


@PLAIN
def test_a_frozen_parameter_with_a_gradient_that_cannot_be_stepped_is_refused(cls):
    params, _, weights = problem(cls)
    p = nn.Parameter(torch.ones(3, 4, dtype=torch.int32), requires_grad=False)
    optimizer = cls([*params, p])
    set_gradients(weights)
    p.grad = torch.ones(3, 4, dtype=torch.int32)
    refused_step(optimizer, r"gradient of parameter \d .* has dtype torch.int32")


@PLAIN
def test_weights_that_do_not_lie_in_rows_train_as_others_do(cls):
    torch.manual_seed(0)
    W = torch.randn(8, 6)
    strided = [
        nn.Parameter(W.clone()),
        nn.Parameter(W.mT.contiguous().mT),
        nn.Parameter(torch.randn(8, 12)[:, ::2]),
    ]
    strided[2].data.copy_(W)
    for p in strided:
        optimizer = cls([p])
        for _ in range(3):
            p.grad = W.sin().contiguous()
            optimizer.step()
    for p in strided[1:]:
        torch.testing.assert_close(p, strided[0], rtol=1e-5, atol=1e-6)


@PLAIN
def test_parameters_of_no_or_one_entry_step_as_adamw_or_the_rule(cls):
    shapes = [(0, 4), (), (1,), (1, 1), (4, 1)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = cls(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2 if cls is SOAP else 1):  # whose first gradient moves no matrix
            optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)
    assert all(p.numel() == 0 or not torch.equal(p, torch.ones_like(p)) for p in params[:4])


@PLAIN
def test_a_model_on_the_meta_device_may_be_planned_but_not_stepped(cls):
    params = [nn.Parameter(torch.ones(4, 3, device="meta")), nn.Parameter(torch.ones(3))]
    optimizer = cls(params)
    optimizer.step()  # no gradient, nothing to do
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 .* is on the meta device"):
        optimizer.step()
    assert torch.equal(params[1], torch.ones(3)) and not optimizer.state.get(params[1])


# gradients ----------------------------------------------------------------------------------------


def bad_gradients():
    """Gradient of a 4 x 3 weight, made past the checks of torch; and what the refusal says."""
    return {
        "sparse": (lambda p: setattr(p, "grad", p.detach().to_sparse()), "sparse gradients"),
        "shape": (lambda p: setattr(p, "data", torch.ones(5, 4)), "changed its shape to .5, 4."),
        "dtype": (lambda p: setattr(p, "data", p.data.to(FLOAT8)), "torch.float8_e4m3fn"),
        "expanded": (lambda p: setattr(p, "data", torch.ones(1, 3).expand(4, 3)), "is expanded"),
    }


@PLAIN
@pytest.mark.parametrize("kind", bad_gradients())
@pytest.mark.parametrize("rule", [None, "adamw"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_gradient_or_weight_that_cannot_be_used_is_refused_before_anything_moves(
    cls, kind, rule, first
):
    if kind == "expanded" and not first:
        pytest.skip("the strides of weights are not looked at again")
    make, text = bad_gradients()[kind]
    good, bad = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    groups = [{"params": [("good", good)]}, {"params": [("bad", bad)]}]
    if rule is not None:
        groups[1]["rule"] = rule
    optimizer = cls(groups)
    steps = 0 if first else 2
    for _ in range(steps):
        good.grad, bad.grad = torch.ones(4, 3), torch.ones(4, 3)
        optimizer.step()
    good.grad, bad.grad = torch.ones(4, 3), torch.ones(4, 3)
    make(bad)
    refused_step(optimizer, rf"{text}.*" if kind == "sparse" else rf"'bad' .*{text}")
    bad.data, bad.grad = torch.ones(4, 3), torch.ones(4, 3)
    optimizer.step()
    assert good.isfinite().all() and bad.isfinite().all()


@PLAIN
def test_a_float32_gradient_of_a_bfloat16_matrix_is_used_as_it_is(cls):
    p = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    q = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    G = torch.linspace(-1, 1, 12).view(4, 3).sin().bfloat16()
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has gradients in the weight's dtype only")
    p.grad_dtype = torch.float32
    p.grad, q.grad = G.float(), G
    for x in (p, q):
        optimizer = cls([x], lr=0.1)
        for _ in range(2 if cls is SOAP else 1):
            optimizer.step()
    assert torch.equal(p, q) and not torch.equal(p, torch.ones_like(p))
    v = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    v.grad_dtype = torch.float32
    v.grad = torch.ones(3)
    refused_step(cls([v, q]), "which AdamW cannot step")


# weights that change between steps ----------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def backward(net):
    p = next(net.parameters())
    for q in net.parameters():
        q.grad = None
    net(
        torch.linspace(-1, 1, 12, dtype=p.dtype, device=p.device).view(2, 6)
    ).square().sum().backward()


CONVERSIONS = {
    "bfloat16": lambda net: net.bfloat16(),
    "half": lambda net: net.half(),
    "double": lambda net: net.double(),
    "meta": lambda net: net.to("meta"),
}


@PLAIN
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_model_that_is_converted_after_a_step_moves_whole_or_not_at_all(cls, kind):
    net = model()
    params = [p for p in net.parameters()]
    optimizer = cls(params, write="nearest")  # AdamW's moments have the dtype of their weights
    backward(net)
    optimizer.step()
    CONVERSIONS[kind](net)
    if kind == "meta":  # torch makes new parameters, so the optimizer holds the old ones
        optimizer.step()
        return
    backward(net)
    refused_step(optimizer, "parameter .* changed its shape, dtype or device after its state was")
    net.float()
    backward(net)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)


@PLAIN
@pytest.mark.parametrize("kind", ["bfloat16", "half"])
def test_a_model_goes_on_in_low_precision_as_its_moments_are_float32(cls, kind):
    net = model()
    optimizer = cls(net.parameters())
    backward(net)
    optimizer.step()
    CONVERSIONS[kind](net)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(4):
        backward(net)
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        assert bool(p.isfinite().all()) and not torch.equal(p, old)
        assert all(
            x.dtype != p.dtype for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)
        )


@PLAIN
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_whose_state_still_fits_go_on_in_another_dtype(cls, dtype):
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    optimizer = cls([p, q])
    G = torch.randn(6, 5)
    for step in range(4):
        if step == 2:
            p.data = p.data.to(dtype)  # one of a stack
        p.grad, q.grad = G.to(p.dtype), G.clone()
        optimizer.step()
    assert p.dtype == dtype and q.dtype == torch.float32
    torch.testing.assert_close(p.float(), q, rtol=0.02, atol=0.02)
    assert {optimizer.state[x]["step"] for x in (p, q)} == {4}


@EVERY
def test_swapped_storage_of_the_same_shape_is_written(cls):
    params, needed, weights = problem(cls)
    optimizer = cls(params, **needed)
    for _ in range(2):
        set_gradients(weights)
        optimizer.step()
        for p in weights:
            p.data = p.data.clone()
    before = [p.detach().clone() for p in weights]
    set_gradients(weights)
    optimizer.step()
    assert not any(torch.equal(p, W) for p, W in zip(weights, before, strict=True))


def test_capturable_on_a_cpu_is_refused_before_matrices_move():
    optimizer = Muon(
        [{"params": [nn.Parameter(torch.ones(4, 3))]},
         {"params": [nn.Parameter(torch.ones(3))], "rule": "adamw"}]
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    optimizer.param_groups[1]["capturable"] = True
    refused_step(optimizer, "capturable=True needs an accelerator, but parameter 1")


def test_what_has_not_changed_is_not_looked_at_again(monkeypatch):
    from stiefel.optimizers._driver import checks

    net = model()
    optimizer = Muon(net)
    looked = []
    real = checks._check_gradient
    monkeypatch.setattr(checks, "_check_gradient", lambda *args: (looked.append(args), real(*args)))
    for expected in (6, 6, 6):
        backward(net)
        optimizer.step()
        assert len(looked) == expected


# lazy modules -------------------------------------------------------------------------------------


@PLAIN
def test_checks_pass_over_lazy_parameters(cls):
    from stiefel.optimizers._driver.checks import check_group, warn_without_matrix

    lazy = nn.LazyLinear(4)
    optimizer = cls([nn.Parameter(torch.ones(4, 3))])
    group = {**optimizer.param_groups[0], "params": [*lazy.parameters()]}
    group.pop("param_names", None)
    check_group(group, optimizer._default_rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_matrix([group], optimizer._default_rule)


@PLAIN
@pytest.mark.parametrize("form", ["params", "named", "module", "groups"])
def test_lazy_parameters_train_once_they_have_a_shape(cls, form):
    torch.manual_seed(0)
    net = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 4))
    params = {
        "params": net.parameters,
        "named": net.named_parameters,
        "module": lambda: net,
        "groups": lambda: [{"params": [*net.parameters()]}],
    }[form]()
    optimizer = cls(params)
    optimizer.step()  # nothing has a gradient
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(3, 7)).square().sum().backward()
        before = net[0].weight.detach().clone()
        optimizer.step()
    assert not torch.equal(net[0].weight, before) and optimizer.state[net[0].weight]


# shards -------------------------------------------------------------------------------------------


class FullyShardedDataParallel(nn.Module):
    """Stands for FSDP1: flattens its module's weights, and names them as FSDP does."""

    def __init__(self, module, use_orig_params):
        super().__init__()
        self._fsdp_wrapped_module = module
        if use_orig_params:
            for p in module.parameters():
                p.data = p.data.flatten()
            return
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in module.parameters()]))
        for name, _ in [*module.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
        module._flat_param = flat


@EVERY
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("form", ["module", "part", "named", "groups"])
def test_a_model_that_fsdp1_has_wrapped_is_refused(cls, use_orig_params, form):
    wrapped = FullyShardedDataParallel(model(), use_orig_params)
    _, needed, _ = problem(cls)
    params = {
        "module": lambda: wrapped,
        "part": lambda: nn.Sequential(nn.Linear(3, 3), wrapped),
        "named": lambda: wrapped.named_parameters(),
        "groups": lambda: [{"params": [*wrapped.named_parameters()], "scale": 1.0}
                           if issubclass(cls, PairOptimizer)
                           else {"params": [*wrapped.named_parameters()]}],
    }[form]()  # fmt: skip
    with pytest.raises(ValueError, match="FSDP1") as caught:
        cls(params, **needed)
    assert "\n" not in str(caught.value)


@PLAIN
def test_shards_that_nothing_marks_are_told_once(cls):
    shards = [nn.Parameter(torch.ones(n)) for n in (5, 7, 3)]
    with pytest.warns(UserWarning, match="no matrix among 3 parameters") as seen:
        cls(shards)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no matrix")
        cls(shards[:1])  # one optimizer for each parameter
        cls([("norm.weight", shards[0]), ("norm.bias", shards[1])])
        cls([{"params": shards, "rule": "adamw"}])
        cls([*shards, nn.Parameter(torch.ones(4, 3))])
        cls(nn.LayerNorm(4))


def test_a_real_fsdp1_model_is_refused(tmp_path):
    import datetime

    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    if dist.is_initialized():
        pytest.skip("another test has a process group")
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    try:
        for use_orig_params in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = FSDP(
                    model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
                )
            for cls in (Muon, GaLore, SymmetryStack):
                for params in (wrapped, wrapped.named_parameters()):
                    with pytest.raises(ValueError, match="FSDP1"):
                        cls(params)
                with pytest.raises(ValueError, match="FSDP1"):  # marked, though nothing has a name
                    cls(wrapped.parameters())
                assert cls([{"params": [*wrapped.parameters()], "rule": "adamw"}])
    finally:
        dist.destroy_process_group()


@PLAIN
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4), (5,), ()])
def test_lists_that_give_a_rule_what_is_no_matrix_are_refused(cls, shape):
    """Such as a checkpoint brings whose names are those of other parameters."""
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.ones(shape))]
    optimizer = cls(params)
    at = next(g for g in optimizer.param_groups if any(p is params[1] for p in g["params"]))
    if at["rule"] == "adamw":  # a group of its own, in a stack
        at["rule"] = optimizer.param_groups[0]["rule"]
    at["rules"] = ["matrix"] * len(at["params"])
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameter 1.* needs matrices; move it to a group"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not optimizer.state


def test_a_file_that_gives_a_rule_what_is_no_matrix_is_refused():
    params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(2, 0, 3))]
    optimizer = Muon([{"params": params, "rules": ["matrix", "adamw"]}])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["rules"] = ["matrix", "matrix"]
    with pytest.raises(ValueError, match=r"parameter 1 .* needs matrices"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rules"] == ["matrix", "adamw"]
    params[0].grad = torch.ones(6, 4)
    optimizer.step()
