"""Pixels that travel as bytes: the same numbers, so the same student."""

import numpy as np
import pytest
import torch
from conftest import make_rows, make_student
from mixed_rows import mixed_rows
from PIL import Image
from tiny_trainer import largest_difference, make_trainer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from trainers import base_trainer
from trainers.batches import RetrievalCollator, RetrievalDataset
from trainers.loader_speed import measure
from trainers.pixel_bytes import pixel_bytes, pixel_numbers, pixel_table, table_on


IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    for seed, (height, width) in enumerate([(40, 60), (224, 224), (7, 90)])
]
MEAN, STD = [0.1, 0.5, 0.9], [0.2, 0.5, 0.4]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(base_trainer, "table_on", lambda device, processor: pixel_table(processor))


@pytest.mark.parametrize("make", [
    ViTImageProcessorPil,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
    MobileViTImageProcessorPil,  # it turns the channels round
    lambda: ViTImageProcessorPil(image_mean=MEAN, image_std=STD),
    lambda: ViTImageProcessorPil(do_normalize=False),
])  # fmt: skip
def test_the_numbers_are_the_processor_s(make):
    processor = make()
    table = pixel_table(processor)
    found = pixel_bytes(processor, IMAGES)
    assert found.dtype == torch.uint8
    expected = processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_numbers(found, table), expected)


def test_the_table_by_hand():
    table = pixel_table(ViTImageProcessorPil(image_mean=MEAN, image_std=STD))
    expected = (np.arange(256) / 255 - np.array(MEAN)[:, None]) / np.array(STD)[:, None]
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("processor", [EfficientNetImageProcessorPil(), object()])  # the one gives floats, always
def test_what_gives_no_bytes_is_called_as_ever(processor):
    assert pixel_table(processor) is None


def test_on_a_cpu_pixels_stay_numbers(tmp_path):
    assert table_on(torch.device("cpu"), ViTImageProcessorPil()) is None
    assert table_on(torch.device("meta"), ViTImageProcessorPil()).is_meta
    trainer = make_trainer(tmp_path, make_rows(8))
    assert trainer.pixel_table is None and not trainer.data_collator.as_bytes


def test_only_the_pixels_of_a_batch_differ():
    _, processor = make_student()
    examples = RetrievalDataset(mixed_rows(9), with_teacher=True).__getitems__(list(range(9)))
    plain, small = (RetrievalCollator(processor, 32, as_bytes=as_bytes)(examples) for as_bytes in (False, True))
    pixels = small.pop("pixel_values")
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixel_numbers(pixels, pixel_table(processor.image_processor)), plain.pop("pixel_values"))
    assert str(small) == str(plain)
    texts_alone = RetrievalCollator(processor, 32, as_bytes=True)([examples[2]])
    assert "pixel_values" not in texts_alone


@pytest.mark.parametrize("rows, settings", [
    (make_rows(32), {"random_shift": 0.1, "gradient_accumulation_steps": 2}),
    (make_rows(32), {"freeze": "vision"}),
    (mixed_rows(30), {"per_device_train_batch_size": 2}),  # steps of images alone, of texts alone
], ids=["views", "frozen", "mixed"])  # fmt: skip
def test_the_student_is_the_same(tmp_path, rows, settings, as_on_a_gpu, monkeypatch):
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, **settings}
    small = make_trainer(tmp_path / "bytes", rows, **settings)
    assert small.data_collator.as_bytes
    monkeypatch.undo()
    plain = make_trainer(tmp_path / "numbers", rows, **settings)
    assert not plain.data_collator.as_bytes
    for trainer in (small, plain):
        trainer.train()
    assert largest_difference(small.model.state_dict(), plain.model.state_dict()) == 0


def test_the_loader_is_measured_with_bytes(tmp_path, as_on_a_gpu):
    assert measure(make_trainer(tmp_path, make_rows(16))).by_worker > 0
