"""Fonts that PyPI packages carry, their characters as pictures, and which rows belong together by a shared key."""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterable
from importlib import metadata, util
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont, ImageOps


IMAGE_SIZE = 64
MARGIN = 4


class GlyphDrawer:
    """Draws characters of one font file on white, each as large as the square's margin allows.

    Args:
        path: the font.
        colour: draw in the font's own colours, in mode RGB; else black, in mode L.
        weight: of a variable font, e.g. 400; its default where None.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path, colour: bool = False, weight: int | None = None):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; install the package that carries it again")
        self.path = path
        self.colour = colour
        self.weight = weight
        self.fonts: dict[int, ImageFont.FreeTypeFont] = {}
        # U+10FFFF is not a character, so every font answers with its sign for a missing glyph.
        self.missing = self._ink(chr(0x10FFFF), IMAGE_SIZE)

    def __call__(self, character: str) -> PILImage.Image | None:
        """The drawing, 64 x 64, or None where the font has no glyph or an empty one."""
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
        image = PILImage.new(ink.mode, (IMAGE_SIZE, IMAGE_SIZE), "white")
        image.paste(ink, ((IMAGE_SIZE - ink.width) // 2, (IMAGE_SIZE - ink.height) // 2))
        return image

    def _ink(self, character: str, size: int) -> PILImage.Image | None:
        """The character at a font size, on white, cut to what is drawn; None where nothing is."""
        if size not in self.fonts:
            # The basic layout is in every Pillow; the other one depends on a system library.
            font = ImageFont.truetype(self.path, size, layout_engine=ImageFont.Layout.BASIC)
            if self.weight is not None:
                font.set_variation_by_axes([self.weight])
            self.fonts[size] = font
        font = self.fonts[size]
        # `getbbox` counts the advance too, and a glyph centred by it is off its square's centre.
        left, top, right, bottom = font.getbbox(character)
        shape = right - left + 2 * MARGIN, bottom - top + 2 * MARGIN
        canvas = PILImage.new("RGB" if self.colour else "L", shape, "white")
        position = MARGIN - left, MARGIN - top
        ImageDraw.Draw(canvas).text(position, character, fill="black", font=font, embedded_color=self.colour)
        box = ImageOps.invert(canvas).getbbox()
        return canvas.crop(box) if box else None


def package_folder(distribution: str, version: str, module: str) -> Path:
    """Where the files of a PyPI package lie, whose own code is never run.

    Raises:
        ImportError: it is missing, of another version or without its files; says what to run.
    """
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        found = None
    spec = util.find_spec(module)
    if found != version or spec is None or not spec.submodule_search_locations:
        state = "not installed" if found is None else f"of version {found}, or without its files"
        # Pip does nothing for a package that is listed, unless forced.
        command = f"pip install --force-reinstall --no-deps {distribution}=={version}"
        raise ImportError(f"{distribution} {version} is needed and is {state}; run: {command}")
    return Path(spec.submodule_search_locations[0])


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def components(keys: list[Iterable[Hashable]], names: list[str]) -> list[str]:
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
