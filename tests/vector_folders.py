"""Folders of vectors that inference.embed wrote, and what should be in them."""

from pathlib import Path

import numpy as np

from inference import embed, search
from inference.vectors import read_shard, shards_of
from teachers import load_teacher


COUNT = 11


def run(model, images, output, *more):
    settings = ["--shard_rows", "4", "--batch_size", "3"]
    names = ["--model_name_or_path", str(model), "--images", str(images), "--output_dir", str(output)]
    embed.main([*names, *settings, *map(str, more)])


def contents(folder: Path, kind: str = "images") -> dict[str, np.ndarray]:
    found = {}
    for file in shards_of(folder, kind):
        table, embeds = read_shard(file)
        ids = table["id"].to_pylist()
        assert not set(ids) & found.keys() and len(set(ids)) == len(ids) == len(embeds) <= 4
        found |= dict(zip(ids, embeds))
    return found


def expected(model, contents: dict, kind: str = "image") -> dict[str, np.ndarray]:
    teacher = load_teacher(str(model))
    features = {own: getattr(teacher, f"embed_{kind}s")([content])[0].numpy() for own, content in contents.items()}
    return {own: row / np.linalg.norm(row) for own, row in features.items()}


def of_folder(folder: Path) -> dict:
    return {str(path.relative_to(folder)): search.read_image(path) for path in folder.rglob("*.png")}


def assert_close(found: dict, right: dict) -> None:
    assert found.keys() == right.keys()
    for own, row in right.items():
        np.testing.assert_allclose(found[own].astype(np.float32), row, atol=1e-3)
