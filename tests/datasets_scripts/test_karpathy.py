"""Karpathy's split files: restval, counts, captions as they are, and files that are not what they should be."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_files import decoded, encoded, picture
from PIL import Image

from datasets_scripts import coco, flickr30k, karpathy
from rows.checks import check_dataset


SPLITS = ["train", "restval", "val", "test", "train", "test", "restval", "val", "test"]


def coco_files(folder: Path) -> dict:
    """Nine images with 5 to 7 captions, of many modes, and their entries in COCO's form."""
    entries = []
    for i, split in enumerate(SPLITS):
        part = "train2014" if split == "train" else "val2014"
        entry = {
            "filepath": part,
            "filename": f"COCO_{part}_{1000 + i:012d}.jpg",
            "imgid": i,
            "cocoid": 1000 + i,
            "split": split,
            "sentences": [
                {"tokens": ["x"], "raw": f"caption {j} of {i}" + [".", " ", "\n", " \n", ""][j % 5], "imgid": i}
                for j in range(5 + i % 3)
            ],
        }
        mode = {1: "L", 2: "CMYK"}.get(i, "RGB")
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        (folder / "images" / part / entry["filename"]).write_bytes(encoded(picture(i, mode)))
        entries.append(entry)
    entries[3]["sentences"][1]["raw"] = "two\n lines \n"
    # The same caption twice is two captions in everybody's counts.
    entries[4]["sentences"][1]["raw"] = entries[4]["sentences"][0]["raw"]
    return {"images": entries, "dataset": "coco"}


@pytest.fixture
def files(tmp_path):
    return coco_files(tmp_path)


