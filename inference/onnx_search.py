"""Searches a folder of images with an exported student: python onnx_search.py EXPORTED IMAGES "a query"."""

import json
import os
import sys
from pathlib import Path

import numpy as np


os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before its import: onnxruntime would report to its makers
from onnxruntime import InferenceSession  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not those for which Pillow starts other programs


def pixels(image: Image.Image, settings: dict) -> np.ndarray:
    """`[1, 3, H, W]`: the image upright, 8 bits, on white, squashed to the student's size, normalised."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut at 255
        sixteen = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((sixteen + 128) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    values = np.asarray(image.resize(settings["size"], settings["resample"])) * settings["rescale_factor"]
    return ((values - settings["mean"]) / settings["std"]).astype(np.float32).transpose(2, 0, 1)[None]


if __name__ == "__main__":
    folder, paths, query = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir()), sys.argv[3]
    settings = json.loads((folder / "image_preprocessing.json").read_text())
    vision, text = (InferenceSession(folder / f"{name}_model.onnx") for name in ("vision", "text"))
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(query)
    if tokens.overflowing:
        print(f"The text is cut: the student reads its first {len(tokens.ids)} tokens.", file=sys.stderr)
    query = text.run(None, {"input_ids": [tokens.ids], "attention_mask": [tokens.attention_mask]})[0][0]
    images = (pixels(Image.open(p, formats=FORMATS), settings) for p in paths)
    index = np.concatenate([vision.run(None, {"pixel_values": image})[0] for image in images])
    for i in np.argsort(index @ query)[::-1][:10]:
        print(f"{index[i] @ query:.4f} {paths[i].name}")
