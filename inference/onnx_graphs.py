"""Writes ONNX graphs: a tower in float32, float16 or int8, and both towers in one graph."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from inference.encoders import INPUTS, OUTPUTS, Arrays


os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime, imported below, would report to its makers

TEXT = ("text_batch_size", "sequence_length")
DIMENSIONS = {"input_ids": TEXT, "attention_mask": TEXT, "pixel_values": ("image_batch_size",)}


class VisionTower(nn.Module):
    graph = "vision_model"

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.student(pixel_values=pixel_values).image_embeds


class TextTower(nn.Module):
    graph = "text_model"

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.student(input_ids=input_ids, attention_mask=attention_mask).text_embeds


def write_onnx(tower: VisionTower | TextTower, inputs: Arrays, path: Path, opset: int | None) -> None:
    """The tower as one ONNX file with its weights inside (2 GB at most), traced on `inputs`."""
    import onnx

    names = INPUTS[tower.graph]
    with quiet():
        program = torch.onnx.export(
            tower,
            kwargs={name: torch.from_numpy(inputs[name]) for name in names},
            input_names=names,
            output_names=OUTPUTS[tower.graph],
            dynamic_shapes={name: dict(enumerate(DIMENSIONS[name])) for name in names},
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    graph = proto.graph
    # Their metadata holds source lines and paths of this machine.
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
    onnx.save(proto, path)


def write_half(source: Path, path: Path) -> None:
    """float16 weights and activations; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


def mostly_convolutions(path: Path) -> bool:
    """Whether convolutions hold more than half of a graph's weights."""
    import onnx

    graph = onnx.load(path).graph
    entries = {weights.name: math.prod(weights.dims) for weights in graph.initializer}
    convolved = {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:2]}
    return 2 * sum(entries.get(name, 0) for name in convolved) > sum(entries.values())


def write_dynamic(source: Path, path: Path) -> None:
    """int8 weights of all matrices, activations quantised as they come; convolutions, which it makes slower, stay.

    Of 7 bits: sums of products of 8 overflow on x86 processors without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )


def write_static(source: Path, path: Path, name: str, values: np.ndarray) -> None:
    """int8 weights, as [`write_dynamic`]'s, and activations, whose ranges are those that they have on some inputs.

    Args:
        source, path: of the graph in float32 and of what is written.
        name: of its one input.
        values: `[M, ...]`, M inputs.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class OneByOne(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(values)

        def get_next(self) -> Arrays | None:
            value = next(self.rest, None)
            return None if value is None else {name: value[None]}

    with quiet(), tempfile.TemporaryDirectory() as beside:
        fused = Path(beside, "fused.onnx")  # batch normalisation is one with its convolution
        quant_pre_process(source, fused, skip_symbolic_shape=True)
        quantize_static(
            fused,
            path,
            OneByOne(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def write_joined(text: Path, vision: Path, scale: float, path: Path) -> None:
    """Both towers in one graph, with their similarities as CLIP's has them.

    Args:
        text, vision: files of the towers.
        scale: factor of the cosines.
        path: of what is written.
    """
    import onnx
    from onnx import TensorProto, helper

    parts = [onnx.compose.add_prefix(onnx.load(file), f"{file.stem}/", rename_inputs=False, rename_outputs=False)
             for file in (text, vision)]  # fmt: skip
    text_graph, vision_graph = (part.graph for part in parts)
    opsets = {opset.domain: opset.version for part in parts for opset in part.opset_import}
    for part in parts:
        for opset in part.opset_import:
            if opset.version != opsets[opset.domain]:
                raise RuntimeError(f"The towers are of opsets {opset.version} and {opsets[opset.domain]}.")
    head = [
        helper.make_node("Transpose", ["image_embeds"], ["image_columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["text_embeds", "image_columns"], ["cosines"]),
        helper.make_node("Mul", ["cosines", "scale"], ["logits_per_text"]),
        helper.make_node("Transpose", ["logits_per_text"], ["logits_per_image"], perm=[1, 0]),
    ]
    inputs = {value.name: value for graph in (text_graph, vision_graph) for value in graph.input}
    embeds = {value.name: value for graph in (text_graph, vision_graph) for value in graph.output}
    sides = ["image_batch_size", "text_batch_size"]
    logits = {
        "logits_per_image": helper.make_tensor_value_info("logits_per_image", TensorProto.FLOAT, sides),
        "logits_per_text": helper.make_tensor_value_info("logits_per_text", TensorProto.FLOAT, sides[::-1]),
    }
    graph = helper.make_graph(
        [*text_graph.node, *vision_graph.node, *head],
        "student",
        [inputs[name] for name in INPUTS["model"]],
        [{**logits, **embeds}[name] for name in OUTPUTS["model"]],
        [
            *text_graph.initializer,
            *vision_graph.initializer,
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        ],
        value_info=[*text_graph.value_info, *vision_graph.value_info],
    )
    onnx.save(
        helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
            functions=[function for part in parts for function in part.functions],
            ir_version=max(part.ir_version for part in parts),
            producer_name="pytorch",
        ),
        path,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter's warnings: of missing torchvision, of its own code, of steps that change nothing here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
