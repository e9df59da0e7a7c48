"""A student for the browser: its two towers as ONNX, in int8 where recall holds, tried by the code of the page."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedModel, VisionTextDualEncoderProcessor

from inference.encoders import Encoder, encode_by_onnx, example_inputs
from inference.export import image_settings, save_tokenizer
from inference.onnx_files import CALIBRATED_ON, COMPARED_ON, least_cosine, towers_of, write_int8
from inference.onnx_graphs import write_onnx
from inference.student import load_student
from inference.web_files import Thumbnails
from inference.web_pictures import Pictures
from trainers.metrics import retrieval_metrics


MOST_BYTES = 200_000_000  # of both towers: the browser of a phone needs about three times as much for a page
RECALL_KEPT = 0.99  # share of the recalls' sum that int8 has to keep
NEIGHBOURS_KEPT = 0.9  # without captions: share of the ten best pictures that int8 has to find too
OUTPUTS = {"text": "text_embeds", "vision": "image_embeds"}
PROBES = 2000  # pictures that the choice is measured on, at most


class WebStudent(NamedTuple):
    model: PreTrainedModel  # in float32, on the CPU
    processor: VisionTextDualEncoderProcessor
    name: str
    hub_id: str | None
    image_settings: dict  # see `inference.export.image_settings`

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_web_student(name: str) -> WebStudent:
    """A student of a folder or of the Hub.

    Raises:
        OSError, ValueError, pickle.UnpicklingError: there is none, or its image processor does more than squash and
            normalise.
    """
    student = load_student(name)
    return WebStudent(*student, image_settings(student.processor.image_processor))


def check_size(size: int) -> None:
    """Refuses towers of more bytes than a phone's browser can hold; in int8 a parameter takes one."""
    if size > MOST_BYTES:
        raise ValueError(
            f"the student's towers take {size / 1e6:,.0f} MB, and a page on a phone holds {MOST_BYTES / 1e6:.0f} MB: "
            "distil a smaller student, or search with python -m inference.search or a server (inference/space)."
        )


def tower_file(folder: Path, tower: str, precision: str) -> Path:
    """A file of [`export_towers`]: of the tower vision or text, in float32 or int8."""
    return folder / f"{tower}_model{'_quantized' if precision == 'int8' else ''}.onnx"


def export_towers(student: WebStudent, pictures: Pictures, folder: Path) -> None:
    """Writes each tower in float32 and in int8, and `tokenizer.json`.

    Unlike [`inference.export.export`], int8 is kept where it is slower: here bytes count. Convolutions are calibrated
    on the first pictures of the site.

    Raises:
        ValueError: the tokenizer is written in Python.
        RuntimeError: a tower in float32 gives other embeddings than torch.
    """
    save_tokenizer(student.processor.tokenizer, folder / "tokenizer.json")
    images = islice(pictures, CALIBRATED_ON + COMPARED_ON)
    pixels = np.concatenate([onnx_pixels(image, student.image_settings) for image in images])
    for tower in towers_of(student.model):
        source = folder / f"{tower.graph}.onnx"
        examples = example_inputs(tower.graph, student.processor, pixels[-COMPARED_ON:])
        write_onnx(tower, examples[1], source, None)
        least_cosine(source, tower.graph, student.model, examples, is_exact=True)
        write_int8(source, folder / f"{tower.graph}_quantized.onnx", pixels)


def onnx_pixels(image: Image.Image, settings: dict) -> np.ndarray:
    """`[1, 3, H, W]` of a picture, by the exported example's own code."""
    from inference.onnx_search import pixels  # it imports onnxruntime, which may be missing

    return pixels(image, settings)


