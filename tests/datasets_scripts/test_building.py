"""RGB files, file names that are not trusted, and folders that are whole or not there."""

import os
from functools import partial

import datasets
import numpy as np
import pytest
from image_files import decoded, encoded, picture
from PIL import Image

from datasets_scripts import arrow_files, building
from datasets_scripts.building import Row


def row(image_id: str, captions=("a cat",), data: bytes | None = None, group_id=None) -> Row:
    return Row(image_id, list(captions), partial(bytes, encoded(picture(0)) if data is None else data), group_id)


def build(parts, output, **settings):
    return building.build(parts, output, "Some data", "By hand.", **{"license": "mit", **settings})


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_an_upright_rgb_file_keeps_its_bytes(file_format):
    data = encoded(picture(1), file_format)
    assert arrow_files.rgb_bytes(data) == data


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_modes_become_rgb_jpegs(mode):
    data = encoded(picture(1, mode), quality=95)
    result = decoded(arrow_files.rgb_bytes(data))
    assert (result.format, result.mode) == ("JPEG", "RGB")
    expected = np.asarray(decoded(data).convert("RGB")).astype(int)
    assert np.abs(np.asarray(result) - expected).mean() < 3
    assert expected.std() > 20


@pytest.mark.parametrize(
    ("mode", "file_format"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("RGB", "BMP")]
)
def test_other_files_become_pngs_with_the_same_pixels(mode, file_format):
    data = encoded(picture(2, mode), file_format)
    result = decoded(arrow_files.rgb_bytes(data))
    assert (result.format, result.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(result), np.asarray(decoded(data).convert("RGB")))


def test_transparent_parts_become_white():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)  # black and transparent: black on black without care
    pixels[0, 0] = (200, 100, 0, 255)
    pixels[0, 1] = (0, 0, 0, 51)
    result = np.asarray(decoded(arrow_files.rgb_bytes(encoded(Image.fromarray(pixels), "PNG"))))
    assert result[0, 0].tolist() == [200, 100, 0]
    assert result[0, 1].tolist() == [204] * 3
    assert (result[1:] == 255).all()


def test_16_bit_grey_is_scaled_not_clipped():
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    result = np.asarray(decoded(arrow_files.rgb_bytes(encoded(Image.fromarray(grey), "PNG"))))
    assert np.array_equal(result, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = orientation
    image = picture(3)
    data = encoded(image, "PNG", exif=exif)
    # What a reader of the dataset would see of the original.
    expected = datasets.Image(mode="RGB").decode_example({"bytes": data, "path": None})
    written = arrow_files.rgb_bytes(data)
    assert np.array_equal(np.asarray(decoded(written)), np.asarray(expected))
    assert decoded(written).size == (image.size if orientation < 5 else image.size[::-1])
    assert (written == data) == (orientation == 1)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(picture(0))[:300], encoded(picture(0), "PNG")[:2000]])
def test_broken_files_raise(data):
    with pytest.raises((OSError, SyntaxError, ValueError)):
        arrow_files.rgb_bytes(data)


@pytest.mark.parametrize(
    ("caption", "folded"),
    [(" a cat. \n", "a cat."), ("two\n lines\r\n", "two lines"), ("a\u2028b", "a b"), ("a  b", "a  b"), (" \n", "")],
)
def test_fold(caption, folded):
    assert building.fold(caption) == folded


