"""From text and target to a trained drafter's folder: what ``falcon-hf train`` does, from Python."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..drafter_loading import DrafterError, drafter_folder
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..whole_files import write_whole
from .allocator import keep_freed_memory
from .arguments import FalconTrainingArguments, check_rollout
from .batches import DialogueDataset
from .dataset import joined, load_training_data, rows_not_in, split
from .errors import TrainingError
from .feature_source import prepare_features
from .features import Progress, held_digest, target_digest
from .laws import LawCache
from .new_drafter import make_drafter
from .plan import SAVED_DTYPES, TrainingPlan
from .recipe import data_recipe, make_recipe
from .resuming import check_resume, deciding_arguments, last_checkpoint, refuse_drafter
from .trainer import FalconTrainer
from .training_head import training_head

logger = logging.getLogger(__name__)


def default_learning_rate(hidden_size: int) -> float:
    """1e-3 at H = 576, 3e-5 at the paper's 4,096, a power law between and beyond; 1e-3 at most."""
    return min(1e-3, 1e-3 * (576 / hidden_size) ** 1.79)


def train_drafter(
    plan: TrainingPlan,
    args: FalconTrainingArguments,
    target: PreTrainedModel,
    tokenizer: Any = None,
    resume: bool = False,
    report: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    callbacks: list[TrainerCallback] | None = None,
    provenance: dict[str, Any] | None = None,
) -> FalconDrafter:
    """Train and save a drafter; the folder has weights, config, code and ``recipe.json``.

    Args:
        plan: data, drafter and features.
        args: the trainer's; ``output_dir`` holds the checkpoints.
        target: the target.
        tokenizer: its tokenizer; only its control tokens are read.
        resume: go on from the last checkpoint in ``args.output_dir``.
        report: told in a line what is being done.
        progress: called while features, and the target's laws, are computed.
        callbacks: for the trainer.
        provenance: goes into the recipe as it is.

    Raises:
        TrainingError: whatever the user can solve about data, cache and options.
    """
    say = report or logger.info
    if plan.lora_rank and (args.fsdp or args.deepspeed):
        raise TrainingError("lora_rank cannot be merged from pieces: leave out fsdp and deepspeed; DDP works.")
    if args.fsdp and args.device.type == "cpu":
        raise TrainingError("On CPUs accelerate ignores fsdp, every process trains the whole drafter: leave it out.")
    keep_freed_memory()
    checkpoints = Path(args.output_dir or ".")
    checkpoint = last_checkpoint(checkpoints, resume)
    if checkpoint is None:
        refuse_drafter(plan.output)
    home = target.device
    vocab_size = int(target.config.get_text_config().vocab_size)
    texts = [load_training_data(path, vocab_size, plan.max_length) for path in plan.data]
    data = joined(texts)
    train, held_out = split(data, plan.held_out)
    rows = rows_not_in(train, held_out)  # caches are of all the data, and count as it does
    if not len(rows):
        raise TrainingError("Every dialogue to train on is among those held out: lower held_out, or add text.")
    if len(rows) < len(train):
        say(f"{len(train) - len(rows)} dialogues are among those held out, and not trained on")
        train = train.subset(rows)
    say(
        f"{len(train)} dialogues of {len(train.tokens):,} tokens to train on ({int(train.loss_mask.sum()):,} to be "
        f"learned), {len(held_out)} held out"
    )
    # What the drafter to go on from was made of, its own ancestors included.
    started_from = None if plan.init_from is None else _drafter_recipe(plan.init_from)
    if isinstance(started_from, dict):
        started_from.pop("card", None)  # words about that drafter, not about how it came to be
    torch.manual_seed(args.seed)  # weights of a new drafter; what transformers.Trainer does as well
    drafter = make_drafter(plan, target, train, held_out, tokenizer, say)
    check_rollout(args, drafter.config)  # the trainer does, but after the features
    if args.process_index == 0:
        same: dict[str, Any] = {"data": data.sha256(), "held_out": len(held_out), "lora_rank": plan.lora_rank}
        same["init_from"] = None if plan.init_from is None else target_digest(drafter)
        same |= {"target_digest": held_digest(target), **deciding_arguments(args)}
        check_resume(checkpoints, checkpoint, drafter, same)
    keeps_laws = plan.cached_laws and drafter.config.logit_softcap is None
    if plan.cached_laws and not keeps_laws:
        say("the target's laws are not kept: its head has a softcap")
    with args.main_process_first(local=False, desc="features"):
        cache = prepare_features(plan, target, texts, data, drafter.config.feature_layers, say, progress, keeps_laws)
        laws = None
        if keeps_laws and cache is not None:
            say("the target's laws over the draft vocabulary, once for all epochs")
            laws = LawCache.build(cache, training_head(drafter, target, args), progress)
    model: Any = drafter
    if plan.lora_rank:
        model = _with_lora(drafter, plan.lora_rank)
    trainer = FalconTrainer(
        model,
        args,
        target,
        DialogueDataset(train, cache, rows, laws),
        DialogueDataset(held_out, cache, np.arange(len(data))[-len(held_out) :]) if len(held_out) else None,
        callbacks=callbacks,
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)
    with _disk_errors(checkpoints):
        trainer.train(resume_from_checkpoint=checkpoint)
    if len(held_out) and not _evaluated(trainer):
        trainer.evaluate()
    with _disk_errors(checkpoints):
        drafter = _finish(trainer, plan)
    placed = getattr(target, "hf_device_map", None) is not None
    if not placed and target.get_input_embeddings().weight.device != home:
        target.to(home)  # the trainer took its embeddings to where it trained
    if trainer.is_world_process_zero():
        recipe = make_recipe(
            plan=asdict(plan),
            args=args,
            target=target,
            data={
                "sha256": data.sha256(),
                "dialogues": len(train),
                "tokens": len(train.tokens),
                "learned_tokens": int(train.loss_mask.sum()),
                "held_out_dialogues": len(held_out),
                "texts": [
                    {"sha256": text.sha256(), "dialogues": len(text), "recipe": data_recipe(path)}
                    for path, text in zip(plan.data, texts, strict=True)
                ],
            },
            history=trainer.state.log_history,
            run={
                "steps": trainer.state.global_step,
                "positions_seen": trainer.positions_seen * max(1, args.world_size),
                "seconds": round(trainer.seconds, 1),
                "peak_memory_bytes": peak_memory(),
                "parameters": drafter.num_parameters(),
            },
            provenance=(provenance or {}) | ({"started_from": started_from} if started_from else {}),
        )
        with _disk_errors(checkpoints):
            write_whole(plan.output / "recipe.json", json.dumps(recipe, indent=2))
        say(f"saved to {plan.output}")
    return drafter


