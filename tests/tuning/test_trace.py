"""The trace against the text and the counts of ``generate()``."""

from __future__ import annotations

import io
import itertools
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from rich.console import Console

from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.trace import GenerationTrace

from ..bench.tiny import VOCABULARY, byte_tokenizer
from ..runtime.helpers import bushy_tree, prompt_ids


@pytest.fixture(scope="module")
def traced(tiny_target, tiny_drafter):
    target = tiny_target()
    drafter = tiny_drafter(target, 2, tree=bushy_tree(24, 3, 8))
    ids = prompt_ids(24, 9)
    with GenerationTrace(drafter) as trace:
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, do_sample=False, max_new_tokens=20
        )
    return drafter, trace, out


def test_trace_gives_the_text_back(traced):
    drafter, trace, out = traced
    segments = trace.segments(out)
    text = [token for segment in segments if segment.kind != "rejected" for token in segment.tokens]
    assert text == out[0].tolist()
    counted = drafter.last_generation
    kinds = {kind: sum(len(one.tokens) for one in segments if one.kind == kind) for kind in ("accepted", "target")}
    assert kinds == {"accepted": counted.accepted, "target": counted.rounds + 1}
    assert counted.accepted > 0
    assert any(segment.kind == "rejected" for segment in segments)
    assert len(trace.rounds) == counted.rounds


def test_rejected_tokens_are_the_drafters_likeliest_that_the_target_did_not_say(traced):
    _, trace, out = traced
    segments = trace.segments(out)
    for one, following in itertools.pairwise(segments):
        if one.kind == "rejected":
            assert following.kind == "target"
            recorded = trace.rounds[one.round - 1]
            path, tokens, parents = recorded.paths[0], recorded.tokens[0], recorded.parents[0]
            first = parents.index(path[-1])
            assert one.tokens[0] == tokens[first]
            if one.round < len(trace.rounds):  # the last round may end for its length, not for its draft
                children = [tokens[node] for node, parent in enumerate(parents) if parent == path[-1]]
                assert following.tokens[0] not in children


def test_nothing_is_recorded_outside_the_block(traced):
    drafter, trace, out = traced
    assert drafter.on_round is None
    rounds = len(trace.rounds)
    with trace:
        assert trace.rounds == []
        with pytest.raises(TuningError, match="No round"):
            trace.segments(out)
        with pytest.raises(TuningError, match="being recorded already"), GenerationTrace(drafter):
            pass
    assert rounds > 0


def test_trace_of_a_batch(tiny_target, tiny_drafter):
    target = tiny_target()
    drafter = tiny_drafter(target, 2, tree=bushy_tree(24, 3, 8))
    ids = torch.cat((prompt_ids(24, 7, 1), prompt_ids(24, 7, 2)))
    with GenerationTrace(drafter) as trace:
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, do_sample=False, max_new_tokens=16
        )
    for row in (0, 1):
        kept = [segment for segment in trace.segments(out, row) if segment.kind != "rejected"]
        assert [token for segment in kept for token in segment.tokens] == out[row].tolist()


def test_the_last_calls_rounds_are_kept(traced, tiny_target):
    """Of two calls in one block the second's; the control is the first's text with them."""
    drafter, trace, _ = traced
    target, texts = tiny_target(), []
    with trace:
        for seed, tokens in ((5, 20), (6, 11)):
            ids = prompt_ids(24, 9, seed)
            texts.append(
                target.generate(
                    ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, do_sample=False,
                    max_new_tokens=tokens,
                )
            )  # fmt: skip

    def kept(out):
        return [token for segment in trace.segments(out) if segment.kind != "rejected" for token in segment.tokens]

    assert len(trace.rounds) == drafter.last_generation.rounds
    assert kept(texts[1]) == texts[1][0].tolist()
    assert kept(texts[0]) != texts[0][0].tolist()


def test_a_drafted_end_token_is_accepted(traced, tiny_target):
    """Each token of a text as its end: shown once, as drafted where it was in the tree."""
    drafter, trace, out = traced
    target, ended = tiny_target(), set()
    prompt = out[:, :9]
    for end in sorted(set(out[0, 9:].tolist())):
        with trace:
            text = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), assistant_model=drafter, do_sample=False,
                max_new_tokens=20, eos_token_id=end, pad_token_id=0,
            )  # fmt: skip
        if not trace.rounds:
            continue  # the prefill's token
        segments = trace.segments(text)
        kept = [token for segment in segments if segment.kind != "rejected" for token in segment.tokens]
        assert kept == text[0].tolist()
        ended.add(segments[-1].kind)
        if segments[-1].kind == "accepted":
            last = [segment.kind for segment in segments if segment.round == segments[-1].round]
            assert last == ["accepted"]
    assert ended == {"accepted", "target"}


def kept_text(page: str) -> str:
    """What a page shows of the text itself, without the rejected drafts."""
    shown: list[str] = []

    class Reader(HTMLParser):
        kept = True

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.kept = not (dict(attrs).get("title") or "").endswith("rejected")

        def handle_data(self, data: str) -> None:
            shown.extend([data] if self.kept else [])

    Reader().feed(page)
    return "".join(shown)


class Words:
    """A tokenizer that, as SentencePiece's do, leaves out the space before the first word of what it decodes."""

    def decode(self, ids: Any) -> str:
        return "".join(f" w{token}" for token in ids).removeprefix(" ")


def test_words_do_not_glue_together(tiny_target, tiny_drafter):
    target = tiny_target(vocab_size=VOCABULARY)
    drafter = tiny_drafter(target, 2, tree=[[rank] for rank in range(64)])
    ids = torch.tensor([[60, 38, 97, 98]])
    with GenerationTrace(drafter) as trace:
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, do_sample=False, max_new_tokens=24
        )
    assert kept_text(trace.html(Words(), out)) == Words().decode(out[0].tolist())
    alone = "".join(Words().decode(segment.tokens) for segment in trace.segments(out) if segment.kind != "rejected")
    assert alone != Words().decode(out[0].tolist())  # the control


def test_terminal_and_html(tiny_target, tiny_drafter):
    target, tokenizer = tiny_target(vocab_size=VOCABULARY), byte_tokenizer()
    drafter = tiny_drafter(target, 2, tree=[[rank] for rank in range(64)])
    ids = torch.tensor([[60, 38, 97, 98]])
    with GenerationTrace(drafter) as trace:
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, do_sample=False, max_new_tokens=24
        )
    page = trace.html(tokenizer, out)
    whole = tokenizer.decode(out[0].tolist())
    assert kept_text(page).replace("\ufffd", "") == whole.replace("\ufffd", "")  # which stand for halves of signs
    assert page.count("<span") == len(trace.segments(out))
    assert 'title="round 1, ' in page
    file = io.StringIO()
    trace.show(tokenizer, out, console=Console(file=file, force_terminal=True, color_system="standard"))
    assert "\x1b[" in file.getvalue()
    assert "rejected" in file.getvalue()
