"""What is asked of the loader before training: told from a clock of the test's own, and nothing is changed by it."""

import datasets
import pytest
import torch
from mixed_rows import without_partners
from tiny_trainer import make_trainer

from rows import checks
from trainers import loader_speed
from trainers.loader_speed import LoaderSpeed, describe, measure


def test_it_follows_from_the_times_of_making_a_batch_and_of_a_forward(tmp_path, rows, monkeypatch):
    trainer = make_trainer(tmp_path, rows, random_zoom=0.1, random_shift=0.1)
    times = iter([9.0, 0.5, 3.0, 0.25])  # the first of each warms up

    def seconds_of(call):
        call()
        return next(times)

    monkeypatch.setattr(loader_speed, "seconds_of", seconds_of)
    before, weights = torch.get_rng_state(), [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.model.train()
    speed = measure(trainer)
    assert speed == LoaderSpeed(asked=4 / (3 * 0.25), by_worker=4 / 0.5)
    assert torch.equal(torch.get_rng_state(), before) and trainer.model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))


def test_it_is_left_out_where_no_image_is_loaded(tmp_path, rows):
    assert measure(make_trainer(tmp_path, rows, freeze="vision")) is None
    assert measure(make_trainer(tmp_path, rows.to_iterable_dataset(), max_steps=1)) is None


def with_broken_images(rows, broken):
    """The rows, with bytes that are no image in some; the check before training reads a sample of a large dataset."""
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    table = [{**row, "image": {"bytes": b"broken", "path": None}} if broken(i) else row
             for i, row in enumerate(undecoded)]  # fmt: skip
    return datasets.Dataset.from_list(table, features=rows.features)


@pytest.mark.parametrize(
    "broken, images", [(lambda i: i < 16, 3), (lambda i: i < 32, 2), (lambda i: True, None)], ids=["16", "32", "64"]
)
def test_unreadable_images_end_no_run(tmp_path, rows, monkeypatch, broken, images):
    monkeypatch.setattr(checks, "load_rgb", lambda image: None)
    trainer = make_trainer(tmp_path, with_broken_images(rows, broken))
    assert of_one_second(monkeypatch, trainer) == images


def test_images_are_counted_and_not_rows(tmp_path, rows, monkeypatch):
    """Every second row is a text without an image."""
    trainer = make_trainer(tmp_path, without_partners(rows, lambda i: False, lambda i: i % 2 == 0))
    monkeypatch.setattr(trainer.train_dataset, "rows", trainer.train_dataset.rows.select([0, 1, 2, 3]))
    assert of_one_second(monkeypatch, trainer) == 2
    monkeypatch.setattr(trainer.train_dataset, "rows", trainer.train_dataset.rows.select([0, 0, 2, 2]))
    assert of_one_second(monkeypatch, trainer) is None


def of_one_second(monkeypatch, trainer) -> float | None:
    """What a worker makes where all that is timed takes a second: the images of the measured batch."""
    monkeypatch.setattr(loader_speed, "seconds_of", lambda call: (call(), 1.0)[1])
    speed = measure(trainer)
    return speed and speed.by_worker


@pytest.mark.parametrize("asked, by_worker, workers", [(100, 40, 3), (100, 50, 2), (10, 50, 1)])
def test_as_many_workers_as_keep_up(asked, by_worker, workers):
    speed = LoaderSpeed(asked, by_worker)
    assert speed.workers == workers
    assert f"--dataloader_num_workers {workers} would keep up" in describe(speed, workers - 1, 1) or workers == 1
    assert "waited" not in describe(speed, workers, 1) and "waited" not in describe(speed, 0, 1)
    assert "in each process" in describe(speed, workers, 2)
