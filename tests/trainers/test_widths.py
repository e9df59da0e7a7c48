"""A finished student that is rotated: every figure stays, its first numbers are its best, training goes on from it."""

import numpy as np
import pytest
import torch
from conftest import DIM, make_rows, make_student
from tiny_towers import scatter
from tiny_trainer import make_trainer
from torch import nn

from rows.columns import rows_and_captions
from rows.teacher_columns import teacher_rows
from trainers import DSMDTrainer
from trainers.report import results_table
from trainers.run import distributed
from trainers.teacher_pca import PCA_FILE, fit_pca, load_pca, save_pca
from trainers.widths import figures_by_width, is_rotation, rotate


SETTINGS = {"max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "queue_size": 24, "logging_steps": 1}


@pytest.fixture(scope="module")
def components(rows):
    return fit_pca([teacher_rows(rows)])


@pytest.fixture
def trainer(tmp_path, rows):
    trainer = make_trainer(tmp_path / "run", rows, **SETTINGS)
    scatter(trainer.model)
    return trainer


def figures(metrics: dict) -> dict:
    """Without times, and the figures by width, which only a rotated student has."""
    return {name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name}


def test_every_figure_stays_and_the_numbers_are_the_rotated(trainer, validation_rows, components, tmp_path):
    before, embeds = figures(trainer.evaluate(validation_rows)), trainer.encode(validation_rows)
    assert not any("rsum_at" in name for name in before)
    assert rotate(trainer, lambda: components)
    for old, new in zip(embeds, trainer.encode(validation_rows)):
        np.testing.assert_allclose(new.numpy(), old.double().numpy() @ components.double().numpy(), atol=1e-5)
    after = figures(trainer.evaluate(validation_rows))
    assert len(before) > 30 and {"teacher_index_eval_rsum", "student_index_eval_rsum"} <= before.keys()
    assert {name: after[name] for name in before} == pytest.approx(before, abs=1e-4)
    assert {name for name in after if name not in before} == {
        f"{whose}eval_rsum_at_{k}" for whose in ("", "teacher_") for k in (8,)
    }  # no `teacher_reduced`: the teacher is as wide
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_pca(tmp_path / "saved")
    assert saved.shape == (DIM, DIM) and torch.equal(saved, components)

    model = type(trainer.model).from_pretrained(tmp_path / "saved")
    again = DSMDTrainer(
        model=model, args=trainer.args, processing_class=trainer.processing_class, teacher_projection=saved
    )
    loaded = figures(again.evaluate(validation_rows))
    assert {name: loaded[name] for name in after} == pytest.approx(after, abs=1e-4)


def test_a_rotated_student_that_is_named_brings_its_rotation(trainer, rows, validation_rows, components, tmp_path):
    """Without it, its teacher's features would be those of another space: figures across were by chance."""
    assert rotate(trainer, lambda: components)
    expected = figures(trainer.evaluate(validation_rows))
    trainer.save_model(str(tmp_path / "saved"))
    for given in ({"train_dataset": rows}, {"eval_dataset": {"a": rows}}, {}):
        again = DSMDTrainer(str(tmp_path / "saved"), trainer.args, **given)
        assert torch.equal(again.teacher_projection, components)
        assert figures(again.evaluate(validation_rows)) == pytest.approx(expected, abs=1e-4)
    again = DSMDTrainer(tmp_path / "saved", trainer.args, train_dataset=rows)
    again.train()
    again.save_model(str(tmp_path / "on"))
    assert torch.equal(load_pca(tmp_path / "on"), components)
    other = components.flip(1)  # what is given wins
    assert torch.equal(DSMDTrainer(tmp_path / "saved", trainer.args, None, other).teacher_projection, other)


def test_a_named_student_of_a_wider_teacher_projects_no_narrower_ones_features(trainer, rows, tmp_path):
    trainer.save_model(str(tmp_path / "saved"))
    save_pca(torch.eye(DIM + 8)[:, :DIM], tmp_path / "saved")
    for given in ({"train_dataset": rows}, {"eval_dataset": {"a": rows}}, {"eval_dataset": rows}):
        assert DSMDTrainer(str(tmp_path / "saved"), trainer.args, **given).teacher_projection is None
    wide = DSMDTrainer(str(tmp_path / "saved"), trainer.args, train_dataset=make_rows(32, dim=DIM + 8))
    assert torch.equal(wide.teacher_projection, torch.eye(DIM + 8)[:, :DIM])


def test_training_on_from_a_rotated_student_is_training_on_from_it_unrotated(trainer, rows, components, tmp_path):
    """Gradient descent and all losses of dot products know no directions; the feature loss, of absolute differences,
    does: it is left out."""
    losses, weights = [], trainer.model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    for turned in (False, True):
        student, processor = make_student()
        student.load_state_dict(weights)
        losses_of_dot_products = ["contrastive", "similarity", "hard_negative"]
        args = make_trainer(tmp_path / str(turned), rows, losses=losses_of_dot_products, **SETTINGS).args
        of_run = {"args": args, "processing_class": processor}
        if turned:
            assert rotate(DSMDTrainer(model=student, **of_run), lambda: components)
        projection = components if turned else None
        on = DSMDTrainer(model=student, train_dataset=rows, teacher_projection=projection, **of_run)
        on.train()
        losses.append([entry["loss"] for entry in on.state.log_history if "loss" in entry])
        assert not rotate(on, pytest.fail) if turned else True  # its numbers are sorted already
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
    assert losses[0][0] != losses[0][2]


@pytest.mark.parametrize(
    "given", [None, torch.eye(DIM)[:, :8], torch.eye(DIM + 1), 2 * torch.eye(DIM), torch.full((DIM, DIM), torch.nan)]
)
def test_without_a_rotation_the_student_stays_as_it_is(trainer, given, caplog):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert not rotate(trainer, lambda: given)
    assert f"The student is not rotated: there are no principal components [{DIM}, {DIM}]" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.teacher_projection is None


@pytest.mark.parametrize("error", [ValueError("damaged"), OSError("the Hub"), RuntimeError("memory")], ids=repr)
def test_components_that_cannot_be_had_cost_no_student(trainer, error, caplog, tmp_path):
    def components():
        raise error

    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert not rotate(trainer, components)
    why = f"the principal components of the teacher's features cannot be had ({type(error).__name__}: {error})"
    assert f"The student is not rotated: {why}." in caplog.text
    trainer.save_model(str(tmp_path / "saved"))
    assert load_pca(tmp_path / "saved") is None
    saved = type(trainer.model).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in saved.items())


