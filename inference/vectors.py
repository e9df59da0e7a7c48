"""A folder of vectors: shards of ids and embeddings, and `index.json`, which says whose they are; what searches it.

index.json             model, fingerprint, width, ... and the shards; `complete` is false until all are written
images-00000.parquet   id, embedding (float16 [width], length 1) and, of files, size, mtime_ns and digest
images-00000.npy       in place of the column `embedding` where that was asked for: float16 [rows, width]
texts-00000.parquet    the same of texts: id, text, embedding
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import PretrainedConfig

from rows.files import write_json, write_whole
from rows.teacher_columns import rows_to_numpy
from teachers import Teacher
from trainers.teacher_pca import load_pca


INDEX = "index.json"
LOCK = ".lock"  # there while a run writes
SHARD = re.compile(r"(images|texts)-(\d{5,})\.parquet")
# Fields of configurations, at any depth, that tell where a model came from; its dtype is that of the weights.
ORIGIN = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
CHUNK = 65_536  # rows compared with a query at a time


class Result(NamedTuple):
    path: str  # an image's id: of a file its path relative to the folder
    score: float  # cosine similarity


def fingerprint(encoder: Teacher) -> str:
    """What a dual encoder's features depend on, hashed: weights, configuration, preprocessing, how texts are cut."""

    def without_origin(values: dict) -> dict:
        return {name: value for name, value in values.items() if name not in ORIGIN}

    described = {name: value for name, value in encoder.describe().items() if name not in ("id", "revision")}
    if isinstance(config := getattr(encoder.model, "config", None), PretrainedConfig):
        described["config"] = json.loads(config.to_json_string(), object_hook=without_origin)
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
    read_weights(encoder.model, digest)
    return digest.hexdigest()


def read_weights(model: torch.nn.Module, digest) -> None:
    """Lets a digest of hashlib read a model's weights, with their names, types and shapes."""
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def projection_of(student: str) -> tuple[torch.Tensor, str] | tuple[None, None]:
    """What brings a student's teacher to its space, `[D, k]`, from the student's folder, and its digest."""
    components = load_pca(student) if Path(student).is_dir() else None
    if components is None:
        return None, None
    return components, hashlib.blake2b(components.numpy().tobytes(), digest_size=16).hexdigest()


