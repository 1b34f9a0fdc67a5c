"""Our optimizers under torch's own test harness: the tests that every optimizer of torch passes.

Names are those of torch's tests where it has one; ``harness.py`` lists what does not apply.
"""

import contextlib
import gc
import os
import weakref
import zlib
from copy import deepcopy
from inspect import signature
from unittest.mock import patch

import torch
from helpers.allocations import count_step
from helpers.checkpoints import through_a_file
from helpers.covering import in_turn
from helpers.harness import INFOS, NOT_APPLICABLE, SCHEDULERS, SHARED, TORCH_TESTS, matrix
from helpers.problems import same, tensors
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from stiefel.optimizers import SOAP, Hybrid, RowNorm, SinkGD, Spectral
from stiefel.optimizers._core.rule import RULE_CLASSES

every = optims(INFOS, dtypes=[torch.float32])
both_layouts = parametrize("contiguous", [True, False])
STATELESS = (Hybrid, RowNorm, SinkGD, Spectral)
"""Classes that keep no buffer at ``momentum=0``."""


class Problem:
    """A matrix and a vector whose loss is to fall, as most of torch's tests have it.

    Args:
        device: Where it lives.
        dtype: Of the weights.
        contiguous: Whether the weights lie in memory as they are read.
        seed: Of the values.
    """

    def __init__(self, device, dtype=torch.float32, contiguous=True, seed=0):
        draw = torch.Generator().manual_seed(seed)
        W, b, x = (torch.randn(s, generator=draw) for s in ((10, 5), (10,), (5, 8)))
        W, b = W.to(device, dtype), b.to(device, dtype)
        if not contiguous:
            W, b = W.mT.contiguous().mT, torch.stack([b, b], -1)[:, 0]
        self.weight, self.bias, self.x = Parameter(W), Parameter(b), x.to(device, dtype)
        self.params = [self.weight, self.bias]

    @property
    def named(self):
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self):
        return (self.weight @ self.x + self.bias[:, None]).square().mean()

    def backward(self):
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, optimizer, steps, schedulers=()):
        """Losses before each step."""
        losses = []
        for _ in range(steps):
            losses.append(optimizer.step(self.backward).item())
            for scheduler in schedulers:
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(losses[-1]) if plateau else scheduler.step()
        return losses

    def copy_weights(self, other):
        with torch.no_grad():
            for p, q in zip(self.params, other.params, strict=True):
                p.copy_(q)

    def values(self):
        return [p.detach().clone() for p in self.params]


def some_of(cases):
    """The first and a third of the others, for every test and class another third.

    Tests do not depend on what the inputs of another test do: of three tests on a class one meets
    each input. All of them where ``--full-grids`` says so.
    """
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].partition(" ")[0]
    turn = zlib.crc32(test.encode())
    return [case for i, case in enumerate(cases) if i == 0 or in_turn(i, turn)]


def all_inputs(info, device):
    """Constructor arguments of every input."""
    return [given.kwargs for given in info.optim_inputs_func(device)]


def inputs(info, device):
    """Constructor arguments of the inputs of this test."""
    return some_of(all_inputs(info, device))


def flagged(info, device):
    """The same with every flag of which only one can be on, where the device has it.

    Flags concern AdamW's parameters, so settings of the matrices alone are run without them.
    """
    given = _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, info)
    shared = tuple(f"{desc} & " for desc in SHARED)
    return some_of([c.kwargs for c in given if " & " not in c.desc or c.desc.startswith(shared)])


def has_float_lrs(kwargs):
    return not isinstance(kwargs.get("lr"), torch.Tensor)


def needs_cuda(test, device):
    """Leave a test out where there is no CUDA device under it."""
    if torch.device(device).type != "cuda":
        test.skipTest("it compares parameters on a CUDA device with the CPU")


def saved_and_read(optimizer):
    """Its checkpoint as it comes back from a file, read without running code."""
    return through_a_file(optimizer.state_dict())


def test_harness_covers_torchs_list():
    """Every test of torch is here, or in the table that says why not, and never both."""
    assert TORCH_TESTS - DEFINED == set(NOT_APPLICABLE)
    assert not DEFINED & set(NOT_APPLICABLE)
    assert all(len(reason) > 20 for reason in NOT_APPLICABLE.values())


