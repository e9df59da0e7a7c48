"""Run by torchrun in trainers/test_row_checks on 2 processes: what each of them is told of the same rows."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch.distributed as dist
from conftest import DIM, make_rows

from rows import checks
from trainers.row_checks import check_together
from trainers.run import distributed


BROKEN = {"bytes": b"no image", "path": None}
# Changes of rows of 24, which are checked in five tables: those from row 10 on by the second process.
CASES = {
    "first half": {3: {"captions": ["a", "  "]}},
    "second half": {20: {"captions": ["a", "  "]}},
    "both halves": {3: {"image_id": ""}, 20: {"captions": None}},
    "feature before caption": {7: {"teacher_image_embeds": [0.0] * DIM}, 18: {"captions": None}},
    "repeat across halves": {22: {"image_id": "0/2"}},
    "repeat and bad row": {4: {"image_id": "0/2"}, 23: {"captions": None}},
    "image": {21: {"image": BROKEN}},
    "images of both": {2: {"image": BROKEN}, 21: {"image": BROKEN}},
    "repeat and image": {0: {"image": BROKEN}, 22: {"image_id": "0/2"}},
}
SMALL = {"one row": 1, "two tables and a row": 11}  # shares of none, and uneven ones


def changed(changes: dict[int, dict]) -> datasets.Dataset:
    rows = make_rows(24).cast_column("image", datasets.Image(decode=False))
    rows = [{**row, **changes.get(i, {})} for i, row in enumerate(rows)]
    return datasets.Dataset.from_list(rows, features=make_rows(1).features)


def told(work) -> list[str]:
    try:
        return ["", str(work())]
    except Exception as error:
        return [type(error).__name__, str(error)]


def failing(rank: int, error: Exception):
    def work():
        if distributed.rank() == rank:
            raise error
        return "done"

    return work


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    checks.ROWS_AT_ONCE = 5
    read, check_rows = [], checks.check_rows

    def counted(table, *more):
        read.extend(table["image_id"].to_pylist())
        return check_rows(table, *more)

    checks.check_rows = counted
    found = {name: told(lambda of=of: check_together(changed(of), "train", DIM)) for name, of in CASES.items()}
    found |= {name: told(lambda of=of: check_together(make_rows(of), "train", DIM)) for name, of in SMALL.items()}
    read.clear()
    found["good"] = told(lambda: check_together(make_rows(24, seed=1), "train", DIM))
    found["read"] = list(read)
    read.clear()
    found["again"] = told(lambda: check_together(make_rows(24, seed=1), "train", DIM))
    found["read again"] = list(read)
    found["type error"] = told(lambda: distributed.agree(failing(1, TypeError("ä bug"))))
    found["disk"] = told(lambda: distributed.agree(failing(0, FileNotFoundError(2, "gone", "x.arrow"))))
    found["no error"] = told(lambda: distributed.agree(failing(5, ValueError("never"))))
    own = np.arange(3 * distributed.rank(), dtype=np.int64) - (1 << 62)
    found["arrays"] = [part.tolist() for part in distributed.gather_arrays(own)]
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    distributed.run_launched(lambda: main(Path(sys.argv[1])))
