"""Rows that cannot be used are left out, listed and counted, whatever the way."""

import io

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from launching import launch
from PIL import Image
from tiny_features import arguments

from datasets_scripts import add_teacher_features as script
from datasets_scripts.feature_shards import Encoding, all_left_out
from datasets_scripts.teacher_features import encode_dataset
from rows.checks import check_dataset
from rows.teacher_columns import TEACHER_COLUMNS
from teachers import load_teacher


@pytest.fixture(scope="module")
def broken_source(source, tmp_path_factory):
    """Of each split rows that cannot be used: a cut JPEG, nothing, a text, no caption; one more has an empty one.

    The rows of train's second file, 5 to 9, are all such.
    """
    rows = {split: list(part) for split, part in datasets.load_from_disk(source).items()}
    features = datasets.load_from_disk(source)["train"].features
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "JPEG")
    cut = {"bytes": buffer.getvalue()[:200], "path": None}
    faults = [{"image": cut}, {"image": None, "captions": []}, {"image": {"bytes": b"text", "path": None}}]
    faults += [{"captions": None}]
    faults += [{"captions": [" ", ""]}]
    for i, fault in enumerate(faults):
        rows["train"][5 + i] = {**rows["train"][5 + i], **fault}
    rows["train"][12]["captions"] = [*rows["train"][12]["captions"], " "]
    rows["test"][0]["image"] = cut
    rows["validation"][11]["captions"] = None
    folder = tmp_path_factory.mktemp("broken")
    encoded = datasets.Features({**features, "image": datasets.Image(decode=False)})
    parts = {split: datasets.Dataset.from_list(as_bytes(part), encoded) for split, part in rows.items()}
    datasets.DatasetDict({split: part.cast(features) for split, part in parts.items()}).save_to_disk(folder / "data")
    return folder / "data"


def as_bytes(rows: list[dict]) -> list[dict]:
    """Rows whose decoded images are files."""
    result = []
    for row in rows:
        if isinstance(row["image"], Image.Image):
            buffer = io.BytesIO()
            row["image"].save(buffer, "PNG")
            row = {**row, "image": {"bytes": buffer.getvalue(), "path": None}}
        result.append(row)
    return result


BROKEN = {"train 0/5", "train 0/6", "train 0/7", "train 0/8", "train 0/9", "test 2/0", "validation 1/11"}


def test_broken_rows_are_left_out_listed_and_counted(broken_source, output, teacher_folder, tmp_path, capsys):
    command = [*arguments(broken_source, teacher_folder, tmp_path / "out"), "--skip_broken"]
    too_many = r"14.9 % of the rows cannot be used, expected 10 % at most \(--max_skipped\)"
    with pytest.raises(SystemExit, match=too_many):
        script.main([*command, "--max_skipped", "0.1"])
    script.main([*command, "--max_skipped", "0.15"])  # takes up what was made
    said = capsys.readouterr().out
    assert "7 rows are left out" in said and "1 empty captions dropped" in said
    listed = (tmp_path / "out.broken.txt").read_text().splitlines()
    assert {line.split(":")[0] for line in listed} == BROKEN and len(listed) == 7
    assert any("test 2/0: unreadable image: " in line for line in listed)
    made, whole = datasets.load_dataset(str(tmp_path / "out")), datasets.load_dataset(str(output))
    assert {split: len(part) for split, part in made.items()} == {"train": 18, "validation": 11, "test": 11}
    for split, part in made.items():
        check_dataset(part, split, 16)
        rows = {row["image_id"]: row for row in whole[split]}
        for row in part:
            expected = rows[row["image_id"]]
            assert row["captions"] == expected["captions"]
            for name in TEACHER_COLUMNS:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-2, atol=1e-3)
    # A file of which nothing is left is none, and the others are numbered without it.
    names = {path.name for path in (tmp_path / "out" / "data").glob("train-*")}
    assert names == {f"train-{i:05d}-of-00004.parquet" for i in range(4)}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "left out" in card and "| train | 18 |" in card


@pytest.mark.parametrize("how", ["streamed", "resized", "int8", "two processes", "resumed"])
def test_the_same_are_left_out_whatever_the_way(broken_source, teacher_folder, tmp_path, how, stopped):
    command = [*arguments(broken_source, teacher_folder, tmp_path / "out"), "--skip_broken"]
    if how == "two processes":
        launch(2, script.__file__, *command)
    elif how == "resumed":
        with pytest.raises(SystemExit, match="--skip_broken"):  # at the first that is broken
            script.main(command[:-1])
        assert not (tmp_path / "out").exists()
        stopped(command)
        script.main(command)
    else:
        more = {"streamed": ["--streaming"], "resized": ["--image_size", "24"], "int8": ["--int8"]}[how]
        script.main([*command, *more])
    made = datasets.load_dataset(str(tmp_path / "out"))
    assert {split: len(part) for split, part in made.items()} == {"train": 18, "validation": 11, "test": 11}
    listed = (tmp_path / "out.broken.txt").read_text().splitlines()
    assert {line.split(":")[0] for line in listed} == BROKEN and len(listed) == 7
    teacher = load_teacher(str(teacher_folder))
    for row in made["test"] if how == "resized" else made["train"]:
        text = teacher.embed_texts(row["captions"])
        scale = torch.tensor(row["teacher_text_scale"])[:, None] if how == "int8" else 1
        torch.testing.assert_close(torch.tensor(row["teacher_text_embeds"]) * scale, text, rtol=2e-2, atol=2e-2)
        if how == "resized":
            assert row["image"].size == (24, 24)


def test_a_file_that_is_missing_is_left_out_too(source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(source)["train"].select(range(4)).cast_column("image", datasets.Image(decode=False))
    examples = list(rows)
    examples[2]["image"] = {"bytes": None, "path": "no/there.png"}
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_list(examples, features=rows.features)})
    (tmp_path / "made").mkdir()
    teacher = load_teacher(str(teacher_folder))
    files = encode_dataset(rows, [teacher], "{}", Encoding(), tmp_path / "made", 0, skip_broken=True)
    lines, images, dropped = all_left_out(tmp_path / "made", files)
    assert not lines and not dropped and len(images) == 1
    assert images[0].startswith("train 0/2: ") and "no/there.png" in images[0]
    assert pq.read_table(tmp_path / "made" / "train-00000.parquet")["image_id"].to_pylist() == ["0/0", "0/1", "0/3"]


def test_a_split_of_which_nothing_is_left_is_named(broken_source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(broken_source)
    rows = datasets.DatasetDict({"train": rows["train"], "test": rows["train"].select(range(5, 10))})
    rows.save_to_disk(tmp_path / "rows")
    command = [*arguments(tmp_path / "rows", teacher_folder, tmp_path / "out"), "--skip_broken"]
    with pytest.raises(SystemExit, match="no row is left of the test split: all are listed in .*out.broken.txt"):
        script.main(command)
