"""How long a core takes from a stored image to a training batch's pixels, with views sampled once and twice.

python -m benchmarks.training_views

An augmented view is resampled straight from its image to the student's size, and a JPEG is decoded no larger than that
needs. Beside it the other way: the whole image decoded, a view of its size, which the processor resamples again; so
do evaluation, search and export, of the image itself. The icon is a PNG of 64 pixels for a student of 48, as in the
quickstart, where nothing can be decoded smaller; the JPEGs are made here, for a student of 224.

The last row is the processor alone, on views of its size: as bytes, which become numbers on a GPU, and as numbers.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil

from rows.images import load_rgb
from trainers.batches import Views, random_view, size_of_all
from trainers.pixel_bytes import pixel_bytes
from trainers.timing import seconds_of

from .common import Row, interleaved, print_table, ratio


SHIFT, ZOOM = 0.06, 0.1  # the quickstart's
IMAGES = (("PNG", (64, 64), 48), ("JPEG", (256, 256), 224), ("JPEG", (500, 375), 224), ("JPEG", (4000, 3000), 224))
BATCH = (32, 224)  # views, and their sides


def stored(file_format: str, size: tuple[int, int]) -> dict:
    """A grainy picture of so many pixels, as a dataset holds it: smooth ones decode faster than photos."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (-(-size[1] // 16), -(-size[0] // 16), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    grainy = Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    grainy.save(buffer, file_format, **({"quality": 90} if file_format == "JPEG" else {}))
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(image: dict, views: Views, processor: ViTImageProcessorPil, seed: int) -> np.ndarray:
    """The pixels `[3, H, W]` that training makes of a stored image."""
    view = random_view(
        load_rgb(image, views.least_side), random.Random(seed), views.random_shift, views.random_zoom,
        size=views.size, resample=views.resample,
    )  # fmt: skip
    return processor(images=[view], return_tensors="np")["pixel_values"][0]


def ways(size: int) -> tuple[Callable[[dict, int], np.ndarray], Callable[[dict, int], np.ndarray]]:
    """Once resampled and twice: functions of a stored image and a seed."""
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    once = Views(random_shift=SHIFT, random_zoom=ZOOM, size=size_of_all(processor), resample=processor.resample)
    twice = Views(random_shift=SHIFT, random_zoom=ZOOM)
    return tuple(
        lambda image, seed, views=views: pixels(image, views, processor, seed) for views in (once, twice)
    )  # fmt: skip


def measure(rounds: int = 20) -> list[Row]:
    """A row for each kind of image."""
    rows = []
    for file_format, of, size in IMAGES:
        image, sides = stored(file_format, of), ways(size)
        calls = [partial(seconds_of, partial(side, image, 1)) for side in sides]
        once, twice = interleaved(*calls, rounds=rounds)
        apart = np.abs(np.subtract(*(side(image, 1) for side in sides))).mean()
        means = [f"{1000 * sorted(times)[len(times) // 2]:.1f} ms" for times in (once, twice)]
        rows.append(
            Row(
                f"a view of a {file_format} of {of[0]} x {of[1]} for {size} pixels, {apart:.3f} apart on average",
                means[0],
                f"resampled twice: {means[1]}",
                f"{ratio(once, twice):.2f} x",
                "under 1 x",
            )
        )
    return [*rows, bytes_beside_numbers(rounds)]


def bytes_beside_numbers(rounds: int) -> Row:
    """A row on a batch of views as bytes, see `trainers/pixel_bytes.py`, beside one of numbers."""
    processor = ViTImageProcessorPil(size={"height": BATCH[1], "width": BATCH[1]})
    views = [load_rgb(stored("PNG", (BATCH[1], BATCH[1])))] * BATCH[0]
    sides = (partial(pixel_bytes, processor, views), partial(processor, images=views, return_tensors="pt"))
    small, plain = interleaved(*(partial(seconds_of, side) for side in sides), rounds=rounds)
    size, large = sides[0]().nbytes, sides[1]()["pixel_values"].nbytes
    means = [f"{1000 * sorted(times)[len(times) // 2]:.1f} ms" for times in (small, plain)]
    return Row(
        f"{BATCH[0]} views of {BATCH[1]} pixels through the processor as bytes, {size / 1e6:.1f} MB",
        means[0],
        f"as numbers: {means[1]}, {large / 1e6:.1f} MB",
        f"{ratio(small, plain):.2f} x",
        "under 1 x",
    )


if __name__ == "__main__":
    print_table(measure())
