"""Distillation runs: what they write, how they go on, and what they refuse."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from falcon_hf.training import distillation, distillation_folder
from falcon_hf.training.distillation import DistillationSettings, distil
from falcon_hf.training.distillation_folder import asked_turns, read_lines, save_dataset
from falcon_hf.training.errors import DistillationError
from falcon_hf.training.features import target_digest

from ..bench.tiny import VOCABULARY, byte_tokenizer
from ..runtime.families import CHAIN_FAMILIES, tiny_family

SETTINGS = DistillationSettings(dialogues=9, batch_size=3, max_new_tokens=12, stems=["Say", "Sing a", "Why"], seed=4)


@pytest.fixture
def target(tiny_target: Any) -> Any:
    target = tiny_target(VOCABULARY, seed=33)
    target.generation_config.eos_token_id = list(range(40))
    return target


def dialogues(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "dialogues.jsonl")


def run(target: Any, folder: Path, settings: DistillationSettings = SETTINGS) -> int:
    return sum(1 for _ in distil(target, byte_tokenizer(), settings, folder))


def test_answers_are_the_targets_own(target: Any, tmp_path: Path) -> None:
    assert run(target, tmp_path) == 9
    lines = dialogues(tmp_path)
    turns = [line["turn"] for line in read_lines(tmp_path / "turns.jsonl")]
    assert len({line["n"] for line in lines}) == 9
    tokenizer = byte_tokenizer()
    for line in lines:
        assert tokenizer.decode(line["p"]) == f"<user>{turns[line['n']]}\n<assistant>"
        ids = torch.tensor([line["p"]])
        out = target.generate(input_ids=ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert out[0, len(line["p"]) :].tolist() == line["r"]
    assert save_dataset(tmp_path) == (9, sum(len(line["r"]) for line in lines))
    rows = load_from_disk(str(tmp_path))
    assert rows["input_ids"][0] == lines[0]["p"] + lines[0]["r"]
    assert rows["loss_mask"][0] == [0] * len(lines[0]["p"]) + [1] * len(lines[0]["r"])
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert json.loads(rows.info.description) == recipe
    assert recipe["settings"]["excluded"]["count"] == 0
    assert recipe["settings"]["seed"] == 4
    assert recipe["versions"]["torch"] == torch.__version__


def test_a_run_that_was_cut_off_goes_on(target: Any, tmp_path: Path) -> None:
    list(itertools.islice(distil(target, byte_tokenizer(), SETTINGS, tmp_path), 4))
    with (tmp_path / "dialogues.jsonl").open("a") as file:
        file.write('{"n": 5, "p": [1, 2')  # killed while writing
    before = (tmp_path / "dialogues.jsonl").read_text().splitlines()[:4]
    assert run(target, tmp_path, replace(SETTINGS, batch_size=2)) == 5
    lines = dialogues(tmp_path)
    assert [json.dumps(line, separators=(",", ":")) for line in lines[:4]] == before
    assert len({line["n"] for line in lines}) == 9
    turns = [line["turn"].casefold() for line in read_lines(tmp_path / "turns.jsonl")]
    assert len(set(turns)) == len(turns)
    assert run(target, tmp_path) == 0


def test_two_runs_do_not_write_to_one_folder(target: Any, tmp_path: Path) -> None:
    first = distil(target, byte_tokenizer(), SETTINGS, tmp_path)
    next(first)
    with pytest.raises(DistillationError, match=r"Another run is writing to .*choose another --output"):
        run(target, tmp_path)
    first.close()  # as an interrupted run does
    assert run(target, tmp_path) == 8
    assert len({line["n"] for line in dialogues(tmp_path)}) == 9


def test_features_lie_beside_the_dialogues_and_survive_a_cut(target: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, feature_layers=[1, 2])
    list(itertools.islice(distil(target, byte_tokenizer(), settings, tmp_path), 4))
    with (tmp_path / "features.bfloat16").open("ab") as file:
        file.write(bytes(100))  # features without a line
    run(target, tmp_path, settings)
    width = 2 * target.config.hidden_size
    features = torch.from_numpy(np.fromfile(tmp_path / "features.bfloat16", dtype=np.int16)).view(torch.bfloat16)
    features = features.view(-1, width).float()
    start = 0
    for line in dialogues(tmp_path):
        ids = line["p"] + line["r"]
        with torch.no_grad():
            states = target(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected = torch.cat((states[1], states[2]), dim=-1)[0]
        torch.testing.assert_close(features[start : start + len(ids) - 1], expected[:-1], atol=0.05, rtol=0.02)
        start += len(ids)
    assert start == len(features)
    (tmp_path / "features.bfloat16").write_bytes(bytes(10))
    with pytest.raises(DistillationError, match="lacks features"):
        run(target, tmp_path, replace(settings, dialogues=10))


def test_asking_for_fewer_than_there_are_changes_nothing(target: Any, tmp_path: Path) -> None:
    run(target, tmp_path)
    before = (tmp_path / "recipe.json").read_text()
    assert run(target, tmp_path, replace(SETTINGS, dialogues=2)) == 0
    assert (tmp_path / "recipe.json").read_text() == before


@pytest.mark.parametrize("layers", [[3], [0, 99], [-1, 2]])
def test_layers_that_are_not_there_are_refused_first(target: Any, tmp_path: Path, layers: list[int]) -> None:
    with pytest.raises(DistillationError, match=r"from 0 \(the embeddings\) to 2"):
        run(target, tmp_path / "out", replace(SETTINGS, feature_layers=layers))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", sorted(CHAIN_FAMILIES))
def test_targets_whose_rows_cannot_be_replaced_are_refused_first(tmp_path: Path, family: str) -> None:
    with pytest.raises(DistillationError, match=r"go by a cache's slots.*generate\(\).*\.jsonl"):
        run(tiny_family(family), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_targets_that_nothing_is_drafted_for_are_refused_first(target: Any, tmp_path: Path) -> None:
    stateful = copy.deepcopy(target)
    stateful.config.model_type = "mamba"
    with pytest.raises(DistillationError, match="cannot draft for LlamaForCausalLM: it keeps a recurrent state"):
        run(stateful, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_command_that_failed_before_its_first_dialogue_locks_nothing(target: Any, tmp_path: Path) -> None:
    """A mistyped file of prompts; and turns that were begun in another way are not answered."""
    with pytest.raises(DistillationError, match="There is no file"):
        run(target, tmp_path, replace(SETTINGS, prompts=str(tmp_path / "none.jsonl"), feature_layers=[2]))
    (tmp_path / "turns.jsonl").write_text('{"turn": "Begun otherwise?"}\n')
    (tmp_path / "features.bfloat16").write_bytes(bytes(10))
    assert run(target, tmp_path) == 9
    assert "Begun otherwise?" not in asked_turns(tmp_path)
    assert not (tmp_path / "features.bfloat16").exists()
    assert json.loads((tmp_path / "recipe.json").read_text())["settings"]["prompts"] is None
    with pytest.raises(DistillationError, match="seed differ"):  # the control
        run(target, tmp_path, replace(SETTINGS, seed=5))


def test_turns_that_were_begun_the_same_way_are_kept(target: Any, tmp_path: Path) -> None:
    next(distil(target, byte_tokenizer(), SETTINGS, tmp_path))
    (tmp_path / "dialogues.jsonl").unlink()  # as if it had been cut off before the first
    begun = asked_turns(tmp_path)
    run(target, tmp_path)
    assert asked_turns(tmp_path)[: len(begun)] == begun


def test_a_foreign_recipe_is_never_overwritten(target: Any, tmp_path: Path) -> None:
    """Such as that of a drafter's folder."""
    (tmp_path / "recipe.json").write_text('{"target": {}, "curve": []}')
    with pytest.raises(DistillationError, match="no recipe of falcon-hf distill"):
        run(target, tmp_path)
    assert (tmp_path / "recipe.json").read_text() == '{"target": {}, "curve": []}'


