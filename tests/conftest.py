"""Shared fixtures: tiny random targets and drafters, and the real pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_hf import FalconDrafter, FalconDrafterConfig, load_demo_target

DRAFTER_FOLDER = Path(__file__).parents[1] / "hub_cards" / "falcon-smollm2-135m-instruct"

PROMPTS = (
    "Write a Python function that returns the second largest number in a list, and explain one edge case.",
    "A train leaves at 14:20 and arrives at 17:05, with a stop of 15 minutes. How long does it actually move?",
    "Tell the story of a lighthouse keeper who finds a message in a bottle, in three short paragraphs.",
    "List five things to check before cycling to work in winter.",
    "Translate into French: The library opens at nine, but the reading room only at ten.",
    "Explain to a ten-year-old why the moon seems to change its shape.",
    "What is the difference between a process and a thread?",
    "Write a polite e-mail that asks a landlord to repair a dripping kitchen tap.",
)


_tiny_targets: dict[str, LlamaForCausalLM] = {}


def make_tiny_target(vocab_size: int = 24, seed: int = 0, attention: str = "sdpa", **config: Any) -> LlamaForCausalLM:
    """A random two-layer llama in float32. Its weights are large, so that its text is varied, not one token.

    No eos token: texts have the length that a test asks for. Made once for each set of arguments.
    """
    key = repr((vocab_size, seed, attention, sorted(config.items())))
    if key in _tiny_targets:
        return _tiny_targets[key]
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | config))).eval()
    model.set_attn_implementation(attention)
    _tiny_targets[key] = model
    return model


def make_tiny_drafter(
    target: Any, block_size: int = 2, fusion: str = "lstm", seed: int = 1, **overrides: Any
) -> FalconDrafter:
    """A random drafter for a tiny target."""
    torch.manual_seed(seed)
    overrides = {"initializer_range": 0.1} | overrides
    config = FalconDrafterConfig.from_target(target, block_size=block_size, fusion=fusion, **overrides)
    return FalconDrafter(config).eval()


_CORES = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models: sharing their tensors out costs more than computing them."""
    torch.set_num_threads(_CORES if "smollm2" in request.fixturenames else 1)


@pytest.fixture(scope="session")
def tiny_target() -> Callable[..., LlamaForCausalLM]:
    """Factory of tiny targets, cached by arguments: do not change what it returns."""
    return make_tiny_target


@pytest.fixture(scope="session")
def tiny_drafter() -> Callable[..., FalconDrafter]:
    """Factory of tiny drafters: ``tiny_drafter(target, block_size, fusion, tree=...)``."""
    return make_tiny_drafter


@pytest.fixture(scope="session")
def prompts() -> tuple[str, ...]:
    """Varied chat prompts: code, sums, story, list, translation, explanation."""
    return PROMPTS


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The real target in float32, and its tokenizer: do not change them."""
    return load_demo_target(dtype=torch.float32)


@pytest.fixture(scope="session")
def trained_drafter() -> FalconDrafter:
    """The published drafter of the real target, in float32."""
    return FalconDrafter.from_pretrained(DRAFTER_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def chat(smollm2: tuple[Any, Any]) -> Callable[[str], Any]:
    """``chat(prompt)``: the model inputs of a chat prompt."""
    _, tokenizer = smollm2

    def inputs(prompt: str) -> Any:
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    return inputs
