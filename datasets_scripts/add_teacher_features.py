"""Adds a teacher's output features to an image-text dataset: what a student is distilled from, made once.

accelerate launch datasets_scripts/add_teacher_features.py --dataset D --teacher ID [--teacher ID2 ...] --output DIR

It can be stopped at any moment: the same command goes on from the last whole file, with the same result. The output is
a folder as the Hub has it (`data/*.parquet`, a card), for `train.py --dataset_name DIR`, `datasets.load_dataset(DIR)`,
streamed or not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download

from datasets_scripts.teacher_dataset import assemble, figures_table
from datasets_scripts.teacher_features import Encoding, encode_dataset
from teachers import Teacher, load_teacher
from trainers.data_loading import license_of, open_dataset
from trainers.distributed import use_the_cores


def add_teacher_features(
    rows: datasets.DatasetDict | datasets.IterableDatasetDict,
    teachers: list[Teacher],
    identity: dict,
    output: Path,
    encoding: Encoding,
    source: str,
    num_workers: int,
    overwrite: bool = False,
    license: str | None = None,
) -> None:
    """Writes a dataset with teacher features; the work of an earlier, stopped call is taken up.

    Runs on every process of `accelerate launch`. Until all is done the files stand in `{output}.partial`.

    Args:
        rows: the splits, map-style or streamed: `image`, `captions`, `image_id` and any others.
        teachers: one, or several whose features are joined.
        identity: what tells these rows and teachers from others, see [`identity_of`]: partial work is taken up only
            with the same.
        output: a folder that does not exist, or is replaced with `overwrite`.
        encoding: how features are made and stored.
        source: what the rows are, for the card.
        num_workers: processes that decode and tokenise.
        overwrite: replace `output`, and start afresh where the partial work was done with other settings.
        license: of the data, for the card.

    Raises:
        ValueError: `output` exists, or another process is at work on it, or the partial work there was done with other
            settings; see [`encode_dataset`].
    """
    state = PartialState()
    partial = output.with_name(output.name + ".partial")
    described = describe(teachers, encoding)
    settings = json.loads(json.dumps({**identity, "teacher": described, **asdict(encoding)}))
    with _alone(partial) if state.is_main_process else nullcontext():
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists: name another --output, or replace it with --overwrite.")
        if state.is_main_process:
            _take_up(partial, settings, overwrite)
        state.wait_for_everyone()
        files = encode_dataset(rows, teachers, json.dumps(described), encoding, partial, num_workers)
        state.wait_for_everyone()
        if state.is_main_process:
            figures = assemble(partial, files, described, source, license, encoding.int8)
            # From here to the end a kill loses nothing: the files under `partial` are still there.
            if output.exists():
                shutil.rmtree(partial / "replaced", ignore_errors=True)
                os.rename(output, partial / "replaced")
            os.rename(partial / "dataset", output)
            _discard(partial)
            print(f"\n{figures_table(figures)}\n" if figures else "")
            print(f"The dataset is in {output}: train.py --dataset_name {output}")
    state.wait_for_everyone()


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """While no other process is at work on the folder."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{partial}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"Another process is at work on {partial}: wait for it, or name another --output.") from error
    try:
        yield
    finally:
        os.unlink(lock.lock_file)
        lock.release()


def identity_of(rows: datasets.DatasetDict | datasets.IterableDatasetDict, name: str, teachers: list[str]) -> dict:
    """What tells rows and teachers from others: fingerprints of the splits, and of the teachers' files.

    Args:
        rows: the splits. A stream has no fingerprint: its files stand for it, or the dataset's commit on the Hub.
        name: as given to [`open_dataset`].
        teachers: [`fingerprint`] of each.
    """
    if isinstance(rows, datasets.DatasetDict):
        return {"rows": {split: part._fingerprint for split, part in rows.items()}, "teacher files": teachers}
    if Path(name).exists():
        found = [(path, path.stat()) for path in sorted(Path(name).resolve().rglob("*")) if path.is_file()]
        which = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]
    else:
        which = [name, HfApi().dataset_info(name).sha]
    columns = {split: str(part.features) for split, part in rows.items()}
    return {"rows": which, "columns": columns, "teacher files": teachers}


