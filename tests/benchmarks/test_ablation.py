"""The study's program: which runs it makes, what it chooses, that it goes on, and one real run."""

import dataclasses
import json
import math
import shutil
import subprocess
import types

import numpy as np
import pytest
import yaml
from scipy import stats
from tiny_runs import SETTINGS, VISION, write_data

import train
from benchmarks import ablation
from benchmarks.ablation import Ablation, Study, interval, key_of, main
from trainers.training_args import DSMDTrainingArguments


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
    (tmp_path / "recipe.yaml").write_text("num_train_epochs: 6\n")
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
        folder = ablation.Path(command[command.index("--folder") + 1])
        (folder / "checkpoint-1").mkdir(parents=True)
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


def test_a_variant_that_names_its_learning_rate_has_no_sweep(study_file, trained, capsys):
    study_file.write_text(yaml.safe_dump({**STUDY, "questions": {"balancers": {"dynamic": {"learning_rate": 0.25}}}}))
    main(["--config", str(study_file)])
    named = [settings for settings in trained if "loss_weights" not in settings]
    assert [(settings["seed"], settings["learning_rate"]) for settings in named] == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert "| dynamic | 0.25 | 3 |" in capsys.readouterr().out


def test_a_variant_that_names_several_has_its_own_sweep(study_file, trained, capsys):
    variants = {"dynamic": {"learning_rate": [0.1, 0.25]}}
    study_file.write_text(yaml.safe_dump({**STUDY, "questions": {"balancers": variants}, "seeds": [1, 2]}))
    main(["--config", str(study_file)])
    named = [settings for settings in trained if "loss_weights" not in settings]
    assert [(settings["seed"], settings["learning_rate"]) for settings in named] == [(1, 0.1), (1, 0.25), (2, 0.25)]
    assert "| dynamic | 0.25 | 2 |" in capsys.readouterr().out


