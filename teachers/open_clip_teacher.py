"""Teachers of open_clip: a folder or repository with `open_clip_config.json` and its weights as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image

from rows.images import to_rgb
from rows.texts import cut

from .teacher import Teacher


HUB_PREFIX = "hf-hub:"  # open_clip's own way to say that a repository of the Hub is one of its own
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # open_clip takes these before others
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class OpenClipTeacher(Teacher):
    """A teacher whose features are those of open_clip's `encode_image` and `encode_text`, not normalised.

    Images go through open_clip's transform of the repository, texts through its tokenizer, which gives every text the
    same length.
    """

    def _init_inputs(self) -> None:
        self.prompt = None

    def _fix_padding(self) -> int:
        return self.text_features(self.prepare_texts(["a"])).shape[1]

    def prepare_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack([self.image_processor(to_rgb(image)) for image in images])}

    def prepare_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokenizer([cut(text) for text in texts])}

    def _forward(self, modality: str, inputs: dict) -> torch.Tensor:
        if modality == "image":
            return self.model.encode_image(inputs["pixel_values"], normalize=False)
        return self.model.encode_text(inputs["input_ids"], normalize=False)

    def describe(self) -> dict:
        described = super().describe()
        image = {**self.model.visual.preprocess_cfg, "transparent": "white"}
        described["preprocessing"]["image"] = json.loads(json.dumps(image))
        return described


def is_open_clip(find: Callable[[str], str | None]) -> bool:
    """Whether a model has open_clip's config, and none of transformers' that would say what it is.

    Args:
        find: from the name of a file to its path; None where the model has no such file.
    """
    if find(CONFIG) is None:
        return False
    config = find("config.json")  # timm and Apple have some too, without a `model_type`
    return config is None or "model_type" not in _read(Path(config))


def load_open_clip(
    model_id: str,
    revision: str | None,
    source: dict,
    dtype: torch.dtype,
    device: str | torch.device,
    trust_remote_code: bool,
) -> OpenClipTeacher:
    """Loads a model of open_clip as a teacher.

    Args:
        model_id: a folder, or a Hub id without a prefix.
        revision: branch, tag or commit on the Hub.
        source: `id` and `revision`, for the teacher's description.
        dtype: of all weights.
        device: where the teacher runs.
        trust_remote_code: let the tokenizer's repository run code of its own.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: there is no config or no safetensors file, or the weights are not exactly the model's.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f'{model_id} is a model of open_clip: pip install -e ".[open-clip]"') from error
    folder = Path(model_id)
    if not folder.is_dir():
        patterns = [*WEIGHTS, "*.json", "*.txt", "*.model"]  # of the tokenizer: vocabularies, merges, sentencepiece
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{model_id} has no {CONFIG}, so it is no model of open_clip: leave {HUB_PREFIX} out.")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(
            f"{model_id} has no {WEIGHTS[0]}, and weights of another form are not read: docs/guides/teachers.md has "
            "the line that writes this file."
        )
    config = _read(folder / CONFIG).get("model_cfg")
    text = config.get("text_cfg") if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"{CONFIG} of {model_id} has no model_cfg with a text_cfg: it is no config of open_clip.")
    try:
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokenizer = _load_tokenizer(folder, text, trust_remote_code)
    except OSError:  # of the Hub, or of the disk
        raise
    except Exception as error:  # what it raises on a config or weights that do not fit has no common type
        reason = " ".join(str(error).split())[:600]
        raise ValueError(
            f"{model_id} cannot be loaded by open_clip {open_clip.__version__}: {type(error).__name__}: {reason}"
        ) from error
    settings = {"max_length": tokenizer.context_length, "padding": "max_length"}
    return OpenClipTeacher(model.to(dtype), transform, tokenizer, settings, source, dtype, device)


def _load_tokenizer(folder: Path, text: dict, trust_remote_code: bool):
    """The tokenizer that the config names; a repository that holds its own files is read, and not the one it names."""
    from open_clip.factory import get_tokenizer
    from open_clip.tokenizer import HFTokenizer

    name = text.get("hf_tokenizer_name")
    if not name:
        return get_tokenizer(f"local-dir:{folder}")
    own = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return HFTokenizer(
        os.fspath(folder) if own else name,
        context_length=text.get("context_length", 77),
        tokenizer_mode=text.get("tokenizer_mode"),
        # Last: a config must not be able to ask for the running of code.
        **{**(text.get("tokenizer_kwargs") or {}), "trust_remote_code": trust_remote_code},
    )


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}: expected a config.")
    return content
