"""Rows of an image-text dataset as batches of images with all, or a sample, of their captions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from rows.columns import id_hash, text_id
from rows.files import printable
from rows.images import load_rgb
from rows.teacher_columns import TEACHER_COLUMNS, TEACHER_SCALES, teacher_features
from rows.texts import cut

from .pixel_bytes import pixel_bytes
from .training_args import RetrievalTrainingArguments


NO_TEXT = -1  # no text_id: fills up the lists of those images that have fewer texts than others


@dataclass(frozen=True)
class Views:
    """What an epoch sees of a row: which of its captions, and how its image is augmented.

    Args:
        captions_per_image: how many captions to draw for each image; None for all.
        random_shift, random_zoom: see [`random_view`].
        seed: of all random choices.
        size: width and height in pixels that the processor brings every image to: an augmented view is resampled
            once, from its image straight to this size, and a JPEG decoded no larger than that needs. None: a view
            has its image's size, and the processor resamples it again.
        resample: filter of that one resampling, the processor's.
    """

    captions_per_image: int | None = None
    random_shift: float = 0.0
    random_zoom: float = 0.0
    seed: int = 42
    size: tuple[int, int] | None = None
    resample: int = Image.Resampling.BILINEAR

    @property
    def least_side(self) -> int | None:
        """The shortest side that an image must be decoded with, so that no view of it is enlarged for that."""
        if self.size is None or not (self.random_shift or self.random_zoom):
            return None
        return math.ceil(max(self.size) / (1 - self.random_zoom))


AS_THEY_ARE = Views()  # all captions, images not augmented


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
    views: Views,
    shared_texts: Set[int] | None = frozenset(),
    pooled_images: torch.Tensor | None = None,
) -> Iterator[dict]:
    """Yields the training examples of some rows in their order; an image is decoded when its example is asked for.

    Args:
        table: rows of [`undecoded_rows`].
        epoch: with seed and image_id it determines all random choices.
        views: what is drawn.
        shared_texts: see [`RetrievalDataset`].
        pooled_images: `[N, W]`, what a frozen vision tower makes of the images, to be given in their place; a row of
            NaN for one that could not be read.

    Yields:
        `image_id`, `group` (int64), `captions`, and `image` (RGB, None for a text without an image) or, where it
        cannot be read, `unreadable` (the reason); with the teacher also `teacher_image` `[D]`, which a text without an
        image lacks, and `teacher_text` `[len(captions), D]`; where texts may
        be shared also `text_ids` of the captions, and `image_texts`, those of all captions of the image, drawn or not,
        that other images may have too.
    """
    captions = table["captions"].to_pylist()
    groups = table["group_id" if "group_id" in table.column_names else "image_id"].to_pylist()
    has_image = table["image"].is_valid().to_numpy()
    with_teacher = "teacher_image_embeds" in table.column_names
    if with_teacher:
        teacher_image = teacher_features(table, "teacher_image_embeds")  # [images, D]
        teacher_text = teacher_features(table, "teacher_text_embeds")  # [all captions, D]
        width = max(teacher_image.shape[1], teacher_text.shape[1])  # of features of none the type may say no width
        teacher_text = teacher_text.reshape(-1, width)
        place = np.cumsum(has_image) - 1
        offsets = np.cumsum([0] + [len(texts) for texts in captions])
    for i, image_id in enumerate(table["image_id"].to_pylist()):
        rng = random.Random(f"{views.seed}/{epoch}/{image_id}")
        chosen = list(range(len(captions[i])))
        if views.captions_per_image is not None and len(chosen) > views.captions_per_image:
            chosen = sorted(rng.sample(chosen, views.captions_per_image))
        example = {
            "image_id": image_id,
            "group": id_hash(groups[i]),
            "captions": [captions[i][j] for j in chosen],
        }
        if shared_texts is None or shared_texts:
            ids = [text_id(caption) for caption in captions[i]]
            example["text_ids"] = [ids[j] for j in chosen]
            unique = dict.fromkeys(ids)
            example["image_texts"] = [of for of in unique if shared_texts is None or of in shared_texts]
        try:
            if not has_image[i]:
                example["image"] = None
            elif pooled_images is None or pooled_images[i].isnan().all():
                image = load_rgb(table["image"][i].as_py(), views.least_side)
                size = {"size": views.size, "resample": views.resample}
                example["image"] = random_view(image, rng, views.random_shift, views.random_zoom, **size)
            if pooled_images is not None and has_image[i]:
                example["image"] = pooled_images[i]
        except ValueError as error:
            example["unreadable"] = str(error)
        if with_teacher:
            if has_image[i]:
                example["teacher_image"] = teacher_image[place[i]]
            example["teacher_text"] = teacher_text[offsets[i] + np.array(chosen, np.int64)]
        yield example


class RetrievalDataset(torch.utils.data.Dataset):
    """Training examples of a map-style `datasets.Dataset` that follows the row contract.

    Which captions are drawn and how the image is augmented derive from (seed, epoch, image_id) alone, so that
    neither the number of workers nor a resumed run changes them.

    Args:
        dataset: columns `image`, `captions`, `image_id`, and optionally `group_id` and the teacher's features.
        with_teacher: also read the teacher's features.
        views: what is drawn of a row.
        shared_texts: ids of the texts that stand for several images, see [`find_shared_texts`]; None: nobody knows
            which do.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        with_teacher: bool,
        views: Views = AS_THEY_ARE,
        shared_texts: Set[int] | None = frozenset(),
    ):
        self.rows = undecoded_rows(dataset, with_teacher)
        self.views = views
        self.shared_texts = shared_texts
        # In shared memory, so that persistent workers see a new epoch too.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.pooled_images: torch.Tensor | None = None  # [N, W] of a frozen tower, see [`keep_frozen_outputs`]

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        pooled = None if self.pooled_images is None else self.pooled_images[list(indices)]
        return list(make_examples(self.rows[list(indices)], int(self.epoch), self.views, self.shared_texts, pooled))


