"""What the fuzzer draws from: values of any type, documented options, parameters and gradients.

Values are Python source, so that a case prints as a script would have it.
"""

import fractions
import math

import numpy as np
import torch

from stiefel.optimizers._driver.param_groups import LISTS

LORA = ("AltLoRA", "AdaPreLoRA", "SwitchLoRA")
PLAIN = (
    "Muon", "GaLore", "Fira", "FRUGAL", "DCTAdamW", "Trion", "AuON", "ARO", "RowNorm", "Spectral",
    "Muown", "Hybrid", "SOAP", "SOAPMuon", "SymmetryStack", "APOLLO", "SinkGD",
)  # fmt: skip
CLASSES = PLAIN + LORA
KINDS = ("keyword", "group key", "parameter", "gradient", "checkpoint", "write")
"""What a refusal is about."""

# values, as Python source -------------------------------------------------------------------------

NAMESPACE = {
    "torch": torch, "np": np, "nan": math.nan, "inf": math.inf, "Fraction": fractions.Fraction,
}  # fmt: skip
ODD_VALUES = (
    "None", "True", "False", "0", "1", "-1", "2", "7", "2**70", "-0.0", "0.5", "1.5", "-0.5",
    "1e-45", "1e30", "nan", "inf", "-inf", "''", "'x'", "'auto'", "'float32'", "'bfloat16'",
    "'int8'", "'0.1'", "b'x'", "()", "(0.9,)", "(0.9, 0.95)", "(0.9, 0.95, 0.99)", "(1.0, 0.9)",
    "(nan, 0.9)", "('a', 'b')", "(None, None)", "[0.9, 0.95]", "[]", "{}", "{'a': 1}", "{1, 2}",
    "torch.tensor(0.1)", "torch.tensor([0.1])", "torch.tensor([0.1, 0.2])", "torch.tensor(nan)",
    "torch.tensor(1)", "torch.tensor(True)", "torch.tensor(1 + 1j)", "torch.zeros(0)",
    "torch.zeros((), device='meta')", "torch.tensor(-1.0)",
    "torch.tensor(0.1, dtype=torch.float64)",
    "(torch.tensor(0.9), torch.tensor(0.95))", "np.float32(0.1)", "np.int64(3)", "np.bool_(True)",
    "np.array([0.9, 0.95])", "Fraction(1, 2)", "1j", "len", "int", "torch.float32", "torch.int32",
    "torch.float8_e4m3fn", "torch.device('cpu')", "range(2)", "...", "'rows:2,2'", "'heads:2'",
    "'heads:0'", "'flatten'", "'transposed'", "'rows:-1,5'", "('auto', 'auto')", "'adamw'",
    "'Muon'", "'RowNorm'", "'GaLore'",
    "'none'", "'svd'", "'reference'", "2**31", "-3", "10**400",
)  # fmt: skip
"""Values of any type, for any keyword."""
FOREIGN_KEYS = ("name", "lr_scale", "rho", "kind", "is_last_layer", "my_tag", "initial_lr")
"""Group keys of other tools, which must be kept."""
DRIVER_KEYS = ("rule", "rule", "draws", "adamw_lr_ratio", *LISTS)
"""Group keys that the driver reads beside the options of a class."""
MISSPELLED = ("weigth_decay", "momentun", "adamw_lt", "nonfinit", "weight_deacy")

