"""Batches whose rows are replaced: the same texts as ``generate()``, and the features of a forward over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from falcon_hf.training import batched_generation, grouped_attention
from falcon_hf.training.batched_generation import Sampler, Text, generate_texts, greedy
from falcon_hf.training.growing_cache import GrowingCache

from ..runtime.families import FAMILIES, SHAPE, tiny_family

VOCAB = 24
END_IDS = [1, 3, 5, 7, 9, 11]
LONGEST = 14


def some_prompts(count: int = 11) -> list[list[int]]:
    """Prompts of 1 to 9 tokens, none of them the end token."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def alone(target: Any, prompt: list[int]) -> list[int]:
    """What ``generate()`` says, prompt by prompt."""
    ids = torch.tensor([prompt])
    out = target.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=LONGEST,
        eos_token_id=END_IDS,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def together(target: Any, prompts: list[list[int]], **options: Any) -> dict[int, Text]:
    options = {"batch_size": 4, "max_new_tokens": LONGEST, "end_ids": END_IDS} | options
    texts = list(generate_texts(target, prompts, **options))
    found = {text.number: text for text in texts}
    assert len(texts) == len(found)
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "opt", "phi3", "olmo3"])
def test_every_text_is_that_of_generate(family: str) -> None:
    target = tiny_family(family, attention="sdpa")
    prompts = some_prompts()
    texts = together(target, prompts)
    assert {number: text.tokens for number, text in texts.items()} == {
        number: alone(target, prompt) for number, prompt in enumerate(prompts)
    }
    lengths = {len(text.tokens) for text in texts.values()}
    assert len(lengths) > 1  # some ended early, so rows were replaced


@pytest.mark.parametrize("width", [8, 24])
def test_values_of_another_width_than_the_keys(width: int) -> None:
    """As in multi-head latent attention, whose heads are 16 wide here."""
    torch.manual_seed(0)
    shape = SHAPE | FAMILIES["deepseek_v3"] | {"v_head_dim": width, "initializer_range": 0.3}
    config = AutoConfig.for_model("deepseek_v3", **shape)
    target = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    prompts = some_prompts(5)
    texts = together(target, prompts)
    assert [texts[number].tokens for number in range(5)] == [alone(target, prompt) for prompt in prompts]


