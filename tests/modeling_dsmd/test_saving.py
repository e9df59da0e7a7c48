"""A student saved and loaded, here and where the package is not."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_towers import (
    ALL,
    CAPTIONS,
    TOWERS,
    assert_clean,
    assert_same,
    bert,
    convnext,
    make,
    make_processor,
    mobilevit,
    run,
    vit,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    VisionTextDualEncoderProcessor,
)

import modeling_dsmd
from modeling_dsmd import DSMDConfig, DSMDModel


CODE = ("configuration_dsmd.py", "modeling_dsmd.py", "text_masks.py")  # what a saved student brings


@pytest.mark.parametrize("vision, text, vision_pooling, text_pooling", ALL)
def test_save_and_load(tmp_path, inputs, vision, text, vision_pooling, text_pooling):
    model = make(vision, text, vision_pooling, text_pooling)
    model.logit_scale.data.fill_(1.25)
    model.save_pretrained(tmp_path)
    for loader in (DSMDModel, AutoModel):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is DSMDModel
        assert_clean(info)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert_same(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("vision, text", TOWERS)
def test_sdpa_and_eager_agree(tmp_path, inputs, vision, text):
    make(vision, text).save_pretrained(tmp_path)
    outputs = {}
    for attention in ("sdpa", "eager"):
        model = DSMDModel.from_pretrained(tmp_path, attn_implementation=attention)
        assert model.text_model.config._attn_implementation == attention
        if vision not in (convnext, mobilevit):  # which have no attention, or one of their own
            assert model.vision_model.config._attn_implementation == attention
        outputs[attention] = run(model, inputs)
    assert_same(outputs["sdpa"], outputs["eager"], rtol=1e-4, atol=1e-5)
    model.set_attn_implementation({"text_config": "sdpa"})
    assert model.text_model.config._attn_implementation == "sdpa" == model.config.text_config._attn_implementation


@pytest.mark.parametrize("vision, text", TOWERS)
def test_bfloat16(tmp_path, inputs, vision, text):
    model = make(vision, text)
    model.save_pretrained(tmp_path / "float32")
    half = DSMDModel.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    again, info = AutoModel.from_pretrained(tmp_path / "bfloat16", output_loading_info=True)
    assert_clean(info)
    pixels = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    for loaded in (half, again):
        # All of it: one float32 parameter would make model.dtype, and the next saved config.dtype, float32.
        assert loaded.dtype == torch.bfloat16 and {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        output = run(loaded, pixels, return_loss=True)
        assert output.logits_per_image.dtype == torch.bfloat16
        expected = run(model, inputs)
        assert nn.functional.cosine_similarity(output.image_embeds.float(), expected.image_embeds).min() > 0.999
        assert nn.functional.cosine_similarity(output.text_embeds.float(), expected.text_embeds).min() > 0.999
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert DSMDModel.from_pretrained(tmp_path / "bfloat16", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("missing", ["logit_scale", "visual_projection.weight", "text_projection.weight"])
def test_a_parameter_missing_from_the_file_is_initialised(tmp_path, missing):
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = DSMDModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    value = loaded.get_parameter(missing)
    if missing == "logit_scale":
        assert value.item() == pytest.approx(math.log(1 / 0.07), abs=1e-4)
    else:
        assert 0.01 < value.std() < 0.04 and value.abs().max() < 0.2


def test_the_temperature_starts_where_the_config_says():
    model = DSMDModel.from_vision_text_configs(vit(), bert(), logit_scale_init_value=0.5)
    assert model.logit_scale.item() == 0.5
    assert make().config.logit_scale_init_value == pytest.approx(math.log(1 / 0.07), abs=1e-4)


@pytest.mark.parametrize("vision, text", TOWERS)
def test_gradient_checkpointing_gives_the_same_gradients(inputs, vision, text):
    gradients = []
    for checkpointing in (False, True):
        model = make(vision, text).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            for tower in [model.text_model] + [model.vision_model] * (vision is not convnext):  # it cannot
                assert any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
        model(**inputs, return_loss=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3


ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_dsmd":
            raise ModuleNotFoundError("No module named 'modeling_dsmd'", name=name)

sys.meta_path.insert(0, Absent())
from PIL import Image
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

for student in sys.argv[1:]:
    try:
        AutoModel.from_pretrained(student, trust_remote_code=False)
    except ValueError as error:
        assert "custom code" in str(error) or "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded without the code")
    processor = AutoProcessor.from_pretrained(student)  # no remote code
    inputs = processor(text=%r, images=[Image.open("image.png")], return_tensors="pt", padding=True)
    model, info = AutoModel.from_pretrained(student, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        output = model(**inputs)
    tensors = {"logits": output.logits_per_image, "images": output.image_embeds, "texts": output.text_embeds}
    save_file(tensors, student + "/out.safetensors")
    model.save_pretrained(student + "/again")
"""


def test_model_and_processor_load_where_the_package_is_not(tmp_path, monkeypatch):
    students = {f"student_{i}": make(vision, text) for i, (vision, text) in enumerate(TOWERS)}
    processor = make_processor()
    for name, model in students.items():
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # also where the remote code is kept
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    command = [sys.executable, "-c", ELSEWHERE % CAPTIONS, *students]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    inputs = processor(text=CAPTIONS, images=[Image.fromarray(pixels)], return_tensors="pt", padding=True)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 10] and inputs["pixel_values"].shape == (1, 3, 32, 32)
    for name, model in students.items():
        elsewhere = load_file(tmp_path / name / "out.safetensors")
        output = run(model, inputs)
        assert output.logits_per_image.shape == (1, 2)
        torch.testing.assert_close(elsewhere["logits"], output.logits_per_image, rtol=0, atol=1e-5)
        torch.testing.assert_close(elsewhere["images"], output.image_embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(elsewhere["texts"], output.text_embeds, rtol=0, atol=1e-6)
        again, info = DSMDModel.from_pretrained(tmp_path / name / "again", output_loading_info=True)
        assert_clean(info)
        assert_same(run(again, inputs), output, rtol=0, atol=1e-5)
    for folder in (tmp_path / "student_0", tmp_path / "student_0" / "again"):
        for name in CODE:  # what was loaded from code carries it on
            assert (folder / name).read_bytes() == Path(modeling_dsmd.__file__).with_name(name).read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "configuration_dsmd.DSMDConfig",
            "AutoModel": "modeling_dsmd.DSMDModel",
            "AutoModelForZeroShotImageClassification": "modeling_dsmd.DSMDModel",
        }
    assert type(AutoProcessor.from_pretrained(tmp_path / "student_0")) is VisionTextDualEncoderProcessor


def test_the_files_of_the_package_are_flat_and_self_contained():
    folder = Path(modeling_dsmd.__file__).parent
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "__init__.py", "py.typed", *CODE
    }  # fmt: skip
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), (path.name, ast.unparse(node))
            if isinstance(node, ast.ImportFrom):
                if node.level == 0:
                    assert node.module.split(".")[0] in allowed, (path.name, ast.unparse(node))
                else:  # transformers copies what `from .name import` names, and nothing else
                    assert node.level == 1 and node.module and "." not in node.module, (path.name, ast.unparse(node))
                    assert (folder / f"{node.module}.py").exists()


def test_the_default_config_is_a_student():
    config = DSMDConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("vit", "bert")
