"""A pool joins the training rows: its teacher, its columns, and what of it is held out."""

import io
import json

import datasets
import numpy as np
import pytest
from conftest import make_rows
from mixed_rows import without_partners
from PIL import Image
from tiny_features import save_teacher

from datasets_scripts import pool
from datasets_scripts.data_loading import DataArguments, load_data
from datasets_scripts.pool import without_held_out
from rows.checks import check_dataset
from rows.columns import partners
from rows.teacher_columns import TEACHER_COLUMNS
from trainers.run import distributed


def with_teacher(rows, name="tiny"):
    teacher = json.dumps({"id": name, "revision": "1", "dim": 16})
    return rows.add_column("teacher", [teacher] * len(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    parts = {"train": make_rows(6), "validation": make_rows(5, seed=1), "test": make_rows(5, seed=2)}
    datasets.DatasetDict({split: with_teacher(part) for split, part in parts.items()}).save_to_disk(folder / "data")
    pool = without_partners(make_rows(12, seed=3), lambda i: i % 2 == 0, lambda i: i % 2 == 1)
    datasets.DatasetDict({"train": with_teacher(pool)}).save_to_disk(folder / "pool")
    datasets.DatasetDict({"train": with_teacher(pool, "other")}).save_to_disk(folder / "of another")
    bare = pool.remove_columns(["teacher_image_embeds", "teacher_text_embeds"])
    datasets.DatasetDict({"train": bare}).save_to_disk(folder / "bare")
    return folder


def load(folder, pool, **settings):
    return load_data(DataArguments(dataset_name=str(folder / "data"), pool=str(folder / pool), **settings))


def test_its_rows_join_the_training_rows(folder, capsys):
    rows = load(folder, "pool")
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [18, 5, 5]
    check_dataset(rows["train"], "train", 16)
    has_image, counts = partners(rows["train"])
    assert has_image.tolist() == [True] * 6 + [True, False] * 6 and (counts[6::2] == 0).all()
    assert rows["train"]["image_id"][6:8] == ["pool/3/0", "pool/3/1"]
    texts = sum(counts[6:])
    said = capsys.readouterr().out
    assert f"adds 6 images and {texts} texts; 0 images and 0 texts of it are in validation" in said
    assert f"6 training images have no caption and {texts} texts no image" in said
    load_data(DataArguments(dataset_name=str(folder / "data")))
    assert "no caption" not in capsys.readouterr().out
    again = load(folder, "pool")
    assert rows["train"]._fingerprint == again["train"]._fingerprint  # or a checked dataset would be checked again


def test_a_pool_without_groups_or_data_without(folder, tmp_path):
    parts = datasets.load_from_disk(folder / "data")
    parts.remove_columns("group_id").save_to_disk(tmp_path / "data")
    assert load(tmp_path, folder / "pool")["train"]["group_id"][:2] == ["0/0", "0/1"]
    datasets.load_from_disk(folder / "pool").remove_columns("group_id").save_to_disk(tmp_path / "pool")
    assert load_data(DataArguments(dataset_name=str(folder / "data"), pool=str(tmp_path / "pool")))["train"][
        "group_id"
    ][6:8] == ["pool/3/0", "pool/3/1"]


def test_a_pool_of_another_teacher_or_none_is_refused(folder):
    with pytest.raises(
        ValueError, match="has features of other, and the training rows those of tiny: .*make the pool"
    ):
        load(folder, "of another")
    with pytest.raises(ValueError, match="has no teacher features, .*--teacher_model_name_or_path tiny --output_dir"):
        load(folder, "bare")


def as_bmp(rows, which):
    """The rows, the picture of one of them in a file of another format."""

    def change(row, i):
        if i != which:
            return row
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row["image"]["bytes"])).save(buffer, "BMP")
        return {**row, "image": {"bytes": buffer.getvalue(), "path": None}}

    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    return undecoded.map(change, with_indices=True).cast_column("image", datasets.Image())


