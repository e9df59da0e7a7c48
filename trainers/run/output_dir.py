"""A run's folder: whose it is, and the checkpoint in it to go on from."""

from __future__ import annotations

import atexit
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from .checkpoints import last_whole
from .hub_push import fetch_last_checkpoint


LOCK = "_lock"  # in output_dir, while a run writes there
LOCK_SECONDS = 15  # loader workers of a run that was killed hold it until they notice


def prepare_output_dir(args: TrainingArguments, overwrite: bool) -> None:
    """Refuses to write a run into another's folder, unless told to replace it. Of two at once the second stops."""
    if not args.do_train or args.process_index != 0:
        return
    folder = Path(args.output_dir)
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ValueError(f"Another run is writing to {folder}: wait for it, or give another --output_dir.") from None
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written to: {error}. Give another --output_dir.") from None
    atexit.register(lock.release)  # held until then
    old = [path for path in folder.iterdir() if path.name != LOCK]
    if args.resume_from_checkpoint or args.resume_from_hub or not old:
        return
    if not overwrite:
        raise ValueError(
            f"output_dir {folder} is not empty: it holds another run. Give another --output_dir, go on with that run "
            "by --resume_from_checkpoint last, or replace it by --overwrite_output_dir."
        )
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def last_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: that of `--resume_from_hub`, or of `--resume_from_checkpoint`: a folder, or for
    'last' or 'True' the run's last whole one, None where it was stopped before its first."""
    if args.resume_from_hub is not None:
        with args.main_process_first(desc="checkpoint"):
            return fetch_last_checkpoint(args.resume_from_hub, args.output_dir, write=args.process_index == 0)
    if args.resume_from_checkpoint is None or str(args.resume_from_checkpoint).lower() not in ("last", "true"):
        return args.resume_from_checkpoint
    with args.main_process_first(desc="last checkpoint"):
        checkpoint = last_whole(args.output_dir)
    if checkpoint is None:
        print(f"There is no whole checkpoint in {args.output_dir}: the run starts from the beginning.")
    return checkpoint and str(checkpoint)
