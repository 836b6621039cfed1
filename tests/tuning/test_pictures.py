"""Pictures: what is drawn is what was given; and the trace against the text and the counts of ``generate()``."""

from __future__ import annotations

import io
import itertools
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from rich.console import Console

from falcon_hf import TreeShape
from falcon_hf.tuning.acceptance import ParametricAcceptance
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.pictures import draw_lines, draw_sweep, draw_tree, save
from falcon_hf.tuning.trace import GenerationTrace

from ..bench.tiny import VOCABULARY, byte_tokenizer
from ..runtime.helpers import bushy_tree, prompt_ids

SHAPE = TreeShape.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def test_tree_shows_every_node_with_its_chance():
    model = ParametricAcceptance(2, 4, 0.6)
    figure = draw_tree(SHAPE, model.score, title="a tree")
    axes = figure.axes[0]
    shown = [text.get_text() for text in axes.texts]
    for path in SHAPE.paths:
        assert f"{model.score(path):.2f}" in shown
    (points,) = axes.collections
    assert len(points.get_offsets()) == SHAPE.size
    assert sorted(-points.get_offsets()[:, 1]) == sorted(SHAPE.depths)
    assert points.get_array().tolist() == [1.0, *(model.score(path) for path in SHAPE.paths)]
    assert len(axes.lines) == SHAPE.size - 1, "one edge a node below the root"
    assert axes.get_title() == "a tree"


def test_no_two_nodes_of_a_depth_share_a_place():
    figure = draw_tree(TreeShape.paper(2), lambda path: 0.5)
    places = figure.axes[0].collections[0].get_offsets().tolist()
    assert len({tuple(place) for place in places}) == TreeShape.paper(2).size


def test_tree_takes_a_mapping_and_labels():
    figure = draw_tree(SHAPE, dict.fromkeys(SHAPE.paths, 0.25), labels=["the", *"abcdefg"])
    assert {"the", "a", "g", "0.25"} <= {text.get_text() for text in figure.axes[0].texts}


def test_saved_as_svg_and_png(tmp_path):
    svg, png = save(draw_tree(SHAPE, lambda path: 0.5), tmp_path / "new" / "tree")
    assert ET.parse(svg).getroot().tag.endswith("svg")
    assert png.read_bytes().startswith(b"\x89PNG")


def entry(k, m, nodes, speedup):
    own = {"speedup": speedup, "tokens_per_second": 10 * speedup}
    return {
        "drafter": f"k{k}", "block_size": k, "passes": m, "nodes": nodes, "measured": own,
        "predicted": {name: 2 * value for name, value in own.items()},
    }  # fmt: skip


def test_sweep_is_one_heat_map_a_block_size():
    check = {"settings": [entry(2, 1, 8, 1.5), entry(2, 1, 16, 1.25), entry(2, 2, 8, 1.75), entry(3, 1, 8, 0.5)]}
    figure = draw_sweep(check)
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["k = 2", "k = 3"]
    table = maps[0].images[0].get_array()
    assert table.tolist() == [[1.5, 1.25], [1.75, None]], "a cell that was not measured stays empty"
    predicted = draw_sweep(check, "tokens_per_second", "predicted")
    assert predicted.axes[0].images[0].get_array()[0, 0] == 30
    with pytest.raises(TuningError, match="no settings"):
        draw_sweep({"settings": []})


def test_lines():
    figure = draw_lines({"7B": [(0.1, 1.0), (0.9, 3.0)]}, "x", "y", "t")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1.0, 3.0]


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TuningError, match=r"pip install 'falcon_hf\[tune\]'"):
        draw_lines({"a": [(0, 1)]}, "x", "y")


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
