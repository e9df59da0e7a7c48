"""Files of teacher features become a dataset: named as the Hub names them, with the teacher's figures and a card."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import DatasetCard, DatasetCardData

from datasets_scripts.arrow_files import FILE_NAME, describe_splits
from datasets_scripts.building import license_fields
from datasets_scripts.feature_shards import ROW, rows_in, shard_file
from model_cards.tables import as_text, bullets
from rows.columns import caption_counts, id_hash
from rows.teacher_columns import teacher_columns, teacher_tensors
from trainers import retrieval_metrics
from trainers.teacher_pca import PCA_FILE, fit_pca, save_pca


EVALUATED = 10_000  # images of a split on which the teacher is evaluated, up to the end of a file
WIDTHS = (512, 256, 128)  # at which the teacher is evaluated too: the width is the size of a user's index


def assemble(
    partial: Path,
    files: dict[str, int],
    described: dict,
    source: str,
    license: str | None,
    int8: bool,
    left_out: str = "",
) -> dict[str, dict[str, float]]:
    """Makes the finished dataset, `partial/dataset`, of the files under `partial`: they stay, as hard links.

    Args:
        files: number of files of each split; those without a row are passed over.
        left_out: a paragraph for the card.

    Returns:
        The teacher's figures by split, see [`evaluate_teacher`].
    """
    folder = partial / "dataset"
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped here
    (folder / "data").mkdir(parents=True)
    components = None
    numbers = {split: [i for i in range(count) if rows_in(partial, split, i)] for split, count in files.items()}
    if numbers.get("train"):
        components = fit_pca(stored_features(partial, "train", number) for number in numbers["train"])
        save_pca(components, folder)
    figures = {
        split: evaluate_teacher(partial, split, of_split, components, described["dim"], int8)
        for split, of_split in numbers.items()
        if split != "train"
    }
    write_features_card(folder, partial, numbers, described, figures, source, license, int8, left_out)
    for split, of_split in numbers.items():
        for place, number in enumerate(of_split):
            # As the Hub names files. Splits are read off the names; named in the card instead, `datasets` would take
            # any local folder of the same name for this one (its cache then knows only the card).
            target = folder / "data" / f"{split}-{place:05d}-of-{len(of_split):05d}.parquet"
            try:
                os.link(shard_file(partial, split, number), target)
            except OSError:  # a disk without hard links
                shutil.copy(shard_file(partial, split, number), target)
    return figures


def assemble_columns(
    partial: Path, files: dict[str, int], described: dict, rows: datasets.DatasetDict, shard_rows: int
) -> dict[str, dict[str, float]]:
    """Makes of the files under `partial` the folder `partial/dataset`, for [`join_columns`].

    It holds what a teacher's pass adds to a dataset, row by row, and not the images, which the dataset has. A row that
    was left out is there with nulls.

    Args:
        rows: what the features are of.
        shard_rows: rows of the dataset in a file.

    Returns:
        See [`assemble`].
    """
    folder = partial / "dataset"
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped here
    numbers = {split: [i for i in range(count) if rows_in(partial, split, i)] for split, count in files.items()}
    components = None
    if numbers.get("train"):
        components = fit_pca(stored_features(partial, "train", number) for number in numbers["train"])
    figures, fingerprints = {}, {}
    for split, of_split in numbers.items():
        if split != "train":
            figures[split] = evaluate_teacher(partial, split, of_split, components, described["dim"], False)
        schema = pq.read_schema(shard_file(partial, split, of_split[0]))
        names = ["captions", *teacher_columns(schema.names), "teacher"]
        known = datasets.Features.from_arrow_schema(schema)
        features = datasets.Features({**{name: known[name] for name in names}, "left_out": datasets.Value("bool")})
        (folder / split).mkdir(parents=True)
        digest = hashlib.blake2b(rows[split]._fingerprint.encode(), digest_size=8)
        with ArrowWriter(features=features, path=str(folder / split / FILE_NAME)) as writer:
            for number in range(files[split]):
                start = number * shard_rows
                count = min(shard_rows, len(rows[split]) - start)
                table = _in_place(shard_file(partial, split, number), names, features.arrow_schema, start, count)
                writer.write_table(table)
                digest.update(table["teacher_image_embeds"].combine_chunks().flatten().buffers()[1] or b"")
            writer.finalize()
        fingerprints[split] = digest.hexdigest()
    describe_splits(folder, features, fingerprints, "")
    return figures


def _in_place(file: Path, names: list[str], schema: pa.Schema, start: int, count: int) -> pa.Table:
    """Columns of a file for the `count` rows of the dataset from `start` on, with nulls for those that it has not."""
    places = np.full(count, -1)
    found = pq.read_schema(file).names
    if set(names) <= set(found):
        table = pq.read_table(file, columns=[*names, *({ROW} & set(found))])
        # A file that was made before there was such a column has all rows.
        rows = table[ROW].to_numpy() - start if ROW in found else np.arange(count)
        places[rows] = np.arange(len(table))
        table = table.select(names).take(pa.array(places, mask=places < 0))
    else:  # no row is left
        table = pa.table([pa.nulls(count, schema.field(name).type) for name in names], names)
    table = table.append_column("left_out", pa.array(places < 0))
    return table.cast(schema).replace_schema_metadata(schema.metadata)


def join_columns(rows: datasets.DatasetDict, folder: Path) -> datasets.DatasetDict:
    """The rows with the features that a teacher's pass made of them, without those rows that it left out.

    Args:
        rows: what the features are of.
        folder: of [`assemble_columns`]; or of an earlier release, which kept whole rows.
    """
    if not (folder / "dataset_dict.json").is_file():
        kept = datasets.load_dataset(str(folder))
        for split, part in kept.items():
            part.info.license = rows[split].info.license  # parquet files keep none
        return datasets.DatasetDict({split: kept[split] for split in rows})
    stored, joined = datasets.load_from_disk(folder), datasets.DatasetDict()
    for split, part in rows.items():
        added = stored[split].remove_columns("left_out")
        own = [name for name in part.column_names if name not in (*teacher_columns(part.column_names), "teacher")]
        # Captions are the teacher's: of these, empty ones may be left out.
        of_part = part.select_columns([name for name in own if name != "captions"])
        both = datasets.concatenate_datasets([of_part, added], axis=1)
        both = both.select_columns([*own, *(name for name in added.column_names if name != "captions")])
        left_out = stored[split]["left_out"][:]
        if any(left_out):
            both = both.select([row for row, is_out in enumerate(left_out) if not is_out])
        both.info.license = part.info.license
        joined[split] = both
    return joined


def stored_features(folder: Path, split: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw features of images `[N, D]` and captions `[C, D]` of one file, as a reader of the dataset gets them."""
    names = pq.read_schema(shard_file(folder, split, number)).names
    return teacher_tensors(pq.read_table(shard_file(folder, split, number), columns=teacher_columns(names)))


