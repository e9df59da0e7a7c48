"""Disk full, no permission, killed workers, vanishing images, no memory, two runs in a folder: nothing written before
is lost, and the message says what to do.
"""

import errno
import json
import os
import random
import resource
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from conftest import make_rows, make_student
from safetensors.torch import load_file
from tiny_runs import VISION, arguments
from tiny_trainer import make_trainer
from transformers import TrainerCallback

import train
from datasets_scripts import add_teacher_features
from datasets_scripts.building import Row, build
from rows.teacher_columns import TEACHER_COLUMNS
from trainers.run.checkpoints import damage, last_whole, of_run
from trainers.run.hub_push import fetch_last_checkpoint, push_checkpoint, snapshot


SMALL = {"vision_config": json.dumps(VISION["vit"]), "per_device_train_batch_size": 4}
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def whole(folder: Path) -> list[str]:
    assert all(damage(checkpoint) is None for checkpoint in of_run(folder))
    return [checkpoint.name for checkpoint in of_run(folder)]


@contextmanager
def disk_full(beyond: int):
    """Files cannot grow beyond so many bytes: the write raises, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beyond, before[1]))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A tiny dual encoder, as a folder."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    for part in make_student():
        part.save_pretrained(folder)
    return folder


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# What is full is the disk for this file: weights and optimiser by their size, the others by the function that writes.
@pytest.mark.parametrize(
    ("beyond", "patched"),
    [
        (30_000, None),  # weights: safetensors has an error of its own
        (500_000, None),  # optimiser: torch too
        (None, "trainers.distillation_trainer.save_file"),
        (None, "transformers.trainer_callback.TrainerState.save_to_json"),
        (None, "trainers.run.resumable_trainer.write_json"),
        (None, "trainers.base_trainer.write_readme"),
        (None, "trainers.run.checkpoints.seal"),
        (None, "trainers.run.checkpoints.publish"),
    ],
)
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, rows, monkeypatch, beyond, patched):
    trainer = make_trainer(tmp_path, rows, **STEPS)
    save = trainer._save_checkpoint

    def second_is_refused(*args):
        if trainer.state.global_step < 4:
            return save(*args)
        if patched:
            monkeypatch.setattr(patched, full)
        with disk_full(beyond) if beyond else nullcontext():
            save(*args)

    trainer._save_checkpoint = second_is_refused
    said = r"checkpoint-4 could not be written: .*checkpoint-2\. Free the disk, then go on by --resume_from"
    with pytest.raises(OSError, match=said):
        trainer.train()
    assert whole(tmp_path) == ["checkpoint-2"] and not (tmp_path / "_checkpoint").exists()
    monkeypatch.undo()
    resumed = make_trainer(tmp_path, rows, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert whole(tmp_path) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("beyond", [2_000, 30_000])
def test_a_student_that_cannot_be_saved_leaves_the_one_before(tmp_path, rows, beyond):
    trainer = make_trainer(tmp_path, rows)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer.train()
    with disk_full(beyond), pytest.raises(Exception, match="(?i)file too large|os error 27"):
        trainer.save_model()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert not (tmp_path / "_writing").exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "patched",
    [
        "trainers.report.save_query",
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in ("trainers.report.write_json", "trainers.report.plot_curves", "trainers.report.draw_grids")
        ),
    ],
)
def test_a_report_that_cannot_be_written_is_made_up_for(tmp_path, run_data, monkeypatch, patched):
    command = arguments(tmp_path / "run", run_data, {**STEPS, **SMALL})
    said = "No space left on device\nNothing that was written is lost: .* with --resume_from_checkpoint last completes"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=said):
        patch.setattr(patched, full)
        train.main(command)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert whole(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    train.main([*command, "--resume_from_checkpoint", "last"])
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["test_rsum"] >= 0
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_events_that_cannot_be_written_stop_the_run_and_say_why(tmp_path, rows):
    """TensorBoard's own thread writes them, and raises at a later one."""
    trainer = make_trainer(tmp_path, rows, report_to="tensorboard", max_steps=8)
    said = "The log could not be written: .*File too large.* Last checkpoint: none. Free the disk"
    with disk_full(3000), pytest.raises(OSError, match=said):
        trainer.train()


