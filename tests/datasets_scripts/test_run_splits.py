"""Which rows a run trains, validates and tests on, of datasets that have not all three splits."""

import json
from pathlib import Path

import datasets
import pytest
from conftest import make_rows
from launching import launch

from datasets_scripts.run_splits import HELD_OUT, hold_out, open_splits, with_test_split


NAMES = {"train": "train", "validation": "validation", "test": "test"}


def write(folder, **counts) -> str:
    """Parquet files of a split, three of a training split. Rows of the n-th split have ids that begin with n."""
    for seed, (split, count) in enumerate(counts.items()):
        files = 3 if split == "train" else 1
        for i in range(files):
            rows = make_rows(count, seed).shard(files, i, contiguous=True)
            rows.to_parquet(folder / "data" / f"{split}-{i:05d}-of-{files:05d}.parquet")
    return str(folder)


def ids(part) -> list[str]:
    return [row["image_id"] for row in part.select_columns(["image_id"])]


def splits(name, streaming=False, other=None, trains=True, **names):
    return open_splits(name, None, streaming, {**NAMES, **names}, other, trains)


def test_of_a_stream_with_a_training_split_alone_the_last_file_is_held_out(tmp_path, capsys):
    name = write(tmp_path, train=12)
    rows = splits(name, streaming=True)
    assert ids(rows["train"]) == [f"0/{i}" for i in range(8)] and rows["train"].num_shards == 2
    assert ids(rows["validation"]) == [f"0/{i}" for i in range(8, 12)] and "test" not in rows
    assert "the last of its 3 files is held out" in capsys.readouterr().out
    tested = with_test_split(rows, name)
    assert sorted(ids(tested["validation"]) + ids(tested["test"])) == sorted(ids(rows["validation"]))
    shuffled = rows["train"].shuffle(seed=1, buffer_size=4, max_buffer_input_shards=1)
    assert sorted(ids(shuffled)) == sorted(ids(rows["train"]))
    assert splits(name, streaming=True, trains=False)["validation"]["image_id"][:] == ids(rows["validation"])


def test_a_large_file_that_is_held_out_is_not_read_whole():
    stream = datasets.Dataset.from_dict({"image_id": list(map(str, range(2 * HELD_OUT + 4)))}).to_iterable_dataset(2)
    train, held_out = hold_out(stream, "mine")
    assert len(ids(train)) == HELD_OUT + 2 and len(ids(held_out)) == HELD_OUT


def test_a_file_alone_is_not_held_out_and_the_ways_out_work(tmp_path):
    rows = make_rows(6)
    (tmp_path / "one" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "one" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="one file alone.*--validation_dataset_name.*--shard_rows"):
        splits(str(tmp_path / "one"), streaming=True)
    other = write(tmp_path / "other", validation=4)
    assert len(splits(str(tmp_path / "one"), streaming=True, other=other)["validation"]) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_another_dataset_gives_the_validation_rows_and_the_test_rows_that_lack(tmp_path, streaming):
    lone = write(tmp_path / "a", train=6)
    tested = write(tmp_path / "b", train=6, test=4)
    other = write(tmp_path / "c", train=3, validation=5, test=7)
    single = write(tmp_path / "d", dev=6)
    rows = splits(lone, streaming, other)
    assert [len(rows[split]) for split in ("validation", "test")] == [5, 7]
    assert isinstance(rows["validation"], datasets.Dataset) and len(ids(rows["train"])) == 6
    assert [len(splits(tested, streaming, other)[split]) for split in ("validation", "test")] == [5, 4]
    halved = with_test_split(splits(lone, streaming, single), lone)
    assert len(ids(halved["train"])) == 6 and len(halved["validation"]) + len(halved["test"]) == 6
    with pytest.raises(ValueError, match="c has no split val .it has train, validation, test.*--validation_split"):
        splits(lone, streaming, other, validation="val")


def test_groups_are_not_torn_when_the_validation_rows_are_halved():
    rows = datasets.DatasetDict({"train": make_rows(2, 1), "validation": make_rows(30)})
    halved = with_test_split(rows, "mine")
    groups = [set(halved[split]["group_id"]) for split in ("validation", "test")]
    assert not groups[0] & groups[1] and [len(of) for of in groups] == [12, 12]  # 24 groups
    assert with_test_split(halved, "mine") is halved
    again = with_test_split(datasets.DatasetDict({**rows, "validation": rows["validation"].shuffle(seed=3)}), "mine")
    assert set(again["test"]["group_id"]) == groups[1]  # whatever their order
    for few in (make_rows(1), make_rows(5).select([3, 4])):
        with pytest.raises(ValueError, match="no rows to test on"):
            with_test_split(datasets.DatasetDict({"train": few, "validation": few}), "mine")


def test_splits_of_other_names_are_asked_for_and_not_guessed(tmp_path):
    name = write(tmp_path, train=6, val=4)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="no split validation, test .it has train, val.*--validation_split"):
            splits(name, streaming)
        assert len(splits(name, streaming, validation="val")["validation"]) == 4
    with pytest.raises(ValueError, match="no split training .it has train, val.: name it by --train_split"):
        splits(name, train="training")


def test_a_training_split_alone_that_is_no_stream_has_its_splits_drawn(tmp_path):
    from datasets_scripts import own_data

    name = write(tmp_path / "mine", train=30)
    with pytest.raises(ValueError, match="no split validation, test") as refusal:
        splits(name)
    command = str(refusal.value).partition("python -m datasets_scripts.own_data ")[2].rstrip(".")
    own_data.main(command.replace("DIR", str(tmp_path / "drawn")).split())
    assert set(splits(str(tmp_path / "drawn"))) == {"train", "validation", "test"}


def test_what_there_is_is_evaluated(tmp_path):
    tested = write(tmp_path / "a", test=4)
    assert list(splits(tested, trains=False)) == ["test"] and list(splits(tested, True, trains=False)) == ["test"]
    assert list(splits(write(tmp_path / "b", validation=4), trains=False)) == ["validation"]
    assert list(splits(write(tmp_path / "c", train=6, test=4), trains=False)) == ["train", "test"]
    lone = write(tmp_path / "d", train=6)
    with pytest.raises(ValueError, match="--test_split"):
        splits(lone, trains=False)
    assert len(splits(lone, trains=False, test="train")["test"]) == 6
    with pytest.raises(ValueError, match="no split train"):
        splits(tested)


def test_a_streamed_split_is_read_by_one_process_of_a_machine(tmp_path):
    name, other = write(tmp_path / "mine", train=12, validation=7), write(tmp_path / "other", train=12)
    broken = make_rows(4).remove_columns("image").add_column("image", [{"path": "/etc/hostname", "bytes": None}] * 4)
    broken.to_parquet(tmp_path / "other" / "data" / "validation-00000-of-00001.parquet")
    launch(2, Path(__file__).with_name("run_splits_worker.py"), name, other, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first.pop("read"), second.pop("read")) == (7, 0)
    assert first == second and first["ids"] == [f"1/{i}" for i in range(7)]
    assert "/etc/hostname" in first["error"] or "of this machine" in first["error"]
