"""Samples of a webdataset: one way from a sample to a row, for tars, through `datasets` and streamed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from datasets_scripts.source_rows import (
    CAPTION_NAMES,
    ID_NAMES,
    IMAGE_SUFFIXES,
    Columns,
    Table,
    captions_of,
    find_columns,
    is_missing,
)


LONGEST_TEXT = 1 << 20  # bytes, of a .txt or .json in a tar or beside an image


def captions_of_sample(described: dict | None, text: str | None) -> list[str]:
    """The captions of a sample: a list in its .json, else the lines of its .txt, else the text in its .json.

    img2dataset writes one caption into both files; CLIP's benchmarks write a caption a line.
    """
    named = next((described[name] for name in CAPTION_NAMES if not is_missing((described or {}).get(name))), None)
    if isinstance(named, (list, tuple)):
        return captions_of(named, "of the .json")
    lines = [line.strip() for line in (text or "").splitlines()]
    return [line for line in lines if line] or captions_of(named, "of the .json")


def id_of_sample(described: dict | None, key: str, tar: PurePosixPath) -> str:
    """What identifies a sample: an id in its .json, else its tar and key, since keys may start again in every tar.

    Args:
        tar: relative to the dataset.
    """
    named = (described or {}).get(next((name for name in ID_NAMES if name in (described or {})), ""))
    return str(named) if not is_missing(named) else (tar.with_suffix("") / key).as_posix()


def row_of_sample(image: object, described: dict | None, text: str | None, key: str, tar: PurePosixPath) -> dict:
    """The cells of a sample in a [`Table`]: what its .json says, and `__image__`, `__captions__` and `__id__`."""
    return {
        **(described or {}),
        "__image__": image,
        "__captions__": captions_of_sample(described, text),
        "__id__": id_of_sample(described, key, tar),
    }


def place_of_tar(url: str, root: str) -> PurePosixPath:
    """A tar relative to its dataset: below the folder, in the Hub's repository, or its name alone."""
    if url.startswith("hf://"):
        return PurePosixPath(*PurePosixPath(url.removeprefix("hf://")).parts[3:])  # datasets/user/name@revision
    place = Path(url)
    for folder in (Path(root), Path(root).resolve()):
        if place.is_relative_to(folder):
            return PurePosixPath(place.relative_to(folder).as_posix())
    return PurePosixPath(place.name)


def table_of_tar(file: Path, place: PurePosixPath, columns: Columns, failed: list[str]) -> Table:
    """The samples of a tar, each an image with .txt or .json; the images stay in the tar until they are read.

    Args:
        place: of the tar in its dataset: names it in messages and in ids.
        failed: gets a line for each sample that img2dataset marked as failed.

    Raises:
        ValueError: the tar is broken, or no sample has captions, or a sample has two images.
    """
    try:
        samples = _samples(file, str(place), by_last_dot=False)
    except SecondImage:  # keys with dots: im.1.jpg, im.2.jpg
        samples = _samples(file, str(place), by_last_dot=True)
    rows, names = [], set()
    for key, sample in samples.items():
        described = sample.get("json")
        status = (described or {}).get("status", "success")
        if "image" not in sample and status != "success":
            failed.append(f"{place}, sample {key}: {status}")
            continue
        names |= (described or {}).keys()
        rows.append(row_of_sample(sample.get("image"), described, sample.get("txt"), key, place))
    if columns.captions is None and not any(row["__captions__"] for row in rows):
        kinds = sorted({kind for sample in samples.values() for kind in sample["files"]})
        raise ValueError(
            f"{place} has no captions: expected KEY.txt, or KEY.json with one of {', '.join(CAPTION_NAMES)}, beside "
            f"each image; the first key is {next(iter(samples), 'none')!r} and its files end in {', '.join(kinds)}"
        )
    given = replace(columns, image="__image__", captions=columns.captions or ("__captions__",))
    found = find_columns(["__image__", "__captions__", *sorted(names)], given, str(place))
    # Samples have ids of their own where none is named.
    return Table(str(place), replace(found, id=columns.id), rows)


class SecondImage(ValueError):
    """A sample has two images: its key may be meant to end at the last dot."""


def _samples(file: Path, place: str, by_last_dot: bool) -> dict[str, dict]:
    """Per key: `image`, a function that reads it; `txt`; `json`; `files`, the endings of all its files."""
    samples: dict[str, dict] = {}
    where = str(file)
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tqdm(tar, desc=place, leave=False, disable=None):
                where = f"{file}: {member.name}"
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.rpartition(".") if by_last_dot else path.name.partition(".")
                suffix = PurePosixPath(path.name.lower()).suffix
                if not member.isreg() or not stem or suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
                    if (other := samples.get((path.parent / stem).as_posix())) is not None:
                        other["files"].append(f".{ending}")  # named where captions are lacking
                    continue
                is_image = suffix in IMAGE_SUFFIXES
                if member.issparse() or (not is_image and member.size > LONGEST_TEXT):
                    raise ValueError(f"a sparse file or a text of {member.size:,} bytes, expected a plain one of less")
                sample = samples.setdefault((path.parent / stem).as_posix(), {"files": []})
                sample["files"].append(f".{ending}")
                if is_image:
                    if "image" in sample:
                        raise SecondImage("a second image of this sample, expected one; a key ends at the first dot")
                    sample["image"] = partial(_read_slice, file, member.offset_data, member.size)
                elif suffix == ".txt":
                    sample["txt"] = tar.extractfile(member).read().decode()
                else:
                    sample["json"] = json.loads(tar.extractfile(member).read())
                    if not isinstance(sample["json"], dict):
                        raise ValueError("expected an object")
    except SecondImage as error:
        raise SecondImage(f"{where}: {error}") from None
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    return samples


def _read_slice(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as tar:
        tar.seek(offset)
        return tar.read(size)


def image_names(names: list[str]) -> Iterator[str]:
    """Those of a webdataset's columns that hold images: `jpg`, `PNG`, `input.jpg`."""
    for name in names:
        if f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
            yield name