def describe(teachers: list[Teacher], encoding: Encoding) -> dict:
    """What the column `teacher` says: one teacher's description, or those of several and how they are joined."""
    described = [teacher.describe() for teacher in teachers]
    stored = {"stored_as": "int8 with a scale a row" if encoding.int8 else "float16"}
    if encoding.image_size is not None:
        stored["images"] = f"stored with no side above {encoding.image_size} pixels; the teacher saw them whole"
    if len(described) == 1:
        return {**described[0], **stored}
    return {
        "id": " + ".join(teacher["id"] for teacher in described),
        "dim": sum(teacher["dim"] for teacher in described),
        "teachers": described,
        "weights": encoding.weights,
        "joined": "each normalised and scaled by the root of its weight: a dot product is the mean of the cosines",
        **stored,
    }


def fingerprint(model_id: str, revision: str | None) -> str:
    """The teacher's commit on the Hub, or a digest of the files in a folder that have to do with features."""
    folder = Path(model_id)
    if not folder.is_dir():
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=["*.json"])).name
    digest = hashlib.blake2b(digest_size=16)
    # Beside the model: one folder deep those of sentence-transformers' modules. A run's results and logs are not.
    for path in sorted([*folder.glob("*"), *folder.glob("[0-9]*/*")]):
        if (
            path.is_file()
            and path.suffix not in (".md", ".png")
            and not path.name.endswith(("_results.json", "_args.json"))
        ):
            digest.update(path.relative_to(folder).as_posix().encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def cached_teacher_features(
    rows: datasets.DatasetDict, model_id: str, revision: str | None, source: str, trust_remote_code: bool
) -> Path:
    """Folder of the rows with a teacher's features, made unless an earlier run has made them.

    They are kept in the cache of `datasets`, by the fingerprint of the rows, the teacher's revision and the dtype.
    """
    state = PartialState()
    identity = identity_of(rows, source, [fingerprint(model_id, revision)])
    key = json.dumps([identity, str(default_dtype()), asdict(Encoding())], sort_keys=True)
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dsmd_teacher_features" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.run")  # a second run of the same waits for the first, then finds its folder
    _acquire_together(lock, state)
    try:
        if not folder.is_dir():
            teacher = load_teacher(
                model_id, revision, dtype=default_dtype(), device=state.device, trust_remote_code=trust_remote_code
            )
            shown = Path(source).name if Path(source).exists() else source
            licence = license_of(rows, source)
            add_teacher_features(
                rows, [teacher], identity, folder, Encoding(), shown, default_workers(), license=licence
            )
            del teacher
            if state.device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        lock.release()
    return folder


def _acquire_together(lock: FileLock, state: PartialState) -> None:
    """The main process takes the lock. All meet after each try: processes give up on one that is away for long."""
    held = [False]
    while not held[0]:
        if state.is_main_process:
            with suppress(Timeout):
                lock.acquire(timeout=60)
                held = [True]
        broadcast_object_list(held)


def default_dtype() -> torch.dtype:
    return torch.bfloat16 if PartialState().device.type == "cuda" else torch.float32


