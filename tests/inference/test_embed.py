"""Vectors of folders, datasets and texts: against a plain computation, taken up at any kill, by one run at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import DIM, make_rows
from image_files import encoded, picture
from launching import command_line, environment
from vector_folders import COUNT, assert_close, contents, expected, of_folder, run

from inference import embed, search, vectors
from inference.sources import ImageRows
from inference.vectors import VectorIndex, read_facts, shards_of
from rows.command_line import run_program
from rows.images import to_rgb
from teachers import load_teacher
from trainers.run.locking import alone


class Counted:
    """Counts the images that a process embeds."""

    def __init__(self, monkeypatch):
        self.count, plain = 0, embed.encode

        def encode(*args):
            for item in plain(*args):
                self.count += len(item[0])
                yield item

        monkeypatch.setattr(embed, "encode", encode)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("name", ["student", "clip_alone"])
def test_vectors_are_those_of_a_plain_computation(models, images, tmp_path, name, form):
    output = tmp_path / "vectors"
    (tmp_path / "queries.txt").write_text("a red house\n\na cat\n")
    run(models / name, images, output, "--format", form, "--texts", tmp_path / "queries.txt")
    assert_close(contents(output), expected(models / name, of_folder(images)))
    texts = {"1": "a red house", "3": "a cat"}
    assert_close(contents(output, "texts"), expected(models / name, texts, "text"))
    facts = read_facts(output)
    assert (facts["images"], facts["texts"], facts["complete"]) == (COUNT, 2, True)
    assert facts["shards"]["images"] == [f"images-{i:05d}.parquet" for i in range(3)]
    assert bool(list(output.glob("*.npy"))) == (form == "npy")
    assert str(tmp_path) not in (output / "index.json").read_text()
    if form == "npy":
        assert np.load(output / "images-00000.npy").dtype == np.float16
    else:
        assert pq.read_schema(output / "images-00000.parquet").names[0] == "id"


def test_only_what_is_new_or_changed_is_embedded_wherever_the_folder_is(models, images, tmp_path, monkeypatch):
    output, counted = tmp_path / "vectors", Counted(monkeypatch)
    run(models / "student", images, output)
    assert counted.take() == COUNT
    run(models / "student", images, output)
    assert counted.take() == 0
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)  # other times of change
    shutil.copytree(output, tmp_path / "elsewhere")
    run(models / "student", tmp_path / "copy", tmp_path / "elsewhere")
    assert counted.take() == 0
    (images / "0.png").unlink()
    (images / "new.png").write_bytes(encoded(picture(99), "PNG"))
    data = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(encoded(picture(50), "PNG"))
    os.utime(images / "2.png", ns=(1, 1))
    assert data != (images / "2.png").read_bytes()
    run(models / "student", images, output)
    assert counted.take() == 2
    assert_close(contents(output), expected(models / "student", of_folder(images)))


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_copied_file_is_read_once_and_a_changed_one_too(models, images, tmp_path, monkeypatch, form):
    """To learn whether it is the same: then its new time is stored, and the next run need not ask."""
    output, read, plain = tmp_path / "vectors", [], Path.read_bytes

    def read_bytes(path):
        read.append(path.name)
        return plain(path)

    run(models / "student", images, output, "--format", form)
    before = contents(output)
    for path in images.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    size = (images / "0.png").stat().st_size
    other = next(data for i in range(50, 200) if len(data := encoded(picture(i), "PNG")) <= size)
    (images / "0.png").write_bytes(other.ljust(size, b"\0"))
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    run(models / "student", images, output, "--format", form)
    assert sorted(read) == sorted(path.name for path in images.rglob("*.png"))
    read.clear()
    run(models / "student", images, output, "--format", form)
    assert not read
    after = contents(output)
    assert after.keys() == before.keys()
    assert [own for own in before if not np.array_equal(before[own], after[own])] == ["0.png"]
    assert_close(after, expected(models / "student", of_folder(images)))


@pytest.mark.parametrize("kill", [1, 2, 3, 5, 8])
def test_killed_at_any_write_it_goes_on(models, images, tmp_path, monkeypatch, kill):
    """A kill is an exception that nothing catches, at one of the writes, in a first pass and in one that updates."""
    output, counted = tmp_path / "vectors", Counted(monkeypatch)
    plain, left = os.replace, [kill]

    def replace(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        plain(source, target)

    for change in (lambda: None, lambda: [(images / name).unlink() for name in ("0.png", "8.png", "a/5.png")]):
        change()
        left[0] = kill
        with monkeypatch.context() as patch:
            patch.setattr("rows.files.os.replace", replace)
            try:
                run(models / "student", images, output)
            except KeyboardInterrupt:
                if (read_facts(output) or {"complete": False})["complete"]:
                    assert kill == 1 and len(contents(output)) == COUNT  # killed before the first write of an update
                    continue
                encoder = load_teacher(str(models / "student"))
                with pytest.raises(ValueError, match="is not finished|has no index.json"):
                    VectorIndex.open(output, encoder, "student")
        run(models / "student", images, output)
        assert_close(contents(output), expected(models / "student", of_folder(images)))
        assert not list(output.glob("*.part"))
    run(models / "student", images, output)
    assert_close(contents(output), expected(models / "student", of_folder(images)))
    assert counted.take() < 2 * COUNT + 8


def test_several_processes_write_what_one_does(models, images, tmp_path):
    run(models / "student", images, tmp_path / "one")
    arguments = ["--model_name_or_path", models / "student", "--images", images, "--shard_rows", "2"]
    command = command_line(2, "-m", "inference.embed", *arguments, "--output_dir", tmp_path / "two")
    how = {"env": environment(threads=1), "capture_output": True, "text": True, "timeout": 300}
    (tmp_path / "two").mkdir()
    with alone(tmp_path / "two", tmp_path / "two" / vectors.LOCK):
        ran = subprocess.run(command, **how)
    assert (
        ran.returncode
        and "error: Another process is at work on" in ran.stderr
        and not shards_of(tmp_path / "two", "images")
    )
    ran = subprocess.run(command, **how)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count(f"{COUNT} images, {DIM} numbers each") == 1  # processes that know of each other
    assert_close(contents(tmp_path / "two"), {k: v.astype(np.float32) for k, v in contents(tmp_path / "one").items()})


def test_of_two_runs_on_one_folder_one_writes(models, images, tmp_path):
    output = tmp_path / "vectors"
    run(models / "student", images, output)
    (images / "0.png").unlink()
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with alone(output, output / vectors.LOCK):
        with pytest.raises(ValueError, match="Another process is at work on .*vectors: wait for it"):
            run(models / "student", images, output)
        after = {path.name: path.read_bytes() for path in output.iterdir()}
        assert after == before | {vectors.LOCK: b""}
    run(models / "student", images, output)
    assert len(contents(output)) == COUNT - 1 and not (output / vectors.LOCK).exists()


def test_a_folder_that_was_begun_and_killed_is_no_other_folder(models, images, tmp_path):
    (tmp_path / "vectors").mkdir()
    for name in (vectors.LOCK, "index.json.part"):
        (tmp_path / "vectors" / name).write_text("{")
    run(models / "student", images, tmp_path / "vectors")
    assert len(contents(tmp_path / "vectors")) == COUNT


def test_a_dataset_and_its_splits(models, tmp_path):
    rows = datasets.DatasetDict({"train": make_rows(5), "test": make_rows(4, seed=2)})
    rows.save_to_disk(tmp_path / "rows")
    run(models / "student", tmp_path / "rows", tmp_path / "vectors")
    right = {own["image_id"]: to_rgb(own["image"]) for part in rows.values() for own in part}
    assert len(right) == 9
    assert_close(contents(tmp_path / "vectors"), expected(models / "student", right))
    twice = datasets.DatasetDict({"train": make_rows(5), "test": make_rows(4)})
    with pytest.raises(ValueError, match="the image_id '0/0' twice"):
        ImageRows(twice, "rows")


def test_cut_vectors_are_the_first_numbers_of_length_one(models, images, tmp_path):
    run(models / "student", images, tmp_path / "cut", "--truncate_dim", "5")
    whole = expected(models / "student", of_folder(images))
    assert_close(contents(tmp_path / "cut"), {k: v[:5] / np.linalg.norm(v[:5]) for k, v in whole.items()})
    with pytest.raises(ValueError, match=f"--truncate_dim {DIM + 1}: the model gives {DIM} numbers"):
        run(models / "student", images, tmp_path / "more", "--truncate_dim", DIM + 1)
    assert not (tmp_path / "more").exists()


def test_vectors_are_read_once_and_the_weights_too(models, images, tmp_path, monkeypatch):
    """An update reads ids and times of the files, and no vector but of a shard that loses rows."""
    run(models / "student", images, tmp_path / "vectors")
    read, digests = [], []
    for module in (embed, search, vectors):
        for name, calls in (("read_shard", read), ("fingerprint", digests)):
            if not hasattr(module, name):
                continue
            plain = getattr(module, name)
            counted = lambda *args, plain=plain, calls=calls: (calls.append(args), plain(*args))[1]  # noqa: E731
            monkeypatch.setattr(module, name, counted)
    run(models / "student", images, tmp_path / "vectors")
    assert not read and len(digests) == 1
    encoder = load_teacher(str(models / "student"))
    search.open_vectors(tmp_path / "vectors", encoder, "student", images)
    assert [file.name for (file,) in read] == [f"images-{i:05d}.parquet" for i in range(3)] and len(digests) == 2
    read.clear()
    (images / "0.png").unlink()
    run(models / "student", images, tmp_path / "vectors")
    assert [file.name for (file,) in read] == ["images-00000.parquet"]


def test_where_nothing_has_changed_nothing_is_written(models, images, tmp_path, monkeypatch):
    """So that vectors on a disk that is only read are searched; a change is then an error of the system's."""
    output, encoder = tmp_path / "vectors", load_teacher(str(models / "student"))
    (images / "broken.png").write_bytes(b"no")
    run(models / "student", images, output)

    def state() -> dict:
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}

    before, access = state(), os.access
    run(models / "student", images, output)
    assert state() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
        patch.setattr(os, "replace", lambda *_: pytest.fail("written"))
        patch.setattr(embed, "alone", lambda *_: pytest.fail("locked"))
        index = search.open_vectors(output, encoder, "student", images)
    assert len(index) == COUNT and index.skipped.keys() == {"broken.png"} and state() == before
    (images / "broken.png").write_bytes(encoded(picture(90), "PNG"))
    assert len(search.open_vectors(output, encoder, "student", images)) == COUNT + 1