def test_written_rows(tmp_path, monkeypatch):
    # A file in the working folder must not be taken for an image of the dataset.
    monkeypatch.chdir(tmp_path)
    parts = {
        "train": [row("b", ["one\n", " ", "two"]), row("a", data=encoded(picture(1), "WEBP"))],
        "test": [row("c", ["ü 猫"])],
    }
    built = build(parts, tmp_path / "data", license="other: only on Sundays")
    loaded = datasets.load_from_disk(tmp_path / "data")
    assert list(loaded) == ["train", "test"] and loaded["train"]["image_id"] == ["b", "a"]
    assert loaded["train"]["captions"][0] == ["one", "two"] and loaded["test"]["captions"][0] == ["ü 猫"]
    assert set(loaded["train"].features) == {"image", "captions", "image_id"}
    assert loaded["train"].info.license == "other: only on Sundays" and str(loaded["test"].split) == "test"
    raw = loaded["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert raw == {"bytes": encoded(picture(0)), "path": None}
    assert built["train"]._fingerprint == loaded["train"]._fingerprint
    card = (tmp_path / "data" / "README.md").read_text()
    assert "license: other" in card and "only on Sundays" in card and "| train | 2 | 3 |" in card
    assert str(tmp_path) not in card
    assert os.listdir(tmp_path) == ["data"]


def test_fingerprint_is_of_the_content(tmp_path):
    variants = {
        "same": [row("a"), row("b")],
        "again": [row("a"), row("b")],
        "order": [row("b"), row("a")],
        "caption": [row("a"), row("b", ["a dog"])],
        "image": [row("a"), row("b", data=encoded(picture(5)))],
    }
    prints = {name: build({"train": rows}, tmp_path / name)["train"]._fingerprint for name, rows in variants.items()}
    assert prints["same"] == prints["again"] and len(set(prints.values())) == 4


def test_groups_are_a_column(tmp_path):
    built = build({"train": [row("a", group_id="g"), row("b", group_id="g")]}, tmp_path / "data")
    assert built["train"]["group_id"] == ["g", "g"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": [row("a")], "test": [row("a")]}, "'a' occurs twice, in train and in test"),
        ({"train": [row("a"), row("a")]}, "'a' occurs twice"),
        ({"train": [row("a"), row("b", ["\n"])]}, "'b' of train has no caption"),
        ({"train": [row("a", ["\ud800"])]}, "'a' of train.*not Unicode"),
        ({"train": [row("a")], "test": []}, "no image is left for the split test"),
    ],
)
def test_refused(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        build(parts, tmp_path / "data")
    assert os.listdir(tmp_path) == []


def test_broken_images_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64)
    bomb = encoded(picture(0, size=(200, 100)))
    rows = [row("good"), row("bomb", data=bomb), *(row(f"bad{i}", data=b"x") for i in range(30))]
    with pytest.raises(
        ValueError, match=r"(?s)31 images.*bad0: UnidentifiedImageError: cannot identify image file\n.*--skip_broken"
    ) as caught:
        build({"train": rows}, tmp_path / "data")
    assert str(caught.value).count("bad") == 19
    assert os.listdir(tmp_path) == ["data.broken.txt"]
    listed = (tmp_path / "data.broken.txt").read_text().splitlines()
    assert len(listed) == 31 and listed[0].startswith("train bomb: DecompressionBombError")
    built = build({"train": rows}, tmp_path / "data", skip_broken=True)
    assert built["train"]["image_id"] == ["good"]
    assert "31 images were missing or broken" in (tmp_path / "data" / "README.md").read_text()
    assert "left out: 31 images" in capsys.readouterr().out
    build({"train": rows[:1]}, tmp_path / "other")
    (tmp_path / "other.broken.txt").write_text("of an earlier run")
    (tmp_path / "other").rename(tmp_path / "moved")
    build({"train": rows[:1]}, tmp_path / "other")
    assert not (tmp_path / "other.broken.txt").exists()


def test_few_images_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_files, "IMAGES_AT_ONCE", 4)
    read, most = [], []
    written = arrow_files.ArrowWriter.write

    def write(self, example):
        written(self, example)
        most.append(len(read) - len(most) - 1)

    monkeypatch.setattr(arrow_files.ArrowWriter, "write", write)
    data = encoded(picture(0))
    rows = [Row(str(i), ["a"], lambda: read.append(1) or data) for i in range(40)]
    assert build({"train": rows}, tmp_path / "data")["train"]["image_id"] == [str(i) for i in range(40)]
    assert max(most) < 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_run_that_stopped(tmp_path, monkeypatch, error):
    def stop(self):
        raise error

    monkeypatch.setattr(arrow_files.ArrowWriter, "finalize", stop)
    with pytest.raises(error):
        build({"train": [row("a")]}, tmp_path / "deep" / "data")
    assert os.listdir(tmp_path / "deep") == []


def test_card_of_a_licence_that_the_hub_knows(tmp_path):
    built = build({"train": [row("a")]}, tmp_path / "data", license="cc-by-4.0")
    data = building.dataset_card(built, "x", "y", "cc-by-4.0").data.to_dict()
    assert data["license"] == "cc-by-4.0" and "license_details" not in data


def test_nothing_is_not_written_as_a_dataset(tmp_path):
    for parts in ({}, {"train": [], "test": []}):
        with pytest.raises(ValueError, match="there are no rows"):
            building.build(parts, tmp_path / "out", "title", "how", "mit")
    assert not list(tmp_path.iterdir())
