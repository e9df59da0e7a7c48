"""A dataset by its name: 'icons', a folder, or a Hub id; and the licence that it states."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard

from datasets_scripts.tar_stream import only_whole, open_tars
from rows.columns import Splits
from rows.images import check_image_paths


# Each font's stands on the dataset's card, see icons.py.
ICONS_LICENSE = "those of the icon fonts: Apache-2.0, CC BY 4.0, MIT and OFL"


def open_dataset(
    name: str, config_name: str | None = None, streaming: bool = False, whole_samples: bool = False
) -> Splits:
    """All splits of a dataset.

    Args:
        name: 'icons', a folder written by `save_to_disk`, a folder of data files as on the Hub, or a Hub id.
        config_name: of a Hub dataset.
        streaming: read as it is used, from data files or the Hub.
        whole_samples: of a webdataset that is not streamed, leave out samples without an image or captions, and say
            how many; else they are rows with None or an empty list.

    Raises:
        ValueError: it cannot be read or streamed, is a single split, or names images that lie elsewhere.
    """
    if name == "icons":
        from datasets_scripts.icons import load_icons

        rows = load_icons()
    elif (Path(name) / "dataset_dict.json").is_file():
        with readable(name):
            rows = datasets.load_from_disk(name)
    elif (Path(name) / "state.json").is_file():
        raise ValueError(f"{name} is a single split: save a `DatasetDict` with its splits.")
    else:
        with readable(name):
            if (tars := open_tars(name, config_name, streaming)) is not None:
                return tars if streaming or not whole_samples else only_whole(tars)
            rows = datasets.load_dataset(name, config_name, streaming=streaming)
        if not streaming:
            return _checked(rows, name)
        unknown = [split for split, part in rows.items() if part.column_names is None]
        if unknown:
            raise ValueError(
                f"{name} does not say what columns its {', '.join(unknown)} split has: it cannot be streamed."
            )
        return rows
    _checked(rows, name)
    if streaming:
        return datasets.IterableDatasetDict({split: part.to_iterable_dataset() for split, part in rows.items()})
    return rows


def split_of(splits: Splits, split: str, name: str) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a dataset.

    Args:
        splits: see [`open_dataset`].
        split: its name.
        name: of the dataset.

    Raises:
        ValueError: it has no such split.
    """
    if split not in splits:
        raise ValueError(f"{name} has no split {split} (it has {', '.join(splits)}).")
    return splits[split]


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns whatever `datasets` raises into a ValueError that names the dataset.

    Raises:
        ValueError: the dataset is broken. That there is none stays an OSError.
    """
    try:
        yield
    except Exception as error:  # its many readers have no common type of error
        if isinstance(error, OSError) and type(error) is not OSError:  # pyarrow's of broken bytes is a plain one
            raise
        raise ValueError(f"{name} cannot be read: {_in_one_sentence(error.__cause__ or error)}") from error


def _in_one_sentence(error: BaseException) -> str:
    """What `datasets` says is wrong; where that is known, what to do."""
    if script := re.search(r"scripts are no longer supported, but found (\S+)", str(error)):
        return (
            f"its files are read by a script ({script[1]}), which is not run; the Hub may have a copy as parquet: "
            "datasets_scripts.own_data --revision refs/convert/parquet reads that"
        )
    if configs := re.search(r"Config name is missing.*?\[(.*?)\]", str(error), re.DOTALL):
        names = configs[1].replace("'", "").split(", ")
        shown = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
        return f"it has the configurations {shown}; name one by --dataset_config_name"
    return f"{type(error).__name__}: {error}"


def _checked(rows: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    for part in rows.values():
        for column, feature in part.features.items():
            if isinstance(feature, datasets.Image):
                check_image_paths(part.data[column], Path(name) if Path(name).is_dir() else None)
    return rows


def license_of(rows: Splits, name: str) -> str | None:
    """The licence that a dataset states: in its information, else on its card."""
    if name == "icons":
        return ICONS_LICENSE
    if stated := next(iter(rows.values())).info.license:
        return stated
    return license_on_card(name)


def license_on_card(name: str) -> str | None:
    """The licence on the card of a folder or Hub dataset."""
    card = Path(name) / "README.md" if Path(name).is_dir() else name
    try:
        data = DatasetCard.load(card).data
    except (OSError, ValueError):  # no card, or one that is not well-formed, states nothing
        return None
    stated = getattr(data, "license_details", None) or data.license
    return ", ".join(stated) if isinstance(stated, list) else stated
