"""Vectors of folders, datasets and texts: against a plain computation, taken up at any kill, of one model alone."""

import csv
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
import torch
from conftest import DIM, make_rows, make_student
from image_files import encoded, picture
from launching import command_line, environment
from teacher_families import make_clip, save
from tiny_towers import scatter

from inference import embed, search, vectors
from inference.queries import rank_of, read_queries
from inference.sources import ImageRows
from inference.vectors import Result, VectorIndex, read_facts, read_shard, shards_of
from rows.command_line import run_program
from rows.images import to_rgb
from teachers import load_teacher
from trainers.run.locking import alone
from trainers.teacher_pca import save_pca


COUNT = 11


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model, processor = make_student()
    for part in (scatter(model), processor):
        part.save_pretrained(folder / "student")
    save(make_clip, folder / "clip_alone", None)
    return folder


@pytest.fixture
def images(tmp_path):
    for i in range(COUNT):
        path = tmp_path / "images" / ("", "a")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i), "PNG"))
    return tmp_path / "images"


def run(model, images, output, *more):
    settings = ["--shard_rows", "4", "--batch_size", "3"]
    names = ["--model_name_or_path", str(model), "--images", str(images), "--output_dir", str(output)]
    embed.main([*names, *settings, *map(str, more)])


def contents(folder: Path, kind: str = "images") -> dict[str, np.ndarray]:
    found = {}
    for file in shards_of(folder, kind):
        table, embeds = read_shard(file)
        ids = table["id"].to_pylist()
        assert not set(ids) & found.keys() and len(set(ids)) == len(ids) == len(embeds) <= 4
        found |= dict(zip(ids, embeds))
    return found


def expected(model, contents: dict, kind: str = "image") -> dict[str, np.ndarray]:
    teacher = load_teacher(str(model))
    features = {own: getattr(teacher, f"embed_{kind}s")([content])[0].numpy() for own, content in contents.items()}
    return {own: row / np.linalg.norm(row) for own, row in features.items()}


def of_folder(folder: Path) -> dict:
    return {str(path.relative_to(folder)): search.read_image(path) for path in folder.rglob("*.png")}


def assert_close(found: dict, right: dict) -> None:
    assert found.keys() == right.keys()
    for own, row in right.items():
        np.testing.assert_allclose(found[own].astype(np.float32), row, atol=1e-3)


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


def found(capsys) -> list[tuple[str, float]]:
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith("images:"))
    return [(line.split()[1], float(line.split()[0])) for line in lines[first + 1 :] if line.startswith("  ")]


@pytest.mark.parametrize("width", [None, 5])
def test_search_of_vectors_is_a_plain_computation(models, images, tmp_path, capsys, width):
    run(models / "clip_alone", images, tmp_path / "vectors")
    more = [] if width is None else ["--truncate_dim", str(width)]
    arguments = ["--model_name_or_path", str(models / "clip_alone"), "--index", str(tmp_path / "vectors"), "a cat"]
    capsys.readouterr()
    search.main([*arguments, "--k", "4", *more])
    results = found(capsys)
    own = expected(models / "clip_alone", of_folder(images))
    own = {k: v[:width] / np.linalg.norm(v[:width]) for k, v in own.items()}
    query = expected(models / "clip_alone", {"q": "a cat"}, "text")["q"][:width]
    query = query / np.linalg.norm(query)
    scores = {name: float(row @ query) for name, row in own.items()}
    assert [score for _, score in results] == pytest.approx(sorted(scores.values(), reverse=True)[:4], abs=2e-3)
    assert all(scores[name] == pytest.approx(score, abs=2e-3) for name, score in results)


def test_search_brings_the_index_up_to_date_where_images_are_given(models, images, tmp_path, capsys):
    run(models / "student", images, tmp_path / "vectors")
    (images / "new.png").write_bytes(encoded(picture(99), "PNG"))
    (images / "0.png").unlink()
    names = ["--model_name_or_path", str(models / "student"), "--index", str(tmp_path / "vectors")]
    search.main([*names, "--images", str(images), "a", "--k", "99", "--grid", str(tmp_path / "grid.png")])
    assert {name for name, _ in found(capsys)} == {str(path.relative_to(images)) for path in images.rglob("*.png")}
    assert (tmp_path / "grid.png").is_file()


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


def test_a_shard_of_another_width_is_named(models, images, tmp_path):
    run(models / "student", images, tmp_path / "vectors")
    table, embeds = read_shard(tmp_path / "vectors" / "images-00001.parquet")
    vectors.write_shard(tmp_path / "vectors" / "images-00001.parquet", table.to_pydict(), embeds[:, :1], False)
    with pytest.raises(ValueError, match=r"images-00001.parquet holds vectors of shape \(4, 1\), not \(4, 16\)"):
        VectorIndex.open(tmp_path / "vectors", load_teacher(str(models / "student")), "student")


