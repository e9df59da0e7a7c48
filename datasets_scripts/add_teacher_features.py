"""Adds a teacher's output features to an image-text dataset: what a student is distilled from, made once.

accelerate launch datasets_scripts/add_teacher_features.py --dataset D --teacher ID [--teacher ID2 ...] --output DIR

It can be stopped at any moment: the same command goes on from the last whole file, with the same result. The output is
a folder as the Hub has it (`data/*.parquet`, a card), for `train.py --dataset_name DIR`, `datasets.load_dataset(DIR)`,
streamed or not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, snapshot_download

from datasets_scripts.building import license_fields
from datasets_scripts.teacher_features import Encoding, encode_dataset, shard_file
from teachers import Teacher, load_teacher
from trainers import retrieval_metrics
from trainers.data_loading import license_of, open_dataset
from trainers.retrieval_data import TEACHER_COLUMNS, TEACHER_SCALES, id_hash, teacher_features
from trainers.teacher_pca import fit_pca, save_pca


WIDTHS = (512, 256, 128)  # at which the teacher is evaluated too: the width is the size of a user's index


def add_teacher_features(
    rows: datasets.DatasetDict | datasets.IterableDatasetDict,
    teachers: list[Teacher],
    fingerprints: list[str],
    output: Path,
    encoding: Encoding,
    source: str,
    num_workers: int = 2,
    overwrite: bool = False,
    license: str | None = None,
) -> None:
    """Writes a dataset with teacher features; the work of an earlier, stopped call is taken up.

    Runs on every process of `accelerate launch`. Until all is done the files stand in `{output}.partial`.

    Args:
        rows: the splits, map-style or streamed: `image`, `captions`, `image_id` and any others.
        teachers: one, or several whose features are joined.
        fingerprints: of the teachers, see [`fingerprint`]: partial work is taken up only with the same.
        output: a folder that does not exist, or is replaced with `overwrite`.
        encoding: how features are made and stored.
        source: what the rows are, for the card.
        num_workers: processes that decode and tokenise.
        overwrite: replace `output`, and start afresh where the partial work was done with other settings.
        license: of the data, for the card.

    Raises:
        ValueError: `output` exists, or the partial work there was done with other settings; see [`encode_dataset`].
    """
    state = PartialState()
    partial = output.with_name(output.name + ".partial")
    described = describe(teachers, encoding)
    settings = {
        "rows": {split: getattr(part, "_fingerprint", None) or source for split, part in rows.items()},
        "teacher": described,
        "teacher files": fingerprints,
        **asdict(encoding),
    }
    with state.main_process_first():
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists: name another --output, or replace it with --overwrite.")
        if state.is_main_process:
            _take_up(partial, settings, overwrite)
    files = encode_dataset(rows, teachers, json.dumps(described), encoding, partial, num_workers)
    state.wait_for_everyone()
    if state.is_main_process:
        figures = finish(partial, files, described, encoding.int8)
        write_card(partial, files, described, figures, source, license, encoding.int8)
        for split, count in files.items():
            for number in range(count):
                # As the Hub names files. Splits are read off the names; named in the card instead, `datasets` would
                # take any local folder of the same name for this one (its cache then knows only the card).
                name = f"{split}-{number:05d}-of-{count:05d}.parquet"
                os.replace(shard_file(partial, split, number), partial / "data" / name)
        shutil.rmtree(partial / "exact", ignore_errors=True)
        (partial / "settings.json").unlink()
        if output.exists():
            shutil.rmtree(output)
        os.rename(partial, output)
        print(f"\n{figures_table(figures)}\n" if figures else "")
        print(f"The dataset is in {output}: train.py --dataset_name {output}")
    state.wait_for_everyone()


def describe(teachers: list[Teacher], encoding: Encoding) -> dict:
    """What the column `teacher` says: one teacher's description, or those of several and how they are joined."""
    described = [teacher.describe() for teacher in teachers]
    stored = {"stored_as": "int8 with a scale a row" if encoding.int8 else "float16"}
    if len(described) == 1:
        return {**described[0], **stored}
    return {
        "id": " + ".join(teacher["id"] for teacher in described),
        "dim": sum(teacher["dim"] for teacher in described),
        "teachers": described,
        "weights": encoding.weights,
        "joined": "each normalised and scaled by the root of its weight: a dot product is the mean of the cosines",
        **stored,
    }


