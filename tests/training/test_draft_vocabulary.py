"""Which tokens a drafter drafts over."""

from __future__ import annotations

import numpy as np
import pytest

from falcon_hf.training.dataset import load_training_data
from falcon_hf.training.draft_vocabulary import choose_draft_vocabulary, coverage

from .test_dataset import ROWS, write_lines


def test_draft_vocabulary_is_the_most_frequent_learned_tokens(tmp_path):
    data = load_training_data(write_lines(tmp_path / "a.jsonl", ROWS), 10, 100)
    # learned: 7 8 9 | 4 6 7 | 9
    assert choose_draft_vocabulary(data, 2, 10).tolist() == [7, 9]
    assert choose_draft_vocabulary(data, 3, 10).tolist() == [4, 7, 9]
    assert choose_draft_vocabulary(data, 3, 10, always=[0]).tolist() == [0, 7, 9]
    assert choose_draft_vocabulary(data, 7, 10).tolist() == [0, 1, 4, 6, 7, 8, 9]
    assert coverage(data, np.array([7, 9]), 10) == pytest.approx(4 / 7)
    for size in (0, 11):
        with pytest.raises(ValueError, match="draft vocabulary"):
            choose_draft_vocabulary(data, size, 10)
