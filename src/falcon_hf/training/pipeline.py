"""From text and target to a trained drafter's folder: what ``falcon-hf train`` does, from Python."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..drafter_loading import DrafterError, load_drafter
from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target import fingerprint, head_weight, input_embeddings
from .allocator import keep_freed_memory
from .arguments import FalconTrainingArguments
from .batches import DialogueDataset
from .dataset import TrainingData, load_training_data, split
from .distilled_features import find_distilled_features
from .draft_vocabulary import choose_draft_vocabulary, coverage
from .errors import TrainingError
from .features import (
    FeatureCache,
    Progress,
    cache_fits,
    cache_key,
    compute_features,
    estimate_bytes,
    feature_width,
    free_bytes,
    is_complete,
)
from .initialisation import embedding_scale, near_identity_start, start_from_target_layers, typical_sizes
from .laws import LawCache
from .losses import DraftHead
from .recipe import data_recipe, make_recipe
from .trainer import FalconTrainer

logger = logging.getLogger(__name__)

FEATURE_MODES = ("auto", "cached", "live")
SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE_DIALOGUES = 16
# Fields of the drafter's config that training does not look at, so that a resume may change them.
_FREE_FIELDS = frozenset(
    {"tree", "lookup", "verifier", "auto_off", "code_stamp", "format_version", "target_name_or_path", "_name_or_path"}
    | {"architectures", "auto_map", "dtype", "transformers_version"}
)

Report = Callable[[str], None]


@dataclass
class TrainingPlan:
    """Everything a training is made of, besides [`FalconTrainingArguments`].

    Attributes:
        data: folder or file of training text (see [`load_training_data`]).
        output: folder of the drafter.
        held_out: dialogues at the data's end that are only evaluated on.
        max_length: tokens kept of a dialogue.
        features: "cached", "live" (computed for every batch), or "auto": cached if half of the free disk has room.
        cached_laws: keep the target's laws on disk as well, where features are; a faster step for as much disk again.
        cache: folder of the feature cache; by default one below ~/.cache/falcon_hf, named for target and text.
        block_size: k.
        fusion: see [`FalconDrafterConfig`].
        draft_vocab_size: tokens drafted over; None for all of a small vocabulary, 8,192 of one above 16,384.
        tree: paths of the drafter's tree, None for the paper's.
        config: further fields of the drafter's config, such as ``num_hidden_layers``.
        target_layers: whether the decoder layers start as the target's last (see [`start_from_target_layers`]).
        init_from: folder or Hub repo of a drafter to go on from; its config is kept, but for the target's name, and the
            tree if one is given. Fields that say what a new drafter is like are refused.
        lora_rank: train low-rank additions to that drafter only, merged in at the end; 0 trains all weights.
        save_dtype: of the saved weights.
    """

    data: Path
    output: Path
    held_out: int = 100
    max_length: int = 512
    features: str = "auto"
    cached_laws: bool = True
    cache: Path | None = None
    block_size: int = 2
    fusion: str = "linear"
    draft_vocab_size: int | None = None
    tree: list[list[int]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    target_layers: bool = False
    init_from: str | None = None
    lora_rank: int = 0
    save_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.features not in FEATURE_MODES:
            raise TrainingError(f"features must be one of {', '.join(FEATURE_MODES)}, got {self.features!r}.")
        if self.save_dtype not in SAVED_DTYPES:
            raise TrainingError(f"save_dtype must be one of {', '.join(SAVED_DTYPES)}, got {self.save_dtype!r}.")
        if self.lora_rank and self.init_from is None:
            raise TrainingError("lora_rank adapts a trained drafter: name it as init_from.")
        if self.init_from is not None and (given := self._shape_given()):
            raise TrainingError(
                f"init_from goes on with {self.init_from} as it is, and cannot change its {', '.join(given)}: leave "
                f"out {'that' if len(given) == 1 else 'those'}, or train a new drafter without init_from."
            )

    def _shape_given(self) -> list[str]:
        """The fields that say what a new drafter is like and are not as by default; config's by their own names."""
        fields = type(self).__dataclass_fields__
        names = ("block_size", "fusion", "draft_vocab_size", "target_layers")
        return [name for name in names if getattr(self, name) != fields[name].default] + list(self.config)


