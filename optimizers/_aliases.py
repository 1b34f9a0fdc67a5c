"""Public names and module paths of version 0.1, kept for one release: pickles name them."""

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
RENAMED = {"Blocks": ("PanelTerm", "_core.terms"), "Place": ("BlockPosition", "_core.rule")}
"""Old public name -> the same class by its name of today, and the module that defines it."""
TABLES = {"StackAssignment": "OptimizerAssignment", "StackRow": "AssignedRow"}
"""Classes of ``_roles/policies.py`` that are in ``_roles/assignment.py`` under other names."""


def register() -> None:
    """Make old names attributes of the package and ``stiefel.optimizers.OLD`` importable."""
    package = sys.modules[__package__ or "stiefel.optimizers"]
    rule = importlib.import_module("._core.rule", package.__name__)
    for old, (new, place) in RENAMED.items():
        home = importlib.import_module(f".{place}", package.__name__)
        for module in (home, rule, package):
            setattr(module, old, getattr(home, new))
    tables, policies = (
        importlib.import_module(f"._roles.{name}", package.__name__)
        for name in ("assignment", "policies")
    )
    for old, new in TABLES.items():
        setattr(policies, old, getattr(tables, new))
    for old, new in MOVED.items():
        module = importlib.import_module(f".{new}", package.__name__)
        sys.modules[f"{package.__name__}.{old}"] = module
