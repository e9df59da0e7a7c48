"""Icons and their names: a real image-text dataset made offline from the six icon fonts of one PyPI package.

    python -m datasets_scripts.icons --output_dir icons

QtAwesome ships icon fonts with charmaps `name -> code point`. Every glyph is drawn and its name becomes the caption.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import datasets
import PIL
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from rows.command_line import Command, run_program
from rows.files import write_beside

from . import glyphs
from .building import parse_arguments, push
from .glyphs import IMAGE_SIZE, GlyphDrawer, components, package_folder, png
from .splits import SPLITS


QTAWESOME_VERSION = "1.4.2"
REQUIREMENT = f"qtawesome=={QTAWESOME_VERSION}"
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
        draw = GlyphDrawer(font_file)
        for name, code_point in tqdm(charmap.items(), desc=f"icons: {font}", leave=False):
            image = draw(chr(code_point))
            if image is None:
                skipped.append(f"{font}/{code_point:x}")
                continue
            row = rows.get(pixels := image.tobytes())
            if row is None:
                row = {
                    "image": {"bytes": png(image), "path": None},
                    "captions": [],
                    "image_id": f"{font}/{code_point:x}",
                    "font": font,
                }
                rows[pixels] = row
            if (caption := caption_of(name)) not in row["captions"]:
                row["captions"].append(caption)

    rows = list(rows.values())
    captions = [row["captions"] for row in rows]
    image_ids = [row["image_id"] for row in rows]
    groups = components(captions, image_ids)
    # The group is a key too: rows of one group may have no stem in common.
    stems = [
        [("group", group), *(("stem", stem_of(caption)) for caption in row)]
        for group, row in zip(groups, captions, strict=True)
    ]
    parts: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for row, group, component in zip(rows, groups, components(stems, image_ids), strict=True):
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

    The cache's key changes with QtAwesome, Pillow, this file and `glyphs.py`. Several processes may build at once.
    """
    sources = b"".join(Path(file).read_bytes() for file in (__file__, glyphs.__file__))
    source = hashlib.blake2b(sources, digest_size=6).hexdigest()
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


def icons_fingerprint(dataset: DatasetDict) -> str:
    """Hash of all (split, image_id, captions), whatever the order of the rows: equal for equal rows and splits."""
    rows = sorted(
        (split, image_id, list(captions))
        for split, part in dataset.items()
        for image_id, captions in zip(part["image_id"][:], part["captions"][:], strict=True)
    )
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def icons_table(dataset: DatasetDict) -> str:
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


def icons_card(dataset: DatasetDict) -> DatasetCard:
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

{icons_table(dataset)}

Fingerprint of (split, image_id, captions): `{icons_fingerprint(dataset)}`.

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


def _fonts_folder() -> Path:
    return package_folder("qtawesome", QTAWESOME_VERSION, "qtawesome") / "fonts"


def _read_charmap(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a charmap of {REQUIREMENT}")
    charmap = {}
    for name, code_point in json.loads(path.read_text(encoding="utf-8")).items():
        try:
            charmap[name] = int(code_point, 16)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path.name}: {name!r} has code point {code_point!r}, expected a hexadecimal number; "
                f"install again {REQUIREMENT}"
            ) from None
    if not charmap:
        raise ValueError(f"{path} has no icons; install again {REQUIREMENT}")
    return charmap


def _split_of(component: str) -> str:
    tenth = int.from_bytes(hashlib.blake2b(component.encode(), digest_size=8).digest(), "big") % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def _save(dataset: DatasetDict, folder: Path) -> None:
    with write_beside(folder) as beside:
        dataset.save_to_disk(beside)
        (beside / "README.md").write_text(str(icons_card(dataset)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = Command("datasets_scripts.icons", __doc__)
    options = parse_arguments(parser, arguments)
    dataset = build_icons()
    _save(dataset, options.output_dir)
    print(icons_table(dataset))
    if options.push_to_hub:
        push(dataset, icons_card(dataset), options.push_to_hub)


if __name__ == "__main__":
    run_program(main)
