"""Configuration of a Falcon drafter: its shape, the target it was made for, and the tree it drafts.

Unrelated to transformers' own model family "falcon" (TII's): this one's ``model_type`` is ``"falcon_drafter"``.
"""

from __future__ import annotations

import difflib
import functools
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel

from .machine_trees import MachineTrees
from .suffix_lookup import SuffixLookup
from .target_name import target_name
from .tree_shape import TreeShape

FUSIONS = ("lstm", "lstm_stateless", "linear")
VERIFIERS = ("follow", "rejection")
MAX_BLOCK_SIZE = 8
FORMAT_VERSION = 1
"""Of config and weights; a repo with a higher one was saved by a newer falcon_hf."""

# What transformers itself hands to a config beside its declared fields; keys with a leading underscore pass as well.
_FOREIGN_KEYS = frozenset(
    {
        "architectures",
        "attn_implementation",
        "auto_map",
        "model_type",
        "name_or_path",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
    }
)
# Shape fields that a drafter takes over from its target where the target has them.
_SHARED_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

_POSITIVE_INTEGERS = (
    "block_size",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "fusion_layers",
    "max_position_embeddings",
)


@strict
class FalconDrafterConfig(PreTrainedConfig):
    r"""Everything a [`FalconDrafter`] needs to know besides its weights. Unknown or impossible values are errors.

    Usually made by [`FalconDrafterConfig.from_target`]; letters follow the paper (arXiv 2412.12639).

    Args:
        vocab_size: size V of the target's vocabulary (``target.config.get_text_config().vocab_size``).
        hidden_size: width H of the target's last hidden state; features, embeddings and the drafter share it.
        intermediate_size: inner width of the drafter's MLP.
        num_hidden_layers: decoder layers of the drafter (the paper: 1).
        num_attention_heads, num_key_value_heads, head_dim: attention shape; ``head_dim`` defaults to H / heads.
        max_position_embeddings, rope_parameters: rotary embedding, as in transformers' Llama.
        rms_norm_eps, input_norm: RMS norm before the MLP always, before the attention if ``input_norm``.
        block_size: k, the tokens drafted in one pass, 1 to 8. k = 1 is the autoregressive case (EAGLE's).
        fusion: how a pair (feature, embedding) becomes one H-wide vector: ``"lstm"`` (the paper: two LSTM layers
            whose state runs along the sequence), ``"lstm_stateless"`` (the same cells, every position from the zero
            state: what the upstream code's tensor layout amounts to) or ``"linear"`` (one matrix).
        fusion_layers: LSTM layers of the fusion (ignored by ``"linear"``).
        embedding_scale: what token embeddings are multiplied with before the fusion, so that they are of the features'
            size (a target's embeddings may be 20 times smaller, and a fusion is slow to learn that).
        feature_layers: None for the last hidden state alone; otherwise the numbers of the target's hidden states (0 the
            embeddings, L the last of L layers) whose states, side by side, become a feature through one matrix. The
            last must be L, because the drafter estimates that one.
        block_mixing: whether a pair's query also starts from its block's newest pair (see ``block_mixing.py``). Not in
            the paper; it lifts the accuracy of every block position but the last.
        attention: False for k heads that see their block's pairs and nothing else, as Medusa's see the last feature:
            the baseline of a block without dependence. With k > 1 it needs block_mixing.
        correction_rank: None, or the inner width of a correction that conditions a position on the token chosen before
            it in its block, which the k laws of a pass do not know otherwise; later positions are drafted so corrected.
        draft_vocab_size: None to draft over all V tokens; otherwise only over that many, whose ids the checkpoint
            keeps (``FalconDrafter.draft_vocab_ids``). Never changes what is generated, only what is proposed.
        logit_scale, logit_softcap: the target's head scaling, logits = cap * tanh(scale * (h W^T) / cap).
        tree: paths of child ranks in Medusa/EAGLE notation; or a dynamic tree, ``{"kind": "dynamic", "nodes": 24}``
            and other fields of [`DynamicTree`], or one for each kind of machine (see [`MachineTrees`]); or None for the
            paper's tree of this block size.
        lookup: None, or fields of [`SuffixLookup`] (``{}`` for its defaults): what followed earlier occurrences of the
            text's end becomes nodes too, where it beats the drafter's; needs a dynamic tree.
        verifier: ``"follow"``: the target's own draw walks the tree, so that a seed gives plain decoding's text.
            ``"rejection"``: siblings are drawn from the drafter's law and accepted or rejected, which keeps the law of
            sampled text, not the text of a seed; needs a static tree, and greedy decoding takes ``follow`` anyway.
        auto_off: whether to decode plainly for a while where drafting is seen to lose time (see
            ``speculation_switch.py``). Off by default, because what it does depends on the clock.
        target_name_or_path, target_model_type: the model this drafter was trained for.
        target_fingerprint: sampled embedding weights that tell one target from another (see ``target.fingerprint``).
        attention_bias, fusion_bias: biases of the query, key and value projections and of a linear fusion, which some
            converted checkpoints have.
        format_version: of config and weights; code refuses those of a later version than its own.
        code_stamp: hash of the code saved with the weights (see ``repo_files.code_stamp``).

    Raises:
        ValueError: on an unknown field or an impossible value; the message names the field and what it may be.
    """

    model_type = "falcon_drafter"
    _auto_class = "AutoConfig"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    input_norm: bool = True
    mlp_bias: bool = False
    initializer_range: float = 0.02
    block_size: int = 2
    fusion: str = "lstm"
    fusion_layers: int = 2
    embedding_scale: float = 1.0
    feature_layers: list[int] | None = None
    correction_rank: int | None = None
    block_mixing: bool = False
    attention: bool = True
    draft_vocab_size: int | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tree: list[list[int]] | dict[str, Any] | None = None
    lookup: dict[str, Any] | None = None
    verifier: str = "follow"
    auto_off: bool = False
    target_name_or_path: str | None = None
    target_model_type: str | None = None
    target_fingerprint: list[float] | None = None
    attention_bias: bool = False
    fusion_bias: bool = False
    format_version: int = FORMAT_VERSION
    code_stamp: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if (
            isinstance(self.format_version, int) and self.format_version > FORMAT_VERSION
        ):  # first: its fields may well be unknown here
            raise ValueError(
                f"The drafter has format {self.format_version}, and this code reads up to {FORMAT_VERSION}: "
                "upgrade falcon_hf, or load it with trust_remote_code=True, by the code in its own repo."
            )
        known = set(type(self).__dataclass_fields__)
        for key in kwargs:
            if key not in _FOREIGN_KEYS and not key.startswith("_"):
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise ValueError(f"FalconDrafterConfig has no field {key!r}{hint}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError for the first field of a wrong type or with an impossible value, saying what it may be."""
        self._check_types()
        # Here rather than in a ``validate_*`` hook, because those run only on some ways of making a config.
        self._check_values()

    def _check_types(self) -> None:
        """Raise ValueError for the first field of a wrong type; lists and dicts are looked into by [`_check_values`].

        ``strict`` would do it, but sees no types where annotations are strings (as ``from __future__`` makes them).
        """
        for name, types in _scalar_fields().items():
            value = getattr(self, name)
            right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
            if not right or (isinstance(value, float) and not math.isfinite(value)):
                annotation = FalconDrafterConfig.__annotations__[name].replace(" |", " or")
                raise ValueError(f"{name} must be {annotation}, got {value!r}.")
        if not all(isinstance(sample, (int, float)) for sample in self.target_fingerprint or ()):
            raise ValueError("target_fingerprint must be None or a list of numbers.")

    def _check_values(self) -> None:
        """Raise ValueError for the first impossible value, saying what it may be."""
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        if self.block_size > MAX_BLOCK_SIZE:
            raise ValueError(f"block_size (k) must be from 1 to {MAX_BLOCK_SIZE}, got {self.block_size}.")
        if not self.attention and self.block_size > 1 and not self.block_mixing:
            raise ValueError(
                "attention=False leaves block positions without their block's newest pair: set block_mixing=True too."
            )
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {self.fusion!r}.")
        if self.verifier not in VERIFIERS:
            raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {self.verifier!r}.")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be None or from 1 to vocab_size ({self.vocab_size}), "
                f"got {self.draft_vocab_size}."
            )
        if not self.embedding_scale > 0:
            raise ValueError(f"embedding_scale must be positive, got {self.embedding_scale!r}.")
        if self.correction_rank is not None and self.correction_rank < 1:
            raise ValueError(f"correction_rank must be None or at least 1, got {self.correction_rank!r}.")
        if self.correction_rank is not None and self.block_size == 1:
            raise ValueError("correction_rank needs a block_size of 2 or more: a block of one has no token before.")
        layers = self.feature_layers
        if layers is not None and (len(layers) < 2 or min(layers) < 0 or sorted(set(layers)) != layers):
            raise ValueError(
                f"feature_layers must be None or at least two ascending numbers of hidden states, got {layers!r}."
            )
        if self.logit_scale <= 0 or (self.logit_softcap is not None and self.logit_softcap <= 0):
            raise ValueError("logit_scale and logit_softcap must be positive.")
        if self.tree is not None:
            try:
                if isinstance(self.tree, dict):
                    MachineTrees.from_config(self.tree, self.block_size)
                else:
                    TreeShape.from_paths(self.tree)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    "tree must be None, a list of paths such as [[0], [1], [0, 0]], or a dynamic tree such as "
                    f"{{'kind': 'dynamic', 'nodes': 24}}: {error}"
                ) from error

        if self.lookup is not None:
            if not isinstance(self.tree, dict):
                raise ValueError("lookup needs a dynamic tree, such as tree={'kind': 'dynamic', 'nodes': 24}.")
            SuffixLookup.from_config(self.lookup)

    @classmethod
    def from_target(
        cls, target_or_config: PreTrainedModel | PreTrainedConfig, block_size: int = 2, **overrides: Any
    ) -> FalconDrafterConfig:
        """A drafter's config that fits a target: one decoder layer of the target's own shape.

        Args:
            target_or_config: the target, or its config; only a model with weights gives a fingerprint.
            block_size: k.
            **overrides: any field of this class.

        Raises:
            ValueError: if the target is an encoder-decoder, or an override is unknown or impossible.
        """
        model = target_or_config if isinstance(target_or_config, PreTrainedModel) else None
        config = target_or_config.config if model is not None else target_or_config
        if config.is_encoder_decoder:
            raise ValueError(f"{config.model_type!r} is an encoder-decoder; Falcon drafts for decoder-only targets.")
        text = config.get_text_config()
        fields: dict[str, Any] = {
            name: getattr(text, name) for name in _SHARED_SHAPE if getattr(text, name, None) is not None
        }
        rope = fields.get("rope_parameters")
        if rope is not None and "rope_type" not in rope:
            # One entry per layer type (gemma3, olmo3, ...): the drafter has a single full-attention layer.
            fields["rope_parameters"] = rope.get("full_attention")
        fields["logit_scale"], fields["logit_softcap"] = _head_scaling(text)
        fields["target_name_or_path"] = target_name(getattr(config, "_name_or_path", None))
        fields["target_model_type"] = text.model_type
        if model is not None:
            from .target import fingerprint

            fields["target_fingerprint"] = fingerprint(model)
        return cls(**{**fields, "block_size": block_size, **overrides})


_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}


@functools.cache
def _scalar_fields() -> dict[str, tuple[type, ...]]:
    """The types of each field of [`FalconDrafterConfig`] that is no list or dict; an int will do for a float."""
    fields: dict[str, tuple[type, ...]] = {}
    for name, annotation in FalconDrafterConfig.__annotations__.items():
        if "[" not in annotation:
            types = tuple(_TYPES[part] for part in annotation.split(" | "))
            fields[name] = (*types, int) if float in types else types
    return fields


def _head_scaling(text: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) that a target applies between its LM head and its logits (cohere, granite, gemma2)."""
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)
