"""Tables of a source: which columns hold what, and their cells as rows, one an image."""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from datasets_scripts.building import SPLIT_OF, Row
from rows.files import file_in, printable, read_file


IMAGE_NAMES = (
    "image img file_name filename filepath file_path path image_path img_path image_file image_name jpg jpeg png webp"
).split()
CAPTION_NAMES = "captions caption text texts txt alt_text sentences sentence".split()
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# The first that is there. Not `id`: it may count captions.
ID_NAMES = "image_id cocoid img_id imgid".split()


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


def split_of_path(path: Path | PurePosixPath) -> str | None:
    """Split that a folder's name (`val/x`) or a word in a table's or tar's (`coco-train-0001.tar`) says."""
    words = [part.lower() for part in path.parent.parts]
    if path.suffix in (*TABLE_SUFFIXES, ".tar"):
        words += re.split(r"[^a-z]+", path.stem.lower())
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)


def find_columns(names: list[str], columns: Columns, where: str) -> Columns:
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
            split = split_of_path(place) or split
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
