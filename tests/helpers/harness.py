"""Our optimizers as entries of torch's own test harness, and what of torch's list is covered.

A new optimizer is one more ``entry`` in ``INFOS``; every test of ``test_torch_harness.py`` then
runs on it.
"""

from copy import deepcopy

import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from stiefel.kernels import POLAR_METHODS
from stiefel.optimizers import (
    APOLLO,
    ARO,
    FRUGAL,
    SOAP,
    AuON,
    DCTAdamW,
    Fira,
    GaLore,
    Hybrid,
    Muon,
    Muown,
    RowNorm,
    SinkGD,
    SOAPMuon,
    Spectral,
    SymmetryStack,
    Trion,
)

SHARED = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "Tensor lr": {"lr": torch.tensor(0.001)},
    "no weight_decay": {"weight_decay": 0.0},
    "weight_decay": {"weight_decay": 0.25},
    "maximize": {"maximize": True},
    "maximize, weight_decay": {"maximize": True, "weight_decay": 0.25},
    "lr of AdamW": {"adamw_lr": 0.003},
    "AdamW's own settings": {
        "adamw_betas": (0.8, 0.9),
        "adamw_eps": 1e-6,
        "adamw_weight_decay": 0.05,
    },
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "raise": {"nonfinite": "raise"},
    "view": {"view": "transposed"},
}
"""Inputs that every optimizer has; flags of which only one can be on are left to the tests."""

FLAGS = ("foreach", "fused", "capturable", "maximize", "differentiable")
"""Group keys that a checkpoint of an older release may lack."""


def matrix(*shape, dtype=torch.float32, device="cpu", grad=None):
    """A parameter of ones with a gradient, for what is to be refused."""
    p = torch.nn.Parameter(torch.ones(shape or (2, 3), dtype=dtype, device=device))
    p.grad = torch.ones_like(p) if grad is None else grad
    return p


def refused(desc, regex, error=ValueError, *, params=None, on_step=False, **kwargs):
    """One input that raises: at construction, or in a step."""
    when = OptimizerErrorEnum
    return ErrorOptimizerInput(
        OptimizerInput(params=[matrix()] if params is None else params, kwargs=kwargs, desc=desc),
        error_on=when.STEP_ERROR if on_step else when.CONSTRUCTION_ERROR,
        error_type=error,
        error_regex=regex,
    )


def shared_errors(name, says):
    """What every optimizer of ours refuses, beside what torch's harness demands of all."""
    unsure, sparse = matrix(), matrix(2, 2)
    unsure.grad[0, 0] = float("nan")
    sparse.grad = torch.eye(2).to_sparse()
    vector = matrix(3)
    return [
        refused("lr below 0", "Invalid learning rate: -1.0", lr=-1.0),
        refused("lr is no number", "Invalid learning rate: nan", lr=float("nan")),
        refused("AdamW's lr of two elements", "must be 1-element", adamw_lr=torch.ones(2)),
        refused("decay below 0", "Invalid weight_decay value: -0.1", weight_decay=-0.1),
        refused("AdamW's decay", "Invalid adamw_weight_decay", adamw_weight_decay=-0.1),
        refused("AdamW's eps", "Invalid adamw_eps value: -1", adamw_eps=-1),
        refused("AdamW's betas", "Invalid adamw_betas", adamw_betas=(1.0, 0.9)),
        refused("a keyword nobody knows", "did you mean 'maximize'", TypeError, maximise=True),
        refused("two flags at once", "cannot be", RuntimeError, foreach=True, fused=True),
        refused("Tensor lr and foreach", "Tensor is not supported", lr=torch.tensor(0.1),
                foreach=True),
        refused("differentiable", "differentiable=True is not supported", differentiable=True),
        refused("capturable matrices", "capturable=True is not supported", capturable=True,
                nonfinite="raise"),
        refused("nonfinite", "nonfinite must be 'skip', 'skip_step',", nonfinite="maybe"),
        refused("state of integers", "state_dtype must be None,", state_dtype="int32"),
        refused("a view nobody knows", "unknown", view="sideways"),
        refused("a view that does not fit", "must divide", view="heads:3"),
        refused("a complex matrix", f"{says} does not support complex", RuntimeError,
                params=[matrix(dtype=torch.complex64)]),
        refused("a vector in a matrix group", "needs matrices",
                params=[{"params": [vector], "rule": name}]),
        refused("a misspelt key", "parameter group key 'weigth_decay' is unknown",
                params=[{"params": [matrix()], "weigth_decay": 0.9}]),
        refused("a sparse gradient", f"{name} does not support sparse", RuntimeError,
                params=[sparse], on_step=True),
        refused("a NaN", "non-finite gradient of parameter 0", RuntimeError, params=[unsure],
                on_step=True, nonfinite="raise"),
    ]  # fmt: skip


