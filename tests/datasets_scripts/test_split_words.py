"""Which split a name stands for: one rule for folders, files, columns and splits of the Hub."""

from pathlib import PurePosixPath

import pytest

from datasets_scripts.split_words import split_of_name, split_of_path, split_of_word


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("train", "train"), ("TRAIN", "train"), ("train2017", "train"), ("training", "train"), ("restval", "train"),
        ("val", "validation"), ("val2017", "validation"), ("Valid", "validation"), ("dev", "validation"),
        ("validation-1", "validation"), ("test", "test"), ("test_2", "test"), ("Testing", "test"),
        ("holdout", None), ("", None), ("dev_kit", None), ("trainer", None), ("2017", None),
    ],
)  # fmt: skip
def test_a_whole_word(word, split):
    assert split_of_word(word) == split_of_name(word) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("coco-train-0001", "train"), ("captions_val2017", "validation"), ("train-00000-of-00002", "train"),
        ("train_val", None), ("trainval", None), ("dev_kit", None), ("my photos", None), ("latest", None),
        ("contest", None), ("flickr_test", "test"),
    ],
)  # fmt: skip
def test_a_name_of_several_words(name, split):
    assert split_of_name(name) == split


@pytest.mark.parametrize(
    ("place", "is_table", "expected"),
    [
        ("train2017/metadata.jsonl", True, ("train", "train2017")),
        ("a/val/b/1.jpg", False, ("validation", "val")),
        ("train/test/1.jpg", False, ("test", "test")),  # the nearest
        ("train/val.csv", True, ("validation", "val")),  # a table's own name first
        ("test.jpg", False, (None, None)),  # an image's own name says nothing
        ("data.csv.gz", True, (None, None)),
    ],
)
def test_a_path(place, is_table, expected):
    assert split_of_path(PurePosixPath(place), is_table) == expected
