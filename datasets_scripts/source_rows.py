"""Tables of a source: which columns hold what, and their cells as rows, one an image."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import os
import re
import reprlib
import tokenize
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from datasets_scripts.building import Row
from datasets_scripts.split_words import SPLIT_OF, split_of_path, split_of_word
from rows.files import file_in, printable, read_file


IMAGE_NAMES = (
    "image img file_name filename filepath file_path path image_path img_path image_file image_name jpg jpeg png webp"
).split()
CAPTION_NAMES = "captions caption text texts txt alt_text sentences sentence comment".split()
# Only where none of the usual names is there, and one of these alone.
OTHER_IMAGE_NAMES = "file files picture photo".split()
OTHER_CAPTION_NAMES = "description descriptions prompt raw".split()
NUMBERED_CAPTION = re.compile(r"(captions?|text|sentence|comment)_?\d+")
# The first that is there. Not `id`: it may count captions.
ID_NAMES = "image_id cocoid img_id imgid".split()
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif")
TEXT_OF_OBJECT = ("raw", "caption", "text", "sentence")  # of a caption that is an object, such as Karpathy's
FIRST_DOWNLOAD = "download the images first, with img2dataset, and give its folder"
LONGEST_LIST = 1 << 20  # characters of a cell that is read as a Python list


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None: look for the usual names (group: `group_id`, or none).

    A caption's name may lead into objects: `sentences.raw`.
    """

    image: str | None = None
    captions: tuple[str, ...] | None = None
    id: str | None = None
    group: str | None = None  # equal for images that count as the same thing
    split_group: str | None = None  # equal for images that must only be in one split


@dataclass
class ImageFolder:
    """The folder that a table's paths are relative to, and that they must not leave.

    Args:
        root: may be a link itself; no link below it may leave it.
        by_name: look in all folders below for the last name of a path that leads nowhere: COCO's and Flickr's tables
            name files alone.
        bare_names: the same, but only for names without a folder.
    """

    root: Path
    by_name: bool = False
    bare_names: bool = False

    def find(self, name: object, below: Path = Path()) -> Path:
        """The file below the root that a cell names, whether or not it is there.

        Args:
            name: from a table, and may be anything.
            below: the table's own folder, relative to the root, where paths are relative to the table.

        Raises:
            ValueError: it is a URL, or leads out of the folder.
        """
        name = str(name) if isinstance(name, int) else name  # a number, of a file whose name is one
        if isinstance(name, str) and re.match(r"\w+://", name):
            raise ValueError(f"{name!r} is a URL: {FIRST_DOWNLOAD}")
        if isinstance(name, str) and os.path.isabs(name):
            for root in (self.root, self.root.resolve()):
                if Path(name).is_relative_to(root):
                    return file_in(self.root, str(Path(name).relative_to(root)))
        by_name = self.by_name and isinstance(name, str)
        try:
            path = file_in(self.root / below, name)
        except ValueError as error:
            if by_name and (found := self._of_name(name)) is not None:
                return found
            hint = "" if by_name else "; --images DIR names the folder that holds the images"
            raise ValueError(f"{error}{hint}") from None
        if path.exists():
            return path
        names = dict.fromkeys([name.replace("\\", "/"), name.strip()])
        variants = [unicodedata.normalize(form, text) for text in names for form in ("NFC", "NFD")]
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            variants += [text + suffix for text in variants for suffix in IMAGE_SUFFIXES]
        for variant in (*names, *variants):
            if (found := file_in(self.root / below, variant)).exists():
                return found
        if by_name or (self.bare_names and not re.search(r"[/\\]", name)):
            return self._of_name(name) or path
        return path

    def _of_name(self, name: str) -> Path | None:
        """The file below that has a path's last name, with or without the ending, and has it alone."""
        last = unicodedata.normalize("NFC", PurePosixPath(name.strip().replace("\\", "/")).name)
        found = self._by_name.get(last)
        return None if found is None else file_in(self.root, str(found.relative_to(self.root)))

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        """The files below the root by name, images also by their name without its ending; a name that occurs twice is
        left out."""
        found: dict[str, Path | None] = {}
        for parent, folders, names in os.walk(self.root):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            for name in names:
                stem, ending = os.path.splitext(name)
                for key in {name, stem} if ending.lower() in IMAGE_SUFFIXES else {name}:
                    key = unicodedata.normalize("NFC", key)
                    found[key] = None if key in found else Path(parent) / name
        return {name: path for name, path in found.items() if path is not None}


