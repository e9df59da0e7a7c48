"""Teachers of open_clip, where it is installed and where it is not."""

import json
import sys

import pytest
from beside import run_checks
from conftest import make_rows

from datasets_scripts import add_teacher_features
from teachers import load_teacher


def test_models_of_open_clip():
    run_checks("teachers/open_clip_checks.py")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mobileclip").mkdir()
    (tmp_path / "mobileclip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    return tmp_path / "mobileclip"


def test_without_the_extra_one_sentence_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    sentence = f'{folder} is a model of open_clip: pip install -e ".[open-clip]"'
    with pytest.raises(ImportError) as refusal:
        load_teacher(str(folder))
    assert str(refusal.value) == sentence
    make_rows(2).to_parquet(tmp_path / "data" / "train.parquet")
    options = ["--dataset_name", str(tmp_path / "data"), "--teacher_model_name_or_path", str(folder)]
    with pytest.raises(SystemExit) as stop:
        add_teacher_features.main([*options, "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == f"error: {sentence}"
