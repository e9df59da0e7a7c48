"""Searching a folder: the results against a plain computation, and an index that follows the folder."""

import copy
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_student
from image_files import encoded, picture
from PIL import Image
from transformers import set_seed

from inference import embed, vectors
from inference.search import index_folder, main
from inference.vectors import Result, read_facts
from rows.command_line import run_program
from teachers import load_teacher


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Model and processor, and the encoder that has them."""
    folder = tmp_path_factory.mktemp("student")
    for part in make_student():
        part.save_pretrained(folder)
    return load_teacher(str(folder))


@pytest.fixture
def folder(tmp_path):
    """Twelve images in three folders."""
    for i in range(12):
        write(tmp_path / "images" / ("", "a", "a/b c")[i % 3] / f"{i}.{('jpg', 'PNG', 'webp')[i % 3]}", i)
    return tmp_path / "images"


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed), {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")))


def save(student, folder: Path) -> None:
    for part in (student.model, student.image_processor, student.tokenizer):
        part.save_pretrained(folder)


def scores_of(student, folder: Path, query) -> dict[str, float]:
    """Cosine similarities by the model's own forward, in float32."""
    model, tokenizer, pictures = student.model, student.tokenizer, student.image_processor
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    images = [Image.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        if isinstance(query, str):
            output = model(**tokenizer([query], return_tensors="pt"), **pictures(images=images, return_tensors="pt"))
            scores = (output.text_embeds @ output.image_embeds.T)[0]
        else:
            embeds = model(**pictures(images=[query, *images], return_tensors="pt")).image_embeds
            scores = embeds[1:] @ embeds[0]
    return {path.relative_to(folder).as_posix(): score.item() for path, score in zip(paths, scores)}


def assert_results(results: list[Result], expected: dict[str, float]) -> None:
    best = sorted(expected.values(), reverse=True)[: len(results)]
    np.testing.assert_allclose([result.score for result in results], best, atol=1e-3)  # float16
    for result in results:
        assert result.score == pytest.approx(expected[result.path], abs=1e-3)
    assert len({result.path for result in results}) == len(results)


class Counter:
    """Counts the images that a model embeds."""

    def __init__(self, model, monkeypatch):
        self.count, plain = 0, model.get_image_features

        def counted(pixel_values, **kwargs):
            self.count += len(pixel_values)
            return plain(pixel_values, **kwargs)

        monkeypatch.setattr(model, "get_image_features", counted)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def test_results_are_those_of_a_plain_computation(student, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 5)
    index = index_folder(student, folder, tmp_path / "cache")
    assert len(index) == 12 and not index.skipped
    for query in ("arrow left", "a red house and a small blue tree"):
        expected = scores_of(student, folder, query)
        assert_results(index.search_text(query, 5), expected)
        assert len(index.search_text(query, 100)) == 12
        # A longer list begins with the shorter one.
        assert index.search_text(query, 12)[:3] == index.search_text(query, 3)
    assert len(index.search_text("arrow " * 2000, 5)) == 5  # longer than the text tower has positions
    image = picture(4)
    assert_results(index.search_image(image, 12), scores_of(student, folder, image))
    png = next(path for path in folder.rglob("*.PNG"))
    assert index.search_image(Image.open(png))[0] == (png.relative_to(folder).as_posix(), pytest.approx(1, abs=1e-3))


def test_only_what_is_new_or_changed_is_embedded(student, folder, tmp_path, monkeypatch):
    embedded = Counter(student.model, monkeypatch)

    def update() -> tuple[set[str], int]:
        index = index_folder(student, folder, tmp_path / "cache")
        count = embedded.take()
        assert_results(index.search_text("arrow left", 100), scores_of(student, folder, "arrow left"))
        embedded.take()
        return set(index.ids), count

    def touch(path: Path, seconds: int) -> None:
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))

    before, count = update()
    assert count == 12
    assert update() == (before, 0)
    write(folder / "new/13.jpg", 13)
    (folder / "0.jpg").unlink()
    size, changed = (folder / "3.jpg").stat().st_size, picture(77)
    quality = next(q for q in range(95, 5, -1) if len(encoded(changed, quality=q)) <= size)
    data = encoded(changed, quality=quality)
    (folder / "3.jpg").write_bytes(data + b"\0" * (size - len(data)))  # another image of the same size in bytes
    touch(folder / "3.jpg", 5)
    assert update() == (before - {"0.jpg"} | {"new/13.jpg"}, 2)
    os.rename(folder / "new", folder / "moved")
    assert update() == (before - {"0.jpg"} | {"moved/13.jpg"}, 1)
    touch(folder / "6.jpg", -3600)  # it is told by its content
    assert update() == (before - {"0.jpg"} | {"moved/13.jpg"}, 0)
    shutil.rmtree(folder / "a")
    assert update() == ({"3.jpg", "6.jpg", "9.jpg", "moved/13.jpg"}, 0)
    left = read_facts(index_folder(student, folder, tmp_path / "cache").folder)
    assert left["images"] == 4 and left["skipped"] == {}
    files = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert files == {"index.json", *left["shards"]["images"]}


