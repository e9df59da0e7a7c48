"""Thirty images with captions that break a careless reader, in a folder, and what builds a dataset of them."""

import json
import os
from pathlib import Path

import datasets
from image_files import encoded, picture

from datasets_scripts import own_data
from rows.checks import check_dataset


COUNT = 30
# Ragged, with what breaks a careless reader.
CAPTIONS = [
    [f"caption {i}", 'he said "hi", twice', "ü 猫 🐈", "NA", "1.0"][: 1 + i % 5] + ([f"last\nof {i}"] if i % 2 else [])
    for i in range(COUNT)
]
EXPECTED = [[caption.replace("\n", " ") for caption in captions] for captions in CAPTIONS]


def name_of(i: int) -> str:
    return f"photos/image {i}.{('jpg', 'png', 'webp')[i % 3]}"


def file_of(i: int) -> bytes:
    return encoded(picture(i, "L" if i % 7 == 6 else "RGB"), ("JPEG", "PNG", "WEBP")[i % 3])


def write_images(folder: Path, name=name_of) -> None:
    for i in range(COUNT):
        (folder / name(i)).parent.mkdir(parents=True, exist_ok=True)
        (folder / name(i)).write_bytes(file_of(i))


def build(source, output: Path, *options: str) -> datasets.DatasetDict:
    before = set(os.listdir(output.parent))
    own_data.main(["--dataset_name", str(source), "--output_dir", str(output), *options])
    # Nothing else is left, of caches neither.
    assert set(os.listdir(output.parent)) - before == {output.name}
    built = datasets.load_from_disk(output)
    for split, part in built.items():
        check_dataset(part, split, None)
    return built


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sample(i: int, key: str, description: str = "json") -> list[tuple[str, bytes]]:
    """Files of one sample, as `tar --sort=name` would order them."""
    image = (f"{key}.{('jpg', 'png', 'webp')[i % 3]}", file_of(i))
    if description == "txt":
        return [image, (f"{key}.txt", EXPECTED[i][0].encode())]
    captions = CAPTIONS[i] if description == "json" else CAPTIONS[i][0]
    field = "captions" if description == "json" else "caption"
    return sorted([image, (f"{key}.json", json.dumps({field: captions, "image": "x", "width": 3}).encode())])


def simple(folder: Path, rows: list[dict], name="metadata.jsonl") -> Path:
    write_images(folder)
    jsonl(folder / name, rows)
    return folder
