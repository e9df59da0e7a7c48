"""Tables of text in the shapes that programs write them; pandas and csv are the references."""

import csv
import gzip
import io
import json

import pandas
import pytest

from datasets_scripts import source_files
from datasets_scripts.source_files import read_text_table, suffix_of


ROWS = [{"path": "a b.jpg", "caption": 'a "red", big; thing | no\ttab'}, {"path": "ü.jpg", "caption": "two\nlines"}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_csv_of_pandas_is_read_back(tmp_path, delimiter, encoding, line_end, packed, capsys):
    text = pandas.DataFrame(ROWS).to_csv(index=False, sep=delimiter, lineterminator=line_end)
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if packed else data)
    found = read_text_table(path, None, None)
    expected = [{name: cell for name, cell in row.items()} for row in ROWS]
    assert [{name: cell.replace("\r\n", "\n") for name, cell in row.items()} for row in found] == expected
    assert ("separated by" in capsys.readouterr().out) == (delimiter != ",")
    assert suffix_of(path) == ".csv"


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz"])
def test_json_of_pandas_is_read_back(tmp_path, name):
    pandas.DataFrame(ROWS).to_json(tmp_path / name, orient="records", lines=".json" != name[1:])
    assert read_text_table(tmp_path / name, None, None) == ROWS


def test_an_encoding_is_given_or_named_in_the_error(tmp_path):
    (tmp_path / "a.csv").write_bytes("path,caption\na.jpg,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match="a.csv is not UTF-8 .*--encoding latin-1"):
        read_text_table(tmp_path / "a.csv", None, None)
    assert read_text_table(tmp_path / "a.csv", "latin-1", None) == [{"path": "a.jpg", "caption": "café"}]
    with pytest.raises(ValueError, match="a.csv is not ascii"):
        read_text_table(tmp_path / "a.csv", "ascii", None)
    with pytest.raises(ValueError, match="--encoding latin1x: Python knows no encoding"):
        read_text_table(tmp_path / "a.csv", "latin1x", None)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("path , caption\na.jpg,x\n", [("a.jpg", "x")]),  # a header with spaces
        ("path,caption\na.jpg\nb.jpg,x\n", [("a.jpg", ""), ("b.jpg", "x")]),  # a missing last cell
        ('path,caption\na.jpg,5" pipe\nb.jpg,"x"\n', [("a.jpg", '5" pipe'), ("b.jpg", "x")]),  # csv reads this itself
        ('path,caption\na.jpg,"never closed\nb.jpg,x\n', [("a.jpg", '"never closed'), ("b.jpg", "x")]),
        ("path,caption\n\na.jpg,x\n\n", [("a.jpg", "x")]),
        ("path,caption\na.jpg," + "x" * 200_000 + "\n", [("a.jpg", "x" * 200_000)]),
    ],
)
def test_cells_as_people_have_them(tmp_path, text, rows):
    (tmp_path / "a.csv").write_text(text)
    expected = [{"path": path, "caption": caption} for path, caption in rows]
    assert read_text_table(tmp_path / "a.csv", None, None) == expected


def test_a_delimiter_is_found_in_the_header_alone_unless_given(tmp_path):
    (tmp_path / "a.csv").write_text("path,caption\na.jpg,x;y;z\n")
    assert read_text_table(tmp_path / "a.csv", None, None)[0]["caption"] == "x;y;z"
    (tmp_path / "b.txt").write_text("path#caption\na.jpg#x,y\n")
    assert read_text_table(tmp_path / "b.txt", None, "#") == [{"path": "a.jpg", "caption": "x,y"}]


def test_flickrs_results_with_its_broken_line(tmp_path, capsys):
    """Line 19,999 of the published file lacks a separator, before a number and several blanks."""
    lines = ["image_name| comment_number| comment", "1.jpg| 0| A dog , runs .", "1.jpg| 4   A dog runs ."]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    rows = read_text_table(tmp_path / "results.csv", None, None)
    assert rows == [
        {"image_name": "1.jpg", "comment_number": "0", "comment": "A dog , runs ."},
        {"image_name": "1.jpg", "comment_number": "4", "comment": "A dog runs ."},
    ]
    assert "results.csv, line 3: a separator is missing" in capsys.readouterr().out


