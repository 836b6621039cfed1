"""How long a text may become: some targets treat a token by how long the text is so far, not by its position alone.

A tree's nodes stand at several positions in one forward, deeper than the text that may come of them. What a target
computes from the longest position, or from a node's place in the cache, is then not what decoding one token at a time
would compute. Up to a length known beforehand it is the same; beyond it such targets are refused.
``tests/runtime/test_target_limits.py`` holds both, beside what would come of it otherwise.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def check_length(target: PreTrainedModel, tokens: int, slots: int) -> None:
    """Refuse a text that may grow into what the target computes by its length. Generates nothing.

    Args:
        target: the target.
        tokens: of the longest text, the prompt included.
        slots: of the cache, in which a tree stands behind the text.

    Raises:
        ValueError: with the remedy.
    """
    text = target.config.get_text_config()
    for rope in _rope_parameters(text):
        kind = str(rope.get("rope_type", "default"))
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings", text.max_position_embeddings)
        elif "dynamic" in kind:
            limit = text.max_position_embeddings
        else:
            continue
        if tokens > limit:
            raise ValueError(
                f"Beyond {limit} tokens the {kind!r} rotary embedding of {type(target).__name__} goes by the length of "
                f"the text, which a tree's nodes do not share, and this text may have {tokens}: lower max_new_tokens, "
                "or generate without assistant_model."
            )
    layers = getattr(text, "no_rope_layers", None) or ()
    if getattr(text, "attn_temperature_tuning", False) and not all(layers) and slots >= text.floor_scale:
        raise ValueError(
            f"{type(target).__name__} scales its attention by a token's place in the cache, from {text.floor_scale} "
            f"tokens on; a tree's nodes do not stand at their positions there, and text and tree may need {slots}: "
            "lower max_new_tokens, or generate without assistant_model."
        )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The config's rotary parameters, one dict, or one a layer type."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]
