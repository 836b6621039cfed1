"""The simulated acceptance length, against generate() itself; and the table and walk it is made of."""

from __future__ import annotations

import pytest
import torch

from falcon_hf import TreeShape
from falcon_hf.runtime.machine_trees import MachineTrees
from falcon_hf.training.acceptance import MISSED, TreeTable, block_ranks, simulated_shape, walk
from falcon_hf.training.arguments import FalconTrainingArguments
from falcon_hf.training.batches import DialogueDataset
from falcon_hf.training.evaluation import answer_ranks
from falcon_hf.training.losses import DraftHead
from falcon_hf.training.trainer import FalconTrainer

from ..runtime.helpers import bushy_tree, with_correction
from .conftest import VOCAB, make_text


def evaluated(drafter, target, text, tmp_path, batch_size=5):
    args = FalconTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=batch_size, disable_tqdm=True
    )
    return FalconTrainer(drafter, args, target, eval_dataset=DialogueDataset(text)).evaluate()


@pytest.mark.parametrize(
    ("block_size", "fusion", "config"),
    [
        (1, "linear", {}),
        (2, "linear", {"feature_layers": [1, 2]}),
        (3, "linear", {"embedding_scale": 2.0}),
        (2, "lstm_stateless", {}),
        (4, "linear", {"draft_vocab_size": 20}),
        (3, "linear", {"correction_rank": 8}),
    ],
)
def test_simulated_acceptance_is_that_of_generate(tiny_target, tiny_drafter, tmp_path, block_size, fusion, config):
    """Rounds and tokens of greedy decoding with the real tree, to the last one."""
    target = tiny_target(VOCAB)
    tree = bushy_tree(VOCAB, depth=4, budget=3)
    drafter = tiny_drafter(target, block_size, fusion, tree=tree, **config)
    if drafter.correction is not None:
        with_correction(drafter)
    text = make_text(target, 5, seed=9)
    tokens = rounds = 0
    for row in range(len(text)):
        ids = torch.from_numpy(text.tokens[text.offsets[row] : text.offsets[row + 1]]).long()
        answer = int(text.loss_mask[text.offsets[row] : text.offsets[row + 1]].sum())
        prompt = ids[None, : len(ids) - answer]
        out = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=answer,
            do_sample=False,
            assistant_model=drafter,
        )
        assert out[0].tolist() == ids.tolist()
        tokens += drafter.last_generation.new_tokens - 1
        rounds += drafter.last_generation.rounds
    metrics = evaluated(drafter, target, text, tmp_path)
    assert tokens / rounds > 1.3, "too little is accepted to tell anything"
    assert metrics["eval_tau_with_bonus"] == pytest.approx(tokens / rounds, rel=1e-9)
    assert metrics["eval_tau"] == pytest.approx(tokens / rounds - 1, rel=1e-9)
    # The control: other drafters are not as good by accident.
    others = [tiny_drafter(target, block_size, fusion, seed=seed, tree=tree, **config) for seed in (5, 6, 7)]
    taus = [evaluated(other, target, text, tmp_path)["eval_tau"] for other in others]
    assert any(tau != pytest.approx(metrics["eval_tau"], rel=1e-6) for tau in taus)


def test_report_has_every_place_of_every_pass_and_does_not_depend_on_batches(tiny_target, tiny_drafter, tmp_path):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "linear", tree=[[0], [0, 0], [0, 0, 0], [1]])
    text = make_text(target, 9, seed=3)
    one, other = (evaluated(drafter, target, text, tmp_path, size) for size in (2, 9))
    names = {
        f"eval_pass{number}_position{place}_top{top}" for number in (1, 2) for place in (1, 2) for top in (1, 3, 10)
    }
    assert names <= set(one)
    assert {"eval_loss", "eval_smooth_l1", "eval_kl", "eval_ce", "eval_tau", "eval_tau_with_bonus"} <= set(one)
    for name in names:
        assert one[name] == pytest.approx(other[name], abs=1e-12)
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
    for number in (1, 2):
        tops = [one[f"eval_pass{number}_position1_top{top}"] for top in (1, 3, 10)]
        assert tops == sorted(tops)
        assert tops[0] < tops[2]