def _drafter_recipe(source: str) -> Any:
    """The recipe of the drafter at ``source``, a folder or a Hub repo, if it has one.

    Raises:
        TrainingError: if there is no such drafter.
    """
    try:
        return data_recipe(drafter_folder(source))
    except DrafterError as error:
        raise TrainingError(str(error)) from error


@contextlib.contextmanager
def _disk_errors(checkpoints: Path) -> Iterator[None]:
    """A file that cannot be written is the user's to solve; nothing that was whole is lost.

    Raises:
        TrainingError: saying how to go on.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save writes by code of its own, whose errors are no OSErrors.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise TrainingError(
            f"The training broke off: {' '.join(str(error).split())}. The last whole checkpoint in {checkpoints} is as "
            "it was: make room and resume."
        ) from error


def peak_memory() -> int | None:
    """Bytes of memory that this process has had at most; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _with_lora(drafter: FalconDrafter, rank: int) -> Any:
    """A peft model whose low-rank additions sit on every matrix of the decoder layers and of a linear fusion."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if drafter.fusion.kind == "linear":
        names.append("linear")
    return get_peft_model(drafter, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0))


def _evaluated(trainer: FalconTrainer) -> bool:
    """Whether the last step was evaluated already."""
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(last) and last[-1]["step"] == trainer.state.global_step


def _finish(trainer: FalconTrainer, plan: TrainingPlan) -> FalconDrafter:
    """Merge and round the trained drafter, and save it from the main process; all processes call this."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    model = trainer.accelerator.unwrap_model(trainer.model)
    drafter: FalconDrafter = model.merge_and_unload() if plan.lora_rank else model
    dtype = SAVED_DTYPES[plan.save_dtype]
    if state is None:
        drafter.eval().to(dtype)
    else:  # the weights here are pieces
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    if trainer.is_world_process_zero():
        drafter.save_pretrained(plan.output, state_dict=state)
    return drafter
