"""Texts without images, such as a log of queries, as rows of their own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from datasets_scripts.arrow_files import Row, fold
from datasets_scripts.opening import readable
from datasets_scripts.source_files import TEXT_SUFFIXES, read_text_table, suffix_of, text_of
from datasets_scripts.source_rows import CAPTION_NAMES, OTHER_CAPTION_NAMES, captions_of


def text_rows(
    source: str, column: str | None, encoding: str | None, delimiter: str | None, cache: Path, known: set[str]
) -> list[Row]:
    """A row for each different text of a source.

    Args:
        source: a .txt file, a text a line; a csv, tsv, json, jsonl or parquet file; a folder of `save_to_disk` or of
            parquet files; or a Hub id.
        column: holds the texts; None: found by the usual names of captions.
        encoding, delimiter: of a file of text; None: found by looking.
        cache: a folder for what `datasets` reads.
        known: captions that images have: their texts need no row.

    Raises:
        ValueError: there is no text, it cannot be read, or the column is missing or may be one of several.
        FileNotFoundError: nothing is there.
    """
    texts: dict[str, None] = {}
    for text in _texts(source, column, encoding, delimiter, cache):
        if folded := fold(text):
            texts[folded] = None
    if not texts:
        raise ValueError(f"--texts {source} has no text: expected one line or row, or more.")
    new = [text for text in texts if text not in known]
    print(f"{len(texts):,} different texts in {Path(source).name}, {len(texts) - len(new):,} of them captions already")
    return [Row(f"text/{_digest(text).hex()}", [text], None, pixels=_digest(text)) for text in new]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(f"text:{text}".encode(errors="surrogatepass"), digest_size=16).digest()


def _texts(source: str, column: str | None, encoding: str | None, delimiter: str | None, cache: Path) -> Iterator[str]:
    path = Path(source)
    if path.is_file() and suffix_of(path) == ".txt" and column is None:
        yield from text_of(path, encoding).splitlines()
        return
    if path.is_file() and suffix_of(path) in TEXT_SUFFIXES:
        rows: list[dict] = read_text_table(path, encoding, delimiter)
        column = _column(list(dict.fromkeys(name for row in rows for name in row)), column, source)
        for row in rows:
            yield from captions_of(row.get(column), column)
        return
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) and suffix_of(path) not in (".txt", *TEXT_SUFFIXES)
    if path.exists() or is_id:
        with readable(source):
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(source)
            elif path.is_file():
                loaded = datasets.Dataset.from_parquet(source, cache_dir=str(cache))
            else:
                loaded = datasets.load_dataset(source, cache_dir=str(cache))
        for part in [loaded] if isinstance(loaded, datasets.Dataset) else loaded.values():
            own = _column(part.column_names, column, source)
            for table in part.select_columns([own]).with_format("arrow").iter(1000):
                for cell in table[own].to_pylist():
                    yield from captions_of(cell, own)
        return
    raise FileNotFoundError(
        f"--texts {source}: there is no such file or folder, and it is no Hub id such as name/data"
    )


def _column(names: list[str], given: str | None, source: str) -> str:
    if given is not None and given in names:
        return given
    found = [name for usual in (CAPTION_NAMES, OTHER_CAPTION_NAMES, ["query", "queries"]) for name in names
             if name.lower() in usual]  # fmt: skip
    if given is None and (len(found) == 1 or len(names) == 1):
        return (found or names)[0]
    problem = f"no column {given}" if given is not None else "several columns or none that may hold texts"
    raise ValueError(f"--texts {source} has {problem}; it has {', '.join(names)}. Name one with --text_column")
