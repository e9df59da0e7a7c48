"""Run by `accelerate launch` in test_accelerate_configs: `train.py`, without a teacher, frozen, resumed, in bf16.

The first process's student counts: the others start from another. accelerate shards a model on accelerators only, so
under FSDP it is told that these processes have one.
"""

import os
import sys
from pathlib import Path

import train
from benchmarks.gpu.sharded import shard_on_cpu
from trainers.run.distributed import run_launched
from trainers.student import build_student


def build_other_student(*args):
    model, processor = build_student(*args)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    return model, processor


def main(folder: Path, recipe: str) -> None:
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        shard_on_cpu()
    if os.environ["RANK"] != "0":
        train.build_student = build_other_student
    runs = {method: ["--method", method] for method in ("distillation", "contrastive")} | {
        "frozen": ["--freeze=vision"]
    }
    for name, settings in runs.items():
        arguments = ["--config", recipe, *settings, "--output_dir"]
        train.main([*arguments, str(folder / name / "unbroken")])
        if sharded:
            checkpoint = str(folder / name / "unbroken" / "checkpoint-2")
            train.main([*arguments, str(folder / name / "resumed"), "--resume_from_checkpoint", checkpoint])
    if sharded:
        train.main(["--config", recipe, "--output_dir", str(folder / "bf16"), "--bf16", "True", "--max_steps", "2"])


if __name__ == "__main__":
    run_launched(lambda: main(Path(sys.argv[1]), sys.argv[2]))
