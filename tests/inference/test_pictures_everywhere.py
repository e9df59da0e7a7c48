"""A picture of any mode gives the embedding of training in every program; where one needs a line, the docs have it."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_student
from image_files import file_of, picture
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer
from tiny_towers import scatter
from transformers import AutoProcessor, pipeline

from inference import export, onnx_search, search
from model_cards.model_card import usage_code
from trainers.batches import RetrievalCollator, RetrievalDataset


ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "guides" / "deploy.md").read_text(encoding="utf-8")
MODES = ("RGB", "L", "LA", "P", "P, transparent", "1", "CMYK", "I;16", "RGBA")
# What a cell of the table says; the first that is true.
CELLS = ("equal", "two lines", "three lines")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The files, as they are read by people: each has its mode and its tag."""
    paths = {}
    for i, mode in enumerate(MODES):
        paths[mode] = tmp_path_factory.getbasetemp() / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        paths[mode].write_bytes(file_of(mode))
        image = Image.open(paths[mode])
        assert image.mode == mode.split(",")[0] and image.getexif()[Image.ExifTags.Base.Orientation] == 6
        assert image.has_transparency_data == (mode in ("LA", "P, transparent", "RGBA"))
    return paths


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    model, processor = make_student()
    folder = tmp_path_factory.mktemp("student")
    scatter(model).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def docs_lines() -> list[str]:
    """The code of the docs: the two lines for any picture, and the one between them for 16 bits."""
    two, between = re.findall(r"```python\n(image = .*?)```", DOCS, re.DOTALL)
    return [*two.strip().split("\n"), between]


def after(lines: str, path: Path) -> Image.Image:
    """What a person gives a program: the picture as it was opened, or after two or three lines of the docs."""
    upright, white, sixteen = docs_lines()
    names = {"Image": Image, "ImageOps": ImageOps, "file": path, "image": Image.open(path)}
    for line in {"equal": [], "two lines": [upright, white], "three lines": [upright, sixteen, white]}[lines]:
        exec(line, names)
    return names["image"]


@pytest.fixture(scope="module")
def programs(saved):
    """What each program makes of a path and the docs' lines: an embedding `[D]`."""
    processor = AutoProcessor.from_pretrained(saved)
    model = pipeline("image-feature-extraction", model=saved)
    settings = export.image_settings(processor.image_processor)
    encoder = SentenceTransformer(saved, device="cpu")

    def embed(pixels) -> torch.Tensor:
        with torch.no_grad():
            return model.model(pixel_values=torch.as_tensor(pixels)).image_embeds[0]

    def in_search(path, lines):
        image = search.read_image(path) if lines == "equal" else after(lines, path)
        return embed(processor.image_processor(images=[image], return_tensors="pt")["pixel_values"])

    def in_pipeline(image):
        return model(image, return_tensors=True)[0]

    def in_sentence_transformers(image):
        return encoder.encode([image], normalize_embeddings=True, convert_to_tensor=True)[0]

    return {
        "`inference.search`": in_search,
        "AutoProcessor": lambda path, lines: embed(
            processor(images=[after(lines, path)], return_tensors="pt")["pixel_values"]
        ),
        "pipelines": lambda path, lines: in_pipeline(str(path) if lines == "equal" else after(lines, path)),
        "SentenceTransformer, image": lambda path, lines: in_sentence_transformers(after(lines, path)),
        "SentenceTransformer, path": lambda path, lines: in_sentence_transformers(
            str(path) if lines == "equal" else after(lines, path)
        ),
        "`onnx_search.py`": lambda path, lines: embed(onnx_search.pixels(after(lines, path), settings)),
    }


@pytest.fixture(scope="module")
def in_training(saved, files):
    """What training sees of each file: its own reader, collator and model."""
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in files.values()],
        "captions": [["a"]] * len(files),
        "image_id": list(files),
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    data = RetrievalDataset(datasets.Dataset.from_dict(rows, features=features), with_teacher=False)
    batch = RetrievalCollator(AutoProcessor.from_pretrained(saved), 32)(data.__getitems__(list(range(len(files)))))
    assert not batch["unreadable"]
    model = pipeline("image-feature-extraction", model=saved).model
    with torch.no_grad():
        return dict(zip(files, model(pixel_values=batch["pixel_values"]).image_embeds))


def verdict(program, path: Path, expected: torch.Tensor) -> str:
    for lines in CELLS:
        if lines == "three lines" and not Image.open(path).mode.startswith("I"):
            continue
        if torch.allclose(program(path, lines), expected, rtol=0, atol=1e-4):
            return lines
    return "differs"


def test_the_table_of_the_docs_is_what_the_programs_do(programs, files, in_training):
    rows = [["mode", *programs]]
    for mode, path in files.items():
        rows.append([mode, *(verdict(program, path, in_training[mode]) for program in programs.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    table = "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
    assert "differs" not in table, table
    assert table in DOCS, table


def test_modes_differ_and_the_turn_is_seen(in_training):
    """Else the table would hold for a model that sees nothing."""
    embeds = torch.stack(list(in_training.values()))
    distances = torch.cdist(embeds, embeds) + torch.eye(len(embeds))
    assert distances.min() > 1e-3
    upright, turned = picture(3), picture(3).rotate(-90, expand=True)
    assert np.asarray(upright).shape != np.asarray(turned).shape


def test_the_processor_refuses_no_mode(saved, files):
    processor = AutoProcessor.from_pretrained(saved)
    assert processor.image_processor.do_convert_rgb is True
    for path in files.values():
        assert processor(images=[Image.open(path)], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("where", ["README.md", "the card"])
def test_the_examples_have_the_lines_of_the_docs(where):
    code = (ROOT / where).read_text(encoding="utf-8") if where == "README.md" else usage_code("user/student")
    expected = "\n".join(docs_lines()[:2]).replace("(file)", "(PLACE)")
    assert expected in re.sub(r'\("(arrow.png|photo.jpg)"\)', "(PLACE)", code)
