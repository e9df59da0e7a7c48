"""Writes a static site that searches pictures with a student in the browser, by text, by a picture or by example.

    python -m inference.web --model_name_or_path runs/icons --images ~/Pictures --output_dir site --serve
    python -m inference.web --model_name_or_path runs/icons --dataset_name icons --output_dir site --serve

The folder holds all that it needs, the runtime too, and asks no other host. Any host of static files serves it; with
`--push_to_hub` it is a static Space. Thumbnails and, unless `--labels none`, names or captions are in it.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from datasets_scripts.building import refuse_what_is_there
from inference import web_open, web_runtime
from inference.student import push_folder
from inference.web_check import compare_with_python
from inference.web_files import Thumbnails, add_sizes, space_readme, write_index
from inference.web_page import copy_page, write_worker
from inference.web_pictures import Pictures, pictures_of_dataset, pictures_of_folder
from inference.web_student import WebStudent, check_size, load_web_student, write_student
from rows.command_line import Command, run_program
from rows.files import counted, printable, write_beside


NEEDED = ("onnx", "onnxscript", "onnxruntime")
EXAMPLES = 4  # captions that the page proposes
SHOWN = 5  # pictures left out that are named


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("inference.web", __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of the student.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="FOLDER", help="Folder of the pictures to search.")
    source.add_argument("--dataset_name", help="'icons', a folder or a Hub id of a dataset whose pictures to search.")
    parser.add_argument("--split", default="test", help="Split of the dataset (default: %(default)s).")
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the site.")
    parser.add_argument(
        "--labels", choices=("names", "captions", "none"),
        help="What stands below a picture and so is published: its file's name, its first caption, or nothing "
        "(default: names for a folder, captions for a dataset).",
    )  # fmt: skip
    parser.add_argument("--title", default="Image search", help="The page's title (default: %(default)s).")
    parser.add_argument(
        "--notice", type=Path, metavar="FILE",
        help="Text file of licences and attributions that the page shows, one a line. Those of the icons are known.",
    )  # fmt: skip
    parser.add_argument("--thumbnail_size", type=int, default=128, help="Side in pixels (default: %(default)s).")
    parser.add_argument("--push_to_hub", metavar="REPO", help="Also push the folder to this Hub repository, a Space.")
    parser.add_flag("--serve", "Then show the site in this machine's browser.")
    options = parser.parse_args(arguments)
    refuse_what_is_there(parser, options.output_dir)
    if options.images is not None and not options.images.expanduser().is_dir():
        parser.error(f"--images {options.images} is not a folder")
    if options.images is not None and options.labels == "captions":
        parser.error("--labels captions goes with --dataset_name: a folder has none")
    if options.notice is not None and not options.notice.is_file():
        parser.error(f"--notice {options.notice} is not a file")
    if not 16 <= options.thumbnail_size <= 512:
        parser.error(f"--thumbnail_size {options.thumbnail_size}: expected 16 to 512 pixels")
    for program in ("npm", "node"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed: it fetches and tries the runtime; get Node.js")
    return options


def write_site(student: WebStudent, pictures: Pictures, folder: Path, title: str, thumbnail_size: int) -> None:
    """Writes a site into a folder that exists and is empty.

    Args:
        student: see [`load_web_student`].
        pictures: what to search; those that cannot be read are named in its `left_out`.
        title: of the page.
        thumbnail_size: side of a thumbnail in pixels, at most.

    Raises:
        ValueError: no picture can be read; the student is too large for a phone; its tokenizer, its operators or its
            image processor are of a kind that the page cannot run.
        OSError: the runtime cannot be fetched.
    """
    data = folder / "data"
    data.mkdir()
    copy_page(folder)
    web_runtime.add_runtime(folder)
    tile = min(thumbnail_size, max(map(max, pictures.first_sizes())))
    thumbnails = Thumbnails(data, tile)
    with tempfile.TemporaryDirectory() as scratch:
        towers, embeds = write_student(student, pictures, thumbnails, Path(scratch), data)
    thumbnails.close()
    write_index(embeds, data / "index.bin")
    (data / "labels.json").write_text(json.dumps(pictures.labels, ensure_ascii=False), encoding="utf-8")
    about = {
        "title": title,
        "student": {"name": student.name, "parameters": student.parameters, **towers},
        "image": student.image_settings,
        "index": {"rows": len(embeds), "dim": embeds.shape[1]},
        "thumbnails": {"tile": tile, "columns": thumbnails.columns, "sheets": thumbnails.names},
        "examples": pictures.examples(EXAMPLES),
        "notices": pictures.notices,
    }
    (data / "site.json").write_text(json.dumps(add_sizes(folder, about), indent=1), encoding="utf-8")
    if pictures.notices:
        (folder / "NOTICE").write_text("\n".join(pictures.notices) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(space_readme(title, student.hub_id), encoding="utf-8")
    write_worker(folder, thumbnails.names)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f'error: {", ".join(missing)} is not installed: pip install -e ".[onnx]"')
    folder = options.output_dir
    try:
        notices = options.notice.read_text(encoding="utf-8").splitlines() if options.notice else []
        if options.images is not None:
            pictures = pictures_of_folder(options.images.expanduser(), options.labels or "names", notices)
        else:
            pictures = pictures_of_dataset(options.dataset_name, options.split, options.labels or "captions", notices)
        student = load_web_student(options.model_name_or_path)
        check_size(student.parameters)
        with write_beside(folder.resolve()) as beside:
            write_site(student, pictures, beside, options.title, options.thumbnail_size)
            compare_with_python(beside, pictures)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    if pictures.left_out:
        print(f"{counted(len(pictures.left_out), 'picture was', 'pictures were')} left out:")
        print("\n".join(f"  {printable(name)}: {why}" for name, why in list(pictures.left_out.items())[:SHOWN]))
    about = json.loads((folder / "data" / "site.json").read_text(encoding="utf-8"))
    print(
        f"{folder}: {about['index']['rows']:,} pictures; a visitor loads {about['bytes']['first'] / 1e6:.1f} MB first "
        f"(of which {about['runtime']['bytes'] / 1e6:.1f} MB are the runtime) and "
        f"{about['bytes']['later'] / 1e6:.1f} MB later"
    )
    if options.push_to_hub:
        push_folder(folder, options.push_to_hub, "Site", repo_type="space")
    if options.serve:
        web_open.serve(folder, web_open.PORT, opens=True)
    else:
        print(f"See it: python -m inference.web_open {folder}")


if __name__ == "__main__":
    run_program(main)
