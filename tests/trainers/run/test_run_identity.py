"""A resumed run says what differs from the one it goes on, and is refused where the result could not be the same."""

import json
import logging
import math
from pathlib import Path

import datasets
import pytest
import transformers
from conftest import make_rows, make_student
from tiny_trainer import make_trainer

from trainers.run import resumable_trainer
from trainers.run.run_identity import (
    IDENTITY_FILE,
    NEWEST_TRIED,
    changed_batch,
    check_identity,
    describe_identity,
    rows_fingerprint,
)


SETTINGS = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, make_rows(16), eval_dataset=make_rows(6, seed=1), **SETTINGS)
    trainer.facts.teacher = {"id": "a", "revision": "1"}
    trainer.train()
    return folder / "checkpoint-1"


def differences(checkpoint, folder, rows=None, eval_dataset=None, teacher="a", **settings) -> list[str]:
    trainer = make_trainer(
        folder, rows or make_rows(16), eval_dataset=eval_dataset or make_rows(6, seed=1), **{**SETTINGS, **settings}
    )
    trainer.facts.teacher = {"id": teacher, "revision": "1"}
    return check_identity(trainer.identity(), trainer.arguments_class, str(checkpoint), allow_changes=True)


def change(rows: datasets.Dataset, row: int, **values) -> datasets.Dataset:
    changed = [{**example, **(values if i == row else {})} for i, example in enumerate(rows)]
    return datasets.Dataset.from_list(changed, features=rows.features)


