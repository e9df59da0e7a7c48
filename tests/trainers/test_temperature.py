"""The temperature of a finished student, against a search over scales and through a whole trainer."""

import math

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows, make_student
from mixed_rows import without_partners
from scipy.optimize import minimize_scalar

from trainers import DSMDTrainer, DSMDTrainingArguments, temperature
from trainers.temperature import fit_temperature, likeliest_scale, pairs_of_own_groups


def embeds(noise: float, count: int = 40, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, dim, generator=generator)
    text = image + noise * torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1)


def cross_entropy(scale: float, image: torch.Tensor, text: torch.Tensor) -> float:
    logits = scale * image.double().numpy() @ text.double().numpy().T
    right = np.diagonal(logits)
    return sum(float((np.log(np.exp(logits).sum(axis)) - right).mean()) for axis in (0, 1))


@pytest.mark.parametrize("noise", [0.7, 1.5, 3.0])
def test_the_scale_is_that_of_another_minimiser(noise):
    pair = embeds(noise)
    found = minimize_scalar(lambda scale: cross_entropy(scale, *pair), bounds=(1, 100), method="bounded")
    assert 1.5 < found.x < 99  # inside the range
    assert likeliest_scale(*pair) == pytest.approx(found.x, rel=1e-3)


def test_the_ends_of_the_range():
    image, text = embeds(0.0)
    assert likeliest_scale(image, text) == pytest.approx(100)  # no pair is ever missed
    assert likeliest_scale(image, text.flip(0)) == pytest.approx(1)  # all are


def test_pairs_have_a_group_of_their_own_and_both_halves(monkeypatch):
    rows = make_rows(20)
    groups = rows["group_id"]
    assert len(set(groups)) == 16 and pairs_of_own_groups(rows)["group_id"] == list(dict.fromkeys(groups))
    monkeypatch.setattr(temperature, "MOST_PAIRS", 5)
    assert pairs_of_own_groups(rows)["image_id"] == [f"0/{i}" for i in (1, 5, 10, 13, 17)]
    captions = [[] if i < 18 else own for i, own in enumerate(rows["captions"])]
    images = [None if i == 19 else row["bytes"] and row for i, row in enumerate(undecoded(rows)["image"])]
    half = datasets.Dataset.from_dict(
        {"image": images, "captions": captions, "image_id": rows["image_id"]}
    ).cast_column("image", datasets.Image())
    assert pairs_of_own_groups(half)["image_id"] == ["0/18"]


def test_what_has_no_partner_stands_in_no_pairs_way(monkeypatch):
    """Rows 0 and 1, and 2 and 3, are of one group each; the first of both has no partner, and so have 30 texts."""
    rows = without_partners(make_rows(34), lambda i: i == 2, lambda i: i == 0 or i > 3)
    groups = ["a", "a", "b", "b", *(f"text {i}" for i in range(30))]
    feature = datasets.Value("string")
    rows = rows.remove_columns("group_id").add_column("group_id", groups, feature=feature)
    assert pairs_of_own_groups(rows)["image_id"] == ["0/1", "0/3"]
    monkeypatch.setattr(temperature, "MOST_PAIRS", 3)  # the texts would take their places
    assert pairs_of_own_groups(rows)["image_id"] == ["0/1", "0/3"]
    assert len(pairs_of_own_groups(rows.select(range(4, 34)))) == 0


def undecoded(rows):
    return rows.cast_column("image", datasets.Image(decode=False))


@pytest.fixture
def trainer(tmp_path, rows, validation_rows):
    model, processor = make_student()
    args = DSMDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_caption_length=32)
    return DSMDTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=validation_rows, processing_class=processor
    )


def test_the_student_is_given_it_and_ranks_as_before(trainer, validation_rows):
    before = trainer.evaluate()
    start = trainer.model.logit_scale.item()
    found = fit_temperature(trainer, validation_rows)
    assert found["candidates"] == len(set(validation_rows["group_id"]))
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(found["scale"]), abs=1e-6)
    assert trainer.model.logit_scale.item() != start
    after = trainer.evaluate()
    recalls = [name for name in before if name.endswith(("_r1", "_r5", "_r10", "rsum"))]
    assert len(recalls) >= 7 and all(before[name] == after[name] for name in recalls)


def test_without_pairs_nothing_is_changed(trainer, validation_rows):
    start = trainer.model.logit_scale.item()
    assert fit_temperature(trainer, validation_rows.select([0])) is None
    assert trainer.model.logit_scale.item() == start
