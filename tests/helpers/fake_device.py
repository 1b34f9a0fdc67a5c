"""A device that is not there: fake tensors on it, and a record of what a step calls."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stiefel.kernels.reference import dct as cosines

aten = torch.ops.aten
RARE = {
    **dict.fromkeys(("update_proj_gap", "update_gap", "gap", "precondition_frequency"), 100),
    "report_steps": 0,
}
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
