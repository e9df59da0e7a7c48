"""A new run in the place of an old one: nothing of another's is deleted, and at no moment is there neither run."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import VISION, arguments

import train
from trainers.base_trainer import RetrievalTrainer
from trainers.report import RUN_FILES
from trainers.run import checkpoints, replacing
from trainers.run.output_dir import prepare_output_dir
from trainers.run.replacing import move_aside, put_back, settle, strangers


SMALL = {"vision_config": json.dumps(VISION["vit"]), "per_device_train_batch_size": 4}
SAVED = {**SMALL, "save_strategy": "steps", "save_steps": 4}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder but its lock: files with their content, folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != replacing.LOCK
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_data) -> Path:
    """A run that left all that a run can leave, evaluated afterwards."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train.main(arguments(run, run_data, SAVED, report_to="tensorboard", projection_dim=8))
    evaluated = {"do_train": False, "model_name_or_path": run, "report_to": "tensorboard"}
    train.main(arguments(run, run_data, SAVED, **evaluated))
    (run / "emissions.csv").write_text("what codecarbon leaves")
    return run


@pytest.fixture
def run(tmp_path, finished) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(command: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(command)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    return str(stop.value)


def test_a_run_holds_no_strangers(run):
    names = {path.name for path in run.iterdir()}
    assert {"README.md", "runs", "assets", "checkpoint-4", "teacher_pca.safetensors", "eval_results.json"} <= names
    assert strangers(run, RUN_FILES) == []


STRANGERS = [
    "thesis/chapter1.txt", "notes.txt", "my_model.py", "assets/holiday.png", "assets/deep/query.png", "runs/notes.txt",
    "checkpoint-4/notes.txt", "checkpoint-99/model.safetensors", "checkpoint-best/model.safetensors", ".git/config",
    "optimizer.pt", "README.md.bak", "model.safetensors/weights", "assets.zip", "all_results_of_mine.json",
]  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_what_no_run_leaves_is_named_and_nothing_is_deleted(run, run_data, name):
    if name.startswith("model.safetensors/"):
        (run / "model.safetensors").unlink()
    (run / name).parent.mkdir(exist_ok=True, parents=True)
    (run / name).write_text("of years")
    before = tree(run)
    message = refused([*arguments(run, run_data, SAVED), "--overwrite_output_dir"])
    assert name in message or name.split("/")[0] in message
    assert "nothing was deleted" in message and tree(run) == before


def test_an_empty_folder_and_a_link_are_strangers_too(run):
    (run / "empty").mkdir()
    (run / "assets" / "query.png").unlink()
    (run / "assets" / "query.png").symlink_to("/etc/hostname")
    os.symlink("/etc", run / "runs" / "elsewhere")
    assert strangers(run, RUN_FILES) == ["assets/query.png", "empty", "runs/elsewhere"]


def test_a_folder_without_a_runs_mark_is_no_run(tmp_path, run_data):
    """Another program's model: each file has a name that ours has too."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    command = arguments(folder, run_data, SAVED)
    before = tree(folder)
    assert "holds no run of this program" in refused([*command, "--overwrite_output_dir"])
    assert "another run" in refused(command)
    assert "give another --output_dir" in refused([*command, "--resume_from_checkpoint", "last"])
    assert tree(folder) == before


def test_at_most_three_strangers_are_named(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").touch()
    args = train.parse_arguments(["--output_dir", str(tmp_path), "--use_cpu"])[2]
    with pytest.raises(ValueError, match=r"holds 0.txt, 1.txt, 2.txt and 2 more: nothing was deleted"):
        prepare_output_dir(args, overwrite=True)


@pytest.mark.parametrize(
    "wrong", [{"dataset_name": "no/such"}, {"test_split": "tset"}, {"text_config": "{}"}, {"learning_rat": 1}]
)
def test_with_wrong_input_the_old_run_stays_as_it_was(run, run_data, wrong):
    before = tree(run)
    refused([*arguments(run, run_data, SAVED, **wrong), "--overwrite_output_dir"])
    assert tree(run) == before


def test_the_old_run_goes_with_the_first_checkpoint_of_the_new_one(run, run_data, monkeypatch):
    old, seen = tree(run), []
    begin = RetrievalTrainer.begin_step

    def look(self, batches):
        aside = run / checkpoints.REPLACED
        seen.append(aside.is_dir() and tree(aside) == old)
        return begin(self, batches)

    monkeypatch.setattr(RetrievalTrainer, "begin_step", look)
    train.main([*arguments(run, run_data, SAVED, learning_rate=0.5), "--overwrite_output_dir"])
    assert seen == [True] * 4 + [False] * 4
    assert not strangers(run, RUN_FILES) and {path.name for path in run.glob("_*")} == {"_lock", "_command.json"}
    assert (run / "model.safetensors").read_bytes() != old["model.safetensors"]
    assert not (run / "eval_results.json").exists()  # the old one's


def test_a_run_without_checkpoints_replaces_the_old_one_with_its_student(run, run_data, monkeypatch):
    seen = []
    save = RetrievalTrainer.save_model

    def look(self, *args, **kwargs):
        seen.append((run / checkpoints.REPLACED / "model.safetensors").is_file())
        return save(self, *args, **kwargs)

    monkeypatch.setattr(RetrievalTrainer, "save_model", look)
    train.main([*arguments(run, run_data, SMALL, save_strategy="no"), "--overwrite_output_dir"])
    assert seen == [True] and not (run / checkpoints.REPLACED).exists() and (run / "all_results.json").is_file()


def die_at(monkeypatch, step: int) -> None:
    begin = RetrievalTrainer.begin_step

    def die(self, batches):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return begin(self, batches)

    monkeypatch.setattr(RetrievalTrainer, "begin_step", die)


def test_the_old_run_comes_back_where_the_new_one_dies_before_its_first_checkpoint(run, run_data, monkeypatch, capsys):
    old = tree(run)
    command = arguments(run, run_data, SAVED, learning_rate=0.5, report_to="tensorboard")
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.main([*command, "--overwrite_output_dir"])
    assert tree(run / checkpoints.REPLACED) == old
    assert "another run" in refused(command) and "is back in" in capsys.readouterr().out
    assert tree(run) == old


def test_a_new_run_that_died_before_its_first_checkpoint_is_gone_on_with_where_that_is_said(
    run, run_data, monkeypatch, tmp_path
):
    command = [*arguments(run, run_data, SAVED, learning_rate=0.5), "--overwrite_output_dir"]
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.main(command)
    train.main([*command, "--resume_from_checkpoint", "last"])
    train.main(arguments(tmp_path / "unbroken", run_data, SAVED, learning_rate=0.5))
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "unbroken" / "model.safetensors").read_bytes()
    assert not (run / checkpoints.REPLACED).exists()


class Killed(BaseException):
    pass


def killed_at(monkeypatch, number: int) -> None:
    """Dies at the n-th change of a folder: before it, or for half a number after it."""
    count = itertools.count()

    def wrap(place, name):
        change = getattr(place, name)

        def call(*args, **kwargs):
            now = next(count)
            if now == number / 2 and number % 2 == 0:
                raise Killed
            result = change(*args, **kwargs)
            if now == (number - 1) / 2:
                raise Killed
            return result

        monkeypatch.setattr(place, name, call)

    for place, name in ((Path, "rename"), (Path, "mkdir"), (Path, "rmdir"), (Path, "unlink"), (shutil, "rmtree")):
        wrap(place, name)


def small_run(folder: Path, what: str) -> dict:
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "events.out.tfevents.1").write_text(what)
    for name in ("config.json", "training_args.json", "model.safetensors"):
        (folder / name).write_text(what)
    checkpoint = folder / "_checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text(what)
    checkpoints.seal(checkpoint)
    checkpoints.publish(checkpoint, folder / "checkpoint-4")
    return tree(folder)


def test_killed_at_any_change_the_old_run_or_the_new_one_is_whole(tmp_path, monkeypatch):
    """Moved aside, and the new run dies; then put back, killed again there: the old one is whole at the end. Or the
    new one has a checkpoint: then that stays."""
    ends = {"old": 0, "new": 0}
    for first, second in itertools.product(range(40), (None, *range(0, 26, 3))):
        folder = tmp_path / f"{first}-{second}"
        old = small_run(folder, "old")
        try:
            with monkeypatch.context() as patch:
                killed_at(patch, first)
                move_aside(folder)
                (folder / "runs" / "b").mkdir(parents=True)  # the new run begins
                (folder / "runs" / "b" / "events.out.tfevents.2").write_text("new")
                beside = folder / "_checkpoint"
                beside.mkdir()
                (beside / "weights").write_text("new")
                checkpoints.seal(beside)
                checkpoints.publish(beside, folder / "checkpoint-2")
        except Killed:
            pass
        if second is not None:
            with monkeypatch.context() as patch, pytest.raises(Killed) if second < 3 else _maybe(Killed):
                killed_at(patch, second)
                settle(folder, RUN_FILES, False)
                raise Killed
        settle(folder, RUN_FILES, False)
        left = {name: content for name, content in tree(folder).items() if not name.startswith("_checkpoint")}
        if "checkpoint-2" in left:
            ends["new"] += 1
            assert not any(name.startswith("_") or content == b"old" for name, content in left.items()), left.keys()
        else:
            ends["old"] += 1
            assert left == old, (first, second)
        shutil.rmtree(folder)
    assert min(ends.values()) > 20, ends


def _maybe(kind):
    import contextlib

    return contextlib.suppress(kind)


def test_a_strangers_file_that_came_meanwhile_is_left_and_named(run):
    move_aside(run)
    (run / "assets").mkdir()
    (run / "assets" / "holiday.png").write_text("of years")
    (run / "notes.txt").write_text("of years")
    with pytest.raises(ValueError, match="assets is in the way of the run that was there before"):
        put_back(run, RUN_FILES)
    (run / "assets" / "holiday.png").rename(run / "holiday.png")
    assert put_back(run, RUN_FILES)
    assert strangers(run, RUN_FILES) == ["holiday.png", "notes.txt"]
    assert (run / "assets" / "query.png").is_file()
