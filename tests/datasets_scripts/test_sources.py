"""Sources in the forms that people have them, through the whole program."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import encoded, picture

from datasets_scripts import own_data
from datasets_scripts.split_words import split_of_path


COUNT = 40  # enough that no split is empty
ROOT = Path(__file__).parents[2]


def write_images(folder: Path, form: str = "{}.jpg") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [form.format(i) for i in range(COUNT)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(i)))
    return names


def rows_of(source, output: Path, *options) -> dict[str, list[str]]:
    own_data.main(["--dataset_name", str(source), "--output_dir", str(output), *map(str, options)])
    made = datasets.load_from_disk(output)
    return {row["image_id"]: row["captions"] for part in made.values() for row in part.remove_columns("image")}


def test_cocos_captions_with_their_images_elsewhere(tmp_path):
    names = write_images(tmp_path / "coco" / "val2017", "{:012d}.jpg")
    content = {
        "images": [{"id": 10 * i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": 5 * i + k, "image_id": 10 * i, "caption": f"a thing {i} seen {k}"}
            for k in range(5)
            for i in range(COUNT)
        ],
    }
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(content))
    expected = [[f"a thing {i} seen {k}" for k in range(5)] for i in range(COUNT)]
    for where, prefix in (("coco/val2017", ""), ("coco", "val2017/")):  # the folder, or one around it
        rows = rows_of(path, tmp_path / f"out{len(prefix)}", "--images", tmp_path / where)
        assert rows == {f"{prefix}{name}": captions for name, captions in zip(names, expected)}


def test_flickrs_files(tmp_path):
    names = write_images(tmp_path / "images", "{}.jpg")
    five = [(name, k, f"A dog {i} , view {k} .") for i, name in enumerate(names) for k in range(5)]
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n" + "".join(f"{name}| {k}| {text}\n" for name, k, text in five)
    )
    (tmp_path / "a.token").write_text("".join(f"{name}#{k}\t{text}\n" for name, k, text in five))
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f'{name},"{text}"\n' for name, _, text in five))
    expected = {name: [f"A dog {i} , view {k} ." for k in range(5)] for i, name in enumerate(names)}
    for file in ("results.csv", "a.token", "captions.txt"):
        assert rows_of(tmp_path / file, tmp_path / f"{file}.out", "--images", tmp_path / "images") == expected


def test_absolute_paths_below_the_trusted_root_and_urls(tmp_path):
    names = write_images(tmp_path / "images")
    root = tmp_path / "images"
    (tmp_path / "a.csv").write_text("path,caption\n" + "".join(f"{root / name},x {name}\n" for name in names))
    with pytest.raises(ValueError, match="does not stay in the folder"):
        rows_of(tmp_path / "a.csv", tmp_path / "none", "--images", _empty(tmp_path / "other"))
    assert set(rows_of(tmp_path / "a.csv", tmp_path / "out", "--images", root)) == set(names)
    (tmp_path / "b.csv").write_text("path,caption\nhttps://a.b/c.jpg,x\n")
    with pytest.raises(ValueError, match="b.csv, row 1: 'https://a.b/c.jpg' is a URL: .*img2dataset"):
        rows_of(tmp_path / "b.csv", tmp_path / "out2")


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_texts_of_every_arrow_type(tmp_path, kind):
    """polars writes large strings and string views."""
    names = write_images(tmp_path / "images")
    as_type = getattr(pa, kind)()
    table = pa.table({"path": pa.array(names, as_type), "caption": pa.array([f"x {n}" for n in names], as_type)})
    pq.write_table(table, tmp_path / "images" / "a.parquet")
    rows = rows_of(tmp_path / "images" / "a.parquet", tmp_path / "out")
    assert rows == {name: [f"x {name}"] for name in names}


def in_memory(**columns) -> datasets.Dataset:
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(COUNT)]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def test_classes_of_a_dataset_become_captions(tmp_path):
    labels = datasets.ClassLabel(names=["golden_retriever", "tabby"])
    rows = in_memory(label=[i % 2 for i in range(COUNT)], key=[str(i) for i in range(COUNT)]).cast_column(
        "label", labels
    )
    rows.save_to_disk(tmp_path / "data")
    options = ["--caption_column", "label", "--id_column", "key"]
    found = rows_of(tmp_path / "data", tmp_path / "out", *options, "--caption_template", "a photo of a {}")
    names = ("golden retriever", "tabby")
    assert found == {str(i): [f"a photo of a {names[i % 2]}"] for i in range(COUNT)}


def test_lists_of_images_and_captions_in_objects(tmp_path):
    images = [[{"bytes": encoded(picture(i)), "path": None}] for i in range(COUNT)]
    rows = datasets.Dataset.from_dict(
        {
            "images": images,
            "key": [str(i) for i in range(COUNT)],
            "sentences": [[{"raw": f"a {i}", "id": i}, {"raw": f"b {i}", "id": i}] for i in range(COUNT)],
        }
    ).cast_column("images", datasets.List(datasets.Image()))
    rows.save_to_disk(tmp_path / "data")
    options = ["--image_column", "images", "--caption_column", "sentences.raw", "--id_column", "key"]
    found = rows_of(tmp_path / "data", tmp_path / "out", *options)
    assert found == {str(i): [f"a {i}", f"b {i}"] for i in range(COUNT)}


def test_splits_by_any_of_their_names_and_none_where_told(tmp_path, capsys):
    for folder, count in (("train2017", 30), ("val2017", 10)):
        names = write_images(tmp_path / "data" / folder)[:count]
        lines = [json.dumps({"file_name": name, "caption": f"{folder} {name}"}) + "\n" for name in names]
        (tmp_path / "data" / folder / "metadata.jsonl").write_text("".join(lines))
    rows_of(tmp_path / "data", tmp_path / "out")
    made = datasets.load_from_disk(tmp_path / "out")
    held_out = [*made["validation"]["image_id"], *made["test"]["image_id"]]
    assert all(name.startswith("val2017/") for name in held_out) and len(held_out) == 10
    assert len(made["train"]) == 20  # of its 30 ten are pictures of val2017 too
    assert "train2017 -> train, val2017 -> validation (--ignore_splits" in capsys.readouterr().out
    rows_of(tmp_path / "data", tmp_path / "out2", "--ignore_splits")
    made = datasets.load_from_disk(tmp_path / "out2")
    assert {name.split("/")[0] for name in made["train"]["image_id"]} == {"train2017", "val2017"}


def test_a_file_named_dev_kit_is_no_split():
    assert split_of_path(Path("dev_kit.tar"), is_table=True) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caption_template", "no place"], "expected one {} where the name goes"),
        (["--delimiter", "::"], "expected one character"),
        (["--rows", "0"], "expected 1 or more"),
        (["--images", "none"], "--images none is no folder"),
    ],
)
def test_options_that_cannot_be_end_at_once(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        own_data.main(["--dataset_name", "x", "--output_dir", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err


def test_what_nobody_can_read_ends_in_one_sentence(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    command = [
        "-m",
        "datasets_scripts.own_data",
        "--dataset_name",
        tmp_path / "a.zip",
        "--output_dir",
        tmp_path / "out",
    ]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().startswith(f"error: {tmp_path / 'a.zip'}: expected a file ending in .csv, ")


def test_img2datasets_parquet_with_failed_rows(tmp_path, capsys):
    rows = [
        {"jpg": None if i % 10 == 3 else encoded(picture(i)), "caption": f"thing {i}", "key": str(i)}
        for i in range(COUNT)
    ]
    for row in rows:
        row["status"] = "success" if row["jpg"] else "failed_to_download"
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "00000.parquet")
    found = rows_of(tmp_path / "data", tmp_path / "out")
    assert len(found) == COUNT - 4
    assert "4 of them failed in the source" in capsys.readouterr().out
    assert "row 4: failed_to_download" in (tmp_path / "out.broken.txt").read_text()
    # Without that mark an empty cell is a row that cannot be used.
    table = pa.Table.from_pylist(rows).drop_columns("status")
    pq.write_table(table, tmp_path / "data" / "00000.parquet")
    with pytest.raises(ValueError, match="4 rows cannot be used") as caught:
        rows_of(tmp_path / "data", tmp_path / "again")
    assert "row 4: there is no image" in str(caught.value) and "--skip_broken" in str(caught.value)
    assert len(rows_of(tmp_path / "data", tmp_path / "again", "--skip_broken")) == COUNT - 4


def test_a_packed_tar_is_named(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="x.tar.gz is packed: unpack it by gunzip"):
        rows_of(tmp_path / "x.tar.gz", tmp_path / "out")
