"""A webdataset as rows, one sample after another, whatever mix of images and texts its tars hold."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

import datasets
import pyarrow.compute as pc
from datasets.download import StreamingDownloadManager

from datasets_scripts.samples import LONGEST_TEXT, captions_of_sample, id_of_sample, place_of_tar
from datasets_scripts.source_rows import IMAGE_SUFFIXES
from rows.columns import Splits
from rows.files import LARGEST_FILE, printable


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
    }
)
ROWS_AT_ONCE = 100  # in memory, of an arrow file that is written
_SAID: set[tuple[str, ...]] = set()  # tars whose failed samples this process has counted: every pass reads them again


def open_tars(name: str, config_name: str | None, streaming: bool) -> Splits | None:
    """The splits of a webdataset, as rows; None for any other dataset.

    A sample without an image or without captions is a row all the same, with None or an empty list: who reads the rows
    counts what is left out. Downloads that img2dataset marked as failed are no rows: they are counted where the tars
    have been read to their end, once in a process.

    Args:
        name: a folder of tars, or a Hub id.
        config_name: of a Hub dataset.
        streaming: read as it is used, not stored.
    """
    found = tars_by_split(name, config_name)
    if found is None:
        return None
    parts = {}
    for split, tars in found.items():
        source = {"tars": tars, "root": name}
        if streaming:
            parts[split] = datasets.IterableDataset.from_generator(rows_of_tars, FEATURES, source)
        else:
            # Rows that are stored are found again by their source: changed files are another one.
            source["stamp"] = [_stamp(tar) for tar in source["tars"]]
            parts[split] = datasets.Dataset.from_generator(
                rows_of_tars, FEATURES, gen_kwargs=source, writer_batch_size=ROWS_AT_ONCE
            )
    return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(parts)


def tars_by_split(name: str, config_name: str | None, revision: str | None = None) -> dict[str, list[str]] | None:
    """Paths or addresses (hf://...) of a webdataset's tars, by split; None for any other dataset.

    Args:
        name: a Hub id, or a folder in the Hub's layout.
        config_name, revision: of a Hub dataset.
    """
    builder = datasets.load_dataset_builder(name, config_name, revision=revision)
    if _is_of_img2dataset(builder):
        try:
            builder = datasets.load_dataset_builder(name, data_files="**/*.tar", revision=revision)
        except FileNotFoundError:  # parquet files of that name, and no tars
            return None
    if not type(builder).__module__.endswith(".webdataset"):
        return None
    return {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}


def _is_of_img2dataset(builder: datasets.DatasetBuilder) -> bool:
    """Whether these may be tables that img2dataset writes beside its tars (00000.parquet). They have no images, but
    are as many as the tars, so `datasets` takes the whole for tables."""
    if not type(builder).__module__.endswith(".parquet"):
        return False
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    return bool(files) and all(re.fullmatch(r"\d{5,}\.parquet", PurePosixPath(str(file)).name) for file in files)


def only_whole(parts: datasets.DatasetDict) -> datasets.DatasetDict:
    """The rows that have an image and captions; prints how many have not."""
    whole = datasets.DatasetDict()
    for split, rows in parts.items():
        table = rows.data
        has_caption = pc.greater(pc.list_value_length(table["captions"]), 0)
        has_both = pc.and_(table["image"].is_valid(), has_caption).to_pylist()
        whole[split] = rows if all(has_both) else rows.select([row for row, both in enumerate(has_both) if both])
        if lost := len(rows) - len(whole[split]):
            if not len(whole[split]):
                raise ValueError(f"no sample of the {split} split has both an image and a caption")
            print(f"{lost:,} samples of the {split} split have no image or no captions and are left out")
    return whole


def _stamp(tar: str) -> str:
    """Size and time of a file; a tar on the Hub is named with its commit."""
    return f"{os.path.getsize(tar)}-{os.stat(tar).st_mtime_ns}" if os.path.isfile(tar) else ""


# Top-level functions: a loader's worker that is not forked gets them pickled.


def rows_of_tars(tars: list[str], root: str, stamp: list[str] | None = None) -> Iterator[dict]:
    """A row for each sample of the tars.

    Args:
        tars: paths or addresses (hf://...).
        root: the dataset's name, which ids do not begin with.
        stamp: not read, see [`open_tars`].

    Raises:
        ValueError: a tar is broken, a text in it is too long or not what its name says, or a sample has two images.
    """
    failed, first, count = 0, "", 0
    for tar in tars:
        place = place_of_tar(tar, root)
        for key, sample in _samples(tar):
            described, count = sample.get("json"), count + 1
            status = (described or {}).get("status", "success")
            if "image" not in sample and status != "success":
                failed, first = failed + 1, first or f"{id_of_sample(described, key, place)}: {status}"
                continue
            image = {"bytes": sample["image"], "path": None} if "image" in sample else None
            captions = captions_of_sample(described, sample.get("txt"))
            yield {"image": image, "captions": captions, "image_id": id_of_sample(described, key, place)}
    if failed and (said := (root, *tars)) not in _SAID:
        _SAID.add(said)
        of_several = f" and {len(tars) - 1:,} more" if len(tars) > 1 else ""
        print(
            f"{place_of_tar(tars[0], root)}{of_several}: {failed:,} of {count:,} samples failed in the source and are "
            f"left out (--max_skipped does not count these); the first: {printable(first)}"
        )


def _samples(tar: str) -> Iterator[tuple[str, dict]]:
    """Key and content (`image`, `txt`, `json`) of each sample, whose files follow each other.

    A key ends at the first dot, or, where the first sample would then have two images, at the last.
    """
    found = _files(tar, by_last_dot=False)
    first = next(found, None)
    if first is not None and first[1].get("images", 0) > 1:
        found = _files(tar, by_last_dot=True)
        first = next(found)
    while first is not None:
        key, sample = first
        if sample.get("images", 0) > 1:
            raise ValueError(f"{tar}: sample {key} has {sample['images']} images, expected one")
        yield key, sample
        first = next(found, None)


def _files(tar: str, by_last_dot: bool) -> Iterator[tuple[str, dict]]:
    key, sample, where = None, {}, tar
    try:
        for name, file in StreamingDownloadManager().iter_archive(tar):
            where, path = f"{tar}: {name}", PurePosixPath(name)
            stem, _, _ = path.name.rpartition(".") if by_last_dot else path.name.partition(".")
            suffix = PurePosixPath(path.name.lower()).suffix
            if not stem or suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
                continue
            own = (path.parent / stem).as_posix()
            if own != key:
                if sample:
                    yield key, sample
                key, sample = own, {}
            most = LARGEST_FILE if suffix in IMAGE_SUFFIXES else LONGEST_TEXT
            data = file.read(most + 1)
            if len(data) > most:
                raise ValueError(f"more than {most:,} bytes, expected less")
            if suffix in IMAGE_SUFFIXES:
                sample["image"], sample["images"] = data, sample.get("images", 0) + 1
            elif suffix == ".txt":
                sample["txt"] = data.decode("utf-8-sig")
            else:
                sample["json"] = json.loads(data)
                if not isinstance(sample["json"], dict):
                    raise ValueError("expected an object")
    except (EOFError, RecursionError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{where}: {error}") from None
    if sample:
        yield key, sample