def test_held_out_pictures_in_other_files_are_left_out_where_the_run_makes_the_features(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {"train": make_rows(6), "validation": make_rows(5, seed=1), "test": make_rows(5, seed=2)}
    parts = {split: part.remove_columns(TEACHER_COLUMNS) for split, part in parts.items()}
    parts["train"] = as_bmp(datasets.concatenate_datasets([parts["train"], parts["test"].select([3])]), 6)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")  # its own row of the test split is its own business
    others = make_rows(4, seed=5).remove_columns(TEACHER_COLUMNS)
    pool = datasets.concatenate_datasets([others, as_bmp(parts["validation"].select([2]), 0)])
    datasets.DatasetDict({"train": pool}).save_to_disk(tmp_path / "pool")
    teacher = [str(save_teacher(tmp_path / "teacher", 1))]
    for _ in range(2):  # features that are made, and features that were kept
        rows = load(tmp_path, "pool", teacher_model_name_or_path=teacher)
        assert rows["train"]["image_id"][6:] == ["2/3", *(f"pool/5/{i}" for i in range(4))]
        said = capsys.readouterr().out
        assert "adds 5 images" in said and "0 images and 0 texts of it are in validation or test" in said
        assert "1 more images of the pool" in said and "as other files, and left out" in said
    check_dataset(rows["train"], "train", 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "contrastive"}, "without a teacher, what has no partner teaches nothing"),
        ({"streaming": True}, "cannot join a stream"),
    ],
)
def test_where_no_pool_can_be_used(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load(folder, "pool", **settings)


def test_a_picture_that_is_in_train_too_is_of_the_same_group(folder, tmp_path, capsys):
    """Or it would be the hardest negative of itself."""
    train = datasets.load_from_disk(folder / "data")["train"].select([4, 1])
    alone = without_partners(train, lambda i: True, lambda i: False)
    datasets.DatasetDict({"train": alone}).save_to_disk(tmp_path / "pool")
    rows = load_data(DataArguments(dataset_name=str(folder / "data"), pool=str(tmp_path / "pool")))["train"]
    groups = dict(zip(rows["image_id"], rows["group_id"]))
    assert [groups[f"pool/{own}"] for own in train["image_id"]] == train["group_id"][:]
    assert "2 images of it are in train too" in capsys.readouterr().out


def test_what_is_held_out_is_left_out_and_counted():
    """The same file, the same pixels in another file, and the same text; nearly the same pixels stay."""
    held_out, others = make_rows(4, seed=1), make_rows(8, seed=5)
    rows = []
    for i, row in enumerate(others):
        lonely = {"captions": [], "teacher_text_embeds": []}
        if i in (0, 1, 2):
            rows.append({**row, **lonely, "image": held_out[i]["image"]})
            rows[-1]["teacher_image_embeds"] = held_out[i]["teacher_image_embeds"]
        elif i in (3, 4):
            rows.append({**row, "image": None, "teacher_image_embeds": None})
        else:
            rows.append(row)
    pixels = np.asarray(rows[2]["image"]).copy()
    pixels[0, 0] ^= 1
    rows[2]["image"] = Image.fromarray(pixels)
    rows[3]["captions"][0] = held_out[2]["captions"][0]
    rows[5]["captions"][0] = held_out[2]["captions"][0]  # of a pair, which an image stands behind
    pool = datasets.Dataset.from_list(rows, features=others.features)

    left, images, texts = without_held_out(as_bmp(pool, 1), [held_out])
    assert (images, texts) == (2, 1)
    assert left["image_id"][:] == [f"5/{i}" for i in (2, 4, 5, 6, 7)]


def test_the_first_process_looks_for_what_is_held_out_and_tells_the_others(folder, monkeypatch, capsys):
    """Another process reads no image, and leaves out what it is told."""
    asked = []
    told = iter([([0, 3], 1, 2), {1: "0/2"}])
    monkeypatch.setattr(distributed, "decided_by_first_rank", lambda decide: asked.append(decide) or next(told))
    monkeypatch.setattr(pool, "_file_digests", pytest.fail)
    monkeypatch.setattr(pool, "_pixels", pytest.fail)
    rows = load(folder, "pool")
    assert rows["train"]["image_id"][6:] == [f"pool/3/{i}" for i in range(12) if i not in (0, 3)]
    assert rows["train"]["group_id"][6:8] == ["pool/3/1", "0/2"]  # the second row that is left
    assert len(asked) == 2 and "1 images and 2 texts of it are in validation or test" in capsys.readouterr().out


def test_an_image_with_many_that_are_alike_is_decoded_once(monkeypatch):
    """All have one feature: 6 x 8 pairs to compare, of which none is equal, in either of two parts."""
    held_out, of_pool = make_rows(8, seed=1), make_rows(6, seed=5)
    same = held_out[0]["teacher_image_embeds"]
    held_out, of_pool = (
        rows.map(lambda row: {"teacher_image_embeds": same}, features=rows.features) for rows in (held_out, of_pool)
    )
    decoded, pixels = [], pool._pixels
    monkeypatch.setattr(pool, "_pixels", lambda part, row: decoded.append((len(part), row)) or pixels(part, row))
    left, images, _ = without_held_out(of_pool, [held_out, held_out.select(range(7))])
    assert len(left) == 6 and images == 0
    assert sorted(decoded) == [(count, row) for count in (6, 7, 8) for row in range(count)]
