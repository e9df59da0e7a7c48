"""What a run reads besides its rows."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import DIM, make_rows

from datasets_scripts.data_loading import (
    DataArguments,
    load_data,
    read_baseline,
    settings_that_count,
)
from rows.teacher_columns import TEACHER_COLUMNS


def featured(folder, teacher: dict | None, streamed=False, dim=DIM, splits=("train", "validation", "test")) -> str:
    """A dataset whose features are said to be of `teacher`."""
    for seed, split in enumerate(splits):
        rows = make_rows(6, seed, dim)
        if teacher is not None:
            rows = rows.add_column("teacher", [json.dumps(teacher)] * len(rows))
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


BOTH = {"id": "a + b", "dim": DIM, "teachers": [{"id": "a"}, {"id": "b"}], "weights": [0.25, 0.75]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("teacher", [None, {"id": "a"}, BOTH])
def test_features_that_are_there_are_used_and_whose_they_are_is_said(tmp_path, capsys, streaming, teacher):
    name = featured(tmp_path, teacher)
    args = DataArguments(dataset_name=name, streaming=streaming, teacher_model_name_or_path=["x", "y"])
    rows = load_data(args)
    assert set(TEACHER_COLUMNS) <= set(rows["train"].column_names)
    whose = "an unnamed teacher" if teacher is None else teacher["id"]
    assert f"{name} has teacher features, of {whose}; the recipe's x + y is not used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="leave --teacher_model_name_or_path out") as refusal:
        load_data(args, teacher_is_demanded=True)
    assert f"{name} has features of {whose}, not of x + y" in str(refusal.value)
    load_data(dataclasses.replace(args, teacher_model_name_or_path=None), teacher_is_demanded=True)


def test_the_teachers_that_made_them_may_be_demanded_with_their_weights(tmp_path):
    args = DataArguments(dataset_name=featured(tmp_path, BOTH), teacher_model_name_or_path=["a", "b"])
    load_data(args, teacher_is_demanded=True)
    load_data(dataclasses.replace(args, teacher_weights=[1, 3]), teacher_is_demanded=True)
    with pytest.raises(ValueError, match=r"joins its teachers by \[0.25, 0.75\], not by \[0.5, 0.5\]: leave"):
        load_data(dataclasses.replace(args, teacher_weights=[1, 1]), teacher_is_demanded=True)


def test_where_there_are_no_features_the_way_to_them_is_named(tmp_path):
    for seed, split in enumerate(("train", "validation", "test")):
        path = tmp_path / "plain" / "data" / f"{split}.parquet"
        make_rows(6, seed).remove_columns(TEACHER_COLUMNS).to_parquet(path)
    args = DataArguments(dataset_name=str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="no teacher features: name a teacher .* or train without one by --method"):
        load_data(args)
    streamed = dataclasses.replace(args, streaming=True, teacher_model_name_or_path=["x"])
    with pytest.raises(
        ValueError, match="add_teacher_features .* --streaming --teacher_model_name_or_path x --output"
    ):
        load_data(streamed)
    for without in (args, streamed):
        assert not set(TEACHER_COLUMNS) & set(load_data(without, trains=False)["test"].column_names) or without is args
        assert "train" in load_data(
            dataclasses.replace(without, method="contrastive", teacher_model_name_or_path=None)
        )


@pytest.mark.parametrize(
    ("teacher", "dim", "used"), [({"id": "a"}, DIM, True), ({"id": "b"}, DIM, False), ({"id": "a"}, 8, False)]
)
def test_validation_features_of_another_teacher_are_left_out(tmp_path, capsys, teacher, dim, used):
    name = featured(tmp_path / "mine", {"id": "a"}, splits=["train"])
    other = featured(tmp_path / "other", teacher, dim=dim, splits=["validation", "test"])
    rows = load_data(DataArguments(dataset_name=name, validation_dataset_name=other))
    printed = capsys.readouterr().out
    for split in ("validation", "test"):
        assert (set(TEACHER_COLUMNS) <= set(rows[split].column_names)) == used
        assert (f"those of the {split} split are of {teacher['id']} and not used" in printed) != used


def test_features_of_the_training_split_alone_are_enough(tmp_path, capsys):
    for seed, split in enumerate(("train", "validation", "test")):
        rows = make_rows(6, seed)
        rows = rows if split == "train" else rows.remove_columns(TEACHER_COLUMNS)
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    rows = load_data(DataArguments(dataset_name=str(tmp_path), teacher_model_name_or_path=["x"]))
    assert set(TEACHER_COLUMNS) <= set(rows["train"].column_names)
    assert "the recipe's x is not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_weights": [1.0]}, "teacher_weights: 1 values for 2 teachers"),
        ({"teacher_revision": ["main"]}, "teacher_revision: 1 values for 2 teachers"),
        ({"teacher_weights": [1.0, 0.0]}, "expected numbers above 0"),
    ],
)
def test_weights_and_revisions_are_one_a_teacher(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(teacher_model_name_or_path=["a", "b"], **settings)


def test_the_command_of_an_earlier_release_is_known_again():
    """A finished run is told by a digest of these: what they were named and held then."""
    settings = settings_that_count(
        DataArguments(
            dataset_name="mine", teacher_model_name_or_path=["a"], teacher_revision=["main"], skip_broken=True
        )
    )
    assert settings == {
        "method": "distillation", "dataset_name": "mine", "dataset_config_name": None, "train_split": "train",
        "validation_split": "validation", "test_split": "test", "test_fold_size": None, "streaming": False,
        "teacher_model_name_or_path": "a", "teacher_revision": "main", "data_license": None, "baseline_results": None,
    }  # fmt: skip
    changed = DataArguments(teacher_model_name_or_path=["a", "b"], teacher_weights=[1.0, 2.0])
    assert settings_that_count(changed)["teacher_model_name_or_path"] == ["a", "b"]


def test_a_baseline_that_is_none_is_refused(tmp_path):
    assert read_baseline(None, 3) is None
    path = tmp_path / "all_results.json"
    with pytest.raises(ValueError, match="cannot be read"):
        read_baseline(path, 3)
    path.write_text('{"eval_rsum": 1.0}')
    with pytest.raises(ValueError, match="no test_rsum"):
        read_baseline(path, 3)
    path.write_text('{"test_rsum": 1.0, "test_images": 4}')
    with pytest.raises(ValueError, match="of 4 test images, and this run has 3"):
        read_baseline(path, 3)
    assert read_baseline(path, 4)["test_rsum"] == 1.0
