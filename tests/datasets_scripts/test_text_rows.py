"""own_data with texts that have no image and images that have no caption."""

import json
import re

import datasets
import pytest
from image_files import encoded, picture

from datasets_scripts import own_data
from rows.checks import check_dataset
from rows.columns import partners


COUNT = 30


def write_photos(folder, captioned=()):
    folder.mkdir(parents=True)
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
    for i in captioned:
        (folder / f"{i}.txt").write_text(f"photo number {i}\n")
    return folder


def build(source, output, *options):
    own_data.main(["--dataset_name", str(source), "--output_dir", str(output), *map(str, options)])
    built = datasets.load_from_disk(output)
    for split, part in built.items():
        check_dataset(part, split, None)
    return built


def contents(built):
    """All texts without an image, and the number of images with and without captions."""
    texts, images = [], []
    for part in built.values():
        has_image, counts = partners(part)
        images += [int(count) for has, count in zip(has_image, counts) if has]
        texts += [own[0] for own, has in zip(part["captions"], has_image) if not has]
    return sorted(texts), sum(count == 0 for count in images), sum(count > 0 for count in images)


def test_a_folder_of_images_and_a_log_of_queries(tmp_path, capsys):
    source = write_photos(tmp_path / "photos")
    (tmp_path / "queries.txt").write_text(
        "red car\n\n  two dogs  \nred car\n" + "".join(f"q {i}\n" for i in range(30))
    )
    options = ["--keep_uncaptioned", "--validation_share", "0.3", "--test_share", "0.3"]
    built = build(source, tmp_path / "data", "--texts", tmp_path / "queries.txt", *options)
    texts, lonely, paired = contents(built)
    assert texts == sorted(["red car", "two dogs", *(f"q {i}" for i in range(30))]) and (lonely, paired) == (30, 0)
    said = capsys.readouterr().out
    assert "32 different texts in queries.txt" in said
    assert re.search(
        r"^test and validation taken from 62 rows by .*\ntrain: \d+ rows, validation: \d+ rows, ", said, re.M
    )
    for part in built.values():  # what is held back is of both kinds: agreement needs them
        has_image, _ = partners(part)
        assert has_image.any() and not has_image.all()
    card = (tmp_path / "data" / "README.md").read_text()
    assert "null for a text without an image" in card and "none or more strings" in card


@pytest.mark.parametrize("table", ["captions.csv", "metadata.jsonl"])
def test_images_that_no_row_of_the_folders_table_names_are_kept_too(tmp_path, capsys, table):
    source, named = write_photos(tmp_path / "photos"), {f"{i}.png": f"photo {i}" for i in range(20)}
    if table == "metadata.jsonl":
        lines = [json.dumps({"file_name": image, "text": text}) for image, text in named.items()]
    else:
        lines = ["file_name,text", *(f"{image},{text}" for image, text in named.items())]
    (source / table).write_text("\n".join(lines))
    assert contents(build(source, tmp_path / "data")) == ([], 0, 20)
    said = capsys.readouterr().out
    assert "10 images of the folder have no row and stay out (--keep_uncaptioned takes them)" in said
    kept = build(source, tmp_path / "kept", "--keep_uncaptioned")
    assert contents(kept) == ([], 10, 20)
    assert sorted(row for part in kept.values() for row in part["image_id"]) == sorted(
        f"{i}.png" for i in range(COUNT)
    )
    assert "10 images of the folder have no row: taken without a caption" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["queries.txt", "log.csv"])
def test_a_file_of_texts_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match=f"--texts {name}: there is no such file"):
        build("photos", "data", "--keep_uncaptioned", "--texts", name)


def test_without_the_option_the_message_names_it_with_the_count(tmp_path):
    source = write_photos(tmp_path / "photos", captioned=range(25))
    with pytest.raises(ValueError, match="5 images have no caption: keep them with --keep_uncaptioned"):
        build(source, tmp_path / "data")
    with pytest.raises(ValueError, match="--keep_uncaptioned takes the 30 images as they are"):
        build(write_photos(tmp_path / "bare"), tmp_path / "other")
    assert contents(build(source, tmp_path / "kept", "--keep_uncaptioned")) == ([], 5, 25)
    assert contents(build(source, tmp_path / "skipped", "--skip_broken")) == ([], 0, 25)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "dataset"])
def test_texts_of_a_column(tmp_path, form):
    source = write_photos(tmp_path / "photos", captioned=range(COUNT))
    texts = [f"query {i}" for i in range(20)] + ["photo number 3"]
    table = datasets.Dataset.from_dict({"id": list(map(str, range(21))), "query": texts})
    path = tmp_path / f"log.{form}"
    if form == "csv":
        table.to_csv(path, index=False)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif form == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    found, lonely, paired = contents(build(source, tmp_path / "data", "--texts", path))
    assert found == sorted(texts[:20]) and (lonely, paired) == (0, 30)  # a caption of an image is no text of its own
    assert contents(build(source, tmp_path / "named", "--texts", path, "--text_column", "id"))[0] == sorted(
        table["id"]
    )
    with pytest.raises(ValueError, match="has no column text; it has id, query. Name one with --text_column"):
        build(source, tmp_path / "wrong", "--texts", path, "--text_column", "text")


def test_what_cannot_be_read_is_refused(tmp_path):
    source = write_photos(tmp_path / "photos", captioned=range(COUNT))
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\n")
    latin.write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"--texts .*empty.txt has no text"):
        build(source, tmp_path / "a", "--texts", empty)
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 .* --encoding latin-1"):
        build(source, tmp_path / "b", "--texts", latin)
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        build(source, tmp_path / "c", "--texts", tmp_path / "typo.txt")
    assert contents(build(source, tmp_path / "d", "--texts", latin, "--encoding", "latin-1"))[0] == ["café"]
    assert not any((tmp_path / name).exists() for name in "abc")


def test_the_splits_of_a_source_stay_and_texts_are_trained_on(tmp_path):
    for split in ("train", "val", "test"):
        write_photos(tmp_path / "photos" / split, captioned=range(COUNT))
        for i in range(COUNT):  # other pictures in each
            file = tmp_path / "photos" / split / f"{i}.png"
            file.write_bytes(encoded(picture(1000 * len(split) + i + 50 * (split == "test")), "PNG"))
    (tmp_path / "queries.txt").write_text("one\ntwo\nphoto number 3\n")
    built = build(tmp_path / "photos", tmp_path / "data", "--texts", tmp_path / "queries.txt")
    assert [len(built[split]) for split in ("train", "validation", "test")] == [32, 30, 30]