def test_turns_of_another_folder_are_not_asked_again(target: Any, tmp_path: Path) -> None:
    prompts, first, second = tmp_path / "prompts.jsonl", tmp_path / "first", tmp_path / "second"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {number}?"}) + "\n" for number in range(8)))
    settings = replace(SETTINGS, prompts=str(prompts), dialogues=3)
    run(target, first, settings)
    with (first / "turns.jsonl").open("a") as file:
        file.write('{"turn": "Cut o')  # it is being written
    before = (first / "turns.jsonl").read_bytes()
    further = replace(settings, asked=asked_turns(first))
    assert run(target, second, further) == 3
    assert (first / "turns.jsonl").read_bytes() == before
    asked = [{tuple(line["p"]) for line in dialogues(folder)} for folder in (first, second)]
    assert not asked[0] & asked[1]
    recipe = json.loads((second / "recipe.json").read_text())
    assert recipe["settings"]["asked"]["count"] == len(further.asked)
    assert json.loads((first / "recipe.json").read_text())["settings"]["asked"] is None
    with pytest.raises(DistillationError, match="asked differ"):
        run(target, second, replace(settings, dialogues=4))
    run(target, tmp_path / "again", settings)  # the control
    assert {tuple(line["p"]) for line in dialogues(tmp_path / "again")} == asked[0]
    with pytest.raises(DistillationError, match=r"nowhere holds no turns\.jsonl"):
        asked_turns(tmp_path / "nowhere")


