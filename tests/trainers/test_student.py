"""Students of tower folders as the Hub has them: their image processors, their position embeddings; towers of timm."""

import numpy as np
import pytest
import torch
from beside import run_checks
from PIL import Image
from tiny_towers import bert, convnext, deit, dinov2, make_processor, mobilevit, modernbert, roberta, swin, vit
from transformers import (
    AutoModel,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
)

from rows.texts import text_positions
from trainers.student import StudentArguments, build_student


MEAN, STD = [0.48, 0.45, 0.40], [0.27, 0.26, 0.28]


def build(folder, vision, text, image_processor=None):
    AutoModel.from_config(vision).save_pretrained(folder / "vision")
    AutoModel.from_config(text).save_pretrained(folder / "text")
    processor = make_processor()
    (image_processor or processor.image_processor).save_pretrained(folder / "vision")
    processor.tokenizer.save_pretrained(folder / "text")
    arguments = StudentArguments(
        vision_model_name_or_path=str(folder / "vision"), text_model_name_or_path=str(folder / "text")
    )
    return build_student(arguments, [], 8)


CROP = {"crop_size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD}


@pytest.mark.parametrize(
    "vision, image_processor",
    [  # the classes and flags that checkpoints of these towers have
        (deit, DeiTImageProcessorPil(size={"height": 36, "width": 36}, **CROP)),
        (dinov2, BitImageProcessorPil(size={"shortest_edge": 36}, **CROP)),
        (vit, CLIPImageProcessorPil(size={"shortest_edge": 32}, **CROP)),
        (swin, ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, resample=3)),
        (convnext, ConvNextImageProcessorPil(size={"shortest_edge": 32}, image_mean=MEAN, image_std=STD)),
        (mobilevit, MobileViTImageProcessorPil(size={"shortest_edge": 36}, crop_size=CROP["crop_size"])),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_images_are_squashed_not_cropped_and_keep_the_checkpoints_colours(tmp_path, vision, image_processor):
    model, processor = build(tmp_path, vision(), bert(), image_processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 75, 3), dtype=np.uint8))
    pixels = processor.image_processor(images=[image, image.resize((32, 40))], return_tensors="pt")["pixel_values"]
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    if vision is mobilevit:
        expected = expected[:, :, ::-1]  # BGR, not normalised
    else:
        expected = (expected - MEAN) / STD
    assert pixels.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(pixels[0].numpy(), expected.transpose(2, 0, 1), atol=2e-5)
    model.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    saved = AutoProcessor.from_pretrained(tmp_path / "student").image_processor
    assert torch.equal(saved(images=image, return_tensors="pt")["pixel_values"], pixels[:1])
    assert torch.isfinite(model(pixel_values=pixels).image_embeds).all()


@pytest.mark.parametrize("text", [bert, roberta])
def test_captions_are_cut_at_the_towers_positions(tmp_path, text):
    model, processor = build(tmp_path, vit(), text())
    assert processor.tokenizer.model_max_length == text_positions(model.text_model) == 32
    processor.save_pretrained(tmp_path / "student")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "student").tokenizer
    longest = tokenizer("arrow " * 99, truncation=True, return_tensors="pt")
    assert longest["input_ids"].shape == (1, 32)
    assert torch.isfinite(model(**longest).text_embeds).all()
    with pytest.raises((IndexError, RuntimeError)):  # one more would not do
        model(input_ids=torch.full((1, 33), 5))


def test_a_limit_of_the_tokenizer_stays(tmp_path):
    model, processor = build(tmp_path, vit(), modernbert())
    assert text_positions(model.text_model) == model.text_model.config.max_position_embeddings == 8192
    assert processor.tokenizer.model_max_length == 8192
    processor.tokenizer.model_max_length = 20
    processor.tokenizer.save_pretrained(tmp_path / "text")
    arguments = StudentArguments(
        vision_model_name_or_path=str(tmp_path / "vision"), text_model_name_or_path=str(tmp_path / "text")
    )
    assert build_student(arguments, [], 8)[1].tokenizer.model_max_length == 20


def test_towers_of_timm():
    run_checks("trainers/timm_checks.py")
