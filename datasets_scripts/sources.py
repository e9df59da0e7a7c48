"""A source of images and captions as people have it, opened as tables: which form it has is found by looking."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import constants

from datasets_scripts.opening import license_on_card, readable
from datasets_scripts.samples import image_names, place_of_tar, row_of_sample, table_of_tar
from datasets_scripts.source_files import TEXT_SUFFIXES, read_text_table, suffix_of
from datasets_scripts.source_folders import (
    has_sidecars,
    list_images,
    table_of_classes,
    table_of_images,
    table_of_sidecars,
    tables_in,
)
from datasets_scripts.source_rows import Columns, ImageFolder, Table, find_columns
from datasets_scripts.split_words import SPLIT_OF, split_of_path, split_of_word
from datasets_scripts.tar_stream import tars_by_split
from rows.files import counted, read_file


HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json", "metadata.parquet")


@dataclass
class Source:
    """What to read, and how far the user has said what it is.

    Args:
        name: path, glob or Hub id.
        columns: as far as the user named them.
        cache: a folder that lives as long as the tables.
        images: the folder that paths lead to and do not leave; None: each table's own.
        encoding, delimiter: of tables of text; None: found by looking.
        template: puts names of classes into a sentence, with one `{}`.
        ignore_splits: take no notice of folders, files and columns that name a split.
        config_name, revision, split: of a dataset on the Hub.
        rows: read only the first so many of each split of a dataset.
        keep_uncaptioned: take a folder of images alone.

    Attributes:
        failed: lines about what the program that made the source had marked as failed.
        decided: names of folders and files that decided a split.
    """

    name: str
    columns: Columns
    cache: Path
    images: Path | None = None
    encoding: str | None = None
    delimiter: str | None = None
    template: str | None = None
    ignore_splits: bool = False
    config_name: str | None = None
    revision: str | None = None
    split: str | None = None
    rows: int | None = None
    keep_uncaptioned: bool = False
    failed: list[str] = field(default_factory=list)
    decided: dict[str, str] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        """Finds out which form the source has (`datasets_scripts.own_data` lists them) and opens it.

        Raises:
            FileNotFoundError, ValueError: nothing is there, or it is of no form known; a column is missing or
                ambiguous.
        """
        path = Path(self.name)
        if path.is_dir():
            tables = self._tables_of_folder(path)
        else:
            files = [path] if path.is_file() else sorted(map(Path, glob.glob(self.name, recursive=True)))
            if files:
                root = Path(os.path.commonpath([file.parent for file in files]))
                tables = [self._table_of_file(file, root) for file in files]
            else:
                tables = self._tables_of_hub()
        if self.ignore_splits:
            for table in tables:
                table.split, table.split_by_folder, table.rows = None, False, _without_split(table.rows)
        elif self.decided:
            said = ", ".join(f"{name} -> {split}" for name, split in sorted(self.decided.items()))
            print(f"the splits follow from names: {said} (--ignore_splits takes no notice of them)")
        return tables

    def _tables_of_folder(self, path: Path) -> list[Table]:
        if _is_saved(path):
            with readable(self.name):
                return self.tables_of_datasets(datasets.load_from_disk(path))
        if files := sorted(file for file in path.rglob("metadata.*") if file.name in METADATA):
            tables = [self._table_of_file(file, path) for file in files]
            return tables + self._images_without_rows(path, tables)
        if files := sorted(path.rglob("*.tar")):
            return [self._table_of_file(file, path) for file in files]
        images = list_images(path)
        if images and has_sidecars(path, images):
            self._note_folders(images)
            return [replace(table_of_sidecars(path, images, self.failed), template=self.template)]
        found = tables_in(path, images)
        if found and (images or self.images is not None):
            # COCO's captions lie beside files of boxes and keypoints.
            found = [file for file in found if "caption" in file.name.lower()] or found
            of_splits = [file for file in found if split_of_path(Path(file.name), is_table=True)[0]]
            if len(found) > 1 and len(of_splits) < len(found):
                names = ", ".join(str(file.relative_to(path)) for file in found[:5])
                if {file.stem for file in found} <= {image.stem for image in images}:
                    raise ValueError(
                        f"{path} has a file of text for each image, but elsewhere ({names}): put it beside its image"
                    )
                raise ValueError(f"{path} has images and several tables ({names}): name the one that has the captions")
            print(f"the captions are taken from {', '.join(str(file.relative_to(path)) for file in found)}")
            tables = [self._table_of_file(file, path) for file in found]
            return tables + self._images_without_rows(path, tables)
        if images:
            self._note_folders(images)
            if self.keep_uncaptioned and self.template is None:
                return [table_of_images(path, images)]
            return [table_of_classes(path, images, self.template)]
        with readable(self.name):
            loaded = datasets.load_dataset(self.name, self.config_name, cache_dir=str(self.cache))
        return self.tables_of_datasets(loaded)

    def _tables_of_hub(self) -> list[Table]:
        if not re.fullmatch(HUB_ID, self.name):
            raise FileNotFoundError(
                f"nothing at {self.name}: expected a folder, file, glob or Hub id such as name/data"
            )
        print(f"{self.name} is no file or folder here: taken for a dataset on the Hub")
        settings = {"name": self.config_name, "revision": self.revision, "split": self.split}
        given = {name: of for name, of in settings.items() if of is not None}
        with readable(self.name):
            tars = tars_by_split(self.name, self.config_name, self.revision)
            loaded = datasets.load_dataset(self.name, **given) if tars is None else None
        return self.tables_of_datasets(loaded) if tars is None else self._tables_of_tars(tars)

    def _tables_of_tars(self, tars: dict[str, list[str]]) -> list[Table]:
        """Tables of a webdataset on the Hub, one a tar, which is stored in the Hub's cache."""
        if self.split is not None and self.split not in tars:
            raise ValueError(f"--split {self.split}: expected one of {', '.join(tars)} (--rows takes the first of it)")
        tars = tars if self.split is None else {self.split: tars[self.split]}
        splits, tables = self._splits_of(list(tars)), []
        for name, addresses in tars.items():
            left = self.rows
            for address in addresses:
                with readable(self.name):
                    file = Path(datasets.DownloadManager().download(address))
                table = table_of_tar(file, place_of_tar(address, self.name), self.columns, self.failed)
                table.rows = table.rows[:left]
                tables.append(replace(table, split=splits[name], template=self.template))
                if left is not None and (left := left - len(table.rows)) <= 0:
                    break
        return tables

    def tables_of_datasets(self, loaded: datasets.Dataset | datasets.DatasetDict) -> list[Table]:
        """Tables of a dataset whose images are in it (a column of Image or of bytes), one a split."""
        if isinstance(loaded, datasets.Dataset):
            return [self._table_of_dataset(loaded, "the dataset")]
        splits = self._splits_of(list(loaded))
        return [replace(self._table_of_dataset(part, name), split=splits[name]) for name, part in loaded.items()]

    def _splits_of(self, names: list[str]) -> dict[str, str | None]:
        """Which split each split of a dataset is, by its name."""
        splits = {name: None if self.ignore_splits else split_of_word(name) for name in names}
        if len(names) > 1 and not self.ignore_splits and None in splits.values():
            raise ValueError(
                f"the dataset has the splits {', '.join(names)}; expected one, or some of {', '.join(SPLIT_OF)}. "
                "Take one by --split, or all without their splits by --ignore_splits"
            )
        self.decided |= {name: split for name, split in splits.items() if split not in (None, name)}
        return splits

    def _table_of_dataset(self, dataset: datasets.Dataset, name: str, file: Path | None = None) -> Table:
        """`file`: the parquet file that the dataset was read from, whose column of paths is relative to its folder."""
        dataset = dataset if self.rows is None else dataset.select(range(min(self.rows, len(dataset))))
        columns, names = self.columns, list(dataset.column_names)
        if "__key__" in names:
            return self._table_of_samples(dataset, name)
        with_images = [column for column, feature in dataset.features.items() if _holds_images(feature)]
        if columns.image is None and len(with_images) == 1:
            columns = replace(columns, image=with_images[0])
        columns = find_columns(names, columns, name)
        wanted = {*(caption.split(".")[0] for caption in columns.captions), "split"}
        wanted |= {columns.id, columns.group, columns.split_group, "status"}  # status: of img2dataset
        images = None
        if columns.image in with_images:
            images = _undecoded(dataset.select_columns([columns.image]), columns.image)
        elif file is not None:
            wanted.add(columns.image)
        else:
            kind = dataset.features[columns.image]
            hint = "give tables of paths as a file or a glob such as 'data/*.csv'"
            raise ValueError(f"{name}: column {columns.image} holds {kind}, expected images; {hint}")
        texts = dataset.select_columns([column for column in names if column in wanted])
        labels = {c: f for c, f in dataset.features.items() if isinstance(f, datasets.ClassLabel) and c in wanted}

        def rows() -> Iterator[dict]:
            there = _image_is_there(images) if images is not None else itertools.repeat(True)
            for i, (cells, is_there) in enumerate(zip(_plain_rows(texts), there)):
                for column, feature in labels.items():
                    cells[column] = None if cells[column] is None else feature.int2str(cells[column])
                if not is_there and isinstance(cells.get("status"), str) and cells["status"] != "success":
                    self.failed.append(f"{name}, row {i + 1}: {cells['status']}")
                    continue
                if images is not None:
                    cells[columns.image] = partial(_read_cell, images, i, columns.image) if is_there else None
                yield cells

        return Table(name, columns, rows(), template=self.template)

    def _table_of_samples(self, dataset: datasets.Dataset, name: str) -> Table:
        """A webdataset that `datasets` has read."""
        found = list(image_names(dataset.column_names))
        if len(found) != 1:
            raise ValueError(
                f"{name}: expected one image in each sample of the webdataset; its files end in "
                f"{', '.join(column for column in dataset.column_names if not column.startswith('__'))}"
            )
        images = _undecoded(dataset.select_columns(found), found[0])
        texts = dataset.select_columns([c for c in dataset.column_names if c in ("json", "txt", "__key__", "__url__")])
        captions = self.columns.captions

        def rows() -> Iterator[dict]:
            for i, cells in enumerate(_plain_rows(texts)):
                described = cells.get("json") if isinstance(cells.get("json"), dict) else None
                image = partial(_read_cell, images, i, found[0])
                tar = place_of_tar(cells["__url__"], self.name)
                yield row_of_sample(image, described, cells.get("txt"), cells["__key__"], tar)

        columns = replace(self.columns, image="__image__", captions=captions or ("__captions__",))
        return Table(name, columns, rows(), template=self.template)

    def _table_of_file(self, file: Path, root: Path) -> Table:
        place, suffix = file.relative_to(root), suffix_of(file)
        if suffix == ".tar" and file.suffix.lower() != ".tar":
            raise ValueError(f"{file} is packed: unpack it by gunzip, and its images can be found in it")
        if suffix not in (*TEXT_SUFFIXES, ".parquet", ".tar"):
            raise ValueError(
                f"{file}: expected a file ending in {', '.join(TEXT_SUFFIXES)} (or with .gz), .parquet, or .tar"
            )
        split, decided_by = split_of_path(place, is_table=True)
        if split is not None:
            self.decided[decided_by] = split
        if suffix == ".tar":
            table = table_of_tar(file, PurePosixPath(place.as_posix()), self.columns, self.failed)
        elif suffix == ".parquet":
            with readable(str(file)):
                dataset = datasets.Dataset.from_parquet(str(file), cache_dir=str(self.cache))
            table = self._table_of_dataset(dataset, str(place), file)
        else:
            rows = read_text_table(file, self.encoding, self.delimiter)
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = Table(str(place), find_columns(names, self.columns, str(place)), rows)
        table.split, table.template = split, self.template
        if self.images is None:
            # A folder that was named as the source may be searched; that a file lies in may be any.
            bare_names = Path(self.name).is_dir() and file.name not in METADATA
            table.images, table.folder = ImageFolder(root, bare_names=bare_names), place.parent
        else:
            table.images = ImageFolder(self.images, by_name=True)
        table.split_by_folder = file.name in METADATA
        return table

    def _note_folders(self, images: list[Path]) -> None:
        for folder in {image.parent for image in images}:
            split, decided_by = split_of_path(folder / "x", is_table=False)
            if split is not None:
                self.decided[decided_by] = split

    def _images_without_rows(self, path: Path, tables: list[Table]) -> list[Table]:
        """A table of the folder's images that no row names, where they are wanted without captions."""
        named = set()
        for table in tables:
            if not isinstance(table.rows, list) or self.images is not None:
                return []
            named |= {str(row.get(table.columns.image)).replace("\\", "/").rpartition("/")[2] for row in table.rows}
        lost = [image for image in list_images(path) if image.name not in named]
        if not lost:
            return []
        what = counted(len(lost), "image of the folder has", "images of the folder have")
        if self.keep_uncaptioned:
            print(f"{what} no row: taken without a caption; the first: {lost[0]}")
            return [table_of_images(path, lost)]
        print(f"{what} no row and stay out (--keep_uncaptioned takes them); the first: {lost[0]}")
        return []


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder: a dataset, or a single split."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _without_split(rows) -> Iterator[dict]:
    for cells in rows:
        yield {name: cell for name, cell in cells.items() if name != "split"}