def default_workers() -> int:
    """Loader workers of a process: its share of the cores, 8 at most."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // PartialState().num_processes))


def _discard(partial: Path) -> None:
    """Removes the partial folder under another name: killed meanwhile, no part of it is left that looks like work."""
    removed = _removed(partial)
    os.rename(partial, removed)
    shutil.rmtree(removed)


def _removed(partial: Path) -> Path:
    return partial.with_name(f".{partial.name}.removed")


def _take_up(partial: Path, settings: dict, overwrite: bool) -> None:
    """Makes the partial folder, or checks that what it holds was made with the same settings."""
    if _removed(partial).exists():  # of a run that was killed
        shutil.rmtree(_removed(partial))
    path = partial / "settings.json"
    if partial.exists() and {file.name for file in partial.iterdir()} - {"settings.json.part"}:
        if not path.is_file():
            raise ValueError(f"{partial} is in the way, and is no partial work of this program: move it.")
        before = json.loads(path.read_text())
        if before == settings:
            return
        if not overwrite:
            differing = [name for name in settings if before.get(name) != settings[name]]
            raise ValueError(
                f"{partial} holds work with another {', '.join(differing)}: finish it with the settings it was begun "
                "with, remove it, or start afresh with --overwrite."
            )
        _discard(partial)
    partial.mkdir(exist_ok=True)
    beside = partial / "settings.json.part"
    beside.write_text(json.dumps(settings))
    os.replace(beside, path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="'icons', a folder (save_to_disk or parquet) or a Hub id")
    parser.add_argument("--dataset_config_name", help="configuration of a Hub dataset")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream, never storing it")
    parser.add_argument("--teacher", action="append", required=True, help="folder or Hub id; may be given again")
    parser.add_argument("--teacher_revision", action="append", help="one for each --teacher, in their order")
    parser.add_argument("--weights", type=float, nargs="+", help="of several teachers; equal by default")
    parser.add_argument("--output", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--push_to_hub", metavar="REPO", help="also push to this Hub dataset, e.g. name/coco-clip")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
                        help="of the teacher's arithmetic; auto: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="store int8 with a scale a row: half of float16")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--shard_rows", type=int, default=1024, help="rows in a file")
    parser.add_argument("--image_size", type=int, metavar="PIXELS",
                        help="store images at the student's size: faster to read, smaller on disk")  # fmt: skip
    parser.add_argument("--num_workers", type=int, help="processes that decode, for each process; default: its cores")
    parser.add_argument("--license", help="of the data; default: what the dataset says")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the teachers' repositories run code")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "shard_rows", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected 1 or more")
    for name in ("teacher_revision", "weights"):
        values = getattr(options, name)
        if values is not None and len(values) != len(options.teacher):
            parser.error(f"--{name}: {len(values)} values for {len(options.teacher)} teachers")
    if options.weights is not None and min(options.weights) <= 0:
        parser.error(f"--weights {options.weights}: expected numbers above 0")
    if options.output.exists():  # before a teacher is loaded
        if not options.overwrite and not options.push_to_hub:
            parser.error(f"--output {options.output} exists: name another, or replace it with --overwrite")
        if not list(options.output.glob("data/*.parquet")) or not (options.output / "README.md").is_file():
            parser.error(f"--output {options.output} exists and was not made by this program: name another")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # Left to itself accelerate joins no processes on a CPU, and gives up on a process that waits for ten minutes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    use_the_cores(state.device, state.num_processes)
    if options.push_to_hub and state.is_main_process:
        HfApi().create_repo(options.push_to_hub, repo_type="dataset", exist_ok=True)  # now, not after hours
    if options.overwrite or not options.output.exists():
        try:
            make(options, state)
        except ValueError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            if not options.output.with_name(f"{options.output.name}.partial").exists():
                sys.exit(f"error: {error}")
            raise OSError(
                f"{error}\nNothing that was written is lost: mend this, and the same command goes on from "
                f"{options.output}.partial."
            ) from error
    elif state.is_main_process:
        _check_teacher(options)
    if options.push_to_hub and state.is_main_process:
        HfApi().upload_folder(
            folder_path=options.output,
            repo_id=options.push_to_hub,
            repo_type="dataset",
            delete_patterns=["data/*.parquet"],  # of an earlier push, with another number of files
        )


def _check_teacher(options: argparse.Namespace) -> None:
    """An output that was there already is pushed as it is: only where it is of the teachers that are named."""
    first = next(options.output.glob("data/*.parquet"))
    made_by = json.loads(pq.ParquetFile(first).read_row_group(0, columns=["teacher"])["teacher"][0].as_py())["id"]
    asked = " + ".join(Path(name).name if Path(name).is_dir() else name for name in options.teacher)
    if made_by != asked:
        sys.exit(f"error: {options.output} has features of {made_by}, not of {asked}: it is not pushed. Name another "
                 "--output, or make it again with --overwrite.")  # fmt: skip


def make(options: argparse.Namespace, state: PartialState) -> None:
    dtype = default_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    revisions = options.teacher_revision or [None] * len(options.teacher)
    weights = options.weights or [1.0] * len(options.teacher)
    with state.main_process_first():
        rows = open_dataset(options.dataset, options.dataset_config_name, options.streaming)
    teachers = [
        load_teacher(
            name, revision=revision, dtype=dtype, device=state.device, trust_remote_code=options.trust_remote_code
        )
        for name, revision in zip(options.teacher, revisions)
    ]
    add_teacher_features(
        rows,
        teachers,
        identity_of(rows, options.dataset, [fingerprint(*which) for which in zip(options.teacher, revisions)]),
        options.output,
        Encoding(
            weights=[weight / sum(weights) for weight in weights],
            int8=options.int8,
            batch_size=options.batch_size,
            shard_rows=options.shard_rows,
            image_size=options.image_size,
        ),
        source=Path(options.dataset).name if Path(options.dataset).exists() else options.dataset,
        num_workers=default_workers() if options.num_workers is None else options.num_workers,
        overwrite=options.overwrite,
        license=options.license or license_of(rows, options.dataset),
    )


if __name__ == "__main__":
    main()