def test_flickrs_token_files(tmp_path):
    (tmp_path / "a.token").write_text("1.jpg#0\tA dog .\n1.jpg#1\tTwo, dogs .\n\n586949ec62.jpg.1#0\tA cat\n")
    assert read_text_table(tmp_path / "a.token", None, None) == [
        {"image": "1.jpg", "caption": "A dog ."},
        {"image": "1.jpg", "caption": "Two, dogs ."},
        {"image": "586949ec62.jpg.1", "caption": "A cat"},
    ]
    (tmp_path / "a.token").write_text("1.jpg#0\tA dog .\nno tab\n")
    with pytest.raises(ValueError, match="a.token, line 2: expected name.jpg#0, a tab and a caption, got 'no tab'"):
        read_text_table(tmp_path / "a.token", None, None)


def test_json_of_the_benchmarks(tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}],
        "annotations": [{"id": 1, "image_id": 8, "caption": "x"}, {"id": 2, "image_id": 8, "caption": "y"}],
    }
    karpathy = {"images": [{"filepath": "val2014", "filename": "8.jpg", "sentences": [{"raw": "x"}], "split": "val"}]}
    named = {"8.jpg": ["x", "y"], "7.jpg": "z"}
    path = tmp_path / "a.json"
    for content, rows in (
        (coco, [{"file_name": "8.jpg", "caption": "x"}, {"file_name": "8.jpg", "caption": "y"}]),
        (karpathy, [{"filename": "val2014/8.jpg", "sentences": [{"raw": "x"}], "split": "val"}]),
        (named, [{"image": "8.jpg", "captions": ["x", "y"]}, {"image": "7.jpg", "captions": "z"}]),
        ({"info": "of it", "rows": ROWS}, ROWS),
    ):
        path.write_text(json.dumps(content))
        assert read_text_table(path, None, None) == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1, 2]", "a.json is none of the forms known"),
        ("a.json", "{}", "a.json is none of the forms known"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.json", "[" * 100_000, "a.json is not JSON"),
        ("a.json", '{"annotations": [{"image_id": 1}], "images": []}', "expected COCO's captions.*1"),
        ("a.jsonl", '{"a": 1}\n[]', r"a.jsonl, line 2: expected an object, got '\[\]'"),
        ("a.csv", "path,caption\na.jpg,one, two\n", "line 2: 3 cells under the 2 columns path, caption; .*quoted"),
    ],
)
def test_what_cannot_be_read_ends_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_text_table(tmp_path / name, None, None)


def test_unpacking_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "LARGEST_TABLE", 1000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"path,caption\n" + b"a" * 1_000_000))
    with pytest.raises(ValueError, match="a.csv.gz has more than 1,000 bytes, unpacked"):
        read_text_table(tmp_path / "a.csv.gz", None, None)


def test_csv_module_reads_the_same(tmp_path):
    """Where nothing is unusual, Python's own reader is the reference."""
    text = 'path,caption,n\n"a,1.jpg","say ""x""",1\nb.jpg,"two\nlines",2\n'
    (tmp_path / "a.csv").write_text(text)
    assert read_text_table(tmp_path / "a.csv", None, None) == list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_list_of_images_without_a_header(tmp_path, delimiter, capsys):
    (tmp_path / "a.txt").write_text(f"1.jpg{delimiter}a cat\n2.JPG{delimiter}a dog\n")
    found = read_text_table(tmp_path / "a.txt", None, None)
    assert found == [{"image": "1.jpg", "caption": "a cat"}, {"image": "2.JPG", "caption": "a dog"}]
    assert "the first line is no header" in capsys.readouterr().out


def test_spaces_after_a_separator(tmp_path):
    (tmp_path / "a.csv").write_text('image, caption\n1.jpg, "a cat, big"\n2.jpg,  a dog\n')
    assert read_text_table(tmp_path / "a.csv", None, None) == [
        {"image": "1.jpg", "caption": "a cat, big"},
        {"image": "2.jpg", "caption": "a dog"},
    ]


@pytest.mark.parametrize(("name", "text"), [("a.csv", ""), ("a.csv", "image,caption\n"), ("a.jsonl", "\n")])
def test_a_table_without_rows_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} has no rows"):
        read_text_table(tmp_path / name, None, None)
