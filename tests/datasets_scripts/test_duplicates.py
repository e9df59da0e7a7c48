"""One picture under several names never is in two splits, and one caption of many pictures is said."""

import itertools
import json
import random
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_files import decoded, encoded, picture
from PIL import Image

from datasets_scripts import building, karpathy, own_data
from datasets_scripts.arrow_files import Row
from datasets_scripts.duplicates import join_groups
from rows.checks import check_dataset


def row(image_id: str, seed: int, captions=None, group_id=None, data: bytes | None = None) -> Row:
    """The picture of `seed`, in a file of its own where `data` is not given."""
    data = encoded(picture(seed, size=(12, 8)), "PNG") if data is None else data
    return Row(image_id, captions or [f"a {image_id}"], partial(bytes, data), group_id)


def build(parts, output: Path, shares=(0.2, 0.2), **settings) -> datasets.DatasetDict:
    built = building.build(parts, output, "Some data", "By hand.", "mit", shares=shares, **settings)
    for split, part in built.items():
        check_dataset(part, split, None)
    return built


def pixels(part: datasets.Dataset) -> list[tuple]:
    """Of each row, as any reader of the dataset sees them."""
    images = [np.asarray(image.convert("RGB")) for image in part["image"]]
    return [(image.shape, image.tobytes()) for image in images]


def leaks(built: datasets.DatasetDict) -> int:
    """Pairs of rows with equal pixels in two splits, by comparing all."""
    parts = [pixels(part) for part in built.values()]
    return sum(a == b for one, other in itertools.combinations(parts, 2) for a in one for b in other)


