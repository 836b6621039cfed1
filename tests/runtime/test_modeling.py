"""``FalconDrafter``: mask, fusion, the agreement of training and inference, and what its file holds."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from falcon_hf import FalconCandidateGenerator, FalconDrafter, FalconDrafterConfig
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS
from falcon_hf.runtime.modeling_falcon_drafter import DrafterCache, relaxed_causal_mask
from falcon_hf.runtime.target import head_weight, input_embeddings

from .test_candidate_generator import committed, recorded_draft

VOCAB = 24


def pairs_of(target, drafter, length, seed=3):
    """A whole pair sequence, start pairs included: features and embeddings ``[1, length + k - 1, H]``."""
    features, tokens = committed(target, length, seed)
    embeddings = input_embeddings(target, tokens)
    return drafter.start_pairs(features).to(drafter.dtype), drafter.start_pairs(embeddings).to(drafter.dtype)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
def test_relaxed_causal_mask_is_the_papers(block_size):
    """Query i sees key j iff block(j) <= block(i), blocks counted with each row's own offset."""
    offsets = torch.arange(block_size)
    mask = relaxed_causal_mask(11, block_size, offsets)
    assert mask.shape == (block_size, 1, 11, 11)
    for row, offset in enumerate(offsets.tolist()):
        for query in range(11):
            for key in range(11):
                expected = (key + offset) // block_size <= (query + offset) // block_size
                assert bool(mask[row, 0, query, key]) == expected
    if block_size == 1:
        assert torch.equal(mask[0, 0], torch.ones(11, 11, dtype=torch.bool).tril())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_shapes(tiny_target, tiny_drafter, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 3, fusion)
    features = torch.randn(2, 9, 64)
    out = drafter(features, torch.randn(2, 9, 64), block_offset=torch.tensor([0, 2]))
    assert out.shape == (2, 9, 64)
    assert drafter.logits(out, head_weight(target)).shape == (2, 9, VOCAB)
    assert drafter.start_pairs(features).shape == (2, 11, 64)
    assert drafter.start_pairs(features)[:, :2].abs().max() == 0
    assert torch.equal(drafter.start_pairs(features)[:, 2:], features)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_inference_is_the_training_path_at_every_alignment(tiny_target, tiny_drafter, block_size, fusion):
    """The last block of the training forward is what an incremental generator drafts from, token by token."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_size, fusion).double()
    features, tokens = committed(target, 3 * block_size + 2)
    embeddings = input_embeddings(target, tokens).double()
    generator = FalconCandidateGenerator(drafter, target)
    for end in range(1, features.shape[1] + 1):
        generator.append(features[:, end - 1 : end], tokens[:, end - 1 : end])
        _, passes = recorded_draft(generator, tokens[:, end - 1 : end])
        pairs = drafter.start_pairs(features[:, :end].double()), drafter.start_pairs(embeddings[:, :end])
        columns = pairs[0].shape[1]
        with torch.no_grad():
            trained = drafter(*pairs, block_offset=torch.tensor([-columns % block_size]))
            misaligned = drafter(*pairs, block_offset=torch.tensor([(1 - columns) % block_size]))
        assert torch.allclose(passes[0], trained[0, -block_size:], rtol=1e-9, atol=1e-9)
        if block_size > 1 and end > 1:
            assert not torch.allclose(passes[0], misaligned[0, -block_size:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rows_and_padding_do_not_touch_each_other(tiny_target, tiny_drafter, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, fusion).double()
    short, long = pairs_of(target, drafter, 5, 1), pairs_of(target, drafter, 9, 2)
    padded = [torch.cat((part, torch.full((1, 4, 64), 9.0, dtype=part.dtype)), dim=1) for part in short]
    both = [torch.cat(parts) for parts in zip(padded, long, strict=True)]
    real = torch.ones(2, 10, dtype=torch.bool)
    real[0, 6:] = False
    offset = torch.tensor([0, 1])
    with torch.no_grad():
        out = drafter(*both, block_offset=offset, pair_mask=real)
        assert torch.allclose(out[:1, :6], drafter(*short, block_offset=offset[:1]), atol=1e-9)
        assert torch.allclose(out[1:], drafter(*long, block_offset=offset[1:]), atol=1e-9)
    assert out.isfinite().all()


def test_stateless_fusion_is_the_lstm_from_a_zero_state(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    stateful, stateless = tiny_drafter(target, 2, "lstm"), tiny_drafter(target, 2, "lstm_stateless")
    stateless.load_state_dict(stateful.state_dict())
    features, embeddings = torch.randn(2, 2, 5, 64)
    with torch.no_grad():
        fused, state = stateless.fusion(features, embeddings)
        assert state is None
        assert not stateless.fusion.is_recurrent
        for position in range(5):
            one = slice(position, position + 1)
            alone, _ = stateful.fusion(features[:, one], embeddings[:, one])
            assert torch.allclose(fused[:, one], alone, atol=1e-6)
        whole, _ = stateful.fusion(features, embeddings)
    assert torch.allclose(whole[:, 0], fused[:, 0], atol=1e-6)
    assert not torch.allclose(whole[:, 1:], fused[:, 1:], atol=1e-3)


def test_lstm_state_carries_on(tiny_target, tiny_drafter):
    fusion = tiny_drafter(tiny_target(VOCAB), 2, "lstm").fusion
    features, embeddings = torch.randn(2, 1, 7, 64)
    with torch.no_grad():
        whole, end = fusion(features, embeddings)
        first, state = fusion(features[:, :4], embeddings[:, :4])
        second, last = fusion(features[:, 4:], embeddings[:, 4:], state)
    assert fusion.is_recurrent
    assert torch.allclose(torch.cat((first, second), dim=1), whole, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(last, end, strict=True))


def test_drafter_cache_grows_and_crops():
    cache = DrafterCache(1)
    written = torch.randn(1, 2, 700, 4)
    for start, end in [(0, 3), (3, 255), (255, 257), (257, 700)]:
        keys, values = cache.write(0, written[:, :, start:end], -written[:, :, start:end])
        cache.advance(end - start)
        assert torch.equal(keys, written[:, :, :end])
        assert torch.equal(values, -written[:, :, :end])
    cache.crop(10)
    keys, _ = cache.write(0, written[:, :, 500:502], written[:, :, 500:502])
    assert torch.equal(keys, torch.cat((written[:, :, :10], written[:, :, 500:502]), dim=2))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_folder_keeps_the_drafter(tiny_target, tiny_drafter, tmp_path, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 3, fusion, draft_vocab_size=10, tree=[[0], [1]])
    drafter.draft_vocab_ids.copy_(torch.arange(0, 20, 2))
    drafter.save_pretrained(tmp_path)
    for loaded in (FalconDrafter.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is FalconDrafter
        assert not loaded.training
        assert loaded.draft_vocab_ids.tolist() == list(range(0, 20, 2))
        ours, theirs = drafter.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        pairs = pairs_of(target, drafter, 5)
        offset = torch.tensor([1])
        with torch.no_grad():
            assert torch.equal(loaded(*pairs, block_offset=offset), drafter(*pairs, block_offset=offset))
        assert loaded.last_generation is None


def test_a_file_holds_the_drafter_alone(tiny_target, tiny_drafter, tmp_path):
    """After use, too: embedding and head are the target's, and are never saved."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2)
    target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, assistant_model=drafter)
    drafter.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        shapes = {tuple(file.get_slice(name).get_shape()) for name in names}
    assert names == {name for name, _ in drafter.named_parameters()}
    assert names
    assert all(name.split(".")[0] in ("fusion", "layers") for name in names)
    assert not any(VOCAB in shape for shape in shapes)