def test_a_dataset_that_cannot_be_written_leaves_nothing_half(tmp_path):
    image = make_rows(1)[0]["image"]
    image.save(tmp_path / "image.png")
    rows = {"train": [Row(str(i), ["a caption"], (tmp_path / "image.png").read_bytes) for i in range(40)]}
    with disk_full(20_000), pytest.raises(OSError, match="(?i)file too large"):
        build(rows, tmp_path / "out", "title", "how", "mit")
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
    build(rows, tmp_path / "out", "title", "how", "mit")
    assert len(datasets.load_from_disk(tmp_path / "out")["train"]) == 40


def test_features_that_cannot_be_written_keep_the_files_before(tmp_path, teacher):
    parts = {"validation": make_rows(2, seed=1), "train": make_rows(40)}  # the second file is the larger
    datasets.DatasetDict(parts).remove_columns(TEACHER_COLUMNS).save_to_disk(tmp_path / "source")
    command = [
        "--dataset_name",
        tmp_path / "source",
        "--teacher_model_name_or_path",
        teacher,
        "--output_dir",
        tmp_path / "features",
    ]
    command = [*map(str, command), "--num_workers", "0"]
    said = "Nothing that was written is lost: mend this, and the same command goes on from .*features.partial"
    with disk_full(40_000), pytest.raises(OSError, match=said):
        add_teacher_features.main(command)
    partial = tmp_path / "features.partial"
    assert not (tmp_path / "features").exists()
    assert [path.name for path in partial.glob("*.parquet")] == ["validation-00000.parquet"]
    before = (partial / "validation-00000.parquet").stat().st_ino
    add_teacher_features.main(command)
    (finished,) = (tmp_path / "features" / "data").glob("validation*")
    assert finished.stat().st_ino == before and not partial.exists()
    assert len(datasets.load_dataset(str(tmp_path / "features"), split="train", cache_dir=tmp_path / "cache")) == 40


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, rows):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = make_trainer(tmp_path, rows, **settings)
    save = trainer._save_checkpoint

    def clock_runs_backwards(*args):
        save(*args)
        step = trainer.state.global_step
        os.utime(tmp_path / f"checkpoint-{step}", (1e9 - step, 1e9 - step))

    trainer._save_checkpoint = clock_runs_backwards
    trainer.train()
    assert whole(tmp_path) == ["checkpoint-5", "checkpoint-6"] and last_whole(tmp_path).name == "checkpoint-6"


# Loaders