def default_learning_rate(hidden_size: int) -> float:
    """1e-3 at H = 576, 3e-5 at the paper's 4,096, a power law between and beyond; 1e-3 at most."""
    return min(1e-3, 1e-3 * (576 / hidden_size) ** 1.79)


def train_drafter(
    plan: TrainingPlan,
    args: FalconTrainingArguments,
    target: PreTrainedModel,
    tokenizer: Any = None,
    resume: bool = False,
    report: Report | None = None,
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
        progress: called while features are computed.
        callbacks: for the trainer.
        provenance: goes into the recipe as it is.

    Raises:
        TrainingError: whatever the user can solve about data, cache and options.
    """
    say = report or logger.info
    keep_freed_memory()
    vocab_size = int(target.config.get_text_config().vocab_size)
    data = load_training_data(plan.data, vocab_size, plan.max_length)
    train, held_out = split(data, plan.held_out)
    say(
        f"{len(train)} dialogues of {len(train.tokens):,} tokens to train on ({int(train.loss_mask.sum()):,} to be "
        f"learned), {len(held_out)} held out"
    )
    torch.manual_seed(args.seed)  # weights of a new drafter; what transformers.Trainer does as well
    drafter = make_drafter(plan, target, train, held_out, tokenizer, say)
    feature_layers = drafter.config.feature_layers
    with args.main_process_first(local=False, desc="features"):
        cache = _features(plan, target, data, feature_layers, say, progress)
        laws = None
        if plan.cached_laws and cache is not None and drafter.config.logit_softcap is None:
            say("the target's laws over the draft vocabulary, once for all epochs")
            laws = LawCache.build(cache, _law_head(drafter, target, args), progress)
    model: Any = drafter
    if plan.lora_rank:
        model = _with_lora(drafter, plan.lora_rank)
    trainer = FalconTrainer(
        model,
        args,
        target,
        DialogueDataset(train, cache, 0, laws),
        DialogueDataset(held_out, cache, len(train)) if len(held_out) else None,
        callbacks=callbacks,
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)
    started = time.time()
    checkpoint = _last_checkpoint(Path(args.output_dir or "."), resume)
    if trainer.is_world_process_zero():
        _check_resume(Path(args.output_dir or "."), checkpoint, drafter, data.sha256(), plan.lora_rank)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (OSError, SafetensorError) as error:  # no room for a checkpoint
        raise TrainingError(
            f"The training broke off: {error}. The last whole checkpoint in {args.output_dir} is as it was: make room "
            "and resume."
        ) from error
    if len(held_out) and not _evaluated(trainer):
        trainer.evaluate()
    if trainer.is_world_process_zero():
        drafter = _finish(trainer, plan)
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
                "recipe": data_recipe(plan.data),
            },
            history=trainer.state.log_history,
            run={
                "steps": trainer.state.global_step,
                "positions_seen": trainer.positions_seen * max(1, args.world_size),
                "seconds": round(time.time() - started, 1),
                "peak_memory_bytes": peak_memory(),
                "parameters": drafter.num_parameters(),
            },
            provenance=provenance or {},
        )
        (plan.output / "recipe.json").write_text(json.dumps(recipe, indent=2), encoding="utf-8")
        say(f"saved to {plan.output}")
    return drafter


def make_drafter(
    plan: TrainingPlan,
    target: PreTrainedModel,
    train: TrainingData,
    held_out: TrainingData,
    tokenizer: Any = None,
    report: Report | None = None,
) -> FalconDrafter:
    """A new drafter that starts near the identity, over a draft vocabulary of the text's most frequent tokens.

    Or, with ``plan.init_from``, that drafter.

    Raises:
        TrainingError: if the config is impossible, or the drafter was made for another kind of target.
    """
    say = report or logger.info
    text = target.config.get_text_config()
    if plan.init_from is not None:
        try:
            drafter = load_drafter(plan.init_from, torch.float32)
        except DrafterError as error:
            raise TrainingError(str(error)) from error
        config = drafter.config
        if (config.vocab_size, config.hidden_size) != (text.vocab_size, text.hidden_size):
            raise TrainingError(
                f"{plan.init_from} was made for a target of width {config.hidden_size} and {config.vocab_size} tokens; "
                f"this one has {text.hidden_size} and {text.vocab_size}."
            )
        if plan.tree is not None:
            drafter.config.tree = plan.tree
        # It is this target's from now on: what generate() compares.
        config.target_name_or_path = getattr(target.config, "_name_or_path", None) or None
        config.target_model_type = text.model_type
        config.target_fingerprint = fingerprint(target)
        return drafter.train()
    vocab_size = int(text.vocab_size)
    size = plan.draft_vocab_size or (8192 if vocab_size > 16384 else None)
    overrides = {"tree": plan.tree, "draft_vocab_size": None if size == vocab_size else size, **plan.config}
    feature_size, embedding_size = _typical_sizes(target, train)
    scale = overrides.setdefault("embedding_scale", embedding_scale(feature_size, embedding_size))
    try:
        config = FalconDrafterConfig.from_target(target, block_size=plan.block_size, fusion=plan.fusion, **overrides)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"No such drafter: {error}") from error
    layers, last = config.feature_layers, int(text.num_hidden_layers)
    if layers is not None and layers[-1] != last:
        raise TrainingError(
            f"feature_layers must end with {last}, the target's num_hidden_layers, because the drafter estimates that "
            f"hidden state; got {layers}."
        )
    drafter = FalconDrafter(config)
    if plan.target_layers:
        start_from_target_layers(drafter, target)
    near_identity_start(drafter, feature_size, embedding_size)
    if config.feature_layers is not None:
        drafter.standardise(_sample_features(target, train, config.feature_layers))
    say(
        f"drafter of {drafter.num_parameters():,} parameters, k = {config.block_size}, {config.fusion} fusion, "
        f"embeddings times {scale:g} (features are of size {feature_size:.3g}, embeddings {embedding_size:.3g})"
    )
    if config.draft_vocab_size is not None:
        ids = choose_draft_vocabulary(train, config.draft_vocab_size, vocab_size, _control_tokens(target, tokenizer))
        assert drafter.draft_vocab_ids is not None
        drafter.draft_vocab_ids.copy_(torch.from_numpy(ids))
        shares = [f"{coverage(part, ids, vocab_size):.1%}" for part in (train, held_out) if len(part)]
        say(f"draft vocabulary of {len(ids)} tokens: {' of the training text, '.join(shares)} of the held-out text")
    return drafter.train()


def peak_memory() -> int | None:
    """Bytes of memory that this process has had at most; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def default_cache_folder(key: dict[str, Any]) -> Path:
    """Where features go unless a folder is named: one folder a target and text."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    layers = "-".join(map(str, key["feature_layers"] or ["last"]))
    return root / "falcon_hf" / "features" / f"{key['target'][:16]}-{key['data'][:16]}-{key['max_length']}-{layers}"


def _features(
    plan: TrainingPlan,
    target: PreTrainedModel,
    data: TrainingData,
    feature_layers: list[int] | None,
    say: Report,
    progress: Progress | None,
) -> FeatureCache | None:
    """The feature cache, filled with features that came with the text if any did; None for features on the fly."""
    if plan.features == "live":
        say("features are computed on the fly")
        return None
    key = cache_key(target, data, plan.max_length, feature_layers)
    folder = (plan.cache or default_cache_folder(key)).expanduser()
    size = estimate_bytes(len(data.tokens), feature_width(target, feature_layers))
    begun = (folder / "index.json").is_file()
    say(f"features take {size / 1e9:.2f} GB in {folder} ({free_bytes(folder) / 1e9:.0f} GB free)")
    if not begun and plan.features == "auto" and not cache_fits(folder, size):
        say("that is more than half of what is free: features are computed on the fly")
        return None
    distilled = None if is_complete(folder) else find_distilled_features(plan.data, target, data, feature_layers)
    if distilled is not None:
        say(f"they came with the text in {plan.data}")
    ready = None if distilled is None else distilled.rows
    return FeatureCache.build(folder, target, data, key, feature_layers, progress, ready=ready)


def _law_head(drafter: FalconDrafter, target: PreTrainedModel, args: FalconTrainingArguments) -> DraftHead:
    """The head that the trainer will use."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else drafter.dtype
    weight = drafter.draft_head(head_weight(target)).to(args.device, dtype).contiguous()
    return DraftHead(weight, drafter.config.logit_scale)


def _typical_sizes(target: PreTrainedModel, data: TrainingData) -> tuple[float, float]:
    """Standard deviations of features and embeddings over the first dialogues."""
    with torch.no_grad():
        embeddings = [input_embeddings(target, ids)[0] for ids in _sample(target, data)]
    return typical_sizes([_sample_features(target, data, None)], embeddings)


def _sample(target: PreTrainedModel, data: TrainingData) -> list[torch.Tensor]:
    """The first dialogues, ``[1, n]`` ids each, where the target is."""
    rows = range(min(_SAMPLE_DIALOGUES, len(data)))
    parts = [data.tokens[data.offsets[row] : data.offsets[row + 1]] for row in rows]
    return [torch.from_numpy(part.astype(np.int64))[None].to(target.device) for part in parts]


def _sample_features(target: PreTrainedModel, data: TrainingData, feature_layers: list[int] | None) -> torch.Tensor:
    """``[n, W]`` features of the first dialogues."""
    parts = [compute_features(target, ids, torch.ones_like(ids), feature_layers)[0] for ids in _sample(target, data)]
    return torch.cat(parts)


def _control_tokens(target: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ends of text and turn, which must be draftable however rare the data has them."""
    configured = [target.config.get_text_config().eos_token_id]
    generation = getattr(target, "generation_config", None)
    configured += [getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    tokens: list[int] = []
    for entry in configured:
        tokens += entry if isinstance(entry, list) else [] if entry is None else [entry]
    return tokens


def _with_lora(drafter: FalconDrafter, rank: int) -> Any:
    """A peft model whose low-rank additions sit on every matrix of the decoder layers and the fusion."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if drafter.fusion.kind == "linear":
        names.append("linear")
    return get_peft_model(drafter, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0))


def _last_checkpoint(folder: Path, resume: bool) -> str | None:
    """The newest whole checkpoint, to go on from; one whose saving broke off lacks what is written last.

    Raises:
        TrainingError: one is there and nobody said whether to go on, or none is.
    """
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    whole = [path for path, step in steps.items() if step.isdigit() and (path / TRAINER_STATE_NAME).is_file()]
    found = str(max(whole, key=lambda path: int(steps[path]))) if whole else None
    if resume and found is None:
        raise TrainingError(f"There is no checkpoint in {folder} to resume from.")
    if found is not None and not resume:
        raise TrainingError(f"{found} is of an earlier training: resume it, or name another output folder.")
    return found


def _check_resume(folder: Path, checkpoint: str | None, drafter: FalconDrafter, data: str, lora_rank: int) -> None:
    """Note what is trained on what; on a resume, see that it is the same.

    Raises:
        TrainingError: another drafter or other text than the checkpoint's.
    """
    note = folder / "training.json"
    shape = {name: value for name, value in drafter.config.to_dict().items() if name not in _FREE_FIELDS}
    now = json.loads(json.dumps({"data": data, "lora_rank": lora_rank, **shape}))
    if checkpoint is None:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(now), encoding="utf-8")
        return
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else now
    # A field that is not noted there did not exist, or was not noted, when that training began.
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        raise TrainingError(
            f"The checkpoint in {folder} is of another training: {', '.join(changed)} changed. Resume with the same "
            "data and options, or name another output folder."
        )


def _evaluated(trainer: FalconTrainer) -> bool:
    """Whether the last step was evaluated already."""
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(last) and last[-1]["step"] == trainer.state.global_step


def _finish(trainer: FalconTrainer, plan: TrainingPlan) -> FalconDrafter:
    """Merge, round and save the trained drafter."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    drafter: FalconDrafter = model.merge_and_unload() if plan.lora_rank else model
    drafter.eval().to(SAVED_DTYPES[plan.save_dtype])
    drafter.save_pretrained(plan.output)
    return drafter
