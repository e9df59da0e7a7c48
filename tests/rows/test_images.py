"""Images of every mode become RGB, and those that a dataset may not name stay unread."""

from __future__ import annotations

import io
import json
import random

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows
from image_files import encoded, picture
from PIL import Image

from datasets_scripts.opening import open_dataset
from datasets_scripts.teacher_features import _chunks, _undecoded
from rows.images import load_rgb
from trainers.streaming import StreamedRetrievalDataset


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(file_format):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "lime")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    pixels = np.asarray(load_rgb({"bytes": data, "path": None})).astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() < 10


def test_colour_profiles_of_junk_change_nothing():
    plain = encoded(picture(0), "PNG")
    junk = encoded(picture(0), "PNG", icc_profile=random.Random(0).randbytes(5000))
    images = [load_rgb({"bytes": data, "path": None}) for data in (plain, junk)]
    np.testing.assert_array_equal(*map(np.asarray, images))


@pytest.mark.parametrize("how", ["absolute", "up", "link", "linked folder", "other host", "archive"])
def test_a_dataset_names_no_picture_of_this_machine(tmp_path, how):
    """Its author would choose which are read, shown on the card and pushed with the features."""
    private = tmp_path / "private.png"
    picture(0).save(private)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(private)
    (folder / "linked").symlink_to(tmp_path)
    path = {
        "absolute": private,
        "up": folder / ".." / "private.png",
        "link": folder / "link.png",
        "linked folder": folder / "linked" / "private.png",
        "other host": "http://127.0.0.1:9/x.png",
        "archive": f"zip://x.png::{tmp_path}/private.zip",
    }[how]
    rows = make_rows(4).remove_columns("image").add_column("image", [{"bytes": None, "path": str(path)}] * 4)
    features = datasets.Features({**rows.features, "image": datasets.Image()})
    rows = rows.cast(features)
    table = rows.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, folder / "train.parquet")
    with pytest.raises(ValueError, match="holds no image but the path"):
        open_dataset(str(folder))
    stream = open_dataset(str(folder), streaming=True)["train"]
    with pytest.raises(ValueError, match="holds no image but the path"):
        next(iter(_chunks(_undecoded(stream, "train"), 2)))
    with pytest.raises(ValueError, match="holds no image but the path"):
        next(iter(StreamedRetrievalDataset(stream, 2, None)))


def test_images_in_the_datasets_own_folder_are_read(tmp_path):
    for i in range(3):
        (tmp_path / "train").mkdir(exist_ok=True)
        picture(i).save(tmp_path / "train" / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "captions": ["a"]} for i in range(3)]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(open_dataset(str(tmp_path))["train"]) == 3
    rows[0]["file_name"] = "/etc/hostname"
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises((ValueError, OSError)):
        open_dataset(str(tmp_path))