def fingerprint(model_id: str, revision: str | None) -> str:
    """The teacher's commit on the Hub, or a digest of a folder's weights and settings."""
    folder = Path(model_id)
    if not folder.is_dir():
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=["*.json"])).name
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def cached_teacher_features(
    rows: datasets.DatasetDict, model_id: str, revision: str | None, source: str, trust_remote_code: bool
) -> Path:
    """Folder of the rows with a teacher's features, made unless an earlier run has made them.

    They are kept in the cache of `datasets`, by the fingerprint of the rows and the teacher's revision.
    """
    state = PartialState()
    digest = fingerprint(model_id, revision)
    key = {"rows": {split: part._fingerprint for split, part in rows.items()}, "teacher": digest}
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dsmd_teacher_features" / name
    if not folder.is_dir():
        teacher = load_teacher(
            model_id, revision, dtype=default_dtype(), device=state.device, trust_remote_code=trust_remote_code
        )
        add_teacher_features(rows, [teacher], [digest], folder, Encoding(), source, license=license_of(rows, source))
        del teacher
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
    return folder


def default_dtype() -> torch.dtype:
    return torch.bfloat16 if PartialState().device.type == "cuda" else torch.float32


def _take_up(partial: Path, settings: dict, overwrite: bool) -> None:
    """Makes the partial folder, or checks that what it holds was made with the same settings."""
    path = partial / "settings.json"
    if partial.exists():
        before = json.loads(path.read_text()) if path.is_file() else {}
        if before == json.loads(json.dumps(settings)):
            return
        differing = [name for name in settings if before.get(name) != settings[name]]
        if before and not overwrite:
            raise ValueError(
                f"{partial} holds work with another {', '.join(differing)}: finish it with the settings it was begun "
                "with, remove it, or start afresh with --overwrite."
            )
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    beside = partial / "settings.json.part"
    beside.write_text(json.dumps(settings))
    os.replace(beside, path)


