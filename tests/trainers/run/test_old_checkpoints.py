"""Checkpoints of both methods, made at 8b01c16, are gone on from by every later version.

Each was made on the data of `tiny_runs.write_data` by `train.py` with SETTINGS, at step 4 of 8.
"""

import json
import shutil
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tiny_runs import VISION, arguments

import train
from rows.files import write_json
from trainers.run import checkpoints
from trainers.run.run_identity import IDENTITY_FILE


HERE = Path(__file__).with_name("of_8b01c16")
SETTINGS = {
    "vision_config": json.dumps(VISION["vit"]),
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "save_total_limit": 5,
}
OF_METHOD = {"distillation": {"contrastive_pairs": "II"}, "contrastive": {}}


@pytest.mark.parametrize("method", OF_METHOD)
def test_a_checkpoint_of_8b01c16_is_gone_on_from(tmp_path, run_data, method):
    settings = {**SETTINGS, **OF_METHOD[method], "method": method}
    train.main(arguments(tmp_path / "unbroken", run_data, settings))
    old = tmp_path / "resumed" / "checkpoint-4"
    for files in (method, "both"):  # of the method, and those that are the same in both
        shutil.copytree(HERE / files, old, dirs_exist_ok=True)
    identity = json.loads((old / IDENTITY_FILE).read_text())
    assert identity["torch"] == "2.13.0+cpu" and "losses" in identity
    # Of what it was made with, only the versions may differ here.
    identity |= {of.__name__: of.__version__ for of in (torch, transformers, datasets, accelerate)}
    write_json(old / IDENTITY_FILE, identity)
    checkpoints.reseal(old, IDENTITY_FILE)
    train.main([*arguments(tmp_path / "resumed", run_data, settings), "--resume_from_checkpoint", "last"])
    log = [json.loads((tmp_path / run / "checkpoint-8/trainer_state.json").read_text())["log_history"]
           for run in ("unbroken", "resumed")]  # fmt: skip
    assert any("resumed" in entry for entry in log[1])
    unbroken, resumed = (
        load_file(tmp_path / run / "checkpoint-8/model.safetensors") for run in ("unbroken", "resumed")
    )
    start = load_file(HERE / method / "model.safetensors")
    assert any(not torch.equal(start[name], resumed[name]) for name in resumed)
    if Version(torch.__version__).release[:2] < (2, 13):
        pytest.skip(f"torch {torch.__version__} draws other initial weights than 2.13, which the checkpoint is of")
    for name, tensor in unbroken.items():  # processors round alike, but for the last digits
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=2e-5)
    last = [next(entry for entry in reversed(entries) if "loss" in entry) for entries in log]
    assert last[1]["step"] == last[0]["step"] and last[1]["loss"] == pytest.approx(last[0]["loss"], rel=1e-4)
