"""Teacher features at a smaller width: the projection that keeps their dot products best."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rows.files import write_whole
from rows.teacher_columns import teacher_width


PCA_FILE = "teacher_pca.safetensors"


def fit_pca(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Principal components of the teacher's normalised features; all images together weigh as much as all captions.

    Not centred: a retrieval score is a dot product, and the projection on the leading eigenvectors of the second
    moment keeps dot products best among linear maps of that width. One matrix serves both modalities.

    Args:
        batches: raw features of images `[n, D]` and of captions `[m, D]`, n and m of any size.

    Returns:
        `[D, D]` float32, orthonormal columns, the most important first: `features @ components[:, :k]` are features
        of width k.

    Raises:
        ValueError: there are no features, neither of images nor of captions.
    """
    moments: list[torch.Tensor | int] = [0, 0]
    counts = [0, 0]
    for batch in batches:
        for kind, features in enumerate(batch):
            if not len(features):
                continue
            rows = torch.nn.functional.normalize(features.double(), dim=1)
            moments[kind] = moments[kind] + rows.T @ rows
            counts[kind] += len(rows)
    if max(counts) == 0:
        raise ValueError("PCA needs features of images or of captions, and there are none of either.")
    _, vectors = torch.linalg.eigh(sum(moment / count for moment, count in zip(moments, counts) if count))
    vectors = vectors.flip(1)
    # An eigenvector's sign is arbitrary: fix it, so that the same features give the same projection.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return (vectors * signs).float().contiguous()


def save_pca(components: torch.Tensor, folder: str | os.PathLike) -> None:
    """Writes components `[D, k]` to `teacher_pca.safetensors` in a folder."""
    path = Path(folder) / PCA_FILE
    with write_whole(path) as beside:
        save_file({"components": components.contiguous().cpu()}, beside)


def load_pca(folder: str | os.PathLike) -> torch.Tensor | None:
    """The components `[D, k]` that a folder holds; None where it holds none.

    Raises:
        ValueError: the file is there and cannot be read.
    """
    path = Path(folder) / PCA_FILE
    if not path.is_file():
        return None
    try:
        return load_file(path)["components"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the projection is fitted again.") from error


def stored_pca(name: str | os.PathLike, repo_type: str = "model") -> torch.Tensor | None:
    """The components `[D, k]` that a folder or a repository of the Hub holds; None where it holds none.

    Args:
        name: a folder, or a Hub id.
        repo_type: of a Hub id: "model" or "dataset".

    Raises:
        ValueError, OSError: the file is there and cannot be read.
    """
    if Path(name).is_dir():
        return load_pca(name)
    try:
        return load_pca(os.path.dirname(hf_hub_download(str(name), PCA_FILE, repo_type=repo_type)))
    except EntryNotFoundError:
        return None


def projection_of_student(name: str | os.PathLike, projection_dim: int, width: int | None) -> torch.Tensor | None:
    """What a saved student brings to project its teacher's features with, `[D, projection_dim]`; None for nothing.

    None too where the features in hand are as wide as the student and its matrix is not square: it learned from a
    wider teacher before, and this one's features need no projection. A square one is its rotation.

    Args:
        name: folder or Hub id of the student.
        projection_dim: the student's width.
        width: of the features in hand; None where there are none.

    Raises:
        ValueError, OSError: see [`stored_pca`].
    """
    components = stored_pca(name)
    if components is not None and width == projection_dim and len(components) != width:
        return None
    return components


def width_in_hand(train, evaluated) -> int | None:
    """The width of the teacher's features that a trainer is given: its training rows', or those that it evaluates."""
    parts = [train, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]
    given = [part for part in parts if part is not None]
    return teacher_width({"first": given[0]}) if given else None
