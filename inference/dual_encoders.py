"""Any dual encoder that is there, ours or not, by one interface: what is compared and what writes vectors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from inference.encoders import encode_by_onnx
from inference.onnx_files import TOWERS, WEIGHTS
from rows.texts import cut
from teachers import Teacher, load_teacher
from trainers.run.loader_workers import name_killed_workers, shielded


Read = Callable[[int], Image.Image | str]


def load_encoder(name: str, device: str | torch.device = "cpu") -> Teacher:
    """A dual encoder of transformers (a student of ours among them), sentence-transformers or open_clip.

    Args:
        name: a folder or a Hub id; `hf-hub:` before an id says that it is of open_clip.
        device: where it runs; the weights are float32.

    Raises:
        ValueError: it cannot be loaded, or is no dual encoder; in one sentence that names it.
    """
    try:
        return load_teacher(name, device=device)
    except (OSError, ValueError, RuntimeError, ImportError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        if "is no dual encoder" not in reason:
            reason = f"{name} is no dual encoder that can be read: {reason}"
        raise ValueError(reason) from error


class OnnxEncoder:
    """A folder that `inference.export` wrote, by the interface of [`Teacher`], run by onnxruntime.

    Args:
        folder: see [`is_export`].
        ending: of `inference.onnx_files.WEIGHTS`; a tower that has no such file runs in float32.
        threads: of onnxruntime; 0: one for each core.

    Raises:
        ValueError: onnxruntime is not installed, or a file cannot be read by what runs it; in one sentence.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, ending: str = "", threads: int = 0):
        if find_spec("onnxruntime") is None:
            raise ValueError(f'{folder} is run by onnxruntime, which is not installed: pip install -e ".[onnx]".')
        self.settings = _read(folder / "preprocessor_config.json", _json)
        self.tokenizer = _read(folder / "tokenizer.json", lambda file: Tokenizer.from_file(str(file)))
        own = [folder / "onnx" / f"{tower}{ending}.onnx" for tower in TOWERS]
        plain = [folder / "onnx" / f"{tower}.onnx" for tower in TOWERS]
        self.files = [file if file.is_file() else instead for file, instead in zip(own, plain)]
        self.text, self.vision = (_read(file, partial(encode_by_onnx, threads=threads)) for file in self.files)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "vision": None, "text": None}

    def prepare_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        from inference.onnx_search import pixels

        return {"pixel_values": torch.from_numpy(np.concatenate([pixels(image, self.settings) for image in images]))}

    def prepare_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        ids = [self.tokenizer.encode(cut(text)).ids for text in texts]
        longest = max(map(len, ids))
        padded = [own + [0] * (longest - len(own)) for own in ids]
        mask = [[1] * len(own) + [0] * (longest - len(own)) for own in ids]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    def image_features(self, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._run(self.vision, prepared)

    def text_features(self, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._run(self.text, prepared)

    @staticmethod
    def _run(encode, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        (embeds,) = encode({name: value.numpy() for name, value in prepared.items()}).values()
        return torch.from_numpy(embeds).float()


def _read(file: Path, read: Callable[[Path], Any]):
    try:
        return read(file)
    except Exception as error:  # onnxruntime and tokenizers have types of their own, or none
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{file} cannot be read: {reason}. Export the student again.") from error


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def is_export(folder: Path) -> bool:
    """Whether a folder is one that `inference.export` wrote: its ONNX files take what its `onnx_search.py` makes."""
    files = [f"onnx/{tower}.onnx" for tower in TOWERS]
    needed = ("preprocessor_config.json", "tokenizer.json", "onnx_search.py", *files)
    return all((folder / name).is_file() for name in needed)


def export_runtimes(folder: Path) -> dict[str, str]:
    """Each way that an export runs, such as "onnx int8", and the ending of its files."""
    return {
        f"onnx {weights}": ending
        for ending, weights in WEIGHTS.items()
        if any((folder / "onnx" / f"{tower}{ending}.onnx").is_file() for tower in TOWERS)
    }


class _Preparation(torch.utils.data.Dataset):
    """What a loader's worker does with a batch before the model: reads, decodes, tokenises."""

    def __init__(self, encoder: Teacher | OnnxEncoder, kind: str, read: Read):
        self.encoder, self.kind, self.read = encoder, kind, read

    def __getitems__(self, batch: list[int]) -> tuple[list[int], dict | None, dict[int, str]]:
        contents, own, unreadable = [], [], {}
        for i in batch:
            try:
                content = self.read(i)
                contents.append(content)
                own.append(i)
            except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
                unreadable[i] = str(error) or type(error).__name__
        prepare = self.encoder.prepare_images if self.kind == "image" else self.encoder.prepare_texts
        return own, prepare(contents) if contents else None, unreadable


def encode(
    encoder: Teacher | OnnxEncoder,
    kind: str,
    read: Read,
    batches: Sequence[Sequence[int]],
    num_workers: int = 0,
) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
    """Features of images or texts, batch by batch.

    Args:
        encoder: it only embeds.
        kind: "image" or "text".
        read: gives an item by its number, an image in RGB; what it raises leaves the item out.
        batches: the items' numbers.
        num_workers: processes that read and prepare.

    Yields:
        The numbers of a batch's items, their features, not normalised, float32 on the CPU `[n, D]`, and by number why
        items were left out.

    Raises:
        ValueError: features are NaN, infinite or zero.
    """
    loader = DataLoader(
        _Preparation(encoder, kind, read),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
    )
    run = encoder.image_features if kind == "image" else encoder.text_features
    with name_killed_workers():
        for own, prepared, unreadable in shielded(loader):
            features = torch.empty(0, 0) if prepared is None else run(prepared).cpu()
            if prepared is not None and not (torch.isfinite(features).all(1) & (features != 0).any(1)).all():
                raise ValueError(f"The model gives features of {kind}s that are NaN, infinite or zero.")
            yield own, features, unreadable


def _as_it_is(batch):
    return batch
