"""Tests of towers of timm, run by test_student.py in a process that has timm on its path."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import DIM, make_rows, make_student
from PIL import Image
from tiny_towers import SMALL, assert_clean, assert_same, bert, make, make_inputs, make_processor, run, scatter
from tiny_trainer import largest_difference, make_trainer
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTImageProcessorPil,
)

from modeling_dsmd import DSMDModel
from teachers import load_teacher
from trainers.student import StudentArguments, build_student


# What timm.create_model is called with: an attention tower, a windowed one (maps [N, H', W', W]), two convolutional
# ones, of which the last has BatchNorm and a head that widens (320 to 1280).
ARCHITECTURES = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4, "drop_path_rate": 0.0,
    },
    "convnext_atto": {"dims": [4, 6, 8, 12], "depths": [1, 1, 1, 1]},
    "mobilenetv3_small_050": {},
}  # fmt: skip


def make_config(architecture):
    return TimmWrapperConfig(architecture=architecture, model_args=ARCHITECTURES[architecture])


@pytest.fixture(params=ARCHITECTURES)
def tower(request):
    return lambda: make_config(request.param)


@pytest.fixture
def inputs():
    return make_inputs()


def test_a_student_is_made_of_what_timm_pools(inputs, tower):
    model = make(tower, vision_pooling="pooler")
    wrapped = model.vision_model.timm_model
    assert type(model.vision_model) is TimmWrapperModel
    assert type(wrapped) is type(timm.create_model(tower().architecture, num_classes=0, **tower().model_args))
    with torch.no_grad():
        expected = wrapped(inputs["pixel_values"]) @ model.visual_projection.weight.T
    torch.testing.assert_close(run(model, inputs).image_embeds, nn.functional.normalize(expected, dim=-1))
    for pooling in ("mean", "cls"):
        with pytest.raises(ValueError, match="vision_pooling"):
            make(tower, vision_pooling=pooling)


def test_every_parameter_learns_and_comes_back(inputs, tower, tmp_path):
    model = make(tower, vision_pooling="pooler")
    model.save_pretrained(tmp_path)
    loaded, info = DSMDModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    for (name, buffer), (_, other) in zip(loaded.named_buffers(), model.named_buffers()):
        assert torch.equal(buffer, other), name  # those too that no file holds
    assert_same(run(loaded, inputs), run(model, inputs), rtol=0, atol=1e-5)
    loaded(**inputs, return_loss=True).loss.backward()
    assert [name for name, p in loaded.named_parameters() if p.requires_grad and p.grad is None] == []


def test_bfloat16(inputs, tower, tmp_path):
    model = make(tower, vision_pooling="pooler")
    model.save_pretrained(tmp_path)
    half = DSMDModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    output = run(half, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    similarity = nn.functional.cosine_similarity(output.image_embeds.float(), run(model, inputs).image_embeds)
    assert similarity.min() > 0.99


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    gradients = []
    for checkpointing in (False, True):
        model = make(lambda: make_config("vit_tiny_patch16_224"), vision_pooling="pooler").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        assert model.vision_model.timm_model.grad_checkpointing == checkpointing
        model(**inputs, return_loss=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def save_as_timm_does(config, folder) -> TimmWrapperModel:
    """A folder as the Hub has timm's: no model_type, weights under timm's own names, a classifier among them."""
    checkpoint = timm.create_model(config.architecture, num_classes=5, **config.model_args)
    scatter(checkpoint)
    timm.models.save_for_hf(checkpoint, folder)
    # Since 1.0.31 timm writes this twice, which transformers 5.23 does not take; the Hub's were written before.
    description = json.loads((folder / "config.json").read_text())
    del description["model_args"]["num_classes"]
    (folder / "config.json").write_text(json.dumps(description))
    return checkpoint


def test_a_checkpoint_of_timm_is_kept_bit_for_bit_and_its_images_are_squashed(inputs, tower, tmp_path):
    checkpoint = save_as_timm_does(tower(), tmp_path / "vision")
    scatter(BertModel(bert())).save_pretrained(tmp_path / "text")
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    arguments = StudentArguments(
        vision_model_name_or_path=str(tmp_path / "vision"),
        text_model_name_or_path=str(tmp_path / "text"),
        vision_pooling="pooler",
    )
    model, processor = build_student(arguments, [], 8)
    expected = checkpoint.state_dict()
    state = model.vision_model.timm_model.state_dict()
    assert len(state) > 20 and all(torch.equal(value, expected[name]) for name, value in state.items())

    assert type(processor.image_processor) is ViTImageProcessorPil
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 75, 3), dtype=np.uint8))
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    description = json.loads((tmp_path / "vision" / "config.json").read_text())
    data = timm.data.resolve_data_config(description["pretrained_cfg"])
    resample = Image.Resampling[data["interpolation"].upper()]
    whole = np.asarray(image.resize(data["input_size"][:0:-1], resample), dtype=np.float64) / 255
    whole = ((whole - data["mean"]) / data["std"]).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[0].numpy(), whole, atol=2e-5)
    assert run(model, {"pixel_values": pixels}).image_embeds.shape == (1, 8)

    model.eval().save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    assert str(tmp_path) not in (tmp_path / "student" / "config.json").read_text()
    loaded, info = AutoModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert_clean(info)
    assert_same(run(loaded, inputs), run(model, inputs), rtol=0, atol=1e-5)
    assert type(AutoProcessor.from_pretrained(tmp_path / "student")) is type(processor)
    saved = AutoImageProcessor.from_pretrained(tmp_path / "student", backend="pil")
    assert torch.equal(saved(images=image, return_tensors="pt")["pixel_values"], pixels)


def test_resume_gives_the_same_run(tower, tmp_path):
    def trainer(folder):
        model = make(tower, lambda: BertConfig(vocab_size=400, **SMALL), "pooler", "mean", DIM)
        steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}  # an epoch has four
        return make_trainer(tmp_path / folder, make_rows(64), model=model, **steps)

    unbroken, resumed = trainer("unbroken"), trainer("resumed")
    unbroken.train()
    checkpoint = tmp_path / "unbroken" / "checkpoint-2"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    end = unbroken.model.state_dict()
    assert largest_difference(end, resumed.model.state_dict()) == 0.0
    assert largest_difference(unbroken.distillation_state(), resumed.distillation_state()) == 0.0
    assert largest_difference(end, DSMDModel.from_pretrained(checkpoint).state_dict()) > 1e-4


def test_students_and_teachers_are_loaded_with_pillows_image_processor(tmp_path):
    """Though transformers would choose torchvision's, whose pixels are others."""
    student, processor = make_student()
    for part in (student, processor):
        part.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path).image_processor) is not ViTImageProcessorPil
    _, saved = build_student(StudentArguments(model_name_or_path=str(tmp_path)), [], None)
    teacher = load_teacher(str(tmp_path))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 75, 3), dtype=np.uint8))
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    for found in (saved.image_processor, teacher.image_processor):
        assert type(found) is ViTImageProcessorPil
        assert torch.equal(found(images=image, return_tensors="pt")["pixel_values"], expected)
    saved.save_pretrained(tmp_path)  # as a run's checkpoints do
    assert not [path for path in tmp_path.glob("*.json") if '"pil"' in path.read_text()]
