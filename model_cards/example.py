"""Keeps the card of a finished run as the example: python -m model_cards.example runs/icons"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image


EXAMPLE = Path(__file__).with_name("example")


def main(run: Path) -> None:
    """Replaces the folder `model_cards/example` by a run's card, its record, and its pictures in 64 colours.

    Args:
        run: the run's folder.

    Raises:
        SystemExit: the folder has no card of a finished run.
    """
    if not (run / "assets" / "card.json").is_file():
        sys.exit(f"error: {run} has no assets/card.json: name the folder of a run that train.py has finished.")
    shutil.rmtree(EXAMPLE, ignore_errors=True)
    (EXAMPLE / "assets").mkdir(parents=True)
    for name in ("README.md", "assets/card.json"):
        shutil.copy(run / name, EXAMPLE / name)
    for picture in sorted((run / "assets").glob("*.png")):
        Image.open(picture).convert("RGB").quantize(64).save(EXAMPLE / "assets" / picture.name, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {__doc__.split(': ')[1]}")
    main(Path(sys.argv[1]))
