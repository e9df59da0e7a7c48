"""Datasets on a Hub, in the forms that people have them, through the whole program."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from image_files import encoded, picture, write_tar

from datasets_scripts import own_data
from datasets_scripts.opening import open_dataset


COUNT = 40  # enough that no split is empty


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def push(folder: Path, name: str = "data", branch: str | None = None) -> str:
    repo = f"user/{name}"
    HfApi().create_repo(repo, repo_type="dataset", exist_ok=True)
    if branch is not None:
        HfApi().create_branch(repo, branch=branch, repo_type="dataset")
    HfApi().upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder, revision=branch)
    return repo


def rows_of(repo: str, output: Path, *options) -> dict[str, list[str]]:
    own_data.main(["--dataset_name", repo, "--output_dir", str(output), *map(str, options)])
    made = datasets.load_from_disk(output)
    return {row["image_id"]: row["captions"] for part in made.values() for row in part.remove_columns("image")}


def table_of(captions: pa.Array, offset: int = 0, **columns) -> pa.Table:
    images = [encoded(picture(i + offset)) for i in range(len(captions))]
    return pa.table({"image": images, "caption": captions, **columns})


def mixed_tar(path: Path, first: int) -> None:
    """Twelve samples, every third .png, .JPG or .jpg; captions in .json, .txt or both; one failed to download."""
    files = []
    for i in range(first, first + 12):
        image = [("png", encoded(picture(i), "PNG")), ("JPG", encoded(picture(i))), ("jpg", encoded(picture(i)))]
        files.append((f"{i}.{image[i % 3][0]}", image[i % 3][1]))
        files += [(f"{i}.txt", f"thing {i}".encode())] if i % 4 != 1 else []
        described = json.dumps({"caption": f"thing {i}", "status": "success"}).encode()
        files += [(f"{i}.json", described)] if i % 4 != 2 else []
    files += [(f"{first + 50}.json", json.dumps({"status": "failed_to_download"}).encode())]
    write_tar(path, files)


def test_mixed_tars(tmp_path, hub, capsys):
    for shard in range(2):
        mixed_tar(tmp_path / "tars" / f"train-{shard}.tar", 12 * shard)
    mixed_tar(tmp_path / "tars" / "validation.tar", 24)
    repo = push(tmp_path / "tars")
    expected = {f"train-{i // 12}/{i}": [f"thing {i}"] for i in range(24)}
    of_validation = {f"validation/{i}": [f"thing {i}"] for i in range(24, 36)}
    assert rows_of(repo, tmp_path / "out") == {**expected, **of_validation}
    assert set(datasets.load_from_disk(tmp_path / "out")["train"]["image_id"]) == set(expected)
    assert "3 of them failed in the source" in capsys.readouterr().out
    assert rows_of(repo, tmp_path / "one", "--split", "train") == expected
    first = {f"train-0/{i}": [f"thing {i}"] for i in range(10)}
    assert rows_of(repo, tmp_path / "few", "--split", "train", "--rows", "10") == first
    with pytest.raises(ValueError, match="--split dev: expected one of train, validation"):
        rows_of(repo, tmp_path / "none", "--split", "dev")


def test_the_folder_of_img2dataset_as_it_is(tmp_path, hub):
    """A table for each tar, of addresses and captions: the images are in the tars."""
    for shard in range(3):
        mixed_tar(tmp_path / "out" / f"{shard:05d}.tar", 12 * shard)
        table = pa.table(
            {"url": [f"http://x/{i}" for i in range(12)], "caption": ["x"] * 12, "status": ["success"] * 12}
        )
        pq.write_table(table, tmp_path / "out" / f"{shard:05d}.parquet")
        (tmp_path / "out" / f"{shard:05d}_stats.json").write_text('{"count": 12}')
    expected = {f"{i // 12:05d}/{i}": [f"thing {i}"] for i in range(36)}
    repo = push(tmp_path / "out")
    assert rows_of(repo, tmp_path / "made") == expected
    for name in (repo, str(tmp_path / "out")):
        streamed = open_dataset(name, streaming=True)["train"]
        assert {row["image_id"]: row["captions"] for row in streamed} == expected
    (tmp_path / "tables").mkdir()
    rows = table_of(pa.array([f"thing {i}" for i in range(COUNT)]))
    pq.write_table(rows, tmp_path / "tables" / "00000.parquet")  # of that name, and with its images
    assert len(rows_of(push(tmp_path / "tables", "tables"), tmp_path / "tabled")) == COUNT


def test_configuration_revision_split_and_rows(tmp_path, hub):
    for language in ("en", "de"):
        for split, offset in (("train", 0), ("test", COUNT)):
            captions = pa.array([f"{language} {i}" for i in range(COUNT)])
            path = tmp_path / "new" / language / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table_of(captions, offset), path)
    configs = [{"config_name": name, "data_dir": name} for name in ("en", "de")]
    (tmp_path / "new" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    (tmp_path / "old").mkdir()
    pq.write_table(table_of(pa.array([f"old {i}" for i in range(COUNT)])), tmp_path / "old" / "train.parquet")
    repo = push(tmp_path / "old")
    push(tmp_path / "new", branch="languages")

    def captions(output: str, *options) -> set[str]:
        return {caption for row in rows_of(repo, tmp_path / output, *options).values() for caption in row}

    assert captions("a") == {f"old {i}" for i in range(COUNT)}
    options = ["--revision", "languages", "--dataset_config_name", "de"]
    assert captions("b", *options) == {f"de {i}" for i in range(COUNT)}
    assert len(rows_of(repo, tmp_path / "c", *options)) == 2 * COUNT
    assert len(rows_of(repo, tmp_path / "d", *options, "--split", "test", "--rows", "15")) == 15
    for wrong, message in (
        (["--revision", "languages"], "has the configurations en, de; name one by --dataset_config_name$"),
        ([*options, "--split", "dev"], "Unknown split .dev.*train"),
        (["--revision", "none"], "Revision 'none' doesn't exist"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            rows_of(repo, tmp_path / "e", *wrong)


@pytest.mark.parametrize("kind", ["large_string", "string_view"])
def test_texts_of_polars(tmp_path, hub, kind):
    captions = pa.array([f"x {i}" for i in range(COUNT)], getattr(pa, kind)())
    (tmp_path / "data").mkdir()
    pq.write_table(table_of(captions, key=pa.array([str(i) for i in range(COUNT)])), tmp_path / "data/train.parquet")
    rows = rows_of(push(tmp_path / "data"), tmp_path / "out", "--id_column", "key")
    assert rows == {str(i): [f"x {i}"] for i in range(COUNT)}


def test_classes_lists_of_images_and_captions_in_objects(tmp_path, hub):
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(COUNT)]
    rows = datasets.Dataset.from_dict(
        {
            "images": [[cell] for cell in cells],
            "label": [i % 2 for i in range(COUNT)],
            "key": [str(i) for i in range(COUNT)],
            "sentences": [[{"raw": f"a {i}", "tokens": ["a"]}, {"raw": f"b {i}", "tokens": []}] for i in range(COUNT)],
        }
    )
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    rows = rows.cast_column("label", datasets.ClassLabel(names=["golden_retriever", "tabby"]))
    rows.push_to_hub("user/data")
    options = ["--id_column", "key", "--caption_column"]
    found = rows_of("user/data", tmp_path / "a", *options, "sentences.raw")
    assert found == {str(i): [f"a {i}", f"b {i}"] for i in range(COUNT)}
    found = rows_of("user/data", tmp_path / "b", *options, "label", "--caption_template", "a photo of a {}")
    assert found == {str(i): [f"a photo of a {('golden retriever', 'tabby')[i % 2]}"] for i in range(COUNT)}


def test_a_script_is_not_run_and_named_in_one_sentence(tmp_path, hub):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"by a script \(data.py\), which is not run; .* refs/convert/parquet"):
        rows_of(push(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "mark").exists()
