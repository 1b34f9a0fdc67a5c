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


def _imported(package: str, pip: str, needs: dict[str, dict[str, Any]]) -> Any:
    """A package that imports others which take no part in a step of its optimizers used here.

    Where those are not installed, empty modules stand in while it is imported.
    """
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{pip} is not installed")
    absent = [name for name in needs if importlib.util.find_spec(name.split(".")[0]) is None]
    added: list[str] = []
    for name in absent:
        added += _stub(name, **needs[name])
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Missing(f"{pip} does not import: {error}") from error
    finally:
        for name in added:
            sys.modules.pop(name, None)


_VERSIONS = {"transformers.utils.versions": {"require_version": lambda requirement: None}}


def galore_torch() -> Any:
    """The package of the published GaLore; bitsandbytes is for its 8-bit variant."""
    stub = {"bitsandbytes.optim.optimizer": {"Optimizer2State": object}}
    return _imported("galore_torch", "galore-torch", {**_VERSIONS, **stub})


def galore_torch_adamw() -> Any:
    """The published GaLoreAdamW."""
    return galore_torch().GaLoreAdamW


def fira_adamw() -> Any:
    """The published FiraAdamW."""
    return _imported("fira", "fira", _VERSIONS).FiraAdamW


def apollo_adamw() -> Any:
    """The published APOLLOAdamW; bitsandbytes is for its 8-bit variant."""
    stub = {"bitsandbytes.optim.optimizer": {"Optimizer2State": object}}
    needs = {**_VERSIONS, **stub, "bitsandbytes.functional": {}}
    return _imported("apollo_torch", "apollo-torch", needs).APOLLOAdamW
