"""Pixels as bytes on their way to a GPU, and there the numbers that the image processor makes of them.

A byte is a quarter of a float: in the loader's workers, between processes and on the way to the device. The numbers
are the processor's own, bit for bit: it is asked once what it makes of each of the 256 bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


LEVELS = 256
AS_BYTES = {"do_rescale": False, "do_normalize": False}
AS_LARGE = {"do_resize": False, "do_center_crop": False}


def pixel_bytes(image_processor, images: list[Image.Image]) -> torch.Tensor:
    """What a processor makes of images before it rescales and normalises: uint8 `[N, 3, H, W]`."""
    return image_processor(images=images, return_tensors="pt", **AS_BYTES)["pixel_values"]


def pixel_table(image_processor) -> torch.Tensor | None:
    """The number that a processor makes of each byte of each channel, `[3, 256]` float32.

    Returns:
        None where its `pixel_values` do not follow from bytes alone: one is tried, of random pixels.
    """
    tried = Image.fromarray(np.random.default_rng(0).integers(0, LEVELS, (61, 47, 3), dtype=np.uint8))
    gray = Image.fromarray(np.arange(LEVELS, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    try:
        found = pixel_bytes(image_processor, [tried])
        expected = image_processor(images=[tried], return_tensors="pt")["pixel_values"]
        table = image_processor(images=[gray], return_tensors="pt", **AS_LARGE)["pixel_values"].reshape(3, LEVELS)
    except Exception:  # of whatever processor there is: it is then called as it always was
        return None
    if found.dtype != torch.uint8 or not torch.equal(pixel_numbers(found, table), expected):
        return None
    return table.contiguous()


def table_on(device: torch.device, image_processor) -> torch.Tensor | None:
    """The [`pixel_table`] of a run on a device; None on a CPU, where nothing is transferred."""
    table = None if device.type == "cpu" else pixel_table(image_processor)
    return None if table is None else table.to(device)


def pixel_numbers(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The processor's numbers for bytes `[N, 3, H, W]`, on their device.

    Args:
        table: see [`pixel_table`], on the same device.
    """
    channel = torch.arange(3, dtype=torch.int32, device=pixels.device).view(3, 1, 1) * LEVELS
    return table.flatten().index_select(0, (pixels.int() + channel).flatten()).view(pixels.shape)


def with_pixel_numbers(batch: dict, table: torch.Tensor | None) -> dict:
    """The batch with its `pixel_values` as numbers; a batch without any, or with numbers already, as it is."""
    pixels = batch.get("pixel_values")
    if table is None or pixels is None or pixels.dtype != torch.uint8:
        return batch
    return {**batch, "pixel_values": pixel_numbers(pixels, table)}
