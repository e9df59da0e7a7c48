"""A tiny teacher as a folder, and its features made by the command or by the function behind it."""

from pathlib import Path

import torch
from conftest import make_student

from datasets_scripts import add_teacher_features as script
from datasets_scripts import feature_job
from datasets_scripts.feature_shards import Encoding


def save_teacher(folder: Path, seed: int) -> Path:
    """A tiny dual encoder, as a folder. DSMDModel is one of the models that load_teacher knows."""
    model, processor = make_student()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def arguments(source, teacher, output, *more) -> list[str]:
    sizes = ["--shard_rows", "5", "--batch_size", "4", "--num_workers", "0"]
    return [
        "--dataset_name",
        str(source),
        "--teacher_model_name_or_path",
        str(teacher),
        "--output_dir",
        str(output),
        *sizes,
        *map(str, more),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Counting:
    """A teacher that counts what it encodes, and can be told what to answer."""

    def __init__(self, teacher, change=lambda features: features):
        self.teacher, self.change = teacher, change
        self.encoded = {"image": 0, "text": 0}

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def image_features(self, prepared):
        features = self.teacher.image_features(prepared)
        self.encoded["image"] += len(features)
        return self.change(features)

    def text_features(self, prepared):
        features = self.teacher.text_features(prepared)
        self.encoded["text"] += len(features)
        return features


def add(rows, teachers, folder, encoding=None):
    encoding = encoding or Encoding(weights=[1 / len(teachers)] * len(teachers), batch_size=4)
    identity = script.identity_of(rows, "rows", ["x"] * len(teachers))
    feature_job.make_teacher_features(rows, teachers, identity, folder, encoding, "rows", num_workers=0)
