"""The pictures of a report, the code on the card, and the card of a run that was pushed."""

import json
import re
import shlex
import threading

import datasets
import yaml
from conftest import make_rows
from huggingface_hub import hf_hub_download
from test_train import RECIPE

import train
from model_cards.pictures import PICTURES_OF_DATA
from trainers.base_trainer import RetrievalTrainer
from trainers.report import RUN_FILES, run_code, say_next


def test_code_that_fails_or_hangs_costs_only_its_output(caplog):
    assert run_code("print(1 + 1)\nprint('a')") == "2\na"
    assert run_code("print(1)\nraise OSError('no such model')") is None
    assert "no such model" in caplog.text
    release = threading.Event()
    train.release = release
    try:
        assert run_code("import train\ntrain.release.wait()", seconds=0.05) is None
    finally:
        release.set()
        del train.release
    assert "more than 0.05 seconds" in caplog.text


def test_the_card_of_a_pushed_run_names_the_weights_commit(tmp_path, hub, monkeypatch):
    parts = {"train": make_rows(32), "validation": make_rows(8, seed=1), "test": make_rows(8, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    settings = {"dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "run"), "num_train_epochs": 1}
    settings |= {"push_to_hub": True, "hub_model_id": "user/student", "hub_strategy": "end", "report_to": "none"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **settings}))
    encode, encoded = RetrievalTrainer.encode, []
    monkeypatch.setattr(RetrievalTrainer, "encode", lambda self, rows: encoded.append(rows) or encode(self, rows))
    train.main(["--config", str(tmp_path / "recipe.yaml")])
    assert [rows["image_id"][:] for rows in encoded].count(parts["test"]["image_id"][:]) == 1
    card = open(hf_hub_download("user/student", "README.md")).read()
    assert card == (tmp_path / "run" / "README.md").read_text()
    code, output = (re.search(rf"^```{of}\n(.*?)\n```$", card, re.S | re.M)[1] for of in ("python", "text"))
    (revision,) = set(re.findall(r'revision = "(\w+)"', code))
    _, whole, card_alone = hub.commits("user/student")
    assert revision == whole.oid
    changed = {name for name, content in card_alone.files.items() if whole.files.get(name) != content}
    assert changed == {"README.md", "assets/card.json"}
    for name, content in card_alone.files.items():
        assert str(tmp_path).encode() not in content, name
    assert run_code(code) == output
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    pushed = json.loads(open(hf_hub_download("user/student", "all_results.json", revision=revision)).read())
    assert pushed == results


def test_every_picture_of_data_is_a_runs_own_file_by_its_name():
    assert {*PICTURES_OF_DATA} < {*RUN_FILES} and len({*RUN_FILES}) == len(RUN_FILES)
    assert not [name for name in RUN_FILES if "[" in name]


def test_the_next_command_is_one_that_a_shell_takes(capsys):
    from inference.web import parse

    say_next("runs/my icons", "icons", "dev")
    line = capsys.readouterr().out
    words = shlex.split(line[line.index("python -m") :])
    assert words[:3] == ["python", "-m", "inference.web"]
    options = parse(words[3:])
    assert (options.model_name_or_path, options.dataset_name, options.split) == ("runs/my icons", "icons", "dev")
    assert str(options.output_dir) == "runs/my icons_site" and options.serve
    say_next("runs/icons", "icons", "test")
    assert "--split" not in capsys.readouterr().out
