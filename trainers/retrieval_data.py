"""Rows of an image-text dataset as batches of images with all, or a sample, of their captions."""

from __future__ import annotations

import hashlib
import random

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image


TEACHER_COLUMNS = ("teacher_image_embeds", "teacher_text_embeds")


def id_hash(text: str) -> int:
    """int64 of the string's blake2b-64: the same in every process and on every machine, unlike `hash()`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def load_rgb(image: dict) -> Image.Image:
    """Decodes the undecoded value of an `Image` column (`{"bytes", "path"}`) to RGB.

    Raises:
        ValueError: where the image cannot be read or is a decompression bomb.
    """
    try:
        return datasets.Image(mode="RGB").decode_example(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image: {error}") from error


def random_view(image: Image.Image, rng: random.Random, shift: float, zoom: float) -> Image.Image:
    """A shifted and zoomed view of the same size; what lies outside the image repeats its edge.

    Args:
        image: RGB.
        rng: where the randomness comes from.
        shift: largest shift in each direction, as a fraction of the side, in [0, 1).
        zoom: the side of the view is the image's times a factor in [1 - zoom, 1 + zoom], zoom in [0, 1).
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
    pad = max(0, int(np.ceil(max(-box[0], -box[1], box[2] - width, box[3] - height))))
    padded = Image.fromarray(np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
    return padded.resize((width, height), Image.Resampling.BILINEAR, box=[side + pad for side in box])


def rows_to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The innermost values of a (nested) list column of equal widths, as an array `[rows, D]` of their dtype."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    rows = len(array)
    while (
        pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type)
    ):
        rows = len(array)
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).reshape(rows, -1)


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
        columns = ["image", "captions", "image_id", *(TEACHER_COLUMNS if with_teacher else ())]
        self.group_column = "group_id" if "group_id" in dataset.column_names else "image_id"
        dataset = dataset.select_columns(list(dict.fromkeys([*columns, self.group_column])))
        self.rows = dataset.cast_column("image", datasets.Image(decode=False)).with_format("arrow")
        self.with_teacher = with_teacher
        self.captions_per_image = captions_per_image
        self.random_shift = random_shift
        self.random_zoom = random_zoom
        self.seed = seed
        # In shared memory, so that persistent workers see a new epoch too.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        table = self.rows[list(indices)]
        captions = table["captions"].to_pylist()
        groups = table[self.group_column].to_pylist()
        images = table["image"].to_pylist()
        if self.with_teacher:
            teacher_image = rows_to_numpy(table["teacher_image_embeds"])  # [N, D]
            teacher_text = rows_to_numpy(table["teacher_text_embeds"])  # [all captions of the N images, D]
            offsets = np.cumsum([0] + [len(texts) for texts in captions])
        examples = []
        for i, image_id in enumerate(table["image_id"].to_pylist()):
            rng = random.Random(f"{self.seed}/{int(self.epoch)}/{image_id}")
            chosen = list(range(len(captions[i])))
            if self.captions_per_image is not None and len(chosen) > self.captions_per_image:
                chosen = sorted(rng.sample(chosen, self.captions_per_image))
            example = {
                "image_id": image_id,
                "group": id_hash(groups[i]),
                "captions": [captions[i][j] for j in chosen],
            }
            try:
                example["image"] = random_view(load_rgb(images[i]), rng, self.random_shift, self.random_zoom)
            except ValueError as error:
                example["unreadable"] = str(error)
            if self.with_teacher:
                example["teacher_image"] = teacher_image[i]
                example["teacher_text"] = teacher_text[offsets[i] + np.array(chosen)]
            examples.append(example)
        return examples


class RetrievalCollator:
    """Batches examples of [`RetrievalDataset`]: N images, their C captions flattened, and who belongs to whom.

    Returns, for N images that could be read and C captions of at most L tokens:

    | key | shape | |
    |---|---|---|
    | pixel_values | [N, 3, H, W] | |
    | input_ids, attention_mask | [C, L] | |
    | caption_to_image | [C] | row of each caption's image |
    | image_groups | [N] int64 | what counts as the same thing |
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

    def __call__(self, examples: list[dict]) -> dict:
        unreadable = [
            f"{example['image_id']}: {example['unreadable']}" for example in examples if "image" not in example
        ]
        examples = [example for example in examples if "image" in example]
        if not examples:
            raise ValueError(f"None of the {len(unreadable)} images of a batch could be read: {unreadable[:3]}, ...")
        captions = [caption for example in examples for caption in example["captions"]]
        text = self.processor.tokenizer(
            captions, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        counts = torch.tensor([len(example["captions"]) for example in examples])
        batch = {
            "pixel_values": self.processor.image_processor(
                images=[example["image"] for example in examples], return_tensors="pt"
            )["pixel_values"],
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "caption_to_image": torch.repeat_interleave(torch.arange(len(examples)), counts),
            "image_groups": torch.tensor([example["group"] for example in examples]),
            "unreadable": unreadable,
        }
        if "teacher_image" in examples[0]:
            batch["teacher_image"] = torch.from_numpy(np.stack([example["teacher_image"] for example in examples]))
            batch["teacher_text"] = torch.from_numpy(np.concatenate([example["teacher_text"] for example in examples]))
        return batch
