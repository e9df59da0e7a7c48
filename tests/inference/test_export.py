"""ONNX files of a student, against torch; the search that needs neither torch nor transformers."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import DIM, WORDS, make_rows, make_student, with_names
from mixed_rows import without_partners
from PIL import Image
from tiny_towers import scatter
from transformers import AutoConfig, AutoProcessor, ViTImageProcessorPil

from inference import export, onnx_files
from rows.images import to_rgb
from trainers import retrieval_metrics


CAPTIONS = [" ".join(WORDS[: n + 1]) for n in (0, 5, 2, 19)]
FILES = {f"{graph}{ending}.onnx" for graph in ("model", "vision_model", "text_model")
         for ending in ("", "_fp16", "_quantized")}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {"model_type": "vit", "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **SMALL}
ROOT = Path(export.__file__).parents[1]


@pytest.fixture(scope="module")
def student():
    model, processor = make_student(VIT)
    processor.tokenizer.model_max_length = 24
    return scatter(model).eval(), processor


@pytest.fixture(scope="module")
def saved(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "student"
    for part in student:
        part.save_pretrained(folder)
    rows = datasets.DatasetDict({"train": make_rows(4), "test": with_names(make_rows(20, seed=2))})
    rows.save_to_disk(folder.with_name("rows"))
    return folder


@pytest.fixture(scope="module")
def exported(saved):
    """The folder of a whole run, and what the run printed."""
    folder = saved.with_name("exported")
    command = [
        "--model_name_or_path", str(saved), "--output_dir", str(folder),
        "--dataset_name", str(saved.with_name("rows")), "--limit", "15",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(onnx_files, "SLOWER", float("inf"))  # these models are too small to say what is fast
        patch.setattr("builtins.print", lambda *values: printed.append(" ".join(map(str, values))))
        export.main(command)
    return folder, "\n".join(printed)


def onnx(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: value.numpy() for name, value in inputs.items()})))


def test_outputs_of_any_batch_and_length_are_torchs(exported, student):
    model, processor = student
    folder = exported[0] / "onnx"
    pixels = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    for images, captions in ((1, CAPTIONS[:1]), (7, CAPTIONS[1:3]), (2, CAPTIONS)):
        text = dict(processor.tokenizer(captions, padding=True, return_tensors="pt"))
        with torch.no_grad():
            expected = model(pixel_values=pixels[:images], **text)
        for ending in ("", "_fp16", "_quantized"):
            outputs = {
                **onnx(folder / f"vision_model{ending}.onnx", pixel_values=pixels[:images]),
                **onnx(folder / f"text_model{ending}.onnx", **text),
            }
            assert set(outputs) == {"image_embeds", "text_embeds"}
            joined = onnx(folder / f"model{ending}.onnx", pixel_values=pixels[:images], **text)
            assert list(joined) == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
            for name, value in outputs.items():
                right = expected[name].numpy()
                np.testing.assert_allclose(joined[name], value, atol=1e-6)
                np.testing.assert_allclose(np.linalg.norm(value, axis=1), 1, atol=1e-3)
                if ending == "":
                    np.testing.assert_allclose(value, right, atol=1e-5)
                else:
                    assert 0.99 < (value * right).sum(1).min() and np.abs(value - right).max() > 1e-6
            scale = np.exp(model.logit_scale.item())
            right = scale * joined["image_embeds"] @ joined["text_embeds"].T  # [N, C]
            np.testing.assert_allclose(joined["logits_per_image"], right, atol=1e-4)
            np.testing.assert_allclose(joined["logits_per_text"], right.T, atol=1e-4)


def test_a_folder_holds_what_it_should_and_no_path_of_the_machine(exported, saved, tmp_path):
    folder, _ = exported
    (tmp_path / "any").touch()
    files = [path for path in folder.rglob("*") if path.is_file()]
    # other users can read what they can list
    assert {path.stat().st_mode for path in files} == {(tmp_path / "any").stat().st_mode}
    assert {str(path.relative_to(folder)) for path in files} == {
        "README.md", "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        "onnx_search.py", *(f"onnx/{name}" for name in FILES),
    }  # fmt: skip
    assert {path.name for path in saved.parent.iterdir()} == {"student", "rows", "exported"}
    assert len({path.read_bytes() for path in files}) == len(files)
    packages = Path(torch.__file__).parents[1]
    for path in files:
        content = path.read_bytes()
        for private in (saved.parent, ROOT, Path.home(), packages, "site-packages", "stack_trace", "tmp/"):
            assert str(private).encode() not in content, (path, private)
    size = {path.name: path.stat().st_size for path in files}
    for graph in ("vision_model", "text_model", "model"):
        for ending in ("_quantized", "_fp16"):
            assert size[f"{graph}{ending}.onnx"] < 0.7 * size[f"{graph}.onnx"]


def test_the_files_say_what_their_weights_are(exported):
    from onnx import TensorProto, load

    for ending, kinds in (
        ("", {TensorProto.FLOAT}),
        ("_fp16", {TensorProto.FLOAT16}),
        ("_quantized", {TensorProto.INT8, TensorProto.UINT8}),  # the latter of words, which nothing is multiplied by
    ):
        for graph in ("vision_model", "text_model", "model"):
            entries = Counter()
            for weights in load(exported[0] / "onnx" / f"{graph}{ending}.onnx").graph.initializer:
                entries[weights.data_type] += int(np.prod(weights.dims))
            assert sum(entries[kind] for kind in kinds) > 0.6 * entries.total(), (graph, ending)


def test_settings_are_those_that_other_programs_read(exported, student):
    model, processor = student
    folder = exported[0]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "dsmd" and "auto_map" not in config
    assert (
        AutoConfig.from_pretrained(folder).to_dict().items() >= {"projection_dim": DIM, "text_pooling": "mean"}.items()
    )
    alone = AutoProcessor.from_pretrained(folder)
    images = [Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))]
    inputs = {"images": images, "text": CAPTIONS, "padding": True, "return_tensors": "pt"}
    expected, actual = processor(**inputs), alone(**inputs)
    for name in ("pixel_values", "input_ids", "attention_mask"):
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-2 if name == "pixel_values" else 0)
    assert alone.tokenizer.model_max_length == 24


def test_the_table_says_what_is_there(exported, student, saved):
    folder, printed = exported
    model, processor = student
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    readme = (folder / "README.md").read_text()
    assert all(line in readme for line in lines)
    header, _, *cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header[:6] == ["file", "weights", "MB", "ms, 1 thread", "ms, 2 threads", "cosine with torch"]
    cells = {name.strip("`"): rest for name, *rest in cells}
    assert set(cells) == {f"onnx/{name}" for name in FILES} | {
        f"{name}, torch" for name in ("model", "text_model", "vision_model")
    }
    parameters = sum(value.numel() for value in model.parameters()) - 1  # the logit scale is of neither tower
    assert float(cells["model, torch"][1]) == pytest.approx(4 * parameters / 1e6, abs=0.06)
    for name, (_, size, *milliseconds, cosine, _, _, _) in cells.items():
        assert all(float(value) > 0 for value in milliseconds)
        if name.startswith("onnx/"):
            assert float(size) == pytest.approx((folder / name).stat().st_size / 1e6, abs=0.051)
            assert float(cosine) > 0.98

    rows = datasets.load_from_disk(saved.with_name("rows"))["test"].select(range(15))
    captions = [caption for captions in rows["captions"] for caption in captions]
    groups = [group for group, captions in zip(rows["group_id"], rows["captions"]) for _ in captions]
    with torch.no_grad():
        output = model(**processor(text=captions, images=list(rows["image"]), padding=True, return_tensors="pt"))
    embeds = output.image_embeds, output.text_embeds, rows["group_id"], groups
    figures = retrieval_metrics(*embeds, text_ids=captions)
    assert figures != retrieval_metrics(*embeds)  # equal captions of different images count
    right = [f"{figures[name]:.1f}" for name in ("image_to_text_r1", "text_to_image_r1", "rsum")]
    assert header[6:] == ["image to text R@1", "text to image R@1", "RSUM"]
    for name, (*_, first, second, rsum) in cells.items():
        if name.endswith("torch") or name.endswith("model.onnx"):
            assert [first, second, rsum] == right, name
        assert abs(float(rsum) - figures["rsum"]) < 60


WITHOUT_TORCH = """
import runpy, sys

