"""A source of images and captions as people have it, opened as tables and read as rows."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import datasets
from huggingface_hub import constants
from tqdm.auto import tqdm

from datasets_scripts.building import SPLIT_OF
from datasets_scripts.opening import license_on_card, readable
from datasets_scripts.source_rows import IMAGE_SUFFIXES, TABLE_SUFFIXES, Columns, Table, find_columns, split_of_path
from rows.files import read_file


HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"
LONGEST_TEXT = 1 << 20  # bytes, of a .txt or .json in a tar
METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)


def read_source(source: str, columns: Columns, cache: Path) -> list[Table]:
    """Finds out which form a source has (`datasets_scripts.own_data` lists them) and opens it.

    Args:
        source: path, glob or Hub id.
        columns: as far as the user named them.
        cache: a folder that lives as long as the tables.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or it is of no form known; a column is missing or ambiguous.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            with readable(source):
                return tables_of_datasets(datasets.load_from_disk(path), columns)
        if files := sorted(file for file in path.rglob("metadata.*") if file.name in METADATA):
            return [_table_of_file(file, path, columns, cache) for file in files]
        if files := sorted(path.rglob("*.tar")):
            return [_table_of_tar(file, path, columns) for file in files]
        with readable(source):
            return tables_of_datasets(datasets.load_dataset(source, cache_dir=str(cache)), columns)
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(source, recursive=True)))
    for file in files:
        if file.suffix.lower() not in (*TABLE_SUFFIXES, ".tar"):
            raise ValueError(f"{file}: expected a file ending in {', '.join(TABLE_SUFFIXES)} or .tar (unpacked)")
    if files:
        root = Path(os.path.commonpath([file.parent for file in files]))
        return [
            _table_of_tar(file, root, columns)
            if file.suffix.lower() == ".tar"
            else _table_of_file(file, root, columns, cache)
            for file in files
        ]
    if not re.fullmatch(HUB_ID, source):
        raise FileNotFoundError(f"nothing at {source}: expected a folder, file, glob or Hub id such as name/data")
    print(f"{source} is no file or folder here: taken for a dataset on the Hub")
    with readable(source):
        return tables_of_datasets(datasets.load_dataset(source), columns)


def tables_of_datasets(loaded: datasets.Dataset | datasets.DatasetDict, columns: Columns) -> list[Table]:
    """Tables of a dataset whose images are in it (a column of Image or of bytes), one a split."""
    if isinstance(loaded, datasets.Dataset):
        return [_table_of_dataset(loaded, "the dataset", None, columns)]
    if len(loaded) > 1 and not set(loaded) <= set(SPLIT_OF):
        raise ValueError(
            f"the dataset has the splits {', '.join(loaded)}; expected one, or some of {', '.join(SPLIT_OF)}. "
            "Save one with those only (`save_to_disk`)"
        )
    return [_table_of_dataset(part, split, SPLIT_OF.get(split), columns) for split, part in loaded.items()]


def _table_of_dataset(
    dataset: datasets.Dataset, name: str, split: str | None, columns: Columns, file: Path | None = None
) -> Table:
    """`file`: the parquet file that the dataset was read from; a column of paths is relative to its folder."""
    with_images = [column for column, feature in dataset.features.items() if _holds_images(feature)]
    names = list(dataset.column_names)
    if isinstance(described := dataset.features.get("json"), dict):  # a webdataset's
        names += described
    if columns.image is None and len(with_images) == 1:
        columns = replace(columns, image=with_images[0])
    columns = find_columns(names, columns, name)
    wanted = {columns.caption, columns.id, columns.group, "split", "__key__", "__url__"}
    wanted |= {"json"} if isinstance(described, dict) else set()
    if columns.image in with_images:
        images = dataset.select_columns([columns.image]).cast_column(columns.image, datasets.Image(decode=False))
    elif file is not None:
        wanted.add(columns.image)
    else:
        hint = "give tables of paths as a file or a glob such as 'data/*.csv'"
        kind = dataset.features[columns.image]
        raise ValueError(f"{name}: column {columns.image} holds {kind}, expected images; {hint}")
    texts = dataset.select_columns([column for column in dataset.column_names if column in wanted])

    def rows() -> Iterator[dict]:
        for i, cells in enumerate(_plain_rows(texts)):
            if isinstance(described, dict):
                cells |= cells["json"] or {}
            if "__url__" in cells:  # where it lies on this machine, or on the Hub
                cells["__url__"] = "/".join(PurePosixPath(cells["__url__"]).parts[-2:])
            if columns.image in with_images:
                cells[columns.image] = partial(_read_cell, images, i, columns.image)
            yield cells

    return Table(name, split, columns, rows(), folder=file and file.parent)


def _plain_rows(dataset: datasets.Dataset) -> Iterator[dict]:
    for batch in dataset.with_format("arrow").iter(1000):
        yield from batch.to_pylist()