def test_another_folder_than_the_indexs_drops_nothing(models, images, tmp_path):
    run(models / "student", images, tmp_path / "vectors")
    before = contents(tmp_path / "vectors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.png").write_bytes(encoded(picture(99), "PNG"))
    with pytest.raises(ValueError, match=f"vectors of {COUNT} images, such as .*, none of which is in other"):
        run(models / "student", tmp_path / "other", tmp_path / "vectors")
    assert read_facts(tmp_path / "vectors")["complete"] and contents(tmp_path / "vectors").keys() == before.keys()


def test_results_of_a_dataset_are_drawn_from_its_rows(models, tmp_path, capsys):
    datasets.DatasetDict(test=make_rows(5)).save_to_disk(tmp_path / "rows")
    run(models / "student", tmp_path / "rows", tmp_path / "vectors")
    names = ["--model_name_or_path", str(models / "student"), "--index", str(tmp_path / "vectors")]
    search.main([*names, "--images", str(tmp_path / "rows"), "a", "--grid", str(tmp_path / "grid.png")])
    assert len(found(capsys)) == 5 and (tmp_path / "grid.png").is_file()


def test_vectors_of_another_model_are_refused(models, images, tmp_path):
    run(models / "clip_alone", images, tmp_path / "vectors")
    student = load_teacher(str(models / "student"))
    with pytest.raises(ValueError, match="vectors of clip_alone, and runs/x has other weights or preprocessing"):
        VectorIndex.open(tmp_path / "vectors", student, "runs/x")
    with pytest.raises(ValueError, match="which differ in their fingerprint, width"):
        run(models / "student", images, tmp_path / "vectors")
    with pytest.raises(ValueError, match="which differ in their width"):
        run(models / "clip_alone", images, tmp_path / "vectors", "--truncate_dim", "3")
    assert read_facts(tmp_path / "vectors")["complete"]
    shutil.copytree(models / "clip_alone", tmp_path / "another_name")
    clip = load_teacher(str(tmp_path / "another_name"))
    assert len(VectorIndex.open(tmp_path / "vectors", clip, "another_name")) == COUNT
    with torch.no_grad():
        clip.model.text_projection.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        VectorIndex.open(tmp_path / "vectors", clip, "another_name")


def test_a_fingerprint_is_of_what_makes_features(models, tmp_path):
    encoder = load_teacher(str(models / "student"))
    seen = {vectors.fingerprint(encoder)}
    encoder.model.save_pretrained(tmp_path / "copy")
    for part in (encoder.image_processor, encoder.tokenizer):
        part.save_pretrained(tmp_path / "copy")
    assert vectors.fingerprint(load_teacher(str(tmp_path / "copy"))) in seen
    changes = [
        lambda: encoder.model.logit_scale.data.add_(1e-3),
        lambda: setattr(encoder.model.config, "vision_pooling", "cls"),  # of the same weights
        lambda: setattr(encoder.model.config.vision_config, "num_attention_heads", 4),
        lambda: setattr(encoder.image_processor, "image_mean", [0.4] * 3),
        lambda: encoder.text_settings.update(max_length=3),
        lambda: encoder.model.half(),
    ]
    for i, change in enumerate(changes):
        change()
        encoder.dtype = encoder.model.dtype
        seen.add(vectors.fingerprint(encoder))
        assert len(seen) == 2 + i


def test_a_student_searches_what_its_teacher_embedded(models, images, tmp_path):
    """The teacher's features, brought to the student's space by the file that lies in the student's folder."""
    shutil.copytree(models / "student", tmp_path / "student")
    components = torch.linalg.qr(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))[0]
    save_pca(components, tmp_path / "student")
    run(models / "clip_alone", images, tmp_path / "vectors", "--student", tmp_path / "student")
    teacher = {k: v @ components.numpy() for k, v in expected(models / "clip_alone", of_folder(images)).items()}
    assert_close(contents(tmp_path / "vectors"), {k: v / np.linalg.norm(v) for k, v in teacher.items()})
    student = load_teacher(str(models / "student"))
    index = VectorIndex.open(tmp_path / "vectors", student, str(tmp_path / "student"))
    query = expected(models / "student", {"q": "a cat"}, "text")["q"][:6]
    best = index.search_text("a cat", 1)[0]
    scores = {k: float(v @ query / np.linalg.norm(v) / np.linalg.norm(query)) for k, v in teacher.items()}
    assert best.score == pytest.approx(max(scores.values()), abs=2e-3)
    with pytest.raises(ValueError, match="were brought to a student's space: search it with that student"):
        search.open_vectors(tmp_path / "vectors", load_teacher(str(models / "clip_alone")), "clip_alone", images)
    save_pca(components.flip(1).contiguous(), tmp_path / "student")
    with pytest.raises(ValueError, match="other weights"):
        VectorIndex.open(tmp_path / "vectors", student, str(tmp_path / "student"))
    with pytest.raises(ValueError, match="has no teacher_pca.safetensors"):
        run(models / "clip_alone", images, tmp_path / "v2", "--student", models / "student")
    with pytest.raises(ValueError, match=f"a teacher of 8 numbers, and .*student gives {DIM}"):
        run(models / "student", images, tmp_path / "v2", "--student", tmp_path / "student")
    assert not (tmp_path / "v2").exists()


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