def test_another_process_asks_for_no_components_and_does_what_the_first_does(trainer, components, monkeypatch, caplog):
    """It neither fits its own nor waits for the first process where that one has none."""
    told = iter([(None, "the Hub is down"), (components, None)])
    monkeypatch.setattr(distributed, "decided_by_first_rank", lambda decide: next(told))
    weight = trainer.model.text_projection.weight.clone()
    assert not rotate(trainer, pytest.fail) and "not rotated: the Hub is down" in caplog.text
    assert torch.equal(trainer.model.text_projection.weight, weight)
    assert rotate(trainer, pytest.fail)
    torch.testing.assert_close(trainer.model.text_projection.weight, components.T @ weight)
    assert torch.equal(trainer.teacher_projection, components)


def test_a_projection_with_a_bias_cannot_be_rotated(trainer, components):
    trainer.model.text_projection = nn.Linear(32, DIM)
    before = trainer.model.visual_projection.weight.clone()
    assert not rotate(trainer, lambda: components)
    assert torch.equal(trainer.model.visual_projection.weight, before)


def test_checkpoints_are_not_rotated_and_the_file_goes_with_the_rotation(trainer, components, tmp_path):
    trainer.train()
    trainer.save_model(str(tmp_path / "on_the_way"))
    assert not (tmp_path / "on_the_way" / PCA_FILE).exists()
    rotate(trainer, lambda: components)
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / PCA_FILE).is_file()


def test_a_student_that_is_its_teacher_keeps_most_in_its_first_numbers(components):
    """Rotated, the cut is the projection on the leading directions, which loses least of the dot products."""
    rng = np.random.default_rng(0)
    spread = np.diag([5.0, 3.0, 2.0, 1.0, *[0.2] * 12]) @ np.linalg.qr(rng.normal(size=(16, 16)))[0]
    image = torch.tensor(rng.normal(size=(200, 16)) @ spread).float()
    text = image + 0.1 * torch.tensor(rng.normal(size=(200, 16))).float()
    rotation = fit_pca([(image, text)])
    assert is_rotation(rotation) and not is_rotation(rotation * 1.01)
    ids = torch.arange(200)
    plain = figures_by_width(image, text, ids, ids, None)
    turned = figures_by_width(image @ rotation, text @ rotation, ids, ids, None)
    assert plain.keys() == {"rsum_at_8"} and turned["rsum_at_8"] > plain["rsum_at_8"]


def test_the_table_has_a_line_for_each_width():
    figures = {f"{way}_r{k}": 10.0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    metrics = {"test_images": 9}
    for whose, rsum in (("", 60.0), ("teacher_", 80.0)):
        metrics |= {f"{whose}test_{name}": value for name, value in {**figures, "rsum": rsum}.items()}
        metrics |= {f"{whose}test_rsum_at_{k}": rsum - 32 / k for k in (8, 32, 16)}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table(metrics).splitlines()]
    found = [line for line in lines if "numbers" in line[0]]
    assert found == [
        ["rsum at 32 numbers", "59.0", "79.0", "74.7 %"],
        ["rsum at 16 numbers", "58.0", "78.0", "74.4 %"],
        ["rsum at 8 numbers", "56.0", "76.0", "73.7 %"],
    ]
    assert not [line for line in lines if "at" in line[0].split()] or len({len(line) for line in lines}) == 1


def test_cutting_the_numbers_of_rows_is_numpys(rows):
    image, text = teacher_rows(rows)
    groups, of = rows_and_captions(rows)
    found = figures_by_width(image, text, groups, of, None)["rsum_at_8"]
    a, b = ((part[:, :8] / part[:, :8].norm(dim=1, keepdim=True)).numpy() for part in (image, text))
    right = groups[:, None].numpy() == groups[of][None].numpy()
    rsum = 0.0
    for s, r in ((a @ b.T, right), ((a @ b.T).T, right.T)):
        has = r.any(1)
        best = np.where(r, s, -np.inf).max(1, keepdims=True)
        ranks = 1 + ((s >= best - 1e-6) & ~r).sum(1)
        rsum += sum(100 * (ranks[has] <= k).mean() for k in (1, 5, 10))
    assert found == pytest.approx(rsum)
