"""Module paths of version 0.1, importable for one release: pickles of public records name them."""

from __future__ import annotations

import importlib
import sys

MOVED = {
    "base": "_driver.optimizer",
    "lora": "_lora.pair_groups",
    "memory": "_driver.memory",
    "moments": "muon",
    "policies": "_roles.policies",
    "roles": "_roles.classify",
    "rule": "_core.rule",
    "switching": "_lora.switching",
    "terms": "_core.terms",
}
"""Old module below ``stiefel.optimizers`` -> where its public names are now."""


def register() -> None:
    """Let ``import stiefel.optimizers.OLD`` give the module that took OLD's public names."""
    package = __package__ or "stiefel.optimizers"
    for old, new in MOVED.items():
        sys.modules[f"{package}.{old}"] = importlib.import_module(f".{new}", package)