class TestOptimizers(TestCase):
    # Construction -------------------------------------------------------------------------------

    @every
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            self.assertIsNone(given.params)
            self.assertFalse({"foreach", "fused", "differentiable"} & set(given.kwargs))

    @every
    def test_errors(self, device, dtype, optim_info):
        for bad in optim_info.optim_error_inputs_func(device, dtype):
            given = bad.optimizer_error_input
            warns = issubclass(bad.error_type, Warning)
            expect = self.assertWarnsRegex if warns else self.assertRaisesRegex
            if bad.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
                with expect(bad.error_type, bad.error_regex, msg=given.desc):
                    optim_info.optim_cls(given.params, **given.kwargs)
            else:
                optimizer = optim_info.optim_cls(given.params, **given.kwargs)
                with expect(bad.error_type, bad.error_regex, msg=given.desc):
                    optimizer.step()

    @every
    def test_tensor_lr_must_be_one_element(self, device, dtype, optim_info):
        cls, p = optim_info.optim_cls, matrix(2, 3, device=device)
        for lr in (torch.tensor([0.1, 0.2]), torch.empty(0)):
            with self.assertRaisesRegex(ValueError, "Tensor lr must be 1-element"):
                cls([p], lr=lr)
            optimizer = cls([matrix(3, 2, device=device)])
            with self.assertRaisesRegex(ValueError, "Tensor lr must be 1-element"):
                optimizer.add_param_group({"params": [p], "lr": lr})
            self.assertEqual(len(optimizer.param_groups), 1)
        for shape in ((), (1,), (1, 1)):
            cls([p], lr=torch.full(shape, 0.1)).step()
        self.assertTrue(p.isfinite().all())

    @every
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem = Problem(device)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            before = repr(optimizer)
            self.assertTrue(before.startswith(f"{optim_info.name} ("))
            for key, value in kwargs.items():
                if key == "adamw_lr":
                    self.assertIn("adamw_lr_ratio: ", before)
                elif key != "policy":  # which becomes groups
                    self.assertIn(f"{key}: {value}", before)
            problem.train(optimizer, 1)
            self.assertEqual(repr(optimizer), before)
            rule = optimizer.param_groups[0]["rule"] or optim_info.name  # a stack has several
            self.assertIn(rule, str(optimizer.assignment()))

    @every
    def test_complex(self, device, dtype, optim_info):
        """Matrices are refused, also in a later group, which then is not added."""
        W = matrix(4, 3, dtype=torch.complex64, device=device)
        # a stack names the method that its policy chose
        name = r"\w+" if optim_info.name == "SymmetryStack" else optim_info.name
        text = f"{name} does not support complex parameters"
        for kwargs in inputs(optim_info, device):
            with self.assertRaisesRegex(RuntimeError, text):
                optim_info.optim_cls([W], **kwargs)
            optimizer = optim_info.optim_cls([matrix(device=device)], **kwargs)
            with self.assertRaisesRegex(RuntimeError, text):
                optimizer.add_param_group({"params": [W]})
            self.assertEqual(len(optimizer.param_groups), 1)

    @every
    def test_complex_2d(self, device, dtype, optim_info):
        """A complex matrix in an AdamW group moves like the real one that it is made of."""
        for kwargs in inputs(optim_info, device):
            z = matrix(4, 3, dtype=torch.complex64, device=device)
            x = Parameter(torch.view_as_real(z.detach()).clone())
            for p in (z, x):
                optimizer = optim_info.optim_cls([{"params": [p], "rule": "adamw"}], **kwargs)
                for step in range(3):
                    G = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(step))
                    G = G.to(device)
                    p.grad = torch.view_as_complex(G) if p is z else G
                    optimizer.step()
            self.assertEqual(torch.view_as_real(z.detach()), x.detach())

    @every
    def test_sparse_gradients(self, device, dtype, optim_info):
        """Refused before anything changes, whoever would train the parameter."""
        for kwargs in flagged(optim_info, device):
            for i in range(2):
                problem = Problem(device)
                optimizer = optim_info.optim_cls(problem.params, **kwargs)
                problem.train(optimizer, 1)
                before, state = problem.values(), tensors(optimizer)
                problem.params[i].grad = problem.params[i].grad.to_sparse()
                with self.assertRaisesRegex(RuntimeError, "does not support sparse gradients"):
                    optimizer.step()
                self.assertTrue(same(before, problem.values()))
                self.assertTrue(same(state, tensors(optimizer)))
        p = Parameter(torch.eye(3, device=device).to_sparse())
        with self.assertRaisesRegex(ValueError, "pass a dense parameter"):
            optimizer = optim_info.optim_cls([p])
            p.grad = torch.eye(3, device=device).to_sparse()
            optimizer.step()

    @every
    def test_defaults_changed_to_foreach(self, device, dtype, optim_info):
        """Left alone, AdamW's parameters run as torch's do on this device; a flag decides."""
        kernels = "torch.optim.adam._{}_adam"
        wanted = {None: "multi_tensor" if "cuda" in device else "single_tensor"}
        wanted |= {True: "multi_tensor", False: "single_tensor"}
        for foreach, name in wanted.items():
            problem = Problem(device)
            optimizer = optim_info.optim_cls(problem.params, foreach=foreach)
            with patch(kernels.format(name)) as called:
                problem.train(optimizer, 1)
            self.assertEqual(called.call_count, 1, msg=f"foreach={foreach}")
        optimizer = optim_info.optim_cls(problem.params)
        optimizer.param_groups[-1]["foreach"] = True
        with patch(kernels.format("multi_tensor")) as called:
            problem.train(optimizer, 1)
        self.assertEqual(called.call_count, 1)

    # The direction ------------------------------------------------------------------------------

    def check_direction(self, kwargs, losses, problem):
        self.assertTrue(all(map(torch.isfinite, map(torch.tensor, losses))))
        self.assertTrue(all(p.isfinite().all() for p in problem.params))
        compare = self.assertGreater if kwargs.get("maximize") else self.assertLess
        compare(losses[-1], losses[0], msg=str(kwargs))

    @every
    @both_layouts
    @parametrize("with_lrsched", [True, False])
    def test_forloop_goes_right_direction(
        self, device, dtype, optim_info, contiguous, with_lrsched
    ):
        schedules = optim_info.scheduler_inputs if with_lrsched else [()]
        for kwargs in inputs(optim_info, device):
            for makers in schedules:
                problem = Problem(device, dtype, contiguous)
                optimizer = optim_info.optim_cls(problem.params, foreach=False, **kwargs)
                losses = problem.train(optimizer, 8, [make(optimizer) for make in makers])
                self.check_direction(kwargs, losses, problem)
                self.assertEqual(problem.weight.is_contiguous(), contiguous)

    @every
    def test_forloop_goes_right_direction_multigpu(self, device, dtype, optim_info):
        if torch.device(device).type != "cuda" or torch.cuda.device_count() < 2:
            self.skipTest("it needs two CUDA devices")
        for kwargs in inputs(optim_info, device):
            problems = [Problem(f"cuda:{i}", dtype) for i in range(2)]
            params = [p for problem in problems for p in problem.params]
            optimizer = optim_info.optim_cls(params, foreach=False, **kwargs)
            losses = []
            for _ in range(12):
                losses.append(sum(float(problem.backward()) for problem in problems))
                optimizer.step()
            self.check_direction(kwargs, losses, problems[0])
            self.assertEqual(problems[0].values(), problems[1].values(), exact_device=False)

    @every
    @parametrize("named", [True, False])
    def test_param_group_with_lrscheduler_goes_right_direction(
        self, device, dtype, optim_info, named
    ):
        for kwargs in inputs(optim_info, device):
            for makers in optim_info.scheduler_inputs:
                problem = Problem(device, dtype)
                weight, bias = problem.named if named else problem.params
                groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
                optimizer = optim_info.optim_cls(groups, **kwargs)
                schedulers = [make(optimizer) for make in makers]
                self.check_direction(kwargs, problem.train(optimizer, 8, schedulers), problem)

    @every
    @parametrize("tensor", [True, False])
    @parametrize("scheduler", list(SCHEDULERS))
    def test_schedulers(self, device, dtype, optim_info, scheduler, tensor):
        """Finite, down, the kind of lr kept, and two groups in their ratio at every step."""
        if (optim_info.name, scheduler, tensor) == ("SymmetryStack", "ReduceLROnPlateau", True):
            self.skipTest("torch scales a tensor once for each group; groups of a stack share it")
        W = Parameter(torch.eye(6, 4, device=device))
        for kwargs in some_of(all_inputs(optim_info, device)[: len(SHARED)]):  # not of matrices
            lrs = [torch.tensor(lr) if tensor else lr for lr in (0.002, 0.001)]
            problem = Problem(device, dtype)
            groups = [{"params": problem.params}, {"params": [W], "lr": lrs[1]}]
            optimizer = optim_info.optim_cls(groups, **{**kwargs, "lr": lrs[0]})
            main = [g for g in optimizer.param_groups if g["params"][0] is not W]
            schedule = SCHEDULERS[scheduler](optimizer)
            losses, seen = [], set()
            for _ in range(12):
                losses += problem.train(optimizer, 1, [schedule])
                late = optimizer.param_groups[-1]
                self.assertEqual(float(main[0]["lr"]), 2 * float(late["lr"]), rtol=1e-4, atol=0)
                for group, lr in zip((main[0], late), lrs, strict=True):
                    self.assertIs(type(group["lr"]), type(lr))
                seen.add(float(late["lr"]))
            self.check_direction(kwargs, losses, problem)
            self.assertGreater(len(seen), 1)

    @every
    @parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
    def test_cycled_momentum_acts(self, device, dtype, optim_info, scheduler):
        """Betas, or the momentum of a method without, follow the cycle and reach the weights."""
        ends = []
        for cycle in (True, False):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params)
            key = "betas" if "betas" in optimizer.defaults else "momentum"
            kept = optimizer.defaults[key]
            schedule, seen = SCHEDULERS[scheduler](optimizer), set()
            for _ in range(8):
                if not cycle:
                    optimizer.param_groups[0][key] = kept
                problem.train(optimizer, 1, [schedule])
                seen.add(optimizer.param_groups[0][key])
            self.assertGreater(len(seen), 3)
            self.assertEqual(optimizer.defaults[key], kept)
            ends.append(problem.values()[0])
        self.assertFalse(torch.equal(*ends))

    @every
    def test_tensor_lr(self, device, dtype, optim_info):
        for kwargs in inputs(optim_info, device):
            kwargs.pop("lr", None)
            if optim_info.gap is not None:
                kwargs.setdefault(optim_info.gap, 10)  # new bases enlarge rounding
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, lr=0.01, **kwargs)
            problem.train(optimizer, 4)
            for lr in (torch.tensor(0.01), torch.tensor([0.01])):
                twin = Problem(device, dtype)
                theirs = optim_info.optim_cls(twin.params, lr=lr, **kwargs)
                twin.train(theirs, 4)
                self.assertEqual(problem.values(), twin.values())
                self.assertEqual(tensors(optimizer), tensors(theirs))
                self.assertIs(theirs.param_groups[0]["lr"], lr)
                self.assertEqual(float(lr), 0.01)
                lr.fill_(0.0)  # never cached
                before = twin.values()[0]
                twin.train(theirs, 1)
                self.assertEqual(before, twin.values()[0], rtol=0, atol=0)

    # Flags --------------------------------------------------------------------------------------

    def check_flag(self, info, kwargs, where, near=None, **flags):
        """Weights and state with and without flags: matrices bit for bit, the rest nearly."""
        near = near or {}
        ran = []
        for extra in ({}, flags):
            problems = [Problem(*place, seed=i) for i, place in enumerate(where)]
            params = [p for problem in problems for p in problem.params]
            optimizer = info.optim_cls(params, **{**kwargs, **extra})
            draw = torch.Generator().manual_seed(0)
            for _ in range(4):
                for p in params:  # not from a loss, which would mix the parameters
                    p.grad = torch.randn(p.shape, generator=draw).to(p)
                optimizer.step()
            ran.append((params, tensors(optimizer)))
        (params, state), (twins, other) = ran
        self.assertEqual(state, other, **near)
        for p, q in zip(params, twins, strict=True):
            self.assertEqual(p, q, **near)
            self.assertTrue(p.ndim < 2 or torch.equal(p, q))

    @every
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        for kwargs in filter(has_float_lrs, inputs(optim_info, device)):
            self.check_flag(optim_info, {**kwargs, "foreach": False}, [(device,)], foreach=True)

    @every
    def test_mixed_device_dtype(self, device, dtype, optim_info):
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        where = [("cpu", torch.float32), *((device, dtype) for dtype in dtypes)]
        near = {"rtol": 1e-2, "atol": 1e-3}  # lists round low precision elsewhere than a loop
        for kwargs in filter(has_float_lrs, inputs(optim_info, device)):
            off = {**kwargs, "foreach": False}
            self.check_flag(optim_info, off, where, near, foreach=True)

    @every
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        before = torch.get_default_dtype()
        self.addCleanup(torch.set_default_dtype, before)
        for default in (torch.float64, torch.float32):
            torch.set_default_dtype(default)
            for kwargs in filter(has_float_lrs, inputs(optim_info, device)):
                self.check_flag(optim_info, {**kwargs, "foreach": False}, [(device,)], foreach=True)

    @every
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        for kwargs in inputs(optim_info, device):
            off = {**kwargs, "fused": False, "foreach": False}
            self.check_flag(optim_info, off, [(device,)], fused=True)

    @every
    def test_fused_cpu_matches_cuda(self, device, dtype, optim_info):
        needs_cuda(self, device)
        for kwargs in inputs(optim_info, device):
            ends = []
            for place in ("cpu", device):
                problem = Problem(place, dtype)
                groups = [{"params": problem.params, "rule": "adamw"}]
                problem.train(optim_info.optim_cls(groups, fused=True, **kwargs), 4)
                ends.append(problem.values())
            self.assertEqual(*ends, exact_device=False)

    @every
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        p = Parameter(torch.empty(3, device="meta"))
        p.grad = torch.empty_like(p)
        optimizer = optim_info.optim_cls([p], fused=True)
        text = "`fused=True` requires all the params to be floating point Tensors of supported"
        with self.assertRaisesRegex(RuntimeError, text):
            optimizer.step()

    @every
    def test_peak_memory_foreach(self, device, dtype, optim_info):
        """Lists cost one more list at most, a loop what its largest parameter needs.

        Small gradients are joined for the look at them, which costs a list as well.
        """
        count, size = 20, 4000
        peaks = {}
        for foreach, nonfinite in ((True, "ignore"), (False, "ignore"), (False, "skip")):
            params = [matrix(size, device=device) for _ in range(count)]
            optimizer = optim_info.optim_cls(params, foreach=foreach, nonfinite=nonfinite)
            optimizer.step()
            counter = count_step(optimizer)
            peaks[foreach, nonfinite] = counter.peak / (4 * size)
        self.assertLess(peaks[False, "ignore"], 4)
        self.assertLess(peaks[True, "ignore"], count + 4)
        self.assertLess(peaks[False, "skip"], count + 4)

    @every
    def test_capturable_matches_not_capturable(self, device, dtype, optim_info):
        """For AdamW's parameters; for matrices see test_capture.py."""
        optimizer = optim_info.optim_cls([matrix(device=device)])
        with self.assertRaisesRegex(ValueError, "capturable=True is not supported"):
            optimizer.add_param_group(
                {"params": [matrix(device=device)], "capturable": True, "nonfinite": "raise"}
            )
        self.assertEqual(len(optimizer.param_groups), 1)
        needs_cuda(self, device)
        for kwargs in inputs(optim_info, device):
            ends = []
            for capturable in (True, False):
                problem = Problem(device, dtype)
                groups = [{"params": problem.params, "rule": "adamw", "capturable": capturable}]
                problem.train(optim_info.optim_cls(groups, **kwargs), 4)
                ends.append(problem.values())
            self.assertEqual(*ends)

    # Groups -------------------------------------------------------------------------------------

    def two_groups(self, info, device, kwargs, **second):
        """Both weights after one step; the second group has values of its own."""
        problems = [Problem(device, seed=seed) for seed in (0, 1)]
        groups = [{"params": [problem.weight]} for problem in problems]
        groups[1].update(second)
        optimizer = info.optim_cls(groups, **kwargs)
        before = problems[1].values()[0]
        for _ in range(1 + (info.optim_cls is SOAP)):  # its first gradient moves nothing
            for problem in problems:
                problem.backward()
            optimizer.step()
        return problems[0].values()[0], before, problems[1].values()[0]

    @every
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        default = signature(optim_info.optim_cls).parameters["lr"].default
        for kwargs in flagged(optim_info, device):
            lr = float(kwargs.get("lr", default))
            first, start, plain = self.two_groups(optim_info, device, kwargs, weight_decay=0.0)
            other, _, decayed = self.two_groups(optim_info, device, kwargs, weight_decay=0.5)
            self.assertTrue(torch.equal(first, other))
            # the published order decays the new weight: alike to first order in lr
            self.assertEqual(plain - decayed, lr * 0.5 * start, rtol=0, atol=lr * lr + 1e-6)

    @every
    def test_param_groups_lr(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            first, start, still = self.two_groups(optim_info, device, kwargs, lr=0.0)
            other, _, moved = self.two_groups(optim_info, device, kwargs, lr=0.01)
            again, _, further = self.two_groups(optim_info, device, kwargs, lr=0.02)
            self.assertTrue(torch.equal(first, other) and torch.equal(first, again))
            self.assertTrue(torch.equal(start, still))
            self.assertEqual(2 * (moved - start), further - start, rtol=1e-3, atol=1e-4)

    # Nothing to do ------------------------------------------------------------------------------

    @every
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            before = problem.values()
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            optimizer.step()
            self.assertTrue(same(before, problem.values()) and not optimizer.state)
            problem.train(optimizer, 2)
            before, state = problem.values(), tensors(optimizer)
            optimizer.zero_grad()
            optimizer.step()
            self.assertTrue(same(before, problem.values()))
            self.assertTrue(same(state, tensors(optimizer)))

    @every
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        """But for the decay, which acts all the same."""
        for kwargs in flagged(optim_info, device):
            for decay in (0.0, 0.2):
                settings = {**kwargs, "weight_decay": decay, "adamw_weight_decay": decay}
                problem = Problem(device, dtype)
                optimizer = optim_info.optim_cls(problem.params, **settings)
                before = problem.values()
                flat = [p for group in optimizer.param_groups for p in group["params"]]
                rows = optimizer.assignment().rows
                rates = {id(p): row.lr for p, row in zip(flat, rows, strict=True)}
                for p in problem.params:
                    p.grad = torch.zeros_like(p)
                optimizer.step()
                for p, old in zip(problem.params, before, strict=True):
                    self.assertEqual(p.detach(), old * (1 - rates[id(p)] * decay))
                    self.assertTrue(decay or torch.equal(p, old))

    @every
    def test_step_is_noop_for_empty_grads(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            empty = [matrix(*shape, device=device) for shape in ((0,), (0, 3), (4, 0), (2, 0, 3))]
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls([*empty, *problem.params], **kwargs)
            self.check_direction(kwargs, problem.train(optimizer, 6), problem)
            self.assertEqual([p.numel() for p in empty], [0] * 4)
            optimizer.load_state_dict(saved_and_read(optimizer))
            problem.train(optimizer, 1)

    @every
    def test_dry_step_leaves_no_trace(self, device, dtype, optim_info):
        """A probe (lr 0, gradients 0) makes the state and freezes no degenerate basis in it."""
        for kwargs in flagged(optim_info, device):
            ends = []
            for probe in (True, False):
                problem = Problem(device, dtype)
                optimizer = optim_info.optim_cls([problem.weight], **deepcopy(kwargs))
                if probe:
                    lr = optimizer.param_groups[0]["lr"]
                    optimizer.param_groups[0]["lr"] = 0.0
                    problem.weight.grad = torch.zeros_like(problem.weight)
                    before = problem.values()
                    optimizer.step()
                    optimizer.param_groups[0]["lr"] = lr
                    self.assertTrue(same(before, problem.values()))
                    self.assertEqual(optimizer.state[problem.weight]["step"], 0)
                problem.train(optimizer, 3)
                ends.append((problem.values(), tensors(optimizer)))
            self.assertTrue(same(*ends))

    @every
    def test_grads_are_never_inplaced_into(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            for _ in range(4):
                problem.backward()
                grads = [(p.grad, p.grad._version, p.grad.clone()) for p in problem.params]
                optimizer.step()
                for p, (grad, version, value) in zip(problem.params, grads, strict=True):
                    self.assertTrue(p.grad is grad and grad._version == version)
                    self.assertTrue(torch.equal(grad, value))

    # Shapes -------------------------------------------------------------------------------------

    @every
    def test_three_dimensional_and_empty_params(self, device, dtype, optim_info):
        shapes = [(3, 4, 5), (6, 2, 3, 3), (1, 7), (7, 1), (1, 1), (5,), (), (0, 4), (0,)]
        for kwargs in flagged(optim_info, device):
            params = [matrix(*s, device=device) if s else None for s in shapes]
            params[6] = Parameter(torch.ones((), device=device))
            optimizer = optim_info.optim_cls(params, **kwargs)
            for step in range(3):
                for p in params:
                    draw = torch.Generator().manual_seed(step)
                    p.grad = torch.randn(p.shape, generator=draw).to(device)
                optimizer.step()
            for p in params:
                self.assertTrue(p.isfinite().all())
                self.assertTrue(p.numel() == 0 or not torch.equal(p, torch.ones_like(p)))
            optimizer.load_state_dict(saved_and_read(optimizer))
            optimizer.step()

    # State --------------------------------------------------------------------------------------

    @every
    def test_non_empty_state(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            self.assertEqual(len(optimizer.state), 0)
            problem.train(optimizer, 1)
            for p in problem.params:
                momentum = optimizer.param_groups[0].get("momentum")
                if optim_info.optim_cls in STATELESS and momentum == 0 and p.dim() > 1:
                    self.assertEqual(optimizer.state[p], {"step": 1})  # a clock is all it has
                    continue
                values = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
                self.assertTrue(values and any(bool(v.any()) for v in values))
            self.assertEqual(set(optimizer.state), set(problem.params))

    @every
    def test_second_step_state_growth(self, device, dtype, optim_info):
        """All state is there after one step, refreshes included."""
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            sizes = []
            for _ in range(5):
                problem.train(optimizer, 1)
                sizes.append(
                    {
                        key: (v.shape, v.dtype, v.untyped_storage().nbytes())
                        for key, v in tensors(optimizer).items()
                        if isinstance(v, torch.Tensor)
                    }
                )
            self.assertTrue(all(size == sizes[0] for size in sizes))

    @every
    def test_step_iteration(self, device, dtype, optim_info):
        """Clocks count the gradients that a parameter got, also after a load."""
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            for count in range(1, 6):
                problem.backward()
                if count > 3:
                    problem.bias.grad = None
                optimizer.step()
                if count == 2:
                    optimizer.load_state_dict(saved_and_read(optimizer))
                clocks = [int(optimizer.state[p]["step"]) for p in problem.params]
                self.assertEqual(clocks, [count, min(count, 3)])

    @every
    def test_state_is_free_of_objects(self, device, dtype, optim_info):
        """Tensors and numbers, one flat dict per parameter; integers stay integers."""
        for kwargs in flagged(optim_info, device):
            for weights in (torch.float32, torch.bfloat16):
                problem = Problem(device, weights)
                optimizer = optim_info.optim_cls(problem.params, **kwargs)
                problem.train(optimizer, 3)
                for entry in optimizer.state_dict()["state"].values():
                    self.assertTrue(all(type(key) is str for key in entry))
                    kinds = {type(value) for value in entry.values()}
                    self.assertLessEqual(kinds, {torch.Tensor, int})
                self.assertIs(type(optimizer.state[problem.weight]["step"]), int)
                fresh = optim_info.optim_cls(Problem(device, weights).params, **kwargs)
                fresh.load_state_dict(saved_and_read(optimizer))
                self.assertTrue(same(tensors(optimizer), tensors(fresh)))
                for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
                    self.assertEqual(list(map(type, a.values())), [type(b[key]) for key in a])

    # Checkpoints --------------------------------------------------------------------------------

    @every
    @both_layouts
    def test_state_dict_deterministic(self, device, dtype, optim_info, contiguous):
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype, contiguous)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            problem.train(optimizer, 3)
            twin = Problem(device, dtype, contiguous)
            twin.copy_weights(problem)
            fresh = optim_info.optim_cls(twin.params, **deepcopy(kwargs))
            fresh.load_state_dict(deepcopy(optimizer.state_dict()))
            self.assertTrue(same(optimizer.state_dict(), fresh.state_dict()))
            problem.train(optimizer, 3)
            twin.train(fresh, 3)
            self.assertTrue(same(problem.values(), twin.values()))
            self.assertTrue(same(tensors(optimizer), tensors(fresh)))

    @every
    def test_resume_across_a_refresh(self, device, dtype, optim_info):
        if optim_info.gap is None:
            self.skipTest("the method never refreshes anything")
        for kwargs in inputs(optim_info, device):
            kwargs[optim_info.gap] = 3
            for stop in (2, 3, 4):  # before a refresh, as it is due, after it
                straight, first, second = (Problem(device, dtype) for _ in range(3))
                straight.train(optim_info.optim_cls(straight.params, **deepcopy(kwargs)), 7)
                optimizer = optim_info.optim_cls(first.params, **deepcopy(kwargs))
                first.train(optimizer, stop)
                second.copy_weights(first)
                resumed = optim_info.optim_cls(second.params, **deepcopy(kwargs))
                resumed.load_state_dict(saved_and_read(optimizer))
                second.train(resumed, 7 - stop)
                self.assertTrue(same(straight.values(), second.values()))
                # counted from 0 or from 1, as the method has it
                offset = RULE_CLASSES[optim_info.optim_cls.__name__].refresh_offset
                last = max(t for t in range(1, 8) if (t - 1 + offset) % 3 == 0)
                self.assertEqual(resumed.state[second.weight]["refreshed"], last)

    @every
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for kwargs in inputs(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            problem.train(optimizer, 2)
            for flag in optim_info.not_og_supported_flags:
                older = deepcopy(optimizer.state_dict())
                for group in older["param_groups"]:
                    del group[flag]
                fresh = optim_info.optim_cls(problem.params, **kwargs)
                fresh.load_state_dict(older)
                self.assertEqual(fresh.param_groups[0][flag], optimizer.param_groups[0][flag])
                problem.train(fresh, 1)

    @every
    @parametrize("saves_names", [True, False])
    @parametrize("loads_names", [True, False])
    def test_can_load_from_to_named_state_dict(
        self, device, dtype, optim_info, saves_names, loads_names
    ):
        for kwargs in inputs(optim_info, device):
            problem, twin = Problem(device, dtype), Problem(device, dtype)
            given = problem.named if saves_names else problem.params
            optimizer = optim_info.optim_cls(given, **kwargs)
            problem.train(optimizer, 2)
            given = twin.named if loads_names else twin.params
            fresh = optim_info.optim_cls(given, **deepcopy(kwargs))
            if len(fresh.param_groups) > len(optimizer.param_groups):
                # SymmetryStack: names give it a group for each role
                with self.assertRaisesRegex(ValueError, "different number of parameter groups"):
                    fresh.load_state_dict(deepcopy(optimizer.state_dict()))
                continue
            fresh.load_state_dict(deepcopy(optimizer.state_dict()))
            for group in fresh.param_groups:
                self.assertEqual("param_names" in group, saves_names or loads_names)
            twin.copy_weights(problem)
            problem.train(optimizer, 2)
            twin.train(fresh, 2)
            self.assertTrue(same(problem.values(), twin.values()))

    @every
    def test_names_that_route_refuse_a_checkpoint_without_them(self, device, dtype, optim_info):
        """State of a matrix must not end up under a name that goes to AdamW."""
        if optim_info.name == "SymmetryStack":
            self.skipTest("its groups name their rule, and a checkpoint brings it along")
        p, q = matrix(20, 8, device=device), matrix(20, 8, device=device)
        optimizer = optim_info.optim_cls([p])
        optimizer.step()
        fresh = optim_info.optim_cls([("embed_tokens.weight", q)])
        with self.assertRaisesRegex(ValueError, "embed_tokens.weight"):
            fresh.load_state_dict(deepcopy(optimizer.state_dict()))

    @every
    def test_named_parameters_in_state_dict(self, device, dtype, optim_info):
        for kwargs in inputs(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.named, **kwargs)
            problem.train(optimizer, 1)
            saved = optimizer.state_dict()
            names = [name for group in saved["param_groups"] for name in group["param_names"]]
            self.assertEqual(names, ["weight", "bias"])
            self.assertEqual({row.name for row in optimizer.assignment()}, {"weight", "bias"})
            optimizer.add_param_group({"params": [matrix(device=device)]})
            self.assertEqual(optimizer.param_groups[-1]["param_names"], ["parameter_2"])
            unnamed = optim_info.optim_cls(problem.params, **kwargs)
            with self.assertRaisesRegex(ValueError, "all optimizer param groups should be with/"):
                unnamed.add_param_group({"params": [("late", matrix(device=device))]})
            self.assertNotIn("param_names", unnamed.state_dict()["param_groups"][0])

    @every
    def test_names_of_some_params_only(self, device, dtype, optim_info):
        for kwargs in inputs(optim_info, device):
            if "adamw_lr" in kwargs:
                continue  # the next test
            problem = Problem(device, dtype)
            with self.assertRaisesRegex(ValueError, "Some param names are missing"):
                optim_info.optim_cls([problem.named[0], problem.bias], **kwargs)

    @every
    def test_names_of_some_params_only_where_a_group_is_split(self, device, dtype, optim_info):
        problem = Problem(device, dtype)
        with self.assertRaisesRegex(ValueError, "Some param names are missing"):
            optim_info.optim_cls([problem.named[0], problem.bias], adamw_lr=0.01)

    @every
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.named, **kwargs)
            problem.train(optimizer, 3)
            self.assertTrue(same(saved_and_read(optimizer), optimizer.state_dict()))

    @every
    def test_load_nontensor_step(self, device, dtype, optim_info):
        """Clocks may be numbers or tensors in a checkpoint, whichever this optimizer keeps."""
        for kwargs in flagged(optim_info, device):
            for kind in (int, float, lambda step: torch.tensor(float(step))):
                problem, twin = Problem(device, dtype), Problem(device, dtype)
                optimizer = optim_info.optim_cls(problem.params, **kwargs)
                problem.train(optimizer, 3)
                saved = deepcopy(optimizer.state_dict())
                for entry in saved["state"].values():
                    entry["step"] = kind(entry["step"])
                twin.copy_weights(problem)
                fresh = optim_info.optim_cls(twin.params, **deepcopy(kwargs))
                fresh.load_state_dict(saved)
                self.assertTrue(same(tensors(optimizer), tensors(fresh)))
                problem.train(optimizer, 2)
                twin.train(fresh, 2)
                self.assertTrue(same(problem.values(), twin.values()))

    @every
    def test_load_nontensor_step_to_its_device(self, device, dtype, optim_info):
        """Where AdamW runs on the device alone, so does its clock."""
        p = Parameter(torch.empty(3, device="meta"))
        optimizer = optim_info.optim_cls([{"params": [p], "rule": "adamw", "capturable": True}])
        optimizer.init_state()
        self.assertEqual(optimizer.state[p]["step"].device, p.device)
        saved = optimizer.state_dict()
        saved = {**saved, "state": {0: {**saved["state"][0], "step": 3}}}
        optimizer.load_state_dict(saved)
        self.assertEqual(optimizer.state[p]["step"].device, p.device)

    def check_moved(self, info, source, target):
        """State goes to the place of the parameters that load it, and training goes on."""
        for kwargs in inputs(info, source):
            problem, twin = Problem(source), Problem(target)
            optimizer = info.optim_cls(problem.params, **kwargs)
            problem.train(optimizer, 2)
            twin.copy_weights(problem)
            fresh = info.optim_cls(twin.params, **deepcopy(kwargs))
            fresh.load_state_dict(deepcopy(optimizer.state_dict()))
            for p in twin.params:
                moved = [v for k, v in fresh.state[p].items() if k != "step"]
                moved = [v for v in moved if isinstance(v, torch.Tensor)]
                self.assertTrue(all(v.device == p.device for v in moved))
            problem.train(optimizer, 2)
            twin.train(fresh, 2)
            self.assertEqual(problem.values(), twin.values(), exact_device=False)

    @every
    def test_state_dict_with_cuda_params(self, device, dtype, optim_info):
        needs_cuda(self, device)
        self.check_moved(optim_info, "cpu", device)

    @every
    def test_cpu_load_state_dict(self, device, dtype, optim_info):
        needs_cuda(self, device)
        self.check_moved(optim_info, device, "cpu")

    @every
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(optimizer):
            return {key for key in vars(optimizer) if not key.startswith("_")}

        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            for _ in range(2):
                twin = deepcopy(optimizer)
                self.assertEqual(public(twin), public(optimizer))
                self.assertTrue(same(tensors(twin), tensors(optimizer)))
                self.assertEqual(repr(twin), repr(optimizer))
                problem.train(optimizer, 2)

    # Hooks --------------------------------------------------------------------------------------

    @every
    def test_step_post_hook(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem, seen = Problem(device, dtype), []
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            before = problem.values()

            def hook(given, args, kwargs, seen=seen, before=before, problem=problem):
                seen.append((given, args, kwargs, same(before, problem.values())))

            handle = optimizer.register_step_post_hook(hook)
            closure = problem.backward
            optimizer.step(closure)
            self.assertEqual(seen, [(optimizer, (optimizer, closure), {}, False)])
            handle.remove()
            optimizer.step(closure=closure)
            self.assertEqual(len(seen), 1)

    @every
    def test_step_pre_hook(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem, seen = Problem(device, dtype), []
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            before = problem.values()

            def hook(given, args, kwargs, seen=seen, before=before, problem=problem):
                seen.append((given, same(before, problem.values())))
                return (given, problem.backward), {}

            handle = optimizer.register_step_pre_hook(hook)
            loss = optimizer.step(lambda: 0.0)
            self.assertEqual(seen, [(optimizer, True)])
            self.assertGreater(loss.item(), 0.0)  # the closure that the hook put there
            handle.remove()
            self.assertEqual(optimizer.step(lambda: 0.0), 0.0)
            self.assertEqual(len(seen), 1)

    @every
    def test_step_all_hooks(self, device, dtype, optim_info):
        """Global before own ones, then the step, then own before global ones."""
        for kwargs in flagged(optim_info, device):
            problem, seen = Problem(device, dtype), []

            def noted(name, seen=seen):
                return lambda *_: seen.append(name)

            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            with contextlib.ExitStack() as stack:
                for register, name in (
                    (register_optimizer_step_pre_hook, "global pre"),
                    (register_optimizer_step_post_hook, "global post"),
                    (optimizer.register_step_pre_hook, "pre"),
                    (optimizer.register_step_post_hook, "post"),
                ):
                    stack.callback(register(noted(name)).remove)
                optimizer.step(lambda: seen.append("step"))  # noqa: B023 (called at once)
            self.assertEqual(seen, ["global pre", "pre", "step", "post", "global post"])
            optimizer.step()
            self.assertEqual(len(seen), 5)

    def with_lr(self, lr):
        """A hook of state_dict or load_state_dict that writes a learning rate."""

        def hook(optimizer, state_dict):
            state_dict["param_groups"][0]["lr"] = lr

        return hook

    @every
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            optimizer = optim_info.optim_cls(Problem(device, dtype).params, **kwargs)
            optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(lr=0.5))
            self.assertEqual(optimizer.state_dict()["param_groups"][0]["lr"], 0.5)

    @every
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            optimizer = optim_info.optim_cls(Problem(device, dtype).params, **kwargs)
            before = optimizer.param_groups[0]["lr"]
            handle = optimizer.register_state_dict_post_hook(self.with_lr(0.5))
            self.assertEqual(optimizer.state_dict()["param_groups"][0]["lr"], 0.5)
            self.assertIs(optimizer.param_groups[0]["lr"], before)
            handle.remove()
            optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "more": 1})
            self.assertEqual(optimizer.state_dict()["more"], 1)

    @every
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            optimizer = optim_info.optim_cls(Problem(device, dtype).params, **kwargs)
            seen = []
            for name, prepend in (("second", False), ("third", False), ("first", True)):
                optimizer.register_state_dict_pre_hook(
                    lambda o, name=name, seen=seen: seen.append(name), prepend=prepend
                )
                optimizer.register_state_dict_post_hook(
                    lambda o, s, name=name, seen=seen: seen.append(f"{name} post"), prepend=prepend
                )
            optimizer.state_dict()
            order = ["first", "second", "third"]
            self.assertEqual(seen, [*order, *(f"{name} post" for name in order)])

    @every
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            optimizer = optim_info.optim_cls(Problem(device, dtype).params, **kwargs)
            saved = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(self.with_lr(0.25))
            handle = optimizer.register_load_state_dict_pre_hook(self.with_lr(0.5), prepend=True)
            optimizer.load_state_dict(deepcopy(saved))
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.25)
            handle.remove()
            optimizer.register_load_state_dict_pre_hook(
                lambda o, s: {**s, "param_groups": [{**g, "lr": 0.75} for g in s["param_groups"]]}
            )
            optimizer.load_state_dict(deepcopy(saved))
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.75)

    @every
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            problem.train(optimizer, 1)
            seen = []

            def hook(given, seen=seen):
                given.param_groups[0]["lr"] = 0.5
                seen.append(tensors(given))

            optimizer.register_load_state_dict_post_hook(hook)
            optimizer.load_state_dict(saved_and_read(optimizer))
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.5)
            self.assertTrue(same(seen, [tensors(optimizer)]))

    @every
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for kwargs in flagged(optim_info, device):
            optimizer = optim_info.optim_cls(Problem(device, dtype).params, **kwargs)
            seen = []
            optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append("post"))
            optimizer.register_load_state_dict_post_hook(
                lambda o, seen=seen: seen.append("first post"), prepend=True
            )
            optimizer.register_load_state_dict_pre_hook(lambda o, s, seen=seen: seen.append("pre"))
            optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
            self.assertEqual(seen, ["pre", "first post", "post"])

    # Scaled gradients, memory -------------------------------------------------------------------

    def scaled(self, info, device, kwargs, scaler, bad_at=None):
        """Four steps under autocast; returns what a step with an infinite gradient changed."""
        problem, kind = Problem(device), torch.device(device).type
        optimizer = info.optim_cls(problem.params, **deepcopy(kwargs))
        self.assertFalse(hasattr(optimizer, "_step_supports_amp_scaling"))
        unchanged = None
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast(kind, torch.bfloat16):
                loss = problem.loss()
            scaler.scale(loss).backward()
            before = problem.values(), tensors(optimizer)
            if step == bad_at:
                problem.weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if step == bad_at:
                unchanged = same(before, (problem.values(), tensors(optimizer)))
        return problem.values(), tensors(optimizer), unchanged

    @every
    def test_grad_scaling_autocast_fused_optimizers(self, device, dtype, optim_info):
        """Scaled equals unscaled; a step with an infinite gradient leaves no trace at all."""
        kind = torch.device(device).type
        for kwargs in flagged(optim_info, device):
            off = torch.amp.GradScaler(kind, enabled=False)
            on = torch.amp.GradScaler(kind, init_scale=8.0)
            plain = self.scaled(optim_info, device, kwargs, off)
            self.assertTrue(same(plain, self.scaled(optim_info, device, kwargs, on)))
            for bad_at in (0, 2):
                scaler = torch.amp.GradScaler(kind, init_scale=8.0)
                W, state, unchanged = self.scaled(optim_info, device, kwargs, scaler, bad_at)
                self.assertTrue(unchanged)
                self.assertEqual(scaler.get_scale(), 4.0)
                self.assertEqual({int(v) for k, v in state.items() if k[1] == "step"}, {3})
                self.assertTrue(all(w.isfinite().all() for w in W))

    @every
    def test_no_reference_cycles(self, device, dtype, optim_info):
        """State goes with the optimizer at once, without the garbage collector."""
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for kwargs in flagged(optim_info, device):
            problem = Problem(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **kwargs)
            problem.train(optimizer, 3)
            optimizer.load_state_dict(saved_and_read(optimizer))
            problem.train(optimizer, 1)
            kept = [v for e in optimizer.state.values() for v in e.values()]
            kept = [weakref.ref(v) for v in kept if isinstance(v, torch.Tensor)]
            whole = weakref.ref(optimizer)
            del optimizer
            self.assertTrue(whole() is None and all(ref() is None for ref in kept))
            weights = [weakref.ref(p) for p in problem.params]
            del problem
            self.assertTrue(all(ref() is None for ref in weights))


DEFINED = {name for name in vars(TestOptimizers) if name.startswith("test_")}
instantiate_device_type_tests(TestOptimizers, globals(), only_for=("cpu", "cuda"))