for name in ("torch", "transformers", "trainers", "modeling_dsmd"):
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_search_without_torch_ranks_as_the_model(exported, student, tmp_path):
    model, processor = student
    rng, images = np.random.default_rng(5), tmp_path / "images"
    images.mkdir()
    for i, (mode, channels) in enumerate([("RGB", 3)] * 4 + [("RGBA", 4)] * 2 + [("L", 0)] * 2):
        shape = (40 + 7 * i, 60 - 5 * i, channels) if channels else (40 + 7 * i, 60 - 5 * i)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(images / f"{i}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(images / "8.jpg", exif=turned)
    (images / "Größe 42").mkdir()
    (images / "7.png").rename(images / "Größe 42" / "7.png")
    paths = sorted(images.rglob("*.*"))
    names = [path.relative_to(images).as_posix() for path in paths]
    (images / ".hidden.png").write_bytes(paths[0].read_bytes())
    (images / "cut.png").write_bytes(paths[0].read_bytes()[:500])
    (images / "notes.txt").write_text("no picture")
    query = " ".join(WORDS * 3)  # too long: it is cut
    command = [sys.executable, "-c", WITHOUT_TORCH, exported[0] / "onnx_search.py", exported[0], images, query]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "The text is cut: the student reads its first 24 tokens." in result.stderr

    assert re.findall("'(.*)' is left out", result.stderr) == ["cut.png"]
    inputs = processor(
        text=[query], images=[to_rgb(Image.open(path)) for path in paths],
        return_tensors="pt", truncation=True,
    )  # fmt: skip
    assert inputs["input_ids"].shape == (1, 24)
    with torch.no_grad():
        output = model(**inputs)
    scores = (output.text_embeds @ output.image_embeds.T)[0]
    found = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert [name for _, name in found] == [names[i] for i in scores.argsort(descending=True)]
    for score, name in found:
        assert float(score) == pytest.approx(float(scores[names.index(name)]), abs=1e-4)
    result = subprocess.run([*command, "5"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    text, image = (torch.nn.functional.normalize(of[:, :5]) for of in (output.text_embeds, output.image_embeds))
    best = float((text @ image.T).max())
    assert float(result.stdout.split()[0]) == pytest.approx(best, abs=1e-4), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python onnx_search.py EXPORTED IMAGES"),
        (["{exported}", "{images}"], "usage: python onnx_search.py EXPORTED IMAGES"),
        (["{images}", "{images}", "a"], "error: there is no .*text_model.onnx"),
        (["{exported}", "{images}/none", "a"], "error: .*none is not a folder"),
        (["{exported}", "{images}", "a", "many"], "usage: python onnx_search.py EXPORTED IMAGES"),
        (["{exported}", "{images}", "a", "99"], "error: 99 numbers: the student gives 16."),
        (["{exported}", "{images}", "a"], "error: .* holds no image that can be read"),
    ],
)
def test_the_example_ends_in_a_sentence(exported, tmp_path, arguments, message):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    arguments = [part.format(exported=exported[0], images=tmp_path) for part in arguments]
    command = [sys.executable, exported[0] / "onnx_search.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr.splitlines()[-1])


def test_the_example_stays_short():
    code = (ROOT / "inference" / "onnx_search.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported == {"json", "os", "sys", "pathlib", "numpy", "onnxruntime", "PIL", "tokenizers"}
    body = code[code.index("def pixels") :].splitlines()
    assert len([line for line in body if line.strip() and '"""' not in line and "__main__" not in line]) <= 45


def test_a_file_that_differs_from_torch_is_refused_and_leaves_nothing(exported, student, saved, monkeypatch, tmp_path):
    def write_another(tower, inputs, path, opset):
        shutil.copy(exported[0] / "onnx" / path.name, path)

    model, processor = student
    monkeypatch.setattr(onnx_files, "write_onnx", write_another)
    other = type(model).from_pretrained(saved).eval()
    with torch.no_grad():
        other.text_projection.weight[0] += 0.01
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"text_model.onnx differs from torch by .* for input_ids \[1, 12\]"):
        export.main(["--model_name_or_path", str(tmp_path / "other"), "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    "settings, right",
    [
        ({}, True),
        ({"do_normalize": False}, True),
        ({"do_rescale": False, "image_mean": [90.0, 100, 110], "image_std": [50.0, 60, 70], "resample": 3}, True),
        ({"size": {"height": 20, "width": 36}, "resample": 0}, True),
        ({"size": {"shortest_edge": 32}}, False),
        ({"do_resize": False}, False),
    ],
)
def test_image_settings(settings, right):
    processor = ViTImageProcessorPil(**{"size": {"height": 32, "width": 32}, **settings})
    if right:
        assert export.image_settings(processor)["size"]["width"] == processor.size.width
    else:
        with pytest.raises(ValueError, match="does more than squash"):
            export.image_settings(processor)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_it_says_what_to_install(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf'^error: {name} is not installed: pip install -e "\.\[onnx\]"'):
        export.main(["--model_name_or_path", "any", "--output_dir", str(tmp_path / "out")])


def test_bad_arguments_stop_before_the_export(saved, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(saved), "--output_dir"]
    rows = ["--dataset_name", str(saved.with_name("rows"))]
    for bad, message in (
        ([str(saved)], "exists and is not empty"),
        ([str(tmp_path / "out"), "--limit", "0"], "--limit 0: expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            export.main(arguments + bad)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no split val .it has train, test"):
        export.main([*arguments, str(tmp_path / "out"), *rows, "--split", "val"])
    assert not any(tmp_path.iterdir())


def test_recall_is_of_pairs_alone(capsys):
    rows = without_partners(make_rows(6), lambda i: i == 1, lambda i: i in (0, 4))
    found = export.measured_rows(rows, "test", None)
    assert list(found["image_id"]) == [rows[i]["image_id"] for i in (2, 3, 5)]
    assert len(export.measured_rows(rows, "test", 2)) == 2
    assert "recall is of the 3 rows of test that have an image and a caption" in capsys.readouterr().out
    assert export.measured_rows(rows.select([0, 1, 4]), "test", None) is None
    assert "test has no pair of an image and a caption" in capsys.readouterr().out
    assert len(export.measured_rows(make_rows(3), "test", None)) == 3 and not capsys.readouterr().out


def test_images_to_calibrate_on_are_the_first_that_can_be_read(student):
    rows, others = make_rows(90), make_rows(3, seed=3)
    broken = [{"bytes": b"none", "path": None}, None]
    images = [*broken, *rows.cast_column("image", datasets.Image(decode=False))["image"][2:]]
    rows = rows.remove_columns("image").add_column("image", images, feature=datasets.Image(decode=False))
    pixels = export.calibration_pixels({"test": others, "train": rows}, "test", student[1])
    assert pixels.shape == (73, 3, 32, 32) and pixels.dtype == np.float32
    expected = student[1](images=[make_rows(90)[2]["image"]], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels[:1], expected, atol=1e-6)
    assert len(export.calibration_pixels({"test": others}, "test", student[1])) == 3
    assert export.calibration_pixels({"test": rows.select(range(2))}, "test", student[1]) is None
