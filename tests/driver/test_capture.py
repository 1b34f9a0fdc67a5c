"""``capturable=True``: what a CUDA graph would replay, recorded and replayed on the CPU.

A graph holds the operations of a step with their tensors and numbers. So does ``Graph`` here, which
runs them again on the same tensors: what the host decided stays decided, and every number that is
no tensor stays as it was in the capture. On fake tensors of a device that is not there, two
captures at other clocks, learning rates and decays must be the same operations.
"""

import importlib
import re
import warnings

import pytest
import torch
from helpers.fake_device import Arrived, Calls, device, rarely
from helpers.problems import gradients, same, weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from stiefel import optimizers
from stiefel.kernels import dispatch
from stiefel.optimizers import GaLore, Muon, RowNorm
from stiefel.optimizers._core.rule import RULE_CLASSES
from stiefel.optimizers._driver import capture, finite
from stiefel.optimizers._driver import optimizer as driver

SHAPES = [(8, 12), (12, 8), (8, 12), (8, 12), (5, 7)]
STEPS = 9
CASES = {
    "muon": (Muon, {"polar": "ns5"}),
    "muon-adamuon": (Muon, {"polar": "ns5", "second_moment": "adamuon", "cautious": True}),
    "muon-steered": (Muon, {"polar": "ns5", "weight_norm": "sphere"}),
    "muon-floor": (Muon, {"polar": "ns5", "weight_norm": "floor"}),
    "auon-corrected": (optimizers.AuON, {"decay_schedule": "corrected", "cautious": True}),
    "rownorm-independent": (RowNorm, {"decay_schedule": "independent"}),
    "muon-guards": (Muon, {"polar": "gram", "spike_ratio": 1.5, "decay_schedule": "lr2"}),
    "galore": (GaLore, {"rank": 3, "update_proj_gap": 4}),
    "galore-reset": (GaLore, {"rank": 3, "update_proj_gap": 4, "moments": "reset"}),
    "galore-full": (GaLore, {"rank": 3, "update_proj_gap": 4, "proj_type": "full"}),
    "galore-lion": (GaLore, {"rank": 3, "update_proj_gap": 4, "inner": "lion"}),
    "galore-topk": (GaLore, {"rank": 3, "update_proj_gap": 4, "projection": "topk"}),
    "fira": (optimizers.Fira, {"rank": 3, "update_proj_gap": 4}),
    "fira-paper": (optimizers.Fira, {"rank": 3, "update_proj_gap": 4, "variant": "paper"}),
    "frugal-columns": (optimizers.FRUGAL, {"density": 0.5, "update_gap": 4}),
    "frugal-rows": (optimizers.FRUGAL, {"split": "rows", "update_gap": 4, "reset": "changed"}),
    "frugal-randk": (optimizers.FRUGAL, {"split": "randk", "update_gap": 4, "reset": "none"}),
    "frugal-svd": (optimizers.FRUGAL, {"split": "svd", "update_gap": 4}),
    "frugal-lion": (optimizers.FRUGAL, {"split": "random", "update_gap": 4, "inner": "lion"}),
    "dctadamw": (optimizers.DCTAdamW, {"rank": 3, "update_proj_gap": 4}),
    "dctadamw-global": (
        optimizers.DCTAdamW,
        {"rank": 3, "update_proj_gap": 4, "bias_correction": "global"},
    ),
    "sinkgd": (optimizers.SinkGD, {"momentum": 0.9}),
    "apollo": (optimizers.APOLLO, {"rank": 3, "update_proj_gap": 4}),
    "apollo-tensor": (optimizers.APOLLO, {"rank": 3, "update_proj_gap": 4, "scaling": "tensor"}),
    "auon": (optimizers.AuON, {}),
    "rownorm": (RowNorm, {}),
    "rownorm-columns": (RowNorm, {"axis": "cols", "centred": True}),
    "spectral": (optimizers.Spectral, {"polar": "ns5"}),
    "hybrid": (optimizers.Hybrid, {"polar": "ns5"}),
    "trion": (optimizers.Trion, {"rank": 3}),
}

ROUNDED = ("muon", "galore-reset", "fira", "frugal-columns", "rownorm", "dctadamw-global")
"""Also with weights whose random bits are drawn by the clock."""
READS_ONCE = ("muon-steered",)
"""The host looks once, at the first step, whether a weight whose norm is kept is zero."""


