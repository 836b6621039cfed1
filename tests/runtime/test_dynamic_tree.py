"""Dynamic trees: the best N paths by the definition, lossless, and what the config may say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from falcon_hf import FalconCandidateGenerator, FalconDrafterConfig
from falcon_hf.runtime import tree_growth
from falcon_hf.runtime.candidate_generator import drafter_tree
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS
from falcon_hf.runtime.drafter_context import DrafterContext
from falcon_hf.runtime.dynamic_tree import Calibration, DynamicTree, calibrated
from falcon_hf.runtime.target import head_weight, input_embeddings

from .helpers import assert_same_text, break_masks, prompt_ids, with_correction
from .test_batch import ENDING, GREEDY, batch, both
from .test_candidate_generator import VOCAB, another_blocks_states, committed, path_features

SPEC = {"kind": "dynamic", "nodes": 16, "passes": 3, "width": 3, "candidates": 4, "continued": 2}
# So many nodes that those of the last pass are among them, and blocks that hang on different blocks.
LARGE = SPEC | {"nodes": 70, "width": 4}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


def calibration(block_size: int) -> dict[str, Any]:
    """A table a position that falls with the position, for two passes."""
    points = [-6.0, -3.0, -1.0, -0.1]
    tables = [
        [[share * math.exp(x) ** 0.5 for x in points] for share in (0.9 / (1 + 0.2 * j + p) for j in range(block_size))]
        for p in range(2)
    ]
    return {"log_probability": points, "acceptance": tables}


def by_definition(drafter: Any, target: Any, features: Any, tokens: Any, spec: DynamicTree) -> dict[tuple, float]:
    """The best N token paths and their scores, each law from its path alone (see ``path_features``)."""
    head = head_weight(target).to(drafter.dtype)
    found: dict[tuple, float] = {}
    boundary = {(): 0.0}
    for index in range(spec.passes):
        last: dict[tuple, float] = {}
        for start, score in boundary.items():
            level = {start: score}
            for position, estimate in enumerate(path_features(drafter, target, features, tokens, list(start))):
                longer: dict[tuple, float] = {}
                if drafter.correction is not None:  # each path has a law of its own
                    level = likeliest(level, spec.continued)
                for path, s in level.items():
                    own = estimate
                    if drafter.correction is not None and position:
                        before = input_embeddings(target, torch.tensor(path[-1])).to(drafter.dtype)
                        own = drafter.correct(estimate, before)
                    best = (own @ head.T).log_softmax(-1).float().topk(spec.candidates)
                    chances = best.values.tolist()
                    if spec.calibration is not None:
                        points, tables = spec.calibration.tensors(torch.device("cpu"))
                        table = tables[min(index, len(tables) - 1), position]
                        chances = [interpolated(x, points.tolist(), table.tolist()) for x in chances]
                    pairs = zip(best.indices.tolist(), chances, strict=True)
                    longer |= {(*path, token): s + x for token, x in pairs}
                level = longer
                found |= level
            last |= level
        boundary = likeliest(last, spec.width)
    return likeliest(found, spec.nodes)


def likeliest(paths: dict[tuple, float], count: int) -> dict[tuple, float]:
    """Those of the highest scores."""
    return dict(sorted(paths.items(), key=lambda item: -item[1])[:count])


def interpolated(x: float, points: list[float], chances: list[float]) -> float:
    """Log chance at x, linear between the points."""
    if x <= points[0]:
        return math.log(chances[0])
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(points, chances, strict=True)):
        if x <= x1:
            return math.log(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return math.log(chances[-1])


def paths_of(tree: Any, row: int = 0) -> dict[tuple, float]:
    """Token path and score of each node but the root."""
    tokens = tree.tokens[row]
    paths = [tuple(tokens[tree.ancestors[row, node]].tolist()[1:]) for node in range(1, tree.size)]
    assert [len(path) for path in paths] == tree.depths[row, 1:].tolist()
    assert all(tree.parents[row, node] < node for node in range(tree.size))
    parents = [() if parent == 0 else paths[parent - 1] for parent in tree.parents[row, 1:].tolist()]
    assert [path[:-1] for path in paths] == parents
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, tree.scores[row, 1:].tolist(), strict=True))


def tree_error(drafter: Any, target: Any, pairs: int = 7, defined: dict[str, int] | None = None) -> float:
    """Largest difference of scores from the definition's (of a spec with other fields, ``defined``); or infinite."""
    features, tokens = committed(target, pairs)
    drafter.double()
    generator = FalconCandidateGenerator(drafter, target)
    generator.append(features, tokens)
    with torch.no_grad():
        own = paths_of(generator.draft(tokens[:, -1:], max_depth=99))
    spec = dataclasses.replace(generator.shape, **defined or {})
    expected = by_definition(drafter, target, features, tokens, spec)
    if set(own) != set(expected):
        return math.inf
    return max(abs(own[path] - expected[path]) for path in own)


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_tree_is_the_best_paths(tiny_target, tiny_drafter, block_size, fusion, calibrate):
    target = tiny_target(VOCAB)
    spec = LARGE | ({"calibration": calibration(block_size)} if calibrate else {})
    drafter = tiny_drafter(target, block_size, fusion, tree=spec)
    for pairs in (3, 6, 7):  # with fewer, start pairs are alike and so are their laws: ties
        assert tree_error(drafter, target, pairs) < 1e-4


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("block_size", [2, 3])
def test_the_tree_is_the_best_paths_under_corrected_laws(tiny_target, tiny_drafter, block_size, calibrate):
    """The controls: by a definition that continues more nodes, or without the correction, other paths are the best."""
    target = tiny_target(VOCAB)
    spec = LARGE | ({"calibration": calibration(block_size)} if calibrate else {})
    drafter = with_correction(tiny_drafter(target, block_size, "linear", tree=spec, correction_rank=8))
    assert tree_error(drafter, target) < 1e-4
    assert tree_error(drafter, target, defined={"continued": 4}) == math.inf
    drafter.correct = lambda estimates, _: estimates  # in the definition; the draft corrects the head's products
    assert tree_error(drafter, target) > 1e-2


