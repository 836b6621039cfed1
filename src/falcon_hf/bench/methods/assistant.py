"""Speculative sampling with a smaller model as the drafter (SpS), as transformers does it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig

from ..errors import BenchError, first_line
from .base import Method, MethodContext


class Assistant(Method):
    """``generate(assistant_model=a smaller model)``. Sampled texts follow plain's law, not the same draws.

    By default transformers chooses how many tokens to draft as it goes; ``tokens`` fixes it.
    """

    name = "assistant"
    settings = {
        "model": "folder or Hub repo of a smaller model with the target's vocabulary",
        "tokens": "drafts a round, transformers' own schedule by default",
    }
    prefill_drafts = True
    draws_as_plain = False

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        super().__init__(label, context, settings)
        if "model" not in settings:
            raise BenchError(f"{label} needs a smaller model: assistant:model=FOLDER_OR_REPO.")
        self.source = settings["model"]
        try:
            self.model = AutoModelForCausalLM.from_pretrained(self.source, dtype=self.target.dtype)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, HfHubHTTPError) as error:
            raise BenchError(f"{label}: the model {self.source} cannot be loaded: {first_line(error)}") from error
        self.model = self.model.to(self.target.device).eval()
        own, other = (model.config.get_text_config().vocab_size for model in (self.target, self.model))
        if own != other:
            raise BenchError(
                f"{label}: {self.source} has {other} tokens and the target {own}; take a model of the same tokenizer."
            )
        if "tokens" in settings:
            value = settings["tokens"]
            if not value.isdecimal() or int(value) < 1:
                raise BenchError(f"{label}: tokens must be a whole number of at least 1, got {value!r}.")
            self.model.generation_config.num_assistant_tokens = int(value)
            self.model.generation_config.num_assistant_tokens_schedule = "constant"
            self.model.generation_config.assistant_confidence_threshold = 0.0
        usual = GenerationConfig._get_default_generation_params()  # said here, so that the result says them too
        for name in ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"):
            if getattr(self.model.generation_config, name) is None:
                setattr(self.model.generation_config, name, usual[name])

    def arguments(self) -> dict[str, Any]:
        """The model."""
        return {"assistant_model": self.model}

    def provenance(self) -> dict[str, Any]:
        """The model and how many tokens it drafts."""
        config = self.model.generation_config
        return {
            **super().provenance(),
            "model": self.source,
            "parameters": self.model.num_parameters(),
            "tokens": config.num_assistant_tokens,
            "schedule": config.num_assistant_tokens_schedule,
            "confidence_threshold": config.assistant_confidence_threshold,
        }


METHOD = Assistant