def evaluate_teacher(
    folder: Path, split: str, numbers: list[int], components: torch.Tensor | None, dim: int, int8: bool
) -> dict[str, float]:
    """The teacher's own retrieval on a split, on its first files, until they hold 10,000 images.

    Returns:
        `images`, and where any of them has a caption `rsum`, `rsum_{width}` for the widths below the teacher's, and
        `rsum_before_int8`; where captions stand for several images, `rsum_by_index`, which counts an image's own
        captions alone.
    """
    image, text, groups, captions, exact = [], [], [], [], []
    for number in numbers:
        part_image, part_text = stored_features(folder, split, number)
        path = shard_file(folder, split, number)
        column = "group_id" if "group_id" in pq.read_schema(path).names else "image_id"
        table = pq.read_table(path, columns=[column, "captions", "teacher_image_embeds"])
        # Rows without a partner have no rank.
        has_image, counts = table["teacher_image_embeds"].is_valid().to_numpy(), caption_counts(table["captions"])
        is_pair = has_image & (counts > 0)
        paired_images, paired_captions = is_pair[has_image], np.repeat(is_pair, counts)
        image.append(part_image[paired_images])
        text.append(part_text[paired_captions])
        table = table.filter(pa.array(is_pair))
        groups += [id_hash(group) for group in table[column].to_pylist()]
        captions += table["captions"].to_pylist()
        if int8:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
                exact.append({"image": stored["image"][paired_images], "text": stored["text"][paired_captions]})
        if len(groups) >= EVALUATED:
            break
    if not groups:
        return {"images": 0}
    groups = torch.tensor(groups)
    text_groups = torch.repeat_interleave(groups, torch.tensor([len(own) for own in captions]))
    texts = [caption for own in captions for caption in own]
    image, text = torch.cat(image), torch.cat(text)

    def rsum(image: torch.Tensor, text: torch.Tensor, texts: list[str] | None = texts) -> float:
        return retrieval_metrics(image, text, groups, text_groups, text_ids=texts)["rsum"]

    figures = {"images": len(groups), "rsum": rsum(image, text)}
    if len({(caption, group) for caption, group in zip(texts, text_groups.tolist())}) > len(set(texts)):
        figures["rsum_by_index"] = rsum(image, text, None)
    for width in WIDTHS:
        if components is not None and width < dim:
            figures[f"rsum_{width}"] = rsum(image @ components[:, :width], text @ components[:, :width])
    if int8:
        image, text = (torch.from_numpy(np.concatenate([part[kind] for part in exact])) for kind in ("image", "text"))
        figures["rsum_before_int8"] = rsum(image, text)
    return figures


