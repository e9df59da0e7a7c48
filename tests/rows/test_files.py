"""File names that are not trusted, and folders that are whole or not there."""

from __future__ import annotations

import os

import pytest

from rows import files


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret.jpg",
        "a/../../secret.jpg",
        "a/../b.jpg",
        "link.jpg",
        "links/secret.jpg",
        "",
        "a\0",
        None,
        3,
    ],
)
def test_file_names_stay_in_the_folder(tmp_path, name):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "links").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="does not stay"):
        files.file_in(folder, name)


def test_a_linked_folder_is_fine_itself(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "real")
    assert files.file_in(tmp_path / "images", "a b/ü.jpg") == tmp_path / "images" / "a b/ü.jpg"


def test_a_folder_that_came_meanwhile_stays(tmp_path):
    with pytest.raises(OSError), files.write_beside(tmp_path / "data") as beside:
        (beside / "mine").touch()
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "theirs").touch()
    assert os.listdir(tmp_path) == ["data"] and os.listdir(tmp_path / "data") == ["theirs"]


def test_pipes_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, tmp_path / "none.jpg"):
        with pytest.raises(FileNotFoundError):
            files.read_file(path)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_whole_or_as_it_was(tmp_path, error):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": "ü"})
    before = path.read_bytes()
    assert before.decode() == '{\n  "a": "\\u00fc",\n  "b": 1\n}\n'
    with pytest.raises(error), files.write_whole(path) as beside:
        beside.write_text("half a")
        raise error
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.json"]
    with files.write_whole(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]
