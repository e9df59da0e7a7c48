"""What runs where processes are not forked, and where the system has not all that Linux has."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from portable_worker import write_tars
from tiny_runs import start
from tiny_trainer import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from datasets_scripts.opening import open_dataset
from trainers.run import checkpoints
from trainers.run.distributed import usable_cores


@pytest.mark.soak
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_change_nothing(tmp_path, context):
    process = start(1, Path(__file__).with_name("portable_worker.py"), tmp_path, context)
    output = process.communicate()[0]
    assert process.returncode == 0 and output.count("the same: ") == 4, output[-5000:]


def test_a_webdataset_that_is_streamed_can_be_sent_to_a_new_process(tmp_path):
    rows = make_rows(4)
    write_tars(tmp_path / "tars", rows)
    stream = pickle.loads(pickle.dumps(open_dataset(str(tmp_path / "tars"), streaming=True)["train"]))
    read = list(stream)
    assert [row["image_id"] for row in read] == rows["image_id"][:]
    assert [row["captions"] for row in read] == rows["captions"][:]


def test_cores_are_counted_where_the_system_does_not_say_which_are_free(monkeypatch):
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_windows_opens_no_folder_and_flushes_what_it_may_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("content")
    opened = []
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or real_open(path, flags))
    for path in (tmp_path, tmp_path / "file"):
        with monkeypatch.context() as patch:
            is_folder = path.is_dir()
            patch.setattr(type(path), "is_dir", lambda self, is_folder=is_folder: is_folder)
            patch.setattr(os, "name", "nt")
            checkpoints._flush(path)
    checkpoints._flush(tmp_path)
    assert opened == [(tmp_path / "file", os.O_RDWR), (tmp_path, os.O_RDONLY)]


class NoFloat64(TorchDispatchMode):
    """As on MPS, which has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), function
        return result


def test_training_and_evaluation_make_no_float64(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(16), eval_dataset=make_rows(8, seed=1), max_grad_norm=1.0, max_steps=2)
    with NoFloat64():
        trainer.train()
        trainer.evaluate()
