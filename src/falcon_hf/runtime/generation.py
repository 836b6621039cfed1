"""Falcon's decoding loop: prefill, then rounds of draft, verify, walk and keep, until a stopping criterion holds.

What ``generate()`` prepared (processors, criteria, cache, streamer) is used as it is, per emitted token and in order,
so every option keeps its meaning. ``tests/runtime/test_generation.py`` and ``test_options.py`` hold the output against
plain ``generate()``.

Device syncs per round: greedy without processors or recorded outputs, one for the walk and one an emitted token for
the stopping criteria; otherwise one an emitted token. Plain ``generate()`` has one an emitted token.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .candidate_generator import FalconCandidateGenerator
from .emission import Emission
from .statistics import GenerationStatistics
from .target import check_target
from .target_session import TargetSession
from .tree import DraftTree
from .verification import follow, follow_greedy

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from .modeling_falcon_drafter import FalconDrafter

logger = logging.getLogger(__name__)

# Options of generate() that name another way to draft, or change what an assisted text is; none may be lost silently.
_EXCLUSIVE_OPTIONS = {
    "prompt_lookup_num_tokens": "it names another source of drafts",
    "assistant_early_exit": "it names another source of drafts",
    "assistant_ensemble_weight": "it would change the text",
}


def validate(
    target: PreTrainedModel,
    drafter: FalconDrafter,
    generation_mode: GenerationMode,
    generation_config: GenerationConfig,
    generation_mode_kwargs: dict[str, Any],
) -> None:
    """Refuse what Falcon cannot do, with the remedy, before any work.

    Raises:
        ValueError: beam search and other modes, more than one returned sequence, options that exclude a drafter,
            outputs that are not recorded, and all of [`check_target`].
    """
    if generation_config.num_beams > 1:
        raise ValueError(
            f"num_beams={generation_config.num_beams} does not go with a Falcon drafter (transformers would ignore the "
            "drafter): set num_beams=1 or drop assistant_model."
        )
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A Falcon drafter goes with greedy search and sampling, not {generation_mode}: drop assistant_model."
        )
    if generation_config.num_return_sequences > 1:
        raise ValueError("Falcon generates one sequence a call for now: set num_return_sequences=1 and call again.")
    for option, why in _EXCLUSIVE_OPTIONS.items():
        if getattr(generation_config, option, None) is not None:
            raise ValueError(f"{option} and a Falcon drafter exclude each other ({why}): drop one of the two.")
    if generation_mode_kwargs.get("assistant_tokenizer") is not None:
        raise ValueError("A Falcon drafter shares the target's tokenizer: drop assistant_tokenizer.")
    if generation_mode_kwargs.get("synced_gpus"):
        raise ValueError("Falcon does not run with synced_gpus (ZeRO-3, FSDP) for now: drop assistant_model.")
    if generation_config.return_dict_in_generate and generation_config.output_attentions:
        raise ValueError("Falcon does not record attentions for now: drop output_attentions or assistant_model.")
    if generation_config.use_cache is False:
        raise ValueError("Falcon needs a key-value cache: drop use_cache=False or assistant_model.")
    check_target(target, drafter.config)


def decode(
    target: PreTrainedModel,
    drafter: FalconDrafter,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    tokenizer: Any = None,
    inputs_tensor: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Generate from ``input_ids`` ``[1, P]``; everything as ``generate()`` hands it to a decoding method.

    ``synced_gpus`` was refused by [`validate`], ``tokenizer`` has served in the stopping criteria, and
    ``inputs_tensor`` is for encoders.

    Returns:
        ``[1, P + new tokens]`` ids, or the output object if ``return_dict_in_generate``.

    Raises:
        ValueError: for more than one row, or a cache that cannot serve (see [`TargetSession`]).
    """
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"Falcon generates for batch size 1 for now, got {input_ids.shape[0]} rows: call it once a row."
        )
    statistics = GenerationStatistics()
    emission = Emission(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    session = TargetSession(target, model_kwargs)
    with statistics.timed("total"):
        generator = FalconCandidateGenerator(drafter, target)
        session.check_room(generation_config.max_length, generator.shape.size)
        with statistics.timed("prefill"):
            outputs = session.prefill(input_ids, generation_config)
        with statistics.timed("walk"):
            ended = emission.start(outputs)
        known = min(session.prompt_features.shape[1], emission.ids.shape[1])
        features, tokens = session.prompt_features[:, -known:], emission.ids[:, -known:]
        while not ended:
            with statistics.timed("draft"):
                generator.append(features, tokens)
                budget = generation_config.max_length - emission.ids.shape[1]
                # The walk emits one token more than it accepts, so nodes from depth ``budget`` on could not be.
                tree = generator.draft(emission.ids[:, -1:], max_depth=budget - 1)
            with statistics.timed("verify"):
                outputs = session.verify(tree, generation_config)
            with statistics.timed("walk"):
                path, ended = _walk(tree, outputs, emission)
            with statistics.timed("cache"):
                session.keep(path, tree.size)
                features, tokens = outputs.hidden_states[-1][:, path], emission.ids[:, -len(path) :]
            statistics.rounds += 1
            statistics.drafted += tree.size - 1
            statistics.accepted += len(path) - 1
        if streamer is not None:
            streamer.end()
    statistics.new_tokens = emission.ids.shape[1] - input_ids.shape[1]
    drafter.last_generation = statistics
    logger.debug("%s", statistics)
    return emission.result(session.cache)


def _walk(tree: DraftTree, outputs: Any, emission: Emission) -> tuple[list[int], bool]:
    """Emit tokens along the tree; returns the visited nodes, root first, and whether the text has ended."""
    logits = outputs.logits
    if not emission.is_plain_greedy:
        ended = torch.zeros((), dtype=torch.bool)

        def choose(node: int) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal ended
            token = emission.choose(logits[:, node])
            ended = emission.commit(token)
            emission.record_hidden_states(outputs, node)
            return token[0], ended

        path = follow(tree, 0, choose)
        return path, bool(ended)
    nodes, tokens, visited = follow_greedy(tree, logits)
    count, *path = torch.cat((visited, nodes[0])).tolist()
    for index in range(count):
        if bool(emission.commit(tokens[:, index])):
            return path[: index + 1], True
    return path[:count], False


class FalconGenerationMixin(GenerationMixin):
    """``GenerationMixin`` with Falcon built in, for those who want no routing (``falcon_hf.uninstall()``).

    ``class MyModel(FalconGenerationMixin, LlamaForCausalLM): ...`` takes Falcon drafters as ``assistant_model``, and
    every other assistant as before.
    """

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        drafter: Any = generation_mode_kwargs.get("assistant_model")
        if hasattr(drafter, "_falcon_validate"):
            drafter._falcon_validate(self, generation_mode, generation_config, generation_mode_kwargs)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _assisted_decoding(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        if hasattr(assistant_model, "_falcon_decode"):
            return assistant_model._falcon_decode(self, *args, **kwargs)
        return super()._assisted_decoding(*args, assistant_model=assistant_model, **kwargs)
