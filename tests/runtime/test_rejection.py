"""``rejection``: its output law by exact enumeration, and the law of whole texts; pruned siblings are the control."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch

from falcon_hf import DraftTree, FalconCandidateGenerator
from falcon_hf.runtime.rejection import Proposals, SiblingDraws, rejection_chances

from .helpers import assert_same_text, prompt_ids, run, with_correction
from .test_batch import batch
from .test_candidate_generator import VOCAB, committed

Law = tuple[Fraction, ...]
SIZE = 3  # tokens of the tiny vocabulary
TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]


def random_law(draw: random.Random, zeros: bool = False) -> Law:
    """A law of small fractions, with some zero entries if asked for."""
    while True:
        parts = [draw.randint(0 if zeros else 1, 6) for _ in range(SIZE)]
        if sum(parts):
            return tuple(Fraction(part, sum(parts)) for part in parts)


def sibling_draws(q: Law, count: int) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    """All ordered draws of ``count`` siblings from q without replacement; fewer once q has run out of tokens."""
    if count == 0 or not sum(q):
        yield (), Fraction(1)
        return
    for token in range(SIZE):
        if q[token]:
            rest = tuple(Fraction(0) if other == token else chance for other, chance in enumerate(q))
            for others, chance in sibling_draws(rest, count - 1):
                yield (token, *others), chance * q[token] / sum(q)


def token_law(p: Law, q: Law, children: tuple[int, ...]) -> Law:
    """The law of the token that follows, given the drawn children: the rule of the docstring, in fractions."""
    law, reached = [Fraction(0)] * SIZE, Fraction(1)
    for x in children:
        accept = min(Fraction(1), p[x] / q[x])
        law[x] += reached * accept
        reached *= 1 - accept
        if not reached:
            return tuple(law)
        rest = [max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)]
        p = tuple(part / sum(rest) for part in rest)
        left = [Fraction(0) if token == x else part for token, part in enumerate(q)]
        q = tuple(part / sum(left) for part in left) if sum(left) else tuple(left)
    return tuple(part + reached * chance for part, chance in zip(law, p, strict=True))


def our_token_law(p: Law, q: Law, children: tuple[int, ...]) -> list[float]:
    """The same from what the code compares a uniform number with, in float64."""
    at_target, at_draft, rest = rejection_chances(
        torch.tensor([float(x) for x in p], dtype=torch.float64),
        torch.tensor([float(x) for x in q], dtype=torch.float64),
        torch.tensor(children, dtype=torch.long),
    )
    law, reached = [0.0] * SIZE, 1.0
    for x, target, draft in zip(children, at_target.tolist(), at_draft.tolist(), strict=True):
        # P(r q < p) for r uniform in [0, 1): 0 where p is 0.
        accept = min(1.0, target / draft) if draft else float(target > 0)
        law[x] += reached * accept
        reached *= 1 - accept
    assert float(rest.sum()) == pytest.approx(1)
    return [part + reached * chance for part, chance in zip(law, rest.tolist(), strict=True)]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("siblings", [1, 2, 3])
def test_one_node_by_enumeration(siblings, zeros):
    draw = random.Random(siblings)
    for _ in range(40):
        p, q = random_law(draw, zeros), random_law(draw, zeros)
        law = [Fraction(0)] * SIZE
        for children, chance in sibling_draws(q, siblings):
            exact = token_law(p, q, children)
            assert our_token_law(p, q, children) == pytest.approx([float(part) for part in exact], abs=1e-12)
            law = [part + chance * more for part, more in zip(law, exact, strict=True)]
        assert tuple(law) == p


def keep_all(children: tuple[int, ...], q: Law) -> tuple[int, ...]:
    return children


def keep_the_more_probable(children: tuple[int, ...], q: Law) -> tuple[int, ...]:
    """A broken tree: of the drawn siblings, those that the drafter thinks more probable, in the order drawn."""
    best = sorted(children, key=lambda token: -q[token])[:1]
    return tuple(token for token in children if token in best)


def two_level_law(
    p: Law, p_next: list[Law], q: Law, q_next: Law, prune: Callable[[tuple[int, ...], Law], tuple[int, ...]]
) -> dict[tuple[int, int], Fraction]:
    """The law of two tokens: both levels draw two siblings; one draw for the second level serves all its parents."""
    law: dict[tuple[int, int], Fraction] = dict.fromkeys(itertools.product(range(SIZE), repeat=2), Fraction(0))
    for first, chance in sibling_draws(q, 2):
        for second, chance_next in sibling_draws(q_next, 2):
            kept, kept_next = prune(first, q), prune(second, q_next)
            for token, reach in enumerate(token_law(p, q, kept)):
                # Not accepted: the next round's first token has the target's law whatever is drafted.
                follow = token_law(p_next[token], q_next, kept_next) if token in kept else p_next[token]
                for other, more in enumerate(follow):
                    law[token, other] += chance * chance_next * reach * more
    return law


@pytest.mark.parametrize(("prune", "exact"), [(keep_all, 40), (keep_the_more_probable, 0)])
def test_two_levels_with_shared_cousins_by_enumeration(prune, exact):
    draw = random.Random(7)
    right = 0
    for _ in range(40):
        p, p_next = random_law(draw), [random_law(draw) for _ in range(SIZE)]
        law = two_level_law(p, p_next, random_law(draw), random_law(draw), prune)
        right += all(law[a, b] == p[a] * p_next[a][b] for a, b in law)
    assert right == exact


def chi_square(counts: Counter[Any], law: dict[Any, float]) -> float:
    """Chi-square per degree of freedom; entries that are never expected may not occur."""
    total = sum(counts.values())
    assert not set(counts) - {key for key, chance in law.items() if chance > 0}
    used = {key: chance * total for key, chance in law.items() if chance > 0}
    return sum((counts[key] - expected) ** 2 / expected for key, expected in used.items()) / (len(used) - 1)


def test_siblings_are_drawn_without_replacement():
    torch.manual_seed(3)
    q = (Fraction(5, 10), Fraction(3, 10), Fraction(2, 10))
    draws = SiblingDraws(2.0, torch.device("cpu"))
    logits = 2 * torch.tensor([float(x) for x in q]).log()  # at temperature 2 the law is q
    drawn, law = draws.siblings(logits.expand(1, 6000, -1), 2)
    assert torch.allclose(law[0, 0], torch.tensor([0.5, 0.3, 0.2]))
    counts = Counter(map(tuple, drawn[0].tolist()))
    assert chi_square(counts, {pair: float(chance) for pair, chance in sibling_draws(q, 2)}) < 2.5


def test_choose_has_the_target_law():
    """The part that the enumeration does not run: uniform numbers, and the draw from what is left."""
    torch.manual_seed(4)
    p, q = torch.tensor([0.6, 0.1, 0.3]), torch.tensor([0.2, 0.5, 0.3])
    draws = SiblingDraws(1.0, torch.device("cpu"))
    counts: Counter[int] = Counter()
    for _ in range(3000):
        children, _ = draws.siblings(q.log(), 2)
        counts[int(draws.choose(p, q, children))] += 1
    assert chi_square(counts, dict(enumerate(p.tolist()))) < 4


@pytest.mark.parametrize("correction", [None, 8])
def test_laws_of_a_tree_are_its_nodes(tiny_target, tiny_drafter, correction):
    """Each node's children are those that the recorded law of its position gives, over a reduced vocabulary."""
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    drafter = tiny_drafter(target, 2, draft_vocab_size=12, tree=TREE, correction_rank=correction)
    if correction is not None:
        with_correction(drafter)
    drafter.draft_vocab_ids.copy_(torch.arange(1, VOCAB, 2))
    generator = FalconCandidateGenerator(drafter, target)

    class Ranked(SiblingDraws):
        def siblings(self, logits, count):
            return logits.topk(count, dim=-1).indices, logits.softmax(-1)

    generator.draw_siblings(Ranked(1.0, torch.device("cpu")))
    generator.append(features, tokens)
    with torch.no_grad():
        tree = generator.draft(tokens[:, -1:], max_depth=9)
    assert tree.proposals is not None
    for node in range(tree.size):
        law = tree.proposals.law(0, node, VOCAB)
        children = (tree.parents[0] == node).nonzero()[:, 0].tolist()
        assert tree.proposals.children[node].tolist() == children
        assert float(law[::2].sum()) == 0
        if children:
            assert float(law.sum()) == pytest.approx(1)
            assert tree.tokens[0, children].tolist() == law.topk(len(children)).indices.tolist()
        else:
            assert float(law.sum()) == 0