def test_the_same_run_differs_in_nothing(checkpoint, tmp_path):
    assert differences(checkpoint, tmp_path) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 7, "logging_first_step": True},
        {"per_device_eval_batch_size": 3},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True},
        {"save_total_limit": 3, "run_name": "other", "disable_tqdm": False, "log_level": "error"},
        {"push_to_hub": True, "hub_model_id": "user/other", "hub_strategy": "checkpoint"},
        {"resume_from_checkpoint": "last", "allow_changes": True, "max_skipped_steps": 3, "do_eval": True},
    ],
)
def test_what_changes_no_result_is_free(checkpoint, tmp_path, settings):
    assert differences(checkpoint, tmp_path / "moved", **settings) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.001 in the checkpoint, 0.5 now"),
        ({"max_steps": 2}, "max_steps: 1 in the checkpoint, 2 now"),
        ({"random_shift": 0.1}, "random_shift: 0.0 in the checkpoint, 0.1 now"),
        ({"seed": 1}, "seed: 42 in the checkpoint, 1 now"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size: 16 in the checkpoint, 8 now"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 in the checkpoint, 2 now"),
        ({"queue_size": 8}, "queue_size: 24 in the checkpoint, 8 now"),
        ({"losses": ["feature"]}, 'losses: ["contrastive", "feature", "similarity", "hard_negative"] in the'),
        ({"bf16": True}, "bf16: false in the checkpoint, true now"),
        ({"optim": "adamw_torch"}, 'optim: "adamw_torch_fused" in the checkpoint, "adamw_torch" now'),
        (
            {"teacher": "b"},
            'teacher: {"id": "a", "revision": "1"} in the checkpoint, {"id": "b", "revision": "1"} now',
        ),
    ],
)
def test_each_difference_is_named(checkpoint, tmp_path, settings, line):
    found, *more = differences(checkpoint, tmp_path, **settings)
    assert found.startswith(line)
    changes_step = settings.keys() & {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert [part.partition(":")[0] for part in more] == ["rows in a step"] * bool(changes_step)


@pytest.mark.parametrize(
    "rows",
    [
        make_rows(17),
        make_rows(16).select([1, 0, *range(2, 16)]),
        change(make_rows(16), 9, captions=["something else"], teacher_text_embeds=[[1.0] * 16]),
        change(make_rows(16), 0, image_id="renamed"),
        change(make_rows(16), 15, teacher_image_embeds=[1.0] * 16),
    ],
)
def test_other_rows_are_named(checkpoint, tmp_path, rows):
    (line,) = differences(checkpoint, tmp_path, rows=rows)
    assert line.startswith("fingerprint of the training split: ")
    (line,) = differences(checkpoint, tmp_path, eval_dataset=rows)
    assert line.startswith("fingerprint of the validation split: ")


def test_versions_processes_and_student_are_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "9.9")
    (line,) = differences(checkpoint, tmp_path)
    assert line.startswith("transformers: ") and line.endswith('in the checkpoint, "9.9" now')
    monkeypatch.undo()
    vision = {"model_type": "vit", "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1}
    model, _ = make_student({**vision, "num_attention_heads": 2, "intermediate_size": 64, "hidden_dropout_prob": 0.0})
    trainer = make_trainer(tmp_path, make_rows(16), model=model, eval_dataset=make_rows(6, seed=1), **SETTINGS)
    trainer.facts.teacher = {"id": "a", "revision": "1"}
    (line,) = check_identity(trainer.identity(), trainer.arguments_class, str(checkpoint), True)
    assert line == "student.vision_config.num_hidden_layers: 2 in the checkpoint, 1 now"
    saved = json.loads((checkpoint / IDENTITY_FILE).read_text())
    assert saved["number of processes"] == 1 and saved["device"] == "cpu" and saved["method"] == "distillation"


def test_more_processes_and_another_method_are_named(checkpoint, tmp_path, monkeypatch):
    described = describe_identity

    def on_two(*of_run):
        return described(*of_run) | {"number of processes": 2, "method": "contrastive"}

    monkeypatch.setattr(resumable_trainer, "describe_identity", on_two)
    assert differences(checkpoint, tmp_path) == [
        'method: "distillation" in the checkpoint, "contrastive" now',
        "number of processes: 1 in the checkpoint, 2 now",
        "rows in a step: 16 in the checkpoint, 32 now, so that the epochs made so far count 2 times what they did",
    ]


@pytest.mark.parametrize(
    ("before", "after", "factor", "keeps"),
    [
        ((16, 1, 1), (8, 1, 1), "count 0.5 times", 2),
        ((16, 1, 1), (4, 1, 2), "count 0.5 times", 2),
        ((8, 2, 2), (8, 2, 1), "count 0.5 times", 4),
        ((8, 2, 1), (8, 2, 2), "count 2 times", 1),
        ((8, 1, 1), (8, 3, 1), "count 3 times", 1),
        ((16, 1, 1), (6, 1, 1), "count 0.375 times", None),
        ((8, 1, 1), (16, 1, 1), "count 2 times", None),
        ((8, 2, 1), (16, 1, 1), None, None),
        ((8, 1, 2), (4, 4, 1), None, None),
    ],
)
def test_another_global_batch_is_named_with_what_would_keep_it(before, after, factor, keeps):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "number of processes")
    lines = changed_batch(*(dict(zip(names, run)) | {"max_steps": -1} for run in (before, after)))
    assert len(lines) == (factor is not None)
    if factor is not None:
        assert factor in lines[0] and "the learning rate goes " in lines[0]
        assert ("--gradient_accumulation_steps" in lines[0]) == (keeps is not None)
        if keeps is not None:
            assert f"--gradient_accumulation_steps {keeps} would keep" in lines[0]
            assert after[0] * keeps * after[2] == math.prod(before)


def test_what_another_global_batch_is_said_to_do_is_what_trainer_does(tmp_path, caplog):
    """16 rows for 4 epochs: with 8 in a step the 4th ends the second epoch, with 4 the first."""
    settings = {"num_train_epochs": 4, "max_steps": -1, "save_strategy": "steps", "save_steps": 4}
    first = make_trainer(tmp_path / "first", make_rows(16), per_device_train_batch_size=8, **settings)
    first.train()
    of_first = {entry["step"]: entry for entry in first.state.log_history if "learning_rate" in entry}
    more = {"per_device_train_batch_size": 4, "allow_changes": True, **settings}
    resumed = make_trainer(tmp_path / "resumed", make_rows(16), **more)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert "rows in a step: 8 in the checkpoint, 4 now, so that the epochs made so far count 0.5 times" in caplog.text
    assert "(--gradient_accumulation_steps 2 would keep the step)" in caplog.text
    of_resumed = {entry["step"]: entry for entry in resumed.state.log_history if "learning_rate" in entry}
    assert of_first[4]["epoch"] == 2 and of_resumed[8]["epoch"] == 2 and resumed.state.max_steps == 16
    assert of_resumed[8]["learning_rate"] > of_first[5]["learning_rate"]
    caplog.clear()
    kept = make_trainer(tmp_path / "kept", make_rows(16), gradient_accumulation_steps=2, **more)
    with caplog.at_level(logging.WARNING):
        kept.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert "rows in a step" not in caplog.text and kept.state.max_steps == 8
    rates = [entry["learning_rate"] for entry in kept.state.log_history if "learning_rate" in entry]
    assert rates == [entry["learning_rate"] for entry in of_first.values()]


