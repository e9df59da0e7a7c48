"""SVG files as small pictures, drawn by resvg in a process of its own, within bounds of memory and time.

A file of a stranger may ask for other files, hold entities that unfold without end, or cost any memory. Nothing of it
is parsed in the program that asks: the child takes all references out of the file that do not point into itself, draws
it, and is started again where a file has ended it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from xml.etree import ElementTree


MAX_BYTES = 8 << 20  # of an SVG file
MEMORY = 1 << 30  # bytes of addresses that the child may have
SECONDS = 10  # for one file
OVERSAMPLING = 2  # a drawing may fill a small part of its page
MARGIN = 1 / 16  # of the side
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
TOLD = ("title", "description", "keywords")
SIZES = struct.Struct(">II")


@dataclass
class Drawing:
    """A drawing and what its file says of it; empty where it says nothing."""

    png: bytes
    title: str
    description: str
    keywords: list[str]


class SvgDrawer:
    """Draws SVG files; used as a context, at whose end the child ends.

    Args:
        side: of the square picture, in pixels.
        program: the child's command line; it speaks as [`serve`] does.

    Raises:
        ImportError: resvg is not installed.
    """

    def __init__(self, side: int, program: list[str] | None = None):
        if util.find_spec("resvg_py") is None:
            raise ImportError('resvg_py is not installed; run: pip install -e ".[clipart]"')
        # Isolated: what lies beside this file is not what its imports mean.
        self.command = program or [sys.executable, "-I", __file__, str(side)]
        self.child: subprocess.Popen | None = None

    def __enter__(self) -> SvgDrawer:
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def __call__(self, data: bytes) -> Drawing:
        """The drawing, cut to its ink, fitted and centred on white.

        Args:
            data: of the SVG file.

        Raises:
            ValueError: it is too large, no SVG, draws nothing, or takes too much memory or time.
        """
        if len(data) > MAX_BYTES:
            raise ValueError(f"its {len(data):,} bytes are more than {MAX_BYTES:,}")
        if self.child is None:
            self.child = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        try:
            self.child.stdin.write(SIZES.pack(len(data), 0) + data)
            self.child.stdin.flush()
            read = self.child.stdout.read
            about, png = SIZES.unpack(read(SIZES.size))
            told, picture = json.loads(read(about)), read(png)
        except (BrokenPipeError, struct.error, ValueError):
            self._end()
            raise ValueError(
                f"drawing it takes more than {SECONDS} s or {MEMORY >> 20} MiB, or ends the program that draws"
            ) from None
        if "error" in told:
            raise ValueError(told["error"])
        return Drawing(picture, *(told[name] for name in TOLD))

    def _end(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.kill()
            child.communicate()


def cleaned(root: ElementTree.Element) -> bytes:
    """The SVG without document type, style sheets of elsewhere and references that do not point into itself.

    Pictures of pixels inside an SVG go with their reference: what is drawn is lines and areas alone.
    """
    for element in root.iter():
        for name in [name for name in element.attrib if name.split("}")[-1] in ("href", "src", "base")]:
            if not element.attrib[name].startswith("#"):
                del element.attrib[name]
    return ElementTree.tostring(root)


def told_by(root: ElementTree.Element) -> dict[str, str | list[str]]:
    """Title, description and keywords of the drawing, as its metadata (Dublin Core) has them."""
    work = next((element for element in root.iter() if str(element.tag).endswith("}Work")), root)
    subject = work.find(f"{DUBLIN_CORE}subject")
    words = [] if subject is None else [(e.text or "").strip() for e in subject.iter() if str(e.tag).endswith("}li")]
    texts = {name: (work.findtext(DUBLIN_CORE + name) or "").strip() for name in TOLD[:2]}
    return texts | {"keywords": [word for word in words if word]}


def fitted(picture: bytes, side: int) -> bytes | None:
    """A picture file on white, cut to what is drawn, fitted into a square and centred, as PNG; None of white alone."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(picture)) as image:
        image = image.convert("RGB")
    box = ImageOps.invert(image).getbbox()
    if box is None:
        return None
    room = round(side * (1 - 2 * MARGIN))
    ink = image.crop(box)
    scale = room / max(ink.size)
    size = tuple(max(1, round(length * scale)) for length in ink.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(ink.resize(size, Image.Resampling.LANCZOS), tuple((side - length) // 2 for length in size))
    buffer = io.BytesIO()
    square.save(buffer, format="PNG")
    return buffer.getvalue()


def draw(data: bytes, side: int) -> tuple[dict, bytes]:
    """In the child: what a file says of itself, or its `error`, and the picture."""
    import resvg_py

    try:
        root = ElementTree.fromstring(data)
        if str(root.tag).split("}")[-1] != "svg":
            raise ValueError(f"its root is {str(root.tag)[:60]!r}, not svg")
        large = side * OVERSAMPLING
        # Fonts differ from machine to machine, and so would the pictures: text is not drawn.
        png = resvg_py.svg_to_bytes(
            svg_string=cleaned(root).decode(),
            width=large,
            height=large,
            background="#ffffff",
            skip_system_fonts=True,
            dpi=96,
        )
        picture = fitted(bytes(png), side)
        return (told_by(root), picture) if picture else ({"error": "it draws nothing"}, b"")
    except Exception as error:  # of a parser, resvg or Pillow
        return {"error": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]}, b""


def serve(side: int, draw: Callable[[bytes, int], tuple[dict, bytes]]) -> None:
    """In the child: reads files from stdin, `[length, 0, file]` each, and answers `[lengths, JSON, PNG]` on stdout."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS does not bound it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while header := sys.stdin.buffer.read(SIZES.size):
        data = sys.stdin.buffer.read(SIZES.unpack(header)[0])
        signal.alarm(SECONDS)  # whose signal ends the process, wherever it is
        told, picture = draw(data, side)
        signal.alarm(0)
        about = json.dumps(told).encode()
        sys.stdout.buffer.write(SIZES.pack(len(about), len(picture)) + about + picture)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), draw)
