"""A step on an accelerator that is not there: fake tensors say what it would call, and wait for.

A fake tensor has a shape, a dtype and the device "cuda", but no numbers. So the driver takes the
way of accelerators, kernels are picked and called as operations without running, whoever asks for
a number on the host fails, and copies between the host and the device can be counted.
"""

import contextlib

import pytest
import torch
from helpers.attentions import model_of
from helpers.methods import METHODS
from helpers.pair_problems import PAIRS
from helpers.problems import run
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="there is no triton on this platform")

from stiefel.kernels import dispatch
from stiefel.kernels.reference import dct as cosines
from stiefel.optimizers import MaxLogits, qk_clip_
from stiefel.optimizers._driver import finite

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
aten = torch.ops.aten
SHAPES = [(300, 400), (400, 300), (300, 400), (70, 600)]
"""Two that are stacked and two views, above the sizes from which kernels are picked."""
WAITS = {
    "muon-kaczmarz": "columns are drawn on the CPU, by the norms of this very momentum",
}
RARE = {"update_proj_gap": 100, "update_gap": 100, "gap": 100, "report_steps": 0}
"""What may wait is left out: refreshes, which are rare and eager, and reports."""


class Bindings(TorchFunctionMode):
    """Calls whose binding asks for a device guard, which a build without CUDA does not have."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "__getitem__":
            return taken(*args)
        if name == "__setitem__":
            X, at, value = args
            put = aten.copy_.default if isinstance(value, torch.Tensor) else aten.fill_.Scalar
            return put(taken(X, at), value)
        if name == "new_tensor":
            raise AssertionError("the host copies numbers to the device, and waits for it")
        if name.startswith("new_"):
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            return getattr(torch, name[4:])(*args[1:], **kwargs)
        if name == "copy_":
            return aten.copy_.default(*args, **kwargs)
        if name == "contiguous":
            return torch.clone(args[0], memory_format=torch.contiguous_format)
        if name == "__invert__":
            return aten.bitwise_not.default(*args)
        if name in ("__and__", "__or__"):
            kind = "Tensor" if isinstance(args[1], torch.Tensor) else "Scalar"
            return getattr(getattr(aten, f"bitwise_{name[2:-2]}"), kind)(*args)
        return func(*args, **kwargs)


def taken(X, at):
    """X[at] by operations: slices, numbers, None, an ellipsis and tensors of indices."""
    at = list(at) if isinstance(at, tuple) else [at]
    dots = [i for i, a in enumerate(at) if a is Ellipsis]
    if dots:
        missing = X.dim() - sum(a is not None for a in at) + 1
        at[dots[0] : dots[0] + 1] = [slice(None)] * missing
    dim, indices = 0, {}
    for a in at:
        if a is None:
            X = X.unsqueeze(dim)
        elif isinstance(a, slice):
            X = aten.slice.Tensor(X, dim, *a.indices(X.shape[dim]))
        elif isinstance(a, int):
            X = X.select(dim, a)
            continue
        else:
            indices[dim] = a
        dim += 1
    return aten.index.Tensor(X, [indices.get(i) for i in range(dim)]) if indices else X


class Calls(TorchDispatchMode):
    """Names of the house's operations, and of those that move tensors between devices."""

    def __init__(self):
        super().__init__()
        self.ours, self.moves = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [X for X in tree_leaves((args, kwargs, out)) if isinstance(X, torch.Tensor)]
        large = {X.device.type for X in tensors if X.dim() or "copy" in func._opname}
        if len(large) > 1:
            self.moves.append(func._opname)
        if func.namespace == "stiefel":
            self.ours.append(func._opname)
        return out


class Arrived:
    """In place of ``LateFlags``, which have no numbers here: all was finite."""

    def __init__(self, finite, owners):
        assert len(finite) == len(owners)

    def bad_owners(self):
        return []


@contextlib.contextmanager
def device():
    """Fake tensors, and nothing left over of them in what is kept per device."""
    kept = (cosines.basis, cosines.quarter_waves)
    for cache in kept:
        cache.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Bindings():
            yield
    finally:
        for cache in kept:
            cache.cache_clear()


def rarely(optimizer):
    """The same without refreshes in the steps to come."""
    for group in optimizer.param_groups:
        group.update({key: value for key, value in RARE.items() if key in group})
    return optimizer


def steady(make, shapes=SHAPES):
    """Calls of the second of two steps in the middle of a window."""
    drawn = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    run(rarely(make(drawn)), drawn, [[torch.ones(s)] * 3 for s in shapes])  # the CPU's draws
    with device():
        params = [torch.nn.Parameter(torch.empty(s, device="cuda").bfloat16()) for s in shapes]
        optimizer = rarely(make(params))
        optimizer.init_state()
        for p in params:
            clocks = [k for k in optimizer.state[p] if k in ("step", "refreshed")]
            optimizer.state[p].update(dict.fromkeys(clocks, 1))
            p.grad = torch.empty_like(p)
        optimizer.step()
        with Calls() as calls:
            optimizer.step()
    return calls


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    monkeypatch.setattr(finite, "LateFlags", Arrived)
    monkeypatch.setattr(dispatch, "is_supported_gpu", lambda index: True)
    monkeypatch.delenv("STIEFEL_KERNELS", raising=False)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WAITS])
def test_a_step_waits_for_nothing(name):
    calls = steady(METHODS[name])
    assert calls.ours and not calls.moves


@pytest.mark.parametrize("kind", ["gqa", "by group", "latent"])
def test_clipping_logits_waits_for_nothing(kind):
    model = model_of(kind, dtype=torch.bfloat16)
    heads = 3 if kind == "latent" else 4
    with device():
        for layer in model.modules():
            for name, p in layer._parameters.items():
                if p is not None:
                    made = torch.empty(p.shape, device="cuda").bfloat16()
                    layer._parameters[name] = torch.nn.Parameter(made)
        optimizer = METHODS["muon"](list(model.parameters()))
        optimizer.init_state()
        for p in optimizer.state:
            optimizer.state[p]["weight_radius"] = torch.ones(1, 1, device="cuda")
        record = MaxLogits()
        record("blocks.0.attn", torch.ones(2, heads, 5, 5, device="cuda"))
        with Calls() as calls:
            gamma = qk_clip_(model, record.take(), optimizer=optimizer)
    assert gamma["blocks.0.attn"].device.type == "cuda" and not calls.moves


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_on_pairs_waits_for_nothing(name):
    def make(params, **options):
        return PAIRS[name](list(zip(params[::2], params[1::2], strict=True)), **options)

    calls = steady(make, [(16, 400), (300, 16)] * 2 + [(8, 200), (100, 8)])
    assert not calls.moves


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_does_so(name):
    assert steady(METHODS[name]).moves


def test_a_number_on_the_host_is_noticed():
    def careless(params, **options):
        optimizer = METHODS["muon"](params, **options)
        optimizer.register_step_post_hook(lambda *_: bool((params[0] > 0).all()))
        return optimizer

    with pytest.raises(DataDependentOutputException):
        steady(careless)
