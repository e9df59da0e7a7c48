"""Captions and file names made to hang, to hide or to lead out of their folder."""

import io
import json
import os
import tarfile

import datasets
import pytest
from conftest import make_rows, make_student
from hostile.fuzzing import at_most
from image_files import encoded, picture
from tiny_towers import clip, make_processor
from transformers import AutoProcessor

from datasets_scripts import flickr30k, own_data
from inference import search
from inference.search import index_folder
from model_cards.grid import Cell, result_grid
from rows.checks import check_dataset
from rows.files import printable
from rows.texts import LONGEST_CAPTION
from teachers import load_teacher
from trainers.batches import RetrievalCollator, RetrievalDataset
from trainers.student import train_tokenizer


MILLION = 1_000_000
CAPTIONS = {
    "1 MB, one word": "a" * MILLION,
    "1 MB of words": "red house " * (MILLION // 10),
    "1 MB of spaces": " " * MILLION + "x",
    "1 MB of emoji": "🐈" * (MILLION // 4),
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈",
    "right to left": "بيت أحمر صغير",
    "turned": "abc \u202e txt.exe \u2066 x",
    "zero": "a\0b",
    "escapes": "\x1b]0;title\a\x1b[2J",
    "combining": "e" + "\u0301" * 5000,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    for part in make_student():
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CAPTIONS)
def test_any_caption_is_encoded_within_a_second_or_so(name, student, tmp_path):
    processor = AutoProcessor.from_pretrained(student, backend="pil")
    rows = make_rows(2).remove_columns("captions").add_column("captions", [[CAPTIONS[name]]] * 2)
    with at_most(10):
        check_dataset(rows, "train", None)
        batch = RetrievalCollator(processor, 32)(RetrievalDataset(rows, with_teacher=False).__getitems__([0, 1]))
        train_tokenizer([CAPTIONS[name]], 300)
        result_grid([CAPTIONS[name]], [[Cell(CAPTIONS[name])]], tmp_path / "grid.png")
    assert batch["input_ids"].shape[1] <= 32


def test_a_teacher_and_a_search_read_as_much_of_a_text(tmp_path, student):
    clip().save_pretrained(tmp_path / "teacher")
    make_processor().save_pretrained(tmp_path / "teacher")
    (tmp_path / "images").mkdir()
    picture(0).save(tmp_path / "images" / "0.png")
    teacher = load_teacher(str(tmp_path / "teacher"))
    with at_most(20):
        index = index_folder(load_teacher(str(student)), tmp_path / "images", tmp_path / "cache")
        for text in CAPTIONS.values():
            assert teacher.embed_texts([text]).isfinite().all()
            assert index.search_text(text) == index.search_text(text[:LONGEST_CAPTION])


@pytest.mark.parametrize(("caption", "message"), [("  \n ", "empty caption"), ("", "empty caption")])
def test_captions_of_blanks_are_refused(caption, message):
    rows = make_rows(2).remove_columns("captions").add_column("captions", [["a", caption]] * 2)
    with pytest.raises(ValueError, match=message):
        check_dataset(rows, "train", None)


def test_a_message_does_not_hold_a_megabyte():
    rows = make_rows(2).remove_columns("captions").add_column("captions", [["a" * MILLION, ""]] * 2)
    with pytest.raises(ValueError) as caught:
        check_dataset(rows, "train", None)
    assert len(str(caught.value)) < 500


NAMES = [
    "../private.png",
    "/etc/hostname",
    "link.png",
    "linked/private.png",
    "a\0.png",
    "a/../../private.png",
    "",
    ".",
]


@pytest.mark.parametrize("form", ["metadata.jsonl", "data.csv", "split.json"])
@pytest.mark.parametrize("name", NAMES)
def test_no_source_reads_a_file_outside_its_folder(tmp_path, form, name):
    """Nor by a csv that one wrote oneself: it may have come with the images."""
    picture(0).save(tmp_path / "private.png")
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    (folder / "linked").symlink_to(tmp_path)
    if form == "metadata.jsonl":
        (folder / form).write_text(json.dumps({"file_name": name, "captions": ["a"]}))
        run, arguments = own_data.main, [str(folder)]
    elif form == "data.csv":
        (folder / form).write_text(f'path,caption\n"{name}",a\n')
        run, arguments = own_data.main, [str(folder / form)]
    else:
        entry = {"filename": name, "imgid": 0, "split": "train", "sentences": [{"raw": "a"}]}
        (folder / form).write_text(json.dumps({"images": [entry]}))
        run, arguments = flickr30k.main, ["--karpathy", str(folder / form), "--images", str(folder)]
        arguments.append("--allow_other_counts")
    with pytest.raises((ValueError, OSError)) as caught:
        run([*arguments, "--output_dir", str(tmp_path / "out")])
    assert "does not stay" in str(caught.value) or name in ("", ".")
    assert "\0" not in str(caught.value) and not (tmp_path / "out").exists()


def test_tars_with_names_and_links_that_lead_out(tmp_path):
    """They are never unpacked: a name is a name, a link is no image."""
    picture(0).save(tmp_path / "private.png")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for i in range(30):
            for name, data in ((f"../../{i}.png", encoded(picture(i), "PNG")), (f"../../{i}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.FIFOTYPE, "pipe")):
            member = tarfile.TarInfo(f"/tmp/{name}.png")
            member.type, member.linkname = kind, str(tmp_path / "private.png")
            tar.addfile(member)
    before = set(os.listdir(tmp_path))
    own_data.main([str(tmp_path / "data.tar"), "--output_dir", str(tmp_path / "out")])
    built = datasets.load_from_disk(tmp_path / "out")
    assert sum(part.num_rows for part in built.values()) == 30
    assert set(os.listdir(tmp_path)) - before == {"out"}


@pytest.mark.parametrize("name", ["a\nb.png", "\u202egnp.png", "\x1b[2J.png", "a\r.png"])
def test_names_are_shown_so_that_a_terminal_does_not_obey(tmp_path, name, capsys, student, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / name).write_bytes(b"broken")
    rows = [{"file_name": name, "captions": ["a"], "split": "train"}]
    for split in ("validation", "test"):
        picture(0).save(folder / f"{split}.png")
        rows.append({"file_name": f"{split}.png", "captions": ["a"], "split": split})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="1 image is missing or broken") as caught:
        own_data.main([str(folder), "--output_dir", str(tmp_path / "out")])
    assert repr(name) in str(caught.value) and name not in str(caught.value)
    index = index_folder(load_teacher(str(student)), folder, tmp_path / "cache")
    assert list(index.skipped) == [name] and printable(name) == repr(name)
    search.main(
        ["--model_name_or_path", str(student), "--images", str(folder), "--cache_dir", str(tmp_path / "cache"), "a"]
    )
    assert repr(name) in capsys.readouterr().out
