"""Teacher features: those of a direct call, the same however the work was split or read."""

import io
import json
import os

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows
from image_files import encoded, write_tar
from launching import launch
from PIL import Image
from tiny_features import arguments, contents

from datasets_scripts import add_teacher_features as script
from rows.checks import check_dataset
from rows.images import load_rgb
from rows.teacher_columns import TEACHER_COLUMNS, teacher_rows
from teachers import load_teacher


def test_features_are_those_of_a_direct_call(output, source, teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    rows, before = datasets.load_dataset(str(output)), datasets.load_from_disk(source)
    assert {split: len(part) for split, part in rows.items()} == {"train": 23, "validation": 12, "test": 12}
    for split, part in rows.items():
        plain = part.remove_columns([*TEACHER_COLUMNS, "teacher"])
        for row, old in zip(plain, before[split]):
            assert np.array_equal(row.pop("image"), old.pop("image")) and row == old
        assert part.features["teacher_image_embeds"] == datasets.List(datasets.Value("float16"), length=16)
        for row in part:
            image = teacher.embed_images([row["image"]])[0]
            text = teacher.embed_texts(row["captions"])
            torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), image, rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(torch.tensor(row["teacher_text_embeds"]), text, rtol=2e-3, atol=1e-4)
        check_dataset(part, split, 16)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_have_the_rights_that_the_umask_leaves(source, teacher_folder, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        script.main(arguments(source, teacher_folder, tmp_path / "out", "--int8"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {mode} and "teacher_pca.safetensors" in modes


def test_a_streamed_source_gives_the_same_files(output, source, teacher_folder, tmp_path):
    script.main(arguments(source, teacher_folder, tmp_path / "streamed", "--streaming"))
    assert contents(tmp_path / "streamed") == contents(output)


def test_images_of_a_stream_are_stored_as_they_are(teacher_folder, tmp_path):
    """Encoded again, a JPEG would lose colours, and its size would change."""
    rows, files = make_rows(6).remove_columns(TEACHER_COLUMNS), []
    for row in rows:
        buffer = io.BytesIO()
        row["image"].save(buffer, "JPEG", quality=97)
        files.append(buffer.getvalue())
    images = [{"bytes": file, "path": None} for file in files]
    rows = datasets.Dataset.from_dict({**rows[:], "image": images}, features=rows.features)
    (tmp_path / "source" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "source" / "data" / "test-0.parquet")
    script.main(arguments(tmp_path / "source", teacher_folder, tmp_path / "made", "--streaming"))
    made = datasets.load_dataset(str(tmp_path / "made"), split="test").cast_column(
        "image", datasets.Image(decode=False)
    )
    assert [row["image"]["bytes"] for row in made] == files


@pytest.mark.parametrize("more", [[], ["--streaming"], ["--image_size", "24"], ["--image_size", "32"]])
def test_images_are_stored_without_what_they_say_of_a_person(teacher_folder, tmp_path, more):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Artist] = "SECRET"
    exif[Image.ExifTags.Base.Orientation] = 6
    rows, files = make_rows(8).remove_columns(TEACHER_COLUMNS), []
    for i, row in enumerate(rows):
        buffer = io.BytesIO()
        row["image"].save(buffer, ("JPEG", "PNG", "WEBP", "TIFF")[i % 4], comment=b"SECRET", exif=exif)
        files.append(buffer.getvalue())
    assert all(b"SECRET" in file for file in files)
    images = [{"bytes": file, "path": None} for file in files]
    rows = datasets.Dataset.from_dict({**rows[:], "image": images}, features=rows.features)
    (tmp_path / "source" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "source" / "data" / "test-0.parquet")
    script.main([*arguments(tmp_path / "source", teacher_folder, tmp_path / "made"), *more])
    made = datasets.load_dataset(str(tmp_path / "made"), split="test").cast_column(
        "image", datasets.Image(decode=False)
    )
    stored = [row["image"] for row in made]
    assert len(stored) == 8 and not any(b"SECRET" in image["bytes"] for image in stored)
    if more != ["--image_size", "24"]:  # which way is up stays
        for image, file in zip(stored, files):
            assert np.array_equal(load_rgb(image), load_rgb({"bytes": file, "path": None}))


def test_loader_workers_change_nothing(output, source, teacher_folder, tmp_path):
    script.main([*arguments(source, teacher_folder, tmp_path / "workers"), "--num_workers", "2"])
    assert contents(tmp_path / "workers") == contents(output)


def test_two_processes_give_the_files_of_one(output, source, teacher_folder, tmp_path):
    launch(2, script.__file__, *arguments(source, teacher_folder, tmp_path / "two"))
    assert contents(tmp_path / "two") == contents(output)


def test_another_number_of_threads_changes_rounding_alone(output, source, teacher_folder, tmp_path):
    torch.set_num_threads(3)
    script.main(arguments(source, teacher_folder, tmp_path / "three"))
    one, three = (datasets.load_dataset(str(folder)) for folder in (output, tmp_path / "three"))
    for split, part in one.items():
        for got, expected in zip(teacher_rows(three[split]), teacher_rows(part)):
            torch.testing.assert_close(got, expected, rtol=2**-9, atol=2**-12)
        assert three[split].remove_columns(TEACHER_COLUMNS)[:]["captions"] == part["captions"][:]


def test_images_are_stored_at_the_students_size_and_the_teacher_sees_them_whole(
    output, source, teacher_folder, tmp_path
):
    rows = datasets.load_from_disk(source)
    photo, buffer = Image.new("RGB", (64, 20), "red"), io.BytesIO()
    photo.save(buffer, "JPEG")
    jpeg = {**rows["test"][0], "image": {"bytes": buffer.getvalue(), "path": "photo.jpg"}, "image_id": "photo"}
    jpeg = datasets.Dataset.from_list([jpeg], features=rows["test"].features)
    rows["test"] = datasets.concatenate_datasets([rows["test"], jpeg])
    rows.save_to_disk(tmp_path / "rows")
    for number, (size, workers) in enumerate(((24, 0), (24, 2), (32, 0))):
        folder = tmp_path / str(number)
        options = arguments(tmp_path / "rows", teacher_folder, folder, "--image_size", size)
        script.main(options + ["--num_workers", str(workers)])
        if workers:
            assert contents(folder / "data") == contents(tmp_path / "0" / "data")
            continue
        plain, stored = datasets.load_dataset(str(output)), datasets.load_dataset(str(folder))
        assert f"no side above {size} pixels" in (folder / "README.md").read_text()
        for split, part in plain.items():
            assert stored[split]["teacher_image_embeds"][: len(part)] == part["teacher_image_embeds"][:]
            for old, new in zip(part["image"], stored[split]["image"]):
                assert np.array_equal(new, old if size == 32 else old.resize((24, 24), Image.Resampling.BICUBIC))
        new = stored["test"].cast_column("image", datasets.Image(decode=False))[12]["image"]
        assert new["bytes"][:2] == b"\xff\xd8" and new["path"] == "photo.jpg"
        assert Image.open(io.BytesIO(new["bytes"])).size == (size, 20)


def test_features_of_another_teacher_are_replaced(output, other_folder, tmp_path):
    script.main(arguments(output, other_folder, tmp_path / "new"))
    row = datasets.load_dataset(str(tmp_path / "new"))["train"][0]
    expected = load_teacher(str(other_folder)).embed_images([row["image"]])[0]
    torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), expected, rtol=2e-3, atol=1e-4)
    assert json.loads(row["teacher"])["id"] == "other"