class Graph(TorchDispatchMode):
    """Operations of a step as they were called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        now = {}

        def found(X):
            return now.get(id(X), X) if isinstance(X, torch.Tensor) else X

        for func, args, kwargs, out in self.calls:
            new = func(*tree_map(found, args), **tree_map(found, kwargs))
            for old, X in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                if isinstance(old, torch.Tensor):
                    now[id(old)] = X

    def text(self):
        """Operations with all that is no tensor."""
        shown = []
        for func, args, kwargs, _ in self.calls:
            leaves = [tuple(x.shape) if isinstance(x, torch.Tensor) else x
                      for x in tree_flatten((args, kwargs))[0]]  # fmt: skip
            if func.namespace != "profiler":
                shown.append(f"{func} {leaves}")
        return shown


@pytest.fixture
def capturing(monkeypatch):
    """Turns the host's knowledge that a graph is captured on and off."""
    is_on = [False]
    for module in (driver, finite):
        monkeypatch.setattr(module, "is_capturing", lambda: is_on[0])
    adam = importlib.import_module("stiefel.kernels.reference.adam")
    monkeypatch.setattr(adam, "_READ_DEVICES", ())  # as on a device, whose clocks no host reads

    def turn(on):
        is_on[0] = on

    return turn


def tensors_of(optimizer, params):
    return [X for p in params for X in (p.data, *optimizer.state[p].values())
            if isinstance(X, torch.Tensor)]  # fmt: skip


def captured(optimizer, params, turn):
    """A graph of the step, which changes nothing itself."""
    live = tensors_of(optimizer, params)
    before = [X.clone() for X in live]
    turn(True)
    try:
        with Graph() as graph:
            optimizer.step()
    finally:
        turn(False)
    with torch.no_grad():
        for X, old in zip(live, before, strict=True):
            X.copy_(old)
    return graph


def prepared(cls, options, dtype, **more):
    params = [weight(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.003}]
    optimizer = cls(groups, lr=0.02, weight_decay=0.001, **options, **more)
    optimizer._wait = False  # as on an accelerator
    for p in params:
        p.grad = torch.zeros_like(p)
    return optimizer, params


