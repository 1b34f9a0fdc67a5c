"""Published packages as live oracles and peers, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


class Missing(Exception):
    """Why a peer cannot compete here."""


def _stub(name: str, **attributes: Any) -> list[str]:
    """Put empty modules for a dotted name into sys.modules; the names that were added."""
    added = []
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        prefix = ".".join(parts[:i])
        if prefix not in sys.modules:
            sys.modules[prefix] = types.ModuleType(prefix)
            added.append(prefix)
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)
    return added


def galore_torch_adamw() -> Any:
    """The published GaLoreAdamW.

    The package imports transformers for a version check and bitsandbytes for its 8-bit variant.
    Neither takes part in this optimizer's step, so where they are not installed empty modules
    stand in while it is imported.
    """
    if importlib.util.find_spec("galore_torch") is None:
        raise Missing("galore-torch is not installed")
    needs: dict[str, dict[str, Any]] = {
        "transformers.utils.versions": {"require_version": lambda requirement: None},
        "bitsandbytes.optim.optimizer": {"Optimizer2State": object},
    }
    added: list[str] = []
    for name, attributes in needs.items():
        if importlib.util.find_spec(name.split(".")[0]) is None:
            added += _stub(name, **attributes)
    try:
        return importlib.import_module("galore_torch").GaLoreAdamW
    except ImportError as error:
        raise Missing(f"galore-torch does not import: {error}") from error
    finally:
        for name in added:
            sys.modules.pop(name, None)