def test_a_killed_run_goes_on(student, folder, tmp_path, monkeypatch):
    plain, files = embed.write_shard, []

    def write_two_shards_and_a_half(file, *rest):
        if len(files) == 2:
            Path(f"{file}.part").write_bytes(b"half a")
            os.kill(os.getpid(), signal.SIGKILL)
        files.append(file)
        plain(file, *rest)

    monkeypatch.setattr(embed.embed, "__defaults__", (None, 4, 4, False, False))  # shards of four images
    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_shard", write_two_shards_and_a_half)
        process = multiprocessing.get_context("fork").Process(
            target=index_folder, args=(student, folder, tmp_path / "cache")
        )
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    embedded = Counter(student.model, monkeypatch)
    index = index_folder(student, folder, tmp_path / "cache")
    assert embedded.count == 12 - 8 and len(index) == 12
    assert_results(index.search_text("arrow left", 12), scores_of(student, folder, "arrow left"))
    assert not list((tmp_path / "cache").rglob("*part")) and not list((tmp_path / "cache").rglob(".lock"))


def test_a_folder_whose_files_are_all_others_now(student, folder, tmp_path):
    """The cache is of this folder: what was there is gone, and there is nothing to refuse."""
    index_folder(student, folder, tmp_path / "cache")
    shutil.rmtree(folder)
    write(folder / "new.png", 40)
    assert index_folder(student, folder, tmp_path / "cache").ids == ["new.png"]


def test_models_and_folders_do_not_mix(student, folder, tmp_path):
    other = copy.copy(student)
    set_seed(1)
    other.model = type(student.model)(student.model.config).eval()
    first = index_folder(student, folder, tmp_path / "cache")
    second = index_folder(other, folder, tmp_path / "cache")
    assert_results(second.search_text("arrow left", 12), scores_of(other, folder, "arrow left"))
    assert_results(first.search_text("arrow left", 12), scores_of(student, folder, "arrow left"))
    copied = shutil.copytree(folder, tmp_path / "copy" / folder.name)
    (copied / "0.jpg").unlink()
    assert len(index_folder(student, copied, tmp_path / "cache")) == 11
    assert len(list((tmp_path / "cache").rglob("index.json"))) == 3


def test_broken_files_are_told_and_skipped_and_links_not_followed(student, folder, tmp_path):
    write(tmp_path / "outside/secret.jpg", 50)
    (folder / "link.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (folder / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe.jpg")  # opening it would block for ever
    write(folder / ".hidden/1.jpg", 51)
    write(folder / "._0.jpg", 52)
    (folder / "notes.txt").write_text("text")
    (folder / "empty.jpg").touch()
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    (folder / "text.png").write_text("not an image")
    (folder / "other.jpg").write_bytes(encoded(picture(5), "TGA"))  # whole, and of a format that is not asked for
    bomb = Image.new("1", (20_000, 10_000))
    bomb.save(folder / "bomb.png")
    with open(os.fsencode(folder) + b"/caf\xe9.jpg", "wb") as file:
        file.write((folder / "0.jpg").read_bytes())
    index = index_folder(student, folder, tmp_path / "cache")
    broken = {"empty.jpg", "cut.jpg", "text.png", "other.jpg", "bomb.png", "'caf\\udce9.jpg'"}
    assert set(index.skipped) == broken and len(index) == 12
    assert "decompression bomb" in index.skipped["bomb.png"] and "Truncated" in index.skipped["cut.jpg"]
    modified = (index.folder / "index.json").stat().st_mtime_ns
    again = index_folder(student, folder, tmp_path / "cache")  # tried again, told again, nothing written
    assert set(again.skipped) == broken
    assert (index.folder / "index.json").stat().st_mtime_ns == modified
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes())
    assert len(index_folder(student, folder, tmp_path / "cache")) == 13


def test_images_as_a_person_sees_them(student, tmp_path):
    """Transparent, 16-bit, turned and one-pixel images are embedded as `to_rgb` shows them."""
    folder = tmp_path / "images"
    write(folder / "plain.png", 1)
    picture(1).convert("RGBA").save(folder / "rgba.png")
    picture(1).convert("P").save(folder / "first.gif")
    exif = Image.Exif()
    exif[0x0112] = 3
    picture(1).rotate(180).save(folder / "turned.png", exif=exif)
    for size in ((1, 1), (3, 1), (1, 3), (3, 3)):
        picture(2, size=size).save(folder / f"{size[0]}x{size[1]}.png")
    index = index_folder(student, folder, tmp_path / "cache")
    scores = dict(index.search_image(picture(1), 8))
    assert not index.skipped
    assert scores["rgba.png"] == scores["turned.png"] == scores["plain.png"] == pytest.approx(1, abs=1e-3)
    assert all(score < 0.99 for path, score in scores.items() if "x" in path)


