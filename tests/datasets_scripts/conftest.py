"""Rows without features, two tiny teachers and the features of one: made once, and changed by no test."""

import datasets
import pytest
import torch
from conftest import make_rows
from tiny_features import arguments, save_teacher

from datasets_scripts import add_teacher_features as script
from datasets_scripts.feature_shards import write_shard
from rows.teacher_columns import TEACHER_COLUMNS


@pytest.fixture(scope="package")
def teacher_folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teachers") / "tiny", 1)


@pytest.fixture(scope="package")
def other_folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teachers") / "other", 2)


@pytest.fixture(scope="package")
def source(tmp_path_factory):
    """Rows without features, saved: 23 to train on, a twin image and twin captions among them, and 12 each."""
    parts = {"train": make_rows(23), "validation": make_rows(12, seed=1), "test": make_rows(12, seed=2)}
    parts = {split: part.remove_columns(TEACHER_COLUMNS) for split, part in parts.items()}
    examples = list(parts["train"])
    examples[5] = {**examples[5], "image": examples[2]["image"], "captions": examples[2]["captions"] + ["one more"]}
    parts["train"] = datasets.Dataset.from_list(examples, features=parts["train"].features)
    folder = tmp_path_factory.mktemp("source") / "data"
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


@pytest.fixture(scope="package")
def output(source, teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "features"
    torch.set_num_threads(1)  # as in the tests that compare with it: more would round otherwise
    script.main(arguments(source, teacher_folder, folder))
    return folder


@pytest.fixture
def stopped(monkeypatch):
    """Runs the program and stops it before its third file."""

    def run_to_the_third(command: list[str]) -> None:
        written = []

        def write(shard, *rest):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(write_shard(shard, *rest))

        with monkeypatch.context() as patch:
            patch.setattr("datasets_scripts.teacher_features.write_shard", write)
            with pytest.raises(KeyboardInterrupt):
                script.main(command)

    return run_to_the_third
