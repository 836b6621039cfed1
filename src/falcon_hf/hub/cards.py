"""A drafter's card, generated: from its config, its ``recipe.json`` and its stored benchmark results.

What no machine can know (licence, languages, notes on training and limits) stands in the recipe under ``"card"``; so
the card is never edited by hand. The tables are rendered by the bench and handed in: this room does not import it.

Evaluation results go into the front matter as a model-index. The Hub's newer ``.eval_results/`` format is for scores
on benchmarks that are registered there, and none of those measures a drafter's speed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..run_names import processor_name, setting_name, stem_of_questions
from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.dynamic_tree import DynamicTree
from ..runtime.machine_trees import MachineTrees
from ..runtime.repo_card import USE, card_fields, describe, is_repo_id

MARK = "<!-- Made by `falcon-hf publish` from config.json, recipe.json and benchmarks/: edit those, not this. -->"

_TEMPLATE = """---
{{ card_data }}
---

{{ mark }}

# {{ title }}

{{ summary }}

{{ facts }}

## Use

{{ use }}

## Results

{{ results }}

## Training

{{ training }}

## Limits

{{ limits }}

## Bias, risks and environmental impact

{{ impact }}

## Citation

{{ citation }}
"""
_CITATION = """Gao, X., Xie, W., Xiang, Y., Ji, F.: Falcon: Faster and Parallel Inference of Large Language Models
through Enhanced Semi-Autoregressive Drafting and Custom-Designed Decoding Tree. AAAI 2025. arXiv 2412.12639."""


@dataclass
class CardSource:
    """What a card is made from.

    Attributes:
        name: the repo's name, without its organisation.
        config: the drafter's.
        parameters: weights of the drafter.
        bytes_per_weight: 2 for 16 bits, 4 for 32.
        recipe: content of ``recipe.json``; empty where there is none.
        results: contents of the result files, in the order of the tables.
        weights_sha256: of the drafter's weights; methods of other weights are no figures of this drafter.
    """

    name: str
    config: FalconDrafterConfig
    parameters: int
    bytes_per_weight: int
    recipe: dict[str, Any] = field(default_factory=dict)
    results: Sequence[dict[str, Any]] = ()
    weights_sha256: str = ""


def build_card(source: CardSource, tables: str = "") -> str:
    """The README.md of a drafter's repo.

    Args:
        source: config, recipe, results.
        tables: the results as Markdown.

    Returns:
        The whole text, front matter included.
    """
    target = source.config.target_name_or_path or "the target"
    card = ModelCard.from_template(
        _card_data(source),
        template_str=_TEMPLATE,
        mark=MARK,
        title=f"Falcon drafter for {target.rsplit('/', 1)[-1]}",
        summary=_summary(source, target),
        facts=_facts(source),
        use=USE.format(target=target),
        results=tables.strip() or "Not measured yet: `falcon-hf bench` measures them.",
        training=_training(source.recipe),
        limits=_limits(source),
        impact=_impact(source.recipe),
        citation=_CITATION,
    )
    return str(card.content).rstrip("\n") + "\n"


def _card_data(source: CardSource) -> ModelCardData:
    about = source.recipe.get("card", {})
    fields = card_fields(source.config)
    for name in ("license", "language", "datasets"):
        if about.get(name):
            fields[name] = about[name]
    own = [entry for result in source.results for entry in _evaluations(result, source.weights_sha256)]
    evaluations = _told_apart(own)
    if evaluations:
        fields |= {"model_name": source.name, "eval_results": evaluations}
    return ModelCardData(**fields)


def _evaluations(result: dict[str, Any], weights: str) -> list[EvalResult]:
    """Speed, tau and alpha of each method with this drafter, with what they were measured on."""
    settings = result["settings"]
    stem, config = stem_of_questions(settings), setting_name(settings)
    questions, target = settings["questions"], settings["target"]
    how = {
        "questions": questions["count"],
        "sha256": questions["sha256"][:12],
        "turns": questions["turns"],
        "seeds": settings["seeds"],
        "repeats": settings["repeats"],
        "dtype": target["dtype"],
        "attention": target["attention"],
        "options": settings["options"],
        "batch_size": settings.get("batch_size", 1),
        "hardware": f"{processor_name(settings['machine'])}, {settings['machine']['threads']} threads, "
        f"{settings['machine']['device']}",
    }
    found = []
    for label, method in settings["methods"].items():
        if method.get("weights_sha256") != weights or label not in result["summary"]:
            continue
        figures = result["summary"][label]
        own = config if label == "falcon" else f"{config}, {label}"
        metrics = {
            "tau": ("accepted drafts per round", figures["tau"]),
            "tau_with_bonus": ("tokens per target forward", figures["tau_with_bonus"]),
            "alpha": ("accepted drafts over all new tokens", figures["alpha"]),
        }
        if figures["speed_ratio"] is not None:
            metrics["speedup"] = ("median speed over plain generate()", figures["speed_ratio"]["median"])
        found += [
            EvalResult(
                task_type="text-generation",
                task_name="Speculative decoding",
                dataset_type=stem,
                # A model-index keeps what has one type and config together, so each setting is a config.
                dataset_config=own,
                dataset_name=f"{stem}, {own}",
                dataset_args=how,
                metric_type=metric,
                metric_name=words,
                metric_value=round(float(value), 4),
            )
            for metric, (words, value) in metrics.items()
        ]
    return found


def _told_apart(evaluations: list[EvalResult]) -> list[EvalResult]:
    """Number the configs that stand for several settings: of one config a model-index keeps the first's alone."""
    settings: dict[tuple[str, str], list[Any]] = {}
    for entry in evaluations:
        known = settings.setdefault((entry.dataset_type, str(entry.dataset_config)), [])
        if entry.dataset_args not in known:
            known.append(entry.dataset_args)
        if number := known.index(entry.dataset_args):
            entry.dataset_config = f"{entry.dataset_config} ({number + 1})"
            entry.dataset_name = f"{entry.dataset_name} ({number + 1})"
    return evaluations


