"""Rows of an image-text dataset as batches of images with all, or a sample, of their captions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import torch

from .images import load_rgb, random_view


# Characters that are read of a caption: tokenizers take seconds for a million, and minutes to be trained on them.
LONGEST_CAPTION = 8192
TEACHER_COLUMNS = ("teacher_image_embeds", "teacher_text_embeds")
TEACHER_SCALES = ("teacher_image_scale", "teacher_text_scale")  # beside int8 features, one for each of their rows


def teacher_columns(names: list[str]) -> list[str]:
    """Those of a dataset's columns that hold a teacher's features."""
    return [name for name in (*TEACHER_COLUMNS, *TEACHER_SCALES) if name in names]


def id_hash(text: str) -> int:
    """int64 of the string's blake2b-64: the same in every process and on every machine, unlike `hash()`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def printable(name: str) -> str:
    """A name, which may be anything, without what a terminal would obey."""
    return name if name.isprintable() else repr(name)


def rows_to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The innermost values of a (nested) list column of equal widths, as an array `[rows, D]` of their dtype."""
    values, rows = _innermost(column)
    return values.reshape(rows, -1)


def _innermost(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, int]:
    """All values of a (nested) list column in a row, and how many innermost lists they stand in."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    rows = len(array)
    while (
        pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type)
    ):
        rows = len(array)
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False), rows


def teacher_features(table: pa.Table, name: str) -> np.ndarray:
    """Raw teacher features `[rows, D]` of a column of TEACHER_COLUMNS: float16 as stored, float32 where it is int8."""
    features = rows_to_numpy(table[name])
    if features.dtype != np.int8:
        return features
    scale = TEACHER_SCALES[TEACHER_COLUMNS.index(name)]
    if scale not in table.column_names:
        raise ValueError(f"{name} is int8, and there is no {scale} to multiply it by.")
    return features * _innermost(table[scale])[0].astype(np.float32)[:, None]


