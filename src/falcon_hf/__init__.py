"""Falcon speculative decoding for Hugging Face ``generate()``: the same text, sooner.

Importing this package routes ``target.generate(assistant_model=drafter)`` for Falcon drafters (see ``install``).
Unrelated to transformers' own model family "falcon" (TII's).
"""

from transformers import AutoConfig, AutoModel

from .compiled_decoding import compiled
from .demo_target import load_demo_target
from .hub.find import find_drafter
from .runtime.candidate_generator import FalconCandidateGenerator
from .runtime.configuration_falcon_drafter import FalconDrafterConfig
from .runtime.generation import FalconGenerationMixin
from .runtime.modeling_falcon_drafter import FalconDrafter
from .runtime.repo_files import CodeStampWarning
from .runtime.routing import install, uninstall
from .runtime.statistics import GenerationStatistics
from .runtime.target import TargetMismatchWarning
from .runtime.tree import DraftTree
from .runtime.tree_shape import TreeShape
from .version import __version__

# An installed falcon_hf loads drafters without remote code; save_pretrained writes the code beside the weights.
AutoConfig.register(FalconDrafterConfig.model_type, FalconDrafterConfig, exist_ok=True)
AutoModel.register(FalconDrafterConfig, FalconDrafter, exist_ok=True)

__all__ = [
    "CodeStampWarning",
    "DraftTree",
    "FalconCandidateGenerator",
    "FalconDrafter",
    "FalconDrafterConfig",
    "FalconGenerationMixin",
    "GenerationStatistics",
    "TargetMismatchWarning",
    "TreeShape",
    "__version__",
    "compiled",
    "find_drafter",
    "install",
    "load_demo_target",
    "uninstall",
]
