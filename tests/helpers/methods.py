"""Every optimizer that the general tests run: one entry makes a new method take part in all."""

from helpers.rules import PickRule, RowsRule
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
    StackedOptimizer,
    SymmetryStack,
    Trion,
)

METHODS = {
    "muon": lambda params, **kw: Muon(params, **{"lr": 0.02, **kw}),
    "muon-ns5": lambda params, **kw: Muon(params, **{"lr": 0.02, "polar": "ns5", **kw}),
    "muon-plain": lambda params, **kw: Muon(params, **{"lr": 0.02, "nesterov": False, **kw}),
    "muon-normuon": lambda params, **kw: Muon(
        params, **{"lr": 0.02, "second_moment": "normuon", "cautious": True, **kw}
    ),
    "muon-adamuon": lambda params, **kw: Muon(
        params, **{"lr": 0.02, "second_moment": "adamuon", **kw}
    ),
    "muon-spike": lambda params, **kw: Muon(
        params,
        **{"lr": 0.02, "spike_ratio": 1.5, "clip_grad_rms": 0.3, "momentum_kind": "sum", **kw},
    ),
    "muon-low-rank": lambda params, **kw: Muon(
        params,
        **{"lr": 0.02, "polar": "low_rank", "rank": 3, "oversample": 1, "report_steps": 3, **kw},
    ),
    "muon-kaczmarz": lambda params, **kw: Muon(
        params,
        **{"lr": 0.02, "polar": "low_rank", "rank": 2, "oversample": 1, "power": 2,
           "sketch": "kaczmarz", **kw},
    ),
    "muown": lambda params, **kw: Muown(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "galore": lambda params, **kw: GaLore(
        params, **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1, **kw}
    ),
    "galore-full": lambda params, **kw: GaLore(
        params,
        **{"lr": 0.02, "rank": 0.5, "update_proj_gap": 3, "proj_type": "full", **kw},
    ),
    "galore-rotate": lambda params, **kw: GaLore(
        params,
        **{"lr": 0.02, "rank": 2, "update_proj_gap": 2, "moments": "rotate", "weight_decay": 0.1,
           "cautious": True, **kw},
    ),
    "galore-reset": lambda params, **kw: GaLore(
        params,
        **{"lr": 0.02, "rank": 2, "update_proj_gap": 3, "moments": "reset",
           "proj_type": "reverse_std", **kw},
    ),
    "galore-reference": lambda params, **kw: GaLore(
        params,
        **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "compat": "reference", **kw},
    ),
    "fira": lambda params, **kw: Fira(
        params, **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1, **kw}
    ),
    "fira-paper": lambda params, **kw: Fira(
        params,
        **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "variant": "paper", "scaling": "matrix",
           **kw},
    ),
    "apollo": lambda params, **kw: APOLLO(
        params, **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1, **kw}
    ),
    "apollo-mini": lambda params, **kw: APOLLO(
        params,
        **{"lr": 0.02, "rank": 1, "update_proj_gap": 3, "scaling": "tensor",
           "projection": "gaussian", "scale": "auto", **kw},
    ),
    "auon": lambda params, **kw: AuON(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "auon-repo2026": lambda params, **kw: AuON(
        params, **{"lr": 0.02, "variant": "repo2026", "nesterov": False, **kw}
    ),
    "auon-hybrid": lambda params, **kw: AuON(params, **{"lr": 0.02, "ns_steps": 1, **kw}),
    "trion": lambda params, **kw: Trion(
        params, **{"lr": 0.02, "rank": 3, "weight_decay": 0.1, **kw}
    ),
    "trion-l2": lambda params, **kw: Trion(
        params,
        **{"lr": 0.02, "rank": 0.5, "norm": "l2", "basis": "dct3", "polar": "auto",
           "adjust_lr_fn": "kimi", "weight_decay": 0.1, "cautious": True, **kw},
    ),
    "dctadamw": lambda params, **kw: DCTAdamW(
        params, **{"lr": 0.02, "rank": 3, "update_proj_gap": 3, "weight_decay": 0.1, **kw}
    ),
    "dctadamw-every": lambda params, **kw: DCTAdamW(
        params, **{"lr": 0.02, "rank": 0.5, "norm": "l2", "moments": "keep_if_same", **kw}
    ),
    "dctadamw-full": lambda params, **kw: DCTAdamW(
        params,
        **{"lr": 0.02, "rank": 3, "error_feedback": "full", "moments": "slot",
           "bias_correction": "global", "basis": "dct3", **kw},
    ),
    "dctadamw-int8": lambda params, **kw: DCTAdamW(
        params,
        **{"lr": 0.02, "rank": 2, "error_feedback": "int8", "update_proj_gap": 2,
           "transform": "fft", **kw},
    ),
    "dctadamw-int4": lambda params, **kw: DCTAdamW(
        params,
        **{"lr": 0.02, "rank": 2, "error_feedback": "int4", "update_proj_gap": 2,
           "moments": "reset", **kw},
    ),
    "frugal-columns": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "weight_decay": 0.1,
           **kw},
    ),
    "frugal-rows": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "rows", "reset": "changed",
           "weight_decay": 0.1, **kw},
    ),
    "frugal-randk": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "randk",
           "state_free_lr_scale": 0.5, **kw},
    ),
    "frugal-svd": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "svd", "reset": "changed",
           **kw},
    ),
    "frugal-random": lambda params, **kw: FRUGAL(
        params,
        **{"lr": 0.02, "density": 0.5, "update_gap": 3, "split": "random", "state_free": "sgd",
           "inner": "lion", **kw},
    ),
    # all blocks active: which of several are so depends on how many share an optimizer
    "frugal-block": lambda params, **kw: FRUGAL(
        params, **{"lr": 0.02, "density": 1.0, "update_gap": 3, "split": "block", **kw}
    ),
    "aro": lambda params, **kw: ARO(params, **{"lr": 0.02, **kw}),
    "aro-adam": lambda params, **kw: ARO(
        params, **{"lr": 0.02, "base": "adam", "rotation_every": 3, "cautious": True, **kw}
    ),
    "aro-eigh": lambda params, **kw: ARO(
        params,
        **{"lr": 0.02, "base": "row_norm", "rotation": "eigh", "gram_beta": 0.9, **kw},
    ),
    "aro-polar": lambda params, **kw: ARO(
        params, **{"lr": 0.02, "base": "sign", "rotation": "polar", "init": "svd", **kw}
    ),
    "soap": lambda params, **kw: SOAP(params, **{"lr": 0.02, "precondition_frequency": 2, **kw}),
    "soap-short": lambda params, **kw: SOAP(
        params,
        **{"lr": 0.02, "precondition_frequency": 3, "sides": "short", "basis": "eigh",
           "moments": "rotate", "normalize_update": True, **kw},
    ),
    "soap-kl": lambda params, **kw: SOAP(
        params,
        **{"lr": 0.02, "factors": "kl", "precondition_frequency": 2, "correct_bias": False, **kw},
    ),
    "soap-reference": lambda params, **kw: SOAP(
        params, **{"lr": 0.02, "compat": "reference", "precondition_frequency": 3, **kw}
    ),
    "soapmuon": lambda params, **kw: SOAPMuon(params, **{"lr": 0.02, **kw}),
    "rownorm": lambda params, **kw: RowNorm(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "rownorm-columns": lambda params, **kw: RowNorm(
        params,
        **{"lr": 0.02, "axis": "cols", "row_mode": "relative", "weight_decay": 0.1,
           **kw},
    ),
    "rownorm-centred": lambda params, **kw: RowNorm(
        params, **{"lr": 0.02, "weight_decay": 0.1, "centred": True, **kw}
    ),
    "rownorm-plain": lambda params, **kw: RowNorm(params, **{"lr": 0.02, "momentum": 0.0, **kw}),
    "sinkgd": lambda params, **kw: SinkGD(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "sinkgd-momentum": lambda params, **kw: SinkGD(
        params, **{"lr": 0.02, "momentum": 0.9, "iterations": 2, **kw}
    ),
    "spectral": lambda params, **kw: Spectral(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "spectral-published": lambda params, **kw: Spectral(
        params,
        **{"lr": 0.02, "polar": "inverse_root", "alpha": 1.0, "adjust_lr_fn": "none", "eps": 1e-8,
           "centred": True, "side": "left", **kw},
    ),
    "hybrid": lambda params, **kw: Hybrid(params, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
    "hybrid-columns": lambda params, **kw: Hybrid(
        params,
        **{"lr": 0.02, "axis": "cols", "order": "polar_then_row", "polar": "svd", "centred": True,
           **kw},
    ),
    "symmetrystack": lambda params, **kw: SymmetryStack(
        params, **{"lr": 0.02, "weight_decay": 0.1, "policy": {"hidden": "Hybrid"}, **kw}
    ),
    "rows": lambda params, **kw: StackedOptimizer(
        params, RowsRule(), **{"lr": 0.02, "weight_decay": 0.1, **kw}
    ),
    "pick": lambda params, **kw: StackedOptimizer(params, PickRule(), **{"lr": 0.02, **kw}),
    "pick-rows": lambda params, **kw: StackedOptimizer(
        params, PickRule(dim=-2, order=1, gap=3),
        **{"lr": 0.02, "weight_decay": 0.1, "cautious": True, **kw},
    ),
}  # fmt: skip

STARTS_LATE = ("soap", "soap-short", "soap-kl", "soap-reference")
"""Methods whose first gradient finds bases and moves no weight."""
