"""Export a student to ONNX: one file a tower, and one of int8, which need neither torch nor transformers.

    python -m inference.export --model runs/icons --output icons_onnx --dataset icons

Prints size and speed beside torch's, with `--dataset` also the recall that int8 costs.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import pickle
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    VisionTextDualEncoderProcessor,
)

import modeling_dsmd  # noqa: F401  AutoModel then knows the student without running code of its repository
from model_cards.tables import as_text, markdown_table
from rows.files import write_beside
from trainers.data_loading import open_dataset
from trainers.retrieval import retrieval_metrics
from trainers.retrieval_data import RetrievalCollator, RetrievalDataset


os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime, imported below, would report to its makers

TOLERANCE = 1e-4  # of an entry of an embedding, against torch
LONGEST = 512  # tokens, for towers that set no limit
TIMED_TOKENS = 12  # of the caption whose milliseconds are measured
THREADS = (1, 2)
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


def export(model: PreTrainedModel, processor: VisionTextDualEncoderProcessor, folder: Path, opset: int | None) -> None:
    """Writes all that an application needs into a folder.

    `vision_model.onnx` (`pixel_values` `[N, 3, H, W]` -> `image_embeds` `[N, D]`), `text_model.onnx` (`input_ids`,
    `attention_mask` `[C, L]` int64 -> `text_embeds` `[C, D]`), both of L2-normalised rows and for any N, C, L; the
    same in int8 (`*_int8.onnx`); `tokenizer.json`, `image_preprocessing.json` and `onnx_search.py`.

    Args:
        model: a student in float32, in evaluation mode, on the CPU.
        processor: its image processor (of the PIL backend) and tokenizer.
        folder: exists.
        opset: of ONNX; None for the one that torch prefers.

    Raises:
        ValueError: the image processor does more than resize and normalise; the tokenizer is written in Python.
        RuntimeError: a file gives other embeddings than torch.
    """
    settings = image_settings(processor.image_processor)
    (folder / "image_preprocessing.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_tokenizer(processor.tokenizer, folder / "tokenizer.json")
    shutil.copy(Path(__file__).with_name("onnx_search.py"), folder)
    traced = copy.deepcopy(model)
    traced.set_attn_implementation("eager")  # Swin's shapes cannot be traced otherwise; the others do not care
    traced = towers(traced)
    for name, tower in towers(model).items():
        path = folder / f"{name}_model.onnx"
        examples = example_inputs(name, processor)
        write_onnx(traced[name], examples[1], path, opset)
        torch_encoder, onnx_encoder = encode_by_torch(tower), encode_by_onnx(path)
        worst = 0.0
        for inputs in examples:
            difference = np.abs(torch_encoder(inputs) - onnx_encoder(inputs)).max()
            if not difference <= TOLERANCE:  # NaN too
                shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in inputs.items())
                raise RuntimeError(f"{path.name} differs from torch by {difference:.1e} for {shapes}.")
            worst = max(worst, difference)
        print(f"{path.name}: differs from torch by {worst:.0e} at most")
        write_int8(path, path.with_name(f"{name}_model_int8.onnx"))


def towers(model: PreTrainedModel) -> dict[str, VisionTower | TextTower]:
    return {"vision": VisionTower(model).eval(), "text": TextTower(model).eval()}


def image_settings(processor: BaseImageProcessor) -> dict:
    """What `onnx_search.pixels` needs to do the same as an image processor: size (width, height), resample (a filter
    of PIL), rescale_factor, mean, std.

    Raises:
        ValueError: it does something else, such as to crop.
    """
    from inference.onnx_search import pixels

    settings = {
        "size": [processor.size.width, processor.size.height],
        "resample": int(processor.resample),
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "mean": list(processor.image_mean) if processor.do_normalize else [0.0] * 3,
        "std": list(processor.image_std) if processor.do_normalize else [1.0] * 3,
    }
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 277, 3), dtype=np.uint8))
    expected = processor(images=[noise], return_tensors="np")["pixel_values"]
    squashes = expected.shape[2:] == tuple(settings["size"][::-1])
    if not squashes or not np.allclose(pixels(noise, settings), expected, rtol=0, atol=TOLERANCE):
        raise ValueError(
            f"{type(processor).__name__} does more than squash an image to a size and normalise it, which is all that "
            f"the exported example does. Its settings: {processor.to_dict()}"
        )
    return settings


def save_tokenizer(tokenizer, path: Path) -> None:
    """The tokenizer as one file for the package `tokenizers`; it cuts what is too long and does not pad."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is written in Python: there is no tokenizer.json of it.")
    alone = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    alone.no_padding()
    alone.enable_truncation(longest(tokenizer))
    alone.save(str(path))


