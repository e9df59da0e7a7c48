"""The ONNX files of a student: each is written, compared with torch and timed, and kept only if it is worth it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, VisionTextDualEncoderProcessor

from inference.encoders import Arrays, Encoder, encode_by_onnx, encode_by_torch, example_inputs
from inference.onnx_graphs import (
    TextTower,
    VisionTower,
    mostly_convolutions,
    write_dynamic,
    write_half,
    write_joined,
    write_onnx,
    write_static,
)
from trainers.timing import median_seconds


TOWERS = ("text_model", "vision_model")
# Ends of the files' names, as transformers.js asks for them, and what the weights are.
WEIGHTS = {"": "float32", "_fp16": "float16", "_quantized": "int8"}
TOLERANCE = 1e-4  # of an output in float32, against torch; of logits in units of the largest
LEAST_COSINE = {"": 0.9999, "_fp16": 0.999, "_quantized": 0.95}  # of an embedding with torch's
SLOWER = 1.1  # times float32's milliseconds, above which int8 is not kept
THREADS = (1, 2)
CALIBRATED_ON = 64  # images
COMPARED_ON = 9  # other images
LARGEST = 2**31  # bytes that one ONNX file stays below


@dataclass
class OnnxFile:
    """One file that was written, or why it is not there.

    Args:
        graph: of [`inference.encoders.INPUTS`].
        ending: of WEIGHTS.
        weights: what they are, and how they became so.
        size: bytes.
        milliseconds: for one image, one caption or one of both, with each number of THREADS.
        cosine: the least of an embedding with torch's.
        left_out: why the file is not kept; None if it is there.
    """

    graph: str
    ending: str
    weights: str
    size: int | None = None
    milliseconds: tuple[float, ...] = ()
    cosine: float | None = None
    left_out: str | None = None

    @property
    def name(self) -> str:
        return f"{self.graph}{self.ending}.onnx"


def write_files(
    model: PreTrainedModel,
    processor: VisionTextDualEncoderProcessor,
    folder: Path,
    opset: int | None,
    pixels: np.ndarray | None,
) -> list[OnnxFile]:
    """Writes the graphs `text_model`, `vision_model` and `model`, each with the weights of WEIGHTS.

    Args:
        model: a student in float32, in evaluation mode, on the CPU.
        processor: its image processor and tokenizer.
        folder: exists.
        opset: of ONNX; None for the one that torch prefers.
        pixels: `[M, 3, H, W]`, images to calibrate convolutions on and to compare embeddings of; None: convolutions
            get no int8, and random images are compared.

    Returns:
        What was written and what was not kept.

    Raises:
        RuntimeError: a graph in float32 gives other outputs than torch.
    """
    compared = None if pixels is None else pixels[-COMPARED_ON:]
    files: dict[tuple[str, str], OnnxFile] = {}

    def measured(file: OnnxFile) -> OnnxFile:
        return _measured(file, files.get((file.graph, "")), folder, model, processor, compared)

    for tower in towers_of(model):
        graph, source = tower.graph, folder / f"{tower.graph}.onnx"
        write_onnx(tower, example_inputs(graph, processor)[1], source, opset)
        files[graph, ""] = measured(OnnxFile(graph, "", "float32"))
        write_half(source, folder / f"{graph}_fp16.onnx")
        files[graph, "_fp16"] = measured(OnnxFile(graph, "_fp16", "float16"))
        file = files[graph, "_quantized"] = OnnxFile(graph, "_quantized", "")
        file.weights = write_int8(source, folder / file.name, pixels)
        if (folder / file.name).is_file():
            measured(file)
        else:
            file.left_out = "convolutions are calibrated on images: give --dataset_name"
    scale = math.exp(min(model.logit_scale.item(), math.log(100.0)))
    for ending, weights in WEIGHTS.items():
        file = files["model", ending] = OnnxFile("model", ending, weights)
        # A tower that has no such file takes part in float32.
        endings = ["" if files[graph, ending].left_out else ending for graph in TOWERS]
        parts = [files[graph, own] for graph, own in zip(TOWERS, endings)]
        if ending and not any(endings):
            file.left_out = "neither tower has such a file"
        elif sum(part.size for part in parts) >= LARGEST:
            file.left_out = "larger than ONNX files can be (2 GB)"
        else:
            write_joined(*(folder / part.name for part in parts), scale, folder / file.name)
            measured(file)
    return list(files.values())


def towers_of(model: PreTrainedModel) -> list[TextTower | VisionTower]:
    """The two towers of a student as the exporter can trace them."""
    traced = copy.deepcopy(model)
    traced.set_attn_implementation("eager")  # Swin's shapes cannot be traced otherwise; the others do not care
    return [TextTower(traced).eval(), VisionTower(traced).eval()]


def write_int8(source: Path, path: Path, pixels: np.ndarray | None) -> str:
    """Writes a tower in int8; nothing where it is mostly convolutions and there are no images to calibrate them on.

    Args:
        source: the tower in float32.
        path: of what is written.
        pixels: `[M, 3, H, W]`, images, or None.

    Returns:
        What its weights are.
    """
    if not mostly_convolutions(source):
        write_dynamic(source, path)
        return "int8, dynamic"
    if pixels is not None:
        write_static(source, path, "pixel_values", pixels[:CALIBRATED_ON])
    return "int8, static"


def _measured(
    file: OnnxFile, in_float: OnnxFile | None, folder: Path, model, processor, pixels: np.ndarray | None
) -> OnnxFile:
    """Fills in the figures of a file that lies in the folder, and deletes it if it is not worth keeping.

    Args:
        in_float: the graph's file in float32; None: this is it.
    """
    path = folder / file.name
    examples = example_inputs(file.graph, processor, pixels)
    file.size = path.stat().st_size
    file.cosine = least_cosine(path, file.graph, model, examples, is_exact=file.ending == "")
    file.milliseconds = milliseconds(partial(encode_by_onnx, path), examples[0])
    if not file.cosine >= LEAST_COSINE[file.ending]:
        file.left_out = f"a cosine with torch is below {LEAST_COSINE[file.ending]}"
    elif file.ending == "_quantized" and file.milliseconds[0] > SLOWER * in_float.milliseconds[0]:
        file.left_out = f"{file.milliseconds[0]:.2f} ms, slower than float32"
    if file.left_out is not None:
        path.unlink()
    return file


def least_cosine(path: Path, graph: str, model: PreTrainedModel, examples: list[Arrays], is_exact: bool) -> float:
    """The least cosine of an embedding with torch's; NaN if there is one.

    Args:
        path: of a file.
        graph: of [`inference.encoders.INPUTS`].
        model: the student.
        examples: see [`example_inputs`].
        is_exact: the file is in float32.

    Raises:
        RuntimeError: it is in float32 and differs by more than TOLERANCE.
    """
    encoder, by_torch = encode_by_onnx(path), encode_by_torch(model, graph)
    cosines = []
    for inputs in examples:
        actual, expected = encoder(inputs), by_torch(inputs)
        for name, right in expected.items():
            difference = np.abs(actual[name] - right).max() / max(1.0, np.abs(right).max())
            if is_exact and not difference <= TOLERANCE:  # NaN too
                shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in inputs.items())
                raise RuntimeError(f"{path.name} differs from torch by {difference:.1e} in {name} for {shapes}.")
            if name.endswith("_embeds"):
                lengths = np.linalg.norm(actual[name], axis=1) * np.linalg.norm(right, axis=1)
                cosines.append((actual[name] * right).sum(1) / lengths)
    return float(np.concatenate(cosines).min())


def milliseconds(with_threads: Callable[..., Encoder], inputs: Arrays) -> tuple[float, ...]:
    """Medians with each number of THREADS, of onnxruntime's or torch's.

    Args:
        with_threads: gives the encoder that runs with as many `threads`.
        inputs: of one call.
    """
    before, medians = torch.get_num_threads(), []
    for threads in THREADS:
        torch.set_num_threads(threads)
        medians.append(1000 * median_seconds(partial(with_threads(threads=threads), inputs), runs=20))
    torch.set_num_threads(before)
    return tuple(medians)
