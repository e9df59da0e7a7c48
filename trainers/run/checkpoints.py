"""Checkpoints that are whole or absent: sealed beside, flushed, renamed; and which is the last whole one of a run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError

from rows.files import give_rights, write_whole


logger = logging.getLogger(__name__)

NOT_THE_DISKS = (torch.OutOfMemoryError, torch.distributed.DistError)  # RuntimeErrors that are no fault of the disk
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors raise their own for a disk that is full
MANIFEST = "_manifest.json"  # sizes and digests; the underscore keeps it out of the model repository's root
BESIDE = "_checkpoint"  # where a checkpoint is written
WRITING = "_writing"  # where the files of a student are written before they are moved into its folder
OLD = "_old-"  # prefix of a checkpoint that is being replaced, until the new one has its name
REPLACED = "_replaced"  # where an old run lies until the one in its place has a checkpoint


class NotResumable(ValueError):
    """The checkpoint to resume from is damaged or of another run; the message says which, and what to do."""


def seal(folder: Path) -> None:
    """Writes down the size and digest of every file of a checkpoint, and flushes all to the disk.

    Raises:
        OSError: the disk is full or refuses.
    """
    files = {}
    for path in _files(folder):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2))
    _flush(folder / MANIFEST)
    _flush(folder)


def reseal(folder: Path, name: str) -> None:
    """Updates a checkpoint's manifest for one rewritten file. The original of a hard-linked manifest stays."""
    files = json.loads((folder / MANIFEST).read_text())
    files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
    with write_whole(folder / MANIFEST) as beside:
        beside.write_text(json.dumps(files, indent=2))


def copy_sealed(source: Path, target: Path) -> None:
    """Copies the files that a checkpoint's manifest names, and nothing else that lies in its folder."""
    sealed = json.loads((source / MANIFEST).read_text())
    for path in [*_files(source), source / MANIFEST]:
        name = path.relative_to(source).as_posix()
        if name in sealed or name == MANIFEST:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)


def move_files(beside: Path, folder: Path, last: tuple[str, ...]) -> None:
    """Renames every file of `beside` into `folder`, those in `last` at the end, in its order; removes `beside`."""
    give_rights(beside)
    names = [path.relative_to(beside).as_posix() for path in _files(beside)]
    for name in sorted(names, key=lambda name: (last.index(name) + 1 if name in last else 0, name)):
        (folder / name).parent.mkdir(exist_ok=True)
        _flush(beside / name)
        (beside / name).replace(folder / name)
    shutil.rmtree(beside)


def publish(beside: Path, folder: Path) -> None:
    """Renames a sealed checkpoint to `folder`. A checkpoint that an earlier attempt left there is deleted; a
    folder that is no checkpoint of ours is renamed."""
    give_rights(beside)
    old = folder.with_name(f"{OLD}{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists() and (folder / MANIFEST).is_file():
        folder.rename(old)
    elif folder.exists():
        names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        folder.rename(aside)
        logger.warning(f"{folder} has no {MANIFEST}, so it is no checkpoint of this program: it is now {aside}.")
    beside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    discard_replaced(folder.parent)


def discard_replaced(output_dir: Path) -> None:
    """Deletes the old run that was moved aside. Called once the new one has a checkpoint or its final student."""
    old = output_dir / f"{OLD}run"
    shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed
    if (output_dir / REPLACED).is_dir():
        (output_dir / REPLACED).rename(old)  # first, so that a kill in mid-delete leaves nothing that looks like a run
        shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
            if _digest(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not finished"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def of_run(output_dir: str | os.PathLike) -> list[Path]:
    """A run's folders `checkpoint-N`, by N."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step)


def last_whole(output_dir: str | os.PathLike) -> Path | None:
    """The last whole checkpoint of a run; damaged ones after it are named and passed over."""
    for old in Path(output_dir).glob(f"{OLD}checkpoint-*"):  # left by a kill between the renames of `publish`
        if not (folder := old.with_name(old.name.removeprefix(OLD))).exists():
            old.rename(folder)
    for folder in reversed(of_run(output_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder
        logger.warning(f"{folder} is damaged and passed over: {wrong}.")
    return None


def to_go_on_from(asked: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The checkpoint to resume from, checked to be whole; None where the run starts from the beginning.

    Args:
        asked: a checkpoint's folder; True for the last whole one in `output_dir`; None or False for none.

    Raises:
        NotResumable: it is damaged, or there is none.
    """
    if not asked:
        return None
    if asked is True:
        folder = last_whole(output_dir)
        if folder is None:
            raise NotResumable(f"There is no whole checkpoint in {output_dir} to go on from.")
        return str(folder)
    wrong = damage(Path(asked))
    if wrong is not None:
        raise NotResumable(
            f"{asked} is damaged: {wrong}. Resume from the one before it; `--resume_from_checkpoint last` finds it."
        )
    return str(asked)


def cannot_write(what: str, error: Exception, output_dir: str | os.PathLike) -> OSError:
    """The error for a disk that refuses a checkpoint; it names the last one there is."""
    before = of_run(output_dir)
    return OSError(
        f"{what} could not be written: {error_line(error)}. Last checkpoint: "
        f"{before[-1] if before else 'none'}. Free the disk, then go on by --resume_from_checkpoint last."
    )


def error_line(error: Exception) -> str:
    """The error's type and message, short enough for a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def rotate(output_dir: str | os.PathLike, limit: int | None, newest: Path, best: str | None) -> None:
    """Deletes the oldest checkpoints over the limit: by step and not by time, since clocks are set back. It spares the
    newest, the best, and folders without a manifest, which this program did not write."""
    kept = {newest} if best is None else {newest, Path(best)}
    older = [folder for folder in of_run(output_dir) if folder not in kept and (folder / MANIFEST).is_file()]
    for folder in older[: max(0, len(older) + len(kept) - limit)] if limit else []:
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def _flush(path: Path) -> None:
    """Forces a file, or the list of a folder's names, from the system's cache to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
