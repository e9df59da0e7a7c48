"""A dataset for retrieval from your own images and captions.

    python -m datasets_scripts.own_data SOURCE --output DIR

SOURCE is one of

- a folder with images and `metadata.jsonl` (or .csv, .parquet), here or in sub-folders: `file_name` and `captions`
  (a list) or `caption` / `text`; images in train/, validation/, test/ keep that split;
- a csv, tsv, jsonl or parquet file, or a glob of several: paths relative to the file (parquet: or the images) and
  captions, one row an image or one row a caption;
- webdataset tars: a folder, a file or a glob; each sample an image with .txt or .json (`captions`, `caption`, `text`);
- a dataset: a folder of `save_to_disk`, a folder of parquet files in the Hub's layout, or a Hub id.

Rows of one image become one, captions in order, each once. Without a validation or test split, images go to them by
a hash of image_id: the same whatever the order of the rows.
"""

from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import json
import os
import re
import reprlib
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import datasets
from huggingface_hub import constants
from tqdm.auto import tqdm

from model_cards.tables import as_code
from rows.files import file_in, printable, read_file
from trainers.data_loading import license_on_card, readable

from .building import SPLIT_OF, SPLITS, Row, build, fold, parse_arguments


IMAGE_NAMES = (
    "image img file_name filename filepath file_path path image_path img_path image_file image_name jpg jpeg png webp"
).split()
CAPTION_NAMES = "captions caption text texts txt alt_text sentences sentence".split()
# The first that is there. Not `id`: it may count captions.
ID_NAMES = "image_id cocoid img_id imgid".split()
HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LONGEST_TEXT = 1 << 20  # bytes, of a .txt or .json in a tar
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None: look for the usual names (group: `group_id`, or none)."""

    image: str | None = None
    caption: str | None = None
    id: str | None = None
    group: str | None = None


@dataclass
class Table:
    """Rows of a source before they are grouped by image.

    Args:
        name: for messages.
        split: of all rows that have no `split` of their own; None where the source does not say.
        columns: where things are, complete but for id and group.
        rows: dicts; the image is a path below `folder` or a function that returns its bytes.
        folder: of the paths.
        root: image ids are paths below it.
        split_by_folder: an image in a folder named train, validation or test belongs to that split.
    """

    name: str
    split: str | None
    columns: Columns
    rows: Iterable[dict]
    folder: Path | None = None
    root: Path | None = None
    split_by_folder: bool = False


def read_source(source: str, columns: Columns, cache: Path) -> list[Table]:
    """Finds out which form a source has (see the module) and opens it.

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


def rows_by_split(tables: list[Table]) -> dict[str | None, list[Row]]:
    """Rows of tables, one an image, in order of appearance; None holds those whose split is not known.

    Raises:
        ValueError: an id stands for two images, an image is in two groups or splits; a cell is of a wrong type.
    """
    first: dict[str, tuple[str | None, Row]] = {}
    parts: dict[str | None, list[Row]] = {}
    for table in tables:
        for i, cells in enumerate(tqdm(table.rows, desc=table.name, leave=False, disable=None)):
            try:
                split, row = _row(cells, table)
                earlier_split, earlier = first.setdefault(row.image_id, (split, row))
                if earlier is row:
                    parts.setdefault(split, []).append(row)
                    continue
                if earlier_split != split:
                    raise ValueError(f"image {row.image_id!r} is in two splits, {earlier_split} and {split}")
                if earlier.group_id != row.group_id:
                    raise ValueError(f"image {row.image_id!r} is in two groups, {earlier.group_id} and {row.group_id}")
                if not _same_image(earlier, row):
                    raise ValueError(f"the id {row.image_id!r} stands for two images; name another --id_column")
                earlier.captions += row.captions
            except (OSError, ValueError) as error:
                raise ValueError(f"{printable(table.name)}, row {i + 1}: {error}") from None
    return parts


def assign_splits(
    parts: dict[str | None, list[Row]], validation_share: float, test_share: float
) -> dict[str, list[Row]]:
    """Train, validation and test; what the source lacks is taken from its training images by a hash of their id.

    A source of one split only, whatever its name, counts as not split. Images of one group stay together.

    Args:
        parts: as `rows_by_split` gives them.
        validation_share, test_share: in (0, 1), of the images that are distributed.

    Raises:
        ValueError: some images have a split and some not, or a split is empty.
    """
    if not parts:
        raise ValueError("the source has no rows")
    if len(parts) == 1:
        parts = {"train": next(iter(parts.values()))}
    if None in parts:
        raise ValueError(f"the image {parts[None][0].image_id!r} has no split, others have; put it into one")
    if "train" not in parts:
        raise ValueError(f"the source has the splits {', '.join(parts)} and none for training")
    shares = {"test": test_share, "validation": validation_share}
    shares = {split: share for split, share in shares.items() if split not in parts}
    result: dict[str, list[Row]] = {split: parts.get(split, []) for split in SPLITS}
    result["train"] = []
    for row in parts["train"]:
        key = (row.group_id or row.image_id).encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
        split = "train"
        for name, share in shares.items():
            if number < share:
                split = name
                break
            number -= share
        result[split].append(row)
    if shares:
        print(f"{' and '.join(shares)} taken from {len(parts['train']):,} images by a hash of their ids")
    counts = ", ".join(f"{split}: {len(rows):,} images" for split, rows in result.items())
    print(counts)
    if not all(result.values()):
        raise ValueError(f"a split is empty ({counts}); larger --validation_share and --test_share may help")
    return result


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
    columns = _find_columns(names, columns, name)
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
    split = _split_of_path(place)
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        with readable(str(file)):
            dataset = datasets.Dataset.from_parquet(str(file), cache_dir=str(cache))
        table = _table_of_dataset(dataset, str(place), split, columns, file)
    else:
        rows = _read_jsonl(file) if suffix == ".jsonl" else _read_csv(file, "\t" if suffix == ".tsv" else ",")
        names = list(dict.fromkeys(name for row in rows for name in row))
        found = _find_columns(names, columns, str(place))
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
    columns = _find_columns(names, replace(columns, image="__image__"), str(place))
    return Table(str(place), _split_of_path(place), columns, list(samples.values()))


