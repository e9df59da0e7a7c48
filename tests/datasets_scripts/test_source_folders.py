"""Folders of images whose captions stand in tables, beside each image, or in the folders' names."""

import json
from pathlib import Path

import datasets
import pytest
from image_files import picture

from datasets_scripts import own_data
from datasets_scripts.source_folders import list_images


COUNT = 12


def write_images(folder: Path, names) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name)


def rows_of(source: Path, output: Path, *options: str) -> dict[str, list[str]]:
    own_data.main(["--dataset_name", str(source), "--output_dir", str(output), *options])
    made = datasets.load_from_disk(output)
    return {row["image_id"]: row["captions"] for part in made.values() for row in part.remove_columns("image")}


def test_images_are_listed_in_order_without_what_is_hidden(tmp_path):
    write_images(tmp_path, ["b/2.png", "a.JPG", ".hidden/1.png", "b/.3.png", "b/c/4.webp"])
    (tmp_path / "notes.txt").touch()
    assert [path.as_posix() for path in list_images(tmp_path)] == ["a.JPG", "b/2.png", "b/c/4.webp"]


@pytest.mark.parametrize("how", ["txt", "json", "both"])
def test_captions_beside_each_image(tmp_path, how):
    """As img2dataset writes files, in folders of 10,000, with a table of its own beside them."""
    names = [f"0000{i % 2}/{i:09d}.jpg" for i in range(COUNT)]
    write_images(tmp_path / "data", names)
    for i, name in enumerate(names):
        if how != "json":
            (tmp_path / "data" / name).with_suffix(".txt").write_text(f"thing {i}")
        if how != "txt":
            described = {"caption": f"thing {i}", "status": "success", "key": f"{i:09d}"}
            (tmp_path / "data" / name).with_suffix(".json").write_text(json.dumps(described))
    failed = {"caption": "gone", "status": "failed_to_download"}
    (tmp_path / "data" / "00000" / "000000099.json").write_text(json.dumps(failed))
    (tmp_path / "data" / "00000_stats.json").write_text("{}")
    assert rows_of(tmp_path / "data", tmp_path / "out") == {name: [f"thing {i}"] for i, name in enumerate(names)}


def test_a_table_among_the_images_is_found_and_named(tmp_path, capsys):
    write_images(tmp_path / "data", [f"{i}.jpg" for i in range(COUNT + 1)])
    (tmp_path / "data" / "captions.txt").write_text(
        "image,caption\n" + "".join(f"{i}.jpg,x {i}\n" for i in range(COUNT))
    )
    assert rows_of(tmp_path / "data", tmp_path / "out") == {f"{i}.jpg": [f"x {i}"] for i in range(COUNT)}
    said = capsys.readouterr().out
    assert "the captions are taken from captions.txt" in said and "1 image of the folder has no row" in said
    assert "--keep_uncaptioned takes them" in said


def test_several_tables_are_taken_only_where_their_names_are_splits(tmp_path, capsys):
    names = [f"{i}.jpg" for i in range(COUNT)]
    write_images(tmp_path / "data", names)
    for k, table in enumerate(("train.csv", "val.csv", "test.csv")):
        lines = [f"{name},x\n" for name in names[k::3]]
        (tmp_path / "data" / table).write_text("path,caption\n" + "".join(lines))
    assert set(rows_of(tmp_path / "data", tmp_path / "out")) == set(names)
    assert "train -> train, val -> validation" in capsys.readouterr().out
    (tmp_path / "data" / "other.csv").write_text("path,caption\n0.jpg,y\n")
    with pytest.raises(ValueError, match=r"several tables \(other.csv, test.csv, train.csv, val.csv\): name the one"):
        rows_of(tmp_path / "data", tmp_path / "out2")


