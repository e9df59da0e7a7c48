"""The paper's student under FSDP 2, by `accelerate launch` and accelerate_configs/fsdp2.yaml.

python -m benchmarks.gpu.part fsdp2 starts it.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from trainers.run.distributed import run_launched

from .common import make_trainer, print_rows
from .whole_run import WATCHED, time_training


def shard_on_cpu() -> None:
    """accelerate shards a model on accelerators only: it is told that these processes have one."""
    init = PartialState.__init__

    def init_as_gpu(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_as_gpu


def main(tiny: bool, images: int, warm_up: int, steps: int) -> None:
    if not torch.cuda.is_available():
        shard_on_cpu()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder, 8192 if not tiny else 64, tiny, per_device_train_batch_size=images, save_strategy="no",
            max_steps=warm_up + steps + WATCHED, random_shift=0.05, random_zoom=0.1, disable_tqdm=True,
            dataloader_num_workers=1 if tiny else 8, logging_steps=1000,
        )  # fmt: skip
        if not trainer.is_fsdp_enabled:
            raise ValueError("accelerate has not turned FSDP on")
        timed = time_training(trainer, warm_up, steps)
        name = f"FSDP 2, {trainer.args.world_size} processes of {images} images"
        if trainer.is_world_process_zero():
            rows = [
                (f"{name}, captions/s", f"{timed.captions / timed.seconds:,.0f}"),
                (f"{name}, a step", f"{1000 * timed.seconds / timed.steps:.1f} ms"),
                (f"{name}, of it the loader was waited for", f"{100 * timed.waited / timed.seconds:.1f} %"),
                (f"{name}, peak memory of a process", f"{timed.memory / 2**30:.2f} GiB"),
            ]
            print_rows(rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_launched(lambda: main("--tiny" in sys.argv, *(int(word) for word in sys.argv[1:4])))