def test_another_folder_than_the_indexs_drops_nothing(models, images, tmp_path):
    run(models / "student", images, tmp_path / "vectors")
    before = contents(tmp_path / "vectors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.png").write_bytes(encoded(picture(99), "PNG"))
    with pytest.raises(ValueError, match=f"vectors of {COUNT} images, such as .*, none of which is in other"):
        run(models / "student", tmp_path / "other", tmp_path / "vectors")
    assert read_facts(tmp_path / "vectors")["complete"] and contents(tmp_path / "vectors").keys() == before.keys()


def test_broken_images_are_left_out_and_named(models, images, tmp_path, capsys):
    for name in ("broken.png", "a/cut.png"):
        (images / name).write_bytes((images / "0.png").read_bytes()[:60])
    run(models / "student", images, tmp_path / "vectors")
    said = capsys.readouterr().out
    assert "2 images could not be read and were left out, listed in index.json" in said and "  broken.png: " in said
    facts = read_facts(tmp_path / "vectors")
    assert facts["skipped"].keys() == {"broken.png", "a/cut.png"} and facts["images"] == COUNT
    assert str(tmp_path) not in json.dumps(facts)


def test_nothing_to_embed(models, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        run(models / "student", tmp_path / "empty", tmp_path / "vectors")
    assert not (tmp_path / "vectors").exists()
    (tmp_path / "empty" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="None of 1 images can be read: x.png"):
        run(models / "student", tmp_path / "empty", tmp_path / "vectors")
    assert not read_facts(tmp_path / "vectors")["complete"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--truncate_dim", "0"], "--truncate_dim 0: expected 1 or more"),
        (["--shard_rows", "0"], "--shard_rows 0: expected 1 or more"),
        (["--texts", "nothing.txt"], "--texts nothing.txt: there is no such file"),
        (["--output_dir", "/proc/vectors"], "/proc"),
        (["--output_dir", __file__], "is a file: name a folder"),
        (["--model_name_or_path", "nothing"], "nothing is no dual encoder that can be read"),
    ],
)
def test_bad_settings_are_one_sentence(models, images, tmp_path, capsys, monkeypatch, more, message):
    names = ["--model_name_or_path", str(models / "student"), "--images", str(images)]
    arguments = [*names, "--output_dir", str(tmp_path / "vectors"), *more]
    monkeypatch.setattr(sys, "argv", ["embed", *arguments])
    with pytest.raises(SystemExit) as error:
        run_program(embed.main)
    said = f"{error.value} {capsys.readouterr().err}"
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "vectors").exists()


def test_a_folder_of_something_else_is_not_written_into(models, images, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and has no index.json"):
        run(models / "student", images, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "notes.txt"}