def entry(cls, inputs, errors, gap=None, says=None):
    """An optimizer of ours for torch's harness.

    Args:
        cls: The class.
        inputs: Description -> constructor arguments, without foreach, fused and differentiable.
        errors: Inputs of its own that raise.
        gap: Name of the setting that says how many updates lie between two refreshes.
        says: The method that refuses a complex matrix, where it is not the class's own.
    """

    def inputs_func(device, dtype=None):
        # copies, as a scheduler writes into a tensor lr
        cases = {**SHARED, **inputs}
        return [OptimizerInput(None, deepcopy(kwargs), desc) for desc, kwargs in cases.items()]

    def errors_func(device, dtype):
        of_all = get_error_inputs_for_all_optims(device, dtype)
        return [*of_all, *shared_errors(cls.__name__, says or cls.__name__), *errors]

    info = OptimizerInfo(
        cls,
        optim_inputs_func=inputs_func,
        optim_error_inputs_func=errors_func,
        scheduler_inputs=([lambda o: StepLR(o, step_size=3, gamma=0.9), ReduceLROnPlateau],),
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cpu", "cuda"),
        not_og_supported_flags=FLAGS,
        has_capturable_arg=True,
        supports_complex=False,
        supports_sparse=False,
    )
    info.gap = gap
    return info