def test_names_of_classes_become_captions_where_a_template_says_so(tmp_path):
    names = [f"{'train' if i < 9 else 'val'}/{('golden_retriever', 'tabby-cat')[i % 2]}/{i}.jpg" for i in range(COUNT)]
    write_images(tmp_path / "data", names)
    with pytest.raises(ValueError, match=r"no captions beside.*\(golden_retriever, tabby-cat\).*--caption_template"):
        rows_of(tmp_path / "data", tmp_path / "out")
    rows = rows_of(tmp_path / "data", tmp_path / "out", "--caption_template", "a photo of a {}")
    assert rows == {name: [f"a photo of a {('golden retriever', 'tabby cat')[i % 2]}"] for i, name in enumerate(names)}
    made = datasets.load_from_disk(tmp_path / "out")
    assert all(name.startswith("val/") for name in made["validation"]["image_id"])


def test_images_alone_are_refused_with_all_that_would_do(tmp_path):
    write_images(tmp_path / "data", [f"{i}.jpg" for i in range(3)])
    with pytest.raises(ValueError, match="images and no captions: expected metadata.jsonl .*--caption_template"):
        rows_of(tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"), [(b"\xff\xfe\xfa", "is not UTF-8"), (b" " * (1 << 21), "2,097,152 bytes")]
)
def test_a_sidecar_that_cannot_be_read_is_named(tmp_path, text, message):
    write_images(tmp_path / "data", [f"{i}.jpg" for i in range(3)])
    (tmp_path / "data" / "1.txt").write_bytes(text)
    with pytest.raises(ValueError, match=f"1.txt.*{message}"):
        rows_of(tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize("ending", [".jpg.txt", ".TXT", ".jpg.json"])
def test_other_names_of_what_lies_beside_an_image(tmp_path, ending):
    write_images(tmp_path / "data", [f"{i}.jpg" for i in range(COUNT)])
    for i in range(COUNT):
        text = f"thing {i}" if "json" not in ending else json.dumps({"caption": f"thing {i}"})
        (tmp_path / "data" / f"{i}{ending}").write_text(text)
    expected = {f"{i}.jpg": [f"thing {i}"] for i in range(COUNT)}
    assert rows_of(tmp_path / "data", tmp_path / "out") == expected


def test_texts_of_single_images_that_lie_elsewhere_are_named(tmp_path):
    write_images(tmp_path / "data", [f"images/{i}.jpg" for i in range(COUNT)])
    (tmp_path / "data" / "captions").mkdir()
    for i in range(COUNT):
        (tmp_path / "data" / "captions" / f"{i}.txt").write_text(f"thing {i}")
    with pytest.raises(ValueError, match="has a file of text for each image, but elsewhere .*put it beside its image"):
        rows_of(tmp_path / "data", tmp_path / "out")


def test_a_folder_as_it_was_unpacked(tmp_path):
    """Names in the table lead to images in a folder beside it; COCO's captions lie among other annotations."""
    write_images(tmp_path / "flickr8k", [f"Images/{i}.jpg" for i in range(COUNT)])
    lines = [f"{i}.jpg,A cat {i} .\n" for i in range(COUNT)]
    (tmp_path / "flickr8k" / "captions.txt").write_text("image,caption\n" + "".join(lines))
    expected = {f"Images/{i}.jpg": [f"A cat {i} ."] for i in range(COUNT)}
    assert rows_of(tmp_path / "flickr8k", tmp_path / "flickr8k_out") == expected
    write_images(tmp_path / "coco", [f"train2017/{i}.jpg" for i in range(COUNT)])
    entries = [{"id": i, "file_name": f"{i}.jpg"} for i in range(COUNT)]
    captions = [{"id": i, "image_id": i, "caption": f"a thing {i}"} for i in range(COUNT)]
    (tmp_path / "coco" / "annotations").mkdir()
    for name, content in (("captions", captions), ("instances", [{"id": 1, "image_id": 0, "bbox": [0, 0, 1, 1]}])):
        path = tmp_path / "coco" / "annotations" / f"{name}_train2017.json"
        path.write_text(json.dumps({"images": entries, "annotations": content}))
    expected = {f"train2017/{i}.jpg": [f"a thing {i}"] for i in range(COUNT)}
    assert rows_of(tmp_path / "coco", tmp_path / "coco_out") == expected
    options = ["--images", str(tmp_path / "coco")]
    assert rows_of(tmp_path / "coco" / "annotations", tmp_path / "again", *options) == expected