def test_it_goes_on_where_it_was_stopped(study_file, trained, monkeypatch, capsys):
    main(["--config", str(study_file)])
    whole, lines = capsys.readouterr().out, (study_file.parent / "lines.jsonl").read_text().splitlines()
    count = len(trained)
    (study_file.parent / "lines.jsonl").write_text("".join(f"{line}\n" for line in lines[: count // 4]))
    trained.clear()
    main(["--config", str(study_file), "--tables"])
    assert not trained and "| - | 0 | - |" in capsys.readouterr().out
    main(["--config", str(study_file)])
    assert len(trained) == count - count // 4
    assert capsys.readouterr().out == whole


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_stops_the_study(study_file, trained, monkeypatch, jobs):
    run, asked = ablation.subprocess.run, []

    def fail_once(command, **kwargs):
        asked.append(command)
        if "--one" in command and '"balancer": "random"' in command[command.index("--one") + 1]:
            return types.SimpleNamespace(returncode=1, stdout="")
        return run(command, **kwargs)

    monkeypatch.setattr(ablation.subprocess, "run", fail_once)
    with pytest.raises(RuntimeError, match="'random'.*The same command goes on"):
        main(["--config", str(study_file), "--jobs", str(jobs)])
    failing = [command for command in asked if "--one" in command and '"random"' in " ".join(command)]
    assert 1 <= len(failing) <= jobs  # those that had begun
    lines = ablation.read_lines(study_file.parent / "lines.jsonl")
    assert len(lines) == len(trained) <= 5 and not any(line["settings"].get("balancer") for line in lines)


def test_runs_at_once_share_the_cores_and_give_the_same_table(study_file, trained, monkeypatch, capsys):
    monkeypatch.setattr(ablation.os, "sched_getaffinity", lambda pid: range(8))
    main(["--config", str(study_file)])
    one, lines = capsys.readouterr().out, ablation.read_lines(study_file.parent / "lines.jsonl")
    (study_file.parent / "lines.jsonl").unlink()
    shutil.rmtree(study_file.parent / "runs")
    run, threads = ablation.subprocess.run, set()

    def watch(command, **kwargs):
        if "--one" in command:
            threads.add(command[command.index("--threads") + 1])
        return run(command, **kwargs)

    monkeypatch.setattr(ablation.subprocess, "run", watch)
    main(["--config", str(study_file), "--jobs", "3"])
    assert threads == {"2"} and capsys.readouterr().out == one
    again = ablation.read_lines(study_file.parent / "lines.jsonl")
    assert sorted(line["key"] for line in again) == sorted(line["key"] for line in lines)
    assert not list((study_file.parent / "runs").glob("*/checkpoint-*"))


def test_another_recipe_makes_other_runs(study_file, trained):
    main(["--config", str(study_file)])
    count = len(trained)
    (study_file.parent / "recipe.yaml").write_text("num_train_epochs: 6\nqueue_size: 5\n")
    main(["--config", str(study_file)])
    assert len(trained) == 2 * count


def test_the_test_split_is_opened_for_the_questions_asked(study_file, trained, monkeypatch, capsys):
    main(["--config", str(study_file)])
    opened = []

    def test_one(recipe, settings, folder):
        opened.append(settings)
        return {"test_rsum": 7.0, "test_share_of_teacher": 3.0}

    monkeypatch.setattr(ablation, "test_one", test_one)
    for _ in range(2):  # the second time there is nothing left to open
        capsys.readouterr()
        main(["--config", str(study_file), "--test", "--questions", "losses"])
        assert len(opened) == 3 and all("balancer" not in settings for settings in opened)
        assert "| all | 0.2 | 3 | 104.7 ± 10.0 | 50.0 ± 0.0 | 7.0 ± 0.0 | 3.0 ± 0.0 |" in capsys.readouterr().out
    line = ablation.read_lines(study_file.parent / "lines.jsonl")[-1]
    assert line["commit"] == line["test_commit"] == "abc" and "eval_rsum" in line


def test_the_commit_says_whether_the_tree_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first", "--no-gpg-sign"]):
        (tmp_path / "code.py").write_text("1")
        (tmp_path / "lines.jsonl").write_text("1")
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *command], check=True)
    clean = ablation.commit()
    assert len(clean) >= 4 and "dirty" not in clean
    (tmp_path / "lines.jsonl").write_text("2")
    assert ablation.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert ablation.commit() == f"{clean}-dirty"
    monkeypatch.setattr(ablation.shutil, "which", lambda name: None)
    assert ablation.commit() == ""


def test_a_line_cut_short_is_named(study_file, trained):
    (study_file.parent / "lines.jsonl").write_text('{"key": "a"}\n{"key": "b", "set')
    with pytest.raises(ValueError, match="lines.jsonl, line 2 is no JSON"):
        main(["--config", str(study_file)])


def test_interval_against_scipy():
    rng = np.random.default_rng(0)
    for count in range(2, 17):
        values = rng.normal(size=count)
        low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
        mean, half = interval(values.tolist())
        assert (mean, half) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-3)
    assert interval([3.0]) == (3.0, math.inf)


def test_rank_correlation_against_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 6, (2, 9)).tolist()
        assert ablation.rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_agreement_stands_beside_recall_where_runs_have_both(study_file, trained, capsys):
    main(["--config", str(study_file)])
    assert "Agreement" not in capsys.readouterr().out
    file = study_file.parent / "lines.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    with_agreement = [line | {"eval_agreement": -(line["eval_rsum"] ** 3)} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in with_agreement))
    main(["--config", str(study_file), "--tables"])
    assert "Agreement with the teacher and RSUM on validation, 9 runs: Spearman's -1.00" in capsys.readouterr().out


def test_vectors_are_spread_over_the_decades():
    study = Ablation(**{**STUDY, "random_vectors": {**STUDY["random_vectors"], "count": 500}})
    logs = np.log10([vector["loss_weights"] for vector in study.vectors()]) - [0, -1]
    assert (abs(logs) <= 1.01).all() and abs(logs.mean()) < 0.1 and abs(logs.std() - 1 / math.sqrt(3)) < 0.05


