"""The files of a site beside the page: the index, the thumbnails, their sizes, the Space's front matter."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from inference import web_runtime
from inference.web_page import UNSEEN
from model_cards.tables import as_text


SHEET = 512  # pixels: side of a file of thumbnails, at most
FIRST_SHEETS = 24  # at most so many are loaded for the results that are shown first, one for each


def write_index(embeds: np.ndarray, path: Path) -> None:
    """Writes the directions of N embeddings `[N, D]` in int8: N scales (float32), then N rows of D in [-127, 127].

    A row times its scale has length 1, and nearly the embedding's direction.
    """
    codes = np.rint(127 * embeds / np.maximum(np.abs(embeds).max(1, keepdims=True), 1e-12)).astype(np.int8)  # [N, D]
    scales = 1 / np.maximum(np.linalg.norm(codes.astype(np.float32), axis=1), 1)  # [N]
    path.write_bytes(scales.astype("<f4").tobytes() + codes.tobytes())


class Thumbnails:
    """Thumbnails side by side in square files of several, in the order in which they are added.

    Args:
        folder: exists; the files `sheet-0.webp` and so on are written there.
        tile: side of a thumbnail in pixels. A picture is fitted and centred on white, never enlarged.
    """

    def __init__(self, folder: Path, tile: int):
        self.folder, self.tile = folder, tile
        self.columns = max(1, SHEET // tile)
        self.names: list[str] = []
        self._clear()

    def add(self, image: Image.Image) -> None:
        """Adds a picture in RGB."""
        image = image.copy()
        image.thumbnail((self.tile, self.tile))
        row, column = divmod(self._filled, self.columns)
        left = column * self.tile + (self.tile - image.width) // 2
        self._sheet.paste(image, (left, row * self.tile + (self.tile - image.height) // 2))
        self._filled += 1
        if self._filled == self.columns**2:
            self.close()

    def close(self) -> None:
        """Writes what is left."""
        if self._filled:
            rows = -(-self._filled // self.columns)
            sheet = self._sheet.crop((0, 0, self.columns * self.tile, rows * self.tile))
            self.names.append(f"sheet-{len(self.names)}.webp")
            (self.folder / self.names[-1]).write_bytes(_smallest(sheet))
            self._clear()

    def _clear(self) -> None:
        side = self.columns * self.tile
        self._sheet, self._filled = Image.new("RGB", (side, side), "white"), 0


def _smallest(image: Image.Image) -> bytes:
    """The image as WebP: photos are smaller with losses, drawings often without."""
    files = []
    for settings in ({"quality": 80}, {"lossless": True}):
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", method=6, **settings)
        files.append(buffer.getvalue())
    return min(files, key=len)


def add_sizes(folder: Path, about: dict) -> dict:
    """`about` (what `data/site.json` is to hold) with the bytes that a visitor loads first, and later."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    sheets = {name: sizes[f"data/{name}"] for name in about["thumbnails"]["sheets"]}
    vision = sizes[about["student"]["vision"]["file"]]
    later = vision + sum(list(sheets.values())[FIRST_SHEETS:])
    runtime = sum(sizes[f"runtime/{name}"] for name in web_runtime.FILES)
    total = sum(size for name, size in sizes.items() if name not in UNSEEN)
    return about | {
        "runtime": {"name": f"{web_runtime.NAME} {web_runtime.VERSION}", "bytes": runtime},
        "bytes": {"first": total - later, "later": later},
    }


def space_readme(title: str, hub_id: str | None) -> str:
    """The README with which the folder is a static Space of the Hub."""
    front = {
        "title": title[:60], "emoji": "🔎", "colorFrom": "green", "colorTo": "gray", "sdk": "static",
        "app_file": "index.html", "short_description": "Search pictures by text or picture, in the browser",
        **({"models": [hub_id]} if hub_id else {}),
    }  # fmt: skip
    return f"""---
{yaml.safe_dump(front, allow_unicode=True, sort_keys=False).strip()}
---

# {as_text(title)}

Search by text, by a picture or by example, in the browser alone: a student distilled with DSMD runs there, and nothing
leaves the visitor's device. Any host of static files serves this folder; on this machine:

    python -m inference.web_open FOLDER
"""
