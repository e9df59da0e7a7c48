"""Rows become a dataset: a folder that is whole or not there, and what cannot be used is left out and listed."""

import json
import os
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pytest
from image_files import decoded, encoded, picture
from PIL import Image

from datasets_scripts import arrow_files, building, own_data
from datasets_scripts.building import Row


def row(image_id: str, captions=("a cat",), data: bytes | None = None, group_id=None) -> Row:
    return Row(image_id, list(captions), partial(bytes, encoded(picture(0)) if data is None else data), group_id)


def build(parts, output, **settings):
    return building.build(parts, output, "Some data", "By hand.", **{"license": "mit", **settings})


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (3, 600)])
def test_small_and_long_images_go_in(tmp_path, size):
    data = encoded(Image.new("RGB", size, "red"), "PNG")
    built = build({"train": [row("a", data=data)]}, tmp_path / "data")
    assert built["train"][0]["image"].size == size


def test_a_strip_is_left_out_by_name_with_the_limit(tmp_path):
    rows = [row("a"), row("strip.png", data=encoded(Image.new("RGB", (1000, 1)), "PNG"))]
    built = build({"train": rows}, tmp_path / "data", skip_broken=True)
    assert built["train"]["image_id"] == ["a"]
    line = (tmp_path / "data.broken.txt").read_text()
    assert "strip.png" in line and "1000 x 1 pixels" in line and "1 : 200" in line


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
    assert f"31 rows are left out, all listed in {tmp_path}/data.broken.txt, 96.9 %" in capsys.readouterr().out
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