def test_rows_that_see_the_padding_give_other_texts(tiny_target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the mask of a late row's empty slots the comparison above fails."""
    target, prompts = tiny_target(VOCAB), some_prompts()
    padded = batched_generation._padded

    def all_valid(held: torch.Tensor, slots: int) -> torch.Tensor:
        return torch.ones_like(padded(held, slots))

    monkeypatch.setattr(batched_generation, "_padded", all_valid)
    texts = together(target, prompts)
    assert any(texts[number].tokens != alone(target, prompt) for number, prompt in enumerate(prompts))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_any_batch_size(tiny_target: Any, batch_size: int) -> None:
    target, prompts = tiny_target(VOCAB), some_prompts(5)
    texts = together(target, prompts, batch_size=batch_size)
    assert [texts[number].tokens for number in range(5)] == [alone(target, prompt) for prompt in prompts]


def test_grouped_heads_serve_one_query_and_the_model_is_left_as_it_was(
    tiny_target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target(VOCAB)
    calls = []
    whole = grouped_attention.grouped_attention

    def counted(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return whole(module, query, *args, **kwargs)

    monkeypatch.setattr(grouped_attention, "grouped_attention", counted)
    together(target, some_prompts())
    assert 1 in calls
    assert target.config._attn_implementation == "sdpa"
    calls.clear()
    target.set_attn_implementation("eager")
    try:
        texts = together(target, some_prompts())
        assert calls == []
        assert texts[0].tokens == alone(target, some_prompts()[0])
    finally:
        target.set_attn_implementation("sdpa")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_features_are_those_of_a_forward_over_the_text(family: str) -> None:
    target, prompts = tiny_family(family, attention="sdpa"), some_prompts()
    layers = [1, len(target.model.layers)]
    for number, text in together(target, prompts, feature_layers=layers).items():
        ids = torch.tensor([prompts[number] + text.tokens])
        with torch.no_grad():
            states = target(input_ids=ids, output_hidden_states=True, cache=DynamicCache()).hidden_states
        expected = torch.cat([states[layer] for layer in layers], dim=-1)[0]
        assert text.features is not None
        assert text.features.shape == expected.shape
        torch.testing.assert_close(text.features[:-1], expected[:-1], atol=1e-4, rtol=1e-3)
        assert not text.features[-1].any()
        # The control: the row one further on is another one.
        assert not torch.allclose(text.features[:-1], expected[1:], atol=1e-2)


@pytest.mark.parametrize("added", [[2], [7], None])
def test_replaced_rows_keep_what_they_had(added: list[int] | None) -> None:
    """The longer of old and new rows decides where both end; None: rows go and none come."""
    cache, new = GrowingCache(), GrowingCache()
    keys = torch.arange(1, 11.0).view(2, 1, 5, 1)
    cache.update(keys, -keys, 0)
    rows = [[8.0, 9.0, 10.0]]
    if added is not None:
        more = torch.full((1, 1, added[0], 1), 7.0)
        new.update(more, -more, 0)
        rows.append([7.0] * added[0])
    cache.replace_rows(torch.tensor([1]), 2, None if added is None else new)
    longest = max(map(len, rows))
    padded = [[0.0] * (longest - len(row)) + row for row in rows]
    layer = cache.layers[0]
    assert layer.keys[:, 0, :, 0].tolist() == padded
    assert layer.values[:, 0, :, 0].tolist() == [[-value for value in row] for row in padded]
    assert cache.get_seq_length() == longest
    slots, _ = layer.get_mask_sizes(1)
    store, _ = cache.update(torch.full((len(rows), 1, 1, 1), 3.0), torch.zeros(len(rows), 1, 1, 1), 0)
    assert store.shape[2] == slots, "attention gets as many slots as its mask has"
    assert store[:, 0, : longest + 1, 0].tolist() == [[*row, 3.0] for row in padded]


def test_prompts_that_join_together_are_alike_in_length() -> None:
    prompts = some_prompts(40)
    found = list(batched_generation._of_like_length(prompts, 4, 16))
    assert sorted(found) == list(enumerate(prompts))
    assert found == list(batched_generation._of_like_length(iter(prompts), 4, 16)), "the same order every time"
    for first in (0, 16, 32):
        window = sorted(map(len, prompts[first : first + 16]))
        groups = [[len(prompt) for _, prompt in found[at : at + 4]] for at in range(first, min(first + 16, 40), 4)]
        assert sorted(groups) == [window[at : at + 4] for at in range(0, len(window), 4)], "neighbours by length"
    assert [len(prompt) for _, prompt in found[:16]] != sorted(len(prompt) for _, prompt in found[:16])


def test_groups_of_a_larger_batch_are_all_answered(tiny_target: Any) -> None:
    target, prompts = tiny_target(VOCAB), some_prompts(70)
    texts = together(target, prompts, batch_size=16)
    assert [texts[number].tokens for number in range(70)] == [alone(target, prompt) for prompt in prompts]


def test_sampling_is_the_law_cut_at_top_p_and_leaves_the_global_state_alone() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    before = torch.get_rng_state()
    sampler = Sampler(top_p=0.75, seed=3)
    drawn = torch.stack([sampler(logits) for _ in range(3000)])
    assert torch.equal(torch.get_rng_state(), before)
    shares = torch.bincount(drawn.flatten(), minlength=4) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)
    again = Sampler(top_p=0.75, seed=3)
    assert torch.equal(torch.stack([again(logits) for _ in range(50)]), drawn[:50])
    sharper = Sampler(temperature=0.25, top_p=1.0, seed=3)
    shares = torch.bincount(torch.stack([sharper(logits) for _ in range(3000)]).flatten(), minlength=4) / 3000
    torch.testing.assert_close(
        shares[0], torch.tensor(0.5**4 / (0.5**4 + 0.3**4 + 0.15**4 + 0.05**4)), atol=0.03, rtol=0
    )
    assert greedy(logits).tolist() == [0]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}])
def test_impossible_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Sampling needs"):
        Sampler(**settings)


def test_impossible_batches_are_refused(tiny_target: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        together(tiny_target(VOCAB), [[4]], batch_size=0)
    with pytest.raises(ValueError, match="without tokens"):
        together(tiny_target(VOCAB), [[4], []])
    assert together(tiny_target(VOCAB), []) == {}