def stored_features(folder: Path, split: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw features of images `[N, D]` and captions `[C, D]` of one file, as a reader of the dataset gets them."""
    names = pq.read_schema(shard_file(folder, split, number)).names
    columns = [name for name in (*TEACHER_COLUMNS, *TEACHER_SCALES) if name in names]
    table = pq.read_table(shard_file(folder, split, number), columns=columns)
    return tuple(torch.from_numpy(teacher_features(table, name).astype(np.float32)) for name in TEACHER_COLUMNS)


def finish(folder: Path, files: dict[str, int], described: dict, int8: bool) -> dict[str, dict[str, float]]:
    """Fits the projection to smaller widths on the training features; the teacher's RSUM on the other splits.

    Returns:
        For each split but train: `rsum`, `rsum_{width}` for the widths below the teacher's, `rsum_before_int8`.
    """

    def features(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (stored_features(folder, split, number) for number in range(files[split]))

    components = None
    if files.get("train"):
        components = fit_pca(features("train"))
        save_pca(components, folder)
    figures = {}
    for split in (split for split, count in files.items() if split != "train" and count):
        image, text = map(torch.cat, zip(*features(split)))
        groups, text_groups = _groups(folder, split, files[split])
        figures[split] = {"rsum": retrieval_metrics(image, text, groups, text_groups)["rsum"]}
        for width in WIDTHS:
            if components is not None and width < described["dim"]:
                reduced = (image @ components[:, :width], text @ components[:, :width])
                figures[split][f"rsum_{width}"] = retrieval_metrics(*reduced, groups, text_groups)["rsum"]
        if int8:
            exact = [np.load(folder / "exact" / f"{split}-{number:05d}.npz") for number in range(files[split])]
            image, text = (
                torch.from_numpy(np.concatenate([part[kind] for part in exact])).float() for kind in ("image", "text")
            )
            figures[split]["rsum_before_int8"] = retrieval_metrics(image, text, groups, text_groups)["rsum"]
    return figures


def _groups(folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    groups, counts = [], []
    for number in range(count):
        path = shard_file(folder, split, number)
        column = "group_id" if "group_id" in pq.read_schema(path).names else "image_id"
        table = pq.read_table(path, columns=[column, "captions"])
        groups += [id_hash(group) for group in table[column].to_pylist()]
        counts += [len(texts) for texts in table["captions"].to_pylist()]
    return np.array(groups), np.repeat(groups, counts)


def figures_table(figures: dict[str, dict[str, float]]) -> str:
    """The teacher's RSUM (at most 600) by split, at its own width and at smaller ones."""
    labels = {"rsum": "teacher's RSUM", "rsum_before_int8": "before int8"}
    labels |= {f"rsum_{width}": f"at {width} dimensions" for width in WIDTHS}
    names = [name for name in labels if any(name in row for row in figures.values())]
    lines = ["| split | " + " | ".join(labels[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for split, row in figures.items():
        lines.append(f"| {split} | " + " | ".join(f"{row[name]:.2f}" for name in names) + " |")
    return "\n".join(lines)


def write_card(
    folder: Path,
    files: dict[str, int],
    described: dict,
    figures: dict[str, dict[str, float]],
    source: str,
    license: str | None,
    int8: bool,
) -> None:
    """The dataset's card: what is in it, which teacher, how good the teacher is on it."""
    counts = {}
    for split, count in files.items():
        tables = [pq.read_table(shard_file(folder, split, number), columns=["captions"]) for number in range(count)]
        counts[split] = sum(map(len, tables)), sum(len(texts) for table in tables for texts in table["captions"])
    data = DatasetCardData(
        **(license_fields(license) if license else {}),
        tags=["image-text-retrieval", "distillation", "teacher-features"],
        task_categories=["zero-shot-image-classification"],
    )
    rows = "\n".join(f"| {split} | {images:,} | {captions:,} |" for split, (images, captions) in counts.items())
    teachers = "\n".join(
        f"- `{key}`: {json.dumps(value) if isinstance(value, (dict, list)) else value}"
        for key, value in described.items()
    )
    stored = (
        "int8 `teacher_image_embeds` and `teacher_text_embeds`, to be multiplied by `teacher_image_scale` and "
        "`teacher_text_scale`"
        if int8
        else "float16 `teacher_image_embeds` `[D]` and `teacher_text_embeds` `[captions, D]`"
    )
    evaluated = (
        "The teacher's own retrieval on the other splits (RSUM: the sum of recall at 1, 5 and 10 both ways, at most "
        f"600), at its width and reduced by `teacher_pca.safetensors`:\n\n{figures_table(figures)}\n"
    )
    card = f"""---
{data.to_yaml()}
---

# {source} with teacher features

Images, captions and, for every row, what the teacher made of them: raw output features, not normalised, as {stored}.
For distilling a dual encoder for retrieval.

| split | images | captions |
|---|---|---|
{rows}

Data: {source}. Licence: {license or "not stated by the source"}.

## Teacher

{teachers}

{evaluated if figures else ""}"""
    DatasetCard(card).save(folder / "README.md")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="'icons', a folder (save_to_disk or parquet) or a Hub id")
    parser.add_argument("--dataset_config_name", help="configuration of a Hub dataset")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream, never storing it")
    parser.add_argument("--teacher", action="append", required=True, help="folder or Hub id; may be given again")
    parser.add_argument("--teacher_revision", action="append", help="one for each --teacher, in their order")
    parser.add_argument("--weights", type=float, nargs="+", help="of several teachers; equal by default")
    parser.add_argument("--output", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--push_to_hub", metavar="REPO", help="also push to this Hub dataset, e.g. name/coco-clip")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
                        help="of the teacher's arithmetic; auto: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="store int8 with a scale a row: half of float16")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--shard_rows", type=int, default=4096, help="rows in a file")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode, for each process")
    parser.add_argument("--license", help="of the data; default: what the dataset says")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the teachers' repositories run code")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "shard_rows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    for name in ("teacher_revision", "weights"):
        values = getattr(options, name)
        if values is not None and len(values) != len(options.teacher):
            parser.error(f"--{name}: {len(values)} values for {len(options.teacher)} teachers")
    if options.weights is not None and min(options.weights) <= 0:
        parser.error(f"--weights {options.weights}: expected numbers above 0")
    if options.output.exists() and not options.overwrite:  # before a teacher is loaded
        parser.error(f"--output {options.output} exists: name another, or replace it with --overwrite")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    state = PartialState(cpu=not torch.accelerator.is_available())  # left to itself it joins no processes on a CPU
    dtype = default_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    revisions = options.teacher_revision or [None] * len(options.teacher)
    try:
        with state.main_process_first():
            rows = open_dataset(options.dataset, options.dataset_config_name, options.streaming)
        teachers = [
            load_teacher(
                name,
                revision=revision,
                dtype=dtype,
                device=state.device,
                trust_remote_code=options.trust_remote_code,
            )
            for name, revision in zip(options.teacher, revisions)
        ]
        weights = options.weights or [1.0] * len(teachers)
        source = Path(options.dataset).name if Path(options.dataset).exists() else options.dataset
        add_teacher_features(
            rows,
            teachers,
            [fingerprint(name, revision) for name, revision in zip(options.teacher, revisions)],
            options.output,
            Encoding(
                weights=[weight / sum(weights) for weight in weights],
                int8=options.int8,
                batch_size=options.batch_size,
                shard_rows=options.shard_rows,
            ),
            source=source,
            num_workers=options.num_workers,
            overwrite=options.overwrite,
            license=options.license or license_of(rows, options.dataset),
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.push_to_hub and state.is_main_process:
        api = HfApi()
        api.create_repo(options.push_to_hub, repo_type="dataset", exist_ok=True)
        api.upload_folder(folder_path=options.output, repo_id=options.push_to_hub, repo_type="dataset")


if __name__ == "__main__":
    main()
