"""File names that are not trusted, and folders that are whole or not there."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_what_is_written_has_the_rights_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with files.write_whole(tmp_path / "file") as beside:
            save_file({"a": torch.zeros(1)}, beside)
        with files.write_beside(tmp_path / "folder") as beside:
            (beside / "deep").mkdir()
            save_file({"a": torch.zeros(1)}, beside / "deep" / "file")
            (beside / "deep" / "link").symlink_to("/etc/hostname")
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder" / "deep" / "file").stat().st_mode & 0o777 == mode


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