def run(tmp_path, content, *options, program=coco):
    (tmp_path / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    arguments = [
        "--karpathy",
        tmp_path / "dataset.json",
        "--images",
        tmp_path / "images",
        "--output_dir",
        tmp_path / "out",
    ]
    program.main([*map(str, arguments), *options])
    return datasets.load_from_disk(tmp_path / "out")


def test_coco(tmp_path, files, capsys):
    built = run(tmp_path, files, "--allow_other_counts")
    assert list(built) == ["train", "validation", "test"]
    # In the file's order, restval among train.
    assert built["train"]["image_id"] == ["1000", "1001", "1004", "1006"]
    assert built["validation"]["image_id"] == ["1002", "1007"]
    assert built["test"]["image_id"] == ["1003", "1005", "1008"]
    assert [len(captions) for captions in built["train"]["captions"]] == [5, 6, 6, 5]
    assert built["train"]["captions"][0] == [f"caption {j} of 0" + ("." if j == 0 else "") for j in range(5)]
    assert built["test"]["captions"][0][1] == "two lines"
    assert built["train"]["captions"][2][:2] == ["caption 0 of 4."] * 2
    for split, part in built.items():
        check_dataset(part, split, None)
        assert part.info.license == "other: images belong to their Flickr authors; annotations CC BY 4.0"
        raw = part.cast_column("image", datasets.Image(decode=False))
        for image_id, cell in zip(part["image_id"], raw["image"]):
            (file,) = (tmp_path / "images").rglob(f"*{image_id}.jpg")
            image, original = decoded(cell["bytes"]), Image.open(file)
            assert (image.mode, image.format, cell["path"]) == ("RGB", "JPEG", None)
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(original.convert("RGB")))
            assert difference.mean() < 3
            assert (cell["bytes"] == file.read_bytes()) == (original.mode == "RGB")
    printed = capsys.readouterr().out
    assert "COCO train: 4 images and 22 captions" in printed
    assert "expected 113,287 images and 566,747 captions" in printed and "expected 5,000 images" in printed
    assert "| test | 3 | 19 |" in printed
    assert sorted(os.listdir(tmp_path)) == ["dataset.json", "images", "out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "annotations CC BY 4.0" in card and str(tmp_path) not in card


def flickr_files(tmp_path, files):
    """The same in Flickr30k's form: no folders, no restval."""
    for entry in files["images"]:
        name = f"{entry.pop('cocoid')}_{entry['imgid']}.jpg"
        (tmp_path / "images" / entry.pop("filepath") / entry["filename"]).rename(tmp_path / "images" / name)
        entry |= {"filename": name, "split": entry["split"].replace("restval", "train")}
    return files


def test_flickr30k(tmp_path, files):
    built = run(tmp_path, flickr_files(tmp_path, files), "--allow_other_counts", program=flickr30k)
    assert built["train"]["image_id"] == ["1000_0", "1001_1", "1004_4", "1006_6"]
    assert "research use only" in built["test"].info.license
    for split, part in built.items():
        check_dataset(part, split, None)


def test_the_published_counts():
    assert flickr30k.FLICKR30K.counts == {"train": (29000, 145000), "validation": (1014, 5070), "test": (1000, 5000)}
    assert coco.COCO.counts == {"train": (113287, 566747), "validation": (5000, 25010), "test": (5000, 25010)}


def test_counts_are_checked_before_anything_is_written(tmp_path, files):
    with pytest.raises(
        ValueError, match="(?s)train: 4 images and 22 captions, expected 113,287.*--allow_other_counts"
    ):
        run(tmp_path, files)
    assert not (tmp_path / "out").exists()


def test_right_counts_need_no_option(tmp_path, files, monkeypatch):
    right = {"train": (4, 22), "validation": (2, 13), "test": (3, 19)}
    monkeypatch.setattr(coco, "COCO", dataclasses.replace(coco.COCO, counts=right))
    assert run(tmp_path, files)["train"].num_rows == 4
    files["images"][8]["sentences"].pop()
    with pytest.raises(ValueError, match="test: 3 images and 18 captions, expected 3 images and 19 captions"):
        (tmp_path / "out").rename(tmp_path / "before")
        run(tmp_path, files)


@pytest.mark.parametrize(
    ("found", "message"), [(82_783, "restval was forgotten"), (29_783, "Entities"), (113_000, "^((?!forgotten).)*$")]
)
def test_well_known_wrong_counts(found, message):
    row = karpathy.Row("x", ["a"], bytes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        karpathy.check_counts({"train": [row] * found}, coco.COCO, False)


def broken_files(tmp_path, files):
    folder = tmp_path / "images"
    first, second = (folder / entry["filepath"] / entry["filename"] for entry in files["images"][:2])
    first.write_bytes(first.read_bytes()[:400])
    second.unlink()


def test_broken_and_missing_images(tmp_path, files):
    broken_files(tmp_path, files)
    with pytest.raises(ValueError, match="(?s)2 images are missing or broken.*train 1000: .*train 1001: FileNotFound"):
        run(tmp_path, files, "--allow_other_counts")
    assert sorted(os.listdir(tmp_path)) == ["dataset.json", "images", "out.broken.txt"]
    built = run(tmp_path, files, "--allow_other_counts", "--skip_broken")
    assert built["train"]["image_id"] == ["1004", "1006"] and built["test"].num_rows == 3
    assert len((tmp_path / "out.broken.txt").read_text().splitlines()) == 2


def changed(files, **entry):
    files = copy.deepcopy(files)
    files["images"][2] |= entry
    return files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "../../secret.jpg"}, "does not stay in the folder"),
        ({"filename": "/etc/x.jpg", "filepath": ""}, "does not stay in the folder"),
        ({"filepath": ".."}, "does not stay in the folder"),
        ({"filepath": "outside"}, "does not stay in the folder"),
        ({"filepath": None}, "TypeError|unsupported"),
        ({"split": "dev2"}, "unknown split 'dev2', expected one of train, restval, validation, valid, val, dev, test"),
        ({"imgid": 0}, "imgid occurs twice"),
        ({"sentences": None}, "not iterable"),
        ({"sentences": [{"tokens": []}]}, "no 'raw'"),
        ({"sentences": [{"raw": 3}]}, "not all text"),
        ({"cocoid": "x"}, "invalid literal"),
    ],
)
def test_refused_entries(tmp_path, files, change, message):
    (tmp_path / "images" / "outside").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=rf"dataset.json: images\[2\] \('.*jpg'\): .*({message})"):
        run(tmp_path, changed(files, **change), "--allow_other_counts")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["filename", "filepath", "split", "sentences", "imgid", "cocoid"])
def test_missing_keys_are_named(tmp_path, files, missing):
    del files["images"][2][missing]
    with pytest.raises(ValueError, match=rf"images\[2\].*has no '{missing}'"):
        run(tmp_path, files, "--allow_other_counts")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": 3}', '{"images": [3]}', '{"images": "abc"}'])
def test_other_files_are_refused(tmp_path, files, content):
    with pytest.raises(ValueError, match="dataset.json"):
        run(tmp_path, content, "--allow_other_counts")


