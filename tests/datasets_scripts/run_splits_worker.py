"""Run by torchrun in test_run_splits on 2 processes: what each of them reads of a streamed split, and what it gets."""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from datasets_scripts import run_splits
from trainers.run import distributed


def main(name: str, broken: str, folder: Path) -> None:
    state = PartialState(cpu=True)
    read, load_rgb = [], run_splits.load_rgb

    def counted(image):
        read.append(1)
        return load_rgb(image)

    run_splits.load_rgb = counted
    names = {"train": "train", "validation": "validation", "test": "test"}
    rows = run_splits.open_splits(name, None, True, names, None, True)["validation"]
    found = {"read": len(read), "ids": rows["image_id"][:], "sizes": [image.size for image in rows["image"]]}
    try:
        run_splits.open_splits(broken, None, True, names, None, True)
    except ValueError as error:
        found["error"] = str(error)
    (folder / f"{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()  # the first one's files go with it


if __name__ == "__main__":
    distributed.run_launched(lambda: main(*sys.argv[1:3], Path(sys.argv[3])))
