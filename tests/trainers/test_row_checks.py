"""Rows are checked by all ranks together as by one, and once."""

import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest
import row_checks_worker
from conftest import DIM, make_rows
from launching import launch
from row_checks_worker import CASES, SMALL, changed

import rows as rows_package
from rows import checks
from trainers.row_checks import check_together


# The fault that one process finds first: in tables of five rows, then among repeated ids, then in images.
FIRST = {
    "first half": "Row 3 .*empty caption",
    "second half": "Row 20 .*empty caption",
    "both halves": "Row 3 .*image_id must be a string",
    "feature before caption": "Row 7 .*zero",
    "repeat across halves": "Row 22 .*row 2 has this image_id",
    "repeat and bad row": "Row 23 .*has captions None: expected a list",
    "image": "Row 21 .*image",
    "images of both": "Row 2 .*image",
    "repeat and image": "Row 22 .*row 2 has this image_id",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each of two processes was told."""
    folder = tmp_path_factory.mktemp("processes")
    launch(2, row_checks_worker.__file__, folder, HF_DATASETS_CACHE=str(folder / "c"))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The image_ids of rows as they are checked and decoded."""
    seen, check_rows, load_rgb = [], checks.check_rows, checks.load_rgb

    def counted(table, *more):
        seen.extend(table["image_id"].to_pylist())
        return check_rows(table, *more)

    monkeypatch.setattr(checks, "check_rows", counted)
    monkeypatch.setattr(checks, "load_rgb", lambda image: [seen.append("image"), load_rgb(image)])
    return seen


@pytest.mark.parametrize("case", CASES)
def test_two_processes_raise_the_error_of_one(launched, case, monkeypatch):
    monkeypatch.setattr(checks, "ROWS_AT_ONCE", 5)
    with pytest.raises(ValueError, match=FIRST[case]) as alone:
        check_together(changed(CASES[case]), "train", DIM)
    for found in launched:
        assert found[case] == ["ValueError", str(alone.value)]


def test_two_processes_share_the_rows_and_read_them_once(launched):
    for found in launched:
        assert all(found[name] == ["", "None"] for name in ("good", "again", *SMALL))
        assert found["read again"] == []
    first, second = (found["read"] for found in launched)
    assert first + second == make_rows(24, seed=1)["image_id"] and len(first) == 10


def test_ranks_agree_on_any_error(launched):
    for rank, found in enumerate(launched):
        assert found["type error"] == [("RuntimeError", "TypeError")[rank], "ä bug"]
        kind, message = found["disk"]
        assert kind == ("FileNotFoundError", "OSError")[rank] and "gone" in message and "x.arrow" in message
        assert found["no error"] == ["", "done"]
        assert found["arrays"] == [[], [-(1 << 62) + i for i in range(3)]]


def test_a_second_start_reads_no_row(tmp_path, read):
    make_rows(12).save_to_disk(tmp_path / "data")
    for expected in (24, 0):
        read.clear()
        check_together(datasets.load_from_disk(tmp_path / "data"), "train", DIM)
        assert len(read) == expected


def test_what_differs_is_checked_again(tmp_path, read, monkeypatch):
    rows = make_rows(12)
    check_together(rows, "train", DIM)
    for other, split, teacher_dim in (
        (make_rows(12, seed=3), "train", DIM),
        (rows.select(range(11)), "train", DIM),
        (rows, "train", None),
        (rows, "validation", None),
    ):
        read.clear()
        check_together(other, split, teacher_dim)
        assert read
    with pytest.raises(ValueError, match="Row 3 .*empty caption"):
        check_together(changed(CASES["first half"]), "train", DIM)
    read.clear()
    check_together(rows, "train", DIM)
    assert not read
    shutil.copytree(Path(rows_package.__file__).parent, tmp_path / "rows")
    with open(tmp_path / "rows" / "checks.py", "a") as code:
        code.write("# another check\n")
    monkeypatch.setattr(rows_package, "__file__", str(tmp_path / "rows" / "__init__.py"))
    check_together(rows, "train", DIM)
    assert read


def test_a_bad_row_is_found_at_each_start(cache):
    for _ in range(2):
        with pytest.raises(ValueError, match="Row 3 "):
            check_together(changed(CASES["first half"]), "train", DIM)
    assert not list(cache.rglob("*"))


def test_a_file_that_was_replaced_is_checked_though_the_fingerprint_is_the_same(tmp_path):
    make_rows(24).save_to_disk(tmp_path / "data")
    good = datasets.load_from_disk(tmp_path / "data")
    check_together(good, "train", DIM)
    changed(CASES["second half"]).save_to_disk(tmp_path / "bad")
    name = "data-00000-of-00001.arrow"
    os.replace(tmp_path / "bad" / name, tmp_path / "data" / name)
    replaced = datasets.load_from_disk(tmp_path / "data")
    assert replaced._fingerprint == good._fingerprint
    with pytest.raises(ValueError, match="Row 20 "):
        check_together(replaced, "train", DIM)


def test_a_cache_that_cannot_be_written_to_stops_nothing(cache, read):
    cache.write_text("a file")
    for _ in range(2):
        read.clear()
        check_together(make_rows(5), "train", DIM)
        assert read
    assert cache.read_text() == "a file"


def test_what_is_not_to_be_remembered_leaves_nothing(cache, read):
    check_together(make_rows(5), "train", DIM, remember=False)
    assert read and not cache.exists()
    assert re.fullmatch("[0-9a-f]{32}", stamp_of(cache).name)


def stamp_of(cache: Path) -> Path:
    check_together(make_rows(5), "train", DIM)
    (stamp,) = (cache / "dsmd_checked").iterdir()
    assert json.loads(stamp.read_text()) == {"rows": 5, "split": "train", "teacher_dim": DIM}
    return stamp
