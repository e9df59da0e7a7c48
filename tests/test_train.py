"""train.py: what it refuses, and one whole run on tiny data."""

import json
import subprocess
import sys

import datasets
import pytest
import yaml
from conftest import make_rows

import train


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
    results = json.loads((run / "all_results.json").read_text())
    assert results["share_of_teacher"] == pytest.approx(100 * results["test_rsum"] / results["teacher_test_rsum"])
    assert (run / "curves.png").stat().st_size > 5000
    assert (run / "training_args.json").is_file()
    assert list((run / "runs").rglob("events.out.tfevents*"))
    card = (run / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    metrics = {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["rsum"] == pytest.approx(results["test_rsum"], abs=1e-3)
    pickles = {path.name for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in run.iterdir():
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


def test_an_unknown_key_names_the_nearest(tmp_path, data):
    assert "learning_rate" in refused(write_recipe(tmp_path, data, learning_rat=1.0))


def test_a_folder_that_holds_another_run_is_refused(tmp_path, data):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "another run" in refused(write_recipe(tmp_path, data))
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_resuming_without_a_checkpoint_is_refused(tmp_path, data):
    assert "no checkpoint" in refused([*write_recipe(tmp_path, data), "--resume_from_checkpoint", "last"])


def test_a_tower_that_is_not_named_is_refused(tmp_path, data):
    assert "Which text tower" in refused(write_recipe(tmp_path, data, text_config=None))


def test_a_missing_split_is_refused(tmp_path, data):
    assert "no split dev (it has train, validation, test)" in refused(write_recipe(tmp_path, data, test_split="dev"))


def test_a_missing_recipe_is_refused(tmp_path):
    assert "no such file" in refused(["--config", str(tmp_path / "none.yaml")])


def test_command_line_wins_over_the_recipe(tmp_path, data):
    _, _, args = train.parse_arguments(
        [*write_recipe(tmp_path, data), "--learning_rate", "0.5", "--losses", "feature"]
    )
    assert args.learning_rate == 0.5 and args.losses == ["feature"] and args.num_train_epochs == 2


@pytest.mark.parametrize("name", ["icons.yaml", "icons_teacher.yaml"])
def test_shipped_recipes_hold_known_settings(name):
    _, data, args = train.parse_arguments(["--config", f"recipes/{name}"])
    assert data.dataset_name == "icons" and args.load_best_model_at_end and args.metric_for_best_model == "rsum"