def test_folders_from_before_there_were_others_turns_go_on(target: Any, tmp_path: Path) -> None:
    run(target, tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    del recipe["settings"]["asked"]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert run(target, tmp_path, replace(SETTINGS, dialogues=10)) == 1


def test_data_of_other_settings_is_not_mixed_in(target: Any, tiny_target: Any, tmp_path: Path) -> None:
    run(target, tmp_path)
    with pytest.raises(DistillationError, match=r"max_new_tokens differ.*--output"):
        run(target, tmp_path, replace(SETTINGS, max_new_tokens=13))
    with pytest.raises(DistillationError, match="target_fingerprint"):
        run(tiny_target(VOCABULARY, seed=34), tmp_path)
    tuned = copy.deepcopy(target)  # its fingerprint is the same
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(DistillationError, match="target_digest differ"):
        run(tuned, tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(DistillationError, match="no recipe"):
        run(target, tmp_path)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(DistillationError, match=r"without a recipe\.json"):
        run(target, tmp_path)
    assert len(dialogues(tmp_path)) == 9


def test_a_folder_from_before_there_was_a_digest_goes_on_without(target: Any, tmp_path: Path) -> None:
    run(target, tmp_path)
    path = tmp_path / "recipe.json"
    recipe = json.loads(path.read_text())
    assert recipe.pop("target_digest") == target_digest(target)
    path.write_text(json.dumps(recipe))
    assert run(target, tmp_path, replace(SETTINGS, dialogues=11)) == 2
    assert json.loads(path.read_text())["target_digest"] is None


def test_prompts_from_a_file_end_the_run(target: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = ["What is it?", "What is  IT?", "Who?!", "A very long question " * 9]
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    settings = replace(SETTINGS, prompts=str(prompts), max_prompt_tokens=80)
    assert run(target, tmp_path / "out", settings) == 2
    tokenizer = byte_tokenizer()
    asked = sorted(tokenizer.decode(line["p"]) for line in dialogues(tmp_path / "out"))
    assert asked == ["<user>What is it?\n<assistant>", "<user>Who?!\n<assistant>"]
    # A run that died before it saved its dataset can go on to do so, though there is nothing left to answer.
    assert run(target, tmp_path / "out", settings) == 0
    assert caplog.text.count("The prompts ran out at 2 of 9 dialogues") == 2
    assert save_dataset(tmp_path / "out")[0] == 2
    with pytest.raises(DistillationError, match="There was no prompt to answer"):
        run(target, tmp_path / "none", replace(settings, max_prompt_tokens=4))


def test_turns_that_are_always_too_long_end_the_run(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target makes turns without end, so a limit that none meets would be a run without end."""
    monkeypatch.setattr(distillation, "_MOST_TOO_LONG", 5)
    with pytest.raises(DistillationError, match=r"5 prompts in a row were longer than 4 tokens.*--max-prompt-tokens"):
        run(target, tmp_path, replace(SETTINGS, max_prompt_tokens=4))


def test_sampled_answers_repeat_with_the_seed(target: Any, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        run(target, tmp_path / name, replace(SETTINGS, temperature=1.0, seed=seed))
        texts.append([line["r"] for line in dialogues(tmp_path / name)])
    assert texts[0] == texts[1] != texts[2]


def test_what_saves_the_dataset_is_missed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    distillation_folder.need_datasets()  # the control
    monkeypatch.setattr(distillation_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DistillationError, match=r"pip install 'falcon_hf\[train\]'"):
        distillation_folder.need_datasets()


def test_damaged_lines_and_empty_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "dialogues.jsonl").write_text('{"n": 1}\nrubbish\n')
    with pytest.raises(DistillationError, match="line 2"):
        read_lines(tmp_path / "dialogues.jsonl")
    with pytest.raises(DistillationError, match="no dialogues"):
        save_dataset(tmp_path / "nowhere")
    assert distillation_folder.read_lines(tmp_path / "nothing.jsonl") == []
