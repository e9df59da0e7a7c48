"""Batches of a split for the model: prepared by workers, of like length, each row once on any number of ranks."""

import datasets
import pytest
import torch
from conftest import make_rows
from tiny_trainer import make_trainer

from trainers import evaluation_batches
from trainers.evaluation_batches import PreparedBatches, prepared_loader


def parts_of(trainer, rows):
    return rows, trainer.processing_class, trainer.args


def words(trainer, batch) -> list[str]:
    tokenizer = trainer.processing_class.tokenizer
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in batch.get("input_ids", ())]


def test_the_batches_hold_every_image_in_order_and_every_caption_by_length(tmp_path):
    rows = make_rows(7)
    captions = [caption for own in rows["captions"] for caption in own]
    trainer = make_trainer(tmp_path, None, per_device_eval_batch_size=3)
    batches = PreparedBatches(*parts_of(trainer, rows))
    found = [batches[i] for i in range(len(batches))]
    pixels = torch.cat([batch["pixel_values"] for batch in found if "pixel_values" in batch])
    texts = [batch for batch in found if "input_ids" in batch]
    assert [len(batch["pixel_values"]) for batch in found[:3]] == [3, 3, 1] and len(texts) == -(-len(captions) // 3)
    expected = trainer.processing_class.image_processor(images=rows["image"][:], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected)
    said = [text for batch in texts for text in words(trainer, batch)]
    assert said == [captions[i] for i in batches.order] and sorted(batches.order) == list(range(len(captions)))
    assert [len(captions[i]) for i in batches.order] == sorted(map(len, captions))


def test_captions_are_tokenised_by_the_workers(tmp_path, monkeypatch):
    rows = make_rows(7)
    trainer = make_trainer(tmp_path, None, per_device_eval_batch_size=3)
    expected = trainer.encode(rows)
    kind, called = type(trainer.processing_class.tokenizer), []
    tokenise = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: called.append(a) or tokenise(self, *a, **k))
    trainer.encode(rows)
    assert called
    called.clear()
    trainer.args.dataloader_num_workers = 1
    for a, b in zip(expected, trainer.encode(rows)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not called  # in this process


def test_batches_are_pinned_for_a_gpu_alone(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, None, dataloader_pin_memory=True)
    batches = PreparedBatches(*parts_of(trainer, make_rows(3)))
    assert trainer.args.device.type == "cpu"  # where torch would warn
    assert not trainer.args.dataloader_pin_memory and not prepared_loader(batches, trainer.args).pin_memory
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    monkeypatch.setattr(type(trainer.args), "__setattr__", object.__setattr__)
    for asked in (True, False):
        trainer.args.dataloader_pin_memory = asked
        assert prepared_loader(batches, trainer.args).pin_memory is asked


def test_rows_without_a_partner_are_in_no_batch_of_the_other_side(tmp_path):
    rows = make_rows(4)
    features = rows.features
    listed = [dict(row) for row in rows]
    listed[0]["image"], listed[1]["captions"] = None, []
    rows = datasets.Dataset.from_list(listed, features=features)
    trainer = make_trainer(tmp_path, None)
    batches = PreparedBatches(*parts_of(trainer, rows))
    assert (batches.images, batches.captions) == (3, sum(map(len, rows["captions"])))
    image, text = trainer.encode(rows)
    assert len(image) == 3 and len(text) == batches.captions


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_as_many_batches_and_together_they_have_every_row(tmp_path, monkeypatch, world):
    rows = make_rows(7)
    captions = [caption for own in rows["captions"] for caption in own]
    trainer = make_trainer(tmp_path, None, per_device_eval_batch_size=2)
    monkeypatch.setattr(evaluation_batches.distributed, "world_size", lambda: world)
    said, numbers = set(), set()
    for rank in range(world):
        monkeypatch.setattr(evaluation_batches.distributed, "rank", lambda rank=rank: rank)
        batches = PreparedBatches(*parts_of(trainer, rows))
        numbers.add(len(batches))
        for batch in (batches[i] for i in range(len(batches))):
            said.update(words(trainer, batch))
    assert said == set(captions) and len(numbers) == 1
