"""Every way in which rows can break the contract is named before training starts."""

import io

import datasets
import numpy as np
import pytest
from conftest import DIM, make_rows
from PIL import Image

from rows import checks
from rows.checks import check_dataset


def change(rows: datasets.Dataset, row: int, **values) -> datasets.Dataset:
    changed = [{**example, **(values if i == row else {})} for i, example in enumerate(rows)]
    return datasets.Dataset.from_list(changed, features=rows.features)


def broken_png() -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return {"bytes": buffer.getvalue()[:60], "path": None}


def test_good_rows_pass():
    check_dataset(make_rows(12), "train", DIM)
    check_dataset(make_rows(1), "train", DIM)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"captions": None}, r"Row 3 .*has captions None"),
        ({"captions": [], "image": None}, "Row 3 .*neither an image nor a caption"),
        ({"captions": []}, "Row 3 .*teacher_text_embeds for 0 captions"),
        ({"image": None}, "Row 3 .*teacher_image_embeds and no image"),
        ({"teacher_image_embeds": None}, "Row 3 .*width 0"),
        ({"captions": ["a", "  "]}, "Row 3 .*empty caption"),
        ({"image_id": ""}, "Row 3 .*image_id must be a string"),
        ({"image_id": "0/1"}, "row 1 has this image_id and other content"),
        ({"image": broken_png()}, "Row 3 .*unreadable image"),
        ({"teacher_image_embeds": [float("nan")] * DIM}, "Row 3 .*NaN"),
        ({"teacher_image_embeds": [0.0] * DIM}, "Row 3 .*zero"),
        ({"teacher_text_embeds": [[1.0] * DIM] * 9}, "Row 3 .*9 teacher_text_embeds for"),
    ],
)
def test_a_bad_row_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(change(make_rows(12), 3, **values), "train", DIM)


def test_a_bad_text_feature_is_found_behind_good_ones():
    rows = make_rows(12)
    features = np.array(rows[7]["teacher_text_embeds"])
    features[-1, 2] = np.inf
    with pytest.raises(ValueError, match="Row 7 .*teacher_text_embeds is NaN"):
        check_dataset(change(rows, 7, teacher_text_embeds=features.tolist()), "train", DIM)


def test_wrong_width_is_named_with_what_was_expected():
    with pytest.raises(ValueError, match="width 16, expected 20"):
        check_dataset(make_rows(4), "train", 20)


def test_an_id_that_comes_again_much_later_is_found(monkeypatch):
    monkeypatch.setattr(checks, "ROWS_AT_ONCE", 5)
    rows = make_rows(12)
    check_dataset(datasets.concatenate_datasets([rows, rows.select([2, 2])]), "train", DIM)  # the same content
    with pytest.raises(ValueError, match="Row 11 .*'0/2'.* row 2 has this image_id and other content"):
        check_dataset(change(rows, 11, image_id="0/2"), "train", DIM)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column image_id"):
        check_dataset(make_rows(4).remove_columns("image_id"), "train", None)
    with pytest.raises(ValueError, match="teacher features must be added"):
        check_dataset(make_rows(4).remove_columns("teacher_text_embeds"), "train", DIM)
    check_dataset(make_rows(4).remove_columns(["teacher_text_embeds", "group_id"]), "train", None)


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="empty"):
        check_dataset(make_rows(2).select([]), "validation", None)


def test_the_same_row_twice_is_no_error():
    rows = make_rows(5)
    check_dataset(datasets.concatenate_datasets([rows, rows]), "train", DIM)
