"""Image search with a DSMD student, as a Hugging Face Space: type a text or drop an image.

The folder of this file is the whole Space; of the project it needs only a student on the Hub. To try it:

    MODEL_ID=runs/icons IMAGES=~/Pictures python inference/space/app.py
"""

import html
import io
import os
import sys
import time
from pathlib import Path

import datasets
import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor


# Set them as variables of the Space, or here.
MODEL_ID = os.environ.get("MODEL_ID", "user/student")  # Hub id or folder
MODEL_REVISION = os.environ.get("MODEL_REVISION", "main")  # best a commit: the repository's code runs here
IMAGES = os.environ.get("IMAGES", "images")  # a folder, or the Hub id of a dataset with a column `image`
SPLIT = os.environ.get("SPLIT", "test")  # of that dataset
MOST_IMAGES = int(os.environ.get("MOST_IMAGES", "5000"))
TEACHER_ID = os.environ.get("TEACHER_ID")  # a dual encoder of transformers, to time beside the student
RESULTS = 12
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not those for which Pillow starts other programs
LONGEST_QUERY = 1000  # characters
MOST_PIXELS = 50_000_000
LONGEST_SIDES = 200  # how many times a picture's longer side is its shorter one, at most
LARGEST_BODY = 21 << 20  # bytes of a request: a picture of 20 MB
LONGEST_QUEUE = 1000  # requests that wait; more are told to come back
HOUR = 3600  # seconds; uploads older than that are deleted


