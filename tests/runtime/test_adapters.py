"""PEFT on either side: LoRA targets and drafters are plain models to Falcon, prompt learning is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM

PROMPT = torch.tensor([[3, 17, 9, 9, 21, 4, 11]])


def _copy(target: LlamaForCausalLM) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(target.config)
    copy.load_state_dict(target.state_dict())
    return copy.eval()


def _greedy(model, **kwargs):
    return model.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=24, **kwargs)


def test_a_lora_target_is_generated_from_with_its_adapter(tiny_target, tiny_drafter):
    target = tiny_target()
    torch.manual_seed(0)
    adapted = get_peft_model(
        _copy(target), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    drafter = tiny_drafter(target)
    plain = _greedy(adapted)
    assert torch.equal(_greedy(adapted, assistant_model=drafter), plain)
    assert drafter.last_generation.accepted > 0
    # The control: without the adapter the text is another one, and so it is again when the adapter is switched off.
    assert not torch.equal(plain, _greedy(target))
    with adapted.disable_adapter():
        assert torch.equal(_greedy(adapted, assistant_model=drafter), _greedy(target))


def test_an_adapter_switched_between_calls(tiny_target, tiny_drafter):
    target, drafter = tiny_target(), tiny_drafter(tiny_target())
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(_copy(target), lora, adapter_name="one")
    adapted.add_adapter("other", lora)
    texts = []
    for name in ("one", "other", "one"):
        adapted.set_adapter(name)
        adapted.eval()
        texts.append(_greedy(adapted, assistant_model=drafter))
        assert torch.equal(texts[-1], _greedy(adapted))
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[1])


def test_a_lora_drafter_drafts(tiny_target, tiny_drafter):
    target, drafter = tiny_target(), tiny_drafter(tiny_target())
    torch.manual_seed(0)
    adapted = get_peft_model(drafter, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert torch.equal(_greedy(target, assistant_model=adapted), _greedy(target))
    assert adapted.last_generation.accepted > 0


def test_a_prompt_learning_target_is_refused(tiny_target, tiny_drafter):
    target = tiny_target()
    tuned = get_peft_model(_copy(target), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ValueError, match="prompt-learning"):
        _greedy(tuned, assistant_model=tiny_drafter(target))