INFOS = [
    entry(
        APOLLO,
        {
            "rank, refreshes": {"rank": 2, "update_proj_gap": 2},
            "betas, eps": {"betas": (0.8, 0.95), "eps": 1e-6, "rank": 3},
            "reverse_std": {"rank": 2, "proj_type": "reverse_std"},
            "Mini": {"rank": 1, "scaling": "tensor", "projection": "gaussian", "scale": "auto"},
            "no limiter": {"rank": 2, "limiter": False, "moments": "reset", "update_proj_gap": 2},
            "limiter's settings": {"rank": 2, "gamma": 1.1, "limiter_floor": 1e-6},
            "svd": {"rank": 2, "projection": "svd", "scale": 0.25, "scale_front": True},
            # without bounds a column may move by more than tests to first order in lr allow
            "as published": {"rank": 2, "compat": "reference", "update_proj_gap": 3, "lr": 1e-4},
        },
        [
            refused("beta 1", "Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9)),
            refused("eps", "Invalid epsilon value: -1", eps=-1),
            refused("rank", "rank", rank=0),
            refused("gap", "update_proj_gap must be", update_proj_gap=0),
            refused("scaling", "scaling must be one of", scaling="row"),
            refused("scale", "scale must be 'auto' or", scale="full"),
            refused("rotation", "use moments='keep' or 'reset'", projection="gaussian",
                    moments="rotate"),
        ],
        gap="update_proj_gap",
    ),
    entry(
        Muown,
        {"published scale": {"adjust_lr_fn": "none", "weight_decay": 0.1}},
        [
            refused("beta 1", "Invalid norm_betas parameter at index 0", norm_betas=(1.0, 0.9)),
            refused("momentum", "momentum must be in", momentum=1.0),
            refused("polar", "polar must be one of", polar="low_rank"),
        ],
    ),
    entry(
        SinkGD,
        {
            "momentum": {"momentum": 0.8},
            "one round": {"iterations": 1},
        },
        [
            refused("momentum", "momentum must be in", momentum=1.0),
            refused("iterations", "iterations must be an int", iterations=0),
        ],
    ),
    entry(
        SOAP,
        {
            "betas": {"betas": (0.8, 0.9), "shampoo_beta": 0.7},
            "every third": {"precondition_frequency": 3},
            "one side": {"sides": "short", "basis": "eigh"},
            "no longer side": {"max_precond_dim": 6},
            "kl": {"factors": "kl", "moments": "rotate"},
            "no bias correction": {"correct_bias": False},
            "normalized": {"normalize_update": True},
            "as published": {"compat": "reference"},
        },
        [
            refused("betas", "betas must be", betas=(1.0, 0.9)),
            refused("shampoo_beta", "shampoo_beta must be in", shampoo_beta=1.0),
            refused("a frequency of 0", "precondition_frequency must be", precondition_frequency=0),
            refused("sides", "sides must be one of both, short", sides="left"),
            refused("kl of one side", "set sides='both'", sides="short", factors="kl"),
        ],
        gap="precondition_frequency",
    ),
    entry(
        SOAPMuon,
        {
            # whitened steps climb less than decay as large as that of the others takes
            "maximize, weight_decay": {"maximize": True, "weight_decay": 0.05},
            "no momentum": {"momentum": 0.0, "nesterov": False},
            "every third": {"precondition_frequency": 3, "beta2": 0.8},
            "one side": {"sides": "short", "polar": "svd"},
        },
        [
            refused("momentum", "momentum must be in", momentum=1.0),
            refused("a polar method nobody knows", "polar must be one of", polar="low_rank"),
        ],
        gap="precondition_frequency",
    ),
    entry(
        ARO,
        {
            "momentum": {"momentum": 0.8},
            "no momentum": {"momentum": 0.0},
            "nesterov": {"nesterov": True},
            **{f"base {base}": {"base": base} for base in ("row_norm", "sign", "adam")},
            **{f"rotation {name}": {"rotation": name} for name in ("polar", "eigh", "none")},
            "eigenbasis of an average": {"rotation": "eigh", "gram_beta": 0.9, "base": "adam"},
            "a chain of one": {"rotation_sharing": "chain", "side": "rows"},
            "every third": {"rotation_every": 3},
            "columns": {"side": "cols", "init": "svd"},
            "unscaled": {"rms_target": None, "lr": 3e-4},
        },
        [
            refused("momentum", "momentum must be in", momentum=1.0),
            refused("base", "base must be one of", base="polar"),
            refused("rotation", "rotation must be one of", rotation="svd"),
            refused("sharing", "rotation_sharing must be one of", rotation_sharing="layer"),
            refused("every", "rotation_every must be an int", rotation_every=0),
            refused("side", "side must be one of", side="left"),
            refused("layer", "set rotation_sharing='chain'", layer=2),
            refused("rms_target", "rms_target must be positive", rms_target=0.0),
            refused("adjust_lr_fn", "set it to None", adjust_lr_fn="match_rms_adamw"),
        ],
    ),
    entry(
        Muon,
        {
            "momentum": {"momentum": 0.8},
            "no momentum": {"momentum": 0.0, "nesterov": False},
            "no nesterov": {"nesterov": False},
            **{f"polar {method}": {"polar": method} for method in POLAR_METHODS},
            "ns_steps": {"polar": "ns5", "ns_steps": 6},
            "ns_coefficients": {"polar": "ns5", "ns_coefficients": (3.4, -4.7, 2.0)},
            "original": {"adjust_lr_fn": "original"},
            "spectral": {"adjust_lr_fn": "spectral"},
            "as torch's": {"compat": "torch"},
            "low rank": {"polar": "low_rank", "rank": 2, "oversample": 1},
            "low rank, kaczmarz": {"polar": "low_rank", "rank": 0.5, "sketch": "kaczmarz"},
            "sum": {"momentum_kind": "sum"},
            "NorMuon": {"second_moment": "normuon", "beta2": 0.9},
            "AdaMuon": {"second_moment": "adamuon"},
            "limited": {"clip_grad_rms": 1.0, "spike_ratio": 2.0},
            "normalized": {"normalize_grad": True},
            "reports": {"report_steps": 2},
        },
        [
            refused("momentum", "momentum should be >= 0", momentum=-0.1),
            refused("eps", "Invalid epsilon value: -1", eps=-1),
            refused("adjust_lr_fn", "Adjust learning rate function arbitrary is not supported",
                    adjust_lr_fn="arbitrary"),
            refused("polar", "polar must be", polar="qr"),
            refused("ns_steps", "Number of steps must be less than 100", ns_steps=100),
            refused("compat", "compat must be None or 'torch'", compat="reference"),
            refused("rank", "rank must be a positive int", rank=0, polar="low_rank"),
            refused("sketch", "sketch must be one of", sketch="hash"),
            refused("kind", "momentum_kind must be one of", momentum_kind="both"),
            refused("second moment", "second_moment must be one of", second_moment="adam"),
            refused("schedule", "decay_schedule must be one of", decay_schedule="cosine"),
            refused("spike", "spike_ratio must be above 1", spike_ratio=0.5),
            refused("shapes", "exclude each other", num_heads=2, split_sizes=(1, 1)),
        ],
    ),
    entry(
        GaLore,
        {
            "rank, refreshes": {"rank": 2, "update_proj_gap": 2},
            "a fraction": {"rank": 0.5, "update_proj_gap": 3, "scale": 1.0},
            "betas, eps": {"betas": (0.8, 0.95), "eps": 1e-6, "rank": 3},
            "reverse_std": {"rank": 2, "proj_type": "reverse_std"},
            "right": {"rank": 2, "proj_type": "right"},
            "left": {"rank": 2, "proj_type": "left"},
            "full": {"rank": 2, "proj_type": "full", "update_proj_gap": 3},
            "svd_full": {"rank": 2, "projection": "svd_full"},
            "reset moments": {"rank": 2, "moments": "reset", "update_proj_gap": 2},
            "rotated moments": {"rank": 2, "moments": "rotate", "update_proj_gap": 2},
            "as published": {"rank": 2, "compat": "reference", "update_proj_gap": 3},
            "no correction": {"rank": 2, "compat": "reference", "correct_bias": False},
        },
        [
            refused("beta 1", "Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9)),
            refused("beta 2", "Invalid beta parameter at index 1: -0.1", betas=(0.9, -0.1)),
            refused("eps", "Invalid epsilon value: -1", eps=-1),
            refused("rank", "rank", rank=0),
            refused("gap", "update_proj_gap must be", update_proj_gap=0),
            refused("proj_type", "proj_type must be one of", proj_type="middle"),
            refused("projection", "projection must be one of", projection="guess"),
            refused("moments", "moments must be one of", moments="forget"),
            refused("bias", "exists only under compat='reference'", correct_bias=False),
        ],
        gap="update_proj_gap",
    ),
    entry(
        Fira,
        {
            "rank, refreshes": {"rank": 2, "update_proj_gap": 2},
            "a fraction": {"rank": 0.5, "update_proj_gap": 3, "alpha": 1.0},
            "betas, eps": {"betas": (0.8, 0.95), "eps": 1e-6, "rank": 3},
            "reverse_std": {"rank": 2, "proj_type": "reverse_std"},
            "full": {"rank": 2, "proj_type": "full", "update_proj_gap": 3},
            "paper": {"rank": 2, "variant": "paper", "update_proj_gap": 2},
            "matrix": {"rank": 2, "scaling": "matrix", "update_proj_gap": 2},
            "no limiter": {"rank": 2, "limiter": False},
            "limiter's settings": {"rank": 2, "gamma": 1.1, "limiter_floor": 1e-6},
            "topk": {"rank": 2, "projection": "topk", "moments": "match", "update_proj_gap": 2},
            "as published": {"rank": 2, "compat": "reference", "update_proj_gap": 3},
            # uncorrected, a first step is 3 to 8 times lr, too long for tests to first order in lr
            "RMSProp": {"rank": 2, "compat": "reference", "betas": (0.0, 0.9), "lr": 1e-4,
                        "correct_bias": False},
        },
        [
            refused("beta 1", "Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9)),
            refused("eps", "Invalid epsilon value: -1", eps=-1),
            refused("rank", "rank", rank=0),
            refused("gap", "update_proj_gap must be", update_proj_gap=0),
            refused("variant", "variant must be one of", variant="code"),
            refused("scaling", "scaling must be one of", scaling="row"),
            refused("gamma", "gamma must be at least 1", gamma=0.99),
            refused("floor", "limiter_floor must be at least 0", limiter_floor=-1.0),
            refused("paper's compat", "variant='reference'", compat="reference", variant="paper"),
        ],
        gap="update_proj_gap",
    ),    entry(
        DCTAdamW,
        {
            "rank, refreshes": {"rank": 2, "update_proj_gap": 2},
            "a fraction": {"rank": 0.5, "update_proj_gap": 3, "norm": "l2"},
            "betas, eps": {"betas": (0.8, 0.95), "eps": 1e-6, "rank": 3},
            "every step": {"rank": 2, "update_proj_gap": 1},
            "right": {"rank": 2, "side": "right"},
            "left": {"rank": 2, "side": "left", "transform": "fft"},
            "as published": {"rank": 2, "moments": "slot", "bias_correction": "global",
                             "basis": "dct3", "transform": "matmul"},
            "reset moments": {"rank": 2, "moments": "reset", "update_proj_gap": 2},
            "kept moments": {"rank": 2, "moments": "keep_if_same", "update_proj_gap": 2},
            "full feedback": {"rank": 2, "error_feedback": "full", "update_proj_gap": 2},
            "int8 feedback": {"rank": 2, "error_feedback": "int8", "update_proj_gap": 2},
            "int4 feedback": {"rank": 2, "error_feedback": "int4", "moments": "slot"},
        },
        [
            refused("beta 1", "Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9)),
            refused("eps", "Invalid epsilon value: -1", eps=-1),
            refused("rank", "rank", rank=0),
            refused("gap", "update_proj_gap must be", update_proj_gap=0),
            refused("norm", "norm must be one of", norm="l3"),
            refused("moments", "moments must be one of", moments="rotate"),
            refused("feedback", "error_feedback must be one of", error_feedback="int2"),
            refused("bias", "bias_correction must be one of", bias_correction="none"),
            refused("side", "side must be one of", side="both"),
        ],
        gap="update_proj_gap",
    ),
    entry(
        Trion,
        {
            "rank": {"rank": 2},
            "all ranks, momentum": {"rank": 1.0, "momentum": 0.8},
            "no momentum": {"rank": 2, "momentum": 0.0},
            "l2, dct3": {"rank": 2, "norm": "l2", "basis": "dct3"},
            "polar": {"rank": 2, "polar": "auto"},
            "ns_steps": {"rank": 2, "ns_steps": 6, "ns_coefficients": (3.4, -4.7, 2.0)},
            **{name: {"rank": 2, "adjust_lr_fn": name} for name in ("kj", "dion", "kimi", "none")},
        },
        [
            refused("momentum", "momentum must be in", momentum=1.1),
            refused("rank", "rank", rank=0),
            refused("adjust_lr_fn", "adjust_lr_fn must be one of", adjust_lr_fn="original"),
            refused("norm", "norm must be one of", norm="l3"),
            refused("basis", "basis must be one of", basis="dct1"),
            refused("polar", "polar must be one of", polar="qr"),
        ],
    ),
    entry(
        FRUGAL,
        {
            "columns": {"density": 0.5, "update_gap": 2},
            "rows": {"split": "rows", "density": 0.5, "update_gap": 2, "reset": "changed"},
            "randk": {"split": "randk", "update_gap": 2, "reset": "changed"},
            "kept slots": {"split": "randk", "update_gap": 2, "reset": "none"},
            "svd": {"split": "svd", "density": 0.5, "update_gap": 2},
            "turned svd": {"split": "svd", "density": 0.5, "update_gap": 2, "reset": "changed"},
            "random": {"split": "random", "density": 0.5, "proj_type": "full", "update_gap": 2},
            "dct": {"split": "dct", "density": 0.5, "proj_type": "reverse_std", "update_gap": 2},
            # blocks, density 0 and the rule "no" leave parameters without state, or in their place
            "lion": {"inner": "lion", "betas": (0.9, 0.99), "density": 0.5},
            "sgdm": {"inner": "sgdm", "state_free": "sgd", "density": 0.5},
            "scales": {"state_free_lr_scale": 0.1, "proj_lr_scale": 0.5, "density": 0.5},
            "dead zone": {"sign_threshold": 0.01, "density": 0.5},
            "all": {"density": 1.0},
            "as published": {"compat": "reference", "split": "svd", "density": 0.5},
        },
        [
            refused("beta 1", "Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9)),
            refused("eps", "Invalid epsilon value: -1", eps=-1),
            refused("density", "density must be a count", density=1.5),
            refused("gap", "update_gap must be", update_gap=0),
            refused("split", "split must be one of", split="diagonal"),
            refused("rule", "state_free must be one of", state_free="adam"),
            refused("reset", "reset must be one of", reset="never"),
            refused("inner", "inner must be one of", inner="adafactor"),
            refused("order", "block_order must be one of", block_order="sideways"),
            refused("kept blocks", "use 'changed'", split="block", reset="none"),
            refused("blocks of columns", "has no blocks", blocks="layer"),
            refused("scale", "proj_lr_scale must be at least 0", proj_lr_scale=-1.0),
            refused("threshold", "sign_threshold must be", sign_threshold=-1.0),
            refused("published", "not 'changed'", compat="reference", reset="changed"),
        ],
        gap="update_gap",
    ),
    entry(
        AuON,
        {
            "momentum": {"momentum": 0.8},
            "no momentum": {"momentum": 0.0, "nesterov": False},
            "aspect": {"adjust_lr_fn": "aspect"},
            "no scale": {"adjust_lr_fn": "none", "gamma": 2.0},
            "repo2026": {"variant": "repo2026", "lr": 0.1},
            "hybrid": {"ns_steps": 1},
            "hybrid of the repository": {"ns_steps": 5, "variant": "repo2026"},
            "spectral bound": {"ns_steps": 1, "init_norm": "spectral-bound"},
        },
        [
            refused("momentum", "momentum must be in", momentum=1.1),
            refused("gamma", "gamma must be in", gamma=0.0),
            refused("ns_steps", "ns_steps must be an int", ns_steps=100),
            refused("variant", "variant must be one of", variant="repo"),
            refused("adjust_lr_fn", "adjust_lr_fn must be one of", adjust_lr_fn="original"),
            refused("init_norm", "init_norm must be one of", init_norm="two", ns_steps=1),
            refused("init_norm alone", "needs ns_steps=1", init_norm="spectral-bound"),
        ],
    ),
    entry(
        RowNorm,
        {
            "momentum": {"momentum": 0.8},
            "no momentum": {"momentum": 0.0},
            "columns": {"axis": "cols", "row_mode": "unit"},
            "relative": {"row_mode": "relative", "rms_target": 0.1},
            "as published": {"adjust_lr_fn": "none", "eps": 1e-6},
        },
        [
            refused("momentum", "momentum must be in", momentum=1.1),
            refused("row_mode", "row_mode must be one of", row_mode="l1"),
            refused("rms_target", "rms_target must be positive", rms_target=0.0),
            refused("pair", "paired by rows", pair="halves", axis="cols"),
        ],
    ),
    entry(
        Spectral,
        {
            "momentum": {"momentum": 0.8},
            "exact": {"polar": "svd"},
            "columns, left": {"axis": "cols", "side": "left"},
            "ns5": {"polar": "ns5", "ns_steps": 6},
            "as published": {
                "adjust_lr_fn": "none", "polar": "inverse_root", "eps": 1e-8, "alpha": 1.0,
            },
        },
        [
            refused("polar", "polar must be one of", polar="turbo"),
            refused("alpha", "adjust_lr_fn='none'", alpha=1.0),
            refused("side", "side must be one of", side="both"),
        ],
    ),
    entry(
        Hybrid,
        {
            "momentum": {"momentum": 0.8},
            "polar first": {"order": "polar_then_row"},
            "relative": {"row_mode": "relative"},
            "columns": {"axis": "cols", "polar": "eigh"},
            "as published": {
                "adjust_lr_fn": "none", "polar": "inverse_root", "eps": 1e-8, "alpha": 1.0,
                "lr": 1e-2,
            },
        },
        [
            refused("order", "order must be one of", order="both"),
            refused("ns_steps", "ns_steps must be an int from 1 to 99", ns_steps=0),
        ],
    ),
    entry(
        SymmetryStack,
        {
            "hybrid": {"policy": {"hidden": "Hybrid"}},
            "row norm": {"policy": {"hidden": {"rule": "RowNorm", "axis": "cols"}}},
            "muon and AdamW": {"policy": "muon+adamw"},
        },
        [
            refused("policy", "policy must be one of", policy="best"),
            refused("adjust_lr_fn", "adjust_lr_fn must be one of", adjust_lr_fn="original"),
            refused("overrides", "overrides need the module", overrides={"a": "adamw"}),
            refused("paper", "fixed multiples", adjust_lr_fn="paper", lr=torch.tensor(0.1)),
        ],
        says="Muon",
    ),
]  # fmt: skip
"""Every optimizer under torch's harness."""


def _lrs(optimizer, factor):
    return [factor * float(group["lr"]) for group in optimizer.param_groups]


SCHEDULERS = {
    "StepLR": lambda o: StepLR(o, step_size=3, gamma=0.5),
    "OneCycleLR": lambda o: OneCycleLR(o, _lrs(o, 2), total_steps=20),
    "CyclicLR": lambda o: CyclicLR(o, _lrs(o, 1), _lrs(o, 2), step_size_up=4),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=20),
    # a loss that falls by less than nine tenths counts as a plateau, so that it reduces
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=1, factor=0.5, threshold=0.9),
    "SequentialLR": lambda o: SequentialLR(
        o, [ConstantLR(o, 0.5, total_iters=3), ExponentialLR(o, 0.9)], milestones=[3]
    ),
}
"""One scheduler of every kind; each scales every group from that group's own lr."""

TORCH_TESTS = frozenset(
    f"test_{name}"
    for name in """
    adamw_serialization can_load_from_to_named_state_dict can_load_older_state_dict complex
    complex_2d cpu_load_state_dict deepcopy_copies_all_public_attrs defaults_changed_to_foreach
    errors foreach_large_tensor foreach_matches_forloop forloop_goes_right_direction
    forloop_goes_right_direction_multigpu fused_cpu_matches_cuda fused_does_not_step_if_foundinf
    fused_error_on_params_on_meta fused_large_tensor fused_matches_forloop
    grads_are_never_inplaced_into load_nontensor_step load_state_dict_post_hook
    load_state_dict_pre_hook_and_prepend load_state_dict_pre_post_hook mixed_device_dtype
    non_empty_state optim_infos_do_not_specify_global_cliquey_kwargs optimizer_can_be_printed
    param_group_with_lrscheduler_goes_right_direction param_groups_lr param_groups_weight_decay
    peak_memory_foreach rosenbrock_sparse save_load_equality_with_weights_only
    second_order_optims_return_consistent_types set_default_dtype_works_with_foreach
    state_dict_deterministic state_dict_post_hook state_dict_pre_hook state_dict_pre_post_hook
    state_dict_with_cuda_params step_all_hooks step_is_noop_for_zero_grads
    step_is_noop_when_params_have_no_grad step_iteration step_post_hook step_pre_hook tensor_lr
    capturable_matches_not_capturable grad_scaling_autocast_fused_optimizers
    named_parameters_in_state_dict no_reference_cycles second_step_state_growth sparse_gradients
    step_is_noop_for_empty_grads tensor_lr_must_be_one_element three_dimensional_and_empty_params
    """.split()
)
"""Tests of torch's ``TestOptimRenewed``, then ideas of its other suites about optimizers."""

NOT_APPLICABLE = {
    "test_adamw_serialization": "about Adam and AdamW of torch loading each other's checkpoints; "
    "test_checkpoint.py has what ours load and refuse",
    "test_foreach_large_tensor": "needs 72 GB, and foreach runs torch's kernels and none of ours",
    "test_fused_large_tensor": "needs 72 GB, and fused runs torch's kernels and none of ours",
    "test_fused_does_not_step_if_foundinf": "_step_supports_amp_scaling is not set, so GradScaler "
    "leaves out the whole step; test_grad_scaling_autocast_fused_optimizers checks it",
    "test_rosenbrock_sparse": "no optimizer supports sparse gradients; test_sparse_gradients has "
    "the refusal",
    "test_second_order_optims_return_consistent_types": "about LBFGS; none of ours is second order",
}
"""Tests of torch that ours have no use for, and why."""
