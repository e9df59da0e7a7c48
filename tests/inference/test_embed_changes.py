"""Vectors of what has changed meanwhile, and folders that hold what is not ours."""

import shutil

import datasets
import pytest
from conftest import make_rows
from vector_folders import COUNT, assert_close, contents, expected, run

from inference import compare, embed, export, search, web, web_page
from inference.sources import ImageFolder, open_images
from inference.vectors import read_facts
from rows.command_line import run_program


def of_dataset(part, ids):
    return {own: image for own, image in zip(ids, part["image"])}


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_datasets_changed_and_shifted_rows_are_embedded_anew(models, tmp_path, with_ids):
    before, other = make_rows(5, seed=1), make_rows(5, seed=9)
    after = before.select([1, 2, 3, 4]).map(
        lambda row, i: {"image": other[0]["image"]} if i == 2 else {}, with_indices=True
    )
    for name, part in (("before", before), ("after", after)):
        kept = part if with_ids else part.remove_columns("image_id")
        datasets.DatasetDict({"train": kept}).save_to_disk(tmp_path / name)
    run(models / "student", tmp_path / "before", tmp_path / "vectors")
    run(models / "student", tmp_path / "after", tmp_path / "vectors")
    ids = after["image_id"] if with_ids else [f"train/{i}" for i in range(4)]
    assert_close(contents(tmp_path / "vectors"), expected(models / "student", of_dataset(after, ids)))


def test_a_backup_among_pictures_makes_no_dataset(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "pictures")
    for name in ("backup.tar", "table.parquet"):
        (folder / name).write_bytes(b"junk")
    source = open_images(str(folder))
    assert isinstance(source, ImageFolder) and len(source.ids) == COUNT


@pytest.mark.parametrize("content", ["{}", "[]", '{"complete": true}'])
def test_another_programs_index_is_refused(models, images, tmp_path, capsys, content):
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "index.json").write_text(content)
    for main, options in ((embed.main, ["--images", images, "--output_dir"]), (search.main, ["a cat", "--index"])):
        arguments = ["--model_name_or_path", models / "student", *options, tmp_path / "vectors"]
        with pytest.raises(SystemExit, match="index.json is not of inference.embed"):
            run_program(lambda main=main, arguments=arguments: main(list(map(str, arguments))))
    assert (tmp_path / "vectors" / "index.json").read_text() == content


def test_only_our_own_half_written_files_go(models, images, tmp_path):
    output = tmp_path / "vectors"
    run(models / "student", images, output)
    for name in ("mine.part", "images-00007.parquet.part", "images-00007.npy.part"):
        (output / name).write_bytes(b"half")
    (tmp_path / "queries.txt").write_bytes("\ufeffa cat\r\n\r\na\x0cdog\n".encode())
    run(models / "student", images, output, "--texts", tmp_path / "queries.txt")
    assert [path.name for path in output.glob("*.part")] == ["mine.part"]
    texts = {"1": "a cat", "3": "a\x0cdog"}
    assert_close(contents(output, "texts"), expected(models / "student", texts, "text"))
    assert read_facts(output)["texts"] == 2


def test_cut_weights_are_one_sentence_in_every_program(models, images, tmp_path, capsys):
    cut = shutil.copytree(models / "student", tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    datasets.DatasetDict({"test": make_rows(4)}).save_to_disk(tmp_path / "data")
    new = ["--output_dir", tmp_path / "out"]
    one = ["--model_name_or_path", cut]
    calls = {
        search: [*one, "--images", images, "a cat", "--cache_dir", tmp_path / "cache"],
        embed: [*one, "--images", images, *new],
        export: [*one, *new],
        web: [*one, "--images", images, *new],
        compare: ["--models", cut, "--dataset_name", tmp_path / "data", *new],
    }
    for program, arguments in calls.items():
        with pytest.raises(SystemExit) as ended:
            run_program(lambda program=program, arguments=arguments: program.main(list(map(str, arguments))))
        said = f"{ended.value.code} {capsys.readouterr().err}"
        assert "error: " in said and "not fully covered" in said and "Traceback" not in said, program
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("opset", [11, 17, 99, -1])
def test_an_opset_that_torch_does_not_write_is_refused(models, tmp_path, capsys, opset):
    with pytest.raises(SystemExit):
        export.main(
            [
                "--model_name_or_path",
                str(models / "student"),
                "--output_dir",
                str(tmp_path / "out"),
                f"--opset={opset}",
            ]
        )
    assert f"--opset {opset}: expected 18 to 21" in capsys.readouterr().err


def test_a_page_is_not_written_among_other_files(tmp_path):
    stored, site = tmp_path / "stored", tmp_path / "site"
    (stored / "data").mkdir(parents=True)
    (stored / "data" / "site.json").write_text("{}")
    site.mkdir()
    (site / "README.md").write_text("mine")
    with pytest.raises(SystemExit, match="holds something else than a site"):
        web_page.main([str(stored), str(site)])
    assert [path.name for path in site.iterdir()] == ["README.md"] and (site / "README.md").read_text() == "mine"
