"""The pictures on a card."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows
from image_files import encoded, picture
from PIL import Image

import model_cards.grid
from model_cards.pictures import draw_grids, evenly, save_query, save_samples
from rows.columns import rows_and_captions


def test_evenly():
    assert evenly("abcdef", 3) == ["b", "d", "f"] and evenly("ab", 3) == ["a", "b"] and evenly("", 3) == []
    assert evenly(range(1000), 2) == [250, 750]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """What a split of 40 images is drawn as: {file: (queries, rows of cells)}, its rows and embeddings."""
    rows = make_rows(40)
    generator = torch.Generator().manual_seed(0)
    groups, caption_to_image = rows_and_captions(rows)
    image = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    noise = torch.randn(len(caption_to_image), 6, generator=generator)
    text = torch.nn.functional.normalize(image[caption_to_image] + 0.4 * noise, dim=1)
    drawn = {}
    monkeypatch.setattr(
        model_cards.grid, "result_grid", lambda queries, cells, path: drawn.update({path.name: (queries, cells)})
    )
    draw_grids(rows, image, text, tmp_path)
    return drawn, rows, image, text


def test_grids_show_what_queries_find_and_what_they_miss(drawn):
    drawn, rows, image, text = drawn
    groups, caption_to_image = rows_and_captions(rows)
    captions = sum(rows["captions"], [])
    queries, cells = drawn["text_to_image.png"]
    assert len(queries) == 4 and [row[0].right for row in cells] == [True, True, False, False]
    for query, row in zip(queries, cells):
        asked = captions.index(query)
        scores = image @ text[asked]
        found = scores.sort(descending=True).indices[:5].tolist()
        assert [cell.note for cell in row] == [f"{scores[i]:.2f}" for i in found]
        assert [cell.right for cell in row] == [bool(groups[i] == groups[caption_to_image[asked]]) for i in found]
        for i, cell in zip(found, row):
            assert np.array_equal(np.asarray(cell.content), np.asarray(rows[i]["image"]))
    queries, cells = drawn["image_to_text.png"]
    assert [row[0].right for row in cells] == [True, True, False, False]
    pictures = [np.asarray(picture) for picture in rows["image"]]
    for query, row in zip(queries, cells):
        (asked,) = [i for i, picture in enumerate(pictures) if np.array_equal(np.asarray(query), picture)]
        scores = text @ image[asked]
        found = scores.sort(descending=True).indices[:5].tolist()
        assert [cell.content for cell in row] == [captions[i] for i in found]
        assert [cell.right for cell in row] == [bool(groups[caption_to_image[i]] == groups[asked]) for i in found]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_split_smaller_than_a_row_of_results_is_drawn(tmp_path, count):
    rows = make_rows(count)
    _, caption_to_image = rows_and_captions(rows)
    image = torch.nn.functional.normalize(torch.randn(count, 6), dim=1)
    draw_grids(rows, image, image[caption_to_image], tmp_path)
    assert Image.open(tmp_path / "text_to_image.png").width > 500
    assert len(save_query(rows, tmp_path)) == min(count, 3)


def test_samples_are_small_and_leave_out_what_cannot_be_read(tmp_path):
    rows = make_rows(9)
    pictures = [{"bytes": row["image"]["bytes"]} for row in rows.cast_column("image", datasets.Image(decode=False))]
    pictures[4] = {"bytes": b"no image"}
    rows = rows.remove_columns("image").add_column("image", pictures).cast_column("image", datasets.Image())
    captions = save_samples(rows, tmp_path)
    assert captions == [rows["captions"][1], rows["captions"][7]]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sample_2.png")), np.asarray(make_rows(9)[7]["image"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample_1.png", "sample_2.png"]


@pytest.mark.parametrize("by_index", [False, True])
def test_an_equal_caption_is_framed_unless_right_answers_go_by_index(tmp_path, monkeypatch, by_index):
    """Four images of a cat: the first caption of all is the same."""
    rows = make_rows(4).remove_columns(["captions", "group_id"]).add_column("captions", [["a cat"]] * 4)
    drawn, embeds = {}, torch.eye(4)
    monkeypatch.setattr(model_cards.grid, "result_grid", lambda queries, cells, path: drawn.update({path.name: cells}))
    draw_grids(rows, embeds, embeds, tmp_path, by_index=by_index)
    for cells in drawn.values():
        expected = [True, False, False, False] if by_index else [True] * 4
        assert cells and all([cell.right for cell in row] == expected for row in cells)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_pictures_of_a_card_carry_nothing_of_the_camera(tmp_path, file_format):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Make] = "a private camera"
    exif[Image.ExifTags.Base.GPSInfo] = {1: "N", 2: (48.0, 8.0, 14.0)}
    private = {"exif": exif, "xmp": b"a private place", "icc_profile": b"a private screen"}
    data = encoded(picture(0), file_format, **private)
    assert b"private" in data
    rows = make_rows(9).remove_columns("image").add_column("image", [{"bytes": data}] * 9)
    rows = rows.cast_column("image", datasets.Image())
    save_samples(rows, tmp_path)
    save_query(rows, tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 4
    for path in paths:
        assert b"private" not in path.read_bytes() and not Image.open(path).getexif()
        assert not Image.open(path).info, path