_POLAR = ("'svd'", "'ns5'", "'polar_express'", "'qdwh'", "'auto'", "'gram'")
_ADAM = {"betas": ("(0.8, 0.99)", "(0.0, 0.9)"), "eps": ("1e-4", "1e-12")}
_ROW = {
    "momentum": ("0.0", "0.8"),
    "axis": ("'cols'",),
    "centred": ("True",),
    "eps": ("None", "1e-6"),
    "rms_target": ("0.1",),
}
_LOW_RANK = {
    "rank": ("1", "2", "0.5", "1.0"),
    "update_proj_gap": ("1", "2"),
    "proj_type": ("'std'", "'left'", "'right'", "'reverse_std'", "'full'"),
    "projection": tuple(
        repr(kind)
        for kind in ("svd", "svd_full", "range", "power", "random", "randk", "topk", "dct")
    ),
    "moments": ("'keep'", "'rotate'", "'ldadam'", "'reset'", "'match'"),
    "compat": ("'reference'",),
    "seed": ("3",),
    **_ADAM,
}
VALID: dict[str, dict[str, tuple[str, ...]]] = {
    "Muon": {
        "momentum": ("0.0", "0.8"),
        "nesterov": ("False",),
        "polar": (*_POLAR, "'low_rank'", "'deepseekv4'", "'cubic5'"),
        "equilibrate": ("'rows'", "'both'"),
        "renormalize": ("True",),
        "adjust_lr_fn": ("'original'", "'match_rms_adamw'", "'spectral'", "'none'", "None"),
        "compat": ("'torch'",),
        "polar_norm": ("'schatten4'", "'power:2'"),
        "rank": ("2", "0.5"),
        "sketch": ("'gaussian'", "'kaczmarz'"),
        "momentum_kind": ("'sum'",),
        "second_moment": ("'normuon'", "'adamuon'"),
        "beta2": ("0.9",),
        "clip_grad_rms": ("0.5",),
        "normalize_grad": ("True",),
        "spike_ratio": ("1.5",),
        "report_steps": ("2",),
        "ns_steps": ("3",),
    },
    "GaLore": {**_LOW_RANK, "inner": ("'lion'", "'adafactor'"), "scale": ("1.0",)},
    "Fira": {
        **_LOW_RANK,
        "alpha": ("1.0",),
        "variant": ("'paper'",),
        "scaling": ("'matrix'",),
        "limiter": ("False",),
        "gamma": ("1.2",),
    },
    "APOLLO": {
        **_LOW_RANK,
        "projection": ("'random'", "'gaussian'", "'svd'", "'topk'"),
        "scaling": ("'tensor'", "'column'"),
        "scale": ("'auto'", "128.0"),
        "scale_front": ("True",),
        "limiter": ("False",),
    },
    "Muown": {
        "momentum": ("0.9",),
        "adjust_lr_fn": ("'original'", "'none'"),
        "ns_steps": ("3",),
        "polar": ("'svd'", "'ns5'"),
    },
    "SinkGD": {"iterations": ("1", "3"), "momentum": ("0.9",)},
    "FRUGAL": {
        "density": ("0.0", "0.5", "1.0"),
        "split": tuple(
            repr(kind) for kind in ("columns", "rows", "randk", "block", "svd", "random", "dct")
        ),
        "update_gap": ("1", "2"),
        "state_free": ("'sgd'", "'no'"),
        "state_free_lr_scale": ("0.5",),
        "reset": ("'changed'", "'none'"),
        "inner": ("'lion'", "'sgdm'"),
        "block_order": ("'mirror'", "'ascending'"),
        "blocks": ("'layer'",),
        "compat": ("'reference'",),
        "seed": ("3",),
        **_ADAM,
    },
    "DCTAdamW": {
        "rank": ("1", "2", "0.5"),
        "update_proj_gap": ("1", "2"),
        "norm": ("'l2'",),
        "moments": ("'slot'", "'reset'", "'keep_if_same'"),
        "error_feedback": ("'full'", "'int8'", "'int4'"),
        "bias_correction": ("'global'",),
        "basis": ("'dct3'",),
        "transform": ("'fft'", "'matmul'"),
        **_ADAM,
    },
    "Trion": {
        "rank": ("1", "2", "0.5"),
        "momentum": ("0.0", "0.8"),
        "adjust_lr_fn": ("'kj'", "'dion'", "'kimi'", "'none'"),
        "norm": ("'l2'",),
        "basis": ("'dct3'",),
        "polar": _POLAR,
        "eps": ("None", "1e-6"),
    },
    "AuON": {
        "momentum": ("0.0", "0.8"),
        "nesterov": ("False",),
        "variant": ("'repo2026'",),
        "gamma": ("2.0",),
        "ns_steps": ("1",),
        "adjust_lr_fn": ("'aspect'", "'none'"),
        "eps": ("None", "1e-6"),
    },
    "ARO": {
        "momentum": ("0.0", "0.8"),
        "base": ("'row_norm'", "'sign'", "'adam'"),
        "rotation": ("'polar'", "'eigh'", "'none'"),
        "rotation_every": ("2",),
        "rms_target": ("None", "0.1"),
        "side": ("'rows'", "'cols'"),
        "nesterov": ("True",),
        "init": ("'svd'",),
        "iterations": ("2",),
        "beta2": ("0.9",),
    },
    "SOAP": {
        "betas": ("(0.8, 0.9)", "(0.0, 0.5)"),
        "eps": ("1e-6", "1e-4"),
        "shampoo_beta": ("0.5",),
        "precondition_frequency": ("1", "2"),
        "sides": ("'short'",),
        "max_precond_dim": ("0", "4"),
        "factors": ("'kl'",),
        "basis": ("'eigh'",),
        "moments": ("'rotate'",),
        "correct_bias": ("False",),
        "normalize_update": ("True",),
        "compat": ("'reference'",),
    },
    "SOAPMuon": {
        "momentum": ("0.0", "0.8"),
        "nesterov": ("False",),
        "beta2": ("0.5",),
        "precondition_frequency": ("2",),
        "sides": ("'short'",),
        "moments": ("'rotate'",),
        "polar": _POLAR,
    },
    "RowNorm": {
        **_ROW,
        "row_mode": ("'inverse'", "'unit'", "'relative'"),
        "adjust_lr_fn": ("'none'",),
    },
    "Spectral": {**_ROW, "polar": (*_POLAR, "'inverse_root'"), "side": ("'left'",)},
    "Hybrid": {
        **_ROW,
        "polar": _POLAR,
        "side": ("'left'",),
        "order": ("'polar_then_row'",),
        "row_mode": ("'inverse'", "'unit'", "'relative'"),
        "row_eps": ("1e-6",),
    },
    "SymmetryStack": {
        "policy": ("'muon+adamw'", "{'hidden': 'Hybrid'}", "{'hidden': 'RowNorm'}"),
        "adjust_lr_fn": ("'paper'",),
    },
    "AltLoRA": {
        "betas": _ADAM["betas"],
        "delta": ("1e-3", "0.0"),
        "schedule": ("'alternate'",),
        "second_moment": ("'elementwise'",),
        "delta_mode": ("'relative'",),
        "first": ("'A'",),
        "scale_aware": ("False",),
        "max_rel_step": ("0.1",),
        "compact_alignment": ("True",),
        "lr_ratio_b": ("2.0",),
        "compat": ("'reference'",),
    },
    "AdaPreLoRA": {
        "betas": _ADAM["betas"],
        "variant": ("'sgd'", "'adamw'"),
        "stats": ("'none'",),
        "rescale_visible": ("False",),
        "scale_aware": ("False",),
        "max_rel_step": ("0.1",),
        "lr_ratio_b": ("2.0",),
    },
    "SwitchLoRA": {
        "betas": _ADAM["betas"],
        "interval0": ("12", "20"),
        "freeze_steps": ("0", "2"),
        "rounding": ("'stochastic'",),
        "choice": ("'random'",),
        "lr_ratio_b": ("2.0",),
        "seed": ("3",),
    },
}
"""Values that a class documents, per option; not all of them go together."""
VALID_COMMON = {
    "lr": ("1e-3", "0.1", "torch.tensor(0.01)"),
    "weight_decay": ("0.0", "0.1"),
    "adamw_lr": ("1e-3",),
    "adamw_betas": ("(0.8, 0.9)",),
    "adamw_eps": ("1e-6",),
    "adamw_weight_decay": ("0.1",),
    "cautious": ("True",),
    "decay_schedule": ("'lr2'", "'corrected'"),
    "decay_lr": ("1e-3",),
    "maximize": ("True",),
    "foreach": ("True", "False"),
    "nonfinite": ("'skip'", "'raise'"),
    "state_dtype": ("'float32'", "'bfloat16'", "'float64'", "'int8'"),
    "view": ("'auto'", "'flatten'", "'batch'"),
    "stagger": ("True",),
    "plan": ("'local'", "'owner'", "'reduce'", "'gather'"),
    "comm_dtype": ("'bfloat16'", "'float32'"),
}
NEEDED = {"SwitchLoRA": {"total_steps": "20"}}
"""Options without which a class refuses."""

