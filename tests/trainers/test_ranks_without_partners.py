"""Two ranks, of which one has only images or only texts, against one process: DDP and FSDP 2, on gloo."""

import subprocess
import sys
from pathlib import Path

import mixed_ranks_worker
import pytest
import torch
from conftest import make_student
from launching import environment
from safetensors.torch import load_file
from tiny_trainer import largest_difference


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    rows = mixed_ranks_worker.rows_in_order(folder / "order")
    rows.save_to_disk(folder / "rows")
    mixed_ranks_worker.train(folder, rows)
    return folder


@pytest.mark.parametrize("config", ["several_gpus", "fsdp2"])
def test_two_ranks_learn_what_one_process_learns(alone, tmp_path, config):
    (tmp_path / "rows").symlink_to(alone / "rows")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    command += ["--rdzv_backend", "c10d", "--main_process_port", "0", mixed_ranks_worker.__file__, str(tmp_path)]
    launched = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr[-6000:]
    start = make_student()[0].state_dict()
    for targets in ("pairs", "teacher"):
        expected, found = (load_file(folder / targets / "model.safetensors") for folder in (alone, tmp_path))
        assert largest_difference(expected, found) < 1e-5
        for name in ("visual_projection.weight", "text_projection.weight"):
            assert (expected[name] - start[name]).abs().max() > 1e-2
        expected, found = (load_file(folder / f"{targets}.safetensors") for folder in (alone, tmp_path))
        torch.testing.assert_close(found["logged"], expected["logged"], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert (
            largest_difference(
                {name: of for name, of in expected.items() if name != "logged"},
                {name: of for name, of in found.items() if name != "logged"},
            )
            < 1e-4
        )
