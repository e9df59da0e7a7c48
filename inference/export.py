"""Exports a student to ONNX files, which run without torch and transformers, by the names that transformers.js and
optimum look for:

    python -m inference.export --model_name_or_path runs/icons --output_dir icons_onnx --dataset_name icons

Prints size, speed and agreement with torch of each, with `--dataset_name` also its recall. Or to modules of
sentence-transformers, which load without trust_remote_code:

    python -m inference.export --model_name_or_path runs/icons --output_dir icons_st --format sentence-transformers
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import BaseImageProcessor, PreTrainedModel, VisionTextDualEncoderProcessor

from datasets_scripts.building import refuse_what_is_there
from datasets_scripts.opening import open_dataset, split_of
from inference.encoders import longest
from inference.export_sentence_transformers import export_sentence_transformers, sentence_transformers_readme
from inference.export_tables import export_readme, files_table, recalls
from inference.onnx_files import CALIBRATED_ON, COMPARED_ON, TOLERANCE, OnnxFile, write_files
from inference.student import load_student, push_folder
from rows.columns import pairs_of
from rows.command_line import Command, run_program
from rows.files import shown_name, write_beside, write_json
from rows.images import load_rgb


# Formats and the packages that each needs; each has an extra of its own in pyproject.toml.
LOWEST_OPSET, HIGHEST_OPSET = 18, 21  # asked for less, torch writes 18 all the same
FORMATS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "sentence-transformers": ("sentence_transformers",)}


def export(
    model: PreTrainedModel,
    processor: VisionTextDualEncoderProcessor,
    folder: Path,
    opset: int | None = None,
    pixels: np.ndarray | None = None,
) -> list[OnnxFile]:
    """Writes all that an application needs into a folder.

    `onnx/text_model.onnx` (`input_ids`, `attention_mask` `[C, L]` int64 -> `text_embeds` `[C, D]`),
    `onnx/vision_model.onnx` (`pixel_values` `[N, 3, H, W]` -> `image_embeds` `[N, D]`), both of L2-normalised rows and
    for any N, C, L; `onnx/model.onnx` of both (also `logits_per_image` `[N, C]`, `logits_per_text` `[C, N]`); the same
    in float16 (`*_fp16.onnx`) and, where that is faster, in int8 (`*_quantized.onnx`). Beside `onnx`: `config.json`,
    `preprocessor_config.json`, `tokenizer.json`, `tokenizer_config.json` and `onnx_search.py`.

    Args:
        model: a student in float32, in evaluation mode, on the CPU.
        processor: its image processor (of the PIL backend) and tokenizer.
        folder: exists.
        opset: of ONNX; None for the one that torch prefers.
        pixels: `[M, 3, H, W]`, images to calibrate convolutions on; None: these get no int8.

    Returns:
        The files in `onnx`, those too that were not kept, and why.

    Raises:
        ValueError: the image processor does more than resize and normalise; the tokenizer is written in Python.
        RuntimeError: a file in float32 gives other embeddings than torch.
    """
    write_json(folder / "preprocessor_config.json", image_settings(processor.image_processor))
    save_tokenizer(processor.tokenizer, folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_settings(processor.tokenizer))
    shutil.copy(Path(__file__).with_name("onnx_search.py"), folder)
    (folder / "onnx").mkdir()
    files = write_files(model, processor, folder / "onnx", opset, pixels)
    config = model.config.to_diff_dict()
    config.pop("auto_map", None)  # the code that it names does not lie here
    dtypes = {file.graph: "fp32" for file in files if file.ending == "_quantized" and file.left_out}
    if dtypes:  # in browsers transformers.js takes `_quantized` unless told
        config["transformers.js_config"] = {"dtype": dtypes}
    write_json(folder / "config.json", config)
    return files


def image_settings(processor: BaseImageProcessor) -> dict:
    """What `preprocessor_config.json` says, from which `onnx_search.pixels` does the same as an image processor.

    Raises:
        ValueError: it does something else than to squash an image and normalise it, such as to crop.
    """
    from inference.onnx_search import pixels

    settings = {
        "processor_class": "VisionTextDualEncoderProcessor",
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": processor.size.height, "width": processor.size.width},
        "resample": int(processor.resample),
        "do_rescale": True,
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "do_normalize": True,
        "image_mean": list(processor.image_mean) if processor.do_normalize else [0.0] * 3,
        "image_std": list(processor.image_std) if processor.do_normalize else [1.0] * 3,
    }
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 277, 3), dtype=np.uint8))
    expected = processor(images=[noise], return_tensors="np")["pixel_values"]
    squashes = expected.shape[2:] == (processor.size.height, processor.size.width)
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


def tokenizer_settings(tokenizer) -> dict:
    """What `tokenizer_config.json` says: special tokens, and the length that `tokenizer.json` cuts at."""
    tokens = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest(tokenizer),
        "model_input_names": ["input_ids", "attention_mask"],
        **tokens,
    }


def calibration_pixels(
    splits: datasets.DatasetDict, split: str, processor: VisionTextDualEncoderProcessor
) -> np.ndarray | None:
    """The images `[M, 3, H, W]` that quantisation is calibrated on and files are compared on: the first that can be
    read of the split `train`, or of the one that recall is measured on if there is none. None: no image can be."""
    rows = splits["train" if "train" in splits else split].select_columns(["image"])
    images = []
    for row in rows.cast_column("image", datasets.Image(decode=False)).with_format(None):
        if row["image"] is not None:
            with suppress(ValueError):  # training leaves such an image out, too
                images.append(load_rgb(row["image"]))
        if len(images) == CALIBRATED_ON + COMPARED_ON:
            break
    return processor.image_processor(images=images, return_tensors="np")["pixel_values"] if images else None


def measured_rows(rows: datasets.Dataset, split: str, limit: int | None) -> datasets.Dataset | None:
    """The first pairs of a split, at most `limit`: recall is of pairs alone. None, and a line, where it has none."""
    pairs = pairs_of(rows)
    if not len(pairs):
        print(f"{split} has no pair of an image and a caption: no recall is measured")
        return None
    if len(pairs) < len(rows):
        print(f"recall is of the {len(pairs):,} rows of {split} that have an image and a caption")
    return rows.select(pairs[:limit])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("inference.export", __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of the student.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the files.")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="What to write (default: %(default)s).")
    parser.add_argument("--push_to_hub", metavar="REPO", help="Also push the folder to this Hub repository.")
    parser.add_argument("--opset", type=int, help="ONNX opset (default: what torch prefers).")
    parser.add_argument(
        "--dataset_name",
        help="'icons', a folder or a Hub id: also measure the recall of each file, and calibrate int8 convolutions.",
    )
    parser.add_argument("--split", default="test", help="Split of the dataset to measure on (default: %(default)s).")
    parser.add_argument("--limit", type=int, help="Measure on the first images of the split only, as many as this.")
    options = parser.parse_args(arguments)
    refuse_what_is_there(parser, options.output_dir)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: expected 1 or more")
    if options.opset is not None and not LOWEST_OPSET <= options.opset <= HIGHEST_OPSET:
        parser.error(f"--opset {options.opset}: expected {LOWEST_OPSET} to {HIGHEST_OPSET}")
    for name in ("opset", "dataset_name", "limit"):
        if options.format != "onnx" and getattr(options, name) is not None:
            parser.error(f"--{name} goes with --format onnx alone")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    folder = options.output_dir
    missing = [name for name in FORMATS[options.format] if find_spec(name) is None]
    if missing:
        sys.exit(f'error: {", ".join(missing)} is not installed: pip install -e ".[{options.format}]"')
    try:
        rows = splits = None
        if options.dataset_name is not None:
            splits = open_dataset(options.dataset_name)
            of_split = split_of(splits, options.split, options.dataset_name)
            rows = measured_rows(of_split, options.split, options.limit)
        model, processor, name, hub_id = load_student(options.model_name_or_path)
        name = name.split("/")[-1]
        with write_beside(folder.resolve()) as beside:
            if options.format == "onnx":
                pixels = None if splits is None else calibration_pixels(splits, options.split, processor)
                files, measured = export(model, processor, beside, options.opset, pixels), None
                if rows is not None:
                    title = f"{shown_name(options.dataset_name)} {options.split}"
                    measured = recalls(model, processor, beside / "onnx", files, rows)
                    measured = title, len(rows), measured
                table = files_table(model, processor, files, measured)
                readme = export_readme(name, hub_id, table)
            else:
                export_sentence_transformers(model, processor, beside)
                repo, length = options.push_to_hub or folder.name, longest(processor.tokenizer)
                readme = sentence_transformers_readme(name, hub_id, repo, length)
            (beside / "README.md").write_text(readme, encoding="utf-8")
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    if options.format == "onnx":
        print(f"\n{table}")
        print(f'\nIn {folder}. Search: python {folder}/onnx_search.py {folder} IMAGES "a query"')
    else:
        print(f"In {folder}: SentenceTransformer({str(folder)!r})")
    if options.push_to_hub:
        push_folder(folder, options.push_to_hub, "Export")


if __name__ == "__main__":
    run_program(main)
