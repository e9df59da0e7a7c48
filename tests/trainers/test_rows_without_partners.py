"""Training on images without captions and texts without images: batches, steps, queues, resume."""

import math

import pytest
import torch
from conftest import DIM, make_rows, make_student
from mixed_rows import mixed_rows, without_partners
from tiny_trainer import first_gradients, largest_difference, make_trainer

from rows.columns import id_hash, pairs_of, partners
from rows.teacher_columns import teacher_rows, teacher_width
from trainers import ContrastiveTrainer
from trainers.batches import RetrievalCollator, RetrievalDataset, Views


SMOOTH = ["contrastive", "feature", "similarity"]
NEVER = lambda i: False  # noqa: E731


@pytest.fixture(scope="module")
def mixed():
    return mixed_rows(48)


def collated(rows, **views) -> dict:
    _, processor = make_student()
    examples = RetrievalDataset(rows, with_teacher=True, views=Views(**views)).__getitems__(list(range(len(rows))))
    return RetrievalCollator(processor, max_length=16)(examples)


def test_who_has_a_partner_is_read_of_a_selection_too(mixed):
    has_image, counts = partners(mixed)
    assert has_image.tolist() == [i % 3 != 2 for i in range(48)]
    assert counts.tolist() == [len(own) for own in mixed["captions"]]
    assert pairs_of(mixed).tolist() == list(range(0, 48, 3))
    assert pairs_of(mixed.select([5, 3, 4, 0])).tolist() == [1, 3]
    image, text = teacher_rows(mixed)
    assert image.shape == (32, DIM) and text.shape == (sum(counts), DIM)
    assert teacher_width({"train": mixed.select([2])}) == DIM


def test_a_batch_of_mixed_rows(mixed):
    rows = mixed.select(range(9))
    batch = collated(rows)
    assert batch["pixel_values"].shape[0] == len(batch["image_groups"]) == len(batch["teacher_image"]) == 6
    captions = [(i, j) for i, own in enumerate(rows["captions"]) for j in range(len(own))]
    assert len(batch["input_ids"]) == len(batch["teacher_text"]) == len(captions)
    groups = [id_hash(group) for group in rows["group_id"]]
    assert batch["image_groups"].tolist() == [groups[i] for i in batch["image_to_row"]]
    assert batch["text_groups"].tolist() == [groups[i] for i in batch["caption_to_row"]]
    for c, image in enumerate(batch["caption_to_image"].tolist()):
        row = int(batch["caption_to_row"][c])
        assert image == -1 if row % 3 == 2 else batch["image_to_row"][image] == row
        assert (c in batch["paired_captions"]) == (image >= 0) != (c in batch["lonely_captions"])
        own = torch.tensor(rows[row]["teacher_text_embeds"]).half()
        assert any(torch.equal(batch["teacher_text"][c], feature) for feature in own)
    assert [int(batch["image_to_row"][i]) % 3 for i in batch["lonely_images"]] == [1, 1, 1]
    for i, row in enumerate(batch["image_to_row"].tolist()):
        assert torch.equal(batch["teacher_image"][i], torch.tensor(rows[row]["teacher_image_embeds"]).half())


def test_a_batch_of_one_side_alone(mixed):
    images, texts = collated(mixed.select([1, 4])), collated(mixed.select([2, 5]))
    assert "input_ids" not in images and images["teacher_text"].shape == (0, DIM)
    assert "pixel_values" not in texts and texts["teacher_image"].shape == (0, DIM)
    assert set(texts["caption_to_image"].tolist()) == {-1} and len(images["caption_to_image"]) == 0


@pytest.mark.parametrize("targets", ["pairs", "teacher"])
@pytest.mark.parametrize("queue_size", [0, 24])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, queue_size, targets):
    """Micro-batches of four rows: some are of images alone, or of texts alone."""
    kinds = [1, 1, 1, 1, 2, 2, 2, 2, 0, 1, 2, 0, 0, 0, 0, 0]
    # In the order in which they are drawn, which is found first.
    order = make_trainer(tmp_path / "order", make_rows(16), per_device_train_batch_size=16)
    drawn = next(iter(order.get_train_dataloader()))["image_ids"]
    kind_of = {int(name.split("/")[1]): kind for name, kind in zip(drawn, kinds)}
    rows = without_partners(make_rows(16), lambda i: kind_of[i] == 1, lambda i: kind_of[i] == 2)
    settings = {"losses": SMOOTH, "balancer": "fixed", "loss_weights": [1.0, 30.0, 3.0], "queue_size": queue_size}
    settings["contrastive_targets"] = targets
    whole, _ = first_gradients(tmp_path / "a", rows, per_device_train_batch_size=16, **settings)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    parts, trainer = first_gradients(tmp_path / "b", rows, **sizes, **settings)
    assert (trainer.num_images, trainer.num_pairs > 5, trainer.num_lonely_images) == (11, True, 5)
    assert largest_difference(whole, parts) < 1e-5
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3


def test_a_loss_without_queries_enters_neither_balancer_nor_log(tmp_path):
    """Hard negatives of pairs alone, where nothing has a partner."""
    rows = without_partners(make_rows(32), lambda i: i % 2 == 0, lambda i: i % 2 == 1)
    settings = {"max_steps": 3, "hard_negative_pairs": ["IT", "TI"], "balancer": "dynamic"}
    trainer = make_trainer(tmp_path / "with", rows, **settings)
    trainer.train()
    seen = trainer.balancer.seen.tolist()
    assert seen == [4, 4, 4, 0]  # the first step's losses set the state, then each step's
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert not any(name.startswith("loss_hard_negative") for name in log) and log["share_hard_negative"] == 0
    assert all(math.isfinite(value) for value in log.values())
    without = make_trainer(tmp_path / "without", rows, **settings, losses=SMOOTH)
    without.train()
    of_others = [trainer.balancer.weights()[:3], without.balancer.weights()]
    torch.testing.assert_close(*(of / of.sum() for of in of_others))


@pytest.mark.parametrize("balancer", ["published", "geometric_mean", "dwa", "uncertainty", "random", "fixed"])
def test_every_balancer_trains_without_pairs(tmp_path, balancer):
    rows = without_partners(make_rows(32), lambda i: i % 2 == 0, lambda i: i % 2 == 1)
    trainer = make_trainer(tmp_path, rows, max_steps=3, hard_negative_pairs=["IT", "TI"], balancer=balancer)
    trainer.train()
    assert torch.isfinite(trainer.balancer.weights()).all()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_gives_the_same_run(tmp_path, mixed, stop):
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "captions_per_image": 2, "save_strategy": "steps"}
    settings |= {"save_steps": stop, "per_device_train_batch_size": 4, "random_shift": 0.2, "max_grad_norm": 1.0}
    unbroken = make_trainer(tmp_path / "unbroken", mixed, **settings)
    unbroken.train()
    resumed = make_trainer(tmp_path / "resumed", mixed, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{stop}"))
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0
    assert largest_difference(unbroken.distillation_state(), resumed.distillation_state()) == 0.0


def test_queues_are_clamped_to_the_images_and_texts_there_are(tmp_path, mixed):
    trainer = make_trainer(tmp_path, mixed, queue_size=1000)
    assert (trainer.image_queue.size, trainer.text_queue.size) == (32, sum(map(len, mixed["captions"])))


def test_training_without_a_teacher_refuses_rows_without_partners(tmp_path, mixed):
    with pytest.raises(ValueError, match="32 of 48 rows of train have no partner .* --method contrastive"):
        make_trainer(tmp_path, mixed, trainer_class=ContrastiveTrainer)
