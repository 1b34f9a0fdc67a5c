"""Drop-in ``torch.optim`` classes for matrix-aware and memory-lean methods."""

import gc

# The imports below make enough objects to start full collections, which would walk over all of
# torch's. While these are frozen that takes no time; a user's own frozen ones are left alone.
_FREEZES = gc.get_freeze_count() == 0
if _FREEZES:
    gc.freeze()

from ..kernels import polar_report
from . import _aliases
from ._core.rule import (
    BlockPosition,
    Dense,
    Direction,
    Factored,
    Member,
    PanelTerm,
    Rule,
    Scaled,
    Selected,
    Slot,
)
from ._driver.clipping import clip_grad_norm_
from ._driver.memory import MemoryReport, memory_report
from ._driver.optimizer import StackedOptimizer
from ._driver.placement import longest_dim_placement
from ._driver.qk_clip import qk_clip_
from ._lora.pair_groups import lora_param_groups, pairs_to_groups
from ._lora.switching import switchlora_init_
from ._roles.classify import Assignment, classify
from ._toolkit.max_logits import MaxLogits
from .adaprelora import AdaPreLoRA
from .altlora import AltLoRA
from .apollo import APOLLO
from .aro import ARO
from .auon import AuON
from .dctadamw import DCTAdamW
from .fira import Fira
from .frugal import FRUGAL
from .galore import GaLore
from .hybrid import Hybrid
from .muon import Muon, heavy_tail_schedule
from .muown import Muown
from .rownorm import RowNorm
from .sinkgd import SinkGD
from .soap import SOAP, SOAPMuon
from .spectral import Spectral
from .switchlora import SwitchLoRA
from .symmetry import SymmetryStack
from .trion import Trion
from .width import PowerLR, width_groups

__version__ = "0.2.0"

__all__ = [
    "APOLLO",
    "ARO",
    "FRUGAL",
    "SOAP",
    "AdaPreLoRA",
    "AltLoRA",
    "Assignment",
    "AuON",
    "BlockPosition",
    "DCTAdamW",
    "Dense",
    "Direction",
    "Factored",
    "Fira",
    "GaLore",
    "Hybrid",
    "MaxLogits",
    "Member",
    "MemoryReport",
    "Muon",
    "Muown",
    "PanelTerm",
    "PowerLR",
    "RowNorm",
    "Rule",
    "SOAPMuon",
    "Scaled",
    "Selected",
    "SinkGD",
    "Slot",
    "Spectral",
    "StackedOptimizer",
    "SwitchLoRA",
    "SymmetryStack",
    "Trion",
    "classify",
    "clip_grad_norm_",
    "heavy_tail_schedule",
    "longest_dim_placement",
    "lora_param_groups",
    "memory_report",
    "pairs_to_groups",
    "polar_report",
    "qk_clip_",
    "switchlora_init_",
    "width_groups",
]

_aliases.register()
if _FREEZES:
    gc.unfreeze()
