"""What is asked of the loader before training: told from a clock of the test's own, and nothing is changed by it."""

import pytest
import torch
from tiny_trainer import make_trainer

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


@pytest.mark.parametrize("asked, by_worker, workers", [(100, 40, 3), (100, 50, 2), (10, 50, 1)])
def test_as_many_workers_as_keep_up(asked, by_worker, workers):
    speed = LoaderSpeed(asked, by_worker)
    assert speed.workers == workers
    assert f"--dataloader_num_workers {workers} would keep up" in describe(speed, workers - 1, 1) or workers == 1
    assert "waited" not in describe(speed, workers, 1) and "waited" not in describe(speed, 0, 1)
    assert "in each process" in describe(speed, workers, 2)
