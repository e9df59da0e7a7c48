"""Run by torchrun in test_nonfinite: one of two processes meets a NaN; both skip the step."""

import sys
from pathlib import Path

from conftest import make_rows
from safetensors.torch import save_file
from test_nonfinite import SETTINGS, LeaveOut, poison
from tiny_trainer import make_trainer

from trainers.run import distributed


def main(folder: Path) -> None:
    settings = {**SETTINGS, "per_device_train_batch_size": 8, "ddp_backend": "gloo"}
    for name in ("skipped", "reference"):
        trainer = make_trainer(folder / name, make_rows(32), callbacks=[LeaveOut({2})], **settings)
        if name == "skipped" and distributed.rank() == 1:
            poison(trainer, {2})
        trainer.train()
        state = {**trainer.model.state_dict(), **trainer.distillation_state()}
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in state.items()},
            folder / f"{name}-{distributed.rank()}.safetensors",
        )


if __name__ == "__main__":
    distributed.run_launched(lambda: main(Path(sys.argv[1])))
