"""Word wrapping of streamed text: however it is cut into pieces, the lines are the same."""

from __future__ import annotations

import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from falcon_hf.cli.wrapping import WordWrapper


def wrapped(pieces: list[str], width: int) -> str:
    file = io.StringIO()
    wrapper = WordWrapper(file, width)
    for piece in pieces:
        wrapper.write(piece)
    wrapper.end()
    return file.getvalue()


@given(text=st.text("ab \n鷹", max_size=60), cuts=st.lists(st.integers(0, 60)), width=st.integers(4, 20))
def test_lines_do_not_depend_on_the_pieces(text: str, cuts: list[int], width: int) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    found = wrapped(pieces, width)
    assert found == wrapped([text], width)
    assert found.split() == text.split()
    for line in found.split("\n"):
        assert cell_len(line) <= width or len(line.split()) == 1


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", "one two\nthree\n"),
        ("one  two\n\n  three", "one  two\n\n  three\n"),
        ("extraordinarily so", "extraordinarily\nso\n"),
        ("鷹鷹 鷹鷹 a", "鷹鷹\n鷹鷹 a\n"),
    ],
)
def test_lines(text: str, lines: str) -> None:
    assert wrapped([text], 8) == lines


def test_a_word_is_shown_as_soon_as_it_is_whole() -> None:
    file = io.StringIO()
    wrapper = WordWrapper(file, 80)
    seen = []
    for piece in ("one t", "wo", " ", "three"):
        wrapper.write(piece)
        seen.append(file.getvalue())
    assert seen == ["one", "one", "one two", "one two"]