def test_few_images_are_in_memory_while_splits_are_drawn(tmp_path, monkeypatch):
    """30 pictures of 1 MB in files that keep their bytes: never more than the batches of a few."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (30, 400, 800, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(30)]
    for file, pixels in zip(files, noise):
        file.write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    size = files[0].stat().st_size
    del noise
    monkeypatch.setattr(arrow_files, "IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(arrow_files, "ROWS_AT_ONCE", 2)
    rows = [Row(str(i), [f"a {i}"], file.read_bytes) for i, file in enumerate(files)]
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    most = []
    write = arrow_files.ArrowWriter.write
    watch = lambda self, example: most.append(pa.total_allocated_bytes() - before) or write(self, example)  # noqa: E731
    monkeypatch.setattr(arrow_files.ArrowWriter, "write", watch)
    built = build({None: rows}, tmp_path / "data", shares=(0.2, 0.2))
    assert sum(part.num_rows for part in built.values()) == 30 and len(most) == 60
    assert max(most) < 12 * size


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_run_that_stopped(tmp_path, monkeypatch, error):
    def stop(self):
        raise error

    monkeypatch.setattr(arrow_files.ArrowWriter, "finalize", stop)
    with pytest.raises(error):
        build({"train": [row("a")]}, tmp_path / "deep" / "data")
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize("when", ["first pass", "second pass"])
def test_nothing_is_left_of_a_run_that_stopped_while_splits_are_drawn(tmp_path, monkeypatch, when):
    finalize, calls = arrow_files.ArrowWriter.finalize, []

    def stop(self):
        calls.append(self)
        if len(calls) == (1 if when == "first pass" else 2):
            raise OSError("disk full")
        return finalize(self)

    monkeypatch.setattr(arrow_files.ArrowWriter, "finalize", stop)
    rows = [row(str(i), data=encoded(picture(i))) for i in range(6)]
    with pytest.raises(OSError, match="disk full"):
        build({None: rows}, tmp_path / "data", shares=(0.2, 0.2))
    assert os.listdir(tmp_path) == []


def many(count: int, start: int = 0, **settings) -> list[Row]:
    return [row(f"{i}.jpg", [f"picture {i}"], encoded(picture(i)), **settings) for i in range(start, start + count)]


def test_drawn_splits_are_written_as_given_ones_are(tmp_path):
    """Of the rows of each split, in their order: the same files, byte for byte, and nothing else in the folder."""
    drawn = build({None: many(30)}, tmp_path / "drawn", shares=(0.2, 0.2))
    number = {f"{i}.jpg": i for i in range(30)}
    parts = {split: [many(1, number[name])[0] for name in part["image_id"]] for split, part in drawn.items()}
    build(parts, tmp_path / "given")

    def files(name: str) -> dict[str, bytes]:
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}

    assert files("drawn") == files("given") and "train/data-00000-of-00001.arrow" in files("drawn")
    assert sorted(name for part in drawn.values() for name in part["image_id"]) == sorted(number)
    for part in drawn.values():
        for name, image in zip(part["image_id"], part["image"]):
            assert np.array_equal(np.asarray(image), np.asarray(decoded(encoded(picture(number[name])))))
        assert [number[name] for name in part["image_id"]] == sorted(number[name] for name in part["image_id"])


def test_each_image_is_read_once(tmp_path):
    read = []
    rows = [Row(str(i), [f"a {i}"], lambda i=i: read.append(i) or encoded(picture(i))) for i in range(40)]
    build({None: rows}, tmp_path / "data", shares=(0.2, 0.2))
    assert sorted(read) == list(range(40))


BAD = [row("empty", [" \n"], encoded(picture(50))), row("none", [], encoded(picture(51))), row("cut", data=b"x")]


def bad() -> list[Row]:
    return [Row(one.image_id, one.captions, one.read) for one in BAD]


@pytest.mark.parametrize("shares", [None, (0.2, 0.2)])
def test_what_cannot_be_used_is_left_out_listed_and_counted(tmp_path, capsys, shares):
    split = "train" if shares is None else None
    skip = {"skip_broken": True, "left_out": ["row 3: the caption is empty"], "failed": ["row 9: failed_to_download"]}
    built = build({split: [*many(15), *bad()]}, tmp_path / "data", shares=shares, **skip)
    assert sum(part.num_rows for part in built.values()) == 15
    printed = capsys.readouterr().out
    # Five of twenty: the reader's, two without a caption, one broken, one failed.
    assert f"5 rows are left out, all listed in {tmp_path}/data.broken.txt, 25.0 % (1 of them failed" in printed
    assert printed.count("left out, all listed") == 1
    listed = (tmp_path / "data.broken.txt").read_text().splitlines()
    where = "train " if shares is None else ""
    assert listed[:3] == [
        "row 3: the caption is empty", f"{where}empty: it has no caption", f"{where}none: it has no caption"
    ]  # fmt: skip
    assert listed[3].startswith(f"{where}cut: UnidentifiedImageError") and listed[4] == "row 9: failed_to_download"
    assert len(listed) == 5
    card = (tmp_path / "data" / "README.md").read_text()
    assert "1 image was missing or broken" in card and "3 rows could not be used" in card


@pytest.mark.parametrize("shares", [None, (0.2, 0.2)])
def test_what_cannot_be_used_is_an_error_before_any_image_is_read(tmp_path, shares):
    read = []
    rows = [Row(str(i), ["a"], lambda: read.append(1) or encoded(picture(0))) for i in range(5)]
    with pytest.raises(
        ValueError, match=r"(?s)^2 rows cannot be used, all listed.*row 7: odd\n.*b: it.*--skip_broken"
    ):
        parts = {"train" if shares is None else None: [*rows, row("b", [""])]}
        build(parts, tmp_path / "data", shares=shares, left_out=["row 7: odd"])
    assert not read and os.listdir(tmp_path) == ["data.broken.txt"]


def test_a_list_of_hundreds_shows_the_first(tmp_path):
    with pytest.raises(ValueError, match="300 rows cannot") as caught:
        build({None: many(3)}, tmp_path / "data", shares=(0.2, 0.2), left_out=[f"row {i}: bad" for i in range(300)])
    assert "row 19: bad" in str(caught.value) and "row 20: bad" not in str(caught.value)
    assert len((tmp_path / "data.broken.txt").read_text().splitlines()) == 300


def test_failed_rows_alone_are_no_error(tmp_path, capsys):
    build({None: many(12)}, tmp_path / "data", shares=(0.2, 0.2), failed=["row 1: failed"] * 4, max_skipped=0.0)
    assert "4 rows are left out" in capsys.readouterr().out
    assert len((tmp_path / "data.broken.txt").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("broken", "left_out", "failed", "max_skipped", "stops"),
    [
        (1, 0, 0, 0.05, False),  # 1 of 20 is 5 %: at most
        (1, 0, 0, 0.049, True),
        (0, 1, 0, 0.049, True),
        (0, 1, 0, 0.05, False),
        (1, 1, 0, 0.09, True),  # 2 of 21
        (1, 1, 0, 0.1, False),
        (1, 0, 50, 0.05, False),  # failed ones count neither as left out nor as rows
        (1, 0, 50, 0.04, True),
        (19, 0, 0, None, False),
        (1, 0, 0, 0.0, True),
    ],
)
def test_the_ceiling(tmp_path, broken, left_out, failed, max_skipped, stops):
    rows = [*many(19), *(row(f"bad{i}", data=b"x") for i in range(broken))]
    lists = {"left_out": ["row: bad"] * left_out, "failed": ["row: failed"] * failed}
    settings = {"shares": (0.2, 0.2), "skip_broken": True, "max_skipped": max_skipped, **lists}
    if stops:
        with pytest.raises(ValueError, match=r"% of the rows cannot be used, expected .* % at most \(--max_skipped\)"):
            build({None: rows}, tmp_path / "data", **settings)
        assert os.listdir(tmp_path) == ["data.broken.txt"]
    else:
        assert sum(part.num_rows for part in build({None: rows}, tmp_path / "data", **settings).values()) == 19


@pytest.mark.parametrize("shares", [None, (0.2, 0.2)])
def test_where_nothing_is_left_it_is_an_error(tmp_path, shares):
    split = "train" if shares is None else None
    for rows, left_out in (([row("a", data=b"x"), row("b", [])], []), ([], ["row 1: bad"])):
        with pytest.raises(ValueError, match="no row is left"):
            build({split: rows}, tmp_path / "data", shares=shares, skip_broken=True, left_out=left_out)
    with pytest.raises(ValueError, match="no row is left"):
        build({}, tmp_path / "data", shares=shares, failed=["row 1: failed"])
    assert os.listdir(tmp_path) == ["data.broken.txt"]


def test_a_split_of_unusable_rows_alone_is_named(tmp_path):
    parts = {"train": many(5), "test": [row("x", data=b"x")]}
    with pytest.raises(ValueError, match="a split is empty .*test: 0 images"):
        build(parts, tmp_path / "data", shares=(0.2, 0.2), skip_broken=True)
    # Rows of no split that cannot be used are no reason to refuse those that have one.
    parts = {"train": many(5), "test": many(2, 5), "validation": many(2, 7), None: [row("x", [])]}
    assert build(parts, tmp_path / "data", shares=(0.2, 0.2), skip_broken=True)["test"].num_rows == 2


def test_lines_of_readers_do_not_reach_the_terminal_as_they_are(tmp_path):
    build({None: many(3)}, tmp_path / "data", shares=(0.2, 0.2), failed=["row \x1b[31m\nb\ud800"])
    assert (tmp_path / "data.broken.txt").read_text().splitlines() == ["'row \\x1b[31m\\nb\\ud800'"]


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "x", ""])
def test_max_skipped_is_a_share(tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        own_data.main(["--dataset_name", "x", "--output_dir", str(tmp_path / "out"), "--max_skipped", value])
    assert "expected a share from 0 to 1" in capsys.readouterr().err


def test_own_data_passes_the_options_on(tmp_path, capsys):
    folder = tmp_path / "source"
    for split, number in (("train", 20), ("validation", 5), ("test", 5)):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(number):  # the pictures of validation and test are training's first ones too
            (folder / split / f"{i}.png").write_bytes(encoded(picture(i + 100 * (split == "validation")), "PNG"))
            lines.append(json.dumps({"file_name": f"{i}.png", "caption": f"{split} {i}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    command = ["--dataset_name", str(folder), "--output_dir"]
    own_data.main([*command, str(tmp_path / "a")])
    assert "5 rows of train are left out (--duplicates keep would keep them)" in capsys.readouterr().out
    assert datasets.load_from_disk(tmp_path / "a")["train"].num_rows == 15
    own_data.main([*command, str(tmp_path / "b"), "--duplicates", "keep"])
    assert datasets.load_from_disk(tmp_path / "b")["train"].num_rows == 20
    (folder / "train" / "7.png").write_bytes(b"x")
    own_data.main([*command, str(tmp_path / "c"), "--skip_broken", "--max_skipped", "0.04"])  # 1 of 30
    with pytest.raises(ValueError, match="max_skipped"):
        own_data.main([*command, str(tmp_path / "d"), "--skip_broken", "--max_skipped", "0.03"])


def test_card_of_a_licence_that_the_hub_knows(tmp_path):
    built = build({"train": [row("a")]}, tmp_path / "data", license="cc-by-4.0")
    data = building.dataset_card(built, "x", "y", "cc-by-4.0").data.to_dict()
    assert data["license"] == "cc-by-4.0" and "license_details" not in data


def test_nothing_is_not_written_as_a_dataset(tmp_path):
    for parts in ({}, {"train": [], "test": []}):
        with pytest.raises(ValueError, match="there are no rows"):
            building.build(parts, tmp_path / "out", "title", "how", "mit")
    assert not list(tmp_path.iterdir())


def test_where_no_image_is_found_the_folder_is_asked_for(tmp_path):
    rows = [Row(str(i), ["x"], (tmp_path / f"{i}.jpg").read_bytes) for i in range(3)]
    with pytest.raises(ValueError, match="3 images are missing") as caught:
        build({None: rows}, tmp_path / "out", shares=(0.1, 0.1))
    assert "another folder? Name it by --images" in str(caught.value)
