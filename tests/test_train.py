"""train.py: what it refuses, and one whole run on tiny data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from conftest import make_rows
from safetensors.torch import load_file

import train
from trainers import RetrievalTrainingArguments
from trainers.run import hub_push


RECIPE = {
    "vision_config": {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "text_config": {
        "model_type": "distilbert",
        "dim": 32,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "image_size": 32,
    "vocab_size": 400,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "logging_steps": 1,
    "report_to": "tensorboard",
    "use_cpu": True,
    "queue_size": 40,
}


@pytest.fixture
def data(tmp_path):
    parts = {"train": make_rows(48), "validation": make_rows(12, seed=1), "test": make_rows(12, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def write_recipe(folder, data, **settings):
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({**RECIPE, "dataset_name": str(data), "output_dir": str(folder / "run"), **settings})
    )
    return ["--config", str(path)]


def test_a_run_leaves_what_it_promises_and_can_be_evaluated(tmp_path, data, capsys):
    train.main(write_recipe(tmp_path, data))
    run = tmp_path / "run"
    table = capsys.readouterr().out
    assert "share kept" in table and "ms per caption, batch 64" in table
    assert "There are 48 rows to learn from, and towers that start from nothing need many more" in table
    results = json.loads((run / "all_results.json").read_text())
    assert results["share_of_teacher"] == pytest.approx(100 * results["test_rsum"] / results["teacher_test_rsum"])
    for name in ("curves", "text_to_image", "image_to_text"):
        assert (run / "assets" / f"{name}.png").stat().st_size > 5000
    assert (run / "training_args.json").is_file()
    assert list((run / "runs").rglob("events.out.tfevents*"))
    card = (run / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "model-index" not in front and "datasets" not in front  # the data is a folder's, not the Hub's
    assert re.search(rf"\| rsum +\| {results['test_rsum']:.1f} ", card)
    pickles = {path.name for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in [*run.iterdir(), *(run / "assets").iterdir()]:
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
    train.main(
        ["--dataset_name", str(data), "--do_train", "False", "--do_eval", "--use_cpu"]
        + [
            "--model_name_or_path",
            str(run),
            "--report_to",
            "none",
        ]
    )
    again = json.loads((run / "eval_results.json").read_text())
    for name in ("test_rsum", "eval_rsum", "teacher_test_rsum"):
        assert again[name] == pytest.approx(results[name], abs=1e-6), name
    # The folder alone is enough for a process that has not our package.
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor; "
        "m = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "p = AutoProcessor.from_pretrained(sys.argv[1]); "
        "print(m(**p(text=['red house'], return_tensors='pt')).text_embeds.shape)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(run)], cwd="/", capture_output=True, text=True)
    assert "[1, 16]" in result.stdout, result.stderr[-2000:]


def refused(arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert str(stop.value).startswith("error: ")
    return str(stop.value)


def test_a_folder_that_holds_another_run_is_refused(tmp_path, data):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "another run" in refused(write_recipe(tmp_path, data))
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_a_run_stopped_before_its_first_checkpoint_is_resumed_from_the_beginning(tmp_path, data, capsys):
    (tmp_path / "run" / "_checkpoint").mkdir(parents=True)
    _, _, checkpoint, _ = train.prepare([*write_recipe(tmp_path, data), "--resume_from_checkpoint", "last"])
    assert checkpoint is None and "from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("writes_cards", [True, False])
def test_captions_are_counted_by_the_process_that_writes_the_card(tmp_path, data, monkeypatch, writes_cards):
    monkeypatch.setattr(RetrievalTrainingArguments, "should_save", writes_cards)
    counted = []
    monkeypatch.setattr(train, "data_facts", lambda rows, args: counted.append(rows) or {"train": {}})
    trainer, *_ = train.prepare(write_recipe(tmp_path, data))
    assert len(counted) == writes_cards and trainer.facts.data == ({"train": {}} if writes_cards else {})


def test_a_tower_that_is_not_named_is_refused(tmp_path, data):
    assert "Which text tower" in refused(write_recipe(tmp_path, data, text_config=None))


def test_a_missing_split_is_refused(tmp_path, data):
    assert "no split dev (it has train, validation, test)" in refused(write_recipe(tmp_path, data, test_split="dev"))


ROOT = Path(train.__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


@pytest.mark.parametrize(
    ("launcher", "program"),
    [
        ([*LAUNCH, "-q"], "train.py"),
        (LAUNCH, "train.py"),
        ([sys.executable], "train.py"),
        (LAUNCH, "datasets_scripts/add_teacher_features.py"),
    ],
    ids=["quiet", "plain", "none", "features"],
)
def test_what_a_user_sees_of_an_error_under_the_launcher(tmp_path, launcher, program):
    wrong, sentence, status = ["--config", "none.yaml"], "error: --config none.yaml: there is no such file.", 1
    if program != "train.py":
        wrong, status = ["--batch_size", "0", "--dataset", "a", "--teacher", "b", "--output", "c"], 2
        sentence = "python -m datasets_scripts.add_teacher_features: error: --batch_size 0: expected 1 or more"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    seen = subprocess.run([*launcher, ROOT / program, *wrong], capture_output=True, text=True, env=environment)
    lines = seen.stderr.strip().splitlines()
    assert seen.returncode == (status if launcher == [sys.executable] else 1)
    if launcher == LAUNCH:  # it cannot be kept from this; our line stands before it
        place = lines.index(sentence)
        assert "launcher's (`accelerate launch -q` prints none)" in lines[place + 1]
        assert lines[place + 2].startswith("Traceback") and "CalledProcessError" in lines[-1]
    else:
        assert lines[-1] == sentence and "Traceback" not in seen.stderr


def test_the_makefile_launches_quietly():
    commands = [line for line in (ROOT / "Makefile").read_text().splitlines() if "accelerate launch" in line]
    assert len(commands) == 4 and all("accelerate launch -q train.py" in line for line in commands)


def test_a_dataset_of_a_test_split_alone_is_evaluated(tmp_path, data, capsys):
    train.main(write_recipe(tmp_path, data, num_train_epochs=1))
    rows = datasets.load_from_disk(data)
    again = ["--do_train", "False", "--model_name_or_path", str(tmp_path / "run"), "--use_cpu", "--report_to", "none"]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    for split, key in (("test", "test"), ("validation", "eval")):
        datasets.DatasetDict({split: rows[split]}).save_to_disk(tmp_path / split)
        capsys.readouterr()
        train.main([*again, "--dataset_name", str(tmp_path / split)])
        assert f"| {split} split, 12 images" in capsys.readouterr().out
        found = json.loads((tmp_path / "run" / "eval_results.json").read_text())
        assert found[f"{key}_rsum"] == pytest.approx(results[f"{key}_rsum"], abs=1e-3)
        assert not [name for name in found if name.startswith("eval" if key == "test" else "test")]


def test_fewer_images_than_a_batch_are_one_batch(tmp_path, data):
    train.main(write_recipe(tmp_path, data, per_device_train_batch_size=64, num_train_epochs=2))
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["max_steps"] == 2 and state["train_batch_size"] == len(datasets.load_from_disk(data)["train"])


def test_a_fold_size_that_does_not_divide_the_test_split_is_refused_before_training(tmp_path, data):
    assert "does not divide the 12 test images" in refused(write_recipe(tmp_path, data, test_fold_size=5))


def test_a_run_goes_on_from_the_hub(tmp_path, data, hub, monkeypatch):
    """Its last push failed, so the Hub holds the middle of the run: resumed from there it ends as the unbroken run."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    settings = {"push_to_hub": True, "hub_model_id": "user/student", "hub_strategy": "checkpoint"}
    settings |= {"load_best_model_at_end": False, "random_shift": 0.1, "captions_per_image": 1, "report_to": "none"}
    recipe = write_recipe(tmp_path, data, **settings)

    push = hub_push.push_checkpoint

    def fail_after_the_first(*arguments):
        push(*arguments)
        hub.fail(1000, 500, on="POST")

    with monkeypatch.context() as patch:
        patch.setattr("trainers.run.resumable_trainer.push_checkpoint", fail_after_the_first)
        train.main([*recipe, "--hub_always_push", "True"])
    hub.recover()
    state = json.loads(hub.files("user/student")["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 3 and state["max_steps"] == 6
    train.main([*recipe, "--resume_from_hub", "user/student", "--output_dir", str(tmp_path / "elsewhere")])
    unbroken, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "elsewhere"))
    assert unbroken.keys() == resumed.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(tensor, resumed[name]), name
    assert "resumed" in (tmp_path / "elsewhere" / "README.md").read_text().lower()
    assert hub.files("user/student")["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