def longest(tokenizer) -> int:
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


def write_onnx(tower: VisionTower | TextTower, inputs: Inputs, path: Path, opset: int | None) -> None:
    """The tower as one ONNX file with its weights inside (2 GB at most), traced on `inputs`."""
    import onnx

    with quiet():
        program = torch.onnx.export(
            tower,
            kwargs={name: torch.from_numpy(value) for name, value in inputs.items()},
            input_names=tower.inputs,
            output_names=[tower.output],
            dynamic_shapes=tower.dynamic_shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    graph = proto.graph
    # They hold source lines and paths of this machine.
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
    onnx.save(proto, path)


def write_int8(source: Path, path: Path) -> None:
    """Dynamic quantisation: int8 weights, activations quantised as they come.

    Unsigned weights, since signed ones overflow on x86 processors without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QUInt8)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings: of torchvision missing, of its own code, of steps that change nothing here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def encode_by_torch(tower: nn.Module) -> Encoder:
    def encode(inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            return tower(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()

    return encode


def encode_by_onnx(path: Path, threads: int = 0) -> Encoder:
    """`threads` 0: one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


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
                milliseconds.append(milliseconds_of(encoder, examples[0]))
            cosines = np.concatenate([(encoder(x) * y).sum(1) for x, y in zip(examples, expected)])
            size = path.stat().st_size if ending else weights[name]
            figures = [f"{size / 1e6:.1f}", *(f"{value:.2f}" for value in milliseconds), f"{cosines.min():.4f}"]
            rows.append(["image" if name == "vision" else "caption", runtime, *figures])
    torch.set_num_threads(threads_before)
    return markdown_table(rows)


def num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def milliseconds_of(encoder: Encoder, inputs: Inputs, runs: int = 20) -> float:
    """Median of some runs after two that warm up."""
    times = []
    for _ in range(runs + 2):
        started = time.perf_counter()
        encoder(inputs)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


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


def readme(name: str, hub_id: str | None, tables: list[str]) -> str:
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
`pixel_values`, `onnx_search.py` does it. Where int8 is slower than `onnx` below (convolutions), it is for its size.

{measured}

Milliseconds are of one image or one caption of {TIMED_TOKENS} tokens, on the CPU that exported.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the student: its folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--opset", type=int, help="of ONNX, for an older runtime; default: what torch prefers")
    parser.add_argument("--dataset", help="'icons', a folder or a Hub id: also measure the recall of each runtime")
    parser.add_argument("--split", default="test", help="of the dataset, default: %(default)s")
    parser.add_argument("--limit", type=int, help="measure on the first so many images of the split")
    options = parser.parse_args(arguments)
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"--output {options.output} exists and is not empty: name a new folder")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: expected 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        sys.exit(f'error: {", ".join(missing)} is not installed: pip install "dsmd[onnx]"')
    try:
        rows = None
        if options.dataset is not None:
            rows = open_dataset(options.dataset)
            if options.split not in rows:
                raise ValueError(f"{options.dataset} has no split {options.split} (it has {', '.join(rows)}).")
            rows = rows[options.split]
            rows = rows.select(range(min(options.limit or len(rows), len(rows))))
        model = AutoModel.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False).eval()
        processor = VisionTextDualEncoderProcessor(
            AutoImageProcessor.from_pretrained(options.model, backend="pil", trust_remote_code=False),
            AutoTokenizer.from_pretrained(options.model, trust_remote_code=False),
        )
        local = Path(options.model).is_dir()
        with write_beside(options.output.resolve()) as beside:
            export(model, processor, beside, options.opset)
            tables = [speed_table(model, processor, beside)]
            if rows is not None:
                source = Path(options.dataset).name if Path(options.dataset).exists() else options.dataset
                tables.append(recall_table(model, processor, beside, rows, f"{source} {options.split}"))
            name = Path(options.model).resolve().name if local else options.model.split("/")[-1]
            (beside / "README.md").write_text(readme(name, None if local else options.model, tables))
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f"error: {error}")
    print("\n" + "\n\n".join(tables))
    print(f'\nIn {options.output}. Search: python {options.output}/onnx_search.py {options.output} IMAGES "a query"')


if __name__ == "__main__":
    main()