def write_source(folder: Path, names: dict[str, bytes], captions=None) -> Path:
    lines = []
    for name, data in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        lines.append(json.dumps({"file_name": name, "caption": captions or f"a {name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_the_same_picture_under_two_names_is_in_one_split(tmp_path, capsys):
    files = {f"{side}{i}.png": encoded(picture(i, size=(12, 8)), "PNG") for i in range(40) for side in "ab"}
    source = write_source(tmp_path / "source", files)
    own_data.main(["--dataset_name", str(source), "--output_dir", str(tmp_path / "out")])
    built = datasets.load_from_disk(tmp_path / "out")
    assert leaks(built) == 0 and all(part.num_rows for part in built.values())
    rows = [one for part in built.values() for one in part.remove_columns("image")]
    assert sorted(one["image_id"] for one in rows) == sorted(files)
    assert all(one["captions"] == [f"a {one['image_id']}"] for one in rows)
    # a3 and b3, and no third.
    groups = {one["image_id"]: one["group_id"] for one in rows}
    for first, second in itertools.combinations(files, 2):
        assert (groups[first] == groups[second]) == (first[1:] == second[1:])
    printed = capsys.readouterr().out
    assert "40 pictures are there under several names: they share a group_id and a split\n" in printed


@pytest.mark.parametrize("seed", range(5))
def test_no_picture_is_in_two_splits_whatever_is_repeated(tmp_path, seed):
    """Pictures drawn from few, in several formats, some in groups of the source's: against comparing all pairs."""
    rng = random.Random(seed)
    formats = [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})]
    rows, of = [], {}
    for i in range(60):
        number = rng.randrange(50 if seed % 2 else 35)
        name, settings = rng.choice(formats)
        of[f"{i}"] = number
        group = f"g{rng.randrange(90)}" if seed % 2 else None
        rows.append(row(f"{i}", number, group_id=group, data=encoded(picture(number, size=(12, 8)), name, **settings)))
    given = {one.image_id: one.group_id for one in rows}
    built = build({None: rows}, tmp_path / "data")
    assert leaks(built) == 0
    assert sorted(one for part in built.values() for one in part["image_id"]) == sorted(of)
    groups = {name: group for part in built.values() for name, group in zip(part["image_id"], part["group_id"])}
    # Transitive closure by repetition: the smallest number that a row can reach.
    label = {name: i for i, name in enumerate(of)}
    for _ in of:
        for a, b in itertools.combinations(of, 2):
            if of[a] == of[b] or (given[a] is not None and given[a] == given[b]):
                label[a] = label[b] = min(label[a], label[b])
    for a, b in itertools.combinations(of, 2):
        assert (groups[a] == groups[b]) == (label[a] == label[b])
    assert not any(
        set(one["group_id"]) & set(two["group_id"]) for one, two in itertools.combinations(built.values(), 2)
    )


def test_the_order_of_rows_changes_neither_groups_nor_splits(tmp_path):
    def rows():
        return [row(f"{side}{i}", i) for i in range(15) for side in "ab"]

    one = build({None: rows()}, tmp_path / "one")
    other = build({None: rows()[::-1]}, tmp_path / "other")
    for split in one:
        assert one[split]["image_id"] == other[split]["image_id"][::-1]
        assert one[split]["group_id"] == other[split]["group_id"][::-1]


def test_what_is_equal():
    """A turned photo is its upright copy; transparency shows white; one pixel, or the shape, makes another picture."""
    red, exif = Image.new("RGB", (4, 2), "red"), Image.Exif()
    red.putpixel((0, 0), (0, 0, 255))
    exif[Image.ExifTags.Base.Orientation] = 6
    turned = Image.fromarray(np.rot90(np.asarray(red)))  # orientation 6 turns it back
    pale = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    alike = {
        "png": encoded(red, "PNG"),
        "bmp": encoded(red, "BMP"),
        "turned": encoded(turned, "PNG", exif=exif),
        "with text": encoded(red, "PNG", dpi=(72, 72)),
        "palette": encoded(red.quantize(8), "PNG"),
    }
    others = {
        "mirrored": encoded(Image.fromarray(np.asarray(red)[:, ::-1].copy()), "PNG"),
        "white": encoded(Image.new("RGB", (4, 2), "white"), "PNG"),
        "other shape": encoded(Image.new("RGB", (2, 4), "white"), "PNG"),
        "8 x 1": encoded(Image.new("RGB", (8, 1), "white"), "PNG"),
        "nearly white": encoded(Image.new("RGB", (4, 2), (255, 255, 254)), "PNG"),
    }
    from datasets_scripts.arrow_files import rgb_file

    assert len({rgb_file(data)[1] for data in alike.values()}) == 1
    assert len({rgb_file(data)[1] for data in [alike["png"], *others.values()]}) == 1 + len(others)
    assert rgb_file(encoded(pale, "PNG"))[1] == rgb_file(others["white"])[1]
    assert np.array_equal(np.asarray(decoded(rgb_file(alike["turned"])[0])), np.asarray(red))


def test_groups_that_share_a_picture_become_one():
    rows = [Row("1", [], bytes, "b", b"x"), Row("2", [], bytes, "b", b"y"), Row("3", [], bytes, "a", b"y")]
    rows += [Row("4", [], bytes, "a", b"z"), Row("5", [], bytes, "c", b"v"), Row("6", [], bytes, None, b"w")]
    join_groups(rows)
    assert [one.group_id for one in rows] == ["a", "a", "a", "a", "c", "6"]


def test_without_repeated_pictures_there_are_no_groups(tmp_path, capsys):
    built = build({None: [row(f"{i}", i) for i in range(20)]}, tmp_path / "data")
    assert "group_id" not in built["train"].features
    assert "several" not in capsys.readouterr().out


def given_parts() -> dict[str, list[Row]]:
    """Pictures 0 to 9 of train: 0 and 1 are in test, 2 in validation, 3 and 4 twice; 20 of validation is in test."""
    train = [*range(10), 3, 4, 0]
    return {
        "train": [row(f"train{k}-{i}", i) for k, i in enumerate(train)],
        "validation": [row(f"val{i}", i) for i in (2, 20, 21, 22)],
        "test": [row(f"test{i}", i) for i in (0, 1, 20, 23, 24, 24)[:5]] + [row("test24b", 24)],
    }


def test_across_the_sources_own_splits_test_keeps_all(tmp_path, capsys):
    parts = given_parts()
    ids = {split: [one.image_id for one in rows] for split, rows in parts.items()}
    built = build(parts, tmp_path / "data")
    assert leaks(built) == 0
    assert built["test"]["image_id"] == ids["test"]
    assert built["validation"]["image_id"] == ["val2", "val21", "val22"]
    gone = ("train0-0", "train1-1", "train2-2", "train12-0")
    assert built["train"]["image_id"] == [one for one in ids["train"] if one not in gone]
    printed = capsys.readouterr().out
    # 0, 1, 2 and 20; of train the rows of 0 (twice), 1 and 2.
    assert "4 pictures are in several splits: 4 rows of train and 1 rows of validation are left out" in printed
    assert "--duplicates keep" in printed
    assert "3 pictures are there under several names" in printed  # 3, 4 and 24
    assert "5 rows whose picture is in another split too" in (tmp_path / "data" / "README.md").read_text()


def test_duplicates_may_be_kept(tmp_path, capsys):
    parts = given_parts()
    ids = {split: [one.image_id for one in rows] for split, rows in parts.items()}
    built = build(parts, tmp_path / "data", duplicates="keep")
    assert {split: part["image_id"][:] for split, part in built.items()} == ids
    assert leaks(built) == 2 + 1 + 1 + 1
    assert "4 pictures are in several splits and stay there" in capsys.readouterr().out
    group = dict(zip(built["train"]["image_id"], built["train"]["group_id"]))
    assert group["train3-3"] == group["train10-3"] != group["train4-4"] == group["train11-4"]


def test_validation_is_drawn_of_what_is_left(tmp_path):
    parts = {"train": [row(f"{side}{i}", i) for i in range(30) for side in "ab"]}
    parts["test"] = [row(f"t{i}", i) for i in range(0, 30, 3)]
    built = build(parts, tmp_path / "data")
    assert leaks(built) == 0 and built["test"].num_rows == 10
    assert built["train"].num_rows + built["validation"].num_rows == 40
    assert "group_id" in built["train"].features


def test_groups_are_written_only_where_rows_that_stay_share_one(tmp_path):
    parts = {"train": [row(f"{i}", i) for i in range(9)], "validation": [row("v", 20)], "test": [row("t", 0)]}
    built = build(parts, tmp_path / "data")
    assert built["train"].num_rows == 8 and "group_id" not in built["train"].features


def test_a_split_of_duplicates_alone_is_an_error(tmp_path):
    parts = {"train": [row(f"{i}", i) for i in range(9)], "validation": [row("v", 20)], "test": [row("t", 20)]}
    with pytest.raises(ValueError, match="all 1 pictures of validation are in other splits.*--duplicates keep"):
        build(parts, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_three_rows_of_one_picture_are_too_few(tmp_path):
    with pytest.raises(ValueError, match="there are 1 images, those of one group or picture counted once"):
        build({None: [row(f"{i}", 0) for i in range(3)]}, tmp_path / "data")


@pytest.mark.parametrize(("count", "named"), [(100, False), (101, True)])
def test_a_picture_of_over_a_hundred_rows_is_named(tmp_path, capsys, count, named):
    rows = [row("first", 0), *(row(f"{i}", i) for i in range(1, 6)), *(row(f"gone{i}", 0) for i in range(count - 1))]
    build({None: rows}, tmp_path / "data")
    printed = capsys.readouterr().out
    assert (f"one picture has {count} rows, first the first of them" in printed) == named
    assert "1 picture is there under several names" in printed


def test_a_published_split_is_written_as_it_is(tmp_path, capsys):
    """Without shares, as for Karpathy's splits: no row is left out, none gets a group."""
    parts = given_parts()
    parts["validation"].append(row("val24", 24))
    parts["validation"].append(row("val24b", 24))  # twice here and twice in test: one picture
    ids = {split: [one.image_id for one in rows] for split, rows in parts.items()}
    built = build(parts, tmp_path / "data", shares=None)
    assert {split: part["image_id"][:] for split, part in built.items()} == ids
    assert "group_id" not in built["train"].features
    printed = capsys.readouterr().out
    assert "5 pictures are in several splits and stay there" in printed
    assert "4 pictures are there under several names\n" in printed  # 0, 3, 4 and 24
    assert karpathy.build is building.build


def test_near_duplicates_are_two_pictures(tmp_path):
    """Another quality of the same JPEG is not looked for."""
    rows = [row(f"{q}-{i}", i, data=encoded(picture(i), quality=q)) for i in range(10) for q in (60, 90)]
    assert "group_id" not in build({None: rows}, tmp_path / "data")["train"].features


def shared_line(printed: str) -> str | None:
    return next((line for line in printed.splitlines() if "several images" in line), None)


@pytest.mark.parametrize(
    ("captions", "share"),
    [
        ([["a photo"]] * 10, "100 %"),
        ([["a photo", f"it is {i}"] for i in range(10)], "50 %"),
        ([["a cat"]] * 5 + [["a dog"]] * 4 + [["a cow"]], "90 %"),
        ([[f"it is {i}", f"it is {i}"] for i in range(10)], None),  # twice of one image is no question
        ([[f"it is {i}"] for i in range(10)], None),
        ([["a photo", *(f"{i} {k}" for k in range(99))] for i in range(2)] + [["c"]], "0.995 %"),
    ],
)
def test_captions_that_stand_for_several_images_are_said(tmp_path, capsys, captions, share):
    rows = [row(f"{i}", i, texts) for i, texts in enumerate(captions)]
    build({"train": rows}, tmp_path / "data", shares=None)
    line = shared_line(capsys.readouterr().out)
    if share is None:
        assert line is None
    else:
        assert line.startswith(f"{share} of the captions stand for several images")


def test_a_caption_of_one_picture_under_many_names_stands_for_one(tmp_path, capsys):
    rows = [row(f"{side}{i}", i, [f"thing {i}"]) for i in range(20) for side in "ab"]
    build({None: rows}, tmp_path / "data")
    assert shared_line(capsys.readouterr().out) is None
    rows = [row(f"{i}", i, [f"thing {i // 2}"], group_id=f"g{i // 2}") for i in range(40)]
    build({None: rows}, tmp_path / "groups")
    assert shared_line(capsys.readouterr().out) is None


def test_a_caption_that_is_shown_is_short_and_printable(tmp_path, capsys):
    rows = [row(f"{i}", i, ["\x1b[31m" + "x" * 5000]) for i in range(10)]
    build({None: rows}, tmp_path / "data")
    line = shared_line(capsys.readouterr().out)
    assert "\x1b" not in line and len(line) < 300
