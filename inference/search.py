"""Search a folder of images with a student, by text or by an image.

    python -m inference.search --model_name_or_path runs/icons --images ~/Pictures "a cup of coffee"
    python -m inference.search --model_name_or_path runs/icons --images ~/Pictures --image cup.jpg

The folder is only read. Its vectors are kept in the cache of the Hub's libraries (`HF_HOME`), so that folders one may
not write to, or that are synced, can be searched too; a later call embeds only what is new or has changed. They are
what inference.embed writes; `--index` searches such a folder that lies elsewhere, with the images or without.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from contextlib import nullcontext
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from transformers import PreTrainedTokenizerBase

from inference.dual_encoders import load_encoder
from inference.embed import updated
from inference.image_files import SUFFIXES, read_image
from inference.queries import evaluate_queries, read_queries
from inference.sources import ImageFolder, ImageRows, open_images
from inference.vectors import VectorIndex, fingerprint, read_facts
from model_cards.grid import Cell, check_replaceable, result_grid
from rows.command_line import Command, run_program
from rows.files import counted, printable
from rows.texts import cut
from teachers import Teacher


def index_folder(encoder: Teacher, folder: str | Path, cache_dir: str | Path | None = None) -> VectorIndex:
    """Brings the vectors of a folder's images in the cache up to date: embeds what is new or changed, drops what is
    gone.

    Sub-folders are searched too; links and names that start with a dot are not followed. Stopped at any moment, the
    next call goes on. Each folder and each model have vectors of their own.

    Args:
        encoder: on the device to use.
        folder: of JPEG, PNG, WebP, GIF (the first frame), BMP and TIFF files.
        cache_dir: where vectors are kept; default `HF_HOME/dsmd_indexes`.

    Raises:
        NotADirectoryError: `folder` is no folder.
        ValueError: it holds no image that can be read, or the model gives features that are not numbers.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder.")
    source, own = ImageFolder(folder), fingerprint(encoder)
    if not source.ids:
        raise ValueError(f"{folder} holds no image that can be read ({', '.join(SUFFIXES)}).")
    place = hashlib.blake2b(str(folder).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    facts = {"model": encoder.source["id"], "fingerprint": own, "width": encoder.dim, "projection": None}
    vectors = Path(cache_dir or Path(HF_HOME, "dsmd_indexes"), place, own)
    return _opened(vectors, encoder, own, source, {**facts, "source": folder.name}, replace=True)


def open_vectors(folder: Path, encoder: Teacher, name: str, images: Path | None) -> VectorIndex:
    """A folder of vectors to search; where its images are given, brought up to date with them first.

    Args:
        encoder, name: see [`VectorIndex.open`].
        images: the folder that the vectors are of; None where they are searched as they are.

    Raises:
        ValueError: see [`VectorIndex.open`] and [`inference.embed.embed`].
    """
    facts = read_facts(folder) if folder.is_dir() else None
    source, own = None if images is None else open_images(str(images)), fingerprint(encoder)
    # Vectors in a student's space need the teacher and the projection, which only their own command has.
    if source is None or facts is None or facts["projection"] is not None or facts["fingerprint"] != own:
        facts = None
    else:
        facts = {name: facts[name] for name in ("model", "fingerprint", "width", "projection", "source")}
    return _opened(folder, encoder, own, source, facts, name, as_npy=any(folder.glob("images-*.npy")))


def _opened(
    folder: Path,
    encoder: Teacher,
    own: str,
    source: ImageFolder | ImageRows | None,
    facts: dict | None,
    name: str = "",
    **settings,
) -> VectorIndex:
    """The vectors of a folder; brought up to date first unless `facts` is None. Others wait until they are read."""
    ready = nullcontext() if facts is None else updated(encoder, [source], folder, facts, wait=True, **settings)
    with ready:
        index = VectorIndex.open(folder, encoder, name, own)
    index.read = None if source is None else lambda own: source.read([own], 0)
    return index


def cut_of(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """How much of a text the student reads, in a sentence; None where it reads the whole."""
    tokens, most = len(tokenizer(cut(text), verbose=False)["input_ids"]), tokenizer.model_max_length
    return f"The text has {tokens} tokens, of which the student reads the first {most}." if tokens > most else None


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, str | Image.Image | None]:
    """The options, and the query."""
    parser = Command("inference.search", __doc__)
    parser.add_argument("query", nargs="?", help="A text to search for.")
    parser.add_argument(
        "--model_name_or_path", required=True, help="Folder or Hub id of the student, or any dual encoder."
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="Folder of the images to search.")
    parser.add_argument(
        "--index", type=Path, metavar="FOLDER", help="Vectors of inference.embed; with --images, brought up to date."
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="An image to search for, in place of a text.")
    parser.add_argument(
        "--queries",
        type=Path,
        metavar="CSV",
        help="Columns query and file: how many are answered (instead of a text).",
    )
    parser.add_argument("--k", type=int, default=10, help="How many results to show (default: %(default)s).")
    parser.add_argument("--truncate_dim", type=int, metavar="K", help="Compare the first K numbers only.")
    parser.add_argument(
        "--grid", type=Path, default="results.png", help="Picture of the results to write (default: %(default)s)."
    )
    parser.add_argument("--cache_dir", type=Path, help="Where indexes are kept (default: HF_HOME/dsmd_indexes).")
    options = parser.parse_args(arguments)
    if sum(given is not None for given in (options.query, options.image, options.queries)) != 1:
        parser.error("give a text or --image FILE, or --queries CSV, and not both")
    for name in ("k", "truncate_dim"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    if options.images is None and options.index is None:
        parser.error("give --images FOLDER, --index FOLDER, or both")
    if options.images is not None and not options.images.expanduser().is_dir():
        parser.error(f"--images {options.images} is not a folder")
    place = options.grid.resolve().parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        parser.error(f"--grid {options.grid}: {place} is no folder that can be written to")
    try:
        check_replaceable(options.grid)
    except ValueError as error:
        parser.error(f"--grid {error}")
    try:
        query = options.query if options.image is None else read_image(options.image)
    except Exception as error:  # PIL raises many types on broken files
        parser.error(f"--image {options.image} cannot be read: {error}")
    return options, query


def open_index(options: argparse.Namespace) -> VectorIndex:
    """What is searched, up to date; what was left out is printed."""
    name = options.model_name_or_path
    encoder = load_encoder(name, "cuda" if torch.cuda.is_available() else "cpu")
    if options.index is not None:
        index = open_vectors(options.index, encoder, name, options.images)
    else:
        index = index_folder(encoder, options.images, options.cache_dir)
        print(f"The index of {options.images} is kept in {index.folder}; `rm -r` it to clear it.")
    if index.skipped:
        print(f"{counted(len(index.skipped), 'file was', 'files were')} left out:")
        print("\n".join(f"  {printable(path)}: {reason}" for path, reason in index.skipped.items()))
    if options.truncate_dim is not None:
        index.truncate(options.truncate_dim)
    return index


def main(arguments: list[str] | None = None) -> None:
    options, query = parse(arguments)
    index = open_index(options)
    if options.queries is not None:
        queries = read_queries(options.queries, index.ids)
        print(evaluate_queries(index.search_text, queries, len(index)))
        return
    # sentence-transformers and open_clip have tokenizers of their own kinds, which cut in silence
    tokenizer = index.encoder.tokenizer
    if options.image is None and isinstance(tokenizer, PreTrainedTokenizerBase) and (cut := cut_of(tokenizer, query)):
        print(cut)
    search = index.search_text if options.image is None else index.search_image
    results = search(query, options.k)
    print(f"{len(results)} of {len(index):,} images:")
    print("\n".join(f"  {result.score:.3f}  {printable(result.path)}" for result in results))
    if options.images is None:
        return
    cells = [Cell(index.read_image(result), f"{result.score:.3f}  {Path(result.path).name}") for result in results]
    left_out = result_grid([query], [cells], options.grid)
    print(f"A picture of the results: {options.grid}")
    if left_out:
        print("It has no letters for all of these names and texts: numbers in it are places in this list.")


if __name__ == "__main__":
    run_program(main)