def every_block_visible(monkeypatch):
    plain = DrafterContext.tree_pass

    def tree_pass(self, pairs, tokens, states, positions, visible):
        return plain(self, pairs, tokens, states, positions, torch.ones_like(visible))

    monkeypatch.setattr(DrafterContext, "tree_pass", tree_pass)


def first_blocks_features(monkeypatch):
    plain = tree_growth.Growth.next_boundary

    def next_boundary(*args):
        boundary = plain(*args)
        boundary.blocks.zero_()
        return boundary

    monkeypatch.setattr(tree_growth.Growth, "next_boundary", staticmethod(next_boundary))


@pytest.mark.parametrize("break_it", [another_blocks_states, every_block_visible, first_blocks_features])
def test_the_comparison_sees_broken_passes(tiny_target, tiny_drafter, monkeypatch, break_it):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=LARGE)
    assert tree_error(drafter, target) < 1e-4
    break_it(monkeypatch)
    assert tree_error(drafter, target) > 1e-3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_grows_its_rows_trees(tiny_target, tiny_drafter, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, fusion, tree=SPEC).double()
    lengths = [3, 8, 5]
    texts = [committed(target, length, seed=row) for row, length in enumerate(lengths)]
    features, tokens = (
        torch.nn.utils.rnn.pad_sequence([text[part][0] for text in texts], batch_first=True) for part in (0, 1)
    )
    together = FalconCandidateGenerator(drafter, target, rows=3)
    together.append(features, tokens, lengths)
    tree = together.draft(torch.cat([text[1][:, -1:] for text in texts]), max_depth=5)
    for row, text in enumerate(texts):
        alone = FalconCandidateGenerator(drafter, target)
        alone.append(*text)
        assert paths_of(tree, row) == pytest.approx(paths_of(alone.draft(text[1][:, -1:], max_depth=5)))
    assert not torch.equal(tree.parents[0], tree.parents[1])  # or the rows' shapes would be no test


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_text_is_plain_text(tiny_target, tiny_drafter, block_size, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_size, fusion, tree=SPEC | {"nodes": 40, "candidates": 18})
    for options in ({"do_sample": False}, SAMPLED):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=40, **options)
        assert drafter.last_generation.accepted >= 3


@pytest.mark.parametrize("further", [{"calibration": calibration(2)}, {"pass_cost": 0.2}, {"pass_cost": 50.0}], ids=str)
@pytest.mark.parametrize("options", [{}, ENDING, ENDING | {"repetition_penalty": 1.3}], ids=str)
def test_batch_text_is_plain_text(tiny_target, tiny_drafter, options, further):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=SPEC | {"candidates": 16} | further)
    both(target, drafter, batch(), **(GREEDY | options))


