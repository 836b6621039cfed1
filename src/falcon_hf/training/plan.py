"""What a training is made of, besides the trainer's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import TrainingError

FEATURE_MODES = ("auto", "cached", "live")
SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainingPlan:
    """Everything a training is made of, besides [`FalconTrainingArguments`].

    Attributes:
        data: folders or files of training text (see [`load_training_data`]), joined in that order.
        output: folder of the drafter.
        held_out: dialogues at the end of the last text that are only evaluated on.
        max_length: tokens kept of a dialogue.
        features: "cached", "live" (computed for every batch), or "auto": cached if half of the free disk has room.
        cached_laws: keep the target's laws on disk as well, where features are; a faster step for as much disk again.
        cache: folder of the feature cache; by default one below ~/.cache/falcon_hf, named for target and text.
        block_size: k.
        fusion: see [`FalconDrafterConfig`].
        draft_vocab_size: tokens drafted over; None for all of a small vocabulary, 8,192 of one above 16,384.
        tree: the drafter's, paths or a dynamic one's entry; None for the paper's, or with ``init_from`` for its own.
        config: further fields of the drafter's config, such as ``num_hidden_layers``.
        target_layers: whether the decoder layers start as the target's last (see [`start_from_target_layers`]).
        init_from: folder or Hub repo of a drafter to go on from; its config is kept, but for the target's name, and the
            tree if one is given. Fields that say what a new drafter is like are refused, but for what it can gain: a
            ``correction_rank`` where it has none, and a larger ``draft_vocab_size``.
        lora_rank: train low-rank additions to that drafter only, merged in at the end; 0 trains all weights.
        save_dtype: of the saved weights.
    """

    data: list[Path]
    output: Path
    held_out: int = 100
    max_length: int = 512
    features: str = "auto"
    cached_laws: bool = True
    cache: Path | None = None
    block_size: int = 2
    fusion: str = "linear"
    draft_vocab_size: int | None = None
    tree: list[list[int]] | dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    target_layers: bool = False
    init_from: str | None = None
    lora_rank: int = 0
    save_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not self.data:
            raise TrainingError("There is no training text: name at least one folder or file as data.")
        if self.features not in FEATURE_MODES:
            raise TrainingError(f"features must be one of {', '.join(FEATURE_MODES)}, got {self.features!r}.")
        if self.save_dtype not in SAVED_DTYPES:
            raise TrainingError(f"save_dtype must be one of {', '.join(SAVED_DTYPES)}, got {self.save_dtype!r}.")
        if self.lora_rank and self.init_from is None:
            raise TrainingError("lora_rank adapts a trained drafter: name it as init_from.")
        if self.lora_rank and "correction_rank" in self.config:
            raise TrainingError(
                "lora_rank would leave the new correction untrained: train that first, without lora_rank."
            )
        if self.init_from is not None and (given := self._shape_given()):
            raise TrainingError(
                f"init_from goes on with {self.init_from} as it is, and cannot change its {', '.join(given)}: leave "
                f"out {'that' if len(given) == 1 else 'those'}, or train a new drafter without init_from."
            )

    @staticmethod
    def check_feature_layers(layers: list[int] | None, last: int) -> None:
        """Refuse feature layers that do not end with the target's last, whose state a drafter estimates.

        Raises:
            TrainingError: naming that layer.
        """
        if layers is not None and layers[-1] != last:
            raise TrainingError(
                f"feature_layers must end with {last}, the target's num_hidden_layers, because the drafter estimates "
                f"that hidden state; got {layers}."
            )

    def _shape_given(self) -> list[str]:
        """The fields that say what a new drafter is like and are not as by default; config's by their own names."""
        fields = type(self).__dataclass_fields__
        names = ("block_size", "fusion", "target_layers")
        shape = [name for name in names if getattr(self, name) != fields[name].default]
        return shape + [name for name in self.config if name != "correction_rank"]
