"""A folder of images, with captions in tables, beside each image, or in the names of the folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

from datasets_scripts.samples import LONGEST_TEXT, captions_of_sample
from datasets_scripts.source_files import TEXT_SUFFIXES, suffix_of
from datasets_scripts.source_rows import IMAGE_SUFFIXES, Columns, ImageFolder, Table
from datasets_scripts.split_words import split_of_name


def list_images(folder: Path) -> list[Path]:
    """Image files below a folder, relative to it, in order; what is hidden is passed over."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(parent).relative_to(folder)
        found += [
            place / name
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return found


def tables_in(folder: Path, images: list[Path]) -> list[Path]:
    """Tables of text below a folder, without the .txt and .json files that belong to one image."""
    stems = {folder / name for image in images for name in (image, image.with_suffix(""))}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and suffix_of(path) in TEXT_SUFFIXES
        and path.with_suffix("") not in stems
        and not path.name.startswith((".", "README", "LICENSE"))
        and not path.name.endswith("_stats.json")  # of img2dataset
    )


def has_sidecars(folder: Path, images: list[Path]) -> bool:
    """Whether an image has a .txt or .json of its own name beside it."""
    beside = _sidecars(folder)
    return any(_sidecar(beside, image, suffix) for image in images for suffix in (".txt", ".json"))


def _sidecars(folder: Path) -> dict[str, Path]:
    """The .txt and .json files below a folder, by their place with the ending in small letters."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".json"):
                place = (Path(parent) / stem).relative_to(folder).as_posix()
                found[place + suffix.lower()] = Path(parent) / name
    return found


def _sidecar(beside: dict[str, Path], image: Path, suffix: str) -> Path | None:
    """The file of an image: `1.txt` or `1.jpg.txt` of `1.jpg`."""
    names = (image.with_suffix("").as_posix(), image.as_posix())
    return next((beside[name + suffix] for name in names if name + suffix in beside), None)


def table_of_sidecars(folder: Path, images: list[Path], failed: list[str]) -> Table:
    """A row for each image with the captions beside it, `1.jpg` with `1.txt` or `1.json`, as img2dataset writes files.

    Raises:
        ValueError: no image has captions; a file is too large, or no text.
    """
    rows = []
    seen = {name for image in images for name in (image, image.with_suffix(""))}
    for path in sorted(folder.rglob("*.json")):  # those without an image
        key = path.relative_to(folder).with_suffix("")
        if key not in seen and not path.name.endswith("_stats.json"):
            described = _read_json(path)
            if isinstance(described, dict) and described.get("status", "success") != "success":
                failed.append(f"{key.as_posix()}: {described['status']}")
    beside = _sidecars(folder)
    for image in images:
        described, text = None, None
        if (path := _sidecar(beside, image, ".json")) is not None:
            described = _read_json(path)
        if (path := _sidecar(beside, image, ".txt")) is not None:
            text = _read(path)
        described = described if isinstance(described, dict) else None
        rows.append({"image": image.as_posix(), "captions": captions_of_sample(described, text)})
    if not any(row["captions"] for row in rows):
        raise ValueError(f"{folder} has no captions beside its images: the .txt are empty, the .json name none")
    return Table(folder.name, Columns("image", ("captions",)), rows, images=ImageFolder(folder), split_by_folder=True)


def table_of_images(folder: Path, images: list[Path]) -> Table:
    """A row for each image, without captions."""
    rows = [{"image": image.as_posix(), "captions": []} for image in images]
    return Table(folder.name, Columns("image", ("captions",)), rows, images=ImageFolder(folder), split_by_folder=True)


def table_of_classes(folder: Path, images: list[Path], template: str | None) -> Table:
    """A row for each image with the name of its folder as the caption, put into a template.

    Raises:
        ValueError: the images lie in no folders, or there is no template.
    """
    classes = {image: next((name for name in reversed(image.parent.parts) if not split_of_name(name)), None)
               for image in images}  # fmt: skip
    names = sorted({name for name in classes.values() if name})
    if not names or None in classes.values():
        raise ValueError(
            f"{folder} has images and no captions: expected metadata.jsonl or .csv, a .txt or .json beside each "
            "image, a table such as captions.csv, or a folder for each class with --caption_template 'a photo of a {}'"
            "; "
            f"--keep_uncaptioned takes the {len(images):,} images as they are, to learn from a teacher alone"
        )
    if template is None:
        shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        raise ValueError(
            f"{folder} has no captions beside its images; the folders look like classes ({shown}): their names become "
            "captions by --caption_template 'a photo of a {}'"
        )
    rows = [{"image": image.as_posix(), "caption": classes[image]} for image in images]
    columns = Columns("image", ("caption",))
    return Table(folder.name, columns, rows, images=ImageFolder(folder), split_by_folder=True, template=template)


def _read_json(path: Path) -> object:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _read(path: Path) -> str:
    if path.stat().st_size > LONGEST_TEXT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {LONGEST_TEXT:,} at most")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as that") from None
