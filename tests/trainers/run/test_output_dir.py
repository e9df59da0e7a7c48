"""A run's folder: whose it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, VISION, arguments, start

import train
from trainers.base_trainer import RetrievalTrainer
from trainers.run import output_dir


SMALL = {"vision_config": json.dumps(VISION["vit"]), "per_device_train_batch_size": 4}


@pytest.mark.parametrize("place", ["a file", "below a file", "proc"])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, run_data, place):
    (tmp_path / "file").write_text("of another")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "proc": Path("/proc/run")}[place]
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(folder, run_data, SMALL))
    assert str(stop.value).startswith(f"error: output_dir {folder} cannot be written to: ")
    assert "--output_dir" in str(stop.value) and (tmp_path / "file").read_text() == "of another"


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, run_data, monkeypatch):
    monkeypatch.setattr(output_dir, "LOCK_SECONDS", 0.1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_args.json").write_text("of the first")
    code = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    code += "print('held', flush=True); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(run / output_dir.LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "held\n"
    for more in ([], ["--overwrite_output_dir", "True"], ["--resume_from_checkpoint", "last"]):
        with pytest.raises(SystemExit, match=f"error: Another run is writing to {run}: wait for it, or give another"):
            train.main([*arguments(run, run_data, SMALL), *more])
        assert (run / "training_args.json").read_text() == "of the first"
    first.kill()  # the lock goes with it
    first.wait()
    output_dir.prepare_output_dir(train.parse_arguments(arguments(run, run_data, SMALL))[2], overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == [output_dir.LOCK, "training_args.json"]


SAVED = {**SMALL, "save_strategy": "steps", "save_steps": 4, "report_to": "tensorboard"}


def tree(folder: Path) -> dict[Path, tuple]:
    files = [path for path in folder.rglob("*") if path.name != output_dir.LOCK]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_data) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train.main(arguments(run, run_data, SAVED))
    return run


def test_the_command_of_a_finished_run_says_what_to_type_and_changes_nothing(finished, run_data, capsys):
    before = tree(finished)
    for more in ([], ["--run_name", "again", "--save_total_limit", "5"]):
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments(finished, run_data, SAVED), *more])
        assert stop.value.code == 0
        line = capsys.readouterr().out.strip().splitlines()[-1]
        assert line.startswith(f"{finished} holds this run, finished: ")
        for way in ("inference.search --model", "--do_train False --model_name_or_path", "--overwrite_output_dir"):
            assert way in line
    assert tree(finished) == before


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.5},
        {"seed": 7},
        {"max_steps": 9},
        {"test_fold_size": 3},
        {"license": "mit"},
        {"test_split": "validation"},
        {"vision_config": json.dumps(VISION["convnext"])},
        {"method": "contrastive"},
        {"push_to_hub": True},
    ],
    ids=str,
)
def test_a_finished_run_of_another_command_stays_refused(finished, run_data, other):
    before = tree(finished)
    with pytest.raises(SystemExit, match="error: output_dir .* is not empty: it holds another run. Give another"):
        train.main(arguments(finished, run_data, {**SAVED, **other}))
    assert tree(finished) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "harm",
    [
        lambda run: cut(run / "model.safetensors"),
        lambda run: (run / "model.safetensors").unlink(),
        lambda run: (run / "config.json").unlink(),
        lambda run: cut(run / "_command.json"),
        lambda run: (run / "_command.json").write_text("[1]"),
        lambda run: (run / "_command.json").unlink(),  # of an earlier release
    ],
)
def test_a_finished_run_that_is_no_longer_whole_is_left_to_a_person(tmp_path, finished, run_data, harm):
    run = shutil.copytree(finished, tmp_path / "run")
    harm(run)
    before = tree(run)
    with pytest.raises(SystemExit, match="it holds another run"):
        train.main(arguments(run, run_data, SAVED))
    assert tree(run) == before


@pytest.mark.parametrize(("step", "from_checkpoint"), [(2, False), (6, True)])
def test_the_command_of_an_interrupted_run_goes_on(
    tmp_path, finished, run_data, monkeypatch, capsys, step, from_checkpoint
):
    run = tmp_path / "run"
    begin = RetrievalTrainer.begin_step

    def die(self, batches):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return begin(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RetrievalTrainer, "begin_step", die)
        train.main(arguments(run, run_data, SAVED))
    with pytest.raises(SystemExit, match="it holds another run"):
        train.main(arguments(run, run_data, {**SAVED, "learning_rate": 0.5}))
    capsys.readouterr()
    train.main(arguments(run, run_data, SAVED))
    assert ("interrupted: it goes on from checkpoint-4" in capsys.readouterr().out) == from_checkpoint
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(run, run_data, SAVED))
    assert stop.value.code == 0


def test_a_run_that_was_killed_in_its_report_goes_on(tmp_path, finished, run_data, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "report", Mock(side_effect=KeyboardInterrupt))
        train.main(arguments(run, run_data, SAVED))
    assert not (run / "all_results.json").exists()
    train.main(arguments(run, run_data, SAVED))
    assert (run / "all_results.json").is_file()


def test_a_finished_run_that_is_gone_on_with_is_no_longer_finished(tmp_path, finished, run_data, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    longer = {**SAVED, "max_steps": 10}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "report", Mock(side_effect=KeyboardInterrupt))
        train.main([*arguments(run, run_data, longer), "--resume_from_checkpoint", "last", "--allow_changes"])
    with pytest.raises(SystemExit, match="it holds another run"):
        train.main(arguments(run, run_data, SAVED))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_of_a_run_have_the_rights_that_the_umask_leaves(tmp_path, run_data, umask, mode):
    run, before = tmp_path / "run", os.umask(umask)
    try:
        train.main(arguments(run, run_data, SAVED, projection_dim=8))
    finally:
        os.umask(before)
    modes = {path.relative_to(run).as_posix(): path.stat().st_mode & 0o777 for path in run.rglob("*")}
    assert {name: oct(found) for name, found in modes.items() if found != mode and (run / name).is_file()} == {}
    assert {found for name, found in modes.items() if (run / name).is_dir()} == {0o777 & ~umask}
    checkpoint = ("model.safetensors", "_distillation_state.safetensors", "optimizer.pt", "teacher_pca.safetensors")
    assert modes.keys() >= {"model.safetensors", *(f"checkpoint-4/{name}" for name in checkpoint)}


@pytest.mark.parametrize("more", [["--learning_rate", "0.5"], ["--queue_size", "8"], ["damaged"]])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_a_sentence_and_no_traceback(tmp_path, finished, run_data, more):
    run = shutil.copytree(finished, tmp_path / "run")
    if more == ["damaged"]:
        cut(run / "checkpoint-4" / "optimizer.pt")
        more = []
    with pytest.raises(SystemExit, match="(?s)error: .*checkpoint-4 is (of another run|damaged)"):
        train.main([*arguments(run, run_data, SAVED), *more, "--resume_from_checkpoint", str(run / "checkpoint-4")])


@pytest.mark.soak
def test_two_processes_agree_on_what_the_folder_holds(tmp_path, run_data):
    run = tmp_path / "run"
    settings = {**SAVED, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    for more, status, said in (
        ({}, 0, "The student is in"),
        ({}, 0, "holds this run, finished"),
        ({"learning_rate": 0.5}, 1, "it holds another run"),
        ({"learning_rate": 0.5, "overwrite_output_dir": True}, 0, "The student is in"),
    ):
        process = start(2, ROOT / "train.py", *arguments(run, run_data, settings, **more))
        output = process.communicate()[0]
        assert (process.returncode == 0) == (status == 0) and said in output, output[-3000:]
        assert {path.name for path in run.glob("_*")} <= {"_lock", "_command.json"}


@pytest.fixture(scope="module")
def apart(tmp_path_factory, run_data):
    """Two processes with an output folder each: for each its folder, weights, and what it refused."""
    folder = tmp_path_factory.mktemp("disks")
    settings = {**SMALL, "per_device_train_batch_size": 2, "max_steps": 2, "ddp_backend": "gloo"}
    options = arguments("", run_data, settings)
    del options[(place := options.index("--output_dir")) : place + 2]
    process = start(2, Path(__file__).with_name("disks_worker.py"), folder, json.dumps(options))
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-6000:]
    return [
        (folder / f"rank-{rank}", load_file(folder / f"weights-{rank}.safetensors"), json.loads(said.read_text()))
        for rank, said in ((rank, folder / f"said-{rank}.json") for rank in range(2))
    ]


def of_run(weights: dict[str, torch.Tensor], run: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{run}/"): t for name, t in weights.items() if name.startswith(f"{run}/")}


def test_processes_without_a_shared_disk_end_with_the_first_ones_best_weights(apart):
    (folder, first, said), (_, second, _) = apart
    assert said["interrupted"] == "15"  # after the last step, where one of them sees no checkpoint to be there
    for run in ("best", "damaged", "shared"):
        assert all(torch.equal(tensor, of_run(second, run)[name]) for name, tensor in of_run(first, run).items())
    third = load_file(folder / "run" / "checkpoint-3" / "model.safetensors")
    best = of_run(first, "best")
    assert not all(torch.equal(third[name], best[name]) for name in third.keys() & best.keys())
    shared = load_file(folder.parent / "shared" / "checkpoint-2" / "model.safetensors")
    common = shared.keys() & best.keys()
    assert len(common) > 10 and all(torch.equal(shared[name], best[name]) for name in common)
    assert all((t == 1.0).all() for name, t in of_run(first, "damaged").items() if name.endswith("weight"))


def test_processes_that_do_not_see_the_checkpoint_refuse_to_go_on_together(apart):
    for rank, (_, _, said) in enumerate(apart):
        assert said["no checkpoint"].startswith("NotResumable: There is no whole checkpoint in ")
        for case in ("resumed", "named"):
            assert said[case].startswith("ValueError: run/checkpoint-3 is on the disk of process 0, and 1 of 2"), rank
            assert "(1) do not see it there" in said[case], rank
        assert said["command"].startswith("SystemExit: error: ") and "(1) do not see it there" in said["command"]
        assert "output_dir" in said["not empty"] and "is not empty" in said["not empty"], rank
        assert said["fresh"] is None  # what another run left on the second one's disk counts for nothing
    assert (apart[0][0] / "command" / "all_results.json").is_file()