def test_weights_and_revisions_must_be_one_a_teacher(source, teacher_folder, tmp_path, capsys):
    for more in (
        ["--teacher_weights", "1", "2"],
        ["--teacher_weights", "-1"],
        ["--teacher_revision", "a", "--teacher_revision", "b"],
    ):
        with pytest.raises(SystemExit):
            script.main(arguments(source, teacher_folder, tmp_path / "out", *more))
        assert more[0] in capsys.readouterr().err


def test_pushed_to_the_hub_it_loads_and_streams(output, source, teacher_folder, tmp_path, hub):
    script.main(arguments(source, teacher_folder, tmp_path / "again", "--push_to_hub", "user/features"))
    assert set(hub.files("datasets/user/features")) >= set(contents(output))
    rows = datasets.load_dataset("user/features").cast_column("image", datasets.Image(decode=False))
    local = datasets.load_dataset(str(output)).cast_column("image", datasets.Image(decode=False))
    for split in local:
        assert list(rows[split]) == list(local[split])
    stream = datasets.load_dataset("user/features", streaming=True)["train"]
    assert [row["image_id"] for row in stream] == local["train"]["image_id"]
    script.main(arguments("user/features", teacher_folder, tmp_path / "of_hub"))  # from the Hub, too
    assert "# user/features with teacher features" in (tmp_path / "of_hub" / "README.md").read_text()
    for content in hub.files("datasets/user/features").values():
        assert str(tmp_path).encode() not in content


def test_a_webdataset_is_read_as_a_stream(teacher_folder, tmp_path):
    """Keys that start again in every tar, captions in txt or json."""
    rows = make_rows(6)
    for split in ("train", "test"):
        for shard in range(2):
            files = []
            for i in range(3):
                row = rows[3 * shard + i]
                captions = json.dumps({"captions": row["captions"]})
                files += [(f"{i}.png", encoded(row["image"], "PNG")), (f"{i}.json", captions.encode())]
            write_tar(tmp_path / "tars" / f"{split}-{shard:04d}.tar", files)
    script.main(arguments(tmp_path / "tars", teacher_folder, tmp_path / "out", "--streaming"))
    out = datasets.load_dataset(str(tmp_path / "out"))
    teacher = load_teacher(str(teacher_folder))
    for split, part in out.items():
        check_dataset(part, split, 16)
        assert part["image_id"] == [f"{split}-{shard:04d}/{i}" for shard in range(2) for i in range(3)]
        assert part["captions"] == rows["captions"]
        for row, old in zip(part, rows):
            expected = teacher.embed_images([old["image"]])[0]
            torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), expected, rtol=2e-3, atol=1e-4)


def test_a_mistyped_dataset_is_named(teacher_folder, tmp_path):
    with pytest.raises(SystemExit, match="error: .*no-such-data"):
        script.main(arguments(tmp_path / "no-such-data", teacher_folder, tmp_path / "out"))
    assert not list(tmp_path.iterdir())
