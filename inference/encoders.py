"""A student's towers, each as a function of numpy inputs, by torch and by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, VisionTextDualEncoderProcessor


LONGEST = 512  # tokens, for towers that set no limit
TIMED_TOKENS = 12  # of the caption whose milliseconds are measured
RUNTIMES = {"torch": "", "onnx": ".onnx", "onnx int8": "_int8.onnx"}  # name -> how its files end
Inputs = dict[str, np.ndarray]
Encoder = Callable[[Inputs], np.ndarray]  # -> [B, D], normalised


class VisionTower(nn.Module):
    inputs, output = ("pixel_values",), "image_embeds"
    dynamic_shapes = {"pixel_values": {0: "batch"}}

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.student(pixel_values=pixel_values).image_embeds


class TextTower(nn.Module):
    inputs, output = ("input_ids", "attention_mask"), "text_embeds"
    dynamic_shapes = dict.fromkeys(inputs, {0: "batch", 1: "length"})

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.student(input_ids=input_ids, attention_mask=attention_mask).text_embeds


def towers(model: PreTrainedModel) -> dict[str, VisionTower | TextTower]:
    return {"vision": VisionTower(model).eval(), "text": TextTower(model).eval()}


def longest(tokenizer) -> int:
    """Tokens of the longest caption that a student takes, special ones among them."""
    return min(tokenizer.model_max_length, LONGEST)


def example_inputs(name: str, processor: VisionTextDualEncoderProcessor) -> list[Inputs]:
    """Random inputs of several batch sizes and lengths, padded ones among them; the first is a batch of 1."""
    rng = np.random.default_rng(0)
    if name == "vision":
        size = processor.image_processor.size
        shapes = [(count, 3, size.height, size.width) for count in (1, 3, 5)]
        return [{"pixel_values": rng.normal(size=shape).astype("float32")} for shape in shapes]
    most, examples = longest(processor.tokenizer), []
    for count, length in ((1, min(TIMED_TOKENS, most)), (3, min(7, most)), (2, most), (5, 2)):
        tokens = rng.integers(1, length + 1, (count, 1))
        tokens[0] = length
        examples.append(
            {
                "input_ids": rng.integers(0, len(processor.tokenizer), (count, length)),
                "attention_mask": (np.arange(length) < tokens).astype("int64"),
            }
        )
    return examples


def encode_by_torch(tower: nn.Module) -> Encoder:
    def encode(inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            return tower(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()

    return encode


def encode_by_onnx(path: Path, threads: int = 0) -> Encoder:
    """An exported tower, run by onnxruntime; 0 threads: one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]
