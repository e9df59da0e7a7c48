"""What an export says of itself: sizes, milliseconds and recall of each runtime, and the README."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, VisionTextDualEncoderProcessor

from inference.encoders import (
    RUNTIMES,
    TIMED_TOKENS,
    encode_by_onnx,
    encode_by_torch,
    example_inputs,
    longest,
    towers,
)
from model_cards.tables import as_text, markdown_table
from trainers.batches import RetrievalCollator, RetrievalDataset
from trainers.metrics import retrieval_metrics
from trainers.timing import median_seconds


THREADS = (1, 2)


def speed_table(model: PreTrainedModel, processor: VisionTextDualEncoderProcessor, folder: Path) -> str:
    """Size, milliseconds for one image or one caption, and agreement with torch of each tower and runtime."""
    header = ["tower", "runtime", "MB", *(f"ms, {n} thread{'s' * (n > 1)}" for n in THREADS), "cosine with torch"]
    weights = {
        "vision": num_bytes(model.vision_model) + num_bytes(model.visual_projection),
        "text": num_bytes(model.text_model) + num_bytes(model.text_projection),
    }
    rows, threads_before = [header], torch.get_num_threads()
    for name, tower in towers(model).items():
        examples = example_inputs(name, processor)
        expected = [encode_by_torch(tower)(inputs) for inputs in examples]
        for runtime, ending in RUNTIMES.items():
            path = folder / f"{name}_model{ending}"
            milliseconds = []
            for threads in THREADS:
                torch.set_num_threads(threads)
                encoder = encode_by_onnx(path, threads) if ending else encode_by_torch(tower)
                milliseconds.append(1000 * median_seconds(partial(encoder, examples[0]), runs=20))
            cosines = np.concatenate([(encoder(x) * y).sum(1) for x, y in zip(examples, expected)])
            size = path.stat().st_size if ending else weights[name]
            figures = [f"{size / 1e6:.1f}", *(f"{value:.2f}" for value in milliseconds), f"{cosines.min():.4f}"]
            rows.append(["image" if name == "vision" else "caption", runtime, *figures])
    torch.set_num_threads(threads_before)
    return markdown_table(rows)


def num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def recall_table(
    model: PreTrainedModel,
    processor: VisionTextDualEncoderProcessor,
    folder: Path,
    rows: datasets.Dataset,
    title: str,
) -> str:
    """Recall in both directions on `rows` (of the row contract), for each runtime."""
    encoders = {
        runtime: {
            name: encode_by_onnx(folder / f"{name}_model{ending}") if ending else encode_by_torch(tower)
            for name, tower in towers(model).items()
        }
        for runtime, ending in RUNTIMES.items()
    }
    embeds = {runtime: {"vision": [], "text": []} for runtime in RUNTIMES}
    image_groups, text_groups = [], []
    loader = DataLoader(
        RetrievalDataset(rows, with_teacher=False),
        batch_size=64,
        collate_fn=RetrievalCollator(processor, max_length=longest(processor.tokenizer)),
    )
    for batch in loader:
        image_groups.append(batch["image_groups"])
        text_groups.append(batch["image_groups"][batch["caption_to_image"]])
        for name, tower in towers(model).items():
            inputs = {key: batch[key].numpy() for key in tower.inputs}
            for runtime in RUNTIMES:
                embeds[runtime][name].append(torch.from_numpy(encoders[runtime][name](inputs)))
    groups = (torch.cat(image_groups), torch.cat(text_groups))
    figures = {
        runtime: retrieval_metrics(torch.cat(of["vision"]), torch.cat(of["text"]), *groups)
        for runtime, of in embeds.items()
    }
    table = [[f"{as_text(title)}, {len(groups[0]):,} images", *RUNTIMES]]
    for name in figures["torch"]:
        table.append([name.replace("_", " "), *(f"{figures[runtime][name]:.1f}" for runtime in RUNTIMES)])
    return markdown_table(table)


def export_readme(name: str, hub_id: str | None, tables: list[str]) -> str:
    base = yaml.safe_dump({"base_model": hub_id}) if hub_id else ""
    name, whose = as_text(name), as_text(hub_id or name)
    measured = "\n\n".join(tables)
    return f"""---
library_name: onnx
pipeline_tag: zero-shot-image-classification
tags: [image-text-retrieval, dual-encoder]
{base}---
# {name} for ONNX

A small dual encoder for image-text retrieval; its licence is that of {whose}.

    pip install onnxruntime tokenizers pillow
    python onnx_search.py . IMAGES "a query"

| file | inputs | output |
|---|---|---|
| `vision_model.onnx` | `pixel_values` float32 `[N, 3, H, W]` | `image_embeds` `[N, D]` |
| `text_model.onnx` | `input_ids`, `attention_mask` int64 `[C, L]` | `text_embeds` `[C, D]` |
| `*_int8.onnx` | the same | the same, from int8 weights |

Embeddings have length 1: their dot product is the cosine. `image_preprocessing.json` says how an image becomes
`pixel_values`, `onnx_search.py` does it. Where int8 is slower than `onnx` below (convolutions), it is only smaller.

{measured}

Milliseconds are of one image or one caption of {TIMED_TOKENS} tokens, on the CPU that exported.
"""
