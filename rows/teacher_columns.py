"""Reading the columns that hold a teacher's features, and making them from tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import torch

from .columns import Splits, first_row


TEACHER_COLUMNS = ("teacher_image_embeds", "teacher_text_embeds")
TEACHER_SCALES = ("teacher_image_scale", "teacher_text_scale")  # only with int8 features: a factor each


def teacher_columns(names: list[str]) -> list[str]:
    """The names of a dataset's columns that hold a teacher's features."""
    return [name for name in (*TEACHER_COLUMNS, *TEACHER_SCALES) if name in names]


def rows_to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The innermost values of a (nested) list column of equal widths, as an array `[rows, D]` of their dtype.

    A null has no row. Of a column without any value D is what its type says, or 0.
    """
    values, rows = _innermost(column)
    return values.reshape(rows, -1 if rows else _width_of(column.type))


def _width_of(kind: pa.DataType) -> int:
    """The length of a list type's innermost lists; 0 where it says none."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return kind.list_size if pa.types.is_fixed_size_list(kind) else 0


def _innermost(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, int]:
    """The values of a (nested) list column as one flat array, and the number of its innermost lists."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.drop_null()
    rows = len(array)
    while (
        pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type)
    ):
        rows = len(array)
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False), rows


def teacher_features(table: pa.Table, name: str) -> np.ndarray:
    """Raw teacher features `[rows, D]` of one of TEACHER_COLUMNS, float16 or, if stored as int8, float32.

    A row without an image or without captions has none.

    Raises:
        ValueError: int8 features without the column of their scales.
    """
    features = rows_to_numpy(table[name])
    if features.dtype != np.int8:
        return features
    scale = TEACHER_SCALES[TEACHER_COLUMNS.index(name)]
    if scale not in table.column_names:
        raise ValueError(f"{name} is int8, and there is no {scale} to multiply it by.")
    return features * _innermost(table[scale])[0].astype(np.float32)[:, None]


def teacher_tensors(table: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw teacher features of a table's images `[N, D]` and captions `[C, D]`, float32, of what there is."""
    return tuple(torch.from_numpy(teacher_features(table, name).astype(np.float32)) for name in TEACHER_COLUMNS)


def feature_columns(
    image: torch.Tensor,
    text: torch.Tensor,
    counts: np.ndarray,
    image_ids: list[str],
    int8: bool = False,
    has_image: np.ndarray | None = None,
) -> dict[str, tuple[pa.Array, object]]:
    """Features as columns of the row contract: name -> (values, `datasets` feature).

    Args:
        image: `[N, D]`, of the rows that have an image.
        text: `[C, D]`, the captions of the R rows one after another.
        counts: `[R]`, the number of captions of each row.
        image_ids: `[R]`, for the error message.
        int8: store int8, with one float16 scale for each feature, instead of float16.
        has_image: `[R]` bool, the rows that have an image; None: all.

    Raises:
        ValueError: a feature is NaN, infinite or zero in the type in which it is stored.
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    columns: dict[str, tuple[pa.Array, object]] = {}
    has_image = np.ones(len(counts), bool) if has_image is None else has_image
    row_of = {"image": np.flatnonzero(has_image), "text": np.repeat(np.arange(len(counts)), counts)}
    for name, scale_name, features in zip(TEACHER_COLUMNS, TEACHER_SCALES, (image, text)):
        kind = "image" if features is image else "text"
        values, scale = quantize(features) if int8 else (features.half(), None)
        good = torch.isfinite(features.half()).all(1) & (values != 0).any(1)
        bad = np.flatnonzero(~good.numpy())
        if len(bad):
            names = list(dict.fromkeys(repr(image_ids[row_of[kind][i]]) for i in bad))
            more = ", ..." if len(names) > 10 else ""
            raise ValueError(
                f"{len(bad)} {kind} features are NaN, infinite or zero as stored, of image_id "
                f"{', '.join(names[:10])}{more}."
            )
        vector = datasets.List(datasets.Value("int8" if int8 else "float16"), length=features.shape[1])
        array = pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), features.shape[1])
        columns[name] = _by_row(array, vector, offsets, kind, has_image)
        if scale is not None:
            scales = pa.array(scale.numpy())
            columns[scale_name] = _by_row(scales, datasets.Value("float16"), offsets, kind, has_image)
    return columns


def dataset_of(columns: dict[str, tuple[pa.Array, object]]) -> datasets.Dataset:
    """A dataset in memory of columns as [`feature_columns`] gives them: name -> (values, `datasets` feature)."""
    features = datasets.Features({name: feature for name, (_, feature) in columns.items()})
    table = pa.table({name: array for name, (array, _) in columns.items()}).cast(features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _by_row(array: pa.Array, feature, offsets: pa.Array, kind: str, has_image: np.ndarray) -> tuple[pa.Array, object]:
    """The values of images, null for a row without one; those of captions as lists, one for each row."""
    if kind == "image":
        if not has_image.all():
            array = array.take(pa.array(np.cumsum(has_image) - 1, mask=~has_image))
        return array, feature
    return pa.ListArray.from_arrays(offsets, array), datasets.List(feature)


def quantize(embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows `[N, D]` and their float16 scales `[N]`; their product is about the embeds."""
    scale = (embeds.abs().amax(dim=1) / 127).clamp(min=1e-6).half()
    return (embeds / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def teacher_rows(dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's raw features of a split's images `[N, D]` and captions `[C, D]`, float32."""
    return teacher_tensors(dataset.select_columns(teacher_columns(dataset.column_names)).with_format("arrow")[:])


def teacher_batches(part: datasets.Dataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The teacher's raw features of a split's images `[n, D]` and captions `[m, D]`, float32, 5,000 rows at a time."""
    for table in part.select_columns(teacher_columns(part.column_names)).with_format("arrow").iter(5000):
        yield teacher_tensors(table)


def teacher_width(rows: Splits) -> int | None:
    """Width D of the stored teacher features; None if there are none."""
    row = first_row(rows, list(TEACHER_COLUMNS))
    return None if row is None else len(row["teacher_image_embeds"] or row["teacher_text_embeds"][0])


def teacher_description(rows: Splits) -> dict | None:
    """What the constant column `teacher` says of the teacher; None where the column is missing."""
    row = first_row(rows, ["teacher"])
    return None if row is None else json.loads(row["teacher"])
