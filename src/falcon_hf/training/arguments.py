"""``FalconTrainingArguments``: what ``transformers.TrainingArguments`` has, and what CSGD, losses and rollout need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .errors import TrainingError

GLANCE_LOSSES = ("unreplaced", "all")


@dataclass
class FalconTrainingArguments(TrainingArguments):
    """Arguments of [`FalconTrainer`]; weights and schedules are the paper's unless the help says otherwise."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak; the paper has 3e-5 for 7B targets."})
    adam_beta2: float = field(default=0.95, metadata={"help": "The paper's."})
    weight_decay: float = field(default=0.05, metadata={"help": "On matrices."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps; below 1 a share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "As in TrainingArguments."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The columns are no arguments of the model."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Buffers never change in training, so there is nothing to broadcast."}
    )

    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the smooth-L1 loss of features."})
    smooth_l1_beta: float = field(default=1.0, metadata={"help": "Where smooth-L1 turns from square to line."})
    vocabulary_weight: float = field(default=0.1, metadata={"help": "Weight of KL and CE together."})
    kl_weight: float = field(default=0.9, metadata={"help": "Weight of KL within the vocabulary loss."})
    ce_weight: float = field(default=0.1, metadata={"help": "Weight of CE within the vocabulary loss."})
    vocabulary_chunk: int = field(default=256, metadata={"help": "Positions whose laws are in memory at once."})

    noise: float = field(default=0.1, metadata={"help": "Amplitude of the uniform noise on input features."})
    glance_lambda: float = field(
        default=0.4, metadata={"help": "lambda at the start of training, falling to 0 (CSGD); 0 turns glancing off."}
    )
    glance_longest_run: int | None = field(
        default=None,
        metadata={
            "help": "Replaced columns a block at most. By default k - 1 (1 for k = 1): k leaves nothing to draft."
        },
    )
    glance_loss: str = field(
        default="unreplaced",
        metadata={"help": "'unreplaced': no loss where the pair was replaced by the answer (GLAT's rule); or 'all'."},
    )
    first_pass_share: float = field(
        default=1.0,
        metadata={
            "help": "Share of the batch's rows whose Hamming distance is taken, rounded to 1/n, at least one row; "
            "the others get those rows' error rate."
        },
    )

    rollout_passes: int = field(
        default=1, metadata={"help": "Passes in training; from the second on over the drafter's own features."}
    )
    rollout_share: float = field(default=0.25, metadata={"help": "Share of the rows that go on to further passes."})
    rollout_weight: float = field(default=1.0, metadata={"help": "Weight of a further pass's position."})
    rollout_start: float = field(default=0.4, metadata={"help": "Progress, 0 to 1, at which further passes begin."})

    correction_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight, within the vocabulary loss, of laws corrected for the token before (correction_rank)."
        },
    )

    @property
    def rows_a_step(self) -> int:
        """Rows of one optimizer step: of all processes and accumulated batches."""
        # Not train_batch_size, which counts all GPUs of a process: FalconTrainer takes one.
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return rows * max(1, self.world_size)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "feature_weight",
            "vocabulary_weight",
            "kl_weight",
            "ce_weight",
            "noise",
            "rollout_weight",
            "correction_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("glance_lambda", "rollout_share", "rollout_start", "first_pass_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if self.glance_lambda > 0 and self.first_pass_share <= 0:
            raise ValueError("first_pass_share must be above 0 while glance_lambda is: N = lambda * d needs a d.")
        if self.glance_loss not in GLANCE_LOSSES:
            raise ValueError(f"glance_loss must be one of {', '.join(GLANCE_LOSSES)}, got {self.glance_loss!r}.")
        if self.rollout_passes < 1 or self.vocabulary_chunk < 1 or self.smooth_l1_beta <= 0:
            raise ValueError("rollout_passes and vocabulary_chunk must be at least 1, and smooth_l1_beta positive.")
        if self.glance_longest_run is not None and self.glance_longest_run < 1:
            raise ValueError("glance_longest_run must be at least 1; glance_lambda=0 turns glancing off.")


def check_rollout(args: FalconTrainingArguments, config: Any) -> None:
    """See that a drafter of this config can go on to further passes, if it is to.

    Raises:
        TrainingError: if it cannot.
    """
    if args.rollout_passes > 1 and config.fusion == "lstm":
        raise TrainingError(
            "A rollout would have to carry the LSTM's states from pass to pass: train with rollout_passes=1, or "
            "with fusion 'linear' or 'lstm_stateless'."
        )
    pieces = args.fsdp or args.deepspeed
    if pieces and args.rollout_passes > 1 and 0 < args.per_device_train_batch_size * args.rollout_share < 1:
        # A process without such a row would gather the layers' pieces fewer times than the others, and all would wait.
        raise TrainingError(
            "With fsdp or deepspeed every process needs a row that goes on to further passes: "
            f"{args.rollout_share:g} of {args.per_device_train_batch_size} rows is none. Raise batch size or "
            "rollout_share, or set rollout_passes=1."
        )
