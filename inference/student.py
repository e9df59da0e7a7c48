"""A student to export: loaded from a folder or the Hub, and pushed as what it became."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    VisionTextDualEncoderProcessor,
)

import modeling_dsmd  # noqa: F401  AutoModel then knows the student without running code of its repository


class Student(NamedTuple):
    model: PreTrainedModel  # in float32, in evaluation mode, on the CPU
    processor: VisionTextDualEncoderProcessor  # the image processor is of the PIL backend
    name: str  # of a folder its last part
    hub_id: str | None


def load_student(name: str) -> Student:
    """A student of a folder or of the Hub.

    Raises:
        OSError, ValueError, pickle.UnpicklingError: there is none.
    """
    model = AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False).eval()
    processor = VisionTextDualEncoderProcessor(
        AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False),
        AutoTokenizer.from_pretrained(name, trust_remote_code=False),
    )
    shown, hub_id = (Path(name).resolve().name, None) if Path(name).is_dir() else (name, name)
    return Student(model, processor, shown, hub_id)


def push_folder(folder: Path, repo: str, message: str, repo_type: str = "model") -> None:
    """Pushes a folder to a repository of the Hub, which is made where it is missing; a Space is a static one.

    Raises:
        SystemExit: it cannot be pushed; with the command that completes it.
    """
    space = {"space_sdk": "static"} if repo_type == "space" else {}
    try:
        HfApi().create_repo(repo, repo_type=repo_type, exist_ok=True, **space)
        commit = HfApi().upload_folder(repo_id=repo, repo_type=repo_type, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, ValueError) as error:
        command = f"hf upload {repo} {folder} ." + (f" --repo-type {repo_type}" if space else "")
        sys.exit(f"error: {folder} is written and not pushed: {error}\nThis completes it: {command}")
    print(f"Pushed: {commit.repo_url}")
