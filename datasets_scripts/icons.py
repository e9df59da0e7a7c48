"""Icons and their names: a real image-text dataset made offline from the six icon fonts of one PyPI package.

    python -m datasets_scripts.icons --output icons

QtAwesome ships icon fonts with charmaps `name -> code point`. Every glyph is drawn and its name becomes the caption.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Hashable, Iterable
from importlib import metadata, util
from pathlib import Path

import datasets
import PIL
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from .building import SPLITS, parse_arguments, push, write_beside


QTAWESOME_VERSION = "1.4.2"
# Font -> its files' name and version in the package. The order decides which glyph names a row.
FONTS = {
    "material_design": ("materialdesignicons6-webfont", "6.9.96"),
    "phosphor": ("phosphor", "1.3.0"),
    "remix": ("remixicon", "2.5.0"),
    "font_awesome": ("fontawesome6-solid-webfont", "6.7.2"),
    "codicons": ("codicon", "0.0.36"),
    "elusive": ("elusiveicons-webfont", "2.0"),
}
# Words that say how an icon is drawn and not what it shows. They stay in the captions and only guide the split.
STYLE_WORDS = frozenset(
    "outline outlined filled fill bold thick fat thin light line duotone solid regular sharp round rounded alt "
    "alternate variant simple small large mini s empty".split()
)
IMAGE_SIZE = 64
MARGIN = 4
FEATURES = Features(
    {
        "image": Image(),
        "captions": List(Value("string")),
        "image_id": Value("string"),
        "group_id": Value("string"),
        "font": Value("string"),
    }
)


def caption_of(name: str) -> str:
    """Caption of a charmap name: `account-arrow-left-outline` -> `account arrow left outline`."""
    return " ".join(re.split(r"[-_\s]+", name.strip("-_ ")))


def stem_of(caption: str) -> str:
    """What a caption shows: its words without style words and without a variant's number at the end.

    `chat 2 line` and `chat fill` have the stem `chat`. A caption of nothing else is its own stem.
    """
    words = [word for word in caption.split() if word not in STYLE_WORDS]
    if len(words) > 1 and re.fullmatch(r"[0-9]", words[-1]):
        words.pop()
    return " ".join(words) or caption


def build_icons() -> DatasetDict:
    """Draws the icons of the six fonts and splits them 80/10/10.

    One row per distinct drawing: glyphs with identical pixels are one row with all their names as captions. Rows that
    share a caption, directly or through other rows, share the `group_id`. Rows with the same stem (see `stem_of`) or
    the same group are in one split, so neither a test caption nor its other styles occur in training.

    Returns:
        `DatasetDict` of train, validation and test; `image` is 64 x 64, black on white, mode L.

    Raises:
        ImportError: QtAwesome is missing or of another version.
        FileNotFoundError, ValueError: a font file is missing, or a charmap is not `name -> code point`.
    """
    folder = _fonts_folder()
    rows: dict[bytes, dict] = {}
    skipped = []
    for font, (stem, version) in FONTS.items():
        font_file = folder / f"{stem}-{version}.ttf"
        charmap = _read_charmap(folder / f"{stem}-charmap-{version}.json")
        draw = _GlyphDrawer(font_file)
        for name, code_point in tqdm(charmap.items(), desc=f"icons: {font}", leave=False):
            image = draw(chr(code_point))
            if image is None:
                skipped.append(f"{font}/{code_point:x}")
                continue
            row = rows.get(pixels := image.tobytes())
            if row is None:
                row = {"image": _png(image), "captions": [], "image_id": f"{font}/{code_point:x}", "font": font}
                rows[pixels] = row
            if (caption := caption_of(name)) not in row["captions"]:
                row["captions"].append(caption)

    rows = list(rows.values())
    captions = [row["captions"] for row in rows]
    image_ids = [row["image_id"] for row in rows]
    groups = _components(captions, image_ids)
    # The group is a key too: rows of one group may have no stem in common.
    stems = [
        [("group", group), *(("stem", stem_of(caption)) for caption in row)]
        for group, row in zip(groups, captions, strict=True)
    ]
    parts: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for row, group, component in zip(rows, groups, _components(stems, image_ids), strict=True):
        parts[_split_of(component)].append({**row, "group_id": group})
    print(f"icons: {len(rows)} drawings, {len(skipped)} glyphs without a drawing left out {skipped or ''}".rstrip())
    return DatasetDict(
        {
            split: Dataset.from_dict({column: [row[column] for row in part] for column in FEATURES}, features=FEATURES)
            for split, part in parts.items()
        }
    )


def load_icons() -> DatasetDict:
    """Same as `build_icons`, built once and then read from the datasets cache (`HF_DATASETS_CACHE`).

    The cache's key changes with QtAwesome, Pillow and this file. Several processes may build at the same time.
    """
    source = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=6).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dsmd_icons"
    folder /= f"qtawesome-{QTAWESOME_VERSION}-pillow-{PIL.__version__}-{source}"
    if not folder.is_dir():
        dataset = build_icons()
        try:
            _save(dataset, folder)
        except OSError:
            # Another process was first: its result is the same and stays.
            if not folder.is_dir():
                raise
    print(f"icons: {folder}")
    return load_from_disk(folder)


def fingerprint(dataset: DatasetDict) -> str:
    """Hash of all (split, image_id, captions), whatever the order of the rows: equal for equal rows and splits."""
    rows = sorted(
        (split, image_id, list(captions))
        for split, part in dataset.items()
        for image_id, captions in zip(part["image_id"][:], part["captions"][:], strict=True)
    )
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def summary(dataset: DatasetDict) -> str:
    """Markdown table of rows, captions and groups per font and split."""
    lines = [
        "| font | " + " | ".join(f"{split}: rows / captions / groups" for split in dataset) + " |",
        "|---" * (1 + len(dataset)) + "|",
    ]
    columns = {
        split: list(zip(part["font"], part["captions"], part["group_id"], strict=True))
        for split, part in dataset.items()
    }
    for name in [*FONTS, "all"]:
        cells = [name]
        for part in columns.values():
            rows = [(captions, group) for font, captions, group in part if name in ("all", font)]
            counts = len(rows), sum(len(captions) for captions, _ in rows), len({group for _, group in rows})
            cells.append(" / ".join(f"{count:,}" for count in counts))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dataset_card(dataset: DatasetDict) -> DatasetCard:
    """The dataset's card: what it is, how it was made, its counts and the licences of the fonts."""
    data = DatasetCardData(
        language="en",
        license="other",
        license_name="licences-of-the-icon-fonts",
        pretty_name="Icons and their names",
        size_categories="10K<n<100K",
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["icons", "image-text-retrieval", "distillation"],
    )
    return DatasetCard(
        f"""---
{data.to_yaml()}
---

# Icons and their names

Drawings of {sum(part.num_rows for part in dataset.values()):,} icons ({IMAGE_SIZE} x {IMAGE_SIZE} pixels, black on
white, one channel) with their names as captions, for image-text retrieval. Every icon of six icon fonts is
here: {", ".join(f"{font} {version}" for font, (_, version) in FONTS.items())}.

## How it was made

By `datasets_scripts/icons.py`, from the font files and charmaps in the PyPI package QtAwesome {QTAWESOME_VERSION},
drawn with Pillow {PIL.__version__}. Each glyph is fitted and centred in the square; so icons that
differ in size or position only are the same drawing. Its name, split into words, is the caption.

- One row per distinct drawing: glyphs with identical pixels are one row with all their names.
- `image_id`: font and code point of the drawing's first glyph.
- `group_id`: rows that share a caption, directly or through other rows, share it; any of them is a right answer.
- Splits, about 80/10/10: rows with the same caption, the same stem (the caption without style words such as outline,
  fill, bold, thin, line) or the same group are in one split. Nothing of a test row stands in training.

{summary(dataset)}

Fingerprint of (split, image_id, captions): `{fingerprint(dataset)}`.

## Licences

The drawings are works of the fonts' authors under the fonts' own licences:

| font | licence |
|---|---|
| Material Design Icons | Apache-2.0 |
| Remix Icon | Apache-2.0 |
| Codicons | CC BY 4.0 (Microsoft) |
| Phosphor | MIT |
| Font Awesome 6 Free, solid | SIL OFL 1.1 |
| Elusive Icons | SIL OFL 1.1 |

Logos among the icons remain trademarks of their owners.
"""
    )


