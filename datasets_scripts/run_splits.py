"""The splits of a run: which rows are trained on, which choose the best checkpoint, which are tested at the end."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object

from datasets_scripts.opening import open_dataset, readable
from rows.columns import Splits, id_hash
from rows.files import counted, printable
from rows.images import check_image_paths, load_rgb
from trainers.run import distributed
from trainers.streaming import left_out_of


HELD_OUT = 10_000  # rows at most, of the file of a stream that is held out


def open_splits(
    name: str,
    config_name: str | None,
    streaming: bool,
    names: dict[str, str],
    validation_name: str | None,
    trains: bool,
) -> Splits:
    """The rows of a run by what they are for: `train`, `validation`, `test`, in this order.

    Training needs rows to train on and to validate on. Where a stream has none but its training split, its last file
    is held out to validate on. The evaluation of a dataset without a training split takes what there is.

    Args:
        name, config_name, streaming: see [`open_dataset`]. Of a stream only `train` stays one, the others are stored.
        names: what a dataset calls its splits: train, validation, test -> name.
        validation_name: a dataset whose rows are validated on, and tested where `name` has no test split.
        trains: the run is a training.

    Returns:
        The splits. `test` may be missing, see [`with_test_split`].

    Raises:
        ValueError: a split is missing, saying how it is named, made or taken from elsewhere.
    """
    found = open_dataset(name, config_name, streaming, whole_samples=True)
    rows = {split: found[own] for split, own in names.items() if own in found}
    others = [own for own in found if own not in names.values()]
    if validation_name is not None:
        other = open_dataset(validation_name, None, streaming, whole_samples=True)
        own = names["validation"] if names["validation"] in other or len(other) > 1 else next(iter(other))
        if own not in other:
            raise ValueError(
                f"{validation_name} has no split {own} (it has {', '.join(other)}): name it by --validation_split."
            )
        rows["validation"] = other[own]
        if "test" not in rows and names["test"] in other:
            rows["test"] = other[names["test"]]
    missing = [names[split] for split in names if split not in rows]
    if trains and "train" not in rows:
        raise ValueError(
            f"{name} has no split {names['train']} (it has {', '.join(found)}): name it by --train_split."
        )
    if "validation" not in rows and "train" in rows and streaming and not others:
        rows["train"], rows["validation"] = hold_out(rows["train"], name)
    if "validation" not in rows and (trains or "test" not in rows) or ("test" not in rows and others):
        ways = "name them by --validation_split and --test_split, or take them from --validation_dataset_name"
        if trains and not streaming:
            ways += f", or have them drawn: python -m datasets_scripts.own_data --dataset_name {name} --output_dir DIR"
        raise ValueError(f"{name} has no split {', '.join(missing)} (it has {', '.join(found)}): {ways}.")
    if streaming:
        rows = {split: part if split == "train" else stored_rows(part, split) for split, part in rows.items()}
    return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(
        {split: rows[split] for split in names if split in rows}
    )


def hold_out(stream: datasets.IterableDataset, name: str) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """A stream without its last file, and the first 10,000 rows of that file.

    Args:
        name: the dataset's, for messages.

    Raises:
        ValueError: there is one file only.
    """
    count = stream.num_shards
    if count < 2:
        raise ValueError(
            f"{name} has no validation split, and one file alone, so that none can be held out: name another dataset "
            "by --validation_dataset_name, or write smaller files (add_teacher_features --shard_rows)."
        )
    if PartialState().is_main_process:
        print(
            f"{name} has no validation split: the last of its {count} files is held out, of which {HELD_OUT:,} rows "
            "at most are read"
        )
    files = [stream.shard(count, i) for i in range(count)]
    return datasets.concatenate_datasets(files[:-1]), files[-1].take(HELD_OUT)


def with_test_split(rows: Splits, name: str) -> Splits:
    """The splits with a `test` split: where there is none, half of the validation rows, by a hash of their groups.

    Args:
        rows: `validation` is stored.
        name: the dataset's, for messages.

    Raises:
        ValueError: the validation rows are all of one group.
    """
    if "test" in rows:
        return rows
    part = rows["validation"]
    groups = [id_hash(group) for group in part["group_id" if "group_id" in part.column_names else "image_id"]]
    in_order = sorted(set(groups))
    if len(in_order) < 2:
        raise ValueError(f"{name} has no rows to test on, and its validation rows are all of one image or group.")
    tested = set(in_order[len(in_order) // 2 :])
    halves = {
        split: part.select([i for i, group in enumerate(groups) if (group in tested) == (split == "test")])
        for split in ("validation", "test")
    }
    if PartialState().is_main_process:
        counts = " and ".join(f"{len(half):,} to {split} on" for split, half in halves.items())
        print(f"{name} has no test split: the validation rows are halved by a hash of their ids: {counts}")
    return type(rows)({**rows, **halves})


def stored_rows(stream: datasets.IterableDataset, split: str) -> datasets.Dataset:
    """A streamed split on disk until the process ends: evaluation needs its rows in order, several times.

    The first process of each machine reads the stream, and the others of that machine map its files. Called on every
    process. Rows that training would leave out are left out, and counted.

    Raises:
        ValueError, OSError: on every process, where a stream cannot be read or names an image of this machine.
    """
    state = PartialState()
    own = distributed.agree(lambda: _write_rows(stream, split) if state.is_local_main_process else [])
    files = gather_object([own])[state.process_index - state.local_process_index]
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    return rows.cast_column("image", datasets.Image())


def _write_rows(stream: datasets.IterableDataset, split: str) -> list[str]:
    """The arrow files of a stream's usable rows, in a folder that is removed when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="dsmd-")
    atexit.register(folder.cleanup)
    stream = stream.cast_column("image", datasets.Image(decode=False))
    left_out = []

    def usable_rows() -> Iterator[dict]:
        for table in stream.with_format("arrow").iter(100):
            faults = left_out_of(table)
            check_image_paths(table.filter(table["image"].is_valid())["image"], None)
            for i, row in enumerate(table.to_pylist()):
                try:
                    if i not in faults:
                        if row["image"] is not None:
                            load_rgb(row["image"])
                        yield row
                        continue
                    reason = faults[i]
                except ValueError as error:
                    reason = error
                left_out.append(f"{printable(str(row['image_id']))}: {reason}")

    with readable(f"The {split} split"):  # datasets gives whatever goes wrong in a generator an error of its own
        rows = datasets.Dataset.from_generator(
            usable_rows, features=stream.features, cache_dir=folder.name, fingerprint=os.path.basename(folder.name)
        )
    if left_out and PartialState().is_main_process:
        print(f"{counted(len(left_out), 'row', 'rows')} of the {split} split left out, the first: {left_out[0]}")
    return [file["filename"] for file in rows.cache_files]