class Towers:
    """The exported towers as encoders of one input at a time, as the page runs them: int8 scales depend on a batch."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._encoders: dict[tuple[str, str], Encoder] = {}

    def _encode(self, tower: str, precision: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if (tower, precision) not in self._encoders:
            self._encoders[tower, precision] = encode_by_onnx(tower_file(self.folder, tower, precision))
        return self._encoders[tower, precision](inputs)[OUTPUTS[tower]][0]

    def picture(self, image: Image.Image, precision: str) -> np.ndarray:
        """`[D]` of a picture in RGB."""
        return self._encode("vision", precision, {"pixel_values": onnx_pixels(image, self.settings)})

    def text(self, text: str, precision: str) -> np.ndarray:
        """`[D]` of a text."""
        ids = np.array([self._tokenizer.encode(text).ids])
        return self._encode("text", precision, {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def write_student(
    student: WebStudent, pictures: Pictures, thumbnails: Thumbnails, scratch: Path, data: Path
) -> tuple[dict, np.ndarray]:
    """Exports a student, chooses each tower's precision, writes both towers and the tokenizer, and reads all pictures.

    Args:
        student: the one to write.
        pictures: N of them can be read.
        thumbnails: is given each picture.
        scratch: a folder for the export.
        data: the site's folder of data.

    Returns:
        What `site.json` says of the towers (`vision` and `text`: file, bytes, precision), and the pictures' embeddings
        `[N, D]` by the vision tower that was written.
    """
    export_towers(student, pictures, scratch)
    towers = Towers(scratch, student.image_settings)
    precisions = choose_precisions(towers, pictures)
    about = {}
    for tower, precision in precisions.items():
        file = data / f"{tower}_model.onnx"
        file.write_bytes(tower_file(scratch, tower, precision).read_bytes())
        about[tower] = {"file": f"data/{file.name}", "bytes": file.stat().st_size, "precision": precision}
    check_size(sum(tower["bytes"] for tower in about.values()))
    # Compact: a vocabulary is a quarter smaller without its indentation.
    tokenizer = json.loads((scratch / "tokenizer.json").read_text(encoding="utf-8"))
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (data / "tokenizer.json").write_text(compact, encoding="utf-8")
    embeds = []
    for image in pictures:
        thumbnails.add(image)
        embeds.append(towers.picture(image, precisions["vision"]))
    return about, np.stack(embeds)


def choose_precisions(towers: Towers, pictures: Pictures) -> dict[str, str]:
    """int8 for each tower whose int8 alone keeps recall, else float32; prints what was measured.

    Where all have captions, recall is the sum of the six recalls on the pictures; else the share of each picture's and
    each name's ten best pictures, by float32, that are found too.
    """
    numbers = np.unique(np.linspace(0, len(pictures) - 1, min(PROBES, len(pictures))).astype(int))
    images, kept = [], []
    for number in numbers:
        try:
            image = pictures.read(number)
        except Exception:  # told when all are read
            continue
        images.append({precision: towers.picture(image, precision) for precision in ("float32", "int8")})
        kept.append(number)
    if not images:
        raise ValueError(f"none of {len(pictures)} pictures can be read")
    has_captions = all(pictures.captions[number] for number in kept)
    texts = [(text, pictures.groups[i]) for i in kept for text in pictures.captions[i] or [_words(pictures.names[i])]]
    embeds = {
        ("vision", precision): np.stack([image[precision] for image in images]) for precision in ("float32", "int8")
    } | {
        ("text", precision): np.stack([towers.text(text, precision) for text, _ in texts])
        for precision in ("float32", "int8")
    }
    groups = [pictures.groups[number] for number in kept], [group for _, group in texts]
    chosen = {}
    for tower in ("vision", "text"):
        vision, text = (embeds[name, "int8" if name == tower else "float32"] for name in ("vision", "text"))
        exact = embeds["vision", "float32"], embeds["text", "float32"]
        if has_captions:
            before, after = (_recall(*pair, *groups) for pair in (exact, (vision, text)))
            holds, measured = after >= RECALL_KEPT * before, f"the recalls' sum is {after:.1f} and was {before:.1f}"
        else:
            queries = (exact[0], vision) if tower == "vision" else (exact[1], text)
            share = _shared_neighbours(*queries, exact[0])
            holds, measured = share >= NEIGHBOURS_KEPT, f"{share:.1%} of the ten best pictures are the same"
        chosen[tower] = "int8" if holds else "float32"
        print(f"{tower} tower: {chosen[tower]}; by int8 {measured} ({len(kept):,} pictures)")
    return chosen


def _words(name: str) -> str:
    """The words of a file's name."""
    return " ".join(Path(name).stem.replace("-", " ").replace("_", " ").split())


def _recall(images: np.ndarray, texts: np.ndarray, image_groups: list[str], text_groups: list[str]) -> float:
    return retrieval_metrics(torch.from_numpy(images), torch.from_numpy(texts), image_groups, text_groups)["rsum"]


def _shared_neighbours(queries: np.ndarray, others: np.ndarray, index: np.ndarray) -> float:
    """Mean share of the ten best rows of `index` `[N, D]` for `queries` `[Q, D]` that `others` `[Q, D]` find too."""
    count = min(10, len(index))
    best, found = (np.argsort(-(embeds @ index.T), 1, kind="stable")[:, :count] for embeds in (queries, others))
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(best, found)]))
