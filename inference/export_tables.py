"""What an export says of its files: size, milliseconds, agreement with torch and recall of each, and the README."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, VisionTextDualEncoderProcessor

from inference.encoders import (
    INPUTS,
    TIMED_TOKENS,
    encode_by_onnx,
    encode_by_torch,
    example_inputs,
    longest,
)
from inference.onnx_files import LEAST_COSINE, THREADS, OnnxFile, milliseconds
from model_cards.tables import as_text, markdown_table
from trainers.batches import RetrievalCollator, RetrievalDataset
from trainers.metrics import retrieval_metrics


TORCH = "torch"
RECALLS = {
    "image_to_text_r1": "image to text R@1",
    "text_to_image_r1": "text to image R@1",
    "rsum": "RSUM",
}
NOTHING = "-"


def files_table(
    model: PreTrainedModel,
    processor: VisionTextDualEncoderProcessor,
    files: list[OnnxFile],
    recall: tuple[str, int, dict[str, dict[str, float]]] | None = None,
) -> str:
    """A row for each graph in torch and each of its files, and a sentence for each file that was not kept.

    Args:
        model: the student.
        processor: its processor.
        files: that were exported.
        recall: where it was measured, a title; on how many images; what [`recalls`] gives.
    """
    header = ["file", "weights", "MB", *(f"ms, {n} thread{'s' * (n > 1)}" for n in THREADS), "cosine with torch"]
    table, figures = [header + (list(RECALLS.values()) if recall else [])], recall[2] if recall else {}

    def columns(name: str) -> list[str]:
        if not recall:
            return []
        return [f"{figures[name][key]:.1f}" if name in figures else NOTHING for key in RECALLS]

    sizes = {
        "text_model": num_bytes(model.text_model) + num_bytes(model.text_projection),
        "vision_model": num_bytes(model.vision_model) + num_bytes(model.visual_projection),
    }
    sizes["model"] = sum(sizes.values())
    for graph in INPUTS:
        by_torch = encode_by_torch(model, graph)
        medians = milliseconds(lambda threads, encoder=by_torch: encoder, example_inputs(graph, processor)[0])
        cells = [f"{sizes[graph] / 1e6:.1f}", *(f"{value:.2f}" for value in medians), NOTHING]
        table.append([f"{graph}, {TORCH}", "float32", *cells, *columns(TORCH)])
        for file in files:
            if file.graph != graph:
                continue
            if file.size is None:
                cells = [NOTHING] * (2 + len(THREADS))
            else:
                medians = [f"{value:.2f}" for value in file.milliseconds]
                cells = [f"{file.size / 1e6:.1f}", *medians, f"{file.cosine:.4f}"]
            weights = f"{file.weights}: not kept" if file.left_out else file.weights
            table.append([f"`onnx/{file.name}`", weights, *cells, *columns(file.name)])
    said = [f"`onnx/{file.name}` is not there: {file.left_out}." for file in files if file.left_out]
    if recall:
        title, images, _ = recall
        measured_on = f"Recall is on {as_text(title)}, {images:,} images"
        said.insert(0, f"{measured_on}; that of a file with one tower is with the other in torch.")
    return "\n\n".join([markdown_table(table), *said])


def num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def recalls(
    model: PreTrainedModel,
    processor: VisionTextDualEncoderProcessor,
    folder: Path,
    files: list[OnnxFile],
    rows: datasets.Dataset,
) -> dict[str, dict[str, float]]:
    """The figures of [`retrieval_metrics`] on `rows` (of the row contract) by torch and by each file that is kept.

    Counted as evaluation counts: an image is right for a text of its group, and for one that is equal to such a text.

    Args:
        model, processor: the student.
        folder: of the files.
        files: those that were exported; a file of one tower is measured with the other in torch.
        rows: what is searched.

    Raises:
        ValueError: an image cannot be read.
    """
    encoders = {TORCH: (encode_by_torch(model, "model"), INPUTS["model"])}
    for file in files:
        if file.left_out is None:
            encoders[file.name] = (encode_by_onnx(folder / file.name), INPUTS[file.graph])
    sides = {"image_embeds": [], "text_embeds": []}
    embeds = {name: {side: [] for side in sides} for name in encoders}
    image_groups, text_groups, text_ids = [], [], []
    loader = DataLoader(
        RetrievalDataset(rows, with_teacher=False, shared_texts=None),
        batch_size=64,
        collate_fn=RetrievalCollator(processor, max_length=longest(processor.tokenizer)),
    )
    for batch in loader:
        if batch["unreadable"]:
            raise ValueError(f"An image cannot be measured: {batch['unreadable'][0]}. Bring it back or drop the row.")
        image_groups.append(batch["image_groups"])
        text_groups.append(batch["image_groups"][batch["caption_to_image"]])
        text_ids.append(batch["text_ids"])
        for name, (encoder, inputs) in encoders.items():
            outputs = encoder({key: batch[key].numpy() for key in inputs})
            for side in sides:
                if side in outputs:
                    embeds[name][side].append(torch.from_numpy(outputs[side]))
    groups = torch.cat(image_groups), torch.cat(text_groups)
    measured = {}
    for name, of in embeds.items():
        pair = [torch.cat(of[side] or embeds[TORCH][side]) for side in sides]
        measured[name] = retrieval_metrics(*pair, *groups, text_ids=torch.cat(text_ids))
    return measured


def export_readme(name: str, hub_id: str | None, table: str) -> str:
    base = yaml.safe_dump({"base_model": hub_id}) if hub_id else ""
    name, whose = as_text(name), as_text(hub_id or name)
    return f"""---
library_name: onnx
pipeline_tag: zero-shot-image-classification
tags: [image-text-retrieval, dual-encoder, transformers.js]
{base}---
# {name} for ONNX

A small dual encoder for image-text retrieval; its licence is that of {whose}.

    pip install onnxruntime tokenizers pillow
    python onnx_search.py . IMAGES "a query"

| graph in `onnx` | inputs | outputs |
|---|---|---|
| `text_model` | `input_ids`, `attention_mask` int64 `[C, L]` | `text_embeds` `[C, D]` |
| `vision_model` | `pixel_values` float32 `[N, 3, H, W]` | `image_embeds` `[N, D]` |
| `model` | all three | both, `logits_per_image` `[N, C]`, `logits_per_text` `[C, N]` |

Embeddings have length 1: their dot product is the cosine. `preprocessor_config.json` says how an image becomes
`pixel_values`, `onnx_search.py` does it. The names, and the ends `_fp16` and `_quantized`, are those that
transformers.js finds by `dtype`: `"fp32"`, `"fp16"` and `"q8"`.

{table}

Milliseconds are of one image, one caption of {TIMED_TOKENS} tokens, or both, on the CPU that exported. The cosine is
the least of some single rows and padded batches. A file in float16 is kept from {LEAST_COSINE["_fp16"]} on; in int8,
from {LEAST_COSINE["_quantized"]} on, if it is not slower than float32.
"""