def figures_table(figures: dict[str, dict[str, float]]) -> str:
    """The teacher's RSUM (at most 600) by split, at its own width and at smaller ones."""
    labels = {"rsum": "teacher's RSUM", "rsum_by_index": "by index", "rsum_before_int8": "before int8"}
    labels |= {f"rsum_{width}": f"at {width} dimensions" for width in WIDTHS}
    names = [name for name in labels if any(name in row for row in figures.values())]
    lines = ["| split | images | " + " | ".join(labels[name] for name in names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for split, row in figures.items():
        cells = " | ".join(f"{row[name]:.2f}" if name in row else "" for name in names)
        lines.append(f"| {as_text(split)} | {row['images']:,} | {cells} |")
    return "\n".join(lines)


def write_features_card(
    folder: Path,
    partial: Path,
    files: dict[str, list[int]],
    described: dict,
    figures: dict[str, dict[str, float]],
    source: str,
    license: str | None,
    int8: bool,
    left_out: str = "",
) -> None:
    """The dataset's card: what is in it, which teacher, how good the teacher is on it."""
    counts = {}
    for split, numbers in files.items():
        images = captions = 0
        for number in numbers:
            table = pq.read_table(shard_file(partial, split, number), columns=["captions", "teacher_image_embeds"])
            images += len(table) - table["teacher_image_embeds"].null_count
            captions += int(caption_counts(table["captions"]).sum())
        counts[split] = images, captions
    data = DatasetCardData(
        **(license_fields(license) if license else {}),
        tags=["image-text-retrieval", "distillation", "teacher-features"],
        task_categories=["zero-shot-image-classification"],
    )
    rows = "\n".join(
        f"| {as_text(split)} | {images:,} | {captions:,} |" for split, (images, captions) in counts.items()
    )
    teachers = bullets(described)
    stored = (
        "int8 `teacher_image_embeds` and `teacher_text_embeds`, to be multiplied by `teacher_image_scale` and "
        "`teacher_text_scale`"
        if int8
        else "float16 `teacher_image_embeds` `[D]` and `teacher_text_embeds` `[captions, D]`"
    )
    reduced = ", at its width and reduced by `teacher_pca.safetensors`" if (folder / PCA_FILE).is_file() else ""
    evaluated = (
        "The teacher's own retrieval on the other splits (RSUM: the sum of recall at 1, 5 and 10 both ways, at most "
        f"600){reduced}:\n\n{figures_table(figures)}\n"
    )
    card = f"""---
{data.to_yaml()}
---

# {as_text(source)} with teacher features

Images, captions and, for every row, what the teacher made of them: raw output features, not normalised, as {stored}.
For distilling a dual encoder for retrieval.

| split | images | captions |
|---|---|---|
{rows}{left_out}

Data: {as_text(source)}. Licence: {as_text(license or "not stated by the source")}.

## Teacher

{teachers}

{evaluated if figures else ""}"""
    DatasetCard(card).save(folder / "README.md")