def test_larger_batches_get_fewer_nodes_a_row(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    text = prompt_ids(VOCAB, 6)
    for fewer, sizes in (
        ([], [16, 16, 16, 16]),
        ([[2, 9], [4, 3]], [16, 9, 9, 3]),
        ([[2, 99], [3, 4]], [16, 16, 4, 4]),
    ):
        drafter = tiny_drafter(target, 2, tree=SPEC | {"candidates": 16, "batch_nodes": fewer})
        assert drafter_tree(drafter, target).size == 17  # what a cache for all batches needs
        for rows, size in enumerate(sizes, start=1):
            seen: set[int] = set()
            drafter.on_round = lambda tree, paths, seen=seen: seen.add(tree.size - 1)
            assert_same_text(target, drafter, text.expand(rows, -1), max_new_tokens=24, do_sample=False)
            assert max(seen) == size  # fewer where the text ends


def test_sampled_batch_is_plain_text(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=SPEC | {"candidates": 16})
    for seed in range(2):
        assert_same_text(target, drafter, batch(), seed=seed, max_new_tokens=24, pad_token_id=0, **SAMPLED)


def test_a_wrong_mask_changes_the_text(tiny_target, tiny_drafter, monkeypatch):
    """The control: nodes that see every node before them, not their own path alone."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=SPEC | {"candidates": 16})
    break_masks(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=40, do_sample=False)


def test_a_dear_pass_is_left_out(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    depths = {}
    for cost in (None, 0.01, 50.0):
        generator = FalconCandidateGenerator(tiny_drafter(target, 2, tree=SPEC | {"pass_cost": cost}), target)
        generator.append(features, tokens)
        depths[cost] = int(generator.draft(tokens[:, -1:], max_depth=99).depths.max())
    assert depths[50.0] <= 2 < depths[0.01] == depths[None]


@pytest.mark.parametrize(("nodes", "passes"), [(2, 1), (3, 2), (4, 2), (9, 3)])
def test_passes_that_no_node_could_come_from_are_left_out(tiny_target, tiny_drafter, monkeypatch, nodes, passes):
    """A tree of N nodes is no deeper than N."""
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    further: list[int] = []
    plain = DrafterContext.tree_pass
    monkeypatch.setattr(DrafterContext, "tree_pass", lambda self, *given: further.append(1) or plain(self, *given))
    generator = FalconCandidateGenerator(tiny_drafter(target, 2, tree=SPEC | {"nodes": nodes}), target)
    generator.append(features, tokens)
    generator.draft(tokens[:, -1:], max_depth=99)
    assert 1 + len(further) == passes


@pytest.mark.parametrize("max_depth", [1, 2, 3, 5])
def test_max_depth_is_kept(tiny_target, tiny_drafter, max_depth):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    generator = FalconCandidateGenerator(tiny_drafter(target, 2, tree=SPEC), target)
    generator.append(features, tokens)
    tree = generator.draft(tokens[:, -1:], max_depth=max_depth)
    paths_of(tree)
    assert tree.depths.max() <= max_depth
    assert tree.size == 1 + (4 if max_depth == 1 else 16)


def test_calibration_is_linear_between_its_points():
    points, tables = Calibration((-4.0, -2.0, 0.0), (((0.0, 0.2, 0.6), (0.1, 0.1, 1.0)),)).tensors(torch.device("cpu"))
    chances = calibrated(torch.tensor([-9.0, -3.0, -1.0, 0.0]).expand(1, 1, 2, 4), points, tables[0]).exp()
    assert torch.allclose(chances[0, 0, 0], torch.tensor([1e-6, 0.1, 0.4, 0.6]))
    assert torch.allclose(chances[0, 0, 1], torch.tensor([0.1, 0.1, 0.55, 1.0]))


WRONG_BATCH_NODES: list[Any] = [
    *(4, [4], [[4]], [[4, 2, 1]], [[1, 4]], [[4, 0]], [[4, True]], [[4, 2], [4, 1]]),
    *([[8, 2], [4, 3]], [["4", 2]], [[4, 2.0]], {"4": 2}),
]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({}, "kind"),
        ({"kind": "static", "nodes": 3}, "kind"),
        ({"kind": "dynamic"}, "nodes"),
        ({"kind": "dynamic", "nodes": 0}, "nodes"),
        ({"kind": "dynamic", "nodes": 8, "width": "four"}, "width"),
        ({"kind": "dynamic", "nodes": 8, "depth": 4}, "depth"),
        ({"kind": "dynamic", "nodes": 8, "pass_cost": -1}, "pass_cost"),
        *(({"kind": "dynamic", "nodes": 8, "batch_nodes": pairs}, "batch_nodes") for pairs in WRONG_BATCH_NODES),
        ({"kind": "dynamic", "nodes": 8, "calibration": {"acceptance": []}}, "calibration"),
        ({"kind": "dynamic", "nodes": 8, "calibration": calibration(3)}, "block size"),
        (
            {"kind": "dynamic", "nodes": 8, "calibration": calibration(2) | {"log_probability": [0, -1, -2, -3]}},
            "ascending",
        ),
    ],
)
def test_impossible_trees_are_errors(entry, complaint):
    with pytest.raises(ValueError, match=complaint):
        FalconDrafterConfig(block_size=2, tree=entry)


def test_config_keeps_a_dynamic_tree(tmp_path):
    tree = SPEC | {"calibration": calibration(2), "pass_cost": 0.1, "batch_nodes": [[2, 9], [4, 3]]}
    FalconDrafterConfig(block_size=2, tree=tree).save_pretrained(tmp_path)
    assert FalconDrafterConfig.from_pretrained(tmp_path).tree == tree


def test_more_candidates_than_the_draft_vocabulary_are_refused(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, draft_vocab_size=8, tree=SPEC | {"candidates": 9})
    with pytest.raises(ValueError, match=r"9 siblings.* 8 tokens"):
        FalconCandidateGenerator(drafter, target)
