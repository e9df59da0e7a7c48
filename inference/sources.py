"""What vectors are made of: the images of a folder or of a dataset, the lines of a file; each with an id."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from pathlib import Path

import datasets
from PIL import Image

from datasets_scripts.opening import open_dataset
from inference.image_files import SUFFIXES, list_images, read_image
from rows.images import load_rgb


class ImageFolder:
    """The images of a folder: an id is a path relative to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen, self.skipped = list_images(folder)  # path -> [size, time of change]
        self.ids, self._digests = list(self.seen), {}

    def read(self, ids: list[str], i: int) -> Image.Image:
        try:
            return read_image(self.folder / ids[i])
        except Exception as error:  # what is published must not name a folder of this machine
            raise ValueError(str(error).replace(f"{self.folder}{os.sep}", "")) from error

    def columns(self, ids: list[str]) -> dict[str, list]:
        sizes, times = zip(*(self.seen[own] for own in ids))
        return {"id": ids, "size": sizes, "mtime_ns": times, "digest": [self._digest(own) for own in ids]}

    def current(self, row: dict) -> dict | None:
        """What to store of a file in place of its row; None where its content is another, or it is gone.

        A file of another time is read once: where it has the same content, it was copied, and its new time is stored.
        """
        size, time = self.seen.get(row["id"], (None, None))
        if size != row["size"] or (time != row["mtime_ns"] and self._digest(row["id"]) != row["digest"]):
            return None
        return {**row, "mtime_ns": time}

    def _digest(self, own: str) -> str:
        if own not in self._digests:
            try:
                self._digests[own] = hashlib.blake2b((self.folder / own).read_bytes(), digest_size=16).hexdigest()
            except OSError:  # gone meanwhile
                self._digests[own] = ""
        return self._digests[own]


class ImageRows:
    """The images of a dataset's splits: an id is an `image_id`, or a split's name and a row's number."""

    def __init__(self, rows: datasets.DatasetDict, name: str):
        self.parts, self.skipped, self.where = {}, {}, {}
        for split, part in rows.items():
            if "image" not in part.column_names:
                raise ValueError(f"{name} has no column image in its {split} split (it has {part.column_names}).")
            self.parts[split] = part.cast_column("image", datasets.Image(decode=False))
            own = part["image_id"] if "image_id" in part.column_names else (f"{split}/{i}" for i in range(len(part)))
            for i, image_id in enumerate(own):
                if image_id in self.where:
                    raise ValueError(f"{name} has the image_id {image_id!r} twice: make it unique.")
                self.where[image_id] = (split, i)
        self.ids = list(self.where)

    def read(self, ids: list[str], i: int) -> Image.Image:
        split, row = self.where[ids[i]]
        image = self.parts[split][row]["image"]
        if image is None:
            raise ValueError("a row without an image")
        return load_rgb(image)

    def columns(self, ids: list[str]) -> dict[str, list]:
        return {"id": ids, "digest": [self._digest(own) for own in ids]}

    def current(self, row: dict) -> dict | None:
        """The row, where the image of its id is still the same: ids that are numbers move when a row goes."""
        return row if row["id"] in self.where and self._digest(row["id"]) == row.get("digest") else None

    def _digest(self, own: str) -> str:
        split, row = self.where[own]
        cell = self.parts[split][row]["image"] or {"bytes": b"", "path": None}
        try:
            content = Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
        except OSError:  # told by `read`
            content = b""
        return hashlib.blake2b(content, digest_size=16).hexdigest()


class TextLines:
    """The lines of a file, but for empty ones: an id is the line's number, from 1."""

    def __init__(self, file: Path):
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from error
        self.lines = {str(i): line for i, line in enumerate(lines, start=1) if line.strip()}
        self.ids, self.skipped = list(self.lines), {}

    def read(self, ids: list[str], i: int) -> str:
        return self.lines[ids[i]]

    def columns(self, ids: list[str]) -> dict[str, list]:
        return {"id": ids, "text": [self.lines[own] for own in ids]}

    def current(self, row: dict) -> dict | None:
        return row if self.lines.get(row["id"]) == row["text"] else None


def open_images(name: str) -> ImageFolder | ImageRows:
    """A folder of image files, or a dataset.

    Raises:
        NotADirectoryError, OSError, ValueError: it is neither, or there are no images in it.
    """
    folder = Path(name).expanduser()
    files = itertools.chain(folder.glob("*"), folder.glob("*/*")) if folder.is_dir() else ()
    kinds = Counter("image" if path.suffix.lower() in SUFFIXES else path.suffix for path in files)
    tables = sum(kinds[suffix] for suffix in (".parquet", ".arrow", ".tar"))
    if folder.is_dir() and (not tables or kinds["image"] > tables):  # a backup among pictures makes no dataset
        source = ImageFolder(folder.resolve())
    else:
        source = ImageRows(open_dataset(name), name)
    if not source.ids:
        raise ValueError(f"{name} holds no images.")
    return source
