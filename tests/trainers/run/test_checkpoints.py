"""A checkpoint is whole or absent; a damaged one is named and passed over; the last whole one is never deleted."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from tiny_trainer import make_trainer

from trainers.run import checkpoints
from trainers.run.checkpoints import damage, last_whole, of_run, publish, reseal, rotate, seal
from trainers.run.hub_push import fetch_last_checkpoint, snapshot


def write(folder: Path, step: int, **files: str) -> Path:
    """A sealed checkpoint under its name."""
    beside = folder / "_checkpoint"
    (beside / "deep").mkdir(parents=True)
    for name, content in {"weights": "some weights", "deep/state": "a state", **files}.items():
        (beside / name).write_text(content)
    seal(beside)
    publish(beside, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_is_whole(tmp_path):
    folder = write(tmp_path, 2)
    assert damage(folder) is None and last_whole(tmp_path) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: os.truncate(folder / "weights", 5), "weights has 5 bytes, 12 were written"),
        (lambda folder: (folder / "weights").write_text("some weights and"), "weights has 16 bytes, 12 were written"),
        (lambda folder: (folder / "deep" / "state").unlink(), "deep/state is missing"),
        (lambda folder: shutil.rmtree(folder / "deep"), "deep/state is missing"),
        (lambda folder: flip(folder / "weights"), "weights is not what was written"),
        (lambda folder: (folder / checkpoints.MANIFEST).unlink(), "no _manifest.json: it was not finished"),
        (lambda folder: os.truncate(folder / checkpoints.MANIFEST, 20), "_manifest.json cannot be read"),
        (lambda folder: (folder / checkpoints.MANIFEST).write_text("[1]"), "_manifest.json cannot be read"),
        (lambda folder: (folder / checkpoints.MANIFEST).write_text('{"weights": 3}'), "_manifest.json cannot be read"),
    ],
)
def test_damage_is_named_and_passed_over_for_the_one_before(tmp_path, caplog, harm, named):
    before, folder = write(tmp_path, 8), write(tmp_path, 10)  # 10 comes after 8, though not by name
    harm(folder)
    assert named in damage(folder)
    assert last_whole(tmp_path) == before
    assert f"{folder} is damaged and passed over" in caplog.text and named in caplog.text


def test_a_run_without_a_whole_checkpoint_has_none(tmp_path):
    (write(tmp_path, 2) / "weights").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").write_text("no folder")
    assert last_whole(tmp_path) is None and last_whole(tmp_path / "absent") is None


def test_what_was_being_written_is_no_checkpoint(tmp_path):
    folder = write(tmp_path, 2)
    shutil.copytree(folder, tmp_path / "_checkpoint")
    assert of_run(tmp_path) == [folder]


def test_a_checkpoint_takes_the_name_of_an_earlier_attempt(tmp_path, monkeypatch):
    write(tmp_path, 2, weights="of an earlier attempt")
    again = write(tmp_path, 2)
    assert damage(again) is None and (again / "weights").read_text() == "some weights"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]

    renamed = []
    rename = Path.rename

    def killed_at_the_second(path, target):
        renamed.append(path)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed_at_the_second)
        write(tmp_path, 2, weights="of a later attempt")
    assert not again.exists()
    assert last_whole(tmp_path) == again and (again / "weights").read_text() == "some weights"


def test_a_file_written_anew_is_sealed_again_and_a_linked_manifest_stays(tmp_path):
    folder, copy = write(tmp_path, 2), tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / checkpoints.MANIFEST).unlink()
    os.link(folder / checkpoints.MANIFEST, copy / checkpoints.MANIFEST)
    (copy / "weights").write_text("other")
    assert damage(copy) is not None
    reseal(copy, "weights")
    assert damage(copy) is None and damage(folder) is None


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in of_run(folder)]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (0, None, [2, 4, 6, 8, 10]),
        (1, None, [10]),
        (2, None, [8, 10]),
        (9, None, [2, 4, 6, 8, 10]),
        (1, 4, [4, 10]),
        (2, 4, [4, 10]),
        (3, 4, [4, 8, 10]),
        (1, 10, [10]),
        (2, 10, [8, 10]),
    ],
)
@pytest.mark.parametrize("set_back", [False, True])
def test_rotation_is_by_steps_and_spares_the_best_and_the_last(tmp_path, limit, best, left, set_back):
    for step in (2, 4, 6, 8, 10):
        newest = write(tmp_path, step)
        if set_back:  # a clock that ran backwards: the newest look oldest
            os.utime(newest, (1e9 - step, 1e9 - step))
    rotate(tmp_path, limit, newest, best and str(tmp_path / f"checkpoint-{best}"))
    assert steps(tmp_path) == left


def test_rotation_after_a_damaged_one_was_passed_over_leaves_a_whole_one(tmp_path):
    write(tmp_path, 2)
    os.truncate(write(tmp_path, 6) / "weights", 1)
    newest = write(tmp_path, 4)
    rotate(tmp_path, 1, newest, None)
    assert last_whole(tmp_path) == newest


def test_a_folder_of_another_program_is_neither_deleted_nor_written_over(tmp_path, caplog):
    """Of transformers' own Trainer, which names its checkpoints so."""
    for step in (1, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("of days")
    write(tmp_path, 2)
    for _ in range(2):
        newest = write(tmp_path, 4)
        rotate(tmp_path, 1, newest, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4", "checkpoint-4.1"]
    for name in ("checkpoint-1", "checkpoint-4.1"):
        assert (tmp_path / name / "weights").read_text() == "of days"
    assert "checkpoint-4.1" in caplog.text and last_whole(tmp_path) == newest


STEPS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def test_a_run_with_a_limit_of_one_keeps_last_and_best(tmp_path, validation_rows):
    """Trainer would delete the last at the end, where the best is another."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, make_rows(16), eval_dataset=validation_rows, **STEPS, **settings)
    figures = iter([5.0, 9.0, 1.0, 0.0])
    evaluate = trainer.evaluate

    def second_is_best(**kwargs):
        return evaluate(**kwargs) | {"eval_rsum": next(figures)}

    trainer.evaluate = second_is_best
    trainer.train()
    assert steps(tmp_path) == [2, 3] and trainer.args.save_total_limit == 1
    assert last_whole(tmp_path).name == "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_every_file_of_a_runs_checkpoint_is_in_its_manifest(tmp_path):
    make_trainer(tmp_path, make_rows(16), **STEPS).train()
    folder = tmp_path / "checkpoint-3"
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == manifest.keys() | {checkpoints.MANIFEST}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert {"_run.json", "_log.json", "_distillation_state.safetensors", "README.md"} <= names
    for name in sorted(manifest):  # each of them, damaged, is recognised
        flip(folder / name)
        assert damage(folder).startswith(name)
        flip(folder / name)
    assert damage(folder) is None


def test_resuming_from_a_damaged_checkpoint_is_refused_and_the_last_whole_one_is_found(tmp_path, caplog):
    rows = make_rows(16)
    make_trainer(tmp_path, rows, **STEPS).train()
    os.truncate(tmp_path / "checkpoint-3" / "optimizer.pt", 100)
    with pytest.raises(ValueError, match="checkpoint-3 is damaged: optimizer.pt has 100 bytes"):
        make_trainer(tmp_path, rows, **STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = make_trainer(tmp_path, rows, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is damaged and passed over: optimizer.pt has 100 bytes" in caplog.text
    assert [entry["step"] for entry in resumed.state.log_history if "resumed" in entry] == [2]
    assert damage(tmp_path / "checkpoint-3") is None
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make_trainer(tmp_path, rows, **STEPS).train(resume_from_checkpoint=True)


def test_a_damaged_best_checkpoint_is_named_and_the_last_weights_stay(tmp_path, validation_rows, caplog):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, make_rows(16), eval_dataset=validation_rows, **STEPS, **settings)
    trainer.train()
    flip(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    trainer._load_best_model()
    assert "the best, is damaged: model.safetensors is not what was written" in caplog.text
    assert trainer.state.best_model_checkpoint is None


@pytest.mark.parametrize("kind", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model"])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(tmp_path, monkeypatch, kind):
    trainer = make_trainer(tmp_path, make_rows(16), **STEPS)
    save = getattr(trainer, kind)

    def full(*args, **kwargs):
        save(*args, **kwargs)
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, kind, full)
    with pytest.raises(
        OSError, match=r"checkpoint-2 could not be written: .*No space left.*checkpoint-1\. Free the disk"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and damage(tmp_path / "checkpoint-1") is None


def test_memory_that_ends_is_not_called_a_full_disk(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_rows(16), **STEPS)

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "save_model", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        trainer.train()


def test_the_pushed_and_the_fetched_checkpoint_are_whole(tmp_path, hub):
    rows = make_rows(16)
    settings = {**STEPS, "push_to_hub": True, "hub_model_id": "user/student", "hub_strategy": "checkpoint"}
    make_trainer(tmp_path / "run", rows, hub_always_push=True, **settings).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    snapshot(checkpoint, tmp_path / "snapshot")
    assert damage(tmp_path / "snapshot") is None and damage(checkpoint) is None
    fetched = Path(fetch_last_checkpoint("user/student", tmp_path / "elsewhere"))
    assert damage(fetched) is None and fetched.name == "checkpoint-3"
    files = hub.files("user/student")
    broken = {**files, "last-checkpoint/optimizer.pt": files["last-checkpoint/optimizer.pt"][:-1]}
    hub._add_commit("user/student", "main", "damaged on the way", broken)
    with pytest.raises(ValueError, match="last-checkpoint of user/student is damaged: optimizer.pt has"):
        fetch_last_checkpoint("user/student", tmp_path / "another")
    assert not (tmp_path / "another").exists()
