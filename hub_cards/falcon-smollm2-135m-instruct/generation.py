"""Falcon's decoding loop: prefill, then rounds of draft, verify, walk and keep, until a stopping criterion holds.

What ``generate()`` prepared (processors, criteria, cache, streamer) is used as it is, per emitted token and in order,
so every option keeps its meaning. ``tests/runtime/test_generation.py`` and ``test_options.py`` hold the output against
plain ``generate()``.

Device syncs per round: greedy without processors or recorded outputs, one for the walk and one an emitted token for
the stopping criteria; otherwise one an emitted token. Plain ``generate()`` has one an emitted token. Drafting,
verifying and keeping have none (but see ``candidate_generator.py``): ``tests/runtime/test_drafting_syncs.py``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from .candidate_generator import FalconCandidateGenerator, drafter_tree
from .committed_pairs import CommittedPairs
from .draws import Draws
from .emission import Emission, check_processors
from .outputs import StreamedRows, gather_output
from .rejection import SiblingDraws
from .speculation_switch import SpeculationSwitch
from .statistics import GenerationStatistics
from .target import family, last_device
from .target_attention import under_tree_attention
from .target_limits import check_length
from .target_session import TargetSession, cache_key
from .tree import DraftTree
from .tree_shape import TreeShape, chain
from .validation import check_row_ends
from .verification import follow, follow_greedy

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from .modeling_falcon_drafter import FalconDrafter

logger = logging.getLogger(__name__)


@under_tree_attention
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
    """Generate from ``input_ids`` ``[B, P]``; everything as ``generate()`` hands it to a decoding method.

    If the target is spread over devices, the drafter moves to the last one, where its features are made.
    With ``synced_gpus`` every round is one target forward on every device, until all have finished.
    ``tokenizer`` has served in the stopping criteria, and ``inputs_tensor`` is for encoders.

    Returns:
        ``[B, P + longest text]`` ids, or the output object if ``return_dict_in_generate``.

    Raises:
        ValueError: if the cache or a model input cannot serve (see [`TargetSession`]), the text may grow too long (see
            [`check_length`]), or the rows of a batch cannot be decoded one by one.
    """
    check_row_ends(input_ids.shape[0], stopping_criteria, generation_config)
    check_processors(input_ids.shape[0], logits_processor)
    if (device := last_device(target)) is not None:
        drafter.to(device)
    statistics = GenerationStatistics(rows=input_ids.shape[0])
    with statistics.timed("total"), contextlib.ExitStack() as at_end:
        draws = at_end.enter_context(Draws(input_ids.shape[0]))
        rows = [
            Emission(input_ids, row, logits_processor, stopping_criteria, generation_config, draws)
            for row in range(input_ids.shape[0])
        ]
        stream = StreamedRows(streamer, rows, generation_config)
        generator = FalconCandidateGenerator(drafter, target, chain_shape(drafter, target, len(rows)), rows=len(rows))
        draws_siblings = drafter.config.verifier == "rejection" and generation_config.do_sample
        siblings = SiblingDraws(generation_config.temperature or 1.0, drafter.device) if draws_siblings else None
        if siblings is not None:
            generator.draw_siblings(siblings)
        pairs = CommittedPairs(generator, rows)
        switch = _switch(drafter, target, len(rows))
        room = generator.shape.size
        tokens = generation_config.max_length + _uncounted(target, input_ids, generation_config, model_kwargs)
        slots = tokens + room
        check_length(target, tokens, slots)
        slots = max(slots, generation_config.max_cache_len or 0)  # a size the user wants for texts of all lengths
        session = TargetSession(target, len(rows), slots, room, model_kwargs, drafter.config.feature_layers)
        at_end.callback(session.close)
        with statistics.timed("prefill"):
            outputs = session.prefill(input_ids, generation_config)
        with statistics.timed("walk"):
            for index, row in enumerate(rows):
                row.ended = bool(row.commit(row.choose(outputs.logits[index : index + 1, -1])))
            stream.flush()
        with statistics.timed("draft"):
            pairs.add_prompt(session.prompt_features)
            session.prompt_features = []
        drafts, began = switch.drafts, time.perf_counter()
        prompt_states = outputs.hidden_states if generation_config.output_hidden_states else None
        while target._has_unfinished_sequences(all(row.ended for row in rows), synced_gpus, device=input_ids.device):
            if all(row.ended for row in rows):
                session.idle(rows[0].ids[:, -1:], generation_config)
                continue
            with statistics.timed("draft"):
                tree = _draft(rows, generator, drafts)
            with session.committed.whole_on_error():
                with statistics.timed("verify"):
                    outputs = session.verify(tree, [row.budget for row in rows], generation_config)
                with statistics.timed("walk"):
                    paths = _walk(tree, outputs, rows, session, siblings)
                    stream.flush()
                with statistics.timed("cache"):
                    session.committed.keep(paths, tree.size)
            draws.forget_before(min((row.new_tokens for row in rows if not row.ended), default=0))
            statistics.count(paths, tree.size, drafted=drafts)
            walked = [len(path) for path in paths if path]
            now = time.perf_counter()
            drafts, began = switch.record(sum(walked) / len(walked), now - began, drafts), now
            with statistics.timed("draft"):
                pairs.add_round(session.features(outputs), paths, hold=not drafts)
            if drafter.on_round is not None:
                drafter.on_round(tree, paths)
        statistics.new_tokens = sum(row.new_tokens for row in rows)
        drafter.last_generation = statistics  # before a streamer's reader learns that the text has ended
        stream.end()
        if len(rows) > 1:
            session.committed.compact()
    logger.debug("%s", statistics)
    return gather_output(rows, generation_config, prompt_states, session.prompt_attentions, session.cache)


def _uncounted(
    target: PreTrainedModel, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> int:
    """Tokens of the text that ``max_length`` leaves out: embeddings given for ids, or what a continued cache holds.

    The latter where only the new ids are given, which transformers knows by the mask's being longer.
    """
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None:
        return int(embeds.shape[1] - input_ids.shape[1])
    cache, mask = model_kwargs.get(cache_key(target)), model_kwargs.get("attention_mask")
    width = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    if cache is None or width in (None, input_ids.shape[1]):
        return 0
    return int(cache.get_seq_length())


def _switch(drafter: FalconDrafter, target: PreTrainedModel, rows: int) -> SpeculationSwitch:
    """Auto-off's memory, which outlives a call: many short texts are one long one to it."""
    if not drafter.config.auto_off:
        return SpeculationSwitch(False)
    kind = f"{drafter.config.tree} {drafter.config.lookup} {target.device} {target.dtype}"
    # An id goes to another target when this one is gone. A list, because other threads' calls add to the switches.
    if all(own != id(target) for own, *_ in list(drafter.switches)):
        weakref.finalize(target, _forget, drafter.switches, id(target)).atexit = False
    return drafter.switches.setdefault((id(target), rows, kind), SpeculationSwitch(True))


