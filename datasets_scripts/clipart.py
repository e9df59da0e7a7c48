"""Clip art and what it is called: a real image-text dataset made offline from one Debian package.

    apt-get install openclipart-svg && pip install -e ".[clipart]"
    python -m datasets_scripts.clipart --output_dir data/clipart

Where there is no apt, unpack openclipart-svg_0.18+dfsg-19_all.deb of a Debian mirror (pool/main/o/openclipart), which
is an `ar` archive, and name its folder by --folder.
"""

from __future__ import annotations

import functools
import hashlib
import html
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from tqdm.auto import tqdm

from rows.command_line import Command, run_program

from .building import Row, build, parse_arguments
from .glyphs import components
from .svg_drawing import Drawing, SvgDrawer


FOLDER = Path("/usr/share/openclipart/svg")
SIDE = 128
SHARES = (0.1, 0.1)  # of validation and test
# Squared distance of two pictures of 32 x 32 pixels, within which they look the same: a share of the fainter one's own
# distance from white, without which all thin outlines would look the same.
ALIKE = 0.01
COMPARED = 32
STAR = re.compile(r"star_\d+pt\d+step")  # 1,375 of one generator
STARS_KEPT = 20
LONGEST = 200  # characters of a caption
ANOTHERS = 3  # drawings that share a description or their keywords: more, and it is their collection's
TITLE = "Clip art and what it is called"
LICENSE = "public domain (Creative Commons Public Domain Dedication)"
HOW_MADE = f"""By `datasets_scripts/clipart.py`, from the SVG files of Debian's package openclipart-svg 0.18 (Open Clip
Art Library, public domain).

- A drawing is fitted and centred in {SIDE} x {SIDE} pixels, on white; text and pictures of pixels in it are not drawn.
- Captions: the title, or where it is a collection's, the file's name and folder; the description and the keywords
  where they are the drawing's own.
- Of the stars that one generator made, {STARS_KEPT} are kept.
- `group_id`: drawings that look the same. Drawings that look the same or have the same name are in one split."""


@dataclass
class Art:
    """A drawing with what is said of it; `name` is its path below the folder, without `.svg`."""

    name: str
    drawing: Drawing


def words_of(text: str) -> str:
    """A name of a file or folder, or a title, in words: `left-arrow_02` -> `left arrow 02`."""
    return " ".join(re.sub(r"[-_,;:()/\\\s]+", " ", html.unescape(html.unescape(text))).split())


def own_title(art: Art) -> str | None:
    """The title, where it is the drawing's and not its collection's: half its words are in the file's name."""
    title = words_of(re.sub(r"^Clipart by .{1,40}? - ", "", art.drawing.title))
    name = words_of(art.name.rpartition("/")[2]).lower()
    words = title.lower().split()
    if not words or 2 * sum(word in name for word in words) < len(words):
        return None
    return title


def name_of(art: Art) -> str:
    """What a drawing is called: by its title, else by its file and folder."""
    folder, _, file = art.name.rpartition("/")
    return own_title(art) or f"{words_of(file)} {words_of(folder.rpartition('/')[2])}".strip()


def captions_of(arts: list[Art]) -> list[list[str]]:
    """For each drawing its name, then its description and its keywords where no more than three drawings have them."""
    said = []
    for art in arts:
        description = " ".join(html.unescape(art.drawing.description).split())
        keywords = [words_of(word) for word in art.drawing.keywords if not word.lower().startswith("hash")]
        said.append([description, " ".join(dict.fromkeys(filter(None, keywords)))])
    counts = Counter(text for texts in said for text in set(texts))
    captions = []
    for art, texts in zip(arts, said):
        own = {}
        for text in (name_of(art), *(text for text in texts if counts[text] <= ANOTHERS)):
            if text and len(text) <= LONGEST and not re.search(r"@|://|www\.|HASH\(", text):
                own.setdefault(text.lower(), text)
        captions.append(list(own.values()) or [words_of(art.name)])
    return captions