def text_law(target: Any, prompt: torch.Tensor, steps: int, options: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """The exact law of sampled texts, by running the target over every prefix."""
    laws: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(steps):
        longer = {}
        for text, chance in laws.items():
            ids = torch.cat((prompt, torch.tensor([text], dtype=torch.long)), dim=1)
            with torch.no_grad():
                logits = target(ids).logits[0, -1] / options["temperature"]
            kept = logits.topk(options["top_k"])
            for token, share in zip(kept.indices.tolist(), kept.values.softmax(-1).tolist(), strict=True):
                longer[(*text, token)] = chance * share
        laws = longer
    return laws


def sampled_texts(target: Any, drafter: Any, prompt: torch.Tensor, steps: int, **options: Any) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    for seed in range(6):
        texts, _ = run(
            target,
            seed,
            prompt,
            assistant_model=drafter,
            num_return_sequences=256,
            max_new_tokens=steps,
            do_sample=True,
            **options,
        )
        counts.update(map(tuple, texts[:, prompt.shape[1] :].tolist()))
    return counts


class FixedSiblings(SiblingDraws):
    """A broken proposal: always the likeliest siblings, though judged as if drawn."""

    def siblings(self, logits, count):
        scaled = logits.float() / self.temperature
        return scaled.topk(count, dim=-1).indices, scaled.softmax(-1)


@pytest.mark.parametrize("broken", [False, True])
def test_text_has_plain_decodings_law(tiny_target, tiny_drafter, monkeypatch, broken):
    from falcon_hf.runtime import generation

    target = tiny_target(6, initializer_range=0.2)
    drafter = tiny_drafter(target, 2, tree=TREE, verifier="rejection")
    prompt, options = prompt_ids(6, 5), {"temperature": 1.2, "top_k": 3}
    law = text_law(target, prompt, 4, options)
    if broken:
        monkeypatch.setattr(generation, "SiblingDraws", FixedSiblings)
    statistic = chi_square(sampled_texts(target, drafter, prompt, 4, **options), law)
    assert (statistic > 2) if broken else (statistic < 1.5)
    assert broken or drafter.last_generation.accepted > 256


def test_a_seed_gives_one_text_and_another_another(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE, verifier="rejection")
    options = {"do_sample": True, "max_new_tokens": 20, "pad_token_id": 0, "assistant_model": drafter, "top_k": 0}
    for inputs in (prompt_ids(VOCAB, 6), batch()):
        texts = [run(target, seed, inputs, **options)[0].tolist() for seed in (0, 0, 1)]
        assert texts[0] == texts[1] != texts[2]


def test_greedy_follows(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE, verifier="rejection")
    for inputs in (prompt_ids(VOCAB, 6), batch()):
        assert_same_text(target, drafter, inputs, max_new_tokens=30, pad_token_id=0, do_sample=False)


def test_processors_and_ends_hold(tiny_target, tiny_drafter):
    """Scores are recorded and processed once an emitted token, and rows end at their eos token."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE, verifier="rejection")
    wanted = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": [5, 7], "pad_token_id": 0}
    output, _ = run(
        target, 1, batch(), assistant_model=drafter, do_sample=True, max_new_tokens=20, bad_words_ids=[[3]], **wanted
    )
    prompt = batch()["input_ids"].shape[1]
    texts = output.sequences[:, prompt:]
    assert len(output.scores) == texts.shape[1]
    assert not (texts == 3).any()
    for row in texts.tolist():
        end = next((at for at, token in enumerate(row) if token in (5, 7)), len(row))
        assert set(row[end + 1 :]) <= {0}


@pytest.mark.parametrize(
    ("tree", "complaint"), [({"kind": "dynamic", "nodes": 8}, "static"), ([[0], [2]], r"\[2\]"), ([[1]], r"\[1\]")]
)
def test_trees_that_would_bend_the_law_are_refused(tiny_target, tiny_drafter, tree, complaint):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=tree, verifier="rejection")
    with pytest.raises(ValueError, match=complaint):
        target.generate(prompt_ids(VOCAB, 6), assistant_model=drafter, do_sample=True, max_new_tokens=4)
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=4, do_sample=False)


def test_a_tree_not_drawn_has_no_proposals():
    assert DraftTree.root_only(torch.tensor([[1]])).proposals is None
    laws = torch.rand(1, 1, 2)
    assert Proposals(laws, (0,), (torch.tensor([]),), None).law(0, 0, 4)[2:].tolist() == [0, 0]