class KillWorker(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for child in psutil.Process().children():
                child.kill()


def test_a_killed_loader_worker_is_named(tmp_path, rows):
    settings = {**STEPS, "max_steps": 40, "per_device_train_batch_size": 4, "dataloader_num_workers": 1}
    trainer = make_trainer(tmp_path, rows, callbacks=[KillWorker()], **settings)
    said = "A worker of the data loader was killed.*--dataloader_num_workers.*--resume_from_checkpoint last"
    with pytest.raises(RuntimeError, match=said):
        trainer.train()
    assert whole(tmp_path) == ["checkpoint-2"]


def files_of(rows: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """The rows with images that are files of a folder."""
    folder.mkdir()
    paths = []
    for i, image in enumerate(rows["image"]):
        paths.append(str(folder / f"{i}.png"))
        image.save(paths[-1])
    return rows.remove_columns("image").add_column("image", paths).cast_column("image", datasets.Image())


class Vanish(TrainerCallback):
    def __init__(self, paths: list[Path]):
        self.paths = paths

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for path in self.paths:
                path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes_in_mid_epoch_is_left_out_and_named(tmp_path, workers, caplog):
    rows = files_of(make_rows(32), tmp_path / "images")
    vanish = Vanish([tmp_path / "images" / f"{i}.png" for i in (3, 20)])
    settings = {"max_steps": 8, "dataloader_num_workers": workers}
    trainer = make_trainer(tmp_path / "run", rows, callbacks=[vanish], **settings)
    trainer.train()
    assert trainer.state.global_step == 8 and len(trainer.unreadable) == 2
    for i in (3, 20):
        assert f"Image left out: 0/{i}: unreadable image: " in caplog.text and f"{i}.png" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_before_an_evaluation_is_named(tmp_path, workers):
    rows = files_of(make_rows(8, seed=1), tmp_path / "images")
    vanish = Vanish([tmp_path / "images" / "5.png"])
    settings = {**STEPS, "eval_strategy": "steps", "eval_steps": 3, "dataloader_num_workers": workers}
    trainer = make_trainer(tmp_path / "run", make_rows(32), callbacks=[vanish], eval_dataset=rows, **settings)
    with pytest.raises(ValueError, match="The image of '1/5' cannot be evaluated: unreadable image: .*5.png"):
        trainer.train()
    assert whole(tmp_path / "run") == ["checkpoint-2"]


# The Hub


KINDS = (500, 429, 401, "close")
PLACES = ("", "POST", "PUT", "GET", "HEAD", "/commit/", "/preupload/", "/resolve/", "info/lfs", "repos/create")


@pytest.fixture(scope="module")
def checkpoints_of_a_run(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pushed")
    make_trainer(folder, make_rows(32), **STEPS).train()
    return of_run(folder)


@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 110), marks=pytest.mark.soak)], ids=["10", "100"])
def test_faults_of_the_hub_leave_no_checkpoint_broken(tmp_path, hub, monkeypatch, checkpoints_of_a_run, seeds):
    """Pushed and fetched amid faults: what is on the Hub, and what is fetched, is a whole checkpoint."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_one(checkpoints_of_a_run[0], tmp_path / "first")
    came_through = 0
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        fail(hub, rng)
        push_one(checkpoints_of_a_run[seed % 2], folder / "push")
        assert not (folder / "push").exists()
        for commit in hub.commits("user/student")[1:]:
            write_files(commit.files, folder / commit.oid)
            assert damage(folder / commit.oid / "last-checkpoint") is None
        hub.recover()
        fail(hub, rng)
        try:
            fetched = Path(fetch_last_checkpoint("user/student", folder / "run"))
        except Exception as error:  # of the Hub's client, or ours
            assert not of_run(folder / "run"), error
        else:
            assert damage(fetched) is None and of_run(folder / "run") == [fetched]
            came_through += 1
        hub.recover()
        fetched = Path(fetch_last_checkpoint("user/student", folder / "run"))
        assert damage(fetched) is None
        shutil.rmtree(folder)
    assert 0 < came_through < len(seeds)


@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 110), marks=pytest.mark.soak)], ids=["10", "100"])
def test_faults_of_the_hub_leave_no_feature_dataset_broken(tmp_path, hub, monkeypatch, teacher, seeds):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    rows = datasets.DatasetDict({"train": make_rows(6), "validation": make_rows(3, seed=1)})
    rows.remove_columns(TEACHER_COLUMNS).save_to_disk(tmp_path / "source")
    command = [
        "--dataset_name",
        tmp_path / "source",
        "--teacher_model_name_or_path",
        teacher,
        "--output_dir",
        tmp_path / "features",
    ]
    command = [*map(str, command), "--num_workers", "0"]
    add_teacher_features.main(command)
    local = {
        path.relative_to(tmp_path / "features").as_posix(): path.read_bytes()
        for path in (tmp_path / "features").rglob("*")
        if path.is_file()
    }
    failed = 0
    for seed in seeds:
        hub.clear()
        fail(hub, random.Random(seed))
        try:
            add_teacher_features.main([*command, "--push_to_hub", "user/features"])
        except Exception:  # of the Hub's client: the command is given again
            failed += 1
        hub.recover()
        add_teacher_features.main([*command, "--push_to_hub", "user/features"])
        for commit in hub.commits("datasets/user/features")[1:]:
            assert {name: commit.files.get(name) for name in local} == local
        assert len(hub.commits("datasets/user/features")) > 1
    assert 0 < failed < len(seeds)


def fail(hub, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        hub.fail(rng.choice([1, 2, 10]), rng.choice(KINDS), on=rng.choice(PLACES))


def push_one(checkpoint: Path, folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    snapshot(checkpoint, folder)
    push_checkpoint(folder, "user/student", "last-checkpoint", checkpoint.name, None, None)


def write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
