"""Tiny data, towers and processors that tests share, and the Hub they talk to. Nothing here touches the network."""

import os
import sys

import loopback_hub


# Before anything imports huggingface_hub, which reads the variables this sets once. A process that a test starts
# inherits them, and reaches the Hub of that test though it imports this module.
if "pytest" in sys.modules:
    loopback_hub.start()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would report to its makers

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import set_seed

from trainers.student import StudentArguments, build_student


DIM = 16  # width of the tiny teacher's features
WORDS = (
    "arrow circle square star heart left right up down small red blue house tree car cat dog moon sun cloud".split()
)

NAMES = ["a cat", "a dog", "a photo"]


def make_rows(count: int, seed: int = 0, dim: int = DIM) -> datasets.Dataset:
    """Rows of the contract: random images, 1 to 4 captions each, every fifth row of its neighbour's group."""
    rng = np.random.default_rng(seed)
    rows = {name: [] for name in ("image", "captions", "image_id", "group_id")}
    rows["teacher_image_embeds"], rows["teacher_text_embeds"] = [], []
    for i in range(count):
        captions = [" ".join(rng.choice(WORDS, size=rng.integers(1, 7))) + f" {i}" for _ in range(rng.integers(1, 5))]
        rows["image"].append(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
        rows["captions"].append(captions)
        rows["image_id"].append(f"{seed}/{i}")
        rows["group_id"].append(f"{seed}/{i - 1 if i % 5 == 4 else i}")
        rows["teacher_image_embeds"].append(rng.normal(size=dim).astype(np.float16))
        rows["teacher_text_embeds"].append(rng.normal(size=(len(captions), dim)).astype(np.float16))
    vector = datasets.List(datasets.Value("float16"), length=dim)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
            "group_id": datasets.Value("string"),
            "teacher_image_embeds": vector,
            "teacher_text_embeds": datasets.List(vector),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def with_names(rows: datasets.Dataset, every: int = 2, seed: int = 0) -> datasets.Dataset:
    """The rows with one of three names in place of the first caption of every so many: captions of several images."""
    rng = np.random.default_rng(seed)
    captions = [list(own) for own in rows["captions"]]
    for own in captions[::every]:
        own[0] = str(rng.choice(NAMES))
    return rows.remove_columns("captions").add_column("captions", captions, feature=rows.features["captions"])


def make_student(vision: dict | None = None, text: dict | None = None):
    """A tiny student without dropout, and its processor."""
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = vision or {"model_type": "vit", "patch_size": 16, **sizes, **no_dropout}
    text = text or {"model_type": "bert", **sizes, **no_dropout}
    arguments = StudentArguments(vision_config=vision, text_config=text, image_size=32, vocab_size=400)
    return build_student(arguments, [" ".join(WORDS)], DIM)


@pytest.fixture(scope="session")
def rows() -> datasets.Dataset:
    return make_rows(64)


@pytest.fixture(scope="session")
def validation_rows() -> datasets.Dataset:
    return make_rows(30, seed=1)


@pytest.fixture(scope="session")
def run_data(tmp_path_factory):
    """The folder that `tiny_runs.arguments` takes."""
    from tiny_runs import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def hub() -> loopback_hub.LoopbackHub:
    """The Hub that HF_ENDPOINT names, emptied."""
    hub = loopback_hub.start()
    hub.clear()
    return hub


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
