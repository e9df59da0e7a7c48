"""Features that are kept without their images: joined to the rows again, they are those of the whole dataset."""

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows, make_student

from datasets_scripts.feature_job import make_teacher_features
from datasets_scripts.feature_shards import ROW, Encoding
from datasets_scripts.teacher_dataset import join_columns
from rows.teacher_columns import TEACHER_COLUMNS, teacher_rows
from teachers import load_teacher


IDENTITY = {"teacher files": ["tiny"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    for part in make_student():
        part.save_pretrained(folder)
    return load_teacher(str(folder))


@pytest.fixture
def rows(tmp_path):
    """Of the training split the first row, the last, and all of the second file of four rows are broken."""
    parts = {split: make_rows(count, seed) for seed, (split, count) in enumerate({"train": 14, "test": 3}.items())}
    features = datasets.Features(
        {name: of for name, of in parts["train"].features.items() if name not in TEACHER_COLUMNS}
    )
    features["image"] = datasets.Image(decode=False)
    for split, part in parts.items():
        examples = [dict(row) for row in part.select_columns(list(features)).cast(features)]
        for row in (0, 13, 4, 5, 6, 7) if split == "train" else ():
            examples[row]["image"] = {"bytes": b"no image", "path": None}
        examples[2]["captions"] = [" ", *examples[2]["captions"]]
        parts[split] = datasets.Dataset.from_list(examples, features).cast_column("image", datasets.Image())
    parts["train"].info.license = "cc0-1.0"
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "rows")
    return datasets.load_from_disk(tmp_path / "rows")


def test_features_without_images_join_their_rows(rows, teacher, tmp_path):
    encoding = Encoding(shard_rows=4)
    for name, columns_only in (("whole", False), ("columns", True)):
        how = {"skip_broken": True, "columns_only": columns_only}
        make_teacher_features(rows, [teacher], IDENTITY, tmp_path / name, encoding, "mine", 0, **how)
    whole = datasets.load_dataset(str(tmp_path / "whole"))
    joined = join_columns(rows, tmp_path / "columns")
    assert [len(joined[split]) for split in ("train", "test")] == [8, 3]
    for split, part in joined.items():
        assert part.column_names == whole[split].column_names and part.features == whole[split].features
        for name in set(part.column_names) - {"image"}:
            assert part[name][:] == whole[split][name][:], name
        for one, other in zip(teacher_rows(part), teacher_rows(whole[split])):
            assert torch.equal(one, other)
        for row, other in zip(part, whole[split]):
            assert np.array_equal(row["image"], other["image"])
    assert joined["train"].info.license == "cc0-1.0"
    assert join_columns(rows, tmp_path / "whole")["train"][0] == whole["train"][0]  # as an earlier release kept them
    stored = [path for path in (tmp_path / "columns").rglob("*.arrow") if b"\x89PNG" in path.read_bytes()]
    assert not stored and not {"image", ROW} & set(datasets.load_from_disk(tmp_path / "columns")["train"].column_names)


def test_work_that_an_earlier_release_began_is_gone_on_with(rows, teacher, tmp_path, monkeypatch):
    """Its files hold whole rows, and no places."""
    rows = datasets.DatasetDict({"test": rows["test"], "train": rows["train"].select([1, 2, 3, 8, 9, 10])})

    def stop(*arguments):
        raise KeyboardInterrupt

    encoding, out = Encoding(shard_rows=2), tmp_path / "columns"
    with monkeypatch.context() as patch:
        patch.setattr("datasets_scripts.feature_job.assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            make_teacher_features(rows, [teacher], IDENTITY, out, encoding, "mine", 0, skip_broken=True)
    (tmp_path / "columns.partial" / "train-00001.parquet").unlink()
    make_teacher_features(rows, [teacher], IDENTITY, out, encoding, "mine", 0, skip_broken=True, columns_only=True)
    make_teacher_features(rows, [teacher], IDENTITY, tmp_path / "all", encoding, "mine", 0, skip_broken=True)
    made = join_columns(rows, out)
    for split, part in datasets.load_dataset(str(tmp_path / "all")).items():
        assert made[split]["image_id"][:] == part["image_id"][:]
        for one, other in zip(teacher_rows(made[split]), teacher_rows(part)):
            assert torch.equal(one, other)