def key_of_name(name: str) -> str:
    """Equal for names that differ in case, numbers at the end and what stands in brackets."""
    words = re.sub(r"\([^)]*\)", " ", name.lower())
    return re.sub(r"[\W_]*\d*$", "", " ".join(words.split())) or name.lower()


def looking_alike(pictures: Iterable[bytes]) -> list[list[int]]:
    """For each picture the pairs that it is in: a number for each pair of pictures that look the same.

    Args:
        pictures: files of one size.
    """
    pixels = []
    for picture in pictures:
        with PILImage.open(io.BytesIO(picture)) as image:
            small = image.convert("RGB").resize((COMPARED, COMPARED), PILImage.Resampling.BOX)
        pixels.append(1 - np.asarray(small, np.float32).ravel() / 255)
    pixels = np.stack(pixels)  # the distance from white, [N, 32 * 32 * 3]
    squares = (pixels**2).sum(axis=1)
    pairs: list[list[int]] = [[] for _ in pixels]
    number = 0
    for start in range(0, len(pixels), 512):
        block = slice(start, start + 512)
        distances = squares[block, None] + squares[None] - 2 * pixels[block] @ pixels.T
        for i, j in np.argwhere(distances < ALIKE * np.minimum(squares[block, None], squares[None])):
            if start + i < j:
                for one in (start + i, j):
                    pairs[one].append(number)
                number += 1
    return pairs


def read_folder(folder: Path) -> tuple[list[Art], list[str]]:
    """The drawings below a folder, by name, of the generated stars a few; and a line for each that cannot be drawn.

    Links are not followed.

    Raises:
        FileNotFoundError: there is no such folder, or no SVG in it.
        ImportError: resvg is not installed.
    """
    files = sorted(file for file in folder.rglob("*.svg") if file.is_file() and not file.is_symlink())
    if not files:
        raise FileNotFoundError(
            f"{folder} has no SVG files; run `apt-get install openclipart-svg`, or name the folder that has them by "
            "--folder"
        )
    names = {file: file.relative_to(folder).with_suffix("").as_posix() for file in files}
    stars = [file for file in files if STAR.fullmatch(file.stem)]
    stars.sort(key=lambda file: hashlib.blake2b(names[file].encode(), digest_size=8).digest())
    passed_over = set(stars[STARS_KEPT:])
    arts, failed = [], []
    with SvgDrawer(SIDE) as draw:
        for file in tqdm([file for file in files if file not in passed_over], desc="clip art", disable=None):
            try:
                arts.append(Art(names[file], draw(file.read_bytes())))
            except ValueError as error:
                failed.append(f"{names[file]}: {error}")
    print(f"{len(files):,} files: {len(passed_over):,} generated stars passed over, {len(failed):,} cannot be drawn")
    return arts, failed


def rows_of(arts: list[Art]) -> list[Row]:
    """A row for each drawing, those that look the same in one group, and those of one name kept in one split."""
    ids = [art.name for art in arts]
    captions = captions_of(arts)
    groups = components(looking_alike(art.drawing.png for art in arts), ids)
    keys = [{key_of_name(text) for text in texts} for texts in captions]
    kept_together = components(keys, ids)
    sizes = defaultdict(int)
    for group in groups:
        sizes[group] += 1
    print(f"{sum(size for size in sizes.values() if size > 1):,} drawings look like another")
    return [
        Row(art.name, texts, functools.partial(bytes, art.drawing.png), group, split_group=name)
        for art, texts, group, name in zip(arts, captions, groups, kept_together)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = Command("datasets_scripts.clipart", __doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"Folder of SVG files (default: {FOLDER}).")
    options = parse_arguments(parser, arguments)
    arts, failed = read_folder(options.folder)
    build(
        {None: rows_of(arts)},
        options.output_dir,
        title=TITLE,
        how_made=HOW_MADE,
        license=LICENSE,
        repo_id=options.push_to_hub,
        shares=SHARES,
        failed=failed,
    )


if __name__ == "__main__":
    run_program(main)
