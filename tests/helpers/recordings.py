"""Recorded trajectories: how they are read, and how close a run has to stay to them."""

import json

import torch

from helpers.paths import FIXTURES
from stiefel.optimizers._toolkit import dense_projectors


def fixture(name):
    """A recorded trajectory, with float32 tensors."""
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    for key in ("W0", "grads", "W", "W_float32_polar"):
        if key in data:
            data[key] = torch.tensor(data[key], dtype=torch.float32)
    return data


def fed(data, monkeypatch):
    """Let the exact SVD hand out the recorded bases: their signs would differ otherwise.

    Returns the iterator, so that a test can see that all were taken.
    """
    stored = iter(data["bases"])

    def find(self, G, *old, rng, transposed):
        basis = next(stored)["basis"]
        if data["settings"]["group"]["proj_type"] == "full":
            left, right = (torch.tensor(x, dtype=torch.float32) for x in basis)
            return left[None], right.mT[None]
        B = torch.tensor(basis, dtype=torch.float32)
        return (B.mT[None] if transposed else B[None],)

    monkeypatch.setattr(dense_projectors.SvdProjector, "find", find)
    return stored


def tolerance(data, key):
    """Four times the recorded noise, at least 2e-6."""
    return max(2e-6, 4 * data["noise"][key])


PAIRED = {
    "gpt_oss_gate_up_pair": {"pair": "interleaved", "view": "transposed"},
    "olmoe_gate_up_pair": {"pair": "halves"},
}


def symmetry_cases(name):
    """Recorded cases: settings under our names, weight, gradients, weights after each step."""
    data = json.loads((FIXTURES / f"symmetry_{name}_reference.json").read_text())
    found = []
    for case in data["cases"]:
        given, theirs = data["inputs"][case["input"]], case["settings"]
        orientation = theirs.get("orientation", "row")
        settings = {
            "lr": theirs["lr"],
            "momentum": theirs["beta"],
            "weight_decay": theirs["weight_decay"],
            "eps": theirs["eps"],
            "centred": theirs["center_rows"],
            "adjust_lr_fn": "none",
            **PAIRED.get(orientation, {"axis": "cols" if orientation == "col" else "rows"}),
            **{key: theirs[key] for key in ("row_mode", "order", "alpha") if key in theirs},
        }
        if "num_steps" in theirs:
            left = theirs.get("left", name.startswith("left"))
            settings |= {
                "polar": "inverse_root",
                "ns_steps": theirs["num_steps"],
                "side": "left" if left else "right",
            }
        W, G = (torch.tensor(given[key], dtype=torch.float64) for key in ("W0", "G"))
        found.append((settings, W, list(G), case))
    return found
