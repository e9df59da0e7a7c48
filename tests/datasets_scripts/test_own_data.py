"""Own data in every form it may come in: the same images and captions must give the same dataset."""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import decoded, write_tar
from own_images import CAPTIONS, COUNT, EXPECTED, build, file_of, jsonl, name_of, sample, simple, write_images


def one_row_a_caption() -> list[tuple[int, str]]:
    """(image, caption), the captions of an image in order but not one after the other."""
    rows = [(j, i, caption) for i, captions in enumerate(CAPTIONS) for j, caption in enumerate(captions)]
    return [(i, caption) for _, i, caption in sorted(rows, key=lambda row: row[0])]


def check(built: datasets.DatasetDict, image_id_of=name_of) -> None:
    """All images and captions are there, and the pixels are right."""
    number_of = {image_id_of(i): i for i in range(COUNT)}
    seen = []
    assert list(built) == ["train", "validation", "test"]
    for part in built.values():
        for image_id, captions, cell in zip(
            part["image_id"], part["captions"], part.cast_column("image", datasets.Image(decode=False))["image"]
        ):
            i = number_of[image_id]
            seen.append(i)
            assert captions == EXPECTED[i]
            image, original = decoded(cell["bytes"]), decoded(file_of(i))
            assert image.mode == "RGB" and cell["path"] is None
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(original.convert("RGB")))
            assert difference.max() < (30 if original.mode == "L" and original.format == "JPEG" else 1)
    assert sorted(seen) == list(range(COUNT))


def test_folder_with_lists_of_captions(tmp_path):
    write_images(tmp_path / "data")
    jsonl(
        tmp_path / "data" / "metadata.jsonl",
        [{"file_name": name_of(i), "captions": CAPTIONS[i]} for i in range(COUNT)],
    )
    built = build(tmp_path / "data", tmp_path / "out")
    check(built)
    assert "Made from `data`" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("column", ["caption", "text"])
def test_folder_with_one_row_a_caption(tmp_path, column):
    write_images(tmp_path / "data")
    rows = [{"file_name": name_of(i), column: caption} for i, caption in one_row_a_caption()]
    jsonl(tmp_path / "data" / "metadata.jsonl", rows)
    check(build(tmp_path / "data", tmp_path / "out"))


@pytest.mark.parametrize("where", ["root", "parts"])
@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev"])
def test_folder_with_splits(tmp_path, validation, where):
    def split_of(i):
        return ("train", "train", validation, "test")[i % 4]

    write_images(tmp_path / "data", lambda i: f"{split_of(i)}/{name_of(i)}")
    if where == "root":
        rows = [{"file_name": f"{split_of(i)}/{name_of(i)}", "captions": CAPTIONS[i]} for i in range(COUNT)]
        jsonl(tmp_path / "data" / "metadata.jsonl", rows)
    else:
        parts = defaultdict(list)
        for i in range(COUNT):
            parts[split_of(i)].append({"file_name": name_of(i), "captions": CAPTIONS[i]})
        for split, rows in parts.items():
            jsonl(tmp_path / "data" / split / "metadata.jsonl", rows)
    built = build(tmp_path / "data", tmp_path / "out")
    check(built, lambda i: f"{split_of(i)}/{name_of(i)}")
    assert built["test"]["image_id"] == [f"test/{name_of(i)}" for i in range(COUNT) if i % 4 == 3]
    assert built["validation"].num_rows == sum(i % 4 == 2 for i in range(COUNT))


def write_table(path: Path, header: list[str], rows: list[tuple]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header, *rows])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths(tmp_path, suffix):
    write_images(tmp_path / "data")
    path = tmp_path / "data" / f"table.{suffix}"
    header, rows = ["image_path", "caption"], [(name_of(i), caption) for i, caption in one_row_a_caption()]
    if suffix in ("csv", "tsv"):
        write_table(path, header, rows)
    elif suffix == "jsonl":
        jsonl(path, [dict(zip(header, row)) for row in rows])
    else:
        pq.write_table(pa.table(dict(zip(header, zip(*rows)))), path)
    check(build(path, tmp_path / "out"))


