"""A run's folder: whose it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import VISION, arguments

import train
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
    (run / "weights").write_text("of the first")
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
        assert (run / "weights").read_text() == "of the first"
    first.kill()  # the lock goes with it
    first.wait()
    output_dir.prepare_output_dir(train.parse_arguments(arguments(run, run_data, SMALL))[2], overwrite=True)
    assert [path.name for path in run.iterdir()] == [output_dir.LOCK]