def _summary(source: CardSource, target: str) -> str:
    link = f"[{target.rsplit('/', 1)[-1]}](https://huggingface.co/{target})" if is_repo_id(target) else f"`{target}`"
    return (
        f"A drafter that makes {link} generate faster without changing what it says: Falcon speculative decoding "
        "([arXiv 2412.12639](https://arxiv.org/abs/2412.12639)).\n"
        "Embedding and LM head are the target's own and are not stored here. Not related to TII's Falcon models."
    )


def _facts(source: CardSource) -> str:
    config = source.config
    rows = {
        "drafter": f"{describe(config).rstrip('.')}",
        "parameters": f"{source.parameters / 1e6:.1f} million, {8 * source.bytes_per_weight} bits each",
        "tree": _tree(config),
        "target": f"{config.target_name_or_path or 'unknown'} ({config.target_model_type or 'unknown'} family), "
        f"vocabulary {config.vocab_size:,}, hidden size {config.hidden_size:,}",
        "serves": "this target and its close fine-tunes; another model gets a `TargetMismatchWarning`",
    }
    language = source.recipe.get("card", {}).get("language")
    if language:
        rows["languages"] = ", ".join([language] if isinstance(language, str) else language)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _tree(config: FalconDrafterConfig) -> str:
    if config.tree is None:
        return "the paper's tree for this block size"
    if isinstance(config.tree, dict):
        trees = MachineTrees.from_config(config.tree, config.block_size)
        looked_up = "" if config.lookup is None else ", candidates from the text among them"
        cheap, dear = _nodes(trees.cheap_rows), _nodes(trees.dear_rows)
        if dear != cheap:
            cheap += f"; on a CPU in float32, or without fast half precision, {dear}"
        return f"dynamic, {cheap}{looked_up}"
    return f"{len(config.tree)} nodes"


def _nodes(tree: DynamicTree) -> str:
    passes = "one pass" if tree.passes == 1 else f"{tree.passes} passes"
    return f"{tree.nodes} nodes at most, in {passes}"


def _training(recipe: dict[str, Any]) -> str:
    """The recipe in words: data, run, arguments, held-out accuracy where they are known, then its notes."""
    notes = recipe.get("card", {}).get("training", [])
    data, run = recipe.get("data", {}), recipe.get("run", {})
    rows = {
        "dialogues": _number(data.get("dialogues")),
        "tokens learned": _number(data.get("learned_tokens")),
        "held-out dialogues": _number(data.get("held_out_dialogues")),
        "sha256 of the text": data.get("sha256"),
        "steps": _number(run.get("steps")),
        "positions seen": _number(run.get("positions_seen")),
        "duration": _duration(run.get("seconds")),
        "target during training": recipe.get("target", {}).get("dtype"),
        "made with": ", ".join(f"{name} {value}" for name, value in recipe.get("made_with", {}).items()),
    }
    rows |= {f"`{name}`": f"`{json.dumps(value)}`" for name, value in sorted(recipe.get("arguments", {}).items())}
    rows |= {f"held out: {name}": _number(value) for name, value in _last_evaluation(recipe).items()}
    table = [f"| {name} | {value} |" for name, value in rows.items() if value]
    parts = ["\n".join(["| | |", "|---|---|", *table])] if table else []
    parts += [_lines(note) for note in notes]
    return "\n\n".join(parts) or "No recipe was kept: how this drafter was trained is not known."


def _last_evaluation(recipe: dict[str, Any]) -> dict[str, Any]:
    """The last entry of the training curve that holds held-out figures."""
    for entry in reversed(recipe.get("curve", [])):
        figures = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        if figures:
            dull = ("runtime", "samples_per_second", "steps_per_second")
            return {name: value for name, value in figures.items() if name not in dull and not isinstance(value, list)}
    return {}


def _limits(source: CardSource) -> str:
    own = source.recipe.get("card", {}).get("limits", [])
    table = "; see the agreement table above" if source.results else ""
    always = [
        "It changes how fast text comes, not the text. In 16 bits a near tie between two tokens can fall the other way "
        f"than in plain generation, as with any change of shape{table}.",
        "On other hardware, dtypes or languages than those measured it may be slower than plain generation.",
    ]
    return "\n".join(f"- {' '.join(each) if isinstance(each, list) else each}" for each in [*own, *always])


def _impact(recipe: dict[str, Any]) -> str:
    machine = recipe.get("machine", {})
    hardware = machine
    if isinstance(machine, dict):
        hardware = processor_name(machine) if machine.get("cpu") else None
    where = machine.get("device") if isinstance(machine, dict) else None
    seconds = recipe.get("run", {}).get("seconds")
    used = _lines(recipe.get("card", {}).get("impact")) or (
        f"Training took {_duration(seconds)}"
        + (f" on {', '.join(str(part) for part in (hardware, where) if part)}" if hardware or where else "")
        + "; emissions were not measured."
        if seconds
        else "What the training used is not known."
    )
    return (
        "A drafter only proposes tokens; every token that comes out is the target's own choice. Biases, risks and "
        f"unsafe outputs are therefore the target's: see its card.\n\n{used}"
    )


def _lines(paragraph: Any) -> Any:
    """A paragraph of the recipe's, which may be a list of its lines."""
    return "\n".join(paragraph) if isinstance(paragraph, list) else paragraph


def _number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float | None) -> str | None:
    if not seconds:
        return None
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
