"""Checkpoints to go on from, the note beside them that says what is being trained on what, and what a resume needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..whole_files import write_whole
from .arguments import FalconTrainingArguments
from .batches import LengthGroupedOrder
from .errors import TrainingError
from .training_notes import TrainingNotes

# Fields of the drafter's config that training does not look at, so that a resume may change them.
_FREE_FIELDS = frozenset(
    {"tree", "lookup", "verifier", "auto_off", "code_stamp", "format_version", "target_name_or_path", "_name_or_path"}
    | {"architectures", "auto_map", "dtype", "transformers_version"}
)

# Transformers' own arguments that decide what a step does, besides ours; how long it all goes on may change.
_DECIDING = (
    *("seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("lr_scheduler_kwargs", "optim_args", "dataloader_drop_last"),
)
_MEMORY_ALONE = {"vocabulary_chunk"}


def deciding_arguments(args: FalconTrainingArguments) -> dict[str, Any]:
    """The arguments that a resume must not change: optimizer and schedule go on with the checkpoint's, the rest not."""
    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(args)} - base - _MEMORY_ALONE
    return {name: getattr(args, name) for name in [*_DECIDING, *sorted(own)]} | {"batch_size": args.rows_a_step}


class EndedError(Exception):
    """A resumed training has no step left: ``Trainer`` would look for the end behind another one."""


class AsIfWhole(TrainerCallback):
    """What ``Trainer`` does not take up again by itself after a resume.

    Attributes:
        order: of the dialogues, to be told its epoch: accelerate does not where it skips batches of several processes.
    """

    def __init__(self, notes: TrainingNotes) -> None:
        self.order: LengthGroupedOrder | None = None
        self._notes = notes

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Add to what was seen and taken before; log, evaluate and save as often as the arguments say now."""
        if state.global_step > 0:
            self._notes.resume(state.log_history)
            state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Tell the order.

        Raises:
            EndedError: if there is no step left, which is so at once or never.
        """
        if state.global_step >= state.max_steps:
            raise EndedError
        if self.order is not None:
            self.order.set_epoch(int((state.epoch or 0) + 1e-6))


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; one whose saving broke off lacks what is written last."""
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    whole = [path for path, step in steps.items() if step.isdigit() and (path / TRAINER_STATE_NAME).is_file()]
    return str(max(whole, key=lambda path: int(steps[path]))) if whole else None


def last_checkpoint(folder: Path, resume: bool) -> str | None:
    """The newest whole checkpoint, to go on from.

    Raises:
        TrainingError: one is there and nobody said whether to go on, or none is.
    """
    found = newest_checkpoint(folder)
    if resume and found is None:
        raise TrainingError(f"There is no checkpoint in {folder} to resume from.")
    if found is not None and not resume:
        raise TrainingError(f"{found} is of an earlier training: resume it, or name another output folder.")
    return found


def refuse_drafter(folder: Path) -> None:
    """See that no finished drafter would be overwritten, with what its recipe and card say.

    Raises:
        TrainingError: one is there, or a file.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is no folder: name another output folder.")
    if (folder / "config.json").is_file():
        raise TrainingError(f"{folder} holds a drafter already: name another output folder, or move it away.")


def check_resume(folder: Path, checkpoint: str | None, drafter: FalconDrafter, same: dict[str, Any]) -> None:
    """Note what is trained on what; on a resume, see that it is the same.

    Args:
        folder: of the checkpoints.
        checkpoint: the one to go on from, if any.
        drafter: whose shape must be the checkpoint's.
        same: what else must be: hashes of text and target, by the names to complain of them.

    Raises:
        TrainingError: another drafter, target or other text than the checkpoint's.
    """
    note = folder / "training.json"
    shape = {name: value for name, value in drafter.config.to_dict().items() if name not in _FREE_FIELDS}
    now = json.loads(json.dumps({**same, **shape}))
    if checkpoint is None:
        try:
            write_whole(note, json.dumps(now))
        except OSError as error:
            raise TrainingError(f"{note} cannot be written ({error.strerror}): name another output folder.") from error
        return
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else now
    # A field that is not noted there did not exist, or was not noted, when that training began.
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        raise TrainingError(
            f"The checkpoint in {folder} is of another training: {', '.join(changed)} changed. Resume with the same "
            "data and options, or name another output folder."
        )