def test_a_damaged_shard_is_named(models, images, tmp_path):
    run(models / "student", images, tmp_path / "vectors")
    (tmp_path / "vectors" / "images-00001.parquet").write_bytes(b"PAR1")
    encoder = load_teacher(str(models / "student"))
    with pytest.raises(ValueError, match="images-00001.parquet is damaged"):
        VectorIndex.open(tmp_path / "vectors", encoder, "student")
    (tmp_path / "vectors" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json cannot be read"):
        VectorIndex.open(tmp_path / "vectors", encoder, "student")


def test_the_rank_of_a_query_counts_ties_against_the_model():
    results = [Result("a", 0.9), Result("b", 0.5), Result("c", 0.5), Result("d", 0.1)]
    assert [rank_of(results, right) for right in ({"a"}, {"b"}, {"c", "d"}, {"d"}, {"a", "d"})] == [1, 3, 3, 4, 1]
    assert rank_of(results, {"e"}) == 5  # an approximate search has not found it


def test_queries_of_a_table_are_evaluated(models, images, tmp_path, capsys):
    run(models / "student", images, tmp_path / "vectors")
    index = VectorIndex.open(tmp_path / "vectors", load_teacher(str(models / "student")), "student")
    best = [result.path for result in index.search_text("a cat", COUNT)]
    pairs = [
        ("a cat", best[0]),
        ("a cat ", best[3]),
        ("a dog", [r.path for r in index.search_text("a dog", COUNT)][4]),
    ]
    with open(tmp_path / "labelled.csv", "w", newline="") as file:
        csv.writer(file).writerows([("query", "file"), *pairs])
    capsys.readouterr()
    names = ["--model_name_or_path", str(models / "student"), "--queries", str(tmp_path / "labelled.csv")]
    search.main([*names, "--index", str(tmp_path / "vectors")])
    said = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert cells[0][0] == f"2 queries, {COUNT} images"
    assert [row[1] for row in cells[2:]] == ["50.0 %", "100.0 %", "100.0 %", "3"]  # ranks 1 and 5
    search.main([*names, "--images", str(images), "--cache_dir", str(tmp_path / "cache")])
    assert "answered among the first 5  | 100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        ("query,file\na cat,nothing.png\n", "names 1 files that the index has not: nothing.png"),
        ("text,file\na,b\n", "it has the columns text, file, expected query and file"),
        ("query,file\n", "no line with a query and a file"),
        ("", "expected query and file"),
    ],
)
def test_queries_that_cannot_be_evaluated(tmp_path, text, message):
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queries(tmp_path / "q.csv", ["a.png"])
    with pytest.raises(ValueError, match="cannot be read"):
        read_queries(tmp_path / "nothing.csv", [])


@pytest.mark.parametrize("separator", [",", ";", "\t"])  # spreadsheets in Germany write semicolons
def test_queries_of_any_spreadsheet(tmp_path, separator):
    lines = [("query", "file"), ("ein Glas, rot", "a.png"), ("ein Stuhl", "b;c.png")]
    with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    assert read_queries(tmp_path / "q.csv", ["a.png", "b;c.png"]) == {
        "ein Glas, rot": {"a.png"},
        "ein Stuhl": {"b;c.png"},
    }


def test_chunks_of_an_index_are_one(models, images, tmp_path, monkeypatch):
    run(models / "student", images, tmp_path / "vectors")
    index = VectorIndex.open(tmp_path / "vectors", load_teacher(str(models / "student")), "student")
    whole = index.search_text("a cat", COUNT)
    monkeypatch.setattr(vectors, "CHUNK", 3)
    chunked = index.search_text("a cat", COUNT)
    assert [result.path for result in chunked] == [result.path for result in whole]
    assert [result.score for result in chunked] == pytest.approx([result.score for result in whole], abs=1e-6)
    with pytest.raises(ValueError, match="k=0: expected at least 1"):
        index.search_text("a cat", 0)


def test_sentence_transformers_cuts_the_same_numbers(models):
    from sentence_transformers import SentenceTransformer

    whole, cut = (
        SentenceTransformer(str(models / "student"), device="cpu", trust_remote_code=True, truncate_dim=width)
        for width in (None, 5)
    )
    expected = whole.encode(["a red house", "a cat"])
    np.testing.assert_allclose(cut.encode(["a red house", "a cat"]), expected[:, :5], atol=1e-6)
    np.testing.assert_allclose(
        cut.encode(["a cat"], normalize_embeddings=True)[0],
        expected[1, :5] / np.linalg.norm(expected[1, :5]),
        atol=1e-6,
    )