def test_images_without_captions_and_ids_of_two(tmp_path, files):
    with pytest.raises(ValueError, match="1 row cannot be used.*\n  validation 1002: it has no caption"):
        run(tmp_path, changed(files, sentences=[{"raw": " \n"}]), "--allow_other_counts")
    with pytest.raises(ValueError, match="image_id '1000' occurs twice, in train and in validation"):
        run(tmp_path, changed(files, cocoid=1000), "--allow_other_counts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --karpathy and --images, or --hub_id"),
        (["--karpathy", "x"], "need each other"),
        (["--karpathy", "x", "--images", "y", "--hub_id", "z"], "either"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        coco.main([*options, "--output_dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def hub_copy(splits) -> datasets.DatasetDict:
    """What the card of AnyModal/flickr30k says: image, alt_text, split, img_id, filename."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "alt_text": datasets.List(datasets.Value("string")),
            "split": datasets.Value("string"),
            "img_id": datasets.Value("string"),
            "filename": datasets.Value("string"),
        }
    )
    parts = {}
    for name, rows in splits.items():
        rows = [
            {
                "image": {"bytes": encoded(picture(i, "CMYK" if i == 1 else "RGB")), "path": None},
                "alt_text": [f"caption {i}\n", "a cat", "a cat"],
                "split": split,
                "img_id": str(i),
                "filename": f"10{i}.jpg",
            }
            for i, split in rows
        ]
        parts[name] = datasets.Dataset.from_list(rows, features=features)
    return datasets.DatasetDict(parts)


@pytest.mark.parametrize(
    "splits",
    [
        {"test": [(0, "train"), (1, "val"), (2, "train"), (3, "test")]},
        {"train": [(0, "train"), (2, "train")], "validation": [(1, "val")], "test": [(3, "test")]},
    ],
)
def test_flickr30k_of_the_hub(tmp_path, monkeypatch, splits):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: asked.append(name) or hub_copy(splits))
    monkeypatch.chdir(tmp_path)
    flickr30k.main(["--hub_id", "AnyModal/flickr30k", "--output_dir", "out", "--allow_other_counts"])
    built = datasets.load_from_disk("out")
    assert asked == ["AnyModal/flickr30k"]
    assert list(built) == ["train", "validation", "test"]
    assert built["train"]["image_id"] == ["100", "102"] and built["test"]["image_id"] == ["103"]
    assert built["train"]["captions"][1] == ["caption 2", "a cat", "a cat"]
    for split, part in built.items():
        check_dataset(part, split, None)
        assert all(image.mode == "RGB" for image in part["image"])
    assert "AnyModal/flickr30k" in Path("out/README.md").read_text()


def test_coco_of_the_hub(tmp_path, monkeypatch):
    def webdataset(split, numbers):
        rows = [
            {
                "jpg": {"bytes": encoded(picture(i)), "path": None},
                "json": {"captions": [f"caption {i}", "a cat"], "cocoid": 1000 + i},
                "__key__": f"{i:04d}",
                "__url__": f"hf://{split}.tar",
            }
            for i in numbers
        ]
        return datasets.Dataset.from_list(rows).cast_column("jpg", datasets.Image())

    parts = {
        "train": webdataset("train", [4, 1]),
        "validation": webdataset("val", [3]),
        "test": webdataset("test", [2]),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: datasets.DatasetDict(parts))
    coco.main(["--hub_id", "someone/coco", "--output_dir", str(tmp_path / "out"), "--allow_other_counts"])
    built = datasets.load_from_disk(tmp_path / "out")
    assert built["train"]["image_id"] == ["1004", "1001"] and built["train"]["captions"][0] == ["caption 4", "a cat"]


def test_as_a_program(tmp_path, files):
    (tmp_path / "dataset.json").write_text(json.dumps(flickr_files(tmp_path, files)))
    command = (
        "-m datasets_scripts.flickr30k --karpathy dataset.json --images images --output_dir out --allow_other_counts"
    )
    root = Path(flickr30k.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *command.split(), "--data_license", "mine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert datasets.load_from_disk(tmp_path / "out")["train"].info.license == "mine"


def test_images_of_no_split_are_named(tmp_path, monkeypatch):
    copy = hub_copy({"all": [(0, "train"), (1, "val"), (2, "test")]}).remove_columns("split")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **settings: copy)
    with pytest.raises(ValueError, match="3 images are of no split .*expected each in one"):
        flickr30k.main(["--hub_id", "a/b", "--allow_other_counts", "--output_dir", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
