"""Writes the vectors of images, and of texts, with ids: resumable, on any number of processes, of any dual encoder.

    python -m inference.embed --model_name_or_path runs/icons --images ~/Pictures --output_dir vectors
    accelerate launch -m inference.embed --model_name_or_path openai/clip-vit-base-patch32 --images data/mine \\
        --texts queries.txt --output_dir vectors

Images are a folder of files, or a dataset as train.py takes it (a folder, tars, a Hub id). Stopped at any moment, the
same command goes on; run again it embeds what is new or has changed and drops what is gone.
`inference.search --index vectors` searches what it wrote; docs/guides/search.md has other engines.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from datasets_scripts.feature_job import default_workers
from inference.dual_encoders import encode, load_encoder
from inference.sources import ImageFolder, ImageRows, TextLines, open_images
from inference.vectors import (
    INDEX,
    LOCK,
    SHARD,
    embeddings,
    fingerprint,
    projection_of,
    read_columns,
    read_facts,
    read_shard,
    remove_shard,
    rows_of,
    shards_of,
    write_facts,
    write_shard,
)
from rows.command_line import Command, run_program
from rows.files import counted, named, printable, shown_name
from teachers import Teacher
from trainers.run.distributed import agree, run_launched, use_the_cores
from trainers.run.locking import alone


SHARD_ROWS = 4096  # what a killed process loses, at most
SHOWN = 10  # of the images that could not be read


@contextmanager
def updated(
    encoder: Teacher,
    sources: Sequence[ImageFolder | ImageRows | TextLines],
    output: Path,
    facts: dict,
    wait: bool = False,
    **settings,
) -> Iterator[dict]:
    """Brings the vectors of sources up to date, on every process, and keeps other runs from the folder until the end.

    Args:
        encoder, settings: see [`embed`].
        sources: what there is now; images among them.
        output: the folder; made where it is missing.
        facts: see [`embed`].
        wait: for another run at work on the folder, in place of an error.

    Yields:
        What `index.json` says; on the first process alone.

    Raises:
        ValueError: another process is at work on the folder; see [`embed`] and [`finish`].
    """
    state, skipped = PartialState(), {}
    with ExitStack() as held:
        # The others hear of a refusal, and do not wait.
        agree(lambda: held.enter_context(_held(output, wait)) if state.is_main_process else None)
        for source in sources:
            found = embed(encoder, source, output, facts, **settings)
            skipped |= {} if isinstance(source, TextLines) else found
        yield finish(output, facts, skipped) if state.is_main_process else {}


def _held(output: Path, wait: bool) -> AbstractContextManager[None]:
    """The lock of a folder of vectors, which is made where it is missing; none of one that nobody can write to.

    Raises:
        ValueError: it holds something else.
    """
    own = (LOCK, f"{INDEX}.part")  # of a run that was killed at its beginning
    if output.is_dir() and read_facts(output) is None and any(path.name not in own for path in output.iterdir()):
        raise ValueError(f"--output_dir {output} is not empty and has no {INDEX}: name a new folder.")
    output.mkdir(parents=True, exist_ok=True)
    return alone(output, output / LOCK, wait) if os.access(output, os.W_OK) else nullcontext()


def embed(
    encoder: Teacher,
    source: ImageFolder | ImageRows | TextLines,
    output: Path,
    facts: dict,
    projection: torch.Tensor | None = None,
    batch_size: int = 64,
    shard_rows: int = SHARD_ROWS,
    as_npy: bool = False,
    replace: bool = False,
) -> dict[str, str]:
    """Brings the vectors of a source up to date. Called on every process; [`finish`] makes the folder whole.

    Args:
        encoder: on its device.
        source: what there is now.
        output: the folder, which no other run is at work on.
        facts: `model`, `fingerprint`, `width`, `projection`: whose vectors they are.
        projection: `[D, k]`, for an index that a student searches and its teacher fills; see [`projection_of`].
        batch_size: images or texts at a time.
        shard_rows: in a file.
        as_npy: vectors into .npy files.
        replace: drop what the folder holds where none of it is of this source, in place of an error.

    Returns:
        What was left out, id -> why.

    Raises:
        ValueError: the folder holds vectors of another model, width or projection, or of other images; or the model
            gives no numbers.
    """
    state, kind = PartialState(), "texts" if isinstance(source, TextLines) else "images"
    work = [agree(lambda: _take_up(source, output, facts, kind, replace) if state.is_main_process else None)]
    broadcast_object_list(work)
    pending, number = work[0]
    chunks = [range(start, min(start + shard_rows, len(pending))) for start in range(0, len(pending), shard_rows)]
    own = [(number + i, chunk) for i, chunk in enumerate(chunks) if i % state.num_processes == state.process_index]
    batches = [list(chunk[i : i + batch_size]) for _, chunk in own for i in range(0, len(chunk), batch_size)]

    def write_own() -> dict[str, str]:
        skipped, left = {}, sum(len(chunk) for _, chunk in own)
        found = encode(encoder, kind[:-1], partial(source.read, pending), batches, default_workers())
        label = f"{kind}, process 1 of {state.num_processes}" if state.num_processes > 1 else kind
        with tqdm(total=left, desc=label, unit=f" {kind}", disable=None if state.is_main_process else True) as bar:
            for place, chunk in own:
                ids, parts, done = [], [], 0
                while done < len(chunk):
                    rows, features, unreadable = next(found)
                    if rows:
                        ids += [pending[i] for i in rows]
                        parts.append(embeddings(features, facts["width"], projection).half().numpy())
                    skipped |= {pending[i]: reason for i, reason in unreadable.items()}
                    done += len(rows) + len(unreadable)
                    bar.update(len(rows) + len(unreadable))
                if ids:
                    file = output / f"{kind}-{place:05d}.parquet"
                    write_shard(file, source.columns(ids), np.concatenate(parts), as_npy)
        return skipped

    skipped = [agree(write_own)]  # a model that gives no numbers on one process ends all
    if state.num_processes > 1:
        skipped = gather_object(skipped)
    state.wait_for_everyone()
    return source.skipped | {own: reason for part in skipped for own, reason in part.items()}


def _take_up(source, output: Path, facts: dict, kind: str, replace: bool) -> tuple[list[str], int]:
    """The ids that are still to be embedded, and the number of the next shard; what is gone or changed is dropped."""
    before = read_facts(output)
    if before is not None and any(before[name] != facts[name] for name in ("fingerprint", "width", "projection")):
        differs = [name for name in ("fingerprint", "width", "projection") if before[name] != facts[name]]
        raise ValueError(
            f"{output} holds vectors of {before['model']} with {before['width']} numbers, which differ in their "
            f"{named(differs)}: name another --output_dir."
        )
    pending, there = dict.fromkeys(source.ids), {file: read_columns(file) for file in shards_of(output, kind)}
    stored = [own for table in there.values() for own in table["id"].to_pylist()]
    if stored and not replace and pending.keys().isdisjoint(stored):
        raise ValueError(
            f"{output} holds vectors of {len(stored):,} {kind}, such as {printable(stored[0])}, none of which is in "
            f"{facts['source']}: name the images that it is of, or another folder for the vectors."
        )
    number = 1 + max((int(file.stem.rpartition("-")[2]) for file in there), default=-1)
    changes = []
    for file, table in there.items():
        rows = table.to_pylist()
        current = [source.current(row) if row["id"] in pending else None for row in rows]
        for row in current:
            if row is not None:
                del pending[row["id"]]
        if current != rows:
            changes.append((file, current))
    # What could not be read before is tried again: unless it can be read now, nothing is written.
    if before is not None and before["complete"] and not changes and pending.keys() <= before["skipped"].keys():
        return list(pending), number
    for left in output.glob("*.part"):  # of a run that was killed
        if left.stem == INDEX or SHARD.fullmatch(f"{Path(left.stem).stem}.parquet"):
            left.unlink()
    write_facts(output, {**facts, "complete": False})
    for file, current in changes:
        if kept := [row for row in current if row is not None]:
            as_npy = file.with_suffix(".npy").is_file()
            columns = {name: [row[name] for row in kept] for name in kept[0]}
            rest = read_shard(file)[1][[row is not None for row in current]]
            # Where rows go, under a new name: the old one goes once the new one is there, and a kill between leaves
            # each row twice, which the next run sees.
            target = file if len(kept) == len(current) else output / f"{kind}-{number:05d}.parquet"
            write_shard(target, columns, rest, as_npy)
            number += target != file
        if len(kept) < len(current):
            remove_shard(file)
    return list(pending), number


def finish(output: Path, facts: dict, skipped: dict[str, str]) -> dict:
    """Says in `index.json` which shards make the whole; on the first process.

    Raises:
        ValueError: there are no images.
    """
    counts, shards = {}, {}
    for kind in ("images", "texts"):
        shards[kind] = [file.name for file in shards_of(output, kind)]
        counts[kind] = sum(rows_of(output / name) for name in shards[kind])
    if not counts["images"]:
        reasons = "; ".join(f"{printable(own)}: {reason}" for own, reason in list(skipped.items())[:3])
        raise ValueError(f"None of {len(skipped):,} images can be read: {reasons}")
    facts = {**facts, **counts, "shards": shards, "skipped": skipped, "complete": True}
    if facts != read_facts(output):
        write_facts(output, facts)
    return facts


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("inference.embed", __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of any dual encoder.")
    parser.add_argument("--images", required=True, help="A folder of image files, or a dataset, tars, a Hub id.")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="Also embed the lines of a file.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the vectors; brought up to date.")
    parser.add_argument("--format", choices=("parquet", "npy"), default="parquet", help="(default: %(default)s)")
    parser.add_argument(
        "--truncate_dim", type=int, metavar="K", help="Keep the first K numbers; a rotated student's are its best."
    )
    parser.add_argument(
        "--student",
        metavar="FOLDER",
        help="Of the model, the student's teacher, make vectors that this student searches: by its "
        "teacher_pca.safetensors.",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time (default: %(default)s).")
    parser.add_argument(
        "--shard_rows", type=int, default=SHARD_ROWS, help="Rows of a file, which a kill loses (default: %(default)s)."
    )
    options = parser.parse_args(arguments)
    for name in ("truncate_dim", "batch_size", "shard_rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    place = options.output_dir.expanduser().resolve()
    if place.exists() and not place.is_dir():
        parser.error(f"--output_dir {options.output_dir} is a file: name a folder")
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        parser.error(f"--output_dir {options.output_dir}: {place} is no folder that can be written to")
    if options.texts is not None and not options.texts.is_file():
        parser.error(f"--texts {options.texts}: there is no such file")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # Without a GPU torchrun's processes know of each other only so; the first of them waits for the slowest.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    use_the_cores(state.device, state.num_processes)
    source = open_images(options.images)
    texts = None if options.texts is None else TextLines(options.texts)
    projection = digest = None
    if options.student is not None:
        projection, digest = projection_of(options.student)
        if projection is None:
            raise ValueError(f"--student {options.student} has no teacher_pca.safetensors: name a rotated student.")
    encoder = load_encoder(options.model_name_or_path, state.device)
    if projection is not None and len(projection) != encoder.dim:
        raise ValueError(
            f"--student {options.student} learned from a teacher of {len(projection)} numbers, and "
            f"{options.model_name_or_path} gives {encoder.dim}."
        )
    whole = encoder.dim if projection is None else projection.shape[1]
    if options.truncate_dim is not None and options.truncate_dim > whole:
        raise ValueError(f"--truncate_dim {options.truncate_dim}: the model gives {whole} numbers.")
    facts = {
        "model": shown_name(options.model_name_or_path),
        "fingerprint": fingerprint(encoder),
        "width": options.truncate_dim or whole,
        "projection": digest,
        "source": shown_name(options.images),
    }
    with updated(
        encoder,
        [source] if texts is None else [source, texts],
        options.output_dir,
        facts,
        projection=projection,
        batch_size=options.batch_size,
        shard_rows=options.shard_rows,
        as_npy=options.format == "npy",
    ) as facts:
        if not state.is_main_process:
            return
    if skipped := facts["skipped"]:
        images = counted(len(skipped), "image could not be read and was", "images could not be read and were")
        print(f"{images} left out, listed in {INDEX}:")
        print("\n".join(f"  {printable(own)}: {reason}" for own, reason in list(skipped.items())[:SHOWN]))
    also = f" and {facts['texts']:,} texts" if facts["texts"] else ""
    print(f"{facts['images']:,} images{also}, {facts['width']} numbers each, in {options.output_dir}")


if __name__ == "__main__":
    run_launched(partial(run_program, main))
