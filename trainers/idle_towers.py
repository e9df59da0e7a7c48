"""What a tower does in a batch that has nothing for it: one row that counts for nothing.

DDP and FSDP wait on every rank for the gradients of every parameter, and a rank's micro-batch may hold images alone or
texts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


INPUTS = {"vision_model": ("pixel_values",), "text_model": ("input_ids", "attention_mask")}


def one_row(batch: dict) -> dict[str, torch.Tensor]:
    """The first image and the first caption of a batch, as a model takes them."""
    return {name: batch[name][:1] for inputs in INPUTS.values() for name in inputs}


def inputs_of(batch: dict, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model is given of a batch, and of `row` where the batch has no image or no caption."""
    return {name: batch.get(name, own) for name, own in row.items()}


@contextmanager
def idle_towers(student: nn.Module, batch: dict) -> Iterator[None]:
    """Puts a tower without rows into evaluation mode meanwhile: the row it runs changes no running means."""
    missing = [name for name, inputs in INPUTS.items() if inputs[0] not in batch and hasattr(student, name)]
    idle = [tower for tower in (getattr(student, name) for name in missing) if tower.training]
    for tower in idle:
        tower.eval()
    try:
        yield
    finally:
        for tower in idle:
            tower.train()
