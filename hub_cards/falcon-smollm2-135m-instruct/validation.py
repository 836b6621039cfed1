"""What ``generate()`` is asked for that Falcon cannot do: refused, with the remedy, before any work.

What only a target's length or a batch's processors bring up is in ``target_limits.py`` and ``emission.py``.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode, MaxLengthCriteria

from .half_precision import warn_if_slow
from .target import check_target

if TYPE_CHECKING:
    from .modeling_falcon_drafter import FalconDrafter

logger = logging.getLogger(__name__)

# Options of generate() that name another way to draft, or change what an assisted text is; none may be lost silently.
_EXCLUSIVE_OPTIONS = {
    "prompt_lookup_num_tokens": "it names another source of drafts",
    "assistant_early_exit": "it names another source of drafts",
    "assistant_ensemble_weight": "it would change the text",
    "dola_layers": "it would change the text",
    "use_mtp": "it names another source of drafts",
    "speculation_type": "it names another source of drafts",
}

# How other assistants draft. They do not change the text, so that there is no need to refuse them.
_OTHER_DRAFTING = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
)


def validate(
    target: PreTrainedModel,
    drafter: FalconDrafter,
    generation_mode: GenerationMode,
    generation_config: GenerationConfig,
    generation_mode_kwargs: dict[str, Any],
) -> GenerationConfig:
    """Refuse what Falcon cannot do, with the remedy, before any work.

    Returns:
        The config for transformers' own checks, which refuse several sequences a prompt for any assistant.

    Raises:
        ValueError: beam search and other modes, options that exclude a drafter, and all of [`check_target`].
    """
    drafter.config.check()  # users assign to it
    check_target(target, drafter.config)
    warn_if_slow(target)
    if generation_config.num_beams > 1:
        raise ValueError(
            f"num_beams={generation_config.num_beams} does not go with a Falcon drafter (transformers would ignore the "
            "drafter): set num_beams=1 or drop assistant_model."
        )
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A Falcon drafter goes with greedy search and sampling, not {generation_mode}: drop assistant_model."
        )
    for option, why in _EXCLUSIVE_OPTIONS.items():
        if getattr(generation_config, option, None) not in (None, False):
            raise ValueError(f"{option} and a Falcon drafter exclude each other ({why}): drop one of the two.")
    if generation_mode_kwargs.get("assistant_tokenizer") is not None:
        raise ValueError("A Falcon drafter shares the target's tokenizer: drop assistant_tokenizer.")
    if generation_config.use_cache is False:
        raise ValueError(
            "Falcon needs a key-value cache: drop use_cache=False (or pass use_cache=True) or drop assistant_model."
        )
    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    for option in _OTHER_DRAFTING:
        if getattr(generation_config, option, None) not in (None, defaults.get(option)):
            logger.warning("%s is for other assistants: a Falcon drafter drafts drafter.config.tree.", option)
    relaxed = copy.copy(generation_config)
    relaxed.num_return_sequences = 1
    return relaxed


def check_row_ends(rows: int, stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig) -> None:
    """Refuse a batch whose rows may end at different times without a padding token to fill up the shorter.

    Plain decoding lets such rows run on behind their end until all have ended, which no later round could undo.

    Raises:
        ValueError: with the remedy.
    """
    if rows == 1 or all(isinstance(criterion, MaxLengthCriteria) for criterion in stopping_criteria):
        return
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    if not pads or generation_config._pad_token_tensor is None:
        raise ValueError(
            "A batch whose rows may end at different times needs eos_token_id and pad_token_id, to fill up the shorter "
            "rows: set both, or generate the rows one by one."
        )
