"""Comparing dual encoders: figures against numpy's, models of several libraries, what is wrong told first."""

import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows, make_student, with_names
from PIL import Image
from teacher_families import clip_tokenizer, make_clip, save, save_sentence_transformers
from tiny_towers import scatter

from inference import compare, dual_encoders, export
from rows.command_line import run_program
from teachers import load_teacher


ROWS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset of images and captions without a teacher's features, a student, its export and two other models."""
    folder = tmp_path_factory.mktemp("compare")
    rows = with_names(make_rows(ROWS, seed=2)).select_columns(["image", "captions", "image_id", "group_id"])
    datasets.DatasetDict({"train": rows.select(range(4)), "test": rows}).save_to_disk(folder / "rows")
    model, processor = make_student()
    processor.tokenizer.model_max_length = 24
    for part in (scatter(model).eval(), processor):
        part.save_pretrained(folder / "student")
    save(make_clip, folder / "clip_alone", None)
    save_sentence_transformers(folder / "st", None)
    export.main(["--model_name_or_path", str(folder / "student"), "--output_dir", str(folder / "exported")])
    return folder


def run(place, output, *models, more=()):
    compare.main(
        ["--dataset_name", str(place / "rows"), "--output_dir", str(output), *more, "--models", *map(str, models)]
    )


def recalls(image: np.ndarray, text: np.ndarray, groups: list[str], owners: list[str], captions: list[str]) -> dict:
    """By sorting all scores; a caption is right that is of the image's group, or equal to one that is."""
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    named = {group: {c for c, owner in zip(captions, owners) if owner == group} for group in groups}
    right = np.array([[caption in named[group] for caption in captions] for group in groups])
    scores, found = image @ text.T, {}
    for way, s, r in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        best = np.where(r, s, -np.inf).max(1, keepdims=True)
        ranks = 1 + ((s >= best - 1e-6) & ~r).sum(1)
        found |= {f"{way}_r{k}": 100 * (ranks <= k).mean() for k in (1, 5, 10)}
    return found


@pytest.fixture(scope="module")
def compared(place):
    output = place / "out" / "compared"
    run(place, output, *(place / name for name in ("student", "clip_alone", "st", "exported")))
    return output, json.loads((output / "comparison.json").read_text())


def test_every_models_figures_are_those_of_a_plain_computation(place, compared):
    rows = datasets.load_from_disk(place / "rows")["test"]
    captions = [caption for own in rows["captions"] for caption in own]
    owners = [group for group, own in zip(rows["group_id"], rows["captions"]) for _ in own]
    assert len(set(captions)) < len(captions)
    found = {(row["model"], row["runtime"]): row for row in compared[1]["models"]}
    runtimes = [*dual_encoders.export_runtimes(place / "exported")]
    assert runtimes[:2] == ["onnx float32", "onnx float16"]
    in_torch = [(name, "torch") for name in ("student", "clip_alone", "st")]
    assert [*found] == [*in_torch, *(("exported", name) for name in runtimes)]
    for name in ("student", "clip_alone", "st"):
        teacher = load_teacher(str(place / name))
        image, text = teacher.embed_images(list(rows["image"])).numpy(), teacher.embed_texts(captions).numpy()
        expected = recalls(image, text, rows["group_id"], owners, captions)
        row = found[name, "torch"]
        assert {figure: row[figure] for figure in expected} == pytest.approx(expected)
        assert row["rsum"] == pytest.approx(sum(expected.values()))
        assert row["parameters"] == sum(parameter.numel() for parameter in teacher.model.parameters())
        assert row["megabytes"] == pytest.approx(4 * row["parameters"] / 1e6)
    # The export's own preprocessing and tokenizer give what the student gives.
    assert found["exported", "onnx float32"]["rsum"] == pytest.approx(found["student", "torch"]["rsum"], abs=3)
    files = [place / "exported" / "onnx" / f"{tower}_model_fp16.onnx" for tower in ("vision", "text")]
    assert found["exported", "onnx float16"]["megabytes"] == sum(file.stat().st_size for file in files) / 1e6
    for row in found.values():
        milliseconds = row["ms_per_image"] + row["ms_per_caption"]
        assert milliseconds > 0 and row["rsum_per_ms"] == pytest.approx(row["rsum"] / milliseconds)


def test_an_exports_embeddings_are_the_students(place):
    student, onnx = load_teacher(str(place / "student")), dual_encoders.OnnxEncoder(place / "exported")
    texts, images = ["a small red house", "", "cat " * 60], list(make_rows(3)["image"])
    for kind, contents in (("image", images), ("text", texts)):
        features = [
            torch.nn.functional.normalize(
                getattr(model, f"{kind}_features")(getattr(model, f"prepare_{kind}s")(contents)), dim=1
            )
            for model in (student, onnx)
        ]
        torch.testing.assert_close(*features, atol=1e-4, rtol=0)


