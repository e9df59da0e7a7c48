"""The study's program: which runs it makes, what it chooses, that it goes on, and one real run."""

import json
import math
import types

import numpy as np
import pytest
import yaml
from scipy import stats
from tiny_runs import SETTINGS, VISION, write_data

import train
from benchmarks import ablation
from benchmarks.ablation import Ablation, Study, interval, key_of, main
from trainers.distillation_config import DSMDTrainingArguments


STUDY = {
    "recipe": "recipe.yaml",
    "results": "lines.jsonl",
    "runs": "runs",
    "seeds": [1, 2, 3],
    "learning_rates": [0.1, 0.2, 0.3],
    "settings": {"num_train_epochs": 2},
    "questions": {"balancers": {"dynamic": {}, "random": {"balancer": "random"}}, "losses": {"all": {}}},
    "random_vectors": {"question": "balancers", "count": 4, "seed": 0, "centres": [1.0, 0.1], "decades": 1.0},
}


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def rsum(settings: dict) -> float:
    """Best at 0.2, and of fixed weights the larger first one."""
    value = 100.0 - 50 * abs(settings["learning_rate"] - 0.2) + settings["seed"] ** 2
    if settings.get("balancer") == "random":
        value -= 10 + settings["seed"]
    return value + settings.get("loss_weights", [0])[0] / 100


@pytest.fixture
def trained(monkeypatch):
    """Settings of the runs that were made; each takes no time."""
    runs = []

    def run(command, **kwargs):
        if command[0] == "git":
            return types.SimpleNamespace(stdout="abc\n" if command[1] == "rev-parse" else "")
        settings = json.loads(command[command.index("--one") + 1])
        runs.append(settings)
        line = json.dumps({"eval_rsum": rsum(settings), "eval_share_of_teacher": 50.0})
        return types.SimpleNamespace(returncode=0, stdout=f"noise\n{line}\n")

    monkeypatch.setattr(ablation, "subprocess", types.SimpleNamespace(run=run, PIPE=None))
    return runs


def test_each_variant_has_its_sweep_and_its_seeds(study_file, trained, capsys):
    main(["--config", str(study_file)])
    # dynamic, random and the best vector: two more rates on the first seed, two more seeds; the vectors once each
    assert len(trained) == 3 * (3 + 2) + 4 - 1  # the best vector's run at the middle rate is one of the four
    assert all(settings["num_train_epochs"] == 2 for settings in trained)
    output = capsys.readouterr().out
    vectors = Ablation.read(study_file).vectors()
    best = max(vectors, key=lambda vector: vector["loss_weights"][0])["loss_weights"]
    gain = [-11.0, -12.0, -13.0]
    half, half_of_gain = (
        stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3) for values in ([90.0, 92.0, 96.0], gain)
    )
    row = f"| random | 0.2 | 3 | 92.7 ± {half:.1f} | 50.0 ± 0.0 | - | - | -12.0 ± {half_of_gain:.1f} |"
    assert row in output
    assert f"| best of 4 random vectors, {best} | 0.2 | 3 |" in output
    assert "| all | 0.2 | 3 | 104.7 ± 10.0 |" in output


def test_it_goes_on_where_it_was_stopped(study_file, trained, monkeypatch, capsys):
    main(["--config", str(study_file)])
    whole, lines = capsys.readouterr().out, (study_file.parent / "lines.jsonl").read_text().splitlines()
    count = len(trained)
    (study_file.parent / "lines.jsonl").write_text("".join(f"{line}\n" for line in lines[: count // 2]))
    trained.clear()
    main(["--config", str(study_file), "--tables"])
    assert not trained and "| - | 0 | - |" in capsys.readouterr().out
    main(["--config", str(study_file)])
    assert len(trained) == count - count // 2
    assert capsys.readouterr().out == whole


def test_a_run_that_fails_stops_the_study(study_file, monkeypatch):
    failed = types.SimpleNamespace(returncode=1, stdout="")
    monkeypatch.setattr(ablation, "subprocess", types.SimpleNamespace(run=lambda *args, **kwargs: failed, PIPE=None))
    with pytest.raises(RuntimeError, match="random|learning_rate"):
        main(["--config", str(study_file)])
    assert not (study_file.parent / "lines.jsonl").exists()


def test_interval_against_scipy():
    rng = np.random.default_rng(0)
    for count in range(2, 17):
        values = rng.normal(size=count)
        low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
        mean, half = interval(values.tolist())
        assert (mean, half) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-3)
    assert interval([3.0]) == (3.0, math.inf)


def test_vectors_are_spread_over_the_decades():
    study = Ablation(**{**STUDY, "random_vectors": {**STUDY["random_vectors"], "count": 500}})
    logs = np.log10([vector["loss_weights"] for vector in study.vectors()]) - [0, -1]
    assert (abs(logs) <= 1.01).all() and abs(logs.mean()) < 0.1 and abs(logs.std() - 1 / math.sqrt(3)) < 0.05


def test_keys_follow_the_settings_alone():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


def test_a_study_with_unknown_or_missing_keys_is_refused(study_file):
    for content in ({**STUDY, "seed": 1}, {name: value for name, value in STUDY.items() if name != "seeds"}):
        study_file.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match="study.yaml has"):
            Ablation.read(study_file)


def test_the_icons_study_names_settings_of_train(monkeypatch):
    study = Ablation.read(ablation.Path(__file__).parents[2] / "recipes" / "ablation_icons.yaml")
    kinds = (train.StudentArguments, train.DataArguments, DSMDTrainingArguments)
    known = set(train.HfArgumentParser(kinds)._option_string_actions)
    variants = [variant for question in study.questions.values() for variant in question.values()]
    for variant in [study.settings, *variants, *study.vectors()]:
        assert {f"--{name}" for name in variant} <= known
        if variant is not study.settings:
            losses = {name: value for name, value in variant.items() if name != "method"}
            DSMDTrainingArguments(output_dir="unused", use_cpu=True, **losses)
    assert len(study.vectors()) == 20


def test_a_real_run_and_its_test(tmp_path):
    """Trained, evaluated on validation alone; the student is left, its checkpoints are not; then the test split."""
    recipe = tmp_path / "recipe.yaml"
    data = write_data(tmp_path / "data") / "mapped"
    fields = {**SETTINGS, "vision_config": VISION["vit"], "dataset_name": str(data), "output_dir": "elsewhere"}
    fields |= {"text_config": json.loads(SETTINGS["text_config"]), "per_device_train_batch_size": 4}
    fields |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    recipe.write_text(yaml.safe_dump(fields))
    settings = {"balancer": "random", "seed": 3, "learning_rate": 2e-3}
    study = Study(
        Ablation(**STUDY | {"recipe": str(recipe), "results": tmp_path / "lines.jsonl", "runs": tmp_path}), True
    )
    figures = study.run(settings, 3, 2e-3)
    assert figures["steps"] == 8 and figures["parameters"] > 1000 and not [name for name in figures if "test" in name]
    assert 0 < figures["eval_rsum"] <= 600
    folder = tmp_path / figures["key"]
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("checkpoint-*"))
    settings["num_train_epochs"] = 2
    tested = ablation.test_one(str(recipe), settings, folder)
    assert sorted(tested) == ["test_rsum", "test_share_of_teacher"] and 0 < tested["test_rsum"] <= 600
