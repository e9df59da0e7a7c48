"""Tables of text - csv, its kin and JSON - as people have them, read as dicts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

from datasets_scripts.source_rows import IMAGE_SUFFIXES


TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".json", ".jsonl", ".ndjson")
LARGEST_TABLE = 4 << 30  # bytes, unpacked
LONGEST_CELL = 1 << 24  # characters; csv's own limit is 131,072
DELIMITERS = ",;\t|"
TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")  # of Flickr's .token files: name.jpg#0, a tab, the caption
RUN_TOGETHER = re.compile(r"\s*(\d+)\s{2,}(\S.*)")  # a comment's number and text, on a broken line of Flickr30k's csv


def suffix_of(file: Path) -> str:
    """The ending that says what a file is: `.csv` of `a.csv.gz` too."""
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def read_text_table(file: Path, encoding: str | None, delimiter: str | None) -> list[dict]:
    """Rows of a csv, tsv, txt, token, json, jsonl or ndjson file, packed by gzip or not.

    Encoding and separator are found by looking, unless they are given; what is unusual is printed.

    Raises:
        ValueError: it is not of that form, with the line; it is not of that encoding, or too large.
    """
    rows = _rows_of(text_of(file, encoding), file, delimiter)
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _rows_of(text: str, file: Path, delimiter: str | None) -> list[dict]:
    suffix = suffix_of(file)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(text, file)
    if suffix == ".json":
        return _json_rows(text, file)
    first = text.split("\n", 1)[0]
    if TOKEN_LINE.fullmatch(first.rstrip("\r")):
        return _token_rows(text, file)
    usual = "\t" if suffix == ".tsv" else ","
    if delimiter is None:
        delimiter = max([usual, *DELIMITERS], key=first.count)
        if delimiter != usual:
            print(f"{file.name}: cells are separated by {delimiter!r}")
    return _csv_rows(text, file, delimiter)


def text_of(file: Path, encoding: str | None) -> str:
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
        data = stream.read(LARGEST_TABLE + 1)
    if len(data) > LARGEST_TABLE:
        raise ValueError(f"{file} has more than {LARGEST_TABLE:,} bytes, unpacked: split it into several")
    marks = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
    if encoding is None:
        encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except LookupError:
        raise ValueError(f"--encoding {encoding}: Python knows no encoding of this name") from None
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-8"):
            hint = "save it as that, or name its encoding, such as --encoding latin-1"
            raise ValueError(f"{file} is not UTF-8 ({error}): {hint}") from None
        raise ValueError(f"{file} is not {encoding} ({error})") from None


def _json_lines(text: str, file: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: expected an object, got {line[:80]!r}")
        rows.append(row)
    return rows


def _json_rows(text: str, file: Path) -> list[dict]:
    """Rows of one JSON value: COCO's captions, Karpathy's images, a list of objects, or names with their captions."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return _coco_rows(content, file)
    if isinstance(content, dict):
        lists = [value for value in content.values() if _is_list_of_objects(value)]
        if len(lists) == 1:
            content = lists[0]
        elif content and all(isinstance(value, (str, list)) for value in content.values()):
            content = [{"image": name, "captions": captions} for name, captions in content.items()]
    if not _is_list_of_objects(content):
        raise ValueError(
            f"{file} is none of the forms known: COCO's captions (images, annotations), a list of objects, "
            '{"a.jpg": ["a caption"]}'
        )
    for row in content:  # Karpathy's
        if isinstance(row.get("filepath"), str) and isinstance(row.get("filename"), str):
            row["filename"] = f"{row.pop('filepath')}/{row['filename']}"
    return content


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _coco_rows(content: dict, file: Path) -> list[dict]:
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [
            {"file_name": names[entry["image_id"]], "caption": entry["caption"]} for entry in content["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected COCO's captions, images of id and file_name, annotations of image_id and caption; "
            f"{error!r} is missing or of another type"
        ) from None


def _token_rows(text: str, file: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = TOKEN_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{file}, line {number}: expected name.jpg#0, a tab and a caption, got {line[:80]!r}")
        rows.append({"image": match[1], "caption": match[2]})
    return rows


def _csv_rows(text: str, file: Path, delimiter: str) -> list[dict]:
    try:
        return _parse_csv(text, file, delimiter, csv.QUOTE_MINIMAL)
    except ValueError:
        try:
            rows = _parse_csv(text, file, delimiter, csv.QUOTE_NONE)
        except ValueError:
            rows = []
        if not rows:
            raise
    print(f"{file.name}: a quote stands alone: quotes are taken for characters like any other")
    return rows


def _parse_csv(text: str, file: Path, delimiter: str, quoting: int) -> list[dict]:
    csv.field_size_limit(LONGEST_CELL)
    # Without `strict`, a quote that is not closed would swallow the rest of the file as one caption.
    settings = {"delimiter": delimiter, "quoting": quoting, "strict": True, "skipinitialspace": True}
    reader = csv.reader(io.StringIO(text, newline=""), **settings)
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = []
        if len(header) == 2 and Path(header[0]).suffix.lower() in IMAGE_SUFFIXES:
            print(f"{file.name}: the first line is no header: images, and their captions")
            rows, header = [dict(zip(("image", "caption"), header))], ["image", "caption"]
        for cells in reader:
            if not cells:
                continue
            if len(cells) == len(header) - 1:
                cells = _with_last_cell(cells, file, reader.line_num)
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under the {len(header)} columns {', '.join(header)}")
            rows.append(dict(zip(header, map(str.strip, cells) if delimiter == "|" else cells)))
    except (csv.Error, ValueError) as error:
        hint = "cells with a separator, a quote or a newline must be quoted"
        raise ValueError(f"{file}, line {reader.line_num}: {error}; {hint}") from None
    return rows


def _with_last_cell(cells: list[str], file: Path, line: int) -> list[str]:
    """Cells of a line that has one too few: the last is empty, or has run into the one before, as on line 19,999 of
    Flickr30k's results.csv."""
    match = RUN_TOGETHER.fullmatch(cells[-1])
    if match is None:
        return [*cells, ""]
    print(f"{file.name}, line {line}: a separator is missing, put back between {match[1]!r} and the text after it")
    return [*cells[:-1], match[1], match[2]]
