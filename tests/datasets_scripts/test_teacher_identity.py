"""Which teacher made features: by weights and preprocessing, the same in a folder and on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_student
from huggingface_hub import HfApi

from datasets_scripts import teacher_identity
from datasets_scripts.teacher_identity import check_same_teachers, teacher_fingerprint, without_names


@pytest.fixture
def folder(tmp_path):
    model, processor = make_student()
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_fingerprint_is_of_all_that_makes_features_and_of_nothing_else(folder, tmp_path):
    before = teacher_fingerprint(str(folder), None)
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "renamed"))
    (copy / "README.md").write_text("edited")
    (copy / "eval_results.json").write_text("{}")
    (copy / "trainer_state.json").write_text("{}")
    (copy / "pytorch_model.bin").write_bytes(b"the same in another format, which is not read")
    (copy / "model.fp16.safetensors").write_bytes(b"a copy in half precision")
    (copy / "onnx").mkdir()
    (copy / "onnx" / "config.json").write_text("{}")
    (copy / "checkpoint-3").mkdir()
    (copy / "checkpoint-3" / "model.safetensors").touch()
    assert teacher_fingerprint(str(copy), None) == before
    for name in (
        "model.safetensors",
        "modeling_x.py",
        "tokenizer.json",
        "preprocessor_config.json",
        "1_X/config.json",
    ):
        content = (copy / name).read_bytes() if (copy / name).is_file() else b""
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(content + b" ")
        assert teacher_fingerprint(str(copy), None) != before, name
        (copy / name).write_bytes(content) if content else (copy / name).unlink()
        assert teacher_fingerprint(str(copy), None) == before
    (copy / "model.safetensors").unlink()
    assert teacher_fingerprint(str(copy), None) != before


def test_a_teacher_on_the_hub_is_the_same_as_its_folder(folder, hub, tmp_path, monkeypatch):
    HfApi().create_repo("user/tiny")
    HfApi().upload_folder(repo_id="user/tiny", folder_path=folder)
    first = hub.commits("user/tiny")[-1].oid
    fingerprint = teacher_fingerprint("user/tiny", None)
    assert fingerprint == teacher_fingerprint(str(folder), None)
    assert not [line for line in hub.requests if "model.safetensors" in line and line.startswith("GET")]
    (folder / "README.md").write_text("edited")
    HfApi().upload_folder(repo_id="user/tiny", folder_path=folder)
    assert teacher_fingerprint("user/tiny", None) == fingerprint
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    HfApi().upload_folder(repo_id="user/tiny", folder_path=folder)
    assert teacher_fingerprint("user/tiny", None) == teacher_fingerprint(str(folder), None) != fingerprint
    assert teacher_fingerprint("user/tiny", first) == fingerprint
    # Without a network: what the cache holds, if that is all of it.
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(OSError, match="user/tiny cannot be reached, and its weights are not in the cache"):
        teacher_fingerprint("user/tiny", None)
    teacher_identity.snapshot_download("user/tiny")
    assert teacher_fingerprint("user/tiny", None) == teacher_fingerprint(str(folder), None)


def test_features_of_another_teacher_are_refused_whatever_it_is_called(folder, tmp_path):
    described = {"id": "tiny", "revision": None, "fingerprint": teacher_fingerprint(str(folder), None)}
    check_same_teachers(described, [(str(folder), None)], "D")
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    check_same_teachers(described, [(str(renamed), None)], "D")
    other = shutil.copytree(folder, tmp_path / "other" / "tiny")
    (Path(other) / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="D has features of another tiny than this one: weights or preprocessing"):
        check_same_teachers(described, [(str(other), None)], "D")
    joined = {"id": "tiny + tiny", "teachers": [described, described]}
    check_same_teachers(joined, [(str(folder), None), (str(renamed), None)], "D")
    with pytest.raises(ValueError, match=r"D has features of tiny \+ tiny, not of tiny"):
        check_same_teachers(joined, [(str(folder), None)], "D")


def test_features_that_were_made_without_a_fingerprint_are_compared_by_name_and_commit(folder, hub, capsys):
    HfApi().create_repo("user/tiny")
    HfApi().upload_folder(repo_id="user/tiny", folder_path=folder)
    commits = [commit.oid for commit in hub.commits("user/tiny")]
    check_same_teachers({"id": "tiny", "revision": None}, [(str(folder), None)], "D")
    made = {"id": "user/tiny", "revision": commits[-1]}
    for revision in (None, "main", commits[-1]):
        check_same_teachers(made, [("user/tiny", revision)], "D")
    with pytest.raises(ValueError, match=f"D has features of user/tiny at commit {commits[-1]}; {commits[0]} is"):
        check_same_teachers(made, [("user/tiny", commits[0])], "D")
    with pytest.raises(ValueError, match="D has features of an unnamed teacher, not of tiny"):
        check_same_teachers({}, [(str(folder), None)], "D")
    # A teacher that cannot be reached goes by its name.
    check_same_teachers({"id": "user/gone", "revision": None, "fingerprint": "x"}, [("user/gone", None)], "D")
    assert "user/gone is compared by name alone with the teacher of D" in capsys.readouterr().out


def test_names_say_nothing_of_features():
    one = {"id": "a", "revision": "b", "dim": 3}
    assert without_names(one) == {"dim": 3}
    joined = json.loads(json.dumps({"id": "a + c", "teachers": [one, {**one, "fingerprint": "f"}], "weights": [1, 1]}))
    assert without_names(joined, "fingerprint") == {"teachers": [{"dim": 3}, {"dim": 3}], "weights": [1, 1]}