def test_tokens_outside_the_draft_vocabulary_are_missed(tiny_target, tiny_drafter, tmp_path):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "linear", tree=[[rank] for rank in range(10)], draft_vocab_size=10)
    text = make_text(target, 9, seed=3)
    learned = text.tokens[text.loss_mask]
    share = (learned < 10).mean()
    assert 0.1 < share < 0.9
    metrics = evaluated(drafter, target, text, tmp_path)
    # All 10 tokens of the draft vocabulary are among the top 10.
    found = [metrics[f"eval_pass1_position{place}_top10"] for place in (1, 2)]
    assert sum(found) / 2 == pytest.approx(share, abs=0.08)


def test_table_follows_paths():
    shape = TreeShape.from_paths([[0], [1], [0, 0], [0, 2], [1, 0], [0, 2, 1]])
    table = TreeTable(shape)
    ranks = torch.tensor(
        [[0, 2, 1], [0, 2, 0], [0, 1, 0], [1, 0, 0], [2, 0, 0], [MISSED, 0, 0], [0, MISSED, 0], [1, 1, 0]]
    )
    assert table.accepted(ranks).tolist() == [3, 2, 1, 2, 0, 0, 1, 1]
    assert table.depth == 3
    assert table.width == 3


@pytest.mark.parametrize("fields", [{"nodes": 24}, {"nodes": 3, "passes": 3}, {"nodes": 1}, {"nodes": 60, "passes": 1}])
def test_a_dynamic_tree_is_simulated_by_a_static_one_of_its_size(tiny_target, tiny_drafter, tmp_path, fields):
    shape = simulated_shape(MachineTrees.from_config({"kind": "dynamic", **fields}, 2), 2)
    assert min(fields["nodes"], 2) <= shape.size <= fields["nodes"] + 1
    assert shape.depth <= 2 * fields.get("passes", 2)
    both = {"kind": "dynamic", "cheap_rows": fields, "dear_rows": {"nodes": 2, "passes": 1}}
    assert simulated_shape(MachineTrees.from_config(both, 2), 2) == shape
    own = TreeShape.from_paths([[0], [1]])
    assert simulated_shape(own, 2) is own
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "linear", tree={"kind": "dynamic", **fields})
    assert evaluated(drafter, target, make_text(target, 3), tmp_path)["eval_tau_with_bonus"] >= 1


def test_ranks_of_a_round_come_from_its_passes():
    first, second = torch.arange(12).view(2, 6), torch.arange(100, 112).view(2, 6)
    ranks = block_ranks([first, second], 2, 3)
    assert ranks.shape == (2, 6, 3)
    assert ranks[0, 1].tolist() == [1, 2, 103]
    assert ranks[1, 4].tolist() == [10, 11, MISSED]


def test_walk_counts_rounds_of_each_stretch():
    learned = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1]]).bool()
    # Stretch of columns 2 to 7: the prefill gives 2, rounds begin at 3 (2 accepted: 3, 4, 5), 6 (5 accepted, but only 6
    # and 7 are left). Stretch 9 to 11: rounds at 10 and 11.
    accepted = torch.tensor([[9, 9, 9, 2, 9, 9, 5, 9, 9, 9, 0, 0]])
    assert walk(accepted, learned) == (3 + 2 + 1 + 1, 4)


def test_ranks_of_answers():
    head = DraftHead(torch.eye(6))
    estimates = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5]])
    assert answer_ranks(estimates, torch.tensor([2, 5]), head, 4).tolist() == [2, 0]
    assert answer_ranks(estimates, torch.tensor([5, -1]), head, 4).tolist() == [MISSED, MISSED]
    assert answer_ranks(estimates, torch.tensor([5, 0]), head, 99).tolist() == [5, 5]
