"""A chat template's own refusal is an error that says so; what else goes wrong stays as it is."""

from __future__ import annotations

import pytest

from falcon_hf.chat_template import ChatTemplateError, templated

from .bench.tiny import byte_tokenizer

HELLO = [{"role": "user", "content": "Hello."}]


def test_ids_and_text_with_the_answers_header() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(templated(tokenizer, HELLO)["input_ids"]) == "<user>Hello.\n<assistant>"
    assert templated(tokenizer, HELLO, return_tensors="pt")["attention_mask"].shape == (1, 24)
    assert templated(tokenizer, HELLO, tokenize=False) == "<user>Hello.\n<assistant>"


@pytest.mark.parametrize("template", ["{{ raise_exception('No system role.') }}", "{{ messages[9].content.upper() }}"])
def test_refused_messages(template: str) -> None:
    with pytest.raises(ChatTemplateError, match="refuses the messages: "):
        templated(byte_tokenizer(template=template), HELLO)
    with pytest.raises(ValueError, match="chat_template is not set") as found:  # not the template's doing
        templated(byte_tokenizer(template=None), HELLO)
    assert not isinstance(found.value, ChatTemplateError)
