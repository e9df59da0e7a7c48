"""A collapsed student is warned of, by name, once; one that learns is not."""

import logging

import pytest
import torch
from conftest import make_rows, make_student
from tiny_trainer import make_trainer
from torch.nn.functional import normalize

from trainers import TeacherRows, hard_negative_distillation
from trainers.collapse import constant_sides, pairs_at_the_margin


def rows_around(cosine: float, count: int = 400, dim: int = 64) -> torch.Tensor:
    """Unit rows whose cosines with each other are so large in the mean."""
    noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = 0
    noise = normalize(noise, dim=1)
    center = torch.zeros(dim)
    center[0] = cosine**0.5
    return center + (1 - cosine) ** 0.5 * noise


@pytest.mark.parametrize("cosine, sign", [(0.5, False), (0.99, False), (0.998, False), (0.9995, True), (1.0, True)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_rows_that_are_nearly_one(cosine, sign, scale):
    near, apart = scale * rows_around(cosine), rows_around(0.3)
    cosines = normalize(near, dim=1) @ normalize(near, dim=1).T
    assert (cosines.mean() > 0.999) == sign
    assert constant_sides(near, apart) == ["images"] * sign
    assert constant_sides(apart, near) == ["captions"] * sign
    assert constant_sides(near, near) == ["images", "captions"] * sign


def test_one_row_says_nothing():
    assert constant_sides(torch.ones(1, 4), torch.ones(1, 4)) == []


def test_the_hinge_of_a_collapsed_student_is_twice_the_margin():
    """Teacher rows that differ at right angles to what the student makes of everything: no row is nearer."""
    teacher = torch.cat([torch.zeros(5, 1), torch.eye(5)], dim=1)
    student = torch.eye(6)[:1].repeat(5, 1)
    rows = (student, student, teacher, teacher, torch.arange(5), torch.arange(5))
    step = TeacherRows(teacher, torch.arange(5), teacher, torch.arange(5))
    losses = hard_negative_distillation(*rows, step=step, margin=0.2)
    assert all(loss.item() == pytest.approx(0.4) for loss in losses.values())
    log = [{f"loss_hard_negative_{pair}": loss.item() for pair, loss in losses.items()}, {"eval_rsum": 1.0}]
    assert pairs_at_the_margin(log * 2, 0.2) == []
    assert pairs_at_the_margin(log * 3, 0.2) == ["II", "TT", "IT", "TI"]
    assert pairs_at_the_margin(log * 3, 0.3) == []


def test_a_hinge_that_passes_the_margin_does_not_stay_there():
    falling = [{"loss_hard_negative_II": value, "loss_hard_negative_TT": 0.4} for value in (0.5, 0.4, 0.3)]
    assert pairs_at_the_margin(falling, 0.2) == ["TT"]
    assert pairs_at_the_margin([{"loss_hard_negative_II": 0.4}, *falling[1:], falling[2]], 0.2) == ["TT"]
    assert pairs_at_the_margin([], 0.2) == []


@pytest.mark.parametrize("side", ["images", "captions"])
def test_a_collapsed_student_is_warned_of_once(tmp_path, caplog, side):
    model, _ = make_student()
    tower = model.vision_model if side == "images" else model.text_model
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.zero_()
        for module in tower.modules():  # the last norm then gives its bias
            if isinstance(module, torch.nn.LayerNorm):
                module.bias.fill_(1.0)
    trainer = make_trainer(tmp_path, None, model=model)
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        trainer.evaluate(make_rows(12, seed=1))
    warned = [record.message for record in caplog.records if "collapsed" in record.message]
    assert len(warned) == 1 and f"all {side} have nearly the same embedding" in warned[0]
    assert "Lower learning_rate" in warned[0]


@pytest.mark.parametrize("kind", ["fixed", "teacher"])
def test_a_hinge_that_stays_at_its_margin_is_warned_of(tmp_path, caplog, kind):
    trainer = make_trainer(tmp_path, None, hard_negative_margin_kind=kind)
    trainer.state.log_history = [{"loss": 1.0, "loss_hard_negative_II": 0.4001, "step": step} for step in range(3)]
    trainer.evaluate(make_rows(12, seed=1))
    assert ("the hard-negative loss of II stays at twice its margin, 0.2" in caplog.text) == (kind == "fixed")


def test_a_student_that_learns_is_not_warned_of(tmp_path, rows, validation_rows, caplog):
    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": validation_rows}
    make_trainer(tmp_path, rows, **settings).train()
    assert "collapsed" not in caplog.text