def set_values(optimizer, step):
    """A schedule of everything that may change between replays."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.02 / (1 + step) * (1 + i)
        share = 0.01 if group["decay_schedule"] == "independent" else 1.0
        group["weight_decay"] = 0.05 * (step + i) * share


def fill(params, series, step):
    for p, grads in zip(params, series, strict=True):
        p.grad.copy_(grads[step])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES] + [(name, torch.bfloat16) for name in ROUNDED],
    ids=str,
)
def test_replays_are_steps(name, dtype, capturing):
    cls, options = CASES[name]
    series = [gradients(shape, STEPS, i) for i, shape in enumerate(SHAPES)]
    plain, expected = prepared(cls, options, dtype)
    ours, params = prepared(cls, options, dtype, capturable=True)
    graph, replays = None, 0
    for step in range(STEPS):
        for optimizer, weights in ((plain, expected), (ours, params)):
            fill(weights, series, step)
            set_values(optimizer, step)
        if step == 5:  # not finite, in the middle of a window
            for weights in (expected, params):
                weights[1].grad[0, 0] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the gradient that is not finite
            plain.step()
        if step == 1:
            graph = captured(ours, params, capturing)
        if graph is not None and ours.prepare_replay():
            graph.replay()
            replays += 1
        else:
            ours.step()
    has_windows = bool({"update_proj_gap", "update_gap"} & options.keys())
    assert replays == (6 if has_windows else 8)
    assert [ours.state[p]["step"] for p in params] == [STEPS] * 5  # a skipped one counts
    plain.skipped  # noqa: B018
    assert [plain.state[p]["step"] for p in expected] == [STEPS, STEPS - 1, *[STEPS] * 3]
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        late = 2e-2 if i == 1 else 1e-5  # its clock is one ahead, in Adam's bias correction
        least = 1e-2 if dtype == torch.bfloat16 else 1e-6
        if i == 1 and dtype == torch.bfloat16:
            late = 0.1
        torch.testing.assert_close(p.float(), q.float(), rtol=max(late, least), atol=late)
        if dtype == torch.bfloat16 and i != 1:
            assert (p == q).float().mean() > 0.9, name  # random bits by the same clocks


# what a graph holds does not depend on numbers of the host ----------------------------------------


def fake_calls(cls, options, clock, lr, decay, turn):
    """Operations of a captured step on a device that is not there, at some numbers."""
    with device():
        shapes = [(300, 400), (400, 300), (300, 400), (70, 600)]
        params = [torch.nn.Parameter(torch.empty(s, device="cuda").bfloat16()) for s in shapes]
        params.append(torch.nn.Parameter(torch.empty(50, device="cuda")))
        groups = [{"params": params[:2], "lr": lr / 2}, {"params": params[2:4]}]
        groups.append({"params": params[4:], "rule": "adamw", "adamw_weight_decay": 0.005})
        options = {**options, "decay_lr": 0.05}
        optimizer = cls(groups, lr=lr, weight_decay=decay, capturable=True, **options)
        rarely(optimizer).init_state()
        for p in params:
            clocks = [k for k in optimizer.state[p] if k in ("step", "refreshed")]
            if not isinstance(optimizer.state[p]["step"], torch.Tensor):
                optimizer.state[p].update(dict.fromkeys(clocks, 1))
                optimizer.state[p]["step"] = clock
            p.grad = torch.empty_like(p)
        optimizer.step()
        turn(True)
        with Calls() as calls, Graph() as graph:
            optimizer.step()
        turn(False)
        assert [optimizer.state[p]["step"] for p in params[:4]] == [clock + 1] * 4
        assert optimizer.prepare_replay()
        assert [optimizer.state[p]["step"] for p in params[:4]] == [clock + 2] * 4
    return graph.text(), calls


@pytest.mark.parametrize("name", [name for name in CASES if name not in READS_ONCE])
def test_a_captured_step_holds_no_number_of_the_host(name, capturing, monkeypatch):
    pytest.importorskip("triton", reason="there is no triton on this platform")
    monkeypatch.setattr(finite, "LateFlags", Arrived)
    monkeypatch.setattr(dispatch, "is_supported_gpu", lambda index: True)
    cls, options = CASES[name]
    one, calls = fake_calls(cls, options, 7, 0.01, 0.0001, capturing)
    two, _ = fake_calls(cls, options, 23, 0.3, 0.0007, capturing)
    assert calls.ours and not calls.moves and "_local_scalar_dense" not in " ".join(one)
    differing = [(a, b) for a, b in zip(one, two, strict=True) if a != b]
    assert not differing, differing[:3]


# what is refused ----------------------------------------------------------------------------------


REFUSED = {
    "a rule whose step depends on its number": ("ARO", {}, "ARO, whose update depends"),
    "a sketch": ("Muon", {"polar": "low_rank"}, "polar='low_rank', which draws"),
    "a method that waits": ("Muon", {"polar": "zolo"}, "polar='zolo', which waits"),
    "reports": ("Muon", {"report_steps": 3}, "report_steps=3, which reads"),
    "torch's order": ("Muon", {"compat": "torch"}, "compat='torch', whose"),
    "the published order": ("GaLore", {"compat": "reference"}, "compat='reference', whose"),
    "a decay that moves": ("GaLore", {"inner": "adafactor"}, "inner='adafactor', whose"),
    "a row method that waits": ("Spectral", {"polar": "svd"}, "polar='svd', which waits"),
    "Trion": ("Trion", {"polar": "eigh"}, "polar='eigh', which waits"),
    "reading flags": ("RowNorm", {"nonfinite": "raise"}, "nonfinite='raise', for which"),
    "deciding by flags": ("RowNorm", {"nonfinite": "skip_step"}, "nonfinite='skip_step', for"),
    "state that comes and goes": ("FRUGAL", {"split": "block"}, "split='block', whose state"),
    "codes": ("Muon", {"state_dtype": "int8"}, "state_dtype='int8', whose"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_replay_is_refused(name):
    cls, options, text = REFUSED[name]
    cls, p = getattr(optimizers, cls), weight((8, 12))
    text = f"capturable=True is not supported by {text}"
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        cls([p], capturable=True, **options)
    assert str(caught.value).endswith("; leave it out for these matrices")
    optimizer = cls([p], **options)
    with pytest.raises(ValueError, match=re.escape(text)):
        optimizer.add_param_group({"params": [weight((4, 6))], "capturable": True})
    optimizer.param_groups[0]["capturable"] = True
    p.grad, before = torch.ones_like(p), p.detach().clone()
    with pytest.raises(ValueError, match=re.escape(text)):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state


def test_every_rule_says_whether_it_can_be_captured():
    able = {cls.__name__ for cls, _ in CASES.values()}
    for rule in map(RULE_CLASSES.get, sorted(RULE_CLASSES)):
        if rule.__module__.startswith("stiefel.") and rule.method() in optimizers.__all__:
            needed = {"total_steps": 9} if rule.method() == "SwitchLoRA" else {}
            assert (rule(**needed).capture_obstacle() is None) == (rule.method() in able), rule


def test_what_has_changed_since_the_capture_is_refused(capturing):
    def ready():
        optimizer, params = prepared(GaLore, {"rank": 3}, torch.float32, capturable=True)
        for p, shape in zip(params, SHAPES, strict=True):
            p.grad.copy_(gradients(shape, 1)[0])
        optimizer.step()
        captured(optimizer, params, capturing)
        assert optimizer.prepare_replay()
        return optimizer, params

    def refused(optimizer, text):
        clocks = [
            optimizer.state[p].get("step") for g in optimizer.param_groups for p in g["params"]
        ]
        with pytest.raises(RuntimeError, match=text):
            optimizer.prepare_replay()
        after = [
            optimizer.state[p].get("step") for g in optimizer.param_groups for p in g["params"]
        ]
        assert clocks == after

    optimizer, params = ready()
    optimizer.param_groups[1]["scale"] = 0.5
    refused(
        optimizer, r"scale of parameter group 1 has changed since the capture.*capture the step"
    )
    optimizer, params = ready()
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].clone()
    refused(optimizer, "their state, or which of them step together have changed since")
    optimizer, params = ready()
    params[0].grad = None
    optimizer.step()
    refused(optimizer, "which of them step together")
    optimizer, params = ready()
    optimizer.load_state_dict(optimizer.state_dict())
    refused(optimizer, "no step was captured with capturable=True")
    refused(prepared(GaLore, {}, torch.float32, capturable=True)[0], "no step was captured")


def test_a_step_that_cannot_be_captured_says_what_to_do(capturing):
    def refused(optimizer, text):
        before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        capturing(True)
        with pytest.raises(RuntimeError, match=text):
            optimizer.step()
        capturing(False)
        after = [p.detach() for g in optimizer.param_groups for p in g["params"]]
        assert same(before, after)

    optimizer, _ = prepared(GaLore, {"update_proj_gap": 2}, torch.float32, capturable=True)
    refused(optimizer, r"cannot hold state that is still to be made; call step\(\) once")
    optimizer.param_groups[0]["lr"] = 0.0  # a schedule that warms up
    for _ in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    refused(optimizer, r"cannot hold update 3, which makes a new basis; call step\(\) once more")
    optimizer.step()
    optimizer.add_param_group({"params": [weight((4, 6))], "capturable": False})
    optimizer.param_groups[2]["params"][0].grad = torch.ones(4, 6)
    optimizer.step()
    refused(optimizer, "a group without capturable=True; set it in all groups")


def test_steps_inside_of_backward_are_refused():
    optimizer = RowNorm([weight((8, 12))], capturable=True)
    with pytest.raises(ValueError, match=r"step_in_backward\(\) steps each weight by the host's"):
        optimizer.step_in_backward()
    optimizer.step()


def test_a_weight_decay_of_adamw_is_that_of_the_capture():
    """Torch's AdamW takes a number; matrices of the same group read theirs."""
    params = [weight((8, 12)), weight((3,))]
    optimizer = RowNorm([{"params": params, "capturable": True, "rules": ["matrix", "adamw"]}])
    plan = optimizer._get_plan()
    before = capture.held_settings(plan, optimizer.param_groups)
    optimizer.param_groups[0]["lr"] = 1.0
    assert capture.held_settings(plan, optimizer.param_groups) == before
    optimizer.param_groups[0]["weight_decay"] = 0.5
    assert capture.held_settings(plan, optimizer.param_groups) != before


def test_late_flags_of_a_device_are_counted_and_the_clock_goes_on():
    optimizer, params = prepared(RowNorm, {}, torch.float32, capturable=True)
    optimizer.step()
    params[0].grad[0, 0] = float("inf")
    optimizer.step()
    with pytest.warns(UserWarning, match="non-finite gradient of parameter 0"):
        assert optimizer.skipped == {0: 1}
    assert [optimizer.state[p]["step"] for p in params] == [2] * 5