def load_images() -> datasets.Dataset:
    """The images of the folder or dataset, not decoded.

    Raises:
        ValueError: there are none.
    """
    if Path(IMAGES).expanduser().is_dir():
        folder = Path(IMAGES).expanduser()
        found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_symlink()]
        hidden = (any(part.startswith(".") for part in path.relative_to(folder).parts) for path in found)
        files = sorted(path for path, is_hidden in zip(found, hidden) if not is_hidden)
        dataset = datasets.Dataset.from_dict({"image": list(map(str, files))})
    else:
        dataset = datasets.load_dataset(IMAGES, split=SPLIT)
    if not len(dataset):
        raise ValueError(f"IMAGES={IMAGES}: no images there ({', '.join(SUFFIXES)}).")
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return dataset.select(range(min(MOST_IMAGES, len(dataset))))


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, 16 bits scaled to 8, and what is transparent on white, as the student was trained."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL would cut 16 bits at 255
        sixteen = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((sixteen + 128) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_image(file: str | io.BytesIO) -> Image.Image:
    """An image file in RGB.

    Raises:
        Exception: of many types, where it is broken, too large or too long.
    """
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MOST_PIXELS or max(image.size) > LONGEST_SIDES * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are too many, or too long a strip")
    return to_rgb(image)


def open_image(path: str) -> Image.Image:
    """An uploaded picture, in RGB.

    Raises:
        gr.Error: it cannot be read, or is too large or too long; the person sees the message.
    """
    try:
        return read_image(path)
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        raise gr.Error(f"This picture cannot be read: expected {', '.join(FORMATS)}.") from error


def row_image(row: dict) -> Image.Image:
    """The image of a row of [`load_images`], in RGB. Raises as [`read_image`]."""
    data, path = row["image"]["bytes"], row["image"]["path"]
    return read_image(path if data is None else io.BytesIO(data))


class LimitBody:
    """Answers 413 to a request with a larger body than `LARGEST_BODY`; a text or a data URL has no limit otherwise."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        left = LARGEST_BODY

        async def receive_some():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, "The request is too large.")
            return message

        await self.app(scope, receive_some, send)


class Encoder:
    """A dual encoder of the Hub: the student, or its teacher."""

    def __init__(self, model_id: str, **settings):
        self.model = AutoModel.from_pretrained(model_id, **settings).eval()
        self.processor = AutoProcessor.from_pretrained(model_id, backend="pil", **settings)
        for query in ("warm up", Image.new("RGB", (64, 64))):  # or the first person's times would be longer
            self.encode([query])

    @torch.inference_mode()
    def encode(self, queries: list[str] | list[Image.Image]) -> torch.Tensor:
        """Normalised embeddings `[N, D]` of one text or N images."""
        if isinstance(queries[0], str):
            inputs = self.processor(text=queries, truncation=True, return_tensors="pt")
            features = self.model.get_text_features(**inputs)
        else:
            inputs = self.processor(images=queries, return_tensors="pt")
            features = self.model.get_image_features(**inputs)
        return normalize(features.pooler_output, dim=-1)


def index_images(student: Encoder, dataset: datasets.Dataset) -> tuple[datasets.Dataset, torch.Tensor]:
    """The rows whose image can be read, N of them, and the embeddings of these `[N, D]`; the others are named.

    Raises:
        ValueError: none can be read.
    """
    kept, embeds = [], []
    for start in tqdm(range(0, len(dataset), 32), "indexing"):
        images = []
        for number in range(start, min(start + 32, len(dataset))):
            try:
                images.append(row_image(dataset[number]))
                kept.append(number)
            except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
                path = dataset[number]["image"]["path"]
                print(f"{path or f'image {number}'!r} is left out: {error}", flush=True)
        if images:
            embeds.append(student.encode(images))
    if not kept:
        raise ValueError(f"IMAGES={IMAGES}: none of the {len(dataset)} images there can be read.")
    return dataset.select(kept), torch.cat(embeds)


def milliseconds(call) -> tuple:
    """What a call returns, and how long it took."""
    start = time.perf_counter()
    value = call()
    return value, 1000 * (time.perf_counter() - start)


def time_bars(times: dict[str, float]) -> str:
    """HTML bars of milliseconds, each labelled."""
    bars = []
    for (label, value), color in zip(times.items(), ("#15803d", "#9ca3af")):
        style = f"width:{100 * value / max(times.values())}%;height:8px;border-radius:4px;margin:2px 0 10px"
        bars.append(f'{html.escape(label)}: <b>{value:.1f} ms</b><div style="{style};background:{color}"></div>')
    return "".join(bars)


def make_demo() -> gr.Blocks:
    student = Encoder(MODEL_ID, revision=MODEL_REVISION, trust_remote_code=True)
    teacher = Encoder(TEACHER_ID, trust_remote_code=False) if TEACHER_ID else None
    dataset, index = index_images(student, load_images())

    def search(query: str | None) -> tuple[list, str]:
        return results_of(query[:LONGEST_QUERY]) if query and query.strip() else ([], "")

    def search_image(path: str | None) -> tuple[list, str]:
        return results_of(open_image(path)) if path else ([], "")

    def results_of(query: str | Image.Image) -> tuple[list, str]:
        embedding, spent = milliseconds(lambda: student.encode([query]))
        (scores, rows), searching = milliseconds(lambda: (index @ embedding[0]).topk(min(RESULTS, len(index))))
        times = {f"Student, to encode the query (and {searching:.1f} ms to search {len(index):,} images)": spent}
        if teacher:
            times[f"Teacher {TEACHER_ID}, to encode it"] = milliseconds(lambda: teacher.encode([query]))[1]
        images = map(row_image, dataset.select(rows.tolist()))
        return [(image, f"{score:.3f}") for image, score in zip(images, scores.tolist())], time_bars(times)

    with gr.Blocks(title="Image search", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as demo:
        gr.Markdown(f"# Image search\n{len(dataset):,} images, searched with `{MODEL_ID}`.")
        with gr.Row():
            text = gr.Textbox(label="Type what to look for", submit_btn="Search", scale=2, max_length=LONGEST_QUERY)
            image = gr.Image(
                label="or drop an image", type="filepath", image_mode=None, height=160, sources=["upload", "clipboard"]
            )
        times = gr.HTML()
        gallery = gr.Gallery(label="Results, best first", columns=6, height=None, object_fit="contain")
        text.submit(search, text, [gallery, times]).then(lambda: None, outputs=image)
        image.upload(search_image, image, [gallery, times]).then(lambda: "", outputs=text)
    return demo.queue(max_size=LONGEST_QUEUE)


if __name__ == "__main__":
    try:
        demo = make_demo()
    except (OSError, ValueError, SafetensorError) as error:  # of the variables: no such student, no such images
        sys.exit(f"error: {error}")
    # Fonts of the machine: the default theme asks Google for its own.
    demo.launch(
        theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
        max_file_size="20mb",
        app_kwargs={"middleware": [Middleware(LimitBody)]},
    )
