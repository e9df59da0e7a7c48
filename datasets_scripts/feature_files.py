"""Files of features that any program may have written: a matrix, and the id that each of its rows belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from rows.files import named
from rows.teacher_columns import rows_to_numpy


KEYS = ("image_id", "caption")
FORMS = (".npy", ".safetensors", ".parquet")
ROWS_AT_ONCE = 10_000


@dataclass
class Features:
    """Rows of features `[N, D]`, float16 or wider, which may lie in several files.

    Args:
        parts: arrays `[n, D]` whose rows follow one another; those of `.npy` files stay on disk.
    """

    parts: list[np.ndarray]

    def __post_init__(self):
        self.starts = np.cumsum([0, *map(len, self.parts)])

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """The rows of these numbers, `[n, D]` float32."""
        taken = np.empty((len(rows), self.width), np.float32)
        part_of = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(part_of):
            own = part_of == i
            taken[own] = self.parts[i][rows[own] - self.starts[i]]
        return torch.from_numpy(taken)


def read_features(paths: Sequence[Path], keys: Sequence[str]) -> tuple[Features, str, list[str]]:
    """Features of one kind, images' or captions', and what each row belongs to.

    A `.npy` or `.safetensors` file holds one matrix, and beside it lies a `.json` file of the same name with the ids
    in the order of its rows: `{"image_id": [...]}` or `{"caption": [...]}`. A `.parquet` file has a column `image_id`
    or `caption`, and one column of lists of floats.

    Args:
        paths: one file or several, keyed alike and of one width.
        keys: of `KEYS`, those that may be meant, the one to be preferred first.

    Returns:
        The features, the key, and the ids `[N]`.

    Raises:
        ValueError: a file cannot be read, or is not such a file; a feature is NaN, infinite or zero.
    """
    parts, found, ids = [], None, []
    for path in paths:
        if path.suffix not in FORMS:
            raise ValueError(f"{path}: expected a file of features that ends in {', '.join(FORMS)}.")
        key, own, features = _read_parquet(path, keys) if path.suffix == ".parquet" else _read_matrix(path, keys)
        if found not in (None, key):
            raise ValueError(f"{path} is keyed by {key}, and {paths[0]} by {found}: give files that are keyed alike.")
        if parts and features.shape[1] != parts[0].shape[1]:
            raise ValueError(f"{path} is {features.shape[1]} wide, and {paths[0]} {parts[0].shape[1]}.")
        check_features(path, key, own, features)
        found = key
        parts.append(features)
        ids += own
    return Features(parts), found, ids


def read_tensor(path: Path) -> np.ndarray:
    """The one tensor `[rows, D]` in a file of `torch.save`, in float32.

    Raises:
        ValueError: it holds anything else; a pickle that would run code is not read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on broken bytes has no common type
        raise ValueError(
            f"{path} was not read: it is missing, damaged or a pickle of more than tensors, which can run any code. "
            "Expected one tensor saved by torch.save."
        ) from error
    if isinstance(content, (list, tuple)) and content and all(isinstance(part, torch.Tensor) for part in content):
        content = torch.cat([part if part.ndim == 2 else part[None] for part in content])
    if not isinstance(content, torch.Tensor) or content.ndim != 2 or not content.is_floating_point():
        found = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise ValueError(f"{path} holds {found}: expected one tensor of features, [captions, width].")
    return content.float().numpy()


def _read_matrix(path: Path, keys: Sequence[str]) -> tuple[str, list[str], np.ndarray]:
    features = _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not features.size:
        raise ValueError(
            f"{path} holds {features.dtype} {list(features.shape)}: expected features as floats, [rows, width]."
        )
    beside = path.with_suffix(".json")
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f'{path} has no ids: write them to {beside.name} beside it, as {{"{keys[0]}": [...]}} in the order of its '
            "rows."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{beside} cannot be read: {error}") from error
    key = next((key for key in keys if isinstance(content, dict) and key in content), None)
    if key is None:
        raise ValueError(f'{beside}: expected ids as {{"{keys[0]}": [...]}} in the order of the rows of {path.name}.')
    return key, _as_ids(beside, key, content[key], len(features)), features


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # what numpy raises on broken bytes has no common type
        raise ValueError(f"{path} cannot be read as an array of numpy: {error}") from error


def _read_safetensors(path: Path) -> np.ndarray:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise ValueError(f"{path} holds {len(names)} tensors ({named(names)}): expected one, [rows, width].")
            tensor = file.get_tensor(names[0])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16


def _read_parquet(path: Path, keys: Sequence[str]) -> tuple[str, list[str], np.ndarray]:
    try:
        schema = pq.read_schema(path)
        key = next((key for key in keys if key in schema.names), None)
        lists = [field.name for field in schema if _is_list_of_floats(field.type)]
        if key is None or len(lists) != 1:
            raise ValueError(
                f"{path} has the columns {named(schema.names)}: expected {' or '.join(keys)}, and one column of lists "
                "of floats."
            )
        table = pq.read_table(path, columns=[key, lists[0]])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    ids = _as_ids(path, key, table[key].to_pylist(), len(table))
    widths = pa.compute.list_value_length(table[lists[0]]).fill_null(0).to_numpy()
    if not len(widths) or widths.min() != widths.max() or not widths[0]:
        found = f"lists of {widths.min()} to {widths.max()} numbers" if len(widths) else "no rows"
        raise ValueError(f"{path}, column {lists[0]}: expected lists of one length, found {found}.")
    if table[lists[0]].combine_chunks().flatten().null_count:
        raise ValueError(f"{path}, column {lists[0]}: a number is missing.")
    return key, ids, rows_to_numpy(table[lists[0]])


def _is_list_of_floats(kind: pa.DataType) -> bool:
    of_lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in of_lists) and pa.types.is_floating(kind.value_type)


def _as_ids(path: Path, key: str, ids: object, count: int) -> list[str]:
    if not isinstance(ids, list) or len(ids) != count:
        found = len(ids) if isinstance(ids, list) else type(ids).__name__
        raise ValueError(f"{path}: {found} under {key!r} for {count} rows of features, expected one a row.")
    wrong = next((value for value in ids if not isinstance(value, str)), None)
    if None in ids or wrong is not None:
        raise ValueError(f"{path}: {wrong!r} under {key!r} is no string: write ids as the dataset has them.")
    return ids


def check_features(path: Path, key: str, ids: Sequence[str], features: np.ndarray) -> None:
    """Refuses features `[N, D]` that are NaN, infinite or zero in float16, the type in which they are stored.

    Raises:
        ValueError: naming the file and the first such feature's id, of the N.
    """
    for start in range(0, len(features), ROWS_AT_ONCE):
        with np.errstate(over="ignore"):
            rows = np.asarray(features[start : start + ROWS_AT_ONCE], np.float16)
        bad = np.flatnonzero(~np.isfinite(rows).all(1) | (rows == 0).all(1))
        if len(bad):
            raise ValueError(
                f"{path}: the feature of {key} {ids[start + bad[0]]!r} is NaN, infinite or zero in float16: make it "
                "again."
            )