def test_rotary_tables_survive_a_load_without_initialisation(tiny_target, tiny_drafter, tmp_path):
    """They are not in the file: a load that initialises nothing must still make them."""
    drafter = tiny_drafter(tiny_target(VOCAB), 2)
    drafter.save_pretrained(tmp_path)
    loaded = FalconDrafter.from_pretrained(tmp_path)
    assert torch.equal(loaded.rotary.inv_freq, drafter.rotary.inv_freq)


def test_draft_head_takes_the_rows_of_the_draft_vocabulary(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    head = head_weight(target)
    assert tiny_drafter(target, 2).draft_head(head) is head
    reduced = tiny_drafter(target, 2, draft_vocab_size=3, tree=[[0]])
    reduced.draft_vocab_ids.copy_(torch.tensor([1, 5, 9]))
    assert torch.equal(reduced.draft_head(head), head[[1, 5, 9]])


def test_weights_are_initialised(tiny_target):
    """No parameter is left as it was allocated, and the LSTM has room to pass signals on."""
    torch.manual_seed(0)
    config = FalconDrafterConfig.from_target(tiny_target(VOCAB), initializer_range=0.02)
    drafter = FalconDrafter(config)
    for name, parameter in drafter.named_parameters():
        assert parameter.isfinite().all()
        if "lstm.weight" in name:
            assert float(parameter.detach().std()) == pytest.approx(64**-0.5, rel=0.1)
        elif "proj.weight" in name:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_gradients_reach_every_weight(tiny_target, tiny_drafter):
    for fusion in ("lstm", "linear"):  # stateless cells never read their recurrent weights
        drafter = tiny_drafter(tiny_target(VOCAB), 2, fusion)
        drafter(torch.randn(1, 6, 64), torch.randn(1, 6, 64), block_offset=torch.tensor([1])).square().sum().backward()
        for name, parameter in drafter.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
