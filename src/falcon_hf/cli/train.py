"""``falcon-hf train``: a drafter for a target, from text that the target wrote."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..drafter_loading import LOADING_ERRORS
from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from .console import (
    AUTO,
    DTYPE_HELP,
    fail,
    parse_device,
    parse_dtype,
    parse_named_values,
    parse_numbers,
    quiet,
    refuse_options,
    set_threads,
    stderr,
)
from .loading import DEMO, load_target
from .training_progress import TrainingProgress, feature_bar

_OPTION_HELP = (
    "Any other field of FalconTrainingArguments (so of transformers.TrainingArguments), NAME=JSON, such as "
    "rollout_weight=0.5 or gradient_accumulation_steps=4; may be given repeatedly."
)


def train(
    command: typer.Context,
    data: Annotated[
        list[Path],
        typer.Option(
            help="Folder of `falcon-hf distill` (or Dataset.save_to_disk), or a .jsonl or .jsonl.gz file; repeatable."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the drafter; checkpoints go into its subfolder checkpoints.")
    ],
    target: Annotated[str, typer.Option(help="Hub repo or folder of the target, or 'demo'.")] = DEMO,
    init_from: Annotated[
        str | None, typer.Option(help="Folder or Hub repo of a drafter to go on from, instead of a new one.")
    ] = None,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="With --init-from: train only low-rank additions, merged in at the end.")
    ] = 0,
    block_size: Annotated[int, typer.Option(min=1, help="k, tokens drafted in a pass.")] = 2,
    fusion: Annotated[str, typer.Option(help="linear, lstm (the paper's) or lstm_stateless.")] = "linear",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers of the drafter.")] = 1,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens drafted over, the text's most frequent; with --init-from its own and those. "
            "[default: 8192, or all of 16384]"
        ),
    ] = None,
    feature_layers: Annotated[
        str | None, typer.Option(help="Hidden states that make a feature, such as 10,20,30; the last alone by default.")
    ] = None,
    tree: Annotated[Path | None, typer.Option(help="JSON file of the drafter's tree, [[0], [1], [0, 0]].")] = None,
    config: Annotated[
        list[str] | None, typer.Option(help="Any other field of FalconDrafterConfig, NAME=JSON; may be repeated.")
    ] = None,
    target_layers: Annotated[
        bool, typer.Option("--target-layers", help="Start the decoder layers as the target's last ones.")
    ] = False,
    held_out: Annotated[int, typer.Option(min=0, help="Dialogues at the last text's end to evaluate on.")] = 100,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens kept of a dialogue.")] = 512,
    features: Annotated[
        str, typer.Option(help="cached, live, or auto: cached if that takes half of the free disk at most.")
    ] = "auto",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for cached features; one below ~/.cache/falcon_hf by default.")
    ] = None,
    cached_laws: Annotated[
        bool, typer.Option(help="With cached features: the target's laws too, a faster step for as much disk again.")
    ] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Times the text is gone through.")] = 10.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Dialogues a step and device.")] = 8,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak. [default: 1e-3 at hidden size 576, falling to the paper's 3e-5 at 4096]")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of rising learning rate.")] = 100,
    vocabulary_weight: Annotated[float, typer.Option(help="Weight of KL and CE; the paper's is 0.1.")] = 0.5,
    glance_lambda: Annotated[float, typer.Option(help="CSGD's lambda at the start; 0 turns glancing off.")] = 0.4,
    first_pass_share: Annotated[
        float, typer.Option(help="Share of the rows that CSGD's first pass measures, rounded to 1/n; 1 is the paper's.")
    ] = 0.125,
    noise: Annotated[float, typer.Option(help="Uniform noise on input features.")] = 0.1,
    rollout_passes: Annotated[
        int | None,
        typer.Option(min=1, help="Passes in training, later ones over own features. [default: 2; 1 for an lstm]"),
    ] = None,
    rollout_share: Annotated[float, typer.Option(help="Share of the rows that go on to further passes.")] = 0.25,
    rollout_start: Annotated[float, typer.Option(help="Share of the training before further passes begin.")] = 0.4,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 500,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints; the last two are kept.")] = 500,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 25,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and draws.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"The target's, when features are computed: {DTYPE_HELP}")] = AUTO,
    compute: Annotated[
        str, typer.Option(help="The drafter's products in training: float32, bfloat16, or auto.")
    ] = AUTO,
    save_dtype: Annotated[str, typer.Option(help="Of the saved drafter.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA if there is one by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own by default.")] = None,
    report_to: Annotated[str, typer.Option(help="Where Trainer logs to: none, tensorboard, wandb, ...")] = "none",
    option: Annotated[list[str] | None, typer.Option(help=_OPTION_HELP)] = None,
) -> None:
    """Train a drafter for a target by coupled sequential glancing distillation (CSGD).

    Needs `pip install 'falcon_hf[train]'`. The folder holds what generate(assistant_model=) loads, and recipe.json with
    everything it was made of. On several devices: torchrun --nproc-per-node N --no-python falcon-hf train ...

    Example: falcon-hf train --data distilled --target demo --output my-drafter --steps 4000 --threads 2
    """
    try:
        from ..training.arguments import FalconTrainingArguments
        from ..training.errors import TrainingError
        from ..training.pipeline import default_learning_rate, train_drafter
        from ..training.plan import TrainingPlan
        from ..training.process_group import end_process_group
        from ..training.resuming import newest_checkpoint
    except ImportError as error:
        fail(f"Training needs further packages ({error}): pip install 'falcon_hf[train]'.")
    if steps is not None:
        refuse_options(command, {"epochs"}, "--steps says how long")
    if features == "live":
        refuse_options(command, {"cache", "cached_laws"}, "not with --features live, which keeps nothing")
    if not held_out:
        refuse_options(command, {"eval_every"}, "--held-out 0 leaves nothing to evaluate")
    if glance_lambda == 0:
        refuse_options(command, {"first_pass_share"}, "--glance-lambda 0 has no first pass")
    if init_from is not None:
        shape = {"block_size", "fusion", "layers", "target_layers", "feature_layers"}
        refuse_options(command, shape, "not with --init-from, which goes on with a drafter as it is")
    started = time.monotonic()
    where = _device(device)
    target_dtype, compute_dtype = parse_dtype(dtype, where), parse_dtype(compute, where, "--compute")
    if compute_dtype == torch.float16:
        fail("--compute must be bfloat16 or float32; for float16 give --compute float32 --option fp16=true.")
    set_threads(threads)
    options = parse_named_values(option or [], "--option")
    passes = options.get("rollout_passes", rollout_passes)
    if passes is None:
        with quiet():
            kind = fusion if init_from is None else _fusion_of(init_from)
        passes = 1 if kind == "lstm" else 2
    if passes == 1:
        refuse_options(command, {"rollout_share", "rollout_start"}, "needs --rollout-passes of 2 or more")
    drafter_config = parse_named_values(config or [], "--config")
    if layers != 1:
        drafter_config["num_hidden_layers"] = layers
    if feature_layers is not None:
        drafter_config["feature_layers"] = parse_numbers(feature_layers, "--feature-layers")
    with quiet():
        model, tokenizer = load_target(target, target_dtype, where)
    hidden = int(model.config.get_text_config().hidden_size)
    settings: dict[str, Any] = {
        "output_dir": str(output / "checkpoints"),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": default_learning_rate(hidden) if learning_rate is None else learning_rate,
        "warmup_steps": warmup,
        "vocabulary_weight": vocabulary_weight,
        "glance_lambda": glance_lambda,
        "first_pass_share": first_pass_share,
        "noise": noise,
        "rollout_passes": passes,
        "rollout_share": rollout_share,
        "rollout_start": rollout_start,
        "logging_steps": log_every,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": eval_every,
        "save_steps": save_every,
        "save_total_limit": 2,
        "seed": seed,
        "bf16": compute_dtype == torch.bfloat16,
        "use_cpu": where.type == "cpu",
        "report_to": report_to,
        "disable_tqdm": True,
        **({"num_train_epochs": epochs} if steps is None else {"max_steps": steps}),
    }
    try:
        plan = TrainingPlan(
            data=data,
            output=output,
            held_out=held_out,
            max_length=max_length,
            features=features,
            cache=cache,
            cached_laws=cached_laws,
            block_size=block_size,
            fusion=fusion,
            draft_vocab_size=draft_vocab_size,
            tree=None if tree is None else _read_tree(tree),
            config=drafter_config,
            target_layers=target_layers,
            init_from=init_from,
            lora_rank=lora_rank,
            save_dtype=save_dtype,
        )
        try:
            args = FalconTrainingArguments(**settings | options)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"The training arguments cannot be used: {error}") from error
        with quiet(), feature_bar(stderr) as computed:
            train_drafter(
                plan,
                args,
                model,
                tokenizer,
                resume=resume,
                report=lambda line: stderr.print(line, soft_wrap=True),
                progress=computed,
                callbacks=[TrainingProgress(stderr)],
                provenance={"machine": _machine(where)},
            )
    except TrainingError as error:
        fail(str(error))
    except KeyboardInterrupt:
        kept = newest_checkpoint(output / "checkpoints") is not None
        further = f"Checkpoints are in {output / 'checkpoints'}; the same command with --resume goes on."
        nothing = "There is no checkpoint yet: the same command starts again, from the features that are kept."
        stderr.print(f"Stopped. {further if kept else nothing}", soft_wrap=True)
        raise typer.Exit(130) from None
    end_process_group()
    stderr.print(f"{(time.monotonic() - started) / 60:.1f} minutes in all")
    if tree is None and "tree" not in drafter_config and init_from is None and int(os.environ.get("RANK", 0)) == 0:
        stderr.print(
            "The drafter has the paper's tree, made for a GPU. For the fastest on this machine: falcon-hf tune "
            f"--target {target} --drafter {output} --prompts everyday --output tune.json --apply {output}",
            soft_wrap=True,
        )


def _fusion_of(source: str) -> str | None:
    """The fusion of a drafter in a folder or Hub repo; None where there is none, which the training says better."""
    try:
        return FalconDrafterConfig.from_pretrained(source).fusion
    except LOADING_ERRORS:
        return None


def _device(name: str | None) -> torch.device:
    """As [`parse_device`]; under torchrun, each process has a GPU of its own unless one is named."""
    device, rank = parse_device(name), os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index and rank is None:
        # transformers' trainer takes the first one it sees.
        fail(f"--device {name}: show that GPU alone instead, CUDA_VISIBLE_DEVICES={device.index}.")
    return torch.device("cuda", int(rank)) if name is None and device.type == "cuda" and rank is not None else device


def _read_tree(path: Path) -> Any:
    from ..bench.draft_trees import read_tree
    from ..bench.errors import BenchError

    try:
        return read_tree(str(path))
    except BenchError as error:
        fail(str(error))


def _machine(device: torch.device) -> dict[str, Any]:
    from ..bench.provenance import machine

    return machine(device)