def test_it_is_refused_with_every_difference_and_goes_where_told(checkpoint, tmp_path, caplog):
    changes = {"learning_rate": 0.5, "queue_size": 8, "max_steps": 2}
    settings = {**SETTINGS, **changes, "eval_dataset": make_rows(6, seed=1)}
    trainer = make_trainer(tmp_path, make_rows(16), **settings)
    with pytest.raises(ValueError, match="is of another run") as refusal:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    for name in (*changes, "teacher", "--allow_changes"):
        assert name in str(refusal.value)
    assert trainer.state.global_step == 0
    told = make_trainer(tmp_path, make_rows(16), allow_changes=True, **settings)
    with caplog.at_level(logging.WARNING):
        told.train(resume_from_checkpoint=str(checkpoint))
    assert told.state.global_step == 2
    for name in changes:
        assert f"Resumed with a change, {name}: " in caplog.text


def test_a_checkpoint_of_another_program_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="has no _run.json: it is no checkpoint of this program"):
        trainer = make_trainer(tmp_path, make_rows(16))
        check_identity(trainer.identity(), trainer.arguments_class, str(tmp_path), True)


def test_workers_count_where_they_decide_a_streams_order(tmp_path):
    stream = make_rows(16).to_iterable_dataset()
    names = []
    for rows in (make_rows(16), stream):
        trainer = make_trainer(tmp_path, rows, max_steps=1, dataloader_num_workers=1)
        names.append("dataloader_num_workers" in trainer.identity())
    assert names == [False, True]


def test_nothing_private_is_kept(checkpoint):
    content = (checkpoint / IDENTITY_FILE).read_text()
    assert str(checkpoint.parent) not in content and "hub_token" not in content


def test_the_fingerprint_is_of_values(tmp_path):
    rows = make_rows(300)
    rows.save_to_disk(tmp_path)
    again = datasets.load_from_disk(tmp_path)
    assert (
        rows_fingerprint(rows)
        == rows_fingerprint(again)
        == rows_fingerprint(rows.select(range(300)).flatten_indices())
    )
    assert rows_fingerprint(rows) != rows_fingerprint(rows.select(range(299)))
    assert rows_fingerprint(rows) != rows_fingerprint(make_rows(300, seed=1))


def test_a_transformers_that_was_not_tried_is_warned_of_once_and_says_what_to_do(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="trainers")
    major, minor = NEWEST_TRIED.split(".")
    warned = {}
    for version in (f"{NEWEST_TRIED}.7", "5.9.1", f"{major}.{int(minor) + 1}.0", f"{int(major) + 1}.0.0.dev0"):
        trainer = make_trainer(tmp_path / version, make_rows(16))
        with monkeypatch.context() as patch:
            patch.setattr(transformers, "__version__", version)
            caplog.clear()
            trainer.train()
        warned[version] = [text for text in caplog.messages if "newer than" in text]
    known, old, newer, next_major = warned.values()
    assert not known and not old and len(newer) == len(next_major) == 1
    assert f"pip install 'transformers=={NEWEST_TRIED}.*'" in newer[0] and f"{major}.{int(minor) + 1}.0" in newer[0]


def test_pyproject_admits_what_was_tried_and_nothing_newer():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    major, minor = NEWEST_TRIED.split(".")
    assert f',<{major}.{int(minor) + 1}",' in next(line for line in project.splitlines() if '"transformers>=' in line)