def most_buckets(device: torch.device) -> int:
    """How many buckets [`text_buckets`] may make for a device.

    Each is a forward of the text tower: a GPU waits for the host to launch its operators, where it would hardly notice
    the padding; a CPU pays for every padded token.
    """
    return 2 if device.type == "cuda" else 32


def text_buckets(lengths: np.ndarray, most: int = 32) -> list[tuple[int, int]]:
    """Cuts a batch of captions into buckets of similar length, so that the least of the tokens is padding.

    There are 1, 4, 8, 16 or 32 buckets: the first number with which at most a tenth of the tokens is padding, or else
    as many as there can be. For other numbers of buckets, and for a bucket of one row, `torch.compile` would have to
    build new graphs.

    Args:
        lengths: `[C]`, tokens of each caption, in descending order.
        most: no more buckets than this; where it is 2, there are 1 or 2.

    Returns: (rows, tokens of its longest caption) of each bucket; the rows add up to C.
    """
    negative, counts = np.unique(-lengths, return_counts=True)
    longest, ends = -negative, np.concatenate([[0], np.cumsum(counts)])  # [m], [m + 1]: m different lengths
    # Dynamic programming over where the last bucket starts. A bucket holds the i-th to the (j - 1)-th length.
    rows = ends[None, :] - ends[:, None][:-1]  # [m, m + 1]: captions in that bucket
    tokens = np.where(rows >= min(2, len(lengths)), rows * longest[:, None], np.inf)
    fewest = tokens[0]  # [m + 1]: least tokens that the lengths before the j-th take in `number` buckets
    starts = []  # [m + 1] for each number of buckets from two on: the length with which the last bucket starts
    for number in range(1, len(longest) + 1):
        if number > 1:
            totals = fewest[:-1, None] + tokens
            if not np.isfinite(totals[:, -1].min()):  # too few captions for so many buckets
                break
            starts.append(totals.argmin(axis=0))
            fewest = totals.min(axis=0)
        if number == most or (number in (1, 4, 8, 16, 32) and lengths.sum() >= 0.9 * fewest[-1]):
            break
    buckets, end = [], len(longest)
    for start_of in [*reversed(starts), np.zeros_like(ends)]:
        start = start_of[end]
        buckets.append((int(ends[end] - ends[start]), int(longest[start])))
        end = start
    return buckets[::-1]


