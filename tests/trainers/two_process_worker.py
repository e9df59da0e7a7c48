"""Run by torchrun in test_distillation_trainer: one optimiser step and an evaluation on two processes."""

import json
import sys
from pathlib import Path

from conftest import make_rows
from safetensors.torch import save_file
from tiny_trainer import first_gradients


def main(folder: Path, settings: dict) -> None:
    gradients, trainer = first_gradients(
        folder / "two", make_rows(64), eval_dataset=make_rows(30, seed=1), ddp_backend="gloo", **settings
    )
    rank = trainer.args.process_index
    metrics = trainer.evaluate()
    save_file(gradients, folder / f"gradients-{rank}.safetensors")
    save_file(trainer._distillation_state(), folder / f"state-{rank}.safetensors")
    if rank == 0:
        (folder / "metrics.json").write_text(json.dumps({**metrics, "log": trainer.state.log_history[0]}))
    trainer.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