def _holds_images(feature) -> bool:
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _read_cell(images: datasets.Dataset, i: int, column: str) -> bytes:
    cell = images[i][column]
    if cell is None:
        raise FileNotFoundError("the cell is empty")
    if cell["bytes"] is not None:
        return cell["bytes"]
    # Files beside a dataset are where `datasets` put them; any other path would be the dataset's author reading here.
    path = Path(cell["path"]).resolve()
    caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    if not any(path.is_relative_to(Path(cache).resolve()) for cache in caches):
        raise ValueError(f"the dataset holds no image but the path {path}, outside the datasets cache")
    return read_file(path)


def _table_of_file(file: Path, root: Path, columns: Columns, cache: Path) -> Table:
    is_metadata = file.name in METADATA
    place = file.relative_to(root)
    split = split_of_path(place)
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        with readable(str(file)):
            dataset = datasets.Dataset.from_parquet(str(file), cache_dir=str(cache))
        table = _table_of_dataset(dataset, str(place), split, columns, file)
    else:
        rows = _read_jsonl(file) if suffix == ".jsonl" else _read_csv(file, "\t" if suffix == ".tsv" else ",")
        names = list(dict.fromkeys(name for row in rows for name in row))
        found = find_columns(names, columns, str(place))
        if suffix != ".jsonl":
            for cells in rows:
                cells[found.caption] = _caption_list(cells[found.caption])
        table = Table(str(place), split, found, rows, file.parent)
    table.root = root
    table.split_by_folder = is_metadata
    return table


@contextmanager
def _utf8(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as that") from None


def _caption_list(cell: str) -> str | list[str]:
    """A cell of a table of text that holds several captions as JSON, `["a cat", "a pet"]`; any other is a caption."""
    if cell.startswith("["):
        with suppress(ValueError):
            captions = json.loads(cell)
            if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
                return captions
    return cell


def _read_jsonl(file: Path) -> list[dict]:
    rows = []
    with _utf8(file), file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: expected an object, got {line[:80]!r}")
            rows.append(row)
    return rows


def _read_csv(file: Path, delimiter: str) -> list[dict]:
    # Without `strict`, a quote that is not closed would swallow the rest of the file as one caption.
    with _utf8(file), file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            rows = []
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ValueError(f"{len(cells)} cells under the {len(header)} columns {', '.join(header)}")
                if cells:
                    rows.append(dict(zip(header, cells)))
        except UnicodeDecodeError:
            raise
        except (csv.Error, ValueError) as error:
            hint = "cells with a separator, a quote or a newline must be quoted"
            raise ValueError(f"{file}, line {reader.line_num}: {error}; {hint}") from None
    return rows


def _table_of_tar(file: Path, root: Path, columns: Columns) -> Table:
    place = file.relative_to(root)
    samples: dict[str, dict] = {}
    where = str(file)
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tqdm(tar, desc=str(place), leave=False, disable=None):
                where = f"{file}: {member.name}"
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                suffix = PurePosixPath(path.name.lower()).suffix
                if not member.isreg() or not stem or suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
                    continue
                if member.issparse() or (suffix not in IMAGE_SUFFIXES and member.size > LONGEST_TEXT):
                    raise ValueError(f"a sparse file or a text of {member.size:,} bytes, expected a plain one of less")
                key = (path.parent / stem).as_posix()
                cells = samples.setdefault(key, {"__key__": key, "__url__": place.as_posix()})
                if suffix in IMAGE_SUFFIXES:
                    if "__image__" in cells:
                        raise ValueError("a second image of this sample, expected one")
                    cells["__image__"] = partial(_read_slice, file, member.offset_data, member.size)
                elif extension == "txt":
                    cells["txt"] = tar.extractfile(member).read().decode()
                elif extension == "json":
                    described = json.loads(tar.extractfile(member).read())
                    if not isinstance(described, dict):
                        raise ValueError("expected an object")
                    cells |= {name: cell for name, cell in described.items() if name not in cells}
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    for cells in samples.values():
        cells.setdefault("__image__", partial(_no_image, cells["__key__"]))
    names = list(dict.fromkeys(name for cells in samples.values() for name in cells))
    columns = find_columns(names, replace(columns, image="__image__"), str(place))
    return Table(str(place), split_of_path(place), columns, list(samples.values()))


def _read_slice(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as tar:
        tar.seek(offset)
        return tar.read(size)


def _no_image(key: str) -> bytes:
    raise FileNotFoundError(f"sample {key} has no image ({', '.join(IMAGE_SUFFIXES)})")


def license_of_source(source: str) -> str | None:
    """What a dataset or a folder's card says of its licence; None for other sources."""
    path = Path(source)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(source)
        part = loaded if isinstance(loaded, datasets.Dataset) else next(iter(loaded.values()))
        return part.info.license or None
    if path.exists() and not (path / "README.md").is_file():
        return None
    return license_on_card(source) if path.exists() or re.fullmatch(HUB_ID, source) else None
