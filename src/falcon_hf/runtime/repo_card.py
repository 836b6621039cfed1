"""The first card of a drafter: what its config alone can say. ``falcon-hf publish`` writes the whole one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

if TYPE_CHECKING:
    from .configuration_falcon_drafter import FalconDrafterConfig

TAG = "falcon-drafter"
"""Every Falcon drafter's tag on the Hub."""

USE = """```python
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

DRAFTER = "organisation/name"  # this repo, or its folder
name = "{target}"
dtype = torch.bfloat16  # torch.float32 on a CPU without bfloat16 instructions (on x86: AVX-512)
target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(name)
drafter = AutoModel.from_pretrained(DRAFTER, trust_remote_code=True, dtype=dtype)

messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128)
print(tokenizer.decode(out[0], skip_special_tokens=True), drafter.last_generation.tau)
```

Or without loading the drafter by hand: `target.generate(**inputs, custom_generate=DRAFTER, trust_remote_code=True)`.
The Python in this repo is all that is needed, besides transformers 5.17 or later; `falcon_hf` need not be installed. On
Linux and a CPU with AVX2 it compiles a small C++ kernel (`native_kernel.py`) at the first generation and keeps it in
`HF_HOME/falcon_hf`; without a compiler (`g++`) it is slower. Pin a `revision=` to run only code you have read."""


def shape_tag(vocab_size: int, hidden_size: int) -> str:
    """The tag that all drafters for targets of this shape share, fine-tunes of one target among them."""
    return f"{TAG}-{vocab_size}x{hidden_size}"


def card_fields(config: FalconDrafterConfig) -> dict[str, Any]:
    """Front matter that follows from the config: base model and relation, library, pipeline, tags."""
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["custom_generate", "speculative-decoding", TAG, shape_tag(config.vocab_size, config.hidden_size)],
    }
    if is_repo_id(config.target_name_or_path):
        # Of the Hub's four relations (adapter, finetune, merge, quantized) the one that means "used with it".
        fields |= {"base_model": config.target_name_or_path, "base_model_relation": "adapter"}
    return fields


def is_repo_id(name: str | None) -> bool:
    """Whether ``name`` can be a model on the Hub, ``organisation/name``, rather than a folder."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return name is not None and name.count("/") == 1 and not name.startswith((".", "/"))


def describe(config: FalconDrafterConfig) -> str:
    """One sentence: block size, fusion, layers, draft vocabulary."""
    fusion = {"lstm": "LSTM fusion", "lstm_stateless": "stateless LSTM fusion", "linear": "linear fusion"}[
        config.fusion
    ]
    layers = f"{config.num_hidden_layers} decoder layer{'s' if config.num_hidden_layers > 1 else ''}"
    words = "the whole vocabulary" if config.draft_vocab_size is None else f"{config.draft_vocab_size:,} tokens"
    return f"Block size k = {config.block_size}, {fusion}, {layers}, drafting over {words}."


def first_card(config: FalconDrafterConfig) -> str:
    """The card's text, from the config alone."""
    target = config.target_name_or_path or "your/target"
    return (
        f"---\n{ModelCardData(**card_fields(config)).to_yaml()}\n---\n\n"
        f"# Falcon drafter for {target.rsplit('/', 1)[-1]}\n\n"
        f"Makes `{target}` generate faster without changing its text: Falcon speculative decoding "
        f"([arXiv 2412.12639](https://arxiv.org/abs/2412.12639)). {describe(config)} "
        "Not related to TII's Falcon models.\n\n"
        f"## Use\n\n{USE.format(target=target)}\n"
    )
