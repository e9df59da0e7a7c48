"""Queries and what they find, drawn as one picture."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from rows.files import write_whole


SIDE, GAP, LINE = 168, 16, 34  # pixels: side of a picture, gap between pictures, height of a caption
ABREAST = 6  # the most pictures side by side
QUERY = 220  # pixels: width of the queries' column
MARK = ("Software", "DSMD")  # in the file, which may be written over then
GROUND, TILE, INK, QUIET, EDGE, RIGHT = "#ffffff", "#f3f4f6", "#1f2933", "#5f6b7a", "#d5dae1", "#15803d"


@dataclass
class Cell:
    """A result: a picture or a caption, a note on it such as its score, and whether it is a right answer."""

    content: Image.Image | str
    note: str = ""
    right: bool = False


def result_grid(queries: list[str | Image.Image], rows: list[list[Cell]], path: str | Path) -> list[str]:
    """Draws queries, one below the other, each with its results: pictures side by side, captions as a list.

    Right answers have a coloured frame and a tick, for readers who do not see the colour.

    The font has Latin, Greek, Cyrillic, Arabic and many other letters, but no Chinese, Japanese or Korean ones and few
    emoji. A text with what it lacks would be a row of empty boxes: in its place stands which query or answer it is.

    Args:
        queries: texts or images (RGB), Q of them.
        rows: Q lists of results, best first; those of one query are all images (RGB) or all captions.
        path: the PNG file to write.

    Returns:
        The texts that are not in the picture, each after the words that stand there for it.

    Raises:
        ValueError: there are no queries, or another number of rows than of queries.
    """
    if not queries or len(queries) != len(rows):
        raise ValueError(f"{len(queries)} queries and {len(rows)} rows of results: expected one row a query.")
    queries, rows, left_out = _drawable(queries, rows)
    columns = min(ABREAST, max([3, *(len(cells) for cells in rows if not _are_captions(cells))]))
    heights = [_height(cells, columns) for cells in rows]
    has_right = any(cell.right for cells in rows for cell in cells)
    width = GAP + QUERY + GAP + columns * (SIDE + GAP)
    page = Image.new("RGB", (width, GAP + sum(heights) + LINE * has_right), GROUND)
    draw = ImageDraw.Draw(page)
    top = GAP
    for query, cells, height in zip(queries, rows, heights):
        _draw_query(page, draw, query, top)
        for i, cell in enumerate(cells):
            left = GAP + QUERY + GAP
            if isinstance(cell.content, str):
                _draw_caption(draw, cell, (left, top + i * LINE, width - GAP, top + (i + 1) * LINE - 6))
            else:
                line, column = divmod(i, columns)
                _draw_picture(page, draw, cell, left + column * (SIDE + GAP), top + line * (SIDE + LINE + GAP))
        top += height
    if has_right:
        draw.text((GAP, top), "✓ framed: a right answer", RIGHT, _font(13))
    mark = PngInfo()
    mark.add_text(*MARK)
    with write_whole(path) as beside:
        page.save(beside, format="PNG", optimize=True, pnginfo=mark)
    return left_out


def _drawable(queries: list, rows: list[list[Cell]]) -> tuple[list, list[list[Cell]], list[str]]:
    """Queries and results with what can be drawn in place of texts that cannot, and those texts."""
    left_out, new_queries, new_rows = [], [], []

    def stand_in(text: str, words: str, bold: bool = False) -> str:
        if _can_draw(text, bold):
            return text
        left_out.append(f"{words}: {text}")
        return words

    for q, (query, cells) in enumerate(zip(queries, rows), 1):
        new_queries.append(stand_in(query, f"query {q}", bold=True) if isinstance(query, str) else query)
        new_rows.append([])
        for i, cell in enumerate(cells, 1):
            content, number = cell.content, f"no. {i}"
            if isinstance(content, str):
                content = stand_in(content, f"answer {i} of query {q}")
            note = re.sub(r"\S+", lambda word, number=number: word[0] if _can_draw(word[0]) else number, cell.note)
            left_out += [f"{number} of query {q}: {cell.note}"] * (note != cell.note)
            new_rows[-1].append(Cell(content, note, cell.right))
    return new_queries, new_rows, left_out


def _can_draw(text: str, bold: bool = False) -> bool:
    return all(char.isspace() or ord(char) in _letters(bold) for char in text)


@functools.cache
def _letters(bold: bool) -> frozenset[int]:
    return frozenset(FT2Font(_font_file(bold)).get_charmap())


def check_replaceable(path: Path) -> None:
    """Refuses to write a picture of results over anything else.

    Raises:
        ValueError: the file exists, and is no picture that [`result_grid`] drew.
    """
    if not path.exists():
        return
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            ours = picture.info.get(MARK[0]) == MARK[1]
    except Exception:  # Pillow raises many types on broken files
        ours = False
    if not ours:
        raise ValueError(f"{path} exists and is no picture of results: name another file.")


def _are_captions(cells: list[Cell]) -> bool:
    return bool(cells) and isinstance(cells[0].content, str)


def _height(cells: list[Cell], columns: int) -> int:
    if _are_captions(cells):
        return max(SIDE, LINE * len(cells)) + GAP
    return (SIDE + LINE + GAP) * max(1, math.ceil(len(cells) / columns))


def _draw_query(page: Image.Image, draw: ImageDraw.ImageDraw, query: str | Image.Image, top: int) -> None:
    if isinstance(query, str):
        lines = _wrap(query, _font(17, bold=True), QUERY, most=6)
        draw.multiline_text((GAP, top + 6), "\n".join(lines), INK, _font(17, bold=True), spacing=6)
    else:
        _paste(page, query, GAP, top)
        draw.rounded_rectangle((GAP, top, GAP + SIDE, top + SIDE), 6, outline=EDGE)


def _draw_picture(page: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    box = (left, top, left + SIDE, top + SIDE)
    _paste(page, cell.content, left, top)
    draw.rounded_rectangle(box, 6, outline=RIGHT if cell.right else EDGE, width=4 if cell.right else 1)
    note = _wrap(("✓ " if cell.right else "") + cell.note, _font(13), SIDE, most=1)
    draw.text((left + 2, top + SIDE + 5), "".join(note), RIGHT if cell.right else QUIET, _font(13))


def _draw_caption(draw: ImageDraw.ImageDraw, cell: Cell, box: tuple[int, int, int, int]) -> None:
    color = RIGHT if cell.right else EDGE
    draw.rounded_rectangle(box, 6, fill=TILE, outline=color, width=3 if cell.right else 1)
    middle = (box[1] + box[3]) // 2
    note = ("✓ " if cell.right else "") + cell.note
    draw.text((box[0] + 10, middle), note, RIGHT if cell.right else QUIET, _font(13), anchor="lm")
    start = box[0] + 20 + max(_font(13).getlength(note), 60 if cell.note else 0)
    caption = "".join(_wrap(cell.content, _font(15), box[2] - 10 - start, most=1))
    draw.text((start, middle), caption, INK, _font(15), anchor="lm")


def _paste(page: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """The whole image in a square of SIDE with a small margin."""
    fitted = ImageOps.contain(image, (SIDE - 16, SIDE - 16), Image.Resampling.LANCZOS)
    page.paste(fitted, (left + (SIDE - fitted.width) // 2, top + (SIDE - fitted.height) // 2))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """The text in at most `most` lines of at most `width` pixels, broken between words; the last is cut to fit."""
    lines = [""]
    for word in text[:2000].split():  # more never fits, and measuring a caption of any length would take long
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines[most - 1 :] = [" ".join(lines[most - 1 :])]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    line = line[:500]  # more never fits, as in `_wrap`
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has most alphabets."""
    return ImageFont.truetype(_font_file(bold), size)


def _font_file(bold: bool) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))