def teacher_tensors(table: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw teacher features of a table's images `[N, D]` and captions `[C, D]`, float32."""
    return tuple(torch.from_numpy(teacher_features(table, name).astype(np.float32)) for name in TEACHER_COLUMNS)


def undecoded_rows(
    dataset: datasets.Dataset | datasets.IterableDataset, with_teacher: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """The columns that training reads, as arrow tables for [`make_examples`], images not decoded."""
    optional = ("group_id", *(TEACHER_SCALES if with_teacher else ()))
    columns = ["image", "captions", "image_id", *(TEACHER_COLUMNS if with_teacher else ())]
    columns += [name for name in optional if name in dataset.column_names]
    dataset = dataset.select_columns(columns).cast_column("image", datasets.Image(decode=False))
    return dataset.with_format("arrow")


def make_examples(
    table: pa.Table,
    epoch: int,
    with_teacher: bool,
    captions_per_image: int | None = None,
    random_shift: float = 0.0,
    random_zoom: float = 0.0,
    seed: int = 42,
) -> Iterator[dict]:
    """Training examples of some rows, in their order, each decoded when it is asked for.

    Args:
        table: of [`undecoded_rows`].
        epoch: of the draws; the other settings are those of [`RetrievalDataset`].
    """
    captions = table["captions"].to_pylist()
    groups = table["group_id" if "group_id" in table.column_names else "image_id"].to_pylist()
    if with_teacher:
        teacher_image = teacher_features(table, "teacher_image_embeds")  # [N, D]
        teacher_text = teacher_features(table, "teacher_text_embeds")  # [all captions of the N images, D]
        offsets = np.cumsum([0] + [len(texts) for texts in captions])
    for i, image_id in enumerate(table["image_id"].to_pylist()):
        rng = random.Random(f"{seed}/{epoch}/{image_id}")
        chosen = list(range(len(captions[i])))
        if captions_per_image is not None and len(chosen) > captions_per_image:
            chosen = sorted(rng.sample(chosen, captions_per_image))
        example = {
            "image_id": image_id,
            "group": id_hash(groups[i]),
            "captions": [captions[i][j] for j in chosen],
        }
        try:
            image = load_rgb(table["image"][i].as_py())
            example["image"] = random_view(image, rng, random_shift, random_zoom)
        except ValueError as error:
            example["unreadable"] = str(error)
        if with_teacher:
            example["teacher_image"] = teacher_image[i]
            example["teacher_text"] = teacher_text[offsets[i] + np.array(chosen)]
        yield example


class RetrievalDataset(torch.utils.data.Dataset):
    """Training examples of a map-style `datasets.Dataset` that follows the row contract.

    Which captions are drawn and how the image is augmented derive from (seed, epoch, image_id) alone, so that
    neither the number of workers nor a resumed run changes them.

    Args:
        dataset: columns `image`, `captions`, `image_id`, and optionally `group_id` and the teacher's features.
        with_teacher: also read the teacher's features.
        captions_per_image: how many captions to draw for each image; None for all.
        random_shift, random_zoom: see [`random_view`].
        seed: of the draws.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        with_teacher: bool,
        captions_per_image: int | None = None,
        random_shift: float = 0.0,
        random_zoom: float = 0.0,
        seed: int = 42,
    ):
        self.rows = undecoded_rows(dataset, with_teacher)
        self.settings = {
            "with_teacher": with_teacher,
            "captions_per_image": captions_per_image,
            "random_shift": random_shift,
            "random_zoom": random_zoom,
            "seed": seed,
        }
        # In shared memory, so that persistent workers see a new epoch too.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return list(make_examples(self.rows[list(indices)], int(self.epoch), **self.settings))


def text_buckets(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Captions of like length together: (rows, tokens of the longest) of each bucket, so cut that padding is least.

    One bucket, or 4, 8, 16, ...: the first number with which at most a tenth of the tokens is padding. A number that
    seldom changes, and buckets of two rows or more, spare `torch.compile` new graphs.

    Args:
        lengths: `[C]`, tokens of each caption, in falling order.
    """
    negative, counts = np.unique(-lengths, return_counts=True)
    longest, ends = -negative, np.concatenate([[0], np.cumsum(counts)])  # [m], [m + 1]: m different lengths
    rows = ends[None, :] - ends[:, None][:-1]  # [m, m + 1], of a bucket from the i-th length to before the j-th
    tokens = np.where(rows >= min(2, len(lengths)), rows * longest[:, None], np.inf)
    fewest = tokens[0]  # [m + 1], of the lengths before the j-th in so many buckets
    starts = []  # of the last bucket, for each number of buckets from two on
    for number in range(1, len(longest) + 1):
        if number > 1:
            totals = fewest[:-1, None] + tokens
            if not np.isfinite(totals[:, -1].min()):  # there are too few captions
                break
            starts.append(totals.argmin(axis=0))
            fewest = totals.min(axis=0)
        if number in (1, 4, 8, 16, 32) and lengths.sum() >= 0.9 * fewest[-1]:
            break
    buckets, end = [], len(longest)
    for start_of in [*reversed(starts), np.zeros_like(ends)]:
        start = start_of[end]
        buckets.append((int(ends[end] - ends[start]), int(longest[start])))
        end = start
    return buckets[::-1]


class RetrievalCollator:
    """Batches examples of [`RetrievalDataset`]: N images, their C captions flattened, and who belongs to whom.

    Returns, for N images that could be read and C captions of at most L tokens:

    | key | shape | |
    |---|---|---|
    | pixel_values | [N, 3, H, W] | |
    | input_ids, attention_mask | [C, L] | the longest caption first |
    | text_buckets | list of (rows, tokens) | see [`DSMDModel.forward`] |
    | caption_to_image | [C] | row of each caption's image |
    | image_groups | [N] int64 | what counts as the same thing |
    | image_ids | list of N strings | |
    | teacher_image | [N, D] | as stored, where the examples have it |
    | teacher_text | [C, D] | |
    | unreadable | list of str | image_id and reason of each image left out |

    Args:
        processor: a `VisionTextDualEncoderProcessor` or any with `image_processor` and `tokenizer`.
        max_length: captions are cut at this many tokens.
    """

    def __init__(self, processor, max_length: int):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, examples: list[dict | None]) -> dict:
        if examples[0] is None:  # of a stream's batch that a resumed run skips
            return {}
        unreadable = [
            f"{printable(example['image_id'])}: {example['unreadable']}"
            for example in examples
            if "image" not in example
        ]
        examples = [example for example in examples if "image" in example]
        if not examples:
            raise ValueError(f"None of the {len(unreadable)} images of a batch could be read: {unreadable[:3]}, ...")
        captions = [caption[:LONGEST_CAPTION] for example in examples for caption in example["captions"]]
        tokens = self.processor.tokenizer(captions, truncation=True, max_length=self.max_length)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        text = self.processor.tokenizer.pad(
            {name: [tokens[name][c] for c in order] for name in ("input_ids", "attention_mask")},
            padding_side="right",
            return_tensors="pt",
        )
        owners = np.repeat(np.arange(len(examples)), [len(example["captions"]) for example in examples])
        batch = {
            "pixel_values": self.processor.image_processor(
                images=[example["image"] for example in examples], return_tensors="pt"
            )["pixel_values"],
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "text_buckets": text_buckets(lengths[order]),
            "caption_to_image": torch.from_numpy(owners[order]),
            "image_groups": torch.tensor([example["group"] for example in examples]),
            "image_ids": [example["image_id"] for example in examples],
            "unreadable": unreadable,
        }
        if "teacher_image" in examples[0]:
            batch["teacher_image"] = torch.from_numpy(np.stack([example["teacher_image"] for example in examples]))
            teacher_text = np.concatenate([example["teacher_text"] for example in examples])
            batch["teacher_text"] = torch.from_numpy(teacher_text[order])
        return batch