# parameters and gradients -------------------------------------------------------------------------

SHAPES = (
    (), (1,), (5,), (0,), (0, 3), (3, 0), (1, 6), (6, 1), (1, 1), (4, 4), (6, 4), (4, 6), (3, 5),
    (4, 4), (8, 4), (2, 3, 4), (3, 1, 1), (1, 5, 1), (4, 3, 2, 2), (8, 1, 3, 3), (2, 0, 3),
)  # fmt: skip
MATRICES = ((4, 4), (6, 4), (4, 6), (3, 5), (8, 4), (1, 6), (2, 3, 4))
DTYPES = ("float32", "float32", "float32", "float64", "bfloat16", "float16")
PLAIN_KINDS = ("plain", "plain", "plain", "strided", "frozen", "thawed", "subclass", "alien")
ODD_KINDS = (
    "complex", "int", "float8", "expanded", "sparse", "meta", "lazy", "lazy forever", "nested",
    "twice", "tied groups", "no grad leaf", "non-leaf", "text", "None", "bool",
)  # fmt: skip
PLAIN_GRADS = ("normal", "normal", "normal", "none", "zeros", "small", "large", "strided", "rank 1")
ODD_GRADS = (
    "1e-45", "1e-38", "1e-30", "1e-20", "1e20", "1e30", "1e37", "one nan", "one inf", "nan", "-inf",
    "sparse", "other dtype", "expanded", "mixed scale", "with graph", "one entry", "negative view",
)  # fmt: skip
BAD_GRADS = ("one nan", "one inf", "nan", "-inf")
NAMES = (
    "layers.{}.attn.q_proj.weight", "layers.{}.mlp.up_proj.weight", "layers.{}.norm.weight",
    "blocks.{}.fc1.bias", "tok_embeddings.{}.weight", "lm_head.{}.weight", "conv.{}.weight", "w{}",
)  # fmt: skip
BITWISE_EVENTS = ("copy", "pickle", "other device default")
EVENTS = (*BITWISE_EVENTS, "cast", "append", "clear state", "other memory")
"""What may happen between two steps; some of it must not change a bit."""
CHECKPOINT_MUTATIONS = (
    "drop entry", "drop key", "rename key", "reshape", "longer", "cast int", "cast half",
    "cast complex", "nan", "inf", "negative", "none", "text", "sparse", "meta", "permute entries",
    "clock None", "clock nan", "clock -1", "clock [1, 2]", "clock 'x'", "clock 1e30", "clock 0.5",
    "clock tensor", "clock pair", "clock meta", "drop clock", "drop group key", "odd group value",
    "drop group", "extra group", "fewer params", "extra key", "entry None", "entry list",
    "state list", "extra id", "drop names", "permute names", "odd names", "no state", "no groups",
    "list", "groups None", "big index",
)  # fmt: skip
