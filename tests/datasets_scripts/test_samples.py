"""Samples of a webdataset: the same rows from tars, through `datasets`, streamed, and as files beside each other."""

import json
from pathlib import PurePosixPath

import datasets
import pytest
from huggingface_hub import HfApi
from image_files import encoded, picture, write_tar

from datasets_scripts import own_data
from datasets_scripts.opening import open_dataset
from datasets_scripts.samples import captions_of_sample, id_of_sample, place_of_tar
from datasets_scripts.tar_stream import rows_of_tars


COUNT = 12


def as_json(**values) -> bytes:
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("described", "text", "captions"),
    [
        ({"caption": "a"}, "a", ["a"]),  # img2dataset: both
        ({"caption": "a"}, None, ["a"]),
        ({"alt_text": "a"}, None, ["a"]),
        ({"sentences": [{"raw": "a"}, {"raw": "b"}]}, None, ["a", "b"]),
        ({"captions": ["a", "b"]}, "c", ["a", "b"]),
        (None, "a\n\n b \r\nc", ["a", "b", "c"]),  # CLIP's benchmarks: a caption a line
        ({"caption": None, "text": "a"}, None, ["a"]),
        ({"caption": None, "status": "success"}, "", []),
        ({}, " \n", []),
        (None, None, []),
    ],
)
def test_captions(described, text, captions):
    assert captions_of_sample(described, text) == captions


def test_ids_and_places():
    assert id_of_sample({"image_id": 7}, "0", PurePosixPath("x.tar")) == "7"
    assert id_of_sample({"id": 7}, "0", PurePosixPath("sub/x-000.tar")) == "sub/x-000/0"
    assert id_of_sample(None, "a/0", PurePosixPath("x.tar")) == "x/a/0"
    assert place_of_tar("hf://datasets/user/name@abc/data/x.tar", "user/name") == PurePosixPath("data/x.tar")
    assert place_of_tar("/data/tars/sub/x.tar", "/data/tars") == PurePosixPath("sub/x.tar")
    assert place_of_tar("/elsewhere/x.tar", "/data/tars") == PurePosixPath("x.tar")


def sample(i: int, how: str) -> list[tuple[str, bytes]]:
    """Of one caption, `thing i`, but for "lines"."""
    image = encoded(picture(i))
    if how == "img2dataset":
        text = f"thing {i}".encode()
        return [
            (f"{i}.jpg", image),
            (f"{i}.txt", text),
            (f"{i}.json", as_json(caption=f"thing {i}", status="success")),
        ]
    if how == "sentences":
        return [(f"{i}.jpg", image), (f"{i}.json", as_json(sentences=[f"thing {i}"]))]
    if how == "upper case":
        return [(f"{i}.JPG", image), (f"{i}.txt", f"thing {i}".encode())]
    return [(f"{i}.jpg", image), (f"{i}.txt", f"thing {i}\nseen {i}\n".encode())]