def test_several_tables_with_splits_in_their_names(tmp_path):
    write_images(tmp_path / "data")
    rows = [(name_of(i), caption) for i, caption in one_row_a_caption()]
    images = [name_of(i) for i in range(COUNT)]
    for name, wanted in (("my_train.csv", images[:20]), ("val.csv", images[20:25]), ("test-1.csv", images[25:])):
        write_table(tmp_path / "data" / name, ["file_name", "text"], [row for row in rows if row[0] in wanted])
    built = build(tmp_path / "data" / "*.csv", tmp_path / "out")
    check(built)
    assert sorted(built["validation"]["image_id"]) == sorted(images[20:25]) and built["test"].num_rows == 5


def test_a_split_column(tmp_path):
    write_images(tmp_path / "data")
    splits = ["restval", "train", "val", "test"]
    rows = [(name_of(i), caption, splits[i % 4]) for i, caption in one_row_a_caption()]
    write_table(tmp_path / "data" / "all.csv", ["path", "caption", "split"], rows)
    built = build(tmp_path / "data" / "all.csv", tmp_path / "out")
    check(built)
    assert set(built["test"]["image_id"]) == {name_of(i) for i in range(3, COUNT, 4)}
    assert built["train"].num_rows == 16


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_parquet_with_images_and_ids(tmp_path, kind):
    rows = one_row_a_caption()
    cells = [file_of(i) for i, _ in rows]
    if kind == "struct":
        images = pa.array([{"bytes": cell, "path": "/etc/passwd"} for cell in cells])
    else:
        images = pa.array(cells, type=pa.binary() if kind == "binary" else pa.large_binary())
    table = {"photo": images, "caption": [caption for _, caption in rows], "image_id": [1000 + i for i, _ in rows]}
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    check(build(tmp_path / "data.parquet", tmp_path / "out"), lambda i: str(1000 + i))


def test_images_without_any_name_are_told_apart_by_content(tmp_path):
    rows = one_row_a_caption()
    table = {"image": [file_of(i) for i, _ in rows], "caption": [caption for _, caption in rows]}
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    built = build(tmp_path / "data.parquet", tmp_path / "out")
    captions = [captions for part in built.values() for captions in part["captions"]]
    assert sorted(captions) == sorted(EXPECTED)


