"""Functions of kernels/ under a default device and a default dtype of the user's model."""

import contextlib
import warnings

import pytest
import torch
from helpers.foreign import foreign, forget
from helpers.problems import gaussian, same

from stiefel import kernels

X, TALL, SMALL = gaussian(2, 6, 10), gaussian(2, 10, 6, seed=1), gaussian(2, 6, 6, seed=2)
CPU = torch.device("cpu")
INDEX = torch.tensor([[0, 2], [1, 5]], dtype=torch.int32)
W, M, V, R = (gaussian(2, 6, 10, seed=s) for s in range(3, 7))
PQ = gaussian(2, 6, 3, seed=8), gaussian(2, 3, 10, seed=9)
EYE = torch.eye(6).repeat(2, 1, 1)
SPD = SMALL @ SMALL.mT + EYE
MANY = gaussian(2, 300, seed=12)
CALLS = {
    **{
        f"polar_factor-{name}": lambda name=name: kernels.polar_factor(X, name)
        for name in kernels.POLAR_METHODS
    },
    **{
        f"low_rank-{name}": lambda name=name: kernels.polar_factor(
            X, "low_rank", rank=2, oversample=1, sketch=name, key=3
        )
        for name in kernels.SKETCHES
    },
    "low_rank_size": lambda: kernels.low_rank_size(6, 10, 0.5, 1),
    "adam": lambda: kernels.adam(R.clone(), M.clone(), V.abs(), 3, beta1=0.9, beta2=0.99, eps=1e-8),
    "add_product_": lambda: kernels.add_product_(W.clone(), *PQ),
    "auto_method": lambda: kernels.auto_method((6, 10), "cpu", torch.float32),
    "blockwise_levels": lambda: [kernels.blockwise_levels(x) for x in (False, True)],
    "cholesky_qr": lambda: kernels.cholesky_qr(TALL),
    "column_norm": lambda: kernels.column_norm(X.clone()),
    "composite_map": lambda: kernels.composite_map("ns5", 0.5),
    **{
        f"dct-{path}": lambda path=path: [
            kernels.dct(X, path=path), kernels.idct(X, path=path), kernels.dct(X, dim=-2, path=path)
        ]
        for path in kernels.DCT_PATHS
    },
    "dct_basis": lambda: [
        kernels.dct_basis(7, dtype, CPU) for dtype in (torch.float32, torch.float64)
    ],
    "dct_project": lambda: kernels.dct_project(X, INDEX, -2),
    "dct_take": lambda: kernels.dct_take(X, INDEX, -2),
    "sized_dct": lambda: kernels.sized_dct(X, -2, norm="l2"),
    "completed_eigenbasis": lambda: kernels.completed_eigenbasis(SPD, EYE, 1),
    "eigenbasis": lambda: kernels.eigenbasis(SPD, EYE),
    "equal_rows": lambda: kernels.equal_rows(X.clone()),
    "gram": lambda: kernels.gram(X),
    "gram_polar": lambda: kernels.gram_polar(X, True),
    "gram_stack": lambda: kernels.gram_stack(X),
    "householder_qr": lambda: kernels.householder_qr(SMALL),
    "inverse_root": lambda: kernels.inverse_root(SPD),
    "left_basis": lambda: kernels.left_basis(X),
    "nearest_rotation": lambda: kernels.nearest_rotation(SMALL, SMALL),
    "newton_schulz": lambda: kernels.newton_schulz(X[0]),
    "polar_express_schedule": kernels.polar_express_schedule,
    "polar_report": lambda: vars(kernels.polar_report(X[0], W[0])),
    "power_sums": lambda: [kernels.power_sums(A, 3) for A in (X, X[:0])],
    "product": lambda: kernels.product(X, TALL),
    "project": lambda: kernels.project(PQ[0], X, squares=True),
    "quantize": lambda: quantized(),
    "quantize_rows": lambda: kernels.dequantize_rows(*kernels.quantize_rows(X, 4), 4, 10),
    "qdwh_schedule": lambda: kernels.qdwh_schedule(1e-3),
    "rotated": lambda: [kernels.rotated(SMALL, SMALL, cholesky=flag) for flag in (True, False)],
    "row_factors": lambda: kernels.row_factors(X.square().sum(-1, keepdim=True), "inverse", 1e-8),
    "row_norm": lambda: kernels.row_norm(X.clone()),
    "row_total": lambda: kernels.row_total(X),
    "sinkhorn": lambda: kernels.sinkhorn(X.clone()),
    "squares": lambda: [kernels.squares(X, dim) for dim in (-1, -2, None)],
    "symmetric_poly": lambda: kernels.symmetric_poly(SPD, 1.0, 2.0, 3.0),
    "momentum_step_": lambda: kernels.momentum_step_(M.clone(), X, 0.9, nesterov=True),
    "momentum_power_sums_": lambda: kernels.momentum_power_sums_(M.clone(), X, 0.9, 3),
    "zolotarev": kernels.zolotarev,
}  # fmt: skip
"""A call of every function that makes tensors of its own."""


def quantized():
    out = []
    for dtype in (torch.int8, torch.uint8):
        codes = torch.zeros(2, 300, dtype=dtype, device="cpu")
        count = kernels.blockwise_scales(300)
        scales = torch.zeros(2, count, dtype=torch.float32, device="cpu")
        kernels.quantize_blocks(MANY.abs(), codes, scales)
        out += [codes, scales, kernels.dequantize_blocks(codes, scales)]
    return out


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_function_ignores_default_device_and_default_dtype(name, default):
    def called(around):
        forget()
        with around, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CALLS[name]()

    assert same(called(contextlib.nullcontext()), called(foreign(default)))
