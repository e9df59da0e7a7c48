"""A teacher's features of images without captions and texts without images: what there is, as of the whole rows."""

import datasets
import numpy as np
import pytest
from conftest import DIM, make_rows
from mixed_rows import without_partners
from tiny_features import add

from datasets_scripts.feature_job import cached_teacher_features
from datasets_scripts.feature_shards import Encoding
from datasets_scripts.teacher_dataset import join_columns
from rows.checks import check_dataset
from rows.columns import partners
from rows.teacher_columns import TEACHER_COLUMNS
from teachers import load_teacher


def mixed_parts(images=lambda i: i % 3 == 1, texts=lambda i: i % 3 == 2):
    whole = {"train": make_rows(23), "test": make_rows(12, seed=2)}
    mixed = {split: without_partners(part, images, texts) for split, part in whole.items()}
    return (
        datasets.DatasetDict({split: part.remove_columns(TEACHER_COLUMNS) for split, part in parts.items()})
        for parts in (whole, mixed)
    )


@pytest.mark.parametrize(
    "settings", [{}, {"int8": True}, {"image_size": 16}], ids=["float16", "int8", "smaller images"]
)
def test_what_there_is_is_encoded(teacher_folder, tmp_path, settings):
    whole, mixed = mixed_parts()
    teacher = load_teacher(str(teacher_folder))
    for name, rows in (("whole", whole), ("mixed", mixed)):
        add(rows, [teacher], tmp_path / name, Encoding(batch_size=4, shard_rows=5, **settings))
    expected, found = (datasets.load_dataset(str(tmp_path / name)) for name in ("whole", "mixed"))
    names = [name for name in found["train"].column_names if name.startswith("teacher_")]
    for split in ("train", "test"):
        check_dataset(found[split], split, DIM)
        assert found[split]["captions"][:] == mixed[split]["captions"][:]
        for before, after in zip(expected[split], found[split]):
            for name in names:
                if "image" in name and after["image"] is None:
                    assert after[name] is None
                elif "image" in name or after["captions"]:
                    assert np.allclose(before[name], after[name], atol=2e-2 if settings else 2e-3), name
                else:
                    assert after[name] == []
    card = (tmp_path / "mixed" / "README.md").read_text()
    has_image, counts = partners(found["train"])
    assert f"| train | {has_image.sum()} | {counts.sum()} |" in card
    assert "| test | 4 |" in card  # the teacher's own retrieval, on the pairs alone


@pytest.mark.parametrize("side", ["images", "texts"])
def test_one_side_alone(teacher_folder, tmp_path, side):
    _, alone = mixed_parts(lambda i: side == "images", lambda i: side == "texts")
    add(alone, [load_teacher(str(teacher_folder))], tmp_path / "out", Encoding(batch_size=4, shard_rows=5))
    found = datasets.load_dataset(str(tmp_path / "out"))
    check_dataset(found["train"], "train", DIM)
    assert len(found["train"]) == 23


def test_features_that_a_run_makes_are_joined(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    _, mixed = mixed_parts()
    folder = cached_teacher_features(mixed, [(str(teacher_folder), None)], [1.0], "rows", False)
    joined = join_columns(mixed, folder)
    check_dataset(joined["train"], "train", DIM)
    has_image, _ = partners(joined["train"])
    assert has_image.tolist() == [i % 3 != 2 for i in range(23)]
