"""The pictures of a site, of a folder or of a dataset: read one by one, with what may stand below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
from PIL import Image

from datasets_scripts.icon_licences import DRAWN, FONT_NOTICES, is_brand
from datasets_scripts.icons import STYLE_WORDS
from datasets_scripts.opening import open_dataset, split_of
from inference.image_files import list_images, read_image
from rows.images import load_rgb


MOST_PICTURES = 50_000  # of a site: at 512 numbers each an index of 26 MB
FIRST = 100  # pictures whose size decides how large thumbnails are


@dataclass
class Pictures:
    """The pictures of a site.

    `names`, `captions` and `groups` are of all of them; reading fills `labels` (None for none) and `kept` (numbers)
    with those that could be read, and `left_out` (name -> why) with the others. `read(number)` gives a picture in RGB
    and raises one of many types where it cannot.
    """

    names: list[str]
    captions: list[list[str]]  # empty lists for a folder's
    groups: list[str]  # pictures with the same one are right answers for each other's captions
    read: Callable[[int], Image.Image]
    label_kind: str  # names, captions or none
    notices: list[str]
    unlisted: dict[str, str] = field(default_factory=dict)  # what the folder has and could not be listed, and why
    kept: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Image.Image]:
        """The pictures that can be read, in RGB.

        Raises:
            ValueError: there is none.
        """
        self.kept, self.left_out = [], dict(self.unlisted)
        for number, name in enumerate(self.names):
            try:
                image = self.read(number)
            except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
                self.left_out[name] = str(error)
                continue
            self.kept.append(number)
            yield image
        if not self.kept:
            why = next(iter(self.left_out.values()), "there are none")
            raise ValueError(f"none of {len(self.names)} pictures can be read: {why}")

    def first_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the first pictures that can be read."""
        return [image.size for image in islice(self, FIRST)]

    @property
    def labels(self) -> list[str] | None:
        if self.label_kind == "none":
            return None
        if self.label_kind == "names":
            return [self.names[number] for number in self.kept]
        return [(self.captions[number] or [self.names[number]])[0] for number in self.kept]

    def examples(self, count: int) -> list[str]:
        """Short captions of pictures far from each other; none where captions are not shown."""
        if self.label_kind != "captions":
            return []
        plain = (label for label in self.labels if len(label.split()) == 2 and not STYLE_WORDS & set(label.split()))
        short = list(dict.fromkeys(label for label in plain if label.replace(" ", "").isalpha() and len(label) > 3))
        return short[:: max(1, len(short) // count)][:count]


def pictures_of_folder(folder: Path, label_kind: str, notices: list[str]) -> Pictures:
    """The pictures below a folder.

    Raises:
        ValueError: there is none, or there are more than a page can search.
    """
    files, skipped = list_images(folder)
    names = list(files)
    check_count(len(names), str(folder))
    return Pictures(
        names, [[] for _ in names], names, lambda number: read_image(folder / names[number]), label_kind, notices,
        unlisted=skipped,
    )  # fmt: skip


def pictures_of_dataset(dataset_name: str, split: str, label_kind: str, notices: list[str]) -> Pictures:
    """The pictures of a dataset's split; of the icons those that are no brand's sign, with the fonts' licences.

    Raises:
        ValueError: there is no such split, it has no picture, or it has more than a page can search.
    """
    rows = split_of(open_dataset(dataset_name), split, dataset_name)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    captions = rows["captions"][:]
    numbers = [i for i, image in enumerate(rows["image"]) if image is not None]
    if dataset_name == "icons":
        numbers = [i for i in numbers if not is_brand(captions[i])]
        notices = [*notices, DRAWN, *FONT_NOTICES.values()]
    check_count(len(numbers), f"{dataset_name} {split}")
    rows = rows.select(numbers)
    ids = rows["image_id"][:]
    groups = rows["group_id"][:] if "group_id" in rows.column_names else ids
    return Pictures(
        ids,
        [captions[i] for i in numbers],
        groups,
        lambda number: load_rgb(rows[number]["image"]),
        label_kind,
        notices,
    )


def check_count(count: int, where: str) -> None:
    """Refuses no pictures, and more than a page can hold."""
    if not count:
        raise ValueError(f"{where} has no pictures.")
    if count > MOST_PICTURES:
        raise ValueError(
            f"{where} has {count:,} pictures, and a page in a browser searches {MOST_PICTURES:,} at most: search them "
            "with python -m inference.search, or with a server (inference/space)."
        )
