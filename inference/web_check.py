"""Tries a site before it is kept: the page's own code and runtime, under Node.js, beside Python on the same files."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from inference.encoders import encode_by_onnx
from inference.web_pictures import Pictures
from inference.web_student import onnx_pixels


PROGRAM = Path(__file__).with_name("web_check.mjs")
AGREEMENT = 0.999  # least cosine of the page's embeddings and Python's
PROBES = 8  # pictures of the site that are compared, and labels
SECONDS = 600
TEXTS = (
    "arrow left", "Two DOGS, running!", "", "   ", "猫が眠っている 犬", "👩‍👩‍👧 ☃️",
    "zero\u200bwidth\ufeff", "École naïve e\u0301 ΣΑΣ İ",
    "don't 1984's", "tab\tnew\nline\u3000wide", "[CLS] [UNK] <s>", "ＦＵＬＬ ﬁ ①", "house " * 200,
)  # fmt: skip


def compare_with_python(site: Path, pictures: Pictures) -> None:
    """Compares the page's tokens and embeddings with those of Python's tokenizers and onnxruntime.

    Args:
        site: a whole site.
        pictures: that were written to it.

    Raises:
        ValueError: the page cannot run the student, or gives other tokens or embeddings.
    """
    texts = [*TEXTS, *(pictures.labels or [])[:PROBES]]
    images = [pictures.read(number) for number in pictures.kept[:PROBES]]
    images.append(Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 277, 3), dtype=np.uint8)))
    answers = run_page(site, texts, images)
    tokenizer = Tokenizer.from_file(str(site / "data" / "tokenizer.json"))
    for text, ids in zip(texts, answers["ids"], strict=True):
        if ids != tokenizer.encode(text).ids:
            raise ValueError(f"the page reads the text {text[:40]!r} as other tokens than Python does: {ids[:20]}")
    expected = embed_in_python(site, texts, images)
    for kind in ("texts", "pictures"):
        cosines = (np.array(answers[kind]) * expected[kind]).sum(1)
        if not cosines.min() >= AGREEMENT:  # NaN too
            raise ValueError(
                f"the page's embeddings of {kind} differ from Python's: their cosine is {cosines.min():.4f}, expected "
                f"{AGREEMENT} or more."
            )


def run_page(site: Path, texts: list[str], images: list[Image.Image]) -> dict[str, list]:
    """What the page makes of texts and of pictures in RGB: `ids` (lists), `texts` and `pictures` (`[D]` each).

    Raises:
        ValueError: it cannot run the student; says why.
    """
    pictures = [
        {
            "width": image.width,
            "height": image.height,
            "rgba": base64.b64encode(image.convert("RGBA").tobytes()).decode(),
        }
        for image in images
    ]
    probes = json.dumps({"texts": texts, "pictures": pictures})
    marker = site / "package.json"  # tells older versions of Node.js that the files are modules
    marker.write_text('{"type": "module"}')
    try:
        result = subprocess.run(
            ["node", PROGRAM, site], input=probes, capture_output=True, encoding="utf-8", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the page's code did not end within {SECONDS} seconds") from None
    finally:
        marker.unlink()
    try:
        answers = json.loads(result.stdout)
    except json.JSONDecodeError:
        why = " ".join(result.stderr.split())[-300:]
        raise ValueError(f"Node.js cannot run the page's code (version 18 or newer is needed): {why}") from None
    if "error" in answers:
        raise ValueError(answers["error"])
    return answers


def embed_in_python(site: Path, texts: list[str], images: list[Image.Image]) -> dict[str, np.ndarray]:
    """`texts` `[T, D]` and `pictures` `[P, D]` by onnxruntime from the site's own files, one at a time as the page."""
    about = json.loads((site / "data" / "site.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(site / "data" / "tokenizer.json"))
    text, vision = (encode_by_onnx(site / about["student"][tower]["file"]) for tower in ("text", "vision"))

    def encode_text(query: str) -> np.ndarray:
        ids = np.array([tokenizer.encode(query).ids])
        return text({"input_ids": ids, "attention_mask": np.ones_like(ids)})["text_embeds"][0]

    images = [onnx_pixels(image, about["image"]) for image in images]
    return {
        "texts": np.stack([encode_text(query) for query in texts]),
        "pictures": np.stack([vision({"pixel_values": image})["image_embeds"][0] for image in images]),
    }