@pytest.mark.parametrize("how", ["img2dataset", "sentences", "upper case", "lines"])
def test_one_way_from_a_sample_to_a_row(tmp_path, how, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for shard in range(2):
        files = [file for i in range(shard, COUNT, 2) for file in sample(i, how)]
        write_tar(tmp_path / "tars" / f"x-{shard}.tar", files)
    own_data.main(["--dataset_name", str(tmp_path / "tars"), "--output_dir", str(tmp_path / "out")])
    made = datasets.load_from_disk(tmp_path / "out")
    ways = {
        "own_data": [row for part in made.values() for row in part.select_columns(["image_id", "captions"])],
        "load_dataset": list(open_dataset(str(tmp_path / "tars"))["train"].select_columns(["image_id", "captions"])),
        "streamed": [
            {"image_id": row["image_id"], "captions": row["captions"]}
            for row in open_dataset(str(tmp_path / "tars"), streaming=True)["train"]
        ],
    }
    expected = {
        f"x-{i % 2}/{i}": [f"thing {i}", f"seen {i}"] if how == "lines" else [f"thing {i}"] for i in range(COUNT)
    }
    for rows in ways.values():
        assert {row["image_id"]: row["captions"] for row in rows} == expected and len(rows) == COUNT


@pytest.fixture
def mixed_tars(tmp_path, monkeypatch):
    """Ten samples, a .png and a .GIF among .jpg: one has an empty text, one no image. Two more failed to download."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = [file for i in range(6) for file in sample(i, "lines")]
    files += [("6.png", encoded(picture(6), "PNG")), ("6.txt", b"thing 6"), ("7.GIF", encoded(picture(7), "GIF"))]
    files += [("7.json", as_json(caption="thing 7")), ("8.jpg", encoded(picture(8))), ("8.txt", b" \n")]
    files += [("9.txt", b"thing 9")]
    files += [(f"{i}.json", as_json(caption="x", status="failed_to_download")) for i in (10, 11)]
    write_tar(tmp_path / "tars" / "x.tar", files[4:] + files[:4])
    return str(tmp_path / "tars")


def test_what_is_left_out_does_not_break_a_stream_and_is_counted(mixed_tars, capsys):
    stream = open_dataset(mixed_tars, streaming=True)["train"]
    rows = list(stream)
    failed = "x.tar: 2 of 12 samples failed in the source and are left out"
    assert failed in capsys.readouterr().out and list(stream) and failed not in capsys.readouterr().out  # once
    captions = {row["image_id"]: row["captions"] for row in rows}
    assert set(captions) == {f"x/{i}" for i in range(10)}
    assert captions["x/6"] == ["thing 6"] and captions["x/7"] == ["thing 7"] and captions["x/8"] == []
    assert [row["image_id"] for row in rows if row["image"] is None] == ["x/9"]
    assert {row["image"].size for row in rows if row["image"]} == {picture(0).size}
    stored = open_dataset(mixed_tars)["train"]
    assert list(zip(stored["image_id"], stored["captions"])) == list(captions.items())
    whole = open_dataset(mixed_tars, whole_samples=True)["train"]
    assert {*whole["image_id"]} == {f"x/{i}" for i in range(8)}
    assert "2 samples of the train split have no image or no captions and are left out" in capsys.readouterr().out


def test_tars_that_change_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for count in (3, 5):
        write_tar(tmp_path / "tars" / "x.tar", [file for i in range(count) for file in sample(i, "lines")])
        assert len(open_dataset(str(tmp_path / "tars"))["train"]) == count


def test_tars_on_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        write_tar(tmp_path / "tars" / f"{split}.tar", [file for i in range(4) for file in sample(i, "img2dataset")])
    HfApi().create_repo("user/tars", repo_type="dataset")
    HfApi().upload_folder(repo_id="user/tars", repo_type="dataset", folder_path=tmp_path / "tars")
    for streaming in (False, True):
        parts = open_dataset("user/tars", streaming=streaming)
        assert [row["image_id"] for row in parts["test"]] == [f"test/{i}" for i in range(4)]
        assert [row["captions"] for row in parts["train"]] == [[f"thing {i}"] for i in range(4)]


def test_a_stream_names_what_is_wrong_with_a_tar(tmp_path):
    two = [("a.jpg", encoded(picture(0))), ("a.txt", b"x"), ("b.jpg", encoded(picture(1))), ("b.png", b"x")]
    for files, message in (
        (two, "sample b has 2 images"),
        ([("a.json", b"[1]")], "x.tar: a.json: expected an object"),
        ([("a.txt", b"\xff\xff")], "x.tar: a.txt: .*codec"),
    ):
        write_tar(tmp_path / "x.tar", files)
        with pytest.raises(ValueError, match=message):
            list(rows_of_tars([str(tmp_path / "x.tar")], str(tmp_path)))
    write_tar(tmp_path / "x.tar", [(f"im.{i}.{e}", d) for i in range(3) for e, d in (("jpg", b"1"), ("txt", b"a"))])
    assert [row["image_id"] for row in rows_of_tars([str(tmp_path / "x.tar")], str(tmp_path))] == [
        "x/im.0", "x/im.1", "x/im.2"
    ]  # fmt: skip


def test_keys_with_dots_end_at_the_last_where_the_first_would_mix_samples(tmp_path):
    files = [
        (f"im.{i}.{ending}", data)
        for i in range(COUNT)
        for ending, data in (("jpg", encoded(picture(i))), ("txt", f"thing {i}".encode()))
    ]
    write_tar(tmp_path / "x.tar", files)
    own_data.main(["--dataset_name", str(tmp_path / "x.tar"), "--output_dir", str(tmp_path / "out")])
    made = datasets.load_from_disk(tmp_path / "out")
    rows = {row["image_id"]: row["captions"] for part in made.values() for row in part.remove_columns("image")}
    assert rows == {f"x/im.{i}": [f"thing {i}"] for i in range(COUNT)}


def test_longer_endings_belong_to_the_key(tmp_path):
    files = [
        (f"{i}.{ending}", data)
        for i in range(COUNT)
        for ending, data in (("input.jpg", encoded(picture(i))), ("outputs.txt", f"thing {i}".encode()))
    ]
    write_tar(tmp_path / "x.tar", files)
    own_data.main(["--dataset_name", str(tmp_path / "x.tar"), "--output_dir", str(tmp_path / "out")])
    made = datasets.load_from_disk(tmp_path / "out")
    assert sum(part.num_rows for part in made.values()) == COUNT
