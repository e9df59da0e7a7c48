"""Image search with a DSMD student, as a Hugging Face Space: type a text or drop an image.

The folder of this file is the whole Space; of the project it needs only a student on the Hub. To try it:

    MODEL_ID=runs/icons IMAGES=~/Pictures python inference/space/app.py
"""

import html
import os
import time
from pathlib import Path

import datasets
import gradio as gr
import torch
from PIL import Image, ImageOps
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
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def load_images() -> datasets.Dataset:
    if Path(IMAGES).expanduser().is_dir():
        files = sorted(path for path in Path(IMAGES).expanduser().rglob("*") if path.suffix.lower() in SUFFIXES)
        dataset = datasets.Dataset.from_dict({"image": list(map(str, files))}).cast_column("image", datasets.Image())
    else:
        dataset = datasets.load_dataset(IMAGES, split=SPLIT)
    if not len(dataset):
        raise ValueError(f"IMAGES={IMAGES}: no images there ({', '.join(SUFFIXES)}).")
    return dataset.select(range(min(MOST_IMAGES, len(dataset))))


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, and what is transparent on white, as the student was trained."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class Encoder:
    """A dual encoder of the Hub: the student, or its teacher."""

    def __init__(self, model_id: str, **settings):
        self.model = AutoModel.from_pretrained(model_id, **settings).eval()
        self.processor = AutoProcessor.from_pretrained(model_id, **settings)
        for query in ("warm up", Image.new("RGB", (64, 64))):  # so that the first person's time is no slower
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
    teacher = Encoder(TEACHER_ID) if TEACHER_ID else None
    dataset = load_images()
    batches = (dataset[start : start + 32]["image"] for start in range(0, len(dataset), 32))
    total = -(-len(dataset) // 32)
    index = torch.cat([student.encode(list(map(to_rgb, images))) for images in tqdm(batches, "indexing", total)])

    def search(query: str | Image.Image | None) -> tuple[list, str]:
        if query is None or (isinstance(query, str) and not query.strip()):
            return [], ""
        query = query if isinstance(query, str) else to_rgb(query)
        embedding, spent = milliseconds(lambda: student.encode([query]))
        (scores, rows), searching = milliseconds(lambda: (index @ embedding[0]).topk(min(RESULTS, len(index))))
        times = {f"Student, to encode the query (and {searching:.1f} ms to search {len(index):,} images)": spent}
        if teacher:
            times[f"Teacher {TEACHER_ID}, to encode it"] = milliseconds(lambda: teacher.encode([query]))[1]
        images = dataset[rows.tolist()]["image"]
        return [(to_rgb(image), f"{score:.3f}") for image, score in zip(images, scores.tolist())], time_bars(times)

    with gr.Blocks(title="Image search", analytics_enabled=False) as demo:
        gr.Markdown(f"# Image search\n{len(dataset):,} images, searched with `{MODEL_ID}`.")
        with gr.Row():
            text = gr.Textbox(label="Type what to look for", submit_btn="Search", scale=2)
            image = gr.Image(label="or drop an image", type="pil", height=160, sources=["upload", "clipboard"])
        times = gr.HTML()
        gallery = gr.Gallery(label="Results, best first", columns=6, height=None, object_fit="contain")
        text.submit(search, text, [gallery, times]).then(lambda: None, outputs=image)
        image.upload(search, image, [gallery, times]).then(lambda: "", outputs=text)
    return demo


if __name__ == "__main__":
    # Fonts of the machine: the default theme asks Google for its own.
    make_demo().launch(theme=gr.themes.Default(font="sans-serif", font_mono="monospace"), max_file_size="20mb")