class RetrievalCollator:
    """Batches examples of [`RetrievalDataset`]: N images, C captions flattened, and who belongs to whom.

    Images come in the order of the examples. Returns, for R examples with N images that could be read and C captions
    of at most L tokens:

    | key | shape | |
    |---|---|---|
    | pixel_values | [N, 3, H, W] | or [N, W], what a frozen vision tower makes of them; absent where N is 0 |
    | input_ids, attention_mask | [C, L] | the longest caption first; absent where C is 0 |
    | text_buckets | list of (rows, tokens) | see [`DSMDModel.forward`] |
    | caption_to_image | [C] | row of each caption's image, -1 for a text without one |
    | paired_captions, lonely_captions | [P], [C - P] | the captions that have an image, and those that have none |
    | lonely_images | [N - images with a caption] | the images that have no caption |
    | image_groups | [N] int64 | equal where two images count as the same thing |
    | text_groups | [C] int64 | the group of each caption |
    | image_to_row, caption_to_row | [N], [C] | the example of each image and each caption |
    | image_texts | [N, K] int64 | texts of each image that other images may have too, filled up with NO_TEXT |
    | text_ids | [C] int64 | the text of each caption; these two where the examples have them |
    | image_ids | list of R strings | |
    | teacher_image | [N, D] | as stored, where the examples have it |
    | teacher_text | [C, D] | |
    | unreadable | list of str | image_id and reason of each image left out |

    Args:
        processor: a `VisionTextDualEncoderProcessor` or any with `image_processor` and `tokenizer`.
        max_length: captions are cut at this many tokens.
        most_buckets: see [`text_buckets`].
        as_bytes: give `pixel_values` as uint8, see `trainers/pixel_bytes.py`.
    """

    def __init__(self, processor, max_length: int, most_buckets: int = 32, as_bytes: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.most_buckets = most_buckets
        self.as_bytes = as_bytes

    def __call__(self, examples: list[dict | None]) -> dict:
        if examples[0] is None:  # a batch of a stream, trained on before the run was resumed
            return {}
        unreadable = [
            f"{printable(example['image_id'])}: {example['unreadable']}"
            for example in examples
            if "image" not in example
        ]
        examples = [example for example in examples if "image" in example]
        if not examples:
            raise ValueError(f"None of the {len(unreadable)} images of a batch could be read: {unreadable[:3]}, ...")
        with_image = [row for row, example in enumerate(examples) if example["image"] is not None]
        pictured = [examples[row] for row in with_image]
        captions = [cut(caption) for example in examples for caption in example["captions"]]
        batch, order = self.tokens(captions)
        if pictured:
            batch["pixel_values"] = self.pixel_values([example["image"] for example in pictured])
        caption_counts = np.array([len(example["captions"]) for example in examples])
        image_of_row = np.full(len(examples), -1)
        image_of_row[with_image] = np.arange(len(with_image))
        caption_to_row = np.repeat(np.arange(len(examples)), caption_counts)[order]
        caption_to_image = image_of_row[caption_to_row]
        groups = torch.tensor([example["group"] for example in examples], dtype=torch.int64)
        batch |= {
            "caption_to_image": torch.from_numpy(caption_to_image),
            "paired_captions": torch.from_numpy(np.flatnonzero(caption_to_image >= 0)),
            "lonely_captions": torch.from_numpy(np.flatnonzero(caption_to_image < 0)),
            "lonely_images": torch.from_numpy(np.flatnonzero(caption_counts[with_image] == 0)),
            "image_groups": groups[with_image],
            "text_groups": groups[caption_to_row],
            "image_to_row": torch.tensor(with_image, dtype=torch.int64),
            "caption_to_row": torch.from_numpy(caption_to_row),
            "image_ids": [example["image_id"] for example in examples],
            "unreadable": unreadable,
        }
        if "text_ids" in examples[0]:
            width = max([len(example["image_texts"]) for example in pictured], default=0)
            texts = [[*own, *[NO_TEXT] * (width - len(own))] for own in (of["image_texts"] for of in pictured)]
            batch["image_texts"] = torch.tensor(texts, dtype=torch.int64).view(len(pictured), width)
            text_ids = [text for example in examples for text in example["text_ids"]]
            batch["text_ids"] = torch.tensor(text_ids, dtype=torch.int64)[order]
        if "teacher_text" in examples[0]:
            teacher_text = np.concatenate([example["teacher_text"] for example in examples])[order]
            images = [example["teacher_image"] for example in pictured]
            teacher_image = np.stack(images) if images else teacher_text[:0]
            batch["teacher_image"] = torch.from_numpy(teacher_image)
            batch["teacher_text"] = torch.from_numpy(teacher_text if len(teacher_text) else teacher_image[:0])
        return batch

    def tokens(self, captions: list[str]) -> tuple[dict, np.ndarray]:
        """The part of a batch that holds its captions' tokens, and the order of the captions in it, `[C]`."""
        if not captions:
            return {}, np.empty(0, np.int64)
        tokens = self.processor.tokenizer(captions, truncation=True, max_length=self.max_length)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        text = self.processor.tokenizer.pad(
            {name: [tokens[name][c] for c in order] for name in ("input_ids", "attention_mask")},
            padding_side="right",
            return_tensors="pt",
        )
        of_text = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        return {**of_text, "text_buckets": text_buckets(lengths[order], self.most_buckets)}, order

    def pixel_values(self, images: list[Image.Image] | list[torch.Tensor]) -> torch.Tensor:
        if isinstance(images[0], torch.Tensor):
            return torch.stack(images)
        if self.as_bytes:
            return pixel_bytes(self.processor.image_processor, images)
        return self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


def size_of_all(image_processor) -> tuple[int, int] | None:
    """Width and height in pixels that a processor brings every image to by one resize; None where it does other."""
    size = getattr(image_processor, "size", None)
    width, height = (getattr(size, side, None) for side in ("width", "height"))
    resizes = getattr(image_processor, "do_resize", False) and isinstance(
        getattr(image_processor, "resample", None), int
    )
    others = any(getattr(image_processor, name, None) for name in ("do_center_crop", "do_pad", "crop_pct"))
    return (width, height) if resizes and width and height and not others else None


def views_of(args: RetrievalTrainingArguments, image_processor) -> Views:
    """The views of a run, of the size that its image processor brings all images to."""
    seed = args.data_seed if args.data_seed is not None else args.seed
    views = Views(args.captions_per_image, args.random_shift, args.random_zoom, seed)
    size = size_of_all(image_processor)
    return views if size is None else replace(views, size=size, resample=image_processor.resample)


def random_view(
    image: Image.Image,
    rng: random.Random,
    shift: float,
    zoom: float,
    size: tuple[int, int] | None = None,
    resample: int = Image.Resampling.BILINEAR,
) -> Image.Image:
    """A shifted and zoomed view; what lies outside the image repeats its edge.

    Without shift and zoom it is the image itself, of its own size.

    Args:
        image: RGB.
        rng: the generator that shift and zoom are drawn from.
        shift: largest shift in each direction, as a fraction of the side, in [0, 1).
        zoom: the side of the view is the image's times a factor in [1 - zoom, 1 + zoom], zoom in [0, 1).
        size: width and height of the result, in pixels; the image's by default.
        resample: the filter that the view is brought to its size with.
    """
    if not shift and not zoom:
        return image
    width, height = image.size
    factor = 1 + rng.uniform(-zoom, zoom)
    center_x = width * (0.5 + rng.uniform(-shift, shift))
    center_y = height * (0.5 + rng.uniform(-shift, shift))
    box = [
        center_x - width * factor / 2,
        center_y - height * factor / 2,
        center_x + width * factor / 2,
        center_y + height * factor / 2,
    ]
    # Padded only as far as the view reaches: a strip padded by its length on all sides would not fit in memory.
    across = max(0, int(np.ceil(max(-box[0], box[2] - width))))
    down = max(0, int(np.ceil(max(-box[1], box[3] - height))))
    padded = Image.fromarray(np.pad(np.asarray(image), ((down, down), (across, across), (0, 0)), mode="edge"))
    box = [side + pad for side, pad in zip(box, (across, down, across, down))]
    return padded.resize(size or (width, height), resample, box=box)
