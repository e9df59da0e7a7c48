"""A frozen vision tower sees each image once, where every epoch shows it alike."""

import datasets
import pytest
import torch
from conftest import make_student
from frozen_worker import RESNET
from tiny_trainer import largest_difference, make_trainer

from trainers import RetrievalDataset, frozen_vision


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}, {"random_shift": 0.1}], ids=str)
def test_a_frozen_tower_sees_each_image_once_where_all_epochs_show_it_alike(tmp_path, rows, pooling, settings):
    """Trained as with the tower in every step: its outputs do not depend on the batch but for rounding."""
    finals = {}
    for kept in (True, False):
        model = make_student(RESNET if pooling == "pooler" else None)[0]
        model.config.vision_pooling = pooling
        seen = []
        model.vision_model.register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(len(given["pixel_values"])), with_kwargs=True
        )
        run = {"num_train_epochs": 3, "max_steps": -1, "learning_rate": 1e-3, "freeze": "vision", **settings}
        trainer = make_trainer(tmp_path / str(kept), rows, model=model, **run)
        if not kept:
            trainer.begin_training = lambda: None
        seen.clear()  # what the trainer tried before
        trainer.train()
        if kept and "random_shift" not in settings:
            assert sum(seen) == len(rows)
        else:
            assert sum(seen) >= 3 * len(rows)
        finals[kept] = model.state_dict()
    assert largest_difference(finals[True], finals[False]) < (1e-5 if "random_shift" not in settings else 1e-12)


def test_an_image_that_cannot_be_read_is_left_out_beside_a_frozen_tower(tmp_path, rows, caplog):
    trainer = make_trainer(tmp_path, rows, freeze="vision", num_train_epochs=2, max_steps=-1)
    broken = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    broken[5]["image"] = {"bytes": b"no image", "path": None}
    changed = datasets.Dataset.from_list(broken, features=rows.features)
    trainer.train_dataset.rows = RetrievalDataset(changed, with_teacher=True).rows  # it broke after the first check
    trainer.train()
    assert [m for m in caplog.messages if m.startswith("Image left out")] != []
    assert len(trainer.unreadable) == 1 and broken[5]["image_id"] in next(iter(trainer.unreadable))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_outputs_that_would_fill_the_memory_are_not_kept(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(frozen_vision, "MOST_BYTES", 4 * len(rows) * 8 - 1)
    trainer = make_trainer(tmp_path, rows, freeze="vision")
    trainer.train()
    assert trainer.train_dataset.pooled_images is None
