"""Searches a folder of images with an exported student: python onnx_search.py EXPORTED IMAGES "a query" [K].

With K, the first K numbers alone are compared: a student that was rotated keeps most of its recall.
"""

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
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def pixels(image: Image.Image, settings: dict) -> np.ndarray:
    """`[1, 3, H, W]`: the image upright, 8 bits, on white, squashed to the student's size, normalised."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut at 255
        sixteen = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((sixteen + 128) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    size = settings["size"]["width"], settings["size"]["height"]
    values = np.asarray(image.resize(size, settings["resample"])) * settings["rescale_factor"]
    return ((values - settings["image_mean"]) / settings["image_std"]).astype(np.float32).transpose(2, 0, 1)[None]


def read_images(folder: Path, settings: dict) -> dict[str, np.ndarray]:
    """Path -> [`pixels`] of each picture in a folder and those below it; what cannot be read is named and left out."""
    read = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            try:
                read[path.relative_to(folder).as_posix()] = pixels(Image.open(path, formats=FORMATS), settings)
            except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
                print(f"{path.name!r} is left out: {error}", file=sys.stderr)
    return read


def main(folder: Path, images: Path, query: str, width: int | None = None) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    vision, text = (InferenceSession(folder / "onnx" / f"{name}_model.onnx") for name in ("vision", "text"))
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(query)
    if tokens.overflowing:
        print(f"The text is cut: the student reads its first {len(tokens.ids)} tokens.", file=sys.stderr)
    embedding = text.run(None, {"input_ids": [tokens.ids], "attention_mask": [tokens.attention_mask]})[0]
    if width is not None and not 1 <= width <= embedding.shape[1]:
        sys.exit(f"error: {width} numbers: the student gives {embedding.shape[1]}.")
    read = read_images(images, settings)
    if not read:
        sys.exit(f"error: {images} holds no image that can be read ({', '.join(SUFFIXES)}).")
    index = np.concatenate([vision.run(None, {"pixel_values": image})[0] for image in read.values()])
    rows = np.concatenate([embedding, index])[:, :width]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = rows[1:] @ rows[0]
    for i in np.argsort(scores)[::-1][:10]:
        print(f"{scores[i]:.4f} {list(read)[i]}")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or not all(width.isdecimal() for width in sys.argv[4:]):
        sys.exit(f"usage: {__doc__.splitlines()[0].split(': ')[1]}")
    exported, searched = map(Path, sys.argv[1:3])
    if not (exported / "onnx" / "text_model.onnx").is_file():
        sys.exit(f"error: there is no {exported}/onnx/text_model.onnx: name a folder that inference.export wrote.")
    if not searched.is_dir():
        sys.exit(f"error: {searched} is not a folder.")
    main(exported, searched, sys.argv[3], *map(int, sys.argv[4:]))
