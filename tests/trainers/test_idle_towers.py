"""A tower without rows in a batch: nothing of it changes."""

import pytest
import torch
from conftest import make_rows, make_student
from mixed_rows import without_partners
from tiny_trainer import largest_difference, make_trainer

from trainers.idle_towers import idle_towers, inputs_of, one_row


NEVER = lambda i: False  # noqa: E731


def test_what_a_batch_lacks_is_one_row_of_another():
    whole = {"pixel_values": torch.ones(3, 3, 2, 2), "input_ids": torch.ones(4, 5), "attention_mask": torch.ones(4, 5)}
    row = one_row(whole)
    given = inputs_of({"input_ids": torch.zeros(7, 2), "attention_mask": torch.zeros(7, 2), "text_ids": None}, row)
    assert {name: len(of) for name, of in given.items()} == {"pixel_values": 1, "input_ids": 7, "attention_mask": 7}


def test_a_tower_without_rows_keeps_its_running_means(tmp_path):
    vision = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    rows = without_partners(make_rows(16), NEVER, lambda i: True)
    model, _ = make_student(vision)
    before = {name: tensor.clone() for name, tensor in model.vision_model.named_buffers() if "running" in name}
    trainer = make_trainer(tmp_path, rows, model=model)
    trainer.train()
    assert before and all(torch.equal(model.vision_model.get_buffer(name), of) for name, of in before.items())
    assert model.vision_model.training


def test_a_forward_that_fails_leaves_no_tower_in_evaluation_mode():
    """Who catches it, such as a search for a batch size that fits the memory, trains on."""
    model, _ = make_student()
    model.train()
    model.vision_model.eval()  # frozen: it was so before, and stays so
    for batch, idle in (({"input_ids": 0}, []), ({"pixel_values": 0}, ["text_model"])):
        with pytest.raises(torch.OutOfMemoryError), idle_towers(model, batch):
            assert all(not getattr(model, name).training for name in idle)
            raise torch.OutOfMemoryError
        assert model.text_model.training and not model.vision_model.training


def test_a_frozen_tower_sees_no_image_of_a_text_without_one(tmp_path):
    """Its outputs are kept and given in place of images: with them a run is what it is without."""
    rows = without_partners(make_rows(16), lambda i: i % 2 == 0, lambda i: i % 4 == 1)
    students = []
    for name, settings in (("kept", {}), ("computed", {"random_shift": 1e-9})):
        model, _ = make_student()
        trainer = make_trainer(tmp_path / name, rows, model=model, freeze="vision", max_steps=2, **settings)
        trainer.train()
        assert (trainer.train_dataset.pooled_images is None) == bool(settings)
        students.append(model.state_dict())
    assert largest_difference(*students) < 1e-5


def test_images_alone_leave_the_text_tower_as_it_is(tmp_path):
    rows = without_partners(make_rows(16), lambda i: True, NEVER)
    model, _ = make_student()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_trainer(tmp_path, rows, model=model, weight_decay=0.0).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and not any(name.startswith("text") for name in moved)