class _GlyphDrawer:
    """Draws characters of one font file, each as large as the square's margin allows."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; expected a font of {_requirement()}")
        self.path = path
        self.fonts: dict[int, ImageFont.FreeTypeFont] = {}
        # U+10FFFF is not a character, so every font answers with its sign for a missing glyph.
        self.missing = self._ink(chr(0x10FFFF), IMAGE_SIZE)

    def __call__(self, character: str) -> PILImage.Image | None:
        """The drawing, 64 x 64 in mode L, or None where the font has no glyph or an empty one."""
        ink = self._ink(character, IMAGE_SIZE)
        if ink is None or ink == self.missing:
            return None
        room = IMAGE_SIZE - 2 * MARGIN
        size = IMAGE_SIZE * room // max(ink.size)
        # Edges fall between pixels: a glyph small in its square was measured coarsely, any may be a pixel too large.
        ink = self._ink(character, size)
        if max(ink.size) < room - 1:
            size = size * room // max(ink.size)
            ink = self._ink(character, size)
        while max(ink.size) > room:
            size -= 1
            ink = self._ink(character, size)
        image = PILImage.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)
        image.paste(ImageOps.invert(ink), ((IMAGE_SIZE - ink.width) // 2, (IMAGE_SIZE - ink.height) // 2))
        return image

    def _ink(self, character: str, size: int) -> PILImage.Image | None:
        """The character at a font size, white on black, cut to what is drawn; None where nothing is."""
        if size not in self.fonts:
            # The basic layout is in every Pillow; the other one depends on a system library.
            self.fonts[size] = ImageFont.truetype(self.path, size, layout_engine=ImageFont.Layout.BASIC)
        font = self.fonts[size]
        # `getbbox` counts the advance too, and a glyph centred by it is off its square's centre.
        left, top, right, bottom = font.getbbox(character)
        canvas = PILImage.new("L", (right - left + 2 * MARGIN, bottom - top + 2 * MARGIN))
        ImageDraw.Draw(canvas).text((MARGIN - left, MARGIN - top), character, fill=255, font=font)
        box = canvas.getbbox()
        return canvas.crop(box) if box else None


def _requirement() -> str:
    return f"qtawesome=={QTAWESOME_VERSION}: pip install qtawesome=={QTAWESOME_VERSION}"


def _fonts_folder() -> Path:
    # `import qtawesome` would need Qt; only its files are of use here.
    try:
        version = metadata.version("qtawesome")
    except metadata.PackageNotFoundError:
        raise ImportError(f"the icon fonts are missing; install {_requirement()}") from None
    if version != QTAWESOME_VERSION:
        raise ImportError(f"qtawesome {version} has other icons; install {_requirement()}")
    spec = util.find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"qtawesome {version} is listed but its folder is missing; install again {_requirement()}")
    return Path(spec.submodule_search_locations[0]) / "fonts"


def _read_charmap(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a charmap of {_requirement()}")
    charmap = {}
    for name, code_point in json.loads(path.read_text(encoding="utf-8")).items():
        try:
            charmap[name] = int(code_point, 16)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path.name}: {name!r} has code point {code_point!r}, expected a hexadecimal number; "
                f"install again {_requirement()}"
            ) from None
    if not charmap:
        raise ValueError(f"{path} has no icons; install again {_requirement()}")
    return charmap


def _png(image: PILImage.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _components(keys: list[Iterable[Hashable]], names: list[str]) -> list[str]:
    """Connected components of rows that share a key: per row the smallest name in its component."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, row in enumerate(keys):
        for key in row:
            a, b = root(first.setdefault(key, i)), root(i)
            # The smaller name stays the root and so names the component.
            if names[b] < names[a]:
                a, b = b, a
            parent[b] = a
    return [names[root(i)] for i in range(len(keys))]


def _split_of(component: str) -> str:
    tenth = int.from_bytes(hashlib.blake2b(component.encode(), digest_size=8).digest(), "big") % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def _save(dataset: DatasetDict, folder: Path) -> None:
    with write_beside(folder) as beside:
        dataset.save_to_disk(beside)
        (beside / "README.md").write_text(str(dataset_card(dataset)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes the icons dataset from QtAwesome's icon fonts.")
    options = parse_arguments(parser, arguments)
    dataset = build_icons()
    _save(dataset, options.output)
    print(summary(dataset))
    if options.push_to_hub:
        push(dataset, dataset_card(dataset), options.push_to_hub)


if __name__ == "__main__":
    main()
