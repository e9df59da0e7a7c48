"""Runs of train.py on tiny data, as processes of their own, that tests share."""

import json
import subprocess
from pathlib import Path

import datasets
from conftest import make_rows
from launching import command_line, environment


ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {
    "vit": {"model_type": "vit", "patch_size": 16, "hidden_dropout_prob": 0.1, **SIZES},
    "dinov2": {"model_type": "dinov2", "patch_size": 16, "mlp_ratio": 2, "drop_path_rate": 0.1, **SIZES},
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
}
STEPS = 8  # of four images each, two epochs of four
SETTINGS = {
    "text_config": json.dumps({"model_type": "bert", "max_position_embeddings": 32, **SIZES}),
    "image_size": 32,
    "vocab_size": 300,
    "max_caption_length": 32,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "logging_steps": 3,
    "queue_size": 12,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def write_data(folder: Path) -> Path:
    """16 rows to train on, 8 and 6, as `mapped` (saved to disk) and `streamed` (parquet)."""
    parts = {"train": make_rows(16), "validation": make_rows(8, seed=1), "test": make_rows(6, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(folder / "mapped")
    for split, rows in parts.items():
        for shard in range(2):
            rows.shard(2, shard, contiguous=True).to_parquet(folder / "streamed" / "data" / f"{split}-{shard}.parquet")
    return folder


def arguments(folder: Path, data: Path, settings: dict, **more) -> list[str]:
    """The command line of train.py; `data` as [`write_data`] leaves it."""
    dataset = data / ("streamed" if settings.get("streaming") else "mapped")
    distilled = settings.get("method") != "contrastive"
    shared = {name: value for name, value in SETTINGS.items() if name != "queue_size" or distilled}
    settings = {**shared, **settings, "dataset_name": dataset, "output_dir": folder, **more}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def start(processes: int, *command, **more) -> subprocess.Popen:
    """A Python program, under torchrun where there are several processes; `stdout` has all that it says. `more` is
    for Popen."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command_line(processes, *command), env=environment(threads=2), **pipes, **more)
