"""A student as modules of sentence-transformers: the same embeddings, with no code of ours."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_student
from image_files import picture
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_towers import scatter

from inference import export
from inference.export_sentence_transformers import export_sentence_transformers


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {
    "vit": {"model_type": "vit", "patch_size": 8, **SMALL, **NO_DROPOUT},
    "clip": {"model_type": "clip_vision_model", "patch_size": 8, **SMALL},
    "dinov2": {
        "model_type": "dinov2", "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    },
    "resnet": {
        "model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1],
    },
    "convnext": {"model_type": "convnext", "hidden_sizes": [4, 6, 8, 12], "depths": [1, 1, 1, 1]},
}  # fmt: skip
TEXT = {
    "bert": {"model_type": "bert", **SMALL, **NO_DROPOUT},
    "distilbert": {
        "model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "roberta": {"model_type": "roberta", "max_position_embeddings": 34, **SMALL, **NO_DROPOUT},
}  # fmt: skip
CAPTIONS = ["arrow left", "", "a small blue moon and a red house", "house " * 300]


def student(vision: str, text: str, vision_pooling: str = "mean", text_pooling: str = "mean"):
    model, processor = make_student(VISION[vision], TEXT[text])
    torch.manual_seed(0)
    config = model.config
    model = type(model).from_vision_text_configs(
        config.vision_config, config.text_config, projection_dim=12, vision_pooling=vision_pooling,
        text_pooling=text_pooling,
    )  # fmt: skip
    return scatter(model).eval(), processor


@pytest.mark.parametrize(
    "towers",
    [
        ("vit", "bert"),
        ("vit", "bert", "cls", "cls"),
        ("vit", "bert", "pooler", "pooler"),
        ("clip", "distilbert"),
        ("dinov2", "roberta"),
        ("resnet", "distilbert", "mean", "cls"),
        ("resnet", "bert", "pooler"),
        ("convnext", "bert", "pooler"),
    ],
    ids="-".join,
)
def test_embeddings_are_the_students(towers, tmp_path, caplog):
    model, processor = student(*towers)
    export_sentence_transformers(model, processor, tmp_path)
    caplog.clear()
    written = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=False)
    assert not [record.getMessage() for record in caplog.records if "newly initialized" in record.getMessage()]
    images = [picture(i, size=(40, 30 + i)) for i in range(3)]
    inputs = processor(text=CAPTIONS, images=images, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    for given, embeds in ((CAPTIONS, expected.text_embeds), (images, expected.image_embeds)):
        for batch_size in (1, 4):
            actual = written.encode(given, batch_size=batch_size, convert_to_tensor=True)
            torch.testing.assert_close(actual, embeds, rtol=0, atol=1e-5)
    assert written.get_embedding_dimension() == 12


ELSEWHERE = """
import sys

for name in ("modeling_dsmd", "trainers", "rows"):
    sys.modules[name] = None  # importing it fails
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("user/student-st", device="cpu")
texts = model.encode(["arrow left", "cat"], convert_to_tensor=True)
image = model.encode(Image.open("0.png"), convert_to_tensor=True)
save_file({"texts": texts, "image": image[None]}, "out.safetensors")
"""


def test_pushed_it_loads_where_our_code_is_not(hub, tmp_path):
    model, processor = student("resnet", "bert")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "student")
    export.main(
        [
            "--model_name_or_path", str(tmp_path / "student"), "--output_dir", str(tmp_path / "out"),
            "--format", "sentence-transformers", "--push_to_hub", "user/student-st",
        ]
    )  # fmt: skip
    picture(0).save(tmp_path / "0.png")
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    inputs = processor(text=["arrow left", "cat"], images=[picture(0)], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    actual = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(actual["texts"], expected.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual["image"], expected.image_embeds, rtol=0, atol=1e-5)

    for path in (tmp_path / "out").rglob("*"):
        assert path.suffix not in (".py", ".bin", ".pkl")
        if path.is_file():
            for private in (tmp_path, "tmp"):
                assert f"{private}/".encode() not in path.read_bytes(), path
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'SentenceTransformer("user/student-st")' in card and "trust_remote_code" not in card
    code = card.split("```python\n")[1].split("```")[0].replace("user/student-st", str(tmp_path / "out"))
    printed = []
    picture(0).save(tmp_path / "photo.jpg")
    exec(code.replace("photo.jpg", str(tmp_path / "photo.jpg")), {"print": printed.append})
    assert printed[0].shape == (1, 2) and printed[0].abs().max() <= 1 + 1e-6


def test_what_differs_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    from inference import export_sentence_transformers as module

    model, processor = student("vit", "bert")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "student")
    right = module._with_every_weight

    monkeypatch.setattr(module, "_with_every_weight", lambda tower: scatter(right(tower)))
    arguments = ["--model_name_or_path", str(tmp_path / "student"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="differs from the student by"):
        export.main([*arguments, "--format", "sentence-transformers"])
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_settings_of_the_other_format_are_refused(tmp_path, capsys):
    arguments = ["--model_name_or_path", "any", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        export.main([*arguments, "--format", "sentence-transformers", "--opset", "18"])
    assert "--opset goes with --format onnx alone" in capsys.readouterr().err


def test_a_saved_student_says_what_encode_gives(tmp_path):
    """`modules.json` goes with every saved student, so that `encode` gives rows of length 1; a student that teaches is
    read by transformers all the same."""
    from teachers import load_teacher
    from teachers.teacher import SentenceTransformersTeacher

    model, processor = student("vit", "bert")
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    assert [module["path"] for module in json.loads((tmp_path / "modules.json").read_text())] == ["", "1_Normalize"]
    embeds = SentenceTransformer(str(tmp_path), device="cpu").encode(CAPTIONS)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
    assert not isinstance(load_teacher(str(tmp_path)), SentenceTransformersTeacher)