def _forget(switches: dict[tuple[int, int, str], SpeculationSwitch], gone: int) -> None:
    for key in [key for key in list(switches) if key[0] == gone]:
        del switches[key]


def chain_shape(drafter: FalconDrafter, target: PreTrainedModel, rows: int) -> TreeShape | None:
    """For a target that can only verify a chain, the likeliest path of a row's tree; None for other targets."""
    support = family(target)
    if support is None or support.drafts != "chain":
        return None
    tree = drafter_tree(drafter, target, rows)
    return chain(tree.depth if isinstance(tree, TreeShape) else min(tree.nodes, tree.depth(drafter.config.block_size)))


def _draft(rows: list[Emission], generator: FalconCandidateGenerator, drafts: bool) -> DraftTree:
    """One tree a row, all of one size, the root alone if not drafting; those of ended rows are not looked at."""
    # The walk emits one token more than it accepts, so nodes from depth ``budget`` on could not be emitted.
    deepest = max(row.budget for row in rows if not row.ended) - 1
    last = [row.ids[:, -1:] for row in rows]
    root = last[0] if len(rows) == 1 else torch.cat(last)
    if not drafts:
        return DraftTree.root_only(root)
    return generator.draft(root, deepest, None if generator.lookup is None else _texts(rows))


def _texts(rows: list[Emission]) -> torch.Tensor:
    """Prompts and texts so far ``[B, T]``, shorter rows at the right end with -1 before them."""
    longest = max(row.ids.shape[1] for row in rows)
    return torch.cat([F.pad(row.ids, (longest - row.ids.shape[1], 0), value=-1) for row in rows])


def _walk(
    tree: DraftTree, outputs: Any, rows: list[Emission], session: TargetSession, siblings: SiblingDraws | None
) -> list[list[int]]:
    """Emit tokens along each row's tree; returns the visited nodes, root first, none for a row that had ended."""
    if rows[0].is_plain_greedy:
        nodes, tokens, visited = follow_greedy(tree.to(outputs.logits.device), outputs.logits)
        walks = torch.cat((visited[:, None], nodes), dim=1).tolist()
        return [
            [] if row.ended else _commit_all(row, tokens[index : index + 1], walk[1 : 1 + walk[0]])
            for index, (row, walk) in enumerate(zip(rows, walks, strict=True))
        ]
    paths: list[list[int]] = []
    for index, row in enumerate(rows):
        if row.ended:
            paths.append([])
            continue

        def choose(node: int, index: int = index, row: Emission = row) -> tuple[torch.Tensor, torch.Tensor]:
            logits = outputs.logits[index : index + 1, node]
            token = row.choose(logits) if siblings is None else siblings.follow_node(row.law(logits), tree, index, node)
            row.record_hidden_states(outputs.hidden_states, node)
            if row.attentions is not None:
                row.attentions.append(session.attentions(tree, outputs, index, node))
            return token[0], row.commit(token)

        path, row.ended = follow(tree, index, choose)
        paths.append(path)
    return paths


def _commit_all(row: Emission, tokens: torch.Tensor, path: list[int]) -> list[int]:
    """Commit the tokens ``[1, D]`` emitted along ``path`` until the text ends; returns the path as far as it went."""
    for index in range(len(path)):
        row.ended = bool(row.commit(tokens[:, index]))
        if row.ended:
            return path[: index + 1]
    return path


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
            generation_config = drafter._falcon_validate(
                self, generation_mode, generation_config, generation_mode_kwargs
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    @functools.wraps(GenerationMixin._assisted_decoding)  # transformers passes what the signature names
    def _assisted_decoding(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        if hasattr(assistant_model, "_falcon_decode"):
            return assistant_model._falcon_decode(self, *args, **kwargs)
        return super()._assisted_decoding(*args, assistant_model=assistant_model, **kwargs)
