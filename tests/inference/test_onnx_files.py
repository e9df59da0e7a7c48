"""Which ONNX files are kept, of towers with convolutions and of others, and what they give."""

import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_student
from tiny_towers import scatter

from inference import onnx_files
from inference.encoders import encode_by_onnx, encode_by_torch, example_inputs
from inference.onnx_files import OnnxFile, write_files
from inference.onnx_graphs import mostly_convolutions


RESNET = {
    "model_type": "resnet", "layer_type": "basic", "embedding_size": 16, "hidden_sizes": [16, 32, 64],
    "depths": [1, 1, 1],
}  # fmt: skip
VIT = {
    "model_type": "vit", "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ENDINGS = ("", "_fp16", "_quantized")


@pytest.fixture(scope="module")
def student():
    model, processor = make_student(RESNET)
    processor.tokenizer.model_max_length = 24
    return scatter(model).eval(), processor


@pytest.fixture(scope="module")
def pixels():
    """`[40, 3, 32, 32]`: images, smooth as pictures are."""
    coarse = torch.rand(40, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").numpy()


@pytest.fixture(scope="module")
def written(student, pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "SLOWER", float("inf"))  # this model is too small to say what is fast
        files = write_files(*student, folder, None, pixels)
    return folder, {file.name: file for file in files}


def test_convolutions_are_quantised_too(written, student, pixels):
    folder, files = written
    assert {path.name for path in folder.iterdir()} == set(files) and len(files) == 9
    assert files["vision_model_quantized.onnx"].weights == "int8, static"
    assert files["text_model_quantized.onnx"].weights == "int8, dynamic"
    assert mostly_convolutions(folder / "vision_model.onnx")
    assert not mostly_convolutions(folder / "text_model.onnx")
    for graph in ("vision_model", "model"):
        sizes = [files[f"{graph}{ending}.onnx"].size for ending in ENDINGS]
        assert sizes == [(folder / f"{graph}{ending}.onnx").stat().st_size for ending in ENDINGS]
        assert sizes[2] < 0.8 * sizes[1] < 0.6 * sizes[0]
    with torch.no_grad():
        expected = student[0](pixel_values=torch.from_numpy(pixels)).image_embeds.numpy()
    encoder = encode_by_onnx(folder / "vision_model_quantized.onnx")
    for rows in (1, 3, 5):
        actual = encoder({"pixel_values": pixels[:rows]})["image_embeds"]
        assert 0.99 < (actual * expected[:rows]).sum(1).min() < 1 - 1e-6


@pytest.mark.parametrize("ending", ENDINGS)
def test_padding_changes_no_embedding(written, student, ending):
    """A row of a padded batch is what the row is alone; with activations quantised by the batch, nearly."""
    folder, _ = written
    ids = torch.randint(5, 60, (5, 9), generator=torch.Generator().manual_seed(2)).numpy()
    mask = (np.arange(9) < np.array([[9], [4], [1], [7], [2]])).astype("int64")
    encoder = encode_by_onnx(folder / f"text_model{ending}.onnx")
    together = encoder({"input_ids": ids, "attention_mask": mask})["text_embeds"]
    tolerance = {"": 1e-5, "_fp16": 5e-3, "_quantized": 0.1}[ending]
    for row, length in enumerate(mask.sum(1)):
        alone = encoder({"input_ids": ids[[row], :length], "attention_mask": mask[[row], :length]})["text_embeds"]
        np.testing.assert_allclose(together[[row]], alone, atol=tolerance)


@pytest.mark.parametrize(
    ("vision", "width", "poolings"),
    [(VIT, 48, ("cls", "pooler")), (RESNET, 4, ("pooler", "cls"))],
    ids=["wider, of patches", "narrower, of convolutions"],
)
def test_students_with_other_projections_poolings_and_a_frozen_tower(vision, width, poolings, pixels, tmp_path):
    model, processor = make_student(vision)
    processor.tokenizer.model_max_length = 24
    config = model.config
    model = type(model).from_vision_text_configs(
        config.vision_config, config.text_config, projection_dim=width, vision_pooling=poolings[0],
        text_pooling=poolings[1],
    )  # fmt: skip
    model = scatter(model).eval()
    model.vision_model.requires_grad_(False)
    files = write_files(model, processor, tmp_path, None, pixels)
    with torch.no_grad():
        expected = model(torch.tensor([[2, 9, 7, 3]]), torch.from_numpy(pixels[:3]))
    assert expected.image_embeds.shape == (3, width)
    kept = {file.name for file in files if file.left_out is None}
    assert kept == {path.name for path in tmp_path.iterdir()} and "model_fp16.onnx" in kept
    for ending, tolerance in (("", 1e-5), ("_fp16", 1e-2)):
        outputs = encode_by_onnx(tmp_path / f"model{ending}.onnx")(
            {
                "input_ids": np.array([[2, 9, 7, 3]]),
                "attention_mask": np.ones((1, 4), "int64"),
                "pixel_values": pixels[:3],
            }
        )
        for name in ("image_embeds", "text_embeds"):
            np.testing.assert_allclose(outputs[name], expected[name].numpy(), atol=tolerance)


def test_without_images_convolutions_stay_float(written, student, tmp_path, monkeypatch):
    monkeypatch.setattr(
        onnx_files, "write_onnx", lambda tower, inputs, path, opset: shutil.copy(written[0] / path.name, path)
    )
    monkeypatch.setattr(onnx_files, "SLOWER", float("inf"))
    files = {file.name: file for file in write_files(*student, tmp_path, None, None)}
    assert "give --dataset_name" in files["vision_model_quantized.onnx"].left_out
    assert not (tmp_path / "vision_model_quantized.onnx").exists()
    assert files["text_model_quantized.onnx"].left_out is None and files["model_quantized.onnx"].left_out is None
    assert files["model_quantized.onnx"].size < files["model.onnx"].size


def measured(folder, student, ending, monkeypatch, milliseconds, output=None):
    """What becomes of a file of the vision tower that takes so many milliseconds, where float takes 1."""
    (folder / f"vision_model{ending}.onnx").write_bytes((output or folder / "source.onnx").read_bytes())
    monkeypatch.setattr(onnx_files, "milliseconds", lambda *_: (milliseconds, milliseconds))
    in_float = OnnxFile("vision_model", "", "float32", milliseconds=(1.0, 1.0))
    file = OnnxFile("vision_model", ending, "int8")
    onnx_files._measured(file, in_float, folder, *student, None)
    assert (folder / f"vision_model{ending}.onnx").exists() == (file.left_out is None)
    return file.left_out


def test_what_is_slow_or_wrong_is_not_kept(written, student, tmp_path, monkeypatch):
    (tmp_path / "source.onnx").write_bytes((written[0] / "vision_model.onnx").read_bytes())
    assert measured(tmp_path, student, "_quantized", monkeypatch, 1.0) is None
    assert measured(tmp_path, student, "_quantized", monkeypatch, 1.2) == "1.20 ms, slower than float32"
    assert measured(tmp_path, student, "_fp16", monkeypatch, 9.0) is None  # it is smaller, and fast on a GPU
    other = scatter(make_student(RESNET)[0]).eval(), student[1]
    with torch.no_grad():
        other[0].visual_projection.weight.add_(torch.randn(16, 64), alpha=0.5)
    for ending, least in (("_fp16", 0.999), ("_quantized", 0.95)):
        reason = measured(tmp_path, other, ending, monkeypatch, 1.0)
        assert reason == f"a cosine with torch is below {least}"
    with pytest.raises(RuntimeError, match="vision_model.onnx differs from torch by"):
        measured(tmp_path, other, "", monkeypatch, 1.0)
    with torch.no_grad():
        other[0].visual_projection.weight[0] = float("nan")
    assert "is below" in measured(tmp_path, other, "_quantized", monkeypatch, 1.0)


def test_examples_are_single_rows_and_padded_batches(student, pixels):
    examples = example_inputs("model", student[1], pixels[:2])
    shapes = [(len(inputs["input_ids"]), len(inputs["pixel_values"])) for inputs in examples]
    assert shapes == [(1, 1), (3, 5), (2, 1), (5, 3)]
    assert all(inputs["attention_mask"].min() == 0 for inputs in examples[1:])
    np.testing.assert_array_equal(examples[1]["pixel_values"], pixels[[1, 0, 1, 0, 1]])
    assert set(encode_by_torch(student[0], "text_model")(example_inputs("text_model", student[1])[0])) == {
        "text_embeds"
    }


def test_names_of_inputs_are_clips(written):
    session = onnxruntime.InferenceSession(written[0] / "model.onnx")
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("input_ids", ["text_batch_size", "sequence_length"]),
        ("pixel_values", ["image_batch_size", 3, 32, 32]),
        ("attention_mask", ["text_batch_size", "sequence_length"]),
    ]
