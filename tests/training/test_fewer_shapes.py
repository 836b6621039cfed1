"""Rounded shapes change no loss: what fills them has none."""

from __future__ import annotations

import pytest
import torch

from falcon_hf.training import fewer_shapes, losses, trainer
from falcon_hf.training.fewer_shapes import filled, makes_code_by_shape, padded_rows, widened

from .conftest import VOCAB
from .test_trainer import fresh, train
from .test_trainer import losses as curve


@pytest.fixture
def everywhere(monkeypatch):
    """Rounded shapes in float32 too, to small numbers that do round."""

    def turn_on() -> None:
        for module in (trainer, losses):
            monkeypatch.setattr(module, "makes_code_by_shape", lambda device, dtype: True)
        monkeypatch.setattr(fewer_shapes, "COLUMNS", 16)
        monkeypatch.setattr(fewer_shapes, "POSITIONS", 32)

    return turn_on


def test_only_a_cpu_in_half_precision_makes_code_by_shape():
    assert makes_code_by_shape(torch.device("cpu"), torch.bfloat16)
    assert not makes_code_by_shape(torch.device("cpu"), torch.float32)
    assert not makes_code_by_shape(torch.device("cuda"), torch.bfloat16)


def test_a_batch_gets_padding_and_keeps_its_lengths():
    batch = {"input_ids": torch.ones(2, 33), "features": torch.ones(2, 33, 5), "lengths": torch.tensor([33, 20])}
    wide = widened(batch)
    assert wide["input_ids"].shape == (2, 64)
    assert wide["features"].shape == (2, 64, 5)
    assert wide["input_ids"].sum() == 66
    assert wide["features"].sum() == 330
    assert wide["lengths"] is batch["lengths"]
    assert widened(wide) is wide


def test_other_columns_fill_the_wanted_up():
    wanted = torch.zeros(3, 100, dtype=torch.bool)
    wanted[1, 10:40] = True
    full = filled(wanted)
    assert full.sum() == 128
    assert full[wanted].all()
    assert filled(full).equal(full)
    most = torch.ones(3, 100, dtype=torch.bool)
    most[0, 0] = False
    assert filled(most).all(), "there are not more"


def test_rows_are_padded_with_zeros():
    rows = padded_rows(torch.ones(65, 3))
    assert rows.shape == (128, 3)
    assert rows.sum() == 195
    assert padded_rows(rows) is rows


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({}, {"rollout_start": 0.0, "rollout_passes": 1}),
        ({}, {"rollout_start": 0.0, "rollout_passes": 3, "rollout_share": 0.5}),
        ({"correction_rank": 4, "draft_vocab_size": 16}, {"rollout_start": 0.0, "rollout_passes": 2}),
        ({"correction_rank": 4}, {"rollout_passes": 1, "glance_lambda": 0.0}),
    ],
)
def test_the_curve_is_the_same(tiny_target, tiny_drafter, tiny_text, tmp_path, everywhere, config, given):
    target = tiny_target(VOCAB)
    plain = train(fresh(tiny_drafter, target, **config), target, tiny_text, tmp_path / "plain", **given)
    everywhere()
    rounded = train(fresh(tiny_drafter, target, **config), target, tiny_text, tmp_path / "rounded", **given)
    assert curve(rounded) == pytest.approx(curve(plain), rel=1e-4)


def test_a_loss_on_what_fills_would_be_seen(tiny_target, tiny_drafter, tiny_text, tmp_path, everywhere, monkeypatch):
    """The control: another curve if what fills is learned from."""
    target = tiny_target(VOCAB)
    plain = train(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "plain", noise=0.0)
    everywhere()
    pairs_of = trainer.make_pairs

    def all_learned(*arguments):
        pairs = pairs_of(*arguments)
        pairs.learned.copy_(filled(pairs.learned))
        return pairs

    monkeypatch.setattr(trainer, "make_pairs", all_learned)
    wrong = train(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "wrong", noise=0.0)
    assert curve(wrong) != pytest.approx(curve(plain), rel=1e-3)
