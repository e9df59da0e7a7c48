"""A picture of queries and what they found."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from model_cards.grid import Cell, result_grid


GREEN = (21, 128, 61)


def count_of(color, image: Image.Image, box=None) -> int:
    return int((np.asarray(image.crop(box) if box else image) == color).all(axis=2).sum())


def test_grid_frames_right_answers_only(tmp_path):
    shades = [Image.new("RGB", (64, 64), (200, 10 + i, 10)) for i in range(8)]
    rows = [
        [Cell(shade, f"0.{9 - i}", right=i in (2, 7)) for i, shade in enumerate(shades)],
        [Cell("a red square " * 40, "0.4"), Cell("$x$ ü 猫", "0.3", right=True)],
        [],
    ]
    queries = ["red " * 50, Image.new("RGB", (300, 20), (1, 2, 3)), "nothing is found"]
    result_grid(queries, rows, tmp_path / "grid.png")
    page = Image.open(tmp_path / "grid.png").convert("RGB")
    for i, shade in enumerate(shades):
        drawn = np.argwhere((np.asarray(page) == shade.getpixel((0, 0))).all(axis=2))
        (top, left), (bottom, right) = drawn.min(axis=0), drawn.max(axis=0)
        assert bottom - top == right - left >= 100  # nothing cut, nothing stretched
        frame = count_of(GREEN, page, (left - 12, top - 12, right + 12, bottom + 12))
        assert (frame > 1000) == (i in (2, 7))
    wide = np.argwhere((np.asarray(page) == (1, 2, 3)).all(axis=2))
    height, width = wide.max(axis=0) - wide.min(axis=0) + 1
    assert width / height == pytest.approx(15, rel=0.1)
    result_grid(queries, [[Cell(cell.content, cell.note) for cell in row] for row in rows], tmp_path / "plain.png")
    assert count_of(GREEN, Image.open(tmp_path / "plain.png")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "plain.png"]


@pytest.mark.parametrize("queries, rows", [([], []), (["a"], []), (["a"], [[], []])])
def test_grid_refuses_unequal_numbers(queries, rows, tmp_path):
    with pytest.raises(ValueError, match="one row a query"):
        result_grid(queries, rows, tmp_path / "grid.png")


def page_of(folder, query: str, cells: list[Cell]) -> tuple[np.ndarray, list[str]]:
    left_out = result_grid([query], [cells], folder / "grid.png")
    return np.asarray(Image.open(folder / "grid.png").convert("RGB")), left_out


@pytest.mark.parametrize(
    "text",
    ["猫", "かわいい猫", "고양이", "a cat 🐈", "🏳️‍🌈", "แมว", "बिल्ली", "\udce9.png", "\x07bell", "\U0010ffff", "a\0b"],
)
def test_what_the_font_lacks_is_named_beside_the_picture_and_not_drawn(tmp_path, text):
    shade = Image.new("RGB", (64, 64), "red")
    drawn, left_out = page_of(tmp_path, text, [Cell(shade, f"0.912  {text}"), Cell(shade, "0.5  b.png")])
    assert left_out == [f"query 1: {text}", f"no. 1 of query 1: 0.912  {text}"]
    words = [word if all(char in "a catb" for char in word) else "no. 1" for word in text.split()]
    expected, nothing = page_of(
        tmp_path, "query 1", [Cell(shade, f"0.912  {' '.join(words)}"), Cell(shade, "0.5  b.png")]
    )
    assert nothing == [] and np.array_equal(drawn, expected)  # no box for a letter that is not there
    drawn, left_out = page_of(tmp_path, "a query", [Cell(text, "0.9"), Cell("a dog", "0.8")])
    assert left_out == [f"answer 1 of query 1: {text}"]
    expected, nothing = page_of(tmp_path, "a query", [Cell("answer 1 of query 1", "0.9"), Cell("a dog", "0.8")])
    assert nothing == [] and np.array_equal(drawn, expected)


@pytest.mark.parametrize("text", ["a cat", "größer, plus âgé", "кошка", "γάτα", "قطة", "חתול", "✓ ♥ 3 × 4 µm", "mèo"])
def test_what_the_font_has_is_drawn(tmp_path, text):
    """Letter by letter: none is the box that stands for what a font lacks."""
    _, left_out = page_of(tmp_path, text, [Cell(text, "0.9")])
    assert left_out == []
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
    names = set(TTFont(path).getBestCmap())
    assert all(char == " " or ord(char) in names for char in text)
