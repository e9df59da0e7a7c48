"""Own data that is refused or left out: broken files, paths that leave the folder, tables and tars of no use."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import encoded, picture, write_tar
from own_images import COUNT, build, file_of, jsonl, name_of, sample, simple, write_images

from datasets_scripts import own_data


def test_broken_images(tmp_path):
    folder = simple(tmp_path / "data", [{"file_name": name_of(i), "text": f"t {i}"} for i in range(COUNT)])
    (folder / name_of(0)).write_bytes(b"\xff\xd8\xff nothing")
    (folder / name_of(1)).unlink()
    with pytest.raises(ValueError, match="(?s)2 images are missing or broken"):
        build(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["data", "out.broken.txt"]
    built = build(folder, tmp_path / "out", "--skip_broken")
    assert sum(part.num_rows for part in built.values()) == COUNT - 2
    assert len((tmp_path / "out.broken.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "link.jpg", "photos/../../secret.jpg", 3.5])
@pytest.mark.parametrize("form", ["metadata.jsonl", "table.jsonl"])
def test_paths_that_leave_the_folder(tmp_path, name, form):
    folder = simple(
        tmp_path / "data", [{"file_name": name_of(0), "text": "a"}, {"file_name": name, "text": "x"}], form
    )
    (tmp_path / "secret.jpg").write_bytes(file_of(0))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match=f"{form}, row 2: .*does not stay in the folder"):
        build(folder if form == "metadata.jsonl" else folder / form, tmp_path / "out", "--skip_broken")
    assert not (tmp_path / "out").exists()


def test_datasets_do_not_read_files_outside_the_cache(tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(picture(0), "PNG"))
    image = {"bytes": [None, *map(file_of, range(COUNT))], "path": [str(secret), *[None] * COUNT]}
    table = pa.table(
        {
            "image": pa.StructArray.from_arrays(
                [pa.array(image["bytes"]), pa.array(image["path"])], ["bytes", "path"]
            ),
            "caption": ["x"] * (COUNT + 1),
            "image_id": [str(i) for i in range(COUNT + 1)],
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="outside the datasets cache"):
        build(tmp_path / "data.parquet", tmp_path / "out")
    (tmp_path / "out.broken.txt").unlink()
    # What `datasets` itself has put there is read.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert sum(part.num_rows for part in build(tmp_path / "data.parquet", tmp_path / "out").values()) == COUNT + 1


def image_rows(count=4, **cells):
    return [{"file_name": name_of(i), "caption": f"c {i}", **cells} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"a": "x", "b": "y"}], [], r"no column for images; it has a, b. Name one with --image_column"),
        ([{"file_name": "x", "b": "y"}], [], "no column for captions; it has file_name, b. .*--caption_column"),
        (image_rows(text="x"), [], "several columns that may hold captions; .*--caption_column"),
        (image_rows(path="x"), [], "several columns that may hold images; .*--image_column"),
        (image_rows(), ["--caption_column", "z"], "no column z; it has file_name, caption"),
        (image_rows(), ["--id_column", "z"], r"no column z \(--id_column\)"),
        (image_rows(image_id="same"), [], "row 2: the id 'same' stands for two images"),
        (image_rows(image_id=1.5), [], "image_id holds 1.5"),
        (image_rows(image_id=""), [], "image_id holds ''"),
        ([{"file_name": name_of(0), "caption": {"de": "x", "en": "y"}}], [], "caption holds .*'de'.*caption.raw"),
        ([{"file_name": name_of(0), "caption": 7}], [], "caption holds 7, expected text"),
        (image_rows(2, group="a") + image_rows(1, group="b"), ["--group_column", "group"], "two groups, a and b"),
        (
            image_rows(2, group="a") + image_rows(1, group="b"),
            ["--split_group_column", "group"],
            "in one split with a and with b",
        ),
        (image_rows(2, split="train") + image_rows(1, split="test"), [], "two splits, train and test"),
        (image_rows(split="holdout"), [], "unknown split 'holdout'"),
        (image_rows(1), [], "a split is empty"),
        ([], [], "has no rows"),
    ],
)
def test_refused_tables(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        build(simple(tmp_path / "data", rows), tmp_path / "out", *options)
    assert os.listdir(tmp_path) == ["data"]


def test_some_images_in_split_folders_and_some_not(tmp_path):
    write_images(tmp_path / "data", lambda i: f"{'test' if i < 5 else 'photos'}/{i}.jpg")
    rows = [{"file_name": f"{'test' if i < 5 else 'photos'}/{i}.jpg", "text": "x"} for i in range(COUNT)]
    jsonl(tmp_path / "data" / "metadata.jsonl", rows)
    with pytest.raises(ValueError, match="'photos/5.jpg' has no split"):
        build(tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption\na.jpg,one, two\n", "line 2: 3 cells under the 2 columns path, caption"),
        ('path,caption\na.jpg,"never closed\nb.jpg,x,y\n', "line 3: unexpected end of data"),
        ("", "has no rows"),
    ],
)
def test_refused_csv(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "data.csv", tmp_path / "out")


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_a_table_that_is_not_utf_8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes("path,caption\na.jpg,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 .*save it as that"):
        build(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(("line", "message"), [("{", "line 2 is not JSON"), ("[1]", "line 2: expected an object")])
def test_refused_jsonl(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text(f'{{"path": "a", "text": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "data.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*sample(0, "a"), ("a.png", b"x")], "a.png: a second image"),
        ([("a.jpg", b"x"), ("a.txt", b"\xff")], "a.txt: 'utf-8'"),
        ([("a.jpg", b"x"), ("a.json", b"[]")], "a.json: expected an object"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "a.json: Expecting"),
        ([("a.jpg", b"x")], "data.tar has no captions: expected KEY.txt.*first key is 'a' and its files end in .jpg"),
        ([("a.txt", b"x"), ("b.txt", b"x")], "no rows|rows are missing|no image"),
    ],
)
def test_refused_tars(tmp_path, files, message):
    write_tar(tmp_path / "data.tar", files)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "data.tar", tmp_path / "out")


def test_a_cut_tar_and_a_sample_without_image(tmp_path):
    files = [file for i in range(COUNT) for file in sample(i, f"{i:04d}")]
    write_tar(tmp_path / "data.tar", [*files, ("alone.json", b'{"captions": ["x"]}')])
    whole = (tmp_path / "data.tar").read_bytes()
    with pytest.raises(ValueError, match=r"(?s)1 row cannot be used.*\(data/alone\): there is no image"):
        build(tmp_path / "data.tar", tmp_path / "out")
    (tmp_path / "data.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match="data.tar.*unexpected end of data"):
        build(tmp_path / "data.tar", tmp_path / "out")


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here.csv", "no/such/folder", "*.tar", "images.zip"])
def test_nothing_there(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.zip").touch()
    with pytest.raises((FileNotFoundError, ValueError), match="nothing at|expected a file ending in"):
        own_data.main([source, "--output_dir", str(tmp_path / "out")])


def test_output_that_is_there_and_bad_shares(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for options in (["--output_dir", tmp_path / "out"], ["--output_dir", tmp_path / "new", "--test_share", "0.95"]):
        with pytest.raises(SystemExit):
            own_data.main(["x", *map(str, options)])
    errors = capsys.readouterr().err
    assert "not empty" in errors and "sum below 1" in errors


def test_killed_while_writing(tmp_path):
    folder = simple(tmp_path / "data", image_rows(COUNT))
    program = "import os, signal\nfrom datasets_scripts import arrow_files, own_data\n"
    program += "arrow_files.ArrowWriter.finalize = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
    program += f"own_data.main([{str(folder)!r}, '--output', {str(tmp_path / 'out')!r}])"
    root = Path(own_data.__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(root)})
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    build(folder, tmp_path / "out")