def _read_slice(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as tar:
        tar.seek(offset)
        return tar.read(size)


def _no_image(key: str) -> bytes:
    raise FileNotFoundError(f"sample {key} has no image ({', '.join(IMAGE_SUFFIXES)})")


def _split_of_path(path: Path | PurePosixPath) -> str | None:
    """Split that a folder's name (`val/x`) or a word in a table's or tar's (`coco-train-0001.tar`) says."""
    words = [part.lower() for part in path.parent.parts]
    if path.suffix in (*TABLE_SUFFIXES, ".tar"):
        words += re.split(r"[^a-z]+", path.stem.lower())
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)


def _find_columns(names: list[str], columns: Columns, where: str) -> Columns:
    for option, given in (("--id_column", columns.id), ("--group_column", columns.group)):
        if given is not None and given not in names:
            raise ValueError(f"{where} has no column {given} ({option}); it has {', '.join(names)}")
    return Columns(
        _find_column(names, columns.image, IMAGE_NAMES, "images", "--image_column", where),
        _find_column(names, columns.caption, CAPTION_NAMES, "captions", "--caption_column", where),
        columns.id or next((name for name in ID_NAMES if name in names), None),
        columns.group or ("group_id" if "group_id" in names else None),
    )


def _find_column(names: list[str], given: str | None, usual: list[str], what: str, option: str, where: str) -> str:
    if given in names:
        return given
    found = [name for name in names if name.lower() in usual] if given is None else []
    if len(found) == 1:
        return found[0]
    problem = f"several columns that may hold {what}" if found else f"no column {given or f'for {what}'}"
    raise ValueError(f"{where} has {problem}; it has {', '.join(names) or 'none'}. Name one with {option}")


def _row(cells: dict, table: Table) -> tuple[str | None, Row]:
    columns = table.columns
    image = cells.get(columns.image)
    split = table.split
    image_id = None
    if callable(image):
        read = image
        if "__key__" in cells:
            # Keys may start again in every tar, tars in every folder.
            image_id = (PurePosixPath(cells["__url__"]).with_suffix("") / cells["__key__"]).as_posix()
    else:
        file = file_in(table.folder, image)
        read = partial(read_file, file)
        place = file.relative_to(table.root)
        image_id = place.as_posix()
        if table.split_by_folder:
            split = _split_of_path(place) or split
    if "split" in cells:
        if not isinstance(cells["split"], str) or cells["split"] not in SPLIT_OF:
            raise ValueError(
                f"unknown split {reprlib.repr(cells['split'])}, expected {', '.join(SPLIT_OF)}; or rename the column"
            )
        split = SPLIT_OF[cells["split"]]
    if columns.id is not None:
        image_id = _name(cells.get(columns.id), columns.id)
    group_id = None if columns.group is None else _name(cells.get(columns.group), columns.group)
    captions = cells.get(columns.caption)
    captions = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"column {columns.caption} holds {reprlib.repr(captions)}, expected text or a list of texts")
    if image_id is None:
        # Nothing names the image but the image.
        image_id = hashlib.blake2b(read(), digest_size=8).hexdigest()
    return split, Row(image_id, list(captions), read, group_id)


def _name(cell, column: str) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (str, int)) or cell == "":
        raise ValueError(
            f"column {column} holds {reprlib.repr(cell)}, expected text that is not empty or a whole number"
        )
    return str(cell)


def _same_image(first: Row, second: Row) -> bool:
    if first.read.args == second.read.args:
        return True
    try:
        return first.read() == second.read()
    except OSError:
        return False


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--image_column", help="paths or images; found by its usual names otherwise")
    parser.add_argument("--caption_column", help="text or lists of text; found by its usual names otherwise")
    parser.add_argument("--id_column", help="what identifies an image; its path or content otherwise")
    parser.add_argument("--group_column", help="images that count as the same thing")
    parser.add_argument("--validation_share", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--test_share", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--license", help="of the data; default: what the source says, or 'unknown'")
    parser.add_argument("--skip_broken", action="store_true", help="leave out missing and broken images")
    options = parse_arguments(parser, arguments)
    shares = options.validation_share, options.test_share
    if min(shares) <= 0 or sum(shares) >= 1:
        parser.error(f"--validation_share and --test_share are {shares}, expected positive and a sum below 1")
    columns = Columns(options.image_column, options.caption_column, options.id_column, options.group_column)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.output.name}-", dir=options.output.parent) as cache:
        parts = assign_splits(rows_by_split(read_source(options.source, columns, Path(cache))), *shares)
        for rows in parts.values():
            for row in rows:
                row.captions = list(dict.fromkeys(map(fold, row.captions)))
        is_on_hub = re.fullmatch(HUB_ID, options.source) and not Path(options.source).exists()
        # Of a path, only the last part is published.
        how_made = f"Made from {as_code(options.source if is_on_hub else Path(options.source).resolve().name)}."
        title = options.output.name
        license = options.license or license_of_source(options.source) or "unknown"
        build(parts, options.output, title, how_made, license, options.skip_broken, options.push_to_hub)


if __name__ == "__main__":
    main()
