"""What an exported student takes and gives, and the same by torch and by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, VisionTextDualEncoderProcessor


LONGEST = 512  # tokens, for towers that set no limit
TIMED_TOKENS = 12  # of the caption whose milliseconds are measured
# The graphs that are exported, with the names that CLIP's have in transformers.js and optimum.
INPUTS = {
    "text_model": ("input_ids", "attention_mask"),
    "vision_model": ("pixel_values",),
    "model": ("input_ids", "pixel_values", "attention_mask"),
}
OUTPUTS = {
    "text_model": ("text_embeds",),
    "vision_model": ("image_embeds",),
    "model": ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
}
Arrays = dict[str, np.ndarray]
Encoder = Callable[[Arrays], Arrays]  # inputs -> outputs; embeddings are [B, D], normalised


def longest(tokenizer) -> int:
    """Tokens of the longest caption that a student takes, special ones among them."""
    return min(tokenizer.model_max_length, LONGEST)


def example_inputs(
    graph: str, processor: VisionTextDualEncoderProcessor, pixels: np.ndarray | None = None
) -> list[Arrays]:
    """Inputs of several batch sizes and lengths, padded ones among them; the first is of one caption and one image.

    Args:
        graph: one of INPUTS.
        processor: of the student.
        pixels: `[M, 3, H, W]`, images to take; random ones by default. Captions are random ids.
    """
    rng = np.random.default_rng(0)
    size, most = processor.image_processor.size, longest(processor.tokenizer)
    if pixels is None:
        pixels = rng.normal(size=(9, 3, size.height, size.width)).astype("float32")
    examples, first = [], 0
    for captions, length, images in ((1, min(TIMED_TOKENS, most), 1), (3, min(7, most), 5), (2, most, 1), (5, 2, 3)):
        tokens = rng.integers(1, length + 1, (captions, 1))
        tokens[0] = length
        inputs = {
            "input_ids": rng.integers(0, len(processor.tokenizer), (captions, length)),
            "attention_mask": (np.arange(length) < tokens).astype("int64"),
            "pixel_values": pixels.take(range(first, first + images), axis=0, mode="wrap"),
        }
        examples.append({name: inputs[name] for name in INPUTS[graph]})
        first += images
    return examples


def encode_by_torch(model: PreTrainedModel, graph: str) -> Encoder:
    def encode(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            output = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: output[name].numpy() for name in OUTPUTS[graph]}

    return encode


def encode_by_onnx(path: Path, threads: int = 0) -> Encoder:
    """An exported graph, run by onnxruntime; 0 threads: one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))