def test_keys_follow_the_settings_alone():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


def test_a_study_with_unknown_or_missing_keys_is_refused(study_file):
    without = {name: value for name, value in STUDY.items() if name != "seeds"}
    elsewhere = {**STUDY["random_vectors"], "question": "margins"}
    for content, message in (
        ({**STUDY, "seed": 1}, "'seed'"),
        (without, "expected.*'seeds'"),
        ({}, r"study.yaml has the keys \[\]"),
        ({**STUDY, "seeds": list(range(17))}, "17 seeds; expected 1 to 16"),
        ({**STUDY, "random_vectors": elsewhere}, "'margins'; expected one of its questions"),
    ):
        study_file.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=message):
            Ablation.read(study_file)


def test_missing_arguments_are_named(study_file, capsys):
    for arguments, message in (
        ([], "--config is missing"),
        (["--config", str(study_file), "--questions", "margins"], "margins: expected some of balancers, losses"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


RECIPES = sorted((ablation.Path(__file__).parents[2] / "recipes").glob("ablation_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_studies_name_settings_of_train(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    study = Ablation.read(path)
    assert (path.parents[1] / study.recipe).is_file()
    rates_of = Study(study, train=False).rates_of
    kinds = (train.StudentArguments, train.DataArguments, DSMDTrainingArguments)
    known = set(train.HfArgumentParser(kinds)._option_string_actions)
    variants = [variant for question in study.questions.values() for variant in question.values()]
    for variant in [study.settings, *variants, *study.vectors()]:
        assert {f"--{name}" for name in variant} <= known
        if variant is not study.settings:
            of_trainer = {field.name for field in dataclasses.fields(DSMDTrainingArguments)} & set(variant)
            for rate in rates_of(variant):
                fields = {name: variant[name] for name in of_trainer} | {"learning_rate": rate}
                DSMDTrainingArguments(output_dir="unused", use_cpu=True, **fields)
    assert len(study.vectors()) in (0, 20)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_committed_runs_are_of_their_recipes(path):
    """A changed recipe would leave its study's lines behind, and make every run again."""
    study, root = Ablation.read(path), path.parents[1]
    recipe = yaml.safe_load((root / study.recipe).read_text())
    lines = ablation.read_lines(root / study.results)
    assert lines and [line["key"] for line in lines] == [key_of(recipe | line["settings"]) for line in lines]


def test_a_real_run_and_its_test(tmp_path):
    """Trained, evaluated on validation alone; the student is left, its checkpoints are not; then the test split."""
    recipe = tmp_path / "recipe.yaml"
    data = write_data(tmp_path / "data") / "mapped"
    fields = {**SETTINGS, "vision_config": VISION["vit"], "dataset_name": str(data)}
    fields |= {"output_dir": str(tmp_path / "elsewhere")}
    fields |= {"text_config": json.loads(SETTINGS["text_config"]), "per_device_train_batch_size": 4}
    fields |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    recipe.write_text(yaml.safe_dump(fields))
    settings = {"balancer": "random", "seed": 3, "learning_rate": 2e-3}
    study = Study(
        Ablation(**STUDY | {"recipe": str(recipe), "results": tmp_path / "lines.jsonl", "runs": tmp_path}), True
    )
    study.run(settings, 3, 2e-3)
    figures = study.line(settings, 3, 2e-3)
    assert figures["steps"] == 8 and figures["parameters"] > 1000 and not [name for name in figures if "test" in name]
    assert 0 < figures["eval_rsum"] <= 600
    folder = tmp_path / figures["key"]
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("checkpoint-*"))
    assert figures["threads"] == len(ablation.os.sched_getaffinity(0))
    settings["num_train_epochs"] = 2
    tested = ablation.test_one(str(recipe), settings, folder)
    assert sorted(tested) == ["test_rsum", "test_share_of_teacher"] and 0 < tested["test_rsum"] <= 600