def test_no_images(student, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        index_folder(student, tmp_path / "nowhere", tmp_path / "cache")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="no image that can be read"):
        index_folder(student, tmp_path / "images", tmp_path / "cache")
    (tmp_path / "images/a.png").write_text("no")
    with pytest.raises(ValueError, match="None of 1 images can be read: a.png: cannot identify"):
        index_folder(student, tmp_path / "images", tmp_path / "cache")
    write(tmp_path / "images/a.png", 1)
    index = index_folder(student, tmp_path / "images", tmp_path / "cache")
    with pytest.raises(ValueError, match="k=0"):
        index.search_text("arrow", 0)


def test_nan_is_an_error(student, folder, tmp_path, monkeypatch):
    weight = student.model.visual_projection.weight
    monkeypatch.setattr(weight, "data", weight.data * float("nan"))
    with pytest.raises(ValueError, match="features of images that are NaN"):
        index_folder(student, folder, tmp_path / "cache")


def test_two_at_once(student, folder, tmp_path, monkeypatch):
    """The second waits for the first and embeds nothing."""
    embedded = Counter(student.model, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        indexes = list(pool.map(lambda _: index_folder(student, folder, tmp_path / "cache"), range(2)))
    assert embedded.count == 12
    assert indexes[0].search_text("arrow left", 12) == indexes[1].search_text("arrow left", 12)


def test_command_line(student, folder, tmp_path, capsys):
    save(student, tmp_path / "student")
    (folder / "broken.jpg").write_text("no")
    common = [
        "--model_name_or_path",
        str(tmp_path / "student"),
        "--images",
        str(folder),
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    main([*common, "arrow left", "--k", "3", "--grid", str(tmp_path / "text.png")])
    text = capsys.readouterr()
    for result in index_folder(student, folder, tmp_path / "cache").search_text("arrow left", 3):
        assert f"  {result.score:.3f}  {result.path}\n" in text.out
    assert "1 file was left out" in text.out and "broken.jpg: cannot identify image file" in text.out
    assert "3 of 12 images" in text.out
    (index,) = (tmp_path / "cache").rglob("index.json")
    assert f"is kept in {index.parent};" in text.out
    main([*common, "--image", str(folder / "0.jpg"), "--grid", str(tmp_path / "image.png")])
    image = capsys.readouterr()
    assert "  1.000  0.jpg" in image.out and "10 of 12 images" in image.out
    assert Image.open(tmp_path / "text.png").width < Image.open(tmp_path / "image.png").width
    main([*common, "arrow right", "--k", "3", "--grid", str(tmp_path / "text.png")])  # in the place of the first
    capsys.readouterr()
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    (tmp_path / "thesis.txt").write_text("of years")
    for name in ("holiday.png", "thesis.txt", "student"):
        before = (tmp_path / name).stat()
        with pytest.raises(SystemExit):
            main([*common, "arrow", "--grid", str(tmp_path / name)])
        assert f"{name} exists and is no picture of results: name another file" in capsys.readouterr().err
        assert (tmp_path / name).stat() == before
    for wrong, message in (
        ([], "give a text or --image"),
        (["arrow", "--image", "x.jpg"], "not both"),
        (["--image", str(folder / "broken.jpg")], "cannot be read"),
    ):
        with pytest.raises(SystemExit):
            main([*common, *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{folder}/none"], "none is not a folder"),
        (["--images", "{folder}/3.jpg"], "3.jpg is not a folder"),
        (["--images", "{folder}", "--k", "0"], "--k 0: expected 1 or more"),
        (["--images", "{folder}", "--grid", "{folder}/none/grid.png"], "none is no folder that can be written to"),
        (["--images", "{folder}", "--grid", "{folder}/3.jpg/grid.png"], "3.jpg is no folder that can be written to"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(folder, capsys, arguments, message):
    arguments = [part.format(folder=folder) for part in arguments]
    with pytest.raises(SystemExit):
        main(["a query", "--model_name_or_path", "no such model", *arguments])
    assert message in capsys.readouterr().err


def test_a_folder_without_images_ends_in_a_sentence(student, tmp_path, monkeypatch):
    save(student, tmp_path / "student")
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ["a", "--model_name_or_path", str(tmp_path / "student"), "--images", str(tmp_path / "images")]
    with pytest.raises(SystemExit, match="^error: .*images holds no image that can be read"):
        run_program(lambda: main([*arguments, "--cache_dir", str(tmp_path / "cache")]))
