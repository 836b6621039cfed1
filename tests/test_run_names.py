"""What a measured run is called."""

from __future__ import annotations

import pytest

from falcon_hf.run_names import decoding_name, processor_name, setting_name, stem_of_questions

SETTINGS = {
    "questions": {"file": "data/mt_bench.jsonl", "turns": 1},
    "target": {"dtype": "bfloat16"},
    "options": {"do_sample": False, "max_new_tokens": 8},
}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"do_sample": False, "max_new_tokens": 3}, "greedy"),
        ({"max_new_tokens": 3}, "greedy"),
        (
            {"do_sample": False, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
            "greedy, repetition_penalty 1.1, no_repeat_ngram_size 3",
        ),
        ({"do_sample": True}, "temperature as configured"),
        ({"do_sample": True, "top_p": 0.9, "temperature": 0.7}, "temperature 0.7, top_p 0.9"),
    ],
)
def test_decoding_names_every_option(options: dict[str, object], name: str) -> None:
    assert decoding_name(options) == name


def test_batch_and_turns_are_named_where_there_are_several() -> None:
    assert stem_of_questions(SETTINGS) == "mt_bench"
    assert setting_name(SETTINGS) == "bfloat16, greedy"
    assert setting_name(SETTINGS | {"batch_size": 1}) == "bfloat16, greedy"
    several = SETTINGS | {"batch_size": 4, "questions": {"file": "a.jsonl", "turns": 2}}
    assert setting_name(several) == "bfloat16, greedy, batches of 4, up to 2 turns"


def test_a_processor_is_named_with_its_widest_instructions() -> None:
    assert processor_name({"cpu": "Some CPU"}) == "Some CPU"
    assert processor_name({"cpu": "Some CPU", "cpu_capability": "AVX2"}) == "Some CPU (AVX2)"
