"""Run by torchrun in test_frozen on 2 processes, and by the test itself on one: parts of a student that stay."""

import sys
from pathlib import Path

import torch
from conftest import make_rows
from processes_worker import make_trainer
from safetensors.torch import save_file

from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments
from trainers.run import distributed


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
AIMV2 = {"model_type": "aimv2_vision_model", "patch_size": 16, **SIZES}
RESNET = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
CASES = {
    "unused": {"vision": AIMV2},
    "unused, baseline": {"vision": AIMV2, "trainer_class": ContrastiveTrainer},
    "vision": {"vision": RESNET, "freeze": "vision"},
    "text": {"freeze": "text"},
    "vision, baseline": {"vision": RESNET, "freeze": "vision", "trainer_class": ContrastiveTrainer},
}
SGD = {"optim": "sgd", "learning_rate": 0.05}  # Adam would make steps of rounding, where a gradient is nearly 0


def trained(folder: Path, case: str, **settings) -> DSMDTrainer | ContrastiveTrainer:
    settings = {"max_steps": 4, "learning_rate": 1e-3, "queue_size": 60, "balancer": "dynamic", **settings}
    trainer = make_trainer(folder / case.replace(", ", "-"), make_rows(32), **CASES[case], **settings)
    trainer.train()
    return trainer


def main(folder: Path) -> None:
    DSMDTrainingArguments(output_dir=str(folder), use_cpu=True, ddp_backend="gloo").device  # noqa: B018
    for case in CASES:
        weights = trained(folder, case, **SGD).model.state_dict()
        weights = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
        save_file(weights, folder / f"{case}-{distributed.rank()}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.run_launched(lambda: main(Path(sys.argv[1])))