def _undecoded(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    feature = dataset.features[column]
    inner = getattr(feature, "feature", None)
    undecoded = datasets.Image(decode=False)
    return dataset.cast_column(column, datasets.List(undecoded) if _holds_images(inner) else undecoded)


def _plain_rows(dataset: datasets.Dataset) -> Iterator[dict]:
    for batch in dataset.with_format("arrow").iter(1000):
        yield from batch.to_pylist()


def _image_is_there(images: datasets.Dataset) -> Iterator[bool]:
    """For each row whether its cell holds an image, or a list that is not empty."""
    for batch in images.with_format("arrow").iter(1000):
        column = batch.column(0)
        lengths = pc.list_value_length(column) if pa.types.is_list(column.type) else None
        yield from (column.is_valid() if lengths is None else pc.greater(pc.fill_null(lengths, 0), 0)).to_pylist()


def _holds_images(feature) -> bool:
    """A column of images, of their bytes, or of lists of images."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    if isinstance(feature, datasets.List):
        return isinstance(feature.feature, datasets.Image)
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _read_cell(images: datasets.Dataset, i: int, column: str) -> bytes:
    cell = images[i][column]
    cell = (cell[0] if cell else None) if isinstance(cell, list) else cell  # of several images the first
    if cell is None:
        raise FileNotFoundError("the cell is empty")
    if cell["bytes"] is not None:
        return cell["bytes"]
    # Files beside a dataset are where `datasets` put them; any other path would let its author read this disk.
    path = Path(cell["path"]).resolve()
    caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    if not any(path.is_relative_to(Path(cache).resolve()) for cache in caches):
        raise ValueError(f"the dataset holds no image but the path {path}, outside the datasets cache")
    return read_file(path)


def license_of_source(source: str) -> str | None:
    """What a dataset or a folder's card says of its licence; None for other sources."""
    path = Path(source)
    if _is_saved(path):
        loaded = datasets.load_from_disk(source)
        part = loaded if isinstance(loaded, datasets.Dataset) else next(iter(loaded.values()))
        return part.info.license or None
    if path.exists() and not (path / "README.md").is_file():
        return None
    return license_on_card(source) if path.exists() or re.fullmatch(HUB_ID, source) else None