def test_the_table_and_the_picture_show_all_models(compared):
    output, content = compared
    assert {path.name for path in output.iterdir()} == {f"comparison.{ending}" for ending in ("md", "json", "png")}
    assert {path.name for path in output.parent.iterdir()} == {output.name}
    text = (output / "comparison.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0][0] == f"rows test, {ROWS} images" and len({len(row) for row in cells}) == 1
    for line, row in zip(cells[2:], content["models"], strict=True):
        assert line[:3] == [row["model"], row["runtime"], row["device"]] and row["device"] in ("cpu", "cuda")
        assert row["device"] == "cpu" or row["runtime"] == "torch"
        assert [float(cell) for cell in line[3:10]] == pytest.approx(
            [row[f"{way}_r{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)] + [row["rsum"]],
            abs=0.051,
        )
    assert str(output.parent) not in text + (output / "comparison.json").read_text()
    with Image.open(output / "comparison.png") as picture:
        assert picture.size[0] > 600 and len(picture.convert("RGB").getcolors(10**6)) > 10


def test_figures_of_two_devices_are_not_compared_in_silence():
    cpu, cuda = ({"device": device} for device in ("cpu", "cuda"))
    assert compare.devices_note([cpu, cpu]) == "All were measured on the processor."
    said = compare.devices_note([cuda, cpu])
    assert said.startswith("Milliseconds are not of one device, those of cuda on ") and "cpu on the processor" in said


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "onnx/vision_model_fp16.onnx",
            b"no graph",
            "vision_model_fp16.onnx cannot be read: .*Export the student again",
        ),
        ("onnx/text_model.onnx", b"", "text_model.onnx cannot be read: "),
        ("tokenizer.json", b"{}", "tokenizer.json cannot be read: "),
        ("preprocessor_config.json", b"{", "preprocessor_config.json cannot be read: "),
        (None, None, r'run by onnxruntime, which is not installed: pip install -e "\.\[onnx\]"'),
    ],
)
def test_an_export_that_does_not_run_is_told_before_any_is_measured(
    place, tmp_path, monkeypatch, name, content, message
):
    shutil.copytree(place / "exported", tmp_path / "exported")
    if name is None:
        monkeypatch.setattr(dual_encoders, "find_spec", lambda name: None)
    else:
        (tmp_path / "exported" / name).write_bytes(content)
    monkeypatch.setattr(compare, "_measure", lambda *_: pytest.fail("measured"))
    for models in ([place / "student", tmp_path / "exported"], [tmp_path / "exported"]):
        with pytest.raises(ValueError, match=message) as error:
            run(place, tmp_path / "out", *models)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "student").mkdir(parents=True)
    models = [str(tmp_path / parent / "student") for parent in ("a", "b")]
    assert compare.names_of([*models, "openai/clip"]) == ["a/student", "b/student", "openai/clip"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "nothing is no dual encoder that can be read"),
        ("tokenizer", "is no dual encoder that can be read"),
        ("vision", "vision .CLIPVisionModel. is no dual encoder that can teach: it lacks get_image_features"),
    ],
)
def test_a_model_that_is_none_is_told_before_any_is_measured(place, tmp_path, monkeypatch, name, message):
    clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    load_teacher(str(place / "clip_alone")).model.vision_model.save_pretrained(tmp_path / "vision")
    monkeypatch.setattr(compare, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message) as error:
        run(place, tmp_path / "out", place / "student", tmp_path / name)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_rows_without_a_pair_are_left_out_and_none_is_an_error(place, capsys):
    rows = datasets.load_from_disk(place / "rows")["test"].cast_column("image", datasets.Image(decode=False))
    images, captions = list(rows["image"]), [list(own) for own in rows["captions"]]
    images[3], captions[5] = None, []
    columns = {"image": images, "captions": captions, "image_id": rows["image_id"]}
    features = datasets.Features({name: rows.features[name] for name in columns})
    part = datasets.Dataset.from_dict(columns, features=features)
    assert compare.usable_rows(part, "x")["image_id"] == [
        own for i, own in enumerate(rows["image_id"]) if i not in (3, 5)
    ]
    assert "2 rows without an image or without a caption are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row with an image and a caption"):
        compare.usable_rows(part.select([3, 5]), "x")
    with pytest.raises(ValueError, match="x has no column captions .*own_data"):
        compare.usable_rows(part.remove_columns("captions"), "x")


def test_a_broken_image_is_named_and_leaves_nothing(place, tmp_path):
    rows = datasets.load_from_disk(place / "rows")["test"].cast_column("image", datasets.Image(decode=False))
    images = list(rows["image"])
    images[7] = {"bytes": b"no image", "path": None}
    broken = datasets.Dataset.from_dict({**rows.to_dict(), "image": images}, features=rows.features)
    datasets.DatasetDict({"test": broken}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="The image of '2/7' cannot be compared on"):
        run(tmp_path, tmp_path / "out", place / "student")
    assert {path.name for path in tmp_path.iterdir()} == {"rows"}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--limit", "0"], "--limit 0: expected 1 or more"),
        (["--batch_size", "0"], "--batch_size 0: expected 1 or more"),
        (["--split", "dev"], "rows has no split dev (it has train, test)"),
    ],
)
def test_bad_settings_are_one_sentence(place, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr(dual_encoders, "load_teacher", lambda *_, **__: pytest.fail("loaded"))
    arguments = ["--dataset_name", str(place / "rows"), "--output_dir", str(tmp_path / "out"), *more]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--models", str(place / "student")])
    with pytest.raises(SystemExit) as error:
        run_program(compare.main)
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_not_written_into(place, tmp_path, capsys):
    (tmp_path / "notes").touch()
    with pytest.raises(SystemExit):
        run(place, tmp_path, place / "student")
    assert "exists and is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(place, tmp_path / "new", place / "student", place / "student")
    assert "names" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_an_export_that_lacks_a_file_is_no_dual_encoder(place, tmp_path):
    shutil.copytree(place / "exported", tmp_path / "half")
    (tmp_path / "half" / "onnx" / "text_model.onnx").unlink()
    assert not dual_encoders.is_export(Path(tmp_path / "half"))
    with pytest.raises(ValueError, match="half is no dual encoder"):
        run(place, tmp_path / "out", tmp_path / "half")