@dataclass
class Table:
    """Rows of a source before they are grouped by image.

    Args:
        name: for messages.
        columns: where things are, complete but for id and group.
        rows: dicts; the image is a path or a function that returns its bytes.
        split: of all rows that have no `split` of their own; None where the source does not say.
        images: where paths lead.
        folder: the table's own, below the images' root: paths are relative to it.
        split_by_folder: an image in a folder named train, validation or test belongs to that split.
        template: captions are names of classes, to be put into it.
    """

    name: str
    columns: Columns
    rows: Iterable[dict]
    split: str | None = None
    images: ImageFolder | None = None
    folder: Path = Path()
    split_by_folder: bool = False
    template: str | None = None


@dataclass
class Found:
    """What reading a source brought: rows by split (None: not known), and what was left out, a line each.

    Args:
        left_out: rows without an image, say.
        failed: rows that the program which made the source had marked as failed.
    """

    parts: dict[str | None, list[Row]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def rows_by_split(tables: list[Table]) -> Found:
    """Rows of tables, one an image, in order of appearance.

    Raises:
        ValueError: an id stands for two images, an image is in two groups or splits; a cell is of a wrong type.
    """
    first: dict[str, tuple[str | None, Row]] = {}
    found = Found()
    for table in tables:
        for i, cells in enumerate(tqdm(table.rows, desc=table.name, leave=False, disable=None)):
            try:
                if is_missing(cells.get(table.columns.image)):
                    which = f" ({printable(str(cells['__id__']))})" if "__id__" in cells else ""
                    found.left_out.append(f"{printable(table.name)}, row {i + 1}{which}: there is no image")
                    continue
                split, row = _row(cells, table)
                earlier_split, earlier = first.setdefault(row.image_id, (split, row))
                if earlier is row:
                    found.parts.setdefault(split, []).append(row)
                    continue
                if earlier_split != split:
                    raise ValueError(f"image {row.image_id!r} is in two splits, {earlier_split} and {split}")
                if earlier.group_id != row.group_id:
                    raise ValueError(f"image {row.image_id!r} is in two groups, {earlier.group_id} and {row.group_id}")
                if earlier.split_group != row.split_group:
                    raise ValueError(
                        f"image {row.image_id!r} is to be in one split with {earlier.split_group} and with "
                        f"{row.split_group}; expected one of them"
                    )
                if not _same_image(earlier, row):
                    raise ValueError(
                        f"the id {row.image_id!r} stands for two images; name another --id_column, such as "
                        f"{table.columns.image}"
                    )
                earlier.captions += row.captions
            except (OSError, ValueError) as error:
                raise ValueError(f"{printable(table.name)}, row {i + 1}: {error}") from None
    return found


def is_missing(cell: object) -> bool:
    """An empty cell: null, no text, or NaN, which pandas makes of either. The word None is a word."""
    return cell is None or cell in ("", "nan", "NaN") or (isinstance(cell, float) and math.isnan(cell))


def find_columns(names: list[str], columns: Columns, where: str) -> Columns:
    """The columns of a table, those that the user named and the usual ones.

    Raises:
        ValueError: one is missing, or may be one of several.
    """
    named = {"id": columns.id, "group": columns.group, "split_group": columns.split_group}
    for option, given in ((f"--{name}_column", given) for name, given in named.items()):
        if given is not None and given not in names:
            raise ValueError(f"{where} has no column {given} ({option}); it has {', '.join(names)}")
    captions = columns.captions
    if captions is None:
        numbered = tuple(name for name in names if NUMBERED_CAPTION.fullmatch(name.lower()))
        plain = tuple(name for name in names if name.lower() in CAPTION_NAMES)
        # `caption_0`, `caption_1`; or `caption`, `caption_2`, where `caption` is the first.
        are_one = len(plain) == 1 and all(re.sub(r"_?([2-9]|[1-9]\d+)$", "", name) == plain[0] for name in numbered)
        captions = (*plain, *numbered) if numbered and (not plain or are_one) else (None,)
    return Columns(
        _find_column(names, columns.image, (IMAGE_NAMES, OTHER_IMAGE_NAMES), "images", "--image_column", where),
        tuple(
            _find_column(names, name, (CAPTION_NAMES, OTHER_CAPTION_NAMES), "captions", "--caption_column", where)
            for name in captions
        ),
        columns.id or next((name for name in ID_NAMES if name in names), None),
        columns.group or ("group_id" if "group_id" in names else None),
        columns.split_group,
    )


def _find_column(
    names: list[str], given: str | None, usual: tuple[list[str], list[str]], what: str, option: str, where: str
) -> str:
    if given is not None and (given in names or given.split(".")[0] in names):
        return given
    found = [name for name in names if name.lower() in usual[0]] if given is None else []
    if not found and given is None:
        found = [name for name in names if name.lower() in usual[1]]
    if len(found) == 1:
        return found[0]
    problem = f"several columns that may hold {what}" if found else f"no column {given or f'for {what}'}"
    addresses = [name for name in names if re.search(r"(^|_)ur[li]s?$", name.lower())]
    if what == "images" and given is None and addresses and not found:
        raise ValueError(f"{where} has addresses of images, in the column {addresses[0]}: {FIRST_DOWNLOAD}")
    raise ValueError(f"{where} has {problem}; it has {', '.join(names) or 'none'}. Name one with {option}")


def _row(cells: dict, table: Table) -> tuple[str | None, Row]:
    columns = table.columns
    image = cells[columns.image]
    split, image_id = table.split, None
    if callable(image):
        read = image
        image_id = cells.get("__id__")
    else:
        file = table.images.find(image, table.folder)
        read = partial(read_file, file)
        place = file.relative_to(table.images.root)
        image_id = place.as_posix()
        if table.split_by_folder:
            split = split_of_path(place, is_table=False)[0] or split
    if not is_missing(cells.get("split")):
        split = split_of_word(str(cells["split"]))
        if split is None:
            raise ValueError(
                f"unknown split {reprlib.repr(cells['split'])}, expected {', '.join(SPLIT_OF)}; rename the column, or "
                "take no notice of it by --ignore_splits"
            )
    if columns.id is not None:
        image_id = _name(cells.get(columns.id), columns.id)
    group_id, split_group = (
        None if name is None else _name(cells.get(name), name) for name in (columns.group, columns.split_group)
    )
    captions = [text for name in columns.captions for text in captions_of(_cell(cells, name), name)]
    if table.template is not None:
        captions = [table.template.format(readable_class(name)) for name in captions]
    if image_id is None:
        # Nothing names the image but the image.
        image_id = hashlib.blake2b(read(), digest_size=8).hexdigest()
    return split, Row(image_id, captions, read, group_id, split_group=split_group)


def _cell(cells: dict, name: str) -> object:
    """A cell, or what lies in its objects: `sentences.raw`."""
    if name in cells:
        return cells[name]
    first, *rest = name.split(".")
    return _within(cells.get(first), rest)


def _within(value: object, names: list[str]) -> object:
    if not names:
        return value
    if isinstance(value, list):
        return [_within(item, names) for item in value]
    return _within(value.get(names[0]) if isinstance(value, dict) else None, names[1:])


def captions_of(cell: object, column: str) -> list[str]:
    """The captions of a cell: text, a list of texts however deep, objects with a text, or a list written as text.

    Raises:
        ValueError: it holds something else.
    """
    if is_missing(cell):
        return []
    if isinstance(cell, str):
        return _list_in(cell) or [cell]
    if isinstance(cell, (list, tuple)):
        return [caption for item in cell for caption in captions_of(item, column)]
    if isinstance(cell, dict):
        named = [name for name in TEXT_OF_OBJECT if name in cell]
        if len(named) == 1:
            return captions_of(cell[named[0]], column)
    raise ValueError(
        f"column {column} holds {reprlib.repr(cell)}, expected text or a list of texts (name what lies in an object: "
        f"--caption_column {column}.raw)"
    )


def _list_in(cell: str) -> list[str] | None:
    """A list that was written as text, by JSON, pandas or numpy (`['a cat' 'a dog']`); None for any other text."""
    if not cell.startswith("[") or len(cell) > LONGEST_LIST:
        return None
    for parse in (json.loads, _strings_of):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            captions = parse(cell)
            if isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions):
                return [text for text in captions if not is_missing(text)]
    return None


def _strings_of(cell: str) -> list[str] | None:
    """The strings of a list as Python or numpy writes it; where something else is in it, None.

    Python itself would join two strings without a comma between them.
    """
    strings = []
    for token in tokenize.generate_tokens(io.StringIO(cell).readline):
        if token.type == tokenize.STRING:
            strings.append(ast.literal_eval(token.string))
        elif token.string.strip() not in ("", "[", "]", ","):
            return None
    return strings


def readable_class(name: str) -> str:
    """The name of a class as words: `golden_retriever`, `golden-retriever` -> `golden retriever`."""
    return " ".join(re.sub(r"[_\-]+", " ", name).split())


def _name(cell, column: str) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (str, int)) or cell == "":
        raise ValueError(
            f"column {column} holds {reprlib.repr(cell)}, expected text that is not empty or a whole number"
        )
    return str(cell)


def _same_image(first: Row, second: Row) -> bool:
    def content(read: Callable[[], bytes]) -> object:
        return read.args if isinstance(read, partial) else read

    if content(first.read) == content(second.read):
        return True
    try:
        return first.read() == second.read()
    except OSError:
        return False
