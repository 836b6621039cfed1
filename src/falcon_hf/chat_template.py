"""A tokenizer's chat template, whose own refusals become errors that say so."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError


class ChatTemplateError(ValueError):
    """A chat template that does not take the messages; the message is the template's."""


def templated(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """``tokenizer.apply_chat_template`` with the header of the answer; a dict of ids unless ``options`` say otherwise.

    Args:
        tokenizer: of the model.
        messages: of roles ``system``, ``user`` and ``assistant``.
        **options: for ``apply_chat_template``.

    Raises:
        ChatTemplateError: if the template refuses the messages, as some do a system message, or is broken.
    """
    options = {"return_dict": options.get("tokenize", True), **options}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except TemplateError as error:
        raise ChatTemplateError(f"The tokenizer's chat template refuses the messages: {error}.") from error
