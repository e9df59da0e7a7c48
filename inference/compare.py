"""Compares dual encoders on one's own images and captions: is a small one enough, and what did a student gain?

    python -m inference.compare --dataset_name data/mine --models runs/mine openai/clip-vit-base-patch32 --output_dir D

Recall both ways, size, milliseconds and RSUM per millisecond of each model, as a table (`comparison.md`), as JSON and
as a picture. A model is a folder or a Hub id that transformers, sentence-transformers or open_clip (`hf-hub:...`)
loads: a student, a teacher, or any other. Folders that `inference.export` wrote are compared too, by onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from functools import partial
from pathlib import Path

import datasets
import torch
from PIL import Image
from tqdm.auto import tqdm

from datasets_scripts.building import refuse_what_is_there
from datasets_scripts.feature_job import default_workers
from datasets_scripts.opening import open_dataset, split_of
from inference.compare_picture import draw_comparison
from inference.dual_encoders import OnnxEncoder, encode, export_runtimes, is_export, load_encoder
from model_cards.tables import RECALLS, as_text, markdown_table
from rows.columns import rows_and_captions, text_ids
from rows.command_line import Command, run_program
from rows.files import printable, shown_name, write_beside
from rows.images import load_rgb
from teachers import Teacher
from trainers.metrics import retrieval_metrics
from trainers.timing import machine, median_seconds


COLUMNS = ("image", "captions", "image_id")
RUNS = 20  # of which the milliseconds are the median


def usable_rows(rows: datasets.Dataset, name: str) -> datasets.Dataset:
    """The rows that have an image and a caption, images not decoded.

    Raises:
        ValueError: columns are missing, or no row has both.
    """
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise ValueError(
            f"{name} has no column {', '.join(missing)} (it has {', '.join(rows.column_names)}): "
            "`python -m datasets_scripts.own_data` brings data into these columns."
        )
    rows = rows.cast_column("image", datasets.Image(decode=False))
    pairs = zip(rows["image"], rows["captions"])
    kept = [i for i, (image, captions) in enumerate(pairs) if image is not None and captions]
    if not kept:
        raise ValueError(f"{name} has no row with an image and a caption: there is nothing to compare on.")
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept):,} rows without an image or without a caption are left out")
    return rows.select(kept)


def compare(
    models: list[tuple[str, str]], rows: datasets.Dataset, device: str | torch.device, batch_size: int = 64
) -> list[dict]:
    """Recall, size and speed of each model.

    Args:
        models: what is loaded, and what it is called.
        rows: see [`usable_rows`].
        device: where torch runs.
        batch_size: images or captions at a time.

    Returns:
        For each model, and each runtime of an exported one, a dict: `model`, `runtime`, `device` (of torch, "cpu" or
        "cuda"; ONNX runs on the CPU), `parameters` (None for files of ONNX), `megabytes`, `ms_per_image`,
        `ms_per_caption` (batch 1, the model alone), `rsum_per_ms` (of an image and a caption together), and the
        figures of [`retrieval_metrics`].

    Raises:
        ValueError: a model is no dual encoder, or cannot be run, said before any is measured; or an image cannot be
            read.
    """
    # A wrong one is told now, and not once the others have taken their hours.
    for name, _ in models:
        if is_export(Path(name)):
            deque(_runtimes(name, device), maxlen=0)
        elif len(models) > 1:
            load_encoder(name)
    found = []
    for name, shown in models:
        for runtime, encoder, size in _runtimes(name, device):
            how = {"model": shown, "runtime": runtime, "device": encoder.device.type}
            found.append({**how, **size, **_measure(encoder, rows, batch_size, shown)})
            print(f"{shown} ({runtime}): rsum {found[-1]['rsum']:.1f}", file=sys.stderr)
    return found


def _runtimes(name: str, device: str | torch.device):
    """Each way that a model runs: runtime, encoder, its parameters and megabytes."""
    folder = Path(name)
    if not is_export(folder):
        encoder = load_encoder(name, device)
        size = sum(parameter.nbytes for parameter in encoder.model.parameters())
        yield "torch", encoder, {"parameters": encoder.parameters, "megabytes": size / 1e6}
        return
    for runtime, ending in export_runtimes(folder).items():
        encoder = OnnxEncoder(folder, ending, torch.get_num_threads())
        size = sum(file.stat().st_size for file in encoder.files)
        yield runtime, encoder, {"parameters": None, "megabytes": size / 1e6}


def _measure(encoder: Teacher | OnnxEncoder, rows: datasets.Dataset, batch_size: int, shown: str) -> dict[str, float]:
    captions = [caption for own in rows["captions"] for caption in own]
    contents = {"image": partial(_image, rows), "text": captions.__getitem__}
    counts, embeds = {"image": len(rows), "text": len(captions)}, {}
    with tqdm(total=sum(counts.values()), desc=printable(shown), leave=False, disable=None) as bar:
        for kind, count in counts.items():
            batches = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
            parts = []
            for own, features, unreadable in encode(encoder, kind, contents[kind], batches, default_workers()):
                if unreadable:
                    i, reason = next(iter(unreadable.items()))
                    raise ValueError(f"The image of {rows[i]['image_id']!r} cannot be compared on: {reason}")
                parts.append(features)
                bar.update(len(own))
            embeds[kind] = torch.cat(parts)
    groups, caption_to_image = rows_and_captions(rows)
    figures = retrieval_metrics(
        embeds["image"], embeds["text"], groups, groups[caption_to_image], text_ids=text_ids(rows)
    )
    image = encoder.prepare_images([_image(rows, 0)])
    caption = encoder.prepare_texts([sorted(captions, key=len)[len(captions) // 2]])
    of_image = 1000 * median_seconds(partial(encoder.image_features, image), RUNS)
    of_caption = 1000 * median_seconds(partial(encoder.text_features, caption), RUNS)
    speeds = {"ms_per_image": of_image, "ms_per_caption": of_caption}
    return {**figures, **speeds, "rsum_per_ms": figures["rsum"] / (of_image + of_caption)}


def _image(rows: datasets.Dataset, i: int) -> Image.Image:
    return load_rgb(rows[i]["image"])


def comparison_table(found: list[dict], title: str) -> str:
    """What [`compare`] found, as Markdown that reads well as plain text."""
    ways = {"image_to_text": "i2t", "text_to_image": "t2i"}
    recalls = [name.replace(way, ways[way]).replace("_", " ") for name in RECALLS for way in ways if way in name]
    sizes = ["M parameters", "MB", "ms an image", "ms a caption", "rsum per ms"]
    table = [[as_text(title), "runtime", "device", *recalls, "rsum", *sizes]]
    for row in found:
        parameters = "-" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}"
        milliseconds = (f"{row[f'ms_per_{of}']:.2f}" for of in ("image", "caption"))
        figures = [f"{row[name]:.1f}" for name in (*RECALLS, "rsum")]
        last = f"{row['rsum_per_ms']:.1f}"
        size = f"{row['megabytes']:.1f}"
        how = [as_text(row["model"]), row["runtime"], row["device"]]
        table.append([*how, *figures, parameters, size, *milliseconds, last])
    return markdown_table(table)


def devices_note(found: list[dict]) -> str:
    """Where the milliseconds were measured: a GPU's and a processor's do not compare."""
    names = {"cpu": "the processor", "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "a GPU"}
    used = list(dict.fromkeys(row["device"] for row in found))
    if len(used) < 2:
        return f"All were measured on {names[used[0]]}."
    whose = ", ".join(f"those of {device} on {names[device]}" for device in used)
    return f"Milliseconds are not of one device, {whose}: compare them within one."


def names_of(models: list[str]) -> list[str]:
    """What each model is called: a Hub id, of a folder its name, with its parent's where two are alike."""
    shown = [shown_name(name) for name in models]
    often = Counter(shown)
    return [
        f"{Path(name).resolve().parent.name}/{short}" if often[short] > 1 and Path(name).exists() else short
        for name, short in zip(models, shown)
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("inference.compare", __doc__)
    parser.add_argument("--dataset_name", required=True, help="'icons', a folder or a Hub id, as for train.py.")
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="Folders and Hub ids.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the table, JSON and picture.")
    parser.add_argument("--split", default="test", help="Split to compare on (default: %(default)s).")
    parser.add_argument("--limit", type=int, help="Compare on the first images of the split only, as many as this.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time (default: %(default)s).")
    options = parser.parse_args(arguments)
    refuse_what_is_there(parser, options.output_dir)
    for name in ("limit", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    if twice := [name for name, times in Counter(options.models).items() if times > 1]:
        parser.error(f"--models names {twice[0]} twice")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = split_of(open_dataset(options.dataset_name), options.split, options.dataset_name)
    rows = usable_rows(rows.select(range(min(options.limit or len(rows), len(rows)))), options.dataset_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, name = options.output_dir.resolve(), shown_name(options.dataset_name)
    with write_beside(folder) as beside:
        found = compare(list(zip(options.models, names_of(options.models))), rows, device, options.batch_size)
        title = f"{name} {options.split}, {len(rows):,} images"
        table = comparison_table(found, title)
        captions = sum(map(len, rows["captions"]))
        note = (
            f"{captions:,} captions; one that is equal to a right one is right too. Milliseconds are of one image or "
            "one caption of middle length, the model alone; rsum per ms is of both together. MB are of the weights. "
            f"{devices_note(found)} {machine()}, {torch.get_num_threads()} threads."
        )
        (beside / "comparison.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
        facts = {"dataset": name, "split": options.split, "images": len(rows), "captions": captions}
        content = {**facts, "machine": machine(), "threads": torch.get_num_threads(), "models": found}
        (beside / "comparison.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        draw_comparison(found, title, beside / "comparison.png")
    print(f"{table}\n\n{note}\nIn {options.output_dir}: comparison.md, comparison.json, comparison.png")


if __name__ == "__main__":
    run_program(main)
