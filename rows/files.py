"""Files are read only from where they should be, and written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


LARGEST_FILE = 1 << 30  # bytes; images are smaller, and larger files would fill the memory


def printable(name: str) -> str:
    """A name from an untrusted file, quoted and escaped where it holds characters that a terminal would obey."""
    return name if name.isprintable() else repr(name)


def counted(count: int, one: str, many: str) -> str:
    """A number with the words that it asks for: "1 image is", "2,000 images are"."""
    return f"1 {one}" if count == 1 else f"{count:,} {many}"


def named(names: Sequence[str]) -> str:
    """The first three names, for a sentence."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more


def shown_name(source: str) -> str:
    """What a card may say of a dataset or a model: a Hub id as it is, of a local path its last part alone."""
    return Path(source).name if Path(source).exists() else source


def file_in(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that was read from a file and cannot be trusted to stay in the folder.

    Raises:
        ValueError: where the name is absolute, holds `..`, or leads out of the folder through a link.
    """
    try:
        path = folder / name
        inside = (
            name
            and not Path(name).is_absolute()
            and ".." not in Path(name).parts
            and path.resolve().is_relative_to(folder.resolve())
        )
    except (OSError, RuntimeError, TypeError, ValueError):  # a loop of links, a zero byte, not a string
        inside = False
    if not inside:
        raise ValueError(
            f"the file name {name!r} does not stay in the folder {folder}; expected a path below it, without '..' and "
            "without links that leave it (copy or mount what they lead to)"
        )
    return path


def read_file(path: Path) -> bytes:
    """The content of an ordinary file.

    Raises:
        FileNotFoundError: there is no ordinary file of this name.
        ValueError: it has more than `LARGEST_FILE` bytes.
    """
    # A pipe or a device would block or never end.
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size:,} bytes, expected {LARGEST_FILE:,} at most")
    return path.read_bytes()


def give_rights(path: Path) -> None:
    """Gives a file, or every file in a folder, the rights that the umask leaves.

    Some writers keep theirs from other users, who could then list a student and not load it: safetensors' are 0600.
    """
    umask = os.umask(0o077)  # it cannot be read without being set; meanwhile a thread's file has rather too few rights
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


@contextmanager
def write_beside(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`, and renames it to `folder` at the end; an exception deletes it.

    Raises:
        OSError: by the end `folder` exists and is not empty.
    """
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
        yield beside
        give_rights(beside)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path to write to, beside `path`, and renames that file to `path` at the end.

    So an exception or a kill leaves `path` as it was. The yielded name ends in `.part`: a writer that takes the format
    from the ending of the name must be told the format.
    """
    beside = Path(f"{path}.part")
    try:
        yield beside
        give_rights(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Writes readable JSON with sorted keys, whole."""
    with write_whole(path) as beside:
        beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
