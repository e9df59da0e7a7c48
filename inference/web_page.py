"""The page of a site, and what makes a site of stored data without it; needs nothing but Python and, once, npm.

python -m inference.web_page demo build/demo
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

from inference.web_runtime import add_runtime
from rows.command_line import Command, run_program


PAGE = Path(__file__).with_name("site")  # the page itself, which is copied as it is
UNSEEN = ("README.md", "NOTICE", "runtime/LICENSE", "sw.js")  # files that the page does not load
OFFLINE = 20_000_000  # bytes of thumbnails that are kept offline unseen, at most


def copy_page(folder: Path) -> None:
    for path in PAGE.iterdir():
        shutil.copyfile(path, folder / path.name)


def write_worker(folder: Path, sheets: list[str]) -> None:
    """Puts into `sw.js`, which keeps the site offline, the list of its files and a name of their state.

    Args:
        sheets: names of the files of thumbnails; where they are large, only those that are seen are kept.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = sorted(name for name in names if name not in UNSEEN)
    state = hashlib.sha256()
    for name in names:
        state.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    sheets = [f"data/{name}" for name in sheets]
    if sum((folder / name).stat().st_size for name in sheets) > OFFLINE:
        names = [name for name in names if name not in sheets]
    constants = (
        f'const VERSION = "{state.hexdigest()[:16]}";\nconst FILES = {json.dumps(["./", *names], indent=1)};\n\n'
    )
    worker = (PAGE / "sw.js").read_text(encoding="utf-8")
    (folder / "sw.js").write_text(constants + worker, encoding="utf-8")


def complete(stored: Path, site: Path) -> None:
    """Makes a site of a stored one that has no page and no runtime. An earlier one in `site` is written over.

    Args:
        stored: `data`, `README.md` and `NOTICE` as `inference.web` wrote them.

    Raises:
        OSError, ValueError: the runtime cannot be fetched, see [`add_runtime`].
    """
    shutil.copytree(stored, site, dirs_exist_ok=True)
    copy_page(site)
    add_runtime(site)
    about = json.loads((site / "data" / "site.json").read_text(encoding="utf-8"))
    write_worker(site, about["thumbnails"]["sheets"])


def main(arguments: list[str] | None = None) -> None:
    parser = Command("inference.web_page", __doc__)
    parser.add_argument("stored", type=Path, help="Folder of a site's data.")
    parser.add_argument("site", type=Path, help="Folder of the site to write.")
    options = parser.parse_args(arguments)
    if not (options.stored / "data" / "site.json").is_file():
        sys.exit(f"error: {options.stored} has no data/site.json: it is no site's data")
    if options.site.is_dir() and any(options.site.iterdir()) and not (options.site / "data" / "site.json").is_file():
        sys.exit(f"error: {options.site} holds something else than a site: name another folder")
    complete(options.stored, options.site)


if __name__ == "__main__":
    run_program(main)