def embeddings(features: torch.Tensor, width: int, projection: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of length 1, `[N, width]`, from features `[N, D]`: projected where that is asked for, then cut."""
    features = normalize(features.float(), dim=-1)
    features = features if projection is None else features @ projection
    return normalize(features[:, :width], dim=-1)


def write_shard(file: Path, columns: dict[str, list], embeds: np.ndarray, as_npy: bool) -> None:
    """Writes a shard, whole.

    Args:
        file: ends in .parquet.
        columns: `id` and any others.
        embeds: float16 `[rows, width]`.
        as_npy: the embeddings into a .npy file beside, which is there before the shard is.
    """
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    if as_npy:
        with write_whole(file.with_suffix(".npy")) as beside, open(beside, "wb") as sink:
            np.save(sink, embeds)
    else:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(embeds).ravel()), embeds.shape[1])
        table = table.append_column("embedding", vectors)
    with write_whole(file) as beside:
        pq.write_table(table, beside)


def read_shard(file: Path) -> tuple[pa.Table, np.ndarray]:
    """A shard's other columns, and its embeddings `[rows, width]`.

    Raises:
        ValueError: it cannot be read.
    """
    with _named_if_damaged(file):
        table = pq.read_table(file)
        if "embedding" in table.column_names:
            return table.drop_columns("embedding"), rows_to_numpy(table["embedding"])
        embeds = np.load(file.with_suffix(".npy"), allow_pickle=False)
        if len(embeds) != len(table):
            raise ValueError(f"{len(embeds)} vectors for {len(table)} ids")
        return table, embeds


def read_columns(file: Path) -> pa.Table:
    """A shard's columns but for its embeddings, which are nearly all of its bytes and are not read.

    Raises:
        ValueError: it cannot be read.
    """
    with _named_if_damaged(file):
        names = [name for name in pq.read_schema(file).names if name != "embedding"]
        return pq.read_table(file, columns=names)


def rows_of(file: Path) -> int:
    """How many rows a shard has, by its end alone.

    Raises:
        ValueError: it cannot be read.
    """
    with _named_if_damaged(file):
        return pq.read_metadata(file).num_rows


@contextmanager
def _named_if_damaged(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and inference.embed makes it again.") from error


def shards_of(folder: Path, kind: str) -> list[Path]:
    """The shards that lie in a folder, in order, listed or not."""
    return sorted(path for path in folder.iterdir() if (match := SHARD.fullmatch(path.name)) and match[1] == kind)


def remove_shard(file: Path) -> None:
    file.unlink()
    file.with_suffix(".npy").unlink(missing_ok=True)


def read_facts(folder: Path) -> dict | None:
    """What `index.json` says; None where there is none.

    Raises:
        ValueError: it cannot be read, or another program wrote it.
    """
    try:
        facts = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / INDEX} cannot be read: {error}") from error
    if not isinstance(facts, dict) or not {"complete", "fingerprint", "width", "projection"} <= facts.keys():
        raise ValueError(f"{folder / INDEX} is not of inference.embed: name another folder.")
    return facts


def write_facts(folder: Path, facts: dict) -> None:
    write_json(folder / INDEX, facts)


@dataclass
class VectorIndex:
    """The images of a folder of vectors, and the dual encoder that searches them.

    Args:
        folder: where they lie.
        encoder: whose vectors they are, or a student whose teacher's they are, brought to its space.
        ids: of the N images.
        embeds: float16 `[N, width]`, of length 1.
        skipped: what was left out, id -> why.
        read: gives the image of an id, in RGB; None where the images are not at hand.
    """

    folder: Path
    encoder: Teacher
    ids: list[str]
    embeds: np.ndarray
    skipped: dict[str, str]
    read: Callable[[str], Image.Image] | None = None

    @classmethod
    def open(cls, folder: Path, encoder: Teacher, name: str, own: str | None = None) -> VectorIndex:
        """Reads a folder that `inference.embed` wrote.

        Args:
            name: what the encoder was loaded from.
            own: the encoder's [`fingerprint`], where it is known: to make it reads all weights.

        Raises:
            ValueError: there is none, it is not finished or damaged, or it is of another model.
        """
        facts = read_facts(folder)
        if facts is None:
            raise ValueError(f"{folder} has no {INDEX}: name a folder that inference.embed wrote.")
        if not facts["complete"]:
            raise ValueError(f"{folder} is not finished: the inference.embed command that began it goes on with it.")
        is_own = facts["fingerprint"] == (own or fingerprint(encoder))
        if is_own and facts["projection"] is not None:
            raise ValueError(
                f"{folder} holds vectors of {facts['model']} that were brought to a student's space: search it with "
                "that student, or embed the images without --student into another folder."
            )
        if not is_own and (facts["projection"] is None or facts["projection"] != projection_of(name)[1]):
            raise ValueError(
                f"{folder} holds vectors of {facts['model']}, and {name} has other weights or preprocessing: "
                "search it with its own model, or embed the images with this one into another folder."
            )
        if facts["width"] > encoder.dim:
            raise ValueError(
                f"{folder} holds vectors of {facts['width']} numbers, and {name} gives {encoder.dim}: embed the "
                f"images again with --truncate_dim {encoder.dim} into another folder."
            )
        ids, files = [], [folder / shard for shard in facts["shards"]["images"]]
        if (count := sum(map(rows_of, files))) != facts["images"]:
            raise ValueError(f"{folder} holds {count} images, and its {INDEX} says {facts['images']}: embed again.")
        embeds = np.empty((count, facts["width"]), np.float16)  # filled shard by shard: never twice in the memory
        for file in files:
            table, part = read_shard(file)
            if part.shape != (len(table), facts["width"]):
                raise ValueError(f"{file} holds vectors of shape {part.shape}, not ({len(table)}, {facts['width']}).")
            embeds[len(ids) : len(ids) + len(part)] = part
            ids += table["id"].to_pylist()
        return cls(folder, encoder, ids, embeds, facts["skipped"])

    def __len__(self) -> int:
        return len(self.ids)

    def read_image(self, result: Result) -> Image.Image:
        """The image of a result, in RGB."""
        return self.read(result.path)

    def truncate(self, width: int) -> None:
        """From now on the first `width` numbers are compared, of a length of 1 again.

        Raises:
            ValueError: there are not as many.
        """
        if width > self.embeds.shape[1]:
            raise ValueError(f"--truncate_dim {width}: the index has {self.embeds.shape[1]} numbers.")
        cut = self.embeds[:, :width].astype(np.float32)
        self.embeds = (cut / np.linalg.norm(cut, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float16)

    def search_text(self, query: str, k: int = 10) -> list[Result]:
        """The k images most similar to a text, best first; fewer where there are fewer."""
        return self._search(self.encoder.embed_texts([query]), k)

    def search_image(self, image: Image.Image, k: int = 10) -> list[Result]:
        """The same for an image of any mode."""
        return self._search(self.encoder.embed_images([image]), k)

    def _search(self, features: torch.Tensor, k: int) -> list[Result]:
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1.")
        query = embeddings(features, self.embeds.shape[1])[0].numpy()
        chunks = (self.embeds[start : start + CHUNK] for start in range(0, len(self), CHUNK))
        scores = np.concatenate([chunk.astype(np.float32) @ query for chunk in chunks])  # [N]
        order = np.argsort(-scores, kind="stable")[:k]
        return [Result(self.ids[i], float(scores[i])) for i in order]
