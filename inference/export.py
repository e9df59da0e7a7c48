"""Exports a student to ONNX: a file for each tower and one in int8, which run without torch and transformers.

    python -m inference.export --model_name_or_path runs/icons --output_dir icons_onnx --dataset_name icons

Prints size and speed beside torch's, with `--dataset_name` also the recall that int8 costs. Or to modules of
sentence-transformers, which load without trust_remote_code:

    python -m inference.export --model_name_or_path runs/icons --output_dir icons_st --format sentence-transformers
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    VisionTextDualEncoderProcessor,
)

import modeling_dsmd  # noqa: F401  AutoModel then knows the student without running code of its repository
from datasets_scripts.building import refuse_what_is_there
from datasets_scripts.opening import open_dataset
from inference.encoders import (
    Inputs,
    TextTower,
    VisionTower,
    encode_by_onnx,
    encode_by_torch,
    example_inputs,
    longest,
    towers,
)
from inference.export_sentence_transformers import export_sentence_transformers, sentence_transformers_readme
from inference.export_tables import export_readme, recall_table, speed_table
from rows.command_line import Command, run_program
from rows.files import shown_name, write_beside


os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime, imported below, would report to its makers

# Formats and the packages that each needs; each has an extra of its own in pyproject.toml.
FORMATS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "sentence-transformers": ("sentence_transformers",)}
TOLERANCE = 1e-4  # of an entry of an embedding, against torch


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
    # Their metadata holds source lines and paths of this machine.
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
    """Silences the exporter's warnings: of missing torchvision, of its own code, of steps that change nothing here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("inference.export", __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of the student.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the files.")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="What to write (default: %(default)s).")
    parser.add_argument("--push_to_hub", metavar="REPO", help="Also push the folder to this Hub repository.")
    parser.add_argument("--opset", type=int, help="ONNX opset, for an older runtime (default: what torch prefers).")
    parser.add_argument(
        "--dataset_name", help="'icons', a folder or a Hub id: also measure the recall of each runtime on it."
    )
    parser.add_argument("--split", default="test", help="Split of the dataset to measure on (default: %(default)s).")
    parser.add_argument("--limit", type=int, help="Measure on the first images of the split only, as many as this.")
    options = parser.parse_args(arguments)
    refuse_what_is_there(parser, options.output_dir)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: expected 1 or more")
    for name in ("opset", "dataset_name", "limit"):
        if options.format != "onnx" and getattr(options, name) is not None:
            parser.error(f"--{name} goes with --format onnx alone")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    student, folder = options.model_name_or_path, options.output_dir
    missing = [name for name in FORMATS[options.format] if find_spec(name) is None]
    if missing:
        sys.exit(f'error: {", ".join(missing)} is not installed: pip install -e ".[{options.format}]"')
    try:
        rows = None
        if options.dataset_name is not None:
            rows = open_dataset(options.dataset_name)
            if options.split not in rows:
                raise ValueError(f"{options.dataset_name} has no split {options.split} (it has {', '.join(rows)}).")
            rows = rows[options.split]
            rows = rows.select(range(min(options.limit or len(rows), len(rows))))
        model = AutoModel.from_pretrained(student, dtype=torch.float32, trust_remote_code=False).eval()
        processor = VisionTextDualEncoderProcessor(
            AutoImageProcessor.from_pretrained(student, backend="pil", trust_remote_code=False),
            AutoTokenizer.from_pretrained(student, trust_remote_code=False),
        )
        local = Path(student).is_dir()
        name, hub_id = (Path(student).resolve().name, None) if local else (student.split("/")[-1], student)
        with write_beside(folder.resolve()) as beside:
            if options.format == "onnx":
                export(model, processor, beside, options.opset)
                tables = [speed_table(model, processor, beside)]
                if rows is not None:
                    title = f"{shown_name(options.dataset_name)} {options.split}"
                    tables.append(recall_table(model, processor, beside, rows, title))
                readme = export_readme(name, hub_id, tables)
            else:
                export_sentence_transformers(model, processor, beside)
                repo, length = options.push_to_hub or folder.name, longest(processor.tokenizer)
                readme = sentence_transformers_readme(name, hub_id, repo, length)
            (beside / "README.md").write_text(readme, encoding="utf-8")
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f"error: {error}")
    if options.format == "onnx":
        print("\n" + "\n\n".join(tables))
        print(f'\nIn {folder}. Search: python {folder}/onnx_search.py {folder} IMAGES "a query"')
    else:
        print(f"In {folder}: SentenceTransformer({str(folder)!r})")
    if options.push_to_hub:
        push(folder, options.push_to_hub)


def push(folder: Path, repo: str) -> None:
    """Pushes a folder to a repository of the Hub, which is made where it is missing."""
    try:
        HfApi().create_repo(repo, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Export")
    except (HTTPError, OSError, ValueError) as error:
        sys.exit(f"error: {folder} is written and not pushed: {error}\nThis completes it: hf upload {repo} {folder} .")
    print(f"Pushed: {commit.repo_url}")


if __name__ == "__main__":
    run_program(main)