def test_a_folder_of_tables_needs_a_glob(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("path,caption\na.jpg,x\n")
    with pytest.raises(ValueError, match=r"column path holds .*expected images; .*data/\*.csv"):
        build(tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize("names", ["shard-{}", "{}/shard"])
@pytest.mark.parametrize("source", ["", "**/*.tar"])
def test_tars(tmp_path, source, names):
    # Keys start again in every tar.
    for tar in range(3):
        files = [file for i in range(tar * 10, tar * 10 + 10) for file in sample(i, f"./{i % 10:04d}")]
        write_tar(
            tmp_path / "data" / f"{names.format(tar)}.tar",
            [("./", b""), ("./._0000.jpg", b"x"), ("README.md", b"x"), *files],
        )
    built = build(tmp_path / "data" / source, tmp_path / "out")
    check(built, lambda i: f"{names.format(i // 10)}/{i % 10:04d}")


@pytest.mark.parametrize("description", ["txt", "caption"])
@pytest.mark.parametrize("names", ["{}-0.tar", "{}/0.tar"])
def test_tars_with_splits_and_one_caption(tmp_path, description, names):
    for split, numbers in (("train", range(20)), ("val", range(20, 25)), ("test", range(25, 30))):
        files = [file for i in numbers for file in sample(i, f"{i:04d}", description)]
        write_tar(tmp_path / "data" / names.format(split), files)
    built = build(tmp_path / "data", tmp_path / "out")
    assert built["validation"]["captions"] == [[EXPECTED[i][0]] for i in range(20, 25)]
    assert built["test"]["image_id"] == [f"{names.format('test')[:-4]}/{i:04d}" for i in range(25, 30)]


def test_tars_of_one_name_in_two_folders(tmp_path):
    for i, split in enumerate(("train", "validation", "test")):
        write_tar(tmp_path / "data" / split / "00000.tar", sample(i, "000"))
    built = build(tmp_path / "data", tmp_path / "out")
    assert {name: part["image_id"][:] for name, part in built.items()} == {
        name: [f"{name}/00000/000"] for name in ("train", "validation", "test")
    }


def test_tars_with_one_sample_a_caption_and_an_id(tmp_path):
    files = []
    for k, (i, caption) in enumerate(one_row_a_caption()):
        described = json.dumps({"caption": caption, "image_id": name_of(i)}).encode()
        files += [(f"{k:05d}.{('jpg', 'png', 'webp')[i % 3]}", file_of(i)), (f"{k:05d}.json", described)]
    write_tar(tmp_path / "data.tar", files)
    check(build(tmp_path / "data.tar", tmp_path / "out"))


def loaded(rows: list[int]) -> datasets.Dataset:
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "sentence": datasets.List(datasets.Value("string")),
            "key": datasets.Value("string"),
            "kind": datasets.Value("int64"),
        }
    )
    cells = {
        "photo": [{"bytes": file_of(i), "path": None} for i in rows],
        "sentence": [CAPTIONS[i] for i in rows],
        "key": [name_of(i) for i in rows],
        "kind": [i // 2 for i in rows],
    }
    return datasets.Dataset.from_dict(cells, features=features)


NAMED = ["--image_column", "photo", "--caption_column", "sentence", "--id_column", "key", "--group_column", "kind"]


def test_dataset_on_disk(tmp_path):
    parts = {"train": loaded(list(range(20))), "dev": loaded(list(range(20, 30)))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    built = build(tmp_path / "data", tmp_path / "out", *NAMED, "--data_license", "cc0-1.0", "--test_share", "0.2")
    check(built)
    held_out = [*built["validation"]["image_id"], *built["test"]["image_id"]]
    assert sorted(held_out) == [name_of(i) for i in range(20, 30)] and len(built["train"]) == 20
    assert built["test"]["group_id"] and all(kind.isdigit() for kind in built["train"]["group_id"])
    assert not set(built["test"]["group_id"]) & set(built["train"]["group_id"])
    assert built["train"].info.license == "cc0-1.0" and "license: cc0-1.0" in (tmp_path / "out/README.md").read_text()
    # Its own output is a source too, whatever its columns are called now.
    again = build(tmp_path / "out", tmp_path / "again")
    assert again["test"]["image_id"] == built["test"]["image_id"]
    assert again["train"].data.column("image").equals(built["train"].data.column("image"))


@pytest.mark.parametrize("form", ["csv", "disk", "tar"])
def test_a_split_group_is_read_from_every_form_and_not_written(tmp_path, form):
    if form == "csv":
        write_images(tmp_path / "data")
        rows = [{"file_name": name_of(i), "caption": CAPTIONS[i][0], "film": i // 5} for i in range(COUNT)]
        jsonl(tmp_path / "data" / "metadata.jsonl", rows)
        source, named = tmp_path / "data", []
    elif form == "disk":
        loaded(list(range(COUNT))).add_column("film", [i // 5 for i in range(COUNT)]).save_to_disk(tmp_path / "data")
        source, named = tmp_path / "data", NAMED[:-2]
    else:
        source, named = tmp_path / "data.tar", []
        described = [json.dumps({"caption": CAPTIONS[i][0], "film": i // 5}).encode() for i in range(COUNT)]
        files = [((f"{i:03}.jpg", file_of(i)), (f"{i:03}.json", described[i])) for i in range(COUNT)]
        write_tar(source, [file for pair in files for file in pair])
    built = build(source, tmp_path / "out", *named, "--split_group_column", "film", "--test_share", "0.3")
    assert "group_id" not in built["train"].column_names and "film" not in built["train"].column_names
    films = [{int(re.search(r"\d+", name)[0]) // 5 for name in part["image_id"]} for part in built.values()]
    assert sum(map(len, films)) == len(set.union(*films)) == COUNT // 5
    with pytest.raises(ValueError, match=r"no column z \(--split_group_column\)|no column z"):
        build(source, tmp_path / "none", *named, "--split_group_column", "z")


def test_one_dataset_on_disk_and_a_folder_in_the_hubs_layout(tmp_path):
    loaded(list(range(COUNT))).save_to_disk(tmp_path / "one")
    check(build(tmp_path / "one", tmp_path / "out1", *NAMED, "--test_share", "0.3"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, rows in (("train", range(20)), ("validation", range(20, 25)), ("test", range(25, 30))):
        loaded(list(rows)).to_parquet(str(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"))
    built = build(tmp_path / "hub", tmp_path / "out2", *NAMED)
    check(built)
    assert built["test"].num_rows == 5


def test_dataset_of_the_hub(tmp_path, tmp_path_factory, hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    dataset = datasets.DatasetDict(photos=loaded(list(range(COUNT))))
    dataset.push_to_hub("someone/photos")
    check(build("someone/photos", tmp_path / "out", *NAMED, "--test_share", "0.3"))
    assert "Made from `someone/photos`" in (tmp_path / "out" / "README.md").read_text()
    dataset["more"] = dataset["photos"]
    dataset.push_to_hub("someone/photos")
    with pytest.raises(ValueError, match="splits photos, more"):
        build("someone/photos", tmp_path / "out2", *NAMED)


def test_splits_do_not_depend_on_order_or_other_images(tmp_path):
    rows = [{"file_name": name_of(i), "caption": f"caption {i}"} for i in range(COUNT)]
    turned = build(simple(tmp_path / "b", rows[::-1]), tmp_path / "out_b")
    fewer = build(simple(tmp_path / "c", rows[: COUNT // 2]), tmp_path / "out_c", "--test_share", "0.3")
    built = build(simple(tmp_path / "a", rows), tmp_path / "out_a")
    for split in built:
        assert built[split]["image_id"] == turned[split]["image_id"][::-1]
    assert set(fewer["test"]["image_id"]) >= {name_of(i) for i in range(15)} & set(built["test"]["image_id"])


def test_captions_are_kept_once_and_in_order(tmp_path):
    rows = [{"file_name": name_of(i), "captions": ["b", " a\n", "b", "", "a", "c"]} for i in range(COUNT)]
    built = build(simple(tmp_path / "data", rows), tmp_path / "out")
    assert built["train"]["captions"][0] == ["b", "a", "c"]


def test_a_csv_cell_may_hold_a_list_of_captions(tmp_path):
    cells = [["a cat", "a pet"], "[a cat", "[1, 2]", "a dog"]
    rows = [(name_of(i), json.dumps(cell) if isinstance(cell, list) else cell) for i, cell in enumerate(cells)]
    write_images(tmp_path / "data")
    write_table(tmp_path / "data" / "rows.csv", ["path", "captions", "split"], [
        (*row, split) for row, split in zip(rows, ("train", "train", "validation", "test"))
    ])  # fmt: skip
    built = build(tmp_path / "data" / "rows.csv", tmp_path / "out")
    assert [captions for part in built.values() for captions in part["captions"]] == [
        ["a cat", "a pet"], ["[a cat"], ["[1, 2]"], ["a dog"],
    ]  # fmt: skip


def test_pushed_it_loads_and_streams_with_its_licence(tmp_path, hub):
    """Over real HTTP; what a project pushed is a source again, its licence and ids kept."""
    write_images(tmp_path / "data")
    rows = [{"file_name": name_of(i), "captions": CAPTIONS[i]} for i in range(COUNT)]
    jsonl(tmp_path / "data" / "metadata.jsonl", rows)
    built = build(tmp_path / "data", tmp_path / "out", "--data_license", "cc-by-4.0", "--push_to_hub", "user/mine")
    card = hub.files("datasets/user/mine")["README.md"].decode()
    assert "license: cc-by-4.0" in card and "| train |" in card and str(tmp_path) not in card
    loaded = datasets.load_dataset("user/mine")
    for split, part in built.items():
        assert loaded[split]["image_id"] == part["image_id"] and loaded[split]["captions"] == part["captions"]
        streamed = datasets.load_dataset("user/mine", split=split, streaming=True)
        assert [row["image_id"] for row in streamed] == part["image_id"]
    again = build("user/mine", tmp_path / "again")
    assert again["train"].info.license == "cc-by-4.0" and again["test"]["image_id"] == built["test"]["image_id"]
