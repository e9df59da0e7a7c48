"""Rows through the teachers: each image and caption once, several teachers joined, faults named."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows
from PIL import Image
from tiny_features import Counting, add, contents
from torch.nn.functional import cosine_similarity

from datasets_scripts.feature_shards import Encoding
from datasets_scripts.teacher_features import encode_dataset, join
from rows.teacher_columns import TEACHER_COLUMNS, teacher_rows
from teachers import load_teacher


def test_each_distinct_image_and_caption_is_encoded_once(source, teacher_folder, tmp_path):
    rows = datasets.DatasetDict({"train": datasets.load_from_disk(source)["train"]})
    teacher = Counting(load_teacher(str(teacher_folder)))
    add(rows, [teacher], tmp_path / "out")
    distinct = {caption for captions in rows["train"]["captions"] for caption in captions}
    assert teacher.encoded == {"image": 22, "text": len(distinct)}
    out = datasets.load_dataset(str(tmp_path / "out"))["train"]
    assert out[5]["teacher_image_embeds"] == out[2]["teacher_image_embeds"]


def test_one_row_and_one_caption(teacher_folder, tmp_path):
    rows = datasets.DatasetDict({"train": make_rows(1).remove_columns(TEACHER_COLUMNS)})
    add(rows, [load_teacher(str(teacher_folder))], tmp_path / "out")
    assert len(datasets.load_dataset(str(tmp_path / "out"))["train"]) == 1


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8]])
def test_a_dot_product_of_joined_features_is_the_mean_of_the_cosines(
    source, teacher_folder, other_folder, tmp_path, weights
):
    teachers = [load_teacher(str(folder)) for folder in (teacher_folder, other_folder)]
    rows = datasets.DatasetDict({"train": datasets.load_from_disk(source)["train"].select(range(6))})
    add(rows, teachers, tmp_path / "out", Encoding(weights=weights))
    joined = datasets.load_dataset(str(tmp_path / "out"))["train"]
    image, text = teacher_rows(joined)
    assert image.shape == (6, 32)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(6), rtol=1e-3, atol=0)
    first = [caption[0] for caption in joined["captions"]]
    offsets = np.cumsum([0] + [len(captions) for captions in joined["captions"]])[:-1]
    expected = sum(
        weight * cosine_similarity(teacher.embed_images(list(joined["image"])), teacher.embed_texts(first))
        for weight, teacher in zip(weights, teachers)
    )
    torch.testing.assert_close((image * text[offsets]).sum(dim=1), expected, rtol=0, atol=2e-3)
    described = json.loads(joined[0]["teacher"])
    assert described["id"] == "tiny + other" and described["weights"] == weights and described["dim"] == 32


def test_join_leaves_one_teacher_as_it_is():
    features = torch.tensor([[3.0, 4.0]])
    assert join([features], [1.0]) is features
    expected = torch.tensor([[0.6, 0.8, 0.0, 1.0]]) / 2**0.5
    torch.testing.assert_close(join([features, torch.tensor([[0.0, 2.0]])], [0.5, 0.5]), expected)


@pytest.mark.parametrize("value", [float("nan"), 0.0, 1e6])
def test_features_that_are_none_name_their_rows(source, teacher_folder, tmp_path, value):
    def change(features):
        features = features.clone()
        features[1:2] = value
        return features

    teacher = Counting(load_teacher(str(teacher_folder)), change)
    rows = datasets.DatasetDict({"train": datasets.load_from_disk(source)["train"].select(range(3))})
    with pytest.raises(ValueError, match="train split: 1 image features are NaN.*image_id '0/1'"):
        add(rows, [teacher], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_encoded_are_named(source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(source)["train"].cast_column("image", datasets.Image(decode=False))
    teacher = load_teacher(str(teacher_folder))

    def with_row(index, **values):
        examples = [{**row, **(values if i == index else {})} for i, row in enumerate(rows)]
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(examples, features=rows.features)})

    for i, (values, message) in enumerate(
        (
            ({"image": {"bytes": b"no image", "path": None}}, "image_id '0/9': unreadable image"),
            ({"captions": [], "image": None}, r"Row 9 .*\(image_id '0/9'\): it has neither an image nor a caption"),
            ({"captions": ["a", " "]}, r"Row 9 .*\(image_id '0/9'\): it has an empty caption"),
            (
                {"image": {"bytes": None, "path": "no/there.png"}},
                "image_id '0/9': its image file cannot be read: .*there.png",
            ),
        )
    ):
        with pytest.raises(ValueError, match=f"{message}.*--skip_broken"):
            add(with_row(9, **values), [teacher], tmp_path / str(i))
    with pytest.raises(ValueError, match="no column captions .*own_data"):
        add(datasets.DatasetDict({"train": rows.rename_column("captions", "text")}), [teacher], tmp_path / "new")


def test_files_outside_the_dataset_are_brought_in_without_their_path(teacher_folder, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "red.png")], "captions": [["red"]], "image_id": ["a"]}
    ).cast_column("image", datasets.Image())
    add(datasets.DatasetDict({"train": rows}), [load_teacher(str(teacher_folder))], tmp_path / "out")
    stored = datasets.load_dataset(str(tmp_path / "out"))["train"].cast_column("image", datasets.Image(decode=False))
    assert stored[0]["image"]["bytes"] == (tmp_path / "red.png").read_bytes()
    for content in contents(tmp_path / "out").values():
        assert str(tmp_path).encode() not in content
    assert stored[0]["image"]["path"] in (None, "red.png")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_holds_what_the_loader_reads_ahead(teacher_folder, tmp_path, monkeypatch, num_workers):
    """However many rows there are: few files are planned and not yet written at any time."""
    alive, most = set(), [0]
    plan = sys.modules["datasets_scripts.teacher_features"].plan
    write = sys.modules["datasets_scripts.teacher_features"].write_shard

    def counted_plan(split, number, *rest):
        alive.add(number)
        most[0] = max(most[0], len(alive))
        return plan(split, number, *rest)

    def counted_write(shard, *rest):
        write(shard, *rest)
        alive.discard(shard.number)

    monkeypatch.setattr("datasets_scripts.teacher_features.plan", counted_plan)
    monkeypatch.setattr("datasets_scripts.teacher_features.write_shard", counted_write)
    rows = datasets.DatasetDict({"train": make_rows(96).remove_columns(TEACHER_COLUMNS)})
    (tmp_path / "out").mkdir()
    encoding = Encoding(batch_size=4, shard_rows=16)  # five batches a file or more; the loader holds eight
    files = encode_dataset(rows, [load_teacher(str(teacher_folder))], "{}", encoding, tmp_path / "out", num_workers)
    assert files == {"train": 6} and most[0] <= 4


def test_an_empty_split_and_ids_of_another_type_are_named(source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(source)
    teacher = load_teacher(str(teacher_folder))
    with pytest.raises(ValueError, match="test split is empty"):
        add(datasets.DatasetDict({"train": rows["train"], "test": rows["test"].select([])}), [teacher], tmp_path / "a")
    numbers = rows["train"].remove_columns("image_id").add_column("image_id", list(range(23)))
    with pytest.raises(ValueError, match="image_id of the train split is .*int64.*cast"):
        add(datasets.DatasetDict({"train": numbers}), [teacher], tmp_path / "b")


def test_images_in_several_chunks(output, source, teacher_folder, tmp_path):
    """More than 2 GB of images in one file have several; they are never one array."""
    parts = datasets.load_from_disk(source)
    joined = {
        split: datasets.concatenate_datasets([part.select(range(2)), part.select(range(2, len(part)))])
        for split, part in parts.items()
    }
    assert len(joined["train"].with_format("arrow")[:5]["image"].chunks) == 2
    add(datasets.DatasetDict(joined), [load_teacher(str(teacher_folder))], tmp_path / "out")
    whole = datasets.load_dataset(str(output))
    for split, part in datasets.load_dataset(str(tmp_path / "out")).items():
        assert part["image_id"][:] == whole[split]["image_id"][:]
        for name in TEACHER_COLUMNS:
            for got, expected in zip(part[name], whole[split][name]):
                np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-3)
