"""One prompt answered and timed, with or without a drafter, the text streamed as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from ..chat_template import ChatTemplateError, templated
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.statistics import GenerationStatistics
from .console import fail


class Streamer(TextStreamer):
    """Hands finished pieces of text to ``write`` and knows how long that took.

    Attributes:
        seconds: spent on decoding and showing text, to be left out of a timing.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.seconds = 0.0
        self._write = write

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; a batch of one."""
        start = time.perf_counter()
        super().put(value)
        self.seconds += time.perf_counter() - start

    def end(self) -> None:
        """Show what is left."""
        start = time.perf_counter()
        super().end()
        self.seconds += time.perf_counter() - start

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece of text."""
        self._write(text)


@dataclass
class Answer:
    """What ``generate()`` gave.

    Attributes:
        ids: the new tokens.
        text: the same, decoded, without special tokens.
        prompt_tokens: tokens of the prompt.
        seconds: the call of ``generate()``, without the time spent on showing text.
        statistics: the drafter's, None without one; the time for showing text is taken out of its walk and total.
    """

    ids: list[int]
    text: str
    prompt_tokens: int
    seconds: float
    statistics: GenerationStatistics | None

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, the prefill included."""
        return len(self.ids) / self.seconds


def encode(tokenizer: Any, prompt: str, system: str | None = None, chat: bool = True) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, ``[1, P]`` each, of a prompt.

    One of nothing, or that the chat template refuses, ends the command.

    Args:
        tokenizer: the target's.
        prompt: the user's words.
        system: a system message before them; needs a chat template.
        chat: whether to use the tokenizer's chat template, where it has one.
    """
    if not prompt.strip():
        fail("The prompt is empty.")
    if chat and tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        try:
            encoded = templated(tokenizer, messages, return_tensors="pt")
        except ChatTemplateError as error:
            fail(f"{error} --no-chat-template does without it.")
    elif system:
        fail("--system needs a chat template: the tokenizer has none, or --no-chat-template is given.")
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    # Nothing else (token types): a tree cannot carry it.
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def answer(
    target: PreTrainedModel,
    tokenizer: Any,
    inputs: dict[str, torch.Tensor],
    drafter: FalconDrafter | None = None,
    write: Callable[[str], object] | None = None,
    **options: Any,
) -> Answer:
    """Generate from ``inputs`` (see [`encode`]); what ``generate()`` refuses ends the command.

    Args:
        target: the target.
        tokenizer: its tokenizer.
        inputs: the encoded prompt; moved to the target's device.
        drafter: drafts for it; plain generation without one.
        write: called with each piece of the text as it is ready.
        **options: of ``generate()``.
    """
    inputs = {name: tensor.to(target.device) for name, tensor in inputs.items()}
    streamer = Streamer(tokenizer, write) if write is not None else None
    start = time.perf_counter()
    try:
        output: Any = target.generate(**inputs, assistant_model=drafter, streamer=streamer, **options)
    except ValueError as error:
        fail(str(error))
    prompt_tokens = inputs["input_ids"].shape[1]
    ids = output[0, prompt_tokens:].tolist()  # waits for the device
    seconds = time.perf_counter() - start
    statistics = drafter.last_generation if drafter is not None else None
    if streamer is not None:
        seconds -= streamer.seconds
        if statistics is not None:
            statistics.walk_seconds -= streamer.seconds
            statistics.total_seconds -= streamer.seconds
    return Answer(ids, tokenizer.decode(ids, skip_special_tokens=True), prompt_tokens, seconds, statistics)
